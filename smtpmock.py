"""An SMTP server for tests: it records the mail it receives, and it fails on request.

    with smtpmock.Server() as server, smtplib.SMTP(server.host, server.port) as client:
        client.sendmail("alice@example.com", ["bob@example.com"], "Subject: Hi\\r\\n\\r\\nHello")
        message = server.message()
        assert message.mail_from == "alice@example.com"
        assert message.content == b"Subject: Hi\\r\\n\\r\\nHello\\r\\n"

One module, standard library only, one thread per connection. It reads from top to bottom:

    errors          what can go wrong, each also the built-in error that it resembles
    options         Configuration: every option with its default and its meaning
    grammar         the patterns of RFC 5321 and the parsers of a command line
    records         what the server answers, and what it records of a session
    rules           when the server deviates from its normal replies, and how
    handlers        how a command is processed, and one class per command
    session         one SMTP conversation, without a socket
    mailbox         the list of recorded messages
    logger          the Logger protocol and the default logger
    server          the connection, the listener, and Server, which owns the listener
    command line    python -m smtpmock

MIT licence, https://opensource.org/licenses/MIT. Copyright 2026 the smtpmock authors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import functools
import os
import re
import select
import selectors
import socket
import socketserver
import struct
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, NoReturn, Protocol, TypeVar

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
    "SMTPMockWarning",
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
    """An invalid option or argument. The text has its name, its value, and what is allowed."""


class ServerStateError(SMTPMockError, RuntimeError):
    """start() was called on a running server, or stop() on one that is not running."""


class ServerStartError(SMTPMockError, OSError):
    """The server cannot listen on its host and port. `errno` is that of the operating system, if there is one."""


class WaitTimeoutError(SMTPMockError, TimeoutError):
    """Too few messages arrived in time. `messages` has those that did; none of them was purged."""

    def __init__(self, text: str, messages: Sequence[Message] = ()) -> None:
        super().__init__(text)
        self.messages = list(messages)


class SMTPMockWarning(UserWarning):
    """The configuration has the server discard recipients or mails that it accepted."""


# ----------------------------------------------------------------------------------------- options


class _Kind(NamedTuple):
    """The type of an option."""

    allowed: str  # completes the sentence "must be ..." of an error message
    accepts: Callable[[Any], bool]
    parse: Callable[[str], Any]  # reads the text of a command line; may raise KeyError or ValueError


def _number(least: float, most: float, *types: type[float]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types) and not isinstance(value, bool) and least <= value <= most


def _is_text(value: object) -> bool:
    """Whether it is a str that can be sent: a lone surrogate has no encoding."""
    return isinstance(value, str) and (value.isascii() or re.search("[\ud800-\udfff]", value) is None)


def _are_names(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


def _fold(name: str) -> str:
    """Normalise a domain or an address for comparison: domains have no case, local parts have."""
    local, at, domain = name.rpartition("@")
    return local + at + domain.lower()


# poll() takes at most 2**31 milliseconds, which are 24 days.
_SECONDS = _Kind("a number of seconds from 0 to 1000000", _number(0, 1e6, int, float), float)
_TIMEOUT = _Kind("a number of seconds from 0.001 to 1000000", _number(1e-3, 1e6, int, float), float)
_PORT = _Kind("an integer from 0 to 65535", _number(0, 65535, int), int)
_COUNT = _Kind("an integer from 0 up", _number(0, float("inf"), int), int)
_SEED = _Kind("an integer", lambda value: value is None or _number(float("-inf"), float("inf"), int)(value), int)
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool), lambda text: _FLAGS[text.lower()])
_TEXT = _Kind("a string without lone surrogates", _is_text, str)
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


def _suggest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
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


# Options that have no effect without another one.
_NEEDED = {
    "auth_required": "auth_users",
    "auth_requires_tls": "ssl_context",
    "implicit_tls": "ssl_context",
    "tls_required": "ssl_context",
}


class _Fields:
    """The base of a dataclass that names the nearest field when it is given an unknown one."""

    def __new__(cls, *values: Any, **fields: Any) -> Any:
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name, value in fields.items():
            if name not in known:
                others = "" if len(known) > 9 else f"; there are {', '.join(known)}"
                what = f"there is no such option{_suggest(name, known) or others}"
                raise ConfigurationError(f"{name}={value!r}: {what}")
        made: Any = super().__new__(cls)
        object.__setattr__(made, "_given", frozenset(fields))  # the names that were spelled out
        return made


_EXTENSIONS = (
    "SIZE 8BITMIME SMTPUTF8 PIPELINING DSN CHUNKING BINARYMIME ENHANCEDSTATUSCODES DELIVERBY REQUIRETLS LIMITS"
)
_EXTENSIONS += " ETRN VRFY EXPN HELP TURN BURL MT-PRIORITY FUTURERELEASE NO-SOLICITING"


def _check_extension(name: str) -> None:
    known = _EXTENSIONS.split()
    option = {"AUTH": "auth_users", "STARTTLS": "ssl_context"}.get(name)
    if option is not None:
        raise ConfigurationError(f"extensions: {name} is announced with the option {option}")
    if name not in known and not name.startswith("X") and (hint := _suggest(name, known, 0.7)):
        raise ConfigurationError(f"extensions: {name} is unknown{hint}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Configuration(_Fields):
    """Every option of a server. An invalid one is a ConfigurationError when the Configuration is made.

    Times are in seconds and may have fractions. A reply may be any text, with or without a code. Each
    newline in it makes another line of the reply, and {msg_size_limit} stands for that option. A text
    that begins with 4 or 5 refuses the command, whichever option it is.
    """

    host: str = _option("127.0.0.1", _TEXT, "host name or address to listen on; [::] is all of them")
    port: int = _option(0, _PORT, "port to listen on; 0 takes a free one")
    log_to_stdout: bool = _option(False, _FLAG, "log to stdout, and errors to stderr")
    log_server_activity: bool = _option(False, _FLAG, "include sessions, requests and replies in that log")
    session_timeout: float = _option(30, _TIMEOUT, "seconds of silence after which a session is closed")
    shutdown_timeout: float = _option(1, _SECONDS, "seconds that stop() gives to busy sessions")
    fail_fast: bool = _option(False, _FLAG, "close a session after its first refused command")
    multiple_rcptto: bool = _option(False, _FLAG, "keep all recipients of a message, not only the last")
    multiple_message_receiving: bool = _option(False, _FLAG, "keep all messages of a session, not only the last")
    blacklisted_helo_domains: Collection[str] = _names("domains that HELO and EHLO refuse")
    blacklisted_mailfrom_emails: Collection[str] = _names("addresses that MAIL FROM refuses")
    blacklisted_rcptto_emails: Collection[str] = _names("addresses that RCPT TO refuses")
    not_registered_emails: Collection[str] = _names("addresses that RCPT TO refuses as unknown")
    response_delay_helo: float = _delay("HELO and EHLO")
    response_delay_mailfrom: float = _delay("MAIL FROM")
    response_delay_rcptto: float = _delay("RCPT TO")
    response_delay_data: float = _delay("DATA and BDAT")
    response_delay_message: float = _delay("the message body")
    response_delay_rset: float = _delay("RSET")
    response_delay_noop: float = _delay("NOOP")
    response_delay_quit: float = _delay("QUIT")
    seed: int | None = _option(None, _SEED, "number that makes rules with a probability repeatable")
    extensions: Collection[str] = _option((), _WORDS, "ESMTP extensions to announce and accept: SIZE, DSN, CHUNKING...")
    auth_users: Any = _option(None, _USERS, "who can log in: user:secret,... or a function; no AUTH without it")
    auth_required: bool = _option(False, _FLAG, "refuse MAIL FROM before AUTH")
    auth_requires_tls: bool = _option(False, _FLAG, "neither announce nor accept AUTH without TLS")
    ssl_context: Any = _option(None, _CONTEXT, "ssl.SSLContext with a certificate; no TLS without it")
    implicit_tls: bool = _option(False, _FLAG, "begin each session with TLS, as on port 465; no STARTTLS then")
    tls_required: bool = _option(False, _FLAG, "refuse all commands but EHLO, NOOP and QUIT before STARTTLS")
    msg_size_limit: int = _option(10485760, _COUNT, "largest message body, in bytes")
    msg_greeting: str = _reply("220 Welcome", "a new connection")
    msg_invalid_cmd: str = _reply(_UNRECOGNIZED, "an unknown command, and to DATA or QUIT with an argument")
    msg_invalid_cmd_helo_sequence: str = _reply(f"{_BAD} HELO should be the first", "other commands before HELO")
    msg_invalid_cmd_helo_arg: str = _reply("501 HELO requires domain address or valid address literal", "a bad HELO")
    msg_helo_blacklisted_domain: str = _reply(_UNAVAILABLE, "a blacklisted HELO")
    msg_helo_received: str = _reply(_RECEIVED, "HELO and EHLO")
    msg_invalid_cmd_mailfrom_sequence: str = _reply(f"{_BAD} MAIL FROM should be used after HELO", "an early MAIL FROM")
    msg_invalid_cmd_mailfrom_arg: str = _reply("501 MAIL FROM requires valid email address", "a bad MAIL FROM")
    msg_mailfrom_blacklisted_email: str = _reply(_UNAVAILABLE, "a blacklisted MAIL FROM")
    msg_mailfrom_received: str = _reply(_RECEIVED, "MAIL FROM")
    msg_invalid_cmd_rcptto_sequence: str = _reply(f"{_BAD} RCPT TO should be used after MAIL FROM", "an early RCPT TO")
    msg_invalid_cmd_rcptto_arg: str = _reply("501 RCPT TO requires valid email address", "a bad RCPT TO")
    msg_rcptto_blacklisted_email: str = _reply(_UNAVAILABLE, "a blacklisted RCPT TO")
    msg_rcptto_not_registered_email: str = _reply("550 User not found", "RCPT TO for an address that is not registered")
    msg_rcptto_received: str = _reply(_RECEIVED, "RCPT TO")
    msg_invalid_cmd_data_sequence: str = _reply(f"{_BAD} DATA should be used after RCPT TO", "an early DATA or BDAT")
    msg_data_received: str = _reply("354 Ready for receive message. End data with <CR><LF>.<CR><LF>", "DATA")
    msg_msg_size_is_too_big: str = _reply("552 Message exceeded max size of {msg_size_limit} bytes", "too long a body")
    msg_msg_received: str = _reply(_RECEIVED, "the message body")
    msg_msg_failed: str = _reply("451 Local error in processing", "a command on which user code raised an exception")
    msg_invalid_cmd_rset_sequence: str = _reply(f"{_BAD} HELO should be the first", "an early RSET")
    msg_invalid_cmd_rset_arg: str = _reply(_UNRECOGNIZED, "RSET with an argument")
    msg_rset_received: str = _reply("250 Ok", "RSET")
    msg_noop_received: str = _reply("250 Ok", "NOOP")
    msg_quit_cmd: str = _reply("221 Closing connection", "QUIT")
    msg_unknown_parameter: str = _reply(
        "555 Parameter not recognized or not implemented", "a bad MAIL or RCPT parameter"
    )
    msg_bdat_received: str = _reply(_RECEIVED, "BDAT without LAST")
    msg_invalid_cmd_bdat_arg: str = _reply("501 BDAT requires a size in bytes", "a bad BDAT")
    msg_auth_received: str = _reply("235 Authentication succeeded", "AUTH")
    msg_auth_failed: str = _reply("535 Authentication credentials invalid", "AUTH with a wrong user or secret")
    msg_auth_cancelled: str = _reply("501 Authentication cancelled", "* in place of an answer to a challenge")
    msg_auth_bad_response: str = _reply("501 Cannot decode response", "an answer that cannot be decoded")
    msg_auth_unknown_mechanism: str = _reply("504 Unrecognized authentication type", "AUTH with an unknown mechanism")
    msg_auth_sequence: str = _reply(
        f"{_BAD} AUTH should be used once, after EHLO and before MAIL FROM", "a misplaced AUTH"
    )
    msg_auth_required: str = _reply("530 Authentication required", "MAIL FROM before AUTH, with auth_required")
    msg_auth_tls_required: str = _reply("538 Encryption required for authentication", "AUTH, with auth_requires_tls")
    msg_starttls_received: str = _reply("220 Ready to start TLS", "STARTTLS")
    msg_invalid_cmd_starttls_arg: str = _reply("501 STARTTLS takes no argument", "STARTTLS with an argument")
    msg_invalid_cmd_starttls_sequence: str = _reply(f"{_BAD} TLS is on already", "STARTTLS within TLS")
    msg_tls_required: str = _reply("530 Must issue a STARTTLS command first", "other commands, with tls_required")
    msg_session_timeout: str = _reply("421 Session timeout, closing connection", "a silence of session_timeout")
    msg_server_shutdown: str = _reply("421 Server shutting down, closing connection", "the sessions that stop() ends")
    msg_line_too_long: str = _reply("500 Line too long", "a command line of over 4096 bytes")

    _given: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not field.default:
                kind = field.metadata["kind"]
                _check(field.name, value, kind)
                if kind is _NAMES:  # normalised once, because each command looks them up
                    object.__setattr__(self, field.name, frozenset(map(_fold, value)))
                elif kind is _WORDS:
                    object.__setattr__(self, field.name, tuple(value))
        for extension in self.extensions:
            _check_extension(extension.split()[0].upper())
        for name, other in _NEEDED.items():
            if getattr(self, name) and getattr(self, other) is None:
                raise ConfigurationError(f"{name}=True: needs {other}")


# ----------------------------------------------------------------------------------------- grammar

# Every pattern is linear: no two parts of a repetition can match the same text. Letters of any script are
# allowed (RFC 6531 section 3.3), so whatever is not ASCII counts as a letter, unless _FORBIDDEN matches it.
_FORBIDDEN = re.compile("[^\\S ]|[\0-\x1f\x7f-\x9f\ud800-\udfff]")

# "Let-dig" and "ALPHA" of RFC 5321 section 4.1.2.
_ALNUM = r"[^ -/:-@\[-`{-~]"
_ALPHA = r"[^ -@\[-`{-~]"
_LABEL = rf"{_ALNUM}+(?:-+{_ALNUM}+)*"
_DOTTED = rf"(?:{_LABEL}\.)+(?:{_ALPHA}{{2,}}|[xX][nN]--{_LABEL})"

# RFC 5321 section 4.1.3. inet_pton() decides whether the numbers are right.
_ADDRESS_LITERAL = re.compile(r"\[([iI][pP][vV]6:)?([0-9a-fA-F:.]+)\]")

# The argument of HELO, section 4.1.1.1. A host without a domain, such as a container, sends its one label,
# but a label of digits alone is no name.
_DOMAIN = re.compile(rf"{_DOTTED}|(?=[0-9-]*[^0-9-]){_LABEL}")

# "Mailbox" of section 4.1.2.
_ATOM = r"[^ \"(),.:;<>@\[\\\]]+"
_QUOTED = r"\"(?:[^\"\\]|\\[ -~])*\""
_MAILBOX = rf"(?:{_ATOM}(?:\.{_ATOM})*|{_QUOTED})@(?:{_DOTTED}|[lL][oO][cC][aA][lL][hH][oO][sS][tT]|\[[^\[\]@]*\])"

# The path of MAIL and RCPT as clients write it: <user@example.com>, user@example.com, and
# John Doe <user@example.com>. A source route is accepted and ignored (section 4.1.1.3).
_ROUTE = rf"(?:@{_DOTTED}(?:,@{_DOTTED})*:)?"
_PATH = re.compile(rf"([^\"<>@]*<{_ROUTE})?({_MAILBOX})(>)?")


def _is_ip_address(text: str, family: socket.AddressFamily) -> bool:
    try:
        return bool(socket.inet_pton(family, text))
    except (OSError, ValueError):
        return False


def _is_address_literal(text: str) -> bool:
    match = _ADDRESS_LITERAL.fullmatch(text)
    return match is not None and _is_ip_address(match[2], socket.AF_INET6 if match[1] else socket.AF_INET)


def _is_clean(text: str) -> bool:
    return (text.isascii() and text.isprintable()) or _FORBIDDEN.search(text) is None


# Each of these parses the argument of a command, and returns None if it is invalid.


def _parse_domain(text: str) -> str | None:
    valid = _DOMAIN.fullmatch(text) or _is_address_literal(text) or _is_ip_address(text, socket.AF_INET)
    return text if valid and _is_clean(text) else None


@functools.lru_cache(maxsize=512)  # tests use few addresses, each many times
def _parse_path(text: str) -> str | None:
    match = _PATH.fullmatch(text)
    if match is None or (match[1] is None) != (match[3] is None) or not _is_clean(text):
        return None
    address: str = match[2]
    domain = address[address.rindex("@") + 1 :]
    return address if domain[0] != "[" or _is_address_literal(domain) else None


def _parse_sender(text: str) -> str | None:
    return "" if text == "<>" else _parse_path(text)


def _parse_recipient(text: str) -> str | None:
    # Postmaster is the only address that needs no domain, section 4.1.1.3.
    return text[1:-1] if text.lower() == "<postmaster>" else _parse_path(text)


def _parse_nothing(text: str) -> str | None:
    return None if text else ""


def _parse_chunk(text: str) -> tuple[int, bool] | None:
    """The size of a chunk, and whether it is the last (RFC 3030 section 2)."""
    match = re.fullmatch(r"([0-9]{1,20})(?: +([lL][aA][sS][tT]))?", text)
    return (int(match[1]), match[2] is not None) if match else None


class _Address(str):
    """An address that came with parameters (RFC 5321 section 4.1.2)."""

    parameters: dict[str, str]  # names in upper case; a duplicate gets "?", which is never valid, so it is refused


# Up to the > that is not quoted or, without a <, up to the white space that is not quoted.
_PATH_END = re.compile(r'(?=[^"]*<)(?:"(?:[^"\\]|\\.)*"|[^">])*>|(?:"(?:[^"\\]|\\.)*"|[^" ])*')


def _parse_parameters(text: str, parse: Callable[[str], str | None]) -> str | None:
    """Parse a path with parameters behind it; parse() is given the path alone."""
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


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _parse_command(line: bytes) -> tuple[str, str, str]:
    """Split a command line into the stripped line, its verb in upper case, and its argument (RFC 5321 section 4.1.1).

    Bytes that are not UTF-8 become surrogates.
    """
    request = _decode(line.strip())
    verb, _, argument = (request.replace("\t", " ") if "\t" in request else request).partition(" ")
    # Verbs are ASCII: upper() would turn "quıt", with a dotless i, into "QUIT".
    return request, verb.upper() if verb.isascii() else "", argument


# ----------------------------------------------------------------------------------------- records


class _Next(enum.Enum):
    """What the server does after a reply. A transcript shows the values of those that end the session."""

    COMMAND = "<command>"
    TLS = "<tls>"
    CLOSE = "<closed>"
    RESET = "<reset>"  # closes with an RST
    SILENCE = "<silence>"  # stays connected, but answers nothing any more

    def __init__(self, value: str) -> None:
        self.ends = value in ("<closed>", "<reset>", "<silence>")


_ENDINGS = tuple(state.value for state in _Next if state.ends)


class _AuthResult(NamedTuple):
    """The outcome of AUTH."""

    response: str  # the option that has the text of the reply
    mechanism: str | None = None
    user: str | None = None
    request: str = ""  # the line that began it, without the secret


class _Reply(NamedTuple):
    """What the server says next, as data for the connection to carry out."""

    text: str
    data: bytes  # the text as it is sent
    delay: float = 0.0  # seconds before it
    next: _Next = _Next.COMMAND
    accepts: bool = False  # whether the command takes effect
    trickle: float = 0.0  # seconds between the bytes


def _encode(text: str) -> bytes:
    lines = text.replace("\r\n", "\n").replace("\n", "\r\n")
    return lines.encode("utf-8", "surrogateescape") + b"\r\n"


# A client's line, the size of its body, or None where the server speaks unasked.
_Request = str | int | None


class _Exchange(NamedTuple):
    """A request and its reply."""

    request: _Request
    response: str
    accepted: bool
    value: Any  # of the argument; None if that is invalid


# Requests and responses in turn. They are formatted only on demand.
_Dialogue = list[_Request]


def _printable(text: str) -> str:
    """The text as one line, with escapes in place of control characters, which a terminal would obey."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _format_dialogue(dialogue: _Dialogue) -> Iterator[str]:
    """Yield lines such as "C: QUIT" and "S: 221 Closing connection"."""
    for index, said in enumerate(dialogue):
        if isinstance(said, int):
            yield f"C: <{said} bytes>"
        elif said is not None:
            lines = said.replace("\r\n", "\n").split("\n") if index % 2 else [said]
            yield from (f"{'S' if index % 2 else 'C'}: {_printable(line)}" for line in lines)


def _shorten(value: object) -> str:
    """The repr of a value, in at most 100 characters."""
    text = repr(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 100 else f"{text[:97]}..."


_T = TypeVar("_T")


class _StepField(Generic[_T]):
    """An attribute of Message that is read from the exchange of one step; the default if the step is missing."""

    def __init__(self, step: str, field: str, default: _T) -> None:
        self.step, self.field, self.default = step, field, default

    def __get__(self, message: Message, owner: type[Message]) -> _T:
        exchange = message._steps.get(self.step)
        value: _T | None = None if exchange is None else getattr(exchange, self.field)
        return self.default if value is None else value


def _make_fields(step: str) -> tuple[_StepField[str], _StepField[str], _StepField[bool]]:
    return _StepField(step, "request", ""), _StepField(step, "response", ""), _StepField(step, "accepted", False)


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
            except Exception as error:  # noqa: BLE001 - the parser raises many, such as an IndexError on "From: :"
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
    if not part.is_multipart():
        content: bytes = part.get_payload(decode=True)
        return content
    # A mail within the mail, or the blocks of a delivery report. The generator cannot write all of them.
    policy, data = part.policy.clone(linesep="\r\n", refold_source="none"), b""
    with contextlib.suppress(Exception):
        data = b"".join(inner.as_bytes(policy=policy) for inner in part.get_payload())
    return data


def _decode_text(part: Any) -> str:
    data = _decode_part(part).replace(b"\r\n", b"\n")
    with contextlib.suppress(LookupError, ValueError):
        return data.decode(part.get_content_charset("utf-8"))
    return data.decode("utf-8", "replace")


def _split_parts(mail: Any) -> tuple[dict[str, str], list[Attachment]]:
    """The first text of each type, and all other parts."""
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
        if is_container:  # but its boundary never came
            kind = "text/plain"
        if kind in ("text/plain", "text/html") and kind not in texts and name is None and not part.is_attachment():
            texts[kind] = _decode_text(part)
        else:
            attachments.append(Attachment(name, kind, _decode_part(part)))
    return texts, attachments


def _jsonify_bytes(data: bytes) -> dict[str, str]:
    import base64

    try:
        return {"content": data.decode(), "content_encoding": "utf-8"}
    except UnicodeDecodeError:
        return {"content": base64.b64encode(data).decode(), "content_encoding": "base64"}


def _escape_surrogates(value: Any) -> Any:
    """The value with escapes in place of the surrogates that stand for bytes: few readers of JSON accept those."""
    if isinstance(value, dict):
        return {_escape_surrogates(name): _escape_surrogates(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escape_surrogates(item) for item in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


class Message:
    """The record of an SMTP session or, with multiple_message_receiving, of one mail in it.

    Each step of the dialogue has three attributes: the request as the client wrote it, the response as
    it was sent and, under the step's own name, whether it succeeded. A Message is read-only and never
    changes. While its session goes on, messages() returns a newer object in its place.
    """

    helo_request, helo_response, helo = _make_fields("helo")
    mailfrom_request, mailfrom_response, mailfrom = _make_fields("mailfrom")
    mail_from = _StepField[str | None]("mailfrom", "value", None)  #: the sender, "" for <>; None if none was valid
    data_request, data_response, data = _make_fields("data")
    content = _StepField("msg", "value", b"")  #: the body, dots unstuffed, CRLF kept; partial if the client left
    msg_response = _StepField("msg", "response", "")
    msg = _StepField("msg", "accepted", False)
    rset_request, rset_response, rset = _make_fields("rset")
    noop = _StepField("noop", "accepted", False)
    quit_sent = _StepField("quit", "accepted", False)
    auth_request, auth_response, auth = _make_fields("auth")  #: the request is without the secret
    tls = _StepField[tuple[str, str] | None]("tls", "value", None)  #: (version, cipher); None without TLS
    id: int  #: unique among the messages of the server
    peer: tuple[str, int]  #: the client's address and port

    def __init__(self, mail: _Mail, peer: tuple[str, int], number: int, stamped_at: float) -> None:
        # The session goes on appending to the lists, so their present lengths are kept with them.
        fields = {
            "id": number,
            "peer": peer,
            "_stamped_at": stamped_at,
            "_steps": mail.steps.copy(),
            "_recipients": mail.recipients,
            "_count": len(mail.recipients),
            "_dialogue": mail.dialogue,
            "_said": len(mail.dialogue),
            "_start": mail.start,
        }
        object.__setattr__(self, "__dict__", fields)  # __setattr__() allows nothing else

    _stamped_at: float
    _steps: dict[str, _Exchange]
    _recipients: list[_Exchange]
    _count: int
    _dialogue: _Dialogue
    _said: int
    _start: int

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Message is read-only: {name} cannot be set")

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the record, without what was parsed from it and cached."""
        cached = ("transcript", "received_header", "email", "_parts")
        values = vars(self).copy()  # at once: another thread may cache something meanwhile
        return {name: value for name, value in values.items() if name not in cached}

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
        """The parameters of MAIL FROM, such as {"SIZE": "1000", "SMTPUTF8": ""}."""
        return dict(getattr(self.mail_from, "parameters", {}))

    @property
    def rcptto_parameters(self) -> list[dict[str, str]]:
        """The parameters of each of the rcpt_tos."""
        return [dict(getattr(address, "parameters", {})) for address in self.rcpt_tos]

    @property
    def auth_mechanism(self) -> str | None:
        """Such as PLAIN, also if the login failed; None if the client named none."""
        return self._login.mechanism

    @property
    def auth_user(self) -> str | None:
        return self._login.user

    @property
    def _login(self) -> _AuthResult:
        login = self._steps["auth"].value if "auth" in self._steps else None
        return login if isinstance(login, _AuthResult) else _AuthResult("")

    @property
    def msg_request(self) -> str:
        """The content as str: UTF-8, with surrogates for bytes that are not."""
        return _decode(self.content)

    def _list_replies(self, start: int = 0) -> list[tuple[str, str]]:
        """(request, response) of each command from this place in the dialogue on; a body is "<9 bytes>"."""
        dialogue = self._dialogue[start : self._said]
        pairs = zip(dialogue[::2], dialogue[1::2], strict=False)
        shown = ((f"<{said} bytes>" if isinstance(said, int) else said, response) for said, response in pairs)
        return [(request, str(response)) for request, response in shown if request is not None and response is not None]

    @property
    def refusals(self) -> list[tuple[str, str]]:
        """(request, response) of each command that got a 4xx or 5xx, even if erased since; a body is "<9 bytes>"."""
        return [pair for pair in self._list_replies() if pair[1].startswith(("4", "5"))]

    def _find_discards(self) -> Iterator[tuple[str, str]]:
        """What was accepted and not kept, each with the option that keeps it."""
        accepted = [line for line, response in self._list_replies(self._start) if not response.startswith(("4", "5"))]
        verbs = [line[:4].upper() if line[:1] != "<" else "<" for line in accepted]
        last_mail = len(verbs) - verbs[::-1].index("MAIL") if "MAIL" in verbs else 0
        recipients = verbs[last_mail:].count("RCPT") if self.msg else 0
        for option, what, count, kept in (
            ("multiple_rcptto", "recipients", recipients, len(self.rcpt_tos)),
            ("multiple_message_receiving", "mails", verbs.count("<"), int(self.msg)),
        ):
            if count > kept:
                verb = "was" if count - kept == 1 else "were"
                yield option, f"{count - kept} of {count} accepted {what} {verb} not kept"

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
        """The dialogue, with lines such as "C: QUIT" and "S: 221 Closing connection"; a body is one line with its size.

        With multiple_message_receiving it has the greeting, HELO, and then this mail alone.
        """
        return "\n".join(_format_dialogue(self._dialogue[: self._said]))

    @functools.cached_property
    def received_header(self) -> str:
        """The Received header of RFC 5321 section 4.4, folded, with CRLF; "" if the mail was not accepted."""
        from email.utils import format_datetime

        if self.received_at is None:
            return ""
        host = self.peer[0].partition("%")[0]
        address = f"[IPv6:{host}]" if ":" in host else f"[{host}]"
        name = str(self._steps["helo"].value) if self.helo else ""
        header = f"Received: from {name if name.isascii() and _parse_domain(name) else address} ({address})\r\n"
        protocol = "ESMTP" + "S" * bool(self.tls) + "A" * self.auth if self.esmtp else "SMTP"  # RFC 3848
        header += f"\tby smtpmock with {protocol} id {self.id}"
        recipient = self.rcpt_tos[0] if len(self.rcpt_tos) == 1 else ""
        if "@" in recipient and recipient.isascii() and _is_clean(recipient):
            header += f"\r\n\tfor <{recipient}>"
        return f"{header};\r\n\t{format_datetime(self.received_at)}\r\n"

    def as_bytes(self) -> bytes:
        """The mail as a mailbox stores it: Return-Path, Received, and the unchanged content."""
        sender = re.sub("[\r\n]", " ", self.mail_from or "")  # a rule may have accepted anything
        head = f"Return-Path: <{sender}>\r\n" if self.mailfrom else ""
        head += self.received_header
        if self.content[:1] in (b" ", b"\t"):  # without a header, this would continue ours
            head += "\r\n"
        return head.encode("utf-8", "surrogateescape") + self.content

    @functools.cached_property
    def email(self) -> EmailMessage:
        """as_bytes() parsed. Faults are in the `defects` of its parts; they raise nothing."""
        mail: EmailMessage = _parse_email(self.as_bytes())
        return mail

    @property
    def subject(self) -> str | None:
        """The decoded subject; None without one."""
        subject = self.email["subject"]
        return None if subject is None else str(subject)

    @property
    def text(self) -> str | None:
        """The first text/plain part that is not an attachment, with LF line ends; None without one."""
        return self._parts[0].get("text/plain")

    @property
    def html(self) -> str | None:
        """The first text/html part that is not an attachment, with LF line ends; None without one."""
        return self._parts[0].get("text/html")

    @property
    def attachments(self) -> list[Attachment]:
        """All other parts, including the images of an HTML page."""
        return self._parts[1].copy()

    @functools.cached_property
    def _parts(self) -> tuple[dict[str, str], list[Attachment]]:
        return _split_parts(self.email)

    def to_dict(self) -> dict[str, Any]:
        """Every attribute as values for JSON. `content` is text if it is UTF-8, else base64: see `content_encoding`."""
        names = [name for name, field in vars(Message).items() if isinstance(field, _StepField) and name != "content"]
        names += ["id", "esmtp", "rcpt_tos", "rcptto", "is_consistent", "received_header"]
        names += ["mailfrom_parameters", "rcptto_parameters", "auth_mechanism", "auth_user"]
        values = {name: getattr(self, name) for name in (*names, "subject", "text", "html", "transcript")}
        values["refusals"] = [list(pair) for pair in self.refusals]
        values["peer"], values["tls"] = list(self.peer), list(self.tls) if self.tls else None
        values["received_at"] = self.received_at.isoformat() if self.received_at else None
        values["rcptto_request_response"] = [list(pair) for pair in self.rcptto_request_response]
        values["headers"] = [[name, str(value)] for name, value in self.email.items()]
        values["defects"] = [
            f"{type(defect).__name__}: {defect}" for part in self.email.walk() for defect in part.defects
        ]
        values["attachments"] = [
            {"name": name, "type": kind, **_jsonify_bytes(content)} for name, kind, content in self.attachments
        ]
        record: dict[str, Any] = _escape_surrogates({**values, **_jsonify_bytes(self.content)})
        return record

    def __repr__(self) -> str:
        replies = [said for said in self._dialogue[1 : self._said : 2] if said is not None and said not in _ENDINGS]
        end = f"not accepted, last reply {_shorten(replies[-1])}" if replies else "no reply"
        if self.is_consistent:
            end = "accepted"
        elif self.refusals:
            request, response = self.refusals[0]
            end = f"not accepted, {_shorten(request)} was refused with {_shorten(response)}"
        names = ", ".join([_shorten(name) for name in self.rcpt_tos[:3]] + ["..."] * (len(self.rcpt_tos) > 3))
        return f"<Message {self.id} from {_shorten(self.mail_from)} to [{names}]: {len(self.content)} bytes, {end}>"


# ------------------------------------------------------------------------------------------- rules

_STAGES = ("connect", "message", "*")
_PROBABILITY = _Kind("a number from 0 to 1", _number(0, 1, int, float), float)
_TIMES = _Kind("an integer from 1 up", _number(1, float("inf"), int), int)
_BYTES = _Kind(
    "bytes",
    lambda value: isinstance(value, bytes),
    lambda text: text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode("latin-1"),
)
_THEN = {"close": _Next.CLOSE, "drop": _Next.CLOSE, "reset": _Next.RESET, "silence": _Next.SILENCE}
_ENDING = _Kind(f"one of {', '.join(_THEN)}", lambda value: isinstance(value, str) and value in _THEN, str)

# The four aspects of a reply that rules decide: str or bytes to say, seconds, seconds, a _Next.
_ASPECTS = ("said", "delay", "trickle", "then")

# The fields of an Action.
_ACTIONS = {"reply": _TEXT, "raw": _BYTES, "delay": _SECONDS, "trickle": _SECONDS, "then": _ENDING}


def _find_aspects(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The aspects of a reply that these fields of an Action set. A reply of None is the normal one."""
    aspects = {name: fields[name] for name in ("delay", "trickle") if name in fields}
    if "reply" in fields or "raw" in fields:
        aspects["said"] = fields["raw"] if "raw" in fields else fields["reply"]
    if "then" in fields:
        aspects["then"] = _THEN[fields["then"]]
        if fields["then"] != "close":
            aspects["said"] = b""
    return aspects


@dataclasses.dataclass(frozen=True)
class Action(_Fields):
    """What a rule does. A field that is None leaves its aspect of the reply as it is without the rule."""

    reply: str | None = None
    raw: bytes | None = None  #: sent in place of a reply
    delay: float | None = None  #: seconds before the reply
    trickle: float | None = None  #: seconds between two bytes of the reply
    then: str | None = None  #: close, or without a reply: drop, reset, silence

    def __post_init__(self) -> None:
        for name, kind in _ACTIONS.items():
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), kind)

    def _aspects(self) -> dict[str, Any]:
        return _find_aspects({name: value for name, value in vars(self).items() if value is not None})


# What people write for a stage, and what it is called here. Other verbs are allowed if they are not nearly these.
_STAGE_NAMES = {
    stage.upper(): stage for stage in ("connect", "message", "HELO", "EHLO", "MAIL", "RCPT", "DATA", "BDAT")
}
_STAGE_NAMES |= {verb: verb for verb in ("RSET", "NOOP", "QUIT", "AUTH", "STARTTLS")}
_STAGE_NAMES |= {"MAILFROM": "MAIL", "RCPTTO": "RCPT", "BODY": "message", "END": "message", "CONNECTION": "connect"}
_OTHER_VERBS = "VRFY EXPN HELP ETRN TURN SEND SOML SAML"


def _parse_stage(name: object) -> str:
    """connect, message, *, or a verb in upper case; MAIL FROM and RCPT TO are MAIL and RCPT."""
    words = name.replace(":", " ").split() if isinstance(name, str) else []
    if not words or len(words) > 2 or (words[1:] and words[1].upper() not in ("FROM", "TO")):
        raise ConfigurationError(f"stage={name!r}: must be connect, message, * or a verb such as RCPT")
    return words[0].lower() if words[0].lower() in _STAGES else words[0].upper()


def _check_stage(name: str, stage: str, verbs: Collection[str]) -> None:
    """Refuse a stage that is nearly another one, and so would never be reached."""
    import difflib

    if stage in (*_STAGES, *_STAGE_NAMES.values(), *verbs, *_OTHER_VERBS.split()):
        return
    near = difflib.get_close_matches(stage, _STAGE_NAMES, n=1, cutoff=0.7)
    if near:
        raise ConfigurationError(f"stage={name!r}: there is no such stage; did you mean {_STAGE_NAMES[near[0]]}?")


def _check_match(match: str) -> None:
    """Refuse a string that is no address or domain, but looks like a pattern."""
    if match.startswith("@"):
        raise ConfigurationError(f"match={match!r}: a domain has no @; did you mean {match[1:]!r}?")
    if re.search(r"\\[.dwsDWS]|\.[*+]|^\^|\$$|^\*", match):
        raise ConfigurationError(f"match={match!r}: looks like a pattern; did you mean re.compile({match!r})?")


_Match = Callable[[str], object] | str | re.Pattern[str] | None


class Rule:
    """A deviation from the normal replies. Server.on() makes it and says when it applies; the methods say what it does.

    Each method returns the rule. Different methods add up, and the same method called again replaces its
    first call. A function used as a decorator is called as function(request, message). It returns None
    for the normal reply, the text of another one, or an Action.
    """

    def __init__(
        self, rules: _Rules, stage: str, match: _Match, times: int | None, probability: float, after: int | None
    ) -> None:
        self.hits = 0  #: how often the rule was used; guarded by the lock of the rules
        self._rules = rules
        self._stage = _parse_stage(stage)
        if not (match is None or isinstance(match, str | re.Pattern) or callable(match)):
            raise ConfigurationError(f"match={match!r}: must be an address, a domain, a pattern or a function")
        if isinstance(match, str):
            _check_match(match)
        _check_stage(stage, self._stage, rules.verbs)
        self._match = _fold(match) if isinstance(match, str) else match
        for name, value, kind in (("times", times, _TIMES), ("after", after, _COUNT)):
            if value is not None:
                _check(name, value, kind)
        _check("probability", probability, _PROBABILITY)
        if after is not None and self._stage != "message":
            raise ConfigurationError(f"after={after!r}: is for the stage message, not for {self._stage}")
        self._times, self._probability, self._after = times, probability, after
        self._random = rules.make_random() if probability < 1 else None
        # Fields of an Action, for each use and the last ones from then on. Only the methods set this and the function,
        # and they replace them, so that sessions can read them without the lock.
        self._uses: tuple[dict[str, Any], ...] = ({},)
        self._function: Callable[[str, Message], Any] | None = None
        rules.add(self)

    def reply(self, *texts: str | None) -> Rule:
        """Say these texts, one per use, and the last one from then on; None is the normal reply.

        A text that begins with 4 or 5 refuses the command. With any other text, it takes effect.
        """
        for text in texts or [()]:
            _check("reply", text, _Kind("one string or more", lambda text: text is None or _is_text(text), str))
        base = {name: value for name, value in self._uses[0].items() if name != "raw"}
        self._uses = tuple({**base, "reply": text} for text in texts)
        return self

    def raw(self, data: bytes) -> Rule:
        """Send these bytes as they are, in place of the reply."""
        return self._add("raw", data)

    def delay(self, seconds: float) -> Rule:
        """Wait before the reply, in place of the delay of the options."""
        return self._add("delay", seconds)

    def trickle(self, seconds: float) -> Rule:
        """Send the reply byte by byte, with so many seconds between two bytes."""
        return self._add("trickle", seconds)

    def close(self) -> Rule:
        """Close the connection after the reply."""
        return self._add("then", "close")

    def drop(self) -> Rule:
        """Close the connection without a reply."""
        return self._add("then", "drop")

    def reset(self) -> Rule:
        """Close the connection with an RST and without a reply."""
        return self._add("then", "reset")

    def silence(self) -> Rule:
        """Keep the connection open, but answer neither this nor anything that follows."""
        return self._add("then", "silence")

    def __call__(self, function: Callable[[str, Message], Any]) -> Any:
        if not callable(function):
            raise ConfigurationError(f"rule={function!r}: must be callable")
        self._function = function
        return self

    def remove(self) -> None:
        """Remove the rule from its server. Removing it twice is no error."""
        self._rules.remove(self)

    def _add(self, name: str, value: Any) -> Rule:
        _check(name, value, _ACTIONS[name])
        self._uses = tuple({**use, name: value} for use in self._uses)
        return self

    def _matches(self, request: str, names: Sequence[str]) -> bool:
        match = self._match
        if isinstance(match, re.Pattern):
            return match.search(request) is not None
        if callable(match):
            return bool(match(request))
        folded = [_fold(name) for name in names]
        return match is None or any(match in (name, name.rpartition("@")[2].lower()) for name in folded)

    def _take(
        self, wanted: Collection[str], *, counts: bool
    ) -> tuple[dict[str, Any], Callable[[str, Message], Any] | None]:
        """The aspects that are wanted; counts a use if there are any. Called with the lock of the rules."""
        uses, function = self._uses, self._function if "said" in wanted else None
        use = _find_aspects(uses[min(self.hits, len(uses) - 1)])
        aspects = {name: value for name, value in use.items() if name in wanted}
        is_spent = self.hits == self._times or not (aspects or function)
        if is_spent or (self._random is not None and self._random.random() >= self._probability):
            return {}, None
        self.hits += counts
        return aspects, function

    def _has_action(self) -> bool:
        return self._function is not None or any(self._uses)

    def _find_nearest(self, requests: Sequence[str]) -> str:
        """The request that this rule was perhaps meant for, as the end of a sentence."""
        import difflib

        similar = [request for request in requests if request[: len(self._stage)].upper() == self._stage]
        match = self._match if isinstance(self._match, str) else ""
        nearest = difflib.get_close_matches(match, similar[-1000:], n=1, cutoff=0) or similar[-1:]
        return f"; the nearest command was {_shorten(nearest[0])}" if nearest else ""

    def __repr__(self) -> str:
        return f"<Rule for {self._stage}{f' {self._match}' if self._match else ''}: {self.hits} hits>"


def _read_result(result: object) -> dict[str, Any]:
    """The aspects of a reply that the function of a rule returned."""
    action = Action(result) if result is None or isinstance(result, str) else result
    if not isinstance(action, Action):
        raise TypeError(f"a rule returned {result!r}: must be None, a reply or an Action")
    return action._aspects()


class _Rules:
    """The rules of a server."""

    def __init__(self, seed: int | None, verbs: Collection[str] = ()) -> None:
        self.verbs = verbs  # of the server's handlers
        self.newest_first: tuple[Rule, ...] = ()  # replaced, never changed; so it can be read without the lock
        self._seed = seed
        self._seeded = 0  # how many rules have a generator of random numbers
        self._lock = threading.Lock()  # guards the attributes above, and the hits of the rules

    def add(self, rule: Rule) -> None:
        with self._lock:
            self.newest_first = (rule, *self.newest_first)

    def make_random(self) -> Any:
        """A generator for one rule, so that its numbers do not depend on what other rules meet."""
        from random import Random

        with self._lock:
            self._seeded += 1
            return Random(None if self._seed is None else f"{self._seed} {self._seeded}")

    def remove(self, rule: Rule) -> None:
        with self._lock:
            self.newest_first = tuple(other for other in self.newest_first if other is not rule)

    def clear(self) -> None:
        with self._lock:
            self.newest_first, self._seeded = (), 0

    def stops(self) -> list[int]:
        """The sizes of a body at which rules apply, smallest first."""
        return sorted({rule._after for rule in self.newest_first if rule._after is not None})

    def decide(
        self,
        stages: Collection[str],
        request: str,
        names: Sequence[str],
        message: Callable[[], Message],
        after: int | None = None,
        wanted: Collection[str] = _ASPECTS,
    ) -> dict[str, Any]:
        """Each wanted aspect of a reply, from the newest rule that sets it. Raises what the user's functions raise."""
        found: dict[str, Any] = {}
        counts = "said" in wanted  # a challenge of AUTH is no use of its own
        for rule in self.newest_first:
            if rule._stage in stages and rule._after == after and rule._matches(request, names):
                missing = [aspect for aspect in wanted if aspect not in found]
                with self._lock:
                    aspects, function = rule._take(missing, counts=counts) if rule in self.newest_first else ({}, None)
                if function is not None:  # called without the lock, like every function of the user
                    aspects = aspects | _read_result(function(request, message()))
                found |= {name: value for name, value in aspects.items() if name in missing}
        return found


# ---------------------------------------------------------------------------------------- handlers

# The steps of a session in their order, by the names under which a message has them.
_STEPS = ("helo", "mailfrom", "rcptto", "data", "msg", "rset", "noop", "quit")
_TRANSACTION = _STEPS[1:]

# The replies to commands that come before a step which only some servers demand.
_DEMANDS = {"tls": "msg_tls_required", "auth": "msg_auth_required"}


def _name_extensions(options: Configuration) -> set[str]:
    """The extensions that are announced, and therefore accepted."""
    names = {extension.split()[0].upper() for extension in options.extensions}
    return names if options.auth_users is None else names | {"AUTH"}


class Handler:
    """A command. To add one of your own, subclass this, set some of the public attributes, and override refuse().

    A reply is the name of an option or a text that begins with three digits.
    """

    verbs: Sequence[str] = ()  #: in upper case
    needs: Sequence[str] = ()  #: the steps that must have succeeded before: helo, mailfrom, rcptto, auth, tls
    parse: Callable[[Any], Any] = staticmethod(_parse_nothing)  #: returns the value of the argument, None if it is bad
    bad_argument = "msg_invalid_cmd_rset_arg"  #: the reply if parse() returns None
    received = ""  #: the reply if the command is accepted
    has_secret = False  #: whether logs and transcripts show *** in place of the argument

    _keyword = ""  # follows the verb, as FROM: follows MAIL
    _step = ""  # the name under which a message has the command
    _erases: tuple[str, ...] = ()  # the steps that it undoes, even if it is refused then
    _bad_sequence = "msg_invalid_cmd_helo_sequence"
    _lists: tuple[tuple[str, str], ...] = ()  # options with refused values, each with the reply to these
    _delay = ""  # the option that has it
    _next = _Next.COMMAND  # if it is accepted
    _before_tls = False  # whether tls_required allows it before STARTTLS
    _annotates = False  # whether it belongs to the accepted message before it and does not begin another

    def __init__(self, options: Configuration) -> None:
        self.options = options
        self._extensions = _name_extensions(options)
        self._refused = [(getattr(options, values), text) for values, text in self._lists if getattr(options, values)]
        self._replies: dict[str, _Reply] = {}  # made when first needed; two sessions may make the same one
        self._accepting = self._make_reply(self.received)
        if options.tls_required and not self._before_tls:
            self.needs = ("tls", *self.needs)

    def refuse(self, session: _Session, value: Any) -> str | None:
        """The reply that refuses the command, or None to accept it. Called with what parse() returned.

        session.message() is the Message as it is so far.
        """
        return None

    @classmethod
    def _is_offered(cls, options: Configuration) -> bool:
        """Whether the server has this command; if not, it is unknown."""
        return True

    def _find_reply(self, text: str) -> _Reply:
        if text not in self._replies and text.startswith("msg_") and hasattr(self.options, text):
            self._replies[text] = self._make_reply(text)
        return self._replies.get(text) or self._make_reply(text)

    def _make_reply(self, option: str) -> _Reply:
        """The reply whose text is in this option, or is this text."""
        text = self._fill(getattr(self.options, option, option))
        accepts = option == self.received and not text.startswith(("4", "5"))
        delay = getattr(self.options, self._delay) if self._delay else 0.0
        return _Reply(text, _encode(text), delay, self._choose_next(accepts), accepts)

    def _fill(self, text: str) -> str:
        return text.replace("{msg_size_limit}", str(self.options.msg_size_limit))

    def _choose_next(self, accepts: bool) -> _Next:
        return self._next if accepts else _Next.CLOSE if self.options.fail_fast else _Next.COMMAND

    def _start(self, session: _Session, verb: str, request: str, argument: str) -> _Reply | None:
        """Run the command; None if more must come before there is a reply."""
        if self.has_secret and argument:
            request = f"{request.split(maxsplit=1)[0]} ***"
        return session.run(self, verb, request, argument)

    def _run(self, session: _Session, stage: str, request: _Request, argument: Any) -> _Reply:
        """Erase, check, record. The reply is sent later."""
        if self._erases:
            session.erase(self._erases)
        value = self.parse(argument)
        reply = self._choose(session, value)
        if session.rules.newest_first:
            aspects = session.decide(self._stages(stage), request, argument, self._names(session, argument, value))
            reply = self._apply(aspects, reply)
            value = self._read_loosely(argument) if value is None and reply.accepts else value
        session.mail.dialogue.extend((request, reply.text if reply.data else None))
        self._record(session.mail, _Exchange(request, reply.text, reply.accepts, value))
        return reply

    def _choose(self, session: _Session, value: Any) -> _Reply:
        """The reply without rules: to the sequence, the argument, the lists, and then to the command's own checks."""
        accepted = session.mail.accepted_steps
        if not accepted.issuperset(self.needs):
            missing = next(step for step in self.needs if step not in accepted)
            return self._find_reply(_DEMANDS.get(missing, self._bad_sequence))
        if value is None:
            return self._find_reply(self.bad_argument)
        for values, text in self._refused:
            if _fold(value) in values:
                return self._find_reply(text)
        refusal = self.refuse(session, value)
        return self._accepting if refusal is None else self._find_reply(refusal)

    def _stages(self, stage: str) -> tuple[str, ...]:
        """The stages whose rules apply."""
        return stage, "*"

    def _names(self, session: _Session, argument: Any, value: Any) -> Sequence[str]:
        """The addresses or domains for rules to match."""
        return [name.strip("<>") for name in (value, argument) if isinstance(name, str)]

    def _apply(self, aspects: dict[str, Any], usual: _Reply) -> _Reply:
        """The usual reply, changed by the aspects that rules set."""
        if not aspects:
            return usual
        reply = usual._replace(delay=aspects.get("delay", usual.delay), trickle=aspects.get("trickle", usual.trickle))
        said = aspects.get("said")
        if said is not None:
            text = _decode(said).rstrip("\r\n") if isinstance(said, bytes) else self._fill(said)
            data = said if isinstance(said, bytes) else _encode(text)
            accepts = bool(data) and not text.startswith(("4", "5"))
            reply = reply._replace(text=text, data=data, next=self._choose_next(accepts), accepts=accepts)
        return reply._replace(next=aspects["then"]) if "then" in aspects else reply

    def _read_loosely(self, argument: Any) -> Any:
        """The value of an argument that is invalid, but that a rule accepted."""
        return argument

    def _record(self, mail: _Mail, exchange: _Exchange) -> None:
        if self._step:
            mail.steps[self._step] = exchange
            if exchange.accepted:
                mail.accepted_steps.add(self._step)


class _Greeting(Handler):
    """What the server says before any command."""

    verbs = ("connect",)
    received = "msg_greeting"
    _before_tls = True


class _Helo(Handler):
    """HELO, with the name of the client."""

    verbs = ("HELO",)
    parse = staticmethod(_parse_domain)
    received, bad_argument = "msg_helo_received", "msg_invalid_cmd_helo_arg"
    _step, _delay = "helo", "response_delay_helo"
    _erases = _STEPS
    _lists = (("blacklisted_helo_domains", "msg_helo_blacklisted_domain"),)
    _before_tls = True


_XTEXT = r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})"  # RFC 3461 section 4

# The command, the extension and the pattern of each parameter. A parameter that is not listed belongs to the
# extension of the same name, and may have any value.
_PARAMETERS = {
    "SIZE": ("MAIL", "SIZE", "[0-9]{1,20}"),  # RFC 1870
    "BODY": ("MAIL", "8BITMIME", "7BIT|8BITMIME"),  # RFC 6152
    "BODY=BINARYMIME": ("MAIL", "BINARYMIME", "BINARYMIME"),  # RFC 3030 section 3
    "SMTPUTF8": ("MAIL", "SMTPUTF8", ""),  # RFC 6531
    "AUTH": ("MAIL", "AUTH", f"<>|{_XTEXT}+"),  # RFC 4954
    "RET": ("MAIL", "DSN", "FULL|HDRS"),  # RFC 3461
    "ENVID": ("MAIL", "DSN", f"{_XTEXT}{{1,100}}"),
    "NOTIFY": ("RCPT", "DSN", "NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY))*"),
    "ORCPT": ("RCPT", "DSN", f"[A-Z0-9-]+;{_XTEXT}+"),
}


class _PathHandler(Handler):
    """What MAIL and RCPT have in common: an address with parameters."""

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        if self._extensions:
            self.parse = functools.partial(_parse_parameters, parse=self.parse)

    def refuse(self, session: _Session, value: Any) -> str | None:
        if not self._extensions:
            return None
        given = getattr(value, "parameters", {})
        if "SMTPUTF8" in self._extensions and not value.isascii() and not self._declares_utf8(session, given):
            return self.bad_argument
        if not all(self._allows(session, *parameter) for parameter in given.items()):
            return "msg_unknown_parameter"
        return "msg_msg_size_is_too_big" if int(given.get("SIZE", 0)) > self.options.msg_size_limit else None

    def _declares_utf8(self, session: _Session, given: dict[str, str]) -> bool:
        return "SMTPUTF8" in given

    def _allows(self, session: _Session, name: str, value: str) -> bool:
        usual = _PARAMETERS.get(name, (self.verbs[0], name, "[^?]*"))
        verb, extension, pattern = _PARAMETERS.get(f"{name}={value.upper()}", usual)
        is_esmtp = str(session.mail.steps["helo"].request)[:4].upper() == "EHLO"
        was_announced = is_esmtp and extension in self._extensions and verb in self.verbs
        return was_announced and re.fullmatch(pattern, value, re.IGNORECASE) is not None

    def _read_loosely(self, argument: str) -> str | None:
        return _parse_parameters(argument, lambda path: path[1:-1] if path[:1] + path[-1:] == "<>" else path)


class _Mailfrom(_PathHandler):
    """MAIL FROM:<address>, or <> for a mail that must not be answered."""

    verbs = ("MAIL",)
    needs: Sequence[str] = ("helo",)
    parse = staticmethod(_parse_sender)
    bad_argument = "msg_invalid_cmd_mailfrom_arg"
    received = "msg_mailfrom_received"
    _step, _keyword, _delay = "mailfrom", "FROM:", "response_delay_mailfrom"
    _erases = _TRANSACTION
    _bad_sequence = "msg_invalid_cmd_mailfrom_sequence"
    _lists = (("blacklisted_mailfrom_emails", "msg_mailfrom_blacklisted_email"),)

    def __init__(self, options: Configuration) -> None:
        if options.auth_required:
            self.needs = ("auth", *self.needs)
        super().__init__(options)


class _Rcptto(_PathHandler):
    """RCPT TO:<address>, once per recipient."""

    verbs, needs = ("RCPT",), ("helo", "mailfrom")
    parse = staticmethod(_parse_recipient)
    bad_argument = "msg_invalid_cmd_rcptto_arg"
    received = "msg_rcptto_received"
    _step, _keyword = "rcptto", "TO:"
    _bad_sequence = "msg_invalid_cmd_rcptto_sequence"
    _lists = (
        ("blacklisted_rcptto_emails", "msg_rcptto_blacklisted_email"),
        ("not_registered_emails", "msg_rcptto_not_registered_email"),
    )
    _delay = "response_delay_rcptto"

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        self._erases = () if options.multiple_rcptto else _STEPS[2:]

    def _declares_utf8(self, session: _Session, given: dict[str, str]) -> bool:
        return "SMTPUTF8" in getattr(session.mail.steps["mailfrom"].value, "parameters", {})

    def _record(self, mail: _Mail, exchange: _Exchange) -> None:
        super()._record(mail, exchange)
        mail.recipients.append(exchange)


class _Data(Handler):
    """DATA, which asks for permission to send the body."""

    verbs: Sequence[str] = ("DATA",)
    needs = ("helo", "mailfrom", "rcptto")
    received, bad_argument, _bad_sequence = "msg_data_received", "msg_invalid_cmd", "msg_invalid_cmd_data_sequence"
    _step, _delay = "data", "response_delay_data"
    _erases: tuple[str, ...] = ("data", "msg")

    def refuse(self, session: _Session, value: Any) -> str | None:
        return None if session.mail.body is None else self._bad_sequence  # after a chunk, RFC 3030 section 2

    def _names(self, session: _Session, argument: Any, value: Any) -> Sequence[str]:
        return session.mail.accepted_recipients()

    def _run(self, session: _Session, stage: str, request: _Request, argument: Any) -> _Reply:
        reply = super()._run(session, stage, request, argument)
        if reply.accepts and not reply.next.ends:
            session.expect_body()
        return reply


class _Bdat(_Data):
    """BDAT, which sends a body in chunks that are counted and have no end marker (RFC 3030)."""

    verbs = ("BDAT",)
    parse = staticmethod(_parse_chunk)
    received, bad_argument = "msg_bdat_received", "msg_invalid_cmd_bdat_arg"
    _erases = ()

    @classmethod
    def _is_offered(cls, options: Configuration) -> bool:
        return "CHUNKING" in _name_extensions(options)

    def _start(self, session: _Session, verb: str, request: str, argument: str) -> _Reply | None:
        chunk = _parse_chunk(argument)
        if chunk is None:
            return session.run(self, verb, request, argument)
        session.begin_mail_if_due(self)  # so that the bytes go to the same mail as the command
        return session.expect_chunk(chunk[0], request, lambda: self._finish(session, verb, request, argument))

    def _finish(self, session: _Session, verb: str, request: str, argument: str) -> _Reply:
        """Run the command after its chunk has arrived. With LAST, the reply is that to the body."""
        chunk = _parse_chunk(argument)
        if chunk is None or not chunk[1] or not self._choose(session, chunk).accepts:
            return session.run(self, verb, request, argument)
        session.mail.dialogue.extend((request, None))
        self._record(session.mail, _Exchange(request, self._accepting.text, True, chunk))
        return session.finish_body(request)

    def refuse(self, session: _Session, value: Any) -> str | None:
        body = session.mail.body
        return "msg_msg_size_is_too_big" if body and body.size > self.options.msg_size_limit else None

    def _run(self, session: _Session, stage: str, request: _Request, argument: Any) -> _Reply:
        reply = Handler._run(self, session, stage, request, argument)
        if not reply.accepts and self.parse(argument) is not None:  # no chunk counts any more before the next MAIL
            session.mail.accepted_steps.discard("rcptto")
            session.mail.body = None
        return reply


class _EndOfBody(Handler):
    """The end of the body. Its argument is the content, or None if that was too long."""

    verbs = ("message",)
    parse = staticmethod(lambda content: content)
    received, bad_argument = "msg_msg_received", "msg_msg_size_is_too_big"
    _step, _delay = "msg", "response_delay_message"
    _names = _Data._names

    def _run(self, session: _Session, stage: str, request: _Request, argument: Any) -> _Reply:
        reply = super()._run(session, stage, request, argument)
        if reply.accepts and not session.deliver():
            failed = self._find_reply("msg_msg_failed")
            reply = failed._replace(delay=reply.delay, next=reply.next if reply.next.ends else failed.next)
            # A copy, because on_message was given a message that has the list.
            session.mail.dialogue = [*session.mail.dialogue[:-1], reply.text]
            self._record(session.mail, _Exchange(request, reply.text, False, argument))
            session.mail.accepted_steps.discard("msg")
        return reply


class _EndOfChunks(_EndOfBody):
    """The end of a body that came in chunks. BDAT LAST has one reply for the command and for the body."""

    verbs = ("last chunk",)

    def _make_reply(self, option: str) -> _Reply:
        reply = super()._make_reply(option)
        return reply._replace(delay=reply.delay + self.options.response_delay_data)

    def _stages(self, stage: str) -> tuple[str, ...]:
        return "message", "BDAT", "*"


class _Rset(Handler):
    """RSET, which abandons the mail."""

    verbs, needs = ("RSET",), ("helo",)
    received, _bad_sequence = "msg_rset_received", "msg_invalid_cmd_rset_sequence"
    _step, _delay = "rset", "response_delay_rset"
    _erases = _TRANSACTION
    _annotates = True


class _Noop(Handler):
    """NOOP, with or without an argument."""

    verbs = ("NOOP",)
    parse = staticmethod(str)
    received = "msg_noop_received"
    _step, _delay = "noop", "response_delay_noop"
    _before_tls, _annotates = True, True


class _Quit(Handler):
    """QUIT, which ends the session."""

    verbs = ("QUIT",)
    received, bad_argument = "msg_quit_cmd", "msg_invalid_cmd"
    _step, _delay = "quit", "response_delay_quit"
    _next, _before_tls, _annotates = _Next.CLOSE, True, True


class _Starttls(Handler):
    """STARTTLS, after which the session begins again within TLS (RFC 3207)."""

    verbs, needs = ("STARTTLS",), ("helo",)
    received, bad_argument = "msg_starttls_received", "msg_invalid_cmd_starttls_arg"
    _next, _before_tls = _Next.TLS, True

    @classmethod
    def _is_offered(cls, options: Configuration) -> bool:
        return options.ssl_context is not None and not options.implicit_tls

    def _choose(self, session: _Session, value: Any) -> _Reply:
        is_secure = session.is_secure  # HELO is not needed to say that
        return self._find_reply("msg_invalid_cmd_starttls_sequence") if is_secure else super()._choose(session, value)


# A mechanism yields its challenges, is sent the client's answers, and returns a user and a secret. An answer that
# makes no sense raises ValueError.
_Mechanism = Generator[bytes, bytes, tuple[str, str]]


def _run_plain(users: Any) -> _Mechanism:
    """RFC 4616."""
    _, user, secret = _decode((yield b"")).split("\0")
    return user, secret


def _run_login(users: Any) -> _Mechanism:
    user = yield b"Username:"
    secret = yield b"Password:"
    return _decode(user), _decode(secret)


def _run_cram_md5(users: Any) -> _Mechanism:
    """RFC 2195. The client proves that it knows the secret without sending it."""
    import hmac

    challenge = b"<%d.%d@smtpmock>" % (time.monotonic_ns(), id(users))
    user, _, digest = _decode((yield challenge)).rpartition(" ")
    if callable(users):
        return user, f"{challenge.decode()} {digest}"
    secret = users.get(user, "")
    expected = hmac.new(secret.encode("utf-8", "surrogateescape"), challenge, "md5").hexdigest()
    return user, secret if digest == expected else f"not {secret}"


def _run_xoauth2(users: Any) -> _Mechanism:
    """As Google and Microsoft define it. The secret is the token."""
    match = re.fullmatch("user=([^\1]*)\1auth=Bearer ([^\1]*)\1\1", _decode((yield b"")))
    if match is None:
        raise ValueError("no user and token")
    return match[1], match[2]


_MECHANISMS: dict[str, Callable[[Any], _Mechanism]] = {
    "PLAIN": _run_plain,
    "LOGIN": _run_login,
    "CRAM-MD5": _run_cram_md5,
    "XOAUTH2": _run_xoauth2,
}


class _AuthExchange(NamedTuple):
    """An AUTH command that waits for the answer to a challenge."""

    login: _AuthResult  # what is known so far
    mechanism: _Mechanism
    challenge: bytes


class _Auth(Handler):
    """AUTH, in one line or in several. Each line is run; the last one yields the _AuthResult."""

    verbs = ("AUTH",)
    parse = staticmethod(lambda login: login)
    received = "msg_auth_received"
    _step = "auth"

    def refuse(self, session: _Session, value: Any) -> str | None:
        return None if value.response == self.received else value.response

    def _start(self, session: _Session, verb: str, request: str, argument: str) -> _Reply | None:
        # Only the verb and a known mechanism are shown, because anything else may be a secret.
        name, _, initial = argument.partition(" ")
        shown = name if name.upper() in _MECHANISMS else "***" if name else ""
        words = (request.split(maxsplit=1)[0], shown, "***" if initial else "")
        return session.run(self, verb, " ".join(filter(None, words)), argument)

    def _run(self, session: _Session, stage: str, request: _Request, argument: Any) -> _Reply:
        """The argument is that of the command or, for an answer to a challenge, the exchange and the line."""
        answers = isinstance(argument, tuple)
        result = self._proceed(*argument) if answers else self._begin(session, str(request), argument)
        if isinstance(result, _AuthExchange):
            return self._challenge(session, stage, request, result)
        reply = super()._run(session, stage, result.request, result)
        session.mail.dialogue[-2] = request
        return reply

    def _begin(self, session: _Session, request: str, argument: str) -> _AuthExchange | _AuthResult:
        name, _, initial = argument.partition(" ")
        login = _AuthResult("msg_auth_bad_response", name.upper(), None, request)
        refusal = self._refuse_mechanism(session, name.upper())
        if refusal is not None:
            return login._replace(response=refusal)
        mechanism = _MECHANISMS[name.upper()](self.options.auth_users)
        exchange = _AuthExchange(login, mechanism, next(mechanism))
        if not initial:
            return exchange
        if exchange.challenge[:1] == b"<" or initial == "*":  # the challenge of CRAM-MD5 has to be seen first
            return login
        return self._proceed(exchange, "" if initial == "=" else initial)

    def _refuse_mechanism(self, session: _Session, mechanism: str) -> str | None:
        steps = session.mail.accepted_steps
        if self.options.auth_users is None:
            return "msg_invalid_cmd"
        if not steps.issuperset(self.needs):
            return "msg_tls_required"
        if "helo" not in steps or "auth" in steps or "mailfrom" in steps:
            return "msg_auth_sequence"
        if self.options.auth_requires_tls and not session.is_secure:
            return "msg_auth_tls_required"
        return None if mechanism in _MECHANISMS else "msg_auth_unknown_mechanism"

    def _proceed(self, exchange: _AuthExchange, line: str) -> _AuthExchange | _AuthResult:
        """The outcome, or the exchange with its next challenge."""
        import base64

        login, users = exchange.login, self.options.auth_users
        if line == "*":
            return login._replace(response="msg_auth_cancelled")
        try:
            challenge = exchange.mechanism.send(base64.b64decode(line.encode(), validate=True))
            return exchange._replace(challenge=challenge)
        except StopIteration as stop:
            user, secret = stop.value
        except ValueError:
            return login
        name = login.mechanism
        is_valid = users(name, user, secret) if callable(users) else user in users and users[user] == secret
        return login._replace(response=self.received if is_valid else "msg_auth_failed", user=user)

    def _challenge(self, session: _Session, stage: str, request: _Request, exchange: _AuthExchange) -> _Reply:
        import base64

        text = f"334 {base64.b64encode(exchange.challenge).decode()}"
        reply = _Reply(text, _encode(text), accepts=True)
        if session.rules.newest_first:
            wanted = ("delay", "trickle")
            reply = self._apply(session.decide((stage, "*"), exchange.login.request, None, [""], wanted=wanted), reply)
        session.mail.dialogue.extend((request, text))
        session.expect_answer(lambda line: session.run(self, stage, line if line == "*" else "***", (exchange, line)))
        return reply

    def _names(self, session: _Session, argument: Any, value: Any) -> Sequence[str]:
        return [value.user or ""]

    def _record(self, mail: _Mail, exchange: _Exchange) -> None:
        if self.options.auth_users is not None and self._step not in mail.accepted_steps:
            super()._record(mail, exchange)


def _insert_lines(text: str, extensions: Sequence[str]) -> str:
    """A reply followed by extensions; all lines but the last have a - after the code (RFC 5321 section 4.2.1)."""
    lines = [*text.replace("\r\n", "\n").split("\n"), *(f"250 {extension}" for extension in extensions)]
    more = [f"{line[:3]}-{line[4:]}" if line[:3].isdigit() else line for line in lines[:-1]]
    return "\n".join([*more, lines[-1]]) if extensions else text


class _Ehlo(_Helo):
    """EHLO, whose reply lists the extensions (RFC 5321 section 4.1.1.1)."""

    verbs = ("EHLO",)

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        self._secure = self._announce(is_secure=True)
        self._accepting = self._announce(is_secure=False)

    def _announce(self, *, is_secure: bool) -> _Reply:
        usual = self._make_reply(self.received)
        text = _insert_lines(usual.text, list(self._list_extensions(is_secure))) if usual.accepts else usual.text
        return usual._replace(text=text, data=_encode(text))

    def _list_extensions(self, is_secure: bool) -> Iterator[str]:
        for extension in self.options.extensions:
            yield f"SIZE {self.options.msg_size_limit}" if extension.upper() == "SIZE" else extension
        if _Starttls._is_offered(self.options) and not is_secure:
            yield "STARTTLS"
        if self.options.auth_users is not None and (is_secure or not self.options.auth_requires_tls):
            yield f"AUTH {' '.join(_MECHANISMS)}"

    def _choose(self, session: _Session, value: Any) -> _Reply:
        reply = super()._choose(session, value)
        return self._secure if reply is self._accepting and session.is_secure else reply


class _Unknown(Handler):
    """A command that is none of the others."""

    verbs: Sequence[str] = ("unknown",)
    parse = staticmethod(lambda argument: None)
    bad_argument = "msg_invalid_cmd"
    _before_tls = True


class _TooLong(_Unknown):
    """A command line that was too long to keep."""

    verbs = ("too long",)
    bad_argument = "msg_line_too_long"


_BUILT_IN: tuple[type[Handler], ...] = (_Greeting, _Helo, _Ehlo, _Mailfrom, _Rcptto, _Data, _Bdat, _EndOfBody)
_BUILT_IN += (_EndOfChunks, _Rset, _Noop, _Quit, _Starttls, _Auth, _Unknown, _TooLong)


def _check_reply(name: str, text: Any) -> None:
    known = [field.name for field in dataclasses.fields(Configuration) if field.name.startswith("msg_")]
    if not (_is_text(text) and (text in known or re.match("[0-9]{3}", text))):
        hint = _suggest(text, known) if isinstance(text, str) else ""
        raise ConfigurationError(f"{name}={text!r}: must be a text that begins with three digits, or an option{hint}")


def _check_handler(handler: Any) -> None:
    """Raise ConfigurationError unless this is a subclass of Handler with all that it needs."""
    if not (isinstance(handler, type) and issubclass(handler, Handler)):
        raise ConfigurationError(f"handlers: {handler!r} must be a subclass of Handler")
    for name in ("verbs", "needs"):
        value = getattr(handler, name)
        if not _are_names(value) or not (value or name == "needs"):
            example = "('VRFY',)" if name == "verbs" else "('helo',)"
            raise ConfigurationError(f"{handler.__name__}.{name}={value!r}: must be a tuple of strings, as {example}")
    for verb in handler.verbs:
        if not re.fullmatch("[A-Za-z0-9]+", verb):
            raise ConfigurationError(f"{handler.__name__}.verbs: {verb!r} is no verb")
    for step in handler.needs:
        if step not in (*_STEPS, *_DEMANDS):
            raise ConfigurationError(f"{handler.__name__}.needs: {step!r} is no step of a session")
    if not callable(handler.parse):
        raise ConfigurationError(f"{handler.__name__}.parse={handler.parse!r}: must be callable")
    for name in ("received", "bad_argument"):
        _check_reply(f"{handler.__name__}.{name}", getattr(handler, name))


def _make_handlers(options: Configuration, handlers: Any = ()) -> dict[str, Handler]:
    """The table of verbs. The user's handlers replace built-in ones."""
    if not isinstance(handlers, Iterable):
        raise ConfigurationError(f"handlers={handlers!r}: must be a list of subclasses of Handler")
    handlers = list(handlers)
    for handler in handlers:
        _check_handler(handler)
    offered = [handler(options) for handler in _BUILT_IN if handler._is_offered(options)]
    table = {verb: handler for handler in offered for verb in handler.verbs}
    return table | {verb.upper(): made for made in (handler(options) for handler in handlers) for verb in made.verbs}


# ----------------------------------------------------------------------------------------- session

_LINE_LIMIT = 4096  # bytes of a command line with its end; RFC 5321 section 4.5.3.1.4 asks for 512 or more
_AUTH_LINE_LIMIT = 12288  # where lines may hold tokens; RFC 4954 section 4
_END_OF_DATA = b"\r\n.\r\n"
_DIALOGUE_LIMIT = 20000  # requests and replies in a transcript; an endless session must not fill the memory


class _Body:
    """The body of a mail while it arrives, from DATA or in the chunks of BDAT.

    Only CRLF ends a line: if a bare LF did, a mail could smuggle in another one (RFC 5321 section 4.1.1.4).
    """

    def __init__(self, limit: int, stops: list[int], *, is_counted: bool) -> None:
        self.is_counted = is_counted  # comes in chunks, which have no end marker and no stuffed dots
        self.missing = 0  # bytes of the present chunk
        self.request = ""  # the BDAT that announced it
        self.finish: Callable[[], _Reply]  # runs what is to be run at the end of the body or chunk
        self.size = 0  # bytes as they were sent, without the end marker and what may be its beginning
        self.stops = stops  # sizes at which rules apply, smallest first
        self._limit = limit
        self._is_kept = True
        self._raw = bytearray(b"\r\n")  # so that the first line begins like any other
        self._pending = 0  # bytes at the end that may begin the end marker

    def feed(self, data: bytes, start: int) -> tuple[int, bool]:
        """Take data from start on. Returns where in it the body, the chunk or the way to the next stop ends; and
        whether the body or chunk is complete."""
        end = len(data)
        if self.stops:
            end = min(end, start + max(self.stops[0] - self.size - self._pending, bool(self._pending)))
        if self.is_counted:
            stop = min(end, start + self.missing)
            self.missing -= stop - start
            is_complete = not self.missing
        else:
            stop, is_complete = self._find_end(data, start, end)
        self._raw += data[start:stop]
        self.size += self._pending + stop - start
        if is_complete and not self.is_counted:
            del self._raw[-3:]
            self.size -= 3
        elif not self.is_counted:
            self._pending = 2 * self._raw.endswith(b"\r\n.\r") or int(self._raw.endswith(b"\r\n."))
            self.size -= self._pending
        # At most one byte in four is a stuffed dot, so this much is too long even without them.
        if not self._is_kept or len(self._raw) > self._limit * 4 // 3 + 10:
            self._is_kept = False
            del self._raw[:-4]
        return stop, is_complete

    def _find_end(self, data: bytes, start: int, end: int) -> tuple[int, bool]:
        """Look for the end marker, which may have begun in earlier data."""
        seam = bytes(self._raw[-4:])
        found = (seam + data[start : min(start + 4, end)]).find(_END_OF_DATA)
        if found >= 0:
            return start + found - len(seam) + len(_END_OF_DATA), True
        found = data.find(_END_OF_DATA, start, end)
        return (end, False) if found < 0 else (found + len(_END_OF_DATA), True)

    def content(self) -> bytes | None:
        """What arrived, without stuffed dots (RFC 5321 section 4.5.2); None if it is over the limit."""
        raw = self._raw
        if not self.is_counted and b"." in raw:  # a dot is found much faster than a dot behind CRLF
            raw = raw.replace(b"\r\n.", b"\r\n")
        return bytes(memoryview(raw)[2:]) if self._is_kept and len(raw) - 2 <= self._limit else None


class _Mail:
    """What belongs to the mail in progress. The next mail of the session gets another one of these.

    Only the session's thread changes it. Messages and reports read the lists from other threads: these only grow,
    or are replaced.
    """

    def __init__(self) -> None:
        self.steps: dict[str, _Exchange] = {}
        self.accepted_steps: set[str] = set()
        self.recipients: list[_Exchange] = []
        self.dialogue: _Dialogue = []
        self.body: _Body | None = None
        self.start = 0  # where in the dialogue its message begins
        self.stamp: tuple[int, float] | None = None  # the number of its message, and the time of that
        self.delivered: Message | None = None  # what was accepted, or given to on_unaccepted
        self.entry: _Entry | None = None  # its place in the mailbox

    def make_next(self) -> _Mail:
        """The mail after this one. It begins with the greeting and with the steps that last."""
        mail = _Mail()
        mail.steps = {name: self.steps[name] for name in ("tls", "helo", "auth") if name in self.steps}
        mail.accepted_steps = self.accepted_steps & mail.steps.keys()
        mail.dialogue = self.dialogue[:2]
        for step in mail.steps.values():
            mail.dialogue += (step.request, step.response or None)
        return mail

    def make_copy(self) -> _Mail:
        """The same mail for another message, after its own was purged."""
        mail = _Mail()
        mail.steps, mail.accepted_steps, mail.recipients = self.steps, self.accepted_steps, self.recipients
        mail.dialogue, mail.body, mail.start = self.dialogue, self.body, len(self.dialogue)
        return mail

    def accepted_recipients(self) -> list[str]:
        return [recipient.value for recipient in self.recipients if recipient.accepted]


def _ignore(message: Message) -> None:
    pass


class _Context(NamedTuple):
    """What the sessions of a server share."""

    options: Configuration
    handlers: dict[str, Handler]
    mailbox: _Mailbox
    log: _Log
    rules: _Rules
    on_message: Callable[[Message], object] = _ignore  # called with each accepted message, before the reply to it
    on_unaccepted: Callable[[Message], object] = _ignore  # called with each other message at the end of its session
    early_ends: deque[str] = deque(maxlen=10)  # connections that ended before any command, and why


# A session is in one state, which is the method that takes the next bytes. It returns where it stopped and
# the reply, if there is one.
#
#                    line too long                        the rest of the line
#         +-------------------------> _skip_line ------------------------------>+
#         |          AUTH, answered with 334              the answer            |
#         +-------------------------> _take_answer ---------------------------->+
#         |          DATA accepted, BDAT                  the end marker, or    |
#     _take_line -------------------> _take_body  ---- the counted bytes ------>+---> _take_line
#         |          STARTTLS accepted                    the handshake         |
#         +-------------------------> _ignore_input --------------------------->+
#
# A reply that closes the connection, resets it or falls silent leads from any state to _ignore_input, for good.
_State = Callable[[bytes, int], tuple[int, _Reply | None]]


class _Session:
    """One SMTP conversation, without a socket, a thread or a clock.

    The same bytes give the same replies and messages, in whatever pieces they arrive.
    """

    def __init__(self, context: _Context, peer: tuple[str, int]) -> None:
        self.context = context
        self.peer = peer
        self.rules = context.rules
        self.request: _Request = None  # the last one, for the log
        self.mail = _Mail()
        self._take: _State = self._take_line
        self._rest = b""  # the beginning of a line
        self._keeps_messages = context.options.multiple_message_receiving
        self._line_limit = _LINE_LIMIT if context.options.auth_users is None else _AUTH_LINE_LIMIT

    @property
    def is_secure(self) -> bool:
        """Whether the session is within TLS."""
        return "tls" in self.mail.steps

    @property
    def is_receiving_body(self) -> bool:
        return self._take == self._take_body

    def message(self, size: int | None = None, content: bytes | None = None) -> Message:
        """The message as it would be recorded now; with a body that is not accepted yet."""
        message = Message(self.mail, self.peer, 0, 0.0)
        if size is not None:
            message._steps["msg"] = _Exchange(size, "", False, content)
        return message

    def begins_with(self, data: bytes) -> bool:
        """Whether the client has sent this, and no line yet."""
        return self._rest.startswith(data)

    def greet(self) -> _Reply:
        return self.run(self.context.handlers["connect"], "connect", None, "")

    def receive(self, data: bytes) -> Iterator[_Reply]:
        """Yield the replies to what data completes. A command is run when its reply is asked for."""
        if len(self.mail.dialogue) > _DIALOGUE_LIMIT:
            self.mail.dialogue = self.mail.dialogue[:2] + self.mail.dialogue[-_DIALOGUE_LIMIT // 2 :]
        if self._rest:
            data, self._rest = self._rest + data, b""
        at = 0
        while at < len(data):
            at, reply = self._take(data, at)
            if reply is not None:
                if reply.next is not _Next.COMMAND:  # what came in clear must have no effect within TLS
                    at = len(data)
                yield reply

    def end(self, farewell: str | None = None) -> None:
        """Record what is not yet recorded, because the connection ends. The farewell is the server's last reply."""
        mail = self.mail
        leaves_body = mail.body is not None
        if mail.body is not None:
            self._leave_body(mail.body, "")
        if farewell is not None:
            mail.dialogue += (None, farewell, None, _Next.CLOSE.value)
        if self.request is not None and (mail.entry is None or leaves_body or farewell is not None):
            self._publish(complete=True, annotates=not leaves_body)
        self._report_unaccepted()

    def _report_unaccepted(self) -> None:
        """Give on_unaccepted a message that was not given to on_message."""
        mail = self.mail
        if mail.entry is not None and mail.delivered is None:
            mail.delivered = mail.entry.message
            self._call(self.context.on_unaccepted, mail.delivered)

    # The states.

    def _take_line(self, data: bytes, at: int) -> tuple[int, _Reply | None]:
        end = data.find(b"\n", at, at + self._line_limit)
        if end < 0:
            return self._take_part_of_line(data, at)
        request, verb, argument = _parse_command(data[at:end])
        handlers = self.context.handlers
        handler = handlers.get(verb) or handlers["unknown"]
        keyword = handler._keyword
        if keyword:
            if argument[: len(keyword)].upper() != keyword:
                handler = handlers["unknown"]
            argument = argument[len(keyword) :]
        return end + 1, handler._start(self, verb, request, argument.strip())

    def _take_answer(self, data: bytes, at: int, run: Callable[[str], _Reply]) -> tuple[int, _Reply | None]:
        end = data.find(b"\n", at, at + self._line_limit)
        if end < 0:
            return self._take_part_of_line(data, at)
        self._take = self._take_line
        return end + 1, run(_decode(data[at:end].strip()))

    def _take_part_of_line(self, data: bytes, at: int) -> tuple[int, _Reply | None]:
        if len(data) - at < self._line_limit:
            self._rest = data[at:]
            return len(data), None
        self._take = self._skip_line
        return at, self.run(self.context.handlers["too long"], "", f"line of over {self._line_limit} bytes", "")

    def _skip_line(self, data: bytes, at: int) -> tuple[int, _Reply | None]:
        end = data.find(b"\n", at)
        if end < 0:
            return len(data), None
        self._take = self._take_line
        return end + 1, None

    def _take_body(self, data: bytes, at: int) -> tuple[int, _Reply | None]:
        body = self.mail.body
        assert body is not None
        at, is_complete = body.feed(data, at)
        pause = self._interrupt(body) if body.stops and body.size >= body.stops[0] else None
        if not is_complete or (pause is not None and pause.next.ends):
            return at, pause
        self._take = self._take_line
        reply = body.finish()
        return at, reply if pause is None else reply._replace(delay=pause.delay + reply.delay)

    def _ignore_input(self, data: bytes, at: int) -> tuple[int, _Reply | None]:
        return len(data), None

    def expect_answer(self, run: Callable[[str], _Reply]) -> None:
        """Have the next line answer a challenge."""
        self._take = functools.partial(self._take_answer, run=run)

    def expect_body(self) -> None:
        """Have the body come next, up to its end marker."""
        self.mail.body = self._make_body(is_counted=False)
        self.mail.body.finish = self.finish_body
        self._take = self._take_body

    def expect_chunk(self, size: int, request: str, run: Callable[[], _Reply]) -> _Reply | None:
        """Have so many bytes of the body come next, and then run the command that announced them."""
        self.request = request
        if self.mail.body is None:
            self.erase(("data", "msg"))
            self.mail.body = self._make_body(is_counted=True)
        if not size:
            return run()
        self.mail.body.missing, self.mail.body.finish, self.mail.body.request = size, run, request
        self._take = self._take_body
        return None

    def _make_body(self, *, is_counted: bool) -> _Body:
        stops = self.rules.stops() if self.rules.newest_first else []
        return _Body(self.context.options.msg_size_limit, stops, is_counted=is_counted)

    def secure(self, version: str, cipher: str) -> None:
        """Begin again within TLS. What was said before is forgotten (RFC 3207 section 4.2)."""
        self.erase((*_STEPS, "auth"))
        self.mail.accepted_steps.add("tls")
        self.mail.steps["tls"] = _Exchange(None, "", True, (version, cipher))
        self._take = self._take_line

    # The commands.

    def begin_mail_if_due(self, handler: Handler) -> None:
        """Leave a mail that is complete, unless this command annotates it."""
        entry = self.mail.entry
        if entry is None or handler._annotates:
            return
        if self._keeps_messages:
            self._report_unaccepted()
            self.mail = self.mail.make_next()
        elif entry.is_purged:
            self.mail = self.mail.make_copy()

    def run(self, handler: Handler, stage: str, request: _Request, argument: Any, *, completes: bool = False) -> _Reply:
        """Run a command. What it completes is recorded before its reply is returned."""
        if self.mail.entry is not None:
            self.begin_mail_if_due(handler)
        try:
            reply = handler._run(self, stage, request, argument)
        except BaseException:  # noqa: BLE001 - a handler of the user may raise anything
            self.context.log.failure(f"{type(handler).__name__} failed")
            reply = handler._find_reply("msg_msg_failed")
            self.mail.dialogue += (request, reply.text)
        self.request = request
        if reply.next is not _Next.COMMAND:
            self._take = self._ignore_input
            if reply.next.ends:
                self.mail.dialogue += (None, reply.next.value)
        complete = reply.next.ends or (completes and (reply.accepts or self._keeps_messages))
        if request is not None and (complete or self.mail.entry is not None):
            self._publish(complete=complete, annotates=handler._annotates)
        return reply

    def finish_body(self, request: str | None = None) -> _Reply:
        """Run the end of the body; request is the BDAT that it came with."""
        body = self.mail.body
        assert body is not None
        handler = self.context.handlers["message" if request is None else "last chunk"]
        reply = self.run(handler, "message", body.size, body.content(), completes=True)
        self.mail.body = None
        self.request = self.request if request is None else request
        return reply

    def decide(
        self, stages: Collection[str], request: _Request, content: Any, names: Sequence[str], **limits: Any
    ) -> dict[str, Any]:
        """The aspects of a reply that rules set; for a body, request is its size."""
        is_body = isinstance(request, int)
        text = _decode(content or b"") if is_body else str(request or "")
        size, body = (request, content) if isinstance(request, int) else (None, None)
        try:
            return self.rules.decide(stages, text, names, lambda: self.message(size, body), **limits)
        except BaseException:  # noqa: BLE001 - pytest.fail() is not an Exception
            self.context.log.failure("a rule failed")
            return {"said": self.context.options.msg_msg_failed}

    def _interrupt(self, body: _Body) -> _Reply | None:
        """What rules do at this size of the body: end the session, with or without a reply, or only a delay."""
        after, handler = body.stops.pop(0), self.context.handlers["message"]
        names = self.mail.accepted_recipients()
        aspects = self.decide(handler._stages("message"), body.size, body.content(), names, after=after)
        if not aspects:
            return None
        if "said" in aspects or "then" in aspects:
            aspects.setdefault("then", _Next.CLOSE)
        reply = handler._apply(aspects, _Reply("", b""))
        if reply.next.ends:
            self._leave_body(body, reply.text)
            self._take = self._ignore_input
            self.mail.dialogue += (None, reply.next.value)
            self._publish(complete=True)
        return reply

    def _leave_body(self, body: _Body, response: str) -> None:
        """Keep what arrived of a body that will not be complete."""
        if body.missing:
            self.mail.steps.setdefault("data", _Exchange(body.request, "", False, None))
            self.mail.dialogue += (body.request, None)
        self.mail.steps["msg"] = _Exchange(body.size, response, False, body.content())
        self.mail.dialogue += (body.size, response or None)
        self.mail.body = None

    def deliver(self) -> bool:
        """Give on_message the mail that is about to be accepted. Returns whether it may be."""
        mail = self.mail
        mail.stamp = self.context.mailbox.stamp()
        mail.delivered = Message(mail, self.peer, *mail.stamp)
        if not self._call(self.context.on_message, mail.delivered):
            mail.delivered = None
        return mail.delivered is not None

    def _call(self, function: Callable[[Message], object], message: Message) -> bool:
        try:
            function(message)
        except BaseException:  # noqa: BLE001 - pytest.fail() is not an Exception
            self.context.log.failure("on_message failed")
            return False
        return True

    def _publish(self, *, complete: bool, annotates: bool = False) -> None:
        """Bring the message in the mailbox up to date; put it there if it is complete."""
        mail, mailbox = self.mail, self.context.mailbox
        message = mail.delivered
        if message is None or message._dialogue is not mail.dialogue or message._said != len(mail.dialogue):
            message = self._make_message()
        if mail.entry is not None:
            if mailbox.update(mail.entry, message) or annotates:
                return
            # It was purged while this command ran, so what the command has begun is another message.
            if mail.entry.message.id == message.id:
                mail.stamp = None
                message = self._make_message()
            mail.entry = None
        if complete:
            mail.entry = mailbox.add(message)

    def _make_message(self) -> Message:
        mail = self.mail
        mail.stamp = mail.stamp or self.context.mailbox.stamp()
        return Message(mail, self.peer, *mail.stamp)

    def erase(self, steps: Sequence[str]) -> None:
        """Forget these steps, unless they belong to an accepted message that is kept."""
        mail = self.mail
        if mail.entry is not None and self._keeps_messages:
            return
        for step in steps:
            mail.steps.pop(step, None)
        mail.accepted_steps.difference_update(steps)
        if "rcptto" in steps:
            mail.recipients = []
            if "mailfrom" in steps:
                mail.body = None


# ----------------------------------------------------------------------------------------- mailbox


class _Entry:
    """A place in the mailbox."""

    __slots__ = ("is_purged", "message")

    def __init__(self, message: Message) -> None:
        self.message = message  # replaced with the lock of the mailbox, and read without it
        self.is_purged = False  # likewise; whoever acts on it looks again with the lock


class _Waiter:
    """What a waiting thread has found, and what it has still to look at."""

    def __init__(self, entries: Iterable[_Entry]) -> None:
        # The lock of the mailbox guards the first two; only the waiting thread uses the third.
        self.unseen = dict.fromkeys(entries)  # new, or changed since it was looked at
        self.missing = 0  # it is not woken for fewer
        self.matching: dict[_Entry, Message] = {}

    def has_enough(self) -> bool:
        return len(self.unseen) >= self.missing

    def look_at(self, entries: Iterable[_Entry], where: Callable[[Message], object] | None, deadline: float) -> None:
        """Look at these entries until the deadline."""
        for entry in entries:
            message = entry.message
            if where is None or where(message):
                self.matching[entry] = message
            else:
                self.matching.pop(entry, None)
            if time.monotonic() > deadline:
                return


class _Mailbox:
    """The recorded messages of a server, oldest first."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards everything below
        self._changed = threading.Condition(self._lock)  # notified when a waiter has enough
        self._last_number = 0
        self._entries: list[_Entry] = []
        self._waiters: list[_Waiter] = []

    def stamp(self) -> tuple[int, float]:
        """A number for a message, and the time."""
        with self._lock:
            self._last_number += 1
            return self._last_number, self._clock()

    def add(self, message: Message) -> _Entry:
        entry = _Entry(message)
        with self._lock:
            self._entries.append(entry)
            self._show(entry)
        return entry

    def update(self, entry: _Entry, message: Message) -> bool:
        """Replace the message of an entry. False if the entry was purged, and nothing is replaced."""
        with self._lock:
            if not entry.is_purged:
                entry.message = message
                if self._waiters:
                    self._show(entry)
            return not entry.is_purged

    def _show(self, entry: _Entry) -> None:
        for waiter in self._waiters:
            waiter.unseen[entry] = None
            if waiter.has_enough():
                self._changed.notify_all()

    def messages(self, *, purge: bool) -> list[Message]:
        with self._lock:
            messages = [entry.message for entry in self._entries]
            if purge:
                self._purge(self._entries)
        return messages

    def _purge(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            entry.is_purged = True
        self._entries = [entry for entry in self._entries if not entry.is_purged]

    def wait(
        self, count: int, timeout: float, where: Callable[[Message], object] | None, *, purge: bool
    ) -> tuple[bool, list[Message]]:
        """Wait for count matching messages. Returns whether they came, and all that match; purges only if they came."""
        deadline = time.monotonic() + timeout
        with self._lock:
            waiter = _Waiter(self._entries)
            self._waiters.append(waiter)
        try:
            waiter_deadline = float("inf")  # everything that was there before the call is looked at
            while True:
                with self._lock:
                    in_time = self._changed.wait_for(waiter.has_enough, max(0.0, deadline - time.monotonic()))
                    unseen, waiter.unseen = waiter.unseen, {}
                waiter.look_at(unseen, where, waiter_deadline)  # without the lock, because it calls the user's code
                waiter_deadline = deadline
                in_time = in_time and time.monotonic() < deadline
                result = self._collect(waiter, count, purge=purge, is_last=not in_time)
                if result is not None:
                    return result
        finally:
            with self._lock:
                self._waiters.remove(waiter)

    def _collect(self, waiter: _Waiter, count: int, *, purge: bool, is_last: bool) -> tuple[bool, list[Message]] | None:
        """What wait() returns; None if it must go on."""
        with self._lock:
            matching = waiter.matching
            if len(matching) >= count or is_last:
                waiter.matching = {entry: matching[entry] for entry in self._entries if entry in matching}  # not purged
            is_enough = len(waiter.matching) >= count
            messages = list(waiter.matching.values())
            if is_enough and purge:
                self._purge(waiter.matching)
            waiter.missing = count - len(messages)
            return (is_enough, messages) if is_enough or is_last else None


# ------------------------------------------------------------------------------------------ logger


class Logger(Protocol):
    """What a server logs to. A logging.Logger can be used as it is; its info() gets the activity as well."""

    def info_activity(self, message: str, /) -> None: ...  # sessions, requests and replies
    def info(self, message: str, /) -> None: ...  # the start and the end of the server
    def warning(self, message: str, /) -> None: ...  # the beginning of a stop, broken connections
    def error(self, message: str, /) -> None: ...  # failed starts, refused clients, exceptions in user code


_FAILURES = 100  # of callbacks, for check() to tell


class _Log:
    """Calls a logger and survives its exceptions; without one, prints what the options ask for."""

    def __init__(self, logger: Any, options: Configuration) -> None:
        for name in ("info", "warning", "error"):
            if logger is not None and not callable(getattr(logger, name, None)):
                raise ConfigurationError(f"logger={logger!r}: must have a method {name}()")
        self._logger = logger
        self._prints = options.log_to_stdout
        self.shows_activity = logger is not None or (options.log_to_stdout and options.log_server_activity)
        self._has_failed = False  # not guarded: at worst, two threads say so
        self._lock = threading.Lock()  # guards the failures
        self.failures: list[str] = []  # of callbacks, since the start or the last reset()

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
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # Ctrl-C in start() or stop()
            if not self._has_failed:
                self._has_failed = True
                with contextlib.suppress(Exception):
                    print(f"smtpmock: the log is incomplete, its logger raised {error!r}", file=sys.stderr)

    def failure(self, what: str) -> None:
        """Show the user the exception that is being handled: in the log or, without one, as that of a thread."""
        import traceback

        kind, error, trace = sys.exc_info()
        text = "".join(traceback.format_exception_only(kind, error)).strip()  # which survives a __str__() that raises
        with self._lock:
            self.failures.append(f"{what}: {text}")
            del self.failures[_FAILURES:]
        if isinstance(error, SMTPMockError):  # of an output of the command line; a traceback would say nothing more
            with contextlib.suppress(Exception):
                print(f"smtpmock: {error}", file=sys.stderr, flush=True)
        elif self._logger is None and not self._prints:
            with contextlib.suppress(BaseException):
                threading.excepthook(threading.ExceptHookArgs((kind, error, trace, threading.current_thread())))
        else:
            self("error", f"{what}: {traceback.format_exc()}")

    def forget_failures(self) -> list[str]:
        with self._lock:
            failures, self.failures = self.failures, []
        return failures

    def _print(self, level: str, message: str) -> None:
        stream = sys.stderr if level == "ERROR" else sys.stdout  # looked up each time, because tests replace them
        now = time.time()
        stamp = time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(now))
        line = f"{level}: {stamp}.{int(now % 1 * 1e6):06d} {message}\n"
        encoding = stream.encoding or "utf-8"
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


# ------------------------------------------------------------------------------------------ server

_LINGER = 2.0  # seconds that a client has to close its end after the server has closed its own
_RST_ON_CLOSE = struct.pack("ii", 1, 0)  # for SO_LINGER


def _format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _set_timeout(sock: socket.socket, seconds: float) -> None:
    """Have reads and writes fail after so many seconds, with BlockingIOError or TimeoutError."""
    if os.name != "posix":
        sock.settimeout(seconds)
        return
    # settimeout() adds a poll() to every read and write, which is half of the cost of a command.
    sock.settimeout(None)  # neither inherited from the listening socket nor taken from socket.setdefaulttimeout()
    timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


class _Connection(socketserver.BaseRequestHandler):
    """Moves bytes between a client and its session, and carries out the replies."""

    request: Any  # the socket; within TLS, an ssl.SSLSocket
    server: _Listener

    def setup(self) -> None:
        self.plain: socket.socket = self.request
        self.options = self.server.context.options
        self.log = self.server.context.log
        # Only the session's thread sets these. stop() reads is_idle and request; reports read the session.
        self.session = _Session(self.server.context, self.client_address[:2])
        self.unsent = bytearray()
        self.is_idle = False  # reads and waits for a command, so that stop() may end it and nothing is lost
        self.must_linger = False  # because the server closes first
        self.ignores_input = False  # of a client that goes on sending during stop(); only an RST wakes it for sure
        self.reason = "left before any command"  # why it ended so
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
        if self.session.request is None:
            begins_tls = self.session.begins_with(b"\x16\x03")
            reason = "the client began TLS, but this port begins in plain text" if begins_tls else self.reason
            self.server.context.early_ends.append(f"{_format_address(*self.client_address[:2])}: {reason}")
        self.log.activity("SMTP session finished")
        if self.must_linger:
            self._linger()
        self.server.connections.discard(self)
        if self.request is not self.plain:  # the listener closes the plain socket, but not this one
            self.shut_down(socket.SHUT_WR)
            self.request.close()

    def _say(self, reply: _Reply, request: _Request = None) -> bool:
        """Log, wait and send. Returns whether the session goes on.

        The replies to commands that came together are sent together (RFC 2920).
        """
        says = bool(reply.data) or reply.next.ends  # unless a rule only delays a body
        if request is not None and self.log.shows_activity and says:
            self.log.activity("SMTP request: ", request)
        if reply.delay:
            self._flush()
            if not self._pause(reply.delay):
                return False
        if self.log.shows_activity and says:
            self.log.activity("SMTP response: ", reply.text if reply.data else "none")
        if not reply.trickle:
            self.unsent += reply.data
        elif not self._trickle(reply):
            return False
        if reply.next is _Next.COMMAND and len(self.unsent) < 65536:
            return True
        self._flush()
        return self._go_on(reply)

    def _go_on(self, reply: _Reply) -> bool:
        """Do what comes after a reply. Returns whether the session goes on."""
        if reply.next is _Next.TLS:
            return self._start_tls()
        if reply.next is _Next.RESET:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            self.request.close()
        elif reply.next is _Next.SILENCE:
            self._stay_silent()
        elif reply.next is _Next.CLOSE:
            self.must_linger = "quit" not in self.session.mail.accepted_steps  # nothing may follow a QUIT
            if reply.data and self.session.is_secure:
                self.request.settimeout(0)  # announces the end, and does not wait for the client to do the same
                with contextlib.suppress(OSError, ValueError):
                    self.request.unwrap()
        return not reply.next.ends

    def _pause(self, seconds: float) -> bool:
        """Wait. False if the session ends before that: by an RST, by the server or, in a stop, by the client's FIN."""
        if not hasattr(select, "poll"):
            return not self.server.aborting.wait(seconds)
        deadline = time.monotonic() + seconds
        poll = select.poll()
        hang_up = getattr(select, "POLLRDHUP", 0)  # a FIN; errors and an RST are always reported
        stopping = self.server.stopping  # read once: if it changes now, the wake-up is still to come
        poll.register(self.request, hang_up if stopping else 0)
        if not stopping:
            poll.register(self.server.wake[1], select.POLLIN)
        while events := poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if self.server.aborting.is_set() or any(fd == self.request.fileno() for fd, _ in events):
                return False
            poll.unregister(self.server.wake[1])  # stop() has begun
            poll.modify(self.request, hang_up)
        return True

    def _trickle(self, reply: _Reply) -> bool:
        self._flush()
        for index in range(len(reply.data)):
            if index and not self._pause(reply.trickle):
                return False
            self.request.sendall(reply.data[index : index + 1])
        return True

    def _start_tls(self) -> bool:
        """Returns whether the handshake succeeded."""
        self.plain.settimeout(self.options.session_timeout)  # OpenSSL respects this, but not SO_RCVTIMEO
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
            self.reason = f"TLS handshake failed: {error}"
            if getattr(error, "reason", "") in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
                self.reason += "; the client spoke plain text, but this port begins with TLS"
            self.log("warning", f"SMTP session broke off: {self.reason}")
        return self.session.is_secure

    def _stay_silent(self) -> None:
        """Read until the client or the server ends the session, or nothing came for session_timeout."""
        self.is_idle = True
        with contextlib.suppress(OSError):
            while not self.server.stopping and self.request.recv(65536):
                pass

    def _linger(self) -> None:
        """Send a FIN, and read until the client closes, too: closing with unread input would send an RST."""
        self.is_idle = True
        deadline = time.monotonic() + _LINGER
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.request, socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.request.settimeout(0 if self.server.stopping else left)
                if not socket.socket.recv(self.request, 262144):
                    break
                self.ignores_input = self.ignores_input or self.server.stopping
        if self.ignores_input:
            with contextlib.suppress(OSError):
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)

    def _flush(self) -> None:
        if self.unsent:
            self.request.sendall(self.unsent)
            self.unsent.clear()

    def _read(self) -> bytes:
        """What the client sends next; empty at the end of the session."""
        self._flush()
        server = self.server
        try:
            # is_idle is set before stopping is read, and stop() does the reverse, so one of the two sees the other.
            self.is_idle = is_idle = not self.session.is_receiving_body
            if self.session.is_secure and not (is_idle and server.stopping):
                self._await_input()
            if not (is_idle and server.stopping):
                data: bytes = self.request.recv(65536 if is_idle else 262144)
                self.is_idle = False
                if not (is_idle and server.stopping):
                    return data
                self.ignores_input = bool(data)
            return self._say_goodbye(self.options.msg_server_shutdown)
        except (TimeoutError, BlockingIOError):
            return self._say_goodbye(self.options.msg_session_timeout)
        except ConnectionError:  # an RST ends a session like a FIN
            return b""

    def _await_input(self) -> None:
        """Wait outside of TLS: once stop() has interrupted a read within it, no farewell can be sent any more."""
        if not self.request.pending():
            with selectors.DefaultSelector() as selector:
                selector.register(self.request, selectors.EVENT_READ)
                if not selector.select(self.options.session_timeout):
                    raise TimeoutError

    def _say_goodbye(self, text: str) -> bytes:
        self.session.end(text)
        self._say(_Reply(text, _encode(text), next=_Next.CLOSE))
        return b""

    def shut_down(self, how: int) -> None:
        """Interrupt what the session's thread waits for in the socket. Called by the thread that stops the server."""
        with contextlib.suppress(OSError):  # it may have ended just now
            socket.socket.shutdown(self.request, how)  # SSLSocket.shutdown() would forget that it is within TLS

    def abort(self) -> None:
        """End the connection with an RST: a client that is still sending might wait for a minute otherwise."""
        with contextlib.suppress(OSError):
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
        self.shut_down(socket.SHUT_RDWR)


_SPARE_THREADS = 16
_PATIENCE = 5.0  # seconds that stop() waits for an aborted session that user code holds up


class _Thread(threading.Thread):
    """A thread that tells when it ends: before Python 3.13, a thread whose join() was interrupted seems to have ended.

    Daemonic, so a forgotten server cannot keep the interpreter alive.
    """

    def __init__(self, name: str, target: Callable[[], object]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = target
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            self._work()
        finally:
            self.ended.set()


class _SessionThread(_Thread):
    """Serves one client after another, because starting a thread costs as much as a short session."""

    def __init__(self, listener: _Listener) -> None:
        from queue import SimpleQueue

        super().__init__("smtpmock session", self._serve_clients)
        self.listener = listener
        self.clients: SimpleQueue[tuple[Any, Any] | None] = SimpleQueue()  # None after the last one

    def _serve_clients(self) -> None:
        while (client := self.clients.get()) is not None:
            self.listener.process_request_thread(*client)
            if len(self.listener.spare_threads) >= _SPARE_THREADS:
                return
            self.listener.spare_threads.append(self)


def _join_threads(threads: Sequence[_Thread], timeout: float) -> bool:
    """Wait for the threads, without the present one, in which a callback may have called stop(). False on timeout."""
    deadline = time.monotonic() + timeout
    others = [thread for thread in threads if thread is not threading.current_thread()]
    for thread in others:
        if thread.ended.wait(max(0.0, deadline - time.monotonic())):
            thread.join()
    return all(thread.ended.is_set() for thread in others)


# The listeners whose sockets a forked child has to close.
_listeners: weakref.WeakSet[_Listener] = weakref.WeakSet()


class _Listener(socketserver.ThreadingTCPServer):
    """Accepts clients, from open() to close()."""

    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers have one port
    request_queue_size = socket.SOMAXCONN

    def __init__(self, family: int, address: Any, context: _Context) -> None:
        self.address_family = family
        super().__init__(address, _Connection, bind_and_activate=False)
        self.context = context
        self.connections: set[_Connection] = set()  # the open ones; add, discard and copy are atomic
        self.spare_threads: list[_SessionThread] = []  # they add themselves; only the listener's thread takes from it
        self.was_opened = False  # guarded by closing
        self.stopping = False  # never becomes False again, so any thread may set it
        self.aborting = threading.Event()  # set when the sessions that still go on must end at once
        self.closing = threading.RLock()  # held by the thread that opens or closes
        self.thread = _Thread("smtpmock listener", self.serve_forever)
        self.has_shortage = False  # of descriptors or threads; it is logged once, by the listener's thread
        self.wake: tuple[socket.socket, ...] = ()  # a byte is sent to the first when the server stops
        try:
            self.wake = socket.socketpair()
            if family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # [::] takes IPv4, too
            self.server_bind()
        except BaseException:
            self.server_close()
            raise
        _listeners.add(self)

    def open(self) -> None:
        with self.closing:
            if not self.stopping:  # a logger may have called stop() already
                self.socket.setblocking(False)  # a client may be gone before it is accepted
                self.selector = selectors.DefaultSelector()
                self.was_opened = True  # before start(), which may be interrupted
                try:
                    self.thread.start()
                except RuntimeError:  # there is no thread to wait for
                    self.was_opened = False
                    raise

    def serve_forever(self, poll_interval: float | None = None) -> None:
        """Accept clients until close(), which wakes the selector; there is no polling."""
        with self.selector as selector, contextlib.suppress(ValueError):
            if not self.stopping:  # register() raises ValueError for a socket that is closed already
                selector.register(self.socket, selectors.EVENT_READ)
                selector.register(self.wake[1], selectors.EVENT_READ)
            while not self.stopping:
                selector.select(poll_interval)
                if not self.stopping:
                    self.handle_request()

    def handle_request(self) -> None:
        try:
            client = self.get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._log_shortage(error)
                self.aborting.wait(0.05)  # the client still waits and would wake this thread at once
            return  # with any other error, the client is gone
        try:
            if self.spare_threads:
                thread = self.spare_threads.pop()
            else:
                thread = _SessionThread(self)
                thread.start()
        except RuntimeError as error:
            self._log_shortage(error)
            with contextlib.suppress(OSError):
                client[0].send(b"421 No thread for another session\r\n")
            self.shutdown_request(client[0])
        else:
            self.has_shortage = False
            thread.clients.put(client)

    def _log_shortage(self, error: Exception) -> None:
        if not self.has_shortage:
            self.context.log("error", f"SMTP mock server cannot take another client: {error}")
        self.has_shortage = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.context.log.failure("SMTP session failed")

    def close(self, timeout: float) -> bool | None:
        """End all sessions, after timeout seconds by force. Returns whether force was needed; None if another
        thread does it, which waits for the session of this one.

        It can be called again after an exception such as KeyboardInterrupt, and then finishes the job.
        """
        thread = threading.current_thread()
        if not isinstance(thread, _SessionThread) or thread.listener is not self:
            with self.closing:
                return self._close(timeout)
        if not self.closing.acquire(blocking=False):
            return None
        try:
            return self._close(timeout)
        finally:
            self.closing.release()

    def _close(self, timeout: float) -> bool:
        """Every step can be repeated."""
        self.stopping = True
        with contextlib.suppress(OSError):
            self.wake[0].send(b"\0")
        if self.was_opened:
            # If start() was interrupted, the thread may have no number yet. It will see that it has to end.
            _join_threads([self.thread], 5 if self.thread.ident else 0.1)
        # On Linux, this makes every copy of the socket stop listening, also one in a process that C code has forked.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for connection in self.connections.copy():
            if connection.is_idle:
                connection.shut_down(socket.SHUT_RD)
        threads = [t for t in threading.enumerate() if isinstance(t, _SessionThread) and t.listener is self]
        for thread in threads:
            thread.clients.put(None)
        if not _join_threads(threads, timeout):
            self.abort()
            _join_threads(threads, _PATIENCE)
        self.server_close()
        return self.aborting.is_set()

    def abort(self) -> None:
        """End all sessions at once."""
        self.aborting.set()
        for connection in self.connections.copy():
            connection.abort()

    def server_close(self) -> None:
        super().server_close()
        for sock in self.wake:
            sock.close()

    def abandon(self) -> None:
        """In a forked child, close the sockets; the parent has the threads, and goes on serving the clients."""
        self.closing = threading.RLock()  # another thread of the parent may have held it
        self.stopping, self.was_opened = True, False
        for connection in self.connections:
            connection.request.close()
        self.connections.clear()
        self.server_close()


def _abandon_listeners() -> None:
    for listener in list(_listeners):
        listener.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_listeners)


def _bind(context: _Context) -> _Listener:
    """A listener on the first of the host's addresses that is free."""
    failure = OSError("it has no address")
    name = context.options.host.strip("[]")
    host = name.encode() if name.isascii() else name  # a str would import the codec of international names
    for family, _, _, _, address in socket.getaddrinfo(host, context.options.port, type=socket.SOCK_STREAM):
        try:
            return _Listener(family, address, context)
        except OSError as error:
            failure = error
    raise failure


_Where = Callable[[Message], object]
_REPORTED = 10  # messages and sessions in the text of a WaitTimeoutError


def _check_wait(count: object, timeout: object, where: object) -> None:
    _check("count", count, _COUNT)
    _check("timeout", timeout, _SECONDS)
    if not (where is None or callable(where)):
        raise ConfigurationError(f"where={where!r}: must be callable")


def _is_in_event_loop() -> bool:
    asyncio: Any = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None


class Server:
    """An SMTP server that runs in threads of this process.

    Options are given by name, as a Configuration, or both; a name takes precedence. An invalid one is a
    ConfigurationError. A logger (a Logger or a logging.Logger) replaces the default one. on_message is called
    with each accepted message in the thread of its session, before the 250 is sent. If it raises, the message is
    refused with msg_msg_failed and the exception goes to the logger or, without one, to threading.excepthook.
    handlers are subclasses of Handler, for verbs of your own or in place of the built-in ones.
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
        self._host, self._port = self._options.host, self._options.port  # set by start(), which runs in one thread only
        self._mailbox = _Mailbox()
        table = _make_handlers(self._options, handlers)
        self._rules = _Rules(self._options.seed, table)
        log = _Log(logger, self._options)
        ends: deque[str] = deque(maxlen=_REPORTED)
        self._context = _Context(  # replaced, never changed
            self._options, table, self._mailbox, log, self._rules, on_message or _ignore, early_ends=ends
        )
        self._explicit = options.keys() | (configuration._given if configuration else set())
        # The messages of which a warning told that something was discarded; two threads may both warn of one.
        self._warned: set[int] = set()
        self._lifecycle = threading.Lock()  # guards changes of _listener; not held while the user's code runs
        self._listener: _Listener | None = None

    def with_logger(self, logger: Any) -> Server:
        """Log to this Logger or logging.Logger from the next start() on; None is the default one."""
        self._context = self._context._replace(log=_Log(logger, self._options))
        return self

    def start(self) -> Server:
        """Listen. Clients can connect when it returns.

        Raises ServerStateError if the server is running, ServerStartError if it cannot listen on the host and port.
        """
        return self._start(lambda host, port: None)

    def _start(self, announce: Callable[[str, int], None]) -> Server:
        """Like start(). Calls announce when clients can connect, and before the first is served."""
        listener = None
        try:
            with self._lifecycle:
                if self._listener is not None:
                    raise ServerStateError(f"{self!r} cannot start: it is running")
                listener = self._listener = _bind(self._context)
            self._host, self._port = self._options.host.strip("[]"), listener.server_address[1]
            listener.server_activate()  # before the announcement, because its reader may connect at once
            announce(self._host, self._port)
            self._context.log("info", f"SMTP mock server started on port: {self._port}")
            listener.open()
        except BaseException as error:
            if listener is not None and not listener.stopping:
                self._discard(listener, 0)
            elif listener is not None and isinstance(error, (OSError, ValueError)):
                return self  # another thread has stopped the server, and closed the socket
            # The bind failed, the host name is invalid, or no thread could be started.
            if isinstance(error, (OSError, ValueError, RuntimeError)) and not isinstance(error, SMTPMockError):
                raise self._explain(error) from error
            raise
        return self

    def _explain(self, error: Exception) -> ServerStartError:
        reason = getattr(error, "strerror", None) or error
        address = _format_address(self._options.host, self._options.port)
        explained = ServerStartError(f"cannot listen on {address}: {reason}")
        explained.errno = getattr(error, "errno", None)
        self._context.log("error", str(explained))
        return explained

    def stop(self) -> None:
        """End all sessions and give up the port. Raises ServerStateError if the server is not running.

        A session that waits for a command gets a 421. One that receives a body or waits out a delay may
        finish that within shutdown_timeout. All are recorded, and no thread or socket is left. An interrupted
        stop() can be called again. In the thread of a session, stop() does not wait for that session to end.
        """
        with self._lifecycle:
            listener = self._listener
            if listener is None:
                raise ServerStateError(f"{self!r} cannot stop: it is not running")
            is_first, listener.stopping = not listener.stopping, True
        if is_first:
            text = "SMTP mock server is in the shutdown mode and won't accept new connections"
            self._context.log("warning", text)
        self._discard(listener, self._options.shutdown_timeout)

    def _discard(self, listener: _Listener, timeout: float) -> None:
        """Close the listener. The first thread that has finished this says so."""
        is_forced = listener.close(timeout)
        with self._lifecycle:
            is_first = is_forced is not None and self._listener is listener
            if is_first:
                self._listener = None
        if is_first and listener.was_opened:
            result = "force stopped by timeout" if is_forced else "stopped successfully"
            self._context.log("info", f"SMTP mock server was {result}")

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
        """As configured; from start() on, the real one, which it keeps after stop()."""
        return self._port

    @property
    def is_running(self) -> bool:
        return self._listener is not None

    def messages(self) -> list[Message]:
        """The recorded messages, oldest first."""
        return self._warn(self._mailbox.messages(purge=False))

    def messages_and_purge(self) -> list[Message]:
        """The recorded messages, oldest first. Exactly what is returned is removed."""
        return self._warn(self._mailbox.messages(purge=True))

    def message(self, where: _Where | None = None, timeout: float = 0.0) -> Message:
        """The one accepted mail for which where(message) is true, waiting timeout seconds for it.

        Raises WaitTimeoutError if there is none or more than one, and whatever where() raises.
        """
        __tracebackhide__ = True  # of pytest
        _check_wait(1, timeout, where)
        _, found = self._mailbox.wait(
            1, timeout, lambda message: message.is_consistent and (where is None or where(message)), purge=False
        )
        if len(found) != 1:
            what = "accepted messages" if where is None else "matching accepted messages"
            raise self._explain_timeout(f"{len(found)} {what} where there should be 1", found)
        return self._warn(found)[0]

    def _warn(self, messages: list[Message]) -> list[Message]:
        """Warn at the line of the caller's caller about what the server accepted and discarded, once per message."""
        import warnings

        if {"multiple_rcptto", "multiple_message_receiving"} <= self._explicit:
            return messages
        for message in messages:
            if message.id not in self._warned:
                self._warned.add(message.id)
                for option, text in message._find_discards():
                    if option not in self._explicit:
                        warnings.warn(f"{text}; {option}=True keeps them all", SMTPMockWarning, stacklevel=3)
        return messages

    def on(
        self,
        stage: str,
        match: _Match = None,
        *,
        times: int | None = None,
        probability: float = 1.0,
        after: int | None = None,
        **unknown: NoReturn,
    ) -> Rule:
        """Make a rule. The methods of the Rule say what it does.

        stage is connect, a verb, message (the end of a body), or * for all. match is an address or a domain
        (at DATA and message, of a recipient), a compiled pattern that is searched in the line, or a function of the
        line; at message, the line is the body. The rule applies `times` times (None is without end), each time with
        this probability, and with `after` when so many bytes of the body have arrived. Rules add up: each aspect
        of a reply comes from the newest rule that sets it. Raises ConfigurationError for an invalid argument.
        """
        if unknown:
            raise ConfigurationError(f"{', '.join(unknown)}: on() takes stage, match, times, probability and after")
        return Rule(self._rules, stage, match, times, probability, after)

    def clear_rules(self) -> None:
        """Remove all rules."""
        self._rules.clear()

    def reset(self) -> None:
        """Remove all messages and all rules, and forget failed callbacks, for the next test."""
        self._rules.clear()
        self._context.log.forget_failures()
        self._mailbox.messages(purge=True)

    def check(self) -> None:
        """Raise AssertionError if a rule was never hit or has no action, or if a callback raised an exception."""
        __tracebackhide__ = True  # of pytest
        faults = self._context.log.forget_failures()
        requests: list[str] | None = None
        for rule in reversed(self._rules.newest_first):
            if not rule._has_action():
                faults.append(f"{rule!r} has no action")
            elif not rule.hits:
                requests = self._list_requests() if requests is None else requests
                faults.append(f"{rule!r} was never hit{rule._find_nearest(requests)}")
        if faults:
            raise AssertionError("\n".join(faults))

    def _list_requests(self) -> list[str]:
        """The commands of the last messages and of the open sessions."""
        listener = self._listener
        connections = [] if listener is None else list(listener.connections.copy())[:_REPORTED]
        dialogues = [message._dialogue[: message._said] for message in self._mailbox.messages(purge=False)[-100:]]
        dialogues += [connection.session.mail.dialogue[:] for connection in connections]
        return [said for dialogue in dialogues for said in dialogue[::2] if isinstance(said, str)]

    def wait_for_messages(self, count: int, timeout: float = 5.0, where: _Where | None = None) -> list[Message]:
        """Wait for count messages for which where(message) is true, and return all of these.

        Raises WaitTimeoutError after timeout seconds, and whatever where() raises.
        """
        __tracebackhide__ = True  # of pytest
        return self._warn(self._wait(count, timeout, where, purge=False))

    def wait_for_messages_and_purge(
        self, count: int, timeout: float = 5.0, where: _Where | None = None
    ) -> list[Message]:
        """Like wait_for_messages(). Exactly what is returned is removed."""
        __tracebackhide__ = True
        return self._warn(self._wait(count, timeout, where, purge=True))

    def _wait(self, count: int, timeout: float, where: _Where | None, *, purge: bool) -> list[Message]:
        __tracebackhide__ = True
        _check_wait(count, timeout, where)
        enough, messages = self._mailbox.wait(count, timeout, where, purge=purge)
        if not enough:
            what = "messages" if where is None else "matching messages"
            text = f"{len(messages)} of {count} {what} came in {timeout:g} seconds"
            raise self._explain_timeout(text, messages)
        return messages

    def _explain_timeout(self, text: str, messages: list[Message]) -> WaitTimeoutError:
        return WaitTimeoutError("\n  ".join([text, *self._report()]), messages)

    def _report(self) -> Iterator[str]:
        """What helps someone whose wait timed out."""
        messages = self._mailbox.messages(purge=False)
        if _is_in_event_loop():
            yield "this wait blocks the asyncio event loop of its thread: use await asyncio.to_thread(...)"
        yield f"{len(messages)} are recorded{':' if messages else ''}"
        if len(messages) > _REPORTED:
            yield "  ..."
        for message in messages[-_REPORTED:]:
            yield f"  {message!r}, subject {message.subject!r}"
        listener = self._listener
        connections = [] if listener is None else list(listener.connections.copy())
        yield f"{len(connections)} sessions are open{':' if connections else ''}"
        for connection in connections[:_REPORTED]:
            session = connection.session
            dialogue = " / ".join(_format_dialogue(session.mail.dialogue[-2:]))
            yield f"  {_format_address(*session.peer)}: {dialogue}"
        ends = self._context.early_ends
        # Without a GIL, an iterator raises RuntimeError if a session appends meanwhile, and the length may be one more.
        for index in range(min(len(ends), _REPORTED)):
            yield f"a connection ended early: {ends[index]}"

    def __repr__(self) -> str:
        state = "" if self._listener else ", not running"
        return f"<smtpmock.Server on {_format_address(self._host, self._port)}{state}>"


# ------------------------------------------------------------------------------------ command line

_LOG = ("log", _FLAG, False, "log to stdout, errors to stderr")
_LOG_OPTIONS = ("log_to_stdout", "log_server_activity")  # one flag sets both
_ABOUT = "An SMTP server for tests: it records the mail it receives, and it fails on request."
_FILE = _Kind("a path", lambda value: isinstance(value, str), str)

_CERTIFICATE = (
    ("tls_cert", _FILE, "", "PEM file with the certificate and its chain; turns on STARTTLS"),
    ("tls_key", _FILE, "", "PEM file with the key, unless the other file has it"),
)

# Where mail goes, for programs that cannot ask a Server for it.
_OUTPUTS = (
    ("json", _FLAG, False, "print each accepted mail, and each session without one, as a line of JSON; log to stderr"),
    ("save_dir", _FILE, "", "folder for each accepted mail as 000001.eml and its record as 000001.json"),
    ("maildir", _FILE, "", "Maildir for each accepted mail"),
)

_QUIET = ("quiet", _FLAG, False, "do not print a line for each mail and each session without one")

_Undo = Callable[[], object]  # what removes a mail from an output again


class _Printer:
    """Prints whole lines to what is stdout now, from any thread. It keeps no line that it could not write."""

    def __init__(self) -> None:
        self._out = sys.stdout
        self._lock = threading.Lock()  # guards the stream
        self._is_torn = False  # whether a part of the last line was written

    def __call__(self, line: str) -> None:
        with self._lock:
            try:
                self._write("\n" * self._is_torn + line + "\n")
                self._is_torn = False
            except (OSError, ValueError, AttributeError) as error:  # full, closed by us, and closed from the start
                reason = getattr(error, "strerror", None) or "it is closed"
                raise SMTPMockError(f"cannot write to stdout: {reason}") from error

    def _write(self, text: str) -> None:
        import io

        self._out.flush()
        raw = getattr(getattr(self._out, "buffer", None), "raw", getattr(self._out, "buffer", None))
        if not isinstance(raw, io.RawIOBase):  # of a test
            self._out.write(text)
            self._out.flush()
            return
        data = text.encode(self._out.encoding, "backslashreplace")
        while data:  # a full disk may take a part
            written = raw.write(data) or 0
            self._is_torn = True
            data = data[written:]

    def json(self, value: object) -> None:
        import json

        self(json.dumps(value))


def _make_folder(path: str) -> None:
    """Make it if it does not exist, and see now whether it can be written to."""
    import tempfile

    os.makedirs(path, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


class _Folder:
    """Saves mails, each in a file of its own with its record beside it. A file is complete, or does not exist."""

    def __init__(self, path: str) -> None:
        _make_folder(path)
        self._path = path
        self._lock = threading.Lock()  # guards the number
        names = [re.match(r"\.?(\d{6,})\.", name) for name in os.listdir(path)]
        self._number = max((int(name[1]) for name in names if name), default=0)

    def __call__(self, message: Message) -> _Undo:
        import json

        mail, record = self._reserve()

        def undo() -> None:
            for name in (mail, self._temporary(mail), record, self._temporary(record)):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self._path, name))

        try:
            self._write(record, json.dumps(message.to_dict(), indent=1).encode())
            self._write(mail, message.as_bytes())  # last: whoever sees it finds the record as well
        except BaseException:
            undo()
            raise
        return undo

    def _temporary(self, name: str) -> str:
        """A name that *.eml and *.json do not match, not even in Python's glob(), which matches hidden files."""
        return f".{name}.part"

    def _reserve(self) -> tuple[str, str]:
        """Names that no other process takes, either."""
        with self._lock:
            while True:
                self._number += 1
                mail, record = f"{self._number:06d}.eml", f"{self._number:06d}.json"
                with contextlib.suppress(FileExistsError):
                    temporary = os.path.join(self._path, self._temporary(mail))
                    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666))
                    if not os.path.exists(os.path.join(self._path, mail)):
                        return mail, record
                    os.unlink(temporary)

    def _write(self, name: str, data: bytes) -> None:
        temporary = os.path.join(self._path, self._temporary(name))
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.join(self._path, name))


def _open_maildir(path: str) -> Callable[[Message], _Undo]:
    import mailbox

    for name in ("tmp", "cur", "new"):
        _make_folder(os.path.join(path, name))
    maildir = mailbox.Maildir(path)
    lock = threading.Lock()  # a Maildir is not made for threads

    def remove(key: str) -> None:
        with lock:
            maildir.discard(key)

    def add(message: Message) -> _Undo:
        with lock:
            return functools.partial(remove, maildir.add(message.as_bytes()))

    return add


def _read(kind: _Kind, text: str) -> Any:
    try:
        return kind.parse(text)
    except (KeyError, ValueError):
        return text  # _check() will say what is wrong with it


_CONDITIONS = {"times": _TIMES, "probability": _PROBABILITY, "after": _COUNT}


def _read_action(name: str, argument: str) -> tuple[str, list[Any]]:
    """The name of a method of Rule, and its arguments."""
    allowed = [action for action in (*_ACTIONS, *_THEN) if action != "then"]
    if name not in allowed:
        raise ConfigurationError(f"{name!r} must be {' or '.join([*allowed, *_CONDITIONS])}")
    if name in _THEN and argument:
        raise ConfigurationError(f"{argument!r} must not follow {name}")
    if name == "reply":
        return name, [text.strip() or None for text in argument.split("|")] if argument else []
    return name, [] if name in _THEN else [_read(_ACTIONS[name], argument)]


def _add_rule(server: Any, text: str) -> None:
    """Read "STAGE [ADDRESS]: ACTION [ARGUMENT]; ...; CONDITION=VALUE; ..."."""
    where, colon, what = (part.strip() for part in text.partition(": "))
    match = re.fullmatch(r"(\S+(?: +(?:FROM|TO))?)(?: +(\S+))?", where, re.IGNORECASE)
    if match is None or not colon:
        raise ConfigurationError(f"rule {text!r}: must be 'STAGE: ACTION' or 'STAGE ADDRESS: ACTION'")
    parts = [re.split(" +| *= *", part.strip(), maxsplit=1) for part in what.split(";") if part.strip()]
    conditions = {name: _read(_CONDITIONS[name], "".join(value)) for name, *value in parts if name in _CONDITIONS}
    try:
        actions = [_read_action(name, "".join(value)) for name, *value in parts if name not in _CONDITIONS]
        if not actions:
            raise ConfigurationError("it has no action")
        rule = server.on(match[1], match[2], **conditions)
        for name, arguments in actions:
            getattr(rule, name)(*arguments)
    except ConfigurationError as error:
        raise ConfigurationError(f"rule {text!r}: {error}") from error


_Outputs = tuple[Callable[[Message], None], Callable[[Message], object]]


def _name_flag(option: str) -> str:
    """As in go-smtp-mock."""
    first, *others = option.split("_")
    return "-" + first + "".join(map(str.title, others))


def _name_flags(text: str) -> str:
    """An error message with flags in place of the options that it is about."""
    names = [field.name for field in dataclasses.fields(Configuration)]
    names += [name for name, *_ in (_LOG, _QUIET, *_CERTIFICATE, *_OUTPUTS)]
    pattern = rf"(^|needs |, |option )({'|'.join(names)})\b(?=[=:]|$)"
    return re.sub(
        pattern, lambda match: match[1] + _name_flag("tls_cert" if match[2] == "ssl_context" else match[2]), text
    )


class _Narrator:
    """Prints a line for each mail and for each session without one."""

    def __init__(self, printer: _Printer, options: dict[str, Any]) -> None:
        self._printer = printer
        self._options = options
        self._warned: set[str] = set()  # options that keep what was discarded; at worst, two sessions tell of one
        self._colours = "NO_COLOR" not in os.environ and hasattr(sys.stdout, "isatty") and sys.stdout.isatty()

    def __call__(self, message: Message) -> None:
        with contextlib.suppress(SMTPMockError, OSError):  # that nobody reads this is no reason to refuse the mail
            word, colour, text = "ended", 0, "without a mail"
            if message.msg:
                word, colour, text = "accepted", 32, self._describe(message)
            elif message.refusals:
                word, colour, text = "refused", 31, message.refusals[0][1]
            word = f"\x1b[{colour}m{word}\x1b[0m" if self._colours else word
            self._printer(f"{time.strftime('%H:%M:%S')} {word} {_printable(text)}")
            for option, discarded in message._find_discards():
                if option not in self._options and option not in self._warned:
                    self._warned.add(option)
                    print(f"smtpmock: {discarded}; {_name_flag(option)} keeps them all", file=sys.stderr, flush=True)

    def _describe(self, message: Message) -> str:
        size = len(message.content)
        names = ", ".join(message.rcpt_tos)
        return f'{message.mail_from or "<>"} -> {names} "{message.subject or ""}" {size / 1000:.1f} kB'


def _open_outputs(
    printer: _Printer,
    narrate: Callable[[Message], None] | None,
    json: bool = False,
    save_dir: str = "",
    maildir: str = "",
) -> _Outputs:
    """What to call with each accepted message, and with each other one."""
    outputs: list[Callable[[Message], _Undo | None]] = []
    for path, open_output in ((save_dir, _Folder), (maildir, _open_maildir)):
        try:
            outputs += [open_output(path)] if path else []
        except OSError as error:
            raise SMTPMockError(f"cannot write to {path}: {error.strerror}") from error

    def on_message(message: Message) -> None:
        try:
            with contextlib.ExitStack() as undo:  # a mail that one output cannot take is in none
                for output in outputs:
                    undo.callback(output(message) or (lambda: None))
                if json:
                    printer.json(message.to_dict())
                undo.pop_all()
        except OSError as error:
            raise SMTPMockError(f"a mail was refused, because it cannot be saved: {error}") from error
        if narrate is not None:
            narrate(message)

    return on_message, (lambda message: printer.json(message.to_dict())) if json else narrate or _ignore


def _add_flag(parser: Any, name: str, kind: _Kind, default: Any, about: str) -> None:
    parser.add_argument(
        _name_flag(name),
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

    parser = Parser("smtpmock", description=_ABOUT, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="print this and exit")
    parser.add_argument("-v", "--version", action="store_true", help="print the version and exit")
    for flag in (_LOG, _QUIET, *_CERTIFICATE, *_OUTPUTS):
        _add_flag(parser, *flag)
    about = "make the server fail, as in 'RCPT bob@example.com: reply 550 No such user; times=2'; can be repeated"
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
    for name, kind, *_ in (_LOG, _QUIET, *_OUTPUTS):
        if name in given:
            _check(name, given[name], kind)
    if "log" in given:
        given.update(dict.fromkeys(_LOG_OPTIONS, given.pop("log")))
    certificate, key = given.pop("tls_cert", ""), given.pop("tls_key", "")
    if certificate or key:
        given["ssl_context"] = _load_certificate(certificate, key)
    return given


def _run_until_signalled(server: Server, announce: Callable[[str, int], None], *, owns_process: bool) -> None:
    """Start the server, and stop it at the first signal; a second one aborts the sessions."""
    import signal

    def stop() -> None:
        server.stop()
        waker.send(b"\0")

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGQUIT") if hasattr(signal, name)]
    wakened, waker = socket.socketpair()
    with wakened, waker:
        waker.setblocking(False)
        wakened.settimeout(None)  # whatever socket.setdefaulttimeout() says
        # Python writes the number of each signal there, whichever thread receives it.
        previous_waker = signal.set_wakeup_fd(waker.fileno())
        previous = [signal.signal(number, lambda *_: None) for number in numbers]
        if owns_process:  # when it ends, a late signal must not change its exit status
            previous = [signal.SIG_IGN for _ in numbers]
        try:
            server._start(announce)
            listener = server._listener
            wakened.recv(1)
            stopper = threading.Thread(target=stop)
            stopper.start()
            if wakened.recv(1) != b"\0" and listener is not None:
                listener.abort()
            stopper.join()
        finally:
            with contextlib.suppress(ServerStateError):  # after an exception, it may still run
                server.stop()
            signal.set_wakeup_fd(previous_waker)
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)


def _serve(server: Server, options: dict[str, Any], *, owns_process: bool, quiet: bool, **outputs: Any) -> None:
    """Run the server until a signal comes."""
    printer = _Printer()
    is_narrated = not (quiet or options.get("log_to_stdout") or outputs.get("json"))
    on_message, on_unaccepted = _open_outputs(printer, _Narrator(printer, options) if is_narrated else None, **outputs)
    server._context = server._context._replace(on_message=on_message, on_unaccepted=on_unaccepted)

    def announce(host: str, port: int) -> None:
        if outputs.get("json"):
            printer.json({"listening": {"host": host, "port": port}})
        else:
            printer(f"smtpmock: listening on {_format_address(host, port)}")

    # With JSON, what the server logs goes to stderr.
    with contextlib.redirect_stdout(sys.stderr if outputs.get("json") else sys.stdout):
        _run_until_signalled(server, announce, owns_process=owns_process)


def _run_command(options: dict[str, Any], parser: Any, *, owns_process: bool) -> None:
    asks_help, asks_version = options.pop("help"), options.pop("version")
    if asks_version:
        _Printer()(f"smtpmock: {__version__}\npython: {sys.version}")
        return
    if asks_help:
        _Printer()(parser.format_help().rstrip())
        return
    outputs = {name: options.pop(name) for name, *_ in _OUTPUTS if name in options}
    rules, quiet = options.pop("rules", ()), options.pop("quiet", False)
    server = Server(**options)
    for rule in rules:
        _add_rule(server, rule)
    _serve(server, options, owns_process=owns_process, quiet=quiet, **outputs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, or that of the process if argv is None. Returns the exit status."""
    parser = _make_parser()
    try:
        options = _parse_arguments(parser, sys.argv[1:] if argv is None else argv)
        _run_command(options, parser, owns_process=argv is None)
    except SMTPMockError as error:
        with contextlib.suppress(OSError, AttributeError):
            sys.stderr.write(f"smtpmock: {_printable(_name_flags(str(error)))}\n")
        return 2 if isinstance(error, ConfigurationError) else 1
    finally:
        if argv is None:
            _flush_stdout()
    return 0


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except AttributeError:  # it was closed before Python started
        pass
    except OSError:  # at exit, Python would try again and print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
