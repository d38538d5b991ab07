"""What has ended, so that each task ends exactly once in the results, whatever is killed when.

Theory of operation. A result counts when its row is committed to the journal, an SQLite file beside
the results. Then its line is appended to the results (or the errors), and how far that file has got
is written with the next commit. On opening, both files are cut back to where the journal knows them
to be and the rows behind that are appended again: a line that was half written, or written and not
noted, is neither lost nor there twice. Rows keep their lines until all has ended, so files that
were damaged meanwhile are written anew.

With `sync`, files and journal are flushed at each result, and a power cut loses nothing either;
without, it loses what the system hadn't written, and those tasks run again.

A full disk raises `DiskFullError`, one that can't be written for another reason (read-only, gone)
its parent `UnwritableError`; what was committed stays, and `flush` can be tried again. No error of
SQLite's own leaves this module.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keepwarm.errors import ConfigError, KeepwarmError
from keepwarm.sqlite_file import refuse_foreign, use_wal

Target = Literal["results", "errors"]
_TARGETS: tuple[Target, ...] = ("results", "errors")
_VERSION = "1"
# A full disk, a quota, or a file size limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS ended (
  seq INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, ok INTEGER NOT NULL, target TEXT NOT NULL,
  digest TEXT NOT NULL, line BLOB, stats TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS fills (seq INTEGER PRIMARY KEY, stats TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tries (key TEXT PRIMARY KEY, failures INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS landed (
  target TEXT PRIMARY KEY, seq INTEGER NOT NULL, size_bytes INTEGER NOT NULL);
"""


class UnwritableError(KeepwarmError):
    """The disk can't be used now. What was committed is kept; the same call can be made again."""

    status = 507
    retry = True
    kind = "disk_unusable"


class DiskFullError(UnwritableError):
    """The disk is full: as its parent."""

    kind = "disk_full"


@dataclass(frozen=True, slots=True)
class Entry:
    """A task, or a line that couldn't be used, that has ended. `line` goes to `target`."""

    key: str
    ok: bool
    target: Target
    digest: str
    line: bytes
    stats: dict[str, Any]


class Journal:
    """See the module. For one thread at a time; opening takes it for this process alone."""

    def __init__(self, path: Path, *, results: Path, errors: Path, sync: bool = True) -> None:
        """Open or begin a journal, and bring both files to what it says.

        Raises:
            ConfigError: another process has it, it is no journal, or results are there that it
                doesn't know; nothing was changed.
            UnwritableError: nothing is lost; try again when the disk can be used.
        """
        self.path = path
        self._files = {"results": results, "errors": errors}
        self._sync = sync
        self._fds: dict[str, int] = {}
        self._landed: dict[str, tuple[int, int]] = {}
        if not path.exists() and any(f.exists() and f.stat().st_size for f in self._files.values()):
            there = next(f for f in self._files.values() if f.exists() and f.stat().st_size)
            raise ConfigError(
                f"{there} is there already, and no {path.name} that says what is in it. Name "
                "another output, or move it away."
            )
        with disk_errors(path):
            try:
                refuse_foreign(path, _SCHEMA.partition(";")[2])
            except FileExistsError as error:
                raise ConfigError(
                    f"{path} is damaged or no journal, and is left alone. Move it and the results "
                    "away, or name another output."
                ) from error
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=0.5
            )
        try:
            self._open()
            with disk_errors(path):
                self._reconcile()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            use_wal(self._db, self.path, alone=True)
            self._db.execute(f"PRAGMA synchronous={'FULL' if self._sync else 'NORMAL'}")
            with self._transaction():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT OR IGNORE INTO meta VALUES ('version', ?)", (_VERSION,))
            version = self.meta("version")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise unwritable(self.path, error) from error
            raise ConfigError(
                f"Another keepwarm runs these tasks: it holds {self.path}. Wait for it, or stop it."
            ) from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"{self.path} is damaged or no journal ({error}). Move it and the results away to "
                "begin anew."
            ) from error
        if version != _VERSION:
            raise ConfigError(f"{self.path} was written by another version of Keepwarm.")

    def _reconcile(self) -> None:
        """Cut the files to what is known to be in them; the rest is appended again."""
        rows = self._db.execute("SELECT target, seq, size_bytes FROM landed").fetchall()
        for target, seq, size_bytes in rows:
            self._landed[target] = (seq, size_bytes)
        for target, path in self._files.items():
            seq, size_bytes = self._landed.get(target, (0, 0))
            there = path.stat().st_size if path.exists() else 0
            if there < size_bytes:
                gone = self._db.execute(
                    "SELECT count(*) FROM ended WHERE target=? AND seq<=? AND line IS NULL",
                    (target, seq),
                ).fetchone()[0]
                if gone:
                    raise ConfigError(
                        f"{path} has lost lines that {self.path.name} says had been written. Bring "
                        f"it back, or remove {self.path.name} to run all tasks again."
                    )
                self._landed[target] = (0, 0)
            if path.exists():
                os.truncate(path, self._landed.get(target, (0, 0))[1])
        self.flush()

    def close(self) -> None:
        """Give the files back."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._db.close()

    def meta(self, key: str) -> str | None:
        """A value kept with the journal."""
        row = self._db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return row[0] if row else None

    def forget_failures(self) -> int:
        """Have everything that has failed be run again; returns how much that is.

        What the error file says of it is removed; results stay.

        Raises:
            UnwritableError: nothing is forgotten.
        """
        with self._transaction():
            count = self._db.execute("DELETE FROM ended WHERE target='errors'").rowcount
            self._db.execute("DELETE FROM tries")
            self._landed["errors"] = (0, 0)
            self._note_landed()
        # A crash before this is made good on opening, as for any line that wasn't noted.
        with disk_errors(self.path):
            if self._files["errors"].exists():
                os.truncate(self._files["errors"], 0)
        return int(count)

    def ended(self) -> dict[str, tuple[bool, str]]:
        """What has ended: key -> whether well, and the task's digest."""
        with disk_errors(self.path):
            rows = self._db.execute("SELECT key, ok, digest FROM ended")
            return {key: (bool(ok), digest) for key, ok, digest in rows}

    def failures(self) -> dict[str, int]:
        """How often tasks that haven't ended were tried in vain."""
        with disk_errors(self.path):
            return dict(self._db.execute("SELECT key, failures FROM tries").fetchall())

    def stats(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What is known of each ended task and each fill, in the order of their ends."""
        with disk_errors(self.path):
            ended = self._db.execute("SELECT key, ok, stats FROM ended ORDER BY seq")
            tasks = [{**json.loads(s), "custom_id": k, "ok": bool(ok)} for k, ok, s in ended]
            fills = self._db.execute("SELECT stats FROM fills ORDER BY seq")
            return tasks, [json.loads(row[0]) for row in fills]

    def end(self, entries: Iterable[Entry]) -> None:
        """Tasks have ended. Those that had ended before are left as they were.

        Raises:
            DiskFullError: either nothing of it counts (`entries` can be given again), or all of it
                and only the files lag behind; giving it again does no harm in either case.
        """
        with self._transaction():
            for entry in entries:
                self._db.execute(
                    "INSERT OR IGNORE INTO ended (key, ok, target, digest, line, stats) "
                    "VALUES (?,?,?,?,?,?)",
                    (
                        entry.key,
                        entry.ok,
                        entry.target,
                        entry.digest,
                        entry.line,
                        json.dumps(entry.stats),
                    ),
                )
                self._db.execute("DELETE FROM tries WHERE key=?", (entry.key,))
            self._note_landed()
        self.flush()

    def fill(self, stats: dict[str, Any]) -> None:
        """A branch was filled."""
        with self._transaction():
            self._db.execute("INSERT INTO fills (stats) VALUES (?)", (json.dumps(stats),))

    def failed(self, key: str) -> None:
        """A task was tried in vain and will be tried again."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO tries VALUES (?, 1) "
                "ON CONFLICT (key) DO UPDATE SET failures = failures + 1",
                (key,),
            )

    def flush(self) -> None:
        """Append to the files what the journal has and they don't.

        Raises:
            UnwritableError: a file ends with the last line that fitted.
        """
        with disk_errors(self.path):
            self._flush()

    def _flush(self) -> None:
        for target in _TARGETS:
            seq, size_bytes = self._landed.get(target, (0, 0))
            rows = self._db.execute(
                "SELECT seq, line FROM ended WHERE target=? AND seq>? ORDER BY seq", (target, seq)
            )
            appended = False
            for row_seq, line in rows:
                self._append(target, bytes(line), size_bytes)
                size_bytes += len(line)
                self._landed[target] = (row_seq, size_bytes)
                appended = True
            if appended and self._sync:
                with disk_errors(self._files[target]):
                    os.fsync(self._fds[target])

    def finish(self) -> None:
        """All has ended: note where the files end, and let the journal's copy of the lines go."""
        with self._transaction():
            self._note_landed()
            self._db.execute("UPDATE ended SET line=NULL")
        with disk_errors(self.path):
            self._db.execute("VACUUM")

    def _append(self, target: str, line: bytes, at_bytes: int) -> None:
        path = self._files[target]
        with disk_errors(path):
            if target not in self._fds:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._fds[target] = os.open(path, flags, 0o600)
            fd = self._fds[target]
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(fd, rest) :]
            except OSError:
                os.ftruncate(fd, at_bytes)
                raise

    def _note_landed(self) -> None:
        for target, (seq, size_bytes) in self._landed.items():
            self._db.execute(
                "INSERT OR REPLACE INTO landed VALUES (?,?,?)", (target, seq, size_bytes)
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with disk_errors(self.path), transaction(self._db):
            yield


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All statements inside, or none; `db` begins none by itself."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say of any error of the disk or of SQLite what it means for whoever runs tasks.

    Raises:
        UnwritableError: it may pass.
        ConfigError: it won't: the file is damaged.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError | sqlite3.Error) -> KeepwarmError:
    """What a disk's or SQLite's error is to be called; see `disk_errors`."""
    full = DiskFullError(f"The disk of {path} is full. What has ended is kept. Free some space.")
    if isinstance(error, OSError):
        if error.errno in _FULL:
            return full
        return UnwritableError(
            f"{path} can't be written: {error.strerror or error}. What has ended is kept."
        )
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    # A full disk shows as SQLITE_FULL, or as an I/O error where the write-ahead log grows.
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return full
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return ConfigError(f"{path} is damaged ({error}). Move it away.")
    return UnwritableError(f"{path} can't be used now: {error}. What has ended is kept.")
