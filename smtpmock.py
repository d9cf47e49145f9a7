"""An SMTP server for tests: it records the mail it receives, and it fails on request.

    with smtpmock.Server() as server, smtplib.SMTP(server.host, server.port) as client:
        client.sendmail("alice@example.com", ["bob@example.com"], "Subject: Hi\\r\\n\\r\\nHello")
        message = server.message()
        assert message.mail_from == "alice@example.com"
        assert message.content == b"Subject: Hi\\r\\n\\r\\nHello\\r\\n"

One module, standard library only, one thread per connection. It reads from top to bottom:

    errors          the exceptions, each a subclass of the built-in one that it resembles
    options         Configuration: every option with its default and its meaning
    grammar         the verbs, the patterns of RFC 5321, and the parsers of command lines
    dialogue        requests, replies, and exchanges of a request and its reply
    mail            how a mail is read: its charsets, encodings, headers and parts
    violations      what a client can do wrong: the checks, each with its RFC
    records         what the server records of a session
    rules           when the server deviates from its normal replies, and how
    transcripts     what the server of a transcript said, to be said again
    handlers        how a command is processed, and one class per command
    session         one SMTP conversation, without a socket
    mailbox         the list of recorded messages
    logger          the Logger protocol and the default logger
    server          the connection, the listener, and Server, which owns the listener
    pytest          the plugin
    http            what -http serves: the commands, the messages as JSON, and pages for people
    command line    python -m smtpmock

PYTEST_DONT_REWRITE: otherwise pytest warns if a test imports this module before the plugin.

MIT licence, https://opensource.org/licenses/MIT. Copyright 2026 the smtpmock authors.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import operator
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
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, NoReturn, Protocol, TypeVar

if TYPE_CHECKING:
    import datetime
    import logging
    import ssl
    from email.message import EmailMessage
    from typing import Concatenate, Literal, ParamSpec

    from typing_extensions import dataclass_transform as _dataclass_transform  # pyright: ignore

    _P = ParamSpec("_P")
else:

    def _dataclass_transform(**options: bool) -> Callable[[type], type]:  # only type checkers need it
        return lambda cls: cls


__version__ = "3.0.0"

__all__ = ["Action", "Attachment", "Configuration", "ConfigurationError", "Exchange", "Handler", "Logger", "Message"]
__all__ += ["Rule", "SMTPMockError", "SMTPMockWarning", "Server", "ServerStartError", "ServerStateError", "Violation"]
__all__ += ["WaitTimeoutError", "main"]


# ------------------------------------------------------------------------------------------ errors


class SMTPMockError(Exception):
    """The base of every error that smtpmock raises."""


class _OutputError(SMTPMockError):
    """An output of the command line cannot store or print a mail or an event."""


class ConfigurationError(SMTPMockError, ValueError):
    """An invalid option or argument. The text gives its name, its value, and what is allowed.

    `option` is its name. `needed` is the option that it requires. Either is "" if there is none.
    """

    def __init__(self, text: str, option: str = "", *values: object, needed: str = "") -> None:
        start = option + "".join(f"={value!r}" for value in values)
        super().__init__(f"{start}: {text}{needed}" if option else text)
        self.option = option
        self.needed = needed


class ServerStateError(SMTPMockError, RuntimeError):
    """start() on a running server, stop() on a stopped one, `port` before the first start, and client_context() without
    a certificate for tests."""


class ServerStartError(SMTPMockError, OSError):
    """The server cannot listen on its host and port. `errno` comes from the operating system, if it gave one."""


class WaitTimeoutError(SMTPMockError, TimeoutError):
    """Too few messages arrived in time. `messages` has those that did arrive; none was purged."""

    def __init__(self, text: str, messages: Sequence[Message] = ()) -> None:
        super().__init__(text)
        self.messages = list(messages)


class SMTPMockWarning(UserWarning):
    """The configuration makes the server discard recipients or mails that it accepted, or log to nowhere."""


# ----------------------------------------------------------------------------------------- options


class _OptionType(NamedTuple):
    """The type of an option."""

    allowed: str  # completes the sentence "must be ..." of an error message
    accepts: Callable[[Any], bool]
    parse: Callable[[str], Any] = str  # reads the text of a flag; may raise KeyError or ValueError
    normalise: Callable[[Any], Any] = lambda value: value  # done once, because every command reads the options


def _number(least: float, most: float, *types: type[float]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types) and not isinstance(value, bool) and least <= value <= most


def _is_text(value: object) -> bool:
    """Whether this is a str that can be sent. A lone surrogate has no encoding."""
    return isinstance(value, str) and (value.isascii() or re.search("[\ud800-\udfff]", value) is None)


def _are_names(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


def _fold(name: str) -> str:
    """Normalise a domain or an address for comparison: local parts are case-sensitive, domains are not."""
    local, at, domain = name.rpartition("@")
    return local + at + domain.lower()


# poll() takes at most 2**31 milliseconds, which is 24 days.
_SECONDS = _OptionType("a number of seconds from 0 to 1000000", _number(0, 1e6, int, float), float)
_TIMEOUT = _OptionType("a number of seconds from 0.001 to 1000000", _number(1e-3, 1e6, int, float), float)
_HOST_NAME = _OptionType("a host name or an address", lambda value: _is_text(value) and bool(value.strip()))
_PORT = _OptionType("an integer from 0 to 65535", _number(0, 65535, int), int)
_COUNT = _OptionType("an integer from 0 up", _number(0, float("inf"), int), int)
_SEED = _OptionType("an integer", _number(float("-inf"), float("inf"), int), int)
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_FLAG = _OptionType("true or false", lambda value: isinstance(value, bool), lambda text: _FLAGS[text.lower()])
_TEXT = _OptionType("a string without lone surrogates", _is_text)
_NAMES = _OptionType(
    "a list of strings",
    _are_names,
    lambda text: [name.strip() for name in text.split(",") if name.strip()],
    lambda names: frozenset(map(_fold, names)),
)
_WORDS = _OptionType("a list of words", lambda it: _are_names(it) and all(map(str.split, it)), _NAMES.parse, tuple)
_TEST_CONTEXTS = "test", "expired", "wrong host"
_CONTEXT = _OptionType(
    "an ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) with a certificate, or 'test', 'expired' or 'wrong host'",
    lambda value: value in _TEST_CONTEXTS or (hasattr(value, "wrap_socket") and value.check_hostname is not True),
)
_HANDLERS = _OptionType("a list of subclasses of Handler", lambda value: isinstance(value, Iterable), normalise=tuple)
_CALLABLE = _OptionType(
    "a function that is not async",
    lambda value: (
        callable(value) and not getattr(getattr(value, "__code__", None), "co_flags", 0) & 0x80
    ),  # CO_COROUTINE
)
_LOGGER = _OptionType(
    "a logger with methods info(), warning() and error()",
    lambda value: all(callable(getattr(value, name, None)) for name in ("info", "warning", "error")),
)
_USERS = _OptionType(
    "a mapping of users to secrets (user:secret,...), a function of the mechanism, user and secret, or * for anybody",
    lambda who: who == "*" or callable(who) or (isinstance(who, Mapping) and _are_names([*who, *who.values()])),
    lambda text: text if text == "*" else dict(pair.split(":", 1) for pair in _NAMES.parse(text)),
)


def _check(name: str, value: object, kind: _OptionType) -> None:
    if not kind.accepts(value):
        raise ConfigurationError(f"must be {kind.allowed}", name, *([value] if kind is not _USERS else []))  # secrets


def _read(kind: _OptionType, text: str) -> Any:
    try:
        return kind.parse(text)
    except (KeyError, ValueError):
        return text  # _check() says what is wrong with it


def _suggest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def _find_other_name(name: str, others: Mapping[str, str]) -> str:
    """The end of a message that names what other tools call this."""
    found = [ours for ours, theirs in others.items() if name in theirs.split()]
    return f"; did you mean {found[0]}?" if found else ""


class _Option(NamedTuple):
    default: Any
    kind: _OptionType
    about: str


_option: Callable[[Any, _OptionType, str], Any] = _Option  # type checkers take what it returns for the default


def _reply(default: str, to: str) -> Any:
    return _option(default, _TEXT, f"reply to {to}")


_RECEIVED = "250 Received"
_UNAVAILABLE = "421 Service not available"
_BAD = "503 Bad sequence of commands."
_UNRECOGNIZED = "502 Command unrecognized. Available commands: HELO, EHLO, MAIL FROM:, RCPT TO:, DATA, RSET, NOOP, QUIT"
_EXTENSIONS = "SIZE 8BITMIME SMTPUTF8 PIPELINING DSN CHUNKING BINARYMIME ENHANCEDSTATUSCODES DELIVERBY REQUIRETLS"
_EXTENSIONS += " LIMITS ETRN VRFY EXPN HELP TURN BURL MT-PRIORITY FUTURERELEASE NO-SOLICITING"
_AUTH_MECHANISMS = ("PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2")

# What real servers answer: options, as patterns that leave out msg_, invalid_cmd_ and _received, with their values.
# The first three are Debian's servers, see .ci/profiles.py. The others are quoted from the sources after their names,
# which are on GitHub unless they have a domain.
_PROFILES = r"""
== postfix
extensions PIPELINING,SIZE,VRFY,ETRN,ENHANCEDSTATUSCODES,8BITMIME,DSN,SMTPUTF8,CHUNKING | vrfy 252 2.0.0 {address}
mailfrom_blacklisted 554 5.7.1 <{address}>: Sender address rejected: Access denied
rcptto_blacklisted 554 5.7.1 <{address}>: Recipient address rejected: Access denied | helo_arg 501 Syntax: HELO hostname
rcptto_not_registered 550 5.1.1 <{address}>: Recipient address rejected: User unknown in local recipient table
helo_blacklisted 554 5.7.1 <{address}>: Helo command rejected: Access denied | rset|noop|rset_sequence|bdat 250 2.0.0 Ok
auth_(failed|bad_response|unknown_mechanism) 535 5.7.8 Error: authentication failed | size_limit 10240000
(helo|mailfrom)_sequence 503 5.5.1 Error: send HELO/EHLO first | starttls_sequence 554 5.5.1 Error: TLS already active
invalid_cmd 500 5.5.2 Error: command not recognized | tls_required 530 5.7.0 Must issue a STARTTLS command first
msg_size_is_too_big 552 5.3.4 Message size exceeds fixed limit | auth_sequence 503 5.5.1 Error: already authenticated
rcptto_sequence 503 5.5.1 Error: need MAIL command | unknown_parameter 555 5.5.4 Unsupported option | quit 221 2.0.0 Bye
auth_cancelled 501 5.7.0 Authentication aborted | mailfrom_arg 501 5.1.7 Bad sender address syntax | rcptto 250 2.1.5 Ok
rcptto_arg 501 5.1.3 Bad recipient address syntax | data 354 End data with <CR><LF>.<CR><LF> | helo 250 mail.example.com
msg 250 2.0.0 Ok: queued as 4B1C62E3F8 | starttls_arg 501 5.5.4 Syntax: STARTTLS | starttls 220 2.0.0 Ready to start TLS
data_sequence 503 5.5.1 Error: need RCPT command | bdat_arg 521 5.5.4 Syntax: BDAT count [LAST] | mailfrom 250 2.1.0 Ok
greeting 220 mail.example.com ESMTP Postfix | auth 235 2.7.0 Authentication successful | rset_arg 501 5.5.4 Syntax: RSET
== exim
extensions SIZE,8BITMIME,DSN,PIPELINING,PIPECONNECT,CHUNKING,SMTPUTF8,HELP | bdat_arg 501 missing size for BDAT command
starttls_sequence 503 STARTTLS command used when not advertised | data_sequence 503 valid RCPT command must precede DATA
msg_size_is_too_big 552 Message size exceeds maximum permitted | (mailfrom|rcptto)_arg 501 '>' missing at end of address
auth_unknown_mechanism 504 authentication mechanism not supported | helo_arg 501 Syntactically invalid HELO argument(s)
data 354 Enter message, ending with "." on a line by itself | helo 250 mail.example.com Hello {address} [127.0.0.1]
\w+_blacklisted 550 Administrative prohibition | (rset|starttls)_arg 501 unexpected argument data | noop|mailfrom 250 OK
auth_sequence 503 already authenticated | rcptto_not_registered 550 Unrouteable address | msg 250 OK id=1xY6cB-0007jY-2R
auth_failed 535 Incorrect authentication data | quit 221 mail.example.com closing connection | starttls 220 TLS go ahead
(helo|mailfrom)_sequence 503 HELO or EHLO required | greeting 220 mail.example.com ESMTP Exim 4.96 | size_limit 52428800
rcptto_sequence 503 sender not yet given | auth_bad_response 501 Invalid base64 data | rset|rset_sequence 250 Reset OK
invalid_cmd 500 unrecognized command | unknown_parameter 501 malformed address | bdat 250 chunk received
rcptto 250 Accepted
== opensmtpd
msg_size_is_too_big 554 5.3.4 Message too big for system: Transaction failed, message too big | size_limit 36700160
rset_arg 500 5.5.4 Invalid command arguments: command does not accept arguments. | starttls 220 2.0.0 Ready to start TLS
\w+_sequence 503 5.5.1 Invalid command: Command not allowed at this point. | help 214 2.0.0 End of HELP info
helo 250 mail.example.com Hello {address} [127.0.0.1], pleased to meet you | noop|mailfrom 250 2.0.0 Ok
unknown_parameter 503 5.5.4 Invalid command arguments: Unsupported option | rset 250 2.0.0 Reset state
starttls_arg 501 5.5.4 Invalid command arguments: No parameters allowed | greeting 220 mail.example.com ESMTP OpenSMTPD
rcptto_(not_registered|blacklisted) 550 Invalid recipient: <{address}> | quit 221 2.0.0 Bye
helo_arg 501 5.5.1 Invalid command: HELO requires domain name | rcptto 250 2.1.5 Destination address valid: Recipient ok
invalid_cmd 500 5.5.1 Invalid command: Command unrecognized | extensions 8BITMIME,ENHANCEDSTATUSCODES,SIZE,DSN,HELP
data 354 Enter mail, end with "." on a line by itself | msg 250 2.0.0 94c306d8 Message accepted for delivery
rcptto_arg 501 5.1.3 Recipient address syntax error | mailfrom_arg 553 5.1.0 Sender address syntax error
== gmail: PHPMailer/PHPMailer#1076, The-Login/SMTP-Smuggling-Tools#11, MISP/MISP#6481, pastebin.com/uXqSaYa4,
# pastebin.com/FbfKGUtT, stackoverflow.com/questions/386083, sendgrid.com/docs/for-developers/sending-email
auth_required 530-5.7.0 Authentication Required. Learn more at\n530 5.7.0 https://support.google.com/mail/ - gsmtp
rcptto_not_registered 550-5.1.1 The email account that you tried to reach does not exist. Please try\n550-5.1.1 \
double-checking the recipient's email address for typos or\n550 5.1.1 unnecessary spaces. Learn more at - gsmtp
auth_failed 535-5.7.8 Username and Password not accepted. Learn more at\n535 5.7.8 https://support.google.com/mail
extensions SIZE,8BITMIME,ENHANCEDSTATUSCODES,PIPELINING,CHUNKING,SMTPUTF8 | greeting 220 smtp.gmail.com ESMTP - gsmtp
helo 250 smtp.gmail.com at your service, [127.0.0.1] | starttls 220 2.0.0 Ready to start TLS | data 354 Go ahead - gsmtp
tls_required 530 5.7.0 Must issue a STARTTLS command first | mailfrom 250 2.1.0 OK - gsmtp | rcptto 250 2.1.5 OK - gsmtp
msg 250 2.0.0 OK 1376 - gsmtp | quit 221 2.0.0 closing connection - gsmtp | auth_mechanisms LOGIN,PLAIN,XOAUTH2
size_limit 35882577
== outlook: PHPMailer/PHPMailer#2194, ietf-tools/datatracker#5888, python/cpython#115251, pastebin.com/4NLVeuUu,
# nodemailer/nodemailer#1484, tarickb/sasl-xoauth2#96, learn.microsoft.com/exchange/mail-flow/test-smtp-with-telnet
greeting 220 HK0PR01CA0063.outlook.office365.com Microsoft ESMTP MAIL Service ready at Sun, 15 Nov 2020 13:08:20 +0000
rcptto_not_registered 550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient not found by SMTP address lookup
auth_failed 535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled for the Tenant.
msg 250 2.6.0 <5c6d1a2b@HK0PR01CA0063.apcprd01.prod.outlook.com> Queued mail for delivery | mailfrom 250 2.1.0 Sender OK
extensions SIZE,PIPELINING,DSN,ENHANCEDSTATUSCODES,8BITMIME,BINARYMIME,CHUNKING,SMTPUTF8 | rcptto 250 2.1.5 Recipient OK
auth_required 530 5.7.57 Client not authenticated to send mail. | quit 221 2.0.0 Service closing transmission channel
helo 250 HK0PR01CA0063.outlook.office365.com Hello [127.0.0.1] | data 354 Start mail input; end with <CRLF>.<CRLF>
starttls 220 2.0.0 SMTP server ready | size_limit 157286400
== ses: mautic/mautic#3704, pastebin.com/t22G4F69, repost.aws/knowledge-center/ses-554-400-message-rejected-error,
# aws.amazon.com/blogs/messaging-and-targeting/debugging-smtp-conversations-part-1-how-to-speak-smtp
greeting 220 email-smtp.amazonaws.com ESMTP SimpleEmailService-1868680137 rgpk5uMlEb7VBtpdVluX | mailfrom|rcptto 250 Ok
msg 250 Ok 0000012345678e09-123a4cdc-b56c-78dd-b90e-d123be456789-000000 | data 354 End data with <CR><LF>.<CR><LF>
rcptto_not_registered 554 Message rejected: Email address is not verified. | auth_mechanisms PLAIN,LOGIN | quit 221 Bye
auth_failed 535 Authentication Credentials Invalid | auth 235 Authentication successful. | extensions 8BITMIME,SIZE,Ok
helo 250 email-smtp.amazonaws.com
"""

# Options that require another one.
_NEEDED = {"auth_required": "auth_users", "implicit_tls": "ssl_context", "tls_required": "ssl_context"}
_NEEDED |= {"auth_requires_tls": "ssl_context"}

# Options of other tools, and the names of ours.
_OTHER_NAMES = {
    "host": "hostname host_name host_address addr address bind",
    "port": "port_number smtp_port",
    "log_to_stdout": "log logging debug verbose",
    "ssl_context": "tls_context sslcontext ssl tls cert certfile tls_cert use_tls use_starttls starttls",
    "implicit_tls": "use_ssl ssl_only smtps",
    "tls_required": "require_tls require_starttls starttls_required enforce_tls",
    "auth_required": "enforce_auth require_auth",
    "auth_users": "auth authenticator user users username password credentials login login_username login_password",
    "msg_size_limit": "data_size_limit max_size max_message_size size_limit",
    "extensions": "enable_smtputf8 smtputf8 decode_data esmtp",
    "session_timeout": "timeout command_timeout",
    "on_message": "callback handler handle_data process_message sink",
    "msg_greeting": "greeting banner ident",
    "configure() or a Configuration": "config settings options",
}

_T = TypeVar("_T")


@functools.cache
def _make_dataclass(cls: Any) -> Any:
    import dataclasses
    import inspect

    types = {name: text for base in reversed(cls.__mro__) for name, text in inspect.get_annotations(base).items()}
    fields = []
    for name, (default, _, about) in cls._declared.items():
        is_keyword = name not in cls._positional
        field = dataclasses.field(default=default, kw_only=is_keyword, metadata={"about": about})
        fields.append((name, types[name], field))
    made: Any = dataclasses.make_dataclass(cls.__name__, fields, frozen=True)
    made.__signature__ = inspect.signature(made)
    return made


class _DataclassAttribute:
    """An attribute of a dataclass. It is made when it is first used, because dataclasses is slow to import."""

    def __init__(self, options: Any = None) -> None:
        self._options = options

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: Any) -> Any:
        if self._name == "__signature__" and owner.__init__.__module__ != __name__:
            return None  # then inspect uses the __init__ of the subclass
        return getattr(_make_dataclass(self._options or owner), self._name)


@_dataclass_transform(kw_only_default=True, frozen_default=True)
class _Options:
    """The base of classes with options. An instance stores the options that were given, the class the defaults."""

    _declared: ClassVar[dict[str, _Option]] = {}
    _positional: ClassVar[tuple[str, ...]] = ()
    _other_names: ClassVar[Mapping[str, str]] = {}
    __dataclass_fields__: ClassVar[Any] = _DataclassAttribute()
    __dataclass_params__: ClassVar[Any] = _DataclassAttribute()
    __match_args__: ClassVar[Any] = _DataclassAttribute()
    __signature__: ClassVar[Any] = _DataclassAttribute()

    def __init_subclass__(cls, kw_only: bool = True) -> None:
        own = {name: option for name, option in vars(cls).items() if isinstance(option, _Option)}
        for name, option in own.items():
            setattr(cls, name, option.default)
        inherited = [getattr(base, "_declared", {}) for base in reversed(cls.__bases__)]
        cls._declared = {name: option for options in (*inherited, own) for name, option in options.items()}
        if not kw_only:
            cls._positional = tuple(own)
        about = [f"{name}: {option.about}" for name, option in cls._declared.items()]
        cls.__doc__ = "\n    ".join([cls.__doc__ or "", *about])

    def __init__(self, *values: Any, **options: Any) -> None:
        for name, value in options.items():
            if name not in self._declared:
                known = list(self._declared)
                others = "" if len(known) > 9 else f"; there are {', '.join(known)}"
                snake = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()
                hint = _find_other_name(snake, self._other_names) or _suggest(snake, known) or others
                raise ConfigurationError(f"there is no such option{hint}", name, value)
        positional = self._positional[: len(values)]
        if len(values) > len(positional) or not options.keys().isdisjoint(positional):
            raise TypeError(f"{type(self).__name__}() has too many positional arguments: {values!r}")
        for name, value in (dict(zip(positional, values, strict=True)) | options).items():
            default, kind, _ = self._declared[name]
            if value is not default:
                _check(name, value, kind)
            vars(self)[name] = default if value is default else kind.normalise(value)
        self.__post_init__()

    def __post_init__(self) -> None: ...

    def __setattr__(self, name: str, value: object = None) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"{type(self).__name__}.{name} cannot be changed")

    __delattr__ = __setattr__

    def _replace(self: _T, **changes: Any) -> _T:
        return type(self)(**{**vars(self), **changes})

    __replace__ = _replace  # of copy.replace()

    def _find_changes(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        values = ((name, getattr(self, name), option.default) for name, option in self._declared.items())
        return {name: value for name, value, default in values if value != default}

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and self._find_changes() == other._find_changes()

    def __hash__(self) -> int:
        return hash(tuple(self._find_changes()))  # only the names, because a value may not be hashable

    def __repr__(self) -> str:
        changes = ", ".join(f"{name}={value!r}" for name, value in self._find_changes().items())
        return f"{type(self).__name__}({changes})"


def _shows_options(of: Callable[_P, Any]) -> Callable[[Callable[..., _T]], Callable[Concatenate[Any, _P], _T]]:
    """Make type checkers see the options of this class as the parameters of a method."""
    return lambda method: method


def _check_choices(option: str, names: Iterable[str], known: Collection[str], fold: Callable[[str], str] = str) -> None:
    for name in names:
        if fold(name) not in known:
            others = "" if len(known) > 9 else f"; there are {', '.join(known)}"
            raise ConfigurationError(f"{name!r} is unknown{_suggest(fold(name), known) or others}", option)


class _AddressOptions(_Options):
    """The options that configure() cannot change."""

    host: str = _option("127.0.0.1", _HOST_NAME, "host name or address to listen on; [::] means all addresses")
    port: int = _option(0, _PORT, "port to listen on; 0 takes a free one")


class _SessionOptions(_Options):
    """The options that configure() can change."""

    _other_names = _OTHER_NAMES

    log_to_stdout: bool = _option(False, _FLAG, "log to stdout, and errors to stderr")
    log_server_activity: bool = _option(False, _FLAG, "include sessions, requests and replies in the log")
    session_timeout: float = _option(30, _TIMEOUT, "seconds of silence after which a session is closed")
    shutdown_timeout: float = _option(1, _SECONDS, "seconds that busy sessions have to finish when the server stops")
    fail_fast: bool = _option(False, _FLAG, "close a session after its first refused command")
    keep_all: bool = _option(False, _FLAG, "turn on the next two options, unless you set them")
    multiple_rcptto: bool = _option(False, _FLAG, "keep all recipients of a message, not only the last")
    multiple_message_receiving: bool = _option(False, _FLAG, "keep all messages of a session, not only the last")
    blacklisted_helo_domains: Collection[str] = _option(frozenset(), _NAMES, "domains that HELO and EHLO refuse")
    blacklisted_mailfrom_emails: Collection[str] = _option(frozenset(), _NAMES, "addresses that MAIL FROM refuses")
    blacklisted_rcptto_emails: Collection[str] = _option(frozenset(), _NAMES, "addresses that RCPT TO refuses")
    not_registered_emails: Collection[str] = _option(frozenset(), _NAMES, "addresses that RCPT TO refuses as unknown")
    lenient_addresses: bool = _option(False, _FLAG, "also accept names such as root or a@srv_1.example.com")
    response_delay_helo: float = _option(0, _SECONDS, "seconds before the reply to HELO and EHLO")
    response_delay_mailfrom: float = _option(0, _SECONDS, "seconds before the reply to MAIL FROM")
    response_delay_rcptto: float = _option(0, _SECONDS, "seconds before the reply to RCPT TO")
    response_delay_data: float = _option(0, _SECONDS, "seconds before the reply to DATA and BDAT")
    response_delay_message: float = _option(0, _SECONDS, "seconds before the reply to the message body")
    response_delay_rset: float = _option(0, _SECONDS, "seconds before the reply to RSET")
    response_delay_noop: float = _option(0, _SECONDS, "seconds before the reply to NOOP")
    response_delay_quit: float = _option(0, _SECONDS, "seconds before the reply to QUIT")
    profile: str | None = _option(None, _TEXT, "texts of postfix, exim, opensmtpd, gmail, outlook, ses")
    tolerated: Collection[str] = _option((), _WORDS, "codes of violations and warnings that are not reported")
    strict: bool = _option(False, _FLAG, "refuse mails that have violations")
    seed: int | None = _option(None, _SEED, "number that makes rules with a probability repeatable")
    extensions: Collection[str] = _option((), _WORDS, "ESMTP extensions to announce and accept: SIZE, DSN, CHUNKING...")
    auth_users: Mapping[str, str] | Callable[[str, str, str], object] | Literal["*"] | None = _option(
        None, _USERS, "who can log in, as user:secret,... or * for anybody; no AUTH without it"
    )
    auth_mechanisms: Collection[str] = _option(_AUTH_MECHANISMS, _WORDS, "AUTH mechanisms to announce and accept")
    auth_required: bool = _option(False, _FLAG, "refuse MAIL, RCPT and DATA until the client logs in")
    auth_requires_tls: bool = _option(False, _FLAG, "neither announce nor accept AUTH without TLS")
    ssl_context: ssl.SSLContext | Literal["test", "expired", "wrong host"] | None = _option(
        None, _CONTEXT, "ssl.SSLContext with a certificate, or the name of one for tests; no TLS without it"
    )
    implicit_tls: bool = _option(False, _FLAG, "begin each session with TLS, as on port 465; no STARTTLS then")
    tls_required: bool = _option(False, _FLAG, "refuse all commands but EHLO, NOOP and QUIT until STARTTLS")
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
    msg_violation: str = _reply("550 5.6.0 {violation}", "a mail that has violations, with strict")
    msg_msg_failed: str = _reply("451 Local error in processing", "a command on which your code failed")
    msg_invalid_cmd_rset_sequence: str = _reply(f"{_BAD} HELO should be the first", "an early RSET")
    msg_invalid_cmd_rset_arg: str = _reply(_UNRECOGNIZED, "RSET with an argument")
    msg_rset_received: str = _reply("250 Ok", "RSET")
    msg_noop_received: str = _reply("250 Ok", "NOOP")
    msg_quit_cmd: str = _reply("221 Closing connection", "QUIT")
    msg_vrfy_received: str = _reply("252 Cannot VRFY user, but will accept message", "VRFY")
    msg_expn_received: str = _reply("252 Cannot EXPN list, but will accept message", "EXPN")
    msg_help_received: str = _reply("214 HELO, EHLO, MAIL FROM:, RCPT TO:, DATA, RSET, NOOP, QUIT", "HELP")
    msg_unknown_parameter: str = _reply("555 Parameter not recognized or not implemented", "a bad parameter")
    msg_bdat_received: str = _reply(_RECEIVED, "BDAT without LAST")
    msg_invalid_cmd_bdat_arg: str = _reply("501 BDAT requires a size in bytes", "a bad BDAT")
    msg_auth_received: str = _reply("235 Authentication succeeded", "AUTH")
    msg_auth_failed: str = _reply("535 Authentication credentials invalid", "AUTH with a wrong user or secret")
    msg_auth_cancelled: str = _reply("501 Authentication cancelled", "* instead of an answer to a challenge")
    msg_auth_bad_response: str = _reply("501 Cannot decode response", "an answer that cannot be decoded")
    msg_auth_unknown_mechanism: str = _reply("504 Unrecognized authentication type", "AUTH with an unknown mechanism")
    msg_auth_sequence: str = _reply(
        f"{_BAD} AUTH should be used once, after EHLO and before MAIL FROM", "a misplaced AUTH"
    )
    msg_auth_required: str = _reply("530 Authentication required", "MAIL, RCPT or DATA before AUTH, with auth_required")
    msg_auth_tls_required: str = _reply("538 Encryption required for authentication", "AUTH, with auth_requires_tls")
    msg_starttls_received: str = _reply("220 Ready to start TLS", "STARTTLS")
    msg_invalid_cmd_starttls_arg: str = _reply("501 STARTTLS takes no argument", "STARTTLS with an argument")
    msg_invalid_cmd_starttls_sequence: str = _reply(f"{_BAD} TLS is on already", "STARTTLS within TLS")
    msg_tls_required: str = _reply("530 Must issue a STARTTLS command first", "commands before TLS, with tls_required")
    msg_session_timeout: str = _reply("421 Session timeout, closing connection", "a client silent for session_timeout")
    msg_server_shutdown: str = _reply("421 Server shutting down, closing connection", "sessions when the server stops")
    msg_line_too_long: str = _reply("500 Line too long", "a command line of over 4096 bytes")

    def __post_init__(self) -> None:
        if self.profile is not None:
            _check_choices("profile", [self.profile], re.findall(r"(?m)^== (\w+)", _PROFILES))
        known = _EXTENSIONS.split()
        for name in (extension.split()[0].upper() for extension in self.extensions):
            if option := {"AUTH": "auth_users", "STARTTLS": "ssl_context"}.get(name):
                raise ConfigurationError(f"{name} is announced with the option ", "extensions", needed=option)
            if name not in known and not name.startswith("X") and (hint := _suggest(name, known, 0.7)):
                raise ConfigurationError(f"{name} is unknown{hint}", "extensions")
        _check_choices("tolerated", self.tolerated, _VIOLATIONS)
        if not self.auth_mechanisms:
            raise ConfigurationError("must name one or more", "auth_mechanisms")
        _check_choices("auth_mechanisms", self.auth_mechanisms, _AUTH_MECHANISMS, str.upper)
        for name, other in _NEEDED.items():
            if getattr(self, name) and getattr(self, other) is None:
                raise ConfigurationError("needs ", name, True, needed=other)


@functools.cache
def _read_profile(name: str | None) -> dict[str, Any]:
    rows = _PROFILES.partition(f"\n== {name}")[2].partition("\n==")[0].replace("\\\n", "")
    profile: dict[str, Any] = {}
    for entry in (entry for row in re.findall(r"(?m)^[^#:\n].+", rows) for entry in row.split(" | ")):
        names, _, text = entry.partition(" ")
        pattern = f"(msg_)?(invalid_cmd_)?({names})(_received|_cmd|_email|_domain)?"
        for option, (_, kind, _) in _SessionOptions._declared.items():
            if kind is not _FLAG and re.fullmatch(pattern, option):
                profile[option] = kind.normalise(kind.parse(text.replace("\\n", "\n")))
    return profile


class _DependentDefault:
    """The default of an option that keep_all turns on, or that profiles have."""

    def __init__(self, name: str, default: Any) -> None:
        self._name, self._default = name, default

    def __get__(self, options: _SessionOptions | None, owner: object) -> Any:
        if options is None:
            return self._default
        if self._default is False:
            return options.keep_all
        return _read_profile(options.profile).get(self._name, self._default)


for _name, _declared in _SessionOptions._declared.items():
    if _name.startswith(("msg_", "multiple_")) or _name in ("extensions", "auth_mechanisms"):
        setattr(_SessionOptions, _name, _DependentDefault(_name, _declared.default))


class Configuration(_SessionOptions, _AddressOptions):
    """Every option of a server. An invalid one raises a ConfigurationError.

    Times are in seconds and may have fractions. A reply may be any text, with or without a code. Each
    newline in it starts another line of the reply, and {msg_size_limit} stands for that option. A text
    that begins with 4 or 5 refuses the command, whichever option it is.
    """


_CONFIGURATION = _OptionType("a Configuration", lambda value: isinstance(value, Configuration))


class _BaseOptions(_Options, kw_only=False):
    configuration: Configuration | None = _option(None, _CONFIGURATION, "the options that are not given by name")


class _Changes(_SessionOptions, _BaseOptions):
    """The arguments of Server.configure()."""

    logger: Logger | logging.Logger | None = _option(None, _LOGGER, "what replaces the default log")
    on_message: Callable[[Message], object] | None = _option(None, _CALLABLE, "called with each accepted message")
    handlers: Iterable[type[Handler]] = _option((), _HANDLERS, "verbs of your own, or in place of the built-in ones")


class _ServerOptions(_Changes, Configuration):
    """The arguments of Server()."""


# ----------------------------------------------------------------------------------------- grammar


class _Verb(NamedTuple):
    """A verb, whether or not the server knows it."""

    argument: str = ""  # "domain", "address", "text" or "secret"; "" if there is none
    extension: str = ""  # the EHLO keyword that announces it
    has_recipients: bool = False  # rules for an address look at the recipients of the mail
    ends_group: bool = False  # it must be the last of a pipelined group
    ends_mail: bool = False  # it abandons a mail that is in progress
    follows_mail: bool = False  # it begins no mail, and is noted on the previous one


# The verbs of all RFCs, then this module's names for whatever else a client sends. Pipelined groups are
# those of RFC 2920 section 3.1, RFC 3207 section 4 and RFC 4954 section 4.
_VERBS = {
    "HELO": _Verb("domain", ends_mail=True),
    "EHLO": _Verb("domain", ends_group=True, ends_mail=True),
    "LHLO": _Verb("domain", ends_group=True, ends_mail=True),
    "MAIL": _Verb("address", ends_mail=True),
    "RCPT": _Verb("address"),
    "DATA": _Verb(has_recipients=True, ends_group=True),
    "BDAT": _Verb("text", "CHUNKING", has_recipients=True),
    "RSET": _Verb(ends_mail=True, follows_mail=True),
    "NOOP": _Verb("text", ends_group=True, follows_mail=True),
    "QUIT": _Verb(ends_group=True, ends_mail=True, follows_mail=True),
    "STARTTLS": _Verb("", "STARTTLS", ends_group=True, ends_mail=True),
    "AUTH": _Verb("secret", "AUTH", ends_group=True),
    "VRFY": _Verb("address", ends_group=True),
    "EXPN": _Verb("address", ends_group=True),
    "HELP": _Verb("text"),
    "ETRN": _Verb("domain", "ETRN"),
    "ATRN": _Verb("domain", "ATRN"),
    "TURN": _Verb(ends_group=True),
    "BURL": _Verb("secret", "BURL"),
    **dict.fromkeys(("SEND", "SOML", "SAML"), _Verb("address")),
    "answer": _Verb("secret", ends_group=True),
    "message": _Verb(has_recipients=True),
    **dict.fromkeys(("connect", "TLS handshake", "partial message", "too long", "truncated"), _Verb()),
}
_UNKNOWN_VERB = _Verb("secret")

# Patterns are compiled on first use, because compiling takes time, and many programs only import this module.
# Every pattern is linear: no two parts of a repetition can match the same text. Letters of every script are
# allowed (RFC 6531 section 3.3), so any character that is not ASCII is a letter, unless _FORBIDDEN matches it.
_FORBIDDEN = "[^\\S ]|[\0-\x1f\x7f-\x9f\ud800-\udfff]"

# "Let-dig" and "ALPHA" of RFC 5321 section 4.1.2.
_ALNUM = r"[^ -/:-@\[-`{-~]"
_ALPHA = r"[^ -@\[-`{-~]"
_LABEL = rf"{_ALNUM}+(?:-+{_ALNUM}+)*"
_DOTTED = rf"(?:{_LABEL}\.)+(?:{_ALPHA}{{2,}}|[xX][nN]--{_LABEL})"

# RFC 5321 section 4.1.3. inet_pton() checks the numbers.
_ADDRESS_LITERAL = r"\[([iI][pP][vV]6:)?([0-9a-fA-F:.]+)\]"

# The argument of HELO, section 4.1.1.1. A host without a domain sends its one label; digits alone are no name.
_DOMAIN = rf"{_DOTTED}|(?=[0-9-]*[^0-9-]){_LABEL}"

# "Mailbox" of section 4.1.2.
_ATOM = r"[^ \"(),.:;<>@\[\\\]]+"
_QUOTED = r"\"(?:[^\"\\]|\\[ -~])*\""
_LOCAL_PART = rf"(?:{_ATOM}(?:\.{_ATOM})*|{_QUOTED})"
_LITERAL = r"\[[^\[\]@]*\]"
_MAILBOX = rf"{_LOCAL_PART}@(?:{_DOTTED}|[lL][oO][cC][aA][lL][hH][oO][sS][tT]|{_LITERAL})"

# The path of MAIL and RCPT: <a@b.com>, a@b.com or John Doe <a@b.com>. A source route is ignored (section 4.1.1.3).
_ROUTE = rf"(?:@{_DOTTED}(?:,@{_DOTTED})*:)?"
_PATH = rf"([^\"<>@]*<{_ROUTE})?({_MAILBOX})(>)?"

# Up to the first > or, if there is no <, up to the first space, outside of quotes.
_PATH_END = re.compile(r'(?=[^"]*<)(?:"(?:[^"\\]|\\.)*"|[^">])*>|(?:"(?:[^"\\]|\\.)*"|[^" ])*')

# With lenient_addresses: labels may have underscores or be numbers and end in a dot, and an address needs no domain.
_LENIENT_LABEL = rf"(?:{_ALNUM}|[_-])+"
_LENIENT_DOMAIN = rf"{_LENIENT_LABEL}(?:\.{_LENIENT_LABEL})*\.?"
_LENIENT_PATH = rf"([^\"<>@]*<{_ROUTE})?({_LOCAL_PART}(?:@(?:{_LENIENT_DOMAIN}|{_LITERAL}))?)(>)?"


def _is_ip_address(text: str, family: socket.AddressFamily) -> bool:
    try:
        return bool(socket.inet_pton(family, text))
    except (OSError, ValueError):
        return False


def _is_address_literal(text: str) -> bool:
    match = re.fullmatch(_ADDRESS_LITERAL, text)
    return match is not None and _is_ip_address(match[2], socket.AF_INET6 if match[1] else socket.AF_INET)


def _is_clean(text: str) -> bool:
    return (text.isascii() and text.isprintable()) or re.search(_FORBIDDEN, text) is None


class _Path(NamedTuple):
    """The argument of MAIL or RCPT (RFC 5321 section 4.1.2)."""

    address: str  # "" for <>
    parameters: dict[str, str]  # by upper-case name; never changed, because paths are cached


def _split_path(text: str) -> tuple[str, Sequence[str]]:
    match = _PATH_END.match(text)
    end = match.end() if match and text[match.end() : match.end() + 1] in ("", " ") else len(text)
    return text[:end], text[end:].split()


def _read_parameters(words: Iterable[str]) -> dict[str, str]:
    """The parameters by upper-case name. A duplicate gets the value "?", which is never valid, so it is refused."""
    parameters: dict[str, str] = {}
    for name, _, value in (word.partition("=") for word in words):
        parameters[name.upper()] = "?" if name.upper() in parameters else value
    return parameters


def _parse_domain(text: str, pattern: str = _DOMAIN) -> str | None:
    valid = re.fullmatch(pattern, text) or _is_address_literal(text) or _is_ip_address(text, socket.AF_INET)
    return text if valid and _is_clean(text) else None


def _parse_path(pattern: str, allowed: str, has_parameters: bool, text: str) -> _Path | None:
    """A path that matches the pattern, or the allowed one, which has no mailbox."""
    path, words = _split_path(text) if has_parameters else (text, ())
    parameters = _read_parameters(words) if words else {}
    if path.lower() == allowed:
        return _Path(path[1:-1], parameters)
    match = re.fullmatch(pattern, path)
    if match is None or (match[1] is None) != (match[3] is None) or not _is_clean(path):
        return None
    address: str = match[2]
    domain = address.rpartition("@")[2]
    return _Path(address, parameters) if domain[0] != "[" or _is_address_literal(domain) else None


def _parse_chunk(text: str) -> tuple[int, bool] | None:
    """The size of a chunk, and whether it is the last (RFC 3030 section 2)."""
    match = re.fullmatch(r"([0-9]{1,20})(?: +([lL][aA][sS][tT]))?", text)
    return (int(match[1]), match[2] is not None) if match else None


def _decode(data: bytes) -> str:
    """Decode what a client sent. Bytes that are not UTF-8 become surrogates."""
    return data.decode("utf-8", "surrogateescape")


_XTEXT = r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})"  # RFC 3461 section 4
# The command, the extension and the pattern of each parameter. Other parameters have the name of their extension.
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
    "BY": ("MAIL", "DELIVERBY", "[^?]*"),  # RFC 2852
    "HOLDFOR": ("MAIL", "FUTURERELEASE", "[^?]*"),  # RFC 4865
    "HOLDUNTIL": ("MAIL", "FUTURERELEASE", "[^?]*"),
}


# ---------------------------------------------------------------------------------------- dialogue


class _Request:
    """Something that a client has sent. It never changes, because sessions share the requests that they repeat."""

    # Neither this nor a reply is a NamedTuple, because those attributes take longer to read.

    def __init__(self, verb: str, line: str, argument: str = "", faults: tuple[tuple[str, str], ...] = ()) -> None:
        self.verb = verb  # in upper case, or one of the last names in _VERBS
        self.line = line  # in the form that may be shown: *** for a secret, <9 bytes> for a body
        self.argument = argument
        self.faults = faults  # codes of violations that the line does not show, each with the line to report
        self.kind = _VERBS.get(verb, _UNKNOWN_VERB)

    def hide(self, line: str, argument: str = "", verb: str = "") -> _Request:
        """A copy with this line, because the real line and verb may hold a secret."""
        return _Request(verb or self.verb, line, argument, tuple((code, line) for code, _ in self.faults))


def _find_faults(line: bytes, shown: str) -> tuple[tuple[str, str], ...]:
    """The faults in the bytes of a line. The bytes are not kept, because they may hold a secret."""
    text = line[:-1] if line.endswith(b"\r") else line
    faults = {
        "bare-lf": text is line,
        "bare-cr": b"\r" in text,
        "nul-byte": b"\0" in text,
        "command-space": text.strip(b" \t") != text,
        "long-command": len(line) >= 512,  # without the LF
    }
    return tuple((code, shown) for code, is_wrong in faults.items() if is_wrong)


def _parse_line(line: bytes) -> _Request:
    """Split a line into the verb and the argument (RFC 5321 section 4.1.1)."""
    text = _decode(line.strip())
    # True if only the CR was stripped.
    is_clean = len(text) == len(line) - 1 < 511 and line[-1] == 13 and text.isprintable()
    verb, _, argument = (text.replace("\t", " ") if "\t" in text else text).partition(" ")
    # Verbs are ASCII; upper() would turn "quıt", with a dotless i, into "QUIT".
    verb = verb.upper() if verb.isascii() else ""
    return _Request(verb, text, argument, () if is_clean else _find_faults(line, text))


class _Next(enum.Enum):
    """What the server does after a reply instead of waiting for a command. All but TLS end the session."""

    TLS = "<tls>"
    CLOSE = "<closed>"
    RESET = "<reset>"  # closes with an RST
    SILENCE = "<silence>"  # stays connected, but sends no more replies


def _encode(text: str) -> bytes:
    return text.replace("\r\n", "\n").replace("\n", "\r\n").encode("utf-8", "surrogateescape") + b"\r\n"


class _Reply:
    """What the server sends next, and what follows. It never changes, because it is sent many times."""

    def __init__(self, text: str, data: bytes | None = None, next: _Next | None = None, accepts: bool = False) -> None:
        self.text = text
        self.data = _encode(text) if data is None else data  # the bytes to send; empty if there is no reply
        self.delay = 0.0  # seconds before it is sent
        self.next = next
        self.accepts = accepts  # whether the command takes effect
        self.trickle = 0.0  # seconds between two bytes
        self.refuses = bool(self.data) and text.startswith(("4", "5"))
        self.ends = next is not None and next is not _Next.TLS

    def replace(self, **changes: Any) -> _Reply:
        """A copy with these changes; data=None encodes the text again."""
        reply = _Reply(*[changes.get(name, getattr(self, name)) for name in ("text", "data", "next", "accepts")])
        reply.delay = changes.get("delay", self.delay)
        reply.trickle = changes.get("trickle", self.trickle)
        return reply


class _Exchange(NamedTuple):
    request: _Request | None  # None if the server spoke unasked
    reply: _Reply | None  # None if there was none
    value: Any  # of the argument; None if it is invalid
    at: float  # when the request arrived, in seconds since the epoch
    was_early: bool  # whether the client sent more before it had the reply

    @property
    def verb(self) -> str:
        return "" if self.request is None else self.request.verb

    @property
    def line(self) -> str:
        return "" if self.request is None else self.request.line

    @property
    def response(self) -> str:
        return "" if self.reply is None else self.reply.text

    @property
    def accepted(self) -> bool:
        return self.reply is not None and self.reply.accepts

    @property
    def is_refused(self) -> bool:
        return self.request is not None and self.reply is not None and self.reply.refuses


def _printable(text: str) -> str:
    """The text as one line, with escapes for characters that a terminal would obey or not show."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _format_exchanges(exchanges: Iterable[_Exchange]) -> Iterator[str]:
    """Yield lines such as "C: QUIT", "S: 221 Closing connection" and "S: <closed>"."""
    for request, reply, *_ in exchanges:
        if request is not None:
            yield f"C: {_printable(request.line)}"
        if reply is not None and reply.data:
            yield from (f"S: {_printable(line)}" for line in reply.text.replace("\r\n", "\n").split("\n"))
        if reply is not None and reply.next is not None and reply.ends:
            yield f"S: {reply.next.value}"


# -------------------------------------------------------------------------------------------- mail

_TYPE, _ENCODING, _DISPOSITION = _MIME = ("content-type", "content-transfer-encoding", "content-disposition")
_ENCODED_WORD = r"=\?([^?\s]+)\?([A-Za-z])\?([^?]*)\?="
_WORD = _ENCODED_WORD.replace("A-Za-z", "BbQq")
_COMMENT = r"\([^()]*\)"
_SPACE, _TOKEN = rf"\s*(?:{_COMMENT}\s*)*", r"[!#$%&'*+.0-9A-Z^_`a-z{|}~-]+"
_UNQUOTED = r"[^;(]*(?:\((?:[^()]*\))?[^;(]*)*"
_PARAMETER = rf'(?s);{_SPACE}([^\s;=()]+){_SPACE}={_SPACE}(?:"([^"\\]*(?:\\.[^"\\]*)*)"?|({_UNQUOTED}))'
_FIELD = r"(?<![^\n])([!-9;-~]+)[ \t]*:[ \t]*([^\n]*(?:\n[ \t][^\n]*)*)\n?"
# Longer headers are not given to `email`, because the time that it takes grows with the square of their length.
_HEADER_LIMIT, _DEPTH_LIMIT, _PART_LIMIT = 2000, 30, 10_000
_Parts = list[tuple["EmailMessage", str, dict[str, str], bytes | None]]  # each with type, parameters, and any content

_NOT_CHARSETS = ("idna", "mbcs", "oem", "punycode", "raw-unicode-escape", "undefined", "unicode-escape")  # but codecs
# Names of charsets, by IANA and by old programs and without x- or cs, that Python knows under another name.
_CHARSETS = {
    "(?:windows|ibm|ccsid|dos|ms)?-?(?:cp)?-?0*([0-9]+)": r"cp\1", "windows-?31j": "cp932", "hproman8": "hp-roman8",
    "iso-8859-1-windows.*": "cp1252", "iso-8859-2-windows.*": "cp1250", "iso-8859-9-windows.*": "cp1254",
    "iso-?8859-?([0-9]+)(?:-?[ie])?": r"iso8859-\1",  # RFC 1556: -i and -e are about the direction of the text
    "(?:unicode-?1-?1-?)?utf-?([0-9]+)-?([bl]e)?": r"utf-\1\2", "iso-10646-ucs-2|unicode": "utf-16-be",
    "iso-10646-ucs-4|ucs4": "utf-32-be", "ksc?-?c?-?5601.*|iso-ir-149": "euc_kr", "koi8([ru])": r"koi8-\1",
    "eucpkdfmtjapanese|extended-unix-code-packed.*": "euc_jp", "jis-?encoding": "iso2022_jp", "gb-2312-80": "gb2312",
    "iso2022jp2": "iso2022_jp_2", "(?:iso)?-?latin-?9": "iso8859-15", "pc-multilingual-850.*": "cp858",
}  # fmt: skip
# Mail programs often name the first charset and use the second, which has all its characters and more.
_SUPERSETS = {
    "ascii": "utf-8", "gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "euc_kr": "cp949",
    "shift_jis": "cp932", "euc_jp": "euc_jis_2004", "iso2022_jp": "iso2022_jp_ext iso2022_jp_3",
}  # fmt: skip


@functools.lru_cache(maxsize=64)
def _find_codec(charset: str) -> str:
    """Python's name of a charset; "" if Python does not know it."""
    import codecs

    name = re.sub("[^a-z0-9.+]+", "-", charset[:60].lower()).strip("-")
    plain = re.sub("^(?:x-|cs)", "", name)
    for known in (name, *(re.sub(f"^(?:{names})$", codec, plain) for names, codec in _CHARSETS.items())):
        with contextlib.suppress(LookupError):
            codec = codecs.lookup(known).name
            if codec not in _NOT_CHARSETS:
                return codec
    return ""


def _decode_charset(data: bytes, charset: str) -> str:
    """The text, with a replacement character for each wrong one; a charset that is unknown counts as UTF-8."""
    codec = _find_codec(charset) or "utf-8"
    names = ["cp1252"] if codec == "iso8859-1" else [codec, *_SUPERSETS.get(codec, "").split()]
    for name, errors in (*((name, "strict") for name in names), (names[-1], "replace")):
        # Windows adds characters to JIS X 0208 that Python knows in JIS X 0213 alone.
        text = data.replace(b"\x1b$B", b"\x1b$(O") if name == "iso2022_jp_3" else data
        with contextlib.suppress(Exception):  # a codec may raise anything, and that of UTF-7 makes lone surrogates
            return re.sub("[\ud800-\udfff]", "\ufffd", text.decode(name, errors).removeprefix("\ufeff"))
    return data.decode("utf-8", "replace")


def _decode_content(data: bytes, encoding: str) -> bytes:
    import binascii
    import codecs

    if encoding == "quoted-printable":
        return binascii.a2b_qp(re.sub(rb"(?<![ \t])[ \t]+(?=\r?\n|\Z)", b"", data))
    if encoding == "base64":  # `email` stops at the first padding, and at a stray character decodes nothing
        blocks = re.findall(b"[^=]+", re.sub(b"[^A-Za-z0-9+/=]+", b"", data))
        return b"".join(binascii.a2b_base64(block[: len(block) - (len(block) % 4 == 1)] + b"==") for block in blocks)
    with contextlib.suppress(Exception):
        if encoding in ("x-uuencode", "uuencode", "x-uue", "uue"):
            return codecs.decode(data[data.index(b"begin ") :].replace(b"\r\n", b"\n"), "uu")
    return data


def _decode_words(text: str, write: Callable[[str], str] = str) -> str:
    """Decode the encoded words, without the white space between two; those of one charset may share a character."""

    def decode(match: re.Match[str]) -> str:
        runs: list[tuple[str, list[bytes]]] = []
        for charset, kind, word in re.findall(_WORD, match[0]):
            if not runs or runs[-1][0] != charset:
                runs.append((charset, []))
            encoding, text = ("base64", word) if kind in "Bb" else ("quoted-printable", word.replace("_", "=20"))
            runs[-1][1].append(_decode_content(text.encode(), encoding))
        return write("".join(_decode_charset(b"".join(data), charset.partition("*")[0]) for charset, data in runs))

    word = _WORD.replace("(", "(?:")
    return re.sub(rf"{word}(?:\s*{word})*", decode, text)


def _unfold(value: str) -> str:
    """The value in one line, with raw bytes read as UTF-8; it may be folded right after the colon."""
    text = value.rstrip("\r\n").replace("\r\n", "").replace("\n", "").replace("\r", " ").lstrip(" \t")
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _strip_comments(value: str) -> str:
    for _ in range(4):  # they may be nested; with no limit, the time could grow with the square of the length
        value = re.sub(_COMMENT, " ", value)
    return value


def _read_mime(part: Any, header: str) -> tuple[str, dict[str, str]]:
    """The value of a header such as Content-Type, and its parameters."""
    # `email` takes comments for a part of the value, raises on some parameters, and cuts one that lacks its quotes.
    from urllib.parse import unquote_to_bytes

    raw_value = next((value for name, value in part.raw_items() if name.lower() == header), "")
    text = _unfold(raw_value[:100_000])  # `re` needs up to 300 bytes for each character
    end = len(re.split(rf"\A({_UNQUOTED})", text)[1])
    values: dict[str, str] = {}
    sections: dict[str, dict[int, tuple[str, str]]] = {}
    for name, quoted, raw in re.findall(_PARAMETER, text[end:]):
        bare = _strip_comments(raw).strip()
        value = (bare if re.fullmatch(_TOKEN, bare) else raw.strip()) or re.sub(r"(?s)\\(.)", r"\1", quoted)
        base, number, star = re.split(r"(?:\*([0-9]{1,4}))?(\*?)\Z", name.lower(), maxsplit=1)[:3]
        if number or star:
            sections.setdefault(base, {}).setdefault(int(number or 0), (value, star))
        elif base not in values:
            values[base] = value if base == "boundary" else _decode_words(value)
    for name, found in sections.items():  # RFC 2231: with a star, a section is percent-encoded
        ordered = [section for _, section in sorted(found.items())]
        data = b"".join(unquote_to_bytes(value) if star else value.encode() for value, star in ordered)
        charset, _, data = data.split(b"'", 2) if ordered[0][1] and data.count(b"'") > 1 else (b"", b"", data)
        values[name] = _decode_charset(data, charset.decode("latin-1"))
    return "".join(_strip_comments(text[:end]).lower().split()), values


@functools.cache
def _make_email_policy() -> Any:
    from email.charset import Charset
    from email.errors import InvalidHeaderDefect
    from email.headerregistry import BaseHeader, HeaderRegistry, UnstructuredHeader
    from email.policy import EmailPolicy

    # `email` knows fewer charsets, and up to Python 3.13 it puts a blank between the encoded words of a name.
    encode = Charset("utf-8").header_encode
    # It has what is asked of a Content- header, too.
    attributes = {"value_parser": staticmethod(_decode_words), "params": {}, "content_disposition": None, "cte": "7bit"}
    unstructured: Any = type("Text", (UnstructuredHeader,), attributes)

    class Policy(EmailPolicy):
        def header_fetch_parse(self, name: str, value: str) -> Any:
            text = _unfold(value)
            try:
                if len(text) > _HEADER_LIMIT:
                    raise ValueError("it is too long")
                return self.header_factory(name, _decode_words(text, encode))
            except Exception as error:  # noqa: BLE001 - the parser raises many, such as an IndexError on "From: :"
                header: Any = HeaderRegistry(BaseHeader, unstructured, False)(name, text)
                header._defects.append(InvalidHeaderDefect(f"{name} cannot be parsed: {error!r}"))
                return header

    return Policy(refold_source="none")


def _show_headers(mail: Any) -> Iterator[tuple[str, str]]:
    """Addresses and other structured values are shown as `email` does, but only the first of a name: it is slow."""
    structured = mail.policy.header_factory.registry.keys() - {"subject"}
    for name, value in mail.raw_items():
        is_structured = name.lower() in structured
        structured.discard(name.lower())
        yield name, str(mail.policy.header_fetch_parse(name, value)) if is_structured else _decode_words(_unfold(value))


def _read_header(part: Any, text: str) -> str:
    """Add the fields to the part, and return its body."""
    # A line that is neither a field nor its continuation is skipped, as mail readers do; `email` ends the header there.
    from email.errors import MissingHeaderBodySeparatorDefect

    head, *rest = re.split(r"(?<![^\n])\r?\n", text, maxsplit=1)
    fields = list(re.finditer(_FIELD, head))
    for field in fields:
        part.set_raw(field[1], field[2].rstrip("\r\n"))
    if sum(len(field[0]) for field in fields if field[0][len(field[1])] == ":") != len(head):
        part.defects.append(MissingHeaderBodySeparatorDefect())
    if rest and (fields or not head):
        return rest[0]
    return text[fields[-1].end() if fields else 0 :]


def _split_multipart(part: Any, body: str, boundary: str) -> list[str]:
    from email import errors

    delimiter = "--" + re.escape(boundary.rstrip().encode().decode("ascii", "surrogateescape"))
    line = rf"{delimiter}(?<![^\n]{delimiter})(--)?[ \t]*(?:\r?\n|\Z)"
    preamble, *found = re.split(line, body, maxsplit=_PART_LIMIT) if 0 < len(boundary) < _HEADER_LIMIT else [body]
    ends, texts = found[::2], [text.removesuffix("\n").removesuffix("\r") for text in (preamble, *found[1::2])]
    count = ends.index("--") if "--" in ends else len(ends)
    if count == 0:
        part.defects.append(errors.StartBoundaryNotFoundDefect() if boundary else errors.NoBoundaryInMultipartDefect())
        return []
    part.preamble = texts[0] if preamble else None
    if count == len(ends):
        part.defects.append(errors.CloseBoundaryNotFoundDefect())
    else:
        part.epilogue = found[2 * count + 1] or ("" if body.endswith("\n") else None)
    return texts[1 : count + 1]


def _parse_part(part: Any, text: str, parts: _Parts, depth: int = 0) -> _Parts:
    """Fill the EmailMessage, and add it and its parts to the list, but for those of a mail within the mail."""
    # `email` rewrites a mail within the mail, has no limit but the stack, and compares each line with all boundaries.
    from email.errors import MessageDefect
    from email.message import EmailMessage

    body = _read_header(part, text)
    (kind, parameters), encoding = _read_mime(part, _TYPE), _read_mime(part, _ENCODING)[0]
    if kind.count("/") != 1:  # RFC 2045 section 5.2
        kind = "text/plain" if kind else part.get_default_type()
    is_multipart, is_message = kind.startswith("multipart/"), kind.startswith("message/")
    if depth == _DEPTH_LIMIT and (is_multipart or is_message):
        (parts[0][0] if parts else part).defects.append(MessageDefect("parts are nested too deeply"))
        is_multipart = is_message = False
    texts = _split_multipart(part, body, parameters.get("boundary", "")) if is_multipart else []
    content = None if texts else _decode_content(body.encode("ascii", "surrogateescape"), encoding)
    if is_message and content is not None:
        blocks = r"(?:[^\r\n][^\n]*(?:\n|\Z))+" if kind == "message/delivery-status" else r"(?s).+|\A\Z"
        texts = re.findall(blocks, content.decode("ascii", "surrogateescape"))[:_PART_LIMIT]
    parts.append((part, re.sub("^multipart/.*", "text/plain", kind), parameters, content))
    part.set_payload([EmailMessage(part.policy) for _ in texts] or body)
    for inner, text in zip(part.get_payload() if texts else (), texts, strict=True):
        inner.set_default_type("message/rfc822" if kind == "multipart/digest" else "text/plain")
        _parse_part(inner, text, [] if is_message else parts, depth + 1)
    return parts


# -------------------------------------------------------------------------------------- violations


class Violation(NamedTuple):
    """A rule of SMTP or of mail that the client broke."""

    code: str  #: a name that never changes its meaning
    text: str
    rfc: str  #: number and section
    severity: str  #: "error", or "warning" where servers are tolerant or the RFC only advises
    line: str  #: the offending line, cut off after 200 characters

    def __str__(self) -> str:
        return f"{self.code}: {self.text} (RFC {self.rfc})" + (f": {self.line!r}" if self.line else "")

    @property
    def refused_by(self) -> str:
        """Well-known providers and programs whose refusal of this is public, such as "Gmail, Amazon SES"; or empty."""
        return ", ".join(name for name, what in _REFUSED_BY.items() if self.code in what or self.text in what)


_VIOLATIONS = {
    "early-talker": ("a command came before the greeting: wait for it", "5321 4.3.1", "error"),
    "bare-lf": ("a line ends in LF and not in CRLF", "5321 2.3.8", "error"),
    "bare-cr": ("there is a CR without LF: lines end in CRLF", "5321 2.3.8", "error"),
    "nul-byte": ("there is a NUL byte", "5322 2.1", "error"),
    "long-command": ("a command is longer than 512 bytes", "5321 4.5.3.1.4", "error"),
    "command-space": ("there is white space around a command", "5321 4.1.1", "warning"),
    "after-421": ("a command other than QUIT follows a 421", "5321 3.8", "warning"),
    "no-hello-after-tls": ("EHLO is not the first command within TLS", "3207 4.2", "error"),
    "data-after-refusal": ("the mail was sent although DATA was refused: send RSET", "5321 3.3", "error"),
    "data-before-354": ("the mail was sent before the reply to DATA: wait for the 354", "5321 3.3", "error"),
    "pipelining": ("without PIPELINING, wait for each reply before more is sent", "5321 4.3.1", "error"),
    "pipelining-order": ("more was sent after a command that must be the last of its group", "2920 3.1", "error"),
    "unknown-command": ("no RFC defines this command", "5321 4.1.5", "error"),
    "no-hello": ("MAIL without EHLO or HELO: send EHLO first", "5321 4.1.1.1", "error"),
    "hello-invalid": ("the client's name is neither a domain nor like [192.0.2.1]", "5321 4.1.1.1", "error"),
    "hello-not-fqdn": ("the client's name is not fully qualified, like host.example.com", "5321 2.3.5", "warning"),
    "unannounced-command": ("the reply to EHLO does not announce this command", "5321 4.1.1.1", "error"),
    "unannounced-mechanism": ("this AUTH mechanism is not announced", "4954 4", "error"),
    "auth-in-clear": ("a password was sent in clear: STARTTLS is offered", "4954 4", "warning"),
    "superfluous-argument": ("this command takes no argument", "5321 4.1.1", "error"),
    "bad-sequence": ("this command is not allowed at this point", "5321 3.3", "error"),
    "nested-mail": ("MAIL while another mail is open: end it, or send RSET", "5321 4.1.4", "error"),
    "path-syntax": ("the argument is not FROM:<address> or TO:<address>", "5321 3.3", "error"),
    "bad-parameter": ("a parameter has no valid value, or does not belong here", "5321 4.1.1.11", "error"),
    "bad-auth": ("what AUTH sends is not base64 in one line, or not what is asked for", "4954 4", "error"),
    "tls-on-plain-port": ("the client began TLS on a port that begins in plain text", "8314 3.3", "error"),
    "path-too-long": ("a local part is over 64 bytes or a path over 256", "5321 4.5.3.1", "error"),
    "unannounced-parameter": ("the reply to EHLO does not announce this parameter", "5321 4.1.1.3", "error"),
    "undeclared-utf8": ("an address is not ASCII, and MAIL had no SMTPUTF8", "6531 3.4", "error"),
    "no-recipient": ("DATA although no recipient was accepted: send RSET", "5321 3.3", "error"),
    "unstuffed-dot": ("a dot at the start of a line is not doubled", "5321 4.5.2", "error"),
    "false-end": ("at a dot with a bare LF, some servers end the mail (SMTP smuggling)", "5321 4.1.1.4", "error"),
    "long-line": ("a line is longer than 998 bytes: use quoted-printable or base64", "5322 2.1.1", "error"),
    "size-understated": ("the mail is larger than its SIZE", "1870 6", "warning"),
    "8bit-unannounced": ("without 8BITMIME, use quoted-printable or base64", "5321 2.4", "warning"),
    "8bit-undeclared": ("the body is not ASCII, and MAIL had no BODY=8BITMIME", "6152 3", "warning"),
    "header-syntax": ("a line of the header is neither a field nor its continuation", "5322 2.2", "error"),
    "header-raw": ("a header is not ASCII, and MAIL had no SMTPUTF8: use encoded words", "5322 2.2", "error"),
    "header-missing": ("a required header is missing", "5322 3.6", "error"),
    "header-duplicate": ("a header occurs twice", "5322 3.6", "error"),
    "no-message-id": ("there is no Message-ID", "5322 3.6.4", "warning"),
    "bad-message-id": ("a message id is not like <left@right>", "5322 3.6.4", "error"),
    "bad-date": ("the Date is not like Fri, 21 Nov 1997 09:55:06 -0600", "5322 3.3", "error"),
    "bad-address": ("a header has no readable address, such as user@example.com", "5322 3.4", "error"),
    "bcc-disclosed": ("Bcc tells other recipients who is hidden: leave it out", "5322 3.6.3", "error"),
    "no-mime-version": ("there are MIME headers and no MIME-Version: 1.0", "2045 4", "error"),
    "encoded-word": ("an encoded word cannot be decoded, or is not allowed at this place", "2047 5", "error"),
    "encoded-word-long": ("an encoded word is longer than 75 characters: split it", "2047 2", "warning"),
    "encoded-parameter": ("there is an encoded word in a parameter: write name*=utf-8''a%20b", "2047 5", "warning"),
    "bad-content-type": ("the Content-Type is not like text/plain; charset=utf-8", "2045 5.1", "error"),
    "bad-boundary": ("the boundary is missing, malformed, or does not separate the parts", "2046 5.1.1", "error"),
    "bad-encoding": ("the Content-Transfer-Encoding is unknown or not allowed here", "2045 6.4", "error"),
    "8bit-in-7bit": ("a part labelled 7bit is not ASCII: use quoted-printable or base64", "2045 6.2", "error"),
    "bad-base64": ("the base64 cannot be decoded, or a line is over 76 characters", "2045 6.8", "error"),
    "bad-quoted-printable": ("there are bytes that quoted-printable encodes, or lines over 76", "2045 6.7", "error"),
    "bad-disposition": ('the Content-Disposition is not like attachment; filename="a b.pdf"', "2183 2", "error"),
    "wrong-charset": ("the text cannot be decoded with its charset", "2046 4.1.2", "error"),
    "unknown-charset": ("the text is not ASCII, and its charset is not registered: use utf-8", "2046 4.1.2", "warning"),
    "bad-mime-version": ("the MIME-Version is not 1.0", "2045 4", "warning"),
    "group-in-from": ("From has a group: write the address of a sender", "6854 3", "warning"),
    "obsolete-syntax": ("this is obsolete, and must not be written any more", "5322 4", "warning"),
}

_BLANK_LINE = "a continuation line has nothing but white space"
_NO_SPACE = "an encoded word needs white space around it"
_NO_SENDER = "From has several addresses, and there is no Sender"
# The codes or texts of what somebody refuses. The issues on GitHub quote the replies.
_REFUSED_BY = {
    "Gmail": ("no-message-id", "bad-message-id", "header-duplicate", _NO_SENDER),
    # element-hq/matrix-authentication-service#4747, Chaste/Chaste#268, fudforum/FUDforum#49
    "Amazon SES": ("header-duplicate",),  # xreef/EMailSender#49
    "Yahoo": (_NO_SPACE,),  # python/cpython#144156
    "GMX": ("long-line",),  # minosiants/pencil#16
    "amavis": (_BLANK_LINE,),  # docker-mailserver/docker-mailserver#3501
    "Postfix": ("bare-lf", "pipelining"),  # VernissageApp/VernissageServer#28, xymon-monitoring/xymon#450
    "Exim": ("early-talker",),  # nodemailer/nodemailer#56
}

_HELLO, _PATHS, _PLAINTEXT_MECHANISMS = ("EHLO", "HELO"), ("MAIL", "RCPT"), ("PLAIN", "LOGIN")

# The strict grammar of RFC 5321 section 4.1.2, where the server's own is tolerant.
_KEYWORD = "[A-Z0-9][A-Z0-9-]*"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_IPV4 = r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"
_STRICT_NAME = rf"(?=[ -~]*$)(?!{_IPV4}$){_HOST}"  # ASCII, RFC 6531 section 3.7.1
_STRICT_MAILBOX = rf"<(?:@[^<>: ]+:)?(?:{_ATOM}(?:\.{_ATOM})*|{_QUOTED})@(?:{_HOST}|\[[^\[\]]+\])>"
_STRICT_COMMAND = rf"(?i:MAIL FROM:(?:<>|{_STRICT_MAILBOX})|RCPT TO:(?:<postmaster>|{_STRICT_MAILBOX}))(?: .*)?"


class _ClientState:
    """One request, and the state of the client when it sent it."""

    chunk = ""  # the line of the BDAT that this may belong to
    parameters: dict[str, str] = {}  # of the last MAIL
    recipients: list[str] = []  # accepted since
    announced: dict[str, list[str]] = {}  # extensions, each with its words
    is_greeted = is_in_mail = has_begun_tls = was_told_421 = False
    was_refused_data = ignores_refusal = ignores_rest = has_chunks = has_logged_in = False
    was_pipelined = may_be_blind = False  # sent before the last reply, and allowed to be (RFC 2920)

    def read(self, request: _Request, exchange: _Exchange) -> None:
        reply = exchange.reply
        self.reply = reply.text if reply is not None and reply.data else ""
        self.verb, self.line, self.argument, self.kind = request.verb, request.line, request.argument, request.kind
        self.mechanism = request.argument.partition(" ")[0].upper() if self.verb == "AUTH" else ""
        self.path, self.words = _split_path(request.argument) if self.verb in _PATHS else ("", [])
        local = self.path.strip("<>").rpartition(":")[2].rpartition("@")[0]  # without a source route
        self.local_size, self.path_size = (len(text.encode("utf-8", "surrogateescape")) for text in (local, self.path))
        self.given = {name: value.upper() for name, value in _read_parameters(self.words).items()}  # parameters
        self.chunk = self.line if self.verb == "BDAT" else self.chunk if self.verb == "message" else ""
        names = [name for name in self.given if re.fullmatch(_KEYWORD, name)]
        self.needed = {_PARAMETERS.get(name, ("", name))[1] for name in names}  # the extensions of those
        self.needed |= {"BINARYMIME"} & {self.given.get("BODY", "")}
        self.has_literal = _is_address_literal(self.argument)
        self.login = getattr(exchange.value, "response", "")  # the outcome of AUTH
        self.is_refused, self.may_pipeline = self.reply[:1] in ("4", "5"), "PIPELINING" in self.announced
        self.has_more = exchange.was_early and bool(self.reply)
        self._read_faults(request)

    def _read_faults(self, request: _Request) -> None:
        # Extensions allow longer lines: parameters do, and RFC 4954 section 4 for an answer to a challenge.
        is_long = self.line != "***" if self.verb == "answer" else not self.given or len(self.line) > 1010
        self.faults = [fault for fault in request.faults if fault[0] != "long-command" or is_long]
        self.sends_mail_early = self.has_more and self.verb == "DATA" and not self.is_refused
        self.ignores_reply = self.was_refused_data and self.verb not in _VERBS
        is_other = self.verb not in (*_VERBS, *self.announced)
        self.is_unknown = is_other and not self.ignores_reply and self.reply[:1] == "5"
        # A mechanism of one round trip may be followed by more (RFC 4954 section 4).
        self.may_go_on = self.sends_mail_early or (self.mechanism in ("PLAIN", "EXTERNAL") and self.line[-3:] == "***")

    def advance(self) -> None:
        """Let the request and its reply take effect."""
        accepted = self.verb if self.reply and not self.is_refused else ""
        self.was_pipelined, self.may_be_blind = self.has_more, self.has_more and self.may_pipeline
        self.was_told_421 = self.was_told_421 or self.reply.startswith("421")
        self.has_begun_tls = accepted == "STARTTLS"
        has_now = self.login != "" and self.reply[:1] == "2"
        self.has_logged_in = accepted != "STARTTLS" and (self.has_logged_in or has_now)
        self.ignores_refusal = self.ignores_reply and self.line != "."
        self.was_refused_data = self.verb == "DATA" and self.is_refused
        begins_again = self.verb in ("message", "partial message") or accepted in (*_HELLO, "STARTTLS", "RSET")
        self.is_in_mail = self.is_in_mail and not begins_again
        if accepted in (*_HELLO, "STARTTLS"):
            self.is_greeted, self.announced = accepted in _HELLO, {}
            for line in self.reply.upper().replace("AUTH=", "AUTH ").splitlines()[1:]:
                name, *words = line[4:].split() or [""]
                self.announced.setdefault(name, []).extend(words)
        self.has_chunks = accepted == "BDAT" or (self.has_chunks and accepted == "")
        if accepted == "MAIL":
            self.is_in_mail, self.parameters, self.recipients = True, self.given, []
        elif accepted == "RCPT" and self.is_in_mail:
            self.recipients.append(self.path.strip("<>").lower())

    def find_bad_parameter(self) -> str:
        """What is wrong with the parameters of this request, or nothing."""
        for name, _, value in (word.upper().partition("=") for word in self.words):
            verb, _, pattern = _PARAMETERS.get(f"{name}={value}", _PARAMETERS.get(name, (self.verb, name, ".*")))
            if self.given[name] == "?":
                return f"{name} is given twice"
            if verb != self.verb:
                return f"{name} belongs to {verb}"
            if not (re.fullmatch(pattern, value) and re.fullmatch(_KEYWORD, name)):
                return f"this is no value of {name}" if name in _PARAMETERS else "this is not like NAME or NAME=value"
        return ""

    def find_bad_path(self) -> str:
        """What is wrong with the argument of this MAIL or RCPT, or nothing."""
        if re.fullmatch(_STRICT_COMMAND, self.line) and self.line.isprintable():
            return ""
        keyword = "FROM" if self.verb == "MAIL" else "TO"
        form = re.fullmatch(rf"(?i)\S+ {keyword}:( *)<([^<>]*)>(?: .*)?", self.line)
        if form is None or not self.line.isprintable():
            return f"write {keyword}:<address>, one address and nothing else"
        if form[1]:
            return "there must be no space after the colon"
        local, at, _ = form[2].rpartition("@")
        part = "part before the @" if at and not re.fullmatch(_LOCAL_PART, local) else "domain"
        return f"the {part} of the address is wrong" if at else "the address has no domain"


# A code, the requests that it is about (none: all), and when one is wrong, or a text that says what is.
_DIALOGUE_CHECKS: tuple[tuple[str, Collection[str], Callable[[_ClientState], object]], ...] = (
    ("after-421", (), lambda it: it.was_told_421 and not it.was_pipelined and it.verb != "QUIT"),
    ("no-hello-after-tls", (), lambda it: it.has_begun_tls and it.verb not in (*_HELLO, "QUIT")),
    ("data-after-refusal", (), lambda it: it.ignores_reply),
    ("data-before-354", ("DATA",), lambda it: it.sends_mail_early),
    ("pipelining", (), lambda it: it.has_more and not (it.may_pipeline or it.sends_mail_early or it.ignores_reply)),
    ("pipelining-order", (), lambda it: it.kind.ends_group and it.has_more and it.may_pipeline and not it.may_go_on),
    ("unknown-command", (), lambda it: it.is_unknown and it.line != "***"),
    ("no-hello", ("MAIL",), lambda it: not (it.is_greeted or it.has_begun_tls or it.may_be_blind)),
    ("hello-invalid", _HELLO, lambda it: not re.fullmatch(_STRICT_NAME, it.argument) and not it.has_literal),
    ("hello-not-fqdn", _HELLO, lambda it: re.fullmatch(_LABEL, it.argument)),
    ("unannounced-command", (), lambda it: it.kind.extension not in ("", *it.announced)),
    ("unannounced-mechanism", ("AUTH",), lambda it: it.mechanism not in it.announced.get("AUTH", it.mechanism)),
    ("auth-in-clear", ("AUTH",), lambda it: it.mechanism in _PLAINTEXT_MECHANISMS and "STARTTLS" in it.announced),
    ("bad-auth", (), lambda it: it.login == "msg_auth_bad_response"),
    ("bad-auth", (), lambda it: it.is_unknown and it.line == "***" and "AUTH has failed, and this belongs to it"),
    ("superfluous-argument", (), lambda it: it.argument != "" and not it.kind.argument),
    ("bad-sequence", ("AUTH",), lambda it: it.is_in_mail and "AUTH is not allowed within a mail"),
    ("bad-sequence", ("AUTH",), lambda it: it.has_logged_in and "AUTH has succeeded already"),
    ("bad-sequence", ("DATA",), lambda it: it.has_chunks and "after BDAT comes BDAT LAST"),  # RFC 3030
    ("bad-sequence", ("DATA",), lambda it: it.parameters.get("BODY") == "BINARYMIME" and "BINARYMIME needs BDAT"),
    ("bad-sequence", ("RCPT",), lambda it: not (it.is_in_mail or it.may_be_blind) and "RCPT needs an accepted MAIL"),
    ("nested-mail", ("MAIL",), lambda it: it.is_in_mail and not it.may_be_blind),
    ("path-syntax", _PATHS, lambda it: it.find_bad_path()),
    ("path-too-long", _PATHS, lambda it: it.local_size > 64 or it.path_size > 256),
    ("unannounced-parameter", _PATHS, lambda it: it.needed.difference(it.announced)),
    ("bad-parameter", _PATHS, lambda it: it.find_bad_parameter()),
    ("bad-parameter", ("BDAT",), lambda it: _parse_chunk(it.argument) is None and "BDAT needs a size"),
    ("undeclared-utf8", ("MAIL",), lambda it: not it.path.isascii() and "SMTPUTF8" not in it.given),
    ("undeclared-utf8", ("RCPT",), lambda it: not it.path.isascii() and "SMTPUTF8" not in it.parameters),
    ("no-recipient", ("DATA", "BDAT"), lambda it: not ((it.is_in_mail and it.recipients) or it.may_be_blind)),
)

# A code, its line and, if the text of the code is too general, a text.
_Findings = Iterator[tuple[str, ...]]


def _check_dialogue(exchanges: Sequence[_Exchange], client: _ClientState) -> _Findings:
    begins_tls = any(exchange.verb == "TLS handshake" for exchange in exchanges)
    following = [*(exchange.verb for exchange in exchanges[1:]), "QUIT"]
    for exchange, next_verb in zip(exchanges, following, strict=True):
        request = exchange.request
        if request is None:
            client.was_told_421 = client.was_told_421 or exchange.response.startswith("421")
            if exchange.was_early and not begins_tls:
                yield "early-talker", ""
        elif request.verb == "TLS handshake":
            yield "tls-on-plain-port", request.line
        elif client.ignores_rest and request.verb not in _VERBS:
            continue
        elif client.ignores_refusal:  # up to the end of the mail that was sent all the same
            client.ignores_refusal = request.line != "."
        else:
            client.read(request, exchange)
            client.ignores_rest = False
            if client.chunk and client.has_more and next_verb not in _VERBS:
                yield "bad-parameter", client.chunk, "a chunk is longer than BDAT says"
                client.has_more, client.ignores_rest = False, True
            yield from client.faults
            for code, verbs, is_wrong in _DIALOGUE_CHECKS:
                found = is_wrong(client) if not verbs or client.verb in verbs else None
                if found:
                    yield code, client.line, *([found] if isinstance(found, str) else [])
            client.advance()


# Patterns for a mail or a body with a CRLF before it. Most begin with a byte, which is found fast.
_HEAD_END = rb"\A\r\n(?=[ \t])|\n(?![!-9;-~\x80-\xff]+:|[ \t])"  # a name that is not ASCII is still a name
_NO_BODY = rb"\A(?!\r?\n)."  # it must be empty, or begin with the empty line
_NOT_ASCII = rb"[^\0-\x7f]"
_NOT_QUOTED = (  # lines of 77 and 78 are let through, because CPython's `email` makes them
    rb"\n[^\r\n]{79}|=(?![0-9A-Fa-f]{2}|[ \t]*(?:\r?\n|\Z))|[^= \t\r\n][ \t]+\r?\n|[^\t\r\n -~]"
)
_CONTENT_CHECKS = {
    "bare-lf": rb"\n(?<!\r\n)",
    "bare-cr": rb"\r(?!\n)",
    "nul-byte": rb"\0",
    "false-end": rb"\n(?<!\r\n)\.\r?\n|\r\.[\r\n]",
    "long-line": rb"\n[^\r\n]{999}",
}
_LOWER_HEX = rb"=(?:[a-f][0-9A-Fa-f]|[0-9A-F][a-f])"
_ENCODINGS = {
    "7bit": ("8bit-in-7bit", _NOT_ASCII),
    "base64": ("bad-base64", rb"\n[^\r\n]{77}|[^A-Za-z0-9+/=\s]|=\s*(?:[^=\s]|=\s*=)"),
    "quoted-printable": ("bad-quoted-printable", _NOT_QUOTED),
}

_ADDRESS_HEADERS = ("from", "sender", "reply-to", "to", "cc")
_SINGULAR_HEADERS = {*_ADDRESS_HEADERS, *_MIME, "date", "bcc", "message-id", "in-reply-to", "references", "subject"}
_SINGULAR_HEADERS |= {"mime-version", "content-id"}
_REPORTS = ("message/delivery-status", "message/disposition-notification")  # RFC 3464 section 2.1, RFC 8098 section 3.1
# What begins the names that IANA registers for charsets, and that Python does not know.
_REGISTERED_CHARSETS = (
    r"(?i)(?:iso(?![-_]?8859-?\d+$)|cs|(?:ccsid|cp|ibm)(?=0|[2489]\d\d$|1047|50220|51932)|cp-ar|ibm-|ebcdic|osd_|nats|hp-|"
    r"[jk][ips]s?[-_]|ksc_?5|n[cfs]_|jus_|ventura|inis|greek|latin(?:-9$|-[gl]|1-)|ansi_|bs_|ds_?2|gb_|ami|asmo|x02|t\.|"
    r"pc[8-]|adobe|mnem|[a-z]{2}2?$|windows-(?:31j|874|936)$|(?:us|dk)-|851|904|arabic7|bocu|brf|cesu|cuba|de[cn]|din_|e13b|"
    r"ecma-|extended_|gost|iec_|invar|irv|katakana|koi[78]-|lap|mac|microsoft-|msz|naplps|ref|scsu|sen_|serbian|st_|tscii|"
    r"unicode-1|unknown-8|utf-7-|videotex|viqr|viscii)[\w.:()+-]*"
)
_WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DATE = (  # with the years and zones of RFC 5322 section 4.3
    r"(?i)\s*(?:(Mon|Tue|Wed|Thu|Fri|Sat|Sun)\s*,\s*)?([0-9]{1,2})\s+([A-Z]{3})\s+([0-9]{2,4})\s+(?:[01][0-9]|2[0-3])"
    r":[0-5][0-9](?::[0-5][0-9]|:60)?\s+([+-][0-9]{2}[0-5][0-9]|UT|GMT|[ECMP][SD]T|[A-IK-Z])\s*"
)

# The grammar of RFC 5322 section 3 is that of an outline: a for an atom, q for a quoted string, l for a domain literal,
# a space for comments and white space, and other characters as they are. Only one way leads through each pattern, so
# that the time is linear. What is obsolete (section 4) is understood.
_TOKENS = r"(?P<q>\"+)|(?P<l>\[[^][\\]*\])|(?P<a>[^\0- \"(),.:;<>@[\\\]\x7f]+)|\s+"
_ADDR_SPEC = r" ?(?:a(?:\.a)*|q) ?@ ?(?:a(?:\.a)*|l) ?"
_OLD_ADDR_SPEC = r" ?[aq] ?(?:\. ?[aq] ?)*@ ?(?:a ?(?:\. ?a ?)*|l ?)"
_ID = r"<a(?:\.a)*@(?:a(?:\.a)*|l)>"


def _list_addresses(name: str, address: str, route: str = "") -> str:
    mailbox = rf"(?:(?:{name}| ?)<{route}{address}> ?|{address})"
    item = rf"(?:{mailbox}|{name}:(?: ?|{mailbox}(?:,{mailbox})*); ?)"
    return rf"{item}(?:,{item})*"


# The code, the grammar, the same with what is obsolete, and what to change in that.
_OLD_LIST = _list_addresses(r" ?[aq][aq. ]*", _OLD_ADDR_SPEC, r"(?:@a(?:\.a)*(?:,@a(?:\.a)*)*:)?")
_ADDRESSES = "bad-address", _list_addresses(r" ?[aq][aq ]*", _ADDR_SPEC), _OLD_LIST, "quote a name that has a dot"
_IDS = "bad-message-id", rf" ?{_ID}(?: ?{_ID})* ?", rf"[aq ]*(?:<{_OLD_ADDR_SPEC}>[aq ]*)+", "write only <left@right>"
_GRAMMARS = {
    **dict.fromkeys(_ADDRESS_HEADERS, _ADDRESSES),
    **dict.fromkeys(("in-reply-to", "references"), _IDS),
    **dict.fromkeys(("message-id", "content-id"), (_IDS[0], rf" ?{_ID} ?", rf" ?<{_OLD_ADDR_SPEC}> ?", _IDS[3])),
}
_SEVERAL = r"@[^,@]*,[^,@]*@"  # addresses
_CURES = (  # by the code and a pattern of the outline
    ("bad-address", r"(?:\A|[,:]) ?(?:,|\Z)", "leave out an empty element of a list, or a header without an address"),
    ("bad-address", r"<[^<>@]*@[^<>@]*>", "quote a name that has , . : @ [ or ]"),
    ("bad-message-id", r">[^<>]*,", "separate ids by white space and not by commas"),
)
# The grammar of RFC 2045 section 5.1 and RFC 2183 section 2 is that of the value, with quotes for what is quoted.
_STRICT_PARAMETER = rf";\s*({_TOKEN})\s*=\s*({_TOKEN}|\"+)"
_MIME_GRAMMARS = {
    _TYPE: ("bad-content-type", rf"\s*({_TOKEN})\s*/\s*({_TOKEN})(?:\s*{_STRICT_PARAMETER})*[\s;]*"),
    _DISPOSITION: ("bad-disposition", rf"\s*{_TOKEN}(?:\s*{_STRICT_PARAMETER})*[\s;]*"),
    "mime-version": ("bad-mime-version", r"\s*1\s*\.\s*0\s*"),
}
_BOUNDARY = r"[\w'()+,./:=? -]{0,69}[\w'()+,./:=?-]"  # RFC 2046 section 5.1.1
_BAD_CHARACTERS = (
    ("header-syntax", r"\n[ \t]+(?:[\r\n]|\Z)", _BLANK_LINE),
    ("header-syntax", r"[\1-\x08\x0b\x0c\x0e-\x1f\x7f]", "a header must not have control characters"),
)


def _find_line(code: str, pattern: bytes, data: bytes) -> _Findings:
    """The line of the first match, if there is one."""
    match = re.search(pattern, data)
    if match is not None:
        start = data.rfind(b"\n", 0, match.end() - 1) + 1
        yield code, _decode(data[start : start + 200].partition(b"\n")[0].rstrip(b"\r"))


def _check_content(content: bytes, client: _ClientState, is_counted: bool) -> _Findings:
    data, kind, size = b"\r\n" + content, client.parameters.get("BODY"), client.parameters.get("SIZE", "")
    for code, pattern in _CONTENT_CHECKS.items() if not (is_counted and kind == "BINARYMIME") else ():
        if code != "false-end" or not is_counted:
            yield from _find_line(code, pattern, data)
    if re.fullmatch("[0-9]{1,20}", size) and len(content) > int(size) + 2:  # some do not count the last CRLF
        yield "size-understated", f"SIZE={size} for {len(content)} bytes"
    end = re.search(_HEAD_END, data)
    head, body = (data[: end.end()], data[end.end() :]) if end else (data, b"")
    yield from _find_line("header-syntax", _NO_BODY, body)
    yield from _find_line("header-syntax", rb"\n[!-9;-~]*[\x80-\xff][!-9;-~\x80-\xff]*:", head)
    if "8BITMIME" not in client.announced or kind not in ("8BITMIME", "BINARYMIME"):
        code = "8bit-undeclared" if "8BITMIME" in client.announced else "8bit-unannounced"
        yield from _find_line(code, _NOT_ASCII, body)


def _hide_words(value: str) -> str:
    return re.sub(_ENCODED_WORD, lambda match: "x" * len(match[0]), value)


def _mask(value: str) -> str:
    """The value with spaces in place of comments, and quotes of what is quoted; positions stay.

    If a quote or a comment is not closed, there is a backslash at the end, which no grammar allows.
    """
    depth, is_quoted, masked = 0, False, []
    for token in re.findall(r"(?s)\\.?|[\"()]|[^\\\"()]+", value):
        is_quoted ^= token == '"' and not depth
        depth += token == "(" and not is_quoted
        masked.append(" " * len(token) if depth else '"' * len(token) if is_quoted else token)
        depth -= token == ")" and depth > 0
    return "".join(masked) + "\\" * (depth > 0 or is_quoted)


def _outline(value: str) -> str:
    return re.sub(_TOKENS, lambda match: match.lastgroup or " ", _mask(_hide_words(value)))


def _is_cut_off(data: bytes, encoding: str) -> bool:
    return encoding == "base64" and len(b"".join(data.split())) % 4 > 0


def _check_charset(data: bytes, charset: str, *finding: str) -> _Findings:
    """The finding is that of data that cannot be decoded."""
    try:
        data.decode(_find_codec(charset))
    except LookupError:
        if not (data.isascii() or re.fullmatch(_REGISTERED_CHARSETS, charset)):
            yield "unknown-charset", f"charset={charset}"
    except ValueError as error:
        is_cut = getattr(error, "reason", "") in ("unexpected end of data", "incomplete multibyte sequence")
        yield (*finding[:2], "a character is split or cut off: encode it as a whole") if is_cut else finding


def _pick(code: str, line: str, faults: Mapping[str, object]) -> list[tuple[str, ...]]:
    """The first fault that is there, as a finding."""
    return [(code, line, *([text] if text else [])) for text, is_wrong in faults.items() if is_wrong][:1]


def _check_word(match: re.Match[str], line: str, place: str) -> _Findings:
    """The place is that in a list of addresses: " in a quoted string, x outside of it and of comments."""
    charset, kind, text = match.groups()
    around = match.string[max(match.start() - 1, 0) : match.start()], match.string[match.end() : match.end() + 1]
    is_q, encoding = kind in "Qq", {"b": "base64", "q": "quoted-printable"}.get(kind.lower(), "")
    is_bad_name = is_q and place == "x" and re.search(r"[^\w!*+/=-]", text)  # RFC 2047 section 5 (3)
    raw = text.encode("utf-8", "surrogateescape")
    is_wrong = not encoding or re.search(_ENCODINGS[encoding][1], raw + b"x" * is_q)  # for a = at the end of a word
    faults = {
        "an encoded word in quotes is not decoded": '"' in (*around, place),
        "an address must not have an encoded word": "@" in around or around == ("<", ">"),
        _NO_SPACE: "".join(around).strip("( \t\r\n)"),
        "an encoded word is empty or has white space in it": not re.fullmatch(r"[!-~]+", text),
        "a Q word in a name must have letters, digits and !*+-/=_ only": is_bad_name,
        "": is_wrong or _is_cut_off(raw, encoding),
    }
    found = _pick("encoded-word", line, faults)
    data = b"" if found else _decode_content(raw, encoding)
    yield from found or _check_charset(data, charset.partition("*")[0], "encoded-word", line)


def _check_date(value: str, line: str) -> _Findings:
    import datetime

    match = re.fullmatch(_DATE, _mask(value))
    weekday, day, month, year, zone = match.groups() if match else (None, "0", "", "0", "")
    century = {2: 1900 if year > "49" else 2000, 3: 1900}.get(len(year), 0)
    try:
        date = datetime.date(int(year) + century, _MONTHS.index(month.lower()) + 1, int(day))
    except ValueError:
        yield "bad-date", line
    else:
        if weekday is not None and weekday.lower() != _WEEKDAYS[date.weekday()]:
            yield "bad-date", line, "this date is on another day of the week"
        elif century or zone.isalpha():
            yield "obsolete-syntax", line, "write the year with four digits, and the zone like +0000"


def _check_grammar(name: str, value: str, line: str) -> _Findings:
    (code, grammar, old_grammar, cure), outline = _GRAMMARS[name], _outline(value)
    if not re.fullmatch(old_grammar, outline):
        cures = [text for about, pattern, text in _CURES if about == code and re.search(pattern, outline)]
        yield code, line, *cures[:1]
    elif name == "sender" and re.search(_SEVERAL, outline):
        yield code, line, "a Sender must have one address only"
    elif not re.fullmatch(grammar, outline):
        yield "obsolete-syntax", line, cure
    elif name == "from" and ";" in outline:
        yield "group-in-from", line


def _check_sections(code: str, value: str, line: str) -> _Findings:
    """Of parameters with a * in their names (RFC 2231)."""
    import urllib.parse

    sections: dict[str, list[tuple[str, str]]] = {}
    for match in re.finditer(_STRICT_PARAMETER, _mask(value)):
        base, star, number = match[1].lower().partition("*")
        sections.setdefault(base, []).extend([(number, value[match.start(2) : match.end(2)])] if star else [])
    for parts in sections.values():
        parts.sort(key=lambda part: (len(part[0].rstrip("*")), part[0]))
        numbers = [number.rstrip("*") for number, _ in parts if number]
        texts = [text for number, text in parts if not number.isdigit()]
        encoded, charset = "".join(texts), re.match(r"([^']*)'[^']*'", "".join(texts[:1]))
        faults = {
            "the numbers after * must be 0, 1, 2 and so on": numbers != [*map(str, range(len(numbers)))],
            "a value after *= must not be in quotes": '"' in encoded,
            "a % must have two hexadecimal digits after it": re.search("%(?![0-9A-Fa-f]{2})", encoded),
            "a charset must come first, as in utf-8''a%20b": encoded and not charset,
        }
        found = _pick(code, line, faults)
        data = urllib.parse.unquote_to_bytes(encoded[charset.end() :]) if charset else b""
        name = (charset and charset[1]) or "latin-1"  # it may be empty
        yield from found or _check_charset(data, name, code, line, "a value is not in its charset")


def _check_mime_grammar(name: str, value: str, line: str) -> _Findings:
    code, grammar = _MIME_GRAMMARS[name]
    if re.search(_ENCODED_WORD, value):
        yield "encoded-parameter", line
    if re.fullmatch(grammar, _mask(value)):
        yield from _check_sections(code, value, line)
    else:
        yield code, line


def _check_headers(fields: list[tuple[str, str]], client: _ClientState) -> _Findings:
    """Of several headers with the same name, only the characters of the others are checked."""
    seen: set[str] = set()
    raw = r"[\ud800-\udfff]" if "SMTPUTF8" in client.parameters else r"[^\0-\x7f]"
    for name, value in fields:
        key, line = name.lower(), f"{name}: {value[:200]}"
        yield from ((code, line, text) for code, pattern, text in _BAD_CHARACTERS if re.search(pattern, value))
        if re.search(raw, _decode(value.encode("utf-8", "surrogateescape"))):
            yield "header-raw", line, *["with SMTPUTF8, a header must be UTF-8"]["SMTPUTF8" not in client.parameters :]
        if key in seen:
            yield from [("header-duplicate", line)] if key in _SINGULAR_HEADERS else []
            continue
        seen.add(key)
        yield from _check_date(value, line) if key == "date" else ()
        yield from _check_grammar(key, value, line) if key in _GRAMMARS else ()
        yield from _check_mime_grammar(key, value, line) if key in _MIME_GRAMMARS else ()
        masked = _mask(_hide_words(value)) if "=?" in value and key in _ADDRESS_HEADERS else ""
        for match in re.finditer(_ENCODED_WORD, value) if key not in _MIME else ():
            yield from _check_word(match, line, masked[match.start() : match.start() + 1])
            yield from [("encoded-word-long", line)] * (len(match[0]) > 76)  # CPython's `email` makes words of 76


def _check_header_set(first: dict[str, str], client: _ClientState) -> _Findings:
    """Which headers must be there, and which must not."""
    resent = ["Resent-Date", "Resent-From"] if any(name.startswith("resent-") for name in first) else []
    yield from (("header-missing", name) for name in ("Date", "From", *resent) if name.lower() not in first)
    if "sender" not in first and re.search(_SEVERAL, _outline(first.get("from", ""))):
        yield "header-missing", "Sender", _NO_SENDER
    if "message-id" not in first:
        yield "no-message-id", ""
    if "mime-version" not in first:
        yield from [("no-mime-version", f"{name}: {first[name]}") for name in _MIME if name in first][:1]
    words = re.findall(r"[^\s<>(),:;\"]+", f"{first.get('bcc')} {first.get('resent-bcc')}".lower())
    hidden = [word for word in words if "@" in word]
    if not set(hidden).issuperset(client.recipients):  # else this is the copy for the hidden ones
        yield from (("bcc-disclosed", address) for address in hidden)


def _check_encoding(kind: str, encoding: str, client: _ClientState) -> _Findings:
    is_composite = kind.startswith("multipart/") or kind in ("message/rfc822", "message/partial")
    is_plain = encoding in ("7bit", "8bit", "binary")
    faults = {
        f"a {kind} must be 7bit": kind in _REPORTS and encoding != "7bit",
        "binary needs BODY=BINARYMIME": encoding == "binary" and client.parameters.get("BODY") != "BINARYMIME",
        "a multipart or a mail in it must be 7bit, 8bit or binary": is_composite and not is_plain,
        "": not (is_plain or encoding in _ENCODINGS or encoding.startswith("x-")),  # RFC 2045 section 6.3 allows x-
    }
    yield from _pick("bad-encoding", f"Content-Transfer-Encoding: {encoding}", faults)


def _check_boundary(part: Any, boundary: str | None, outer: tuple[str, ...], line: str) -> _Findings:
    defects = {type(defect).__name__ for defect in part.defects}
    is_malformed = boundary is not None and not re.fullmatch(_BOUNDARY, boundary, re.ASCII)
    faults = {
        "there is no boundary parameter": boundary is None and "NoBoundaryInMultipartDefect" in defects,
        "a boundary has 1 to 70 letters, digits, '()+_,-./:=? and spaces": is_malformed,
        "the boundary begins with that of the multipart around it": (boundary or "").startswith(outer),
        "no line opens the first part": "StartBoundaryNotFoundDefect" in defects,
        "no line closes the last part": "CloseBoundaryNotFoundDefect" in defects,
    }
    yield from _pick("bad-boundary", line, faults)


def _check_body(part: Any, kind: str, encoding: str, charset: str | None) -> _Findings:
    data = b"\r\n" + str(part._payload).encode("utf-8", "surrogateescape")  # get_payload() would decode it
    code, pattern = _ENCODINGS.get(encoding, ("", rb"(?!)"))
    found = list(_find_line(code, pattern, data)) or [(code, encoding)] * _is_cut_off(data, encoding)
    yield from found
    if encoding == "quoted-printable" and not found:
        yield from ((*lower, "write =C3 and not =c3") for lower in _find_line(code, _LOWER_HEX, data))
    if not found and (kind == "text/plain" or (charset is not None and kind.startswith("text/"))):
        cure = ["a text that is not ASCII needs a charset, such as utf-8"] if charset is None else []
        data, charset = _decode_content(data, encoding), charset or "us-ascii"
        yield from _check_charset(data, charset, "wrong-charset", f"charset={charset}", *cure)


def _check_mail(message: Message, client: _ClientState) -> _Findings:
    # Each part with the boundaries of the multiparts around it, and the line of one of those that is labelled 7bit.
    parts: list[tuple[Any, tuple[str, ...], str]] = [(message.email, (), "")]
    while parts:
        part, outer, label = parts.pop()
        is_mail = part is message.email
        ours = message.mailfrom + bool(message.received_header) if is_mail else 0
        fields = list(part.raw_items())[ours:]
        first = {name.lower(): value for name, value in reversed(fields)}
        yield from _check_header_set(first, client) if is_mail else ()
        yield from _check_headers(fields, client)
        (kind, parameters), line = _read_mime(part, _TYPE), f"Content-Type: {first.get(_TYPE)}"
        encoding, boundary = _mask(first.get(_ENCODING, "7bit")).strip().lower(), parameters.get("boundary")
        yield from _check_encoding(kind, encoding, client)
        if not is_mail and any(type(defect).__name__ == "MissingHeaderBodySeparatorDefect" for defect in part.defects):
            yield "header-syntax", line
        texts = [part.preamble, part.epilogue] if part.is_multipart() else [part._payload]
        if kind.startswith("multipart/"):
            yield from _check_boundary(part, boundary, outer, line)
            label = label or line * (_ENCODING in first and encoding == "7bit")
        elif not part.is_multipart():
            found = [*_check_body(part, kind or "text/plain", encoding, parameters.get("charset"))]
            texts = [] if found else texts
            yield from found
        if label and not all(str(text or "").isascii() for text in texts):
            yield "8bit-in-7bit", label, "a multipart that is labelled 7bit has a part that is not ASCII"
        if part.is_multipart() and kind.startswith("multipart/"):  # a mail within the mail is by others
            parts += [(inner, (*outer, str(boundary)), label) for inner in reversed(part.get_payload())]


def _find_violations(message: Message) -> list[Violation]:
    """In the order of the dialogue and then of the mail, one for each code and line."""
    exchanges, steps, client = message._exchanges[: message._length], message._steps, _ClientState()
    # What comes before a truncation is not complete.
    begin = max((at for at, exchange in enumerate(exchanges) if exchange.verb == "truncated"), default=-1) + 1
    found = [*_check_dialogue(exchanges[begin:], client)]
    client.recipients += [address.lower() for address in message.rcpt_tos if begin]
    body, data = steps.get("msg"), steps.get("data")
    # A client that got a 354 although it has no recipient must send a lone dot (RFC 2920 section 3.1).
    if body is not None and body.verb == "message" and body.value is not None and (body.value or client.recipients):
        found += _check_content(body.value, client, data is not None and data.verb == "BDAT")
        found += _check_mail(message, client)
    elif body is not None and body.verb == "partial message" and body.value and not (data and data.verb == "BDAT"):
        for code in ("bare-lf", "false-end"):  # what is certain of a body that has not ended
            found += _find_line(code, _CONTENT_CHECKS[code], b"\r\n" + body.value)
    violations: dict[tuple[str, str], Violation] = {}
    for code, line, *texts in found:
        if code not in message._tolerated:
            text, rfc, severity = _VIOLATIONS[code]
            said = line[:200].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")[:200]
            violations.setdefault((code, said), Violation(code, [*texts, text][0], rfc, severity, said))
    return list(violations.values())


# ----------------------------------------------------------------------------------------- records


class Exchange(NamedTuple):
    """A request of the client and the response of the server, as both may be shown."""

    request: str | None  #: "<9 bytes>" for a body, *** for a secret, None where the server speaks unasked
    response: str | None  #: without the last CRLF; None where there is none
    accepted: bool  #: whether the command took effect
    at: datetime.datetime  #: when the request arrived, in UTC; differences are those of a monotonic clock


def _shorten(value: object) -> str:
    """The repr of a value, in at most 100 characters."""
    text = repr(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 100 else f"{text[:97]}..."


class _StepField(property, Generic[_T]):
    """An attribute of Message that is read from the exchange of one step; the default if that is missing."""

    def __init__(self, step: str, path: str, default: _T, about: str) -> None:
        self.__doc__ = about
        self.step, self.path, self.default = step, path.split("."), default

    def __get__(self, message: Any, owner: Any = None) -> _T:  # type: ignore[override]
        value: Any = message._steps.get(self.step)
        for name in self.path:
            value = getattr(value, name, None)
        return self.default if value is None else value


def _make_fields(step: str) -> tuple[_StepField[str], _StepField[str], _StepField[bool]]:
    request = _StepField(step, "line", "", f"The last {step} command as the client wrote it; secrets are ***.")
    response = _StepField(step, "response", "", "The reply to it.")
    return request, response, _StepField(step, "accepted", False, "Whether it took effect.")


class Attachment(NamedTuple):
    """A part of a mail that is not its text."""

    name: str | None
    type: str
    content: bytes


def _jsonify_bytes(data: bytes) -> dict[str, str]:
    import base64

    try:
        return {"content": data.decode(), "content_encoding": "utf-8"}
    except UnicodeDecodeError:
        return {"content": base64.b64encode(data).decode(), "content_encoding": "base64"}


def _jsonify(value: Any) -> Any:
    """The value for JSON, with escapes in place of the surrogates that stand for bytes: few readers accept those."""
    value = value._asdict() if isinstance(value, (Violation, Exchange)) else value
    if isinstance(value, dict):
        return {_jsonify(name): _jsonify(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonify(item) for item in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


# Parts of a transcript, each with a hint at what may have been intended.
_HINTS = {
    r"C: AUTH.*\nS: 50[0-4]": "auth_users turns on AUTH",
    r"C: STARTTLS\nS: 50[0-4]": "ssl_context turns on STARTTLS",
    r"C: (?:HELO|EHLO|MAIL|RCPT)[^>\n]*>?\nS: 501": "lenient_addresses accepts more names",
    r"C: (?:(?:BDAT|VRFY|EXPN|HELP).*\nS: 50[0-4]|(?:MAIL|RCPT)[^>\n]*>.+\nS: 5[05])": "extensions turns on more",
    r"C: EHLO.*\n(?:S: (?!.*(?:AUTH|TLS)).*\n)+(?:C: QUIT\n.*\n.*\n)?\Z": "auth_users turns on AUTH, ssl_context TLS",
}

# Attributes of messages in other tools, and the names of ours.
_OTHER_ATTRIBUTES = {
    "mail_from": "sender from_ from_addr from_address envelope_from",
    "rcpt_tos": "to recipients recipient to_addrs rcpttos rcpt_to envelope_to",
    'mail_from and rcpt_tos, or email["To"]': "envelope addresses cc bcc reply_to",
    "text, html or content": "body payload get_payload get_content message parts walk text_body html_body plain",
    "content": "raw raw_content bytes source",
    'email["To"]': "headers header get items date as_string",
    "exchanges": "commands dialogue session",
}


class Message:
    """The record of an SMTP session or, with multiple_message_receiving, of one mail in it.

    Each step of the dialogue has three attributes: the request as the client wrote it, the response as
    it was sent and, under the step's own name, whether it succeeded. A Message is read-only and never
    changes. While its session goes on, messages() returns a newer object in its place.
    """

    helo_request, helo_response, helo = _make_fields("helo")
    mailfrom_request, mailfrom_response, mailfrom = _make_fields("mailfrom")
    mail_from = _StepField[str | None]("mailfrom", "value.address", None, 'The sender, "" for <>; None if not valid.')
    data_request, data_response, data = _make_fields("data")
    content = _StepField("msg", "value", b"", "The body, dots unstuffed, CRLF kept; partial if aborted.")
    msg_response = _StepField("msg", "response", "", "The reply to the body.")
    msg = _StepField("msg", "accepted", False, "Whether the body was accepted.")
    rset_request, rset_response, rset = _make_fields("rset")
    noop = _StepField("noop", "accepted", False, "Whether NOOP was accepted.")
    quit_sent = _StepField("quit", "accepted", False, "Whether QUIT was accepted.")
    auth_request, auth_response, auth = _make_fields("auth")
    auth_mechanism = _StepField[str | None]("auth", "value.mechanism", None, "The mechanism, also if the login failed.")
    auth_user = _StepField[str | None]("auth", "value.user", None, "The user, likewise.")
    tls = _StepField[tuple[str, str] | None]("tls", "value", None, "(version, cipher); None without TLS.")

    _steps: dict[str, _Exchange]
    _recipients: list[_Exchange]
    _count: int
    _id: int
    _peer: tuple[str, int]
    _exchanges: list[_Exchange]
    _length: int
    _discarded: int
    _tolerated: Collection[str]
    _findings = functools.cached_property(_find_violations)

    def __init__(self, mail: _Mail, peer: tuple[str, int], id: int, tolerated: Collection[str]) -> None:
        # The session goes on appending to the lists, so their present lengths are kept with them.
        fields = self.__dict__  # because __setattr__() allows nothing; items are set faster than by update()
        fields["_id"] = id
        fields["_peer"] = peer
        fields["_tolerated"] = tolerated
        fields["_steps"] = mail.steps.copy()
        fields["_recipients"] = mail.recipients
        fields["_count"] = len(mail.recipients)
        fields["_exchanges"] = mail.exchanges
        fields["_length"] = len(mail.exchanges)
        fields["_discarded"] = mail.discarded

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Message is read-only: {name} cannot be set")

    if not TYPE_CHECKING:  # otherwise type checkers would accept any name

        def __getattr__(self, name: str) -> NoReturn:
            hint = _find_other_name(name, _OTHER_ATTRIBUTES)
            raise AttributeError(f"a Message has no attribute {name!r}{hint}")

        def __getitem__(self, name: object) -> NoReturn:
            raise TypeError(f"a Message is no mapping; its headers are in its email: message.email[{name!r}]")

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the record, without what was parsed from it and cached."""
        cached = ("transcript", "received_header", "_mail", "_parts", "_findings")
        values = vars(self).copy()  # at once: another thread may cache something meanwhile
        values["_recipients"] = self._recipients[: self._count]
        values["_exchanges"] = self._exchanges[: self._length]
        return {name: value for name, value in values.items() if name not in cached}

    @property
    def id(self) -> int:
        """Unique among the messages of the server."""
        return self._id

    @property
    def peer(self) -> tuple[str, int]:
        """The client's address and port."""
        return self._peer

    @property
    def rcptto_request_response(self) -> list[tuple[str, str]]:
        """(request, response) of each RCPT TO; without multiple_rcptto, of the last."""
        return [(exchange.line, exchange.response) for exchange in self._recipients[: self._count]]

    @property
    def rcpt_tos(self) -> list[str]:
        """The accepted recipients; without multiple_rcptto, the last one, if it was accepted."""
        return [exchange.value.address for exchange in self._recipients[: self._count] if exchange.accepted]

    @property
    def rcptto(self) -> bool:
        """Whether there is one."""
        return bool(self.rcpt_tos)

    @property
    def mailfrom_parameters(self) -> dict[str, str]:
        """The parameters of MAIL FROM, such as {"SIZE": "1000", "SMTPUTF8": ""}."""
        sender = self._steps.get("mailfrom")
        return dict(sender.value.parameters) if sender is not None and sender.value is not None else {}

    @property
    def rcptto_parameters(self) -> list[dict[str, str]]:
        """The parameters of each of the rcpt_tos."""
        return [dict(exchange.value.parameters) for exchange in self._recipients[: self._count] if exchange.accepted]

    @property
    def msg_request(self) -> str:
        """The content as str: UTF-8, with surrogates for bytes that are not."""
        return _decode(self.content)

    @property
    def exchanges(self) -> list[Exchange]:
        """The greeting, HELO, TLS and AUTH that are in force, and all that was said since the mail before."""
        import datetime

        return [
            Exchange(
                None if request is None else request.line,
                reply.text if reply is not None and reply.data else None,
                reply is not None and reply.accepts,
                datetime.datetime.fromtimestamp(at, datetime.timezone.utc),
            )
            for request, reply, _, at, _ in self._exchanges[: self._length]
            if request is not None or (reply is not None and reply.data)
        ]

    @property
    def refusals(self) -> list[tuple[str, str]]:
        """(request, response) of each of the exchanges that got a 4xx or 5xx, even if a repeated command erased it."""
        return [(said.line, said.response) for said in self._exchanges[: self._length] if said.is_refused]

    def _find_discards(self) -> Iterator[tuple[str, str]]:
        """What was accepted and not kept, each with the option that keeps it."""
        said = self._exchanges[: self._length]
        last_mail = max((at for at, one in enumerate(said) if one.verb == "MAIL" and one.accepted), default=0)
        recipients = [one.accepted for one in said[last_mail:] if one.verb == "RCPT"]
        has_lost_all = any(one.verb in ("DATA", "BDAT") and one.is_refused for one in said[last_mail:])
        has_lost_all = has_lost_all and recipients[-1:] == [False]  # and its refusal has undone the others
        for option, what, count, kept in (
            ("multiple_rcptto", "recipients", sum(recipients) * (self.msg or has_lost_all), len(self.rcpt_tos)),
            ("multiple_message_receiving", "mails", self._discarded + self.msg, int(self.msg)),
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
        return self.helo and self._steps["helo"].verb == "EHLO"

    @property
    def received_at(self) -> datetime.datetime | None:
        """When the end of the accepted mail arrived, in UTC; None if it was not accepted."""
        import datetime

        return datetime.datetime.fromtimestamp(self._steps["msg"].at, datetime.timezone.utc) if self.msg else None

    @functools.cached_property
    def transcript(self) -> str:
        """The exchanges as lines such as "C: QUIT" and "S: 221 Bye"; a body is one line with its size."""
        return "\n".join(_format_exchanges(self._exchanges[: self._length]))

    def _find_hints(self) -> list[str]:
        """Yield hints at options that may help."""
        return [
            f"hint: {hint}" for pattern, hint in _HINTS.items() if re.search(f"(?i){pattern}", f"{self.transcript}\n")
        ]

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
    def _mail(self) -> _Parts:
        """What all attributes of the mail are read from."""
        from email.message import EmailMessage

        text = self.as_bytes().decode("ascii", "surrogateescape")
        start = len(text) - len(self.content) - 2 * (self.content[:1] in (b" ", b"\t"))
        mail = EmailMessage(_make_email_policy())
        _read_header(mail, text[:start])
        return _parse_part(mail, text[start:], [])

    @property
    def email(self) -> EmailMessage:
        """as_bytes() parsed. Faults are in the `defects` of its parts; they raise nothing."""
        return self._mail[0][0]

    @property
    def subject(self) -> str | None:
        """The decoded subject; None without one."""
        header = re.split(rb"(?<![^\n])\r?\n|\A[ \t]", self.content, maxsplit=1)[0].decode("ascii", "surrogateescape")
        subjects = (field[2] for field in re.finditer(_FIELD, header) if field[1].lower() == "subject")
        return next((_decode_words(_unfold(subject)) for subject in subjects), None)

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
        """The first text of each type, and all other parts."""
        texts: dict[str, str] = {}
        attachments: list[Attachment] = []
        for part, kind, parameters, content in self._mail if self.content else ():
            if content is None:
                continue
            disposition, names = _read_mime(part, _DISPOSITION)
            name = names.get("filename") or parameters.get("name") or None
            is_body = disposition != "attachment" and (name is None or part is self.email)
            if is_body and kind in ("text/plain", "text/html") and kind not in texts:
                texts[kind] = _decode_charset(content, parameters.get("charset", "")).replace("\r\n", "\n")
            else:
                attachments.append(Attachment(name, kind, content))
        return texts, attachments

    @property
    def violations(self) -> list[Violation]:
        """What the client did wrong up to and with this mail; empty for a correct client."""
        return [violation for violation in self._findings if violation.severity == "error"]

    @property
    def warnings(self) -> list[Violation]:
        """What most servers tolerate, or what an RFC only advises against."""
        return [violation for violation in self._findings if violation.severity == "warning"]

    def to_dict(self) -> dict[str, Any]:
        """Every attribute as values for JSON. `content` is text if it is UTF-8, else base64: see `content_encoding`."""
        others = ("content", "msg_request", "as_bytes", "email", "to_dict")
        names = [name for name in vars(Message) if not name.startswith("_") and name not in others]
        values = {name: getattr(self, name) for name in names}
        values["headers"] = list(_show_headers(self.email))
        values["defects"] = [f"{type(fault).__name__}: {fault}" for part, *_ in self._mail for fault in part.defects]
        values["attachments"] = [item._asdict() | _jsonify_bytes(item.content) for item in self.attachments]
        return dict(_jsonify(values | _jsonify_bytes(self.content)))

    def __repr__(self) -> str:
        replies = [response for _, response, *_ in self.exchanges if response is not None]
        end = f"not accepted, last reply {_shorten(replies[-1])}" if replies else "no reply"
        if self.is_consistent:
            end = "accepted"
        elif self.refusals:
            request, response = self.refusals[0]
            end = f"not accepted, {_shorten(request)} was refused with {_shorten(response)}"
        names = ", ".join([_shorten(name) for name in self.rcpt_tos[:3]] + ["..."] * (len(self.rcpt_tos) > 3))
        return f"<Message {self.id} from {_shorten(self.mail_from)} to [{names}]: {len(self.content)} bytes, {end}>"


# ------------------------------------------------------------------------------------------- rules

_Match = Callable[[str], object] | str | re.Pattern[str] | None
_Function = Callable[[str, Message], Any]

_PROBABILITY = _OptionType("a number from 0 to 1", _number(0, 1, int, float), float)
_TIMES = _OptionType("an integer from 1 up", _number(1, float("inf"), int), int)
_BYTES = _OptionType(
    "bytes",
    lambda value: isinstance(value, bytes),
    lambda text: text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode("latin-1"),
)
_THEN = {"close": _Next.CLOSE, "drop": _Next.CLOSE, "reset": _Next.RESET, "silence": _Next.SILENCE}
_SAYS_TWICE = r"(?:^|\n)[0-9]{3}(?: .*)?\n(?:\Z|[0-9]{3}(?:[ \n]|\Z))"  # a last line, followed by another or by nothing
_REPLY_TEXT = _OptionType(
    "a string such as '550 No', with one last line; raw() sends any bytes",
    lambda value: _is_text(value) and not re.search(_SAYS_TWICE, value.replace("\r\n", "\n")),
)
_ENDING = _OptionType(f"one of {', '.join(_THEN)}", lambda value: isinstance(value, str) and value in _THEN)

# The four aspects of a reply that rules decide: str or bytes to say, seconds, seconds, a _Next.
_ASPECTS = ("reply", "delay", "trickle", "then")


def _find_aspects(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The aspects of a reply that these fields of an Action set. A reply of None is the normal one; raw comes last."""
    aspects = {"reply" if name in ("reply", "raw") else name: value for name, value in fields.items()}
    if isinstance(fields.get("then"), str):
        aspects["then"] = _THEN[fields["then"]]
        if fields["then"] != "close":
            aspects["reply"] = b""
    return aspects


class Action(_Options, kw_only=False):
    """What a rule does. A field that is None leaves its aspect of the reply as it is without the rule."""

    reply: str | None = _option(None, _REPLY_TEXT, "the text of the reply")
    raw: bytes | None = _option(None, _BYTES, "bytes in place of the reply")
    delay: float | None = _option(None, _SECONDS, "seconds before the reply")
    trickle: float | None = _option(None, _SECONDS, "seconds between two bytes of the reply")
    then: Literal["close", "drop", "reset", "silence"] | None = _option(None, _ENDING, "close; others send no reply")


class _Conditions(_Options):
    skip: int = _option(0, _COUNT, "matches that it lets pass")
    times: int | None = _option(None, _TIMES, "uses; without end by default")
    probability: float = _option(1.0, _PROBABILITY, "of each use")
    after: int | None = _option(None, _COUNT, "bytes of the body that have arrived")


_STAGES = {verb.upper(): verb for verb in _VERBS if verb.isupper() or verb in ("connect", "message")} | {"*": "*"}
# Words that people write for a stage.
_OTHER_STAGES = {
    "connect": "CONNECTION GREETING BANNER OPEN ACCEPT WELCOME START",
    "EHLO": "HELLO EHLOHELO HELOEHLO",
    "MAIL": "MAILFROM FROM SENDER ENVELOPE RETURNPATH",
    "RCPT": "RCPTTO TO RECIPIENT RECIPIENTS RCPTS",
    "message": "BODY CONTENT END EOM EOD DOT ENDOFDATA ENDOFMESSAGE DATAEND HEADER HEADERS SUBJECT TEXT",
    "AUTH": "LOGIN PLAIN AUTHENTICATE AUTHENTICATION AUTHLOGIN AUTHPLAIN PASSWORD USER",
    "STARTTLS": "TLS SSL HANDSHAKE",
    "QUIT": "DISCONNECT CLOSE BYE EXIT LOGOUT",
    "*": "ANY ALL EVERY EVERYTHING COMMAND",
}


def _parse_stage(name: object, verbs: Collection[str]) -> str:
    """connect, message, *, or a verb in upper case; MAIL FROM and RCPT TO are MAIL and RCPT."""
    text = name.upper() if isinstance(name, str) else ""
    if match := re.fullmatch(r"\s*(MAIL|RCPT)[\s:]+(?:FROM|TO)[\s:]*", text):
        return match[1]
    stage = _STAGES.get(text, text)
    if stage in ("*", *_STAGES.values(), *verbs):
        return stage
    word = "DOT" if text.strip() == "." else re.sub(r"[\W_]", "", text)
    near = _find_other_name(word, _OTHER_STAGES) or _suggest(text, _STAGES, 0.7)  # otherwise the rule would never apply
    if near or name != text or not re.fullmatch("[A-Z][A-Z0-9_-]*", text):
        allowed = "must be connect, message, * or a verb such as RCPT, in upper case if this server does not know it"
        raise ConfigurationError(f"there is no such stage{near}" if near else allowed, "stage", name)
    return stage


def _check_match(match: str, stage: str, *, is_lenient: bool) -> None:
    """Refuse a string that no address or domain of this stage can be."""
    kind = _VERBS.get(stage, _UNKNOWN_VERB)
    if kind.argument in ("", "text") and not kind.has_recipients:
        raise ConfigurationError(f"there is no address or domain at {stage}", "match", match)
    if address := re.search(r"<(.*)>$|^\*?@(.+)", match):
        raise ConfigurationError(f"did you mean {address[1] or address[2]!r}?", "match", match)
    path, domain = (_LENIENT_PATH, _LENIENT_DOMAIN) if is_lenient else (_PATH, rf"{_DOTTED}|localhost")
    is_valid = bool(_parse_domain(match, domain) or _parse_path(path, "postmaster", False, match))
    if stage not in ("MAIL", "RCPT") and not kind.has_recipients:  # a name of a host or of a user
        is_valid = stage == "AUTH" or re.fullmatch(r"[^\s,]+", match) is not None
    if not is_valid or re.search(r"\\[.dwsDWS]|\.[*+]|^\^|\$$|^\*", match):
        text = "no address or domain can be this (a single word can, with lenient_addresses); did you mean"
        raise ConfigurationError(f"{text} re.compile({match!r})? It searches the line or the body", "match", match)


class Rule:
    """A deviation from the normal replies. Server.on() makes it and says when it applies; the methods say what it does.

    Each method returns the rule. Different methods add up, and the same method called again replaces its
    first call. A function used as a decorator is called as function(request, message). It returns None
    for the normal reply, the text of another one, or an Action.
    """

    def __init__(self, rules: _Rules, stage: str, match: _Match = None, **conditions: Any) -> None:
        self._hits = 0  # guarded by the lock of the rules, like what follows
        self._skipped = 0
        self._newer: Rule | None = None  # a rule that decided everything in place of this one
        self._rules = rules
        self._stage = _parse_stage(stage, rules.verbs)
        is_pattern = isinstance(match, re.Pattern) and isinstance(match.pattern, str)
        if not (match is None or isinstance(match, str) or is_pattern or callable(match)):
            raise ConfigurationError("must be an address, a domain, a pattern of str or a function", "match", match)
        if isinstance(match, str):
            _check_match(match, self._stage, is_lenient=rules.options.lenient_addresses)
        self._match = _fold(match) if isinstance(match, str) else match
        self._when = when = _Conditions(**conditions)
        if when.after is not None and self._stage != "message":
            raise ConfigurationError(f"is for the stage message, not for {self._stage}", "after", when.after)
        self._after = when.after
        self._random: Any = None
        # Fields of an Action for each use; the last ones stay in force. Only the methods set this and the function,
        # and they replace them, so that sessions can read them without the lock.
        self._uses: tuple[dict[str, Any], ...] = ({},)
        self._function: _Function | None = None
        self._script: _Script | None = None  # the transcript's session that it plays; None if it is for all sessions

    def reply(self, *texts: str | None) -> Rule:
        """Say these texts, one per use, and the last one from then on; None is the normal reply.

        A text that begins with 4 or 5 refuses the command. With any other text, it takes effect.
        """
        for text in texts or [()]:
            if text is not None:
                _check("reply", text, _REPLY_TEXT)
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
        """Send the reply byte by byte, with this many seconds between two bytes."""
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

    @property
    def hits(self) -> int:
        """How often the rule was used."""
        return self._hits

    def __call__(self, function: _Function) -> Rule:
        """Call function(request, message), which returns None for the normal reply, a text, or an Action."""
        _check("rule", function, _CALLABLE)
        self._function = function
        return self

    if not TYPE_CHECKING:  # otherwise type checkers would accept any name

        def __getattr__(self, name: str) -> NoReturn:
            hint = "; it is an argument of on()" if name in ("match", "skip", "times", "probability", "after") else ""
            raise AttributeError(f"a Rule has no attribute {name!r}{hint}")

    def remove(self) -> None:
        """Remove the rule from its server. Removing it twice is no error."""
        self._rules.remove(self)

    def _add(self, name: str, value: Any) -> Rule:
        _check(name, value, Action._declared[name].kind)
        self._uses = tuple(use | {name: value} for use in self._uses)
        return self

    def _matches(self, text: str, names: Sequence[str]) -> bool:
        match = self._match
        if isinstance(match, re.Pattern):
            return match.search(text) is not None
        if callable(match):
            return bool(match(text))
        folded = [_fold(name) for name in names]
        return match is None or any(match in (name, name.rpartition("@")[2].lower()) for name in folded)

    def _use(
        self, wanted: Collection[str], newer: Rule | None, counts: bool
    ) -> tuple[dict[str, Any], _Function | None]:
        """The aspects that are wanted; counts a use if there are any. Called with the lock of the rules."""
        if self._skipped < self._when.skip:  # whether newer rules have decided everything or not
            self._skipped += counts
            return {}, None
        uses, function = self._uses, self._function if "reply" in wanted else None
        use = _find_aspects(uses[min(self._hits, len(uses) - 1)])
        aspects = {name: value for name, value in use.items() if name in wanted}
        if counts and not (aspects or function):
            self._newer = newer
        is_spent = self._hits == self._when.times or not (aspects or function)
        if is_spent or (self._random is not None and self._random.random() >= self._when.probability):
            return {}, None
        self._hits += counts
        return aspects, function

    def _find_nearest(self, requests: Sequence[str]) -> str:
        """The end of a message that says why it may never have been hit: a newer rule, or the nearest request."""
        import difflib

        if self._newer is not None:
            return f": the newer {self._newer!r} came first"
        similar = [request[:100] for request in requests if request[: len(self._stage)].upper() == self._stage]
        match = self._match if isinstance(self._match, str) else ""
        nearest = difflib.get_close_matches(match, dict.fromkeys(similar[-300:]), n=1, cutoff=0) or similar[-1:]
        what = "the nearest command was" if self._match or self._when.skip or self._after else "before it there was"
        return f"; {what} {_shorten(nearest[0])}" if nearest else ""

    def __repr__(self) -> str:
        skipped = f", {self._skipped} of {self._when.skip} skipped" if self._when.skip else ""
        return f"<Rule for {self._stage}{f' {self._match}' if self._match else ''}: {self._hits} hits{skipped}>"


class _Rules:
    def __init__(self, options: Configuration, verbs: Collection[str] = ()) -> None:
        self.options = options
        self.verbs = verbs  # of the server's handlers
        self.newest_first: tuple[Rule, ...] = ()  # replaced, never changed; so it can be read without the lock
        self._seeded = 0  # how many rules have a generator of random numbers
        self.scripts: tuple[_Script, ...] = ()  # for the next sessions; replaced likewise
        self._lock = threading.Lock()  # guards all but verbs and options, and of rules hits and _skipped

    def add(self, rule: Rule) -> Rule:
        with self._lock:
            if rule._when.probability < 1:
                from random import Random

                # For this rule alone, so that its numbers do not depend on what other rules meet.
                self._seeded += 1
                rule._random = Random(None if self.options.seed is None else f"{self.options.seed} {self._seeded}")
            self.newest_first = (rule, *self.newest_first)
        return rule

    def remove(self, rule: Rule) -> None:
        with self._lock:
            self.newest_first = tuple(other for other in self.newest_first if other is not rule)

    def clear(self) -> None:
        with self._lock:
            self.newest_first, self._seeded, self.scripts = (), 0, ()

    def play(self, scripts: Sequence[_Script]) -> None:
        """Have each of the next sessions answered like one of these."""
        rules = [rule for script in scripts for rule in script.make_rules(self)]
        with self._lock:
            self.newest_first, self.scripts = (*reversed(rules), *self.newest_first), (*self.scripts, *scripts)

    def take_script(self) -> _Script | None:
        with self._lock:
            script, self.scripts = next(iter(self.scripts), None), self.scripts[1:]
        return script

    def body_thresholds(self) -> list[int]:
        """The sizes of a body at which rules apply, smallest first."""
        return sorted({rule._after for rule in self.newest_first if rule._after is not None})

    def decide(
        self,
        texts: Mapping[str, str],
        names: Sequence[str],
        message: Callable[[], Message],
        script: _Script | None,
        after: int | None = None,
        wanted: Collection[str] = _ASPECTS,
    ) -> dict[str, Any]:
        """Each wanted aspect of a reply, from the newest rule that sets it. Raises what the user's functions raise."""
        found: dict[str, Any] = {}
        counts = "reply" in wanted  # a challenge of AUTH is no use of its own
        newer: Rule | None = None
        for rule in self.newest_first:
            text = texts.get(rule._stage)
            is_meant = text is not None and rule._after == after and rule._script in (None, script)
            if text is not None and is_meant and rule._matches(text, names):
                missing = [aspect for aspect in wanted if aspect not in found]
                with self._lock:
                    is_there = rule in self.newest_first
                    aspects, function = rule._use(missing, newer, counts) if is_there else ({}, None)
                if function is not None:  # called without the lock, like every function of the user
                    result = function(text, message())
                    action = Action(result) if result is None or isinstance(result, str) else result
                    if not isinstance(action, Action):
                        raise TypeError(f"a rule returned {result!r}: must be None, a reply or an Action")
                    aspects = aspects | _find_aspects(action._find_changes())
                found |= {name: value for name, value in aspects.items() if name in missing}
                newer = rule if aspects else newer
        return found


# ------------------------------------------------------------------------------------- transcripts


def _unescape(text: str) -> str:
    """The line with this repr()."""
    data = re.sub(r"\\r(?:\\n)?['\"]?$", "", text[1:]).encode("latin-1", "backslashreplace")
    return _decode(data.decode("unicode_escape", "ignore").encode("latin-1", "replace"))


# How lines of the client and of the server begin, and how to read the rest. The first notation that fits is used.
_METER = r"[\r\t \d.:kMG-]*"  # curl may print its progress first
_split = functools.partial(re.sub, r"((\d{3})-.+?)(?=\2[- ])", r"\1\n")  # PHPMailer's replies lose it on a web page
_NOTATIONS = (
    (r"[ \t]*S:(?! ?<) ?", r"[ \t]*R: ?(?=[2-5]\d\d[ -])", str),  # the sender and the receiver of RFC 821 to RFC 3030
    (r"[ \t]*C:(?! ?<[a-z]| &) ?", r"[ \t]*S:(?! ?<wait) ?", str),  # Message.transcript, and later RFCs
    (r"[ \t]*(?:[-~]|\*[*~])> ?", r"[ \t]*<(?:-|~\*?|\*\*) {0,2}", str),  # swaks
    (r".*?CLIENT -> SERVER: ?", r".*?SERVER -> CLIENT: ?", _split),  # PHPMailer
    (r"[\d:. \t]*send: b?(?=['\"])", r"[\d:. \t]*reply: b?(?=['\"])", _unescape),  # smtplib
    (rf"{_METER}> ", rf"{_METER}< ", str),  # curl
)
_OTHER_LINES = (  # in all notations; PHPMailer indents all lines of a reply but the first
    r"(?P<opened>[ \t]*=== Trying|[\d:. \t]*connect: to |.*\*  +Trying |.*Connection: opening)"
    r"|(?P<lost>.*(?:connection unexpectedly|unexpectedly closed|reading failed|EOF caught))"
    r"|(?P<reset>.*reset by peer)|[ \t]+(?P<more>\d{3}[ -].*)"
)
_ENDINGS = {ending.value: ending for ending in _Next} | {"lost": _Next.CLOSE, "reset": _Next.RESET}


class _Script:
    """One session of a transcript."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int | None, dict[str, Any]]] = []  # stage, size of its body, aspects of the reply
        self.lines: list[str] = []  # of the reply to the last request
        self.waiting = deque(["connect"])  # the stages of the requests without a reply
        self.expected: str | None = None  # message or AUTH, if what the client says next is part of it
        self.bodies: list[int] = []  # their sizes, if they are known
        self.has_credentials = self.is_over = False

    def read(self, kind: str, line: str) -> bool:
        """Read a line. False if it begins another session."""
        is_complete = not self.lines or (line[:3].isdigit() and re.match(r"\d{3}(?!-)", self.lines[-1]))
        is_greeting = line.startswith("220") and {"connect", "STARTTLS"}.isdisjoint(self.waiting)
        if kind in ("server", "more") and not is_complete:
            self.lines.append(line)
        elif kind == "opened" or (kind == "server" and (is_greeting or (self.is_over and line[:3].isdigit()))):
            return False
        elif kind == "server":
            self._read_reply(line)
        elif kind == "client" and not self.is_over:
            self._read_request(line)
        elif kind in _ENDINGS and not self.is_over:
            self._read_ending(_ENDINGS[kind])
        return True

    def _read_request(self, line: str) -> None:
        size, self.lines = re.fullmatch(r"<(\d+) bytes>", line), []
        self.bodies += [int(size[1])] if size else []
        verb = "message" if size else _parse_line(line.replace(r"\t", " ").encode()).verb
        last = self.waiting[-1] if self.waiting else ""
        if self.expected == "message":
            self.expected = None if size or line == "." else "message"
        elif last != "BDAT" or (verb in _VERBS and not size):  # it is no part of the chunk
            if last == "connect":
                self.waiting.clear()  # the log begins later
            self.has_credentials = self.expected == "AUTH" or line.count(" ") > 1
            self.waiting.append("too long" if line.startswith("line of over ") else self.expected or verb)
            self.expected = None

    def _read_reply(self, line: str) -> None:
        stage, self.expected = self.waiting.popleft() if self.waiting else self.expected, None
        accepts = not line.startswith(("4", "5"))
        # A line without a code continues one of our own texts, and a 421 may come unasked.
        if re.match({None: "(?!421)[2-5][0-9]{2}", "connect": "2[35]|3"}.get(stage, "$."), line):
            raise ConfigurationError(f"there is no command before {_shorten(line)}", "play")
        if stage is None:
            self.lines.append(line)
        elif stage == "AUTH" and line.startswith("334"):
            self.expected, self.has_credentials, self.lines = stage, True, []
        else:
            self.lines = [line]
            # A login may be refused before its challenge.
            at_once = {"at_once": True} if stage == "AUTH" and not (accepts or self.has_credentials) else {}
            self.said.append((stage, None, {"reply": self.lines, **at_once}))
            self.is_over = stage == "QUIT" and accepts
            if stage == "DATA" and accepts:
                self.expected = "message"
                self.waiting.append("message")

    def _read_ending(self, ending: _Next) -> None:
        self.is_over = True
        if self.lines and (self.expected or not self.waiting):
            self.said[-1][2]["then"] = ending
        else:
            stage = self.waiting.popleft() if self.waiting else self.expected or ""
            after = self.bodies[-1] if stage == "message" and self.bodies else None
            self.said.append((stage, after, {"reply": b"", "then": ending}))

    def make_rules(self, rules: _Rules) -> Iterator[Rule]:
        """Yield a rule for each stage, which sends its replies in order."""
        uses: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
        for stage, after, use in self.said:
            if lines := use["reply"]:  # the greeting in RFC 4954 has no last line
                use["reply"] = "\n".join([*lines[:-1], re.sub(r"^(\d{3})-", r"\1 ", lines[-1])])
            uses.setdefault((stage, after), []).append(use)
        for (stage, after), of_stage in uses.items():
            skip = 0 if after is None else sum(size >= after for size in self.bodies[:-1])
            rule = Rule(rules, "*", skip=skip, times=len(of_stage))
            rule._stage, rule._after, rule._uses, rule._script = stage, after, tuple(of_stage), self
            yield rule


def _read_transcript(text: str) -> list[_Script]:
    """The sessions of a transcript."""
    _check("play", text, _TEXT)
    scripts = [_Script()]
    for client, server, decode in [row for row in _NOTATIONS if re.search(f"(?m)^{row[1]}", text)][:1]:
        pattern = re.compile(f"{client}(?P<client>.*)|{server}(?P<server>.*)|{_OTHER_LINES}")
        for match in filter(None, (pattern.match(line.rstrip("\r")) for line in text.split("\n"))):
            for line in decode(match[match.lastgroup or 0]).split("\n"):
                kind = line if line in _ENDINGS else match.lastgroup or ""
                if not scripts[-1].read(kind, line):
                    scripts.append(_Script())
                    scripts[-1].read(kind, line)
    scripts = [script for script in scripts if script.said]
    if scripts:
        return scripts
    line = re.sub(r"(?i)(AUTH +\S+ ).*", r"\1***", text.strip().partition("\n")[0])
    raise ConfigurationError(
        f"no line in it is marked as the server's (by S:, <- or <); it begins with {_shorten(line)}", "play"
    )


def _find_announced(scripts: Iterable[_Script], options: Configuration) -> dict[str, Any]:
    """The options with which a server accepts what these sessions announce and use."""
    said = [(stage, use["reply"]) for script in scripts for stage, _, use in script.said]
    lines = [line[4:].upper() for stage, reply in said if stage == "EHLO" for line in reply[1:]]
    words: dict[str, list[str]] = {_VERBS.get(stage, _UNKNOWN_VERB).extension: [] for stage, _ in said}
    words |= {name: others for line in lines for name, *others in [line.replace("AUTH=", "AUTH ").split() or [""]]}
    known = [name for name in words if name in _EXTENSIONS.split() or name.startswith("X")]
    changes: dict[str, Any] = {"extensions": dict.fromkeys([*options.extensions, *known])}
    if "AUTH" in words and options.auth_users is None:
        mechanisms = [name for name in words["AUTH"] if name in _AUTH_MECHANISMS]
        changes |= {"auth_users": "*", "auth_mechanisms": mechanisms or _AUTH_MECHANISMS}
    if "STARTTLS" in words and options.ssl_context is None:
        changes["ssl_context"] = "test"
    return changes


# ---------------------------------------------------------------------------------------- handlers

# The steps of a session in order, by the names that they have in a message.
_STEPS = ("helo", "mailfrom", "rcptto", "data", "msg", "rset", "noop", "quit")
_TRANSACTION = _STEPS[1:]
_LASTING = ("greeting", "tls", "helo", "auth")  # in force beyond a mail

# The replies to commands before a step that only some servers require, or after a greeting that refuses.
_DEMANDS = {"session": "msg_invalid_cmd_helo_sequence", "tls": "msg_tls_required", "auth": "msg_auth_required"}


def _name_extensions(options: Configuration) -> set[str]:
    """The extensions that the server announces, and therefore accepts."""
    names = {extension.split()[0].upper() for extension in options.extensions}
    return names if options.auth_users is None else names | {"AUTH"}


class Handler:
    """A command. To add one of your own, subclass this, set some of the public attributes, and override refuse()."""

    verbs: Sequence[str] = ()  #: in upper case
    needs: Sequence[str] = ()  #: the steps that must have succeeded before: helo, mailfrom, rcptto, auth, tls
    #: Returns the value of the argument, or None if it is invalid. By default, no argument is allowed.
    parse: Callable[..., Any] = staticmethod(lambda argument: None if argument else "")
    #: The reply if parse() returns None: the name of an option, or a text that begins with three digits.
    bad_argument = "msg_invalid_cmd_rset_arg"
    received = ""  #: the reply if the command is accepted: likewise an option or a text
    has_secret = False  #: whether logs and transcripts show *** instead of the argument

    _keyword = ""  # must follow the verb, as FROM: follows MAIL
    _erases: tuple[str, ...] = ()  # the steps that it undoes, even if it is then refused
    _before_tls = False  # whether tls_required allows it before STARTTLS
    _before_auth = True  # whether auth_required allows it before AUTH
    _lists: tuple[tuple[str, str], ...] = ()  # options that list refused values, each with its reply
    _read_loosely: Callable[[Any], Any] = staticmethod(lambda argument: argument)  # for a bad one that a rule accepted
    _delay = ""  # the end of the name of the option that has it, if that is not the step
    _next: _Next | None = None  # what follows the reply, if the command is accepted
    _step = ""  # the name of the step in a message
    _is_offered: Callable[[Configuration], bool] = staticmethod(lambda options: True)  # if not, the verb is unknown

    def __init__(self, options: Configuration) -> None:
        self.options = options
        sequence = f"msg_invalid_cmd_{self._step}_sequence"
        self._bad_sequence = sequence if hasattr(options, sequence) else "msg_invalid_cmd_helo_sequence"
        self._extensions = _name_extensions(options)
        self._refused = [(getattr(options, values), text) for values, text in self._lists if getattr(options, values)]
        # Limited, because refuse() may return any number of different texts.
        self._find_reply = functools.lru_cache(maxsize=64)(self._make_reply)
        self._accepting = self._make_reply(self.received)
        self.needs = tuple(self.needs)
        if options.auth_required and not self._before_auth:
            self.needs = ("auth", *self.needs)
        if options.tls_required and not self._before_tls:
            self.needs = ("tls", *self.needs)

    def refuse(self, session: _Session, value: Any) -> str | None:
        """The reply that refuses this result of parse(), or None. session.message() is the Message so far."""
        return None

    def _make_reply(self, option: str) -> _Reply:
        """The reply with the text of this option, or with this text."""
        text = self._fill(getattr(self.options, option, option))
        accepts = option == self.received and not text.startswith(("4", "5"))
        reply = _Reply(text, next=self._choose_next(accepts), accepts=accepts)
        reply.delay = getattr(self.options, f"response_delay_{self._delay or self._step}", 0.0)
        return reply

    def _fill(self, text: str) -> str:
        return text.replace("{msg_size_limit}", str(self.options.msg_size_limit))

    def _choose_next(self, accepts: bool) -> _Next | None:
        return self._next if accepts else _Next.CLOSE if self.options.fail_fast else None

    def _begin(self, session: _Session, request: _Request) -> _Reply | None:
        """Run the command. None if the reply needs more input."""
        argument = request.argument
        if self.has_secret and argument:
            request = request.hide(f"{request.line.split(maxsplit=1)[0]} ***")
        return session.run(self, request, argument)

    def _run(self, session: _Session, request: _Request | None, argument: Any) -> _Reply:
        """Erase, check, record. The reply is sent later."""
        if self._erases:
            session.erase(self._erases)
        value = self.parse(argument)
        reply = self._choose(session, value)
        if session.rules.newest_first:
            reply = self._apply(self._decide(session, request, argument, value), reply)
            value = self._read_loosely(argument) if value is None and reply.accepts else value
        mail = session.mail
        step = self._step  # without a step, nothing needs the value, which may be a secret
        # Calling _Exchange() would run a Python function, and take twice as long.
        exchange = tuple.__new__(_Exchange, (request, reply, step and value, session.at, session.has_more))
        mail.exchanges.append(exchange)
        if step:
            self._record(mail, exchange)
        return reply

    def _choose(self, session: _Session, value: Any) -> _Reply:
        """The reply without rules. Check the sequence, the argument, the lists, and what is special to the command."""
        accepted = session.mail.accepted_steps
        # self.needs is no set: without a GIL, every use of a shared set would lock out the other sessions.
        if not accepted.issuperset(self.needs):
            missing = next(step for step in self.needs if step not in accepted)
            return self._find_reply(_DEMANDS.get(missing, self._bad_sequence))
        if value is None:
            return self._find_reply(self.bad_argument)
        for values, text in self._refused:
            if _fold(self._name(value)) in values:
                return self._find_reply(text)
        refusal = self.refuse(session, value)
        return self._accepting if refusal is None else self._find_reply(refusal)

    def _decide(self, session: _Session, request: _Request | None, argument: Any, value: Any) -> dict[str, Any]:
        return session.decide(self._texts(session, request, argument), self._names(session, argument, value))

    def _texts(self, session: _Session, request: _Request | None, argument: Any) -> dict[str, str]:
        """The texts that rules look at, by stage."""
        return {"connect": "", "*": ""} if request is None else {request.verb: request.line, "*": request.line}

    def _name(self, value: Any) -> str:
        """The address or domain in the value of an argument."""
        return str(value)

    def _names(self, session: _Session, argument: Any, value: Any) -> Sequence[str]:
        """The addresses or domains that rules can match."""
        names = [argument] if value is None else [self._name(value), argument]
        return [name.strip("<>") for name in names if isinstance(name, str)]

    def _apply(self, aspects: dict[str, Any], normal: _Reply) -> _Reply:
        """Change the normal reply by the aspects that rules set."""
        if not aspects:
            return normal
        reply = normal.replace(delay=aspects.get("delay", normal.delay), trickle=aspects.get("trickle", normal.trickle))
        if (said := aspects.get("reply")) is not None:
            text = _decode(said).rstrip("\r\n") if isinstance(said, bytes) else self._fill(said)
            data = said if isinstance(said, bytes) else _encode(text)
            accepts = bool(data) and not text.startswith(("4", "5"))
            reply = reply.replace(text=text, data=data, next=self._choose_next(accepts), accepts=accepts)
        return reply.replace(next=aspects["then"]) if "then" in aspects else reply

    def _record(self, mail: _Mail, exchange: _Exchange) -> None:
        step, reply = self._step, exchange.reply
        mail.steps[step] = exchange
        if reply is not None and reply.accepts:
            mail.accepted_steps.add(step)


def _fill_address(text: str, names: Sequence[str]) -> str:
    return text.replace("{address}", _printable(names[0] if names else ""))


def _choose_with_address(handler: Handler, session: _Session, value: Any) -> _Reply:
    """Like Handler._choose(), for texts with {address}. Other replies are made only once."""
    reply = type(handler)._choose(handler, session, value)
    if "{address}" in reply.text:
        reply = reply.replace(text=_fill_address(reply.text, handler._names(session, None, value)), data=None)
    return reply


class _Greeting(Handler):
    verbs = ("connect",)
    received = "msg_greeting"
    _before_tls = True
    _step = "greeting"


class _Helo(Handler):
    verbs = ("HELO",)
    parse = staticmethod(_parse_domain)
    bad_argument = "msg_invalid_cmd_helo_arg"
    received = "msg_helo_received"
    _erases = _STEPS
    _before_tls = True
    _lists = (("blacklisted_helo_domains", "msg_helo_blacklisted_domain"),)
    _step = "helo"

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        if options.lenient_addresses:
            self.parse = functools.partial(_parse_domain, pattern=_LENIENT_DOMAIN)


class _PathHandler(Handler):
    _allowed = ""  # the path that is allowed without a mailbox
    _before_auth = False

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        pattern = _LENIENT_PATH if options.lenient_addresses else _PATH
        parse = functools.partial(_parse_path, pattern, self._allowed, bool(self._extensions))
        self.parse = functools.lru_cache(maxsize=512)(parse)  # tests use few addresses, many times each

    def _name(self, value: _Path) -> str:
        return value.address

    @staticmethod
    def _read_loosely(argument: str) -> _Path:
        path, words = _split_path(argument)
        return _Path(path[1:-1] if path[:1] + path[-1:] == "<>" else path, _read_parameters(words))

    def refuse(self, session: _Session, value: Any) -> str | None:
        if not self._extensions:
            return None
        sender = session.mail.steps["mailfrom"].value if self._step == "rcptto" else value
        if "SMTPUTF8" in self._extensions and not value.address.isascii() and "SMTPUTF8" not in sender.parameters:
            return self.bad_argument
        if not all(self._allows(session, *parameter) for parameter in value.parameters.items()):
            return "msg_unknown_parameter"
        size = int(value.parameters.get("SIZE", 0))
        return "msg_msg_size_is_too_big" if size > self.options.msg_size_limit else None

    def _allows(self, session: _Session, name: str, value: str) -> bool:
        other = _PARAMETERS.get(name, (self.verbs[0], name, "[^?]*"))
        verb, extension, pattern = _PARAMETERS.get(f"{name}={value.upper()}", other)
        was_announced = session.mail.steps["helo"].verb == "EHLO" and extension in self._extensions
        return was_announced and verb in self.verbs and re.fullmatch(pattern, value, re.IGNORECASE) is not None


class _Mailfrom(_PathHandler):
    verbs = ("MAIL",)
    needs: Sequence[str] = ("helo",)
    bad_argument = "msg_invalid_cmd_mailfrom_arg"
    received = "msg_mailfrom_received"
    _keyword = "FROM:"
    _allowed = "<>"
    _erases = _TRANSACTION
    _lists = (("blacklisted_mailfrom_emails", "msg_mailfrom_blacklisted_email"),)
    _step = "mailfrom"


class _Rcptto(_PathHandler):
    verbs = ("RCPT",)
    needs = ("helo", "mailfrom")
    bad_argument = "msg_invalid_cmd_rcptto_arg"
    received = "msg_rcptto_received"
    _keyword = "TO:"
    _allowed = "<postmaster>"  # RFC 5321 section 4.1.1.3
    _lists = (
        ("blacklisted_rcptto_emails", "msg_rcptto_blacklisted_email"),
        ("not_registered_emails", "msg_rcptto_not_registered_email"),
    )
    _step = "rcptto"

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        self._erases = () if options.multiple_rcptto else _STEPS[2:]

    def _record(self, mail: _Mail, exchange: _Exchange) -> None:
        super()._record(mail, exchange)
        mail.recipients.append(exchange)


class _Data(Handler):
    verbs: Sequence[str] = ("DATA",)
    needs = ("helo", "mailfrom", "rcptto")
    bad_argument = "msg_invalid_cmd"
    received = "msg_data_received"
    _erases: tuple[str, ...] = ("data", "msg")
    _before_auth = False
    _step = "data"

    def refuse(self, session: _Session, value: Any) -> str | None:
        return None if session.mail.body is None else self._bad_sequence  # after a chunk, RFC 3030 section 2

    @staticmethod
    def _names(session: _Session, argument: Any, value: Any) -> Sequence[str]:
        return session.mail.accepted_recipients()

    def _run(self, session: _Session, request: _Request | None, argument: Any) -> _Reply:
        reply = super()._run(session, request, argument)
        if reply.accepts and reply.next is None:
            session.expect_body()
        return reply


class _Bdat(_Data):
    """BDAT, which sends a body in chunks that are counted and have no end marker (RFC 3030)."""

    verbs = ("BDAT",)
    parse = staticmethod(_parse_chunk)
    bad_argument = "msg_invalid_cmd_bdat_arg"
    received = "msg_bdat_received"
    _erases = ()
    _is_offered = staticmethod(lambda options: "CHUNKING" in _name_extensions(options))

    def _begin(self, session: _Session, request: _Request) -> _Reply | None:
        if (chunk := _parse_chunk(request.argument)) is None:
            return session.run(self, request, request.argument)
        session.begin_mail_if_due(request.kind)  # so that the bytes belong to the same mail as the command
        return session.expect_chunk(chunk[0], request, lambda: self._finish(session, request, chunk))

    def _finish(self, session: _Session, request: _Request, chunk: tuple[int, bool]) -> _Reply:
        """Run the command once its chunk has arrived. With LAST, the reply is the one to the body."""
        if not chunk[1] or not self._choose(session, chunk).accepts:
            return session.run(self, request, request.argument)
        self._record(session.mail, session.note(request, self._accepting.replace(data=b""), chunk))
        return session.finish_body()

    def refuse(self, session: _Session, value: Any) -> str | None:
        body = session.mail.body
        return "msg_msg_size_is_too_big" if body and body.size > self.options.msg_size_limit else None

    def _run(self, session: _Session, request: _Request | None, argument: Any) -> _Reply:
        reply = Handler._run(self, session, request, argument)
        if not reply.accepts and self.parse(argument) is not None:  # until the next MAIL, further chunks are refused
            session.mail.accepted_steps.discard("rcptto")
            session.mail.body = None
        return reply


class _EndOfBody(Handler):
    """The end of the body. Its argument is the content, or None if the body was too long."""

    verbs = ("message",)
    parse = staticmethod(lambda content: content)
    bad_argument = "msg_msg_size_is_too_big"
    received = "msg_msg_received"
    _delay = "message"
    _step = "msg"
    _names = staticmethod(_Data._names)

    def _decide(self, session: _Session, request: _Request | None, argument: Any, value: Any) -> dict[str, Any]:
        texts, names = self._texts(session, request, argument), self._names(session, argument, value)
        return session.decide(texts, names, lambda: session.message_with_body(argument))

    def refuse(self, session: _Session, value: Any) -> str | None:
        violations = session.message_with_body(value, without_history=True).violations if self.options.strict else []
        if not violations:
            return None
        text = str(violations[0]).encode("ascii", "backslashreplace").decode()
        return self.options.msg_violation.replace("{violation}", text[:400])  # RFC 5321 section 4.5.3.1.5

    def _texts(self, session: _Session, request: _Request | None, argument: Any) -> dict[str, str]:
        text = _decode(argument or b"")
        body = session.mail.body
        if body is None or body.request is None:
            return {"message": text, "*": text}
        return {"message": text, "BDAT": body.request.line, "*": body.request.line}

    def _run(self, session: _Session, request: _Request | None, argument: Any) -> _Reply:
        reply = super()._run(session, request, argument)
        if reply.accepts and not session.deliver():
            failed = self._find_reply("msg_msg_failed")
            reply = failed.replace(delay=reply.delay, next=reply.next or failed.next)
            session.mail.accepted_steps.discard("msg")
            session.mail.replace_last(reply=reply)
        return reply


class _EndOfChunks(_EndOfBody):
    """The end of a body that came in chunks. BDAT LAST has one reply for the command and for the body."""

    verbs = ("last chunk",)

    def _make_reply(self, option: str) -> _Reply:
        reply = super()._make_reply(option)
        return reply.replace(delay=reply.delay + self.options.response_delay_data)


class _Rset(Handler):
    verbs = ("RSET",)
    needs = ("helo",)
    received = "msg_rset_received"
    _erases = _TRANSACTION
    _step = "rset"


class _Noop(Handler):
    verbs = ("NOOP",)
    parse = staticmethod(str)
    received = "msg_noop_received"
    _before_tls = True
    _step = "noop"


class _Quit(Handler):
    verbs = ("QUIT",)
    bad_argument = "msg_invalid_cmd"
    received = "msg_quit_cmd"
    _before_tls = True
    _next = _Next.CLOSE
    _step = "quit"


class _Vrfy(Handler):
    """VRFY. Like the next two, it exists only if it is announced."""

    verbs = ("VRFY",)
    parse = staticmethod(str)
    received = "msg_vrfy_received"
    _is_offered = classmethod(lambda cls, options: cls.verbs[0] in _name_extensions(options))


class _Expn(_Vrfy):
    verbs = ("EXPN",)
    received = "msg_expn_received"


class _Help(_Vrfy):
    verbs = ("HELP",)
    received = "msg_help_received"


class _Starttls(Handler):
    """STARTTLS, after which the session starts over within TLS (RFC 3207)."""

    verbs = ("STARTTLS",)
    needs = ("helo",)
    bad_argument = "msg_invalid_cmd_starttls_arg"
    received = "msg_starttls_received"
    _before_tls = True
    _next = _Next.TLS
    _is_offered = staticmethod(lambda options: options.ssl_context is not None and not options.implicit_tls)

    def _choose(self, session: _Session, value: Any) -> _Reply:
        is_secure = session.is_secure  # this reply does not need HELO
        return self._find_reply("msg_invalid_cmd_starttls_sequence") if is_secure else super()._choose(session, value)


# The challenges of each mechanism, and the pattern of the user and the secret in the answers, which NUL separates.
_MECHANISMS = {
    "PLAIN": ([""], "[^\0]*\0([^\0]*)\0([^\0]*)"),  # RFC 4616
    "LOGIN": (["Username:", "Password:"], "(.*)\0(.*)"),
    "CRAM-MD5": (["<{}@smtpmock>"], "(?:(.*) )?([^ ]*)"),  # RFC 2195; the number is different each time
    "XOAUTH2": ([""], "user=([^\1]*)\1auth=Bearer ([^\1]*)\1\1"),  # as Google and Microsoft define it
}

# What Google sends when it refuses a token. The client answers with an empty line.
_BAD_TOKEN = b'{"status":"401","schemes":"bearer mac","scope":"https://mail.google.com/"}\n'
# The names of mechanisms (RFC 4422 section 3.1). Any other word after AUTH may be a secret.
_MECHANISM_NAME = "[A-Z0-9_-]{1,20}|(?i:PLAIN|LOGIN|CRAM-MD5|XOAUTH2|OAUTHBEARER|EXTERNAL|NTLM|GSSAPI|SCRAM-SHA-[0-9]+)"


class _AuthResult(NamedTuple):
    response: str  # the option with the text of the reply
    mechanism: str
    user: str | None = None


class _Auth(Handler):
    """AUTH, in one line or several. Each line is run, and the last one yields the _AuthResult."""

    verbs = ("AUTH",)
    parse = staticmethod(lambda login: login)
    received = "msg_auth_received"
    _step = "auth"

    def refuse(self, session: _Session, value: Any) -> str | None:
        return None if value.response == self.received else value.response

    def _begin(self, session: _Session, request: _Request) -> _Reply | None:
        # Only the verb and a known mechanism are shown, because everything else may be a secret.
        name, _, initial = request.argument.partition(" ")
        shown = name if name.upper() in _MECHANISMS else "***" if name else ""
        words = (request.line.split(maxsplit=1)[0], shown, "***" if initial else "")
        mechanism = name if re.fullmatch(_MECHANISM_NAME, name) else "***"
        command = request.hide(" ".join(filter(None, words)), " ".join(filter(None, (mechanism, words[2]))))
        return session.run(self, command, (self._log_in(session, mechanism.upper(), initial), command, None))

    def _run(self, session: _Session, request: _Request | None, argument: Any) -> _Reply:
        """Take the login in progress, its command, and the answer to the last challenge."""
        login, command, answer = argument
        try:
            text = f"334 {login.send(answer)}"
        except StopIteration as stop:
            return self._finish(session, request, command, stop.value)
        reply = _Reply(text, accepts=True)
        if session.rules.newest_first:
            texts = self._texts(session, command, None)
            aspects = session.decide(texts, [""], wanted=("delay", "trickle", "at_once"))
            if "at_once" in aspects:
                refusal = _AuthResult("msg_auth_failed", command.argument.partition(" ")[0].upper())
                return self._finish(session, request, command, refusal)
            reply = self._apply(aspects, reply)
        session.note(request, reply)
        if reply.accepts:  # unless a rule failed
            session.expect_answer(lambda answer, text: session.run(self, answer, (login, command, text)))
        return reply

    def _finish(self, session: _Session, request: _Request | None, command: _Request, result: _AuthResult) -> _Reply:
        reply = self._choose(session, result)
        if session.rules.newest_first:
            reply = self._apply(self._decide(session, command, None, result), reply)
        # In a message, the outcome belongs to the AUTH command, whatever came between.
        self._record(session.mail, session.note(request, reply, result)._replace(request=command))
        return reply

    def _texts(self, session: _Session, request: _Request | None, argument: Any) -> dict[str, str]:
        assert request is not None
        line = f"AUTH {request.argument}".rstrip()
        return {"AUTH": line, "*": line}

    def _log_in(self, session: _Session, name: str, initial: str) -> Generator[str, str, _AuthResult]:
        """Yield the challenges, receive the lines that answer them, and return the outcome."""
        import base64

        result = _AuthResult("msg_auth_bad_response", name)
        if refusal := self._refuse_mechanism(session, name):
            return result._replace(response=refusal)
        challenges, pattern = _MECHANISMS[name]
        if initial and name == "CRAM-MD5":  # the client must see the challenge first
            return result
        answers = []
        for text in challenges:
            challenge = text.format(int.from_bytes(os.urandom(12), "big"))  # a clock may give the same time twice
            answer = initial or (yield base64.b64encode(challenge.encode()).decode())
            if answer == "*" and not initial:
                return result._replace(response="msg_auth_cancelled")
            try:
                answers.append(_decode(base64.b64decode("" if initial == "=" else answer, validate=True)))
            except ValueError:
                return result
            initial = ""
        if (match := re.fullmatch(pattern, "\0".join(answers), re.DOTALL)) is None:
            return result
        user, secret = match[1] or "", match[2]
        is_valid = self._check_secret(name, user, f"{challenge} {secret}" if name == "CRAM-MD5" else secret)
        if name == "XOAUTH2" and not is_valid and (yield base64.b64encode(_BAD_TOKEN).decode()) == "*":
            return result._replace(response="msg_auth_cancelled", user=user)
        return result._replace(response=self.received if is_valid else "msg_auth_failed", user=user)

    def _check_secret(self, mechanism: str, user: str, secret: str) -> bool:
        users: Any = self.options.auth_users
        if users == "*":
            return True
        if callable(users):
            return bool(users(mechanism, user, secret))
        expected = users.get(user)
        if mechanism == "CRAM-MD5" and expected is not None:  # the digest proves that the client knows the secret
            import hmac

            challenge = secret.partition(" ")[0]
            digest = hmac.new(expected.encode("utf-8", "surrogateescape"), challenge.encode(), "md5").hexdigest()
            expected = f"{challenge} {digest}"
        return bool(secret == expected)

    def _refuse_mechanism(self, session: _Session, mechanism: str) -> str | None:
        steps, options = session.mail.accepted_steps, self.options
        refusals = {
            "msg_invalid_cmd": options.auth_users is None,
            "msg_tls_required": not steps.issuperset(self.needs),
            "msg_auth_sequence": "helo" not in steps or "auth" in steps or "mailfrom" in steps,
            "msg_auth_tls_required": options.auth_requires_tls and not session.is_secure,
            "msg_auth_unknown_mechanism": mechanism not in map(str.upper, options.auth_mechanisms),
        }
        return next((option for option, is_refused in refusals.items() if is_refused), None)

    def _names(self, session: _Session, argument: Any, value: Any) -> Sequence[str]:
        return [value.user or ""]

    def _record(self, mail: _Mail, exchange: _Exchange) -> None:
        if self.options.auth_users is not None and self._step not in mail.accepted_steps:
            mail.steps.pop(self._step, None)  # so that the steps stay in their order
            super()._record(mail, exchange)


class _Ehlo(_Helo):
    """EHLO, whose reply lists the extensions (RFC 5321 section 4.1.1.1)."""

    verbs = ("EHLO",)

    def __init__(self, options: Configuration) -> None:
        super().__init__(options)
        self._secure = self._announce(is_secure=True)
        self._accepting = self._announce(is_secure=False)

    def _announce(self, *, is_secure: bool) -> _Reply:
        """The reply. All its lines but the last have a hyphen after the code (RFC 5321 section 4.2.1)."""
        reply, options = self._make_reply(self.received), self.options
        size = f"SIZE {options.msg_size_limit}"
        extensions = [size if name.upper() == "SIZE" else name for name in options.extensions]
        if _Starttls._is_offered(options) and not is_secure:
            extensions.append("STARTTLS")
        if options.auth_users is not None and (is_secure or not options.auth_requires_tls):
            extensions.append(" ".join(("AUTH", *options.auth_mechanisms)).upper())
        if not extensions or not reply.accepts:
            return reply
        *lines, last = [*reply.text.replace("\r\n", "\n").split("\n"), *(f"250 {name}" for name in extensions)]
        text = "\n".join([*(f"{line[:3]}-{line[4:]}" if line[:3].isdigit() else line for line in lines), last])
        return reply.replace(text=text, data=None)

    def _choose(self, session: _Session, value: Any) -> _Reply:
        reply = super()._choose(session, value)
        return self._secure if reply is self._accepting and session.is_secure else reply


class _Unknown(Handler):
    verbs: Sequence[str] = ("unknown",)
    parse = staticmethod(lambda argument: None)
    bad_argument = "msg_invalid_cmd"
    _before_tls = True

    def _begin(self, session: _Session, request: _Request) -> _Reply | None:
        # The line after a refused AUTH may be the answer to a challenge that was never sent.
        before = session.mail.exchanges[-1].request if session.mail.exchanges else None
        if request.line.startswith(_BEGIN_OF_TLS.decode()):
            return session.leave_to_tls()
        is_told = request.verb in _VERBS or any(rule._stage == request.verb for rule in session.rules.newest_first)
        if request.verb.startswith("AUTH"):
            request = request.hide(f"{request.line[:5]} ***", verb=request.verb[:5])
        elif before is not None and (before.verb.startswith("AUTH") or before.line == "***"):
            request = request.hide("***", verb=request.verb if is_told else "***")
        return super()._begin(session, request)


class _TooLong(_Unknown):
    verbs = ("too long",)
    bad_argument = "msg_line_too_long"


_BUILT_IN: tuple[type[Handler], ...] = (_Greeting, _Helo, _Ehlo, _Mailfrom, _Rcptto, _Data, _Bdat, _EndOfBody)
_BUILT_IN += (_EndOfChunks, _Rset, _Noop, _Quit, _Vrfy, _Expn, _Help, _Starttls, _Auth, _Unknown, _TooLong)


def _check_handler(handler: Any) -> None:
    if not (isinstance(handler, type) and issubclass(handler, Handler)):
        raise ConfigurationError(f"handlers: {handler!r} must be a subclass of Handler")
    name = handler.__name__
    verbs = _OptionType("a tuple of strings, as ('VRFY',)", lambda value: _are_names(value) and len(value) > 0, str)
    _check(f"{name}.verbs", handler.verbs, verbs)
    _check(f"{name}.needs", handler.needs, _OptionType("a tuple of strings, as ('helo',)", _are_names, str))
    _check(f"{name}.parse", handler.parse, _CALLABLE)
    for verb in handler.verbs:
        if not re.fullmatch("[A-Za-z0-9]+", verb):
            raise ConfigurationError(f"{name}.verbs: {verb!r} is no verb")
    for step in handler.needs:
        if step not in (*_STEPS, "tls", "auth"):
            raise ConfigurationError(f"{name}.needs: {step!r} is no step of a session")
    known = [name for name in Configuration._declared if name.startswith("msg_")]
    for attribute in ("received", "bad_argument"):
        text = getattr(handler, attribute)
        if not (_is_text(text) and (text in known or re.match("[0-9]{3}", text))):
            hint = _suggest(text, known) if isinstance(text, str) else ""
            allowed = f"a text that begins with three digits, or an option{hint}"
            raise ConfigurationError(f"{name}.{attribute}={text!r}: must be {allowed}")


class _ParsedLines(dict[str, tuple[Handler, _Request]]):
    """The handler and the request of up to 512 command lines, because clients repeat them; none may hold a secret."""

    # Any thread may add one, in one atomic step. A key is a line as Latin-1, because Python 3.13 without a GIL locks a
    # dict for any other key than a str, and for get().

    def __init__(self, handlers: _Handlers) -> None:
        self._handlers = handlers

    def __missing__(self, line: str) -> tuple[Handler, _Request]:
        request = _parse_line(line.encode("latin-1"))
        handlers, argument = self._handlers, request.argument
        handler = handlers[request.verb] if request.verb in handlers else handlers["unknown"]
        if handler._keyword and argument[: len(handler._keyword)].upper() != handler._keyword:
            handler = handlers["unknown"]
        request.argument = argument[len(handler._keyword) :].strip()
        if len(line) < 512 and not handler.has_secret and request.kind.argument != "secret":
            if len(self) >= 512:
                self.clear()
            self[line] = handler, request
        return handler, request


class _Handlers(dict[str, Handler]):
    """The handlers of a server by verb. The user's handlers replace built-in ones."""

    def __init__(self, options: Configuration, own: Iterable[Any] = ()) -> None:
        for kind in own:
            _check_handler(kind)
        built_in = [kind(options) for kind in _BUILT_IN if kind._is_offered(options)]
        super().__init__((verb, handler) for handler in built_in for verb in handler.verbs)
        self.update((verb.upper(), handler) for handler in (kind(options) for kind in own) for verb in handler.verbs)
        texts = [*vars(options).values(), *_read_profile(options.profile).values()]
        if own or any("{address}" in text for text in texts if isinstance(text, str)):
            for handler in self.values():
                vars(handler)["_choose"] = functools.partial(_choose_with_address, handler)
        self.commands = _ParsedLines(self)

    def turn_away(self) -> _Handlers:
        """The handlers of a refused session. Only QUIT is in sequence (RFC 5321 section 3.1)."""
        import copy

        others = copy.copy(self)
        for verb in self.keys() - {"QUIT"}:
            others[verb] = copy.copy(self[verb])
            others[verb].needs = ("session", *self[verb].needs)
        others.commands = _ParsedLines(others)
        return others


# ----------------------------------------------------------------------------------------- session

_LINE_LIMIT = 4096  # bytes of a command line and its end; RFC 5321 section 4.5.3.1.4 requires at least 512
_AUTH_LINE_LIMIT = 12288  # where lines may hold tokens; RFC 4954 section 4
# Only CRLF ends a line. If a bare LF did, one mail could smuggle in another (RFC 5321 section 4.1.1.4).
_END_OF_DATA = b"\r\n.\r\n"
_DOT_FAULTS = {"unstuffed-dot": rb"\r\n(\.[^.\r\n][^\r\n]{0,199})", "false-end": rb"\r\n(\.)(?:\n|\r(?!\Z))"}

# An endless session must not fill the memory. _TRUNCATION stands for the exchanges that were dropped.
_EXCHANGE_LIMIT, _SIZE_LIMIT = 10000, 4_000_000  # the number of exchanges in a record, and the size of their lines
_ATTEMPT_LIMIT = 100  # attempts to send a mail that are kept in full
# What begins a TLS handshake (RFC 8446 section 5.1), and how it is recorded.
_BEGIN_OF_TLS, _TLS_HANDSHAKE = b"\x16\x03", _Request("TLS handshake", "<TLS handshake>")
_TRUNCATION = _Exchange(_Request("truncated", "<truncated>"), None, None, 0.0, False)


class _Body:
    """The body of a mail while it arrives, after DATA or in the chunks of BDAT."""

    finish: Callable[[], _Reply]  # called at the end of the body or chunk
    request: _Request | None = None  # the BDAT of the current chunk
    ending: _Request  # the request that stands for the whole body
    size = 0  # bytes as sent, without the end marker or what may be its beginning
    missing = 0  # bytes of the current chunk that are still to come
    _whole: bytes | None = None  # the content, if take_whole() found it
    _pending = 0  # bytes at the end that may begin the end marker
    _dropped = 0  # bytes of an overlong body that were not kept

    def __init__(self, limit: int, thresholds: list[int], *, is_counted: bool) -> None:
        self.is_counted = is_counted  # whether it comes in chunks, which have no end marker and no stuffed dots
        self.thresholds = thresholds  # sizes at which rules apply, smallest first
        self._limit = limit
        self._raw = bytearray(b"\r\n")  # so that the first line begins like any other

    def feed(self, data: bytes, start: int) -> tuple[int, bool]:
        """Take data from start on. Returns where in it the body, the chunk or the way to the next stop ends; and
        whether the body or chunk is complete."""
        raw, end, begin = self._raw, len(data), len(self._raw)
        if self.thresholds:
            end = min(end, start + max(self.thresholds[0] - self.size - self._pending, bool(self._pending)))
        if self.is_counted:
            end = min(end, start + self.missing)
            self.missing -= end - start
            is_complete = not self.missing
            raw += data[start:end]
        else:
            raw += data[start:end]
            found = raw.find(_END_OF_DATA, max(0, begin - 4))  # the end marker may begin in earlier data
            is_complete = found >= 0
            if is_complete:
                end = start + found + len(_END_OF_DATA) - begin
                del raw[found + 2 :]
            self._pending = 0 if is_complete else 2 * raw.endswith(b"\r\n.\r") or int(raw.endswith(b"\r\n."))
        self.size = self._dropped + len(raw) - 2 - self._pending
        # At most one byte in four is a stuffed dot, so this much is too long even without them.
        if self._dropped or len(raw) > self._limit * 4 // 3 + 10:
            self._dropped += max(0, len(raw) - 4)
            del raw[:-4]
        return end, is_complete

    def take_whole(self, data: bytes, start: int) -> int:
        """Like feed(), for a body that came in one piece without stuffed dots, as most do. Returns 0 for any other."""
        if len(self._raw) > 2 or self.is_counted or self.thresholds or data.startswith(b".", start):
            return 0
        end = data.find(b"\r\n.", start)
        if end < 0 or not data.startswith(_END_OF_DATA, end) or end + 2 - start > self._limit:
            return 0
        self._whole = data[start : end + 2]
        self.size = len(self._whole)
        return end + len(_END_OF_DATA)

    def content(self) -> bytes | None:
        """The body without stuffed dots (RFC 5321 section 4.5.2); None if it is over the limit."""
        if self._whole is not None:
            return self._whole
        raw = self._raw
        if not self.is_counted and b"." in raw:  # searching for a dot is much faster than for CRLF and a dot
            raw = raw.replace(b"\r\n.", b"\r\n")
        return bytes(memoryview(raw)[2:]) if not self._dropped and len(raw) - 2 <= self._limit else None

    def ends_falsely(self) -> bool:
        """Whether the body ends with a wrong end marker that some clients send."""
        return re.search(rb"(?:[^\r]\n\.\r?|\r\n\.)\n\Z", self._raw[-5:]) is not None

    def end(self, verb: str) -> bytes | None:
        """Set the request that stands for the whole body, and return the content."""
        content, self.ending = self.content(), _Request(verb, f"<{self.size} bytes>")
        # Each doubled dot leaves one dot at the start of a line.
        if content is None or len(content) == self.size:
            return content
        if self.size - len(content) != content.count(b"\r\n.") + content.startswith(b"."):
            found = [(code, re.search(pattern, self._raw)) for code, pattern in _DOT_FAULTS.items()]
            self.ending.faults = tuple((code, _decode(match[1])) for code, match in found if match)
        return content


class _Mail:
    """What belongs to one mail. Only its session changes it. Others read the lists, which only grow or are replaced."""

    def __init__(self) -> None:
        self.steps: dict[str, _Exchange] = {}
        self.accepted_steps: set[str] = set()
        self.recipients: list[_Exchange] = []
        self.exchanges: list[_Exchange] = []
        self.body: _Body | None = None
        self.attempts = 0  # attempts to send a mail that are kept in full
        self.refused: list[_Exchange] = []  # refused exchanges of older attempts
        self.begin = 0  # the index from which all exchanges are kept
        self.discarded = 0  # how many accepted mails the message no longer shows
        self.has_begun = False  # whether MAIL came
        self.is_complete = False  # whether only RSET, NOOP and QUIT can still belong to it
        self.number = 0  # the id of its message; 0 if it has none yet
        self.delivered: Message | None = None  # the message that was accepted, or given to on_unaccepted
        self.has_ended = False  # whether on_end was called
        self.entry: _Entry | None = None  # its place in the mailbox

    def lasting(self) -> dict[str, _Exchange]:
        """The steps that stay in force after the mail, in the order in which they were taken."""
        accepted = self.accepted_steps
        return {step: said for step, said in self.steps.items() if step in _LASTING and step in accepted}

    def make_next(self) -> _Mail:
        """The mail after this one. It begins with the steps that are in force."""
        mail = _Mail()
        mail.steps = self.lasting()
        mail.exchanges = [*mail.steps.values()]
        mail.accepted_steps = {*mail.steps}
        return mail

    def replace_last(self, **changes: Any) -> None:
        """Change the last exchange wherever it is referred to, but not in messages that are already recorded."""
        old = self.exchanges[-1]
        new = old._replace(**changes)
        self.exchanges = [*self.exchanges[:-1], new]
        self.steps = {step: new if exchange is old else exchange for step, exchange in self.steps.items()}
        self.recipients = [new if exchange is old else exchange for exchange in self.recipients]

    def forget(self, body: _Exchange) -> None:
        """Forget an accepted mail, up to this exchange."""
        self.discarded += 1
        at = len(self.exchanges)
        while at and self.exchanges[at - 1] is not body:
            at -= 1
        if at:  # otherwise the mail was truncated
            self.exchanges = [*self.lasting().values(), *self.exchanges[at:]]
            self.attempts = self.begin = 0
            self.refused = []

    def begin_attempt(self) -> None:
        """If there are too many attempts to send a mail, keep only the refusals of the oldest one."""
        self.attempts += 1
        if self.attempts > _ATTEMPT_LIMIT:
            found = (at for at in range(self.begin, len(self.exchanges)) if self.exchanges[at].verb == "MAIL")
            next(found, 0)  # the oldest
            if at := next(found, 0):
                self._truncate(self.refused + [said for said in self.exchanges[self.begin : at] if said.is_refused], at)

    def limit_size(self) -> None:
        """If the record is over a limit, keep half of what is allowed."""
        sizes = [len(exchange.line) + len(exchange.response) for exchange in self.exchanges]
        at, size = max(0, len(sizes) - _EXCHANGE_LIMIT // 2), sum(sizes)
        if len(sizes) > _EXCHANGE_LIMIT or size > _SIZE_LIMIT:
            size = sum(sizes[at:])
            while size > _SIZE_LIMIT // 2:
                size -= sizes[at]
                at += 1
            self._truncate([], at)
            self.attempts = sum(said.verb == "MAIL" for said in self.exchanges[self.begin :])

    def _truncate(self, kept: list[_Exchange], at: int) -> None:
        """Keep these exchanges, all from index `at` on, and whatever a reader needs to understand these."""
        rest, lasting = self.exchanges[at:], self.lasting()
        greeting = [lasting.pop("greeting")] if "greeting" in lasting else []
        sender = [self.steps["mailfrom"]] if "mailfrom" in self.steps else []
        needed = [*lasting.values(), *sender, *[said for said in self.recipients if said.accepted][:1]]
        missing = [said for said in needed if not any(said is other for other in rest)]
        truncation = _TRUNCATION._replace(at=self.exchanges[at - 1].at)
        self.exchanges = [*greeting, *kept, truncation, *missing, *rest]
        self.refused, self.begin = kept, len(self.exchanges) - len(rest)

    def accepted_recipients(self) -> list[str]:
        return [recipient.value.address for recipient in self.recipients if recipient.accepted]


def _ignore(*arguments: object) -> None:
    pass


class _Context(NamedTuple):
    """The objects that all sessions of a server share."""

    options: Configuration
    handlers: _Handlers
    mailbox: _Mailbox
    log: _Log
    rules: _Rules
    on_message: Callable[[Message], object] = _ignore  # called with each accepted message, before the reply to it
    on_unaccepted: Callable[[Message], object] = _ignore  # called with each other message when it is complete
    on_refusal: Callable[[_Request, str], object] = _ignore  # called with each refused request and the reply
    on_erase: Callable[[Message], object] = _ignore  # called with a message before a refused mail is erased from it
    on_end: Callable[[Message], object] = _ignore  # called with each message that its session can no longer change
    early_ends: deque[str] = deque(maxlen=10)  # connections that ended before any command, and why


# A session is always in one state: the method that takes the next bytes. It returns where it stopped, and
# the reply, if there is one. It is kept unbound, because a bound method would make the session a reference cycle.
#
#     state          begins with                   ends with, and leads back to _take_line
#     _skip_line     a line that is too long       the rest of the line
#     _take_answer   AUTH, answered with 334       the answer
#     _take_body     DATA accepted, BDAT           the end marker, or the counted bytes
#     _ignore_input  STARTTLS accepted             the handshake; all that ends the session leads here, too, for good
_State = Callable[["_Session", bytes, int], tuple[int, _Reply | None]]


class _Session:
    """One SMTP conversation, without socket, thread and clock. How its bytes are cut shows only in has_more and at."""

    def __init__(self, context: _Context, peer: tuple[str, int]) -> None:
        self.context, self.handlers, self.commands = context, context.handlers, context.handlers.commands
        self.peer = peer
        self.rules = context.rules
        self.script: _Script | None = None  # the transcript's session that it plays
        self.request: _Request | None = None  # the last one, for the log
        self.has_more = False  # whether more input came together with it
        self.at = 0.0  # when it arrived
        self.mail = _Mail()
        self._take: _State = _Session._take_line
        self.rest = b""  # the beginning of a line
        self._unmeasured = 0  # bytes received since the size of the record was last checked
        self._keeps_messages = context.options.multiple_message_receiving
        self._line_limit = _LINE_LIMIT if context.options.auth_users is None else _AUTH_LINE_LIMIT

    @property
    def is_secure(self) -> bool:  # within TLS
        return "tls" in self.mail.steps

    @property
    def is_receiving_body(self) -> bool:
        return self._take is _Session._take_body

    def message(self) -> Message:
        """The message as it would be recorded now."""
        return Message(self.mail, self.peer, self.mail.number, self.context.options.tolerated)

    def message_with_body(self, content: bytes | None, *, without_history: bool = False) -> Message:
        """The message with a body that is not accepted yet. without_history omits what came between HELO and MAIL."""
        mail, message = self.mail, self.message()
        assert mail.body is not None
        exchange = _Exchange(mail.body.ending, None, content, self.at, self.has_more)
        exchanges = [*mail.exchanges, exchange]
        mails = [at for at, said in enumerate(exchanges) if at and said.verb == "MAIL"] if without_history else []
        if mails:
            exchanges[: mails[-1]] = mail.lasting().values()
        message._steps["msg"] = exchange
        vars(message).update(_exchanges=exchanges, _length=len(exchanges))
        return message

    def note(self, request: _Request | None, reply: _Reply | None, value: Any = None) -> _Exchange:
        exchange = _Exchange(request, reply, value, self.at, self.has_more)
        self.mail.exchanges.append(exchange)
        return exchange

    def note_early_input(self) -> None:
        """Record that the client has sent more before the last reply, which is still to be sent."""
        self.mail.replace_last(was_early=True)
        if self.mail.entry is not None:
            self._publish(complete=False, follows_mail=True)

    def greet(self, at: float = 0.0) -> _Reply:
        self.at = at
        self.script = self.rules.take_script() if self.rules.scripts else None
        reply = self.run(self.handlers["connect"], None, "")
        self.mail.accepted_steps.add("greeting")  # it stays in force, whatever it says
        if reply.text.startswith("5"):
            self.handlers = self.handlers.turn_away()
            self.commands = self.handlers.commands
        return reply

    def receive(self, data: bytes, at: float = 0.0) -> Iterator[_Reply]:
        """Yield the replies to data, which came at this time. A command is run when its reply is asked for."""
        self.at = at
        if self.rest:
            data, self.rest = self.rest + data, b""
        position, end = 0, len(data)
        if end > 512 or len(self.mail.exchanges) > _EXCHANGE_LIMIT:
            self._unmeasured += end
            if self._unmeasured > 65536 or len(self.mail.exchanges) > _EXCHANGE_LIMIT:
                self._unmeasured = 0
                self.mail.limit_size()
        while position < end:
            position, reply = self._take(self, data, position)
            if reply is not None:
                if reply.refuses and self.context.on_refusal is not _ignore:
                    self._call(self.context.on_refusal, self.request, reply.text)
                yield reply
                if reply.next is not None:  # drop the rest: input in clear must have no effect within TLS
                    return

    def end(self, reply: _Reply | None = None, at: float = 0.0) -> None:
        """Record what is left when the connection ends, and this reply unless the server had closed the session."""
        mail, body = self.mail, self.mail.body
        last = mail.exchanges[-1].reply if mail.exchanges else None
        self.at, self.has_more = at, False
        if body is not None:
            self._leave_body(body)
        self._take = _Session._ignore_input  # an unfinished login would refer to the session
        is_noted = reply is not None and not (last is not None and last.ends)
        if is_noted:
            self.note(None, reply)
        if self.request is not None and (mail.entry is None or body is not None or is_noted):
            self._publish(complete=True, follows_mail=body is None)
        self._report_unaccepted()
        self._report_end()

    def _report_unaccepted(self) -> None:
        """Call on_unaccepted for a message that on_message did not get."""
        mail = self.mail
        if mail.entry is not None and mail.delivered is None:
            mail.delivered = mail.entry.message
            self._call(self.context.on_unaccepted, mail.delivered)

    def _report_end(self) -> None:
        mail = self.mail
        if mail.entry is not None and not mail.has_ended:
            mail.has_ended = True
            self._call(self.context.on_end, mail.entry.message)

    def _take_line(self, data: bytes, at: int) -> tuple[int, _Reply | None]:
        if (end := data.find(b"\n", at, at + self._line_limit)) < 0:
            return self._take_part_of_line(data, at)
        handler, request = self.commands[data[at:end].decode("latin-1")]
        self.has_more = end + 1 < len(data)
        return end + 1, handler._begin(self, request)

    def _take_answer(self, data: bytes, at: int, run: Callable[[_Request, str], _Reply]) -> tuple[int, _Reply | None]:
        if (end := data.find(b"\n", at, at + self._line_limit)) < 0:
            return self._take_part_of_line(data, at)
        self._take = _Session._take_line
        text = _decode(data[at:end].strip())
        self.has_more = end + 1 < len(data)
        shown = "*" if text == "*" else "***"
        return end + 1, run(_Request("answer", shown, "", _find_faults(data[at:end], shown)), text)

    def leave_to_tls(self) -> _Reply:
        """End the session, because the client has begun a TLS handshake on a plain-text port."""
        self.request, self._take, self.has_more = _TLS_HANDSHAKE, _Session._ignore_input, False
        reply = _Reply("", b"", next=_Next.CLOSE)
        self.note(_TLS_HANDSHAKE, reply)
        return reply

    def _take_part_of_line(self, data: bytes, at: int) -> tuple[int, _Reply | None]:
        if data.startswith(_BEGIN_OF_TLS, at) and self._take is _Session._take_line:
            return len(data), self.leave_to_tls()
        if len(data) - at < self._line_limit:
            self.rest = data[at:]
            return len(data), None
        self._take = _Session._skip_line
        self.has_more = False
        line = f"line of over {self._line_limit} bytes"
        request = _Request("too long", line, "", (("long-command", line),))
        return at, self.run(self.handlers["too long"], request, "")

    def _skip_line(self, data: bytes, at: int) -> tuple[int, _Reply | None]:
        if (end := data.find(b"\n", at)) < 0:
            return len(data), None
        self._take = _Session._take_line
        return end + 1, None

    def _take_body(self, data: bytes, at: int) -> tuple[int, _Reply | None]:
        body = self.mail.body
        assert body is not None
        end = body.take_whole(data, at)
        at, is_complete = (end, True) if end else body.feed(data, at)
        pause = self._interrupt(body) if body.thresholds and body.size >= body.thresholds[0] else None
        if not is_complete or (pause is not None and pause.next):
            return at, pause
        self._take = _Session._take_line
        self.has_more = at < len(data)
        reply = body.finish()
        return at, reply if pause is None else reply.replace(delay=pause.delay + reply.delay)

    def _ignore_input(self, data: bytes, at: int) -> tuple[int, _Reply | None]:
        return len(data), None

    def expect_answer(self, run: Callable[[_Request, str], _Reply]) -> None:
        self._take = functools.partial(_Session._take_answer, run=run)

    def expect_body(self) -> None:
        self.mail.body = _Body(self.context.options.msg_size_limit, self.rules.body_thresholds(), is_counted=False)
        self.mail.body.finish = self.finish_body
        self._take = _Session._take_body

    def expect_chunk(self, size: int, request: _Request, run: Callable[[], _Reply]) -> _Reply | None:
        """Expect this many bytes of the body next, and then run the command that announced them."""
        self.request = request
        if self.mail.body is None:
            self.erase(("data", "msg"))
            self.mail.body = _Body(self.context.options.msg_size_limit, self.rules.body_thresholds(), is_counted=True)
        self.mail.body.request = request
        if not size:
            return run()
        self.mail.body.missing, self.mail.body.finish = size, run
        self._take = _Session._take_body
        return None

    def secure(self, version: str, cipher: str, at: float = 0.0) -> None:
        """Start over within TLS, and forget what came before (RFC 3207 section 4.2)."""
        self.erase((*_STEPS, "auth"))
        self.at, self.has_more = at, False
        self.mail.accepted_steps.add("tls")
        self.mail.steps["tls"] = self.note(None, None, (version, cipher))
        self._take = _Session._take_line

    def begin_mail_if_due(self, kind: _Verb) -> None:
        """Complete a mail that this command abandons, and begin the next one unless the command still belongs to it."""
        mail = self.mail
        if not self._keeps_messages:
            if mail.entry is not None and mail.entry.is_purged and not kind.follows_mail:
                # The rest of the session is another message. A mail that it still shows was not discarded.
                mail.discarded = -int("msg" in mail.accepted_steps)
                mail.number, mail.delivered, mail.entry = 0, None, None
        elif mail.has_begun and kind.ends_mail and not mail.is_complete:
            mail.is_complete = True
            if mail.body is not None:
                self._leave_body(mail.body)
            if not kind.follows_mail:
                self._publish(complete=True)
        if self._keeps_messages and mail.is_complete and not kind.follows_mail:
            self._report_end()
            self.mail = mail.make_next()
        if kind is _VERBS["MAIL"]:
            self.mail.has_begun = True
            self.mail.begin_attempt()

    def run(self, handler: Handler, request: _Request | None, argument: Any) -> _Reply:
        """Run a command. What it completes is recorded before its reply is returned."""
        if request is not None and (self.mail.entry is not None or request.kind.ends_mail):
            self.begin_mail_if_due(request.kind)
        try:
            reply = handler._run(self, request, argument)
        except BaseException:  # noqa: BLE001 - a handler of the user may raise anything
            self.context.log.failure(f"{type(handler).__name__} failed")
            reply = handler._find_reply("msg_msg_failed")
            self.note(request, reply)
        self.request, mail = request, self.mail
        if reply.next or mail.entry or mail.is_complete or (request and request.verb == "message"):
            self._complete(request, reply)
        return reply

    def _complete(self, request: _Request | None, reply: _Reply) -> None:
        if reply.next is not None:
            self._take = _Session._ignore_input
        if request is None:
            return
        mail, complete = self.mail, reply.ends
        if request.verb == "message":
            complete = complete or reply.accepts or self._keeps_messages
        elif complete and mail.body is not None:  # chunks without LAST; this exchange stays the last one
            *mail.exchanges, last = mail.exchanges  # a new list, because messages refer to this one
            self._leave_body(mail.body)
            mail.exchanges.append(last)
        if self._keeps_messages:
            mail.is_complete = complete = complete or mail.is_complete
        if complete or mail.entry is not None:
            self._publish(complete=complete, follows_mail=request.kind.follows_mail)

    def finish_body(self) -> _Reply:
        body = self.mail.body
        assert body is not None
        handler = self.handlers["message" if body.request is None else "last chunk"]
        content = body.end("message")
        reply = self.run(handler, body.ending, content)
        self.mail.body = None
        self.request = body.request or body.ending
        return reply

    def decide(
        self, texts: dict[str, str], names: Sequence[str], message: Callable[[], Message] | None = None, **limits: Any
    ) -> dict[str, Any]:
        """The aspects of a reply that rules set."""
        try:
            aspects = self.rules.decide(texts, names, message or self.message, self.script, **limits)
            if isinstance(text := aspects.get("reply"), str):
                aspects["reply"] = _fill_address(text, names)
            return aspects
        except BaseException:  # noqa: BLE001 - pytest.fail() is not an Exception
            self.context.log.failure("a rule failed")
            return {"reply": self.context.options.msg_msg_failed}

    def _interrupt(self, body: _Body) -> _Reply | None:
        """Apply the rules for this size of the body. They end the session, with or without a reply, or only delay."""
        after, names, content = body.thresholds.pop(0), self.mail.accepted_recipients(), body.end("partial message")
        texts = {"message": _decode(content or b"")}
        aspects = self.decide(texts, names, lambda: self.message_with_body(content), after=after)
        if not aspects:
            return None
        if "reply" in aspects or "then" in aspects:
            aspects.setdefault("then", _Next.CLOSE)
        reply = self.handlers["message"]._apply(aspects, _Reply("", b""))
        if reply.next is not None:
            reply, self.has_more = reply.replace(accepts=False), False
            self._leave_body(body, reply)
            self._take = _Session._ignore_input
            self._publish(complete=True)
        return reply

    def _leave_body(self, body: _Body, reply: _Reply | None = None) -> None:
        """Record what arrived of a body that will not be completed."""
        if body.missing:
            self.mail.steps.setdefault("data", self.note(body.request, None))
        content = body.end("partial message")
        self.mail.steps["msg"] = self.note(body.ending, reply, content)
        self.mail.body = None

    def deliver(self) -> bool:
        """Call on_message with the mail that is about to be accepted. Returns whether it succeeded."""
        mail = self.mail
        mail.number = 0
        mail.delivered = self._make_message()
        if self.context.on_message is not _ignore and not self._call(self.context.on_message, mail.delivered):
            mail.delivered = None
        return mail.delivered is not None

    def _call(self, function: Callable[..., object], *arguments: object) -> bool:
        try:
            function(*arguments)
        except BaseException:  # noqa: BLE001 - pytest.fail() is not an Exception
            self.context.log.failure("on_message failed")
            return False
        return True

    def _publish(self, *, complete: bool, follows_mail: bool = False) -> None:
        """Update the message in the mailbox, or add it if it is complete."""
        mail, mailbox = self.mail, self.context.mailbox
        message = mail.delivered
        if message is None or message._exchanges is not mail.exchanges or message._length != len(mail.exchanges):
            message = self._make_message()
        if mail.entry is not None:
            if mailbox.update(mail.entry, message) or follows_mail:
                return
            # It was purged while this command ran, so the command has begun another message.
            if mail.entry.message._id == message._id:
                mail.number = 0
                message = self._make_message()
            mail.entry = None
        if complete:
            mail.entry = mailbox.add(message)
            if self._keeps_messages:
                self._report_unaccepted()

    def _make_message(self) -> Message:
        mail = self.mail
        mail.number = mail.number or self.context.mailbox.make_number()
        return Message(mail, self.peer, mail.number, self.context.options.tolerated)

    def erase(self, steps: Sequence[str]) -> None:
        """Forget these steps, unless they belong to a complete message that is kept."""
        mail = self.mail
        if mail.steps.keys().isdisjoint(steps) or (self._keeps_messages and mail.is_complete):
            return
        body = mail.steps.get("msg") if "msg" in steps else None
        if body is not None and not body.accepted and self.context.on_erase is not _ignore:
            self._call(self.context.on_erase, self._make_message())
        for step in steps:
            mail.steps.pop(step, None)
        mail.accepted_steps.difference_update(steps)
        if "rcptto" in steps:
            mail.recipients = []
            if "mailfrom" in steps:
                mail.body = None
        if body is not None and body.accepted:
            mail.forget(body)


# ----------------------------------------------------------------------------------------- mailbox

_Where = Callable[[Message], object] | None


class _Entry:
    __slots__ = ("is_purged", "message", "number")

    def __init__(self, message: Message) -> None:
        self.message = message  # replaced under the lock of the mailbox, and read without it
        self.number = 0  # in the order of recording; set under the lock, before others see the entry
        self.is_purged = False  # likewise; who acts on it reads it again under the lock


class _Waiter:
    def __init__(self, entries: Iterable[_Entry]) -> None:
        # The lock of the mailbox guards the first two; only the waiting thread uses the third.
        self.unseen = dict.fromkeys(entries)  # new, or changed since it was looked at
        self.missing = 0  # how many more it needs before it is woken
        self.matching: dict[_Entry, Message] = {}

    def has_enough(self) -> bool:
        return len(self.unseen) >= self.missing

    def look_at(self, entries: Iterable[_Entry], where: _Where, deadline: float) -> None:
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

    def __init__(self) -> None:
        self.make_lock()
        self._last_number = 0
        self._recorded = 0  # how many were recorded, including purged ones
        self._waits = True  # False once end_waits() was called
        self._entries: list[_Entry] = []
        self._waiters: list[_Waiter] = []

    def make_lock(self) -> None:
        self._lock = threading.Lock()  # guards everything else
        self._changed = threading.Condition(self._lock)  # notified when a waiter has enough, and by end_waits()

    def make_number(self) -> int:
        with self._lock:
            self._last_number += 1
            return self._last_number

    def add(self, message: Message) -> _Entry:
        entry = _Entry(message)
        with self._lock:
            self._recorded += 1
            entry.number = self._recorded
            self._entries.append(entry)
            if self._waiters:  # otherwise the call would be wasted
                self._show(entry)
        return entry

    def update(self, entry: _Entry, message: Message) -> bool:
        """Replace the message of an entry. False if the entry was purged, and nothing is replaced."""
        with self._lock:
            if not entry.is_purged:
                if message._id != entry.message._id:  # the session's next mail replaces its last
                    self._recorded += 1
                    entry.number = self._recorded
                entry.message = message
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

    def read(self) -> tuple[int, dict[int, Message]]:
        """How many messages were recorded in all, and those that were not purged, by their place among these."""
        with self._lock:
            return self._recorded, {entry.number: entry.message for entry in self._entries}

    def end_waits(self) -> None:
        with self._lock:
            self._waits = False
            self._changed.notify_all()

    def _purge(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            entry.is_purged = True
        self._entries = [entry for entry in self._entries if not entry.is_purged]

    def wait(self, count: int, timeout: float, where: _Where, *, purge: bool = False) -> tuple[bool, list[Message]]:
        """Wait for count matching messages. Returns whether they came, and all that match; purges only if they came."""
        deadline = time.monotonic() + timeout
        with self._lock:
            waiter = _Waiter(self._entries)
            self._waiters.append(waiter)
        try:
            waiter_deadline = float("inf")  # all messages that were there before the call are looked at
            while True:
                with self._lock:
                    left = max(0.0, deadline - time.monotonic())
                    in_time = self._changed.wait_for(lambda: waiter.has_enough() or not self._waits, left)
                    in_time = in_time and self._waits
                    unseen, waiter.unseen = waiter.unseen, {}
                waiter.look_at(unseen, where, waiter_deadline)  # without the lock, because this calls the user's code
                waiter_deadline = deadline
                in_time = in_time and time.monotonic() < deadline
                if result := self._collect(waiter, count, purge=purge, is_last=not in_time):
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
    """The interface of a logger. A logging.Logger fits, too; its info() also gets the activity."""

    def info_activity(self, message: str, /) -> None: ...  # sessions, requests and replies
    def info(self, message: str, /) -> None: ...  # the start and the end of the server
    def warning(self, message: str, /) -> None: ...  # that a stop begins, broken connections
    def error(self, message: str, /) -> None: ...  # failed starts, refused clients, exceptions in user code


class _Log:
    """Calls a logger and survives its exceptions. Without a logger, prints what the options ask for."""

    def __init__(self, logger: Any, options: Configuration, failures: deque[str]) -> None:
        self._logger = logger
        self._prints = options.log_to_stdout
        self.shows_activity = logger is not None or (options.log_to_stdout and options.log_server_activity)
        self._has_failed = False  # not guarded: at worst, two threads report it
        # Exceptions in callbacks, with tracebacks, since the start or the last reset().
        self.failures = failures

    def activity(self, text: str) -> None:
        if self.shows_activity:
            self("info_activity", _printable(text))

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
                    sys.stderr.write(f"smtpmock: the log is incomplete, its logger raised {error!r}\n")

    def failure(self, what: str) -> None:
        """Show the user the current exception, in the log or, without one, as an uncaught exception of the thread."""
        import traceback

        kind, error, trace = sys.exc_info()
        text = "".join(traceback.format_exception_only(kind, error)).strip()  # this survives a __str__() that raises
        self.failures.append(f"{what}: {text}\n{traceback.format_exc()}".rstrip())
        if isinstance(error, _OutputError):  # a traceback would say nothing more
            with contextlib.suppress(Exception):
                sys.stderr.write(f"smtpmock: {error}\n")
                sys.stderr.flush()
        elif self._logger is None and not self._prints:
            if isinstance(error, SystemExit):  # threading.excepthook ignores it
                kind, error = SMTPMockError, SMTPMockError(f"{what}: {error!r}")
            with contextlib.suppress(BaseException):
                threading.excepthook(threading.ExceptHookArgs((kind, error, trace, threading.current_thread())))
        else:
            self("error", f"{what}: {traceback.format_exc()}")

    def forget_failures(self) -> list[str]:
        failures = []
        with contextlib.suppress(IndexError):
            while True:
                failures.append(self.failures.popleft())
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

_QUIT_TIMEOUT = 0.05  # seconds after its last command in which a client can QUIT before stop() ends its session
_SPARE_THREADS = 16
_ABORT_TIMEOUT = 5.0  # seconds to wait for an aborted session that user code holds up
_LINGER = 2.0  # seconds that a client has to close its side after the server has closed its own
_REPORT_LIMIT = 10  # messages and sessions in the text of a WaitTimeoutError

# Everything that differs between systems is here. (On macOS and others, an accepted socket inherits non-blocking
# mode from the listening socket; _set_timeout() sets the mode on every system.)
_IS_POSIX = os.name == "posix"
_RST_ON_CLOSE = struct.pack("ii" if _IS_POSIX else "hh", 1, 0)  # for SO_LINGER
_POLL_SECONDS = 0.02  # seconds between two checks of what no system call reports
_MUST_POLL = not _IS_POSIX  # on Windows, shutdown() does not interrupt what another thread waits for
# A poll() that reports a FIN behind unread input. Windows has none. That of macOS has no POLLRDHUP, and does not
# report an RST unless it is asked for another event.
_select: Any = select if hasattr(select, "POLLRDHUP") else None
_register_at_fork: Any = getattr(os, "register_at_fork", lambda **functions: None)  # Windows does not fork
# The signals that stop the command line. Windows has no SIGQUIT; only Windows has SIGBREAK (Ctrl-Break).
_SIGNALS = "SIGINT", "SIGTERM", "SIGQUIT", "SIGBREAK"


def _format_address(host: str, port: int) -> str:
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _set_timeout(sock: socket.socket, seconds: float) -> None:
    """Make reads and writes fail after this many seconds, with BlockingIOError or TimeoutError."""
    # On POSIX, settimeout() would add a poll() to every read and write, which is half of the cost of a command. A
    # timeout must neither be inherited from the listening socket nor be taken from socket.setdefaulttimeout().
    sock.settimeout(None if _IS_POSIX else seconds)
    if _IS_POSIX:
        timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        except OSError:  # a 32-bit system with 64-bit times has a longer timeval
            sock.settimeout(seconds)


# For tests: the certificate of an authority, a P-256 key, and the key's three certificates, in DER, zlib and base64.
# .ci/certificates.py made them with PyPI's cryptography, and discarded the authority's key, so nobody can sign more.
# The other key is as public as this file. They are valid from 2000 to 2100, but the expired one only until 2001.
_TEST_CERTIFICATES = """
eNozaGKcZtDEaLOAmYmRiUmkIvd97LEnwhOLlz+eW3bv4yudJFspAy42Dq02j3O2LMxMBmKGIgZCbMyhLMw83MW5JQW5+cnZCs6OBgrivAYGBoZACAZREvxG
higCOHVGGgizsYPNZ2KEWsTMyM7sxMCymHdDgGDhS/4bn/euOydR8a7nw23u1VWMASpmrlKOJ+KPfL6U43T4iXba5sDdLTum9ezM/rFqj90p4dTHsa+fCfNL
1C9OM0gxkAVaKcvHIsYikjvx3ne10As+8T6cW7XfWqcdean0zEAeJK3MImEg1oBdAcjJssKMjP9ZOAzYgBQTI4MBH0iMHyQGDBJGNuQAYvZgMHBlUmRocL00
6fDbCQE7rq7a2cZ9omViw8cELSvBlI618pnxqxlbmBRUzmY8zthYxXlwoY8bT2jSfi/RXa/0937YeP/7E4EjjOzbavJSK0pqDAyZGBlZFPy3vJj+7MXxJb5K
hb5O6tLS9Uyxf6817+xnfzS1NnJR2fkFXIigg2psYrwMxJXQiNXYUWz5reVPcG/pHoV1IcJfJohqhVMpYkUMhQwEIDo5c/KTE3My8otL8ESr64lfXjccX/At
23VscWXyTPvZxwyrD2Sy2vEeD/Us9RX5XMGUNqV9z51zIas1FNZ0TNXbvXzm4hPfrz66wb3kaLLknZ7FjUsMGhciRazzuqm/32mK/mRqWfLipZtkwlS2w26E
I5YHHrFMBmhRyt4AdDyQr8rCAwojbTZGVlZ2ZkYDHZCgIIuqgXITwqftLPUMDIztAgyogBEzVSjwvj3pV3NfIfHYweVzS3POhc07cTlmlv7ldUIXs0X5Z/pJ
AtPNU8+7+8xiJqt77n9UczryjBmTbabotr/H4tt22Cn52/7IgEfuRSAuh0Yux5nMMOPSlXod5ee/sh+afXdGZHslUZErhxa5QK7haNSSEbWKDD1CM27tm21e
tfHJ1NZ1B68KtE8rkipd+HWV81SeI+E3I28zKdg/VVgX4/BSPOUCV4S0kIv5i5lMvDx6O64pLXzEKyuvrQ6P2rNAXAyN2sinLy/fWcxyaO+bsAoT+YVM71tv
7qFSvpU1lDaQhOgUKi/Kz0vXBflZLzOvLDEnM4WmsTzVoHHSQMSyLCSWxQxEmrB5GTPH1qduTk1MyPwXdI2n/Oeqlw3zc2ceWxfywulxwc24rv+Wl4ERfzZj
8afOnrm2nyM5ODK2as4WdnJnjz5l512Ua/pvqUfsbQAqOmEP
"""


def _make_pem(name: str, kind: str = "CERTIFICATE") -> str:
    import base64
    import zlib

    parts = zlib.decompress(base64.b64decode(_TEST_CERTIFICATES)).split(b"|next|")
    text = base64.encodebytes(parts[("ca", "key", *_TEST_CONTEXTS).index(name)]).decode()
    return f"-----BEGIN {kind}-----\n{text}-----END {kind}-----\n"


@functools.cache
def _load_test_context(name: str) -> ssl.SSLContext:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = _make_pem(name) + _make_pem("key", "EC PRIVATE KEY")
    # Python loads keys only from files. Use a file in memory if the system has them, else one that only we can read.
    with contextlib.suppress(KeyError, OSError), open(vars(os)["memfd_create"]("smtpmock"), "w") as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context
    import tempfile

    descriptor, path = tempfile.mkstemp()
    try:
        with open(descriptor, "w") as file:
            file.write(pem)
        context.load_cert_chain(path)
    finally:
        os.unlink(path)
    return context


# What errors in a handshake mean, by the beginning of OpenSSL's reason.
_TLS_HINTS = {
    "the client must begin TLS, because of implicit_tls or STARTTLS": "WRONG_VERSION HTTP_REQ UNEXPECTED TimeoutError",
    "the ssl_context may have no certificate": "NO_SHARED_CIPHER NO_SUITABLE_SIGNATURE",
    "the client does not trust the certificate": "TLSV1_ALERT_UNKNOWN_CA SSLV3_ALERT_CERTIFICATE SSLV3_ALERT_BAD_CERT",
}


class _Connection(socketserver.BaseRequestHandler):
    """Moves bytes between a client and its session, and carries out the replies."""

    request: Any  # the socket; within TLS, an ssl.SSLSocket
    server: _Listener

    def setup(self) -> None:
        context = self.server.context  # read once, because configure() replaces it
        self.plain: socket.socket = self.request
        self.options = context.options
        self.log = context.log
        # Set only by its own thread, disconnect() and abort(). stop() reads is_idle and request.
        self.session = _Session(context, self.client_address[:2])
        self.unsent = bytearray()  # replies that are still to be sent
        self.is_idle = False  # waits for a command, so stop() can end it without losing anything
        self.grace = 0.0  # seconds that it may stay idle during stop(); 0 before its first command
        self.leaves_at = 0.0  # when the grace is over
        self.is_leaving = False  # waits for a command during stop(), which does not extend the grace
        self.must_linger = False  # because the server closes first
        self.ignores_input = False  # the client keeps sending during stop(); only an RST surely wakes it
        self.fault = ""  # of the TLS handshake
        self.is_over = False  # whether nothing follows its last reply; the client may connect again then
        self.is_recorded = False  # whether it has ended, and its messages are complete
        self.is_aborting = False  # whether it must end at once
        self.thread = threading.get_ident()
        self.server.connections[self] = None
        with self.server.accepting:
            self.ending = self.server.starting.pop(self.plain)  # CLOSE or RESET if disconnect() ends it
            self.is_aborting = self.must_linger = self.ending is not None
        if self.server.aborting.is_set():  # read after the add(); abort() does the reverse
            self.is_aborting = True
        self.log.activity("SMTP session started")

    def handle(self) -> None:
        try:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _set_timeout(self.request, self.options.session_timeout)
            goes_on = not self.options.implicit_tls or self._start_tls()
            goes_on = goes_on and self._say(self.session.greet(self._now()))
            while goes_on and (data := self._read()):
                for reply in self.session.receive(data, self._now()):
                    if not self._say(reply, self.session.request):
                        return
        except OSError as error:  # the client is gone or does not read
            self.log("warning", f"SMTP session broke off: {error}")

    def _now(self) -> float:
        return self.server.epoch + time.monotonic()

    def finish(self) -> None:
        self.session.end(_Reply("", b"", next=self.ending) if self.ending else None, self._now())
        if self.session.request is None or self.fault:
            reason = "disconnect() ended it" if self.ending else self.fault or "left before any command"
            self.server.context.early_ends.append(f"{_format_address(*self.client_address[:2])}: {reason}")
        self.is_recorded = True
        with self.server.changed:
            self.server.changed.notify_all()
        self.log.activity("SMTP session finished")
        if self.ending is _Next.RESET:
            self._reset()
        elif self.must_linger:
            self._linger()
        self.server.connections.pop(self, None)
        if self.request is not self.plain:  # the listener closes the plain socket, but not this one
            self.shut_down(socket.SHUT_WR)
            self.request.close()

    def _say(self, reply: _Reply, request: _Request | None = None) -> bool:
        """Log the reply, wait, and send it. Returns whether the session continues."""
        if self.is_aborting:
            return False
        is_logged = self.log.shows_activity and (reply.data or reply.next)  # unless a rule only delays a body
        if is_logged and request is not None:
            is_body = request.verb == "message"
            self.log.activity(f"SMTP request: {'message binary data portion' if is_body else request.line}")
        if reply.delay:
            self._flush()
            if not self._pause(reply.delay):
                return False
            if reply.data and reply.next is None and not self.session.is_secure and self._peek():
                self.session.note_early_input()
        if is_logged:
            self.log.activity(f"SMTP response: {reply.text if reply.data else 'none'}")
        self.is_over = reply.next is not None and reply.next in (_Next.CLOSE, _Next.RESET)
        if not reply.trickle:
            self.unsent += reply.data
        elif not self._trickle(reply):
            return False
        # The replies to commands that came together are sent together (RFC 2920).
        if reply.next is None and len(self.unsent) < 65536:
            return True
        self._flush()
        return reply.next is None or self._go_on(reply)

    def _go_on(self, reply: _Reply) -> bool:
        """Do what follows a reply. Returns whether the session continues."""
        if reply.next is _Next.TLS:
            return self._start_tls()
        if reply.next is _Next.RESET:
            self._reset()
        elif reply.next is _Next.SILENCE:  # until one side ends the session, or session_timeout has passed in silence
            self.is_idle = True
            with contextlib.suppress(OSError):
                while self._await(selectors.EVENT_READ) and self.request.recv(65536):
                    pass
        elif reply.next is _Next.CLOSE:
            self.must_linger = "quit" not in self.session.mail.accepted_steps  # nothing may follow a QUIT
            if reply.data and self.session.is_secure:
                self.request.settimeout(0)  # sends the alert, and does not wait for the client's
                with contextlib.suppress(OSError, ValueError):
                    self.request.unwrap()
        return False

    def _reset(self) -> None:
        with contextlib.suppress(OSError):
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
        self.request.close()

    def _pause(self, seconds: float) -> bool:
        """Wait. False if an RST, the server or, during stop(), the client's FIN ends the session before that."""
        deadline = time.monotonic() + seconds
        if _select is None:
            return self._pause_and_look(deadline)
        poll = _select.poll()
        hang_up = _select.POLLRDHUP  # a FIN, or shut_down(); errors and an RST are always reported
        stopping = self.server.stopping  # read once: if it changes now, the wake-up has not come yet
        poll.register(self.request, hang_up)
        if not stopping:
            poll.register(self.server.wake[1], _select.POLLIN)
        while events := dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000)):
            event = events.get(self.request.fileno(), 0)
            if self.is_aborting or event & ~hang_up or (event and stopping):
                return False
            if not event:  # stop() has begun
                stopping = True
                poll.unregister(self.server.wake[1])
            poll.modify(self.request, hang_up if stopping else 0)  # a client that sent a FIN still reads the reply
        return True

    def _pause_and_look(self, deadline: float) -> bool:
        """Like _pause(), without such a poll(). During stop(), it does not see a FIN behind unread input."""
        while (left := deadline - time.monotonic()) > 0:
            with self.server.changed:
                if self.server.changed.wait_for(lambda: self.is_aborting, min(left, _POLL_SECONDS)):
                    return False
            if self._peek() == b"" and self.server.stopping:
                return False
        return True

    def _peek(self) -> bytes | None:
        """The next byte of the client, which stays unread. Empty after its FIN, None if there is no input."""
        timeout = self.request.gettimeout()
        self.request.settimeout(0)  # Windows has no MSG_DONTWAIT
        try:
            return socket.socket.recv(self.request, 1, socket.MSG_PEEK)  # raw input, even within TLS
        except BlockingIOError:
            return None
        finally:
            self.request.settimeout(timeout)

    def _trickle(self, reply: _Reply) -> bool:
        self._flush()
        for index in range(len(reply.data)):
            if index and not self._pause(reply.trickle):
                return False
            self.unsent += reply.data[index : index + 1]
            self._flush()
        return True

    def _start_tls(self) -> bool:
        """Returns whether the handshake succeeded."""
        import ssl

        self.plain.settimeout(0)  # or the handshake would wait in OpenSSL, where nothing can interrupt it
        try:
            context: Any = self.options.ssl_context
            context = _load_test_context(context) if isinstance(context, str) else context
            self.request = context.wrap_socket(self.plain, server_side=True, do_handshake_on_connect=False)
            self.is_idle = True
            while not self.session.is_secure and self._await(selectors.EVENT_READ):
                with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    self.request.do_handshake()
                    self.session.secure(self.request.version(), self.request.cipher()[0], self._now())
            self.request.settimeout(self.options.session_timeout)  # OpenSSL respects this, but not SO_RCVTIMEO
            self.is_idle = False
        except (OSError, ValueError) as error:
            self.fault = f"TLS handshake failed: {error}"
            name = str(getattr(error, "reason", type(error).__name__))
            hints = [f"; {hint}" for hint, names in _TLS_HINTS.items() if name.startswith(tuple(names.split()))]
            self.fault += "".join(hints)
            self.log("warning", f"SMTP session broke off: {self.fault}")
        return self.session.is_secure

    def _linger(self) -> None:
        """Send a FIN, and read until the client closes as well. Closing with unread input would send an RST."""
        self.leaves_at = 0.0
        self.is_idle = True
        deadline = time.monotonic() + _LINGER
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.request, socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                if _MUST_POLL:
                    self._await(selectors.EVENT_READ, left)
                self.request.settimeout(0 if self.server.stopping else left)
                if not socket.socket.recv(self.request, 262144):
                    break
                self.ignores_input = self.ignores_input or self.server.stopping
        if self.ignores_input:
            self._reset()

    def _flush(self) -> None:
        while self.unsent and _MUST_POLL:
            self._await(selectors.EVENT_WRITE)
            del self.unsent[: self.request.send(self.unsent)]
        if self.unsent:
            self.request.sendall(self.unsent)
            self.unsent.clear()

    def _read(self) -> bytes:
        """What the client sends next; empty at the end of the session."""
        self._flush()
        server = self.server
        waits = not self.session.is_receiving_body
        if waits and not self.is_leaving:
            self.leaves_at = time.monotonic() + self.grace
            self.is_leaving = server.stopping
        try:
            # Set is_idle before reading stopping. stop() does the reverse, so one of the two sees the other's change.
            self.is_idle = waits
            # No farewell could be sent after stop() has interrupted a read within TLS.
            must_await = _MUST_POLL or self.request is not self.plain or (waits and server.stopping)
            if not must_await or self._await(selectors.EVENT_READ):
                body = self.session.mail.body
                # From 128 KiB up, glibc's malloc() maps each buffer anew, which takes longer than to read a small body.
                data: bytes = self.request.recv(262144 if body is not None and body.size else 65536)
                self.is_idle = False  # before the time is read; stop() does the reverse
                if not (waits and server.stopping) or time.monotonic() < self.leaves_at:
                    self.grace = self.grace or min(_QUIT_TIMEOUT, self.options.shutdown_timeout)
                    return data
                self.ignores_input = bool(data)
            farewell = self.options.msg_server_shutdown
        except (TimeoutError, BlockingIOError):
            farewell = self.options.msg_session_timeout
        except ConnectionError:  # an RST ends a session like a FIN
            return b""
        reply = _Reply(farewell, next=_Next.CLOSE)
        self.session.end(reply, self._now())
        self._say(reply)
        return b""

    def _await(self, event: int, seconds: float | None = None) -> bool:
        """Wait until the socket is ready. False if the session is idle, and stop() ends it."""
        deadline = time.monotonic() + (self.options.session_timeout if seconds is None else seconds)
        reads = event == selectors.EVENT_READ
        is_ready = reads and self.session.is_secure and self.request.pending()
        with selectors.DefaultSelector() as selector:
            selector.register(self.request, event)
            while True:
                leaves = reads and self.is_idle and self.server.stopping
                left = (self.leaves_at if leaves else deadline) - time.monotonic()
                if self.is_aborting and not self.is_recorded:  # _linger() may still read; OpenSSL would send an alert
                    raise ConnectionAbortedError("the server has ended it")
                if is_ready or (leaves and left <= 0):
                    return not leaves or left > 0
                if left <= 0:
                    raise TimeoutError("timed out")
                is_ready = bool(selector.select(min(left, _POLL_SECONDS) if _MUST_POLL else left))

    def has_left(self) -> bool:
        """Whether it has ended, because the client closed. Called by any thread."""
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or there is no such poll()
            poll = _select.poll()
            poll.register(self.request, _select.POLLRDHUP)
            if poll.poll(0):
                self.await_end(time.monotonic() + _QUIT_TIMEOUT)
        return self.is_recorded

    def await_end(self, until: float) -> None:
        """Wait until the session has ended, at most until this time. Called by another thread."""
        if (left := until - time.monotonic()) > 0:
            with self.server.changed:
                self.server.changed.wait_for(lambda: self.is_recorded, left)

    def shut_down(self, how: int) -> None:
        """Interrupt the session's thread if it waits in the socket. Called by any thread."""
        with contextlib.suppress(OSError):  # the connection may just have ended
            if how != socket.SHUT_RD or not _MUST_POLL:  # after SHUT_RD, Windows answers input with an RST
                socket.socket.shutdown(self.request, how)  # SSLSocket.shutdown() would forget TLS

    def disconnect(self, *, reset: bool) -> None:
        """End the session with a FIN or an RST. Called by any thread."""
        self.ending = _Next.RESET if reset else _Next.CLOSE
        self.must_linger = True
        self.is_aborting = True
        self.shut_down(socket.SHUT_RD if reset else socket.SHUT_RDWR)  # SHUT_WR would send a FIN before the RST


class _Thread(threading.Thread):
    """A thread that sets an event at its end. Before Python 3.13, is_alive() is wrong after an interrupted join()."""

    def __init__(self, name: str, target: Callable[[], object]) -> None:
        super().__init__(target=target, name=name, daemon=True)  # a forgotten server cannot keep the interpreter alive
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.ended.set()


class _SessionThread(_Thread):
    """Serves one client after another, because starting a thread costs as much as a short session."""

    def __init__(self, listener: _Listener) -> None:
        from queue import SimpleQueue

        super().__init__("smtpmock session", self._serve_clients)
        self.listener = listener
        self.clients: SimpleQueue[tuple[Any, Any] | None] = SimpleQueue()  # None comes after the last client
        self.start()

    def _serve_clients(self) -> None:
        while (client := self.clients.get()) is not None:
            self.listener.process_request_thread(*client)
            if len(self.listener.spare_threads) >= _SPARE_THREADS:
                return
            self.listener.spare_threads.append(self)


def _join_threads(threads: Sequence[_Thread], timeout: float) -> bool:
    """Wait for all threads but this one, in which a callback may have called stop(). False on timeout."""
    deadline = time.monotonic() + timeout
    others = [thread for thread in threads if thread is not threading.current_thread()]
    for thread in others:
        if thread.ended.wait(max(0.0, deadline - time.monotonic())):
            thread.join()
    return all(thread.ended.is_set() for thread in others)


# The listeners whose sockets a forked child must close, and the servers whose locks it must replace.
_listeners: weakref.WeakSet[_Listener] = weakref.WeakSet()
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = _IS_POSIX  # on Windows, it would let two servers share a port
    request_queue_size = socket.SOMAXCONN

    def __init__(self, family: int, address: Any, context: _Context, connection: Any) -> None:
        self.address_family = family
        super().__init__(address, connection, bind_and_activate=False)
        self.context = context
        self.connections: dict[Any, None] = {}  # the open ones, oldest first; every change is atomic
        self.starting: dict[socket.socket, _Next | None] = {}  # accepted, but no connection yet; how to end them
        self.accepting = threading.Lock()  # guards starting; held while a client is accepted
        self.spare_threads: list[_SessionThread] = []  # threads add themselves; only the listener's thread removes them
        self.was_opened = False  # guarded by closing
        self.stopping = False  # never reset, so any thread may set it
        self.aborting = threading.Event()  # set when the remaining sessions must end at once
        self.closing = threading.RLock()  # held by the thread that opens or closes
        self.thread = _Thread("smtpmock listener", self.serve_forever)
        self.changed = threading.Condition()  # notified when a session is recorded or must end
        self.has_shortage = False  # of file descriptors or threads; the listener's thread logs it once
        self.epoch = time.time() - time.monotonic()  # so that differences between times are monotonic
        self.wake: tuple[socket.socket, ...] = ()  # a byte is sent to the first when the server stops
        try:
            self.socket.setblocking(False)  # a client may leave before it is accepted
            self.wake = socket.socketpair()
            if family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # [::] also accepts IPv4
            self.server_bind()
        except BaseException:
            self.server_close()
            raise
        _listeners.add(self)

    def open(self) -> None:
        with self.closing:
            if not self.stopping:  # a logger may have called stop() already
                self.selector = selectors.DefaultSelector()
                self.was_opened = True  # set before start(), which may be interrupted
                try:
                    self.thread.start()
                except RuntimeError as error:
                    if isinstance(error.__context__, KeyboardInterrupt):
                        raise error.__context__ from None  # an interrupt within the locks of threading makes them fail
                    self.was_opened = False  # there is no thread to wait for
                    raise

    def serve_forever(self, poll_interval: float | None = None) -> None:
        """Accept clients until close(), which wakes the selector. There is no polling."""
        with self.selector as selector, contextlib.suppress(ValueError):
            if not self.stopping:  # register() raises ValueError if the socket is already closed
                selector.register(self.socket, selectors.EVENT_READ)
                selector.register(self.wake[1], selectors.EVENT_READ)
            while not self.stopping:
                selector.select(poll_interval)
                if not self.stopping:
                    self.handle_request()

    def handle_request(self) -> None:
        try:
            with self.accepting:
                client = self.get_request()
                self.starting[client[0]] = None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._log_shortage(error)
                self.aborting.wait(0.05)  # the client is still waiting, and would wake this thread at once
            return  # with any other error, the client is gone
        try:
            thread = self.spare_threads.pop() if self.spare_threads else _SessionThread(self)
        except RuntimeError as error:
            self._log_shortage(error)
            with contextlib.suppress(OSError):
                client[0].send(b"421 No thread for another session\r\n")
            with self.accepting:
                del self.starting[client[0]]
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
        """End all sessions, by force after timeout seconds. Returns whether force was needed; None if another thread
        does it, which waits for the session of this one. After an exception, another call finishes the job."""
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
        """Close the listener. Every step can be repeated."""
        self.stopping = True
        with contextlib.suppress(OSError):
            self.wake[0].send(b"\0")
        if self.was_opened:
            # If start() was interrupted, the thread may not run yet. It will see that it has to end.
            _join_threads([self.thread], 5 if self.thread.ident else 0.1)
        # On Linux, this makes every copy of the socket stop listening, even in a process that C code has forked.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for connection in sorted(self.connections.copy(), key=operator.attrgetter("leaves_at")):
            if connection.is_idle:
                connection.await_end(connection.leaves_at)
            if connection.leaves_at <= time.monotonic() and connection.is_idle:
                connection.shut_down(socket.SHUT_RD)
        threads = [t for t in threading.enumerate() if isinstance(t, _SessionThread) and t.listener is self]
        for thread in threads:
            thread.clients.put(None)
        if not _join_threads(threads, timeout):
            self.abort()
            if not _join_threads(threads, _ABORT_TIMEOUT):
                self._tell_holders()
        self.server_close()
        return self.aborting.is_set()

    def abort(self) -> None:
        self.aborting.set()
        for connection in self.connections.copy():
            # With an RST: otherwise a client that is still sending might wait for a minute.
            connection.is_aborting = True
            with contextlib.suppress(OSError):
                connection.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            connection.shut_down(socket.SHUT_RDWR)
        with self.changed:
            self.changed.notify_all()

    def await_quits(self) -> None:
        """Let clients QUIT if their last command was just answered or is about to be."""
        now = time.monotonic()
        for connection in self.connections.copy():
            connection.await_end(connection.leaves_at if connection.is_idle else now + connection.grace)

    def disconnect(self, *, reset: bool) -> None:
        """End the open sessions and those that are about to begin, and wait until they are recorded."""
        with self.accepting:
            with contextlib.suppress(OSError):  # until no client waits to be accepted
                while True:
                    client, address = self.get_request()
                    self.context.early_ends.append(f"{_format_address(*address[:2])}: disconnect() ended it")
                    self.shutdown_request(client)
            self.starting = dict.fromkeys(self.starting, _Next.RESET if reset else _Next.CLOSE)
        connections = self.connections.copy()
        for connection in connections:
            connection.disconnect(reset=reset)
        thread = threading.current_thread()
        waits = not (isinstance(thread, _SessionThread) and thread.listener is self)  # or callbacks would deadlock
        with self.changed:
            self.changed.notify_all()
            if not waits or self.changed.wait_for(lambda: all(c.is_recorded for c in connections), 0.1):
                return
            for connection in connections:  # those that wait for their client to read
                connection.shut_down(socket.SHUT_RDWR)
            self.changed.wait_for(lambda: all(c.is_recorded for c in connections), _ABORT_TIMEOUT)
        self._tell_holders()

    def _tell_holders(self) -> None:
        """Log which functions of the user hold up sessions."""
        import traceback

        for connection in self.connections.copy():
            frame = sys._current_frames().get(connection.thread)
            if connection.is_aborting and not connection.is_recorded and frame is not None:
                calls = "".join(traceback.format_stack(frame)[-8:])
                self.context.log("warning", f"SMTP session is held up, last calls:\n{calls}")

    def server_close(self) -> None:
        for sock in (self.socket, *self.wake):
            sock.close()


def _abandon_listeners() -> None:
    """Close the sockets in a forked child. The parent has the threads, and continues to serve the clients."""
    for server in list(_servers):  # another thread of the parent may hold the old locks
        server._lifecycle, server._rules._lock = threading.Lock(), threading.Lock()
        server._mailbox.make_lock()
    for listener in list(_listeners):
        listener.closing, listener.accepting = threading.RLock(), threading.Lock()
        listener.stopping, listener.was_opened = True, False
        for connection in listener.connections:
            connection.request.close()
        listener.connections.clear()
        listener.server_close()


_register_at_fork(after_in_child=_abandon_listeners)


def _bind(context: _Context, host: str, port: int, connection: Any = _Connection) -> _Listener:
    """A listener on the first of the host's addresses that is free."""
    failure = OSError("it has no address")
    name = host.strip("[]")
    encoded = name.encode() if name.isascii() else name  # a str would import the IDNA codec
    for family, _, _, _, address in socket.getaddrinfo(encoded, port, type=socket.SOCK_STREAM):
        try:
            return _Listener(family, address, context, connection)
        except OSError as error:
            failure = error
    raise failure


def _check_wait(count: object, timeout: object, where: object) -> None:
    _check("count", count, _COUNT)
    _check("timeout", timeout, _SECONDS)
    if where is not None:
        _check("where", where, _OptionType("a function of a Message; timeout is the argument after it", callable))


def _join_options(configuration: Configuration | None, options: dict[str, Any]) -> dict[str, Any]:
    if configuration is None:
        return options
    _check("configuration", configuration, _CONFIGURATION)
    return {**vars(configuration), **options}


class Server:
    """An SMTP server that runs in threads of this process.

    Options are given by name, as a Configuration, or both; names take precedence. help(Configuration) lists them.
    An invalid one raises ConfigurationError. A logger (a Logger or logging.Logger) replaces the default one. on_message
    is called with each accepted message in the thread of its session, before the 250 is sent. If it raises, the message
    is refused with msg_msg_failed and the exception goes to the logger or, without one, to threading.excepthook.
    handlers are subclasses of Handler, for verbs of your own or in place of the built-in ones.
    """

    __signature__: ClassVar[Any] = _DataclassAttribute(_ServerOptions)

    @_shows_options(_ServerOptions)
    def __init__(self, configuration: Configuration | None = None, **options: Any) -> None:
        self._options = self._made_with = given = _ServerOptions(**_join_options(configuration, options))
        self._host, self._port = given.host, given.port  # set by start()
        handlers, log = _Handlers(given, given.handlers), _Log(given.logger, given, deque(maxlen=100))
        self._mailbox, self._rules = _Mailbox(), _Rules(given, handlers)
        shared = (given, handlers, self._mailbox, log, self._rules, given.on_message or _ignore)
        self._context = _Context(*shared, early_ends=deque(maxlen=_REPORT_LIMIT))  # replaced, never changed
        self._warned: set[int] = set()  # ids of messages with a warning; two threads may both warn about one
        # Guards _listener and _context; never held while the user's code runs.
        self._lifecycle = threading.Lock()
        self._listener: _Listener | None = None
        _servers.add(self)

    if not TYPE_CHECKING:  # otherwise type checkers would accept any name

        def __setattr__(self, name: str, value: object) -> None:
            if name in _ServerOptions._declared and type(self) is Server:  # a subclass may have its own attributes
                raise AttributeError(f"{name} is an option, not an attribute: configure({name}={value!r}) changes it")
            super().__setattr__(name, value)

        def __getattr__(self, name: str) -> NoReturn:
            is_option = name in _ServerOptions._declared
            hint = f"; it is an option: configure({name}=...)" if is_option else _find_other_name(name, _OTHER_NAMES)
            raise AttributeError(f"a Server has no attribute {name!r}{hint}")

    def with_logger(self, logger: Logger | logging.Logger | None) -> Server:
        """Log to this Logger or logging.Logger from now on; None means the default one. reset() does not undo this."""
        self._made_with = self._made_with._replace(logger=logger)
        self._change_options(lambda options: options._replace(logger=logger))
        return self

    @_shows_options(_Changes)
    def configure(self, configuration: Configuration | None = None, **options: Any) -> None:
        """Change options for new sessions; open sessions keep theirs.

        It takes the arguments of Server(), except host and port. Options not given stay as they are. An invalid
        one raises ConfigurationError, and nothing changes. reset() restores the options that the server was made with.
        """
        changes = _join_options(configuration, options)
        for name in _AddressOptions._declared:
            if name in changes:
                raise ConfigurationError("cannot be changed by configure(), only by Server()", name, changes[name])
        self._change_options(lambda options: options._replace(**changes))

    def _change_options(self, change: Callable[[_ServerOptions], _ServerOptions]) -> None:
        """Change the options for new sessions. If one is invalid, nothing changes."""
        base = self._options
        options = change(base)
        table = _Handlers(options, options.handlers)
        log = _Log(options.logger, options, self._context.log.failures)
        with self._lifecycle:
            if self._options is base:
                on_message = self._context.on_message
                if options.on_message is not base.on_message:
                    on_message = options.on_message or _ignore
                self._options = self._rules.options = options
                self._rules.verbs = table
                self._context = self._context._replace(options=options, handlers=table, log=log, on_message=on_message)
                if self._listener is not None:
                    self._listener.context = self._context
                return
        self._change_options(change)  # another thread has changed options in the meantime

    def disconnect(self, reset: bool = False) -> None:
        """End all open sessions at once, with a FIN or an RST. New clients can connect.

        All sessions are recorded when it returns, unless your code holds one up for over 5 seconds. In the
        thread of a session, as in on_message, it does not wait.
        """
        _check("reset", reset, _FLAG)
        if (listener := self._listener) is not None:
            listener.disconnect(reset=reset)

    def start(self) -> Server:
        """Start to listen. Clients can connect when it returns. Raises ServerStateError or ServerStartError."""
        return self._start_and_announce(lambda host, port: None)

    def _start_and_announce(self, announce: Callable[[str, int], None]) -> Server:
        """Like start(). Calls announce() when clients can connect, before the first is served."""
        if self._options.log_server_activity and not self._context.log.shows_activity:
            import warnings

            warnings.warn("log_server_activity needs log_to_stdout=True or a logger", SMTPMockWarning, 3)
        listener = None
        try:
            with self._lifecycle:
                if self._listener is not None:
                    raise ServerStateError(f"{self!r} cannot start: it is running")
                listener = self._listener = _bind(self._context, self._options.host, self._options.port)
            self._host, self._port = self._options.host.strip("[]"), listener.server_address[1]
            listener.server_activate()  # first, because who reads the announcement may connect at once
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
                raise self._explain(error, self._options.host, self._options.port) from error
            raise
        return self

    def _explain(self, error: Exception, host: str, port: int) -> ServerStartError:
        reason = getattr(error, "strerror", None) or error
        explained = ServerStartError(f"cannot listen on {_format_address(host, port)}: {reason}")
        explained.errno = getattr(error, "errno", None)
        self._context.log("error", str(explained))
        return explained

    def stop(self) -> None:
        """End all sessions and give up the port. Raises ServerStateError if the server is not running.

        A session that waits for a command gets a 421, but not before 50 ms after its last command, so that its client
        can QUIT. One that receives a body or waits out a delay may finish that within shutdown_timeout. All are
        recorded, and no thread or socket is left. An interrupted stop() can be called again. In the thread of a
        session, stop() does not wait for that session to end.
        """
        with self._lifecycle:
            if (listener := self._listener) is None:
                raise ServerStateError(f"{self!r} cannot stop: it is not running")
            is_first, listener.stopping = not listener.stopping, True
        if is_first:
            self._context.log("warning", "SMTP mock server is in the shutdown mode and won't accept new connections")
        self._discard(listener, self._options.shutdown_timeout)

    def _discard(self, listener: _Listener, timeout: float) -> None:
        """Close the listener. The first thread that finishes logs it."""
        is_forced = listener.close(timeout)
        with self._lifecycle:
            is_first = is_forced is not None and self._listener is listener
            if is_first:
                self._listener = None
        if is_first and listener.was_opened:
            result = "force stopped by timeout" if is_forced else "stopped successfully"
            self._context.log("info", f"SMTP mock server was {result}")

    def __enter__(self) -> Server:
        return self if self.is_running else self.start()

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ServerStateError):  # the block may have stopped it
            self.stop()

    @property
    def host(self) -> str:
        """The configured host. From start() on without the brackets of [::1], as clients expect it."""
        return self._host

    @property
    def port(self) -> int:
        """The configured port. From start() on the real one, which stays after stop(). ServerStateError if it is 0."""
        if not self._port:
            raise ServerStateError(f"{self!r} was not started yet, so it has no port")
        return self._port

    @property
    def url(self) -> str:
        """Such as smtp://127.0.0.1:2525, or smtps:// with implicit_tls."""
        return f"smtp{'s' * self._options.implicit_tls}://{_format_address(self._host, self.port)}"

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped since."""
        return self._listener is not None

    def messages(self) -> list[Message]:
        """The recorded messages, oldest first."""
        return self._warn(self._mailbox.messages(purge=False))

    def messages_and_purge(self) -> list[Message]:
        """Remove and return the recorded messages, oldest first."""
        self._warn(self._mailbox.messages(purge=False))  # first, because it may raise the warning
        return self._mailbox.messages(purge=True)

    def message(self, where: _Where = None, timeout: float = 0.0) -> Message:
        """The one accepted mail for which where(message) is true. WaitTimeoutError if none comes, or more than one."""
        __tracebackhide__ = True  # of pytest
        _check_wait(1, timeout, where)
        _, found = self._mailbox.wait(1, timeout, lambda mail: mail.is_consistent and (where is None or where(mail)))
        if len(found) != 1:
            self._warn(self._mailbox.messages(purge=False))
            what = "accepted messages" if where is None else "matching accepted messages"
            hint = "it did not wait, as message(timeout=5) does" if not timeout else ""
            hint = "messages() returns all, and where= chooses" if found else hint
            text = f"{len(found)} {what} where there should be 1{hint and f'; {hint}'}"
            raise WaitTimeoutError("\n  ".join([text, *self._report()]), found)
        return self._warn(found)[0]

    @property
    def outbox(self) -> list[Message]:
        """The accepted mails, oldest first."""
        return [message for message in self._warn(self._mailbox.messages(purge=False)) if message.is_consistent]

    def sessions(self) -> list[Message]:
        """Each open session as it would be recorded now, oldest first. In a rule, this includes its own session."""
        return [c.session.message() for c in self._list_connections() if not c.is_over]

    def _warn(self, messages: list[Message]) -> list[Message]:
        """Warn once per message about what the server accepted and discarded, at the line of the caller's caller."""
        import warnings

        explicit = vars(self._options)
        if "keep_all" in explicit or {"multiple_rcptto", "multiple_message_receiving"} <= explicit.keys():
            return messages
        for message in messages:
            if message.id not in self._warned:
                self._warned.add(message.id)
                for option, text in message._find_discards():
                    if option not in explicit:
                        warnings.warn(f"{text}; keep_all=True or {option}=True keeps them all", SMTPMockWarning, 3)
        return messages

    def violations(self) -> list[Violation]:
        """The violations of all recorded messages, in their order."""
        return [violation for message in self._mailbox.messages(purge=False) for violation in message.violations]

    def on(
        self,
        stage: str,
        match: _Match = None,
        *,
        skip: int = 0,
        times: int | None = None,
        probability: float = 1.0,
        after: int | None = None,
        **unknown: NoReturn,
    ) -> Rule:
        """Add a rule. The methods of the Rule say what it does.

        stage is connect, a verb, message (the end of a body), or * for all. match is an address or a domain
        (at DATA and message, of a recipient), a compiled pattern that is searched in the line, or a function of the
        line; at message, the line is the body. The rule ignores the first `skip` matches, and then applies at most
        `times` times (None means no limit), each time with this probability. With `after`, it applies once that many
        bytes of the body have arrived. Rules combine: text, delay, trickle and ending each come from the newest
        matching rule that sets it. Raises ConfigurationError for an invalid argument.
        """
        if unknown:
            known = ("stage", "match", *_Conditions._declared)
            name, value = dict[str, Any](unknown).popitem()
            hint = _suggest(name, known) or f"; there are {', '.join(known)}"
            hint = f"; did you mean on(...).{name}(...)?" if hasattr(Rule, name) else hint
            raise ConfigurationError(f"on() has no such argument{hint}", name, value)
        rule = Rule(self._rules, stage, match, skip=skip, times=times, probability=probability, after=after)
        return self._rules.add(rule)

    def client_context(self) -> ssl.SSLContext:
        """A new context for clients that trusts the certificate for tests. ServerStateError if the server has none."""
        if not isinstance(self._options.ssl_context, str):
            raise ServerStateError(f'{self!r} has no certificate for tests; ssl_context="test" gives it one')
        import ssl

        return ssl.create_default_context(cadata=_make_pem("ca"))

    def play(self, transcript: str) -> None:
        """Answer the next session as the server in this transcript did. Several sessions answer the next ones.

        The transcript is a Message.transcript, a dialogue in an RFC, or the output of swaks, smtplib, curl, PHPMailer.
        The client need not send the same. At each stage, the replies come in order, and normal replies follow.
        What EHLO announces is accepted, with any login. Raises ConfigurationError if the transcript has no reply.
        """
        scripts = _read_transcript(transcript)
        self.configure(**_find_announced(scripts, self._options))
        self._rules.play(scripts)

    def clear_rules(self) -> None:
        """Remove all rules."""
        self._rules.clear()

    def reset(self) -> None:
        """Remove all messages and all rules, forget failed callbacks, and undo configure(), for the next test."""
        if self._options is not self._made_with:
            self._change_options(lambda options: self._made_with)
        self._rules.clear()
        self._context.log.forget_failures()
        self._context.early_ends.clear()
        self._mailbox.messages(purge=True)

    def check(self) -> None:
        """Raise AssertionError if a rule was never hit or has no action, or if a callback raised an exception."""
        __tracebackhide__ = True  # of pytest
        faults = [failure.partition("\nTraceback ")[0] for failure in self._context.log.forget_failures()]
        requests: list[str] | None = None
        for rule in reversed(self._rules.newest_first):
            if rule._function is None and not any(rule._uses):
                faults.append(f"{rule!r} has no action")
            elif rule._script is not None:
                left = [use["reply"] or use["then"].value for use in rule._uses[rule._hits :]]
                faults += [f"{_shorten(text)} at {rule._stage}, of the transcript, was never reached" for text in left]
            elif not rule._hits:
                requests = self._list_requests() if requests is None else requests
                faults.append(f"{rule!r} was never hit{rule._find_nearest(requests)}")
        if faults:
            raise AssertionError("\n".join(faults))

    def _list_connections(self) -> list[_Connection]:
        """The connections whose sessions are still open."""
        listener = self._listener
        return [] if listener is None else [c for c in listener.connections.copy() if not c.is_recorded]

    def _list_requests(self) -> list[str]:
        """The commands of the last messages and of the open sessions."""
        connections = self._list_connections()[:_REPORT_LIMIT]
        records = [message._exchanges[: message._length] for message in self._mailbox.messages(purge=False)[-100:]]
        records += [connection.session.mail.exchanges[:] for connection in connections]
        return [exchange.line for record in records for exchange in record if exchange.line and exchange.line[0] != "<"]

    def wait_for_messages(self, count: int, timeout: float = 5.0, where: _Where = None) -> list[Message]:
        """Wait for count messages for which where(message) is true. Returns them all, or raises WaitTimeoutError."""
        __tracebackhide__ = True  # of pytest
        return self._warn(self._wait(count, timeout, where, purge=False))

    def wait_for_messages_and_purge(self, count: int, timeout: float = 5.0, where: _Where = None) -> list[Message]:
        """Like wait_for_messages(), but remove exactly what is returned."""
        __tracebackhide__ = True
        begin = time.monotonic()
        self._warn(self._wait(count, timeout, where, purge=False))  # first, because it may raise the warning
        return self._wait(count, max(0.0, timeout - time.monotonic() + begin), where, purge=True)

    def _wait(self, count: int, timeout: float, where: _Where, *, purge: bool) -> list[Message]:
        __tracebackhide__ = True
        _check_wait(count, timeout, where)
        enough, messages = self._mailbox.wait(count, timeout, where, purge=purge)
        if not enough:
            what = "messages" if where is None else "matching messages"
            text = f"{len(messages)} of {count} {what} came in {timeout:g} seconds"
            raise WaitTimeoutError("\n  ".join([text, *self._report()]), messages)
        return messages

    def _report(self) -> Iterator[str]:
        connections = [connection for connection in self._list_connections() if not connection.has_left()]
        messages, asyncio = self._mailbox.messages(purge=False), sys.modules.get("asyncio")
        if asyncio is not None and asyncio._get_running_loop() is not None:
            yield "this wait blocks the asyncio event loop of its thread: use await asyncio.to_thread(...)"
        yield f"recorded messages: {len(messages)}"
        if len(messages) > _REPORT_LIMIT:
            yield "  ..."
        for message in messages[-_REPORT_LIMIT:]:
            yield f"  {message!r}, subject {message.subject!r}"
            faults = [str(found) for found in message.violations if found.code in ("tls-on-plain-port", "false-end")]
            yield from (f"    {hint}" for hint in message._find_hints() + faults)
        yield f"open sessions: {len(connections)}"
        for connection in connections[:_REPORT_LIMIT]:
            session = connection.session
            last = " / ".join(_format_exchanges(session.mail.exchanges[-1:])) or "the client has sent nothing"
            last += ", but must begin TLS, because of implicit_tls" * (not session.mail.exchanges)
            yield f"  {_format_address(*session.peer)}: {last}"
            refused = [said for said in session.mail.exchanges[:] if said.is_refused]
            yield from (f"    refused: {' / '.join(_format_exchanges([said]))}" for said in refused[-_REPORT_LIMIT:])
            if (body := session.mail.body) is not None and body.ends_falsely():
                yield "    its body ends in a dot alone with a bare LF, which is not the end of a mail"
        yield from self._list_early_ends()

    def _list_early_ends(self) -> list[str]:
        ends = self._context.early_ends  # read by index, because other threads may append meanwhile
        return [f"a connection ended early: {ends[index]}" for index in range(min(len(ends), _REPORT_LIMIT))]

    def __repr__(self) -> str:
        state = "" if self._listener else ", not running"
        return f"<smtpmock.Server on {_format_address(self._host, self._port)}{state}>"


# ------------------------------------------------------------------------------------------ pytest


def _shared_smtp_server() -> Iterator[Server]:
    """The server behind smtp_server, for fixtures of a larger scope that need its host and port."""
    with Server(multiple_rcptto=True, multiple_message_receiving=True) as server:
        yield server


class _PytestPlugin:
    server: Server

    def __init__(self) -> None:
        self.test: Any = None  # the last test with the fixture
        self.sessions: list[Message | str] = []  # the sessions of that test, after its end
        self.failures: list[str] = []  # exceptions in its callbacks
        self.shown = ""  # the last section in its report

    def smtp_server(self, request: Any, shared_smtp_server: Server) -> Iterator[Server]:
        """A running smtpmock.Server without messages and rules. It keeps all mails and recipients.

        @pytest.mark.smtp_server(fail_fast=True) sets options for a test, and play=TRANSCRIPT has it play that. At the
        end of a test that passed, check() is called. The report of a failed test shows the sessions.
        """
        server = self.server = shared_smtp_server
        if not server.is_running:  # the last test stopped it
            server.start()
        server.reset()
        options: dict[str, Any] = {}
        for mark in reversed([*request.node.iter_markers("smtp_server")]):  # the closest mark comes last
            if mark.args:
                raise ConfigurationError(f"pytest.mark.smtp_server: {mark.args[0]!r} must be an option by its name")
            options |= mark.kwargs
        transcript = options.pop("play", None)
        try:
            server.configure(**options)
        except ConfigurationError as error:
            raise ConfigurationError(f"pytest.mark.smtp_server: {error}") from None
        if transcript is not None:
            server.play(transcript)
        self.test, self.sessions, self.failures, self.shown = request.node, [], [], ""
        yield server
        if server._listener is not None:
            server._listener.await_quits()
        server.disconnect()
        self.sessions = self._list_sessions()
        server.reset()

    def check_mark(self, item: Any) -> None:
        """Runs before each test."""
        names, marks = getattr(item, "fixturenames", ()), [mark.name for mark in item.own_markers]
        may_get_it = "smtp_server" in names or ("request" in names and "shared_smtp_server" not in names)
        if "smtp_server" in marks and not may_get_it:
            raise ConfigurationError("pytest.mark.smtp_server has no effect in a test without the fixture smtp_server")

    def check(self, item: Any) -> None:
        """Runs after a test that passed."""
        if item is self.test:
            self.failures = list(self.server._context.log.failures)  # check() forgets them
            self.server.check()

    def report(self, item: Any, call: Any) -> None:
        if call.excinfo is not None and "ScopeMismatch" in (text := str(call.excinfo.value)) and "smtp_server" in text:
            item.add_report_section(call.when, "smtp_server", "a fixture with a larger scope uses shared_smtp_server")
        elif call.excinfo is not None and item is self.test:
            text = self._describe(self.sessions or self._list_sessions())
            if text != self.shown:
                item.add_report_section(call.when, "smtp_server", text)
            self.shown = text

    def _list_sessions(self) -> list[Message | str]:
        """The recorded messages, and descriptions of the open sessions and of the connections that ended early."""
        mails = [connection.session.mail for connection in self.server._list_connections()]
        dialogues = ["\n".join(_format_exchanges(mail.exchanges[:])) for mail in mails if mail.entry is None]
        return [
            *self.server._mailbox.messages(purge=False),
            *(f"a session is open:\n{dialogue}" for dialogue in dialogues),
            *self.server._list_early_ends(),
            *(self.failures or self.server._context.log.failures.copy()),
        ]

    def _describe(self, sessions: Sequence[Message | str]) -> str:
        count = f"{len(sessions)} messages or sessions, the last {_REPORT_LIMIT}:"
        parts = [count] if len(sessions) > _REPORT_LIMIT else []
        for item in sessions[-_REPORT_LIMIT:]:
            lines = [str(item)]
            if isinstance(item, Message):
                lines += [item.transcript, *item._find_hints(), *map(str, item.violations + item.warnings)]
            parts.append("\n".join(lines))
        return "\n\n".join(parts) or "no session"


def pytest_configure(config: Any) -> None:
    """Called by pytest, which finds it by the package's entry point or by pytest_plugins = ["smtpmock"]."""
    pytest = __import__("pytest")  # mypy knows it only if it is installed
    text = "smtp_server(**options): options of smtpmock.Server that the fixture smtp_server has in this test"
    config.addinivalue_line("markers", text)
    # pytest takes session fixtures from modules; from instances, it does so only with a warning.
    plugin, functions = _PytestPlugin(), types.ModuleType(f"{__name__}.pytest")
    vars(functions).update(
        shared_smtp_server=pytest.fixture(scope="session")(_shared_smtp_server),
        smtp_server=pytest.fixture(plugin.smtp_server),
        pytest_runtest_setup=plugin.check_mark,
        pytest_runtest_call=plugin.check,
        pytest_runtest_makereport=plugin.report,
    )
    pytest.hookimpl(trylast=True)(_PytestPlugin.check)  # after the test itself
    config.pluginmanager.register(functions)


# -------------------------------------------------------------------------------------------- http

# Any page on the web can have a browser send requests to this machine. So a request must name this server and come from
# its own pages, and an answer loads nothing.
_HTTP_SECONDS, _HTTP_STOP_TIMEOUT = 20.0, 0.5  # of silence; for the last answers in a stop
_BODY_LIMIT, _IMAGES_LIMIT, _TEXT_LIMIT, _LIST_LIMIT = 2**20, 2**25, 200000, 200
_HTTP_HEADERS = {"Cache-Control": "no-store", "Connection": "close", "Referrer-Policy": "no-referrer"}
_HTTP_HEADERS |= {"X-Content-Type-Options": "nosniff", "X-DNS-Prefetch-Control": "off"}
_HTTP_HEADERS |= dict.fromkeys(("Cross-Origin-Opener-Policy", "Cross-Origin-Resource-Policy"), "same-origin")
_HTML, _JSON = "text/html; charset=utf-8", "application/json"
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors"
_DATA_POLICY = f"{_POLICY} 'none'; sandbox"
_PAGE_POLICY = f"{_POLICY} 'none'; frame-src 'self'; style-src 'unsafe-inline'"
_MAIL_POLICY = f"{_POLICY} 'self'; img-src data:; style-src 'unsafe-inline'; sandbox"
_LOCAL_NAME = r"[\w-]+|([\w-]+\.)+(localhost|local|internal|test)"

_READ_HEADERS = ("from", "to", "cc", "reply-to", "date", "subject")
_ADDRESS = _OptionType("a string", _is_text, lambda text: text.lower().replace(" ", "+"))  # a bare + means a space
_WAIT = _OptionType("a number of seconds from 0 to 60", _number(0, 60, int, float), float)
_QUERIES: dict[str, dict[str, _OptionType]] = {
    "/": {"refresh": _OptionType("an integer from 0 to 3600", _number(0, 3600, int), int)},
    "/messages": {"to": _ADDRESS, "from": _ADDRESS, "subject": _TEXT, "accepted": _FLAG, "after": _COUNT}
    | {"timeout": _WAIT, "count": _TIMES},
}
_FILTERS: dict[str, Callable[[Message, Any], bool]] = {
    "to": lambda message, address: address in map(str.lower, message.rcpt_tos),
    "from": lambda message, address: message.mail_from is not None and address == message.mail_from.lower(),
    "subject": lambda message, text: text in (message.subject or ""),
    "accepted": lambda message, is_accepted: message.is_consistent is is_accepted,
}

_STYLE = """
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
body { max-width: 60rem; margin: auto; padding: 0 1rem 2rem }
a { color: light-dark(#0645ad, #8ab4f8) }
:focus-visible { outline: 3px solid light-dark(#c60, #fb3) }
h1, h2 { font-size: 1.2rem }
.mail { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 1rem; padding: .5rem; color: inherit }
.mail { border-top: 1px solid #8886; text-decoration: none }
.mail span { flex: 1 0 100%; text-decoration: underline }
.mail:hover, pre { background: #8882 }
.accepted { color: light-dark(#176b34, #7bd88f) }
.refused, .error { color: light-dark(#b3261e, #ff9a90) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem }
dd { margin: 0 }
dt, small { color: light-dark(#555, #aaa) }
pre { white-space: pre-wrap; padding: .5rem }
iframe { width: 100%; height: 30rem; border: 1px solid #8886; background: #fff; color-scheme: light; resize: vertical }
"""


class _HttpAnswer(Exception):  # noqa: N818 - most are no errors
    """What a request gets: bytes, a value as JSON or, as a str, what is wrong with it. It can be raised."""

    def __init__(self, content: object, status: int = 200, kind: str = _JSON, policy: str = "", **headers: str) -> None:
        import json

        value = {"event": "error", "error": content} if isinstance(content, str) else content
        self.body = value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"
        self.status = status
        self.headers = {"content_type": kind, "content_security_policy": policy or _DATA_POLICY} | headers


def _read_query(query: str, known: Mapping[str, _OptionType]) -> dict[str, Any]:
    from urllib.parse import parse_qsl

    values: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in known or name in values:
            hint = "; it is there twice" if name in values else _suggest(name, known)
            raise ConfigurationError(f"must be one of {', '.join(known) or 'no parameters'}{hint}", name, text)
        values[name] = _read(known[name], text)
        _check(name, values[name], known[name])
    return values


def _check_sender(headers: Any, names: Collection[str], *, is_visit: bool) -> None:
    """Refuse a request that is not meant for this server, or that a page of another site sent."""
    hosts = [host.lower() for host in headers.get_all("Host", [])]
    if len(hosts) != 1 or headers.defects:
        raise _HttpAnswer("a request must have one Host header, and no malformed ones", 400)
    match = re.fullmatch(r"(\[[^][]+\]|[^][:]+)(:[0-9]*)?", hosts[0])
    name = match[1].removesuffix(".") if match else ""
    family = socket.AF_INET6 if name.startswith("[") else socket.AF_INET
    is_address = _is_ip_address(name.strip("[]").partition("%")[0], family)
    if not (is_address or name in names or re.fullmatch(_LOCAL_NAME, name, re.ASCII)):
        raise _HttpAnswer(f"Host {hosts[0]!r} is not known as a name of this server; -httpNames adds names", 421)
    origins, sites = headers.get_all("Origin", []), headers.get_all("Sec-Fetch-Site", [])
    if origins not in ([], [f"http://{hosts[0]}"]) or not (is_visit or {"same-origin", "none"}.issuperset(sites)):
        raise _HttpAnswer("pages of other sites must not send requests", 403)


def _find(server: Server, number: str) -> Message:
    for message in server._mailbox.messages(purge=False):
        if str(message.id) == number:
            return message
    raise _HttpAnswer(f"there is no message {number}: it was purged, or never recorded", 404)


def _list_messages(
    server: Server, *, after: int = 0, timeout: float | None = None, count: int = 1, **wanted: Any
) -> _HttpAnswer:
    recorded, messages = server._mailbox.read()
    if after > recorded:
        raise ConfigurationError(f"is of another run; this one has recorded {recorded} messages", "after", after)
    old = {message.id for number, message in messages.items() if number <= after}

    def matches(message: Message) -> bool:
        return message.id not in old and all(_FILTERS[name](message, value) for name, value in wanted.items())

    late = {}
    try:
        if timeout is not None:
            server._wait(count, timeout, matches, purge=False)
    except WaitTimeoutError as error:
        late = {"error": str(error)}
    recorded, messages = server._mailbox.read()  # in one step: the next answer begins where this one ends
    found = [message.to_dict() for message in messages.values() if matches(message)]
    late = late if len(found) < count else {}
    return _HttpAnswer({**late, "messages": found, "next": recorded}, 404 if late else 200)


def _offer(content: bytes, kind: str, name: str) -> _HttpAnswer:
    """A download."""
    from urllib.parse import quote

    disposition = f"attachment; filename*=UTF-8''{quote(name, safe='', errors='replace')}"
    return _HttpAnswer(content, kind=kind, content_disposition=disposition)


def _get_attachment(message: Message, index: str) -> _HttpAnswer:
    if index not in map(str, range(len(message.attachments))):
        raise _HttpAnswer(f"message {message.id} has {len(message.attachments)} attachments, counted from 0", 404)
    name, _, content = message.attachments[int(index)]
    return _offer(content, "application/octet-stream", name or index)


def _make_page(title: str, body: str, refresh: int = 0) -> _HttpAnswer:
    from html import escape

    more = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{more}<title>{escape(title)}</title><style>{_STYLE}</style><h1><a href="/">smtpmock</a></h1><main>{body}</main></html>
"""
    return _HttpAnswer(page.encode("utf-8", "backslashreplace"), kind=_HTML, policy=_PAGE_POLICY)


def _list_mails(server: Server, *, refresh: int = 5) -> _HttpAnswer:
    from html import escape

    messages, rows = server._mailbox.messages(purge=False), ""
    for message in messages[: -_LIST_LIMIT - 1 : -1]:
        word = "accepted" if message.is_consistent else "refused" if message.refusals else "ended"
        refusal = " \u2192 ".join(next(iter(message.refusals), ()))
        about = message.subject if message.is_consistent else refusal
        route = "" if message.mail_from is None else f"{message.mail_from or '<>'} \u2192 {', '.join(message.rcpt_tos)}"
        rows += f"""<a class="mail" href="/view/{message.id}"><b class="{word}">{word}</b>
<time>{message.exchanges[-1].at.astimezone():%H:%M:%S}</time> <bdi>{escape(route)}</bdi>
<small>{len(message.content)} bytes</small> <span><bdi>{escape(about or "")}</bdi></span></a>"""
    pause = '<a href="/?refresh=0">Pause</a>' if refresh else '<a href="/">Go on</a>'
    head = f"<p>{len(messages)} recorded by {escape(server.url)} {pause}</p>"
    return _make_page(f"{len(messages)} recorded", head + (rows or "<p>Nothing has come yet."), refresh)


def _show_mail(message: Message) -> _HttpAnswer:
    from html import escape

    def show(text: str) -> str:
        rest = f"<p>{len(text)} characters in all" if len(text) > _TEXT_LIMIT else ""
        return f"<pre>{escape(text[:_TEXT_LIMIT])}</pre>{rest}"

    path = f"/messages/{message.id}"
    headers = [item for item in _show_headers(message.email) if item[0].lower() in _READ_HEADERS]
    headers += [("MAIL FROM", message.mail_from or ""), ("RCPT TO", ", ".join(message.rcpt_tos))]
    body = "".join(f"<dt>{escape(name)}<dd><bdi>{escape(value)}</bdi>" for name, value in headers)
    violations = [
        f'<p><b class="{found.severity}">{found.code}</b>: {escape(found.text)} <code>{escape(found.line)}</code>'
        f' <a href="https://www.rfc-editor.org/rfc/rfc{found.rfc.replace(" ", "#section-")}">RFC {found.rfc}</a>'
        for found in (*message.violations, *message.warnings)
    ]
    attachments = [
        f'<p><a href="{path}/attachments/{index}"><bdi>{escape(item.name or "no name")}</bdi></a> {escape(item.type)}'
        f" <small>{len(item.content)} bytes</small>"
        for index, item in enumerate(message.attachments)
    ]
    source = f'<a href="{path}/eml">Download</a><details><summary>Show</summary>{show(message.msg_request)}</details>'
    sections = {
        "Violations": "".join(violations),
        "Text": message.text and show(message.text),
        "HTML": message.html
        and f'<iframe sandbox title="The HTML of the mail" src="/view/{message.id}/html"></iframe>',
        "Attachments": "".join(attachments),
        "Dialogue": show(message.transcript),
        "Source": message.content and source,
    }
    body = f"<dl>{body}</dl>" + "".join(f"<h2>{title}</h2>{part}" for title, part in sections.items() if part)
    return _make_page(message.subject or f"Message {message.id}", body)


def _show_html(message: Message) -> _HttpAnswer:
    """The HTML of a mail, with its own images in it."""
    import base64
    import html
    from urllib.parse import unquote

    urls = dict[str, str]()
    for part, kind, _, content in message._mail:
        if content is not None and re.fullmatch("image/(png|jpeg|gif|webp)", kind):
            data = base64.b64encode(content).decode()
            urls[str(part["content-id"]).strip(" <>")] = f"data:{kind};base64,{data}"

    def inline(match: re.Match[str]) -> str:
        return match[1] + urls.get(unquote(html.unescape(match[3])), match[2] + match[3])

    # No policy forbids <link rel=preconnect>. A mail may refer to one image very often.
    page = re.sub(r"(?i)<(/?)(?=link|i?frame|fencedframe|portal|base|meta)", r"<\1x-", message.html or "")
    most = _IMAGES_LIMIT // max(map(len, urls.values()), default=1) or 1
    page = re.sub(r"""(?i)(["'(=]\s*)(cid:)([^"'\s<>)]+)""", inline, page, count=most)
    return _HttpAnswer(page.encode("utf-8", "replace"), kind=_HTML, policy=_MAIL_POLICY)


_ROUTES: dict[str, Callable[..., _HttpAnswer]] = {  # with ID for each number; those with one get a message
    "/": _list_mails,
    "/view/ID": _show_mail,
    "/view/ID/html": _show_html,
    "/messages": _list_messages,
    "/messages/ID": lambda message: _HttpAnswer(message.to_dict()),
    "/messages/ID/eml": lambda message: _offer(message.as_bytes(), "message/rfc822", f"{message.id}.eml"),
    "/messages/ID/attachments/ID": _get_attachment,
    "/violations": lambda server: _HttpAnswer({"violations": [_jsonify(fault) for fault in server.violations()]}),
    "/ca.pem": lambda server: _HttpAnswer(_make_pem("ca").encode(), kind="application/x-pem-file"),
}


def _route(server: Server, execute: Any, commands: Collection[str], method: str, target: str, body: str) -> Any:
    path, _, query = target.partition("?")
    route = "" if "ID" in path else re.sub("[0-9]+", "ID", path)
    methods = ["POST"] * (path[1:] in commands) or ["GET", "HEAD"] * (route in _ROUTES)
    if not methods:
        raise _HttpAnswer(f"there is no {path}{_suggest(route, [*_ROUTES, *(f'/{name}' for name in commands)])}", 404)
    if method not in methods:
        raise _HttpAnswer(f"{path} is for {' and '.join(methods)}", 405, allow=", ".join(methods))
    parameters = _read_query(query, _QUERIES.get(route, {}))
    if method == "POST":
        return _HttpAnswer(*execute(f"{path[1:]} {body}".strip()))
    number, *others = re.findall("[0-9]+", path) or [""]
    return _ROUTES[route](_find(server, number) if number else server, *others, **parameters)


def _read_body(headers: Any, file: Any) -> str:
    lengths = headers.get_all("Content-Length", ["0"])
    if "Transfer-Encoding" in headers:
        raise _HttpAnswer("a body must have a Content-Length", 411)
    if len(lengths) != 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
        raise _HttpAnswer("Content-Length must be one number", 400)
    if (length := int(lengths[0])) > _BODY_LIMIT:
        raise _HttpAnswer(f"a body must not be longer than {_BODY_LIMIT} bytes", 413)
    if len(body := file.read(length)) < length:
        raise ConnectionError("the client is gone")
    return str(body, "utf-8", "backslashreplace")


def _make_http_connection(names: Collection[str], route: Callable[..., _HttpAnswer]) -> Any:  # noqa: C901 - one class
    from http.server import BaseHTTPRequestHandler

    class Connection(BaseHTTPRequestHandler):
        """One request and its answer."""

        default_request_version = "HTTP/1.0"  # of a request without one, so that its answer has headers
        protocol_version = "HTTP/1.1"  # else a client that sends Expect: 100-continue waits for a second
        timeout = _HTTP_SECONDS
        is_idle, leaves_at = True, 0.0  # a stop interrupts it at once
        server: Any

        def setup(self) -> None:
            with self.server.accepting:
                self.server.starting.pop(self.request)
            super().setup()
            self.server.connections[self] = None

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the client is gone, or too slow
                self.raw_requestline = b"" if self.server.stopping else self.rfile.readline(65537)
                if self.raw_requestline and self.parse_request():
                    self.send(self.find_answer())

        def find_answer(self) -> _HttpAnswer:
            self.headers = self.headers or self.MessageClass()  # newer Pythons leave a dict without a version
            is_page = self.command in ("GET", "HEAD") and re.match(r"/(view/[0-9]+)?(\?|$)", self.path)
            is_visit = (self.headers["Sec-Fetch-Mode"], self.headers["Sec-Fetch-Dest"]) == ("navigate", "document")
            try:
                _check_sender(self.headers, names, is_visit=bool(is_page) and is_visit)
                return route(self.command, self.path, _read_body(self.headers, self.rfile))
            except _HttpAnswer as refusal:
                return refusal
            except ConfigurationError as error:
                return _HttpAnswer(str(error), 400)

        def send(self, answer: _HttpAnswer) -> None:
            from http import HTTPStatus

            headers = {**_HTTP_HEADERS, **answer.headers, "Content-Length": len(answer.body)}
            lines = [f"{name.replace('_', '-').title()}: {value}" for name, value in headers.items()]
            status = f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"
            data = "\r\n".join([status, *lines, "", ""]).encode("ascii")
            self.wfile.write(data if self.command == "HEAD" else data + answer.body)

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            """Called by parse_request()."""
            self.send(_HttpAnswer(message or explain or "", code))

        def shut_down(self, how: int) -> None:
            with contextlib.suppress(OSError):
                self.request.shutdown(how)

        def await_end(self, until: float) -> None: ...

        def finish(self) -> None:
            self.shut_down(socket.SHUT_WR)
            deadline = time.monotonic() + _LINGER
            with contextlib.suppress(OSError):  # what is unread would have the answer destroyed by an RST
                self.request.settimeout(_LINGER)
                while self.request.recv(65536) and time.monotonic() < deadline:
                    ...
            self.server.connections.pop(self, None)
            super().finish()

    return Connection


# ------------------------------------------------------------------------------------ command line

_LOG_OPTIONS = ("log_to_stdout", "log_server_activity")  # one flag sets both
_FILE = _OptionType("a path", lambda value: isinstance(value, str))
_RULES = _OptionType("rules", lambda value: isinstance(value, list), lambda text: [text])

# The flags that are not options of a server.
_OWN_FLAGS: dict[str, _Option] = {
    "log": _option(False, _FLAG, "log to stdout, and errors to stderr"),
    "quiet": _option(False, _FLAG, "print no lines about mails and sessions"),
    "show": _option(False, _FLAG, "print each mail as a person reads it"),
    "lint": _option(False, _FLAG, "print violations on stderr; status 3 after an error"),
    "json": _option(False, _FLAG, "print mails, sessions without one, and errors as lines of JSON; log to stderr"),
    "control": _option(False, _FLAG, "like -json, and obey commands from stdin, whose end stops the server"),
    "http": _option(None, _PORT, "port for HTTP: an API and a page; turns on keep_all"),
    "http_host": _option("127.0.0.1", _TEXT, "address to listen on for HTTP"),
    "http_names": _option((), _NAMES, "additional host names that HTTP clients may use"),
    "save_dir": _option("", _FILE, "folder for each accepted mail as 000001.eml and its record as 000001.json"),
    "maildir": _option("", _FILE, "Maildir to deliver each accepted mail to"),
    "rule": _option([], _RULES, "make the server fail on purpose; can be repeated"),
    "play": _option("", _FILE, "transcript or log of a session, to answer like that"),
    "tls_cert": _option("", _FILE, "PEM file for STARTTLS, or test, expired or wrong host"),
    "tls_key": _option("", _FILE, "PEM file with the key, unless the other file has it"),
    "save_ca": _option("", _FILE, "new file for the CA certificate of -tlsCert=test"),
    "dev": _option(False, _FLAG, "for development: keep_all, lenient_addresses, extensions, any login, -show, -http=0"),
    "version": _option(False, _FLAG, "print the version and exit; also -v"),
    "help": _option(False, _FLAG, "print this and exit; also -h"),
    "help_all": _option(False, _FLAG, "print this with the reply texts and exit"),
}

# What -dev sets, except where a flag sets it.
_DEV_EXTENSIONS = "SIZE", "8BITMIME", "SMTPUTF8", "PIPELINING", "DSN"
_DEV_OPTIONS = {"keep_all": True, "lenient_addresses": True, "extensions": _DEV_EXTENSIONS, "auth_users": "*"}
_DEV_FLAGS = {"show": True, "http": 0}

# Each flag belongs to the first group whose pattern its name matches. The last two groups take the rest.
_GROUPS = {
    "Listening": "host|port|session_timeout|shutdown_timeout|http",
    "Recording": "keep_all|multiple_|msg_size_limit|lenient_|save_dir|maildir",
    "Output": "dev|log|quiet|show|json|control|lint",
    "Failing": "fail_fast|strict|profile|play|blacklisted_|not_registered_|response_delay_|seed|rule",
    "Extensions, login and TLS": "extensions|auth_|implicit_tls|tls_|save_ca",
    "Other": "(?!msg_)",
    "Reply texts": "",
}
_METAVARS = {_SECONDS: "SECONDS", _TIMEOUT: "SECONDS", _NAMES: "LIST", _WORDS: "LIST", _TEXT: "TEXT", _FILE: "PATH"}
_METAVARS |= {_PORT: "PORT"}

_HELP = """\
usage: smtpmock [FLAG]...

An SMTP server for tests: it records the mail it receives, and it fails on
request. It runs until SIGINT, SIGTERM or SIGQUIT stops it.

A value follows after = or as the next argument. Commas separate the items of a
LIST, and -log=false turns a switch off. Each flag has a second spelling
as in GNU programs: --multiple-rcptto is -multipleRcptto.

A RULE is 'STAGE [ADDRESS]: ACTION; ...'. STAGE is connect, a command, message
(the end of a body) or *. ACTION is reply TEXT, raw BYTES, delay SECONDS,
trickle SECONDS, close, drop, reset, silence, or a condition for the rule:
skip=NUMBER, times=NUMBER, probability=NUMBER or after=BYTES.

With -control, each line of stdin is a command: rule RULE, play TRANSCRIPT,
clear (all rules), configure FLAG..., disconnect, disconnect reset, purge (the
messages), reset (all of these), check, or stop. An event on stdout answers it.
{flags}

Examples:
  smtpmock -port=2525 -log
  smtpmock -rule 'RCPT bob@example.com: reply 550 No such user; times=2'
  smtpmock -control -keepAll -tlsCert=test

Exit status:
  0  the server was stopped
  1  it cannot listen, or cannot write its output
  2  a flag or its value is invalid
  3  with -lint, a client violated SMTP"""

_Undo = Callable[[], object]  # removes a mail from an output again
_Output = Callable[[Message], _Undo | None]  # takes an accepted mail
_STALL_SECONDS = 0.1  # after which a reader that has taken nothing is not waited for
_DRAIN_SECONDS = 0.5  # the same at the end
_PIECE = getattr(select, "PIPE_BUF", 4096)  # bytes that a pipe takes without blocking if it is ready


class _Line:
    """What is printed in one piece."""

    def __init__(self, printer: _Printer, text: str) -> None:
        self.printer = printer
        self.left: Any = text  # encoded when it is its turn
        self.error: Exception | None = None


class _Printer:
    """Takes the place of stdout or stderr, in any thread. It keeps nothing that could not be written."""

    def __init__(self, writer: _Writer, stream: Any, name: str) -> None:
        import io

        self.has_events = False
        self.encoding: Any = getattr(stream, "encoding", None)
        self._writer = writer
        self._stream = stream
        self._name = name
        self._is_torn = False  # whether only a part of the last line was written
        raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
        self._raw: Any = raw if isinstance(raw, io.RawIOBase) else None  # else it is of a test

    def __getattr__(self, name: str) -> Any:  # such as isatty()
        return getattr(self._stream, name)

    def explain(self, error: Exception) -> str:
        return f"cannot write to {self._name}: {getattr(error, 'strerror', None) or 'it is closed'}"

    def encode(self, text: Any) -> Any:
        if self._raw is None or not isinstance(text, str):
            return text
        return memoryview(("\n" * self._is_torn + text).encode(self.encoding, "backslashreplace"))

    def is_ready(self) -> bool:
        """Whether write_piece() cannot block."""
        with contextlib.suppress(OSError, ValueError):  # it is closed, or select() does not know such files
            # Of a terminal, select() would promise too much.
            return self._raw is None or (not self._raw.isatty() and bool(select.select((), (self._raw,), (), 0)[1]))
        return False

    def write_piece(self, data: Any) -> Any:
        """Write the beginning, and return the rest."""
        if self._raw is None:
            self._stream.write(data)
            return self._stream.flush() or ""
        written = self._raw.write(data[:_PIECE])  # a full disk may take a part of it
        if written is None:  # somebody else has set it to non-blocking
            select.select((), (self._raw,), ())
        self._is_torn = (written or 0) < len(data)
        return data[written or 0 :]

    def write(self, text: str) -> None:
        self._writer.write(_Line(self, text))

    def flush(self) -> None: ...

    def __call__(self, line: str) -> None:
        try:
            self.write(line + "\n")
        except Exception as error:
            raise _OutputError(self.explain(error)) from error

    def event(self, event: str, /, **values: object) -> None:
        """Print it as JSON, if a program is to read it."""
        if self.has_events:
            import json

            self(json.dumps({"event": event, **values}))


class _Writer:
    """Writes to stdout and stderr. What a reader could hold up is left to a thread."""

    # The queue has no limit, because that would have to stop the mail, or to drop events which are to be read later.

    def __init__(self) -> None:
        self.out: Any = _Printer(self, sys.stdout, "stdout")
        self.err: Any = _Printer(self, sys.stderr, "stderr")
        self.deadline = float("inf")  # nobody waits after it
        self._changed = threading.Condition()  # guards what follows; notified when a line is done
        self._queue: deque[_Line] = deque()  # unless it is empty, a thread writes the first one
        self._writes_since = float("inf")  # when that thread began to write a piece
        self._skipped: _Line | None = None  # the last one that was not waited for; until it is done, there is a backlog
        self._failure = ""  # the first one
        self._lost = 0  # lines

    def write(self, line: _Line) -> None:
        """Return when it is written, or nobody reads. Raises what the write raised."""
        with self._changed:
            if not self._queue:
                self._try(line, waits=False)
            if line.left:
                if not self._queue:
                    threading.Thread(target=self._write_queue, name="smtpmock writer", daemon=True).start()
                self._queue.append(line)
                if self._skipped is None or not self._skipped.left:
                    self._wait(lambda: not line.left, _STALL_SECONDS)
                self._skipped = line if line.left else self._skipped
        if line.error is not None:
            raise line.error

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for it until the reader has taken nothing for this time, or the deadline is this long ago."""
        while not condition() and time.monotonic() < min(self.deadline, self._writes_since) + seconds:
            self._changed.wait(_STALL_SECONDS / 4)

    def close(self) -> str:
        """Wait until the rest is written. Returns what failed."""
        with self._changed:
            self._wait(lambda: not self._queue, _DRAIN_SECONDS)
            lost = self._lost + len(self._queue)
        return f"{self._failure or 'not all output was read'}; lines lost: {lost}" if lost else ""

    def _write_queue(self) -> None:
        with self._changed:
            while self._queue:
                line = self._queue[0]
                self._changed.release()
                self._try(line, waits=True)
                self._changed.acquire()
                self._queue.popleft()
                self._changed.notify_all()

    def _try(self, line: _Line, *, waits: bool) -> None:
        """Write it or, without waiting, as much of it as cannot block."""
        try:
            line.left = line.printer.encode(line.left)
            while line.left and (waits or line.printer.is_ready()):
                self._writes_since = time.monotonic() if waits else float("inf")
                line.left = line.printer.write_piece(line.left)
        except (OSError, ValueError, AttributeError) as error:  # full, closed by us, and closed from the start
            line.error, line.left = error, ""
            self._failure = self._failure or line.printer.explain(error)
            self._lost += 1
        self._writes_since = float("inf")


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
        names = [re.match(r"\.?(\d{6,})\.", name) for name in os.listdir(path)]
        self._numbers = iter(range(1 + max((int(name[1]) for name in names if name), default=0), sys.maxsize))

    def __call__(self, message: Message) -> _Undo:
        import json

        record = json.dumps(message.to_dict(), indent=1).encode()
        name = self._reserve()
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove, name)
            # The mail is the last: whoever sees it finds the record as well.
            for kind, data in (("json", record), ("eml", message.as_bytes())):
                path, part = self._paths(f"{name}.{kind}")
                with open(part, "xb") as file:
                    file.write(data)
                os.replace(part, path)
            os.unlink(self._paths(name)[1])
            return undo.pop_all().close

    def _remove(self, name: str) -> None:
        for path in (*self._paths(f"{name}.eml"), *self._paths(f"{name}.json"), self._paths(name)[1]):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _paths(self, name: str) -> tuple[str, str]:
        """Of the file, and of its beginning, which *.eml and *.json do not match, even if they match hidden files."""
        return os.path.join(self._path, name), os.path.join(self._path, f".{name}.part")

    def _reserve(self) -> str:
        """A name that no other thread or process takes, because .NAME.part exists."""
        while True:
            name = f"{next(self._numbers):06d}"
            with contextlib.suppress(FileExistsError):
                open(self._paths(name)[1], "xb").close()
                if not os.path.exists(self._paths(f"{name}.eml")[0]):
                    return name
                os.unlink(self._paths(name)[1])


def _open_maildir(path: str) -> Callable[[Message], _Undo]:
    import mailbox

    for name in ("tmp", "cur", "new"):
        _make_folder(os.path.join(path, name))
    maildir, lock = mailbox.Maildir(path), threading.Lock()  # a Maildir is not made for threads

    def add(message: Message) -> _Undo:
        # add() replaces each LF by what ends a line on this system.
        content = message.as_bytes().replace(os.linesep.encode(), b"\n")
        with lock:
            key = maildir.add(content)
        return lambda: mailbox.Maildir(path).discard(key)

    return add


def _read_action(name: str, argument: str) -> tuple[str, list[Any]]:
    """The name of a method of Rule, and its arguments."""
    allowed = [action for action in (*Action._declared, *_THEN) if action != "then"]
    if name not in allowed:
        raise ConfigurationError(f"{name!r} must be {' or '.join([*allowed, *_Conditions._declared])}")
    if name in _THEN and argument:
        raise ConfigurationError(f"{argument!r} must not follow {name}")
    if name == "reply":
        return name, [text.strip() or None for text in argument.split("|")] if argument else []
    return name, [] if name in _THEN else [_read(Action._declared[name].kind, argument)]


def _add_rule(server: Any, text: str) -> None:
    """Read "STAGE [ADDRESS]: ACTION [ARGUMENT]; ...; CONDITION=VALUE; ..."."""
    where, colon, what = (part.strip() for part in text.partition(": "))
    match = re.fullmatch(r"(\S+(?: +(?:FROM|TO))?)(?: +(\S+))?", where, re.IGNORECASE)
    if match is None or not colon:
        raise ConfigurationError(f"rule {text!r}: must be 'STAGE: ACTION' or 'STAGE ADDRESS: ACTION'")
    parts = [re.split(" +| *= *", part.strip(), maxsplit=1) for part in what.split(";") if part.strip()]
    known = _Conditions._declared
    conditions = {name: _read(known[name].kind, "".join(value)) for name, *value in parts if name in known}
    try:
        actions = [_read_action(name, "".join(value)) for name, *value in parts if name not in known]
        if not actions:
            raise ConfigurationError("it has no action")
        rule = Rule(server._rules, match[1], match[2], **conditions)
        for name, arguments in actions:
            getattr(rule, name)(*arguments)
        server._rules.add(rule)
    except ConfigurationError as error:
        raise ConfigurationError(f"rule {text!r}: {error}") from error


def _name_flag(option: str) -> str:
    """As in go-smtp-mock."""
    first, *others = option.split("_")
    return "-" + first + "".join(map(str.title, others))


def _list_flags() -> dict[str, _Option]:
    """The declaration of each flag, by the name of its option."""
    names = Configuration._declared.keys() - {*_LOG_OPTIONS, "ssl_context"}
    return {name: option for name, option in Configuration._declared.items() if name in names} | _OWN_FLAGS


def _describe(error: Exception) -> str:
    """The text of an error, with flags in place of options."""
    text, option, needed = str(error), getattr(error, "option", ""), getattr(error, "needed", "")
    if option:
        text = _name_flag(option) + text.removeprefix(option)
    if needed:
        text = text.removesuffix(needed) + _name_flag("tls_cert" if needed == "ssl_context" else needed)
    return text


_ITEM_LIMIT, _RECIPIENT_LIMIT = 100, 5  # characters of an item, and recipients, in a line
_LINE_COUNT, _TEXT_LIMIT = 100, 10_000  # lines and characters of a mail: a few screens
_HTML_LIMIT = 100_000  # characters
# What shows no text, and each < that begins no proper tag, because html.parser takes very long to find that out.
_TAG = r"""/?[a-z][^<>"']*(?:"[^"<>]*"[^<>"']*|'[^'<>]*'[^<>"']*)*>"""
_NO_TEXT = rf"(?is)<!--.*?(?:-->|\Z)|<(script|style|title)\b.*?(?:</\1\b[^<>]*>?|\Z)|<[!?][^>]*>?|<(?!{_TAG})"
_BLOCKS = "blockquote", "div", "h1", "h2", "h3", "h4", "hr", "ol", "p", "pre", "section", "table", "ul"
_LINES = "br", "dd", "dt", "li", "tr"


def _cut(text: str) -> str:
    return _printable(text if len(text) <= _ITEM_LIMIT else f"{text[: _ITEM_LIMIT - 3]}...")


def _format_size(size: int) -> str:
    return f"{size / 1000:.1f} kB" if size >= 1000 else f"{size} byte{'s' * (size != 1)}"


def _read_html(html: str) -> str:
    """The text of HTML, with the address of each link behind it."""
    from html.parser import HTMLParser

    class Reader(HTMLParser):
        address: str | None = None

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            values = dict(attrs)
            self.address = values.get("href") if tag == "a" else self.address
            found.append("\n" * (tag in _BLOCKS + _LINES) + "- " * (tag == "li") + (values.get("alt") or ""))

        def handle_endtag(self, tag: str) -> None:
            is_link = tag == "a" and self.address and self.address != found[-1].strip()
            found.append("\n" * (tag in _BLOCKS) + " " * (tag == "td") + (f" <{self.address}>" if is_link else ""))

        def handle_data(self, data: str) -> None:
            found.append(re.sub(r"\s+", " ", data))

    found = [""]
    reader = Reader()
    html = re.sub(_NO_TEXT, lambda match: "&lt;" * (match[0] == "<"), html[: 10 * _HTML_LIMIT])  # styles may be long
    reader.feed(html[:_HTML_LIMIT])
    reader.close()
    lines = [" ".join(line.split()) for line in "".join(found).split("\n")]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines))


def _format_mail(message: Message) -> str:
    """The mail as a person reads it, or its beginning. The indentation is for it not to pass for a line of ours."""
    shown = ("From", "To", "Cc", "Date", "Subject")
    lines = [f"{name}: {value}" for name in shown for value in message.email.get_all(name, ())]
    for name, kind, content in message.attachments:
        lines.append(f"Attachment: {name or 'without a name'} ({kind}, {_format_size(len(content))})")
    text = message.text or ""
    if message.html and not text.strip():
        text = _read_html(message.html)
    text = "\n".join([*lines, "", text.strip()])
    lines = text[:_TEXT_LIMIT].split("\n")[:_LINE_COUNT]
    lines += ["..."] * (len("\n".join(lines)) < len(text))
    return "".join(f"\n  {_printable(line.rstrip().expandtabs())}".rstrip(" ") for line in lines)


class _Narrator:
    """Prints a line for each mail, for each refusal, and for each session with neither."""

    def __init__(self, printer: _Printer, options: dict[str, Any], *, shows_mail: bool) -> None:
        self._printer = printer
        self._options = options
        self._shows_mail = shows_mail
        self._warned: set[str] = set()  # options that keep what was discarded; at worst, two sessions tell of one
        self._colours = "NO_COLOR" not in os.environ and hasattr(sys.stdout, "isatty") and sys.stdout.isatty()

    def _print(self, word: str, colour: int, text: str) -> None:
        word = f"\x1b[{colour}m{word}\x1b[0m" if self._colours else word
        with contextlib.suppress(SMTPMockError):  # a closed stdout must not refuse the mail
            self._printer(f"{time.strftime('%H:%M:%S')} {word} {text}")

    def accept(self, message: Message) -> None:
        names, more = map(_cut, message.rcpt_tos[:_RECIPIENT_LIMIT]), len(message.rcpt_tos) - _RECIPIENT_LIMIT
        route = f"{_cut(message.mail_from or '<>')} -> {', '.join(names)}" + f" and {more} more" * (more > 0)
        text = f'{route} "{_cut(message.subject or "")}" {_format_size(len(message.content))}'
        self._print("accepted", 32, text + (_format_mail(message) if self._shows_mail else ""))
        for option, discarded in message._find_discards():
            if self._options.keys().isdisjoint(("keep_all", option)) and option not in self._warned:
                self._warned.add(option)
                with contextlib.suppress(OSError, ValueError, AttributeError):  # nor a closed stderr
                    sys.stderr.write(f"smtpmock: {discarded}; -keepAll keeps them all\n")

    def refuse(self, request: _Request, response: str) -> None:
        self._print("refused", 31, f"{_printable(response)} ({_cut(request.line)})")

    def end(self, message: Message) -> None:
        if not message.refusals:
            lines = [said.line for said in message._exchanges[: message._length] if said.line and said.verb != "QUIT"]
            self._print("ended", 0, f"without a mail after {_cut(lines[-1]) if lines else 'the greeting'}")


class _Linter:
    """Prints violations and warnings on stderr, each once for a message."""

    def __init__(self) -> None:
        self.has_found_error = False
        self._printed: dict[int, set[Violation]] = {}  # by the numbers of messages that may still change

    def __call__(self, message: Message) -> None:
        printed = self._printed.setdefault(message.id, set())
        for found in (*message.violations, *message.warnings):
            if found not in printed:
                printed.add(found)
                self.has_found_error = self.has_found_error or found.severity == "error"
                with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody has to read it
                    sys.stderr.write(f"smtpmock: message {message.id}: {found.severity}: {found}\n")

    def end(self, message: Message) -> None:
        self(message)
        del self._printed[message.id]


def _open_files(paths: Mapping[str, Any]) -> list[_Output]:
    """The outputs that keep mails in files."""
    opened: list[_Output] = []
    for name, open_output in (("save_dir", _Folder), ("maildir", _open_maildir)):
        try:
            opened += [open_output(paths[name])] if paths.get(name) else []
        except OSError as error:
            raise SMTPMockError(f"cannot write to {paths[name]}: {error.strerror}") from error
    return opened


def _save_ca(path: str) -> None:
    """Write what clients trust to a file that is new, or empty, or has it already."""
    pem = _make_pem("ca").encode()
    try:
        with open(path, "ab+") as file:
            file.seek(0)
            content = file.read()
            if content.replace(pem, b""):  # another process may have written it meanwhile, too
                raise FileExistsError(errno.EEXIST, "there is something else in it")
            file.write(b"" if content else pem)
    except OSError as error:
        raise SMTPMockError(f"cannot write to {path}: {error.strerror or error}") from error


def _deliver(outputs: Iterable[_Output], printer: _Printer, message: Message) -> None:
    """Give an accepted mail to all outputs. A mail that one of them cannot take is in none."""
    try:
        with contextlib.ExitStack() as undo:
            for output in outputs:
                undo.callback(output(message) or _ignore)
            undo.pop_all()
    except OSError as error:
        text = f"a mail was refused, because it cannot be saved: {error}"
        printer.event("error", error=text)
        raise _OutputError(text) from error


def _format_flag(name: str, option: _Option) -> str:
    import textwrap

    default, kind, about = option
    metavar = _METAVARS.get(kind, name.rpartition("_")[2].upper()) if not name.endswith("host") else "HOST"
    label = f"  {_name_flag(name)}" + f"={metavar}" * (kind is not _FLAG)
    about = re.sub(r"\b[a-z]+(_[a-z]+)+", lambda match: _name_flag(match[0]), about)
    if default:
        about += f" (default: {','.join(default) if kind in (_NAMES, _WORDS) else default})"
    label = f"{label:26}" if len(label) < 25 else f"{label}\n{'':26}"
    return label + textwrap.fill(about, 54, break_on_hyphens=False).replace("\n", f"\n{'':26}")


def _format_help(*, everything: bool) -> str:
    groups: dict[str, list[str]] = {title: [] for title in _GROUPS}
    for name, option in _list_flags().items():
        title = next(title for title, pattern in _GROUPS.items() if re.match(pattern, name))
        groups[title].append(_format_flag(name, option))
    if not everything:
        del groups["Reply texts"]
    flags = "\n".join("\n".join(["", f"{title}:", *rows]) for title, rows in groups.items())
    return _HELP.format(flags=flags)


def _spell(name: str) -> tuple[str, ...]:
    """The flag as in go-smtp-mock, with a second hyphen, and as in GNU programs; -h and -v are short ones."""
    short = ("-" + name[0],) if name in ("help", "version") else ()
    return _name_flag(name), "-" + _name_flag(name), "--" + name.replace("_", "-"), *short


def _find_flag(spelling: str, names: Collection[str]) -> str:
    """The name of the option that the flag sets."""
    name = re.sub("-|(?=[A-Z])", "_", spelling.lstrip("-")).lower()
    name = {"-h": "help", "-v": "version"}.get(spelling, name)
    if name in names and spelling in _spell(name):
        return name
    known = [flag for name in names for flag in _spell(name)]  # made only now, because it takes a while
    raise ConfigurationError(f"{spelling}: there is no such flag{_suggest(spelling, known)}")


def _parse_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """The values of the flags, by the names of their options. The parser knows only the flags that occur."""
    if not argv:  # importing argparse would take a third of the time until the server listens
        return {}
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            message = re.sub("argument ([^/:]*).*: expected one argument", r"\1: needs a value", message)
            raise ConfigurationError(re.sub("unrecognized arguments: (.*)", r"\1: there is no such flag", message))

    flags, parser = _list_flags(), Parser(add_help=False, allow_abbrev=False)
    parser.formatter_class = functools.partial(argparse.HelpFormatter, width=80)  # without a width, it imports shutil
    spellings = [argument.partition("=")[0] for argument in argv if re.match("--?[a-zA-Z]", argument)]
    for name in dict.fromkeys(_find_flag(spelling, flags) for spelling in spellings):
        kind = flags[name].kind
        more: dict[str, Any] = {"nargs": "?", "const": True} if kind is _FLAG else {}
        more |= {"action": "extend"} if kind is _RULES else {}
        parser.add_argument(*_spell(name), dest=name, type=functools.partial(_read, kind), **more)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        _check(name, value, flags[name].kind)
    return given


def _take_options(given: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a server out of the values of the flags."""
    options = {name: given.pop(name) for name in list(given) if name not in _OWN_FLAGS}
    if "log" in given:
        options |= dict.fromkeys(_LOG_OPTIONS, given["log"])
    tls_cert, tls_key = given.pop("tls_cert", ""), given.pop("tls_key", "")
    if tls_key and tls_cert in ("", *_TEST_CONTEXTS):
        raise ConfigurationError("needs a file in ", "tls_key", tls_key, needed="tls_cert")
    if tls_cert in _TEST_CONTEXTS:
        options["ssl_context"] = tls_cert
    elif tls_cert:
        import ssl

        options["ssl_context"] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            options["ssl_context"].load_cert_chain(tls_cert, tls_key or None)
        except OSError as error:
            hint = "" if tls_key else "; without -tlsKey, the file must have the key, too"
            reason = f"{error.strerror or error}{hint}"
            flags = f"-tlsCert={tls_cert!r}, -tlsKey={tls_key!r}"
            raise ConfigurationError(f"{flags}: cannot be loaded: {reason}") from error
    return options


# The commands of -control and -http, beside those that have an argument.
_CONTROL_COMMANDS: dict[str, Callable[[Server], object]] = {
    "clear": Server.clear_rules,
    "reset": Server.reset,
    "purge": lambda server: server._mailbox.messages(purge=True),
    "check": Server.check,
    "disconnect": lambda server: server.disconnect(),
    "disconnect reset": lambda server: server.disconnect(reset=True),
}


def _configure(server: Server, flags: str, *, opens_files: bool) -> None:
    import shlex

    given = _parse_arguments(shlex.split(flags))
    files = {name: given[name] for name in given if _list_flags()[name].kind is _FILE}
    if not opens_files and not (files.keys() <= {"tls_cert"} and {*files.values()} <= {*_TEST_CONTEXTS}):
        raise ConfigurationError(f"{', '.join(map(_name_flag, files))}: -http must not open files")
    options = _take_options(given)
    for flag in given.keys() - {"log"}:
        raise ConfigurationError(f"{_name_flag(flag)}: cannot be changed while the server runs")
    server.configure(**options)


def _obey(server: Server, command: str, *, opens_files: bool) -> None:
    name, argument = (*command.split(maxsplit=1), "")[:2]
    words = " ".join(command.split())
    if name == "rule":
        _add_rule(server, argument)
    elif name == "play":
        server.play(argument)
    elif name == "configure":
        _configure(server, argument, opens_files=opens_files)
    elif words in _CONTROL_COMMANDS:
        _CONTROL_COMMANDS[words](server)
    else:
        allowed = ", ".join(("rule RULE", "play TRANSCRIPT", "configure FLAG...", *_CONTROL_COMMANDS))
        raise ConfigurationError(f"{command!r}: must be {allowed}{' or stop' if opens_files else ''}")


def _execute(server: Server, command: str, *, opens_files: bool = False) -> tuple[dict[str, Any], int]:
    """Obey a command. Returns the event that answers it, and its HTTP status."""
    shown = re.sub(r"(?s)^\s*play\s.*", "play", command)  # a transcript may have secrets, too
    shown = re.sub(r"(?is)(-auth-?users?[^a-z]).*", r"\1***", shown)
    answer: dict[str, Any] = {"event": "done", "command": shown}
    try:
        _obey(server, command, opens_files=opens_files)
    except (SMTPMockError, AssertionError, ValueError) as error:  # check() raises the second, shlex the third
        status = 409 if isinstance(error, AssertionError) else 400
        text = _describe(error) if shown in (command, "play") else re.sub(r"\S*:\S+", "***", _describe(error))
        return {**answer, "event": "error", "error": text}, status
    return {**answer, "messages": len(server._mailbox.messages(purge=False))}, 200


def _obey_lines(server: Server, printer: _Printer, lines: Iterable[bytes]) -> None:
    """Obey and answer each line, until one is stop, they end, or nobody reads the answers."""
    for line in lines:
        command = line.decode("utf-8", "backslashreplace").strip()
        if command == "stop":
            return
        if command:
            answer, _ = _execute(server, command.replace("\\n", "\n"), opens_files=True)
            answer["command"] = answer["command"].replace("\n", "\\n")
            printer.event(answer.pop("event"), **answer)


@contextlib.contextmanager
def _serve_http(server: Server, own: Mapping[str, Any]) -> Iterator[str | None]:
    """Answer HTTP requests, if -http is given. The value is the URL."""
    if "http" not in own:
        yield None
        return
    host, port = own.get("http_host", "127.0.0.1"), own["http"]
    names = {name.lower().removesuffix(".") for name in (host, *own.get("http_names", ()))}
    commands = {name.split()[0] for name in ("rule", "play", "configure", *_CONTROL_COMMANDS)}
    route = functools.partial(_route, server, functools.partial(_execute, server), commands)
    with contextlib.ExitStack() as on_exit:
        try:
            listener = _bind(server._context, host, port, _make_http_connection(names, route))
            on_exit.callback(listener.close, _HTTP_STOP_TIMEOUT)
            on_exit.callback(server._mailbox.end_waits)
            listener.server_activate()
            listener.open()
        except (OSError, ValueError, RuntimeError) as error:
            raise server._explain(error, host, port) from error
        yield f"http://{_format_address(host, listener.server_address[1])}"


def _open_stdin() -> Any:
    try:
        # A file of its own: Python aborts at its exit if a thread waits in a read of sys.stdin.
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except (OSError, AttributeError) as error:  # it is no file, or was closed from the start
        raise SMTPMockError(f"cannot read from stdin: {getattr(error, 'strerror', None) or 'it is closed'}") from error


@contextlib.contextmanager
def _catch_signals(*, owns_process: bool) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A pair of sockets: the first receives a byte for each signal, and the bytes that are sent to the second."""
    import signal

    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
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
            yield wakened, waker
        finally:
            signal.set_wakeup_fd(previous_waker)
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)


def _run(
    server: Server, announce: Any, control: Any, stop: Callable[[], object], writer: _Writer, *, owns_process: bool
) -> None:
    """Run the server until a signal comes or control() returns, and then stop(); another signal aborts that."""
    with _catch_signals(owns_process=owns_process) as (wakened, waker):

        def call(function: Callable[[], None], byte: bytes) -> None:
            try:
                with contextlib.suppress(SMTPMockError):  # an answer could not be written
                    function()
            finally:
                with contextlib.suppress(OSError):  # _run() has returned
                    waker.send(byte)

        controller = threading.Thread(target=call, args=(control, b"\xff"), daemon=True)
        stopper = threading.Thread(target=call, args=(stop, b"\0"))
        try:
            server._start_and_announce(announce)
            listener = server._listener
            if control is not None:
                controller.start()
            wakened.recv(1)
            writer.deadline = time.monotonic() + server._options.shutdown_timeout
            stopper.start()
            while (byte := wakened.recv(1)) != b"\0":
                if byte != b"\xff" and listener is not None:
                    writer.deadline = time.monotonic()
                    listener.abort()
            stopper.join()
        finally:
            with contextlib.suppress(ServerStateError):  # after an exception, it may still run
                server.stop()


def _make_callbacks(printer: _Printer, linter: _Linter, options: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Who gets what: the callbacks of a _Context, each with the functions that it calls, in their order."""
    lints, tells = own.get("lint", False), printer.has_events
    narrates = not tells and (own.get("show") or not (own.get("quiet") or own.get("log")))
    narrator = _Narrator(printer, options, shows_mail=own.get("show", False))

    def tell(message: Message) -> None:
        printer.event("message", **message.to_dict())

    def call(*functions: Any) -> Any:
        return (lambda *arguments: [function(*arguments) for function in functions]) if functions else _ignore

    outputs: list[Any] = [*_open_files(own), *[tell] * tells, *[narrator.accept] * narrates, *[linter] * lints]
    return {
        "on_message": functools.partial(_deliver, outputs, printer),
        "on_unaccepted": call(*[tell] * tells, *[narrator.end] * narrates, *[linter] * lints),
        "on_refusal": call(*[narrator.refuse] * narrates),
        "on_erase": call(*[linter] * lints),
        "on_end": call(*[linter.end] * lints),
    }


def _serve(server: Server, options: dict[str, Any], own: dict[str, Any], writer: _Writer, *, owns_process: bool) -> int:
    """Run the server until something stops it, and return the exit status. With JSON, what it logs goes to stderr."""
    printer, linter = writer.out, _Linter()
    printer.has_events = own.get("json", False) or own.get("control", False)
    server._context = server._context._replace(**_make_callbacks(printer, linter, options, own))
    control = functools.partial(_obey_lines, server, printer, _open_stdin()) if own.get("control") else None

    def announce(host: str, port: int) -> None:
        printer.event("listening", host=host, port=port, url=server.url, **({"http": page} if page else {}))
        if not printer.has_events:
            printer(f"smtpmock: listening on {_format_address(host, port)}")
            if page:
                printer(f"smtpmock: the mail is at {page}/")

    def stop() -> None:
        server.stop()
        with contextlib.suppress(SMTPMockError):  # its reader may have gone first
            printer.event("done", command="stop", messages=len(server._mailbox.messages(purge=False)))
        writer.close()

    stdout = contextlib.redirect_stdout(sys.stderr if printer.has_events else sys.stdout)
    with stdout, _serve_http(server, own) as page:
        _run(server, announce, control, stop, writer, owns_process=owns_process)
    return 3 if linter.has_found_error else 0


def _play_file(server: Server, path: str) -> None:
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            server.play(file.read())
    except OSError as error:
        raise ConfigurationError(f"cannot be read: {error.strerror}", "play", path) from error


def _run_command(argv: Sequence[str], writer: _Writer, *, owns_process: bool) -> int:
    own = _parse_arguments(argv)
    if own.get("version"):
        writer.out(f"smtpmock: {__version__}\npython: {sys.version}")
    elif own.get("help") or own.get("help_all"):
        writer.out(_format_help(everything=own.get("help_all", False)))
    else:
        options = _take_options(own)
        if own.get("dev"):
            options, own = _DEV_OPTIONS | options, _DEV_FLAGS | own
        if "http" in own:
            options = {"keep_all": True} | options
        elif names := own.keys() & {"http_host", "http_names"}:
            raise ConfigurationError("needs ", min(names), needed="http")
        server = Server(**options)
        if path := own.get("save_ca"):
            if options.get("ssl_context") not in _TEST_CONTEXTS:
                raise ConfigurationError(f"needs {' or '.join(_TEST_CONTEXTS)} in ", "save_ca", path, needed="tls_cert")
            _save_ca(path)
        for rule in own.get("rule", ()):
            _add_rule(server, rule)
        if path := own.get("play"):
            _play_file(server, path)
        return _serve(server, options, own, writer, owns_process=owns_process)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, or that of the process if argv is None. Returns the exit status."""
    arguments, writer = sys.argv[1:] if argv is None else argv, _Writer()
    try:
        with contextlib.redirect_stdout(writer.out), contextlib.redirect_stderr(writer.err):
            status = _run_command(arguments, writer, owns_process=argv is None)
    except SMTPMockError as error:
        text = _printable(_describe(error))
        status = 2 if isinstance(error, ConfigurationError) else 1
        writer.out.has_events = any(re.fullmatch("--?(json|control)(=(?i:true)|=1)?", flag) for flag in arguments)
        with contextlib.suppress(SMTPMockError):
            writer.err(f"smtpmock: {text}")
        with contextlib.suppress(SMTPMockError):
            writer.out.event("error", error=text)
    failure = writer.close()
    if failure and status != 1:  # of which the reason was said
        writer = _Writer()  # because the thread of the other one may be held up
        writer.deadline = time.monotonic()
        with contextlib.suppress(SMTPMockError):
            writer.err(f"smtpmock: {failure}")
    return status or int(failure != "")


if __name__ == "__main__":
    sys.exit(main())
