"""Where the static part of a prompt ends, in tokens that every request begins with."""

from __future__ import annotations

import json
from typing import Any

import pytest

from keepwarm.api.reading import read
from keepwarm.core.prompt import segment_of
from keepwarm.engine.client import EngineClient
from keepwarm.engine.counting import PromptCounter
from keepwarm.engine.static_end import common_length, static_body, static_tokens

TOOL = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {}}}
SYSTEM = {"role": "system", "content": "You help."}
USER = {"role": "user", "content": "Hello"}


class Renderer(EngineClient):
    """Renders and tokenizes like an engine, by the rules of a test's own."""

    def __init__(self, *, merges: bool = False) -> None:
        self.merges = merges
        self.rendered: list[dict[str, Any]] = []

    async def render(self, body: Any) -> str:
        self.rendered.append(dict(body))
        tools = json.dumps(body["tools"]) if body.get("tools") else ""
        return tools + "".join(f"<{m['role']}>{m['content']}" for m in body["messages"])

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        # Pairs of characters: a token may reach over the end of the static text.
        step = 2 if self.merges else 1
        return [hash(text[i : i + step]) & 0x7FFFFFFF for i in range(0, len(text), step)]


def test_the_first_difference_ends_what_is_common() -> None:
    assert common_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([], [1]) == 0
    assert common_length([9], [1]) == 0


async def test_static_tokens_reach_into_the_opening_of_the_users_turn() -> None:
    tokens = await static_tokens(PromptCounter(Renderer()), {"messages": [SYSTEM]})
    assert len(tokens) == len("<system>You help.<user>")


async def test_a_token_that_reaches_over_the_end_isnt_static() -> None:
    whole = "<system>You help!<user>"
    assert len(whole) % 2 == 1
    body = {"messages": [{**SYSTEM, "content": "You help!"}]}
    tokens = await static_tokens(PromptCounter(Renderer(merges=True)), body)
    assert len(tokens) == len(whole) // 2


async def test_what_shapes_the_rendering_is_rendered_with_and_nothing_else() -> None:
    renderer = Renderer()
    body = {
        "messages": [SYSTEM],
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
        "temperature": 0.5,
        "stream": True,
    }
    await static_tokens(PromptCounter(renderer), body)
    for asked in renderer.rendered:
        assert set(asked) == {"messages", "tools", "chat_template_kwargs"}
        assert asked["messages"][0] == SYSTEM
        assert asked["messages"][-1]["role"] == "user"


def test_a_chats_static_part_is_its_leading_system_messages() -> None:
    late = {"role": "system", "content": "By the way."}
    body = {"messages": [SYSTEM, {**SYSTEM, "role": "developer"}, USER, late], "tools": [TOOL]}
    static = static_body(body)
    assert static is not None
    assert [m["role"] for m in static["messages"]] == ["system", "developer"]
    assert static["tools"] == [TOOL]


def test_a_response_is_read_as_the_chat_it_becomes() -> None:
    flat = {"type": "function", "name": "clock", "description": "", "parameters": {}}
    body = {"instructions": "You help.", "input": "Hello", "tools": [flat]}
    static = static_body(read("responses", body))
    assert static is not None
    assert static["messages"] == [SYSTEM]
    # As the engine has it: what a template prints of a tool is all of it.
    assert static["tools"] == [
        {"type": "function", "function": {**TOOL["function"], "description": "", "strict": True}}
    ]
    items = [{"type": "message", "role": "system", "content": "More."}, USER]
    static = static_body(read("responses", {"instructions": "You help.", "input": items}))
    assert static is not None
    assert [segment_of(m).text for m in static["messages"]] == ["You help.", "More."]


def test_a_raw_prompt_has_no_static_part() -> None:
    assert static_body({"prompt": "Hello"}) is None


@pytest.mark.parametrize("messages", [None, 5, "text", [None, 3], [[]], [{"role": 7}]])
def test_what_isnt_messages_has_no_leading_ones(messages: object) -> None:
    static = static_body({"messages": messages})
    assert static is not None
    assert static["messages"] == []
