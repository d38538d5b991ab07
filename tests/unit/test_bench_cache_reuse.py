"""What the benchmark of moved chunks asks, and how it compares answers."""

from __future__ import annotations

import pytest

from benchmarks.cache_reuse import (
    CHANGED,
    DROPPED,
    LOGPROB,
    PREFIX,
    REMOVED,
    SAME_IDS,
    SHIFTED,
    cases_of,
    figures_of,
    largest_difference,
    same_ids,
)
from keepwarm.bench.results import Amount, Sample


def test_what_is_asked_differs_from_what_is_held_in_the_one_place() -> None:
    changed, removed, dropped = cases_of(0)
    assert [c.name for c in (changed, removed, dropped)] == [CHANGED, REMOVED, DROPPED]
    for case in (changed, removed):
        held, asked = (turns[0]["content"].split("\n") for turns in (case.held, case.asked))
        assert held[0] == asked[0]
        assert held[-1] == asked[-1]
        assert held[1] not in asked
    left_out = [turn for turn in dropped.held if turn not in dropped.asked]
    assert [turn["role"] for turn in left_out] == ["user", "assistant"]
    assert [turn for turn in dropped.held if turn in dropped.asked] == list(dropped.asked)


def test_no_run_begins_like_another() -> None:
    first, second = cases_of(0)[0].held[0]["content"], cases_of(1)[0].held[0]["content"]
    assert first[:20] != second[:20]


def test_ids_are_compared_place_by_place() -> None:
    assert same_ids([1, 2, 3, 4], [1, 2, 9, 4]) == 75
    assert same_ids([1, 2], [1, 2, 3, 4]) == 50
    assert same_ids([], []) == 100


def test_only_tokens_that_both_name_are_compared() -> None:
    assert largest_difference({1: -0.5, 2: -3.0}, {1: -0.75, 3: -9.0}) == 0.25
    with pytest.raises(ValueError, match="none in common"):
        largest_difference({1: -0.5}, {2: -0.5})


def test_the_worst_run_stands_beside_what_the_prefix_alone_changes() -> None:
    def sample(arm: str, ttft_s: float, prefilled: int) -> Sample:
        return Sample(
            scenario="cache_reuse",
            step=DROPPED,
            arm=arm,
            run=0,
            ttft_s=ttft_s,
            total_s=ttft_s,
            cached_tokens=0,
            prefilled_tokens=prefilled,
            decoded_tokens=4,
        )

    def amount(arm: str, run: int, value: float, unit: str) -> Amount:
        return Amount(
            scenario="cache_reuse", step=DROPPED, arm=arm, run=run, value=value, unit=unit
        )

    amounts = []
    for arm, ids, logprobs in ((PREFIX, (100, 90), (0.1, 0.3)), (SHIFTED, (50, 3), (0.2, 4.0))):
        amounts += [amount(arm, run, value, SAME_IDS) for run, value in enumerate(ids)]
        amounts += [amount(arm, run, value, LOGPROB) for run, value in enumerate(logprobs)]
    found = figures_of([sample(PREFIX, 4.0, 900), sample(SHIFTED, 0.5, 40)], amounts)
    assert [f.value for f in found] == [8.0, 3, 4.0]
    assert "900" in found[0].detail
    assert found[1].detail.startswith("90 ")
    assert found[2].detail.startswith("0.3 ")
