"""What postal-mime and mailparser read otherwise than this server: python .ci/readers.py FOLDER, which has both.

The mails are those of the tests. Each difference is printed. One that has no reason here, or one that has a reason
and is gone, is an error.
"""

import base64
import json
import smtplib
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import smtpmock
import test_smtpmock as tests

# What is in the row of a mail, who reads what otherwise (nothing: all that they do), and why ours is right.
ACCEPTED = [
    ("=?utf-8?B?TcM=?= =?utf-8?B?vG5jaGVu?=", "postal-mime", "it decodes each word by itself"),
    ("\\r\\n\\tb\\r\\n", "mailparser", "it makes one blank of white space, which RFC 5322 section 2.2.3 keeps"),
    ("klingon", "postal-mime", "it takes unknown charsets for Windows-1252"),
    ("charset=idna", "postal-mime", "it takes unknown charsets for Windows-1252"),
    ("filename*=a\\0", "postal-mime", "it takes unknown charsets for Windows-1252"),
    ("charset=us-ascii", "postal-mime", "it takes ASCII for Windows-1252"),
    ("charset=iso-8859-1     ", "postal-mime", "it shows control characters"),
    ("filename=my file (1).pdf", "attachments", "they take (1) for a comment, and the rest is then wrong"),
    ("filename=C:", "mailparser", "it takes \\ for an escape, which it is within quotes alone"),
    ("name*=\"utf-8''b\"", "attachments", "a parameter twice: who knows"),
    ("(a) quoted-printable", "postal-mime", "RFC 2045 section 6.7 (3) says to delete blanks at the end of a line"),
    ("x-uuencode", "text", "they do not know it"),
    ("charset=utf-7", "text", "they do not know it"),
    ("utf-7''", "attachments", "they do not know it"),
    ("charset=IBM00858", "text", "they do not know it"),
    ("charset=x-ms-cp932", "mailparser", "it does not know it"),
    ("\\xef\\xbb\\xbf", "mailparser", "it shows the byte order mark"),
    ("charset=ks_c_5601-1987", "postal-mime", "it does not know the characters that Windows adds"),
    ("\\x7f\\x7f", "mailparser", "its replacement character is ?"),
    ("multipart/digest", "mailparser", "it shows the mail within the mail"),
    ("delivery-status", "mailparser", "it shows the report in the text"),
    ("delivery-status", "postal-mime attachments", "it adds an empty line"),
    ("name=notes.txt", "", "they join all texts; RFC 2183 lets a file name make it a file"),
    ('boundary="ä "', "text", "one keeps the blank at its end, which is none of it; one does not find it"),
    ("multipart/mixed | ", "text", "they show nothing"),
    ("boundary=never", "text", "they show nothing"),
    ("text; charset", "", "RFC 2045 section 5.2 says to take it for text/plain"),
    ("Content-Type: ; |", "postal-mime", "as above, with Content-Type: ;"),
    ("Hello | ", "text", "they take the text for a header; tests do send such texts"),
    ("R: x", "", "the mail begins with a continuation line, which is no header"),
]


def list_mails() -> dict[str, bytes]:
    return {title: content for title, content, _ in tests.list_readings() if len(content) < 100_000}


def read_ours(contents: list[bytes]) -> list[dict[str, Any]]:
    with smtpmock.Server(multiple_message_receiving=True) as server:
        with smtplib.SMTP(server.host, server.port) as client:
            for content in contents:
                client.sendmail("a@example.com", ["b@example.com"], content)
        messages = server.messages()
    return [
        {name: getattr(message, name) for name in ("subject", "text", "html")}
        | {"attachments": [[a.name, a.type, base64.b64encode(a.content).decode()] for a in message.attachments]}
        for message in messages
    ]


def tidy(value: Any) -> Any:
    """Without the line ends that a text may or may not have at its end; a lone CR is one, too."""
    if isinstance(value, list):
        return [(name, kind, b"\n".join(base64.b64decode(data).splitlines())) for name, kind, data in value]
    return (value.replace("\r\n", "\n").rstrip("\n") or None) if isinstance(value, str) else value


def main() -> int:
    mails = list_mails()
    process = subprocess.run(
        ["node", str(ROOT / ".ci" / "readers.mjs"), sys.argv[1]],
        input=json.dumps([base64.b64encode(content).decode() for content in mails.values()]),
        stdout=subprocess.PIPE, text=True, check=True, timeout=120,
    )  # fmt: skip
    faults, unused = 0, set(ACCEPTED)
    for title, ours, theirs in zip(mails, read_ours([*mails.values()]), json.loads(process.stdout), strict=True):
        for reader, values in theirs.items():
            for name, value in ours.items():
                if tidy(value) != tidy(values.get(name)):
                    reasons = [row for row in ACCEPTED if row[0] in title and row[1] in f"{reader} {name}"]
                    unused -= set(reasons)
                    faults += not reasons
                    print(f"{'ok ' if reasons else 'BUG'} {title}: {name} is {values.get(name)!r} by {reader}")
                    print(f"    {value!r} by us: {reasons[0][2] if reasons else 'why?'}")
    for row in unused:
        print("BUG no such difference any more:", *row)
    print(f"{len(mails)} mails, {faults} differences without a reason, {len(unused)} reasons without a difference")
    return 1 if faults or unused else 0


if __name__ == "__main__":
    sys.exit(main())
