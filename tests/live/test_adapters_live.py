"""Requests that bring LoRA adapters of their own: their state isn't the model's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from served import Served

pytestmark = pytest.mark.live

SLOTS = 2
ADAPTED = {"max_tokens": 4, "lora": [{"id": 0, "scale": 0.5}]}
RULES = {"role": "system", "content": "Speak of valves, in order of their age. " * 30}


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, small_tiers: Path, quick_model: Path
) -> Iterator[Served]:
    served = Served(
        tmp_path_factory.mktemp("served"),
        engine={"model": str(quick_model), "slots": SLOTS, "context": 8192},
        tiers={"dir": str(small_tiers), "warm": ["minimal"]},
    ).wait_ready()
    yield served
    served.stop()


def stored_tokens(served: Served) -> int:
    return int(served.get("/keepwarm/status")["store"]["kept_tokens"])


def test_adapters_of_all_requests_cant_be_changed_under_what_is_kept(served: Served) -> None:
    refused = served.post("/lora-adapters", {})
    assert refused.status == 403
    assert "lora" in refused.body["error"]["message"]


def test_a_prompt_with_adapters_of_its_own_goes_on_in_its_slot_and_is_never_saved(
    served: Served,
) -> None:
    before = stored_tokens(served)
    talks: list[list[dict[str, Any]]] = [[RULES] for _ in range(SLOTS + 1)]
    for turn in ("Which one?", "And the next?"):
        for number, talk in enumerate(talks):
            talk.append({"role": "user", "content": f"{turn} Valve {number}."})
            answer = served.chat(*talk, **ADAPTED)
            assert answer.status == 200
            assert answer.headers["x-keepwarm-plan"] in ("slot", "cold")
            talk.append(answer.body["choices"][0]["message"])
            served.settled()
    assert served.chat(*talks[-1][:-1], **ADAPTED).prefilled == 1
    served.settled()
    assert stored_tokens(served) == before
