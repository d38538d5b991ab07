"""The figures of many requests at a time, and the request of a given size."""

from __future__ import annotations

import math

import msgspec
import pytest

from keepwarm.bench.arms import KEEPWARM
from keepwarm.bench.figures import figures_of
from keepwarm.bench.load import (
    CLOSED,
    CPU_PER_REQUEST,
    ENGINE,
    LISTENING,
    MEGABYTES,
    OPEN,
    QUEUED,
    TOKENS_A_S,
)
from keepwarm.bench.measures import DIRECT
from keepwarm.bench.prompts import own_request, rules
from keepwarm.bench.results import Amount, Sample
from keepwarm.bench.servers import resident_by_ps
from keepwarm.bench.stats import standard_error


def rate(arm: str, run: int, value: float) -> Amount:
    return Amount(
        scenario="load", step="16 clients", arm=arm, run=run, value=value, unit=TOKENS_A_S
    )


def memory(step: str, run: int, value: float) -> Amount:
    return Amount(scenario="idle", step=step, arm=KEEPWARM, run=run, value=value, unit=MEGABYTES)


def answer(scenario: str, step: str, arm: str, run: int, ttft_s: float) -> Sample:
    return Sample(
        scenario=scenario,
        step=step,
        arm=arm,
        run=run,
        ttft_s=ttft_s,
        total_s=ttft_s,
        cached_tokens=9,
        prefilled_tokens=1,
        decoded_tokens=4,
    )


def test_throughput_is_compared_within_each_round() -> None:
    # The machine is half as fast in the second round, for both.
    amounts = [rate(ENGINE, 0, 100), rate(KEEPWARM, 0, 99.5)]
    amounts += [rate(ENGINE, 1, 50), rate(KEEPWARM, 1, 49.75)]
    amounts += [rate(KEEPWARM, 2, 1)]  # its direct round is missing
    (found,) = figures_of([], [], amounts)
    assert (found.value, found.met) == (pytest.approx(99.5), True)
    (found,) = figures_of([], [], [rate(ENGINE, 0, 100), rate(KEEPWARM, 0, 98.9)])
    assert found.met is False


def test_an_open_page_is_compared_burst_by_burst() -> None:
    samples = []
    for pair, slow_s in enumerate((0.0, 1.0, 5.0, 2.0)):
        for ttft_s in (0.1, 0.2, 0.3):
            samples.append(answer("page", CLOSED, KEEPWARM, pair, slow_s + ttft_s))
            samples.append(answer("page", OPEN, KEEPWARM, pair, slow_s + ttft_s + 0.0005))
    ticks = [(CLOSED, 0.0), (CLOSED, 1250.0), (OPEN, 625.0), (OPEN, 725.0)]
    cpu = [
        Amount(scenario="page", step=step, arm=KEEPWARM, run=0, value=us, unit=CPU_PER_REQUEST)
        for step, us in ticks
    ]
    (found,) = figures_of(samples, [], cpu)
    assert (found.value, found.met) == (pytest.approx(0.5), True)
    assert "625 µs closed, 675 µs open" in found.detail
    # With three pairs nobody knows.
    (found,) = figures_of([s for s in samples if s.run < 3], [])
    assert (found.value, found.met) == (pytest.approx(0.5), None)


def test_idle_streams_are_told_by_the_run_in_which_they_cost_most() -> None:
    before, idle = f"before {QUEUED}", f"before {LISTENING}"
    amounts = [memory(before, 0, 80), memory(QUEUED, 0, 131), memory(idle, 0, 90)]
    amounts += [memory(LISTENING, 0, 100), memory(before, 1, 100), memory(QUEUED, 1, 101)]
    queued, listening = figures_of([], [], amounts)
    assert (queued.value, queued.met) == (pytest.approx(51), False)
    assert (listening.value, listening.met) == (pytest.approx(10), True)


def test_the_overhead_of_each_request_has_its_median_and_its_p99() -> None:
    samples = []
    for step in ("standard", "own"):
        for run in range(200):
            samples.append(answer("overhead", step, DIRECT, run, 0.030))
            samples.append(answer("overhead", step, KEEPWARM, run, 0.031 if run < 190 else 0.040))
    found = figures_of(samples, [])
    assert [f.value for f in found] == pytest.approx([1.0, 10.0, 1.0, 10.0])


@pytest.mark.parametrize("size", [300, 9000])
def test_a_request_of_ones_own_has_exactly_its_size(size: int) -> None:
    body = own_request(size, "Birds 101: name one.", reply_tokens=4)
    assert len(msgspec.json.encode(body)) == size
    assert body["messages"][-1]["content"] == "Birds 101: name one."


def test_a_size_that_does_not_hold_the_question_is_refused() -> None:
    with pytest.raises(ValueError, match="20 bytes"):
        own_request(20, "Birds 101: name one.", reply_tokens=4)


def test_rules_from_another_number_on_begin_otherwise() -> None:
    assert rules(100) != rules(100, start=2)
    assert len(rules(100)) == 100


def test_the_standard_error_falls_with_the_root_of_the_number() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    assert standard_error(values[:3]) == math.inf
    assert standard_error(values * 4) == pytest.approx(standard_error(values * 16) * 2, rel=0.2)
    assert standard_error([7.0] * 9) == 0.0


def test_ps_tells_nothing_of_a_process_that_is_gone() -> None:
    assert resident_by_ps(None) is None
    assert resident_by_ps(2**22 + 1) is None  # beyond every process id
