"""The routing benchmark's answers: its rules, and what a run comes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.routing_answers import Answered, tables
from benchmarks.routing_report import WARM_FULL, WARM_ROUTED, WARM_STANDARD, RoutedRequest, whole_of
from benchmarks.routing_rules import RULES
from benchmarks.routing_tasks import TASKS
from keepwarm.tiers.files import load_tiers

ROOT = Path(__file__).resolve().parents[2]


def answered(
    arm: str, kind: str, text: str, *, task: int = 0, calls: tuple[str, ...] = ()
) -> Answered:
    return Answered(
        kind=kind,
        task=TASKS[kind][task],
        arm=arm,
        chosen=arm,
        used=arm,
        text=text,
        calls=calls,
        finish="tool_calls" if calls else "stop",
        decoded_tokens=10,
        decode_s=1.0,
    )


def test_each_task_has_a_rule_of_its_kind() -> None:
    assert len(RULES) == sum(len(texts) for texts in TASKS.values())
    tools = {
        tool["function"]["name"]
        for tier in load_tiers(ROOT / "configs" / "prompt-tiers", "Keeper")
        for tool in tier.tools
    }
    for kind, texts in TASKS.items():
        for text in texts:
            rule = RULES[text]
            assert bool(rule.says) == (kind == "minimal")
            assert set(rule.calls) <= tools
            assert bool(rule.calls) == (kind != "minimal")


@pytest.mark.parametrize(
    ("task", "text", "calls", "right"),
    [
        ("What is the capital of Mongolia?", "It is Ulaanbaatar.", (), True),
        ("What is the capital of Mongolia?", "I don't know.", (), False),
        ("What is the capital of Mongolia?", "NEED_MORE: tools", (), False),
        ("What is the capital of Mongolia?", "Ulaanbaatar", ("read_file",), False),
        (
            "What is the capital of Mongolia?",
            '{"name": "search", "arguments": {"q": "Ulaanbaatar"}}',
            (),
            False,
        ),
        ("How many minutes are there in a day and a half?", "2,160 minutes", (), True),
        ("How many minutes are there in a day and a half?", "1,440 minutes", (), False),
        ("Show the last 20 lines of server.log.", "", ("run_command",), True),
        ("Show the last 20 lines of server.log.", "", ("web_search", "run_command"), False),
        ("Show the last 20 lines of server.log.", "Here they are: ...", (), False),
        (
            "Show the last 20 lines of server.log.",
            '```json\n{\n "name": "read_file",\n "arguments": {}\n}\n```',
            (),
            True,
        ),
    ],
)
def test_an_answer_is_judged_by_what_it_holds_or_calls(
    task: str, text: str, calls: tuple[str, ...], right: bool
) -> None:
    assert RULES[task].is_met(text, calls) is right


def test_the_tables_count_right_answers_and_replies_that_ask_for_more() -> None:
    found = [
        answered("minimal", "minimal", "Ulaanbaatar"),
        answered("minimal", "standard", "NEED_MORE: tools"),
        answered("minimal", "standard", "I can't.", task=1),
        answered("full", "minimal", "Tashkent"),
        answered("full", "standard", "", calls=("read_file",)),
    ]
    told = "\n".join(tables(found))
    assert "| always minimal | 1 | 0 | 0 | 1 | 3 | 10 | 10.0 |" in told
    assert "| always full | 0 | 1 | 0 | 1 | 2 | 10 | 10.0 |" in told
    assert "| minimal | standard | 2 | 1 | 0 | 0 | 1 |" in told


def test_whole_replies_are_compared_over_the_tasks_that_all_arms_were_asked() -> None:
    def sample(arm: str, task: int, total_s: float) -> RoutedRequest:
        return RoutedRequest(
            arm=arm,
            kind="minimal",
            task=task,
            round=0,
            chosen="minimal",
            used="minimal",
            ttft_s=0.1,
            total_s=total_s,
            cached_tokens=241,
            prefilled_tokens=16,
            decoded_tokens=200,
            decode_s=total_s - 0.1,
        )

    samples = [
        *(sample(WARM_STANDARD.name, task, 6.0) for task in (0, 1)),
        *(sample(WARM_FULL.name, task, 9.0) for task in (0, 1)),
        sample(WARM_ROUTED.name, 0, 3.0),
    ]
    (minimal, every) = whole_of(samples)
    assert (minimal.n, minimal.standard_s, minimal.full_s, minimal.routed_s) == (1, 6.0, 9.0, 3.0)
    assert every.kind == "all"
