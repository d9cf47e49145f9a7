"""Reads every attribute of mails made at random, with warnings as errors: python .ci/fuzz.py [MAILS [FIRST_SEED]]."""

import functools
import random
import sys
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_smtpmock as tests


def main(count: int = 20_000, first: int = 1_000_000) -> int:
    warnings.simplefilter("error")
    failures = 0
    for seed in range(first, first + count):
        message = tests.receive_content(tests.make_mail(random.Random(seed)) + b"\r\n")
        try:
            tests.call_deep(seed % 2 * 500, functools.partial(tests.ask_all, message))
        except Exception:
            failures += 1
            print(f"BUG the mail of seed {seed}: {message.content[:300]!r}")
            traceback.print_exc(limit=-3)
    print(f"{count} mails, {failures} of them raise")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
