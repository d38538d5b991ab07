"""The last few thousand requests and their explanations, and what was spared since ever: one file.

Theory of operation. One SQLite file beside the store, private to the user, written by one thread.
Requests are written some at a time, since a transaction costs more than explaining a request does:
before anything is read, when `_AT_ONCE` wait, and when the owner says so. It is a record, not
a ledger: a crash or a write that fails costs the record of those and is logged once, a file of
ours that can't be read is set aside and a new one begun. Somebody else's file under that name, and
one of a newer version, is left alone: requests are remembered in memory then. Text of prompts is in
it only while the settings allow that; a later start without that leave takes it out again. Several
deployments may share the file.

Invariants:
- A row is only ever read under the namespace it was written for.
- At most `keep` rows, give or take `_PRUNE_EVERY` and `_AT_ONCE`.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from keepwarm.sqlite_file import refuse_foreign, use_wal

log = logging.getLogger("keepwarm")

KEEP = 5000
FILE_NAME = "requests.sqlite3"
_PRUNE_EVERY = 256
_AT_ONCE = 64
_BUSY_S = 2.0
# People type the first letters of an id.
_SHORTEST_ID = 6
_VERSION = 1
_SCHEMA = """
CREATE TABLE requests (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, namespace TEXT NOT NULL,
  at_s REAL NOT NULL, cause TEXT NOT NULL, plan TEXT NOT NULL, fingerprint TEXT NOT NULL,
  opening BLOB NOT NULL, has_text INTEGER NOT NULL, record BLOB NOT NULL);
CREATE INDEX requests_of ON requests (namespace, number);
CREATE INDEX requests_opening ON requests (namespace, opening);
CREATE TABLE totals (
  day TEXT NOT NULL, namespace TEXT NOT NULL, requests INTEGER NOT NULL, warm INTEGER NOT NULL,
  cold INTEGER NOT NULL, decoded INTEGER NOT NULL, spared_s REAL NOT NULL,
  PRIMARY KEY (day, namespace)) WITHOUT ROWID;
CREATE TABLE fingerprints (fingerprint TEXT PRIMARY KEY, parts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRequest:
    """One request as it is written. `record` is what is shown; counts in tokens.

    `opening` is a digest of how the prompt begins, whatever the fingerprint; `day` is the local
    date (2026-11-24).
    """

    id: str
    namespace: str
    at_s: float
    day: str
    cause: str
    plan: str
    fingerprint: str
    opening: bytes
    has_text: bool
    record: dict[str, Any]
    warm_tokens: int = 0
    cold_tokens: int = 0
    decoded_tokens: int = 0
    spared_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over requests. `spared_s` is the prefill that warm tokens would have cost."""

    requests: int = 0
    warm_tokens: int = 0
    cold_tokens: int = 0
    decoded_tokens: int = 0
    spared_s: float = 0.0


class History:
    """See the module. Lives on one thread."""

    def __init__(
        self,
        path: Path,
        *,
        keeps_text: bool,
        keep: int = KEEP,
        without_text: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """Open or begin.

        Args:
            path: the file; its directory must be there.
            keeps_text: whether text of prompts may stay in it.
            keep: how many requests.
            without_text: takes the text out of a record.
        """
        self._keep = keep
        self._since_prune = 0
        self._unwritten: list[PastRequest] = []
        self._is_broken = False
        self._db = _open(path)
        self.salt: bytes = self._salt()
        if not keeps_text:
            self._forget_text(without_text)

    def close(self) -> None:
        """Write what there is and close the file."""
        self.write()
        self._db.close()

    def add(self, entry: PastRequest) -> None:
        """Take in one request; it is counted and found from now on."""
        self._unwritten.append(entry)
        if len(self._unwritten) >= _AT_ONCE:
            self.write()

    @property
    def is_written(self) -> bool:
        """Whether all that was taken in is in the file."""
        return not self._unwritten

    def write(self) -> None:
        """Write what was taken in."""
        entries, self._unwritten = self._unwritten, []
        if entries:
            self._try(lambda: self._write(entries), None)

    def _write(self, entries: list[PastRequest]) -> None:
        with self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO requests (id, namespace, at_s, cause, plan, fingerprint,"
                " opening, has_text, record) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(entry.id, entry.namespace, entry.at_s, entry.cause, entry.plan),
                        *(entry.fingerprint, entry.opening, entry.has_text),
                        msgspec.json.encode(entry.record),
                    )
                    for entry in entries
                ],
            )
            self._db.executemany(
                "INSERT INTO totals VALUES (?, ?, 1, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " requests = requests + 1, warm = warm + excluded.warm,"
                " cold = cold + excluded.cold, decoded = decoded + excluded.decoded,"
                " spared_s = spared_s + excluded.spared_s",
                [
                    (
                        *(entry.day, entry.namespace, entry.warm_tokens, entry.cold_tokens),
                        *(entry.decoded_tokens, entry.spared_s),
                    )
                    for entry in entries
                ],
            )
            self._since_prune += len(entries)
            if self._since_prune >= _PRUNE_EVERY:
                self._since_prune = 0
                self._db.execute(
                    "DELETE FROM requests WHERE number <= (SELECT MAX(number) FROM requests) - ?",
                    (self._keep,),
                )

    def get(self, request_id: str, *, namespace: str) -> dict[str, Any] | None:
        """One request's record by its id, or enough of its beginning to be the only one.

        None if it isn't there or isn't this namespace's.
        """
        if len(request_id) < _SHORTEST_ID:
            return None
        found = self._rows(
            "SELECT record FROM requests WHERE namespace = ? AND id >= ? AND id < ? LIMIT 2",
            *(namespace, request_id, request_id + "\U0010ffff"),
        )
        return found[0] if len(found) == 1 else None

    def latest(
        self, *, namespace: str, limit: int, before_s: float | None = None, cause: str | None = None
    ) -> list[dict[str, Any]]:
        """Records, the latest first; those before a time or of one cause, if asked for."""
        return self._rows(
            "SELECT record FROM requests WHERE namespace = ? AND (? IS NULL OR at_s < ?)"
            " AND (? IS NULL OR cause = ?) ORDER BY number DESC LIMIT ?",
            *(namespace, before_s, before_s, cause, cause, limit),
        )

    def forget(self, namespace: str) -> int | None:
        """Remove all of one namespace; returns how many requests that were, None if it failed."""
        self.write()
        return self._try(lambda: _forget(self._db, namespace), None)

    def knows(self, namespace: str) -> bool:
        """Whether this namespace has asked anything before."""
        return bool(self._read("SELECT 1 FROM totals WHERE namespace = ? LIMIT 1", namespace))

    def last_opened(
        self, opening: bytes, *, namespace: str, before_s: float
    ) -> tuple[str, float] | None:
        """The fingerprint and time of the last prompt that began like this; None if none did.

        What ended after `before_s` was asked at the same time, and had nothing warm to leave.
        """
        found = self._read(
            "SELECT fingerprint, at_s FROM requests WHERE namespace = ? AND opening = ?"
            " AND at_s + json_extract(CAST(record AS TEXT), '$.timing.total_s') <= ?"
            " ORDER BY number DESC LIMIT 1",
            *(namespace, opening, before_s),
        )
        return found[0] if found else None

    def describe(self, fingerprint: str, parts: dict[str, str]) -> None:
        """Note what a fingerprint is made of."""

        def write() -> None:
            with self._db:
                self._db.execute(
                    "INSERT OR REPLACE INTO fingerprints VALUES (?, ?)",
                    (fingerprint, msgspec.json.encode(parts).decode()),
                )

        self._try(write, None)

    def described(self, fingerprint: str) -> dict[str, str]:
        """What a fingerprint is made of; empty if that wasn't noted."""
        found = self._read("SELECT parts FROM fingerprints WHERE fingerprint = ?", fingerprint)
        return msgspec.json.decode(found[0][0], type=dict[str, str]) if found else {}

    def totals(self, *, namespace: str, day: str | None = None) -> Totals:
        """Sums of one day, or of all days there were."""
        found = self._read(
            "SELECT COALESCE(SUM(requests), 0), COALESCE(SUM(warm), 0), COALESCE(SUM(cold), 0),"
            " COALESCE(SUM(decoded), 0), COALESCE(SUM(spared_s), 0.0) FROM totals"
            " WHERE namespace = ? AND (? IS NULL OR day = ?)",
            *(namespace, day, day),
        )
        return Totals(*found[0]) if found else Totals()

    def _rows(self, sql: str, *values: object) -> list[dict[str, Any]]:
        return [msgspec.json.decode(raw) for (raw,) in self._read(sql, *values)]

    def _read(self, sql: str, *values: object) -> list[Any]:
        self.write()
        return self._try(lambda: self._db.execute(sql, values).fetchall(), [])

    def _try(self, work: Callable[[], T], otherwise: T) -> T:
        try:
            result = work()
        except sqlite3.Error as error:
            if not self._is_broken:
                log.warning("the history of requests can't be used for now: %s", error)
            self._is_broken = True
            return otherwise
        self._is_broken = False
        return result

    def _salt(self) -> bytes:
        """What digests of prompts in this file are keyed with."""
        found = self._read("SELECT value FROM meta WHERE key = 'salt'")
        if found:
            return bytes(found[0][0])
        salt = secrets.token_bytes(16)

        def write() -> None:
            with self._db:
                self._db.execute("INSERT INTO meta VALUES ('salt', ?)", (salt,))

        self._try(write, None)
        return salt

    def _forget_text(self, without_text: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        def forget() -> None:
            rows = self._db.execute("SELECT number, record FROM requests WHERE has_text").fetchall()
            with self._db:
                for number, raw in rows:
                    bare = msgspec.json.encode(without_text(msgspec.json.decode(raw)))
                    self._db.execute(
                        "UPDATE requests SET record = ?, has_text = 0 WHERE number = ?",
                        (bare, number),
                    )
            if rows:
                # Deleted text may be in the write-ahead log still.
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

        self._try(forget, None)


def forget_requests(path: Path, namespace: str) -> int | None:
    """Remove one namespace's requests from a file; None if it can't be written or read."""
    try:
        with closing(_connect(path)) as db:
            return _forget(db, namespace)
    except (sqlite3.Error, OSError):
        return None


def _forget(db: sqlite3.Connection, namespace: str) -> int:
    with db:
        found = db.execute("DELETE FROM requests WHERE namespace = ?", (namespace,))
        db.execute("DELETE FROM totals WHERE namespace = ?", (namespace,))
    # Deleted text may be in the write-ahead log still.
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return found.rowcount


def _open(path: Path) -> sqlite3.Connection:
    """Open, or set aside what can't be used and begin anew; in memory if even that fails."""
    for attempt in range(2):
        try:
            return _connect(path)
        except (sqlite3.DatabaseError, OSError) as error:
            # Locked, no disk to write to, not ours: nothing is wrong with the file itself.
            if attempt or isinstance(error, sqlite3.OperationalError | OSError):
                log.warning("requests are remembered in memory only: %s", error)
                break
            aside = path.with_name(f"{path.name}.unreadable-{int(time.time())}")
            log.warning("%s can't be read (%s): set aside as %s", path, error, aside.name)
            for suffix in ("", "-wal", "-shm"):
                old = path.with_name(path.name + suffix)
                if old.exists():
                    old.rename(aside.with_name(aside.name + suffix))
    db = sqlite3.connect(":memory:", check_same_thread=False)
    db.executescript(_SCHEMA)
    return db


def _connect(path: Path) -> sqlite3.Connection:
    refuse_foreign(path, _SCHEMA)
    # SQLite gives its other files the same mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)
    db = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)
    try:
        use_wal(db, path)
        # The last requests before a power cut are no loss; the file stays sound.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA secure_delete = ON")
        with closing(db.execute("PRAGMA user_version")) as cursor:
            version = cursor.fetchone()[0]
        if version == 0:
            db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        elif version > _VERSION:
            raise OSError(f"{path} was written by a newer Keepwarm, and is left alone")
        elif version != _VERSION:
            raise sqlite3.DatabaseError(f"its version is {version}, not {_VERSION}")
    except BaseException:
        db.close()
        raise
    return db
