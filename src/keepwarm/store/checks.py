"""Looking after the store: verification, integrity, and reading it beside a running gateway.

What takes a root and a name opens the index read-only and takes no lock, so it works while a
gateway owns the store; what the gateway changes meanwhile may be missing from the answer.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.slotfile import Layout, SlotFileError
from keepwarm.store import admin
from keepwarm.store.disk import Disk, disk_errors
from keepwarm.store.files import UNTRUSTED, FileKey, check_file, key_of
from keepwarm.store.index import BoundaryRow, ExtentRow, read_only
from keepwarm.store.lock import owner_of
from keepwarm.store.neighbours import Neighbours, remove_unowned
from keepwarm.store.places import INDEX_SUFFIX, LOCK_SUFFIX, is_own_name
from keepwarm.store.shelf import Shelf, ShelfSettings
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.types import Forgotten, Listed, Origin, Pin, Removed, StoreFinding, Verified


@dataclass(frozen=True, slots=True)
class StoreListed:
    """One fingerprint's store under a root.

    `name` is its directory's. `owner` tells which process has it open, None if none has.
    `layout` is the codec's JSON, or "whole".
    """

    name: str
    fingerprint: str
    layout: str
    extents: int
    pins: int
    size_bytes: int
    owner: str | None


def verify_extent(snapshots: Snapshots, extent_id: int) -> tuple[int, list[StoreFinding]]:
    """Read one extent's files again; quarantine what differs. Returns bytes read, and findings."""
    shelf = snapshots.shelf
    catalog = shelf.catalog
    if extent_id not in catalog.tree:
        return 0, []
    row = catalog.row(extent_id)
    ends = [catalog.end(extent_id, at) for at in catalog.tree[extent_id].boundaries]
    read_bytes = 0
    findings: list[StoreFinding] = []
    parts: list[ExtentRow | BoundaryRow] = [row, *ends]
    for part in parts:
        read_bytes += part.size_bytes
        try:
            shelf.files.check_again(part)
        except SnapshotError as error:
            findings.append(StoreFinding(error.reason, key_of(part).name))
            if error.reason not in UNTRUSTED:
                continue
            if isinstance(part, ExtentRow):
                snapshots.forget_ready(shelf.quarantine_extent(extent_id))
                break
            shelf.quarantine_end(extent_id, part.at)
    return read_bytes, findings


def integrity(snapshots: Snapshots) -> tuple[StoreFinding, ...]:
    """Compare index, directory and memory without reading payloads."""
    shelf = snapshots.shelf
    catalog = shelf.catalog
    findings: list[StoreFinding] = []
    with disk_errors("checking the index"):
        damage = shelf.index.damage()
        if damage is not None:
            findings.append(StoreFinding("index_damaged", damage))
        rows: list[ExtentRow | BoundaryRow] = [*shelf.index.extents(), *shelf.index.boundaries()]
    refuse = shelf.refuse_keys()
    indexed = {key_of(row): row.size_bytes for row in rows if key_of(row) not in refuse}
    known = {FileKey(extent.id): extent.size_bytes for extent in catalog.tree}
    for extent in catalog.tree:
        known |= {FileKey(extent.id, at): size for at, size in extent.boundaries.items()}
    findings += [
        StoreFinding("only_in_index", key.name)
        for key in sorted(indexed.keys() - known.keys(), key=str)
    ]
    findings += [
        StoreFinding("not_in_index", key.name)
        for key in sorted(known.keys() - indexed.keys(), key=str)
    ]
    # Those that opening found are known and go when room is needed.
    strays = shelf.files.present() - {key.name for key in known} - shelf.files.strays()
    findings += [StoreFinding("stray", name) for name in sorted(strays) if is_own_name(name)]
    for key, size in known.items():
        try:
            found = shelf.files.path(key).stat().st_size
        except OSError:
            findings.append(StoreFinding("missing", key.name))
        else:
            if found != size:
                findings.append(StoreFinding("truncated", key.name))
    if catalog.used_bytes != sum(known.values()):
        findings.append(StoreFinding("miscounted", f"{catalog.used_bytes} bytes"))
    return tuple(findings)


def stores(root: Path) -> list[StoreListed]:
    """All stores under a root, those that can't be read left out."""
    found = []
    for path in sorted(root.glob(f"*{INDEX_SUFFIX}")):
        with contextlib.suppress(SnapshotError), _reading(path) as db:
            meta = dict(db.execute("SELECT key, value FROM meta"))
            extents, size = db.execute(
                "SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM extents"
            ).fetchone()
            ends_size = db.execute("SELECT COALESCE(SUM(bytes), 0) FROM boundaries").fetchone()[0]
            pins = db.execute("SELECT COUNT(*) FROM pins").fetchone()[0]
            found.append(
                StoreListed(
                    name=path.stem,
                    fingerprint=meta["fingerprint"],
                    layout=meta["layout"],
                    extents=extents,
                    pins=pins,
                    size_bytes=size + ends_size,
                    owner=owner_of(path.with_suffix(LOCK_SUFFIX)),
                )
            )
    return found


def list_extents(root: Path, name: str) -> list[Listed]:
    """All extents of one store, parents before children. Raises: SnapshotError('index')."""
    with _reading(root / f"{name}{INDEX_SUFFIX}") as db:
        ends: dict[int, list[int]] = {}
        for extent_id, at in db.execute("SELECT extent_id, at FROM boundaries ORDER BY at"):
            ends.setdefault(extent_id, []).append(at)
        pins: dict[int, list[str]] = {}
        for extent_id, pin in db.execute("SELECT extent_id, name FROM pins ORDER BY name"):
            pins.setdefault(extent_id, []).append(pin)
        return [
            Listed(
                extent_id=row.id,
                parent=row.parent,
                lo=row.lo,
                hi=row.lo + len(row.tokens) // 4,
                namespace=row.namespace,
                origin=Origin(row.origin),
                size_bytes=row.size_bytes,
                boundaries=tuple(ends.get(row.id, ())),
                pins=tuple(pins.get(row.id, ())),
                prefill_s=row.prefill_s,
                created_s=row.created_s,
                used_s=row.used_s,
                uses=row.uses,
            )
            for row in map(ExtentRow._make, db.execute("SELECT * FROM extents ORDER BY id"))
        ]


def list_pins(root: Path, name: str) -> list[Pin]:
    """All pins of one store, by name. Raises: SnapshotError('index')."""
    with _reading(root / f"{name}{INDEX_SUFFIX}") as db:
        return [
            Pin(pin, extent_id, at, Origin(origin), *rest)
            for pin, extent_id, at, origin, *rest in db.execute("SELECT * FROM pins ORDER BY name")
        ]


def verify_files(
    root: Path, name: str, progress: Callable[[int, int], None] | None = None
) -> Verified:
    """Read all files of one store and compare, changing nothing; `progress(done, total)`.

    A file that its owner evicts meanwhile is not a finding. Raises: SnapshotError('index').
    """
    with _reading(root / f"{name}{INDEX_SUFFIX}") as db:
        extents = [ExtentRow._make(row) for row in db.execute("SELECT * FROM extents ORDER BY id")]
        ends = [BoundaryRow._make(row) for row in db.execute("SELECT * FROM boundaries")]
        findings: list[StoreFinding] = []
        rows: list[ExtentRow | BoundaryRow] = [*extents, *ends]
        for done, row in enumerate(rows, 1):
            key = key_of(row)
            try:
                check_file(root / name / key.name, row)
            except SnapshotError as error:
                if error.reason != "missing" or _is_indexed(db, key):
                    findings.append(StoreFinding(error.reason, key.name))
            if progress is not None:
                progress(done, len(rows))
    read_bytes = sum(row.size_bytes for row in rows)
    return Verified(len(extents), read_bytes, tuple(findings))


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `prune_root` did to one store. `owner` has it open: nothing was done then.

    `is_gone`: all of it was removed. `why_not` is what kept it from being looked into.
    """

    name: str
    fingerprint: str | None
    extents: int = 0
    size_bytes: int = 0
    is_gone: bool = False
    owner: str | None = None
    why_not: str | None = None


def prune_root(root: Path, bound_bytes: int, *, disk: Disk | None = None) -> list[Pruned]:
    """Bring all stores under a root to within `bound_bytes` together; also when the disk is full.

    What was set aside, quarantined, or is named by no index goes in any case. Then whole stores go,
    the longest unused first, but for the one used last: of that, the least valuable extents. What a
    gateway has open counts and isn't touched: it keeps its quota itself.

    Raises: SnapshotError if the root can't be listed.
    """
    disk = disk or Disk()
    neighbours = Neighbours(root / "none", quota_bytes=bound_bytes, disk=disk)
    found = neighbours.look()
    pruned = [
        Pruned(one.directory.name, None, size_bytes=freed, is_gone=True)
        for one in found
        if one.is_aside and (freed := remove_unowned(one.directory, disk=disk))
    ]
    stopped = sorted(
        (one for one in found if not one.is_aside and one.owner is None),
        key=lambda one: one.used_s,
    )
    left_bytes = sum(one.size_bytes for one in found if one.owner is not None)
    pruned += [Pruned(one.directory.name, None, owner=one.owner) for one in found if one.owner]
    # First what nobody misses, everywhere; it may be what makes room for the rest.
    cleared = [_prune_one(one.directory, None, disk=disk) for one in stopped]
    sizes = [one.size_bytes - gone.size_bytes for one, gone in zip(stopped, cleared, strict=True)]
    for index, one in enumerate(stopped):
        done = cleared[index]
        over = left_bytes + sum(sizes[index:]) - bound_bytes
        if over > 0 and index < len(stopped) - 1:
            freed = remove_unowned(one.directory, disk=disk)
            done = replace(done, size_bytes=done.size_bytes + freed, is_gone=True)
        elif over > 0:
            more = _prune_one(one.directory, max(sizes[index] - over, 0), disk=disk)
            done = replace(more, size_bytes=done.size_bytes + more.size_bytes)
        if not done.is_gone:
            left_bytes += sizes[index]
        pruned.append(done)
    return pruned


def _prune_one(directory: Path, bound_bytes: int | None, *, disk: Disk) -> Pruned:
    """Remove what nobody misses of one store, and evict to within a bound if there is one."""
    try:
        shelf = _open_shelf(directory, disk=disk)
    except _UNOPENED as error:
        return Pruned(directory.name, None, why_not=str(error))
    try:
        before = shelf.used_bytes
        shelf.files.empty_quarantine()
        shelf.clear_refuse()
        removed = shelf.evict(bound_bytes) if bound_bytes is not None else Removed()
        freed = before - shelf.used_bytes
        return Pruned(directory.name, shelf.settings.fingerprint, len(removed.extents), freed)
    finally:
        shelf.close()


@dataclass(frozen=True, slots=True)
class ForgottenStore:
    """What `forget_key` removed from one store. `owner` has it open: nothing was done then.

    `why_not` is what kept it from being done, or from being done in full.
    """

    name: str
    told: Forgotten = field(default_factory=Forgotten)
    owner: str | None = None
    why_not: str | None = None


def forget_key(root: Path, namespace: str, *, disk: Disk | None = None) -> list[ForgottenStore]:
    """Remove all that is one API key's own from every store under a root that nobody has open.

    What was set aside with a damaged index goes, too: nobody can tell whose it is.

    Raises: SnapshotError if the root can't be listed.
    """
    disk = disk or Disk()
    done = []
    for one in Neighbours(root / "none", quota_bytes=1 << 50, disk=disk).look():
        name = one.directory.name
        if one.owner is not None:
            done.append(ForgottenStore(name, owner=one.owner))
            continue
        if one.is_aside:
            freed = remove_unowned(one.directory, disk=disk)
            done.append(ForgottenStore(name, Forgotten(refuse_bytes=freed)))
            continue
        try:
            shelf = _open_shelf(one.directory, disk=disk)
        except _UNOPENED as error:
            done.append(ForgottenStore(name, why_not=str(error)))
            continue
        try:
            done.append(ForgottenStore(name, admin.forget_key(shelf, namespace)[0]))
        except SnapshotError as error:
            done.append(ForgottenStore(name, why_not=str(error)))
        finally:
            shelf.close()
    return done


_UNOPENED = (SnapshotError, SlotFileError, ConfigError, KeyError)


def _open_shelf(directory: Path, *, disk: Disk) -> Shelf:
    """Open a store for maintenance. Raises: one of `_UNOPENED`."""
    with _reading(directory.with_name(directory.name + INDEX_SUFFIX)) as db:
        meta = dict(db.execute("SELECT key, value FROM meta"))
    layout = None if meta["layout"] == "whole" else Layout.from_json(meta["layout"])
    settings = ShelfSettings(
        root=directory.parent,
        fingerprint=meta["fingerprint"],
        layout=layout,
        quota_bytes=1 << 50,
        staging=directory.parent,
        staging_bytes=0,
        streams=1,
        max_tokens=0,
        owner=f"keepwarm store, process {os.getpid()}",
    )
    if settings.directory != directory:
        raise SnapshotError("its index is another store's", reason="index")
    return Shelf(settings, disk=disk)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    connection = read_only(path)
    try:
        with disk_errors(f"reading {path.name}"):
            yield connection
    finally:
        connection.close()


def _is_indexed(db: sqlite3.Connection, key: FileKey) -> bool:
    if key.at is None:
        found = db.execute("SELECT 1 FROM extents WHERE id = ?", (key.extent_id,))
    else:
        found = db.execute("SELECT 1 FROM boundaries WHERE extent_id = ? AND at = ?", key)
    return found.fetchone() is not None
