"""SQLite files: whose they are, and their log without a shared memory that could end the process.

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
_MAGIC = b"SQLite format 3\0"
_HEAD_BYTES = 1 << 16


def refuse_foreign(path: Path, schema: str) -> None:
    """See that a file is ours, new, or empty, before anything is written to it.

    SQLite writes a schema down as it was given, on the file's first page or in its log.

    Raises: FileExistsError if somebody else has a file of this name; OSError.
    """
    heads = []
    for name in (path.name, f"{path.name}-wal"):
        try:
            with path.with_name(name).open("rb") as file:
                heads.append(file.read(_HEAD_BYTES))
        except FileNotFoundError:
            heads.append(b"")
    if not heads[0] or (heads[0].startswith(_MAGIC) and b"CREATE " not in heads[0]):
        return
    mark = schema.partition(",")[0].strip().replace(" IF NOT EXISTS", "").encode()
    if not any(mark in head for head in heads):
        raise FileExistsError(f"{path.name} isn't Keepwarm's, or is damaged: it is left alone")


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
