"""Real SMTP clients deliver a mail to smtpmock in each mode: python .ci/clients.py [CLIENT...]

It installs what is missing from PyPI, npm and Debian, for which it needs to be root on Debian; all but Debian's
packages goes into a folder that is removed again. It prints a table and exits with 1 if a client fails at a mode which
it can do. What is checked is what the server has recorded: sender, recipients, subject, text, user and TLS.
"""

import os
import shutil
import smtplib
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smtpmock

DEBIAN = "ruby php-cli libphp-phpmailer golang-go swaks curl msmtp postfix libsasl2-modules libmail-java"
DEBIAN += " default-jdk-headless nodejs libio-socket-ssl-perl libauthen-sasl-perl"
PYPI = "aiosmtplib django flask-mail trustme"
MODES = ("plain", "auth", "starttls", "implicit")
EXTENSIONS = ("SIZE", "8BITMIME", "SMTPUTF8", "PIPELINING", "DSN", "CHUNKING", "ENHANCEDSTATUSCODES")
SUBJECT, TEXT = "Grüße aus Köln", "Schöne Grüße"
ENCODED = "=?utf-8?q?Gr=C3=BC=C3=9Fe_aus_K=C3=B6ln?="
MIME = f"""From: shop@example.com
To: b@example.com, c@example.com
Subject: {ENCODED}
MIME-Version: 1.0
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

{TEXT}
"""

folder = Path(tempfile.mkdtemp())
folder.chmod(0o755)  # Postfix has users of its own

# ----------------------------------------------------------------------------- the clients' programs

# Each is given the mode and the port; user and password are alice and secret, the authority is ca.pem.
PROGRAMS = {
    "lib.py": """
        import smtplib, ssl, sys
        from email.message import EmailMessage
        mode, port = sys.argv[1], int(sys.argv[2])
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = "shop@example.com", "b@example.com, c@example.com", "Grüße aus Köln"
        mail.set_content("Schöne Grüße\\n")
        context = ssl.create_default_context(cafile="ca.pem")
        make = smtplib.SMTP if mode != "implicit" else lambda *a: smtplib.SMTP_SSL(*a, context=context)
        with make("localhost", port) as client:
            if mode == "starttls":
                client.starttls(context=context)
            if mode != "plain":
                client.login("alice", "secret")
            client.send_message(mail)
        """,
    "aio.py": """
        import asyncio, ssl, sys
        from email.message import EmailMessage
        import aiosmtplib
        mode, port = sys.argv[1], int(sys.argv[2])
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = "shop@example.com", "b@example.com, c@example.com", "Grüße aus Köln"
        mail.set_content("Schöne Grüße\\n")
        login = {} if mode == "plain" else {"username": "alice", "password": "secret"}
        context = ssl.create_default_context(cafile="ca.pem")
        asyncio.run(aiosmtplib.send(mail, hostname="localhost", port=port, use_tls=mode == "implicit",
            start_tls=mode == "starttls", tls_context=context if mode in ("starttls", "implicit") else None, **login))
        """,
    "dj.py": """
        import ssl, sys
        from functools import cached_property
        from django.conf import settings
        mode, port = sys.argv[1], int(sys.argv[2])
        settings.configure()
        from django.core.mail import EmailMessage
        from django.core.mail.backends.smtp import EmailBackend
        class Backend(EmailBackend):
            @cached_property
            def ssl_context(self):
                return ssl.create_default_context(cafile="ca.pem")
        login = {} if mode == "plain" else {"username": "alice", "password": "secret"}
        backend = Backend(host="localhost", port=port, use_tls=mode == "starttls", use_ssl=mode == "implicit", **login)
        mail = EmailMessage("Grüße aus Köln", "Schöne Grüße", "shop@example.com", ["b@example.com", "c@example.com"])
        assert backend.send_messages([mail]) == 1
        """,
    "fl.py": """
        import sys
        from flask import Flask
        from flask_mail import Mail, Message
        mode, port = sys.argv[1], int(sys.argv[2])
        app = Flask("client")
        app.config.update(MAIL_SERVER="localhost", MAIL_PORT=port, MAIL_USE_TLS=mode == "starttls",
            MAIL_USE_SSL=mode == "implicit")
        if mode != "plain":
            app.config.update(MAIL_USERNAME="alice", MAIL_PASSWORD="secret")
        with app.app_context():
            Mail(app).send(Message("Grüße aus Köln", ["b@example.com", "c@example.com"], "Schöne Grüße",
                sender="shop@example.com"))
        """,
    "node.js": """
        const fs = require("fs");
        const [mode, port, pool] = process.argv.slice(2);
        const auth = mode === "plain" ? undefined : { user: "alice", pass: "secret" };
        const mailer = require("nodemailer").createTransport({ host: "localhost", port: Number(port), auth,
          pool: pool === "pool", secure: mode === "implicit", requireTLS: mode === "starttls",
          ignoreTLS: mode === "plain" || mode === "auth", tls: { ca: fs.readFileSync("ca.pem") } });
        mailer.sendMail({ from: "shop@example.com", to: "b@example.com, c@example.com", subject: "Grüße aus Köln",
          text: "Schöne Grüße" }).then(() => mailer.close(), (error) => { console.error(error); process.exit(1); });
        """,
    "smtp.rb": """
        require "net/smtp"
        require "openssl"
        mode, port = ARGV
        context = OpenSSL::SSL::SSLContext.new
        context.set_params(ca_file: "ca.pem", verify_mode: OpenSSL::SSL::VERIFY_PEER)
        smtp = Net::SMTP.new("localhost", port.to_i)
        smtp.disable_starttls
        smtp.enable_starttls(context) if mode == "starttls"
        smtp.enable_tls(context) if mode == "implicit"
        login = mode == "plain" ? [] : ["alice", "secret", :plain]
        smtp.start("client.example.com", *login) do |client|
          client.send_message(File.read("mail.eml"), "shop@example.com", ["b@example.com", "c@example.com"])
        end
        """,
    "mailer.php": """
        <?php
        foreach (["Exception", "SMTP", "PHPMailer"] as $name) require "/usr/share/php/libphp-phpmailer/src/$name.php";
        [, $mode, $port] = $argv;
        $mail = new PHPMailer\\PHPMailer\\PHPMailer(true);
        $mail->isSMTP();
        [$mail->Host, $mail->Port, $mail->CharSet] = ["localhost", (int) $port, "UTF-8"];
        $mail->SMTPAutoTLS = false;
        $mail->SMTPSecure = ["starttls" => "tls", "implicit" => "ssl"][$mode] ?? "";
        $mail->SMTPOptions = ["ssl" => ["cafile" => "ca.pem"]];
        if ($mode != "plain") [$mail->SMTPAuth, $mail->Username, $mail->Password] = [true, "alice", "secret"];
        $mail->setFrom("shop@example.com");
        $mail->addAddress("b@example.com");
        $mail->addAddress("c@example.com");
        [$mail->Subject, $mail->Body] = ["Grüße aus Köln", "Schöne Grüße"];
        $mail->send();
        """,
    "client.go": """
        package main
        import ("crypto/tls"; "crypto/x509"; "net/smtp"; "os")
        func check(err error) { if err != nil { println(err.Error()); os.Exit(1) } }
        func main() {
            mode, address := os.Args[1], "localhost:"+os.Args[2]
            pem, _ := os.ReadFile("ca.pem"); mail, _ := os.ReadFile("mail.eml")
            pool := x509.NewCertPool(); pool.AppendCertsFromPEM(pem)
            config := &tls.Config{RootCAs: pool, ServerName: "localhost"}
            var client *smtp.Client; var err error
            if mode == "implicit" {
                conn, err := tls.Dial("tcp", address, config); check(err)
                client, err = smtp.NewClient(conn, "localhost"); check(err)
            } else { client, err = smtp.Dial(address); check(err) }
            if mode == "starttls" { check(client.StartTLS(config)) }
            if mode != "plain" { check(client.Auth(smtp.PlainAuth("", "alice", "secret", "localhost"))) }
            check(client.Mail("shop@example.com"))
            check(client.Rcpt("b@example.com")); check(client.Rcpt("c@example.com"))
            body, err := client.Data(); check(err)
            _, err = body.Write(mail); check(err); check(body.Close()); check(client.Quit())
        }
        """,
    "Client.java": """
        import java.util.Properties;
        import javax.mail.*;
        import javax.mail.internet.*;
        class Client {
          public static void main(String[] args) throws Exception {
            String mode = args[0], protocol = mode.equals("implicit") ? "smtps" : "smtp";
            String prefix = "mail." + protocol + ".";
            Properties properties = new Properties();
            properties.put("mail.transport.protocol", protocol);
            properties.put(prefix + "host", "localhost");
            properties.put(prefix + "port", args[1]);
            properties.put(prefix + "auth", String.valueOf(!mode.equals("plain")));
            properties.put(prefix + "starttls.enable", String.valueOf(mode.equals("starttls")));
            properties.put(prefix + "starttls.required", String.valueOf(mode.equals("starttls")));
            MimeMessage mail = new MimeMessage(Session.getInstance(properties));
            mail.setFrom(new InternetAddress("shop@example.com"));
            mail.setRecipients(Message.RecipientType.TO, "b@example.com, c@example.com");
            mail.setSubject("Gr\\u00fc\\u00dfe aus K\\u00f6ln", "UTF-8");
            mail.setText("Sch\\u00f6ne Gr\\u00fc\\u00dfe", "UTF-8");
            Transport transport = Session.getInstance(properties).getTransport(protocol);
            if (mode.equals("plain")) transport.connect(); else transport.connect("alice", "secret");
            transport.sendMessage(mail, mail.getAllRecipients());
            transport.close();
          }
        }
        """,
}
JAVA = "/usr/share/java/javax.mail.jar:/usr/share/java/javax.activation.jar"


def curl(mode: str, port: int) -> list[str]:
    login = [] if mode == "plain" else ["--user", "alice:secret"]
    tls = ["--ssl-reqd"] if mode == "starttls" else []
    url = f"smtp{'s' if mode == 'implicit' else ''}://localhost:{port}/client.example.com"
    people = "--mail-from shop@example.com --mail-rcpt b@example.com --mail-rcpt c@example.com".split()
    return ["curl", "-sS", url, "--cacert", "ca.pem", *people, *login, *tls, "--upload-file", "mail.eml"]


def swaks(mode: str, port: int) -> list[str]:
    login = [] if mode == "plain" else "--auth PLAIN --auth-user alice --auth-password secret".split()
    tls = {"starttls": ["--tls"], "implicit": ["--tls-on-connect"]}.get(mode, [])
    verify = ["--tls-verify", "--tls-ca-path", "ca.pem"] if tls else []
    people = "--from shop@example.com --to b@example.com,c@example.com --helo client.example.com".split()
    return [
        "swaks",
        "--server",
        "localhost",
        "--port",
        str(port),
        *people,
        *login,
        *tls,
        *verify,
        "--data",
        "@mail.eml",
    ]


def msmtp(mode: str, port: int) -> list[str]:
    login = [] if mode == "plain" else ["--auth=plain", "--user=alice", "--passwordeval=echo secret"]
    tls = {"starttls": ["--tls=on"], "implicit": ["--tls=on", "--tls-starttls=off"]}.get(mode, ["--tls=off"])
    trust = ["--tls-trust-file=ca.pem"] if "--tls=on" in tls else []
    people = ["--from=shop@example.com", "b@example.com", "c@example.com"]
    return ["msmtp", "--file=/dev/null", "--host=localhost", f"--port={port}", *login, *tls, *trust, *people]


class Postfix:
    """A relay of its own, with its configuration, queue and data in the folder, which speaks to one port."""

    def __init__(self, mode: str, port: int) -> None:
        self.home = folder / f"postfix-{mode}"
        self.port = free_port()
        for name in ("etc", "spool", "data"):
            (self.home / name).mkdir(parents=True)
            (self.home / name).chmod(0o755)
        shutil.chown(self.home / "data", "postfix")
        options = {
            "compatibility_level": "3.6",
            "queue_directory": self.home / "spool",
            "data_directory": self.home / "data",
            "maillog_file": "/dev/stdout",
            "inet_interfaces": "127.0.0.1",
            "inet_protocols": "ipv4",
            "mydestination": "",
            "mynetworks": "127.0.0.0/8",
            "myhostname": "relay.example.com",
            "relayhost": f"[localhost]:{port}",
            "smtp_host_lookup": "native",
            "alias_maps": "",
            "smtp_tls_CAfile": folder / "ca.pem",
            "smtp_tls_security_level": {"starttls": "secure", "implicit": "secure"}.get(mode, "none"),
            "smtp_tls_secure_cert_match": "localhost",
            "smtp_tls_wrappermode": "yes" if mode == "implicit" else "no",
            "smtp_sasl_auth_enable": "no" if mode == "plain" else "yes",
            "smtp_sasl_password_maps": f"inline:{{{{[localhost]:{port}=alice:secret}}}}",
            "smtp_sasl_security_options": "",
        }
        (self.home / "etc/main.cf").write_text("".join(f"{name} = {value}\n" for name, value in options.items()))
        services = Path("/usr/share/postfix/master.cf.dist").read_text().splitlines()
        lines = [line.split() for line in services if line[:1].isalpha() and not line.startswith("smtp      inet")]
        for line in lines:
            line[4] = "n"  # no chroot
        lines.append(f"127.0.0.1:{self.port} inet n - n - - smtpd".split())
        (self.home / "etc/master.cf").write_text("".join(" ".join(line) + "\n" for line in lines))

    def send(self) -> None:
        etc = str(self.home / "etc")
        with open(self.home / "log", "w") as log:
            master = subprocess.Popen(["postfix", "-c", etc, "start-fg"], stdout=log, stderr=log)
        try:
            if not wait_until(lambda: is_open(self.port), 20):
                raise RuntimeError("Postfix does not start")
            with smtplib.SMTP("127.0.0.1", self.port, timeout=20) as client:
                people = "shop@example.com", ["b@example.com", "c@example.com"]
                client.sendmail(*people, MIME.encode(), ["BODY=8BITMIME"], ["NOTIFY=FAILURE"])
            wait_until(lambda: "status=" in (self.home / "log").read_text(), 20)
        except Exception as error:
            raise RuntimeError((self.home / "log").read_text()) from error
        finally:
            subprocess.run(["postfix", "-c", etc, "stop"], capture_output=True, check=False)
            master.wait(30)
        if (self.home / "log").read_text().count("status=sent") != 2:
            raise RuntimeError("Postfix did not send it to both")


# ------------------------------------------------------------------------------------------ helpers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def run(*command: str, text: str | None = None, timeout: float = 60) -> str:
    environment = {**os.environ, "SSL_CERT_FILE": str(folder / "ca.pem"), "NODE_PATH": str(folder / "node_modules")}
    environment["CGO_ENABLED"] = "0"  # Go then needs no C compiler
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, timeout=timeout, cwd=folder, env=environment
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command[:3])}... exit {done.returncode}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        )
    return done.stdout + done.stderr


class Client(NamedTuple):
    name: str
    version: Callable[[], str]
    send: Callable[[str, int], object]
    cannot: tuple[str, ...] = ()


def make_clients(python: str) -> list[Client]:
    def package(name: str) -> Callable[[], str]:
        return lambda: run(python, "-c", f"import importlib.metadata as m; print(m.version('{name}'))").strip()

    def script(name: str) -> Callable[[str, int], object]:
        return lambda mode, port: run(python, name, mode, str(port))

    def node(*more: str) -> Callable[[str, int], object]:
        return lambda mode, port: run("node", "node.js", mode, str(port), *more)

    def program(*command: str) -> Callable[[str, int], object]:
        return lambda mode, port: run(*command, mode, str(port))

    def debian(name: str) -> Callable[[], str]:
        return lambda: run("dpkg-query", "-W", "-f=${Version}", name)

    nodemailer = lambda: run("node", "-p", "require('nodemailer/package.json').version").strip()  # noqa: E731
    trust = "-Djavax.net.ssl.trustStore=ca.p12", "-Djavax.net.ssl.trustStorePassword=secret"
    return [
        Client("Python smtplib", lambda: sys.version.split()[0], script("lib.py")),
        Client("aiosmtplib", package("aiosmtplib"), script("aio.py")),
        Client("Django", package("django"), script("dj.py")),
        Client("Flask-Mail", package("flask-mail"), script("fl.py")),
        Client("nodemailer", nodemailer, node()),
        Client("nodemailer, pooled", nodemailer, node("pool")),
        Client("Ruby net/smtp", lambda: run("ruby", "-e", "print RUBY_VERSION"), program("ruby", "smtp.rb")),
        Client("swaks", debian("swaks"), lambda mode, port: run(*swaks(mode, port))),
        Client("curl", lambda: run("curl", "--version").split()[1], lambda mode, port: run(*curl(mode, port))),
        Client("msmtp", debian("msmtp"), lambda mode, port: run(*msmtp(mode, port), text=MIME)),
        Client("PHPMailer", debian("libphp-phpmailer"), program("php", "mailer.php")),
        Client("Go net/smtp", lambda: run("go", "env", "GOVERSION").strip().removeprefix("go"), program("./client")),
        Client("JavaMail", debian("libmail-java"), program("java", *trust, "-cp", f"{JAVA}:.", "Client")),
        Client("Postfix", debian("postfix"), lambda mode, port: Postfix(mode, port).send()),
    ]


def install() -> str:
    """Fill the folder; returns the Python that has the packages."""
    missing = [name for name in DEBIAN.split() if not is_installed(name)]
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", *command], env=environment, stdout=subprocess.DEVNULL, check=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv/bin/python")
    run(python, "-m", "pip", "install", "-q", *PYPI.split(), timeout=300)
    run("npm", "install", "--silent", "--no-audit", "--prefix", str(folder), "nodemailer", timeout=300)
    for name, text in PROGRAMS.items():
        (folder / name).write_text(textwrap.dedent(text).strip() + "\n", encoding="utf-8")
    (folder / "mail.eml").write_bytes(MIME.replace("\n", "\r\n").encode())
    run(python, "-m", "trustme", "-q", "-d", str(folder), "-i", "localhost", "127.0.0.1")
    (folder / "client.pem").rename(folder / "ca.pem")
    run("go", "build", "-o", "client", "client.go", timeout=300)
    run("javac", "-cp", JAVA, "Client.java")
    keytool = "-importcert -noprompt -storetype PKCS12 -storepass secret -keystore ca.p12 -alias ca -file ca.pem"
    run("keytool", *keytool.split())
    return python


def is_installed(package: str) -> bool:
    if package in ("nodejs", "default-jdk-headless"):  # which may have come in other ways
        return shutil.which("node" if package == "nodejs" else "javac") is not None
    done = subprocess.run(["dpkg", "-s", package], capture_output=True, check=False)
    return done.returncode == 0


def options(mode: str) -> dict[str, Any]:
    import ssl

    chosen: dict[str, Any] = {"extensions": EXTENSIONS, "multiple_rcptto": True, "multiple_message_receiving": True}
    if mode != "plain":
        chosen |= {"auth_users": {"alice": "secret"}, "auth_required": True}
    if mode in ("starttls", "implicit"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        chosen |= {"ssl_context": context, "auth_requires_tls": True}
        chosen |= {"tls_required": True} if mode == "starttls" else {"implicit_tls": True}
    return chosen


def deliver(client: Client, mode: str, server: smtpmock.Server) -> str:
    """How it went: the user, the mechanism and the version of TLS, or what is wrong."""
    server.reset()
    try:
        client.send(mode, server.port)
        (message,) = server.wait_for_messages(1, 10, lambda message: message.is_consistent)
    except Exception as error:
        transcripts = [message.transcript for message in server.messages()]
        return "FAILED: " + "\n".join([f"{type(error).__name__}: {error}", *transcripts])
    expected: dict[str, object] = {
        "mail_from": "shop@example.com",
        "rcpt_tos": ["b@example.com", "c@example.com"],
        "subject": SUBJECT,
        "text": TEXT,
        "auth_user": None if mode == "plain" else "alice",
        "auth": mode != "plain",
        "tls": mode in ("starttls", "implicit"),
    }
    found = {name: getattr(message, name) for name in expected}
    found |= {
        "rcpt_tos": sorted(message.rcpt_tos),
        "text": (message.text or "").strip(),
        "tls": message.tls is not None,
    }
    if found != expected:
        return f"FAILED: {found}\n{message.transcript}"
    return ", ".join(filter(None, (message.auth_mechanism, message.tls and message.tls[0]))) or "yes"


def main() -> int:
    failures: list[str] = []
    try:
        clients = [client for client in make_clients(install()) if client.name in (sys.argv[1:] or [client.name])]
        rows = {client.name: [client.name, client.version()] for client in clients}
        for mode in MODES:
            with smtpmock.Server(**options(mode)) as server:
                for client in clients:
                    outcome = "cannot" if mode in client.cannot else deliver(client, mode, server)
                    if outcome.startswith("FAILED"):
                        failures.append(f"{client.name}, {mode}: {outcome}")
                    rows[client.name].append(outcome.partition(":")[0])
        print("| client | version | plain | AUTH | STARTTLS, AUTH | implicit TLS, AUTH |")
        print("| --- | --- | --- | --- | --- | --- |")
        for row in rows.values():
            print(f"| {' | '.join(row)} |")
        print(*failures, sep="\n\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
