"""What tiers cost: their parts, the risk of a wrong one, the length of replies, decoding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.rates import DecodeCost, Rates
from keepwarm.router import (
    DEFAULT_COSTS,
    TIERS,
    Decision,
    MissCosts,
    RouterConfig,
    RouteRequest,
    TierCost,
    route,
)
from keepwarm.router.catalog import prepare_catalog, tool_texts
from keepwarm.router.features import look
from keepwarm.router.replies import USUAL_REPLY_TOKENS, ReplyLengths, TaskKind, task_kind
from keepwarm.tiers.files import load_tiers
from keepwarm.tiers.router_files import shipped_weights

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = shipped_weights()
PACKAGED = prepare_catalog(
    tool_texts(
        [
            tool
            for tier in load_tiers(ROOT / "configs" / "prompt-tiers", "Keeper")
            for tool in tier.tools
        ]
    ),
    WEIGHTS.words,
    is_open=True,
)


def decide(text: str, costs: tuple[TierCost, ...] = DEFAULT_COSTS, **changed: Any) -> Decision:
    """As a request comes to a deployment with the packaged tiers, everything warm."""
    config = RouterConfig(costs=dataclasses.replace(MissCosts(), **changed))
    return route(RouteRequest(text=text), PACKAGED, costs, config, WEIGHTS)


@pytest.mark.parametrize(
    "text",
    [
        "What is 12 times 12?",
        "hello!",
        "Translate 'the cat sleeps' into Portuguese.",
        "Rephrase this sentence: He has not got any money left.",
        "What does 'laconic' mean?",
        "Write these names in capitals: anna, bert, carl",
        "How many metres are in a mile?",
        "Why do leaves turn red?",
        "Write a limerick about a sleepy owl.",
        "Was ist die Hauptstadt von Dänemark?",
    ],
)
def test_a_simple_task_goes_to_minimal_when_everything_is_warm(text: str) -> None:
    assert decide(text).tier == "minimal"


@pytest.mark.parametrize(
    "text",
    [
        "What time is it?",
        "Will it be sunny tomorrow in Turin?",
        "What's the latest version of Rust?",
        "Which files in this folder are larger than 5 MB?",
        "Restart the web server.",
        "Who is my landlord?",
        "What did I tell you about my knee?",
        "Remind me at noon to call Eve.",
        "Go through the scanned bills and name each file by its date.",
        "Every evening, save the exchange rate of the euro to rates.csv.",
    ],
)
def test_the_present_the_owners_files_and_earlier_talk_dont_go_to_minimal(text: str) -> None:
    assert decide(text).tier != "minimal"


def test_an_average_speed_isnt_earlier_talk() -> None:
    """`go on` is a phrase that points back; `how fast does it go on average` isn't one."""
    assert decide("How fast does the train go on average if it covers 90 km in an hour?").tier == (
        "minimal"
    )


def test_a_tiers_cost_is_the_sum_of_its_parts() -> None:
    decision = decide("Why do leaves turn red?")
    assert decision.kind == TaskKind.EXPLANATION
    assert decision.reply_tokens == USUAL_REPLY_TOKENS[TaskKind.EXPLANATION]
    for cost in DEFAULT_COSTS:
        told = decision.costs[cost.tier]
        assert told.first_s == cost.first_s
        assert told.reply_s == pytest.approx(decision.reply_tokens * cost.token_s)
        assert told.displaced_s == cost.displaced_s
        assert told.total_s == pytest.approx(
            told.first_s + told.reply_s + told.displaced_s + told.risk_s
        )


def test_longer_replies_make_a_larger_prompt_dearer() -> None:
    text = "Why do leaves turn red?"
    costs = [
        route(
            RouteRequest(text=text),
            PACKAGED,
            DEFAULT_COSTS,
            RouterConfig(),
            WEIGHTS,
            reply_tokens=dict.fromkeys(TaskKind, tokens),
        ).costs
        for tokens in (20.0, 400.0)
    ]
    short, long = ({t: c[t].own_s - c["minimal"].own_s for t in TIERS} for c in costs)
    assert long["standard"] > 10 * short["standard"] > 0
    assert long["full"] > long["standard"]


def test_a_model_that_says_what_it_lacks_makes_minimal_less_of_a_risk() -> None:
    text = "Is the museum open?"
    silent = decide(text, tools_told=0.0).costs["minimal"].risk_s
    telling = decide(text, tools_told=0.9).costs["minimal"].risk_s
    assert telling < 0.3 * silent
    # Told, it costs a short reply and the larger tier instead.
    dear = tuple(dataclasses.replace(c, first_s=c.first_s + 30.0) for c in DEFAULT_COSTS)
    assert decide(text, dear, tools_told=0.9).costs["minimal"].risk_s > telling


def test_answers_that_a_larger_prompt_spoils_count_against_it() -> None:
    text = "Why do leaves turn red?"
    calm, spoiled = (decide(text, spoiled=share).costs for share in (0.0, 0.4))
    assert spoiled["standard"].risk_s > calm["standard"].risk_s + 5
    assert spoiled["minimal"] == calm["minimal"]


def test_kinds_of_tasks_are_told_apart() -> None:
    kinds = {
        "thanks!": TaskKind.TALK,
        "Write a poem about snow": TaskKind.TEXT,
        "Write a python function that adds": TaskKind.CODE,
        "Explain how tides work": TaskKind.EXPLANATION,
        "Who painted it?": TaskKind.QUESTION,
        "Lock the door": TaskKind.ERRAND,
    }
    assert {text: task_kind(look(text)) for text in kinds} == kinds


def test_the_length_of_replies_is_learned_by_kind() -> None:
    lengths = ReplyLengths()
    assert lengths.expected() == USUAL_REPLY_TOKENS
    for _ in range(20):
        lengths.learn(TaskKind.TEXT, 700)
    lengths.learn(TaskKind.TEXT, 0)
    assert lengths.expected()[TaskKind.TEXT] == 700
    assert lengths.expected()[TaskKind.CODE] == USUAL_REPLY_TOKENS[TaskKind.CODE]


def test_a_token_costs_more_behind_a_longer_prompt_before_anything_is_measured() -> None:
    cost = Rates().decode_cost
    measured = {241: 1 / 63, 2083: 1 / 46, 3633: 1 / 31}  # docs/benchmark.md
    for tokens, seconds in measured.items():
        assert cost.at(tokens) == pytest.approx(seconds, rel=0.15)


def test_decoding_is_learned_where_it_was_seen_and_stretched_elsewhere() -> None:
    cost = DecodeCost()
    for _ in range(10):
        cost.observe(context_tokens=300, tokens=50, seconds=50 * 0.004)
    cost.observe(context_tokens=300, tokens=2, seconds=5.0)  # too few to measure anything
    assert cost.at(300) == pytest.approx(0.004)
    assert cost.at(3600) == pytest.approx(0.004 * (1 + 3600 / 4000) / (1 + 300 / 4000))
    for _ in range(10):
        cost.observe(context_tokens=3600, tokens=50, seconds=50 * 0.0041)
    assert cost.at(3600) == pytest.approx(0.0041)
    assert cost.at(300) == pytest.approx(0.004)


@given(
    st.lists(
        st.tuples(st.floats(0, 1e5), st.integers(0, 500), st.just(0.0) | st.floats(1e-6, 100)),
        max_size=20,
    ),
    st.floats(0, 1e6),
)
def test_a_token_always_costs_something(
    seen: list[tuple[float, int, float]], context_tokens: float
) -> None:
    cost = DecodeCost()
    for context, tokens, seconds in seen:
        cost.observe(context_tokens=context, tokens=tokens, seconds=seconds)
    assert 0.0 < cost.at(context_tokens) < float("inf")
