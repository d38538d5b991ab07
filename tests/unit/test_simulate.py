"""The simulator: what it reads, that it counts right, and that routing does what it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import fleettraces
from keepwarm.cli.main import app
from keepwarm.errors import ConfigError
from keepwarm.simulate import (
    POLICIES,
    Hardware,
    Outcome,
    Spread,
    Trace,
    oracle_hit_rate,
    read_trace,
    simulate,
)
from keepwarm.simulate.picture import picture
from keepwarm.simulate.stores import BlockStore

# Blocks of 512 tokens at 1 KB a token are 512 kB; prefill is slow beside everything else.
SMALL = Hardware(
    row_bytes=1000,
    prefill_tokens_per_s=2000,
    decode_tokens_per_s=50,
    slots=4,
    store_bytes=1e9,
    restore_bytes_per_s=1e9,
    fetch_bytes_per_s=100e6,
    upload_bytes_per_s=100e6,
    fetch_call_s=0.005,
    shared_bytes=10e9,
    shared_bytes_per_s=1e9,
)
SPLIT = 4
"""A seed with which the random policy sends two requests to two nodes."""
NO_SHARED = Hardware(
    row_bytes=1000, prefill_tokens_per_s=2000, slots=4, store_bytes=1e9, shared_bytes=0
)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(fleettraces.lines())


def line(at_ms: float, tokens: int, *ids: int) -> str:
    return json.dumps(
        {"timestamp": at_ms, "input_length": tokens, "output_length": 5, "hash_ids": ids}
    )


def test_a_trace_is_read_in_order_of_time_with_its_blocks_ends() -> None:
    trace = read_trace([line(500, 600, 8, 9), "", line(0, 1024, 8, 7)])
    first, second = trace.requests
    assert (first.at_s, second.at_s) == (0.0, 0.5)
    assert (first.ends_tokens, second.ends_tokens) == ((512, 1024), (512, 600))
    assert first.blocks[0] == second.blocks[0]
    assert first.blocks[1] != second.blocks[1]
    assert trace.duration_s == 0.5


def test_equal_numbers_behind_different_beginnings_are_different_prefixes() -> None:
    trace = read_trace([line(0, 1024, 1, 5), line(1, 1024, 2, 5)])
    first, second = trace.requests
    assert first.blocks[1] != second.blocks[1]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "line 2"),
        (line(0, 1024, 1), "not 1 blocks of 512"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1, "hash_ids": []}', "line 2"),
        ('{"timestamp": 1, "output_length": 1, "hash_ids": [1]}', "input_length"),
    ],
)
def test_a_line_that_is_not_as_the_format_says_is_named(bad: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_trace([line(0, 10, 1), bad])


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ConfigError, match="no requests"):
        read_trace([])


def test_the_oracle_reuses_all_that_was_ever_seen_but_one_token() -> None:
    trace = read_trace([line(0, 1024, 1, 2), line(1, 1024, 1, 2), line(2, 1000, 1, 3)])
    assert oracle_hit_rate(trace) == (1023 + 512) / 3048
    outcome = simulate(trace, nodes=3, policy="oracle", hardware=SMALL)
    assert outcome.hit_rate == oracle_hit_rate(trace)


def test_one_node_alone_is_priced_by_hand() -> None:
    trace = read_trace([line(0, 1024, 1, 2), line(60_000, 1536, 1, 2, 3)])
    outcome = simulate(trace, nodes=1, hardware=NO_SHARED)
    assert outcome.local_tokens == 1024
    assert outcome.moved_bytes == outcome.stored_bytes == 0
    costs = NO_SHARED.costs()
    warm = costs.restore_call_s + 1024 * costs.restore_s + 512 / 2000
    assert outcome.busy_s == pytest.approx((1024 / 2000 + warm,))
    assert outcome.ttft.mean_s == pytest.approx((1024 / 2000 + warm) / 2)
    assert outcome.wait.p99_s == 0.0


def test_a_request_waits_for_the_prompt_before_it() -> None:
    trace = read_trace([line(0, 1000, 1, 2), line(100, 1000, 3, 4)])
    outcome = simulate(trace, nodes=1, hardware=NO_SHARED)
    assert outcome.ttft.p99_s == pytest.approx(0.5 + 0.5 - 0.1)


def test_rows_reach_another_node_through_the_shared_store_once_they_are_written() -> None:
    hot = [line(0, 8192, *range(16)), line(60_000, 8192, *range(16))]
    later = simulate(read_trace(hot), nodes=2, policy="random", seed=SPLIT, hardware=SMALL)
    assert later.served == (1, 1)
    assert later.moved_tokens == 8191
    assert later.moved_bytes == 8191 * 1000
    assert later.stored_bytes == 8192 * 1000
    early = [hot[0], line(4_100, 8192, *range(16))]
    soon = simulate(read_trace(early), nodes=2, policy="random", seed=SPLIT, hardware=SMALL)
    assert soon.moved_tokens == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("nodes", [1, 5])
def test_every_request_is_served_and_no_policy_beats_the_oracle(
    trace: Trace, policy: Any, nodes: int
) -> None:
    outcome = simulate(trace, nodes=nodes, policy=policy, hardware=SMALL)
    assert sum(outcome.served) == outcome.requests == len(trace.requests)
    assert outcome.hit_rate <= oracle_hit_rate(trace) + 1e-12
    assert outcome.imbalance >= 1.0
    work = sum(outcome.busy_s)
    left = outcome.prompt_tokens * (1 - outcome.hit_rate)
    assert work >= left / SMALL.prefill_tokens_per_s - 1e-6


def test_the_same_arguments_give_the_same_outcome(trace: Trace) -> None:
    for policy in POLICIES:
        once = simulate(trace, nodes=4, policy=policy, hardware=SMALL, routers=2)
        assert simulate(trace, nodes=4, policy=policy, hardware=SMALL, routers=2) == once


def test_routing_by_warmth_keeps_rows_where_they_are(trace: Trace) -> None:
    ours = simulate(trace, nodes=8, hardware=SMALL)
    blind = simulate(trace, nodes=8, policy="least-loaded", hardware=SMALL)
    assert ours.hit_rate >= 0.95 * oracle_hit_rate(trace)
    assert ours.moved_bytes < blind.moved_bytes / 2
    assert ours.ttft.mean_s < blind.ttft.mean_s


def test_without_a_shared_store_routing_is_what_keeps_the_hits(trace: Trace) -> None:
    rates = {
        policy: simulate(trace, nodes=8, policy=policy, hardware=NO_SHARED).hit_rate
        for policy in ("keepwarm", "least-loaded", "random")
    }
    assert rates["keepwarm"] > 1.5 * max(rates["least-loaded"], rates["random"])


def test_routers_that_know_half_still_find_most_of_it(trace: Trace) -> None:
    one = simulate(trace, nodes=8, hardware=NO_SHARED)
    four = simulate(trace, nodes=8, hardware=NO_SHARED, routers=4)
    assert four.hit_rate > 0.9 * one.hit_rate


def test_a_smaller_store_keeps_less(trace: Trace) -> None:
    rates = [
        simulate(
            trace,
            nodes=2,
            hardware=Hardware(row_bytes=1000, store_bytes=size, shared_bytes=0),
        )
        for size in (3e6, 30e6, 1e9)
    ]
    assert rates[0].hit_rate < rates[1].hit_rate < rates[2].hit_rate
    assert rates[1].evicted_bytes > rates[2].evicted_bytes == 0


def store(quota_blocks: int) -> BlockStore:
    return BlockStore(quota_bytes=quota_blocks * 512, row_bytes=1, prefill_s_per_token=1e-3)


def test_a_store_evicts_the_end_of_what_was_used_least() -> None:
    kept = store(5)
    kept.add([0, 1, 2], tokens=[512] * 3, now_s=0.0)
    kept.add([0, 3], tokens=[512] * 2, now_s=10.0)
    kept.touch([0, 1, 2], now_s=20.0)
    kept.touch([0, 1, 2], now_s=21.0)
    added, gone = kept.add([0, 4, 5], tokens=[512] * 3, now_s=30.0)
    assert (added, gone) == ([4, 5], [3])
    assert kept.match([0, 1, 2]) == 3
    assert kept.used_bytes == 5 * 512


def test_a_prompt_that_does_not_fit_is_kept_as_far_as_it_does() -> None:
    kept = store(2)
    assert kept.add([0, 1, 2, 3], tokens=[512] * 4, now_s=0.0) == ([0, 1], [])
    assert kept.add([5, 6, 7], tokens=[512] * 3, now_s=1.0) == ([5, 6], [1, 0])


PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=40)


@settings(max_examples=60)
@given(paths=PATHS, quota=st.integers(1, 12))
def test_a_store_stays_a_tree_within_its_quota(paths: list[list[int]], quota: int) -> None:
    kept = store(quota)
    numbers: dict[tuple[int, ...], int] = {}
    have: set[int] = set()
    for at, path in enumerate(paths):
        blocks = [numbers.setdefault(tuple(path[: i + 1]), len(numbers)) for i in range(len(path))]
        added, gone = kept.add(blocks, tokens=[512] * len(blocks), now_s=float(at))
        have = (have | set(added)) - set(gone)
        assert not set(added) & set(gone)
        assert kept.used_bytes == 512 * len(have) == 512 * len(kept) <= 512 * quota
        for prefix, number in numbers.items():
            if number in have and len(prefix) > 1:
                assert numbers[prefix[:-1]] in have
        assert kept.match(blocks) == next(
            (i for i, b in enumerate(blocks) if b not in have), len(blocks)
        )


def test_quantiles_are_values_that_occurred() -> None:
    spread = Spread.of([3.0, 1.0, 2.0, 10.0])
    assert spread == (4.0, 3.0, 10.0, 10.0)
    with pytest.raises(ValueError, match="values"):
        Spread.of([])


def test_the_picture_is_sound_and_names_every_policy(trace: Trace) -> None:
    outcomes: list[Outcome] = [
        simulate(trace, nodes=n, policy=p, hardware=SMALL) for n in (1, 4) for p in POLICIES
    ]
    text = picture(outcomes, title="A <fleet>", subtitle="60 & more")
    root = ElementTree.fromstring(text)
    said = {e.text for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"A <fleet>", "60 & more", *POLICIES} <= said
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 4 * len(POLICIES)
    for drawn in lines:
        for x, y in (map(float, p.split(",")) for p in drawn.attrib["points"].split()):
            assert 0 <= x <= 960
            assert 0 <= y <= 660
    with pytest.raises(ValueError, match="nothing"):
        picture([], title="", subtitle="")


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["simulate", *args], env={"COLUMNS": "200"})


def test_the_command_prints_figures_and_writes_a_picture(tmp_path: Path) -> None:
    file, plot = tmp_path / "trace.jsonl", tmp_path / "out.svg"
    file.write_text("\n".join(fleettraces.lines()))
    done = run(str(file), "--nodes", "2,4", "--json", "--plot", str(plot), "--token-bytes", "1kB")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [(o["nodes"], o["policy"]) for o in told["outcomes"]] == [
        (n, p) for n in (2, 4) for p in POLICIES
    ]
    assert told["hardware"]["row_bytes"] == 1000
    assert plot.read_text().startswith("<svg")
    table = run(str(file), "--nodes", "2", "--policies", "keepwarm,oracle")
    assert table.exit_code == 0
    assert "least-loaded" not in table.stdout
    assert "keepwarm" in table.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--nodes", "0"], "not a list"),
        (["--policies", "best"], "no policy best"),
        (["--store", "lots"], "not a size"),
        (["--prefill-rate", "0"], "more than 0"),
        (["--fetch-bandwidth", "0"], "fetch_bytes_per_s"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    tmp_path: Path, args: list[str], said: str
) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(line(0, 100, 1))
    done = run(str(file), *args)
    assert done.exit_code != 0
    assert said in done.output + str(done.exception)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    done = run(str(tmp_path / "none.jsonl"))
    assert isinstance(done.exception, ConfigError)
