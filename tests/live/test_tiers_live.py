"""The packaged tiers on the real engine: sizes, nesting, and what templates do to them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from keepwarm.core.tiers import ContextRole, Tier, TierSet, compose
from keepwarm.engine.client import EngineClient
from keepwarm.engine.counting import PromptCounter
from keepwarm.engine.options import EngineOptions
from keepwarm.engine.process import embedded_engine, free_port
from keepwarm.engine.static_end import common_length, static_tokens
from keepwarm.tiers.files import load_tiers, packaged_configs
from tinymodels import small_model

pytestmark = pytest.mark.live

TEMPLATE = packaged_configs() / "chat-templates" / "chatml-tools.jinja"
HELLO = {"role": "user", "content": "Hello."}
CLOCK = {
    "type": "function",
    "function": {
        "name": "current_time",
        "description": "The time in a zone.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string"}, "exact": {"type": "boolean"}},
            "required": ["zone"],
        },
    },
}


class Engine:
    """The engine with one template, called from tests that aren't coroutines."""

    def __init__(self, runner: asyncio.Runner, client: EngineClient) -> None:
        self._runner = runner
        self._client = client

    def static(self, tier: Tier) -> list[int]:
        body = compose(tier, {"messages": []})
        return self._runner.run(static_tokens(PromptCounter(self._client), body))

    def render(self, *messages: dict[str, Any], **body: Any) -> str:
        return self._runner.run(self._client.render({"messages": list(messages), **body}))

    def tokens(self, text: str) -> list[int]:
        return self._runner.run(self._client.tokenize(text))

    def caps(self) -> dict[str, bool]:
        return dict(self._runner.run(self._client.props())["chat_template_caps"])

    def fill(self, tokens: list[int], *, slot: int) -> int:
        """Prefill `tokens` into the slot; how many of them it already had."""
        return self._runner.run(self._client.fill(tokens, slot=slot)).cached

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._runner.run(self._client.chat(body))


@contextmanager
def running(slot_dir: Path, template: Path | None) -> Iterator[Engine]:
    options = EngineOptions(
        model=small_model(),
        slots=1,
        context_tokens=4608,
        slot_dir=slot_dir,
        unified=True,
        threads=2,
        chat_template=template,
    )
    process = embedded_engine(options, port=free_port())

    async def start() -> EngineClient:
        await process.start()
        client = EngineClient(process.base_url)
        async with asyncio.timeout(120):
            while not await client.health():
                assert not process.exited.is_set(), process.last_lines
                await asyncio.sleep(0.1)
        return client

    with asyncio.Runner() as runner:
        try:
            client = runner.run(start())
            yield Engine(runner, client)
        finally:
            runner.run(process.stop())


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """SmolLM2 with the packaged template."""
    with running(tmp_path_factory.mktemp("slots"), TEMPLATE) as engine:
        yield engine


@pytest.fixture(scope="module")
def tiers() -> TierSet:
    return load_tiers(packaged_configs() / "prompt-tiers", "Keeper")


@pytest.fixture(scope="module")
def statics(engine: Engine, tiers: TierSet) -> dict[str, list[int]]:
    return {tier.name: engine.static(tier) for tier in tiers}


def test_each_tier_has_the_size_it_is_meant_to_have(statics: dict[str, list[int]]) -> None:
    assert 150 <= len(statics["minimal"]) <= 300
    assert 1900 <= len(statics["standard"]) <= 2100
    assert 3500 <= len(statics["full"]) <= 3900


def test_the_sizes_in_the_readme_are_the_real_ones(statics: dict[str, list[int]]) -> None:
    readme = (packaged_configs() / "prompt-tiers" / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \|$", readme, re.MULTILINE))
    assert told == {name: f"{len(tokens):,}" for name, tokens in statics.items()}


def test_the_tokens_of_each_tiers_texts_and_tools_open_the_next_tier(
    engine: Engine, tiers: TierSet, statics: dict[str, list[int]]
) -> None:
    # The end of the turn isn't the tier's own: a request with more text or tools goes on there.
    turn_end = engine.tokens("<|im_end|>\n<|im_start|>user\n")
    for smaller, larger in pairwise(tiers):
        tokens = statics[smaller.name]
        assert tokens[-len(turn_end) :] == turn_end
        own = tokens[: -len(turn_end)]
        assert statics[larger.name][: len(own)] == own


def test_going_up_a_tier_prefills_the_difference_only(
    engine: Engine, tiers: TierSet, statics: dict[str, list[int]]
) -> None:
    for smaller, larger in pairwise(tiers):
        engine.fill(statics[smaller.name], slot=0)
        shared = common_length(statics[smaller.name], statics[larger.name])
        assert engine.fill(statics[larger.name], slot=0) == shared


def test_all_tools_are_rendered_in_order_as_they_are_written(
    engine: Engine, tiers: TierSet
) -> None:
    tools = list(tiers.default.tools)
    rendered = engine.render({"role": "system", "content": "S"}, HELLO, tools=tools)
    section = rendered.split("<tools>\n", 1)[1].split("\n</tools>", 1)[0]
    assert section.split("\n") == [json.dumps(tool, ensure_ascii=False) for tool in tools]
    assert len(tools) == 14


def test_the_models_own_template_drops_tools(
    tmp_path: Path, tiers: TierSet, statics: dict[str, list[int]]
) -> None:
    with running(tmp_path, None) as plain:
        body = compose(tiers.default, {"messages": [HELLO]})
        rendered = plain.render(*body["messages"], tools=body["tools"])
        assert tiers.default.segments[-1].text in rendered
        assert "read_file" not in rendered
        assert "parameters" not in rendered
        assert not plain.caps()["supports_tools"]
        assert len(plain.static(tiers.default)) < len(statics["standard"]) / 3


def test_merged_texts_are_shared_up_to_the_first_tools(engine: Engine, tiers: TierSet) -> None:
    merged = {t.name: engine.static(t) for t in tiers.with_context_role(ContextRole.MERGE)}
    assert 1900 <= len(merged["standard"]) <= 2100
    shared = common_length(merged["standard"], merged["full"])
    texts = engine.tokens("\n\n".join(segment.text for segment in tiers.default.segments))
    assert len(texts) <= shared < len(texts) + 16


def test_the_engine_sees_that_tools_and_calls_are_supported(engine: Engine) -> None:
    caps = engine.caps()
    assert caps["supports_tools"]
    assert caps["supports_tool_calls"]
    assert caps["supports_parallel_tool_calls"]
    assert caps["supports_system_role"]


def test_no_system_message_is_invented(engine: Engine) -> None:
    rendered = engine.render(HELLO)
    assert rendered == "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"


def test_tools_without_a_system_message_get_a_turn_of_their_own(engine: Engine) -> None:
    rendered = engine.render(HELLO, tools=[CLOCK])
    assert rendered.startswith("<|im_start|>system\n# Tools\n\n")
    assert rendered.count("<|im_start|>system") == 1


def test_further_system_messages_are_turns_of_their_own(engine: Engine) -> None:
    first = {"role": "system", "content": "One."}
    second = {"role": "developer", "content": "Two."}
    rendered = engine.render(first, second, HELLO)
    assert rendered.startswith(
        "<|im_start|>system\nOne.<|im_end|>\n<|im_start|>system\nTwo.<|im_end|>\n<|im_start|>user\n"
    )


def called(*arguments: str, content: str | None = None) -> dict[str, Any]:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "current_time", "arguments": text}}
        for i, text in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(content: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": content}


def test_tool_calls_and_results_are_written_the_hermes_way(engine: Engine) -> None:
    rendered = engine.render(
        HELLO,
        called('{"zone": "Europe/Rome", "exact": true}', '{"zone": "\\"é\\""}'),
        result("14:05"),
        result("none", 1),
        called("{}", content="Again."),
        result("14:06"),
        tools=[CLOCK],
    )
    assert rendered.split("Hello.<|im_end|>\n", 1)[1] == (
        '<|im_start|>assistant\n<tool_call>\n{"name": "current_time", "arguments": '
        '{"zone": "Europe/Rome", "exact": true}}\n</tool_call>\n<tool_call>\n'
        '{"name": "current_time", "arguments": {"zone": "\\"é\\""}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n14:05\n</tool_response>\n"
        "<tool_response>\nnone\n</tool_response><|im_end|>\n"
        '<|im_start|>assistant\nAgain.\n<tool_call>\n{"name": "current_time", "arguments": {}}'
        "\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n14:06\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_an_assistant_turn_without_content_is_rendered(engine: Engine) -> None:
    call = called('{"zone": "a"}')
    with_null = engine.render(HELLO, call, result("x"), tools=[CLOCK])
    call.pop("content")
    assert engine.render(HELLO, call, result("x"), tools=[CLOCK]) == with_null


def test_text_parts_are_rendered_as_text(engine: Engine) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    rendered = engine.render({"role": "user", "content": parts})
    assert "".join(rendered.split()).startswith("<|im_start|>userHello.<|im_end|>")


def test_a_call_that_the_model_writes_comes_back_as_a_tool_call(engine: Engine) -> None:
    # A model this small calls tools only by imitation, so it is shown three calls first.
    history = [
        message
        for city in ("Paris", "Rome", "Oslo")
        for message in (
            {"role": "user", "content": f"What time is it in {city}?"},
            called(json.dumps({"zone": f"Europe/{city}"})),
        )
    ]
    question = {"role": "user", "content": "What time is it in Berlin?"}
    reply = engine.chat(
        {
            "messages": [*history, question],
            "tools": [CLOCK],
            "tool_choice": "auto",
            "temperature": 0,
            "max_tokens": 64,
        }
    )
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "current_time"
    assert json.loads(call["function"]["arguments"]) == {"zone": "Europe/Berlin"}
    assert not choice["message"]["content"]
