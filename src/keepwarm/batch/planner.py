"""What a night will cost, before it runs: tokens to prefill and restore, seconds, the end.

`plan` plays the night through on slots that hold what they last served and a store that keeps what
was filled, with the very state machine that will run it (`night`), and plays the naive night beside
it: the file's order on the same slots, each prompt reusing the most that an idle slot holds, and
nothing saved.

How good is the order? With a store, every branch worth filling is prefilled once, so the prefilled
tokens exceed the least possible only by branches too small to fill. What is left to choose is how
often a prefix must be restored. On small cases the tests compare with all permutations; see
docs/batch.md for the figures. Where the plan would cost more tokens than running the file as it is,
that is the plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from keepwarm.batch.night import FillBranch, Night, RunTask
from keepwarm.batch.node_shares import cut
from keepwarm.batch.tree import PrefixTree

# Seconds to restore a token's state over seconds to prefill it: 20 ms against 9.3 s for 2,000
# tokens (SmolLM2-135M, 2 cores); less on larger models, whose prefill grows faster than their rows.
RESTORE_WEIGHT = 0.003
# Render, tokenize, save and the call itself, in tokens' worth of prefill: about 40 ms at 4.6 ms.
FILL_WEIGHT_TOKENS = 8

Mode = Literal["tree", "tree-unfilled", "file"]


@dataclass(frozen=True, slots=True)
class BatchCosts:
    """Seconds of the machine. Decoding is shared: slots that decode together go in one batch."""

    prefill_s_per_token: float = 0.005
    decode_s_per_token: float = 0.02

    def seconds(self, tally: Tally) -> float:
        """How long a night takes that needs so much."""
        prefill = tally.prefilled_tokens + RESTORE_WEIGHT * tally.restored_tokens
        prefill += FILL_WEIGHT_TOKENS * tally.fills
        return prefill * self.prefill_s_per_token + tally.decoded_tokens * self.decode_s_per_token


@dataclass(slots=True)
class Tally:
    """Tokens of one night, as estimated."""

    prefilled_tokens: int = 0
    restored_tokens: int = 0
    decoded_tokens: int = 0
    fills: int = 0

    @property
    def cost(self) -> float:
        """What an order can change, in tokens' worth of prefill.

        Fills take time too (see `Costs.seconds`), and give what isn't counted either: a prefix that
        outlives its slot, and one that models can use whose state can't be cut.
        """
        return self.prefilled_tokens + RESTORE_WEIGHT * self.restored_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is done: a task, or a branch's fill (`branch` not None), and its tokens."""

    slot: int
    leaf: int
    branch: int | None
    prefilled_tokens: int
    restored_tokens: int


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A planned night. `order` has the tasks as they begin; `mode` says how it is run."""

    mode: Mode
    order: tuple[int, ...]
    steps: tuple[Step, ...]
    tally: Tally
    naive: Tally
    least_tokens: int
    seconds: float
    naive_s: float
    homes: tuple[int, ...] = ()

    def night(self, tree: PrefixTree, ended: Mapping[int, bool] | None = None) -> Night:
        """A fresh state machine that runs this plan."""
        return _night(tree, self.mode, ended, self.homes)


def plan(
    tree: PrefixTree,
    *,
    lanes: int,
    now_s: float,
    costs: BatchCosts | None = None,
    ended: Mapping[int, bool] | None = None,
    nodes: int = 1,
) -> BatchPlan:
    """The cheapest of the ways to run a night, by playing them through.

    Args:
        tree: the tasks.
        lanes: slots they may take at a time, on all nodes together.
        now_s: seconds of the Unix epoch, for deadlines.
        costs: measured, or None for the priors.
        ended: tasks that are done.
        nodes: how many nodes the tree is cut over; times are those of one that had all the lanes.
    """
    costs = costs or BatchCosts()
    homes = tuple(cut(tree, nodes)) if nodes > 1 else ()
    naive = play_naive(tree, lanes=lanes, ended=ended)
    best: tuple[float, Mode, Tally, list[Step]] | None = None
    modes: tuple[Mode, ...] = ("tree", "tree-unfilled", "file")
    for mode in modes:
        night = _night(tree, mode, ended, homes)
        tally, steps = play(tree, night, lanes=lanes, now_s=now_s, costs=costs)
        if best is None or tally.cost < best[0]:
            best = (tally.cost, mode, tally, steps)
    assert best is not None
    _, mode, tally, steps = best
    order = tuple(step.leaf for step in steps if step.branch is None)
    return BatchPlan(
        mode,
        order,
        tuple(steps),
        tally,
        naive,
        tree.least_tokens,
        costs.seconds(tally),
        costs.seconds(naive),
        homes,
    )


def _night(
    tree: PrefixTree, mode: Mode, ended: Mapping[int, bool] | None, homes: Sequence[int]
) -> Night:
    order = range(len(tree.tasks)) if mode == "file" else None
    return Night(tree, fills=mode == "tree", order=order, ended=ended, homes=homes)


@dataclass(slots=True)
class _Slots:
    """What each slot holds: the task it last served, or the branch it was filled with."""

    tree: PrefixTree
    held: list[int | None]
    filled: set[int] = field(default_factory=set)
    branch_held: dict[int, int] = field(default_factory=dict)

    def overlap(self, slot: int, leaf: int) -> int:
        """Tokens of a task that a slot holds."""
        held = self.held[slot]
        if held is None:
            return 0
        shared = self.tree.shared_tokens(held, leaf)
        branch = self.branch_held.get(slot)
        if branch is not None:
            shared = min(shared, self.tree.branches[branch].tokens)
        return shared

    def saved(self, leaf: int) -> int:
        """Tokens of a task that the store holds: its tier, and what was filled."""
        place = self.tree.leaves[leaf]
        tokens = self.tree.roots[place.root].tokens
        depths = [self.tree.branches[b].tokens for b in place.branches if b in self.filled]
        return max([tokens, *depths])

    def length(self, work: FillBranch | RunTask) -> int:
        """Tokens of what is to be in a slot."""
        if isinstance(work, FillBranch):
            return self.tree.branches[work.branch].tokens
        return self.tree.leaves[work.leaf].tokens

    def best(self, free: Collection[int], lane: int, work: FillBranch | RunTask) -> int:
        """The free slot in which some work costs least; of equals the lane's own."""

        def cost(slot: int) -> tuple[float, bool, int]:
            prefilled, restored = self.load(slot, work.leaf, self.length(work))
            return prefilled + RESTORE_WEIGHT * restored, slot != lane, slot

        return min(free, key=cost)

    def load(self, slot: int, leaf: int, length: int) -> tuple[int, int]:
        """Tokens prefilled and restored to bring a slot to the first `length` of a task."""
        overlap = min(self.overlap(slot, leaf), length)
        saved = min(self.saved(leaf), length)
        reuse, restored = (saved, saved) if saved > overlap else (overlap, 0)
        return max(length - reuse, 0), restored


def play(
    tree: PrefixTree, night: Night, *, lanes: int, now_s: float, costs: BatchCosts
) -> tuple[Tally, list[Step]]:
    """Run a night on imagined slots.

    A lane is busy for as long as its tokens take; what it fills is known to others only then. Like
    the gateway, a request gets the idle slot in which it costs least.
    """
    tally = Tally()
    steps: list[Step] = []
    slots = _Slots(tree, [None] * lanes)
    clock: list[tuple[float, int, int, FillBranch | RunTask]] = []
    idle = list(range(lanes))
    free = set(range(lanes))
    at_s = 0.0
    while True:
        waiting = []
        for lane in idle:
            work = night.take(lane, now_s + at_s)
            if work is None:
                waiting.append(lane)
                continue
            slot = slots.best(free, lane, work)
            free.remove(slot)
            step = _step(slots, tally, slot, work)
            steps.append(step)
            tokens = step.prefilled_tokens + RESTORE_WEIGHT * step.restored_tokens
            busy_s = tokens * costs.prefill_s_per_token
            if isinstance(work, RunTask):
                busy_s += tree.leaves[work.leaf].reply_tokens * costs.decode_s_per_token
            heapq.heappush(clock, (at_s + busy_s, lane, slot, work))
        if not clock:
            return tally, steps
        at_s, lane, slot, work = heapq.heappop(clock)
        if isinstance(work, FillBranch):
            slots.filled.add(work.branch)
            night.filled(work.branch, ok=True)
        else:
            night.ended(work.leaf, ok=True)
        free.add(slot)
        idle = [*waiting, lane]


def _step(slots: _Slots, tally: Tally, slot: int, work: FillBranch | RunTask) -> Step:
    tree = slots.tree
    prefilled, restored = slots.load(slot, work.leaf, slots.length(work))
    if isinstance(work, FillBranch):
        slots.branch_held[slot] = work.branch
        tally.fills += 1
        branch = work.branch
    else:
        prefilled = max(prefilled, 1)  # one token is always evaluated again
        slots.branch_held.pop(slot, None)
        tally.decoded_tokens += tree.leaves[work.leaf].reply_tokens
        branch = None
    slots.held[slot] = work.leaf
    tally.prefilled_tokens += prefilled
    tally.restored_tokens += restored
    return Step(slot, work.leaf, branch, prefilled, restored)


def play_naive(tree: PrefixTree, *, lanes: int, ended: Mapping[int, bool] | None = None) -> Tally:
    """The file's order on slots alone: what plain clients of a plain server would prefill."""
    night = Night(tree, fills=False, order=range(len(tree.tasks)), ended=ended)
    tally = Tally()
    slots = _Slots(tree, [None] * lanes)
    costs = BatchCosts()
    clock: list[tuple[float, int, int]] = []
    idle = list(range(lanes))
    at_s = 0.0
    while True:
        while idle and (work := night.take(0, 0.0)) is not None:
            assert isinstance(work, RunTask)
            leaf = work.leaf
            slot = max(idle, key=lambda s: slots.overlap(s, leaf))
            idle.remove(slot)
            reply = tree.leaves[leaf].reply_tokens
            prefilled = max(tree.leaves[leaf].tokens - slots.overlap(slot, leaf), 1)
            slots.held[slot] = leaf
            tally.prefilled_tokens += prefilled
            tally.decoded_tokens += reply
            busy_s = prefilled * costs.prefill_s_per_token + reply * costs.decode_s_per_token
            heapq.heappush(clock, (at_s + busy_s, slot, leaf))
        if not clock:
            return tally
        at_s, slot, leaf = heapq.heappop(clock)
        night.ended(leaf, ok=True)
        idle.append(slot)


def order_cost(tree: PrefixTree, order: Sequence[int], *, lanes: int) -> float:
    """The cost of running tasks in a given order, with fills: for comparing orders."""
    night = Night(tree, order=order)
    return play(tree, night, lanes=lanes, now_s=0.0, costs=BatchCosts())[0].cost
