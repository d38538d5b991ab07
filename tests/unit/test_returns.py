"""How often conversations go on, from the turns that were answered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.prompt import Mark, Prompt
from keepwarm.core.returns import Returns


def turn(number: int, is_raw: bool = False) -> Prompt:
    return Prompt(is_raw, (Mark(b"m" * 16, 10),), -1, number)


def answered(*turns: int) -> Returns:
    returns = Returns()
    for number in turns:
        returns.observe("me", turn(number))
    return returns


def chance(returns: Returns, number: int, *, namespace: str = "me", is_raw: bool = False) -> float:
    return returns.chance(namespace, turn(number, is_raw)).value


def test_before_anything_was_seen_half_of_the_first_turns_go_on_and_nearly_all_later_ones() -> None:
    assert chance(Returns(), 1) == 0.5
    assert chance(Returns(), 2) == chance(Returns(), 9) == 0.9


def test_a_loop_of_single_questions_is_known_after_ten_of_them() -> None:
    assert chance(answered(*[1] * 10), 1) < 0.1


def test_conversations_that_go_on_are_known_again_after_a_loop() -> None:
    loop = [1] * 200
    assert chance(answered(*loop, *[1, 2] * 10), 1) > 0.4
    assert chance(answered(*[1, 2] * 50), 1) > 0.9


def test_later_turns_have_a_chance_of_their_own() -> None:
    returns = answered(*[1, 2] * 40)
    assert chance(returns, 1) > 0.9
    assert chance(returns, 2) < 0.4
    assert chance(answered(1, *range(2, 40)), 40) > 0.9


def test_what_is_seen_later_counts_in_a_chance_that_was_given_out() -> None:
    returns = Returns()
    held = returns.chance("me", turn(1))
    for _ in range(10):
        returns.observe("me", turn(1))
    assert held.value < 0.1


def test_what_one_tenant_does_says_nothing_of_another() -> None:
    assert chance(answered(*[1] * 50), 1, namespace="you") == 0.5


def test_a_raw_prompt_doesnt_tell_its_turns() -> None:
    returns = answered(*[1] * 50)
    assert chance(returns, 1, is_raw=True) == 0.5
    before = chance(returns, 1)
    returns.observe("me", turn(1, True))
    assert chance(returns, 1) == before


@given(st.lists(st.integers(0, 5), max_size=200))
def test_a_chance_is_one_and_is_never_given_up(turns: list[int]) -> None:
    returns = answered(*turns)
    for number in (1, 2, 7):
        assert 0.04 < chance(returns, number) <= 1.0
