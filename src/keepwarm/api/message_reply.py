"""Replies, streams and errors of chat completions in the shapes of Anthropic's messages API.

Pure; shapes follow Anthropic's API reference (messages, streaming messages).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# Clients send thinking back as such only if it is signed; what is thought here needs no proof.
_SIGNATURE = "a2VlcHdhcm0="


def message_reply(chat: Mapping[str, Any], *, model: str) -> dict[str, Any]:
    """A whole chat completion as a message."""
    choice = next(iter(chat.get("choices") or [{}]))
    said = choice.get("message") or {}
    content: list[dict[str, Any]] = []
    if said.get("reasoning_content"):
        thinking = {
            "type": "thinking",
            "thinking": said["reasoning_content"],
            "signature": _SIGNATURE,
        }
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
    reason, sequence = _ending(choice.get("finish_reason"), chat)
    usage = chat.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "id": chat.get("id"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": {
            "input_tokens": usage.get("prompt_tokens", 0) - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.get("completion_tokens", 0),
        },
    }


def _ending(finish: object, event: Mapping[str, Any]) -> tuple[str, str | None]:
    """Why a reply ended, and the stop sequence that ended it."""
    told = event.get("__verbose")
    word = told.get("stopping_word") if isinstance(told, Mapping) else None
    if finish == "stop" and isinstance(word, str) and word:
        return "stop_sequence", word
    return _STOP_REASONS.get(str(finish), "end_turn"), None


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
    _stop_sequence: str | None = None
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
        delta: dict[str, str | None] = {"stop_reason": self._stop_reason or "end_turn"}
        delta["stop_sequence"] = self._stop_sequence
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
                self._stop_reason, self._stop_sequence = _ending(reason, event)
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
            start = {"type": "thinking", "thinking": "", "signature": ""}
            yield from self._block("thinking", start)
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
        if self._open == "thinking":
            yield self._add({"type": "signature_delta", "signature": _SIGNATURE})
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
