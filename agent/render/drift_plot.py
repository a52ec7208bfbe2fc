"""Drift in one picture: a row per field, its distribution beside the course of its evidence, on one axis of time."""

from __future__ import annotations

from agent.render import axes, drift_panels
from agent.render.drift_model import DriftPlot
from agent.render.legend import draw_legend
from agent.render.paper import AXIS_LABEL_HEIGHT, MARGIN, WIDTH, Canvas, Panel
from agent.render.svg import Drawing, truncate_text, wrap_text
from agent.render.theme import DARK_THEME, LIGHT_THEME, Theme

ROW_GAP = 14.0
MAX_ALERTS = 5
COMPACT_ROW_HEIGHT = 48.0  # of a row without a distribution


def render_drift(picture: DriftPlot, *, dark: bool = False) -> str:
    """The picture as an SVG document."""
    theme = DARK_THEME if dark else LIGHT_THEME
    draw = Drawing(WIDTH, picture.title)
    y = _draw_header(draw, theme, picture)
    if picture.empty_message:
        return draw.to_svg_document(_draw_empty(draw, theme, picture.empty_message, y), theme.paper)
    paper = Canvas(draw, theme, *_time_range(picture))
    y = draw_legend(paper, picture, y)
    height = _row_height(len(picture.rows))
    for row in picture.rows:
        has_values = bool(row.reference or row.histograms)
        tall = height if has_values else COMPACT_ROW_HEIGHT
        drift_panels.draw_row(paper, row, Panel(MARGIN, y, WIDTH - 2 * MARGIN, tall))
        y += tall + (AXIS_LABEL_HEIGHT if has_values else 0) + ROW_GAP
    if picture.estimates:
        y = drift_panels.draw_estimates(paper, picture.estimates, y) + ROW_GAP
    return draw.to_svg_document(_draw_time_axis(paper, y - ROW_GAP), theme.paper)


def _draw_header(drawing: Drawing, theme: Theme, picture: DriftPlot) -> float:
    y = MARGIN + 16
    drawing.text(
        MARGIN,
        y,
        truncate_text(picture.title, 20, WIDTH - 2 * MARGIN),
        theme.ink,
        size=20,
        weight=600,
        css_class="title",
    )
    y += 22
    drawing.text(
        MARGIN,
        y,
        truncate_text(picture.subtitle, 12.5, WIDTH - 2 * MARGIN),
        theme.muted,
        size=12.5,
        css_class="subtitle",
    )
    y += 12
    for state, sentence in picture.alerts[:MAX_ALERTS]:
        y += 20
        drawing.circle(MARGIN + 4, y - 4, 4, theme.state_color(state))
        for i, line in enumerate(wrap_text(sentence, 12.5, WIDTH - 2 * MARGIN - 16, max_lines=2)):
            y += 16 if i else 0
            drawing.text(MARGIN + 16, y, line, theme.ink, size=12.5, css_class="alert")
    if len(picture.alerts) > MAX_ALERTS:
        y += 18
        drawing.text(MARGIN + 16, y, f"and {len(picture.alerts) - MAX_ALERTS} more", theme.muted, size=12)
    return y + 30


def _draw_empty(drawing: Drawing, theme: Theme, message: str, y: float) -> float:
    drawing.rect(MARGIN, y - 8, WIDTH - 2 * MARGIN, 120, theme.panel, r=8, stroke=theme.grid)
    for i, line in enumerate(wrap_text(message, 14, WIDTH - 4 * MARGIN, max_lines=2)):
        drawing.text(WIDTH / 2, y + 56 + 20 * i, line, theme.muted, size=14, anchor="middle", css_class="empty")
    return y + 112 + MARGIN


def _draw_time_axis(canvas: Canvas, y: float) -> float:
    for t, label in axes.time_ticks(canvas.begin, canvas.end, 8):
        canvas.drawing.text(
            canvas.time_to_x(t), y + 16, label, canvas.theme.muted, size=10.5, anchor="middle", css_class="time"
        )
    return y + 16 + MARGIN - 8


def _time_range(picture: DriftPlot) -> tuple[int, int]:
    times = [t for row in picture.rows for curve in row.curves for t in curve.times]
    times += [t for estimate in picture.estimates for t in estimate.times]
    times += [t for row in picture.rows for spell in row.intervals for t in (spell.begin, spell.end)]
    if not times:
        return 0, 1
    begin, end = min(times), max(times)
    if begin == end:
        return begin - 30_000_000, end + 30_000_000
    pad = (end - begin) // 80
    return begin - pad, end + pad


def _row_height(row_count: int) -> float:
    return 120.0 if row_count <= 2 else 84.0 if row_count <= 8 else 58.0
