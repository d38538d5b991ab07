"""Which node serves a request: the longest warm prefix, unless the node's load says otherwise.

Theory of operation. `Fleet` is what one router knows: the nodes, how long each is busy, what each
of them and the shared store hold. It is fed by the nodes' reports and by the router's own choices:
between two reports a chosen node is taken to be busy with what it was given, and to hold it. No
clock, no I/O; whoever drives it says what time it is.

For each node the least estimate over the ways of `costs.best_way` counts, plus a charge for work
it had lately beyond the least worked node's. The charge is small: it decides between nodes that are
about equally fast now, so that conversations spread before a queue forms, not after.

State is soft. A node that hasn't reported for `STALE_S` keeps its requests but its warmth counts
for nothing; after `FORGET_S` it is forgotten. A router that begins with nothing sends
requests by load alone, and nodes still find what they have, and what lies in the shared store.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import NamedTuple

from keepwarm.fleet.costs import NodeCosts, ServingWay, best_way
from keepwarm.fleet.warmth import KNOWN_LIMIT, Warmth

STALE_S = 15.0
"""Several reports late (they come every two seconds): the node hangs, or its router is cut off."""
FORGET_S = 300.0

PATIENCE_S = 30.0
"""How much longer than at the best node a request waits at the one its sender asks for. A pile of
tasks is cut so that a node has what they share; nodes that are behind by more are helped."""

WORK_MEMORY_S = 600.0
"""Work counts for about ten minutes: as long as a conversation that was begun on a node lives."""
WORK_WEIGHT = 0.01
"""Seconds a request may be slower now for each second a node has worked more than the least.

From the simulator (docs/simulator.md), at 64 nodes: without it equally idle nodes are taken in
order, and the first does eight times the mean's work; from 0.003 to 0.3 the busiest stays within
1.1 of the mean, and above 0.03 more and more rows are moved for it."""


@dataclass(frozen=True, slots=True)
class Want:
    """One request, as far as routing needs it.

    `prefixes` name its marks, shortest first, and `ends_tokens` says where each ends.
    """

    prefixes: Sequence[int]
    ends_tokens: Sequence[int]
    total_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What a node tells of itself. `taken_s` is when, on the driver's clock.

    `backlog_s`: until its engine is through with what it has. `held`: all prefixes it has, or None
    if only `gone` and `added` say what changed. `stored`: prefixes it knows in the shared store.
    """

    taken_s: float
    backlog_s: float
    costs: NodeCosts
    held: Collection[int] | None = None
    added: Sequence[int] = ()
    gone: Collection[int] = ()
    stored: Sequence[int] = ()
    unstored: Collection[int] = ()


class Choice(NamedTuple):
    """One node that was considered. The least `score_s` wins."""

    score_s: float
    order: int
    node: str
    way: ServingWay
    wait_s: float


@dataclass(slots=True)
class _Node:
    name: str
    holder: int
    order: int
    costs: NodeCosts
    heard_s: float
    busy_until_s: float = 0.0
    work: float = 0.0  # in seconds, times what has faded since the fleet's origin
    given: deque[tuple[float, float]] = field(default_factory=deque)


def preferring(ranked: Sequence[Choice], node: str | None) -> list[Choice]:
    """The same choices with a sender's own first, unless that waits `PATIENCE_S` longer."""
    asked = next((choice for choice in ranked if choice.node == node), None)
    if asked is None or asked.wait_s > min(c.wait_s for c in ranked) + PATIENCE_S:
        return list(ranked)
    return [asked, *(choice for choice in ranked if choice is not asked)]


class Fleet:
    """See the module."""

    def __init__(
        self,
        *,
        work_weight: float = WORK_WEIGHT,
        known_limit: int = KNOWN_LIMIT,
        shared_limit: int = 16 * KNOWN_LIMIT,
    ) -> None:
        self._nodes: dict[str, _Node] = {}
        self._warmth = Warmth(known_limit=known_limit)
        self._shared = Warmth(known_limit=shared_limit)
        self._shared.seat()
        self._work_weight = work_weight
        self._joined = 0
        self._origin_s: float | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes, in the order they joined."""
        return tuple(self._nodes)

    @property
    def known_prefixes(self) -> int:
        """Distinct prefixes that some node has."""
        return len(self._warmth)

    def join(self, node: str, costs: NodeCosts, *, now_s: float) -> None:
        """A node that may be chosen from now on; one that is known already stays as it is."""
        if node not in self._nodes:
            self._joined += 1
            self._nodes[node] = _Node(node, self._warmth.seat(), self._joined, costs, now_s)

    def leave(self, node: str) -> None:
        """A node that is gone. Unknown names are ignored."""
        gone = self._nodes.pop(node, None)
        if gone is not None:
            self._warmth.leave(gone.holder)

    def report(self, node: str, report: NodeReport, *, now_s: float) -> None:
        """Take in what a node told; one that wasn't known joins."""
        self.join(node, report.costs, now_s=now_s)
        known = self._nodes[node]
        known.heard_s = now_s
        known.costs = report.costs
        taken_s = min(report.taken_s, now_s)
        while known.given and known.given[0][0] <= taken_s:
            known.given.popleft()
        known.busy_until_s = taken_s + report.backlog_s + sum(w for _, w in known.given)
        if report.held is not None:
            self._warmth.replace(known.holder, report.held)
        self._warmth.drop(known.holder, report.gone)
        self._warmth.add(known.holder, report.added)
        self._shared.add(0, report.stored)
        self._shared.drop(0, report.unstored)

    def wait_s(self, node: str, *, now_s: float) -> float:
        """How long a request would wait at a node, as far as is known."""
        return max(self._nodes[node].busy_until_s - now_s, 0.0)

    def rank(
        self, want: Want, *, now_s: float, among: Collection[str] | None = None
    ) -> list[Choice]:
        """All nodes that may serve it (or those in `among`), best first."""
        held = self._warmth.longest(want.prefixes)
        stored = self._shared.longest(want.prefixes).get(0)
        shared = 0 if stored is None else want.ends_tokens[stored]
        nodes = [n for n in self._nodes.values() if among is None or n.name in among]
        least = min((node.work for node in nodes), default=0.0)
        weight = self._work_weight / self._grown(now_s)
        choices = []
        for node in nodes:
            index = held.get(node.holder)
            fresh = now_s - node.heard_s <= STALE_S
            local = want.ends_tokens[index] if index is not None and fresh else 0
            wait = node.busy_until_s - now_s if node.busy_until_s > now_s else 0.0
            way = best_way(
                node.costs,
                total_tokens=want.total_tokens,
                local_tokens=local,
                shared_tokens=shared,
                wait_s=wait,
            )
            score = way.ttft_s + weight * (node.work - least)
            choices.append(Choice(score, node.order, node.name, way, wait))
        choices.sort()
        return choices

    def give(self, want: Want, choice: Choice, *, now_s: float) -> None:
        """Note that a request went to a node: it is busy with it, and will hold it."""
        node = self._nodes.get(choice.node)
        if node is None:
            return
        work = choice.way.work_s
        node.busy_until_s = max(node.busy_until_s, now_s) + work
        node.given.append((now_s, work))
        node.work += work * self._grown(now_s)
        self._warmth.add(node.holder, want.prefixes)

    def _grown(self, now_s: float) -> float:
        """What a second of work at this moment counts beside one at the origin.

        All work fades at the same pace, so it is the new that grows instead, until that has to be
        begun again so as not to overflow.
        """
        if self._origin_s is None:
            self._origin_s = now_s
        grown = exp((now_s - self._origin_s) / WORK_MEMORY_S)
        if grown > 1e6:
            for node in self._nodes.values():
                node.work /= grown
            self._origin_s, grown = now_s, 1.0
        return grown

    def age(self, *, now_s: float) -> tuple[str, ...]:
        """Forget nodes that have been silent for too long; returns their names."""
        silent = [n.name for n in self._nodes.values() if now_s - n.heard_s > FORGET_S]
        for name in silent:
            self.leave(name)
        return tuple(silent)
