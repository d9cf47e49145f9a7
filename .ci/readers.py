"""What postal-mime and mailparser read otherwise than this server: python .ci/readers.py FOLDER_WITH_BOTH.

It prints each difference. One that the table does not explain, or one that it explains and that is gone, is an error.
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

# A mail with Python's escapes, what each reader reads otherwise, and why that is accepted.
MAILS = tests.read_table(r"""
== a subject folded after its colon
Subject:
 {x*100}

hi
== two words of a name and of a subject
From: =?utf-8?B?TcO8bg==?=
 =?utf-8?B?Y2hlbg==?= <a@example.com>
Subject: =?utf-8?B?TcO8bg==?=
 =?utf-8?B?Y2hlbg==?= and =?utf-8?Q?more?=

hi
== a character split between two words  -- reason="it decodes each word by itself"
-- differs="postal-mime subject"
Subject: =?utf-8?B?TcM=?= =?utf-8?B?vG5jaGVu?=

hi
== words of two charsets, and one with a language
Subject: =?iso-8859-1?Q?=FC?= =?utf-8?Q?=C3=BC?= =?utf-8*de?Q?=C3=BC?=

hi
== a word within other text
Subject: (=?utf-8?Q?=C3=BC?=) x=?utf-8?Q?=C3=BC?=y

hi
== raw UTF-8 in the subject
Subject: Grüße

hi
== base64 with a blank after it
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: base64{SP}

aGVsbG8=
== base64 with a comment
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: base64 (all of it)

aGVsbG8=
== base64 in a folded header
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding:
 base64

aGVsbG8=
== base64 with stray characters
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: base64

aGVs!bG8=
== two blocks of base64
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: base64

aGVsbG8=
aGVsbG8=
== a type with a comment
Content-Type: text/plain (plain words; a=b); charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

=FC
== a charset with a comment
Content-Type: text/plain; charset=iso-8859-1 (Latin)
Content-Transfer-Encoding: quoted-printable

=FC
== upper case and blanks
CONTENT-TYPE: TEXT/HTML ; CHARSET = "ISO-8859-1"
CONTENT-TRANSFER-ENCODING: QUOTED-PRINTABLE

=FC
== a mail within the mail
Content-Type: multipart/mixed; boundary=b

--b

hi
--b
Content-Type: message/rfc822
Content-Disposition: attachment; filename=f.eml

Subject:  two blanks
X-Empty:
X-Close:none

inner
--b--
== a mail within the mail in base64
Content-Type: multipart/mixed; boundary=b

--b

hi
--b
Content-Type: message/rfc822; name=f.eml
Content-Disposition: attachment; filename=f.eml
Content-Transfer-Encoding: base64

U3ViamVjdDogaW4NCg0KaGVsbG8NCg==
--b--
== a delivery report  -- reason="it appends the report to the text"
-- differs="mailparser text, mailparser attachments"
Content-Type: multipart/report; boundary=b

--b

hi
--b
Content-Type: message/delivery-status

Reporting-MTA: dns; mx.example.com

Final-Recipient: rfc822; b@example.com
Action: failed

--b--
== gb2312 with a character of GBK
Content-Type: text/plain; charset=gb2312
Content-Transfer-Encoding: 8bit

\xc4\xe3\xba\xc3\xe9F
== Shift_JIS of Windows
Content-Type: text/plain; charset=shift_jis
Content-Transfer-Encoding: 8bit

\x82\xb1\x87@
== Windows-31J
Content-Type: text/plain; charset=Windows-31J
Content-Transfer-Encoding: 8bit

\x82\xb1\x87@
== Hebrew with its direction
Content-Type: text/plain; charset=iso-8859-8-i
Content-Transfer-Encoding: 8bit

\xf9\xec\xe5\xed
== ISO-2022-JP with a character of NEC
Content-Type: text/plain; charset=iso-2022-jp

\x1b$B$3-!\x1b(B ok
== UTF-8 with a wrong byte
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

Gr\xc3\xbc\xff\xc3\x9fe
== Latin 1 that is that of Windows  -- reason="it shows control characters, where a browser shows quotes"
-- differs="postal-mime text"
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: 8bit

\x93x\x94
== an unknown charset
Content-Type: text/plain; charset=klingon

Qapla
== ASCII that is UTF-8  -- reason="it takes ASCII for Latin 1"
-- differs="postal-mime text"
Content-Type: text/plain; charset=us-ascii
Content-Transfer-Encoding: 8bit

ü
== file names
Content-Type: multipart/mixed; boundary=b

--b

hi
--b
Content-Type: application/pdf
Content-Disposition: attachment; filename="a.pdf"; filename*=utf-8''%c3%a4.pdf

X
--b
Content-Type: application/pdf
Content-Disposition: attachment; filename*0*=utf-8''%c3; filename*1*=%a4; filename*2=".pdf"

X
--b
Content-Type: application/pdf; name="=?utf-8?B?w6QucGRm?="

X
--b
Content-Type: application/pdf
Content-Disposition: attachment; filename==?utf-8?B?w6QucGRm?=

X
--b
Content-Type: application/pdf; name==?iso-8859-1?Q?=E4.pdf?=

X
--b
Content-Type: application/pdf
Content-Disposition: attachment; filename="a \\"b\\" (c); d.pdf"

X
--b
Content-Type: application/pdf
Content-Disposition: attachment;
 filename="=?utf-8?Q?=C3=A4_?=
 =?utf-8?Q?=C3=B6.pdf?="

X
--b
Content-Type: application/pdf
Content-Disposition: attachment; filename="ä.pdf"

X
--b
Content-Type: application/pdf
Content-Disposition: attachment; filename=a.pdf (final)

X
--b--
== an unquoted file name with blanks and parentheses  -- reason="they take (1) for a comment"
-- differs="postal-mime attachments, mailparser attachments"
Content-Type: multipart/mixed; boundary=b

--b

hi
--b
Content-Type: application/pdf
Content-Disposition: attachment; filename=my file (1).pdf; size=1

X
--b--
== an unquoted file name with backslashes  -- reason="it takes them for escapes, which they are within quotes alone"
-- differs="mailparser attachments"
Content-Type: multipart/mixed; boundary=b

--b

hi
--b
Content-Disposition: attachment; filename=C:\\docs\\a.pdf
Content-Type: application/pdf

X
--b--
== the only part has a name
Content-Type: text/html; charset=utf-8; name=page.html

<p>hi
== the only part is inline and has a name
Content-Type: text/plain
Content-Disposition: inline; filename=body.txt

hi
== the only part is an attachment
Content-Type: text/plain
Content-Disposition: attachment; filename=body.txt

hi
== a text with a name in a multipart  -- reason="they join all texts, whatever their names"
-- differs="postal-mime text, postal-mime attachments, mailparser text, mailparser attachments"
Content-Type: multipart/mixed; boundary=b

--b

hi
--b
Content-Type: text/plain; name=notes.txt

notes
--b--
== an unquoted boundary
Content-Type: multipart/mixed; boundary=----=_Part_1_22.33

------=_Part_1_22.33
Content-Type: text/plain

hi
------=_Part_1_22.33
Content-Type: image/png; name=a.png

X
------=_Part_1_22.33--
== a boundary with blanks after it
Content-Type: multipart/mixed; boundary="b"

--b {SP}
Content-Type: text/plain

hi
--b-- {SP}
== no last boundary
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: text/plain

hi
--b
Content-Type: image/png; name=a.png

X
== a bad line in a header
X-NoColon
Subject: later

hi
== a bad line at the end of a header
Subject: first
this is none

hi
== a bad line in the header of a part
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: text/plain; charset=iso-8859-1
this is none
Content-Transfer-Encoding: quoted-printable

=FC
--b--
== a blank before the colon
Subject : hi
Content-Type : text/html

<p>
== no empty line
Subject: hi
== no header  -- reason="they take the text for a header; tests do send such texts"
-- differs="postal-mime text, mailparser text"
Hello
== alternatives and an image
Content-Type: multipart/related; boundary=a

--a
Content-Type: multipart/alternative; boundary=b

--b
Content-Type: text/plain

hi
--b
Content-Type: text/html

<img src="cid:1">
--b--
--a
Content-Type: image/png
Content-ID: <1>
Content-Transfer-Encoding: base64

UE5H
--a--
== a charset in single quotes
Content-Type: text/plain; charset='iso-8859-1'
Content-Transfer-Encoding: quoted-printable

=FC
== quoted-printable with blanks at the ends of lines  -- reason="it keeps them, which RFC 2045 section 6.7 (3) forbids"
-- differs="postal-mime text"
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: quoted-printable

a {SP}
b=20
c= {SP}
d=ZZ =c3=bc
== encoded words with blanks and question marks
Subject: =?utf-8?Q?a b?= =?utf-8?q?c=3F?= =?UTF-8?b?dw==?=

hi
== encoded words that are none
Subject: =?utf-8?X?a?= =?utf-8?Q?a?= 100%?=

hi
== the base64 of a word without its padding
Subject: =?utf-8?B?w7x4?= =?utf-8?B?w7w?=

hi
== a subject folded with tabs and blanks  -- reason="it makes one blank of them"
-- differs="mailparser subject"
Subject: a
	b
   c

hi
== UTF-16 in base64
Content-Type: text/plain; charset=utf-16le
Content-Transfer-Encoding: base64

aABpAA==
== UTF-7  -- reason="they do not know it"
-- differs="postal-mime text, mailparser text"
Content-Type: text/plain; charset=utf-7

+APw-x
== charsets of China, Taiwan and Korea  -- reason="they join texts"
-- differs="postal-mime text, postal-mime html, mailparser html"
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: text/plain; charset=big5
Content-Transfer-Encoding: base64

pKSk5Q==
--b
Content-Type: text/html; charset=ks_c_5601-1987
Content-Transfer-Encoding: base64

x9Gxuw==
--b--
== a type that is none  -- reason="RFC 2045 section 5.2 says text/plain"
-- differs="postal-mime text, postal-mime attachments, mailparser text, mailparser attachments"
Content-Type: text; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

=FC
== a multipart without a boundary  -- reason="they show nothing"
-- differs="postal-mime text, mailparser text"
Content-Type: multipart/mixed

--b

hi
--b--
== uuencode  -- reason="they do not know it"
-- differs="postal-mime text, mailparser text"
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: x-uuencode

begin 644 a.txt
%:&5L;&\\
`
end
== a preamble and an epilogue
Content-Type: multipart/mixed; boundary="b c"

preamble
--b c

hi
--b c--
epilogue
== a boundary that begins like another
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: multipart/alternative; boundary=bb

--bb

hi
--bb
Content-Type: text/html

<p>
--bb--
--b--
== an inner multipart without its end
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: multipart/alternative; boundary=c

--c

hi
--b
Content-Type: image/png; name=a.png

X
--b--
== more file names
Content-Type: multipart/mixed; boundary=b

--b

hi
--b
Content-Type: application/pdf; name*=iso-8859-1'de'%e4.pdf

X
--b
Content-Type: application/pdf; name*0="a b"; name*1=".pdf"

X
--b
Content-Type: application/pdf; name*0*=utf-8''%c3;
 name*1*=%a4.pdf

X
--b
Content-Disposition: attachment; filename="unclosed.pdf
Content-Type: application/pdf

X
--b
Content-Disposition: attachment; filename*=gb2312''%C4%E3.pdf
Content-Type: application/pdf

X
--b
Content-Disposition: attachment; filename*=utf-8''a%20b.pdf ; size=3
Content-Type: application/pdf

X
--b
Content-Disposition: attachment (a comment) ; (another) filename = "c d.pdf" (more)
Content-Type: application/pdf

X
--b
Content-Disposition: ATTACHMENT; FILENAME=UPPER.PDF
Content-Type: APPLICATION/PDF

X
--b--
== a digest  -- reason="it shows the mail within the mail"
-- differs="mailparser text, mailparser attachments"
Content-Type: multipart/digest; boundary=b

--b

Subject: one

first
--b--
== lines that end in LF alone and a bare CR
Subject: a\rb
Content-Type: text/plain

x\ry
== two texts  -- reason="they join all texts"
-- differs="postal-mime text, postal-mime attachments, mailparser text, mailparser attachments"
Content-Type: multipart/mixed; boundary=b

--b

one
--b

two
--b--
""")


def read_ours(contents: list[bytes]) -> list[dict[str, Any]]:
    results = []
    with smtpmock.Server(multiple_message_receiving=True) as server:
        for content in contents:
            with smtplib.SMTP(server.host, server.port) as client:
                client.sendmail("a@example.com", ["b@example.com"], content)
        for message in server.messages():
            attachments = [[a.name, a.type, base64.b64encode(a.content).decode()] for a in message.attachments]
            results.append(
                {"subject": message.subject, "text": message.text, "html": message.html, "attachments": attachments}
            )
    return results


def tidy(value: Any) -> Any:
    """Without the line ends that a text may or may not have at its end."""
    if isinstance(value, list):
        return [
            (name, kind, base64.b64decode(content).replace(b"\r\n", b"\n").rstrip()) for name, kind, content in value
        ]
    return (value.replace("\r\n", "\n").rstrip("\n") or None) if isinstance(value, str) else value


def main() -> int:
    contents = [tests.read_escapes("\n".join([*entry.lines, ""])).replace(b"\n", b"\r\n") for entry in MAILS.values()]
    process = subprocess.run(
        ["node", str(ROOT / ".ci" / "readers.mjs"), sys.argv[1]],
        input=json.dumps([base64.b64encode(content).decode() for content in contents]),
        stdout=subprocess.PIPE, text=True, check=True, timeout=120,
    )  # fmt: skip
    faults = 0
    for (title, entry), ours, theirs in zip(
        MAILS.items(), read_ours(contents), json.loads(process.stdout), strict=True
    ):
        accepted = set(filter(None, entry.options.get("differs", "").split(", ")))
        found = {
            f"{reader} {name}": values.get(name)
            for reader, values in theirs.items()
            for name, value in ours.items()
            if tidy(value) != tidy(values.get(name))
        }
        for what, value in found.items():
            print(f"{'ok ' if what in accepted else 'BUG'} {title}: {what} {value!r}, ours {ours[what.split()[1]]!r}")
        if found:
            print(f"    {entry.options.get('reason', 'no reason is given')}")
        for what in accepted - found.keys():
            print(f"BUG {title}: {what} does not differ any more")
        faults += len(accepted ^ found.keys())
    print(f"{len(MAILS)} mails, {faults} differences that are not explained, or explained and gone")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
