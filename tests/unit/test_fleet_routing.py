"""Which node gets a request: warmth against load, and what is forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.rates import Mean, Rates
from keepwarm.fleet.costs import MOVE_MIN_TOKENS, NodeCosts, PrefixOrigin, best_way
from keepwarm.fleet.routing import (
    FORGET_S,
    PATIENCE_S,
    STALE_S,
    Fleet,
    NodeReport,
    Want,
    preferring,
)
from keepwarm.fleet.warmth import Warmth

# A thousand tokens a second; a restored token costs a hundredth of that, a moved one a tenth.
COSTS = NodeCosts(
    prefill_s=1e-3,
    restore_s=1e-5,
    restore_call_s=0.0,
    fetch_s=1e-4,
    fetch_call_s=0.01,
    can_fetch=True,
)


def want(*prefixes: int, total: int = 10_000) -> Want:
    step = total // len(prefixes)
    return Want(prefixes, [step * (i + 1) for i in range(len(prefixes))], total)


def fleet(*names: str, **settings: Any) -> Fleet:
    made = Fleet(**settings)
    for name in names:
        made.join(name, COSTS, now_s=0.0)
    return made


def tell(made: Fleet, node: str, now_s: float = 0.0, **told: Any) -> None:
    told.setdefault("backlog_s", 0.0)
    told.setdefault("taken_s", now_s)
    made.report(node, NodeReport(costs=COSTS, **told), now_s=now_s)


def test_costs_of_a_token_are_those_of_the_single_node_plan() -> None:
    rates = Rates(prefill_s_per_token=Mean(0.004), restore_s_per_byte=Mean(1e-9))
    costs = NodeCosts.of(
        rates, row_bytes=23_000, fetch_s_per_byte=1e-8, fetch_call_s=0.1, can_fetch=True
    )
    way = best_way(costs, total_tokens=2000, local_tokens=1500, shared_tokens=0, wait_s=0.25)
    assert way.origin is PrefixOrigin.LOCAL
    expected = 0.25 + rates.restore_s(1500 * 23_000, ready=True) + rates.prefill_s(500)
    assert way.ttft_s == pytest.approx(expected)
    moved = best_way(costs, total_tokens=2000, local_tokens=0, shared_tokens=1500, wait_s=0.0)
    assert moved.ttft_s == pytest.approx(0.1 + 1500 * 23_000 * 1e-8 + expected - 0.25)


def test_rows_are_moved_while_the_request_waits_its_turn() -> None:
    args = {"total_tokens": 10_000, "local_tokens": 0, "shared_tokens": 8_000}
    idle = best_way(COSTS, wait_s=0.0, **args)
    busy = best_way(COSTS, wait_s=0.5, **args)
    assert idle.origin is busy.origin is PrefixOrigin.MOVED
    assert busy.ttft_s < idle.ttft_s + 0.5


def test_only_the_rows_that_a_node_lacks_are_moved() -> None:
    way = best_way(COSTS, total_tokens=10_000, local_tokens=6_000, shared_tokens=8_000, wait_s=0)
    assert (way.origin, way.reuse_tokens, way.moved_tokens) == (PrefixOrigin.MOVED, 8_000, 2_000)


def test_a_slow_or_absent_shared_store_is_left_alone() -> None:
    slow = NodeCosts(1e-3, 1e-5, 0.0, 2e-3, 0.01, True)
    absent = NodeCosts(1e-3, 1e-5, 0.0, 1e-4, 0.01, False)
    for costs in (slow, absent):
        way = best_way(costs, total_tokens=9000, local_tokens=0, shared_tokens=8000, wait_s=0)
        assert (way.origin, way.moved_tokens) == (PrefixOrigin.COLD, 0)


@given(
    total=st.integers(1, 200_000),
    local=st.integers(0, 250_000),
    shared=st.integers(0, 250_000),
    wait=st.floats(0, 100),
)
def test_a_way_never_reuses_the_whole_prompt_nor_loses_to_a_cold_prefill(
    total: int, local: int, shared: int, wait: float
) -> None:
    way = best_way(COSTS, total_tokens=total, local_tokens=local, shared_tokens=shared, wait_s=wait)
    assert 0 <= way.moved_tokens <= way.reuse_tokens <= max(total - 1, 0)
    assert way.ttft_s <= wait + total * COSTS.prefill_s + 1e-9
    assert way.ttft_s >= wait + way.work_s - 1e-9
    assert way.origin is not PrefixOrigin.MOVED or way.moved_tokens >= MOVE_MIN_TOKENS


def test_the_node_with_the_longest_warm_prefix_is_chosen() -> None:
    made = fleet("a", "b", "c")
    tell(made, "a", added=[1])
    tell(made, "b", added=[1, 2, 3])
    tell(made, "c", added=[1, 2])
    assert [c.node for c in made.rank(want(1, 2, 3, 4), now_s=0.0)] == ["b", "c", "a"]


def test_a_long_queue_outweighs_warmth_and_a_short_one_does_not() -> None:
    made = fleet("warm", "idle")
    tell(made, "warm", added=[1, 2, 3, 4], backlog_s=5.0)
    assert made.rank(want(1, 2, 3, 4), now_s=0.0)[0].node == "warm"
    tell(made, "warm", backlog_s=15.0)
    assert made.rank(want(1, 2, 3, 4), now_s=0.0)[0].node == "idle"


def test_a_busy_node_s_rows_are_moved_to_an_idle_one_when_that_is_faster() -> None:
    made = fleet("warm", "idle")
    tell(made, "warm", added=[1, 2, 3, 4], backlog_s=5.0, stored=[1, 2, 3, 4])
    best = made.rank(want(1, 2, 3, 4), now_s=0.0)[0]
    assert (best.node, best.way.origin) == ("idle", PrefixOrigin.MOVED)


def test_between_reports_a_router_counts_what_it_gave() -> None:
    made = fleet("a", "b", work_weight=0.0)
    nodes = []
    for number in range(4):
        request = want(number)
        best = made.rank(request, now_s=0.0)[0]
        made.give(request, best, now_s=0.0)
        nodes.append(best.node)
    assert sorted(nodes) == ["a", "a", "b", "b"]
    assert made.rank(want(0, 99), now_s=60.0)[0].node == nodes[0]


def test_a_report_replaces_guesses_but_for_what_was_given_after_it_was_taken() -> None:
    made = fleet("a")
    for at in (1.0, 2.0):
        request = want(7)
        made.give(request, made.rank(request, now_s=at)[0], now_s=at)
    tell(made, "a", now_s=2.5, taken_s=1.5, backlog_s=0.0)
    # The second request was given later: warm by then, it costs a token and a restore.
    assert 0.0 <= made.wait_s("a", now_s=1.5) < 1.0
    tell(made, "a", now_s=3.0, backlog_s=0.0)
    assert made.wait_s("a", now_s=3.0) == 0.0


def test_recent_work_spreads_requests_that_find_all_nodes_idle() -> None:
    made = fleet("a", "b", "c", "d")
    count = dict.fromkeys("abcd", 0)
    for number in range(40):
        request = want(number)
        best = made.rank(request, now_s=number * 60.0)[0]
        made.give(request, best, now_s=number * 60.0)
        count[best.node] += 1
        for name in "abcd":
            tell(made, name, now_s=number * 60.0 + 30.0)
    assert set(count.values()) == {10}


def test_work_is_weighed_the_same_after_a_day() -> None:
    early, late = fleet("a", "b"), fleet("a", "b")
    late.rank(want(1), now_s=0.0)
    for made, at in ((early, 10.0), (late, 86_410.0)):
        for name in "ab":
            tell(made, name, now_s=at)
        request = want(5)
        made.give(request, made.rank(request, now_s=at)[0], now_s=at)
    first = [c.score_s for c in early.rank(want(9), now_s=20.0)]
    second = [c.score_s for c in late.rank(want(9), now_s=86_420.0)]
    assert first == pytest.approx(second)


def test_a_silent_node_keeps_its_requests_but_not_its_warmth() -> None:
    made = fleet("a", "b")
    tell(made, "a", added=[1, 2, 3, 4])
    tell(made, "b", now_s=STALE_S + 1)
    ranked = made.rank(want(1, 2, 3, 4), now_s=STALE_S + 1)
    assert {c.node for c in ranked} == {"a", "b"}
    assert all(c.way.origin is PrefixOrigin.COLD for c in ranked)
    assert made.age(now_s=FORGET_S + 1) == ("a",)
    assert made.nodes == ("b",)


def test_a_router_that_lost_its_state_still_routes_and_learns_again() -> None:
    made = fleet("a", "b")
    tell(made, "b", added=[1, 2])
    fresh = fleet("a", "b")
    assert len(fresh.rank(want(1, 2), now_s=1.0)) == 2
    tell(fresh, "b", now_s=2.0, held=[1, 2])
    assert fresh.rank(want(1, 2), now_s=2.0)[0].node == "b"


def test_what_a_node_evicted_is_no_longer_counted_on() -> None:
    made = fleet("a", "b")
    tell(made, "a", added=[1, 2, 3, 4])
    tell(made, "b", added=[1])
    tell(made, "a", gone=[2, 3, 4, 1])
    assert made.rank(want(1, 2, 3, 4), now_s=0.0)[0].node == "b"


def test_a_node_that_left_is_not_chosen_and_its_seat_is_taken_clean() -> None:
    made = fleet("a", "b")
    tell(made, "a", added=[1, 2])
    made.leave("a")
    made.join("c", COSTS, now_s=0.0)
    ranked = made.rank(want(1, 2), now_s=0.0)
    assert {c.node for c in ranked} == {"b", "c"}
    assert all(c.way.reuse_tokens == 0 for c in ranked)
    assert made.known_prefixes == 0


def test_only_the_named_candidates_are_ranked() -> None:
    made = fleet("a", "b", "c")
    assert [c.node for c in made.rank(want(1), now_s=0.0, among={"b"})] == ["b"]
    assert made.rank(want(1), now_s=0.0, among=()) == []


def test_a_choice_for_a_node_that_has_left_meanwhile_is_ignored() -> None:
    made = fleet("a", "b")
    request = want(1)
    best = made.rank(request, now_s=0.0)[0]
    made.leave(best.node)
    made.give(request, best, now_s=0.0)
    assert best.node not in made.nodes


def test_what_is_known_of_a_holder_is_bounded_and_the_oldest_goes() -> None:
    warmth = Warmth(known_limit=3)
    holder = warmth.seat()
    warmth.add(holder, [1, 2, 3])
    warmth.add(holder, [1, 4])
    assert list(warmth.known(holder)) == [3, 1, 4]
    assert len(warmth) == 3


HOLDINGS = st.lists(
    st.tuples(
        st.sampled_from(["add", "drop", "replace"]), st.integers(0, 2), st.sets(st.integers(0, 9))
    ),
    max_size=30,
)


@given(steps=HOLDINGS, asked=st.lists(st.integers(0, 9), max_size=10, unique=True))
def test_the_longest_prefixes_are_those_of_plain_sets(
    steps: list[tuple[str, int, set[int]]], asked: list[int]
) -> None:
    warmth = Warmth()
    sets: list[set[int]] = [set(), set(), set()]
    assert [warmth.seat() for _ in sets] == [0, 1, 2]
    for verb, holder, prefixes in steps:
        getattr(warmth, verb)(holder, sorted(prefixes))
        sets[holder] = {
            "add": sets[holder] | prefixes,
            "drop": sets[holder] - prefixes,
            "replace": prefixes,
        }[verb]
    expected = {
        number: max(i for i, p in enumerate(asked) if p in have)
        for number, have in enumerate(sets)
        if have & set(asked)
    }
    assert warmth.longest(asked) == expected
    assert len(warmth) == len(set.union(*sets))


def test_a_node_that_is_asked_for_goes_first_unless_it_is_far_behind() -> None:
    made = fleet("a", "b", "c")
    tell(made, "a", held=[1])
    tell(made, "c", backlog_s=PATIENCE_S / 2)
    ranked = made.rank(want(1), now_s=0.0)
    assert ranked[0].node == "a"
    assert [c.node for c in preferring(ranked, "c")] == ["c", "a", "b"]
    tell(made, "c", backlog_s=2 * PATIENCE_S)
    ranked = made.rank(want(1), now_s=0.0)
    assert preferring(ranked, "c") == ranked
    assert preferring(ranked, "gone") == ranked
    assert preferring(ranked, None) == ranked
    assert preferring([], "a") == []
