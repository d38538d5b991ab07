"""The index: one SQLite file a fingerprint, which says what the extent files hold.

Theory of operation. The index is the truth about what is kept; a file that it doesn't name is
refuse. It is read once, on opening, into the catalogue; after that it is only written. WAL with
synchronous=FULL: a save costs one more flush, and in return "saved" means saved.
Deletions commit before files go, insertions after files came, so that a cut between the two leaves
refuse, not a row without a file. (A deletion whose commit the disk loses leaves a row without
its file; such rows are dropped on opening.)

A file that SQLite calls damaged, or that holds something else, is unusable (`IndexUnusableError`),
and the store sets it aside. Anything else that goes wrong (a full disk, a lock, a bad sector, an
index of a newer version) says nothing against the file: it is left as it is. Rows that make no
sense by themselves are passed over (`check_rows`).
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from keepwarm.errors import SnapshotError
from keepwarm.sqlite_file import shares_memory_safely, use_wal
from keepwarm.store.disk import Disk, disk_errors
from keepwarm.store.types import KeptMark, Origin, Pin

SCHEMA_VERSION = 1

# Marks and boundaries are clustered by extent: a save appends to one page of each instead of
# touching one page a digest, and an eviction finds its marks without a second index.
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE extents (
  id INTEGER PRIMARY KEY, parent INTEGER, lo INTEGER NOT NULL, namespace TEXT NOT NULL,
  whole INTEGER NOT NULL, bytes INTEGER NOT NULL, checksum BLOB NOT NULL, origin TEXT NOT NULL,
  prefill_s REAL NOT NULL, created_s REAL NOT NULL, used_s REAL NOT NULL, heat REAL NOT NULL,
  uses INTEGER NOT NULL, tokens BLOB NOT NULL);
CREATE TABLE boundaries (
  extent_id INTEGER NOT NULL, at INTEGER NOT NULL, bytes INTEGER NOT NULL, checksum BLOB NOT NULL,
  PRIMARY KEY (extent_id, at)) WITHOUT ROWID;
CREATE TABLE marks (
  extent_id INTEGER NOT NULL, namespace TEXT NOT NULL, digest BLOB NOT NULL, at INTEGER NOT NULL,
  exact INTEGER NOT NULL, PRIMARY KEY (extent_id, namespace, digest)) WITHOUT ROWID;
CREATE TABLE pins (
  name TEXT PRIMARY KEY, extent_id INTEGER NOT NULL, at INTEGER NOT NULL, origin TEXT NOT NULL,
  digest BLOB, prefill_s REAL NOT NULL, created_s REAL NOT NULL, used_s REAL, uses INTEGER NOT NULL
  ) WITHOUT ROWID;
"""

_ORIGINS = ", ".join(f"'{origin.value}'" for origin in Origin)


def _integers(*columns: str) -> str:
    return " AND ".join(f"typeof({name}) = 'integer' AND {name} >= 0" for name in columns)


def _numbers(*columns: str) -> str:
    return " AND ".join(
        f"typeof({name}) IN ('real', 'integer') AND {name} BETWEEN -1e18 AND 1e18"
        for name in columns
    )


# What a row must be to be believed, by table. Tokens, places and payload are sealed besides.
_SENSE = {
    "extents": f"{_integers('id', 'lo', 'whole', 'bytes', 'uses')} AND id > 0"
    " AND typeof(parent) IN ('null', 'integer') AND typeof(namespace) = 'text'"
    " AND typeof(checksum) = 'blob' AND typeof(tokens) = 'blob'"
    f" AND length(tokens) > 0 AND length(tokens) % 4 = 0 AND origin IN ({_ORIGINS})"
    f" AND {_numbers('prefill_s', 'created_s', 'used_s', 'heat')}",
    "boundaries": f"{_integers('extent_id', 'at', 'bytes')} AND typeof(checksum) = 'blob'",
    "marks": f"{_integers('extent_id', 'at', 'exact')} AND typeof(namespace) = 'text'"
    " AND typeof(digest) = 'blob'",
    "pins": f"{_integers('extent_id', 'at', 'uses')} AND typeof(name) = 'text'"
    f" AND origin IN ({_ORIGINS}) AND typeof(digest) IN ('null', 'blob')"
    f" AND {_numbers('prefill_s', 'created_s')}"
    " AND typeof(used_s) IN ('null', 'real', 'integer')",
}


class ExtentRow(NamedTuple):
    """One extent as the index has it; the columns of `extents` in their order."""

    id: int
    parent: int | None
    lo: int
    namespace: str
    whole: int
    size_bytes: int
    checksum: bytes
    origin: str
    prefill_s: float
    created_s: float
    used_s: float
    heat: float
    uses: int
    tokens: bytes

    @property
    def seal(self) -> bytes:
        """What the checksum covers before the payload: the row's own identity, tokens included.

        So a row whose tokens, place or namespace were damaged fails like a damaged file.
        """
        place = struct.pack("<4q", self.id, self.parent or 0, self.lo, self.whole)
        return place + self.namespace.encode() + b"\0" + self.tokens


class BoundaryRow(NamedTuple):
    """State that holds only at `at`, a position in the extent's `(lo, hi]`."""

    extent_id: int
    at: int
    size_bytes: int
    checksum: bytes

    @property
    def seal(self) -> bytes:
        """What the checksum covers before the payload."""
        return struct.pack("<2q", self.extent_id, self.at)


class Use(NamedTuple):
    """What is remembered of an extent's uses."""

    extent_id: int
    used_s: float
    heat: float
    uses: int


class IndexUnusableError(Exception):
    """The file isn't an index that can be used here; the message says why. Never leaves `open`."""


class Index:
    """The connection. Lives on one thread at a time; errors are sqlite3's own."""

    def __init__(
        self, path: Path, *, disk: Disk, identity: dict[str, str], alone: bool = False
    ) -> None:
        """Open or create the index.

        `identity` (fingerprint, layout, ...) must be what it was created with. `alone`: keep
        SQLite's shared memory in ours, which needs no room on a full disk; nobody else can read
        the index meanwhile.

        Raises: IndexUnusableError; SnapshotError('no_space', 'index', 'io') for what says nothing
        against the file. The connection is closed then.
        """
        self.path = path
        self._disk = disk
        with disk_errors(f"opening {path.name}"):
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            with disk_errors(f"opening {path.name}"), unusable_if_damaged():
                path.chmod(0o600)
                use_wal(self._db, path, alone=alone)
                self._set_up(identity)
        except BaseException:
            self._db.close()
            raise

    def _set_up(self, identity: dict[str, str]) -> None:
        self._db.execute("PRAGMA synchronous=FULL")
        # Not a cut-off: SQLite moves the log into the file by itself at 1,000 pages.
        self._db.execute("PRAGMA journal_size_limit=4194304")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._create(identity)
        elif version > SCHEMA_VERSION:
            raise SnapshotError(
                f"{self.path.name} was written by a newer Keepwarm (schema {version})",
                reason="index",
            )
        elif version != SCHEMA_VERSION:
            raise IndexUnusableError(f"schema {version}, {SCHEMA_VERSION} is known")
        found = dict(self._db.execute("SELECT key, value FROM meta"))
        if found != identity:
            differs = sorted(k for k in {*found, *identity} if found.get(k) != identity.get(k))
            raise IndexUnusableError(f"it was made for another {', '.join(map(str, differs))}")

    def _create(self, identity: dict[str, str]) -> None:
        with self.transaction():
            for statement in _SCHEMA.split(";\n"):
                self._db.execute(statement)
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", identity.items())
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def check_rows(self) -> int:
        """How many rows make no sense, whatever wrote them; reading passes over them.

        SQLite keeps any type in any column, so rows are checked before they are believed.
        """
        bad = 0
        for table, sense in _SENSE.items():
            query = f"SELECT COUNT(*) FROM {table} WHERE NOT COALESCE({sense}, 0)"  # noqa: S608
            bad += self._db.execute(query).fetchone()[0]
        return bad

    def drop_senseless(self) -> None:
        """Inside a transaction: the rows that `check_rows` counts."""
        for table, sense in _SENSE.items():
            self._db.execute(f"DELETE FROM {table} WHERE NOT COALESCE({sense}, 0)")  # noqa: S608

    def last_id(self) -> int:
        """The highest extent id that any row names; 0 if there is none."""
        return int(
            self._db.execute(
                "SELECT MAX(COALESCE((SELECT MAX(id) FROM extents), 0),"
                " COALESCE((SELECT MAX(extent_id) FROM boundaries"
                "   WHERE typeof(extent_id) = 'integer'), 0))"
            ).fetchone()[0]
        )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements inside, or none. Raises: sqlite3.Error, after rolling back."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._disk.commit(self._db)
        except Exception:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Let go; what was committed is on the disk."""
        self._db.close()

    def extents(self) -> Iterator[ExtentRow]:
        """All rows that make sense, parents before children."""
        return map(ExtentRow._make, self._sensible("extents", order="id"))

    def boundaries(self) -> Iterator[BoundaryRow]:
        """All rows that make sense, in no particular order."""
        return map(BoundaryRow._make, self._sensible("boundaries"))

    def marks(self) -> Iterator[tuple[int, int, int, str, bytes]]:
        """All rows that make sense: extent id, at, exact, namespace, digest."""
        return self._sensible("marks", columns="extent_id, at, exact, namespace, digest")

    def marks_of(self, extent_id: int) -> list[tuple[str, bytes]]:
        """The marks in one extent: namespace and digest."""
        found = self._db.execute(
            "SELECT namespace, digest FROM marks WHERE extent_id = ?", (extent_id,)
        )
        return found.fetchall()

    def pins(self) -> Iterator[Pin]:
        """All rows that make sense, by name."""
        for name, extent_id, at, origin, *rest in self._sensible("pins", order="name"):
            yield Pin(name, extent_id, at, Origin(origin), *rest)

    def _sensible(
        self, table: str, *, columns: str = "*", order: str | None = None
    ) -> Iterator[tuple[Any, ...]]:
        query = f"SELECT {columns} FROM {table} WHERE {_SENSE[table]}"  # noqa: S608
        return self._db.execute(f"{query} ORDER BY {order}" if order else query)

    def add_extent(self, row: ExtentRow) -> None:
        """Inside a transaction, after its file is in place."""
        self._db.execute(f"INSERT INTO extents VALUES ({', '.join('?' * 14)})", row)  # noqa: S608

    def add_boundary(self, row: BoundaryRow) -> None:
        """Inside a transaction, after its file is in place."""
        self._db.execute("INSERT INTO boundaries VALUES (?, ?, ?, ?)", row)

    def put_mark(self, extent_id: int, namespace: str, mark: KeptMark) -> None:
        """Inside a transaction; replaces the same digest's mark in the same extent."""
        self._db.execute(
            "INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?, ?)",
            (extent_id, namespace, mark.digest, mark.at_tokens, int(mark.is_exact)),
        )

    def drop_mark(self, extent_id: int, namespace: str, digest: bytes) -> None:
        """Inside a transaction."""
        self._db.execute(
            "DELETE FROM marks WHERE extent_id = ? AND namespace = ? AND digest = ?",
            (extent_id, namespace, digest),
        )

    def put_pin(self, pin: Pin) -> None:
        """Inside a transaction; replaces the pin of that name."""
        self._db.execute(
            "INSERT OR REPLACE INTO pins VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                pin.name,
                pin.extent_id,
                pin.at_tokens,
                pin.origin.value,
                pin.digest,
                pin.prefill_s,
                pin.created_s,
                pin.used_s,
                pin.uses,
            ),
        )

    def drop_pin(self, name: str) -> None:
        """Inside a transaction."""
        self._db.execute("DELETE FROM pins WHERE name = ?", (name,))

    def drop(self, *, extents: Sequence[int], boundaries: Sequence[tuple[int, int]] = ()) -> None:
        """Inside a transaction, before the files go: extents with all that is theirs, and ends."""
        ids = [(extent_id,) for extent_id in extents]
        self._db.executemany("DELETE FROM extents WHERE id = ?", ids)
        self._db.executemany("DELETE FROM boundaries WHERE extent_id = ?", ids)
        self._db.executemany("DELETE FROM marks WHERE extent_id = ?", ids)
        self._db.executemany("DELETE FROM boundaries WHERE extent_id = ? AND at = ?", boundaries)

    def put_uses(self, uses: Sequence[Use]) -> None:
        """Inside a transaction."""
        self._db.executemany(
            "UPDATE extents SET used_s = ?, heat = ?, uses = ? WHERE id = ?",
            [(used_s, heat, count, extent_id) for extent_id, used_s, heat, count in uses],
        )

    def scrub(self, namespace: str) -> int:
        """Rewrite the file without what was deleted; returns how many rows a namespace has yet."""
        left = 0
        for table in ("extents", "marks"):
            count = f"SELECT COUNT(*) FROM {table} WHERE namespace = ?"  # noqa: S608
            left += self._db.execute(count, (namespace,)).fetchone()[0]
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return left

    def damage(self) -> str | None:
        """What SQLite finds wrong with the file itself; reads all of it."""
        found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        return None if found == "ok" else str(found)


def open_index(path: Path, *, disk: Disk, identity: dict[str, str]) -> Index:
    """The index at `path`. On a full disk it is opened `alone`. Raises: as `Index`."""
    try:
        return Index(path, disk=disk, identity=identity)
    except SnapshotError as error:
        code = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF
        if code not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            raise
        return Index(path, disk=disk, identity=identity, alone=True)


@contextmanager
def unusable_if_damaged() -> Iterator[None]:
    """SQLite's word that a file is damaged becomes IndexUnusableError; other errors pass."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        # 1 is "no such table" here, or one that is there already: a schema of somebody else.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            raise IndexUnusableError(str(error)) from error
        raise


def read_only(path: Path) -> sqlite3.Connection:
    """A connection for looking, also beside a running gateway; takes no lock that it would notice.

    On a full disk, where SQLite can't make its shared memory, and where that isn't safe, the file
    is read as it is: what is in the log only is missing then.

    Raises: SnapshotError('index') if there is no readable index.
    """
    wrong = f"{path} can't be read"
    try:
        modes = ("mode=ro",) if shares_memory_safely(path) else ()
    except OSError as error:
        raise SnapshotError(f"{path} can't be opened: {error}", reason="index") from error
    for mode in (*modes, "mode=ro&immutable=1"):
        try:
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)
        except sqlite3.Error as error:
            wrong = f"{path} can't be opened: {error}"
            continue
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == SCHEMA_VERSION:
                return connection
            wrong = f"{path} has schema {version}"
        except sqlite3.Error as error:
            wrong = f"{path} can't be read: {error}"
        connection.close()
    raise SnapshotError(wrong, reason="index")
