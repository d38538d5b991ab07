"""The token tree: which prefixes are kept, as extents of tokens that share what begins alike.

Theory of operation. An *extent* is a run of tokens `[lo, hi)` whose KV rows were saved together. It
hangs off its parent at `lo`, anywhere inside the parent or at its end; a root begins at 0. The
tokens of a prefix are the parents' tokens up to where each child hangs, then the extent's own, so a
token that many prefixes share is kept once. Extents are never split, merged or changed: a
prefix that leaves an extent in the middle becomes a child that hangs there.

An extent belongs to a namespace. `""` is shared by all; another namespace's extents may hang off
shared ones, never the other way round, so that what one tenant sent can't be seen in, or be lost
with, what all rely on. The same tokens may therefore exist once shared and once in a namespace.

A *boundary* is a position inside an extent `(lo, hi]` for which state is kept that holds only there
(a sliding window's cells, a hybrid's recurrent state). Models that need one restore only there.

A *whole* snapshot is an extent without parent or children, matched at exactly its end: the form
for state whose rows can't be told apart.

Invariants:
- `parent.lo < lo <= parent.hi`, and `lo < hi`; at a root `lo == 0`.
- `namespace == parent.namespace`, or the parent is shared.
- A child's first token differs from its parent's token at that position if the parent has one, so
  a walk that ends at position p of an extent needs only the children that hang at p. It is found by
  (parent, position, first token, namespace), which is unique.
- Only a leaf can be removed, so whatever is listed has all of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHARED = ""
"""The namespace that every request may use."""

Tokens = NDArray[np.int32]

_ROOT = 0  # parent key of roots; extent ids begin at 1

_NO_BOUNDARIES: Mapping[int, int] = MappingProxyType({})  # most extents have none


class Match(NamedTuple):
    """The longest known prefix of some tokens: the first `at` of them, the last in `extent_id`.

    Nothing known is `Match(None, 0)`.
    """

    extent_id: int | None
    at: int


class Link(NamedTuple):
    """One extent's share of a prefix: its tokens `[lo, take)`."""

    extent_id: int
    lo: int
    take: int


@dataclass(slots=True)
class Extent:
    """Tokens `[lo, hi)` kept together; immutable but for its boundaries.

    `token_bytes` holds `hi - lo` little-endian int32, `size_bytes` is the rows' payload (the whole
    file if `whole`), `boundaries` maps a position in `(lo, hi]` to the bytes of its state.
    """

    id: int
    parent: int | None
    lo: int
    hi: int
    token_bytes: bytes
    namespace: str
    size_bytes: int
    whole: bool
    boundaries: Mapping[int, int]

    @property
    def tokens(self) -> Tokens:
        """The extent's own tokens, int32[hi - lo], read-only."""
        return np.frombuffer(self.token_bytes, dtype="<i4")

    @property
    def total_bytes(self) -> int:
        """Payload and boundary states together."""
        return self.size_bytes + sum(self.boundaries.values())


def as_tokens(tokens: Sequence[int] | Tokens) -> Tokens:
    """`tokens` as a contiguous little-endian int32 array.

    Raises: ValueError or OverflowError for what isn't one dimension of 32-bit integers.
    """
    array = np.ascontiguousarray(tokens, dtype="<i4")
    if array.ndim != 1:
        raise ValueError("tokens must be one-dimensional")
    return array


def common_tokens(left: Tokens, right: Tokens) -> int:
    """How many tokens `left` and `right` have in common at their beginning."""
    n = min(left.size, right.size)
    differs = left[:n] != right[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


class TokenTree:
    """All extents of one store, found by tokens. Not thread-safe for changes; see the module."""

    def __init__(self) -> None:
        self._extents: dict[int, Extent] = {}
        self._at: dict[tuple[int, int, bytes, str], int] = {}
        self._child_counts: dict[int, int] = {}
        self._whole: dict[int, dict[tuple[str, bytes], int]] = {}

    def __len__(self) -> int:
        """How many extents there are."""
        return len(self._extents)

    def __contains__(self, extent_id: int) -> bool:
        """Whether there is an extent of this id."""
        return extent_id in self._extents

    def __iter__(self) -> Iterator[Extent]:
        """All extents, parents before children."""
        return iter(self._extents.values())

    def __getitem__(self, extent_id: int) -> Extent:
        """One extent. Raises: KeyError."""
        return self._extents[extent_id]

    def get(self, extent_id: int) -> Extent | None:
        """The extent, or None if it isn't (or no longer) there."""
        return self._extents.get(extent_id)

    def children_count(self, extent_id: int) -> int:
        """How many extents hang off this one; 0 means that it can be removed."""
        return self._child_counts.get(extent_id, 0)

    def add(
        self,
        extent_id: int,
        *,
        parent: int | None,
        lo: int,
        token_bytes: bytes,
        namespace: str,
        size_bytes: int,
        whole: bool = False,
    ) -> Extent:
        """Hang a new extent of `len(token_bytes) / 4` tokens at position `lo` of `parent`.

        Raises: ValueError if an invariant of the module would break; the tree is unchanged.
        """
        hi = lo + len(token_bytes) // 4
        if extent_id in self._extents or extent_id <= _ROOT:
            raise ValueError(f"extent id {extent_id} is taken or not positive")
        if len(token_bytes) % 4 or hi <= lo:
            raise ValueError("an extent needs at least one whole token")
        extent = Extent(
            extent_id, parent, lo, hi, token_bytes, namespace, size_bytes, whole, _NO_BOUNDARIES
        )
        if whole:
            self._add_whole(extent)
        else:
            self._add_rows(extent)
        self._extents[extent_id] = extent
        return extent

    def _add_whole(self, extent: Extent) -> None:
        if extent.parent is not None or extent.lo != 0:
            raise ValueError("a whole snapshot has no parent")
        same_length = self._whole.setdefault(extent.hi, {})
        if same_length.setdefault((extent.namespace, extent.token_bytes), extent.id) != extent.id:
            raise ValueError("the same whole snapshot is already there")

    def _add_rows(self, extent: Extent) -> None:
        if extent.parent is None:
            if extent.lo != 0:
                raise ValueError("a root begins at position 0")
        else:
            parent = self._extents.get(extent.parent)
            if parent is None or parent.whole:
                raise ValueError(f"extent {extent.parent} can't be a parent")
            if not parent.lo < extent.lo <= parent.hi:
                raise ValueError("a child must hang inside its parent or at its end")
            if parent.namespace not in (SHARED, extent.namespace):
                raise ValueError("an extent may hang off its own namespace or the shared one")
            inside = (extent.lo - parent.lo) * 4
            if parent.token_bytes[inside : inside + 4] == extent.token_bytes[:4]:
                raise ValueError("the parent goes on with the same token: match before adding")
        key = self._key(extent)
        if key in self._at:
            raise ValueError("a child with this first token hangs there: match before adding")
        self._at[key] = extent.id
        if extent.parent is not None:
            self._child_counts[extent.parent] = self._child_counts.get(extent.parent, 0) + 1

    @staticmethod
    def _key(extent: Extent) -> tuple[int, int, bytes, str]:
        return (extent.parent or _ROOT, extent.lo, extent.token_bytes[:4], extent.namespace)

    def remove(self, extent_id: int) -> Extent:
        """Take a leaf out, boundaries included, and return it.

        Raises: ValueError if extents hang off it, KeyError if it isn't there; nothing changed.
        """
        extent = self._extents[extent_id]
        if self.children_count(extent_id):
            raise ValueError(f"extent {extent_id} has children")
        if extent.whole:
            del self._whole[extent.hi][extent.namespace, extent.token_bytes]
            if not self._whole[extent.hi]:
                del self._whole[extent.hi]
        else:
            del self._at[self._key(extent)]
            if extent.parent is not None:
                left = self._child_counts.pop(extent.parent) - 1
                if left:
                    self._child_counts[extent.parent] = left
        del self._extents[extent_id]
        return extent

    def subtree(self, extent_id: int) -> list[int]:
        """The extent and all that hangs off it, directly or not, in an order safe to remove.

        Looks at all extents: parents were added before their children, so one pass finds them.
        """
        found = dict.fromkeys([extent_id])  # keeps the order
        for extent in self._extents.values():
            if extent.parent in found:
                found[extent.id] = None
        return list(found)[::-1]

    def match(self, tokens: Tokens, *, namespaces: Sequence[str]) -> Match:
        """The longest kept prefix of `tokens` in these namespaces; ties go to the first named.

        Rows match to any length, whole snapshots only to exactly their own.
        """
        best = self._match_whole(tokens, namespaces)
        ahead: list[tuple[int, int]] = [(_ROOT, 0)]
        while ahead:
            owner, at = ahead.pop()
            if at > best.at:
                best = Match(owner, at)
            if at == tokens.size:
                continue
            first = tokens[at : at + 1].tobytes()
            # Last pushed is first walked, so the first namespace wins a tie.
            for namespace in reversed(namespaces):
                child_id = self._at.get((owner, at, first, namespace))
                if child_id is not None:
                    child = self._extents[child_id]
                    ahead.append((child_id, at + common_tokens(child.tokens, tokens[at:])))
        return best

    def _match_whole(self, tokens: Tokens, namespaces: Sequence[str]) -> Match:
        for length in sorted(self._whole, reverse=True):
            if length <= tokens.size:
                prefix = tokens[:length].tobytes()
                for namespace in namespaces:
                    found = self._whole[length].get((namespace, prefix))
                    if found is not None:
                        return Match(found, length)
        return Match(None, 0)

    def chain(self, extent_id: int, at: int) -> list[Link]:
        """The extents that hold the first `at` tokens of a prefix in `extent_id`, root first.

        Raises: KeyError if the extent isn't there, ValueError unless `lo < at <= hi` (a whole
        snapshot: `at == hi`).
        """
        extent = self._extents[extent_id]
        lowest = extent.hi - 1 if extent.whole else extent.lo
        if not lowest < at <= extent.hi:
            raise ValueError(f"extent {extent_id} holds no prefix of {at} tokens")
        links = [Link(extent_id, extent.lo, at)]
        while extent.parent is not None:
            take = extent.lo
            extent = self._extents[extent.parent]
            links.append(Link(extent.id, extent.lo, take))
        return links[::-1]

    def holder(self, extent_id: int, at: int) -> int | None:
        """Which extent of the chain that ends in `extent_id` has position `at` in its `(lo, hi]`.

        None if `at` is beyond the end or not positive. Raises: KeyError if it isn't there.
        """
        extent = self._extents[extent_id]
        if not 0 < at <= extent.hi:
            return None
        while at <= extent.lo and extent.parent is not None:
            extent = self._extents[extent.parent]
        return extent.id

    def tokens_of(self, extent_id: int, at: int) -> Tokens:
        """The `at` tokens of the prefix that ends in `extent_id`. Raises: as `chain`."""
        return np.concatenate(
            [self._extents[i].tokens[: take - lo] for i, lo, take in self.chain(extent_id, at)]
        )

    def last_boundary(self, extent_id: int, at: int) -> Match:
        """The longest part of this prefix that has a boundary state; `Match(None, 0)` if none has.

        Raises: KeyError if the extent isn't there.
        """
        extent: Extent | None = self._extents[extent_id]
        while extent is not None:
            ends = [position for position in extent.boundaries if position <= at]
            if ends:
                return Match(extent.id, max(ends))
            at = extent.lo
            extent = self._extents[extent.parent] if extent.parent is not None else None
        return Match(None, 0)

    def add_boundary(self, extent_id: int, at: int, *, size_bytes: int) -> None:
        """Note that state of `size_bytes` is kept for the end `at`.

        Raises: KeyError if the extent isn't there, ValueError unless `lo < at <= hi`.
        """
        extent = self._extents[extent_id]
        if extent.whole or not extent.lo < at <= extent.hi:
            raise ValueError(f"extent {extent_id} has no end at {at}")
        extent.boundaries = {**extent.boundaries, at: size_bytes}

    def remove_boundary(self, extent_id: int, at: int) -> int:
        """Forget a boundary; returns its bytes. Raises: KeyError if there is none."""
        extent = self._extents[extent_id]
        size = extent.boundaries[at]
        extent.boundaries = {end: kept for end, kept in extent.boundaries.items() if end != at}
        return size

    def total_bytes(self) -> int:
        """Bytes of all extents and boundaries, counted now."""
        return sum(extent.total_bytes for extent in self._extents.values())
