"""What colours, dashes and marks of a picture of drift mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from agent.render.drift_model import DriftPlot
from agent.render.paper import HISTOGRAM_X, MARGIN, TIME_X, WIDTH, Canvas, series_color
from agent.render.svg import text_width, truncate_text

_FONT_SIZE, _LINE_HEIGHT = 11.5, 17.0
_MAX_NAME_WIDTH = 130.0


class _LegendItem(msgspec.Struct, frozen=True):
    text: str
    draw_symbol: Callable[[float, float], None]

    @property
    def width(self) -> float:
        return 22 + text_width(self.text, _FONT_SIZE) + 16


def draw_legend(canvas: Canvas, picture: DriftPlot, y: float) -> float:
    """Column heads and what is beneath them; the panels may begin below."""
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
            x, y = left, y + _LINE_HEIGHT
        item.draw_symbol(x, y - 4)
        canvas.drawing.text(x + 22, y, item.text, canvas.theme.muted, size=_FONT_SIZE, css_class="legend")
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
            truncate_text(name, _FONT_SIZE, _MAX_NAME_WIDTH), _line_symbol(canvas, series_color(theme, i))
        )
    if picture.dashed_label:
        yield _LegendItem(picture.dashed_label, _line_symbol(canvas, series_color(theme, 1), "5 3"))
    if any(row.limit is not None for row in picture.rows):
        yield _LegendItem("alarm", _line_symbol(canvas, theme.limit, "2 3"))
    states = {spell.state for row in picture.rows for spell in row.intervals}
    if "drift" in states:
        yield _LegendItem("drift alert open", _box_symbol(canvas, theme.drift_band, theme.drift))
    if "fault" in states:
        yield _LegendItem("sensor fault", _box_symbol(canvas, theme.fault_band, theme.fault))


def _line_symbol(canvas: Canvas, color: str, dashes: str = "none") -> Callable[[float, float], None]:
    return lambda x, y: canvas.drawing.line(x, y, x + 16, y, color, stroke_width="2", stroke_dasharray=dashes)


def _box_symbol(canvas: Canvas, fill: str, edge: str) -> Callable[[float, float], None]:
    return lambda x, y: canvas.drawing.rect(x, y - 5, 16, 10, fill, stroke=edge, stroke_width="0.8")
