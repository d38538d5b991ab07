"""What a soak calls growth."""

from __future__ import annotations

from benchmarks.soak import Samples, grown


def test_what_stays_within_its_bounds_has_not_grown() -> None:
    assert grown(Samples([100, 130, 101, 104], [20, 24, 21, 22])) == []


def test_memory_and_descriptors_that_grow_are_told() -> None:
    told = grown(Samples([100_000_000, 105_000_000, 110_000_000, 120_000_000], [20, 25, 30, 40]))
    assert told == [
        "memory grew from 100 to 120 MB",
        "open descriptors grew from 20 to 40",
    ]
