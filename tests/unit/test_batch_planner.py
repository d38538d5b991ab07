"""The planner: a permutation, bounds kept, never above the file's order, close to the best."""

from __future__ import annotations

import itertools
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchsamples import document, line
from keepwarm.batch.night import FillBranch, Night, RunTask
from keepwarm.batch.planner import order_cost, plan
from keepwarm.batch.tasks import Task, parse_tasks
from keepwarm.batch.tree import PrefixTree, build_tree
from keepwarm.core.prompt import SharedEnd

TIERS = {"minimal": 240, "standard": 2000}


def tree_of(lines: list[bytes]) -> PrefixTree:
    parsed = parse_tasks(lines)
    assert not parsed.errors
    return build_tree(parsed.tasks, tier_tokens=TIERS)


def asked(number: int, of: int, *, model: str = "any", **wishes: object) -> bytes:
    text = f"{document(of)}\n\nQuestion {number}: who is meant in part {number * 7}?"
    return line(f"t{number}", text, model=model, **wishes)


def shuffled(count: int, documents: int, seed: int = 1, **wishes: object) -> list[bytes]:
    lines = [asked(i, i % documents, **wishes) for i in range(count)]
    random.Random(seed).shuffle(lines)
    return lines


def test_a_document_that_nobody_declared_is_found_and_ends_behind_a_word() -> None:
    tree = tree_of(shuffled(6, 2))
    found = [b for b in tree.branches if b.end is not None]
    common = f"{document(0)}\n\nQuestion"
    assert [b.end for b in found] == [SharedEnd(0, len(common))] * 2
    assert [b.tasks for b in found] == [3, 3]


def test_tasks_of_one_tier_share_it_and_tasks_without_share_nothing_of_it() -> None:
    lines = [asked(0, 0, model="minimal"), asked(1, 1, model="minimal"), asked(2, 0)]
    tree = tree_of(lines)
    assert tree.shared_tokens(0, 1) >= 240
    assert tree.shared_tokens(0, 2) == 0


def test_a_longer_system_prompt_with_documents_behind_it_makes_two_levels() -> None:
    system = document(99, sentences=20)
    lines = [line(f"t{i}", f"{document(i % 3)}\n\nPart {i}?", system=system) for i in range(9)]
    tree = tree_of(lines)
    path = [tree.branches[b].end for b in tree.fillable(0)]
    assert path[0] == SharedEnd(1, 0) or path[0] == SharedEnd(1, len("Report"))
    assert path[1] is not None
    assert path[1].segment == 1
    assert path[1].chars > 400


def test_short_common_beginnings_arent_worth_a_fill() -> None:
    tree = tree_of([line(f"t{i}", f"Translate into French: word {i}") for i in range(8)])
    assert all(b.end is None for b in tree.branches)
    assert plan(tree, lanes=4, now_s=0).tally.fills == 0


def test_each_document_is_filled_once_and_shared() -> None:
    tree = tree_of(shuffled(48, 6, model="standard"))
    night = plan(tree, lanes=4, now_s=0)
    assert night.tally.fills == 6
    assert night.tally.prefilled_tokens <= 1.05 * tree.least_tokens
    assert night.naive.prefilled_tokens > 3 * night.tally.prefilled_tokens


def test_lanes_stay_with_their_document_so_that_little_is_restored() -> None:
    tree = tree_of(shuffled(32, 4))
    night = plan(tree, lanes=4, now_s=0)
    assert night.tally.restored_tokens == 0
    lanes = {}
    for step in night.steps:
        lanes.setdefault(step.slot, set()).add(tree.fillable(step.leaf)[-1])
    assert [len(groups) for groups in lanes.values()] == [1, 1, 1, 1]


def test_one_document_for_all_is_filled_first_and_then_used_by_every_lane() -> None:
    tree = tree_of(shuffled(12, 1))
    steps = plan(tree, lanes=4, now_s=0).steps
    assert steps[0].branch is not None
    assert sum(step.branch is not None for step in steps) == 1
    assert {step.slot for step in steps} == {0, 1, 2, 3}


def test_what_is_shared_by_nobody_runs_in_the_files_order() -> None:
    tree = tree_of([line(f"t{i}", document(i)) for i in range(10)])
    night = plan(tree, lanes=2, now_s=0)
    assert night.order == tuple(range(10))
    assert night.tally.prefilled_tokens == night.naive.prefilled_tokens


def test_smaller_priorities_go_first_even_out_of_another_document() -> None:
    lines = [asked(i, 0) for i in range(6)] + [asked(9, 1, priority=-1)]
    tree = tree_of(lines)
    assert plan(tree, lanes=1, now_s=0).order[0] == 6


def test_a_deadline_that_leaves_no_slack_is_met_before_all_else() -> None:
    lines = [asked(i, 0) for i in range(6)]
    lines.append(asked(9, 1, deadline="1970-01-01T00:01:00+00:00", priority=5))
    tree = tree_of(lines)
    night = Night(tree, seconds=lambda _: 50.0)
    first = night.take(0, 0.0)
    assert isinstance(first, RunTask)
    assert first.leaf == 6
    relaxed = Night(tree, seconds=lambda _: 1.0)
    assert relaxed.take(0, 0.0) == FillBranch(tree.fillable(0)[-1], 0)


def test_a_turn_waits_for_the_one_before_it() -> None:
    first = [{"role": "user", "content": document(1)}]
    more = [*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    tree = tree_of([line("second", messages=more), line("first", messages=first)])
    assert tree.continues == (1, None)
    assert plan(tree, lanes=2, now_s=0).order == (1, 0)


def test_dependents_of_a_failure_end_with_it() -> None:
    tree = tree_of([line("a"), line("b", depends_on=["a"]), line("c", depends_on=["b"]), line("d")])
    night = Night(tree)
    assert night.ended(0, ok=False) == [1, 2]
    assert night.left == 1


def test_what_had_ended_before_is_not_run_again_nor_filled_for() -> None:
    tree = tree_of(shuffled(8, 1))
    night = plan(tree, lanes=2, now_s=0, ended=dict.fromkeys(range(7), True))
    assert night.order == (7,)
    assert night.tally.fills == 0


def test_a_fill_that_failed_holds_nobody_up() -> None:
    night = Night(tree_of(shuffled(4, 1)))
    work = night.take(0, 0)
    assert isinstance(work, FillBranch)
    assert night.take(1, 0) is None
    night.filled(work.branch, ok=False)
    taken = [night.take(lane, 0) for lane in range(4)]
    assert sorted(w.leaf for w in taken if isinstance(w, RunTask)) == [0, 1, 2, 3]


@st.composite
def piles(
    draw: st.DrawFn, most: int = 9, sentences_in: tuple[int, ...] = (2, 10, 20)
) -> list[bytes]:
    """Tasks over a few documents and system prompts, with priorities and dependencies."""
    count = draw(st.integers(1, most))
    lines = []
    for i in range(count):
        wishes: dict[str, object] = {}
        if draw(st.booleans()):
            wishes["priority"] = draw(st.integers(-1, 1))
        if i and draw(st.integers(0, 3)) == 0:
            wishes["depends_on"] = [f"t{draw(st.integers(0, i - 1))}"]
        if draw(st.integers(0, 4)) == 0:
            wishes["conversation"] = draw(st.sampled_from("xy"))
        number = draw(st.integers(0, 3))
        sentences = draw(st.sampled_from(sentences_in))
        text = f"{document(number, sentences=sentences)} What of {i}?"
        system = document(50 + draw(st.integers(0, 1))) if draw(st.booleans()) else None
        model = draw(st.sampled_from(["any", "minimal", "standard"]))
        lines.append(line(f"t{i}", text, model=model, system=system, **wishes))
    order = draw(st.permutations(range(count)))
    return [lines[i] for i in order]


def valid(lines: list[bytes]) -> PrefixTree:
    """The tree of what can run: a shuffled conversation may contradict a dependency."""
    return build_tree(parse_tasks(lines).tasks, tier_tokens=TIERS)


def needs_of(task: Task) -> set[str]:
    return {*task.depends_on, *task.after}


@settings(max_examples=150, deadline=None)
@given(piles(), st.integers(1, 4))
def test_any_plan_is_a_permutation_within_the_bounds_and_never_above_naive(
    lines: list[bytes], lanes: int
) -> None:
    tree = valid(lines)
    night = plan(tree, lanes=lanes, now_s=0)
    assert sorted(night.order) == list(range(len(tree.tasks)))
    begun: set[str] = set()
    for leaf in night.order:
        task = tree.tasks[leaf]
        assert needs_of(task) <= begun
        begun.add(task.custom_id)
    assert night.tally.cost <= night.naive.cost
    assert night.tally.prefilled_tokens >= tree.least_tokens


def allowed_orders(tree: PrefixTree) -> list[tuple[int, ...]]:
    index = {t.custom_id: i for i, t in enumerate(tree.tasks)}
    needs = [
        {index[n] for n in needs_of(t)} | ({before} if before is not None else set())
        for t, before in zip(tree.tasks, tree.continues, strict=True)
    ]
    orders = []
    for order in itertools.permutations(range(len(tree.tasks))):
        place = {leaf: i for i, leaf in enumerate(order)}
        if all(place[n] < place[leaf] for leaf in order for n in needs[leaf]):
            orders.append(order)
    return orders


@settings(max_examples=25, deadline=None)
@given(piles(most=5, sentences_in=(10, 20)), st.integers(1, 2))
def test_a_plan_is_close_to_the_best_of_all_permutations(lines: list[bytes], lanes: int) -> None:
    plain = [json.loads(raw) for raw in lines]
    for value in plain:
        # Priorities bind the plan and not the permutations; only what may be chosen is compared.
        (value.get("keepwarm") or {}).pop("priority", None)
    tree = valid([json.dumps(value).encode() for value in plain])
    best = min(order_cost(tree, order, lanes=lanes) for order in allowed_orders(tree))
    assert plan(tree, lanes=lanes, now_s=0).tally.cost <= best * 1.02 + 1


@pytest.mark.parametrize("lanes", [1, 3])
@settings(max_examples=60, deadline=None)
@given(piles(), st.integers(0, 1000))
def test_whatever_fails_or_is_retried_the_night_ends(
    lanes: int, lines: list[bytes], seed: int
) -> None:
    chance = random.Random(seed)
    tree = valid(lines)
    night = Night(tree)
    running: dict[int, FillBranch | RunTask] = {}
    ended: list[int] = []
    for _ in range(1000):
        idle = [lane for lane in range(lanes) if lane not in running]
        for lane in idle:
            work = night.take(lane, 0)
            if work is not None:
                filling = [w.branch for w in running.values() if isinstance(w, FillBranch)]
                assert not (isinstance(work, FillBranch) and work.branch in filling)
                assert not (isinstance(work, RunTask) and work in running.values())
                running[lane] = work
        if not night.left:
            break
        assert running, "tasks are left and nothing runs"
        lane = chance.choice(sorted(running))
        work = running.pop(lane)
        ok = chance.random() < 0.7
        if isinstance(work, FillBranch):
            night.filled(work.branch, ok=ok)
        elif chance.random() < 0.2:
            night.requeue(work.leaf)
        else:
            ended += [work.leaf, *night.ended(work.leaf, ok=ok)]
    assert sorted(ended) == list(range(len(tree.tasks)))


@pytest.mark.parametrize("odd", [5, "x", [5], [None], {"a": 1}, [[1]], [{"role": 5, "content": 6}]])
@pytest.mark.parametrize("key", ["messages", "input", "prompt", "tools", "instructions", "model"])
@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/responses", "/v1/completions"])
def test_odd_bodies_are_planned_like_others(odd: object, key: str, url: str) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "input": "hi",
        "prompt": "hi",
        "instructions": "be",
        "tools": 5,
    }
    value = {"method": "POST", "url": url, "body": body | {key: odd}}
    lines = [json.dumps({"custom_id": f"t{i}", **value}).encode() for i in range(3)]
    tree = build_tree(parse_tasks(lines).tasks, tier_tokens=TIERS)
    assert len(plan(tree, lanes=2, now_s=0).steps) >= 3


def test_deadlines_that_leave_slack_are_not_looked_at_for_each_task() -> None:
    lines = [line(f"t{i}", f"Question {i}", deadline="2100-01-01T00:00:00Z") for i in range(6000)]
    tree = build_tree(parse_tasks(lines).tasks, tier_tokens=TIERS)
    began_s = time.process_time()
    assert len(plan(tree, lanes=4, now_s=0).steps) == 6000
    # A second on a slow machine; looking at all for each it was most of a minute.
    assert time.process_time() - began_s < 12
