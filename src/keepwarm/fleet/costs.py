"""What a request costs on one node of a fleet: the single-node plan's estimate, and moving bytes.

Pure. On one machine the estimate is restore bytes over measured bandwidth, plus tokens left over
the measured prefill rate, plus queueing (`core.plan`). In a fleet there is one more source: rows
that another node has written to the shared store, which are moved to this node before they are
restored. They are moved while the request waits its turn, so the two overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from keepwarm.core.rates import Rates

# One more byte moved must buy something: below this many tokens the object store's round trips
# cost more than the prefill they spare on any node that is worth a fleet.
MOVE_MIN_TOKENS = 64


class PrefixOrigin(StrEnum):
    """Where the first tokens of a request come from, as seen from the node that serves it."""

    LOCAL = "local"
    """A slot or the node's own store."""
    MOVED = "moved"
    """The shared store, through the network."""
    COLD = "cold"
    """Nowhere: all of it is prefilled."""


@dataclass(frozen=True, slots=True)
class NodeCosts:
    """What a node's learned rates come to for one token, in seconds. Reported to the routers.

    `restore_s` and `fetch_s` are for one token's rows, the `*_call_s` are paid once. `can_fetch`
    is whether there is a shared store that answers.
    """

    prefill_s: float
    restore_s: float
    restore_call_s: float
    fetch_s: float
    fetch_call_s: float
    can_fetch: bool

    @classmethod
    def of(
        cls,
        rates: Rates,
        *,
        row_bytes: int,
        fetch_s_per_byte: float,
        fetch_call_s: float,
        can_fetch: bool,
    ) -> NodeCosts:
        """From what a node has learned.

        Args:
            rates: the single-node plan's.
            row_bytes: one token's KV state.
            fetch_s_per_byte: the shared store's bandwidth as this node sees it.
            fetch_call_s: the shared store's latency.
            can_fetch: see the class.
        """
        call_s = rates.restore_s(0, ready=True)
        return cls(
            prefill_s=rates.prefill_s(1),
            restore_s=rates.restore_s(row_bytes, ready=True) - call_s,
            restore_call_s=call_s,
            fetch_s=row_bytes * fetch_s_per_byte,
            fetch_call_s=fetch_call_s,
            can_fetch=can_fetch,
        )


class ServingWay(NamedTuple):
    """One way of serving a request on one node.

    `reuse_tokens` are not prefilled, `moved_tokens` of them come through the network. `work_s` is
    how long the engine is busy with the prompt, `ttft_s` what the client waits, queueing included.
    """

    origin: PrefixOrigin
    reuse_tokens: int
    moved_tokens: int
    work_s: float
    ttft_s: float


def best_way(
    costs: NodeCosts, *, total_tokens: int, local_tokens: int, shared_tokens: int, wait_s: float
) -> ServingWay:
    """The fastest way for a prompt of `total_tokens` on a node.

    Args:
        costs: the node's.
        total_tokens: the prompt's length.
        local_tokens: how much of its beginning the node itself has.
        shared_tokens: how much of it lies in the shared store.
        wait_s: until the node's engine is free for it.
    """
    # All of a fleet's nodes are priced for each request, so this stays plain arithmetic.
    most = total_tokens - 1  # one token is always evaluated again
    local = min(most, local_tokens)
    work = total_tokens * costs.prefill_s
    best = ServingWay(PrefixOrigin.COLD, 0, 0, work, wait_s + work)
    if local > 0:
        work = costs.restore_call_s + local * costs.restore_s
        work += (total_tokens - local) * costs.prefill_s
        if wait_s + work < best.ttft_s:
            best = ServingWay(PrefixOrigin.LOCAL, local, 0, work, wait_s + work)
    shared = min(most, shared_tokens)
    lacking = shared - local if local > 0 else shared
    if costs.can_fetch and lacking >= MOVE_MIN_TOKENS:
        work = costs.restore_call_s + shared * costs.restore_s
        work += (total_tokens - shared) * costs.prefill_s
        fetch = costs.fetch_call_s + lacking * costs.fetch_s
        ttft = max(fetch, wait_s) + work
        if ttft < best.ttft_s:
            best = ServingWay(PrefixOrigin.MOVED, shared, lacking, work, ttft)
    return best
