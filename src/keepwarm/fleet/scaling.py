"""How many nodes a fleet should have: by its requests, and by how long they wait.

Without Ray, since Serve's controller imports it by name; `ByLoad` is a policy as Serve's
`autoscaling_config` takes it. Serve itself keeps to the least and the most nodes, and waits before
it follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

WAIT = "wait_s"
"""What nodes tell the policy: the seconds until one is through with the prompts it was given."""


class Load(Protocol):
    """What the policy reads of Serve's `AutoscalingContext`."""

    current_num_replicas: int
    target_num_replicas: int
    total_num_requests: float
    policy_state: dict[str, Any]
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None


def wanted_nodes(
    *, nodes: int, requests: float, wait_s: float, target_ongoing: float, target_wait_s: float
) -> float:
    """Nodes with which both goals are just kept.

    A request's time to first token is its wait and its own prompt. More nodes shorten the wait
    alone, and work that `nodes` have for `wait_s` each is shared by all there are; so a cold
    prompt that takes long by itself never calls for another node.

    Args:
        nodes: how many there are.
        requests: under way in the whole fleet, queued ones included.
        wait_s: a node's backlog of prompts, the mean over all.
        target_ongoing: requests a node should have.
        target_wait_s: what that backlog should be at most; 0 leaves it out.
    """
    by_requests = requests / target_ongoing
    by_wait = nodes * wait_s / target_wait_s if target_wait_s else 0.0
    return max(by_requests, by_wait)


class ByLoad:
    """`wanted_nodes` as Serve calls it, about once a second."""

    def __init__(self, target_ongoing: float, target_wait_s: float) -> None:
        """Set the goals."""
        self._target_ongoing = target_ongoing
        self._target_wait_s = target_wait_s

    def __call__(self, load: Load) -> tuple[float, dict[str, Any]]:
        """Nodes wanted, before Serve's bounds and delays, and the state that the policy keeps."""
        nodes = load.current_num_replicas
        if not nodes:
            return load.target_num_replicas, load.policy_state
        waits = (load.aggregated_metrics or {}).get(WAIT) or {}
        wanted = wanted_nodes(
            nodes=nodes,
            requests=load.total_num_requests,
            wait_s=sum(waits.values()) / len(waits) if waits else 0.0,
            target_ongoing=self._target_ongoing,
            target_wait_s=self._target_wait_s,
        )
        return wanted, load.policy_state
