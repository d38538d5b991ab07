"""Pictures of a run as SVG.

Pure: values in, text out. A picture is panels below one another; a panel is rows of a label and one
or more marks. *Bars* begin at zero on a linear scale, so that lengths compare; *dots* lie on a
logarithmic one with a line from the least to the largest value, for what spans milliseconds to
minutes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from keepwarm.svg import GRID, INK, SOFT, box, document, dot, line, text

_WIDTH = 860
_MARGIN = 28
_LABELS = 236
# Room for a value behind the longest bar.
_VALUES = 132
_PLOT_X = _MARGIN + _LABELS
_PLOT_WIDTH = _WIDTH - _PLOT_X - _VALUES - _MARGIN
_ROW, _MARK = 20, 12
_GROUP_GAP = 10
# Distinct in lightness too, so that they differ when printed in grey.
GREY, ORANGE, TEAL, VIOLET = "#98a2b3", "#f0a35e", "#0f766e", "#7c3aed"


@dataclass(frozen=True, slots=True)
class Value:
    """One value, in seconds, of one series; `low` and `high` where it stands for several."""

    series: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Marks that belong together, below one another at one label."""

    label: str
    marks: Sequence[Value]


@dataclass(frozen=True, slots=True)
class Panel:
    """Rows on a scale of their own."""

    title: str
    rows: Sequence[Row]
    kind: Literal["bars", "dots"] = "bars"


def picture(
    title: str, subtitle: str, panels: Sequence[Panel], *, colors: Mapping[str, str]
) -> str:
    """A whole SVG document.

    Args:
        title: its headline.
        subtitle: what is drawn, in one line.
        panels: those without rows are left out.
        colors: of each series; one that isn't named is violet.

    Raises:
        ValueError: there is nothing to draw, or a value isn't a positive finite number.
    """
    shown = [panel for panel in panels if any(row.marks for row in panel.rows)]
    if not shown:
        raise ValueError("nothing was measured, so there is nothing to draw")
    parts: list[str] = [
        text(_MARGIN, 40, title, size=20, weight=600),
        text(_MARGIN, 62, subtitle, color=SOFT, size=12.5),
    ]
    y = 88.0
    for panel in shown:
        drawn, y = _panel(panel, colors, y)
        parts += drawn
    return document(parts, width=_WIDTH, height=math.ceil(y + 8), title=title)


def seconds_text(value_s: float) -> str:
    """A time for people: three figures, in milliseconds below a second."""
    if value_s >= 100:
        return f"{value_s:.0f} s"
    if value_s >= 10:
        return f"{value_s:.1f} s"
    if value_s >= 1:
        return f"{value_s:.2f} s"
    return f"{value_s * 1e3:.0f} ms" if value_s >= 0.01 else f"{value_s * 1e3:.1f} ms"


def _panel(panel: Panel, colors: Mapping[str, str], y: float) -> tuple[list[str], float]:
    values = [v for row in panel.rows for m in row.marks for v in _values(m)]
    if not all(math.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"{panel.title}: every value must be a positive number of seconds")
    scale = _Scale.of(values, panel.kind)
    parts = [text(_MARGIN, y + 14, panel.title, size=14, weight=600)]
    parts += _legend(panel, colors, y + 38)
    top = y + 58
    bottom = top + sum(_ROW * len(row.marks) + _GROUP_GAP for row in panel.rows)
    parts += _grid(scale, top - 4, bottom - 4)
    at = top
    for row in panel.rows:
        middle = at + _ROW * len(row.marks) / 2 + 4
        parts.append(text(_PLOT_X - 14, middle, row.label, size=12.5, anchor="end"))
        for mark in row.marks:
            color = colors.get(mark.series, VIOLET)
            parts += _mark(mark, color, scale, at + (_ROW - _MARK) / 2)
            at += _ROW
        at += _GROUP_GAP
    return parts, bottom + 36


def _values(mark: Value) -> list[float]:
    return [v for v in (mark.value, mark.low, mark.high) if v is not None]


def _legend(panel: Panel, colors: Mapping[str, str], y: float) -> list[str]:
    parts = []
    x = float(_PLOT_X)
    for name in dict.fromkeys(mark.series for row in panel.rows for mark in row.marks):
        parts.append(box(x, y - 10, 12, 12, color=colors.get(name, VIOLET), corner=3))
        parts.append(text(x + 18, y, name, size=12))
        x += 18 + 7 * len(name) + 22
    return parts


@dataclass(frozen=True, slots=True)
class _Scale:
    """Seconds to a place on the x axis."""

    kind: Literal["bars", "dots"]
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], kind: Literal["bars", "dots"]) -> _Scale:
        if kind == "bars":
            return cls(kind, 0.0, max(values))
        low = 10 ** math.floor(math.log10(min(values)))
        high = 10 ** math.ceil(math.log10(max(values)))
        return cls(kind, low, high if high > low else low * 10)

    def x(self, value: float) -> float:
        if self.kind == "bars":
            share = value / self.high
        else:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return _PLOT_X + share * _PLOT_WIDTH

    def ticks(self) -> list[float]:
        if self.kind == "dots":
            decades = round(math.log10(self.high / self.low))
            return [self.low * 10**i for i in range(decades + 1)]
        step = 10 ** math.floor(math.log10(self.high))
        for size in (step / 5, step / 2, step, 2 * step, 5 * step):
            if self.high / size <= 5:
                return [size * i for i in range(int(self.high / size) + 1)]
        return [0.0, self.high]


def _grid(scale: _Scale, top: float, bottom: float) -> list[str]:
    parts = []
    for tick in scale.ticks():
        x = scale.x(tick)
        parts.append(line(x, top, x, bottom, color=GRID))
        label = "0" if tick == 0 else _tick_text(tick)
        parts.append(text(x, bottom + 15, label, size=11, color=SOFT, anchor="middle"))
    return parts


def _tick_text(tick_s: float) -> str:
    return f"{tick_s:g} s" if tick_s >= 1 else f"{tick_s * 1e3:g} ms"


def _mark(mark: Value, color: str, scale: _Scale, y: float) -> list[str]:
    x = scale.x(mark.value)
    parts = []
    end = x
    middle = y + _MARK / 2
    if scale.kind == "bars":
        # A bar too short to see would look like nothing was measured.
        width = max(x - _PLOT_X, 1.5)
        parts.append(box(_PLOT_X, y, width, _MARK, color=color, corner=2))
        end = _PLOT_X + width
    if mark.low is not None and mark.high is not None:
        left, right = scale.x(mark.low), scale.x(mark.high)
        end = max(end, right)
        if scale.kind == "bars":
            parts.append(line(left, middle, right, middle, color=INK, opacity=0.6))
        else:
            parts.append(line(left, middle, right, middle, color=color, width=3, opacity=0.45))
    if scale.kind == "dots":
        parts.append(dot(x, middle, radius=5, color=color))
        end = max(end, x + 5)
    words = seconds_text(mark.value) + (f"  {mark.note}" if mark.note else "")
    parts.append(text(end + 8, middle + 4, words, size=12))
    return parts
