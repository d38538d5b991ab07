"""Refitting the scores to a deployment's outcomes, and keeping those outcomes privately."""

from __future__ import annotations

import random
import stat
from pathlib import Path

import pytest

from keepwarm.errors import ConfigError
from keepwarm.router import Cause
from keepwarm.router.calibrate import LEAST_OUTCOMES, Labelled, Outcome, evidence, fit_platt, refit
from keepwarm.router.model import Platt, sigmoid
from keepwarm.tiers.router_files import read_refits, write_refits
from keepwarm.tiers.router_outcomes import OutcomeLog

THRESHOLDS = {"tools": 0.06, "context": 0.27, "depth": 0.54}


def outcome(logit: float, *, used: bool, tier: str = "standard", **more: object) -> Outcome:
    logits = {"tools": logit, "context": -3.0, "depth": -3.0}
    return Outcome(at_s=1.0, tier=tier, reason="x", logits=logits, tools_used=used, **more)  # type: ignore[arg-type]


def drawn(*, slope: float, offset: float, count: int) -> list[Outcome]:
    dice = random.Random(7)
    found = []
    for _ in range(count):
        logit = dice.gauss(0.0, 2.0)
        found.append(outcome(logit, used=dice.random() < sigmoid(slope * logit + offset)))
    return found


def test_many_outcomes_recover_the_slope_and_offset_they_were_drawn_with() -> None:
    said = evidence("tools", drawn(slope=0.6, offset=-1.5, count=4000))
    platt = fit_platt(said)
    assert platt.slope == pytest.approx(0.6, abs=0.08)
    assert platt.offset == pytest.approx(-1.5, abs=0.15)


def test_few_outcomes_change_little() -> None:
    surprise = Labelled(2.0, needed=False, weight=1.0)
    few, many = fit_platt([surprise] * 2), fit_platt([surprise] * 200)
    assert sigmoid(few.apply(2.0)) > 0.5
    assert sigmoid(many.apply(2.0)) < 0.05


def test_a_refit_describes_the_outcomes_better_and_moves_the_threshold() -> None:
    found = refit(drawn(slope=1.0, offset=-2.0, count=600), current={}, thresholds=THRESHOLDS)[
        "tools"
    ]
    assert found.before is not None
    assert found.after is not None
    assert found.after.log_loss < found.before.log_loss
    assert found.after.ece < found.before.ece
    assert found.before.threshold == pytest.approx(0.06)
    # Tools are needed less often here than shipped, so it takes more to reach the threshold.
    assert found.after.threshold > 0.2


def test_nothing_is_refitted_from_too_few_outcomes_or_from_one_kind_only() -> None:
    few = drawn(slope=1.0, offset=0.0, count=LEAST_OUTCOMES - 1)
    one_kind = [outcome(0.0, used=False)] * 200
    for outcomes in ([], few, one_kind):
        found = refit(outcomes, current={}, thresholds=THRESHOLDS)["tools"]
        assert found.after is None
        assert found.why


def test_refitting_again_from_the_same_outcomes_gives_the_same() -> None:
    outcomes = drawn(slope=0.8, offset=-1.0, count=300)
    once = refit(outcomes, current={}, thresholds=THRESHOLDS)["tools"].after
    assert once is not None
    again = refit(outcomes, current={"tools": once.platt}, thresholds=THRESHOLDS)["tools"]
    assert again.after == once
    assert again.before == once


def test_what_an_outcome_tells() -> None:
    used = outcome(0.0, used=True)
    unused = outcome(0.0, used=False)
    asked = outcome(0.0, used=False, tier="minimal", escalated=Cause.ASKED_TOOLS)
    context = outcome(0.0, used=False, tier="minimal", escalated=Cause.ASKED_CONTEXT)
    stood = outcome(0.0, used=False, tier="minimal")
    needed = [
        [each.needed for each in evidence("tools", [o])] for o in (used, unused, asked, stood)
    ]
    assert needed == [[True], [False], [True], [False]]
    assert evidence("tools", [context]) == []
    assert [each.needed for each in evidence("context", [context])] == [True]
    nothing_on_offer = Outcome(1.0, "minimal", "x", {"context": 0.0})
    assert evidence("tools", [nothing_on_offer]) == []


def test_outcomes_come_back_as_they_were_recorded(tmp_path: Path) -> None:
    log = OutcomeLog(tmp_path / "state")
    kept = [
        Outcome(10.0, "minimal", "simple", {"tools": -2.5}, escalated=Cause.EMPTY),
        Outcome(
            20.0, "full", "explicit-tier", {"context": 0.25}, is_explicit=True, tools_used=True
        ),
    ]
    for each in kept:
        log.record(each)
    assert log.read() == []
    log.flush()
    assert log.waiting == 0
    assert OutcomeLog(tmp_path / "state").read() == kept
    assert log.read(since_s=15.0) == kept[1:]


def test_outcomes_are_private_to_the_user(tmp_path: Path) -> None:
    log = OutcomeLog(tmp_path / "state")
    log.record(outcome(0.0, used=True))
    log.flush()
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700


def test_only_the_newest_outcomes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepwarm.tiers.router_outcomes.KEPT", 5)
    log = OutcomeLog(tmp_path)
    for at in range(12):
        log.record(Outcome(float(at), "minimal", "simple", {}))
        log.flush()
    assert [each.at_s for each in log.read()] == [7.0, 8.0, 9.0, 10.0, 11.0]


def test_a_damaged_log_is_told_and_keeps_what_is_waiting(tmp_path: Path) -> None:
    log = OutcomeLog(tmp_path)
    log.path.write_bytes(b"not a database, but long enough to be looked at" * 10)
    log.record(outcome(0.0, used=True))
    with pytest.raises(ConfigError, match="Remove it"):
        log.flush()
    assert log.waiting == 1


def test_recalibrations_come_back_and_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    assert read_refits(tmp_path) == {}
    path = write_refits(tmp_path, {"tools": Platt(0.5, -1.0)})
    assert read_refits(tmp_path) == {"tools": Platt(0.5, -1.0)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text('{"tools": "x"}')
    with pytest.raises(ConfigError, match="Remove it"):
        read_refits(tmp_path)
