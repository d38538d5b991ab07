"""What a simulated node or the shared store keeps: a tree of blocks, evicted by real values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keepwarm.core.evict import Candidate, EvictionQueue, heat_after_use, value


@dataclass(slots=True)
class _Kept:
    parent: int
    tokens: int
    heat: float
    children: int = 0


class BlockStore:
    """Blocks within a quota; only leaves are evicted, so whoever has a block has all before it.

    Blocks are numbered from 0, and each number always has the same parent (see `trace`).
    """

    def __init__(self, *, quota_bytes: float, row_bytes: int, prefill_s_per_token: float) -> None:
        self._kept: dict[int, _Kept] = {}
        self._queue = EvictionQueue()
        self._quota = quota_bytes
        self._row_bytes = row_bytes
        self._prefill_s = prefill_s_per_token
        self._adding: frozenset[int] = frozenset()
        self.used_bytes = 0
        self.evicted_bytes = 0

    def __contains__(self, block: int) -> bool:
        """Whether this block, and all before it, are kept."""
        return block in self._kept

    def __len__(self) -> int:
        """How many blocks are kept."""
        return len(self._kept)

    def match(self, blocks: Sequence[int]) -> int:
        """How many of a request's blocks are kept, from its beginning."""
        low, high = 0, len(blocks)
        while low < high:  # kept blocks are a prefix of the request's, so halving finds the end
            middle = (low + high) // 2
            if blocks[middle] in self._kept:
                low = middle + 1
            else:
                high = middle
        return low

    def touch(self, blocks: Sequence[int], *, now_s: float) -> None:
        """Note that these, all of them kept, were of use."""
        for block in blocks:
            kept = self._kept[block]
            kept.heat = heat_after_use(kept.heat, now_s=now_s)

    def add(
        self, blocks: Sequence[int], *, tokens: Sequence[int], now_s: float
    ) -> tuple[list[int], list[int]]:
        """Keep a request's blocks, from its first; returns what is new and what had to go.

        `tokens` are the blocks' sizes. What doesn't fit even when all else has gone is left out,
        from the end. Blocks that were there are touched.
        """
        known = self.match(blocks)
        self.touch(blocks[:known], now_s=now_s)
        added: list[int] = []
        evicted: list[int] = []
        if known == len(blocks):
            return added, evicted
        self._adding = frozenset(blocks)
        parent = blocks[known - 1] if known else -1
        for block, size in zip(blocks[known:], tokens[known:], strict=True):
            need = size * self._row_bytes
            if not self._make_room(need, evicted):
                break
            self._kept[block] = _Kept(parent, size, heat_after_use(None, now_s=now_s))
            if parent >= 0:
                self._kept[parent].children += 1
            self.used_bytes += need
            added.append(block)
            parent = block
        if added:
            self._offer(added[-1])
        elif known and not self._kept[blocks[known - 1]].children:
            self._offer(blocks[known - 1])
        return added, evicted

    def _make_room(self, need: int, evicted: list[int]) -> bool:
        while self.used_bytes + need > self._quota:
            candidate = self._queue.pop(self._worth, keep=lambda c: c.extent_id in self._adding)
            if candidate is None:
                return False
            gone = self._kept.pop(candidate.extent_id)
            size = gone.tokens * self._row_bytes
            self.used_bytes -= size
            self.evicted_bytes += size
            evicted.append(candidate.extent_id)
            if gone.parent >= 0:
                parent = self._kept[gone.parent]
                parent.children -= 1
                if not parent.children:
                    self._offer(gone.parent)
        return True

    def _offer(self, block: int) -> None:
        candidate = Candidate(block, None)
        worth = self._worth(candidate)
        if worth is not None:
            self._queue.push(candidate, worth)

    def _worth(self, candidate: Candidate) -> float | None:
        kept = self._kept.get(candidate.extent_id)
        if kept is None or kept.children:
            return None
        return value(
            prefill_s=kept.tokens * self._prefill_s,
            size_bytes=kept.tokens * self._row_bytes,
            heat=kept.heat,
        )
