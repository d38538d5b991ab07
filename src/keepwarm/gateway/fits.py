"""What a request may come to: whether its prompt fits at all, and where its reply must end.

Theory of operation. The engine renders and tokenizes a whole prompt before it finds that it is too
long, and meanwhile a slot would be kept for it: minutes for a few megabytes. So a prompt is refused
before it holds a slot, with no more work than shows it:

1. So many characters that it can't fit, whatever its tokens are: refused unseen.
2. Well over its room by the learned rate: text that every template prints is tokenized piece by
   piece until the room is full. That is a lower bound.
3. Nearly full by the estimate: counted once as it would be sent (`Dispatcher.count_ahead`), and the
   plan goes by these tokens, too.
4. Else the engine will say. A conversation that has room pays for no second count at each turn.

1 and 2 come before a tier is chosen, 3 behind it. What the engine refuses to count, or is down for,
is left to it. All refusals are the engine's error with both numbers; `api.dialect` says them in the
words of the client's API.

In a shared pool a reply is bounded to what the plan has reserved for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from keepwarm.core.job import Job
from keepwarm.core.plan import prompt_tokens
from keepwarm.core.prompt import is_raw
from keepwarm.errors import EngineError, EngineRefusedError

if TYPE_CHECKING:
    from keepwarm.deployment.deployment import Deployment
    from keepwarm.gateway.client_request import ClientRequest

# The names of a reply's limit in the APIs that llama-server has; the first one given counts there.
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
# Without a limit a reply may come to whatever there is room for.
NO_LIMIT = 1 << 31
# No vocabulary has longer tokens: runs of spaces are the longest, up to 128 in those that were
# looked at (GPT-2's, Llama 3's, Qwen's, Gemma's).
_MOST_CHARS_A_TOKEN = 256
# From this times its room by the learned rate a text is tokenized in pieces.
_WELL_OVER = 1.2
_PIECE_CHARS = 32_768
# Where a text is cut in two, a few tokens more may come of it than of the whole.
_CUT_TOKENS = 8
# A prompt whose estimate is over this part of its room is counted: some 9 ms a thousand tokens. In
# a shared pool sooner, since what the estimate may lack is kept free beside it.
_NEARLY, _NEARLY_IN_POOL = 0.9, 0.6


def reply_limit(body: Mapping[str, Any]) -> int:
    """Tokens that each reply may come to, by what the client says."""
    for name in _LIMITS:
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return max(value, 1)
    return NO_LIMIT


def bounded(body: Mapping[str, Any], reply_tokens: int) -> dict[str, Any]:
    """What a body must say so that its reply ends within this (0: it may say what it likes)."""
    if not reply_tokens or reply_limit(body) <= reply_tokens:
        return {}
    return dict.fromkeys([name for name in _LIMITS if name in body] or _LIMITS[:1], reply_tokens)


async def check_text(deployment: Deployment, asked: ClientRequest) -> None:
    """Refuse a request whose text alone is too long: steps 1 and 2 of the module.

    Raises:
        EngineRefusedError: nothing was done for it. Its number of tokens is an estimate, since no
            more was counted than had to be.
    """
    room = _room(deployment)
    prompt = asked.body.get("prompt") if is_raw(asked.chat) else None
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        if len(prompt) >= room:
            raise _too_long(len(prompt), room)
        return
    texts = list(_texts(asked.chat))
    chars = sum(map(len, texts))
    estimate = int(chars * deployment.dispatcher.rates.tokens_per_char.value)
    # 1. Each text has a token at least.
    if max(len(texts), chars // _MOST_CHARS_A_TOKEN) >= room:
        raise _too_long(max(len(texts), estimate), room)
    # 2. Fewer characters than that may all be tokens.
    if chars < room or estimate < _WELL_OVER * room:
        return
    text, counted, seen = "\n".join(texts), 0, 0
    try:
        while seen < len(text) and counted < room:
            piece = text[seen : seen + _PIECE_CHARS]
            counted += max(len(await deployment.client.tokenize(piece)) - _CUT_TOKENS, 0)
            seen += len(piece)
    except EngineError:
        return
    if counted >= room:
        raise _too_long(counted * len(text) // seen, room)


async def check_prompt(deployment: Deployment, job: Job) -> None:
    """Count a prompt that may be too long, and refuse it if it is: step 3 of the module.

    Raises:
        EngineRefusedError: nothing was done for it.
    """
    room = _room(deployment)
    nearly = _NEARLY if deployment.machine.pool_tokens is None else _NEARLY_IN_POOL
    if prompt_tokens(job.demand(), deployment.dispatcher.rates) < nearly * room:
        return
    if job.chat is not None and not job.is_counted:
        await deployment.dispatcher.count_ahead(job)
    if job.ids is not None and job.ids.size >= room:
        raise _too_long(int(job.ids.size), room)


def _room(deployment: Deployment) -> int:
    """Tokens that a prompt must stay below: its slot's, or the pool's where that is smaller."""
    return min(deployment.slot_tokens, deployment.machine.pool_tokens or deployment.slot_tokens)


def _texts(body: Mapping[str, Any]) -> Iterator[str]:
    """The texts that are in the prompt whatever the template; wrong types are left out."""
    if is_raw(body):
        prompt = body.get("prompt")
        yield from [prompt] if isinstance(prompt, str) else []
        return
    listed = body["messages"]
    for message in listed if isinstance(listed, list) else []:
        if isinstance(message, dict):
            yield from _message_texts(message)


def _message_texts(message: Mapping[str, Any]) -> Iterator[str]:
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
