"""One run of the benchmark: arms set up, scenarios gone through, everything ended, a report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from keepwarm import __version__
from keepwarm.bench import measures, scenarios
from keepwarm.bench.arms import ARMS, KEEPWARM, NO_CACHE, Arm, Record
from keepwarm.bench.client import ChatClient
from keepwarm.bench.figures import figures_of
from keepwarm.bench.results import Machine, Prefix, Report
from keepwarm.bench.scenarios import Bench, Watcher
from keepwarm.bench.servers import KeepwarmServer, Server, Workplace, bare_engine
from keepwarm.core.tiers import TierSet
from keepwarm.engine.gguf_header import read_model
from keepwarm.engine.launch import plan_launch
from keepwarm.engine.options import EngineOptions
from keepwarm.errors import ConfigError
from keepwarm.settings import Settings

BEFORE_AFTER = ("first", "identical", "new", "restart")
MEASURES = ("overhead", "ready", "switch", "conversations")
SCENARIOS = (*BEFORE_AFTER, *MEASURES)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything."""

    runs: int = 1
    requests: int = 10
    pairs: int = 100
    starts: int = 5


async def run_bench(
    settings: Settings,
    tiers: TierSet,
    *,
    chosen: Sequence[str],
    arms: Sequence[str] = ARMS,
    scale: Scale,
    watcher: Watcher,
) -> Report:
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
    record = Record()
    async with AsyncExitStack() as stack:
        place = stack.enter_context(Workplace(settings.store.staging_bytes))
        launch = await plan_launch(settings.engine, slot_dir=place.store("bare"))
        assert launch.options
        servers = _Servers(settings, launch.options, place, stack)
        made = [servers.arm(name) for name in ARMS if name in arms]
        await _go(Bench(made, tiers, record, watcher), servers, chosen, scale)
        keepwarm = servers.keepwarm.server
        assert isinstance(keepwarm, KeepwarmServer)
        prefixes, store_bytes = _prefixes(keepwarm), keepwarm.store_bytes
    return Report(
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
        figures=figures_of(record.samples, record.durations),
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


class _Servers:
    """Makes servers for one run and sees to it that each is ended."""

    def __init__(
        self, settings: Settings, options: EngineOptions, place: Workplace, stack: AsyncExitStack
    ) -> None:
        self._settings = settings
        self._options = options
        self._place = place
        self._stack = stack
        self._client = ChatClient()
        stack.push_async_callback(self._client.close)
        binary = settings.engine.binary
        self._binary = Path(binary).expanduser() if binary else None
        self.keepwarm = Arm(KEEPWARM, self._keepwarm(settings), self._client)

    def arm(self, name: str) -> Arm:
        """An arm by name; its server isn't started yet."""
        if name == KEEPWARM:
            return self.keepwarm
        server = bare_engine(
            self._options,
            binary=self._binary,
            client=self._client,
            defaults=True,
            plain=name == NO_CACHE,
        )
        return Arm(name, self._ended(server), self._client)

    def single_slot(self) -> Arm:
        """A Keepwarm with one slot over the same store; only one of the two may run."""
        engine = msgspec.structs.replace(self._settings.engine, slots=1)
        settings = msgspec.structs.replace(self._settings, engine=engine)
        return Arm(KEEPWARM, self._keepwarm(settings), self._client)

    def engine_alone(self) -> Server:
        """The engine with Keepwarm's flags and nothing around it."""
        server = bare_engine(
            self._options, binary=self._binary, client=self._client, defaults=False
        )
        return self._ended(server)

    def _keepwarm(self, settings: Settings) -> KeepwarmServer:
        store = self._place.store("store")
        changed = msgspec.structs.replace(
            settings.store, dir=str(store), staging_dir=str(self._place.staging(store))
        )
        server = KeepwarmServer(
            msgspec.structs.replace(settings, store=changed),
            directory=self._place.root,
            client=self._client,
        )
        self._ended(server)
        return server

    def _ended(self, server: Server) -> Server:
        self._stack.push_async_callback(server.stop)
        return server


async def _go(bench: Bench, servers: _Servers, chosen: Sequence[str], scale: Scale) -> None:
    """The chosen scenarios in an order that lets one use what another has left running."""
    keepwarm = servers.keepwarm
    if "first" in chosen:
        await scenarios.first_use(bench, runs=scale.runs)
    if "identical" in chosen:
        await scenarios.identical(bench, runs=scale.runs, requests=scale.requests)
    if "new" in chosen:
        await scenarios.new_conversations(bench, runs=scale.runs, requests=scale.requests)
    if "restart" in chosen:
        await scenarios.restart(bench, runs=scale.runs)
    if "overhead" in chosen:
        await measures.overhead(bench, keepwarm, pairs=scale.pairs)
    if "conversations" in chosen:
        await measures.conversations(bench, runs=scale.runs)
    for arm in bench.arms:
        await arm.server.stop()
    if "ready" in chosen:
        await bench.start(keepwarm)
        alone = servers.engine_alone()
        await measures.readiness(bench, keepwarm.server, alone, runs=scale.starts)
    if "switch" in chosen:
        await keepwarm.server.stop()
        single = servers.single_slot()
        await bench.start(single)
        await measures.switching(bench, single, runs=scale.runs)
        await single.server.stop()


def _prefixes(server: KeepwarmServer) -> list[Prefix]:
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


def machine() -> Machine:
    """The machine this runs on, with how busy it was: runnable processes, one-minute mean."""
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        load=round(os.getloadavg()[0], 2),
    )


def _processor() -> str:
    """The processor's name where Linux tells it, else the platform's word."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_model(path: Path) -> str:
    """A model's name, file and size, for people."""
    model = read_model(path.expanduser())
    return f"{model.name or path.stem} ({path.name}, {model.size_bytes / 1e6:.0f} MB)"
