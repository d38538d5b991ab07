"""Which arguments a template renders nothing of, with templates that look at one each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from keepwarm.api.steering import SystemPlaces
from keepwarm.core.prompt import SHAPING
from keepwarm.core.tiers import compose
from keepwarm.engine.client import EngineClient
from keepwarm.engine.rendering import fitted_tiers, system_places, unrendered_arguments
from keepwarm.errors import EngineDownError, EngineRefusedError
from keepwarm.tiers.files import load_tiers
from smalltiers import write_small_tiers

ALL = {
    *("response_format", "json_schema", "tool_choice", "reasoning_effort", "thinking"),
    *("thinking_budget_tokens", "parallel_tool_calls"),
}
Template = Callable[[Mapping[str, Any]], str]


class Rendering(EngineClient):
    """An engine that only renders."""

    def __init__(self, template: Template) -> None:
        super().__init__("http://127.0.0.1:9")
        self._template = template

    async def render(self, body: Mapping[str, Any]) -> str:
        return self._template(body)


def plain(body: Mapping[str, Any]) -> str:
    return json.dumps([body["messages"], body.get("tools")])


def without_tools_if_none_may_be_called(body: Mapping[str, Any]) -> str:
    return plain({**body, "tools": None} if body.get("tool_choice") == "none" else body)


def with_the_schema_beside_tools(body: Mapping[str, Any]) -> str:
    return plain(body) + str(body.get("tools") and body.get("response_format"))


def with_one_effort(body: Mapping[str, Any]) -> str:
    return plain(body) + ("!" if body.get("reasoning_effort") == "medium" else "")


def with_thinking_in_a_first_turn(body: Mapping[str, Any]) -> str:
    return plain(body) + (str(body.get("thinking")) if len(body["messages"]) == 1 else "")


def with_a_bare_schema(body: Mapping[str, Any]) -> str:
    if body["messages"][0]["role"] == "system":
        raise EngineRefusedError("no system messages", status=400, body=b"")
    return plain(body) + str(body.get("json_schema"))


@pytest.mark.parametrize(
    ("template", "looked_at"),
    [
        (plain, set()),
        (without_tools_if_none_may_be_called, {"tool_choice"}),
        (with_the_schema_beside_tools, {"response_format"}),
        (with_one_effort, {"reasoning_effort"}),
        (with_thinking_in_a_first_turn, {"thinking"}),
        (with_a_bare_schema, {"json_schema"}),
    ],
)
async def test_an_argument_that_changes_any_prompt_is_no_unrendered_one(
    template: Template, looked_at: set[str]
) -> None:
    assert await unrendered_arguments(Rendering(template)) == ALL - looked_at


def test_whatever_is_tried_shapes_an_identity_where_it_is_rendered() -> None:
    assert set(SHAPING) >= ALL


def says(messages: Any) -> str:
    return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def strict(body: Mapping[str, Any]) -> str:
    if any(m["role"] == "system" for m in body["messages"][1:]):
        raise EngineRefusedError("System message must be at the beginning.", status=400)
    return says(body["messages"])


def hoisting(body: Mapping[str, Any]) -> str:
    first = [m for m in body["messages"] if m["role"] == "system"]
    return says(first) + says(m for m in body["messages"] if m["role"] != "system")


def dropping_developers(body: Mapping[str, Any]) -> str:
    return says(m for m in body["messages"] if m["role"] != "developer")


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        (lambda body: says(body["messages"]), SystemPlaces()),
        (strict, SystemPlaces(several=False, late=False)),
        (hoisting, SystemPlaces(late=False)),
        (dropping_developers, SystemPlaces(developer=False)),
    ],
)
async def test_where_a_template_takes_system_messages_is_found_by_rendering(
    template: Template, takes: SystemPlaces
) -> None:
    assert await system_places(Rendering(template)) == takes


def alternating(body: Mapping[str, Any]) -> str:
    roles = [m["role"] for m in body["messages"]]
    if any(a == b for a, b in pairwise(roles)):
        raise EngineRefusedError("Roles must alternate.", status=400)
    return strict(body)


def without_assistants_first(body: Mapping[str, Any]) -> str:
    if "assistant" in [m["role"] for m in body["messages"]]:
        raise EngineRefusedError("No answers here.", status=400)
    return strict(body)


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (plain, ["system", "system", "user"]),
        (strict, ["system", "user", "assistant", "user"]),
        (alternating, ["system", "user", "assistant", "user"]),
        (without_assistants_first, ["system", "user"]),
    ],
)
async def test_tiers_are_laid_out_as_the_template_takes_them(
    template: Template, roles: list[str], tmp_path: Path
) -> None:
    engine = Rendering(template)
    tiers = load_tiers(write_small_tiers(tmp_path / "tiers"), "Keeper")
    fitted = await fitted_tiers(engine, tiers, await system_places(engine))
    standard = fitted.get("standard")
    assert standard is not None
    body = compose(standard, {"messages": [{"role": "user", "content": "Hello"}]})
    assert [m["role"] for m in body["messages"]] == roles
    template(body)
    # The smaller tier's tokens still open the larger one's.
    minimal = fitted.get("minimal")
    assert minimal is not None
    assert standard.messages[0].text.startswith(minimal.messages[0].text)


async def test_an_argument_that_is_refused_somewhere_counts_as_rendered() -> None:
    def template(body: Mapping[str, Any]) -> str:
        if body.get("tools") and "response_format" in body:
            raise EngineRefusedError("not both", status=400, body=b"")
        return plain(body)

    assert "response_format" not in await unrendered_arguments(Rendering(template))


async def test_nothing_is_known_of_a_template_that_renders_nothing() -> None:
    def template(_: Mapping[str, Any]) -> str:
        raise EngineRefusedError("no", status=400, body=b"")

    assert await unrendered_arguments(Rendering(template)) == set()


async def test_an_engine_that_is_gone_is_no_answer() -> None:
    def template(_: Mapping[str, Any]) -> str:
        raise EngineDownError("gone")

    with pytest.raises(EngineDownError):
        await unrendered_arguments(Rendering(template))
