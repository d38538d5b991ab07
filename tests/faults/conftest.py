"""Keepwarm around an engine that misbehaves on command, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from fakeengine import KEY, FakeEngine
from rig import Keepwarm

from keepwarm.deployment.life import Life
from keepwarm.gateway.app import make_app
from keepwarm.gateway.listening import HttpRunner
from keepwarm.settings import (
    EngineSettings,
    Places,
    ServerSettings,
    Settings,
    StoreSettings,
    TierSettings,
)
from smalltiers import write_small_tiers


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "config", tmp_path / "state", None, None)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[FakeEngine]:
    slot_dir = tmp_path / "slots"
    slot_dir.mkdir()
    engine = FakeEngine(slot_dir)
    await engine.start()
    yield engine
    engine.resume.set()
    await engine.stop()


@pytest.fixture
def server_settings() -> ServerSettings:
    return ServerSettings()


@pytest.fixture
def settings(tmp_path: Path, engine: FakeEngine, server_settings: ServerSettings) -> Settings:
    return Settings(
        engine=EngineSettings(upstream=engine.url, upstream_key=KEY, slot_dir=str(engine.slot_dir)),
        server=server_settings,
        store=StoreSettings(dir=str(tmp_path / "store")),
        tiers=TierSettings(dir=str(write_small_tiers(tmp_path / "tiers"))),
    )


@pytest.fixture
async def keepwarm(
    engine: FakeEngine, settings: Settings, places: Places
) -> AsyncIterator[Keepwarm]:
    life = Life(settings, places)
    runner = HttpRunner(make_app(life))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    await life.start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as session:
        yield Keepwarm(engine, life, f"http://127.0.0.1:{port}", session)
    engine.resume.set()
    await life.stop(drain=False)
    await runner.cleanup()
