"""Batch lines: what can be used, what can't and why, what is written."""

from __future__ import annotations

import json
import time

import pytest

from batchsamples import line
from keepwarm.batch.hours import parse_hours
from keepwarm.batch.lines import error_line, result_line
from keepwarm.batch.tasks import parse_tasks
from keepwarm.errors import ConfigError


def codes(*lines: bytes, endpoint: str | None = None) -> dict[int, str]:
    return {e.line: e.code for e in parse_tasks(lines, endpoint=endpoint).errors}


def test_a_line_becomes_a_task_with_what_it_wishes() -> None:
    raw = line(
        "a",
        priority=-2,
        deadline="2026-01-31T06:30:00+01:00",
        depends_on=["b", "b"],
        conversation="c",
    )
    parsed = parse_tasks([raw, line("b")])
    assert not parsed.errors
    task = parsed.tasks[0]
    assert (task.line, task.custom_id, task.api, task.priority) == (1, "a", "chat", -2)
    assert task.depends_on == ("b",)
    assert task.deadline_s == 1769837400.0


def test_a_bad_line_is_told_by_its_number_and_the_others_are_kept() -> None:
    lines = [
        line("good"),
        b"\n",
        b"{not json}\n",
        b"[1]\n",
        line("good"),
        line("other").replace(b"/v1/chat/completions", b"/v1/images"),
        line("get").replace(b"POST", b"GET"),
        json.dumps({"custom_id": "x", "method": "POST", "url": "/v1/chat/completions"}).encode(),
        line("").replace(b'"custom_id": ""', b'"custom_id": 7'),
        line("empty", messages=[{"role": "user", "content": "x"}]).replace(
            b'"messages": [{"role": "user", "content": "x"}]', b'"messages": []'
        ),
        line("last"),
    ]
    assert codes(*lines) == {
        3: "invalid_json",
        4: "invalid_json",
        5: "duplicate_custom_id",
        6: "invalid_url",
        7: "invalid_method",
        8: "invalid_body",
        9: "missing_custom_id",
        10: "invalid_body",
    }
    assert [t.custom_id for t in parse_tasks(lines).tasks] == ["good", "last"]


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        ({"priority": "high"}, "invalid_priority"),
        ({"priority": True}, "invalid_priority"),
        ({"deadline": "tomorrow"}, "invalid_deadline"),
        ({"deadline": "2026-01-31T06:30:00"}, "invalid_deadline"),
        ({"deadline": 12}, "invalid_deadline"),
        ({"depends_on": "a"}, "invalid_depends_on"),
        ({"conversation": 3}, "invalid_conversation"),
        ({"colour": "red"}, "invalid_keepwarm"),
        ({"depends_on": ["nobody"]}, "unknown_dependency"),
    ],
)
def test_a_wish_that_cant_be_meant_is_an_error(wish: dict[str, object], code: str) -> None:
    assert codes(line("a", **wish)) == {1: code}


def test_a_batch_with_an_endpoint_refuses_other_urls() -> None:
    raw = line("a").replace(b"chat/completions", b"responses").replace(b"messages", b"input")
    assert codes(raw) == {}
    assert codes(raw, endpoint="/v1/chat/completions") == {1: "mismatched_url"}


def test_a_cycle_and_what_needs_it_are_left_out_but_nothing_else() -> None:
    lines = [
        line("a", depends_on=["c"]),
        line("b", depends_on=["a"]),
        line("c", depends_on=["b"]),
        line("waits", depends_on=["a"]),
        line("free"),
        line("itself", depends_on=["itself"]),
    ]
    found = codes(*lines)
    assert {n: c for n, c in found.items() if c == "dependency_cycle"} == {
        1: "dependency_cycle",
        2: "dependency_cycle",
        3: "dependency_cycle",
        6: "dependency_cycle",
    }
    assert found[4] == "unknown_dependency"
    assert [t.custom_id for t in parse_tasks(lines).tasks] == ["free"]


def test_turns_of_a_conversation_follow_one_another() -> None:
    lines = [line(f"t{i}", conversation="talk") for i in range(3)]
    assert [t.after for t in parse_tasks(lines).tasks] == [(), ("t0",), ("t1",)]


def test_a_line_over_the_gateways_bound_is_told_before_it_is_sent() -> None:
    parsed = parse_tasks([line("a", "x" * 5000), line("b")], max_body_bytes=2000)
    assert [e.code for e in parsed.errors] == ["line_too_long"]
    assert [t.custom_id for t in parsed.tasks] == ["b"]


def test_deeply_nested_json_is_a_bad_line_and_no_crash() -> None:
    assert codes(b"[" * 200_000 + b"\n", line("b")) == {1: "invalid_json"}


def test_nobody_streams_in_a_batch() -> None:
    raw = line("a").replace(b'"temperature"', b'"stream": true, "temperature"')
    assert "stream" not in parse_tasks([raw]).tasks[0].body


def test_results_and_errors_have_the_shape_of_the_batch_api() -> None:
    result = json.loads(result_line("a", status=200, request_id="r", body=b'{"id": 1}'))
    assert result["custom_id"] == "a"
    assert result["response"] == {"status_code": 200, "request_id": "r", "body": {"id": 1}}
    assert result["error"] is None
    error = json.loads(
        error_line("a", code="c", message="m", status=400, request_id="r", body=b"not json")
    )
    assert error["response"]["body"] == "not json"
    assert error["error"] == {"code": "c", "message": "m"}
    assert json.loads(error_line(None, code="c", message="m", line=3))["error"]["line"] == 3


def test_hours_may_run_over_midnight() -> None:
    hours = parse_hours("22:00-07:00, 12:30-13:15")
    minutes = [h * 60 + m for h, m in ((21, 59), (22, 0), (3, 0), (6, 59), (7, 0), (12, 30))]
    assert [hours.is_open(m) for m in minutes] == [False, True, True, True, False, True]
    assert hours.opens_in_min(21 * 60) == 60
    assert hours.opens_in_min(8 * 60) == 4.5 * 60
    assert parse_hours("").is_open(600)


@pytest.mark.parametrize(
    "text", ["22-7", "22:00", "22:00-22:00", "25:00-07:00", "22:60-23:00", ","]
)
def test_hours_that_arent_any_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_hours(text)


def test_long_chains_and_circles_of_dependencies_take_linear_time() -> None:
    count = 20_000
    chain = [line(f"t{i}", depends_on=[f"t{i + 1}"]) for i in range(count)]
    began_s = time.process_time()
    lost = parse_tasks(chain)  # the last one's need isn't there, and so nobody's is
    assert not lost.tasks
    assert len(lost.errors) == count
    kept = parse_tasks([*chain, line(f"t{count}")])
    assert len(kept.tasks) == count + 1
    circle = parse_tasks([*chain, line(f"t{count}", depends_on=["t0"]), line("free")])
    assert [task.custom_id for task in circle.tasks] == ["free"]
    # Each takes half a second on a slow machine; in quadratic time it was minutes.
    assert time.process_time() - began_s < 20


def test_a_turn_that_is_left_out_hands_its_place_on() -> None:
    lines = [
        line("a", conversation="c"),
        line("b", conversation="c", depends_on=["nobody"]),
        line("c", conversation="c"),
    ]
    assert [(t.custom_id, t.after) for t in parse_tasks(lines).tasks] == [("a", ()), ("c", ("a",))]


def test_an_answer_that_no_strict_encoder_takes_is_still_a_line() -> None:
    deep = b"[" * 100_000
    assert b"[[[" in result_line("a", status=200, request_id="r", body=deep)
    odd = result_line("a", status=200, request_id="r", body=b'{"text": "half: \\ud83d"}')
    assert json.loads(odd)["response"]["body"] == {"text": "half: \ud83d"}
