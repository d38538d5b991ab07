"""Eviction order beside the formula spelled out."""

from __future__ import annotations

import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.evict import HALF_LIFE_S, Candidate, EvictionQueue, heat_after_use, value


def heat_of(uses: list[float]) -> float:
    heat: float | None = None
    for used_s in uses:
        heat = heat_after_use(heat, now_s=used_s)
    assert heat is not None
    return heat


def recent_use(uses: list[float], *, now_s: float) -> float:
    """Each use counts 1 and halves every half-life."""
    return math.fsum(2.0 ** (-(now_s - used_s) / HALF_LIFE_S) for used_s in uses)


days = st.floats(0, 30).map(lambda day: 1.8e9 + day * 24 * 3600)
kept = st.tuples(
    st.floats(0.01, 100), st.integers(1, 10**9), st.lists(days, min_size=1, max_size=5)
)


@given(kept, kept)
def test_values_are_ordered_as_seconds_times_recent_use_over_bytes(
    left: tuple[float, int, list[float]], right: tuple[float, int, list[float]]
) -> None:
    now_s = 1.8e9 + 31 * 24 * 3600
    (a, x), (b, y) = (
        (
            value(prefill_s=seconds, size_bytes=size, heat=heat_of(uses)),
            math.log2(seconds * recent_use(uses, now_s=now_s) / size),
        )
        for seconds, size, uses in (left, right)
    )
    assert a - b == pytest.approx(x - y, abs=1e-6)


def test_more_uses_more_seconds_and_fewer_bytes_are_worth_more() -> None:
    once = value(prefill_s=1, size_bytes=1000, heat=heat_of([0]))
    assert value(prefill_s=1, size_bytes=1000, heat=heat_of([0, 0])) > once
    assert value(prefill_s=2, size_bytes=1000, heat=heat_of([0])) > once
    assert value(prefill_s=1, size_bytes=999, heat=heat_of([0])) > once
    assert value(prefill_s=1, size_bytes=1000, heat=heat_of([10])) > once


def test_a_day_halves_a_use() -> None:
    assert heat_of([HALF_LIFE_S]) - heat_of([0]) == 1.0
    assert heat_of([0, 0]) == heat_of([HALF_LIFE_S])


def test_a_clock_set_back_costs_nothing_but_recency() -> None:
    assert heat_of([1e9, 0]) == pytest.approx(heat_of([0, 1e9]))


def is_extent(number: int, candidate: Candidate) -> bool:
    return candidate.extent_id == number


actions = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.integers(0, 7)),
        st.tuples(st.just("pop"), st.integers(0, 7)),
    ),
    max_size=40,
)


@given(st.lists(st.floats(0, 10), min_size=8, max_size=8), actions)
def test_the_queue_gives_the_least_valuable_whatever_was_used_meanwhile(
    values: list[float], actions: list[tuple[str, int]]
) -> None:
    worth = dict(enumerate(values))
    queue = EvictionQueue()
    for number, now in worth.items():
        queue.push(Candidate(number, None), now)
    for action, number in actions:
        if action == "use":
            if number in worth:
                worth[number] += 1.5
            continue
        found = queue.pop(
            lambda candidate: worth.get(candidate.extent_id),
            keep=partial(is_extent, number),
        )
        free = {i: w for i, w in worth.items() if i != number}
        if not free:
            assert found is None
            continue
        assert found is not None
        assert worth.pop(found.extent_id) == min(free.values())
    left = []
    while (found := queue.pop(lambda candidate: worth.get(candidate.extent_id))) is not None:
        left.append(worth.pop(found.extent_id))
    assert left == sorted(left)
    assert not worth


def test_what_is_no_longer_evictable_leaves_the_queue() -> None:
    queue = EvictionQueue()
    queue.push(Candidate(1, None), 0.0)
    queue.push(Candidate(1, 5), 1.0)
    assert queue.pop(lambda candidate: None if candidate.at is None else 1.0) == Candidate(1, 5)
    assert len(queue) == 0
