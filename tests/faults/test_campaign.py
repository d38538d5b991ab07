"""The campaign of `make faults`, shortened: every kind of fault once, and its own judgement."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign import Campaign, chosen
from campaign_faults import FAULTS
from campaign_load import Question, Token

from tinymodels import small_model, write_tiny_qwen3


@pytest.mark.live
def test_every_kind_of_fault_leaves_answers_requests_and_foreign_files_as_they_were(
    tmp_path: Path,
) -> None:
    model = tmp_path / "tiny.gguf"
    write_tiny_qwen3(model, small_model())
    campaign = Campaign(tmp_path, model, seed=1)
    try:
        faults, _ = chosen(len(FAULTS), seed=1, has_disk=campaign.place.disk.is_real)
        campaign.run(faults)
    finally:
        campaign.place.close()
    assert not campaign.troubles, campaign.table() + "\n\n".join(campaign.troubles)


def test_an_answer_is_wrong_unless_the_undisturbed_run_was_undecided() -> None:
    known = Question({}, (Token("a", 3.0), Token("b", 0.01), Token("c", 2.0)))
    assert known.verdict(["a", "b", "c"]) == "right"
    assert known.verdict(["a", "x", "y"]) == "tie"
    assert known.verdict(["x", "b", "c"]) == "wrong"
    assert known.verdict(["a", "b"]) == "wrong"


def test_a_seed_chooses_the_same_faults_again_and_every_kind_equally_often() -> None:
    one, _ = chosen(2 * len(FAULTS), seed=5, has_disk=True)
    again, _ = chosen(2 * len(FAULTS), seed=5, has_disk=True)
    assert one == again
    assert {one.count(fault) for fault in FAULTS.values()} == {2}
    able, skipped = chosen(len(FAULTS), seed=5, has_disk=False)
    assert not any(fault.needs_disk for fault in able)
    assert set(skipped) == {kind for kind, fault in FAULTS.items() if fault.needs_disk}
