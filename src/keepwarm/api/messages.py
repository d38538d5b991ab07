"""The Anthropic messages API, as chat completions.

llama-server serves `/v1/messages` itself but drops `id_slot` there (upstream PR #28554), so a
request could not be given its warm slot, and with several tenants it might be given another's. So
Keepwarm translates: requests to chat completions here, replies back in `message_reply`. What a
request renders to is the same either way, and one prefix serves both APIs.

Pure. Shapes follow Anthropic's API reference and llama-server's own conversion; where that drops
what a client sent, its text goes on as text, and what can't be served is an error that names the
block. Unknown fields of a request are passed on, so that samplers and template arguments work.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from keepwarm.errors import RequestError

# Anthropic's API requires it; llama-server falls back to the same number.
_DEFAULT_MAX_TOKENS = 4096
_TRANSLATED = frozenset(
    (
        *("system", "messages", "tools", "tool_choice", "stop_sequences", "thinking", "metadata"),
        *("output_config", "output_format", "context_management"),
    )
)
_TOOL_CHOICES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
# Templates that print an effort know these three.
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
# What of a block says nothing to a model: marks for caches, and text that only its maker reads.
_UNSAID = frozenset(
    ("cache_control", "encrypted_content", "encrypted_index", "signature", "id", "tool_use_id")
)
# Blocks without anything for this model, left out as a cache's marks are.
_EMPTY = frozenset(("redacted_thinking", "fallback"))
_TEXT_TYPES = ("text/", "application/json", "application/xml")


def chat_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """A messages request as a chat completions request.

    Wrong types outside of blocks are passed on as they are: the engine tells the client what is
    wrong.

    Raises:
        RequestError: a block can't be served; it is named.
    """
    out = {key: value for key, value in body.items() if key not in _TRANSLATED}
    out.setdefault("max_tokens", _DEFAULT_MAX_TOKENS)
    messages: list[Any] = []
    if body.get("system"):
        messages.append({"role": "system", "content": _system(body["system"], "system")})
    listed = body.get("messages")
    if isinstance(listed, list):
        for index, message in enumerate(listed):
            is_message = isinstance(message, Mapping)
            messages += _chat_messages(message, f"messages[{index}]") if is_message else [message]
    out["messages"] = messages if isinstance(listed, list) else listed
    if isinstance(body.get("tools"), list):
        out["tools"] = [_chat_tool(tool) for tool in body["tools"]]
    _choose(out, body.get("tool_choice"))
    if body.get("stop_sequences"):
        # Which of them ended the reply stands in what the engine says more of it.
        out |= {"stop": body["stop_sequences"], "verbose": True}
    _think(out, body.get("thinking"))
    _form(out, body)
    if out.get("stream"):
        # Counts in the first event, where Anthropic's stream has them.
        out["timings_per_token"] = True
    return out


def _choose(out: dict[str, Any], choice: object) -> None:
    """Which tool is to be called, if any."""
    if not isinstance(choice, Mapping):
        return
    kind = choice.get("type")
    out["tool_choice"] = _TOOL_CHOICES.get(str(kind), "auto")
    if choice.get("disable_parallel_tool_use"):
        out["parallel_tool_calls"] = False
    if kind == "tool":
        # The engine can be told to call a tool, not which: so it is offered no other.
        named = [t for t in out.get("tools") or () if _name(t) == choice.get("name")]
        if not named:
            raise RequestError(
                f"tool_choice: there is no tool {str(choice.get('name'))[:80]!r} among the tools."
            )
        out["tools"] = named


def _name(tool: object) -> object:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else None


def _think(out: dict[str, Any], thinking: object) -> None:
    """Whether and how long to think; `adaptive` leaves it to the model, as its template does."""
    kind = thinking.get("type") if isinstance(thinking, Mapping) else None
    if isinstance(thinking, Mapping) and kind == "enabled":
        out["thinking_budget_tokens"] = thinking.get("budget_tokens", -1)
    if kind == "disabled":
        own = out.get("chat_template_kwargs")
        own = own if isinstance(own, Mapping) else {}
        out["chat_template_kwargs"] = {"enable_thinking": False, **own}


def _form(out: dict[str, Any], body: Mapping[str, Any]) -> None:
    """The form of the answer, and the effort put into it."""
    config = body.get("output_config")
    config = config if isinstance(config, Mapping) else {}
    form = config.get("format") or body.get("output_format")
    if isinstance(form, Mapping) and form.get("type") == "json_schema":
        schema = {"name": form.get("name", "answer"), "schema": form.get("schema")}
        out["response_format"] = {"type": "json_schema", "json_schema": schema}
    effort = config.get("effort")
    if isinstance(effort, str) and effort in _EFFORTS:
        out.setdefault("reasoning_effort", _EFFORTS[effort])


def _system(content: object, where: str) -> object:
    """Text of a system prompt that may come as blocks."""
    if not isinstance(content, list):
        return content
    texts = [_texts(block, f"{where}[{i}]") for i, block in enumerate(content)]
    return "".join(texts)


@dataclass(slots=True)
class _Turn:
    """What the blocks of one message come to."""

    parts: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    reasoning: str = ""


def _chat_messages(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """One message; tool results become messages of their own, before what else the user says."""
    role, content = message.get("role"), message.get("content")
    if content is None:
        return [{"role": role, "content": ""}]
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    if not content:
        return []  # as the engine does: an assistant's would be gone on from
    turn = _Turn()
    for index, block in enumerate(content):
        _take(turn, block, f"{where}.content[{index}]")
    out = list(turn.results)
    if turn.parts or turn.calls or turn.reasoning or not turn.results:
        own: dict[str, Any] = {"role": role, "content": _content(turn.parts)}
        if turn.calls:
            own["tool_calls"] = turn.calls
        if turn.reasoning:
            own["reasoning_content"] = turn.reasoning
        out.append(own)
    return out


def _take(turn: _Turn, block: object, where: str) -> None:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if isinstance(block, Mapping) and kind == "tool_use":
        arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
        function = {"name": block.get("name"), "arguments": arguments}
        turn.calls.append({"id": block.get("id"), "type": "function", "function": function})
    elif isinstance(block, Mapping) and kind == "tool_result":
        turn.results.append(
            {
                "role": "tool",
                "tool_call_id": block.get("tool_use_id"),
                "content": _result(block.get("content"), f"{where}.content"),
            }
        )
    elif isinstance(block, Mapping) and kind == "thinking":
        turn.reasoning += str(block.get("thinking") or "")
    else:
        turn.parts += _parts(block, where)


def _result(content: object, where: str) -> str | list[dict[str, Any]]:
    """A tool's result: one text, or parts where there are pictures."""
    blocks = content if isinstance(content, list) else [] if content is None else [content]
    parts = [part for i, block in enumerate(blocks) for part in _parts(block, f"{where}[{i}]")]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _content(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Plain text where there is nothing but one text: templates treat that alike."""
    if not parts:
        return ""
    if len(parts) == 1 and parts[0]["type"] == "text":
        return str(parts[0]["text"])
    return parts


def _texts(block: object, where: str) -> str:
    parts = list(_parts(block, where))
    for part in parts:
        if part["type"] != "text":
            raise RequestError(f"{where}: a system prompt can't hold a picture.")
    return "".join(part["text"] for part in parts)


def _parts(block: object, where: str) -> Iterator[dict[str, Any]]:
    """A block as parts of a chat message: texts and pictures.

    Raises:
        RequestError: it can't be served.
    """
    if isinstance(block, str):
        yield {"type": "text", "text": block}
        return
    if not isinstance(block, Mapping):
        raise RequestError(f"{where} must be a block.")
    kind = block.get("type")
    if kind == "text" or (kind is None and "text" in block):
        text = block.get("text")
        yield {"type": "text", "text": text if isinstance(text, str) else ""}
    elif kind == "image":
        yield {"type": "image_url", "image_url": {"url": _image_url(block, where)}}
    elif kind in ("document", "search_result"):
        yield from _wrapped(str(kind), block, where)
    elif kind == "tool_reference":
        yield {"type": "text", "text": str(block.get("tool_name") or "")}
    elif kind == "thinking":
        yield {"type": "text", "text": str(block.get("thinking") or "")}
    elif kind == "container_upload" or not isinstance(kind, str):
        raise RequestError(f"{where}: a block of type {str(kind)[:40]!r} can't be served here.")
    elif kind not in _EMPTY:
        yield from _told(kind, block, where)


def _told(kind: str, block: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """A block that only Anthropic's servers make (searches, code they ran): what it says, as JSON.

    Raises:
        RequestError: it says nothing, or isn't known.
    """
    said = _said({key: value for key, value in block.items() if key != "type"})
    if not said:
        raise RequestError(f"{where}: a block of type {kind[:40]!r} can't be served here.")
    text = json.dumps(said, ensure_ascii=False, default=str)
    yield {"type": "text", "text": f"<{kind}>{text}</{kind}>"}


def _said(value: object) -> Any:
    if isinstance(value, Mapping):
        inner = {k: _said(v) for k, v in value.items() if k not in _UNSAID}
        return {key: one for key, one in inner.items() if one not in (None, "", [], {})}
    if isinstance(value, list):
        return [one for one in map(_said, value) if one not in (None, "", [], {})]
    return value


def _wrapped(kind: str, block: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """A document or a search's result: its text between marks that name it."""
    named = [f' {key}="{block[key]}"' for key in ("title", "source") if _is_text(block.get(key))]
    inner: list[dict[str, Any]] = []
    if _is_text(block.get("context")):
        inner.append({"type": "text", "text": f"{block['context']}\n"})
    if kind == "document":
        inner += _document(block.get("source"), where)
    else:
        content = block.get("content")
        for index, one in enumerate(content if isinstance(content, list) else [content]):
            inner += _parts(one, f"{where}.content[{index}]")
    parts = [
        {"type": "text", "text": f"<{kind}{''.join(named)}>\n"},
        *inner,
        {"type": "text", "text": f"\n</{kind}>"},
    ]
    if all(part["type"] == "text" for part in parts):
        parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
    yield from parts


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _document(source: object, where: str) -> Iterator[dict[str, Any]]:
    source = source if isinstance(source, Mapping) else {}
    kind, data = source.get("type"), source.get("data")
    media = str(source.get("media_type") or "text/plain")
    if kind == "text" and isinstance(data, str):
        yield {"type": "text", "text": data}
        return
    if kind == "content":
        content = source.get("content")
        for index, one in enumerate(content if isinstance(content, list) else [content]):
            yield from _parts(one, f"{where}.source.content[{index}]")
        return
    if kind == "base64" and isinstance(data, str) and media.startswith(_TEXT_TYPES):
        try:
            yield {"type": "text", "text": base64.b64decode(data).decode()}
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{where}: the document isn't base64 of UTF-8 text.") from error
        return
    if kind == "base64" and media.startswith("image/"):
        yield {"type": "image_url", "image_url": {"url": f"data:{media};base64,{data}"}}
        return
    what = media if kind == "base64" else f"source {str(kind)[:40]!r}"
    raise RequestError(f"{where}: a document ({what}) can't be read here; send its text.")


def _image_url(block: Mapping[str, Any], where: str) -> str:
    source = block.get("source")
    source = source if isinstance(source, Mapping) else {}
    kind = source.get("type")
    if kind == "base64" and isinstance(source.get("data"), str):
        return f"data:{source.get('media_type', 'image/jpeg')};base64,{source['data']}"
    if kind == "url" and isinstance(source.get("url"), str):
        return str(source["url"])
    raise RequestError(
        f"{where}: an image with source {str(kind)[:40]!r} can't be served here; send it as base64."
    )


def _chat_tool(tool: object) -> object:
    if not isinstance(tool, Mapping) or "function" in tool:
        return tool
    function = {"name": tool.get("name")}
    if tool.get("description"):
        function["description"] = tool["description"]
    function["parameters"] = tool.get("input_schema") or {}
    return {"type": "function", "function": function}
