"""One process owns a store's index and files; a lock file says which."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType

from keepwarm.errors import ConfigError


class OwnerLock:
    """An exclusive `flock`, held until `release` or the end of the process, however it ends.

    The file's text names the holder. It isn't removed, since that would let two processes each
    hold a lock on a file of the same name.
    """

    def __init__(self, path: Path, *, what: str) -> None:
        """Take the lock or say who has it.

        Raises: ConfigError naming the holder, when another process has it; nothing changed.
        """
        self.path = path
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _try_lock(self._fd)
        except OSError as error:
            holder = _holder(self._fd)
            os.close(self._fd)
            self._fd = None
            raise ConfigError(
                f"The snapshot store {path.with_suffix('')} is in use by {holder}. Stop that one, "
                "ask it instead (`keepwarm store` does), or use another --store."
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "what": what}).encode(), 0)

    def release(self) -> None:
        """Let others have it; safe to call twice."""
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = None

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
    """Take the lock, not minding that `owner_of` looks at it at this moment."""
    for _ in range(3):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def owner_of(path: Path) -> str | None:
    """Who holds the lock at `path` now; None if nobody does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _holder(fd)
    else:
        return None
    finally:
        os.close(fd)


def _holder(fd: int) -> str:
    try:
        told = json.loads(os.pread(fd, 1024, 0))
        return f"process {int(told['pid'])} ({told['what']})"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"
