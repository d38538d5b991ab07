"""The next turn, prefilled ahead: what is worth it, and that it stands back for whoever comes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keepwarm.core.ahead import (
    Kept,
    Prepared,
    ended_turn,
    lacking_tokens,
    prompt_of_ids,
    why_not,
)
from keepwarm.core.effects import Fail, FillSlot, Interrupt, LookSlot, SaveSlot, StepFailed
from keepwarm.core.plan import Demand, Machine, Source, Stored, choose
from keepwarm.core.prompt import prompt_of
from keepwarm.core.rates import Rates
from keepwarm.core.reply import Counts, Reply, read_reply
from keepwarm.core.returns import first_turn
from keepwarm.core.rewriting import Rewriting
from keepwarm.core.slots import Content, Position, Slot
from keepwarm.core.tree import as_tokens
from keepwarm.deployment.ahead import Ahead, nice_seconds, on_battery
from keepwarm.explain.metrics import Metrics
from keepwarm.settings import Settings
from simulation import Request, Simulation, ahead_of, request_of

RULES = {"role": "system", "content": "Follow the rules of the house. " * 40}
USER = {"role": "user", "content": "What now?"}
BODY = {"messages": [RULES, USER]}
COUNTS = Counts(0, 400, 20)
SAID = {"role": "assistant", "content": "Noon.", "reasoning_content": "A clock."}
REPLY_90 = Reply(Counts(90, 1, 1), None, "length")
REPLY = Reply(COUNTS, None, "stop", message=SAID)
# What a template makes of a history's reply once a user asks anew.
REWRITTEN = list(range(9000, 9060))


def answered(sim: Simulation, **job: Any) -> Request:
    """A first turn, answered; the machine has been idle since, and all is saved."""
    request = request_of(1, BODY, namespace="a", shared_segments=0, now_s=sim.now_s)
    for name, value in job.items():
        setattr(request.job, name, value)
    sim.submit(request)
    while sim.pending:
        sim.complete(sim.pending[0])
    sim.finish(request, decoded=20, heard=True)
    settle(sim)
    return request


def settle(sim: Simulation) -> None:
    sim.tick(1.0)
    while sim.pending:
        sim.complete(sim.pending[0])
    for name in list(sim.arriving):
        sim.absorb(name)


def compute_ahead(sim: Simulation, before: Request, number: int = 100) -> Request:
    """Begin to compute what the next turn begins with: the prompt, and its reply in other words."""
    content = next(s.content for s in sim.scheduler.slots if s.content)
    ahead = ahead_of(number, content, [*before.tokens, *REWRITTEN], now_s=sim.now_s)
    sim.submit(ahead)
    return ahead


def next_turn(sim: Simulation, ahead: Request, number: int = 7) -> Request:
    body = {"prompt": [*ahead.tokens, *range(7, 30)]}
    request = request_of(number, body, namespace="a", shared_segments=0, now_s=sim.now_s)
    sim.submit(request)
    return request


@pytest.mark.parametrize("cuttable", [True, False])
def test_the_next_turn_starts_from_what_was_computed_ahead(cuttable: bool) -> None:
    sim = Simulation(slots=2, cuttable=cuttable)
    before = answered(sim)
    ahead = compute_ahead(sim, before)
    settle(sim)
    assert sim.ended[ahead.id] == 1
    request = next_turn(sim, ahead)
    assert request.plan
    assert request.plan.source is Source.AHEAD
    assert request.plan.reuse_tokens == len(ahead.tokens)
    assert request.plan.ahead_tokens > 0


@pytest.mark.parametrize("cuttable", [True, False])
def test_the_old_rendering_is_found_after_it(cuttable: bool) -> None:
    sim = Simulation(slots=1, cuttable=cuttable)
    before = answered(sim)
    held = [token for token, _ in sim.engine[0]]
    compute_ahead(sim, before)
    settle(sim)
    again = request_of(
        3, {"prompt": [*held, 5, 6]}, namespace="a", shared_segments=0, now_s=sim.now_s
    )
    sim.submit(again)
    while sim.pending:
        sim.complete(sim.pending[0])
    assert again.plan
    assert again.plan.reuse_tokens == len(held)


@pytest.mark.parametrize(("prefill_s", "source"), [(0.005, Source.SNAPSHOT), (0.0001, Source.SLOT)])
def test_an_answer_asked_for_again_takes_what_is_cheaper_on_this_machine(
    prefill_s: float, source: Source
) -> None:
    # The slot holds 1,000 tokens of the prompt and the new rendering behind them; the old one, 300
    # tokens longer, is in the store: 65 MB, 80 ms by the priors.
    ids = as_tokens(list(range(1300)))
    held = content_of(1060, 1060)
    held.ids = as_tokens([*range(1000), *REWRITTEN])
    held.ahead_from, held.saved_tokens = 1000, 1060
    prompt = prompt_of_ids(ids, b"again")
    demand = Demand(prompt, 100, can_fill=False, namespace="a", ids=ids)
    stored = Stored(-1, 1299, 1299, size_bytes=65_000_000, ready=False)
    rates = Rates()
    rates.prefill_s_per_token.learn(prefill_s)
    machine = Machine(row_bytes=50_000, cuttable=True, can_save=True, pool_tokens=None)
    slot = Slot(0, content=held, owner="a", held_tokens=1060)
    plan = choose(demand, [slot], stored, machine=machine, rates=rates, now_s=1.0)
    assert plan
    assert plan.source is source


def test_whoever_comes_ends_it_and_begins_once_the_engine_has_let_go() -> None:
    sim = Simulation(slots=2)
    before = answered(sim)
    ahead = compute_ahead(sim, before)
    (fill,) = sim.pending
    assert isinstance(fill, FillSlot)
    request = next_turn(sim, ahead)
    assert sim.interrupted == [fill]
    assert sim.ended[ahead.id] == 1
    assert request.plan is None, "what the fill has computed may be what it needs"
    another = next_turn(sim, ahead, 9)
    assert sim.interrupted == [fill], "it is ended once"
    sim.complete(fill)
    (look,) = sim.pending
    assert isinstance(look, LookSlot)
    sim.complete(look)
    while sim.pending:
        sim.complete(sim.pending[0])
    assert request.plan
    assert request.plan.slot == fill.slot
    assert request.plan.source is Source.AHEAD, "half of it was computed"
    assert another.plan
    sim.settle()


def test_behind_a_fill_that_failed_nothing_is_promised() -> None:
    sim = Simulation(slots=1)
    before = answered(sim)
    ahead = compute_ahead(sim, before)
    (fill,) = sim.pending
    planned = sim.scheduler.jobs[ahead.id].plan
    assert planned
    assert planned.promise_tokens > 0
    sim.complete(fill, failure=StepFailed(emptied=False))
    plan = sim.scheduler.jobs[ahead.id].plan
    assert plan
    assert plan.promise_tokens == 0
    settle(sim)


def test_a_save_behind_it_is_let_through() -> None:
    sim = Simulation(slots=2)
    before = answered(sim)
    ahead = compute_ahead(sim, before)
    sim.complete(sim.pending[0])
    (save,) = sim.pending
    assert isinstance(save, SaveSlot)
    request = request_of(4, BODY, namespace="b", shared_segments=0, now_s=sim.now_s)
    sim.submit(request)
    assert not sim.said["Interrupt"]
    assert not sim.ended[ahead.id]
    assert len(sim.pending) == 2
    sim.settle()


def test_it_never_waits_for_a_slot_nor_empties_one() -> None:
    sim = Simulation(slots=1)
    before = answered(sim)
    content = sim.scheduler.slots[0].content
    assert content
    other = request_of(5, BODY, namespace="a", shared_segments=0, now_s=sim.now_s)
    sim.submit(other)
    ahead = ahead_of(6, content, [*before.tokens, *REWRITTEN], now_s=sim.now_s)
    effects = sim.scheduler.submit(ahead.job, sim.now_s)
    assert effects == [Fail(ahead.id, "no_room")]
    assert ahead.id not in sim.scheduler.jobs

    # A pool that is nearly full: only another slot's content makes room.
    pool = Simulation(slots=2, pool_tokens=1400)
    for slot in pool.scheduler.slots:
        pool.scheduler.set_content(slot.id, content_of(400, 400), pool.now_s)
    held = [slot.content for slot in pool.scheduler.slots]
    assert held[0]
    ahead = ahead_of(8, held[0], list(range(1100)), now_s=pool.now_s)
    assert pool.scheduler.submit(ahead.job, pool.now_s) == [Fail(ahead.id, "no_room")]
    assert [slot.content for slot in pool.scheduler.slots] == held


def test_a_batch_ends_it_too_and_so_does_an_engine_that_dies() -> None:
    sim = Simulation(slots=2)
    before = answered(sim)
    compute_ahead(sim, before)
    batch = request_of(4, BODY, namespace="b", shared_segments=0, now_s=sim.now_s)
    batch.job.priority = 1
    effects = sim.scheduler.submit(batch.job, sim.now_s)
    assert [type(effect) for effect in effects] == [Fail, Interrupt]

    sim = Simulation(slots=2)
    ahead = compute_ahead(sim, answered(sim))
    sim.engine_down()
    sim.tick(1.5)
    assert sim.ended[ahead.id] == 1, "nobody needs it any more when the engine is back"
    sim.settle()


def test_the_machine_is_settled_once_nobody_asks_and_all_is_saved() -> None:
    sim = Simulation(slots=2)
    assert sim.scheduler.is_settled(sim.now_s + 1.0)
    request = request_of(1, BODY, namespace="a", shared_segments=0, now_s=sim.now_s)
    sim.submit(request)
    while sim.pending:
        sim.complete(sim.pending[0])
    assert not sim.scheduler.is_settled(sim.now_s + 1.0), "it serves"
    sim.finish(request, decoded=20, heard=True)
    assert not sim.scheduler.is_settled(sim.now_s + 1.0), "what it holds isn't saved"
    settle(sim)
    assert sim.scheduler.is_settled(sim.now_s)
    sim.engine_down()
    assert not sim.scheduler.is_settled(sim.now_s + 1.0)


def content_of(tokens: int, *states: int) -> Content:
    known = tuple(Position(at, exact=True) for at in states)
    return Content("a", {}, tokens, ids=as_tokens(list(range(tokens))), states=known)


def test_lacking_is_what_neither_the_slot_nor_the_store_spares() -> None:
    ids = as_tokens([*range(100), *REWRITTEN])
    prompt = prompt_of_ids(ids, b"x")
    machine = Simulation().scheduler.machine
    held = content_of(300, 64, 300)
    assert lacking_tokens(held, prompt, ids, None, machine=machine) == 60
    whole = replace(machine, cuttable=False)
    assert lacking_tokens(held, prompt, ids, None, machine=whole) == 96
    stored = Stored(-1, 160, 160, size_bytes=1, ready=True)
    assert lacking_tokens(held, prompt, ids, stored, machine=whole) == 0


def test_it_is_worth_it_while_conversations_go_on() -> None:
    chance = first_turn()
    chance.begun()
    assert why_not(lacking=60, chance=chance.value) is None
    for _ in range(2):
        chance.begun()
    assert why_not(lacking=60, chance=chance.value) is Kept.SELDOM, "each had one turn"
    assert why_not(lacking=20, chance=1.0) is Kept.FEW
    assert why_not(lacking=3, chance=1.0) is Kept.HELD, "the opening of a turn is nothing"


def test_a_turn_has_ended_where_a_user_or_a_tool_is_next() -> None:
    sim = Simulation(slots=1)
    job = answered(sim, chat=BODY).job
    content = sim.scheduler.slots[0].content
    machine = replace(sim.scheduler.machine, appends=False)
    known: dict[str, Any] = {"machine": machine, "way": Rewriting()}
    turn = ended_turn(job, 0, content, REPLY, **known)
    assert turn
    assert turn.reply == SAID
    called = replace(REPLY, finish_reason="tool_calls", calls=("look",))
    assert ended_turn(job, 0, content, called, **known)
    for other in (replace(REPLY, finish_reason="length"), replace(REPLY, counts=None)):
        assert ended_turn(job, 0, content, other, **known) is None
    job.is_final = True
    assert ended_turn(job, 0, content, REPLY, **known) is None, "a batch's task isn't gone on from"


def test_where_all_is_appended_a_turn_matters_if_its_client_rewrites_or_its_slot_is_whole() -> None:
    sim = Simulation(slots=1)
    job = answered(sim, chat=BODY).job
    content = sim.scheduler.slots[0].content
    machine = replace(sim.scheduler.machine, appends=True, cuttable=True)
    known: dict[str, Any] = {"machine": machine, "way": Rewriting()}
    assert ended_turn(job, 0, content, REPLY, **known) is None
    turn = ended_turn(
        *(job, 0, content, REPLY), machine=machine, way=Rewriting(drops_reasoning=True)
    )
    assert turn
    assert turn.reply == {"role": "assistant", "content": "Noon."}
    whole = replace(machine, cuttable=False)
    assert ended_turn(job, 0, content, REPLY, machine=whole, way=Rewriting())


def test_what_was_computed_is_used_by_the_turn_that_goes_on_or_wasted() -> None:
    first = request_of(1, BODY, namespace="a", shared_segments=0, now_s=0.0).job
    asked = first.prompt.marks[-1].digest
    said = [*BODY["messages"], {"role": "assistant", "content": "Noon."}, USER]
    later = request_of(2, {"messages": said}, namespace="a", shared_segments=0, now_s=0.0).job
    prepared = Prepared(as_tokens(list(range(100))), 60, "a", asked)
    assert prepared.used(first, 100) is None, "asked again: nothing goes on from it"
    assert prepared.used(replace(later, namespace="b"), 100) is None
    assert prepared.used(later, 100) == 0, "found by its marks: in a slot that holds something else"
    later.ids = as_tokens([*range(90), 7, 7, 7])
    assert prepared.used(later, 90) == 50
    assert prepared.used(later, 70) == 30, "the engine reused no more"
    assert prepared.used(later, 20) == 0


def test_each_of_several_turns_is_accounted_for_and_told_of() -> None:
    sim = Simulation(slots=2)
    metrics = Metrics()
    machine = replace(sim.scheduler.machine, appends=False)
    deployment: Any = SimpleNamespace(
        settings=Settings(),
        metrics=metrics,
        machine=machine,
        dispatcher=SimpleNamespace(scheduler=sim.scheduler),
    )
    ahead = Ahead(deployment)
    jobs = []
    for number in range(2):
        talk = [*BODY["messages"], {"role": "user", "content": f"Number {number}"}]
        first = answered(Simulation(slots=2), chat={"messages": talk}).job
        first.prompt = prompt_of({"messages": talk}, fingerprint="f", namespace="a")
        turn = ended_turn(*(first, 0, content_of(60), REPLY), machine=machine, way=Rewriting())
        assert turn
        ahead.note_prepared(Prepared(as_tokens(list(range(100))), 60, "a", turn.asked))
        ahead.remember(turn, Kept.PREFILLED)
        later = [*talk, SAID, USER]
        prompt = prompt_of({"messages": later}, fingerprint="f", namespace="a")
        jobs.append(replace(first, prompt=prompt, ids=as_tokens([*range(90), 7])))
    for job in reversed(jobs):
        ahead.note(job, REPLY_90)
        assert ahead.came_of(job) == Kept.PREFILLED.value
        longer = [*jobs[0].prompt.marks, *jobs[0].prompt.marks[-1:]]
        further = replace(job.prompt, marks=tuple(longer), turns=job.prompt.turns + 1)
        assert not ahead.came_of(replace(job, prompt=further)), "another turn was between"
    told = metrics.text().decode()
    assert 'keepwarm_ahead_tokens_total{what="used"} 100.0' in told
    assert 'keepwarm_ahead_tokens_total{what="wasted"} 20.0' in told


def test_reasoning_is_read_whole_and_in_a_stream() -> None:
    whole = b'{"choices":[{"message":{"content":"Noon.","reasoning_content":"A clock."}}]}'
    stream = (
        b'data: {"choices":[{"delta":{"reasoning_content":"A "}}]}\n\n'
        b'data: {"choices":[{"delta":{"reasoning_content":"clock."}}]}\n\n'
        b'data: {"choices":[{"delta":{"content":"Noon."},"finish_reason":"stop"}]}\n\n'
    )
    for reply in (read_reply(whole, streamed=False), read_reply(stream, streamed=True)):
        assert reply.message == SAID


def test_a_laptop_on_battery_keeps_still(tmp_path: Path) -> None:
    assert not on_battery(tmp_path / "none")
    for name, kind, online in (("AC", "Mains", "1"), ("BAT0", "Battery", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(kind + "\n")
        (tmp_path / name / "online").write_text(online + "\n")
    assert not on_battery(tmp_path)
    (tmp_path / "AC" / "online").write_text("0\n")
    assert on_battery(tmp_path)


def test_processes_of_low_priority_are_work_that_somebody_wants_done(tmp_path: Path) -> None:
    assert nice_seconds(tmp_path / "none") == 0.0
    (tmp_path / "stat").write_text("cpu  100 250 30 4000 0 0 0 0 0 0\ncpu0 1 2 3\n")
    assert nice_seconds(tmp_path / "stat") == 2.5
    (tmp_path / "stat").write_text("odd\n")
    assert nice_seconds(tmp_path / "stat") == 0.0
