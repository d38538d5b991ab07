"""Short turns on a core, where the kernel gives them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import subprocess, sys
from keepwarm.timeslice import ask_for_short_turns
taken = ask_for_short_turns()
own = open("/proc/self/sched").read()
child = subprocess.run(["cat", "/proc/self/sched"], capture_output=True, text=True).stdout
print(taken, "|", own, "|", child)
"""


def _release() -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return tuple(map(int, found.groups())) if found else (0,)


def _slice_ns(sched: str) -> int:
    found = re.search(r"se\.slice\s*:\s*(\d+)", sched)
    assert found
    return int(found[1])


@pytest.mark.skipif(
    not Path("/proc/self/sched").exists() or _release() < (6, 12),
    reason="this kernel has no turns of a thread's own, or doesn't tell",
)
def test_the_gateway_gets_shorter_turns_and_what_it_starts_does_not() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    taken, own, child = run.stdout.split("|")
    if taken.strip() != "True":
        pytest.skip("this machine refuses the call")
    assert _slice_ns(own) == 200_000
    assert _slice_ns(child) > 200_000
