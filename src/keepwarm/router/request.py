"""From a chat request's body to the facts that routing looks at. Total: no body raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from keepwarm.core.roles import SYSTEM_ROLES
from keepwarm.router.catalog import tool_texts
from keepwarm.router.types import TIERS, RouteRequest

_TEXT_PARTS: Final = ("text", "input_text")
_IMAGE_PARTS: Final = ("image_url", "image", "input_image")
_TOOL_PARTS: Final = ("tool_result", "tool_use")


def _parts(content: object) -> tuple[str, bool, bool]:
    """Text, has images, has tool parts of a message's content: a string or a list of parts."""
    if isinstance(content, str):
        return content, False, False
    texts: list[str] = []
    images = tools = False
    for part in content if isinstance(content, list) else ():
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping):
            kind = part.get("type")
            images = images or kind in _IMAGE_PARTS
            tools = tools or kind in _TOOL_PARTS
            if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
                texts.append(part["text"])
    return "\n".join(texts), images, tools


def _messages(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    listed = body.get("messages")
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        return []
    return [message for message in listed if isinstance(message, Mapping)]


def _forces_tool(choice: object) -> bool:
    if isinstance(choice, str):
        return choice in ("required", "any")
    return isinstance(choice, Mapping) and choice.get("type") in ("function", "tool", "any")


def route_request(
    body: Mapping[str, Any],
    *,
    header_tier: str | None = None,
    tier_so_far: str | None = None,
    tier_names: Sequence[str] = TIERS,
) -> RouteRequest:
    """The facts of a chat-completions body (OpenAI's form; Anthropic's parts are understood too).

    An explicit tier is `header_tier`, else the body's `model` where it names one of `tier_names`.
    """
    messages = _messages(body)
    brings_system = bool(body.get("system"))
    has_tools = has_images = False
    text, turns = "", 0
    for message in messages:
        role = message.get("role")
        content, images, tool_parts = _parts(message.get("content"))
        if role in ("tool", "function") or message.get("tool_calls") or tool_parts:
            has_tools = True
        if role in SYSTEM_ROLES:
            brings_system = True
        if role == "user" and not (tool_parts and not content):
            text, turns, has_images = content, turns + 1, images
    named = header_tier if header_tier in tier_names else body.get("model")
    choice = body.get("tool_choice")
    forbids = choice == "none" or (isinstance(choice, Mapping) and choice.get("type") == "none")
    offered = body.get("tools")
    return RouteRequest(
        text=text,
        tools=tool_texts(offered) if isinstance(offered, list) and offered else None,
        turns=turns,
        has_tool_messages=has_tools,
        forces_tool=_forces_tool(choice),
        forbids_tools=forbids,
        has_images=has_images,
        brings_system_prompt=brings_system,
        explicit_tier=named if isinstance(named, str) and named in tier_names else None,
        tier_so_far=tier_so_far,
    )
