"""Charts within a page: well-formed, with the page's colours, every value at its axis position."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outstation.foundation.render.charts import (
    CurvePoint,
    ForestRow,
    ReliabilityPoint,
    render_curve,
    render_forest,
    render_heatmap,
    render_reliability,
)
from outstation.foundation.render.svg import text_width, truncate_text
from outstation.foundation.render.theme import DARK_THEME, LIGHT_THEME, css_variables

shares = st.floats(0, 1)
names = st.text(max_size=40)


def parsed(svg: str) -> ElementTree.Element:
    """Parse a chart and assert that its colours are the page's and its elements within the frame."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter():
        for key in ("fill", "stroke"):
            assert element.get(key, "none") == "none" or element.attrib[key].startswith("var(--")
        for key, limit in (("x", width), ("cx", width), ("x1", width), ("x2", width), ("y", height), ("cy", height)):
            assert -1 <= float(element.get(key, 0)) <= limit + 1
    return root


def of_kind(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if (element.get("class") or "").startswith(kind)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(names, shares, shares, shares), min_size=1, max_size=30))
def test_forest_values_are_ordered_along_the_axis(lines: list[tuple[str, float, float, float]]) -> None:
    root = parsed(
        render_forest("Any", [ForestRow(n, *sorted_three(a, b, c), f"{b}") for n, a, b, c in lines], reference=0.5)
    )
    positions = [float(circle.attrib["cx"]) for circle in of_kind(root, "figure")]
    values = [sorted([a, b, c])[1] for _, a, b, c in lines]
    assert len(positions) == len(of_kind(root, "interval")) == len(lines)
    ordered = sorted(range(len(lines)), key=lambda i: values[i])
    assert all(positions[i] <= positions[j] for i, j in pairwise(ordered))


def sorted_three(a: float, b: float, c: float) -> tuple[float, float, float]:
    """Return (value, low, high)."""
    low, value, high = sorted([a, b, c])
    return value, low, high


def test_charts_without_values_are_empty() -> None:
    assert of_kind(parsed(render_forest("None", [])), "figure") == []
    assert of_kind(parsed(render_reliability([])), "bin") == []


def test_calibrated_scores_lie_on_the_diagonal_and_too_low_ones_above() -> None:
    root = parsed(
        render_reliability(
            [
                ReliabilityPoint(0.6, 0.6, 0.5, 0.7),
                ReliabilityPoint(0.9, 0.9, None, None),
                ReliabilityPoint(0.8, 0.95, None, None),
            ]
        )
    )
    [diagonal] = of_kind(root, "diagonal")
    x1, y1, x2, y2 = (float(diagonal.attrib[key]) for key in ("x1", "y1", "x2", "y2"))
    points = of_kind(root, "bin")
    shares = [(float(point.attrib["cx"]) - x1) / (x2 - x1) for point in points]
    above = [y1 + share * (y2 - y1) - float(point.attrib["cy"]) for share, point in zip(shares, points, strict=True)]
    assert above[:2] == pytest.approx([0, 0], abs=0.2)
    assert above[2] > 50


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.data())
def test_a_heatmap_has_a_cell_for_every_count(n: int, data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.text(min_size=1, max_size=30), min_size=n, max_size=n))
    counts = data.draw(st.lists(st.lists(st.integers(0, 10**6), min_size=n, max_size=n), min_size=n, max_size=n))
    root = parsed(render_heatmap(labels, counts))
    assert len(of_kind(root, "cell")) == sum(count > 0 for row in counts for count in row)


def test_a_curve_falls_with_its_value() -> None:
    root = parsed(
        render_curve(
            "noise", [CurvePoint("none", 0.9, 0.8, 1.0), CurvePoint("1", 0.4, None, None)], 0, 1, reference=0.9
        )
    )
    [course] = of_kind(root, "course")
    (_, y1), (_, y2) = re.findall(r"([\d.]+) ([\d.]+)", course.attrib["d"])
    assert float(y1) < float(y2)


def test_light_and_dark_define_equal_variables() -> None:
    light, dark = (set(re.findall(r"--[\w-]+(?=:)", css_variables(theme))) for theme in (LIGHT_THEME, DARK_THEME))
    assert light == dark
    used = set(re.findall(r"var\((--[\w-]+)\)", render_forest("x", [ForestRow("a", 0.5, 0.4, 0.6, "", "drift")])))
    assert used <= light


def test_a_long_name_of_a_forest_plot_is_whole() -> None:
    name = "building = north wing, floor 4, machine"
    rows = [ForestRow(name, 0.5, 0.4, 0.6, "0.5 of 9"), ForestRow("short", 0.5, 0.4, 0.6, "0.5 of 9")]
    assert f">{name}</text>" in render_forest("Slices", rows)


@pytest.mark.parametrize("name", ["軸受の温度センサー" * 9, "펌프" * 40, "x" * 99])
def test_long_east_asian_names_end_within_the_chart(name: str) -> None:
    shown = truncate_text(name, 12.5, 360.0)
    assert shown.endswith("…")
    assert 350 < text_width(shown, 12.5) <= 360
    assert shown in render_forest("Slices", [ForestRow(name, 0.5, 0.4, 0.6, "0.5 of 9")])
