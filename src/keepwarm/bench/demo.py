"""The demo: what Keepwarm is for, on a small model, in a few minutes.

It goes through four steps, each over real servers: Keepwarm warms its tiers; one request is sent
ten times to an engine that evaluates every prompt from its first token and to Keepwarm, in turns; a
new conversation is begun on each tier; the engine is killed with SIGKILL and new conversations are
begun again. Everything is ended and removed at the end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from rich.console import Group
from rich.table import Table
from rich.text import Text

from keepwarm import __version__
from keepwarm.bench.arms import KEEPWARM, NO_CACHE, Record
from keepwarm.bench.lineup import Lineup
from keepwarm.bench.machine import describe_model, machine
from keepwarm.bench.picture import GREY, ORANGE, TEAL, Panel, Row, Value, picture, seconds_text
from keepwarm.bench.report import rich_table
from keepwarm.bench.results import BenchReport, Figure, Prefix, Sample, select, ttfts
from keepwarm.bench.run import prefixes_of
from keepwarm.bench.scenarios import AFTER_KILL, HOT, Bench, Watcher
from keepwarm.bench.servers import KeepwarmServer, Workplace
from keepwarm.bench.stats import median, rotated, times_faster
from keepwarm.core.tiers import TierSet
from keepwarm.engine.attach import plan_launch
from keepwarm.settings import Settings

IDENTICAL, NEW = "identical", "new conversation"
WITHOUT = "evaluated each time"
# Together with the rest this keeps the demo within five minutes where a cold prompt of 2,000 tokens
# takes some ten seconds (two cores), and not much over it where it takes longer.
_COLD_BUDGET_S = 160.0
_FEWEST_COLD = 3


@dataclass(frozen=True, slots=True)
class DemoScale:
    """How much is shown."""

    requests: int = 10
    conversations: int = 3
    kills: int = 3


class Stage(Watcher, Protocol):
    """Where the demo is shown."""

    def heading(self, text: str) -> None:
        """A new step begins."""

    def warmed(self, prefix: Prefix) -> None:
        """A tier is warm."""

    def told(self, text: str) -> None:
        """One line about what happened."""


async def run_demo(
    settings: Settings, tiers: TierSet, *, scale: DemoScale, stage: Stage
) -> BenchReport:
    """Go through the demo.

    Args:
        settings: the model and its engine; the store and the port are replaced by private ones.
        tiers: shown in nesting order; the same request is sent ten times on the default one.
        scale: how much.
        stage: told what happens as it does.

    Raises:
        KeepwarmError: something can't start or answer. Nothing is left running.
    """
    busy, began, began_s = machine(), datetime.now().astimezone(), time.perf_counter()
    record = Record()
    async with AsyncExitStack() as stack:
        place = stack.enter_context(Workplace(settings.store.staging_bytes))
        launch = await plan_launch(settings.engine, slot_dir=place.store("bare"))
        assert launch.options
        lineup = Lineup(settings, launch.options, place, stack)
        bench = Bench([lineup.arm(NO_CACHE), lineup.keepwarm], tiers, record, stage)
        keepwarm = lineup.keepwarm.server
        assert isinstance(keepwarm, KeepwarmServer)
        await _warm(keepwarm, record, stage)
        await _identical(bench, scale, stage)
        await bench.arms[0].server.stop()
        await _new_conversations(bench, scale, stage)
        await _after_kills(bench, scale, stage)
        stage.doing("ending everything")
        prefixes, store_bytes = prefixes_of(keepwarm), keepwarm.store_bytes
    return BenchReport(
        kind="demo",
        keepwarm=__version__,
        began=began.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - began_s, 1),
        machine=busy,
        engine=f"{launch.identity.kind} {launch.identity.build}",
        model=describe_model(Path(settings.engine.model)),
        settings={
            "slots": str(settings.engine.slots),
            "context": f"{settings.engine.context:,} tokens",
            "threads": str(settings.engine.threads or os.cpu_count()),
        },
        prefixes=prefixes,
        samples=record.samples,
        durations=record.durations,
        figures=_figures(record.samples),
        store_bytes=store_bytes,
        notes=record.notes,
    )


async def _warm(keepwarm: KeepwarmServer, record: Record, stage: Stage) -> None:
    stage.heading("Keepwarm starts with an empty store and warms every tier, once")
    seconds = await keepwarm.start(stage.doing)
    record.duration(seconds, scenario="start", step="start and warm", arm=KEEPWARM, run=0)
    for prefix in prefixes_of(keepwarm):
        stage.warmed(prefix)


async def _identical(bench: Bench, scale: DemoScale, stage: Stage) -> None:
    """The same request, in turns, until it was sent as often as wanted or the time is up."""
    tier = bench.tiers.default
    stage.heading(
        f"The same request {scale.requests} times, in turns: evaluated each time by the same "
        f"engine alone, and through Keepwarm (tier {tier.name})"
    )
    cold, keepwarm = bench.arms
    stage.doing("starting the same engine without Keepwarm")
    await cold.server.start()
    text = bench.questions.new()
    spent_s = 0.0
    for turn in range(scale.requests):
        for arm in rotated((cold, keepwarm), turn):
            if arm is cold and spent_s > _COLD_BUDGET_S and turn >= _FEWEST_COLD:
                continue
            sample = await bench.ask(arm, tier, text, scenario=IDENTICAL, step=tier.name, run=turn)
            spent_s += sample.total_s if arm is cold else 0.0
    sent = len(select(bench.record.samples, scenario=IDENTICAL, arm=NO_CACHE))
    if sent < scale.requests:
        note = (
            f"without the cache the request was sent {sent} instead of {scale.requests} times, "
            f"since it takes {spent_s / sent:.0f} s each on this machine"
        )
        bench.record.notes.append(note)
        stage.told(note)


async def _new_conversations(bench: Bench, scale: DemoScale, stage: Stage) -> None:
    stage.heading("A new conversation on each tier")
    keepwarm = bench.arms[1]
    for run in range(scale.conversations):
        for tier in bench.tiers:
            step = f"{tier.name}, {HOT}"
            text = bench.questions.new()
            await bench.ask(keepwarm, tier, text, scenario=NEW, step=step, run=run)


async def _after_kills(bench: Bench, scale: DemoScale, stage: Stage) -> None:
    stage.heading(
        "The engine is killed with SIGKILL and comes back; a new conversation on each tier"
    )
    keepwarm = bench.arms[1]
    for run in range(scale.kills):
        stage.doing("kill -9; the engine loads the model and Keepwarm restores every tier")
        seconds = await keepwarm.server.crash()
        bench.record.duration(
            seconds, scenario=NEW, step="killed to warm again", arm=KEEPWARM, run=run
        )
        stage.told(f"killed; every tier warm again {seconds_text(seconds)} later")
        for tier in bench.tiers:
            step = f"{tier.name}, {AFTER_KILL}"
            text = bench.questions.new()
            await bench.ask(keepwarm, tier, text, scenario=NEW, step=step, run=run)


def _figures(samples: Sequence[Sample]) -> list[Figure]:
    before = select(samples, scenario=IDENTICAL, arm=NO_CACHE)
    after = select(samples, scenario=IDENTICAL, arm=KEEPWARM)
    hot = [s for s in samples if s.step.endswith(HOT)]
    killed = [s for s in samples if s.step.endswith(AFTER_KILL)]
    return [
        Figure(
            what="first request, warm against cold",
            value=times_faster(ttfts(before[:1]), ttfts(after[:1])),
            unit="times faster",
        ),
        Figure(
            what="identical request, through Keepwarm against evaluated each time",
            value=times_faster(ttfts(before), ttfts(after)),
            unit="times faster",
        ),
        Figure(
            what="new conversation after SIGKILL against one before it",
            value=median(ttfts(killed)) / median(ttfts(hot)),
            unit="times",
        ),
    ]


def demo_tables(report: BenchReport) -> Group:
    """What the demo showed, as two tables."""
    before = select(report.samples, scenario=IDENTICAL, arm=NO_CACHE)
    after = select(report.samples, scenario=IDENTICAL, arm=KEEPWARM)
    n = min(len(before), len(after))
    rows = [
        _compared("first request", ttfts(before[:1]), ttfts(after[:1])),
        _compared(f"{n} identical, median", ttfts(before[:n]), ttfts(after[:n])),
        _compared("  all together", [sum(ttfts(before[:n]))], [sum(ttfts(after[:n]))]),
        (
            "  tokens evaluated",
            f"{_prefilled(before[:n]):,}",
            f"{_prefilled(after[:n]):,}",
            f"{1 - _prefilled(after[:n]) / _prefilled(before[:n]):.1%} less",
        ),
    ]
    head = ("", "before", "after", "")
    first = rich_table("The same request: time to first token", head, rows, (0, 3))
    facts = [
        f"before: {WITHOUT}, by the engine alone; after: through Keepwarm",
        f"{report.model}, engine {report.engine}, {report.machine.cores} cores",
        f"warming took {sum(p.seconds for p in report.prefixes):.1f} s, once; the store takes "
        f"{report.store_bytes / 1e6:.0f} MB on disk; the whole demo {report.seconds:.0f} s",
        *report.notes,
    ]
    return Group(first, _tier_table(report), Text("\n".join(facts), style="dim"))


def _tier_table(report: BenchReport) -> Table:
    rows = []
    for prefix in report.prefixes:
        hot, killed = (
            select(report.samples, scenario=NEW, step=f"{prefix.tier}, {when}")
            for when in (HOT, AFTER_KILL)
        )
        if hot and killed:
            rows.append(
                (
                    prefix.tier,
                    f"{prefix.tokens:,}",
                    seconds_text(median(ttfts(hot))),
                    seconds_text(median(ttfts(killed))),
                    f"{median([s.prefilled_tokens for s in killed]):.0f}",
                    f"{median([s.cached_tokens for s in killed]):,.0f}",
                )
            )
    back = [d.seconds for d in report.durations if d.step == "killed to warm again"]
    title = f"New conversation (warm again {seconds_text(median(back))} after a SIGKILL)"
    head = ("tier", "tokens", HOT, AFTER_KILL, "evaluated", "reused")
    return rich_table(title, head, rows, (0,))


def _compared(what: str, before: Sequence[float], after: Sequence[float]) -> tuple[str, ...]:
    times = times_faster(before, after)
    return (
        what,
        seconds_text(median(before)),
        seconds_text(median(after)),
        f"{times:,.0f} times faster" if times >= 10 else f"{times:.1f} times faster",
    )


def _prefilled(samples: Sequence[Sample]) -> int:
    return sum(s.prefilled_tokens for s in samples)


def demo_picture(report: BenchReport) -> str:
    """The demo as a picture: each identical request, and new conversations by tier."""
    words = {NO_CACHE: WITHOUT, KEEPWARM: "Keepwarm"}
    requests: dict[int, list[Value]] = {}
    for arm in (NO_CACHE, KEEPWARM):
        for s in select(report.samples, scenario=IDENTICAL, arm=arm):
            requests.setdefault(s.run, []).append(Value(words[arm], s.ttft_s))
    tiers = []
    for prefix in report.prefixes:
        marks = []
        for when in (HOT, AFTER_KILL):
            times = ttfts(select(report.samples, scenario=NEW, step=f"{prefix.tier}, {when}"))
            if times:
                marks.append(Value(when, median(times), min(times), max(times)))
        if marks:
            tiers.append(Row(f"{prefix.tier}, {prefix.tokens:,} tokens", marks))
    panels = [
        Panel(
            "The same request again and again: time to first token",
            [Row(f"request {turn + 1}", marks) for turn, marks in requests.items()],
        ),
        Panel("A new conversation through Keepwarm, before and after the engine's SIGKILL", tiers),
    ]
    colors = {WITHOUT: GREY, "Keepwarm": TEAL, HOT: TEAL, AFTER_KILL: ORANGE}
    subtitle = f"{report.model}, {report.machine.cores} cores; {report.began[:10]}"
    return picture("Keepwarm: before and after", subtitle, panels, colors=colors)
