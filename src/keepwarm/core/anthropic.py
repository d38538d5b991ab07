"""The Anthropic messages API, spoken over chat completions.

llama-server serves `/v1/messages` itself but drops `id_slot` there (upstream PR #28554), so a
request could not be given its warm slot, and with several tenants it might be given another's. So
Keepwarm translates: requests to chat completions, replies and streams back. What a request renders
to is the same either way, and one prefix serves both APIs.

Pure. Shapes follow Anthropic's API reference (messages, streaming messages) as far as
llama-server's own `/v1/messages` does; unknown fields of a request are passed on, so that samplers
and template arguments work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Anthropic's API requires it; llama-server falls back to the same number.
_DEFAULT_MAX_TOKENS = 4096
_TRANSLATED = frozenset(
    ("system", "messages", "tools", "tool_choice", "stop_sequences", "thinking", "metadata")
)
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_TOOL_CHOICES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}


def chat_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """A messages request as a chat completions request.

    Wrong types are passed on as they are: the engine tells the client what is wrong.
    """
    out = {key: value for key, value in body.items() if key not in _TRANSLATED}
    out.setdefault("max_tokens", _DEFAULT_MAX_TOKENS)
    messages: list[Any] = []
    if body.get("system"):
        messages.append({"role": "system", "content": _joined(body["system"])})
    listed = body.get("messages")
    if isinstance(listed, list):
        for message in listed:
            messages += _chat_messages(message) if isinstance(message, Mapping) else [message]
    out["messages"] = messages if isinstance(listed, list) else listed
    if isinstance(body.get("tools"), list):
        out["tools"] = [_chat_tool(tool) for tool in body["tools"]]
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping):
        out["tool_choice"] = _TOOL_CHOICES.get(str(choice.get("type")), "auto")
    if body.get("stop_sequences"):
        out["stop"] = body["stop_sequences"]
    thinking = body.get("thinking")
    if isinstance(thinking, Mapping) and thinking.get("type") == "enabled":
        out["thinking_budget_tokens"] = thinking.get("budget_tokens", -1)
    if out.get("stream"):
        # Counts in the first event, where Anthropic's stream has them.
        out["timings_per_token"] = True
    return out


def _joined(content: object) -> object:
    """Text of a system prompt that may come as blocks."""
    if not isinstance(content, list):
        return content
    return "".join(str(block.get("text", "")) for block in content if isinstance(block, Mapping))


def _chat_messages(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One message; tool results become messages of their own, before what else the user says."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    reasoning = ""
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text":
            parts.append({"type": "text", "text": block.get("text", "")})
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _image_url(block)}})
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            result = {"role": "tool", "tool_call_id": block.get("tool_use_id")}
            results.append({**result, "content": _result_text(block.get("content"))})
        elif kind == "thinking":
            reasoning += str(block.get("thinking", ""))
    out = list(results)
    if parts or calls or reasoning or not results:
        own: dict[str, Any] = {"role": role, "content": _content(parts)}
        if calls:
            own["tool_calls"] = calls
        if reasoning:
            own["reasoning_content"] = reasoning
        out.append(own)
    return out


def _content(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Plain text where there is nothing but one text: templates treat that alike."""
    if not parts:
        return ""
    if len(parts) == 1 and parts[0]["type"] == "text":
        return str(parts[0]["text"])
    return parts


def _image_url(block: Mapping[str, Any]) -> str:
    source = block.get("source") or {}
    if source.get("type") == "base64":
        return f"data:{source.get('media_type', 'image/jpeg')};base64,{source.get('data', '')}"
    return str(source.get("url", ""))


def _result_text(content: object) -> str:
    if isinstance(content, list):
        texts = (b.get("text", "") for b in content if isinstance(b, Mapping))
        return "".join(str(text) for text in texts)
    return "" if content is None else str(content)


def _chat_tool(tool: object) -> object:
    if not isinstance(tool, Mapping) or "function" in tool:
        return tool
    function = {"name": tool.get("name")}
    if tool.get("description"):
        function["description"] = tool["description"]
    function["parameters"] = tool.get("input_schema") or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def message_reply(chat: Mapping[str, Any], *, model: str) -> dict[str, Any]:
    """A whole chat completion as a message."""
    choice = next(iter(chat.get("choices") or [{}]))
    said = choice.get("message") or {}
    content: list[dict[str, Any]] = []
    if said.get("reasoning_content"):
        thinking = {"type": "thinking", "thinking": said["reasoning_content"], "signature": ""}
        content.append(thinking)
    if said.get("content"):
        content.append({"type": "text", "text": said["content"]})
    for call in said.get("tool_calls") or []:
        function = call.get("function") or {}
        content.append(
            {
                "type": "tool_use",
                "id": call.get("id"),
                "name": function.get("name"),
                "input": _arguments(function.get("arguments")),
            }
        )
    usage = chat.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "id": chat.get("id"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": _STOP_REASONS.get(str(choice.get("finish_reason")), "end_turn"),
        "stop_sequence": None,
        "usage": {
            "input_tokens": usage.get("prompt_tokens", 0) - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.get("completion_tokens", 0),
        },
    }


def _arguments(text: object) -> object:
    try:
        return json.loads(text) if isinstance(text, str) and text else {}
    except ValueError:
        return {}


def error_reply(message: str, *, status: int) -> dict[str, Any]:
    """An error in Anthropic's shape."""
    kinds = {
        400: "invalid_request_error",
        401: "authentication_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
    return {"type": "error", "error": {"type": kinds.get(status, "api_error"), "message": message}}


@dataclass(slots=True)
class MessageStream:
    """Translates a chat completion stream, event by event, as it comes.

    Feed it the bytes as they arrive, cut anywhere; it returns the bytes to send on. Exactly one
    content block is open at a time; `end` closes what is open.
    """

    model: str
    _rest: bytes = b""
    _begun: bool = False
    _open: str | None = None
    _index: int = -1
    _stop_reason: str | None = None
    _output_tokens: int = 0

    def feed(self, raw: bytes) -> bytes:
        """The events that these bytes complete, translated."""
        *lines, self._rest = (self._rest + raw).split(b"\n")
        out: list[bytes] = []
        for line in lines:
            if not line.startswith(b"data:") or line[5:].strip() in (b"", b"[DONE]"):
                continue
            try:
                event = json.loads(line[5:])
            except ValueError:
                continue
            if isinstance(event, dict):
                out += [_sse(translated) for translated in self._translate(event)]
        return b"".join(out)

    def end(self) -> bytes:
        """What closes the stream."""
        if not self._begun:
            return b""
        events = list(self._close())
        delta = {"stop_reason": self._stop_reason or "end_turn", "stop_sequence": None}
        usage = {"output_tokens": self._output_tokens}
        events.append({"type": "message_delta", "delta": delta, "usage": usage})
        events.append({"type": "message_stop"})
        return b"".join(map(_sse, events))

    def _translate(self, event: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "error" in event:
            error = event["error"]
            text = error.get("message", "") if isinstance(error, Mapping) else str(error)
            yield error_reply(str(text), status=500)
            return
        timings = event.get("timings") or {}
        self._output_tokens = timings.get("predicted_n", self._output_tokens)
        if not self._begun:
            if not timings and not _says_anything(event):
                return  # the role alone; the counts come with the first token
            self._begun = True
            yield {"type": "message_start", "message": self._message(event, timings)}
        for choice in event.get("choices") or []:
            yield from self._delta(choice.get("delta") or {})
            if reason := choice.get("finish_reason"):
                self._stop_reason = _STOP_REASONS.get(reason, "end_turn")
        self._output_tokens = (event.get("usage") or {}).get(
            "completion_tokens", self._output_tokens
        )

    def _message(self, event: dict[str, Any], timings: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": event.get("id"),
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "input_tokens": timings.get("prompt_n", 0),
                "cache_read_input_tokens": timings.get("cache_n", 0),
                "cache_creation_input_tokens": 0,
                "output_tokens": 0,
            },
        }

    def _delta(self, delta: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if text := delta.get("reasoning_content"):
            yield from self._block("thinking", {"type": "thinking", "thinking": ""})
            yield self._add({"type": "thinking_delta", "thinking": text})
        if text := delta.get("content"):
            yield from self._block("text", {"type": "text", "text": ""})
            yield self._add({"type": "text_delta", "text": text})
        for call in delta.get("tool_calls") or []:
            yield from self._call(call)

    def _call(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        function = call.get("function") or {}
        number = call.get("index", 0)
        block: dict[str, Any] = {
            "type": "tool_use",
            "id": call.get("id"),
            "name": function.get("name"),
            "input": {},
        }
        yield from self._block(f"call {number}", block)
        if function.get("arguments"):
            yield self._add({"type": "input_json_delta", "partial_json": function["arguments"]})

    def _block(self, name: str, start: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Begin a content block unless it is the one that is open."""
        if self._open == name:
            return
        yield from self._close()
        self._open = name
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": start}

    def _add(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
            self._open = None


def _says_anything(event: Mapping[str, Any]) -> bool:
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        if choice.get("finish_reason") or any(v for k, v in delta.items() if k != "role"):
            return True
    return False


def _sse(event: Mapping[str, Any]) -> bytes:
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode()
