"""Refuse what can't fit into a slot before it holds one.

The engine renders and tokenizes a whole prompt before it finds that it is too long; meanwhile a
slot would be kept for it: minutes for a few megabytes. A lower bound of its tokens is enough to
refuse, so only text is counted that every template prints, and only as much of it as fills a slot:

1. So few characters that each may be a token: it may fit.
2. So many that it can't fit whatever its tokens are: refused unseen.
3. By the learned rate it fits, or nearly: the engine will say how long it is. A conversation that
   is about to fill its slot pays for no second count at each turn.
4. Else the engine's tokenizer counts, piece by piece, until a slot is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from keepwarm.core.prompt import is_raw
from keepwarm.errors import EngineError, EngineRefusedError

if TYPE_CHECKING:
    from keepwarm.deployment.runtime import Runtime
    from keepwarm.gateway.asked import Asked

# No vocabulary has longer tokens: runs of spaces are the longest, up to 128 in those that were
# looked at (GPT-2's, Llama 3's, Qwen's, Gemma's).
_MOST_CHARS_A_TOKEN = 256
# Below this times a slot by the learned rate nothing is counted.
_DOUBTFUL = 1.2
_PIECE_CHARS = 32_768
# Where a text is cut in two, a few tokens more may come of it than of the whole.
_CUT_TOKENS = 8


async def refuse_too_long(runtime: Runtime, asked: Asked) -> None:
    """Refuse a request whose text alone fills a slot.

    Raises:
        EngineRefusedError: in the engine's own words and with both numbers; the first is an
            estimate, since no more was counted than had to be.
    """
    room = runtime.slot_tokens
    prompt = asked.body.get("prompt") if is_raw(asked.chat) else None
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        if len(prompt) >= room:
            raise _too_long(len(prompt), room)
        return
    texts = list(_texts(asked.chat))
    chars = sum(map(len, texts))
    if chars < room:
        return
    rate = runtime.dispatcher.rates.tokens_per_char.value
    if max(len(texts), chars // _MOST_CHARS_A_TOKEN) >= room:
        raise _too_long(max(len(texts), int(chars * rate)), room)
    if chars * rate < _DOUBTFUL * room:
        return
    text, counted, seen = "\n".join(texts), 0, 0
    try:
        while seen < len(text) and counted < room:
            piece = text[seen : seen + _PIECE_CHARS]
            counted += max(len(await runtime.client.tokenize(piece)) - _CUT_TOKENS, 0)
            seen += len(piece)
    except EngineError:
        return  # it will say so itself
    if counted >= room:
        raise _too_long(counted * len(text) // seen, room)


def _texts(body: Mapping[str, Any]) -> Iterator[str]:
    """The texts that are in the prompt whatever the template; wrong types are left out."""
    if is_raw(body):
        prompt = body.get("prompt")
        yield from [prompt] if isinstance(prompt, str) else []
        return
    listed = body["messages"]
    for message in listed if isinstance(listed, list) else []:
        if isinstance(message, dict):
            yield from _said(message)


def _said(message: Mapping[str, Any]) -> Iterator[str]:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        # Templates drop the reasoning of earlier turns.
        if isinstance(text, str) and "</think>" not in text and text.strip():
            yield text.strip()


def _too_long(tokens: int, room: int) -> EngineRefusedError:
    message = (
        f"request ({tokens} tokens) exceeds the available context size ({room} tokens), "
        "try increasing it"
    )
    error = {
        "code": 400,
        "message": message,
        "type": "exceed_context_size_error",
        "n_prompt_tokens": tokens,
        "n_ctx": room,
    }
    body = msgspec.json.encode({"error": error})
    return EngineRefusedError(message, status=400, body=body)
