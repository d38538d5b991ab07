"""What a report says of the machine and the model."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from keepwarm.bench.results import MachineRecord
from keepwarm.engine.gguf_header import read_model


def machine() -> MachineRecord:
    """The machine this runs on, with how busy it was: runnable processes, one-minute mean."""
    return MachineRecord(
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        load=round(os.getloadavg()[0], 2),
    )


def _processor() -> str:
    """The processor's name where Linux tells it, else the platform's word."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_model(path: Path) -> str:
    """A model's file and size, for people: many files call themselves something else inside."""
    model = read_model(path.expanduser())
    return f"{path.name}, {model.size_bytes / 1e6:,.0f} MB"
