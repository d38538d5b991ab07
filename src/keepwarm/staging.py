"""Where slot files pass through on their way between engine and store."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
from pathlib import Path

# Linux's; memory-backed. Everybody may write there, so a private directory is made in it.
_SHM = Path("/dev/shm")  # noqa: S108


def default_staging(store: Path, *, need_bytes: int) -> Path:
    """A store's own place: memory-backed where there is room, else beside the store.

    Twice the need is asked for, since a save and an assembly may be under way together. Where the
    store can't be made, as in a container whose root is read-only, what room there is must do. A
    directory with our name that isn't ours is a trap: it would let its owner read and swap what
    passes through.
    """
    beside = store / "staging"
    if sys.platform == "linux" and _SHM.is_dir():
        room = os.statvfs(_SHM)
        has_room = room.f_bavail * room.f_frsize >= 2 * need_bytes
        if (has_room or not _can_be_made(beside)) and _is_ours(_private_folder()):
            name = hashlib.blake2b(str(store.absolute()).encode(), digest_size=6).hexdigest()
            return _private_folder() / name
    return beside


def _can_be_made(path: Path) -> bool:
    """Whether a directory is there, or may be made where its nearest parent is."""
    nearest = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    return os.access(nearest, os.W_OK)


def make_staging(path: Path) -> None:
    """Make a staging directory, or make it again: it may be taken away at any time.

    What is in shared memory goes with a user's last session by a common default of logind's, and
    then anybody may take the name around it.

    Raises: OSError.
    """
    folder = path.parent
    if folder == _private_folder() and not _is_ours(folder):
        raise PermissionError(errno.EPERM, "it can be changed by others", str(folder))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _private_folder() -> Path:
    return _SHM / f"keepwarm-{os.getuid()}"


def _is_ours(folder: Path) -> bool:
    """Make a private directory, or see that the one that is there can be changed by us alone."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        owned = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        return owned and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    except OSError:
        return False
    return True
