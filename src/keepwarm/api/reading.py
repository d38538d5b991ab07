"""A request read once: what of it is rendered, in chat's terms, whichever API it came by.

The rest of Keepwarm compares prompts, counts them and asks the engine to render them in this form
alone; which API it was matters at the door, and where the reply goes out.
"""

from __future__ import annotations

from typing import Any, Literal

from keepwarm.api import responses

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
    return responses.chat_form(body) if api == "responses" else body
