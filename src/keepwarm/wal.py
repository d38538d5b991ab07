"""SQLite's write-ahead log, without a shared memory that could end the process.

In WAL mode SQLite maps `-shm`, a file that all connections share. It sees to it that each 4 KiB of
it have a block on the disk; where blocks are smaller, a full disk leaves pages without one, and to
touch these ends the process (SIGBUS). There the connection keeps it in its own memory, and nobody
else can open the file meanwhile.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

_PAGE_BYTES = 4096


def shares_memory_safely(path: Path) -> bool:
    """Whether SQLite's shared memory beside `path` is safe on a full disk. Raises: OSError."""
    return os.statvfs(path.parent).f_frsize >= _PAGE_BYTES


def use_wal(connection: sqlite3.Connection, path: Path, *, alone: bool = False) -> None:
    """Choose the journal before anything else is done. `alone`: share no memory in any case.

    Raises: OSError, sqlite3.Error.
    """
    if alone or not shares_memory_safely(path):
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    connection.execute("PRAGMA journal_mode=WAL")
