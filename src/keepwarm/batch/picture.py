"""A night as a picture: slots over time, coloured by where each prompt's beginning came from. Pure.

Plain SVG, without a library: one row a slot, one bar a task. Times when nothing ran (between two
runs of one night) are cut out and marked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

Row = Mapping[str, Any]

# Told apart by brightness too, for eyes and printers that don't see the colours.
COLOURS = {
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
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="15" fill="#222222">{escape(title)}</text>',
        *_legend({bar[3] for bar in bars}),
    ]
    for slot, index in rows.items():
        y = _TOP + _ROW * index
        out.append(f'<text x="8" y="{y + 17}" fill="#222222">slot {slot}</text>')
        out.append(
            f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT - 20}" height="{_ROW - 4}" '
            'fill="#f2f2f2"/>'
        )
    for slot, began_s, ended_s, kind, text in bars:
        x = _LEFT + squeeze(began_s) * scale
        width = max((squeeze(ended_s) - squeeze(began_s)) * scale, 0.75)
        y = _TOP + _ROW * rows[slot]
        out.append(
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_ROW - 4}" '
            f'fill="{COLOURS.get(kind, COLOURS["cold"])}" stroke="#ffffff" stroke-width="0.5">'
            f"<title>{escape(text)}</title></rect>"
        )
    out += _axis(length_s, scale, _TOP + _ROW * max(len(slots), 1))
    return "\n".join([*out, "</svg>"]) + "\n"


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
    out = []
    x = _LEFT
    for kind, colour in COLOURS.items():
        if kind in kinds:
            label = f"{kind}: {_MEANINGS[kind]}"
            out.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{colour}"/>')
            out.append(f'<text x="{x + 16}" y="44" fill="#444444">{label}</text>')
            x += 34 + 6 * len(label)
    return out


def _axis(length_s: float, scale: float, y: int) -> list[str]:
    step_s = next((s for s in (1, 5, 15, 30, 60, 300, 900, 1800) if length_s / s <= 12), 3600)
    out = []
    at_s = 0
    while at_s <= length_s:
        x = _LEFT + at_s * scale
        text = f"{at_s} s" if step_s < 60 else f"{at_s // 60} min"
        out.append(f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 5}" stroke="#888888"/>')
        out.append(
            f'<text x="{x:.1f}" y="{y + 20}" text-anchor="middle" fill="#444444">{text}</text>'
        )
        at_s += step_s
    return out
