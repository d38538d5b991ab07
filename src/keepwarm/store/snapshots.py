"""What the store does: staged slot files taken in, and given out again. Synchronous.

Theory of operation. `absorb` hands a staged file to the intake. `materialize` goes the other way:
the rows of a chain of extents, mapped, in the order of a slot file, into the staging directory.
Both look at the tree on the store's thread, whatever `lookup` said before. A file that turns out
untrustworthy on the way is quarantined with what hangs off it before the error is raised, so the
same doubt never comes up twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from keepwarm.core.tree import Match, Tokens, as_tokens
from keepwarm.errors import SnapshotError
from keepwarm.slotfile import Buffer, RowsPart
from keepwarm.slotfile.cells import as_view
from keepwarm.store.catalog import namespaces_of
from keepwarm.store.container import Header, checksum_of, read_container, write_container
from keepwarm.store.disk import Disk, disk_errors, map_file
from keepwarm.store.files import UNTRUSTED
from keepwarm.store.forms import Form, RowsForm, Taken, WholeForm
from keepwarm.store.intake import Intake, Why
from keepwarm.store.shelf import Shelf, ShelfSettings
from keepwarm.store.staging import Staging
from keepwarm.store.types import (
    Hit,
    Imported,
    KeptMark,
    Origin,
    Pin,
    Ready,
    Removed,
    Saved,
    StoreStats,
)

FLUSH_USES_AFTER_S = 60.0
"""Uses wait this long for the index: losing a minute of them in a power cut costs nothing."""


class Snapshots:
    """See the module. Lives on one thread; `lookup` and `find` alone may be called anywhere."""

    def __init__(self, settings: ShelfSettings, *, disk: Disk, now_s: float) -> None:
        """Open. Raises: ConfigError, SnapshotError; see `Shelf`."""
        self.shelf = Shelf(settings, disk=disk)
        try:
            with disk_errors("opening the staging directory"):
                self.staging = Staging(
                    settings.staging,
                    bound_bytes=settings.staging_bytes,
                    disk=disk,
                    file_mode=settings.file_mode,
                )
        except BaseException:
            self.shelf.close()
            raise
        left = self.staging.leftovers
        self.shelf.report = replace(self.shelf.report, staging_leftovers=left)
        layout, most = settings.layout, settings.max_tokens
        self.form: Form = (
            WholeForm(max_tokens=most)
            if layout is None
            else RowsForm(layout, streams=settings.streams, max_tokens=most)
        )
        self._intake = Intake(self.shelf, self.form)
        self._disk = disk
        self._flushed_s = now_s

    def close(self) -> None:
        """Write what is pending, empty the staging directory of our files, release the lock."""
        try:
            self.staging.clear()
        finally:
            self.shelf.close()

    def revive(self) -> None:
        """See `Shelf.revive`: what was staged belongs to the store that is gone."""
        try:
            is_new = self.shelf.revive()
        except SnapshotError:
            self.staging.forget()
            raise
        if is_new:
            self.staging.forget()

    def lookup(self, digests: Sequence[bytes], namespaces: Sequence[str]) -> Hit | None:
        """See `Store.lookup`."""
        hit = self.shelf.catalog.lookup(digests, namespaces)
        return None if hit is None else self._told(hit)

    def match(self, tokens: Sequence[int] | Tokens, namespace: str) -> Hit | None:
        """The longest restorable prefix of these tokens; `is_exact` if it is all of them."""
        self.revive()
        return self.find(tokens, namespace)

    def find(self, tokens: Sequence[int] | Tokens, namespace: str) -> Hit | None:
        """As `match`, from memory alone: as `lookup`, it may be called anywhere."""
        ids = as_tokens(tokens)
        catalog = self.shelf.catalog
        found = catalog.tree.match(ids, namespaces=namespaces_of(namespace))
        if found.extent_id is not None:
            found = catalog.restorable(found.extent_id, found.at)
        if found.extent_id is None:
            return None
        return self._told(Hit(-1, found.extent_id, found.at, found.at == ids.size, 0, False))

    def _told(self, hit: Hit) -> Hit | None:
        extent = self.shelf.catalog.tree.get(hit.extent_id)
        if extent is None:
            return None
        size = extent.boundaries.get(hit.at_tokens, 0) + self.form.payload_bytes(
            hit.at_tokens, file_bytes=extent.size_bytes
        )
        ready = self.staging.is_ready(hit.extent_id, hit.at_tokens)
        return replace(hit, restore_bytes=size, is_ready=ready)

    def absorb(
        self, name: str, why: Why, *, expected_tokens: Sequence[int] | Tokens | None, now_s: float
    ) -> Saved:
        """See `Store.absorb`."""
        path = self.staging.save_path(name)
        try:
            self.revive()
            with disk_errors(f"reading staged {name}"):
                buffer = map_file(path)
            taken = self.form.take(buffer)
            if expected_tokens is not None and not np.array_equal(taken.tokens, expected_tokens):
                raise SnapshotError("the slot holds other tokens than expected", reason="tokens")
            saved = self._keep(taken, why, file_bytes=len(buffer), now_s=now_s)
        except BaseException:  # whatever happened, the staged file is used up
            self.staging.discard(name)
            raise
        if taken.is_restorable:
            self.staging.keep(
                name,
                extent_id=saved.extent_id,
                at=saved.at_tokens,
                size_bytes=len(buffer),
                checksum=xxhash.xxh3_128_digest(buffer),
                is_pinned=self._is_pinned_end(saved.extent_id, saved.at_tokens),
            )
        else:
            self.staging.discard(name)
        return saved

    def _keep(self, taken: Taken, why: Why, *, file_bytes: int, now_s: float) -> Saved:
        saved, removed = self._intake.keep(taken, why, file_bytes=file_bytes, now_s=now_s)
        self.forget_ready(removed)
        return saved

    def mark(self, extent_id: int, at: int, namespace: str, marks: Sequence[KeptMark]) -> None:
        """See `Store.mark`."""
        self.revive()
        self._require(extent_id, at)
        self._intake.mark(extent_id, at, namespace=namespace, marks=marks)

    def _require(self, extent_id: int, at: int) -> None:
        """Raises: SnapshotError('unknown', 'boundary') unless a restore can end exactly there."""
        catalog = self.shelf.catalog
        extent = catalog.tree.get(extent_id)
        if extent is None or not extent.lo < at <= extent.hi or (extent.whole and at != extent.hi):
            raise SnapshotError(f"no extent {extent_id} with {at} tokens", reason="unknown")
        if catalog.restorable(extent_id, at) != Match(extent_id, at):
            raise SnapshotError(f"nothing can be restored at {at} tokens", reason="boundary")

    def materialize(self, extent_id: int, at: int) -> Ready:
        """See `Store.materialize`."""
        self.revive()
        self._require(extent_id, at)
        ready = self.staging.hold(extent_id, at)
        if ready is not None:
            self.shelf.counts.ready_hits += 1
            return Ready(ready.name, extent_id, at, ready.size_bytes)
        _, buffers = self._assemble(extent_id, at, for_engine=True)
        size = sum(len(as_view(buffer)) for buffer in buffers)
        name, checksum = self.staging.write(size, buffers)
        self.staging.keep(
            name,
            extent_id=extent_id,
            at=at,
            size_bytes=size,
            checksum=checksum,
            is_pinned=self._is_pinned_end(extent_id, at),
            is_written_here=True,
        )
        self.staging.hold(extent_id, at)
        self.shelf.counts.materialized += 1
        return Ready(name, extent_id, at, size)

    def _assemble(
        self, extent_id: int, at: int, *, for_engine: bool
    ) -> tuple[Tokens, Sequence[Buffer]]:
        """Tokens and slot file of a prefix. An untrusted file is quarantined on the way.

        Raises: SnapshotError with the reason.
        """
        shelf, catalog = self.shelf, self.shelf.catalog
        parts: list[RowsPart] = []
        for link in catalog.tree.chain(extent_id, at):
            with self._quarantining(link.extent_id):
                payload = shelf.files.open(catalog.row(link.extent_id))
            hi = catalog.tree[link.extent_id].hi
            parts.append(RowsPart(payload, link.lo, hi, link.take))
        tokens = catalog.tree.tokens_of(extent_id, at)
        state: Buffer | None = None
        if self.form.needs_boundary:
            with self._quarantining(extent_id, at):
                state = shelf.files.open(catalog.end(extent_id, at))
        return tokens, self.form.give(tokens, parts, state, for_engine=for_engine)

    @contextlib.contextmanager
    def _quarantining(self, extent_id: int, at: int | None = None) -> Iterator[None]:
        """Whatever turns out untrustworthy inside, of an extent or one of its ends, is set aside.

        Not if all of the store is gone: that says nothing against what it held.
        """
        try:
            yield
        except SnapshotError as error:
            if error.reason in UNTRUSTED:
                self.revive()
                extent = self.shelf.catalog.tree.get(extent_id)
                if extent is not None and at is None:
                    self.forget_ready(self.shelf.quarantine_extent(extent_id))
                elif extent is not None and at is not None and at in extent.boundaries:
                    self.shelf.quarantine_end(extent_id, at)
            raise

    def _check(self, extent_id: int) -> None:
        """Compare an extent's file with its row, once a life. Raises: as `ExtentFiles.check`."""
        with self._quarantining(extent_id):
            self.shelf.files.check(self.shelf.catalog.row(extent_id))

    def touch(self, extent_id: int, at: int, *, now_s: float) -> None:
        """See `Store.touch`."""
        extent = self.shelf.catalog.tree.get(extent_id)
        if extent is None or not extent.lo < at <= extent.hi:
            return
        self.shelf.catalog.touch(extent_id, extent.hi if extent.whole else at, now_s=now_s)
        if not 0 <= now_s - self._flushed_s < FLUSH_USES_AFTER_S:  # clocks are set back, too
            self._flushed_s = now_s
            self.shelf.flush_uses()

    def pin(
        self,
        name: str,
        extent_id: int,
        at: int,
        *,
        origin: Origin,
        digest: bytes | None,
        prefill_s: float,
        now_s: float,
    ) -> Pin:
        """See `Store.pin`."""
        self.revive()
        self._require(extent_id, at)
        pin = Pin(name, extent_id, at, origin, digest, prefill_s, now_s, None, 0)
        with disk_errors(f"pinning {name}"), self.shelf.index.transaction():
            self.shelf.index.put_pin(pin)
        self.shelf.catalog.set_pin(pin)
        self.staging.mark_pinned(self._is_pinned_end)
        return pin

    def unpin(self, name: str) -> bool:
        """See `Store.unpin`."""
        if name not in self.shelf.catalog.pins:
            return False
        with disk_errors(f"unpinning {name}"), self.shelf.index.transaction():
            self.shelf.index.drop_pin(name)
        self.shelf.catalog.drop_pin(name)
        self.staging.mark_pinned(self._is_pinned_end)
        return True

    def _is_pinned_end(self, extent_id: int, at: int) -> bool:
        pins = self.shelf.catalog.pins.values()
        return any((pin.extent_id, pin.at_tokens) == (extent_id, at) for pin in pins)

    def quarantine(self, extent_id: int, at: int, namespace: str) -> Removed:
        """See `Store.quarantine`."""
        self.revive()
        catalog = self.shelf.catalog
        holder = catalog.tree.holder(extent_id, at) if extent_id in catalog.tree else None
        if holder is None:
            return Removed()
        self.staging.forget({holder})
        for link in catalog.tree.chain(holder, at):
            removed = self._quarantine_if_damaged(link.extent_id, None)
            if removed is not None:
                return removed
        if at in catalog.tree[holder].boundaries:
            removed = self._quarantine_if_damaged(holder, at)
            if removed is not None:
                return removed
        self.shelf.forget_marks(namespace, extent_id=holder, at=at)
        ending = [p for p in catalog.pins.values() if (p.extent_id, p.at_tokens) == (holder, at)]
        return Removed(pins=tuple(pin.name for pin in ending))

    def _quarantine_if_damaged(self, extent_id: int, at: int | None) -> Removed | None:
        """Compare one file anew; None if it is what was written, or can't be read just now."""
        shelf = self.shelf
        row = shelf.catalog.row(extent_id) if at is None else shelf.catalog.end(extent_id, at)
        try:
            shelf.files.check_again(row)
        except SnapshotError as error:
            if error.reason not in UNTRUSTED:
                return None
            if at is not None:
                return shelf.quarantine_end(extent_id, at)
            removed = shelf.quarantine_extent(extent_id)
            self.forget_ready(removed)
            return removed
        return None

    def forget_marks(self) -> int:
        """See `Store.forget_marks`."""
        return self.shelf.forget_marks(None)

    def prune(self, bound_bytes: int) -> Removed:
        """See `Store.prune`."""
        freed = self.shelf.files.empty_quarantine() + self.shelf.clear_refuse()
        removed = self.shelf.evict(bound_bytes)
        self.forget_ready(removed)
        return replace(removed, size_bytes=removed.size_bytes + freed)

    def forget_ready(self, removed: Removed) -> None:
        """Remove ready files of extents that are gone."""
        self.staging.forget(set(removed.extents))

    def proved_tokens(self, extent_id: int, at: int) -> Tokens:
        """See `Store.tokens_of`. The checksums cover the tokens; each is compared once a life."""
        self.revive()
        tokens = self.tokens_of(extent_id, at)
        for link in self.shelf.catalog.tree.chain(extent_id, at):
            self._check(link.extent_id)
        return tokens

    def tokens_of(self, extent_id: int, at: int) -> Tokens:
        """The tokens of a prefix, as the index has them. Raises: SnapshotError('unknown')."""
        try:
            return self.shelf.catalog.tree.tokens_of(extent_id, at)
        except (KeyError, ValueError) as error:
            raise SnapshotError(f"no extent {extent_id} with {at} tokens", reason="unknown") from (
                error
            )

    def extent_ids(self) -> list[int]:
        """All extents there are now."""
        return [extent.id for extent in self.shelf.catalog.tree]

    def stats(self) -> StoreStats:
        """See `Store.stats`. May be called anywhere."""
        shelf, catalog, counts = self.shelf, self.shelf.catalog, self.shelf.counts
        return StoreStats(
            extents=len(catalog.tree),
            boundaries=catalog.end_count(),
            pins=len(catalog.pins),
            marks=catalog.mark_count,
            kept_tokens=catalog.kept_tokens,
            used_bytes=shelf.used_bytes,
            other_bytes=shelf.neighbours.size_bytes,
            quarantined_bytes=shelf.files.quarantined_bytes,
            quota_bytes=shelf.settings.quota_bytes,
            staging_bytes=self.staging.used_bytes,
            ready_files=len(self.staging),
            saves=counts.saves,
            written_bytes=counts.written_bytes,
            materialized=counts.materialized,
            ready_hits=counts.ready_hits,
            evicted_extents=counts.evicted_extents,
            evicted_bytes=counts.evicted_bytes,
            quarantined_extents=counts.quarantined_extents,
            quarantined_ends=counts.quarantined_ends,
            damaged_staged=self.staging.damaged,
        )

    def export(self, what: str | tuple[int, int], path: Path) -> int:
        """See `Store.export`."""
        pin: Pin | None = None
        if isinstance(what, str):
            pin = self.shelf.catalog.pins.get(what)
            if pin is None:
                raise SnapshotError(f"no pin is called {what}", reason="unknown")
            what = pin.extent_id, pin.at_tokens
        extent_id, at = what
        self._require(extent_id, at)
        tokens, buffers = self._assemble(extent_id, at, for_engine=False)
        row = self.shelf.catalog.row(extent_id)
        layout = self.shelf.settings.layout
        header = Header(
            fingerprint=self.shelf.settings.fingerprint,
            form=self.form.name,
            layout=None if layout is None else layout.to_json(),
            tokens=int(tokens.size),
            slot_file_bytes=sum(len(as_view(buffer)) for buffer in buffers),
            checksum=checksum_of(tokens, buffers),
            pin=None if pin is None else pin.name,
            origin=Origin(row.origin) if pin is None else pin.origin,
            digest=None if pin is None else pin.digest,
            prefill_s=row.prefill_s if pin is None else pin.prefill_s,
        )
        return write_container(path, header, tokens, buffers, disk=self._disk)

    def import_(self, path: Path, *, namespace: str, now_s: float) -> Imported:
        """See `Store.import_`."""
        self.revive()
        found = read_container(path)
        header = found.header
        mine = self.shelf.settings.identity
        if header.fingerprint != mine["fingerprint"]:
            raise SnapshotError(
                f"{path} was saved with another model, engine or template than the running one",
                reason="fingerprint",
            )
        if (header.layout or "whole") != mine["layout"]:
            raise SnapshotError(f"{path} has rows of another layout", reason="layout")
        taken = self.form.take(found.slot_file)
        if not np.array_equal(taken.tokens, found.tokens):
            raise SnapshotError(f"{path} holds other tokens than it says", reason="tokens")
        marks = [] if header.digest is None else [KeptMark(header.digest, taken.tokens.size)]
        why = Why(namespace, marks, Origin.IMPORT, header.prefill_s)
        saved = self._keep(taken, why, file_bytes=len(found.slot_file), now_s=now_s)
        if header.pin is not None:
            self.pin(
                header.pin,
                saved.extent_id,
                saved.at_tokens,
                origin=header.origin,
                digest=header.digest,
                prefill_s=header.prefill_s,
                now_s=now_s,
            )
        return Imported(saved, header.pin, found.tokens.copy())
