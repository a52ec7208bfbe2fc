"""How often answers were right, beside how certain they were."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent.render import axes
from agent.render.svg import Drawing
from agent.render.theme import PAGE_THEME, Theme

WIDTH = 360.0
_LEFT, _TOP, _SIZE, _RIGHT = 44.0, 10.0, 296.0, 340.0


class ReliabilityPoint(msgspec.Struct, frozen=True):
    """Answers with about this `score`, of which a share was `right`."""

    score: float
    accuracy: float
    low: float | None
    high: float | None
    n: int


def render_reliability(points: Sequence[ReliabilityPoint], *, theme: Theme = PAGE_THEME) -> str:
    """An inline SVG: on the diagonal, scores are right as often as they say; above it they are too modest."""
    draw = Drawing(WIDTH, "Reliability: share of right answers by score")
    least = min(
        [d.score for d in points] + [d.accuracy for d in points] + [d.low for d in points if d.low is not None] + [0.9]
    )
    low = max(0.0, (least - 0.05) // 0.1 / 10)

    def x(value: float) -> float:
        return _LEFT + _SIZE * (value - low) / (1 - low)

    def y(value: float) -> float:
        return _TOP + _SIZE * (1 - (value - low) / (1 - low))

    draw.rect(_LEFT, _TOP, _SIZE, _SIZE, theme.panel, r=4, stroke=theme.grid)
    for step in axes.linear_ticks(low, 1.0, 6):
        draw.line(x(step), _TOP, x(step), _TOP + _SIZE, theme.grid)
        draw.line(_LEFT, y(step), _RIGHT, y(step), theme.grid)
        draw.text(
            x(step),
            _TOP + _SIZE + 16,
            axes.format_number(step),
            theme.muted,
            size=11,
            anchor="middle",
            css_class="tick",
        )
        draw.text(
            _LEFT - 6, y(step) + 4, axes.format_number(step), theme.muted, size=11, anchor="end", css_class="tick"
        )
    draw.line(x(low), y(low), x(1), y(1), theme.muted, stroke_dasharray="4 4", css_class="diagonal")
    for dot in points:
        if dot.low is not None and dot.high is not None:
            draw.line(x(dot.score), y(max(dot.low, low)), x(dot.score), y(dot.high), theme.series[0], stroke_width="2")
    draw.path(
        [(x(dot.score), y(dot.accuracy)) for dot in points], theme.series[0], stroke_width="1.5", stroke_opacity="0.5"
    )
    for dot in points:
        draw.circle(x(dot.score), y(dot.accuracy), 4.5, theme.series[0], css_class="bin")
    draw.text(_LEFT + _SIZE / 2, _TOP + _SIZE + 34, "mean score of a bin", theme.muted, size=11.5, anchor="middle")
    draw.text(_LEFT + 10, _TOP + 20, "share that was right", theme.muted, size=11.5)
    return draw.to_inline_svg(_TOP + _SIZE + 42)
