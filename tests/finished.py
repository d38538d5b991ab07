"""Requests that have ended, as the gateway hands them to the explainer."""

from __future__ import annotations

from typing import Any

from keepwarm.core.plan import Option, Plan, Source
from keepwarm.core.prompt import Segment, prompt_of
from keepwarm.core.reply import Counts, Reply
from keepwarm.explain.record import Ended

SYSTEM = "You look after a house. " + "Be brief and name what you saw. " * 40


def plan(source: Source = Source.COLD, *, reuse: int = 0, slot: int = 1) -> Plan:
    considered = (
        Option(Source.COLD, 0, 0, 2.0, 0.1),
        Option(Source.SNAPSHOT if source is Source.SHARED else source, slot, reuse, 1.0, 0.0),
    )
    return Plan(source, slot, reuse, reuse, 400, 1.0, False, False, None, (), considered)


def ended(number: int, messages: list[dict[str, Any]], **changes: Any) -> Ended:
    body = {"messages": messages}
    namespace = changes.get("namespace", "ada")
    values: dict[str, Any] = {
        "id": f"request{number:05}",
        "api": "chat",
        "namespace": namespace,
        "model": "small",
        "body": body,
        "prompt": prompt_of(body, fingerprint="f", namespace=namespace),
        "plan": plan(),
        "tier": "none",
        "tier_reason": "own-prompt",
        "at_s": 1_764_000_000.0 + 10 * number,
        "received_s": 100.0,
        "arrived_s": 100.001,
        "queued_s": 0.002,
        "prepared_s": 0.003,
        "first_byte_s": 102.0,
        "ended_s": 103.0,
        "streamed": True,
        "status": 200,
        "trouble": "",
        "reply": Reply(Counts(0, 400, 9, 1.9, 1.0), Segment("assistant", "On the roof.")),
        "static_tokens": None,
        "filled_tokens": 0,
        "failed_restore": None,
        "prefill_s_per_token": 0.005,
        "engine": 1,
        "traceparent": "",
        "rewrites": {},
    }
    return Ended(**(values | changes))


def asks(text: str, system: str = SYSTEM) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]
