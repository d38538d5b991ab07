"""What to evict: the least valuable first, by prefill seconds spared x recent use / bytes.

Theory of operation. A use counts 1 and halves every `HALF_LIFE_S`. All counts fade at the same
pace, so the *order* of two values changes only when one of them is used again. That is why a
value is kept as a base-2 logarithm relative to the clock's origin, in which fading needs no update:

    heat  = log2( sum over uses of 2 ** (use_s / HALF_LIFE_S) )
    value = log2(prefill_s) - log2(bytes) + heat

and why the candidates can wait in a heap. A use only ever raises a value, so an entry in the heap
is at worst too low; it is corrected when it surfaces. Nothing has to be updated on the hot path.

Where several API keys share a store, each has a heap of its own: who holds more than a share gives
first (`over_share`), the least valuable of its own.

Invariants of `EvictionQueue`:
- Each evictable item has at least one entry; entries of items that are no longer evictable (gone,
  pinned, got children) are dropped when they surface, so whoever makes an item evictable pushes it.
- `pop` returns the item whose present value is the least among those it may take.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping
from math import log2
from typing import NamedTuple

HALF_LIFE_S = 24 * 3600.0
"""A day: what the nightly batch used last night still counts half tonight."""

_LEAST_PREFILL_S = 1e-3  # keeps the logarithm finite; below what a single token costs anywhere


class Candidate(NamedTuple):
    """What can be evicted: an extent, or (`at` not None) only its boundary state at `at`."""

    extent_id: int
    at: int | None


def heat_after_use(heat: float | None, *, now_s: float) -> float:
    """The heat of something with `heat` (None: never used) after a use at `now_s`."""
    use = now_s / HALF_LIFE_S
    if heat is None:
        return use
    high, low = max(heat, use), min(heat, use)
    # max(): 2 ** -2000 would still be right, but the power must not underflow with an error.
    return high + log2(1.0 + 2.0 ** max(low - high, -60.0))


def value(*, prefill_s: float, size_bytes: int, heat: float) -> float:
    """How much a byte of this is worth keeping; comparable with others at any time.

    `prefill_s`: seconds of prefill that a restore spares, of what this alone holds.
    """
    return log2(max(prefill_s, _LEAST_PREFILL_S)) - log2(max(size_bytes, 1)) + heat


def over_share(held_bytes: Mapping[str, int], *, share_bytes: int) -> frozenset[str]:
    """Who gives first: the owners that hold more than a share. Empty: all alike."""
    return frozenset(owner for owner, held in held_bytes.items() if held > share_bytes)


class EvictionQueue:
    """Candidates by value, least first, corrected lazily (see the module)."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []

    def __len__(self) -> int:
        """Entries, outdated ones included."""
        return len(self._heap)

    def push(self, candidate: Candidate, value_now: float) -> None:
        """Note that `candidate` has become evictable."""
        at = -1 if candidate.at is None else candidate.at
        heapq.heappush(self._heap, (value_now, candidate.extent_id, at))

    def fill(self, candidates: Iterable[tuple[Candidate, float]]) -> None:
        """Note many candidates with their values at once."""
        self._heap += [
            (now, extent_id, -1 if at is None else at) for (extent_id, at), now in candidates
        ]
        heapq.heapify(self._heap)

    def pop(
        self,
        value_of: Callable[[Candidate], float | None],
        *,
        keep: Callable[[Candidate], bool] = lambda _: False,
    ) -> Candidate | None:
        """Take out the least valuable candidate, or None if there is none to take.

        `value_of` tells the present value, or None for what isn't evictable (its entry is dropped).
        What `keep` holds back this time stays in the queue.
        """
        taken = self.take(value_of, keep=keep)
        return None if taken is None else taken[0]

    def take(
        self,
        value_of: Callable[[Candidate], float | None],
        *,
        keep: Callable[[Candidate], bool] = lambda _: False,
    ) -> tuple[Candidate, float] | None:
        """As `pop`, with the value that it has now."""
        kept: list[tuple[float, int, int]] = []
        taken: tuple[Candidate, float] | None = None
        while self._heap:
            entry = heapq.heappop(self._heap)
            candidate = Candidate(entry[1], None if entry[2] < 0 else entry[2])
            now = value_of(candidate)
            if now is None:
                continue
            if keep(candidate):
                kept.append((now, *entry[1:]))
            elif now > entry[0]:
                heapq.heappush(self._heap, (now, *entry[1:]))
            else:
                taken = candidate, now
                break
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return taken


class SharedQueue:
    """An `EvictionQueue` for each owner of candidates."""

    def __init__(self) -> None:
        self._queues: dict[str, EvictionQueue] = {}

    def push(self, owner: str, candidate: Candidate, value_now: float) -> None:
        """Note that `candidate`, which is `owner`'s, has become evictable."""
        self._queues.setdefault(owner, EvictionQueue()).push(candidate, value_now)

    def fill(self, offers: Mapping[str, Iterable[tuple[Candidate, float]]]) -> None:
        """Note many candidates of each owner with their values at once."""
        for owner, candidates in offers.items():
            self._queues.setdefault(owner, EvictionQueue()).fill(candidates)

    def pop(
        self,
        value_of: Callable[[Candidate], float | None],
        *,
        first: Collection[str] = (),
        keep: Callable[[Candidate], bool] = lambda _: False,
    ) -> Candidate | None:
        """Take out the least valuable candidate of the owners in `first`, or, if those have none to
        take, of all. Otherwise as `EvictionQueue.pop`.
        """
        least = self._least(first, value_of, keep) if first else None
        if least is None:
            least = self._least(self._queues, value_of, keep)
        return least

    def _least(
        self,
        owners: Collection[str],
        value_of: Callable[[Candidate], float | None],
        keep: Callable[[Candidate], bool],
    ) -> Candidate | None:
        queues = [self._queues[owner] for owner in owners if owner in self._queues]
        found = [(queue, taken) for queue in queues if (taken := queue.take(value_of, keep=keep))]
        if not found:
            return None
        least = min(found, key=lambda one: one[1][1])
        for queue, (candidate, now) in found:
            if queue is not least[0]:
                queue.push(candidate, now)
        return least[1][0]
