"""How curl and swaks react to failures that rules cause: python .ci/faults.py

It needs curl and swaks. Each case is a rule of the command line and, for each client, the expected exit status and a
part of its output. A server that plays this output makes the client fail in the same way.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smtpmock

ANY = 999  # it depends on timing whether the client fails when it writes or when it reads

CASES = {
    "connect: reply 421 Too busy; close": ((8, "421"), (21, "421 Too busy")),
    "RCPT: reply 450 4.2.0 Greylisted": ((55, "RCPT failed: 450"), (24, "450 4.2.0 Greylisted")),
    "DATA: reply 552 Too much": ((55, "DATA failed: 552"), (25, "552 Too much")),
    "message: reply 552 Too much": ((8, "552"), (26, "552 Too much")),
    "message: drop; after=100000": ((ANY, "curl: (5"), (ANY, "")),
    "message: reset; after=100000": ((55, "failure"), (ANY, "")),
    "MAIL: silence": ((28, "timed out"), (23, "Timeout")),
    "RCPT: drop": ((56, "reading failed"), (ANY, "closed connection unexpectedly")),
    "NOOP: drop": ((0, ""), (0, "")),  # neither client sends it, so the mail arrives
}


def commands(port: int, mail: str) -> list[list[str]]:
    curl = f"curl -sSv --max-time 2 smtp://127.0.0.1:{port}/a.example.com --mail-from a@example.com"
    swaks = f"swaks --server 127.0.0.1:{port} --timeout 2 --helo a.example.com --from a@example.com --to b@example.com"
    return [
        [*curl.split(), "--mail-rcpt", "b@example.com", "--upload-file", mail],
        [*swaks.split(), "--data", f"@{mail}"],
    ]


def run(server: smtpmock.Server, index: int, mail: str) -> tuple[int, str]:
    """The exit status of a client, and its output."""
    command = commands(server.port, mail)[index]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=60)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def check(rule: str, expected: tuple[tuple[int, str], ...], mail: str) -> list[str]:
    failures = []
    for index, (status, text) in enumerate(expected):
        with smtpmock.Server() as server:
            smtpmock._add_rule(server, rule)
            found, output = run(server, index, mail)
        messages = server.messages()
        accepted = [message.is_consistent for message in messages]
        said = [line for line in output.splitlines() if text in line]
        right = status in (found, ANY) and said and (status == 0) == any(accepted)
        if "after=" in rule:
            right = right and [len(message.content) for message in messages] == [100000]
        elif "silence" not in rule:  # of which no log tells
            with smtpmock.Server() as server:
                server.play(output)
                again, repeated = run(server, index, mail)
            right = right and again == found and text in repeated
        client = commands(0, mail)[index][0]
        outcome = f"{'ok' if right else 'FAILED':6} {rule:36} {client:5} exit {found}"
        print(f"{outcome}  {said[-1] if said else ''}")
        if not right:
            failures.append(f"{rule}, {client}: {found}, {accepted}\n{output[-4000:]}")
    return failures


def main() -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".eml") as file:
        file.write("Subject: hi\r\n\r\n" + ("x" * 70 + "\r\n") * 100_000)
        file.flush()
        failures = [failure for rule, expected in CASES.items() for failure in check(rule, expected, file.name)]
    print(*failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
