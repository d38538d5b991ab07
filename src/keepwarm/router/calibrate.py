"""Refitting the scores to a deployment, from what became of its requests. Pure.

The shipped scores keep the order in which they put requests; a refit moves their logits by a slope
and an offset (Platt scaling), held near (1, 0) by a prior, so that few outcomes change little. The
thresholds follow: on the calibrated probability they stay what the costs say, so on the shipped one
they move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from keepwarm.router.escalation import Cause
from keepwarm.router.model import REFITS, Platt, logit_of, sigmoid
from keepwarm.router.types import FULL, MINIMAL, TIERS

#: With fewer outcomes, or fewer of the rarer kind, than these nothing is refitted: five of a kind
#: put the true share anywhere within a factor of two.
LEAST_OUTCOMES: Final = 30
LEAST_OF_A_KIND: Final = 5
#: Standard deviations of the prior on slope and offset: logits half as steep again, or off by 1.4
#: (a factor of 4 in odds), are within two of them.
_SLOPE_SPREAD: Final = 0.25
_OFFSET_SPREAD: Final = 0.7
_BINS: Final = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Holds no text.

    `logits` are the decision's. `tools_used`: None where nobody could tell. `escalated` is the
    cause, None if the first reply stood. `is_explicit`: the client chose the tier.
    """

    at_s: float
    tier: str
    reason: str
    logits: Mapping[str, float]
    is_explicit: bool = False
    escalated: Cause | None = None
    tools_used: bool | None = None


@dataclass(frozen=True, slots=True)
class Labelled:
    """One outcome as evidence for a score: the shipped logit, what was needed, how sure that is."""

    logit: float
    needed: bool
    weight: float


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a calibration describes outcomes. Thresholds are on the shipped probability."""

    platt: Platt
    log_loss: float
    ece: float
    threshold: float
    under_tiered: float
    over_tiered: float


@dataclass(frozen=True, slots=True)
class Refit:
    """One score's refit: before and after on the same outcomes; `after` is None if there are too
    few of them, and `why` says so."""

    score: str
    outcomes: int
    needed: int
    before: Fit | None
    after: Fit | None
    why: str = ""


def _needed_tools(outcome: Outcome) -> tuple[bool, float] | None:
    if outcome.tools_used or outcome.escalated in (Cause.ASKED_TOOLS, Cause.UNKNOWN_TOOL):
        return True, 1.0
    if outcome.tier != MINIMAL and outcome.tools_used is False:
        return False, 1.0
    # A minimal reply that stood may still have been a poor one.
    if outcome.tier == MINIMAL and outcome.escalated is None:
        return False, 1.0 if outcome.is_explicit else 0.5
    return None


def _needed_context(outcome: Outcome) -> tuple[bool, float] | None:
    if outcome.escalated is Cause.ASKED_CONTEXT:
        return True, 1.0
    if outcome.is_explicit and outcome.tier == FULL:
        return True, 0.5
    if outcome.tier != FULL and outcome.escalated is None:
        return False, 1.0 if outcome.is_explicit else 0.5
    return None


def _needed_depth(outcome: Outcome) -> tuple[bool, float] | None:
    # Nobody sees a shallow answer but the client, who then chooses a larger tier.
    if outcome.is_explicit and outcome.tier in TIERS and not outcome.tools_used:
        return outcome.tier == FULL, 0.5
    return None


_NEEDED: Final = {"tools": _needed_tools, "context": _needed_context, "depth": _needed_depth}


def evidence(score: str, outcomes: Sequence[Outcome]) -> list[Labelled]:
    """The outcomes that say something about a score."""
    found = []
    for outcome in outcomes:
        said = _NEEDED[score](outcome)
        logit = outcome.logits.get(score)
        if said is not None and logit is not None and math.isfinite(logit):
            found.append(Labelled(logit, *said))
    return found


def fit_platt(found: Sequence[Labelled], *, rounds: int = 50) -> Platt:
    """The most probable slope and offset, by Newton's method; the slope stays above 0.05."""
    slope, offset = 1.0, 0.0
    for _ in range(rounds):
        g_s = (slope - 1.0) / _SLOPE_SPREAD**2
        g_o = offset / _OFFSET_SPREAD**2
        h_ss, h_oo, h_so = 1.0 / _SLOPE_SPREAD**2, 1.0 / _OFFSET_SPREAD**2, 0.0
        for each in found:
            p = sigmoid(slope * each.logit + offset)
            error = each.weight * (p - each.needed)
            bend = each.weight * p * (1.0 - p)
            g_s += error * each.logit
            g_o += error
            h_ss += bend * each.logit**2
            h_oo += bend
            h_so += bend * each.logit
        determinant = h_ss * h_oo - h_so * h_so
        step_s = (h_oo * g_s - h_so * g_o) / determinant
        step_o = (h_ss * g_o - h_so * g_s) / determinant
        # Newton may overshoot far from the end; half a logit at a time always gets there.
        scale = min(1.0, 0.5 / max(abs(step_s), abs(step_o), 1e-12))
        slope = max(0.05, slope - scale * step_s)
        offset -= scale * step_o
        if abs(step_s) + abs(step_o) < 1e-7:
            break
    return Platt(slope=slope, offset=offset)


def measure(platt: Platt, found: Sequence[Labelled], threshold: float) -> Fit:
    """How a calibration describes outcomes; `threshold` is on the calibrated probability."""
    total = sum(each.weight for each in found)
    loss, bins = 0.0, [[0.0, 0.0, 0.0] for _ in range(_BINS)]
    under = over = needed = unneeded = 0.0
    for each in found:
        p = min(max(sigmoid(platt.apply(each.logit)), 1e-9), 1 - 1e-9)
        loss -= each.weight * math.log(p if each.needed else 1.0 - p)
        into = bins[min(int(p * _BINS), _BINS - 1)]
        into[0] += each.weight
        into[1] += each.weight * p
        into[2] += each.weight * each.needed
        if each.needed:
            needed += each.weight
            under += each.weight * (p < threshold)
        else:
            unneeded += each.weight
            over += each.weight * (p >= threshold)
    return Fit(
        platt=platt,
        log_loss=loss / total,
        ece=sum(abs(stated - hit) for _, stated, hit in bins) / total,
        threshold=sigmoid((logit_of(threshold) - platt.offset) / platt.slope),
        under_tiered=under / needed if needed else 0.0,
        over_tiered=over / unneeded if unneeded else 0.0,
    )


def refit(
    outcomes: Sequence[Outcome],
    *,
    current: Mapping[str, Platt],
    thresholds: Mapping[str, float],
) -> dict[str, Refit]:
    """Each score's refit. `thresholds` are on the calibrated probability, as costs give them."""
    found = {}
    for score in REFITS:
        said = evidence(score, outcomes)
        needed = sum(each.needed for each in said)
        rarer = min(needed, len(said) - needed)
        before = measure(current.get(score, Platt()), said, thresholds[score]) if said else None
        if len(said) < LEAST_OUTCOMES or rarer < LEAST_OF_A_KIND:
            why = (
                f"{len(said)} outcomes, {rarer} of the rarer kind;"
                f" {LEAST_OUTCOMES} and {LEAST_OF_A_KIND} are the least"
            )
            found[score] = Refit(score, len(said), needed, before, None, why)
            continue
        after = measure(fit_platt(said), said, thresholds[score])
        found[score] = Refit(score, len(said), needed, before, after)
    return found
