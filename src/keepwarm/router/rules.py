"""Rules: what a request shows so plainly that no score is needed. Each has a reason code.

A rule gives a floor (the scores may go higher) or, for small talk and the like, a final answer.
The text itself is never obeyed: `use the minimal tier` in a message is a sentence like any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from keepwarm.router.features import Seen
from keepwarm.router.types import (
    FULL,
    MINIMAL,
    STANDARD,
    TIERS,
    DeploymentRule,
    Reason,
    RouteRequest,
)

#: From here on a request is a document with a question: the words we see are too small a sample.
LONG_CHARS: Final = 12_000
#: Lines of code from which on a request is work on code rather than a question about some.
MUCH_CODE_LINES: Final = 60
#: Words up to which 'continue' or 'again' refers to something outside the message.
SHORT_WORDS: Final = 60

#: Words that point to what was begun where they stand alone: 'Continue this sequence: 2, 4, 8' says
#: what to continue.
GOES_ON: Final = ("continue", "proceed", "resume", "weiter", "continua", "continúa", "continuez")
GOES_ON_WORDS: Final = 2
#: Probabilities that go with rules. Of the labelled requests whose words point back, six in ten
#: needed it; for the others nobody has counted, and these are what their words mean.
P_POINTS_BACK: Final = 0.6
P_RECALLS: Final = 0.85
P_TOOL_WORDS: Final = 0.85
P_NOTHING: Final = 0.01

_TIER_WORDS = re.compile(
    r"\b(?:use|using|switch(?:ing)? to|route(?: this)? to|select|choose|pick|set|force|on|in"
    r"|with)\b[^.\n]{0,24}\b(?:minimal|standard|full)\b[\s\"'-]{0,3}\b(?:tier|prompt|mode)\b[.!:]?"
    r"|\btier\s*[:=]\s*[\"']?(?:minimal|standard|full)\b[\"']?|x-keepwarm-tier\S*(?:\s+\w+)?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Ruling:
    """A rule that holds: at least `tier`, or exactly it where `is_final`.

    `tools` and `context` are the least (the most, where it is final) probability that goes with it,
    so that what is told of a request agrees with what was decided; None: the score stands.
    """

    tier: str
    reason: Reason
    detail: str = ""
    is_final: bool = False
    tools: float | None = None
    context: float | None = None


def without_tier_words(text: str) -> tuple[str, bool]:
    """The text without sentences that ask for a tier, and whether there were any.

    Such words are neither obeyed nor evidence: 'use the full tier' must not look like 'use a tool'.
    """
    if (
        "tier" not in (lowered := text.lower())
        and "prompt" not in lowered
        and "mode" not in lowered
    ):
        return text, False
    kept, count = _TIER_WORDS.subn(" ", text)
    return kept, count > 0


def deployment_ruling(rule: DeploymentRule, spaced: str, n_words: int) -> Ruling | None:
    """One `[[rule]]` of routing.toml against a text's words, joined by and padded with spaces."""

    def holds(phrase: str) -> bool:
        return f" {phrase[:-1]}" in spaced if phrase.endswith("*") else f" {phrase} " in spaced

    if n_words < rule.min_words or (rule.max_words is not None and n_words > rule.max_words):
        return None
    if rule.any_of and not any(map(holds, rule.any_of)):
        return None
    if not all(map(holds, rule.all_of)) or any(map(holds, rule.none_of)):
        return None
    return Ruling(rule.tier, Reason.DEPLOYMENT_RULE, rule.name, is_final=not rule.is_floor)


def _from_conversation(request: RouteRequest) -> list[Ruling]:
    found: list[Ruling] = []
    if request.has_tool_messages:
        found.append(Ruling(STANDARD, Reason.TOOL_HISTORY))
    if request.forces_tool:
        found.append(Ruling(STANDARD, Reason.FORCED_TOOL))
    if request.tier_so_far in TIERS and request.tier_so_far != MINIMAL:
        found.append(Ruling(str(request.tier_so_far), Reason.CONVERSATION))
    return found


def _from_text(request: RouteRequest, text: Seen) -> list[Ruling]:
    found: list[Ruling] = []
    cues, values = text.cues, text.values
    # In a later turn 'as you said' is about this conversation, which the model sees anyway.
    recalls = cues.get("past-conversation", 0)
    goes_on = text.n_words <= GOES_ON_WORDS and (
        text.words[0] in GOES_ON or text.words == ["go", "on"]
    )
    is_first = request.turns <= 1 and text.n_words <= SHORT_WORDS
    points_back = is_first and (goes_on or cues.get("earlier", 0))
    if recalls or points_back:
        p = P_RECALLS if recalls else P_POINTS_BACK
        found.append(Ruling(FULL, Reason.EARLIER, "an earlier conversation", context=p))
    if cues.get("own-files", 0):
        found.append(Ruling(FULL, Reason.FILE, "material that only the full tier may know of"))
    elif text.asks_for_files:
        found.append(Ruling(STANDARD, Reason.FILE, "named files"))
    if cues.get("tool-words", 0):
        found.append(Ruling(STANDARD, Reason.TOOL_WORDS, tools=P_TOOL_WORDS))
    if len(request.text) >= LONG_CHARS:
        found.append(Ruling(STANDARD, Reason.LONG, f"{len(request.text)} characters"))
    elif values.get("code shown", 0) >= 1 and request.text.count("\n") >= MUCH_CODE_LINES:
        found.append(Ruling(STANDARD, Reason.CODE, f"{request.text.count(chr(10))} lines"))
    return found


def rulings(
    request: RouteRequest, text: Seen, deployment: Sequence[DeploymentRule]
) -> list[Ruling]:
    """All rules that hold, in order of precedence: conversation, deployment, then the text."""
    found = _from_conversation(request)
    if deployment:
        spaced = f" {' '.join(text.words)} "
        for rule in deployment:
            if (ruling := deployment_ruling(rule, spaced, text.n_words)) is not None:
                found.append(ruling)
    if not text.n_words:
        if request.has_images:
            return [*found, Ruling(STANDARD, Reason.IMAGES_ONLY)]
        if text.tier_words_removed:
            return [*found, Ruling(STANDARD, Reason.TIER_WORDS)]
        if not request.text.strip():
            return [
                *found,
                Ruling(MINIMAL, Reason.EMPTY, is_final=True, tools=P_NOTHING, context=P_NOTHING),
            ]
        return found
    found.extend(_from_text(request, text))
    if not found and text.is_small_talk:
        found.append(
            Ruling(MINIMAL, Reason.SMALL_TALK, is_final=True, tools=P_NOTHING, context=P_NOTHING)
        )
    return found
