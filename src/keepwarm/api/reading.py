"""A request read once: what of it is rendered, in chat's terms, whichever API it came by.

The rest of Keepwarm compares prompts, counts them and asks the engine to render them in this form
alone; which API it was matters here, at the door, and where the reply goes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from keepwarm.api import responses
from keepwarm.core.tiers import Tier, compose

Api = Literal["chat", "responses", "completion"]


def chat_form(api: Api, body: dict[str, Any]) -> dict[str, Any] | None:
    """The chat-completions body that renders to what the engine renders for this one.

    Args:
        api: whose body it is.
        body: as it goes to the engine, without what the engine would refuse.

    Returns:
        None for raw prompts, which nothing is rendered of.
    """
    if api == "completion":
        return None
    if api == "responses":
        return responses.chat_form(body)
    # Without messages a body is a raw prompt's; here the engine says that they are missing.
    return body if "messages" in body else {"messages": None, **body}


def read(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    """A request in chat's terms; a raw prompt's body as it is."""
    form = chat_form(api, body)
    return body if form is None else form


def composed(
    api: Api, tier: Tier, body: dict[str, Any], chat: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request with a tier's messages and tools in it: its body, and the same in chat's terms.

    Raises:
        RequestError: the client's messages or tools can't be joined with the tier's.
    """
    joined = compose(tier, chat)
    if api != "responses":
        return joined, joined
    own = len(chat["messages"])
    is_merged = tier.takes_in_system and responses.opens_with_system(chat["messages"])
    static = joined["messages"][: len(joined["messages"]) - own + is_merged]
    out = responses.with_static(body, static, tier.tools, without_opening=is_merged)
    return out, responses.chat_form(out)


def can_gather(api: Api, body: Mapping[str, Any]) -> bool:
    """Whether a whole reply can be put together from a stream of it.

    The engine streams no logprobs beside tools ("logprobs is not supported with tools + stream").
    """
    return api == "chat" and not (body.get("logprobs") and body.get("tools"))


def opening_of(chat: Mapping[str, Any]) -> str:
    """The words of an assistant's message at the end, which the engine goes on from."""
    messages = chat.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return ""
    content = last.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""
