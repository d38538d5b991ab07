"""The store's or the staging directory is taken away under a running gateway: misses, no more."""

from __future__ import annotations

import shutil

import pytest
from rig import Keepwarm, until

from keepwarm.deployment.condition import State


async def engine_dies_and_comes_back(keepwarm: Keepwarm) -> None:
    await keepwarm.engine.stop()
    keepwarm.deployment.suspect_engine()
    await until(lambda: keepwarm.deployment.state is State.DOWN)
    await keepwarm.engine.start()
    await until(lambda: keepwarm.deployment.state is State.READY)


async def assert_warm_again(keepwarm: Keepwarm) -> None:
    for number in range(2):
        status, headers, body = await keepwarm.ask(f"Question {number}?")
        assert status == 200
        assert body["timings"]["cache_n"] >= 60, headers
    # Not in a slot alone: what was lost is saved again, where a next start finds it.
    await keepwarm.occupy()
    status, headers, body = await keepwarm.ask("And now?", model="standard")
    assert (status, headers["x-keepwarm-plan"]) == (200, "snapshot")
    assert body["timings"]["cache_n"] >= 60
    await keepwarm.settled()
    root = keepwarm.deployment.store.settings.root
    assert list(root.glob("*.index"))
    assert list(root.glob("*/*.rows"))
    assert await keepwarm.deployment.store.check_integrity() == ()


@pytest.mark.parametrize("what", ["store", "slots", "both"])
async def test_what_was_taken_away_is_made_again(keepwarm: Keepwarm, what: str) -> None:
    await keepwarm.ask()
    await keepwarm.settled()
    store, staging = keepwarm.deployment.store.settings.root, keepwarm.engine.slot_dir
    for directory in {"store": [store], "slots": [staging], "both": [store, staging]}[what]:
        shutil.rmtree(directory)
    await engine_dies_and_comes_back(keepwarm)
    await assert_warm_again(keepwarm)
    assert keepwarm.deployment.store.pin_named("tier:standard")


async def test_a_store_that_is_gone_between_requests_costs_no_request(keepwarm: Keepwarm) -> None:
    shutil.rmtree(keepwarm.deployment.store.settings.root)
    await keepwarm.occupy()
    for number in range(3):
        status, _, _ = await keepwarm.ask(f"Question {number}?", model="minimal")
        assert status == 200
    await keepwarm.settled()
    assert await keepwarm.deployment.store.check_integrity() == ()
