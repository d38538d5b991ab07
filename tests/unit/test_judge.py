"""The model as a third judge: what it is asked, and when."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.rates import Rates
from keepwarm.core.reply import Reply
from keepwarm.errors import EngineDownError
from keepwarm.gateway.client_request import ClientRequest
from keepwarm.gateway.judge import Judge
from keepwarm.router import DEFAULT_COSTS, NO_TOOLS, RouterConfig, RouteRequest, route
from keepwarm.router.judge import judges_prompt, question_of, verdict_of
from keepwarm.tiers.router_files import shipped_weights
from keepwarm.tiers.tiering import Tiered

WEIGHTS = shipped_weights()


def decided(text: str) -> float:
    return route(RouteRequest(text), NO_TOOLS, DEFAULT_COSTS, RouterConfig(), WEIGHTS).doubt_s


@pytest.mark.parametrize(
    ("said", "tier"),
    [("A", "minimal"), (" B\n", "standard"), ("C", "full"), ("D", None), ("", None), (None, None)],
)
def test_a_letter_is_a_tier_and_nothing_else_is(said: str | None, tier: str | None) -> None:
    assert verdict_of(said) == tier


def test_a_long_task_is_asked_about_by_its_beginning_and_its_end() -> None:
    question = question_of("start " + "x" * 50_000 + " what is asked")["messages"][0]["content"]
    assert len(question) < 1_100
    assert "start" in question
    assert "what is asked" in question


def test_rules_leave_no_doubt() -> None:
    assert decided("hello!") == 0.0
    assert decided("As we discussed yesterday, go on with the plan.") == 0.0


@given(st.text(max_size=300))
def test_doubt_is_never_negative_and_never_more_than_the_dearest_miss(text: str) -> None:
    costs = RouterConfig().costs
    assert 0.0 <= decided(text) <= costs.tools_s + costs.context_s + costs.depth_s


def test_asking_must_save_more_than_it_costs() -> None:
    judge = Judge(_says_nothing, timeout_s=1.0)
    rates = Rates()
    asking_s = rates.prefill_s(50) + rates.decode_s_per_token.value
    text = "Find the shortest way."
    assert judge.is_worth_asking(text, doubt_s=10 * asking_s, rates=rates)
    assert not judge.is_worth_asking(text, doubt_s=asking_s / 2, rates=rates)
    assert not judge.is_worth_asking("", doubt_s=1e9, rates=rates)
    rates.observe_prefill(tokens=1000, seconds=1000.0)
    assert not judge.is_worth_asking(text, doubt_s=10 * asking_s, rates=rates), "a slow machine"


async def _says_nothing(asked: ClientRequest, tiered: Tiered) -> Reply | None:
    assert tiered.tier is not None
    assert tiered.tier.name == judges_prompt().name
    assert tiered.shared_segments == 1, "its prompt is shared by all keys"
    assert asked.namespace == "n"
    return None


async def _is_down(asked: ClientRequest, tiered: Tiered) -> Reply | None:
    raise EngineDownError("gone")


async def _is_slow(asked: ClientRequest, tiered: Tiered) -> Reply | None:
    await asyncio.Event().wait()
    return None


@pytest.mark.parametrize("ask", [_says_nothing, _is_down, _is_slow])
async def test_whatever_goes_wrong_there_is_no_verdict(ask: object) -> None:
    judge = Judge(ask, timeout_s=0.01)  # type: ignore[arg-type]
    assert await judge.verdict("Is it?", namespace="n", priority=0) is None
