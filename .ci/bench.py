"""Benchmark smtpmock against a floor and against aiosmtpd, all in one run.

    python .ci/bench.py [--quick]

The floor is the least that a thread-per-connection server in Python can do: it cuts lines, sends
canned replies and keeps the bodies. Each server runs in a process of its own, on the same Python,
and the client is this process, on another processor, with raw sockets, no parsing and no sleep.
Every round takes the servers in turn. Printed are medians over the rounds, half the span from the
lowest to the highest, and the ratios, which are what to look at: in them the machine drops out.

Exits with 1 if a count is wrong, or if a ratio misses its target by more than half of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import selectors
import shutil
import smtplib
import socket
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BODY = b"Subject: benchmark\r\n\r\n" + b"x" * 70 + b"\r\n" + (b"y" * 72 + b"\r\n") * 13
ENVELOPE = [b"MAIL FROM:<a@example.com>\r\n", b"RCPT TO:<b@example.com>\r\n", b"DATA\r\n"]
MAIL = [*ENVELOPE, BODY + b".\r\n"]
SESSION = [b"EHLO example.com\r\n", *MAIL, b"QUIT\r\n"]
END = b"\r\n.\r\n"

# ------------------------------------------------------------------------------- the servers' side


class FloorHandler(socketserver.BaseRequestHandler):
    server: Floor
    replies = {
        b"EHLO": b"250 Received\r\n",
        b"MAIL": b"250 Received\r\n",
        b"RCPT": b"250 Received\r\n",
        b"NOOP": b"250 Ok\r\n",
        b"DATA": b"354 Ready for receive message. End data with <CR><LF>.<CR><LF>\r\n",
        b"QUIT": b"221 Closing connection\r\n",
    }

    def handle(self) -> None:
        sock: socket.socket = self.request
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(b"220 Welcome\r\n")
        rest = b""
        while data := sock.recv(65536):
            data, at, rest = rest + data, 0, b""
            while at < len(data):
                end = data.find(b"\n", at)
                if end < 0:
                    rest = data[at:]
                    break
                verb, at = data[at : at + 4].upper(), end + 1
                if verb == b"DATA":
                    sock.sendall(self.replies[verb])
                    data, at = self.take_body(sock, data, at)
                    sock.sendall(b"250 Received\r\n")
                else:
                    sock.sendall(self.replies[verb])
                    if verb == b"QUIT":
                        return

    def take_body(self, sock: socket.socket, data: bytes, at: int) -> tuple[bytes, int]:
        """Record a body; returns the data that its end is in, and where that is."""
        end = data.find(END, at)
        if end >= 0:
            self.server.messages.append(data[at : end + 2])
            return data, end + len(END)
        body, searched = bytearray(memoryview(data)[at:]), 0
        while (end := body.find(END, searched)) < 0:
            searched = max(0, len(body) - len(END) + 1)
            body += sock.recv(262144)
        rest = bytes(body[end + len(END) :])
        del body[end + 2 :]
        self.server.messages.append(bytes(body))
        return rest, 0


class Floor(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 4096

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FloorHandler)
        self.host, self.port = self.server_address[:2]
        self.messages: list[bytes] = []

    def start(self) -> None:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.001}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


class Mock:
    """smtpmock, as the others."""

    def __init__(self) -> None:
        sys.path.insert(0, os.environ.get("BENCH_SMTPMOCK", str(ROOT)))
        import smtpmock

        self.server = smtpmock.Server(multiple_message_receiving=True, msg_size_limit=10**8, session_timeout=300)

    def start(self) -> None:
        self.server.start()
        self.host, self.port = self.server.host, self.server.port

    def stop(self) -> None:
        self.server.stop()

    @property
    def messages(self) -> list[Any]:
        return self.server.messages()


class Aiosmtpd:
    def __init__(self) -> None:
        from aiosmtpd.controller import Controller

        messages: list[bytes] = []

        class Handler:
            async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
                messages.append(envelope.content)
                return "250 Received"

        with socket.socket() as probe:  # it cannot take a free port by itself
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.messages = messages
        self.host, self.port = "127.0.0.1", port
        self.controller = Controller(Handler(), hostname=self.host, port=port, ready_timeout=30)

    def start(self) -> None:
        self.controller.start()

    def stop(self) -> None:
        self.controller.stop()


PROCESSORS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(processor: int) -> None:
    """Keep this process on one processor: where the system moves it about, that is most of the noise."""
    if len(PROCESSORS) > 1:
        os.sched_setaffinity(0, {PROCESSORS[processor]})


KINDS: dict[str, Callable[[], Any]] = {"smtpmock": Mock, "floor": Floor, "aiosmtpd": Aiosmtpd}


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def switches() -> int:
    """Voluntary context switches of all threads of this process."""
    files = Path("/proc/self/task").glob("*/status")
    return sum(int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", f.read_text(), re.MULTILINE)[1]) for f in files)  # type: ignore[index]


def life(server_class: Callable[[], Any], count: int) -> float:
    """Seconds to start, send a mail with smtplib, see it, and stop; the median of count."""

    def once() -> float:
        began = time.perf_counter()
        server = server_class()
        server.start()
        with smtplib.SMTP(server.host, server.port) as client:
            client.sendmail("a@example.com", ["b@example.com"], BODY)
        while not server.messages:
            time.sleep(0)
        server.stop()
        return time.perf_counter() - began

    return statistics.median(once() for _ in range(count))


def wake(server: Any, count: int) -> float:
    """Seconds from the record of a message to the return of wait_for_messages in another thread; the median."""
    import smtpmock

    delays, mailbox = [], server.server._mailbox
    add = mailbox.add

    def timed_add(*arguments: Any) -> Any:
        entry = add(*arguments)
        recorded.append(time.perf_counter())
        return entry

    mailbox.add = timed_add
    for _ in range(count):
        recorded: list[float] = []
        woken: list[float] = []
        waiting = threading.Event()

        def wait(woken: list[float] = woken, waiting: threading.Event = waiting) -> None:
            waiting.set()
            server.server.wait_for_messages_and_purge(1, 10)
            woken.append(time.perf_counter())

        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait()
        time.sleep(0.001)
        with smtplib.SMTP(server.host, server.port) as client:
            client.sendmail("a@example.com", ["b@example.com"], BODY)
            thread.join()
        delays.append(woken[0] - recorded[0])
    assert smtpmock
    return statistics.median(delays)


def serve(kind: str) -> None:
    """Be a server, and answer the questions that come on stdin."""
    server = KINDS[kind]()
    server.start()
    print(server.port, flush=True)
    for line in sys.stdin:
        question, *arguments = line.split()
        began = time.perf_counter()
        answer: Any = ""
        if question == "stop":
            server.stop()
            answer = time.perf_counter() - began
        elif question == "count":
            answer = len(server.messages)
        elif question == "time_messages":
            count = len(server.messages)
            answer = (time.perf_counter() - began) / count
        elif question == "memory":
            answer = memory()
        elif question == "switches":
            answer = switches()
        elif question == "cpu":
            answer = time.process_time()
        elif question == "life":
            answer = life(KINDS[kind], int(arguments[0]))
        elif question == "wake":
            answer = wake(server, int(arguments[0]))
        elif question == "wait":
            threading.Thread(target=server.server.wait_for_messages, args=(10**9, 600), daemon=True).start()
        print(answer, flush=True)


# -------------------------------------------------------------------------------- the client's side


class Process:
    """A server in a process of its own."""

    def __init__(self, python: str, kind: str) -> None:
        command = [python, __file__, "--serve", kind]
        pin(0)  # for the server, which inherits it
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        pin(1)
        self.address = ("127.0.0.1", int(self.read()))

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("bench: a server has died")
        return line.strip()

    def ask(self, question: str) -> float:
        assert self.process.stdin is not None
        print(question, file=self.process.stdin, flush=True)
        return float(self.read() or 0)

    def connect(self) -> socket.socket:
        sock = socket.create_connection(self.address, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        return sock

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def is_reply(data: bytes) -> bool:
    """Whether the last line of the data is complete, and the last of its reply."""
    return data.endswith(b"\r\n") and data[data.rfind(b"\n", 0, -1) + 4 : data.rfind(b"\n", 0, -1) + 5] == b" "


def read_reply(sock: socket.socket) -> bytes:
    """Read until a reply is complete, without ever sleeping: to be woken would take longer than the server does."""
    data = b""
    while not is_reply(data):
        try:
            more = sock.recv(4096)
        except BlockingIOError:
            continue
        if not more:
            raise SystemExit(f"bench: the server hung up after {data!r}")
        data += more
    return data


def send(sock: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        with contextlib.suppress(BlockingIOError):
            rest = rest[sock.send(rest) :]


def converse(sock: socket.socket, lines: list[bytes]) -> None:
    for line in lines:
        send(sock, line)
        read_reply(sock)


def check(got: float, expected: float, what: str) -> None:
    if got != expected:
        raise SystemExit(f"bench: {got:g} {what}, not {expected:g}")


def one_client(server: Process, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        with server.connect() as sock:
            read_reply(sock)
            converse(sock, SESSION)
    rate = count / (time.perf_counter() - began)
    check(server.ask("count"), count, "messages")
    return rate


def many_clients(server: Process, count: int, clients: int = 16) -> float:
    """Sessions a second of so many clients, in one loop of this thread."""
    began = time.perf_counter()
    started = finished = 0
    with selectors.DefaultSelector() as selector:

        def start() -> None:
            nonlocal started
            if started < count:
                started += 1
                selector.register(server.connect(), selectors.EVENT_READ, iter(SESSION))

        for _ in range(clients):
            start()
        while finished < count:
            for key, _ in selector.select(0):
                sock: Any = key.fileobj
                read_reply(sock)
                line = next(key.data, None)
                if line is not None:
                    send(sock, line)
                else:
                    selector.unregister(sock)
                    sock.close()
                    finished += 1
                    start()
    rate = count / (time.perf_counter() - began)
    check(server.ask("count"), count, "messages")
    return rate


def one_connection(server: Process, count: int, lines: list[bytes]) -> float:
    with server.connect() as sock:
        read_reply(sock)
        converse(sock, SESSION[:1])
        began = time.perf_counter()
        for _ in range(count):
            converse(sock, lines)
        rate = count / (time.perf_counter() - began)
    if lines is MAIL:
        check(server.ask("count"), count, "messages")
    return rate


def commands(server: Process, count: int) -> float:
    return one_connection(server, count, [b"NOOP\r\n"])


def messages(server: Process, count: int) -> float:
    return one_connection(server, count, MAIL)


def big_body(server: Process, count: int) -> float:
    """Megabytes a second of bodies of 9 MB."""
    body = (b"z" * 76 + b"\r\n") * (9_000_000 // 78) + b".\r\n"
    rates = []
    with server.connect() as sock:
        read_reply(sock)
        converse(sock, SESSION[:1])
        for _ in range(count):
            converse(sock, ENVELOPE)
            began = time.perf_counter()
            converse(sock, [body])
            rates.append(len(body) / 1e6 / (time.perf_counter() - began))
    check(server.ask("count"), count, "messages")
    return statistics.median(rates)


def pipelined(server: Process, count: int) -> float:
    """Messages a second, written without waiting while another thread reads the replies."""
    expected = b"".join([b"250 Received\r\n", b"250 Received\r\n", FloorHandler.replies[b"DATA"], b"250 Received\r\n"])
    expected *= count
    received = bytearray()

    def read() -> None:
        while len(received) < len(expected) and (data := sock.recv(262144)):
            received.extend(data)

    with server.connect() as sock:
        read_reply(sock)
        converse(sock, SESSION[:1])
        sock.setblocking(True)
        reader = threading.Thread(target=read)
        data = b"".join(MAIL) * 100
        began = time.perf_counter()
        reader.start()
        for _ in range(count // 100):
            sock.sendall(data)
        reader.join()
        rate = count / (time.perf_counter() - began)
    if received != expected:
        raise SystemExit("bench: pipelined commands were not all answered in order")
    check(server.ask("count"), count, "messages")
    return rate


def lives(server: Process, count: int) -> float:
    return server.ask(f"life {count}") * 1e3


def stops(server: Process, clients: int) -> float:
    """Milliseconds of a stop() with so many idle clients."""
    with contextlib.ExitStack() as stack:
        for _ in range(clients):
            read_reply(stack.enter_context(server.connect()))
        return server.ask("stop") * 1e3


def waits(server: Process, count: int) -> float:
    return server.ask(f"wake {count}") * 1e3


def open_sessions(server: Process, count: int) -> float:
    """Kilobytes of memory for each of so many sessions that are open at once; then each sends a mail."""
    before = server.ask("memory")
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(server.connect()) for _ in range(count)]
        for sock in socks:
            read_reply(sock)
            converse(sock, SESSION[:1])
        used = server.ask("memory") - before
        for sock in socks:
            converse(sock, SESSION[1:])
    check(server.ask("count"), count, "messages")
    return used / count / 1e3


def recorded(server: Process, count: int) -> float:
    """Kilobytes of memory for each of so many messages."""
    before = server.ask("memory")
    messages(server, count)
    return (server.ask("memory") - before) / count / 1e3


def idle(server: Process, seconds: int) -> float:
    """Context switches of a server to which nothing happens."""
    with server.connect() as sock:
        read_reply(sock)
        server.ask("switches")
        before = server.ask("switches")
        time.sleep(seconds)
        return max(0, server.ask("switches") - before - 1)  # of which one is the answer to this question


def import_time(python: str, code: str, count: int) -> float:
    """Milliseconds that these imports take in a new process, when their bytecode is there already."""
    code = f"import time; began = time.perf_counter(); {code}; print(time.perf_counter() - began)"
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        shutil.copy(ROOT / "smtpmock.py", folder)
        run = subprocess.run
        command = [python, "-c", code]
        times = [run(command, cwd=folder, env=environment, capture_output=True, check=True) for _ in range(count)]
    return statistics.median(float(done.stdout) for done in times) * 1e3


# ------------------------------------------------------------------------------------------ report


class Report:
    """The table, line by line, and what misses its target."""

    def __init__(self) -> None:
        self.missed: list[str] = []
        self.far: list[str] = []
        print(f"{'':34}{'smtpmock':>19}{'floor':>19}{'aiosmtpd':>19}  ratios and targets", flush=True)

    def line(
        self, name: str, values: dict[str, list[float]], unit: str, *targets: tuple[str, float, str, float]
    ) -> None:
        """A line of the table. A target is a name, its ratio or figure, whether it is >= or <=, and the bound."""
        cells = []
        for kind in KINDS:
            found = values.get(kind)
            median = statistics.median(found) if found else 0
            spread = f"±{(max(found) - min(found)) / median / 2:4.0%}" if found and median and len(found) > 1 else ""
            cells.append(f"{f'{median:,.2f}'.rstrip('0').rstrip('.') if found else '':>13} {spread:5}")
        notes = []
        for what, value, sign, bound in targets:
            met = value >= bound if sign == ">=" else value <= bound
            near = value >= bound / 2 if sign == ">=" else value <= bound * 1.5
            notes.append(f"{what} {value:.2f} {sign} {bound:g}{'' if met else ' MISSED'}")
            if not met:
                (self.missed if near else self.far).append(f"{name}: {notes[-1]}")
        print(f"{name + ', ' + unit:34}{''.join(cells)}  {'; '.join(notes)}", flush=True)


def ratios(values: dict[str, list[float]], kind: str) -> float:
    """The median over the rounds of smtpmock's value divided by another's."""
    return statistics.median(a / b for a, b in zip(values["smtpmock"], values[kind], strict=True))


def run(python: str, quick: bool) -> Report:
    report = Report()
    rounds = 3 if quick else 7
    scale = 4 if quick else 1

    def measure(
        scenario: Callable[[Process, int], float], count: int, kinds: list[str] | None = None
    ) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {}
        for _ in range(rounds):
            for kind in kinds or list(KINDS):
                with Process(python, kind) as server:
                    values.setdefault(kind, []).append(scenario(server, count))
        return values

    def compare(name: str, unit: str, values: dict[str, list[float]], sign: str, *bounds: tuple[str, float]) -> None:
        report.line(name, values, unit, *((f"/{kind}", ratios(values, kind), sign, bound) for kind, bound in bounds))

    values = measure(one_client, 1200 // scale)
    compare("sessions, 1 client", "1/s", values, ">=", ("floor", 0.9), ("aiosmtpd", 2.0))
    values = measure(many_clients, 1600 // scale)
    compare("sessions, 16 clients", "1/s", values, ">=", ("floor", 0.9), ("aiosmtpd", 1.0))
    values = measure(messages, 4000 // scale)
    compare("messages, one connection", "1/s", values, ">=", ("floor", 0.75), ("aiosmtpd", 3.0))
    values = measure(commands, 16000 // scale)
    compare("NOOP", "1/s", values, ">=", ("floor", 0.7))
    values = measure(big_body, 5 if not quick else 3)
    compare("body of 9 MB", "MB/s", values, ">=", ("floor", 0.8), ("aiosmtpd", 10.0))
    values = measure(pipelined, 10000 if not quick else 2000, ["smtpmock", "floor"])
    compare("pipelined messages", "1/s", values, ">=", ("floor", 0.7))
    values = measure(lives, 100 // scale)
    compare("start, mail, wait, stop", "ms", values, "<=", ("floor", 1.15), ("aiosmtpd", 0.5))

    none, hundred = (measure(stops, clients, ["smtpmock"])["smtpmock"] for clients in (0, 100))
    bound = 3 * statistics.median(none) + 10
    report.line("stop() with no client", {"smtpmock": none}, "ms")
    report.line(
        "stop() with 100 idle clients", {"smtpmock": hundred}, "ms", ("", statistics.median(hundred), "<=", bound)
    )
    values = measure(waits, 100 // scale, ["smtpmock"])
    report.line("a waiter runs again after", values, "ms", ("", statistics.median(values["smtpmock"]), "<=", 1.0))

    times: dict[str, list[float]] = {"smtpmock": [], "floor": []}
    for _ in range(rounds):
        times["smtpmock"].append(import_time(python, "import smtpmock", 20 // scale))
        times["floor"].append(import_time(python, "import socketserver, re, typing, dataclasses", 20 // scale))
    compare("import", "ms", times, "<=", ("floor", 1.5))

    values = measure(open_sessions, 2000 if not quick else 400, ["smtpmock", "floor"])
    compare("memory of an open session", "KB", values, "<=", ("floor", 1.5))
    values = measure(recorded, 20000 if not quick else 4000, ["smtpmock", "floor"])
    report.line("memory of a message of 1 KB", values, "KB", ("", statistics.median(values["smtpmock"]), "<=", 4.0))
    values = measure(idle, 3 if not quick else 1, ["smtpmock"])
    report.line("switches while idle", values, "", ("", statistics.median(values["smtpmock"]), "<=", 0))
    growth(report, python, quick)
    return report


def growth(report: Report, python: str, quick: bool) -> None:
    """10 times the work, 10 times the time: of each, the time per unit at the larger size by that at the smaller."""
    scale = 5 if quick else 1

    def per_unit(scenario: Callable[[Process, int], float], count: int, before: str = "") -> float:
        def once() -> float:
            with Process(python, "smtpmock") as server:
                if before:
                    server.ask(before)
                return scenario(server, count)

        return min(once() for _ in range(2 if quick else 3))

    def seconds(lines: Callable[[int], list[bytes]]) -> Callable[[Process, int], float]:
        def scenario(server: Process, count: int) -> float:
            with server.connect() as sock:
                read_reply(sock)
                converse(sock, SESSION[:1])
                began = time.perf_counter()
                converse(sock, lines(count))
                return (time.perf_counter() - began) / count

        return scenario

    def listing(server: Process, count: int) -> float:
        messages(server, count)
        return min(server.ask("time_messages") for _ in range(3))

    def mails(server: Process, count: int) -> float:
        return 1 / messages(server, count)

    def recipients(count: int) -> list[bytes]:
        return [*MAIL[:1], *(b"RCPT TO:<b%d@example.com>\r\n" % n for n in range(count)), *MAIL[2:]]

    def body(count: int) -> list[bytes]:
        return [*ENVELOPE, b"z" * 78 * count + b"\r\n.\r\n"]

    def sessions(server: Process, count: int) -> float:
        return 1 / one_client(server, count)

    for name, scenario, size, before in (
        ("messages", mails, 5000, ""),
        ("messages while one waits", mails, 5000, "wait"),
        ("messages()", listing, 5000, ""),
        ("recipients of a message", seconds(recipients), 1000, ""),
        ("size of a body", seconds(body), 10000, ""),
        ("sessions", sessions, 300, ""),
    ):
        small, large = (per_unit(scenario, factor * size // scale, before) for factor in (1, 10))
        report.line(f"10 times the {name}", {"smtpmock": [large / small]}, "per unit", ("", large / small, "<=", 1.5))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds, for a check in under a minute")
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return 0
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    folder = tempfile.mkdtemp()
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder, "bin", "python"))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "aiosmtpd"], check=True, stderr=subprocess.DEVNULL)
        began = time.perf_counter()
        print(f"Python {sys.version.split()[0]}, {os.cpu_count()} processors", flush=True)
        report = run(python, arguments.quick)
    finally:
        shutil.rmtree(folder)
    print(f"{time.perf_counter() - began:.0f} seconds, {len(report.missed) + len(report.far)} targets missed")
    print(*report.missed, *report.far, sep="\n")
    return 1 if report.far else 0


if __name__ == "__main__":
    sys.exit(main())
