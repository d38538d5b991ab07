"""The before/after scenarios: the same requests to every arm, side by side in one run.

Arms take turns request by request and begin in another order each time, so that a slow minute of
the machine meets all of them; the engines that aren't asked are idle. Each scenario is a coroutine
over a `Bench`, which holds the arms and records what they did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from keepwarm.bench.arms import KEEPWARM, NO_CACHE, Arm, Record
from keepwarm.bench.prompts import Questions, user
from keepwarm.bench.results import Sample
from keepwarm.bench.servers import KeepwarmServer
from keepwarm.bench.stats import rotated
from keepwarm.core.tiers import Tier, TierSet

# Enough to see a first token and that a reply goes on; decoding is not what is measured.
REPLY_TOKENS = 4

SETTLING = "settling"
HOT = "hot slot"
AFTER_KILL = "after SIGKILL"


class Watcher(Protocol):
    """Told how a run goes, for people who wait."""

    def doing(self, text: str) -> None:
        """What is being done now."""

    def measured(self, sample: Sample) -> None:
        """One more request was answered."""


@dataclass(slots=True)
class Bench:
    """All that a scenario works with."""

    arms: Sequence[Arm]
    tiers: TierSet
    record: Record
    watcher: Watcher
    questions: Questions = field(default_factory=Questions)

    async def ask(
        self, arm: Arm, tier: Tier, text: str, *, scenario: str, step: str, run: int
    ) -> Sample:
        """One request of one turn, recorded."""
        self.watcher.doing(f"{scenario}: {step}, {arm.name}")
        answer = await arm.ask(tier, [user(text)], reply_tokens=REPLY_TOKENS)
        sample = self.record.sample(answer, scenario=scenario, step=step, arm=arm.name, run=run)
        self.watcher.measured(sample)
        return sample

    async def start_all(self) -> None:
        """Start whatever doesn't run."""
        for arm in self.arms:
            await self.start(arm)

    async def start(self, arm: Arm) -> None:
        """Start one arm's server if it doesn't run."""
        if not arm.server.is_running:
            self.watcher.doing(f"starting {arm.name}")
            await arm.server.start(self.watcher.doing)


async def first_use(bench: Bench, *, runs: int) -> None:
    """Each tier's first request after a start with nothing saved.

    Keepwarm's own warming, which it does before it is ready, is told beside it as its start.
    """
    for run in range(runs):
        for arm in bench.arms:
            await arm.server.stop()
            if isinstance(arm.server, KeepwarmServer):
                arm.server.forget()
            bench.watcher.doing(f"starting {arm.name}")
            seconds = await arm.server.start(bench.watcher.doing)
            step = "start and warm" if arm.name == KEEPWARM else "start"
            bench.record.duration(seconds, scenario="first", step=step, arm=arm.name, run=run)
        for tier in bench.tiers:
            text = bench.questions.new()
            for arm in rotated(bench.arms, run):
                await bench.ask(arm, tier, text, scenario="first", step=tier.name, run=run)


async def identical(bench: Bench, *, runs: int, requests: int) -> None:
    """One request again and again, on the default tier."""
    tier = bench.tiers.default
    for run in range(runs):
        await bench.start_all()
        text = bench.questions.new()
        for turn in range(requests):
            for arm in rotated(bench.arms, turn):
                await bench.ask(arm, tier, text, scenario="identical", step=tier.name, run=run)


async def new_conversations(bench: Bench, *, runs: int, requests: int) -> None:
    """A new question each time, on the default tier."""
    tier = bench.tiers.default
    for run in range(runs):
        await bench.start_all()
        for turn in range(requests):
            text = bench.questions.new()
            for arm in rotated(bench.arms, turn):
                await bench.ask(arm, tier, text, scenario="new", step=tier.name, run=run)


async def restart(bench: Bench, *, runs: int) -> None:
    """The engine is killed with SIGKILL; one new conversation on each tier before and after.

    A bare engine is started again at once, as the quickest supervisor would. What is compared is a
    slot that has had another conversation on the same tier just before.
    """
    for run in range(runs):
        await bench.start_all()
        for arm in rotated(bench.arms, run):
            if arm.name != NO_CACHE:  # it has no warm state to compare with
                for tier in bench.tiers:
                    for step in (SETTLING, HOT):
                        await _new_on(bench, arm, tier, step, run)
            bench.watcher.doing(f"restart: killing the engine of {arm.name}")
            seconds = await arm.server.crash()
            bench.record.duration(
                seconds, scenario="restart", step="killed to ready", arm=arm.name, run=run
            )
            for tier in bench.tiers:
                await _new_on(bench, arm, tier, AFTER_KILL, run)


async def _new_on(bench: Bench, arm: Arm, tier: Tier, when: str, run: int) -> None:
    step = when if when == SETTLING else f"{tier.name}, {when}"
    await bench.ask(arm, tier, bench.questions.new(), scenario="restart", step=step, run=run)
