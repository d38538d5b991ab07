"""Files, index and catalogue of one fingerprint, kept in step: opening, making room, quarantine.

Theory of operation. Three things change together: the catalogue (memory), the index (SQLite) and
the extent files. Additions go file, index, catalogue; removals go index, catalogue, files. A
removal never fails: if the index can't take it (the disk is full), the files go all the same, and
the rows, which now lack their files, are dropped on the next opening. So a full disk can always be
eased.

Other fingerprints' directories under the same root count against the quota and go first, the least
recently used whole: they are mostly what an engine upgrade left behind.

Invariants:
- Every extent in the catalogue has its row and its complete file, and so have its ancestors.
- Before a payload is written, used + other + quarantined + payload bytes are within the quota.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

import xxhash

from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.slotfile import Layout
from keepwarm.store.catalog import Catalog
from keepwarm.store.disk import Disk, disk_errors
from keepwarm.store.files import ExtentFiles, FileKey, key_of
from keepwarm.store.index import open_index, set_aside
from keepwarm.store.lock import OwnerLock
from keepwarm.store.types import OpenReport, Removed

log = logging.getLogger("keepwarm.store")

INDEX_SUFFIX = ".index"
LOCK_SUFFIX = ".lock"
MAX_QUARANTINE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """What a store is opened with.

    `fingerprint` is opaque: equal, or the snapshots aren't looked at. `layout` None means the whole
    form. `quota_bytes` bounds everything under `root`, `staging_bytes` the staging directory, which
    is the engine's `--slot-save-path`. `streams` is the engine's stream count, `max_tokens` what
    a slot may hold. `owner` is what the lock says of this process.
    """

    root: Path
    fingerprint: str
    layout: Layout | None
    quota_bytes: int
    staging: Path
    staging_bytes: int
    streams: int
    max_tokens: int
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


@dataclass(slots=True)
class Counts:
    """What happened since the store was opened."""

    saves: int = 0
    written_bytes: int = 0
    materialized: int = 0
    ready_hits: int = 0
    evicted_extents: int = 0
    evicted_bytes: int = 0
    quarantined_extents: int = 0


@dataclass(slots=True)
class _Loading:
    """What reading the index found that isn't as it should be."""

    missing: int = 0
    extents: list[int] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)
    pins: list[str] = field(default_factory=list)


def directory_name(fingerprint: str) -> str:
    """The name of a fingerprint's directory, index and lock, without suffix."""
    return xxhash.xxh3_128_hexdigest(fingerprint.encode())


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

    def __init__(self, settings: StoreSettings, *, disk: Disk) -> None:
        """Open, and put right what an interrupted life left.

        Raises: ConfigError if another process has it or the directory can't be used;
        SnapshotError('index', 'no_space', 'io').
        """
        self.settings = settings
        self.disk = disk
        self.counts = Counts()
        self.other_bytes: int | None = None  # counted when room is first needed
        name = directory_name(settings.fingerprint)
        try:
            settings.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = OwnerLock(settings.root / f"{name}{LOCK_SUFFIX}", what=settings.owner)
        except OSError as error:
            raise ConfigError(
                f"The snapshot store can't be kept in {settings.root}: {error.strerror}. "
                "Choose another --store."
            ) from error
        try:
            with disk_errors("opening the store"):
                self.files = ExtentFiles(
                    settings.root / name, disk=disk, quarantine_bytes=settings.quarantine_bytes
                )
                with _without_collecting():
                    self._open_index()
        except BaseException:
            self._lock.release()
            raise
        self.next_id = 1 + max(map(attrgetter("id"), self.catalog.tree), default=0)

    @property
    def index_path(self) -> Path:
        """Where this fingerprint's index is."""
        return self.files.root.with_suffix(INDEX_SUFFIX)

    def _open_index(self) -> None:
        path, identity = self.index_path, self.settings.identity
        self.index, aside = open_index(path, disk=self.disk, identity=identity)
        try:
            self.report = self._load()
        except sqlite3.DatabaseError as error:
            self.index.close()
            aside = (set_aside(path, disk=self.disk), str(error))
            self.index, _ = open_index(path, disk=self.disk, identity=identity)
            self.report = self._load()
        if aside is not None:
            where, why = aside
            self.report = replace(self.report, set_aside=f"{why} (the old one is {where.name})")
        for line in self.report.lines():
            log.warning("%s", line)

    def _load(self) -> OpenReport:
        """Fill the catalogue with what has its files, and remove what hasn't, on both sides."""
        whole = self.settings.layout is None
        layout = self.settings.layout
        catalog = self.catalog = Catalog(
            needs_boundary=layout is not None and layout.kind.value != "plain"
        )
        strays = self.files.present()  # and what the index names is taken out of it
        found = _Loading()
        for row in self.index.extents():
            name = FileKey(row.id).name
            try:
                if name not in strays:
                    found.missing += 1
                    raise ValueError("no file")
                if bool(row.whole) != whole:
                    raise ValueError("of the other form")
                catalog.add_extent(row)  # refuses a child whose parent was dropped
            except ValueError:
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
                found.ends.append((end.extent_id, end.at))
            else:
                strays.remove(name)
        catalog.load_marks(self.index.marks())
        for pin in self.index.pins():
            try:
                catalog.set_pin(pin)
            except (KeyError, ValueError):
                found.pins.append(pin.name)
        catalog.offer_all()
        self._drop_rows(found)
        return OpenReport(
            extents=len(catalog.tree),
            stray_files=self.files.remove_strays(strays),
            missing_files=found.missing,
            dropped_extents=len(found.extents),
            dropped_pins=tuple(found.pins),
        )

    def _drop_rows(self, found: _Loading) -> None:
        if found.extents or found.ends or found.pins:
            with disk_errors("dropping what lacks its files"), self.index.transaction():
                self.index.drop(extents=found.extents, boundaries=found.ends)
                for name in found.pins:
                    self.index.drop_pin(name)

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
        """Bytes of this fingerprint's files, the quarantine included."""
        return self.catalog.used_bytes + self.files.quarantined_bytes

    def make_room(self, need_bytes: int, *, keep: Collection[int] = ()) -> Removed:
        """Evict until `need_bytes` more fit into the quota; extents in `keep` stay.

        Raises: SnapshotError('quota') if that can't be; then nothing was evicted.
        """
        quota = self.settings.quota_bytes
        if need_bytes + self.used_bytes + self._others() <= quota:
            return Removed()
        kept = self.catalog.pinned_bytes() + sum(
            self.catalog.tree[i].size_bytes for i in keep if not self.catalog.is_pinned(i)
        )
        if need_bytes + kept > quota:
            raise SnapshotError(
                f"{need_bytes} bytes don't fit beside {kept} that must stay, of {quota}",
                reason="quota",
            )
        self._drop_others(quota - self.used_bytes - need_bytes)
        removed = self.evict(quota - self._others() - need_bytes, keep=keep)
        if self.used_bytes + self._others() + need_bytes > quota:
            self.files.empty_quarantine()
        if self.used_bytes + self._others() + need_bytes > quota:
            raise SnapshotError(f"no room for {need_bytes} bytes in {quota}", reason="quota")
        return removed

    def evict(self, bound_bytes: int, *, keep: Collection[int] = ()) -> Removed:
        """Evict the least valuable until this fingerprint's files are within `bound_bytes`, or
        nothing is left that may go.
        """
        catalog = self.catalog
        before = catalog.used_bytes
        extents: list[int] = []
        ends: list[FileKey] = []
        while self.used_bytes > bound_bytes:
            candidate = catalog.queue.pop(
                catalog.worth, keep=lambda candidate: candidate.extent_id in keep
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
            self._remove_rows(extents=extents, ends=ends, pins=())
            self.files.remove([*map(FileKey, extents), *ends])
            self.counts.evicted_extents += len(extents)
            self.counts.evicted_bytes += freed
        return Removed(tuple(extents), (), freed)

    def evict_subtree(self, extent_id: int) -> Removed:
        """Evict an extent and what hangs off it. No pin may need any of it."""
        before = self.catalog.used_bytes
        extents = self.catalog.tree.subtree(extent_id)
        ends = [end for i in extents for end in self._forget_extent(i)]
        self._remove_rows(extents=extents, ends=ends, pins=())
        self.files.remove([*map(FileKey, extents), *ends])
        freed = before - self.catalog.used_bytes
        self.counts.evicted_extents += len(extents)
        self.counts.evicted_bytes += freed
        return Removed(tuple(extents), (), freed)

    def quarantine_extent(self, extent_id: int) -> Removed:
        """Set an extent aside as untrusted, and remove all that hangs off it, pins included."""
        catalog = self.catalog
        before = catalog.used_bytes
        extents = catalog.tree.subtree(extent_id)
        pins = catalog.pins_through(extents)
        for name in pins:
            catalog.drop_pin(name)
        ends = [end for i in extents for end in self._forget_extent(i)]
        self._remove_rows(extents=extents, ends=ends, pins=pins)
        self.files.quarantine(FileKey(extent_id))
        self.files.remove([FileKey(i) for i in extents if i != extent_id] + ends)
        self.counts.quarantined_extents += 1
        return Removed(tuple(extents), tuple(pins), before - catalog.used_bytes)

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
        self._remove_rows(extents=[], ends=[key], pins=pins)
        self.files.quarantine(key)
        return Removed((), tuple(pins), row.size_bytes)

    def _forget_extent(self, extent_id: int) -> list[FileKey]:
        marks: list[tuple[str, bytes]] = []
        with contextlib.suppress(sqlite3.Error):  # marks that stay behind are taken for misses
            marks = self.index.marks_of(extent_id)
        return [key_of(end) for end in self.catalog.remove_extent(extent_id, marks)]

    def _remove_rows(
        self, *, extents: list[int], ends: Iterable[FileKey], pins: Collection[str]
    ) -> None:
        pairs = [(key.extent_id, key.at) for key in ends if key.at is not None]
        try:
            with disk_errors("removing from the index"), self.index.transaction():
                self.index.drop(extents=extents, boundaries=pairs)
                for name in pins:
                    self.index.drop_pin(name)
        except SnapshotError as error:
            log.warning("%s; the files go all the same", error)

    def _others(self) -> int:
        if self.other_bytes is None:
            self.other_bytes = sum(size for _, size, _ in self._other_stores())
        return self.other_bytes

    def _other_stores(self) -> list[tuple[Path, int, float]]:
        """Directories of other fingerprints: path, bytes, time of last use (the lock's)."""
        found = []
        with disk_errors("measuring other stores"):
            for lock in self.settings.root.glob(f"*{LOCK_SUFFIX}"):
                directory = lock.with_suffix("")
                if directory != self.files.root and directory.is_dir():
                    sizes = (p.stat().st_size for p in directory.rglob("*") if p.is_file())
                    found.append((directory, sum(sizes), lock.stat().st_mtime))
        return found

    def _drop_others(self, bound_bytes: int) -> None:
        """Remove other fingerprints' files, least recently used first, to within the bound. One
        that a process has open is left alone.
        """
        if self._others() <= max(bound_bytes, 0):
            return
        others = sorted(self._other_stores(), key=lambda other: other[2])
        total = sum(size for _, size, _ in others)
        for directory, size, _ in others:
            if total <= max(bound_bytes, 0):
                break
            with contextlib.suppress(ConfigError):
                lock = OwnerLock(directory.with_suffix(LOCK_SUFFIX), what="clearing away")
                with lock, disk_errors(f"removing {directory.name}"):
                    shutil.rmtree(directory)
                    for suffix in ("", "-wal", "-shm"):
                        index = directory.with_suffix(INDEX_SUFFIX)
                        self.disk.unlink(index.with_name(index.name + suffix))
                log.info("removed %s: %d bytes of another fingerprint", directory.name, size)
                total -= size
        self.other_bytes = total
