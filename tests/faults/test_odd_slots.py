"""An engine that answers 400, 500, garbage or nothing to save, restore or erase: a cold prefill.

Nobody is refused for it, the engine isn't begun anew for it, and when it has come to its senses
slots are saved and restored again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fakeengine import REPLY, FakeEngine
from rig import Keepwarm

from keepwarm.deployment.condition import State

ACTIONS = ("save", "restore", "erase")
ANSWERS = ("400", "500", "garbage", "nothing", "another's slot", "no file")


class OddEngine(FakeEngine):
    """Misbehaves at the slot actions that `odd` names; `times` says how often that was."""

    def __init__(self, slot_dir: Path) -> None:
        super().__init__(slot_dir)
        self.odd: dict[str, str] = {}
        self.times = 0

    async def _slot(self, slot: int, action: str, body: dict[str, Any]) -> web.Response:
        answer = self.odd.get(action)
        if answer is None:
            return await super()._slot(slot, action, body)
        self.times += 1
        if action == "restore":
            self.slots[slot] = []
        if answer in ("400", "500"):
            said = {"error": {"code": int(answer), "message": "Unable to", "type": "server_error"}}
            return web.json_response(said, status=int(answer))
        if answer == "garbage":
            return web.Response(text="<html>", content_type="application/json")
        if answer == "another's slot":
            return web.json_response({"id_slot": 77, "n_saved": 0, "n_restored": 3})
        if answer == "no file":  # it says that it did, and didn't
            timings = {"save_ms": 1.0, "restore_ms": 1.0}
            return web.json_response({"id_slot": slot, "n_saved": 60, "timings": timings})
        raise ConnectionResetError


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[OddEngine]:
    slot_dir = tmp_path / "slots"
    slot_dir.mkdir()
    engine = OddEngine(slot_dir)
    await engine.start()
    yield engine
    engine.resume.set()
    await engine.stop()


async def _all_answered(keepwarm: Keepwarm, chance: random.Random, *, rounds: int) -> None:
    for number in range(rounds):
        await keepwarm.occupy()
        replies = await asyncio.gather(
            *(
                keepwarm.ask(f"{number}: {chance.random()}", model=model)
                for model in ("minimal", "standard", "minimal")
            )
        )
        for status, _, body in replies:
            assert status == 200, body
            assert body["choices"][0]["message"]["content"] == "".join(REPLY)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("action", ACTIONS)
async def test_whatever_a_slot_action_answers_requests_are_served(
    keepwarm: Keepwarm, engine: OddEngine, action: str, answer: str
) -> None:
    chance = random.Random(f"{action}/{answer}")
    engine.odd = {action: answer}
    await _all_answered(keepwarm, chance, rounds=3)
    assert keepwarm.deployment.state is State.READY
    if action != "erase":  # which may not be needed
        assert engine.times, "the fault was never met"
    engine.odd = {}
    await _all_answered(keepwarm, chance, rounds=2)
    await keepwarm.settled()
    assert keepwarm.deployment.state is State.READY
    # Nothing that came of it is believed: what is in a slot is what its engine holds.
    held = {tuple(tokens[:20]) for tokens in engine.slots}
    assert all(held)


@pytest.mark.parametrize("seed", range(6))
async def test_slot_actions_that_fail_at_random_lose_no_request(
    keepwarm: Keepwarm, engine: OddEngine, seed: int
) -> None:
    chance = random.Random(seed)
    for _ in range(4):
        engine.odd = {a: chance.choice(ANSWERS) for a in chance.sample(ACTIONS, 2)}
        await _all_answered(keepwarm, chance, rounds=1)
    engine.odd = {}
    await _all_answered(keepwarm, chance, rounds=1)
    await keepwarm.settled()
