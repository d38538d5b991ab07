"""A whole chat completion put together from a streamed one."""

from __future__ import annotations

from typing import Any

from keepwarm.api.reading import can_gather
from keepwarm.core.gathered import gather_chat

META = {"created": 5, "id": "chatcmpl-1", "model": "m", "system_fingerprint": "b1"}


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **more}
    return {"choices": [choice], "object": "chat.completion.chunk", **META}


OPENING = chunk({"role": "assistant", "content": None})
USAGE = {"completion_tokens": 2, "prompt_tokens": 9, "total_tokens": 11}
LAST = {
    "choices": [],
    "object": "chat.completion.chunk",
    **META,
    "usage": USAGE,
    "timings": {"cache_n": 4, "prompt_n": 5},
}


def test_text_is_joined_and_all_else_is_as_in_a_whole_reply() -> None:
    events = [OPENING, chunk({"content": "It is"}), chunk({"content": " noon."}), chunk({}, "stop")]
    whole = gather_chat([*events, LAST])
    assert whole == {
        "choices": [
            {
                "finish_reason": "stop",
                "index": 0,
                "message": {"role": "assistant", "content": "It is noon."},
            }
        ],
        **META,
        "object": "chat.completion",
        "usage": USAGE,
        "timings": {"cache_n": 4, "prompt_n": 5},
    }
    assert whole is not None
    assert list(whole) == [
        *("choices", "created", "model", "system_fingerprint", "object", "usage", "id", "timings"),
    ]


def test_logprobs_of_all_pieces_are_in_order() -> None:
    events = [
        chunk({"content": "a"}, logprobs={"content": [{"token": "a"}]}),
        chunk({"content": "b"}, logprobs={"content": [{"token": "b"}, {"token": "c"}]}),
        chunk({}, "length"),
    ]
    whole = gather_chat(events)
    assert whole is not None
    tokens = [t["token"] for t in whole["choices"][0]["logprobs"]["content"]]
    assert tokens == ["a", "b", "c"]


def test_tool_calls_are_joined_by_their_index() -> None:
    def piece(index: int, **call: Any) -> dict[str, Any]:
        return chunk({"tool_calls": [{"index": index, **call}]})

    events = [
        OPENING,
        chunk({"reasoning_content": "Two "}),
        chunk({"reasoning_content": "cities."}),
        piece(0, id="c0", type="function", function={"name": "clock", "arguments": ""}),
        piece(0, function={"arguments": '{"zone":'}),
        piece(0, function={"arguments": '"Rome"}'}),
        piece(1, id="c1", type="function", function={"name": "clock", "arguments": "{}"}),
        chunk({}, "tool_calls"),
    ]
    whole = gather_chat(events)
    assert whole is not None
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Two cities.",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "clock", "arguments": '{"zone":"Rome"}'},
                "id": "c0",
            },
            {"type": "function", "function": {"name": "clock", "arguments": "{}"}, "id": "c1"},
        ],
    }


def test_several_choices_are_kept_apart() -> None:
    def of(index: int, text: str, finish: str | None = None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"choices": [{"index": index, "delta": delta, "finish_reason": finish}], **META}

    whole = gather_chat([of(1, "b"), of(0, "a"), of(1, "", "stop"), of(0, "", "length")])
    assert whole is not None
    said = [(c["index"], c["message"]["content"], c["finish_reason"]) for c in whole["choices"]]
    assert said == [(0, "a", "length"), (1, "b", "stop")]


def test_what_the_engine_says_besides_has_the_whole_text() -> None:
    last = {**chunk({}, "stop"), "__verbose": {"content": "", "stopping_word": "x"}}
    events = [chunk({"content": "It "}), chunk({"content": "is."}), last]
    whole = gather_chat(events, opening="So: ")
    assert whole is not None
    assert whole["choices"][0]["message"]["content"] == "So: It is."
    assert whole["__verbose"] == {"content": "It is.", "stopping_word": "x"}


def test_an_error_in_the_stream_is_all_that_is_told() -> None:
    error = {"code": 500, "message": "broken", "type": "server_error"}
    assert gather_chat([OPENING, {"error": error}]) == {"error": error}


def test_what_broke_off_isnt_a_reply() -> None:
    assert gather_chat([]) is None
    assert gather_chat([OPENING, chunk({"content": "It"})]) is None
    assert gather_chat([LAST]) is None


def test_what_the_engine_refuses_in_a_stream_isnt_asked_as_one() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert can_gather("chat", {"logprobs": True})
    assert can_gather("chat", {"tools": tools})
    assert not can_gather("chat", {"logprobs": True, "tools": tools})
