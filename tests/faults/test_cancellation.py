"""Clients that hang up at every moment there is: no slot stays taken, no work is left behind."""

from __future__ import annotations

import asyncio
import logging
from random import Random
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientConnectionResetError
from fakeengine import Fault, tokenize
from rig import Keepwarm, until

from keepwarm.core.effects import FillSlot, RestoreSlot, SaveSlot
from keepwarm.core.job import Job
from keepwarm.core.slots import SlotState
from keepwarm.deployment.dispatcher import Dispatcher, Grant

OWN = [{"role": "system", "content": "Follow these rules of the house. " * 60}]


async def hang_up(task: asyncio.Task[Any]) -> None:
    """Close the client's connection by cancelling its request."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def own_prompt(number: int) -> dict[str, Any]:
    """A chat body with a long system prompt of its own, which must be filled first."""
    question = {"role": "user", "content": f"Question {number}?"}
    return {"model": "any", "messages": [*OWN, question]}


async def assert_well(keepwarm: Keepwarm) -> None:
    await keepwarm.settled()
    status, _, body = await keepwarm.ask()
    assert status == 200
    assert body["timings"]["cache_n"] >= 60
    await keepwarm.settled()


def stepping(keepwarm: Keepwarm, kind: type) -> bool:
    """Whether a step of this kind runs."""
    return any(
        isinstance(s, kind) for s in keepwarm.deployment.dispatcher.scheduler._running.values()
    )


async def busy_with_stalled_requests(keepwarm: Keepwarm) -> list[asyncio.Task[Any]]:
    """Give every slot to a request that gets no answer for now."""
    slots = len(keepwarm.engine.slots)
    keepwarm.engine.faults.extend([Fault.STALL] * slots)
    tasks = [asyncio.create_task(keepwarm.ask(f"Stalled {n}?")) for n in range(slots)]
    await until(lambda: len(keepwarm.engine.busy) == slots)
    return tasks


async def test_hanging_up_while_queued_leaves_the_queue(keepwarm: Keepwarm) -> None:
    stalled = await busy_with_stalled_requests(keepwarm)
    scheduler = keepwarm.deployment.dispatcher.scheduler
    waiting = [asyncio.create_task(keepwarm.ask(f"Waiting {n}?")) for n in range(3)]
    await until(lambda: scheduler.queued == 3)
    await hang_up(waiting[1])
    await until(lambda: scheduler.queued == 2)
    keepwarm.engine.resume.set()
    for task in (*stalled, waiting[0], waiting[2]):
        status, _, _ = await task
        assert status == 200
    await assert_well(keepwarm)


async def test_hanging_up_during_a_stall_before_the_first_byte_frees_the_slot(
    keepwarm: Keepwarm,
) -> None:
    stalled = await busy_with_stalled_requests(keepwarm)
    for task in stalled:
        await hang_up(task)
    # The engine is told too: the connection is closed, so it needn't decode for nobody.
    await until(lambda: not keepwarm.engine.busy)
    assert not keepwarm.engine.resume.is_set()
    await assert_well(keepwarm)


async def test_hanging_up_mid_stream_stops_the_engines_decode(keepwarm: Keepwarm) -> None:
    keepwarm.engine.faults.append(Fault.STALL_MID_STREAM)
    url = f"{keepwarm.base}/v1/chat/completions"
    response = await keepwarm.session.post(url, json=keepwarm.body(stream=True))
    assert "It" in (await response.content.readany()).decode()
    await until(lambda: keepwarm.engine.busy)
    response.close()
    await until(lambda: keepwarm.engine.hung_up == 1)
    assert not keepwarm.engine.busy
    await assert_well(keepwarm)
    # It was the client that left: nobody may think that the engine died.
    assert "engine_died" not in await keepwarm.metrics()
    assert "keepwarm_engine_restarts_total{" not in await keepwarm.metrics()


async def test_a_client_that_leaves_behind_the_last_event_has_had_a_whole_reply(
    keepwarm: Keepwarm,
) -> None:
    """As Codex and Aider do: they know that nothing follows, and don't wait for the end."""
    keepwarm.engine.faults.append(Fault.STALL_AT_END)
    url = f"{keepwarm.base}/v1/chat/completions"
    response = await keepwarm.session.post(url, json=keepwarm.body("It counts?", stream=True))
    said = b""
    while b"finish_reason" not in said:
        said += await response.content.readany()
    response.close()
    await keepwarm.settled()
    async with keepwarm.session.get(f"{keepwarm.base}/keepwarm/requests/last") as reply:
        record = await reply.json()
    assert (record["status"], record["outcome"]) == (200, "answered")
    assert record["tokens"]["prompt"] > 0
    assert 'keepwarm_outcomes_total{outcome="answered"} 1.0' in await keepwarm.metrics()
    await assert_well(keepwarm)


async def test_a_whole_chat_reply_is_stopped_like_a_stream(keepwarm: Keepwarm) -> None:
    keepwarm.engine.faults.append(Fault.STALL_MID_STREAM)
    task = asyncio.create_task(keepwarm.ask())
    await until(lambda: keepwarm.engine.busy)
    await hang_up(task)
    await until(lambda: keepwarm.engine.hung_up == 1)
    assert not keepwarm.engine.resume.is_set()
    await assert_well(keepwarm)


async def test_a_slot_whose_reply_cant_be_stopped_is_kept_until_the_engine_is_done(
    keepwarm: Keepwarm,
) -> None:
    # A raw completion that is asked for whole: the engine computes it to its end for nobody.
    scheduler = keepwarm.deployment.dispatcher.scheduler
    keepwarm.engine.faults.append(Fault.STALL)
    body = {"prompt": list(range(300)), "n_predict": 4}
    url = f"{keepwarm.base}/completion"
    task = asyncio.create_task(keepwarm.session.post(url, json=body))
    await until(lambda: keepwarm.engine.busy)
    (slot,) = keepwarm.engine.busy
    await hang_up(task)
    await asyncio.sleep(0.05)
    assert scheduler.slots[slot].state is SlotState.SERVING
    # The other slot serves meanwhile, and nothing is sent into the busy one.
    for number in range(3):
        status, headers, _ = await keepwarm.ask(f"Question {number}?")
        assert status == 200
        assert headers["x-keepwarm-slot"] != str(slot)
    keepwarm.engine.resume.set()
    await keepwarm.settled()
    # What was computed for nobody is there for the next who asks.
    async with keepwarm.session.post(url, json=body) as response:
        assert (await response.json())["timings"]["cache_n"] >= 256
    await assert_well(keepwarm)


async def test_hanging_up_during_a_fill_ends_the_fill(keepwarm: Keepwarm) -> None:
    keepwarm.engine._seconds_a_token = 0.02
    task = asyncio.create_task(keepwarm.ask(**own_prompt(1)))
    await until(lambda: stepping(keepwarm, FillSlot) and keepwarm.engine.busy)
    before = keepwarm.engine.prefilled
    await hang_up(task)
    await until(lambda: not keepwarm.engine.busy)
    keepwarm.engine._seconds_a_token = 0.0
    await keepwarm.settled()
    assert keepwarm.engine.prefilled == before
    await assert_well(keepwarm)


async def test_a_fill_that_others_wait_for_goes_on_when_its_client_leaves(
    keepwarm: Keepwarm,
) -> None:
    keepwarm.engine._seconds_a_token = 0.001
    scheduler = keepwarm.deployment.dispatcher.scheduler
    first = asyncio.create_task(keepwarm.ask(**own_prompt(1)))
    await until(lambda: stepping(keepwarm, FillSlot))
    others = [asyncio.create_task(keepwarm.ask(**own_prompt(n))) for n in (2, 3)]
    await until(lambda: scheduler.queued == 2)
    before = keepwarm.engine.prefilled
    await hang_up(first)
    for task in others:
        status, headers, body = await task
        assert status == 200
        assert headers["x-keepwarm-plan"] in ("shared", "slot", "snapshot")
        assert body["timings"]["cache_n"] > 300
    # Once for the rules, and a few tokens for each question.
    rules = len(tokenize(OWN[0]["content"]))
    assert keepwarm.engine.prefilled - before < 1.3 * rules
    await assert_well(keepwarm)


class Handlers:
    """The gateway's tasks by the id of the request they wait with."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.tasks: dict[str, asyncio.Task[Any]] = {}
        acquire = dispatcher.acquire

        async def noting(job: Job, static: Any) -> Grant:
            task = asyncio.current_task()
            assert task
            self.tasks[job.id] = task
            return await acquire(job, static)

        dispatcher.acquire = noting  # type: ignore[method-assign]


async def test_a_client_that_leaves_just_when_a_fill_is_asked_for_has_it_not_begun(
    keepwarm: Keepwarm,
) -> None:
    dispatcher = keepwarm.deployment.dispatcher
    handlers = Handlers(dispatcher)
    perform = dispatcher._perform
    asked_for: list[FillSlot] = []

    def leaving(effects: list[Any]) -> None:
        perform(effects)
        for effect in effects:
            if isinstance(effect, FillSlot):
                asked_for.append(effect)
                handlers.tasks[effect.job].cancel()

    dispatcher._perform = leaving  # type: ignore[method-assign]
    before = keepwarm.engine.prefilled
    with pytest.raises(aiohttp.ClientError):
        await keepwarm.ask(**own_prompt(1))
    dispatcher._perform = perform  # type: ignore[method-assign]
    await keepwarm.settled()
    assert asked_for
    assert keepwarm.engine.prefilled == before
    await assert_well(keepwarm)


@pytest.mark.parametrize("kind", [SaveSlot, RestoreSlot])
async def test_hanging_up_during_a_save_or_restore_costs_no_slot(
    keepwarm: Keepwarm, kind: type
) -> None:
    gate = asyncio.Event()
    slot_action = keepwarm.engine._slot
    wanted = {SaveSlot: "save", RestoreSlot: "restore"}[kind]

    async def slowly(slot: int, action: str, body: dict[str, Any]) -> Any:
        if action == wanted:
            await gate.wait()
        return await slot_action(slot, action, body)

    # Only their slots hold these, so the next request needs a save, and a restore.
    await keepwarm.occupy()
    keepwarm.deployment.dispatcher.rates.prefill_s_per_token.value = 1.0
    keepwarm.engine._slot = slowly  # type: ignore[method-assign]
    task = asyncio.create_task(keepwarm.ask("Now the tier?"))
    await until(lambda: stepping(keepwarm, kind))
    await hang_up(task)
    gate.set()
    keepwarm.engine._slot = slot_action  # type: ignore[method-assign]
    await assert_well(keepwarm)


@pytest.mark.parametrize("leaves_first", [True, False], ids=["before", "after"])
async def test_a_client_that_leaves_in_the_moment_of_the_grant_takes_no_slot_along(
    keepwarm: Keepwarm, leaves_first: bool
) -> None:
    dispatcher = keepwarm.deployment.dispatcher
    handlers = Handlers(dispatcher)
    resolve = dispatcher._resolve
    left = 0

    def leaving(job_id: str, plan: Any) -> None:
        # Both happen before the handler runs again, in either order.
        nonlocal left
        left += 1
        if leaves_first:
            handlers.tasks[job_id].cancel()
        resolve(job_id, plan)
        if not leaves_first:
            handlers.tasks[job_id].cancel()

    # Requests that wait for a step are granted by the step's task, not by their own.
    await keepwarm.occupy()
    dispatcher._resolve = leaving  # type: ignore[method-assign]
    for number in range(2 * len(keepwarm.engine.slots)):
        with pytest.raises(aiohttp.ClientError):
            await keepwarm.ask(**own_prompt(number))
        await keepwarm.settled()
    dispatcher._resolve = resolve  # type: ignore[method-assign]
    assert left == 2 * len(keepwarm.engine.slots)
    await assert_well(keepwarm)


async def test_hanging_up_while_a_request_is_sent_again_costs_no_slot(keepwarm: Keepwarm) -> None:
    engine = keepwarm.engine
    await engine.stop()
    tasks = [asyncio.create_task(keepwarm.ask(f"Question {n}?")) for n in range(3)]
    await until(lambda: keepwarm.deployment.dispatcher.scheduler.queued == 3)
    for task in tasks:
        await hang_up(task)
    await until(lambda: keepwarm.deployment.dispatcher.scheduler.queued == 0)
    await engine.start()
    await assert_well(keepwarm)


@pytest.mark.parametrize("seed", range(6))
async def test_a_crowd_that_hangs_up_at_random_leaves_every_slot_free(
    keepwarm: Keepwarm, seed: int
) -> None:
    random = Random(seed)
    keepwarm.engine._seconds_a_token = 0.0001

    async def client(number: int) -> None:
        changes: dict[str, Any] = own_prompt(number % 3) if random.random() < 0.5 else {}
        if random.random() < 0.5:
            asking = asyncio.create_task(keepwarm.ask_streamed(f"Question {number}?", **changes))
        else:
            asking = asyncio.create_task(keepwarm.ask(f"Question {number}?", **changes))
        if random.random() < 0.5:
            await asyncio.sleep(random.random() * 0.1)
            asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    await asyncio.gather(*(client(number) for number in range(24)))
    assert all(
        s.state is not SlotState.SERVING for s in keepwarm.deployment.dispatcher.scheduler.slots
    )
    await assert_well(keepwarm)


async def test_a_client_that_leaves_while_it_is_written_to_is_no_error(
    keepwarm: Keepwarm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def left(*_: object) -> None:
        raise ClientConnectionResetError("Cannot write to closing transport")

    monkeypatch.setattr(keepwarm.deployment.router, "tier", left)
    url = f"{keepwarm.base}/v1/chat/completions"
    async with keepwarm.session.post(url, json=keepwarm.body()) as response:
        assert response.status == 499  # which only a test can still read
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    await keepwarm.settled()
