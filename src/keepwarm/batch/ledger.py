"""Files and batches of the API: what there is of them, durable and private.

One SQLite file holds what is said about them; contents lie beside it, one file each, under ids that
Keepwarm makes. A batch's results are written straight into the file they will be, which is listed
once the batch has ended. Everything is the user's alone (0700, 0600), and every look-up is within
one namespace: another's file is a file that doesn't exist.

The directory may hold other people's files. So a name is written down before its file is made, or
in the transaction that deletes it (`refuse`), and only what is written down there is ever removed:
what a crash left goes when the next upload comes.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from keepwarm.batch.job import BatchPaths
from keepwarm.batch.journal import DiskFullError, disk_errors, transaction
from keepwarm.errors import ConfigError, ConflictError, NotFoundError
from keepwarm.sqlite_file import refuse_foreign, use_wal

log = logging.getLogger("keepwarm")

# What a batch can still come to.
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  id TEXT PRIMARY KEY, namespace TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
  size_bytes INTEGER NOT NULL, created_at INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS batches (
  seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, namespace TEXT NOT NULL,
  status TEXT NOT NULL, output_id TEXT NOT NULL, error_id TEXT NOT NULL, object TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS unfinished ON batches (status, seq);
CREATE TABLE IF NOT EXISTS refuse (name TEXT PRIMARY KEY) WITHOUT ROWID;
"""
# Names that we make: an upload under way, a file, a batch's journal and what SQLite puts beside it.
_OURS = re.compile(r"part-[0-9a-f]{32}|file-[0-9a-f]{24}|batch_[0-9a-f]{24}\.journal(-wal|-shm)?")


class Ledger:
    """See the module. Its methods may be called from several threads, one at a time each.

    Each of them raises UnwritableError if the disk can't be used now, and ConfigError if the
    ledger's own file is damaged; nothing has changed then.
    """

    def __init__(self, directory: Path) -> None:
        """Open or begin it.

        Raises:
            ConfigError: another process has it, or it can't be used.
        """
        self.directory = directory
        self._files = directory / "files"
        self._journals = directory / "journals"
        self._database = directory / "batches.sqlite"
        self._lock = threading.RLock()
        self._uploading: set[str] = set()
        try:
            for path in (directory, self._files, self._journals):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            database = self._database
            refuse_foreign(database, _SCHEMA)
            os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._fd = os.open(directory / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"{directory} can't be used for batches: {error.strerror or error}."
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(
                f"Another Keepwarm keeps its batches in {directory}. Give this one another "
                "batch.dir."
            ) from error
        self._db = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
        try:
            use_wal(self._db, database, alone=True)
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except (sqlite3.OperationalError, OSError) as error:
            self.close()
            raise ConfigError(f"{database} can't be used now: {error}.") from error
        except sqlite3.DatabaseError as error:
            self.close()
            raise ConfigError(f"{database} is damaged ({error}). Move it away.") from error

    def close(self) -> None:
        """Give it back."""
        with self._lock:
            self._db.close()
            os.close(self._fd)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock, disk_errors(self._database):
            yield

    def part(self) -> Path:
        """Where an upload is written before it is a file. `drop_part` or `add_file` ends it.

        Raises: DiskFullError: its name can't be noted.
        """
        name = f"part-{uuid.uuid4().hex}"
        with self._lock:
            try:
                self._clear_refuse()
                self._db.execute("INSERT INTO refuse VALUES (?)", (name,))
            except sqlite3.Error as error:
                raise DiskFullError(f"No file can be taken in: {error}.") from error
            self._uploading.add(name)
        return self._files / name

    def drop_part(self, part: Path) -> None:
        """An upload is over; what didn't become a file is removed. Safe to call twice."""
        with self._lock:
            if part.name in self._uploading:
                self._uploading.discard(part.name)
                self._clear_refuse()

    def _clear_refuse(self) -> None:
        """Remove what isn't needed any more. What can't be removed now is tried again later."""
        for (name,) in self._db.execute("SELECT name FROM refuse").fetchall():
            if name in self._uploading or not _OURS.fullmatch(name):
                continue
            folder = self._journals if name.startswith("batch_") else self._files
            try:
                (folder / name).unlink(missing_ok=True)
                self._db.execute("DELETE FROM refuse WHERE name=?", (name,))
            except (OSError, sqlite3.Error) as error:
                log.warning("%s stays in %s for now: %s", name, folder, error)

    def content(self, file_id: str, namespace: str) -> Path:
        """A file's content. Raises: NotFoundError."""
        self.file(file_id, namespace)
        return self._files / file_id

    def used_bytes(self) -> int:
        """What our files take, uploads and unfinished results included."""
        with self._locked():
            names = {name for (name,) in self._db.execute("SELECT id FROM files")}
            names |= {name for (name,) in self._db.execute("SELECT name FROM refuse")}
            for pair in self._db.execute("SELECT output_id, error_id FROM batches"):
                names |= set(pair)
        with disk_errors(self._files), os.scandir(self._files) as entries:
            return sum(e.stat(follow_symlinks=False).st_size for e in entries if e.name in names)

    def add_file(
        self, part: Path, *, namespace: str, filename: str, purpose: str
    ) -> dict[str, Any]:
        """Make a file of what was uploaded to `part`; returns its object."""
        file_id = f"file-{uuid.uuid4().hex[:24]}"
        with disk_errors(part), self._lock:
            size_bytes = part.stat().st_size
            self._db.execute("INSERT INTO refuse VALUES (?)", (file_id,))
            part.rename(self._files / file_id)
        with self._locked(), transaction(self._db):
            self._db.execute(
                "INSERT INTO files VALUES (?,?,?,?,?,?)",
                (file_id, namespace, filename[:255], purpose, size_bytes, int(time.time())),
            )
            self._uploading.discard(part.name)
            self._db.execute("DELETE FROM refuse WHERE name IN (?,?)", (part.name, file_id))
        return self.file(file_id, namespace)

    def file(self, file_id: str, namespace: str) -> dict[str, Any]:
        """A file's object. Raises: NotFoundError."""
        with self._locked():
            row = self._db.execute(
                "SELECT id, filename, purpose, size_bytes, created_at FROM files "
                "WHERE id=? AND namespace=?",
                (file_id, namespace),
            ).fetchone()
        if row is None:
            raise NotFoundError(f"There is no file {file_id[:80]!r}.")
        return _file_object(row)

    def list_files(self, namespace: str, *, purpose: str | None = None) -> list[dict[str, Any]]:
        """All files of a namespace, the newest first."""
        with self._locked():
            rows = self._db.execute(
                "SELECT id, filename, purpose, size_bytes, created_at FROM files "
                "WHERE namespace=? AND (? IS NULL OR purpose=?) ORDER BY rowid DESC",
                (namespace, purpose, purpose),
            ).fetchall()
        return [_file_object(row) for row in rows]

    def delete_file(self, file_id: str, namespace: str) -> None:
        """Remove a file.

        Raises:
            NotFoundError: there is none.
            ConflictError: a batch that hasn't ended reads it.
        """
        with self._locked():
            self.file(file_id, namespace)
            for batch in self.unfinished():
                if batch["input_file_id"] == file_id:
                    raise ConflictError(
                        f"The batch {batch['id']} reads this file. Cancel it first, or wait."
                    )
            with transaction(self._db):
                self._db.execute("DELETE FROM files WHERE id=?", (file_id,))
                self._db.execute("INSERT OR IGNORE INTO refuse VALUES (?)", (file_id,))
            self._clear_refuse()

    def add_batch(
        self,
        *,
        namespace: str,
        input_file_id: str,
        endpoint: str,
        window: str,
        window_s: int,
        metadata: Mapping[str, str] | None,
    ) -> dict[str, Any]:
        """Begin a batch; returns its object. Raises: NotFoundError: there is no such file."""
        with self._locked():
            self.file(input_file_id, namespace)
            now = int(time.time())
            batch = {
                "id": f"batch_{uuid.uuid4().hex[:24]}",
                "object": "batch",
                "endpoint": endpoint,
                "errors": None,
                "input_file_id": input_file_id,
                "completion_window": window,
                "status": "validating",
                "output_file_id": None,
                "error_file_id": None,
                "created_at": now,
                "in_progress_at": None,
                "expires_at": now + window_s,
                "finalizing_at": None,
                "completed_at": None,
                "failed_at": None,
                "expired_at": None,
                "cancelling_at": None,
                "cancelled_at": None,
                "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "metadata": dict(metadata) if metadata else None,
            }
            ids = [f"file-{uuid.uuid4().hex[:24]}" for _ in range(2)]
            self._db.execute(
                "INSERT INTO batches (id, namespace, status, output_id, error_id, object) "
                "VALUES (?,?,?,?,?,?)",
                (batch["id"], namespace, "validating", *ids, msgspec.json.encode(batch).decode()),
            )
        return batch

    def batch(self, batch_id: str, namespace: str) -> dict[str, Any]:
        """A batch's object. Raises: NotFoundError."""
        with self._locked():
            row = self._db.execute(
                "SELECT object FROM batches WHERE id=? AND namespace=?", (batch_id, namespace)
            ).fetchone()
        if row is None:
            raise NotFoundError(f"There is no batch {batch_id[:80]!r}.")
        return dict(msgspec.json.decode(row[0]))

    def status(self, batch_id: str) -> str:
        """A batch's status, whose ever it is."""
        with self._locked():
            row = self._db.execute("SELECT status FROM batches WHERE id=?", (batch_id,)).fetchone()
        return str(row[0])

    def list_batches(self, namespace: str) -> list[dict[str, Any]]:
        """All batches of a namespace, the newest first."""
        with self._locked():
            rows = self._db.execute(
                "SELECT object FROM batches WHERE namespace=? ORDER BY seq DESC", (namespace,)
            ).fetchall()
        return [msgspec.json.decode(row[0]) for row in rows]

    def unfinished(self) -> list[dict[str, Any]]:
        """Batches of all namespaces that haven't ended, the oldest first, with `namespace`."""
        marks = ",".join("?" * len(UNFINISHED))
        with self._locked():
            rows = self._db.execute(
                f"SELECT namespace, object FROM batches WHERE status IN ({marks}) "  # noqa: S608
                "ORDER BY seq",
                UNFINISHED,
            ).fetchall()
        return [{**msgspec.json.decode(raw), "namespace": name} for name, raw in rows]

    def change(self, batch_id: str, **changes: Any) -> dict[str, Any]:
        """Change fields of a batch; returns its object. A status also notes its time."""
        with self._locked():
            row = self._db.execute("SELECT object FROM batches WHERE id=?", (batch_id,)).fetchone()
            batch = {**msgspec.json.decode(row[0]), **changes}
            stamp = f"{batch['status']}_at"
            if "status" in changes and batch.get(stamp, 0) is None:
                batch[stamp] = int(time.time())
            self._db.execute(
                "UPDATE batches SET status=?, object=? WHERE id=?",
                (batch["status"], msgspec.json.encode(batch).decode(), batch_id),
            )
        return batch

    def paths(self, batch_id: str) -> BatchPaths:
        """A batch's files."""
        with self._locked():
            output_id, error_id, raw = self._db.execute(
                "SELECT output_id, error_id, object FROM batches WHERE id=?", (batch_id,)
            ).fetchone()
        return BatchPaths(
            self._files / msgspec.json.decode(raw)["input_file_id"],
            self._files / output_id,
            self._files / error_id,
            self._journals / f"{batch_id}.journal",
        )

    def finish(self, batch_id: str, *, status: str, **changes: Any) -> dict[str, Any]:
        """End a batch: its results become files, and its journal isn't needed any more."""
        paths = self.paths(batch_id)
        with self._locked():
            namespace = self._db.execute(
                "SELECT namespace FROM batches WHERE id=?", (batch_id,)
            ).fetchone()[0]
            with transaction(self._db):
                for key, path in (
                    ("output_file_id", paths.results),
                    ("error_file_id", paths.errors),
                ):
                    if path.exists() and path.stat().st_size:
                        kind = key.removesuffix("_file_id")
                        self._db.execute(
                            "INSERT OR REPLACE INTO files VALUES (?,?,?,?,?,?)",
                            (
                                path.name,
                                namespace,
                                f"{batch_id}_{kind}.jsonl",
                                "batch_output",
                                path.stat().st_size,
                                int(time.time()),
                            ),
                        )
                        changes[key] = path.name
                    else:
                        self._db.execute("INSERT OR IGNORE INTO refuse VALUES (?)", (path.name,))
                for suffix in ("", "-wal", "-shm"):
                    name = paths.journal.name + suffix
                    self._db.execute("INSERT OR IGNORE INTO refuse VALUES (?)", (name,))
                batch = self.change(batch_id, status=status, **changes)
            self._clear_refuse()
        return batch


def _file_object(row: tuple[Any, ...]) -> dict[str, Any]:
    file_id, filename, purpose, size_bytes, created_at = row
    return {
        "id": file_id,
        "object": "file",
        "bytes": size_bytes,
        "created_at": created_at,
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "expires_at": None,
        "status_details": None,
    }
