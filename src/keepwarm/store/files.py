"""Extent and boundary files of one fingerprint, and the quarantine beside them.

Theory of operation. A file's name is made from numbers of the index alone: `<extent>.rows`, and
`<extent>-<at>.end` for a boundary state, in hexadecimal. It holds the payload and nothing else, so
that a mapped file is the codec's input. It is written once, under a name that ends in `.new`
until it is complete, and is never opened for writing again.

The checksum in the index covers the row's seal (see `index`), then the payload. It is compared
each time a file is opened for its content; `_verified` remembers which have been read in this life.

Invariants:
- A file without the suffix `.new` is complete and flushed.
- Only files whose names have this form are removed or moved, whatever else is in the directory.
- What the index doesn't name when the store is opened (*strays*) is left where it is, counted, and
  removed when room is needed.
- A verified file was read in full in this life and matched.
- The quarantine's bytes stay within its bound; its oldest files go first.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from keepwarm.errors import SnapshotError
from keepwarm.slotfile import Buffer
from keepwarm.store.disk import (
    Disk,
    Written,
    checksum,
    disk_errors,
    map_file,
    read_checksum,
)
from keepwarm.store.index import BoundaryRow, ExtentRow
from keepwarm.store.places import QUARANTINE, TAG, is_own_name, put_tag

UNTRUSTED = frozenset({"checksum", "missing", "truncated", "unreadable"})
"""Reasons after which a file is never tried again; others ('io') may pass."""

READ_BELOW_BYTES = 1 << 20
"""Smaller files are read instead of mapped: a long conversation is a chain of many small extents,
and each mapping costs a file descriptor."""

TRIES = 3
"""A disk's read error counts as 'io' until it has come so often in a row: a cable or a controller
that stumbles once says nothing against what is written."""


class FileKey(NamedTuple):
    """Which file: an extent's rows (`at` None), or its boundary state at `at`."""

    extent_id: int
    at: int | None = None

    @property
    def name(self) -> str:
        """Its file name."""
        if self.at is None:
            return f"{self.extent_id:010x}.rows"
        return f"{self.extent_id:010x}-{self.at:08x}.end"


def key_of(row: ExtentRow | BoundaryRow) -> FileKey:
    """Which file a row of the index is about."""
    if isinstance(row, ExtentRow):
        return FileKey(row.id)
    return FileKey(row.extent_id, row.at)


class ExtentFiles:
    """The directory of one fingerprint. All methods but the first raise SnapshotError only."""

    def __init__(self, root: Path, *, disk: Disk, quarantine_bytes: int) -> None:
        """Make the directories (0700) where missing. Raises: OSError."""
        self.root = root
        self._quarantine = root / QUARANTINE
        self._disk = disk
        self._bound_bytes = quarantine_bytes
        self._verified: set[FileKey] = set()
        self._unreadable: Counter[FileKey] = Counter()
        for path in (root, self._quarantine):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # without a tag nobody else will remove it, that's all
            put_tag(root)
        self._strays: dict[str, int] = {}
        self.quarantined_bytes = sum(found.st_size for found, _ in self._set_aside())

    def path(self, key: FileKey) -> Path:
        """Where that file is, or would be."""
        return self.root / key.name

    def present(self) -> set[str]:
        """The names of all files there are, whoever made them."""
        with disk_errors("listing the store"):
            # Strings alone: with 100,000 files, as many Path objects cost a second.
            return set(os.listdir(self.root)) - {QUARANTINE, TAG}  # noqa: PTH208

    @property
    def stray_bytes(self) -> int:
        """What strays take."""
        return sum(self._strays.values())

    def free_id(self, at_least: int) -> int:
        """An extent id that no stray's name has: writing must not replace one."""
        taken = {int(re.split("[.-]", name, maxsplit=1)[0], 16) for name in self._strays}
        while at_least in taken:
            at_least += 1
        return at_least

    def write(self, key: FileKey, buffers: Iterable[Buffer], *, seal: bytes) -> Written:
        """Put a complete, flushed file in place, not yet named by the index.

        Raises: SnapshotError('no_space', 'io'); nothing is left behind.
        """
        target = self.path(key)
        temporary = target.with_name(target.name + ".new")
        with disk_errors(f"writing {target.name}"):
            self._disk.unlink(temporary)
            try:
                written = self._disk.write_new(temporary, buffers, seal=seal)
                self._disk.rename(temporary, target)
                self._disk.sync_dir(self.root)
            except OSError:
                self._disk.unlink(temporary)
                self._disk.unlink(target)
                raise
        return written

    def remove(self, keys: Iterable[FileKey]) -> None:
        """Remove files that the index no longer names. One that can't be removed stays as refuse
        until the next opening.
        """
        for key in keys:
            self._verified.discard(key)
            self._unreadable.pop(key, None)
            try:
                self._disk.unlink(self.path(key))
            except OSError:
                continue

    def note_strays(self, names: Iterable[str]) -> int:
        """Count what isn't indexed and has a name of ours; returns how many files that is."""
        for name in filter(is_own_name, names):
            with contextlib.suppress(OSError):
                found = (self.root / name).lstat()
                if stat.S_ISREG(found.st_mode):
                    self._strays[name] = found.st_size
        return len(self._strays)

    def strays(self) -> set[str]:
        """Their names."""
        return set(self._strays)

    def remove_strays(self) -> int:
        """Remove them; returns the bytes freed."""
        before = self.stray_bytes
        for name in list(self._strays):
            with contextlib.suppress(OSError):
                self._disk.unlink(self.root / name)
                del self._strays[name]
        return before - self.stray_bytes

    def check(self, row: ExtentRow | BoundaryRow) -> None:
        """Read the file and compare, unless that was done in this life.

        Raises: SnapshotError('missing', 'truncated', 'unreadable', 'checksum', 'io').
        """
        if key_of(row) not in self._verified:
            self.check_again(row)

    def check_again(self, row: ExtentRow | BoundaryRow) -> None:
        """Read the file and compare. Raises: as `check`."""
        key = key_of(row)
        self._verified.discard(key)
        with self._trying(key):
            check_file(self.path(key), row)
        self._verified.add(key)

    def open(self, row: ExtentRow | BoundaryRow) -> mmap.mmap | bytes:
        """The file's bytes, compared with their checksum now; mapped if there are many of them.

        It is compared at each use, since what is computed behind damaged rows is wrong for good,
        and nobody sees it. The first time in a life it is read, not mapped: that reports a bad
        disk as an error.

        Raises: as `check`.
        """
        self.check(row)
        key = key_of(row)
        path = self.path(key)
        with self._trying(key), disk_errors(f"opening {path.name}"):
            found = path.read_bytes() if row.size_bytes < READ_BELOW_BYTES else map_file(path)
        if len(found) != row.size_bytes:
            raise SnapshotError(f"{path.name} was cut while in use", reason="truncated")
        if checksum(found, seal=row.seal) != row.checksum:
            self._verified.discard(key)
            raise SnapshotError(f"{path.name} isn't what was written", reason="checksum")
        return found

    @contextlib.contextmanager
    def _trying(self, key: FileKey) -> Iterator[None]:
        """'unreadable' becomes 'io', which is a miss and no more, until it was tried enough."""
        try:
            yield
        except SnapshotError as error:
            if error.reason != "unreadable":
                raise
            self._unreadable[key] += 1
            if self._unreadable[key] >= TRIES:
                raise
            raise SnapshotError(f"{error}; it is tried again", reason="io") from error
        self._unreadable.pop(key, None)

    def quarantine(self, key: FileKey) -> None:
        """Set a file aside as untrusted, for whoever wants to look; the oldest make room.

        A file that can't be moved, or is larger than the bound, is removed.
        """
        self._verified.discard(key)
        path = self.path(key)
        with disk_errors(f"quarantining {key.name}"):
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                return
            if size > self._bound_bytes:
                self._disk.unlink(path)
                return
            self._bound_quarantine(self._bound_bytes - size)
            self._disk.rename(path, self._quarantine / key.name)
            self._bound_quarantine(self._bound_bytes)  # counts again

    def empty_quarantine(self) -> int:
        """Remove what was set aside. Returns the bytes freed."""
        before = self.quarantined_bytes
        with disk_errors("emptying the quarantine"):
            self._bound_quarantine(0)
        return before - self.quarantined_bytes

    def _bound_quarantine(self, bound_bytes: int) -> None:
        there = self._set_aside()
        total = sum(found.st_size for found, _ in there)
        for found, path in there:
            if total <= bound_bytes:
                break
            self._disk.unlink(Path(path))
            total -= found.st_size
        self.quarantined_bytes = total

    def _set_aside(self) -> list[tuple[os.stat_result, str]]:
        """Our files in the quarantine, the oldest first."""
        with os.scandir(self._quarantine) as entries:
            found = [
                (entry.stat(follow_symlinks=False), entry.path)
                for entry in entries
                if is_own_name(entry.name) and entry.is_file(follow_symlinks=False)
            ]
        found.sort(key=lambda one: one[0].st_ctime_ns)  # when it was moved here
        return found


def check_file(path: Path, row: ExtentRow | BoundaryRow) -> None:
    """Compare a file with its row by reading all of it; needs no store.

    Raises: SnapshotError('missing', 'truncated', 'unreadable', 'checksum', 'io').
    """
    with disk_errors(f"reading {path.name}"):
        found = read_checksum(path, size_bytes=row.size_bytes, seal=row.seal)
    if found != row.checksum:
        raise SnapshotError(f"{path.name} isn't what was written", reason="checksum")
