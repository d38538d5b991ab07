"""All that the store knows, in memory: tree, marks, pins, uses. No disk.

Theory of operation. The catalogue mirrors the index. It is filled from it on opening; afterwards
the store's thread changes both, the index first where that can fail. `lookup` is called on
the event loop's thread meanwhile, so it only reads, and takes a missing key for a miss: what it
says is advice, and the store's thread checks again before it acts on it.

A mark points at the extent that holds its last token, so it outlives whatever hangs behind.

Invariants:
- For each pin, every extent of its chain counts in `_pinned` and can't be evicted, nor the boundary
  state at its end.
- Whatever could be evicted is in `queue` (see `core.evict`).
- `used_bytes` and `kept_tokens` are the sums over the tree, `held_bytes` those of each namespace.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from keepwarm.core.evict import Candidate, SharedQueue, heat_after_use, value
from keepwarm.core.tree import SHARED, Extent, Match, TokenTree
from keepwarm.store.index import BoundaryRow, ExtentRow, Use
from keepwarm.store.types import Hit, KeptMark, Pin


@dataclass(slots=True)
class Uses:
    """How an extent was used. `heat` as in `core.evict`."""

    used_s: float
    heat: float
    count: int


class MarkPlace(NamedTuple):
    """Where a digest's prefix ends."""

    extent_id: int
    at: int
    is_exact: bool


class Catalog:
    """See the module. `needs_boundary`: restores end only where there is a boundary state."""

    def __init__(self, *, needs_boundary: bool) -> None:
        self.tree = TokenTree()
        self.queue = SharedQueue()
        self.pins: dict[str, Pin] = {}
        self.used_bytes = 0
        self.held_bytes: Counter[str] = Counter()
        self.kept_tokens = 0
        self.mark_count = 0
        self._needs_boundary = needs_boundary
        self._rows: dict[int, ExtentRow] = {}
        self._ends: dict[tuple[int, int], BoundaryRow] = {}
        self._uses: dict[int, Uses] = {}  # of those used since the start; the others' are in rows
        self._dirty: set[int] = set()
        self._marks: dict[str, dict[bytes, MarkPlace]] = {}
        self._pinned: Counter[int] = Counter()
        self._pinned_ends: Counter[tuple[int, int]] = Counter()

    def row(self, extent_id: int) -> ExtentRow:
        """The extent's row as it was written. Raises: KeyError."""
        return self._rows[extent_id]

    def end(self, extent_id: int, at: int) -> BoundaryRow:
        """The boundary state's row. Raises: KeyError."""
        return self._ends[extent_id, at]

    def uses(self, extent_id: int) -> Uses:
        """How the extent was used. Raises: KeyError."""
        uses = self._uses.get(extent_id)
        if uses is None:
            row = self._rows[extent_id]
            return Uses(row.used_s, row.heat, row.uses)
        return uses

    def end_count(self) -> int:
        """How many boundary states are kept."""
        return len(self._ends)

    def is_pinned(self, extent_id: int) -> bool:
        """Whether some pin needs this extent."""
        return extent_id in self._pinned

    def pinned_bytes(self) -> int:
        """What eviction can't free."""
        tree = self.tree
        return sum(tree[i].size_bytes for i in self._pinned) + sum(
            self._ends[end].size_bytes for end in self._pinned_ends if end in self._ends
        )

    def restorable(self, extent_id: int, at: int) -> Match:
        """The longest part of this prefix that a restore can end at; `Match(None, 0)` if none.

        Raises: KeyError if the extent isn't there.
        """
        extent = self.tree[extent_id]
        if extent.whole:
            return Match(extent_id, at) if at == extent.hi else Match(None, 0)
        if not self._needs_boundary:
            return Match(extent_id, at)
        return self.tree.last_boundary(extent_id, at)

    def lookup(self, digests: Sequence[bytes], namespaces: Sequence[str]) -> Hit | None:
        """The longest restorable prefix among these digests, which are given shortest first.

        Only places that were counted are told: an estimate may lie behind where two renderings
        part. `restore_bytes` and `is_ready` are for the caller to fill in.
        """
        tables = [t for n in namespaces if (t := self._marks.get(n)) is not None]
        best: Hit | None = None
        for index in range(len(digests) - 1, -1, -1):
            for table in tables:
                place = table.get(digests[index])
                if place is None or not place.is_exact:
                    continue
                try:
                    end = self.restorable(place.extent_id, place.at)
                except KeyError:
                    continue  # evicted at this moment
                if end.extent_id is not None and (best is None or end.at > best.at_tokens):
                    is_exact = place.is_exact and end.at == place.at
                    best = Hit(index, end.extent_id, end.at, is_exact, 0, False)
            if best is not None and best.is_exact:
                break
        return best

    def knows(self, digest: bytes, namespaces: Sequence[str]) -> bool:
        """Whether a digest has a place here, counted or estimated."""
        places = (self._marks.get(name, {}).get(digest) for name in namespaces)
        return any(place is not None and place.extent_id in self.tree for place in places)

    def add_extent(self, row: ExtentRow) -> Extent:
        """Raises: ValueError if the tree refuses it; nothing changed."""
        extent = self.tree.add(
            row.id,
            parent=row.parent,
            lo=row.lo,
            token_bytes=row.tokens,
            namespace=row.namespace,
            size_bytes=row.size_bytes,
            whole=bool(row.whole),
        )
        self._rows[row.id] = row
        self._count(extent, row.size_bytes)
        self.kept_tokens += extent.hi - extent.lo
        return extent

    def add_end(self, row: BoundaryRow) -> None:
        """Raises: KeyError or ValueError if the tree refuses it; nothing changed."""
        self.tree.add_boundary(row.extent_id, row.at, size_bytes=row.size_bytes)
        self._ends[row.extent_id, row.at] = row
        self._count(self.tree[row.extent_id], row.size_bytes)

    def _count(self, extent: Extent, size_bytes: int) -> None:
        self.used_bytes += size_bytes
        self.held_bytes[extent.namespace] += size_bytes

    def held_by_key(self) -> dict[str, int]:
        """Bytes that each API key holds for itself; what all share is nobody's."""
        return {name: held for name, held in self.held_bytes.items() if held and name != SHARED}

    def remove_extent(
        self, extent_id: int, marks: Iterable[tuple[str, bytes]]
    ) -> list[BoundaryRow]:
        """Forget a leaf and its `marks`; returns its boundary states.

        Marks go first, so that a look-up at this moment finds nothing rather than half of it.
        """
        for namespace, digest in marks:
            self.forget_mark(namespace, digest, extent_id=extent_id)
        extent = self.tree.remove(extent_id)
        ends = [self._ends.pop((extent_id, at)) for at in extent.boundaries]
        del self._rows[extent_id]
        self._uses.pop(extent_id, None)
        self._dirty.discard(extent_id)
        self._count(extent, -extent.total_bytes)
        self.kept_tokens -= extent.hi - extent.lo
        if extent.parent is not None:
            self.offer(extent.parent)
        return ends

    def remove_end(self, extent_id: int, at: int) -> BoundaryRow:
        """Forget a boundary state. Raises: KeyError."""
        row = self._ends.pop((extent_id, at))
        self._count(self.tree[extent_id], -self.tree.remove_boundary(extent_id, at))
        self.offer(extent_id)  # if no end is left in it, its rows are of no use any more
        return row

    def better_mark(
        self, namespace: str, mark: KeptMark, *, holder: int
    ) -> tuple[MarkPlace, MarkPlace | None] | None:
        """Where a mark held by extent `holder` would go, and the place that it would leave.

        None if what is known already says as much. Changes nothing: see `load_mark`.
        """
        known = self._marks.get(namespace, {}).get(mark.digest)
        place = MarkPlace(holder, mark.at_tokens, mark.is_exact)
        if known is None or known.extent_id not in self.tree:
            return place, None
        says, said = (mark.is_exact, mark.at_tokens), (known.is_exact, known.at)
        # The same tokens may be kept twice, shared and private, with an end at one place only.
        is_good = self.restorable(known.extent_id, known.at) == Match(known.extent_id, known.at)
        if known == place or says < said or (says == said and is_good):
            return None
        return place, known

    def load_marks(self, rows: Iterable[tuple[int, int, int, str, bytes]]) -> None:
        """Take over the index's marks: extent id, at, exact, namespace, digest."""
        known = {extent.id for extent in self.tree}
        tables: defaultdict[str, dict[bytes, MarkPlace]] = defaultdict(dict)
        for row in rows:
            if row[0] in known:
                tables[row[3]][row[4]] = MarkPlace._make(row[:3])
        self._marks |= tables
        self.mark_count = sum(map(len, tables.values()))

    def load_mark(self, namespace: str, digest: bytes, place: MarkPlace) -> None:
        """Set a mark without looking at what is known."""
        table = self._marks.setdefault(namespace, {})
        self.mark_count += digest not in table
        table[digest] = place

    def mark_place(self, namespace: str, digest: bytes) -> MarkPlace | None:
        """Where a digest's prefix ends, as far as this namespace alone knows."""
        return self._marks.get(namespace, {}).get(digest)

    def marks_at(
        self, namespace: str | None, *, extent_id: int | None, at: int | None
    ) -> list[tuple[str, bytes, int]]:
        """Marks as (namespace, digest, extent id); None means any."""
        return [
            (name, digest, place.extent_id)
            for name, table in self._marks.items()
            if namespace is None or name == namespace
            for digest, place in table.items()
            if extent_id is None or (place.extent_id, place.at) == (extent_id, at)
        ]

    def forget_mark(self, namespace: str, digest: bytes, *, extent_id: int) -> None:
        """Forget a digest if it still points into this extent."""
        table = self._marks.get(namespace, {})
        place = table.get(digest)
        if place is not None and place.extent_id == extent_id:
            del table[digest]
            self.mark_count -= 1

    def set_pin(self, pin: Pin) -> None:
        """Pin, or move the pin of that name. Raises: KeyError or ValueError; nothing changed."""
        chain = self.tree.chain(pin.extent_id, pin.at_tokens)
        if pin.name in self.pins:
            self.drop_pin(pin.name)
        self.pins = {**self.pins, pin.name: pin}
        self._pinned.update(link.extent_id for link in chain)
        self._pinned_ends[pin.extent_id, pin.at_tokens] += 1

    def drop_pin(self, name: str) -> Pin:
        """Unpin. Raises: KeyError."""
        pin = self.pins[name]
        self.pins = {other: p for other, p in self.pins.items() if other != name}
        chain = [link.extent_id for link in self.tree.chain(pin.extent_id, pin.at_tokens)]
        self._pinned.subtract(chain)
        self._pinned = +self._pinned
        self._pinned_ends[pin.extent_id, pin.at_tokens] -= 1
        self._pinned_ends = +self._pinned_ends
        for extent_id in chain:
            self.offer(extent_id)
        return pin

    def pins_through(self, extent_ids: Iterable[int]) -> list[str]:
        """The pins whose chain goes through one of these extents."""
        lost = set(extent_ids)
        return [
            pin.name
            for pin in self.pins.values()
            if any(link.extent_id in lost for link in self.tree.chain(pin.extent_id, pin.at_tokens))
        ]

    def touch(self, extent_id: int, at: int, *, now_s: float) -> None:
        """Note a use of a prefix, for all extents that hold it and for its pins.

        Raises: KeyError if the extent isn't there, ValueError if it doesn't hold `at` tokens.
        """
        for link in self.tree.chain(extent_id, at):
            uses = self._uses[link.extent_id] = self.uses(link.extent_id)
            uses.heat = heat_after_use(uses.heat, now_s=now_s)
            uses.used_s = now_s
            uses.count += 1
            self._dirty.add(link.extent_id)
        for name, pin in self.pins.items():
            if (pin.extent_id, pin.at_tokens) == (extent_id, at):
                used = replace(pin, used_s=now_s, uses=pin.uses + 1)
                self.pins = {**self.pins, name: used}

    def take_uses(self) -> list[Use]:
        """The uses since the last call, for the index."""
        dirty, self._dirty = self._dirty, set()
        return [
            Use(extent_id, uses.used_s, uses.heat, uses.count)
            for extent_id in dirty
            if (uses := self._uses.get(extent_id)) is not None
        ]

    def offer(self, extent_id: int) -> None:
        """Put into the queue what of this extent can be evicted."""
        extent = self.tree[extent_id]
        for candidate, worth in self._offers(extent):
            self.queue.push(extent.namespace, candidate, worth)

    def offer_all(self) -> None:
        """Fill the queue, after loading."""
        offers: defaultdict[str, list[tuple[Candidate, float]]] = defaultdict(list)
        for extent in self.tree:
            if extent.boundaries or not self.tree.children_count(extent.id):
                offers[extent.namespace] += self._offers(extent)
        self.queue.fill(offers)

    def _offers(self, extent: Extent) -> Iterator[tuple[Candidate, float]]:
        for at in (None, *extent.boundaries):
            candidate = Candidate(extent.id, at)
            worth = self.worth(candidate)
            if worth is not None:
                yield candidate, worth

    def worth(self, candidate: Candidate) -> float | None:
        """The value of a candidate as `core.evict` counts it; None if it can't be evicted."""
        extent = self.tree.get(candidate.extent_id)
        if extent is None:
            return None
        if candidate.at is not None:
            return self._end_worth(extent, candidate.at)
        if extent.id in self._pinned or self.tree.children_count(extent.id):
            return None
        if self._needs_boundary and not extent.whole and not extent.boundaries:
            return -math.inf  # rows that no restore can reach
        row, uses = self._rows[extent.id], self.uses(extent.id)
        return value(prefill_s=row.prefill_s, size_bytes=extent.total_bytes, heat=uses.heat)

    def _end_worth(self, extent: Extent, at: int) -> float | None:
        size = extent.boundaries.get(at)
        if size is None or (extent.id, at) in self._pinned_ends:
            return None
        row, uses = self._rows[extent.id], self.uses(extent.id)
        # Without it a restore ends at the boundary before: the tokens from there are prefilled.
        spared = at - self.tree.last_boundary(extent.id, at - 1).at
        seconds = row.prefill_s * spared / (extent.hi - extent.lo)
        return value(prefill_s=seconds, size_bytes=size, heat=uses.heat)


def namespaces_of(namespace: str) -> tuple[str, ...]:
    """Where a request of this namespace may find something: its own, and what all share."""
    return (SHARED,) if namespace == SHARED else (SHARED, namespace)
