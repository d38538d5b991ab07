"""Prompt identity: what makes two prompts the same up to a place, and what doesn't."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.api.reading import Api, read
from keepwarm.core.prompt import (
    BLOCK_CHARS,
    BLOCK_TOKENS,
    Prompt,
    SharedEnd,
    prefix_of,
    prompt_of,
    segment_of,
    segments_of,
)
from keepwarm.core.reply import read_reply

LONG = "The quick brown fox jumps over the lazy dog. " * 20
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Use {name}.",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
    for name in ("clock", "search")
]
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"a": "x"}'}}
BODY: dict[str, Any] = {
    "tools": TOOLS,
    "messages": [
        {"role": "system", "content": "You help. " + LONG},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        {"role": "assistant", "content": "It is noon."},
        {"role": "user", "content": "And now? " + LONG},
    ],
}


def identity(
    body: dict[str, Any],
    *,
    api: Api = "chat",
    fingerprint: str = "model",
    namespace: str = "me",
    shared_segments: int = 0,
) -> Prompt:
    return prompt_of(
        read(api, body),
        fingerprint=fingerprint,
        namespace=namespace,
        shared_segments=shared_segments,
    )


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    body = copy.deepcopy(BODY)
    change(body)
    return body


def shared_marks(first: Prompt, second: Prompt) -> int:
    """How many marks two prompts begin with alike; none may be alike behind."""
    a, b = [m.digest for m in first.marks], [m.digest for m in second.marks]
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    assert not set(a[same:]) & set(b[same:]), "a mark behind a difference is shared"
    return same


def marks_before_message(prompt: Prompt, index: int) -> int:
    """How many marks stand before message `index` of BODY."""
    if index == 0:
        return 1  # the head's
    upto = {**BODY, "messages": BODY["messages"][:index]}
    return len(identity(upto).marks)


def test_equal_bodies_have_equal_identities() -> None:
    assert identity(copy.deepcopy(BODY)) == identity(BODY)


def test_what_only_shapes_the_reply_is_no_part_of_the_identity() -> None:
    body = {
        **BODY,
        "model": "other",
        "temperature": 0.3,
        "stream": True,
        "max_tokens": 5,
        "seed": 1,
        "user": "u",
        "tool_choice": "auto",
    }
    assert identity(body) == identity(BODY)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b["tools"][0]["function"].update(description="Use it otherwise."),
        lambda b: b["tools"].reverse(),
        lambda b: b["tools"].pop(),
        lambda b: b.pop("tools"),
        lambda b: b.update(tool_choice="none"),
        lambda b: b.update(chat_template_kwargs={"enable_thinking": False}),
        lambda b: b.update(response_format={"type": "json_object"}),
        lambda b: b.update(reasoning_effort="high"),
        lambda b: b["tools"][0].update(
            function=dict(reversed(b["tools"][0]["function"].items()))  # another order of keys
        ),
    ],
    ids=["text", "order", "fewer", "none", "choice", "kwargs", "format", "effort", "keys"],
)
def test_a_change_in_the_head_changes_everything(
    change: Callable[[dict[str, Any]], object],
) -> None:
    assert shared_marks(identity(BODY), identity(changed(change))) == 0


def test_another_namespace_or_fingerprint_changes_everything() -> None:
    assert shared_marks(identity(BODY), identity(BODY, namespace="you")) == 0
    assert shared_marks(identity(BODY), identity(BODY, fingerprint="other")) == 0


def test_a_namespace_and_a_fingerprint_dont_run_into_each_other() -> None:
    first = identity(BODY, fingerprint="ab", namespace="c")
    second = identity(BODY, fingerprint="a", namespace="bc")
    assert shared_marks(first, second) == 0


@pytest.mark.parametrize("index", range(len(BODY["messages"])))
def test_a_change_in_a_message_changes_the_chain_from_there_on(index: int) -> None:
    message = BODY["messages"][index]
    if message.get("tool_calls"):
        body = changed(lambda b: b["messages"][index]["tool_calls"][0]["function"].update(name="x"))
    else:
        body = changed(lambda b: b["messages"][index].update(content="!" + message["content"]))
    before = identity(BODY)
    assert shared_marks(before, identity(body)) == marks_before_message(before, index)


@pytest.mark.parametrize("at", [0, 1, BLOCK_CHARS - 1, BLOCK_CHARS, 3 * BLOCK_CHARS + 7])
def test_a_change_inside_a_long_message_keeps_the_blocks_before_it(at: int) -> None:
    text = BODY["messages"][-1]["content"]
    other = text[:at] + "#" + text[at + 1 :]
    body = changed(lambda b: b["messages"][-1].update(content=other))
    prompt = identity(BODY)
    before = marks_before_message(prompt, len(BODY["messages"]) - 1)
    assert shared_marks(prompt, identity(body)) == before + at // BLOCK_CHARS


def test_text_added_to_the_last_message_keeps_its_whole_blocks() -> None:
    def asked(text: str) -> Prompt:
        return identity({"messages": [{"role": "user", "content": text}]})

    whole = LONG[: 2 * BLOCK_CHARS]
    # The head's mark and two blocks; that the message ended there is another thing.
    assert shared_marks(asked(whole), asked(whole + "more")) == 3


def test_marks_stand_behind_the_head_every_block_and_every_message() -> None:
    text = "x" * (3 * BLOCK_CHARS + 10)
    prompt = identity({"messages": [{"role": "user", "content": text}]})
    places = [mark.chars - prompt.marks[0].chars for mark in prompt.marks]
    assert places[:4] == [0, BLOCK_CHARS, 2 * BLOCK_CHARS, 3 * BLOCK_CHARS]
    assert len(places) == 5
    assert places[4] > len(text)


def test_message_borders_are_part_of_the_identity() -> None:
    one = {"messages": [{"role": "user", "content": "ab"}]}
    two = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    assert shared_marks(identity(one), identity(two)) == 1


def test_a_role_is_part_of_the_identity() -> None:
    first = {"messages": [{"role": "user", "content": "a"}]}
    second = {"messages": [{"role": "assistant", "content": "a"}]}
    assert shared_marks(identity(first), identity(second)) == 1


@pytest.mark.parametrize(
    "variant",
    [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": [], "tool_calls": [CALL]},
        {"role": "assistant", "content": " \n", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "clock", "arguments": {"a": "x"}}}],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "other", "function": {"name": "clock", "arguments": '{"a":"x"}'}}
            ],
        },
    ],
    ids=["empty", "absent", "list", "blank", "reasoning", "object", "reprinted"],
)
def test_a_tool_call_sent_back_in_another_spelling_is_the_same(variant: dict[str, Any]) -> None:
    body = changed(lambda b: b["messages"].__setitem__(2, variant))
    assert identity(body) == identity(BODY)


def test_other_arguments_are_another_tool_call() -> None:
    call = {"function": {"name": "clock", "arguments": '{"a": "y"}'}}
    body = changed(lambda b: b["messages"][2].update(tool_calls=[call]))
    prompt = identity(BODY)
    assert shared_marks(prompt, identity(body)) == marks_before_message(prompt, 2)


def test_a_text_part_is_the_same_as_its_text() -> None:
    body = changed(
        lambda b: [
            m.update(content=[{"type": "text", "text": m["content"]}])
            for m in b["messages"]
            if m["content"]
        ]
    )
    assert identity(body) == identity(BODY)


def test_an_image_is_part_of_the_identity() -> None:
    def asked(url: str) -> Prompt:
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "What is this?"},
        ]
        return identity({"messages": [{"role": "user", "content": parts}]})

    assert shared_marks(asked("a.png"), asked("b.png")) == 1
    assert asked("a.png") == asked("a.png")


def test_what_the_model_said_is_found_when_the_client_sends_it_back() -> None:
    raw = json.dumps(
        {"choices": [{"message": {"content": " It is noon.\n", "tool_calls": [CALL]}}]}
    )
    reply = read_reply(raw.encode(), streamed=False).segment
    assert reply is not None
    expected = identity(BODY).continued(reply)
    answer = {"role": "assistant", "content": "It is noon.", "tool_calls": [CALL]}
    more = {"role": "user", "content": "Thanks."}
    turned = identity(changed(lambda b: b["messages"].extend([answer, more])))
    assert expected.digest in [mark.digest for mark in turned.marks]


def test_the_static_end_is_behind_the_leading_system_messages() -> None:
    prompt = identity(BODY)
    assert prompt.static == prompt.marks[marks_before_message(prompt, 1) - 1]
    later = [BODY["messages"][0], {"role": "developer", "content": "Be brief."}]
    two = identity({"messages": [*later, *BODY["messages"][1:]]})
    assert two.static == identity({"messages": later}).marks[-1]


def test_tools_alone_are_static_and_a_bare_question_has_nothing_static() -> None:
    question = [{"role": "user", "content": "Hello"}]
    assert identity({"messages": question}).static is None
    with_tools = identity({"messages": question, "tools": TOOLS})
    assert with_tools.static == with_tools.marks[1]
    assert with_tools.marks[1].chars == with_tools.marks[0].chars


def test_a_static_end_isnt_shared_with_a_prompt_that_goes_on_with_another_role() -> None:
    # The tokens that all requests share go on into the opening of the user's turn.
    user = {"role": "user", "content": "Hello"}
    system = {"role": "system", "content": LONG}
    more = {"role": "system", "content": "More."}
    greeting = {"role": "assistant", "content": "Welcome."}
    asked = identity({"messages": [system, user]})
    assert asked.static is not None
    for messages in ([system, more, user], [system, greeting, user]):
        other = identity({"messages": messages})
        assert asked.static.digest not in [mark.digest for mark in other.marks]
        assert shared_marks(asked, other) == asked.static_index
    assert identity({"messages": [system, greeting, user]}).static is None


def test_a_system_message_behind_the_first_turn_isnt_static() -> None:
    late = [*BODY["messages"], {"role": "system", "content": "By the way."}]
    assert identity({**BODY, "messages": late}).static == identity(BODY).static


def test_turns_count_how_often_the_model_is_asked() -> None:
    # By a user, by a tool's result, and by the user again.
    assert identity(BODY).turns == 3
    system, user, call, result, *_ = BODY["messages"]
    for messages, turns in (
        ([system], 0),
        ([system, user], 1),
        ([system, user, user], 1),
        ([system, user, call, result, result], 2),
        ([system, user, call], 1),
        ([user, system, user], 1),
    ):
        assert identity({"messages": messages}).turns == turns


def test_turns_of_a_response_count_what_its_functions_gave() -> None:
    call = {"type": "function_call", "name": "clock", "arguments": "{}", "call_id": "c"}
    gave = {"type": "function_call_output", "call_id": "c", "output": "noon"}
    asked = [{"role": "user", "content": "What time is it?"}, {"type": "reasoning"}, call, gave]
    assert identity({"input": asked}, api="responses").turns == 2
    assert identity({"input": "What time is it?"}, api="responses").turns == 1


@pytest.mark.parametrize("shared", [1, 2])
def test_two_tenants_share_a_tiers_marks_and_nothing_behind(shared: int) -> None:
    tier = [{"role": "system", "content": "Tier. " + LONG}, {"role": "system", "content": "More."}]
    body = {"tools": TOOLS, "messages": [*tier[:shared], {"role": "user", "content": LONG}]}
    mine = identity(body, namespace="me", shared_segments=shared)
    yours = identity(body, namespace="you", shared_segments=shared)
    alone = identity({"tools": TOOLS, "messages": tier[:shared]}, shared_segments=shared)
    assert shared_marks(mine, yours) == len(alone.marks)
    assert mine.static == yours.static == alone.marks[-1]
    assert mine.is_static_shared


def test_a_tenants_own_copy_of_a_tiers_text_isnt_the_tiers() -> None:
    body = {"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": "Hi"}]}
    tier = identity(body, shared_segments=1)
    own = identity(body)
    assert shared_marks(tier, own) == 0
    assert not own.is_static_shared


def test_a_system_message_of_the_clients_behind_a_tier_is_its_own() -> None:
    tier = {"role": "system", "content": LONG}
    own = {"role": "system", "content": "My rules."}
    user = {"role": "user", "content": "Hi"}
    body = {"messages": [tier, own, user]}
    mine = identity(body, namespace="me", shared_segments=1)
    yours = identity(body, namespace="you", shared_segments=1)
    assert mine.static is not None
    assert yours.static is not None
    assert mine.static.digest != yours.static.digest
    assert not mine.is_static_shared


def test_a_response_with_the_same_text_is_the_same_prompt_as_a_chat() -> None:
    system, user = LONG, "What time is it?"
    chat = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]}
    by_instructions = {"instructions": system, "input": user}
    parts = [{"type": "input_text", "text": user}]
    by_items = {
        "instructions": system,
        "input": [{"type": "message", "role": "user", "content": parts}],
    }
    expected = identity(chat).marks
    assert identity(by_instructions, api="responses").marks == expected
    assert identity(by_items, api="responses").marks == expected


def test_a_responses_function_call_and_output_stand_in_the_identity() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "clock", "arguments": '{"a": "x"}'}
    output = {"type": "function_call_output", "call_id": "1", "output": "noon"}
    items = [{"role": "user", "content": "?"}, call, output]

    def of(items: list[Any]) -> Prompt:
        return identity({"input": items}, api="responses")

    reprinted = {**call, "arguments": '{"a":"x"}'}
    assert of(items) == of([items[0], reprinted, output])
    assert shared_marks(of(items), of([items[0], call, {**output, "output": "one"}])) == 3


def test_token_prompts_have_exact_marks_every_block_and_at_the_end() -> None:
    tokens = list(range(2 * BLOCK_TOKENS + 5))
    prompt = identity({"prompt": tokens}, api="completion")
    assert [m.tokens for m in prompt.marks] == [BLOCK_TOKENS, 2 * BLOCK_TOKENS, len(tokens)]
    other = [*tokens[:BLOCK_TOKENS], 7, *tokens[BLOCK_TOKENS + 1 :]]
    assert shared_marks(prompt, identity({"prompt": other}, api="completion")) == 1
    assert prompt.static is None


def test_a_shared_end_gets_a_mark_that_only_depends_on_what_stands_before_it() -> None:
    def asked(text: str) -> tuple[Prompt, dict[str, Any]]:
        body = {"messages": [{"role": "user", "content": text}]}
        prompt = prompt_of(body, fingerprint="model", namespace="me", ends=[SharedEnd(0, 100)])
        return prompt, body

    first, body = asked(LONG)
    second, _ = asked(LONG[:100] + "otherwise")
    part = prefix_of(first, segments_of(body), SharedEnd(0, 100))
    assert part.marks[-1].chars == 100
    assert part.static == part.marks[-1]
    assert part.marks[-1].digest in [m.digest for m in second.marks]
    plain = identity(body)
    assert set(plain.marks) < set(first.marks)


_KEYS = st.sampled_from(
    """role content type text tool_calls function name arguments messages input tools prompt
    system instructions output user assistant tool function_call input_text""".split()  # noqa: SIM905 - as a list it would take twenty lines
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _KEYS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=15,
)


@given(st.dictionaries(_KEYS, _JSON, max_size=5), st.sampled_from(["chat", "responses"]))
def test_no_shape_of_body_makes_reading_it_fail(body: dict[str, Any], api: Api) -> None:
    first = identity(body, api=api)
    assert first == identity(copy.deepcopy(body), api=api)
    chars = [mark.chars for mark in first.marks]
    assert chars == sorted(chars)


@given(_JSON)
def test_no_shape_of_raw_prompt_makes_reading_it_fail(prompt: object) -> None:
    assert identity({"prompt": prompt}, api="completion").marks


@given(_JSON)
def test_no_shape_of_message_makes_reading_it_fail(value: object) -> None:
    message = {"role": "assistant", "content": value, "tool_calls": [value, {"function": value}]}
    segment_of(message)


def test_lone_surrogates_are_read_like_other_text() -> None:
    body = {
        "tools": [{"name": "\ud800"}],
        "messages": [{"role": "us\udfffer", "content": "\ud800 text"}],
    }
    assert identity(body) == identity(copy.deepcopy(body))
    assert identity({"prompt": "\ud800"}, api="completion").marks
    assert identity({"prompt": ["\ud800"]}, api="completion").marks


def test_token_ids_of_any_size_are_read() -> None:
    prompts = [identity({"prompt": [1, n]}, api="completion") for n in (2**31, 2**70, -1, True)]
    assert len({p.marks[-1].digest for p in prompts}) == 4
