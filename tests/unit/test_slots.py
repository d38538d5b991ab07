"""What a slot holds, where its marks lie, and what losing it costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.prompt import Mark, Prompt
from keepwarm.core.rates import Rates
from keepwarm.core.returns import later_turn
from keepwarm.core.slots import Content, Position, Slot, loss, positions

ROW_BYTES = 23_000


def mark(number: int, chars: int, tokens: int | None = None) -> Mark:
    return Mark(bytes([number]) * 16, chars, tokens)


MARKS = [mark(0, 0), mark(1, 100), mark(2, 200), mark(3, 400)]


def exact(tokens: int) -> Position:
    return Position(tokens, exact=True)


def about(tokens: int) -> Position:
    return Position(tokens, exact=False)


def lost(
    content: Content | None,
    *,
    kept_tokens: int = 0,
    idle_s: float = 0.0,
    can_save: bool = True,
    prefill_s_per_token: float = 0.005,
) -> tuple[float, bool]:
    rates = Rates()
    rates.prefill_s_per_token.value = prefill_s_per_token
    slot = Slot(0, content=content, idle_since_s=100.0)
    found = loss(
        slot,
        kept_tokens=kept_tokens,
        row_bytes=ROW_BYTES,
        rates=rates,
        returns=slot.returns(100.0 + idle_s),
        can_save=can_save,
    )
    return found.seconds, found.save


def test_positions_between_known_ones_are_interpolated_and_not_exact() -> None:
    known = {MARKS[1].digest: exact(30)}
    found = positions(MARKS, known=known, total_tokens=120)
    assert found[MARKS[0].digest] == about(0)
    assert found[MARKS[1].digest] == exact(30)
    assert found[MARKS[2].digest] == about(60)
    assert found[MARKS[3].digest] == about(120)


def test_a_mark_that_counts_tokens_itself_is_exact() -> None:
    marks = [mark(1, 40, 10), mark(2, 80, 20)]
    assert positions(marks, known={}, total_tokens=25) == {
        marks[0].digest: exact(10),
        marks[1].digest: exact(20),
    }


def test_a_known_position_beyond_the_end_isnt_believed() -> None:
    found = positions(MARKS, known={MARKS[1].digest: exact(500)}, total_tokens=100)
    assert found[MARKS[1].digest] == about(25)


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=12),
    st.dictionaries(st.integers(0, 11), st.integers(0, 2000), max_size=4),
    st.integers(1, 2000),
)
def test_positions_never_leave_the_prompt(
    chars: list[int], known: dict[int, int], total: int
) -> None:
    marks = [mark(i, at) for i, at in enumerate(sorted(chars))]
    exacts = {marks[i].digest: exact(t) for i, t in known.items() if i < len(marks)}
    for position in positions(marks, known=exacts, total_tokens=total).values():
        assert 0 <= position.tokens <= total


def test_a_prompt_matches_at_the_last_mark_that_is_held() -> None:
    prompt = Prompt(False, tuple(MARKS), -1, 1)
    content = Content("", {MARKS[0].digest: exact(1), MARKS[2].digest: about(70)}, 90)
    assert content.match(prompt) == (2, about(70))
    # What is promised is only what is counted: the estimate promises nothing.
    assert content.reuse(prompt, None, cuttable=True).certain == 1
    assert Content("", {}, 90).match(prompt)[0] == -1


def test_nothing_is_lost_of_an_empty_slot_or_of_what_is_kept() -> None:
    assert lost(None) == (0.0, False)
    assert lost(Content("me", {}, 500), kept_tokens=500) == (0.0, False)


def test_what_only_the_slot_holds_is_saved_where_that_is_cheaper() -> None:
    seconds, save = lost(Content("me", {}, 2000, returns=later_turn()))
    assert save
    # Ten seconds of prefill, against a tenth of a second for the save.
    assert seconds < 0.5


def test_a_short_tail_isnt_worth_a_save() -> None:
    _, save = lost(Content("me", {}, 2000, saved_tokens=1995, returns=later_turn()))
    assert not save


def test_where_prefill_costs_next_to_nothing_nothing_is_saved() -> None:
    _, save = lost(Content("me", {}, 2000, returns=later_turn()), prefill_s_per_token=1e-6)
    assert not save


def test_what_cant_be_saved_or_couldnt_isnt_tried() -> None:
    assert not lost(Content("me", {}, 2000, returns=later_turn()), can_save=False)[1]
    assert not lost(Content("me", {}, 2000, returns=later_turn(), save_failed=True))[1]


def test_what_may_not_be_saved_is_dearer_to_lose_than_what_may() -> None:
    savable, save = lost(Content("me", {}, 2000, returns=later_turn()))
    seconds, save_anyway = lost(Content("me", {}, 2000, returns=later_turn(), is_savable=False))
    assert save
    assert not save_anyway
    assert seconds > savable


def test_what_nobody_goes_on_from_costs_nothing_to_lose() -> None:
    assert lost(Content("me", {}, 2000, is_final=True)) == (0.0, False)


def test_a_conversation_is_worth_less_the_longer_it_is_silent() -> None:
    content = Content("me", {}, 2000, saved_tokens=2000, returns=later_turn())
    assert lost(content, idle_s=600)[0] == pytest.approx(lost(content)[0] / 2)
    assert lost(content, idle_s=36_000)[0] < 1e-6


def test_a_slot_that_another_tenant_wrote_to_is_foreign() -> None:
    assert Slot(0, owner="you").is_foreign("me")
    assert not Slot(0, owner="me").is_foreign("me")
    assert not Slot(0).is_foreign("me")


def test_a_slot_counts_in_the_pool_for_the_most_it_may_come_to() -> None:
    assert Slot(0, held_tokens=10, granted_tokens=700).most_tokens == 700
    assert Slot(0, held_tokens=900, granted_tokens=700).most_tokens == 900
