"""Does what the Ruby gem smtp_mock does with the server's command: python .ci/gem.py PATH-OF-SMTPMOCK

The gem finds smtpmock by a symlink, asks for its version, spawns it through a shell, and takes any line on stderr
within 100 ms for a failed start. The exit status is 1 if a check fails.
"""

import contextlib
import os
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = 0.1  # seconds; the gem then reads stderr, and its user connects
PATIENCE = 10.0
LEAST_VERSION = (1, 5, 0)

folder = Path(tempfile.mkdtemp())
link = folder / "smtpmock"
log = folder / "err_log"
environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


# A bash becomes the command that it is given, like the sh of most systems, and so the signals of the gem reach the
# server. The sh of Debian stays between and would be stopped alone, whatever the server is.
SHELL = "/bin/bash"


class StartError(Exception):
    """What the server said on stderr."""


def find_version() -> str:
    path = os.readlink(link)
    assert os.access(path, os.X_OK), path
    said = subprocess.run(
        "smtpmock -v", shell=True, env=environment, capture_output=True, text=True, check=False
    ).stdout
    match = re.search("smtpmock: (.+)", said)
    assert match is not None, said
    assert tuple(map(int, match[1].split("."))) >= LEAST_VERSION, match[1]
    return match[1]


def compose(options: dict[str, Any]) -> str:
    """The command line, as the gem writes it: sorted, texts and lists in double quotes, bare switches."""
    flags = []
    for name, value in options.items():
        flag = "-" + re.sub(r"_(\D)", lambda letter: letter[1].upper(), name)
        if value is True:
            flags.append(flag)
        elif isinstance(value, int):
            flags.append(f"{flag}={value}")
        else:
            flags.append(f'{flag}="{",".join(value) if isinstance(value, list) else value}"')
    return " ".join(["smtpmock", *sorted(flags)])


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Server:
    def __init__(self, **options: Any) -> None:
        self.port = options.setdefault("port", find_free_port())
        with log.open("w") as errors:  # one file for all servers, as in the gem
            self.process = subprocess.Popen(
                compose(options),
                shell=True,
                executable=SHELL,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        time.sleep(WARM_UP)
        self.is_in_time = is_open(self.port)
        if said := log.read_text():
            self.process.wait(PATIENCE)
            raise StartError(said.splitlines()[0])

    def wait(self) -> "Server":
        """Until it listens: on a machine that is busy, this may be after the gem's 100 ms."""
        wait_until(lambda: is_open(self.port), "it does not listen")
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Returns the exit status."""
        os.kill(self.process.pid, number)
        status = self.process.wait(PATIENCE)
        assert not is_open(self.port), "the server has outlived its signal"
        assert log.read_text() == "", log.read_text()
        return status


def wait_until(condition: Any, complaint: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.01)


def check_start() -> str:
    """The best of some starts is in time."""
    for attempt in range(1, 11):
        server = Server()
        in_time = server.is_in_time
        server.wait().stop()
        if in_time:
            return f"it listens {WARM_UP} s after it was spawned (attempt {attempt})"
    raise AssertionError(f"in ten attempts, it never listened {WARM_UP} s after it was spawned")


def check_three_at_once() -> str:
    servers = [
        Server(
            host="127.0.0.1", log=True, session_timeout=60, shutdown_timeout=5, msg_size_limit=1000,
            multiple_rcptto=True, multiple_message_receiving=True, response_delay_helo=1,
            msg_greeting="220 It's $5, `hi`".replace("$", "\\$").replace("`", "\\`"),
            msg_data_received="354 End data with <CR><LF>.<CR><LF>",
        ),
        Server(
            fail_fast=True, blacklisted_helo_domains=["a.com", "b.com"], msg_helo_blacklisted_domain="421 no",
            msg_quit_cmd="221 bye",
        ),
        Server(
            blacklisted_mailfrom_emails=["a@a.com"], blacklisted_rcptto_emails=["b@b.com", "c@c.com"],
            not_registered_emails=["d@d.com"], msg_rcptto_not_registered_email="550 who?",
            msg_invalid_cmd_rset_sequence="503 no", msg_rset_received="250 again",
        ),
    ]  # fmt: skip
    clients = first, second, third = [smtplib.SMTP() for _ in servers]
    greetings = [
        client.connect("127.0.0.1", server.wait().port) for client, server in zip(clients, servers, strict=True)
    ]
    assert greetings[0] == (220, b"It's $5, `hi`"), greetings
    started = time.monotonic()
    assert first.helo("a.com")[0] == 250
    assert time.monotonic() - started >= 1
    assert first.sendmail("a@a.com", ["b@b.com", "c@c.com"], "hi") == {}
    with contextlib.suppress(smtplib.SMTPDataError):
        first.sendmail("a@a.com", ["b@b.com"], "x" * 2000)
        raise AssertionError("too large a body was accepted")
    assert second.helo("b.com") == (421, b"no")
    assert third.helo("a.com")[0] == 250
    assert third.mail("a@a.com")[0] == 421
    assert third.mail("b@b.com")[0] == 250
    assert [third.rcpt(name) for name in ("c@c.com", "d@d.com")] == [(421, b"Service not available"), (550, b"who?")]
    assert third.rset() == (250, b"again")
    assert third.quit()[0] == 221
    assert [server.stop() for server in servers] == [0, 0, 0]
    for client in clients:
        client.close()
    return "three servers at once, with options of every kind"


def check_failed_starts() -> str:
    said = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for options in ({"port": taken.getsockname()[1]}, {"session_timeout": 99999999}, {"no_such": True}):
            for _ in range(10):
                try:
                    Server(**options).process.wait(PATIENCE)
                except StartError as error:
                    said.append(str(error))
                    break
    assert len(said) == 3, f"not all failed starts were told on stderr within {WARM_UP} s: {said}"
    return f"failed starts: {said}"


def check_kill() -> str:
    server = Server().wait()
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    return "a kill"


def main() -> int:
    link.symlink_to(Path(sys.argv[1]).absolute())
    try:
        print("version", find_version())
        for check in (check_start, check_three_at_once, check_failed_starts, check_kill):
            print("ok:", check())
    except AssertionError as error:
        print(f"FAILED: {error!r}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
