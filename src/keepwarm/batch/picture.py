"""A night as a picture: slots over time, coloured by where each prompt's beginning came from. Pure.

One row a slot, one bar a task. Times when nothing ran (between two runs of one night) are cut out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keepwarm.svg import GRID, INK, SOFT, box, document, line, text

Row = Mapping[str, Any]

# Told apart by brightness too, for eyes and printers that don't see the colours.
COLORS = {
    "slot": "#2a9d5c",
    "snapshot": "#3b7dd8",
    "shared": "#7fb3f0",
    "cold": "#d9663a",
    "fill": "#e9b44c",
    "failed": "#8a8a8a",
}
_MEANINGS = {
    "slot": "went on in its slot",
    "snapshot": "restored",
    "shared": "waited for another's fill",
    "cold": "prefilled",
    "fill": "common part filled and saved",
    "failed": "failed",
}
_WIDTH, _LEFT, _ROW, _TOP = 1000, 60, 26, 58
_SIZE = 12
# A pause longer than this isn't drawn to scale.
_GAP_S = 60.0
_GAP_WIDTH_S = 5.0


def night_svg(tasks: Sequence[Row], fills: Sequence[Row], *, title: str) -> str:
    """The picture of a night; an empty frame if nothing ran.

    Args:
        tasks: rows with `slot`, `began_s` (or `sent_s`), `ended_s`, `plan`, `ok`, and counts.
        fills: rows of filled branches.
        title: written above.
    """
    bars = [_bar(row, str(row.get("plan") or "cold")) for row in tasks if "slot" in row]
    bars += [_bar(row, "fill") for row in fills]
    bars.sort(key=lambda bar: bar[1])
    squeeze = _squeezed([(began, ended) for _, began, ended, _, _ in bars])
    length_s = max((squeeze(bar[2]) for bar in bars), default=1.0)
    scale = (_WIDTH - _LEFT - 20) / max(length_s, 1e-6)
    slots = sorted({bar[0] for bar in bars})
    rows = {slot: index for index, slot in enumerate(slots)}
    height = _TOP + _ROW * max(len(slots), 1) + 40
    parts = [text(_LEFT, 22, title, size=15), *_legend({bar[3] for bar in bars})]
    for slot, index in rows.items():
        y = _TOP + _ROW * index
        parts.append(text(8, y + 17, f"slot {slot}", size=_SIZE))
        parts.append(box(_LEFT, y, _WIDTH - _LEFT - 20, _ROW - 4, color=GRID))
    for slot, began_s, ended_s, kind, note in bars:
        x = _LEFT + squeeze(began_s) * scale
        # Half a unit less: tasks behind one another stay told apart.
        width = max((squeeze(ended_s) - squeeze(began_s)) * scale - 0.5, 0.75)
        y = _TOP + _ROW * rows[slot]
        color = COLORS.get(kind, COLORS["cold"])
        parts.append(box(x, y, width, _ROW - 4, color=color, note=note))
    parts += _axis(length_s, scale, _TOP + _ROW * max(len(slots), 1))
    return document(parts, width=_WIDTH, height=height, title=title)


def _bar(row: Row, kind: str) -> tuple[int, float, float, str, str]:
    began_s = float(row.get("sent_s", row["began_s"]))
    ended_s = float(row["ended_s"])
    if kind != "fill" and not row["ok"]:
        kind = "failed"
    name = str(row.get("custom_id", "common part"))
    text = f"{name}: {ended_s - began_s:.1f} s, {kind}"
    if "prefilled" in row:
        text += f", {row['prefilled']:,} prefilled"
    if "cached" in row:
        text += f", {row['cached']:,} reused"
    return int(row["slot"]), began_s, ended_s, kind, text


def _squeezed(spans: Sequence[tuple[float, float]]) -> Any:
    """A function from the clock's time to seconds on the axis, long pauses cut short."""
    cuts: list[tuple[float, float]] = []  # from this time on, so much less
    until: float | None = None
    cut_s = 0.0
    first = spans[0][0] if spans else 0.0
    for began_s, ended_s in spans:
        if until is not None and began_s - until > _GAP_S:
            cut_s += began_s - until - _GAP_WIDTH_S
            cuts.append((began_s, cut_s))
        until = ended_s if until is None else max(until, ended_s)

    def squeeze(at_s: float) -> float:
        gone = max((cut for since, cut in cuts if at_s >= since), default=0.0)
        return at_s - first - gone

    return squeeze


def _legend(kinds: set[str]) -> list[str]:
    parts = []
    x = _LEFT
    for kind, color in COLORS.items():
        if kind in kinds:
            label = f"{kind}: {_MEANINGS[kind]}"
            parts.append(box(x, 34, 12, 12, color=color))
            parts.append(text(x + 16, 44, label, size=_SIZE, color=SOFT))
            x += 34 + 6 * len(label)
    return parts


def _axis(length_s: float, scale: float, y: int) -> list[str]:
    step_s = next((s for s in (1, 5, 15, 30, 60, 300, 900, 1800) if length_s / s <= 12), 3600)
    parts = []
    at_s = 0
    while at_s <= length_s:
        x = _LEFT + at_s * scale
        label = f"{at_s} s" if step_s < 60 else f"{at_s // 60} min"
        parts.append(line(x, y, x, y + 5, color=INK))
        parts.append(text(x, y + 20, label, size=_SIZE, color=SOFT, anchor="middle"))
        at_s += step_s
    return parts
