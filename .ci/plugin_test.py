"""The pytest plugin, with the pytest that runs this: installed if smtpmock is, or else as a copy beside the tests.

.ci/plugin runs it. Each test writes tests of a user and runs them in another process.
"""

import importlib.metadata
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

IS_INSTALLED = any(plugin.name == "smtpmock" for plugin in importlib.metadata.entry_points(group="pytest11"))
MODULE = Path(__file__).parent.parent / "smtpmock.py"
FLAGS = "-W", "error", "--strict-markers", "-p", "no:cacheprovider"
HEAD = """
    import smtplib
    import pytest, smtpmock

    def connect(server):
        return smtplib.SMTP(server.host, server.port, timeout=10)

    def send(server, *recipients):
        with connect(server) as client:
            client.sendmail("a@example.com", recipients or ["b@example.com"], "Subject: hi\\n\\nHello")
"""


@pytest.fixture
def run(pytester: Any) -> Any:
    """Run tests, and compare the numbers of their outcomes. Returns the lines of the report for fnmatch_lines()."""
    if not IS_INSTALLED:
        pytester.path.joinpath("smtpmock.py").write_bytes(MODULE.read_bytes())
        # The import comes before pytest does its own, which must give no warning.
        pytester.makeconftest("import smtpmock\npytest_plugins = ['smtpmock']")

    def run(tests: str, *flags: str, **outcomes: int) -> Any:
        pytester.makepyfile(textwrap.dedent(HEAD) + textwrap.dedent(tests))
        result = pytester.runpytest_subprocess(*FLAGS, *flags)
        result.assert_outcomes(**outcomes)
        return result.stdout

    return run


SERIES = """
    ports = set()

    @pytest.mark.parametrize("number", range(8))
    def test_series(smtp_server, number):
        assert smtp_server.messages() == []
        send(smtp_server, "b@example.com", "c@example.com")
        with connect(smtp_server) as client:
            for _ in range(2):
                client.sendmail("a@example.com", ["d@example.com"], "hi")
        recipients = [message.rcpt_tos for message in smtp_server.messages()]
        assert recipients == [["b@example.com", "c@example.com"], ["d@example.com"], ["d@example.com"]]
        ports.add(smtp_server.port)
        assert len(ports) == 1
"""


@pytest.mark.parametrize("flags", [(), ("-p", "no:randomly"), ("-n", "2"), ("-p", "no:xdist", "-p", "no:randomly")])
def test_one_server_is_empty_for_each_test_and_keeps_everything(run: Any, flags: Any) -> None:
    run(SERIES, *flags, passed=8)


def test_a_mark_configures_the_server_for_one_test(run: Any) -> None:
    run(
        """
        pytestmark = pytest.mark.smtp_server(msg_greeting="220 module", msg_quit_cmd="221 module")

        def ask(server):
            with smtplib.SMTP(timeout=10) as client:
                return client.connect(server.host, server.port)[1], client.docmd("NOOP")[1], client.quit()[1]

        @pytest.mark.smtp_server(msg_greeting="220 function", msg_noop_received="250 function")
        def test_nearest(smtp_server):
            assert ask(smtp_server) == (b"function", b"function", b"module")

        def test_module(smtp_server):
            assert ask(smtp_server) == (b"module", b"Ok", b"module")

        @pytest.mark.smtp_server(auth_users={"bob": "secret"}, fail_fast=True)
        def test_login(smtp_server):
            with connect(smtp_server) as client:
                client.login("bob", "secret")
                assert client.docmd("FOO")[0] == 502
                with pytest.raises(smtplib.SMTPServerDisconnected):
                    client.noop()

        def test_no_login(smtp_server):
            with connect(smtp_server) as client, pytest.raises(smtplib.SMTPNotSupportedError):
                client.login("bob", "secret")
        """,
        passed=4,
    )


def test_marks_with_tls(run: Any) -> None:
    run(
        """
        CLIENT = smtpmock.Server(ssl_context="test").client_context()

        @pytest.mark.smtp_server(ssl_context="test")
        class TestTls:
            def test_starttls(self, smtp_server):
                with connect(smtp_server) as client:
                    client.starttls(context=CLIENT)
                    client.sendmail("a@example.com", ["b@example.com"], "Hello")
                assert smtp_server.message().tls

            @pytest.mark.smtp_server(implicit_tls=True)  # which needs the option of the class
            def test_implicit(self, smtp_server):
                with smtplib.SMTP_SSL(smtp_server.host, smtp_server.port, timeout=10, context=CLIENT) as client:
                    client.sendmail("a@example.com", ["b@example.com"], "Hello")
                assert smtp_server.message().tls

        def test_plain(smtp_server):
            with connect(smtp_server) as client:
                client.ehlo()
                assert not client.has_extn("starttls")
        """,
        passed=3,
    )


def test_a_bad_mark_fails_its_test_alone(run: Any) -> None:
    report = run(
        """
        @pytest.mark.smtp_server(multiple_rcpto=True)
        def test_unknown(smtp_server):
            pass

        @pytest.mark.smtp_server(session_timeout="long")
        def test_type(smtp_server):
            pass

        @pytest.mark.smtp_server(port=25)
        def test_port(smtp_server):
            pass

        @pytest.mark.smtp_server("fail_fast")
        def test_position(smtp_server):
            pass

        @pytest.mark.smtp_server(fail_fast=True)
        def test_without_effect(shared_smtp_server):
            pass

        @pytest.fixture(scope="session")
        def app(smtp_server):
            pass

        def test_scope(app):
            pass

        def test_good(smtp_server):
            send(smtp_server)
        """,
        "-p",
        "no:randomly",
        passed=1,
        errors=6,
    )
    report.fnmatch_lines(
        [
            "E *ConfigurationError: pytest.mark.smtp_server: multiple_rcpto=True: *; did you mean multiple_rcptto?",
            "E *ConfigurationError: pytest.mark.smtp_server: session_timeout='long': must be a number of seconds*",
            "E *ConfigurationError: pytest.mark.smtp_server: port=25: *",
            "E *ConfigurationError: pytest.mark.smtp_server: 'fail_fast' must be an option by its name",
            "E *ConfigurationError: pytest.mark.smtp_server has no effect in a test without the fixture smtp_server",
            "a fixture with a larger scope uses shared_smtp_server",
        ]
    )


def test_the_report_of_a_failed_test_shows_the_sessions(run: Any) -> None:
    report = run(
        """
        def test_failed(smtp_server):
            smtp_server.on("RCPT", "c@example.com").reply("550 No such user")
            send(smtp_server, "b@example.com", "c@example.com")
            client = connect(smtp_server)
            client.ehlo("open.example.com")
            assert smtp_server.messages() == []

        def test_passed(smtp_server):
            with connect(smtp_server) as client:
                client.ehlo("passed.example.com")
        """,
        "-p",
        "no:randomly",
        "-rA",
        failed=1,
        passed=1,
    )
    report.fnmatch_lines(
        [
            "*- Captured smtp_server call -*",
            "<Message 1 from 'a@example.com' to *",
            "S: 220 Welcome",
            "C: rcpt *:<c@example.com>",
            "S: 550 No such user",
            "C: QUIT",
            "S: 221 *",
            "",
            "a session is open:",
            "S: 220 Welcome",
            "C: ehlo open.example.com",
        ]
    )
    assert "passed.example.com" not in report.str()
    assert report.str().count("Captured smtp_server") == 1


def test_the_report_shows_the_last_sessions_and_what_ended_early(run: Any) -> None:
    report = run(
        """
        import socket

        def probe(server):
            with socket.create_connection((server.host, server.port), timeout=10) as client:
                client.recv(100)

        def test_probed(smtp_server):
            probe(smtp_server)

        def test_no_session(smtp_server):
            assert 0

        def test_many(smtp_server):
            for number in range(20):
                send(smtp_server, f"{number}@example.com")
            with connect(smtp_server) as client:
                pass
            probe(smtp_server)
            smtp_server.disconnect()  # waits for the end of that session
            assert 0
        """,
        "-p",
        "no:randomly",
        passed=1,
        failed=2,
    )
    report.fnmatch_lines(["*- Captured smtp_server call -*", "no session", "*- Captured smtp_server call -*"])
    report.fnmatch_lines(["22 messages or sessions, the last 10:", "", "<Message 14 *", "a connection ended early: *"])
    assert report.str().count("C: data") == 8
    assert report.str().count("a connection ended early") == 1


def test_the_report_of_a_failed_fixture_shows_them_once(run: Any) -> None:
    report = run(
        """
        @pytest.fixture
        def before(smtp_server):
            send(smtp_server)
            assert 0, "before"

        @pytest.fixture
        def after(smtp_server):
            yield
            assert 0, "after"

        @pytest.fixture
        def last():
            yield
            assert 0, "last"

        def test_setup(before):
            pass

        def test_teardown(after, smtp_server):
            send(smtp_server)

        def test_teardown_after_the_server(last, smtp_server):
            send(smtp_server)

        def test_both(after, smtp_server):
            send(smtp_server)
            assert 0, "both"
        """,
        "-p",
        "no:randomly",
        passed=2,
        failed=1,
        errors=4,
    )
    text = report.str()
    assert text.count("Captured smtp_server setup") == 1
    assert text.count("Captured smtp_server teardown") == 2
    assert text.count("Captured smtp_server call") == 2  # in the reports of both failures of one test
    assert text.count("C: QUIT") == 5


def test_check_is_called_after_a_test_that_passed(run: Any) -> None:
    report = run(
        """
        import unittest

        def test_passed(smtp_server):
            smtp_server.on("QUIT").reply("221 Bye")
            send(smtp_server)

        def test_never_hit(smtp_server):
            smtp_server.on("VRFY").reply("252 Perhaps")
            send(smtp_server)

        def test_failed(smtp_server):
            smtp_server.on("VRFY").reply("252 Perhaps")
            raise ValueError("its own")

        @pytest.mark.xfail(raises=AssertionError, strict=True)
        def test_xfail(smtp_server):
            smtp_server.on("VRFY").reply("252 Perhaps")

        def test_skipped(smtp_server):
            smtp_server.on("VRFY").reply("252 Perhaps")
            pytest.skip("not today")

        @pytest.mark.usefixtures("smtp_server")
        class Test(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def server(self, smtp_server):
                self.server = smtp_server
                smtp_server.on("VRFY").reply("252 Perhaps")

            def test_unittest_failed(self):
                send(self.server)
                raise ValueError("its own, too")

            def test_unittest_never_hit(self):
                pass

            def test_unittest_skipped(self):
                self.skipTest("neither")

        def test_without_a_server():
            pass
        """,
        "-p",
        "no:randomly",
        passed=2,
        failed=4,
        skipped=2,
        xfailed=1,
    )
    report.fnmatch_lines(["E *AssertionError: *VRFY*was never hit*"])
    report.fnmatch_lines(["E *ValueError: its own", "E *ValueError: its own, too"])
    assert sum(line.startswith("E ") and "was never hit" in line for line in report.lines) == 2


def test_an_open_session_of_the_last_test_leaves_nothing_to_the_next(run: Any) -> None:
    run(
        """
        clients = []

        def test_opens(smtp_server):
            clients.append(connect(smtp_server))
            clients[0].ehlo()
            clients[0].mail("a@example.com")
            smtp_server.on("NOOP").reply("250 Rule")
            clients[0].noop()

        def test_next(smtp_server):
            assert smtp_server.messages() == []
            with pytest.raises(smtplib.SMTPServerDisconnected):
                clients[0].rcpt("b@example.com")
            clients[0].close()
            with connect(smtp_server) as client:
                assert client.noop()[1] == b"Ok"
            assert len(smtp_server.messages()) == 1
        """,
        "-p",
        "no:randomly",
        passed=2,
    )


def test_a_server_that_a_test_stopped_runs_in_the_next(run: Any) -> None:
    run(
        """
        def test_stops(smtp_server):
            send(smtp_server)
            smtp_server.stop()
            with pytest.raises(OSError):
                connect(smtp_server)

        def test_next(smtp_server):
            send(smtp_server)

        def test_stops_last(smtp_server):
            smtp_server.stop()
        """,
        "-p",
        "no:randomly",
        passed=3,
    )


def test_fixtures_of_any_scope_and_order_can_use_it(run: Any) -> None:
    run(
        """
        @pytest.fixture(scope="session")
        def application(shared_smtp_server):
            send(shared_smtp_server)
            return shared_smtp_server.host, shared_smtp_server.port

        @pytest.fixture
        def pool(smtp_server):
            with connect(smtp_server) as client:
                yield client

        def test_empty(application, smtp_server):
            assert application == (smtp_server.host, smtp_server.port)
            assert smtp_server.messages() == []

        def test_closed_by_its_fixture(pool):
            pool.ehlo()

        def test_dynamic(request):
            server = request.getfixturevalue("smtp_server")
            send(server)
            assert len(server.messages()) == 1
        """,
        passed=3,
    )


def test_an_exception_in_user_code_fails_the_test(run: Any) -> None:
    report = run(
        """
        def test_callback(smtp_server):
            @smtp_server.on("MAIL")
            def quota(request, message):
                raise LookupError("quota")

            with pytest.raises(smtplib.SMTPSenderRefused):
                send(smtp_server)
        """,
        "-W",
        "ignore::pytest.PytestUnhandledThreadExceptionWarning",
        failed=1,
    )
    report.fnmatch_lines(["E *AssertionError: *LookupError: quota*"])


def test_what_pytest_lists(run: Any, pytester: Any) -> None:
    run(SERIES, passed=8)
    fixtures = pytester.runpytest_subprocess("--fixtures").stdout
    fixtures.fnmatch_lines(["shared_smtp_server [[]session scope[]]*", "smtp_server*", "*A running smtpmock.Server*"])
    pytester.runpytest_subprocess("--markers").stdout.fnmatch_lines(["@pytest.mark.smtp_server([*][*]options): *"])
    if IS_INSTALLED:
        result = pytester.runpytest_subprocess("-p", "no:smtpmock")
        assert result.ret != 0
        assert "fixture 'smtp_server' not found" in result.stdout.str()
