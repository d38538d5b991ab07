"""A whole chat completion from the events of a streamed one.

llama-server computes a whole reply to its end even when its client has left; only a stream is
broken off (tried with builds b11434 and b11549). So Keepwarm asks for a stream and puts it
together for clients that want the reply whole, in the shape the engine would have given it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# What the engine says besides (`verbose`); in a stream its content is empty.
_MORE = "__verbose"
# As the engine orders them.
_META = ("created", "model", "system_fingerprint", "object", "usage", "id", "timings")


def gather_chat(events: Iterable[Mapping[str, Any]], *, opening: str = "") -> dict[str, Any] | None:
    """Put the events of a `chat.completion.chunk` stream together.

    Args:
        events: in order.
        opening: the client's own words that the reply goes on from; a whole reply begins with them,
            a stream doesn't.

    Returns:
        The completion; what holds `error`, if the stream ended in one; None if it isn't complete.
    """
    choices: dict[int, dict[str, Any]] = {}
    meta: dict[str, Any] = {}
    for event in events:
        if event.get("error"):
            return {"error": event["error"]}
        meta |= {key: value for key, value in event.items() if key != "choices"}
        listed = event.get("choices")
        for part in listed if isinstance(listed, list) else []:
            _add(choices, part)
    if not choices or any(choice["finish_reason"] is None for choice in choices.values()):
        return None
    meta["object"] = "chat.completion"
    ordered = [choices[index] for index in sorted(choices)]
    told, first = meta.get(_MORE), ordered[0]["message"]
    if isinstance(told, Mapping) and len(ordered) == 1 and set(first) == {"role", "content"}:
        # Nothing was parsed out of it, so this is what the model wrote.
        meta[_MORE] = {**told, "content": first["content"]}
    for choice in ordered if opening else ():
        choice["message"]["content"] = opening + (choice["message"]["content"] or "")
    whole: dict[str, Any] = {"choices": ordered}
    whole |= {key: meta.pop(key) for key in _META if key in meta}
    return whole | {key: value for key, value in meta.items() if key != "prompt_progress"}


def _add(choices: dict[int, dict[str, Any]], part: Mapping[str, Any]) -> None:
    index = int(part.get("index") or 0)
    if index not in choices:
        message = {"role": "assistant", "content": ""}
        choices[index] = {"finish_reason": None, "index": index, "message": message}
    choice = choices[index]
    choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    for key, value in (part.get("delta") or {}).items():
        if key == "tool_calls":
            for call in value or []:
                _add_call(choice["message"].setdefault("tool_calls", []), call)
        elif isinstance(value, str) and key != "role":
            choice["message"][key] = choice["message"].get(key, "") + value
        elif value is not None:
            choice["message"][key] = value
    logprobs = part.get("logprobs")
    if isinstance(logprobs, Mapping):
        known = choice.setdefault("logprobs", {"content": []})
        known["content"] += logprobs.get("content") or []


def _add_call(calls: list[dict[str, Any]], part: Mapping[str, Any]) -> None:
    """One piece of a tool call: its name and id come first, its arguments bit by bit."""
    index = part.get("index")
    if not isinstance(index, int) or not 0 <= index < len(calls):
        # A new one. The engine numbers them without gaps.
        calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        index = len(calls) - 1
    call = calls[index]
    function = part.get("function") or {}
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""
    call |= {key: value for key, value in part.items() if key not in ("index", "function")}
