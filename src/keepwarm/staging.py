"""Where slot files pass through on their way between engine and store."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from pathlib import Path


def default_staging(store: Path, *, need_bytes: int) -> Path:
    """A store's own place: memory-backed where there is room, else beside the store.

    /dev/shm is Linux's; twice the need is asked for, since a save and an assembly may be under way
    together. Everybody may write there, so a directory with our name that isn't ours is a trap: it
    would let its owner read and swap what passes through.
    """
    shm = Path("/dev/shm")  # noqa: S108 - memory-backed; a private directory is made in it
    if sys.platform == "linux" and shm.is_dir():
        room = os.statvfs(shm)
        if room.f_bavail * room.f_frsize >= 2 * need_bytes:
            name = hashlib.blake2b(str(store.absolute()).encode(), digest_size=6).hexdigest()
            folder = shm / f"keepwarm-{os.getuid()}"
            if _is_ours(folder):
                return folder / name
    return store / "staging"


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
