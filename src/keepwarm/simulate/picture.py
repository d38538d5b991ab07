"""A picture of simulated fleets as SVG: what each policy comes to, over the number of nodes.

Pure: outcomes in, text out. Small panels side by side, one quantity each, one line a policy; the
number of nodes is on a logarithmic axis, as are quantities that span decades.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keepwarm.simulate.report import Outcome
from keepwarm.svg import GRID, INK, SOFT, document, dot, line, lines, text

_WIDTH, _HEIGHT = 960, 660
_PANEL_WIDTH, _PANEL_HEIGHT = 392, 186
_LEFT, _TOP = 62, 134
_GAP_X, _GAP_Y = 84, 74
_STYLES = {
    "keepwarm": ("#0f766e", ""),
    "least-loaded": ("#f0a35e", ""),
    "random": ("#98a2b3", ""),
    "oracle": (INK, "5 4"),
}


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    value: Callable[[Outcome], float]
    tick: Callable[[float], str]
    is_log: bool = False
    low: float | None = None


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def _bytes(value: float) -> str:
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


_PANELS = (
    _Panel("Prompt tokens not prefilled", lambda o: o.hit_rate, lambda v: f"{v:.0%}", low=0.0),
    _Panel("Time to first token, 90th percentile", lambda o: o.ttft.p90_s, _seconds, is_log=True),
    _Panel("Load imbalance: busiest node over the mean", lambda o: o.imbalance, "{:g}".format),
    _Panel("Moved through the shared store", lambda o: o.moved_bytes, _bytes, low=0.0),
)


def picture(outcomes: Sequence[Outcome], *, title: str, subtitle: str) -> str:
    """A whole SVG document of four panels.

    Raises: ValueError if there is nothing to draw.
    """
    if not outcomes:
        raise ValueError("nothing was simulated, so there is nothing to draw")
    policies = list(dict.fromkeys(o.policy for o in outcomes))
    parts = [
        text(28, 38, title, size=20, weight=600),
        text(28, 60, subtitle, size=12.5, color=SOFT),
        *_legend(policies),
    ]
    for number, panel in enumerate(_PANELS):
        x = _LEFT + (number % 2) * (_PANEL_WIDTH + _GAP_X)
        y = _TOP + (number // 2) * (_PANEL_HEIGHT + _GAP_Y)
        parts += _panel(panel, outcomes, policies, x=x, y=y)
    return document(parts, width=_WIDTH, height=_HEIGHT, title=title)


def _legend(policies: Sequence[str]) -> list[str]:
    parts = []
    x = 28.0
    for policy in policies:
        color, dash = _STYLES[policy]
        parts.append(line(x, 82, x + 22, 82, color=color, width=2.5, dash=dash))
        parts.append(text(x + 28, 86, policy, size=12.5))
        x += 28 + 7.2 * len(policy) + 26
    return parts


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values to places between `begin` and `end`."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool

    def place(self, value: float) -> float:
        if self.is_log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(value)
        else:
            low, high = self.low, self.high
        return self.begin + (value - low) / ((high - low) or 1.0) * (self.end - self.begin)


def _panel(
    panel: _Panel, outcomes: Sequence[Outcome], policies: Sequence[str], *, x: float, y: float
) -> list[str]:
    bottom, right = y + _PANEL_HEIGHT, x + _PANEL_WIDTH
    counts = sorted({o.nodes for o in outcomes})
    across = _Scale(counts[0], counts[-1], x + 8, right - 8, True)
    ticks = _ticks([panel.value(o) for o in outcomes], panel)
    up = _Scale(ticks[0], ticks[-1], bottom, y, panel.is_log)
    parts = [text(x, y - 12, panel.title, size=14, weight=600)]
    for tick in ticks:
        place = up.place(tick)
        parts.append(line(x, place, right, place, color=GRID))
        words = panel.tick(tick)
        parts.append(text(x - 8, place + 4, words, size=11, color=SOFT, anchor="end"))
    parts += [
        text(across.place(n), bottom + 17, str(n), size=11, color=SOFT, anchor="middle")
        for n in counts
    ]
    parts.append(text(right, bottom + 34, "nodes", size=11, color=SOFT, anchor="end"))
    for policy in policies:
        color, dash = _STYLES[policy]
        points = [
            (across.place(o.nodes), up.place(max(panel.value(o), ticks[0])))
            for o in sorted(outcomes, key=lambda o: o.nodes)
            if o.policy == policy
        ]
        parts.append(lines(points, color=color, width=2.2, dash=dash))
        parts += [dot(px, py, radius=3.2, color=color) for px, py in points]
    return parts


def _ticks(values: Sequence[float], panel: _Panel) -> list[float]:
    """Round values from below the least to above the largest."""
    if panel.is_log:
        low = math.floor(math.log10(max(min(values), 1e-6)))
        high = math.ceil(math.log10(max(*values, 2e-6)))
        return [10.0**i for i in range(low, max(high, low + 1) + 1)]
    low_value = panel.low if panel.low is not None else math.floor(min(values))
    span = max(max(values) - low_value, 1e-9)
    step = 10 ** math.floor(math.log10(span))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if span / s <= 6)
    return [low_value + step * i for i in range(math.ceil(span / step - 1e-9) + 1)]
