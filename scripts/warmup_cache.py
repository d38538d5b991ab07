#!/usr/bin/env python3
"""Pre-warm the prompt cache of a running llama-server or Keepwarm: `keepwarm warmup` as a script.

For a service that has started, for example as `ExecStartPost=` of a systemd unit:

    warmup_cache.py --upstream http://127.0.0.1:8080 --slot-dir /run/llama-server/slots

Exit status 0 only when every tier is proved warm.
"""

from __future__ import annotations

import sys

import typer

from keepwarm.cli.output import fail
from keepwarm.cli.warmup import warmup
from keepwarm.errors import KeepwarmError

if __name__ == "__main__":
    try:
        typer.run(warmup)
    except KeepwarmError as error:
        fail(str(error))
        sys.exit(1)
