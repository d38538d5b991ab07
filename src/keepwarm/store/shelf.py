"""Files, index and catalogue of one fingerprint, kept in step: opening, making room, quarantine.

Theory of operation. Three things change together: the catalogue (memory), the index (SQLite) and
the extent files. Additions go file, index, catalogue; removals go index, catalogue, files. A
removal never fails: if the index can't take it (the disk is full), the files go all the same, and
the rows, which now lack their files, are passed over by the next opening. So a full disk can always
be eased.

Opening removes nothing. Files without rows and rows without files (*refuse*) are left as they are,
and go when room is needed or somebody prunes: an index that was lost, or a directory that wasn't
there for a moment, must not cost the rest.

Stores of other fingerprints and layouts under the same root: see `neighbours`.

Invariants:
- Every extent in the catalogue has its row and its complete file, and so have its ancestors.
- Before a payload is written, used + other + payload bytes are within the quota, and this store
  within its share of it.
- Only what has our name and our mark is removed, by policy or on request, and the log says what.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from keepwarm.core.evict import over_share
from keepwarm.core.tree import SHARED
from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.slotfile import Layout
from keepwarm.store.catalog import Catalog
from keepwarm.store.disk import Disk, disk_errors
from keepwarm.store.files import ExtentFiles, FileKey, key_of
from keepwarm.store.index import (
    SCHEMA_VERSION,
    IndexUnusableError,
    open_index,
    unusable_if_damaged,
)
from keepwarm.store.lock import OwnerLock
from keepwarm.store.neighbours import Neighbours
from keepwarm.store.places import INDEX_SUFFIX, LOCK_SUFFIX, set_aside, store_name
from keepwarm.store.types import OpenReport, Removed

log = logging.getLogger("keepwarm.store")

MAX_QUARANTINE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ShelfSettings:
    """What a store is opened with.

    `fingerprint` is opaque: equal, or the snapshots aren't looked at. `layout` None means the whole
    form. `quota_bytes` bounds everything under `root`, `staging_bytes` the staging directory, which
    is the engine's `--slot-save-path`. `streams` is the engine's stream count, `max_tokens` what
    a slot may hold. `tenants` is how many API keys share it. `file_mode` is what staged files have.
    `owner` is what the lock says of this process.
    """

    root: Path
    fingerprint: str
    layout: Layout | None
    quota_bytes: int
    staging: Path
    staging_bytes: int
    streams: int
    max_tokens: int
    tenants: int = 1
    file_mode: int = 0o600
    owner: str = "keepwarm"

    @property
    def quarantine_bytes(self) -> int:
        """A twentieth of the quota, at most 1 GiB: enough to look at, little to lose."""
        return min(self.quota_bytes // 20, MAX_QUARANTINE_BYTES)

    @property
    def identity(self) -> dict[str, str]:
        """What the index must have been made with."""
        layout = self.layout.to_json() if self.layout is not None else "whole"
        return {"fingerprint": self.fingerprint, "layout": layout}

    @property
    def directory(self) -> Path:
        """Where this store's files are."""
        told = self.identity
        name = store_name(told["fingerprint"], told["layout"], schema=SCHEMA_VERSION)
        return self.root / name


@dataclass(slots=True)
class ShelfCounts:
    """What happened since the store was opened."""

    saves: int = 0
    written_bytes: int = 0
    materialized: int = 0
    ready_hits: int = 0
    evicted_extents: int = 0
    evicted_bytes: int = 0
    quarantined_extents: int = 0
    quarantined_ends: int = 0


@dataclass(slots=True)
class _Loading:
    """What reading the index found that isn't as it should be."""

    missing: int = 0
    bad_rows: int = 0
    extents: list[int] = field(default_factory=list)
    ends: list[FileKey] = field(default_factory=list)
    pins: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """No garbage collection while a large catalogue is made, nor of it ever after.

    There is no garbage in it, but looking takes 0.7 s with 100,000 extents, in which no thread
    runs, the event loop's neither. `gc.freeze` exempts what exists at this moment.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


class Shelf:
    """See the module. Lives on one thread."""

    def __init__(self, settings: ShelfSettings, *, disk: Disk) -> None:
        """Open it, or begin it.

        Raises: ConfigError if another process has it or the root can be no directory;
        SnapshotError('index', 'no_space', 'io') if it can't be used now. Nothing was lost.
        """
        self.settings = settings
        self.disk = disk
        self.counts = ShelfCounts()
        self.next_id = 1
        self.report = OpenReport()
        self.neighbours = Neighbours(
            settings.directory, quota_bytes=settings.quota_bytes, disk=disk
        )
        self._open()

    @property
    def index_path(self) -> Path:
        """Where this store's index is."""
        return self.settings.directory.with_suffix(INDEX_SUFFIX)

    def _open(self) -> None:
        directory = self.settings.directory
        self.catalog = self._new_catalog()
        self._refuse = _Loading()
        with disk_errors("opening the store"):
            try:
                self.settings.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = OwnerLock(directory.with_suffix(LOCK_SUFFIX), what=self.settings.owner)
            except (FileExistsError, NotADirectoryError) as error:
                raise ConfigError(
                    f"The snapshot store can't be kept in {self.settings.root}: {error.strerror}. "
                    "Choose another --store."
                ) from error
        self._lock = lock
        try:
            with disk_errors("opening the store"), _without_collecting():
                self._open_index()
        except BaseException:
            lock.release()
            raise
        self.tell()

    def _open_index(self) -> None:
        why: str | None = None
        self._make_files()
        try:
            self._load_index()
        except IndexUnusableError as error:
            why = f"{error} (the old one is {set_aside(self.files.root, disk=self.disk)})"
            self._make_files()
            try:
                self._load_index()
            except IndexUnusableError as again:
                raise SnapshotError(f"no index can be made: {again}", reason="index") from again
        self.report = replace(self.report, set_aside=why)
        for line in self.report.lines():
            log.warning("%s", line)

    def _make_files(self) -> None:
        self.files = ExtentFiles(
            self.settings.directory,
            disk=self.disk,
            quarantine_bytes=self.settings.quarantine_bytes,
        )

    def _load_index(self) -> None:
        self.index = open_index(self.index_path, disk=self.disk, identity=self.settings.identity)
        try:
            with unusable_if_damaged():
                self.report = self._load()
                self.next_id = max(self.next_id, self.index.last_id() + 1)
            self._inode = self.index_path.stat()
        except BaseException:
            self.index.close()
            raise

    def _new_catalog(self) -> Catalog:
        layout = self.settings.layout
        return Catalog(needs_boundary=layout is not None and layout.kind.value != "plain")

    def _load(self) -> OpenReport:
        """Fill the catalogue with what has its files; the rest stays where it is, unused."""
        whole = self.settings.layout is None
        catalog = self.catalog = self._new_catalog()
        strays = self.files.present()  # and what the index names is taken out of it
        found = self._refuse = _Loading(bad_rows=self.index.check_rows())
        for row in self.index.extents():
            name = FileKey(row.id).name
            try:
                if name not in strays:
                    found.missing += 1
                    raise ValueError("no file")
                if bool(row.whole) != whole:
                    raise ValueError("of the other form")
                catalog.add_extent(row)  # refuses a child whose parent was dropped
            except (ValueError, KeyError, OverflowError):
                found.extents.append(row.id)
            else:
                strays.remove(name)
        for end in self.index.boundaries():
            name = key_of(end).name
            try:
                if name not in strays:
                    raise ValueError("no file")
                catalog.add_end(end)
            except (KeyError, ValueError):
                found.missing += end.extent_id in catalog.tree
                found.ends.append(key_of(end))
            else:
                strays.remove(name)
        catalog.load_marks(self.index.marks())
        for pin in self.index.pins():
            try:
                catalog.set_pin(pin)
            except (KeyError, ValueError):
                found.pins.append(pin.name)
        catalog.offer_all()
        return OpenReport(
            extents=len(catalog.tree),
            stray_files=self.files.note_strays(strays),
            stray_bytes=self.files.stray_bytes,
            missing_files=found.missing,
            bad_rows=found.bad_rows,
            dropped_extents=len(found.extents),
            dropped_pins=tuple(found.pins),
        )

    def revive(self) -> bool:
        """Open again if somebody took the store away while it was open, or it came back.

        Raises: SnapshotError if that can't be; the catalogue is empty then, and the next call tries
        again.
        """
        if self._is_there():
            return False
        log.warning("%s isn't there any more: opening it again", self.settings.directory)
        self.index.close()
        self._lock.release()
        try:
            self._open()
        except ConfigError as error:
            raise SnapshotError(f"the store is gone: {error}", reason="index") from error
        return True

    def _is_there(self) -> bool:
        try:
            return (
                os.path.samestat(self.index_path.stat(), self._inode)
                and self.files.root.is_dir()
                and self._lock.is_at(self._lock.path)
            )
        except OSError:
            return False

    def take_id(self) -> int:
        """A fresh extent id. Never given again: a commit that failed may yet have taken."""
        given = self.files.free_id(self.next_id)
        self.next_id = given + 1
        return given

    def refuse_keys(self) -> set[FileKey]:
        """What the index names and the catalogue doesn't use, since a file is missing."""
        return {*map(FileKey, self._refuse.extents), *self._refuse.ends}

    def clear_refuse(self) -> int:
        """Remove files without rows, and rows without files; returns the bytes freed."""
        freed = self.files.remove_strays()
        found = self._refuse
        if found.extents or found.ends or found.pins or found.bad_rows:
            there = self.files.present() - self.files.strays()
            extents = [
                i
                for i in found.extents
                if i not in self.catalog.tree and FileKey(i).name not in there
            ]
            ends = [key for key in found.ends if key.name not in there]
            pins = [name for name in found.pins if name not in self.catalog.pins]
            self._remove_rows(extents, ends, pins, senseless=True)
            self._refuse = _Loading()
        if freed:
            log.info("removed files of ours that the index doesn't name: %d bytes", freed)
        return freed

    def close(self) -> None:
        """Write what is pending and let others have the store."""
        try:
            self.flush_uses()
        except SnapshotError as error:
            log.warning("the last uses weren't noted: %s", error)
        finally:
            self.index.close()
            self._lock.release()

    def flush_uses(self) -> None:
        """Note in the index what was used since the last time. Raises: SnapshotError."""
        uses = self.catalog.take_uses()
        if uses:
            with disk_errors("noting uses"), self.index.transaction():
                self.index.put_uses(uses)
                for pin in self.catalog.pins.values():
                    self.index.put_pin(pin)

    @property
    def used_bytes(self) -> int:
        """Bytes of this store's files, quarantine and strays included."""
        files = self.files
        return self.catalog.used_bytes + files.quarantined_bytes + files.stray_bytes

    def tell(self) -> None:
        """Let other processes know what this store takes."""
        self._lock.tell(self.used_bytes)

    def make_room(
        self, need_bytes: int, *, namespace: str = SHARED, keep: Collection[int] = ()
    ) -> Removed:
        """Evict until `need_bytes` more of a namespace fit into the quota; extents in `keep` stay.

        Raises: SnapshotError('quota') if that can't be; then nothing was evicted.
        """
        quota = self.settings.quota_bytes
        found = self.neighbours.look()
        share = self.neighbours.share(found)
        if self.used_bytes + need_bytes <= share:
            others = self.neighbours.size_bytes
            if others + self.used_bytes + need_bytes <= quota:
                return Removed()
        kept = self.catalog.pinned_bytes() + sum(
            self.catalog.tree[i].size_bytes for i in keep if not self.catalog.is_pinned(i)
        )
        if need_bytes + kept > share:
            beside = "".join(f"; {one.owner} has {one.directory}" for one in found if one.owner)
            raise SnapshotError(
                f"{need_bytes} bytes don't fit beside {kept} that must stay, of {share} "
                f"(store.quota_bytes is {quota}{beside})",
                reason="quota",
            )
        self.clear_refuse()
        others = self.neighbours.clear(found, bound_bytes=quota - self.used_bytes - need_bytes)
        bound = min(share, quota - others) - need_bytes
        coming = {namespace: need_bytes}
        removed = self.evict(bound, keep=keep, coming=coming, quota_bytes=share)
        if self.used_bytes > bound:
            self.files.empty_quarantine()
        if self.used_bytes > bound:
            raise SnapshotError(f"no room for {need_bytes} bytes in {quota}", reason="quota")
        return removed

    def evict(
        self,
        bound_bytes: int,
        *,
        keep: Collection[int] = (),
        coming: Mapping[str, int] | None = None,
        quota_bytes: int | None = None,
    ) -> Removed:
        """Evict the least valuable until this fingerprint's files are within `bound_bytes`, or
        nothing is left that may go.

        Who holds more than a share gives first: `quota_bytes` (unset: the bound) by the number of
        API keys. `coming` are bytes that a key is about to hold.
        """
        quota = bound_bytes if quota_bytes is None else quota_bytes
        catalog = self.catalog
        before = catalog.used_bytes
        extents: list[int] = []
        ends: list[FileKey] = []
        while self.used_bytes > bound_bytes:
            candidate = catalog.queue.pop(
                catalog.worth,
                first=self._givers(quota, coming or {}),
                keep=lambda candidate: candidate.extent_id in keep,
            )
            if candidate is None:
                break
            if candidate.at is None:
                extents.append(candidate.extent_id)
                ends += self._forget_extent(candidate.extent_id)
            else:
                catalog.remove_end(candidate.extent_id, candidate.at)
                ends.append(FileKey(candidate.extent_id, candidate.at))
        freed = before - catalog.used_bytes
        if extents or ends:
            self._remove(extents=extents, ends=ends)
            self.counts.evicted_extents += len(extents)
            self.counts.evicted_bytes += freed
        return Removed(tuple(extents), (), freed)

    def _givers(self, quota_bytes: int, coming: Mapping[str, int]) -> frozenset[str]:
        """The API keys that hold more than their share; none where there is one key only."""
        held = Counter(self.catalog.held_by_key())
        held.update({name: size for name, size in coming.items() if name != SHARED})
        keys = max(self.settings.tenants, len(held))
        return over_share(held, share_bytes=quota_bytes // keys) if keys > 1 else frozenset()

    def evict_subtree(self, extent_id: int) -> Removed:
        """Evict an extent and what hangs off it. No pin may need any of it."""
        before = self.catalog.used_bytes
        extents = self.catalog.tree.subtree(extent_id)
        ends = [end for i in extents for end in self._forget_extent(i)]
        self._remove(extents=extents, ends=ends)
        freed = before - self.catalog.used_bytes
        self.counts.evicted_extents += len(extents)
        self.counts.evicted_bytes += freed
        return Removed(tuple(extents), (), freed)

    def forget(self, extent_ids: Collection[int], pins: Collection[str]) -> Removed:
        """Remove extents, with all that hangs off them in `extent_ids`, and pins."""
        before = self.catalog.used_bytes
        for name in pins:
            self.catalog.drop_pin(name)
        # A child's number is greater than its parent's.
        extents = sorted(extent_ids, reverse=True)
        ends = [end for i in extents for end in self._forget_extent(i)]
        self._remove(extents=extents, ends=ends, pins=pins)
        return Removed(tuple(extents), tuple(pins), before - self.catalog.used_bytes)

    def scrub(self, namespace: str) -> None:
        """Leave nothing of what was removed in the index's free pages, nor in its log.

        Raises: SnapshotError if that can't be, or if the index names something of `namespace` yet.
        """
        with disk_errors("forgetting"):
            left = self.index.scrub(namespace)
        if left:
            raise SnapshotError(f"{left} rows of {namespace} are in the index yet", reason="index")

    def quarantine_extent(self, extent_id: int) -> Removed:
        """Set an extent aside as untrusted, and remove all that hangs off it, pins included."""
        catalog = self.catalog
        before = catalog.used_bytes
        extents = catalog.tree.subtree(extent_id)
        pins = catalog.pins_through(extents)
        for name in pins:
            catalog.drop_pin(name)
        ends = [end for i in extents for end in self._forget_extent(i)]
        self._remove(extents=extents, ends=ends, pins=pins, aside=FileKey(extent_id))
        self.counts.quarantined_extents += 1
        return Removed(tuple(extents), tuple(pins), before - catalog.used_bytes)

    def forget_marks(
        self, namespace: str | None, *, extent_id: int | None = None, at: int | None = None
    ) -> int:
        """Forget the digests that lead to one end, or all; of one namespace, or of all. Rows stay.

        Returns how many. Those that the index can't forget now are known again after a restart.
        """
        found = self.catalog.marks_at(namespace, extent_id=extent_id, at=at)
        for name, digest, holder in found:
            self.catalog.forget_mark(name, digest, extent_id=holder)
        try:
            with disk_errors("forgetting marks"), self.index.transaction():
                for name, digest, holder in found:
                    self.index.drop_mark(holder, name, digest)
        except SnapshotError as error:
            log.warning("%s", error)
        return len(found)

    def quarantine_end(self, extent_id: int, at: int) -> Removed:
        """Set one boundary state aside; pins that end there are lost."""
        catalog = self.catalog
        pins = [
            p.name for p in catalog.pins.values() if (p.extent_id, p.at_tokens) == (extent_id, at)
        ]
        for name in pins:
            catalog.drop_pin(name)
        row = catalog.remove_end(extent_id, at)
        key = FileKey(extent_id, at)
        self._remove(extents=[], ends=[key], pins=pins, aside=key)
        self.counts.quarantined_ends += 1
        return Removed((), tuple(pins), row.size_bytes)

    def _remove(
        self,
        *,
        extents: list[int],
        ends: list[FileKey],
        pins: Collection[str] = (),
        aside: FileKey | None = None,
    ) -> None:
        """Remove rows, then files, of which `aside` goes to the quarantine.

        On a full disk the files go first: that makes room for the index to be written.
        """
        is_told = self._remove_rows(extents, ends, pins)
        if aside is not None:
            try:
                self.files.quarantine(aside)
            except SnapshotError as error:
                log.warning("%s; it isn't used any more", error)
        self.files.remove(key for key in [*map(FileKey, extents), *ends] if key != aside)
        if not is_told and not self._remove_rows(extents, ends, pins):
            log.warning("the index still names what was removed; the next start passes over it")
        self.tell()

    def _forget_extent(self, extent_id: int) -> list[FileKey]:
        marks: list[tuple[str, bytes]] = []
        with contextlib.suppress(sqlite3.Error):  # marks that stay behind are taken for misses
            marks = self.index.marks_of(extent_id)
        return [key_of(end) for end in self.catalog.remove_extent(extent_id, marks)]

    def _remove_rows(
        self,
        extents: list[int],
        ends: Iterable[FileKey],
        pins: Collection[str],
        *,
        senseless: bool = False,
    ) -> bool:
        pairs = [(key.extent_id, key.at) for key in ends if key.at is not None]
        try:
            with disk_errors("removing from the index"), self.index.transaction():
                self.index.drop(extents=extents, boundaries=pairs)
                for name in pins:
                    self.index.drop_pin(name)
                if senseless:
                    self.index.drop_senseless()
        except SnapshotError as error:
            log.info("%s", error)
            return False
        return True
