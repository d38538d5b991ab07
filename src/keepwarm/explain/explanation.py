"""Why a request was as fast as it was: what was reused, and why the rest had to be prefilled.

Theory of operation. Two places matter in a prompt: where it parts from the nearest earlier one (see
`difference`), and how far the engine reused what it had (its own count). Tokens are cold for one of
two reasons:

1. They stand behind the place where the prompt parts from all that was seen. Then the difference
   itself names the cause.
2. They stand before it: they were computed once and weren't there any more, or weren't recognised.
   Then what happened since names the cause: an eviction, a restart, a template that renders
   old turns otherwise than it did when they were new.

The larger of the two is told, but mere new text only if nothing was lost. Places are known in
characters and counted in tokens, so within a tolerance they are taken for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keepwarm.core.plan import Source
from keepwarm.explain.difference import Cause, Difference

# The turn tokens of a template, and the one token that is always evaluated again.
_NOTHING_TOKENS = 12
# A place in tokens is interpolated from characters: good to a tenth, and to a block of 256.
_TOLERANCE_TOKENS = 64
_TOLERANCE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Nearest:
    """The earlier prompt that a request has most in common with.

    `difference` None: the request continues it. `sent_difference`: where the two agree
    canonically but were sent in another form. `reasoned`: its reply held reasoning. `same_engine`:
    the engine wasn't restarted since.
    """

    difference: Difference | None
    sent_difference: Difference | None = None
    reasoned: bool = False
    same_engine: bool = True


@dataclass(frozen=True, slots=True)
class ExplainedFacts:
    """What an explanation is made of; counts in tokens.

    `agrees_tokens` is where the prompt parts from `nearest`, or where `nearest` ends.
    `reach_tokens` is how much can be warm by that: more comes from elsewhere (a request at the same
    time, a snapshot), and then the difference explains nothing. `planned_tokens` is what the
    plan meant to reuse. `moved`: the last prompt that began like this was asked under another
    fingerprint, and these parts of it have changed; None if it wasn't. `known`: it isn't remembered
    but was asked before, and lost its warmth by this. `is_new_namespace`: its first request.
    `failed_restore` is the reason why a restore failed. `cuttable` as in `plan.Machine`.
    """

    source: Source
    cached_tokens: int
    prefilled_tokens: int
    filled_tokens: int
    planned_tokens: int
    agrees_tokens: int
    reach_tokens: int
    nearest: Nearest | None
    moved: tuple[str, ...] | None = None
    known: Cause | None = None
    is_new_namespace: bool = False
    failed_restore: str | None = None
    cuttable: bool = True

    @property
    def prompt_tokens(self) -> int:
        """The whole prompt."""
        return self.cached_tokens + self.prefilled_tokens

    @property
    def cold_tokens(self) -> int:
        """What was prefilled for this request, ahead of it or in it."""
        return min(self.prefilled_tokens + self.filled_tokens, self.prompt_tokens)

    @property
    def warm_tokens(self) -> int:
        """What was reused."""
        return self.prompt_tokens - self.cold_tokens


@dataclass(frozen=True, slots=True)
class Explanation:
    """`summary` is one sentence without any text of the prompt, `advice` what to do, or ''."""

    cause: Cause
    summary: str
    advice: str
    difference: Difference | None
    warm_tokens: int
    cold_tokens: int


def explain(facts: ExplainedFacts) -> Explanation:
    """Name the cause of a request's cold tokens."""
    cause, difference = _cause(facts)
    return Explanation(
        cause,
        _summary(facts, cause, difference),
        advice_for(cause),
        difference,
        facts.warm_tokens,
        facts.cold_tokens,
    )


def _cause(facts: ExplainedFacts) -> tuple[Cause, Difference | None]:
    nearest = facts.nearest
    if facts.cold_tokens <= _NOTHING_TOKENS:
        return Cause.NONE, None
    if nearest is None:
        return _unknown_cause(facts), None
    parts = nearest.difference
    is_new = parts is None or parts.cause is Cause.NEW_TEXT
    lost = facts.agrees_tokens - facts.warm_tokens
    behind = facts.prompt_tokens - facts.agrees_tokens
    is_lost = lost > tolerance(facts.agrees_tokens) and (is_new or lost >= behind)
    # What the slot held behind this prompt's own text (reasoning) can be lost without being in it.
    if is_lost or (parts is None and _is_mistaken(facts)):
        return _lost_cause(facts, nearest)
    if is_new and facts.moved is not None:
        return Cause.NEW_FINGERPRINT, None
    if parts is None or facts.warm_tokens > facts.reach_tokens:
        return Cause.NEW_TEXT, None
    return parts.cause, parts


def tolerance(tokens: int) -> float:
    """By how many tokens two places may differ and still be taken for one."""
    return _TOLERANCE_TOKENS + _TOLERANCE_SHARE * tokens


def _is_mistaken(facts: ExplainedFacts) -> bool:
    """Whether the engine reused less than the plan knew to be there."""
    return facts.planned_tokens - facts.cached_tokens > tolerance(facts.planned_tokens)


def _unknown_cause(facts: ExplainedFacts) -> Cause:
    """Why a prompt is cold that has nothing in common with any that is remembered."""
    if facts.failed_restore:
        return Cause.SNAPSHOT_FAILED
    if facts.moved is not None:
        return Cause.NEW_FINGERPRINT
    if facts.known:
        return facts.known
    return Cause.NEW_NAMESPACE if facts.is_new_namespace else Cause.FIRST_SEEN


def _lost_cause(facts: ExplainedFacts, nearest: Nearest) -> tuple[Cause, Difference | None]:
    """Why what agrees with an earlier prompt wasn't reused."""
    sent = nearest.sent_difference
    if facts.failed_restore:
        return Cause.SNAPSHOT_FAILED, None
    if not facts.cuttable and nearest.difference is not None and nearest.same_engine:
        # Where a saved end lies is an estimate, so a plan may have counted on one that isn't there.
        return Cause.ENDS_ONLY, nearest.difference
    if _is_mistaken(facts):
        # The plan knew the prefix, and the engine found other tokens in its place.
        if sent:
            return sent.cause, sent
        return (Cause.REASONING_DROPPED if nearest.reasoned else Cause.TEMPLATE_REWRITES), None
    if not nearest.same_engine:
        return Cause.ENGINE_RESTARTED, None
    return Cause.EVICTED, None


def tokens_at(chars: int, *, anchors: Mapping[int, int]) -> int:
    """The token at a place known in characters, interpolated between known places.

    Args:
        chars: the place.
        anchors: known places, characters to tokens; the prompt's end must be among them.
    """
    low, high = (0, 0), max(anchors.items())
    for at in sorted(anchors.items()):
        if at[0] <= chars:
            low = at
        elif at[0] < high[0]:
            high = at
    if high[0] <= low[0]:
        return low[1]
    share = (chars - low[0]) / (high[0] - low[0])
    return low[1] + int(min(share, 1.0) * (high[1] - low[1]))


_WHOLE_TOOL = frozenset((Cause.TOOL_ADDED, Cause.TOOL_REMOVED, Cause.TOOL_ORDER))


def place_of(difference: Difference) -> str:
    """Where a difference is, in words and without the prompt's text."""
    at = f"character {difference.at_chars:,} of {difference.part_chars:,}"
    if difference.where == "tool":
        tool = f"tool {difference.index + 1} ({difference.name or 'unnamed'})"
        return tool if difference.cause in _WHOLE_TOOL else f"{tool}, {at}"
    if difference.where == "argument":
        return f"the argument {difference.name}"
    if difference.where == "tokens":
        return f"the prompt's token ids, {at}"
    return f"message {difference.index + 1} ({difference.name}), {at}"


_WHAT = MappingProxyType(
    {
        Cause.TIMESTAMP: "a date or time changed",
        Cause.IDENTIFIER: "an id changed",
        Cause.ENVIRONMENT: "a path, host or process id changed",
        Cause.KEY_ORDER: "the same JSON came with its keys in another order",
        Cause.TOOL_ADDED: "a tool was added",
        Cause.TOOL_REMOVED: "a tool was removed",
        Cause.TOOL_CHANGED: "a tool's definition changed",
        Cause.TOOL_ORDER: "the same tools came in another order",
        Cause.ARGUMENT_CHANGED: "an argument of the template changed",
        Cause.TEXT_CHANGED: "the system text changed",
        Cause.HISTORY_CHANGED: "an earlier turn was changed",
        Cause.HISTORY_CUT: "earlier turns were left out",
        Cause.REASONING_DROPPED: "a reply came back without its reasoning",
    }
)

_SENTENCE = MappingProxyType(
    {
        Cause.NONE: "All of the prompt was warm.",
        Cause.FIRST_SEEN: "Nothing that was asked before begins like this prompt",
        Cause.NEW_NAMESPACE: "This is the first request with this API key, and prefixes of other "
        "keys aren't shared",
        Cause.NEW_FINGERPRINT: "This prompt was warm under another model, engine or template; "
        "snapshots of those aren't usable",
        Cause.REASONING_DROPPED: "The model's reasoning is no longer part of the rendered history",
        Cause.TEMPLATE_REWRITES: "The template renders earlier turns otherwise than it did when "
        "they were new, so the engine found other tokens than the slot holds",
        Cause.EVICTED: "What was computed before had been evicted from its slot and isn't in the "
        "store",
        Cause.ENGINE_RESTARTED: "The engine was restarted since, and this prefix wasn't saved",
        Cause.SNAPSHOT_FAILED: "The snapshot couldn't be restored",
        Cause.ENDS_ONLY: "This model's memory can be reused only up to its saved ends, and the "
        "prompt leaves the slot's prefix before its end",
        Cause.FAILED: "The request ended without an answer",
    }
)


def _summary(facts: ExplainedFacts, cause: Cause, difference: Difference | None) -> str:
    cold = f"{facts.cold_tokens:,} of {facts.prompt_tokens:,} tokens were prefilled"
    if cause is Cause.NONE:
        return _SENTENCE[cause]
    if cause is Cause.NEW_TEXT:
        return f"Only what is new was prefilled: {facts.cold_tokens:,} of {facts.prompt_tokens:,}."
    sentence = _SENTENCE.get(cause, "")
    if cause is Cause.SNAPSHOT_FAILED and facts.failed_restore:
        sentence += f" ({facts.failed_restore})"
    if cause is Cause.NEW_FINGERPRINT and facts.moved:
        sentence += f" (changed: {', '.join(facts.moved)})"
    if cause in _WHAT and difference is not None:
        sentence = f"In {place_of(difference)}: {_WHAT[cause]}"
    return f"{sentence}: {cold}." if sentence else f"{cold[0].upper()}{cold[1:]}."


_ADVICE = MappingProxyType(
    {
        Cause.FIRST_SEEN: "Nothing to do: the next request that begins alike finds it warm.",
        Cause.NEW_NAMESPACE: "Nothing to do; what all keys share belongs into a tier.",
        Cause.NEW_FINGERPRINT: "Expected once after a change of model, engine or template.",
        Cause.TIMESTAMP: "Put dates and times behind what stays the same: into the last user "
        "message, or into a tool's result. For lines of a system prompt the hygiene rule "
        "move-volatile does that.",
        Cause.IDENTIFIER: "Put ids behind what stays the same, or leave them out of the prompt. "
        "For lines of a system prompt the hygiene rules move-volatile and drop-billing do that.",
        Cause.ENVIRONMENT: "Put paths, hosts and process ids behind what stays the same. For the "
        "prompts of coding agents the hygiene rule move-known does that.",
        Cause.KEY_ORDER: "Serialise JSON with a fixed order of keys (sort_keys=True); another "
        "order is another prompt. For tools the hygiene rule sort-tools does that.",
        Cause.TOOL_ADDED: "Send the same tools with each request and say in the message which to "
        "use; a new tool goes behind the others.",
        Cause.TOOL_REMOVED: "Send the same tools with each request; to forbid one for a task, say "
        "so in the message.",
        Cause.TOOL_CHANGED: "Keep tool definitions constant; what varies belongs into a message.",
        Cause.TOOL_ORDER: "Send tools in one fixed order, or set the hygiene rule sort-tools.",
        Cause.ARGUMENT_CHANGED: "Keep chat_template_kwargs, response_format and the like constant "
        "for a conversation.",
        Cause.TEXT_CHANGED: "Keep the system text constant and put what varies into the last "
        "message; a tier keeps several fixed ones warm. A line that a client adds to each request "
        "is left out by the hygiene rule drop-billing, and what coding agents tell of a repository "
        "is moved by move-known.",
        Cause.HISTORY_CHANGED: "Append to a conversation rather than edit it: everything behind an "
        "edited turn is prefilled again.",
        Cause.HISTORY_CUT: "Drop old turns rarely and many at a time: each cut costs a prefill of "
        "all that is left.",
        Cause.REASONING_DROPPED: "Send reasoning back if the template renders it, or expect the "
        "last turn to be prefilled again.",
        Cause.TEMPLATE_REWRITES: "Use a template that renders a turn alike whether it is the last "
        "one or not.",
        Cause.EVICTED: "Give it more room: more --slots, a larger --context or "
        "store.quota_bytes; or pin the prefix on the page.",
        Cause.ENGINE_RESTARTED: "Pin the prefix if it must survive; see the log for why the engine "
        "ended.",
        Cause.SNAPSHOT_FAILED: "Keepwarm has set the snapshot aside and makes it anew; if it comes "
        "again, look at the disk with `keepwarm store verify`.",
        Cause.ENDS_ONLY: "Append only; with sliding-window and recurrent models a prompt that "
        "turns off earlier must start from a saved end.",
    }
)


def advice_for(cause: Cause) -> str:
    """What to do about a cause; '' where there is nothing to do."""
    return _ADVICE.get(cause, "")
