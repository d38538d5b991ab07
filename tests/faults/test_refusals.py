"""What the engine refuses and the store can't give costs warmth, and no start or answer."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from fakeengine import FakeEngine
from rig import Keepwarm, until

from keepwarm.deployment.condition import State
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.life import Life
from keepwarm.errors import ConfigError, EngineStartError
from keepwarm.settings import Places, Settings
from keepwarm.store.types import Origin

Start = Callable[[], "asyncio.Future[Deployment]"]
ALL = 1_000_000


@pytest.fixture
async def start(settings: Settings, places: Places) -> AsyncIterator[Start]:
    """Starts a gateway without its HTTP side; the one before is stopped."""
    running: list[Life] = []

    async def begin() -> Deployment:
        while running:
            await running.pop().stop()
        life = Life(settings, places)
        running.append(life)
        await life.start()
        return life.deployment

    yield lambda: asyncio.ensure_future(begin())
    while running:
        await running.pop().stop(drain=False)


def misses(deployment: Deployment, reason: str) -> float:
    name = f'keepwarm_misses_total{{reason="{reason}"}} '
    lines = deployment.metrics.text().decode().splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def how(deployment: Deployment) -> set[str]:
    return {warmed.how for warmed in deployment.prefixes.warmed}


async def test_a_start_outlives_an_engine_that_refuses_every_restore(
    engine: FakeEngine, start: Start
) -> None:
    assert how(await start()) == {"prefilled"}
    engine.refused_restores = ALL
    deployment = await start()
    assert deployment.state is State.READY
    # The server is somebody else's, so the snapshots needn't be to blame: they stay.
    assert misses(deployment, "refused") == 2
    assert deployment.store.stats().quarantined_extents == 0
    engine.refused_restores = 0
    assert how(await start()) == {"restored"}


async def test_a_restore_that_is_refused_once_is_asked_for_again_from_an_empty_slot(
    engine: FakeEngine, start: Start
) -> None:
    await start()
    engine.refused_restores = 1
    deployment = await start()
    assert how(deployment) == {"restored"}
    assert all(warmed.proved for warmed in deployment.prefixes.warmed)


async def test_an_older_engine_with_a_projector_is_served_and_nothing_of_it_kept(
    engine: FakeEngine, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engine.is_multimodal = True
    deployment = await start()
    assert deployment.state is State.READY
    assert not deployment.machine.can_save
    assert "can't be saved and restored (beside a projector" in caplog.text


async def test_an_engine_that_restores_nothing_is_served_cold(
    engine: FakeEngine, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refuses_probes = True
    deployment = await start()
    assert deployment.state is State.READY
    assert "every start is cold" in caplog.text
    assert how(deployment) == {"prefilled", "cold"}
    assert deployment.store.stats().saves == 0


async def test_slot_files_of_another_version_are_not_a_reason_not_to_serve(
    engine: FakeEngine, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engine.file_version = 7
    deployment = await start()
    assert deployment.state is State.READY
    assert "(version): every start is cold" in caplog.text


async def test_files_for_a_server_of_another_user_have_the_mode_of_its_own(
    engine: FakeEngine, start: Start
) -> None:
    engine.file_mode = 0o664
    deployment = await start()
    minimal = next(t for t in deployment.prefixes.kept if t.name == "tier:minimal")
    hit = await deployment.store.match(minimal.tokens[:-1], namespace="")
    assert hit
    ready = await deployment.store.materialize(hit.extent_id, hit.at_tokens)
    assert (engine.slot_dir / ready.name).stat().st_mode & 0o777 == 0o664
    deployment.store.release(ready.name)


async def test_files_that_cant_be_read_and_directories_that_cant_be_written_get_advice(
    engine: FakeEngine, start: Start
) -> None:
    engine.slot_dir.chmod(0o500)
    if os.access(engine.slot_dir, os.W_OK):
        pytest.skip("this user may read and write everything")
    engine.slot_dir.chmod(0o700)
    engine.file_mode = 0o000
    with pytest.raises(EngineStartError, match="run both as the same user"):
        await start()
    engine.slot_dir.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="Run the llama-server as the same user"):
            await start()
    finally:
        engine.slot_dir.chmod(0o700)


async def test_slots_of_an_engine_with_a_draft_model_are_emptied_before_a_restore(
    engine: FakeEngine, start: Start
) -> None:
    engine.speculates = True
    await start()
    # Something short is left in every slot.
    engine.slots = [[1, 2, 3] for _ in engine.slots]
    deployment = await start()
    assert how(deployment) == {"restored"}
    assert not engine.half_restored
    assert deployment.store.stats().quarantined_extents == 0


async def test_an_engine_that_went_to_sleep_has_empty_slots_and_is_known_to(
    keepwarm: Keepwarm,
) -> None:
    engine, deployment = keepwarm.engine, keepwarm.deployment
    await keepwarm.ask()
    await keepwarm.settled()
    engine.slots = [[] for _ in engine.slots]
    engine.is_sleeping = True
    await deployment.look_at_engine()
    assert misses(deployment, "slept") >= 1
    status, headers, body = await keepwarm.ask("And now?")
    assert (status, headers["x-keepwarm-plan"]) == (200, "snapshot")
    assert body["timings"]["cache_n"] >= 60
    assert misses(deployment, "slot_lost") == 0
    await keepwarm.settled()


async def test_a_reply_that_went_on_beyond_its_slot_leaves_nothing_that_is_taken_for_a_prefix(
    keepwarm: Keepwarm,
) -> None:
    engine, deployment = keepwarm.engine, keepwarm.deployment
    engine.decoded_more = 8192
    _, headers, _ = await keepwarm.ask()
    await keepwarm.settled()
    assert misses(deployment, "context_shift") == 1
    slot = int(headers["x-keepwarm-slot"])
    assert deployment.dispatcher.scheduler.slots[slot].content is None
    engine.decoded_more = 0
    engine.asked.clear()
    for number in range(len(engine.slots)):
        await keepwarm.ask(f"Question {number}?")
    assert any(path == f"/slots/{slot}" for path, _ in engine.asked), "it is emptied or restored"
    await keepwarm.settled()


async def test_an_engine_that_comes_back_and_refuses_all_restores_is_served(
    keepwarm: Keepwarm,
) -> None:
    engine, deployment = keepwarm.engine, keepwarm.deployment
    await engine.stop()
    await until(lambda: deployment.state is State.DOWN)
    engine.refused_restores = ALL
    await engine.start()
    status, _, _ = await keepwarm.ask()
    assert status == 200
    assert deployment.state is State.READY
    await keepwarm.settled()


async def test_a_refused_restore_of_a_request_is_counted_and_not_asked_for_at_once_again(
    keepwarm: Keepwarm,
) -> None:
    engine = keepwarm.engine
    await keepwarm.occupy()
    engine.refused_restores = ALL
    status, _, body = await keepwarm.ask()
    assert status == 200
    assert body["timings"]["cache_n"] == 0
    await keepwarm.counted('keepwarm_misses_total{reason="refused"} 1.0')
    await keepwarm.settled()
    await keepwarm.occupy()
    counted = misses(keepwarm.deployment, "refused")
    status, headers, _ = await keepwarm.ask("And now?")
    assert (status, headers["x-keepwarm-plan"]) == (200, "cold")
    assert misses(keepwarm.deployment, "refused") == counted
    assert keepwarm.deployment.store.stats().quarantined_extents == 0


async def test_an_engine_that_dies_after_its_store_was_removed_comes_back(
    keepwarm: Keepwarm, settings: Settings
) -> None:
    engine, deployment = keepwarm.engine, keepwarm.deployment
    shutil.rmtree(Path(settings.store.dir))
    await engine.stop()
    await until(lambda: deployment.state is State.DOWN)
    await engine.start()
    status, _, _ = await keepwarm.ask()
    assert status == 200
    assert deployment.state is State.READY
    await keepwarm.settled()


async def test_a_learned_prefix_whose_tokens_the_engine_refuses_ends_no_start(
    engine: FakeEngine, start: Start
) -> None:
    deployment = await start()
    minimal = next(t for t in deployment.prefixes.kept if t.name == "tier:minimal")
    hit = await deployment.store.match(minimal.tokens, namespace="")
    assert hit
    name = f"learned::{minimal.digest.hex()}"
    await deployment.store.pin(
        name, hit.extent_id, hit.at_tokens, origin=Origin.LEARNED, digest=minimal.digest
    )
    engine.unknown_tokens.add(minimal.tokens[-1])
    deployment = await start()
    assert deployment.state is State.READY
    assert misses(deployment, "refused") >= 1
