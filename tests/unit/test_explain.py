"""Where prompts part, what that looks like, and which cause is named for cold tokens."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.plan import Source
from keepwarm.core.prompt import Segment, prompt_of
from keepwarm.core.texts import common_chars, common_tail_chars
from keepwarm.dashboard import __file__ as dashboard_file
from keepwarm.explain.difference import Cause, Difference, first_difference, sent_difference
from keepwarm.explain.explanation import (
    ExplainedFacts,
    Explanation,
    Nearest,
    advice_for,
    explain,
    place_of,
    tokens_at,
)
from keepwarm.explain.parts import (
    Parts,
    chars_before,
    parts_of,
)

SYSTEM = "You look after a house. " + "Be brief and name what you saw. " * 12


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(name: str, description: str = "Does it.") -> dict[str, Any]:
    properties = {"path": {"type": "string"}, "lines": {"type": "integer"}}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties},
        },
    }


TOOLS = [tool("read"), tool("write"), tool("list")]


def parts(*messages: dict[str, Any], **body: Any) -> Parts:
    return parts_of({"messages": list(messages), **body})


def between(before: Parts, after: Parts) -> Difference:
    difference = first_difference(before, after)
    assert difference is not None
    return difference


# --- where prompts part


@pytest.mark.parametrize(
    ("before", "after", "cause", "kind"),
    [
        ("It is 2026-11-24T09:00:01Z now.", "It is 2026-11-24T09:00:07Z now.", "timestamp", "date"),
        ("Today is Monday.", "Today is Tuesday.", "timestamp", "date"),
        ("Current time: 10:05.", "Current time: 10:15.", "timestamp", "time"),
        ("Started at 1764000000 sharp.", "Started at 1764000123 sharp.", "timestamp", "time"),
        ("Session req_8f3kQ2mZ4.", "Session req_9a1bX7pL2.", "identifier", "id"),
        (
            "Run 3f2504e0-4f89-11d3-9a0c-0305e82c3301.",
            "Run 7c9e6679-7425-40de-944b-e07fc1f90ae7.",
            "identifier",
            "id",
        ),
        ("Work in /home/ada/notes.", "Work in /home/bob/notes.", "environment", "path"),
        ("You run as pid 4711.", "You run as pid 4718.", "environment", "pid"),
    ],
)
def test_what_changes_by_its_nature_is_recognised(
    before: str, after: str, cause: str, kind: str
) -> None:
    found = between(parts(system(f"{before} {SYSTEM}")), parts(system(f"{after} {SYSTEM}")))
    assert (found.cause.value, found.kind) == (cause, kind)
    assert (found.where, found.index, found.name) == ("message", 0, "system")


def test_a_changed_date_is_shown_whole_with_what_stands_before_it() -> None:
    found = between(
        parts(system(SYSTEM + "\nNow: 2026-11-24 09:59. Go.")),
        parts(system(SYSTEM + "\nNow: 2026-11-24 10:00. Go.")),
    )
    assert (found.before, found.after) == ("2026-11-24 09:59", "2026-11-24 10:00")
    assert found.context is not None
    assert found.context.endswith("\nNow: ")
    assert found.at_chars == len(SYSTEM) + len("\nNow: 2026-11-24 ")


def test_a_date_deep_in_a_long_text_is_recognised() -> None:
    long = SYSTEM * 30
    found = between(
        parts(system(f"{long} As of 24 November 2026 all is well. {long}")),
        parts(system(f"{long} As of 25 November 2026 all is well. {long}")),
    )
    assert found.cause is Cause.TIMESTAMP
    assert found.before == "24 November 2026"


def test_other_changes_of_the_system_text_are_called_so() -> None:
    found = between(parts(system("Be kind. " + SYSTEM)), parts(system("Be calm. " + SYSTEM)))
    assert found.cause is Cause.TEXT_CHANGED
    assert (found.before, found.after) == ("kind", "calm")


def test_a_developer_message_counts_as_system_text() -> None:
    developer = {"role": "developer", "content": "Mind the cat."}
    other = {"role": "developer", "content": "Mind the dog."}
    found = between(parts(system("S"), developer), parts(system("S"), other))
    assert found.cause is Cause.TEXT_CHANGED
    assert found.index == 1


def test_reordered_keys_of_a_tool_are_told_from_a_changed_tool() -> None:
    reordered = copy.deepcopy(TOOLS)
    properties = reordered[1]["function"]["parameters"]["properties"]
    reordered[1]["function"]["parameters"]["properties"] = dict(reversed(properties.items()))
    found = between(parts(user("x"), tools=TOOLS), parts(user("x"), tools=reordered))
    assert (found.cause, found.index, found.name) == (Cause.KEY_ORDER, 1, "write")
    changed = [TOOLS[0], tool("write", "Does it twice."), TOOLS[2]]
    found = between(parts(user("x"), tools=TOOLS), parts(user("x"), tools=changed))
    assert (found.cause, found.index, found.name) == (Cause.TOOL_CHANGED, 1, "write")


def test_a_date_in_a_tools_description_is_a_date() -> None:
    found = between(
        parts(user("x"), tools=[tool("read", "As of 2026-11-24, reads.")]),
        parts(user("x"), tools=[tool("read", "As of 2026-11-25, reads.")]),
    )
    assert (found.cause, found.where, found.name) == (Cause.TIMESTAMP, "tool", "read")


@pytest.mark.parametrize(
    ("tools", "cause", "index", "name"),
    [
        ([*TOOLS, tool("find")], Cause.TOOL_ADDED, 3, "find"),
        ([TOOLS[0], tool("find"), *TOOLS[1:]], Cause.TOOL_ADDED, 1, "find"),
        (TOOLS[:2], Cause.TOOL_REMOVED, 2, "list"),
        (TOOLS[1:], Cause.TOOL_REMOVED, 0, "read"),
        ([TOOLS[1], TOOLS[0], TOOLS[2]], Cause.TOOL_ORDER, 0, "write"),
        ([], Cause.TOOL_REMOVED, 0, "read"),
    ],
)
def test_changes_of_the_tool_list_are_named(
    tools: list[dict[str, Any]], cause: Cause, index: int, name: str
) -> None:
    found = between(parts(user("x"), tools=TOOLS), parts(user("x"), tools=tools))
    assert (found.cause, found.index, found.name) == (cause, index, name)


def test_a_changed_template_argument_is_named() -> None:
    found = between(
        parts(user("x"), chat_template_kwargs={"enable_thinking": True}),
        parts(user("x"), chat_template_kwargs={"enable_thinking": False}),
    )
    assert (found.cause, found.where) == (Cause.ARGUMENT_CHANGED, "argument")
    assert found.name == "chat_template_kwargs"


def test_reordered_json_inside_a_message_is_recognised() -> None:
    state = {"open": 3, "closed": {"today": 1, "ever": 41}, "names": ["a", "b"]}
    other = {"open": 3, "closed": {"ever": 41, "today": 1}, "names": ["a", "b"]}
    found = between(
        parts(system(f"State: {json.dumps(state)} {SYSTEM}")),
        parts(system(f"State: {json.dumps(other)} {SYSTEM}")),
    )
    assert found.cause is Cause.KEY_ORDER


def test_json_with_another_value_is_not_called_reordered() -> None:
    found = between(
        parts(system('State: {"open": 3, "closed": 4} ' + SYSTEM)),
        parts(system('State: {"open": 3, "closed": 5} ' + SYSTEM)),
    )
    assert found.cause is Cause.TEXT_CHANGED


def test_another_last_message_is_new_text_and_not_a_change() -> None:
    found = between(
        parts(system(SYSTEM), user("Where is the cat?")),
        parts(system(SYSTEM), user("Is the door shut?")),
    )
    assert found.cause is Cause.NEW_TEXT


def test_new_text_that_begins_with_a_date_is_new_text() -> None:
    found = between(
        parts(system(SYSTEM), user("2026-11-24: the cat is on the roof")),
        parts(system(SYSTEM), user("2026-11-25: somebody rang twice")),
    )
    assert found.cause is Cause.NEW_TEXT


def test_the_same_last_message_with_a_new_date_is_a_date() -> None:
    text = "Summarise this: " + SYSTEM
    found = between(
        parts(system(SYSTEM), user(f"2026-11-24 09:00 {text}")),
        parts(system(SYSTEM), user(f"2026-11-24 09:05 {text}")),
    )
    assert found.cause is Cause.TIMESTAMP


def test_an_edited_earlier_turn_is_named() -> None:
    turns = [system("S"), user("Count to five."), said("1 2 3 4 5"), user("Again.")]
    edited = [turns[0], user("Count to six."), *turns[2:]]
    found = between(parts(*turns), parts(*edited))
    assert (found.cause, found.index) == (Cause.HISTORY_CHANGED, 1)


def test_left_out_turns_are_named() -> None:
    turns = [system("S"), user("One?"), said("1"), user("Two?"), said("2"), user("Three?")]
    cut = [turns[0], *turns[3:]]
    found = between(parts(*turns), parts(*cut))
    assert (found.cause, found.index) == (Cause.HISTORY_CUT, 1)


def test_another_conversation_is_not_an_edited_one() -> None:
    mine = [system("S"), user("Tell me of cats."), said("They purr."), user("And at night?")]
    other = [system("S"), user("List the doors."), said("Front, back."), user("Locked?")]
    assert between(parts(*mine), parts(*other)).cause is Cause.NEW_TEXT


def test_a_reply_that_comes_back_without_its_reasoning_is_named() -> None:
    reply = Segment("assistant", "<think>\nTwo and two.\n</think>\n\nFour.")
    before = parts(system("S"), user("2 + 2?")).continued(reply)
    found = between(before, parts(system("S"), user("2 + 2?"), said("Four."), user("Sure?")))
    assert (found.cause, found.index) == (Cause.REASONING_DROPPED, 2)


def test_a_prompt_that_continues_another_does_not_differ() -> None:
    before = parts(system("S"), user("Hello")).continued(Segment("assistant", "Hi."))
    assert first_difference(before, parts(system("S"), user("Hello"))) is None
    longer = parts(system("S"), user("Hello"), said("Hi."), user("Well?"))
    assert first_difference(before, longer) is None


def test_a_raw_prompt_is_compared_too() -> None:
    before = parts_of({"prompt": "Once upon a time there was " + SYSTEM})
    after = parts_of({"prompt": "Once upon a time there is " + SYSTEM})
    found = between(before, after)
    assert (found.where, found.at_chars) == ("message", len("Once upon a time there "))
    ids = parts_of({"prompt": [5, 6, 7, 8]})
    assert between(ids, parts_of({"prompt": [5, 6, 9]})).where == "tokens"


def test_the_place_of_a_difference_is_counted_as_the_marks_count() -> None:
    body = {"messages": [system("S" * 300), user("u" * 10), said("a" * 20), user("changed here")]}
    prompt = prompt_of(body, fingerprint="f", namespace="n")
    taken = parts_of(body)
    ends = [chars_before(taken.segments, count) for count in range(1, 5)]
    assert set(ends) <= {mark.chars for mark in prompt.marks}
    assert ends[-1] == prompt.chars


# --- sent otherwise, canonically the same


def call(arguments: str) -> dict[str, Any]:
    return {"type": "function", "id": "1", "function": {"name": "read", "arguments": arguments}}


def test_a_call_with_reordered_arguments_is_found_though_its_identity_is_equal() -> None:
    before = parts(user("x"), said("", tool_calls=[call('{"a": 1, "b": 2}')]), user("y"))
    after = parts(user("x"), said("", tool_calls=[call('{"b": 2, "a": 1}')]), user("y"))
    assert first_difference(before, after) is None
    found = sent_difference(before, after)
    assert found is not None
    assert (found.cause, found.index) == (Cause.KEY_ORDER, 1)


def test_reasoning_that_is_left_out_is_found_though_the_identity_is_equal() -> None:
    before = parts(user("x"), said("Four.", reasoning_content="2 + 2"), user("y"))
    after = parts(user("x"), said("Four."), user("y"))
    assert first_difference(before, after) is None
    found = sent_difference(before, after)
    assert found is not None
    assert found.cause is Cause.REASONING_DROPPED


def test_what_was_sent_alike_has_no_difference() -> None:
    assert sent_difference(parts(user("x")), parts(user("x"), said("a"), user("y"))) is None


# --- text and hashes


def test_a_difference_can_be_told_without_any_text_of_the_prompts() -> None:
    secret = "the safe is behind the clock"
    found = between(
        parts(system(f"{SYSTEM} Note: {secret} {SYSTEM}")),
        parts(system(f"{SYSTEM} Note: nothing {SYSTEM}")),
    )
    assert found.before is not None
    assert secret in found.before
    told = found.hashed(b"salt").without_text()
    assert secret not in repr(told)
    assert told.before_hash
    assert told.before_hash != told.after_hash


def test_equal_changes_have_equal_hashes_under_one_key_only() -> None:
    found = between(parts(system("a " + SYSTEM)), parts(system("b " + SYSTEM)))
    again = between(parts(system("a " + SYSTEM)), parts(system("b " + SYSTEM)))
    assert found.hashed(b"k").before_hash == again.hashed(b"k").before_hash
    assert found.hashed(b"k").before_hash != found.hashed(b"l").before_hash


texts = st.text(alphabet='ab\n{}":é😀 0', max_size=60)


@given(texts, texts, texts)
def test_common_beginnings_and_ends_are_exact(shared: str, a: str, b: str) -> None:
    first, second = shared + a, shared + b
    n = common_chars(first, second)
    assert first[:n] == second[:n]
    assert n >= len(shared)
    assert n == min(len(first), len(second)) or first[n] != second[n]
    tail = common_tail_chars(a + shared, b + shared)
    assert tail >= len(shared)
    assert tail == 0 or (a + shared)[-tail:] == (b + shared)[-tail:]


@given(st.lists(texts, min_size=1, max_size=4), st.lists(texts, min_size=1, max_size=4))
def test_any_two_prompts_can_be_compared(first: list[str], second: list[str]) -> None:
    a, b = parts(*map(user, first)), parts(*map(user, second))
    found = first_difference(a, b)
    continues = first == second[: len(first)] or second == first[: len(second)]
    assert (found is None) == continues
    if found is not None:
        assert first[found.index][: found.at_chars] == second[found.index][: found.at_chars]


# --- causes


def facts(**changes: Any) -> ExplainedFacts:
    """A request of 1,000 tokens that agrees with an earlier one for 900, all cold."""
    values: dict[str, Any] = {
        "source": Source.COLD,
        "cached_tokens": 0,
        "prefilled_tokens": 1000,
        "filled_tokens": 0,
        "planned_tokens": 0,
        "agrees_tokens": 900,
        "reach_tokens": 1000,
        "nearest": Nearest(None),
    }
    return ExplainedFacts(**(values | changes))


def cause_of(**changes: Any) -> Cause:
    return explain(facts(**changes)).cause


DATE = between(
    parts(system("It is 2026-11-24. " + SYSTEM)), parts(system("It is 2026-11-25. " + SYSTEM))
)
NEW = between(parts(system("S"), user("a")), parts(system("S"), user("b")))


def test_a_warm_prompt_needs_no_cause() -> None:
    told = explain(facts(cached_tokens=995, prefilled_tokens=5, planned_tokens=990))
    assert told == Explanation(Cause.NONE, told.summary, "", None, 995, 5)


def test_a_continued_conversation_is_new_text_only() -> None:
    assert cause_of(cached_tokens=900, prefilled_tokens=100, planned_tokens=900) is Cause.NEW_TEXT


def test_cold_tokens_behind_the_difference_are_its_fault() -> None:
    told = explain(facts(agrees_tokens=5, nearest=Nearest(DATE)))
    assert told.cause is Cause.TIMESTAMP
    assert told.difference is DATE
    assert told.summary.startswith("In message 1 (system), character ")
    assert told.advice


def test_tokens_that_agree_and_were_not_held_had_been_evicted() -> None:
    assert cause_of() is Cause.EVICTED
    assert cause_of(nearest=Nearest(NEW)) is Cause.EVICTED


def test_after_a_restart_of_the_engine_that_is_the_cause() -> None:
    assert cause_of(nearest=Nearest(None, same_engine=False)) is Cause.ENGINE_RESTARTED


def test_a_failed_restore_is_the_cause_whatever_else_differs() -> None:
    told = explain(facts(failed_restore="checksum"))
    assert told.cause is Cause.SNAPSHOT_FAILED
    assert "checksum" in told.summary


def test_a_plan_that_the_engine_did_not_follow_is_the_templates_doing() -> None:
    assert cause_of(planned_tokens=900) is Cause.TEMPLATE_REWRITES
    reasoned = Nearest(None, reasoned=True)
    assert cause_of(planned_tokens=900, nearest=reasoned) is Cause.REASONING_DROPPED
    sent = sent_difference(
        parts(user("x"), said("", tool_calls=[call('{"a": 1, "b": 2}')])),
        parts(user("x"), said("", tool_calls=[call('{"b": 2, "a": 1}')])),
    )
    told = explain(facts(planned_tokens=900, nearest=Nearest(None, sent)))
    assert (told.cause, told.difference) == (Cause.KEY_ORDER, sent)


def test_reasoning_that_the_prompt_no_longer_has_is_named_though_none_of_it_is_cold() -> None:
    # The slot held 400 tokens of thoughts; without them the prompt agrees for 100 tokens only.
    told = explain(
        facts(
            cached_tokens=80,
            prefilled_tokens=60,
            planned_tokens=480,
            agrees_tokens=100,
            nearest=Nearest(None, reasoned=True),
        )
    )
    assert told.cause is Cause.REASONING_DROPPED


def test_a_model_that_reuses_ends_only_is_not_blamed_on_eviction() -> None:
    assert cause_of(nearest=Nearest(NEW), cuttable=False) is Cause.ENDS_ONLY
    assert cause_of(cuttable=False) is Cause.EVICTED


def test_a_prompt_unlike_any_other_is_seen_for_the_first_time() -> None:
    assert cause_of(nearest=None, agrees_tokens=0) is Cause.FIRST_SEEN
    assert cause_of(nearest=None, is_new_namespace=True) is Cause.NEW_NAMESPACE
    assert cause_of(nearest=None, known=Cause.ENGINE_RESTARTED) is Cause.ENGINE_RESTARTED


def test_a_changed_fingerprint_is_named_with_what_changed() -> None:
    told = explain(facts(nearest=None, moved=("chat template",)))
    assert told.cause is Cause.NEW_FINGERPRINT
    assert "chat template" in told.summary


def test_a_small_loss_beside_a_large_difference_does_not_hide_it() -> None:
    # 300 tokens in front were lost, 700 behind the date had to be prefilled anyway.
    assert cause_of(agrees_tokens=300, nearest=Nearest(DATE)) is Cause.TIMESTAMP
    # New text is never blamed where something was lost.
    assert cause_of(agrees_tokens=300, nearest=Nearest(NEW)) is Cause.EVICTED


def test_a_difference_before_what_is_warm_explains_nothing() -> None:
    # The prefix was warm by another request at the same time; only the question is cold.
    changes = {"cached_tokens": 800, "prefilled_tokens": 200, "agrees_tokens": 5}
    told = explain(facts(**changes, reach_tokens=69, nearest=Nearest(DATE)))
    assert (told.cause, told.difference) == (Cause.NEW_TEXT, None)


def test_tokens_filled_ahead_of_the_request_are_cold_ones() -> None:
    told = explain(facts(cached_tokens=880, prefilled_tokens=120, filled_tokens=880, nearest=None))
    assert (told.warm_tokens, told.cold_tokens) == (0, 1000)
    assert told.cause is Cause.FIRST_SEEN


@given(
    st.integers(0, 5000),
    st.integers(1, 5000),
    st.integers(0, 9000),
    st.integers(0, 9000),
    st.integers(0, 9000),
    st.sampled_from([None, Nearest(None), Nearest(DATE), Nearest(NEW, same_engine=False)]),
    st.booleans(),
)
def test_every_request_gets_a_cause_and_a_sentence(
    cached: int,
    prefilled: int,
    filled: int,
    planned: int,
    agrees: int,
    nearest: Nearest | None,
    cuttable: bool,
) -> None:
    told = explain(
        facts(
            cached_tokens=cached,
            prefilled_tokens=prefilled,
            filled_tokens=filled,
            planned_tokens=planned,
            agrees_tokens=agrees,
            reach_tokens=agrees + 64,
            nearest=nearest,
            cuttable=cuttable,
        )
    )
    assert told.warm_tokens + told.cold_tokens == cached + prefilled
    assert told.warm_tokens >= 0
    assert told.summary.endswith(".")
    assert SYSTEM[:20] not in told.summary


def test_every_cause_that_someone_can_act_on_has_advice() -> None:
    quiet = {Cause.NONE, Cause.NEW_TEXT, Cause.FAILED}
    assert {cause for cause in Cause if not advice_for(cause)} == quiet


def test_places_are_told_in_words() -> None:
    assert place_of(DATE) == f"message 1 (system), character 15 of {len(SYSTEM) + 18}"
    added = between(parts(user("x")), parts(user("x"), tools=[tool("read")]))
    assert place_of(added) == "tool 1 (read)"


def test_places_in_tokens_are_interpolated_between_known_ones() -> None:
    anchors = {1000: 400, 2000: 500}
    assert tokens_at(0, anchors=anchors) == 0
    assert tokens_at(500, anchors=anchors) == 200
    assert tokens_at(1000, anchors=anchors) == 400
    assert tokens_at(1500, anchors=anchors) == 450
    assert tokens_at(9999, anchors=anchors) == 500


def test_the_documentation_tells_of_every_cause_and_no_other() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "explanations.md"
    rows = page.read_text(encoding="utf-8").partition("## Causes")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in rows.splitlines() if line.startswith("| `")]
    told = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert told == {cause.value for cause in Cause}


def test_the_page_has_words_for_every_cause() -> None:
    html = Path(dashboard_file).with_name("index.html").read_text(encoding="utf-8")
    words = html.partition("const CAUSES = {")[2].partition("}")[0]
    assert set(re.findall(r"(\w+): \"", words)) == {cause.value for cause in Cause}
