"""Composition and nesting of tiers, on values alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.tiers import (
    ACKNOWLEDGEMENT,
    NEED_MORE,
    ContextRole,
    Message,
    Tier,
    TierSet,
    TierSource,
    build_tiers,
    compose,
    render_text,
)
from keepwarm.errors import RequestError, TierError


def tool(name: str, description: str = "Does it.") -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {}},
        },
    }


SMALL = TierSource(
    name="small",
    folder="tiers/small",
    description="The task.",
    text="You are {agent_name}. If tools are missing say\nNEED_MORE: tools",
    text_file="system.md",
    need_more=("tools",),
)
MIDDLE = TierSource(
    name="middle",
    folder="tiers/middle",
    description="Tools.",
    text="Use the tools.",
    text_file="context.md",
    extends="small",
    tools=(tool("read"), tool("write")),
)
LARGE = TierSource(
    name="large",
    folder="tiers/large",
    description="Everything.",
    text="All the rules.",
    text_file="context.md",
    extends="middle",
    is_default=True,
)


def build(*sources: TierSource) -> TierSet:
    return build_tiers(sources or (LARGE, SMALL, MIDDLE), agent_name="Ada")


def tier(name: str) -> Tier:
    found = build().get(name)
    assert found is not None
    return found


def test_a_tier_has_its_bases_messages_first_and_then_its_own() -> None:
    first = Message("system", "You are Ada. If tools are missing say\nNEED_MORE: tools")
    assert tier("small").messages == (first,)
    assert tier("middle").messages == (first, Message("system", "Use the tools."))
    assert tier("large").messages == (*tier("middle").messages, Message("system", "All the rules."))
    assert tier("large").tools == tier("middle").tools == MIDDLE.tools


def test_tiers_are_ordered_by_nesting_whatever_order_they_are_given_in() -> None:
    tiers = build()
    assert tiers.names == ("small", "middle", "large")
    assert [t.name for t in tiers] == ["small", "middle", "large"]
    assert len(tiers) == 3
    assert "middle" in tiers
    assert tiers.get("huge") is None


def test_next_up_leads_to_the_top_and_ends_there() -> None:
    tiers = build()
    up = tiers.next_up("small")
    assert up is not None
    assert up.name == "middle"
    assert tiers.next_up("large") is None
    with pytest.raises(KeyError):
        tiers.next_up("huge")


def test_of_two_tiers_on_one_base_the_shorter_is_next_up() -> None:
    other = replace(MIDDLE, name="also", text="x" * 1000)
    up = build(SMALL, other, MIDDLE).next_up("small")
    assert up is not None
    assert up.name == "middle"


def test_chain_lists_the_bases_root_first() -> None:
    assert [t.name for t in build().chain("large")] == ["small", "middle", "large"]
    assert [t.name for t in build().chain("small")] == ["small"]


def test_the_default_is_the_tier_that_says_so_else_the_smallest() -> None:
    assert build().default.name == "large"
    assert build(MIDDLE, SMALL).default.name == "small"


def test_two_defaults_are_refused() -> None:
    with pytest.raises(TierError, match="small and large both say"):
        build(replace(SMALL, is_default=True), MIDDLE, LARGE)


def test_no_tier_at_all_is_refused() -> None:
    with pytest.raises(TierError, match="no tier"):
        build_tiers([], agent_name="Ada")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([replace(SMALL, extends="small")], r"tiers/small/tier.toml.*circle: small -> small"),
        (
            [replace(MIDDLE, extends="large"), LARGE],
            r"circle: (middle -> large -> middle|large -> middle -> large)",
        ),
        ([SMALL, replace(MIDDLE, extends="smal")], r"middle/tier.toml.*'smal'.*middle, small"),
        ([replace(SMALL, text=" \n ")], r"tiers/small/system.md is empty"),
        ([SMALL, replace(MIDDLE, text="\t")], r"tiers/middle/context.md is empty"),
        ([replace(SMALL, text=None, need_more=())], r"tiers/small: .*needs a system.md"),
        ([SMALL, replace(MIDDLE, text=None, tools=())], r"tiers/middle: .*neither text nor tools"),
        ([SMALL, replace(MIDDLE, tools=(tool("a"), tool("a")))], r"middle/tools.json.*'a'.*twice"),
        (
            [SMALL, MIDDLE, replace(LARGE, tools=(tool("read"),))],
            r"large/tools.json.*'read'.*twice",
        ),
        ([replace(SMALL, need_more=("context",))], r"small/tier.toml.*`NEED_MORE: context`"),
        ([replace(SMALL, name="auto")], r"'auto' is taken"),
        ([replace(SMALL, name="Big One")], r"a tier's name"),
        ([replace(SMALL, text="You are {agent}.")], r"system.md, line 1: unknown .*\{agent\}"),
    ],
)
def test_tiers_that_cannot_be_joined_are_refused_by_file(
    sources: list[TierSource], message: str
) -> None:
    with pytest.raises(TierError, match=message):
        build_tiers(sources, agent_name="Ada")


def test_a_cycle_that_a_tier_only_leads_into_is_told_without_that_tier() -> None:
    a = replace(MIDDLE, name="a", extends="b")
    b = replace(MIDDLE, name="b", extends="c")
    c = replace(MIDDLE, name="c", extends="b")
    with pytest.raises(TierError, match=r"circle: b -> c -> b\."):
        build_tiers([a, b, c], agent_name="Ada")


def test_compose_puts_the_static_part_first_and_keeps_the_rest() -> None:
    body = {
        "model": "middle",
        "temperature": 0,
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [tool("mine"), tool("also_mine")],
    }
    before = copy.deepcopy(body)
    composed = compose(tier("middle"), body)
    assert body == before
    assert [m["role"] for m in composed["messages"]] == ["system", "system", "user"]
    assert composed["messages"][-1] == {"role": "user", "content": "hi"}
    names = [t["function"]["name"] for t in composed["tools"]]
    assert names == ["read", "write", "mine", "also_mine"]
    assert composed["temperature"] == 0


def test_compose_without_any_tool_leaves_tools_out() -> None:
    assert "tools" not in compose(tier("small"), {"messages": []})
    assert compose(tier("small"), {"messages": [], "tools": []})["tools"] == []


def test_compose_leaves_the_tier_as_it_was() -> None:
    middle = tier("middle")
    compose(middle, {"messages": []})["tools"].append(tool("late"))
    compose(middle, {"messages": []})["messages"].clear()
    assert middle == tier("middle")


def test_a_clients_copy_of_a_tiers_tool_is_not_sent_twice() -> None:
    composed = compose(tier("middle"), {"messages": [], "tools": [tool("write"), tool("mine")]})
    assert [t["function"]["name"] for t in composed["tools"]] == ["read", "write", "mine"]


def test_a_clients_other_tool_of_the_same_name_is_refused() -> None:
    with pytest.raises(RequestError, match="'middle' has a tool 'write'"):
        compose(tier("middle"), {"messages": [], "tools": [tool("write", "Otherwise.")]})


@pytest.mark.parametrize("body", [{}, {"messages": "hi"}, {"messages": [], "tools": {"a": 1}}])
def test_a_body_of_another_shape_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        compose(tier("middle"), body)


def test_tools_that_are_not_well_formed_are_left_to_the_engine() -> None:
    odd: list[Any] = ["text", {"type": "web_search"}, {"function": {"name": 5}}]
    composed = compose(tier("middle"), {"messages": [], "tools": odd})
    assert composed["tools"][2:] == odd


def test_merge_puts_all_texts_into_the_first_message() -> None:
    merged = build().with_context_role(ContextRole.MERGE)
    large = merged.get("large")
    assert large is not None
    (message,) = large.messages
    assert message.role == "system"
    assert message.text.endswith("\n\nUse the tools.\n\nAll the rules.")
    assert merged.default.name == "large"


def test_the_user_role_keeps_user_and_assistant_in_turn() -> None:
    large = build().with_context_role(ContextRole.USER).get("large")
    assert large is not None
    roles = [m["role"] for m in compose(large, {"messages": [{"role": "user"}]})["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert large.messages[2].text == ACKNOWLEDGEMENT


def test_a_clients_system_message_goes_where_the_template_takes_it() -> None:
    body = {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}]}
    small = tier("small")
    assert compose(small, body)["messages"][1:] == body["messages"]
    merged = compose(small.with_context_role(ContextRole.MERGE), body)["messages"]
    assert [m["role"] for m in merged] == ["system"]
    assert merged[0]["content"].endswith("NEED_MORE: tools\n\nBe kind.")
    as_user = compose(small.with_context_role(ContextRole.USER), body)["messages"]
    assert [m["role"] for m in as_user] == ["system", "user", "assistant"]


@given(
    texts=st.lists(st.text(alphabet="abc .\n", min_size=1).map(lambda t: t + "."), min_size=1),
    role=st.sampled_from([ContextRole.SYSTEM, ContextRole.USER]),
)
def test_outside_of_merge_each_tiers_messages_open_those_of_the_next(
    texts: list[str], role: ContextRole
) -> None:
    sources = [
        TierSource(
            name=f"t{i}",
            folder=f"t{i}",
            description="d",
            text=text,
            text_file="context.md",
            extends=f"t{i - 1}" if i else None,
        )
        for i, text in enumerate(texts)
    ]
    tiers = list(build_tiers(sources, agent_name="Ada").with_context_role(role))
    for smaller, larger in pairwise(tiers):
        assert larger.messages[: len(smaller.messages)] == smaller.messages
        assert len(larger.messages) > len(smaller.messages)


def test_only_the_agents_name_is_filled_in() -> None:
    text = 'I am {agent_name}, {"a": 1}, { x }, {{path}} and {}.'
    expected = 'I am Ada, {"a": 1}, { x }, {path} and {}.'
    assert render_text(text, agent_name="Ada", source="f.md") == expected


def test_a_name_with_braces_is_not_filled_in_again() -> None:
    assert render_text("{agent_name}", agent_name="{agent_name}", source="f") == "{agent_name}"


def test_an_unknown_placeholder_is_told_with_file_and_line() -> None:
    with pytest.raises(TierError, match=r"f\.md, line 3: unknown placeholder \{user\}"):
        render_text("a\nb\n{user}", agent_name="Ada", source="f.md")


def test_the_marker_is_what_the_texts_say() -> None:
    assert f"{NEED_MORE} tools" in tier("small").messages[0].text
