"""Statistics of a run: pure functions of lists of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Summary:
    """What a list of measurements comes to, in their own unit."""

    n: int
    median: float
    p95: float
    minimum: float
    maximum: float


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of all lie, interpolated between neighbours.

    With few values a high percentile is close to the maximum; it never lies beyond it.

    Raises:
        ValueError: no values, or a share outside 0 to 1.
    """
    if not values:
        raise ValueError("no values to take a percentile of")
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share} is not between 0 and 1")
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    # Written so that equal neighbours give exactly their value.
    return low + (high - low) * (at - below)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle.

    Raises:
        ValueError: no values.
    """
    return percentile(values, 0.5)


def summarize(values: Sequence[float]) -> Summary:
    """Median, 95th percentile, minimum and maximum.

    Raises:
        ValueError: no values.
    """
    return Summary(
        n=len(values),
        median=median(values),
        p95=percentile(values, 0.95),
        minimum=min(values),
        maximum=max(values),
    )


def times_faster(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster the median of `fast` is.

    Raises:
        ValueError: one is empty, or the fast median isn't positive.
    """
    divisor = median(fast)
    if divisor <= 0:
        raise ValueError("a measured time must be positive")
    return median(slow) / divisor


def paired_difference(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """`second` minus `first`, pair by pair: what a slow moment of the machine adds to both goes.

    Raises:
        ValueError: the lists differ in length.
    """
    return [b - a for a, b in zip(first, second, strict=True)]


def standard_error(values: Sequence[float]) -> float:
    """How far the median of so many values may be off by chance alone, one standard deviation.

    From the middle half, so that a few outliers don't count; for values that are about normal.
    With fewer than four it is told as infinite.
    """
    if len(values) < 4:
        return math.inf
    spread = (percentile(values, 0.75) - percentile(values, 0.25)) / 1.349
    return 1.2533 * spread / math.sqrt(len(values))


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """The items beginning with another one each turn, so that none is always first."""
    if not items:
        return []
    at = turn % len(items)
    return [*items[at:], *items[:at]]
