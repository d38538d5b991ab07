"""The decision: rules, then two calibrated probabilities, then what being wrong would cost.

A tier's expected cost is what it costs now plus, for each thing the request may need and the tier
lacks, the probability of needing it times what lacking it costs:

    minimal   seconds + P(tools) * tools_s + P(context) * context_s + P(depth) * depth_s
    standard  seconds                      + P(context) * context_s + P(depth) * depth_s / 2
    full      seconds

The least expected cost wins, so the threshold on a probability is (difference of seconds) / (cost
of lacking), and moves with what is warm. See docs/router.md for the figures this gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from keepwarm.router.catalog import NO_TOOLS, Catalog
from keepwarm.router.config import DEFAULT_COSTS, RouterConfig
from keepwarm.router.features import Seen, look, meet
from keepwarm.router.model import Weights
from keepwarm.router.rules import P_NOTHING, Ruling, rulings, without_tier_words
from keepwarm.router.types import (
    FULL,
    MINIMAL,
    STANDARD,
    TIERS,
    Contribution,
    Decision,
    MissCosts,
    Reason,
    RouteRequest,
    TierCost,
)
from keepwarm.router.words import seen

#: Where nothing is on offer a tool can't be needed; not 0, so that logarithms stay finite.
P_NOTHING_ON_OFFER: Final = 0.002
#: What is assumed of a request in a language whose words the features don't know.
P_FOREIGN: Final = 0.3
#: How far such a request's score is replaced by the assumption.
FOREIGN_SHRINK: Final = 0.7
_OF_CONVERSATION: Final = (Reason.TOOL_HISTORY, Reason.FORCED_TOOL, Reason.CONVERSATION)
#: Contributions told with a decision.
TOLD: Final = 8


@dataclass(frozen=True, slots=True)
class Scores:
    """The probabilities behind a decision. `context` and `depth` make up `p_context`."""

    tools: float
    context: float
    depth: float
    logits: Mapping[str, float]
    contributions: tuple[Contribution, ...] = ()
    best_tool: str | None = None

    @property
    def p_context(self) -> float:
        """P(needs context or depth), as if the two were independent."""
        return 1.0 - (1.0 - self.context) * (1.0 - self.depth)


def _told(score: str, found: list[tuple[str, float, float]]) -> list[Contribution]:
    return [Contribution(score, *each) for each in found[:TOLD]]


def _towards(p: float, assumed: float, share: float) -> float:
    return p + share * (assumed - p)


def score(request: Seen, catalog: Catalog, weights: Weights, *, explain: bool = False) -> Scores:
    """The probabilities of a request against a catalog, and with `explain` what moved them."""
    logits: dict[str, float] = {}
    told: list[Contribution] = []
    met = meet(request, catalog, weights.words) if catalog.tools else None
    values = {**request.values, **met.values} if met else request.values
    p_tools = P_NOTHING_ON_OFFER
    # The tiers' own tools (a shell, the web) do more than their words say: then what the request
    # asks for is evidence by itself.
    names = (["tools_offered"] if met else []) + (["tools_open"] if catalog.is_open else [])
    if names:
        said = {name: weights.scores[name].logit(values) for name in names}
        name = max(said, key=lambda each: said[each])
        logits["tools"] = said[name]
        p = weights.probability("tools", said[name])
        p_tools = _towards(p, max(p, P_FOREIGN), FOREIGN_SHRINK * request.foreign)
        if explain:
            told += _told("tools", weights.scores[name].contributions(values))
    for name in ("context", "depth"):
        logits[name] = weights.scores[name].logit(request.values)
        if explain:
            told += _told(name, weights.scores[name].contributions(request.values))
    told.sort(key=lambda each: -abs(each.logits))
    return Scores(
        tools=p_tools,
        context=weights.probability("context", logits["context"]),
        depth=weights.probability("depth", logits["depth"]),
        logits=logits,
        contributions=tuple(told[:TOLD]),
        best_tool=met.best_tool if met else None,
    )


def ruled(scores: Scores, found: Sequence[Ruling], *, tools_on_offer: bool) -> Scores:
    """The scores with what rules know better."""
    tools, context = scores.tools, scores.context
    for each in found:
        bound = min if each.is_final else max
        if each.tools is not None and tools_on_offer:
            tools = bound(tools, each.tools)
        if each.context is not None:
            context = bound(context, each.context)
    depth = P_NOTHING if any(each.is_final and each.context for each in found) else scores.depth
    return replace(scores, tools=tools, context=context, depth=depth)


def expected_costs(
    scores: Scores, seconds: Mapping[str, float], missing: MissCosts
) -> dict[str, float]:
    """Expected seconds of each tier on offer, smallest tier first."""
    lacking = {
        MINIMAL: scores.tools * missing.tools_s
        + scores.context * missing.context_s
        + scores.depth * missing.depth_s,
        STANDARD: scores.context * missing.context_s + scores.depth * missing.depth_s / 2,
        FULL: 0.0,
    }
    return {
        tier: seconds[tier] + TIERS.index(tier) * missing.step_s + lacking[tier]
        for tier in TIERS
        if tier in seconds
    }


def doubt_s(
    scores: Scores, seconds: Mapping[str, float], expected: Mapping[str, float], missing: MissCosts
) -> float:
    """What knowing what a request needs would save on average: the least expected cost against
    the tier that fits in each case, which costs its own seconds and nothing else.
    """
    own = {each: seconds[each] + TIERS.index(each) * missing.step_s for each in expected}
    minimal, standard, full = (own[_on_offer(each, expected)] for each in TIERS)
    context = scores.p_context
    fitting = context * full + (1.0 - context) * (
        scores.tools * standard + (1.0 - scores.tools) * minimal
    )
    return max(min(expected.values()) - fitting, 0.0)


def _on_offer(tier: str, expected: Mapping[str, float]) -> str:
    """The tier, or where the deployment doesn't have it the next larger, or the largest."""
    larger = [each for each in expected if TIERS.index(each) >= TIERS.index(tier)]
    return larger[0] if larger else next(reversed(list(expected)))


def _by_scores(
    scores: Scores, seconds: Mapping[str, float], config: RouterConfig
) -> tuple[str, Reason, dict[str, float]]:
    expected = expected_costs(scores, seconds, config.costs)
    tier = min(expected, key=lambda each: expected[each])
    if tier == MINIMAL:
        return tier, Reason.SIMPLE if "tools" in scores.logits else Reason.NO_TOOLS, expected
    missing = config.costs
    needs = {
        Reason.NEEDS_TOOLS: scores.tools * missing.tools_s,
        Reason.NEEDS_CONTEXT: scores.context * missing.context_s,
        Reason.NEEDS_DEPTH: scores.depth * missing.depth_s,
    }
    # Lacking tools is what speaks against minimal, and nothing else: standard has them.
    if tier == FULL and STANDARD in expected:
        del needs[Reason.NEEDS_TOOLS]
    smaller = [each for each in expected if TIERS.index(each) < TIERS.index(tier)]
    if smaller and all(seconds[each] >= seconds[tier] for each in smaller):
        return tier, Reason.CHEAPEST_NOW, expected
    if tier == STANDARD and max(scores.tools, scores.context, scores.depth) < 0.5:
        return _on_offer(config.unsure_tier, expected), Reason.UNSURE, expected
    return tier, max(needs, key=lambda each: needs[each]), expected


def _decided(
    tier: str, reason: Reason, scores: Scores, expected: dict[str, float], *, detail: str = ""
) -> Decision:
    return Decision(
        tier=tier,
        reason=reason,
        p_tools=scores.tools,
        p_context=scores.p_context,
        detail=detail,
        contributions=scores.contributions,
        expected_s=expected,
        logits=scores.logits,
    )


def route(
    request: RouteRequest,
    catalog: Catalog,
    costs: Sequence[TierCost],
    config: RouterConfig,
    weights: Weights,
    *,
    explain: bool = False,
) -> Decision:
    """The tier for a request, and why. Total: any text gives a decision; `explain` adds what moved
    the scores.

    `costs` are the tiers this deployment has and what each costs now; empty means the usual ones.
    Callers leave requests alone that bring their own system prompt (`RouteRequest.is_left_alone`).
    """
    if request.forbids_tools:
        catalog = NO_TOOLS
    seconds = {each.tier: each.seconds for each in costs if each.tier in TIERS}
    if not seconds:
        seconds = {each.tier: each.seconds for each in DEFAULT_COSTS}
    text, removed = without_tier_words(seen(request.text))
    looked = look(text, tier_words_removed=removed)
    found = rulings(request, looked, config.rules)
    scores = score(looked, catalog, weights, explain=explain)
    scores = ruled(scores, found, tools_on_offer="tools" in scores.logits)
    tier, reason, expected = _by_scores(scores, seconds, config)
    if request.explicit_tier is not None:
        return _decided(request.explicit_tier, Reason.EXPLICIT, scores, expected)
    final = next((each for each in found if each.is_final), None)
    # What a final rule says still isn't less than what the conversation has already.
    floors = [each for each in found if not each.is_final and final is None] or [
        each for each in found if each is final or each.reason in _OF_CONVERSATION
    ]
    top = max(floors, key=lambda each: TIERS.index(each.tier), default=None)
    if top is not None and (final or TIERS.index(top.tier) >= TIERS.index(tier)):
        placed = _on_offer(top.tier, expected)
        return _decided(placed, top.reason, scores, expected, detail=top.detail)
    detail = scores.best_tool or "" if reason is Reason.NEEDS_TOOLS else ""
    decided = _decided(tier, reason, scores, expected, detail=detail)
    return replace(
        decided,
        doubt_s=doubt_s(scores, seconds, expected, config.costs),
        floor=top.tier if top is not None else None,
    )
