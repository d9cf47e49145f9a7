"""Measures how soon python -m smtpmock -port=0 listens, compared to importing what such a command imports anyway.

python .ci/start.py [ROUNDS]: interleaved, best of the rounds, with bytecode in a folder that is removed again. The exit
status is 1 if the ratio is over the limit.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1.45  # 1.0 on Python 3.11, 1.35 on 3.13: typing is imported, because Logger is a Protocol
FLOOR = "import socketserver, argparse"
COMMAND = ("-m", "smtpmock", "-port=0")
ROOT = Path(__file__).resolve().parent.parent


def measure(*arguments: str, environment: dict[str, str]) -> float:
    """Milliseconds until it prints a line, or ends."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        passed = time.perf_counter() - started
        process.kill()
    return passed * 1000


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = folder
        times = [
            (measure("-c", FLOOR, environment=environment), measure(*COMMAND, environment=environment))
            for _ in range(rounds + 1)
        ][1:]  # the first one compiles
    floor, listening = (min(column) for column in zip(*times, strict=True))
    print(f"Python {sys.version.split()[0]}: {FLOOR!r} {floor:.1f} ms, {' '.join(COMMAND)} {listening:.1f} ms")
    print(f"ratio {listening / floor:.2f}, at most {LIMIT}")
    return int(listening > floor * LIMIT)


if __name__ == "__main__":
    sys.exit(main())
