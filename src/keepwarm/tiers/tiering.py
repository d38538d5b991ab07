"""Which tier a request gets, if any, and the request with that tier's static prompt in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keepwarm.core.prompt import Api, head_of, segments_of
from keepwarm.core.roles import SYSTEM_ROLES
from keepwarm.core.tiers import ContextRole, Tier, TierSet, compose
from keepwarm.errors import RequestError
from keepwarm.router import Decision

AUTO = "auto"
HEADER = "X-Keepwarm-Tier"


@dataclass(frozen=True, slots=True)
class Tiered:
    """A request as it will be forwarded. `tier` None: left as the client sent it.

    `shared_segments` counts the messages that are the tier's alone; 0 where the client's own
    system text, tools or schema are mixed into them, since those belong to its namespace.
    `decision` is the router's, where it decided. `unrendered` are arguments of a body that this
    engine's template renders nothing of.
    """

    body: dict[str, Any]
    tier: Tier | None
    reason: str
    shared_segments: int = 0
    decision: Decision | None = None
    unrendered: frozenset[str] = frozenset()

    @property
    def shaping(self) -> dict[str, Any]:
        """The body without those arguments: all that shapes the prompt."""
        return shaping(self.body, self.unrendered)


def shaping(body: dict[str, Any], unrendered: frozenset[str]) -> dict[str, Any]:
    """A body without the arguments that render nothing."""
    if unrendered.isdisjoint(body):
        return body
    return {key: value for key, value in body.items() if key not in unrendered}


def asked_tier(api: Api, body: Mapping[str, Any], header: str | None, tiers: TierSet) -> str:
    """The tier a client asks for: a name, `auto`, or '' for none.

    Raises:
        RequestError: the header names a tier that doesn't exist.
    """
    if api == "completion":
        return ""
    if header:
        if header != AUTO and header not in tiers:
            raise RequestError(
                f"There is no tier named {header!r} ({HEADER}). Tiers here: "
                f"{', '.join((*tiers.names, AUTO))}."
            )
        return header
    model = body.get("model")
    if isinstance(model, str) and (model == AUTO or model in tiers):
        return model
    return ""


def has_own_system(api: Api, body: Mapping[str, Any]) -> bool:
    """Whether the client brings a system prompt of its own."""
    return any(s.role in SYSTEM_ROLES and s.text for s in segments_of(api, body))


def apply_tier(
    api: Api,
    body: dict[str, Any],
    tier: Tier,
    reason: str,
    *,
    unrendered: frozenset[str] = frozenset(),
) -> Tiered:
    """Put a tier's static prompt and tools into a request of any chat-like API."""
    # A schema or a template's arguments are the client's own as much as tools are.
    mixed = bool(head_of(shaping(body, unrendered))) or (
        tier.client_role is ContextRole.MERGE and has_own_system(api, body)
    )
    shared = 0 if mixed else len(tier.messages)
    if api == "chat":
        return Tiered(compose(tier, body), tier, reason, shared, unrendered=unrendered)
    static = compose(tier, {"messages": []})
    out = dict(body)
    out["input"] = _responses_input(static, body.get("input"))
    tools = [_responses_tool(tool) for tool in static.get("tools") or []]
    if tools or body.get("tools"):
        out["tools"] = [*tools, *(body.get("tools") or [])]
    return Tiered(out, tier, reason, shared, unrendered=unrendered)


def _responses_input(static: Mapping[str, Any], own: object) -> list[Any]:
    messages = [{"role": m["role"], "content": m["content"]} for m in static["messages"]]
    if isinstance(own, str):
        return [*messages, {"role": "user", "content": own}]
    return [*messages, *(own if isinstance(own, list) else [])]


def _responses_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", **tool["function"]}
