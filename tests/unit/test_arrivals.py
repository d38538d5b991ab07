"""What becomes of a client's body before anything else reads it."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.api.arrival import Arrived, arrived
from keepwarm.api.bodies import check_body
from keepwarm.api.dialect import OPENAI, Anthropic
from keepwarm.api.mending import decode_body, whole_json
from keepwarm.api.messages import chat_request
from keepwarm.api.reading import opening_of, read
from keepwarm.api.steering import SystemPlaces, steered
from keepwarm.core.hygiene import hygiene_of
from keepwarm.core.prompt import prompt_of, segment_of
from keepwarm.errors import RequestError

USER = {"role": "user", "content": "Hello"}
BILLING = "x-anthropic-billing-header: cc_version=2.1.332.abc; cc_entrypoint=cli;"
STRICT = SystemPlaces(several=False, late=False, developer=False)
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def came(kind: str, body: dict[str, Any], takes: SystemPlaces | None = None) -> Arrived:
    return arrived(kind, body, hygiene=hygiene_of((), ()), takes=takes or SystemPlaces())


def content_of(block: dict[str, Any], place: str) -> Any:
    """What a block in this place becomes: the content of the message that has it."""
    messages: dict[str, list[dict[str, Any]]] = {
        "user": [{"role": "user", "content": [block]}],
        "assistant": [USER, {"role": "assistant", "content": [block]}, USER],
        "result": [
            {"role": "user", "content": [{"type": "tool_result", "content": [block]}]},
        ],
        "document": [
            {
                "role": "user",
                "content": [
                    {"type": "document", "source": {"type": "content", "content": [block]}},
                ],
            }
        ],
    }
    chat = chat_request({"messages": messages[place]})
    return chat["messages"][1 if place == "assistant" else 0]["content"]


SAYS = "the words of it"
WITH_TEXT: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": SAYS, "cache_control": {"type": "ephemeral"}},
    "document of text": {"type": "document", "source": {"type": "text", "data": SAYS}},
    "document of base64": {
        "type": "document",
        "source": {
            "type": "base64",
            "media_type": "text/plain",
            "data": base64.b64encode(SAYS.encode()).decode(),
        },
    },
    "search_result": {
        "type": "search_result",
        "source": "https://a.example",
        "title": "A",
        "content": [{"type": "text", "text": SAYS}],
    },
    "server_tool_use": {
        "type": "server_tool_use",
        "id": "s1",
        "name": "web_search",
        "input": {"query": SAYS},
    },
    "web_search_tool_result": {
        "type": "web_search_tool_result",
        "tool_use_id": "s1",
        "content": [{"type": "web_search_result", "title": SAYS, "encrypted_content": "x" * 99}],
    },
    "code_execution_tool_result": {
        "type": "code_execution_tool_result",
        "content": {"type": "code_execution_result", "stdout": SAYS},
    },
    "mcp_tool_result": {
        "type": "mcp_tool_result",
        "content": [{"type": "text", "text": SAYS}],
    },
    "tool_reference": {"type": "tool_reference", "tool_name": SAYS},
    "of tomorrow": {"type": "hologram", "words": SAYS},
}


@pytest.mark.parametrize("place", ["user", "assistant", "result", "document"])
@pytest.mark.parametrize("name", WITH_TEXT)
def test_whatever_has_text_is_sent_wherever_it_stands(name: str, place: str) -> None:
    text = msgspec.json.encode(content_of(WITH_TEXT[name], place)).decode()
    assert SAYS in text
    assert "cache_control" not in text
    assert "xxx" not in text


@pytest.mark.parametrize("place", ["user", "assistant", "result", "document"])
def test_a_picture_goes_as_one_wherever_it_stands(place: str) -> None:
    assert PICTURE in content_of(PNG, place)


@pytest.mark.parametrize("place", ["user", "assistant", "result", "document"])
@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "source": {"type": "file", "file_id": "f1"}},
        {"type": "image"},
        {"type": "document", "source": {"type": "file", "file_id": "f1"}},
        {"type": "document", "source": {"type": "url", "url": "https://a.example/a.pdf"}},
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"},
        },
        {"type": "container_upload", "file_id": "f1"},
        {"type": 7},
    ],
)
def test_what_cant_be_served_is_refused_by_its_place(block: dict[str, Any], place: str) -> None:
    with pytest.raises(RequestError, match=r"messages\[\d\]\.content\[0\]"):
        content_of(block, place)


def test_a_text_of_null_is_no_word() -> None:
    assert content_of({"type": "text", "text": None}, "user") == ""


@pytest.mark.parametrize("place", ["user", "assistant", "result", "document"])
def test_a_string_among_blocks_is_a_text(place: str) -> None:
    assert SAYS in msgspec.json.encode(content_of(SAYS, place)).decode()  # type: ignore[arg-type]
    body = {"messages": [{"role": "user", "content": [SAYS]}], "system": [SAYS]}
    check_body("messages", body)


def test_a_tool_without_a_schema_is_rendered_as_the_engine_does() -> None:
    for tool in ({"name": "look"}, {"name": "look", "input_schema": {}}):
        chat = chat_request({"messages": [USER], "tools": [tool]})
        assert chat["tools"][0]["function"]["parameters"] == {}


def test_a_turn_without_blocks_is_no_turn() -> None:
    chat = chat_request({"messages": [USER, {"role": "assistant", "content": []}]})
    assert chat["messages"] == [USER]


@pytest.mark.parametrize("kind", ["chat", "messages", "responses", "completion"])
def test_a_model_may_be_called_by_a_number(kind: str) -> None:
    listed = {"responses": "input", "completion": "prompt"}.get(kind, "messages")
    check_body(kind, {"model": 7, listed: [USER] if kind != "completion" else "x"})
    with pytest.raises(RequestError, match="model"):
        check_body(kind, {"model": {}, listed: [USER]})


def test_what_shapes_an_answer_arrives() -> None:
    tool = {"name": "look", "input_schema": {"type": "object"}}
    chat = chat_request(
        {
            "messages": [USER],
            "tools": [tool, {**tool, "name": "other"}],
            "tool_choice": {"type": "tool", "name": "look", "disable_parallel_tool_use": True},
            "thinking": {"type": "disabled"},
            "output_config": {
                "effort": "max",
                "format": {"type": "json_schema", "schema": {"type": "object"}},
            },
        }
    )
    assert [t["function"]["name"] for t in chat["tools"]] == ["look"]
    assert (chat["tool_choice"], chat["parallel_tool_calls"]) == ("required", False)
    assert chat["chat_template_kwargs"] == {"enable_thinking": False}
    assert chat["reasoning_effort"] == "high"
    assert chat["response_format"]["json_schema"]["schema"] == {"type": "object"}
    gone = {"type": "tool", "name": "gone"}
    with pytest.raises(RequestError, match="gone"):
        chat_request({"messages": [USER], "tools": [tool], "tool_choice": gone})


@pytest.mark.parametrize("kind", ["chat", "messages"])
def test_the_billing_line_is_taken_out_and_told(kind: str) -> None:
    said = [{"type": "text", "text": BILLING}, {"type": "text", "text": "Be brief."}]
    body: dict[str, Any] = {"messages": [USER], "system": said}
    if kind == "chat":
        body = {"messages": [{"role": "system", "content": said}, USER]}
    out = came(kind, body)
    assert segment_of(out.body["messages"][0]).text == "Be brief."
    assert out.rewrites == {"drop-billing": 1}


LATE = [
    {"role": "system", "content": "Be brief."},
    {"role": "developer", "content": "No tables."},
    USER,
    {"role": "assistant", "content": "Yes?"},
    {"role": "developer", "content": [{"type": "input_text", "text": "Agents: a, b"}]},
    USER,
]


@pytest.mark.parametrize(("kind", "place"), [("chat", "messages"), ("responses", "input")])
def test_system_messages_go_where_the_template_takes_them(kind: str, place: str) -> None:
    out = came(kind, {place: LATE}, STRICT)
    roles = [m["role"] for m in out.body[place]]
    assert roles == ["system", "user", "assistant", "user", "user"]
    assert segment_of(out.body[place][0]).text == "Be brief.\n\nNo tables."
    reminder = "<system-reminder>\nAgents: a, b\n</system-reminder>"
    assert segment_of(out.body[place][3]).text == reminder
    assert out.rewrites["system-reminder"] == 2


def test_instructions_are_the_first_system_message() -> None:
    body = {"instructions": "Be brief.", "input": [LATE[1], USER]}
    out, moved = steered(body, STRICT, place="input")
    assert out == {"instructions": "Be brief.\n\nNo tables.", "input": [USER]}
    assert moved == 1


def test_a_template_that_takes_all_leaves_a_body_as_it_is() -> None:
    body = {"messages": LATE}
    assert steered(body, SystemPlaces()) == (body, 0)
    assert came("chat", body).body is body


TEXT = '{"messages": [{"role": "user", "content": "h\u00e9"}]}'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_body_is_read_in_any_encoding_of_unicode(encoding: str) -> None:
    assert decode_body(TEXT.encode(encoding)) == json.loads(TEXT)


def test_half_a_surrogate_pair_is_replaced_always_the_same_way() -> None:
    for half in (b"\\ud83d", b"\\ude00", b"\xed\xa0\xbd"):
        said = decode_body(b'{"prompt": "a' + half + b'b"}')["prompt"]
        assert set(said) <= {"a", "b", "\ufffd"}, half
        assert msgspec.json.decode(msgspec.json.encode(said)) == said
    assert decode_body(b'{"prompt": "\\ud83d\\ude00"}') == {"prompt": "\U0001f600"}


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff\xfe{", b'{"a": NaN}', b"[" * 99_999])
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError):
        decode_body(raw)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ('{"path": "a', '{"path": "a"}'),
        ('{"path": "a\\', '{"path": "a"}'),
        ('{"a": [1, {"b": 2', '{"a": [1, {"b": 2}]}'),
        ('{"a": 1,', '{"a": 1}'),
        ('{"a":', '{"a": null}'),
        ('{"a', '{"a": null}'),
        ("", "{}"),
        ("ls -l", '{"input": "ls -l"}'),
    ],
)
def test_arguments_that_break_off_are_closed(text: str, whole: str) -> None:
    assert json.loads(whole_json(text)) == json.loads(whole)


@given(st.text(max_size=40))
def test_any_arguments_become_json(text: str) -> None:
    whole = whole_json(text)
    json.loads(whole)
    assert whole_json(whole) is whole


def test_a_call_that_was_cut_off_fails_no_later_turn() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"p": "a'}}
    body = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}, USER]}
    out = came("chat", body)
    said = out.body["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(said) == {"p": "a"}
    assert out.rewrites == {"mend-arguments": 1}


def test_a_picture_weighs_what_a_picture_does() -> None:
    def prompt(data: str) -> Any:
        url = {"url": f"data:image/png;base64,{data}"}
        content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What is it?"}]
        body = {"messages": [{"role": "user", "content": content}]}
        return prompt_of(body, fingerprint="f", namespace="n")

    large, other = prompt("A" * 4_000_000), prompt("B" * 4_000_000)
    assert large.chars < 20_000
    assert large.has_media
    assert large.marks[-1] != other.marks[-1]
    assert not prompt_of({"messages": [USER]}, fingerprint="f", namespace="n").has_media


def test_a_prompt_that_is_too_long_is_told_in_each_clients_words() -> None:
    error = {
        "code": 400,
        "message": "request (900 tokens) exceeds the available context size (512 tokens)",
        "type": "exceed_context_size_error",
        "n_prompt_tokens": 900,
        "n_ctx": 512,
    }
    raw = msgspec.json.encode({"error": error})
    openai = msgspec.json.decode(OPENAI.whole(raw, status=400))["error"]
    assert openai == {**error, "code": "context_length_exceeded"}
    told = msgspec.json.decode(Anthropic("m").whole(raw, status=400))["error"]
    assert told == {
        "type": "invalid_request_error",
        "message": "prompt is too long: 900 tokens > 512 maximum",
    }


def test_the_clients_own_beginning_of_a_reply_is_found() -> None:
    said = {"role": "assistant", "content": [{"type": "text", "text": "Sure"}]}
    assert opening_of({"messages": [USER, said]}) == "Sure"
    assert opening_of({"messages": [said, USER]}) == ""
    assert opening_of(read("completion", {"prompt": "x"})) == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "role", "content", "text", "source", "output", "summary", "call_id"]
            ),
            inner
            | st.sampled_from(
                ["message", "function_call", "custom_tool_call_output", "reasoning", "image"]
            ),
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(
    st.sampled_from(["chat", "responses", "messages", "completion"]),
    st.dictionaries(
        st.sampled_from(["messages", "input", "system", "instructions", "tools", "text", "prompt"]),
        JSON,
    ),
)
def test_no_body_of_whatever_types_is_worse_than_a_refusal(kind: str, body: dict[str, Any]) -> None:
    try:
        out = came(kind, body, STRICT)
    except RequestError:
        return
    chat = read(out.api, out.body)
    prompt_of(chat, fingerprint="f", namespace="n")
    opening_of(chat)
