"""Replay the recorded sessions of ../shared/parity, with the arguments of its own script.

That script reads one reply per line that it sends, and one before the first. A case that expects
more, as the end of the connection after the last reply, can pass for no server: such a case gets
another line to send, so that what it expects is read, and is told here.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

folder = Path("../shared/parity")
cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
for case in cases:
    missing = len(case["replies"]) - len(case["send"]) - 1
    if missing > 0:
        case["send"] += ["NOOP"] * missing
        print(f"{case['name']}: {missing} more line sent, to read all of {case['replies']}")
with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
    json.dump(cases, file)
    file.flush()
    command = [sys.executable, str(folder / "replay.py"), file.name, *sys.argv[1:]]
    sys.exit(subprocess.run(command, check=False).returncode)
