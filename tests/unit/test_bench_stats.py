"""The benchmark's statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.bench.stats import (
    median,
    paired_difference,
    percentile,
    rotated,
    summarize,
    times_faster,
)

SECONDS = st.lists(st.floats(min_value=1e-6, max_value=1e4), min_size=1, max_size=50)


@given(SECONDS, st.floats(min_value=0, max_value=1))
def test_a_percentile_is_numpys(values: list[float], share: float) -> None:
    assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)))


@given(SECONDS)
def test_a_summary_is_in_order_and_within_what_was_measured(values: list[float]) -> None:
    s = summarize(values)
    assert s.n == len(values)
    assert min(values) == s.minimum <= s.median <= s.p95 <= s.maximum == max(values)


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    assert median([4.0, 1.0, 3.0, 2.0]) == 2.5


def test_equal_values_give_exactly_that_value() -> None:
    assert summarize([0.1] * 7).p95 == 0.1


def test_one_slow_value_moves_p95_and_not_the_median() -> None:
    s = summarize([1.0] * 19 + [100.0])
    assert s.median == 1.0
    assert 1.0 < s.p95 < 100.0


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_a_percentile_of_nothing_or_beyond_all_is_refused(
    values: list[float], share: float
) -> None:
    with pytest.raises(ValueError):
        percentile(values, share)


def test_times_faster_compares_medians() -> None:
    assert times_faster([10.0, 12.0, 100.0], [0.1, 0.12, 5.0]) == pytest.approx(100.0)


def test_a_time_of_zero_is_refused_as_a_measurement() -> None:
    with pytest.raises(ValueError):
        times_faster([1.0], [0.0])


def test_pairs_are_subtracted_in_their_order() -> None:
    assert paired_difference([1.0, 5.0], [1.5, 5.25]) == [0.5, 0.25]


def test_pairs_of_unequal_number_are_refused() -> None:
    with pytest.raises(ValueError):
        paired_difference([1.0], [1.0, 2.0])


@given(st.lists(st.integers(), max_size=6), st.integers(min_value=-10, max_value=10))
def test_a_rotation_keeps_every_item(items: list[int], turn: int) -> None:
    assert sorted(rotated(items, turn)) == sorted(items)


def test_each_arm_is_first_equally_often() -> None:
    firsts = [rotated("abc", turn)[0] for turn in range(-3, 6)]
    assert sorted(firsts) == list("aaabbbccc")
