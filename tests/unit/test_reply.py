"""What is read from replies of all APIs, whole and streamed, and from garbage."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.prompt import Segment
from keepwarm.core.reply import Counts, read_reply

TIMINGS = {
    "cache_n": 900,
    "prompt_n": 7,
    "prompt_ms": 35.0,
    "predicted_n": 4,
    "predicted_ms": 80.0,
}
COUNTS = Counts(cached=900, prefilled=7, decoded=4, prefill_s=0.035, decode_s=0.08)
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone":"X"}'}}


def sse(*events: Any) -> bytes:
    lines = [f"data: {e if isinstance(e, str) else json.dumps(e)}\n\n" for e in events]
    return "".join(lines).encode()


def named(*events: dict[str, Any]) -> bytes:
    """Events as Anthropic names them."""
    return "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events).encode()


def test_a_whole_chat_reply_gives_its_counts_and_what_was_said() -> None:
    message = {"role": "assistant", "content": "It is noon. "}
    body = {"choices": [{"message": message, "finish_reason": "stop"}], "timings": TIMINGS}
    reply = read_reply(json.dumps(body).encode(), streamed=False)
    assert reply.counts == COUNTS
    assert reply.counts.prompt == 907
    assert reply.segment == Segment("assistant", "It is noon.")
    assert reply.finish_reason == "stop"


def test_a_streamed_chat_reply_reads_as_the_whole_one() -> None:
    def delta(**changes: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": changes, "finish_reason": None}]}

    raw = sse(
        delta(role="assistant", content=None),
        delta(content="It is "),
        delta(content="noon."),
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": TIMINGS},
        "[DONE]",
    )
    reply = read_reply(raw, streamed=True)
    assert (reply.counts, reply.finish_reason) == (COUNTS, "stop")
    assert reply.segment == Segment("assistant", "It is noon.")


def test_of_several_replies_in_one_stream_the_first_is_what_the_slot_keeps() -> None:
    def said(index: int, text: str) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": None}]}

    raw = sse(said(1, "Ten."), said(0, "It is "), said(1, " Perhaps."), said(0, "noon."))
    assert read_reply(raw, streamed=True).segment == Segment("assistant", "It is noon.")


def test_of_the_replies_to_several_prompts_the_last_is_what_the_slot_keeps() -> None:
    replies = [
        {"content": text, "tokens_cached": 9, "timings": TIMINGS} for text in ("No.", "Yes.")
    ]
    reply = read_reply(json.dumps(replies).encode(), streamed=False)
    assert (reply.counts, reply.segment) == (COUNTS, Segment("assistant", "Yes."))


def test_tool_calls_read_alike_whole_and_in_pieces() -> None:
    whole = {"choices": [{"message": {"content": None, "tool_calls": [CALL, CALL]}}]}

    def piece(index: int, **function: str) -> dict[str, Any]:
        call = {"index": index, "function": function}
        return {"choices": [{"delta": {"tool_calls": [call]}}]}

    pieces = []
    for index in (0, 1):
        pieces += [piece(index, name="clock"), piece(index, arguments='{"zo')]
        pieces += [piece(index, arguments='ne":"X"}')]
    first = read_reply(json.dumps(whole).encode(), streamed=False).segment
    second = read_reply(sse(*pieces), streamed=True).segment
    assert first is not None
    assert first == second
    assert first.extra.count("clock") == 2


def test_a_completion_is_read_in_both_of_its_shapes() -> None:
    own = {"content": "Paris.", "tokens_cached": 911, "timings": TIMINGS}
    openai = {"choices": [{"text": "Paris.", "finish_reason": "length"}], "timings": TIMINGS}
    for body in (own, openai):
        reply = read_reply(json.dumps(body).encode(), streamed=False)
        assert reply.counts == COUNTS
        assert reply.segment == Segment("assistant", "Paris.")


def test_a_response_gives_counts_text_and_function_calls() -> None:
    usage = {
        "input_tokens": 907,
        "output_tokens": 4,
        "input_tokens_details": {"cached_tokens": 900},
    }
    output = [
        {"type": "reasoning", "summary": []},
        {"type": "message", "content": [{"type": "output_text", "text": "Noon."}]},
        {"type": "function_call", "name": "clock", "arguments": '{"zone": "X"}'},
    ]
    done = {"object": "response", "output": output, "usage": usage}
    whole = read_reply(json.dumps(done).encode(), streamed=False)
    assert whole.counts == Counts(cached=900, prefilled=7, decoded=4)
    assert whole.segment is not None
    assert whole.segment.text == "Noon."
    assert '"zone":"X"' in whole.segment.extra
    streamed = named(
        {"type": "response.created", "response": {"output": []}},
        {"type": "response.output_text.delta", "delta": "Noon."},
        {"type": "response.completed", "response": done},
    )
    assert read_reply(streamed, streamed=True) == whole


def test_usage_stands_in_where_there_are_no_timings() -> None:
    usage = {
        "prompt_tokens": 907,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 900},
    }
    reply = read_reply(json.dumps({"choices": [], "usage": usage}).encode(), streamed=False)
    assert reply.counts == Counts(cached=900, prefilled=7, decoded=4)
    assert reply.segment is None


def test_an_error_in_a_stream_is_kept_and_gives_no_counts() -> None:
    reply = read_reply(sse({"error": {"message": "context full"}}), streamed=True)
    assert reply.counts is None
    assert reply.segment is None
    assert reply.error is not None
    assert "context full" in reply.error


@pytest.mark.parametrize("index", [10**9, -1, "0", None, 1.5])
def test_an_absurd_tool_call_index_costs_nothing(index: object) -> None:
    call = {"index": index, "function": {"name": "clock"}}
    reply = read_reply(sse({"choices": [{"delta": {"tool_calls": [call]}}]}), streamed=True)
    assert reply.segment is None or len(reply.segment.extra) < 1000


_WORDS = st.sampled_from(
    """choices delta message content tool_calls function name arguments index timings cache_n
    prompt_n prompt_ms predicted_n usage type prompt_tokens prompt_tokens_details cached_tokens
    input_tokens response cache_read_input_tokens output content_block text tool_use partial_json
    content_block_start content_block_delta response.completed function_call input error
    stop_reason finish_reason tokens_cached message_start""".split()  # noqa: SIM905 - as a list it would take forty lines
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(_JSON, min_size=1, max_size=3))
def test_no_shape_of_json_makes_reading_fail(events: list[Any]) -> None:
    read_reply(sse(*(json.dumps(e) for e in events)), streamed=True)
    read_reply(json.dumps(events[0]).encode(), streamed=False)


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_make_reading_fail(raw: bytes, streamed: bool) -> None:
    assert read_reply(raw, streamed=streamed).counts is None
    read_reply(b"data: " + raw + b"\n\ndata: {" + raw, streamed=True)


def test_deeply_nested_json_is_left_out() -> None:
    assert read_reply(b"[" * 200_000, streamed=False).counts is None
