"""An SMTP server for tests: it records the mail it is sent, and misbehaves as it is told.

    with smtpmock.Server() as server, smtplib.SMTP(server.host, server.port) as client:
        client.sendmail("alice@example.com", ["bob@example.com"], "Subject: Hi\\r\\n\\r\\nHello")
        (message,) = server.messages()
        assert message.mail_from == "alice@example.com"
        assert message.content == b"Subject: Hi\\r\\n\\r\\nHello\\r\\n"

One module, the standard library only, one thread per connection. It reads from top to bottom:

    errors          what can go wrong, each also the built-in error it resembles
    options         Configuration: every option, its default and what it does
    grammar         the patterns of RFC 5321, and the parser of a command line
    records         what the server answers, and what it keeps of a session
    rules           where it deviates from that on purpose
    handlers        the generic life of a command, and one class per command
    session         one SMTP conversation, without a socket in it
    mailbox         the list of recorded messages
    logger          the Logger protocol, and the default logger
    server          the connection, the listener, and Server, which holds it
    command line    python -m smtpmock

MIT licence, https://opensource.org/licenses/MIT. Copyright 2026 the smtpmock authors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import functools
import itertools
import os
import re
import selectors
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import datetime
    from email.message import EmailMessage

__version__ = "0.1.0"

__all__ = [
    "Action",
    "Attachment",
    "Configuration",
    "ConfigurationError",
    "Handler",
    "Logger",
    "Message",
    "Rule",
    "SMTPMockError",
    "Server",
    "ServerStartError",
    "ServerStateError",
    "WaitTimeoutError",
    "main",
]


# ------------------------------------------------------------------------------------------ errors


class SMTPMockError(Exception):
    """The base of every error that smtpmock raises."""


class ConfigurationError(SMTPMockError, ValueError):
    """An option or an argument that cannot be used: its name, its value, and what is allowed."""


class ServerStateError(SMTPMockError, RuntimeError):
    """start() of a running server, or stop() of one that does not run."""


class ServerStartError(SMTPMockError, OSError):
    """The host and port cannot be listened on; `errno` is the operating system's reason, if it gave one."""


class WaitTimeoutError(SMTPMockError, TimeoutError):
    """Too few messages came in time. `messages` are those that did; none of them was purged."""

    def __init__(self, text: str, messages: Sequence[Message] = ()) -> None:
        super().__init__(text)
        self.messages = list(messages)


# ----------------------------------------------------------------------------------------- options


class _Kind(NamedTuple):
    """The values that an option takes."""

    allowed: str  # in the words of an error message
    accepts: Callable[[Any], bool]
    parse: Callable[[str], Any]  # from the command line; KeyError or ValueError if it cannot


def _number(least: float, most: float, *types: type[float]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types) and not isinstance(value, bool) and least <= value <= most


def _are_names(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


def _fold(name: str) -> str:
    """A domain or an address as they are compared: domains have no case, local parts have one."""
    local, at, domain = name.rpartition("@")
    return local + at + domain.lower()


# The longest time is one that poll() takes on every platform: 2**31 milliseconds are 24 days.
_SECONDS = _Kind("a number of seconds from 0 to 1000000", _number(0, 1e6, int, float), float)
_TIMEOUT = _Kind("a number of seconds from 0.001 to 1000000", _number(1e-3, 1e6, int, float), float)
_PORT = _Kind("an integer from 0 to 65535", _number(0, 65535, int), int)
_COUNT = _Kind("an integer from 0 up", _number(0, float("inf"), int), int)
_SEED = _Kind("an integer", lambda value: value is None or _number(float("-inf"), float("inf"), int)(value), int)
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool), lambda text: _FLAGS[text.lower()])
_TEXT = _Kind("a string", lambda value: isinstance(value, str), str)
_NAMES = _Kind("a list of strings", _are_names, lambda text: [name.strip() for name in text.split(",") if name.strip()])
_WORDS = _Kind("a list of words", lambda value: _are_names(value) and all(map(str.split, value)), _NAMES.parse)
_CONTEXT = _Kind("an ssl.SSLContext", lambda value: hasattr(value, "wrap_socket"), str)


def _are_users(value: object) -> bool:
    return callable(value) or (isinstance(value, Mapping) and _are_names([*value, *value.values()]))


_USERS = _Kind(
    "a mapping of users to secrets, user:secret,... or a function of the mechanism, user and secret",
    _are_users,
    lambda text: dict(pair.split(":", 1) for pair in _NAMES.parse(text)),
)


def _check(name: str, value: object, kind: _Kind) -> None:
    if not kind.accepts(value):
        raise ConfigurationError(f"{name}={value!r}: must be {kind.allowed}")


def _suggest(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _option(default: Any, kind: _Kind, about: str) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "about": about})


def _names(about: str) -> Any:
    return _option(frozenset(), _NAMES, about)


def _delay(before: str) -> Any:
    return _option(0, _SECONDS, f"seconds before the reply to {before}")


def _reply(default: str, to: str) -> Any:
    return _option(default, _TEXT, f"reply to {to}")


_RECEIVED = "250 Received"
_UNAVAILABLE = "421 Service not available"
_BAD = "503 Bad sequence of commands."
_UNRECOGNIZED = "502 Command unrecognized. Available commands: HELO, EHLO, MAIL FROM:, RCPT TO:, DATA, RSET, NOOP, QUIT"


# Options that are good for nothing without another one.
_NEEDED = {
    "auth_required": "auth_users",
    "auth_requires_tls": "ssl_context",
    "implicit_tls": "ssl_context",
    "tls_required": "ssl_context",
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Configuration:
    """Every option of a server, checked when it is made: ConfigurationError if one cannot be used.

    Times are in seconds, and fractions are fine. A reply may be any text, with a code or without;
    a newline makes it one of several lines, and {msg_size_limit} in it stands for that option. One
    that begins with 4 or 5 refuses the command, whichever option it is.
    """

    host: str = _option("127.0.0.1", _TEXT, "host name or address to listen on; [::] is every one")
    port: int = _option(0, _PORT, "port to listen on; 0 is a free one")
    log_to_stdout: bool = _option(False, _FLAG, "log to stdout, and errors to stderr")
    log_server_activity: bool = _option(False, _FLAG, "have each session, request and reply in that log")
    session_timeout: float = _option(30, _TIMEOUT, "seconds of silence after which a session is closed")
    shutdown_timeout: float = _option(1, _SECONDS, "seconds that stop() leaves to sessions at work")
    fail_fast: bool = _option(False, _FLAG, "close a session after its first refused command")
    multiple_rcptto: bool = _option(False, _FLAG, "keep all recipients of a message, not only the last")
    multiple_message_receiving: bool = _option(False, _FLAG, "keep all messages of a session, not only the last")
    blacklisted_helo_domains: Collection[str] = _names("domains that HELO and EHLO refuse")
    blacklisted_mailfrom_emails: Collection[str] = _names("addresses that MAIL FROM refuses")
    blacklisted_rcptto_emails: Collection[str] = _names("addresses that RCPT TO refuses")
    not_registered_emails: Collection[str] = _names("addresses that RCPT TO does not know")
    response_delay_helo: float = _delay("HELO and EHLO")
    response_delay_mailfrom: float = _delay("MAIL FROM")
    response_delay_rcptto: float = _delay("RCPT TO")
    response_delay_data: float = _delay("DATA")
    response_delay_message: float = _delay("the message body")
    response_delay_rset: float = _delay("RSET")
    response_delay_noop: float = _delay("NOOP")
    response_delay_quit: float = _delay("QUIT")
    seed: int | None = _option(None, _SEED, "number that makes rules with a probability repeatable")
    extensions: Collection[str] = _option((), _WORDS, "ESMTP extensions to announce and accept, as SIZE, DSN, CHUNKING")
    auth_users: Any = _option(None, _USERS, "users who can log in, user:secret,... or a function; no AUTH without it")
    auth_required: bool = _option(False, _FLAG, "refuse MAIL FROM before AUTH")
    auth_requires_tls: bool = _option(False, _FLAG, "neither announce nor accept AUTH without TLS")
    ssl_context: Any = _option(None, _CONTEXT, "ssl.SSLContext with a certificate; no TLS without it")
    implicit_tls: bool = _option(False, _FLAG, "begin with TLS, as on port 465, and not with STARTTLS")
    tls_required: bool = _option(False, _FLAG, "refuse all but EHLO, NOOP and QUIT before STARTTLS")
    msg_size_limit: int = _option(10485760, _COUNT, "bytes that a message body may have")
    msg_greeting: str = _reply("220 Welcome", "a new connection")
    msg_invalid_cmd: str = _reply(_UNRECOGNIZED, "an unknown command")
    msg_invalid_cmd_helo_sequence: str = _reply(f"{_BAD} HELO should be the first", "others that come before HELO")
    msg_invalid_cmd_helo_arg: str = _reply("501 HELO requires domain address or valid address literal", "a bad HELO")
    msg_helo_blacklisted_domain: str = _reply(_UNAVAILABLE, "a blacklisted HELO")
    msg_helo_received: str = _reply(_RECEIVED, "HELO and EHLO")
    msg_invalid_cmd_mailfrom_sequence: str = _reply(f"{_BAD} MAIL FROM should be used after HELO", "an early MAIL")
    msg_invalid_cmd_mailfrom_arg: str = _reply("501 MAIL FROM requires valid email address", "a bad MAIL FROM")
    msg_mailfrom_blacklisted_email: str = _reply(_UNAVAILABLE, "a blacklisted MAIL FROM")
    msg_mailfrom_received: str = _reply(_RECEIVED, "MAIL FROM")
    msg_invalid_cmd_rcptto_sequence: str = _reply(f"{_BAD} RCPT TO should be used after MAIL FROM", "an early RCPT")
    msg_invalid_cmd_rcptto_arg: str = _reply("501 RCPT TO requires valid email address", "a bad RCPT TO")
    msg_rcptto_blacklisted_email: str = _reply(_UNAVAILABLE, "a blacklisted RCPT TO")
    msg_rcptto_not_registered_email: str = _reply("550 User not found", "a not registered RCPT TO")
    msg_rcptto_received: str = _reply(_RECEIVED, "RCPT TO")
    msg_invalid_cmd_data_sequence: str = _reply(f"{_BAD} DATA should be used after RCPT TO", "an early DATA")
    msg_data_received: str = _reply("354 Ready for receive message. End data with <CR><LF>.<CR><LF>", "DATA")
    msg_msg_size_is_too_big: str = _reply("552 Message exceeded max size of {msg_size_limit} bytes", "a longer body")
    msg_msg_received: str = _reply(_RECEIVED, "the message body")
    msg_msg_failed: str = _reply("451 Local error in processing", "what on_message, a rule or a handler failed at")
    msg_invalid_cmd_rset_sequence: str = _reply(f"{_BAD} HELO should be the first", "an early RSET")
    msg_invalid_cmd_rset_arg: str = _reply(_UNRECOGNIZED, "RSET, DATA or QUIT with an argument")
    msg_rset_received: str = _reply("250 Ok", "RSET")
    msg_noop_received: str = _reply("250 Ok", "NOOP")
    msg_quit_cmd: str = _reply("221 Closing connection", "QUIT")
    msg_unknown_parameter: str = _reply(
        "555 Parameter not recognized or not implemented", "a bad parameter of MAIL or RCPT"
    )
    msg_bdat_received: str = _reply(_RECEIVED, "BDAT without LAST")
    msg_invalid_cmd_bdat_arg: str = _reply("501 BDAT requires a size in bytes", "a bad BDAT")
    msg_auth_received: str = _reply("235 Authentication succeeded", "AUTH")
    msg_auth_failed: str = _reply("535 Authentication credentials invalid", "AUTH with a wrong user or secret")
    msg_auth_cancelled: str = _reply("501 Authentication cancelled", "* in place of a secret")
    msg_auth_bad_response: str = _reply("501 Cannot decode response", "a secret that is not in base64 or not complete")
    msg_auth_unknown_mechanism: str = _reply("504 Unrecognized authentication type", "AUTH with an unknown mechanism")
    msg_auth_sequence: str = _reply(
        f"{_BAD} AUTH should be used once, after EHLO and before MAIL FROM", "a misplaced AUTH"
    )
    msg_auth_required: str = _reply("530 Authentication required", "MAIL FROM before AUTH, with auth_required")
    msg_auth_tls_required: str = _reply("538 Encryption required for authentication", "AUTH, with auth_requires_tls")
    msg_starttls_received: str = _reply("220 Ready to start TLS", "STARTTLS")
    msg_invalid_cmd_starttls_arg: str = _reply("501 STARTTLS takes no argument", "STARTTLS with an argument")
    msg_invalid_cmd_starttls_sequence: str = _reply(f"{_BAD} TLS is on already", "STARTTLS within TLS")
    msg_tls_required: str = _reply("530 Must issue a STARTTLS command first", "others before it, with tls_required")
    msg_session_timeout: str = _reply("421 Session timeout, closing connection", "a silence of session_timeout")
    msg_server_shutdown: str = _reply("421 Server shutting down, closing connection", "the sessions that stop() ends")
    msg_line_too_long: str = _reply("500 Line too long", "a command line of over 4096 bytes")

    def __new__(cls, **options: Any) -> Configuration:
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in options.items():
            if name not in known:
                raise ConfigurationError(f"{name}={value!r}: there is no such option{_suggest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not field.default:
                kind = field.metadata["kind"]
                _check(field.name, value, kind)
                if kind is _NAMES:  # in the form in which they are looked up
                    object.__setattr__(self, field.name, frozenset(map(_fold, value)))
                elif kind is _WORDS:
                    object.__setattr__(self, field.name, tuple(value))
        for name, other in _NEEDED.items():
            if getattr(self, name) and getattr(self, other) is None:
                raise ConfigurationError(f"{name}=True: needs {other}")


# ----------------------------------------------------------------------------------------- grammar

# Every pattern is linear: where a part of one repeats, no two of its parts match the same text. They
# are for printable text, and so need not tell letters of any script (RFC 6531 section 3.3) from control
# characters, white space that is not ASCII, and the surrogates for bytes that are not UTF-8.

# "Let-dig" and "ALPHA" of RFC 5321 section 4.1.2.
_ALNUM = r"[^ -/:-@\[-`{-~]"
_ALPHA = r"[^ -@\[-`{-~]"
_LABEL = rf"{_ALNUM}+(?:-+{_ALNUM}+)*"
_DOTTED = rf"(?:{_LABEL}\.)+(?:{_ALPHA}{{2,}}|[xX][nN]--{_LABEL})"

# RFC 5321 section 4.1.3; whether the numbers are right is for inet_pton() to say.
_ADDRESS_LITERAL = re.compile(r"\[([iI][pP][vV]6:)?([0-9a-fA-F:.]+)\]")

# The argument of HELO, section 4.1.1.1. A host without a domain sends its one label, as containers
# do; digits alone are no name, though.
_DOMAIN = re.compile(rf"{_DOTTED}|(?=[0-9-]*[^0-9-]){_LABEL}")

# "Mailbox" of section 4.1.2.
_ATOM = r"[^ \"(),.:;<>@\[\\\]]+"
_QUOTED = r"\"(?:[^\"\\]|\\[ -~])*\""
_MAILBOX = rf"(?:{_ATOM}(?:\.{_ATOM})*|{_QUOTED})@(?:{_DOTTED}|[lL][oO][cC][aA][lL][hH][oO][sS][tT]|\[[^\[\]@]*\])"

# The path of MAIL and RCPT, section 4.1.1.2 and as clients send it: <user@example.com>,
# user@example.com, John Doe <user@example.com>.
_PATH = re.compile(rf"([^\"<>@]*<)?({_MAILBOX})(>)?")


def _is_ip_address(text: str, family: socket.AddressFamily) -> bool:
    try:
        return bool(socket.inet_pton(family, text))
    except (OSError, ValueError):
        return False


def _is_address_literal(text: str) -> bool:
    match = _ADDRESS_LITERAL.fullmatch(text)
    return match is not None and _is_ip_address(match[2], socket.AF_INET6 if match[1] else socket.AF_INET)


# Each of these takes the argument of a command, and returns what it says or None if it is not valid.


def _parse_domain(text: str) -> str | None:
    valid = _DOMAIN.fullmatch(text) or _is_address_literal(text) or _is_ip_address(text, socket.AF_INET)
    return text if valid and text.isprintable() else None


def _parse_path(text: str) -> str | None:
    match = _PATH.fullmatch(text)
    if match is None or (match[1] is None) != (match[3] is None) or not text.isprintable():
        return None
    address: str = match[2]
    domain = address[address.rindex("@") + 1 :]
    return address if domain[0] != "[" or _is_address_literal(domain) else None


def _parse_sender(text: str) -> str | None:
    return "" if text == "<>" else _parse_path(text)


def _parse_recipient(text: str) -> str | None:
    # Postmaster is the one address without a domain, section 4.1.1.3.
    return text[1:-1] if text.lower() == "<postmaster>" else _parse_path(text)


def _parse_nothing(text: str) -> str | None:
    return None if text else ""


def _parse_chunk(text: str) -> tuple[int, bool] | None:
    """The size of a chunk, and whether it is the last (RFC 3030 section 2)."""
    match = re.fullmatch(r"([0-9]{1,20})(?: +([lL][aA][sS][tT]))?", text)
    return (int(match[1]), match[2] is not None) if match else None


class _Address(str):
    """An address that came with parameters (RFC 5321 section 4.1.2)."""

    parameters: dict[str, str]  # by their names in upper case; one that is there twice has the value "?"


# Up to the > that is not quoted, or, without a <, the white space that is not.
_PATH_END = re.compile(r'(?=[^"]*<)(?:"(?:[^"\\]|\\.)*"|[^">])*>|(?:"(?:[^"\\]|\\.)*"|[^" ])*')


def _allow_parameters(parse: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """The parser of a path, made one of a path with parameters."""

    def parse_all(text: str) -> str | None:
        match = _PATH_END.match(text)
        end = match.end() if match and text[match.end() : match.end() + 1] in ("", " ") else len(text)
        path = parse(text[:end])
        words = text[end:].split()
        if path is None or not words:
            return path
        address = _Address(path)
        address.parameters = {}
        for word in words:
            name, _, value = word.partition("=")
            address.parameters[name.upper()] = "?" if name.upper() in address.parameters else value
        return address

    return parse_all


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _parse_command(line: bytes) -> tuple[str, str, str]:
    """Take a line apart (RFC 5321 section 4.1.1): the line itself, its verb in upper case, its argument.

    White space around it is dropped. Bytes that are not UTF-8 become surrogates.
    """
    request = _decode(line.strip())
    verb, _, argument = request.replace("\t", " ").partition(" ")
    # Only if it is ASCII, since "quıt" with a dotless i would become "QUIT".
    return request, verb.upper() if verb.isascii() else "", argument


# ----------------------------------------------------------------------------------------- records


class _After(enum.Enum):
    """What comes after a reply; the values are what a transcript has for it."""

    COMMAND = "<command>"
    BODY = "<body>"
    LINE = "<line>"  # for the same command
    MESSAGE = "<message>"  # its end has come
    TLS = "<tls>"
    CLOSE = "<closed>"
    RESET = "<reset>"  # closed with an RST
    SILENCE = "<silence>"  # open, but nothing is answered any more

    def __init__(self, value: str) -> None:
        self.ends = value in ("<closed>", "<reset>", "<silence>")  # the session; nothing more is answered


_ENDS = tuple(after for after in _After if after.ends)


class _Login(NamedTuple):
    """What came of an AUTH command."""

    response: str  # the option that has it
    mechanism: str | None = None
    user: str | None = None


class _Reply(NamedTuple):
    """What the server says next, as data, for the connection to carry out."""

    text: str
    data: bytes  # the text as it is sent
    delay: float = 0.0  # seconds before that
    after: _After = _After.COMMAND
    accepts: bool = False  # whether the command takes effect
    trickle: float = 0.0  # seconds between its bytes


def _encode(text: str) -> bytes:
    lines = text.replace("\r\n", "\n").replace("\n", "\r\n")
    return lines.encode("utf-8", "surrogateescape") + b"\r\n"


# A client's line, the size of its body, or None where the server speaks first.
_Request = str | int | None


class _Exchange(NamedTuple):
    """A request and what became of it."""

    request: _Request
    response: str
    accepted: bool
    value: Any  # of the argument; None if that is not valid


# Requests and responses, by turns. Nothing is formatted before somebody asks for it.
_Dialogue = list[_Request]


def _printable(text: str) -> str:
    """One line, in which nothing is left that a terminal would obey."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _write_dialogue(dialogue: _Dialogue) -> Iterator[str]:
    """Its lines, as "C: QUIT" and "S: 221 Closing connection"."""
    for index, said in enumerate(dialogue):
        if isinstance(said, int):
            yield f"C: <{said} bytes>"
        elif said is not None:
            lines = said.replace("\r\n", "\n").split("\n") if index % 2 else [said]
            yield from (f"{'S' if index % 2 else 'C'}: {_printable(line)}" for line in lines)


_T = TypeVar("_T")


class _Part(Generic[_T]):
    """An attribute of Message: a part of what was exchanged at a step, or a default if the step did not come."""

    def __init__(self, step: str, part: str, default: _T) -> None:
        self.step, self.part, self.default = step, part, default

    def __get__(self, message: Message, owner: type[Message]) -> _T:
        exchange = message._steps.get(self.step)
        part: _T | None = None if exchange is None else getattr(exchange, self.part)
        return self.default if part is None else part


class Attachment(NamedTuple):
    """A part of a mail that is not its text."""

    name: str | None
    type: str
    content: bytes


@functools.cache
def _make_email_policy() -> Any:
    from email.errors import InvalidHeaderDefect
    from email.policy import EmailPolicy

    class Policy(EmailPolicy):
        def header_fetch_parse(self, name: str, value: str) -> Any:
            try:
                return super().header_fetch_parse(name, value)
            except Exception as error:  # noqa: BLE001 - whatever the parser meets, an IndexError in "From: :"
                header: Any = self.header_factory("unstructured", "".join(value.splitlines()).replace("=?", "= ?"))
                header._defects.append(InvalidHeaderDefect(f"{name} cannot be parsed: {error!r}"))
                return header

    return Policy()


def _parse_email(data: bytes) -> Any:
    from email.errors import MessageDefect
    from email.parser import BytesHeaderParser, BytesParser

    try:
        return BytesParser(policy=_make_email_policy()).parsebytes(data)
    except RecursionError:
        mail = BytesHeaderParser(policy=_make_email_policy()).parsebytes(data)
        mail.defects.append(MessageDefect("parts are nested too deeply"))
        return mail


def _decode_part(part: Any) -> bytes:
    if part.is_multipart():  # a mail in the mail
        policy = part.policy.clone(linesep="\r\n", refold_source="none")
        part, data = part.get_payload(0), b""
        with contextlib.suppress(Exception):  # it is written anew, and not all can be
            data = part.as_bytes(policy=policy)
        return data
    content: bytes = part.get_payload(decode=True)
    return content


def _decode_text(part: Any) -> str:
    data = _decode_part(part).replace(b"\r\n", b"\n")
    with contextlib.suppress(LookupError, ValueError):
        return data.decode(part.get_content_charset("utf-8"))
    return data.decode("utf-8", "replace")


def _take_apart(mail: Any) -> tuple[dict[str, str], list[Attachment]]:
    """The text of each type, and what else there is."""
    texts: dict[str, str] = {}
    attachments: list[Attachment] = []
    parts = [mail]
    while parts:
        part = parts.pop()
        kind, name = part.get_content_type(), part.get_filename()
        is_container = part.get_content_maintype() == "multipart"
        if is_container and part.is_multipart():
            parts.extend(reversed(part.get_payload()))
            continue
        if is_container:  # whose boundary never came
            kind = "text/plain"
        if kind in ("text/plain", "text/html") and kind not in texts and name is None and not part.is_attachment():
            texts[kind] = _decode_text(part)
        else:
            attachments.append(Attachment(name, kind, _decode_part(part)))
    return texts, attachments


def _write_bytes(data: bytes) -> dict[str, str]:
    import base64

    try:
        return {"content": data.decode(), "content_encoding": "utf-8"}
    except UnicodeDecodeError:
        return {"content": base64.b64encode(data).decode(), "content_encoding": "base64"}


def _make_plain(value: Any) -> Any:
    """The value without the surrogates that stand for bytes, since few readers of JSON take them."""
    if isinstance(value, dict):
        return {name: _make_plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_make_plain(item) for item in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


class Message:
    """What came of an SMTP session or, with multiple_message_receiving, of one mail in it.

    For each step of the dialogue: the request as the client wrote it, the response as it was sent,
    and under the step's own name whether it succeeded. Read-only, and nothing changes it: if the
    session goes on, a later messages() has another object in its place.
    """

    helo_request = _Part("helo", "request", "")
    helo_response = _Part("helo", "response", "")
    helo = _Part("helo", "accepted", False)
    mailfrom_request = _Part("mailfrom", "request", "")
    mailfrom_response = _Part("mailfrom", "response", "")
    mailfrom = _Part("mailfrom", "accepted", False)
    mail_from = _Part[str | None]("mailfrom", "value", None)  #: the sender, "" for <>; None if none was valid
    data_request = _Part("data", "request", "")
    data_response = _Part("data", "response", "")
    data = _Part("data", "accepted", False)
    content = _Part("msg", "value", b"")  #: the body, dots unstuffed, CRLF kept; what came of it, if the client left
    msg_response = _Part("msg", "response", "")
    msg = _Part("msg", "accepted", False)
    rset_request = _Part("rset", "request", "")
    rset_response = _Part("rset", "response", "")
    rset = _Part("rset", "accepted", False)
    noop = _Part("noop", "accepted", False)
    quit_sent = _Part("quit", "accepted", False)
    auth_request = _Part("auth", "request", "")  #: without the secret
    auth_response = _Part("auth", "response", "")
    auth = _Part("auth", "accepted", False)
    tls = _Part[tuple[str, str] | None]("tls", "value", None)  #: (version, cipher), None without TLS
    id: int  #: no other message of the server has it
    peer: tuple[str, int]  #: the client's address and port

    def __init__(self, session: _Session, number: int, stamped_at: float) -> None:
        # The session goes on to append to these lists, so their lengths belong to them.
        fields = {
            "id": number,
            "peer": session.peer,
            "_stamped_at": stamped_at,
            "_steps": session.steps.copy(),
            "_recipients": session.recipients,
            "_count": len(session.recipients),
            "_dialogue": session.dialogue,
            "_said": len(session.dialogue),
        }
        object.__setattr__(self, "__dict__", fields)  # as nothing else can be set

    _stamped_at: float
    _steps: dict[str, _Exchange]
    _recipients: list[_Exchange]
    _count: int
    _dialogue: _Dialogue
    _said: int

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Message is read-only: {name} cannot be set")

    @property
    def rcptto_request_response(self) -> list[tuple[str, str]]:
        """(request, response) of each RCPT TO; without multiple_rcptto, of the last."""
        return [(str(exchange.request), exchange.response) for exchange in self._recipients[: self._count]]

    @property
    def rcpt_tos(self) -> list[str]:
        """The accepted recipients; without multiple_rcptto, the last one, if it was accepted."""
        return [exchange.value for exchange in self._recipients[: self._count] if exchange.accepted]

    @property
    def rcptto(self) -> bool:
        return bool(self.rcpt_tos)

    @property
    def mailfrom_parameters(self) -> dict[str, str]:
        """What came after the sender, as {"SIZE": "1000", "SMTPUTF8": ""}."""
        return dict(getattr(self.mail_from, "parameters", {}))

    @property
    def rcptto_parameters(self) -> list[dict[str, str]]:
        """The same of each of the rcpt_tos."""
        return [dict(getattr(address, "parameters", {})) for address in self.rcpt_tos]

    @property
    def auth_mechanism(self) -> str | None:
        """As PLAIN, also if it failed; None if the client did not try, or never came so far."""
        return self._login.mechanism

    @property
    def auth_user(self) -> str | None:
        return self._login.user

    @property
    def _login(self) -> _Login:
        login: _Login = self._steps["auth"].value if "auth" in self._steps else _Login("")
        return login

    @property
    def msg_request(self) -> str:
        """The content as str: UTF-8, with surrogates for the bytes that are not."""
        return _decode(self.content)

    @property
    def is_consistent(self) -> bool:
        """Whether a mail was accepted: its sender, a recipient, DATA and the body."""
        return self.mailfrom and self.rcptto and self.data and self.msg

    @property
    def esmtp(self) -> bool:
        """Whether the client greeted with EHLO, and was accepted."""
        return self.helo and self.helo_request[:4].upper() == "EHLO"

    @property
    def received_at(self) -> datetime.datetime | None:
        """When the mail was accepted, in UTC; None if it was not."""
        import datetime

        return datetime.datetime.fromtimestamp(self._stamped_at, datetime.timezone.utc) if self.msg else None

    @functools.cached_property
    def transcript(self) -> str:
        """The dialogue, a line for each "C: QUIT" and "S: 221 Closing connection"; the body is one line with its size.

        With multiple_message_receiving it is that of this mail, and before it the greeting and HELO.
        """
        return "\n".join(_write_dialogue(self._dialogue[: self._said]))

    @functools.cached_property
    def received_header(self) -> str:
        """The header that a server adds to a mail (RFC 5321 section 4.4), folded, with CRLF; "" if not accepted."""
        from email.utils import format_datetime

        if self.received_at is None:
            return ""
        helo, host = self._steps["helo"].value, self.peer[0].partition("%")[0]
        address = f"[IPv6:{host}]" if ":" in host else f"[{host}]"
        header = f"Received: from {helo if helo.isascii() else address} ({address})\r\n"
        protocol = "ESMTP" + "S" * bool(self.tls) + "A" * self.auth if self.esmtp else "SMTP"  # RFC 3848
        header += f"\tby smtpmock with {protocol} id {self.id}"
        if len(self.rcpt_tos) == 1 and "@" in self.rcpt_tos[0] and self.rcpt_tos[0].isascii():
            header += f"\r\n\tfor <{self.rcpt_tos[0]}>"
        return f"{header};\r\n\t{format_datetime(self.received_at)}\r\n"

    def as_bytes(self) -> bytes:
        """The mail as a mailbox holds it: Return-Path, Received, and the content as it is."""
        head = f"Return-Path: <{self.mail_from}>\r\n" if self.mailfrom else ""
        head += self.received_header
        if self.content[:1] in (b" ", b"\t"):  # it has no header, and would pass for the end of ours
            head += "\r\n"
        return head.encode("utf-8", "surrogateescape") + self.content

    @functools.cached_property
    def email(self) -> EmailMessage:
        """as_bytes() parsed. What is wrong with it is in the `defects` of its parts, and raises nothing."""
        mail: EmailMessage = _parse_email(self.as_bytes())
        return mail

    @property
    def subject(self) -> str | None:
        """Decoded, None without one."""
        subject = self.email["subject"]
        return None if subject is None else str(subject)

    @property
    def text(self) -> str | None:
        """The first text/plain part that is no attachment, with LF for line ends; None without one."""
        return self._parts[0].get("text/plain")

    @property
    def html(self) -> str | None:
        """The first text/html part that is no attachment, with LF for line ends; None without one."""
        return self._parts[0].get("text/html")

    @property
    def attachments(self) -> list[Attachment]:
        """All other parts, the images of an HTML page among them."""
        return self._parts[1].copy()

    @functools.cached_property
    def _parts(self) -> tuple[dict[str, str], list[Attachment]]:
        return _take_apart(self.email)

    def to_dict(self) -> dict[str, Any]:
        """All of it as values for JSON. Bytes are text if they are UTF-8 and else base64, as `..._encoding` says."""
        names = [name for name, part in vars(Message).items() if isinstance(part, _Part) and name != "content"]
        names += ["id", "esmtp", "rcpt_tos", "rcptto", "is_consistent", "received_header"]
        names += ["mailfrom_parameters", "rcptto_parameters", "auth_mechanism", "auth_user"]
        values = {name: getattr(self, name) for name in (*names, "subject", "text", "html", "transcript")}
        values["peer"], values["tls"] = list(self.peer), list(self.tls) if self.tls else None
        values["received_at"] = self.received_at.isoformat() if self.received_at else None
        values["rcptto_request_response"] = [list(pair) for pair in self.rcptto_request_response]
        values["headers"] = [[name, str(value)] for name, value in self.email.items()]
        values["defects"] = [
            f"{type(defect).__name__}: {defect}" for part in self.email.walk() for defect in part.defects
        ]
        values["attachments"] = [
            {"name": name, "type": kind, **_write_bytes(content)} for name, kind, content in self.attachments
        ]
        plain: dict[str, Any] = _make_plain({**values, **_write_bytes(self.content)})
        return plain

    def __repr__(self) -> str:
        ends = {after.value for after in _ENDS}
        replies = [said for said in self._dialogue[1 : self._said : 2] if said is not None and said not in ends]
        end = (
            "accepted" if self.is_consistent else f"not accepted, last reply {replies[-1]!r}" if replies else "no reply"
        )
        return f"<Message {self.id} from {self.mail_from!r} to {self.rcpt_tos}: {len(self.content)} bytes, {end}>"


# ------------------------------------------------------------------------------------------- rules


class Action(NamedTuple):
    """What to do in place of the usual; what is left out is as usual. For a function that is a rule to return."""

    reply: str | None = None  # 2xx and 3xx let the command take effect, anything else refuses it
    raw: bytes | None = None  # sent as it is, in place of a reply
    delay: float | None = None  # seconds
    trickle: float = 0.0  # seconds after each byte but the last
    then: str = ""  # "close", "reset" or "silence"; without a reply, instead of one


_THEN = {"": None, "close": _After.CLOSE, "reset": _After.RESET, "silence": _After.SILENCE}
_STAGES = ("connect", "message", "*")
_PROBABILITY = _Kind("a number from 0 to 1", _number(0, 1, int, float), float)
_TIMES = _Kind("an integer from 1 up", _number(1, float("inf"), int), int)
_BYTES = _Kind(
    "bytes",
    lambda value: isinstance(value, bytes),
    lambda text: text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode("latin-1"),
)


def _parse_stage(name: object) -> str:
    """connect, message, *, or a verb in upper case, without the FROM or TO after it."""
    words = name.replace(":", " ").split() if isinstance(name, str) else []
    if not words or len(words) > 2 or words[1:] not in ([], ["FROM"], ["from"], ["TO"], ["to"]):
        raise ConfigurationError(f"stage={name!r}: must be connect, message, * or a verb, as RCPT")
    return words[0].lower() if words[0].lower() in _STAGES else words[0].upper()


class Rule:
    """A deviation of a server from the usual, which on() makes and one of these methods puts into force.

    All of them take times, after which the rule is spent, and probability, from 0 to 1; and return the rule.
    """

    def __init__(self, rules: _Rules, stage: str, match: Any) -> None:
        self.hits = 0  #: how often it was applied
        self._rules = rules
        self._stage = stage
        self._match = _fold(match) if isinstance(match, str) else match
        self._actions: Sequence[Action] = ()
        self._function: Callable[[str, Message], Any] | None = None
        self._after: int | None = None  # bytes of the body
        self._times: int | None = None
        self._probability = 1.0
        self._random: Any = None

    def reply(self, *texts: str | None, close: bool = False, **limits: Any) -> Rule:
        """Say these texts, one each time and the last one from then on; None is as usual. With close, hang up.

        A text of 2xx or 3xx takes the place of the usual and the command takes effect. Any other refuses it.
        """
        for text in texts or [()]:
            _check("reply", text, _Kind("one string or more", lambda text: text is None or isinstance(text, str), str))
        _check("close", close, _FLAG)
        then = "close" if close else ""
        return self._enforce([Action() if text is None else Action(text, then=then) for text in texts], **limits)

    def delay(self, seconds: float, **limits: Any) -> Rule:
        """Wait so long before the reply, which is as usual."""
        _check("delay", seconds, _SECONDS)
        return self._enforce([Action(delay=seconds)], **limits)

    def drop(self, reply: str | None = None, *, after: int | None = None, **limits: Any) -> Rule:
        """Close the connection, without a reply or after this one; at message, after so many bytes of the body."""
        if reply is not None:
            _check("drop", reply, _TEXT)
        return self._enforce([Action(reply, then="close")], after, **limits)

    def reset(self, *, after: int | None = None, **limits: Any) -> Rule:
        """Close the connection with an RST; at message, after so many bytes of the body."""
        return self._enforce([Action(then="reset")], after, **limits)

    def silence(self, **limits: Any) -> Rule:
        """Keep the connection, and answer neither this nor anything that follows."""
        return self._enforce([Action(then="silence")], **limits)

    def raw(self, data: bytes, **limits: Any) -> Rule:
        """Send these bytes as they are, in place of the reply."""
        _check("raw", data, _BYTES)
        return self._enforce([Action(raw=data)], **limits)

    def trickle(self, seconds: float, **limits: Any) -> Rule:
        """Send the reply, which is as usual, byte by byte, with so much time between them."""
        _check("trickle", seconds, _SECONDS)
        return self._enforce([Action(trickle=seconds)], **limits)

    def __call__(self, function: Callable[[str, Message], Any]) -> Any:
        """As a decorator: function(request, message) returns None, a reply or an Action. Returns the rule."""
        if not callable(function):
            raise ConfigurationError(f"rule={function!r}: must be callable")
        self._function = function
        return self._enforce([Action()])

    def remove(self) -> None:
        """Put it out of force; it can be removed twice."""
        self._rules.remove(self)

    def _enforce(
        self, actions: Sequence[Action], after: int | None = None, *, times: int | None = None, probability: float = 1.0
    ) -> Rule:
        if after is not None:
            _check("after", after, _COUNT)
            if self._stage != "message":
                raise ConfigurationError(f"after={after!r}: is for the stage message, not for {self._stage}")
        if times is not None:
            _check("times", times, _TIMES)
        _check("probability", probability, _PROBABILITY)
        self._actions, self._after, self._times, self._probability = actions, after, times, probability
        self._rules.add(self)
        return self

    def _matches(self, request: str, names: Sequence[str]) -> bool:
        if callable(self._match):
            return bool(self._match(request))
        folded = [_fold(name) for name in names]
        return self._match is None or any(self._match in (name, name.rpartition("@")[2].lower()) for name in folded)

    def _take(self) -> Action | None:
        """Use it once; None if it is spent, or chance has it so. Under the lock of the rules."""
        if self.hits == self._times or (self._random and self._random.random() >= self._probability):
            return None
        self.hits += 1
        return self._actions[min(self.hits, len(self._actions)) - 1]

    def __repr__(self) -> str:
        return f"<Rule for {self._stage}{f' {self._match}' if self._match else ''}: {self.hits} hits>"


def _make_action(result: object) -> Action:
    """Of what a function that is a rule returned."""
    if result is None or isinstance(result, str):
        return Action(result)
    if not isinstance(result, Action):
        raise TypeError(f"a rule returned {result!r}: must be None, a reply or an Action")
    return result


class _Rules:
    """The rules that are in force."""

    def __init__(self, seed: int | None) -> None:
        self.newest_first: tuple[Rule, ...] = ()  # never changed, but replaced
        self._seed = seed
        self._count = itertools.count()
        self._lock = threading.Lock()

    def add(self, rule: Rule) -> None:
        with self._lock:
            if rule._probability < 1:
                from random import Random

                # Each has numbers of its own, so that they do not depend on what other rules meet.
                rule._random = Random(None if self._seed is None else f"{self._seed} {next(self._count)}")
            self.newest_first = (rule, *(other for other in self.newest_first if other is not rule))

    def remove(self, rule: Rule) -> None:
        with self._lock:
            self.newest_first = tuple(other for other in self.newest_first if other is not rule)

    def clear(self) -> None:
        with self._lock:
            self.newest_first, self._count = (), itertools.count()

    def cuts(self) -> list[int]:
        """The sizes of a body at which rules may end it."""
        return sorted({rule._after for rule in self.newest_first if rule._after is not None})

    def decide(
        self, stage: str, after: int | None, request: str, names: Sequence[str], message: Callable[[], Message]
    ) -> Action | None:
        """What the newest rule that matches does; raises what the functions of the rules raise."""
        for rule in self.newest_first:
            if rule._stage in (stage, "*") and rule._after == after and rule._matches(request, names):
                with self._lock:
                    action = rule._take() if rule in self.newest_first else None
                if action is not None:
                    return action if rule._function is None else _make_action(rule._function(request, message()))
        return None


# ---------------------------------------------------------------------------------------- handlers

# The steps of a session, by the names under which a message keeps them, in their order.
_STEPS = ("helo", "mailfrom", "rcptto", "data", "msg", "rset", "noop", "quit")
_ENVELOPE = _STEPS[1:]


def _name_extensions(options: Configuration) -> set[str]:
    """The extensions that are announced, and with them accepted."""
    names = {extension.split()[0].upper() for extension in options.extensions}
    return names if options.auth_users is None else names | {"AUTH"}


class Handler:
    """The life of a command: a form to be filled in, and at most a rule of its own.

    Texts, delays and lists are given by the name of the option that holds them; a text can also be given as it is.
    """

    verbs: tuple[str, ...] = ()  # upper case; in lower case, the stages of a session that are no commands
    keyword = ""  # what has to follow the verb
    step = ""  # where the message keeps it
    needs: tuple[str, ...] = ()  # the steps that must have succeeded before
    erases: tuple[str, ...] = ()  # the steps that it undoes, even if it is refused then
    parse: Callable[[Any], Any] = staticmethod(_parse_nothing)  # the argument's value, None if it is not valid
    bad_sequence = "msg_invalid_cmd_helo_sequence"
    bad_argument = "msg_invalid_cmd_rset_arg"
    refused: tuple[tuple[str, str], ...] = ()  # the lists of values to refuse, each with the text for them
    others: tuple[str, ...] = ()  # more texts that refuse() may name
    received = ""
    delay = ""
    after = _After.COMMAND  # if it is accepted
    checks_more = False  # whether there is something to refuse_more()
    before_tls = False  # whether it may come before STARTTLS where that is required
    has_secret = False  # whether its argument is not for everybody to see
    has_payload = False  # whether bytes follow it, as many as its parsed argument begins with
    completes = False  # whether the message is complete once it is accepted
    notes = False  # whether it belongs to the complete message before it, and begins no other

    def __init__(self, options: Configuration) -> None:
        self.options = options
        self.refusals = [(getattr(options, values), text) for values, text in self.refused if getattr(options, values)]
        self.extensions = _name_extensions(options)
        texts = (self.bad_sequence, self.bad_argument, self.received, *(text for _, text in self.refused))
        self.replies = {text: self.reply(text) for text in (*texts, *self.others) if text}
        if options.tls_required and not self.before_tls:
            self.needs = ("tls", *self.needs)
            self.replies["msg_tls_required"] = self.reply("msg_tls_required")
        self.is_special = self.has_secret or self.has_payload

    def reply(self, option: str) -> _Reply:
        """The reply whose text is in this option."""
        text = self._fill(getattr(self.options, option, option))
        accepts = option == self.received and not text.startswith(("4", "5"))
        delay = getattr(self.options, self.delay) if self.delay else 0.0
        return _Reply(text, _encode(text), delay, self._choose_after(accepts), accepts)

    def _fill(self, text: str) -> str:
        return text.replace("{msg_size_limit}", str(self.options.msg_size_limit))

    def _choose_after(self, accepts: bool) -> _After:
        return self.after if accepts else _After.CLOSE if self.options.fail_fast else _After.COMMAND

    def perform(self, action: Action, usual: _Reply) -> _Reply:
        """The reply that the action of a rule asks for."""
        delay, end = usual.delay if action.delay is None else action.delay, _THEN[action.then]
        if action.raw is not None:
            text, data = _decode(action.raw).rstrip("\r\n"), action.raw
        elif action.reply is not None:
            text = self._fill(action.reply)
            data = _encode(text)
        elif end is not None:
            text, data = "", b""
        else:
            return usual._replace(delay=delay, trickle=action.trickle)
        accepts = text.startswith(("2", "3"))
        return _Reply(text, data, delay, end or self._choose_after(accepts), accepts, action.trickle)

    @classmethod
    def is_offered(cls, options: Configuration) -> bool:
        """Whether the server has the command; if not, it is an unknown one."""
        return True

    def run(self, session: _Session, request: _Request, argument: Any) -> _Reply:
        """Erase, check, record; the reply is still to be sent."""
        if self.erases:
            session.erase(self.erases)
        value = self.parse(argument)
        reply = self.replies[self.refuse(session, value) or self.received]
        if session.rules.newest_first:
            action = session.decide(self.names(session, argument, value), request, argument)
            if action is not None:
                reply = self.perform(action, reply)
                value = argument if value is None and reply.accepts else value
        session.dialogue.extend((request, reply.text if reply.data else None))
        self.record(session, _Exchange(request, reply.text, reply.accepts, value))
        return reply

    def hide(self, request: str) -> str:
        """The line as it may be shown."""
        return re.sub(r"^(\S+\s+\S+\s+).*", r"\1***", request, flags=re.DOTALL) if self.has_secret else request

    def names(self, session: _Session, argument: Any, value: Any) -> Sequence[str]:
        """The addresses or domains that it is about, for the rules that name one."""
        return [name.strip("<>") for name in (value, argument) if isinstance(name, str)]

    def refuse(self, session: _Session, value: Any) -> str | None:
        """The text that refuses the command, None to accept it."""
        if not session.done.issuperset(self.needs):
            return self.name_missing(session)
        if value is None:
            return self.bad_argument
        for values, text in self.refusals:
            if _fold(value) in values:
                return text
        return self.refuse_more(session, value) if self.checks_more else None

    def refuse_more(self, session: _Session, value: Any) -> str | None:
        """The same, of what only some servers have to check."""
        return None

    def name_missing(self, session: _Session) -> str:
        """The text about the first of its needs that is not met."""
        for step, text in (("tls", "msg_tls_required"), ("auth", "msg_auth_required")):
            if step in self.needs and step not in session.done:
                return text
        return self.bad_sequence

    def record(self, session: _Session, exchange: _Exchange) -> None:
        """Keep the exchange for the message."""
        if self.step:
            session.steps[self.step] = exchange
            if exchange.accepted:
                session.done.add(self.step)


class _Greeting(Handler):
    """What the server says before there is any command."""

    verbs = ("connect",)
    received = "msg_greeting"
    before_tls = True


class _Helo(Handler):
    """HELO, with what the client calls itself."""

    verbs = ("HELO",)
    step = "helo"
    erases = _STEPS
    parse = staticmethod(_parse_domain)
    bad_argument = "msg_invalid_cmd_helo_arg"
    refused = (("blacklisted_helo_domains", "msg_helo_blacklisted_domain"),)
    received = "msg_helo_received"
    delay = "response_delay_helo"
    before_tls = True


_XTEXT = r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})"  # RFC 3461 section 4

# What parameters are of which command and extension, and what their values may be. Any other is taken to be
# of the extension that has its name.
_PARAMETERS = {
    "SIZE": ("MAIL", "SIZE", "[0-9]{1,20}"),  # RFC 1870
    "BODY": ("MAIL", "8BITMIME", "7BIT|8BITMIME"),  # RFC 6152
    "SMTPUTF8": ("MAIL", "SMTPUTF8", ""),  # RFC 6531
    "AUTH": ("MAIL", "AUTH", f"<>|{_XTEXT}+"),  # RFC 4954
    "RET": ("MAIL", "DSN", "FULL|HDRS"),  # RFC 3461
    "ENVID": ("MAIL", "DSN", f"{_XTEXT}{{1,100}}"),
    "NOTIFY": ("RCPT", "DSN", "NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY))*"),
    "ORCPT": ("RCPT", "DSN", f"[A-Z0-9-]+;{_XTEXT}+"),
}


class _Path(Handler):
    """What is common to MAIL and RCPT: an address with parameters."""

    others = ("msg_unknown_parameter", "msg_msg_size_is_too_big", "msg_auth_required")

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        if self.extensions:
            self.checks_more, self.parse = True, _allow_parameters(self.parse)

    def refuse_more(self, session: _Session, value: Any) -> str | None:
        given = getattr(value, "parameters", {})
        if "SMTPUTF8" in self.extensions and not value.isascii() and not self.takes_utf8(session, given):
            return self.bad_argument
        if not all(self.can_read(session, *parameter) for parameter in given.items()):
            return "msg_unknown_parameter"
        return "msg_msg_size_is_too_big" if int(given.get("SIZE", 0)) > self.options.msg_size_limit else None

    def takes_utf8(self, session: _Session, given: dict[str, str]) -> bool:
        return "SMTPUTF8" in given

    def can_read(self, session: _Session, name: str, value: str) -> bool:
        verb, extension, pattern = _PARAMETERS.get(name, (self.verbs[0], name, "[^?]*"))
        is_esmtp = str(session.steps["helo"].request)[:4].upper() == "EHLO"
        was_announced = is_esmtp and extension in self.extensions and verb in self.verbs
        return was_announced and re.fullmatch(pattern, value, re.IGNORECASE) is not None


class _Mailfrom(_Path):
    """MAIL FROM:<address>, or <> for a mail that nobody is to answer."""

    verbs = ("MAIL",)
    keyword = "FROM:"
    step = "mailfrom"
    needs: tuple[str, ...] = ("helo",)
    erases = _ENVELOPE
    parse = staticmethod(_parse_sender)
    bad_sequence = "msg_invalid_cmd_mailfrom_sequence"
    bad_argument = "msg_invalid_cmd_mailfrom_arg"
    refused = (("blacklisted_mailfrom_emails", "msg_mailfrom_blacklisted_email"),)
    received = "msg_mailfrom_received"
    delay = "response_delay_mailfrom"

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        if options.auth_required:
            self.needs = ("auth", *self.needs)


class _Rcptto(_Path):
    """RCPT TO:<address>, once per recipient."""

    verbs = ("RCPT",)
    keyword = "TO:"
    step = "rcptto"
    needs = ("helo", "mailfrom")
    parse = staticmethod(_parse_recipient)
    bad_sequence = "msg_invalid_cmd_rcptto_sequence"
    bad_argument = "msg_invalid_cmd_rcptto_arg"
    refused = (
        ("blacklisted_rcptto_emails", "msg_rcptto_blacklisted_email"),
        ("not_registered_emails", "msg_rcptto_not_registered_email"),
    )
    received = "msg_rcptto_received"
    delay = "response_delay_rcptto"

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        self.erases = () if options.multiple_rcptto else _STEPS[2:]

    def takes_utf8(self, session: _Session, given: dict[str, str]) -> bool:
        return "SMTPUTF8" in getattr(session.steps["mailfrom"].value, "parameters", {})

    def record(self, session: _Session, exchange: _Exchange) -> None:
        super().record(session, exchange)
        session.recipients.append(exchange)


class _Data(Handler):
    """DATA, which asks for leave to send the body."""

    verbs = ("DATA",)
    step = "data"
    needs = ("helo", "mailfrom", "rcptto")
    erases: tuple[str, ...] = ("data", "msg")
    bad_sequence = "msg_invalid_cmd_data_sequence"
    received = "msg_data_received"
    delay = "response_delay_data"
    after = _After.BODY

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        self.checks_more = "CHUNKING" in self.extensions

    def refuse_more(self, session: _Session, value: Any) -> str | None:
        return None if session.chunks is None else self.bad_sequence

    def names(self, session: _Session, argument: Any, value: Any) -> Sequence[str]:
        return session.accepted_recipients()


class _Bdat(_Data):
    """BDAT, with which a body comes in chunks that are counted, not marked (RFC 3030)."""

    verbs = ("BDAT",)
    has_payload = True
    erases = ()
    parse = staticmethod(_parse_chunk)
    bad_argument = "msg_invalid_cmd_bdat_arg"
    others = ("msg_msg_size_is_too_big",)
    received = "msg_bdat_received"
    after = _After.COMMAND

    @classmethod
    def is_offered(cls, options: Configuration) -> bool:
        return "CHUNKING" in _name_extensions(options)

    def run(self, session: _Session, request: _Request, argument: Any) -> _Reply:
        if session.chunks is None:  # a new body
            session.erase(("data", "msg"))
        reply = super().run(session, request, argument)
        if session.payload is None:
            return reply
        if not reply.accepts:
            session.done.discard("rcptto")  # so that no other chunk counts before the next MAIL
            session.chunks = None
            return reply
        session.chunks = session.chunks or bytearray()
        session.chunks += session.payload.data
        _, is_last = self.parse(argument) or (0, False)
        if not is_last:
            return reply
        session.dialogue[-1] = None
        return _Reply("", b"", reply.delay, _After.MESSAGE, accepts=True)

    def refuse_more(self, session: _Session, value: Any) -> str | None:
        size = value[0] + len(session.chunks or b"")
        return "msg_msg_size_is_too_big" if size > self.options.msg_size_limit else None


class _Body(Handler):
    """The body, when its end has come. It is its own argument, None if it was too long."""

    verbs = ("message",)
    step = "msg"
    parse = staticmethod(lambda body: body)
    bad_argument = "msg_msg_size_is_too_big"
    received = "msg_msg_received"
    delay = "response_delay_message"
    completes = True
    names = _Data.names

    def run(self, session: _Session, request: _Request, argument: Any) -> _Reply:
        reply = super().run(session, request, argument)
        if reply.accepts and not session.deliver():
            reply = self.reply("msg_msg_failed")
            session.dialogue[-1] = reply.text
            self.record(session, _Exchange(request, reply.text, reply.accepts, argument))
        return reply


class _Rset(Handler):
    """RSET, after which the client begins another mail."""

    verbs = ("RSET",)
    step = "rset"
    needs = ("helo",)
    erases = _ENVELOPE
    bad_sequence = "msg_invalid_cmd_rset_sequence"
    received = "msg_rset_received"
    delay = "response_delay_rset"
    notes = True


class _Noop(Handler):
    """NOOP, with an argument or without."""

    verbs = ("NOOP",)
    step = "noop"
    before_tls = True
    parse = staticmethod(str)
    received = "msg_noop_received"
    delay = "response_delay_noop"
    notes = True


class _Quit(Handler):
    """QUIT, with which the session ends."""

    verbs = ("QUIT",)
    step = "quit"
    received = "msg_quit_cmd"
    delay = "response_delay_quit"
    after = _After.CLOSE
    before_tls = True
    notes = True


class _Starttls(Handler):
    """STARTTLS, after which the session begins anew, in TLS (RFC 3207)."""

    verbs = ("STARTTLS",)
    needs = ("helo",)
    bad_argument = "msg_invalid_cmd_starttls_arg"
    others = ("msg_invalid_cmd_starttls_sequence",)
    received = "msg_starttls_received"
    after = _After.TLS
    before_tls = True

    @classmethod
    def is_offered(cls, options: Configuration) -> bool:
        return options.ssl_context is not None and not options.implicit_tls

    def refuse(self, session: _Session, value: Any) -> str | None:
        return "msg_invalid_cmd_starttls_sequence" if session.is_secure else super().refuse(session, value)


# What AUTH is told by a mechanism: a challenge, to which it sends the client's answer. A mechanism
# returns the user and a secret, and ValueError is what it raises if the answer makes no sense. The first
# answer may have come already.
_Conversation = Generator[bytes, bytes, tuple[str, str]]


def _converse_plain(users: Any, initial: bytes | None) -> _Conversation:
    """RFC 4616."""
    answer = (yield b"") if initial is None else initial
    _, user, secret = _decode(answer).split("\0")
    return user, secret


def _converse_login(users: Any, initial: bytes | None) -> _Conversation:
    user = (yield b"Username:") if initial is None else initial
    secret = yield b"Password:"
    return _decode(user), _decode(secret)


def _converse_cram_md5(users: Any, initial: bytes | None) -> _Conversation:
    """RFC 2195. The client proves that it knows the secret, and does not tell it."""
    import hmac

    if initial is not None:
        raise ValueError("the server begins")
    challenge = b"<%d.%d@smtpmock>" % (time.monotonic_ns(), id(users))
    user, _, digest = _decode((yield challenge)).rpartition(" ")
    if callable(users):
        return user, f"{challenge.decode()} {digest}"
    secret = users.get(user, "")
    expected = hmac.new(secret.encode("utf-8", "surrogateescape"), challenge, "md5").hexdigest()
    return user, secret if digest == expected else f"not {secret}"


def _converse_xoauth2(users: Any, initial: bytes | None) -> _Conversation:
    """As Google and Microsoft have it; the secret is the token."""
    answer = (yield b"") if initial is None else initial
    match = re.fullmatch("user=([^\1]*)\1auth=Bearer ([^\1]*)\1\1", _decode(answer))
    if match is None:
        raise ValueError("no user and token")
    return match[1], match[2]


_MECHANISMS: dict[str, Callable[[Any, bytes | None], _Conversation]] = {
    "PLAIN": _converse_plain,
    "LOGIN": _converse_login,
    "CRAM-MD5": _converse_cram_md5,
    "XOAUTH2": _converse_xoauth2,
}


def _encode_base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


def _decode_base64(text: str) -> bytes:
    import base64

    return base64.b64decode(text.encode(), validate=True)


class _Auth(Handler):
    """AUTH, in one line or in several (RFC 4954). Its argument is what came of that."""

    verbs = ("AUTH",)
    step = "auth"
    parse = staticmethod(lambda login: login)
    others = (
        "msg_auth_failed",
        "msg_auth_cancelled",
        "msg_auth_bad_response",
        "msg_auth_unknown_mechanism",
        "msg_auth_sequence",
        "msg_auth_tls_required",
        "msg_invalid_cmd",
    )
    received = "msg_auth_received"
    has_secret = True

    def run(self, session: _Session, request: _Request, argument: Any) -> _Reply:
        begun, session.conversation = session.conversation, None
        command, conversation = begun or (request, self.converse(session, argument))
        try:
            challenge = conversation.send(argument if begun else None)
        except StopIteration as stop:
            reply = super().run(session, command, stop.value)
            session.dialogue[-2] = request
            return reply
        session.conversation = command, conversation
        reply = _Reply(f"334 {challenge}", _encode(f"334 {challenge}"), after=_After.LINE, accepts=True)
        session.dialogue.extend((request, reply.text))
        return reply

    def refuse(self, session: _Session, value: Any) -> str | None:
        return None if value.response == self.received else value.response

    def record(self, session: _Session, exchange: _Exchange) -> None:
        if self.options.auth_users is not None and self.step not in session.done:
            super().record(session, exchange)

    def names(self, session: _Session, argument: Any, value: Any) -> Sequence[str]:
        return [value.user or ""]

    def converse(self, session: _Session, argument: str) -> Generator[str, Any, _Login]:
        """Yields challenges in base64, and is sent the lines that answer them."""
        name, _, initial = argument.partition(" ")
        mechanism = name.upper()
        refusal = self.refuse_start(session, mechanism)
        if refusal is not None:
            return _Login(refusal, mechanism)
        try:
            first = _decode_base64("" if initial == "=" else initial) if initial else None
            steps = _MECHANISMS[mechanism](self.options.auth_users, first)
            challenge = next(steps)
            while True:
                line = yield _encode_base64(challenge)
                if line == "*":
                    return _Login("msg_auth_cancelled", mechanism)
                challenge = steps.send(_decode_base64(line))
        except StopIteration as stop:
            user, secret = stop.value
        except ValueError:
            return _Login("msg_auth_bad_response", mechanism)
        return _Login(self.received if self.knows(mechanism, user, secret) else "msg_auth_failed", mechanism, user)

    def refuse_start(self, session: _Session, mechanism: str) -> str | None:
        if self.options.auth_users is None:
            return "msg_invalid_cmd"
        if not session.done.issuperset(self.needs):
            return self.name_missing(session)
        if "helo" not in session.done or "auth" in session.done or "mailfrom" in session.done:
            return "msg_auth_sequence"
        if self.options.auth_requires_tls and not session.is_secure:
            return "msg_auth_tls_required"
        return None if mechanism in _MECHANISMS else "msg_auth_unknown_mechanism"

    def knows(self, mechanism: str, user: str, secret: str) -> bool:
        users = self.options.auth_users
        return bool(users(mechanism, user, secret) if callable(users) else user in users and users[user] == secret)


def _write_lines(text: str, extensions: Sequence[str]) -> str:
    """A reply with extensions after it: all lines but the last have a - after the code (RFC 5321 section 4.2.1)."""
    lines = [*text.replace("\r\n", "\n").split("\n"), *(f"250 {extension}" for extension in extensions)]
    more = [f"{line[:3]}-{line[4:]}" if line[:3].isdigit() else line for line in lines[:-1]]
    return "\n".join([*more, lines[-1]]) if extensions else text


class _Ehlo(_Helo):
    """EHLO, the reply to which lists the extensions (RFC 5321 section 4.1.1.1)."""

    verbs = ("EHLO",)

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        usual = self.replies[self.received]
        for key, is_secure in ((self.received, False), ("secure", True)):
            text = _write_lines(usual.text, list(self.list_extensions(is_secure))) if usual.accepts else usual.text
            self.replies[key] = usual._replace(text=text, data=_encode(text))

    def list_extensions(self, is_secure: bool) -> Iterator[str]:
        for extension in self.options.extensions:
            yield f"SIZE {self.options.msg_size_limit}" if extension.upper() == "SIZE" else extension
        if _Starttls.is_offered(self.options) and not is_secure:
            yield "STARTTLS"
        if self.options.auth_users is not None and (is_secure or not self.options.auth_requires_tls):
            yield f"AUTH {' '.join(_MECHANISMS)}"

    def refuse(self, session: _Session, value: Any) -> str | None:
        return super().refuse(session, value) or ("secure" if session.is_secure else None)


class _Unknown(Handler):
    """A command that is none of the others."""

    verbs = ("unknown",)
    before_tls = True
    parse = staticmethod(lambda argument: None)
    bad_argument = "msg_invalid_cmd"


class _TooLong(_Unknown):
    """A command line that was too long to be kept."""

    verbs = ("too long",)
    bad_argument = "msg_line_too_long"


_FORMS: tuple[type[Handler], ...] = (_Greeting, _Helo, _Ehlo, _Mailfrom, _Rcptto, _Data, _Bdat, _Body, _Rset)
_FORMS += (_Noop, _Quit, _Starttls, _Auth, _Unknown, _TooLong)


def _make_handlers(options: Configuration, others: Iterable[Any] = ()) -> dict[str, Handler]:
    """The table of verbs, in which a later one replaces an earlier."""
    for form in others:
        if not (isinstance(form, type) and issubclass(form, Handler) and form.verbs):
            raise ConfigurationError(f"handlers: {form!r} must be a subclass of Handler that has verbs")
    forms = [form for form in _FORMS if form.is_offered(options)]
    table = {verb: handler for form in forms for handler in [form(options)] for verb in form.verbs}
    return table | {
        _parse_stage(verb): handler for form in others for handler in [form(options)] for verb in form.verbs
    }


# ----------------------------------------------------------------------------------------- session

_LINE_LIMIT = 4096  # bytes of a command line with its end; RFC 5321 section 4.5.3.1.4 asks for 512 or more
_AUTH_LINE_LIMIT = 12288  # where there may be tokens in it; RFC 4954 section 4
_END_OF_DATA = b"\r\n.\r\n"
_DIALOGUE_LIMIT = 20000  # requests and replies that a transcript goes back, so that an endless session has an end


class _BodyReader:
    """Takes in a body, up to the line that is a dot alone (RFC 5321 section 4.1.1.4).

    Only CRLF ends a line here: with a bare LF for one, a mail could smuggle in another.
    """

    def __init__(self, limit: int) -> None:
        self.complete = False
        self._limit = limit
        self._dropped = False
        self._raw = bytearray()
        self._seam = b"\r\n"  # the last bytes that came, as the end of data may come in pieces
        self.size = 0  # as sent, the end of data not counted

    def feed(self, data: bytes, start: int) -> int:
        """Take data from start on, and return where in it the body ends."""
        seam = self._seam
        found = (seam + data[start : start + 4]).find(_END_OF_DATA)
        if found >= 0:
            stop = start + found - len(seam) + len(_END_OF_DATA)
        else:
            found = data.find(_END_OF_DATA, start)
            stop = found + len(_END_OF_DATA) if found >= 0 else len(data)
        self.complete = found >= 0
        self.size += stop - start - 3 * self.complete
        self._seam = (seam + data[max(start, stop - 4) : stop])[-4:]
        self._raw += data[start:stop]
        # At most one byte in four is a stuffed dot, so this much is too long without them, too.
        if self._dropped or len(self._raw) > self._limit * 4 // 3 + 8:
            self._dropped = True
            self._raw.clear()
        elif self.complete:
            del self._raw[-3:]
        return stop

    def content(self) -> bytes | None:
        """What came so far, without the stuffed dots (section 4.5.2); None if it is too long."""
        body = bytes(self._raw)
        if b"." in body:  # much faster to see than a dot behind a CRLF, and many bodies are base64
            body = (b"\r\n" + body).replace(b"\r\n.", b"\r\n")[2:]
        return None if self._dropped or len(body) > self._limit else body


class _Payload:
    """Takes in bytes that were announced by their number, and keeps them if they are no more than the limit."""

    def __init__(self, size: int, limit: int) -> None:
        self.missing = size
        self.data = bytearray()
        self._is_kept = size <= limit

    def feed(self, data: bytes, start: int) -> int:
        """Take data from start on, and return where in it the payload ends."""
        stop = min(len(data), start + self.missing)
        self.missing -= stop - start
        if self._is_kept:
            self.data += data[start:stop]
        return stop


class _Command(NamedTuple):
    """A command that waits for its payload."""

    handler: Handler
    verb: str
    request: str
    argument: str
    payload: _Payload


def _ignore(message: Message) -> None:
    pass


class _Setup(NamedTuple):
    """What the sessions of a server share."""

    options: Configuration
    handlers: dict[str, Handler]
    mailbox: _Mailbox
    log: _Log
    rules: _Rules
    on_message: Callable[[Message], object] = _ignore  # with each that is accepted, but not yet answered
    on_other: Callable[[Message], object] = _ignore  # with each that was not, when its session has ended


class _Session:
    """One SMTP conversation, without a socket, a thread or a clock.

    The same bytes give the same replies and messages, whatever the pieces they come in.
    """

    def __init__(self, setup: _Setup, peer: tuple[str, int]) -> None:
        self.peer = peer
        self.request: _Request = None  # the last one, for the log
        # Of the current message: what was exchanged at each step, which of them succeeded, each RCPT, and
        # all that was said.
        self.steps: dict[str, _Exchange] = {}
        self.done: set[str] = set()
        self.recipients: list[_Exchange] = []
        self.dialogue: _Dialogue = []
        self._setup = setup
        self._handlers = setup.handlers
        self._mailbox = setup.mailbox
        self.rules = setup.rules
        self._stage = ""  # as rules name it
        self._keeps_messages = setup.options.multiple_message_receiving
        self._stamp: tuple[int, float] | None = None  # the number of the message, and when it got that
        self._delivered: Message | None = None
        self._entry: _Entry | None = None  # where in the mailbox the current message is, once it is
        self._unpublished = False  # whether the mailbox lacks something of it
        self._rest = b""  # the beginning of a command line
        self._skipping = False  # the rest of a line that was too long
        self.body: _BodyReader | None = None  # while it comes in
        self.command: _Command | None = None  # whose payload comes in
        self.payload: _Payload | None = None  # of the command that is run
        self.chunks: bytearray | None = None  # of a body, that came so far
        self.conversation: tuple[_Request, Generator[str, Any, Any]] | None = None  # the command, and how it goes on
        self._continuing: Handler | None = None  # which takes the next line
        self.is_secure = False  # in TLS
        self._line_limit = _LINE_LIMIT if setup.options.auth_users is None else _AUTH_LINE_LIMIT
        self._cuts: list[int] = []  # the sizes at which rules may end it
        self._over = False

    def greet(self) -> _Reply:
        return self._answer(self._handlers["connect"], "connect", None, "")

    def receive(self, data: bytes) -> Iterator[_Reply]:
        """The replies to what data completes; each command is run when its reply is asked for."""
        if len(self.dialogue) > _DIALOGUE_LIMIT:
            self.dialogue = self.dialogue[_DIALOGUE_LIMIT // 2 :]
        data, self._rest = self._rest + data, b""
        at = 0
        while at < len(data) and not self._over:
            if self.body is not None or self.command is not None or self._skipping:
                at, reply = self._take(data, at)
            elif (end := data.find(b"\n", at, at + self._line_limit)) >= 0:
                line, at = data[at:end], end + 1
                reply = self._run_line(line)
            elif len(data) - at >= self._line_limit:
                self._skipping, self._continuing, self.conversation = True, None, None
                reply = self._run(self._handlers["too long"], "", f"line of over {self._line_limit} bytes", "")
            else:
                self._rest = data[at:]
                return
            if reply is not None:
                if reply.after is _After.TLS:  # what came before the handshake must have no effect in TLS
                    at = len(data)
                yield reply

    def _take(self, data: bytes, at: int) -> tuple[int, _Reply | None]:
        """Take what is not a command, up to where it ends in data, and the reply if that is due."""
        if self._skipping:
            end = data.find(b"\n", at)
            self._skipping = end < 0
            return (len(data) if self._skipping else end + 1), None
        if self.command is not None:
            at = self.command.payload.feed(data, at)
            return at, None if self.command.payload.missing else self._run_with_payload(self.command)
        body = self.body
        assert body is not None
        cut = self._cuts[0] - body.size if self._cuts else len(data)
        at = body.feed(data[: at + cut], at)
        if body.complete:
            self.body = None
            return at, self._run(self._handlers["message"], "message", body.size, body.content())
        return at, self._cut(self._cuts.pop(0)) if self._cuts and body.size == self._cuts[0] else None

    def end(self, farewell: str | None = None) -> None:
        """Record what is not recorded yet, because the connection ends; the farewell is said by the server."""
        if self.body is not None:
            self._leave_body(self.body.size, self.body.content(), "")
        elif self.chunks is not None or self.command is not None:
            rest = self.command.payload.data if self.command else b""
            content, self.chunks, self.command = bytes(self.chunks or b"") + rest, None, None
            self._leave_body(len(content), content, "")
        if farewell is not None:
            self.dialogue += (None, farewell, None, _After.CLOSE.value)
        if self._unpublished or (self._entry is not None and farewell is not None):
            self._publish(complete=True, noted=not self._unpublished)
        if self._entry is not None and self._delivered is None:
            self._delivered = self._entry.message
            self._hand_out(self._setup.on_other, self._delivered)

    def _run_line(self, line: bytes) -> _Reply | None:
        """The reply to a line; None if it has to wait for more."""
        if self._continuing is not None:
            handler, self._continuing = self._continuing, None
            answer = _decode(line.strip())
            return self._run(handler, self._stage, answer if answer == "*" else "***", answer)
        request, verb, argument = _parse_command(line)
        handler = self._handlers.get(verb) or self._handlers["unknown"]
        size = len(handler.keyword)
        if size and argument[:size].upper() != handler.keyword:
            handler = self._handlers["unknown"]
        argument = argument[size:].strip()
        if handler.is_special:
            request = handler.hide(request)
            if handler.has_payload:
                return self._await_payload(handler, verb, request, argument)
        return self._run(handler, verb, request, argument)

    def _await_payload(self, handler: Handler, verb: str, request: str, argument: str) -> _Reply | None:
        parsed = handler.parse(argument)
        if parsed is None:
            return self._run(handler, verb, request, argument)
        limit = self._setup.options.msg_size_limit
        command = _Command(handler, verb, request, argument, _Payload(parsed[0], limit))
        if parsed[0] == 0:
            return self._run_with_payload(command)
        self.command = command
        return None

    def _run_with_payload(self, command: _Command) -> _Reply:
        self.command, self.payload = None, command.payload
        reply = self._run(command.handler, command.verb, command.request, command.argument)
        self.payload = None
        if reply.after is _After.MESSAGE:
            content, self.chunks = bytes(self.chunks or b""), None
            reply = self._run(self._handlers["message"], "message", len(content), content)
            self.request = command.request
        return reply

    def secure(self, version: str, cipher: str) -> None:
        """Begin anew in TLS; what was said before it is forgotten (RFC 3207 section 4.2)."""
        if self._entry is not None and self._keeps_messages:
            self._begin_message()
        self.erase((*_STEPS, "auth"))
        self.is_secure = True
        self.done.add("tls")
        self.steps["tls"] = _Exchange(None, "", True, (version, cipher))

    def _run(self, handler: Handler, stage: str, request: _Request, argument: Any) -> _Reply:
        if self._entry is not None and self._keeps_messages and not handler.notes:
            self._begin_message()
        self.request = request
        self._unpublished = True
        reply = self._answer(handler, stage, request, argument)
        complete = self._over or (reply.accepts and handler.completes)
        if complete or self._entry is not None:
            self._publish(complete=complete, noted=handler.notes)
        if reply.after is not _After.COMMAND:
            self._await_more(handler, reply.after)
        return reply

    def _await_more(self, handler: Handler, after: _After) -> None:
        if after is _After.BODY:
            self.body = _BodyReader(self._setup.options.msg_size_limit)
            self._cuts = self.rules.cuts() if self.rules.newest_first else []
        elif after is _After.LINE:
            self._continuing = handler

    def _answer(self, handler: Handler, stage: str, request: _Request, argument: Any) -> _Reply:
        self._stage = stage
        try:
            reply = handler.run(self, request, argument)
        except BaseException:  # noqa: BLE001 - of a handler of the user
            self._setup.log.failure(f"{type(handler).__name__} failed")
            reply = handler.reply("msg_msg_failed")
            self.dialogue += (request, reply.text)
        if reply.after.ends:
            self._over = True
            self.dialogue += (None, reply.after.value)
        return reply

    def decide(self, names: Sequence[str], request: _Request, argument: Any, after: int | None = None) -> Action | None:
        """What a rule does here; None if it is all as usual."""
        text = request if isinstance(request, str) else _decode(argument or b"")
        try:
            return self.rules.decide(self._stage, after, text, names, lambda: Message(self, 0, 0.0))
        except BaseException:  # noqa: BLE001 - pytest.fail() is no Exception
            self._setup.log.failure("a rule failed")
            return Action(self._setup.options.msg_msg_failed)

    def accepted_recipients(self) -> list[str]:
        return [recipient.value for recipient in self.recipients if recipient.accepted]

    def _cut(self, after: int) -> _Reply | None:
        """End the session in its body, if a rule is for that."""
        assert self.body is not None
        self._stage = "message"
        action = self.decide(self.accepted_recipients(), None, self.body.content(), after)
        if action is None:
            return None
        reply = self._handlers["message"].perform(action, _Reply("", b""))
        self._leave_body(self.body.size, self.body.content(), reply.text)
        self._over = True
        self.dialogue += (None, reply.after.value)
        self._publish(complete=True)
        return reply

    def _leave_body(self, size: int, content: bytes | None, response: str) -> None:
        self.steps["msg"] = _Exchange(size, response, False, content)
        self.dialogue += (size, response or None)
        self.body = None
        self._unpublished = True

    def _begin_message(self) -> None:
        """Leave the accepted one as it is; the next begins with the greeting and the steps that last."""
        self._entry = self._stamp = self._delivered = None
        self.erase(_ENVELOPE)
        self.dialogue = self.dialogue[:2]
        for step in self.steps.values():
            self.dialogue += (step.request, step.response or None)

    def deliver(self) -> bool:
        """Hand out the mail that is about to be accepted; returns whether it may be."""
        self._stamp = self._mailbox.stamp()
        self._delivered = Message(self, *self._stamp)
        if not self._hand_out(self._setup.on_message, self._delivered):
            self._delivered = None
        return self._delivered is not None

    def _hand_out(self, take: Callable[[Message], object], message: Message) -> bool:
        try:
            take(message)
        except BaseException:  # noqa: BLE001 - pytest.fail() is no Exception
            self._setup.log.failure("on_message failed")
            return False
        return True

    def _publish(self, *, complete: bool, noted: bool = False) -> None:
        """Put the message into the mailbox if it is complete, bring it up to date if it is there.

        What is only noted on a message goes with it where that was purged, and is no new message.
        """
        self._stamp = self._stamp or self._mailbox.stamp()
        message = self._delivered
        if message is None or message._dialogue is not self.dialogue or message._said != len(self.dialogue):
            message = Message(self, *self._stamp)
        if self._entry is not None and (self._mailbox.update(self._entry, message) or noted):
            self._unpublished = False
        else:
            self._entry = self._mailbox.add(message) if complete else None
            self._unpublished = not complete

    def erase(self, steps: Sequence[str]) -> None:
        """Forget the steps, unless they are of an accepted message that is to be kept."""
        if self._entry is not None and self._keeps_messages:
            return
        for step in steps:
            self.steps.pop(step, None)
        self.done.difference_update(steps)
        if "rcptto" in steps:
            self.recipients = []
            if "mailfrom" in steps:
                self.chunks = None


# ----------------------------------------------------------------------------------------- mailbox


class _Entry:
    """A place in the mailbox."""

    __slots__ = ("message", "purged")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.purged = False


class _Watch:
    """What a waiting thread has found, and what it has still to look at."""

    def __init__(self, entries: Iterable[_Entry]) -> None:
        self.fresh = dict.fromkeys(entries)  # or changed since it was looked at
        self.missing = 0  # for fewer it need not be woken
        self.matching: dict[_Entry, Message] = {}

    def is_due(self) -> bool:
        return len(self.fresh) >= self.missing

    def judge(self, entries: Iterable[_Entry], where: Callable[[Message], object] | None) -> None:
        for entry in entries:
            message = entry.message
            if where is None or where(message):
                self.matching[entry] = message
            else:
                self.matching.pop(entry, None)


class _Mailbox:
    """The recorded messages of a server, oldest first."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._entries: list[_Entry] = []
        self._watches: list[_Watch] = []

    def stamp(self) -> tuple[int, float]:
        """A number for a message, and the time."""
        return next(self._numbers), self._clock()

    def add(self, message: Message) -> _Entry:
        entry = _Entry(message)
        with self._changed:
            self._entries.append(entry)
            self._show(entry)
        return entry

    def update(self, entry: _Entry, message: Message) -> bool:
        """Put another message in its place; returns whether it was still there."""
        with self._changed:
            entry.message = message
            self._show(entry)
            return not entry.purged

    def _show(self, entry: _Entry) -> None:
        for watch in self._watches:
            watch.fresh[entry] = None
            if watch.is_due():
                self._changed.notify_all()

    def messages(self, *, purge: bool) -> list[Message]:
        with self._changed:
            messages = [entry.message for entry in self._entries]
            if purge:
                self._purge(self._entries)
        return messages

    def _purge(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            entry.purged = True
        self._entries = [entry for entry in self._entries if not entry.purged]

    def wait(
        self, count: int, timeout: float, where: Callable[[Message], object] | None, *, purge: bool
    ) -> tuple[bool, list[Message]]:
        """Whether count messages match in time, and all that do; it purges these only if so."""
        deadline = time.monotonic() + timeout
        with self._changed:
            watch = _Watch(self._entries)
            self._watches.append(watch)
        try:
            while True:
                with self._changed:
                    in_time = self._changed.wait_for(watch.is_due, deadline - time.monotonic())
                    fresh, watch.fresh = watch.fresh, {}
                watch.judge(fresh, where)  # without the lock, which is not for the user's code to hold
                with self._changed:
                    if len(watch.matching) >= count or not in_time:
                        found = [entry for entry in self._entries if entry in watch.matching]  # and was not purged
                        messages = [watch.matching[entry] for entry in found]
                        watch.matching = dict(zip(found, messages, strict=True))
                        enough = len(found) >= count
                        if enough and purge:
                            self._purge(found)
                        if enough or not in_time:
                            return enough, messages
                    watch.missing = count - len(watch.matching)
        finally:
            with self._changed:
                self._watches.remove(watch)


# ------------------------------------------------------------------------------------------ logger


class Logger(Protocol):
    """What a server logs to. A logging.Logger is good as it is: activity then goes to its info()."""

    def info_activity(self, message: str, /) -> None: ...  # the sessions, their requests and replies
    def info(self, message: str, /) -> None: ...  # start and stop
    def warning(self, message: str, /) -> None: ...  # a stop that begins, a session that broke off
    def error(self, message: str, /) -> None: ...  # a start that failed, a client that could not be served


class _Log:
    """Calls a logger and survives it; without one, prints what the options ask for."""

    def __init__(self, logger: Any, options: Configuration) -> None:
        for name in ("info", "warning", "error"):
            if logger is not None and not callable(getattr(logger, name, None)):
                raise ConfigurationError(f"logger={logger!r}: must have a method {name}()")
        self._logger = logger
        self._prints = options.log_to_stdout
        self.shows_activity = logger is not None or (options.log_to_stdout and options.log_server_activity)
        self._has_failed = False

    def activity(self, what: str, text: str | int = "") -> None:
        if self.shows_activity:
            line = "message binary data portion" if isinstance(text, int) else _printable(text)
            self("info_activity", what + line)

    def __call__(self, level: str, message: str) -> None:
        try:
            if self._logger is not None:
                getattr(self._logger, level, self._logger.info)(message)
            elif self._prints:
                self._print(level.partition("_")[0].upper(), message)
        except Exception as error:  # noqa: BLE001 - whatever it is, the session is not to blame for it
            if not self._has_failed:
                self._has_failed = True
                with contextlib.suppress(Exception):
                    print(f"smtpmock: the log is incomplete, its logger raised {error!r}", file=sys.stderr)

    def failure(self, what: str) -> None:
        """Log the exception that is being handled."""
        import traceback

        self("error", f"{what}: {traceback.format_exc()}")

    def _print(self, level: str, message: str) -> None:
        stream = sys.stderr if level == "ERROR" else sys.stdout  # looked up here, since tests replace them
        now = time.time()
        stamp = time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(now))
        line = f"{level}: {stamp}.{int(now % 1 * 1e6):06d} {message}\n"
        encoding = stream.encoding or "utf-8"
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


# ------------------------------------------------------------------------------------------ server


def _set_timeout(sock: socket.socket, seconds: float) -> None:
    """Have reads and writes fail after so many seconds, with BlockingIOError or TimeoutError."""
    if os.name != "posix":
        sock.settimeout(seconds)
        return
    # settimeout() costs a poll() with every read and write, which is half of what a command takes.
    timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


class _Connection(socketserver.BaseRequestHandler):
    """Moves bytes between a client and its session, and does what the replies say."""

    request: Any  # the socket, later perhaps an ssl.SSLSocket
    server: _Listener

    def setup(self) -> None:
        self.plain: socket.socket = self.request
        self.options = self.server.setup.options
        self.log = self.server.log
        self.session = _Session(self.server.setup, self.client_address[:2])
        self.unsent = bytearray()
        self.is_idle = False  # in a read, for a command: nothing is lost if stop() ends it
        self.server.connections.add(self)
        self.log.activity("SMTP session started")

    def handle(self) -> None:
        try:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _set_timeout(self.request, self.options.session_timeout)
            goes_on = not self.options.implicit_tls or self._start_tls()
            goes_on = goes_on and self._say(self.session.greet())
            while goes_on and (data := self._read()):
                for reply in self.session.receive(data):
                    goes_on = self._say(reply, self.session.request)
                    if not goes_on:
                        break
        except OSError as error:  # the client is gone, or does not read
            self.log("warning", f"SMTP session broke off: {error}")

    def finish(self) -> None:
        self.session.end()
        self.server.connections.discard(self)
        if self.request is not self.plain:  # which is for the listener to close
            self.shut_down(socket.SHUT_WR)
            self.request.close()
        self.log.activity("SMTP session finished")

    def _say(self, reply: _Reply, request: _Request = None) -> bool:
        """Log, wait and send as the reply says; returns whether the session goes on.

        What a client sends without waiting for each reply gets the replies together (RFC 2920).
        """
        if request is not None and self.log.shows_activity:
            self.log.activity("SMTP request: ", request)
        if reply.delay:
            self._flush()
            if self.server.cut.wait(reply.delay):
                return False
        if self.log.shows_activity:
            self.log.activity("SMTP response: ", reply.text if reply.data else "none")
        if not reply.trickle:
            self.unsent += reply.data
        elif not self._trickle(reply):
            return False
        if (reply.after is _After.COMMAND or reply.after is _After.BODY) and len(self.unsent) < 65536:
            return True
        self._flush()
        return self._go_on(reply)

    def _go_on(self, reply: _Reply) -> bool:
        """Do what comes after a reply that was sent; returns whether the session goes on."""
        if reply.after is _After.TLS:
            return self._start_tls()
        if reply.after is _After.RESET:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()
        elif reply.after is _After.SILENCE:
            self._stay_silent()
        elif reply.after is _After.CLOSE and reply.data and self.session.is_secure:
            self.request.settimeout(0)  # the client is told that nothing follows, and need not say so, too
            with contextlib.suppress(OSError, ValueError):
                self.request.unwrap()
        return not reply.after.ends

    def _trickle(self, reply: _Reply) -> bool:
        self._flush()
        for index in range(len(reply.data)):
            if index and self.server.cut.wait(reply.trickle):
                return False
            self.request.sendall(reply.data[index : index + 1])
        return True

    def _start_tls(self) -> bool:
        """Whether the handshake succeeds."""
        self.plain.settimeout(self.options.session_timeout)  # which OpenSSL minds, as it does not the other
        try:
            self.request = self.options.ssl_context.wrap_socket(
                self.plain, server_side=True, do_handshake_on_connect=False
            )
            self.is_idle = True
            if not self.server.stopping:
                self.request.do_handshake()
                self.session.secure(self.request.version(), self.request.cipher()[0])
            self.is_idle = False
        except (OSError, ValueError) as error:
            self.log("warning", f"SMTP session broke off: TLS handshake failed: {error}")
        return self.session.is_secure

    def _stay_silent(self) -> None:
        """Read what the client says, until it or the server ends or nothing has come for the session's timeout."""
        self.is_idle = True
        with contextlib.suppress(OSError):
            while not self.server.stopping and self.request.recv(65536):
                pass

    def _flush(self) -> None:
        if self.unsent:
            self.request.sendall(self.unsent)
            self.unsent.clear()

    def _read(self) -> bytes:
        """What the client sends next; nothing if the session is at its end."""
        self._flush()
        server = self.server
        try:
            # is_idle is set before stopping is read, and stop() does the reverse: one of the two notices.
            self.is_idle = is_idle = self.session.body is None and self.session.command is None
            if self.session.is_secure and not (is_idle and server.stopping):
                self._await_input()
            if not (is_idle and server.stopping):
                data: bytes = self.request.recv(65536 if is_idle else 262144)
                self.is_idle = False
                if not (is_idle and server.stopping):
                    return data
            return self._say_goodbye(self.options.msg_server_shutdown)
        except (TimeoutError, BlockingIOError):
            return self._say_goodbye(self.options.msg_session_timeout)
        except ConnectionError:  # a reset is an end like any other
            return b""

    def _await_input(self) -> None:
        """Wait outside of TLS, in which nothing can be said any more once stop() has woken a read."""
        if not self.request.pending():
            with selectors.DefaultSelector() as selector:
                selector.register(self.request, selectors.EVENT_READ)
                if not selector.select(self.options.session_timeout):
                    raise TimeoutError

    def _say_goodbye(self, text: str) -> bytes:
        self.session.end(text)
        self._say(_Reply(text, _encode(text), after=_After.CLOSE))
        return b""

    def shut_down(self, how: int) -> None:
        """Wake the session's thread from what it waits for in the socket. Called by the one that stops the server."""
        with contextlib.suppress(OSError):  # it may have ended just now
            socket.socket.shutdown(self.request, how)  # that of an SSLSocket would forget that it is one


_SPARE_THREADS = 16


class _SessionThread(threading.Thread):
    """Serves one client after another: to begin a thread costs as much as a short session.

    A daemon, so that a test which forgets its server can still end.
    """

    def __init__(self, listener: _Listener) -> None:
        from queue import SimpleQueue

        super().__init__(name="smtpmock session", daemon=True)
        self.listener = listener
        self.clients: SimpleQueue[tuple[Any, Any] | None] = SimpleQueue()  # None after the last

    def run(self) -> None:
        while (client := self.clients.get()) is not None:
            self.listener.process_request_thread(*client)
            if len(self.listener.spare_threads) >= _SPARE_THREADS:
                return
            self.listener.spare_threads.append(self)


def _join_all(threads: Sequence[threading.Thread], timeout: float) -> bool:
    """Whether all of the threads but this one, where a logger may have called stop(), end in time."""
    deadline = time.monotonic() + timeout
    others = [thread for thread in threads if thread is not threading.current_thread()]
    for thread in others:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in others)


class _Listener(socketserver.ThreadingTCPServer):
    """Accepts clients, from open() to close()."""

    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers have one port
    request_queue_size = socket.SOMAXCONN

    def __init__(self, family: int, address: Any, setup: _Setup) -> None:
        self.address_family = family
        super().__init__(address, _Connection, bind_and_activate=False)
        self.setup = setup
        self.log = setup.log
        self.connections: set[_Connection] = set()
        self.spare_threads: list[_SessionThread] = []
        self.stopping = False
        self.cut = threading.Event()  # set when what still goes on is to end at once
        self.thread = threading.Thread(target=self.serve_forever, name="smtpmock listener", daemon=True)
        self.process = os.getpid()
        self.is_short = False  # of descriptors or threads, so that this is logged once
        self.wake: tuple[socket.socket, ...] = ()  # the end to write to, and the one to wait for
        try:
            self.wake = socket.socketpair()
            if family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # [::] takes IPv4, too
            self.server_bind()
        except OSError:
            self.server_close()
            raise

    def open(self) -> None:
        self.socket.setblocking(False)  # a client may be gone before it is accepted
        self.selector = selectors.DefaultSelector()
        self.thread.start()

    def serve_forever(self, poll_interval: float | None = None) -> None:
        """Accept until close(). It is woken, so it does not poll."""
        with self.selector as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self.wake[1], selectors.EVENT_READ)
            while True:
                selector.select(poll_interval)
                if self.stopping:
                    return
                self.handle_request()

    def handle_request(self) -> None:
        try:
            client = self.get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._tell_shortage(error)
                self.cut.wait(0.05)  # the client is still there, and would wake this thread at once
            return  # otherwise it is gone again
        try:
            if self.spare_threads:
                thread = self.spare_threads.pop()
            else:
                thread = _SessionThread(self)
                thread.start()
        except RuntimeError as error:
            self._tell_shortage(error)
            with contextlib.suppress(OSError):
                client[0].send(b"421 No thread for another session\r\n")
            self.shutdown_request(client[0])
        else:
            self.is_short = False
            thread.clients.put(client)

    def _tell_shortage(self, error: Exception) -> None:
        if not self.is_short:
            self.log("error", f"SMTP mock server cannot take another client: {error}")
        self.is_short = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.log.failure("SMTP session failed")

    def close(self, timeout: float) -> bool:
        """End all sessions, after timeout seconds by force; returns whether that was needed."""
        self.stopping = True
        if self.process != os.getpid():  # after a fork, the threads and what goes on in the sockets are the parent's
            for connection in self.connections:
                connection.request.close()
            self.server_close()
            return False
        self.wake[0].send(b"\0")
        self.thread.join()
        self.server_close()
        for connection in self.connections.copy():
            if connection.is_idle:
                connection.shut_down(socket.SHUT_RD)
        threads = [t for t in threading.enumerate() if isinstance(t, _SessionThread) and t.listener is self]
        for thread in threads:
            thread.clients.put(None)
        if not _join_all(threads, timeout):
            self.cut_off()
            _join_all(threads, 5)  # they end at once, unless a logger holds one up, which may be for ever
        return self.cut.is_set()

    def cut_off(self) -> None:
        """End all sessions at once."""
        self.cut.set()
        for connection in self.connections.copy():
            connection.shut_down(socket.SHUT_RDWR)

    def server_close(self) -> None:
        super().server_close()
        for sock in self.wake:
            sock.close()


def _bind(setup: _Setup) -> _Listener:
    """A listener on the first of the host's addresses that can be had."""
    failure = OSError("it has no address")
    name = setup.options.host.strip("[]")
    host = name.encode() if name.isascii() else name  # str would import the codec of international names
    for family, _, _, _, address in socket.getaddrinfo(host, setup.options.port, type=socket.SOCK_STREAM):
        try:
            return _Listener(family, address, setup)
        except OSError as error:
            failure = error
    raise failure


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_Where = Callable[[Message], object]
_REPORTED = 10  # messages and sessions in the text of a WaitTimeoutError


class Server:
    """An SMTP server in threads of this process.

    Its options are those of Configuration, by name, as a Configuration, or both, and then a name wins;
    ConfigurationError if one cannot be used. A logger, a Logger or logging.Logger, replaces the default one.
    on_message is called with each accepted message before the 250 to it, in the thread of its session. If it
    raises, the client gets msg_msg_failed instead, the error is logged, and the message is not accepted.
    handlers are subclasses of Handler for verbs of your own, or in place of the usual ones.
    """

    def __init__(
        self,
        configuration: Configuration | None = None,
        *,
        logger: Any = None,
        on_message: Callable[[Message], object] | None = None,
        handlers: Iterable[type[Handler]] = (),
        **options: Any,
    ) -> None:
        if not isinstance(configuration, Configuration | None):
            raise ConfigurationError(f"configuration={configuration!r}: must be a Configuration")
        if not (on_message is None or callable(on_message)):
            raise ConfigurationError(f"on_message={on_message!r}: must be callable")
        self._options = dataclasses.replace(configuration, **options) if configuration else Configuration(**options)
        self._host, self._port = self._options.host, self._options.port
        self._mailbox = _Mailbox()
        self._log = _Log(logger, self._options)
        self._rules = _Rules(self._options.seed)
        forms = _make_handlers(self._options, handlers)
        self._setup = _Setup(self._options, forms, self._mailbox, self._log, self._rules, on_message or _ignore)
        self._lifecycle = threading.Lock()  # one start() or stop() at a time
        self._listener: _Listener | None = None

    def with_logger(self, logger: Any) -> Server:
        """Log to this Logger or logging.Logger, None for the default one, from the next start() on."""
        self._log = _Log(logger, self._options)
        self._setup = self._setup._replace(log=self._log)
        return self

    def start(self) -> Server:
        """Listen; clients can connect when it returns.

        Raises ServerStateError if the server runs, ServerStartError if it cannot have the host and port.
        """
        return self._start(lambda host, port: None)

    def _start(self, announce: Callable[[str, int], None]) -> Server:
        """Like start(), and calls announce when clients can connect, before the first is served."""
        with self._lifecycle:
            if self._listener is not None:
                raise ServerStateError(f"{self!r} cannot start: it is running")
            try:
                listener = _bind(self._setup)
                self._host, self._port = self._options.host.strip("[]"), listener.server_address[1]
                try:
                    listener.server_activate()  # first: whoever reads the announcement may connect at once
                    announce(self._host, self._port)
                    self._log("info", f"SMTP mock server started on port: {self._port}")
                    listener.open()
                except BaseException:
                    listener.server_close()
                    raise
            except (OSError, ValueError, RuntimeError) as error:  # of the system, of a host's name, of a thread
                raise self._explain(error) from error
            self._listener = listener
        return self

    def _explain(self, error: Exception) -> ServerStartError:
        reason = getattr(error, "strerror", None) or error
        explained = ServerStartError(f"cannot listen on {_join(self._options.host, self._options.port)}: {reason}")
        explained.errno = getattr(error, "errno", None)
        self._log("error", str(explained))
        return explained

    def stop(self) -> None:
        """End all sessions and give up the port; ServerStateError if the server does not run.

        Who waits for the client's next command gets a 421. Who is in a body or a delay may go on with
        it for shutdown_timeout. All are recorded, and no thread or socket is left.
        """
        with self._lifecycle:
            if self._listener is None:
                raise ServerStateError(f"{self!r} cannot stop: it is not running")
            self._log("warning", "SMTP mock server is in the shutdown mode and won't accept new connections")
            forced = self._listener.close(self._options.shutdown_timeout)
            self._listener = None
            self._log(
                "info", f"SMTP mock server was {'force stopped by timeout' if forced else 'stopped successfully'}"
            )

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ServerStateError):  # the block may have stopped it
            self.stop()

    @property
    def host(self) -> str:
        """As configured; from start() on as a client takes it, without the brackets of [::1]."""
        return self._host

    @property
    def port(self) -> int:
        """As configured; from start() on, and after stop(), the real one."""
        return self._port

    @property
    def is_running(self) -> bool:
        return self._listener is not None

    def messages(self) -> list[Message]:
        """What was recorded, oldest first."""
        return self._mailbox.messages(purge=False)

    def messages_and_purge(self) -> list[Message]:
        """What was recorded, which is then no longer here: just what is returned is removed."""
        return self._mailbox.messages(purge=True)

    def on(self, stage: str, match: str | Callable[[str], object] | None = None) -> Rule:
        """A rule for a stage: connect, a verb, message (the end of a body), or * for all.

        match is an address or a domain (at DATA and message, of a recipient), or a function of the line, or of
        the body at message. The newest rule that matches, and is not spent, wins over anything else.
        ConfigurationError if one of these cannot be used.
        """
        if not (match is None or isinstance(match, str) or callable(match)):
            raise ConfigurationError(f"match={match!r}: must be an address, a domain or a function of the line")
        return Rule(self._rules, _parse_stage(stage), match)

    def clear_rules(self) -> None:
        """Remove all rules."""
        self._rules.clear()

    def reset(self) -> None:
        """Drop what was recorded, and all rules, for the next test."""
        self._rules.clear()
        self._mailbox.messages(purge=True)

    def wait_for_messages(self, count: int, timeout: float = 5.0, where: _Where | None = None) -> list[Message]:
        """All messages, or all for which where(message) is true, as soon as there are count.

        WaitTimeoutError after timeout seconds. What where() raises is raised here.
        """
        return self._wait(count, timeout, where, purge=False)

    def wait_for_messages_and_purge(
        self, count: int, timeout: float = 5.0, where: _Where | None = None
    ) -> list[Message]:
        """Like wait_for_messages(), and removes just what it returns."""
        return self._wait(count, timeout, where, purge=True)

    def _wait(self, count: int, timeout: float, where: _Where | None, *, purge: bool) -> list[Message]:
        _check("count", count, _COUNT)
        _check("timeout", timeout, _SECONDS)
        if not (where is None or callable(where)):
            raise ConfigurationError(f"where={where!r}: must be callable")
        enough, messages = self._mailbox.wait(count, timeout, where, purge=purge)
        if not enough:
            what = "messages" if where is None else "matching messages"
            text = f"{len(messages)} of {count} {what} came in {timeout:g} seconds"
            raise WaitTimeoutError("\n  ".join([text, *self._report()]), messages)
        return messages

    def _report(self) -> Iterator[str]:
        """What somebody wants to know who has waited in vain."""
        messages = self.messages()
        yield f"{len(messages)} are recorded{':' if messages else ''}"
        if len(messages) > _REPORTED:
            yield "  ..."
        for message in messages[-_REPORTED:]:
            yield f"  {message!r}, subject {message.subject!r}"
        sessions = list(self._listener.connections) if self._listener else []
        yield f"{len(sessions)} sessions are open{':' if sessions else ''}"
        for connection in sessions[:_REPORTED]:
            session = connection.session
            yield f"  {_join(*session.peer)}: {' / '.join(_write_dialogue(session.dialogue[-2:]))}"

    def __repr__(self) -> str:
        return f"<smtpmock.Server on {_join(self._host, self._port)}{'' if self._listener else ', not running'}>"


# ------------------------------------------------------------------------------------ command line

_LOG = ("log", _FLAG, False, "log to stdout, errors to stderr")
_LOG_OPTIONS = ("log_to_stdout", "log_server_activity")  # which have one flag between them

_CERTIFICATE = (
    ("tls_cert", _TEXT, "", "PEM file with a certificate, and all that belongs to it; turns on STARTTLS"),
    ("tls_key", _TEXT, "", "PEM file with its key, if that is not in the same"),
)

# What becomes of the mail, for those who cannot ask a Server for it.
_OUTPUTS = (
    ("json", _FLAG, False, "print each accepted mail, and each session without one, as a line of JSON; log to stderr"),
    ("save_dir", _TEXT, "", "folder for each accepted mail as 000001.eml and its record as 000001.json"),
    ("maildir", _TEXT, "", "Maildir to deliver each accepted mail to"),
)


class _Printer:
    """Prints whole lines to what is stdout now, from any thread."""

    def __init__(self) -> None:
        self._out = sys.stdout
        self._lock = threading.Lock()

    def __call__(self, line: str) -> None:
        with self._lock:
            self._out.write(line + "\n")
            self._out.flush()

    def json(self, value: object) -> None:
        import json

        self(json.dumps(value))


def _make_folder(path: str) -> None:
    """Make it if it is not there, and see now whether it can be written."""
    import tempfile

    os.makedirs(path, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


class _Folder:
    """Saves mails, each in a file of its own with its record beside it: complete, or not there."""

    def __init__(self, path: str) -> None:
        _make_folder(path)
        self._path = path
        self._lock = threading.Lock()
        names = [re.match(r"\.?(\d{6,})\.", name) for name in os.listdir(path)]
        self._number = max((int(name[1]) for name in names if name), default=0)

    def __call__(self, message: Message) -> None:
        import json

        mail, record = self._reserve()
        try:
            self._write(record, json.dumps(message.to_dict(), indent=1).encode())
            self._write(mail, message.as_bytes())  # last: where it is, the other is
        except BaseException:
            for name in (mail, "." + mail, record, "." + record):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self._path, name))
            raise

    def _reserve(self) -> tuple[str, str]:
        """Names that no other process takes, either."""
        with self._lock:
            while True:
                self._number += 1
                mail, record = f"{self._number:06d}.eml", f"{self._number:06d}.json"
                with contextlib.suppress(FileExistsError):
                    temporary = os.path.join(self._path, "." + mail)
                    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666))
                    if not os.path.exists(os.path.join(self._path, mail)):
                        return mail, record
                    os.unlink(temporary)

    def _write(self, name: str, data: bytes) -> None:
        temporary = os.path.join(self._path, "." + name)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.join(self._path, name))


def _open_maildir(path: str) -> Callable[[Message], None]:
    import mailbox

    for name in ("tmp", "cur", "new"):
        _make_folder(os.path.join(path, name))
    maildir = mailbox.Maildir(path)
    lock = threading.Lock()  # it is not made for threads

    def add(message: Message) -> None:
        with lock:
            maildir.add(message.as_bytes())

    return add


def _read(kind: _Kind, text: str) -> Any:
    try:
        return kind.parse(text)
    except (KeyError, ValueError):
        return text  # for others to say what is wrong with it


# The actions of a -rule: what follows the name, and what may follow that.
_LIMITS = {"times": _TIMES, "probability": _PROBABILITY, "close": _FLAG, "after": _COUNT}
_ACTIONS: dict[str, tuple[_Kind | None, tuple[str, ...]]] = {
    "reply": (_TEXT, ("times", "probability", "close")),
    "delay": (_SECONDS, ("times", "probability")),
    "drop": (_TEXT, ("times", "probability", "after")),
    "reset": (None, ("times", "probability", "after")),
    "silence": (None, ("times", "probability")),
    "raw": (_BYTES, ("times", "probability")),
    "trickle": (_SECONDS, ("times", "probability")),
}


def _add_rule(server: Server, text: str) -> None:
    """Read "STAGE [ADDRESS]: ACTION [ARGUMENT][; NAME=VALUE]..."."""

    def expect(allowed: Iterable[str], word: str) -> None:
        if word not in allowed:
            raise ConfigurationError(f"rule {text!r}: {word!r} must be {' or '.join(allowed)}")

    where, colon, what = (part.strip() for part in text.partition(": "))
    match = re.fullmatch(r"(\S+(?: +(?:FROM|TO))?)(?: +(\S+))?", where, re.IGNORECASE)
    if match is None or not colon:
        raise ConfigurationError(f"rule {text!r}: must be 'STAGE: ACTION' or 'STAGE ADDRESS: ACTION'")
    action, *limits = (part.strip() for part in what.split(";"))
    name, _, argument = action.partition(" ")
    expect(_ACTIONS, name)
    kind, allowed = _ACTIONS[name]
    arguments: list[Any] = [] if kind is None or (name == "drop" and not argument) else [_read(kind, argument)]
    if kind is None and argument:
        raise ConfigurationError(f"rule {text!r}: {argument!r} must not be after {name}")
    if name == "reply":
        arguments = [part.strip() or None for part in argument.split("|")] if argument else []
    options = {}
    for limit in limits:
        key, _, value = (part.strip() for part in limit.partition("="))
        expect(allowed, key)
        options[key] = _read(_LIMITS[key], value or "true")
    try:
        getattr(server.on(match[1], match[2]), name)(*arguments, **options)
    except ConfigurationError as error:
        raise ConfigurationError(f"rule {text!r}: {error}") from error


_Takers = tuple[Callable[[Message], None], Callable[[Message], None]]


def _open_outputs(printer: _Printer, json: bool = False, save_dir: str = "", maildir: str = "") -> _Takers:
    """What to call with each accepted message, and what with each other."""
    takers: list[Callable[[Message], None]] = []
    for path, open_output in ((save_dir, _Folder), (maildir, _open_maildir)):
        try:
            takers += [open_output(path)] if path else []
        except OSError as error:
            raise SMTPMockError(f"cannot write to {path}: {error.strerror}") from error
    if json:
        takers.append(lambda message: printer.json(message.to_dict()))

    def on_message(message: Message) -> None:
        for take in takers:
            take(message)

    return on_message, takers[-1] if json else _ignore


def _add_flag(parser: Any, name: str, kind: _Kind, default: Any, about: str) -> None:
    first, *others = name.split("_")
    parser.add_argument(
        "-" + first + "".join(map(str.title, others)),  # as in go-smtp-mock
        "--" + name.replace("_", "-"),
        dest=name,
        type=functools.partial(_read, kind),
        default=None,
        help=f"{about} (default: {', '.join(default) if kind is _NAMES else default})".replace("%", "%%"),
        **({"nargs": "?", "const": True} if kind is _FLAG else {"metavar": "..."}),
    )


def _make_parser() -> Any:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise ConfigurationError(message)

    parser = Parser("smtpmock", description=__doc__.partition("\n")[0], add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="print this and exit")
    parser.add_argument("-v", "--version", action="store_true", help="print the version and exit")
    for flag in (_LOG, *_CERTIFICATE, *_OUTPUTS):
        _add_flag(parser, *flag)
    about = "deviation from the usual, as 'RCPT bob@example.com: reply 550 No such user; times=2'; can be repeated"
    parser.add_argument("-rule", "--rule", dest="rules", action="append", metavar="...", help=about)
    for field in dataclasses.fields(Configuration):
        if field.name not in _LOG_OPTIONS and field.metadata["kind"] is not _CONTEXT:
            _add_flag(parser, field.name, field.metadata["kind"], field.default, field.metadata["about"])
    return parser


def _load_certificate(certificate: str, key: str) -> Any:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key or None)
    except OSError as error:
        reason = f"{error.strerror or error}"
        raise ConfigurationError(f"tls_cert={certificate!r}, tls_key={key!r}: cannot be loaded: {reason}") from error
    return context


def _parse_arguments(parser: Any, argv: Sequence[str]) -> dict[str, Any]:
    known = list(parser._option_string_actions)
    for argument in argv:
        flag = argument.partition("=")[0]
        if re.match("--?[a-zA-Z]", flag) and flag not in known:
            raise ConfigurationError(f"{flag}: there is no such flag{_suggest(flag, known)}")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    for name, kind, *_ in (_LOG, *_OUTPUTS):
        if name in given:
            _check(name, given[name], kind)
    if "log" in given:
        given.update(dict.fromkeys(_LOG_OPTIONS, given.pop("log")))
    certificate, key = given.pop("tls_cert", ""), given.pop("tls_key", "")
    if certificate or key:
        given["ssl_context"] = _load_certificate(certificate, key)
    return given


def _run_until_signalled(server: Server, announce: Callable[[str, int], None]) -> None:
    """Another signal cuts the graceful stop short."""
    import signal

    def stop() -> None:
        server.stop()
        waker.send(b"\0")

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGQUIT") if hasattr(signal, name)]
    wakened, waker = socket.socketpair()
    with wakened, waker:
        waker.setblocking(False)
        # Whichever thread a signal reaches, its number is written there.
        previous_waker = signal.set_wakeup_fd(waker.fileno())
        handlers = [signal.signal(number, lambda *_: None) for number in numbers]
        try:
            server._start(announce)
            listener = server._listener
            wakened.recv(1)
            stopper = threading.Thread(target=stop)
            stopper.start()
            if wakened.recv(1) != b"\0" and listener is not None:
                listener.cut_off()
            stopper.join()
        finally:
            signal.set_wakeup_fd(previous_waker)
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)


def _serve(server: Server, **outputs: Any) -> None:
    """Run the server until a signal comes."""
    printer = _Printer()
    on_message, on_other = _open_outputs(printer, **outputs)
    server._setup = server._setup._replace(on_message=on_message, on_other=on_other)

    def announce(host: str, port: int) -> None:
        try:
            if outputs.get("json"):
                printer.json({"listening": {"host": host, "port": port}})
            else:
                printer(f"smtpmock: listening on {_join(host, port)}")
        except OSError as error:
            raise SMTPMockError(f"cannot write to stdout: {error.strerror}") from error

    with contextlib.redirect_stdout(sys.stderr if outputs.get("json") else sys.stdout):  # of what the server logs
        _run_until_signalled(server, announce)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, that of the process if argv is None; returns the exit status."""
    parser = _make_parser()
    try:
        options = _parse_arguments(parser, sys.argv[1:] if argv is None else argv)
        asks_help, asks_version = options.pop("help"), options.pop("version")
        if asks_version:
            print(f"smtpmock: {__version__}\npython: {sys.version}")
        elif asks_help:
            print(parser.format_help(), end="")
        else:
            outputs = {name: options.pop(name) for name, *_ in _OUTPUTS if name in options}
            rules = options.pop("rules", ())
            server = Server(**options)
            for rule in rules:
                _add_rule(server, rule)
            _serve(server, **outputs)
    except SMTPMockError as error:
        print(f"smtpmock: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # Python would fail at it once more, on its way out
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
