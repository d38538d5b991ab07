"""Random series of requests: the same from the same steps, and such as clients send."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given

from series import ACTS, Ask, Step, Talks, series, steps_of


def asked(steps: list[Step], seed: str = "x") -> list[Ask]:
    return [event for event in Talks(seed).events(steps) if isinstance(event, Ask)]


@given(series())
def test_the_same_steps_make_the_same_requests(steps: list[Step]) -> None:
    assert asked(steps) == asked(steps)
    assert steps_of(",".join(map(str, steps))) == steps


@given(series())
def test_a_model_is_always_asked_something(steps: list[Step]) -> None:
    for ask in asked(steps):
        messages = ask.body["messages"]
        assert messages[-1]["role"] in {"user", "tool"}
        assert all(not (a["role"] == b["role"] == "assistant") for a, b in pairwise(messages)), (
            messages
        )


@given(series())
def test_a_client_that_left_asks_again(steps: list[Step]) -> None:
    requests = asked(steps)
    for place, ask in enumerate(requests):
        if ask.hangs_up:
            assert ask.body in [later.body for later in requests[place + 1 : place + 3]]


def test_every_act_can_open_a_series() -> None:
    for act in ACTS:
        for number in range(4):
            steps = [Step(act, 1, number), Step("append", 1, 0)]
            assert len(asked(steps)) >= 1, act
