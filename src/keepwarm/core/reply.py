"""Read what a reply said: counts, text and tool calls, from JSON or a stream of server-sent events.

Bytes go to the client as they come; they are read here once, after the last one, so that nothing
is parsed between a token and its reader. Whatever an engine sends, reading it never fails: what has
another shape than it should is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from keepwarm.core.prompt import Segment, segment_of

# No model makes more calls in one reply; an index beyond it is garbage.
_MAX_CALLS = 512


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

    `calls` are the names of the tools it calls; `reasons` tells that reasoning came before text;
    `message` is what it said, as chat's message (None: nothing).
    """

    counts: Counts | None
    segment: Segment | None
    finish_reason: str | None = None
    error: str | None = None
    calls: tuple[str, ...] = ()
    reasons: bool = False
    message: Mapping[str, Any] | None = None


def read_reply(raw: bytes, *, streamed: bool) -> Reply:
    """Read a reply of any of the engine's APIs. Unreadable parts are left out, never raised."""
    events = list(stream_events(raw)) if streamed else _whole(raw)
    counts: Counts | None = None
    finish: str | None = None
    error: str | None = None
    said = _Said()
    for event in events:
        counts = counts_of(event) or counts
        if event.get("error"):
            error = msgspec.json.encode(event["error"]).decode()[:500]
        finish = _finish(event) or finish
        _add_chat(event, said)
        _add_responses(event, said)
    reasons = b'"reasoning_content":"' in raw
    calls = tuple(call.name for call in said.calls)
    if finish is None and (ended := _response_end(events[-1] if events else {})):
        finish = "tool_calls" if calls and ended == "stop" else ended
    return Reply(counts, said.segment(), finish, error, calls, reasons, said.message())


def stream_events(raw: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, in order; anything else is skipped."""
    for line in raw.split(b"\n"):
        if line.startswith(b"data:"):
            event = _json(line[5:])
            if event:
                yield event


def counts_of(event: dict[str, Any]) -> Counts | None:
    """The counts in one JSON object: `timings` of llama-server, else `usage`."""
    timings = _dict(event.get("timings"))
    if "prompt_n" in timings:
        return Counts(
            cached=_count(timings.get("cache_n")),
            prefilled=_count(timings["prompt_n"]),
            decoded=_count(timings.get("predicted_n")),
            prefill_s=_number(timings.get("prompt_ms")) / 1e3,
            decode_s=_number(timings.get("predicted_ms")) / 1e3,
        )
    for holder in (event, event.get("response")):
        if usage := _dict(_dict(holder).get("usage")):
            return _usage_counts(usage)
    return None


def _usage_counts(usage: dict[str, Any]) -> Counts | None:
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    if not isinstance(details, dict):
        return None
    prompt = _count(usage.get("prompt_tokens", usage.get("input_tokens")))
    cached = min(_count(details.get("cached_tokens")), prompt)
    decoded = _count(usage.get("completion_tokens", usage.get("output_tokens")))
    return Counts(cached=cached, prefilled=prompt - cached, decoded=decoded) if prompt else None


def _finish(event: dict[str, Any]) -> str | None:
    for choice in _list(event.get("choices")):
        if reason := _text(_dict(choice).get("finish_reason")):
            return reason
    return None


def _response_end(event: dict[str, Any]) -> str | None:
    """How a reply of the responses API ended, in chat's terms, by its last object."""
    response = _dict(event.get("response")) or event
    if response.get("object") != "response":
        return None
    return {"completed": "stop", "incomplete": "length"}.get(_text(response.get("status")))


@dataclass(slots=True)
class _Call:
    name: str = ""
    arguments: str = ""
    id: str = ""


@dataclass(slots=True)
class _Said:
    """What the model has said so far."""

    text: str = ""
    reasoning: str = ""
    calls: list[_Call] = field(default_factory=list)

    def call(self, index: object) -> _Call:
        """The tool call with this index, begun if it is new; the next one without an index."""
        at = index if isinstance(index, int) and 0 <= index < _MAX_CALLS else len(self.calls)
        while len(self.calls) <= at:
            self.calls.append(_Call())
        return self.calls[at]

    def segment(self) -> Segment | None:
        """It as the client will send it back; None if nothing was said."""
        if not self.text and not self.calls:
            return None
        calls = [{"function": {"name": c.name, "arguments": c.arguments}} for c in self.calls]
        return segment_of({"role": "assistant", "content": self.text, "tool_calls": calls})

    def message(self) -> dict[str, Any] | None:
        """It as a message of chat's, its reasoning too; None if nothing was said."""
        if not (self.text or self.calls or self.reasoning):
            return None
        out: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            out["reasoning_content"] = self.reasoning
        if self.calls:
            out["tool_calls"] = [
                {
                    "id": c.id,
                    "type": "function",
                    "function": {"name": c.name, "arguments": c.arguments},
                }
                for c in self.calls
            ]
        return out


def _add_chat(event: dict[str, Any], said: _Said) -> None:
    """OpenAI chat (whole or delta), completions, and llama-server's own `/completion`."""
    if "choices" not in event and "tokens_cached" in event:
        said.text += _text(event.get("content"))
        return
    # Several choices (`n`) go on from one prompt; the slot keeps the first.
    choices = map(_dict, _list(event.get("choices")))
    choice = next((c for c in choices if c.get("index", 0) == 0), {})
    part = _dict(choice.get("delta")) or _dict(choice.get("message")) or choice
    said.text += _text(part.get("content")) or _text(part.get("text"))
    said.reasoning += _text(part.get("reasoning_content"))
    for item in _list(part.get("tool_calls")):
        function = _dict(_dict(item).get("function"))
        call = said.call(_dict(item).get("index"))
        call.id = call.id or _text(_dict(item).get("id"))
        call.name += _text(function.get("name"))
        call.arguments += _text(function.get("arguments"))


def _add_responses(event: dict[str, Any], said: _Said) -> None:
    """OpenAI responses: the finished object holds all the output."""
    done = event
    if event.get("type") == "response.completed":
        done = _dict(event.get("response"))
    for item in map(_dict, _list(done.get("output"))):
        if item.get("type") == "message":
            for part in map(_dict, _list(item.get("content"))):
                said.text += _text(part.get("text"))
        elif item.get("type") == "reasoning":
            for part in map(_dict, _list(item.get("content"))):
                said.reasoning += _text(part.get("text"))
        elif item.get("type") == "function_call":
            named = (_text(item.get(key)) for key in ("name", "arguments", "call_id"))
            said.calls.append(_Call(*named))


def _whole(raw: bytes) -> list[dict[str, Any]]:
    """A reply's object; to several prompts at once, one each, of which the slot keeps the last."""
    value = _decoded(raw)
    return [_dict(item) for item in (_list(value)[-1:] or [value])]


def _json(raw: bytes) -> dict[str, Any]:
    return _dict(_decoded(raw))


def _decoded(raw: bytes) -> object:
    try:
        return msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        return None


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object) -> float:
    """A finite number that isn't negative; 0 for anything else."""
    good = isinstance(value, int | float) and 0 <= value < 1e15
    return float(value) if good else 0.0  # type: ignore[arg-type]


def _count(value: object) -> int:
    return int(_number(value))
