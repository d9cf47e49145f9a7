"""Compare profiles with the servers that they imitate: python .ci/profiles.py [-v] [postfix | exim | opensmtpd]...

It installs each server from Debian, one after the other, for which it needs to be root on Debian, and runs it on
127.0.0.1, where it discards all mail. Each dialogue is held with the server and with smtpmock. The reply codes, the
enhanced codes and the EHLO keywords must be the same; with -v, the texts are shown as well. It exits with 1 if one
differs.
"""

import base64
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smtpmock

FOLDER = Path(tempfile.mkdtemp())
FOLDER.chmod(0o755)  # the servers have users of their own
CERTIFICATE, KEY = FOLDER / "cert.pem", FOLDER / "key.pem"
LIMIT = 20000  # bytes of a mail
OPTIONS: dict[str, Any] = {
    "multiple_rcptto": True,
    "msg_size_limit": LIMIT,
    "not_registered_emails": ["nobody@example.com"],
    "blacklisted_helo_domains": ["bad.example.org"],
    "blacklisted_mailfrom_emails": ["bad@example.org"],
    "blacklisted_rcptto_emails": ["blocked@example.com"],
    "auth_users": {"alice": "secret"},
    "auth_mechanisms": ["PLAIN", "LOGIN"],
    "auth_requires_tls": True,
}
PACKAGES = {"postfix": "postfix", "exim": "exim4-daemon-light", "opensmtpd": "opensmtpd"}


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


# What the client says, separated by slashes. TLS is a handshake, MAIL a body, and HUGE one that is too large. Brackets
# have servers that decide otherwise, which no text can imitate: some check more or less at this point. OpenSMTPD has no
# CHUNKING, and that of Debian 12 cannot do TLS.
HELLO = "EHLO a.example.com"
SENDER = f"{HELLO} / MAIL FROM:<a@example.org>"
RECIPIENT = f"{SENDER} / RCPT TO:<bob@example.com>"
SECURE = f"{HELLO} / STARTTLS / TLS / {HELLO}"
LOGIN = f"AUTH PLAIN {b64(chr(0) + 'alice' + chr(0) + 'secret')}"
DIALOGUES = f"""
NOOP / RSET / QUIT
HELO a.example.com
{HELLO}
HELO
EHLO
HELO bad.example.org [opensmtpd]
EHLO bad.example.org [opensmtpd]
MAIL FROM:<a@example.org>
RCPT TO:<bob@example.com> [opensmtpd]
{HELLO} / FOO
{HELLO} / RSET
{HELLO} / RSET x
{HELLO} / NOOP x [opensmtpd]
{HELLO} / VRFY bob@example.com [exim]
{HELLO} / HELP
{HELLO} / QUIT
{HELLO} / RCPT TO:<bob@example.com>
{HELLO} / DATA
{HELLO} / BDAT 4 LAST / hi
{HELLO} / MAIL FROM:<a@example.org
{HELLO} / MAIL FROM:<>
{HELLO} / MAIL FROM:<bad@example.org> [opensmtpd]
{HELLO} / MAIL FROM:<a@example.org> SIZE=100
{HELLO} / MAIL FROM:<a@example.org> SIZE=100000 [opensmtpd]
{HELLO} / MAIL FROM:<a@example.org> BODY=8BITMIME
{HELLO} / MAIL FROM:<a@example.org> FOO=1
{HELLO} / MAIL FROM:<a@example.org> RET=HDRS ENVID=1
{SENDER} / DATA [postfix opensmtpd]
{SENDER} / RSET / RCPT TO:<bob@example.com>
{SENDER} / RCPT TO:<bob@example.com
{SENDER} / RCPT TO:<nobody@example.com>
{SENDER} / RCPT TO:<blocked@example.com>
{SENDER} / RCPT TO:<nobody@example.com> / RCPT TO:<bob@example.com> / RCPT TO:<carol@example.com>
{RECIPIENT} / DATA / MAIL / QUIT
{RECIPIENT} / DATA / HUGE
{RECIPIENT} / DATA / MAIL / MAIL FROM:<a@example.org> / RCPT TO:<carol@example.com> / DATA / MAIL
{RECIPIENT} / RSET / DATA
{RECIPIENT} / BDAT x
{RECIPIENT} / BDAT 4 / hi / BDAT 4 LAST / hi [opensmtpd]
{RECIPIENT} / NOOP / RSET / QUIT
{RECIPIENT} / RCPT TO:<nobody@example.com> / DATA / MAIL
{RECIPIENT} / DATA / HUGE / RSET / QUIT
{SENDER} / RSET / MAIL FROM:<> / RCPT TO:<bob@example.com> / DATA / MAIL
HELO a.example.com / MAIL FROM:<a@example.org> / RCPT TO:<bob@example.com> / DATA / MAIL
helo a.example.com / mail from:<a@example.org> / rcpt to:<bob@example.com> / data / MAIL / quit
HELO a.example.com / RSET / RCPT TO:<bob@example.com>
HELO a.example.com / {HELLO} / MAIL FROM:<a@example.org> / QUIT [opensmtpd]
{SENDER} / NOOP / QUIT
FOO
{HELLO} / STARTTLS
{HELLO} / STARTTLS x
{SECURE} [opensmtpd]
{SECURE} / STARTTLS [opensmtpd]
{SECURE} / {LOGIN} / MAIL FROM:<a@example.org> [opensmtpd]
{SECURE} / AUTH PLAIN {b64(chr(0) + "alice" + chr(0) + "wrong")} [opensmtpd]
{SECURE} / AUTH LOGIN / {b64("alice")} / {b64("secret")} [opensmtpd]
{SECURE} / AUTH LOGIN / * [opensmtpd]
{SECURE} / AUTH PLAIN ==x== [opensmtpd]
{SECURE} / AUTH FOO [opensmtpd]
{SECURE} / {LOGIN} / {LOGIN} [opensmtpd]
"""


def converse(port: int, dialogue: str) -> list[str]:
    """The replies to a dialogue, each with its lines joined by newlines; the first is the greeting."""
    sock = socket.create_connection(("127.0.0.1", port), 20)
    file = sock.makefile("rb")

    def read() -> str:
        lines: list[str] = []
        while not lines or lines[-1][3:4] == "-":
            lines.append(file.readline().decode().rstrip("\r\n") or "<closed>")
        return "\n".join(lines)

    replies = [read()]
    for line in dialogue.split(" / "):
        if line == "TLS":
            context = ssl.create_default_context(cafile=str(CERTIFICATE))
            context.check_hostname = False
            sock = context.wrap_socket(sock)
            file = sock.makefile("rb")
            continue
        text = {"MAIL": "Subject: hi\r\n\r\nhi\r\n.", "HUGE": "Subject: hi\r\n\r\n" + "hello\r\n" * 9000 + "."}
        sock.sendall(f"{text.get(line, line)}\r\n".encode())
        if not line.startswith("BDAT 4"):  # a chunk follows, which is four bytes with its CRLF
            replies.append(read())
    sock.close()
    return replies


def summarize(reply: str) -> tuple[str, ...]:
    """What a program looks at: the code, the enhanced code, and the keywords of EHLO."""
    *lines, last = reply.split("\n")
    if any(line.startswith("250-SIZE") for line in lines):
        return ("250", *sorted(line[4:].split(" ")[0] for line in [*lines[1:], last]))
    code = re.match(r"\S+(?: [245]\.[0-9]+\.[0-9]+(?= ))?", last)
    return (code[0] if code else last,)


def compare(name: str, port: int, *, verbose: bool) -> int:
    """The number of dialogues that differ."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, KEY)
    failures = compared = 0
    with smtpmock.Server(profile=name, **OPTIONS, ssl_context=context) as mock:
        for row in DIALOGUES.strip().splitlines():
            dialogue, _, exceptions = row.partition(" [")
            if name in exceptions:
                continue
            compared += 1
            real, ours = converse(port, dialogue), converse(mock.port, dialogue)
            differs = list(map(summarize, real)) != list(map(summarize, ours))
            failures += differs
            if differs or verbose:
                print("FAILED" if differs else "ok", dialogue)
                said = [f"  {theirs!r}\n  {our!r}" for theirs, our in zip(real, ours, strict=True) if theirs != our]
                print(*said, sep="\n")
    print(f"{name}: {compared} dialogues, {failures} differ")
    return failures


def install(package: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", package, "openssl"]):
        words = ["apt-get", "-o", "DPkg::Lock::Timeout=300", *command]
        subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=True)


def make_certificate() -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=mail.example.com"
    files = ["-keyout", KEY, "-out", CERTIFICATE]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


# ------------------------------------------------------------------------------------------ servers


def serve_logins(path: str) -> None:
    """Accept alice with the password secret, for Postfix, as Dovecot would."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o777)
    listener.listen()

    def serve(client: socket.socket) -> None:
        offer = "VERSION\t1\t2\nMECH\tPLAIN\tplaintext\nMECH\tLOGIN\tplaintext\nSPID\t1\nCUID\t1\nCOOKIE\t" + "0" * 32
        client.sendall(f"{offer}\nDONE\n".encode())
        answers: dict[str, list[str]] = {}
        for line in client.makefile("r"):
            name, number, *fields = line.rstrip("\n").split("\t")
            if name == "AUTH":
                answers[number] = [fields[0], *(field[5:] for field in fields if field.startswith("resp="))]
            elif name == "CONT":
                answers[number].append(fields[0])
            else:
                continue
            mechanism, *said = answers[number]
            try:
                texts = [base64.b64decode(text, validate=True).decode() for text in said]
            except ValueError:
                client.sendall(f"FAIL\t{number}\treason=Invalid base64 data in continued response\n".encode())
                continue
            if mechanism == "LOGIN" and len(texts) < 2:
                reply = f"CONT\t{number}\t{b64(('Username:', 'Password:')[len(texts)])}"
            elif texts in (["alice", "secret"], ["\0alice\0secret"]):
                reply = f"OK\t{number}\tuser=alice"
            else:
                reply = f"FAIL\t{number}\tuser=alice"
            client.sendall(f"{reply}\n".encode())

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def start_postfix(port: int) -> list[str]:
    for name in ("etc", "spool", "data"):
        (FOLDER / name).mkdir()
    shutil.chown(FOLDER / "data", "postfix")
    serve_logins(str(FOLDER / "auth"))
    options = {
        "compatibility_level": "3.6",
        "queue_directory": FOLDER / "spool",
        "data_directory": FOLDER / "data",
        "maillog_file": "/dev/stdout",
        "inet_interfaces": "127.0.0.1",
        "inet_protocols": "ipv4",
        "myhostname": "mail.example.com",
        "mydestination": "example.com",
        "mynetworks": "",
        "local_recipient_maps": "inline:{bob@example.com=x,carol@example.com=x,blocked@example.com=x}",
        "local_transport": "discard:",
        "default_transport": "discard:",
        "message_size_limit": LIMIT,
        "smtpd_helo_required": "yes",
        "smtpd_delay_reject": "no",  # else what HELO and MAIL refuse is refused at RCPT
        "smtpd_helo_restrictions": "check_helo_access inline:{bad.example.org=REJECT}",
        "smtpd_sender_restrictions": "check_sender_access inline:{bad@example.org=REJECT}",
        "smtpd_relay_restrictions": "reject_unauth_destination",
        "smtpd_recipient_restrictions": "check_recipient_access inline:{blocked@example.com=REJECT}",
        "smtpd_sasl_auth_enable": "yes",
        "smtpd_sasl_type": "dovecot",
        "smtpd_sasl_path": FOLDER / "auth",
        "smtpd_tls_security_level": "may",
        "smtpd_tls_auth_only": "yes",
        "smtpd_tls_cert_file": CERTIFICATE,
        "smtpd_tls_key_file": KEY,
    }
    (FOLDER / "etc/main.cf").write_text("".join(f"{name} = {value}\n" for name, value in options.items()))
    services = Path("/usr/share/postfix/master.cf.dist").read_text().splitlines()
    lines = [line.split() for line in services if line[:1].isalpha() and not line.startswith("smtp      inet")]
    for line in lines:
        line[4] = "n"  # no chroot
    lines.append(f"127.0.0.1:{port} inet n - n - - smtpd".split())
    (FOLDER / "etc/master.cf").write_text("".join(" ".join(line) + "\n" for line in lines))
    return ["postfix", "-c", str(FOLDER / "etc"), "start-fg"]


def start_exim(port: int) -> list[str]:
    (FOLDER / "exim").mkdir()
    (FOLDER / "exim.conf").write_text(f"""
primary_hostname = mail.example.com
exim_user = Debian-exim
exim_group = Debian-exim
spool_directory = {FOLDER}/exim
log_file_path = {FOLDER}/exim/%slog
pid_file_path = {FOLDER}/exim/pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
keep_environment =
message_size_limit = {LIMIT}
chunking_advertise_hosts = *
dsn_advertise_hosts = *
tls_advertise_hosts = *
tls_certificate = {CERTIFICATE}
tls_privatekey = {KEY}
acl_smtp_helo = helo
acl_smtp_mail = mail
acl_smtp_rcpt = rcpt
acl_smtp_data = accept
queue_only
begin acl
helo:
  deny condition = ${{if eq{{$sender_helo_name}}{{bad.example.org}}}}
  accept
mail:
  deny senders = bad@example.org
  accept
rcpt:
  deny recipients = blocked@example.com
  require verify = recipient
  accept
begin routers
discard:
  driver = redirect
  local_parts = bob : carol
  domains = example.com
  data = :blackhole:
unknown:
  driver = redirect
  verify_only
  allow_fail
  data = :fail: Unrouteable address
begin authenticators
plain:
  driver = plaintext
  public_name = PLAIN
  server_advertise_condition = ${{if def:tls_in_cipher}}
  server_prompts = :
  server_condition = ${{if and{{{{eq{{$auth2}}{{alice}}}}{{eq{{$auth3}}{{secret}}}}}}}}
  server_set_id = $auth2
login:
  driver = plaintext
  public_name = LOGIN
  server_advertise_condition = ${{if def:tls_in_cipher}}
  server_prompts = <| Username: | Password:
  server_condition = ${{if and{{{{eq{{$auth1}}{{alice}}}}{{eq{{$auth2}}{{secret}}}}}}}}
  server_set_id = $auth1
""")
    shutil.chown(FOLDER / "exim", "Debian-exim")
    KEY.chmod(0o644)
    return ["exim4", "-C", str(FOLDER / "exim.conf"), "-bdf"]


def start_opensmtpd(port: int) -> list[str]:
    KEY.chmod(0o600)
    secret = subprocess.run(
        ["openssl", "passwd", "-6", "secret"], capture_output=True, text=True, check=True
    ).stdout.strip()
    (FOLDER / "creds").write_text(f"alice {secret}\n")
    (FOLDER / "smtpd.conf").write_text(f"""
pki mail.example.com cert "{CERTIFICATE}"
pki mail.example.com key "{KEY}"
table creds file:{FOLDER}/creds
table users {{ "bob@example.com", "carol@example.com" }}
smtp max-message-size "{LIMIT}"
listen on 127.0.0.1 port {port} hostname mail.example.com tls pki mail.example.com auth-optional <creds>
action "discard" mda "cat > /dev/null" virtual {{ bob = nobody, carol = nobody }}
match mail-from "bad@example.org" reject
match from any for rcpt-to "blocked@example.com" reject
match from any for rcpt-to <users> action "discard"
""")
    return ["/usr/sbin/smtpd", "-d", "-f", str(FOLDER / "smtpd.conf")]


@contextlib.contextmanager
def run(name: str) -> Iterator[int]:
    port = free_port()
    command = {"postfix": start_postfix, "exim": start_exim, "opensmtpd": start_opensmtpd}[name](port)
    with open(FOLDER / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError((FOLDER / f"{name}.log").read_text())
            time.sleep(0.05)
        yield port
    finally:
        if name == "postfix":
            subprocess.run(["postfix", "-c", str(FOLDER / "etc"), "stop"], capture_output=True, check=False)
        else:
            process.terminate()
        process.wait(30)


def main() -> int:
    names = [argument for argument in sys.argv[1:] if argument != "-v"] or list(PACKAGES)
    make_certificate()
    failures = 0
    for name in names:
        install(PACKAGES[name])
        with run(name) as port:
            failures += compare(name, port, verbose="-v" in sys.argv)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        status = main()
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    sys.exit(status)
