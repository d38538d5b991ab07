"""When an engine is renewed, how long is waited between starts, and who waits for whom."""

from __future__ import annotations

import asyncio
import os
from itertools import pairwise

from keepwarm.deployment.supervision import Growth, Supervisor, pause_s
from keepwarm.engine.client import EngineClient
from keepwarm.engine.process import EngineProcess
from keepwarm.errors import KeepwarmError

MB = 1_000_000


def test_an_idle_engine_over_its_limit_is_renewed_at_once() -> None:
    growth = Growth(limit_bytes=500 * MB)
    assert not growth.observe(400 * MB, is_idle=True, now_s=0)
    assert not growth.observe(500 * MB, is_idle=True, now_s=2)
    assert growth.observe(501 * MB, is_idle=True, now_s=4)


def test_a_busy_one_is_left_alone_for_a_minute() -> None:
    growth = Growth(limit_bytes=500 * MB)
    growth.observe(400 * MB, is_idle=False, now_s=0)
    assert not growth.observe(600 * MB, is_idle=False, now_s=10)
    assert not growth.observe(600 * MB, is_idle=False, now_s=69)
    assert growth.observe(600 * MB, is_idle=False, now_s=70)


def test_the_minute_begins_anew_when_memory_was_given_back() -> None:
    growth = Growth(limit_bytes=500 * MB)
    growth.observe(400 * MB, is_idle=False, now_s=0)
    growth.observe(600 * MB, is_idle=False, now_s=10)
    growth.observe(450 * MB, is_idle=False, now_s=50)
    assert not growth.observe(600 * MB, is_idle=False, now_s=80)


def test_an_engine_that_was_born_over_the_limit_is_not_restarted_for_ever() -> None:
    growth = Growth(limit_bytes=500 * MB)
    for now_s in range(0, 600, 2):
        assert not growth.observe(800 * MB, is_idle=True, now_s=now_s)
    assert growth.observe(900 * MB, is_idle=True, now_s=600)


def test_a_new_engine_is_measured_anew() -> None:
    growth = Growth(limit_bytes=500 * MB)
    growth.observe(450 * MB, is_idle=True, now_s=0)
    assert growth.observe(600 * MB, is_idle=True, now_s=1)
    growth.restarted()
    assert not growth.observe(600 * MB, is_idle=True, now_s=2)


def test_pauses_between_failed_starts_grow_to_half_a_minute() -> None:
    pauses = [pause_s(attempt) for attempt in range(1, 20)]
    assert all(a <= b for a, b in pairwise(pauses))
    assert pauses[0] < 1
    assert pauses[-1] == 30.0


def test_a_process_memory_is_read_from_the_kernel() -> None:
    process = EngineProcess(["true"], port=1)
    process._pid = os.getpid()
    found = process.resident_bytes()
    assert found is not None
    assert 5 * MB < found < 100_000 * MB
    process._pid = None
    assert process.resident_bytes() is None


class _Gone:
    """A deployment whose engine has died and doesn't come back before it is allowed to."""

    def __init__(self) -> None:
        self.client = EngineClient("http://127.0.0.1:9")
        self.process = EngineProcess(["false"], port=9)
        self.process.exited.set()
        self.may_return = asyncio.Event()
        self.lost = asyncio.Event()
        self.is_idle = True
        self.may_sleep = False

    async def engine_rest(self) -> bool:
        return True

    def engine_lost(self, reason: str) -> None:
        assert reason == "died"
        self.lost.set()

    async def engine_again(self) -> None:
        await self.may_return.wait()
        self.process = EngineProcess(["false"], port=9)

    def engine_back(self) -> None:
        pass

    def engine_failed(self, error: KeepwarmError, *, gave_up: bool) -> None:
        raise AssertionError(error)


async def test_who_looks_for_an_engine_that_is_known_to_be_gone_does_not_wait_for_it() -> None:
    deployment = _Gone()
    supervisor = Supervisor(deployment, hang_timeout_s=30)
    watching = asyncio.create_task(supervisor.watch())
    await deployment.lost.wait()
    # Its request failed only now, after everybody else had been told.
    async with asyncio.timeout(5):
        await supervisor.look()
    watching.cancel()


async def test_a_start_that_fails_in_a_way_nobody_thought_of_is_tried_again() -> None:
    class Odd(_Gone):
        def __init__(self) -> None:
            super().__init__()
            self.starts = 0
            self.failures: list[KeepwarmError] = []
            self.back = asyncio.Event()

        async def engine_again(self) -> None:
            self.starts += 1
            if self.starts == 1:
                raise ZeroDivisionError

        def engine_failed(self, error: KeepwarmError, *, gave_up: bool) -> None:
            assert not gave_up
            self.failures.append(error)

        def engine_back(self) -> None:
            self.process = EngineProcess(["false"], port=9)
            self.back.set()

    deployment = Odd()
    watching = asyncio.create_task(Supervisor(deployment, hang_timeout_s=30).watch())
    async with asyncio.timeout(10):
        await deployment.back.wait()
    assert len(deployment.failures) == 1
    assert not watching.done()
    watching.cancel()
