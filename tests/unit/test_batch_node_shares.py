"""The cut of a pile over nodes: whole branches, balanced, nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsamples import document, line
from keepwarm.batch.night import FillBranch, Night, RunTask
from keepwarm.batch.node_shares import cut
from keepwarm.batch.planner import BatchCosts, play
from keepwarm.batch.tasks import parse_tasks
from keepwarm.batch.tree import PrefixTree, build_tree


def tree_of(lines: list[bytes]) -> PrefixTree:
    parsed = parse_tasks(lines)
    assert not parsed.errors
    return build_tree(parsed.tasks, tier_tokens={})


def about(documents: list[int]) -> PrefixTree:
    """A task for each entry, about the document of that number."""
    texts = [f"{document(of)}\n\nPart {i}, please?" for i, of in enumerate(documents)]
    return tree_of([line(f"t{i}", text) for i, text in enumerate(texts)])


def prefilled_tokens(tree: PrefixTree, homes: list[int]) -> int:
    """Tokens prefilled if each node prefills what its tasks need once."""
    needed = {(homes[i], b) for i, leaf in enumerate(tree.leaves) for b in leaf.branches}
    return sum(tree.branch_tokens(branch) for _, branch in needed) + sum(
        map(tree.leaf_tokens, range(len(homes)))
    )


def test_a_document_stays_on_one_node() -> None:
    documents = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
    homes = cut(about(documents), 2)
    for number in range(4):
        assert len({home for of, home in zip(documents, homes, strict=True) if of == number}) == 1
    assert [homes.count(node) for node in (0, 1)] == [6, 6]


def test_a_document_that_is_more_than_a_share_is_cut_and_nothing_else_is() -> None:
    documents = [0] * 30 + [1, 1, 2, 2]
    homes = cut(about(documents), 2)
    assert {home for of, home in zip(documents, homes, strict=True) if of == 0} == {0, 1}
    for number in (1, 2):
        assert len({home for of, home in zip(documents, homes, strict=True) if of == number}) == 1


def test_tasks_that_wait_for_each_other_stay_together() -> None:
    lines = [line(f"t{i}", f"{document(i)} Say {i}.") for i in range(6)]
    lines.append(line("last", document(9), depends_on=[f"t{i}" for i in range(4)]))
    homes = cut(tree_of(lines), 3)
    assert len({homes[i] for i in (0, 1, 2, 3, 6)}) == 1
    assert homes[4] != homes[0]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=24), st.integers(1, 5))
def test_any_pile_is_dealt_out_whole_and_shares_no_more_than_turn_by_turn(
    documents: list[int], nodes: int
) -> None:
    tree = about(documents)
    homes = cut(tree, nodes)
    assert len(homes) == len(documents)
    assert set(homes) <= set(range(nodes))
    in_turn = [i % nodes for i in range(len(documents))]
    assert prefilled_tokens(tree, homes) <= max(
        prefilled_tokens(tree, in_turn), prefilled_tokens(tree, [0] * len(documents))
    )
    if nodes > 1 and len(set(documents)) >= 2 * nodes:
        assert len(set(homes)) == nodes, "no node is left without work"


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(1, 3), st.integers(1, 3))
def test_a_night_on_several_nodes_ends_and_runs_each_task_once(
    documents: list[int], nodes: int, slots: int
) -> None:
    tree = about(documents)
    night = Night(tree, homes=cut(tree, nodes))
    _, steps = play(tree, night, lanes=nodes * slots, now_s=0.0, costs=BatchCosts())
    run = [step.leaf for step in steps if step.branch is None]
    assert sorted(run) == list(range(len(documents)))


def test_lanes_take_what_is_at_home_on_their_node_until_that_is_through() -> None:
    documents = [0, 1] * 6
    tree = about(documents)
    homes = cut(tree, 2)
    night = Night(tree, homes=homes)
    for lane in (0, 1, 2, 3):
        work = night.take(lane, 0.0)
        if isinstance(work, FillBranch):
            night.filled(work.branch, ok=True)
            work = night.take(lane, 0.0)
        assert isinstance(work, RunTask)
        assert homes[work.leaf] == lane % 2


@pytest.mark.parametrize("nodes", [1, 2])
def test_an_empty_pile_has_no_homes(nodes: int) -> None:
    assert cut(tree_of([]), nodes) == []
