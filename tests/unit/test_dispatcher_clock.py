"""The dispatcher's clock: often while something can happen by time alone, else hardly ever."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from keepwarm.core.plan import Machine
from keepwarm.core.rates import Rates
from keepwarm.core.scheduler import ERASE_AFTER_IDLE_S, Scheduler
from keepwarm.core.slots import Slot
from keepwarm.deployment import dispatcher
from keepwarm.deployment.dispatcher import Dispatcher
from keepwarm.engine.counting import PromptCounter

NOBODY = cast("Any", None)


class Counting(Scheduler):
    """Counts its ticks."""

    ticks = 0

    def tick(self, now_s: float) -> list[Any]:
        self.ticks += 1
        return super().tick(now_s)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setattr(dispatcher, "_TICK_S", 0.002)
    return Counting(
        slots=[Slot(0), Slot(1)],
        machine=Machine(row_bytes=100, cuttable=True, can_save=True, pool_tokens=None),
        rates=Rates(),
        lookup=lambda prompt, namespace: None,
    )


async def ticks_in(scheduler: Counting, *, event: bool = False) -> int:
    """How often the clock ticks in a tenth of a second, after an event if there is one."""
    made = Dispatcher(
        scheduler,
        PromptCounter(NOBODY),
        NOBODY,
        NOBODY,
        lambda work, name=None: asyncio.ensure_future(work),
    )
    clock = made.start()
    await asyncio.sleep(0.05)
    before = scheduler.ticks
    if event:
        made.engine_up()
    await asyncio.sleep(0.1)
    clock.cancel()
    return scheduler.ticks - before


def idle_for(scheduler: Scheduler, seconds: float) -> None:
    for slot in scheduler.slots:
        slot.idle_since_s = time.monotonic() - seconds


async def test_nobody_is_waked_where_all_has_been_idle_for_long(scheduler: Counting) -> None:
    idle_for(scheduler, ERASE_AFTER_IDLE_S + 1)
    assert await ticks_in(scheduler) == 0


async def test_a_slot_that_was_just_used_is_looked_at_often(scheduler: Counting) -> None:
    idle_for(scheduler, 0.1)
    assert await ticks_in(scheduler) >= 5


async def test_an_event_wakes_the_clock(scheduler: Counting) -> None:
    idle_for(scheduler, ERASE_AFTER_IDLE_S + 1)
    assert await ticks_in(scheduler, event=True) >= 1
