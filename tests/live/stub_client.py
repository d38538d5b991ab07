"""Stands in for a client of `keepwarm run`: tells how it was started, asks once, and ends as told.

The first argument is a mode: `ask` sends one request and ends with status 7, `wait` waits for a
signal and ends with 40 and its number. What it saw goes to the file named by STUB_REPORT.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import urllib.request
from pathlib import Path


def address() -> str:
    """Where this client was told to ask, whichever it is."""
    environment = os.environ
    said = [environment.get(name, "") for name in ("ANTHROPIC_BASE_URL", "OPENAI_BASE_URL")]
    said += [environment.get("OPENAI_API_BASE", ""), environment.get("OPENCODE_CONFIG_CONTENT", "")]
    said += sys.argv
    files = [Path(argument) for argument in sys.argv if argument.endswith(".ts")]
    if "HERMES_HOME" in environment:
        files.append(Path(environment["HERMES_HOME"]) / "config.yaml")
    said += [file.read_text() for file in files]
    match = re.search(r"http://127\.0\.0\.1:\d+", "\n".join(said))
    assert match, said
    return match[0]


def ask(base: str) -> None:
    body = {
        "model": "local",
        "max_tokens": 2,
        "messages": [
            {"role": "system", "content": "You are terse. Name the disk. " * 30},
            {"role": "user", "content": "Is it there?"},
        ],
    }
    request = urllib.request.Request(
        f"{base}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        json.load(reply)


def main() -> None:
    base = address()
    report = Path(os.environ["STUB_REPORT"])

    def write(**more: object) -> None:
        told = {"argv": sys.argv[1:], "base": base, "environment": dict(os.environ), **more}
        report.write_text(json.dumps(told))

    if "wait" in sys.argv:

        def end(number: int, _: object) -> None:
            write(signal=number)
            os._exit(40 + number)

        signal.signal(signal.SIGINT, end)
        signal.signal(signal.SIGTERM, end)
        write(signal=None)
        time.sleep(60)
    ask(base)
    write(signal=None)
    sys.exit(7)


main()
