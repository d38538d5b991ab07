"""Which slot and which source: the least estimated time to the first token wins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from keepwarm.core.plan import (
    FILL_MIN_TOKENS,
    Demand,
    Machine,
    Plan,
    Source,
    Stored,
    choose,
    doubt_tokens,
    prompt_tokens,
)
from keepwarm.core.prompt import Mark, Prompt
from keepwarm.core.rates import Rates
from keepwarm.core.returns import later_turn
from keepwarm.core.slots import Content, Position, Slot, SlotState
from keepwarm.core.tree import as_tokens

ROW_BYTES = 23_000
MACHINE = Machine(row_bytes=ROW_BYTES, cuttable=True, can_save=True, pool_tokens=None)
CHARS = 4000
TOKENS = 1046  # 4,000 characters at the prior of 0.26, and the turn's


def marks(*names: str, step: int = CHARS // 4) -> tuple[Mark, ...]:
    return tuple(Mark(n.encode() * 16, (i + 1) * step) for i, n in enumerate(names))


PROMPT = Prompt(False, marks("a", "b", "c", "d"), 1, 1)
DEMAND = Demand(PROMPT, reply_tokens=100, can_fill=True, namespace="me")


def holding(names: str, tokens: int, *, exact: bool = True, **more: object) -> Content:
    """A slot's content: these marks evenly over so many tokens."""
    step = tokens // len(names)
    held = {n.encode() * 16: Position(step * (i + 1), exact=exact) for i, n in enumerate(names)}
    return replace(Content("me", held, tokens, saved_tokens=tokens), **more)  # type: ignore[arg-type]


def slot(number: int, content: Content | None = None, **more: object) -> Slot:
    held = content.tokens if content else 0
    owner = content.namespace if content else ""
    made = Slot(number, content=content, held_tokens=held, owner=owner)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def stored(index: int, tokens: int, *, promise: int | None = None) -> Stored:
    return Stored(
        mark_index=index,
        tokens=tokens,
        promise_tokens=tokens if promise is None else promise,
        size_bytes=tokens * ROW_BYTES,
        ready=True,
        extent_id=7,
    )


def planned(
    slots: list[Slot],
    known: Stored | None = None,
    *,
    demand: Demand = DEMAND,
    machine: Machine = MACHINE,
    rates: Rates | None = None,
) -> Plan | None:
    return choose(demand, slots, known, machine=machine, rates=rates or Rates(), now_s=1000.0)


def best(*args: object, **kwargs: object) -> Plan:
    plan = planned(*args, **kwargs)  # type: ignore[arg-type]
    assert plan
    return plan


def test_nothing_known_is_cold_on_the_slot_that_was_idle_longest() -> None:
    plan = best([slot(0, idle_since_s=50.0), slot(1, idle_since_s=40.0)])
    assert (plan.source, plan.slot) == (Source.COLD, 1)
    assert plan.promise_tokens == 0
    assert plan.prompt_tokens == TOKENS


def test_the_slot_that_holds_the_longest_prefix_wins() -> None:
    plan = best([slot(0, holding("ab", 500)), slot(1, holding("abc", 750)), slot(2)])
    assert (plan.source, plan.slot, plan.reuse_tokens) == (Source.SLOT, 1, 750)


def test_a_snapshot_wins_over_a_slot_that_holds_less() -> None:
    plan = best([slot(0, holding("a", 250)), slot(1)], stored(2, 780))
    assert plan.source is Source.SNAPSHOT
    # Into the slot where it costs nothing.
    assert plan.slot == 1
    assert plan.restore == stored(2, 780)
    assert plan.promise_tokens == 780


def test_a_slot_that_holds_as_much_wins_over_a_snapshot() -> None:
    plan = best([slot(0, holding("abc", 780)), slot(1)], stored(2, 780))
    assert (plan.source, plan.slot) == (Source.SLOT, 0)
    assert plan.restore is None


def test_dense_text_doesnt_make_a_slot_that_holds_more_look_like_one_that_holds_less() -> None:
    # By its characters the whole prompt comes to fewer tokens than either holds of it.
    held = holding("abc", 3 * 800, saved_tokens=1600)
    plan = best([slot(0, held), slot(1)], stored(1, 1600))
    assert (plan.source, plan.slot, plan.reuse_tokens) == (Source.SLOT, 0, 2400)
    assert plan.prompt_tokens > 2400


def test_where_prefill_is_cheap_a_restore_isnt_worth_it() -> None:
    rates = Rates()
    rates.prefill_s_per_token.value = 1e-6
    rates.restore_s_per_byte.value = 1e-7
    assert best([slot(0)], stored(2, 780), rates=rates).source is Source.COLD


def test_who_has_waited_for_a_fill_starts_from_it_as_shared() -> None:
    demand = replace(DEMAND, waited_for_fill=True)
    assert best([slot(0)], stored(1, 520), demand=demand).source is Source.SHARED


def test_a_busy_slot_is_never_chosen() -> None:
    busy = slot(0, holding("abc", 780), state=SlotState.SERVING, job="other")
    assert best([busy, slot(1)]).slot == 1
    assert planned([busy]) is None


def test_a_plan_promises_what_is_counted_and_not_what_is_estimated() -> None:
    content = holding("abc", 780, exact=False)
    content.marks[b"b" * 16] = Position(520, exact=True)
    plan = best([slot(0, content)])
    assert plan.reuse_tokens == 780
    assert plan.promise_tokens == 520


def test_another_tenants_slot_is_as_good_as_an_empty_one_and_no_better() -> None:
    foreign = slot(0, replace(holding("abc", 780), namespace="you"))
    plan = best([foreign])
    assert plan.source is Source.COLD
    assert plan.reuse_tokens == plan.promise_tokens == 0


@pytest.mark.parametrize(("states", "reused"), [((780,), 780), ((500, 900), 500), ((900,), 0)])
def test_a_recurrent_slot_is_reused_up_to_the_engines_last_checkpoint_and_promises_nothing(
    states: tuple[int, ...], reused: int
) -> None:
    machine = replace(MACHINE, cuttable=False)
    known = tuple(Position(at, exact=True) for at in states)
    content = replace(holding("abc", 780), tokens=900, states=known)
    plan = best([slot(0, content)], machine=machine)
    assert plan.source is (Source.SLOT if reused else Source.COLD)
    assert plan.reuse_tokens == reused
    assert plan.promise_tokens == 0


def test_what_only_a_slot_holds_is_saved_before_it_is_overwritten() -> None:
    unsaved = replace(holding("xyz", 3000), saved_tokens=0, returns=later_turn())
    assert best([slot(0, unsaved, idle_since_s=1000.0)]).save_first
    saved = replace(unsaved, saved_tokens=3000)
    assert not best([slot(0, saved, idle_since_s=1000.0)]).save_first


def test_the_slot_whose_loss_costs_least_is_overwritten() -> None:
    dear = replace(holding("xyz", 3000), returns=later_turn())
    cheap = replace(holding("uvw", 100), returns=later_turn())
    slots = [slot(0, dear, idle_since_s=1000.0), slot(1, cheap, idle_since_s=1000.0)]
    assert best(slots).slot == 1


def test_a_long_static_part_that_nobody_holds_is_filled_on_its_own() -> None:
    assert best([slot(0)]).fill
    assert not best([slot(0)], demand=replace(DEMAND, can_fill=False)).fill
    short = Prompt(False, marks("a", "b", step=FILL_MIN_TOKENS), 0, 1)
    assert not best([slot(0)], demand=replace(DEMAND, prompt=short)).fill


@pytest.mark.parametrize("where", ["slot", "store"])
def test_a_static_part_that_is_held_isnt_filled_again_however_long_it_was_thought(
    where: str,
) -> None:
    # By characters it would have 520 tokens; it has 250.
    if where == "slot":
        plan = best([slot(0, holding("ab", 250))])
    else:
        plan = best([slot(0)], stored(1, 250))
    assert not plan.fill


def test_a_prompt_of_token_ids_is_as_long_as_it_is() -> None:
    prompt = Prompt(True, (Mark(b"t" * 16, 400, 100),), -1, 1)
    assert prompt_tokens(replace(DEMAND, prompt=prompt), Rates()) == 100


def test_a_counted_static_part_makes_the_estimate_better() -> None:
    counted = replace(DEMAND, static_tokens=800)
    assert prompt_tokens(counted, Rates()) == 800 + 520 + 6


def pool(tokens: int) -> Machine:
    return replace(MACHINE, pool_tokens=tokens)


def test_other_slots_are_emptied_until_a_shared_pool_suffices() -> None:
    saved = holding("xyz", 900)
    slots = [
        slot(0),
        slot(1, replace(saved, returns=later_turn()), idle_since_s=1000.0),
        slot(2, saved, idle_since_s=1000.0),
    ]
    assert best(slots, machine=pool(4000)).evict == ()
    # The one that is less likely to go on, first.
    assert best(slots, machine=pool(2400)).evict == ((2, False),)
    assert best(slots, machine=pool(1400)).evict == ((2, False), (1, False))


def test_what_a_busy_slot_was_granted_counts_in_the_pool() -> None:
    busy = slot(0, state=SlotState.SERVING, job="other", granted_tokens=2000)
    assert planned([busy, slot(1)], machine=pool(4000)) is not None
    assert planned([busy, slot(1)], machine=pool(2500)) is None


def test_what_an_idle_slot_may_hold_unknown_is_emptied_first() -> None:
    unknown = slot(1, held_tokens=1500)
    plan = best([slot(0), unknown], machine=pool(2000))
    assert plan.evict == ((1, False),)


def test_a_prompt_that_is_too_long_for_all_of_the_pool_evicts_nobody() -> None:
    plan = best([slot(0), slot(1, holding("xyz", 900))], machine=pool(600))
    assert plan.evict == ()


def asking(*, reply: int, prompt: int = 1000, replies: int = 1) -> Demand:
    return replace(
        DEMAND,
        reply_tokens=reply,
        ids=as_tokens(range(prompt)),
        replies=replies,
        is_alone=replies > 1,
    )


def reply_of(demand: Demand, *, tokens: int, busy: int = 0) -> int | None:
    """What a reply may come to in a pool, of which a request that runs was granted some."""
    slots = [slot(0), slot(1)]
    if busy:
        slots[1] = slot(1, state=SlotState.SERVING, job="other", granted_tokens=busy)
    plan = planned(slots, demand=demand, machine=pool(tokens))
    if plan is None:
        return None
    assert plan.granted_tokens == 1000 + plan.reply_tokens * demand.replies
    assert busy + plan.granted_tokens <= tokens
    return plan.reply_tokens


def test_a_reply_reserves_what_it_may_come_to() -> None:
    assert reply_of(asking(reply=1500), tokens=4096) == 1500
    assert reply_of(asking(reply=1500), tokens=4096, busy=1000) == 1500
    # Too little is left beside the other: it waits.
    assert reply_of(asking(reply=1500), tokens=4096, busy=2000) is None


def test_a_reply_without_a_limit_gets_what_is_left_and_half_of_it_where_that_is_ample() -> None:
    assert reply_of(asking(reply=1 << 31), tokens=4096) == 3096
    assert reply_of(asking(reply=1 << 31), tokens=4096, busy=1000) is None
    assert reply_of(asking(reply=1 << 31), tokens=33_000) == 16_000
    assert reply_of(asking(reply=1 << 31), tokens=33_000, busy=17_000) == 7500
    assert reply_of(asking(reply=1 << 31), tokens=33_000, busy=27_900) == 4096
    assert reply_of(asking(reply=1 << 31), tokens=33_000, busy=28_000) is None


def test_several_replies_to_one_prompt_are_all_counted() -> None:
    assert reply_of(asking(reply=1500, replies=2), tokens=4096) == 1500
    assert reply_of(asking(reply=1 << 31, replies=3), tokens=4096) == 1032
    assert reply_of(asking(reply=100, replies=2), tokens=4096, busy=500) is None


def test_what_was_estimated_of_a_prompt_is_taken_for_longer_than_it_seems() -> None:
    estimated = replace(asking(reply=1500), ids=None)
    plan = best([slot(0), slot(1)], demand=estimated, machine=pool(8000))
    assert plan.granted_tokens == plan.prompt_tokens * 5 // 4 + 1500


def test_all_that_was_considered_is_told() -> None:
    plan = best([slot(0, holding("ab", 500)), slot(1)], stored(2, 780))
    told = {(o.source, o.slot) for o in plan.considered}
    assert told == {
        (Source.SLOT, 0),
        (Source.SNAPSHOT, 0),
        (Source.COLD, 1),
        (Source.SNAPSHOT, 1),
    }
    chosen = [o for o in plan.considered if (o.source, o.slot) == (plan.source, plan.slot)]
    assert chosen[0].ttft_s + chosen[0].loss_s == min(o.ttft_s + o.loss_s for o in plan.considered)


def test_a_reply_behind_what_is_stored_is_in_doubt_however_dense_the_text_before_it_was() -> None:
    """By its characters the whole prompt is shorter (214) than what the store has of it."""
    prompt = Prompt(False, marks("a", "b", "c", "d", step=200), 1, 1, answered_index=2)
    doubt = doubt_tokens(
        replace(DEMAND, prompt=prompt), [], stored(1, 240), machine=MACHINE, rates=Rates()
    )
    assert doubt == 52


def test_of_two_slots_that_marks_find_the_one_asked_since_the_last_question_is_taken() -> None:
    # The older one was asked before "b", the last question; its history may read otherwise now.
    machine = replace(MACHINE, appends=False)
    demand = replace(DEMAND, prompt=replace(DEMAND.prompt, asked_index=1))
    older, newer = holding("ab", 790), holding("abc", 780)
    slots = [slot(0, older), slot(1, newer)]
    assert best(slots, demand=demand, machine=machine).slot == 1
    assert best(slots, demand=demand).slot == 0
