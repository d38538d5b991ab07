"""Single decisions of the scheduler, on a virtual clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from keepwarm.core.effects import (
    EraseSlot,
    Fail,
    FillSlot,
    Interrupt,
    LookSlot,
    RestoreSlot,
    SavedSlot,
    SaveSlot,
    Start,
    StepFailed,
)
from keepwarm.core.plan import Machine, Source, Stored
from keepwarm.core.prompt import Segment
from keepwarm.core.rates import Rates
from keepwarm.core.reply import Counts
from keepwarm.core.scheduler import SAVE_AFTER_IDLE_S, Scheduler
from keepwarm.core.slots import Content, Position, Slot, SlotState
from simulation import Simulation, request_of

RULES = {"role": "system", "content": "Follow the rules of the house. " * 40}
USER = {"role": "user", "content": "What now?"}


def ask(
    sim: Simulation, name: int, *, text: str = "What now?", rules: bool = True, namespace: str = "a"
) -> str:
    user = {"role": "user", "content": text}
    messages = [RULES, user] if rules else [user]
    request = request_of(
        name, {"messages": messages}, namespace=namespace, shared_segments=0, now_s=sim.now_s
    )
    sim.submit(request)
    return request.id


def steps(sim: Simulation, kind: type) -> list[object]:
    return [step for step in sim.pending if isinstance(step, kind)]


def test_a_cold_static_part_is_filled_saved_and_then_served_from() -> None:
    sim = Simulation(slots=2)
    ask(sim, 1)
    (fill,) = sim.pending
    assert isinstance(fill, FillSlot)
    sim.complete(fill)
    (save,) = sim.pending
    assert isinstance(save, SaveSlot)
    assert save.static
    sim.complete(save)
    (request,) = sim.running
    assert request.plan
    assert request.plan.source is Source.COLD
    assert request.plan.promise_tokens == request.static_tokens


def test_who_needs_the_same_waits_for_the_fill_and_starts_from_its_file_at_once() -> None:
    sim = Simulation(slots=3)
    for name in (1, 2, 3):
        ask(sim, name, text=f"Question {name}?")
    assert len(sim.pending) == 1
    assert sim.scheduler.queued == 2
    sim.complete(sim.pending[0])
    sim.complete(sim.pending[0])
    # The file is still on its way into the store; it is restored from staging.
    assert sim.arriving
    restores = steps(sim, RestoreSlot)
    assert len(restores) == 2
    assert all(step.stored.staged_name for step in restores)  # type: ignore[attr-defined]
    for step in list(sim.pending):
        sim.complete(step)
    plans = [r.plan.source for r in sim.running if r.plan]
    assert sorted(plans) == [Source.COLD, Source.SHARED, Source.SHARED]


def test_when_the_filling_client_leaves_the_fill_goes_on_for_those_who_wait() -> None:
    sim = Simulation(slots=2)
    first = ask(sim, 1)
    ask(sim, 2, text="Another?")
    sim.cancel(sim.requests[first])
    assert sim.said["Interrupt"] == 0
    sim.complete(sim.pending[0])
    sim.complete(sim.pending[0])
    assert steps(sim, RestoreSlot) or sim.running


def test_when_nobody_waits_the_fill_is_interrupted() -> None:
    sim = Simulation(slots=2)
    first = ask(sim, 1)
    sim.cancel(sim.requests[first])
    assert sim.said["Interrupt"] == 1
    sim.complete(sim.pending[0])
    (look,) = sim.pending
    sim.complete(look)
    assert not sim.pending
    assert [slot.state for slot in sim.scheduler.slots] == [SlotState.IDLE] * 2


def test_what_an_interrupted_fill_computed_is_gone_on_from() -> None:
    sim = Simulation(slots=2)
    first = sim.requests[ask(sim, 1)]
    sim.cancel(first)
    sim.complete(sim.pending[0])
    sim.complete(sim.pending[0])
    held = len(sim.engine[0])
    assert held == first.static_tokens // 2
    again = sim.requests[ask(sim, 3)]
    (fill,) = sim.pending
    assert isinstance(fill, FillSlot)
    assert fill.slot == 0
    sim.complete(fill)
    sim.complete(sim.pending[0])
    assert again.plan
    assert again.plan.reuse_tokens == held


def test_what_a_hang_up_left_in_a_slot_is_gone_on_from_also_with_another_request_between() -> None:
    sim = Simulation(slots=2)
    first = sim.requests[ask(sim, 1, text="A long question. " * 400, rules=False)]
    sim.finish(first, decoded=200, heard=False)
    between = sim.requests[ask(sim, 3, text="Something else.", rules=False)]
    (look,) = steps(sim, LookSlot)
    sim.complete(look)
    assert between.plan
    assert between.plan.slot == 1, "the slot that the client left is worth something"
    sim.finish(between, decoded=3, heard=True)
    again = sim.requests[ask(sim, 5, text="A long question. " * 400, rules=False)]
    assert again.plan
    assert again.plan.slot == 0
    assert again.plan.promise_tokens == len(again.tokens) - 200


def test_a_second_fill_of_one_static_part_never_begins() -> None:
    sim = Simulation(slots=2)
    ask(sim, 1)
    # This one holds nearly all of it by its estimate, so it doesn't wait.
    other = request_of(
        2,
        {"messages": [RULES, {"role": "user", "content": "Another?"}]},
        namespace="a",
        shared_segments=0,
        now_s=sim.now_s,
    )
    other.job.must_save, other.job.can_fill = True, False
    other.job.static_tokens = other.static_tokens
    sim.submit(other)
    assert len(steps(sim, FillSlot)) == 1


def test_who_is_to_save_a_short_static_part_waits_for_the_fill_that_makes_it() -> None:
    sim = Simulation(slots=2)
    requests = [
        request_of(
            name,
            {"messages": [{"role": "system", "content": "Be brief."}, USER]},
            namespace="a",
            shared_segments=0,
            now_s=sim.now_s,
        )
        for name in (1, 2)
    ]
    for request in requests:
        request.job.must_save, request.job.can_fill = True, True
        request.job.static_tokens = request.static_tokens
        sim.submit(request)
    first, second = requests
    (fill,) = sim.pending
    assert isinstance(fill, FillSlot)
    assert second.job.plan is None
    sim.complete(fill)
    sim.complete(sim.pending[0])
    (restore,) = steps(sim, RestoreSlot)  # from what the first has saved
    assert isinstance(restore, RestoreSlot)
    assert (restore.job, restore.stored.tokens) == (second.id, first.static_tokens)


def test_the_queue_is_bounded_and_first_come_is_first_served() -> None:
    sim = Simulation(slots=1, queue_limit=2)
    for name in range(4):
        ask(sim, name, rules=False)
    assert sim.said["Fail"] == 1
    for name in (0, 1, 2):
        assert [r.id for r in sim.running] == [f"r{name}"]
        sim.finish(sim.running[0], decoded=1, heard=True)
        while sim.pending:
            sim.complete(sim.pending[0])


def test_who_waits_for_too_long_is_told() -> None:
    sim = Simulation(slots=1)
    ask(sim, 1, rules=False)
    late = request_of(
        2, {"messages": [USER]}, namespace="a", shared_segments=0, now_s=sim.now_s, wait_s=5
    )
    sim.submit(late)
    sim.tick(4.9)
    assert not sim.ended[late.id]
    sim.tick(0.2)
    assert sim.ended[late.id] == 1


def test_a_batch_waits_behind_everyone_else() -> None:
    sim = Simulation(slots=1)
    ask(sim, 1, rules=False)
    batch = request_of(2, {"messages": [USER]}, namespace="a", shared_segments=0, now_s=sim.now_s)
    batch.job.priority = 1
    sim.submit(batch)
    ask(sim, 3, rules=False)
    sim.finish(sim.running[0], decoded=1, heard=True)
    while sim.pending:
        sim.complete(sim.pending[0])
    assert [r.id for r in sim.running] == ["r3"]


@pytest.mark.parametrize("step", ["queued", "filling", "serving"])
def test_a_request_survives_the_engines_death(step: str) -> None:
    sim = Simulation(slots=1)
    first = ask(sim, 1)
    if step == "queued":
        ask(sim, 2)
    elif step == "serving":
        sim.complete(sim.pending[0])
        sim.complete(sim.pending[0])
    sim.engine_down()
    assert not any(slot.content for slot in sim.scheduler.slots)
    if step == "serving":
        sim.retry(sim.requests[first])
    sim.settle()
    assert sim.served[first] == 1


def scheduler(*slots: Slot, lookup: Stored | None = None, pool: int | None = None) -> Scheduler:
    machine = Machine(row_bytes=1000, cuttable=True, can_save=True, pool_tokens=pool)
    return Scheduler(list(slots), machine, Rates(), lambda *_: lookup)


def conversation(tokens: int, *, turns: int = 3) -> Content:
    return Content("a", {b"x" * 16: Position(tokens, exact=True)}, tokens, turns=turns)


def test_an_idle_slot_is_saved_once_and_after_a_while() -> None:
    slot = Slot(0, content=conversation(2000), idle_since_s=100.0)
    made = scheduler(slot)
    assert made.tick(100.0 + SAVE_AFTER_IDLE_S / 2) == []
    (save,) = made.tick(100.0 + 2 * SAVE_AFTER_IDLE_S)
    assert isinstance(save, SaveSlot)
    assert made.tick(102.0) == []
    made.step_done(save, SavedSlot("f", 2000, 2_000_000), 102.0)
    assert made.tick(110.0) == []
    # A save is no use of the slot: its conversation isn't younger for it.
    assert slot.idle_since_s == 100.0


def test_what_is_saved_and_idle_leaves_a_shared_pool_while_others_compute_and_only_then() -> None:
    saved, unsaved = conversation(2000), conversation(2000)
    saved.saved_tokens = 2000
    slots = [Slot(0, content=saved, held_tokens=2000, idle_since_s=100.0)]
    slots.append(Slot(1, content=unsaved, held_tokens=2000, idle_since_s=100.0))
    made = scheduler(*slots, Slot(2), pool=20_000)
    made.tick(100.1)
    assert slots[0].content is saved, "it is in nobody's way"
    slots.append(made.slots[2])
    slots[2].state, slots[2].job = SlotState.SERVING, "other"
    effects = made.tick(100.2)
    assert [type(e) for e in effects] == [EraseSlot]
    assert effects[0].slot == 0  # type: ignore[union-attr]
    assert slots[1].content is unsaved


def test_a_slot_that_held_less_than_was_thought_isnt_saved_over_and_over() -> None:
    slot = Slot(0, content=conversation(2000), idle_since_s=100.0)
    made = scheduler(slot)
    (save,) = made.tick(101.0)
    assert isinstance(save, SaveSlot)
    made.step_done(save, SavedSlot("f", 1900, 1_900_000), 101.0)
    assert made.tick(102.0) == []


def test_what_was_asked_and_answered_before_isnt_saved_again() -> None:
    sim = Simulation(slots=1)
    for name in (1, 2, 3):
        ask(sim, name)
        while sim.pending:
            sim.complete(sim.pending[0])
        sim.finish(sim.running[0], decoded=200, heard=True)
        sim.tick(2 * SAVE_AFTER_IDLE_S)
        while sim.pending:
            sim.complete(sim.pending[0])
        for file in list(sim.arriving):
            sim.absorb(file)
    assert sim.said["SaveSlot"] == 2, "the rules, and the first request with its reply"


def test_a_loop_of_single_questions_goes_on_in_one_slot_and_is_saved_when_it_pauses() -> None:
    sim = Simulation(slots=2)
    sim.scheduler.rates.call_s = 0.006
    saves: list[int] = []
    for name in range(1, 16):
        asked = ask(sim, name, text=f"{name}?")
        while sim.pending:
            sim.complete(sim.pending[0])
        saves.append(sim.said["SaveSlot"])
        sim.finish(sim.requests[asked], decoded=3, heard=True)
    # At first any of them might have gone on.
    assert saves[4] > 1
    assert saves[-1] == saves[-5]
    assert sim.requests[asked].plan.source is Source.SLOT  # type: ignore[union-attr]
    sim.tick(2 * SAVE_AFTER_IDLE_S)
    # Nobody waits for it now.
    assert steps(sim, SaveSlot)


def test_a_save_that_failed_isnt_tried_over_and_over() -> None:
    slot = Slot(0, content=conversation(2000), idle_since_s=100.0)
    made = scheduler(slot)
    (save,) = made.tick(101.0)
    assert isinstance(save, SaveSlot)
    made.step_done(save, StepFailed(emptied=False), 101.0)
    assert slot.content
    for now_s in (102.0, 103.0, 200.0):
        assert made.tick(now_s) == []


def test_nothing_is_saved_while_somebody_waits_or_the_engine_is_gone() -> None:
    slot = Slot(0, content=conversation(2000), idle_since_s=100.0)
    made = scheduler(slot)
    made.up = False
    assert made.tick(200.0) == []


def test_a_conversation_that_went_on_is_saved_when_its_reply_has_ended() -> None:
    sim = Simulation(slots=2)
    first = ask(sim, 1, text="A long question. " * 60, rules=False)
    sim.finish(sim.requests[first], decoded=3, heard=True)
    assert not sim.pending
    body = sim.continued(sim.requests[first], trimmed=False)
    second = request_of(2, body, namespace="a", shared_segments=0, now_s=sim.now_s)
    sim.submit(second)
    sim.finish(second, decoded=3, heard=True)
    assert len(steps(sim, SaveSlot)) == 1


def after_its_second_turn(sim: Simulation) -> Any:
    """A conversation whose second reply has just ended."""
    first = ask(sim, 1, text="A long question. " * 60, rules=False)
    sim.finish(sim.requests[first], decoded=3, heard=True)
    body = sim.continued(sim.requests[first], trimmed=False)
    second = request_of(2, body, namespace="a", shared_segments=0, now_s=sim.now_s)
    sim.submit(second)
    sim.finish(second, decoded=3, heard=True)
    return second


def saved_after_its_second_turn(sim: Simulation) -> Any:
    """The same, with its slot being saved."""
    second = after_its_second_turn(sim)
    assert steps(sim, SaveSlot)
    return second


def test_who_goes_on_while_the_slot_is_being_saved_gets_that_slot() -> None:
    sim = Simulation(slots=2)
    second = saved_after_its_second_turn(sim)
    (save,) = steps(sim, SaveSlot)
    body = sim.continued(second, trimmed=False)
    third = request_of(3, body, namespace="a", shared_segments=0, now_s=sim.now_s)
    sim.submit(third)
    assert third.plan is None, "the other slot is idle, and knows nothing of it"
    sim.complete(save)
    assert third.plan
    assert third.plan.source is Source.SLOT
    assert third.plan.slot == second.plan.slot


def test_a_loop_of_short_turns_stays_in_its_slot() -> None:
    sim = Simulation(slots=2)
    sim.scheduler.rates.call_s = 0.0  # so that each turn is saved at once
    last = saved_after_its_second_turn(sim)
    for number in range(3, 7):
        turn = request_of(
            number,
            sim.continued(last, trimmed=False),
            namespace="a",
            shared_segments=0,
            now_s=sim.now_s,
        )
        sim.submit(turn)
        while sim.pending:
            sim.complete(sim.pending[0])
        for file in list(sim.arriving):
            sim.absorb(file)
        assert turn.plan
        assert turn.plan.slot == last.plan.slot, "what it said last would be prefilled twice"
        sim.finish(turn, decoded=3, heard=True)
        assert steps(sim, SaveSlot)
        last = turn


def test_a_turn_that_costs_little_beside_its_save_is_saved_when_its_client_pauses() -> None:
    sim = Simulation(slots=1)
    sim.scheduler.machine = replace(sim.scheduler.machine, row_bytes=1_000_000)
    after_its_second_turn(sim)
    assert not sim.pending, "its next turn would wait for the save"
    sim.tick(2 * SAVE_AFTER_IDLE_S)
    assert steps(sim, SaveSlot)


def test_others_dont_wait_for_a_save_that_is_none_of_theirs() -> None:
    sim = Simulation(slots=2)
    saved_after_its_second_turn(sim)
    other = ask(sim, 3, text="Something else. " * 60, rules=False)
    same_words = ask(sim, 4, text="A long question. " * 60, rules=False, namespace="b")
    assert sim.requests[other].plan
    assert sim.requests[same_words].plan is None, "no slot is left, that is all"
    (running,) = sim.running
    assert running.id == other


def test_who_goes_on_while_others_take_the_slot_waits_for_the_store() -> None:
    sim = Simulation(slots=1)
    second = saved_after_its_second_turn(sim)
    (save,) = steps(sim, SaveSlot)
    other = ask(sim, 3, text="Something else. " * 60, rules=False)
    sim.complete(save)
    assert sim.requests[other].plan
    body = sim.continued(second, trimmed=False)
    third = request_of(5, body, namespace="a", shared_segments=0, now_s=sim.now_s)
    sim.submit(third)
    sim.finish(sim.requests[other], decoded=3, heard=True)
    assert third.plan is None, "the slot is idle, but the saved file isn't taken in"
    (name,) = sim.arriving
    sim.absorb(name)
    while sim.pending:  # what the other said is saved first
        sim.complete(sim.pending[0])
    assert third.plan
    assert third.plan.source is Source.SNAPSHOT


@pytest.mark.parametrize("failing", ["restore", "fill"])
def test_a_step_that_lost_the_slots_content_leaves_no_promise(failing: str) -> None:
    sim = Simulation(slots=1)
    ask(sim, 1)
    sim.complete(sim.pending[0])
    sim.complete(sim.pending[0])
    for name in list(sim.arriving):
        sim.absorb(name)
    sim.finish(sim.running[0], decoded=1, heard=True)
    while sim.pending:
        sim.complete(sim.pending[0])
    sim.engine_down()
    sim.engine_up()
    request = request_of(
        2,
        {"messages": [RULES, {"role": "user", "content": "Another?"}]},
        namespace="a",
        shared_segments=0,
        now_s=sim.now_s,
    )
    if failing == "fill":
        # It restores what is known, and is to fill and save all the same.
        request.job.must_save = True
        request.job.static_tokens = request.static_tokens + 1
    sim.submit(request)
    (restore,) = sim.pending
    assert isinstance(restore, RestoreSlot)
    if failing == "restore":
        sim.complete(restore, failure=StepFailed(emptied=True))
    else:
        sim.complete(restore)
        (fill,) = sim.pending
        assert isinstance(fill, FillSlot)
        sim.complete(fill, failure=StepFailed(emptied=True))
    assert request.plan
    assert request.plan.promise_tokens == 0
    # And no snapshot is blamed for it.
    assert request.plan.restore is None
    assert request.plan.source is Source.COLD


def test_another_tenants_slot_is_emptied_before_it_is_given_out() -> None:
    sim = Simulation(slots=1)
    first = ask(sim, 1, rules=False, namespace="a")
    sim.finish(sim.requests[first], decoded=2, heard=True)
    while sim.pending:
        sim.complete(sim.pending[0])
    ask(sim, 2, rules=False, namespace="b")
    (save,) = sim.pending
    assert isinstance(save, SaveSlot)
    sim.complete(save)
    (erase,) = sim.pending
    assert isinstance(erase, EraseSlot)
    sim.complete(erase)
    assert [r.namespace for r in sim.running] == ["b"]


def test_a_granted_slot_comes_back_when_its_client_left_in_that_moment() -> None:
    sim = Simulation(slots=1)
    first = ask(sim, 1, rules=False)
    assert sim.running
    sim.cancel(sim.requests[first])
    assert sim.scheduler.slots[0].state is SlotState.IDLE
    assert not sim.scheduler.jobs


def test_ending_twice_does_nothing() -> None:
    sim = Simulation(slots=1)
    first = ask(sim, 1, rules=False)
    sim.finish(sim.requests[first], decoded=1, heard=True)
    counts = Counts(0, 5, 1)
    again = sim.scheduler.finished(first, sim.now_s, counts=counts, reply=Segment("assistant", ""))
    assert again == []
    assert sim.scheduler.cancelled(first, sim.now_s) == []
    assert sim.scheduler.retry(first, sim.now_s) == []


def test_a_step_of_an_engine_that_died_meanwhile_is_ignored() -> None:
    sim = Simulation(slots=1)
    ask(sim, 1)
    (fill,) = sim.pending
    sim.scheduler.engine_down(sim.now_s)
    sim.pending.clear()
    assert sim.scheduler.step_done(fill, StepFailed(emptied=True), sim.now_s) == []
    assert sim.scheduler.queued == 1


def test_effects_of_one_event_come_in_the_order_they_are_carried_out() -> None:
    kinds = (SaveSlot, EraseSlot, RestoreSlot, FillSlot, Interrupt, Start, Fail)
    made = scheduler(Slot(0))
    request = request_of(1, {"messages": [USER]}, namespace="a", shared_segments=0, now_s=1.0)
    effects = made.submit(request.job, 1.0)
    assert all(isinstance(effect, kinds) for effect in effects)
    assert isinstance(effects[-1], Start)


def saved_conversation(sim: Simulation) -> tuple[str, int]:
    """A conversation whose slot was saved; its file's name, and the slot."""
    ask(sim, 1, rules=False)
    (request,) = sim.running
    assert request.plan
    sim.finish(request, decoded=400, heard=True)
    sim.tick(2 * SAVE_AFTER_IDLE_S)
    (save,) = steps(sim, SaveSlot)
    sim.complete(save)  # type: ignore[arg-type]
    (name,) = sim.arriving
    return name, request.plan.slot


def test_a_slot_whose_rows_are_no_numbers_is_emptied_and_nobody_goes_on_from_it() -> None:
    sim = Simulation(slots=2)
    name, slot = saved_conversation(sim)
    sim.absorb(name, spoiled=True)
    (erase,) = steps(sim, EraseSlot)
    assert erase.slot == slot  # type: ignore[attr-defined]
    assert sim.scheduler.slots[slot].content is None
    sim.complete(erase)  # type: ignore[arg-type]
    assert sim.scheduler.slots[slot].state is SlotState.IDLE


def test_a_conversation_that_goes_on_meanwhile_is_emptied_behind_its_reply() -> None:
    sim = Simulation(slots=1)
    name, slot = saved_conversation(sim)
    (before,) = sim.requests.values()
    body = sim.continued(before, trimmed=False)
    sim.submit(request_of(2, body, namespace="a", shared_segments=0, now_s=sim.now_s))
    (request,) = sim.running
    sim.absorb(name, spoiled=True)
    assert not sim.pending
    sim.finish(request, decoded=4, heard=True)
    assert sim.scheduler.slots[slot].content is None, "nothing is promised of it, nor saved"
    sim.tick(60.0)
    assert not steps(sim, SaveSlot)
    ask(sim, 3)
    assert isinstance(sim.pending[0], EraseSlot)


def test_copies_of_a_file_that_holds_no_numbers_are_emptied_too() -> None:
    sim = Simulation(slots=3)
    for number in (1, 2):
        ask(sim, number, text=f"Question {number}?")
    sim.complete(sim.pending[0])
    sim.complete(sim.pending[0])
    (restore,) = steps(sim, RestoreSlot)
    sim.complete(restore)  # type: ignore[arg-type]
    (name,) = sim.arriving
    for request in list(sim.running):
        sim.finish(request, decoded=4, heard=True)
    sim.absorb(name, spoiled=True)
    assert len(steps(sim, EraseSlot)) == 2
