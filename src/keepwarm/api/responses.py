"""OpenAI's responses API in chat's terms.

`chat_form` follows llama-server's own conversion (`server_chat_convert_responses_to_chatcmpl`)
step by step, so that what it returns renders to the tokens that the engine gets for the same body.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keepwarm.core.roles import SYSTEM_ROLES


def chat_form(body: Mapping[str, Any]) -> dict[str, Any]:
    """A mended responses body as the engine turns it into one of chat completions."""
    out = {key: value for key, value in body.items() if key not in ("input", "instructions")}
    messages: list[dict[str, Any]] = []
    if "instructions" in body:
        said = body["instructions"]
        messages.append({"role": "system", "content": said if isinstance(said, str) else ""})
    items = body.get("input")
    if isinstance(items, str):
        messages.append({"role": "user", "content": items})
    for item in items if isinstance(items, list) else ():
        if isinstance(item, Mapping):
            _add(messages, item)
    out["messages"] = messages
    if isinstance(body.get("tools"), list):
        del out["tools"]
        # Other kinds of tools have no equal in chat: the engine skips them.
        tools = [_chat_tool(tool) for tool in body["tools"] if _is_function(tool)]
        if tools:
            out["tools"] = tools
    if "max_output_tokens" in body:
        out["max_tokens"] = out.pop("max_output_tokens")
    if "reasoning" in body:
        reasoning = out.pop("reasoning")
        if isinstance(reasoning, Mapping) and "effort" in reasoning:
            out["reasoning_effort"] = reasoning["effort"]
    return out


def with_static(
    body: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any],
    *,
    without_opening: bool,
) -> dict[str, Any]:
    """A responses body with a tier's messages and tools (chat's) before its own.

    `without_opening`: its first system text is in those messages already.
    """
    own = body.get("input")
    items = [{"role": "user", "content": own}] if isinstance(own, str) else list(own or ())
    out = dict(body)
    if "instructions" in body:
        # The engine puts them first, before the tier's.
        said = {"role": "system", "content": out.pop("instructions")}
        items = [said, *items]
    if without_opening:
        items = items[1:]
    out["input"] = [*map(_message, messages), *items]
    if tools or body.get("tools"):
        flat = [{"type": "function", **tool["function"]} for tool in tools]
        out["tools"] = [*flat, *(body.get("tools") or ())]
    return out


def opens_with_system(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the first of these messages is the client's system text."""
    return bool(messages) and messages[0].get("role") in SYSTEM_ROLES


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    out = {"role": message["role"], "content": message["content"]}
    return {"type": "message", **out} if message["role"] == "assistant" else out


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """One item, put behind what came before: what an assistant does in a row is one message."""
    kind, role = item.get("type"), item.get("role")
    if kind == "function_call":
        call = {
            "function": {"arguments": item.get("arguments"), "name": item.get("name")},
            "id": item.get("call_id"),
            "type": "function",
        }
        _assistant(messages, {}).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = item.get("output")
        if isinstance(output, list):
            output = [{**part, "type": "text"} for part in _parts(output)]
        call_id = item.get("call_id")
        messages.append({"content": output, "role": "tool", "tool_call_id": call_id})
    elif kind == "reasoning":
        said = next(texts_of({"content": item.get("content")}), "")
        _assistant(messages, {"content": []})["reasoning_content"] = said
    elif role == "assistant":
        parts = [_assistant_part(part) for part in _parts(item.get("content"))]
        if messages and messages[-1]["role"] == "assistant":
            before = messages[-1].get("content")
            messages[-1]["content"] = [*(before if isinstance(before, list) else ()), *parts]
        else:
            messages.append({**_bare(item), "content": parts})
    else:
        parts = [_input_part(part) for part in _parts(item.get("content"))]
        messages.append({**_bare(item), "content": parts})


def _assistant(messages: list[dict[str, Any]], new: dict[str, Any]) -> dict[str, Any]:
    """The assistant's message at the end, a new one if somebody else spoke last."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", **new})
    return messages[-1]


def _bare(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("type", "status")}


def _parts(content: object) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}]
    return [p for p in content if isinstance(p, Mapping)] if isinstance(content, list) else []


def _assistant_part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part.get("type") == "refusal":
        return {"refusal": part.get("refusal"), "type": "refusal"}
    return {"text": part.get("text"), "type": "text"}


def _input_part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part.get("type") == "input_image":
        return {"image_url": {"url": part.get("image_url")}, "type": "image_url"}
    return {"text": part.get("text"), "type": "text"}


def _is_function(tool: object) -> bool:
    return isinstance(tool, Mapping) and tool.get("type") == "function"


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in tool.items() if key != "type"}
    function.setdefault("strict", True)
    return {"type": "function", "function": function}


def texts_of(value: object) -> Iterator[str]:
    """The texts of an item, in order."""
    if isinstance(value, Mapping):
        for key in ("summary", "content", "text", "output"):
            inner = value.get(key)
            if isinstance(inner, str):
                if inner:
                    yield inner
            elif inner is not None:
                yield from texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, str):
                yield inner
            else:
                yield from texts_of(inner)
