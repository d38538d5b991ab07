"""What Keepwarm does by itself about an engine that grows, hangs, or doesn't come back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from keepwarm.deployment import supervision
from keepwarm.deployment.condition import State
from keepwarm.deployment.life import Life
from keepwarm.engine.process import EngineProcess
from keepwarm.gateway.app import make_app
from keepwarm.settings import (
    EngineSettings,
    Places,
    ServerSettings,
    Settings,
    StoreSettings,
    TierSettings,
)
from smalltiers import write_small_tiers
from tinymodels import small_model

pytestmark = pytest.mark.live

MB = 1_000_000


@dataclass
class Served:
    """A gateway in this process over a real engine; `model` is a link that a test may break."""

    life: Life
    base: str
    model: Path
    session: aiohttp.ClientSession

    async def ask(self) -> aiohttp.ClientResponse:
        body = {
            "model": "standard",
            "messages": [{"role": "user", "content": "Is the disk there?"}],
            "max_tokens": 2,
        }
        reply = await self.session.post(f"{self.base}/v1/chat/completions", json=body)
        await reply.read()
        return reply

    async def cached_tokens(self) -> int:
        reply = await self.ask()
        assert reply.status == 200, await reply.text()
        body: dict[str, Any] = await reply.json()
        return int(body["timings"]["cache_n"])

    async def metrics(self) -> str:
        async with self.session.get(f"{self.base}/metrics") as reply:
            return await reply.text()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    model = tmp_path / "model.gguf"
    model.symlink_to(small_model().resolve())
    settings = Settings(
        engine=EngineSettings(
            model=str(model),
            slots=2,
            context=2048,
            threads=1,
            max_rss_bytes=200 * MB,
            hang_timeout_s=1.0,
        ),
        server=ServerSettings(port=0),
        tiers=TierSettings(dir=str(write_small_tiers(tmp_path / "tiers"))),
        store=StoreSettings(dir=str(tmp_path / "store")),
    )
    life = Life(settings, Places(tmp_path, tmp_path, None, None))
    runner = web.AppRunner(make_app(life))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base = "http://{}:{}".format(*runner.addresses[0][:2])
    await life.start()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield Served(life, base, model, session)
    await life.stop()
    await runner.cleanup()


@pytest.fixture
def told_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the kernel is made to say of the engine's memory: a real one can't be made to leak."""
    told = [100 * MB]
    monkeypatch.setattr(EngineProcess, "resident_bytes", lambda _: told[-1])
    return told


async def test_an_engine_that_has_outgrown_its_limit_is_renewed_and_stays_warm(
    told_bytes: list[int], served: Served
) -> None:
    life = served.life
    assert await served.cached_tokens() >= 100
    first = life.deployment.engine_pid
    # The first look measures the new engine; the growth must come after it.
    await life.deployment.look_at_engine()
    told_bytes.append(250 * MB)
    async with asyncio.timeout(60):
        while life.deployment.engine_pid == first:
            await life.deployment.look_at_engine()
    # It isn't back yet, so this one waits for it.
    assert await served.cached_tokens() >= 100
    assert life.deployment.engine_pid not in (first, None)
    assert 'keepwarm_engine_restarts_total{reason="outgrown"} 1.0' in await served.metrics()


async def test_an_engine_that_hangs_is_killed_and_what_waits_for_it_goes_on(
    told_bytes: list[int], served: Served
) -> None:
    life = served.life
    first = life.deployment.engine_pid
    assert first
    os.kill(first, signal.SIGSTOP)
    replies = await asyncio.gather(*(served.cached_tokens() for _ in range(4)))
    assert min(replies) >= 100
    assert life.deployment.engine_pid != first
    assert 'keepwarm_engine_restarts_total{reason="hung"} 1.0' in await served.metrics()


async def test_a_circuit_opens_with_a_clear_answer_and_closes_when_the_engine_starts_again(
    told_bytes: list[int], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = served.life
    monkeypatch.setattr(supervision, "_MAX_RESTARTS", 2)
    monkeypatch.setattr(supervision, "pause_s", lambda _: 0.05)
    away = served.model.rename(served.model.with_name("away.gguf"))
    assert life.deployment.engine_pid
    os.kill(life.deployment.engine_pid, signal.SIGKILL)
    # Asked before anybody knows: it waits, and is told when the circuit opens.
    waited = await served.ask()
    assert life.state is State.FAILED
    refused = await served.ask()
    for reply in (waited, refused):
        assert reply.status == 503
        assert int(reply.headers["Retry-After"]) > 0
        message = (await reply.json())["error"]["message"]
        assert "The engine isn't available" in message
        assert "\n" not in message
    async with served.session.get(f"{served.base}/health") as reply:
        assert reply.status == 503
    away.rename(served.model)
    async with asyncio.timeout(60):
        while life.state is not State.READY:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.05)
    assert await served.cached_tokens() >= 100
