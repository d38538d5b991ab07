"""An editor's infills beside conversations, on one server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from served import Answer, Served

pytestmark = pytest.mark.live

SLOTS = 3
CODE = "".join(f"def disk_{n}(hour):\n    return hour + {n}\n\n\n" for n in range(12))


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, small_tiers: Path, quick_model: Path
) -> Iterator[Served]:
    served = Served(
        tmp_path_factory.mktemp("served"),
        engine={"model": str(quick_model), "slots": SLOTS, "context": 12288},
        tiers={"dir": str(small_tiers), "warm": ["minimal"]},
    ).wait_ready()
    yield served
    served.stop()


def typed(served: Served, typed: str) -> Answer:
    body: dict[str, Any] = {
        "input_extra": [{"filename": "disks.py", "text": "FULL = 7\n"}],
        "input_prefix": CODE + typed,
        "input_suffix": "\n\nprint(total)\n",
        "n_predict": 4,
    }
    answer = served.post("/infill", body)
    assert answer.status == 200
    served.settled()
    return answer


def test_infills_share_a_slot_and_cost_no_conversation_its_tokens(served: Served) -> None:
    rules = {"role": "system", "content": "Tell of the disks, one at a time. " * 30}
    talks = [[rules, {"role": "user", "content": f"Disk number {n}?"}] for n in range(SLOTS - 1)]
    held = []
    for talk in talks:
        answer = served.chat(*talk, max_tokens=4)
        held.append(answer.cached + int(answer.body["timings"]["prompt_n"]))
        served.settled()
    first = typed(served, "total = ")
    typing = [typed(served, "total = disk_1(2)"[:length]) for length in (10, 13, 17)]
    assert {answer.headers["x-keepwarm-slot"] for answer in typing} == {
        first.headers["x-keepwarm-slot"]
    }
    # What stands behind the gap is computed again each time.
    assert all(answer.prefilled < 40 < answer.cached for answer in typing)
    for talk, known in zip(talks, held, strict=True):
        again = served.chat(*talk, {"role": "user", "content": "And then?"}, max_tokens=4)
        # All but the reply's opening, behind which another message stands now.
        assert again.cached >= known - 12


def test_what_a_model_cant_do_costs_no_slot_its_content(served: Served) -> None:
    talk = [{"role": "user", "content": "Which disk is full, and since when? " * 8}]
    served.chat(*talk, max_tokens=4)
    served.settled()
    refused = served.post("/infill", {"input_prefix": 7, "input_suffix": "x"})
    assert refused.status in (400, 500, 501)
    served.settled()
    assert served.chat(*talk, max_tokens=4).prefilled <= 2
