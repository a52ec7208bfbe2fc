"""Chart of monthly cost by number of devices: models on the devices, and readings in a cloud."""

from __future__ import annotations

import math

from agent.costs.estimate import Comparison
from agent.render.svg import Drawing
from agent.render.theme import Theme

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
