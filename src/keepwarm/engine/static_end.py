"""Where the static part of a prompt ends, exactly, in tokens.

Two requests that differ in the first user message only are rendered with the engine's own template
and tokenized by its own tokenizer; what they have in common is what every request with that static
part begins with. Counting on the text instead would miss tokens that merge across the boundary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from keepwarm.core.prompt import is_raw
from keepwarm.core.roles import SYSTEM_ROLES
from keepwarm.engine.client import EngineClient

# Two texts without a common beginning, in their letters or in any tokenizer's pieces.
_PROBES = ("Quartz", "7 mild steps")
# What else of a body reaches the template.
ARGUMENTS = ("tools", "chat_template_kwargs", "tool_choice", "reasoning_effort", "response_format")


async def static_tokens(client: EngineClient, static: Mapping[str, Any]) -> list[int]:
    """The token ids that every chat request with this static part begins with.

    Args:
        client: the engine whose template and tokenizer count.
        static: a chat-completions body of the static messages and tools alone.

    Raises:
        EngineError: the engine refuses to render it or can't be reached.
    """
    first, second = await asyncio.gather(*(_tokens(client, static, probe) for probe in _PROBES))
    return first[: common_length(first, second)]


async def _tokens(client: EngineClient, static: Mapping[str, Any], probe: str) -> list[int]:
    request = {key: static[key] for key in ARGUMENTS if static.get(key) is not None}
    request["messages"] = [*static["messages"], {"role": "user", "content": probe}]
    return await client.tokenize(await client.render(request))


def _leading(messages: object) -> list[Any]:
    out = []
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, Mapping) or message.get("role") not in SYSTEM_ROLES:
            break
        out.append(message)
    return out


def common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def static_body(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The static part of a request in chat's terms; None where nothing is rendered."""
    if is_raw(body):
        return None
    return {**body, "messages": _leading(body["messages"])}
