"""The one way from the store to the file system, narrow so that tests can cut the power anywhere.

A file of the store comes to be in four steps: written under a temporary name with its checksum
taken on the way, flushed, renamed, the directory flushed. Only then the index names it. Whatever is
interrupted leaves a file that the index doesn't name, and such files are removed on opening.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from keepwarm.errors import SnapshotError
from keepwarm.slotfile import Buffer
from keepwarm.slotfile.cells import as_view

CHUNK_BYTES = 1 << 20
"""Bytes checksummed, then written, at a time: still in the CPU's cache for the second step."""

_MAX_BUFFERS = 512  # POSIX allows 1,024 a writev on Linux and macOS
_REASONS = {
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.EIO: "unreadable",
    errno.ENOENT: "missing",
}


class Written(NamedTuple):
    """Size and xxh3_128 of what was written."""

    size_bytes: int
    checksum: bytes


class Disk:
    """Side effects on files. All methods raise OSError as the system does."""

    def write_new(self, path: Path, buffers: Iterable[Buffer], *, seal: bytes = b"") -> Written:
        """Create `path` (0600, must not exist), write all buffers, and flush them to the disk.

        The checksum is of `seal`, which isn't written, then of what is.
        """
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            written = self.write(fd, buffers, seal=seal)
            self.sync_file(fd)
        finally:
            os.close(fd)
        return written

    def write(self, fd: int, buffers: Iterable[Buffer], *, seal: bytes = b"") -> Written:
        """Write all buffers with as few system calls as fit."""
        hasher = xxhash.xxh3_128(seal)
        size = 0
        for batch in _batches(buffers):
            for piece in batch:
                hasher.update(piece)
            size += _write_all(fd, batch)
        return Written(size, hasher.digest())

    def write_staged(self, fd: int, buffers: Iterable[Buffer]) -> Written:
        """As `write`, for what needn't survive this life."""
        return self.write(fd, buffers)

    def sync_file(self, fd: int) -> None:
        """Until this returns, a power cut may leave any part of the file."""
        full_sync = getattr(fcntl, "F_FULLFSYNC", None)
        if full_sync is not None:  # macOS: fsync alone leaves the data in the drive's cache
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, full_sync)
                return
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Atomic within one directory; replaces `target`."""
        source.replace(target)

    def sync_dir(self, path: Path) -> None:
        """Until this returns, a power cut may undo what was renamed or removed in it."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        """Remove a file; not an error if it isn't there."""
        path.unlink(missing_ok=True)

    def commit(self, connection: sqlite3.Connection) -> None:
        """The step that makes it count."""
        connection.execute("COMMIT")


def _batches(buffers: Iterable[Buffer]) -> Iterator[list[memoryview]]:
    """The buffers cut so that a batch holds at most `CHUNK_BYTES` in `_MAX_BUFFERS` pieces."""
    batch: list[memoryview] = []
    room = CHUNK_BYTES
    for buffer in buffers:
        view = as_view(buffer)
        while view:
            piece, view = view[:room], view[room:]
            batch.append(piece)
            room -= len(piece)
            if room == 0 or len(batch) == _MAX_BUFFERS:
                yield batch
                batch, room = [], CHUNK_BYTES
    if batch:
        yield batch


def _write_all(fd: int, batch: list[memoryview]) -> int:
    left = total = sum(map(len, batch))
    while True:
        done = os.writev(fd, batch)
        left -= done
        if not left:
            return total
        while done >= len(batch[0]):
            done -= len(batch.pop(0))
        batch[0] = batch[0][done:]


def read_checksum(path: Path, *, size_bytes: int, seal: bytes = b"") -> bytes:
    """xxh3_128 of `seal` and a file, by reading it: unlike mapping, that reports a bad disk.

    Raises: FileNotFoundError, OSError; SnapshotError('truncated') if it has another size.
    """
    hasher = xxhash.xxh3_128(seal)
    buffer = bytearray(min(CHUNK_BYTES, max(size_bytes, 1)))
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != size_bytes:
            raise SnapshotError(f"{path} hasn't its {size_bytes} bytes", reason="truncated")
        while count := file.readinto(buffer):
            hasher.update(view[:count])
    return hasher.digest()


def checksum(buffer: Buffer, *, seal: bytes = b"") -> bytes:
    """xxh3_128 of `seal` and a buffer."""
    hasher = xxhash.xxh3_128(seal)
    hasher.update(as_view(buffer))
    return hasher.digest()


def map_file(path: Path) -> mmap.mmap | bytes:
    """A file's bytes, read-only, without copying where nobody can cut the file meanwhile.

    To touch a mapped page that is gone ends the process (SIGBUS). So the file is leased: who wants
    to write to it or cut it waits until the mapping is dropped. Where that isn't to be had it is
    read: somebody else's file, one that is being written, a file system without leases, macOS.

    Raises: OSError; SnapshotError if it is empty.
    """
    with path.open("rb", buffering=0) as file:
        is_leased = _lease(file.fileno())
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise SnapshotError(f"{path} is empty", reason="truncated")
        if is_leased:  # the mapping keeps the file open, and with it the lease
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return file.readall()


def _lease(fd: int) -> bool:
    """See F_SETLEASE in `fcntl(2)`. Writers wait /proc/sys/fs/lease-break-time (45 s) at most."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        # The one who waits is announced by a signal: SIGIO, unless another is named, and that would
        # end the process. This one is ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Foreign errors become SnapshotError here.

    'no_space' for a full disk (or the user's quota on it), 'unreadable' for a sector that can't be
    read, 'missing', 'index' for what SQLite says, else 'io'.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, "io")
        raise SnapshotError(f"{doing}: {error}", reason=reason) from error
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        reason = "no_space" if full else "index"
        raise SnapshotError(f"{doing}: {error}", reason=reason) from error
