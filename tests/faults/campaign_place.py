"""Where faults happen: a gateway with a real engine, on a small disk, among somebody else's files.

As root the store is on an ext4 file system of its own and staging on a small tmpfs, which can be
full, read-only, frozen or gone; without root both are plain directories, and those faults are
skipped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from served import Served
from smalltiers import write_small_tiers

DISK_BYTES = 64 << 20
STAGING_BYTES = 48 << 20
# Less than all conversations take, so that rows are written and evicted all the time.
QUOTA_BYTES = 3 << 19
HANG_TIMEOUT_S = 1.5
HEALTHY_WITHIN_S = 30.0
# What an allocator may keep of what a fault needed, and what SQLite may have open.
GROWTH_BYTES = 60 << 20
SPARE_DESCRIPTORS = 12
CLOCK = Path(__file__).parent / "campaign_clock"


class Disk:
    """A file system that can be full, read-only, frozen or gone; see the module."""

    def __init__(self, root: Path, point: Path, *, block_bytes: int) -> None:
        self.point = point
        self._image = root / "disk.img"
        self._under = root / "disk"
        self._under.mkdir()
        point.mkdir()
        self.is_real = False
        if os.geteuid() or not shutil.which("mkfs.ext4"):
            return
        with self._image.open("wb") as file:
            file.truncate(DISK_BYTES)
        with contextlib.suppress(subprocess.CalledProcessError):
            made = ("mkfs.ext4", "-q", "-F", "-b", str(block_bytes), "-m", "0")
            _run(*made, str(self._image))
            _run("mount", "-o", "loop", str(self._image), str(self._under))
            self.is_real = True
            self.back()

    def fill(self) -> None:
        """Leave no byte; what fills it is somebody else's."""
        with contextlib.suppress(OSError), (self._under / "ballast").open("wb", 0) as file:
            while True:
                file.write(bytes(1 << 16))

    def free(self) -> None:
        """As it was before `fill`."""
        (self._under / "ballast").unlink(missing_ok=True)

    def freeze(self, *, on: bool) -> None:
        """Let every write wait until it is thawed."""
        _run("fsfreeze", "-f" if on else "-u", str(self._under))

    def read_only(self, *, on: bool) -> None:
        """Refuse every write. Nothing may have a file open for writing."""
        _run("mount", "-o", "remount,ro" if on else "remount,rw", str(self._under))

    def away(self) -> None:
        """An empty directory is where it was; what is open stays open."""
        _run("umount", "-l", str(self.point))

    def back(self) -> None:
        """As it was before `away`."""
        _run("mount", "--bind", str(self._under), str(self.point))

    def mend(self) -> None:
        """As it was, whatever a fault has left."""
        if not self.is_real:
            return
        self.free()
        for mend in (
            lambda: self.freeze(on=False),
            lambda: self.read_only(on=False),
            lambda: None if os.path.ismount(self.point) else self.back(),
        ):
            with contextlib.suppress(subprocess.CalledProcessError):
                mend()

    def close(self) -> None:
        """Give it back."""
        if self.is_real:
            for path in (self.point, self._under):
                with contextlib.suppress(subprocess.CalledProcessError):
                    _run("umount", "-l", str(path))


class Place:
    """See the module. `start` it; `close` it at the end."""

    def __init__(self, root: Path, model: Path, *, block_bytes: int = 4096) -> None:
        self.root = root
        self.block_bytes = block_bytes
        self.model = model
        root.mkdir(parents=True)
        self.tiers = write_small_tiers(root / "tiers")
        self.store = root / "store"
        self._clock = root / "clock"
        self.staging = root / "staging"
        self.disk = Disk(root, self.store, block_bytes=block_bytes)
        self.staging.mkdir(mode=0o700)
        self._has_tmpfs = False
        if self.disk.is_real:
            _run("mount", "-t", "tmpfs", "-o", f"size={STAGING_BYTES}", "none", str(self.staging))
            self._has_tmpfs = True
        self.served: Served | None = None
        self.is_killed = False
        """Whether the gateway itself was killed: then what was in flight is nobody's fault."""
        self.foreign: dict[Path, bytes] = {}
        self.calm: tuple[int, int] | None = None

    @property
    def gateway(self) -> Served:
        assert self.served
        return self.served

    def serve(self, name: str = "gateway") -> Served:
        """A gateway on this place's store, not yet ready."""
        path = [str(CLOCK), *filter(None, [os.environ.get("PYTHONPATH")])]
        return Served(
            self.root / name,
            environment={
                "CAMPAIGN_CLOCK": str(self._clock),
                "PYTHONPATH": os.pathsep.join(path),
            },
            engine={
                "model": str(self.model),
                "slots": 2,
                "context": 4096,
                "threads": 1,
                "hang_timeout_s": HANG_TIMEOUT_S,
            },
            tiers={"dir": str(self.tiers)},
            store={
                "dir": str(self.store),
                "staging_dir": str(self.staging),
                "staging_bytes": STAGING_BYTES // 2,
                "quota_bytes": QUOTA_BYTES,
            },
            batch={"dir": str(self.root / name / "batches")},
        )

    def start(self) -> float:
        """Start the gateway; when that was."""
        began_s = time.monotonic()
        self.served = self.serve()
        self.calm = None
        return began_s

    def stop(self) -> None:
        """SIGTERM."""
        self.is_killed = True
        self.gateway.stop()

    def kill(self) -> None:
        """SIGKILL."""
        self.is_killed = True
        self.gateway.kill()

    def engine_pids(self) -> list[int]:
        """The engine's processes, found as the gateway's children."""
        return [pid for pid in _children(self.gateway.process.pid) if _is_engine(pid)]

    def signal_engine(self, number: signal.Signals) -> None:
        """Send a signal to the engine, if there is one at this moment."""
        for pid in self.engine_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def set_clock(self, off_s: float) -> None:
        """Let the gateway's wall clock jump to so many seconds beside the real one."""
        new = self._clock.with_name("clock.new")
        new.write_text(str(off_s))
        new.replace(self._clock)

    def files(self, pattern: str) -> list[Path]:
        """The store's own files of a form, in whatever directory."""
        found = [p for p in self.store.rglob(pattern) if p.is_file() and p not in self.foreign]
        return sorted(found)

    def staged(self) -> list[Path]:
        """Slot files in staging."""
        found = [p for p in self.staging.rglob("*") if p.is_file() and p not in self.foreign]
        return sorted(p for p in found if p.suffix == ".slot")

    def plant(self) -> None:
        """Put files of somebody else wherever the store has its own."""
        homes = [self.store, self.staging, *(p for p in self.store.rglob("*") if p.is_dir())]
        for home in homes:
            if any(part.startswith("poetry") for part in home.parts):
                continue
            for name in ("notes.txt", "poetry.lock", "thesis.rows", "kw-mine.slot", "a.new"):
                self._own(home / name)
            (home / "poetry").mkdir(exist_ok=True)
            self._own(home / "poetry" / "poem.txt")

    def _own(self, path: Path) -> None:
        text = f"{path} is somebody's".encode()
        with contextlib.suppress(OSError):
            path.write_bytes(text)
            self.foreign[path] = text

    def missing(self) -> list[str]:
        """Foreign files that are gone or changed; each is told once."""
        gone = [p for p, text in self.foreign.items() if not _holds(p, text)]
        for path in gone:
            del self.foreign[path]
        return [f"not ours and gone: {path}" for path in gone]

    def grown(self) -> list[str]:
        """What this life of the gateway holds more than when it was calm; processes left over."""
        found = []
        pid = self.gateway.process.pid
        engines = self.engine_pids()
        if len(engines) != 1:
            found.append(f"{len(engines)} engines")
        strays = [p for p in _with_root(self.root) if p not in (pid, *_children(pid))]
        if strays:
            found.append(f"processes left over: {strays}")
        now = _resident(pid), len([*Path(f"/proc/{pid}/fd").iterdir()])
        if self.calm is None:
            self.calm = now
        if now[0] > self.calm[0] + GROWTH_BYTES:
            found.append(f"memory grew from {self.calm[0]:,} to {now[0]:,}")
        if now[1] > self.calm[1] + SPARE_DESCRIPTORS:
            found.append(f"descriptors grew from {self.calm[1]} to {now[1]}")
        staged = sum(p.stat().st_size for p in self.staged() if p.exists())
        if staged > STAGING_BYTES:
            found.append(f"staging holds {staged:,} bytes")
        return found

    def mend(self) -> None:
        """As it was, with a gateway, whatever a fault has left half done."""
        self.disk.mend()
        self.set_clock(0.0)
        if self.gateway.process.poll() is not None:
            self.start()

    def close(self) -> None:
        """End everything and give the file systems back."""
        if self.served is not None and self.served.process.poll() is None:
            self.served.process.kill()
            self.served.process.wait()
        if self._has_tmpfs:
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("umount", "-l", str(self.staging))
        self.disk.close()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _holds(path: Path, text: bytes) -> bool:
    try:
        return path.read_bytes() == text
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def _is_engine(pid: int) -> bool:
    try:
        return b"keepwarm.engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _with_root(root: Path) -> Iterator[int]:
    """Processes whose home is below this place."""
    own = f"HOME={root}/".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if own in (entry / "environ").read_bytes():
                    yield int(entry.name)


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
