"""Tests of smtpmock. Run them with `python -m unittest`; they need the standard library only."""

from __future__ import annotations

import ast
import base64
import contextlib
import dataclasses
import datetime
import errno
import hmac
import inspect
import io
import itertools
import json
import logging
import os
import queue
import random
import re
import selectors
import shlex
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
import types
import unittest
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
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
MAIL = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\nSubject: hi\r\n\r\nbody\r\n.\r\n"

# ----------------------------------------------------------------------------------------- helpers


class Client:
    """An SMTP client that says what it is told, byte for byte."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection((server.host, server.port), TIMEOUT)
        self._file = self.socket.makefile("rb")

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

    def ask(self, *lines: str) -> list[str]:
        replies = []
        for line in lines:
            self.send(line.encode() + b"\r\n")
            replies.append(self.read())
        return replies

    def reset(self) -> None:
        """Close with an RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._file.close()
        self.socket.close()


class Memory:
    """A session without a server, and the messages that come of it."""

    def __init__(self, on_message: Any = None, **options: Any) -> None:
        configuration = Configuration(**options)
        self.mailbox = smtpmock._Mailbox(lambda: 1600000000.25)
        self.log = smtpmock._Log(mock.Mock(), configuration)
        handlers = smtpmock._make_handlers(configuration)
        rules = smtpmock._Rules(configuration.seed)
        setup = smtpmock._Setup(configuration, handlers, self.mailbox, self.log, rules, on_message or smtpmock._ignore)
        self.rules = rules
        self.session = smtpmock._Session(setup, ("192.0.2.1", 4321))

    def on(self, stage: str, match: Any = None) -> smtpmock.Rule:
        return smtpmock.Rule(self.rules, smtpmock._parse_stage(stage), match)

    def feed(self, data: bytes) -> list[smtpmock._Reply]:
        return list(self.session.receive(data))

    def run(self, *pieces: bytes) -> list[str]:
        """Greet, feed the pieces, end; the texts of the replies."""
        replies = [self.session.greet(), *(reply for piece in pieces for reply in self.feed(piece))]
        self.session.end()
        return [reply.text for reply in replies]

    def messages(self) -> list[Message]:
        return self.mailbox.messages(purge=False)


class Recorder:
    """A logger that keeps what it is told, and lets a test wait for it."""

    def __init__(self) -> None:
        self.lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.seen: list[tuple[str, str]] = []

    def info_activity(self, message: str, /) -> None:
        self.lines.put(("activity", message))

    def info(self, message: str, /) -> None:
        self.lines.put(("info", message))

    def warning(self, message: str, /) -> None:
        self.lines.put(("warning", message))

    def error(self, message: str, /) -> None:
        self.lines.put(("error", message))

    def wait_for(self, text: str) -> tuple[str, str]:
        while True:
            line = self.lines.get(timeout=TIMEOUT)
            self.seen.append(line)
            if text in line[1]:
                return line


def has_ipv6_loopback() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


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


EMPTY = Message(Memory().session, 0, 0.0)
DERIVED = ["attachments", "email", "esmtp", "html", "id", "is_consistent", "msg_request", "peer", "received_at"]
DERIVED += ["mailfrom_parameters", "rcptto_parameters", "auth_mechanism", "auth_user"]
DERIVED += ["received_header", "subject", "text", "transcript", "as_bytes", "to_dict"]
FIELDS = [name for name in dir(EMPTY) if not name.startswith("_") and name not in DERIVED]


def differing(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a message that are not as in an empty one."""
    return {name: value for name, value in fields.items() if value != getattr(EMPTY, name)}


def state(message: Message) -> dict[str, Any]:
    return differing({name: getattr(message, name) for name in FIELDS})


# --------------------------------------------------------------------------------------- dialogues

# S: is what the server says, C: what the client does, R: what it sends without an end of line, and
# with Python's escapes. The server has closed the connection where it says <closed>.
RECEIVED = "250 Received"
READY = "354 Ready for receive message. End data with <CR><LF>.<CR><LF>"
UNRECOGNIZED = "502 Command unrecognized. Available commands: HELO, EHLO, MAIL FROM:, RCPT TO:, DATA, RSET, NOOP, QUIT"
ENVELOPE = """
    S: 220 Welcome
    C: EHLO example.com
    S: 250 Received
    C: MAIL FROM:<a@example.com>
    S: 250 Received
    C: RCPT TO:<b@example.com>
    S: 250 Received
"""
IN_BODY = f"""{ENVELOPE}
    C: DATA
    S: {READY}
"""

DIALOGUES: dict[str, tuple[dict[str, Any], str]] = {
    "a mail": (
        {},
        f"""{IN_BODY}
    C: Subject: hi
    C:
    C: body
    C: .
    S: 250 Received
    C: QUIT
    S: 221 Closing connection
    S: <closed>
""",
    ),
    "HELO, lower case, white space, bare LF": (
        {},
        r"""
    S: 220 Welcome
    R:  \thelo example.com \r\n
    S: 250 Received
    R: mail from: a@example.com\n
    S: 250 Received
    R: Rcpt To:b@example.com\r\r\n
    S: 250 Received
    R: NOOP\n
    S: 250 Ok
    R: quit \n
    S: 221 Closing connection
    S: <closed>
""",
    ),
    "sender before HELO": (
        {},
        """
    S: 220 Welcome
    C: MAIL FROM:<a@example.com>
    S: 503 Bad sequence of commands. MAIL FROM should be used after HELO
""",
    ),
    "recipient before sender": (
        {},
        """
    S: 220 Welcome
    C: RCPT TO:<b@example.com>
    S: 503 Bad sequence of commands. RCPT TO should be used after MAIL FROM
    C: HELO example.com
    S: 250 Received
    C: RCPT TO:<b@example.com>
    S: 503 Bad sequence of commands. RCPT TO should be used after MAIL FROM
""",
    ),
    "DATA before recipient": (
        {},
        """
    S: 220 Welcome
    C: HELO example.com
    S: 250 Received
    C: MAIL FROM:<a@example.com>
    S: 250 Received
    C: DATA
    S: 503 Bad sequence of commands. DATA should be used after RCPT TO
""",
    ),
    "sequence is checked before the argument": (
        {},
        """
    S: 220 Welcome
    C: MAIL FROM:nonsense
    S: 503 Bad sequence of commands. MAIL FROM should be used after HELO
    C: RCPT TO:nonsense
    S: 503 Bad sequence of commands. RCPT TO should be used after MAIL FROM
    C: DATA x
    S: 503 Bad sequence of commands. DATA should be used after RCPT TO
    C: RSET x
    S: 503 Bad sequence of commands. HELO should be the first
""",
    ),
    "bad arguments": (
        {},
        f"""
    S: 220 Welcome
    C: HELO
    S: 501 HELO requires domain address or valid address literal
    C: EHLO a..com
    S: 501 HELO requires domain address or valid address literal
    C: EHLO example.com
    S: 250 Received
    C: MAIL FROM:nonsense
    S: 501 MAIL FROM requires valid email address
    C: MAIL FROM:<a@example.com>
    S: 250 Received
    C: RCPT TO:<>
    S: 501 RCPT TO requires valid email address
    C: RCPT TO:<Postmaster>
    S: 250 Received
    C: DATA x
    S: {UNRECOGNIZED}
    C: RSET x
    S: {UNRECOGNIZED}
    C: QUIT x
    S: {UNRECOGNIZED}
    C: NOOP x
    S: 250 Ok
""",
    ),
    "unknown commands": (
        {},
        f"""
    S: 220 Welcome
    C: FOO
    S: {UNRECOGNIZED}
    C:
    S: {UNRECOGNIZED}
    C: NOOPX
    S: {UNRECOGNIZED}
    C: MAIL
    S: {UNRECOGNIZED}
    C: MAIL TO:<a@example.com>
    S: {UNRECOGNIZED}
    C: MAIL  FROM:<a@example.com>
    S: {UNRECOGNIZED}
    C: MAIL FROM <a@example.com>
    S: {UNRECOGNIZED}
    C: connect
    S: {UNRECOGNIZED}
    C: message
    S: {UNRECOGNIZED}
    C: unknown
    S: {UNRECOGNIZED}
    C: quıt
    S: {UNRECOGNIZED}
    R: \\x00\\xff\\xfe\\r\\n
    S: {UNRECOGNIZED}
    C: NOOP
    S: 250 Ok
""",
    ),
    "the null sender": (
        {},
        """
    S: 220 Welcome
    C: HELO example.com
    S: 250 Received
    C: MAIL FROM:<>
    S: 250 Received
    C: MAIL FROM: <>
    S: 250 Received
    C: MAIL FROM:<Postmaster>
    S: 501 MAIL FROM requires valid email address
""",
    ),
    "RSET drops the envelope, not HELO": (
        {},
        f"""{ENVELOPE}
    C: RSET
    S: 250 Ok
    C: RCPT TO:<b@example.com>
    S: 503 Bad sequence of commands. RCPT TO should be used after MAIL FROM
    C: MAIL FROM:<a@example.com>
    S: 250 Received
""",
    ),
    "a repeated HELO drops the envelope": (
        {},
        f"""{ENVELOPE}
    C: HELO example.org
    S: 250 Received
    C: DATA
    S: 503 Bad sequence of commands. DATA should be used after RCPT TO
""",
    ),
    "a refused HELO takes the one before with it": (
        {},
        """
    S: 220 Welcome
    C: HELO example.com
    S: 250 Received
    C: HELO
    S: 501 HELO requires domain address or valid address literal
    C: MAIL FROM:<a@example.com>
    S: 503 Bad sequence of commands. MAIL FROM should be used after HELO
""",
    ),
    "a refused recipient takes the one before with it": (
        {},
        f"""{ENVELOPE}
    C: RCPT TO:<bad>
    S: 501 RCPT TO requires valid email address
    C: DATA
    S: 503 Bad sequence of commands. DATA should be used after RCPT TO
""",
    ),
    "a refused recipient among several": (
        {"multiple_rcptto": True},
        f"""{ENVELOPE}
    C: RCPT TO:<bad>
    S: 501 RCPT TO requires valid email address
    C: DATA
    S: {READY}
""",
    ),
    "NOOP changes nothing": (
        {},
        f"""{ENVELOPE}
    C: NOOP
    S: 250 Ok
    C: DATA
    S: {READY}
""",
    ),
    "another body for the same envelope": (
        {},
        f"""{IN_BODY}
    C: .
    S: 250 Received
    C: DATA
    S: {READY}
    C: .
    S: 250 Received
""",
    ),
    "after an accepted message the next one begins": (
        {"multiple_message_receiving": True},
        f"""{IN_BODY}
    C: .
    S: 250 Received
    C: DATA
    S: 503 Bad sequence of commands. DATA should be used after RCPT TO
    C: RCPT TO:<b@example.com>
    S: 503 Bad sequence of commands. RCPT TO should be used after MAIL FROM
    C: MAIL FROM:<a@example.com>
    S: 250 Received
""",
    ),
    "the same after RSET": (
        {"multiple_message_receiving": True},
        f"""{IN_BODY}
    C: .
    S: 250 Received
    C: RSET
    S: 250 Ok
    C: DATA
    S: 503 Bad sequence of commands. DATA should be used after RCPT TO
""",
    ),
    "blacklists": (
        {
            "blacklisted_helo_domains": ["Bad.example", "localhost"],
            "blacklisted_mailfrom_emails": ["spam@bad.example"],
            "blacklisted_rcptto_emails": ["x@a.com", "y@a.com"],
            "not_registered_emails": ["y@a.com", "nobody@a.com"],
        },
        """
    S: 220 Welcome
    C: EHLO bad.EXAMPLE
    S: 421 Service not available
    C: HELO localhost
    S: 421 Service not available
    C: EHLO example.com
    S: 250 Received
    C: MAIL FROM:<spam@BAD.example>
    S: 421 Service not available
    C: MAIL FROM:<SPAM@bad.example>
    S: 250 Received
    C: RCPT TO:<x@a.com>
    S: 421 Service not available
    C: RCPT TO:<y@a.com>
    S: 421 Service not available
    C: RCPT TO: Nobody <nobody@A.com>
    S: 550 User not found
    C: RCPT TO:<somebody@a.com>
    S: 250 Received
""",
    ),
    "fail fast: a bad argument": (
        {"fail_fast": True},
        """
    S: 220 Welcome
    C: HELO a..com
    S: 501 HELO requires domain address or valid address literal
    S: <closed>
""",
    ),
    "fail fast: a bad sequence": (
        {"fail_fast": True},
        """
    S: 220 Welcome
    C: DATA
    S: 503 Bad sequence of commands. DATA should be used after RCPT TO
    S: <closed>
""",
    ),
    "fail fast: an unknown command": (
        {"fail_fast": True},
        f"""
    S: 220 Welcome
    C: FOO
    S: {UNRECOGNIZED}
    S: <closed>
""",
    ),
    "fail fast: an unknown recipient among several": (
        {"fail_fast": True, "multiple_rcptto": True, "not_registered_emails": ["c@example.com"]},
        f"""{ENVELOPE}
    C: RCPT TO:<c@example.com>
    S: 550 User not found
    S: <closed>
""",
    ),
    "fail fast: a body that is too long": (
        {"fail_fast": True, "msg_size_limit": 3},
        f"""{IN_BODY}
    C: body
    C: .
    S: 552 Message exceeded max size of 3 bytes
    S: <closed>
""",
    ),
    "fail fast: a line that is too long": (
        {"fail_fast": True},
        f"""
    S: 220 Welcome
    C: NOOP {"x" * 4096}
    S: 500 Line too long
    S: <closed>
""",
    ),
    "the size limit is inclusive, without stuffed dots and the last one": (
        {"msg_size_limit": 10},
        f"""{IN_BODY}
    C: ..345678
    C: .
    S: 250 Received
    C: DATA
    S: 250 Received
""".replace("S: 250 Received\n    C: DATA\n    S: 250 Received", f"S: 250 Received\n    C: DATA\n    S: {READY}")
        + """
    C: 123456789
    C: .
    S: 552 Message exceeded max size of 10 bytes
    C: NOOP
    S: 250 Ok
""",
    ),
    "a long body is read to its end": (
        {"msg_size_limit": 10},
        f"""{IN_BODY}
    C: {"x" * 5000}
    C: QUIT
    C: NOOP
    C: .
    S: 552 Message exceeded max size of 10 bytes
    C: NOOP
    S: 250 Ok
""",
    ),
    "only CRLF around the dot ends a body": (
        {},
        rf"""{IN_BODY}
    R: a\n.\nQUIT\n
    R: b\r\n.\nNOOP\r\n
    R: c\n.\r\nNOOP\r\n
    R: d\r.\r\n
    R: \r\n.\r\n
    S: 250 Received
    C: NOOP
    S: 250 Ok
""",
    ),
    "a bare LF after DATA": (
        {},
        rf"""{ENVELOPE}
    R: DATA\n
    S: {READY}
    C: .
    S: 250 Received
""",
    ),
    "a line of 4096 bytes": (
        {},
        f"""
    S: 220 Welcome
    C: NOOP {"x" * (4096 - len("NOOP ") - 2)}
    S: 250 Ok
    C: NOOP {"x" * (4096 - len("NOOP ") - 1)}
    S: 500 Line too long
    C: NOOP
    S: 250 Ok
""",
    ),
    "a long line is answered before it ends": (
        {},
        f"""
    S: 220 Welcome
    R: {"x" * 4096}
    S: 500 Line too long
    R: {"y" * 50000}
    R: {"z" * 9}\\r\\nNOOP\\r\\n
    S: 250 Ok
""",
    ),
    "pipelining": (
        {},
        rf"""
    S: 220 Welcome
    R: EHLO example.com\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\nhi\r\n.\r\nRSET\r\nQUIT\r\n
    S: 250 Received
    S: 250 Received
    S: 250 Received
    S: {READY}
    S: 250 Received
    S: 250 Ok
    S: 221 Closing connection
    S: <closed>
""",
    ),
    "nothing is answered after QUIT": (
        {},
        r"""
    S: 220 Welcome
    R: QUIT\r\nNOOP\r\n
    S: 221 Closing connection
    S: <closed>
""",
    ),
    "every text can be another": (
        {
            "msg_greeting": "220-one\n220 two",
            "msg_helo_received": "250-one\r\n250 twö",
            "msg_mailfrom_received": "nonsense",
            "msg_rcptto_received": "",
            "msg_data_received": "send it",
            "msg_msg_received": "299 got it",
        },
        """
    S: 220-one
    S: 220 two
    C: EHLO example.com
    S: 250-one
    S: 250 twö
    C: MAIL FROM:<a@example.com>
    S: nonsense
    C: RCPT TO:<b@example.com>
    S:
    C: DATA
    S: send it
    C: .
    S: 299 got it
""",
    ),
    "a text that begins with 4 or 5 refuses": (
        {"msg_mailfrom_received": "450 later", "msg_invalid_cmd_rcptto_sequence": "250 fine"},
        """
    S: 220 Welcome
    C: EHLO example.com
    S: 250 Received
    C: MAIL FROM:<a@example.com>
    S: 450 later
    C: RCPT TO:<b@example.com>
    S: 250 fine
    C: DATA
    S: 503 Bad sequence of commands. DATA should be used after RCPT TO
""",
    ),
    "DATA that is refused by its text is not followed by a body": (
        {"msg_data_received": "554 no"},
        f"""{ENVELOPE}
    C: DATA
    S: 554 no
    C: NOOP
    S: 250 Ok
""",
    ),
    "rule: a refusal for an address, whatever its case, and for a domain": (
        {"rules": ["RCPT bob@Example.com: reply 550 5.1.1 No such user", "rcpt to a.com: reply 551 not here"]},
        """
    S: 220 Welcome
    C: EHLO example.com
    S: 250 Received
    C: MAIL FROM:<bob@example.com>
    S: 250 Received
    C: RCPT TO:<bob@EXAMPLE.com>
    S: 550 5.1.1 No such user
    C: RCPT TO:<Bob@example.com>
    S: 250 Received
    C: RCPT TO:<x@A.com>
    S: 551 not here
    C: RCPT TO:<x@b.a.com>
    S: 250 Received
""",
    ),
    "rule: twice, then as usual": (
        {"rules": ["RCPT: reply 450 4.2.0 Greylisted; times=2"]},
        """
    S: 220 Welcome
    C: EHLO example.com
    S: 250 Received
    C: MAIL FROM:<a@example.com>
    S: 250 Received
    C: RCPT TO:<b@example.com>
    S: 450 4.2.0 Greylisted
    C: DATA
    S: 503 Bad sequence of commands. DATA should be used after RCPT TO
    C: RCPT TO:<b@example.com>
    S: 450 4.2.0 Greylisted
    C: RCPT TO:<b@example.com>
    S: 250 Received
""",
    ),
    "rule: a sequence, the last of which stays": (
        {"rules": ["NOOP: reply 451 later | 452 again | ", "RSET: reply 250 one | 250 two"]},
        """
    S: 220 Welcome
    C: NOOP
    S: 451 later
    C: NOOP
    S: 452 again
    C: NOOP
    S: 250 Ok
    C: NOOP
    S: 250 Ok
    C: RSET
    S: 250 one
    C: RSET
    S: 250 two
    C: RSET
    S: 250 two
""",
    ),
    "rule: the newest wins, until it is spent": (
        {"rules": ["NOOP: reply 450 old", "*: reply 451 all; times=1", "NOOP: reply 452 new; times=1"]},
        """
    S: 451 all
    C: NOOP
    S: 452 new
    C: NOOP
    S: 450 old
    C: RSET
    S: 503 Bad sequence of commands. HELO should be the first
""",
    ),
    "rule: 2xx and 3xx take effect, even where the usual is a refusal": (
        {"rules": ["RCPT: reply 299 fine", "DATA: reply 399 go", "message: reply 298 got it", "MAIL: reply 200 ok"]},
        """
    S: 220 Welcome
    C: EHLO example.com
    S: 250 Received
    C: MAIL FROM:nobody
    S: 200 ok
    C: RCPT TO:<nowhere>
    S: 299 fine
    C: DATA
    S: 399 go
    C: hi
    C: .
    S: 298 got it
""",
    ),
    "rule: anything else refuses": (
        {"rules": ["MAIL: reply nonsense", "EHLO: reply 550 no; times=1", "DATA: reply 552 too much"]},
        """
    S: 220 Welcome
    C: EHLO example.com
    S: 550 no
    C: MAIL FROM:<a@example.com>
    S: nonsense
    C: EHLO example.com
    S: 250 Received
    C: MAIL FROM:<a@example.com>
    S: nonsense
    C: RCPT TO:<b@example.com>
    S: 503 Bad sequence of commands. RCPT TO should be used after MAIL FROM
    C: DATA
    S: 552 too much
    C: NOOP
    S: 250 Ok
""",
    ),
    "rule: fail fast": (
        {"fail_fast": True, "rules": ["NOOP: reply 450 no"]},
        """
    S: 220 Welcome
    C: NOOP
    S: 450 no
    S: <closed>
""",
    ),
    "rule: a verb the server does not know": (
        {"rules": ["vrfy bob@example.com: reply 252 Maybe", "VRFY Carol: reply 250 Carol"]},
        f"""
    S: 220 Welcome
    C: vrfy <bob@example.com>
    S: 252 Maybe
    C: VRFY carol
    S: 250 Carol
    C: VRFY dave
    S: {UNRECOGNIZED}
""",
    ),
    "rule: too busy to talk": (
        {"rules": ["connect: reply 421 Too busy; close"]},
        """
    S: 421 Too busy
    S: <closed>
""",
    ),
    "rule: an answer, then a close": (
        {"rules": ["DATA: drop 354 go"]},
        f"""{ENVELOPE}
    C: DATA
    S: 354 go
    S: <closed>
""",
    ),
    "rule: bytes that are no reply": (
        {"rules": [r"NOOP: raw \x21 garbage\r\n250 and more\r\n; times=1"]},
        """
    S: 220 Welcome
    C: NOOP
    S: ! garbage
    S: 250 and more
    C: NOOP
    S: 250 Ok
""",
    ),
    "rule: a delay and a trickle change no reply": (
        {"rules": ["NOOP: delay 0.001", "*: trickle 0.0001"]},
        f"""{ENVELOPE}
    C: NOOP
    S: 250 Ok
""",
    ),
    "rule: a line that is too long is in *": (
        {"rules": ["*: reply 450 no; times=2"]},
        f"""
    S: 450 no
    C: {"x" * 5000}
    S: 450 no
    C: {"x" * 5000}
    S: 500 Line too long
""",
    ),
    "rule: the body is cut at a byte": (
        {"rules": ["message: drop; after=10"]},
        rf"""{IN_BODY}
    R: Subject: x\r\nthis is not read
    S: <closed>
""",
    ),
    "rule: a body shorter than that is not cut": (
        {"rules": ["message: reset; after=6", "message nobody@example.com: drop; after=1"]},
        rf"""{IN_BODY}
    R: x\r\n.\r\n
    S: 250 Received
    C: DATA
    S: {READY}
    R: x\r\n.
    R: .\r\n.\r\n
    S: <reset>
""",
    ),
    **{
        f"rule: {action} at {stage}": (
            {"rules": [f"{stage}: {action}"]},
            f"""{start}
    S: {end}
""",
        )
        for action, end in (("drop", "<closed>"), ("reset", "<reset>"), ("silence", "<silence>"))
        for stage, start in (
            ("connect", ""),
            ("EHLO", "\n    S: 220 Welcome\n    C: EHLO example.com"),
            (
                "MAIL FROM",
                "\n    S: 220 Welcome\n    C: EHLO example.com\n    S: 250 Received\n    C: MAIL FROM:<a@example.com>",
            ),
            ("RCPT b@example.com", ENVELOPE.rstrip().removesuffix("S: 250 Received")),
            ("DATA", f"{ENVELOPE}    C: DATA"),
            ("message", f"{IN_BODY}    C: hi\n    C: ."),
            ("RSET", "\n    S: 220 Welcome\n    C: RSET"),
            ("NOOP", "\n    S: 220 Welcome\n    C: NOOP"),
            ("QUIT", "\n    S: 220 Welcome\n    C: QUIT"),
            ("XYZ", "\n    S: 220 Welcome\n    C: xyz"),
        )
    },
}

# One dialogue for each reply text: the option, other options, the lines, and the reply that is the text.
TEXTS: list[tuple[str, dict[str, Any], list[str], int]] = [
    ("msg_greeting", {}, [], 0),
    ("msg_invalid_cmd", {}, ["FOO"], 1),
    ("msg_invalid_cmd_helo_arg", {}, ["HELO"], 1),
    ("msg_helo_blacklisted_domain", {"blacklisted_helo_domains": ["a.com"]}, ["HELO a.com"], 1),
    ("msg_helo_received", {}, ["HELO a.com"], 1),
    ("msg_invalid_cmd_mailfrom_sequence", {}, ["MAIL FROM:<a@a.com>"], 1),
    ("msg_invalid_cmd_mailfrom_arg", {}, ["HELO a.com", "MAIL FROM:a"], 2),
    (
        "msg_mailfrom_blacklisted_email",
        {"blacklisted_mailfrom_emails": ["a@a.com"]},
        ["HELO a.com", "MAIL FROM:a@a.com"],
        2,
    ),
    ("msg_mailfrom_received", {}, ["HELO a.com", "MAIL FROM:a@a.com"], 2),
    ("msg_invalid_cmd_rcptto_sequence", {}, ["RCPT TO:<a@a.com>"], 1),
    ("msg_invalid_cmd_rcptto_arg", {}, ["HELO a.com", "MAIL FROM:a@a.com", "RCPT TO:a"], 3),
    (
        "msg_rcptto_blacklisted_email",
        {"blacklisted_rcptto_emails": ["a@a.com"]},
        ["HELO a.com", "MAIL FROM:a@a.com", "RCPT TO:a@a.com"],
        3,
    ),
    (
        "msg_rcptto_not_registered_email",
        {"not_registered_emails": ["a@a.com"]},
        ["HELO a.com", "MAIL FROM:a@a.com", "RCPT TO:a@a.com"],
        3,
    ),
    ("msg_rcptto_received", {}, ["HELO a.com", "MAIL FROM:a@a.com", "RCPT TO:a@a.com"], 3),
    ("msg_invalid_cmd_data_sequence", {}, ["DATA"], 1),
    ("msg_data_received", {}, ["HELO a.com", "MAIL FROM:a@a.com", "RCPT TO:a@a.com", "DATA"], 4),
    (
        "msg_msg_size_is_too_big",
        {"msg_size_limit": 1},
        ["HELO a.com", "MAIL FROM:a@a.com", "RCPT TO:a@a.com", "DATA", "x\r\n."],
        5,
    ),
    (
        "msg_msg_failed",
        {"on_message": lambda message: 1 / 0},
        ["HELO a.com", "MAIL FROM:a@a.com", "RCPT TO:a@a.com", "DATA", "x\r\n."],
        5,
    ),
    ("msg_msg_received", {}, ["HELO a.com", "MAIL FROM:a@a.com", "RCPT TO:a@a.com", "DATA", "x\r\n."], 5),
    ("msg_invalid_cmd_rset_sequence", {}, ["RSET"], 1),
    ("msg_invalid_cmd_rset_arg", {}, ["HELO a.com", "RSET x"], 2),
    ("msg_rset_received", {}, ["HELO a.com", "RSET"], 2),
    ("msg_noop_received", {}, ["NOOP"], 1),
    ("msg_quit_cmd", {}, ["QUIT"], 1),
    ("msg_line_too_long", {}, ["x" * 5000], 1),
]


def steps(script: str) -> Iterator[tuple[str, Any]]:
    """The steps of a dialogue: ("S", text), or ("C", bytes)."""
    for line in textwrap.dedent(script).splitlines():
        if not line.strip():
            continue
        kind, text = line.lstrip()[0], line.lstrip()[3:]
        if kind == "C":
            yield "C", text.encode() + b"\r\n"
        elif kind == "R":
            yield "C", text.encode().decode("unicode_escape").encode("latin-1")
        else:
            yield "S", text


def with_rules(make: Any, options: dict[str, Any]) -> Any:
    """A Server or Memory with these options, and with the rules among them, as on the command line."""
    made = make(**{name: value for name, value in options.items() if name != "rules"})
    for rule in options.get("rules", ()):
        smtpmock._add_rule(made, rule)
    return made


class DialogueTest(unittest.TestCase):
    """Every dialogue in memory and through a socket."""

    def test_in_memory(self) -> None:
        for name, (options, script) in DIALOGUES.items():
            with self.subTest(name):
                memory = with_rules(Memory, options)
                said = [memory.session.greet()]
                for kind, what in steps(script):
                    if kind == "C":
                        self.assertEqual(said, [], "the server has said more")
                        said = memory.feed(what)
                    else:
                        self.assert_next(said, what)
                self.assertEqual(said, [], "the server has said more")

    def assert_next(self, said: list[smtpmock._Reply], text: str) -> None:
        """Take the line off the front of the replies."""
        self.assertTrue(said, f"instead of silence: {text}")
        reply = said.pop(0)
        if not reply.data and reply.after in smtpmock._ENDS:
            self.assertEqual(reply.after.value, text)
            return
        line, more, rest = reply.data.decode()[:-2].partition("\r\n")
        self.assertEqual(line, text)
        if more:
            said.insert(0, reply._replace(data=rest.encode() + b"\r\n"))
        elif reply.after in smtpmock._ENDS:
            said.insert(0, smtpmock._Reply("", f"{reply.after.value}\r\n".encode()))

    def test_through_a_socket(self) -> None:
        for name, (options, script) in DIALOGUES.items():
            with self.subTest(name), with_rules(Server, options) as server, Client(server) as client:
                for kind, what in steps(script):
                    if kind == "C":
                        client.send(what)
                    elif what == "<silence>":
                        client.socket.settimeout(0.02)
                        self.assertRaises(TimeoutError, client.socket.recv, 1)
                        client.socket.settimeout(TIMEOUT)
                    else:
                        self.assertEqual(client.read(), what)

    def test_each_text(self) -> None:
        for option, options, lines, index in TEXTS:
            for text in ("299 custom", "custom"):
                with self.subTest(option, text=text), Server(**{**options, option: text}) as server:
                    with Client(server) as client:
                        self.assertEqual([client.read(), *client.ask(*lines[:index])][index], text)

    def test_a_command_that_needs_helo_has_a_text(self) -> None:
        class Verify(smtpmock.Handler):
            needs = ("helo",)

        options = Configuration(msg_invalid_cmd_helo_sequence="503 custom")
        self.assertEqual(Verify(options).run(Memory().session, "VRFY", "").text, "503 custom")

    def test_all_texts_have_a_dialogue(self) -> None:
        texts = {field.name for field in dataclasses.fields(Configuration) if field.name.startswith("msg_")}
        elsewhere = {text for text in texts if "auth" in text or "tls" in text or "bdat" in text or "parameter" in text}
        elsewhere |= {"msg_invalid_cmd_helo_sequence", "msg_session_timeout", "msg_server_shutdown"}
        self.assertEqual({option for option, *_ in TEXTS} | elsewhere, texts - {"msg_size_limit"})

    def test_the_forms_name_options(self) -> None:
        for form in smtpmock._FORMS:
            refused = [name for pair in form.refused for name in pair]
            for name in (form.bad_sequence, form.bad_argument, form.received, form.delay, *refused):
                self.assertTrue(name == "" or hasattr(Configuration(), name), f"{form.__name__}: {name}")

    def test_a_refused_command_does_not_answer_what_it_has_not_seen(self) -> None:
        memory = Memory()
        self.assertEqual(memory.feed(b"NOOP"), [])
        self.assertEqual([reply.text for reply in memory.feed(b"\r")], [])
        self.assertEqual([reply.text for reply in memory.feed(b"\nNO")], ["250 Ok"])


class PiecesTest(unittest.TestCase):
    """The same bytes in any pieces give the same replies and messages."""

    STREAMS: Sequence[tuple[dict[str, Any], bytes]] = [
        ({}, b"EHLO a.com\r\n" + MAIL + b"RSET\r\n" + MAIL + b"QUIT\r\n"),
        ({"multiple_message_receiving": True}, b"EHLO a.com\r\n" + MAIL * 3 + b"NOOP\r\nQUIT\r\n"),
        ({}, b"HELO a.com\r\n" + MAIL.replace(b"body", b"..a\r\n...\r\n.b\r\n\r.\r\n\n.\n..")),
        ({}, b"HELO a.com\nMAIL FROM:<>\nRCPT TO:<b@b.com>\nDATA\n.\r\n" + b"NOOP\nDATA\nhalf a bo\r\n.d"),
        (
            {"msg_size_limit": 20},
            b"HELO a.com\r\n" + MAIL.replace(b"body", b"long\r\n.\r.\r\n..\r\n" * 9) + b"NOOP\r\n",
        ),
        ({}, b"NOOP " + b"x" * 5000 + b"\r\nNOOP\r\n" + b"y" * 4094 + b"\r\n" + b"z" * 4095 + b"\r\nHELO a.com"),
        ({"multiple_rcptto": True, "fail_fast": True}, b"HELO a.com\r\n" + MAIL + b"\x00\xff\r\nNOOP\r\n"),
    ]

    def test_random_pieces(self) -> None:
        for number, (options, stream) in enumerate(self.STREAMS):
            whole = Memory(**options)
            replies = whole.run(stream)
            for seed in range(60):
                with self.subTest(stream=number, seed=seed):
                    rng = random.Random(seed)
                    count = rng.choice((1, 3, 30, len(stream) - 1))
                    cuts = sorted(rng.sample(range(1, len(stream)), min(count, len(stream) - 1)))
                    pieces = [stream[i:j] for i, j in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
                    memory = Memory(**options)
                    self.assertEqual(memory.run(*pieces), replies)
                    expected = [message.to_dict() for message in whole.messages()]
                    self.assertEqual([message.to_dict() for message in memory.messages()], expected)


# ---------------------------------------------------------------------------------------- messages

HELO = {"helo_request": "EHLO a.com", "helo_response": RECEIVED, "helo": True}
FROM = {"mailfrom_request": "MAIL FROM:<a@a.com>", "mailfrom_response": RECEIVED, "mailfrom": True}
FROM["mail_from"] = "a@a.com"
TO = {"rcptto_request_response": [("RCPT TO:<b@b.com>", RECEIVED)], "rcptto": True, "rcpt_tos": ["b@b.com"]}
DATA = {"data_request": "DATA", "data_response": READY, "data": True}
BODY = {"content": b"hi\r\n", "msg_response": RECEIVED, "msg": True}
RSET = {"rset_request": "RSET", "rset_response": "250 Ok", "rset": True}
FULL = {**HELO, **FROM, **TO, **DATA, **BODY}
SEND = "MAIL FROM:<a@a.com>", "RCPT TO:<b@b.com>", "DATA", "hi\r\n."


def rcptto(*pairs: tuple[str, str]) -> dict[str, Any]:
    """The fields of recipients, each with an address and a reply."""
    accepted = [address for address, reply in pairs if reply == RECEIVED]
    requests = [(f"RCPT TO:<{address}>", reply) for address, reply in pairs]
    return {"rcptto_request_response": requests, "rcptto": bool(accepted), "rcpt_tos": accepted}


class RecordTest(unittest.TestCase):
    """What a message keeps, and what erases it."""

    maxDiff = None

    def assert_messages(self, lines: Sequence[str], *expected: dict[str, Any], **options: Any) -> None:
        memory = Memory(**options)
        memory.run(*(line.encode() + b"\r\n" for line in lines))
        self.assertEqual(list(map(state, memory.messages())), list(map(differing, expected)))

    def test_a_mail(self) -> None:
        self.assert_messages(["EHLO a.com", *SEND, "QUIT"], {**FULL, "quit_sent": True})

    def test_nothing_was_said(self) -> None:
        self.assert_messages([])

    def test_half_a_line_is_no_command(self) -> None:
        memory = Memory()
        memory.run(b"EHLO a.com")
        self.assertEqual(memory.messages(), [])

    def test_only_nonsense_was_said(self) -> None:
        self.assert_messages(["nonsense"], {})

    def test_refusals_are_recorded(self) -> None:
        refused = {"helo_request": "HELO", "helo_response": "501 no", "helo": False}
        self.assert_messages(["HELO"], refused, msg_invalid_cmd_helo_arg="501 no")
        refused = {"mailfrom_request": "MAIL FROM:x", "mailfrom_response": "501 no", "mailfrom": False}
        self.assert_messages(["EHLO a.com", "MAIL FROM:x"], {**HELO, **refused}, msg_invalid_cmd_mailfrom_arg="501 no")
        refused = {"data_request": "DATA", "data_response": "503 no", "data": False}
        self.assert_messages(["EHLO a.com", "DATA"], {**HELO, **refused}, msg_invalid_cmd_data_sequence="503 no")
        refused = {"rset_request": "RSET", "rset_response": "503 no", "rset": False}
        self.assert_messages(["RSET"], refused, msg_invalid_cmd_rset_sequence="503 no")
        refused = {**FROM, "mailfrom_response": "421 no", "mailfrom": False}
        options = {"blacklisted_mailfrom_emails": ["a@a.com"], "msg_mailfrom_blacklisted_email": "421 no"}
        self.assert_messages(["EHLO a.com", SEND[0]], {**HELO, **refused}, **options)

    def test_a_body_that_was_too_long(self) -> None:
        refused = {"msg_response": "552 Message exceeded max size of 1 bytes", "msg": False}
        self.assert_messages(["EHLO a.com", *SEND], {**HELO, **FROM, **TO, **DATA, **refused}, msg_size_limit=1)

    def test_a_body_refused_by_its_text_keeps_its_content(self) -> None:
        refused = {**BODY, "msg_response": "451 no", "msg": False}
        self.assert_messages(["EHLO a.com", *SEND], {**FULL, **refused}, msg_msg_received="451 no")

    def test_a_client_that_leaves_in_the_body(self) -> None:
        memory = Memory()
        memory.run(b"EHLO a.com\r\nMAIL FROM:<a@a.com>\r\nRCPT TO:<b@b.com>\r\nDATA\r\nhalf\r\n..a")
        self.assertEqual(state(memory.messages()[0]), {**HELO, **FROM, **TO, **DATA, "content": b"half\r\n.a"})

    def test_the_body_is_kept_as_it_is(self) -> None:
        for body in (
            b"",
            b"\r\n",
            b"\n\r\x00\xff\r\n",
            b"no header\r\n",
            b".\n\r\n",
            b"..\r\n.a\r\n",
            b"\r\n\r\n.\r.\r\n",
        ):
            with self.subTest(body=body):
                memory = Memory()
                stuffed = re.sub(rb"(^|(?<=\r\n))\.", b"..", body)
                memory.run(b"EHLO a.com\r\n" + "\r\n".join(SEND[:3]).encode() + b"\r\n" + stuffed + b".\r\n")
                (message,) = memory.messages()
                self.assertEqual(message.content, body)
                self.assertEqual(message.msg_request.encode("utf-8", "surrogateescape"), body)
                self.assertTrue(message.is_consistent)

    def test_is_consistent_needs_each_step(self) -> None:
        yes, no = (smtpmock._Exchange("", "", accepted, "x") for accepted in (True, False))
        steps = {"mailfrom": yes, "data": yes, "msg": yes}
        for changed, recipients, expected in (
            ({}, [no, yes], True),
            ({}, [no], False),
            *(({step: no}, [yes], False) for step in steps),
        ):
            session = Memory().session
            session.steps, session.recipients = {**steps, **changed}, recipients
            self.assertIs(Message(session, 1, 0.0).is_consistent, expected)

    def test_the_sender(self) -> None:
        for line, sender in (("MAIL FROM:<>", ""), ("MAIL FROM: John <j@x.com>", "j@x.com"), ("MAIL FROM:j", None)):
            memory = Memory()
            memory.run(b"EHLO a.com\r\n" + line.encode() + b"\r\n")
            self.assertEqual(memory.messages()[0].mail_from, sender)

    # What a repeated command erases, in each combination of the two multiple_ options.

    def test_one_message_one_recipient(self) -> None:
        two, late = {**RSET, "noop": True}, {"helo_request": "HELO b.com"}
        refused = ("bad", "501 RCPT TO requires valid email address")
        for lines, expected in {
            (*SEND, "HELO b.com"): {**HELO, **late},
            (*SEND, "RSET", "NOOP", "EHLO a.com"): HELO,
            (*SEND, SEND[0]): {**HELO, **FROM},
            ("NOOP", "RSET", "NOOP", SEND[0]): {**HELO, **FROM},
            ("RSET", "NOOP"): {**HELO, **two},
            ("NOOP", "RSET"): {**HELO, **RSET},
            (*SEND, "RCPT TO:<c@c.com>"): {**HELO, **FROM, **rcptto(("c@c.com", RECEIVED))},
            (*SEND, "RCPT TO:<bad>"): {**HELO, **FROM, **rcptto(refused)},
            (*SEND, "NOOP", "DATA", "new\r\n."): {**FULL, "noop": True, "content": b"new\r\n"},
            (*SEND, "DATA x"): {
                **HELO,
                **FROM,
                **TO,
                "data_request": "DATA x",
                "data_response": UNRECOGNIZED,
                "data": False,
            },
            (*SEND, "RSET"): {**HELO, **RSET},
            (*SEND, "RSET x"): {**HELO, "rset_request": "RSET x", "rset_response": UNRECOGNIZED, "rset": False},
            (*SEND, "NOOP"): {**FULL, "noop": True},
            (*SEND, "FOO", "NOOPX"): FULL,
            (*SEND, *SEND): FULL,
            (*SEND, "RSET", *SEND, "QUIT"): {**FULL, "quit_sent": True},
        }.items():
            with self.subTest(lines=lines):
                self.assert_messages(["EHLO a.com", *lines], expected)

    def test_one_message_several_recipients(self) -> None:
        b, c, bad = ("b@b.com", RECEIVED), ("c@c.com", RECEIVED), ("bad", "501 RCPT TO requires valid email address")
        for lines, expected in {
            (*SEND[:2], "RCPT TO:<bad>", "RCPT TO:<c@c.com>"): {**HELO, **FROM, **rcptto(b, bad, c)},
            (SEND[0], "RCPT TO:<bad>"): {**HELO, **FROM, **rcptto(bad)},
            (*SEND, "RCPT TO:<c@c.com>"): {**FULL, **rcptto(b, c)},
            (*SEND[:2], SEND[0], "RCPT TO:<c@c.com>"): {**HELO, **FROM, **rcptto(c)},
            (*SEND[:2], "RSET"): {**HELO, **RSET},
            (*SEND, *SEND): FULL,
        }.items():
            with self.subTest(lines=lines):
                self.assert_messages(["EHLO a.com", *lines], expected, multiple_rcptto=True)

    def test_several_messages_one_recipient(self) -> None:
        no_mail = "503 Bad sequence of commands. RCPT TO should be used after MAIL FROM"
        second = {**FULL, **rcptto(("c@c.com", RECEIVED))}
        for lines, expected in {
            (*SEND, *SEND, "QUIT"): [FULL, {**FULL, "quit_sent": True}],
            (*SEND, "RSET", *SEND): [{**FULL, **RSET}, FULL],
            (*SEND, "RSET", "NOOP", "QUIT"): [{**FULL, **RSET, "noop": True, "quit_sent": True}],
            (*SEND, "EHLO a.com"): [FULL, HELO],
            (*SEND, "HELO"): [FULL, {"helo_request": "HELO", "helo_response": "501 no", "helo": False}],
            (*SEND, "FOO"): [FULL, HELO],
            (*SEND, "RCPT TO:<c@c.com>"): [FULL, {**HELO, **rcptto(("c@c.com", no_mail))}],
            (*SEND, SEND[0], "RSET", "QUIT"): [FULL, {**HELO, **RSET, "quit_sent": True}],
            (*SEND, SEND[0], SEND[1], "RCPT TO:<c@c.com>", *SEND[2:]): [FULL, second],
            (SEND[0], "RSET", *SEND): [FULL],
        }.items():
            with self.subTest(lines=lines):
                options = {"multiple_message_receiving": True, "msg_invalid_cmd_helo_arg": "501 no"}
                self.assert_messages(["EHLO a.com", *lines], *expected, **options)

    def test_several_messages_several_recipients(self) -> None:
        both = rcptto(("b@b.com", RECEIVED), ("c@c.com", RECEIVED))
        lines = [*SEND[:2], "RCPT TO:<c@c.com>", *SEND[2:]]
        options = {"multiple_message_receiving": True, "multiple_rcptto": True}
        self.assert_messages(["EHLO a.com", *lines, *SEND], {**FULL, **both}, FULL, **options)

    # When it is in the mailbox.

    def test_recorded_before_the_reply(self) -> None:
        for lines in (["EHLO a.com", *SEND], ["EHLO a.com", "QUIT"]):
            memory = Memory()
            for line in lines[:-1]:
                memory.feed(line.encode() + b"\r\n")
            self.assertEqual(memory.messages(), [])
            for _ in memory.session.receive(lines[-1].encode() + b"\r\n"):
                self.assertEqual(len(memory.messages()), 1)

    def test_what_was_handed_out_does_not_change(self) -> None:
        memory = Memory(multiple_rcptto=True)
        memory.feed("\r\n".join(["EHLO a.com", *SEND, ""]).encode())
        (message,) = memory.messages()
        message.rcpt_tos.append("mine")
        message.rcptto_request_response.clear()
        memory.feed(b"RCPT TO:<c@c.com>\r\nQUIT\r\n")
        self.assertEqual(state(message), FULL)
        self.assertEqual(memory.messages()[0].rcpt_tos, ["b@b.com", "c@c.com"])
        with self.assertRaisesRegex(AttributeError, "read-only: helo"):
            message.helo = False

    def test_a_purged_message_is_not_handed_out_again(self) -> None:
        memory = Memory()
        memory.feed("\r\n".join(["EHLO a.com", *SEND, ""]).encode())
        self.assertEqual(len(memory.mailbox.messages(purge=True)), 1)
        memory.feed(b"RSET\r\nNOOP\r\nQUIT\r\n")
        memory.session.end()
        self.assertEqual(memory.messages(), [])

    def test_a_purge_does_not_change_the_dialogue(self) -> None:
        memory = Memory()
        memory.feed("\r\n".join(["EHLO a.com", *SEND, ""]).encode())
        memory.mailbox.messages(purge=True)
        self.assertEqual([reply.text for reply in memory.feed(b"DATA\r\nnew\r\n.\r\n")], [READY, RECEIVED])
        self.assertEqual([state(message) for message in memory.messages()], [{**FULL, "content": b"new\r\n"}])

    def test_a_purge_at_any_moment_loses_nothing(self) -> None:
        """The second mail of a session, and a purge in the middle of each of its commands."""
        lines = [line.encode() + b"\r\n" for line in (*SEND[:3], "new\r\n.", "NOOP", "QUIT")]
        for moment in range(len(lines)):
            memory = Memory()
            memory.feed("\r\n".join(["EHLO a.com", *SEND, ""]).encode())
            purged: list[Message] = []
            for index, line in enumerate(lines):
                if index == moment:
                    update = memory.mailbox.update

                    def purge_and_update(
                        *arguments: Any, memory: Any = memory, update: Any = update, purged: Any = purged
                    ) -> bool:
                        purged.extend(memory.mailbox.messages(purge=True))
                        result: bool = update(*arguments)
                        return result

                    with mock.patch.object(memory.mailbox, "update", purge_and_update):
                        memory.feed(line)
                else:
                    memory.feed(line)
            bodies = [message.content for message in (*purged, *memory.messages())]
            self.assertEqual(len(purged), 1)
            self.assertEqual(bodies.count(b"new\r\n"), 1, f"purged at {lines[moment]!r}")

    def test_a_message_after_a_purge_is_there_when_it_is_complete(self) -> None:
        memory = Memory()
        memory.feed("\r\n".join(["EHLO a.com", *SEND, ""]).encode())
        memory.mailbox.messages(purge=True)
        memory.feed(b"NOOP\r\n" + "\r\n".join([*SEND[:3], ""]).encode())
        self.assertEqual(memory.messages(), [])
        memory.session.end()
        self.assertEqual([state(message) for message in memory.messages()], [{**HELO, **FROM, **TO, **DATA}])

    def test_repr(self) -> None:
        memory = Memory()
        memory.feed("\r\n".join(["EHLO a.com", *SEND, ""]).encode())
        self.assertEqual(repr(memory.messages()[0]), "<Message 1 from 'a@a.com' to ['b@b.com']: 4 bytes, accepted>")
        memory.feed(b"RCPT TO:<nobody>\r\nQUIT\r\n")
        end = "not accepted, last reply '221 Closing connection'"
        self.assertEqual(repr(memory.messages()[0]), f"<Message 1 from 'a@a.com' to []: 0 bytes, {end}>")
        self.assertEqual(repr(EMPTY), "<Message 0 from None to []: 0 bytes, no reply>")


# -------------------------------------------------------------------------------------------- mail

# Mails as the programs named here write them: the content, with LF for CRLF, and what is to be found in it.
MAILS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "smtplib, no header at all": (b"Hello\n", {"subject": None, "text": "Hello\n", "html": None, "attachments": []}),
    "an indented text without a header": (b"  Hello\n", {"subject": None, "text": "  Hello\n"}),
    "an empty one": (b"", {"subject": None, "text": "", "html": None, "attachments": []}),
    "an empty body": (b"Subject: empty\n\n", {"subject": "empty", "text": ""}),
    "no empty line after the header": (b"Subject: hi\n", {"subject": "hi", "text": ""}),
    "mutt, UTF-8 as 8bit": (
        """Date: Sun, 22 Nov 2026 10:00:00 +0000
From: =?utf-8?Q?J=C3=B6rg?= <joerg@example.org>
To: b@example.com
Subject: =?utf-8?B?R3LDvMOfZSBhdXMgS8O2bG4sIG1pdCBlaW5lbSBsYW5nZW4gQmV0cmVmZg==?=
\t=?utf-8?Q?_=E2=80=93_der_zweite_Teil?=
MIME-Version: 1.0
Content-Type: text/plain; charset=utf-8
Content-Disposition: inline
Content-Transfer-Encoding: 8bit

Schöne Grüße
""".encode(),
        {"subject": "Grüße aus Köln, mit einem langen Betreff – der zweite Teil", "text": "Schöne Grüße\n"},
    ),
    "PHP, ISO-8859-1 as 8bit": (
        b"Subject: =?iso-8859-1?Q?Bestellung_best=E4tigt?=\nContent-Type: text/plain; charset=iso-8859-1\n"
        b"Content-Transfer-Encoding: 8bit\n\nSie zahlen 5 \xa3 f\xfcr alles.\n",
        {"subject": "Bestellung bestätigt", "text": "Sie zahlen 5 £ für alles.\n", "attachments": []},
    ),
    "Outlook, ISO-8859-1 as quoted-printable": (
        b'Subject: RE: Treffen\nContent-Type: text/plain; charset="iso-8859-1"\n'
        b"Content-Transfer-Encoding: quoted-printable\nMIME-Version: 1.0\n\n"
        b"Sch=F6n, =\nbis sp=E4ter =3D)\n",
        {"text": "Schön, bis später =)\n"},
    ),
    "Thunderbird, nested, with two attachments": (
        b"""Content-Type: multipart/mixed; boundary="------------A0"
Subject: Rechnung
MIME-Version: 1.0

This is a multi-part message in MIME format.
--------------A0
Content-Type: multipart/alternative;
 boundary="------------B1"

--------------B1
Content-Type: text/plain; charset=UTF-8; format=flowed
Content-Transfer-Encoding: base64

SGFsbMO2Y2hlbiE=
--------------B1
Content-Type: multipart/related; boundary="------------C2"

--------------C2
Content-Type: text/html; charset=UTF-8
Content-Transfer-Encoding: quoted-printable

<img src=3D"cid:1">Hall=C3=B6chen!
--------------C2
Content-Type: image/gif
Content-ID: <1>
Content-Transfer-Encoding: base64

R0lGODlhAQABAAAAACw=

--------------C2--

--------------B1--

--------------A0
Content-Type: application/pdf; name="=?UTF-8?B?UmVjaG51bmcgZsO8ciBKw7ZyZy5wZGY=?="
Content-Disposition: attachment; filename*0*=UTF-8''Rechnung%20f%C3%BCr%20J%C3%B6;
 filename*1*=rg.pdf
Content-Transfer-Encoding: base64

JVBERi0xLjQK
--------------A0
Content-Type: text/plain; charset=UTF-8; name="notes.txt"
Content-Disposition: attachment; filename="notes.txt"
Content-Transfer-Encoding: quoted-printable

5 =E2=82=AC
--------------A0--
""",
        {
            "subject": "Rechnung",
            "text": "Hallöchen!",
            "html": '<img src="cid:1">Hallöchen!',
            "attachments": [
                (None, "image/gif", b"GIF89a\1\0\1\0\0\0\0,"),
                ("Rechnung für Jörg.pdf", "application/pdf", b"%PDF-1.4\n"),
                ("notes.txt", "text/plain", "5 €".encode()),
            ],
        },
    ),
    "Outlook, encoded words in a file's name, a mail in the mail": (
        b"""Subject: FW: report
Content-Type: multipart/mixed; boundary=XX

--XX
Content-Type: text/html; charset=us-ascii

<p>see below</p>
--XX
Content-Type: application/octet-stream; name="=?iso-8859-1?Q?Ber=EDcht.bin?="
Content-Disposition: attachment; filename="=?iso-8859-1?Q?Ber=EDcht.bin?="
Content-Transfer-Encoding: base64

AP8B
--XX
Content-Type: message/rfc822

Subject: report
Content-Type: text/plain

the first
--XX--
""",
        {
            "text": None,
            "html": "<p>see below</p>",
            "attachments": [
                ("Berícht.bin", "application/octet-stream", b"\0\xff\1"),
                (None, "message/rfc822", b"Subject: report\r\nContent-Type: text/plain\r\n\r\nthe first"),
            ],
        },
    ),
    "8-bit and NUL bytes, and no charset": (
        b"Subject: \xff\xfe\n\n\0\1\xfc\n\xe2\x82\xac\n",
        {"text": "\0\1\ufffd\n€\n", "html": None},
    ),
    "a charset that is none": (b"Content-Type: text/plain; charset=klingon\n\nQapla'\n", {"text": "Qapla'\n"}),
    "a boundary that never comes": (
        b"Subject: broken\nContent-Type: multipart/mixed; boundary=never\n\n--other\n\nwhat it says\n",
        {"subject": "broken", "text": "--other\n\nwhat it says\n", "attachments": []},
    ),
    "a boundary that has no end": (
        b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\nfirst\n--b\nContent-Type: image/png\n\nPNG",
        {"text": "first", "attachments": [(None, "image/png", b"PNG")]},
    ),
    "addresses on which the parser of the standard library fails": (
        b"From: @\nTo: <\nCc: \"\nSender: . <x\nMessage-ID: <>'>\nContent-Type: ;\nSubject: hi\n\nbody\n",
        {"subject": "hi", "text": "body\n"},
    ),
    "parts as deep as the parser cannot go": (
        b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(2000)),
        {"subject": None},
    ),
    "a header of 100 KB": (
        b"Subject: long\nX-Long: " + b"word " * 20000 + b"\n\nbody\n",
        {"subject": "long", "text": "body\n"},
    ),
    "a subject of 100 KB": (b"Subject: " + b"x" * 100000 + b"\n\nbody\n", {"subject": "x" * 100000}),
}


class MailTest(unittest.TestCase):
    maxDiff = None

    def receive(self, content: bytes, *recipients: str, helo: str = "EHLO client.example.com") -> Message:
        memory = Memory(multiple_rcptto=True)
        lines = [helo, "MAIL FROM:<a@a.com>", *(f"RCPT TO:<{name}>" for name in recipients or ["b@b.com"]), "DATA"]
        memory.feed("\r\n".join([*lines, ""]).encode() + content.replace(b"\r\n.", b"\r\n..") + b".\r\n")
        (message,) = memory.messages()
        return message

    def test_mails(self) -> None:
        for name, (text, expected) in MAILS.items():
            content = text.replace(b"\n", b"\r\n")
            content += b"" if not content or content.endswith(b"\r\n") else b"\r\n"
            with self.subTest(name):
                message = self.receive(content)
                self.assertEqual(message.content, content)
                self.assertEqual({name: getattr(message, name) for name in expected}, expected)
                self.assertTrue(message.as_bytes().endswith(content))
                self.assertEqual(message.email["Return-Path"], "<a@a.com>")
                json.dumps(message.to_dict()).encode("ascii")

    def test_defects(self) -> None:
        message = self.receive(MAILS["a boundary that never comes"][0].replace(b"\n", b"\r\n"))
        self.assertIn("StartBoundaryNotFoundDefect", [type(defect).__name__ for defect in message.email.defects])
        self.assertIn("StartBoundaryNotFoundDefect", str(message.to_dict()["defects"]))
        deep = self.receive(MAILS["parts as deep as the parser cannot go"][0].replace(b"\n", b"\r\n"))
        self.assertIn("nested too deeply", str(deep.email.defects[-1]))
        self.assertIn("cannot be parsed", str(self.receive(b"From: \r\n :\r\n\r\n").email["From"].defects))

    def test_garbage(self) -> None:
        """Whatever the bytes are, each attribute has a value."""
        rng = random.Random(1)
        pieces = [
            b": ",
            b"=?utf-8?q?=ff?=",
            b"=?",
            b"<",
            b">",
            b"@",
            b'"',
            b";",
            b"\xff",
            b"\0",
            b"=",
            b"*",
            b"%",
            b"/",
            b"(",
        ]
        pieces += [
            b"text/plain",
            b"multipart/mixed",
            b"message/rfc822",
            b"boundary=b",
            b"--b",
            b"--b--",
            b"charset=utf-7",
        ]
        pieces += [
            b"filename*0*=utf-8''%ff",
            b"name=x",
            b"base64",
            b"quoted-printable",
            b"x-uuencode",
            b"begin 6 x",
            b" ",
        ]
        pieces += [
            b"\r\n",
            b"\r\n",
            b"\r\n\r\n",
            b"\r\n ",
            b"attachment",
            b"\r\nContent-Type: ",
            b"\r\nTo: ",
            b"\r\nDate: ",
        ]
        pieces += [
            b"\r\nContent-Disposition: ",
            b"\r\nContent-Transfer-Encoding: ",
            b"\r\nMessage-ID: ",
            b"\r\nSubject: ",
        ]
        for _ in range(400):
            content = b"".join(rng.choices(pieces, k=rng.randrange(1, 40))) + b"\r\n"
            with self.subTest(content), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the standard library, about an encoding
                message = self.receive(content)
                for name in dir(message):
                    getattr(message, name)
                json.dumps(message.to_dict()).encode("ascii")

    def test_trace(self) -> None:
        message = self.receive(b"Subject: hi\r\n\r\nbody\r\n")
        self.assertEqual(
            message.as_bytes().decode().replace("\r\n", "\n"),
            """Return-Path: <a@a.com>
Received: from client.example.com ([192.0.2.1])
\tby smtpmock with ESMTP id 1
\tfor <b@b.com>;
\tSun, 13 Sep 2020 12:26:40 +0000
Subject: hi

body
""",
        )
        self.assertEqual(message.email["Received"].defects, ())
        self.assertEqual(message.received_at, datetime.datetime(2020, 9, 13, 12, 26, 40, 250000, datetime.timezone.utc))
        self.assertEqual((message.id, message.peer, message.esmtp), (1, ("192.0.2.1", 4321), True))

    def test_trace_of_others(self) -> None:
        several = self.receive(b"", "b@b.com", "c@c.com", helo="HELO пример.рф")
        self.assertRegex(several.received_header, r"\AReceived: from \[192.0.2.1\] .*\r\n.* with SMTP id 1;\r\n")
        self.assertFalse(several.esmtp)
        for recipient in ("Postmaster", "дядя@пример.рф"):
            self.assertNotIn("for", self.receive(b"", recipient).received_header)
        memory = Memory()
        memory.session.peer = ("fe80::1%eth0", 25)
        memory.feed("\r\n".join(["HELO a.com", *SEND, ""]).encode())
        self.assertIn("from a.com ([IPv6:fe80::1])\r\n", memory.messages()[0].received_header)

    def test_one_that_is_not_accepted(self) -> None:
        memory = Memory()
        memory.run(b"EHLO a.com\r\nMAIL FROM:<a@a.com>\r\nRCPT TO:nobody\r\n")
        (message,) = memory.messages()
        self.assertEqual((message.received_at, message.received_header), (None, ""))
        self.assertEqual(message.as_bytes(), b"Return-Path: <a@a.com>\r\n")
        self.assertEqual(EMPTY.as_bytes(), b"")

    def test_the_mail_that_was_accepted_is_no_more(self) -> None:
        """In a session of one message, RSET undoes it."""
        memory = Memory()
        memory.feed("\r\n".join(["EHLO a.com", *SEND, "RSET", ""]).encode())
        (message,) = memory.messages()
        self.assertEqual((message.id, message.received_at), (1, None))
        memory.feed("\r\n".join([*SEND, ""]).encode())
        self.assertEqual((memory.messages()[0].id, memory.messages()[0].received_at is None), (2, False))

    def test_ids(self) -> None:
        memory = Memory(multiple_message_receiving=True)
        memory.run("\r\n".join(["EHLO a.com", *SEND, "NOOP", *SEND, "RSET", "MAIL FROM:nobody", ""]).encode())
        self.assertEqual([message.id for message in memory.messages()], [1, 2, 3])

    def test_it_is_computed_once(self) -> None:
        message = self.receive(b"Subject: hi\r\n\r\nbody\r\n")
        self.assertIs(message.email, message.email)
        message.attachments.append(smtpmock.Attachment("mine", "text/plain", b""))
        self.assertEqual(message.attachments, [])
        with self.assertRaisesRegex(AttributeError, "read-only: email"):
            message.email = None  # type: ignore[assignment]

    def test_to_dict(self) -> None:
        memory = Memory()
        memory.feed(b"EHLO \xff\r\n" + b"\r\n".join(line.encode() for line in ["EHLO a.com", *SEND[:3], ""]))
        memory.feed(b"Subject: =?utf-8?q?=E2=82=AC?=\r\n\r\n\xe9\r\n.\r\n")
        (message,) = memory.messages()
        values = json.loads(json.dumps(message.to_dict()))
        for name in [*FIELDS, *DERIVED]:
            if name not in ("as_bytes", "to_dict", "email", "msg_request"):
                self.assertIn(name, values)
        self.assertEqual(values["content_encoding"], "base64")
        self.assertEqual(base64.b64decode(values["content"]), message.content)
        self.assertEqual(values["subject"], "€")
        self.assertEqual(values["received_at"], "2020-09-13T12:26:40.250000+00:00")
        self.assertEqual(values["peer"], ["192.0.2.1", 4321])
        self.assertEqual(values["headers"][-1], ["Subject", "€"])
        self.assertEqual(values["rcptto_request_response"], [["RCPT TO:<b@b.com>", RECEIVED]])
        self.assertEqual(values["transcript"].splitlines()[0], r"C: EHLO \udcff")
        text = self.receive(b"Subject: hi\r\n\r\n\xc3\xa9\r\n").to_dict()
        self.assertEqual((text["content"], text["content_encoding"]), ("Subject: hi\r\n\r\né\r\n", "utf-8"))


class TranscriptTest(unittest.TestCase):
    maxDiff = None

    def test_the_dialogues_are_their_own_transcripts(self) -> None:
        """Where a session has one message, and no body, which would be a line."""
        count = 0
        for name, (options, script) in DIALOGUES.items():
            lines = textwrap.dedent(script).strip().splitlines()
            lines = [line.strip() for line in lines if line.strip()]
            if any(line[0] == "R" or line in ("C: .", f"S: {READY}") or len(line) > 4000 for line in lines):
                continue
            if "multiple_message_receiving" in options:
                continue
            memory = with_rules(Memory, options)
            memory.run(*(what for kind, what in steps(script) if kind == "C"))
            for message in memory.messages():
                count += 1
                with self.subTest(name):
                    self.assertEqual([line.strip() for line in message.transcript.splitlines()], lines)
        self.assertGreater(count, 10)

    def test_a_body_is_one_line(self) -> None:
        memory = Memory()
        memory.run("\r\n".join(["EHLO a.com", *SEND[:3], "hi", "..", ".", "QUIT", ""]).encode())
        transcript = memory.messages()[0].transcript.splitlines()
        self.assertEqual(transcript[-6:], [
            "C: DATA", f"S: {READY}", "C: <8 bytes>", "S: 250 Received", "C: QUIT", "S: 221 Closing connection", "S: <closed>"
        ][-6:])  # fmt: skip

    def test_a_body_that_was_left(self) -> None:
        memory = Memory()
        memory.run("\r\n".join(["EHLO a.com", *SEND[:3], "hi"]).encode())
        self.assertEqual(memory.messages()[0].transcript.splitlines()[-1], "C: <2 bytes>")

    def test_each_mail_of_a_session(self) -> None:
        memory = Memory(multiple_message_receiving=True)
        memory.run("\r\n".join(["NOOP", "EHLO a.com", *SEND, "RSET", "MAIL FROM:nobody", *SEND, "QUIT", ""]).encode())
        first, second = (message.transcript.splitlines() for message in memory.messages())
        self.assertEqual(first[:5], ["S: 220 Welcome", "C: NOOP", "S: 250 Ok", "C: EHLO a.com", "S: 250 Received"])
        self.assertEqual(first[-2:], ["C: RSET", "S: 250 Ok"])
        start = ["S: 220 Welcome", "C: EHLO a.com", "S: 250 Received", "C: MAIL FROM:nobody"]
        self.assertEqual((second[:4], second[-1]), (start, "S: <closed>"))

    def test_what_was_handed_out_does_not_grow(self) -> None:
        memory = Memory()
        memory.feed("\r\n".join(["EHLO a.com", *SEND, ""]).encode())
        (message,) = memory.messages()
        memory.feed(b"NOOP\r\n")
        self.assertEqual(message.transcript.splitlines()[-1], "S: 250 Received")
        self.assertEqual(memory.messages()[0].transcript.splitlines()[-1], "S: 250 Ok")

    def test_an_endless_session_is_not_kept(self) -> None:
        memory = Memory()
        for _ in range(30):
            memory.feed(b"NOOP\r\n" * 1000)
        self.assertLess(len(memory.session.dialogue), 30000)

    def test_farewells(self) -> None:
        with Server(session_timeout=0.05) as server, Client(server) as client:
            client.ask("NOOP")
            while client.read() != "<closed>":
                pass
            (message,) = server.wait_for_messages(1, TIMEOUT)
            self.assertEqual(
                message.transcript.splitlines()[-2:], ["S: 421 Session timeout, closing connection", "S: <closed>"]
            )
        with Server() as server, Client(server) as client:
            client.read()
            client.ask("EHLO a.com", *SEND)
            server.stop()
        end = ["S: 250 Received", "S: 421 Server shutting down, closing connection", "S: <closed>"]
        self.assertEqual(server.messages()[0].transcript.splitlines()[-3:], end)
        self.assertTrue(server.messages()[0].is_consistent)


# ----------------------------------------------------------------------------------------- grammar

GOOD_DOMAINS = """example.com EXAMPLE.COM a-b.example.com a--b.com 1.example.com 3f2a9c1b7d4e.com x.co localhost
    myhost skMac2-5 3f2a9c1b7d4e a пример.рф उदाहरण.भारत example.xn--p1ai xn--80ak6aa92e.com 1.2.3.4 [1.2.3.4]
    [IPv6:::1] [ipv6:2001:db8::1] [IPv6:::ffff:1.2.3.4]"""
BAD_DOMAINS = """999.999.999.999 256.1.1.1 1.2.3 [999.1.1.1] 1.2.3.4] [1.2.3.4 [::1] [IPv6:zz] [IPv6:1.2.3.4] name.zone42
    example.c a..com .com a. -a.com a-.com a.-b.com user@host.com 42 4-2 - a_b.com [] [example.com] example.com.
    a.com/b"""
GOOD_ADDRESSES = """user@example.com <user@example.com> user+tag@example.com <o'brien@example.com> a@localhost <a@LocalHost>
    user.name+tag!#$%@example.com user/dept=x@example.com <user@[1.2.3.4]> <user@[IPv6:::1]> "a"@x.com <"a>b@c\\""@x.com>
    <user@пример.рф> дядя@пример.рф a@xn--80ak6aa92e.com {a}@x.com"""
BAD_ADDRESSES = """user @ user@ @example.com user@invalid a@a.com@b.com user@example..com <user@example.com user@example.com>
    <<a@x.com>> a@x.com>> <a@x.com>> <a@x.com>x <a@x.com>,<b@x.com> a..b@x.com .a@x.com a.@x.com "a@x.com a"@x.com
    user@exa_mple.com a@[1.2.3] a@[x@y] a@[IPv6:x] a@1.2.3.4 a@x.com. a(b)@x.com <> < ><a@x.com> <@a.com:b@x.com> a@-x.com"""


class GrammarTest(unittest.TestCase):
    def test_domains(self) -> None:
        for domain in GOOD_DOMAINS.split():
            self.assertEqual(smtpmock._parse_domain(domain), domain)
        for domain in ["", "a b", "a.com\n", "a\x00.com", "a.c\udcffm", "a\u3000b.com", *BAD_DOMAINS.split()]:
            self.assertIsNone(smtpmock._parse_domain(domain), domain)

    def test_addresses(self) -> None:
        for address in GOOD_ADDRESSES.split():
            self.assertEqual(smtpmock._parse_path(address), re.sub("^<(.*)>$", r"\1", address))
        for address in [
            "",
            "a b@x.com",
            "a@x.com\n",
            "a@x.com x",
            "<a@x.com> x",
            "a\x00@x.com",
            *BAD_ADDRESSES.split(),
        ]:
            self.assertIsNone(smtpmock._parse_path(address), address)

    def test_addresses_with_white_space(self) -> None:
        for address in ("John Doe <john@x.com>", "J. Doe<john@x.com>", " <john@x.com>", "Дядя <john@x.com>"):
            self.assertEqual(smtpmock._parse_path(address), "john@x.com")
        self.assertEqual(smtpmock._parse_path('<"John Doe"@x.com>'), '"John Doe"@x.com')
        for address in ('"John Doe" <john@x.com>', "john@y.com <john@x.com>", "< john@x.com>", "John <john@x.com> Doe"):
            self.assertIsNone(smtpmock._parse_path(address), address)

    def test_the_addresses_that_one_command_takes(self) -> None:
        self.assertEqual(smtpmock._parse_sender("<>"), "")
        self.assertIsNone(smtpmock._parse_recipient("<>"))
        self.assertEqual(smtpmock._parse_recipient("<PostMaster>"), "PostMaster")
        self.assertIsNone(smtpmock._parse_recipient("PostMaster"))
        self.assertIsNone(smtpmock._parse_sender("<PostMaster>"))

    def test_commands(self) -> None:
        for line, expected in {
            b"": ("", "", ""),
            b" NOOP \r": ("NOOP", "NOOP", ""),
            b"Ehlo\ta.com": ("Ehlo\ta.com", "EHLO", "a.com"),
            b"mail from:<a b>": ("mail from:<a b>", "MAIL", "from:<a b>"),
            "vrfy é".encode(): ("vrfy é", "VRFY", "é"),
            b"\xff \xfe": ("\udcff \udcfe", "", "\udcfe"),
        }.items():
            self.assertEqual(smtpmock._parse_command(line), expected)

    # The parser, and what of a line stands before the text that is repeated, that text, and what stands after it.
    HOSTILE: Sequence[tuple[Any, str, str, str]] = [
        (smtpmock._parse_domain, "", "a", "_"),
        (smtpmock._parse_domain, "", "a-", ""),
        (smtpmock._parse_domain, "", "a.", ""),
        (smtpmock._parse_domain, "", "a.b-", "!"),
        (smtpmock._parse_domain, "", "1", ""),
        (smtpmock._parse_domain, "", "1-", "."),
        (smtpmock._parse_domain, "", "xn--a.", "1"),
        (smtpmock._parse_domain, "[", "1.", ""),
        (smtpmock._parse_domain, "[IPv6:", ":", "]"),
        (smtpmock._parse_path, "", "a ", ""),
        (smtpmock._parse_path, "", "a", ""),
        (smtpmock._parse_path, "", "a.", ""),
        (smtpmock._parse_path, "", "a", "@"),
        (smtpmock._parse_path, "", "a@", ""),
        (smtpmock._parse_path, "", "<", ""),
        (smtpmock._parse_path, "a <", "a.", "@x.com"),
        (smtpmock._parse_path, "", " ", "<a@x.com"),
        (smtpmock._parse_path, "", "a ", "<a@x.com> b"),
        (smtpmock._parse_path, "<a@", "a-", ">"),
        (smtpmock._parse_path, "<a@", "a.", "com!>"),
        (smtpmock._parse_path, '"', "\\\\", ""),
        (smtpmock._parse_path, "", '"', "@x.com"),
        (smtpmock._parse_path, '"', "a", '"@x'),
        (smtpmock._parse_path, "a@[", "1.", ""),
        (lambda text: smtpmock._parse_command(text.encode()), "", " \t", "\r"),
        (lambda text: smtpmock._parse_command(text.encode()), "a", " ", "b"),
    ]

    def test_hostile_lines_cost_what_their_length_does(self) -> None:
        """For 4 times the text, a quadratic pattern would take 16 times as long."""

        def measure(parse: Any, text: str) -> float:
            def once() -> float:
                began = time.thread_time()
                parse(text)
                return time.thread_time() - began

            return min(once() for _ in range(5))

        for parse, before, unit, after in self.HOSTILE:
            with self.subTest(before + unit * 3 + after):
                small, large = (before + unit * (size // len(unit)) + after for size in (25_000, 100_000))
                self.assertLess(measure(parse, large), 9 * measure(parse, small) + 1e-4)


# ----------------------------------------------------------------------------------- configuration


class ConfigurationTest(unittest.TestCase):
    def assert_refused(self, pattern: str, **options: Any) -> None:
        for make in (Configuration, Server):
            with self.subTest(options), self.assertRaisesRegex(ConfigurationError, pattern):
                make(**options)

    def test_defaults(self) -> None:
        options = Configuration()
        self.assertEqual((options.host, options.port), ("127.0.0.1", 0))
        self.assertEqual((options.session_timeout, options.shutdown_timeout), (30, 1))
        self.assertEqual(options.msg_size_limit, 10485760)

    def test_unknown_names(self) -> None:
        self.assert_refused(r"^prot=25: there is no such option; did you mean port\?$", prot=25)
        self.assert_refused(r"did you mean multiple_rcptto\?$", multiple_rcpto=True)
        self.assert_refused(r"^qqqqqqqq=None: there is no such option$", qqqqqqqq=None)

    def test_bad_values(self) -> None:
        self.assert_refused(r"^port=65536: must be an integer from 0 to 65535$", port=65536)
        self.assert_refused(r"^port=-1: ", port=-1)
        self.assert_refused(r"^port='25': ", port="25")
        self.assert_refused(r"^port=True: ", port=True)
        self.assert_refused(r"^port=25.0: ", port=25.0)
        self.assert_refused(r"^host=None: must be a string$", host=None)
        self.assert_refused(r"^fail_fast=1: must be true or false$", fail_fast=1)
        self.assert_refused(r"^msg_greeting=b'x': must be a string$", msg_greeting=b"x")
        self.assert_refused(r"^msg_size_limit=-1: must be an integer from 0 up$", msg_size_limit=-1)
        self.assert_refused(
            r"^session_timeout=0: must be a number of seconds from 0.001 to 1000000$", session_timeout=0
        )
        self.assert_refused(r"^response_delay_quit=-1: must be a number of seconds from 0 to", response_delay_quit=-1)
        self.assert_refused(r"^shutdown_timeout=nan: ", shutdown_timeout=float("nan"))
        self.assert_refused(r"^shutdown_timeout=inf: ", shutdown_timeout=float("inf"))
        self.assert_refused(r"^shutdown_timeout=None: ", shutdown_timeout=None)
        self.assert_refused(r"^not_registered_emails='a@a.com': must be a list", not_registered_emails="a@a.com")
        self.assert_refused(r"^not_registered_emails=\[1\]: must be a list of strings$", not_registered_emails=[1])
        self.assert_refused(r"^not_registered_emails=5: ", not_registered_emails=5)

    def test_of_a_server(self) -> None:
        with self.assertRaisesRegex(ConfigurationError, "^configuration='x': must be a Configuration$"):
            Server("x")  # type: ignore[arg-type]
        with self.assertRaisesRegex(ConfigurationError, r"^logger=.*must have a method info\(\)$"):
            Server(logger=object())
        server = Server(Configuration(port=2525, host="::1"), host="[::]")
        self.assertEqual((server.host, server.port), ("[::]", 2525))

    def test_errors_are_what_they_resemble(self) -> None:
        for error, builtin in {
            ConfigurationError: ValueError,
            ServerStateError: RuntimeError,
            ServerStartError: OSError,
            WaitTimeoutError: TimeoutError,
        }.items():
            self.assertTrue(issubclass(error, builtin))
            self.assertTrue(issubclass(error, smtpmock.SMTPMockError))

    def test_it_cannot_be_changed(self) -> None:
        names = ["a@a.com"]
        options = Configuration(not_registered_emails=names)
        names.append("b@a.com")
        self.assertEqual(set(options.not_registered_emails), {"a@a.com"})
        with self.assertRaises(dataclasses.FrozenInstanceError):
            options.port = 1  # type: ignore[misc]


# --------------------------------------------------------------------------------- waiting, purging


class WaitingTest(unittest.TestCase):
    def send(self, server: Server, count: int, subject: str = "hi") -> None:
        with smtplib.SMTP(server.host, server.port, timeout=TIMEOUT) as client:
            for _ in range(count):
                client.sendmail("a@a.com", ["b@b.com"], f"Subject: {subject}\r\n\r\nbody".encode())

    def test_there_are_enough(self) -> None:
        with Server(multiple_message_receiving=True) as server:
            self.assertEqual(server.wait_for_messages(0, 0), [])
            self.send(server, 3)
            self.assertEqual(len(server.wait_for_messages(2, 0)), 3)
            self.assertEqual(len(server.wait_for_messages_and_purge(3, 0)), 3)
            self.assertEqual(server.messages(), [])

    def test_woken_by_the_message(self) -> None:
        with Server() as server:
            waiters = [lambda: len(server.wait_for_messages(1, TIMEOUT))] * 3
            self.assertEqual(in_threads(*waiters, lambda: self.send(server, 1)), [1, 1, 1, None])

    def test_too_few(self) -> None:
        for wait in ("wait_for_messages", "wait_for_messages_and_purge"):
            with self.subTest(wait), Server() as server, Client(server) as client:
                self.send(server, 1)
                self.assertEqual(client.read(), "220 Welcome")
                with self.assertRaises(WaitTimeoutError) as caught:
                    getattr(server, wait)(2, 0.01)
                pattern = r"^1 of 2 messages came in 0.01 seconds\n  1 are recorded:"
                self.assertRegex(str(caught.exception), pattern)
                self.assertEqual(caught.exception.messages, server.messages())
                self.assertEqual(len(server.messages()), 1)

    def test_bad_arguments(self) -> None:
        server = Server()
        for arguments, pattern in {
            (-1,): "^count=-1: must be an integer from 0 up$",
            (1.5,): "^count=1.5: ",
            (1, -1): "^timeout=-1: must be a number of seconds from 0 to 1000000$",
            (1, None): "^timeout=None: ",
        }.items():
            for wait in (server.wait_for_messages, server.wait_for_messages_and_purge):
                with self.subTest(arguments=arguments), self.assertRaisesRegex(ConfigurationError, pattern):
                    wait(*arguments)  # type: ignore[arg-type]
        with self.assertRaisesRegex(ConfigurationError, "^where='x': must be callable$"):
            server.wait_for_messages(1, 1, where="x")  # type: ignore[arg-type]

    def test_where(self) -> None:
        with Server(multiple_message_receiving=True) as server:
            for subject in ("one", "two", "one", "two"):
                self.send(server, 1, subject)
            found = server.wait_for_messages(1, 0, where=lambda message: message.subject == "two")
            self.assertEqual([message.id for message in found], [2, 4])
            found = server.wait_for_messages_and_purge(2, 0, lambda message: message.subject == "one")
            self.assertEqual([message.id for message in found], [1, 3])
            self.assertEqual([message.id for message in server.messages()], [2, 4])
            with self.assertRaises(WaitTimeoutError) as caught:
                server.wait_for_messages_and_purge(2, 0.01, lambda message: message.id == 4)
            self.assertEqual([message.id for message in caught.exception.messages], [4])
            self.assertEqual([message.id for message in server.messages()], [2, 4])

    def test_where_raises(self) -> None:
        with Server(multiple_message_receiving=True) as server:
            self.send(server, 2)
            for wait in (server.wait_for_messages, server.wait_for_messages_and_purge):
                with self.assertRaises(ZeroDivisionError):
                    wait(2, TIMEOUT, lambda message: message.id == 1 or 1 / 0)
            self.assertEqual(len(server.messages()), 2)
            self.assertEqual(server._mailbox._watches, [])

    def test_where_may_do_what_it_likes(self) -> None:
        """It is called without a lock: it can send mail, or ask the server in another thread."""
        with Server(multiple_message_receiving=True) as server:
            self.send(server, 1)
            asked = iter([1])

            def where(message: Message) -> bool:
                for _ in asked:
                    self.send(server, 1, "from within")
                return bool(in_threads(lambda: message in server.messages())[0])

            self.assertEqual(len(server.wait_for_messages(2, TIMEOUT, where)), 2)

    def test_where_while_clients_send(self) -> None:
        """The first that matches, and each message is looked at as it comes, and when it changes."""
        with Server(multiple_message_receiving=True) as server:
            seen: list[str] = []

            def where(message: Message) -> bool:
                seen.append(message.rcpt_tos[0])
                return message.rcpt_tos == ["7-3@b.com"]

            def send(number: int) -> None:
                with smtplib.SMTP(server.host, server.port, timeout=TIMEOUT) as client:
                    for count in range(20):
                        client.sendmail("a@a.com", [f"{number}-{count}@b.com"], "hi")

            senders = [lambda number=number: send(number) for number in range(16)]
            results = in_threads(lambda: server.wait_for_messages(1, TIMEOUT, where), *senders)
            self.assertEqual([message.rcpt_tos for message in results[0]], [["7-3@b.com"]])
            self.assertEqual(len(server.messages()), 320)
            self.assertLessEqual(len(seen), 2 * 320)

    def test_where_of_a_message_that_changes(self) -> None:
        with Server() as server, smtplib.SMTP(server.host, server.port, timeout=TIMEOUT) as client:
            client.sendmail("a@a.com", ["b@b.com"], "hi")
            with self.assertRaises(WaitTimeoutError):
                server.wait_for_messages(1, 0, lambda message: message.quit_sent)
            waiter = lambda: len(server.wait_for_messages(1, TIMEOUT, lambda message: message.quit_sent))  # noqa: E731
            self.assertEqual(in_threads(waiter, client.quit)[0], 1)

    def test_a_waiter_is_woken_when_there_can_be_enough(self) -> None:
        with Server(multiple_message_receiving=True) as server:
            wakings = []
            judge = smtpmock._Watch.judge

            def counting(watch: smtpmock._Watch, *arguments: Any) -> None:
                wakings.append(len(arguments[0]))
                judge(watch, *arguments)

            with mock.patch.object(smtpmock._Watch, "judge", counting):
                in_threads(lambda: server.wait_for_messages(300, TIMEOUT), *[lambda: self.send(server, 100)] * 3)
            self.assertLessEqual(len(wakings), 2)
            self.assertEqual(sum(wakings), 300)

    def test_what_is_purged_while_one_waits_does_not_count(self) -> None:
        with Server(multiple_message_receiving=True) as server:
            self.send(server, 1)
            purged = threading.Event()

            def where(message: Message) -> bool:
                if not purged.is_set():
                    server.messages_and_purge()
                    purged.set()
                return True

            def send() -> None:
                purged.wait(TIMEOUT)
                self.send(server, 2)

            results = in_threads(
                lambda: server.wait_for_messages(2, TIMEOUT, where),
                send,
            )
            self.assertEqual([message.id for message in results[0]], [2, 3])

    def test_a_timeout_says_what_there_is(self) -> None:
        with Server(multiple_message_receiving=True) as server, Client(server) as client:
            self.send(server, 12, "Grüße")
            client.read()
            client.ask("HELO a.com", "MAIL FROM:<a@a.com>")
            with self.assertRaises(WaitTimeoutError) as caught:
                server.wait_for_messages(2, 0.01, lambda message: message.id == 1)
            lines = str(caught.exception).splitlines()
            self.assertEqual(
                lines[:3], ["1 of 2 matching messages came in 0.01 seconds", "  12 are recorded:", "    ..."]
            )
            recorded = "    <Message 12 from 'a@a.com' to ['b@b.com']: 64 bytes, accepted>, subject 'Grüße'"
            self.assertIn(
                re.sub(r"\d+ bytes", "N bytes", recorded), re.sub(r"\d+ bytes", "N bytes", str(caught.exception))
            )
            port = client.socket.getsockname()[1]
            self.assertEqual(lines[-1], f"    127.0.0.1:{port}: C: MAIL FROM:<a@a.com> / S: 250 Received")
        with self.assertRaises(WaitTimeoutError) as caught:
            Server().wait_for_messages(1, 0)
        self.assertEqual(str(caught.exception).splitlines()[1:], ["  0 are recorded", "  0 sessions are open"])

    def test_reset(self) -> None:
        with Server() as server:
            self.send(server, 1)
            server.reset()
            self.assertEqual(server.messages(), [])
            self.send(server, 1)
            self.assertEqual([message.id for message in server.messages()], [2])

    def test_purging_while_clients_send(self) -> None:
        """Every message is handed out once, whatever purges it."""
        with Server(multiple_message_receiving=True) as server:
            found: list[Message] = []
            done = threading.Event()

            def purge() -> None:
                while not done.is_set():
                    found.extend(server.messages_and_purge())

            def wait() -> None:
                while not done.is_set():
                    with contextlib.suppress(WaitTimeoutError):
                        found.extend(server.wait_for_messages_and_purge(2, 0.001))

            purgers = [threading.Thread(target=purge), threading.Thread(target=wait)]
            for thread in purgers:
                thread.start()
            in_threads(*[lambda: self.send(server, 50)] * 64)
            done.set()
            for thread in purgers:
                thread.join(TIMEOUT)
            found += server.messages_and_purge()
            self.assertEqual(len(found), 3200)
            self.assertEqual(len(set(map(id, found))), 3200)


class OnMessageTest(unittest.TestCase):
    def converse(self, server: Server) -> list[str]:
        with Client(server) as client:
            client.read()
            return client.ask("EHLO a.com", *SEND)[-1:] + client.ask("QUIT")

    def test_called_before_the_reply(self) -> None:
        seen: list[Message] = []
        called, go_on = threading.Event(), threading.Event()

        def on_message(message: Message) -> None:
            seen.append(message)
            called.set()
            go_on.wait(TIMEOUT)

        with Server(on_message=on_message) as server, Client(server) as client:
            client.read()
            client.ask("EHLO a.com", *SEND[:3])
            client.send(b"hi\r\n.\r\n")
            self.assertTrue(called.wait(TIMEOUT))
            client.socket.settimeout(0.05)
            self.assertRaises(TimeoutError, client.socket.recv, 100)
            self.assertEqual(server.messages(), [])
            client.socket.settimeout(TIMEOUT)
            go_on.set()
            self.assertEqual(client.socket.recv(100), b"250 Received\r\n")
            self.assertEqual(server.messages(), seen)
        self.assertTrue(seen[0].is_consistent)
        self.assertEqual((seen[0].id, seen[0].peer[0], seen[0].received_at is None), (1, "127.0.0.1", False))
        self.assertEqual(seen[0].transcript.splitlines()[-1], "S: 250 Received")

    def test_if_it_raises(self) -> None:
        for error in (ValueError("no"), SystemExit()):
            recorder = Recorder()
            with Server(on_message=mock.Mock(side_effect=[error, None]), logger=recorder) as server:
                self.assertEqual(self.converse(server), ["451 Local error in processing", "221 Closing connection"])
                level, text = recorder.wait_for("on_message failed: Traceback")
                self.assertEqual(level, "error")
                self.assertIn(f"{type(error).__name__}", text)
                self.assertEqual(self.converse(server)[0], "250 Received")
                refused, accepted = server.messages()
            self.assertEqual((refused.msg, refused.msg_response), (False, "451 Local error in processing"))
            self.assertEqual((refused.is_consistent, refused.received_at, refused.content), (False, None, b"hi\r\n"))
            self.assertIn("C: <4 bytes>\nS: 451 Local error in processing\nC: QUIT", refused.transcript)
            self.assertTrue(accepted.is_consistent)

    def test_a_refused_mail_is_not_handed_out_as_accepted(self) -> None:
        others: list[Message] = []
        memory = Memory(on_message=lambda message: 1 / 0)
        memory.session._setup = memory.session._setup._replace(on_other=others.append)
        memory.feed("\r\n".join(["EHLO a.com", *SEND, ""]).encode())
        memory.session.end("421 bye")
        memory.session.end()
        self.assertEqual(memory.messages(), others)
        self.assertEqual([message.msg for message in memory.messages()], [False])

    def test_only_accepted_messages(self) -> None:
        seen: list[Message] = []
        with Server(on_message=seen.append, msg_size_limit=1) as server:
            self.assertEqual(self.converse(server)[0], "552 Message exceeded max size of 1 bytes")
        self.assertEqual((seen, len(server.messages())), ([], 1))

    def test_each_mail_of_a_session(self) -> None:
        for multiple in (True, False):
            seen: list[Message] = []
            with (
                Server(on_message=seen.append, multiple_message_receiving=multiple) as server,
                Client(server) as client,
            ):
                client.read()
                client.ask("EHLO a.com", *SEND, *SEND)
            self.assertEqual([message.id for message in seen], [1, 2])

    def test_it_must_be_callable(self) -> None:
        with self.assertRaisesRegex(ConfigurationError, "^on_message=1: must be callable$"):
            Server(on_message=1)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- rules


class RuleTest(unittest.TestCase):
    """What the dialogues do not show."""

    def memory(self, **options: Any) -> Memory:
        memory = Memory(**options)
        memory.feed(b"EHLO a.com\r\n")
        return memory

    def ask(self, memory: Memory, *lines: str) -> list[str]:
        return [reply.text for line in lines for reply in memory.feed(line.encode() + b"\r\n")]

    def test_hits_and_remove(self) -> None:
        with Server() as server, Client(server) as client:
            client.read()
            rule = server.on("NOOP").reply("450 no", times=3)
            other = server.on("RSET").drop()
            self.assertEqual(client.ask("NOOP", "NOOP"), ["450 no"] * 2)
            self.assertEqual((rule.hits, other.hits), (2, 0))
            rule.remove()
            rule.remove()
            self.assertEqual(client.ask("NOOP"), ["250 Ok"])
            self.assertEqual(rule.hits, 2)
            self.assertEqual(repr(rule), "<Rule for NOOP: 2 hits>")
            self.assertEqual(repr(server.on("rcpt to:", "B@C.com")), "<Rule for RCPT B@c.com: 0 hits>")

    def test_clear_and_reset(self) -> None:
        for clear in (Server.clear_rules, Server.reset):
            with Server() as server, Client(server) as client:
                client.read()
                server.on("*").reply("450 no")
                client.ask("NOOP")
                clear(server)
                self.assertEqual(client.ask("NOOP"), ["250 Ok"])

    def test_rules_outlive_a_stop(self) -> None:
        server = Server()
        server.on("connect").reply("220 Moin")
        for _ in range(2):
            with server, Client(server) as client:
                self.assertEqual(client.read(), "220 Moin")

    def test_without_an_action_it_does_nothing(self) -> None:
        memory = self.memory()
        memory.on("NOOP")
        self.assertEqual(self.ask(memory, "NOOP"), ["250 Ok"])

    def test_a_second_action_takes_the_place_of_the_first(self) -> None:
        memory = self.memory()
        rule = memory.on("NOOP").reply("450 one")
        memory.on("NOOP").reply("450 two")
        self.assertEqual(self.ask(memory, "NOOP"), ["450 two"])
        rule.reply("450 three")
        self.assertEqual(self.ask(memory, "NOOP"), ["450 three"])
        self.assertEqual(len(memory.rules.newest_first), 2)

    def test_the_function_of_the_line(self) -> None:
        memory = self.memory()
        seen: list[str] = []

        def has(word: str) -> Any:
            return lambda line: [seen.append(line), word in line][1]  # type: ignore[func-returns-value]

        memory.on("MAIL", has("SIZE")).reply("552 no")
        memory.on("message", has("virus")).reply("554 virus")
        self.ask(memory, "MAIL FROM:<SIZE@a.com>", "mail from:<a@a.com>", "RCPT TO:<b@b.com>", "DATA")
        self.assertEqual(self.ask(memory, "a virus\r\n."), ["554 virus"])
        self.assertEqual(seen, ["MAIL FROM:<SIZE@a.com>", "mail from:<a@a.com>", "a virus\r\n"])

    def test_the_recipients_of_a_mail(self) -> None:
        for stage in ("DATA", "message"):
            memory = self.memory(multiple_rcptto=True)
            memory.on(stage, "c@c.com").reply("450 c")
            self.ask(memory, "MAIL FROM:<c@c.com>", "RCPT TO:<b@b.com>")
            self.assertNotIn("450 c", self.ask(memory, "DATA\r\n."))
            self.ask(memory, "RCPT TO:<c@c.com>")
            self.assertIn("450 c", self.ask(memory, "DATA\r\n."))

    def test_recorded(self) -> None:
        """A refusal is recorded, and nothing of it takes effect; what took effect is recorded, too."""
        seen: list[Message] = []
        with Server(on_message=seen.append) as server, Client(server) as client:
            server.on("message").reply("451 try later", None)
            server.on("RCPT").reply("250 welcome")
            client.read()
            client.ask("EHLO a.com", "MAIL FROM:<a@a.com>", "RCPT TO:<no body>", *SEND[2:], "NOOP")
            client.ask("QUIT")
            self.assertEqual(seen, [])
            (message,) = server.messages()
            self.assertEqual(
                (message.msg, message.msg_response, message.is_consistent), (False, "451 try later", False)
            )
            self.assertEqual((message.rcpt_tos, message.content), (["<no body>"], b"hi\r\n"))
            self.assertEqual(message.rcptto_request_response, [("RCPT TO:<no body>", "250 welcome")])

    def test_a_close_after_the_mail_was_taken(self) -> None:
        seen: list[Message] = []
        with Server(on_message=seen.append) as server, Client(server) as client:
            server.on("message").reply("250 got it", close=True)
            client.read()
            self.assertEqual([*client.ask("EHLO a.com", *SEND)[-1:], client.read()], ["250 got it", "<closed>"])
            (message,) = server.messages()
            self.assertTrue(message.is_consistent)
            self.assertEqual([message.id for message in seen], [message.id])
            self.assertTrue(message.transcript.endswith("S: 250 got it\nS: <closed>"))

    def test_functions(self) -> None:
        memory = self.memory()
        answers = iter([None, "450 later", smtpmock.Action("299 fine", delay=0.5), smtpmock.Action(then="reset"), 1])
        seen: list[tuple[str, bool]] = []

        @memory.on("MAIL")
        def quota(request: str, message: Message) -> Any:
            seen.append((request, message.helo))
            return next(answers)

        replies = [reply for _ in range(3) for reply in memory.feed(b"MAIL FROM:<a@a.com>\r\n")]
        self.assertEqual([reply.text for reply in replies], ["250 Received", "450 later", "299 fine"])
        self.assertEqual([reply.delay for reply in replies], [0, 0, 0.5])
        self.assertEqual(seen, [("MAIL FROM:<a@a.com>", True)] * 3)
        self.assertEqual(quota.hits, 3)
        (reset,) = memory.feed(b"MAIL FROM:<a@a.com>\r\n")
        self.assertEqual((reset.data, reset.after), (b"", smtpmock._After.RESET))
        with self.assertRaisesRegex(TypeError, "a rule returned 1: must be None, a reply or an Action"):
            memory.rules.decide("MAIL", None, "", [], lambda: EMPTY)

    def test_functions_that_raise(self) -> None:
        def fail(*_: object) -> Any:
            raise KeyError("mine")

        makes: list[Any] = [lambda server: server.on("MAIL")(fail), lambda server: server.on("MAIL", fail).drop()]
        for make in makes:
            recorder = Recorder()
            with Server(logger=recorder) as server, Client(server) as client:
                make(server)
                client.read()
                self.assertEqual(client.ask("HELO a.com", "MAIL FROM:<a@a.com>")[-1], "451 Local error in processing")
                self.assertRegex(
                    recorder.wait_for("Traceback")[1], r"(?s)a rule failed: .* in fail\n.*KeyError: 'mine'"
                )
                server.clear_rules()
                self.assertEqual(client.ask("MAIL FROM:<a@a.com>"), [RECEIVED])
            self.assertEqual(server.messages()[0].mailfrom_response, RECEIVED)

    def test_the_very_bytes(self) -> None:
        with Server() as server, Client(server) as client:
            server.on("NOOP").raw(b"\xff\x00 garbage\n\r")
            client.read()
            client.send(b"NOOP\r\nQUIT\r\n")
            data = b"".join(iter(lambda: client.socket.recv(100), b""))
            self.assertEqual(data, b"\xff\x00 garbage\n\r221 Closing connection\r\n")

    def test_a_fin_and_a_reset(self) -> None:
        """As the system reports them, with nothing and with much still unread on the server's side."""
        for action, unread in itertools.product(("drop", "reset"), (b"", b"y" * 500_000)):
            with self.subTest(action, unread=len(unread)), Server() as server, Client(server) as client:
                rule = getattr(server.on("message"), action)(after=4096)
                client.read()
                client.ask("EHLO a.com", *SEND[:3])
                client.send(b"x" * 4096)
                ends = []
                try:
                    if unread:  # even an empty send would take the error away from the read
                        client.send(unread)
                except ConnectionError:  # in the middle of it
                    ends.append("<reset>")
                ends.append(client.read())
                if action == "reset":
                    self.assertEqual(ends[0], "<reset>")
                elif not unread:
                    self.assertEqual(ends, ["<closed>"])
                (message,) = server.wait_for_messages(1, TIMEOUT)
                self.assertEqual((message.content, message.msg, rule.hits), (b"x" * 4096, False, 1))
                end = "<closed>" if action == "drop" else "<reset>"
                self.assertTrue(message.transcript.endswith(f"C: <4096 bytes>\nS: {end}"))

    def test_one_byte_at_a_time(self) -> None:
        with Server(msg_greeting="") as server:
            server.on("*").trickle(0.5)
            with Client(server) as client:
                self.assertEqual([client.socket.recv(100), client.socket.recv(100)], [b"\r", b"\n"])

    def test_a_trickle_takes_its_time(self) -> None:
        with Server() as server:
            server.on("connect").trickle(0.02)
            began = time.monotonic()
            with Client(server) as client:
                client.read()
            self.assertGreaterEqual(time.monotonic() - began, 12 * 0.02)

    def test_a_delay_takes_its_time(self) -> None:
        with Server(response_delay_noop=10 * TIMEOUT) as server, Client(server) as client:
            server.on("NOOP").delay(0.05)
            client.read()
            began = time.monotonic()
            self.assertEqual(client.ask("NOOP"), ["250 Ok"])
            self.assertGreaterEqual(time.monotonic() - began, 0.05)

    def test_a_delay_changes_nothing_else(self) -> None:
        """A text of the options accepts without a code, too."""
        memory = self.memory(msg_mailfrom_received="nonsense")
        memory.on("MAIL").delay(0.5)
        self.assertEqual(self.ask(memory, *SEND[:2]), ["nonsense", RECEIVED])

    def test_times_are_exact(self) -> None:
        with Server() as server:
            rule = server.on("NOOP").reply("450 no", times=100)

            def count() -> int:
                with Client(server) as client:
                    client.read()
                    return client.ask(*["NOOP"] * 20).count("450 no")

            self.assertEqual(sum(in_threads(*[count] * 32)), 100)
            self.assertEqual(rule.hits, 100)

    def test_chance(self) -> None:
        def refusals(seed: int | None, others: int = 0) -> list[int]:
            memory = self.memory(seed=seed)
            memory.on("NOOP").reply("450 no", probability=0.3)
            if others:
                memory.on("RSET").reply("450 no", probability=0.5)
                self.ask(memory, *["RSET"] * others)
            replies = self.ask(memory, *["NOOP"] * 1000)
            return [index for index, reply in enumerate(replies) if reply == "450 no"]

        self.assertEqual(refusals(7), refusals(7, others=5))
        self.assertNotEqual(refusals(7), refusals(8))
        self.assertNotEqual(refusals(None), refusals(None))
        self.assertTrue(200 < len(refusals(7)) < 400)
        memory = self.memory(seed=7)
        for verb in ("NOOP", "RSET"):
            memory.on(verb).reply("450 no", probability=0.5)
        self.assertNotEqual(self.ask(memory, *["NOOP"] * 100), self.ask(memory, *["RSET"] * 100))
        memory = self.memory()
        never, always = memory.on("NOOP").drop(probability=0), memory.on("RSET").reply("450 no", probability=1)
        self.assertEqual(self.ask(memory, *["NOOP"] * 100), ["250 Ok"] * 100)
        self.assertEqual((never.hits, self.ask(memory, "RSET"), always.hits), (0, ["450 no"], 1))

    def test_a_reset_begins_the_same_chances_again(self) -> None:
        server = Server(seed=3)

        def refusals() -> list[str]:
            server.reset()
            server.on("NOOP").reply("450 no", probability=0.5)
            with Client(server) as client:
                client.read()
                return client.ask(*["NOOP"] * 50)

        with server:
            self.assertEqual(refusals(), refusals())

    def test_stop_keeps_its_promise(self) -> None:
        for action, forced in (("silence", False), ("trickle", True), ("delay", True)):
            with self.subTest(action):
                recorder = Recorder()
                server = Server(shutdown_timeout=0.05 if forced else 10 * TIMEOUT, logger=recorder).start()
                getattr(server.on("NOOP"), action)(*([10 * TIMEOUT] if forced else []))
                with contextlib.ExitStack() as stack:
                    clients = [stack.enter_context(Client(server)) for _ in range(10)]
                    for client in clients:
                        client.read()
                        client.send(b"NOOP\r\n")
                    for _ in clients:
                        recorder.wait_for("SMTP request: NOOP")
                    began = time.monotonic()
                    server.stop()
                    self.assertLess(time.monotonic() - began, TIMEOUT)
                    self.assertEqual(
                        [client.read() for client in clients], ["2" if action == "trickle" else "<closed>"] * 10
                    )
                self.assertIn(
                    "force stopped" if forced else "successfully", recorder.wait_for("SMTP mock server was")[1]
                )
                self.assertEqual(len(server.messages()), 10)

    def test_silence_ends_with_the_session_timeout(self) -> None:
        recorder = Recorder()
        with Server(session_timeout=0.05, logger=recorder) as server, Client(server) as client:
            server.on("EHLO").silence()
            client.read()
            client.send(b"EHLO a.com\r\n")
            self.assertEqual(client.read(), "<closed>")
            recorder.wait_for("SMTP session finished")
            self.assertNotIn("warning", [level for level, _ in recorder.seen])
            self.assertTrue(server.wait_for_messages(1, TIMEOUT)[0].transcript.endswith("C: EHLO a.com\nS: <silence>"))

    def test_smtplib_against_greylisting(self) -> None:
        with Server() as server, smtplib.SMTP(server.host, server.port, timeout=TIMEOUT) as client:
            server.on("RCPT", "example.com").reply("450 4.2.0 Greylisted", times=2)
            for _ in range(2):
                with self.assertRaises(smtplib.SMTPRecipientsRefused) as caught:
                    client.sendmail("a@a.com", ["b@example.com"], "hi")
                self.assertEqual(caught.exception.recipients, {"b@example.com": (450, b"4.2.0 Greylisted")})
            client.sendmail("a@a.com", ["b@example.com"], "hi")
            self.assertEqual([message.rcpt_tos for message in server.messages()], [["b@example.com"]])

    def test_bad_rules(self) -> None:
        server: Any = Server()
        cases: dict[Any, str] = {
            (lambda: server.on("")): "^stage='': must be connect, message, \\* or a verb",
            (lambda: server.on(None)): "^stage=None: ",
            (lambda: server.on("MAIL TWICE")): "^stage='MAIL TWICE': ",
            (lambda: server.on("MAIL", 1)): "^match=1: must be an address, a domain or a function",
            (lambda: server.on("MAIL").reply()): "^reply=\\(\\): must be one string or more$",
            (lambda: server.on("MAIL").reply(450)): "^reply=450: ",
            (lambda: server.on("MAIL").reply("", close=1)): "^close=1: must be true or false$",
            (lambda: server.on("MAIL").reply("", times=0)): "^times=0: must be an integer from 1 up$",
            (lambda: server.on("MAIL").reply("", probability=2)): "^probability=2: must be a number from 0 to 1$",
            (lambda: server.on("MAIL").delay(-1)): "^delay=-1: must be a number of seconds",
            (lambda: server.on("MAIL").trickle("x")): "^trickle='x': must be a number of seconds",
            (lambda: server.on("MAIL").raw("x")): "^raw='x': must be bytes$",
            (lambda: server.on("MAIL").drop(1)): "^drop=1: must be a string$",
            (lambda: server.on("MAIL").drop(after=1)): "^after=1: is for the stage message, not for MAIL$",
            (lambda: server.on("message").reset(after=-1)): "^after=-1: must be an integer from 0 up$",
            (lambda: server.on("MAIL")(1)): "^rule=1: must be callable$",
        }
        for make, pattern in cases.items():
            with self.subTest(pattern), self.assertRaisesRegex(ConfigurationError, pattern):
                make()
        self.assertEqual(server._rules.newest_first, ())


class HandlerTest(unittest.TestCase):
    """Commands of one's own."""

    class Expand(smtpmock.Handler):
        verbs = ("EXPN", "expand")
        needs = ("helo",)
        received = "250 one of {msg_size_limit}"
        bad_argument = "501 whom?"

        @staticmethod
        def parse(argument: str) -> str | None:
            return argument or None

    class Noop(smtpmock.Handler):
        verbs = ("NOOP",)
        received = "msg_quit_cmd"

        def refuse(self, session: Any, value: Any) -> str | None:
            raise RuntimeError("mine")

    def test_added_and_replaced(self) -> None:
        with Server(handlers=[self.Expand], msg_size_limit=9) as server, Client(server) as client:
            client.read()
            replies = client.ask("EXPN x", "HELO a.com", "EXPN", "expn x", "EXPAND y", "NOOP")
        sequence = "503 Bad sequence of commands. HELO should be the first"
        self.assertEqual(replies, [sequence, RECEIVED, "501 whom?", "250 one of 9", "250 one of 9", "250 Ok"])

    def test_one_that_raises(self) -> None:
        recorder = Recorder()
        with Server(handlers=[self.Noop], logger=recorder) as server, Client(server) as client:
            client.read()
            self.assertEqual(client.ask("NOOP", "RSET")[0], "451 Local error in processing")
            self.assertRegex(recorder.wait_for("Traceback")[1], r"(?s)^Noop failed: Traceback .*RuntimeError: mine")

    def test_rules_are_for_it_too(self) -> None:
        with Server(handlers=[self.Expand]) as server, Client(server) as client:
            server.on("expn", "x").reply("252 maybe")
            client.read()
            self.assertEqual(client.ask("EXPN x"), ["252 maybe"])

    def test_bad_ones(self) -> None:
        for bad in (1, smtpmock.Handler, object, self.Expand(Configuration())):
            with self.assertRaisesRegex(
                ConfigurationError, "^handlers: .* must be a subclass of Handler that has verbs$"
            ):
                Server(handlers=[bad])  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------- ESMTP

ALL = ("SIZE", "8BITMIME", "SMTPUTF8", "PIPELINING", "DSN", "CHUNKING", "ENHANCEDSTATUSCODES", "XFOO")
USERS = {"alice": "sécret", "bob": ""}


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class ExtensionsTest(unittest.TestCase):
    def ask(self, *lines: str, greet: bool = True, **options: Any) -> list[str]:
        memory = Memory(**{"extensions": ALL, "multiple_rcptto": True, **options})
        self.memory = memory
        if greet:
            memory.feed(b"EHLO a.com\r\n")
        return [reply.text for line in lines for reply in memory.feed(line.encode() + b"\r\n")]

    def message(self) -> Message:
        self.memory.session.end()
        return self.memory.messages()[-1]

    def test_announced(self) -> None:
        expected = "\n".join(["250-Received", "250-SIZE 10485760", *(f"250-{name}" for name in ALL[1:-1]), "250 XFOO"])
        self.assertEqual(self.ask("EHLO a.com", "HELO a.com", greet=False), [expected, RECEIVED])
        (reply,) = self.ask(
            "EHLO a.com", greet=False, msg_helo_received="250-one\n250 two", extensions=["dsn", "LIMITS X=1"]
        )
        self.assertEqual(reply, "250-one\n250-two\n250-dsn\n250 LIMITS X=1")
        self.assertEqual(
            self.ask("EHLO a.com", msg_helo_received="250-odd\n251 two", extensions=()), ["250-odd\n251 two"]
        )
        self.assertEqual(self.ask("EHLO a.com", msg_helo_received="550 no"), ["550 no"])

    def test_parameters(self) -> None:
        taken = [
            "SIZE=5",
            "size=10485760",
            "BODY=8BITMIME",
            "Body=7bit",
            "SMTPUTF8",
            "RET=HDRS",
            "RET=full",
            "XFOO",
            "XFOO=1",
        ]
        taken += ["ENVID=a+3Db", "SIZE=1 BODY=7BIT  SMTPUTF8 RET=FULL"]
        for words in taken:
            self.assertEqual(self.ask(f"MAIL FROM:<a@a.com> {words}"), [RECEIVED], words)
        refused = [
            "SIZE=x",
            "SIZE",
            "SIZE=-1",
            "BODY=9BIT",
            "BODY",
            "SMTPUTF8=1",
            "RET=ALL",
            "ENVID=a=b",
            "ENVID=+3",
            "XBAR",
        ]
        refused += ["SIZE=1 SIZE=2", "NOTIFY=NEVER", "AUTH=<>", "=", "SIZE=1 foo"]
        for words in refused:
            self.assertEqual(
                self.ask(f"MAIL FROM:<a@a.com> {words}"), ["555 Parameter not recognized or not implemented"], words
            )
        for words, ok in {
            "NOTIFY=NEVER": True, "notify=SUCCESS,DELAY,failure": True, "ORCPT=rfc822;b@b.com": True, "NOTIFY=": False,
            "NOTIFY=NEVER,DELAY": False, "ORCPT=b@b.com": False, "SIZE=1": False, "ORCPT=utf-8;a+2Bb NOTIFY=DELAY": True,
        }.items():  # fmt: skip
            replies = self.ask("MAIL FROM:<a@a.com>", f"RCPT TO:<b@b.com> {words}")
            self.assertEqual(replies[1][:3], "250" if ok else "555", words)

    def test_not_announced(self) -> None:
        unknown = "555 Parameter not recognized or not implemented"
        self.assertEqual(self.ask("MAIL FROM:<a@a.com> SIZE=1", extensions=["DSN"]), [unknown])
        self.assertEqual(self.ask("HELO a.com", "MAIL FROM:<a@a.com> SIZE=1")[1], unknown)
        self.assertEqual(
            self.ask("MAIL FROM:<a@a.com> SIZE=1", extensions=()), ["501 MAIL FROM requires valid email address"]
        )
        self.assertEqual(self.ask("MAIL FROM:<a@a.com> AUTH=<>", extensions=(), auth_users={}), [RECEIVED])

    def test_the_forms_of_paths_with_parameters(self) -> None:
        for path in ("<a@a.com>", "a@a.com", "John Doe <a@a.com>", "<>", '<"a> b"@a.com>', '"a b"@a.com'):
            self.assertEqual(self.ask(f"MAIL FROM:{path} SIZE=3"), [RECEIVED], path)
            self.assertEqual(self.message().mailfrom_parameters, {"SIZE": "3"})
        for path in ("<a@a.com>SIZE=3", "<a@a.com", "a", "<a@a.com> SIZE=3>"):
            self.assertIn(self.ask(f"MAIL FROM:{path}")[0][:3], ("501", "555"), path)
        self.assertEqual(self.ask("MAIL FROM:<>", "RCPT TO:<Postmaster> NOTIFY=NEVER"), [RECEIVED, RECEIVED])

    def test_hostile_parameters_cost_what_their_length_does(self) -> None:
        parse = smtpmock._allow_parameters(smtpmock._parse_sender)
        for piece in ("a", '"', "<", ">", '"\\', " ", "=", "a@", "SIZE=1 "):
            for start in ("", "<", "<a@a.com> ", '<"'):
                began = time.perf_counter()
                parse(start + piece * (100_000 // len(piece)))
                self.assertLess(time.perf_counter() - began, TIMEOUT / 10)

    def test_recorded(self) -> None:
        self.ask(
            "MAIL FROM:<a@a.com> SIZE=5 smtputf8",
            "RCPT TO:<b@b.com> NOTIFY=NEVER",
            "RCPT TO:<c@c.com>",
            "DATA",
            "hi\r\n.",
        )
        message = self.message()
        self.assertEqual(message.mailfrom_parameters, {"SIZE": "5", "SMTPUTF8": ""})
        self.assertEqual(message.rcptto_parameters, [{"NOTIFY": "NEVER"}, {}])
        self.assertEqual((message.mail_from, message.rcpt_tos), ("a@a.com", ["b@b.com", "c@c.com"]))
        self.assertEqual(json.loads(json.dumps(message.to_dict()))["rcptto_parameters"], [{"NOTIFY": "NEVER"}, {}])

    def test_a_declared_size(self) -> None:
        self.assertEqual(
            self.ask("MAIL FROM:<a@a.com> SIZE=6", msg_size_limit=5), ["552 Message exceeded max size of 5 bytes"]
        )
        self.assertEqual(self.ask("MAIL FROM:<a@a.com> SIZE=5", msg_size_limit=5), [RECEIVED])

    def test_addresses_that_are_not_ascii(self) -> None:
        sender, recipient = "501 MAIL FROM requires valid email address", "501 RCPT TO requires valid email address"
        self.assertEqual(
            self.ask("MAIL FROM:<дядя@пример.рф>", "MAIL FROM:<дядя@пример.рф> SMTPUTF8"), [sender, RECEIVED]
        )
        self.assertEqual(self.ask("MAIL FROM:<a@a.com>", "RCPT TO:<b@пример.рф>"), [RECEIVED, recipient])
        self.assertEqual(self.ask("MAIL FROM:<a@a.com> SMTPUTF8", "RCPT TO:<b@пример.рф>"), [RECEIVED, RECEIVED])
        self.assertEqual(self.ask("MAIL FROM:<дядя@пример.рф>", extensions=["DSN"]), [RECEIVED])

    # CHUNKING

    def bdat(self, *pieces: bytes, **options: Any) -> list[str]:
        self.ask("MAIL FROM:<a@a.com>", "RCPT TO:<b@b.com>", **options)
        return [reply.text for piece in pieces for reply in self.memory.feed(piece)]

    def test_chunks(self) -> None:
        content = b"Subject: x\r\n\r\n.\r\n..\n\0\xff"
        for size in (1, 3, len(content)):
            pieces = [content[at : at + size] for at in range(0, len(content), size)]
            sent = [b"BDAT %d\r\n%s" % (len(piece), piece) for piece in pieces]
            self.assertEqual(
                self.bdat(*sent, b"bdat 0 last\r\n", b"NOOP\r\n"), [*[RECEIVED] * len(pieces), RECEIVED, "250 Ok"]
            )
            message = self.message()
            self.assertEqual((message.content, message.is_consistent), (content, True))
            self.assertEqual(message.data_request, "bdat 0 last")
            self.assertEqual(
                self.bdat(b"".join(sent[:-1]) + b"BDAT %d LAST\r\n%s" % (len(pieces[-1]), pieces[-1])),
                [RECEIVED] * len(pieces),
            )
            self.assertEqual(self.message().content, content)
        self.assertIn(
            f"C: BDAT {len(content)} LAST\nC: <{len(content)} bytes>\nS: 250 Received", self.message().transcript
        )

    def test_no_bytes_at_all(self) -> None:
        self.assertEqual(self.bdat(b"BDAT 0 LAST\r\n"), [RECEIVED])
        self.assertEqual((self.message().content, self.message().is_consistent), (b"", True))

    def test_a_chunk_out_of_sequence_is_consumed(self) -> None:
        sequence = "503 Bad sequence of commands. DATA should be used after RCPT TO"
        self.ask()
        replies = [
            reply.text for reply in self.memory.feed(b"BDAT 6\r\nNOOP\r\nNOOP\r\nBDAT 6 LAST\r\nQUIT\r\nRSET\r\n")
        ]
        self.assertEqual(replies, [sequence, "250 Ok", sequence, "250 Ok"])

    def test_data_after_a_chunk(self) -> None:
        sequence = "503 Bad sequence of commands. DATA should be used after RCPT TO"
        self.assertEqual(self.bdat(b"BDAT 2\r\nhi", b"DATA\r\n", b"BDAT 0 LAST\r\n"), [RECEIVED, sequence, RECEIVED])
        self.assertEqual(self.message().content, b"hi")

    def test_chunks_that_are_too_long(self) -> None:
        big, sequence = (
            "552 Message exceeded max size of 5 bytes",
            "503 Bad sequence of commands. DATA should be used after RCPT TO",
        )
        self.assertEqual(self.bdat(b"BDAT 6 LAST\r\n123456", b"NOOP\r\n", msg_size_limit=5), [big, "250 Ok"])
        self.assertEqual(
            self.bdat(b"BDAT 5\r\n12345BDAT 1\r\n1BDAT 0 LAST\r\n", msg_size_limit=5), [RECEIVED, big, sequence]
        )
        self.assertFalse(self.message().is_consistent)
        self.assertEqual(self.bdat(b"BDAT 99999999999\r\n" + b"x" * 10**6, msg_size_limit=5), [])
        assert self.memory.session.command is not None
        self.assertEqual(self.memory.session.command.payload.data, b"")

    def test_bad_chunks(self) -> None:
        bad = "501 BDAT requires a size in bytes"
        self.assertEqual(
            self.bdat(*(b"BDAT%s\r\n" % word for word in (b"", b" x", b" 1 x", b" -1", b" 1 LAST x"))), [bad] * 5
        )
        self.assertEqual(self.bdat(b"BDAT 2 LAST\r\nhi"), [RECEIVED])
        self.assertEqual(self.ask("BDAT 1", extensions=["DSN"]), [UNRECOGNIZED])

    def test_a_client_that_leaves_in_a_chunk(self) -> None:
        self.bdat(b"BDAT 2\r\nhi", b"BDAT 10 LAST\r\nhalf")
        message = self.message()
        self.assertEqual(
            (message.content, message.msg, message.transcript.splitlines()[-1]), (b"hihalf", False, "C: <6 bytes>")
        )

    def test_chunks_that_are_given_up(self) -> None:
        for line in (b"RSET\r\n", b"EHLO a.com\r\n", b"MAIL FROM:<x@x.com>\r\n"):
            self.bdat(
                b"BDAT 2\r\nhi" + line + b"EHLO a.com\r\nMAIL FROM:<a@a.com>\r\nRCPT TO:<b@b.com>\r\nBDAT 1 LAST\r\n!"
            )
            self.assertEqual(self.message().content, b"!")
            self.bdat(
                b"BDAT 2\r\nhi" + line + b"EHLO a.com\r\nMAIL FROM:<a@a.com>\r\nRCPT TO:<b@b.com>\r\nDATA\r\n!\r\n.\r\n"
            )
            self.assertEqual(self.message().content, b"!\r\n")

    def test_several_mails_in_chunks(self) -> None:
        self.bdat(multiple_message_receiving=True)
        mail = b"BDAT 2\r\nhiBDAT 1 LAST\r\n!MAIL FROM:<a@a.com>\r\nRCPT TO:<b@b.com>\r\n"
        self.memory.feed(mail * 3)
        self.assertEqual([message.content for message in self.memory.messages()], [b"hi!"] * 3)

    def test_rules(self) -> None:
        self.ask("MAIL FROM:<a@a.com>", "RCPT TO:<b@b.com>")
        self.memory.on("BDAT").reply("451 not now", times=1)
        replies = [reply.text for reply in self.memory.feed(b"BDAT 6\r\nNOOP\r\nBDAT 0 LAST\r\n")]
        self.assertEqual([reply[:3] for reply in replies], ["451", "503"])
        self.ask("MAIL FROM:<a@a.com>", "RCPT TO:<b@b.com>")
        self.memory.on("message").reply("452 full")
        self.assertEqual(
            [reply.text for reply in self.memory.feed(b"BDAT 2\r\nhiBDAT 0 LAST\r\n")], [RECEIVED, "452 full"]
        )

    def test_the_default_is_as_it_was(self) -> None:
        replies = self.ask("EHLO a.com", "AUTH PLAIN AGEAYg==", "STARTTLS", "BDAT 1", greet=False, extensions=())
        self.assertEqual(replies, [RECEIVED, *[UNRECOGNIZED] * 3])
        self.assertEqual(differing(state(self.message())), HELO)

    def test_options_that_lack_another(self) -> None:
        for name, other in smtpmock._NEEDED.items():
            with self.assertRaisesRegex(ConfigurationError, f"^{name}=True: needs {other}$"):
                Server(None, **dict[str, Any]({name: True}))


class AuthTest(unittest.TestCase):
    SUCCEEDED, FAILED = "235 Authentication succeeded", "535 Authentication credentials invalid"

    def ask(self, *lines: str, users: Any = USERS, **options: Any) -> list[str]:
        memory = Memory(auth_users=users, **options)
        self.memory = memory
        memory.feed(b"EHLO a.com\r\n")
        return [reply.text for line in lines for reply in memory.feed(line.encode() + b"\r\n")]

    def message(self) -> Message:
        self.memory.session.end()
        return self.memory.messages()[-1]

    def test_announced(self) -> None:
        self.assertEqual(self.ask("EHLO a.com"), ["250-Received\n250 AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2"])

    def test_mechanisms(self) -> None:
        plain, token = b64("\0alice\0sécret"), b64("user=alice\1auth=Bearer sécret\1\1")
        for mechanism, lines in (
            ("PLAIN", [f"AUTH PLAIN {plain}"]),
            ("PLAIN", ["auth plain", plain]),
            ("PLAIN", [f"AUTH PLAIN {b64('authzid' + chr(0) + 'alice' + chr(0) + 'sécret')}"]),
            ("LOGIN", ["AUTH LOGIN", b64("alice"), b64("sécret")]),
            ("LOGIN", [f"Auth Login {b64('alice')}", b64("sécret")]),
            ("XOAUTH2", [f"AUTH XOAUTH2 {token}"]),
            ("XOAUTH2", ["AUTH xoauth2", token]),
        ):
            *challenges, reply = self.ask(*lines)
            self.assertEqual(reply, self.SUCCEEDED, lines)
            self.assertEqual(
                challenges,
                ["334 VXNlcm5hbWU6", "334 UGFzc3dvcmQ6"][-len(challenges) :]
                if mechanism == "LOGIN"
                else ["334 "] * len(challenges),
            )
            message = self.message()
            self.assertEqual((message.auth_mechanism, message.auth_user, message.auth), (mechanism, "alice", True))
            self.assertEqual(
                (message.auth_response, message.auth_request.upper().split()[:2]), (reply, ["AUTH", mechanism])
            )
            for secret in (plain, token, b64("sécret"), "sécret"):
                self.assertNotIn(secret, str(message.to_dict()))

    def test_cram_md5(self) -> None:
        challenges = set()
        for secret, expected in (("sécret", self.SUCCEEDED), ("", self.FAILED), ("wrong", self.FAILED)):
            (reply,) = self.ask("AUTH CRAM-MD5")
            challenge = base64.b64decode(reply.removeprefix("334 "))
            challenges.add(challenge)
            digest = hmac.new(secret.encode(), challenge, "md5").hexdigest()
            self.assertEqual(
                [reply.text for reply in self.memory.feed(b64(f"alice {digest}").encode() + b"\r\n")], [expected]
            )
        self.assertEqual(len(challenges), 3)
        self.assertEqual(self.ask("AUTH CRAM-MD5 abcd"), ["501 Cannot decode response"])
        self.assertEqual(self.ask("AUTH CRAM-MD5", b64("nobody x"))[1], self.FAILED)
        self.assertEqual(self.ask("AUTH CRAM-MD5", b64("bob x"))[1], self.FAILED)

    def test_refusals(self) -> None:
        for lines, expected in {
            ("AUTH PLAIN " + b64("\0alice\0wrong"),): self.FAILED,
            ("AUTH PLAIN " + b64("\0nobody\0"),): self.FAILED,
            ("AUTH LOGIN", b64("nobody"), b64("")): self.FAILED,
            ("AUTH LOGIN", "*"): "501 Authentication cancelled",
            ("AUTH CRAM-MD5", "*"): "501 Authentication cancelled",
            ("AUTH PLAIN !!!",): "501 Cannot decode response",
            ("AUTH PLAIN", "é"): "501 Cannot decode response",
            ("AUTH PLAIN =",): "501 Cannot decode response",
            ("AUTH PLAIN " + b64("alice"),): "501 Cannot decode response",
            ("AUTH XOAUTH2 " + b64("alice"),): "501 Cannot decode response",
            ("AUTH GSSAPI",): "504 Unrecognized authentication type",
            ("AUTH",): "504 Unrecognized authentication type",
            ("AUTH PLAIN " + b64("\0bob\0"), "AUTH LOGIN"): Configuration().msg_auth_sequence,
            ("MAIL FROM:<a@a.com>", "AUTH LOGIN"): Configuration().msg_auth_sequence,
        }.items():
            self.assertEqual(self.ask(*lines)[-1], expected, lines)
            self.assertEqual([reply.text for reply in self.memory.feed(b"NOOP\r\n")], ["250 Ok"])
        self.assertEqual(Memory(auth_users=USERS).feed(b"AUTH LOGIN\r\n")[0].text, Configuration().msg_auth_sequence)

    def test_a_refusal_after_a_success_undoes_nothing(self) -> None:
        self.ask("AUTH PLAIN " + b64("\0bob\0"), "AUTH LOGIN", "EHLO a.com", *SEND)
        message = self.message()
        self.assertEqual((message.auth, message.auth_user), (True, "bob"))
        self.assertIn(" with ESMTPA id ", message.received_header)

    def test_a_wrong_user_is_recorded(self) -> None:
        self.ask("AUTH PLAIN " + b64("\0mallory\0guess"), "QUIT")
        message = self.message()
        self.assertEqual((message.auth, message.auth_user, message.auth_response), (False, "mallory", self.FAILED))

    def test_each_mail_has_it(self) -> None:
        self.ask("AUTH PLAIN " + b64("\0bob\0"), *SEND, *SEND, multiple_message_receiving=True)
        self.assertEqual([message.auth_user for message in self.memory.messages()], ["bob", "bob"])
        self.assertIn("C: AUTH PLAIN ***\nS: 235", self.memory.messages()[1].transcript)

    def test_required(self) -> None:
        replies = self.ask(SEND[0], "AUTH PLAIN " + b64("\0bob\0"), *SEND, auth_required=True)
        self.assertEqual((replies[0], replies[-1]), ("530 Authentication required", RECEIVED))
        memory = Memory(auth_users=USERS, auth_required=True)
        self.assertEqual(memory.feed(b"MAIL FROM:x\r\n")[0].text, "530 Authentication required")

    def test_a_function(self) -> None:
        seen: list[tuple[str, str, str]] = []

        def check(mechanism: str, user: str, secret: str) -> bool:
            seen.append((mechanism, user, secret))
            return user == "alice"

        self.assertEqual(self.ask("AUTH PLAIN " + b64("\0alice\0s"), users=check), [self.SUCCEEDED])
        self.assertEqual(self.ask("AUTH LOGIN " + b64("bob"), b64("t"), users=check)[1], self.FAILED)
        challenge, reply = self.ask("AUTH CRAM-MD5", b64("alice abc"), users=check)
        self.assertEqual(reply, self.SUCCEEDED)
        text = base64.b64decode(challenge[4:]).decode()
        self.assertEqual(seen, [("PLAIN", "alice", "s"), ("LOGIN", "bob", "t"), ("CRAM-MD5", "alice", f"{text} abc")])

    def test_a_function_that_raises(self) -> None:
        self.assertEqual(
            self.ask("AUTH PLAIN " + b64("\0a\0b"), users=lambda *_: 1 / 0), ["451 Local error in processing"]
        )
        for lines in (["AUTH LOGIN", b64("a"), b64("b")], ["AUTH LOGIN", "x" * 13000]):
            self.ask(*lines, users=lambda *_: 1 / 0)
            self.assertEqual(
                [reply.text for reply in self.memory.feed(b"AUTH CRAM-MD5\r\n*\r\n")][1], "501 Authentication cancelled"
            )

    def test_rules(self) -> None:
        self.ask()
        self.memory.on("AUTH", "alice").reply("454 4.7.0 Temporary authentication failure", times=1)
        line = b"AUTH PLAIN " + b64("\0alice\0sécret").encode() + b"\r\n"
        self.assertEqual([reply.text[:3] for _ in range(2) for reply in self.memory.feed(line)], ["454", "235"])

    def test_a_secret_is_not_shown(self) -> None:
        recorder = Recorder()
        for users in (USERS, None):
            with Server(auth_users=users, logger=recorder) as server, Client(server) as client:
                client.read()
                client.ask("EHLO a.com")
                if users:
                    client.read()
                client.ask("AUTH LOGIN " + b64("alice"), b64("sécret"), "AUTH PLAIN " + b64("\0alice\0sécret"))
                client.ask("auth  plain   " + b64("\0alice\0sécret"), "AUTH LOGIN", "*", "QUIT")
            recorder.wait_for("SMTP mock server was")
            for secret in (b64("\0alice\0sécret"), b64("sécret")) if users else (b64("\0alice\0sécret"),):
                self.assertNotIn(secret, str(recorder.seen))
                self.assertNotIn(secret, server.messages()[0].transcript)

    def test_a_long_token(self) -> None:
        token = b64(f"user=alice\1auth=Bearer {'t' * 8000}\1\1")
        self.assertEqual(self.ask(f"AUTH XOAUTH2 {token}", users={"alice": "t" * 8000}), [self.SUCCEEDED])
        self.assertEqual(self.ask("AUTH XOAUTH2", "x" * 13000, "NOOP")[1:], ["500 Line too long", "250 Ok"])

    def test_smtplib(self) -> None:
        with Server(auth_users={"alice": "secret"}) as server:
            for mechanism in ("auth_plain", "auth_login", "auth_cram_md5"):
                with self.subTest(mechanism), smtplib.SMTP(server.host, server.port, timeout=TIMEOUT) as client:
                    client.ehlo()
                    client.user, client.password = "alice", "secret"
                    name = mechanism.removeprefix("auth_").upper().replace("_", "-")
                    self.assertEqual(client.auth(name, getattr(client, mechanism))[0], 235)
            with smtplib.SMTP(server.host, server.port, timeout=TIMEOUT) as client:
                with self.assertRaises(smtplib.SMTPAuthenticationError) as caught:
                    client.login("alice", "wrong")
                self.assertEqual(
                    (caught.exception.smtp_code, caught.exception.smtp_error), (535, self.FAILED[4:].encode())
                )

    def test_bad_users(self) -> None:
        for bad in ("a:b", ["a"], {"a": 1}, {1: "a"}):
            with self.assertRaisesRegex(ConfigurationError, "^auth_users=.*: must be a mapping of users"):
                Server(auth_users=bad)


# Certificates of localhost and 127.0.0.1 which are their own authority, with their keys. One is good until 2120.
GOOD = """-----BEGIN CERTIFICATE-----
MIIBqjCCAVGgAwIBAgIUDM/Num28xnxma8Q+X5P236BT4CIwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAx
MDAwMDAwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARDnNB8bTbrRO5/EVPX+ZDdEN0uGbtorWyhsX65xF28RK6NGaKw316m
RPCdDHXRS9nvPe/3/sirsDjLLkzfGOUFo38wfTAaBgNVHREEEzARgglsb2NhbGhv
c3SHBH8AAAEwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAoQwHQYDVR0O
BBYEFBA21DskUsf6Ga0pIasU1wcmL2A1MB8GA1UdIwQYMBaAFBA21DskUsf6Ga0p
IasU1wcmL2A1MAoGCCqGSM49BAMCA0cAMEQCIEP8ebnHJG+RSQGYsitXE6pS63l+
a6ODCmSdDyMyS1EDAiBRcTXg23Xz7aVVKUOkM1uFtNYde5laee9RDEUoavCK5Q==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgpI7nF53S/ZqGp3Cm
adTnMoeRkiJypq8dyPruhaqNszKhRANCAARDnNB8bTbrRO5/EVPX+ZDdEN0uGbto
rWyhsX65xF28RK6NGaKw316mRPCdDHXRS9nvPe/3/sirsDjLLkzfGOUF
-----END PRIVATE KEY-----
"""
EXPIRED = """-----BEGIN CERTIFICATE-----
MIIBqjCCAU+gAwIBAgIUJblK3yawA3oTS1g7NUCtULXX5p8wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MB4XDTIwMDEwMTAwMDAwMFoXDTIxMDEwMTAw
MDAwMFowFDESMBAGA1UEAwwJbG9jYWxob3N0MFkwEwYHKoZIzj0CAQYIKoZIzj0D
AQcDQgAEFtVrwhTByopsnKvgb7EPicKNFAtuYJjc2FimiC4NZGjCFtwrSNzx7DeZ
ETRWeSeplX0tvBvPnxy4S/0XbUMcY6N/MH0wGgYDVR0RBBMwEYIJbG9jYWxob3N0
hwR/AAABMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKEMB0GA1UdDgQW
BBQuvV3fAmPdbgnL20Y7kpMfX/88IDAfBgNVHSMEGDAWgBQuvV3fAmPdbgnL20Y7
kpMfX/88IDAKBggqhkjOPQQDAgNJADBGAiEAiiFo8pG2V5g2O5EMzjIUWzJM8WvS
6PAuHx+yw2F94acCIQCgJptq+ByOcQc0eJqq2omGIZ5VOJY6mWIVpz8JyVUx0w==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgeEYcabQfIfC6H+Gt
zSehicJHuf0WsA2Jzd0vOHnU0CGhRANCAAQW1WvCFMHKimycq+BvsQ+Jwo0UC25g
mNzYWKaILg1kaMIW3CtI3PHsN5kRNFZ5J6mVfS28G8+fHLhL/RdtQxxj
-----END PRIVATE KEY-----
"""


class TlsTest(unittest.TestCase):
    good: Path
    expired: Path

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.good, cls.expired = Path(folder.name, "good.pem"), Path(folder.name, "expired.pem")
        cls.good.write_text(GOOD)
        cls.expired.write_text(EXPIRED)

    def context(self, path: Path | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path or self.good)
        return context

    def trusting(self, path: Path | None = None) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=path or self.good)

    def server(self, path: Path | None = None, **options: Any) -> Server:
        return Server(ssl_context=self.context(path), **options)

    def connect(self, server: Server) -> smtplib.SMTP:
        return smtplib.SMTP("localhost", server.port, timeout=TIMEOUT)

    def test_starttls(self) -> None:
        with self.server(extensions=["SIZE"], auth_users={"u": "s"}, auth_requires_tls=True) as server:
            with self.connect(server) as client:
                client.ehlo()
                self.assertTrue(client.has_extn("starttls"))
                self.assertFalse(client.has_extn("auth"))
                self.assertEqual(client.docmd("AUTH PLAIN x"), (538, b"Encryption required for authentication"))
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

    def test_a_login_before_it_is_forgotten(self) -> None:
        with self.server(auth_users={"u": "s"}, auth_required=True) as server, self.connect(server) as client:
            client.login("u", "s")
            client.starttls(context=self.trusting())
            client.ehlo()
            self.assertEqual(client.mail("a@a.com"), (530, b"Authentication required"))
            client.login("u", "s")
            client.quit()
        self.assertEqual((server.messages()[0].auth, server.messages()[0].tls is not None), (True, True))

    def test_implicit(self) -> None:
        with self.server(implicit_tls=True, multiple_message_receiving=True) as server:
            with smtplib.SMTP_SSL(server.host, server.port, timeout=TIMEOUT, context=self.trusting()) as client:
                client.ehlo()
                self.assertFalse(client.has_extn("starttls"))
                self.assertEqual(client.docmd("STARTTLS")[0], 502)
                for _ in range(2):
                    client.sendmail("a@a.com", ["b@b.com"], "hi")
            self.assertEqual([bool(message.tls) for message in server.messages()], [True, True])

    def test_the_client_is_told_that_nothing_follows(self) -> None:
        with (
            self.server(implicit_tls=True) as server,
            socket.create_connection((server.host, server.port), TIMEOUT) as plain,
        ):
            with self.trusting().wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as client:
                client.sendall(b"QUIT\r\n")
                self.assertEqual(
                    b"".join(iter(lambda: client.recv(100), b"")), b"220 Welcome\r\n221 Closing connection\r\n"
                )

    def test_required(self) -> None:
        needed = (530, b"Must issue a STARTTLS command first")
        with (
            self.server(tls_required=True, auth_users={}, auth_required=True) as server,
            self.connect(server) as client,
        ):
            client.ehlo()
            for line in ("MAIL FROM:<a@a.com>", "RCPT TO:<b@b.com>", "DATA", "RSET", "AUTH LOGIN"):
                self.assertEqual(client.docmd(line), needed, line)
            self.assertEqual(client.noop()[0], 250)
            with self.assertRaises(smtplib.SMTPSenderRefused) as caught:
                client.sendmail("a@a.com", ["b@b.com"], "hi")
            self.assertEqual((caught.exception.smtp_code, caught.exception.smtp_error), needed)
            client.starttls(context=self.trusting())
            client.ehlo()
            self.assertEqual(client.docmd("MAIL FROM:<a@a.com>"), (530, b"Authentication required"))

    def test_an_argument(self) -> None:
        with self.server() as server, self.connect(server) as client:
            self.assertEqual(client.docmd("STARTTLS")[0], 503)
            client.ehlo()
            self.assertEqual(client.docmd("STARTTLS now"), (501, b"STARTTLS takes no argument"))

    def test_what_was_sent_before_the_handshake_has_no_effect(self) -> None:
        with self.server() as server, Client(server) as client:
            client.read()
            client.ask("EHLO a.com")
            client.read()
            client.send(b"STARTTLS\r\nMAIL FROM:<evil@a.com>\r\nRSET\r\nNOOP")
            self.assertEqual(client.read(), "220 Ready to start TLS")
            with self.trusting().wrap_socket(client.socket, server_hostname="localhost") as secure:
                secure.sendall(b"EHLO b.com\r\nRCPT TO:<b@b.com>\r\nQUIT\r\n")
                replies = b"".join(iter(lambda: secure.recv(1000), b"")).decode().splitlines()
            self.assertEqual([reply[:3] for reply in replies], ["250", "503", "221"])
        (message,) = server.messages()
        self.assertEqual((message.mail_from, message.helo_request), (None, "EHLO b.com"))
        self.assertNotIn("evil", message.transcript)

    def test_certificates_as_a_client_sees_them(self) -> None:
        for name, path, trusted, host, expected in (
            ("expired", self.expired, self.expired, "localhost", "certificate has expired"),
            ("self-signed", self.good, None, "localhost", "self-signed certificate|self signed certificate"),
            ("another host's", self.good, self.good, "mx.example.com", "(?i)hostname mismatch"),
        ):
            recorder = Recorder()
            with self.subTest(name), self.server(path, implicit_tls=True, logger=recorder) as server:
                context = self.trusting(trusted) if trusted else ssl.create_default_context()
                with socket.create_connection((server.host, server.port), TIMEOUT) as plain:
                    with self.assertRaisesRegex(ssl.SSLCertVerificationError, expected):
                        context.wrap_socket(plain, server_hostname=host)
                level, line = recorder.wait_for("SMTP session broke off: TLS")
                self.assertEqual((level, len(line.splitlines())), ("warning", 1))
                self.assertEqual(server.messages(), [])

    def test_no_tls_where_tls_is(self) -> None:
        recorder = Recorder()
        with self.server(implicit_tls=True, logger=recorder) as server, Client(server) as client:
            client.send(b"EHLO a.com\r\n")
            self.assertNotEqual(client.read()[:3], "220")
            self.assertEqual(len(recorder.wait_for("TLS handshake failed")[1].splitlines()), 1)

    def test_clients_that_stall_in_the_handshake(self) -> None:
        recorder = Recorder()
        server = self.server(implicit_tls=True, shutdown_timeout=10 * TIMEOUT, logger=recorder).start()
        with contextlib.ExitStack() as stack:
            for number in range(100):
                client = stack.enter_context(socket.create_connection((server.host, server.port), TIMEOUT))
                client.sendall(b"\x16\x03\x01"[: number % 4])
            for _ in range(100):
                recorder.wait_for("SMTP session started")
            with smtplib.SMTP_SSL(server.host, server.port, timeout=TIMEOUT, context=self.trusting()) as other:
                self.assertEqual(other.noop()[0], 250)
            began = time.monotonic()
            server.stop()
            self.assertLess(time.monotonic() - began, TIMEOUT)
        recorder.wait_for("SMTP mock server was stopped successfully")

    def test_a_handshake_has_the_timeout_of_the_session(self) -> None:
        with self.server(implicit_tls=True, session_timeout=0.05) as server, Client(server) as client:
            self.assertIn(client.read(), ("<closed>", "<reset>"))

    def test_idle_sessions_get_a_421(self) -> None:
        server = self.server(implicit_tls=True).start()
        with smtplib.SMTP_SSL(server.host, server.port, timeout=TIMEOUT, context=self.trusting()) as client:
            client.noop()
            server.stop()
            self.assertEqual(client.getreply()[0], 421)
            client.close()

    def test_silence_in_tls(self) -> None:
        with self.server(implicit_tls=True, session_timeout=0.2) as server:
            with smtplib.SMTP_SSL(server.host, server.port, timeout=TIMEOUT, context=self.trusting()) as client:
                self.assertEqual(client.getreply(), (421, b"Session timeout, closing connection"))
                client.close()

    def test_rules(self) -> None:
        with self.server() as server:
            server.on("STARTTLS").reply("454 TLS not available", times=1)
            with self.connect(server) as client:
                client.ehlo()
                self.assertEqual(client.docmd("STARTTLS"), (454, b"TLS not available"))
                client.starttls(context=self.trusting())
                server.on("NOOP").reset()
                with self.assertRaises(smtplib.SMTPServerDisconnected):
                    client.noop()
            server.on("STARTTLS").drop("220 go")
            with self.connect(server) as client, self.assertRaises((ssl.SSLError, OSError)):
                client.starttls(context=self.trusting())

    def test_the_command_line(self) -> None:
        process = ProcessCase.start(self, f"-tlsCert={self.good}", "-authUsers=u:s", "--implicit-tls")  # type: ignore[arg-type]
        port = ProcessCase.port(self, process)  # type: ignore[arg-type]
        with smtplib.SMTP_SSL("127.0.0.1", port, timeout=TIMEOUT, context=self.trusting()) as client:
            client.login("u", "s")
            client.sendmail("a@a.com", ["b@b.com"], "hi")
        for argv, expected in {
            (f"-tlsCert={HERE / 'none'}",): "No such file or directory",
            (f"-tlsCert={__file__}",): r"\[SSL\].*",
            (f"-tlsKey={self.good}",): "No such file or directory",
            ("-implicitTls",): "",
        }.items():
            with contextlib.redirect_stderr(io.StringIO()) as err:
                self.assertEqual(smtpmock.main(argv), 2)
            self.assertRegex(err.getvalue(), rf"\Asmtpmock: [^\n]*{expected}[^\n]*\n\Z")

    def test_a_context_that_is_none(self) -> None:
        with self.assertRaisesRegex(ConfigurationError, "^ssl_context=1: must be an ssl.SSLContext$"):
            Server(ssl_context=1)


# ------------------------------------------------------------------------------------- server life


class ServerTest(unittest.TestCase):
    def setUp(self) -> None:
        self.before = set(threading.enumerate())

    def assert_nothing_is_left(self, server: Server) -> None:
        self.assertEqual(set(threading.enumerate()) - self.before, set())
        with self.assertRaises(OSError):
            socket.create_connection((server.host, server.port), TIMEOUT).close()

    def test_life(self) -> None:
        server = Server()
        self.assertEqual((server.host, server.port, server.is_running), ("127.0.0.1", 0, False))
        with self.assertRaisesRegex(ServerStateError, "127.0.0.1:0.*cannot stop: it is not running"):
            server.stop()
        self.assertIs(server.start(), server)
        port = server.port
        self.assertTrue(server.is_running)
        self.assertNotEqual(port, 0)
        with self.assertRaisesRegex(ServerStateError, f"127.0.0.1:{port}.*cannot start: it is running"):
            server.start()
        with Client(server) as client:
            self.assertEqual(client.read(), "220 Welcome")
        server.stop()
        self.assertEqual((server.port, server.is_running), (port, False))
        self.assert_nothing_is_left(server)

    def test_restart(self) -> None:
        server = Server()
        for count in (1, 2, 3):
            with server, Client(server) as client:
                client.read()
                client.ask("HELO a.com", "QUIT")
            self.assertEqual(len(server.messages()), count)
        self.assert_nothing_is_left(server)

    def test_restart_on_the_same_port(self) -> None:
        with Server() as server:
            port = server.port
            with Client(server) as client:
                self.assertEqual([client.read(), *client.ask("QUIT")][1], "221 Closing connection")
        with Server(port=port) as server:
            self.assertEqual(server.port, port)

    def test_a_block_that_stops_the_server_or_raises(self) -> None:
        with Server() as server:
            server.stop()
        with self.assertRaises(ZeroDivisionError), Server() as server:
            raise ZeroDivisionError
        self.assertFalse(server.is_running)
        self.assert_nothing_is_left(server)

    def test_port_in_use(self) -> None:
        with Server() as first:
            second = Server(port=first.port, logger=(recorder := Recorder()))
            with self.assertRaisesRegex(
                ServerStartError, f"^cannot listen on 127.0.0.1:{first.port}: .*in use"
            ) as caught:
                second.start()
            self.assertIsInstance(caught.exception.errno, int)
            self.assertEqual(recorder.wait_for("cannot listen")[0], "error")
            self.assertFalse(second.is_running)
        second.start()
        second.stop()
        self.assert_nothing_is_left(second)

    def test_hosts_that_cannot_be_had(self) -> None:
        for host in ("192.0.2.1", "", "\x00", "ä" * 70):
            with self.subTest(host), self.assertRaisesRegex(ServerStartError, "^cannot listen on "):
                Server(host=host).start()
        error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with mock.patch.object(socket, "getaddrinfo", side_effect=error):
            with self.assertRaisesRegex(
                ServerStartError, "^cannot listen on no-such-host:0: Name or service not known$"
            ):
                Server(host="no-such-host").start()

    def test_hosts(self) -> None:
        families = {"127.0.0.1": "127.0.0.1", "localhost": "localhost"}
        if has_ipv6_loopback():
            families |= {"::1": "::1", "[::1]": "::1", "[::]": "::"}
        for host, reached_at in families.items():
            with self.subTest(host), Server(host=host) as server, Client(server) as client:
                self.assertEqual(server.host, reached_at)
                self.assertEqual(client.read(), "220 Welcome")

    @unittest.skipUnless(socket.has_dualstack_ipv6(), "this machine has no dual stack")
    def test_every_address_takes_ipv4_too(self) -> None:
        with Server(host="[::]") as server, socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as client:
            self.assertEqual(client.recv(100), b"220 Welcome\r\n")

    def test_threads_are_used_again(self) -> None:
        """But not kept in any number."""
        with Server() as server:
            listener = server._listener
            assert listener is not None
            for count in (1, 1, 50):
                with contextlib.ExitStack() as stack:
                    clients = [stack.enter_context(Client(server)) for _ in range(count)]
                    for client in clients:
                        self.assertEqual([client.read(), *client.ask("QUIT"), client.read()][-1], "<closed>")
                deadline = time.monotonic() + TIMEOUT
                while not listener.spare_threads and time.monotonic() < deadline:
                    time.sleep(0)
                self.assertTrue(listener.spare_threads)
            self.assertLess(len(listener.spare_threads), 2 * smtpmock._SPARE_THREADS)

    def test_the_listener_sleeps_until_there_is_something_to_do(self) -> None:
        accept = smtpmock._Listener.handle_request
        with mock.patch.object(smtpmock._Listener, "handle_request", autospec=True, side_effect=accept) as accepts:
            with Server(session_timeout=0.05) as server:
                for _ in range(3):
                    with Client(server) as client:
                        while client.read() != "<closed>":
                            pass
        self.assertEqual(accepts.call_count, 3)

    def test_starts_and_stops_at_once(self) -> None:
        server = Server()
        results = in_threads(*[server.start, server.stop] * 8)
        for result in results:
            self.assertTrue(result is None or result is server or isinstance(result, ServerStateError), result)
        with contextlib.suppress(ServerStateError):
            server.stop()
        self.assert_nothing_is_left(server)

    def test_no_thread_no_server(self) -> None:
        server = Server()
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            with self.assertRaisesRegex(ServerStartError, "can't start new thread"):
                server.start()
        self.assertFalse(server.is_running)

    def test_when_it_is_announced_clients_can_connect_but_are_not_served(self) -> None:
        server = Server()
        clients: list[socket.socket] = []

        def announce(host: str, port: int) -> None:
            clients.append(socket.create_connection((host, port), TIMEOUT))
            clients[0].settimeout(0.05)
            self.assertRaises(TimeoutError, clients[0].recv, 100)

        server._start(announce)
        with clients[0] as client:
            client.settimeout(TIMEOUT)
            self.assertEqual(client.recv(100), b"220 Welcome\r\n")
            server.stop()

    def test_no_descriptor_no_server(self) -> None:
        server = Server()
        error = OSError(errno.EMFILE, "Too many open files")
        for module, name in ((socket, "socket"), (socket, "socketpair"), (selectors, "DefaultSelector")):
            with self.subTest(name), mock.patch.object(module, name, side_effect=error), warnings.catch_warnings():
                warnings.simplefilter("error")
                with self.assertRaisesRegex(ServerStartError, "Too many open files$") as caught:
                    server.start()
                self.assertEqual(caught.exception.errno, errno.EMFILE)
            self.assertFalse(server.is_running)
        server.start()
        server.stop()

    def test_no_thread_no_session(self) -> None:
        recorder = Recorder()
        with Server(logger=recorder) as server:
            with mock.patch.object(
                smtpmock._SessionThread, "start", side_effect=RuntimeError("can't start new thread")
            ):
                for _ in range(3):
                    with Client(server) as client:
                        self.assertEqual(
                            [client.read(), client.read()], ["421 No thread for another session", "<closed>"]
                        )
            with Client(server) as client:
                self.assertEqual(client.read(), "220 Welcome")
        recorder.wait_for("stopped")
        errors = [text for level, text in recorder.seen if level == "error"]
        self.assertEqual(errors, ["SMTP mock server cannot take another client: can't start new thread"])

    # stop()

    def test_idle_sessions_get_a_421_at_once(self) -> None:
        with contextlib.ExitStack() as stack:
            server = Server(shutdown_timeout=10 * TIMEOUT, session_timeout=10 * TIMEOUT).start()
            clients = [stack.enter_context(Client(server)) for _ in range(10)]
            for client in clients:
                self.assertEqual(client.read(), "220 Welcome")
            clients[0].send(b"HELO a.com\r\nhalf a li")
            self.assertEqual(clients[0].read(), RECEIVED)
            began = time.monotonic()
            server.stop()
            self.assertLess(time.monotonic() - began, TIMEOUT)
            for client in clients:
                self.assertEqual(client.read(), "421 Server shutting down, closing connection")
                self.assertEqual(client.read(), "<closed>")
            self.assertEqual([message.helo for message in server.messages()], [True])
        self.assert_nothing_is_left(server)

    def test_a_body_may_be_finished(self) -> None:
        recorder = Recorder()
        server = Server(shutdown_timeout=TIMEOUT, logger=recorder).start()
        with Client(server) as client:
            client.read()
            client.ask("EHLO a.com", *SEND[:3])
            stopper = threading.Thread(target=server.stop)
            stopper.start()
            recorder.wait_for("shutdown mode")
            client.send(b"late\r\n.\r\n")
            self.assertEqual(client.read(), RECEIVED)
            self.assertEqual(client.read(), "421 Server shutting down, closing connection")
            stopper.join(TIMEOUT)
        self.assertEqual([message.content for message in server.messages()], [b"late\r\n"])
        recorder.wait_for("stopped successfully")
        self.assert_nothing_is_left(server)

    def test_a_delay_may_be_finished(self) -> None:
        recorder = Recorder()
        server = Server(shutdown_timeout=TIMEOUT, response_delay_noop=0.05, logger=recorder).start()
        with Client(server) as client:
            client.read()
            client.send(b"NOOP\r\n")
            recorder.wait_for("NOOP")
            server.stop()
            self.assertEqual([client.read(), client.read()], ["250 Ok", "421 Server shutting down, closing connection"])

    def test_a_long_body_or_delay_is_cut_off(self) -> None:
        for last in (SEND[2], "NOOP"):
            recorder = Recorder()
            server = Server(shutdown_timeout=0.2, response_delay_noop=10 * TIMEOUT, logger=recorder).start()
            with self.subTest(last), Client(server) as client:
                client.read()
                client.ask("EHLO a.com", *SEND[:2])
                client.send(last.encode() + b"\r\nhalf")
                recorder.wait_for("request: " + last)
                if last == "DATA":
                    self.assertEqual(client.read(), READY)
                began = time.monotonic()
                server.stop()
                self.assertTrue(0.2 <= time.monotonic() - began < TIMEOUT)
                self.assertEqual(client.read(), "<closed>")
                self.assertEqual([message.rcptto for message in server.messages()], [True])
                recorder.wait_for("force stopped")
                self.assert_nothing_is_left(server)

    def test_a_client_that_does_not_read_is_cut_off(self) -> None:
        server = Server(shutdown_timeout=0.1, msg_noop_received="250 " + "x" * 100_000).start()
        with Client(server) as client:
            client.socket.settimeout(1)
            with contextlib.suppress(OSError):
                while True:
                    client.send(b"NOOP\r\n" * 1000)
            server.stop()
        self.assert_nothing_is_left(server)

    def test_endless_clients_are_cut_off_and_disturb_nobody(self) -> None:
        server = Server(shutdown_timeout=0.1, msg_size_limit=1000).start()
        stopped, flooding = threading.Event(), threading.Barrier(3)

        def flood(prefix: bytes) -> None:
            with Client(server) as client, contextlib.suppress(OSError):
                client.read()
                client.send(prefix)
                flooding.wait(TIMEOUT)
                while not stopped.is_set():
                    client.send(b"x" * 65536)

        def user() -> str:
            with Client(server) as client:
                flooding.wait(TIMEOUT)
                replies = [client.read(), *client.ask("EHLO a.com", *SEND)]
            server.stop()
            stopped.set()
            return replies[-1]

        body = "\r\n".join(["EHLO a.com", *SEND[:3], ""]).encode()
        self.assertEqual(in_threads(user, lambda: flood(b""), lambda: flood(body))[0], RECEIVED)
        self.assert_nothing_is_left(server)

    def test_stop_from_a_session(self) -> None:
        class Stopper(Recorder):
            def info_activity(self, message: str, /) -> None:
                super().info_activity(message)
                if message == "SMTP request: NOOP":
                    server.stop()

        stopper = Stopper()
        server = Server(logger=stopper, shutdown_timeout=0.1).start()
        with Client(server) as client:
            client.read()
            client.send(b"NOOP\r\n")
            stopper.wait_for("stopped")
        self.assertFalse(server.is_running)

    def test_a_logger_that_holds_up_a_session_does_not_hold_up_stop(self) -> None:
        release, held = threading.Event(), threading.Event()

        class Holder(Recorder):
            def info_activity(self, message: str, /) -> None:
                if message == "SMTP request: NOOP":
                    held.set()
                    release.wait(TIMEOUT)

        server = Server(logger=Holder(), shutdown_timeout=0).start()
        with Client(server) as client, mock.patch.object(smtpmock, "_join_all", wraps=smtpmock._join_all) as join_all:
            client.send(b"NOOP\r\n")
            held.wait(TIMEOUT)
            join_all.side_effect = lambda threads, timeout: mock.DEFAULT if timeout == 0 else release.set()
            server.stop()
            self.assertEqual([call.args[1] for call in join_all.call_args_list], [0, 5])
        release.set()

    # Sessions

    def test_silence(self) -> None:
        with Server(session_timeout=0.05, msg_session_timeout="421 wake up") as server, Client(server) as client:
            self.assertEqual([client.read() for _ in range(3)], ["220 Welcome", "421 wake up", "<closed>"])
            self.assertEqual(server.messages(), [])
        with Server(session_timeout=0.05) as server, Client(server) as client:
            client.read()
            client.ask("EHLO a.com", *SEND[:3])
            self.assertEqual(client.read(), "421 Session timeout, closing connection")
            self.assertEqual(len(server.messages()), 1)

    def test_each_delay(self) -> None:
        commands = {
            "helo": "HELO a.com", "mailfrom": SEND[0], "rcptto": SEND[1], "data": SEND[2], "message": SEND[3],
            "rset": "RSET", "noop": "NOOP", "quit": "QUIT",
        }  # fmt: skip
        for name in commands:
            recorder = Recorder()
            options: dict[str, Any] = {f"response_delay_{name}": 0.05}
            with self.subTest(name), Server(**options, logger=recorder) as server, Client(server) as client:
                client.read()
                for other, line in commands.items():
                    began = time.monotonic()
                    client.ask(line)
                    if other == name:
                        self.assertGreaterEqual(time.monotonic() - began, 0.05)

    def test_a_port_probe_records_nothing(self) -> None:
        recorder = Recorder()
        with Server(logger=recorder) as server:
            Client(server).reset()
            with Client(server) as client:
                client.read()
            recorder.wait_for("session finished")
            recorder.wait_for("session finished")
            self.assertEqual(server.messages(), [])

    def test_clients_that_vanish_are_recorded(self) -> None:
        for reset in (False, True):
            for lines in (["EHLO a.com"], ["EHLO a.com", *SEND[:2]], ["EHLO a.com", *SEND[:3]], ["\x00\udcff"]):
                with self.subTest(lines=lines, reset=reset), Server() as server:
                    with Client(server) as client:
                        client.read()
                        for line in lines:
                            client.send(line.encode("utf-8", "surrogateescape") + b"\r\n")
                            client.read()
                        client.send(b"half a line")
                        if reset:
                            client.reset()
                    (message,) = server.wait_for_messages(1, TIMEOUT)
                    self.assertEqual(message.helo, "EHLO a.com" in lines)
                    self.assertEqual(message.data, "DATA" in lines)
                    if message.data and not reset:
                        self.assertEqual(message.content, b"half a line")
                    with Client(server) as other:
                        self.assertEqual(other.read(), "220 Welcome")

    def test_half_closed(self) -> None:
        with Server() as server, Client(server) as client:
            client.send(b"EHLO a.com\r\n" + MAIL)
            client.socket.shutdown(socket.SHUT_WR)
            lines = [client.read() for _ in range(7)]
            self.assertEqual(lines[-2:], [RECEIVED, "<closed>"])

    def test_many_at_once(self) -> None:
        with Server() as server, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(server)) for _ in range(100)]
            for client in clients:
                self.assertEqual(client.read(), "220 Welcome")
            for client in clients:
                client.send(b"EHLO a.com\r\n" + MAIL + b"QUIT\r\n")
            self.assertEqual(len(server.wait_for_messages(100, TIMEOUT)), 100)

    def test_a_session_that_fails_is_logged(self) -> None:
        recorder = Recorder()
        with Server(logger=recorder) as server:
            with mock.patch.object(smtpmock._Session, "receive", side_effect=ZeroDivisionError("a bug")):
                with Client(server) as client:
                    client.read()
                    client.send(b"NOOP\r\n")
                    self.assertEqual(client.read(), "<closed>")
            level, _ = recorder.wait_for("ZeroDivisionError: a bug")
            self.assertEqual(level, "error")
            with Client(server) as client:
                self.assertEqual(client.read(), "220 Welcome")

    def test_repr(self) -> None:
        server = Server(host="::1")
        self.assertEqual(repr(server), "<smtpmock.Server on [::1]:0, not running>")
        with Server() as server:
            self.assertEqual(repr(server), f"<smtpmock.Server on 127.0.0.1:{server.port}>")


# ------------------------------------------------------------------------------------------- abuse


class GarbageTest(unittest.TestCase):
    """Bytes that no client would send, from a generator with a fixed seed."""

    PARTS: Sequence[bytes] = [
        b"EHLO a.com", b"HELO [1.2.3.4]", b"MAIL FROM:<a@a.com>", b"MAIL FROM:<>", b"RCPT TO:<b@b.com>", b"DATA", b".",
        b"RSET", b"NOOP", b"QUIT", b"FOO", b"", b"\x00", b"\xff\xfe", b"\r", b" ", b"\t", b"x" * 5000, "дядя".encode(),
    ]  # fmt: skip

    def make_line(self, rng: random.Random) -> bytes:
        line = bytearray(rng.choice(self.PARTS))
        for _ in range(rng.choice((0, 0, 0, 1, 3))):
            at = rng.randrange(len(line) + 1)
            line[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        return bytes(line).replace(b"\n", b"")[:6000]

    def test_in_memory(self) -> None:
        """Each line that is not of a body has one reply, and the records are consistent."""
        for seed in range(400):
            rng = random.Random(seed)
            options = {
                name: rng.random() < 0.3 for name in ("fail_fast", "multiple_rcptto", "multiple_message_receiving")
            }
            memory = Memory(**options, msg_size_limit=rng.choice((0, 20, 10_000)))
            replies: list[smtpmock._Reply] = []
            with self.subTest(seed=seed):
                for _ in range(30):
                    is_command = memory.session.body is None
                    is_over = bool(replies) and replies[-1].after is smtpmock._After.CLOSE
                    found = memory.feed(self.make_line(rng) + rng.choice((b"\n", b"\r\n")))
                    self.assertIn(len(found), (0,) if is_over else (1,) if is_command else (0, 1))
                    replies += found
                memory.session.end()
                accepted = sum(reply.text == RECEIVED and reply.accepts for reply in replies)
                for message in memory.messages():
                    self.assertEqual(message.is_consistent, bool(message.msg and message.rcpt_tos))
                    self.assertEqual(message.content.decode("utf-8", "surrogateescape"), message.msg_request)
                    self.assertLessEqual(len(message.rcpt_tos), len(message.rcptto_request_response))
                    self.assertTrue(repr(message))
                self.assertLessEqual(len(memory.messages()), 1 + accepted)

    def test_through_a_socket(self) -> None:
        with Server(session_timeout=TIMEOUT) as server:
            for seed in range(200):
                rng = random.Random(seed)
                with Client(server) as client:
                    lines = b"\r\n".join(self.make_line(rng) for _ in range(20))
                    with contextlib.suppress(ConnectionError):
                        client.send(lines + b"\r\n.\r\nQUIT\r\n")
                    if rng.random() < 0.5:
                        client.reset()
                    else:
                        while client.read() != "<closed>":
                            pass
            with Client(server) as client:
                self.assertEqual([client.read(), *client.ask("NOOP")], ["220 Welcome", "250 Ok"])

    def test_one_byte_at_a_time(self) -> None:
        with Server() as server, Client(server) as client:
            for byte in b"EHLO a.com\r\n" + MAIL + b"QUIT\r\n":
                client.send(bytes([byte]))
            while client.read() != "<closed>":
                pass
            self.assertTrue(server.messages()[0].is_consistent)

    def test_an_endless_line_or_body_is_not_kept(self) -> None:
        chunk = b"x" * 65536
        memory = Memory(msg_size_limit=1000)
        session = memory.session
        for _ in range(200):
            memory.feed(chunk)
            self.assertLess(len(session._rest), 5000)
        memory.feed(b"\r\nEHLO a.com\r\n" + "\r\n".join([*SEND[:3], ""]).encode())
        for _ in range(200):
            memory.feed(chunk)
            assert session.body is not None
            self.assertLess(len(session.body._raw), 5000)
        self.assertEqual([reply.text[:3] for reply in memory.feed(b"\r\n.\r\nNOOP\r\n")], ["552", "250"])


class ResourceTest(unittest.TestCase):
    """What a process may run out of, or do to its server."""

    def python(self, code: str) -> str:
        command = [sys.executable, "-W", "error", "-X", "dev", "-c", textwrap.dedent(code)]
        done = subprocess.run(command, cwd=HERE, timeout=TIMEOUT, capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return done.stdout

    @unittest.skipIf(sys.platform == "win32", "Windows has no such limit")
    def test_no_more_descriptors(self) -> None:
        """Those for whom there is none wait without being asked all the time, and are served once there are some."""
        code = """
            import resource, sys, smtpmock
            class Logger:
                def info_activity(self, message): pass
                def error(self, message): print(message, flush=True)
                info = warning = info_activity
            calls = 0
            get_request = smtpmock._Listener.get_request
            def counted(self):
                global calls
                calls += 1
                return get_request(self)
            smtpmock._Listener.get_request = counted
            with smtpmock.Server(logger=Logger()) as server:
                resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
                print(server.port, flush=True)
                sys.stdin.readline()
            print(calls, flush=True)
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=HERE, **pipes) as process, contextlib.ExitStack() as stack:
            self.addCleanup(process.kill)
            address = ("127.0.0.1", int(process.stdout.readline()))  # type: ignore[union-attr]
            clients = [stack.enter_context(socket.create_connection(address, TIMEOUT)) for _ in range(40)]
            self.assertIn("cannot take another client", process.stdout.readline())  # type: ignore[union-attr]
            for client in clients:  # each makes room for another
                self.assertEqual(client.recv(100), b"220 Welcome\r\n")
                client.close()
            out, err = process.communicate("stop\n", timeout=TIMEOUT)
        self.assertEqual((process.returncode, err), (0, ""))
        self.assertLess(int(out.splitlines()[-1]), 1000)

    def test_many_starts_and_stops(self) -> None:
        out = self.python("""
            import os, smtpmock, socket, threading
            server = smtpmock.Server().start()
            server.stop()
            count = len(os.listdir("/dev/fd")) if os.path.exists("/dev/fd") else 0
            for _ in range(200):
                with server, socket.create_connection((server.host, server.port), 10) as client:
                    client.recv(100)
            left = len(os.listdir("/dev/fd")) if count else 0
            print(left - count, threading.active_count())
        """)
        self.assertEqual(out, "0 1\n")

    def test_stop_while_clients_connect(self) -> None:
        before = set(threading.enumerate())
        for _ in range(10):
            server = Server(shutdown_timeout=0.1).start()
            stopped = threading.Event()

            def connect(server: Server = server, stopped: threading.Event = stopped) -> int:
                count = 0
                # Only until the first refusal: one of many tries to reach a port that is free would get that port for
                # its own end, and connect to itself. And not for long: Linux may forget a connection that is made
                # while the listening socket is closed, and tell the client nothing.
                with contextlib.suppress(OSError):
                    while not stopped.is_set():
                        with Client(server) as client:
                            client.socket.settimeout(1)
                            count += client.read() == "220 Welcome"
                return count

            def stop(server: Server = server, stopped: threading.Event = stopped) -> None:
                with Client(server) as client:
                    client.read()
                server.stop()
                stopped.set()

            self.assertEqual(in_threads(stop, connect, connect, connect)[0], None)
            self.assertEqual(set(threading.enumerate()) - before, set())

    @unittest.skipUnless(hasattr(os, "fork"), "this system cannot fork")
    def test_fork(self) -> None:
        """A child has the server's sockets but not its threads; what it does with them is not the parent's matter."""
        out = self.python("""
            import os, smtplib, smtpmock, socket, time, warnings
            warnings.simplefilter("ignore", DeprecationWarning)
            with smtpmock.Server() as server, smtplib.SMTP(server.host, server.port, timeout=10) as client:
                (connection,) = server._listener.connections
                child = os.fork()
                if child == 0:
                    server.stop()
                    assert connection.request.fileno() == -1
                    server.start()
                    with smtplib.SMTP(server.host, server.port, timeout=10) as own:
                        own.sendmail("child@a.com", ["b@b.com"], "hi")
                    server.stop()
                    os._exit(0 if len(server.messages()) == 1 else 1)
                assert os.waitpid(child, 0)[1] == 0
                used = time.process_time()
                client.sendmail("a@a.com", ["b@b.com"], "hi")
                with smtplib.SMTP(server.host, server.port, timeout=10) as other:
                    other.sendmail("a@a.com", ["b@b.com"], "hi")
                print([message.mail_from for message in server.messages()])
        """)
        self.assertEqual(out, "['a@a.com', 'a@a.com']\n")

    def test_an_exit_with_a_running_server(self) -> None:
        out = self.python("""
            import smtplib, smtpmock, sys
            server = smtpmock.Server(response_delay_noop=100).start()
            client = smtplib.SMTP(server.host, server.port, timeout=10)
            client.putcmd("noop")
            client.close()
            print("end")
        """)
        self.assertEqual(out, "end\n")


# ------------------------------------------------------------------------------------ real clients


class SmtplibTest(unittest.TestCase):
    """smtplib in its usual manners."""

    def serve(self, **options: Any) -> tuple[Server, smtplib.SMTP]:
        server = Server(**options).start()
        self.addCleanup(server.stop)
        client = smtplib.SMTP(server.host, server.port, timeout=TIMEOUT)
        self.addCleanup(client.close)
        return server, client

    def test_it_is_there_when_sendmail_returns(self) -> None:
        server, client = self.serve(multiple_message_receiving=True)
        with client:
            for count in range(1, 20):
                client.sendmail("a@a.com", ["b@b.com"], f"Subject: {count}\r\n\r\nhi\r\n")
                messages = server.messages()
                self.assertEqual(len(messages), count)
                self.assertEqual(messages[-1].content, f"Subject: {count}\r\n\r\nhi\r\n".encode())
        self.assertTrue(server.messages()[-1].quit_sent)
        self.assertTrue(all(message.is_consistent for message in server.messages()))

    def test_the_last_mail_by_default(self) -> None:
        server, client = self.serve()
        with client:
            for text in ("one", "two"):
                client.sendmail("a@a.com", ["b@b.com"], text)
                self.assertEqual([message.msg_request for message in server.messages()], [text + "\r\n"])

    def test_recipients(self) -> None:
        recipients = ["b@b.com", "c@c.com", "d@d.com"]
        server, client = self.serve(multiple_rcptto=True)
        client.sendmail("a@a.com", recipients, "hi")
        self.assertEqual(server.messages()[0].rcpt_tos, recipients)
        server, client = self.serve()
        client.sendmail("a@a.com", recipients, "hi")
        self.assertEqual(server.messages()[0].rcpt_tos, recipients[-1:])

    def test_partial_refusals(self) -> None:
        server, client = self.serve(multiple_rcptto=True, not_registered_emails=["c@c.com"])
        refused = client.sendmail("a@a.com", ["b@b.com", "c@c.com"], "hi")
        self.assertEqual(refused, {"c@c.com": (550, b"User not found")})
        (message,) = server.messages()
        self.assertEqual(message.rcpt_tos, ["b@b.com"])
        request, response = message.rcptto_request_response[1]
        self.assertEqual((request.lower(), response), ("rcpt to:<c@c.com>", "550 User not found"))

    def test_refusals(self) -> None:
        server, client = self.serve(not_registered_emails=["c@c.com"], blacklisted_mailfrom_emails=["x@a.com"])
        with self.assertRaises(smtplib.SMTPRecipientsRefused):
            client.sendmail("a@a.com", ["c@c.com"], "hi")
        client.sendmail("a@a.com", ["b@b.com"], "hi")
        self.assertTrue(server.messages()[0].is_consistent)
        with self.assertRaises(smtplib.SMTPSenderRefused):
            client.sendmail("x@a.com", ["b@b.com"], "hi")

    def test_too_long(self) -> None:
        server, client = self.serve(msg_size_limit=1000)
        with self.assertRaises(smtplib.SMTPDataError) as caught:
            client.sendmail("a@a.com", ["b@b.com"], "x\r\n" * 100_000)
        self.assertEqual(caught.exception.smtp_code, 552)
        client.sendmail("a@a.com", ["b@b.com"], "short")
        self.assertEqual(server.messages()[0].content, b"short\r\n")

    def test_bodies(self) -> None:
        server, client = self.serve(multiple_message_receiving=True)
        for body in (
            b"\xff\x00 8-bit\r\n",
            ".dots\r\n..\r\n.\r\n",
            "",
            "no end",
            "ünïcode\r\n".encode(),
            b"x" * 300_000,
        ):
            client.sendmail("a@a.com", ["b@b.com"], body)
            sent = body if isinstance(body, bytes) else body.encode()
            sent += b"" if sent.endswith(b"\r\n") or sent == b"" else b"\r\n"
            self.assertEqual(server.messages_and_purge()[0].content.removesuffix(b"\r\n"), sent.removesuffix(b"\r\n"))

    def test_other_commands(self) -> None:
        server, client = self.serve()
        self.assertEqual(client.helo("a.com"), (250, b"Received"))
        self.assertEqual(client.noop(), (250, b"Ok"))
        self.assertEqual(client.rset(), (250, b"Ok"))
        self.assertEqual(client.verify("b@b.com")[0], 502)
        self.assertEqual(client.quit(), (221, b"Closing connection"))
        self.assertTrue(server.messages()[0].quit_sent)


# ----------------------------------------------------------------------------------------- logging


class LoggingTest(unittest.TestCase):
    SESSION: Sequence[str] = [
        "SMTP session started",
        "SMTP response: 220 Welcome",
        "SMTP request: EHLO example.com",
        "SMTP response: 250 Received",
        r"SMTP request: \x00\x1b[1m\xe4\udcff",
        f"SMTP response: {UNRECOGNIZED}",
        "SMTP request: QUIT",
        "SMTP response: 221 Closing connection",
        "SMTP session finished",
    ]

    def run_session(self, server: Server) -> None:
        with server, Client(server) as client:
            client.read()
            for line in (b"EHLO example.com", b"\x00\x1b[1m\xc3\xa4\xff", b"QUIT"):
                client.send(line + b"\r\n")
                client.read()
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
        stamp = re.compile(r"(?<=: )\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{6} ")
        lines = out.getvalue().splitlines()
        self.assertTrue(all(stamp.search(line) for line in lines))
        # The last line of the session and the first of the stop are by two threads.
        self.assertEqual(sorted(stamp.sub("", line) for line in lines), sorted(expected))

    def test_without_activity(self) -> None:
        cases: list[tuple[dict[str, Any], int]] = [({"log_to_stdout": True}, 3), ({"log_server_activity": True}, 0)]
        for options, count in [*cases, ({}, 0)]:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                self.run_session(Server(**options))
            self.assertEqual(len(out.getvalue().splitlines()), count)

    def test_errors_go_to_stderr(self) -> None:
        with Server() as first, contextlib.redirect_stderr(io.StringIO()) as err:
            with self.assertRaises(ServerStartError):
                Server(port=first.port, log_to_stdout=True).start()
        self.assertRegex(err.getvalue(), "^ERROR: .* cannot listen on ")

    def test_a_narrow_encoding(self) -> None:
        raw = io.BytesIO()
        with io.TextIOWrapper(raw, "ascii", write_through=True) as out, contextlib.redirect_stdout(out):
            with Server(log_to_stdout=True, log_server_activity=True, msg_greeting="220 ä") as server:
                with Client(server) as client:
                    client.read()
            self.assertIn(rb"response: 220 \xe4", raw.getvalue())

    def test_a_custom_logger(self) -> None:
        recorder = Recorder()
        self.run_session(Server().with_logger(recorder))
        recorder.wait_for("stopped")
        activity = [text for level, text in recorder.seen if level == "activity"]
        self.assertEqual(activity, list(self.SESSION))
        self.assertEqual([level for level, _ in recorder.seen if level != "activity"], ["info", "warning", "info"])

    def test_a_standard_logger(self) -> None:
        with self.assertLogs("smtpmock.test", "DEBUG") as logs:
            self.run_session(Server(logger=logging.getLogger("smtpmock.test")))
        self.assertIn("INFO:smtpmock.test:SMTP request: EHLO example.com", logs.output)
        self.assertEqual(logs.records[-2].levelname, "WARNING")

    def test_bodies_are_not_logged(self) -> None:
        recorder = Recorder()
        with Server(logger=recorder) as server, Client(server) as client:
            client.send(b"EHLO a.com\r\n" + MAIL.replace(b"body", b"secret") + b"QUIT\r\n")
            recorder.wait_for("finished")
        text = str(recorder.seen)
        self.assertNotIn("secret", text)
        self.assertIn("SMTP request: message binary data portion", text)

    def test_a_logger_that_raises(self) -> None:
        class Broken:
            def info(self, message: str, /) -> None:
                raise ZeroDivisionError

            warning = error = info

        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.run_session(server := Server(logger=Broken()))
        self.assertEqual(err.getvalue(), "smtpmock: the log is incomplete, its logger raised ZeroDivisionError()\n")
        self.assertTrue(server.messages()[0].quit_sent)

    def test_a_closed_stdout(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            out.close()
            self.run_session(server := Server(log_to_stdout=True, log_server_activity=True))
        self.assertTrue(server.messages()[0].quit_sent)
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            self.run_session(Server(log_to_stdout=True, log_server_activity=True))


# ------------------------------------------------------------------------------------ command line


def flags(name: str) -> tuple[str, str]:
    """An option's flag, as in go-smtp-mock and as GNU programs have it."""
    return "-" + re.sub("_(.)", lambda match: match[1].upper(), name), "--" + name.replace("_", "-")


class CommandLineTest(unittest.TestCase):
    def call(self, *argv: str) -> tuple[int, str, str]:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = smtpmock.main(argv)
        return status, out.getvalue(), err.getvalue()

    def parse(self, *argv: str) -> dict[str, Any]:
        with mock.patch.object(smtpmock, "_serve") as serve, mock.patch.object(smtpmock, "Server", dict):
            self.assertEqual(self.call(*argv), (0, "", ""))
        options: dict[str, Any] = serve.call_args.args[0]
        return options

    def test_every_option_has_both_flags(self) -> None:
        for field in dataclasses.fields(Configuration):
            if field.name.startswith("log_") or field.name == "ssl_context":
                continue
            kind = field.metadata["kind"]
            text, value = {
                smtpmock._FLAG: ("true", True),
                smtpmock._NAMES: ("a, b,,c", ["a", "b", "c"]),
                smtpmock._TEXT: ("a = b", "a = b"),
                smtpmock._SECONDS: ("0.5", 0.5),
                smtpmock._TIMEOUT: ("2", 2.0),
                smtpmock._PORT: ("25", 25),
                smtpmock._COUNT: ("9", 9),
                smtpmock._SEED: ("-9", -9),
                smtpmock._WORDS: ("SIZE, DSN", ["SIZE", "DSN"]),
                smtpmock._USERS: ("u:s:t, v:", {"u": "s:t", "v": ""}),
            }[kind]
            for flag in flags(field.name):
                self.assertEqual(self.parse(f"{flag}={text}"), {field.name: value})
                self.assertEqual(self.parse(flag, text), {field.name: value})

    def test_flags(self) -> None:
        for name in ("log", "fail_fast"):
            fields = ["log_to_stdout", "log_server_activity"] if name == "log" else [name]
            for flag in flags(name):
                for text, value in {"": True, "=true": True, "=1": True, "=False": False, "=0": False}.items():
                    self.assertEqual(self.parse(flag + text, "-port=1"), {**dict.fromkeys(fields, value), "port": 1})
        self.assertEqual(self.parse("-msgNoopReceived=", "-blacklistedHeloDomains="), {
            "msg_noop_received": "", "blacklisted_helo_domains": [],
        })  # fmt: skip

    def test_version(self) -> None:
        for flag in ("-v", "--version"):
            status, out, err = self.call(flag, "-port=1")
            self.assertEqual((status, out.splitlines()[0], err), (0, f"smtpmock: {smtpmock.__version__}", ""))

    def test_help(self) -> None:
        for flag in ("-h", "--help"):
            status, out, err = self.call(flag)
            self.assertEqual((status, err), (0, ""))
            text = " ".join(out.split())
            self.assertIn("-log", text)
            for field in dataclasses.fields(Configuration):
                if not field.name.startswith("log_") and field.name != "ssl_context":
                    self.assertIn(" ".join(flags(field.name)[0].split()), text)
                    self.assertIn(field.metadata["about"], text)

    def test_errors(self) -> None:
        for argv, expected in {
            ("-port=99999",): "smtpmock: port=99999: must be an integer from 0 to 65535\n",
            ("-port=x",): "smtpmock: port='x': must be an integer from 0 to 65535\n",
            ("-port=",): "smtpmock: port='': must be an integer from 0 to 65535\n",
            ("-port", "-1"): "smtpmock: port=-1: must be an integer from 0 to 65535\n",
            ("-log=maybe",): "smtpmock: log='maybe': must be true or false\n",
            ("-prot=1",): "smtpmock: -prot: there is no such flag; did you mean -port?\n",
            (
                "--multiple-rcpto",
            ): "smtpmock: --multiple-rcpto: there is no such flag; did you mean --multiple-rcptto?\n",
            ("-port",): "smtpmock: argument -port/--port: expected one argument\n",
            ("stray",): "smtpmock: unrecognized arguments: stray\n",
            ("-sessionTimeout=nan",): (
                "smtpmock: session_timeout=nan: must be a number of seconds from 0.001 to 1000000\n"
            ),
        }.items():
            with self.subTest(argv=argv):
                self.assertEqual(self.call(*argv), (2, "", expected))

    def test_rules(self) -> None:
        """Each action is what the method of the same name makes."""
        cases: dict[str, Any] = {
            "RCPT bob@example.com: reply 550 5.1.1 No such user": lambda on: on("RCPT", "bob@example.com").reply(
                "550 5.1.1 No such user"
            ),
            "MAIL FROM a.com: reply 450 x; times=2 ; probability=0.5;close": lambda on: on("MAIL", "a.com").reply(
                "450 x", times=2, probability=0.5, close=True
            ),
            "message: reply 451 a | | 452 b; close=false": lambda on: on("message").reply("451 a", None, "452 b"),
            "RCPT a@[IPv6:::1]: reply 550 no: never": lambda on: on("RCPT", "a@[IPv6:::1]").reply("550 no: never"),
            "*: delay 0.2": lambda on: on("*").delay(0.2),
            "message: drop; after=4096": lambda on: on("message").drop(after=4096),
            "DATA: drop 354 go": lambda on: on("DATA").drop("354 go"),
            "message: reset ;after=0": lambda on: on("message").reset(after=0),
            "connect: silence; times=1": lambda on: on("connect").silence(times=1),
            r"noop: raw \xff\0 é\r\n": lambda on: on("NOOP").raw(b"\xff\0 \xe9\r\n"),
            "*: trickle 1": lambda on: on("*").trickle(1),
        }
        for text, make in cases.items():
            with self.subTest(text), mock.patch.object(smtpmock, "_serve") as serve:
                self.assertEqual(self.call("-rule", text, f"--rule={text}"), (0, "", ""))
                server = Server()
                make(server.on)
                (expected,) = server._rules.newest_first
                for rule in serve.call_args.args[0]._rules.newest_first:
                    for name in ("_stage", "_match", "_actions", "_after", "_times", "_probability"):
                        self.assertEqual(getattr(rule, name), getattr(expected, name))
                self.assertEqual(len(serve.call_args.args[0]._rules.newest_first), 2)

    def test_bad_rules(self) -> None:
        for rule, expected in {
            "RCPT reply": "must be 'STAGE: ACTION' or 'STAGE ADDRESS: ACTION'",
            ": drop": "must be 'STAGE: ACTION' or 'STAGE ADDRESS: ACTION'",
            "a b c d: drop": "must be 'STAGE: ACTION' or 'STAGE ADDRESS: ACTION'",
            "RCPT: rply 450": "'rply' must be reply or delay or drop or reset or silence or raw or trickle",
            "RCPT: reply": "reply=(): must be one string or more",
            "RCPT: reply 450; tims=2": "'tims' must be times or probability or close",
            "RCPT: reply 450; times=x": "times='x': must be an integer from 1 up",
            "RCPT: reply 450; times": "times='true': must be an integer from 1 up",
            "RCPT: delay soon": "delay='soon': must be a number of seconds from 0 to 1000000",
            "RCPT: drop; after=1": "after=1: is for the stage message, not for RCPT",
            "RCPT: silence please": "'please' must not be after silence",
            r"RCPT: raw \x": r"raw='\\x': must be bytes",
        }.items():
            with self.subTest(rule):
                self.assertEqual(self.call("-rule", rule), (2, "", f"smtpmock: rule {rule!r}: {expected}\n"))

    def test_outputs(self) -> None:
        for argv, expected in {
            ("-json=maybe",): (2, "smtpmock: json='maybe': must be true or false\n"),
            ("-saveDir=/dev/null/x",): (1, "smtpmock: cannot write to /dev/null/x: Not a directory\n"),
            ("--maildir", "/dev/null/x"): (1, "smtpmock: cannot write to /dev/null/x: Not a directory\n"),
            ("-saveDir=/proc/x",): (1, "smtpmock: cannot write to /proc/x: No such file or directory\n"),
        }.items():
            with self.subTest(argv=argv):
                status, text = expected
                self.assertEqual(self.call(*argv), (status, "", text))

    def test_port_in_use(self) -> None:
        with Server() as server:
            status, out, err = self.call(f"-port={server.port}")
            self.assertEqual((status, out), (1, ""))
            self.assertRegex(err, rf"\Asmtpmock: cannot listen on 127\.0\.0\.1:{server.port}: [^\n]*in use\n\Z")

    @unittest.skipUnless(threading.current_thread() is threading.main_thread(), "signals reach the main thread only")
    def test_in_this_process(self) -> None:
        """A run of main(), with a mail, until a signal; and one cut short by another."""
        for second in (False, True):
            lines: queue.SimpleQueue[str] = queue.SimpleQueue()
            out = mock.Mock(encoding="utf-8", write=lines.put)

            def user(*, second: bool = second, lines: queue.SimpleQueue[str] = lines) -> None:
                port = int(lines.get(timeout=TIMEOUT).rpartition(":")[2])
                with smtplib.SMTP("127.0.0.1", port, timeout=TIMEOUT) as client:
                    client.sendmail("a@a.com", ["b@b.com"], "hi")
                    if second:
                        client.putcmd("rset")
                        while "request: rset" not in lines.get(timeout=TIMEOUT):
                            pass
                    signal.raise_signal(signal.SIGTERM)
                    while second and "shutdown mode" not in lines.get(timeout=TIMEOUT):
                        pass
                    if second:
                        signal.raise_signal(signal.SIGINT)
                    with contextlib.suppress(smtplib.SMTPException):
                        client.getreply()
                    client.close()

            thread = threading.Thread(target=user)
            handler = signal.getsignal(signal.SIGTERM)
            with contextlib.redirect_stdout(out):
                thread.start()
                delays = [f"-responseDelayRset={10 * TIMEOUT}", f"-shutdownTimeout={10 * TIMEOUT}"]
                self.assertEqual(smtpmock.main(["-log", *delays]), 0)
            thread.join(TIMEOUT)
            self.assertIs(signal.getsignal(signal.SIGTERM), handler)


class ProcessCase(unittest.TestCase):
    def start(self, *argv: str, **arguments: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "smtpmock", *argv],
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE, **arguments,
        )  # fmt: skip
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def port(self, process: subprocess.Popen[str]) -> int:
        assert process.stdout is not None
        match = re.fullmatch(r"smtpmock: listening on 127\.0\.0\.1:(\d+)\n", process.stdout.readline())
        assert match is not None
        return int(match[1])

    def send(self, port: int, *mails: bytes) -> None:
        with smtplib.SMTP("127.0.0.1", port, timeout=TIMEOUT) as client:
            for mail in mails:
                client.sendmail("a@a.com", ["b@b.com"], mail)


class ProcessTest(ProcessCase):
    """The command line as a process, with real signals."""

    def test_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            with self.subTest(number.name):
                process = self.start("-responseDelayNoop=0.01")
                with smtplib.SMTP("127.0.0.1", self.port(process), timeout=TIMEOUT) as client:
                    client.sendmail("a@a.com", ["b@b.com"], "hi")
                    process.send_signal(number)
                    self.assertEqual(client.getreply()[0], 421)
                    client.close()
                self.assertEqual(process.communicate(timeout=TIMEOUT), ("", ""))
                self.assertEqual(process.returncode, 0)

    def test_a_second_signal(self) -> None:
        process = self.start("-log", f"-responseDelayNoop={10 * TIMEOUT}", f"-shutdownTimeout={10 * TIMEOUT}")
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", self.port(process)), TIMEOUT) as client:
            client.sendall(b"NOOP\r\n")
            for line, number in (("request: NOOP", signal.SIGTERM), ("shutdown mode", signal.SIGTERM)):
                while line not in process.stdout.readline():
                    pass
                process.send_signal(number)
            self.assertEqual(client.recv(100), b"220 Welcome\r\n")
            self.assertEqual(client.recv(100), b"")
        out, err = process.communicate(timeout=TIMEOUT)
        self.assertIn("force stopped", out)
        self.assertEqual((process.returncode, err), (0, ""))

    def test_errors(self) -> None:
        for argv, status in {("-prot=1",): 2, ("-host=192.0.2.1",): 1}.items():
            process = self.start(*argv)
            out, err = process.communicate(timeout=TIMEOUT)
            self.assertEqual((process.returncode, out, len(err.splitlines())), (status, "", 1))

    def test_a_killed_one_leaves_its_port(self) -> None:
        process = self.start()
        port = self.port(process)
        for _ in range(3):
            with smtplib.SMTP("127.0.0.1", port, timeout=TIMEOUT) as client:
                client.noop()
                process.kill()
                process.wait(TIMEOUT)
            process = self.start(f"-port={port}")
            self.assertEqual(self.port(process), port)

    def test_a_closed_stdout(self) -> None:
        process = self.start("-log")
        port = self.port(process)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        with smtplib.SMTP("127.0.0.1", port, timeout=TIMEOUT) as client:
            client.sendmail("a@a.com", ["b@b.com"], "hi")
        process.terminate()
        self.assertRegex(process.stderr.read(), r"\Asmtpmock: the log is incomplete[^\n]*BrokenPipe[^\n]*\n\Z")
        self.assertEqual(process.wait(TIMEOUT), 0)

    @unittest.skipUnless(os.path.exists("/dev/full"), "this system has no /dev/full")
    def test_a_stdout_that_takes_nothing(self) -> None:
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "smtpmock"]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=HERE, timeout=TIMEOUT, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr.decode(), r"\Asmtpmock: cannot write to stdout: [^\n]*\n\Z")


class OutputTest(ProcessCase):
    """What the command line does with the mail."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name, "made", "as needed")

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def test_json(self) -> None:
        process = self.start("-json", "-log")
        assert process.stdout is not None
        listening = json.loads(process.stdout.readline())["listening"]
        self.assertEqual(listening["host"], "127.0.0.1")
        self.send(listening["port"], b"Subject: one\r\n\r\n\xff", b"Subject: two")
        with smtplib.SMTP("127.0.0.1", listening["port"], timeout=TIMEOUT) as client:
            client.ehlo("a.com")
            client.mail("nobody")
        with socket.create_connection(("127.0.0.1", listening["port"]), TIMEOUT):
            pass  # a probe is no session
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.terminate()
        out, err = process.communicate(timeout=TIMEOUT)
        self.assertEqual((out, process.returncode), ("", 0))
        self.assertIn("SMTP request: message binary data portion", err)
        self.assertEqual([line["subject"] for line in lines], ["one", "two", None])
        self.assertEqual([line["is_consistent"] for line in lines], [True, True, False])
        self.assertEqual([line["id"] for line in lines], [1, 2, 3])
        self.assertEqual((lines[0]["content_encoding"], lines[1]["content"]), ("base64", "Subject: two\r\n"))
        self.assertTrue(lines[2]["transcript"].endswith("S: 221 Closing connection\nS: <closed>"))

    def test_json_to_nobody(self) -> None:
        process = self.start("-json")
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["listening"]["port"]
        process.stdout.close()
        with self.assertRaises(smtplib.SMTPDataError) as caught:
            self.send(port, b"hi")
        self.assertEqual(caught.exception.smtp_code, 451)

    def test_save_dir(self) -> None:
        for begin in (1, 3):
            process = self.start(f"-saveDir={self.folder}")
            self.send(self.port(process), b"Subject: first\r\n\r\n\xff", b"Subject: second")
            numbers = range(1, begin + 2)
            self.assertEqual(self.names(), sorted(f"{n:06d}.{kind}" for n in numbers for kind in ("eml", "json")))
            mail = (self.folder / f"{begin:06d}.eml").read_bytes()
            self.assertRegex(
                mail,
                rb"\AReturn-Path: <a@a.com>\r\nReceived: from [^;]*;\r\n[^\r]*\r\nSubject: first\r\n\r\n\xff\r\n\Z",
            )
            record = json.loads((self.folder / f"{begin + 1:06d}.json").read_text())
            self.assertEqual((record["subject"], record["id"]), ("second", 2))
            process.kill()

    def test_two_processes_in_one_folder(self) -> None:
        ports = [self.port(self.start(f"-saveDir={self.folder}")) for _ in range(2)]
        in_threads(*(lambda port=port: self.send(port, *[b"hi"] * 20) for port in ports for _ in range(4)))
        self.assertEqual(self.names(), sorted(f"{n:06d}.{kind}" for n in range(1, 161) for kind in ("eml", "json")))

    def test_a_disk_that_fills(self) -> None:
        import resource

        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))  # noqa: E731
        process = self.start(f"-saveDir={self.folder}", f"-maildir={self.folder / 'mail'}", preexec_fn=limit)
        port = self.port(process)
        with self.assertRaises(smtplib.SMTPDataError) as caught:
            self.send(port, b"x" * 18000)
        self.assertEqual(caught.exception.smtp_code, 451)
        self.assertEqual(self.names(), ["mail"])
        self.send(port, b"Subject: small")
        self.assertEqual(self.names(), ["000002.eml", "000002.json", "mail"])
        process.terminate()
        self.assertRegex(process.communicate(timeout=TIMEOUT)[1], r"(?s)\A\Z|File too large")

    def test_maildir(self) -> None:
        import mailbox

        process = self.start(f"--maildir={self.folder}")
        port = self.port(process)
        in_threads(*[lambda: self.send(port, b"Subject: =?utf-8?q?=E2=82=AC?=\r\n\r\nhi")] * 8)
        mails = list(mailbox.Maildir(self.folder, create=False))
        self.assertEqual(len(mails), 8)
        self.assertEqual((mails[0]["Return-Path"], mails[0].get_payload()), ("<a@a.com>", "hi\n"))
        self.assertEqual(list((self.folder / "tmp").iterdir()), [])

    def test_killed_at_any_moment(self) -> None:
        """Every mail that got its 250 is a whole file."""
        rng = random.Random()
        for _ in range(int(os.environ.get("SMTPMOCK_KILLS", "2"))):
            process = self.start(f"-saveDir={self.folder}")
            port = self.port(process)
            accepted: queue.SimpleQueue[str] = queue.SimpleQueue()

            def send(name: str, port: int = port, accepted: Any = accepted) -> None:
                with contextlib.suppress(OSError, smtplib.SMTPException), smtplib.SMTP("127.0.0.1", port) as client:
                    for count in range(125):
                        client.sendmail("a@a.com", ["b@b.com"], f"Subject: {name}-{count}\n\n{'x' * 5000}\nend")
                        accepted.put(f"{name}-{count}")

            killer = threading.Timer(rng.uniform(0, 0.5), process.kill)
            killer.start()
            in_threads(*(lambda name=name: send(name) for name in "abcdefgh"))
            killer.join()
            process.wait(TIMEOUT)
            subjects = set()
            for path in self.folder.glob("[0-9]*.eml"):
                mail = path.read_text()
                self.assertTrue(mail.endswith(f"\n\n{'x' * 5000}\nend\n"), path)
                subjects.add(mail.partition("Subject: ")[2].partition("\n")[0])
                record = json.loads(path.with_suffix(".json").read_text())
                self.assertTrue(record["content"].endswith("end\r\n"))
            self.assertLessEqual({accepted.get() for _ in range(accepted.qsize())}, subjects)
            for path in self.folder.iterdir():
                path.unlink()


# --------------------------------------------------------------------------------- the file itself


class ModuleTest(unittest.TestCase):
    def python(self, code: str, folder: str | Path = HERE) -> str:
        command = [sys.executable, "-W", "error", "-c", code]
        return subprocess.run(command, cwd=folder, timeout=TIMEOUT, check=True, capture_output=True, text=True).stdout

    def test_what_it_imports(self) -> None:
        code = "import sys, __future__, queue, struct, socketserver, selectors, re, typing, dataclasses; before = set(sys.modules)\n"
        code += "import smtpmock; smtpmock.Server().start().stop(); print(*sorted(set(sys.modules) - before))"
        self.assertEqual(self.python(code).split(), ["smtpmock"])

    def test_what_it_offers(self) -> None:
        public = {name for name, value in vars(smtpmock).items() if getattr(value, "__module__", "") == "smtpmock"}
        public = {name for name in public if not name.startswith("_")}
        self.assertEqual(public, set(smtpmock.__all__))
        for name in public:
            self.assertTrue(getattr(smtpmock, name).__doc__, name)

    def test_nothing_is_used_above_its_definition(self) -> None:
        """All but annotations and main() refers upwards only."""
        tree = ast.parse((HERE / "smtpmock.py").read_bytes())
        defined = {node.name: node.lineno for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        annotations = {
            id(name)
            for node in ast.walk(tree)
            for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
            if part is not None
            for name in ast.walk(part)
        }
        for node in tree.body:
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and id(name) not in annotations and getattr(node, "name", "") != "main":
                    self.assertGreaterEqual(name.lineno, defined.get(name.id, 0), f"{name.id} in line {name.lineno}")

    def test_a_test_that_forgets_its_server_can_end(self) -> None:
        code = "import smtpmock, socket; s = smtpmock.Server().start()\n"
        code += "c = socket.create_connection((s.host, s.port)); c.recv(99); print('end')"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=HERE, timeout=TIMEOUT, capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "end\n", ""))


class ReadmeTest(unittest.TestCase):
    """The README is true."""

    def setUp(self) -> None:
        self.text = (HERE / "README.md").read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, re.MULTILINE | re.DOTALL)

    def test_the_first_example_is_short_and_works_beside_a_copy_of_the_file(self) -> None:
        example = self.blocks("python")[0]
        self.assertLessEqual(len(example.splitlines()), 10)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "smtpmock.py").write_bytes((HERE / "smtpmock.py").read_bytes())
            command = [sys.executable, "-W", "error", "-c", example]
            subprocess.run(command, cwd=folder, timeout=TIMEOUT, check=True)

    def test_python_examples(self) -> None:
        pytest = types.ModuleType("pytest")
        pytest.fixture = lambda function=None, **_: function or (lambda function: function)  # type: ignore[attr-defined]
        for example in self.blocks("python"):
            with self.subTest(example), mock.patch.dict(sys.modules, pytest=pytest):
                space: dict[str, Any] = {"__name__": "readme"}
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    exec(compile(example, "README.md", "exec"), space)
                    self.run_tests_of(space)

    def run_tests_of(self, space: dict[str, Any]) -> None:
        """What an example defines: unittest's classes, and pytest's functions with a fixture."""
        for value in list(space.values()):
            if isinstance(value, type) and issubclass(value, unittest.TestCase):
                result = unittest.TestResult()
                unittest.defaultTestLoader.loadTestsFromTestCase(value).run(result)
                self.assertEqual((result.errors, result.failures), ([], []))
                self.assertGreater(result.testsRun, 0)
        for name, function in list(space.items()):
            if name.startswith("test_"):
                with contextlib.ExitStack() as stack:
                    function(*self.fixtures(function, space, stack))

    def fixtures(self, function: Any, space: dict[str, Any], stack: contextlib.ExitStack) -> Iterator[Any]:
        """The values of its parameters, which functions of these names yield or return, as in pytest."""
        for name in inspect.signature(function).parameters:
            value = space[name](*self.fixtures(space[name], space, stack))
            if inspect.isgenerator(value):
                stack.callback(next, value, None)
            yield next(value) if inspect.isgenerator(value) else value

    def test_commands(self) -> None:
        """Every command line of the README is one that the parser takes."""
        lines = [line for block in self.blocks("sh") for line in block.splitlines()]
        commands = [shlex.split(line.partition("-m smtpmock")[2]) for line in lines if "-m smtpmock" in line]
        self.assertTrue(commands)
        for argv in commands:
            with mock.patch.object(smtpmock, "_serve"), contextlib.redirect_stdout(io.StringIO()):
                self.assertEqual(smtpmock.main(argv), 0, argv)

    def test_options(self) -> None:
        rows = re.findall(r"^\| `(\w+)` \| `(\S+)` \| (.*?) \| (.*?) \|$", self.text, re.MULTILINE)
        expected = []
        for field in dataclasses.fields(Configuration):
            flag = "-log" if field.name.startswith("log_") else flags(field.name)[0]
            flag = "-tlsCert" if field.name == "ssl_context" else flag
            default = "empty" if isinstance(field.default, frozenset) else f"`{field.default}`"
            expected.append((field.name, flag, default, field.metadata["about"]))
        self.assertEqual([row for row in rows if row[0] in Configuration.__dataclass_fields__], expected)

    def test_names(self) -> None:
        """What the README's tables of names speak of is there."""
        for name in smtpmock.__all__:
            self.assertIn(name, self.text)
        public = [*FIELDS, *DERIVED]
        for name in public + [name for name in dir(Server) if not name.startswith("_")]:
            self.assertIn(f"{name}", self.text)
        self.assertIn(smtpmock.__version__, self.text)


if __name__ == "__main__":
    unittest.main()
