"""The routing benchmark: its tasks, the order of a run, and what its samples come to."""

from __future__ import annotations

import io
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.routing import Scale, cold_costs, decide_cold, order_of, rounds
from benchmarks.routing_report import (
    ALL,
    ARMS,
    COLD_FULL,
    COLD_ROUTED,
    WARM_FULL,
    WARM_ROUTED,
    RoutedRequest,
    RoutingArm,
    RoutingReport,
    gains_of,
    lines_of,
    markdown,
    placed_of,
    terminal,
    tier_of,
    warm_tiers,
)
from benchmarks.routing_tasks import TASKS
from keepwarm.bench.results import MachineRecord, Prefix
from keepwarm.router import DEFAULT_COSTS, TIERS, TierCost
from keepwarm.tiers.router_files import load_router


def asked(
    arm: RoutingArm,
    kind: str,
    *,
    task: int = 0,
    chosen: str = "full",
    used: str = "",
    ttft_s: float = 1.0,
    prompt: int = 3600,
    prefilled: int = 20,
    decode_s: float = 1.0,
) -> RoutedRequest:
    return RoutedRequest(
        arm=arm.name,
        kind=kind,
        task=task,
        round=0,
        chosen=chosen,
        used=used or chosen,
        ttft_s=ttft_s,
        total_s=ttft_s + decode_s,
        cached_tokens=prompt - prefilled,
        prefilled_tokens=prefilled,
        decoded_tokens=32,
        decode_s=decode_s,
    )


def report(*samples: RoutedRequest) -> RoutingReport:
    prefixes = [
        Prefix(tier=tier, tokens=tokens, size_bytes=9, how="prefilled", seconds=seconds)
        for tier, tokens, seconds in zip(TIERS, (241, 2083, 3633), (1.0, 8.0, 7.5), strict=True)
    ]
    return RoutingReport(
        keepwarm="1.2.3",
        began="2026-01-02T03:04:05+00:00",
        seconds=12.0,
        machine=MachineRecord(system="Linux", processor="some", cores=2, python="3.11", load=0.5),
        engine="an engine",
        model="m.gguf, 98 MB",
        settings={"rounds": "1"},
        row_bytes=1000,
        pool_tokens=8192,
        prefixes=prefixes,
        cold_costs_s={"minimal": 1.0, "standard": 9.0, "full": 17.0},
        cold_tiers={"minimal": ["minimal", "minimal", "standard"]},
        samples=samples,
    )


def test_there_are_enough_tasks_in_every_class_and_no_two_begin_alike() -> None:
    assert tuple(TASKS) == TIERS
    texts = [text for of_class in TASKS.values() for text in of_class]
    assert min(len(of_class) for of_class in TASKS.values()) >= 20
    assert len(texts) >= 60
    first = Counter(re.findall(r"\w+", text)[0].lower() for text in texts)
    assert [word for word, n in first.items() if n > 1] == []


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 7))
def test_every_arm_is_asked_each_of_its_tasks_once_and_in_the_same_round_as_the_others(
    tasks: int, warm_tasks: int, turns: int
) -> None:
    scale = Scale(tasks=tasks, warm_tasks=warm_tasks, rounds=turns)
    at: dict[str, dict[tuple[str, int], int]] = {arm.name: {} for arm in ARMS}
    for turn, arm, these in rounds(scale):
        for task in these:
            assert TASKS[task.kind][task.number] == task.text
            assert (task.kind, task.number) not in at[arm.name]
            at[arm.name][task.kind, task.number] = turn
    for arm in ARMS:
        assert len(at[arm.name]) == len(TASKS) * (warm_tasks if arm.is_cached else tasks)
    both = at[COLD_FULL.name].keys() & at[WARM_ROUTED.name].keys()
    assert len(both) == len(TASKS) * min(tasks, warm_tasks)
    assert all(at[COLD_FULL.name][key] == at[WARM_ROUTED.name][key] for key in both)


def test_rounds_go_there_and_back_so_that_a_drift_meets_every_arm() -> None:
    assert order_of(0) == ARMS
    assert order_of(1) == tuple(reversed(ARMS))
    assert len({arm.name for arm in ARMS}) == len(ARMS)


@pytest.mark.parametrize(
    ("header", "chosen", "used"),
    [
        ("minimal; simple", "minimal", "minimal"),
        ("full; explicit", "full", "full"),
        ("standard; escalated from minimal: tools", "minimal", "standard"),
        ("full; escalated from standard: unknown-tool", "standard", "full"),
    ],
)
def test_a_tier_header_tells_what_was_chosen_and_what_answered(
    header: str, chosen: str, used: str
) -> None:
    assert tier_of(header) == (chosen, used)


def test_gains_compare_only_tasks_that_both_arms_were_asked() -> None:
    samples = [
        asked(COLD_FULL, "minimal", ttft_s=16.0, prefilled=3600),
        asked(COLD_ROUTED, "minimal", ttft_s=1.0, prompt=260, prefilled=260, decode_s=0.5),
        asked(WARM_FULL, "minimal", ttft_s=0.3),
        asked(WARM_ROUTED, "minimal", ttft_s=0.1, chosen="minimal", prompt=260),
        asked(WARM_FULL, "minimal", task=1, ttft_s=99.0),
    ]
    off, off_all, on, on_all = gains_of(samples)
    assert (off.is_cached, off.kind, off.n, off.times) == (False, "minimal", 1, 16.0)
    assert off.decode_times == 2.0
    assert off.kv_share == pytest.approx((260 + 32) / (3600 + 32))
    assert (on.is_cached, on.n, on.full_s) == (True, 1, 0.3)
    assert on.times == pytest.approx(3.0)
    assert (off_all.kind, on_all.kind) == (ALL, ALL)


def test_all_classes_together_are_told_by_their_mean() -> None:
    samples = [
        asked(arm, kind, ttft_s=seconds)
        for arm, times in ((WARM_FULL, (2.0, 2.0, 8.0)), (WARM_ROUTED, (1.0, 1.0, 1.0)))
        for kind, seconds in zip(TIERS, times, strict=True)
    ]
    assert gains_of(samples)[-1].times == 4.0


def test_an_arm_s_memory_is_its_context_times_a_row() -> None:
    line = lines_of([asked(WARM_FULL, "full", prompt=3600)], row_bytes=1000)[0]
    assert line.kv_bytes == (3600 + 32) * 1000
    assert (line.prompt_tokens, line.prefilled_tokens) == (3600, 20)
    assert line.decode_tokens_per_s == 32.0


def test_a_tier_below_what_a_task_was_written_for_is_under_tiered() -> None:
    placed = placed_of({"minimal": ["minimal", "full"], "full": ["minimal", "standard", "full"]})
    small, large, together = placed
    assert (small.right, small.under, small.over) == (1, 0, 1)
    assert (large.right, large.under, large.over) == (1, 2, 0)
    assert (together.kind, together.n, together.right) == (ALL, 5, 2)
    assert together.at == {"minimal": 2, "standard": 1, "full": 2}


def test_what_the_router_chose_counts_and_not_what_the_model_asked_for_then() -> None:
    samples = [
        asked(WARM_ROUTED, "standard", chosen="minimal", used="standard"),
        asked(WARM_FULL, "standard"),
    ]
    assert warm_tiers(samples) == {"standard": ["minimal"]}
    assert "run again one tier up: 1 of 1" in markdown(report(*samples))


def test_a_cold_tier_costs_its_tokens_and_what_it_costs_warm() -> None:
    prefixes = report().prefixes
    costs = cold_costs(prefixes, prefill_s_per_token=0.01)
    usual = {cost.tier: cost for cost in DEFAULT_COSTS}
    assert [cost.tier for cost in costs] == list(TIERS)
    for cost, tokens in zip(costs, (241, 2083, 3633), strict=True):
        assert cost.first_s == pytest.approx(tokens * 0.01 + usual[cost.tier].first_s)
        assert cost.token_s == usual[cost.tier].token_s


def test_cold_prompts_are_avoided_more_readily_than_warm_ones() -> None:
    router = load_router(tiers_dir=None, own_tools=None)

    def at(*seconds: float) -> Counter[str]:
        costs = [TierCost(tier, s) for tier, s in zip(TIERS, seconds, strict=True)]
        return Counter(decide_cold(router, costs).values())

    cold, warm = at(1.0, 9.0, 17.0), at(0.1, 0.2, 0.3)
    assert cold["minimal"] > warm["minimal"]
    assert sum(cold.values()) == sum(len(texts) for texts in TASKS.values())


def test_the_tables_tell_the_same_on_the_terminal_and_in_markdown() -> None:
    made = report(
        asked(WARM_FULL, "minimal", ttft_s=0.3), asked(WARM_ROUTED, "minimal", chosen="minimal")
    )
    text = markdown(made)
    written = io.StringIO()
    Console(width=110, file=written).print(terminal(made))
    shown = written.getvalue()
    for told in ("on, always full", "300 ms", "left of 4,096", "3,855", "16.5 s", "3.6 MB"):
        assert told in text
        assert told in shown
