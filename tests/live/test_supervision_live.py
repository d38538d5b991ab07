"""A real engine that has outgrown its limit is saved and renewed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from keepwarm.engine.process import EngineProcess
from keepwarm.gateway.app import make_app
from keepwarm.gateway.runtime import Runtime
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


async def test_an_engine_that_has_outgrown_its_limit_is_renewed_and_stays_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A real engine can't be made to leak; what the kernel would say of it is told instead.
    told_bytes = 100 * MB
    monkeypatch.setattr(EngineProcess, "resident_bytes", lambda _: told_bytes)
    settings = Settings(
        engine=EngineSettings(
            model=str(small_model()), slots=2, context=2048, threads=1, max_rss_bytes=200 * MB
        ),
        server=ServerSettings(port=0),
        tiers=TierSettings(dir=str(write_small_tiers(tmp_path / "tiers"))),
        store=StoreSettings(dir=str(tmp_path / "store")),
    )
    runtime = Runtime(settings, Places(tmp_path, tmp_path, None, None))
    runner = web.AppRunner(make_app(runtime))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    base = "http://{}:{}".format(*runner.addresses[0][:2])
    await runtime.start()
    async with aiohttp.ClientSession() as session:

        async def ask() -> int:
            body = {
                "model": "standard",
                "messages": [{"role": "user", "content": "Is the disk there?"}],
                "max_tokens": 2,
            }
            async with session.post(f"{base}/v1/chat/completions", json=body) as reply:
                assert reply.status == 200
                return int((await reply.json())["timings"]["cache_n"])

        assert await ask() >= 100
        first = runtime.engine_pid
        # The first look measures the new engine; the growth must come after it.
        await runtime.look_at_engine()
        told_bytes = 250 * MB
        async with asyncio.timeout(60):
            while runtime.engine_pid == first:
                await runtime.look_at_engine()
        # It isn't back yet, so this one waits for it.
        assert await ask() >= 100
        assert runtime.engine_pid not in (first, None)
        async with session.get(f"{base}/metrics") as reply:
            assert 'keepwarm_engine_restarts_total{reason="outgrown"} 1.0' in await reply.text()
    await runtime.stop()
    await runner.cleanup()
