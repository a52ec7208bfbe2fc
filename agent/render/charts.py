"""Figures with their intervals, one under another, on one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from agent.render import axes
from agent.render.svg import Drawing, shortened
from agent.render.theme import PAGE, Theme

WIDTH = 360.0
_NAME_W, _TEXT_W, _ROW, _TOP, _PAD = 106.0, 96.0, 24.0, 8.0, 8.0


class Line(msgspec.Struct, frozen=True):
    """`state` gives the colour: ok, drift (to be looked at), unknown; `text` stands at the right."""

    name: str
    value: float
    low: float | None
    high: float | None
    text: str
    state: str = "ok"


def forest(title: str, lines: Sequence[Line], *, reference: float | None = None, theme: Theme = PAGE) -> str:
    """An inline SVG; `reference` is a line through all rows."""
    draw = Drawing(WIDTH, title)
    left, right = _NAME_W, WIDTH - _TEXT_W
    low, high = _range(lines, reference)

    def at(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return left + _PAD + (right - left - 2 * _PAD) * min(max(share, 0.0), 1.0)

    bottom = _TOP + _ROW * len(lines)
    for tick in axes.numbers(low, high, 4):
        draw.line(at(tick), _TOP, at(tick), bottom, theme.grid)
        draw.text(at(tick), bottom + 15, axes.number(tick), theme.muted, size=11, anchor="middle", name="tick")
    if reference is not None:
        draw.line(at(reference), _TOP - 4, at(reference), bottom, theme.muted, stroke_dasharray="3 3")
    for i, line in enumerate(lines):
        _line(draw, theme, line, _TOP + _ROW * (i + 0.5), at)
    return draw.inline(bottom + 24)


def _line(draw: Drawing, theme: Theme, line: Line, y: float, at: Callable[[float], float]) -> None:
    color = theme.series[0] if line.state == "ok" else theme.of_state(line.state)
    draw.text(0, y + 4, shortened(line.name, 12.5, _NAME_W - 8), theme.ink, size=12.5, name="name")
    if line.low is not None and line.high is not None:
        draw.line(at(line.low), y, at(line.high), y, color, stroke_width="2.5", stroke_linecap="round", name="interval")
    draw.circle(at(line.value), y, 4.5, color, name=f"figure-{line.state}")
    draw.text(WIDTH, y + 4, line.text, theme.muted, size=11.5, anchor="end", name="value")


def _range(lines: Sequence[Line], reference: float | None) -> tuple[float, float]:
    known = [v for line in lines for v in (line.value, line.low, line.high) if v is not None]
    known += [] if reference is None else [reference]
    low, high = min(known, default=0.0), max(known, default=1.0)
    pad = 0.04 * (high - low) or 0.05 * max(abs(high), 1.0)
    # What is a share stays within 0 and 1.
    return (max(0.0, low - pad) if low >= 0 else low - pad), (min(1.0, high + pad) if high <= 1 else high + pad)
