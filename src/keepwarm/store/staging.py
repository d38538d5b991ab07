"""The staging directory: what the engine saves to and restores from.

Theory of operation. The engine's `--slot-save-path` is this directory, in memory where there is
room. Names are ours alone, `kw-<life>-<number>.slot`; `<life>` is random, so none is given twice.
A file is first *expected* (a name was given, the engine writes), then taken by the store, and then
either removed or kept as a *ready* file: what a restore of some (extent, at) needs, complete.
Ready files are a cache: the least recently used goes first, pinned ones last. One that was given
out is held until it is released, since the engine opens it by name.

A file that we assembled and that makes room for another is written over instead of removed: memory
that a directory has already is filled twice as fast as new memory (`bench.store_live` measures it).
Never one that the engine may still be reading: it would restore a mixture.

Several processes may share a directory. Each life has a lock there, `kw-<life>.lock`; the files of
a life whose lock nobody holds are removed once room is needed, and nobody else's ever.

A ready file has a checksum, and is compared with it each time it is given out: what is computed
behind a damaged one would be saved as if it were right. A directory that was taken away is made
again; what was ready in it is assembled anew.

Invariants:
- Expected and ready bytes together stay within `bound_bytes`, but for held files.
- A ready file is complete: it was renamed into place after its last byte was written.
- Only files of this life, or of one that has provably ended, are removed.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.slotfile import Buffer
from keepwarm.staging import make_staging
from keepwarm.store.disk import Disk, checksum, disk_errors, map_file
from keepwarm.store.lock import OwnerLock
from keepwarm.store.neighbours import remove_left

log = logging.getLogger("keepwarm.store")

_OURS = re.compile(r"kw-([0-9a-f]{8})-[0-9]{1,12}\.slot(?:\.new)?")
_LOCK = re.compile(r"kw-([0-9a-f]{8})\.lock")


@dataclass(slots=True)
class ReadyFile:
    """A complete slot file for one end. `holds` counts who may be about to open it.

    `is_spent`: nobody reads it any more once it isn't held, so it may be written over. Not so for
    what the engine saved, which is restored by its name before the store has taken it in.
    """

    name: str
    size_bytes: int
    checksum: bytes
    is_pinned: bool
    holds: int = 0
    is_spent: bool = False


class Staging:
    """See the module. Changed on the store's thread only; `is_ready` may be asked anywhere."""

    def __init__(self, root: Path, *, bound_bytes: int, disk: Disk, file_mode: int = 0o600) -> None:
        """Make the directory (0700) if it is missing. Raises: OSError.

        `file_mode` is for a server that runs as somebody else.
        """
        self.root = root
        self.bound_bytes = bound_bytes
        self.damaged = 0
        self._disk = disk
        self._file_mode = file_mode
        self._life = secrets.token_hex(4)
        self._count = 0
        self._expected: dict[str, int] = {}
        self._ready: OrderedDict[tuple[int, int], ReadyFile] = OrderedDict()
        self._unlinked_later: dict[str, ReadyFile] = {}
        self._used_bytes = 0
        self._lock: OwnerLock | None = None
        self._is_swept = False
        self._make()
        self.leftovers = sum(life != self._life for life, _ in self._files())

    def _make(self) -> None:
        """Make the directory and this life's lock, unless they are there. Raises: OSError."""
        path = self.root / f"kw-{self._life}.lock"
        if self._lock is not None and self._lock.is_at(path):
            return
        make_staging(self.root)
        if self._lock is not None:
            log.warning("%s was taken away, and is made again", self.root)
            self._lock.release()
        self._lock = OwnerLock(path, what=f"staging of process {os.getpid()}")

    def _files(self) -> list[tuple[str, Path]]:
        """The files with names of ours: whose life they are of, and where."""
        with os.scandir(self.root) as entries:
            return [
                (form[1], Path(entry.path))
                for entry in entries
                if (form := _OURS.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False)
            ]

    def _sweep(self) -> None:
        """Remove what lives have left that have ended; once, when room is first needed."""
        if self._is_swept:
            return
        self._is_swept = True
        with suppress(OSError, SnapshotError):
            remove_left(self.root, disk=self._disk)
            with os.scandir(self.root) as entries:
                lives = {form[1] for e in entries if (form := _LOCK.fullmatch(e.name))}
            files = self._files()
            for life in lives - {self._life}:
                path = self.root / f"kw-{life}.lock"
                with suppress(ConfigError), OwnerLock(path, what="clearing away"):
                    for whose, file in files:
                        if whose == life:
                            self._disk.unlink(file)
                    self._disk.unlink(path)

    @property
    def used_bytes(self) -> int:
        """Bytes of expected and ready files."""
        return self._used_bytes

    def __len__(self) -> int:
        """How many ready files there are."""
        return len(self._ready)

    def is_ready(self, extent_id: int, at: int) -> bool:
        """Whether a complete file for this end waits."""
        return (extent_id, at) in self._ready

    def path(self, name: str) -> Path:
        """Where a staged file is. Raises: SnapshotError('name') for a name that isn't ours."""
        if not _OURS.fullmatch(name):
            raise SnapshotError("not a staged file's name", reason="name")
        return self.root / name

    def save_path(self, name: str) -> Path:
        """Where the engine wrote an expected file. Raises: SnapshotError('name') for any other."""
        if name not in self._expected:
            raise SnapshotError("no file of this name is expected", reason="name")
        return self.path(name)

    def expect(self, size_bytes: int) -> str:
        """A fresh name for a file of about this size; ready files make room for it.

        Raises: SnapshotError('no_space') if it can't fit.
        """
        with disk_errors("using the staging directory"):
            self._make()
        self.make_room(size_bytes)
        return self._named(size_bytes)

    def _named(self, size_bytes: int) -> str:
        self._count += 1
        name = f"kw-{self._life}-{self._count}.slot"
        self._expected[name] = size_bytes
        self._used_bytes += size_bytes
        return name

    def discard(self, name: str) -> None:
        """Remove a file that was expected, whether or not it came.

        Raises: SnapshotError('name'). One that can't be removed is left for the next opening.
        """
        path = self.path(name)
        self._used_bytes -= self._expected.pop(name, 0)
        try:
            self._disk.unlink(path)
        except OSError as error:
            log.warning("%s stays in the staging directory: %s", name, error)

    def keep(
        self,
        name: str,
        *,
        extent_id: int,
        at: int,
        size_bytes: int,
        checksum: bytes,
        is_pinned: bool,
        is_written_here: bool = False,
    ) -> None:
        """Make an expected file that has come the ready one for this end."""
        if (extent_id, at) in self._ready:
            self._drop((extent_id, at))
        self._used_bytes += size_bytes - self._expected.pop(name)
        file = ReadyFile(name, size_bytes, checksum, is_pinned, is_spent=is_written_here)
        self._ready[extent_id, at] = file
        self.make_room(0)

    def hold(self, extent_id: int, at: int) -> ReadyFile | None:
        """The ready file for this end, held and now the most recently used; None if there is none.

        One that someone else removed, or that isn't what it was, is forgotten.
        """
        file = self._ready.get((extent_id, at))
        if file is None:
            return None
        if not self._is_whole(file):
            self._drop((extent_id, at))
            return None
        self._ready.move_to_end((extent_id, at))
        file.holds += 1
        return file

    def _is_whole(self, file: ReadyFile) -> bool:
        try:
            found = checksum(map_file(self.path(file.name)))
        except (OSError, SnapshotError) as error:
            log.warning("%s is gone from the staging directory: %s", file.name, error)
            return False
        if found != file.checksum:
            self.damaged += 1
            log.warning("%s was damaged in the staging directory: it is made again", file.name)
        return found == file.checksum

    def release(self, name: str, *, is_read: bool = True) -> None:
        """Undo one `hold`; a file forgotten meanwhile is removed with its last hold.

        `is_read` False: whoever held it may be reading it still.
        """
        later = self._unlinked_later.get(name)
        if later is not None:
            later.holds -= 1
            if later.holds <= 0:
                del self._unlinked_later[name]
                self.discard(name)
            return
        for file in self._ready.values():
            if file.name == name:
                file.holds = max(0, file.holds - 1)
                file.is_spent = file.is_spent and is_read
        self.make_room(0)

    def write(self, size_bytes: int, buffers: Iterable[Buffer]) -> tuple[str, bytes]:
        """Write a file of ours; returns its name and checksum. It is expected until `keep` or
        `discard`.

        It appears under its name when it is complete. Not flushed: what is staged is worth nothing
        after a restart. Raises: SnapshotError('no_space', 'io'); no file is left.
        """
        with disk_errors("using the staging directory"):
            self._make()
        spare = self._take_room(size_bytes)
        name = self._named(size_bytes)
        path = self.path(name)
        temporary = path.with_name(path.name + ".new")
        try:
            with disk_errors(f"writing {name}"):
                checksum = self._fill(temporary, buffers, over=self.path(spare) if spare else None)
                self._disk.rename(temporary, path)
        except SnapshotError:
            self._disk.unlink(temporary)
            self.discard(name)
            raise
        return name, checksum

    def _take_room(self, size_bytes: int) -> str | None:
        """As `make_room`; returns a removed file that is still there, to be written over."""
        spare: str | None = None
        try:
            for file in self._leaving(size_bytes):
                if spare is None and file.is_spent:
                    spare = file.name
                else:
                    self.discard(file.name)
        except SnapshotError:
            if spare is not None:
                self.discard(spare)
            raise
        return spare

    def _fill(self, path: Path, buffers: Iterable[Buffer], *, over: Path | None) -> bytes:
        if over is not None:
            with suppress(FileNotFoundError):  # somebody else has removed it
                self._disk.rename(over, path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if self._file_mode != 0o600:
                os.fchmod(fd, self._file_mode)
            written = self._disk.write_staged(fd, buffers)
            os.ftruncate(fd, written.size_bytes)
        finally:
            os.close(fd)
        return written.checksum

    def mark_pinned(self, is_pinned: Callable[[int, int], bool]) -> None:
        """Tell which ends are pinned now."""
        for (extent_id, at), file in self._ready.items():
            file.is_pinned = is_pinned(extent_id, at)

    def forget(self, extent_ids: Collection[int] | None = None) -> None:
        """Remove the ready files of these extents, or all; held ones when released."""
        if extent_ids is None:
            gone = list(self._ready)
        elif extent_ids:
            gone = [key for key in self._ready if key[0] in extent_ids]
        else:
            return
        for key in gone:
            self._drop(key)

    def make_room(self, size_bytes: int) -> None:
        """Remove ready files until this much fits. Raises: SnapshotError('no_space')."""
        for file in self._leaving(size_bytes):
            self.discard(file.name)

    def _leaving(self, size_bytes: int) -> Iterator[ReadyFile]:
        """Forget ready files until this much fits; the caller removes them.

        Raises: SnapshotError('no_space').
        """
        if size_bytes > self.bound_bytes:
            raise SnapshotError(
                f"A slot file of {size_bytes:,} bytes doesn't fit into {self.bound_bytes:,} bytes "
                "of staging: raise store.staging_bytes.",
                reason="no_space",
            )
        if size_bytes:
            self._sweep()
        free_bytes = self._free_bytes() if size_bytes else 0
        while self.used_bytes + size_bytes > self.bound_bytes or free_bytes < size_bytes:
            key = self._least_needed()
            if key is not None:
                file = self._ready.pop(key)
                self._used_bytes -= file.size_bytes
                free_bytes += file.size_bytes
                yield file
            elif size_bytes:
                raise SnapshotError(
                    f"all of staging is in use, or {self.root} is full", reason="no_space"
                )
            else:
                return

    def _free_bytes(self) -> int:
        """What the file system has left: a container's /dev/shm may be smaller than the bound."""
        with disk_errors("measuring the staging directory"):
            found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def clear(self) -> None:
        """Remove all of this life's files, held ones too; only for the end of it."""
        for name in [*self._expected, *self._unlinked_later]:
            self.discard(name)
        for file in self._ready.values():
            self.discard(file.name)
        self._ready.clear()
        self._used_bytes = 0
        if self._lock is not None:
            if self._lock.is_at(self._lock.path):
                with suppress(OSError):
                    self._disk.unlink(self._lock.path)
            self._lock.release()
            self._lock = None

    def _least_needed(self) -> tuple[int, int] | None:
        """The least recently used file that nobody holds, pinned ones last; None if all are."""
        pinned: tuple[int, int] | None = None
        for key, file in self._ready.items():
            if not file.holds:
                if not file.is_pinned:
                    return key
                pinned = pinned or key
        return pinned

    def _drop(self, key: tuple[int, int]) -> None:
        file = self._ready.pop(key)
        self._used_bytes -= file.size_bytes
        if file.holds:
            self._unlinked_later[file.name] = file
        else:
            self.discard(file.name)
