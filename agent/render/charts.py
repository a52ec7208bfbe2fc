"""Figures with their intervals, one under another, on one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from agent.render import axes
from agent.render.svg import Drawing, truncate_text
from agent.render.theme import PAGE_THEME, Theme

WIDTH = 360.0
_NAME_WIDTH, _TEXT_WIDTH, _ROW_HEIGHT, _TOP, _PAD = 106.0, 96.0, 24.0, 8.0, 8.0


class ForestRow(msgspec.Struct, frozen=True):
    """`state` gives the colour: ok, drift (to be looked at), unknown; `text` stands at the right."""

    name: str
    value: float
    low: float | None
    high: float | None
    text: str
    state: str = "ok"


def render_forest(
    title: str, rows: Sequence[ForestRow], *, reference: float | None = None, theme: Theme = PAGE_THEME
) -> str:
    """An inline SVG; `reference` is a line through all rows."""
    draw = Drawing(WIDTH, title)
    left, right = _NAME_WIDTH, WIDTH - _TEXT_WIDTH
    low, high = _axis_range(rows, reference)

    def to_x(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return left + _PAD + (right - left - 2 * _PAD) * min(max(share, 0.0), 1.0)

    bottom = _TOP + _ROW_HEIGHT * len(rows)
    for tick in axes.linear_ticks(low, high, 4):
        draw.line(to_x(tick), _TOP, to_x(tick), bottom, theme.grid)
        draw.text(
            to_x(tick), bottom + 15, axes.format_number(tick), theme.muted, size=11, anchor="middle", css_class="tick"
        )
    if reference is not None:
        draw.line(to_x(reference), _TOP - 4, to_x(reference), bottom, theme.muted, stroke_dasharray="3 3")
    for i, line in enumerate(rows):
        _draw_row(draw, theme, line, _TOP + _ROW_HEIGHT * (i + 0.5), to_x)
    return draw.to_inline_svg(bottom + 24)


def _draw_row(drawing: Drawing, theme: Theme, row: ForestRow, y: float, to_x: Callable[[float], float]) -> None:
    color = theme.series[0] if row.state == "ok" else theme.state_color(row.state)
    drawing.text(0, y + 4, truncate_text(row.name, 12.5, _NAME_WIDTH - 8), theme.ink, size=12.5, css_class="name")
    if row.low is not None and row.high is not None:
        drawing.line(
            to_x(row.low), y, to_x(row.high), y, color, stroke_width="2.5", stroke_linecap="round", css_class="interval"
        )
    drawing.circle(to_x(row.value), y, 4.5, color, css_class=f"figure-{row.state}")
    drawing.text(WIDTH, y + 4, row.text, theme.muted, size=11.5, anchor="end", css_class="value")


def _axis_range(rows: Sequence[ForestRow], reference: float | None) -> tuple[float, float]:
    known = [v for line in rows for v in (line.value, line.low, line.high) if v is not None]
    known += [] if reference is None else [reference]
    low, high = min(known, default=0.0), max(known, default=1.0)
    pad = 0.04 * (high - low) or 0.05 * max(abs(high), 1.0)
    # What is a share stays within 0 and 1.
    return (max(0.0, low - pad) if low >= 0 else low - pad), (min(1.0, high + pad) if high <= 1 else high + pad)
