"""Figures, tables and files of a benchmark run."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from keepwarm.bench.ahead import OFF, ON
from keepwarm.bench.arms import DEFAULTS, KEEPWARM, NO_CACHE
from keepwarm.bench.demo import demo_picture, demo_tables
from keepwarm.bench.figures import figures_of
from keepwarm.bench.measures import BARE, DIRECT, OWN_PROMPT
from keepwarm.bench.report import TITLES, lines_of, markdown, svg, terminal
from keepwarm.bench.results import (
    BenchReport,
    Duration,
    Figure,
    MachineRecord,
    Prefix,
    Sample,
    read_json,
    write_json,
)
from keepwarm.bench.run import SCENARIOS


def sample(scenario: str, step: str, arm: str, ttft_s: float, **more: int | str) -> Sample:
    values = {"run": 0, "cached_tokens": 0, "prefilled_tokens": 2000, "decoded_tokens": 4, **more}
    return Sample(
        scenario=scenario,
        step=step,
        arm=arm,
        ttft_s=ttft_s,
        total_s=ttft_s + 0.1,
        **values,  # type: ignore[arg-type]
    )


def duration(scenario: str, arm: str, seconds: float, step: str = "start to ready") -> Duration:
    return Duration(scenario=scenario, step=step, arm=arm, run=0, seconds=seconds)


def report(
    *samples: Sample, kind: str = "bench", durations: tuple[Duration, ...] = ()
) -> BenchReport:
    return BenchReport(
        kind=kind,
        keepwarm="1.2.3",
        began="2026-01-02T03:04:05+00:00",
        seconds=12.0,
        machine=MachineRecord(system="Linux", processor="some", cores=2, python="3.11", load=0.5),
        engine="an engine",
        model="m.gguf, 98 MB",
        settings={"runs": "1"},
        prefixes=[Prefix(tier="standard", tokens=2000, size_bytes=9, how="prefilled", seconds=9.5)],
        samples=samples,
        durations=durations,
        figures=figures_of(samples, durations),
        store_bytes=46_300_000,
    )


def figure(*samples: Sample, durations: tuple[Duration, ...] = ()) -> Figure:
    (only,) = figures_of(samples, durations)
    return only


def test_a_warm_first_request_is_held_to_fifty_times() -> None:
    cold = sample("first", "standard", NO_CACHE, 10.0)
    warm = sample("first", "standard", KEEPWARM, 0.1, cached_tokens=1990, prefilled_tokens=10)
    found = figure(cold, warm)
    assert (found.value, found.met) == (pytest.approx(100.0), True)
    slower = sample("first", "standard", KEEPWARM, 0.25)
    assert figure(cold, slower).met is False


def test_a_short_prefix_is_not_held_to_what_a_long_one_can_gain() -> None:
    cold = sample("first", "minimal", NO_CACHE, 1.0, prefilled_tokens=240)
    assert figure(cold, sample("first", "minimal", KEEPWARM, 0.1)).met is None


def test_a_restart_is_compared_pair_by_pair() -> None:
    pairs = [("minimal", 0.1, 0.11), ("standard", 0.2, 0.3), ("full", 1.0, 1.2)]
    samples = [
        made
        for tier, hot, after in pairs
        for made in (
            sample("restart", f"{tier}, hot slot", KEEPWARM, hot),
            sample("restart", f"{tier}, after SIGKILL", KEEPWARM, after),
            # Another arm's restart says nothing of Keepwarm's.
            sample("restart", f"{tier}, after SIGKILL", DEFAULTS, 9.0),
        )
    ]
    found = figure(*samples)
    assert (found.value, found.met) == (pytest.approx(1.2), True)


def test_the_gateways_cost_is_told_in_milliseconds() -> None:
    samples = [sample("overhead", "standard", DIRECT, t, run=i) for i, t in enumerate((0.03, 0.04))]
    samples += [
        sample("overhead", "standard", KEEPWARM, t, run=i) for i, t in enumerate((0.031, 0.0435))
    ]
    at_the_median, at_p99 = figures_of(samples, [])
    assert at_the_median.value == pytest.approx(2.25)
    assert at_the_median.met is False
    assert at_p99.value == pytest.approx(3.475)
    assert at_p99.met is None


def test_a_request_that_is_the_same_both_ways_is_held_to_more() -> None:
    samples = [
        sample("overhead", OWN_PROMPT, DIRECT, 0.030),
        sample("overhead", OWN_PROMPT, KEEPWARM, 0.0315),
    ]
    at_the_median, at_p99 = figures_of(samples, [])
    assert (at_the_median.value, at_the_median.met) == (pytest.approx(1.5), False)
    assert (at_p99.value, at_p99.met) == (pytest.approx(1.5), True)


def test_readiness_is_the_difference_to_the_engine_alone() -> None:
    found = figure(durations=(duration("ready", BARE, 0.8), duration("ready", KEEPWARM, 1.5)))
    assert (found.value, found.met) == (pytest.approx(0.7), True)


def test_each_other_arm_is_compared_with_keepwarm() -> None:
    found = figures_of(
        [
            sample("identical", "standard", NO_CACHE, 10.0),
            sample("identical", "standard", DEFAULTS, 0.04),
            sample("identical", "standard", KEEPWARM, 0.05),
        ],
        [],
    )
    assert [f.value for f in found] == pytest.approx([200.0, 0.8])


def test_a_switch_says_what_was_prefilled_and_how() -> None:
    found = figure(
        sample(
            "switch",
            "minimal to standard",
            KEEPWARM,
            0.2,
            cached_tokens=1900,
            prefilled_tokens=100,
            plan="snapshot",
        )
    )
    assert found.value == 100
    assert "2,000 tokens" in found.unit
    assert "snapshot" in found.detail


def test_whole_conversations_are_compared_by_what_they_took_together() -> None:
    found = figure(
        durations=(
            duration("conversations", DEFAULTS, 14.0, "4 new at once"),
            duration("conversations", KEEPWARM, 0.7, "4 new at once"),
            duration("conversations", KEEPWARM, 1.7, "killed to ready"),
        )
    )
    assert found.value == pytest.approx(20.0)


@pytest.mark.parametrize(("own_s", "met"), [(2.0, True), (2.2, False)])
def test_a_prompt_nobody_has_seen_may_take_a_twentieth_longer(own_s: float, met: bool) -> None:
    step = "the first request"
    found = figure(
        durations=(
            duration("unknown", DEFAULTS, 2.0, step),
            duration("unknown", KEEPWARM, own_s, step),
        )
    )
    assert (found.value, found.met) == (pytest.approx(own_s / 2), met)


def test_nothing_measured_comes_to_nothing() -> None:
    assert figures_of([], []) == []


MEASURED = report(
    sample("first", "standard", NO_CACHE, 10.0),
    sample("first", "standard", KEEPWARM, 0.1, plan="slot"),
    sample("restart", "settling", KEEPWARM, 0.1),
    sample("restart", "standard, hot slot", KEEPWARM, 0.1),
    sample("restart", "standard, after SIGKILL", KEEPWARM, 0.11),
    durations=(duration("ready", BARE, 0.8), duration("ready", KEEPWARM, 1.5)),
)


def test_every_markdown_row_has_as_many_cells_as_its_head() -> None:
    widths: list[int] = []
    for line in markdown(MEASURED).splitlines():
        if line.startswith("|"):
            widths.append(line.count(" | "))
        else:
            assert len(set(widths)) <= 1
            widths = []


def test_markdown_tells_figures_goals_and_the_store() -> None:
    text = markdown(MEASURED)
    assert "100 times faster | at least 50 | reached" in text
    assert "46.3 MB on disk" in text


def test_a_pipe_in_a_note_does_not_break_a_table() -> None:
    text = markdown(report(sample("switch", "a | b", KEEPWARM, 0.1)))
    assert "a \\| b" in text


def test_requests_that_only_settle_a_slot_are_not_shown() -> None:
    assert "settling" not in {line.step for line in lines_of(MEASURED.samples, "restart")}
    assert "settling" not in markdown(MEASURED)


def test_the_terminal_shows_what_the_markdown_does() -> None:
    console = Console(width=200, record=True, quiet=False, file=None)
    with console.capture() as captured:
        console.print(terminal(MEASURED))
    said = captured.get()
    for word in ("100 times faster", "after SIGKILL", "start to ready", "46.3 MB"):
        assert word in said


def test_a_picture_is_drawn_of_samples_and_of_starts() -> None:
    drawn = svg(MEASURED)
    assert "Start to ready" in drawn
    assert "standard, after SIGKILL" in drawn


def test_a_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write_json(MEASURED, tmp_path / "r.json")
    back = read_json(tmp_path / "r.json")
    assert list(back.samples) == list(MEASURED.samples)
    assert list(back.figures) == list(MEASURED.figures)
    assert back.prefixes[0] == MEASURED.prefixes[0]


SHOWN = report(
    sample("identical", "standard", NO_CACHE, 10.0, run=0),
    sample("identical", "standard", KEEPWARM, 0.1, run=0, prefilled_tokens=10),
    sample("identical", "standard", NO_CACHE, 12.0, run=1),
    sample("identical", "standard", KEEPWARM, 0.025, run=1, prefilled_tokens=1),
    # A request that was sent through Keepwarm only: the time for cold ones was up.
    sample("identical", "standard", KEEPWARM, 0.025, run=2, prefilled_tokens=1),
    sample("new conversation", "standard, hot slot", KEEPWARM, 0.08, prefilled_tokens=16),
    sample("new conversation", "standard, after SIGKILL", KEEPWARM, 0.09, prefilled_tokens=17),
    kind="demo",
    durations=(duration("new conversation", KEEPWARM, 1.3, "killed to warm again"),),
)


def test_the_demos_table_compares_equal_numbers_of_requests() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(demo_tables(SHOWN))
    rows = [line.split() for line in captured.get().splitlines()]
    assert ["2", "identical,", "median", "11.0", "s", "62", "ms", "176", "times", "faster"] in rows
    assert ["tokens", "evaluated", "4,000", "11", "99.7%", "less"] in rows
    assert ["standard", "2,000", "80", "ms", "90", "ms", "17", "0"] in rows


def test_the_demos_picture_shows_each_request() -> None:
    drawn = demo_picture(SHOWN)
    assert [f"request {i}" in drawn for i in (1, 2, 3)] == [True] * 3
    assert "after SIGKILL" in drawn


def test_every_scenario_has_a_table_and_a_picture() -> None:
    assert set(SCENARIOS) <= set(TITLES)


def test_the_next_turn_ahead_is_told_in_tokens_beside_the_same_without() -> None:
    step = "chat, new question"
    on = [sample("ahead", step, ON, 0.1, prefilled_tokens=n) for n in (46, 46, 47)]
    off = [sample("ahead", step, OFF, 0.2, prefilled_tokens=n) for n in (111, 112, 111)]
    (figure,) = figures_of([*on, *off], [])
    assert (figure.value, figure.unit) == (46, "tokens prefilled, 111 without")
    assert "200 ms" in figure.detail
    assert "new question" in svg(report(*on, *off))
