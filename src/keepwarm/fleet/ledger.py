"""What a node tells of its warmth: the prefixes of the requests it served, as far as they fit.

Pure. A node's store and slots know prefixes by digests that depend on its model and tiers; a router
knows requests by their text alone, before any tier was composed in. The ledger is kept in the
router's terms: it holds the latest requests whose tokens fit into the node's quota, which is
what its store keeps as well, give or take an eviction. An entry that is wrong costs one slower
request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

TOLD = 4096
"""Prefixes told at a time, the latest: 32 kB every two seconds."""


class WarmthLedger:
    """See the module. `capacity_tokens` is how much the node's store may hold."""

    def __init__(self, *, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens
        self._tokens = 0
        # Prefix to the tokens between it and the one before, and when a request with it ended.
        self._held: OrderedDict[int, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        """Prefixes held."""
        return len(self._held)

    def served(self, prefixes: Sequence[int], ends_tokens: Sequence[int], *, now_s: float) -> None:
        """A request with these prefixes, shortest first, has ended."""
        before = 0
        for prefix, end in zip(prefixes, ends_tokens, strict=True):
            known = self._held.pop(prefix, None)
            tokens = max(end - before, 0) if known is None else known[0]
            self._tokens += tokens if known is None else 0
            self._held[prefix] = (tokens, now_s)
            before = end
        while self._tokens > self._capacity and self._held:
            _, (tokens, _) = self._held.popitem(last=False)
            self._tokens -= tokens

    def held(self) -> list[int]:
        """The latest prefixes, oldest first, at most `TOLD`."""
        return list(self._held)[-TOLD:]

    def stored(self, *, before_s: float) -> list[int]:
        """Those of requests that had ended by then: what is written behind is in the shared store.

        Oldest first, at most `TOLD`.
        """
        return [prefix for prefix, (_, at) in self._held.items() if at <= before_s][-TOLD:]
