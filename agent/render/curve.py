"""A figure that changes with the strength of something, with its interval as a band: small, one of several."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent.render import axes
from agent.render.svg import Drawing
from agent.render.theme import PAGE_THEME, Theme

WIDTH = 300.0
_LEFT, _RIGHT, _TOP, _HEIGHT, _INSET = 42.0, 292.0, 10.0, 120.0, 14.0


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
    """An inline SVG; `low` to `high` is the axis of the figure, `reference` a line across."""
    draw = Drawing(WIDTH, title)

    def x_position(i: int) -> float:
        return _LEFT + _INSET + (_RIGHT - _LEFT - 2 * _INSET) * i / max(1, len(points) - 1)

    def y_position(value: float) -> float:
        return _TOP + _HEIGHT * (1 - (value - low) / ((high - low) or 1.0))

    draw.rect(_LEFT, _TOP, _RIGHT - _LEFT, _HEIGHT, theme.panel, r=4, stroke=theme.grid)
    for tick in axes.linear_ticks(low, high, 4):
        draw.line(_LEFT, y_position(tick), _RIGHT, y_position(tick), theme.grid)
        draw.text(
            _LEFT - 6,
            y_position(tick) + 4,
            axes.format_number(tick),
            theme.muted,
            size=11,
            anchor="end",
            css_class="tick",
        )
    if reference is not None:
        draw.line(_LEFT, y_position(reference), _RIGHT, y_position(reference), theme.muted, stroke_dasharray="4 4")
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
            x_position(i), _TOP + _HEIGHT + 16, step.name, theme.muted, size=11, anchor="middle", css_class="strength"
        )
    return draw.to_inline_svg(_TOP + _HEIGHT + 24)
