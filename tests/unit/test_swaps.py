"""Which model is loaded next: the rules one by one, and two agents in a simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.swaps import LINGER_S, STAYS, Limits, ModelNow, Swap, decide, unused
from keepwarm.core.swaps import has_room_ever as has_room

ONE = Limits(models=1, memory_bytes=0, wait_s=60.0)


def model(name: str, *, loaded: bool = False, **known: object) -> ModelNow:
    values: dict[str, object] = {"load_s": 2.0, "size_bytes": 100, **known}
    return ModelNow(name, loaded, **values)  # type: ignore[arg-type]


def test_nobody_waits_and_nothing_is_loaded() -> None:
    assert decide([model("a"), model("b", loaded=True)], ONE) is None


def test_what_has_room_is_loaded_at_once() -> None:
    both = Limits(models=2, memory_bytes=0, wait_s=60.0)
    models = [model("a", loaded=True, pending=3), model("b", waited_s=(0.0,))]
    assert decide(models, both) == Swap("b")
    assert decide([model("b", waited_s=(0.0,))], ONE) == Swap("b")


def test_a_model_that_nobody_asked_for_long_goes_at_once() -> None:
    models = [model("a", loaded=True, idle_s=60.0), model("b", waited_s=(0.0,))]
    assert decide(models, ONE) == Swap("b", ("a",))


def test_an_agent_at_its_tools_keeps_its_model_for_a_moment() -> None:
    waits = model("b", waited_s=(0.5,))
    assert decide([model("a", loaded=True, idle_s=0.5), waits], ONE) is None
    assert decide([model("a", loaded=True, idle_s=2.0), waits], ONE) == Swap("b", ("a",))
    slow = model("a", loaded=True, load_s=90.0, idle_s=LINGER_S)
    assert decide([slow, waits], ONE) == Swap("b", ("a",))


def test_what_waits_must_outweigh_what_is_served() -> None:
    busy = model("a", loaded=True, pending=1, idle_s=0.0)
    assert decide([busy, model("b", waited_s=(STAYS * 2.0,))], ONE) is None
    assert decide([busy, model("b", waited_s=(STAYS * 2.0 + 0.1,))], ONE) == Swap("b", ("a",))
    # Three that wait weigh three times as much, and so do three that are served.
    many = model("b", waited_s=(3.0, 3.0, 3.0))
    assert decide([busy, many], ONE) == Swap("b", ("a",))
    assert decide([model("a", loaded=True, pending=3, idle_s=0.0), many], ONE) is None


def test_nobody_waits_longer_than_the_settings_say_for_others_work() -> None:
    busy = model("a", loaded=True, pending=9, load_s=100.0, idle_s=0.0)
    assert decide([busy, model("b", waited_s=(59.0,))], ONE) is None
    assert decide([busy, model("b", waited_s=(60.0,))], ONE) == Swap("b", ("a",))


def test_a_pinned_model_stays_and_the_next_best_goes() -> None:
    two = Limits(models=2, memory_bytes=0, wait_s=60.0)
    pinned = model("a", loaded=True, is_pinned=True)
    waits = model("c", waited_s=(70.0,))
    assert decide([pinned, model("b", loaded=True), waits], two) == Swap("c", ("b",))
    assert decide([pinned, waits], ONE) is None
    assert not has_room("c", [pinned, waits], ONE)
    assert has_room("c", [model("a", loaded=True, pending=1), waits], ONE)


def test_as_many_go_as_memory_asks_for_the_least_worth_first() -> None:
    memory = Limits(models=0, memory_bytes=300, wait_s=60.0)
    loaded = [
        model("long", loaded=True, idle_s=900.0),
        model("short", loaded=True, idle_s=30.0),
        model("dear", loaded=True, idle_s=900.0, load_s=80.0),
    ]
    assert decide([*loaded, model("new", waited_s=(1.0,))], memory) == Swap("new", ("long",))
    large = model("new", waited_s=(1.0,), size_bytes=200)
    assert decide([*loaded, large], memory) == Swap("new", ("long", "short"))
    # One that is larger than all there is may try alone: its size is an estimate.
    larger = model("new", waited_s=(1.0,), size_bytes=1000)
    assert decide([*loaded, larger], memory) == Swap("new", ("long", "short", "dear"))


def test_a_batch_waits_until_a_model_is_idle_and_gives_way_to_people() -> None:
    batch = model("b", batch_waiting=50)
    assert decide([model("a", loaded=True, pending=1), batch], ONE) is None
    assert decide([model("a", loaded=True, idle_s=1.0), batch], ONE) is None
    assert decide([model("a", loaded=True, idle_s=9.0), batch], ONE) == Swap("b", ("a",))
    works = model("a", loaded=True, batch_pending=4)
    assert decide([works, batch], ONE) is None
    assert decide([works, model("c", waited_s=(0.0,)), batch], ONE) == Swap("c", ("a",))


def test_a_model_that_failed_to_load_is_left_alone_for_a_while() -> None:
    idle = model("a", loaded=True)
    broken = model("b", waited_s=(30.0,), may_load=False)
    assert decide([idle, broken], ONE) is None
    assert decide([idle, broken, model("c", waited_s=(1.0,))], ONE) == Swap("c", ("a",))


def test_memory_is_given_back_behind_the_last_request() -> None:
    models = [
        model("a", loaded=True, idle_s=100.0),
        model("b", loaded=True, idle_s=100.0, is_pinned=True),
        model("c", loaded=True, idle_s=100.0, batch_pending=1),
        model("d", idle_s=100.0),
        model("e", loaded=True, loaded_for_s=59.0),
    ]
    assert unused(models, 60.0) == ["a"]
    assert unused(models, 0.0) == []


@dataclass
class Agent:
    """Asks its model `turns` times, with a pause behind each reply."""

    model: str
    turns: int
    next_s: float = 0.0
    asked_s: float | None = None
    ends_s: float | None = None
    waits: list[float] = field(default_factory=list)


def run(*, turn_s: float, gap_s: float, load_s: float, limits: Limits = ONE) -> tuple[float, int]:
    """Two agents of 20 turns on two models: seconds until both are done, and loads."""
    agents = [Agent("a", 20), Agent("b", 20)]
    loaded, loads, now_s, free_s = "a", 0, 0.0, 0.0
    swap: Swap | None = None
    ended = {"a": -math.inf, "b": -math.inf}
    step_s = 0.02
    longest = 0.0
    while any(agent.turns for agent in agents):
        now_s += step_s
        for agent in agents:
            if agent.ends_s is not None and agent.ends_s <= now_s:
                ended[agent.model], agent.ends_s, agent.asked_s = agent.ends_s, None, None
                agent.turns -= 1
                agent.next_s = now_s + gap_s
            if agent.turns and agent.asked_s is None and agent.next_s <= now_s:
                agent.asked_s = now_s
            waits = agent.asked_s is not None and agent.ends_s is None
            if waits and agent.model == loaded and swap is None and free_s <= now_s:
                assert agent.asked_s is not None
                longest = max(longest, now_s - agent.asked_s)
                agent.ends_s = now_s + turn_s
        if swap is not None:
            # What runs is let end; what comes meanwhile waits.
            if not any(agent.ends_s for agent in agents):
                loaded, loads, free_s, swap = swap.load, loads + 1, now_s + load_s, None
            continue
        if free_s > now_s:
            continue
        known = [
            ModelNow(
                agent.model,
                agent.model == loaded,
                load_s,
                1,
                waited_s=(now_s - agent.asked_s,)
                if agent.model != loaded and agent.asked_s is not None
                else (),
                pending=int(agent.ends_s is not None),
                idle_s=now_s - ended[agent.model],
            )
            for agent in agents
        ]
        swap = decide(known, limits)
    assert longest <= max(limits.wait_s, load_s) + load_s + 2 * turn_s + 4 * step_s
    return now_s, loads


@pytest.mark.parametrize(
    ("turn_s", "gap_s", "load_s"), [(0.2, 0.1, 2.0), (0.4, 0.2, 4.0), (1.0, 1.0, 30.0)]
)
def test_two_agents_on_two_models_take_a_quarter_of_loading_at_each_change(
    turn_s: float, gap_s: float, load_s: float
) -> None:
    took_s, loads = run(turn_s=turn_s, gap_s=gap_s, load_s=load_s)
    at_each_change_s = 40 * (load_s + turn_s)
    assert took_s <= at_each_change_s / 4
    assert loads <= 6


@given(
    turn_s=st.floats(0.1, 5.0),
    gap_s=st.floats(0.0, 8.0),
    load_s=st.floats(0.2, 30.0),
    wait_s=st.floats(1.0, 60.0),
)
def test_whatever_they_do_both_end_and_nobody_waits_longer_than_the_bound(
    turn_s: float, gap_s: float, load_s: float, wait_s: float
) -> None:
    run(
        turn_s=turn_s,
        gap_s=gap_s,
        load_s=load_s,
        limits=Limits(models=1, memory_bytes=0, wait_s=wait_s),
    )
