"""A fleet on a Ray cluster that runs already: two of its machines, one of which goes away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runningfleet import NEEDS_RAY, READY_S, STORY, RunningFleet, user

pytestmark = NEEDS_RAY


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two Ray nodes, each with room for one of ours; as one looks after them elsewhere."""
    up = pytest.importorskip("keepwarm.fleet.up")
    for name, value in up.PATIENCE.items():
        monkeypatch.setenv(name, value)
    utils = pytest.importorskip("ray.cluster_utils")
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_a_machine_of_the_cluster_goes_away_and_the_other_serves_on(
    cluster: Any, tmp_path: Path
) -> None:
    machine = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    lines = f'nodes = 2\none_per_machine = true\naddress = "{cluster.address}"'
    fleet = RunningFleet(tmp_path, fleet=lines)
    try:
        fleet.wait(fleet.settled, READY_S)
        talk = [user(f"Once. {STORY} What hums?")]
        talk += [fleet.chat(talk).message, user("Where?")]
        fleet.wait(fleet.settled, READY_S)
        cluster.remove_node(machine, allow_graceful=False)
        fleet.wait(lambda: _is_alone(fleet), READY_S)
        # Its first turn is here, or in the shared store.
        assert fleet.chat(talk).body["timings"]["prompt_n"] < 60
    finally:
        fleet.stop()


def _is_alone(fleet: RunningFleet) -> bool:
    """Whether one node is left.

    Serve listens on each machine, and here both listen on one port of one host: until the kernel
    has noticed that one of them is gone, it may be the one that is asked.
    """
    try:
        return len(fleet.nodes()) == 1
    except AssertionError:
        return False
