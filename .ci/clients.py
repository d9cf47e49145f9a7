"""Real SMTP clients deliver a mail to smtpmock in each mode: python .ci/clients.py [CLIENT...]

It installs what is missing from PyPI, npm and Debian, for which it needs to be root on Debian; all but Debian's
packages goes into a folder that is removed again. It prints how each client delivers the mail, then the violations and
warnings that the server finds, and exits with 1 if a client fails. What is checked is what the server has recorded:
sender, recipients, subject, texts, attachment, user and TLS, and the codes, which must be those expected of the client.
"""

import base64
import json
import os
import quopri
import shutil
import smtplib
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smtpmock

DEBIAN = "ruby php-cli libphp-phpmailer golang-go swaks curl msmtp postfix libsasl2-modules libmail-java"
DEBIAN += " default-jdk-headless nodejs libio-socket-ssl-perl libauthen-sasl-perl php-symfony-mailer"
DEBIAN += " git-email libmailtools-perl mutt s-nail"
PYPI = "aiosmtplib django flask-mail redmail yagmail trustme"
NPM = "nodemailer emailjs"
MODES = ("plain", "auth", "starttls", "implicit")
EXTENSIONS = ("SIZE", "8BITMIME", "SMTPUTF8", "PIPELINING", "DSN", "CHUNKING", "ENHANCEDSTATUSCODES")

# A mail in which there is much to get wrong: umlauts, 25 recipients, a dot at the start of a line, HTML of 2.9 KB
# in one line, and a file whose name is not ASCII.
MAIL: dict[str, Any] = {
    "name": "Jörg Müller",
    "sender": "shop@example.com",
    "to": [f"customer.number.{number:02}@mail.shop.example.com" for number in range(25)],
    "subject": "Grüße aus Köln",
    "text": "Schöne Grüße\n.aus Köln\n-- \nJörg",
    "html": "<p>Schöne Grüße</p>" + "<p>Die Bestellung wird größer.</p>" * 80,
    "file": "Prüfbericht März.pdf",
}
FILE = b"%PDF-1.7\n" + bytes(range(256)) * 4
FOLDED = ",\n ".join(MAIL["to"])
# The same as it must be, for the programs that send what they are given. Its text is left as it is, for 8BITMIME.
MIME = f"""Date: Fri, 21 Nov 1997 09:55:06 -0600
From: =?utf-8?q?J=C3=B6rg_M=C3=BCller?= <{MAIL["sender"]}>
To: {FOLDED}
Message-ID: <1@shop.example.com>
Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe_aus_K=C3=B6ln?=
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=mixed

--mixed
Content-Type: multipart/alternative; boundary=alternative

--alternative
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

{MAIL["text"]}
--alternative
Content-Type: text/html; charset=utf-8
Content-Transfer-Encoding: quoted-printable

{quopri.encodestring(MAIL["html"].encode()).decode()}
--alternative--

--mixed
Content-Type: application/pdf
Content-Transfer-Encoding: base64
Content-Disposition: attachment; filename*=utf-8''Pr%C3%BCfbericht%20M%C3%A4rz.pdf

{base64.encodebytes(FILE).decode()}
--mixed--
"""

# What follows "Content-Type:" in a patch, as git format-patch writes it.
PATCH = f"text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n\n{MAIL['text']}\n"

folder = Path(tempfile.mkdtemp())
folder.chmod(0o755)  # Postfix has users of its own

# ----------------------------------------------------------------------------- the clients' programs

# Each is given the mode and the port; user and password are alice and secret, the authority is ca.pem. The mail is in
# mail.json, its file beside it, and mail.eml is the whole of it.
PROGRAMS = {
    "common.py": """
        import json, ssl, sys
        from email.message import EmailMessage
        from email.utils import formataddr, formatdate, make_msgid
        from pathlib import Path
        from types import SimpleNamespace
        mode, port = sys.argv[1], int(sys.argv[2])
        context = ssl.create_default_context(cafile="ca.pem")
        it = SimpleNamespace(**json.loads(Path("mail.json").read_text("utf-8")))
        it.content = Path(it.file).read_bytes()
        def make():
            mail = EmailMessage()
            mail["Date"], mail["Message-ID"] = formatdate(), make_msgid(domain="shop.example.com")
            mail["From"] = formataddr((it.name, it.sender))
            mail["To"], mail["Subject"] = ", ".join(it.to), it.subject
            mail.set_content(it.text + "\\n")
            mail.add_alternative(it.html, subtype="html")
            mail.add_attachment(it.content, maintype="application", subtype="pdf", filename=it.file)
            return mail
        """,
    "lib.py": """
        import smtplib, sys
        from common import context, it, make, mode, port
        connect = smtplib.SMTP if mode != "implicit" else lambda *a: smtplib.SMTP_SSL(*a, context=context)
        with connect("localhost", port) as client:
            if mode == "starttls":
                client.starttls(context=context)
            if mode != "plain":
                client.login("alice", "secret")
            if sys.argv[3:] != ["MIMEText"]:
                client.send_message(make())
            else:
                from mimetext import text
                client.sendmail(it.sender, it.to, text)
        """,
    # As tutorials write it: the name and the address are encoded together, and as_string() folds no header.
    "mimetext.py": """
        from email.mime.application import MIMEApplication
        from email.mime.multipart import MIMEMultipart
        from email.mime.text import MIMEText
        from email.utils import formatdate, make_msgid
        from common import it
        mail = MIMEMultipart()
        mail["Date"], mail["Message-ID"] = formatdate(), make_msgid(domain="shop.example.com")
        mail["From"], mail["To"], mail["Subject"] = f"{it.name} <{it.sender}>", ", ".join(it.to), it.subject
        texts = MIMEMultipart("alternative")
        texts.attach(MIMEText(it.text, "plain"))
        texts.attach(MIMEText(it.html, "html"))
        mail.attach(texts)
        file = MIMEApplication(it.content, "pdf")
        file.add_header("Content-Disposition", "attachment", filename=it.file)
        mail.attach(file)
        text = mail.as_string()
        """,
    "aio.py": """
        import asyncio
        import aiosmtplib
        from common import context, make, mode, port
        login = {} if mode == "plain" else {"username": "alice", "password": "secret"}
        asyncio.run(aiosmtplib.send(make(), hostname="localhost", port=port, use_tls=mode == "implicit",
            start_tls=mode == "starttls", tls_context=context if mode in ("starttls", "implicit") else None, **login))
        """,
    "dj.py": """
        from functools import cached_property
        from django.conf import settings
        from common import context, formataddr, it, mode, port
        settings.configure()
        from django.core.mail import EmailMultiAlternatives
        from django.core.mail.backends.smtp import EmailBackend
        class Backend(EmailBackend):
            @cached_property
            def ssl_context(self):
                return context
        login = {} if mode == "plain" else {"username": "alice", "password": "secret"}
        backend = Backend(host="localhost", port=port, use_tls=mode == "starttls", use_ssl=mode == "implicit", **login)
        mail = EmailMultiAlternatives(it.subject, it.text, f"{it.name} <{it.sender}>", it.to)
        mail.attach_alternative(it.html, "text/html")
        mail.attach(it.file, it.content, "application/pdf")
        assert backend.send_messages([mail]) == 1
        """,
    "fl.py": """
        from flask import Flask
        from flask_mail import Mail, Message
        from common import it, mode, port
        app = Flask("client")
        app.config.update(MAIL_SERVER="localhost", MAIL_PORT=port, MAIL_USE_TLS=mode == "starttls",
            MAIL_USE_SSL=mode == "implicit")
        if mode != "plain":
            app.config.update(MAIL_USERNAME="alice", MAIL_PASSWORD="secret")
        with app.app_context():
            mail = Message(it.subject, it.to, it.text, it.html, sender=(it.name, it.sender))
            mail.attach(it.file, "application/pdf", it.content)
            Mail(app).send(mail)
        """,
    "yag.py": """
        import yagmail
        from common import context, it, mode, port
        class Client(yagmail.SMTP):  # which takes its user for the sender
            def login(self):
                super().login()
                if mode != "plain":
                    self.smtp.login("alice", "secret")
        more = {"context": context} if mode == "implicit" else {}
        tls = {"context": context} if mode == "starttls" else False
        with Client({it.sender: it.name}, "", "localhost", port, tls, mode == "implicit", smtp_skip_login=True,
                **more) as client:
            client.send(it.to, it.subject, [it.text, it.html], [it.file],
                prettify_html=False)  # because prettifying drops all contents but the first
        """,
    "red.py": """
        import smtplib
        from redmail import EmailSender
        from common import context, formataddr, it, mode, port
        more = {"cls_smtp": smtplib.SMTP_SSL, "context": context} if mode == "implicit" else {}
        login = {} if mode == "plain" else {"username": "alice", "password": "secret"}
        EmailSender("localhost", port, use_starttls=mode == "starttls", **login, **more).send(it.subject,
            formataddr((it.name, it.sender)), it.to, text=it.text, html=it.html, attachments={it.file: it.content})
        """,
    "node.js": """
        const fs = require("fs");
        const [mode, port, pool] = process.argv.slice(2);
        const it = JSON.parse(fs.readFileSync("mail.json"));
        const auth = mode === "plain" ? undefined : { user: "alice", pass: "secret" };
        const mailer = require("nodemailer").createTransport({ host: "localhost", port: Number(port), auth,
          pool: pool === "pool", secure: mode === "implicit", requireTLS: mode === "starttls",
          ignoreTLS: mode === "plain" || mode === "auth", tls: { ca: fs.readFileSync("ca.pem") } });
        mailer.sendMail({ from: { name: it.name, address: it.sender }, to: it.to, subject: it.subject, text: it.text,
          html: it.html, attachments: [{ path: it.file }] })
          .then(() => mailer.close(), (error) => { console.error(error); process.exit(1); });
        """,
    "emailjs.mjs": """
        import fs from "fs";
        import { SMTPClient } from "emailjs";
        const [mode, port] = process.argv.slice(2);
        const it = JSON.parse(fs.readFileSync("mail.json"));
        const login = mode === "plain" ? {} : { user: "alice", password: "secret" };
        const tls = { ca: fs.readFileSync("ca.pem") };
        const client = new SMTPClient({ host: "localhost", port: Number(port), ...login,
          ssl: mode === "implicit" ? tls : false, tls: mode === "starttls" ? tls : false });
        await client.sendAsync({ from: `${it.name} <${it.sender}>`, to: it.to.join(", "), subject: it.subject,
          text: it.text, attachment: [{ data: it.html, alternative: true },
            { path: it.file, type: "application/pdf", name: it.file }] });
        """,
    "smtp.rb": """
        require "json"
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
          mail = JSON.parse(File.read("mail.json", encoding: "utf-8"))
          client.send_message(File.read("mail.eml"), mail["sender"], mail["to"])
        end
        """,
    "smtp.pl": """
        use Net::SMTP;
        my ($mode, $port) = @ARGV;
        my $smtp = Net::SMTP->new("localhost", Port => $port, Hello => "client.example.com", SSL => $mode eq "implicit",
            SSL_ca_file => "ca.pem") or die $@;
        $smtp->starttls(SSL_ca_file => "ca.pem") or die $smtp->message if $mode eq "starttls";
        $smtp->auth("alice", "secret") or die $smtp->message if $mode ne "plain";
        open my $json, "<", "mail.json" or die;
        my ($sender, @to) = @{JSON::PP::decode_json(join "", <$json>)}{"sender", "to"};
        open my $mail, "<", "mail.eml" or die;
        my @lines = <$mail>;
        $smtp->mail($sender) and $smtp->to(@{$to[0]}) and $smtp->data(@lines) or die $smtp->message;
        $smtp->quit;
        """,
    "muttrc": """
        set send_charset="utf-8" charset="utf-8" use_from=yes envelope_from=yes realname="Jörg Müller" copy=no
        set ssl_ca_certificates_file="ca.pem" certificate_file="ca.pem" ssl_force_tls=no
        set hostname="client.example.com" smtp_pass="secret" smtp_authenticators="plain"
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
        $it = json_decode(file_get_contents("mail.json"));
        $mail->setFrom($it->sender, $it->name);
        foreach ($it->to as $address) $mail->addAddress($address);
        $mail->isHTML();
        [$mail->Subject, $mail->Body, $mail->AltBody] = [$it->subject, $it->html, $it->text];
        $mail->addAttachment($it->file);
        $mail->send();
        """,
    "symfony.php": """
        <?php
        require "/usr/share/php/Symfony/Component/Mailer/autoload.php";
        [, $mode, $port] = $argv;
        $it = json_decode(file_get_contents("mail.json"));
        $mail = (new Symfony\\Component\\Mime\\Email())->subject($it->subject)->text($it->text)->html($it->html)
            ->from(new Symfony\\Component\\Mime\\Address($it->sender, $it->name))->to(...$it->to)
            ->attachFromPath($it->file);
        $transport = new Symfony\\Component\\Mailer\\Transport\\Smtp\\EsmtpTransport("localhost", (int) $port,
            $mode == "implicit");
        $transport->getStream()->setStreamOptions(["ssl" => ["cafile" => "ca.pem"]]);
        if ($mode != "plain") $transport->setUsername("alice")->setPassword("secret");
        $transport->send($mail);
        """,
    "client.go": """
        package main
        import ("crypto/tls"; "crypto/x509"; "encoding/json"; "net/smtp"; "os")
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
            var it struct { Sender string; To []string }
            text, _ := os.ReadFile("mail.json"); check(json.Unmarshal(text, &it))
            check(client.Mail(it.Sender))
            for _, address := range it.To { check(client.Rcpt(address)) }
            body, err := client.Data(); check(err)
            _, err = body.Write(mail); check(err); check(body.Close()); check(client.Quit())
        }
        """,
    "Client.java": """
        import java.nio.file.*;
        import java.util.Properties;
        import javax.activation.DataHandler;
        import javax.mail.*;
        import javax.mail.internet.*;
        import javax.mail.util.ByteArrayDataSource;
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
            Properties it = new Properties();
            it.load(Files.newBufferedReader(Paths.get("mail.properties")));
            MimeMessage mail = new MimeMessage(Session.getInstance(properties));
            mail.setFrom(new InternetAddress(it.getProperty("sender"), it.getProperty("name"), "UTF-8"));
            mail.setRecipients(Message.RecipientType.TO, it.getProperty("to"));
            mail.setSubject(it.getProperty("subject"), "UTF-8");
            mail.setSentDate(new java.util.Date());
            MimeBodyPart text = new MimeBodyPart(), html = new MimeBodyPart(), both = new MimeBodyPart();
            text.setText(it.getProperty("text"), "UTF-8");
            html.setText(it.getProperty("html"), "UTF-8", "html");
            both.setContent(new MimeMultipart("alternative", text, html));
            MimeBodyPart file = new MimeBodyPart();
            byte[] content = Files.readAllBytes(Paths.get("mail.pdf"));
            file.setDataHandler(new DataHandler(new ByteArrayDataSource(content, "application/pdf")));
            file.setFileName(it.getProperty("file"));
            mail.setContent(new MimeMultipart(both, file));
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
    people = ["--mail-from", MAIL["sender"], *(word for address in MAIL["to"] for word in ("--mail-rcpt", address))]
    return ["curl", "-sS", url, "--cacert", "ca.pem", *people, *login, *tls, "--upload-file", "mail.eml"]


def swaks(mode: str, port: int) -> list[str]:
    login = [] if mode == "plain" else "--auth PLAIN --auth-user alice --auth-password secret".split()
    tls = {"starttls": ["--tls"], "implicit": ["--tls-on-connect"]}.get(mode, [])
    verify = ["--tls-verify", "--tls-ca-path", "ca.pem"] if tls else []
    people = ["--from", MAIL["sender"], "--to", ",".join(MAIL["to"]), "--helo", "client.example.com"]
    where = ["--server", "localhost", "--port", str(port)]
    return ["swaks", *where, *people, *login, *tls, *verify, "--data", "@mail.eml"]


def msmtp(mode: str, port: int) -> list[str]:
    login = [] if mode == "plain" else ["--auth=plain", "--user=alice", "--passwordeval=echo secret"]
    tls = {"starttls": ["--tls=on"], "implicit": ["--tls=on", "--tls-starttls=off"]}.get(mode, ["--tls=off"])
    trust = ["--tls-trust-file=ca.pem"] if "--tls=on" in tls else []
    people = [f"--from={MAIL['sender']}", *MAIL["to"]]
    return ["msmtp", "--file=/dev/null", "--host=localhost", f"--port={port}", *login, *tls, *trust, *people]


def git(mode: str, port: int) -> list[str]:
    login = [] if mode == "plain" else ["--smtp-user=alice", "--smtp-pass=secret", "--smtp-auth=PLAIN"]
    tls = {"starttls": ["--smtp-encryption=tls"], "implicit": ["--smtp-encryption=ssl"]}.get(mode, [])
    where = ["--smtp-server=localhost", f"--smtp-server-port={port}", "--smtp-ssl-cert-path=ca.pem"]
    people = [f"--from={MAIL['name']} <{MAIL['sender']}>", *(f"--to={address}" for address in MAIL["to"])]
    how = ["--confirm=never", "--suppress-cc=all", "--quiet", "--no-validate", "--smtp-domain=client.example.com"]
    (folder / "0001.patch").write_text(MIME.partition("multipart/")[0] + PATCH, encoding="utf-8")
    return ["git", "send-email", *where, *people, *login, *tls, *how, "0001.patch"]


def mutt(mode: str, port: int) -> list[str]:
    scheme, user = "smtps" if mode == "implicit" else "smtp", "" if mode == "plain" else "alice@"
    options = [f"smtp_url={scheme}://{user}localhost:{port}", f"from={MAIL['sender']}"]
    options += [f"ssl_starttls={'yes' if mode == 'starttls' else 'no'}"]
    settings = [word for option in options for word in ("-e", f"set {option}")]
    return ["mutt", "-n", "-F", "muttrc", *settings, "-s", MAIL["subject"], "-a", MAIL["file"], "--", *MAIL["to"]]


def snail(mode: str, port: int) -> list[str]:
    scheme, login = "smtps" if mode == "implicit" else "smtp", "" if mode == "plain" else "alice:secret@"
    options = [
        "v15-compat",
        f"mta={scheme}://{login}localhost:{port}",
        "hostname=client.example.com",
        "sendcharsets=utf-8",
    ]
    options += ["smtp-auth=" + ("none" if mode == "plain" else "plain"), "tls-ca-file=ca.pem", "ttycharset=utf-8"]
    options += ["smtp-use-starttls"] if mode == "starttls" else []
    settings = [f"-S{option}" for option in [*options, f"from={MAIL['name']} <{MAIL['sender']}>"]]
    return ["s-nail", "-:/", *settings, "-s", MAIL["subject"], "-a", MAIL["file"], "-.", *MAIL["to"]]


def exim(mode: str, port: int) -> str:
    """Exim is no package that is installed, because Postfix is in its way."""
    home = folder / "exim-home"
    home.mkdir(exist_ok=True)
    shutil.chown(home, "nobody")
    program, authenticator = folder / "exim/usr/sbin/exim4", ["driver = plaintext", "public_name = PLAIN"]
    tls = (
        [f"tls_verify_certificates = {folder}/ca.pem"] if mode in ("starttls", "implicit") else ["hosts_avoid_tls = *"]
    )
    tls += {"starttls": ["hosts_require_tls = *"], "implicit": ["protocol = smtps"]}.get(mode, [])
    lines = ["primary_hostname = relay.example.com", f"spool_directory = {home}", f"log_file_path = {home}/%slog"]
    lines += ["exim_user = nobody", "exim_group = nogroup", "keep_environment =", f"exim_path = {program}"]
    lines += ["begin routers", "all:", "driver = manualroute", "transport = out", "route_list = * localhost byname"]
    lines += ["self = send", "begin transports", "out:", "driver = smtp", f"port = {port}", "allow_localhost", *tls]
    lines += [] if mode == "plain" else ["hosts_require_auth = *", "begin authenticators", "plain:", *authenticator]
    lines += [] if mode == "plain" else ["client_send = ^alice^secret"]
    (folder / "exim.conf").write_text("\n".join(lines) + "\n")
    command = [str(program), "-C", str(folder / "exim.conf"), "-odf", "-i", "-f", MAIL["sender"], *MAIL["to"]]
    return run(*command, text=MIME)


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
                content = MIME.encode()
                client.sendmail(MAIL["sender"], MAIL["to"], content, ["BODY=8BITMIME"], ["NOTIFY=FAILURE"])
            wait_until(lambda: (self.home / "log").read_text().count("status=") >= len(MAIL["to"]), 20)
        except Exception as error:
            raise RuntimeError((self.home / "log").read_text()) from error
        finally:
            subprocess.run(["postfix", "-c", etc, "stop"], capture_output=True, check=False)
            master.wait(30)
        if (self.home / "log").read_text().count("status=sent") != len(MAIL["to"]):
            raise RuntimeError("Postfix did not send it to all")


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
    codes: str = ""  #: expected in each mode: real faults; "?" marks one that depends on the machine's name
    parts: str = "text html file"  #: what it can send


def make_clients(python: str) -> list[Client]:
    def package(name: str) -> Callable[[], str]:
        return lambda: run(python, "-c", f"import importlib.metadata as m; print(m.version('{name}'))").strip()

    def script(*command: str) -> Callable[[str, int], object]:
        return lambda mode, port: run(python, command[0], mode, str(port), *command[1:])

    def node(*command: str) -> Callable[[str, int], object]:
        return lambda mode, port: run("node", command[0], mode, str(port), *command[1:])

    def npm(name: str) -> Callable[[], str]:
        return lambda: str(json.loads((folder / f"node_modules/{name}/package.json").read_text())["version"])

    def program(*command: str) -> Callable[[str, int], object]:
        return lambda mode, port: run(*command, mode, str(port))

    def debian(name: str) -> Callable[[], str]:
        return lambda: run("dpkg-query", "-W", "-f=${Version}", name)

    trust = "-Djavax.net.ssl.trustStore=ca.p12", "-Djavax.net.ssl.trustStorePassword=secret"
    python_version = lambda: sys.version.split()[0]  # noqa: E731
    return [
        Client("Python smtplib", python_version, script("lib.py"), "8bit-undeclared"),
        Client("smtplib, MIMEText", python_version, script("lib.py", "MIMEText"), "bad-address long-line"),
        Client("aiosmtplib", package("aiosmtplib"), script("aio.py"), "hello-not-fqdn?"),
        Client("Django", package("django"), script("dj.py"), "8bit-undeclared hello-not-fqdn?"),
        Client("Flask-Mail", package("flask-mail"), script("fl.py"), "long-line 8bit-undeclared"),
        Client("yagmail", package("yagmail"), script("yag.py"), "long-line"),
        Client("redmail", package("redmail"), script("red.py"), "8bit-undeclared"),
        Client("nodemailer", npm("nodemailer"), node("node.js"), "encoded-parameter"),
        Client("nodemailer, pooled", npm("nodemailer"), node("node.js", "pool"), "encoded-parameter"),
        Client(
            "emailjs",
            npm("emailjs"),
            node("emailjs.mjs"),
            "bare-lf long-line 8bit-in-7bit 8bit-undeclared encoded-parameter hello-not-fqdn?",
        ),
        Client(
            "Ruby net/smtp",
            lambda: run("ruby", "-e", "print RUBY_VERSION"),
            program("ruby", "smtp.rb"),
            "8bit-undeclared",
        ),
        Client("swaks", debian("swaks"), lambda mode, port: run(*swaks(mode, port)), "8bit-undeclared"),
        Client(
            "curl",
            lambda: run("curl", "--version").split()[1],
            lambda mode, port: run(*curl(mode, port)),
            "8bit-undeclared",
        ),
        Client(
            "msmtp",
            debian("msmtp"),
            lambda mode, port: run(*msmtp(mode, port), text=MIME),
            "8bit-undeclared hello-not-fqdn",
        ),
        Client(
            "PHPMailer",
            debian("libphp-phpmailer"),
            program("php", "mailer.php"),
            "8bit-undeclared encoded-parameter hello-not-fqdn?",
        ),
        Client("Symfony Mailer", debian("php-symfony-mailer"), program("php", "symfony.php"), "encoded-parameter"),
        Client(
            "Go net/smtp",
            lambda: run("go", "env", "GOVERSION").strip().removeprefix("go"),
            program("./client"),
            "hello-not-fqdn",
        ),
        Client(
            "JavaMail", debian("libmail-java"), program("java", *trust, "-cp", f"{JAVA}:.", "Client"), "hello-not-fqdn?"
        ),
        Client("Postfix", debian("postfix"), lambda mode, port: Postfix(mode, port).send()),
        Client("Exim", lambda: run(str(folder / "exim/usr/sbin/exim4"), "-bV").split()[2], exim, "8bit-undeclared"),
        Client(
            "Perl Net::SMTP",
            lambda: run("perl", "-MNet::SMTP", "-e", "print $Net::SMTP::VERSION"),
            program("perl", "-MJSON::PP", "smtp.pl"),
            "8bit-undeclared",
        ),
        Client(
            "git send-email", debian("git-email"), lambda mode, port: run(*git(mode, port)), "8bit-undeclared", "text"
        ),
        Client("mutt", debian("mutt"), lambda mode, port: run(*mutt(mode, port), text=MAIL["text"]), parts="text file"),
        Client(
            "s-nail", debian("s-nail"), lambda mode, port: run(*snail(mode, port), text=MAIL["text"]), parts="text file"
        ),
    ]


def install() -> str:
    """Fill the folder; returns the Python that has the packages."""
    missing = [name for name in DEBIAN.split() if not is_installed(name)]
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", *command], env=environment, stdout=subprocess.DEVNULL, check=True)
    subprocess.run(["apt-get", "download", "-qq", "exim4-daemon-light"], cwd=folder, check=True, capture_output=True)
    subprocess.run(["dpkg", "-x", *map(str, folder.glob("exim4*.deb")), str(folder / "exim")], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv/bin/python")
    run(python, "-m", "pip", "install", "-q", *PYPI.split(), timeout=300)
    run("npm", "install", "--silent", "--no-audit", "--prefix", str(folder), *NPM.split(), timeout=300)
    for name, text in PROGRAMS.items():
        (folder / name).write_text(textwrap.dedent(text).strip() + "\n", encoding="utf-8")
    (folder / "mail.eml").write_bytes(MIME.replace("\n", "\r\n").encode())
    (folder / "mail.json").write_text(json.dumps(MAIL), encoding="utf-8")
    lines = [f"{name} = {','.join(value) if name == 'to' else value}" for name, value in MAIL.items()]
    escaped = "\n".join(line.replace("\n", "\\n") for line in lines)
    (folder / "mail.properties").write_text(escaped, encoding="utf-8")
    for name in (MAIL["file"], "mail.pdf"):  # Java finds no umlauts in the locale C
        (folder / name).write_bytes(FILE)
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
    done = subprocess.run(["dpkg-query", "-W", "-f=${Status}", package], capture_output=True, check=False)
    return done.stdout.endswith(b" installed")  # and not removed, with its configuration left


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


def deliver(client: Client, mode: str, server: smtpmock.Server) -> tuple[str, smtpmock.Message]:
    """The mail, and how it went: the user, the mechanism and the version of TLS."""
    server.reset()
    server.on("*").delay(0.01)  # during which the server sees what a client sends too early
    try:
        client.send(mode, server.port)
        (message,) = server.wait_for_messages(1, 10, lambda message: message.is_consistent)
    except Exception as error:
        transcripts = [message.transcript for message in server.messages()]
        raise RuntimeError("\n".join([f"{type(error).__name__}: {error}", *transcripts])) from error
    expected: dict[str, object] = {
        "mail_from": MAIL["sender"],
        "rcpt_tos": MAIL["to"],
        "subject": MAIL["subject"],
        "text": MAIL["text"].splitlines(),
        "html": MAIL["html"].count("größer") * ("html" in client.parts),
        "attachments": [(MAIL["file"], FILE)] if "file" in client.parts else [],
        "auth_user": None if mode == "plain" else "alice",
        "auth": mode != "plain",
        "tls": mode in ("starttls", "implicit"),
    }
    found = {name: getattr(message, name) for name in expected}
    found |= {
        "rcpt_tos": sorted(message.rcpt_tos),
        # yagmail writes <br> between the lines, and the HTML behind the text.
        "text": (message.text or "").replace("<br>", "\n").splitlines()[:4],
        "html": (message.html or "").count("größer"),
        "attachments": [(attachment.name, attachment.content) for attachment in message.attachments],
        "tls": message.tls is not None,
    }
    if found != expected:
        wrong = {name: value for name, value in found.items() if value != expected[name]}
        raise RuntimeError(f"{wrong}\n{message.transcript}")
    return ", ".join(filter(None, (message.auth_mechanism, message.tls and message.tls[0]))) or "yes", message


def check_codes(client: Client, message: smtpmock.Message) -> None:
    found = [*message.violations, *message.warnings]
    codes = {violation.code for violation in found}
    expected = {code.rstrip("?"): code.endswith("?") for code in client.codes.split()}
    missing = {code for code, is_optional in expected.items() if not is_optional} - codes
    if missing or codes - expected.keys():
        lines = [f"{violation.severity}: {violation}" for violation in found]
        raise RuntimeError("\n".join([f"expected codes: {client.codes or 'none'}, found:", *lines]))


def name_codes(found: list[smtpmock.Violation]) -> str:
    return ", ".join(dict.fromkeys(violation.code for violation in found))


def print_table(*rows: Sequence[str]) -> None:
    for row in (rows[0], ("---",) * len(rows[0]), *rows[1:]):
        print(f"| {' | '.join(row)} |")
    print()


def main() -> int:
    codes: dict[tuple[str, ...], list[str]] = {}  # client, violations, warnings: the modes
    failures: list[str] = []
    try:
        clients = [client for client in make_clients(install()) if client.name in (sys.argv[1:] or [client.name])]
        rows = {client.name: [client.name, client.version()] for client in clients}
        for mode in MODES:
            with smtpmock.Server(**options(mode)) as server:
                for client in clients:
                    try:
                        outcome, message = deliver(client, mode, server)
                        key = client.name, name_codes(message.violations), name_codes(message.warnings)
                        codes.setdefault(key, []).append(mode)
                        check_codes(client, message)
                    except RuntimeError as error:
                        outcome = "FAILED"
                        failures.append(f"{client.name}, {mode}: FAILED: {error}")
                    rows[client.name].append(outcome)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_table(("client", "version", "plain", "AUTH", "STARTTLS, AUTH", "implicit TLS, AUTH"), *rows.values())
    found = [(*key, "all" if len(modes) == len(MODES) else ", ".join(modes)) for key, modes in codes.items()]
    found.sort(key=lambda row: list(rows).index(row[0]))
    print_table(("client", "violations", "warnings", "modes"), *found)
    print(*failures, sep="\n\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
