"""Send a mail to the smtpmock that the current folder or environment has: in process, and as `python -m smtpmock`."""

import os
import signal
import smtplib
import subprocess
import sys

sys.path.insert(0, os.getcwd())  # not the folder of this script

import smtpmock

with smtpmock.Server() as server, smtplib.SMTP(server.host, server.port, timeout=10) as client:
    client.sendmail("alice@example.com", ["bob@example.com"], "Subject: Hi\r\n\r\nHello")
    (message,) = server.messages()
assert message.content == b"Subject: Hi\r\n\r\nHello\r\n", message

with subprocess.Popen([sys.executable, "-m", "smtpmock", "-log"], stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    port = int(process.stdout.readline().rpartition(":")[2])
    with smtplib.SMTP("127.0.0.1", port, timeout=10) as client:
        client.sendmail("alice@example.com", ["bob@example.com"], "Subject: Hi\r\n\r\nHello")
    process.send_signal(signal.SIGTERM)
    log = process.stdout.read()
assert process.returncode == 0, process.returncode
assert "SMTP request: message binary data portion" in log, log
print(f"{smtpmock.__file__}: a mail in process and one by the command line")
