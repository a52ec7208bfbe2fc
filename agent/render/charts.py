"""Charts of metrics as inline SVG for a page: forest plot, curve with band, confusion heatmap, reliability diagram."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from agent.render import axes
from agent.render.svg import Drawing, text_width, truncate_text
from agent.render.theme import PAGE_THEME, Theme

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


def render_forest(
    title: str, rows: Sequence[ForestRow], *, reference: float | None = None, theme: Theme = PAGE_THEME
) -> str:
    """Return an inline SVG: values with their intervals, one per row. `reference` is a line across all rows."""
    draw = Drawing(_FOREST_WIDTH, title)
    left, right = _FOREST_NAME_WIDTH, _FOREST_WIDTH - _FOREST_TEXT_WIDTH
    low, high = _axis_range(rows, reference)

    def to_x(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return left + _FOREST_PAD + (right - left - 2 * _FOREST_PAD) * min(max(share, 0.0), 1.0)

    bottom = _FOREST_TOP + _FOREST_ROW_HEIGHT * len(rows)
    for tick in axes.linear_ticks(low, high, 4):
        draw.line(to_x(tick), _FOREST_TOP, to_x(tick), bottom, theme.grid)
        draw.text(
            to_x(tick), bottom + 15, axes.format_number(tick), theme.muted, size=11, anchor="middle", css_class="tick"
        )
    if reference is not None:
        draw.line(to_x(reference), _FOREST_TOP - 4, to_x(reference), bottom, theme.muted, stroke_dasharray="3 3")
    for i, line in enumerate(rows):
        _draw_row(draw, theme, line, _FOREST_TOP + _FOREST_ROW_HEIGHT * (i + 0.5), to_x)
    return draw.to_inline_svg(bottom + 24)


def _draw_row(drawing: Drawing, theme: Theme, row: ForestRow, y: float, to_x: Callable[[float], float]) -> None:
    color = theme.series[0] if row.state == "ok" else theme.state_color(row.state)
    drawing.text(
        0, y + 4, truncate_text(row.name, 12.5, _FOREST_NAME_WIDTH - 8), theme.ink, size=12.5, css_class="name"
    )
    if row.low is not None and row.high is not None:
        drawing.line(
            to_x(row.low), y, to_x(row.high), y, color, stroke_width="2.5", stroke_linecap="round", css_class="interval"
        )
    drawing.circle(to_x(row.value), y, 4.5, color, css_class=f"figure-{row.state}")
    drawing.text(_FOREST_WIDTH, y + 4, row.text, theme.muted, size=11.5, anchor="end", css_class="value")


def _axis_range(rows: Sequence[ForestRow], reference: float | None) -> tuple[float, float]:
    known = [v for line in rows for v in (line.value, line.low, line.high) if v is not None]
    known += [] if reference is None else [reference]
    low, high = min(known, default=0.0), max(known, default=1.0)
    pad = 0.04 * (high - low) or 0.05 * max(abs(high), 1.0)
    # The axis of shares stays within 0 and 1.
    return (max(0.0, low - pad) if low >= 0 else low - pad), (min(1.0, high + pad) if high <= 1 else high + pad)


class CurvePoint(msgspec.Struct, frozen=True):
    name: str
    value: float
    low: float | None
    high: float | None


def render_curve(
    title: str,
    points: Sequence[CurvePoint],
    low: float,
    high: float,
    *,
    reference: float | None = None,
    theme: Theme = PAGE_THEME,
) -> str:
    """Return an inline SVG: a metric by strength of a disturbance, with its interval as a band.

    The axis of the metric runs from `low` to `high`; `reference` is a line across.
    """
    draw = Drawing(_CURVE_WIDTH, title)

    def x_position(i: int) -> float:
        return (
            _CURVE_LEFT + _CURVE_INSET + (_CURVE_RIGHT - _CURVE_LEFT - 2 * _CURVE_INSET) * i / max(1, len(points) - 1)
        )

    def y_position(value: float) -> float:
        return _CURVE_TOP + _CURVE_HEIGHT * (1 - (value - low) / ((high - low) or 1.0))

    draw.rect(_CURVE_LEFT, _CURVE_TOP, _CURVE_RIGHT - _CURVE_LEFT, _CURVE_HEIGHT, theme.panel, r=4, stroke=theme.grid)
    for tick in axes.linear_ticks(low, high, 4):
        draw.line(_CURVE_LEFT, y_position(tick), _CURVE_RIGHT, y_position(tick), theme.grid)
        draw.text(
            _CURVE_LEFT - 6,
            y_position(tick) + 4,
            axes.format_number(tick),
            theme.muted,
            size=11,
            anchor="end",
            css_class="tick",
        )
    if reference is not None:
        draw.line(
            _CURVE_LEFT, y_position(reference), _CURVE_RIGHT, y_position(reference), theme.muted, stroke_dasharray="4 4"
        )
    banded = [(i, s.low, s.high) for i, s in enumerate(points) if s.low is not None and s.high is not None]
    edge = [(x_position(i), y_position(top)) for i, _, top in banded] + [
        (x_position(i), y_position(under)) for i, under, _ in reversed(banded)
    ]
    draw.path(edge, "none", fill=theme.series[0], closed=True, fill_opacity="0.16")
    draw.path(
        [(x_position(i), y_position(s.value)) for i, s in enumerate(points)],
        theme.series[0],
        stroke_width="2",
        css_class="course",
    )
    for i, step in enumerate(points):
        draw.circle(x_position(i), y_position(step.value), 3.5, theme.series[0])
        draw.text(
            x_position(i),
            _CURVE_TOP + _CURVE_HEIGHT + 16,
            step.name,
            theme.muted,
            size=11,
            anchor="middle",
            css_class="strength",
        )
    return draw.to_inline_svg(_CURVE_TOP + _CURVE_HEIGHT + 24)


def render_heatmap(labels: Sequence[str], counts: Sequence[Sequence[int]], *, theme: Theme = PAGE_THEME) -> str:
    """Return an inline SVG of a confusion matrix. Rows are true classes; a cell is as dark as its share of the row."""
    draw = Drawing(_HEATMAP_WIDTH, "Confusion matrix: a row for each true class, a column for each predicted class")
    n = len(labels)
    left = min(_HEATMAP_MAX_LABEL_WIDTH, 1.25 * max(text_width(label, 12) for label in labels) + 12)
    cell = min(90.0, (_HEATMAP_WIDTH - left) / n)
    high = min(34.0, cell) if n <= 12 else cell
    steep = n > 8 or max(text_width(label, 11) for label in labels) > cell - 4
    top = (
        24.0 if not steep else min(_HEATMAP_MAX_LABEL_WIDTH, max(text_width(label, 11) for label in labels)) * 0.72 + 16
    )
    for j, label in enumerate(labels):
        x = left + cell * (j + 0.5)
        if steep:
            draw.rotated_text(x + 4, top - 8, truncate_text(label, 11, _HEATMAP_MAX_LABEL_WIDTH), theme.muted, size=11)
        else:
            draw.text(x, top - 9, label, theme.muted, size=11, anchor="middle", css_class="predicted")
    for i, (label, row) in enumerate(zip(labels, counts, strict=True)):
        y, total = top + high * i, max(1, sum(row))
        draw.text(left - 8, y + high / 2 + 4, truncate_text(label, 12, left - 10), theme.ink, size=12, anchor="end")
        for j, count in enumerate(row):
            share = count / total
            color = theme.series[0] if i == j else theme.fault
            box = (left + cell * j + 1, y + 1, cell - 2, high - 2)
            draw.rect(*box, theme.panel, r=3)
            if count:
                draw.rect(*box, color, r=3, fill_opacity=f"{0.12 + 0.68 * share:.2f}", css_class="cell")
            if count and n <= 14:
                ink = theme.paper if share > 0.55 else theme.ink
                draw.text(left + cell * (j + 0.5), y + high / 2 + 4, f"{count}", ink, size=11.5, anchor="middle")
    return draw.to_inline_svg(top + high * n + 6)


class ReliabilityPoint(msgspec.Struct, frozen=True):
    """Bin of predictions with this mean score, and their accuracy."""

    score: float
    accuracy: float
    low: float | None
    high: float | None
    n: int


def render_reliability(points: Sequence[ReliabilityPoint], *, theme: Theme = PAGE_THEME) -> str:
    """Return an inline SVG. Scores on the diagonal are calibrated; above it they are too low."""
    draw = Drawing(_RELIABILITY_WIDTH, "Reliability diagram: accuracy by score")
    lowest = min(
        [point.score for point in points]
        + [point.accuracy for point in points]
        + [point.low for point in points if point.low is not None]
        + [0.9]
    )
    low = max(0.0, (lowest - 0.05) // 0.1 / 10)

    def x(value: float) -> float:
        return _RELIABILITY_LEFT + _RELIABILITY_SIZE * (value - low) / (1 - low)

    def y(value: float) -> float:
        return _RELIABILITY_TOP + _RELIABILITY_SIZE * (1 - (value - low) / (1 - low))

    draw.rect(
        _RELIABILITY_LEFT, _RELIABILITY_TOP, _RELIABILITY_SIZE, _RELIABILITY_SIZE, theme.panel, r=4, stroke=theme.grid
    )
    for step in axes.linear_ticks(low, 1.0, 6):
        draw.line(x(step), _RELIABILITY_TOP, x(step), _RELIABILITY_TOP + _RELIABILITY_SIZE, theme.grid)
        draw.line(_RELIABILITY_LEFT, y(step), _RELIABILITY_RIGHT, y(step), theme.grid)
        draw.text(
            x(step),
            _RELIABILITY_TOP + _RELIABILITY_SIZE + 16,
            axes.format_number(step),
            theme.muted,
            size=11,
            anchor="middle",
            css_class="tick",
        )
        draw.text(
            _RELIABILITY_LEFT - 6,
            y(step) + 4,
            axes.format_number(step),
            theme.muted,
            size=11,
            anchor="end",
            css_class="tick",
        )
    draw.line(x(low), y(low), x(1), y(1), theme.muted, stroke_dasharray="4 4", css_class="diagonal")
    for point in points:
        if point.low is not None and point.high is not None:
            draw.line(
                x(point.score), y(max(point.low, low)), x(point.score), y(point.high), theme.series[0], stroke_width="2"
            )
    draw.path(
        [(x(point.score), y(point.accuracy)) for point in points],
        theme.series[0],
        stroke_width="1.5",
        stroke_opacity="0.5",
    )
    for point in points:
        draw.circle(x(point.score), y(point.accuracy), 4.5, theme.series[0], css_class="bin")
    draw.text(
        _RELIABILITY_LEFT + _RELIABILITY_SIZE / 2,
        _RELIABILITY_TOP + _RELIABILITY_SIZE + 34,
        "mean score of bin",
        theme.muted,
        size=11.5,
        anchor="middle",
    )
    draw.text(_RELIABILITY_LEFT + 10, _RELIABILITY_TOP + 20, "accuracy", theme.muted, size=11.5)
    return draw.to_inline_svg(_RELIABILITY_TOP + _RELIABILITY_SIZE + 42)
