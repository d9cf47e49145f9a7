"""What must hold of a session for all bytes, sought by hypothesis: python .ci/properties.py [EXAMPLES]."""

import functools
import json
import re
import sys
from collections import deque
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smtpmock

EXAMPLES = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
ENVELOPE = b"EHLO a.com\r\nMAIL FROM:<a@a.com>\r\nRCPT TO:<b@b.com>\r\nDATA\r\n"
FLAGS = ("fail_fast", "multiple_rcptto", "multiple_message_receiving")

options = st.fixed_dictionaries(
    dict.fromkeys(FLAGS, st.booleans()) | {"msg_size_limit": st.sampled_from([0, 10, 10**6])}
)
esmtp = st.sampled_from(
    [
        {},
        {"extensions": ("SIZE", "DSN", "SMTPUTF8", "CHUNKING", "XFOO"), "auth_users": {"a": "b"}},
        {"extensions": ("CHUNKING",), "auth_users": {}, "auth_required": True},
    ]
)
chunks = st.sampled_from([b"BDAT 3", b"BDAT 9 LAST", b"BDAT 0 LAST", b"BDAT x"])
logins = st.sampled_from([b"AUTH PLAIN AGEAYg==", b"AUTH LOGIN", b"AUTH LOGIN YQ==", b"YQ==", b"Yg==", b"*"])
paths = st.sampled_from([b"MAIL FROM:<a@a.com> SIZE=5 RET=FULL", b"RCPT TO:<b@b.com> NOTIFY=NEVER XFOO"])
words = st.sampled_from([*ENVELOPE.splitlines(), b"RSET", b"NOOP", b"QUIT", b".", b"..", b"", b"\r", b"RCPT TO:<x>"])
lines = st.one_of(words, words, st.binary(max_size=40), st.just(b"x" * 5000)).map(lambda line: line.replace(b"\n", b""))
headers = st.sampled_from(
    [
        *(b"Subject: =?utf-8?q?a=FF?=", b"From: :", b"To: a <a@a.com>, ;", b"Date: yesterday", b" folded", b""),
        *(b"Content-Type: multipart/mixed; boundary=a", b"--a", b"--a--", b"Content-Type: message/rfc822"),
        *(b"Content-Type: text/html; charset=nonsense", b"Content-Transfer-Encoding: base64", b"YQ=", b"\xff"),
        *(b"Content-Disposition: attachment; filename*=utf-8''%FF", b"Content-Type: ;", b"MIME-Version: x"),
    ]
)
endings = st.sampled_from([b"\r\n", b"\r\n", b"\n"])
more_streams = st.lists(st.tuples(st.one_of(lines, chunks, logins, paths), endings).map(b"".join), max_size=25)
streams = st.lists(st.tuples(lines, endings).map(b"".join), max_size=25)


def make_session(chosen: dict[str, bool | int]) -> smtpmock._Session:
    configuration = smtpmock.Configuration(**chosen)  # type: ignore[arg-type]
    handlers, mailbox = smtpmock._Handlers(configuration), smtpmock._Mailbox()
    log, rules = smtpmock._Log(None, configuration, deque()), smtpmock._Rules(configuration)
    context = smtpmock._Context(configuration, handlers, mailbox, log, rules)
    session = smtpmock._Session(context, ("127.0.0.1", 25))
    session.greet()
    return session


def converse(chosen: dict[str, bool | int], pieces: list[bytes]) -> tuple[list[str], list[dict[str, object]]]:
    """The replies to the pieces, and every public attribute of the messages."""
    session = make_session(chosen)
    replies = [reply.text for piece in pieces for reply in session.receive(piece)]
    session.end()
    return replies, [read_all(message) for message in session.context.mailbox.messages(purge=False)]


def read_all(message: smtpmock.Message) -> dict[str, Any]:
    """Every public attribute, and what each method returns."""
    values = {name: getattr(message, name) for name in dir(message) if not name.startswith("_")}
    del values["email"]  # it has no ==, and to_dict() has its headers, parts and defects
    values = {"repr": repr(message)} | {name: value() if callable(value) else value for name, value in values.items()}
    for found in (*values.pop("violations"), *values.pop("warnings")):  # what came too early depends on the pieces
        assert str(found).isprintable() and len(found.line) <= 200
    del values["to_dict"]["violations"], values["to_dict"]["warnings"]
    return values


@settings(max_examples=EXAMPLES, deadline=None)
@given(options, esmtp, more_streams, st.data())
def pieces_do_not_matter(
    chosen: dict[str, bool | int], extended: dict[str, Any], stream: list[bytes], data: st.DataObject
) -> None:
    chosen = {**chosen, **extended}
    whole = b"".join(stream)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)))))
    pieces = [whole[i:j] for i, j in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert converse(chosen, pieces) == converse(chosen, [whole])


@settings(max_examples=EXAMPLES, deadline=None)
@given(options, streams)
def each_command_has_one_reply(chosen: dict[str, bool | int], stream: list[bytes]) -> None:
    session = make_session(chosen)
    over = False
    for line in stream:
        is_command = not session.is_receiving_body
        replies = list(session.receive(line))
        assert len(replies) in ((0,) if over else (1,) if is_command else (0, 1))
        over = over or any(reply.next is smtpmock._Next.CLOSE for reply in replies)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.sampled_from([b"\r\n", b".", b"\r", b"\n", b"a", b"\x00", b"\xff"]), max_size=40).map(b"".join))
def a_body_comes_as_it_was_sent(body: bytes) -> None:
    body += b"" if body.endswith(b"\r\n") else b"\r\n"
    stuffed = re.sub(rb"(^|(?<=\r\n))\.", b"..", body)
    _, messages = converse({}, [ENVELOPE + stuffed + b".\r\n"])
    assert messages[0]["content"] == body and messages[0]["is_consistent"]


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.one_of(headers, st.binary(max_size=20)), max_size=20).map(b"\r\n".join))
def any_mail_can_be_read(mail: bytes) -> None:
    session = make_session({})
    list(session.receive(ENVELOPE + mail.replace(b"\r\n.", b"\r\n..") + b"\r\n.\r\nQUIT\r\n"))
    for message in session.context.mailbox.messages(purge=False):
        json.dumps(read_all(message)["to_dict"], allow_nan=False)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text(max_size=60))
def what_is_parsed_is_valid(text: str) -> None:
    parse = functools.partial(smtpmock._parse_path, smtpmock._PATH, "<postmaster>", False)
    path = parse(text)
    if path is not None:
        assert path.address in text and "@" in path.address and parse(f"<{path.address}>") == path
        assert not re.search(r"[\x00-\x1f\x7f]", path.address)
    assert smtpmock._parse_domain(text) in (None, text)


if __name__ == "__main__":
    for check in (
        pieces_do_not_matter,
        each_command_has_one_reply,
        a_body_comes_as_it_was_sent,
        any_mail_can_be_read,
        what_is_parsed_is_valid,
    ):
        check()
        print(f"{check.__name__}: {EXAMPLES} examples")
