"""Loaded by a gateway of the campaign: its wall clock is off by the seconds in a file."""

import os
import time
from pathlib import Path

_real = time.time


def _off_s() -> float:
    try:
        return float(Path(os.environ["CAMPAIGN_CLOCK"]).read_text())
    except (KeyError, OSError, ValueError):
        return 0.0


time.time = lambda: _real() + _off_s()
