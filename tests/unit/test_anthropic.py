"""The messages API over chat completions: requests, replies and streams, translated."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.api.message_reply import MessageStream, error_reply, message_reply
from keepwarm.api.messages import chat_request
from keepwarm.errors import RequestError

TOOL = {"name": "clock", "description": "The time.", "input_schema": {"type": "object"}}


def chunks(*deltas: dict[str, Any], finish: str = "stop") -> bytes:
    """A chat stream with the counts that llama-server sends in every event but the first."""
    out = b""
    events: list[dict[str, Any]] = [{"delta": delta, "finish_reason": None} for delta in deltas]
    events.append({"delta": {}, "finish_reason": finish})
    for number, choice in enumerate(events):
        event: dict[str, Any] = {"id": "c1", "choices": [choice]}
        if number:
            event["timings"] = {"cache_n": 900, "prompt_n": 7, "predicted_n": number}
        out += b"data: " + json.dumps(event).encode() + b"\n\n"
    return out + b"data: [DONE]\n\n"


def events_of(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: ")]


def test_a_request_becomes_the_chat_request_that_renders_the_same() -> None:
    body = {
        "model": "local",
        "max_tokens": 9,
        "system": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
        "tools": [TOOL],
        "tool_choice": {"type": "any"},
        "stop_sequences": ["END"],
        "top_k": 5,
        "messages": [
            {"role": "user", "content": "What time is it?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me look."},
                    {"type": "tool_use", "id": "t1", "name": "clock", "input": {"zone": "X"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "noon"},
                    {"type": "text", "text": "And there?"},
                ],
            },
        ],
    }
    chat = chat_request(body)
    call = {"id": "t1", "type": "function"}
    call |= {"function": {"name": "clock", "arguments": '{"zone": "X"}'}}  # type: ignore[dict-item]
    assert chat["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "noon"},
        {"role": "user", "content": "And there?"},
    ]
    function = {"name": "clock", "description": "The time.", "parameters": {"type": "object"}}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert (chat["tool_choice"], chat["stop"], chat["top_k"]) == ("required", ["END"], 5)
    assert "system" not in chat
    assert "stop_sequences" not in chat


def test_an_image_goes_along_as_a_data_url() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is it?"}]
    (message,) = chat_request({"messages": [{"role": "user", "content": content}]})["messages"]
    assert message["content"][0] == {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64,AAAA"},
    }


def test_a_reply_with_text_and_a_call_has_both_as_blocks() -> None:
    call = {"id": "t1", "function": {"name": "clock", "arguments": '{"zone": "X"}'}}
    said = {"content": "Let me look.", "tool_calls": [call]}
    chat = {
        "id": "c1",
        "choices": [{"message": said, "finish_reason": "tool_calls"}],
        "usage": {
            "prompt_tokens": 907,
            "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 900},
        },
    }
    reply = message_reply(chat, model="local")
    assert reply["content"] == [
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "t1", "name": "clock", "input": {"zone": "X"}},
    ]
    assert reply["stop_reason"] == "tool_use"
    assert reply["usage"]["cache_read_input_tokens"] == 900
    assert reply["usage"]["input_tokens"] == 7


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_a_stream_cut_anywhere_gives_the_same_events(cut: int) -> None:
    raw = chunks(
        {"role": "assistant", "content": None},
        {"reasoning_content": "Hm."},
        {"content": "Let "},
        {"content": "me look."},
        {"tool_calls": [{"index": 0, "id": "t1", "function": {"name": "clock"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"zone": "X"}'}}]},
        finish="tool_calls",
    )
    stream = MessageStream("local")
    out = b"".join(stream.feed(raw[i : i + cut]) for i in range(0, len(raw), cut)) + stream.end()
    events = events_of(out)
    assert [e["type"] for e in events] == [
        "message_start",
        *("content_block_start", "content_block_delta", "content_block_delta"),  # and signed
        "content_block_stop",
        *("content_block_start", "content_block_delta", "content_block_delta"),
        "content_block_stop",
        *("content_block_start", "content_block_delta", "content_block_stop"),
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] == 900
    assert [e["index"] for e in events if e["type"] == "content_block_start"] == [0, 1, 2]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] == 6


@pytest.mark.parametrize("word", ["END", "", None])
def test_the_sequence_that_ended_a_reply_is_named_whole_and_streamed(word: str | None) -> None:
    more = {"stopping_word": word} if word is not None else {}
    expected = ("stop_sequence", word) if word else ("end_turn", None)
    choice = {"message": {"content": "a"}, "finish_reason": "stop"}
    reply = message_reply({"choices": [choice], "__verbose": more}, model="m")
    assert (reply["stop_reason"], reply["stop_sequence"]) == expected
    last = {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}], "__verbose": more}
    stream = MessageStream("m")
    out = stream.feed(f"data: {json.dumps(last)}\n\n".encode()) + stream.end()
    (delta,) = [e["delta"] for e in events_of(out) if e["type"] == "message_delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == expected


def test_an_error_in_the_stream_stays_an_error() -> None:
    stream = MessageStream("local")
    (event,) = events_of(stream.feed(b'data: {"error": {"message": "too long"}}\n\n'))
    assert event == error_reply("too long", status=500)


@given(
    st.dictionaries(
        st.sampled_from(["system", "messages", "tools", "tool_choice", "thinking", "stream"]),
        st.recursive(
            st.none() | st.text(max_size=5) | st.integers(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["role", "content", "type", "text", "source", "input"]),
                    inner,
                    max_size=3,
                )
            ),
            max_leaves=8,
        ),
    )
)
def test_no_request_of_whatever_types_makes_the_translation_fail(body: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError):
        assert "messages" in chat_request(body)
