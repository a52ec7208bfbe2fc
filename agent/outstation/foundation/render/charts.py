"""Charts of metrics as inline SVG for a page: forest plot, curve with band, confusion heatmap, reliability, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from outstation.foundation.costs.estimate import Comparison
from outstation.foundation.render import axes
from outstation.foundation.render.svg import Drawing, text_width, truncate_text
from outstation.foundation.render.theme import PAGE_THEME as _THEME
from outstation.foundation.render.theme import Theme

_FOREST_WIDTH, _FOREST_NAME_WIDTH, _FOREST_TEXT_WIDTH = 360.0, 106.0, 96.0
_FOREST_ROW_HEIGHT, _FOREST_TOP, _FOREST_PAD = 24.0, 8.0, 8.0
_CURVE_WIDTH, _CURVE_LEFT, _CURVE_RIGHT, _CURVE_TOP, _CURVE_HEIGHT, _CURVE_INSET = 300.0, 42.0, 292.0, 10.0, 120.0, 14.0
_HEATMAP_WIDTH, _HEATMAP_MAX_LABEL_WIDTH = 380.0, 96.0
_RELIABILITY_WIDTH, _RELIABILITY_LEFT, _RELIABILITY_RIGHT = 360.0, 44.0, 340.0
_RELIABILITY_TOP, _RELIABILITY_SIZE = 10.0, 296.0


class ForestRow(msgspec.Struct, frozen=True):
    """Row of a forest plot. `state` (ok, drift, unknown) gives the colour; `text` stands at the right."""

    name: str
    value: float
    low: float | None
    high: float | None
    text: str
    state: str = "ok"


def render_forest(title: str, rows: Sequence[ForestRow], *, reference: float | None = None) -> str:
    """Return an inline SVG: values with their intervals, one per row. `reference` is a line across all rows."""
    draw = Drawing(_FOREST_WIDTH, title)
    # Long names stand above their intervals.
    is_inline = all(text_width(row.name, 12.5) <= _FOREST_NAME_WIDTH - 8 for row in rows)
    left, right = _FOREST_NAME_WIDTH if is_inline else 0.0, _FOREST_WIDTH - _FOREST_TEXT_WIDTH
    row_height = _FOREST_ROW_HEIGHT if is_inline else 1.6 * _FOREST_ROW_HEIGHT
    low, high = _forest_range(rows, reference)

    def to_x(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return left + _FOREST_PAD + (right - left - 2 * _FOREST_PAD) * min(max(share, 0.0), 1.0)

    bottom = _FOREST_TOP + row_height * len(rows)
    _draw_x_grid(draw, axes.linear_ticks(low, high, 4), _FOREST_TOP, bottom, bottom + 15, to_x)
    if reference is not None:
        draw.line(to_x(reference), _FOREST_TOP - 4, to_x(reference), bottom, _THEME.muted, stroke_dasharray="3 3")
    for i, row in enumerate(rows):
        y = _FOREST_TOP + row_height * (i + 1) - _FOREST_ROW_HEIGHT / 2
        color = _THEME.series[0] if row.state == "ok" else _THEME.state_color(row.state)
        name = row.name if is_inline else truncate_text(row.name, 12.5, _FOREST_WIDTH)
        draw.text(0, y + (4 if is_inline else -13), name, _THEME.ink, size=12.5, css_class="name")
        if row.low is not None and row.high is not None:
            ends = to_x(row.low), y, to_x(row.high), y
            draw.line(*ends, color, stroke_width="2.5", stroke_linecap="round", css_class="interval")
        draw.circle(to_x(row.value), y, 4.5, color, css_class=f"figure-{row.state}")
        draw.text(_FOREST_WIDTH, y + 4, row.text, _THEME.muted, size=11.5, anchor="end", css_class="value")
    return draw.to_inline_svg(bottom + 24)


def _forest_range(rows: Sequence[ForestRow], reference: float | None) -> tuple[float, float]:
    known = [v for row in rows for v in (row.value, row.low, row.high) if v is not None]
    known += [] if reference is None else [reference]
    low, high = min(known, default=0.0), max(known, default=1.0)
    pad = 0.04 * (high - low) or 0.05 * max(abs(high), 1.0)
    # The axis of shares stays within 0 and 1.
    return (max(0.0, low - pad) if low >= 0 else low - pad), (min(1.0, high + pad) if high <= 1 else high + pad)


def _draw_x_grid(
    draw: Drawing, ticks: Sequence[float], top: float, bottom: float, label_y: float, to_x: Callable[[float], float]
) -> None:
    for tick in ticks:
        x, label = to_x(tick), axes.format_number(tick)
        draw.line(x, top, x, bottom, _THEME.grid)
        draw.text(x, label_y, label, _THEME.muted, size=11, anchor="middle", css_class="tick")


def _draw_y_grid(
    draw: Drawing, ticks: Sequence[float], left: float, right: float, to_y: Callable[[float], float]
) -> None:
    for tick in ticks:
        y, label = to_y(tick), axes.format_number(tick)
        draw.line(left, y, right, y, _THEME.grid)
        draw.text(left - 6, y + 4, label, _THEME.muted, size=11, anchor="end", css_class="tick")


class CurvePoint(msgspec.Struct, frozen=True):
    name: str
    value: float
    low: float | None
    high: float | None


def render_curve(
    title: str, points: Sequence[CurvePoint], low: float, high: float, *, reference: float | None = None
) -> str:
    """Return an inline SVG: a metric from `low` to `high` by strength of a disturbance, with its interval as a band."""
    draw, color, bottom = Drawing(_CURVE_WIDTH, title), _THEME.series[0], _CURVE_TOP + _CURVE_HEIGHT
    first, length = _CURVE_LEFT + _CURVE_INSET, _CURVE_RIGHT - _CURVE_LEFT - 2 * _CURVE_INSET
    xs = [first + length * i / max(1, len(points) - 1) for i in range(len(points))]

    def to_y(value: float) -> float:
        return _CURVE_TOP + _CURVE_HEIGHT * (1 - (value - low) / ((high - low) or 1.0))

    draw.rect(_CURVE_LEFT, _CURVE_TOP, _CURVE_RIGHT - _CURVE_LEFT, _CURVE_HEIGHT, _THEME.panel, r=4, stroke=_THEME.grid)
    _draw_y_grid(draw, axes.linear_ticks(low, high, 4), _CURVE_LEFT, _CURVE_RIGHT, to_y)
    if reference is not None:
        y = to_y(reference)
        draw.line(_CURVE_LEFT, y, _CURVE_RIGHT, y, _THEME.muted, stroke_dasharray="4 4")
    banded = [
        (x, point.low, point.high)
        for x, point in zip(xs, points, strict=True)
        if point.low is not None and point.high is not None
    ]
    upper, lower = [(x, to_y(v)) for x, _, v in banded], [(x, to_y(v)) for x, v, _ in banded]
    draw.path([*upper, *reversed(lower)], "none", fill=color, closed=True, fill_opacity="0.16")
    line = [(x, to_y(point.value)) for x, point in zip(xs, points, strict=True)]
    draw.path(line, color, stroke_width="2", css_class="course")
    for (x, y), point in zip(line, points, strict=True):
        draw.circle(x, y, 3.5, color)
        draw.text(x, bottom + 16, point.name, _THEME.muted, size=11, anchor="middle", css_class="strength")
    return draw.to_inline_svg(bottom + 24)


def render_heatmap(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Return an inline SVG of a confusion matrix. Rows are true classes; a cell is as dark as its share of the row."""
    draw = Drawing(_HEATMAP_WIDTH, "Confusion matrix: a row for each true class, a column for each predicted class")
    n = len(labels)
    left = min(_HEATMAP_MAX_LABEL_WIDTH, 1.25 * max(text_width(label, 12) for label in labels) + 12)
    cell = min(90.0, (_HEATMAP_WIDTH - left) / n)
    high = min(34.0, cell) if n <= 12 else cell
    widest = max(text_width(label, 11) for label in labels)
    steep = n > 8 or widest > cell - 4
    top = 16 + 0.72 * min(_HEATMAP_MAX_LABEL_WIDTH, widest) if steep else 24.0
    for j, label in enumerate(labels):
        x = left + cell * (j + 0.5)
        if steep:
            draw.rotated_text(x + 4, top - 8, truncate_text(label, 11, _HEATMAP_MAX_LABEL_WIDTH), _THEME.muted, size=11)
        else:
            draw.text(x, top - 9, label, _THEME.muted, size=11, anchor="middle", css_class="predicted")
    for i, (label, row) in enumerate(zip(labels, counts, strict=True)):
        y, total = top + high * i, max(1, sum(row))
        draw.text(left - 8, y + high / 2 + 4, truncate_text(label, 12, left - 10), _THEME.ink, size=12, anchor="end")
        for j, count in enumerate(row):
            share = count / total
            color = _THEME.series[0] if i == j else _THEME.fault
            box = (left + cell * j + 1, y + 1, cell - 2, high - 2)
            draw.rect(*box, _THEME.panel, r=3)
            if count:
                draw.rect(*box, color, r=3, fill_opacity=f"{0.12 + 0.68 * share:.2f}", css_class="cell")
            if count and n <= 14:
                ink = _THEME.paper if share > 0.55 else _THEME.ink
                draw.text(left + cell * (j + 0.5), y + high / 2 + 4, f"{count}", ink, size=11.5, anchor="middle")
    return draw.to_inline_svg(top + high * n + 6)


class ReliabilityPoint(msgspec.Struct, frozen=True):
    score: float
    accuracy: float
    low: float | None
    high: float | None


def render_reliability(points: Sequence[ReliabilityPoint]) -> str:
    """Return an inline SVG. Scores on the diagonal are calibrated; above it they are too low."""
    draw, color = Drawing(_RELIABILITY_WIDTH, "Reliability diagram: accuracy by score"), _THEME.series[0]
    left, top, size = _RELIABILITY_LEFT, _RELIABILITY_TOP, _RELIABILITY_SIZE
    bottom = top + size
    lowest = min(v for p in points for v in (0.9, p.score, p.accuracy, p.low) if v is not None) if points else 0.9
    low = max(0.0, (lowest - 0.05) // 0.1 / 10)

    def to_x(value: float) -> float:
        return left + size * (value - low) / (1 - low)

    def to_y(value: float) -> float:
        return top + size * (1 - (value - low) / (1 - low))

    draw.rect(left, top, size, size, _THEME.panel, r=4, stroke=_THEME.grid)
    ticks = axes.linear_ticks(low, 1.0, 6)
    _draw_x_grid(draw, ticks, top, bottom, bottom + 16, to_x)
    _draw_y_grid(draw, ticks, left, _RELIABILITY_RIGHT, to_y)
    draw.line(to_x(low), to_y(low), to_x(1), to_y(1), _THEME.muted, stroke_dasharray="4 4", css_class="diagonal")
    for p in points:
        if p.low is not None and p.high is not None:
            draw.line(to_x(p.score), to_y(max(p.low, low)), to_x(p.score), to_y(p.high), color, stroke_width="2")
    line = [(to_x(p.score), to_y(p.accuracy)) for p in points]
    draw.path(line, color, stroke_width="1.5", stroke_opacity="0.5")
    for x, y in line:
        draw.circle(x, y, 4.5, color, css_class="bin")
    draw.text(left + size / 2, bottom + 34, "mean score of bin", _THEME.muted, size=11.5, anchor="middle")
    draw.text(left + 10, top + 20, "accuracy", _THEME.muted, size=11.5)
    return draw.to_inline_svg(bottom + 42)


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720.0, 400.0, 78.0, 560.0, 76.0, 340.0
_STEPS = 60


def render_cost_chart(comparison: Comparison, currency: str, cloud: str, most_devices: int, theme: Theme) -> str:
    """Return an SVG document; both axes are logarithmic, from one device to `most_devices`."""
    counts = [most_devices ** (i / _STEPS) for i in range(_STEPS + 1)]
    courses = [
        ("models on the devices", theme.series[0], [comparison.edge.total(n) for n in counts]),
        ("readings to the cloud", theme.series[3], [comparison.cloud.total(n) for n in counts]),
    ]
    positive = [value for _, _, values in courses for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    # Four decades suffice: below them a cost is as good as none.
    low, high = max(low, high - 5), max(high, low + 1)
    draw = Drawing(_WIDTH, f"Cost a month by number of devices, in {currency}")
    draw.text(24, 34, f"Cost a month, {currency}", theme.ink, size=18)
    draw.text(24, 56, f"beside {cloud}", theme.muted, size=12)

    def to_x(count: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * math.log(count) / math.log(most_devices)

    def to_y(value: float) -> float:
        level = math.log10(max(value, 10.0**low))
        return _BOTTOM - (_BOTTOM - _TOP) * (level - low) / (high - low)

    draw.rect(_LEFT, _TOP, _RIGHT - _LEFT, _BOTTOM - _TOP, theme.panel, r=4, stroke=theme.grid)
    for power in range(low, high + 1):
        y = to_y(10.0**power)
        draw.line(_LEFT, y, _RIGHT, y, theme.grid)
        draw.text(_LEFT - 8, y + 4, f"{10.0**power:,.{max(0, -power)}f}", theme.muted, size=11, anchor="end")
    for power in range(math.floor(math.log10(most_devices)) + 1):
        x = to_x(10.0**power)
        draw.line(x, _TOP, x, _BOTTOM, theme.grid)
        draw.text(x, _BOTTOM + 18, f"{10**power:,}", theme.muted, size=11, anchor="middle")
    draw.text((_LEFT + _RIGHT) / 2, _BOTTOM + 40, "devices", theme.muted, size=12, anchor="middle")
    for _, color, values in courses:
        line = [(to_x(n), to_y(value)) for n, value in zip(counts, values, strict=True)]
        draw.path(line, color, stroke_width="2.5")
    _draw_names(draw, [(name, color, to_y(values[-1])) for name, color, values in courses])
    if comparison.break_even is not None and 1 < comparison.break_even <= most_devices:
        x, y = to_x(comparison.break_even), to_y(comparison.edge.total(comparison.break_even))
        draw.circle(x, y, 5, theme.ink)
        draw.text(x - 8, y - 12, f"{comparison.break_even:,} devices", theme.ink, size=12, anchor="end")
    return draw.to_svg_document(_HEIGHT, theme.paper)


def _draw_names(draw: Drawing, names: list[tuple[str, str, float]]) -> None:
    """Draw the name of each line at its end, at least a line of text apart."""
    last = -math.inf
    for name, color, y in sorted(names, key=lambda each: each[2]):
        last = max(y + 4, last + 16)
        draw.text(_RIGHT + 8, last, name, color, size=12)
