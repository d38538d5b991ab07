"""Read what a reply said: counts, text and tool calls, from JSON or a stream of server-sent events.

Bytes go to the client as they come; they are read here once, after the last one, so that nothing
is parsed between a token and its reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from keepwarm.core.prompt import Segment, segment_of


@dataclass(frozen=True, slots=True)
class Counts:
    """The engine's own counts of one reply, in tokens and seconds.

    `cached` + `prefilled` is the length of the prompt; `decoded` the tokens generated.
    """

    cached: int
    prefilled: int
    decoded: int
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prompt(self) -> int:
        """Tokens of the whole prompt."""
        return self.cached + self.prefilled


@dataclass(frozen=True, slots=True)
class Reply:
    """What is known of a reply, finished or not; `counts` is None if the engine didn't say.

    `calls` are the names of the tools it calls; `reasons` tells that reasoning came before text.
    """

    counts: Counts | None
    segment: Segment | None
    finish_reason: str | None = None
    error: str | None = None
    calls: tuple[str, ...] = ()
    reasons: bool = False


def read_reply(raw: bytes, *, streamed: bool) -> Reply:
    """Read a whole reply body of any of the APIs. Unreadable parts are left out, never raised."""
    events = list(stream_events(raw)) if streamed else [_json(raw)]
    counts: Counts | None = None
    finish: str | None = None
    error: str | None = None
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    reasons = b'"reasoning_content":"' in raw or b'"thinking_delta"' in raw
    for event in events:
        counts = counts_of(event) or counts
        if "error" in event:
            error = json.dumps(event["error"])[:500]
        finish = _finish(event) or finish
        _add_chat(event, message)
        _add_messages(event, message)
        _add_responses(event, message)
    said = bool(message["content"] or message["tool_calls"])
    calls = tuple(call["function"]["name"] for call in message["tool_calls"])
    segment = segment_of(message) if said else None
    return Reply(counts, segment, finish, error, calls, reasons)


def stream_events(raw: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, in order; anything else is skipped."""
    for line in raw.split(b"\n"):
        if line.startswith(b"data:"):
            event = _json(line[5:])
            if event:
                yield event


def counts_of(event: dict[str, Any]) -> Counts | None:
    """The counts in one JSON object: `timings` of llama-server, else `usage` of the three APIs."""
    timings = event.get("timings")
    if isinstance(timings, dict) and "prompt_n" in timings:
        return Counts(
            cached=int(timings.get("cache_n") or 0),
            prefilled=int(timings["prompt_n"]),
            decoded=int(timings.get("predicted_n") or 0),
            prefill_s=float(timings.get("prompt_ms") or 0) / 1e3,
            decode_s=float(timings.get("predicted_ms") or 0) / 1e3,
        )
    for holder in (event, event.get("message"), event.get("response")):
        usage = holder.get("usage") if isinstance(holder, dict) else None
        if isinstance(usage, dict):
            return _usage_counts(usage)
    return None


def _usage_counts(usage: dict[str, Any]) -> Counts | None:
    if "cache_read_input_tokens" in usage:
        return Counts(
            cached=int(usage["cache_read_input_tokens"] or 0),
            prefilled=int(usage.get("input_tokens") or 0),
            decoded=int(usage.get("output_tokens") or 0),
        )
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    if not isinstance(prompt, int) or not isinstance(details, dict):
        return None
    cached = int(details.get("cached_tokens") or 0)
    decoded = int(usage.get("completion_tokens", usage.get("output_tokens")) or 0)
    return Counts(cached=cached, prefilled=prompt - cached, decoded=decoded)


def _finish(event: dict[str, Any]) -> str | None:
    for choice in event.get("choices") or []:
        if isinstance(choice, dict) and choice.get("finish_reason"):
            return str(choice["finish_reason"])
    reason = (
        event.get("stop_reason") or (event.get("delta") or {}).get("stop_reason")
        if (isinstance(event.get("delta"), dict) or "stop_reason" in event)
        else None
    )
    return str(reason) if reason else None


def _add_chat(event: dict[str, Any], message: dict[str, Any]) -> None:
    """OpenAI chat (whole or delta) and completions."""
    choices = event.get("choices")
    if (
        isinstance(event.get("content"), str)
        and "choices" not in event
        and "tokens_cached" in event
    ):
        message["content"] += event["content"]
        return
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return
    part = choices[0].get("delta") or choices[0].get("message") or choices[0]
    message["content"] += part.get("content") or part.get("text") or ""
    for call in part.get("tool_calls") or []:
        function = call.get("function") or {}
        index = call.get("index", len(message["tool_calls"]))
        while len(message["tool_calls"]) <= index:
            message["tool_calls"].append({"function": {"name": "", "arguments": ""}})
        known = message["tool_calls"][index]["function"]
        known["name"] += function.get("name") or ""
        known["arguments"] += function.get("arguments") or ""


def _add_messages(event: dict[str, Any], message: dict[str, Any]) -> None:
    """Anthropic messages: content blocks whole, or started and added to."""
    kind = event.get("type")
    blocks = event.get("content") if kind == "message" else None
    if kind == "content_block_start":
        blocks = [event.get("content_block")]
    for block in blocks if isinstance(blocks, list) else []:
        if not isinstance(block, dict):
            continue
        message["content"] += block.get("text") or ""
        if block.get("type") == "tool_use":
            arguments = json.dumps(block["input"]) if block.get("input") else ""
            call = {"name": block.get("name") or "", "arguments": arguments}
            message["tool_calls"].append({"function": call})
    if kind == "content_block_delta":
        delta = event.get("delta") or {}
        message["content"] += delta.get("text") or ""
        if delta.get("partial_json") and message["tool_calls"]:
            message["tool_calls"][-1]["function"]["arguments"] += delta["partial_json"]


def _add_responses(event: dict[str, Any], message: dict[str, Any]) -> None:
    """OpenAI responses: the finished object holds all the output."""
    done = event.get("response") if event.get("type") == "response.completed" else event
    if not isinstance(done, dict) or not isinstance(done.get("output"), list):
        return
    for item in done["output"]:
        if item.get("type") == "message":
            for part in item.get("content") or []:
                message["content"] += part.get("text") or ""
        elif item.get("type") == "function_call":
            call = {"name": item.get("name") or "", "arguments": item.get("arguments") or ""}
            message["tool_calls"].append({"function": call})


def _json(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
