"""Which arguments of a request this engine's template renders nothing of.

`response_format`, `tool_choice: "none"` and their like may change a prompt or not: that is up to
the template, and to what llama.cpp makes of it. A prompt's identity must hold whatever does, and
nothing else: an agent that asks for JSON now and then would have two prompts where the engine sees
one. So each is rendered once, with and without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from keepwarm.api.steering import SystemPlaces
from keepwarm.core.roles import SYSTEM_ROLES
from keepwarm.core.tiers import ContextRole, Tier, TierSet, compose
from keepwarm.engine.client import EngineClient
from keepwarm.errors import EngineDownError, EngineError

_SCHEMA = {"type": "object", "properties": {"hour": {"type": "integer"}}, "required": ["hour"]}
_FUNCTION = {"name": "look", "description": "Look it up.", "parameters": _SCHEMA}
# Values that a template would tell apart if it looked at the argument at all.
_TRIED: Mapping[str, tuple[Any, ...]] = {
    "response_format": (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "hour", "schema": _SCHEMA}},
    ),
    "json_schema": (_SCHEMA,),
    "tool_choice": ("none", "required"),
    "reasoning_effort": ("low", "medium", "high"),
    "thinking_budget_tokens": (0, 1024),
    "parallel_tool_calls": (True, False),
    "thinking": ({"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}),
}
# A template may look at one of them only beside tools, a system message or an earlier turn.
_CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What hour is it?"},
    {"role": "assistant", "content": "Noon."},
    {"role": "user", "content": "And now?"},
]
_BODIES: tuple[dict[str, Any], ...] = (
    {"messages": _CONVERSATION},
    {"messages": _CONVERSATION[1:2]},
    {"messages": _CONVERSATION, "tools": [{"type": "function", "function": _FUNCTION}]},
)


async def unrendered_arguments(client: EngineClient) -> frozenset[str]:
    """The arguments that change no rendered prompt, whatever their value.

    Raises:
        EngineDownError: the engine can't be reached.
    """
    plain = await asyncio.gather(*(_rendered(client, body) for body in _BODIES))
    # What is refused without the argument is never asked with it.
    asked = [(body, text) for body, text in zip(_BODIES, plain, strict=True) if text is not None]

    async def is_unrendered(name: str) -> bool:
        for value in _TRIED[name]:
            for body, without in asked:
                if await _rendered(client, {**body, name: value}) != without:
                    return False
        return bool(asked)

    names = list(_TRIED)
    found = await asyncio.gather(*map(is_unrendered, names))
    return frozenset(name for name, is_so in zip(names, found, strict=True) if is_so)


async def system_places(client: EngineClient) -> SystemPlaces:
    """Where the template takes system messages: what it refuses, drops or puts elsewhere, it
    doesn't take there.

    Raises:
        EngineDownError: the engine can't be reached.
    """
    first, second, asked, said, again = "Alpha rules.", "Beta rules.", "Gamma?", "Delta.", "Eta?"
    opening = [_says("system", first), _says("user", asked)]
    bodies = (
        opening,
        [_says("system", first), _says("system", second), _says("user", asked)],
        [*opening, _says("assistant", said), _says("system", second), _says("user", again)],
        [_says("developer", first), _says("user", asked)],
    )
    plain, several, late, developer = await asyncio.gather(
        *(_rendered(client, {"messages": messages}) for messages in bodies)
    )
    if plain is None or not _in_order(plain, first, asked):
        return SystemPlaces()  # it takes none at all: nothing of ours would help
    return SystemPlaces(
        several=_in_order(several, first, second, asked),
        late=_in_order(late, first, asked, said, second, again),
        developer=_in_order(developer, first, asked),
    )


async def fitted_tiers(client: EngineClient, tiers: TierSet, takes: SystemPlaces) -> TierSet:
    """The tiers, laid out as the template takes them.

    Where it takes no second system message, the texts of extending tiers stand in a user's
    message, which nests exactly, or, if it refuses that too, in the first system message.

    Raises:
        EngineDownError: the engine can't be reached.
    """
    if takes.several or all(_systems(tier) < 2 for tier in tiers):
        return tiers
    for role in (ContextRole.USER, ContextRole.MERGE):
        moved = tiers.with_context_role(role)
        asked = [compose(tier, {"messages": [_says("user", "Hello")]}) for tier in moved]
        if None not in await asyncio.gather(*(_rendered(client, body) for body in asked)):
            return moved
    return tiers


def _systems(tier: Tier) -> int:
    return sum(message.role in SYSTEM_ROLES for message in tier.messages)


def _says(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _in_order(text: str | None, *words: str) -> bool:
    """Whether a rendered prompt holds these words, one behind the other."""
    at = 0
    for word in words:
        at = text.find(word, at) if text is not None else -1
        if at < 0:
            return False
    return True


async def _rendered(client: EngineClient, body: Mapping[str, Any]) -> str | None:
    """None where the engine refuses to render it: nothing is known of the argument then."""
    try:
        return await client.render(body)
    except EngineDownError:
        raise
    except EngineError:
        return None
