"""What a request is read as, against the engine: its tokens are those of the chat form."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bareengine import BareEngine, StartEngine
from keepwarm.api.items import mended
from keepwarm.api.reading import chat_form
from tinymodels import small_model, write_tiny_qwen3

CONTEXT_TOKENS = 32768
ROOT = Path(__file__).parents[2]
CHATML = ROOT / "configs" / "chat-templates" / "chatml-tools.jinja"
# Prints whatever a template may look at: arguments, calls, reasoning.
PRINTS_ALL = """{%- if tools %}{{ tools | tojson }}{% endif -%}
{{- reasoning_effort | default('none', true) }}|{{ enable_thinking | default('unset') }}
{%- for message in messages -%}
<|im_start|>{{ message.role }}|{{ message.reasoning_content | default('-', true) }}|
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content or [] %}[{{ part.text }}]{% endfor %}{% endif -%}
{%- for call in message.tool_calls or [] %}({{ call.function.name }} {{ call.function.arguments }})
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""

TOOL = {
    "type": "function",
    "name": "look",
    "description": "Look.",
    "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
}
BODIES: dict[str, dict[str, Any]] = {
    "text": {"input": "What hour is it?"},
    "instructions": {"instructions": "Be brief.", "input": "Well?"},
    "no instructions": {"instructions": None, "input": "Well?"},
    "parts": {
        "input": [
            {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "One."},
                    {"type": "input_text", "text": "Two."},
                ],
            },
        ]
    },
    "effort": {"input": "Well?", "reasoning": {"effort": "high", "summary": "auto"}},
    "tools of all types": {
        "input": "Look.",
        "tools": [
            TOOL,
            {"type": "web_search"},
            {"type": "custom", "name": "patch", "format": {"type": "text"}},
            {"type": "namespace", "name": "fs", "description": "files", "tools": [TOOL]},
        ],
    },
    "a loop of tools": {
        "tools": [TOOL],
        "input": [
            {"role": "user", "content": "Look at a and b."},
            {
                "type": "reasoning",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "a"}],
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
            },
            {"type": "function_call", "call_id": "1", "name": "look", "arguments": '{"path":"a"}'},
            {"type": "function_call", "call_id": "2", "name": "look", "arguments": '{"path":"b"}'},
            {"type": "function_call_output", "call_id": "1", "output": "A"},
            {
                "type": "function_call_output",
                "call_id": "2",
                "output": [{"type": "input_text", "text": "B"}],
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Done."}],
            },
            {"role": "user", "content": "And now?"},
        ],
    },
    "what the engine refuses": {
        "tools": [TOOL],
        "input": [
            {"role": "user", "content": [{"type": "text", "text": "Go"}, "on"]},
            {"type": "reasoning", "id": "r", "encrypted_content": "xyz"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "It is so."}]},
            {"role": "assistant", "content": "Yes."},
            {"type": "web_search_call", "id": "w", "status": "completed"},
            {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "*** Begin"},
            {"type": "custom_tool_call_output", "call_id": "c", "output": "done"},
            {"type": "local_shell_call", "call_id": "s", "action": {"command": ["ls"]}},
            {"type": "local_shell_call_output", "call_id": "s", "output": {"exit": 0}},
            {"type": "additional_tools", "role": "developer", "tools": [{**TOOL, "name": "more"}]},
            {"type": "compaction", "encrypted_content": "abc"},
            {"role": "user", "content": None},
            {"role": "user", "content": "Go on."},
        ],
    },
}


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for what agents send."""
    model = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen3(model, small_model(), context_tokens=CONTEXT_TOKENS)
    return model


@pytest.fixture(scope="module", params=["chatml", "prints all"])
def engine(
    request: pytest.FixtureRequest, bare_engine: StartEngine, long_model: Path
) -> BareEngine:
    template = CHATML.read_text() if request.param == "chatml" else PRINTS_ALL
    return bare_engine(
        long_model, n_ctx=CONTEXT_TOKENS, n_parallel=2, kv_unified=True, chat_template=template
    )


def said_by(engine: BareEngine, path: str, body: dict[str, Any]) -> Any:
    """The engine's answer, or the words of its refusal."""
    try:
        return engine.post(path, body)
    except HTTPError as error:
        return json.load(error)["error"]["message"]


def check_same(engine: BareEngine, body: dict[str, Any]) -> None:
    """The engine's prompt for a body is what the chat form renders to, token by token."""
    sent = mended(body).body
    form = chat_form("responses", sent)
    assert form is not None
    told = said_by(engine, "/v1/responses/input_tokens", sent)
    rendered = said_by(engine, "/apply-template", form)
    if isinstance(told, str):
        # Only what chat itself refuses, such as a last message that is the assistant's call.
        assert rendered == told
        return
    ids = engine.tokenize(rendered["prompt"])
    assert len(ids) == told["input_tokens"]
    with contextlib.suppress(HTTPError):  # what a random model says may not be in the form asked
        engine.post(
            "/v1/responses", {**sent, "max_output_tokens": 1, "id_slot": 0, "stream": False}
        )
    # The slot holds the engine's own tokens: all but the last of ours are reused if they are equal.
    if ids:
        assert engine.ask(ids, slot=0, tokens=1).cache_tokens >= len(ids) - 1


@pytest.mark.parametrize("name", BODIES)
def test_a_responses_body_renders_as_its_chat_form(engine: BareEngine, name: str) -> None:
    check_same(engine, BODIES[name])


TEXTS = st.sampled_from(["", "a", "Look at b.", "ä\n<|im_end|>"])
PARTS = st.lists(st.builds(lambda t: {"type": "input_text", "text": t}, TEXTS), max_size=2)
ITEMS = st.one_of(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "developer", "system", "assistant"]),
        st.one_of(TEXTS, PARTS, st.none()),
    ),
    st.builds(
        lambda text: {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": text}],
        },
        TEXTS,
    ),
    st.builds(
        lambda texts: {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": t} for t in texts],
        },
        st.lists(TEXTS, max_size=2),
    ),
    st.builds(
        lambda kind, text: {"type": kind, "call_id": "1", "name": "look", "arguments": text},
        st.sampled_from(["function_call", "custom_tool_call"]),
        st.sampled_from(["{}", '{"path":"a"}']),
    ),
    st.builds(
        lambda kind, text: {"type": kind, "call_id": "1", "output": text},
        st.sampled_from(["function_call_output", "custom_tool_call_output"]),
        st.one_of(TEXTS, PARTS, st.none()),
    ),
    st.sampled_from(
        [
            {"type": "web_search_call", "id": "w"},
            {"type": "compaction", "encrypted_content": "abc"},
            {"type": "additional_tools", "tools": [{**TOOL, "name": "more"}]},
        ]
    ),
)


@settings(
    max_examples=int(os.environ.get("KEEPWARM_READING_EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    items=st.lists(ITEMS, min_size=1, max_size=6),
    tools=st.lists(st.sampled_from([TOOL, {"type": "web_search"}]), max_size=2),
    more=st.sampled_from([{}, {"reasoning": {"effort": "low"}}, {"instructions": "Be brief."}]),
)
def test_any_responses_body_renders_as_its_chat_form(
    engine: BareEngine, items: list[Any], tools: list[Any], more: dict[str, Any]
) -> None:
    check_same(engine, {"input": items, "tools": tools, **more})


def test_recorded_sessions_render_as_their_chat_form(engine: BareEngine) -> None:
    """Codex as it is, where its recordings are at hand."""
    folder = Path(os.environ.get("KEEPWARM_TEST_CLIENTS", ROOT / "tests" / "corpus" / "clients"))
    files = sorted(folder.glob("codex*.jsonl"))
    if not files:
        pytest.skip(f"no recordings in {folder}; KEEPWARM_TEST_CLIENTS names another")
    for file in files:
        for line in file.read_text().splitlines()[::3]:
            check_same(engine, json.loads(line)["body"])
