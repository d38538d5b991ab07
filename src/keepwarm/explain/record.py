"""One finished request as it is told: to the history, the page, the log, and traces.

A record is plain JSON, so that what was written yesterday is shown as it was. docs/explanations.md
lists its fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from keepwarm.core.plan import Plan, Source
from keepwarm.core.prompt import Prompt
from keepwarm.core.reply import Counts, Reply
from keepwarm.explain.difference import Cause, Difference
from keepwarm.explain.explanation import Explanation, advice_for, place_of

# Messages listed with their sizes; a longer conversation's are told by their number alone.
_LISTED = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """What is known of a request at its end, gathered on the event loop.

    Times are seconds of the monotonic clock, `at_s` is the wall clock's at the request's arrival.
    `api` is how the client spoke, `body` is in chat's terms. `plan` is None if it never got a slot.
    `status` 0: no answer. `trouble` is an error's kind. `prefill_s_per_token` is what the rates
    said. `engine` tells lives of the engine apart. `rewrites` is what was changed on the way;
    `ahead` what came of preparing this turn before it was asked, in words.
    """

    id: str
    api: str
    namespace: str
    model: str
    body: Mapping[str, Any]
    prompt: Prompt
    plan: Plan | None
    tier: str
    tier_reason: str
    at_s: float
    received_s: float
    arrived_s: float
    queued_s: float
    prepared_s: float
    first_byte_s: float | None
    ended_s: float
    streamed: bool
    status: int
    trouble: str
    reply: Reply | None
    static_tokens: int | None
    filled_tokens: int
    failed_restore: str | None
    prefill_s_per_token: float
    engine: int | None
    traceparent: str
    rewrites: Mapping[str, int]
    fingerprint: str = ""
    ahead: str = ""

    @property
    def counts(self) -> Counts | None:
        """The engine's counts, None if the reply didn't come to its end."""
        return self.reply.counts if self.reply else None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first byte, queueing included."""
        return None if self.first_byte_s is None else self.first_byte_s - self.received_s

    @property
    def outcome(self) -> str:
        """`answered`, `refused` (4xx), `escalated`, `failed` or `hung_up`."""
        if self.trouble == "escalated":
            return "escalated"
        if self.status == 200 and self.counts is not None and not self.trouble:
            return "answered"
        if 400 <= self.status < 500:
            return "refused"
        return "failed" if self.trouble or self.status else "hung_up"

    @property
    def cold_ttft_s(self) -> float | None:
        """What the time to the first byte would have been without anything warm: an estimate.

        The same request with its own prefill and preparation replaced by a prefill of everything.
        """
        counts, ttft_s = self.counts, self.ttft_s
        if counts is None or ttft_s is None:
            return None
        rest_s = max(ttft_s - counts.prefill_s - self.prepared_s, 0.0)
        return rest_s + counts.prompt * self.prefill_s_per_token


def record_of(
    ended: EndedRequest, told: Explanation | None, nearest: tuple[str, float] | None
) -> dict[str, Any]:
    """The record. `told` is None for a request without an answer; `nearest` is its id and age."""
    out: dict[str, Any] = {
        "id": ended.id,
        "at": round(ended.at_s, 3),
        "api": ended.api,
        "model": ended.model,
        "tier": ended.tier,
        "tier_reason": ended.tier_reason,
        "plan": ended.plan.source.value if ended.plan else "none",
        "slot": ended.plan.slot if ended.plan else None,
        "outcome": ended.outcome,
        "status": ended.status,
        # The engine's own words may quote the prompt.
        "error": ended.trouble or ("engine_error" if ended.reply and ended.reply.error else None),
        "tokens": _tokens(ended, told),
        "timing": _timing(ended),
        "estimate": _estimate(ended),
        "considered": _considered(ended.plan),
        "steps": _steps(ended),
        "prompt": _prompt(ended),
        "hygiene": dict(ended.rewrites),
        "ahead": _ahead(ended),
        "nearest": {"id": nearest[0], "age_s": round(nearest[1], 1)} if nearest else None,
    }
    cause = told.cause if told else Cause.FAILED
    out |= {
        "cause": cause.value,
        "summary": told.summary if told else _unanswered(ended),
        "advice": told.advice if told else advice_for(cause),
        "difference": _difference(told.difference) if told and told.difference else None,
    }
    return out


def _tokens(ended: EndedRequest, told: Explanation | None) -> dict[str, int]:
    counts = ended.counts
    out = {"prompt": 0, "slot": 0, "snapshot": 0, "shared": 0, "cold": 0, "decoded": 0}
    if counts is None or told is None or ended.plan is None:
        return out
    out |= {"prompt": counts.prompt, "cold": told.cold_tokens, "decoded": counts.decoded}
    # What a cold plan reused all the same was in the slot, unknown to us.
    in_slot = ended.plan.source in (Source.COLD, Source.AHEAD)
    source = Source.SLOT if in_slot else ended.plan.source
    out[source.value] = told.warm_tokens
    return out


def _ahead(ended: EndedRequest) -> dict[str, Any] | None:
    """How many of its tokens were prefilled before it was asked, and why no more."""
    used = 0
    if ended.plan and ended.counts:
        used = min(ended.plan.ahead_tokens, ended.counts.cached)
    return {"tokens": used, "came_of": ended.ahead} if used or ended.ahead else None


def _timing(ended: EndedRequest) -> dict[str, float | None]:
    counts = ended.counts
    times = {
        "route_s": ended.arrived_s - ended.received_s,
        "queue_s": ended.queued_s,
        "prepare_s": ended.prepared_s,
        "ttft_s": ended.ttft_s,
        "cold_ttft_s": ended.cold_ttft_s,
        "prefill_s": counts.prefill_s if counts else None,
        "decode_s": counts.decode_s if counts else None,
        "total_s": ended.ended_s - ended.received_s,
    }
    return {name: None if s is None else round(s, 6) for name, s in times.items()}


def _estimate(ended: EndedRequest) -> dict[str, float] | None:
    plan = ended.plan
    if plan is None:
        return None
    return {
        "prompt_tokens": plan.prompt_tokens,
        "reuse_tokens": plan.reuse_tokens,
        "promised_tokens": plan.promise_tokens,
        "ttft_s": round(plan.estimate_s, 6),
    }


def _considered(plan: Plan | None) -> list[dict[str, Any]]:
    if plan is None:
        return []
    # A request that waited for another's prefill takes the snapshot and is told `shared`.
    taken = Source.SNAPSHOT if plan.source is Source.SHARED else plan.source
    return [
        {
            "source": option.source.value,
            "slot": option.slot,
            "reuse_tokens": option.reuse_tokens,
            "ttft_s": round(option.ttft_s, 6),
            "loss_s": round(option.loss_s, 6),
            "chosen": (option.source, option.slot) == (taken, plan.slot),
        }
        for option in plan.considered
    ]


def _steps(ended: EndedRequest) -> dict[str, Any] | None:
    plan = ended.plan
    if plan is None:
        return None
    return {
        "saved_first": plan.save_first,
        "restored_tokens": plan.restore.tokens if plan.restore else 0,
        "restored_bytes": plan.restore.size_bytes if plan.restore else 0,
        "filled_tokens": ended.filled_tokens,
        "emptied_slots": [slot for slot, _ in plan.evict],
        "failed_restore": ended.failed_restore,
    }


def _prompt(ended: EndedRequest) -> dict[str, Any]:
    tools = ended.body.get("tools")
    items = ended.body.get("messages")
    messages = [m for m in items if isinstance(m, Mapping)] if isinstance(items, list) else []
    return {
        "chars": ended.prompt.chars,
        "tools": len(tools) if isinstance(tools, list) else 0,
        "messages": len(messages),
        "roles": [str(m.get("role") or m.get("type") or "")[:16] for m in messages[-_LISTED:]],
    }


def _difference(difference: Difference) -> dict[str, Any]:
    out = {field.name: getattr(difference, field.name) for field in fields(difference)}
    return out | {"cause": difference.cause.value, "place": place_of(difference)}


def _unanswered(ended: EndedRequest) -> str:
    outcome = ended.outcome
    if outcome == "hung_up":
        return "The client hung up before the reply was complete."
    if outcome == "escalated":
        return f"The tier {ended.tier} was too small: the request was sent again one tier up."
    if outcome == "refused":
        return f"The request was refused with status {ended.status}."
    if ended.status == 200:
        return "The engine's reply holds no counts, so nothing can be said of it."
    return f"The request ended without an answer ({ended.trouble or ended.status})."


def without_text(record: dict[str, Any]) -> dict[str, Any]:
    """The record without any text of a prompt."""
    difference = record.get("difference")
    if not difference:
        return record
    bare = {**difference, "context": None, "before": None, "after": None}
    return {**record, "difference": bare}


def brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """What lists show of a record."""
    names = ("id", "at", "api", "model", "tier", "tier_reason", "plan", "slot", "outcome")
    out = {name: record[name] for name in names}
    timing = record["timing"]
    return out | {
        "tokens": record["tokens"],
        "cause": record["cause"],
        "summary": record["summary"],
        "ttft_s": timing["ttft_s"],
        "cold_ttft_s": timing["cold_ttft_s"],
        "queue_s": timing["queue_s"],
        "prepare_s": timing["prepare_s"],
        "total_s": timing["total_s"],
    }
