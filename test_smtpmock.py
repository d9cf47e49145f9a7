"""Tests of smtpmock. Run them with `python -m unittest`; they need the standard library only.

The dialogues, near the top, are the specification of the protocol. Most tests run a session without a server,
in memory; only what sockets, threads, processes and clients add is tested with them.
"""

from __future__ import annotations

import ast
import asyncio
import atexit
import base64
import collections
import contextlib
import copy
import dataclasses
import datetime
import email.policy
import errno
import fcntl
import functools
import gc
import hmac
import importlib.util
import inspect
import io
import itertools
import json
import linecache
import logging
import os
import pickle
import pprint
import py_compile
import pydoc
import queue
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import smtplib
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import unittest
import urllib.error
import urllib.request
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from email.message import EmailMessage
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import smtpmock
from smtpmock import (
    Configuration,
    ConfigurationError,
    Message,
    Server,
    ServerStartError,
    ServerStateError,
    WaitTimeoutError,
)

HERE = Path(__file__).parent
TIMEOUT = 30  # seconds after which something that should have happened never will
ENVELOPE = "EHLO a.com", "MAIL FROM:<a@a.com>", "RCPT TO:<b@b.com>"
SEND = *ENVELOPE[1:], "DATA", "hi", "."  # one mail, whose content is hi
MAIL = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\nSubject: hi\r\n\r\nbody\r\n.\r\n"

RECEIVED = "250 Received"
READY = "354 Ready for receive message. End data with <CR><LF>.<CR><LF>"
UNRECOGNIZED = "502 Command unrecognized. Available commands: HELO, EHLO, MAIL FROM:, RCPT TO:, DATA, RSET, NOOP, QUIT"
SHUTDOWN = "421 Server shutting down, closing connection"

# ----------------------------------------------------------------------------------------- helpers


class Memory:
    """A session without a server, which has received the lines. Tests that need the inside of the module reach it
    here, and nowhere else."""

    def __init__(
        self,
        *lines: str,
        rules: Iterable[str] = (),
        handlers: Iterable[Any] = (),
        on_message: Callable[[Message], object] = lambda message: None,
        on_unaccepted: Callable[[Message], object] = lambda message: None,
        peer: tuple[str, int] = ("192.0.2.1", 4321),
        line_limit: int | None = None,
        **options: Any,
    ) -> None:
        if options.get("ssl_context") is True:  # as a table has it
            options["ssl_context"] = mock.Mock(spec=ssl.SSLContext)
        configuration = Configuration(**options)
        self.recorder = Recorder()
        self.clock = 1600000000.25  # seconds since the epoch
        self.delays: list[float] = []  # before each reply
        self.recorded: list[int] = []  # how many messages there were when each reply was about to be sent
        self._mailbox = smtpmock._Mailbox()
        self._rules = smtpmock._Rules(configuration)
        self._context = smtpmock._Context(
            configuration,
            smtpmock._Handlers(configuration, handlers),
            self._mailbox,
            smtpmock._Log(self.recorder, configuration, collections.deque()),
            self._rules,
            on_message,
            on_unaccepted,
        )
        self.begin(peer)
        if line_limit is not None:
            self._session._line_limit = line_limit
        self.add_rules(self, rules)
        self.say(*lines)

    @classmethod
    def of(cls, server: Server) -> Memory:
        """A session of a Server, without a connection."""
        memory = cls()
        memory._context, memory._mailbox, memory._rules = server._context, server._mailbox, server._rules
        memory.begin()
        return memory

    def record(self, pieces: Iterable[bytes]) -> str:
        """The transcript of the session, which receives these pieces and ends."""
        replies = (reply for piece in pieces for reply in self._session.receive(piece))
        said: dict[int, Any] = {}
        for reply in itertools.chain([self._session.greet()], replies, [None]):
            if reply is None:
                self.end()
            elif reply.next is smtpmock._Next.TLS:
                self.secure()
            said.update((id(exchange), exchange) for exchange in self._session.mail.exchanges)
        return "\n".join(smtpmock._format_exchanges(said.values()))

    @staticmethod
    def read_transcript(text: str) -> list[list[str]]:
        """What the server says in each session of a transcript, with its stage and how it ends the session."""

        def describe(stage: str, after: int | None, use: Mapping[str, Any]) -> str:
            ends = [use["then"].value] if "then" in use else []
            ends += [f"after {after}"] * (after is not None) + ["at once"] * ("at_once" in use)
            return " ".join([f"{stage}:", *filter(None, ["/".join(use["reply"] or ())]), *ends])

        return [[describe(*said) for said in script.said] for script in smtpmock._read_transcript(text)]

    def begin(self, peer: tuple[str, int] = ("192.0.2.1", 4321)) -> None:
        """Another session begins."""
        self._session = smtpmock._Session(self._context, peer)

    @staticmethod
    def add_rules(server: Any, rules: Iterable[str]) -> None:
        """Give a Server or Memory rules in the form of the command line."""
        for rule in rules:
            smtpmock._add_rule(server, rule)

    @staticmethod
    def set_output(server: Server, on_message: Callable[[Message], object]) -> None:
        """Give a Server an on_message as the command line does."""
        server._context = server._context._replace(on_message=on_message)

    def on(self, stage: str, match: Any = None, **conditions: Any) -> smtpmock.Rule:
        return self._rules.add(smtpmock.Rule(self._rules, stage, match, **conditions))

    @staticmethod
    def test_pem() -> str:
        """A certificate of localhost and 127.0.0.1, its authority, and its key."""
        return smtpmock._make_pem("test") + smtpmock._make_pem("ca") + smtpmock._make_pem("key", "EC PRIVATE KEY")

    @staticmethod
    def test_ca() -> bytes:
        return smtpmock._make_pem("ca").encode()

    @staticmethod
    def load_test_context(name: str) -> ssl.SSLContext:
        """The context of a server with this certificate, made anew."""
        return smtpmock._load_test_context.__wrapped__(name)

    @staticmethod
    def own_flags(*argv: str) -> Any:
        """The values of the flags that are no options of a server."""
        with mock.patch.object(smtpmock, "_serve", return_value=0) as serve:
            assert call_main(*argv) == (0, "", "")
        return serve.call_args.args[2]

    def greet(self) -> list[str]:
        return self._read(self._session.greet(self.clock))

    def feed(self, *pieces: bytes) -> list[str]:
        """Receive bytes; the lines that the server says to them, and how it ends the connection, if it does."""
        replies = (reply for data in pieces for reply in self._session.receive(data, self.clock))
        return [line for reply in replies for line in self._read(reply)]

    def _read(self, reply: smtpmock._Reply) -> list[str]:
        self.delays.append(reply.delay)
        self.recorded.append(len(self.messages()))
        lines = reply.data.decode("utf-8", "surrogateescape").removesuffix("\r\n").split("\r\n")
        return (lines if reply.data else []) + self._ending(reply)

    @staticmethod
    def _ending(reply: smtpmock._Reply) -> list[str]:
        """How the connection ends after it, if it does."""
        return [] if reply.next is None or reply.next is smtpmock._Next.TLS else [reply.next.value]

    def converse(self, pieces: Iterable[bytes], size: int) -> None:
        """Receive pieces, in parts of this size, up to the end of the connection."""
        for piece in pieces:
            replies = [reply for at in range(0, len(piece), size) for reply in self.replies(piece[at : at + size])]
            if any(reply.next is smtpmock._Next.TLS for reply in replies):
                self.secure()
            if any(map(self._ending, replies)):
                break
        self.end()

    CODES: ClassVar[Mapping[str, tuple[str, str, str]]] = smtpmock._VIOLATIONS
    serve_http: Any = staticmethod(lambda server, **flags: smtpmock._serve_http(server, flags))  # within it, the URL
    count_waits: Any = staticmethod(lambda server: len(server._mailbox._waiters))
    discards: Any = staticmethod(lambda message: list(message._find_discards()))  # as a warning says it
    findings: Any = staticmethod(lambda message: message._findings)  # violations and warnings, as they were found

    def replies(self, data: bytes) -> list[smtpmock._Reply]:
        return list(self._session.receive(data, self.clock))

    def say(self, *lines: str) -> list[str]:
        """Receive lines, without their ends; what the server says to all of them."""
        return [reply for line in lines for reply in self.feed(line.encode("utf-8", "surrogateescape") + b"\r\n")]

    def secure(self) -> None:
        """The TLS handshake succeeds."""
        self._session.secure("TLSv1.3", "AES", self.clock)

    def end(self, farewell: str | None = None) -> None:
        """The connection ends."""
        reply = None if farewell is None else smtpmock._Reply(farewell, next=smtpmock._Next.CLOSE)
        self._session.end(reply, self.clock)

    def is_forgotten(self) -> bool:
        """Whether nothing is left of the session once nobody refers to it, even without garbage collection."""
        session = weakref.ref(self._session)
        del self._session
        return session() is None

    def kept_lines(self) -> list[str]:
        """The command lines that the server keeps."""
        return list(self._session.commands)

    def wait(self, count: int, timeout: float) -> object:
        return self._mailbox.wait(count, timeout, None, purge=False)

    def messages(self, *, purge: bool = False) -> list[Message]:
        return self._mailbox.messages(purge=purge)

    def message(self) -> Message:
        """The last message, once the connection has ended."""
        self.end()
        return self.messages()[-1]


class Client:
    """An SMTP client that says what it is told, byte for byte. It has read the greeting, if it greets."""

    def __init__(self, server: Server, *, greets: bool = True) -> None:
        self.socket = socket.create_connection((server.host, server.port), TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small pieces do not wait for each other
        self._file = self.socket.makefile("rb")
        self.greeting = self.read() if greets else ""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> str:
        """The next line, or that the connection is closed."""
        try:
            line = self._file.readline()
        except ConnectionResetError:
            return "<reset>"
        except ConnectionError:
            line = b""
        return line.decode("utf-8", "surrogateescape").removesuffix("\r\n") if line else "<closed>"

    def read_all(self) -> list[str]:
        """Every line up to the end of the connection."""
        return [*iter(self.read, "<closed>"), "<closed>"]

    def ask(self, *lines: str) -> list[str]:
        """Send lines, each of which has one line for a reply; but a body has one at its end."""
        replies = []
        in_body = False
        for line in lines:
            self.send(line.encode("utf-8", "surrogateescape") + b"\r\n")
            in_body = in_body and line != "."
            if not in_body:
                replies.append(self.read())
                in_body = replies[-1].startswith("354")
        return replies

    def mail(self, data: bytes = b"hi\r\n.\r\n") -> Client:
        """Send a mail, and do not read the reply to its end."""
        self.ask(*ENVELOPE, "DATA")
        self.send(data)
        return self

    def assert_silence(self) -> None:
        """Nothing comes from the server, at least for a moment."""
        self.socket.settimeout(0.02)
        with contextlib.suppress(TimeoutError):
            raise AssertionError(f"the server has sent {self.socket.recv(100)!r}")
        self.socket.settimeout(TIMEOUT)

    def reset(self) -> None:
        """Close with an RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._file.close()
        self.socket.close()


class Recorder:
    """A logger that keeps what it is told, and lets a test wait for it."""

    def __init__(self) -> None:
        self.lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.seen: list[tuple[str, str]] = []

    def _take(self, level: str, message: str, /) -> None:
        self.lines.put((level, message))

    info_activity = functools.partialmethod(_take, "activity")
    info = functools.partialmethod(_take, "info")
    warning = functools.partialmethod(_take, "warning")
    error = functools.partialmethod(_take, "error")

    def wait_for(self, text: str) -> tuple[str, str]:
        """The level and the text of the next line that has this text in it."""
        while True:
            line = self.lines.get(timeout=TIMEOUT)
            self.seen.append(line)
            if text in line[1]:
                return line


class Smtp(smtplib.SMTP):
    """smtplib, connected to a server or a port of this machine."""

    def __init__(self, server: Server | int) -> None:
        host, port = ("127.0.0.1", server) if isinstance(server, int) else (server.host, server.port)
        super().__init__(host, port, timeout=TIMEOUT)


def send(server: Server | int, *contents: bytes | str, to: Sequence[str] = ("b@b.com",)) -> None:
    """Send mails in one session."""
    with Smtp(server) as client:
        for content in contents:
            client.sendmail("a@a.com", to, content)


def wait_until(condition: Callable[..., object], *arguments: object) -> bool:
    """Whether the condition becomes true in time."""
    deadline = time.monotonic() + TIMEOUT
    while not condition(*arguments) and time.monotonic() < deadline:
        time.sleep(0.001)
    return bool(condition(*arguments))


def report(server: Server) -> str:
    """What a server has, as it says when what one waits for does not come."""
    return str(catch(WaitTimeoutError, server.wait_for_messages, 10**9, 0))


def stop_in_time(server: Server) -> None:
    """Stop a server whose own timeouts are longer than a test may take."""
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < TIMEOUT


class Hold:
    """A callback that is held up until it is released."""

    def __init__(self) -> None:
        self.held, self.release = threading.Event(), threading.Event()
        self.seen: list[Message] = []

    def __call__(self, message: Message) -> None:
        self.seen.append(message)
        self.held.set()
        self.release.wait(TIMEOUT)

    def wait(self) -> None:
        assert self.held.wait(TIMEOUT)


def make_handler(verb: str, reply: str = "250 Ok", **attributes: Any) -> Any:
    """A Handler with this verb."""
    attributes = {"verbs": (verb,), "received": reply, **attributes}
    return type(verb.title(), (smtpmock.Handler,), attributes)


def catch(error: type[BaseException], call: Callable[..., object], *arguments: Any) -> Any:
    """The exception that a call raises."""
    try:
        call(*arguments)
    except error as raised:
        return raised
    raise AssertionError(f"no {error.__name__}")


def told(server: Server) -> str:
    """What the check of a server complains about."""
    return str(catch(AssertionError, server.check))


def in_threads(*calls: Any) -> list[Any]:
    """Run the calls at once; their results, or the exceptions that they raised."""
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int) -> None:
        barrier.wait(TIMEOUT)
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    return results


@contextlib.contextmanager
def in_background(call: Callable[[], object]) -> Iterator[None]:
    """Run a call in a thread meanwhile."""
    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        thread.join(TIMEOUT)


class ServerCase(unittest.TestCase):
    """Tests after which no thread and no port of a server may be left."""

    def setUp(self) -> None:
        self.before = set(threading.enumerate())

    def threads(self) -> list[threading.Thread]:
        """The threads that have begun since the test has."""
        return [thread for thread in threading.enumerate() if thread not in self.before]

    def assert_nothing_is_left(self, server: Server) -> None:
        self.assertEqual(self.threads(), [])
        with self.assertRaises(OSError):
            socket.create_connection((server.host, server.port), TIMEOUT).close()

    def serve(self, *rules: str, **options: Any) -> tuple[Server, Client, Recorder]:
        """A server with these rules, a client of it, and its log."""
        server = Server(**{"logger": (recorder := Recorder()), **options})
        Memory.add_rules(server, rules)
        server.start()
        self.addCleanup(server.__exit__)
        client = Client(server)
        self.addCleanup(client.__exit__)
        return server, client, recorder


# ------------------------------------------------------------------------------------- text tables


class Row(NamedTuple):
    """A row of a table: what is given, what is expected of it, and options of its own."""

    given: list[str]
    expected: str
    options: dict[str, Any]

    @property
    def pattern(self) -> str:
        """A pattern for what is expected, in which {MORE} is anything."""
        return rf"(?s)\A{'.+'.join(map(re.escape, self.expected.split('{MORE}')))}\Z"


class Entry(NamedTuple):
    """An entry of a table: its options, its rules among them, and its lines."""

    options: dict[str, Any]
    lines: list[str]

    @property
    def rows(self) -> list[Row]:
        return list(map(read_row, re.sub("\n {4}", " ", "\n".join(self.lines)).split("\n")))


# What the rows of all tables call by these names: one name stands for one or more items.
SHORT = {
    "HELLO": ENVELOPE[0],
    "MAIL": ENVELOPE[1],
    "RCPT": ENVELOPE[2],
    "ENVELOPE": "HELLO | MAIL | RCPT | DATA",
    "SEND": "MAIL | RCPT | DATA | hi | .",
    "DATE": "Date: Fri, 21 Nov 1997 09:55:06 -0600",
    "FROM": "From: a@example.com",
    "ID": "Message-ID: <1@example.com>",
    "HEAD": "DATE | FROM | To: b@example.com | ID",
    "MIME": "MIME-Version: 1.0",
    "MIXED": "MIME | Content-Type: multipart/mixed; boundary=x",
    "PARTS": "HEAD | MIXED | | --x",
    "LAST": "--x-- | END",
    "END": ". | QUIT",
}


def read_items(text: str) -> list[str]:
    """What stands between |; an item can be empty, and a | can be at the end of a line."""
    return re.sub(r"\|(?= \|)", "| ", text.strip("\n").replace("\n", " ")).split(" | ") if text else []


def read_pieces(items: Iterable[str]) -> list[bytes]:
    """What the client sends, and waits for the reply to: lines, or bytes with escapes, where an item begins with R:.

    An item that begins with + comes in one piece with the one before it.
    """
    pieces: list[bytes] = []
    for item in items:
        text = item.removeprefix("+ ").replace("CTE: ", "Content-Transfer-Encoding: ")
        if text in SHORT:
            parts = read_pieces(read_items(SHORT[text]))
        else:
            parts = [read_escapes(text[2:]) if text.startswith("R:") else text.encode() + b"\r\n"]
        pieces[-1:] = [pieces[-1] + parts[0], *parts[1:]] if item.startswith("+ ") else [*pieces[-1:], *parts]
    return pieces


def read_options(text: str) -> dict[str, Any]:
    """The values of Python's keyword arguments."""
    call: Any = ast.parse(f"f({text})", mode="eval").body
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def read_escapes(text: str) -> bytes:
    """Text with Python's escapes for bytes; other characters are UTF-8."""
    return text.encode().decode("unicode_escape").encode("latin-1")


def read_line(line: str) -> str:
    """A line in which {READY} and {UNRECOGNIZED} are these replies, {SP} is a space at the end of a line,
    {x*9} is repeated, and {b64 x} is in base64."""
    line = line.replace("{READY}", READY).replace("{UNRECOGNIZED}", UNRECOGNIZED).replace("{SP}", " ")
    line = re.sub(r"\{([^{}]+)\*(\d+)\}", lambda match: match[1] * int(match[2]), line)
    return re.sub(r"\{b64 ([^{}]*)\}", lambda match: base64.b64encode(read_escapes(match[1])).decode(), line)


def read_row(text: str) -> Row:
    text, *options = re.split("  -- ", text)
    match = re.fullmatch("(?:(.*?) +)?=>(?: (.*))?", text)
    assert match is not None, f"no => in {text}"
    return Row(read_items(match[1] or ""), match[2] or "", read_options(", ".join(options)))


def read_rows(text: str) -> list[Row]:
    """The rows of a table without titles."""
    return read_table(f"== \n{text.strip()}")[""].rows


def each(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Each item that is given, with its row."""
    return ((item, row) for row in rows for item in row.given)


def read_table(text: str, prefixes: Mapping[str, Entry] = types.MappingProxyType({})) -> dict[str, Entry]:
    """Entries by their titles. A line is

    == a title                    and what follows belongs to it
    -- name=value, name=value     options, as Python's keyword arguments, which may go on in another such line
    -- rule: STAGE: ACTION        a rule, as on the command line
    + a prefix                    the options and lines of an entry of another table, or of this one
    # a heading                   for the reader only
    given | given => expected     a row, which goes on in lines that are indented by 4

    or else a line of a dialogue or of a mail. Options, rules and a prefix can stand beside the title and each other,
    and options beside a row. Empty lines at the end of an entry do not count.
    """
    table: dict[str, Entry] = {}
    for part in re.split("^== ", text, flags=re.MULTILINE)[1:]:
        head, *lines = re.sub("^# .*\n?", "", part, flags=re.MULTILINE).rstrip().split("\n")
        title, *beside = re.split("  (?=-- |[+] )", head)
        lines = [part for line in lines for part in (re.split("  (?=-- |[+] )", line) if line[:3] == "-- " else [line])]
        assert title not in table, title
        entry = table[title] = Entry({}, [])
        options = []
        for line in map(read_line, [*beside, *lines]):
            if line.startswith("-- rule: "):
                entry.options.setdefault("rules", []).append(line[9:])
            elif line.startswith("-- "):
                options.append(line[3:])
            elif line.startswith("+ "):
                prefix = (prefixes or table)[line[2:]]
                entry.options.update(prefix.options)
                entry.lines.extend(prefix.lines)
            elif line.startswith(("C: ", "R: ")):
                for exchange in re.split("  +(?=[CR]: )", line):
                    sent, *replies = re.split("  +(?=S:)", exchange)
                    texts = sent[3:].split(" | ") if sent[0] == "C" else [sent[3:]]
                    entry.lines.extend(part for text in texts for part in (f"{sent[:3]}{text}", *replies))
            else:
                entry.lines.extend(re.split("  +(?=S:)", line))
        entry.options.update(read_options(", ".join(options)))
    return table


# --------------------------------------------------------------------------------------- dialogues

# C: is a line of the client, or several with | between them which are answered alike, R: bytes of the client with
# Python's escapes, S: a line of the server, which can stand beside what it answers. The server has ended the
# connection, or says nothing any more, where it says <closed>, <reset> or <silence>. A line may have several exchanges.
# A dialogue that begins with the client has S: 220 Welcome before that.

PREFIXES = read_table(r"""
== hello
C: EHLO example.com           S: 250 Received
== sender  + hello
C: MAIL FROM:<a@example.com>  S: 250 Received
== envelope  + sender
C: RCPT TO:<b@example.com>    S: 250 Received
== in body  + envelope
C: DATA                       S: {READY}
== chunking  -- extensions=["CHUNKING"]
C: EHLO example.com           S: 250-Received  S: 250 CHUNKING
C: MAIL FROM:<a@example.com> | RCPT TO:<b@example.com>  S: 250 Received
== login  -- auth_users={"alice": "sécret", "bob": ""}
C: EHLO example.com           S: 250-Received  S: 250 AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2
""")

DIALOGUES = read_table(
    r"""
# ---- Mails
== a mail  + in body
C: Subject: hi
C:
C: body
C: .     S: 250 Received
C: QUIT  S: 221 Closing connection  S: <closed>
== HELO, lower case, white space, bare LF
R:  \thelo example.com \r\n     S: 250 Received
R: mail from: a@example.com\n   S: 250 Received
R: Rcpt To:b@example.com\r\r\n  S: 250 Received
R: NOOP\n                       S: 250 Ok
R: Ehlo\texample.com\r\n        S: 250 Received
R: quit \n                      S: 221 Closing connection  S: <closed>
== pipelining
R: EHLO example.com\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\nhi\r\n.\r\nRSET\r\nQUIT\r\n
S: 250 Received  S: 250 Received  S: 250 Received  S: {READY}  S: 250 Received  S: 250 Ok
S: 221 Closing connection  S: <closed>
== nothing is answered after QUIT
R: QUIT\r\nNOOP\r\n  S: 221 Closing connection  S: <closed>
== after an accepted message the next one begins  -- multiple_message_receiving=True  + in body
C: .                          S: 250 Received
C: DATA                       S: 503 Bad sequence of commands. DATA should be used after RCPT TO
C: RCPT TO:<b@example.com>    S: 503 Bad sequence of commands. RCPT TO should be used after MAIL FROM
C: MAIL FROM:<a@example.com>  S: 250 Received

# ---- Sequence
== sequence is checked before the argument
C: MAIL FROM:nonsense          S: 503 Bad sequence of commands. MAIL FROM should be used after HELO
C: RCPT TO:nonsense            S: 503 Bad sequence of commands. RCPT TO should be used after MAIL FROM
C: DATA x                      S: 503 Bad sequence of commands. DATA should be used after RCPT TO
C: RSET x                      S: 503 Bad sequence of commands. HELO should be the first
C: HELO example.com            S: 250 Received
C: RCPT TO:<b@example.com>     S: 503 Bad sequence of commands. RCPT TO should be used after MAIL FROM
C: MAIL FROM:<a@example.com>   S: 250 Received
C: DATA                        S: 503 Bad sequence of commands. DATA should be used after RCPT TO
== RSET and another HELO drop the envelope, not HELO  + envelope
C: RSET                       S: 250 Ok
C: RCPT TO:<b@example.com>    S: 503 Bad sequence of commands. RCPT TO should be used after MAIL FROM
C: MAIL FROM:<a@example.com> | RCPT TO:<b@example.com> | HELO example.org  S: 250 Received
C: DATA                       S: 503 Bad sequence of commands. DATA should be used after RCPT TO
C: MAIL FROM:<a@example.com>  S: 250 Received
== a refused recipient or HELO takes the one before with it  + envelope
C: RCPT TO:<bad>              S: 501 RCPT TO requires valid email address
C: DATA                       S: 503 Bad sequence of commands. DATA should be used after RCPT TO
C: HELO                       S: 501 HELO requires domain address or valid address literal
C: MAIL FROM:<a@example.com>  S: 503 Bad sequence of commands. MAIL FROM should be used after HELO
== a refused recipient among several  -- multiple_rcptto=True  + envelope
C: RCPT TO:<bad>  S: 501 RCPT TO requires valid email address
C: DATA           S: {READY}
== NOOP changes nothing, and another body may follow for the same envelope  + envelope
C: NOOP  S: 250 Ok
C: DATA  S: {READY}
C: .     S: 250 Received
C: DATA  S: {READY}
C: .     S: 250 Received

# ---- Arguments
== bad arguments  -- msg_invalid_cmd="500 unknown", msg_invalid_cmd_rset_arg="501 rset"
C: HELO | EHLO a..com  S: 501 HELO requires domain address or valid address literal
C: EHLO example.com           S: 250 Received
C: MAIL FROM:nonsense         S: 501 MAIL FROM requires valid email address
C: MAIL FROM:<a@example.com>  S: 250 Received
C: RCPT TO:<>                 S: 501 RCPT TO requires valid email address
C: RCPT TO:<Postmaster>       S: 250 Received
C: DATA x | QUIT x            S: 500 unknown
C: RSET x                     S: 501 rset
C: NOOP x                     S: 250 Ok
== the null sender
C: HELO example.com | MAIL FROM:<> | MAIL FROM: <>  S: 250 Received
C: MAIL FROM:<Postmaster>  S: 501 MAIL FROM requires valid email address
== unknown commands
C: FOO                         S: {UNRECOGNIZED}
C:                             S: {UNRECOGNIZED}
C: NOOPX | MAIL | MAIL TO:<a@example.com> | MAIL  FROM:<a@example.com> | MAIL FROM <a@example.com>  S: {UNRECOGNIZED}
C: connect | message | unknown | quıt  S: {UNRECOGNIZED}
R: \x00\xff\xfe\r\n            S: {UNRECOGNIZED}
C: NOOP                        S: 250 Ok
== commands and a parameter of extensions, where there are none  + hello
C: AUTH PLAIN AGEAYg== | STARTTLS | BDAT 1  S: {UNRECOGNIZED}
C: MAIL FROM:<a@a.com> SIZE=1  S: 501 MAIL FROM requires valid email address
== blacklists
-- blacklisted_helo_domains=["Bad.example", "localhost"], blacklisted_mailfrom_emails=["spam@bad.example"]
-- blacklisted_rcptto_emails=["x@a.com", "y@a.com"], not_registered_emails=["y@a.com", "nobody@a.com"]
C: EHLO bad.EXAMPLE | HELO localhost  S: 421 Service not available
C: EHLO example.com                S: 250 Received
C: MAIL FROM:<spam@BAD.example>    S: 421 Service not available
C: MAIL FROM:<SPAM@bad.example>    S: 250 Received
C: RCPT TO:<x@a.com> | RCPT TO:<y@a.com>  S: 421 Service not available
C: RCPT TO: Nobody <nobody@A.com>  S: 550 User not found
C: RCPT TO:<somebody@a.com>        S: 250 Received

# ---- Fail fast
== fail fast: a bad argument  -- fail_fast=True
C: HELO a..com  S: 501 HELO requires domain address or valid address literal  S: <closed>
== fail fast: an unknown recipient among several
-- fail_fast=True, multiple_rcptto=True, not_registered_emails=["c@example.com"]  + envelope
C: RCPT TO:<c@example.com>  S: 550 User not found  S: <closed>

# ---- Bodies and lines, and how long they may be
== only CRLF around the dot ends a body, but a bare LF ends DATA  + in body
R: a\n.\nQUIT\n
R: b\r\n.\nNOOP\r\n
R: c\n.\r\nNOOP\r\n
R: d\r.\r\n
R: \r\n.\r\n  S: 250 Received
C: NOOP       S: 250 Ok
R: DATA\n     S: {READY}
C: .          S: 250 Received
== the size limit is inclusive, without stuffed dots, and a body is read to its end  -- msg_size_limit=10  + in body
C: ..3456789
C: .     S: 250 Received
C: DATA  S: {READY}
C: 123456789
C: .     S: 552 Message exceeded max size of 10 bytes
C: MAIL FROM:<a@example.com> | RCPT TO:<b@example.com>  S: 250 Received
C: DATA  S: {READY}
C: {x*5000}
C: QUIT
C: NOOP
C: .     S: 552 Message exceeded max size of 10 bytes
C: NOOP  S: 250 Ok
== a line of 4096 bytes, and one that is answered before it ends
C: NOOP {x*4089}      S: 250 Ok
C: NOOP {x*4090}      S: 500 Line too long
R: {x*4096}           S: 500 Line too long
R: {y*5000}
R: {z*9}\r\nNOOP\r\n  S: 250 Ok

# ---- Texts of one's own
== every text can be another
-- msg_greeting="220-one\n220 two", msg_helo_received="250-one\r\n250 twö", msg_mailfrom_received="nonsense"
-- msg_rcptto_received="", msg_data_received="send it", msg_msg_received="299 got it"
S: 220-one  S: 220 two
C: EHLO example.com  S: 250-one  S: 250 twö  C: MAIL FROM:<a@example.com>  S: nonsense
C: RCPT TO:<b@example.com>  S:  C: DATA  S: send it  C: .  S: 299 got it
== a text that begins with 4 or 5 refuses
-- msg_mailfrom_received="450 later", msg_invalid_cmd_rcptto_sequence="250 fine"  + hello
C: MAIL FROM:<a@example.com>  S: 450 later
C: RCPT TO:<b@example.com>    S: 250 fine
C: DATA                       S: 503 Bad sequence of commands. DATA should be used after RCPT TO

== a greeting that refuses, after which QUIT alone is answered as usual  -- msg_greeting="554 no"
S: 554 no
C: EHLO a.com | NOOP | FOO | MAIL FROM:<a@a.com>  S: 503 Bad sequence of commands. HELO should be the first
C: QUIT  S: 221 Closing connection  S: <closed>
== fail fast: a greeting that refuses  -- msg_greeting="554 no", fail_fast=True
S: 554 no  S: <closed>
== a greeting that is 421 refuses nothing  -- msg_greeting="421 busy"
S: 421 busy
C: EHLO a.com  S: 250 Received  C: FOO  S: {UNRECOGNIZED}
== rule: a greeting that refuses, and rules after it  -- rule: connect: reply 554 no  -- rule: EHLO: reply 250 ok
-- rule: MAIL a@a.com: reply 250 a
S: 554 no
C: NOOP                 S: 503 Bad sequence of commands. HELO should be the first
C: EHLO a.com  S: 250 ok  C: MAIL FROM:<a@a.com>  S: 250 a
C: RCPT TO:<b@b.com>    S: 503 Bad sequence of commands. HELO should be the first

# ---- Extensions: what is announced, and parameters
== extensions are announced to EHLO, not to HELO
-- extensions=["SIZE", "8BITMIME", "dsn", "LIMITS X=1"], msg_size_limit=99
C: EHLO a.com  S: 250-Received  S: 250-SIZE 99  S: 250-8BITMIME  S: 250-dsn  S: 250 LIMITS X=1
C: HELO a.com  S: 250 Received
== extensions after a text of several lines  -- extensions=["DSN"], msg_helo_received="250-one\n250 two"
C: EHLO a.com  S: 250-one  S: 250-two  S: 250 DSN
== no extensions, a text as it is  -- msg_helo_received="250-odd\n251 two"
C: EHLO a.com  S: 250-odd  S: 251 two
== no extensions after a refusal  -- extensions=["DSN"], msg_helo_received="550 no"
C: EHLO a.com  S: 550 no
== AUTH and STARTTLS are announced last  -- extensions=["DSN"], auth_users={}, ssl_context=True
C: EHLO a.com  S: 250-Received  S: 250-DSN  S: 250-STARTTLS  S: 250 AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2
== a parameter of an extension that is not announced  -- extensions=["8BITMIME"]
C: EHLO a.com                           S: 250-Received  S: 250 8BITMIME
C: MAIL FROM:<a@a.com> SIZE=1 | MAIL FROM:<a@a.com> BODY=BINARYMIME  S: 555 Parameter not recognized or not implemented
== a declared size, after HELO and EHLO  -- extensions=["SIZE"], msg_size_limit=5
C: HELO a.com                  S: 250 Received
C: MAIL FROM:<a@a.com> SIZE=1  S: 555 Parameter not recognized or not implemented
C: EHLO a.com                  S: 250-Received  S: 250 SIZE 5
C: MAIL FROM:<a@a.com> SIZE=6  S: 552 Message exceeded max size of 5 bytes
C: MAIL FROM:<a@a.com> SIZE=5  S: 250 Received
== addresses that are not ASCII  -- extensions=["SMTPUTF8"]
C: EHLO example.com  S: 250-Received  S: 250 SMTPUTF8
C: MAIL FROM:<дядя@пример.рф>           S: 501 MAIL FROM requires valid email address
C: MAIL FROM:<a@a.com>                  S: 250 Received
C: RCPT TO:<b@пример.рф>                S: 501 RCPT TO requires valid email address
C: MAIL FROM:<дядя@пример.рф> SMTPUTF8 | RCPT TO:<b@пример.рф>  S: 250 Received
# letters of any script, with joiners, and those that Python does not know; but no control or white space
R: MAIL FROM:<क\xe2\x80\x8dष@a.com> SMTPUTF8\r\n      S: 250 Received
R: MAIL FROM:<क\xf0\xbf\xbf\xbdष@a.com> SMTPUTF8\r\n  S: 250 Received
R: MAIL FROM:<क\xc2\x85ष@a.com> SMTPUTF8\r\n          S: 501 MAIL FROM requires valid email address
R: MAIL FROM:<क\xe2\x80\x83ष@a.com> SMTPUTF8\r\n      S: 501 MAIL FROM requires valid email address
== addresses that are not ASCII, where that is no extension  -- extensions=["DSN"]
C: EHLO a.com  S: 250-Received  S: 250 DSN  C: MAIL FROM:<дядя@пример.рф>  S: 250 Received

# ---- VRFY, EXPN, HELP
== what is announced exists  -- extensions=["VRFY", "expn", "HELP me"]
C: HELP | help MAIL            S: 214 HELO, EHLO, MAIL FROM:, RCPT TO:, DATA, RSET, NOOP, QUIT
C: VRFY bob | vrfy <b@b.com>   S: 252 Cannot VRFY user, but will accept message
C: EXPN list                   S: 252 Cannot EXPN list, but will accept message
C: EHLO a.com                  S: 250-Received  S: 250-VRFY  S: 250-expn  S: 250 HELP me
== each for itself  -- extensions=["EXPN"]
C: VRFY bob | HELP             S: {UNRECOGNIZED}
C: EXPN list                   S: 252 Cannot EXPN list, but will accept message
== not before TLS  -- extensions=["HELP"], ssl_context=True, tls_required=True
C: HELP                        S: 530 Must issue a STARTTLS command first
== rule: a user to verify  -- extensions=["VRFY"], fail_fast=True  -- rule: VRFY bob@example.com: reply 550 No
C: VRFY <x@example.com>        S: 252 Cannot VRFY user, but will accept message
C: VRFY <bob@example.com>      S: 550 No  S: <closed>

# ---- CHUNKING
== a body in chunks  + chunking
R: BDAT 4\r\nhi\r\n    S: 250 Received
R: bdat 2 last\r\n.\n  S: 250 Received
== chunks in one piece, the last without a byte  + chunking
R: BDAT 1\r\nhBDAT 1\r\niBDAT 0 LAST\r\nNOOP\r\n  S: 250 Received  S: 250 Received  S: 250 Received  S: 250 Ok
== a chunk out of sequence is consumed  -- extensions=["CHUNKING"]
R: BDAT 6\r\nNOOP\r\nNOOP\r\nBDAT 6 LAST\r\nQUIT\r\nRSET\r\n
S: 503 Bad sequence of commands. DATA should be used after RCPT TO  S: 250 Ok
S: 503 Bad sequence of commands. DATA should be used after RCPT TO
S: 503 Bad sequence of commands. HELO should be the first
== DATA after a chunk  + chunking
R: BDAT 2\r\nhi  S: 250 Received
C: DATA          S: 503 Bad sequence of commands. DATA should be used after RCPT TO
C: BDAT 0 LAST   S: 250 Received
== chunks that are too long together  -- msg_size_limit=5  + chunking
R: BDAT 5\r\n12345BDAT 1\r\n1BDAT 0 LAST\r\n  S: 250 Received  S: 552 Message exceeded max size of 5 bytes
S: 503 Bad sequence of commands. DATA should be used after RCPT TO
C: MAIL FROM:<a@example.com> | RCPT TO:<b@example.com>  S: 250 Received
R: BDAT 6 LAST\r\n123456  S: 552 Message exceeded max size of 5 bytes
== chunks without a size  + chunking
C: BDAT | BDAT x | BDAT 1 x | BDAT -1 | BDAT 1 LAST x  S: 501 BDAT requires a size in bytes
R: BDAT 2 LAST\r\nhi  S: 250 Received
== rule: a chunk is refused  -- rule: BDAT: reply 451 not now; times=1  + chunking
R: BDAT 6\r\nNOOP\r\n  S: 451 not now
C: BDAT 0 LAST         S: 503 Bad sequence of commands. DATA should be used after RCPT TO

# ---- AUTH
== PLAIN, without an initial response, for another identity  + login
C: auth plain                    S: 334{SP}
C: {b64 authzid\0alice\0sécret}  S: 235 Authentication succeeded
== LOGIN, which is possible once  + login
C: AUTH LOGIN    S: 334 VXNlcm5hbWU6
C: {b64 alice}   S: 334 UGFzc3dvcmQ6
C: {b64 sécret}  S: 235 Authentication succeeded
C: AUTH LOGIN    S: 503 Bad sequence of commands. AUTH should be used once, after EHLO and before MAIL FROM
== a refused token is explained before the 535  + login
C: AUTH XOAUTH2 {b64 user=alice\1auth=Bearer wrong\1\1}
S: 334 {b64 \x7b"status":"401","schemes":"bearer mac","scope":"https://mail.google.com/"\x7d\n}
C:               S: 535 Authentication credentials invalid
C: AUTH XOAUTH2  S: 334{SP}
C: {b64 user=alice\1auth=Bearer wrong\1\1}
S: 334 {b64 \x7b"status":"401","schemes":"bearer mac","scope":"https://mail.google.com/"\x7d\n}
C: *             S: 501 Authentication cancelled
C: AUTH xoauth2  S: 334{SP}
C: {b64 user=alice\1auth=Bearer sécret\1\1}  S: 235 Authentication succeeded
== a wrong secret, a wrong user, an unknown mechanism  + login
C: AUTH GSSAPI | AUTH  S: 504 Unrecognized authentication type
C: AUTH PLAIN {b64 \0alice\0wrong} | AUTH PLAIN {b64 \0nobody\0}  S: 535 Authentication credentials invalid
C: AUTH LOGIN {b64 nobody}          S: 334 UGFzc3dvcmQ6
C:                                  S: 535 Authentication credentials invalid
# an AUTH that is cancelled, and responses that cannot be decoded
C: AUTH LOGIN                S: 334 VXNlcm5hbWU6
C: *                         S: 501 Authentication cancelled
C: AUTH PLAIN !!!            S: 501 Cannot decode response
C: AUTH PLAIN                S: 334{SP}
C: é | AUTH PLAIN = | AUTH PLAIN {b64 alice} | AUTH XOAUTH2 {b64 alice}  S: 501 Cannot decode response
C: AUTH CRAM-MD5 abcd        S: 501 Cannot decode response
C: NOOP                      S: 250 Ok
== AUTH after MAIL, and the parameter AUTH, which is announced with it  + login
C: MAIL FROM:<a@a.com> AUTH=<>  S: 250 Received
C: AUTH LOGIN               S: 503 Bad sequence of commands. AUTH should be used once, after EHLO and before MAIL FROM
== AUTH is required  -- auth_required=True, auth_users={"bob": ""}, extensions=["CHUNKING"]
C: RCPT TO:<b@b.com>         S: 530 Authentication required
C: EHLO a.com                S: 250-Received  S: 250-CHUNKING  S: 250 AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2
C: MAIL FROM:<a@a.com> | MAIL FROM:nonsense | RCPT TO:<b@b.com> | DATA  S: 530 Authentication required
R: BDAT 2 LAST\r\nhi         S: 530 Authentication required
C: NOOP | RSET  S: 250 Ok  C: HELP  S: {UNRECOGNIZED}
C: AUTH PLAIN {b64 \0bob\0}  S: 235 Authentication succeeded
C: MAIL FROM:<a@a.com> | RCPT TO:<b@b.com>  S: 250 Received
C: DATA                      S: {READY}
== only mechanisms that are announced are accepted  -- auth_users={"bob": ""}, auth_mechanisms=["plain", "LOGIN"]
C: EHLO a.com                S: 250-Received  S: 250 AUTH PLAIN LOGIN
C: AUTH XOAUTH2 | AUTH CRAM-MD5  S: 504 Unrecognized authentication type
C: AUTH PLAIN {b64 \0bob\0}  S: 235 Authentication succeeded
== a line of AUTH may be longer  -- auth_users={"alice": "{t*8000}"}
C: EHLO example.com                                         S: 250-Received  S: 250 AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2
C: AUTH XOAUTH2                                             S: 334{SP}
C: {x*13000}  S: 500 Line too long  C: NOOP  S: 250 Ok
C: AUTH XOAUTH2 {b64 user=alice\1auth=Bearer {t*8000}\1\1}  S: 235 Authentication succeeded
== rule: a user cannot log in at once
-- rule: AUTH alice: reply 454 4.7.0 Temporary authentication failure; delay 0.5; times=1
+ login
C: AUTH LOGIN  S: 334 VXNlcm5hbWU6  C: {b64 alice}  S: 334 UGFzc3dvcmQ6
C: {b64 sécret}  S: 454 4.7.0 Temporary authentication failure
C: AUTH PLAIN {b64 \0alice\0sécret}  S: 235 Authentication succeeded

# ---- TLS; what is said in it needs a socket
== AUTH needs TLS  -- ssl_context=True, auth_users={"u": "s"}, auth_requires_tls=True
C: EHLO a.com    S: 250-Received  S: 250 STARTTLS
C: AUTH PLAIN x  S: 538 Encryption required for authentication
== all but EHLO, NOOP and QUIT need TLS  -- ssl_context=True, tls_required=True, auth_users={}, auth_required=True
C: EHLO a.com           S: 250-Received  S: 250-STARTTLS  S: 250 AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2
C: MAIL FROM:<a@a.com> | RCPT TO:<b@b.com> | DATA | RSET | AUTH LOGIN  S: 530 Must issue a STARTTLS command first
C: NOOP  S: 250 Ok  C: FOO  S: {UNRECOGNIZED}
C: QUIT                 S: 221 Closing connection  S: <closed>
== STARTTLS  -- ssl_context=True
C: STARTTLS      S: 503 Bad sequence of commands. HELO should be the first
C: EHLO a.com    S: 250-Received  S: 250 STARTTLS
C: STARTTLS now  S: 501 STARTTLS takes no argument
C: STARTTLS      S: 220 Ready to start TLS
== STARTTLS where TLS is implicit  -- ssl_context=True, implicit_tls=True  + hello
C: STARTTLS  S: {UNRECOGNIZED}

# ---- Rules
== rule: a refusal for an address, whatever its case, a literal and a domain, and with a colon in it
-- rule: RCPT a@[IPv6:::1]: reply 550 no: never  -- rule: RCPT bob@Example.com: reply 550 5.1.1 No such user
-- rule: rcpt to a.com: reply 551 not here
C: EHLO example.com | MAIL FROM:<bob@example.com>  S: 250 Received
C: RCPT TO:<bob@EXAMPLE.com>    S: 550 5.1.1 No such user
C: RCPT TO:<Bob@example.com>  S: 250 Received  C: RCPT TO:<x@A.com>  S: 551 not here
C: RCPT TO:<x@b.a.com>  S: 250 Received  C: RCPT TO:<a@[IPv6:::1]>  S: 550 no: never
== rule: a recipient, at DATA and at the end of the body  -- multiple_rcptto=True
-- rule: DATA c@example.com: reply 450 c  -- rule: message d@example.com: reply 450 d
C: EHLO example.com | MAIL FROM:<c@example.com> | RCPT TO:<b@example.com>  S: 250 Received
C: DATA                       S: {READY}
C: . | RCPT TO:<d@example.com>  S: 250 Received
C: DATA  S: {READY}  C: .  S: 450 d  C: RCPT TO:<c@example.com>  S: 250 Received  C: DATA  S: 450 c
== rule: a sequence, the last of which stays  -- rule: NOOP: reply 451 later | 452 again |
-- rule: RSET: reply 250 one | 250 two
C: NOOP  S: 451 later  C: NOOP  S: 452 again  C: NOOP | NOOP  S: 250 Ok  C: RSET  S: 250 one
C: RSET | RSET  S: 250 two
== rule: the newest wins, until it is spent  -- rule: NOOP: reply 450 old  -- rule: *: reply 451 all; times=1
-- rule: NOOP: reply 452 new; times=1
S: 451 all
C: NOOP  S: 452 new  C: NOOP  S: 450 old
C: RSET  S: 503 Bad sequence of commands. HELO should be the first
== rule: the third, after which the normal replies come back  -- rule: NOOP: reply 450 third; skip=2; times=1
C: NOOP | NOOP  S: 250 Ok  C: NOOP  S: 450 third  C: NOOP | NOOP  S: 250 Ok
== rule: only what matches is let pass  -- rule: RCPT b@b.com: reply 450 first | 451 second; skip=1
C: EHLO a.com | MAIL FROM:<a@a.com> | RCPT TO:<c@b.com> | RCPT TO:<b@b.com> | RCPT TO:<c@b.com>  S: 250 Received
C: RCPT TO:<b@b.com>  S: 450 first
C: RCPT TO:<b@b.com>  S: 451 second
== rule: what a newer one answers is let pass, too  -- rule: NOOP: reply 450 old; skip=2
-- rule: NOOP: reply 451 new; times=1
C: NOOP  S: 451 new
C: NOOP  S: 250 Ok
C: NOOP  S: 450 old
== rule: of all, the greeting and EHLO pass  -- rule: *: reply 450 no; skip=2  + hello
C: NOOP | RSET  S: 450 no
== rule: a login is one match  -- auth_users={}  -- rule: AUTH: reply 454 no; skip=1
C: EHLO a.com  S: 250-Received  S: 250 AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2
C: AUTH LOGIN  S: 334 VXNlcm5hbWU6  C: YQ==  S: 334 UGFzc3dvcmQ6
C: YQ==        S: 535 Authentication credentials invalid
C: AUTH LOGIN  S: 334 VXNlcm5hbWU6
C: YQ==        S: 334 UGFzc3dvcmQ6
C: YQ==        S: 454 no
== rule: the second body is cut off  -- rule: message: drop; after=1; skip=1  + in body
C: hi
C: . | MAIL FROM:<a@example.com> | RCPT TO:<b@example.com>  S: 250 Received
C: DATA  S: {READY}
C: hi    S: <closed>
== rule: no chance, and every chance  -- rule: NOOP: reply 450 no; probability=0
-- rule: RSET: reply 450 no; probability=1; times=2
C: NOOP  S: 250 Ok  C: RSET | RSET  S: 450 no
C: RSET  S: 503 Bad sequence of commands. HELO should be the first
== rule: 2xx and 3xx take effect, even where the usual is a refusal  -- rule: RCPT: reply 299 fine
-- rule: DATA: reply 399 go  -- rule: message: reply 298 got it  -- rule: MAIL: reply 200 ok  + hello
C: MAIL FROM:nobody   S: 200 ok
C: RCPT TO:<nowhere>  S: 299 fine
C: DATA               S: 399 go
C: hi
C: .                  S: 298 got it
== rule: a text refuses if it begins with 4 or 5  -- rule: MAIL: reply nonsense  -- rule: EHLO: reply 550 no; times=1
-- rule: DATA: reply 552 too much
C: EHLO example.com  S: 550 no  C: MAIL FROM:<a@example.com>  S: nonsense
C: EHLO example.com  S: 250 Received  C: MAIL FROM:<a@example.com>  S: nonsense
C: RCPT TO:<b@example.com>  S: 250 Received  C: DATA  S: 552 too much
C: NOOP  S: 250 Ok
== rule: a verb the server does not know  -- rule: vrfy bob@example.com: reply 252 Maybe
-- rule: VRFY Carol: reply 250 Carol
C: vrfy <bob@example.com>  S: 252 Maybe  C: VRFY carol  S: 250 Carol
C: VRFY dave  S: {UNRECOGNIZED}
== rule: too busy to talk  -- rule: connect: reply 421 Too busy; close
S: 421 Too busy  S: <closed>
== rule: a drop takes the reply away, whatever the order of actions  -- rule: NOOP: drop; reply 450 no
C: NOOP  S: <closed>
== rule: the last end counts, and a close comes after the normal reply  -- rule: NOOP: drop; close
C: NOOP  S: 250 Ok  S: <closed>
== rule: aspects of several rules add up, and the newest has each  -- rule: NOOP: reply 450 first; close
-- rule: NOOP: reply 451 second  -- rule: *: delay 0
C: NOOP  S: 451 second  S: <closed>
== rule: a drop takes the reply of an older one away  -- rule: NOOP: reply 450 first  -- rule: NOOP: drop
C: NOOP  S: <closed>
== rule: an answer, then a close  -- rule: DATA: reply 354 go; close  + envelope
C: DATA  S: 354 go  S: <closed>
== rule: bytes that are no reply  -- rule: NOOP: raw \x21 garbage\r\n250 and more\r\n; times=1
C: NOOP  S: ! garbage  S: 250 and more
C: NOOP  S: 250 Ok
== rule: a delay and a trickle change no reply  -- rule: NOOP: delay 0.001  -- rule: NOOP: trickle 0.0001
-- rule: MAIL: delay 0.001  -- msg_mailfrom_received="nonsense"  + hello
C: NOOP                       S: 250 Ok
C: MAIL FROM:<a@example.com>  S: nonsense
C: RCPT TO:<b@example.com>    S: 250 Received
== rule: a line that is too long is in *  -- rule: *: reply 450 no; times=2
S: 450 no
C: {x*5000}  S: 450 no  C: {x*5000}  S: 500 Line too long
== rule: silence  -- rule: RCPT TO b@example.com: silence  + sender
C: RCPT TO:<b@example.com>  S: <silence>
== rule: the body is cut at its first byte  -- rule: message: reset ;after=0  + in body
R: x  S: <reset>
== rule: a body shorter than that is not cut  -- rule: message: reset; after=6
-- rule: message nobody@example.com: drop; after=1  + in body
R: x\r\n.\r\n  S: 250 Received
C: DATA        S: {READY}
R: x\r\n.
R: .\r\n.\r\n  S: <reset>
""",
    PREFIXES,
)
for entry in DIALOGUES.values():
    if entry.lines[0][0] != "S":
        entry.lines.insert(0, "S: 220 Welcome")

# What only a socket shows: pieces, pipelining, lines of several replies, bodies, and each way to end.
THROUGH_A_SOCKET = """
a mail | HELO, lower case, white space, bare LF | pipelining | nothing is answered after QUIT |
every text can be another | the size limit is inclusive, without stuffed dots, and a body is read to its end |
a line of 4096 bytes, and one that is answered before it ends | fail fast: a bad argument | a body in chunks |
rule: too busy to talk | rule: an answer, then a close | rule: a body shorter than that is not cut |
rule: bytes that are no reply | rule: a delay and a trickle change no reply | rule: silence
"""

# The lines whose last reply is the text of an option. An on_message of None is one that cannot be called.
TEXTS = read_rows(r"""
=> msg_greeting
FOO => msg_invalid_cmd
HELO => msg_invalid_cmd_helo_arg
HELO a.com => msg_helo_blacklisted_domain  -- blacklisted_helo_domains=["a.com"]
HELO a.com => msg_helo_received
MAIL FROM:<a@a.com> => msg_invalid_cmd_mailfrom_sequence
HELO a.com | MAIL FROM:a => msg_invalid_cmd_mailfrom_arg
HELO a.com | MAIL FROM:a@a.com => msg_mailfrom_blacklisted_email  -- blacklisted_mailfrom_emails=["a@a.com"]
HELO a.com | MAIL FROM:a@a.com => msg_mailfrom_received
RCPT TO:<a@a.com> => msg_invalid_cmd_rcptto_sequence
HELO a.com | MAIL FROM:<> | RCPT TO:a => msg_invalid_cmd_rcptto_arg
HELO a.com | MAIL FROM:<> | RCPT TO:b@b.com => msg_rcptto_blacklisted_email  -- blacklisted_rcptto_emails=["b@b.com"]
HELO a.com | MAIL FROM:<> | RCPT TO:b@b.com => msg_rcptto_not_registered_email  -- not_registered_emails=["b@b.com"]
HELO a.com | MAIL FROM:<> | RCPT TO:b@b.com => msg_rcptto_received
DATA => msg_invalid_cmd_data_sequence
HELO a.com | MAIL FROM:<> | RCPT TO:b@b.com | DATA => msg_data_received
HELO a.com | MAIL FROM:<> | RCPT TO:b@b.com | DATA | x | . => msg_msg_size_is_too_big  -- msg_size_limit=1
HELO a.com | MAIL FROM:<> | RCPT TO:b@b.com | DATA | x | . => msg_msg_received
HELO a.com | MAIL FROM:<> | RCPT TO:b@b.com | DATA | x | . => msg_msg_failed  -- on_message=None
RSET => msg_invalid_cmd_rset_sequence
HELO a.com | RSET x => msg_invalid_cmd_rset_arg
HELO a.com | RSET => msg_rset_received
NOOP => msg_noop_received
QUIT => msg_quit_cmd
VRFY bob => msg_vrfy_received  -- extensions=["VRFY"]
EXPN list => msg_expn_received  -- extensions=["EXPN"]
HELP => msg_help_received  -- extensions=["HELP"]
{x*5000} => msg_line_too_long
EHLO a.com | MAIL FROM:<> X=1 => msg_unknown_parameter  -- extensions=["DSN"]
HELO a.com | MAIL FROM:<> | RCPT TO:b@b.com | BDAT 0 => msg_bdat_received  -- extensions=["CHUNKING"]
HELO a.com | MAIL FROM:<> | RCPT TO:b@b.com | BDAT => msg_invalid_cmd_bdat_arg  -- extensions=["CHUNKING"]
HELO a.com | AUTH PLAIN {b64 \0u\0} => msg_auth_received  -- auth_users={"u": ""}
HELO a.com | AUTH PLAIN {b64 \0v\0} => msg_auth_failed  -- auth_users={"u": ""}
HELO a.com | AUTH LOGIN | * => msg_auth_cancelled  -- auth_users={}
HELO a.com | AUTH PLAIN x => msg_auth_bad_response  -- auth_users={}
HELO a.com | AUTH X => msg_auth_unknown_mechanism  -- auth_users={}
AUTH LOGIN => msg_auth_sequence  -- auth_users={}
HELO a.com | MAIL FROM:<> => msg_auth_required  -- auth_users={}, auth_required=True
HELO a.com | AUTH PLAIN x => msg_auth_tls_required  -- auth_users={}, ssl_context=True, auth_requires_tls=True
HELO a.com | STARTTLS => msg_starttls_received  -- ssl_context=True
HELO a.com | STARTTLS x => msg_invalid_cmd_starttls_arg  -- ssl_context=True
RSET => msg_tls_required  -- ssl_context=True, tls_required=True
EHLO a.com | MAIL FROM:<a@a.com> | RCPT TO:<b@b.com> | DATA | . => msg_violation  -- strict=True
""")
# Those of which other tests say more.
OTHER_TEXTS = ["msg_invalid_cmd_helo_sequence", "msg_invalid_cmd_starttls_sequence"]
OTHER_TEXTS += ["msg_session_timeout", "msg_server_shutdown"]


def read_sent(line: str) -> bytes:
    """What the client sends, by a line of a dialogue."""
    return line[3:].encode() + b"\r\n" if line[0] == "C" else read_escapes(line[3:])


class DialogueTest(unittest.TestCase):
    def test_in_memory(self) -> None:
        """A dialogue is its own transcript, where it is one message without a secret and a body."""
        transcripts = 0
        for title, entry in DIALOGUES.items():
            with self.subTest(title):
                memory = Memory(**entry.options)
                said = memory.greet()
                for line in entry.lines:
                    if line[0] == "S":
                        self.assertEqual(said[:1], [line[3:]])
                        del said[0]
                    else:
                        self.assertEqual(said, [], "the server has said more")
                        said = memory.feed(read_sent(line))
                self.assertEqual(said, [], "the server has said more")
                memory.end()
                others = "R: | AUTH |^C: [.]$|^S: 354 Ready|.{4000}"
                if "multiple_message_receiving" not in entry.options and not any(
                    re.search(others, line, re.IGNORECASE) for line in entry.lines
                ):
                    for message in memory.messages():
                        transcripts += 1
                        shown = [line.strip() for line in message.transcript.splitlines()]
                        self.assertEqual(shown, [line.strip() for line in entry.lines])
        self.assertGreater(transcripts, 10)

    def test_through_a_socket(self) -> None:
        for title in read_items(THROUGH_A_SOCKET):
            options = DIALOGUES[title].options.copy()
            rules = options.pop("rules", ())
            with self.subTest(title), Server(**options) as server:
                Memory.add_rules(server, rules)
                with Client(server, greets=False) as client:
                    for line in DIALOGUES[title].lines:
                        if line[0] != "S":
                            client.send(read_sent(line))
                        elif line == "S: <silence>":
                            client.assert_silence()
                        else:
                            self.assertEqual(client.read(), line[3:])

    def test_each_text(self) -> None:
        """Its default, and others. With fail_fast, each refusal ends the session, and nothing else does."""
        for lines, option, options in TEXTS:
            default = getattr(Configuration(), option)
            ends = ["<closed>"] * (default[0] in "45" or option == "msg_quit_cmd")
            for text in ("299 custom", "custom", *([] if "{" in default else [default])):
                with self.subTest(option, text=text):
                    memory = Memory(**{**options, option: text}, fail_fast=True)
                    said = memory.greet() + memory.say(*lines)
                    self.assertEqual(said[-1 - len(ends) :], [text, *ends])

    def test_all_texts_have_a_dialogue(self) -> None:
        texts = [field.name for field in dataclasses.fields(Configuration) if field.name.startswith("msg_")]
        texts.remove("msg_size_limit")
        self.assertCountEqual([row.expected for row in TEXTS] + OTHER_TEXTS, texts)

    def test_each_delay(self) -> None:
        names = ["helo", "mailfrom", "rcptto", "data", "message", "rset", "noop", "quit"]
        lines = [*([line] for line in (*ENVELOPE, "DATA")), SEND[3:], ["RSET"], ["NOOP"], ["QUIT"]]
        for name in names:
            with self.subTest(name):
                memory = Memory(**dict[str, Any]({f"response_delay_{name}": 0.5}))
                memory.say(*(line for command in lines for line in command))
                self.assertEqual(memory.delays, [0.5 * (name == other) for other in names])

    GARBAGE: Sequence[bytes] = [
        b"EHLO a.com", b"HELO [1.2.3.4]", b"MAIL FROM:<a@a.com>", b"MAIL FROM:<>", b"RCPT TO:<b@b.com>", b"DATA", b".",
        b"RSET", b"NOOP", b"QUIT", b"FOO", b"", b"\x00", b"\xff\xfe", b"\r", b" ", b"\t", b"x" * 600, "дядя".encode(),
    ]  # fmt: skip

    def make_garbage(self, rng: random.Random) -> bytes:
        line = bytearray(rng.choice(self.GARBAGE))
        for _ in range(rng.choice((0, 0, 0, 1, 3))):
            at = rng.randrange(len(line) + 1)
            line[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        return bytes(line).replace(b"\n", b"")

    def streams(self) -> Iterator[tuple[str, dict[str, Any], bytes]]:
        """The dialogues, and what no client would send, from a generator with a fixed seed."""
        for title, entry in DIALOGUES.items():
            stream = b"".join(read_sent(line) for line in entry.lines if line[0] != "S") + b"NOOP\r\nhalf\r\n.d"
            yield title, entry.options, stream
        for seed in range(200):
            rng = random.Random(seed)
            names = ("fail_fast", "multiple_rcptto", "multiple_message_receiving")
            options: dict[str, Any] = {name: rng.random() < 0.3 for name in names}
            options |= {"msg_size_limit": rng.choice((0, 20, 10_000)), "line_limit": 512}
            lines = [self.make_garbage(rng) + rng.choice((b"\n", b"\r\n")) for _ in range(20)]
            yield f"garbage {seed}", options, b"".join(lines)

    def converse(self, pieces: Iterable[bytes], options: dict[str, Any]) -> tuple[list[str], list[Any]]:
        """What the server says, and what it records, but for what only depends on the pieces."""
        memory = Memory(**options, tolerated=["pipelining", "data-before-354", "after-421"])
        said = memory.feed(*pieces)
        memory.end()
        for message in memory.messages():
            self.assertEqual(message.content.decode("utf-8", "surrogateescape"), message.msg_request)
            self.assertTrue(repr(message) and all(map(str, message.violations + message.warnings)))
        return said, [message.to_dict() for message in memory.messages()]

    def test_the_pieces_that_bytes_come_in_do_not_matter(self) -> None:
        for title, options, stream in self.streams():
            whole = self.converse([stream], options)
            for count in (3, 30, sys.maxsize):
                with self.subTest(title, count=count):
                    rng = random.Random(count)
                    cuts = sorted(rng.sample(range(1, len(stream)), min(count, len(stream) - 1)))
                    pieces = [stream[i:j] for i, j in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
                    self.assertEqual(self.converse(pieces, options), whole)


# -------------------------------------------------------------------------------------- violations

# What a client sends, and the codes or the texts of what the messages of the session then have wrong, in order; x3 is
# three of a kind.
VIOLATIONS = read_table(r"""
== the default options
HELO a.example.com | NOOP {x*505} | MAIL | RCPT | DATA | HEAD | Subject: =?utf-8?q?{x*64}?= | X: {x*995} | | {x*998} |
    .. | ... | ..hidden | a.b | END => clean
HELLO | MAIL FROM:<> | RCPT TO:<Postmaster> | RSET | MAIL FROM:<@x.org,@y.org:a@example.com> |
    RCPT TO:<@{a*40}.example.com,@{b*40}.example.com:b@example.com> | RSET | MAIL FROM:<"a b>c"@example.com> |
    RCPT TO:<"b\"b"@example.com> | RSET | QUIT => clean
EHLO [192.0.2.1] | MAIL FROM:<a@[192.0.2.1]> | RCPT TO:<b@[IPv6:2001:db8::1]> | RSET | EHLO [IPv6:2001:db8::1] | QUIT
    => clean
ENVELOPE | HEAD | MIME | Content-Type: multipart/mixed; boundary="=_1" | | For the readers of 1990 | --=_1 |
    Content-Type: multipart/alternative; boundary="=_2" | | --=_2 | Content-Type: text/plain; charset=utf-8 |
    CTE: quoted-printable | | Gr=C3=BC=C3=9Fe = | an alle=20 | | --=_2 | Content-Type: text/html; charset=iso-8859-15 |
    CTE: base64 | | PGI+R3L83zwvYj4= | --=_2-- | | --=_1 | Content-Type: message/rfc822 | | Subject: one in the other |
    Date: its faults are of others | | Hello | --=_1 | Content-Type: application/pdf; name*=utf-8''%C3%BC.pdf |
    CTE: base64 (c) | Content-Disposition: attachment; filename*0*=utf-8''%C3%BC; filename*1=".pdf" | | {AAAA*19} |
    AAAAAA== | --=_1-- | END => clean
ENVELOPE | Date: Fri, 21 Nov 1997 09:55:06 -0600 (CST) | From: =?utf-8?q?J=C3=BCrgen?= <a@example.com> |
    Sender: =?iso-8859-1*en?Q?J=FCrgen?= (=?utf-8?b?w7w=?=) <a@example.com> |
    To: "B, b" <b@example.com>, list: =?utf-8?b?w7w=?= <c@example.com>;, d@example.com | Cc: undisclosed-recipients:; |
    Message-ID: |  <1@example.com> | Subject: =?utf-8?b?w7w=?= | {SP}=?utf-8?q?=C3=BC_x?= and 1=?2 | | END => clean
LHLO a.example.com | NOOP | HELP | HELLO | VRFY b | NOOP what | ehlo a.example.com | mail from:<a@example.com> |
    rcpt to:<b@example.com> | QUIT => clean
ENVELOPE | From: a@example | R:.com\nX => unstuffed-dot + bare-lf
ENVELOPE | HEAD | MIME | Content-Type: multipart/digest; boundary="a'()+_,-./:=? 9" | | --a'()+_,-./:=? 9 | |
    Subject: Hi | | Hello | --a'()+_,-./:=? 9-- | END => clean
R:EHLO a.example.com\n | R:NOOP a\rb\r\n | R:NOOP\r\r\n | R:NOOP a\0b\r\n | NOOP {x*506} | R: NOOP\r\n | R:QUIT \r\n
    => bare-lf + bare-cr x2 + nul-byte + long-command + command-space x2
HELLO | MAIL FROM:<{a*600}@example.com> | RCPT TO:<{a*1100}@example.com> NOTIFY=NEVER | QUIT => long-command +
    path-too-long + long-command + path-too-long + unannounced-parameter
ENVELOPE | + DATE | + FROM | + ID | +  | + . | QUIT => data-before-354
HELLO | MAIL | + RCPT | + RSET | QUIT => pipelining x2
ENVELOPE | HEAD | | . | + QUIT => pipelining
HELLO | FOO bar | FOO bar | QÜIT | | AUTH=PLAIN c2VjcmV0 | QUIT => unknown-command x4
MAIL | QUIT => no-hello
EHLO my_host | MAIL | EHLO | EHLO a.example.com here | QUIT => hello-invalid + no-hello + hello-invalid x2
HELLO | STARTTLS | AUTH PLAIN AHUAcA== | MAIL | RCPT | BDAT 5 | ETRN a.example.com | RSET | HELO a.example.com |
    AUTH LOGIN | QUIT => unannounced-command x5
HELLO | MAIL | MAIL FROM:<b@example.com> | QUIT => nested-mail
HELLO | MAIL FROM: <a@example.com> | RSET | MAIL FROM:a@example.com | RCPT TO:Bob <b@example.com> |
    RCPT TO:<a@b@example.com> | RCPT TO:<> | RCPT TO:<b@example..com> | RCPT <b@example.com> | RSET |
    R:MAIL FROM:<a\x01b@example.com>\r\n | QUIT => there must be no space after the colon +
    write FROM:<address>, one address and nothing else + write TO:<address>, one address and nothing else +
    the part before the @ of the address is wrong + the address has no domain + the domain of the address is wrong +
    write TO:<address>, one address and nothing else + write FROM:<address>, one address and nothing else
HELLO | MAIL FROM:<{a*65}@example.com> | RSET | MAIL FROM:<{a*64}@example.com> | RCPT TO:<{ä*65}@{b.*10}example.com> |
    RCPT TO:<a@{bcde.*49}example.com> | RSET | MAIL FROM:<{ü*40}@example.com> | QUIT => path-too-long x2 +
    undeclared-utf8 + path-too-long x2 + undeclared-utf8
ENVELOPE | HEAD | | .hidden | R:a\rb\r\n | R:a\0b\r\n | {x*999} | END => unstuffed-dot + bare-cr + nul-byte + long-line
ENVELOPE | HEAD | | R:a\n.\r\n | END => bare-lf + false-end
ENVELOPE | HEAD | | R:a\r.\rb\r\n | END => bare-cr + false-end
ENVELOPE | HEAD | | R:a\r\n.\nb\r\n | END => false-end + bare-lf
ENVELOPE | HEAD | MIME | Content-Type: text/plain; charset=utf-8 | CTE: 8bit | | Grüße | END => 8bit-unannounced
ENVELOPE | Hello | END => header-syntax + header-missing x2 + no-message-id
ENVELOPE | R: Hello\r\n | END => header-syntax + header-missing x2 + no-message-id
ENVELOPE | HEAD | Subject : Hi | | END => header-syntax
ENVELOPE | PARTS | Content-Type : text/plain | | Hello | LAST => header-syntax
ENVELOPE | HEAD | X: Grüße | Subject: a | subject: b | TO: c@example.com | Comments: a | Comments: b | | END
    => header-raw + header-duplicate x2
ENVELOPE | HEAD | Content-Type: text/plain; charset=utf-8 | CTE: 7bit | | END => no-mime-version
ENVELOPE | HEAD | MIXED | | Hello | END => no line opens the first part
ENVELOPE | PARTS | | Hello | END => no line closes the last part
ENVELOPE | HEAD | MIME | Content-Type: multipart/mixed; boundary={x*71} | | --{x*71} | | Hello | --{x*71}-- | END
    => bad-boundary
ENVELOPE | PARTS | CTE: utf-8 | | Hello | --x | CTE: binary | | Hello | LAST => bad-encoding x2
ENVELOPE | HEAD | MIXED | CTE: base64 | | --x | | Hello | LAST
    => a multipart or a mail in it must be 7bit, 8bit or binary
ENVELOPE | PARTS | CTE: base64 | | Hello! | --x | CTE: base64 | | AAA | --x | CTE: base64 | | {AAAA*20} | LAST
    => bad-base64 x3
ENVELOPE | PARTS | CTE: quoted-printable | | 1 = 1 | --x | CTE: quoted-printable | | Grüße | --x |
    CTE: quoted-printable | | {x*79} | --x | CTE: quoted-printable | | trailing{SP} | | LAST => 8bit-unannounced +
    bad-quoted-printable x4
ENVELOPE | PARTS | Content-Type: text/plain; charset=utf-8 | CTE: quoted-printable | | =FC | --x |
    Content-Type: text/html; charset=nothing | | Hello | --x | CTE: base64 | | w7w= | LAST => wrong-charset +
    a text that is not ASCII needs a charset, such as utf-8
ENVELOPE | PARTS | Content-Type: message/global-headers | CTE: base64 | | YQ== | LAST => clean
EHLO vm | HELO localhost | EHLO 192.0.2.1 | EHLO bücher.example | EHLO [999.1.1.1] | EHLO [foo:bar] | QUIT
    => hello-not-fqdn x2 + hello-invalid x4
ENVELOPE | HEAD | | .foo | R:.\nbar\r\n | END => unstuffed-dot + false-end + bare-lf
ENVELOPE | PARTS | hi there | --x | Content-Type: image/png; name="ä" | | LAST => 8bit-unannounced + header-syntax +
    header-raw
== SIZE and an extension of one's own  -- extensions=["SIZE", "FOO"]
HELLO | MAIL FROM:<a@example.com> SIZE=10 BODY=8BITMIME | MAIL FROM:<a@example.com> SIZE=10 FOO=1 |
    RCPT TO:<b@example.com> NOTIFY=NEVER | RSET | HELO a.example.com | MAIL FROM:<a@example.com> SIZE=10 |
    MAIL FROM:<a@example.com> BODY=BINARYMIME | QUIT => unannounced-parameter x4
HELLO | MAIL FROM:<a@example.com> SIZE=117 | RCPT | DATA | HEAD | | Hello | END => clean
HELLO | MAIL FROM:<a@example.com> SIZE=115 | RCPT | DATA | HEAD | | Hello | END => clean
HELLO | MAIL FROM:<a@example.com> SIZE=107 | RCPT | DATA | HEAD | | END => size-understated
== what is tolerated  -- tolerated=["unknown-command", "hello-not-fqdn"]
EHLO a | FOO | QUIT => clean
== PIPELINING, CHUNKING and AUTH  -- extensions=["PIPELINING", "CHUNKING"], auth_users={"u": "p"}
HELLO | MAIL | + RCPT | + DATA | HEAD | | Hello |
    R:.\r\nMAIL FROM:<c@example.com>\r\nRCPT TO:<d@example.com>\r\nDATA\r\n | HEAD | | Hello | . | + QUIT => clean
HELLO | MAIL | RSET | + MAIL | + RCPT | + QUIT => clean
ENVELOPE | + DATE | + FROM | + ID | +  | + . | QUIT => data-before-354
HELLO | + QUIT => pipelining
HELLO | HELLO | + NOOP | + QUIT => pipelining-order x2
HELLO | AUTH PLAIN AHUAcA== | + MAIL | + RSET | + QUIT => clean
HELLO | AUTH LOGIN | + dQ== | + cA== | QUIT => pipelining-order x2
HELLO | MAIL | + RCPT | + R:BDAT 110\r\n | + DATE | + FROM | + To: b@example.com | + ID | +  |
    R:BDAT 11 LAST\r\n.\r\n.Hello\r\n | QUIT => clean
== a sender refused
-- extensions=["PIPELINING"], blacklisted_mailfrom_emails=["a@a.com"], msg_mailfrom_blacklisted_email="550 No"
HELLO | MAIL | + RCPT | + DATA | RSET | QUIT => clean
ENVELOPE | QUIT => bad-sequence + no-recipient
== a recipient refused  -- extensions=["PIPELINING"], not_registered_emails=["b@b.com"]
HELLO | MAIL | + RCPT | + DATA | RSET | + MAIL FROM:<c@example.com> | + RCPT TO:<c@example.com> | + DATA | HEAD | | END
    => clean
ENVELOPE | QUIT => no-recipient
== a 421  -- extensions=["PIPELINING"], blacklisted_mailfrom_emails=["a@a.com"]
HELLO | MAIL | + RCPT | + DATA | QUIT => clean
HELLO | MAIL | RSET | NOOP | QUIT => after-421 x2
== 8BITMIME  -- extensions=["8BITMIME"]
HELLO | MAIL FROM:<a@example.com> BODY=8BITMIME | RCPT | DATA | HEAD | MIME |
    Content-Type: text/plain; charset="utf-8" | CTE: 8bit | | Grüße | END => clean
HELLO | MAIL FROM:<a@example.com> BODY=8BITMIME | RCPT | DATA | HEAD | Content-Type: text/html; | CTE: 8bit | MIME | |
    Grüße | END => clean
ENVELOPE | HEAD | MIME | Content-Type: text/plain; charset=utf-8 | | Grüße | END => 8bit-undeclared + 8bit-in-7bit
== STARTTLS  -- ssl_context=True
HELLO | STARTTLS | ENVELOPE | HEAD | | END => clean
HELLO | STARTTLS | MAIL | QUIT => no-hello-after-tls
HELLO | STARTTLS | + EHLO b.example.com | HELLO | QUIT => pipelining
HELLO | STARTTLS | HELLO | STARTTLS | QUIT => unannounced-command
HELLO | STARTTLS now | MAIL | RCPT | DATA BODY=8BITMIME | RSET all | QUIT please | QUIT => superfluous-argument x4
== AUTH  -- auth_users={"u": "p"}
HELLO | AUTH PLAIN | * | AUTH XOAUTH2 | dXNlcj11AWF1dGg9QmVhcmVy{ICAg*900}cAEB | | AUTH LOGIN | dQ== | cA== |
    MAIL FROM:<a@example.com> AUTH={a*490}@example.com | QUIT => clean
HELLO | AUTH XOAUTH2 dXNlcj11AWF1dGg9QmVhcmVy{ICAg*900}cAEB | | AUTH NTLM AAAA | RCPT | MAIL | AUTH PLAIN AHUAcA== |
    RSET | QUIT => long-command + unannounced-mechanism + RCPT needs an accepted MAIL +
    AUTH is not allowed within a mail
== SMTPUTF8, 8BITMIME, DSN, DELIVERBY, FUTURERELEASE and XCLIENT
-- extensions=["SMTPUTF8", "8BITMIME", "DSN", "DELIVERBY", "FUTURERELEASE 100 100", "XCLIENT"]
HELLO | MAIL FROM:<jürgen@example.com> SMTPUTF8 | RSET | MAIL FROM:<jürgen@example.com> | RSET | MAIL |
    RCPT TO:<jürgen@example.com> | QUIT => undeclared-utf8 x2
HELLO | MAIL FROM:<jürgen@exämple.com> SMTPUTF8 BODY=8BITMIME | RCPT TO:<jürgen@exämple.com> | DATA | HEAD |
    Subject: Grüße | | END => clean
HELLO | XCLIENT NAME=a | MAIL FROM:<a@example.com> RET=HDRS ENVID=QQ314159 BY=120;R HOLDFOR=120 |
    RCPT TO:<b@example.com> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;b@example.com | RSET | QUIT => clean
== DATA refused  -- msg_data_received="554 No"
ENVELOPE | RSET | QUIT => clean
== a mail refused  -- msg_msg_received="451 Later"
ENVELOPE | HEAD | | . | MAIL | RCPT | DATA | HEAD | | END => clean
== a mail that is too large  -- msg_size_limit=10
ENVELOPE | HEAD | END => clean
== several recipients  -- multiple_rcptto=True
ENVELOPE | HEAD | Bcc: B <b@b.com> | | END => clean
HELLO | MAIL | RCPT | RCPT TO:<c@example.com> | DATA | HEAD | Bcc: C <c@example.com> | | END => bcc-disclosed
== a 421 as the greeting  -- msg_greeting="421 Too busy"
HELLO | QUIT => after-421
== DATA refused for now  -- extensions=["PIPELINING"], msg_data_received="451 Later"
ENVELOPE | HEAD | QUIT | | R:Hello\n | . | QUIT => data-after-refusal
ENVELOPE | + DATE | +  | + . | QUIT => pipelining-order + data-after-refusal
== AUTH where STARTTLS is offered  -- auth_users={"u": "p"}, ssl_context=True
HELLO | AUTH PLAIN AHUAeA== | auth login | dQ== | cA== | QUIT => auth-in-clear x2
== BINARYMIME  -- extensions=["CHUNKING", "BINARYMIME", "8BITMIME"]
HELLO | MAIL FROM:<a@example.com> BODY=BINARYMIME | RCPT | R:BDAT 164 LAST\r\n | + DATE | + FROM | + ID | + MIME |
    + CTE: binary | +  | + R:\0\n\xff\r\n | QUIT => clean
HELLO | MAIL FROM:<a@example.com> BODY=BINARYMIME | RCPT | DATA | HEAD | | R:a\n\r\n | END => BINARYMIME needs BDAT +
    bare-lf
HELLO | MAIL | RCPT | R:BDAT 3\r\nabc | DATA | QUIT => after BDAT comes BDAT LAST
== no recipient, and a lone dot  -- not_registered_emails=["b@b.com"]  -- rule: DATA: reply 354 Go on
HELLO | MAIL | RCPT | DATA | END => no-recipient
""")

# The same for what a mail has wrong, and for what is right though it looks wrong.
MAIL_FAULTS = read_table(r"""
== the header
ENVELOPE | HEAD | MIME | MIME | Content-Type: text/plain | content-type: text/html | | END => header-duplicate x2
ENVELOPE | PARTS | CTE: base64 | Content-Type: application/pdf | CTE: base64 | Content-ID: <1@example.com> |
    Content-ID: <2@example.com> | | eHh4 | LAST => header-duplicate x2
ENVELOPE | DATE | From: a@example.com, "C, d" <c@example.com> | Sender: a@example.com | ID |
    Resent-From: b@example.com | Resent-Date: Fri, 21 Nov 1997 09:55:06 -0600 | | END => clean
ENVELOPE | HEAD | X: a | {SP} |  b | | END => header-syntax
ENVELOPE | HEAD | X: a | R:\t\r\n |  b | | END => header-syntax
ENVELOPE | PARTS | R:X: a\x1bb\r\n | X-2: a | {SP} | | hi | LAST => a header must not have control characters +
    a continuation line has nothing but white space
ENVELOPE | HEAD | R:X: a\tb\r\n | X-2: |  c | | END => clean
ENVELOPE | HEAD | Subject: =?nothing?Q?a=FC?= | X: =?nothing?Q?b=FC?= | | END => unknown-charset
ENVELOPE | HEAD | MIME | Content-Type: multipart/mixed; boundary="" | | -- | | hi | ---- | END => bad-boundary
ENVELOPE | HEAD | MIME | Content-Type: multipart/mixed; boundary={1} | | --{1} | | hi | --{1}-- | END => bad-boundary
ENVELOPE | PARTS | Content-Type: multipart/alternative; boundary=xy | | --xy | | hi | --xy-- | LAST => bad-boundary
ENVELOPE | PARTS | Content-Type: message/delivery-status | CTE: quoted-printable | | Reporting-MTA: dns; a | --x |
    Content-Type: message/disposition-notification | CTE: base64 | | YTog | LAST => bad-encoding x2
ENVELOPE | HEAD | MIXED | CTE: 7bit | | --x | Content-Type: text/plain; charset=utf-8 | CTE: 8bit | | ä | LAST
    => 8bit-unannounced + 8bit-in-7bit
ENVELOPE | HEAD | MIXED | CTE: 7bit | | ä | --x | | a | LAST => 8bit-unannounced + 8bit-in-7bit
ENVELOPE | PARTS | Content-Type: text/plain; charset=utf-8 | CTE: 8bit | | ä | LAST => 8bit-unannounced
ENVELOPE | HEAD | MIME | Content-Type: text/plain; charset=utf-8 | CTE: quoted-printable | | =c3=bc | END
    => write =C3 and not =c3
ENVELOPE | HEAD | MIME | Content-Type: text/plain; charset=nothing | CTE: quoted-printable | | =FC | END
    => unknown-charset
ENVELOPE | HEAD | MIME | Content-Type: text/plain; charset=utf-8 | CTE: base64 | | w7zD | END => wrong-charset
ENVELOPE | HEAD | Grüße: x | | END => header-syntax
== PIPELINING, SIZE, DSN, CHUNKING and AUTH
-- extensions=["PIPELINING", "SIZE", "8BITMIME", "DSN", "CHUNKING", "SMTPUTF8"], auth_users={"u": "p"}
HELLO | MAIL FROM:<a@example.com> BODY=8BIT | RSET | MAIL FROM:<a@example.com> SIZE=-1 | RSET |
    MAIL FROM:<a@example.com> SIZE=1 size=1 | RSET | MAIL FROM:<a@example.com> SIZE | RSET |
    MAIL FROM:<a@example.com> RET=BODY | RSET | MAIL FROM:<a@example.com> NOTIFY=NEVER | RSET |
    MAIL FROM:<a@example.com> SMTPUTF8=1 | QUIT => this is no value of BODY + this is no value of SIZE +
    SIZE is given twice + this is no value of SIZE + this is no value of RET + NOTIFY belongs to RCPT +
    this is no value of SMTPUTF8
HELLO | MAIL | RCPT TO:<b@example.com> NOTIFY=NEVER,FAILURE | RCPT TO:<b@example.com> ORCPT=b@example.com |
    RCPT TO:<b@example.com> SIZE=1 | RCPT TO:<b@example.com> c@example.com | BDAT abc LAST | BDAT | QUIT
    => bad-parameter x4 + bad-parameter + no-recipient + bad-parameter + no-recipient
HELLO | MAIL | RCPT | R:BDAT 4\r\nabcdefgh\r\nij\n | BDAT 0 LAST | QUIT => bad-parameter + header-syntax +
    header-missing x2 + no-message-id
HELLO | AUTH PLAIN u:p | AUTH PLAIN dSBw | AUTH LOGIN | u | p | QUIT => bad-auth x2
HELLO | AUTH XOAUTH2 {dXNl*19} | {YWJj*4} | QUIT => bad-auth + AUTH has failed, and this belongs to it
HELLO | AUTH PLAIN AHUAcA== | AUTH PLAIN AHUAcA== | QUIT => AUTH has succeeded already
HELLO | AUTH PLAIN | AHUAcA== | AUTH PLAIN AHUAeA== | QUIT => AUTH has succeeded already
HELLO | AUTH PLAIN AHUAeA== | AUTH PLAIN AHUAcA== | QUIT => clean
HELLO | R:\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\n\r\n.\n\0 => tls-on-plain-port
== a body that does not end
ENVELOPE | HEAD | | Hi | R:.\n => false-end + bare-lf
ENVELOPE | HEAD | | R:Hi\n.\n => bare-lf + false-end
ENVELOPE | HEAD | | R:Hi\n.\r\n => bare-lf + false-end
ENVELOPE | HEAD | | R:Hi\r\n.\r => clean
ENVELOPE | HEAD | | Hi => clean
== DATA refused, and the mail comes all the same  -- msg_data_received="554 No"
ENVELOPE | DATE | + FROM | + ID | +  | + . | QUIT => data-after-refusal
== SMTPUTF8  -- extensions=["SMTPUTF8", "8BITMIME"]
HELLO | MAIL FROM:<a@example.com> SMTPUTF8 | RCPT | DATA | HEAD | R:X: a\xfcb\r\n | Subject: Grüße | | END => header-raw
HELLO | MAIL | RCPT TO:<b@example.com>,<c@example.com> | RCPT TO:b@example.com, c@example.com | RSET | QUIT
    => path-syntax x2 + bad-parameter
# In the manner of the samples of RFC 5322 appendix A, RFC 2046, RFC 2049, RFC 2231, RFC 3464 and RFC 8098.
== samples
ENVELOPE | From: "Joe Q. Public" <john.q.public@example.com> |
    To: Mary Smith <mary@x.test>, jdoe@example.org, Who? <one@y.test> |
    Cc: <boss@nil.test>, "Giant; \"Big\" Box" <sysservices@example.net> | Date: Tue, 1 Jul 2003 10:52:37 +0200 |
    Message-ID: <5678.21-Nov-1997@example.com> | | Hi everyone. | END => clean
ENVELOPE | From: Pete <pete@silly.example> | To: A Group:Ed Jones <c@a.test>,joe@where.test,John <jdoe@one.test>; |
    Cc: Undisclosed recipients:; | Date: Thu, 13 Feb 1969 23:32:54 -0330 | Message-ID: <testabcd.1234@silly.example> | |
    Testing. | END => clean
ENVELOPE | From: Pete(A nice \) chap) <pete(his account)@silly.test(his host)> |
    To:A Group(Some people):Chris Jones <c@(Chris's host.)public.example>, John <jdoe@one.test> (my friend); (the end) |
    Cc:(Empty list)(start)Hidden recipients  :(nobody(that I know))  ; | Date: Thu, |       13 |         Feb |
              1969 |       23:32 |                -0330 (Newfoundland Time) |
    Message-ID:              <testabcd.1234@silly.test> | | Testing. | END => clean
ENVELOPE | HEAD | MIME | Content-Type: multipart/report; report-type=disposition-notification; |
     boundary="RAA14128.773615765/EXAMPLE.COM" | | --RAA14128.773615765/EXAMPLE.COM | Content-type: text/plain | |
    It was displayed. | | --RAA14128.773615765/EXAMPLE.COM | Content-type: message/disposition-notification | |
    Reporting-UA: joes-pc.cs.example.com; Foomail 97.1 | Final-Recipient: rfc822;Joe_Recipient@example.com |
    Disposition: manual-action/MDN-sent-manually; displayed | | --RAA14128.773615765/EXAMPLE.COM |
    Content-type: message/rfc822 | | Subject: x | | y | --RAA14128.773615765/EXAMPLE.COM-- | END => clean
""")

# The values of a header, and what is wrong with a mail that has one of them.
VALUES = read_table(r"""
== Date
Fri, 21 Nov 1997 09:55:06 -0600 (a \) b "c) | (c) fri, 21 nov 1997 09:55 -0600 (a (b) c) => clean
Ven, 21 nov 1997 09:55:06 GMT | 31 Feb 2025 09:55:06 -0600 | 21 Nov 1997 09:55:06 +0099 | 2024-05-01T10:00:00Z |
    Fri, 21 Nov 1997 09:55:06 CET | Fri, 21 Nov 1997 09:55:06 -0600 (a => bad-date
Mon, 21 Nov 1997 09:55:06 -0600 | Mon, 21 Nov 97 09:55:06 GMT => this date is on another day of the week
Fri, 21 Nov 1997 09:55:06 GMT | Fri, 21 Nov 97 09:55:06 -0600 | 1 Jan 25 09:55 EST
    => write the year with four digits, and the zone like +0000
== From
"a@b, c@d" <a@example.com> | =?utf-8?Q?M=C3=BCller=2C_J?= (=?utf-8?q?a,b?=) <a@example.com> => clean
a@example.com, C <c@example.com> => From has several addresses, and there is no Sender
undisclosed:; => group-in-from
=?utf-8?q?J=C3=BCrgen_=3Ca=40example=2Ecom=3E?= => bad-address
=?utf-8?q?J?=<a@example.com> => an encoded word needs white space around it
=?utf-8?Q?M=C3=BCller,_J?= <a@example.com> | =?utf-8?Q?M=C3=BCller_(J)?= <a@example.com>
    => a Q word in a name must have letters, digits and !*+-/=_ only
"=?utf-8?Q?M=C3=BCller?=" <a@example.com> | "x =?utf-8?Q?M=C3=BCller?= y" <a@example.com>
    => an encoded word in quotes is not decoded
=?utf-8?Q?M=C3=BCller?=@example.com | M <a@=?utf-8?Q?M=C3=BCller?=> => an address must not have an encoded word
== Sender
Doe, John <a@example.com> => quote a name that has , . : @ [ or ]
a@example.com, b@example.com => a Sender must have one address only
== Cc
undisclosed-recipients:; | unlisted-recipients:; (no To-header on input) |
    a(b)@(c)example.com, "a" "b" c <d@e> (f), <a@b> |
    g: a@example.com, B <b@example.com>; , (c) c@[192.0.2.1] (c, d), "q \"r"@example.com => clean
bob | <a@example.com | a@example.com; b@example.com | g: a@example.com,; | [x] <a@example.com> |
    a@example.com b@example.com | a@example..com | <a@example.com>, <> | "a <a@example.com> => bad-address
Doe, J. <a@example.com> | Sales: J <a@example.com> | a@b.com <a@example.com> => quote a name that has , . : @ [ or ]
, b@example.com | a@example.com,, b@example.com | | a@example.com,
    => leave out an empty element of a list, or a header without an address
John Q. Public <a@example.com> | <@x.org,@y.org:a@example.com>, b @ c . org => quote a name that has a dot
== Message-ID
<a$b=c/d+e%f.g@[127.0.0.1]> | (c) <a@b.c> (c (d)) (e) => clean
<1> | <a..b@example.com> | <a:b@example.com> | <a@b@example.com> | <a b@example.com> | <a@example.com> <b@example.com> |
    <@example.com> => bad-message-id
<"a b"@example.com> => write only <left@right>
== Content-ID
logo => bad-message-id
== In-Reply-To
<1@example.com> (c) => clean
1@example.com => bad-message-id
Your mail of "today" <1@example.com> => write only <left@right>
== References
<1@example.com> <2@[IPv6:::1]><3@localhost> => clean
<1@example.com>, <2@example.com> => separate ids by white space and not by commas
== Subject
"x =?utf-8?Q?M=C3=BCller,_(J)?= y" | =?windows-31j?Q?=82=A0?= =?VISCII?Q?=FC?= =?ISO-8859-8-I?q?=E0?= =?nothing?q?a?= |
    =?US-ASCII*EN?Q?Keith_Moore?= => clean
=?utf-8?Q?a=C3?= =?utf-8?Q?=BC?= | =?utf-8?B?YcM=?= =?utf-8?B?vA==?= | =?utf-8?q?=C3?=
    => a character is split or cut off: encode it as a whole
=?utf-8?Q?a?==?utf-8?Q?b?= | a=?utf-8?q?ab?= => an encoded word needs white space around it
=?utf-8?q??= | =?utf-8?q?a b?= => an encoded word is empty or has white space in it
=?utf-8?b?w7w?= | =?utf-8?x?ab?= | =?utf-8?q?caf=?= => encoded-word
=?utf-8?q?{x*65}?= => encoded-word-long
# charsets that IANA registers, though Python cannot decode most of them, and others
=?VISCII?q?=FC?= =?csVIQR?q?=FC?= =?IBM01141?q?=FC?= =?ISO-2022-CN-EXT?q?=FC?= =?iso-ir-99?q?=FC?=
    =?ISO646-DE?q?=FC?= =?ISO_5428:1980?q?=FC?= =?NATS-DANO?q?=FC?= =?JIS_C6226-1983?q?=FC?= =?EBCDIC-CP-FR?q?=FC?=
    =?OSD_EBCDIC_DF04_1?q?=FC?= =?hp-legal?q?=FC?= =?T.61-8bit?q?=FC?= =?x0212?q?=FC?= =?KSC5636?q?=FC?=
    =?nf_z_62-010_(1973)?q?=FC?= =?CESU-8?q?=FC?= =?pt2?q?=FC?= =?Adobe-Symbol-Encoding?q?=FC?=
    =?Amiga-1251?q?=FC?= =?greek7-old?q?=FC?= =?us-dk?q?=FC?= =?unknown-8bit?q?=FC?= =?CCSID00924?q?=FC?=
    =?latin-greek?q?=FC?= => clean
=?nothing?q?=FC?= | =?utf-9?q?=FC?= | =?iso-8859-99?q?=FC?= | =?windows-1259?q?=FC?= | =?cp9999?q?=FC?= |
    =?x-unknown?q?=FC?= | =?latin-99?q?=FC?= | =?utf8mb4?q?=FC?= | =?punycode?q?=FC?= | =?hex?q?=FC?=
    => unknown-charset
== Resent-To
b@example.com => header-missing x2
== MIME-Version
(a) 1.(b)0 (c) => clean
2.0 | | 1 => bad-mime-version
== Content-Transfer-Encoding
binary => binary needs BODY=BINARYMIME
== Content-Type
application/x-stuff; title*=us-ascii'en-us'This%20is%20%2A%2A%2Afun%2A%2A%2A |
    message/external-body; access-type=URL; URL*0="ftp://"; URL*1="cs.utk.example/pub/x.txt" |
    application/x-stuff; title*0*=us-ascii'en'This%20is%20; title*1*=%2A%2A%2Afun%2A%20; title*2="isn't it!" => clean
text => bad-content-type
text/plain; name==?utf-8?q?a?= => encoded-parameter + bad-content-type
text/plain; name*=utf-8'a => a charset must come first, as in utf-8''a%20b
multipart/mixed => there is no boundary parameter
== Content-Disposition
attachment; filename="My (\"1\") File.pdf"; size=3 (three); filename*=utf-8'de'%C3%BC |
    inline; filename*1=b; filename*0*=''%20; filename*2*=%20; |
    inline; filename*0*=utf-8''%C3; filename*1*=%BC; a=b; a*=''c => clean
attachment; filename=My File.pdf | attachment; filename=a/b.pdf | attachment; filename=a(1).pdf |
    attachment; filename=a[1].pdf | attachment; filename="a"b.pdf | attachment; filename="a.pdf | |
    attachment filename=a.pdf | filename=a.pdf | attachment; =a.pdf | attachment; filename= => bad-disposition
inline; filename*="utf-8''a" => a value after *= must not be in quotes
inline; filename*=a%20b.pdf | inline; filename*0="a"; filename*1*=%20b => a charset must come first, as in utf-8''a%20b
inline; filename*=utf-8''a%2.pdf => a % must have two hexadecimal digits after it
inline; filename*=utf-8''a%FC.pdf => a value is not in its charset
inline; filename*0="a"; filename*2="b.pdf" | inline; filename*1="a" => the numbers after * must be 0, 1, 2 and so on
inline; filename*=nothing''a%FC.pdf => unknown-charset
inline; filename="=?utf-8?q?=C3=BC?=" => encoded-parameter
""")

HEADERS = ("From", "To", "Sender", "Message-ID", "References", "Date", "Subject", "Bcc", "MIME-Version")
MIME_HEADERS = ("Content-Type", "Content-Disposition", "Content-Transfer-Encoding")
# What a header may have many of.
UNITS = ("\r\n ", "\t", " ", "a ", "<a@b> ", "=?utf-8?q?x?= ", "; x*1*=%41", "a b=")
UNITS += tuple(re.findall(r"\S+", r'a ( ) " \ \" < > @ , ; : . = [ ] =? ?= a@b, a; x*0=a; ;a=b (a) "a" a@ a:b;'))

# Codes, and what their texts tell to do.
CURES = """
bare-lf CRLF | bare-cr CRLF | early-talker wait | data-before-354 wait | pipelining wait | no-hello send EHLO first |
hello-invalid [192.0.2.1] | hello-not-fqdn host.example.com | nested-mail RSET | no-recipient RSET |
data-after-refusal RSET | unstuffed-dot doubled | long-line quoted-printable or base64 |
8bit-unannounced quoted-printable or base64 | 8bit-undeclared BODY=8BITMIME |
8bit-in-7bit quoted-printable or base64 | undeclared-utf8 SMTPUTF8 | header-raw encoded words |
bad-message-id <left@right> | bad-date -0600 | bad-address user@example.com | bcc-disclosed leave it out |
no-mime-version MIME-Version: 1.0 | bad-mime-version 1.0 | encoded-word-long split it |
encoded-parameter utf-8''a%20b | bad-content-type text/plain; charset=utf-8 | bad-disposition filename="a b.pdf" |
unknown-charset use utf-8 | false-end smuggling | path-syntax <address>
"""


def list_codes(messages: Iterable[Message]) -> list[str]:
    """The codes of violations and warnings in the order in which they were found."""
    return [found.code for message in messages for found in Memory.findings(message)]


class ViolationTest(ServerCase):
    MAIL = b"Date: Fri, 21 Nov 1997 09:55:06 -0600\r\nFrom: a@example.com\r\n\r\n%b\r\n.\r\n"

    def rows(self) -> Iterator[tuple[Row, dict[str, Any], list[str], list[bytes]]]:
        """A row, its options, the codes and texts that are expected, and what the client sends."""
        entries = [
            (entry, row) for table in (VIOLATIONS, MAIL_FAULTS) for entry in table.values() for row in entry.rows
        ]
        for name, values in VALUES.items():
            head = [word for word in ("DATE", "FROM", "ID", "MIME") if not SHORT[word].startswith(f"{name}:")]
            for row in values.rows:
                mails = [["ENVELOPE", *head, f"{name}: {value}", "", "END"] for value in row.given]
                entries += [(values, row._replace(given=mail)) for mail in mails]
        for entry, row in entries:
            counted = [re.fullmatch(r"(.*?)(?: x(\d))?", item) for item in row.expected.split(" + ")]
            expected = [
                match[1] for match in counted if match and match[1] != "clean" for _ in range(int(match[2] or 1))
            ]
            yield row, entry.options, expected, read_pieces(row.given)

    def test_the_table(self) -> None:
        """Each piece as a whole and, where it is but a line, in parts. There is a row for each code."""
        codes = {"early-talker"}
        for row, options, expected, pieces in self.rows():
            for size in (sys.maxsize,) if any(b"\r\n" in piece[:-2] for piece in pieces) else (sys.maxsize, 7):
                memory = Memory(**options)
                memory.greet()
                memory.converse(pieces, size)
                found = [violation for message in memory.messages() for violation in Memory.findings(message)]
                codes.update(violation.code for violation in found)
                with self.subTest(row, size=size):
                    said = [each.text if each.text in expected else each.code for each in found]
                    self.assertEqual(said, expected)
                    self.assertTrue(all(len(each.line) <= 200 and str(each).isprintable() for each in found), found)
        self.assertEqual(codes, set(Memory.CODES))

    def test_what_each_text_says(self) -> None:
        """What to change."""
        for code, cure in (item.split(" ", 1) for item in read_items(CURES)):
            self.assertIn(cure, Memory.CODES[code][0])

    def test_who_refuses_it(self) -> None:
        memory = Memory(*ENVELOPE, "DATA")
        memory.say("Date: a", "From: a@a.com, b@b.com", "X: a", " ", "Subject: a", "Subject: b", "", "Hello\n", ".")
        found = [(violation.code, violation.refused_by) for violation in Memory.findings(memory.message())]
        expected = [("bare-lf", "Postfix"), ("header-missing", "Gmail"), ("no-message-id", "Gmail"), ("bad-date", "")]
        expected += [("header-syntax", "amavis"), ("header-duplicate", "Gmail, Amazon SES")]
        self.assertEqual(found, expected)

    def test_linear_time(self) -> None:
        """Eight times as much of anything takes about eight times as long."""
        for name in (*HEADERS, *MIME_HEADERS):
            for unit in UNITS:
                begin = "text/plain; " if name in MIME_HEADERS else ""

                def measure(size: int, name: str = name, unit: str = unit, begin: str = begin) -> float:
                    value, client = begin + unit * (size // len(unit)), smtpmock._ClientState()
                    start = time.process_time()
                    list(smtpmock._check_headers([(name, value)], client))
                    list(smtpmock._check_header_set({name.lower(): value}, client))
                    return time.process_time() - start

                with self.subTest(name, unit=unit):
                    self.assertTrue(any(measure(40_000) < max(24 * measure(5000), 0.1) for _ in range(3)))

    def test_what_a_violation_says(self) -> None:
        memory = Memory(*ENVELOPE, "DATA")
        memory.feed(b"From: a@example.com\r\n\r\nHello\n\r\n.\r\n")
        message = memory.message()
        first = message.violations[0]
        self.assertEqual(first, ("bare-lf", "a line ends in LF and not in CRLF", "5321 2.3.8", "error", "Hello"))
        self.assertEqual(str(first), "bare-lf: a line ends in LF and not in CRLF (RFC 5321 2.3.8): 'Hello'")
        self.assertEqual([found.code for found in message.violations], ["bare-lf", "header-missing"])
        self.assertEqual([found.code for found in message.warnings], ["no-message-id"])
        record = message.to_dict()
        self.assertEqual(record["violations"][0], first._asdict())
        self.assertEqual(record["warnings"], [message.warnings[0]._asdict()])
        self.assertEqual(pickle.loads(pickle.dumps(message)).violations, message.violations)
        message.violations.clear()
        self.assertEqual(len(message.violations), 2)

    def test_strict(self) -> None:
        mail, bare_lf, dot = self.MAIL % b"Hello", self.MAIL % b"Hello\n", self.MAIL % b".Hello"
        unknown = "550 5.6.0 unknown-command"  # but commands are answered as ever
        for options, commands, content, reply in (
            ({}, [], mail, RECEIVED),
            ({}, [], bare_lf, "550 5.6.0 bare-lf: a line ends in LF and not in CRLF (RFC 5321 2.3.8): 'Hello'"),
            ({}, [], dot, "550 5.6.0 unstuffed-dot: a dot at the start of a line is not doubled"),
            ({"tolerated": ["bare-lf"]}, [], bare_lf, RECEIVED),
            ({"msg_violation": "554 no"}, [], mail[10:], "554 no"),
            ({}, ["FOO" * 150 + "ä"], mail, unknown),
            ({}, ["FOO"], mail, unknown),
        ):
            with self.subTest(options, content=content):
                memory = Memory(*ENVELOPE, *commands, "DATA", strict=True, **dict[str, Any](options))
                (said,) = memory.feed(content)
                self.assertEqual((said[: len(reply)], len(said) < 512), (reply, True))
                self.assertEqual(memory.message().is_consistent, reply[0] == "2")

    def test_strict_looks_at_each_mail_alone(self) -> None:
        """So that a correct mail after a wrong one is accepted, and the time does not grow with each mail."""
        for several in (False, True):
            memory = Memory("EHLO a.com", strict=True, multiple_message_receiving=several)
            for sender, line, code in (("<a@a.com>", b"..", 250), ("<a@a.com>", b".a", 550), (" <a@a.com>", b"", 550)):
                memory.say(f"MAIL FROM:{sender}", "RCPT TO:<b@b.com>", "DATA")
                self.assertEqual(int(memory.feed(self.MAIL % line)[0][:3]), code)
            memory.say("EHLO a_b", "MAIL FROM:<a@a.com>", "HELO vm", "EHLO a.com", *ENVELOPE[1:], "DATA")
            self.assertEqual(memory.feed(self.MAIL % b"")[0][:3], "250")

    def test_of_all_messages(self) -> None:
        with Server(multiple_message_receiving=True) as server:
            send(server, "Subject: 1", "Subject: 2")
            server.wait_for_messages(2, TIMEOUT)
            self.assertEqual([found.code for found in server.violations()], ["header-missing"] * 4)

    def test_what_is_recorded_already_does_not_change(self) -> None:
        """Even if more comes before its reply is sent."""
        server, client, _ = self.serve("message: delay 0.2")
        for line in (*ENVELOPE, "DATA"):
            client.ask(line)
        client.send(b"hi\r\n.\r\n")
        (before,) = server.wait_for_messages(1, TIMEOUT)
        client.send(b"QUIT\r\n")
        client.read_all()
        (after,) = server.messages()
        self.assertNotIn("pipelining", list_codes([before]))
        self.assertIn("pipelining", list_codes([after]))

    def test_a_command_before_the_greeting(self) -> None:
        with Server() as server:
            server.on("connect").delay(0.1)
            with Client(server, greets=False) as client:
                client.send(b"EHLO a.example.com\r\n")
                self.assertEqual([client.read(), client.read()], ["220 Welcome", "250 Received"])
                client.ask("QUIT")
            self.assertEqual(list_codes(server.messages()), ["early-talker"])

    def test_of_a_truncated_dialogue_what_is_left_is_checked(self) -> None:
        memory = Memory("EHLO vm", "MAIL FROM:<ü@a.com> SMTPUTF8", "RCPT TO:<b@b.com>", extensions=["SMTPUTF8"])
        memory.say(*["FOO"] * 11000, "DATA", "From: ü@a.com", "", "hi", ".")
        message = memory.message()
        codes = ["hello-not-fqdn", "unknown-command", "header-missing", "no-message-id"]
        self.assertEqual(list_codes([message]), codes)
        self.assertIn("C: <truncated>", message.transcript)

    def test_a_mail_with_so_many_recipients_that_the_dialogue_is_truncated(self) -> None:
        for header, code in ((b"", "250"), (b"Bcc: c@c.com\r\n", "550")):
            memory = Memory(*ENVELOPE[:2], *ENVELOPE[2:] * 10_100, "DATA", strict=True, multiple_rcptto=True)
            self.assertEqual(memory.feed(header + self.MAIL % b"hi")[0][:3], code)
            self.assertEqual("bcc-disclosed" in list_codes([memory.message()]), bool(header))

    def test_large_ones(self) -> None:
        """They raise nothing and take time that is linear in their size, or this would last for minutes."""
        nested = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (i, i) for i in range(250))
        for content in (
            nested,
            b"".join(b"X-%d: =?utf-8?q?x?=\r\n" % i for i in range(10_000)),
            b"Content-Type: text/plain" + b"; a=b" * 100_000,
            b"Subject: " + b"=?a?q?" * 100_000,
            b"\r\n" + b"=\n" * 250_000,
        ):
            memory = Memory(*ENVELOPE, "DATA")
            memory.feed(content + b"\r\n.\r\n")
            message = memory.message()
            self.assertTrue(message.violations + message.warnings, content[:40])


# ---------------------------------------------------------------------------------------- messages

# What a session says, and what its messages then keep: in the form of summarize(), and with + between messages.
# HELLO, MAIL, RCPT, DATA, SEND, and BDAT for a mail in chunks, stand for what is kept of these.
RECORDS = read_table(r"""
== one message, one recipient
HELLO | SEND | QUIT => HELLO | SEND | quit
nonsense =>
HELLO | SEND | HELO b.com => HELO b.com 250
HELLO | SEND | RSET | NOOP | HELLO => HELLO
HELLO | SEND | MAIL => HELLO | MAIL
HELLO | NOOP | RSET | NOOP | MAIL => HELLO | MAIL
HELLO | SEND | RCPT TO:<c@c.com> => HELLO | MAIL | RCPT TO:<c@c.com> 250
HELLO | SEND | RCPT TO:<bad> => HELLO | MAIL | RCPT TO:<bad> 501
HELLO | SEND | NOOP | DATA | new | . => HELLO | MAIL | RCPT | DATA | new 250 | noop
HELLO | SEND | DATA x => HELLO | MAIL | RCPT | DATA x 502
HELLO | SEND | RSET => HELLO | RSET 250
HELLO | SEND | RSET x => HELLO | RSET x 502
HELLO | SEND | FOO | NOOPX => HELLO | SEND
HELLO | SEND | SEND => HELLO | SEND
HELLO | SEND | RSET | SEND | QUIT => HELLO | SEND | quit
HELLO | MAIL | RCPT | DATA | half => HELLO | MAIL | RCPT | DATA | half
== one message, several recipients  -- multiple_rcptto=True
HELLO | MAIL | RCPT | RCPT TO:<bad> | RCPT TO:<c@c.com>
    => HELLO | MAIL | RCPT | RCPT TO:<bad> 501 | RCPT TO:<c@c.com> 250
HELLO | SEND | RCPT TO:<c@c.com> => HELLO | MAIL | RCPT | RCPT TO:<c@c.com> 250 | DATA | hi 250
HELLO | MAIL | RCPT | MAIL | RCPT TO:<c@c.com> => HELLO | MAIL | RCPT TO:<c@c.com> 250
HELLO | SEND | SEND => HELLO | SEND
== several messages, one recipient  -- multiple_message_receiving=True
HELLO | SEND | SEND | QUIT => HELLO | SEND + HELLO | SEND | quit
HELLO | SEND | RSET | NOOP | QUIT => HELLO | SEND | RSET 250 | noop | quit
HELLO | SEND | EHLO => HELLO | SEND + EHLO 501
HELLO | SEND | FOO => HELLO | SEND + HELLO
HELLO | SEND | RCPT TO:<c@c.com> => HELLO | SEND + HELLO | RCPT TO:<c@c.com> 503
HELLO | SEND | MAIL | RSET | QUIT => HELLO | SEND + HELLO | MAIL | RSET 250 | quit
HELLO | MAIL | RSET x | NOOP | RSET | QUIT => HELLO | MAIL | RSET 250 | noop | quit
HELLO | MAIL | RCPT | MAIL | RCPT => HELLO | MAIL | RCPT + HELLO | MAIL | RCPT
HELLO | MAIL | RCPT | QUIT x | NOOP => HELLO | MAIL | RCPT | noop
HELLO | MAIL | RCPT | EHLO | HELLO | SEND => HELLO | MAIL | RCPT + HELLO | SEND
HELLO | MAIL | STARTTLS | SEND => HELLO | MAIL + HELLO | SEND
HELLO | MAIL FROM:bad | MAIL <bad> | SEND | RSET => HELLO | MAIL FROM:bad 501 + HELLO + HELLO | SEND | RSET 250
MAIL | HELLO | SEND => MAIL FROM:<a@a.com> 503 + HELLO | SEND
HELLO | SEND | NOOP | FOO | SEND => HELLO | SEND | noop + HELLO | SEND
HELLO | SEND | MAIL | RCPT | RCPT TO:<c@c.com> | DATA | hi | .
    => HELLO | SEND + HELLO | MAIL | RCPT TO:<c@c.com> 250 | DATA | hi 250
== several messages, several recipients  -- multiple_message_receiving=True, multiple_rcptto=True
HELLO | MAIL | RCPT | RCPT | DATA | hi | . | SEND => HELLO | MAIL | RCPT | RCPT | DATA | hi 250 + HELLO | SEND
== a refusal by a blacklist  -- blacklisted_mailfrom_emails=["a@a.com"]
HELLO | MAIL => HELLO | MAIL FROM:<a@a.com> 421
== a body that is too long is not kept  -- msg_size_limit=1
HELLO | SEND => HELLO | MAIL | RCPT | DATA | 552
== a body that is refused by its text is kept  -- msg_msg_received="451 no"
HELLO | SEND => HELLO | MAIL | RCPT | DATA | hi 451
== what rules made of a mail  -- rule: RCPT: reply 250 welcome  -- rule: message: reply 451 try later |
HELLO | MAIL | RCPT TO:<no body> | DATA | hi | . | NOOP => HELLO | MAIL | RCPT TO:<no body> 250 | DATA | hi 451 | noop
== greylisting  -- multiple_message_receiving=True  -- rule: RCPT: reply 450 later; times=2
HELLO | MAIL | RCPT | RSET | MAIL | RCPT | RSET | SEND => HELLO | MAIL | RCPT TO:<b@b.com> 450 | RSET 250 +
    HELLO | MAIL | RCPT TO:<b@b.com> 450 | RSET 250 + HELLO | SEND
== a body that a rule refuses ends its mail, which stays  -- multiple_message_receiving=True
-- rule: message: reply 552 no; times=1
HELLO | SEND | RSET | SEND | NOOP => HELLO | MAIL | RCPT | DATA | hi 552 | RSET 250 + HELLO | SEND | noop
== chunks  -- extensions=["CHUNKING"]
HELLO | MAIL | RCPT | BDAT 4 | hi | BDAT 0 LAST => HELLO | MAIL | RCPT | BDAT 0 LAST 250 | hi 250
HELLO | MAIL | RCPT | BDAT 4 | hi | RSET | MAIL | RCPT | BDAT 0 LAST => HELLO | MAIL | RCPT | BDAT 0 LAST 250 | 250
HELLO | MAIL | RCPT | BDAT 4 | hi | HELLO | MAIL | RCPT | DATA | new | . => HELLO | MAIL | RCPT | DATA | new 250
HELLO | MAIL | RCPT | BDAT 4 | hi | MAIL | RCPT | DATA | new | . => HELLO | MAIL | RCPT | DATA | new 250
BDAT 100 LAST | half => BDAT 100 LAST | half
HELLO | MAIL | RCPT | BDAT 4 | hi | BDAT 10 LAST | half => HELLO | MAIL | RCPT | BDAT 4 250 | hihalf
== chunks of several mails  -- extensions=["CHUNKING"], multiple_message_receiving=True
HELLO | MAIL | RCPT | BDAT 4 LAST | hi | MAIL | RCPT | BDAT 4 LAST | hi => HELLO | BDAT + HELLO | BDAT
HELLO | MAIL | RCPT | BDAT 4 | hi | RSET | SEND => HELLO | MAIL | RCPT | BDAT 4 250 | hi | RSET 250 + HELLO | SEND
""")
KEPT = {"HELLO": "EHLO a.com 250", "MAIL": f"{ENVELOPE[1]} 250", "RCPT": f"{ENVELOPE[2]} 250", "DATA": "DATA 354"}
KEPT["SEND"] = " | ".join([KEPT["MAIL"], KEPT["RCPT"], "DATA 354 | hi 250"])
KEPT["BDAT"] = " | ".join([KEPT["MAIL"], KEPT["RCPT"], "BDAT 4 LAST 250 | hi 250"])

# What a session says, and some attributes of its last message, as Python's keyword arguments.
FACTS = read_table(r"""
== each attribute
HELLO | SEND | NOOP | QUIT => helo_request="EHLO a.com", helo_response="250 Received", helo=True, esmtp=True
HELLO | SEND => mailfrom_request="MAIL FROM:<a@a.com>", mailfrom_response="250 Received", mailfrom=True
HELLO | SEND => mail_from="a@a.com", mailfrom_parameters={}, rcptto=True, rcpt_tos=["b@b.com"]
HELLO | SEND => rcptto_request_response=[("RCPT TO:<b@b.com>", "250 Received")]
HELLO | SEND => data_request="DATA", data_response="{READY}", data=True
HELLO | SEND => content=b"hi\r\n", msg_request="hi\r\n", msg_response="250 Received", msg=True
HELLO | SEND => rset_request="", rset_response="", rset=False, noop=False, quit_sent=False, is_consistent=True
HELLO | SEND | NOOP | QUIT => noop=True, quit_sent=True, id=1, peer=("192.0.2.1", 4321)
HELLO | SEND => auth_request="", auth_response="", auth=False, auth_user=None, auth_mechanism=None, tls=None
nonsense => helo=False, mail_from=None, rcpt_tos=[], content=b"", msg_request="", auth_user=None, is_consistent=False
HELLO | SEND | RSET => id=1, received_at=None
HELLO | SEND | RSET | SEND => id=2, is_consistent=True
== each message has an id  -- multiple_message_receiving=True
HELLO | SEND | NOOP | SEND | RSET | MAIL FROM:nobody => id=3
== requests and senders
R:Ehlo\ta.com\r\n => helo_request="Ehlo\ta.com"
R: EHLO a.com \r\r\n => helo_request="EHLO a.com"
R:HELO \xff\r\n => helo_request="HELO \udcff"
HELLO | MAIL FROM:<> => mail_from="", is_consistent=False
HELLO | MAIL FROM: John <j@x.com> => mail_from="j@x.com"
HELLO | MAIL FROM:j => mail_from=None
HELLO | MAIL | RCPT TO:nobody => received_at=None, received_header=""
HELO a.com | SEND => esmtp=False
HELLO | MAIL | RCPT | DATA | R:half\r\n..a => content=b"half\r\n.a", msg=False
== what only a rule accepted is taken apart  -- extensions=["SIZE"]
-- rule: MAIL: reply 250 ok
-- rule: RCPT: reply 250 ok
HELLO | MAIL FROM:<John> SIZE=10 => mail_from="John", mailfrom_parameters={"SIZE": "10"}
HELLO | MAIL | RCPT TO:<Jim Doe> X=1 Y => rcpt_tos=["Jim Doe"], rcptto_parameters=[{"X": "1", "Y": ""}]
== parameters  -- extensions=["SIZE", "SMTPUTF8", "DSN"], multiple_rcptto=True
HELLO | MAIL FROM:<a@a.com> SIZE=5 smtputf8 => mail_from="a@a.com", mailfrom_parameters={"SIZE": "5", "SMTPUTF8": ""}
HELLO | MAIL FROM:"a b"@a.com SIZE=3 => mail_from='"a b"@a.com', mailfrom_parameters={"SIZE": "3"}
HELLO | MAIL | RCPT TO:<b@b.com> NOTIFY=NEVER | RCPT => rcptto_parameters=[{"NOTIFY": "NEVER"}, {}]
== consistent though a recipient was refused  -- multiple_rcptto=True
HELLO | MAIL | RCPT TO:<bad> | RCPT | DATA | hi | . => is_consistent=True
== a greeting that refuses  -- msg_greeting="554 no"  -- rule: EHLO: reply 250 ok  -- rule: MAIL a@a.com: reply 250 a
HELLO | MAIL | RCPT => helo=True, mail_from="a@a.com", rcptto=False
== inconsistent by the sender  -- rule: RCPT: reply 250 ok  -- rule: DATA: reply 354 go  -- rule: MAIL: reply 550 no
HELLO | SEND => is_consistent=False, data=True
== inconsistent by the recipient  -- rule: DATA: reply 354 go  -- rule: RCPT: reply 550 no
HELLO | SEND => is_consistent=False, data=True
== inconsistent by the body  -- rule: message: reply 550 no
HELLO | SEND => is_consistent=False, data=True, refusals=[("<4 bytes>", "550 no")]
== refusals are those of each attempt  -- multiple_message_receiving=True  -- rule: RCPT: reply 450 later; times=2
HELLO | MAIL | RCPT | RSET | MAIL | RCPT => id=2, refusals=[("RCPT TO:<b@b.com>", "450 later")]
== a mail that was taken, and then a close  -- rule: message: reply 250 got it; close
HELLO | SEND => is_consistent=True, msg_response="250 got it", id=1
== logins  -- auth_users={"alice": "sécret", "bob": ""}
HELLO | auth plain {b64 \0alice\0sécret} => auth=True, auth_user="alice", auth_request="auth plain ***"
HELLO | AUTH PLAIN | {b64 \0alice\0sécret} => auth=True, auth_user="alice", auth_mechanism="PLAIN"
HELLO | AUTH LOGIN | {b64 alice} | {b64 sécret} => auth=True, auth_user="alice", auth_request="AUTH LOGIN"
HELLO | AUTH XOAUTH2 {b64 user=alice\1auth=Bearer sécret\1\1} => auth=True, auth_user="alice", auth_mechanism="XOAUTH2"
HELLO | AUTH XOAUTH2 {b64 user=bob\1auth=Bearer wrong\1\1} | * => auth=False, auth_user="bob", auth_mechanism="XOAUTH2"
HELLO | AUTH LOGIN {b64 alice} | {b64 sécret} => auth_mechanism="LOGIN", auth_response="235 Authentication succeeded"
HELLO | AUTH PLAIN {b64 \0mallory\0guess} => auth_user="mallory", auth_response="535 Authentication credentials invalid"
HELLO | AUTH PLAIN {b64 \0bob\0} | AUTH LOGIN | HELLO | SEND => auth=True, auth_user="bob"
== a login of several mails  -- auth_users={"bob": ""}, multiple_message_receiving=True
HELLO | AUTH PLAIN {b64 \0bob\0} | SEND | SEND => id=2, auth_user="bob", auth_request="AUTH PLAIN ***"
== any login  -- auth_users="*"
HELLO | AUTH PLAIN {b64 \0bob\0x} => auth=True, auth_user="bob"
HELLO | AUTH LOGIN | {b64 bob} | {b64 x} => auth=True, auth_user="bob"
HELLO | AUTH CRAM-MD5 | {b64 bob 0123} => auth=True, auth_user="bob"
HELLO | AUTH XOAUTH2 {b64 user=bob\1auth=Bearer x\1\1} => auth=True, auth_user="bob"
HELLO | AUTH PLAIN x => auth=False, auth_response="501 Cannot decode response"
HELLO | AUTH PLAIN {b64 bob} => auth=False, auth_response="501 Cannot decode response"
""")


def summarize(message: Message) -> str:
    """What a message keeps: each request, or the body, with the code of its response; NOOP and QUIT."""
    steps = [
        (message.helo_request, message.helo_response, message.helo),
        (message.mailfrom_request, message.mailfrom_response, message.mailfrom),
        *((request, response, response[:1] == "2") for request, response in message.rcptto_request_response),
        (message.data_request, message.data_response, message.data),
        (message.msg_request.replace("\r\n", ""), message.msg_response, message.msg),
        (message.rset_request, message.rset_response, message.rset),
    ]
    assert all(accepted == (response[:1] in ("2", "3")) for _, response, accepted in steps), steps
    kept = [f"{request} {response[:3]}".strip() for request, response, _ in steps]
    return " | ".join([*filter(None, kept), *["noop"] * message.noop, *["quit"] * message.quit_sent])


def keep(text: str) -> str:
    """A summary in which the short forms are written out."""
    return " | ".join(KEPT.get(item, item) for item in read_items(text))


def ids(messages: Iterable[Message]) -> list[int]:
    return [message.id for message in messages]


def receive_mail(**options: Any) -> Memory:
    """A session that has sent a mail."""
    return Memory(ENVELOPE[0], *SEND, **options)


class RecordTest(unittest.TestCase):
    """What a message keeps, and what erases it."""

    maxDiff = None

    def test_records(self) -> None:
        for title, entry in RECORDS.items():
            for row in entry.rows:
                with self.subTest(title, given=row.given):
                    memory = Memory(**entry.options)
                    memory.feed(*read_pieces(row.given))
                    memory.end()
                    expected = list(map(keep, row.expected.split(" + ")))
                    self.assertEqual(list(map(summarize, memory.messages())), expected)

    def test_facts(self) -> None:
        for title, entry in FACTS.items():
            for row in entry.rows:
                memory = Memory(**entry.options)
                memory.greet()
                memory.feed(*read_pieces(row.given))
                with self.subTest(title, given=row.given):
                    message, expected = memory.message(), read_options(row.expected)
                    self.assertEqual({name: getattr(message, name) for name in expected}, expected)
                    self.assertNotRegex(str(message.to_dict()), "sécret|c8OpY3JldA")

    def test_the_body_is_kept_as_it_is(self) -> None:
        for body in b"|\r\n|\n\r\x00\xff\r\n|no header\r\n|.\n\r\n|..\r\n.a\r\n|\r\n\r\n.\r.\r\n".split(b"|"):
            with self.subTest(body=body):
                memory = Memory(*ENVELOPE, "DATA")
                memory.feed(re.sub(rb"(^|(?<=\r\n))\.", b"..", body) + b".\r\n")
                message = memory.message()
                self.assertEqual((message.content, message.is_consistent), (body, True))
                self.assertEqual(message.msg_request.encode("utf-8", "surrogateescape"), body)

    def test_what_was_handed_out_does_not_change(self) -> None:
        memory = receive_mail(multiple_rcptto=True)
        (message,) = memory.messages()
        message.rcpt_tos.append("mine")
        message.rcptto_request_response.clear()
        memory.say("RCPT TO:<c@c.com>", "QUIT")
        self.assertEqual(summarize(message), keep("HELLO | SEND"))
        self.assertEqual(message.transcript.splitlines()[-1], f"S: {RECEIVED}")
        (changed,) = memory.messages()
        self.assertEqual((changed.rcpt_tos, changed.quit_sent), (["b@b.com", "c@c.com"], True))
        with self.assertRaisesRegex(AttributeError, "read-only: helo"):
            message.helo = False

    def test_recorded_with_the_reply_that_completes_it(self) -> None:
        for lines in ([*ENVELOPE, *SEND[2:]], ["EHLO a.com", "QUIT"]):
            self.assertEqual(Memory(*lines).recorded[-2:], [0, 1])

    def test_after_a_purge(self) -> None:
        """What is not new does not come again, and what is new comes when it is complete; the dialogue is the same."""
        new = [keep("HELLO | MAIL | RCPT | DATA | new 250")]
        for lines, replies, before, after in (
            (["RSET", "NOOP", "QUIT"], 4, [], []),
            (["DATA", "new", "."], 2, new, new),
            (["NOOP", *SEND[:3]], 4, [], [keep("HELLO | MAIL | RCPT | DATA")]),
        ):
            memory = receive_mail()
            (purged,) = memory.messages(purge=True)
            self.assertEqual(len(memory.say(*lines)), replies)
            self.assertEqual(list(map(summarize, memory.messages())), before)
            memory.end()
            self.assertEqual(list(map(summarize, memory.messages())), after)
            self.assertNotIn(purged.id, ids(memory.messages()))

    def test_a_purge_at_any_moment_loses_nothing(self) -> None:
        """The second mail of a session, and a purge in the middle of each of its commands."""
        lines = [*SEND[:3], "new\r\n.", "NOOP", "QUIT"]
        for moment, line in enumerate(lines):
            memory, purged = receive_mail(), list[Message]()
            memory.say(*lines[:moment])
            rule = memory.on("*")(lambda *_, memory=memory, to=purged: to.extend(memory.messages(purge=True)))
            memory.say(line)
            rule.remove()
            memory.say(*lines[moment + 1 :])
            bodies = [message.content for message in (*purged, *memory.messages())]
            self.assertEqual((len(purged), bodies.count(b"new\r\n")), (1, 1), f"purged at {line}")

    def test_repr(self) -> None:
        memory = receive_mail()
        self.assertEqual(repr(memory.messages()[0]), "<Message 1 from 'a@a.com' to ['b@b.com']: 4 bytes, accepted>")
        memory.say("RCPT TO:<nobody>", "QUIT")
        end = "not accepted, 'RCPT TO:<nobody>' was refused with '501 RCPT TO requires valid email address'"
        self.assertEqual(repr(memory.messages()[0]), f"<Message 1 from 'a@a.com' to []: 0 bytes, {end}>")
        memory = Memory("NOOP", rules=["NOOP: drop"])
        self.assertEqual(repr(memory.message()), "<Message 1 from None to []: 0 bytes, no reply>")

    def test_a_body_is_one_line_of_a_transcript(self) -> None:
        for lines, end in (
            ("DATA | hi | .. | .", f"S: {READY} | C: <8 bytes> | S: {RECEIVED}"),
            ("DATA | hi", f"S: {READY} | C: <4 bytes>"),
            ("BDAT 4 LAST | hi | BDAT 4 | hi | BDAT 10 LAST | half", "C: BDAT 10 LAST | C: <10 bytes>"),
            ("BDAT 4 LAST | hi", "C: BDAT 4 LAST | C: <4 bytes> | S: 250 Received"),
        ):
            transcript = Memory(*ENVELOPE, *read_items(lines), extensions=["CHUNKING"]).message().transcript
            self.assertTrue(transcript.endswith("\n".join(read_items(end))), transcript)

    def test_the_transcript_of_each_mail_of_a_session(self) -> None:
        memory = Memory(multiple_message_receiving=True)
        memory.greet()
        memory.say("NOOP", "EHLO a.com", *SEND, "RSET", "MAIL FROM:nobody")
        for _ in range(30):
            memory.feed(b"NOOP\r\n" * 1000)
        memory.say(*SEND, "QUIT")
        first, abandoned, second = (message.transcript.splitlines() for message in memory.messages())
        hello = ["C: EHLO a.com", f"S: {RECEIVED}"]
        start = ["S: 220 Welcome", *hello]
        self.assertEqual(first[:5], ["S: 220 Welcome", "C: NOOP", "S: 250 Ok", *hello])
        self.assertEqual(first[-2:], ["C: RSET", "S: 250 Ok"])
        self.assertEqual(abandoned[:5], ["S: 220 Welcome", "C: <truncated>", *hello, "C: MAIL FROM:nobody"])
        self.assertLess(len(abandoned), 30000)
        self.assertEqual((second[:4], second[-1]), ([*start, f"C: {SEND[0]}"], "S: <closed>"))


class ExchangeTest(unittest.TestCase):
    """What a message covers, and what it says of each exchange."""

    def test_requests_and_responses(self) -> None:
        memory = Memory(auth_users={"bob": "pw"}, extensions=["CHUNKING"])
        memory.greet()
        memory.say("FOO", "EHLO a.com", "AUTH LOGIN", b64("bob"), b64("pw"), *SEND[:2], "BDAT 4 LAST", "hi", "QUIT")
        (message,) = memory.messages()
        expected = [
            (None, "220 Welcome", True),
            ("FOO", UNRECOGNIZED, False),
            ("EHLO a.com", "250-Received\n250-CHUNKING\n250 AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2", True),
            ("AUTH LOGIN", "334 VXNlcm5hbWU6", True),
            ("***", "334 UGFzc3dvcmQ6", True),
            ("***", "235 Authentication succeeded", True),
            *((line, RECEIVED, True) for line in SEND[:2]),
            ("BDAT 4 LAST", None, True),
            ("<4 bytes>", RECEIVED, True),
            ("QUIT", "221 Closing connection", True),
        ]
        self.assertEqual([said[:3] for said in message.exchanges], expected)

    def test_times(self) -> None:
        """Of the read that a request came with."""
        memory = Memory(multiple_message_receiving=True)
        memory.greet()
        for seconds, data in ((1, "\r\n".join([*ENVELOPE, ""])), (0.5, "DATA\r\nhi\r\n"), (1, ".\r\n")):
            memory.clock += seconds
            memory.feed(data.encode())
        memory.clock += 1
        memory.end("421 bye")
        (message,) = memory.messages()
        base = message.exchanges[0].at
        self.assertEqual(base.isoformat(), "2020-09-13T12:26:40.250000+00:00")
        times = [(said.at - base).total_seconds() for said in message.exchanges]
        self.assertEqual(times, [0, 1, 1, 1, 1.5, 2.5, 3.5])
        self.assertEqual(message.received_at, message.exchanges[-2].at)
        shown = {"request": None, "response": "421 bye", "accepted": False, "at": "2020-09-13T12:26:43.750000+00:00"}
        self.assertEqual(message.to_dict()["exchanges"][-1], shown)

    def test_what_is_in_force_stays_in_its_order(self) -> None:
        memory = Memory(auth_users={"bob": "pw"}, multiple_message_receiving=True)
        memory.greet()
        wrong, right = (f"AUTH PLAIN {b64(chr(0).join(['', 'bob', secret]))}" for secret in ("", "pw"))
        memory.say("EHLO a.com", wrong, "EHLO a.com", right, "EHLO b.com", *SEND, *SEND)
        requests = [said.request for said in memory.messages()[-1].exchanges]
        self.assertEqual(requests[:4], [None, "AUTH PLAIN ***", "EHLO b.com", SEND[0]])

    def test_the_clock_of_a_server(self) -> None:
        with Server() as server, Client(server) as client:
            before = datetime.datetime.now(datetime.timezone.utc)
            client.ask("NOOP", "QUIT")
            after = datetime.datetime.now(datetime.timezone.utc)
            at = [said.at for said in server.messages()[0].exchanges]
            self.assertEqual(at, sorted(at))
            slack = datetime.timedelta(seconds=1)  # the clock of the system may be set meanwhile
            self.assertTrue(before - slack <= at[-1] <= after + slack)

    def test_each_mail_covers_what_came_since_the_one_before(self) -> None:
        start = ["S: 220 Welcome", "C: EHLO a.com", f"S: {RECEIVED}"]
        for several, noted in ((False, ["C: RSET", "S: 250 Ok", "C: NOOP", "S: 250 Ok"]), (True, [])):
            with self.subTest(several=several):
                seen: list[Message] = []
                memory = Memory(multiple_message_receiving=several, on_message=seen.append)
                memory.greet()
                memory.say(ENVELOPE[0], *SEND, "RSET", "NOOP", *SEND * 100)
                _, second, *others = [message.transcript.splitlines() for message in seen]
                self.assertEqual(second[: 4 + len(noted)], [*start, *noted, f"C: {SEND[0]}"])
                self.assertEqual(others[0][:4], [*start, f"C: {SEND[0]}"])
                self.assertEqual(others, others[:1] * 99)

    def test_abandoned_mails_are_recorded_before_the_reply(self) -> None:
        accepted, others = list[Message](), list[Message]()
        options: dict[str, Any] = {"on_message": accepted.append, "on_unaccepted": others.append}
        options["multiple_message_receiving"] = True
        for line in ("RSET", "RSET x", "QUIT", "QUIT x", "STARTTLS", "MAIL", "HELO b.com", "EHLO", "ehlo b.com"):
            with self.subTest(line):
                others.clear()
                memory = Memory(*ENVELOPE, line, **options)
                self.assertEqual(memory.recorded[-2:], [0, 1])
                self.assertEqual([message.rcpt_tos for message in others], [["b@b.com"]])
                is_noted = line[:4] in ("RSET", "QUIT")
                self.assertEqual(f"C: {line}" in memory.messages()[0].transcript.splitlines(), is_noted)
        for line in ("NOOP", "FOO", "AUTH PLAIN", "RCPT TO:<c@c.com>", "VRFY a"):
            self.assertEqual(len(Memory(*ENVELOPE, line, **options).messages()), 0, line)
        self.assertEqual(accepted, [])

    def test_of_many_attempts_the_oldest_are_kept_as_refusals(self) -> None:
        memory = Memory(rules=["RCPT: reply 450 later"])
        memory.greet()
        memory.say(ENVELOPE[0], *[*SEND[:2], "RSET"] * 250)
        message = memory.message()
        self.assertEqual(message.refusals, [(SEND[1], "450 later")] * 250)
        lines = message.transcript.splitlines()
        self.assertEqual(lines[0], "S: 220 Welcome")
        self.assertEqual(lines.count(f"C: {SEND[0]}"), 100)
        begin = lines.index("C: <truncated>")
        self.assertEqual(len({said.at for said in message.exchanges}), 1)
        self.assertEqual(lines[begin + 1 : begin + 4], ["C: EHLO a.com", f"S: {RECEIVED}", f"C: {SEND[0]}"])
        self.assertNotIn("bad-sequence", list_codes([message]))

    def test_a_record_is_limited_in_bytes(self) -> None:
        memory = Memory(auth_users={})
        memory.greet()
        memory.say(ENVELOPE[0], *["x" * 12000] * 2000)
        self.assertLess(len(memory.message().transcript), 5_000_000)

    def test_a_mail_that_is_erased_after_its_end_was_truncated(self) -> None:
        memory = Memory(ENVELOPE[0], *SEND, *["NOOP"] * 11000, *SEND)
        self.assertEqual(memory.message().content, b"hi\r\n")

    def test_strict_without_mail(self) -> None:
        """Which only rules can accept."""
        memory = Memory(rules=["*: reply 354 go"], strict=True)
        memory.say("DATA", "Date: Fri, 21 Nov 1997 09:55:06 -0600", "From: a@example.com", "", "hi", ".")
        codes = list_codes([memory.message()])
        self.assertEqual(len(codes), len(set(codes)))

    def test_a_secret_after_a_greeting_that_refuses(self) -> None:
        handlers = [make_handler("XKEY", has_secret=True)]
        memory = Memory("AUTH PLAIN c2VjcmV0", "XKEY c2VjcmV0", msg_greeting="554 no", auth_users={}, handlers=handlers)
        self.assertNotIn("c2VjcmV0", memory.message().transcript)

    def test_rules_look_at_the_line(self) -> None:
        seen: list[str] = []
        memory = Memory(*ENVELOPE[:1], auth_users={}, extensions=["CHUNKING"])
        rule = memory.on("*", seen.append)
        memory.on("MAIL", "bob@example.com").reply("450 bob")
        self.assertEqual(memory.say("MAIL <bob@example.com>"), ["450 bob"])
        memory.say("AUTH OAUTHBEARER c2VjcmV0", "AUTH c2VjcmV0", "AUTH PLAIN", "*", *SEND[:2], "BDAT 4 LAST", "hi")
        lines = ["AUTH OAUTHBEARER ***", "AUTH ***", "AUTH PLAIN", "AUTH PLAIN", *SEND[:2], "BDAT 4 LAST"]
        self.assertEqual(seen, ["MAIL <bob@example.com>", *lines])
        rule.remove()
        chunk = Memory(*ENVELOPE, extensions=["CHUNKING"], rules=["BDAT: reply 452 no"])
        chunk.on("BDAT", re.compile("LAST$")).reply("451 last")
        chunk.on("message", re.compile("hi")).delay(3)
        self.assertEqual(chunk.say("BDAT 4 LAST", "hi"), ["451 last"])
        self.assertEqual(chunk.delays[-1], 3)

    def test_no_secret_is_kept_out_of_sight(self) -> None:
        for options, lines in (
            ({}, ["AUTH LOGIN", "S3CRET"]),
            ({}, ["AUTH=S3CRET"]),
            ({"rules": ["FOO: reply 250 ok"]}, ["AUTH LOGIN", "S3CRET more"]),
            ({"auth_users": {}}, ["AUTH s3Cret", "AUTH PLAIN", "S3CRET"]),
            ({"handlers": [make_handler("XKEY", has_secret=True, parse=staticmethod(str))]}, ["XKEY S3CRET"]),
        ):
            memory = Memory(ENVELOPE[0], *lines, **dict[str, Any](options))
            self.assertNotIn(b"S3CRET", pickle.dumps(memory.message()).upper(), lines)
        memory = Memory(
            "AUTH LOGIN", "FOO", "AUTH LOGIN", "MAIL a@a.com", rules=["FOO: reply 250 f", "MAIL: reply 250 m"]
        )
        self.assertEqual([reply for _, reply, *_ in memory.message().exchanges][1::2], ["250 f", "250 m"])

    def test_a_pickle_has_what_the_message_has(self) -> None:
        memory = Memory(ENVELOPE[0], *SEND, handlers=[make_handler("XFOO", parse=re.compile("(x*)").fullmatch)])
        (message,) = memory.messages()
        memory.say("XFOO xxx", "NOOP later", "RCPT TO:<later@b.com>")
        self.assertNotIn(b"later", pickle.dumps(message))
        self.assertEqual(pickle.loads(pickle.dumps(memory.message())).to_dict(), memory.message().to_dict())

    def test_a_refused_login_is_not_in_the_mails_after_it(self) -> None:
        memory = Memory(ENVELOPE[0], auth_users={}, multiple_message_receiving=True)
        memory.say(f"AUTH PLAIN {b64(chr(0) + 'u' + chr(0))}", *SEND, *SEND)
        self.assertEqual([len(message.refusals) for message in memory.messages()], [1, 0])
        self.assertEqual([message.auth_user for message in memory.messages()], ["u", None])

    def test_a_match_that_fails_during_a_login(self) -> None:
        memory = Memory(ENVELOPE[0], auth_users={"bob": "pw"})
        memory.on("AUTH", lambda line: 1 / 0).reply("535 no")
        replies = memory.say("AUTH LOGIN", "MAIL FROM:<a@a.com>")
        self.assertEqual([reply[:3] for reply in replies], ["451", "250"])
        self.assertIn("C: AUTH LOGIN\nS: 451 Local", memory.message().transcript)

    def test_chunks_without_an_end_belong_to_what_a_quit_records(self) -> None:
        memory = Memory(*ENVELOPE, extensions=["CHUNKING"])
        memory.feed(b"BDAT 3\r\nabcQUIT\r\n")
        (before,) = memory.messages()
        memory.end()
        self.assertEqual(before.to_dict(), memory.messages()[0].to_dict())
        self.assertEqual(before.content, b"abc")
        self.assertTrue(before.transcript.endswith("C: <3 bytes>\nC: QUIT\nS: 221 Closing connection\nS: <closed>"))

    def test_what_came_early(self) -> None:
        """It stays so if on_message fails, and in each mail that has the same HELO."""
        for on_message in (lambda message: None, lambda message: 1 / 0):
            memory = Memory(*ENVELOPE, "DATA", on_message=on_message)
            memory.feed(b"hi\r\n.\r\nQUIT\r\n")
            self.assertIn("pipelining", list_codes(memory.messages()))
        memory = Memory(multiple_message_receiving=True)
        memory.feed(b"EHLO a.com \r\nMAIL FROM:<a@a.com>\r\n")
        memory.say(*SEND[1:], *SEND)
        for message in memory.messages():
            self.assertLessEqual({"command-space", "pipelining"}, set(list_codes([message])))

    def test_what_is_no_discarded_mail_or_recipient(self) -> None:
        interrupted = Memory(*ENVELOPE, "DATA", rules=["message: reply 250 fine; after=3"])
        interrupted.say("hello hello")
        other = Memory(*ENVELOPE, "RCPTINFO b", *SEND[2:], handlers=[make_handler("RCPTINFO", parse=staticmethod(str))])
        for memory in (interrupted, other):
            self.assertEqual(Memory.discards(memory.message()), [])
        self.assertFalse(interrupted.message().msg)
        self.assertEqual(len(Memory.discards(Memory(ENVELOPE[0], *SEND, *SEND).message())), 1)


# -------------------------------------------------------------------------------------------- mail

PUBLIC = [name for name in dir(Message) if not name.startswith("_")] + ["id", "peer"]

# A value of Subject, and what is shown of it; the first two are written by Python's own `email`.
SUBJECTS = r"""
\r\n {x*100}                                               => {x*100}
\r\n =?utf-8?q?G?=\r\n =?utf-8?q?r=C3=BC=C3=9Fe?=          => Grüße
=?utf-8?B?TcO8bg==?=\r\n =?utf-8?B?Y2hlbg==?= and =?utf-8?Q?more?= => München and more
=?utf-8?B?TcM=?= =?utf-8?B?vG5jaGVu?=                      => München
=?utf-8?B?w7x4?==?utf-8?B?w7w?=                            => üxü
=?iso-8859-1?Q?=FC?= =?utf-8?Q?=C3=BC?= =?iso-8859-1*de?q?_=FC?= => üü ü
(=?utf-8?Q?=C3=BC?=) x=?utf-8?Q?=C3=BC?=y                  => (ü) xüy
=?utf-8?Q?a b?= =?utf-8?q?c=3F?= =?UTF-8?b?dw==?=          => a bc?w
=?utf-8?X?a?= =?utf-8?Q?a?= 100%?=                         => =?utf-8?X?a?= a 100%?=
a\r\n\tb\r\n   c                                           => a\tb   c
a\rb \xff Grüße                                            => a b \ufffd Grüße
=?iso-8859-8-i?B?+ezl7Q==?= =?klingon?Q?=C3=BC?=           => שלוםü
=?gb2312?B?xOO6w+lG?= =?unicode-escape?q?a=5Cd?=           => 你好镕a\\d
"""

# The header of a part, and the name of its file.
FILE_NAMES = r"""
Content-Disposition: attachment; filename="a.pdf"; filename*=utf-8''%c3%a4.pdf                  => ä.pdf
Content-Disposition: attachment; filename*=utf-8''a%20b.pdf ; size=3; filename=c.pdf            => a b.pdf
Content-Disposition: attachment; filename*0*=utf-8''%c3; filename*1*=%a4; filename*2=".pdf"     => ä.pdf
Content-Disposition: attachment; filename*1=b.pdf; filename*0=a                                 => ab.pdf
Content-Disposition: attachment; filename*=gb2312''%C4%E3.pdf                                   => 你.pdf
Content-Disposition: attachment; filename*=a\0''%c3%a4                                          => ä
Content-Disposition: attachment; filename*=undefined'a'b'c                                      => b'c
Content-Disposition: attachment; filename*=b.pdf                                                => b.pdf
Content-Disposition: attachment; filename==?utf-8?B?w6QucGRm?=                                  => ä.pdf
Content-Disposition: attachment; filename="=?utf-8?Q?=C3=A4_?=\r\n =?utf-8?Q?=C3=B6.pdf?="      => ä ö.pdf
Content-Disposition: attachment; filename=my file (1).pdf; size=1                               => my file (1).pdf
Content-Disposition: attachment; filename=report(1).pdf                                         => report(1).pdf
Content-Disposition: attachment; filename=a.pdf (final)                                         => a.pdf
Content-Disposition: attachment; filename=C:\\docs\\a.pdf                                       => C:\\docs\\a.pdf
Content-Disposition: attachment; filename="a \\"b\\" (c); d.pdf"                                => a "b" (c); d.pdf
Content-Disposition: attachment; filename="unclosed.pdf                                         => unclosed.pdf
Content-Disposition: attachment; filename="ä.pdf"                                               => ä.pdf
Content-Disposition: attachment (one) ; (two; a=b) FileName = "c d.pdf" (more)                  => c d.pdf
Content-Disposition: attachment; {x=y; *400}filename=a.pdf                                      => a.pdf
Content-Disposition: attachment; filename*=utf-7''+2AA-x; boundary*=utf-7''+2AA-                => \ufffdx
Content-Type: application/pdf; name*=iso-8859-1'de'%e4.pdf                                      => ä.pdf
Content-Type: application/pdf; name="=?utf-8?B?w6QucGRm?="                                      => ä.pdf
Content-Type: application/pdf; name=b.pdf\r\nContent-Disposition: attachment; filename=a.pdf        => a.pdf
Content-Type: application/pdf; name==?iso-8859-1?Q?=E4.pdf?=                                    => ä.pdf
Content-Type: application/pdf; name*0*="utf-8''a"; name*="utf-8''b"; {x=y; *400}                => a
"""

# What comes after Content-Type: text/plain, then the body, and the text.
BODIES = r"""
; charset=utf-8\r\nContent-Transfer-Encoding: base64\x20            | aGVsbG8=           => hello
; charset=utf-8\r\nContent-Transfer-Encoding: BASE64 (all of it)    | aGVsbG8=           => hello
\r\nContent-Transfer-Encoding:\r\n base64                           | aGVs!bG8           => hello
\r\nContent-Transfer-Encoding: base64                               | aGVsbG8=\r\naGVsbG8= => hellohello
\r\nContent-Transfer-Encoding: (a) quoted-printable                 | a \r\nb=20\r\nc= \r\nd=ZZ =c3=bc => a\nb \ncd=ZZ ü
\r\nContent-Transfer-Encoding: x-uuencode                           | begin 644 a\r\n%:&5L;&\\ \r\n`\r\nend => hello
\r\nContent-Transfer-Encoding: x-uuencode                           | begin 644 a\r\nM\x80\xff\r\nend => begin 644 a\nM\ufffd\ufffd\nend
\r\nContent-Transfer-Encoding: 7bit                                 | begin 644 a\r\n%:&5L;&\\ \r\n`\r\nend => begin 644 a\n%:&5L;&\\ \n`\nend
(plain words; a=b); charset=iso-8859-1                              | \xfc               => ü
; charset=iso-8859-1 (Latin)                                        | \xfc               => ü
\x20; CHARSET = "ISO-8859-1"                                        | \xfc               => ü
\r\nContent-Transfer-Encoding: base64                               | aGVsb              => hel
; charset='iso-8859-1'                                              | \xfc               => ü
; charset=iso-8859-8-i                                              | \xf9\xec\xe5\xed   => שלום
; charset=ISO-8859-8-E                                              | \xf9\xec\xe5\xed   => שלום
; charset=iso-8859-6-i                                              | \xc7               => ا
; charset=Windows-31J                                               | \x82\xb1\x87@      => こ①
; charset=x-sjis                                                    | \x82\xb1\x87@      => こ①
; charset=shift_jis                                                 | \x82\xb1\x87@      => こ①
; charset=windows-874                                               | \xa1               => ก
; charset=IBM00858                                                  | \xd5               => €
; charset=ks_c_5601-1987                                            | \xc7\xd1\xb1\xb9\x81A => 한국갂
; charset=gb2312                                                    | \xc4\xe3\xba\xc3\xe9F => 你好镕
; charset=big5                                                      | \xa4\xa4\xf9\xd6   => 中碁
; charset=iso-2022-jp                                               | \x1b$B$3-!\x1b(B ok => こ① ok
; charset=iso-2022-jp                                               | \x1b$B$3\x1b(I1\x1b(B => こｱ
; charset=iso-2022-jp                                               | \x1b$B$3\x7f\x7f$s\x1b(B => こ\ufffdん
; charset=utf-8                                                     | Gr\xc3\xbc\xff\xc3\x9fe => Grü\ufffdße
; charset=iso-8859-1                                                | \x93\xfc\x94\x81   => “ü”\ufffd
; charset=us-ascii                                                  | ü\xff              => ü\ufffd
; charset=utf-7                                                     | +APw-x             => üx
; charset=utf-7                                                     | +2AA-x             => \ufffdx
; charset=utf-8                                                     | \xef\xbb\xbfx   => x
; charset=x-ms-cp932                                                | \x87@             => ①
; charset=klingon                                                   | Qapla\xff          => Qapla\ufffd
; charset=punycode                                                  | a-z9               => a-z9
; charset=unicode_escape                                            | \\d                => \\d
; charset=idna                                                      | a\xff              => a\ufffd
; charset=zlib                                                      | x                  => x
; charset*=a\0''x; {x=y; *400}                                      | x                  => x
"""

# Mails, with the escapes of Python where an item begins with R:, what a good mail reader shows of them, and the codes
# of what is wrong with their structure.
READINGS = read_rows(r"""
# By mutt, PHP, Thunderbird and Outlook; a delivery report; one that was cut off
DATE | From: =?utf-8?Q?J=C3=B6rg?= <joerg@example.org> | To: b@example.com |
    Subject: =?utf-8?B?R3LDvMOfZSBhdXMgS8O2bG4sIG1pdCBlaW5lbSBsYW5nZW4gQmV0cmVmZg==?= |
    R:\t=?utf-8?Q?_=E2=80=93_der_zweite_Teil?=\r\n | MIME | Content-Type: text/plain; charset=utf-8 |
    Content-Disposition: inline | CTE: 8bit | | Schöne Grüße
    => subject="Grüße aus Köln, mit einem langen Betreff – der zweite Teil", text="Schöne Grüße"  -- is_right=True
Subject: =?iso-8859-1?Q?Bestellung_best=E4tigt?= | Content-Type: text/plain; charset=iso-8859-1 | CTE: 8bit | |
    R:Sie zahlen 5 \xa3 f\xfcr alles.\r\n
    => subject="Bestellung bestätigt", text="Sie zahlen 5 £ für alles.", attachments=[]  -- is_right=True
Content-Type: multipart/mixed; boundary="------------A0" | Subject: Rechnung | MIME | |
    This is a multi-part message in MIME format. | --------------A0 | Content-Type: multipart/alternative; |
    {SP}boundary="------------B1" | | --------------B1 | Content-Type: text/plain; charset=UTF-8; format=flowed |
    CTE: base64 | | SGFsbMO2Y2hlbiE= | --------------B1 | Content-Type: multipart/related; boundary="------------C2" | |
    --------------C2 | Content-Type: text/html; charset=UTF-8 | CTE: quoted-printable | |
    <img src=3D"cid:1">Hall=C3=B6chen! | --------------C2 | Content-Type: image/gif | Content-ID: <1> | CTE: base64 | |
    R0lGODlhAQABAAAAACw= | --------------C2-- | --------------B1-- | --------------A0 |
    Content-Type: application/pdf; name="=?UTF-8?B?UmVjaG51bmcgZsO8ciBKw7ZyZy5wZGY=?=" |
    Content-Disposition: attachment; filename*0*=UTF-8''Rechnung%20f%C3%BCr%20J%C3%B6; | {SP}filename*1*=rg.pdf |
    CTE: base64 | | JVBERi0xLjQK | --------------A0 | Content-Type: text/plain; charset=UTF-8; name="notes.txt" |
    Content-Disposition: attachment; filename="notes.txt" | CTE: quoted-printable | | 5 =E2=82=AC | --------------A0--
    => subject="Rechnung", text="Hallöchen!", html='<img src="cid:1">Hallöchen!', attachments=[
    (None, "image/gif", b"GIF89a\1\0\1\0\0\0\0,"), ("Rechnung für Jörg.pdf", "application/pdf", b"%PDF-1.4\n"),
    ("notes.txt", "text/plain", b"5 \xe2\x82\xac")]  -- is_right=True
Subject: FW: report | Content-Type: multipart/mixed; boundary=XX | | --XX |
    Content-Type: text/html; charset="iso-8859-1" | CTE: quoted-printable | | <p>Sch=F6n, = | bis sp=E4ter =3D)</p> |
    --XX | Content-Type: application/octet-stream; name="=?iso-8859-1?Q?Ber=EDcht.bin?=" |
    Content-Disposition: attachment; filename="=?iso-8859-1?Q?Ber=EDcht.bin?=" | CTE: base64 | | AP8B | --XX |
    Content-Type: message/rfc822 | | Subject: report | Content-Type: text/plain | | the first | --XX--
    => text=None, html="<p>Schön, bis später =)</p>", attachments=[
    ("Berícht.bin", "application/octet-stream", b"\0\xff\1"),
    (None, "message/rfc822", b"Subject: report\r\nContent-Type: text/plain\r\n\r\nthe first")]
Content-Type: multipart/report; boundary=b | | --b | Content-Type: message/delivery-status | |
    Reporting-MTA: dns; a.com | | Final-Recipient: rfc822; b | Action:failed | | --b-- => attachments=[(None,
    "message/delivery-status", b"Reporting-MTA: dns; a.com\r\n\r\nFinal-Recipient: rfc822; b\r\nAction:failed\r\n"
    )]  -- is_right=True
MIXED | | --x | | first | --x | Content-Type: image/png | | PNG
    => text="first", attachments=[(None, "image/png", b"PNG")], codes="bad-boundary"  -- is_right=True
# Headers
=> subject=None, text=None, html=None, attachments=[]
Hello | | Bye => subject=None, text="Hello\n\nBye", html=None, attachments=[], codes="header-syntax"
Subject: hi => subject="hi", text=""
R:Subject: \xff\xfe\r\n\r\n\0\1\xfc\r\n€\r\n => text="\0\1\ufffd\n€", html=None
From: @ | To: < | Cc: " | Sender: . <x | Message-ID: <>'> | Content-Type: ; | Subject: hi | | body
    => subject="hi", text="body", codes="bad-content-type"
X-Long: {word *20000} | Subject: long | | body => subject="long", text="body"
From: =?utf-8?B?TcO8bg==?= |  =?utf-8?B?Y2hlbg==?= <a@example.com> |
    To: =?utf-8?Q?Doe=2C?= =?utf-8?Q?_J=C3=B6?= <b@example.com>, <c@c.com> | | hi
    => headers={"From": "München <a@example.com>", "To": '"Doe, Jö" <b@example.com>, c@c.com'}
X-Foo: |  a |  b | | hi => headers={"X-Foo": "a b"}
# Mails within the mail
Content-Type: message/rfc822; name=f.eml | CTE: base64 | | {b64 Subject: in\r\n\r\nhello\r\n}
    => attachments=[("f.eml", "message/rfc822", b"Subject: in\r\n\r\nhello\r\n")], codes="bad-encoding"
MIXED | | --x | | hi | --x | Content-Type: message/rfc822 | Content-Disposition: attachment; filename=f.eml | |
    Subject:  two blanks | X-Empty: | X-Close:none | | inner | --x-- => text="hi", attachments=[
    ("f.eml", "message/rfc822", b"Subject:  two blanks\r\nX-Empty:\r\nX-Close:none\r\n\r\ninner")]
Content-Type: multipart/digest; boundary=x | | --x | | Subject: one | | first | --x--
    => text=None, attachments=[(None, "message/rfc822", b"Subject: one\r\n\r\nfirst")]
# Parts with a name
Content-Type: text/html; charset=utf-8; name=page.html | | <p>hi => html="<p>hi\n", attachments=[]
Content-Type: text/plain | Content-Disposition: inline; filename=body.txt | | hi => text="hi", attachments=[]
Content-Type: text/plain (plain words) | Content-Disposition: attachment; filename=body.txt | | hi
    => text=None, attachments=[("body.txt", "text/plain", b"hi\r\n")]
MIXED | | --x | | hi | --x | Content-Type: text/plain; name=notes.txt | | notes | --x--
    => text="hi", attachments=[("notes.txt", "text/plain", b"notes")]
# Boundaries
Content-Type: multipart/mixed; boundary=----=_Part_1_22.33 | | ------=_Part_1_22.33 | | hi | ------=_Part_1_22.33 |
    Content-Type: image/png; name=a.png | | X | ------=_Part_1_22.33--
    => text="hi", attachments=[("a.png", "image/png", b"X")], codes="bad-content-type"
Content-Type: multipart/mixed; boundary="ä " | | --ä {SP} | | hi | x --ä | --ä-- {SP} | not shown => text="hi\nx --ä",
    codes="bad-boundary"
MIXED | | --x | | -- | --x | Content-Type: image/png | | <p> | --x--
    => text="--", attachments=[(None, "image/png", b"<p>")]
MIXED | | --x | Content-Type: multipart/alternative; boundary=xx | | --xx | | hi | --xx | Content-Type: text/html | |
    <p> | --xx-- | --x-- => text="hi", html="<p>", codes="bad-boundary"
MIXED | | --x | Content-Type: multipart/alternative; boundary=c | | --c | | hi | --x |
    Content-Type: image/png; name=a.png | | X | --x--
    => text="hi", attachments=[("a.png", "image/png", b"X")], codes="bad-boundary"
Content-Type: multipart/mixed | | --b | | hi | --b-- => text="--b\n\nhi\n--b--", codes="bad-boundary"
Content-Type: multipart/mixed; boundary=never | | --other | | hi
    => text="--other\n\nhi", attachments=[], defects=["StartBoundaryNotFoundDefect"], codes="bad-boundary"
# Bad lines in a header
X-NoColon | Subject: later | | hi => subject="later", text="hi", codes="header-syntax"
Subject: first | this is none |  Subject: nor this | | hi => subject="first", text="hi", codes="header-syntax"
MIXED | | --x | Content-Type: text/plain; charset=iso-8859-1 | From the beginning | CTE: quoted-printable | | =FC |
    --x-- => text="ü", defects=["MissingHeaderBodySeparatorDefect"], codes="header-syntax"
Subject : hi | Content-Type : text/html | | <p> => subject="hi", html="<p>\n", codes="header-syntax"
Content-Type: text; charset=iso-8859-1 | CTE: quoted-printable | | =FC => text="ü", codes="bad-content-type"
R:\r\nSubject: hi\r\n => subject=None, text="Subject: hi"
R: x\r\nSubject: hi\r\n => subject=None, text=" x\nSubject: hi", codes="header-syntax"
""")

# Of what a header or a mail may be full: what is repeated in the values of the headers, and mails, in which it is
# between braces.
REPEATED = r"""
x =?utf-8?q?a?=\r\n\x20 =?utf-8?q?a?= =? =?a?q? =?x?q?a?=\x20=?y?b?b?=\x20 \x20 \r\n\x20 \xff a\x20b\x20 a@b.com,\r\n\x20
( ) (a) ((a)) " "a"\x20 < <a@ @ x@ , a. : ; ;a=b ;a*0=b ;a*=%ff ;(a;b=c ;name==?utf-8?q?a?= ;a*1*1 = \\ "\\ ' % [ \r
"""
REPEATED_IN = """Subject: To: Bcc: X-Foo: Date: Message-ID:< References: MIME-Version:1.0 Content-Type:text/plain;name=
Content-Disposition:attachment;filename*=utf-8''a Content-Transfer-Encoding:8bit"""
FULL_MAILS = r"""
Subject{ *}x: a
{x*}
{bad line\r\n*}Subject: x\r\n\r\n
Subject:{\r\n *}x
{To: a\r\n*}
Content-Type: text/plain; charset=punycode\r\n\r\na-{z9*}
Content-Type: text/plain; charset=iso-2022-jp\r\n\r\n{\x1b$B*}
Content-Type: text/plain; charset=utf-7\r\n\r\n{+AG8-*}
Content-Type: text/plain; charset=gb2312\r\n\r\n{\xff*}
Content-Transfer-Encoding: base64\r\n\r\n{YQ==*}
Content-Transfer-Encoding: quoted-printable\r\n\r\n{= *}
Content-Transfer-Encoding: quoted-printable\r\n\r\n{ *}x
Content-Transfer-Encoding: x-uuencode\r\n\r\nbegin 644 a\r\n{M\xff\r\n*}
Content-Type: multipart/mixed; boundary=b\r\n\r\n{--b\r\na: b\r\n\r\nthe text of a small part\r\n*}
Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n{--b*}
Content-Type: multipart/mixed; boundary=b\r\n\r\n--b{ *}x
Content-Type: multipart/mixed; boundary=--\r\n\r\n----\r\n{-*}
Content-Type: multipart/mixed; boundary={b*}\r\n\r\n--b\r\n
{Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n*}
{Content-Type: message/rfc822\r\n\r\n*}
Content-Type: message/delivery-status\r\n\r\n{a: of a report\r\n\r\n*}
"""

# What the mails of make_mail() consist of, with Python's escapes.
MAIL_HEADERS = r"""
Subject From To Bcc Date Message-ID References MIME-Version Content-ID Resent-To X-Foo Subject\x20 \xff Content-Type
Content-Type Content-Type Content-Transfer-Encoding Content-Transfer-Encoding Content-Disposition Content-Disposition
"""
MAIL_VALUES = r"""
text/plain text/html multipart/mixed multipart/digest message/rfc822 message/delivery-status application/pdf attachment
inline base64 quoted-printable 8bit x-uuencode ; ; ; = " ' ( ) < > @ , : \\ * % %ff ? =? ?= \x20 \x20 \r\n\x20 \t a\0 \xff
=?utf-8?q?=C3=BC?= =?utf-8?B?w7w=?= =?gb2312?b?xOM?= =?undefined?q?x?= =?x?Q?=?= charset= charset*= name= name*=
name*0= name*0*= name*1*= filename= filename*= filename*0*=utf-8''%c3 filename*1*=%bc boundary=b boundary="c"
boundary=----=_b utf-8 us-ascii iso-8859-8-i gb2312 iso-2022-jp shift_jis utf-7 utf-16 punycode idna undefined
unicode_escape zlib rot13 1997 Fri, <a@b.com>
"""
MAIL_LINES = r"""
hi --b --b-- --c --c-- ------=_b ------=_b-- = =C3=BC w7w= \xff begin\x20644\x20a M\xff end \0 \x1b$B a:\x20b \x20 \r
"""
STRUCTURES = """multipart/mixed;boundary=b multipart/alternative;boundary=c multipart/digest;boundary=----=_b message/rfc822
message/delivery-status text/plain;charset="""


def make_mail(rng: random.Random, depth: int = 0) -> bytes:
    """A mail whose headers, encodings and boundaries are a mixture of right and wrong ones."""
    headers, values, lines = (list(map(read_escapes, text.split())) for text in (MAIL_HEADERS, MAIL_VALUES, MAIL_LINES))
    parts = []
    for _ in range(rng.randrange(9)):
        value = b"".join(rng.choices(values, k=rng.randrange(9)))
        value += rng.choice(values) * rng.randrange(2000) if rng.random() < 0.02 else b""
        parts.append(rng.choice(headers) + rng.choice([b": ", b":", b":\r\n ", b""]) + value)
    if rng.random() < 0.7:
        parts.append(b"Content-Type: " + rng.choice(STRUCTURES.split()).encode() + rng.choice(values))
    parts.append(rng.choice([b"", b"", b"", b"x"]))
    for _ in range(rng.randrange(8)):
        is_inner = depth < 4 and rng.random() < 0.3
        parts += [rng.choice(lines), make_mail(rng, depth + 1)] if is_inner else [rng.choice(lines)]
    return rng.choice([b"\r\n", b"\r\n", b"\r\n", b"\n"]).join(parts)


def receive_content(content: bytes, *recipients: str, helo: str = "EHLO client.example.com") -> Message:
    memory = Memory(multiple_rcptto=True)
    memory.say(helo, ENVELOPE[1], *(f"RCPT TO:<{name}>" for name in recipients or ["b@b.com"]), "DATA")
    memory.feed(content.replace(b"\r\n.", b"\r\n..") + b".\r\n")
    return memory.message()


def ask_all(message: Message) -> None:
    """Each attribute has a value."""
    for name in dir(message):
        getattr(message, name)
    message.as_bytes()
    json.dumps(message.to_dict()).encode("ascii")
    repr(message)


def list_readings() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """The title of a mail, the mail, and the attributes that it must have."""

    def rows(text: str) -> Iterator[tuple[str, bytes, str]]:
        for row in map(read_line, text.strip("\n").split("\n")):
            written, shown = (part.strip() for part in row.split(" => "))
            yield row, read_escapes(written), shown.encode("raw_unicode_escape").decode("unicode_escape")

    for title, value, subject in rows(SUBJECTS):
        yield title, b"Subject: " + value + b"\r\n\r\nhi\r\n", {"subject": subject}
    for title, header, name in rows(FILE_NAMES):
        start = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n"
        kind = b"" if header.startswith(b"Content-Type") else b"Content-Type: application/pdf\r\n"
        attachments = [(name, "application/pdf", b"X")]
        yield title, start + kind + header + b"\r\n\r\nX\r\n--b--\r\n", {"attachments": attachments, "text": None}
    for title, mail, text in rows(BODIES):
        header, body = (part.strip(b" ") for part in mail.split(b" | "))
        yield title, b"Content-Type: text/plain" + header + b"\r\n\r\n" + body + b"\r\n", {"text": text}
    for given, shown, _ in READINGS:
        yield " | ".join(given), b"".join(read_pieces(given)), {"codes": "", **read_options(shown)}


def fill_mail(text: str, size: int) -> bytes:
    """A mail of about that size, of FULL_MAILS, or with all headers full of what is in REPEATED."""
    if "{" in text:
        start, unit, end = map(read_escapes, re.split(r"\{(.+)\*\}", text))
        return start + unit * (size // len(unit)) + end + b"\r\n"
    unit, names = read_escapes(text), REPEATED_IN.encode().split()
    return b"".join(name + unit * (size // len(names) // len(unit)) + b"\r\n" for name in names) + b"\r\nhi\r\n"


def call_deep(depth: int, function: Callable[[], object]) -> None:
    """Call the function with that many more frames on the stack."""
    call_deep(depth - 1, function) if depth else function()


class MailTest(unittest.TestCase):
    """A message as a mail: its header, its parts, and what a server adds to it."""

    maxDiff = None

    def test_trace(self) -> None:
        message = receive_content(b"Subject: hi\r\n\r\nbody\r\n")
        received = "Received: from client.example.com ([192.0.2.1])\n\tby smtpmock with ESMTP id 1\n\tfor <b@b.com>;"
        trace = f"Return-Path: <a@a.com>\n{received}\n\tSun, 13 Sep 2020 12:26:40 +0000\n"
        self.assertEqual(message.as_bytes().decode().replace("\r\n", "\n"), f"{trace}Subject: hi\n\nbody\n")
        self.assertEqual(message.email["Received"].defects, ())
        self.assertEqual(message.received_at, datetime.datetime(2020, 9, 13, 12, 26, 40, 250000, datetime.timezone.utc))

    def test_trace_of_others(self) -> None:
        several = receive_content(b"", "b@b.com", "c@c.com", helo="HELO пример.рф")
        self.assertRegex(several.received_header, r"\AReceived: from \[192.0.2.1\] .*\r\n.* with SMTP id 1;\r\n")
        for recipient in ("Postmaster", "дядя@пример.рф"):
            self.assertNotIn("for", receive_content(b"", recipient).received_header)
        memory = receive_mail(peer=("fe80::1%eth0", 25))
        self.assertIn("from a.com ([IPv6:fe80::1])\r\n", memory.message().received_header)
        lines = (*ENVELOPE[:2], "RCPT TO:nobody")
        self.assertEqual(Memory(*lines).message().as_bytes(), b"Return-Path: <a@a.com>\r\n")
        self.assertEqual(Memory(*lines, "HELO").message().as_bytes(), b"")

    def test_one_that_only_rules_accepted(self) -> None:
        for lines in (SEND, ("HELO", *SEND), ("HELO a b\rc", *SEND), ("MAIL x", "MAIL FROM:<a\rX: y>", *SEND[1:])):
            message = Memory(*lines, rules=["*: reply 250 ok", "DATA: reply 354 go"]).message()
            with self.subTest(lines):
                self.assertTrue(message.is_consistent)
                ask_all(message)
                self.assertIn("Received: from [192.0.2.1] ([192.0.2.1])", message.received_header)
                self.assertNotIn(b"\r", message.as_bytes().replace(b"\r\n", b""))

    def test_copies(self) -> None:
        message = Memory(ENVELOPE[0], "MAIL FROM:<a@a.com> SIZE=5", *SEND[1:], extensions=["SIZE"]).message()
        ask_all(message)
        for same in (pickle.loads(pickle.dumps(message)), copy.deepcopy(message)):
            self.assertEqual(same.to_dict(), message.to_dict())
        self.assertIs(message.email, message.email)  # computed once
        message.attachments.append(smtpmock.Attachment("mine", "text/plain", b""))
        self.assertEqual(message.attachments, [])
        with self.assertRaisesRegex(AttributeError, "read-only: email"):
            setattr(message, "email", None)  # noqa: B010 - mypy knows better

    def test_to_dict(self) -> None:
        memory = Memory("EHLO \udcff", *ENVELOPE, "DATA", "Subject: =?utf-8?q?=E2=82=AC?=", "", "\udce9", ".")
        message = memory.message()
        values = json.loads(json.dumps(message.to_dict()))
        self.assertEqual(set(PUBLIC) - {"as_bytes", "to_dict", "email", "msg_request"} - set(values), set())
        self.assertEqual([name for name in values if name.startswith("_")], [])
        self.assertEqual(base64.b64decode(values["content"]), message.content)
        self.assertEqual((values["headers"][-1], values["transcript"][:13]), (["Subject", "€"], r"C: EHLO \udcff"[:13]))
        expected = {
            "content_encoding": "base64", "subject": "€", "received_at": "2020-09-13T12:26:40.250000+00:00",
            "peer": ["192.0.2.1", 4321], "rcptto_request_response": [["RCPT TO:<b@b.com>", RECEIVED]],
        }  # fmt: skip
        self.assertEqual({name: values[name] for name in expected}, expected)
        self.assertEqual([*values["exchanges"][0]], ["request", "response", "accepted", "at"])
        text = receive_content(b"Subject: hi\r\n\r\n\xc3\xa9\r\n").to_dict()
        self.assertEqual((text["content"], text["content_encoding"]), ("Subject: hi\r\n\r\né\r\n", "utf-8"))

    def test_copies_while_another_thread_parses_it(self) -> None:
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        original = Memory(*ENVELOPE, "DATA", "Subject: hi", "", "body", ".").message()
        for _ in range(30):
            message = copy.copy(original)
            parser = threading.Thread(target=message.to_dict)
            parser.start()
            while parser.is_alive():
                self.assertEqual(copy.copy(message).content, original.content)
            parser.join()


class ReadingTest(unittest.TestCase):
    """What `subject`, `text`, `html`, `attachments` and `headers` show of a mail, whatever is in it."""

    maxDiff = None

    def test_what_is_shown(self) -> None:
        structure = {"bad-content-type", "bad-boundary", "header-syntax", "bad-encoding"}
        for title, content, expected in list_readings():
            with self.subTest(title):
                message = receive_content(content)
                values = message.to_dict()
                headers = dict(values["headers"])
                shown = {name: getattr(message, name) for name in expected if hasattr(message, name)}
                shown["text"] = message.text and message.text.rstrip("\n")
                shown["headers"] = {name: headers.get(name) for name in expected.get("headers", ())}
                shown["codes"] = " ".join({found.code for found in message.violations} & structure)
                shown["defects"] = [text.partition(":")[0] for text in values["defects"]]
                self.assertEqual({name: shown[name] for name in expected}, expected)
                self.assertEqual(headers.get("Subject"), message.subject)
                self.assertEqual(message.content, content)
                self.assertTrue(message.as_bytes().endswith(content))
                self.assertEqual(message.email["Return-Path"], "<a@a.com>")

    def test_a_charset_that_is_read_is_no_violation(self) -> None:
        right = "iso-8859-8-i ISO-8859-6-E Windows-31J x-sjis windows-874 IBM00858 ks_c_5601-1987 cswindows1252 latin-9"
        for charset in (*right.split(), "punycode", "klingon", "unicode_escape", "zlib"):
            for text, is_unknown in (("a", False), ("", False), ("=A0", charset not in right)):
                header = f"Content-Type: text/plain; charset={charset}\r\nContent-Transfer-Encoding: quoted-printable"
                message = receive_content(f"{header}\r\n\r\n{text}\r\n".encode())
                found = [violation.code for violation in Memory.findings(message)]
                with self.subTest(charset, text=text):
                    self.assertEqual("unknown-charset" in found, is_unknown)
                    self.assertTrue(text == "=A0" or "wrong-charset" not in found)

    def test_a_message_without_a_body(self) -> None:
        message = Memory(*ENVELOPE).message()
        self.assertEqual((message.subject, message.text, message.html, message.attachments), (None, None, None, []))

    def test_a_parsed_mail_whose_headers_cannot_be_parsed(self) -> None:
        for value in (b"x;" * 2000, b"; a*=\"b''\"", b";.*", b""):
            mail = receive_content(b"Content-Type: %b\r\nContent-Disposition: %b\r\n\r\n" % (value, value)).email
            with self.subTest(value):
                self.assertEqual((mail.get_content_type(), mail.is_attachment()), ("text/plain", False))
                self.assertEqual("cannot be parsed" in str(mail["Content-Disposition"].defects), value != b"")

    def test_a_name_of_two_words_in_the_parsed_mail(self) -> None:
        mail = receive_content(b"From: =?utf-8?B?TcO8bg==?= =?utf-8?B?Y2hlbg==?= <a@a.com>\r\n\r\n").email
        self.assertEqual(mail["From"].addresses[0].display_name, "München")

    def test_the_parsed_mail_is_what_the_parser_of_python_makes_of_it(self) -> None:
        def show(part: Any) -> list[Any]:
            inner = [show(part) for part in part.get_payload()] if part.is_multipart() else part.get_payload()
            return [part.get_content_type(), list(part.raw_items()), part.preamble, part.epilogue, inner]

        for row in (row for row in READINGS if row.options.get("is_right")):
            message = receive_content(b"".join(read_pieces(row.given)))
            theirs = email.message_from_bytes(message.as_bytes(), policy=email.policy.default)
            with self.subTest(row.given):
                self.assertEqual(show(message.email), show(theirs))
                self.assertEqual(message.email.as_bytes(), theirs.as_bytes(policy=message.email.policy))

    def test_the_subject_alone_is_read_from_the_header_alone(self) -> None:
        message = receive_content(b"Subject: hi\r\n\r\n" + b"x" * 1000)
        with mock.patch.object(smtpmock, "_parse_part", side_effect=AssertionError):
            self.assertEqual(message.subject, "hi")

    def test_no_mail_makes_an_attribute_raise(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in range(200):
                message = receive_content(make_mail(random.Random(seed)) + b"\r\n")
                with self.subTest(seed):
                    call_deep(seed % 2 * 500, functools.partial(ask_all, message))

    def test_deep_parts_deep_in_the_stack(self) -> None:
        for part, defects in (
            ("message/rfc822\r\n\r\n", "[]"),
            ("multipart/mixed; boundary=b{0}\r\n\r\n--b{0}\r\n", "too deeply"),
        ):
            content = "".join(f"Content-Type: {part.format(number)}" for number in range(700))
            message = receive_content(content.encode())
            with self.subTest(part):
                call_deep(700, functools.partial(ask_all, message))
                self.assertIn(defects, str(message.to_dict()["defects"]))

    def test_no_mail_takes_more_than_linear_time(self) -> None:
        for text in (*REPEATED.split(), *FULL_MAILS.strip().split("\n")):
            with self.subTest(text):
                self.assertTrue(any(self.is_linear(text) for _ in range(5)))  # the machine may be busy

    def is_linear(self, text: str) -> bool:
        """Double the size takes at most 2.5 times as long, or no time worth mentioning."""
        times = []
        for size in (400_000, 200_000, 100_000):
            message = receive_content(fill_mail(text, size))
            before = time.process_time()
            ask_all(message)
            times.append(time.process_time() - before)
            if times[0] < 0.03:
                return True
        return all(twice <= 2.5 * once + 0.02 for twice, once in itertools.pairwise(times))


# ----------------------------------------------------------------------------------------- grammar

# What * can be in a command, and the code of the reply, or for a recipient what is kept of it; = is what was given.
# What is accepted with lenient_addresses is refused without that option.
ARGUMENTS = read_table("""
== EHLO *
example.com | EXAMPLE.COM | a-b.example.com | a--b.com | 1.example.com | 3f2a9c1b7d4e.com | x.co | localhost | myhost |
    skMac2-5 | 3f2a9c1b7d4e | a | пример.рф | उदाहरण.भारत | example.xn--p1ai | xn--80ak6aa92e.com | 1.2.3.4 |
    [1.2.3.4] | [IPv6:::1] | [ipv6:2001:db8::1] | [IPv6:::ffff:1.2.3.4] => 250
999.999.999.999 |  | a b | a\u3000b.com | 256.1.1.1 | 1.2.3 | [999.1.1.1] | 1.2.3.4] | [1.2.3.4 | [::1] | [IPv6:zz] |
    [IPv6:1.2.3.4] | name.zone42 | example.c | a..com | .com | a. | -a.com | a-.com | a.-b.com | user@host.com | 42 |
    4-2 | - | a_b.com | [] | [example.com] | example.com. | a.com/b | a\x00.com | a.c\udcffm => 501
== RCPT TO:*
user@example.com | <user@example.com> | user+tag@example.com | <o'brien@example.com> | a@localhost | <a@LocalHost> |
    user.name+tag!#$%@example.com | user/dept=x@example.com | <user@[1.2.3.4]> | <user@[IPv6:::1]> | "a"@x.com |
    <"a>b@c\\""@x.com> | <user@пример.рф> | дядя@пример.рф | a@xn--80ak6aa92e.com | {a}@x.com | <"John Doe"@x.com> |
    <PostMaster> => =
John Doe <john@x.com> | J. Doe<john@x.com> | {SP}<john@x.com> | Дядя <john@x.com> => john@x.com
# RFC 5321 section 4.1.1.3
<@a.com:b@x.com> | <@a.example,@b.example:b@x.com> => b@x.com
user | @ | user@ | @example.com | user@invalid | a@a.com@b.com | user@example..com | <user@example.com |
    user@example.com> | <<a@x.com>> | a@x.com>> | <a@x.com>> | <a@x.com>x | <a@x.com>,<b@x.com> | a..b@x.com |
    .a@x.com | a.@x.com | "a@x.com | a"@x.com | user@exa_mple.com | a@[1.2.3] | a@[x@y] | a@[IPv6:x] | a@1.2.3.4 |
    a@x.com. | a(b)@x.com | <> | < | ><a@x.com> | <@a.com> | <@:b@x.com> | a@-x.com | a\x00@x.com | PostMaster |
    "John Doe" <john@x.com> | john@y.com <john@x.com> | < john@x.com> | John <john@x.com> Doe | a b@x.com |  |
    a@x.com x | <a@x.com> x => 501
== MAIL FROM:<a@a.com> *  -- extensions=["SIZE", "8BITMIME", "SMTPUTF8", "DSN", "XFOO"]
SIZE=5 | size=10485760 | BODY=8BITMIME | Body=7bit | SMTPUTF8 | RET=HDRS | RET=full | XFOO | XFOO=1 | ENVID=a+3Db |
    SIZE=1 BODY=7BIT  SMTPUTF8 RET=FULL => 250
SIZE=x | SIZE | SIZE=-1 | BODY=9BIT | BODY | SMTPUTF8=1 | RET=ALL | ENVID=a=b | ENVID=+3 | XBAR | SIZE=1 SIZE=2 |
    NOTIFY=NEVER | AUTH=<> | = | SIZE=1 foo => 555
== MAIL FROM:* SIZE=3  -- extensions=["SIZE"]
<a@a.com> | a@a.com | John Doe <a@a.com> | <> | <"a> b"@a.com> | "a b"@a.com => 250
<a@a.com>SIZE=3 | <a@a.com | a => 501
== RCPT TO:* NOTIFY=NEVER  -- extensions=["DSN"]
<b@b.com> | <Postmaster> | <b@b.com> ORCPT=utf-8;a+2Bb => 250
<b@b.com> ORCPT=b@b.com | <b@b.com> SIZE=1 | <b@b.com> NOTIFY=DELAY | <b@b.com> NOTIFY= => 555
== RCPT TO:<b@b.com> NOTIFY=*  -- extensions=["DSN"]
DELAY | SUCCESS,DELAY,failure | DELAY ORCPT=rfc822;b@b.com => 250
NEVER,DELAY |  => 555

# ---- Names that are in use and that the grammar of SMTP does not have
== HELO *  -- lenient_addresses=True
123456789012 | web_1.proj_default | _x | a.com. => 250
a b |  | a..b | .a | a@b | [1.2.3] | a\u0080 => 501
== RCPT TO:<*>  -- lenient_addresses=True
root | root@web1 | a@srv_1.example.com | a@example.com. | "a b" | a@1234 | a.b@_ => =
a b |  | a@ | @a | a@b@c | a@b..c | a..b@c | a@[1.2.3] | a\u0080 | {a_*2000}!@ | a@{1_*1900}.. | {a.*2000}@ |
    "{a*4000} => 501
== RCPT TO: *  -- lenient_addresses=True
root | root@web1 | "a b" | a@1234 | <a@_> => =
Jo <root> => root
<root |  | root> | <> | root@ | "a => 501
""")

# Command lines in which the part in braces is repeated thousands of times.
HOSTILE = r"""
HELO {a*}_ | HELO {a-*} | HELO {a.*} | HELO {a.b-*}! | HELO {1*} | HELO {1-*}. | HELO {xn--a.*}1 | HELO [{1.*} |
HELO [IPv6:{:*}] | MAIL FROM:{a *} | MAIL FROM:{a*} | MAIL FROM:{a.*} | MAIL FROM:{a*}@ | MAIL FROM:{a@*} |
MAIL FROM:{<*} | MAIL FROM:{>*} | MAIL FROM:{=*} | MAIL FROM:a <{a.*}@x.com | MAIL FROM:{ *}<a@x.com |
MAIL FROM:{a *}<a@x.com> b | MAIL FROM:<a@{a-*}> | MAIL FROM:<a@{a.*}com!> | MAIL FROM:"{\\*} | MAIL FROM:{"*}@x.com |
MAIL FROM:"{a*}"@x | MAIL FROM:a@[{1.*} | MAIL FROM:<{a@*} | MAIL FROM:<{"*} | MAIL FROM:<{"\*} | MAIL FROM:<"{"\*} |
MAIL FROM:<"{ *} | MAIL FROM:<a@a.com> {a*} | MAIL FROM:<a@a.com> {"*} | MAIL FROM:<a@a.com> {SIZE=1 *} | { 	*}. |
a{ *}b
"""


class GrammarTest(unittest.TestCase):
    """What HELO, MAIL and RCPT take for their arguments."""

    def test_arguments(self) -> None:
        for command, entry in ARGUMENTS.items():
            for given, expected, _ in entry.rows:
                for argument in given:
                    line = command.replace("*", argument)
                    with self.subTest(line, **entry.options):
                        memory = Memory(*ENVELOPE[:2], **entry.options)
                        kept = re.sub("^<(.*)>$", r"\1", argument) if expected == "=" else expected
                        self.assertEqual(memory.say(line)[0][:3], kept if kept.isdigit() else "250")
                        if not kept.isdigit():
                            self.assertEqual(memory.message().rcpt_tos, [kept])
                        if "lenient_addresses" in entry.options:
                            self.assertIn("501", Memory(*ENVELOPE[:2]).say(line)[0])

    def test_hostile_lines_cost_what_their_length_does(self) -> None:
        """With a pattern that is quadratic in it, this would last for minutes."""
        for row in read_items(HOSTILE):
            unit = re.findall(r"\{(.*)\*\}", row)[0]
            line = read_line(row.replace("*}", f"*{100_000 // len(unit)}}}")).encode() + b"\r\n"
            for extensions in ((), ("SIZE",)):
                with self.subTest(row, extensions=extensions):
                    memory = Memory("EHLO a.com", line_limit=400_000, extensions=extensions)
                    began = time.thread_time()
                    memory.feed(line)
                    self.assertLess(time.thread_time() - began, 2)

    def test_lenient_addresses_with_parameters_lists_and_rules(self) -> None:
        options: dict[str, Any] = {"extensions": ["SIZE"], "blacklisted_rcptto_emails": ["root"]}
        memory = Memory("EHLO web_1", lenient_addresses=True, rules=["RCPT a_1.com: reply 450 later"], **options)
        replies = memory.say("MAIL FROM:root SIZE=5", "RCPT TO:<ROOT>", "RCPT TO:<b@a_1.com>", "RCPT TO:<Postmaster>")
        self.assertEqual(replies, [RECEIVED, "421 Service not available", "450 later", RECEIVED])
        message = memory.message()
        self.assertEqual((message.mail_from, message.mailfrom_parameters), ("root", {"SIZE": "5"}))
        self.assertTrue(message.as_bytes().startswith(b"Return-Path: <root>\r\n"))


# ----------------------------------------------------------------------------------- configuration

# Options that are refused, and their errors.
BAD_OPTIONS = read_rows("""
prot=25 => prot=25: there is no such option; did you mean port?
qqqqqqqq=None => qqqqqqqq=None: there is no such option
port=65536 => port=65536: must be an integer from 0 to 65535
port=-1 | port="25" | port=True | port=25.0 => port={MORE}: must be an integer from 0 to 65535
host=None => host=None: must be a host name or an address
msg_greeting="220 \\ud800" => msg_greeting={MORE}: must be a string without lone surrogates
fail_fast=1 => fail_fast=1: must be true or false
msg_size_limit=-1 => msg_size_limit=-1: must be an integer from 0 up
session_timeout=0 => session_timeout=0: must be a number of seconds from 0.001 to 1000000
response_delay_quit=-1 => response_delay_quit=-1: must be a number of seconds from 0 to {MORE}
shutdown_timeout=1e999 | shutdown_timeout=1e999-1e999 | shutdown_timeout=None => shutdown_timeout={MORE}: must be{MORE}
not_registered_emails="a@a.com" | not_registered_emails=[1] => not_registered_emails={MORE}: must be a list of strings
auth_users="a:b" | auth_users=["a"] | auth_users={"a": 1} | auth_users={1: "a"} | auth_users="**" =>
    auth_users: must be a mapping of users{MORE} or * for anybody
auth_required=True => auth_required=True: needs auth_users
auth_requires_tls=True | implicit_tls=True | tls_required=True => {MORE}=True: needs ssl_context
ssl_context=1 | ssl_context="tset" | ssl_context=ssl.create_default_context() => ssl_context={MORE}
    must be an ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) with a certificate, or 'test', 'expired' or 'wrong host'
auth_mechanisms=["PLAIN","plian"] => auth_mechanisms: 'plian' is unknown; did you mean PLAIN?
auth_mechanisms="PLAIN" => auth_mechanisms='PLAIN': must be a list of words
tolerated=["bare-fl"] => tolerated: 'bare-fl' is unknown; did you mean bare-lf?
extensions=["SIEZ"] => extensions: SIEZ is unknown; did you mean SIZE{MORE}
extensions=["STARTTLS"] => extensions: STARTTLS is announced with the option ssl_context
extensions=["auth"] => extensions: AUTH is announced with the option auth_users
""")

# Other calls that are refused, where vrfy() makes a Handler with these attributes, and server has a session.
BAD_CALLS = read_rows(r"""
Server(configuration="x") | configure(configuration="x") => configuration='x': must be a Configuration
Server(logger=object()) => logger={MORE}must be a logger with methods info(), warning() and error()
Server(on_message=1) => on_message=1: must be a function that is not async
Server(on_mesage=1) => on_mesage=1: there is no such option; did you mean on_message?
Server(handlers=1) => handlers=1: must be a list of subclasses of Handler
Server(handlers=[object]) | Server(handlers=[vrfy()(Configuration())]) => handlers{MORE} subclass of Handler
Server(handlers=[vrfy(verbs="VRFY")]) | Server(handlers=[vrfy(verbs=())]) => Vrfy.verbs{MORE}must be a tuple of {MORE}
Server(handlers=[vrfy(verbs=("V R",))]) => Vrfy.verbs{MORE}'V R' is no verb
Server(handlers=[vrfy(needs="helo")]) => Vrfy.needs{MORE}must be a tuple of strings, as{MORE}
Server(handlers=[vrfy(needs=("hello",))]) => Vrfy.needs{MORE}'hello' is no step of a session
Server(handlers=[vrfy(received="")]) => Vrfy.received{MORE}must be a text that begins with three digits, or an option
Server(handlers=[vrfy(received="msg_noop_recieved")]) => Vrfy.received{MORE}did you mean msg_noop_received{MORE}
Server(handlers=[vrfy(bad_argument="what?")]) => Vrfy.bad_argument{MORE}must be a text that begins with three digits{MORE}
Server(handlers=[vrfy(parse=None)]) => Vrfy.parse{MORE}must be a function{MORE}
server.wait_for_messages(-1) => count=-1: must be an integer from 0 up
server.wait_for_messages(1, -1) => timeout=-1: must be a number of seconds from 0 to 1000000
server.wait_for_messages(1, 1, "x") | server.wait_for_messages_and_purge(1, 1, "x") =>
    where='x': must be a function of a Message; timeout is the argument after it
server.disconnect(1) => reset=1: must be true or false
configure(host="::1") => host='::1': cannot be changed by configure(), only by Server()
configure(configuration=Configuration(port=1)) => port=1: cannot be changed by configure(), only by Server()
configure(fail_fsat=True) => fail_fsat=True: there is no such option; did you mean fail_fast?
server.on("") | server.on("MAIL TWICE") => stage={MORE}: must be connect, message, * or a verb{MORE}
server.on("RCTP") => stage='RCTP': {MORE}did you mean RCPT?
server.on("MAILFROM") => stage='MAILFROM': {MORE}did you mean MAIL?
server.on("BODY") | server.on("END") => stage={MORE}did you mean message?
server.on("MAIL", 1) => match=1: must be an address, a domain, a pattern of str or a function
server.on("MAIL", re.compile(b"x")) => match={MORE}: must be an address, a domain, a pattern of str or a function
server.on("RCPT", "") | server.on("RCPT", "bob@") => match={MORE}: no address or domain can be this{MORE}
server.on("RCPT", "<bob@b.com>") | server.on("RCPT", "Bob <bob@b.com>") => match={MORE}: did you mean 'bob@b.com'?
server.on("QUIT", "bob@example.com") => match={MORE}there is no address or domain at QUIT
server.on("connect", "example.com") => match={MORE}there is no address or domain at connect
server.on("RCPT", "@x.com") | server.on("RCPT", "*@x.com") => match={MORE}did you mean 'x.com'?
server.on("RCPT", r".*@example\.com") | server.on("RCPT", r"bob@x\.com") | server.on("RCPT", r"\w@x.com") |
    server.on("RCPT", "^bob@x.com") | server.on("RCPT", "bob@x.com$") =>
    match={MORE}did you mean re.compile({MORE}
server.on("MAIL", skip=-1) | server.on("MAIL", skip=None) => skip={MORE}: must be an integer from 0 up
server.on("MAIL", skpi=1) => skpi=1: on() has no such argument; did you mean skip?
server.on("MAIL", time=2) => time=2: on() has no such argument; did you mean times?
server.on("MAIL", q=2) => q=2: on() has no such argument; there are stage, match, skip, times, {MORE}
server.on("MAIL", times=0) => times=0: must be an integer from 1 up
server.on("MAIL", probability=2) => probability=2: must be a number from 0 to 1
server.on("MAIL", after=1) => after=1: is for the stage message, not for MAIL
server.on("message", after=-1) => after=-1: must be an integer from 0 up
server.on("MAIL").reply() => reply=(): must be a string such as '550 No', with one last line{MORE}
server.on("MAIL").reply(450) | server.on("MAIL").reply("\ud800") =>
    reply={MORE}: must be a string such as{MORE}
server.on("MAIL").delay(-1) => delay=-1: must be a number of seconds{MORE}
server.on("MAIL").trickle("x") => trickle='x': must be a number of seconds{MORE}
server.on("MAIL").raw("x") => raw='x': must be bytes
server.on("MAIL")(1) => rule=1: must be a function that is not async
Action(time=2) => time=2: there is no such option; there are reply, raw, delay, tri{MORE}
Action(then="closed") => then='closed': must be one of close, drop, reset, silence
""")
GOOD_CALLS = r"""
Server(extensions=["XSIZE", "FOO", "size 5"]) | server.on("VRFY") | server.on("HELP") | server.on("XCLIENT") |
server.on("Mail From") | server.on("rcpt") | server.on("RCPT", "a.b+c@example.com") | server.on("RCPT", "example.com") |
server.on("RCPT", '"a b"@x.com') | server.on("RCPT", r'"a\"b"@x.com') | server.on("RCPT", "a@[1.2.3.4]")
"""


class ConfigurationTest(ServerCase):
    def assert_refused(self, call: str, names: dict[str, Any], pattern: str) -> None:
        """The error has the name of the option, also after it was pickled."""
        error = catch(ConfigurationError, eval, call, names)
        self.assertRegex(str(error), pattern)
        option = re.match(r"([\w.]+)=(?!.*three digits)|(\w+): (?!<)", str(error))
        needed = re.search(r"(?:: needs|the option) (\w+)$", str(error))
        expected = (str(error), option[1] or option[2] if option else "", needed[1] if needed else "")
        for found in (error, pickle.loads(pickle.dumps(error))):
            self.assertEqual((str(found), found.option, found.needed), expected)

    def test_bad_options(self) -> None:
        for row in BAD_OPTIONS:
            for given, make in itertools.product(row.given, ("Configuration", "Server")):
                with self.subTest(given):
                    self.assert_refused(f"smtpmock.{make}({given})", globals(), row.pattern)

    def test_bad_calls(self) -> None:
        """They have no effect."""
        server, client, _ = self.serve(msg_greeting="220 old")
        names = {
            **{name: getattr(smtpmock, name) for name in ("Action", "Configuration", "Server")},
            "server": server,
            "re": re,
            "configure": functools.partial(server.configure, msg_greeting="220 new"),
            "vrfy": lambda **attributes: make_handler("VRFY", "252 maybe", **attributes),
        }
        for row in BAD_CALLS:
            for call in row.given:
                with self.subTest(call):
                    self.assert_refused(call, names, row.pattern)
                    with Client(server) as other:
                        self.assertEqual(other.greeting, "220 old")
        self.assertEqual(client.ask(*ENVELOPE, *SEND[2:]), [*[RECEIVED] * 3, READY, RECEIVED])
        for call in read_items(GOOD_CALLS):
            eval(call, names)

    def test_errors_are_what_they_resemble(self) -> None:
        errors = (ConfigurationError, ServerStateError, ServerStartError, WaitTimeoutError)
        for error, builtin in zip(errors, (ValueError, RuntimeError, OSError, TimeoutError), strict=True):
            self.assertTrue(issubclass(error, builtin) and issubclass(error, smtpmock.SMTPMockError))

    def test_it_cannot_be_changed(self) -> None:
        names = ["a@a.com"]
        options = Configuration(not_registered_emails=names)
        names.append("b@a.com")
        self.assertEqual(set(options.not_registered_emails), {"a@a.com"})
        for change in (lambda: setattr(options, "port", 1), lambda: delattr(options, "port")):
            self.assertRaisesRegex(dataclasses.FrozenInstanceError, "Configuration.port cannot be", change)

    # Signatures, and how a Configuration compares.

    OWN = ("logger", "on_message", "handlers")  # the keywords of a Server that are no options

    def test_signatures(self) -> None:
        fields = [(field.name, field.default, field.type) for field in dataclasses.fields(Configuration)]
        for shown, own in ((Configuration, ()), (Server, self.OWN), (type("Mine", (Server,), {}), self.OWN)):
            with self.subTest(shown):
                parameters = list(inspect.signature(shown).parameters.values())
                if own:
                    first, *parameters = parameters
                    self.assertEqual((first.name, first.kind.name), ("configuration", "POSITIONAL_OR_KEYWORD"))
                self.assertEqual({parameter.kind.name for parameter in parameters}, {"KEYWORD_ONLY"})
                found = [(parameter.name, parameter.default, parameter.annotation) for parameter in parameters]
                self.assertEqual(found[: len(fields)], fields)
                self.assertEqual(tuple(name for name, *_ in found[len(fields) :]), own)

        class Mine(Server):
            def __init__(self, size: int) -> None:
                super().__init__(msg_size_limit=size)

        for call, names in (
            (smtpmock.Action, [field.name for field in dataclasses.fields(smtpmock.Action)]),
            (Server().on, ["stage", "match", "skip", "times", "probability", "after", "unknown"]),
            (Server().configure, ["configuration", "options"]),
            (Mine, ["size"]),
        ):
            self.assertEqual(list(inspect.signature(call).parameters), names)

    def test_help(self) -> None:
        documentation = inspect.getdoc(Configuration) or ""
        for field in dataclasses.fields(Configuration):
            self.assertRegex(documentation, rf"(?m)^ *{field.name}: {re.escape(field.metadata['about'])}$")
        for shown in (Configuration, Server):
            text = pydoc.plain(pydoc.render_doc(shown))
            self.assertRegex(text, "msg_line_too_long: '?str'? = '500 Line too long'")  # 3.15 shows no quotes
        self.assertRegex(text, r"on_message: '?Callable\[\[Message\], object\] \| None'? = None")
        self.assertNotRegex(pydoc.plain(pydoc.render_doc(Server.configure)), "host:|port:|500 Line")

    def test_repr_shows_what_differs(self) -> None:
        for made, expected in (
            (Configuration(), "Configuration()"),
            (Configuration(fail_fast=True, host="::1", seed=None), "Configuration(host='::1', fail_fast=True)"),
            (smtpmock.Action("450 later", then="close"), "Action(reply='450 later', then='close')"),
        ):
            self.assertEqual(repr(made), expected)

    def test_equality(self) -> None:
        make = functools.partial(Configuration, auth_users={"u": "s"}, extensions=["SIZE"], ssl_context="test")
        same = [make(port=0), make(extensions=("SIZE",), auth_users={"u": "s"}), dataclasses.replace(make())]
        same += [copy.copy(make()), copy.deepcopy(make()), pickle.loads(pickle.dumps(make()))]
        self.assertEqual((same, len(set(same))), ([make()] * 6, 1))
        others = [make(port=1), make(auth_users={"u": "t"}), Configuration(), Configuration(host="Server"), None]
        for other in [*others, smtpmock.Action(), "Configuration()"]:
            self.assertNotEqual(make(), other)
        self.assertNotEqual(smtpmock.Action(), Configuration())
        self.assertEqual(smtpmock.Action(delay=1), smtpmock.Action(delay=1.0))
        for replace in (dataclasses.replace, getattr(copy, "replace", dataclasses.replace)):  # new in 3.13
            self.assertEqual(replace(make(), port=26), make(port=26))

    def test_it_is_a_dataclass(self) -> None:
        """So that users can extend it, match it, and have pprint and pytest show it."""

        @dataclasses.dataclass(frozen=True)
        class Mine(Configuration):
            ours: str = "x"

        self.assertTrue(dataclasses.is_dataclass(Configuration) and dataclasses.is_dataclass(smtpmock.Action()))
        self.assertEqual((Mine(port=25).ours, inspect.signature(Mine).parameters["ours"].default), ("x", "x"))
        self.assertEqual(smtpmock.Action.__match_args__, ("reply", "raw", "delay", "trickle", "then"))
        self.assertEqual(dataclasses.asdict(Configuration())["msg_greeting"], "220 Welcome")
        self.assertIn("msg_greeting", pprint.pformat(Configuration(msg_greeting="220 " + 100 * "x"), width=20))

    def test_positional_arguments(self) -> None:
        calls = "Configuration(1) | Action('x', reply='y') | Action(*[None] * 6) | Server(None, None)"
        for call in (*read_items(calls), "Server(None, configuration=None)"):
            with self.subTest(call), self.assertRaises(TypeError):
                eval(f"smtpmock.{call}")
        self.assertEqual(smtpmock.Action("x", None, 1.5), smtpmock.Action(reply="x", delay=1.5))


# ------------------------------------------------------------------ waiting, purging and on_message


class WaitingTest(unittest.TestCase):
    def receive(self, *contents: bytes | str) -> Server:
        """A server that has these mails."""
        server = Server(multiple_message_receiving=True).start()
        self.addCleanup(server.stop)
        if contents:
            send(server, *contents)
        return server

    def test_there_are_enough(self) -> None:
        server = self.receive()
        self.assertEqual(server.wait_for_messages(0, 0), [])
        send(server, "1", "2", "3")
        self.assertEqual(len(server.wait_for_messages(2, 0)), 3)
        self.assertEqual(len(server.wait_for_messages_and_purge(3, 0)), 3)
        self.assertEqual(server.messages(), [])
        send(server, "4")
        server.reset()
        self.assertEqual(server.messages(), [])
        send(server, "5")
        self.assertEqual(ids(server.messages()), [5])

    def test_woken_by_the_message(self) -> None:
        server = self.receive()
        waiters = [lambda: len(server.wait_for_messages(1, TIMEOUT))] * 3
        self.assertEqual(in_threads(*waiters, lambda: send(server, "hi")), [1, 1, 1, None])

    def test_where(self) -> None:
        server = self.receive(*["Subject: one", "Subject: two"] * 2)
        self.assertEqual(ids(server.wait_for_messages(1, 0, where=lambda message: message.subject == "two")), [2, 4])
        found = server.wait_for_messages_and_purge(2, 0, lambda message: message.subject == "one")
        self.assertEqual((ids(found), ids(server.messages())), ([1, 3], [2, 4]))
        error = catch(WaitTimeoutError, server.wait_for_messages_and_purge, 2, 0.01, lambda message: message.id == 4)
        self.assertEqual((ids(error.messages), ids(server.messages())), ([4], [2, 4]))

    def test_where_raises(self) -> None:
        server = self.receive("1", "2")
        for wait in (server.wait_for_messages, server.wait_for_messages_and_purge):
            catch(ZeroDivisionError, wait, 2, TIMEOUT, lambda message: message.id == 1 or 1 / 0)
        self.assertEqual(len(server.messages()), 2)
        left = weakref.ref(server.messages_and_purge()[0])
        self.assertTrue(wait_until(lambda: gc.collect() < 0 or left() is None), "the wait has left something")

    def test_where_of_a_message_that_changes(self) -> None:
        server = self.receive()
        with Smtp(server) as client:
            client.sendmail("a@a.com", ["b@b.com"], "hi")
            catch(WaitTimeoutError, server.wait_for_messages, 1, 0, lambda message: message.quit_sent)
            waiter = lambda: len(server.wait_for_messages(1, TIMEOUT, lambda message: message.quit_sent))  # noqa: E731
            self.assertEqual(in_threads(waiter, client.quit)[0], 1)

    def wait_meanwhile(self, count: int, where: Callable[[Server], object]) -> list[Message]:
        """Wait for mails, of which the first is there, and the others come after where() was called for that."""
        server, looked = self.receive("hi"), threading.Event()

        def look(message: Message) -> bool:
            where(server)
            looked.set()
            return True

        def send_more() -> None:
            looked.wait(TIMEOUT)
            send(server, *["hi"] * 99)

        return list(in_threads(lambda: server.wait_for_messages(count, TIMEOUT, look), send_more)[0])

    def test_a_waiter_is_woken_when_there_can_be_enough(self) -> None:
        """After the first look at what is there, it looks again when there are as many as it waits for."""
        seen: list[int] = []
        self.wait_meanwhile(100, lambda server: seen.append(len(server.messages())))
        self.assertEqual(seen, [1] + [100] * 99)

    def test_what_is_purged_while_one_waits_does_not_count(self) -> None:
        purges = iter([Server.messages_and_purge])
        found = self.wait_meanwhile(99, lambda server: [purge(server) for purge in purges])
        self.assertEqual(ids(found), list(range(2, 101)))

    def test_a_timeout_tells_what_an_open_session_was_refused(self) -> None:
        with Server(not_registered_emails=["b@b.com"]) as server, Client(server) as client:
            client.ask(*ENVELOPE, "RSET")
            self.assertRegex(
                report(server), "open sessions: 1\n.*RSET.*\n +refused: C: RCPT TO:<b@b.com> / S: 550 User"
            )

    def test_a_timeout_says_what_there_is(self) -> None:
        server = self.receive(*["Subject: Grüße".encode()] * 12)
        with Client(server) as client:
            client.ask(*ENVELOPE[:2])
            error = catch(WaitTimeoutError, server.wait_for_messages, 2, 0.01, lambda message: message.id == 1)
            port = client.socket.getsockname()[1]
        lines = str(error).splitlines()
        start = ["1 of 2 matching messages came in 0.01 seconds", "  recorded messages: 12", "    ..."]
        self.assertEqual(lines[:3], start)
        self.assertIn("    <Message 12 from 'a@a.com' to ['b@b.com']: 18 bytes, accepted>, subject 'Grüße'", lines)
        self.assertEqual(lines[-1], f"    127.0.0.1:{port}: C: MAIL FROM:<a@a.com> / S: 250 Received")
        server.on("*").reply("250 ok")
        with Client(server) as client:
            client.ask(*SEND[:3])  # rules accept it without HELO
        server.wait_for_messages(14, TIMEOUT)
        self.assertRegex(report(server), "(?s)^14 of 1000000000 messages .* recorded messages: 14.*last reply '250 ok'")
        error = catch(WaitTimeoutError, Server().wait_for_messages, 1, 0)
        expected = "0 of 1 messages came in 0 seconds\n  recorded messages: 0\n  open sessions: 0"
        self.assertEqual(str(error), expected)

    def test_a_slow_where_does_not_extend_the_timeout(self) -> None:
        """While mail keeps coming."""
        server = self.receive("hi")
        seen: list[int] = []

        def where(message: Message) -> bool:
            seen.append(message.id)
            send(server, "hi", "hi")  # each look brings two more
            return len(seen) >= 40

        with mock.patch("time.monotonic", mock.Mock(side_effect=itertools.count(0, 0.01))):
            self.assertEqual(catch(WaitTimeoutError, server.wait_for_messages, 1, 0.3, where).messages, [])

    def test_purging_while_clients_send(self) -> None:
        """Every message is handed out once, whatever purges it."""
        server = self.receive()
        found, done = list[Message](), threading.Event()

        def purge(wait: bool) -> None:
            while not done.wait(0.0001):  # which lets others run
                with contextlib.suppress(WaitTimeoutError):
                    found.extend(server.wait_for_messages_and_purge(2, 0.001) if wait else server.messages_and_purge())

        def send_all() -> None:
            in_threads(*[lambda: send(server, *["hi"] * 25)] * 8)
            done.set()

        in_threads(lambda: purge(True), lambda: purge(False), send_all)
        self.assertEqual(sorted(ids(found + server.messages())), list(range(1, 201)))


class OutboxTest(ServerCase):
    """Accepted mails, open sessions, and what is kept."""

    def test_outbox(self) -> None:
        with Server(keep_all=True, not_registered_emails=["c@b.com"]) as server:
            with Smtp(server) as client:
                client.sendmail("a@a.com", ["b@b.com", "c@b.com"], "one")
                catch(smtplib.SMTPRecipientsRefused, client.sendmail, "a@a.com", ["c@b.com"], "two")
                client.sendmail("a@a.com", ["b@b.com"], "three")
            self.assertEqual([message.content for message in server.outbox], [b"one\r\n", b"three\r\n"])
            with Client(server) as other:
                other.ask(*ENVELOPE, "QUIT")
            self.assertEqual((ids(server.outbox), ids(server.messages())), ([1, 3], [1, 2, 3, 4]))
            server.messages_and_purge()
            self.assertEqual(server.outbox, [])

    def test_it_warns_like_messages(self) -> None:
        with Server() as server:
            send(server, "one", "two")
            with self.assertWarnsRegex(smtpmock.SMTPMockWarning, "^1 of 2 accepted mails was not kept") as caught:
                self.assertEqual(len(server.outbox), 1)
            self.assertEqual(caught.filename, __file__)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self.assertEqual(len(server.outbox), 1)

    # Options, and how many mails and recipients are kept of two mails with two recipients each.
    KEPT = read_rows("""
=> 2 2  -- keep_all=True
=> 2 1  -- keep_all=True, multiple_rcptto=False
=> 1 2  -- keep_all=True, multiple_message_receiving=False
=> 1 1  -- keep_all=False
=> 1 2  -- keep_all=False, multiple_rcptto=True
""")

    def test_keep_all(self) -> None:
        for _, kept, given in self.KEPT:
            undone = Server(keep_all=not given["keep_all"])
            undone.configure(**given)
            with self.subTest(given), warnings.catch_warnings():
                warnings.simplefilter("error", smtpmock.SMTPMockWarning)
                for server in (Server(**given), Server(Configuration(**given)), undone):
                    with server:
                        send(server, "one", "two", to=["b@b.com", "c@b.com"])
                        if len(given) == 1:  # else the other option may warn
                            self.assertEqual(len(server.messages()), int(kept[0]))
                    self.assertEqual(f"{len(server.outbox)} {len(server.outbox[-1].rcpt_tos)}", kept)
        shown = Configuration(keep_all=True, multiple_rcptto=False)
        self.assertEqual((shown.multiple_rcptto, shown.multiple_message_receiving), (False, True))
        self.assertEqual(dataclasses.replace(shown, port=1).multiple_message_receiving, True)
        self.assertEqual((Configuration.multiple_rcptto, Configuration().multiple_rcptto), (False, False))

    def test_sessions(self) -> None:
        server = Server(keep_all=True)
        self.assertEqual(server.sessions(), [])
        with server, Client(server) as first, Client(server) as second:
            first.ask("EHLO a.com", *SEND)
            second.ask("EHLO b.com", "MAIL FROM:<c@c.com>")
            (one, two), (recorded,) = server.sessions(), server.messages()
            self.assertEqual((one.id, one.to_dict()), (recorded.id, recorded.to_dict()))
            self.assertEqual((two.id, two.mail_from, two.helo_request), (0, "c@c.com", "EHLO b.com"))
            self.assertEqual(two.peer, second.socket.getsockname())
            second.ask("RSET", "MAIL FROM:<d@d.com>")
            self.assertEqual((two.mail_from, server.sessions()[1].mail_from), ("c@c.com", "d@d.com"))
            server.on("NOOP").silence()
            second.send(b"NOOP\r\n")
            self.assertTrue(wait_until(lambda: "<silence>" in server.sessions()[1].transcript))
            first.ask("QUIT")
            self.assertEqual([session.peer for session in server.sessions()], [two.peer])
        self.assertEqual(server.sessions(), [])

    def test_a_limit_of_sessions(self) -> None:
        """Whoever has read its last reply is none, so the next connection is never refused for it."""
        with Server() as server:
            limit = server.on("connect", lambda line: len(server.sessions()) > 1).reply("421 Too many").close()
            for last in ("QUIT", "RSET", "NOOP") * 30:
                server.on("RSET", times=1).reply("250 bye").close()
                server.on("NOOP", times=1).trickle(0.0001).close()
                with Client(server) as client:
                    self.assertEqual(client.greeting, "220 Welcome")
                    with Client(server) as other:
                        self.assertEqual((other.greeting, other.read()), ("421 Too many", "<closed>"))
                    client.ask("EHLO a.com", last)
            self.assertEqual(limit.hits, 90)


class OnMessageTest(unittest.TestCase):
    def test_called_before_the_reply(self) -> None:
        with Server(on_message=(hold := Hold())) as server, Client(server) as client:
            client.mail()
            hold.wait()
            client.assert_silence()
            self.assertEqual(server.messages(), [])
            hold.release.set()
            self.assertEqual((client.read(), server.messages()), (RECEIVED, hold.seen))
        (message,) = hold.seen
        self.assertEqual((message.id, message.peer[0], message.received_at is None), (1, "127.0.0.1", False))
        self.assertEqual((message.is_consistent, message.transcript.splitlines()[-1]), (True, "S: 250 Received"))

    def test_if_it_raises(self) -> None:
        failed = "451 Local error in processing"
        for error in (ValueError("no"), SystemExit()):
            memory = receive_mail(on_message=mock.Mock(side_effect=[error, None]), multiple_message_receiving=True)
            level, text = memory.recorder.wait_for("on_message failed: Traceback")
            self.assertEqual((level, type(error).__name__ in text), ("error", True))
            self.assertEqual(memory.say("NOOP", *SEND)[-1], RECEIVED)
            refused, accepted = memory.messages()
            self.assertEqual((refused.msg, refused.msg_response, refused.content), (False, failed, b"hi\r\n"))
            self.assertEqual((refused.is_consistent, refused.received_at), (False, None))
            self.assertIn(f"C: <4 bytes>\nS: {failed}\nC: NOOP", refused.transcript)
            self.assertTrue(accepted.is_consistent)

    def test_what_it_was_given_does_not_change(self) -> None:
        seen, others = list[Message](), list[Message]()
        raises: Any = lambda message: [seen.append(message), 1 / 0]  # type: ignore[func-returns-value]  # noqa: E731
        memory = receive_mail(on_message=raises, on_unaccepted=others.append)
        self.assertEqual(seen[0].msg_response, RECEIVED)
        self.assertTrue(pickle.loads(pickle.dumps(seen[0])).transcript.endswith(f"S: {RECEIVED}"))
        memory.end("421 bye")
        memory.end()
        self.assertIn("\nS: 451 Local error in processing\nS: 421 bye", memory.messages()[0].transcript)
        self.assertEqual((memory.messages(), [message.msg for message in others]), (others, [False]))

    def test_only_accepted_messages_and_each_of_a_session(self) -> None:
        for options, expected in (
            ({"msg_size_limit": 1}, []),
            ({"rules": ["message: reply 451 no"]}, []),
            ({"multiple_message_receiving": True}, [1, 2]),
            ({"multiple_message_receiving": False}, [1, 2]),
        ):
            seen: list[Message] = []
            receive_mail(on_message=seen.append, **dict[str, Any](options)).say(*SEND)
            self.assertEqual(ids(seen), expected)


# ------------------------------------------------------------------------------- rules and handlers

# What the client says, to the last of which a connection can end without a reply, by a rule for this stage.
STAGES = read_rows("""
=> connect
HELLO => EHLO
HELLO | MAIL => MAIL FROM
HELLO | MAIL | RCPT => RCPT b@b.com
ENVELOPE => DATA
ENVELOPE | . => message
NOOP => NOOP
QUIT => QUIT
xyz => XYZ
""")


class RuleTest(ServerCase):
    """What the dialogues do not show."""

    def test_the_ends_at_each_stage(self) -> None:
        for action, end in (("drop", "<closed>"), ("reset", "<reset>"), ("silence", "<silence>")):
            for given, stage, _ in STAGES:
                with self.subTest(f"{action} at {stage}"):
                    memory = Memory(rules=[f"{stage}: {action}"])
                    said = [memory.greet(), *map(memory.feed, read_pieces(given))]
                    self.assertEqual(said[-1], [end])
                    self.assertEqual(memory.feed(b"NOOP\r\n"), [])
                    memory.end()
                    shown = [f"S: {end}" in message.transcript for message in memory.messages()]
                    self.assertEqual(shown, [True] * bool(given))

    def test_hits_and_remove(self) -> None:
        memory = Memory()
        rule, other = memory.on("NOOP", times=3).reply("450 no"), memory.on("RSET").drop()
        self.assertEqual(memory.say("NOOP", "NOOP"), ["450 no"] * 2)
        rule.remove()
        rule.remove()
        self.assertEqual(memory.say("NOOP"), ["250 Ok"])
        self.assertEqual((rule.hits, other.hits, repr(rule)), (2, 0, "<Rule for NOOP: 2 hits>"))
        self.assertEqual(repr(memory.on("rcpt to:", "B@C.com")), "<Rule for RCPT B@c.com: 0 hits>")

    def test_what_ends_rules_and_what_does_not(self) -> None:
        server, client, _ = self.serve("connect: reply 220 Moin")
        greetings = [client.greeting]
        server.stop()
        for _ in range(2):
            with server, Client(server) as client:
                greetings.append(client.greeting)
            server.clear_rules()
        self.assertEqual(greetings, ["220 Moin", "220 Moin", "220 Welcome"])

    def test_no_action_and_the_same_one_twice(self) -> None:
        """Without one, a rule does nothing; a second call replaces the first."""
        memory = Memory()
        memory.on("NOOP")
        older = memory.on("NOOP")
        replies = memory.say("NOOP")
        newer = memory.on("NOOP")
        for rule, reply in ((older, "450 one"), (newer, "450 two"), (older, "450 three"), (newer, "450 four")):
            rule.reply(reply)
            replies += memory.say("NOOP")
        self.assertEqual(replies, ["250 Ok", "450 one", "450 two", "450 two", "450 four"])
        self.assertEqual((older.hits, newer.hits), (1, 3))

    def test_a_rule_is_hit_if_an_aspect_of_it_is_used(self) -> None:
        memory = Memory()
        hidden = memory.on("NOOP", times=1).reply("450 hidden")
        slow = memory.on("*", times=2).delay(0.5)
        memory.on("NOOP", times=1).reply("450 shown")
        self.assertEqual(memory.say("NOOP", "NOOP", "NOOP"), ["450 shown", "450 hidden", "250 Ok"])
        self.assertEqual((hidden.hits, slow.hits, memory.delays), (1, 2, [0.5, 0.5, 0]))

    def test_the_end_marker_is_no_part_of_the_body(self) -> None:
        for after, data, content, reply in (
            (5, b"abc\r\n.\r\n", b"abc\r\n", "<closed>"),
            (6, b"abc\r\n.\r\n", b"abc\r\n", RECEIVED),
            (8, b"abc\r\n.\r\n", b"abc\r\n", RECEIVED),
            (6, b"abc\r\n..d\r\n.\r\n", b"abc\r\n.", "<closed>"),
        ):
            for step in (1, 100):
                memory = Memory(*ENVELOPE, "DATA", rules=[f"message: drop; after={after}"])
                said = [line for at in range(0, len(data), step) for line in memory.feed(data[at : at + step])]
                with self.subTest(after=after, step=step):
                    self.assertEqual((said, memory.message().content), ([reply], content))

    def test_patterns_and_functions_of_the_line(self) -> None:
        memory = Memory()
        seen: list[str] = []

        def has(word: str) -> Any:
            return lambda line: [seen.append(line), word in line][1]  # type: ignore[func-returns-value]

        memory.on("Mail From", re.compile("SIZE=[0-9]{3}")).reply("552 no")
        memory.on("MAIL", has("big")).reply("553 no")
        memory.on("message", has("virus")).reply("554 virus")
        lines = ["MAIL FROM:<big@a.com> SIZE=100", "MAIL FROM:<a@a.com> SIZE=100", "mail from:<a@a.com>"]
        self.assertEqual(memory.say("EHLO a.com", *lines), [RECEIVED, "553 no", "552 no", RECEIVED])
        self.assertEqual(memory.say("RCPT TO:<b@b.com>", "DATA", "a virus", ".")[-1], "554 virus")
        self.assertEqual(seen, [*lines, "a virus\r\n"])

    def test_functions(self) -> None:
        memory = Memory("EHLO a.com")
        failed = "451 Local error in processing"
        answers = iter([None, "450 later", smtpmock.Action("299 fine", delay=0.5), 1, smtpmock.Action(then="reset")])
        seen: list[tuple[str, bool]] = []

        @memory.on("MAIL")
        def quota(request: str, message: Message) -> Any:
            seen.append((request, message.helo))
            return next(answers)

        self.assertEqual(memory.say(*[SEND[0]] * 5), [RECEIVED, "450 later", "299 fine", failed, "<reset>"])
        self.assertEqual((memory.delays[1:], seen, quota.hits), ([0, 0, 0.5, 0, 0], [(SEND[0], True)] * 5, 5))
        memory.recorder.wait_for("a rule returned 1: must be None, a reply or an Action")
        memory = Memory(*ENVELOPE)
        memory.on("NOOP")(lambda *_: 1 / 0)
        memory.on("message")(lambda _, message: f"554 {message.subject} {message.is_consistent}")
        self.assertEqual(memory.say("DATA", "Subject: spam", "", ".", "NOOP"), [READY, "554 spam False", failed])
        text = memory.recorder.wait_for("a rule failed: Traceback")[1]
        self.assertRegex(text, "(?s) in <lambda>\n.*ZeroDivisionError: division by zero")

    def test_challenges_are_delayed_and_trickle(self) -> None:
        memory = Memory("EHLO a.com", auth_users={"a": "b"}, rules=["*: delay 0.5", "AUTH: trickle 0.25"])
        replies = [reply for line in (b"AUTH LOGIN", b"YQ==", b"Yg==") for reply in memory.replies(line + b"\r\n")]
        found = [(reply.text[:3], reply.delay, reply.trickle) for reply in replies]
        self.assertEqual(found, [("334", 0.5, 0.25), ("334", 0.5, 0.25), ("235", 0.5, 0.25)])

    def test_bodies(self) -> None:
        """The last chunk has the delays of both its stages, rules for either, and those for a size of the body."""
        chunk, body = b"BDAT 4 LAST\r\nabcd", b"DATA\r\nab\r\n.\r\n"
        for rule, data, replies, delays, content in (
            ("NOOP: drop", chunk, [RECEIVED], [3], b"abcd"),
            ("message: reply 451 no; close", chunk, ["451 no", "<closed>"], [3], b"abcd"),
            ("BDAT: reply 452 no; delay 5", chunk, ["452 no"], [5], b"abcd"),
            ("message: drop; after=2", chunk, ["<closed>"], [0], b"ab"),
            ("message: delay 4; after=4", chunk, [RECEIVED], [7], b"abcd"),
            ("message: delay 4; after=3", body, [READY, RECEIVED], [1, 4, 2], b"ab\r\n"),
        ):
            options: Any = {"response_delay_data": 1, "response_delay_message": 2}
            memory = Memory(*ENVELOPE, rules=[rule], extensions=["CHUNKING"], **options)
            with self.subTest(rule):
                self.assertEqual((memory.feed(data), memory.delays[3:]), (replies, delays))
                self.assertEqual(memory.message().content, content)

    def test_the_very_bytes(self) -> None:
        _, client, _ = self.serve(r"NOOP: raw \xff\0 é garbage\n\r")
        client.send(b"NOOP\r\nQUIT\r\n")
        data = b"".join(iter(lambda: client.socket.recv(100), b""))
        self.assertEqual(data, b"\xff\x00 \xe9 garbage\n\r221 Closing connection\r\n")

    def test_a_fin_and_a_reset(self) -> None:
        """As the system reports them, with nothing and with much still unread on the server's side."""
        for action, unread in itertools.product(("close", "drop", "reset"), (0, 500_000)):
            with self.subTest(action, unread=unread):
                server, client, _ = self.serve(f"message: {action}; after=4096")
                client.mail(b"x" * 4096)
                ends = []
                try:
                    if unread:  # even an empty send would take the error away from the read
                        client.send(b"y" * unread)
                except ConnectionError:  # in the middle of it
                    ends.append("<reset>")
                ends.append(client.read())
                end = "<reset>" if action == "reset" else "<closed>"
                self.assertEqual(ends[: 1 if action == "reset" else 2], [end])
                (message,) = server.wait_for_messages(1, TIMEOUT)
                self.assertEqual((message.content, message.msg), (b"x" * 4096, False))
                self.assertTrue(message.transcript.endswith(f"C: <4096 bytes>\nS: {end}"))

    def test_trickles_and_delays_take_their_time(self) -> None:
        for rule, least in (("NOOP: trickle 0.01", 7 * 0.01), ("NOOP: delay 0.03", 0.03)):
            _, client, _ = self.serve(rule, response_delay_noop=0 if "trickle" in rule else 10 * TIMEOUT)
            began = time.monotonic()
            self.assertEqual(client.ask("NOOP"), ["250 Ok"])
            self.assertGreaterEqual(time.monotonic() - began, least)

    def test_times_and_what_is_let_pass_are_exact(self) -> None:
        server = self.serve()[0]
        rule, other = server.on("NOOP", skip=100, times=50).reply("450 no"), server.on("NOOP", skip=600).drop()

        def count() -> int:
            with Client(server) as client:
                return client.ask(*["NOOP"] * 20).count("450 no")

        self.assertEqual((sum(in_threads(*[count] * 30)), rule.hits, other.hits), (50, 50, 0))
        nearest = "<Rule for NOOP: 0 hits, 600 of 600 skipped> was never hit; the nearest command was 'NOOP'"
        self.assertEqual(told(server), nearest)

    def test_what_a_newer_rule_answers_in_full_is_let_pass_too(self) -> None:
        rules = ["connect: drop; skip=2; times=1", "connect: reply 421 busy; delay 0; trickle 0; close; times=1"]
        memory, greetings = Memory(rules=rules), list[str]()
        for _ in range(4):
            memory.begin()
            greetings.append(memory.greet()[0])
        self.assertEqual(greetings, ["421 busy", "220 Welcome", "<closed>", "220 Welcome"])

    def test_chance(self) -> None:
        def refusals(seed: int | None, others: int = 0, verb: str = "NOOP", conditions: str = "") -> list[int]:
            rules = [f"{verb}: reply 450 no; probability=0.3{conditions}" for verb in ("NOOP", "RSET")]
            memory = Memory("EHLO a.com", *["RSET"] * others, seed=seed, rules=rules)
            return [index for index, reply in enumerate(memory.say(*[verb] * 1000)) if reply == "450 no"]

        found = refusals(7)
        self.assertTrue(200 < len(found) < 400)
        self.assertEqual(found, refusals(7, others=5))
        self.assertNotIn(found, [refusals(8), refusals(7, verb="RSET"), refusals(None)])
        # Chances begin after what is let pass.
        self.assertEqual(refusals(7, conditions="; skip=10; times=9"), [index + 10 for index in found[:9]])
        server, client, _ = self.serve(seed=3)
        replies = []
        for _ in range(2):
            server.reset()  # begins the same chances again
            Memory.add_rules(server, ["NOOP: reply 450 no; probability=0.5"])
            replies.append(client.ask(*["NOOP"] * 50))
        self.assertEqual(replies[0], replies[1])

    def test_a_rule_of_the_command_line_applies_as_a_whole(self) -> None:
        """A bad one does not apply, and does not change what the chances of the next one are."""
        seen, found = list[object](), list[list[str]]()
        delay = smtpmock.Rule.delay

        def look(rule: smtpmock.Rule, seconds: float) -> smtpmock.Rule:
            seen.append(server._rules.newest_first)
            return delay(rule, seconds)

        for bad in ((), ("NOOP: reply 450 no; delay x; probability=0.5",)):
            server, client, _ = self.serve(seed=1)
            for rule in bad:
                self.assertRaises(ConfigurationError, smtpmock._add_rule, server, rule)
            with mock.patch.object(smtpmock.Rule, "delay", look):
                smtpmock._add_rule(server, "NOOP: reply 450 no; delay 0; probability=0.5")
            found.append(client.ask(*["NOOP"] * 50))
        self.assertEqual((found[0], seen), (found[1], [(), (), ()][: len(seen)]))

    def test_silence_ends_with_the_session_timeout(self) -> None:
        server, client, recorder = self.serve("EHLO: silence", session_timeout=0.05)
        client.send(b"EHLO a.com\r\n")
        self.assertEqual(client.read(), "<closed>")
        recorder.wait_for("SMTP session finished")
        self.assertNotIn("warning", [level for level, _ in recorder.seen])
        self.assertTrue(server.messages()[0].transcript.endswith("C: EHLO a.com\nS: <silence>"))


# --------------------------------------------------------------------------------------- transcripts

# What these tools printed in one session with a server that does not know bob: swaks 20201014, PHPMailer 6.6, smtplib of
# Python 3.11, and curl 7.88 with a progress meter. A | is a line break; some headers are left out.
LOGS = {
    "swaks": """\
=== Trying 127.0.0.1:45275... | === Connected to 127.0.0.1. | <-  220-mx.example.com ESMTP | <-  220 ready
 -> EHLO a.com | <-  250-Received | <-  250-SIZE 10485760 | <-  250 AUTH LOGIN |  -> AUTH LOGIN | <-  334 VXNlcm5hbWU6
 -> YWxpY2U= | <-  334 UGFzc3dvcmQ6 |  -> c2VjcmV0 | <-  235 Authentication succeeded |  -> MAIL FROM:<a@example.com>
<-  250 Received |  -> RCPT TO:<bob@example.com> | <** 550-5.1.1 That doesn't exist | <** 550 5.1.1 Learn more
 -> RCPT TO:<c@example.com> | <-  250 Received |  -> DATA
<-  354 Ready for receive message. End data with <CR><LF>.<CR><LF> |  -> Subject: test Mon, 30 Nov 2026 19:37:45 +0000\r
 -> \r |  -> hi\r |  -> \r |  -> \r |  -> . | <-  250 Received |  -> QUIT | <-  221 Closing connection
=== Connection closed with remote host.""",
    "PHPMailer": """\
TIME SERVER -> CLIENT: 220-mx.example.com ESMTP | INDENT 220 ready | TIME CLIENT -> SERVER: EHLO a.com
TIME SERVER -> CLIENT: 250-Received | INDENT 250-SIZE 10485760 | INDENT 250 AUTH LOGIN
TIME CLIENT -> SERVER: AUTH LOGIN | TIME SERVER -> CLIENT: 334 VXNlcm5hbWU6
TIME CLIENT -> SERVER: [credentials hidden] | TIME SERVER -> CLIENT: 334 UGFzc3dvcmQ6
TIME CLIENT -> SERVER: [credentials hidden] | TIME SERVER -> CLIENT: 235 Authentication succeeded
TIME CLIENT -> SERVER: MAIL FROM:<a@example.com> | TIME SERVER -> CLIENT: 250 Received
TIME CLIENT -> SERVER: RCPT TO:<bob@example.com> | TIME SERVER -> CLIENT: 550-5.1.1 That doesn't exist
INDENT 550 5.1.1 Learn more | TIME SMTP ERROR: RCPT TO command failed: 550-5.1.1 That doesn't exist
INDENT 550 5.1.1 Learn more | TIME CLIENT -> SERVER: RCPT TO:<c@example.com> | TIME SERVER -> CLIENT: 250 Received
TIME CLIENT -> SERVER: DATA | TIME SERVER -> CLIENT: 354 Ready for receive message. End data with <CR><LF>.<CR><LF>
TIME CLIENT -> SERVER: Subject: hi | TIME CLIENT -> SERVER: | TIME CLIENT -> SERVER: 220 hello
TIME CLIENT -> SERVER: | TIME CLIENT -> SERVER: . | TIME SERVER -> CLIENT: 250 Received
TIME CLIENT -> SERVER: QUIT | TIME SERVER -> CLIENT: 221 Closing connection
TIME SMTP Error: The following recipients failed: bob@example.com: That doesn't exist | INDENT Learn more""",
    "smtplib": r"""
connect: to ('127.0.0.1', 45275) None | reply: b'220-mx.example.com ESMTP\r\n' | reply: b'220 ready\r\n'
reply: retcode (220); Msg: b'mx.example.com ESMTP\nready' | connect: b'mx.example.com ESMTP\nready'
send: 'ehlo a.com\r\n' | reply: b'250-Received\r\n' | reply: b'250-SIZE 10485760\r\n' | reply: b'250 AUTH LOGIN\r\n'
reply: retcode (250); Msg: b'Received\nSIZE 10485760\nAUTH LOGIN' | send: 'AUTH LOGIN YWxpY2U=\r\n'
reply: b'334 UGFzc3dvcmQ6\r\n' | reply: retcode (334); Msg: b'UGFzc3dvcmQ6' | send: 'c2VjcmV0\r\n'
reply: b'235 Authentication succeeded\r\n' | reply: retcode (235); Msg: b'Authentication succeeded'
send: 'mail FROM:<a@example.com> size=30\r\n' | reply: b'250 Received\r\n' | send: 'rcpt TO:<bob@example.com>\r\n'
reply: b"550-5.1.1 That doesn't exist\r\n" | reply: b'550 5.1.1 Learn more\r\n'
reply: retcode (550); Msg: b"5.1.1 That doesn't exist\n5.1.1 Learn more" | send: 'rcpt TO:<c@example.com>\r\n'
reply: b'250 Received\r\n' | send: 'data\r\n' | reply: b'354 Ready for receive message. End data with <CR><LF>.<CR><LF>\r\n'
reply: retcode (354); Msg: b'Ready for receive message. End data with <CR><LF>.<CR><LF>'
data: (354, b'Ready for receive message. End data with <CR><LF>.<CR><LF>')
send: b"Subject: hi\r\n\r\nit's me\r\n..220 x\r\n.\r\n" | reply: b'250 Received\r\n' | data: (250, b'Received')
send: 'quit\r\n' | reply: b'221 Closing connection\r\n' | reply: retcode (221); Msg: b'Closing connection'""",
    "curl": """
  % Total    % Received % Xferd  Average Speed   Time    Time     Time  Current
METER*   Trying 127.0.0.1:34591... | * Connected to 127.0.0.1 (127.0.0.1) port 34591 (#0) | < 220-mx.example.com ESMTP\r
< 220 ready\r | > EHLO a.com\r | METER< 250-Received\r | < 250-SIZE 10485760\r | < 250 AUTH LOGIN\r | > AUTH LOGIN\r
< 334 VXNlcm5hbWU6\r | > YWxpY2U=\r | METER< 334 UGFzc3dvcmQ6\r | > c2VjcmV0\r | < 235 Authentication succeeded\r
METER> MAIL FROM:<a@example.com> SIZE=42\r | < 250 Received\r | > RCPT TO:<bob@example.com>\r
< 550-5.1.1 That doesn't exist\r | < 550 5.1.1 Learn more\r | > RCPT TO:<c@example.com>\r | METER< 250 Received\r
> DATA\r | METER< 354 Ready for receive message. End data with <CR><LF>.<CR><LF>\r | } [42 bytes data]
* We are completely uploaded and fine
\r100    42    0     0  100    42      0      7  0:00:06  0:00:05  0:00:01     8< 250 Received\r
\r100    42    0     0  100    42      0      7  0:00:06  0:00:05  0:00:01    10
* Connection #0 to host 127.0.0.1 left intact""",
}
for before, after in {
    " | ": "\n",
    "TIME ": "2026-11-30 19:37:45\t",
    "INDENT ": "                   \t                  ",
    "METER": "\r  0     0    0     0    0     0      0      0 --:--:--  0:00:01 --:--:--     0",
}.items():
    LOGS = {tool: log.replace(before, after) for tool, log in LOGS.items()}

# What the server says in each of them.
LOGGED = f"""
connect: 220-mx.example.com ESMTP/220 ready, EHLO: 250-Received/250-SIZE 10485760/250 AUTH LOGIN,
AUTH: 235 Authentication succeeded, MAIL: 250 Received, RCPT: 550-5.1.1 That doesn't exist/550 5.1.1 Learn more,
RCPT: 250 Received, DATA: {READY}, message: 250 Received, QUIT: 221 Closing connection
"""

# Lines of transcripts, and what the server says in them at each stage; || is between sessions. The first x is skipped.
TRANSCRIPTS = read_rows(r"""
S: 220 hi | C: HELO a | S: 250 a | C: QUIT | S: 221 bye           => connect: 220 hi, HELO: 250 a, QUIT: 221 bye
S: 220 hi | C: HELO a | C: NOOP                                   => connect: 220 hi
x | C: RCPT TO:<a@a.com> | S: 450 No | C: ehlo a | S: 250-a | S: 250 DSN => RCPT: 450 No, EHLO: 250-a/250 DSN
S: 554 No | S: <closed>                                           => connect: 554 No <closed>
S: <closed>                                                       => connect: <closed>
S: 999 odd | C: NOOP | S: 999 odd                                 => connect: 999 odd, NOOP: 999 odd
S: odd | S: odder | C: NOOP | S: odd                              => connect: odd/odder, NOOP: odd
x | C: DATA | S: 354 go | C: <9 bytes> | S: 250 ok | C: NOOP | S: 250 ok => DATA: 354 go, message: 250 ok, NOOP: 250 ok
x | C: NOOP | S: 550 no | C: DATA | S: 354 go | C: QUIT | C: . | S: 250 ok | C: QUIT | S: 221 bye
                                         => NOOP: 550 no, DATA: 354 go, message: 250 ok, QUIT: 221 bye
x | C: DATA | S: 354 go | S: 250 ok                               => DATA: 354 go, message: 250 ok
x | C: DATA | S: 354 go | S: <closed>                             => DATA: 354 go <closed>
x | C: DATA | S: 354 go | C: hi | S: <closed>                     => DATA: 354 go, message: <closed>
x | C: DATA | S: 354 go | C: <9 bytes> | S: <reset>               => DATA: 354 go, message: <reset> after 9
x | C: DATA | S: 554 no | C: QUIT | S: 221 bye                    => DATA: 554 no, QUIT: 221 bye
x | C: BDAT 2 | S: 250 ok | C: BDAT 3 LAST | C: <5 bytes> | S: 250 ok | C: NOOP | S: 250 ok
                                                                  => BDAT: 250 ok, BDAT: 250 ok, NOOP: 250 ok
x | C: AUTH LOGIN | S: 334 VXNlcm5hbWU6 | C: *** | S: 334 UGFzc3dvcmQ6 | C: *** | S: 535 no => AUTH: 535 no
x | C: AUTH LOGIN | S: 334 VXNlcm5hbWU6 | S: 535 no               => AUTH: 535 no
x | C: AUTH LOGIN | S: 530 no | C: AUTH PLAIN AAAA | S: 535 no    => AUTH: 530 no at once, AUTH: 535 no
x | C: EHLO a | C: AUTH LOGIN | S: 250 a | S: 334 VXNlcm5hbWU6 | S: <closed> => EHLO: 250 a, AUTH: <closed>
x | C: MAIL FROM:<> | C: RCPT TO:<a@a.com> | S: 250 a | S: <closed> => MAIL: 250 a, RCPT: <closed>
x | C: NOOP | S: 250 ok | S: 421 Timeout | S: <closed>            => NOOP: 250 ok/421 Timeout <closed>
x | C: NOOP | S: <silence>                                        => NOOP: <silence>
S: 220 a | C: NOOP | S: 250 ok | S: 220 b | C: QUIT | S: 221 bye | S: 554 c => connect: 220 a, NOOP: 250 ok || connect: 220 b,
    QUIT: 221 bye || connect: 554 c
S: 220 a | C: DATA | S: 354 go | C: <3 bytes> | S: 220 b | S: <closed> | S: 421 c => connect: 220 a, DATA: 354 go
    || connect: 220 b <closed> || connect: 421 c
# RFC 2920, RFC 3207, RFC 4954 and RFC 3030
x | C: MAIL FROM:<a@a.com> | C: RCPT TO:<b@b.com> | C: DATA | S: 250 a | S: 250 b | S: 354 c | C: . | C: QUIT | S: 250 d | S: 221 e
    => MAIL: 250 a, RCPT: 250 b, DATA: 354 c, message: 250 d, QUIT: 221 e
S: <waits for a connection> | C: <opens connection> | S: 220 a | C: STARTTLS | S: 220 go | C: <starts TLS> | C: & S: <negotiate>
    | C & S: <check> | C: EHLO a | S: 250 b                       => connect: 220 a, STARTTLS: 220 go, EHLO: 250 b
S: 220-a | C: AUTH DIGEST-MD5 | S: 334 cmVhbG09ImVsd29vZC5pbm5vc29mdC5jb20iLG5vbmNlPSJPQTZNRzl0 | RVFHbTJoaCIscW9wPSJhdX | C:
    | S: 235 ok                                                   => connect: 220-a, AUTH: 235 ok
R: 220 a | S: BDAT 9 LAST | S: To: a@a.com<CR><LF> | S: Subject: x | R: 250 ok | S: QUIT | R: 221 bye => connect: 220 a,
    BDAT: 250 ok, QUIT: 221 bye
# what tools say of a connection
<-  220 a |  -> EHLO a | <~  250 b |  ~> NOOP | <~* 550 c | **> RSET | *** Remote host closed connection unexpectedly. | <-  220 d
    => connect: 220 a, EHLO: 250 b, NOOP: 550 c, RSET: <closed> || connect: 220 d
< 220 a | > EHLO a | < 250 b | > RCPT TO:<b@b.com> | * response reading failed (errno: 115) | > QUIT
    | * response reading failed (errno: 115) | *   Trying 127.0.0.1:25... | < 220 c => connect: 220 a, EHLO: 250 b, RCPT: <closed>
    || connect: 220 c
2017-06-16 15:04:31 SERVER -> CLIENT: 220 a | 2017-06-16 15:04:31 CLIENT -> SERVER: EHLO a.com
    | SERVER -> CLIENT: 250-b, [10.0.0.250]250-SIZE 35882577250-8BITMIME250 SMTPUTF8 | CLIENT -> SERVER: QUIT
    => connect: 220 a, EHLO: 250-b, [10.0.0.250]/250-SIZE 35882577/250-8BITMIME/250 SMTPUTF8
< 220 a | > NOOP | * Recv failure: Connection reset by peer | curl: (56) Recv failure: Connection reset by peer
    => connect: 220 a, NOOP: <reset>
10:00:00.1 reply: b"220 a's \xc3\xa4\r\n" | 10:00:00.2 send: 'rcpt TO:<д@b.com>\r\n' | 10:00:00.3 reply: b'250 b\r\n'
    | smtplib.SMTPServerDisconnected: Connection unexpectedly closed => connect: 220 a's ä, RCPT: 250 b <closed>
""")

# Transcripts with a mistake in them.
BAD_TRANSCRIPTS = read_rows(r"""
                                           => no line in it is marked as the server's (by S:, <- or <); it begins with ''
hello | world                              => no line in it is marked as the server's (by S:, <- or <); it begins with 'hello'
AUTH PLAIN AHVzZXIAc2VjcmV0                => no line in it is marked as the server's (by S:, <- or <); it begins with 'AUTH PLAIN ***'
x | C: AUTH LOGIN | S: 334 VXNlcm5hbWU6    => no line in it is marked as the server's (by S:, <- or <); it begins with 'x'
S: 250 ok | C: NOOP                        => there is no command before '250 ok'
<-  220 a | <-  250 ok                     => there is no command before '250 ok'
S: 220 a | C: NOOP | S: 250 ok | S: 550 no => there is no command before '550 no'
""")


def play_anew(transcript: str, pieces: Iterable[bytes]) -> str:
    """The transcript of a session with a default server that plays one, and receives these pieces."""
    server = Server()
    server.play(transcript)
    return Memory.of(server).record(pieces)


class PlayTest(ServerCase):
    def run_server(self, **options: Any) -> Server:
        server = Server(**options).start()
        self.addCleanup(server.__exit__)
        return server

    def test_what_a_server_said(self) -> None:
        for row in TRANSCRIPTS:
            with self.subTest(row.given):
                for end in ("\n", "\r\n", "\n        ", "\n\t"):
                    sessions = Memory.read_transcript(end.join(["", *row.given]))
                    self.assertEqual(" || ".join(map(", ".join, sessions)), row.expected)

    def test_logs(self) -> None:
        """Each is answered to another client as it was to the tool; a secret in it is not shown again."""
        for tool, log in LOGS.items():
            with self.subTest(tool):
                (said,) = Memory.read_transcript(log)
                self.assertEqual(said, re.split(r",\s+", LOGGED.strip())[: 8 if tool == "curl" else 9])
                server = self.run_server()
                server.play(log)
                with Smtp(server.port) as client:
                    client.user, client.password = "bob", "another"
                    self.assertEqual(client.ehlo("b.com"), (250, b"Received\nSIZE 10485760\nAUTH LOGIN"))
                    self.assertEqual(client.auth("LOGIN", client.auth_login), (235, b"Authentication succeeded"))
                    self.assertEqual(client.sendmail("x@x.com", ["y@y.com", "z@z.com"], "hi").keys(), {"y@y.com"})
                    if tool != "curl":
                        with self.assertRaisesRegex(AssertionError, "'221 Closing connection' at QUIT, of the tr"):
                            server.check()
                server.check()
                self.assertNotIn("c2VjcmV0", f"{server._rules.newest_first} {vars(server)} {server.sessions()}")

    def test_round_trip(self) -> None:
        """Played, and sent its lines again, a dialogue gives itself; but for bytes that are no reply, and secrets."""
        # A chunk that is too large is not counted as a body, and a token that is refused is told so in a challenge.
        others = ("rule: bytes that are no reply", "chunks that are too long together", "a refused token is explained")
        for title, entry in DIALOGUES.items():
            if not title.startswith(others):
                with self.subTest(title):
                    pieces = [read_sent(line) for line in entry.lines if line[0] != "S"]
                    recorded = Memory(**entry.options).record(pieces)
                    self.assertEqual(play_anew(recorded, pieces), recorded)

    def test_round_trip_of_random_dialogues(self) -> None:
        stages = ["EHLO", "HELO", "MAIL", "RCPT", "DATA", "message", "RSET", "NOOP", "QUIT", "FOO", "connect", "*"]
        greetings = ["450 4.2.0 later", "550 no", "", "odd", "421 Busy", "999"]
        replies = [*greetings, "250 ok", "250-a\n250 b", "354 go", "200 a\nb", None]
        lines = ["DATA", "RSET", "NOOP", "VRFY a", "FOO", "HELO", ".", "hi", "", "дядя", "QUIT"]
        for seed in range(500):
            rng = random.Random(seed)
            options: dict[str, Any] = {name: rng.random() < 0.3 for name in ("fail_fast", "multiple_rcptto")}
            memory = Memory(**options)
            for stage in rng.sample(stages, rng.randrange(6)):
                rule = memory.on(stage, times=rng.randrange(1, 4))
                if rng.random() < 0.8:
                    rule.reply(*rng.choices(greetings if stage in ("connect", "*") else replies, k=rng.randrange(1, 4)))
                if rng.random() < 0.2:
                    rng.choice((rule.close, rule.drop, rule.reset, rule.silence))()
            chosen = rng.choices([*ENVELOPE, *ENVELOPE[1:], *lines], k=rng.randrange(30))
            pieces = [line.encode() + b"\r\n" for line in chosen]
            with self.subTest(seed=seed):
                recorded = memory.record(pieces)
                self.assertEqual(play_anew(recorded, pieces), recorded)

    def test_through_tls_and_login(self) -> None:
        """A transcript through both is played with a certificate for tests, and to any login."""
        server = self.run_server(ssl_context="test", auth_users={"u": "p"}, extensions=["SIZE"], keep_all=True)
        server.on("RCPT", "bob@b.com").reply("450 4.2.0 Later")
        transcripts = []
        for password in ("p", "other"):
            with Smtp(server.port) as client:
                client.starttls(context=server.client_context())
                client.login("u", password)
                self.assertEqual(client.sendmail("a@a.com", ["bob@b.com", "c@b.com"], "hi").keys(), {"bob@b.com"})
            transcripts.append(server.messages()[-1].transcript)
            server = self.run_server(keep_all=True)
            server.play(transcripts[0])
        self.assertIn("S: 220 Ready to start TLS", transcripts[0])
        self.assertEqual(*(re.sub("S: 334 .*", "S: 334", text) for text in transcripts))

    def test_sessions_and_what_comes_after(self) -> None:
        """Each session of a transcript is for one connection. Replies after that are normal, but what was announced
        stays accepted, until reset()."""
        server = Server(not_registered_emails=["x@x.com"])
        items = ["EHLO a.com", "MAIL FROM:<> RET=FULL", "RCPT TO:<b@b.com>", "RCPT TO:<x@x.com>", "QUIT"]

        def hear() -> list[str]:
            return re.findall("(?m)^S: (.*)", Memory.of(server).record(read_pieces(items)))

        greylisted = "S: 220 a\nC: EHLO a\nS: 250-a\nS: 250 DSN\nC: RCPT TO:<b@b.com>\nS: 450 Later"
        server.play(f"{greylisted}\nC: QUIT\nS: 221 bye\n{greylisted.replace('450', '451')}")
        for *hello, reply, goodbye in (
            ("220 a", "250-a", "450 Later", "221 bye"),
            ("220 a", "250-a", "451 Later", "221 Closing connection"),
            ("220 Welcome", "250-Received", RECEIVED, "221 Closing connection"),
        ):
            self.assertEqual(hear(), [*hello, "250 DSN", RECEIVED, reply, "550 User not found", goodbye, "<closed>"])
        server.check()
        server.play(greylisted)
        server.on("RCPT").reply("550 Mine")
        items[0] = "HELO a.com"
        self.assertEqual([hear()[0], hear()[3]], ["220 a", "550 Mine"])
        missed = "'250-a\\n250 DSN' at EHLO, of the {0}\n'450 Later' at RCPT, of the {0}"
        with self.assertRaises(AssertionError) as caught:
            server.check()
        self.assertEqual(str(caught.exception), missed.format("transcript, was never reached"))
        items[0] = "EHLO a.com"
        for forget, extensions in ((server.clear_rules, ["250-Received", "250 DSN"]), (server.reset, [RECEIVED])):
            server.play(f"{greylisted}\n{greylisted}")
            forget()
            self.assertEqual(hear()[: 1 + len(extensions)], ["220 Welcome", *extensions])
        server.check()
        server.play(greylisted)
        self.assertEqual(hear()[0], "220 a")

    def test_long_transcripts(self) -> None:
        """Of 20 recipients, of two mails, and of 2 MB, in linear time."""
        ask = "C: RCPT TO:<a@a.com>\nS: 250 {0}\n"
        mail = "C: MAIL FROM:<>\nS: 250 a{0}\nC: DATA\nS: 354 b{0}\nC: <4 bytes>\nS: 250 c{0}\n"
        for unit, count, items in ((ask, 20, ["RCPT TO:<b@b.com>"]), (mail, 2, ["MAIL FROM:<>", "DATA", "hi", "."])):
            transcript = "S: 220 a\n" + "".join(map(unit.format, range(count)))
            played = play_anew(transcript, read_pieces(items * count))
            self.assertEqual(*(re.findall("S: .*", text) for text in (played, transcript)))
        for unit in (ask, "S: 250-a\n", "C: hi\n", "S: 220 a\n", "S: <closed>\n", " \t", "\n", "C: BDAT 9\n"):
            times = []
            for size in (100_000, 400_000):
                began = time.process_time()
                with contextlib.suppress(ConfigurationError):
                    Server().play("S: 220 a\nC: EHLO a\n" + unit * (size // len(unit)))
                times.append(time.process_time() - began)
            with self.subTest(unit):
                self.assertLess(times[1], 8 * times[0] + 0.1)

    def test_bad_transcripts(self) -> None:
        server = Server()
        for row in BAD_TRANSCRIPTS:
            with self.subTest(row.given), self.assertRaisesRegex(ConfigurationError, rf"\Aplay: {row.pattern[6:]}"):
                server.play("\n".join(row.given))
        for value in (None, b"S: 220 a", "S: \ud800"):
            with self.assertRaisesRegex(ConfigurationError, "play=.*: must be a string without lone surrogates"):
                server.play(value)  # type: ignore[arg-type]
        self.assertEqual(Memory.of(server).record([b"NOOP\r\n"]), "S: 220 Welcome\nC: NOOP\nS: 250 Ok")

    def test_elsewhere(self) -> None:
        """On the command line."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "session.log")
            path.write_bytes(LOGS["curl"].encode() + b"\xff")
            codes: list[int] = []

            def use(port: int) -> None:
                for _ in range(2):
                    with Smtp(port) as client:
                        codes.append(client.rcpt("b@b.com")[0])

            run_main(use, "-port=0", f"-play={path}", "-quiet")
            self.assertEqual(codes, [550, 503])
            error = f"smtpmock: -play='{path}2': cannot be read: No such file or directory\n"
            self.assertEqual(call_main(f"-play={path}2"), (2, "", error))
            path.write_text("nothing")
            error = "-play: no line in it is marked as the server's (by S:, <- or <); it begins with 'nothing'\n"
            self.assertIn(error, call_main(f"-play={path}")[2])


# ------------------------------------------------------------------------------------------ profiles

# What a server with a profile answers to the last of these commands.
PROFILED = read_rows("""
HELLO | MAIL | RCPT TO:<x@x.com> => 550 5.1.1 <x@x.com>: Recipient address rejected: User unknown in local recipient table
     -- profile="postfix"
helo y.com       => 554 5.7.1 <y.com>: Helo command rejected: Access denied  -- profile="postfix"
HELO a.com       => 250 mail.example.com Hello a.com [127.0.0.1]  -- profile="exim"
QUIT             => 221 2.0.0 Bye  -- profile="opensmtpd"
QUIT             => 221 2.0.0 closing connection - gsmtp  -- profile="gmail"
HELLO | MAIL     => 250 2.1.0 Sender OK  -- profile="outlook"
QUIT             => 221 Bye  -- profile="ses"
QUIT             => 221 mine  -- profile="ses", msg_quit_cmd="221 mine"
QUIT             => 221 .  -- msg_quit_cmd="221 {address}{address}."
HELLO | MAIL     => 250 a@a.com and a@a.com  -- msg_mailfrom_received="250 {address} and {address}"
HELLO | MAIL FROM:<> => 250 <>  -- msg_mailfrom_received="250 <{address}>"
HELLO | MAIL FROM:a  => 501 .  -- msg_invalid_cmd_mailfrom_arg="501 {address}."
HELLO | MAIL | RCPT | DATA => 354 b@b.com  -- msg_data_received="354 {address}"
""")


class ProfileTest(unittest.TestCase):
    def test_replies(self) -> None:
        options: Any = {"not_registered_emails": ["x@x.com"], "blacklisted_helo_domains": ["y.com"]}
        for row in PROFILED:
            with self.subTest(row):
                memory = Memory(**options, **row.options)
                said = [memory.feed(piece) for piece in read_pieces(row.given)][-1]
                self.assertEqual([line for line in said if line != "<closed>"], [row.expected])

    def test_each_profile(self) -> None:
        """It has replies with codes, and accepts what it announces."""
        for name in ("postfix", "exim", "opensmtpd", "gmail", "outlook", "ses"):
            with self.subTest(name):
                options = Configuration(profile=name)
                fields = [field for field in dataclasses.fields(options) if field.name.startswith("msg_")]
                self.assertGreater(sum(getattr(options, field.name) != field.default for field in fields), 9)
                for field in fields:
                    self.assertRegex(str(getattr(options, field.name)), r"\A((\d{3}-.+\n)*\d{3} .+|\d{8,})\Z")
                lines = Memory(profile=name).feed(b"EHLO a.com\r\n")[1:]
                self.assertIn(f"250-SIZE {options.msg_size_limit}", lines[:-1])
                self.assertEqual(len(lines), len(options.extensions))

    def test_options_win(self) -> None:
        """Over the profile, wherever either is given; the profile can be changed."""
        given = Configuration(profile="exim", msg_noop_received="250 mine")
        server = Server(given, profile="postfix")
        for changes, goodbye in (
            ({}, "2.0.0 Bye"),
            ({"profile": "ses"}, "Bye"),
            ({"msg_quit_cmd": "221 other"}, "other"),
            ({"profile": None}, "other"),
            (None, "2.0.0 Bye"),
        ):
            server.reset() if changes is None else server.configure(**changes)
            said = Memory.of(server).record([b"NOOP\r\n", b"QUIT\r\n"]).splitlines()
            self.assertEqual(said[2:5:2], ["S: 250 mine", f"S: 221 {goodbye}"])
        self.assertEqual(given, copy.copy(given))
        self.assertEqual(pickle.loads(pickle.dumps(given)), given)
        self.assertNotEqual(given, Configuration(profile="exim"))
        wrong: dict[Any, str] = {
            "exmi": "'exmi' is unknown; did you mean exim",
            "": "'' is unknown; there are postfix, ",
            1: "=1: must be a str",
        }
        for name, text in wrong.items():
            with self.assertRaisesRegex(ConfigurationError, f"profile.*{text}"):
                Configuration(profile=name)

    def test_an_address_in_a_reply(self) -> None:
        """Also in that of a rule. It cannot end the reply. Other replies are made once."""
        memory = Memory(*ENVELOPE[:2], rules=["RCPT: reply 550 <{address}> no", "VRFY: reply 550 {address}."])
        self.assertEqual(memory.say("RCPT TO:<b@b.com>", "VRFY x"), ["550 <b@b.com> no", "550 x."])
        memory = Memory(ENVELOPE[0], rules=["MAIL: reply 250 {address}"])
        self.assertEqual(memory.feed(b"MAIL FROM:<a\rb\xff>\r\n"), [r"250 a\rb\udcff"])
        memory = Memory(handlers=[make_handler("XTRA", "250 {address}!", parse=staticmethod(str))])
        self.assertEqual(memory.say("XTRA you"), ["250 you!"])
        for text in (RECEIVED, "250 {address}"):
            first, second = Memory(msg_mailfrom_received=text).replies(b"NOOP\r\nNOOP\r\n")
            self.assertIs(first, second)


class HandlerTest(unittest.TestCase):
    def test_added_with_its_rules(self) -> None:
        expand = make_handler(
            "EXPN", "250 one of {msg_size_limit}", verbs=("EXPN", "expand"), needs=("helo",), bad_argument="501 whom?",
            parse=staticmethod(lambda argument: argument or None),
        )  # fmt: skip
        memory = Memory(handlers=[expand], msg_size_limit=9, msg_invalid_cmd_helo_sequence="503 custom")
        replies = memory.say("EXPN x", "HELO a.com", "EXPN", "expn x", "EXPAND y", "NOOP")
        self.assertEqual(replies, ["503 custom", RECEIVED, "501 whom?", "250 one of 9", "250 one of 9", "250 Ok"])
        self.assertEqual(Memory(handlers=[expand], rules=["expn x: reply 252 maybe"]).say("EXPN x"), ["252 maybe"])

    def test_verbs_that_are_also_stages(self) -> None:
        memory = Memory(handlers=[make_handler("", "250 hello", verbs=("CONNECT", "MESSAGE"))])
        self.assertEqual(memory.greet(), ["220 Welcome"])
        replies = memory.say("CONNECT", "message", *ENVELOPE, *SEND[2:])
        self.assertEqual(replies, ["250 hello"] * 2 + [RECEIVED] * 3 + [READY, RECEIVED])

    def test_what_it_may_do(self) -> None:
        """Return any text from refuse(), read the message so far, raise, and have a secret."""

        class Login(smtpmock.Handler):
            verbs, received, has_secret = ("LOGIN",), "msg_noop_received", True

            def parse(self, argument: str) -> str:
                return argument[:1] or str(1 / 0)

            def refuse(self, session: Any, value: Any) -> str | None:
                return {"a": None, "b": "nonsense", "c": f"550 {session.message().helo_request}"}[value]

        memory = Memory(handlers=[Login])
        failed = "451 Local error in processing"
        replies = memory.say("EHLO a.com", "login a b", "LOGIN b", "LOGIN c", "LOGIN", "LOGIN d", "NOOP")
        self.assertEqual(replies, [RECEIVED, "250 Ok", "nonsense", "550 EHLO a.com", failed, failed, "250 Ok"])
        self.assertRegex(memory.recorder.wait_for("KeyError: 'd'")[1], "^Login failed: Traceback ")
        self.assertIn("C: login ***\nS: 250 Ok\nC: LOGIN ***\n", memory.message().transcript)

    def test_which_lines_a_server_keeps(self) -> None:
        """Not many, and none that may hold a secret."""
        noop = make_handler("", "250 hello", verbs=("NOOP",), has_secret=True)
        memory = Memory(auth_users={"u": "p"}, handlers=[noop], multiple_rcptto=True)
        memory.say("EHLO a.com", "NOOP secret", "AUTH LOGIN", "secret", "*", "NOOPsecret", "QUITE secret", *ENVELOPE)
        self.assertEqual(memory.kept_lines(), [f"{line}\r" for line in ENVELOPE])
        memory.say(*(f"RCPT TO:<{number}@b.com>" for number in range(2000)))
        self.assertLess(len(memory.kept_lines()), 1000)


# --------------------------------------------------------------------------------------------- AUTH


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class AuthTest(ServerCase):
    """What the dialogues do not show: what is kept, and what is not."""

    SUCCEEDED, FAILED = "235 Authentication succeeded", "535 Authentication credentials invalid"

    def memory(self, users: Any) -> Memory:
        return Memory("EHLO a.com", auth_users=users)

    def test_cram_md5(self) -> None:
        challenges = set()
        for secret, expected in (("sécret", self.SUCCEEDED), ("", self.FAILED), ("wrong", self.FAILED)):
            memory = self.memory({"alice": "sécret"})
            challenge = base64.b64decode(memory.say("AUTH CRAM-MD5")[0].removeprefix("334 "))
            challenges.add(challenge)
            digest = hmac.new(secret.encode(), challenge, "md5").hexdigest()
            self.assertEqual(memory.say(b64(f"alice {digest}")), [expected])
        self.assertEqual(len(challenges), 3)
        for answer in ("nobody x", "bob x"):
            self.assertEqual(self.memory({"bob": ""}).say("AUTH CRAM-MD5", b64(answer))[1], self.FAILED)

    def test_a_function(self) -> None:
        seen: list[tuple[str, ...]] = []

        def check(*asked: str) -> bool:
            seen.append(asked)
            return asked[1] == "alice"

        self.assertEqual(self.memory(check).say("AUTH PLAIN " + b64("\0alice\0s")), [self.SUCCEEDED])
        self.assertEqual(self.memory(check).say("AUTH LOGIN " + b64("bob"), b64("t"))[1], self.FAILED)
        challenge, reply = self.memory(check).say("AUTH CRAM-MD5", b64("alice abc"))
        self.assertEqual(reply, self.SUCCEEDED)
        text = base64.b64decode(challenge[4:]).decode()
        self.assertEqual(seen, [("PLAIN", "alice", "s"), ("LOGIN", "bob", "t"), ("CRAM-MD5", "alice", f"{text} abc")])

    def test_an_exchange_that_fails_leaves_nothing(self) -> None:
        for lines, reply in (
            (["AUTH PLAIN " + b64("\0bob\0")], "451 Local error in processing"),
            (["AUTH LOGIN", b64("a"), b64("b")], "451 Local error in processing"),
            (["AUTH LOGIN", "x" * 13000], "500 Line too long"),
        ):
            replies = self.memory(lambda *_: 1 / 0).say(*lines, "AUTH CRAM-MD5", "*")
            self.assertEqual((replies[-3], replies[-1]), (reply, "501 Authentication cancelled"))

    def test_a_secret_is_not_shown(self) -> None:
        """But the verb is, and a mechanism that is known."""
        for lines, shown in {
            "AUTH c2VjcmV0": "AUTH ***",
            "auth PLAIN=c2VjcmV0": "auth ***",
            "AUTH PLAIN c2VjcmV0": "AUTH PLAIN ***",
            "auth  plain   c2VjcmV0": "auth plain ***",
            "AUTH SECRET c2VjcmV0": "AUTH *** ***",
            "AUTH": "AUTH",
            "AUTH login c2VjcmV0 | c2VjcmV0": "AUTH login *** | ***",
            "AUTH LOGIN | *": "AUTH LOGIN | *",
            "AUTH PLAIN c2VjcmV0 | c2VjcmV0": "AUTH PLAIN *** | ***",  # a login in two lines by mistake
            "AUTH LOGIN | c2VjcmV0 | c2VjcmV0 | +": "AUTH LOGIN | *** | *** | ***",
            "AUTH NTLM | c2VjcmV0": "AUTH *** | ***",
            "AUTH=PLAIN c2VjcmV0 | AUTH: PLAIN c2VjcmV0": "AUTH= *** | AUTH: ***",
        }.items():
            for users in ({"alice": "secret"}, None)[: 1 if "*" in lines else 2]:
                with self.subTest(lines, users=users):
                    server, client, recorder = self.serve(auth_users=users)
                    client.send("\r\n".join(["EHLO a.com", *read_items(lines), "QUIT", ""]).encode())
                    client.read_all()
                    (message,) = server.wait_for_messages(1, TIMEOUT)
                    server.stop()
                    recorder.wait_for("was stopped")
                    kept = str(recorder.seen) + pickle.dumps(message).decode("latin-1") + repr(message.to_dict())
                    self.assertNotIn("c2VjcmV0", kept)
                    requests = re.findall("(?m)^C: (.*)", message.transcript)
                    self.assertEqual(requests, ["EHLO a.com", *read_items(shown), "QUIT"])


# ---------------------------------------------------------------------------------------- processes


@functools.cache
def compiled_copy() -> str:
    """A folder with a copy of the module and its bytecode, for all processes: CI keeps no bytecode."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    py_compile.compile(shutil.copy(HERE / "smtpmock.py", folder), doraise=True)
    return folder


class ProcessCase(unittest.TestCase):
    def launch(self, *arguments: str, cwd: str | Path | None = None, **options: Any) -> Any:
        """A Python process, with pipes."""
        process = subprocess.Popen(
            [sys.executable, "-S", *arguments],  # it needs no other packages, and starts sooner without them
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd or compiled_copy(), **options,
        )  # fmt: skip
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def start(self, *argv: str, **options: Any) -> Any:
        return self.launch("-m", "smtpmock", *argv, **options)

    def port(self, process: Any) -> int:
        """The port that it says it listens on."""
        pattern = r'smtpmock: listening on 127\.0\.0\.1:(\d+)\n|\{"event": "listening", .*"port": (\d+), .*\n'
        match = re.fullmatch(pattern, process.stdout.readline())
        assert match is not None
        return int(match[1] or match[2])

    def stop(self, process: Any, status: int = 0) -> Any:
        """Stop a process; what is left of what it prints, on stdout and on stderr."""
        process.terminate()
        said = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, status)
        return said

    def finish(self, process: Any, said: str | None = None) -> str:
        """What is left of what a process prints, which ends well and says nothing on its stderr."""
        out, err = process.communicate(said, timeout=TIMEOUT)
        self.assertEqual((process.returncode, err), (0, ""))
        return str(out)

    def run_python(self, code: str, *flags: str, folder: str | Path | None = None) -> str:
        """What a program prints."""
        return self.finish(self.launch(*flags, "-c", textwrap.dedent(code), cwd=folder))


def call_main(*argv: str) -> tuple[int, str, str]:
    """Call main(); its exit status, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = smtpmock.main(argv)
    return status, out.getvalue(), err.getvalue()


# ---------------------------------------------------------------------------------------------- TLS


class TlsTest(ProcessCase):
    pem: Path

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.pem = Path(folder.name, "localhost.pem")
        cls.pem.write_text(Memory.test_pem())

    def server(self, **options: Any) -> Server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.pem)
        self.recorder = Recorder()
        return Server(ssl_context=context, logger=self.recorder, **options)

    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.pem)

    def connect_ssl(self, server: Server | int) -> smtplib.SMTP_SSL:
        port = server if isinstance(server, int) else server.port
        return smtplib.SMTP_SSL("127.0.0.1", port, timeout=TIMEOUT, context=self.trusting())

    def test_starttls(self) -> None:
        with self.server(auth_users={"u": "s"}, auth_requires_tls=True, tls_required=True) as server:
            with Smtp(server) as client:
                client.ehlo()
                self.assertEqual((client.has_extn("starttls"), client.has_extn("auth")), (True, False))
                client.starttls(context=self.trusting())
                self.assertEqual(client.docmd("MAIL FROM:<a@a.com>")[0], 503)  # what was said before is forgotten
                client.ehlo()
                self.assertFalse(client.has_extn("starttls"))
                self.assertEqual(client.docmd("STARTTLS"), (503, b"Bad sequence of commands. TLS is on already"))
                client.login("u", "s")
                client.sendmail("a@a.com", ["b@b.com"], b"Subject: x\r\n\r\n" + b"y" * 100_000)
            (message,) = server.messages()
        self.assertRegex(str(message.tls), r"^\('TLSv1\.[23]', '[A-Z0-9_-]+'\)$")
        self.assertEqual((len(message.content), message.auth_user, message.quit_sent), (100_016, "u", True))
        self.assertIn("with ESMTPSA id", message.received_header)
        self.assertEqual(message.to_dict()["tls"], list(message.tls or ()))
        self.assertTrue(message.transcript.startswith("S: 220 Welcome\nC: ehlo"))

    def test_what_was_said_before_it_is_forgotten(self) -> None:
        """The hello and the login. Each mail after it has its cipher."""
        options: dict[str, Any] = {"auth_users": {"u": "s"}, "auth_required": True, "ssl_context": True}
        login = f"AUTH PLAIN {b64(chr(0) + 'u' + chr(0) + 's')}"
        options |= {"multiple_message_receiving": True, "msg_invalid_cmd_starttls_sequence": "503 custom"}
        memory = Memory("EHLO a.com", login, "STARTTLS", **options)
        memory.secure()
        replies = memory.say("STARTTLS", "HELO a.com", "MAIL FROM:<a@a.com>", login)
        self.assertEqual([reply[:10] for reply in replies], ["503 custom", "250 Receiv", "530 Authen", "235 Authen"])
        memory.say(*SEND, *SEND)
        kept = [(message.auth, message.tls) for message in memory.messages()]
        self.assertEqual(kept, [(True, ("TLSv1.3", "AES"))] * 3)  # the first is the MAIL before AUTH

    def test_a_reply_that_the_client_does_not_read_at_once(self) -> None:
        """It is sent as a whole, and the client is told that nothing follows."""
        with self.server(implicit_tls=True, msg_noop_received="250 " + "x" * 5_000_000) as server:
            with Client(server, greets=False) as plain:
                options: dict[str, Any] = {"server_hostname": "localhost", "suppress_ragged_eofs": False}
                with self.trusting().wrap_socket(plain.socket, **options) as client:
                    client.sendall(b"NOOP\r\n")
                    self.recorder.wait_for("response: 250 x")
                    client.sendall(b"QUIT\r\n")
                    data = b"".join(iter(lambda: client.recv(1 << 20), b""))
        self.assertEqual(data, b"220 Welcome\r\n250 %b\r\n221 Closing connection\r\n" % (b"x" * 5_000_000))

    def test_what_was_sent_before_the_handshake_has_no_effect(self) -> None:
        with self.server() as server, Client(server) as client:
            client.ask("HELO a.com")
            client.send(b"STARTTLS\r\nMAIL FROM:<evil@a.com>\r\nRSET\r\nNOOP")
            self.assertEqual(client.read(), "220 Ready to start TLS")
            with self.trusting().wrap_socket(client.socket, server_hostname="localhost") as secure:
                secure.sendall(b"EHLO b.com\r\nRCPT TO:<b@b.com>\r\nQUIT\r\n")
                replies = b"".join(iter(lambda: secure.recv(1000), b"")).decode().splitlines()
            self.assertEqual([reply[:3] for reply in replies], ["250", "503", "221"])
        (message,) = server.messages()
        self.assertEqual((message.mail_from, message.helo_request), (None, "EHLO b.com"))
        self.assertNotIn("evil", message.transcript)

    def test_a_disconnect(self) -> None:
        """Within TLS, and in the middle of a handshake."""
        for reset, end in ((False, "<closed>"), (True, "<reset>")):
            with self.subTest(reset=reset), self.server(implicit_tls=True) as server:
                with Client(server, greets=False) as begins, self.connect_ssl(server) as client:
                    client.ehlo()
                    self.assertFalse(client.has_extn("starttls"))
                    self.assertTrue(wait_until(lambda: "open sessions: 2" in report(server)))
                    server.disconnect(reset=reset)
                    self.assertEqual(([message.helo for message in server.messages()], begins.read()), ([True], end))
                    catch(OSError if reset else smtplib.SMTPServerDisconnected, client.noop)
                with self.connect_ssl(server) as client:
                    self.assertEqual(client.noop()[0], 250)

    def test_certificates_as_a_client_sees_them(self) -> None:
        for context, host, expected in (
            (ssl.create_default_context(), "localhost", "self.signed certificate"),
            (self.trusting(), "mx.example.com", "(?i)hostname mismatch"),
        ):
            with self.server(implicit_tls=True) as server, Client(server, greets=False) as client:
                with self.assertRaisesRegex(ssl.SSLCertVerificationError, expected):
                    context.wrap_socket(client.socket, server_hostname=host)
                level, line = self.recorder.wait_for("SMTP session broke off: TLS")
                self.assertEqual((level, len(line.splitlines()), server.messages()), ("warning", 1, []))

    def test_no_tls_where_tls_is(self) -> None:
        with self.server(implicit_tls=True) as server:
            with Client(server, greets=False) as client:
                client.send(b"EHLO a.com\r\n")
                self.assertNotEqual(client.read()[:3], "220")
            text = "TLS handshake failed: .*; the client must begin TLS, because of implicit_tls"
            self.assertTrue(wait_until(lambda: re.search(text, report(server))), report(server))

    def test_clients_that_stall_in_the_handshake(self) -> None:
        server = self.server(implicit_tls=True, shutdown_timeout=10 * TIMEOUT).start()
        with contextlib.ExitStack() as stack:
            for number in range(100):
                stack.enter_context(Client(server, greets=False)).send(b"\x16\x03\x01"[: number % 4])
            for _ in range(100):
                self.recorder.wait_for("SMTP session started")
            with self.connect_ssl(server) as other:
                self.assertEqual(other.noop()[0], 250)
            stop_in_time(server)
        self.recorder.wait_for("SMTP mock server was stopped successfully")

    def test_timeouts(self) -> None:
        with self.server(implicit_tls=True, session_timeout=0.2) as server:
            with Client(server) as client, contextlib.closing(self.connect_ssl(server)) as other:
                self.assertEqual(other.getreply(), (421, b"Session timeout, closing connection"))
                self.assertIn(client.greeting, ("<closed>", "<reset>"))  # it did not begin the handshake

    def test_stops(self) -> None:
        """A client may QUIT, and is told when it is too late."""
        for seconds in (0.0, 10 * TIMEOUT):
            server = self.server(implicit_tls=True, shutdown_timeout=10 * TIMEOUT).start()
            patch = mock.patch.object(smtpmock, "_QUIT_TIMEOUT", seconds)
            with patch, contextlib.closing(self.connect_ssl(server)) as client:
                client.sendmail("a@a.com", ["b@b.com"], "hi")
                with in_background(functools.partial(stop_in_time, server)):
                    self.recorder.wait_for("shutdown mode")
                    self.assertEqual(client.quit()[0] if seconds else client.getreply()[0], 221 if seconds else 421)
                self.assertFalse(server.is_running)

    def test_a_farewell_that_the_client_does_not_read(self) -> None:
        """It is tried once, and the session breaks off."""
        server = self.server(implicit_tls=True, session_timeout=0.2, msg_server_shutdown="421 " + "x" * 5_000_000)
        with contextlib.closing(self.connect_ssl(server.start())) as client:
            client.noop()
            server.stop()
        self.recorder.wait_for("stopped successfully")
        self.assertEqual(len([text for _, text in self.recorder.seen if "response: 421" in text]), 1)
        server.check()

    def test_rules(self) -> None:
        with self.server() as server:
            Memory.add_rules(server, ["STARTTLS: reply 454 TLS not available; times=1", "NOOP: reset"])
            with Smtp(server) as client:
                client.ehlo()
                self.assertEqual(client.docmd("STARTTLS"), (454, b"TLS not available"))
                client.starttls(context=self.trusting())
                catch(smtplib.SMTPServerDisconnected, client.noop)
            Memory.add_rules(server, ["STARTTLS: reply 220 go; close"])
            with Smtp(server) as client, self.assertRaises((ssl.SSLError, OSError)):
                client.starttls(context=self.trusting())

    def test_the_command_line(self) -> None:
        def use(port: int) -> None:
            with self.connect_ssl(port) as client:
                client.login("u", "s")
                client.sendmail("a@a.com", ["b@b.com"], "hi")

        self.assertEqual(run_main(use, f"-tlsCert={self.pem}", "-authUsers=u:s", "--implicit-tls")[1:], ("", 0))


class CertificateTest(ProcessCase):
    """The certificates for tests."""

    def connect(self, server: Server, host: str, context: ssl.SSLContext | None = None) -> dict[str, Any]:
        """The certificate that a client gets, which is as strict as it can be."""
        context = context or server.client_context()
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.set_ciphers("DEFAULT:@SECLEVEL=2")
        with smtplib.SMTP(server.host, server.port, timeout=TIMEOUT) as client:
            client._host = host  # type: ignore[attr-defined]  # what smtplib compares with the certificate
            client.starttls(context=context)
            client.sendmail("a@a.com", ["b@b.com"], "hi")
            return dict(client.sock.getpeercert())  # type: ignore[union-attr]

    def test_each(self) -> None:
        names: dict[Any, str] = {"test": "", "expired": "certificate has expired", "wrong host": "mismatch"}
        for name, host in itertools.product(names, ("localhost", "127.0.0.1", "::1")):
            with self.subTest(name, host=host), Server(ssl_context=name) as server:
                if names[name]:
                    with self.assertRaisesRegex(ssl.SSLCertVerificationError, names[name]):
                        self.connect(server, host)
                else:
                    self.connect(server, host)
                with self.assertRaisesRegex(ssl.SSLCertVerificationError, "unable to get local issuer"):
                    self.connect(server, host, ssl.create_default_context())

    def test_what_is_in_it(self) -> None:
        with Server(ssl_context="test") as server:
            found = self.connect(server, "localhost")
        names = (("DNS", "localhost"), ("IP Address", "127.0.0.1"), ("IP Address", "0:0:0:0:0:0:0:1"))
        self.assertEqual(found["subjectAltName"], names)
        dates = ("Jan  1 00:00:00 2000 GMT", "Jan  1 00:00:00 2100 GMT")
        self.assertEqual((found["notBefore"], found["notAfter"]), dates)
        self.assertNotRegex((HERE / "smtpmock.py").read_text(encoding="utf-8"), "BEGIN [A-Z]|MI[IGH][A-Za-z0-9+/]{20}")

    def test_another_context_or_none(self) -> None:
        for server in (Server(), Server(ssl_context=Memory.load_test_context("test"))):
            with self.assertRaisesRegex(ServerStateError, 'no certificate for tests; ssl_context="test" gives it one'):
                server.client_context()

    def test_where_the_key_is(self) -> None:
        """In memory; or in a file of ours, which is gone afterwards."""
        load, paths = ssl.SSLContext.load_cert_chain, list[str]()

        def look(context: ssl.SSLContext, path: str) -> None:
            paths.append(path)
            if not path.startswith("/proc/self/fd/"):  # which other users cannot open, whatever its mode
                self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
            load(context, path)

        with mock.patch.object(ssl.SSLContext, "load_cert_chain", look):
            Memory.load_test_context("test")
            with mock.patch.object(os, "memfd_create", create=True, side_effect=OSError("forbidden")):
                Memory.load_test_context("test")
            with mock.patch.object(smtpmock, "os", types.SimpleNamespace(unlink=os.unlink)):  # another system
                Memory.load_test_context("test")
        self.assertEqual(paths[0].startswith("/proc/self/fd/"), hasattr(os, "memfd_create"))
        for path in paths:
            self.assertFalse(os.path.lexists(path))
        self.assertNotIn("/proc", "".join(paths[1:]))

    def test_the_command_line(self) -> None:
        """The file may be new, or empty, or have the same in it."""

        def use(port: int) -> None:
            context = ssl.create_default_context(cafile=path)
            smtplib.SMTP_SSL("localhost", port, timeout=TIMEOUT, context=context).quit()

        with tempfile.TemporaryDirectory() as folder:
            path, other = Path(folder, "ca.pem"), Path(folder, "other.pem")
            for before in (None, b"", Memory.test_ca()):
                if before is not None:
                    path.write_bytes(before)
                self.assertEqual(run_main(use, "-tlsCert=test", f"-saveCa={path}", "-implicitTls")[1:], ("", 0))
                self.assertEqual(path.read_bytes(), Memory.test_ca())
            for place, before, reason in (
                (other, b"x", "there is something else in it"),
                (other, Memory.test_ca() + b"x", "there is something else in it"),
                (Path(folder), None, "Is a directory"),
                (Path(folder, "missing", "ca.pem"), None, "No such file or directory"),
            ):
                if before is not None:
                    place.write_bytes(before)
                error = f"smtpmock: cannot write to {place}: {reason}\n"
                self.assertEqual(call_main("-tlsCert=test", f"-saveCa={place}"), (1, "", error))
                self.assertEqual(place.read_bytes() if place.is_file() else None, before)
            self.assertEqual(sorted(os.listdir(folder)), ["ca.pem", "other.pem"])


# ------------------------------------------------------------------- starting, stopping and serving


class StartTest(ServerCase):
    def test_life(self) -> None:
        server = Server()
        self.assertEqual((server.host, server.is_running), ("127.0.0.1", False))
        with self.assertRaisesRegex(ServerStateError, "127.0.0.1:0.*cannot stop: it is not running"):
            server.stop()
        self.assertIs(server.start(), server)
        port = server.port
        self.assertEqual((server.is_running, port != 0), (True, True))
        with self.assertRaisesRegex(ServerStateError, f"127.0.0.1:{port}.*cannot start: it is running"):
            server.start()
        server.stop()
        self.assertEqual((server.port, server.is_running), (port, False))
        self.assert_nothing_is_left(server)
        for count in (1, 2, 3):
            with server, Client(server) as client:
                self.assertEqual(client.ask("HELO a.com", "QUIT")[0], RECEIVED)
            self.assertEqual(len(server.messages()), count)
        with server:
            server.stop()
        with self.assertRaises(ZeroDivisionError), server:
            raise ZeroDivisionError
        self.assertFalse(server.is_running)
        self.assert_nothing_is_left(server)

    def test_port_in_use(self) -> None:
        with Server() as first:
            second = Server(port=first.port, logger=(recorder := Recorder()))
            error = catch(ServerStartError, second.start)
            self.assertRegex(str(error), f"^cannot listen on 127.0.0.1:{first.port}: .*in use")
            self.assertEqual((type(error.errno), recorder.wait_for("cannot listen")[0]), (int, "error"))
            self.assertFalse(second.is_running)
            with contextlib.redirect_stderr(io.StringIO()) as err:
                catch(ServerStartError, Server(port=first.port, log_to_stdout=True).start)
            self.assertRegex(err.getvalue(), "^ERROR: .* cannot listen on ")
        with second:
            pass
        self.assert_nothing_is_left(second)

    def test_hosts_that_cannot_be_had(self) -> None:
        for host in ("192.0.2.1", "\x00", "ä" * 70):
            with self.subTest(host), self.assertRaisesRegex(ServerStartError, "^cannot listen on "):
                Server(host=host).start()
        error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with mock.patch.object(socket, "getaddrinfo", side_effect=error):
            with self.assertRaisesRegex(ServerStartError, "^cannot listen on a.invalid:0: Name or service not known$"):
                Server(host="a.invalid").start()

    def test_hosts(self) -> None:
        hosts = {"127.0.0.1": "127.0.0.1", "localhost": "localhost"}
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            hosts |= {"::1": "::1", "[::1]": "::1", "[::]": "::"}
        for host, reached_at in hosts.items():
            with self.subTest(host), Server(host=host) as server, Client(server) as client:
                self.assertEqual((server.host, client.greeting), (reached_at, "220 Welcome"))
                if host == "[::]" and socket.has_dualstack_ipv6():  # every address, be it of IPv4
                    send(server.port, "hi")

    def test_threads_are_used_again(self) -> None:
        """But not kept in any number."""
        served: list[threading.Thread] = []
        with Server(on_message=lambda message: served.append(threading.current_thread())) as server:

            def is_used_again() -> bool:
                send(server, "hi")
                return len(set(served)) < len(served)

            self.assertTrue(wait_until(is_used_again))
            with contextlib.ExitStack() as stack:
                for _ in range(50):
                    stack.enter_context(Client(server))
                self.assertGreater(len(self.threads()), 50)
            self.assertTrue(wait_until(lambda: len(self.threads()) < 40))

    def test_the_listener_sleeps_until_there_is_something_to_do(self) -> None:
        select = selectors.DefaultSelector.select
        with mock.patch.object(selectors.DefaultSelector, "select", autospec=True, side_effect=select) as selects:
            with Server(session_timeout=0.05) as server, contextlib.ExitStack() as stack:
                for client in [stack.enter_context(Client(server)) for _ in range(3)]:
                    client.read_all()
        self.assertLessEqual(selects.call_count, 4)  # three clients and the stop

    def test_starts_and_stops_at_once(self) -> None:
        server = Server()
        for result in in_threads(*[server.start, server.stop] * 8):
            self.assertTrue(result is None or result is server or isinstance(result, ServerStateError), result)
        with contextlib.suppress(ServerStateError):
            server.stop()
        self.assert_nothing_is_left(server)

    def test_no_descriptor_or_thread_no_server(self) -> None:
        server = Server()
        too_many = OSError(errno.EMFILE, "Too many open files")
        for owner, name, error in (
            (socket, "socket", too_many),
            (socket, "socketpair", too_many),
            (selectors, "DefaultSelector", too_many),
            (threading.Thread, "start", RuntimeError("can't start new thread")),
        ):
            with self.subTest(name), mock.patch.object(owner, name, side_effect=error), warnings.catch_warnings():
                warnings.simplefilter("error")
                found = catch(ServerStartError, server.start)
                self.assertTrue(str(found).endswith(str(error.args[-1])))
                self.assertEqual((found.errno, server.is_running), (getattr(error, "errno", None), False))
        with server:
            pass
        self.assert_nothing_is_left(server)

    def test_no_thread_no_session(self) -> None:
        with Server(logger=(recorder := Recorder())) as server:
            with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
                for _ in range(3):
                    with Client(server) as client:
                        replies = [client.greeting, client.read()]
                        self.assertEqual(replies, ["421 No thread for another session", "<closed>"])
            with Client(server) as client:
                self.assertEqual(client.greeting, "220 Welcome")
        recorder.wait_for("stopped")
        errors = [text for level, text in recorder.seen if level == "error"]
        self.assertEqual(errors, ["SMTP mock server cannot take another client: can't start new thread"])


class StopTest(ServerCase):
    def test_idle_sessions_get_a_421_at_once(self) -> None:
        with contextlib.ExitStack() as stack:
            server = Server(shutdown_timeout=10 * TIMEOUT, session_timeout=10 * TIMEOUT).start()
            clients = [stack.enter_context(Client(server)) for _ in range(10)]
            clients[0].send(b"HELO a.com\r\nhalf a li")
            self.assertEqual(clients[0].read(), RECEIVED)
            stop_in_time(server)
            self.assertEqual([client.read_all() for client in clients], [[SHUTDOWN, "<closed>"]] * 10)
            self.assertEqual([message.helo for message in server.messages()], [True])
        self.assert_nothing_is_left(server)

    def test_a_body_or_a_delay_may_be_finished(self) -> None:
        server, client, recorder = self.serve(shutdown_timeout=TIMEOUT, response_delay_message=0.03)
        client.ask(*ENVELOPE, "DATA")
        with in_background(server.stop):
            recorder.wait_for("shutdown mode")
            client.send(b"late\r\n.\r\n")
            self.assertEqual(client.read_all(), [RECEIVED, SHUTDOWN, "<closed>"])
        self.assertEqual([message.content for message in server.messages()], [b"late\r\n"])
        recorder.wait_for("stopped successfully")
        self.assert_nothing_is_left(server)

    STOPPED, FORCED = "was stopped successfully", "was force stopped"
    AT_WORK: Sequence[tuple[str, Sequence[str], float, list[str], str]] = (
        ("NOOP: silence", ["NOOP"], 10 * TIMEOUT, [], STOPPED),
        (f"NOOP: trickle {10 * TIMEOUT}", ["NOOP"], 0.05, ["2"], FORCED),
        (f"NOOP: delay {10 * TIMEOUT}", ["NOOP"], 0.05, [], FORCED),
        ("NOOP: drop", [*ENVELOPE, "DATA"], 0.05, [READY], FORCED),  # in a body
    )

    def test_it_keeps_its_promise(self) -> None:
        """Sessions in the middle of something are cut off when its time is over, but not before that."""
        for rule, lines, timeout, ends, outcome in self.AT_WORK:
            with self.subTest(rule), contextlib.ExitStack() as stack:
                server, client, recorder = self.serve(rule, shutdown_timeout=timeout)
                clients = [client, *(stack.enter_context(Client(server)) for _ in range(4))]
                for other in clients:
                    other.ask(*lines[:-1])
                    other.send(lines[-1].encode() + b"\r\n")
                for _ in clients:
                    recorder.wait_for(f"SMTP request: {lines[-1]}")
                began = time.monotonic()
                stop_in_time(server)
                self.assertTrue(outcome == self.STOPPED or time.monotonic() - began >= timeout)
                self.assertEqual([other.read_all() for other in clients], [[*ends, "<closed>"]] * 5)
                self.assertIn(outcome, recorder.wait_for("SMTP mock server was")[1])
                self.assertEqual([message.data for message in server.messages()], [lines[-1] == "DATA"] * 5)
                self.assert_nothing_is_left(server)

    def test_a_client_that_does_not_read_is_cut_off(self) -> None:
        server, client, recorder = self.serve(shutdown_timeout=0.05, msg_noop_received="250 " + "x" * 5_000_000)
        client.send(b"NOOP\r\n")
        recorder.wait_for("response: 250 x")
        server.stop()
        recorder.wait_for("was force stopped")
        self.assert_nothing_is_left(server)

    def test_endless_clients_are_cut_off_and_disturb_nobody(self) -> None:
        server = Server(shutdown_timeout=0.05, msg_size_limit=1000).start()
        flooding = threading.Barrier(4)

        def flood(data: bytes, *lines: str) -> None:
            with Client(server) as client, contextlib.suppress(ConnectionError):  # but no timeout
                client.ask(*lines)
                flooding.wait(TIMEOUT)
                while True:
                    client.send(data)

        def user() -> str:
            with Client(server) as client:
                flooding.wait(TIMEOUT)
                replies = client.ask(ENVELOPE[0], *SEND)
            server.stop()
            return replies[-1]

        floods = ((b"x" * 65536,), (b"x" * 65536, *ENVELOPE, "DATA"), (b"NOOP\r\n" * 10_000,))
        results = in_threads(user, *(functools.partial(flood, *arguments) for arguments in floods))
        self.assertEqual(results, [RECEIVED, None, None, None])
        self.assert_nothing_is_left(server)

    def test_code_that_holds_up_a_session_does_not_hold_up_stop(self) -> None:
        server = Server(on_message=(hold := Hold()), shutdown_timeout=0).start()
        with Client(server) as client, mock.patch.object(smtpmock, "_ABORT_TIMEOUT", 0.01):
            client.mail()
            hold.wait()
            server.stop()
        self.assertFalse(hold.release.is_set())
        hold.release.set()
        self.assertTrue(wait_until(lambda: not self.threads()))

    def test_a_logger_that_stops_the_server(self) -> None:
        def log(message: str) -> None:
            with contextlib.suppress(ServerStateError):
                if text in message:
                    server.stop()

        def live() -> None:
            server.start()
            with contextlib.suppress(ServerStateError):
                server.stop()

        server = Server(logger=mock.Mock(spec=["info", "warning", "error"], info=log, warning=log))
        for text in ("started on port", "shutdown mode", "was stopped"):
            with self.subTest(text):
                self.assertEqual((in_threads(live), server.is_running), ([None], False))
                self.assert_nothing_is_left(server)

    def test_a_session_that_stops_the_server(self) -> None:
        """Alone, or while another thread does."""

        def on_message(message: Message) -> None:
            if not is_alone:
                recorder.wait_for("shutdown mode")
            server.stop()

        for is_alone, timeout in ((True, 0.1), (False, TIMEOUT)):
            server, client, recorder = self.serve(on_message=on_message, shutdown_timeout=timeout)
            client.mail()
            if is_alone:
                recorder.wait_for("stopped")
                self.assertFalse(server.is_running)
            else:
                server.stop()
            self.assertEqual((len(server.messages()), client.read()), (1, RECEIVED))
            self.assertTrue(wait_until(lambda: not self.threads()))

    def test_a_client_that_is_sending_gets_an_rst(self) -> None:
        """It does not hang when the server cuts it off, though nobody reads what it sends."""
        server, client, recorder = self.serve(shutdown_timeout=0, response_delay_message=10 * TIMEOUT)
        client.mail()
        recorder.wait_for("binary data portion")
        client.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.send(b"x" * 65536)
        client.socket.settimeout(TIMEOUT)
        server.stop()
        with self.assertRaises(ConnectionError):
            while True:
                client.send(b"x" * 65536)

    def test_a_client_that_left_is_not_waited_for(self) -> None:
        """Neither in a delay, nor one that goes on sending after the end of its session."""
        for leave in (Client.reset, Client.__exit__):
            server, client, recorder = self.serve(shutdown_timeout=10 * TIMEOUT, response_delay_noop=10 * TIMEOUT)
            client.send(b"NOOP\r\n")
            recorder.wait_for("SMTP request: NOOP")
            leave(client)
            stop_in_time(server)
            self.assertEqual(len(server.messages()), 1)
        server, client, _ = self.serve("NOOP: drop", shutdown_timeout=10 * TIMEOUT)
        client.ask("NOOP")
        client.send(b"x" * 1000)
        stop_in_time(server)


class QuitTest(ServerCase):
    """A client whose last command was just answered may QUIT before a stop sends it away."""

    BYE = ["221 Closing connection", "<closed>"]

    def setUp(self) -> None:
        super().setUp()
        self.patch = mock.patch.object(smtpmock, "_QUIT_TIMEOUT", 10 * TIMEOUT)
        self.patch.start()

    def tearDown(self) -> None:
        self.patch.stop()  # before the servers are stopped that a failed test has left

    def serve(self, *rules: str, **options: Any) -> tuple[Server, Client, Recorder]:
        return super().serve(*rules, **{"shutdown_timeout": 10 * TIMEOUT, **options})

    @contextlib.contextmanager
    def stopping(self, server: Server, recorder: Recorder) -> Iterator[None]:
        """The server begins to stop; and it has stopped."""
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        recorder.wait_for("shutdown mode")
        yield
        stopper.join(TIMEOUT)
        self.assert_nothing_is_left(server)

    def test_it_may_quit(self) -> None:
        """And send other commands before; stop() does not wait any longer then."""
        for lines in ([], ["NOOP"], SEND):
            with self.subTest(lines):
                server, client, recorder = self.serve(multiple_message_receiving=True)
                self.assertEqual(client.mail().read(), RECEIVED)
                with self.stopping(server, recorder):
                    self.assertEqual([client.ask(*lines, "QUIT")[-1], client.read()], self.BYE)
                self.assertTrue(server.messages()[-1].quit_sent)

    def test_it_may_quit_after_what_it_did_when_the_stop_began(self) -> None:
        server, client, recorder = self.serve(on_message=(hold := Hold()))
        client.mail()
        hold.wait()
        with self.stopping(server, recorder):
            hold.release.set()
            self.assertEqual([client.read(), *client.ask("QUIT"), client.read()], [RECEIVED, *self.BYE])

    def test_it_may_also_leave(self) -> None:
        """Then it is told nothing more, and not waited for."""
        with mock.patch.object(smtpmock, "_LINGER", 10 * TIMEOUT):
            server, client, recorder = self.serve()
            client.ask("EHLO a.com", "NOOP")
            with self.stopping(server, recorder):
                client.__exit__()
            self.assertEqual(server.messages()[0].transcript.splitlines()[-1], "S: 250 Ok")
            server, client, recorder = self.serve("NOOP: drop")
            self.assertEqual(client.ask("EHLO a.com", "NOOP")[-1], "<closed>")
            (connection,) = server._listener.connections if server._listener else []
            self.assertTrue(wait_until(connection.request.gettimeout))  # it waits until the client closes
            stop_in_time(server)

    def test_an_idle_one_is_sent_away_meanwhile(self) -> None:
        server, idle, recorder = self.serve()
        with mock.patch.object(smtpmock, "_QUIT_TIMEOUT", 0.05):
            idle.ask("NOOP")
            (connection,) = server._list_connections()
            self.assertTrue(wait_until(lambda: 0 < connection.leaves_at < time.monotonic()))
        with Client(server) as silent, Client(server) as client:
            client.ask("NOOP")
            with self.stopping(server, recorder):
                self.assertEqual([idle.read_all(), silent.read_all()], [[SHUTDOWN, "<closed>"]] * 2)
                self.assertEqual([*client.ask("QUIT"), client.read()], self.BYE)

    def test_one_that_does_not_quit_is_sent_away(self) -> None:
        """Whether it goes on or is silent."""
        self.patch.stop()
        server, client, recorder = self.serve()
        client.ask("NOOP")
        stop_in_time(server)
        self.assertEqual(client.read_all(), [SHUTDOWN, "<closed>"])
        self.assertEqual(recorder.wait_for("was")[1], "SMTP mock server was stopped successfully")
        server, client, recorder = self.serve()
        with self.stopping(server, recorder):
            self.assertEqual(next(reply for reply in iter(lambda: client.ask("NOOP")[0], "250 Ok")), SHUTDOWN)

    def test_nobody_waits_without_need(self) -> None:
        for timeout, end in ((0, Server.stop), (TIMEOUT, Server.disconnect)):
            with self.subTest(end):
                server, client, _ = self.serve(shutdown_timeout=timeout)
                client.ask("NOOP")
                began = time.monotonic()
                end(server)
                self.assertLess(time.monotonic() - began, TIMEOUT)
                self.assertEqual(client.read_all()[-1], "<closed>")


def interrupt_at(number: int, call: Callable[[], object]) -> bool:
    """Call, and raise KeyboardInterrupt at the line of the module that is number to run; whether it was reached."""
    left = number

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != smtpmock.__file__:
            return None
        # At the end of a with block, its first line runs again before it is left; no real interrupt comes there.
        if event == "line" and not linecache.getline(smtpmock.__file__, frame.f_lineno).lstrip().startswith("with "):
            left -= 1
            if not left:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


class InterruptTest(ServerCase):
    """Ctrl-C at every line of start() and stop()."""

    def setUp(self) -> None:
        super().setUp()
        # A socket that only the interrupted frame knew is closed with that frame, by the garbage collector.
        catcher = warnings.catch_warnings()
        catcher.__enter__()
        self.addCleanup(catcher.__exit__, None, None, None)
        warnings.simplefilter("ignore", ResourceWarning)

    def assert_can_be_stopped(self, server: Server) -> None:
        """And used again."""
        with contextlib.suppress(ServerStateError):
            server.stop()
        self.assertFalse(server.is_running)
        self.assertTrue(wait_until(lambda: not self.threads()))
        with server:
            send(server, "hi")

    def test_start(self) -> None:
        for number in itertools.count(1):
            server = Server()
            if not interrupt_at(number, server.start):
                break
            self.assert_can_be_stopped(server)
        self.assertGreater(number, 20)
        server.stop()

    def test_stop(self) -> None:
        for number in itertools.count(1):
            server = Server().start()
            with Client(server) as client:
                if not interrupt_at(number, server.stop):
                    break
                self.assert_can_be_stopped(server)
                self.assertIn(client.read(), (SHUTDOWN, "<closed>", "<reset>"))
        self.assertGreater(number, 20)

    def test_a_stop_that_waits_for_a_session(self) -> None:
        """A session at work goes on until the second stop() cuts it off."""
        server, client, recorder = self.serve(shutdown_timeout=10 * TIMEOUT, response_delay_noop=10 * TIMEOUT)
        self.addCleanup(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have told us to ignore it

        def interrupt() -> None:
            recorder.wait_for("shutdown mode")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        client.send(b"NOOP\r\n")
        recorder.wait_for("SMTP request: NOOP")
        with self.assertRaises(KeyboardInterrupt), in_background(interrupt):
            server.stop()
        client.reset()
        self.assert_can_be_stopped(server)


class SessionTest(ServerCase):
    def test_silence(self) -> None:
        with Server(session_timeout=0.05, msg_session_timeout="421 wake up") as server:
            with Client(server) as silent, Client(server) as client:
                client.ask(*ENVELOPE, "DATA")
                for other in (silent, client):
                    self.assertEqual(other.read_all(), ["421 wake up", "<closed>"])
                (message,) = server.wait_for_messages(1, TIMEOUT)
                self.assertEqual(message.transcript.splitlines()[-2:], ["S: 421 wake up", "S: <closed>"])

    def test_an_accepted_message_stays_accepted(self) -> None:
        for end, said in ((Server.stop, ["421 bye", "<closed>"]), (Server.disconnect, ["<closed>"])):
            server, client, _ = self.serve(msg_server_shutdown="421 bye")
            client.ask(ENVELOPE[0], *SEND)
            end(server)
            self.assertEqual(client.read_all(), said)
            (message,) = server.messages()
            self.assertTrue(message.is_consistent)
            self.assertTrue(message.transcript.endswith("\nS: ".join(["", RECEIVED, *said])), message.transcript)

    def test_clients_that_vanish_are_recorded(self) -> None:
        ends = (ENVELOPE[:1], ENVELOPE, [*ENVELOPE, "DATA"], ["\x00\udcff"])
        for lines, reset in itertools.product(ends, (False, True)):
            with self.subTest(lines=lines, reset=reset), Server() as server:
                with Client(server) as client:
                    client.ask(*lines)
                    client.send(b"half a line")
                    if reset:
                        client.reset()
                (message,) = server.wait_for_messages(1, TIMEOUT)
                self.assertEqual((message.helo, message.data), ("EHLO a.com" in lines, "DATA" in lines))
                if message.data and not reset:
                    self.assertEqual(message.content, b"half a line")
                with Client(server) as other:
                    self.assertEqual(other.greeting, "220 Welcome")

    def test_a_mail_is_there_when_the_sendmail_of_smtplib_returns(self) -> None:
        with Server(multiple_message_receiving=True) as server, Smtp(server) as client:
            for body in (b"hi", b"\xff\x00 8-bit", b".dots\r\n..\r\n.", b"", "ünïcode".encode(), b"x" * 300_000):
                for end in (b"", b"\r\n"):
                    client.sendmail("a@a.com", ["b@b.com"], body + end)
                    (message,) = server.messages_and_purge()
                    self.assertEqual((message.content.removesuffix(b"\r\n"), message.is_consistent), (body, True))
            client.quit()

    def test_half_closed(self) -> None:
        for lines, reply in ((b"EHLO a.com\r\n" + MAIL, RECEIVED), (b"NOOP\r\n", "250 Ok")):
            with Server(response_delay_noop=0.03) as server, Client(server) as client:
                client.send(lines)
                client.socket.shutdown(socket.SHUT_WR)
                self.assertEqual(client.read_all()[-2:], [reply, "<closed>"])

    def test_the_default_timeout_of_a_program_is_not_that_of_a_session(self) -> None:
        socket.setdefaulttimeout(0.01)
        self.addCleanup(socket.setdefaulttimeout, None)
        _, client, _ = self.serve()
        client.assert_silence()
        self.assertEqual(client.ask("NOOP"), ["250 Ok"])

    def test_a_session_that_fails_is_logged(self) -> None:
        server, _, recorder = self.serve()
        with mock.patch.object(socket.socket, "recv", side_effect=ZeroDivisionError("a bug")):
            with Client(server) as client:
                self.assertEqual(client.read(), "<closed>")
        self.assertEqual(recorder.wait_for("ZeroDivisionError: a bug")[0], "error")
        with Client(server) as client:
            self.assertEqual(client.greeting, "220 Welcome")


# ----------------------------------------------------------------- a running server that is changed


class ConfigureTest(ServerCase):
    def test_two_threads_change_options(self) -> None:
        """At the worst moment: while the handlers of the first change are made."""

        class Slow(smtpmock.Handler):
            verbs, received = ("XSLOW",), "250 Ok"
            changes: ClassVar[list[dict[str, Any]]] = [{"msg_noop_received": "250 second"}]

            def __init__(self, options: Configuration) -> None:
                super().__init__(options)
                if self.changes:
                    changes = self.changes.pop()
                    in_threads(lambda: server.configure(**changes))

        server = Server()
        server.configure(handlers=[Slow], msg_greeting="220 first")
        with server, Client(server) as client:
            self.assertEqual([client.greeting, *client.ask("NOOP", "XSLOW")], ["220 first", "250 second", "250 Ok"])

    def test_sessions_that_begin_later_have_the_new_options(self) -> None:
        """Those that are not spelled out are as they were; reset() goes back."""
        server, open_client, _ = self.serve(msg_greeting="220 old", msg_noop_received="250 old", fail_fast=True)
        for _ in range(2):
            server.configure(msg_greeting="220 new", extensions=["VRFY"])
            server.configure(Configuration(msg_noop_received="250 new", fail_fast=False), fail_fast=True)
            with Client(server) as client:
                replies = [*open_client.ask("NOOP"), client.greeting, *client.ask("NOOP", "nonsense"), client.read()]
                self.assertEqual(replies, ["250 old", "220 new", "250 new", UNRECOGNIZED, "<closed>"])
            server.reset()
            with Client(server) as client:
                self.assertEqual([client.greeting, *client.ask("NOOP")], ["220 old", "250 old"])

    def test_options_are_validated_with_those_of_before(self) -> None:
        """Of a server that is not running."""
        server = Server(auth_users={"user": "secret"}, auth_required=True)
        with self.assertRaisesRegex(ConfigurationError, "auth_required=True: needs auth_users"):
            server.configure(auth_users=None)
        server.configure(auth_users=None, auth_required=False, msg_greeting="220 new", shutdown_timeout=0)
        with server, Client(server) as client:
            self.assertEqual(client.greeting, "220 new")

    def test_on_message(self) -> None:
        """An output of the command line stays."""
        old, new, output = list[Message](), list[Message](), list[Message]()
        server = Server(on_message=old.append)
        changes: Sequence[Callable[[], object]] = (
            lambda: None,
            lambda: server.configure(on_message=new.append),
            lambda: server.configure(fail_fast=True),
            lambda: server.configure(on_message=None),
            server.reset,
            lambda: [Memory.set_output(server, output.append), server.configure(fail_fast=False)],
            server.reset,
        )
        with server:
            for change in changes:
                change()
                send(server, "hi")
        self.assertEqual([len(seen) for seen in (old, new, output)], [2, 2, 2])

    def test_a_warning_about_discarded_mail(self) -> None:
        """It is turned off by an option that is set explicitly, as long as that is in force."""
        server = Server(multiple_rcptto=True)
        server.configure(multiple_message_receiving=False)
        for warns in (False, True):
            with self.subTest(warns=warns), warnings.catch_warnings(record=True) as caught, server:
                warnings.simplefilter("always")
                send(server, "1", "2")
                server.messages()
                self.assertEqual(len(caught), warns)
            server.reset()

    def test_rules_made_later_use_the_new_seed(self) -> None:
        def refusals(server: Server) -> list[int]:
            rule = server.on("NOOP", probability=0.5).reply("450 no")
            with server, Client(server) as client:
                replies = client.ask(*["NOOP"] * 20)
            rule.remove()
            return [index for index, reply in enumerate(replies) if reply == "450 no"]

        configured = Server()
        configured.configure(seed=5)
        self.assertEqual(refusals(configured), refusals(Server(seed=5)))

    def test_loggers_and_handlers(self) -> None:
        server, client, first = self.serve(handlers=iter([make_handler("XTRA")]))
        second, third = Recorder(), Recorder()
        catch(ConfigurationError, server.on, "RCPX")
        server.configure(logger=second, handlers=[make_handler("RCPX"), make_handler("XTRA")])
        server.on("RCPX")
        for logger, reply in ((second, "250 Ok"), (third, UNRECOGNIZED)):
            with Client(server) as other:
                self.assertEqual(other.ask("HELO a.com", "RCPX", "XTRA")[1:], [reply, "250 Ok"])
                logger.wait_for("request: RCPX")
            server.with_logger(third)
            server.reset()
            server.configure(msg_greeting="220 new")
        catch(ConfigurationError, server.on, "RCPX")
        client.ask("NOOP")
        first.wait_for("request: NOOP")

    def test_check_tells_what_failed_before_and_after(self) -> None:
        server, client, _ = self.serve(on_message=mock.Mock(side_effect=ValueError))
        client.ask(ENVELOPE[0], *SEND)
        server.configure(fail_fast=True)
        server.with_logger(Recorder())
        with Client(server) as second:
            second.ask(ENVELOPE[0], *SEND)
        client.ask(*SEND)
        self.assertEqual(told(server).count("ValueError"), 3)
        server.check()

    def test_url_and_repr(self) -> None:
        tls: dict[str, Any] = {"implicit_tls": True, "ssl_context": mock.Mock(spec=ssl.SSLContext)}
        for host, options, url in (
            ("::1", {}, "smtp://[::1]:25"),
            ("[::1]", {}, "smtp://[::1]:25"),
            ("a.com", tls, "smtps://a.com:25"),
        ):
            server = Server(host=host, port=25, **options)
            expected = f"<smtpmock.Server on {url.partition('//')[2]}, not running>"
            self.assertEqual((server.url, repr(server)), (url, expected))
        with Server() as server:
            address = f"127.0.0.1:{server.port}"
            self.assertEqual((server.url, repr(server)), (f"smtp://{address}", f"<smtpmock.Server on {address}>"))


class DisconnectTest(ServerCase):
    """disconnect() ends the open sessions, and only these."""

    ENDS = ((False, "<closed>"), (True, "<reset>"))
    WAITS: Sequence[tuple[Sequence[str], bytes, str | None]] = (
        ([], b"EHLO a.com", None),  # for the rest of the first line
        (ENVELOPE[:1], b"", None),  # a command
        (ENVELOPE[:1], b"half", None),
        ([*ENVELOPE, "DATA"], b"half\r\n", None),  # the rest of a body
        (ENVELOPE[:1], b"RSET\r\n", None),  # the end of a delay
        (ENVELOPE[:1], b"EXPN\r\n", "S: <closed>"),
        (ENVELOPE[:1], b"VRFY\r\n", "S: <silence>"),
    )

    def test_what_a_session_waits_for(self) -> None:
        rules = ("RSET: delay 1000", "VRFY: silence", "EXPN: delay 1000; close", "NOOP: delay 0.001")
        for (reset, end), (lines, sent, last) in itertools.product(self.ENDS, self.WAITS):
            with self.subTest(lines=lines, sent=sent, reset=reset):
                server, client, recorder = self.serve(*rules)
                client.ask(*lines)
                client.send(sent)
                if sent.isupper():
                    recorder.wait_for(f"request: {sent.decode().strip()}")
                server.disconnect(reset)
                self.assertEqual((len(server.messages()), client.read()), (bool(lines), end))
                for message in server.messages():
                    self.assertTrue(message.transcript.endswith(f"\n{last or f'S: {end}'}"))
                    self.assertNotRegex(message.transcript, r"S: <\w+>\n.*$")
                with Client(server) as other:
                    self.assertEqual(other.ask("NOOP"), ["250 Ok"])

    def test_a_client_that_closed_its_end_or_does_not_read(self) -> None:
        for reset, _ in self.ENDS:
            server, client, recorder = self.serve("NOOP: delay 1000", msg_rset_received="250 " + "x" * 5_000_000)
            with self.subTest(reset=reset), Client(server) as other:
                for user, line, logged in ((client, "NOOP", "request: NOOP"), (other, "RSET", "response: 250 x")):
                    user.ask(ENVELOPE[0])
                    user.send(line.encode() + b"\r\n")
                    recorder.wait_for(logged)
                client.socket.shutdown(socket.SHUT_WR)
                server.disconnect(reset)
                self.assertEqual(len(server.messages()), 2)

    def test_in_a_callback(self) -> None:
        """Of two sessions at once, which do not wait for each other."""
        both, returned = threading.Barrier(2), list[Message]()

        def on_message(message: Message) -> None:
            both.wait(TIMEOUT)
            server.disconnect()
            returned.append(message)

        def user() -> list[str]:
            with Client(server) as client:
                return client.mail().read_all()

        with Server(on_message=on_message) as server, mock.patch.object(smtpmock, "_ABORT_TIMEOUT", 10 * TIMEOUT):
            self.assertEqual(in_threads(user, user), [["<closed>"]] * 2)
            self.assertTrue(wait_until(lambda: len(returned) == 2))
        self.assertEqual([message.is_consistent for message in server.messages()], [True, True])

    def test_nothing_is_said_after_it(self) -> None:
        """By a session that was held up by a callback."""
        for reset, end in self.ENDS:
            server, client, _ = self.serve(on_message=(hold := Hold()))
            with self.subTest(reset=reset), mock.patch.object(smtpmock, "_ABORT_TIMEOUT", 0):
                client.mail(b"hi\r\n.\r\nHELO b.com\r\n")
                hold.wait()
                server.disconnect(reset)
                hold.release.set()
                self.assertIn(client.read(), (end, "<closed>"))
                stop_in_time(server)
                self.assertEqual([message.helo_request for message in server.messages()], [ENVELOPE[0]])

    @unittest.skipUnless(sys.platform == "linux", "other systems have no error for an RST after a FIN")
    def test_no_rst_follows_a_fin(self) -> None:
        """Not even if there is input that the server has not read."""
        server, client, recorder = self.serve("NOOP: delay 1000")
        client.send(b"NOOP\r\n")
        recorder.wait_for("request: NOOP")
        client.send(b"NOOP\r\n")
        descriptors = os.listdir("/proc/self/fd")
        server.disconnect()
        self.assertTrue(wait_until(lambda: len(os.listdir("/proc/self/fd")) < len(descriptors)))
        self.assertEqual(client.read(), "<closed>")
        self.assertEqual(client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), 0)

    def test_clients_that_have_just_connected(self) -> None:
        """No command of theirs is answered later, unless the system has not told the server of them yet."""
        served = 0
        with Server() as server:
            for _ in range(30):
                with Client(server, greets=False) as client, contextlib.suppress(OSError):
                    client.send(b"EHLO a.com\r\n")
                    server.disconnect()
                    client.send(b"NOOP\r\n")
                    client.socket.shutdown(socket.SHUT_WR)
                    served += "250 Ok" in client.read_all()
        self.assertLess(served, 15)

    def test_while_it_starts(self) -> None:
        """A logger may call it, and does not wait for a client; when it does not run, nothing happens."""
        server: Server = Server(logger=mock.Mock(info=lambda text: server.disconnect()))
        self.assertEqual(in_threads(server.start), [server])
        server.stop()
        server.disconnect()

    def test_a_session_that_has_ended_is_not_open(self) -> None:
        """Though the server waits for the client's FIN. The report says what ended one without a command."""
        server, client, recorder = self.serve("NOOP: drop")
        client.ask("NOOP")
        recorder.wait_for("session finished")
        self.assertIn("open sessions: 0", report(server))
        with Client(server):
            server.disconnect()
        self.assertRegex(report(server), "(?s)open sessions: 0.*disconnect[(][)] ended it")


# ------------------------------------------------------------------------------------ other systems


TICK = 0.015625  # of the clocks of Windows before Python 3.13


@functools.cache
def compiled_module() -> Any:
    path = HERE / "smtpmock.py"
    return compile(path.read_bytes(), path, "exec", dont_inherit=True)


def import_anew(stack: contextlib.ExitStack, os_name: str) -> None:
    """Import the module as on a system of this name; what the tests call smtpmock, Server and so on is from it, too."""
    module: Any = types.ModuleType("smtpmock")
    stack.enter_context(mock.patch.dict(sys.modules, smtpmock=module))
    with mock.patch.object(os, "name", os_name):
        exec(compiled_module(), vars(module))
    names = {name: getattr(module, name) for name in module.__all__ if name in globals()}
    stack.enter_context(mock.patch.dict(globals(), names, smtpmock=module))


def make_socketpair() -> tuple[socket.socket, socket.socket]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        sock = socket.create_connection(listening.getsockname(), TIMEOUT)
        sock.settimeout(None)
        return sock, listening.accept()[0]


def replace_what_is_missing(stack: contextlib.ExitStack, system: str) -> Any:
    """Take from the modules what this system does not have; what patches an attribute further."""
    patch: Any = lambda *arguments: stack.enter_context(mock.patch.object(*arguments))  # noqa: E731
    for owner in (select, os, socket):
        stack.enter_context(mock.patch.dict(vars(owner)))
    if system == "macOS":
        vars(select).pop("POLLRDHUP", None)
        patch(selectors, "DefaultSelector", selectors.PollSelector)
    if system == "Windows":
        for name in ("poll", "POLLIN", "POLLRDHUP", "epoll"):
            vars(select).pop(name, None)
        for name in ("MSG_DONTWAIT", "AF_UNIX"):
            vars(socket).pop(name, None)
        del vars(os)["register_at_fork"]
        patch(selectors, "DefaultSelector", selectors.SelectSelector)
        patch(socket, "socketpair", make_socketpair)
        for name in ("time", "monotonic", "perf_counter"):
            patch(time, name, functools.partial(lambda clock: clock() // TICK * TICK, getattr(time, name)))
    return patch


@contextlib.contextmanager
def other_system(system: str) -> Iterator[set[tuple[str, int, int]]]:
    """Make this system resemble another one, as far as the module can see, which is imported anew for that.

    The value has the calls of setsockopt() and shutdown(), with an option and the length of its value.
    """
    real: dict[str, Any] = {name: getattr(socket.socket, name) for name in ("accept", "shutdown", "setsockopt")}
    calls: set[tuple[str, int, int]] = set()

    def accept(listening: socket.socket) -> Any:
        client, address = real["accept"](listening)
        client.setblocking(listening.getblocking())
        return client, address

    def shutdown(sock: socket.socket, how: int) -> None:
        calls.add(("shutdown", how, 0))
        if system != "Windows" or how == socket.SHUT_WR:  # which wakes no read
            real["shutdown"](sock, how)

    def setsockopt(sock: socket.socket, level: int, option: int, value: Any) -> None:
        size = len(value) if isinstance(value, bytes) else 0
        calls.add(("setsockopt", option, size))
        if system == "32 bits" and option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            raise OSError(errno.EINVAL, "Invalid argument")
        if option == socket.SO_LINGER and size == 4:
            value = struct.pack("ii", *struct.unpack("hh", value))
        real["setsockopt"](sock, level, option, value)

    with contextlib.ExitStack() as stack:
        patch = replace_what_is_missing(stack, system)
        for fake in (accept, shutdown, setsockopt):
            patch(socket.socket, fake.__name__, fake)
        import_anew(stack, "nt" if system == "Windows" else "posix")
        yield calls


@unittest.skipUnless(sys.platform == "linux", "it simulates other systems on this one")
class OtherSystemsTest(ServerCase):
    """What differs between systems, simulated on the one that runs the tests."""

    TESTS = ("DialogueTest.test_through_a_socket", "SessionTest", "StopTest", "QuitTest", "DisconnectTest")
    # Tests that are slow, or that take it for granted that a session waits in a read.
    LEFT_OUT = "purging_while|does_not_read_is_cut_off|no_rst_follows|session_that_fails|command_line"

    def run_tests(self, *names: str) -> None:
        tests = unittest.TestLoader().loadTestsFromNames(names, sys.modules[__name__])
        flat: Any = [test for group in tests for test in (group if isinstance(group, unittest.TestSuite) else [group])]
        suite = unittest.TestSuite(test for test in flat if not re.search(self.LEFT_OUT, test.id()))
        self.assertGreaterEqual(suite.countTestCases(), len(names))
        with mock.patch.object(smtpmock, "_POLL_SECONDS", 0.005):  # it only looks more often
            suite.run(result := unittest.TestResult())
        for test, text in result.errors + result.failures:
            self.fail(f"{test.id()}\n{text}")

    def test_macos(self) -> None:
        """poll() without POLLRDHUP, and accepted sockets that do not block."""
        with other_system("macOS"):
            self.run_tests(*self.TESTS)

    def test_windows(self) -> None:
        """No poll(), no fork(), shutdown() interrupts nothing, other options of sockets, and clocks that tick slowly."""
        with other_system("Windows") as calls:
            self.run_tests(*self.TESTS, "TlsTest", "WaitingTest")
            for option, data in (("msg_noop_received", b"NOOP\r\n"), ("msg_server_shutdown", b"")):
                server, client, _ = self.serve(**{"shutdown_timeout": 0.05, option: "250 " + "x" * 5_000_000})
                client.send(data)
                began = time.monotonic()
                server.stop()  # while it writes
                self.assertLess(time.monotonic() - began, 4)
                client.__exit__()
                self.assert_nothing_is_left(server)
            server, client, _ = self.serve("NOOP: drop", shutdown_timeout=10 * TIMEOUT)
            with mock.patch.object(smtpmock, "_LINGER", 10 * TIMEOUT):
                client.ask("NOOP")
                time.sleep(0.05)  # it would be enough if this were so now and then
                stop_in_time(server)  # while it waits for the client's FIN
            self.doCleanups()
        unwanted = {socket.SO_REUSEADDR, socket.SO_RCVTIMEO, socket.SO_SNDTIMEO}
        self.assertFalse(unwanted & {option for name, option, _ in calls if name == "setsockopt"})
        self.assertIn(("setsockopt", socket.SO_LINGER, 4), calls)
        self.assertNotIn(("shutdown", socket.SHUT_RD, 0), calls)  # after it, Windows answers input with an RST

    def test_a_timeval_of_another_size(self) -> None:
        with other_system("32 bits"):
            self.run_tests("DialogueTest.test_through_a_socket", "SessionTest.test_silence")

    def test_what_a_forked_child_does_is_registered_if_it_can_be(self) -> None:
        with mock.patch.object(os, "register_at_fork") as register, other_system("macOS"):
            self.assertEqual([set(call.kwargs) for call in register.call_args_list], [{"after_in_child"}])

    def test_a_clock_that_stands_still(self) -> None:
        with contextlib.ExitStack() as stack:
            for name in ("time", "monotonic", "time_ns", "monotonic_ns"):
                stack.enter_context(mock.patch.object(time, name, return_value=1_600_000_000))
            server, client, _ = self.serve(auth_users={"a": "b"}, multiple_message_receiving=True)
            client.ask(ENVELOPE[0], *SEND * 3)
            challenges = [client.ask("AUTH CRAM-MD5", "*")[0] for _ in range(3)]
            client.__exit__()
            found = ids(server.wait_for_messages(3, 0))  # and that of the session with the challenges
            self.assertEqual(len(found), len(set(found)))
            catch(WaitTimeoutError, server.wait_for_messages, 9, 0.01)
            server.stop()
        self.assertEqual(({challenge[:4] for challenge in challenges}, len(set(challenges))), ({"334 "}, 3))

    def test_a_delay_without_poll_is_no_busy_loop(self) -> None:
        recv, looks = socket.socket.recv, list[int]()

        def count(sock: socket.socket, size: int, flags: int = 0) -> bytes:
            looks.extend([1] * bool(flags & socket.MSG_PEEK))
            return recv(sock, size, flags)

        for name in ("macOS", "Windows"):
            with self.subTest(name), other_system(name), mock.patch.object(socket.socket, "recv", count):
                with Server(response_delay_noop=0.05) as server, Client(server) as client:
                    looks.clear()
                    self.assertEqual(client.ask("NOOP"), ["250 Ok"])
                    self.assertTrue(1 <= len(looks) <= 10, len(looks))

    def test_saved_mails(self) -> None:
        """The names are ones that Windows takes, the bytes are the same, and no file is open when it gets its name.

        That of the mail it gets last. The signal that stops it is SIGBREAK, for there is no SIGQUIT.
        """
        opened, named = list[Any](), list[str]()
        real_open: Any = open
        real_replace = os.replace

        def open_like_windows(path: Any, mode: str = "r", *args: Any, newline: str | None = None, **kwargs: Any) -> Any:
            newline = "\r\n" if newline is None and "b" not in mode and "r" not in mode else newline
            opened.append(real_open(path, mode, *args, newline=newline, **kwargs))
            return opened[-1]

        def replace_like_windows(source: str, target: str) -> None:
            self.assertTrue(all(file.closed for file in opened))
            self.assertFalse(os.path.exists(target))
            for path in (source, target):
                self.assertRegex(os.path.basename(path), r"\A[\w.-]*\w\Z")
            named.extend(path.suffix for path in Path(folder).glob("saved/*.*") if path.suffix in (".eml", ".json"))
            real_replace(source, target)

        mail = b"Subject: hi\r\n\r\nbare\nCRLF\r\n"
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            for name, value in (
                ("builtins.open", open_like_windows),
                ("os.replace", replace_like_windows),
                ("os.linesep", "\r\n"),
                ("mailbox.linesep", b"\r\n"),
            ):
                stack.enter_context(mock.patch(name, value))
            stack.enter_context(other_system("Windows"))
            stack.enter_context(mock.patch.dict(vars(signal), SIGBREAK=signal.SIGUSR1))
            del vars(signal)["SIGQUIT"]
            flags = (f"-saveDir={folder}/saved", f"-maildir={folder}/maildir")
            out, err, status = run_main(lambda port: send(port, mail), *flags, end=signal.SIGUSR1)
            self.assertEqual(("a@a.com" in out, err, status), (True, "", 0))
            files = {
                path.suffix if path.parent.name == "saved" else "maildir": path for path in Path(folder).rglob("*.*")
            }
            saved, record, maildir = (files[kind].read_bytes() for kind in (".eml", ".json", "maildir"))
        self.assertEqual((named, saved.endswith(mail)), ([".json"], True))
        self.assertEqual(maildir, saved.replace(b"bare\n", b"bare\r\n"))  # the lines of a Maildir are the system's
        self.assertEqual((b"\r\n" in record, json.loads(record)["content"][-11:]), (False, "bare\nCRLF\r\n"))


# ---------------------------------------------------------------------------------------- resources


class ResourceTest(ServerCase, ProcessCase):
    """What a process may run out of, or do to its server."""

    def test_no_session_is_left_for_the_garbage_collector(self) -> None:
        gc.disable()
        self.addCleanup(gc.enable)
        for line in ("NOOP", "QUIT", "STARTTLS", "AUTH LOGIN", SEND[0], "DATA", "x" * 20_000, "BDAT 9"):
            memory = Memory("EHLO a.com", auth_users={"u": "p"}, ssl_context=True, extensions=["CHUNKING"])
            memory.say(*ENVELOPE[1:] * (line in ("DATA", "BDAT 9")), line)
            memory.end()
            self.assertTrue(memory.is_forgotten(), line)

    def test_what_is_endless_or_too_long_is_not_kept(self) -> None:
        self.addCleanup(tracemalloc.stop)
        for start, code in (
            (b"", "502"),
            (b"DATA\r\n", "552"),
            (b"BDAT 99999999\r\n", ""),
            (b"BDAT 99999999 LAST\r\n", ""),
        ):
            memory = Memory(*ENVELOPE, msg_size_limit=1000, extensions=["CHUNKING"])
            memory.feed(start)
            tracemalloc.start()
            for _ in range(100):
                memory.feed(b"x" * 65536)
            self.assertLess(tracemalloc.get_traced_memory()[0], 10_000, start)
            tracemalloc.stop()
            if code:
                replies = memory.say("", ".", "NOOP")
                self.assertEqual([reply[:3] for reply in replies[-2:]], [code, "250"])

    @unittest.skipIf(sys.platform == "win32", "Windows has no such limit")
    def test_no_more_descriptors(self) -> None:
        """Those for whom there is none wait without being asked all the time, and are served once there are some."""
        code = """
            import resource, selectors, sys, smtpmock
            class Logger:
                def info(self, message): pass
                def error(self, message): print(message, flush=True)
                warning = info
            calls = []
            select = selectors.DefaultSelector.select
            selectors.DefaultSelector.select = lambda *args: calls.append(1) or select(*args)
            with smtpmock.Server(logger=Logger()) as server:
                resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
                print(server.port, flush=True)
                sys.stdin.readline()
            print(len(calls), flush=True)
        """
        process = self.launch("-c", textwrap.dedent(code), stdin=subprocess.PIPE)
        address = ("127.0.0.1", int(process.stdout.readline()))
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(address, TIMEOUT)) for _ in range(40)]
            self.assertIn("cannot take another client", process.stdout.readline())
            for client in clients:  # each makes room for another
                self.assertEqual(client.recv(100), b"220 Welcome\r\n")
                client.close()
            out = self.finish(process, "stop\n")
        self.assertLess(int(out.splitlines()[-1]), 1000)

    def test_many_starts_and_stops(self) -> None:
        code = """
            import os, smtpmock, socket, threading
            server = smtpmock.Server().start()
            server.stop()
            count = len(os.listdir("/dev/fd")) if os.path.exists("/dev/fd") else 0
            for _ in range(100):
                with server, socket.create_connection((server.host, server.port), 10) as client:
                    client.recv(100)
            left = len(os.listdir("/dev/fd")) if count else 0
            print(left - count, threading.active_count())
        """
        self.assertEqual(self.run_python(code, "-W", "error", "-X", "dev"), "0 1\n")

    def test_stop_while_clients_connect(self) -> None:
        def connect() -> None:
            # Only until the first refusal: one of many tries to reach a port that is free would get that port for
            # its own end, and connect to itself. And not for long: Linux may forget a connection that is made
            # while the listening socket is closed, and tell the client nothing.
            with contextlib.suppress(OSError):
                while server.is_running:
                    with Client(server, greets=False) as client:
                        client.socket.settimeout(1)
                        client.read()

        def stop() -> None:
            Client(server).__exit__()
            server.stop()

        for _ in range(5):
            server = Server(shutdown_timeout=0.1).start()
            self.assertEqual(in_threads(stop, connect, connect, connect)[0], None)
            self.assertEqual(self.threads(), [])

    @unittest.skipUnless(hasattr(os, "fork"), "this system cannot fork")
    def test_fork(self) -> None:
        """A child has the server's sockets but not its threads; what it does with them is not the parent's matter."""
        code = """
            import os, smtplib, smtpmock, warnings
            warnings.simplefilter("ignore", DeprecationWarning)

            def count():
                return len(os.listdir("/dev/fd")) if os.path.exists("/dev/fd") else 0

            def send(sender, client):
                with client:
                    client.sendmail(sender, ["b@b.com"], "hi")

            connect = lambda: smtplib.SMTP(server.host, server.port, timeout=10)
            with smtpmock.Server() as server:
                client = connect()
                before = count()
                child = os.fork()
                if child == 0:
                    server.stop()
                    assert not before or count() <= before - 4  # two to listen, two to wake
                    with server:
                        send("child@a.com", connect())
                    os._exit(0 if len(server.messages()) == 1 else 1)
                assert os.waitpid(child, 0)[1] == 0
                send("1@a.com", client)
                send("2@a.com", connect())
                print([message.mail_from for message in server.messages()])
        """
        self.assertEqual(self.run_python(code, "-W", "error", "-X", "dev"), "['1@a.com', '2@a.com']\n")

    @unittest.skipUnless(hasattr(os, "fork"), "this system cannot fork")
    def test_a_forked_child_has_no_share_in_the_port(self) -> None:
        """Nor in a connection: while the child lives, the parent can reset that, and give up its port."""
        server, client, _ = self.serve("NOOP: reset")
        wakened, waker = socket.socketpair()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            waker.close()
            wakened.recv(1)
            os._exit(0)
        wakened.close()
        try:
            self.assertEqual(client.ask("NOOP"), ["<reset>"])
            server.stop()
            self.assert_nothing_is_left(server)
            with Server(port=server.port) as again:
                send(again, "hi")
        finally:
            waker.close()
            os.waitpid(child, 0)

    def test_an_exit_with_a_running_server(self) -> None:
        """One with a session in a delay, and one that waits for a command."""
        code = """
            import socket, smtpmock
            server = smtpmock.Server(response_delay_noop=100).start()
            clients = [socket.create_connection((server.host, server.port), 10) for _ in range(2)]
            for client in clients:
                client.recv(100)
            clients[0].sendall(b"NOOP\\r\\n")
            print("end")
        """
        self.assertEqual(self.run_python(code), "end\n")


# ----------------------------------------------------------------------------------------- logging


class LoggingTest(unittest.TestCase):
    SESSION = (
        "SMTP session started | SMTP response: 220 Welcome | SMTP request: EHLO example.com | "
        r"SMTP response: 250 Received | SMTP request: \x00\x1b[1mä\udcff | "
        f"SMTP response: {UNRECOGNIZED} | SMTP request: QUIT | "
        "SMTP response: 221 Closing connection | SMTP session finished"
    ).split(" | ")

    def run_session(self, server: Server) -> None:
        with server, Client(server) as client:
            client.ask("EHLO example.com", "\x00\x1b[1mä\udcff", "QUIT")
            self.assertEqual(client.read(), "<closed>")

    def test_to_stdout(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.run_session(server := Server(log_to_stdout=True, log_server_activity=True))
        expected = [
            f"INFO: SMTP mock server started on port: {server.port}",
            *(f"INFO: {line}" for line in self.SESSION),
            "WARNING: SMTP mock server is in the shutdown mode and won't accept new connections",
            "INFO: SMTP mock server was stopped successfully",
        ]
        lines, count = re.subn(r"(?<=: )\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{6} ", "", out.getvalue())
        # The last line of the session and the first of the stop are by two threads.
        self.assertEqual((count, sorted(lines.splitlines())), (len(expected), sorted(expected)))

    def test_without_activity(self) -> None:
        for names, count in ((["log_to_stdout"], 3), ([], 0)):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                self.run_session(Server(**dict[str, Any](dict.fromkeys(names, True))))
            self.assertEqual(len(out.getvalue().splitlines()), count)

    def test_a_narrow_encoding(self) -> None:
        raw = io.BytesIO()
        with io.TextIOWrapper(raw, "ascii", write_through=True) as out, contextlib.redirect_stdout(out):
            self.run_session(Server(log_to_stdout=True, log_server_activity=True, msg_greeting="220 ä"))
            self.assertIn(rb"response: 220 \xe4", raw.getvalue())

    def test_a_custom_logger(self) -> None:
        self.run_session(Server().with_logger(recorder := Recorder()))
        recorder.wait_for("stopped")
        activity = [text for level, text in recorder.seen if level == "activity"]
        others = [level for level, _ in recorder.seen if level != "activity"]
        self.assertEqual((activity, others), (self.SESSION, ["info", "warning", "info"]))

    def test_a_standard_logger(self) -> None:
        with self.assertLogs("smtpmock.test", "DEBUG") as logs:
            self.run_session(Server(logger=logging.getLogger("smtpmock.test")))
        self.assertIn("INFO:smtpmock.test:SMTP request: EHLO example.com", logs.output)
        self.assertEqual(logs.records[-2].levelname, "WARNING")

    def test_a_logger_that_raises(self) -> None:
        """Be it no Exception, as what pytest.fail() raises."""
        for error in (ZeroDivisionError(), type("Failed", (BaseException,), {})()):
            logger = mock.Mock(spec=["info", "warning", "error"])
            logger.info.side_effect = logger.warning.side_effect = error
            with contextlib.redirect_stderr(io.StringIO()) as err, Server(logger=logger) as server:
                send(server, "hi")
                self.assertTrue(wait_until(lambda server: "open sessions: 0" in report(server), server))
            self.assertEqual(err.getvalue(), f"smtpmock: the log is incomplete, its logger raised {error!r}\n")
            self.assertEqual([message.quit_sent for message in server.messages()], [True])

    def test_a_closed_stdout(self) -> None:
        for out in (io.StringIO(), None):
            if out is not None:
                out.close()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(None):
                self.run_session(server := Server(log_to_stdout=True, log_server_activity=True))
            self.assertTrue(server.messages()[0].quit_sent)


# ------------------------------------------------------------------------------------ command line


def flags(name: str) -> tuple[str, str, str]:
    """An option's flag, as in go-smtp-mock, with a second hyphen, and as GNU programs have it."""
    flag = "-" + re.sub("_(.)", lambda match: match[1].upper(), name)
    return flag, "-" + flag, "--" + name.replace("_", "-")


def parse_flags(*argv: str) -> Any:
    """The options of the server that the command line would start."""
    with mock.patch.object(smtpmock, "Server", side_effect=smtpmock.SMTPMockError("not today")) as made:
        status, out, err = call_main(*argv)
    assert (status, err) == (1, "smtpmock: not today\n"), (status, out, err)
    return made.call_args.kwargs


def run_main(
    use: Callable[[int], object],
    *argv: str,
    early: Callable[[int], object] = lambda port: None,
    end: int = signal.SIGTERM,
) -> tuple[str, str, int]:
    """Run main() while use() uses the server in a thread, up to a signal; what it printed, and its exit status.

    early() runs when the port is told.
    """

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            if port := re.search(r"listening on [\d.]+:(\d+)", text):
                early(int(port[1]))
                user.append(threading.Thread(target=use_and_end, args=(int(port[1]),)))
                user[0].start()
            return super().write(text)

    def use_and_end(port: int) -> None:
        failures.extend(error for error in in_threads(lambda: use(port)) if isinstance(error, Exception))
        signal.pthread_kill(threading.main_thread().ident or 0, end)

    user: list[threading.Thread] = []
    failures: list[Exception] = []
    with contextlib.redirect_stdout(Out()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = smtpmock.main(argv)
    user[0].join(TIMEOUT)
    for failure in failures:
        raise failure
    return out.getvalue(), err.getvalue(), status


# Command lines, and the options that they set.
GOOD_FLAGS = read_rows("""
=>
-msgNoopReceived= | -blacklistedHeloDomains= => msg_noop_received="", blacklisted_helo_domains=[]
-msgNoopReceived | | -blacklistedHeloDomains | | -log=0 => log_to_stdout=False, log_server_activity=False, msg_noop_received="", blacklisted_helo_domains=[]
-tlsCert=test | -authUsers=* => ssl_context="test", auth_users="*"
-tlsCert=expired => ssl_context="expired"
-tlsCert=wrong host => ssl_context="wrong host"
-dev=false =>
-dev => keep_all=True, lenient_addresses=True, extensions=("SIZE", "8BITMIME", "SMTPUTF8", "PIPELINING", "DSN"),
    auth_users="*"
""")

# Command lines that are refused, and why.
BAD_FLAGS = read_rows("""
-port=99999             => -port=99999: must be an integer from 0 to 65535
-port=x                 => -port='x': must be an integer from 0 to 65535
-log=maybe              => -log='maybe': must be true or false
-prot=1                 => -prot: there is no such flag; did you mean -port?
--multiple-rcpto        => --multiple-rcpto: there is no such flag; did you mean --multiple-rcptto?
-port                   => -port: needs a value
-failfast               => -failfast: there is no such flag; did you mean --fail-fast?
-rule                   => -rule: needs a value
stray                   => stray: there is no such flag
-sessionTimeout=nan     => -sessionTimeout=nan: must be a number of seconds from 0.001 to 1000000
-extensions=AUTH        => -extensions: AUTH is announced with the option -authUsers
-tlsCert=none.pem       => -tlsCert='none.pem'{MORE}No such file or directory{MORE}
-tlsCert=./test         => {MORE}No such file or directory{MORE}
-tlsKey=none.pem        => -tlsKey='none.pem': needs a file in -tlsCert
-tlsKey=k.pem | -tlsCert=test => -tlsKey='k.pem': needs a file in -tlsCert
-port | -log            => -port: needs a value
-saveCa=ca.pem          => -saveCa='ca.pem': needs test or expired or wrong host in -tlsCert
-authUsers=**           => -authUsers: must be a mapping{MORE}
-implicitTls            => -implicitTls=True: needs -tlsCert
-http=x                 => -http='x': must be an integer from 0 to 65535
-httpHost=localhost     => -httpHost: needs -http
-httpNames=a.com        => -httpNames: needs -http
-saveDir=/dev/null/x    => cannot write to /dev/null/x: Not a directory
--maildir=/dev/null/x   => cannot write to /dev/null/x: Not a directory
""")
BAD_RULE_FLAGS = read_rows(r"""
RCPT reply                    => must be 'STAGE: ACTION' or 'STAGE ADDRESS: ACTION'
: drop                        => must be 'STAGE: ACTION' or 'STAGE ADDRESS: ACTION'
a b c d: drop                 => must be 'STAGE: ACTION' or 'STAGE ADDRESS: ACTION'
RCPT: rply 450                => 'rply' must be {ACTIONS}
RCPT: reply 450; tims=2       => 'tims' must be {ACTIONS}
RCPT: times=2                 => it has no action
RCPT: reply 450; times=x      => times='x': must be an integer from 1 up
RCPT: reply 450; skip=-1      => skip=-1: must be an integer from 0 up
RCPT: reply 450; times        => times='': must be an integer from 1 up
RCPT: delay soon              => delay='soon': must be a number of seconds from 0 to 1000000
RCPT: silence please          => 'please' must not follow silence
RCPT: raw \x                  => raw='\\x': must be bytes
""")


class CommandLineTest(unittest.TestCase):
    VALUES: Mapping[str, tuple[str, Any]] = {
        "bool": ("true", True),
        "str": ("a = b", "a = b"),
        "int": ("25", 25),
        "int | None": ("-9", -9),
        "float": ("0.5", 0.5),
        "Collection[str]": ("a, b,,c", ["a", "b", "c"]),
        "Mapping[str, str] | Callable[[str, str, str], object] | Literal['*'] | None": ("u:s:t,", {"u": "s:t"}),
    }

    def test_every_option_has_its_flags(self) -> None:
        for field in dataclasses.fields(Configuration):
            if not field.name.startswith("log_") and field.name != "ssl_context":
                text, value = self.VALUES["str" if field.type == "str | None" else str(field.type)]
                for flag in flags(field.name):
                    self.assertEqual(parse_flags(f"{flag}={text}"), {field.name: value})
                    self.assertEqual(parse_flags(flag, text), {field.name: value})

    def test_flags(self) -> None:
        for name in ("log", "fail_fast"):
            fields = ["log_to_stdout", "log_server_activity"] if name == "log" else [name]
            for flag in flags(name):
                for text, value in {"": True, "=true": True, "=1": True, "=False": False, "=0": False}.items():
                    self.assertEqual(parse_flags(flag + text, "-port=1"), {**dict.fromkeys(fields, value), "port": 1})
        for row in GOOD_FLAGS:
            with self.subTest(row.given):
                self.assertEqual(parse_flags(*row.given), read_options(row.expected))
        self.assertEqual(Memory.own_flags("-dev", "-quiet"), {"dev": True, "quiet": True, "show": True, "http": 0})
        self.assertEqual(Memory.own_flags("-http=0", "-httpNames=a, b.c"), {"http": 0, "http_names": ["a", "b.c"]})

    def test_what_dev_sets_can_be_overridden(self) -> None:
        for flag, name, value in (
            ("-keepAll=false", "keep_all", False),
            ("-lenientAddresses=0", "lenient_addresses", False),
            ("-extensions=DSN", "extensions", ["DSN"]),
            ("-authUsers=u:s", "auth_users", {"u": "s"}),
            ("-multipleRcptto=false", "multiple_rcptto", False),
        ):
            for argv in (["-dev", flag], [flag, "-dev"]):
                self.assertEqual(parse_flags(*argv), {**parse_flags("-dev"), name: value})

    def test_version(self) -> None:
        for flag in ("-v", "--version"):
            status, out, err = call_main(flag, "-port=1")
            self.assertEqual((status, out.splitlines()[0], err), (0, f"smtpmock: {smtpmock.__version__}", ""))

    def test_errors(self) -> None:
        for row, flag in itertools.product(BAD_FLAGS, ("", "-json", "--json=true", "-control")):
            with self.subTest(row.given, flag=flag):
                status, out, err = call_main(*row.given, *[flag] * (flag != ""))
                error = err.removeprefix("smtpmock: ").removesuffix("\n")
                self.assertRegex(error, row.pattern)
                self.assertEqual(status, 1 if error.startswith("cannot write") else 2)
                self.assertEqual(out and json.loads(out), {"event": "error", "error": error} if flag else "")
        with Server() as server:
            status, _, err = call_main(f"-port={server.port}")
        self.assertEqual(status, 1)
        self.assertRegex(err, rf"\Asmtpmock: cannot listen on 127\.0\.0\.1:{server.port}: [^\n]*in use\n\Z")

    def test_bad_rules(self) -> None:
        ends = "close or drop or reset or silence"
        actions = f"reply or raw or delay or trickle or {ends} or skip or times or probability or after"
        for (rule,), expected, _ in BAD_RULE_FLAGS:
            with self.subTest(rule):
                error = expected.replace("{ACTIONS}", actions)
                self.assertEqual(call_main("-rule", rule), (2, "", f"smtpmock: rule {rule!r}: {error}\n"))

    def test_in_this_process(self) -> None:
        """A run of main(), with a mail, until a signal. No default timeout disturbs it."""
        self.addCleanup(socket.setdefaulttimeout, None)
        socket.setdefaulttimeout(0.001)

        def connect_early(port: int) -> None:
            """When the port is announced, clients can connect but are not served yet."""
            with socket.create_connection(("127.0.0.1", port), TIMEOUT) as client:
                client.settimeout(0.02)
                self.assertRaises(TimeoutError, client.recv, 1)

        def use(port: int) -> None:
            client = Smtp(port)
            clients.append(client)
            self.assertEqual([client.docmd("VRFY"), client.docmd("EXPN")], [(252, b"one"), (252, b"two")])
            client.sendmail("a@a.com", ["b@b.com"], "hi")

        clients: list[Smtp] = []
        handler = signal.getsignal(signal.SIGTERM)
        rules = ("-rule", "VRFY: reply 252 one", "--rule=EXPN: reply 252 two")
        self.assertEqual(run_main(use, "-log", *rules, early=connect_early)[1:], ("", 0))
        self.assertIs(signal.getsignal(signal.SIGTERM), handler)
        with contextlib.closing(clients[0]) as client:
            self.assertEqual(client.getreply()[0], 421)

    def test_a_stdin_that_cannot_be_read(self) -> None:
        error = "cannot read from stdin: it is closed"
        for stdin in (None, io.StringIO("stop\n")):
            with mock.patch("sys.stdin", stdin):
                status, out, err = call_main("-control")
            self.assertEqual((status, err), (1, f"smtpmock: {error}\n"))
            self.assertEqual(json.loads(out), {"event": "error", "error": error})


class HelpTest(unittest.TestCase):
    def read(self, flag: str) -> str:
        status, out, err = call_main(flag)
        self.assertEqual((status, err), (0, ""))
        return out

    def read_groups(self, flag: str) -> dict[str, str]:
        """The text of each group, by its title."""
        groups = re.findall(r"(?m)^(\S.*):\n((?:  .*\n)+)", self.read(flag))
        return {title: " ".join(text.split()) for title, text in groups}

    def test_it_is_a_page(self) -> None:
        self.assertLessEqual(len(self.read("-h").splitlines()), 120)
        self.assertEqual([self.read("-help"), self.read("--help")], [self.read("-h")] * 2)
        for text in (self.read("-h"), self.read("-helpAll")):
            self.assertEqual([line for line in text.splitlines() if len(line) > 80 or line != line.rstrip()], [])
            self.assertNotRegex(text, r"(?i:python)|\(\)|\b(None|True|False|str|int|bool|exception|function)\b")

    def test_groups(self) -> None:
        groups = self.read_groups("-h")
        titles = ["Listening", "Recording", "Output", "Failing", "Extensions, login and TLS"]
        self.assertEqual(list(groups), [*titles, "Other", "Examples", "Exit status"])
        self.assertEqual(list(self.read_groups("--help-all")), [*list(groups)[:6], "Reply texts", *list(groups)[6:]])
        for title, line in {
            "Listening": "-port=PORT port to listen on; 0 takes a free one -sessionTimeout=SECONDS seconds of silence",
            "Recording": "-msgSizeLimit=LIMIT largest message body, in bytes (default: 10485760)",
            "Output": "-log log to stdout",
            "Failing": "-responseDelayHelo=SECONDS seconds before",
            "Extensions, login and TLS": "-tlsCert=PATH PEM file",
        }.items():
            self.assertIn(line, groups[title])
        self.assertEqual(self.read("-h").count("\n  smtpmock "), 3)
        self.assertEqual(re.findall(r"\b\d ", groups["Exit status"]), ["0 ", "1 ", "2 ", "3 "])

    def test_the_examples_work(self) -> None:
        for example in re.findall("(?m)^  smtpmock (.*)", self.read("-h")):
            with self.subTest(example):
                parse_flags(*shlex.split(example))

    def test_every_option_is_in_one_group(self) -> None:
        groups = self.read_groups("-helpAll")
        text = " ".join(text for title, text in groups.items() if title != "Examples")
        for field in dataclasses.fields(Configuration):
            if not field.name.startswith("log_") and field.name != "ssl_context":
                about = re.sub(r"\b[a-z]+(_[a-z]+)+", lambda match: flags(match[0])[0], field.metadata["about"])
                found = re.findall(rf"(?<!\S){flags(field.name)[0]}(=[A-Z]+)? {re.escape(about)}", text)
                self.assertEqual(len(found), 1, field.name)

    def test_no_flag_has_left_its_group(self) -> None:
        """The last groups take what no other has, so a flag may be there by mistake."""
        texts = [name for name in Configuration._declared if re.match("msg_(?!size_limit)", name)]
        for title, known in (
            ("Other", ["-tolerated", "-version", "-help", "-helpAll"]),
            ("Reply texts", [flags(name)[0] for name in texts]),
        ):
            group = self.read("-helpAll").partition(f"{title}:\n")[2].partition("\n\n")[0]
            self.assertEqual(re.findall(r"(?m)^  (-\w+)", group), known)

    def test_an_option_of_no_group_is_there(self) -> None:
        option = Configuration._declared["fail_fast"]
        for name, title, flag in (("new_thing", "Other", "-h"), ("msg_new_thing", "Reply texts", "-helpAll")):
            with mock.patch.dict(Configuration._declared, {name: option}):
                self.assertIn(flags(name)[0] + " ", self.read_groups(flag)[title] + " ")


class ProcessTest(ProcessCase):
    def test_signals(self) -> None:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
        processes = [self.start("-responseDelayNoop=0.01", "-quiet") for _ in numbers]
        for number, process in zip(numbers, processes, strict=True):
            with self.subTest(number.name):
                with contextlib.closing(Smtp(self.port(process))) as client:
                    client.sendmail("a@a.com", ["b@b.com"], "hi")
                    process.send_signal(number)
                    self.assertEqual(client.getreply()[0], 421)
                self.assertEqual(self.finish(process), "")

    def test_optimised(self) -> None:
        """Without docstrings and assertions."""
        self.assertIn("An SMTP server for tests", self.finish(self.launch("-OO", "-m", "smtpmock", "-h")))

    def test_no_stdout(self) -> None:
        flags = [("-h", ">/dev/full"), ("-v", ">&-"), ("-port=0", ">/dev/full"), ("-port=0", ">&-")]
        program = shlex.quote(sys.executable) + " -S -m smtpmock"
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        commands = [f"exec {program} {flag} {redirection}" for flag, redirection in flags]
        processes = [subprocess.Popen(text, shell=True, cwd=compiled_copy(), **pipes) for text in commands]
        for (flag, redirection), process in zip(flags, processes, strict=True):
            with self.subTest(flag, redirection=redirection):
                error = "No space left on device" if "full" in redirection else "it is closed"
                said = process.communicate(timeout=TIMEOUT)
                self.assertEqual((process.returncode, *said), (1, "", f"smtpmock: cannot write to stdout: {error}\n"))

    def test_two_signals_at_once(self) -> None:
        for process in [self.start(), self.start()]:
            self.port(process)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ProcessLookupError):
                for number in (signal.SIGINT, signal.SIGTERM) * 20:
                    os.kill(process.pid, number)
            self.assertEqual(self.finish(process), "")

    def wait_for(self, file: Any, text: str) -> None:
        """Read lines until the text comes."""
        while text not in (line := file.readline()):
            self.assertNotEqual(line, "")

    def test_a_second_signal(self) -> None:
        process = self.start("-log", f"-responseDelayNoop={10 * TIMEOUT}", f"-shutdownTimeout={10 * TIMEOUT}")
        with contextlib.closing(Smtp(self.port(process))) as client:
            client.putcmd("noop")
            self.wait_for(process.stdout, "noop")
            for number, text in ((signal.SIGTERM, "shutdown mode"), (signal.SIGINT, "force stopped")):
                process.send_signal(number)
                self.wait_for(process.stdout, text)
        self.finish(process)

    def test_the_end_of_stdin_is_no_second_signal(self) -> None:
        flags = ("-control", "-log", "-responseDelayNoop=0.15", f"-shutdownTimeout={10 * TIMEOUT}")
        process = self.start(*flags, stdin=subprocess.PIPE)
        with contextlib.closing(Smtp(self.port(process))) as client:
            client.putcmd("noop")
            self.wait_for(process.stderr, "request: noop")
            process.send_signal(signal.SIGTERM)
            self.wait_for(process.stderr, "shutdown mode")
            process.stdin.close()
            process.stdin = None
            self.assertEqual(client.getreply(), (250, b"Ok"))
        self.assertEqual(process.wait(TIMEOUT), 0)

    def test_a_killed_one_leaves_its_port(self) -> None:
        process = self.start()
        port = self.port(process)
        with Smtp(port) as client:
            client.noop()
            process.kill()
            process.wait(TIMEOUT)
        self.assertEqual(self.port(self.start(f"-port={port}")), port)

    def test_a_closed_stdout(self) -> None:
        process = self.start("-log")
        port = self.port(process)
        process.stdout.close()
        send(port, "hi")
        process.terminate()
        pattern = r"\Asmtpmock: the log is incomplete.*BrokenPipe.*\nsmtpmock: cannot write to stdout: .*\n\Z"
        self.assertRegex(process.stderr.read(), pattern)
        self.assertEqual(process.wait(TIMEOUT), 1)


class OutputTest(ProcessCase):
    """What the command line does with the mail."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name, "made", "as needed")

    def test_a_mail_that_one_output_cannot_take_is_in_none(self) -> None:
        maildir = self.folder.parent / "maildir"
        process = self.start(f"-saveDir={self.folder}", f"-maildir={maildir}", "-json")
        port = self.port(process)
        shutil.rmtree(maildir / "tmp")
        self.refuse(port)
        error = json.loads(process.stdout.readline())
        text = "a mail was refused, because it cannot be saved: "
        self.assertEqual((error["event"], error["error"][: len(text)]), ("error", text))
        self.assertEqual(self.names(), [])
        self.assertRegex(process.stderr.readline(), f"^smtpmock: {text}.*No such file")
        (maildir / "tmp").mkdir()
        send(port, "hi")
        self.assertEqual(self.names(), self.pairs(2))

    def test_a_line_that_was_not_written_is_not_written_later(self) -> None:
        class Disk(io.RawIOBase):
            """It is full after six bytes, until it is emptied."""

            data, left = b"", 6
            writable = lambda self: True  # noqa: E731

            def write(self, data: Any) -> int:
                if not self.left:
                    raise OSError(errno.ENOSPC, "No space left on device")
                taken = bytes(data[: self.left])
                self.data, self.left = self.data + taken, self.left - len(taken)
                return len(taken)

        disk = Disk()
        for out in (io.TextIOWrapper(io.BufferedWriter(disk)), io.TextIOWrapper(disk, write_through=True)):  # type: ignore[type-var]
            disk.data, disk.left = b"", 6
            with contextlib.redirect_stdout(out):
                printer = smtpmock._Writer().out
            printer("one")
            with self.assertRaisesRegex(smtpmock.SMTPMockError, "No space left"):
                printer("two")
            disk.left = 100
            printer("three")
            self.assertEqual(disk.data, b"one\ntw\nthree\n")

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def pairs(self, *numbers: int) -> list[str]:
        """The names of the mails of these numbers, and of their records."""
        return sorted(f"{number:06d}.{kind}" for number in numbers for kind in ("eml", "json"))

    def test_json(self) -> None:
        process = self.start("-json", "-log")
        listening = json.loads(process.stdout.readline())
        port, url = listening["port"], f"smtp://127.0.0.1:{listening['port']}"
        self.assertEqual(listening, {"event": "listening", "host": "127.0.0.1", "port": port, "url": url})
        send(port, b"Subject: one\r\n\r\n\xff", b"Subject: two")
        with Smtp(port) as client:
            client.ehlo("a.com")
            client.mail("nobody")
        Smtp(port).close()  # a probe is no session
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        out, err = self.stop(process)
        self.assertEqual(json.loads(out), {"event": "done", "command": "stop", "messages": 2})
        self.assertIn("SMTP request: message binary data portion", err)
        self.assertNotIn("Subject", err)
        seen = [(line["event"], line["subject"], line["is_consistent"], line["id"]) for line in lines]
        self.assertEqual(seen, [("message", "one", True, 1), ("message", "two", True, 2), ("message", None, False, 3)])
        self.assertEqual((lines[0]["content_encoding"], lines[1]["content"]), ("base64", "Subject: two\r\n"))
        self.assertTrue(lines[2]["transcript"].endswith("S: 221 Closing connection\nS: <closed>"))

    def refuse(self, port: int, content: bytes | str = b"hi") -> None:
        """A mail is refused."""
        self.assertEqual(catch(smtplib.SMTPDataError, send, port, content).smtp_code, 451)

    def test_what_is_in_a_mail_is_no_reason_to_refuse_it(self) -> None:
        mails = [make_mail(random.Random(seed)) for seed in range(20)]
        mails += [content for _, content, _ in list_readings()]
        for flag, start in (("-json", '{"event": "message"'), ("-multipleMessageReceiving", "")):
            folder, maildir = self.folder / flag, self.folder / f"{flag}-maildir"
            process = self.start(f"-saveDir={folder}", f"-maildir={maildir}", flag)
            port = self.port(process)
            lines: list[str] = []
            reader = threading.Thread(target=lines.extend, args=(process.stdout,))
            reader.start()
            for content in mails:
                send(port, content)
            process.terminate()
            reader.join(TIMEOUT)
            self.assertEqual(len([line for line in lines if line.startswith(start)]), len(mails))
            self.assertEqual(len([*folder.iterdir()]), 2 * len(mails))
            self.assertEqual(len([*(maildir / "new").iterdir()]), len(mails))

    def test_answers_to_nobody(self) -> None:
        process = self.start("-control", stdin=subprocess.PIPE)
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write("clear\n")
        process.stdin.flush()
        error = "smtpmock: cannot write to stdout: Broken pipe; lines lost: 2\n"
        self.assertEqual((process.wait(TIMEOUT), process.stderr.read()), (1, error))
        process.stdout = None

    def test_save_dir(self) -> None:
        def use(begin: int, port: int) -> None:
            send(port, b"Subject: first\r\n\r\n\xff", b"Subject: second")
            self.assertEqual(self.names(), self.pairs(*range(1, begin + 2)))
            mail = (self.folder / f"{begin:06d}.eml").read_bytes()
            trace = rb"\AReturn-Path: <a@a.com>\r\nReceived: from [^;]*;\r\n[^\r]*\r\n"
            self.assertRegex(mail, trace + rb"Subject: first\r\n\r\n\xff\r\n\Z")
            record = json.loads((self.folder / f"{begin + 1:06d}.json").read_text())
            self.assertEqual((record["subject"], record["id"]), ("second", 2))

        for begin in (1, 3):
            flags = f"-saveDir={self.folder}", "-multipleMessageReceiving"
            self.assertEqual(run_main(functools.partial(use, begin), *flags)[1:], ("", 0))

    def test_two_processes_in_one_folder(self) -> None:
        ports = [self.port(self.start(f"-saveDir={self.folder}")) for _ in range(2)]
        in_threads(*(lambda port=port: send(port, *[b"hi"] * 10) for port in ports * 2))
        self.assertEqual(self.names(), self.pairs(*range(1, 41)))

    def test_a_disk_that_fills(self) -> None:
        import resource

        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))  # noqa: E731
        process = self.start(f"-saveDir={self.folder}", f"-maildir={self.folder / 'mail'}", preexec_fn=limit)
        port = self.port(process)
        self.refuse(port, b"x" * 18000)
        self.assertEqual(self.names(), ["mail"])
        send(port, b"Subject: small")
        self.assertEqual(self.names(), [*self.pairs(2), "mail"])
        self.assertRegex(self.stop(process)[1], r"(?s)\A\Z|File too large")

    def test_maildir(self) -> None:
        import mailbox

        content = b"Subject: =?utf-8?q?=E2=82=AC?=\r\n\r\nhi"
        run_main(lambda port: in_threads(*[lambda: send(port, content)] * 8), f"--maildir={self.folder}")
        mails = list(mailbox.Maildir(self.folder, create=False))
        self.assertEqual(len(mails), 8)
        self.assertEqual((mails[0]["Return-Path"], mails[0].get_payload()), ("<a@a.com>", "hi\n"))
        self.assertEqual(list((self.folder / "tmp").iterdir()), [])

    def test_killed_at_any_moment(self) -> None:
        """Every mail that got its 250 is a whole file."""
        rng = random.Random()
        for _ in range(int(os.environ.get("SMTPMOCK_KILLS", "1"))):
            process = self.start(f"-saveDir={self.folder}")
            port = self.port(process)
            accepted: queue.SimpleQueue[str] = queue.SimpleQueue()

            def send_all(name: str, port: int = port, accepted: Any = accepted) -> None:
                with contextlib.suppress(OSError, smtplib.SMTPException), Smtp(port) as client:
                    for count in range(125):
                        client.sendmail("a@a.com", ["b@b.com"], f"Subject: {name}-{count}\n\n{'x' * 5000}\nend")
                        accepted.put(f"{name}-{count}")

            killer = threading.Timer(rng.uniform(0, 0.25), process.kill)
            killer.start()
            in_threads(*(lambda name=name: send_all(name) for name in "abcdefgh"))
            killer.join()
            process.wait(TIMEOUT)
            self.assertLessEqual({accepted.get() for _ in range(accepted.qsize())}, self.take_subjects())

    def take_subjects(self) -> set[str]:
        """The subjects of the mails in the folder, which are whole; it is empty then."""
        subjects = set()
        for path in self.folder.glob("[0-9]*.eml"):
            mail = path.read_text()
            self.assertTrue(mail.endswith(f"\n\n{'x' * 5000}\nend\n"), path)
            subjects.add(mail.partition("Subject: ")[2].partition("\n")[0])
            self.assertTrue(json.loads(path.with_suffix(".json").read_text())["content"].endswith("end\r\n"))
        for path in self.folder.iterdir():
            path.unlink()
        return subjects


class BacklogTest(ProcessCase):
    """A reader that does not read stops nothing."""

    def begin(self, *argv: str) -> tuple[Any, int]:
        """A process with a small pipe, whose first line was read, and its port."""
        process = self.start("-shutdownTimeout=0.1", *argv, stdin=subprocess.PIPE)
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        return process, self.port(process)

    def send_much(self, port: int) -> None:
        """Three mails and many refusals, more than a pipe takes in any mode."""
        with Smtp(port) as client:
            for number in range(3):
                client.sendmail("a@a.com", ["b@b.com"], f"Subject: {number}\n\n" + 1500 * f"{'x' * 70}\n")
            client.send("VRFY\r\n" * 1000)
            for _ in range(1000):
                client.getreply()

    def test_each_mode_and_each_way_to_stop(self) -> None:
        def stop(argv: str, way: str) -> tuple[str, int, str]:
            process, port = self.begin(*argv.split())
            self.send_much(port)
            if way == "SIGTERM":
                process.send_signal(signal.SIGTERM)
            elif way == "stop":
                process.stdin.write("stop\n")
                process.stdin.flush()
            else:
                process.stdin = process.stdin.close()
            status = process.wait(TIMEOUT)
            # With a log on stderr, it is that which nobody reads.
            last_line = "" if argv == "-json -log" else process.stderr.read().splitlines()[-1]
            return argv, status, re.sub(r"\d+", "N", last_line)

        # A long shutdown timeout is no time for a reader that does not read.
        modes = f"|-show|-log|-lint|-json|-json -log|-control|-json -shutdownTimeout={10 * TIMEOUT}".split("|")
        ways = [*((mode, "SIGTERM") for mode in modes), ("-control", "stop"), ("-control", "end of stdin")]
        results = in_threads(*(lambda way=way: stop(*way) for way in ways))
        error = "smtpmock: not all output was read; lines lost: N"
        expected = [(mode, 3 if mode == "-lint" else 1, error if mode != "-json -log" else "") for mode, _ in ways]
        self.assertEqual(results, expected)

    def test_a_stop_with_a_slow_reader(self) -> None:
        """It has the shutdown timeout and a little more, and a second signal ends that."""
        for timeout, numbers in (("0.1", [signal.SIGTERM]), ("300", [signal.SIGTERM, signal.SIGINT])):
            process, port = self.begin("-json", f"-shutdownTimeout={timeout}")
            self.send_much(port)
            for number in numbers:
                process.send_signal(number)
            while process.poll() is None:
                os.read(process.stdout.fileno(), 4096)
                time.sleep(0.02)
            self.assertEqual(process.returncode, 1, timeout)

    def test_what_is_read_late_is_whole_and_in_order(self) -> None:
        process, port = self.begin("-json", "-lint", "-multipleMessageReceiving")
        self.send_much(port)
        send(port, "Subject: 3")
        subjects = [json.loads(process.stdout.readline())["subject"] for _ in range(5)]
        self.assertEqual((subjects[:3], {*subjects[3:]}), (["0", "1", "2"], {"3", None}))  # None: what was refused
        self.assertEqual(json.loads(self.stop(process, 3)[0])["event"], "done")

    def send_while_it_is_read(self, process: Any, port: int, content: str, pause: float) -> bytearray:
        """What is read, in small pieces, until the mail has got its reply, and what could be read then."""
        output, read, is_sent = process.stdout.fileno(), bytearray(), threading.Event()

        def read_slowly() -> None:
            while not is_sent.wait(pause):
                if select.select([output], [], [], 0)[0]:
                    read.extend(os.read(output, 4096))

        def send_one() -> None:
            send(port, content)
            is_sent.set()

        in_threads(read_slowly, send_one)
        os.set_blocking(output, False)
        with contextlib.suppress(BlockingIOError):
            read.extend(os.read(output, 65536))
        return read

    def test_an_event_is_out_before_its_reply(self) -> None:
        """Though it is long, and read slowly."""
        process, port = self.begin("-json")
        read = self.send_while_it_is_read(process, port, f"Subject: {'x' * 500}\n\n" + 400 * f"{'x' * 500}\n", 0.001)
        self.assertEqual(json.loads(read)["event"], "message")

    def test_no_mail_waits_behind_others(self) -> None:
        """Though somebody reads again."""
        process, port = self.begin("-json")
        self.send_much(port)
        self.assertLess(len(self.send_while_it_is_read(process, port, "hi", 0.01)), 300_000)  # of 600,000

    def test_a_reader_that_leaves(self) -> None:
        """What was queued is lost, and is counted; later mail is refused."""
        process, port = self.begin("-json", "-multipleMessageReceiving")
        self.send_much(port)
        process.stdout.close()
        with contextlib.suppress(smtplib.SMTPDataError):  # the thread that writes may not have seen it yet
            send(port, "hi")
        self.assertEqual(catch(smtplib.SMTPDataError, send, port, "hi").smtp_code, 451)
        last_line = self.stop(process, 1)[1].splitlines()[-1]
        lost = re.fullmatch(r"smtpmock: cannot write to stdout: Broken pipe; lines lost: (\d+)", last_line)
        self.assertGreaterEqual(int(lost[1]) if lost else 0, 3 + 1 + 2 + 1)  # mails, refusals, a refused mail, the end

    @unittest.skipUnless(os.name == "posix", "needs a pseudo-terminal")
    def test_a_stdout_of_another_kind(self) -> None:
        import pty

        makers: dict[str, Callable[[], Any]] = {
            "a terminal": pty.openpty,
            "a socket": lambda: [end.detach() for end in socket.socketpair()],
            "a pipe that does not block": os.pipe,
        }
        for kind, make in makers.items():
            with self.subTest(kind):
                ours, theirs = make()
                os.set_blocking(theirs, kind != "a pipe that does not block")
                with open(ours, "rb") as reader, open(theirs, "wb") as writer:
                    process = subprocess.Popen([sys.executable, "-m", "smtpmock", "-json"], stdout=writer, cwd=HERE)
                    self.addCleanup(process.wait)
                    self.addCleanup(process.kill)
                    send(json.loads(reader.readline())["port"], *["Subject: Hi\n\n" + 150 * f"{'x' * 900}\n"] * 2)
                    self.assertEqual(json.loads(reader.readline())["subject"], "Hi")
                    reader.readline()
                    process.terminate()
                    self.assertEqual(json.loads(reader.readline())["event"], "done")
                    self.assertEqual(process.wait(TIMEOUT), 0)


# Mails, with Python's escapes, and the lines that -show prints of them.
SHOWN_MAILS = read_rows(r"""
From: =?utf-8?q?J=C3=BCrgen?= <a@a.com> | Received: here | To: b@b.com, |  c@c.com |
    Date: Fri, 21 Nov 1997 09:55:06 -0600 | Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?= | | Grüße, | |  and {x*200}
    => From: Jürgen <a@a.com> | To: b@b.com, c@c.com | Date: Fri, 21 Nov 1997 09:55:06 -0600 | Subject: Grüße | |
    Grüße, | |  and {x*200}
Subject: =?utf-8?q?=1B[1m=C2=9B_=E2=80=AE?= | | \x1b]0;title\x07 a\tb \xe2\x80\xae\xc2\x9b 👨\xe2\x80\x8d👩 \xff
    => Subject: \x1b[1m\x9b \u202e | | \x1b]0;title\x07 a    b \u202e\x9b 👨\u200d👩 �
Content-Type: text/html; charset=utf-8 | | <html><head><title>no</title><style>no</style></head><h1>Gr&uuml;&szlig;e</h1> |
    <script>no</script><!-- no --><p>Please <a href="https://a.test/?b=1&amp;c=2">confirm | <b>it</b></a>, or
    <a href='https://a.test'>https://a.test</a> &lt; | <ul><li>one</li><li>two</li></ul> |
    1 < 2<br>x<img src="cid:1" alt="Logo"><table><tr><td>a<td>b</td><td>c</td></tr><tr><td>d</table>
    =>  | Grüße | | Please confirm it <https://a.test/?b=1&c=2>, or https://a.test < | | - one | - two | 1 < 2 | xLogo | |
    ab c | d
Subject: s | Content-Type: multipart/mixed; boundary=b | | --b | Content-Type: text/html | | <p>no | --b | | yes | --b |
    Content-Type: application/pdf; name="a\x1b.pdf" | | {x*1234} | --b | Content-Type: image/png | | x | --b--
    => Subject: s | Attachment: a\x1b.pdf (application/pdf, 1.2 kB) | Attachment: without a name (image/png, 1 byte) | |
    yes
""")


class ShowTest(ProcessCase):
    """What a person sees of mails and of refusals."""

    def watch(self, *argv: str, use: Callable[[int], object]) -> list[str]:
        """The lines that are printed until a stop, without their times."""
        process = self.start(*argv)
        use(self.port(process))
        out, _ = self.stop(process)
        out = re.sub("(?<=rcpt )TO|(?<=mail )FROM", lambda match: match[0].lower(), out)  # as of Python 3.13
        self.assertNotRegex(out, "(?m)^(accepted|refused|ended)")
        return re.sub(r"(?m)^\d\d:\d\d:\d\d ", "", out).splitlines()

    def test_mails(self) -> None:
        mails, shown = [], []
        for row in SHOWN_MAILS:
            mails.append(b"\n".join(map(read_escapes, row.given)))
            shown += ["accepted", *(f"  {line}".rstrip() for line in read_items(row.expected))]
        lines = self.watch("-show", use=lambda port: send(port, *mails))
        self.assertEqual([line.partition(" a@a.com")[0] for line in lines], shown)

    def test_long_mails(self) -> None:
        """Of a mail of many lines, or of long ones, the beginning."""
        contents = {"x\n" * 5000: 99, f"{'x' * 600}\n" * 500: 18, f"{'<p>x' * 100}\n" * 200: 99}
        mails = [f"Subject: s\nContent-Type: text/{'html' if '<' in x else 'plain'}\n\n{x}" for x in contents]
        lines = self.watch("-show", use=lambda port: send(port, *mails))
        shown = "\n".join(lines).split("accepted")[1:]
        self.assertEqual([text.count("\n  x") + text.count("\n\n") for text in shown], [*contents.values()])
        self.assertTrue(all("\n  Subject: s\n\n  x" in text and "  ..." in text for text in shown))

    def test_hostile_html(self) -> None:
        for part in ("<a ", "<!--", '<a b=">', "<a href='x' <a b='>", "<b> </b>", "<![", "</a", "<script>", "&#"):
            for begin in ("", "<a b", "<p>"):
                content = begin + part * (120_000 // len(part))
                started = time.process_time()
                smtpmock._read_html(content)
                self.assertLess(time.process_time() - started, 5, part)  # without precautions, minutes

    def test_one_line(self) -> None:
        """What is long is cut."""
        long = f"{'a' * 60}@{'b' * 60}.com"
        cut = f"{long[:97]}..."

        def use(port: int) -> None:
            with Smtp(port) as client:
                client.sendmail(long, ["b@b.com"] * 4 + [long] * 3, f"Subject: {'s' * 101}\n\n")
                client.sendmail("a@a.com", "b@b.com", f"Subject: {'s' * 99}\x1b\n\n" + 890 * "x")

        lines = self.watch("-multipleRcptto", "-multipleMessageReceiving", use=use)
        many = ", ".join(["b@b.com"] * 4 + [cut])
        self.assertEqual(lines[0], f'accepted {cut} -> {many} and 2 more "{"s" * 97}..." 114 bytes')
        self.assertEqual(lines[1], f'accepted a@a.com -> b@b.com "{"s" * 99}\\x1b" 1.0 kB')

    def test_refusals(self) -> None:
        """Also beside an accepted mail, and after it."""

        def use(port: int) -> None:
            with Smtp(port) as client:
                client.sendmail("a@a.com", ["root", "b@b.com", "c@c.com"], "hi")
                self.assertRaises(smtplib.SMTPSenderRefused, client.sendmail, "root", ["b@b.com"], "hi")
                self.assertRaises(smtplib.SMTPDataError, client.sendmail, "a@a.com", ["d@d.com"], "hi")
                client.sendmail("a@a.com", ["b@b.com"], "hi")
                client.docmd("x" * 200 + "\x1b")
            with Smtp(port) as client:
                client.ehlo("a.com")

        for flags, second in (["-quiet=false"], ""), (["-multipleRcptto", "-multipleMessageReceiving"], "b@b.com, "):
            lines = self.watch("-rule", "message d@d.com: reply 554 No: 1", *flags, use=use)
            expected = [
                "refused 501 RCPT TO requires valid email address (rcpt to:<root>)",
                f'accepted a@a.com -> {second}c@c.com "" 4 bytes',
                "refused 501 MAIL FROM requires valid email address (mail from:<root>)",
                "refused 554 No: 1 (<4 bytes>)",
                'accepted a@a.com -> b@b.com "" 4 bytes',
                f"refused {UNRECOGNIZED} ({'x' * 97}...)",
                "ended without a mail after ehlo a.com",
            ]
            self.assertEqual(lines, expected)


# Commands that change nothing, and what is said about them.
BAD_COMMANDS = read_rows("""
foo                                     => 'foo': must be rule RULE, play TRANSCRIPT, configure FLAG..., clear, reset, purge, check, {MORE}
stop now                                => 'stop now': must be {MORE}
rule                                    => rule '': must be 'STAGE: ACTION' or 'STAGE ADDRESS: ACTION'
rule RCPT: reply 450; delay soon        => rule 'RCPT: reply 450; delay soon': delay='soon': must be a number of {MORE}
configure -msgRcpttoReceived="450       => No closing quotation
configure -failFast -port=1             => -port=1: cannot be changed {MORE}
configure -failFast -json               => -json: cannot be changed while the server runs
configure -failFast -tlsCert=/dev/null  => {MORE}cannot be loaded: {MORE}; without -tlsKey, the file must have {MORE}
configure -profile=exmi                 => -profile: 'exmi' is unknown; did you mean exim?
configure -failFst                      => -failFst: there is no such flag; did you mean -failFast?
""")


class ControlTest(ProcessCase):
    """The command line obeys its stdin, and tells in events what happens."""

    def setUp(self) -> None:
        self.server = self.start("-control", "-multipleMessageReceiving", stdin=subprocess.PIPE)
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self.read_lines)
        self.reader.start()
        self.addCleanup(self.reader.join, TIMEOUT)  # after the process has been killed
        self.addCleanup(self.server.kill)
        self.listening = self.read()

    def read_lines(self) -> None:
        for line in self.server.stdout:
            self.lines.put(line)

    def read(self) -> Any:
        """The next event."""
        return json.loads(self.lines.get(timeout=TIMEOUT))

    def write(self, text: str) -> None:
        self.server.stdin.write(text)
        self.server.stdin.flush()

    def ask(self, command: str) -> Any:
        """The answer to a command, without its echo."""
        self.write(command + "\n")
        answer = self.read()
        self.assertEqual(answer.pop("command"), command)
        return answer

    def obey(self, command: str, messages: int = 0) -> None:
        self.assertEqual(self.ask(command), {"event": "done", "messages": messages})

    def connect(self) -> Smtp:
        client = Smtp(self.listening["port"])
        self.addCleanup(client.close)
        client.ehlo("a.com")
        return client

    def try_recipient(self) -> tuple[int, bytes]:
        with Smtp(self.listening["port"]) as client:
            client.ehlo("a.com")
            client.mail("a@a.com")
            reply = client.rcpt("b@b.com")
        self.assertEqual(self.read()["event"], "message")
        return reply

    def test_secrets_are_not_repeated(self) -> None:
        for flags in (
            "=alice:secret",
            " alice:secret",
            "=secret",
            "='alice:secret' bob:secret",
            "=alice:secret -prot=1",
        ):
            for flag in ("-authUsers", "--auth-users", "-authUser"):
                self.write(f"configure {flag}{flags}\n")
                answer = self.read()
                self.assertNotIn(
                    "secret", json.dumps(answer).replace("users to secrets", "").replace("user and secret", "")
                )
                self.assertTrue(answer["command"].startswith(f"configure {flag}"), answer)

    def test_a_transcript(self) -> None:
        """Its line breaks are \\n, also in the output of smtplib; the answer does not repeat it, for its secrets."""
        reply = r"reply: b'220 a\r\n'\nsend: 'ehlo [1.2.3.4]\r\n'\nreply: b'250 b\r\n'"
        for transcript in (r"S: 220 a\nC: AUTH PLAIN c2VjcmV0\nS: 235 ok\nC: EHLO a\nS: 250 b", reply):
            self.write(f"play {transcript}\n")
            self.assertEqual(self.read(), {"event": "done", "command": "play", "messages": 0})
        for _ in range(2):
            client = self.connect()
            self.assertEqual(client.ehlo_resp, b"b")
            client.close()
            self.assertEqual(self.read()["event"], "message")
        self.write("play c2VjcmV0\n")
        answer = self.read()
        self.assertEqual((answer["event"], answer["command"]), ("error", "play"))
        self.obey("purge")

    def test_rules(self) -> None:
        self.obey("rule RCPT: reply 450 later; times=2")
        self.assertEqual(self.try_recipient(), (450, b"later"))
        self.obey("rule VRFY b@b.com: reply 252-so\\n252 so", messages=1)
        client = self.connect()
        self.assertEqual(client.docmd("VRFY", "<b@b.com>"), (252, b"so\nso"))
        client.mail("a@a.com")
        self.assertEqual([client.rcpt("b@b.com")[0] for _ in range(2)], [450, 250])
        client.close()
        self.assertEqual(self.read()["event"], "message")

    def test_configure(self) -> None:
        client = self.connect()
        self.obey('configure -failFast --msg-rcptto-received=\'250 \u00fc "q"\' -msgNoopReceived "250-a\\n250 b"')
        self.assertEqual(client.noop(), (250, b"Ok"))  # the options of its session are as they were
        self.assertEqual(self.connect().noop(), (250, b"a\nb"))
        self.assertEqual(self.try_recipient(), (250, '\u00fc "q"'.encode()))
        other = self.connect()
        self.assertEqual(other.docmd("FOO")[0], 502)
        self.assertRaises(smtplib.SMTPServerDisconnected, other.noop)

    def test_disconnect(self) -> None:
        for command, error in {"disconnect": "", "disconnect reset": "reset by peer"}.items():
            client = self.connect()
            self.write(f"{command}\n")
            with self.assertRaisesRegex(smtplib.SMTPServerDisconnected, error):
                client.getreply()
            self.assertEqual(sorted(self.read()["event"] for _ in range(2)), ["done", "message"])

    def test_bad_commands(self) -> None:
        for row in BAD_COMMANDS:
            with self.subTest(row.given):
                answer = self.ask(row.given[0])
                self.assertEqual(answer["event"], "error")
                self.assertRegex(answer["error"], row.pattern)
                self.obey("check")  # no rule without an action is left
        self.server.stdin.buffer.write(b"\n\xff\n")
        self.write("")
        self.assertEqual(self.read()["command"], "\\xff")
        client = self.connect()
        self.assertEqual(client.docmd("FOO")[0], 502)
        client.mail("a@a.com")
        self.assertEqual(client.rcpt("b@b.com"), (250, b"Received"))

    def test_each_way_to_stop(self) -> None:
        """The server says its last, and ends well."""
        for way in ("command", "end", "signal"):
            with self.subTest(way):
                if way != "command":
                    self.setUp()
                client = self.connect()
                if way == "command":
                    self.write(" stop \nclear\n")
                elif way == "end":
                    self.server.stdin.close()
                    self.server.stdin = None
                else:
                    self.server.send_signal(signal.SIGTERM)
                self.assertEqual(client.getreply()[0], 421)
                client.close()
                self.assertEqual(self.read()["event"], "message")
                self.assertEqual(self.read(), {"event": "done", "command": "stop", "messages": 1})
                self.assertEqual(self.server.wait(TIMEOUT), 0)
                self.reader.join(TIMEOUT)
                self.assertTrue(self.lines.empty())


# -------------------------------------------------------------------------------------------- HTTP

# Requests with their headers (of those without a path, only the Host), and the status of the answer.
HTTP_SENDERS = read_rows("""
GET / | HEAD / | LOCALHOST:1 | localhost. | 127.0.0.1.:80 | 192.0.2.7 | [::1]:8025 | [fe80::1%eth0]:8025 | smtp | my_smtp-1:8025 |
    a.LOCALHOST | smtp.my.internal | pc.local | mail.test:8025 | evil.test. | mail.corp.example:8025 => 200
evil.example | www.mail.corp.example | 127.0.0.1.evil.example | localhost.evil.example | eviltest.example | evil.test.. |
    [::1].evil.example | [evil.example] | ::1 | 999.1.1.1 | localhost@evil.example | localhost, evil.example | localhost:80:80 |
    .test | GET / Host: | POST /purge Host: evil.example | GET / VISIT Host: evil.example => 421
GET / Host: localhost Host: localhost => 400
GET / Origin: http://localhost | GET / Host: LocalHost:8025 Origin: http://localhost:8025 | POST /check Origin: http://localhost |
    GET /messages Sec-Fetch-Site: same-origin | GET /messages Sec-Fetch-Site: none | GET /view/1 VISIT | GET / VISIT |
    HEAD /?refresh=0 VISIT => 200
GET / Origin: http://localhost:81 | GET / Origin: https://localhost | GET / Origin: http://evil.example | GET / Origin: null |
    GET / Origin: | GET / Origin: http://localhost Origin: http://evil.example | GET / VISIT Origin: http://evil.example |
    POST /purge Origin: http://evil.example | POST /purge Origin: null | POST /purge VISIT Origin: http://localhost => 403
GET /messages Sec-Fetch-Site: same-site | GET /messages Sec-Fetch-Site: cross-site | GET / Sec-Fetch-Site: cross-site |
    GET /messages Sec-Fetch-Site: none Sec-Fetch-Site: cross-site | GET / Sec-Fetch-Site: cross-site Sec-Fetch-Mode: navigate |
    GET / Sec-Fetch-Site: cross-site Sec-Fetch-Mode: navigate Sec-Fetch-Dest: iframe |
    GET / Sec-Fetch-Site: cross-site Sec-Fetch-Mode: no-cors Sec-Fetch-Dest: document |
    GET /messages VISIT | GET /messages/1/eml VISIT | GET /view/1/html VISIT | POST / VISIT | POST /purge VISIT => 403
""")

# Requests, and the errors, in which {PATH} is that of the request.
HTTP_ERRORS = read_rows("""
GET /nothing | GET /messages/ID | GET /messages/1/ID | GET /1/ | GET /stop | POST /stop | GET /../etc/passwd |
    GET http://localhost/messages | OPTIONS * => 404 there is no {PATH}
GET /message | GET /messages/         => 404 there is no {PATH}; did you mean /messages?
GET /messages/x                       => 404 there is no {PATH}{MORE}
GET /messages/99 | GET /messages/99/eml | GET /view/0 | GET /view/01 | GET /messages/{1*5000}
    => 404 there is no message {MORE}: it was purged, or never recorded
GET /messages/1/attachments/7         => 404 message 1 has 2 attachments, counted from 0
GET /purge | OPTIONS /purge           => 405 /purge is for POST
POST /messages | DELETE /messages/1 | TRACE / | get / => 405 {PATH} is for GET and HEAD
GET /messages?tmeout=1                => 400 tmeout='1': must be one of to, {MORE}; did you mean timeout?
GET /messages?to=a&to=b               => 400 to='b': must be one of {MORE}; it is there twice
GET /messages?timeout=61              => 400 timeout=61.0: must be a number of seconds from 0 to 60
GET /messages?timeout=nan             => 400 timeout=nan: must be a number of seconds from 0 to 60
GET /messages?timeout=                => 400 timeout='': must be a number of seconds from 0 to 60
GET /messages?count=0                 => 400 count=0: must be an integer from 1 up
GET /messages?accepted=maybe          => 400 accepted='maybe': must be true or false
GET /messages?after=-1                => 400 after=-1: must be an integer from 0 up
GET /messages?after=99                => 400 after=99: is of another run; this one has recorded 3 messages
GET /?refresh=x                       => 400 refresh='x': must be an integer from 0 to 3600
GET /violations?x= | POST /purge?x=   => 400 x='': must be one of no parameters
POST /purge Transfer-Encoding: chunked => 411 a body must have a Content-Length
POST /purge Content-Length: x | POST /purge Content-Length: 1x | POST /purge Content-Length: -1 |
    POST /purge Content-Length: 1 Content-Length: 1 => 400 Content-Length must be one number
POST /rule Content-Length: 1048577    => 413 a body must not be longer than 1048576 bytes
""")

# What a client sends, with Python's escapes, and the status.
HTTP_BYTES = read_rows(r"""
GET /\r\n | GET / HTTP/1.1\n\n | GET / FTP/1.0\r\nHost: a\r\n\r\n | a b c d\r\n\r\n | GET / HTTP/1.1\r\n\r\n |
    GET / HTTP/1.1\r\nno colon\r\n\r\n | GET / HTTP/1.1\r\nHost: a\r\nno colon\r\nOrigin: http://evil.example\r\n\r\n |
    \x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n | GET /{a*70000} HTTP/1.1\r\nHost: a\r\n\r\n => 400
GET / HTTP/1.1\nHost: a\n\n | GET / HTTP/1.0\r\nHost: a\r\n\r\n => 200
GET / HTTP/2.0\r\nHost: a\r\n\r\n => 505
GET / HTTP/1.1\r\n{A: b\r\n*200}\r\n | GET / HTTP/1.1\r\nA: {b*70000}\r\n\r\n => 431
""")

# What a query finds among three messages.
HTTP_QUERIES = read_rows("""
/messages | /messages?after=0 | /messages?count=9 | /messages?timeout=0&count=3 => 1 2 3
/messages?to=bob@example.com | /messages?to=BOB@Example.COM | /messages?accepted=true => 1 3
/messages?to=eve+x@example.com | /messages?to=eve%2Bx@example.com | /messages?subject=Gr%C3%BC%C3%9Fe => 1
/messages?to=bob@example | /messages?subject=gr%C3%BC%C3%9Fe | /messages?after=3 =>
/messages?from=shop@example.com => 1 2
/messages?accepted=false => 2
/messages?after=1 => 2 3
/messages?from= | /messages?accepted=true&to=bob@example.com&after=1 | /messages?timeout=60&subject=Hello => 3
""")

HOSTILE_HTML = """<html><head><base href="http://evil.example/"><meta http-equiv="refresh" content="0; url=http://evil.example/">
<LINK rel="preconnect" href="http://evil.example"><script>alert(1)</script></head><body background="cid:pixel@a.com">
<iframe src="http://evil.example/"></iframe><img src="cid:pixel%40a.com"><img src=cid:page@a.com><img src='cid:none@a.com'>
"""
GIF = base64.b64decode("R0lGODlhAQABAAAAACwAAAAAAQABAAACAkQBADs=")
PAGE_TAGS = "html meta title style h1 h2 a main dl dt dd bdi p b code pre small time span details summary iframe"
# Requests of all kinds, and what each answer says.
HTTP_ANSWERS = """
GET / | GET /view/1 | GET /view/1/html | GET /messages | GET /messages/1/eml | GET /messages/1/attachments/0 | GET /ca.pem |
POST /check | POST /rule | POST /purge Host: evil.example | GET / Host: a Host: a | GET /nothing | GET /purge | TRACE / | GET / Origin: null
"""
HTTP_HEADERS = """
Cache-Control: no-store | Connection: close | Cross-Origin-Opener-Policy: same-origin | X-Dns-Prefetch-Control: off |
Cross-Origin-Resource-Policy: same-origin | Referrer-Policy: no-referrer | X-Content-Type-Options: nosniff
"""
# Beside those that -control refuses, too.
BAD_HTTP_COMMANDS = read_rows("""
clear x | disconnect now => {MORE}: must be rule RULE, play TRANSCRIPT, configure FLAG..., clear, {MORE}, disconnect reset
configure -http=1 | configure -httpNames=a.com => {MORE}: cannot be changed while the server runs
configure -tlsCert=/dev/null | configure -tlsCert=test -tlsKey=test | configure -saveDir=/tmp | configure -maildir=x |
    configure -saveCa=x | configure -tlsKey=test => -{MORE}: -http must not open files
""")


class HttpCase(ServerCase):
    """A server with two mails, and a refused one between them."""

    def setUp(self) -> None:
        super().setUp()
        self.server = Server(not_registered_emails=["nobody@example.com"], keep_all=True).start()
        self.addCleanup(self.server.__exit__)
        self.port = self.serve_http(http_names=["Mail.Corp.Example."])
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = "Shop <shop@example.com>", "bob@example.com", "Gr\u00fc\u00dfe <b>"
        mail.set_content("Dear <Bob>,\n")
        mail.add_alternative(HOSTILE_HTML, subtype="html")
        page: Any = mail.get_payload(1)
        page.add_related(GIF, "image", "gif", cid="<pixel@a.com>")
        page.add_related(b"<svg/>", "image", "svg+xml", cid="<page@a.com>", filename="<\u00fc>.svg")
        with Smtp(self.server) as client:
            client.sendmail("shop@example.com", ["bob@example.com", "eve+x@example.com"], mail.as_bytes())
            catch(smtplib.SMTPRecipientsRefused, client.sendmail, "shop@example.com", ["nobody@example.com"], "")
            client.sendmail("", ["bob@example.com"], "Subject: Hello\r\n\r\nHow are you?")

    def serve_http(self, **flags: Any) -> int:
        self.http = Memory.serve_http(self.server, http=0, **flags)
        self.addCleanup(self.http.__exit__, None, None, None)
        return int(self.http.__enter__().rpartition(":")[2])

    def connect_http(self, data: bytes = b"") -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), TIMEOUT)
        self.addCleanup(sock.close)
        sock.sendall(data)
        return sock

    def ask(self, request: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """The status, headers and body of the answer to a request such as GET / Origin: null.

        There is a right Host unless it has another; VISIT is what a browser sends for a link.
        """
        visit = "Sec-Fetch-Site: cross-site Sec-Fetch-Mode: navigate Sec-Fetch-Dest: document"
        start, *lines = re.split(r" (?=[A-Z][\w-]+:(?: |$))", request.replace("VISIT", visit))
        lines += ["Host: localhost"] * ("Host:" not in request) + [f"Content-Length: {len(body)}"] * bool(body)
        head = "\r\n".join([f"{start} HTTP/1.1", *lines, "", ""])
        with self.connect_http(head.encode() + body) as sock, sock.makefile("rb") as file:
            start, _, content = file.read().partition(b"\r\n\r\n")
        status, *lines = start.decode().split("\r\n")
        found = dict(text.split(": ", 1) for text in lines)
        if not request.startswith("HEAD"):
            self.assertEqual(len(content), int(found["Content-Length"]))
        return int(status.removeprefix("HTTP/1.1 ")[:3]), found, content

    def read(self, target: str) -> tuple[int, Any]:
        status, _, content = self.ask(f"GET {target}")
        return status, json.loads(content)

    def find(self, target: str) -> tuple[list[str], int]:
        """The subjects of the messages that a query finds, and the next cursor."""
        status, answer = self.read(target)
        self.assertEqual((status, set(answer)), (200, {"messages", "next"}))
        return [record["subject"] for record in answer["messages"]], answer["next"]

    def post(self, path: str, body: str = "") -> tuple[int, Any]:
        status, _, content = self.ask(f"POST {path}", body.encode())
        return status, json.loads(content)


class HttpTest(HttpCase):
    def test_who_may_ask(self) -> None:
        for item, row in each(HTTP_SENDERS):
            request = item if "/" in item else f"GET / Host: {item}"
            with self.subTest(request):
                self.assertEqual(str(self.ask(request)[0]), row.expected)

    def test_the_host_that_it_listens_on_is_one_of_its_names(self) -> None:
        found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
        with mock.patch("socket.getaddrinfo", return_value=found):
            self.port = self.serve_http(http_host="Smtp.example.com")
        self.assertEqual(self.ask(f"GET / Host: smtp.example.com:{self.port}")[0], 200)
        self.assertEqual(self.ask("GET / Host: mail.example.com")[0], 421)

    def test_errors(self) -> None:
        for request, row in each(HTTP_ERRORS):
            with self.subTest(request[:100]):
                status, headers, content = self.ask(request)
                answer = json.loads(content)
                self.assertEqual(answer["event"], "error")
                pattern = row._replace(expected=row.expected.replace("{PATH}", request.split()[1])).pattern
                self.assertRegex(f"{status} {answer['error']}", pattern)
                allowed = {"GET and HEAD": "GET, HEAD", "POST": "POST"}.get(answer["error"].partition(" is for ")[2])
                self.assertEqual(headers.get("Allow"), allowed)
        self.assertEqual(len(self.server.messages()), 3)

    def test_what_each_answer_says(self) -> None:
        """No answer may be framed, sniffed, cached or read by others, or load anything. HEAD is like GET."""
        for request in [*read_items(HTTP_ANSWERS), "GET /\r\n\r\n"]:
            with self.subTest(request):
                status, headers, _ = self.ask(request)
                if request.startswith("GET") and "\r" not in request:
                    self.assertEqual(self.ask(request.replace("GET", "HEAD", 1)), (status, headers, b""))
                policy = headers.pop("Content-Security-Policy")
                self.assertEqual(policy.partition(";")[0], "default-src 'none'")
                self.assertIn(f"frame-ancestors '{'self' if 'html' in request else 'none'}'", policy)
                self.assertEqual("sandbox" in policy, request not in ("GET /", "GET /view/1"))
                found, expected = set(map(": ".join, headers.items())), set(read_items(HTTP_HEADERS))
                self.assertLessEqual(expected, found)
                others = {text.partition(":")[0] for text in found - expected}
                self.assertLessEqual(others, {"Content-Type", "Content-Length", "Allow", "Content-Disposition"})

    def test_malformed_requests(self) -> None:
        for text, row in each(HTTP_BYTES):
            with self.subTest(text[:40]), self.connect_http(read_escapes(text)) as sock, sock.makefile("rb") as file:
                sock.shutdown(socket.SHUT_WR)
                self.assertEqual(file.readline()[9:12].decode(), row.expected)

    def test_a_transcript(self) -> None:
        """With real line breaks. The answer does not repeat it."""
        transcript = "\n -> EHLO a\n<-  250 b\n -> AUTH PLAIN c2VjcmV0\n<** 535 no\n"
        status, _, content = self.ask("POST /play", body=transcript.encode())
        self.assertEqual((status, json.loads(content)["command"]), (200, "play"))
        with Client(self.server) as client:
            self.assertEqual(client.ask("EHLO a.com", "AUTH PLAIN AHgAeA=="), ["250 b", "535 no"])
        status, _, content = self.ask("POST /play", body=b"AUTH PLAIN c2VjcmV0")
        self.assertEqual((status, b"c2VjcmV0" in content), (400, False))

    def test_nobody_holds_it_up(self) -> None:
        with mock.patch.object(smtpmock, "_HTTP_SECONDS", 0.1):
            self.port = self.serve_http()
        for data in (b"", b"GET / HTTP/1.1\r\n", b"POST /purge HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx"):
            with self.subTest(data), self.connect_http(data) as sock:
                self.assertEqual(sock.recv(1), b"")

    def test_a_refusal_reaches_a_client_that_is_still_sending(self) -> None:
        self.assertEqual(self.post("/rule", "x" * 2**22)[0], 413)
        self.assertEqual(self.post("/rule", "x" * 2**20)[0], 400)

    def test_a_client_that_waits_for_100_continue(self) -> None:
        sock = self.connect_http(
            b"POST /check HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n"
        )
        with sock.makefile("rb") as file:
            self.assertEqual((file.readline()[:12], file.readline()), (b"HTTP/1.1 100", b"\r\n"))
            sock.sendall(b" ")
            self.assertEqual(file.readline(), b"HTTP/1.1 200 OK\r\n")

    def test_queries(self) -> None:
        subjects = {"1": "Gr\u00fc\u00dfe <b>", "2": None, "3": "Hello"}
        for query, row in each(HTTP_QUERIES):
            with self.subTest(query):
                self.assertEqual(self.find(query), ([subjects[number] for number in row.expected.split()], 3))

    def test_records_and_files(self) -> None:
        first, refused, _ = self.server.messages()
        as_json = json.loads(json.dumps(first.to_dict()))
        self.assertEqual(self.read("/messages/1"), (200, as_json))
        self.assertEqual(self.read("/messages")[1]["messages"][0], as_json)
        self.assertEqual(self.read("/messages/2")[1]["refusals"], [list(pair) for pair in refused.refusals])
        found = [violation._asdict() for violation in self.server.violations()]
        self.assertEqual(self.read("/violations"), (200, {"violations": found}))
        for path, kind, name, content in (
            ("eml", "message/rfc822", "1.eml", first.as_bytes()),
            ("attachments/1", "application/octet-stream", "%3C%C3%BC%3E.svg", b"<svg/>"),
        ):
            _, headers, data = self.ask(f"GET /messages/1/{path}")
            self.assertEqual((headers["Content-Type"], data), (kind, content))
            self.assertEqual(headers["Content-Disposition"], f"attachment; filename*=UTF-8''{name}")

    def test_a_loop_of_one_request_sees_each_mail_once(self) -> None:
        """Whatever is sent meanwhile, and purged."""
        seen: list[str] = []

        def read() -> None:
            cursor = 3
            while len(seen) < 40:
                subjects, cursor = self.find(f"/messages?after={cursor}&timeout=60&accepted=true")
                seen.extend(subjects)

        def write(name: str) -> None:
            for number in range(20):
                send(self.server, f"Subject: {name}{number}\r\n\r\n")

        in_threads(read, lambda: write("a"), lambda: write("b"))
        self.assertEqual(sorted(seen), sorted(f"{name}{number}" for name in "ab" for number in range(20)))
        self.assertEqual(self.post("/purge"), (200, {"event": "done", "command": "purge", "messages": 0}))
        self.assertEqual(self.find("/messages"), ([], 43))
        send(self.server, "Subject: later\r\n\r\n")
        self.assertEqual(self.find("/messages?after=43&timeout=60"), (["later"], 44))

    def test_the_next_mail_of_a_session_that_keeps_one(self) -> None:
        self.server.configure(multiple_message_receiving=False)
        with Smtp(self.server) as client:
            for cursor, subject in ((3, "one"), (4, "two")):
                client.sendmail("a@a.com", ["b@b.com"], f"Subject: {subject}\r\n\r\n")
                self.assertEqual(self.find(f"/messages?after={cursor}&timeout=60"), ([subject], cursor + 1))
        self.assertEqual(self.find("/messages?after=5"), ([], 5))

    def test_waits_in_vain(self) -> None:
        """What is noted on an old mail is no other mail."""
        status, answer = self.read("/messages?timeout=0.05&count=2&subject=Hello")
        self.assertEqual((status, answer["next"], len(answer["messages"])), (404, 3, 1))
        self.assertRegex(answer["error"], r"^1 of 2 matching messages came in 0\.05 seconds\n  recorded messages: 3\n")
        with Smtp(self.server) as client:
            client.sendmail("a@a.com", ["b@b.com"], "hi")

            def note() -> None:
                self.assertTrue(wait_until(lambda: Memory.count_waits(self.server) == 1))
                client.rset()

            (status, answer), _ = in_threads(lambda: self.read("/messages?after=4&timeout=0.2"), note)
        self.assertEqual((status, answer["messages"], answer["next"]), (404, [], 4))

    def test_commands(self) -> None:
        """They are those of -control, with real line breaks, and the answers are its events."""
        rule = "rule VRFY: reply 252-a\n252 \\n\u00fc"
        self.assertEqual(self.post("/rule", f"{rule[5:]}\n"), (200, {"event": "done", "command": rule, "messages": 3}))
        with Smtp(self.server) as client:
            client.ehlo("a.com")
            self.assertEqual(client.docmd("VRFY", "b"), (252, "a\n\\n\u00fc".encode()))
            self.assertEqual(self.post("/disconnect", "reset")[0], 200)
            self.assertRaises(smtplib.SMTPServerDisconnected, client.noop)
        self.assertEqual([self.post("/check")[0], self.post("/rule", "RSET: close")[0]], [200, 200])
        status, event = self.post("/check")
        self.assertEqual(
            (status, event["event"], event["error"][:31]), (409, "error", "<Rule for RSET: 0 hits> was nev")
        )
        self.assertEqual([self.post("/clear")[0], self.post("/check")[0]], [200, 200])
        self.assertEqual(self.post("/configure", "-failFast\n-msgGreeting='220-a\n220 b'")[0], 200)
        with Client(self.server) as other:
            self.assertEqual([other.greeting, other.read()], ["220-a", "220 b"])
        self.assertEqual(self.post("/reset"), (200, {"event": "done", "command": "reset", "messages": 0}))

    def test_bad_commands(self) -> None:
        """They have no effect, and open no file."""
        for command, row in each([*BAD_COMMANDS, *BAD_HTTP_COMMANDS]):
            path, _, body = command.partition(" ")
            if path not in ("foo", "stop") and "-failFast -tlsCert" not in command:  # no paths; and it may open files
                with self.subTest(command), mock.patch("builtins.open") as opened:
                    status, event = self.post(f"/{path}", body)
                    self.assertEqual((status, event["event"], event["command"]), (400, "error", command))
                    self.assertRegex(event["error"], row.pattern)
                    self.assertEqual(self.post("/check")[0], 200)
                    opened.assert_not_called()

    def test_the_certificate_for_tests(self) -> None:
        _, headers, content = self.ask("GET /ca.pem")
        self.assertEqual((headers["Content-Type"], content), ("application/x-pem-file", Memory.test_ca()))
        for name in ("expired", "'wrong host'", "test"):
            self.assertEqual(self.post("/configure", f"-tlsCert={name}")[0], 200)
            with Smtp(self.server) as client:
                self.assertEqual(client.starttls()[0], 220)

    def test_pages(self) -> None:
        _, headers, content = self.ask("GET /")
        page = content.decode()
        self.assertEqual(headers["Content-Type"], "text/html; charset=utf-8")
        self.assertRegex(page, "(?s)Hello.*550 User not found.*Gr\u00fc\u00dfe &lt;b&gt;")  # newest first
        self.assertEqual(re.findall('href="/view/([0-9]+)"', page), ["3", "2", "1"])
        self.assertIn('<meta http-equiv="refresh" content="5">', page)
        self.assertNotIn("refresh", self.ask("GET /?refresh=0")[2].decode().partition("<style>")[0])
        page = self.ask("GET /view/1")[2].decode()
        texts = "Gr\u00fc\u00dfe &lt;b&gt; | Shop &lt;shop@example.com&gt; | <pre>Dear &lt;Bob&gt;, | &lt;\u00fc&gt;.svg | C: data"
        texts += ' | <iframe sandbox title="The HTML of the mail" src="/view/1/html"></iframe>'
        for text in [*texts.split(" | "), 'href="https://www.rfc-editor.org/rfc/rfc5322#section-3.6"']:
            self.assertIn(text, page)
        for link in re.findall('(?:href|src)="(/.*?)"', page):
            self.assertEqual(self.ask(f"GET {link}")[0], 200, link)
        page = self.ask("GET /view/2")[2].decode()
        self.assertIn("550 User not found", page)
        self.assertNotIn("<iframe", page)

    def test_everything_is_escaped(self) -> None:
        """Whatever is in a mail, the page has the tags of its own only."""
        tag = '"\'><script x=">&lt;'
        self.server.configure(lenient_addresses=True, msg_quit_cmd=f"221 {tag}")
        self.server.on("MAIL").reply(f"250 {tag}")
        mail = f"Subject: {tag}\r\nFrom: {tag}\r\nTo: {tag} <{tag}@a.com>\r\nDate: {tag}\r\n"
        mail += f'Content-Type: text/x-{tag}; name="{tag}"\r\nContent-Disposition: attachment; filename="{tag}"\r\n\r\n{tag}\0\x1b\ud800'
        with Client(self.server) as client:
            lines = f"EHLO {tag}|HELO a.com|MAIL FROM:<{tag}@a.com>|MAIL FROM:<a@a.com>|RCPT TO:<{tag}@a.com>|RCPT TO:<b@b.com>"
            client.ask(*lines.split("|"), "DATA")
            client.send(mail.encode("utf-8", "surrogatepass") + b"\r\n.\r\nQUIT\r\n")
            client.read_all()
        number = max(message.id for message in self.server.messages() if message.content)
        for path in ("/", f"/view/{number}"):
            page = self.ask(f"GET {path}")[2].decode()
            self.assertIn("&lt;script", page)
            self.assertNotIn("<script", page)
            self.assertLessEqual(set(re.findall("<(?!/|!)([^ >]*)", page)), set(PAGE_TAGS.split()))

    def test_html_is_sealed(self) -> None:
        status, headers, content = self.ask("GET /view/1/html")
        self.assertEqual((status, headers["Content-Type"]), (200, "text/html; charset=utf-8"))
        policy = "sandbox | img-src data: | style-src 'unsafe-inline' | form-action 'none' | base-uri 'none'"
        self.assertLessEqual(set(policy.split(" | ")), set(headers["Content-Security-Policy"].split("; ")))
        page = content.decode()
        self.assertNotRegex(page.lower(), "<(link|iframe|base|meta)")
        self.assertEqual(page.count(f"data:image/gif;base64,{base64.b64encode(GIF).decode()}"), 2)
        self.assertIn("<img src=cid:page@a.com><img src='cid:none@a.com'>", page)
        self.assertEqual(self.ask("GET /view/3/html")[2], b"")

    def test_an_image_that_is_shown_very_often(self) -> None:
        """The page does not become much larger than the mail."""
        mail = EmailMessage()
        mail.set_content('<img src="cid:a">' * 10000, subtype="html")
        mail.add_related(bytes(10**6), "image", "png", cid="<a>")
        send(self.server, mail.as_bytes())
        self.assertLess(len(self.ask(f"GET /view/{self.server.messages()[-1].id}/html")[2]), 5 * 10**7)

    def test_twenty_readers_wait_when_it_stops(self) -> None:
        def stop() -> None:
            self.assertTrue(wait_until(lambda: Memory.count_waits(self.server) == 20))
            began = time.monotonic()
            self.http.__exit__(None, None, None)
            self.assertLess(time.monotonic() - began, 5)

        *answers, stopped = in_threads(*[lambda: self.read("/messages?timeout=60&count=9&accepted=true")] * 20, stop)
        self.assertIsNone(stopped)
        for status, answer in answers:
            self.assertEqual((status, len(answer["messages"]), answer["next"]), (404, 2, 3))
        self.assertRaises(OSError, self.connect_http)

    def test_stop_leaves_nothing(self) -> None:
        """Whatever its clients are about to do."""
        self.connect_http()
        self.connect_http(b"POST /rule HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nRCPT: drop")
        send(self.server, "x" * 10**7)
        deaf = self.connect_http(b"GET /messages HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assertEqual(deaf.recv(4), b"HTTP")
        self.http.__exit__(None, None, None)
        self.server.stop()
        self.assertEqual(self.threads(), [])
        self.assertRaises(OSError, self.connect_http)
        self.server.check()  # the half of a request made no rule


class HttpFlagTest(ProcessCase):
    """The flags of -http, and what the command line says of it."""

    def test_what_it_says(self) -> None:
        """Where to look, and every mail and recipient is kept unless the flags say otherwise."""
        for flags, kept in (
            ("-http=0", [["b@b.com", "c@c.com"]] * 2),
            ("-http=0 -json -multipleRcptto=false", [["c@c.com"]] * 2),
            ("--http 0 -json -multipleMessageReceiving=false -httpHost=localhost", [["b@b.com", "c@c.com"]]),
        ):
            with self.subTest(flags):
                process = self.start(*flags.split())
                said = process.stdout.readline()
                if "-json" in flags:
                    port, url = (json.loads(said)[name] for name in ("port", "http"))
                else:
                    port = int(said.rpartition(":")[2])
                    url = process.stdout.readline().removeprefix("smtpmock: the mail is at ").removesuffix("/\n")
                send(port, "one", "two", to=["b@b.com", "c@c.com"])
                with urllib.request.urlopen(f"{url}/messages", timeout=TIMEOUT) as answer:
                    self.assertEqual([record["rcpt_tos"] for record in json.load(answer)["messages"]], kept)
                process.send_signal(signal.SIGTERM)
                self.finish(process)

    def test_errors(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for flags, error in (
                (f"-http={port}", f"127.0.0.1:{port}: Address already in use"),
                (f"-http=0 -port={port}", f"127.0.0.1:{port}: Address already in use"),
                ("-http=0 -httpHost=999.1", "999.1:0: .*"),
            ):
                with self.subTest(flags):
                    status, _, err = call_main(*flags.split())
                    self.assertEqual(status, 1)
                    self.assertRegex(err, f"^smtpmock: cannot listen on {error}\n$")
        self.assertEqual([thread.name for thread in threading.enumerate() if "smtpmock" in thread.name], [])

    def test_what_it_imports(self) -> None:
        code = """
            import sys, threading, os, signal, smtpmock
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            smtpmock.main(["-quiet"])
            print(*{"http", "html", "json", "email", "ssl"} & set(sys.modules))
        """
        self.assertEqual(self.run_python(code).splitlines()[1:], [""])


# ---------------------------------------------------------------------- what a failing test is told


class TellingTest(unittest.TestCase):
    """For each usual mistake, the very text that leads to its cause."""

    def assert_warns(self, text: str, call: Callable[[], object]) -> None:
        with self.assertWarns(smtpmock.SMTPMockWarning) as caught:
            call()
        self.assertEqual((str(caught.warning), caught.filename), (text, __file__))

    def assert_silent(self, call: Callable[[], object]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()

    def test_recipients_that_were_not_kept(self) -> None:
        text = "1 of 2 accepted recipients was not kept; keep_all=True or multiple_rcptto=True keeps them all"
        calls: Sequence[Callable[[Server], object]] = (
            Server.messages, Server.messages_and_purge, Server.message, lambda server: server.wait_for_messages(1)
        )  # fmt: skip
        for call in calls:
            with Server() as server, Smtp(server) as client:
                client.sendmail("a@a.com", ["b@b.com", "c@c.com"], "hi")
                self.assert_warns(text, lambda call=call, server=server: call(server))  # type: ignore[misc]
                self.assert_silent(server.messages)  # once per message
        for value in (True, False):
            with Server(Configuration(multiple_rcptto=value)) as server, Smtp(server) as client:
                client.sendmail("a@a.com", ["b@b.com", "c@c.com"], "hi")
                self.assert_silent(server.messages)

    def test_mails_that_were_not_kept(self) -> None:
        with Server() as server:
            send(server, "one", "two", "three")
            text = (
                "2 of 3 accepted mails were not kept; keep_all=True or multiple_message_receiving=True keeps them all"
            )
            self.assert_warns(text, server.message)
        for value in (True, False):
            with Server(multiple_message_receiving=value) as server:
                send(server, "one", "two")
                self.assert_silent(server.messages)
        with Server() as server, Smtp(server) as client:  # what was purged was seen
            for _ in range(2):
                client.sendmail("a@a.com", ["b@b.com"], "hi")
                self.assert_silent(server.messages_and_purge)

    def test_one_message(self) -> None:
        with Server(multiple_message_receiving=True) as server:
            with Client(server) as client:
                client.ask(*ENVELOPE[:2])
                error = catch(WaitTimeoutError, server.message)  # asserted too early
                text = "(?s)^0 accepted messages where there should be 1.*C: MAIL FROM:<a@a.com> / S"
                self.assertRegex(str(error), text)
                self.assertEqual(error.messages, [])
            send(server, "Subject: one\n\n", "Subject: two\n\n")
            self.assertEqual(server.message(lambda message: message.subject == "two").subject, "two")
            error = catch(WaitTimeoutError, server.message)
            self.assertRegex(str(error), "^2 accepted messages where there should be 1")
            self.assertEqual(len(error.messages), 2)
            error = catch(WaitTimeoutError, server.message, lambda message: False, 0.01)
            self.assertRegex(str(error), "^0 matching accepted messages")
            catch(ZeroDivisionError, server.message, lambda message: 1 / 0)
        with Server() as server:
            timer = threading.Timer(0.01, send, (server, "later"))
            timer.start()
            self.assertEqual(server.message(timeout=TIMEOUT).content, b"later\r\n")
            timer.join()

    def test_a_mail_that_was_refused(self) -> None:
        refused = ("RCPT TO:<b@b.com>", "550 User not found")
        with Server(not_registered_emails=["b@b.com"]) as server:
            with Client(server) as client:
                client.ask(*ENVELOPE, "RSET", "QUIT")
            (message,) = server.messages()
            self.assertEqual((message.refusals, message.to_dict()["refusals"]), ([refused], [list(refused)]))
            error = catch(WaitTimeoutError, server.message)
            self.assertIn("not accepted, 'RCPT TO:<b@b.com>' was refused with '550 User not found'", str(error))

    def test_rules_that_were_never_hit(self) -> None:
        with Server() as server:
            server.check()
            server.on("RCPT", "bob@example.com").reply("550 no")
            server.on("NOOP", times=1)
            server.on("MAIL").delay(0)
            with Client(server) as client:
                client.ask("EHLO a.com", "MAIL FROM:<a@a.com>", "RCPT TO:<Bob@example.com>")
                nearest = "the nearest command was 'RCPT TO:<Bob@example.com>'"
                expected = [f"<Rule for RCPT bob@example.com: 0 hits> was never hit; {nearest}"]
                expected += ["<Rule for NOOP: 0 hits> has no action"]
                self.assertEqual(told(server).splitlines(), expected)
            server.reset()
            server.check()

    def test_callbacks_that_raise(self) -> None:
        def fail(*_: object) -> Any:
            raise AssertionError("callback")

        def parse(*_: object) -> Any:
            raise AssertionError("handler")

        shown: list[str] = []
        self.addCleanup(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = lambda arguments: shown.append(str(arguments.exc_value))
        with Server(on_message=fail, handlers=[make_handler("VRFY", parse=parse)], auth_users=fail) as server:
            server.on("NOOP", times=1)(fail)
            rule = server.on("HELP", fail).drop()
            with Client(server) as client:
                lines = ["NOOP", "VRFY", *ENVELOPE, *SEND[2:], "RSET", f"AUTH PLAIN {b64(chr(0) + 'a' + chr(0) + 'b')}"]
                replies = client.ask(*lines, "HELP", "NOOP")
            rule.remove()
            failed = "451 Local error in processing"
            self.assertEqual([replies[index] for index in (0, 1, 7, 9, 10, 11)], [failed] * 5 + ["250 Ok"])
            self.assertEqual(shown, ["callback", "handler", "callback", "callback", "callback"])
            self.assertIn("on_message failed: AssertionError: callback", told(server).splitlines())
            server.check()  # which has told

    def test_many_exceptions_of_which_nothing_can_be_said(self) -> None:
        class MuteError(Exception):
            def __str__(self) -> str:
                raise RuntimeError

        def fail(*_: object) -> Any:
            raise MuteError

        with mock.patch("threading.excepthook"), Server() as server, Client(server) as client:
            server.on("NOOP")(fail)
            replies = client.ask(*["NOOP"] * 200, "RSET")
            self.assertEqual([reply[:3] for reply in replies], [*["451"] * 200, "503"])
            lines = told(server).splitlines()
            self.assertEqual((len(lines), "MuteError" in lines[0]), (100, True))

    def test_connections_that_ended_early(self) -> None:
        """The report has the last ten, and nothing is recorded of them."""
        with Server() as server:
            ways: list[Callable[[Client], object]] = [Client.reset, Client.__exit__]
            for leave in ways * 6:
                leave(Client(server, greets=False))
            ended = "ended early: 127.0.0.1:"
            self.assertTrue(wait_until(lambda: report(server).count(ended) == 10), report(server))
            self.assertIn("left before any command", report(server))
            self.assertEqual((report(server).count("ended early"), server.messages()), (10, []))

    def test_a_tls_handshake_on_a_plain_port(self) -> None:
        """It is one request, and the connection closes."""
        with Server() as server:
            with Client(server) as client:
                client.send(b"\x16\x03\x01\x02\x00\x01")
                self.assertEqual(client.read_all(), ["<closed>"])
            (message,) = server.wait_for_messages(1, TIMEOUT)
            self.assertEqual(message.transcript.splitlines()[1:], ["C: <TLS handshake>", "S: <closed>"])
            self.assertEqual(list_codes([message]), ["tls-on-plain-port"])
            self.assertIn("tls-on-plain-port: the client began TLS on a port", report(server))

    def test_a_body_that_ends_in_a_bare_lf(self) -> None:
        for end in (b"\n.\n", b"\n.\r\n", b"\r\n.\n"):
            with self.subTest(end), Server() as server, Client(server) as client:
                for line in (*ENVELOPE, "DATA"):
                    client.ask(line)
                client.send(b"Subject: x\r\n\r\nhi" + end)
                self.assertTrue(wait_until(lambda: "a dot alone with a bare LF" in report(server)), report(server))
                client.__exit__()
                self.assertTrue(
                    wait_until(lambda: "false-end: at a dot with a bare LF" in report(server)), report(server)
                )

    def test_a_wait_in_a_coroutine(self) -> None:
        async def wait(server: Server) -> None:
            server.wait_for_messages(1, 0.01)

        with Server() as server, self.assertRaisesRegex(WaitTimeoutError, "use await asyncio.to_thread"):
            asyncio.run(wait(server))

    def test_long_reports_are_bounded(self) -> None:
        memory = Memory(multiple_rcptto=True)
        memory.say("EHLO a.com", "MAIL FROM:<a@a.com>", *["RCPT TO:<b@b.com>"] * 10_000, "x" * 4000)
        self.assertLess(len(repr(memory.message())), 1000)


# Mistakes, and what their exceptions say: each of the calls. start() makes a running server, say() a session, and s is
# a server that is not running. What smtplib shows is in other tests.
MISTAKES = read_rows(r"""
Server(hostname=1) | Server(addr=1) | Server(HostAddress=1) | s.hostname => {MORE}did you mean host?
Server(PortNumber=1) | s.smtp_port => {MORE}did you mean port?
Server(IsCmdFailFast=True) => {MORE}did you mean fail_fast?
Server(MultipleRcptto=True) => {MORE}did you mean multiple_rcptto?
Server(log=True) | Server(logging=True) | Server(LogToStdout=True) => {MORE}did you mean log_to_stdout?
Server(tls_context=1) | Server(use_starttls=True) | s.tls_context => {MORE}did you mean ssl_context?
Server(use_ssl=True) => {MORE}did you mean implicit_tls?
Server(require_starttls=True) | Server(require_tls=True) => {MORE}did you mean tls_required?
Server(auth_require_tls=True) => {MORE}did you mean auth_requires_tls?
Server(enforce_auth=True) => {MORE}did you mean auth_required?
Server(authenticator=1) | Server(login_username=1) | Server(username=1) => {MORE}did you mean auth_users?
Server(data_size_limit=1) => {MORE}did you mean msg_size_limit?
Server(enable_SMTPUTF8=True) | Server(decode_data=True) => {MORE}did you mean extensions?
Server(timeout=1) | s.timeout => {MORE}did you mean session_timeout?
Server(sink=1) | s.sink => {MORE}did you mean on_message?
Server(config=1) | s.config => {MORE}did you mean configure() or a Configuration?
Action(timeout=1) => timeout=1: there is no such option; there are reply, raw, delay, trickle, then
Server(host="") | Server(host=" ") => host='{MORE}: must be a host name or an address
Server(on_message=wait) | s.on("RCPT")(wait) => {MORE} must be a function that is not async
s.multiple_rcptto => {MORE}; it is an option: configure(multiple_rcptto=...)
setattr(s, "multiple_rcptto", True) => multiple_rcptto is an option, {MORE}: configure(multiple_rcptto=True) changes it
setattr(s, "on_message", print) | setattr(s, "port", 1) => {MORE} is an option, not an attribute: configure({MORE}
s.port | s.url => {MORE}:0, not running> was not started yet, so it has no port
mail().to | mail().rcpttos | mail().recipients => {MORE}did you mean rcpt_tos?
mail().sender => {MORE}did you mean mail_from?
mail().envelope => {MORE}did you mean mail_from and rcpt_tos, or email["To"]?
mail().body | mail().html_body | mail().get_payload => {MORE}did you mean text, html or content?
mail().raw => {MORE}did you mean content?
mail().headers => {MORE}did you mean email["To"]?
mail().foo => a Message has no attribute 'foo'
mail()["Subject"] => {MORE}: message.email['Subject']
s.on("greeting") | s.on("banner") | s.on("CONNECTION") => {MORE}did you mean connect?
s.on("any") | s.on("all") => {MORE}did you mean *?
s.on("from") | s.on("sender") | s.on("mail_from") | s.on("MAILFROM") => {MORE}did you mean MAIL?
s.on("to") | s.on("recipient") | s.on("RCPT_TO") => {MORE}did you mean RCPT?
s.on("login") => {MORE}did you mean AUTH?
s.on("TLS") | s.on("ssl") => {MORE}did you mean STARTTLS?
s.on("content") | s.on(".") | s.on("end of data") | s.on("eom") | s.on("header") => {MORE}did you mean message?
s.on("disconnect") => {MORE}did you mean QUIT?
s.on("hello") | s.on("EHLO/HELO") => {MORE}did you mean EHLO?
s.on("xclient") | s.on("*@x") | s.on("MAIL TWICE") | s.on(1) => {MORE} a verb such as RCPT, in upper case if {MORE}
s.on("message", "lottery") => {MORE} (a single word can, with lenient_addresses); {MORE}re.compile('lottery'){MORE}the body
s.on("RCPT", "Subject: Hello") | s.on("RCPT", "a@x.com,b@x.com") | s.on("RCPT", "x.com ") => {MORE}no address or domain can{MORE}
s.on("RCPT", "http://x") | s.on("RCPT", "bob@example") | s.on("*", "a b") => {MORE}no address or domain can be this{MORE}
s.on("RCPT").reply(550, "No") | s.on("RCPT").reply("250 a\r\n250 b") => {MORE} such as '550 No', {MORE}; raw() sends any bytes
Action("250 a\n250 b") | s.on("RCPT").reply("550 No\r\n") => {MORE}, with one last line; raw() sends any bytes
start().message() => 0 accepted messages where there should be 1; it did not wait, as message(timeout=5) does{MORE}
start().message(timeout=0.001) => 0 accepted messages where there should be 1\n{MORE}
send(start(keep_all=True), "hi", "hi").message() => 2{MORE}; messages() returns all, and where= chooses{MORE}
say(start(), "EHLO a.com").message() => {MORE}auth_users turns on AUTH, ssl_context TLS\n  open sessions: 0
say(start(), "EHLO a.com", "AUTH PLAIN AGEAYg==").message() => {MORE}'AUTH PLAIN ***'{MORE}hint: auth_users{MORE}
say(start(), "EHLO a.com", "STARTTLS").message() => {MORE}hint: ssl_context{MORE}
say(start(), "EHLO a.com", "mail from:<a@my_host>").message() => {MORE}hint: lenient_addresses{MORE}
say(start(), "EHLO a.com", "MAIL FROM:<a@a.com> SIZE=5").message() => {MORE}hint: extensions{MORE}
hide(start()).check() => <Rule for RCPT b@b.com: 0 hits> was never hit: the newer <Rule for RCPT: 1 hits> came first
late(start()).check() => {MORE}never hit; before it there was 'NOOP'
s.on("RCPT", reply="450 No") => reply='450 No': on() has no such argument; did you mean on(...).reply(...)?
s.on("RCPT").times(2) => a Rule has no attribute 'times'; it is an argument of on()
start(log_server_activity=True) => log_server_activity needs log_to_stdout=True or a logger
""")
GOOD_INSTEAD = """
s.on("LHLO") | s.on("XCLIENT") | s.on("X-FOO") | s.on("AUTH", "John Doe") | s.on("EHLO", "my-host") | s.on("VRFY", "bob") |
s.on("RCPT", "Postmaster") | s.on("RCPT", "localhost") | s.on("message", "[127.0.0.1]") | s.on("EHLO").reply("250-a\\n250 b") |
Server(lenient_addresses=True).on("message", "lottery") | setattr(type("Mine", (Server,), {})(), "fail_fast", 1) |
setattr(s, "other", 1) | s.on("RCPT")(print).hits
"""


class MistakeTest(ServerCase):
    """For each mistake that users make, the text that leads to its cause."""

    def say(self, server: Server, *lines: str) -> Server:
        with Client(server) as client:
            client.ask(*lines)
        return server

    def hide(self, server: Server) -> Server:
        server.on("RCPT", "b@b.com").reply("550 No")
        server.on("RCPT").reply("250 Ok")
        return self.send(server, "hi")

    def late(self, server: Server) -> Server:
        self.say(server, "NOOP").on("NOOP").reply("250 Fine")
        return server

    def send(self, server: Server, *contents: str) -> Server:
        send(server, *contents)
        return server

    def names(self, stack: contextlib.ExitStack) -> dict[str, Any]:
        async def wait(*_: object) -> None: ...

        def start(**options: Any) -> Server:
            return stack.enter_context(Server(**options))

        names = {"Server": Server, "Action": smtpmock.Action, "s": Server(), "wait": wait, "start": start}
        names |= {"say": self.say, "late": self.late, "hide": self.hide, "send": self.send}
        return names | {"mail": lambda: self.send(start(), "hi").message()}

    def test_mistakes(self) -> None:
        for row in MISTAKES:
            for call in row.given:
                with self.subTest(call), warnings.catch_warnings(), contextlib.ExitStack() as stack:
                    warnings.simplefilter("error", smtpmock.SMTPMockWarning)
                    error = str(catch(Exception, eval, call, self.names(stack)))
                    self.assertRegex(error, row.pattern.replace(r"\\n", "\n"))

    def test_what_is_right(self) -> None:
        for call in read_items(GOOD_INSTEAD):
            with self.subTest(call), contextlib.ExitStack() as stack:
                eval(call, self.names(stack))
        with Server().start() as server:
            self.assertTrue(server.is_running)

    def test_purging_with_warnings_as_errors(self) -> None:
        calls: Sequence[Callable[[Server], list[Message]]] = (
            Server.messages_and_purge, lambda server: server.wait_for_messages_and_purge(1)
        )  # fmt: skip
        for purge in calls:
            with Server() as server:
                self.say(server, *ENVELOPE, "RCPT TO:<c@c.com>", *SEND[2:])
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    self.assertRaises(smtpmock.SMTPMockWarning, purge, server)
                self.assertEqual((len(purge(server)), server.messages()), (1, []))

    def test_a_refusal_that_undoes_an_accepted_recipient(self) -> None:
        for lines, count in (((), 0), (("DATA",), 1), (("RSET",), 0), (("RCPT TO:<c@c.com>", "DATA", "."), 1)):
            with Server(not_registered_emails=["bad@b.com"]) as server:
                self.say(server, *ENVELOPE, "RCPT TO:<bad@b.com>", *lines, "RSET", "QUIT")
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    server.messages()
                self.assertEqual(len(caught), count, lines)

    def test_any_exception_of_a_callback_is_shown(self) -> None:
        for error in (WaitTimeoutError("w"), ConfigurationError("c"), SystemExit(2), KeyboardInterrupt()):
            with self.subTest(error), mock.patch("threading.excepthook") as hook:
                recorder = Recorder()
                for logger in (None, recorder):
                    with Server(logger=logger, on_message=mock.Mock(side_effect=error)) as server:
                        self.say(server, *ENVELOPE, *SEND[2:])
                self.assertIn(repr(error)[:10], repr(hook.call_args.args[0].exc_value))
                self.assertIsNot(hook.call_args.args[0].exc_type, SystemExit)  # which it would ignore
                self.assertIn("Traceback", recorder.wait_for("on_message failed")[1])

    def test_who_holds_a_session_up(self) -> None:
        for end in (Server.stop, Server.disconnect):
            hold = Hold()

            def hold_up(message: Message, hold: Hold = hold) -> None:
                hold(message)

            with mock.patch.object(smtpmock, "_ABORT_TIMEOUT", 0.01):
                server, client, recorder = self.serve(on_message=hold_up, shutdown_timeout=0)
                client.mail()
                hold.wait()
                end(server)
                hold.release.set()
                self.assertRegex(recorder.wait_for("held up")[1], r"(?s)is held up.*in hold_up\n +hold\(message\)")

    def test_handshakes_that_fail(self) -> None:
        def shake_hands(client: Client) -> None:
            with contextlib.suppress(OSError):
                ssl.create_default_context().wrap_socket(client.socket, server_hostname="localhost").close()

        def wait(client: Client) -> None:
            text = "nothing, but must begin TLS, because of implicit_tls"
            self.assertTrue(wait_until(lambda: text in report(server)), report(server))

        rows: Sequence[tuple[Any, Callable[[Client], object], str]] = (
            (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), shake_hands, "the ssl_context may have no certificate"),
            ("test", shake_hands, "the client does not trust the certificate"),
            ("test", wait, "the client must begin TLS, because of implicit_tls"),
        )
        for context, speak, text in rows:
            with self.subTest(text), Server(ssl_context=context, implicit_tls=True) as server:
                with Client(server, greets=False) as client:
                    speak(client)
                self.assertTrue(wait_until(lambda server=server, text=text: text in report(server)), report(server))

    def test_a_reset_within_tls_sends_no_alert(self) -> None:
        with Server(ssl_context="test", implicit_tls=True) as server, Client(server, greets=False) as client:
            with server.client_context().wrap_socket(client.socket, server_hostname="localhost") as within:
                within.recv(100)
                server.disconnect(reset=True)
                self.assertRaises(ConnectionResetError, socket.socket.recv, within, 100)

    def test_an_interrupt_within_a_lock_of_threading(self) -> None:
        error = RuntimeError("release unlocked lock")
        error.__context__ = KeyboardInterrupt()
        server = Server()
        with mock.patch.object(smtpmock._Thread, "start", side_effect=error):
            self.assertRaises(KeyboardInterrupt, server.start)
        self.assertFalse(server.is_running)

    @unittest.skipUnless(hasattr(os, "fork"), "this system cannot fork")
    def test_a_child_that_is_forked_while_locks_are_held(self) -> None:
        server = Server()
        with server._mailbox._lock, server._rules._lock, server._lifecycle, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are threads
            child = os.fork()
            if not child:
                signal.alarm(int(TIMEOUT))
                server.on("NOOP").reply("250 Ok")
                os._exit(len(server.messages()))
        self.assertEqual(os.waitpid(child, 0)[1], 0)

    def test_beginnings_of_files_are_no_links(self) -> None:
        with tempfile.TemporaryDirectory() as path, Server() as server:
            send(server, "hi")
            victim = Path(path, "victim")
            victim.write_text("safe")
            for name in (".000001.json.part", ".000001.eml.part"):
                folder = smtpmock._Folder(path)
                Path(path, name).symlink_to(victim)
                with self.assertRaises(FileExistsError):
                    folder(server.message())
            smtpmock._Folder(path)(server.message())
            found = victim.read_text(), sorted(os.listdir(path))
            self.assertEqual(found, ("safe", ["000001.eml", "000001.json", "victim"]))

    def test_check_is_fast(self) -> None:
        with Server() as server:
            lines = [
                "RCPT TO:<" + "".join(f"{number * step:x}." for step in range(700))[:4000] for number in range(1000)
            ]
            self.say(server, "EHLO a.com", *lines)
            for _ in range(20):
                server.on("RCPT", "b@b.com").reply("550 No")
            began = time.process_time()
            self.assertIn("nearest", told(server))
            self.assertLess(time.process_time() - began, 5)

    def test_help(self) -> None:
        """Every public attribute has a text."""
        for shown in (Message, Server, smtpmock.Rule):
            for name, value in vars(shown).items():
                if not name.startswith("_"):
                    self.assertTrue(value.__doc__ and "StepField" not in value.__doc__, f"{shown}.{name}")
        self.assertRegex(pydoc.plain(pydoc.render_doc(Message)), r"content\n \|  +The body, ")


# ------------------------------------------------------------- what the command line tells a person


class NarrationTest(ProcessCase):
    """The lines that the command line prints for a person."""

    def test_quiet(self) -> None:
        """What is not kept is told once, unless its option is given."""
        for flag, count, expected in (
            ("-log=false", 2, "smtpmock: 1 of 2 accepted mails was not kept; -keepAll keeps them all\n"),
            ("-multipleRcptto", 2, "smtpmock: 1 of 2 accepted mails was not kept; -keepAll keeps them all\n"),
            ("-multipleMessageReceiving=false", 2, ""),
            ("-keepAll=false", 2, ""),
            ("-keepAll", 2, ""),
            ("-quiet", 0, ""),
        ):
            out, errors, _ = run_main(lambda port: send(port, "hi", "ho"), flag)
            self.assertEqual((out.count("accepted"), errors), (count, expected))

    def make_faults(self, port: int) -> None:
        """In a command, in a mail, and after the mail."""
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as client:
            client.sendall(b"EHLO localhost\nMAIL FROM:<a@a.com>\r\nRCPT TO:<b@b.com>\r\nDATA\r\n")
            client.sendall(b"From: a@a.com\r\n\r\nHi\r\n.\r\nQUIT x\r\nQUIT\r\n")
            while client.recv(1000):
                pass

    def test_lint(self) -> None:
        _, errors, status = run_main(self.make_faults, "-lint", "-quiet")
        lines = errors.splitlines()
        self.assertEqual((status, len(lines)), (3, len(set(lines))))
        for line in (
            "error: bare-lf: a line ends in LF and not in CRLF (RFC 5321 2.3.8): 'EHLO localhost'",
            "error: header-missing: a required header is missing (RFC 5322 3.6): 'Date'",
            "warning: no-message-id: there is no Message-ID (RFC 5322 3.6.4)",
            "error: superfluous-argument: this command takes no argument (RFC 5321 4.1.1): 'QUIT x'",
        ):
            self.assertIn(f"smtpmock: message 1: {line}", lines)
        tolerated = "-tolerated=bare-lf,header-missing,superfluous-argument,pipelining,data-before-354"
        self.assertEqual(run_main(self.make_faults, "-lint", tolerated)[2], 0)
        self.assertEqual(run_main(self.make_faults, "-quiet")[1:], ("", 0))

    def test_lint_of_a_refused_mail(self) -> None:
        """Though the client gives it up, which erases it."""
        be_refused = functools.partial(self.assertRaises, smtplib.SMTPDataError, send)
        _, errors, status = run_main(lambda port: be_refused(port, "From: a@a.com"), "-lint", "-strict", "-quiet")
        self.assertEqual((status, errors.count("header-missing")), (3, 1))

    @unittest.skipUnless(os.name == "posix", "needs a pseudo-terminal")
    def test_colours(self) -> None:
        """On a terminal only, and never with NO_COLOR."""
        import pty

        for environment, word in (({}, "\x1b[32maccepted\x1b[0m"), ({"NO_COLOR": "1"}, "accepted")):
            ours, theirs = pty.openpty()
            command = [sys.executable, "-m", "smtpmock"]
            clean = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
            with subprocess.Popen(command, stdout=theirs, cwd=compiled_copy(), env=clean | environment) as process:
                os.close(theirs)
                with open(ours, "rb", buffering=0) as terminal:
                    first = terminal.read(1000).decode()
                    send(int(first.rpartition(":")[2]), "hi")
                    self.assertIn(f" {word} a@a.com -> b@b.com", terminal.read(1000).decode())
                    process.terminate()
                    process.wait(TIMEOUT)


# -------------------------------------------------------------------------------------- the package


class PackageTest(ProcessCase):
    """The module, and the package that pyproject.toml makes of it."""

    project = (HERE / "pyproject.toml").read_text(encoding="utf-8")

    def test_what_it_imports(self) -> None:
        code = """
            import sys, __future__, contextlib, queue, weakref, select, struct, socketserver, selectors, re, typing
            class Pair(typing.NamedTuple): a: int  # since 3.14 it imports annotationlib
            before = set(sys.modules)
            import smtpmock
            smtpmock.Server().start().stop()
            print(*sorted(set(sys.modules) - before))
        """
        self.assertEqual(self.run_python(code, "-W", "error").split(), ["smtpmock"])

    def test_what_it_offers(self) -> None:
        public = {name for name, value in vars(smtpmock).items() if getattr(value, "__module__", "") == "smtpmock"}
        public = {name for name in public if not name.startswith("_")}
        self.assertEqual(public, {*smtpmock.__all__, "pytest_configure"})
        for name in public:
            self.assertTrue(getattr(smtpmock, name).__doc__, name)

    def test_nothing_is_used_above_its_definition(self) -> None:
        """All but annotations and main() refers upwards only."""
        tree = ast.parse((HERE / "smtpmock.py").read_bytes())
        defined = {node.name: node.lineno for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        parts = [getattr(node, name, None) for node in ast.walk(tree) for name in ("annotation", "returns")]
        annotations = {id(name) for part in parts if part is not None for name in ast.walk(part)}
        for node in tree.body:
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and id(name) not in annotations and getattr(node, "name", "") != "main":
                    self.assertGreaterEqual(name.lineno, defined.get(name.id, 0), f"{name.id} in line {name.lineno}")

    def test_it_runs_and_is_typed(self) -> None:
        files = dict(re.findall(r'^"(.+)" = "(smtpmock/.+)"$', self.project, re.MULTILINE))
        self.assertEqual(sorted(files.values()), ["smtpmock/__init__.py", "smtpmock/__main__.py", "smtpmock/py.typed"])
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "smtpmock").mkdir()
            for source, target in files.items():
                shutil.copy(HERE / source, Path(folder, target))
            said = self.finish(self.launch("-W", "error", "-m", "smtpmock", "-v", cwd=folder))
            self.assertEqual(said.splitlines()[0], f"smtpmock: {smtpmock.__version__}")

    def test_what_it_says_of_the_module(self) -> None:
        description = re.search('^description = "(.*)"$', self.project, re.MULTILINE)
        assert description is not None
        self.assertEqual(description[1], (smtpmock.__doc__ or "").splitlines()[0])
        self.assertIn('[project.scripts]\nsmtpmock = "smtpmock:main"\n', self.project)
        self.assertIn('[project.entry-points.pytest11]\nsmtpmock = "smtpmock"\n', self.project)


# ----------------------------------------------------------------------------- the plugin of pytest


class PytestTest(unittest.TestCase):
    """The plugin, called as pytest calls it. What needs pytest itself is in .ci/plugin_test.py."""

    def setUp(self) -> None:
        def decorate(function: Any = None, **_: object) -> Any:
            return function or decorate

        self.config = mock.Mock()
        with mock.patch.dict(sys.modules, pytest=mock.Mock(fixture=decorate, hookimpl=decorate)):
            smtpmock.pytest_configure(self.config)
        self.plugin = self.config.pluginmanager.register.call_args.args[0]
        shared = contextlib.contextmanager(self.plugin.shared_smtp_server)()
        self.server: Server = shared.__enter__()
        self.addCleanup(shared.__exit__, None, None, None)

    @contextlib.contextmanager
    def run_test(self, *marks: Any) -> Iterator[Any]:
        """A test that has the fixture."""
        item = mock.Mock(iter_markers=lambda name: iter(marks))
        with contextlib.contextmanager(self.plugin.smtp_server)(mock.Mock(node=item), self.server) as server:
            self.assertIs(server, self.server)
            yield item

    def mark(self, *arguments: Any, **options: Any) -> Any:
        return mock.Mock(args=arguments, kwargs=options)

    def sections(self, item: Any, when: str) -> list[str]:
        """What the report of this phase of a failed test gets."""
        item.add_report_section.reset_mock()
        self.plugin.pytest_runtest_makereport(item, mock.Mock(when=when))
        added = [call.args for call in item.add_report_section.call_args_list]
        self.assertEqual([section[:2] for section in added], [(when, "smtp_server")] * len(added))
        return [section[2] for section in added]

    def test_each_test_has_the_server_to_itself(self) -> None:
        before = self.server.port
        for _ in range(2):
            with self.run_test():
                self.assertEqual((self.server.port, self.server.messages()), (before, []))
                self.server.on("NOOP").reply("250 rule")
                send(self.server, "first", "second")
                leftover = Client(self.server)
                self.assertEqual(leftover.ask(*ENVELOPE, "RCPT TO:<c@b.com>", "NOOP")[-1], "250 rule")
                self.assertEqual([message.content for message in self.server.messages()], [b"first\r\n", b"second\r\n"])
            with leftover:
                self.assertEqual(leftover.read(), "<closed>")
            self.assertEqual(self.server.messages(), [])
        with self.run_test():
            self.server.stop()
        with self.run_test(), Client(self.server) as client:
            self.assertEqual(client.greeting, "220 Welcome")

    def test_a_transcript(self) -> None:
        for transcript, greeting in (("S: 220 a", "220 a"), (None, "220 Welcome")):
            with self.run_test(self.mark(play=transcript, fail_fast=True)) as item:
                with Client(self.server) as client:
                    said = [client.greeting, *client.ask("FOO"), client.read()]
                self.assertEqual(said, [greeting, UNRECOGNIZED, "<closed>"])
                self.plugin.pytest_runtest_call(item)
        with self.assertRaises(ConfigurationError), self.run_test(self.mark(play="")):
            pass

    def test_a_client_may_quit_at_the_end_of_a_test(self) -> None:
        """Also one whose last command is not answered yet."""
        for is_held in (False, True):
            hold, replies = Hold(), list[str]()
            with contextlib.ExitStack() as test, contextlib.ExitStack() as stack:
                test.enter_context(self.run_test(self.mark(on_message=hold, shutdown_timeout=10 * TIMEOUT)))
                client = stack.enter_context(Client(self.server))
                stack.enter_context(mock.patch.object(smtpmock, "_QUIT_TIMEOUT", 0))
                client.ask(*ENVELOPE, "DATA")
                stack.enter_context(mock.patch.object(smtpmock, "_QUIT_TIMEOUT", 10 * TIMEOUT))
                client.send(b"hi\r\n.\r\n")
                hold.wait()
                if not is_held:
                    hold.release.set()
                    replies.append(client.read())
                began = time.monotonic()
                with in_background(test.pop_all().close):
                    hold.release.set()
                    replies += [*([client.read()] if is_held else []), *client.ask("QUIT"), client.read()]
                self.assertLess(time.monotonic() - began, TIMEOUT)
                self.assertEqual(replies, [RECEIVED, "221 Closing connection", "<closed>"])

    def test_marks(self) -> None:
        (kind, line), _ = self.config.addinivalue_line.call_args
        self.assertEqual((kind, line.partition(":")[0]), ("markers", "smtp_server(**options)"))
        near, far = self.mark(msg_greeting="220 near"), self.mark(msg_greeting="220 far", fail_fast=True)
        with self.run_test(near, far), Client(self.server) as client:
            replies = [client.greeting, *client.ask("FOO"), client.read()]
            self.assertEqual(replies, ["220 near", UNRECOGNIZED, "<closed>"])
        for mark, text in (
            (self.mark(multiple_rcpto=True), "smtp_server: multiple_rcpto=True: .* did you mean multiple_rcptto"),
            (self.mark(port=25), "pytest.mark.smtp_server: port=25: .*only by Server"),
            (self.mark("fail_fast"), "'fail_fast' must be an option by its name"),
        ):
            with self.subTest(text), self.assertRaisesRegex(ConfigurationError, text), self.run_test(mark):
                pass
        with self.run_test(), Client(self.server) as client:
            self.assertEqual([client.greeting, *client.ask("FOO", "NOOP")], ["220 Welcome", UNRECOGNIZED, "250 Ok"])

    def test_mistakes(self) -> None:
        """A mark without effect, a fixture of a larger scope, and a callback that raises."""
        mark = mock.Mock()
        mark.name = "smtp_server"
        for names, is_error in (
            (["shared_smtp_server"], True),
            (["request", "shared_smtp_server"], True),
            ([], True),
            (["request"], False),
            (["smtp_server", "shared_smtp_server"], False),
        ):
            item = mock.Mock(own_markers=[mark], fixturenames=names)
            with (
                self.assertRaisesRegex(ConfigurationError, "smtp_server has no effect") if is_error else self.subTest()
            ):
                self.plugin.pytest_runtest_setup(item)
        self.plugin.pytest_runtest_setup(mock.Mock(own_markers=[], fixturenames=[]))
        item, info = mock.Mock(), mock.Mock(value="ScopeMismatch: the fixture smtp_server")
        self.plugin.pytest_runtest_makereport(item, mock.Mock(when="setup", excinfo=info))
        self.assertIn("shared_smtp_server", item.add_report_section.call_args.args[2])
        fail = mock.Mock(side_effect=SystemExit("callback"))
        with mock.patch("threading.excepthook"), self.run_test(self.mark(on_message=fail)) as item:
            with contextlib.suppress(smtplib.SMTPDataError):
                send(self.server, "hi")
            for is_passed in (False, True):
                if is_passed:  # but its check fails
                    self.assertRaises(AssertionError, self.plugin.pytest_runtest_call, item)
                    self.plugin.pytest_runtest_makereport.__self__.shown = ""
                self.assertIn("Traceback", self.sections(item, "call")[0])

    def test_check(self) -> None:
        with self.run_test() as item:
            self.server.on("VRFY").reply("252 Perhaps")
            self.plugin.pytest_runtest_call(mock.Mock())  # a test without the fixture
            with self.assertRaisesRegex(AssertionError, "VRFY.* was never hit"):
                self.plugin.pytest_runtest_call(item)
        with self.run_test() as item:
            self.plugin.pytest_runtest_call(item)

    def test_the_report_of_a_failed_test(self) -> None:
        with self.run_test() as item:
            send(self.server, "hi")
            client = Client(self.server)
            self.addCleanup(client.__exit__)
            client.ask("EHLO open.example.com")
            self.assertEqual(self.sections(mock.Mock(), "call"), [])  # of a test without the fixture
            (section,) = self.sections(item, "call")
            message, session = section.split("\n\n")
            lines = message.splitlines()
            self.assertEqual(lines[0], repr(self.server.messages()[0]))
            self.assertIn("C: <4 bytes>", lines)
            wrong = ["header-missing", "header-missing", "no-message-id"]
            self.assertEqual([line.partition(":")[0] for line in lines[-3:]], wrong)
            self.assertEqual(session, "a session is open:\nS: 220 Welcome\nC: EHLO open.example.com\nS: 250 Received")
            self.assertEqual(self.sections(item, "call"), [])  # nothing happened since
            self.plugin.pytest_runtest_makereport(item, mock.Mock(excinfo=None))  # of a phase that passed
            item.add_report_section.assert_not_called()
        (section,) = self.sections(item, "teardown")
        self.assertTrue(section.startswith(message))
        self.assertIn("S: 250 Received\nS: <closed>\nhint: auth_users", section)

    def test_a_report_of_many_sessions_and_of_none(self) -> None:
        for _ in range(2):
            with self.run_test() as item:
                self.assertEqual(self.sections(item, "call"), ["no session"])
        with self.run_test() as item:
            send(self.server, *map(str, range(20)))
            self.server.on("connect").reply("421 Busy").close()
            with Client(self.server) as client:
                self.assertEqual(client.read(), "<closed>")  # by the server; the client's end is open
                sections = self.sections(item, "call")[0].split("\n\n")
            self.assertEqual((len(sections), sections[0]), (11, "21 messages or sessions, the last 10:"))
            self.assertRegex(sections[-1], "^a connection ended early: ")
        with self.run_test() as item:
            self.assertEqual(self.sections(item, "call"), ["no session"])


# --------------------------------------------------------------------------------------- the README


class ReadmeTest(ProcessCase):
    def setUp(self) -> None:
        self.text = (HERE / "README.md").read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, re.MULTILINE | re.DOTALL)

    def test_the_first_example_is_short_and_works_beside_a_copy_of_the_file(self) -> None:
        example = self.blocks("python")[0]
        self.assertLessEqual(len(example.splitlines()), 10)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "smtpmock.py").write_bytes((HERE / "smtpmock.py").read_bytes())
            self.run_python(example, "-W", "error", folder=folder)

    def test_python_examples(self) -> None:
        options: dict[str, Any] = {"multiple_rcptto": True, "multiple_message_receiving": True}
        pytest: Any = types.ModuleType("pytest")
        pytest.raises = self.assertRaises
        pytest.mark = mock.Mock(smtp_server=lambda **given: options.update(given) or (lambda test: test))
        for example in self.blocks("python"):
            with self.subTest(example), mock.patch.dict(sys.modules, pytest=pytest):
                space: dict[str, Any] = {"__name__": "readme"}
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    exec(compile(example, "README.md", "exec"), space)
                    self.run_tests_of(space, options)

    def run_tests_of(self, space: dict[str, Any], options: dict[str, Any]) -> None:
        """What an example defines: unittest's classes, and pytest's functions with the fixture."""
        for name, value in list(space.items()):
            if isinstance(value, type) and issubclass(value, unittest.TestCase):
                result = unittest.TestResult()
                unittest.TestLoader().loadTestsFromTestCase(value).run(result)
                self.assertEqual((result.errors, result.failures), ([], []))
                self.assertGreater(result.testsRun, 0)
            elif name.startswith("test_"):
                with Server(**options) as server:
                    value(server)

    def test_examples_that_need_other_packages(self) -> None:
        for example in self.blocks("py"):
            code = compile(example, "README.md", "exec")
            names = re.findall(r"^(?:import|from) (\w+)", example, re.MULTILINE)
            with self.subTest(example):
                if all(map(importlib.util.find_spec, names)):
                    exec(code, {"__name__": "readme"})

    def test_failures(self) -> None:
        """Each line of the table of failures works as it stands."""
        table = self.text.partition("\n## Make it fail\n")[2].partition("\n## ")[0]
        lines = re.findall(r"^\| .* \| `(.*)` \|$", table, re.MULTILINE)
        self.assertGreater(len(lines), 10)
        for line in lines:
            with self.subTest(line), Server(keep_all=True) as server:
                exec(line, {"server": server})

    def test_commands(self) -> None:
        """Every command line of the README is one that the parser takes."""
        lines = [line for language in ("sh", "yaml") for block in self.blocks(language) for line in block.splitlines()]
        commands = [match[1] for line in lines if (match := re.search(r"smtpmock(?:\.py)? (-.*?)(?: &)?$", line))]
        self.assertGreater(len(commands), 1)
        for command in commands:
            parse_flags(*shlex.split(command))

    @unittest.skipUnless(shutil.which("bash"), "needs bash")
    def test_health_check(self) -> None:
        """It tells whether the server runs, and leaves no record."""
        found = re.search(r'test: \["CMD", (.*)\]', self.text)
        assert found is not None
        with Server() as server:
            command = json.loads(f"[{found[1].replace('2525', str(server.port))}]")
            checked = [subprocess.call(command, stderr=subprocess.DEVNULL, timeout=TIMEOUT)]
        checked.append(subprocess.call(command, stderr=subprocess.DEVNULL, timeout=TIMEOUT))
        self.assertEqual((checked, server.messages()), ([0, 1], []))

    @unittest.skipUnless(shutil.which("bash") and shutil.which("curl"), "needs bash and curl")
    def test_over_http(self) -> None:
        """The test in bash works, and would notice a mail that does not come."""
        [script] = [block for block in self.blocks("bash") if "$API" in block]
        for text, status in (
            (script, 0),
            (script.replace("send Third &", ""), 1),
            (script.replace("send Second", ""), 22),
        ):
            process = self.start("-http=0", "-json")
            listening = json.loads(process.stdout.readline())
            names = {"SMTP": listening["url"], "API": listening["http"]}
            done = subprocess.run(
                ["bash", "-c", text.replace("timeout=5", f"timeout={0.1 if status else TIMEOUT}")],
                env=os.environ | names, capture_output=True, text=True, timeout=2 * TIMEOUT, check=False,
            )  # fmt: skip
            self.assertEqual(done.returncode, status, done.stderr)

    def test_links(self) -> None:
        """Each link within the page has a heading, and each section is linked at the top."""
        text = re.sub(r"^```.*?^```", "", self.text, flags=re.MULTILINE | re.DOTALL)
        titles = re.findall(r"^##+ (.+)$", text, re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]  # as GitHub makes them
        self.assertEqual(len(anchors), len(set(anchors)))
        self.assertEqual(set(re.findall(r"\]\(#(.*?)\)", text)) - set(anchors), set())
        contents = re.findall(r"\[(.*?)\]\(#", text.partition("\n## ")[0])
        self.assertEqual(contents, [title for title in titles if title != "Reference"])

    def test_options(self) -> None:
        """The tables have each option with its flag, its default and its meaning."""
        rows = re.findall(r"^\| (`\w+`.*?) \| (`-.*?) \| (.*?) \| (.*?) \|$", self.text, re.MULTILINE)
        found = []
        for names, of_names, default, about in rows:
            start, to, objects = about.partition(" to ")  # a row of several options has what differs in its text
            abouts = [start + to + thing for thing in objects.split("; ")] if "<br>" in names else [about]
            found += [
                (name.strip("`"), flag.strip("`"), default, text)
                for name, flag, text in zip(names.split("<br>"), of_names.split("<br>"), abouts, strict=True)
            ]
        replies = re.findall(r"`(msg_\w+)`: (`.*?`) to (.*?)(?=<br>| \|$)", self.text, re.MULTILINE)
        found += [(name, flags(name)[0], default, f"reply to {about}") for name, default, about in replies]
        expected = []
        for field in dataclasses.fields(Configuration):
            flag = "-log" if field.name.startswith("log_") else flags(field.name)[0]
            flag = "-tlsCert" if field.name == "ssl_context" else flag
            default = "empty" if isinstance(field.default, frozenset) else f"`{field.default}`"
            expected.append((field.name, flag, default, field.metadata["about"]))
        self.assertEqual(sorted(found), sorted(expected))

    def test_flags(self) -> None:
        """The tables of options and of flags have every flag that is no option."""
        table = self.text.partition("More flags:\n\n")[2].partition("\n\n")[0]
        rows = re.findall(r"^\| (`-.+?`) \| (.+) \|$", table, re.MULTILINE)
        found = [flag for names, _ in rows for flag in re.findall(r"`(-\w+)(?:=[A-Z]+)?`", names)]
        elsewhere = ("rule", "tls_cert", "tls_key")
        expected = [flags(name)[0] for name in smtpmock._OWN_FLAGS if name not in elsewhere]
        short = {"-version": "-v", "-help": "-h"}
        self.assertEqual(sorted(found), sorted(short.get(flag, flag) for flag in expected))
        for flag in (flags(name)[0] for name in elsewhere):
            self.assertTrue(flag in self.text, flag)

    def test_codes(self) -> None:
        rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \| (\d+ [\d.]+) \| (error|warning) \|$", self.text, re.MULTILINE)
        self.assertEqual({code: tuple(row) for code, *row in rows}, Memory.CODES)

    def test_names(self) -> None:
        """What the README's tables of names speak of is there."""
        for name in [*smtpmock.__all__, *PUBLIC, *(name for name in dir(Server) if not name.startswith("_"))]:
            self.assertIn(name, self.text)
        self.assertIn(smtpmock.__version__, self.text)


# The starts of the codes of README's "Coming from ...", in their order, and what is true after each: `value` is that of an
# expression, and `three` what happens to three mails in three connections, or to all of them: "ok", "451" or "550 bob".
COMING_FROM = read_rows(r"""
s = smtpmock.Server(host= | s.host | s.port => three() == "ok" | value == "127.0.0.1" | value > 0
m = s.message() | m.mail_from => value.subject == "hi" | value == "alice@example.com"
m.rcpt_tos | m.content => value == ["bob@example.com", "b@b.com", "eve@reject.org"] | value.startswith(b"Subject: hi")
m.email | m.peer | email.message_from_bytes => value["subject"] == "hi" | value[0] == "127.0.0.1" | value["subject"] == "hi"
s.on("RCPT", "bob | s.on("RCPT", lambda => three() == "550 bob" | three() == "550 b,eve"
s.on("RCPT", re | s.on("message", times=1) => three() == "550 eve" | three() == "451 ok ok"
s.on("message", skip=2) | s.on("DATA").delay => three() == "ok ok 452" | three() == "ok" and value.hits == 3
s.on("message", after=1) | s = smtpmock.Server(on_mess => three() == "SMTPServerDisconnected" | three() == "ok"
s = smtpmock.Server(extensi => "XCLIENT" in ehlo()
s = smtpmock.Server(extensi => "VRFY" in ehlo("VRFY bob") and "252 Perhaps" in ehlo("VRFY bob") and "214" in ehlo("HELP")
s.on("*")(lambda => three() == "ok" and lines.count("data") == 3
s = smtpmock.Server(auth_us => three() == "530" and three("alice") == "ok" and three("eve") == "535"
s = smtpmock.Server(tls_req | s = smtpmock.Server(ssl_con => three() == "530" | running().url.startswith("smtps://")
s = smtpmock.Server(msg_siz => "SIZE 1000" in ehlo() and "SMTPUTF8" in ehlo()
m = await asyncio.to_thread | s.host => value.subject == "hi" | value == "127.0.0.1"
(s.host, s.port) | s.configure(ssl_context= => value == (s.host, s.port) | s.url.startswith("smtps://")
s.configure(auth_users= | len(s.outbox) | s.outbox[0].mail_from => three() == "530" | value == 1 | value == "alice@example.com"
s.messages_and_purge() | s.message(lambda => len(value) == 1 and s.outbox == [] | value.subject == "hi"
m.auth_user | m.tls | m.text | m.html => value is None | value is None | value == "hello\n" | value is None
len(s.wait_for_messages(1)) | s.on("connect", times=1) => value | three() == "421 ok ok"
s.on("MAIL").drop() | s.stop() => three() == "SMTPServerDisconnected" | three() == "ConnectionRefusedError"
s.on("MAIL").silence() | s.configure(auth_users= => three(timeout=0.1) == "SMTPServerDisconnected" | True
s.on("AUTH").reply => three("alice") == "535"
n = s.on("connect").reply | n.hits | connect = socket.create => three() == "ok" and n.hits == 3 | value == 3 | True
monkeypatch.setattr( | monkeypatch.setenv( => three(host="smtp.example.invalid") == "ok" | s.configure(ssl_context="test") or three() == "ok"
""")


class ComingFromTest(unittest.TestCase):
    """Each row of README's table for the users of other tools."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.pem = Path(folder.name, "ca.pem")
        self.pem.write_text(Memory.test_pem())
        self.names: dict[str, Any] = {
            **{name: sys.modules[name] for name in ("asyncio", "email", "re", "smtpmock", "socket")},
            **{name: getattr(self, name) for name in ("running", "three", "ehlo", "monkeypatch")},
            "context": Memory.load_test_context("test"),
        }

    def running(self) -> Any:
        """The server of the row, which runs unless the row has stopped it."""
        server = self.names["s"]
        if not server._port:
            self.stack.enter_context(server)
        return server

    def three(self, user: str = "", *, count: int = 3, host: str = "127.0.0.1", timeout: float = TIMEOUT) -> str:
        port, recipients = self.running().port, ["bob@example.com", "b@b.com", "eve@reject.org"]

        def deliver() -> str:
            try:
                with smtplib.SMTP(host, port, timeout=timeout) as client:
                    if os.environ.get("SSL_CERT_FILE") == str(self.pem):
                        client.starttls(context=ssl.create_default_context())
                    if user:
                        client.login(user, "secret")
                    refused = client.sendmail("alice@example.com", recipients, "Subject: hi\n\nhello")
            except smtplib.SMTPRecipientsRefused as error:
                refused = error.recipients
            except (smtplib.SMTPException, OSError) as error:
                return str(getattr(error, "smtp_code", type(error).__name__))
            names = ",".join(address.partition("@")[0] for address in refused)
            return f"{next(iter(refused.values()))[0]} {names}" if refused else "ok"

        results = [deliver() for _ in range(count)]
        return " ".join(results if len(set(results)) > 1 else results[:1])

    def ehlo(self, *commands: str) -> str:
        """All that a server says to EHLO and these commands."""
        with Client(self.running()) as client:
            client.send("".join(f"{line}\r\n" for line in ("EHLO a.com", *commands, "QUIT")).encode())
            return "\n".join(client.read_all())

    @property
    def monkeypatch(self) -> Any:
        def setattr(*arguments: Any) -> None:
            self.stack.enter_context(mock.patch.object(*arguments))

        def setenv(name: str, value: str) -> None:
            self.stack.enter_context(mock.patch.dict(os.environ, {name: value.replace("ca.pem", str(self.pem))}))

        return types.SimpleNamespace(setattr=setattr, setenv=setenv)

    def run_code(self, code: str) -> None:
        """Run an expression, which may await something, and give its value the name that the code has for it."""
        name, _, expression = code.rpartition(" = ") if re.match(r"\w+ = ", code) else ("value", "", code)
        value = eval(compile(expression, code, "eval", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), self.names)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        self.names["value"] = self.names[name] = value

    def test_each_row(self) -> None:
        text = (HERE / "README.md").read_text(encoding="utf-8").partition("<summary>Coming from")[2]
        cells = re.findall(r"^\| .* \| (`.*) \|$", text.partition("</details>")[0], re.MULTILINE)
        groups = [group for cell in cells for group in re.split("(?<=`); (?=`)", cell)]  # each with a server of its own
        expected = [pair for row in COMING_FROM for pair in zip(row.given, row.expected.split(" | "), strict=True)]
        for group in groups:
            with contextlib.ExitStack() as self.stack:
                server = self.stack.enter_context(Server(keep_all=True, auth_users="*"))
                self.names.update(s=server, lines=[])
                self.three(count=1)
                self.names["m"] = server.message()
                for code in re.findall("`(.*?)`", group.replace("`-saveCa`", "")):
                    (start, check), *expected = expected
                    with self.subTest(code), contextlib.redirect_stdout(io.StringIO()):
                        self.assertTrue(code.startswith(start), start)
                        self.run_code(code)
                        self.assertTrue(eval(check, self.names), check)
        self.assertEqual(expected, [])


if __name__ == "__main__":
    unittest.main()
