"""Taking a slot file in: what of it is new, written and entered in one go.

Theory of operation. The longest prefix of the file's tokens that is kept is found in the tree. The
rows behind it become one new extent; boundary states are hung on the ends they hold for. Files are
written and flushed first, then one transaction names them all, then the catalogue learns of them.
A failure before the transaction is over leaves nothing but refuse, and that is removed.

A private namespace's tokens are matched against its own and the shared extents, shared ones only
against shared ones, so what is shared never depends on what is private.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from keepwarm.core.evict import heat_after_use
from keepwarm.core.tree import Match
from keepwarm.errors import SnapshotError
from keepwarm.slotfile import Buffer
from keepwarm.slotfile.cells import as_view
from keepwarm.store.catalog import MarkPlace, namespaces_of
from keepwarm.store.disk import disk_errors
from keepwarm.store.files import FileKey
from keepwarm.store.forms import Form, Taken
from keepwarm.store.index import BoundaryRow, ExtentRow
from keepwarm.store.shelf import Shelf
from keepwarm.store.types import KeptMark, Origin, Removed, Saved

# Message starts whose states are kept with a conversation, for models that can't be cut.
_MESSAGE_STARTS = 3
# What a byte on the disk costs: 500 MB/s, a middling SSD.
_WRITE_S_PER_BYTE = 2e-9


@dataclass(frozen=True, slots=True)
class Why:
    """What is known of a save beside its tokens. `prefill_s`: of all of them, cold."""

    namespace: str
    marks: Sequence[KeptMark]
    origin: Origin
    prefill_s: float


@dataclass(frozen=True, slots=True)
class _Plan:
    """What of a file is new: `row` for its new tokens, states for `ends` that have none yet."""

    known: Match
    row: ExtentRow | None
    ends: Sequence[tuple[BoundaryRow, Buffer]]


class Intake:
    """See the module. Lives on the store's thread."""

    def __init__(self, shelf: Shelf, form: Form) -> None:
        self._shelf = shelf
        self._form = form

    def keep(
        self, taken: Taken, why: Why, *, file_bytes: int, now_s: float
    ) -> tuple[Saved, Removed]:
        """Keep what is new of a slot file of `file_bytes`; also tells what had to go for it.

        Raises: SnapshotError('mark', 'quota', 'no_space', 'io', 'index'); nothing is half-written.
        """
        count = taken.tokens.size
        if taken.held_tokens > count:
            why = _before_media(why, kept=count, held=taken.held_tokens)
        _check_marks(why.marks, at_most=count)
        plan = self._plan(taken, why, file_bytes=file_bytes, now_s=now_s)
        need = sum(end.size_bytes for end, _ in plan.ends)
        need += plan.row.size_bytes if plan.row is not None else 0
        removed = Removed()
        known = plan.known.extent_id
        if need:
            tree = self._shelf.catalog.tree
            chain = [] if known is None else tree.chain(known, plan.known.at)
            kept = {link.extent_id for link in chain}
            removed = self._shelf.make_room(need, namespace=why.namespace, keep=kept)
        self._enter(self._write(plan, taken), why)
        self._shelf.counts.saves += 1
        self._shelf.counts.written_bytes += need
        self._shelf.tell()
        extent_id = plan.row.id if plan.row is not None else known
        assert extent_id is not None  # a file has a token, and it is known or new
        ends = tuple(sorted({at for at, _ in taken.ends}))
        return Saved(extent_id, count, count - plan.known.at, need, ends), removed

    def mark(self, extent_id: int, at: int, *, namespace: str, marks: Sequence[KeptMark]) -> None:
        """Enter marks for a prefix that is kept. Raises: SnapshotError('mark', 'no_space', ...)."""
        _check_marks(marks, at_most=at)
        why = Why(namespace, marks, Origin.CONVERSATION, 0.0)
        self._enter(_Plan(Match(extent_id, at), None, []), why)

    def _plan(self, taken: Taken, why: Why, *, file_bytes: int, now_s: float) -> _Plan:
        tree = self._shelf.catalog.tree
        count = taken.tokens.size
        known = tree.match(taken.tokens, namespaces=namespaces_of(why.namespace))
        if self._form.is_whole and known.at != count:
            known = Match(None, 0)  # a shorter whole snapshot is no part of a longer one
        row = None
        if known.at < count:
            row = ExtentRow(
                id=self._shelf.take_id(),
                parent=known.extent_id,
                lo=known.at,
                namespace=why.namespace,
                whole=int(self._form.is_whole),
                size_bytes=self._form.payload_bytes(count - known.at, file_bytes=file_bytes),
                checksum=b"",
                origin=why.origin.value,
                prefill_s=why.prefill_s * (count - known.at) / count,
                created_s=now_s,
                used_s=now_s,
                heat=heat_after_use(None, now_s=now_s),
                uses=0,
                tokens=np.ascontiguousarray(taken.tokens[known.at :], "<i4").tobytes(),
            )
        wanted = {count, *(mark.at_tokens for mark in why.marks if mark.is_exact)}
        wanted |= _worth_keeping(taken.ends, why, count)
        ends: dict[int, tuple[BoundaryRow, Buffer]] = {}
        for at, state in taken.ends:
            holder = self._holder(known, row, at)
            if at not in wanted or holder is None or at in ends:
                continue
            extent = tree.get(holder)
            if extent is None or at not in extent.boundaries:
                ends[at] = BoundaryRow(holder, at, as_view(state).nbytes, b""), state
        return _Plan(known, row, list(ends.values()))

    def _holder(self, known: Match, row: ExtentRow | None, at: int) -> int | None:
        """The extent that holds position `at` of the planned prefix."""
        if row is not None and at > known.at:
            return row.id
        if known.extent_id is None:
            return None
        return self._shelf.catalog.tree.holder(known.extent_id, at)

    def _write(self, plan: _Plan, taken: Taken) -> _Plan:
        """Put the files of a plan in place; returns it with their checksums."""
        files = self._shelf.files
        done: list[FileKey] = []
        row = plan.row
        ends: list[tuple[BoundaryRow, Buffer]] = []
        try:
            if row is not None:
                key = FileKey(row.id)
                done.append(key)
                rows = taken.rows(row.lo, taken.tokens.size)
                written = files.write(key, rows, seal=row.seal)
                row = row._replace(checksum=written.checksum, size_bytes=written.size_bytes)
            for end, state in plan.ends:
                key = FileKey(end.extent_id, end.at)
                done.append(key)
                taken.check_end(state)
                written = files.write(key, [state], seal=end.seal)
                ends.append((end._replace(checksum=written.checksum), state))
        except SnapshotError:
            files.remove(done)
            raise
        return _Plan(plan.known, row, ends)

    def _enter(self, plan: _Plan, why: Why) -> None:
        """Name written files, and marks, in the index, then in the catalogue."""
        shelf, catalog = self._shelf, self._shelf.catalog
        moves = self._mark_moves(plan, why)
        if plan.row is None and not plan.ends and not moves:
            return
        try:
            with disk_errors("entering into the index"), shelf.index.transaction():
                if plan.row is not None:
                    shelf.index.add_extent(plan.row)
                for end, _ in plan.ends:
                    shelf.index.add_boundary(end)
                for mark, place, left in moves:
                    if left is not None and left.extent_id != place.extent_id:
                        shelf.index.drop_mark(left.extent_id, why.namespace, mark.digest)
                    shelf.index.put_mark(place.extent_id, why.namespace, mark)
        except SnapshotError:
            refuse = [FileKey(end.extent_id, end.at) for end, _ in plan.ends]
            if plan.row is not None:
                refuse.append(FileKey(plan.row.id))
            shelf.files.remove(refuse)
            raise
        changed = {end.extent_id for end, _ in plan.ends}
        if plan.row is not None:
            catalog.add_extent(plan.row)
            changed.add(plan.row.id)
        for end, _ in plan.ends:
            catalog.add_end(end)
        for mark, place, _ in moves:
            catalog.load_mark(why.namespace, mark.digest, place)
        for extent_id in changed:
            catalog.offer(extent_id)

    def _mark_moves(
        self, plan: _Plan, why: Why
    ) -> list[tuple[KeptMark, MarkPlace, MarkPlace | None]]:
        """The marks that say more than is known: where they go, and which place they leave."""
        moves: list[tuple[KeptMark, MarkPlace, MarkPlace | None]] = []
        for mark in why.marks:
            holder = self._holder(plan.known, plan.row, mark.at_tokens)
            assert holder is not None  # `_check_marks`: inside the prefix
            better = self._shelf.catalog.better_mark(why.namespace, mark, holder=holder)
            if better is not None:
                moves.append((mark, *better))
        return moves


def _worth_keeping(ends: Sequence[tuple[int, Buffer]], why: Why, count: int) -> set[int]:
    """The last message starts whose state is cheaper to keep than what it spares to prefill.

    A conversation whose last question is edited, or whose history is rendered otherwise, goes on
    from one of them.
    """
    s_per_token = why.prefill_s / count
    kept: set[int] = set()
    later = count
    for at, state in sorted(((at, state) for at, state in ends if at < count), reverse=True):
        if len(kept) == _MESSAGE_STARTS:
            break
        if (later - at) * s_per_token >= as_view(state).nbytes * _WRITE_S_PER_BYTE:
            kept.add(at)
            later = at
    return kept


def _before_media(why: Why, *, kept: int, held: int) -> Why:
    """What is known of the part of a save that comes before its first picture."""
    marks = [mark for mark in why.marks if mark.at_tokens <= kept]
    return replace(why, marks=marks, prefill_s=why.prefill_s * kept / held)


def _check_marks(marks: Sequence[KeptMark], *, at_most: int) -> None:
    for mark in marks:
        if not 0 < mark.at_tokens <= at_most:
            raise SnapshotError(f"a mark at {mark.at_tokens} of {at_most} tokens", reason="mark")
