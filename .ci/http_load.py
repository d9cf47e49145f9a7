"""A server with -http under load: .ci/http_load.py [SECONDS]

Twenty readers wait for the next mail again and again, while clients send mails and people look at pages. No reader may
miss a mail or see one twice, and the stop ends the server at once, with exit status 0.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import signal
import smtplib
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
READERS, WRITERS = 20, 4


class Load:
    def __init__(self, seconds: float) -> None:
        command = [sys.executable, str(ROOT / "smtpmock.py"), "-http=0", "-json", "-quiet"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.listening = json.loads(self.process.stdout.readline())
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        self.end = time.monotonic() + seconds
        self.sent: list[str] = []
        self.seen: list[list[str]] = [[] for _ in range(READERS)]
        self.pages = 0
        self.faults: list[str] = []

    def goes_on(self) -> bool:
        return time.monotonic() < self.end and not self.faults

    def ask(self, target: str, method: str = "GET") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.listening["http"].removeprefix("http://"), timeout=90)
        try:
            connection.request(method, target)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def read(self, index: int) -> None:
        after = 0
        while True:
            try:
                status, body = self.ask(f"/messages?after={after}&timeout=60&accepted=true")
            except OSError:
                return  # it has stopped
            answer: dict[str, Any] = json.loads(body)
            self.seen[index] += [record["subject"] for record in answer["messages"]]
            after = answer["next"]
            if status == 404:
                return

    def write(self, index: int) -> None:
        for number in itertools.count():
            if not self.goes_on():
                return
            with smtplib.SMTP("127.0.0.1", self.listening["port"], timeout=60) as client:
                for part in range(3):
                    subject = f"{index}-{number}-{part}"
                    client.sendmail("a@example.com", ["b@example.com"], f"Subject: {subject}\r\n\r\nHello\r\n")
                    self.sent.append(subject)
                    time.sleep(0.01)

    def look(self) -> None:
        while self.goes_on():
            for link in ["/", *re.findall(r"/view/\d+", self.ask("/")[1].decode())[:5], "/messages?subject=-9-"]:
                status, _ = self.ask(link)
                self.pages += 1
                if status not in (200, 404):
                    self.faults.append(f"{link}: {status}")
            time.sleep(0.05)

    def count(self) -> tuple[int, int]:
        """The threads and the descriptors of the server."""
        base = Path(f"/proc/{self.process.pid}")
        return len(os.listdir(base / "task")), len(os.listdir(base / "fd"))

    def run(self) -> None:
        readers = [threading.Thread(target=self.read, args=(index,)) for index in range(READERS)]
        others = [threading.Thread(target=self.write, args=(index,)) for index in range(WRITERS)]
        others += [threading.Thread(target=self.look)]
        for thread in readers + others:
            thread.start()
        for thread in others:
            thread.join()
        deadline = time.monotonic() + 30
        while any(len(seen) < len(self.sent) for seen in self.seen) and time.monotonic() < deadline:
            time.sleep(0.05)
        busy = self.count()
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(20) == 0, self.process.returncode
        took = time.monotonic() - began
        for thread in readers:
            thread.join(20)
            assert not thread.is_alive()
        assert not self.faults, self.faults
        for seen in self.seen:
            assert sorted(seen) == sorted(self.sent), (len(seen), len(self.sent))
        print(
            f"{len(self.sent)} mails, each seen by {READERS} readers; {self.pages} pages; {busy[0]} threads and",
            end=" ",
        )
        print(f"{busy[1]} descriptors before the stop, which took {took * 1000:.0f} ms")
        assert took < 2


if __name__ == "__main__":
    Load(float(sys.argv[1]) if len(sys.argv) > 1 else 60).run()
