"""The benchmark's pictures."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.bench.picture import GREY, TEAL, VIOLET, Panel, Row, Value, picture, seconds_text

SVG = "{http://www.w3.org/2000/svg}"
COLORS = {"before": GREY, "after": TEAL}


def drawn(panels: list[Panel], title: str = "A title") -> ET.Element:
    return ET.fromstring(picture(title, "what is drawn", panels, colors=COLORS))


def bars(root: ET.Element, color: str) -> list[float]:
    """Widths of the bars of one color; legends have rounder corners."""
    return [
        float(r.get("width", "0"))
        for r in root.iter(SVG + "rect")
        if r.get("fill") == color and r.get("rx") == "2"
    ]


def texts(root: ET.Element) -> list[str]:
    return [t.text or "" for t in root.iter(SVG + "text")]


ROWS = [Row("first", [Value("before", 8.0), Value("after", 0.5)])]


def test_lengths_of_bars_are_as_their_values() -> None:
    root = drawn([Panel("Bars", ROWS)])
    (before,), (after,) = bars(root, GREY), bars(root, TEAL)
    assert after / before == pytest.approx(0.5 / 8.0, abs=0.001)


def test_every_value_and_label_can_be_read() -> None:
    said = texts(drawn([Panel("Bars", ROWS)]))
    assert {"A title", "Bars", "first", "before", "after", "8.00 s", "500 ms"} <= set(said)


def test_markup_in_names_is_text() -> None:
    root = drawn([Panel("<b>&", [Row('"x" < y', [Value("before", 1.0)])])], title="<svg>")
    assert {"<svg>", "<b>&", '"x" < y'} <= set(texts(root))


def test_dots_lie_a_decade_apart_for_ten_times_the_value() -> None:
    rows = [Row("x", [Value("before", v)]) for v in (0.01, 0.1, 1.0, 10.0)]
    root = drawn([Panel("Dots", rows, kind="dots")])
    at = [float(c.get("cx", "0")) for c in root.iter(SVG + "circle")]
    steps = [b - a for a, b in pairwise(at)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
    assert steps[0] > 0


def test_a_range_reaches_from_the_least_to_the_largest_value() -> None:
    root = drawn([Panel("Dots", [Row("x", [Value("after", 1.0, 0.1, 10.0)])], kind="dots")])
    (line,) = [e for e in root.iter(SVG + "line") if e.get("stroke") == TEAL]
    (dot,) = root.iter(SVG + "circle")
    left, middle, right = (float(v or 0) for v in (line.get("x1"), dot.get("cx"), line.get("x2")))
    assert middle - left == pytest.approx(right - middle, abs=0.2)


def test_a_series_without_a_color_is_drawn_too() -> None:
    root = drawn([Panel("Bars", [Row("x", [Value("other", 1.0)])])])
    assert len(bars(root, VIOLET)) == 1


def test_panels_without_marks_are_left_out() -> None:
    root = drawn([Panel("Nothing here", [Row("x", [])]), Panel("Bars", ROWS)])
    assert "Nothing here" not in texts(root)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_value_that_is_no_time_is_refused(value: float) -> None:
    with pytest.raises(ValueError):
        drawn([Panel("Bars", [Row("x", [Value("before", value)])])])


def test_an_empty_picture_is_refused() -> None:
    with pytest.raises(ValueError):
        drawn([])


times = st.floats(min_value=1e-4, max_value=5e3)


@given(st.lists(st.tuples(times, times, times), min_size=1, max_size=12), st.booleans())
def test_everything_lies_within_the_picture(
    values: list[tuple[float, float, float]], as_bars: bool
) -> None:
    marks = [Value("before", sorted(v)[1], min(v), max(v)) for v in values]
    root = drawn([Panel("x", [Row("r", [m]) for m in marks], kind="bars" if as_bars else "dots")])
    width, height = float(root.get("width", "0")), float(root.get("height", "0"))
    for element in root.iter():
        for name, limit in (("x", width), ("x2", width), ("cx", width), ("y", height)):
            assert 0 <= float(element.get(name) or 0) <= limit
    for text in root.iter(SVG + "text"):
        if text.get("text-anchor") == "start":
            # About the width of a digit in most fonts.
            size = float(text.get("font-size", "0"))
            assert float(text.get("x", "0")) + 0.6 * size * len(text.text or "") <= width


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(123.4, "123 s"), (12.34, "12.3 s"), (1.234, "1.23 s"), (0.0234, "23 ms"), (0.0021, "2.1 ms")],
)
def test_times_are_told_in_three_figures(seconds: float, said: str) -> None:
    assert seconds_text(seconds) == said
