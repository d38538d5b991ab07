"""Which node holds which prefix: one bit a node in one number a prefix.

Theory of operation. A prefix is named by a number (64 bits of its digest). `holders[prefix]` has a
bit for each node that has it, so that a look-up costs one dictionary access a mark of the
request, however many nodes there are. Who holds a prefix holds all that it begins with, so the walk
goes from a request's longest mark back, and the first mark at which a node's bit shows is how much
of the request that node has. The shared store is a holder like any other.

Nothing here is ever relied on: an entry that is wrong or missing makes a request slower, and the
node that serves it finds out by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

KNOWN_LIMIT = 65_536
"""Prefixes remembered a holder: 20 MB for 64 nodes that have that many. The oldest go first."""


class Warmth:
    """See the module. Holders are small numbers, given by `seat`."""

    def __init__(self, *, known_limit: int = KNOWN_LIMIT) -> None:
        self._holders: dict[int, int] = {}
        self._known: dict[int, dict[int, None]] = {}
        self._limit = known_limit

    def __len__(self) -> int:
        """Distinct prefixes that somebody holds."""
        return len(self._holders)

    def seat(self) -> int:
        """A new holder's number: the lowest that is free, so that the numbers stay small."""
        number = 0
        while number in self._known:
            number += 1
        self._known[number] = {}
        return number

    def leave(self, holder: int) -> None:
        """Forget a holder and what it had; its number is free again."""
        self.drop(holder, tuple(self._known[holder]))
        del self._known[holder]

    def known(self, holder: int) -> Collection[int]:
        """What this holder is thought to have, oldest first."""
        return self._known[holder].keys()

    def add(self, holder: int, prefixes: Sequence[int]) -> None:
        """Note that a holder has these, most recent last."""
        known, holders, bit = self._known[holder], self._holders, 1 << holder
        for prefix in prefixes:
            known.pop(prefix, None)  # to the end: it was just seen
            known[prefix] = None
            holders[prefix] = holders.get(prefix, 0) | bit
        over = len(known) - self._limit
        if over > 0:
            self.drop(holder, [prefix for prefix, _ in zip(known, range(over), strict=False)])

    def drop(self, holder: int, prefixes: Collection[int]) -> None:
        """Note that a holder hasn't these any more."""
        known, holders, bit = self._known[holder], self._holders, 1 << holder
        for prefix in prefixes:
            if known.pop(prefix, 0) is None:
                left = holders[prefix] & ~bit
                if left:
                    holders[prefix] = left
                else:
                    del holders[prefix]

    def replace(self, holder: int, prefixes: Collection[int]) -> None:
        """Note that a holder has exactly these."""
        wanted = set(prefixes)
        self.drop(holder, [prefix for prefix in self._known[holder] if prefix not in wanted])
        self.add(holder, list(prefixes))

    def longest(self, prefixes: Sequence[int]) -> dict[int, int]:
        """Holder to the index of the longest of these prefixes that it has.

        `prefixes` are one request's, shortest first. Holders of none aren't named.
        """
        holders = self._holders
        found: dict[int, int] = {}
        seen = 0
        for index in range(len(prefixes) - 1, -1, -1):
            new = holders.get(prefixes[index], 0) & ~seen
            seen |= new
            while new:
                low = new & -new
                found[low.bit_length() - 1] = index
                new ^= low
        return found
