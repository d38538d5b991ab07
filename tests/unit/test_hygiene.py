"""Prompt hygiene: what each rule changes, what it leaves alone, and that nothing else moves."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from keepwarm.api.messages import chat_request
from keepwarm.core import hygiene, volatile
from keepwarm.core.hygiene import (
    MOST_EXPRESSION_CHARS,
    MOST_EXPRESSIONS,
    RULES,
    Cleaned,
    Kind,
    hygiene_of,
    told,
)
from keepwarm.core.prompt import prompt_of

BILLING = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=36ee5;"
RULE = "You look after a house. Name what you saw."


def clean(
    body: dict[str, Any], *rules: str, kind: Kind = "chat", lines: tuple[str, ...] = ()
) -> Cleaned:
    cleaner = hygiene_of(rules, lines)
    assert cleaner is not None
    before = copy.deepcopy(body)
    out = cleaner.clean(kind, body)
    assert body == before, "the client's body was changed in place"
    assert cleaner.clean(kind, out.body) == (out.body, {}), "cleaning twice isn't cleaning once"
    return out


def chat(system: Any, *rest: Any, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": text} for text in rest]
    return {"messages": [{"role": "system", "content": system}, *turns], **more}


def contents(body: dict[str, Any]) -> list[Any]:
    return [message["content"] for message in body["messages"]]


# drop-billing


@pytest.mark.parametrize(
    ("system", "left"),
    [
        (f"{BILLING}\n{RULE}", RULE),
        # Blocks are joined without a line break: what is glued to the header is the client's text.
        (f"{BILLING}{RULE}", RULE),
        (f"{BILLING} {RULE}", RULE),
        (f"{BILLING[:-1]}\n{RULE}", RULE),
        (f"{BILLING[:-1]}\r\n{RULE}", RULE),
        (f"{RULE}\n{BILLING}\nGo on.", f"{RULE}\nGo on."),
        (f"{BILLING}{BILLING}\n{BILLING}\n{RULE}", RULE),
    ],
)
def test_a_clients_billing_line_is_dropped_and_nothing_that_follows_it(
    system: str, left: str
) -> None:
    out = clean(chat(system, "Hello"), "drop-billing")
    assert contents(out.body) == [left, "Hello"]
    assert out.rewrites["drop-billing"] >= 1


@pytest.mark.parametrize(
    "system",
    [
        RULE,
        "x-anthropic-billing-header: is the line that others send.",
        f"A line of accounting looks so: {BILLING}",
        "x-anthropic-version: cc_version=2;",
        "",
        None,
        7,
    ],
)
def test_a_text_without_a_billing_line_is_the_same_object(system: Any) -> None:
    body = chat(system, "Hello")
    assert clean(body, "drop-billing").body is body


def test_a_users_message_keeps_a_billing_line() -> None:
    body = chat(RULE, BILLING)
    assert clean(body, "drop-billing").body is body


def test_a_block_of_nothing_but_the_line_is_left_out() -> None:
    blocks = [{"type": "text", "text": BILLING}, {"type": "text", "text": RULE}]
    body = {"system": blocks, "messages": [{"role": "user", "content": "Hello"}]}
    out = clean(body, "drop-billing", kind="messages")
    assert out.body["system"] == blocks[1:]
    assert contents(chat_request(out.body)) == [RULE, "Hello"]


def test_a_system_prompt_of_the_line_alone_leaves_none() -> None:
    body = {
        "system": [{"type": "text", "text": BILLING}],
        "messages": [{"role": "user", "content": "Hello"}],
    }
    out = clean(body, "drop-billing", kind="messages")
    assert contents(chat_request(out.body)) == ["Hello"]


def test_a_deployments_own_expressions_drop_whole_lines() -> None:
    system = f"Request 17 of today\n{RULE}\n  Request 18  \nRequest 19 is late"
    out = clean(chat(system, "Hello"), "drop-billing", lines=(r"Request \d+( of today)?",))
    assert contents(out.body)[0] == f"{RULE}\nRequest 19 is late"
    assert out.rewrites == {"drop-billing": 2}


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (("Request (",), "isn't a regular expression"),
        (("a{99999999999999999999}",), "isn't a regular expression"),
        ((".*",), "matches an empty line"),
        (("x" * (MOST_EXPRESSION_CHARS + 1),), "characters"),
        (("x",) * (MOST_EXPRESSIONS + 1), "expressions"),
    ],
)
def test_an_expression_that_cant_be_used_is_refused(lines: tuple[str, ...], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        hygiene_of(["drop-billing"], lines)


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sort_tools'.*sort-tools, move-volatile, drop-billing"):
        hygiene_of(["sort_tools"], ())


def test_without_rules_there_is_nothing_to_apply() -> None:
    assert hygiene_of((), ()).rules == frozenset()


# move-volatile


@pytest.mark.parametrize(
    "line",
    [
        "Today's date: 2026-11-24",
        "The current date is Tuesday, November 24, 2026.",
        "Today is Tuesday.",
        "Session id: 1f0c9a52-9d4e-4b0a-8f7e-0d3f5a6b7c8d",
        "Conversation started: Monday, March 9, 2026 06:00 PM",
    ],
)
def test_what_holds_for_a_day_or_a_conversation_goes_behind_the_first_question(line: str) -> None:
    out = clean(chat(f"{RULE}\n{line}\nBe brief.", "One?", "Two?"), "move-volatile")
    assert contents(out.body) == [f"{RULE}\nBe brief.", f"One?\n\n{line}", "Two?"]
    assert out.rewrites == {"move-volatile": 1}


@pytest.mark.parametrize(
    "line",
    [
        "Current date and time: Monday, March 9, 2026 at 06:00:31 PM PDT",
        "Current time: 2026-11-24T10:22:31Z",
        "It is 10:22 now.",
        "Request: req_8f3kQ2mZ4a1",
    ],
)
def test_what_is_new_with_each_request_goes_behind_the_last_question(line: str) -> None:
    out = clean(chat(f"  {line}\n{RULE}", "One?", "Two?"), "move-volatile")
    assert contents(out.body) == [RULE, "One?", f"Two?\n\n{line}"]


def test_the_day_comes_before_the_hour_where_both_go_behind_one_question() -> None:
    system = f"It is 10:22 now.\nToday's date: 2026-11-24\n{RULE}"
    out = clean(chat(system, "One?"), "move-volatile")
    assert contents(out.body)[1] == "One?\n\nToday's date: 2026-11-24\n\nIt is 10:22 now."


@pytest.mark.parametrize(
    "system",
    [
        RULE,
        f"{RULE} Work in /srv/alpha/data on host build7.internal.",
        # It says more than a date.
        f"{RULE} It is 2026-11-24 today, so speak of winter, of the feasts and of what is to come.",
        # Parts of something that stands together.
        f'{RULE}\n{{\n"created": "2026-11-24"\n}}',
        f"{RULE}\n```\nCurrent time: 10:22:31\n```",
        f"{RULE}\n| 2026-11-24 | Tuesday |",
        RULE + "".join(f"\n2026-11-{day}: a feast" for day in range(10, 24)),
        # Nothing would be left.
        "Today's date: 2026-11-24",
    ],
)
def test_a_text_that_tells_more_than_a_date_is_the_same_object(system: str) -> None:
    body = chat(system, "One?")
    assert clean(body, "move-volatile").body is body


@pytest.mark.parametrize("rest", [[], [""], [None], [[{"type": "tool_result", "content": "x"}]]])
def test_without_a_question_nothing_moves(rest: list[Any]) -> None:
    body = chat(f"Today's date: 2026-11-24\n{RULE}", *rest)
    assert clean(body, "move-volatile").body is body


def test_a_later_system_message_is_history_and_stays() -> None:
    body = chat(RULE, "One?")
    body["messages"].append({"role": "system", "content": "It is 10:22 now.\nGo on."})
    assert clean(body, "move-volatile", "drop-billing").body is body


def test_a_tools_result_is_no_question() -> None:
    result = [{"type": "tool_result", "tool_use_id": "a", "content": "dry"}]
    body = {
        "system": f"{RULE}\nIt is 10:22 now.",
        "messages": [{"role": "user", "content": "One?"}, {"role": "user", "content": result}],
    }
    out = clean(body, "move-volatile", kind="messages")
    assert contents(out.body) == ["One?\n\nIt is 10:22 now.", result]


def test_a_question_in_parts_stays_in_as_many_parts() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    text = {"type": "text", "text": "One?"}
    line = "It is 10:22 now."
    out = clean(chat(f"{RULE}\n{line}", [image, text]), "move-volatile")
    assert contents(out.body)[1] == [image, {"type": "text", "text": f"One?\n\n{line}"}]
    out = clean(chat(f"{RULE}\n{line}", [text, image]), "move-volatile")
    assert contents(out.body)[1] == [text, image, {"type": "text", "text": line}]


@pytest.mark.parametrize(
    "asked", ["One?", [{"role": "user", "content": [{"type": "input_text", "text": "One?"}]}]]
)
def test_responses_have_their_rules_in_instructions(asked: Any) -> None:
    body = {"instructions": f"{BILLING}\n{RULE}\nToday's date: 2026-11-24", "input": asked}
    out = clean(body, *RULES, kind="responses")
    assert out.body["instructions"] == RULE
    text = "One?\n\nToday's date: 2026-11-24"
    own = out.body["input"]
    assert (own if isinstance(own, str) else own[0]["content"][0]["text"]) == text
    assert told(out.rewrites) == "move-volatile=1, drop-billing=1"


def digests(*turns: str, line: str) -> list[bytes]:
    body = clean(chat(f"{RULE}\n{line}", *turns), "move-volatile").body
    return [mark.digest for mark in prompt_of(body, fingerprint="f", namespace="n").marks]


def test_a_conversation_keeps_its_prefix_as_far_as_its_line_holds() -> None:
    day = "Today's date: 2026-11-24"
    assert digests("One?", "Two?", line=day)[: len(digests("One?", line=day))] == digests(
        "One?", line=day
    )
    now, later = (digests(*turns, line=f"It is {at} now.") for turns, at in (
        (("One?", "Two?", "Three?"), "10:22"), (("One?", "Two?", "Three?", "Four?"), "10:23")
    ))  # fmt: skip
    common = sum(a == b for a, b in zip(now, later, strict=False))
    # All but the last turn, whose line is another one now.
    assert common == len(now) - 1


# sort-tools


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def shuffled(value: Any) -> Any:
    """The same JSON with all keys the other way round."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


def test_tools_in_any_order_of_keys_and_names_become_one_text() -> None:
    tools = [tool("look", place={"type": "string"}, depth={"type": "integer"}), tool("wait")]
    texts = {
        json.dumps(clean({"tools": given}, "sort-tools").body["tools"])
        for given in (tools, shuffled(tools), tools[::-1], shuffled(tools[::-1]))
    }
    assert len(texts) == 1


def test_tools_as_people_write_them_stay_as_they_are() -> None:
    function = {
        "name": "look",
        "description": "Look at a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "depth": {"type": "integer"}},
            "required": ["place"],
        },
    }
    body = {"tools": [{"type": "function", "function": function}]}
    assert clean(body, "sort-tools").body is body


def test_required_arguments_keep_the_order_their_author_gave_them() -> None:
    given = tool("edit", new={}, old={}, path={}, dry={})
    given["function"]["parameters"]["required"] = ["path", "old", "new"]
    out = clean({"tools": [given]}, "sort-tools").body["tools"][0]
    assert list(out["function"]["parameters"]["properties"]) == ["path", "old", "new", "dry"]


def test_a_tool_is_the_same_prefix_in_either_api() -> None:
    schema = shuffled(tool("look", place={}, depth={})["function"]["parameters"])
    one = {"tools": [shuffled(tool("look", place={}, depth={}))], "messages": []}
    two = {"tools": [{"name": "look", "input_schema": schema}], "messages": []}
    out = chat_request(clean(two, "sort-tools", kind="messages").body)
    assert json.dumps(out["tools"]) == json.dumps(clean(one, "sort-tools").body["tools"])


@pytest.mark.parametrize("tools", [None, [], "all", [tool("b"), "a"], {"b": 1, "a": 2}])
def test_what_isnt_a_list_of_tools_is_left_alone(tools: Any) -> None:
    body = {"tools": tools}
    assert clean(body, "sort-tools").body is body


def test_a_schema_of_any_depth_is_survived() -> None:
    deep: Any = {"b": 1, "a": 2}
    for _ in range(800):
        deep = {"z": deep, "a": 1}
    cleaner = hygiene_of(["sort-tools"], ())
    assert cleaner
    out = cleaner.clean("chat", {"tools": [{"name": "x", "input_schema": deep}]}).body
    assert list(out["tools"][0]["input_schema"]) == ["a", "z"]


# All of them, on anything


LINES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            BILLING,
            BILLING[:-1],
            f"{BILLING}{BILLING} x=y",
            "x-anthropic-billing-header:",
            "Today's date: 2026-11-24",
            "It is 10:22 now.",
            "9 May\n2026-11-24",
            "Session 1f0c9a52-9d4e-4b0a-8f7e-0d3f5a6b7c8d",
            "Request 12",
            "```",
            RULE,
        ]
    ),
)
TEXTS = st.lists(LINES, max_size=6).flatmap(
    lambda lines: st.sampled_from(["\n", "", "\r\n", " "]).map(lambda glue: glue.join(lines))
)
PARTS = st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=3)
CONTENTS = st.one_of(TEXTS, PARTS, st.none())
MESSAGES = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "developer", "user", "assistant"]),
        CONTENTS,
    ),
    max_size=5,
)
KEYS = st.sampled_from(["type", "name", "properties", "required", "function", "b", "a"])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from(["a", "b", "name"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)
BODIES = st.fixed_dictionaries(
    {"messages": MESSAGES, "input": st.one_of(MESSAGES, TEXTS)},
    optional={
        "system": CONTENTS,
        "instructions": TEXTS,
        "tools": st.lists(st.dictionaries(KEYS, JSON, max_size=4), max_size=4),
    },
)
KINDS = st.sampled_from(["chat", "responses", "messages"])
ANY_RULES = st.sets(st.sampled_from(RULES), min_size=1)


@given(BODIES, KINDS, ANY_RULES)
def test_cleaning_twice_is_cleaning_once_and_changes_no_tools_meaning(
    body: dict[str, Any], kind: Kind, rules: set[str]
) -> None:
    out = clean(body, *rules, kind=kind, lines=(r"Request \d+",))
    assert set(out.rewrites) <= rules | {"drop-billing"}
    assert (out.body is body) == (not out.rewrites)
    if "tools" in body:
        before, after = (
            sorted(json.dumps(tool, sort_keys=True) for tool in b["tools"])
            for b in (body, out.body)
        )
        assert before == after


@given(BODIES, KINDS)
def test_moving_loses_no_line(body: dict[str, Any], kind: Kind) -> None:
    def lines(value: Any) -> list[str]:
        if isinstance(value, str):
            return [line.strip() for line in value.split("\n") if line.strip()]
        if isinstance(value, dict):
            # A part that becomes empty goes, with its type.
            value = [inner for key, inner in value.items() if key not in ("type", "role")]
        return [x for item in value for x in lines(item)] if isinstance(value, list) else []

    out = clean(body, "move-volatile", kind=kind)
    # The billing line goes whatever the rules.
    assert sorted(lines(out.body)) == sorted(lines(clean(body, kind=kind).body))


VOLATILE = st.one_of(
    *(
        st.from_regex(pattern)
        for kind, pattern in volatile._PATTERNS
        if kind in hygiene._MOVED_KINDS and not pattern.pattern.startswith("(?m:^)")
    )
)


@given(VOLATILE)
def test_the_quick_look_at_a_line_misses_nothing_that_is_volatile(line: str) -> None:
    found = [one.kind for one in volatile.find_volatile(line)]
    assume(hygiene._MOVED_KINDS.intersection(found))
    assert hygiene._GLANCE.search(line)
    assert hygiene._HINT.search(line)


PLAIN = st.text(alphabet=st.characters(exclude_categories=["Nd"]), max_size=40).filter(
    lambda text: "day" not in text
)


@given(st.lists(PLAIN, max_size=5).map("\n".join), st.text(max_size=20))
def test_a_text_with_nothing_volatile_is_untouched(system: str, question: str) -> None:
    body = chat(system, question)
    assert clean(body, *RULES).body is body


def test_texts_are_left_alone_where_somebody_counts_their_characters() -> None:
    cleaner = hygiene_of(RULES, ())
    assert cleaner
    body = chat(f"{BILLING}\n{RULE}\nIt is 10:22 now.", "One?", tools=[tool("b"), tool("a")])
    out = cleaner.clean("chat", body, keeps_text=True)
    assert out.body["messages"] is body["messages"]
    assert out.rewrites == {"sort-tools": 2}
