"""A stop ends within its time, whatever runs, and everybody who waits is told."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import msgspec
import pytest
from aiohttp import web
from fakeengine import FakeEngine, Fault
from rig import Keepwarm, until

from keepwarm.deployment.condition import State
from keepwarm.deployment.life import Life
from keepwarm.gateway.app import make_app
from keepwarm.settings import Places, ServerSettings, Settings


@pytest.fixture
def server_settings() -> ServerSettings:
    return ServerSettings(drain_timeout_s=0.5)


async def test_requests_in_flight_are_broken_off_after_the_drain_time_and_told(
    keepwarm: Keepwarm,
) -> None:
    engine, life = keepwarm.engine, keepwarm.life
    engine.faults.extend([Fault.STALL, Fault.STALL_MID_STREAM])
    whole = asyncio.create_task(keepwarm.ask("First?"))
    await until(lambda: len(engine.busy) == 1)
    streamed = asyncio.create_task(keepwarm.ask_streamed("Second?"))
    await until(lambda: len(engine.busy) == 2)
    waiting = asyncio.create_task(keepwarm.ask("Third?"))
    await until(lambda: life.deployment.dispatcher.scheduler.queued)
    began_s = time.monotonic()
    stopping = asyncio.create_task(life.stop())
    # Who has no slot yet is told at once, not after the others have had their time.
    status, headers, _ = await waiting
    assert status == 503
    assert headers["retry-after"]
    assert time.monotonic() - began_s < 0.4
    await stopping
    status, _, body = await whole
    assert status == 503
    assert body["error"]["type"] == "engine_unavailable"
    status, text = await streamed
    assert status == 200
    assert "Keepwarm was stopped" in text
    assert time.monotonic() - began_s < 3.0


async def test_who_waits_for_an_engine_that_is_gone_is_told_when_keepwarm_stops(
    keepwarm: Keepwarm,
) -> None:
    engine, life = keepwarm.engine, keepwarm.life
    await engine.stop()
    await until(lambda: life.state is State.DOWN)
    waiting = asyncio.create_task(keepwarm.ask())
    await until(lambda: life.deployment.dispatcher.scheduler.queued)
    await life.stop()
    status, _, _ = await waiting
    assert status == 503
    await engine.start()


async def test_an_engine_that_dies_while_keepwarm_stops_is_neither_waited_for_nor_restarted(
    keepwarm: Keepwarm,
) -> None:
    engine, life = keepwarm.engine, keepwarm.life
    server = msgspec.structs.replace(life.settings.server, drain_timeout_s=20.0)
    life.deployment.settings = msgspec.structs.replace(life.settings, server=server)
    engine.faults.extend([Fault.STALL, Fault.STALL])
    asked = [asyncio.create_task(keepwarm.ask(f"Question {n}?")) for n in range(2)]
    await until(lambda: len(engine.busy) == 2)
    began_s = time.monotonic()
    stopping = asyncio.create_task(life.stop())
    await asyncio.sleep(0.1)
    await engine.stop()
    for task in asked:
        status, _, body = await task
        assert (status, body["error"]["type"]) == (503, "engine_unavailable")
    await stopping
    assert time.monotonic() - began_s < 5.0
    assert life.state is State.STOPPING
    await engine.start()


async def test_the_http_server_ends_at_once_behind_a_stop(
    engine: FakeEngine, settings: Settings, places: Places
) -> None:
    life = Life(settings, places)
    runner = web.AppRunner(make_app(life), handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    await life.start()
    engine.faults.append(Fault.STALL_MID_STREAM)
    async with aiohttp.ClientSession() as session:
        keepwarm = Keepwarm(engine, life, f"http://127.0.0.1:{runner.addresses[0][1]}", session)
        streamed = asyncio.create_task(keepwarm.ask_streamed())
        await until(lambda: engine.busy)
        began_s = time.monotonic()
        await life.stop()
        await runner.cleanup()
        assert time.monotonic() - began_s < 3.0
        _, text = await streamed
        assert "Keepwarm was stopped" in text
