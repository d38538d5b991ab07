"""Where the static part of a prompt ends, exactly, in tokens.

Requests that differ behind the static part only are rendered with the engine's own template and
tokenized by its own tokenizer; what they have in common is what every request with that static part
begins with. Two of them have one user message, a third one has an earlier turn: some templates put
the tools before the last user message, and others write a first turn otherwise. Counting on the
text instead would miss tokens that merge across the boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keepwarm.core.prompt import SHAPING, is_raw
from keepwarm.core.roles import SYSTEM_ROLES
from keepwarm.core.tree import Tokens, as_tokens, common_tokens
from keepwarm.engine.counting import PromptCounter
from keepwarm.errors import EngineDownError, EngineRefusedError

# Turns without a common beginning, in their letters or in any tokenizer's pieces.
_PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Quartz"}],
    [{"role": "user", "content": "7 mild steps"}],
)
_EARLIER_TURN = [
    {"role": "user", "content": "Quartz"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "7 mild steps"},
]


async def static_tokens(counter: PromptCounter, static: Mapping[str, Any]) -> list[int]:
    """The token ids that every chat request with this static part begins with.

    Args:
        counter: counts with the engine's template and tokenizer.
        static: a chat-completions body of the static messages and tools alone.

    Raises:
        EngineError: the engine refuses to render it or can't be reached.
    """
    # The first one alone: what it has in common with the others isn't tokenised again.
    first = await counter.count(_with_turns(static, _PROBES[0]))
    second = await counter.count(_with_turns(static, _PROBES[1]))
    third = await _earlier(counter, static)
    end = common_tokens(first, second)
    if third is not None:
        end = min(end, common_tokens(first, third))
    return [int(token) for token in first[:end]]


async def history_tokens(
    counter: PromptCounter, chat: Mapping[str, Any], reply: Mapping[str, Any]
) -> Tokens:
    """The tokens that the next turn begins with, whatever the user or the called tool says.

    Args:
        counter: counts with the engine's template and tokenizer.
        chat: the chat body that was answered.
        reply: the answer, as its client will send it back.

    Raises:
        EngineError: the engine refuses to render it or can't be reached.
    """
    one, other = _PROBES
    if calls := reply.get("tool_calls"):
        result = {"role": "tool", "tool_call_id": calls[0].get("id", "")}
        one, other = ([{**result, "content": probe[0]["content"]}] for probe in _PROBES)
    first = await counter.count(_with_turns(chat, [dict(reply), *one]))
    second = await counter.count(_with_turns(chat, [dict(reply), *other]))
    return first[: common_tokens(first, second)]


async def _earlier(counter: PromptCounter, static: Mapping[str, Any]) -> Tokens | None:
    """A prompt with an earlier turn; None where the template refuses one."""
    try:
        return await counter.count(_with_turns(static, _EARLIER_TURN))
    except EngineDownError:
        raise
    except EngineRefusedError:
        return None


def _with_turns(static: Mapping[str, Any], turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    request = {key: static[key] for key in SHAPING if static.get(key) is not None}
    request["messages"] = [*static["messages"], *turns]
    return request


def _leading(messages: object) -> list[Any]:
    out = []
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, Mapping) or message.get("role") not in SYSTEM_ROLES:
            break
        out.append(message)
    return out


def common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    return common_tokens(as_tokens(first), as_tokens(second))


def static_body(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The static part of a request in chat's terms; None where nothing is rendered."""
    if is_raw(body):
        return None
    return {**body, "messages": _leading(body["messages"])}


def rendered_from(body: Mapping[str, Any]) -> Mapping[str, Any] | str | None:
    """What a request's prompt is counted from: a chat body, or its text; None if neither."""
    if is_raw(body):
        prompt = body.get("prompt")
        return prompt if isinstance(prompt, str) else None
    return body
