"""The decision: rules, then two calibrated probabilities, then what being wrong would cost.

A tier's expected cost is what it costs now plus, for each thing the request may need and the tier
lacks, the probability of needing it times what lacking it costs:

    minimal   seconds + P(tools) * tools_s + P(context) * context_s + P(depth) * depth_s
    standard  seconds                      + P(context) * context_s + P(depth) * depth_s / 2
    full      seconds

The least expected cost wins, so the threshold on a probability is (difference of seconds) / (cost of
lacking), and moves with what is warm. See docs/router.md for the figures this gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from keepwarm.router.catalog import Catalog
from keepwarm.router.config import DEFAULT_COSTS, RouterConfig
from keepwarm.router.features import Met, Seen, look, meet
from keepwarm.router.model import Weights, sigmoid
from keepwarm.router.rules import Ruling, rulings, without_tier_words
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

#: Where nothing is on offer a tool can't be needed; not 0, so that logarithms stay finite.
P_NOTHING_ON_OFFER: Final = 0.002
#: What is assumed of a request in a language whose words the features don't know.
P_FOREIGN: Final = 0.3
#: How far such a request's score is replaced by the assumption.
FOREIGN_SHRINK: Final = 0.7
#: Contributions told with a decision.
TOLD: Final = 8


@dataclass(frozen=True, slots=True)
class Scores:
    """The probabilities behind a decision. `context` and `depth` make up `p_context`."""

    tools: float
    context: float
    depth: float
    contributions: tuple[Contribution, ...] = ()
    best_tool: str | None = None

    @property
    def p_context(self) -> float:
        """P(needs context or depth), as if the two were independent."""
        return 1.0 - (1.0 - self.context) * (1.0 - self.depth)


def _told(score: str, found: list[tuple[str, float, float]]) -> list[Contribution]:
    return [Contribution(score, *each) for each in found[:TOLD]]


def _tools_score(
    request: Seen, met: Met | None, catalog: Catalog, weights: Weights
) -> tuple[float, str | None, Mapping[str, float]]:
    """P(needs tools), the score that said so, and its features."""
    if catalog.is_known and met is None:
        return P_NOTHING_ON_OFFER, None, {}
    values = {**request.values, **met.values} if met else request.values
    names = (["tools_offered"] if met else []) + (["tools_open"] if catalog.is_own else [])
    name = max(names, key=lambda each: weights.scores[each].logit(values))
    p = sigmoid(weights.scores[name].logit(values))
    shrink = FOREIGN_SHRINK * request.foreign
    return p + shrink * (max(p, P_FOREIGN) - p), name, values


def score(request: Seen, catalog: Catalog, weights: Weights) -> Scores:
    """The probabilities of a request against a catalog, with what moved them."""
    met = meet(request, catalog, weights.words) if catalog.tools else None
    p_tools, name, values = _tools_score(request, met, catalog, weights)
    told: list[Contribution] = []
    if name is not None:
        told += _told("tools", weights.scores[name].contributions(values))
    for each in ("context", "depth"):
        told += _told(each, weights.scores[each].contributions(request.values))
    told.sort(key=lambda each: -abs(each.logits))
    return Scores(
        tools=p_tools,
        context=sigmoid(weights.scores["context"].logit(request.values)),
        depth=sigmoid(weights.scores["depth"].logit(request.values)),
        contributions=tuple(told[:TOLD]),
        best_tool=met.best_tool if met else None,
    )


def expected_costs(
    scores: Scores, costs: Sequence[TierCost], missing: MissCosts
) -> dict[str, float]:
    """Expected seconds of each tier on offer, smallest tier first."""
    known = {each.tier: each.seconds for each in costs if each.tier in TIERS}
    if not known:
        known = {each.tier: each.seconds for each in DEFAULT_COSTS}
    lacking = {
        MINIMAL: scores.tools * missing.tools_s
        + scores.context * missing.context_s
        + scores.depth * missing.depth_s,
        STANDARD: scores.context * missing.context_s + scores.depth * missing.depth_s / 2,
        FULL: 0.0,
    }
    return {
        tier: known[tier] + TIERS.index(tier) * missing.step_s + lacking[tier]
        for tier in TIERS
        if tier in known
    }


def _on_offer(tier: str, expected: Mapping[str, float]) -> str:
    """The tier, or where the deployment doesn't have it the next larger, or the largest."""
    larger = [each for each in expected if TIERS.index(each) >= TIERS.index(tier)]
    return larger[0] if larger else next(reversed(list(expected)))


def _by_scores(
    scores: Scores, catalog: Catalog, costs: Sequence[TierCost], config: RouterConfig
) -> tuple[str, Reason, dict[str, float]]:
    expected = expected_costs(scores, costs, config.costs)
    tier = min(expected, key=lambda each: expected[each])
    missing = config.costs
    if tier == MINIMAL:
        return tier, Reason.SIMPLE if catalog.tools else Reason.NO_TOOLS, expected
    # Which need made the smaller tiers dear; none of them did if a larger one is simply warmer.
    needs = {
        Reason.NEEDS_TOOLS: scores.tools * missing.tools_s,
        Reason.NEEDS_CONTEXT: scores.context * missing.context_s,
        Reason.NEEDS_DEPTH: scores.depth * missing.depth_s,
    }
    reason = max(needs, key=lambda each: needs[each])
    seconds = {each.tier: each.seconds for each in costs}
    smaller = [each for each in expected if TIERS.index(each) < TIERS.index(tier)]
    if all(seconds.get(each, 0.0) >= seconds.get(tier, 0.0) for each in smaller) and smaller:
        return tier, Reason.CHEAPEST_NOW, expected
    top = max(scores.tools, scores.context, scores.depth)
    if top < 0.5 and tier == STANDARD:
        return _on_offer(config.unsure_tier, expected), Reason.UNSURE, expected
    return tier, reason, expected


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
    )


def route(
    request: RouteRequest,
    catalog: Catalog,
    costs: Sequence[TierCost],
    config: RouterConfig,
    weights: Weights,
) -> Decision:
    """The tier for a request, and why. Total: any text gives a decision.

    `costs` are the tiers this deployment has and what each costs now; empty means the usual ones.
    Callers leave requests alone that bring their own system prompt (`RouteRequest.is_left_alone`).
    """
    if request.forbids_tools:
        catalog = Catalog(tools=(), index={})
    text, removed = without_tier_words(request.text)
    seen = look(text, tier_words_removed=removed)
    scores = score(seen, catalog, weights)
    tier, reason, expected = _by_scores(scores, catalog, costs, config)
    if request.explicit_tier is not None:
        return _decided(request.explicit_tier, Reason.EXPLICIT, scores, expected)
    found = rulings(request, seen, config.rules)
    final = next((each for each in found if each.is_final), None)
    if final is not None:
        tier, reason = final.tier, final.reason
    floors = [each for each in found if not each.is_final] + ([final] if final else [])
    top: Ruling | None = max(floors, key=lambda each: TIERS.index(each.tier), default=None)
    if top is not None and (top is final or TIERS.index(top.tier) >= TIERS.index(tier)):
        detail = top.detail
        return _decided(_on_offer(top.tier, expected), top.reason, scores, expected, detail=detail)
    detail = scores.best_tool or "" if reason is Reason.NEEDS_TOOLS else ""
    return _decided(tier, reason, scores, expected, detail=detail)
