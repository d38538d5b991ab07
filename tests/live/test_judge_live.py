"""The model as a third judge on the real engine: asked where scores doubt, from a warm question."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepwarm.tiers.files import packaged_configs
from served import Served
from tinymodels import small_model

pytestmark = pytest.mark.live

TEMPLATE = packaged_configs() / "chat-templates" / "chatml-tools.jinja"
# The scores can't tell whether this one wants the library or the words.
DOUBTFUL = "Convert 30 Celsius to Fahrenheit."
ENGINE = {"slots": 2, "context": 8192, "pool": "split", "chat_template": str(TEMPLATE)}
TIERS = {"warm": ["minimal", "standard"], "judge": True, "escalate": False}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(
        tmp_path_factory.mktemp("served"),
        engine={"model": str(small_model()), **ENGINE, "threads": os.cpu_count() or 2},
        tiers=TIERS,
    ).wait_ready()
    yield served
    served.stop()


def test_the_model_names_the_tier_where_scores_doubt(served: Served) -> None:
    scores = served.post("/keepwarm/route", {"messages": [{"role": "user", "content": DOUBTFUL}]})
    assert scores.body["doubt_s"] > 0
    answer = served.ask(DOUBTFUL, model="auto")
    tier, _, reason = answer.headers["x-keepwarm-tier"].partition("; ")
    assert reason == "judged"
    assert tier in ("minimal", "standard", "full")


def test_its_question_is_warm_from_the_start(served: Served) -> None:
    served.ask("Convert 31 Celsius to Fahrenheit.", model="auto")
    asked = [r for r in served.get("/keepwarm/requests")["requests"] if r["tier"] == "judge"]
    assert asked
    for request in asked:
        record = served.get(f"/keepwarm/requests/{request['id']}")
        assert record["tokens"]["decoded"] == 1
        assert record["tokens"]["cold"] < 60, "the task's own words, not the question before them"
        assert sum(record["tokens"].values()) > 200


def test_what_rules_decide_is_not_asked(served: Served) -> None:
    served.ask(DOUBTFUL, model="auto")

    def questions() -> int:
        return sum(r["tier"] == "judge" for r in served.get("/keepwarm/requests")["requests"])

    before = questions()
    assert before
    answer = served.ask("hello!", model="auto")
    assert answer.headers["x-keepwarm-tier"] == "minimal; small-talk"
    explicit = served.ask(DOUBTFUL, model="minimal")
    assert explicit.headers["x-keepwarm-tier"] == "minimal; explicit"
    assert questions() == before


def test_a_verdict_that_comes_too_late_leaves_the_choice_to_the_scores(tmp_path: Path) -> None:
    served = Served(
        tmp_path,
        engine={"model": str(small_model()), **ENGINE, "threads": 1},
        tiers={**TIERS, "warm": ["minimal"], "judge_timeout_s": 0.001},
    ).wait_ready()
    try:
        answer = served.ask(DOUBTFUL, model="auto")
        assert answer.status == 200
        assert "judged" not in answer.headers["x-keepwarm-tier"]
        assert "wasn't heard" in served.log.read_text()
    finally:
        served.stop()
