"""Shapes of an SVG document as text, and the colours that all pictures share. Pure.

Written by hand, since lines, boxes and words need no plotting library.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
INK, SOFT, GRID = "#1f2430", "#667085", "#e4e7ec"


def document(parts: Sequence[str], *, width: int, height: int, title: str) -> str:
    """A whole document on a white ground; `title` is what a screen reader says of it."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="{escape(FONT)}" role="img">'
    )
    ground = f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *parts, "</svg>"]) + "\n"


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: float,
    color: str = INK,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    """Words whose baseline is at `y`."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{color}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    *,
    color: str,
    width: float = 1,
    dash: str = "",
    opacity: float = 1,
) -> str:
    """A straight line; `dash` is a pattern as SVG has it ("5 4")."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
        f'stroke-width="{width}" stroke-opacity="{opacity}"{_dashed(dash)}/>'
    )


def lines(points: Sequence[tuple[float, float]], *, color: str, width: float, dash: str) -> str:
    """One line through many points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"'
        f"{_dashed(dash)}/>"
    )


def box(
    x: float, y: float, width: float, height: float, *, color: str, corner: int = 0, note: str = ""
) -> str:
    """A filled rectangle; `note` is what is shown when the pointer is over it."""
    shape = (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
        f'rx="{corner}" fill="{color}"'
    )
    return f"{shape}><title>{escape(note)}</title></rect>" if note else f"{shape}/>"


def dot(x: float, y: float, *, radius: float, color: str) -> str:
    """A filled circle."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}"/>'


def _dashed(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""
