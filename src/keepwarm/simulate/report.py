"""What a simulated run comes to: counts first, and only then what is derived from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from keepwarm.simulate.trace import Trace


class Spread(NamedTuple):
    """A distribution, in seconds."""

    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The nearest-rank quantiles of some values. Raises: ValueError if there are none."""
        if not values:
            raise ValueError("a distribution needs values")
        ordered = sorted(values)

        def rank(share: float) -> float:
            return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

        return cls(sum(ordered) / len(ordered), rank(0.5), rank(0.9), rank(0.99))


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy on one fleet. Tokens are of prompts; `busy_s` is a node's time on prompts.

    `moved_bytes` were read from the shared store by nodes, `stored_bytes` written to it.
    """

    policy: str
    nodes: int
    requests: int
    prompt_tokens: int
    local_tokens: int
    moved_tokens: int
    moved_bytes: int
    stored_bytes: int
    evicted_bytes: int
    ttft: Spread
    wait: Spread
    busy_s: tuple[float, ...]
    served: tuple[int, ...]
    span_s: float

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that weren't prefilled, wherever their rows came from."""
        return (self.local_tokens + self.moved_tokens) / self.prompt_tokens

    @property
    def local_rate(self) -> float:
        """The share of prompt tokens whose rows the node had itself."""
        return self.local_tokens / self.prompt_tokens

    @property
    def imbalance(self) -> float:
        """The busiest node's time on prompts over the mean; 1 is perfect."""
        return _imbalance(self.busy_s)

    @property
    def request_imbalance(self) -> float:
        """The most requests a node got over the mean."""
        return _imbalance(self.served)

    @property
    def utilization(self) -> float:
        """The mean share of time that engines worked on prompts. Near 1: the fleet is too small."""
        return sum(self.busy_s) / (self.nodes * self.span_s) if self.span_s else 0.0

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "policy": self.policy,
            "nodes": self.nodes,
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "hit_rate": self.hit_rate,
            "local_rate": self.local_rate,
            "ttft_s": self.ttft._asdict(),
            "wait_s": self.wait._asdict(),
            "imbalance": self.imbalance,
            "request_imbalance": self.request_imbalance,
            "utilization": self.utilization,
            "moved_bytes": self.moved_bytes,
            "stored_bytes": self.stored_bytes,
            "evicted_bytes": self.evicted_bytes,
        }


def _imbalance(values: Sequence[float]) -> float:
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0


def oracle_hit_rate(trace: Trace) -> float:
    """What a cache without bounds that everybody shares at once would reuse of a trace."""
    seen: set[int] = set()
    reused = 0
    for request in trace.requests:
        known = 0
        for block, end in zip(request.blocks, request.ends_tokens, strict=True):
            if block not in seen:
                break
            known = end
        reused += min(known, request.prompt_tokens - 1)
        seen.update(request.blocks)
    return reused / trace.prompt_tokens
