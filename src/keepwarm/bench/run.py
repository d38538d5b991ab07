"""One run of the benchmark: arms set up, scenarios gone through, everything ended, a report."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from keepwarm import __version__
from keepwarm.bench import ahead, load, measures, scenarios
from keepwarm.bench.arms import ARMS, Record
from keepwarm.bench.figures import figures_of
from keepwarm.bench.lineup import Lineup
from keepwarm.bench.machine import describe_model, machine
from keepwarm.bench.results import BenchReport, Prefix
from keepwarm.bench.scenarios import Bench, Watcher
from keepwarm.bench.servers import KeepwarmServer, Workplace
from keepwarm.core.tiers import TierSet
from keepwarm.engine.attach import plan_launch
from keepwarm.errors import ConfigError
from keepwarm.settings import Settings

BEFORE_AFTER = ("first", "identical", "new", "restart")
MEASURES = (
    "overhead",
    "unknown",
    "load",
    "page",
    "idle",
    "ready",
    "switch",
    "conversations",
    "ahead",
)
# Streams that are open and idle at a time in `idle`.
STREAMS = 200
SCENARIOS = (*BEFORE_AFTER, *MEASURES)


@dataclass(frozen=True, slots=True)
class BenchScale:
    """How much of everything."""

    runs: int = 1
    requests: int = 10
    pairs: int = 200
    rounds: int = 5
    starts: int = 5


async def run_bench(
    settings: Settings,
    tiers: TierSet,
    *,
    chosen: Sequence[str],
    arms: Sequence[str] = ARMS,
    scale: BenchScale,
    watcher: Watcher,
) -> BenchReport:
    """Go through the chosen scenarios and end every server, whatever happens.

    Args:
        settings: model, engine, slots, context and so on, the same for all arms.
        tiers: the tiers that are asked.
        chosen: names out of `SCENARIOS`.
        arms: names out of `ARMS`; scenarios that need another one start it.
        scale: how often.
        watcher: told how it goes.

    Raises:
        ConfigError, ModelError: it can't begin; nothing was started.
        EngineError: a server didn't start or answer; all were ended.
    """
    busy = machine()
    began, began_s = datetime.now().astimezone(), time.perf_counter()
    _check(settings, chosen)
    if "idle" in chosen:
        # All of them wait at a time.
        queue = max(settings.server.queue, STREAMS + 1)
        server = msgspec.structs.replace(settings.server, queue=queue)
        settings = msgspec.structs.replace(settings, server=server)
    record = Record()
    async with AsyncExitStack() as stack:
        place = stack.enter_context(Workplace(settings.store.staging_bytes))
        launch = await plan_launch(settings.engine, slot_dir=place.store("bare"))
        assert launch.options
        lineup = Lineup(settings, launch.options, place, stack)
        made = [lineup.arm(name) for name in ARMS if name in arms]
        await _go(Bench(made, tiers, record, watcher), lineup, chosen, scale)
        keepwarm = lineup.keepwarm.server
        assert isinstance(keepwarm, KeepwarmServer)
        prefixes, store_bytes = prefixes_of(keepwarm), keepwarm.store_bytes
    return BenchReport(
        kind="bench",
        keepwarm=__version__,
        began=began.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - began_s, 1),
        machine=busy,
        engine=f"{launch.identity.kind} {launch.identity.build}",
        model=describe_model(Path(settings.engine.model)),
        settings={
            "scenarios": ", ".join(chosen),
            "runs": str(scale.runs),
            "requests": str(scale.requests),
            "slots": str(settings.engine.slots),
            "context": f"{settings.engine.context:,} tokens, the same for every arm",
            "threads": str(settings.engine.threads or os.cpu_count()),
            "pool": settings.engine.pool,
        },
        prefixes=prefixes,
        samples=record.samples,
        durations=record.durations,
        amounts=record.amounts,
        figures=figures_of(record.samples, record.durations, record.amounts),
        store_bytes=store_bytes,
        notes=record.notes,
    )


def _check(settings: Settings, chosen: Sequence[str]) -> None:
    if settings.engine.upstream:
        raise ConfigError(
            "The benchmark starts and kills its own engines, so it can't use a server that runs "
            "already. Leave out engine.upstream and give --model FILE.gguf."
        )
    if unknown := [name for name in chosen if name not in SCENARIOS]:
        raise ConfigError(
            f"There is no scenario {unknown[0]!r}. Scenarios: {', '.join(SCENARIOS)}, all."
        )


async def _go(bench: Bench, lineup: Lineup, chosen: Sequence[str], scale: BenchScale) -> None:
    """The chosen scenarios in an order that lets one use what another has left running."""
    keepwarm = lineup.keepwarm
    await _before_after(bench, chosen, scale)
    if "overhead" in chosen:
        await measures.overhead(bench, keepwarm, pairs=scale.pairs)
    if "unknown" in chosen:
        await measures.unknown(bench, rounds=scale.rounds, requests=scale.requests)
    if "load" in chosen:
        await load.throughput(bench, keepwarm, rounds=scale.rounds)
    if "page" in chosen:
        await load.page_open(bench, keepwarm, pairs=scale.pairs)
    if "idle" in chosen:
        await load.idle_streams(bench, keepwarm, streams=STREAMS, runs=scale.runs)
    if "conversations" in chosen:
        await measures.conversations(bench, runs=scale.runs)
    for arm in bench.arms:
        await arm.server.stop()
    if "ready" in chosen:
        await bench.start(keepwarm)
        alone = lineup.engine_alone()
        await measures.readiness(bench, keepwarm.server, alone, runs=scale.starts)
    if "switch" in chosen:
        await keepwarm.server.stop()
        single = lineup.single_slot()
        await bench.start(single)
        await measures.switching(bench, single, runs=scale.runs)
        await single.server.stop()
    if "ahead" in chosen:
        await keepwarm.server.stop()
        arms = {name: lineup.ahead(name, name == ahead.ON) for name in (ahead.ON, ahead.OFF)}
        await ahead.next_turns(bench, arms, runs=scale.runs)
        for arm in arms.values():
            await arm.server.stop()


async def _before_after(bench: Bench, chosen: Sequence[str], scale: BenchScale) -> None:
    if "first" in chosen:
        await scenarios.first_use(bench, runs=scale.runs)
    if "identical" in chosen:
        await scenarios.identical(bench, runs=scale.runs, requests=scale.requests)
    if "new" in chosen:
        await scenarios.new_conversations(bench, runs=scale.runs, requests=scale.requests)
    if "restart" in chosen:
        await scenarios.restart(bench, runs=scale.runs)


def prefixes_of(server: KeepwarmServer) -> list[Prefix]:
    """What Keepwarm warmed at its first start in this run."""
    return [
        Prefix(
            tier=str(warmed["name"]).removeprefix("tier:"),
            tokens=int(warmed["tokens"]),
            size_bytes=int(warmed["bytes"]),
            how=str(warmed["how"]),
            seconds=float(warmed["seconds"]),
        )
        for warmed in server.warmed
    ]
