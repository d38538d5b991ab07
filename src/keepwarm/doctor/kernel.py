"""What Linux says of processes and file systems. Elsewhere everything here is None, and said so."""

from __future__ import annotations

import os
import re
import secrets
import time
from pathlib import Path

from keepwarm.doctor.facts import DiskFacts

PROC = Path("/proc")
# Enough to see a disk's speed, little enough to be written in a moment.
_MEASURED_BYTES = 8 << 20
_ESCAPE = re.compile(r"\\([0-7]{3})")


def listening_pid(port: int, proc: Path = PROC) -> int | None:
    """The process that listens on a TCP port here, if it may be seen."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        for line in _lines(proc / "net" / table)[1:]:
            fields = line.split()
            # Local address as HEX:PORT; state 0A is LISTEN.
            if len(fields) > 9 and fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for folder in proc.glob("[0-9]*"):
        try:
            if any(str(link.readlink()) in inodes for link in (folder / "fd").iterdir()):
                return int(folder.name)
        except OSError:
            continue  # another user's, or gone
    return None


def command_line(pid: int, proc: Path = PROC) -> list[str] | None:
    """A process's arguments, None if they can't be seen."""
    try:
        raw = (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    return [os.fsdecode(word) for word in raw.split(b"\0")[:-1]] or None


def swapped_bytes(pid: int, proc: Path = PROC) -> int | None:
    """Bytes of a process that are in swap."""
    for line in _lines(proc / str(pid) / "status"):
        if line.startswith("VmSwap:"):
            return int(line.split()[1]) * 1024
    return None


def usable_cores(proc: Path = PROC, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: by its affinity and by its control group's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        folder = cgroup / path.lstrip("/")
        if not controllers:
            quota = _words(folder / "cpu.max")
        elif "cpu" in controllers.split(","):
            folder = cgroup / "cpu" / path.lstrip("/")
            quota = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        else:
            continue
        if len(quota) == 2 and quota[0].isdecimal() and int(quota[1]):
            cores = min(cores, max(round(int(quota[0]) / int(quota[1])), 1))
    return cores


def machine_cores() -> int:
    """Cores of the machine: what an engine takes that isn't told how many."""
    return os.cpu_count() or 1


def load(proc: Path = PROC) -> float | None:
    """How many tasks have run or waited to run, on average over the last minute."""
    words = _words(proc / "loadavg")
    return float(words[0]) if words else None


def file_system(path: Path, proc: Path = PROC) -> str:
    """The kind of file system that a path lies on; `unknown` where the kernel doesn't tell."""
    resolved = str(path.resolve())
    best, kind = "", "unknown"
    for line in _lines(proc / "self" / "mountinfo"):
        left, _, right = line.partition(" - ")
        point = _ESCAPE.sub(lambda m: chr(int(m[1], 8)), left.split()[4])
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        # Of two mounts on one point the later one is seen.
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def look_at_disk(path: Path, *, measure: bool = True) -> DiskFacts | None:
    """A directory's file system, its free space and its speed; None if it isn't there."""
    try:
        stat = os.statvfs(path)
    except OSError:
        return None
    free_bytes = stat.f_bavail * stat.f_frsize
    speed = None
    if measure and free_bytes > 4 * _MEASURED_BYTES:
        speed = _write_bytes_s(path)
    return DiskFacts(
        path=str(path), kind=file_system(path), free_bytes=free_bytes, write_bytes_s=speed
    )


def _write_bytes_s(folder: Path) -> float | None:
    """Write a file through to the disk and remove it; None where that isn't allowed."""
    path = folder / f".keepwarm-doctor-{secrets.token_hex(6)}"
    data = secrets.token_bytes(_MEASURED_BYTES)
    try:
        began_s = time.perf_counter()
        with path.open("xb") as file:
            file.write(data)
            os.fsync(file.fileno())
        return _MEASURED_BYTES / max(time.perf_counter() - began_s, 1e-9)
    except OSError:
        return None
    finally:
        path.unlink(missing_ok=True)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
