"""One pool of context for all slots: nobody's reply overflows it for the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from served import Serve, Served

pytestmark = pytest.mark.live

POOL = 4096


@pytest.fixture
def served(serve: Serve, quick_model: Any) -> Served:
    return serve(model=str(quick_model), slots=4, context=POOL, pool="shared")


def chat(number: int, words: int, **more: Any) -> dict[str, Any]:
    text = " ".join(f"disk {number} hour {word}" for word in range(words))
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def together(served: Served, bodies: list[dict[str, Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: served.post("/v1/chat/completions", body), bodies))


@pytest.mark.parametrize("limit", [{"max_tokens": 1500}, {}], ids=["limit", "no_limit"])
def test_four_at_once_that_dont_fit_together_are_all_answered(
    served: Served, limit: dict[str, int]
) -> None:
    answers = together(served, [chat(n, 120, **limit) for n in range(4)])
    assert [answer.status for answer in answers] == [200] * 4, [a.body for a in answers]
    for answer in answers:
        usage = answer.body["usage"]
        assert usage["prompt_tokens"] >= 600
        if limit and answer.body["choices"][0]["finish_reason"] == "length":
            assert usage["completion_tokens"] == 1500
        assert usage["total_tokens"] <= POOL
    served.stop()


def test_a_prompt_longer_than_the_pool_is_refused_and_costs_nobody_anything(
    served: Served,
) -> None:
    warm = chat(1, 100, max_tokens=4)
    assert served.post("/v1/chat/completions", warm).status == 200
    answer = served.post("/v1/chat/completions", chat(2, 1500, max_tokens=4))
    assert answer.status == 400
    assert answer.body["error"]["type"] == "exceed_context_size_error"
    again = served.post("/v1/chat/completions", warm)
    assert again.plan == "slot"
    assert again.prefilled < 10
    served.stop()


def test_several_replies_at_once_fit_together(served: Served) -> None:
    bodies = [chat(1, 120, n=3), chat(2, 120), chat(3, 120, n=2, max_tokens=1500)]
    answers = together(served, bodies)
    assert [answer.status for answer in answers] == [200] * 3, [a.body for a in answers]
    assert [len(answer.body["choices"]) for answer in answers] == [3, 1, 2]
    served.stop()
