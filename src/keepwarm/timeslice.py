"""Asks the kernel for short turns on a core, since a gateway works little and often.

The engine's threads fill every core. Whoever wakes beside them may wait until one has had its turn
(1.4 ms on two cores), unless it asks for a shorter turn itself: Linux 6.12 and newer then let it
run at once, and give it no more of the core in all. That takes no privilege. Elsewhere nothing
happens. See docs/decisions/0015-quiet-engine.md.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

# The shortest turn is 0.1 ms; a request's way in takes half a millisecond in all.
_TURN_NS = 200_000
# sched_setattr(2); glibc has no wrapper before 2.41.
_SYSCALLS = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
# Not for the children: an engine in short turns would only be switched more often.
_RESET_ON_FORK = 0x01


def ask_for_short_turns() -> bool:
    """Ask for the calling thread. Says whether the kernel took it."""
    number = _SYSCALLS.get(platform.machine())
    if sys.platform != "linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period
    attributes = struct.pack(
        "IIQiIQQQ", 48, os.SCHED_OTHER, _RESET_ON_FORK, nice, 0, _TURN_NS, 0, 0
    )
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(number, 0, ctypes.create_string_buffer(attributes), 0)) == 0
