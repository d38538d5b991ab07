"""The decision: rules, then two calibrated probabilities, then what each tier would cost.

A tier's expected cost, in seconds, is

1. what it costs if it is the right one: the time to the first token, the reply's expected tokens
   times what a token costs behind that prompt, and what its KV state displaces;
2. for each thing that the request may need and the tier lacks: the probability times what lacking
   it costs. That is a useless answer, or, where the model says itself that it lacks something, one
   short reply and the larger tier;
3. for what the tier has and the request doesn't need: the share of answers that it spoils.

The least sum wins, so no threshold is stored, and what is warm counts for what it is worth. See
docs/router.md for the figures this gives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from keepwarm.router.catalog import NO_TOOLS, ToolCatalog
from keepwarm.router.config import DEFAULT_COSTS, RouterConfig
from keepwarm.router.features import Seen, look, meet
from keepwarm.router.model import Weights, sigmoid
from keepwarm.router.replies import USUAL_REPLY_TOKENS, task_kind
from keepwarm.router.rules import P_NOTHING, Ruling, rulings, without_tier_words
from keepwarm.router.types import (
    FULL,
    MINIMAL,
    STANDARD,
    TIERS,
    Contribution,
    Decision,
    ExpectedCost,
    MissCosts,
    Reason,
    RouteRequest,
    TierCost,
)
from keepwarm.router.words import seen

#: Where nothing is on offer a tool can't be needed; not 0, so that logarithms stay finite.
P_NOTHING_ON_OFFER: Final = 0.002
#: What is assumed of a request in a language whose words the features don't know.
P_FOREIGN: Final = 0.4
#: How far such a request's score is replaced by the assumption.
FOREIGN_SHRINK: Final = 0.7
_OF_CONVERSATION: Final = (Reason.TOOL_HISTORY, Reason.FORCED_TOOL, Reason.CONVERSATION)
#: Tools that do everything have words in common with every request: what these say counts less
#: (logits; on sources not learned from, the value from 0 to 3.5 that parts the requests best).
OPEN_DOUBT: Final = 2.5
#: Tokens of the line by which a model asks for more.
ESCALATION_TOKENS: Final = 8
#: Contributions told with a decision.
TOLD: Final = 8


@dataclass(frozen=True, slots=True)
class Scores:
    """The probabilities behind a decision. `context` and `depth` make up `p_context`."""

    tools: float
    context: float
    depth: float
    tools_on_offer: bool
    contributions: tuple[Contribution, ...] = ()
    best_tool: str | None = None

    @property
    def p_context(self) -> float:
        """P(needs context or depth), as if the two were independent."""
        return 1.0 - (1.0 - self.context) * (1.0 - self.depth)


def _told(score: str, found: list[tuple[str, float, float]]) -> list[Contribution]:
    return [Contribution(score, *each) for each in found[:TOLD]]


def score(
    request: Seen, catalog: ToolCatalog, weights: Weights, *, explain: bool = False
) -> Scores:
    """The probabilities of a request against a catalog, and with `explain` what moved them."""
    told: list[Contribution] = []
    met = meet(request, catalog, weights.words) if catalog.tools else None
    values = {**request.values, **met.values} if met else request.values

    def logit(name: str) -> float:
        return weights.scores[name].logit(values, request.grams, request.gram_share)

    def tell(score: str, name: str) -> None:
        found = weights.scores[name].contributions(values, request.grams, request.gram_share)
        told.extend(_told(score, found))

    p_tools = P_NOTHING_ON_OFFER
    # The tiers' own tools (a shell, the web) do more than their words say: then what the request
    # asks for is evidence by itself.
    names = (["tools_offered"] if met else []) + (["tools_open"] if catalog.is_open else [])
    if names:
        said = {name: logit(name) for name in names}
        if len(said) > 1:
            said["tools_offered"] -= OPEN_DOUBT
        name = max(said, key=lambda each: said[each])
        p_tools = sigmoid(said[name])
        if name == "tools_offered":
            # A foreign request has few words in common with any tool.
            p_tools += FOREIGN_SHRINK * request.foreign * (max(p_tools, P_FOREIGN) - p_tools)
        if explain:
            tell("tools", name)
    p = {name: sigmoid(logit(name)) for name in ("context", "depth")}
    if explain:
        tell("context", "context")
        tell("depth", "depth")
    told.sort(key=lambda each: -abs(each.logits))
    return Scores(
        tools=p_tools,
        context=p["context"],
        depth=p["depth"],
        tools_on_offer=bool(names),
        contributions=tuple(told[:TOLD]),
        best_tool=met.best_tool if met else None,
    )


def ruled(scores: Scores, found: Sequence[Ruling]) -> Scores:
    """The scores with what rules know better."""
    tools, context = scores.tools, scores.context
    for each in found:
        bound = min if each.is_final else max
        if each.tools is not None and scores.tools_on_offer:
            tools = bound(tools, each.tools)
        if each.context is not None:
            context = bound(context, each.context)
    depth = P_NOTHING if any(each.is_final and each.context for each in found) else scores.depth
    return replace(scores, tools=tools, context=context, depth=depth)


def expected_costs(
    scores: Scores, costs: Mapping[str, TierCost], missing: MissCosts, reply_tokens: float
) -> dict[str, ExpectedCost]:
    """The expected cost of each tier on offer, smallest tier first."""
    own = {tier: costs[tier].total_s(reply_tokens) for tier in TIERS if tier in costs}

    def again_s(tier: str, up: str) -> float:
        """What it costs more that a tier says itself that it is too small."""
        return costs[tier].total_s(ESCALATION_TOKENS) + own[_on_offer(up, own)] - own[tier]

    def lacking_s(tier: str, up: str, told: float, useless_s: float) -> float:
        return told * max(again_s(tier, up), 0.0) + (1.0 - told) * useless_s

    # Who needs context could do with a tool that recalls it, so what needs either is the larger.
    context, something = scores.context, max(scores.tools, scores.context)
    found = {}
    for tier in own:
        # 1. What it lacks. Minimal has no tool that could recall what it was never told.
        risk_s = 0.0
        if tier == MINIMAL:
            tools_s = lacking_s(tier, STANDARD, missing.tools_told, missing.tools_s)
            context_s = lacking_s(tier, FULL, missing.context_told, missing.tools_s)
            risk_s += (something - context) * tools_s + context * context_s
            risk_s += scores.depth * missing.depth_s
        elif tier == STANDARD:
            risk_s += context * lacking_s(tier, FULL, missing.context_told, missing.context_s)
            risk_s += scores.depth * missing.depth_s / 2
        # 2. What it has and shouldn't.
        if tier != MINIMAL:
            risk_s += (1.0 - something) * missing.spoiled * missing.tools_s
        cost = costs[tier]
        found[tier] = ExpectedCost(
            cost.first_s, cost.reply_s(reply_tokens), cost.displaced_s, risk_s
        )
    return found


def _on_offer(tier: str, offered: Collection[str]) -> str:
    """The tier, or where the deployment doesn't have it the next larger, or the largest."""
    larger = [each for each in offered if TIERS.index(each) >= TIERS.index(tier)]
    return larger[0] if larger else max(offered, key=TIERS.index)


def _by_scores(
    scores: Scores, expected: Mapping[str, ExpectedCost], config: RouterConfig
) -> tuple[str, Reason]:
    tier = min(expected, key=lambda each: expected[each].total_s)
    if tier == MINIMAL:
        return tier, Reason.SIMPLE if scores.tools_on_offer else Reason.NO_TOOLS
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
    if smaller and all(expected[each].own_s >= expected[tier].own_s for each in smaller):
        return tier, Reason.CHEAPEST_NOW
    if tier == STANDARD and max(scores.tools, scores.context, scores.depth) < 0.5:
        return _on_offer(config.unsure_tier, expected), Reason.UNSURE
    return tier, max(needs, key=lambda each: needs[each])


def route(
    request: RouteRequest,
    catalog: ToolCatalog,
    costs: Sequence[TierCost],
    config: RouterConfig,
    weights: Weights,
    *,
    reply_tokens: Mapping[str, float] = USUAL_REPLY_TOKENS,
    explain: bool = False,
) -> Decision:
    """The tier for a request, and why. Total: any text gives a decision; `explain` adds what moved
    the scores.

    `costs` are the tiers this deployment has and what each costs now; empty means the usual ones.
    `reply_tokens` are expected by kind of task. Callers leave requests alone that bring their own
    system prompt (`RouteRequest.is_left_alone`).
    """
    if request.forbids_tools:
        catalog = NO_TOOLS
    offered = {each.tier: each for each in costs if each.tier in TIERS}
    offered = offered or {each.tier: each for each in DEFAULT_COSTS}
    text, removed = without_tier_words(seen(request.text))
    looked = look(text, tier_words_removed=removed)
    found = rulings(request, looked, config.rules)
    scores = ruled(score(looked, catalog, weights, explain=explain), found)
    kind = task_kind(looked)
    tokens = reply_tokens[kind]
    expected = expected_costs(scores, offered, config.costs, tokens)
    tier, reason = _by_scores(scores, expected, config)
    decided = Decision(
        tier=tier,
        reason=reason,
        p_tools=scores.tools,
        p_context=scores.p_context,
        contributions=scores.contributions,
        costs=expected,
        kind=kind,
        reply_tokens=tokens,
    )
    if request.explicit_tier is not None:
        return replace(decided, tier=request.explicit_tier, reason=Reason.EXPLICIT)
    final = next((each for each in found if each.is_final), None)
    # What a final rule says still isn't less than what the conversation has already.
    floors = [each for each in found if not each.is_final and final is None] or [
        each for each in found if each is final or each.reason in _OF_CONVERSATION
    ]
    top = max(floors, key=lambda each: TIERS.index(each.tier), default=None)
    if top is not None and (final or TIERS.index(top.tier) >= TIERS.index(tier)):
        placed = _on_offer(top.tier, expected)
        return replace(decided, tier=placed, reason=top.reason, detail=top.detail)
    if reason is Reason.NEEDS_TOOLS:
        return replace(decided, detail=scores.best_tool or "")
    return decided
