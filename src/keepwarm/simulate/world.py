"""A fleet on a virtual clock: what is real in it, and what is modelled.

Real: the routing decision (`fleet.routing`), what a way costs (`fleet.costs`, `core.rates`), what
is evicted (`core.evict`). Modelled, and kept simple so that each figure can be explained:

- A node's engine works on one prompt at a time, in the order in which they are ready, and its
  rates are constants. A request has a slot from the start of its prefill to its last token; how
  decoding slows prefill down is not modelled.
- Rows are moved one request after another on a node's link, and all links together have the shared
  store's bandwidth. They are moved before the request joins the node's queue.
- New blocks are written behind: they reach the shared store when the node's upload is done.
- Nodes report to the routers every `report_s`; between reports a router knows only what it did
  itself. With several routers, requests come to them in turn.
- Blocks are what is shared: where two prompts part inside a block, none of it is reused.

Deterministic: the same trace, hardware, policy and seed give the same outcome.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, get_args

from keepwarm.core.rates import Mean, Rates
from keepwarm.fleet.costs import NodeCosts, PrefixOrigin, ServingWay, best_way
from keepwarm.fleet.routing import WORK_WEIGHT, Fleet, NodeReport, Want
from keepwarm.simulate.report import Outcome, Spread
from keepwarm.simulate.stores import BlockStore
from keepwarm.simulate.trace import Request, Trace

Policy = Literal["keepwarm", "least-loaded", "random", "oracle"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One node and what it is connected to. Bandwidths in bytes a second.

    The defaults are a node with one large GPU, an 8B model with grouped heads (128 KB a token), a
    terabyte of NVMe, a 25 Gbit/s network and an object store that gives all nodes 40 GB/s.
    """

    row_bytes: int = 131_072
    prefill_tokens_per_s: float = 10_000.0
    decode_tokens_per_s: float = 50.0
    slots: int = 32
    store_bytes: float = 1e12
    restore_bytes_per_s: float = 10e9
    fetch_bytes_per_s: float = 3e9
    upload_bytes_per_s: float = 1e9
    fetch_call_s: float = 0.02
    shared_bytes: float = 20e12
    shared_bytes_per_s: float = 40e9

    def costs(self) -> NodeCosts:
        """The same as a node would report it."""
        rates = Rates(
            prefill_s_per_token=Mean(1 / self.prefill_tokens_per_s),
            restore_s_per_byte=Mean(1 / self.restore_bytes_per_s),
        )
        return NodeCosts.of(
            rates,
            row_bytes=self.row_bytes,
            fetch_s_per_byte=1 / self.fetch_bytes_per_s,
            fetch_call_s=self.fetch_call_s,
            can_fetch=self.shared_bytes > 0,
        )


class _What(Enum):
    """What happens at a moment, beside arrivals."""

    READY = 0
    STORED = 1
    REPORT = 2


@dataclass(slots=True)
class _Node:
    name: str
    store: BlockStore
    slots: list[float]
    engine_free_s: float = 0.0
    link_free_s: float = 0.0
    upload_free_s: float = 0.0
    moving_work_s: float = 0.0
    busy_s: float = 0.0
    served: int = 0
    added: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)

    def wait_s(self, now_s: float) -> float:
        """Until a prompt that is ready now would be begun."""
        return max(self.engine_free_s - now_s, self.slots[0] - now_s, 0.0)


class _World:
    """One run. See the module."""

    def __init__(
        self,
        trace: Trace,
        *,
        nodes: int,
        policy: Policy,
        hardware: Hardware,
        seed: int,
        routers: int,
        report_s: float,
        work_weight: float,
    ) -> None:
        self.trace, self.policy, self.hardware = trace, policy, hardware
        self.report_s = report_s
        self.costs = hardware.costs()
        self.nodes = [
            _Node(str(i), self._store(hardware.store_bytes), [0.0] * hardware.slots)
            for i in range(nodes)
        ]
        self.shared = self._store(hardware.shared_bytes)
        self.fleets = [Fleet(work_weight=work_weight) for _ in range(routers)]
        self.stored: list[int] = []
        self.unstored: list[int] = []
        self.pool_free_s = 0.0
        self.seen: set[int] = set()
        # The draw decides which node a request goes to, nothing that has to be kept secret.
        self.random = random.Random(seed)  # noqa: S311
        self.events: list[tuple[float, int, _What, Callable[[float], None]]] = []
        self.count = 0
        self.local_tokens = self.moved_tokens = self.moved_bytes = self.stored_bytes = 0
        self.ttfts: list[float] = []
        self.waits: list[float] = []
        self.end_s = 0.0

    def _store(self, quota_bytes: float) -> BlockStore:
        return BlockStore(
            quota_bytes=quota_bytes,
            row_bytes=self.hardware.row_bytes,
            prefill_s_per_token=1 / self.hardware.prefill_tokens_per_s,
        )

    def _at(self, when_s: float, what: _What, then: Callable[[float], None]) -> None:
        self.count += 1
        heapq.heappush(self.events, (when_s, self.count, what, then))

    def run(self) -> None:
        """All requests, to the last one's first token."""
        begin = self.trace.requests[0].at_s
        if self.policy == "keepwarm":
            for fleet in self.fleets:
                for node in self.nodes:
                    fleet.join(node.name, self.costs, now_s=begin)
            self._at(begin + self.report_s, _What.REPORT, self._report)
        last = self.trace.requests[-1].at_s
        for number, request in enumerate(self.trace.requests):
            self._run_until(request.at_s, last)
            self._arrive(request, self.fleets[number % len(self.fleets)])
        self._run_until(float("inf"), last)

    def _run_until(self, when_s: float, last_s: float) -> None:
        while self.events and self.events[0][0] <= when_s:
            at, _, what, then = heapq.heappop(self.events)
            # Reports come for ever; after the last arrival nobody asks for them.
            if what is not _What.REPORT or at <= last_s:
                then(at)

    def _arrive(self, request: Request, fleet: Fleet) -> None:
        now = request.at_s
        node = self._choose(request, fleet)
        node.served += 1
        if self.policy == "oracle":
            self._serve_oracle(request, node)
            return
        local = _tokens(request, node.store.match(request.blocks))
        way = best_way(
            self.costs,
            total_tokens=request.prompt_tokens,
            local_tokens=local,
            shared_tokens=_tokens(request, self.shared.match(request.blocks)),
            wait_s=node.wait_s(now),
        )
        if way.origin is PrefixOrigin.MOVED:
            ready = self._move(node, way, now_s=now)
            self.shared.touch(request.blocks[: _blocks(request, way.reuse_tokens)], now_s=now)
            node.moving_work_s += way.work_s
        else:
            ready = now
        self._at(ready, _What.READY, lambda at: self._start(request, node, way, now_s=at))

    def _choose(self, request: Request, fleet: Fleet) -> _Node:
        if self.policy == "random":
            return self.random.choice(self.nodes)
        now = request.at_s
        if self.policy == "keepwarm":
            want = Want(request.blocks, request.ends_tokens, request.prompt_tokens)
            best = fleet.rank(want, now_s=now)[0]
            fleet.give(want, best, now_s=now)
            return self.nodes[int(best.node)]
        return min(self.nodes, key=lambda n: (n.wait_s(now) + n.moving_work_s, n.busy_s))

    def _move(self, node: _Node, way: ServingWay, *, now_s: float) -> float:
        """Occupy the node's link and the shared store's; returns when the rows are here."""
        size = way.moved_tokens * self.hardware.row_bytes
        begin = max(now_s, node.link_free_s)
        pool = max(now_s, self.pool_free_s) + size / self.hardware.shared_bytes_per_s
        done = max(begin + size / self.hardware.fetch_bytes_per_s, pool)
        node.link_free_s, self.pool_free_s = done, pool
        self.moved_bytes += size
        return done + self.hardware.fetch_call_s

    def _start(self, request: Request, node: _Node, way: ServingWay, *, now_s: float) -> None:
        """A request whose rows are here takes its turn at the engine."""
        if way.origin is PrefixOrigin.MOVED:
            node.moving_work_s = max(node.moving_work_s - way.work_s, 0.0)
        # What requests before it have prefilled meanwhile is there when its turn comes.
        local = _tokens(request, node.store.match(request.blocks))
        reuse, moved = way.reuse_tokens, way.moved_tokens
        if local > reuse or way.origin is not PrefixOrigin.MOVED:
            again = best_way(
                self.costs,
                total_tokens=request.prompt_tokens,
                local_tokens=local,
                shared_tokens=0,
                wait_s=0.0,
            )
            reuse, moved, work = again.reuse_tokens, 0, again.work_s
        else:
            work = way.work_s
        self.local_tokens += reuse - moved
        self.moved_tokens += moved
        done = self._occupy(request, node, work, now_s=now_s)
        added, gone = node.store.add(
            request.blocks,
            tokens=[self.trace.block_tokens[b] for b in request.blocks],
            now_s=now_s,
        )
        node.added += added
        node.gone += gone
        self._write_behind(request, node, done)

    def _occupy(self, request: Request, node: _Node, work_s: float, *, now_s: float) -> float:
        begin = now_s + node.wait_s(now_s)
        done = begin + work_s
        node.engine_free_s = done
        node.busy_s += work_s
        reply = request.reply_tokens / self.hardware.decode_tokens_per_s
        heapq.heapreplace(node.slots, done + reply)
        self.waits.append(begin - request.at_s)
        self.ttfts.append(done - request.at_s)
        self.end_s = max(self.end_s, done)
        return done

    def _write_behind(self, request: Request, node: _Node, done_s: float) -> None:
        if self.hardware.shared_bytes <= 0:
            return
        new = request.blocks[self.shared.match(request.blocks) :]
        size = sum(self.trace.block_tokens[b] for b in new) * self.hardware.row_bytes
        if not size:
            return
        begin = max(done_s, node.upload_free_s)
        node.upload_free_s = begin + size / self.hardware.upload_bytes_per_s

        def store(at: float) -> None:
            sizes = [self.trace.block_tokens[b] for b in request.blocks]
            added, gone = self.shared.add(request.blocks, tokens=sizes, now_s=at)
            self.stored_bytes += sum(self.trace.block_tokens[b] for b in added) * (
                self.hardware.row_bytes
            )
            self.stored += added
            self.unstored += gone

        self._at(node.upload_free_s, _What.STORED, store)

    def _serve_oracle(self, request: Request, node: _Node) -> None:
        known = 0
        for block in request.blocks:
            if block not in self.seen:
                break
            known += 1
        self.seen.update(request.blocks)
        reuse = min(_tokens(request, known), request.prompt_tokens - 1)
        self.local_tokens += reuse
        work = self.costs.prefill_s * (request.prompt_tokens - reuse)
        self._occupy(request, node, work, now_s=request.at_s)

    def _report(self, at: float) -> None:
        stored, unstored = self.stored, self.unstored
        self.stored, self.unstored = [], []
        for node in self.nodes:
            report = NodeReport(
                taken_s=at,
                backlog_s=max(node.engine_free_s - at, 0.0) + node.moving_work_s,
                costs=self.costs,
                added=node.added,
                gone=node.gone,
                stored=stored,
                unstored=unstored,
            )
            stored, unstored = [], []
            for fleet in self.fleets:
                fleet.report(node.name, report, now_s=at)
            node.added, node.gone = [], []
        self._at(at + self.report_s, _What.REPORT, self._report)

    def outcome(self) -> Outcome:
        """What it came to."""
        return Outcome(
            policy=self.policy,
            nodes=len(self.nodes),
            requests=len(self.trace.requests),
            prompt_tokens=self.trace.prompt_tokens,
            local_tokens=self.local_tokens,
            moved_tokens=self.moved_tokens,
            moved_bytes=self.moved_bytes,
            stored_bytes=self.stored_bytes,
            evicted_bytes=sum(node.store.evicted_bytes for node in self.nodes),
            ttft=Spread.of(self.ttfts),
            wait=Spread.of(self.waits),
            busy_s=tuple(node.busy_s for node in self.nodes),
            served=tuple(node.served for node in self.nodes),
            span_s=self.end_s - self.trace.requests[0].at_s,
        )


def _tokens(request: Request, blocks: int) -> int:
    return request.ends_tokens[blocks - 1] if blocks else 0


def _blocks(request: Request, tokens: int) -> int:
    return sum(1 for end in request.ends_tokens if end <= tokens)


def simulate(
    trace: Trace,
    *,
    nodes: int,
    policy: Policy = "keepwarm",
    hardware: Hardware | None = None,
    seed: int = 1,
    routers: int = 1,
    report_s: float = 2.0,
    work_weight: float = WORK_WEIGHT,
) -> Outcome:
    """Run a trace on a fleet; see the module for what is modelled.

    Args:
        trace: the requests.
        nodes: how many, all alike.
        policy: how nodes are chosen. `oracle` shares an unbounded store at no cost.
        hardware: what a node is; the defaults of `Hardware` if not given.
        seed: of the random policy.
        routers: how many choose, each with its own view.
        report_s: how often nodes report.
        work_weight: see `fleet.routing.WORK_WEIGHT`.
    """
    world = _World(
        trace,
        nodes=nodes,
        policy=policy,
        hardware=hardware or Hardware(),
        seed=seed,
        routers=routers,
        report_s=report_s,
        work_weight=work_weight,
    )
    world.run()
    return world.outcome()
