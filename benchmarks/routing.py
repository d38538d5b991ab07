"""Cache off and on, routing off and on: what does each give, and what is left of the other?

    python -m benchmarks.routing --model m.gguf --chat-template t.jinja

72 tasks of one's own, written for the three tiers in equal parts and asked in turn, one at a time,
each in a new conversation. The arms, each on a server that was just started:

1. *cache off, always full*: a llama-server with one slot and `cache_prompt: false`, each request
   with the full tier's text and tools: one prompt for everything;
2. *cache off, routed*: the same, each request with the tier that Keepwarm's router gives it;
3. *cache on, always full* and *always standard*: Keepwarm, every request naming that tier;
4. *cache on, routed*: Keepwarm, `model: auto`.

They run in rounds, in one order and then backwards, so that a machine that slows down meanwhile
does so for all. An arm's round is a part of its tasks; no server sees a task twice, and each
Keepwarm has a store of its own, warmed before the first round. Cold prompts take long, so the arms
without the cache get only the first --tasks of each class, and each figure tells its number. The
router weighs what a tier costs now, so in arm 2 it is told what Keepwarm would say with nothing
kept: the tier's tokens at the measured speed, and what it costs warm. Every reply has the same
length, since the end of the text is ignored. Writes routing.json and routing.md to --out, and
tables to the terminal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.options import add_options, settings_of
from benchmarks.routing_report import (
    ARMS,
    WARM_ROUTED,
    RoutedRequest,
    RoutingArm,
    RoutingReport,
    markdown,
    terminal,
    tier_of,
)
from benchmarks.routing_tasks import TASKS
from keepwarm import __version__
from keepwarm.bench.client import ChatClient
from keepwarm.bench.machine import describe_model, machine
from keepwarm.bench.results import Prefix
from keepwarm.bench.run import prefixes_of
from keepwarm.bench.servers import KeepwarmServer, Server, Workplace, bare_engine
from keepwarm.core.tiers import TierSet, compose
from keepwarm.engine.attach import plan_launch
from keepwarm.errors import ConfigError, EngineError, KeepwarmError
from keepwarm.router import AUTO, DEFAULT_COSTS, TIERS, RouteRequest, TierCost
from keepwarm.settings import Settings, StoreSettings
from keepwarm.tiers.router_files import Router, load_router

# A server's first request also pays for code and sockets that nobody has used yet.
_SETTLING = "Hello."
_WIDTH = 110


@dataclass(frozen=True, slots=True)
class RoutingTask:
    """One task: the tier it was written for, its number among those, its text."""

    kind: str
    number: int
    text: str


@dataclass(frozen=True, slots=True)
class Scale:
    """How much: tasks of a class with the cache off and on, rounds, and tokens of a reply."""

    tasks: int = 4
    warm_tasks: int = 24
    rounds: int = 4
    reply_tokens: int = 32


def tasks_of(arm: RoutingArm, turn: int, scale: Scale) -> list[RoutingTask]:
    """What an arm is asked in one round: every `rounds`-th task of each class, the classes in turn.

    So a task is asked in the same round by every arm that has it, and once.
    """
    most = scale.warm_tasks if arm.is_cached else scale.tasks
    parts = [
        [
            RoutingTask(kind, n, text)
            for n, text in enumerate(texts[:most])
            if n % scale.rounds == turn
        ]
        for kind, texts in TASKS.items()
    ]
    return [task for task in chain(*zip_longest(*parts)) if task]


def order_of(turn: int) -> tuple[RoutingArm, ...]:
    """The arms of one round: there and back."""
    return ARMS if turn % 2 == 0 else ARMS[::-1]


def rounds(scale: Scale) -> Iterator[tuple[int, RoutingArm, list[RoutingTask]]]:
    """The whole run, arm by arm; an arm without a task in some round is left out of it."""
    for turn in range(scale.rounds):
        for arm in order_of(turn):
            if tasks := tasks_of(arm, turn, scale):
                yield turn, arm, tasks


def cold_costs(prefixes: Sequence[Prefix], *, prefill_s_per_token: float) -> list[TierCost]:
    """What each tier costs where nothing is kept: its tokens first, and then as when it is warm."""
    usual = {cost.tier: cost for cost in DEFAULT_COSTS}
    found = []
    for p in prefixes:
        warm = usual.get(p.tier, TierCost(p.tier, 0.0))
        found.append(replace(warm, first_s=p.tokens * prefill_s_per_token + warm.first_s))
    return found


def decide_cold(router: Router, costs: Sequence[TierCost]) -> dict[str, str]:
    """Each task's tier at such costs, by its text."""
    return {
        text: router.route(RouteRequest(text=text), costs).tier for text in chain(*TASKS.values())
    }


class _Run:
    """The servers of one run and what they have been asked."""

    def __init__(self, tiers: TierSet, client: ChatClient, scale: Scale, tell: Progress) -> None:
        self._tiers, self._client, self._scale = tiers, client, scale
        self._tell = tell
        #: By text: the tier that the router gives it where nothing is kept.
        self.decided: dict[str, str] = {}
        self._bar = tell.add_task("starting", total=sum(len(t) for _, _, t in rounds(scale)))
        self.samples: list[RoutedRequest] = []

    def doing(self, text: str) -> None:
        """What is being done now."""
        self._tell.update(self._bar, description=text)

    def _body(self, arm: RoutingArm, text: str) -> dict[str, Any]:
        body = {
            "model": arm.asked,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self._scale.reply_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if arm.is_cached:
            return body
        tier = self._tiers.get(self.decided[text] if arm.asked == AUTO else arm.asked)
        assert tier
        return compose(tier, {**body, "model": tier.name, "cache_prompt": False})

    async def round(
        self, arm: RoutingArm, server: Server, tasks: Sequence[RoutingTask], turn: int
    ) -> None:
        """Start the arm's server, ask it its tasks, and end it."""
        self._tell.console.print(f"round {turn + 1}: {arm.name}, {len(tasks)} tasks")
        self.doing(f"{arm.name}: starting")
        await server.start(self.doing)
        try:
            smallest = RoutingArm(arm.is_cached, TIERS[0])
            await self._client.ask(server.base_url, self._body(smallest, _SETTLING))
            for task in tasks:
                self.doing(f"{arm.name}: {task.kind}")
                self.samples.append(await self._ask(arm, server, task, turn))
                self._tell.advance(self._bar)
        finally:
            await server.stop()

    async def _ask(
        self, arm: RoutingArm, server: Server, task: RoutingTask, turn: int
    ) -> RoutedRequest:
        body = self._body(arm, task.text)
        answer = await self._client.ask(server.base_url, body)
        chosen, used = tier_of(answer.tier) if arm.is_cached else (body["model"],) * 2
        if chosen not in TIERS or not answer.counts.decode_s:
            raise EngineError(
                f"{arm.name} answered without its tier or without the engine's times, so nothing "
                "can be compared."
            )
        return RoutedRequest(
            arm=arm.name,
            kind=task.kind,
            task=task.number,
            round=turn,
            chosen=chosen,
            used=used,
            ttft_s=answer.ttft_s,
            total_s=answer.total_s,
            cached_tokens=answer.counts.cached,
            prefilled_tokens=answer.counts.prefilled,
            decoded_tokens=answer.counts.decoded,
            decode_s=answer.counts.decode_s,
        )


async def run(settings: Settings, tiers: TierSet, scale: Scale, tell: Progress) -> RoutingReport:
    """All arms; every server is ended, whatever happens.

    Raises:
        ConfigError, ModelError: it can't begin; nothing was started.
        EngineError: a server didn't start or answer; all were ended.
    """
    if missing := [name for name in TIERS if name not in tiers]:
        raise ConfigError(f"The tiers' directory has no tier {missing[0]!r}, which is compared.")
    router = load_router(
        tiers_dir=Path(settings.tiers.dir),
        own_tools=[tool for tier in tiers for tool in tier.tools],
    )
    busy, began, began_s = machine(), datetime.now().astimezone(), time.perf_counter()
    async with AsyncExitStack() as stack:
        place = stack.enter_context(Workplace(settings.store.staging_bytes))
        client = ChatClient()
        stack.push_async_callback(client.close)
        launch = await plan_launch(settings.engine, slot_dir=place.store("bare"))
        assert launch.options
        plain = bare_engine(
            launch.options, binary=launch.binary, client=client, defaults=True, plain=True
        )
        stack.push_async_callback(plain.stop)
        servers: dict[RoutingArm, Server] = {}
        for arm in ARMS:
            servers[arm] = _keepwarm(arm, settings, place, client) if arm.is_cached else plain
            stack.push_async_callback(servers[arm].stop)
        going = _Run(tiers, client, scale, tell)
        prefixes: list[Prefix] = []
        seen: dict[str, Any] = {}
        for arm, server in servers.items():
            if not isinstance(server, KeepwarmServer):
                continue
            going.doing(f"{arm.name}: warming the tiers")
            await server.start(going.doing)
            if arm == WARM_ROUTED:
                prefixes = prefixes_of(server)
                _, seen = await client.get(server.base_url + "/keepwarm/overview")
            await server.stop()
        costs = cold_costs(prefixes, prefill_s_per_token=float(seen["prefill_s_per_token"]))
        going.decided = decide_cold(router, costs)
        for turn, arm, tasks in rounds(scale):
            await going.round(arm, servers[arm], tasks, turn)
    return RoutingReport(
        keepwarm=__version__,
        began=began.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - began_s, 1),
        machine=busy,
        engine=f"{launch.identity.kind} {launch.identity.build}",
        model=describe_model(Path(settings.engine.model)),
        settings={
            "tasks of a class": f"{scale.tasks} with the cache off, {scale.warm_tasks} with it on",
            "rounds": str(scale.rounds),
            "reply": f"{scale.reply_tokens} tokens",
            "slots": f"{settings.engine.slots}, one with the cache off",
            "context": f"{settings.engine.context:,} tokens",
            "threads": str(settings.engine.threads or os.cpu_count()),
        },
        row_bytes=int(seen["row_bytes"]),
        pool_tokens=settings.engine.context,  # in parts or shared, it is as many
        prefixes=prefixes,
        cold_costs_s={cost.tier: round(cost.first_s, 3) for cost in costs},
        cold_tiers={kind: [going.decided[t] for t in texts] for kind, texts in TASKS.items()},
        samples=going.samples,
    )


def _keepwarm(
    arm: RoutingArm, settings: Settings, place: Workplace, client: ChatClient
) -> KeepwarmServer:
    """A Keepwarm for one arm, with a store of its own: another arm's prompts would be found."""
    store = place.store(f"store-{arm.asked}")
    kept = StoreSettings(dir=str(store), staging_dir=str(place.staging(store)))
    own = msgspec.structs.replace(settings, store=kept)
    server = KeepwarmServer(own, directory=place.root, client=client)
    server.forget()
    return server


def main() -> None:
    """See the module."""
    most = min(len(texts) for texts in TASKS.values())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--tasks", type=int, default=4, help="of a class, with the cache off")
    parser.add_argument("--warm-tasks", type=int, default=most, help="of a class, with it on")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--reply-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("routing-results"))
    parser.add_argument("--markdown", action="store_true", help="print Markdown, not a table")
    args = parser.parse_args()
    scale = Scale(
        tasks=min(args.tasks, most),
        warm_tasks=min(args.warm_tasks, most),
        rounds=args.rounds,
        reply_tokens=args.reply_tokens,
    )
    if min(scale.tasks, scale.warm_tasks, scale.rounds, scale.reply_tokens) < 1:
        parser.error("--tasks, --warm-tasks, --rounds and --reply-tokens must be 1 at least")
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tell = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
    try:
        settings, tiers = settings_of(args)
        with tell:
            report = asyncio.run(run(settings, tiers, scale, tell))
    except KeepwarmError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; every server was ended")
    args.out.mkdir(parents=True, exist_ok=True)
    raw = msgspec.json.format(msgspec.json.encode(report), indent=2)
    (args.out / "routing.json").write_bytes(raw + b"\n")
    (args.out / "routing.md").write_text(markdown(report), encoding="utf-8")
    if args.markdown:
        sys.stdout.write(markdown(report))
    else:
        # Narrower than this the classes' names would be broken.
        width = max(Console().width, _WIDTH)
        Console(highlight=False, width=width).print(terminal(report))


if __name__ == "__main__":
    main()
