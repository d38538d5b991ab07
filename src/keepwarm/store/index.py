"""The index: one SQLite file a fingerprint, which says what the extent files hold.

Theory of operation. The index is the truth about what is kept; a file that it doesn't name is
refuse. It is read once, on opening, into the catalogue; after that it is only written. WAL with
synchronous=FULL: a save costs one more flush, and in return "saved" means saved.
Deletions commit before files go, insertions after files came, so that a cut between the two leaves
refuse, not a row without a file. (A deletion whose commit the disk loses leaves a row without
its file; such rows are dropped on opening.)

What can't be read as such an index is set aside and a new one begun: all of it can be prefilled
again.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from keepwarm.errors import SnapshotError
from keepwarm.store.disk import Disk
from keepwarm.store.types import Mark, Origin, Pin

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

    def __init__(self, path: Path, *, disk: Disk, identity: dict[str, str]) -> None:
        """Open or create the index.

        `identity` (fingerprint, layout, ...) must be what it was created with.

        Raises: IndexUnusableError, with the connection closed.
        """
        self.path = path
        self._disk = disk
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            # Not a cut-off: SQLite moves the log into the file by itself at 1,000 pages.
            self._db.execute("PRAGMA journal_size_limit=4194304")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self._create(identity)
            elif version != SCHEMA_VERSION:
                raise IndexUnusableError(f"schema {version}, {SCHEMA_VERSION} is known")
            found = dict(self._db.execute("SELECT key, value FROM meta"))
            if found != identity:
                differs = sorted(k for k in {*found, *identity} if found.get(k) != identity.get(k))
                raise IndexUnusableError(f"it was made for another {', '.join(differs)}")
        except IndexUnusableError:
            self._db.close()
            raise
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise IndexUnusableError(str(error)) from error

    def _create(self, identity: dict[str, str]) -> None:
        with self.transaction():
            for statement in _SCHEMA.split(";\n"):
                self._db.execute(statement)
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", identity.items())
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

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
        """All rows, parents before children."""
        return map(ExtentRow._make, self._db.execute("SELECT * FROM extents ORDER BY id"))

    def boundaries(self) -> Iterator[BoundaryRow]:
        """All rows, in no particular order."""
        return map(BoundaryRow._make, self._db.execute("SELECT * FROM boundaries"))

    def marks(self) -> Iterator[tuple[int, int, int, str, bytes]]:
        """All rows: extent id, at, exact, namespace, digest."""
        return self._db.execute("SELECT extent_id, at, exact, namespace, digest FROM marks")

    def marks_of(self, extent_id: int) -> list[tuple[str, bytes]]:
        """The marks in one extent: namespace and digest."""
        found = self._db.execute(
            "SELECT namespace, digest FROM marks WHERE extent_id = ?", (extent_id,)
        )
        return found.fetchall()

    def pins(self) -> Iterator[Pin]:
        """All rows, by name."""
        for name, extent_id, at, origin, *rest in self._db.execute(
            "SELECT * FROM pins ORDER BY name"
        ):
            yield Pin(name, extent_id, at, Origin(origin), *rest)

    def add_extent(self, row: ExtentRow) -> None:
        """Inside a transaction, after its file is in place."""
        self._db.execute(f"INSERT INTO extents VALUES ({', '.join('?' * 14)})", row)  # noqa: S608

    def add_boundary(self, row: BoundaryRow) -> None:
        """Inside a transaction, after its file is in place."""
        self._db.execute("INSERT INTO boundaries VALUES (?, ?, ?, ?)", row)

    def put_mark(self, extent_id: int, namespace: str, mark: Mark) -> None:
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

    def damage(self) -> str | None:
        """What SQLite finds wrong with the file itself; reads all of it."""
        found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        return None if found == "ok" else str(found)


def open_index(
    path: Path, *, disk: Disk, identity: dict[str, str]
) -> tuple[Index, tuple[Path, str] | None]:
    """The index at `path`, and if an unusable one was there, where it was moved and why.

    The one set aside replaces an earlier one, so they don't add up.

    Raises: SnapshotError('index') if not even a new one can be made there.
    """
    try:
        return Index(path, disk=disk, identity=identity), None
    except IndexUnusableError as error:
        return _begin_again(path, disk=disk, identity=identity, why=str(error))


def set_aside(path: Path, *, disk: Disk) -> Path:
    """Move an index and its log out of the way; returns where it is now."""
    aside = path.with_suffix(".set-aside")
    for suffix in ("-wal", "-shm"):
        disk.unlink(path.with_name(path.name + suffix))
    disk.rename(path, aside)
    return aside


def _begin_again(
    path: Path, *, disk: Disk, identity: dict[str, str], why: str
) -> tuple[Index, tuple[Path, str]]:
    aside = set_aside(path, disk=disk)
    try:
        return Index(path, disk=disk, identity=identity), (aside, why)
    except IndexUnusableError as error:
        raise SnapshotError(f"no index can be made at {path}: {error}", reason="index") from error


def read_only(path: Path) -> sqlite3.Connection:
    """A connection for looking, also beside a running gateway; takes no lock that it would notice.

    Raises: SnapshotError('index') if there is no readable index.
    """
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.Error as error:
        raise SnapshotError(f"{path} can't be read: {error}", reason="index") from error
    if version != SCHEMA_VERSION:
        connection.close()
        raise SnapshotError(f"{path} has schema {version}", reason="index")
    return connection
