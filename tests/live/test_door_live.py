"""Whatever a body holds, the door answers: JSON, no fault of ours, and in time. Real engine."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from served import Served

pytestmark = pytest.mark.live

PATHS = {
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
    "completion": "/completion",
    "infill": "/infill",
    "count": "/v1/messages/count_tokens",
    "render": "/apply-template",
}
# Words that mean something to somebody on the way.
KEYS = (
    *("messages", "role", "content", "type", "text", "tools", "function", "name", "parameters"),
    *("arguments", "tool_calls", "tool_call_id", "id", "image_url", "url", "source", "data"),
    *("media_type", "input", "system", "instructions", "input_schema", "tool_use_id", "prompt"),
    *("model", "stop", "n", "stream", "max_tokens", "temperature", "id_slot", "cache_prompt"),
    *("thinking", "signature", "cache_control", "reasoning", "effort", "output", "call_id"),
    *("chat_template_kwargs", "response_format", "json_schema", "tool_choice", "lora", "metadata"),
    *("stream_options", "reasoning_content", "input_prefix", "input_suffix", "input_extra"),
)
WORDS = (
    *("user", "assistant", "system", "developer", "tool", "text", "image", "image_url", "base64"),
    *("tool_use", "tool_result", "document", "search_result", "thinking", "input_text", "message"),
    *("output_text", "function", "function_call", "function_call_output", "reasoning", "url"),
    *("auto", "none", "minimal", "standard", "json_object", "json_schema", "", "x", "{", "\u20ac"),
    "web_search_call",
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**70), 10**400, 1e308, 0.5, -1.5]),
    st.sampled_from(WORDS),
    st.text(max_size=6),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    ),
    max_leaves=14,
)
parts = st.one_of(
    values,
    st.fixed_dictionaries(
        {"type": st.sampled_from(WORDS)},
        optional=dict.fromkeys(("text", "source", "content", "id", "name", "input"), values),
    ),
)
messages = st.one_of(
    values,
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(WORDS),
            "content": st.one_of(values, st.lists(parts, max_size=3)),
        },
        optional=dict.fromkeys(("tool_calls", "tool_call_id", "type", "name"), values),
    ),
)
tools = st.one_of(
    values,
    st.fixed_dictionaries(
        {"type": st.sampled_from(WORDS), "name": values, "function": values},
        optional={"input_schema": values, "parameters": values, "description": values},
    ),
)


def bodies(api: str) -> st.SearchStrategy[Any]:
    """Bodies that are nearly right, with something wrong anywhere."""
    listed = st.one_of(values, st.lists(messages, min_size=1, max_size=3))
    prompts = st.one_of(values, st.lists(st.integers(-1, 90), max_size=4))
    needed = {
        "chat": {"messages": listed},
        "render": {"messages": listed},
        "messages": {"messages": listed},
        "count": {"messages": listed},
        "responses": {"input": listed},
        "completion": {"prompt": prompts},
        "infill": {"input_prefix": values, "input_suffix": values},
    }[api]
    more = {key: values for key in KEYS if key not in needed and key not in ("n", "max_tokens")}
    more |= {"tools": st.one_of(values, st.lists(tools, max_size=2))}
    return st.fixed_dictionaries(needed, optional=more)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, quick_model: Path, small_tiers: Path
) -> Iterator[Served]:
    served = Served(
        tmp_path_factory.mktemp("door"),
        engine={"model": str(quick_model), "slots": 2, "context": 4096},
        tiers={"dir": str(small_tiers)},
    ).wait_ready()
    yield served
    served.stop()


def send(served: Served, path: str, raw: bytes) -> tuple[int, str, bytes]:
    """Status, content type and body of the answer; it must come within half a minute."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    try:
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.getheader("Content-Type", ""), reply.read()
    finally:
        connection.close()


def check(served: Served, api: str, raw: bytes) -> None:
    status, kind, body = send(served, PATHS[api], raw)
    assert status < 500 or status == 501, (status, body[:500])
    if kind.startswith("text/event-stream"):
        return
    assert kind.startswith("application/json"), (kind, body[:300])
    said = json.loads(body)
    if status >= 400:
        assert said["error"]["message"], said
        assert (said.get("type") == "error") == (api in ("messages", "count")), said


@pytest.mark.parametrize("api", PATHS)
def test_no_body_is_a_fault_of_ours(served: Served, api: str) -> None:
    @settings(
        max_examples=150,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies(api))
    def tried(body: dict[str, Any]) -> None:
        sent = body | {"max_tokens": 2, "n_predict": 2, "max_output_tokens": 2}
        check(served, api, json.dumps(sent).encode())

    tried()
    assert "Traceback" not in served.log.read_text()
    served.settled()


def nested(depth: int) -> str:
    return '{"x":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("api", ["chat", "messages", "responses", "completion"])
@pytest.mark.parametrize("depth", [100, 300, 900, 980, 1000, 5000, 200_000])
def test_a_body_may_be_nested_as_deep_as_it_likes(served: Served, api: str, depth: int) -> None:
    field = {"chat": "messages", "messages": "messages", "responses": "input"}.get(api, "prompt")
    began_s = time.monotonic()
    good = '[{"role":"user","content":"a"}]' if api != "completion" else '"a"'
    for raw in (
        f'{{"{field}":{nested(depth)}}}',
        f'{{"{field}":{good},"max_tokens":1,"metadata":{nested(depth)}}}',
        f'{{"{field}":{good},"max_tokens":1,"tools":[{nested(depth)}]}}',
    ):
        check(served, api, raw.encode())
    assert time.monotonic() - began_s < 20


@pytest.mark.parametrize("api", PATHS)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b"{",
        b"\xff\xfe",
        b'{"messages":[{"role":"user","content":"\\ud800"}],"max_tokens":1}',
        b'{"max_tokens":' + b"9" * 5000 + b"}",
        b'{"seed":' + b"9" * 5000 + b',"messages":[{"role":"user","content":"a"}]}',
    ],
    ids=["empty", "null", "list", "number", "cut", "bytes", "surrogate", "digits", "seed"],
)
def test_what_isnt_a_body_is_refused_in_json(served: Served, api: str, raw: bytes) -> None:
    check(served, api, raw)
