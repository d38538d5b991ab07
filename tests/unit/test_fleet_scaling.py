"""How many nodes a fleet wants, and what Serve is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.errors import ConfigError
from keepwarm.fleet.config import fleet_of
from keepwarm.fleet.scaling import WAIT, ByLoad, wanted_nodes


@dataclass
class Load:
    """What Serve would tell."""

    current_num_replicas: int = 2
    target_num_replicas: int = 2
    total_num_requests: float = 0.0
    policy_state: dict[str, Any] = field(default_factory=dict)
    aggregated_metrics: dict[str, dict[str, float]] | None = None


@pytest.mark.parametrize(
    ("requests", "wait_s", "wanted"),
    [
        (8.0, 0.0, 2.0),  # what two nodes are meant to have
        (12.0, 0.0, 3.0),
        (2.0, 6.0, 6.0),  # few requests, but with long prompts: each of two nodes has 6 s of work
        (0.0, 0.0, 0.0),
    ],
)
def test_the_goal_that_asks_for_more_nodes_counts(
    requests: float, wait_s: float, wanted: float
) -> None:
    assert wanted == wanted_nodes(
        nodes=2, requests=requests, wait_s=wait_s, target_ongoing=4.0, target_wait_s=2.0
    )


@given(
    nodes=st.integers(1, 256),
    work_s=st.floats(0, 1e4),
    target_s=st.floats(0.1, 60),
)
def test_with_the_nodes_it_wants_the_wait_is_what_was_asked(
    nodes: int, work_s: float, target_s: float
) -> None:
    def wanted(nodes: int) -> float:
        return wanted_nodes(
            nodes=nodes,
            requests=0,
            wait_s=work_s / nodes,
            target_ongoing=4.0,
            target_wait_s=target_s,
        )

    assert wanted(nodes) * target_s == pytest.approx(work_s)
    # However many there are now, so it comes to rest there.
    assert wanted(nodes) == pytest.approx(wanted(1))


def test_waits_are_the_mean_of_those_that_told() -> None:
    policy = ByLoad(target_ongoing=4.0, target_wait_s=2.0)
    load = Load(aggregated_metrics={WAIT: {"one": 5.0, "two": 1.0}})
    assert policy(load)[0] == 3.0


def test_a_fleet_whose_nodes_told_nothing_is_scaled_by_its_requests() -> None:
    policy = ByLoad(target_ongoing=4.0, target_wait_s=2.0)
    assert policy(Load(total_num_requests=12))[0] == 3.0
    assert policy(Load(total_num_requests=12, aggregated_metrics={}))[0] == 3.0


def test_without_a_goal_for_the_wait_it_does_not_count() -> None:
    policy = ByLoad(target_ongoing=4.0, target_wait_s=0.0)
    assert policy(Load(total_num_requests=4, aggregated_metrics={WAIT: {"one": 99.0}}))[0] == 1.0


def test_a_fleet_that_has_no_node_yet_keeps_its_goal() -> None:
    policy = ByLoad(target_ongoing=4.0, target_wait_s=2.0)
    assert policy(Load(current_num_replicas=0, target_num_replicas=2))[0] == 2


def test_a_delay_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="scale_up_s"):
        fleet_of(
            {"fleet": {"scale_up_s": -1}, "node": {"engine": {"model": "m"}}}, source="fleet.toml"
        )
