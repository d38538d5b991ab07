"""Seeing in a reply's first characters that its tier was too small."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.tiers import NEED_MORE
from keepwarm.router import EscalationCause, MarkerWatch, Verdict, escalation_needed
from keepwarm.router.escalation import MARKER


def test_the_marker_is_the_one_that_the_tiers_tell_the_model() -> None:
    assert MARKER == NEED_MORE


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("NEED_MORE: tools", EscalationCause.ASKED_TOOLS),
        ("NEED_MORE: context\n", EscalationCause.ASKED_CONTEXT),
        ("\n  need_more:tools and more words", EscalationCause.ASKED_TOOLS),
        ("**NEED_MORE: context**", EscalationCause.ASKED_CONTEXT),
        ("`NEED MORE: tools`", EscalationCause.ASKED_TOOLS),
        ("NEED_MORE: everything", EscalationCause.ASKED),
        ("NEED_MORE:", EscalationCause.ASKED),
    ],
)
def test_a_reply_that_starts_with_the_marker_escalates(text: str, cause: EscalationCause) -> None:
    found = escalation_needed(text, tier="minimal", finish_reason="stop")
    assert found is not None
    assert (found.tier, found.cause) == ("standard", cause)


@pytest.mark.parametrize(
    "text",
    ["No, that isn't so.", "Needle", "I NEED_MORE: tools", "NEED_MOREOVER", "N", "**Bold** it"],
)
def test_other_replies_stand(text: str) -> None:
    assert escalation_needed(text, tier="minimal", finish_reason="stop") is None


def test_an_empty_answer_escalates_unless_a_tool_was_called_or_no_token_was_allowed() -> None:
    empty = escalation_needed(" \n", tier="standard", finish_reason="stop")
    assert empty is not None
    assert (empty.tier, empty.cause) == ("full", EscalationCause.EMPTY)
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    assert (
        escalation_needed(
            "", tier="standard", finish_reason="tool_calls", tool_calls=calls, known_tools={"f"}
        )
        is None
    )
    assert escalation_needed("", tier="minimal", finish_reason="length") is None
    assert escalation_needed("", tier="minimal", finish_reason=None) is None


def test_a_call_of_a_tool_that_doesnt_exist_escalates_and_names_it() -> None:
    calls = [{"function": {"name": "f"}}, {"function": {"name": "made_up"}}]
    found = escalation_needed(
        "", tier="minimal", finish_reason="tool_calls", tool_calls=calls, known_tools={"f"}
    )
    assert found is not None
    assert (found.cause, found.detail) == (EscalationCause.UNKNOWN_TOOL, "made_up")


def test_nothing_escalates_beyond_the_largest_tier() -> None:
    assert escalation_needed("NEED_MORE: tools", tier="full", finish_reason="stop") is None


def test_most_replies_are_held_back_by_one_character() -> None:
    watch = MarkerWatch()
    assert watch.feed("H") is Verdict.PASS
    assert watch.held == "H"


def test_the_watch_escalates_at_the_last_character_that_is_needed() -> None:
    watch = MarkerWatch()
    verdicts = [watch.feed(each) for each in "NEED_MORE: tools"]
    assert verdicts[-1] is Verdict.ESCALATE
    assert set(verdicts[:-1]) == {Verdict.UNDECIDED}
    assert watch.cause is EscalationCause.ASKED_TOOLS


def test_a_stream_that_ends_inside_the_marker_passes_and_behind_it_escalates() -> None:
    for text, verdict in (("NEED_MO", Verdict.PASS), ("NEED_MORE: to", Verdict.ESCALATE)):
        watch = MarkerWatch()
        assert watch.feed(text) is Verdict.UNDECIDED
        assert watch.finish() is verdict


@given(
    text=st.one_of(
        st.text(max_size=40),
        st.text(max_size=6).map(lambda rest: "NEED_MORE: tools"[: 3 + len(rest)] + rest),
        st.sampled_from(["NEED_MORE: tools", " *NEED_MORE: context* please", "NEED_MORE: x"]),
    ),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
def test_the_verdict_doesnt_depend_on_how_the_stream_is_cut(text: str, cuts: list[int]) -> None:
    whole = MarkerWatch()
    whole.feed(text)
    whole.finish()
    watch, start = MarkerWatch(), 0
    passed = ""
    for cut in [*sorted(cuts), len(text)]:
        piece, start = text[start:cut], max(start, cut)
        if watch.verdict is Verdict.PASS:
            passed += piece
        elif watch.feed(piece) is Verdict.PASS:
            passed += watch.held
    if watch.finish() is Verdict.PASS and not passed:
        passed = watch.held
    assert watch.verdict is whole.verdict
    if watch.verdict is Verdict.PASS:
        assert passed == text
