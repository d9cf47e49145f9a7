"""A user's program, for mypy --strict and pyright: neither may report anything.

A line that ends in "type: ignore" has an error that both must find; with --warn-unused-ignores and
reportUnnecessaryTypeIgnoreComment, it is itself an error if one of them does not.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import dataclasses
import logging
import re
import ssl
from collections.abc import Iterator

import smtpmock
from smtpmock import Action, Configuration, Message, Server


class Vrfy(smtpmock.Handler):
    verbs = ("VRFY",)
    received = "252 Maybe"


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info_activity(self, message: str) -> None:
        self.lines.append(message)

    info = warning = error = info_activity


def collect(message: Message) -> None:
    assert message.mail_from is not None and message.mail_from.endswith("@example.com")


def allow(mechanism: str, user: str, secret: str) -> bool:
    return (mechanism, user, secret) == ("PLAIN", "user", "secret")


# Every way to give options.
options = Configuration(port=2525, not_registered_emails=["a@example.com"], session_timeout=0.5, msg_greeting="220 Hi")
number: int = dataclasses.replace(options, port=0).port
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server: Server = Server(options, port=0, on_message=collect, logger=logging.getLogger("smtp"), handlers=[Vrfy])
Server(logger=Log(), auth_users=allow, ssl_context=context, extensions=("SIZE", "DSN"), seed=7)
Server(auth_users={"user": "secret"}, on_message=lambda message: message.subject).with_logger(Log())
server.configure(multiple_rcptto=True, on_message=None)
Server(keep_all=True, auth_users="*", ssl_context="test").on("connect", skip=2, times=1).drop()
trusting: ssl.SSLContext = Server(ssl_context="wrong host").client_context()
subjects: list[str | None] = [message.subject for message in (*server.outbox, *server.sessions())]
server.configure(Configuration(fail_fast=True), msg_noop_received="250 Fine")
server.disconnect(reset=True)
address: str = server.url


# Errors in a name, and in a type.
Configuration(prot=25)  # type: ignore
Configuration(port="25")  # type: ignore
Configuration(25)  # type: ignore
Server(prot=25)  # type: ignore
Server(port="25")  # type: ignore
Server(25)  # type: ignore
Server(on_message=25)  # type: ignore
Server(handlers=[Log])  # type: ignore
Server(logger=print)  # type: ignore
Server(auth_users=["user"])  # type: ignore
Server(ssl_context="tset")  # type: ignore
server.on("connect", skip=None)  # type: ignore
server.configure(multiple_rcptto=1)  # type: ignore
server.configure(multiple_rcpto=True)  # type: ignore
server.configure(port=25)  # type: ignore
server.disconnect(reset="yes")  # type: ignore
server.on("RCPT", time=2)  # type: ignore
server.on("RCPT", times="2")  # type: ignore
Action(replay="450 later")  # type: ignore
options.port = 25  # type: ignore
Action(then="closed")  # type: ignore
server.fail_fast = True  # type: ignore
print(server.outbox[0].to)  # type: ignore


# The rest of what a test uses.
rule: smtpmock.Rule = server.on("RCPT", "bob@example.com", times=2).reply("450 later", None).delay(0.1)
server.on("MAIL", re.compile("SIZE=")).close()
server.on("DATA", lambda line: line == "DATA").drop()


@server.on("message")
def quota(request: str, message: Message) -> Action | str | None:
    return Action("452 Full", then="close") if len(message.rcpt_tos) > 1 else None


hits: int = quota.hits


def smtp_server() -> Iterator[Server]:
    with Server(multiple_message_receiving=True) as running:
        yield running
        running.check()


def read(server: Server) -> list[str]:
    message: Message = server.message(lambda message: message.subject == "Hi", timeout=1)
    subjects: list[str | None] = [message.subject for message in server.wait_for_messages(2, timeout=1)]
    return [message.mail_from or "", *message.rcpt_tos, *filter(None, subjects)]
