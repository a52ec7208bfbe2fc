"""Drift plot: a row per field with its distribution and its evidence over a common time axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import msgspec

from outstation.foundation.render import axes, drift_panels
from outstation.foundation.render.drift_model import DriftPlot
from outstation.foundation.render.drift_panels import (
    AXIS_LABEL_HEIGHT,
    HISTOGRAM_X,
    MARGIN,
    TIME_X,
    WIDTH,
    Canvas,
    Panel,
    series_color,
)
from outstation.foundation.render.svg import Drawing, text_width, truncate_text, wrap_text
from outstation.foundation.render.theme import DARK_THEME, LIGHT_THEME, Theme

ROW_GAP = 14.0
_ROW_HEIGHTS = ((2, 120.0), (8, 84.0), (math.inf, 58.0))  # height in px, up to this number of rows
MAX_ALERTS = 5
COMPACT_ROW_HEIGHT = 48.0  # without a distribution
_LEGEND_FONT_SIZE, _LEGEND_LINE_HEIGHT = 11.5, 17.0
_MAX_SERIES_NAME_WIDTH = 130.0


def render_drift(picture: DriftPlot, *, dark: bool = False) -> str:
    theme = DARK_THEME if dark else LIGHT_THEME
    draw = Drawing(WIDTH, picture.title)
    y = _draw_header(draw, theme, picture)
    if picture.empty_message:
        draw.rect(MARGIN, y - 8, WIDTH - 2 * MARGIN, 120, theme.panel, r=8, stroke=theme.grid)
        for i, line in enumerate(wrap_text(picture.empty_message, 14, WIDTH - 4 * MARGIN)):
            draw.text(WIDTH / 2, y + 56 + 20 * i, line, theme.muted, size=14, anchor="middle", css_class="empty")
        return draw.to_svg_document(y + 112 + MARGIN, theme.paper)
    paper = Canvas(draw, theme, *_time_range(picture))
    y = _draw_legend(paper, picture, y)
    height = next(h for most, h in _ROW_HEIGHTS if len(picture.rows) <= most)
    for row in picture.rows:
        has_values = bool(row.reference or row.histograms)
        tall = height if has_values else COMPACT_ROW_HEIGHT
        drift_panels.draw_row(paper, row, Panel(MARGIN, y, WIDTH - 2 * MARGIN, tall))
        y += tall + (AXIS_LABEL_HEIGHT if has_values else 0) + ROW_GAP
    if picture.estimates:
        y = drift_panels.draw_estimates(paper, picture.estimates, y) + ROW_GAP
    y += 16 - ROW_GAP
    for t, label in axes.time_ticks(paper.begin, paper.end, 8):
        draw.text(paper.time_to_x(t), y, label, theme.muted, size=10.5, anchor="middle", css_class="time")
    return draw.to_svg_document(y + MARGIN - 8, theme.paper)


def _draw_header(drawing: Drawing, theme: Theme, picture: DriftPlot) -> float:
    y = MARGIN + 16
    title = truncate_text(picture.title, 20, WIDTH - 2 * MARGIN)
    drawing.text(MARGIN, y, title, theme.ink, size=20, weight=600, css_class="title")
    y += 22
    subtitle = truncate_text(picture.subtitle, 12.5, WIDTH - 2 * MARGIN)
    drawing.text(MARGIN, y, subtitle, theme.muted, size=12.5, css_class="subtitle")
    y += 12
    for state, sentence in picture.alerts[:MAX_ALERTS]:
        y += 20
        drawing.circle(MARGIN + 4, y - 4, 4, theme.state_color(state))
        for i, line in enumerate(wrap_text(sentence, 12.5, WIDTH - 2 * MARGIN - 16)):
            y += 16 if i else 0
            drawing.text(MARGIN + 16, y, line, theme.ink, size=12.5, css_class="alert")
    if len(picture.alerts) > MAX_ALERTS:
        y += 18
        drawing.text(MARGIN + 16, y, f"and {len(picture.alerts) - MAX_ALERTS} more", theme.muted, size=12)
    return y + 30


def _time_range(picture: DriftPlot) -> tuple[int, int]:
    times = [t for row in picture.rows for curve in row.curves for t in curve.times]
    times += [t for estimate in picture.estimates for t in estimate.times]
    times += [t for row in picture.rows for interval in row.intervals for t in (interval.begin, interval.end)]
    if not times:
        return 0, 1
    begin, end = min(times), max(times)
    if begin == end:
        return begin - 30_000_000, end + 30_000_000
    pad = (end - begin) // 80
    return begin - pad, end + pad


class _LegendItem(msgspec.Struct, frozen=True):
    text: str
    draw_symbol: Callable[[float, float], None]

    @property
    def width(self) -> float:
        return 22 + text_width(self.text, _LEGEND_FONT_SIZE) + 16


def _draw_legend(canvas: Canvas, picture: DriftPlot, y: float) -> float:
    """Draw column heads and legends. Return the y coordinate at which the panels may begin."""
    draw, theme = canvas.drawing, canvas.theme
    drawn = [row for row in picture.rows if row.reference or row.histograms]
    by_bin = drawn and all(row.bounds is None for row in drawn)
    values = "Distribution over the reference's bins" if by_bin else "Distribution of values"
    draw.text(HISTOGRAM_X, y, values, theme.ink, size=12.5, weight=600)
    draw.text(TIME_X, y, "Evidence of change (CUSUM) over time, UTC", theme.ink, size=12.5, weight=600)
    left = _draw_items(canvas, _distribution_items(canvas, picture), HISTOGRAM_X, TIME_X - 10, y + 18)
    right = _draw_items(canvas, _evidence_items(canvas, picture), TIME_X, WIDTH - MARGIN, y + 18)
    return max(left, right) + 16


def _draw_items(canvas: Canvas, items: Iterator[_LegendItem], left: float, right: float, y: float) -> float:
    x = left
    for item in items:
        if x > left and x + item.width - 16 > right:
            x, y = left, y + _LEGEND_LINE_HEIGHT
        item.draw_symbol(x, y - 4)
        canvas.drawing.text(x + 22, y, item.text, canvas.theme.muted, size=_LEGEND_FONT_SIZE, css_class="legend")
        x += item.width
    return y


def _distribution_items(canvas: Canvas, picture: DriftPlot) -> Iterator[_LegendItem]:
    theme = canvas.theme
    if picture.reference_label:
        yield _LegendItem(picture.reference_label, _box_symbol(canvas, theme.reference, theme.reference_edge))
    if len(picture.series_names) == 1 and any(row.histograms for row in picture.rows):
        yield _LegendItem("now", _line_symbol(canvas, theme.series[0]))


def _evidence_items(canvas: Canvas, picture: DriftPlot) -> Iterator[_LegendItem]:
    theme = canvas.theme
    for i, name in enumerate(picture.series_names):
        yield _LegendItem(
            truncate_text(name, _LEGEND_FONT_SIZE, _MAX_SERIES_NAME_WIDTH), _line_symbol(canvas, series_color(theme, i))
        )
    if picture.dashed_label:
        yield _LegendItem(picture.dashed_label, _line_symbol(canvas, series_color(theme, 1), "5 3"))
    if any(row.limit is not None for row in picture.rows):
        yield _LegendItem("alarm", _line_symbol(canvas, theme.limit, "2 3"))
    states = {interval.state for row in picture.rows for interval in row.intervals}
    if "drift" in states:
        yield _LegendItem("drift alert open", _box_symbol(canvas, theme.drift_band, theme.drift))
    if "fault" in states:
        yield _LegendItem("sensor fault", _box_symbol(canvas, theme.fault_band, theme.fault))


def _line_symbol(canvas: Canvas, color: str, dashes: str = "none") -> Callable[[float, float], None]:
    return lambda x, y: canvas.drawing.line(x, y, x + 16, y, color, stroke_width="2", stroke_dasharray=dashes)


def _box_symbol(canvas: Canvas, fill: str, edge: str) -> Callable[[float, float], None]:
    return lambda x, y: canvas.drawing.rect(x, y - 5, 16, 10, fill, stroke=edge, stroke_width="0.8")
