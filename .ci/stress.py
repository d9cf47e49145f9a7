"""Use servers from some hundred threads at once, and check that nothing is lost, doubled, torn or left.

    python .ci/stress.py [SECONDS]

It takes 60 seconds if none are given. With a GIL, threads are switched every microsecond. Each part has a server of
its own, and all run at the same time:

    purging     64 senders, every second one with TLS, some of which leave within a mail; threads that wait and purge
    waiting     senders that wait for their own mail among those of the others
    contest     threads that purge the same mails at the same moment
    rules       groups of sessions that use up rules with `times`, which are added and removed all the time
    restarts    a server that starts and stops, by one thread or two, under clients that go on connecting
    changes     configure() and reset() while sessions begin

Prints how much was done, and exits with 1 if anything is wrong. Every random choice comes from the seed that is
printed first; the order in which threads run does not.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import functools
import gc
import os
import random
import socket
import ssl
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smtpmock

TIMEOUT = 30  # seconds after which something that should have happened never will
SENDERS = 64


class Faults:
    """What was found to be wrong; the first of each kind, since one fault can have thousands of effects."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.count = 0
        self._lock = threading.Lock()

    def check(self, is_right: object, kind: str, about: object = "") -> None:
        if not is_right:
            with self._lock:
                self.count += 1
                self.texts.setdefault(kind, f"{kind}: {about}"[:1000])


FAULTS = Faults()
check = FAULTS.check


class Stop:
    """The end of the test, which every loop asks for."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    def __bool__(self) -> bool:
        return time.monotonic() >= self.at


class Tally:
    """Tokens of mails. Each thread writes to a list of its own; appending to a list is atomic anyhow."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    def count(self) -> Counter[str]:
        return Counter(self.tokens)


def make_content(token: str) -> bytes:
    """The body of a mail, which no part of another one can be mistaken for."""
    line = f"{token} ".encode() * 8 + b"\r\n"
    return f"Subject: {token}\r\n\r\n".encode() + line * (hash(token) % 50)


def read_token(message: smtpmock.Message) -> str:
    return message.content.partition(b"\r\n")[0].decode().removeprefix("Subject: ")


def has_token(token: str, message: smtpmock.Message) -> bool:
    return read_token(message) == token


def check_message(message: smtpmock.Message) -> str:
    """Check that all parts of a record belong to one mail. Returns its token."""
    token = read_token(message)
    check(message.content == make_content(token), "torn content", message.content)
    check(message.mail_from == f"{token}@example.com", "torn sender", (token, message.mail_from))
    check(message.rcpt_tos == [f"{token}@example.org", "all@example.org"], "torn recipients", (token, message.rcpt_tos))
    bodies = [line for line in message.transcript.split("\n") if line.startswith("C: <")]
    check(bodies == [f"C: <{len(message.content)} bytes>"], "torn transcript", message.transcript)
    return token


@functools.cache
def make_context() -> ssl.SSLContext:
    return smtpmock.Server(ssl_context="test").client_context()


class Client:
    """A connection; each method raises OSError if the server is gone."""

    def __init__(self, server: smtpmock.Server) -> None:
        self.socket = socket.create_connection((server.host, server.port), TIMEOUT)
        self.file = self.socket.makefile("rb")
        self.greeting = ""

    def __enter__(self) -> Client:
        try:
            self.greeting = self.read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.socket.close()

    def read(self) -> str:
        line = b"250-"
        while line[3:4] == b"-":
            line = self.file.readline()
            if not line.endswith(b"\n"):
                raise ConnectionError("the server has closed the connection")
        return line.decode().strip()

    def ask(self, line: str) -> str:
        return self.ask_together(line)[0]

    def ask_together(self, *lines: str) -> list[str]:
        """The replies to commands that are sent together."""
        self.socket.sendall("".join(f"{line}\r\n" for line in lines).encode())
        return [self.read() for _ in lines]

    def start_tls(self) -> None:
        check(self.ask("STARTTLS")[:3] == "220", "STARTTLS refused")
        self.file.close()
        self.socket = make_context().wrap_socket(self.socket, server_hostname="localhost")
        self.file = self.socket.makefile("rb")

    def begin(self, token: str) -> str:
        """Say all up to DATA. Returns the reply to that."""
        recipients = f"RCPT TO:<{token}@example.org>", "RCPT TO:<all@example.org>"
        return self.ask_together(f"MAIL FROM:<{token}@example.com>", *recipients, "DATA")[-1]

    def send(self, token: str) -> str:
        """The reply to a mail."""
        reply = self.begin(token)
        if reply[:3] != "354":
            return reply
        self.socket.sendall(make_content(token))
        return self.ask(".")


class Part:
    """A server and the threads that use it."""

    options: dict[str, Any] = {}

    def __init__(self, stop: Stop, seed: str) -> None:
        self.stop = stop
        self.seed = seed
        self.told = Tally()  # mails whose 250 a client has read
        self.delivered = Tally()  # those that on_message got
        self.ids: list[int] = []  # of these
        self.figures: Counter[str] = Counter()  # each name is counted by one thread
        options = {"multiple_rcptto": True, "multiple_message_receiving": True, **self.options}
        options["session_timeout"] = 10 * TIMEOUT  # a busy machine may leave a client waiting for long
        self.server = smtpmock.Server(on_message=self.receive, logger=self, **options)

    def info(self, text: str) -> None:
        """As a logger."""

    def warning(self, text: str) -> None:
        """As a logger."""

    def error(self, text: str) -> None:
        check(False, "an error in the log", text)

    def receive(self, message: smtpmock.Message) -> None:
        """As on_message."""
        token = read_token(message)
        check(message.content == make_content(token), "torn content in on_message", message.content)
        self.delivered.tokens.append(token)
        self.ids.append(message.id)

    def jobs(self) -> list[Callable[[random.Random], None]]:
        """What the threads do, each with random numbers of its own, until the end of the test."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called at the end, when the server has stopped."""
        check(len(set(self.ids)) == len(self.ids), "an id twice")
        check(max(self.delivered.count().values(), default=1) == 1, "on_message twice")
        lost = self.told.count() - self.delivered.count()
        check(not lost, "on_message lost", lost)
        self.figures["mails"] = len(self.told.tokens)


class Purging(Part):
    def __init__(self, stop: Stop, seed: str) -> None:
        self.options = {"ssl_context": "test"}
        self.cut = Tally()  # mails that a client has left in the middle
        self.found = [Tally() for _ in range(8)]  # one for each thread that purges, and one for what is left
        self.found_ids: list[int] = []
        super().__init__(stop, seed)

    def jobs(self) -> list[Callable[[random.Random], None]]:
        return [
            *[self.make_sender(number) for number in range(SENDERS)],
            *[functools.partial(self.purge, tally) for tally in self.found[:3]],
            *[functools.partial(self.wait_and_purge, tally) for tally in self.found[3:7]],
            self.look,
            self.leave_early,
        ]

    def make_sender(self, number: int) -> Callable[[random.Random], None]:
        def send(rand: random.Random) -> None:
            count = 0
            while not self.stop:
                with Client(self.server) as client:
                    client.ask("EHLO a.example.com")
                    if number % 2:
                        client.start_tls()
                        client.ask("EHLO a.example.com")
                    for _ in range(rand.randint(1, 5)):
                        count += 1
                        token = f"m{number}.{count}"
                        check(client.send(token) == "250 Received", "a mail is refused")
                        self.told.tokens.append(token)
                    if rand.random() < 0.2:
                        count += 1
                        client.begin(f"m{number}.{count}")
                        client.socket.sendall(f"Subject: m{number}.{count}\r\n\r\n".encode())
                        self.cut.tokens.append(f"m{number}.{count}")
                    elif rand.random() < 0.5:
                        client.ask("QUIT")

        return send

    def take(self, messages: list[smtpmock.Message], tally: Tally) -> None:
        """Note what was purged."""
        for message in messages:
            tally.tokens.append(check_message(message) if message.is_consistent else read_token(message))
            self.found_ids.append(message.id)

    def purge(self, tally: Tally, rand: random.Random) -> None:
        while not self.stop:
            self.take(self.server.messages_and_purge(), tally)
            time.sleep(rand.choice([0] * 20 + [1]))  # in the long breaks, waits find something

    def wait_and_purge(self, tally: Tally, rand: random.Random) -> None:
        def where(message: smtpmock.Message) -> bool:
            return message.is_consistent and read_token(message)[1:].partition(".")[0].endswith(("3", "7"))

        while not self.stop:
            count = rand.choice([1, 1, 1, 4])  # so that one mail wakes all of these threads
            with contextlib.suppress(smtpmock.WaitTimeoutError):
                found = self.server.wait_for_messages_and_purge(count, 1, where)
                check(len(found) >= count and all(map(where, found)), "a wait returned what it should not")
                self.take(found, tally)

    def look(self, rand: random.Random) -> None:
        while not self.stop:
            messages = self.server.messages()
            check(len({message.id for message in messages}) == len(messages), "an id twice in messages()")
            try:
                self.server.wait_for_messages(rand.choice([1, 10**6]), rand.random() / 20)
            except smtpmock.WaitTimeoutError as error:
                check("open sessions" in str(error), "a report is incomplete", error)
            for message in messages[-5:]:  # while those who purge it parse it
                check(copy.copy(message).to_dict() == message.to_dict(), "a copy differs")
            self.figures["looks at all"] += 1

    def leave_early(self, rand: random.Random) -> None:
        while not self.stop:
            with socket.create_connection((self.server.host, self.server.port), TIMEOUT) as client:
                client.recv(rand.choice([1, 100]))

    def finish(self) -> None:
        super().finish()
        self.take(self.server.messages(), self.found[7])
        self.figures["of them over TLS"] = sum(int(token[1:].partition(".")[0]) % 2 for token in self.told.tokens)
        self.figures["purged by a wait"] = sum(len(tally.tokens) for tally in self.found[3:7])
        self.figures["left in the middle"] = len(self.cut.tokens)
        found = sum((tally.count() for tally in self.found), Counter[str]())
        sent = self.told.count() + self.cut.count()
        check(found == sent, "lost", sent - found)
        check(found == sent, "doubled", found - sent)
        check(len(set(self.found_ids)) == len(self.found_ids), "an id twice among the purged")
        check(set(self.ids) <= set(self.found_ids), "another id than on_message saw")


class Waiting(Part):
    def jobs(self) -> list[Callable[[random.Random], None]]:
        return [self.make_sender(number) for number in range(8)]

    def make_sender(self, number: int) -> Callable[[random.Random], None]:
        def send_and_wait(rand: random.Random) -> None:
            with Client(self.server) as client:
                client.ask("EHLO a.example.com")
                count = 0
                while not self.stop:
                    count += 1
                    token = f"w{number}.{count}"
                    check(client.send(token) == "250 Received", "a mail is refused")
                    self.told.tokens.append(token)
                    where = functools.partial(has_token, token)
                    message = self.server.message(where, TIMEOUT)
                    check(check_message(message) == token, "another mail was found")
                    if rand.random() < 0.5:
                        client.ask("NOOP")  # brings the message up to date
                    found = self.server.wait_for_messages_and_purge(1, TIMEOUT, where)
                    check([check_message(message) for message in found] == [token], "another mail was purged")

        return send_and_wait

    def finish(self) -> None:
        super().finish()
        left = [message for message in self.server.messages() if message.is_consistent]
        check(not left, "a purged mail is there", left)


class Contest(Part):
    """Threads that purge the same mails at the same moment."""

    members = 4

    def jobs(self) -> list[Callable[[random.Random], None]]:
        barrier = threading.Barrier(self.members, timeout=TIMEOUT)
        found = [Tally() for _ in range(self.members)]
        shared: dict[str, Any] = {}

        def prepare(turn: int, client: Client) -> None:
            shared["is over"] = bool(self.stop)
            client.ask("EHLO a.example.com")
            for number in range(self.members):
                client.send(f"d0.{turn}.{number}")
                self.told.tokens.append(f"d0.{turn}.{number}")

        def compete(member: int, rand: random.Random) -> None:
            with Client(self.server) if member == 0 else contextlib.nullcontext() as client:
                for turn in range(10**9):
                    if client is not None:
                        prepare(turn, client)
                    barrier.wait()
                    is_over = shared["is over"]
                    with contextlib.suppress(smtpmock.WaitTimeoutError):
                        purge = self.server.wait_for_messages_and_purge
                        messages = self.server.messages_and_purge() if turn % 5 == member else purge(1, 0)
                        found[member].tokens += map(check_message, messages)
                    barrier.wait()
                    if member == 0:
                        right = [f"d0.{turn}.{number}" for number in range(self.members)]
                        tokens = [tally.tokens.pop() for tally in found for _ in tally.tokens[:]]
                        check(sorted(tokens) == right, "not each mail was purged once", (right, tokens))
                    if is_over:
                        return

        return [functools.partial(compete, member) for member in range(self.members)]


class Rules(Part):
    members = 4  # of a group
    commands = 20  # that each of them sends to meet the rule

    def jobs(self) -> list[Callable[[random.Random], None]]:
        jobs: list[Callable[[random.Random], None]] = [self.churn]
        for group in range(3):
            jobs += self.make_group(group)
        return jobs

    def finish(self) -> None:
        super().finish()
        self.figures = Counter({"rules": sum(self.figures.values())})

    def churn(self, rand: random.Random) -> None:
        """Rules that no command meets."""
        while not self.stop:
            rules = [
                self.server.on("RCPT", "nobody@example.net", times=1, probability=0.5).reply("450 never").delay(1)
                for _ in range(rand.randint(1, 5))
            ]
            for rule in rules:
                rule.remove()
                check(rule.hits == 0, "a rule applied to another address")

    def make_group(self, group: int) -> list[Callable[[random.Random], None]]:
        """Threads that use up one rule together, again and again, and then find it removed."""
        barrier = threading.Barrier(self.members, timeout=TIMEOUT)
        refusals = [0] * self.members
        address = f"g{group}@example.com"
        shared: dict[str, Any] = {}

        def ask(client: Client, text: str, member: int) -> None:
            replies = client.ask_together(*[f"RCPT TO:<{address}>"] * self.commands)
            check(set(replies) <= {text, "250 Received"}, "the reply of another rule", replies)
            refusals[member] = replies.count(text)

        def use_up(member: int, rand: random.Random) -> None:
            with Client(self.server) as client:
                client.ask("EHLO a.example.com")
                for turn in range(10**9):
                    client.ask(f"MAIL FROM:<{address}>")
                    text, times = f"450 g{group} {turn}", 1 + 7 * turn % (self.commands * self.members + 2)
                    if member == 0:
                        shared["is over"] = bool(self.stop)
                        shared["rule"] = self.server.on("RCPT", address, times=times).reply(text)
                    barrier.wait()
                    if shared["is over"]:
                        return
                    ask(client, text, member)
                    barrier.wait()
                    if member == 0:
                        right = min(times, self.commands * self.members)
                        check(sum(refusals) == right == shared["rule"].hits, "times", (right, refusals, shared))
                        shared["rule"].remove()
                        self.figures[f"group {group}"] += 1
                    barrier.wait()
                    ask(client, "450 a removed rule", member)
                    client.ask("RSET")
                    barrier.wait()

        return [functools.partial(use_up, member) for member in range(self.members)]


class Restarts(Part):
    options = {"shutdown_timeout": 0.2}

    def __init__(self, stop: Stop, seed: str) -> None:
        super().__init__(stop, seed)
        self.found = Tally()
        self.tried = Tally()

    def error(self, text: str) -> None:
        """As a logger."""

    def jobs(self) -> list[Callable[[random.Random], None]]:
        return [self.restart, *[self.make_sender(number) for number in range(6)]]

    def restart(self, rand: random.Random) -> None:
        self.server.stop()
        while not self.stop:
            self.server.start()
            time.sleep(rand.random() / 20)
            helper = threading.Thread(target=self.stop_server)
            if rand.random() < 0.5:
                helper.start()
            self.stop_server()
            if helper.ident:
                helper.join(TIMEOUT)
            check(not self.server.is_running, "it runs after stop()")
            for message in self.server.messages_and_purge():
                if message.is_consistent:
                    self.found.tokens.append(check_message(message))
            self.figures["restarts"] += 1
        self.server.start()

    def stop_server(self) -> None:
        with contextlib.suppress(smtpmock.ServerStateError):
            self.server.stop()

    def make_sender(self, number: int) -> Callable[[random.Random], None]:
        def send(rand: random.Random) -> None:
            count = 0
            while not self.stop:
                try:
                    with Client(self.server) as client:
                        client.ask("EHLO a.example.com")
                        while not self.stop:
                            count += 1
                            token = f"r{number}.{count}"
                            self.tried.tokens.append(token)
                            reply = client.send(token)
                            if reply != "250 Received":
                                check(reply[:3] == "421", "a mail is refused", reply)
                                break
                            self.told.tokens.append(token)
                except OSError:
                    time.sleep(0.001)  # it is not running

        return send

    def finish(self) -> None:
        super().finish()
        for message in self.server.messages():
            if message.is_consistent:
                self.found.tokens.append(check_message(message))
        found = self.found.count()
        check(max(found.values(), default=1) == 1, "doubled by a restart")
        check(not self.told.count() - found, "lost by a restart", self.told.count() - found)
        check(not found - self.tried.count(), "a mail that nobody has sent", found - self.tried.count())
        check(found == self.delivered.count(), "recorded is not what on_message saw")


class Changes(Part):
    def jobs(self) -> list[Callable[[random.Random], None]]:
        return [self.change, *[self.make_sender(number) for number in range(6)]]

    @staticmethod
    def converse(client: Client, token: str = "") -> str:
        """What the replies of a session have in common; they come from one configuration."""
        client.ask("EHLO a.example.com")
        if token:
            check(client.send(token) == "250 Received", "a mail is refused")
        said = [client.greeting, client.ask("NOOP"), client.ask("QUIT")]
        names = {reply.partition(" ")[2] for reply in said}
        normal = said == ["220 Welcome", "250 Ok", "221 Closing connection"]
        check(normal or len(names) == 1, "a session with two configurations", said)
        return "" if normal else names.pop()

    def change(self, rand: random.Random) -> None:
        configure: Any = getattr(self.server, "configure", None)
        number, name = 0, ""
        while not self.stop:
            number += 1
            if configure and rand.random() < 0.7:
                name = f"number {number}"
                configure(msg_greeting=f"220 {name}", msg_noop_received=f"250 {name}", msg_quit_cmd=f"221 {name}")
                self.figures["configurations"] += 1
            else:
                name = ""
                self.server.reset()
                self.figures["resets"] += 1
            with Client(self.server) as client:
                seen = self.converse(client)
                check(seen == name, "a configuration is not in force", (seen, name))

    def make_sender(self, number: int) -> Callable[[random.Random], None]:
        def send(rand: random.Random) -> None:
            count = 0
            while not self.stop:
                count += 1
                token = f"c{number}.{count}"
                with Client(self.server) as client:
                    self.converse(client, token)
                self.told.tokens.append(token)

        return send


def run_job(job: Callable[[random.Random], None], seed: str) -> None:
    try:
        job(random.Random(seed))
    except BaseException as error:
        trace = " < ".join(
            f"{frame.name}:{frame.lineno}" for frame in reversed(traceback.extract_tb(error.__traceback__))
        )
        check(False, f"{type(error).__name__} at {trace}", error)


def run(parts: list[Part]) -> None:
    for part in parts:
        part.server.start()
    threads = [
        threading.Thread(target=run_job, args=(job, f"{part.seed} {number}"), name=f"{type(part).__name__} {number}")
        for part in parts
        for number, job in enumerate(part.jobs())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part in parts:
        if part.server.is_running:
            part.server.stop()
        part.finish()


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    if has_gil:
        sys.setswitchinterval(1e-6)
    seed = str(random.randrange(10**6))
    kind = "with a GIL, switched every microsecond" if has_gil else "without a GIL"
    print(f"Python {sys.version.split()[0]} {kind}, {seconds:g} s, seed {seed}", flush=True)
    faulthandler.dump_traceback_later(seconds + 4 * TIMEOUT, exit=True)
    descriptors = count_descriptors()
    stop = Stop(seconds)
    parts: list[Part] = [part(stop, seed) for part in (Purging, Waiting, Contest, Rules, Restarts, Changes)]
    run(parts)
    for part in parts:
        done = ", ".join(f"{count} {name}" for name, count in part.figures.items() if count)
        print(f"  {type(part).__name__.lower():10}{done}")
    del parts[:]
    gc.collect()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("smtpmock")]
    check(not left, "threads are left", left)
    check(count_descriptors() == descriptors, "descriptors are left", (descriptors, count_descriptors()))
    faulthandler.cancel_dump_traceback_later()
    for text in FAULTS.texts.values():
        print(f"FAULT {text}")
    print(f"{FAULTS.count} faults" if FAULTS.count else "nothing lost, doubled, torn or left")
    return 1 if FAULTS.count else 0


if __name__ == "__main__":
    sys.exit(main())
