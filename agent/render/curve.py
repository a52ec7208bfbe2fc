"""A figure that changes with the strength of something, with its interval as a band: small, one of several."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent.render import axes
from agent.render.svg import Drawing
from agent.render.theme import PAGE, Theme

WIDTH = 300.0
_LEFT, _RIGHT, _TOP, _HEIGHT, _INSET = 42.0, 292.0, 10.0, 120.0, 14.0


class Step(msgspec.Struct, frozen=True):
    name: str
    value: float
    low: float | None
    high: float | None


def curve(
    title: str, steps: Sequence[Step], low: float, high: float, *, reference: float | None = None, theme: Theme = PAGE
) -> str:
    """An inline SVG; `low` to `high` is the axis of the figure, `reference` a line across."""
    draw = Drawing(WIDTH, title)

    def x(i: int) -> float:
        return _LEFT + _INSET + (_RIGHT - _LEFT - 2 * _INSET) * i / max(1, len(steps) - 1)

    def y(value: float) -> float:
        return _TOP + _HEIGHT * (1 - (value - low) / ((high - low) or 1.0))

    draw.rect(_LEFT, _TOP, _RIGHT - _LEFT, _HEIGHT, theme.panel, r=4, stroke=theme.grid)
    for tick in axes.numbers(low, high, 4):
        draw.line(_LEFT, y(tick), _RIGHT, y(tick), theme.grid)
        draw.text(_LEFT - 6, y(tick) + 4, axes.number(tick), theme.muted, size=11, anchor="end", name="tick")
    if reference is not None:
        draw.line(_LEFT, y(reference), _RIGHT, y(reference), theme.muted, stroke_dasharray="4 4")
    banded = [(i, s.low, s.high) for i, s in enumerate(steps) if s.low is not None and s.high is not None]
    edge = [(x(i), y(top)) for i, _, top in banded] + [(x(i), y(under)) for i, under, _ in reversed(banded)]
    draw.path(edge, "none", fill=theme.series[0], closed=True, fill_opacity="0.16")
    draw.path([(x(i), y(s.value)) for i, s in enumerate(steps)], theme.series[0], stroke_width="2", name="course")
    for i, step in enumerate(steps):
        draw.circle(x(i), y(step.value), 3.5, theme.series[0])
        draw.text(x(i), _TOP + _HEIGHT + 16, step.name, theme.muted, size=11, anchor="middle", name="strength")
    return draw.inline(_TOP + _HEIGHT + 24)
