"""The router with the real engine: simple tasks on the packaged tiers, with everything warm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from keepwarm.tiers.files import packaged_configs
from served import Served
from tinymodels import small_model

pytestmark = pytest.mark.live

CONFIGS = packaged_configs()
QUESTION = "What is 12 times 12?"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One Keepwarm with the packaged tiers, all of them warm."""
    served = Served(
        tmp_path_factory.mktemp("served"),
        engine={
            "model": str(small_model()),
            "chat_template": str(CONFIGS / "chat-templates" / "chatml-tools.jinja"),
            "slots": 3,
            "context": 16384,
        },
        tiers={"dir": str(CONFIGS / "prompt-tiers")},
    ).wait_ready()
    yield served
    served.stop()


def test_the_readmes_question_goes_to_minimal_with_everything_warm(served: Served) -> None:
    answer = served.ask(QUESTION, model="auto")
    assert answer.headers["x-keepwarm-tier"] == "minimal; simple"
    assert answer.prefilled < 30


def test_a_route_is_told_in_the_costs_that_were_measured(served: Served) -> None:
    for tier in ("minimal", "full"):
        body = {
            "model": tier,
            "messages": [{"role": "user", "content": "Count to thirty."}],
            "max_tokens": 40,
            "ignore_eos": True,
        }
        assert served.post("/v1/chat/completions", body).status == 200
    served.settled()
    told = served.post("/keepwarm/route", {"text": QUESTION}).body
    costs = told["costs"]
    assert (told["tier"], told["kind"]) == ("minimal", "question")
    # Each token of the reply looks back at the whole prompt, and that was measured just now.
    assert costs["minimal"]["reply_s"] < costs["full"]["reply_s"]
    for cost in costs.values():
        parts = cost["first_s"] + cost["reply_s"] + cost["displaced_s"] + cost["risk_s"]
        assert parts == pytest.approx(cost["expected_s"], abs=0.01)


def test_the_length_of_routed_replies_is_learned(served: Served) -> None:
    before = served.post("/keepwarm/route", {"text": QUESTION}).body["reply_tokens"]
    body = {"model": "auto", "messages": [{"role": "user", "content": "Who was Ovid?"}]}
    reply = served.post("/v1/chat/completions", {**body, "temperature": 0, "max_tokens": 300})
    served.settled()
    after = served.post("/keepwarm/route", {"text": QUESTION}).body["reply_tokens"]
    if reply.body["choices"][0]["finish_reason"] == "stop":
        assert after != before
    else:
        assert after == before
