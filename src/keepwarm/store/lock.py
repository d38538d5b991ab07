"""One process owns a store's index and files; a lock file says which, and how much it takes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from keepwarm.errors import ConfigError


class HolderNote(NamedTuple):
    """What a holder says of itself. `used_bytes` None: it doesn't say."""

    owner: str
    used_bytes: int | None


class OwnerLock:
    """An exclusive `flock`, held until `release` or the end of the process, however it ends.

    The file's text names the holder; it is for reading, so a full disk doesn't matter. The file
    isn't removed, since that would let two processes each hold a lock on a file of the same name.
    """

    def __init__(self, path: Path, *, what: str) -> None:
        """Take the lock or say who has it.

        Raises: ConfigError naming the holder, when another process has it; OSError if there can be
        no such file. Nothing changed.
        """
        self.path = path
        self._what = what
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _try_lock(self._fd)
        except OSError as error:
            holder = _told(self._fd).owner
            os.close(self._fd)
            self._fd = None
            raise ConfigError(
                f"The snapshot store {path.with_suffix('')} is in use by {holder}. Stop that one, "
                "ask it instead (`keepwarm store` does), or use another --store."
            ) from error
        self.tell(None)

    def tell(self, used_bytes: int | None) -> None:
        """Say what the holder takes; for others to read."""
        if self._fd is None:
            return
        text = json.dumps({"pid": os.getpid(), "what": self._what, "used_bytes": used_bytes})
        with contextlib.suppress(OSError):
            # In this order it is never empty, and needs no new block on a full disk.
            os.pwrite(self._fd, text.encode(), 0)
            os.ftruncate(self._fd, len(text.encode()))

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` is the one that is locked: nobody took it away."""
        if self._fd is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._fd), path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Let others have it; safe to call twice."""
        # Taken over first: a second caller, on another thread, finds nothing to close.
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
            os.close(fd)

    def __enter__(self) -> OwnerLock:
        """Itself, already taken."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release it."""
        self.release()


def _try_lock(fd: int) -> None:
    """Take the lock, not minding that `told_by` looks at it at this moment."""
    for _ in range(3):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def told_by(path: Path) -> HolderNote | None:
    """What the holder of the lock at `path` says; None if nobody holds it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _told(fd)
    else:
        return None
    finally:
        os.close(fd)


def owner_of(path: Path) -> str | None:
    """Who holds the lock at `path` now; None if nobody does."""
    told = told_by(path)
    return None if told is None else told.owner


def _told(fd: int) -> HolderNote:
    try:
        told = json.loads(os.pread(fd, 1024, 0))
        used = told.get("used_bytes")
        owner = f"process {int(told['pid'])} ({told['what']})"
        return HolderNote(owner, used if isinstance(used, int) else None)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return HolderNote("another process", None)
