"""Which tier a request gets, if any, and the request with that tier's static prompt in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keepwarm.api.reading import Api, composed, read
from keepwarm.core.prompt import head_of, is_raw, segments_of
from keepwarm.core.roles import SYSTEM_ROLES
from keepwarm.core.tiers import ContextRole, Tier, TierSet
from keepwarm.errors import RequestError
from keepwarm.router import Decision

AUTO = "auto"
HEADER = "X-Keepwarm-Tier"


@dataclass(frozen=True, slots=True)
class TieredRequest:
    """A request as it will be forwarded. `tier` None: left as the client sent it.

    `chat` is the same in chat's terms; not given, the body is in them already.

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
    chat: dict[str, Any] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """See `chat`."""
        if self.chat is None:
            object.__setattr__(self, "chat", self.body)

    @property
    def shaping(self) -> dict[str, Any]:
        """What shapes the prompt, in chat's terms: without the arguments that render nothing."""
        return shaping(self.chat, self.unrendered)


def shaping(body: dict[str, Any], unrendered: frozenset[str]) -> dict[str, Any]:
    """A body without the arguments that render nothing."""
    if unrendered.isdisjoint(body):
        return body
    return {key: value for key, value in body.items() if key not in unrendered}


def asked_tier(body: Mapping[str, Any], header: str | None, tiers: TierSet) -> str:
    """The tier a client asks for: a name, `auto`, or '' for none.

    Raises:
        RequestError: the header names a tier that doesn't exist.
    """
    if is_raw(body):
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


def has_own_system(chat: Mapping[str, Any]) -> bool:
    """Whether the client brings a system prompt of its own."""
    return any(s.role in SYSTEM_ROLES and s.text for s in segments_of(chat))


def apply_tier(
    api: Api,
    body: dict[str, Any],
    tier: Tier,
    reason: str,
    *,
    unrendered: frozenset[str] = frozenset(),
) -> TieredRequest:
    """Put a tier's static prompt and tools into a request of any chat-like API."""
    chat = read(api, body)
    # A schema or a template's arguments are the client's own as much as tools are.
    mixed = bool(head_of(shaping(chat, unrendered))) or (
        tier.client_role is ContextRole.MERGE and has_own_system(chat)
    )
    shared = 0 if mixed else len(tier.messages)
    body, chat = composed(api, tier, body, chat)
    return TieredRequest(body, tier, reason, shared, unrendered=unrendered, chat=chat)
