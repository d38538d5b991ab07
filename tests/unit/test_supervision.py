"""When an engine has grown enough to be renewed, and how long is waited between starts."""

from __future__ import annotations

import os
from itertools import pairwise

from keepwarm.engine.process import EngineProcess
from keepwarm.gateway.supervision import Growth, pause_s

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
