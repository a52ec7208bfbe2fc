"""The picture of small.json: a row per model; size, accuracy and time side by side, in the colours of the screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from outstation.foundation.render import axes
from outstation.foundation.render.svg import Drawing
from outstation.foundation.render.theme import PAGE_THEME, adaptive_css

WIDTH = 1000.0
MARGIN, NAME_W, GAP, VALUE_W = 24.0, 172.0, 26.0, 54.0
ROW, GROUP, HEAD, UNDER = 27.0, 36.0, 104.0, 60.0
PANEL_W = (WIDTH - 2 * MARGIN - NAME_W - 3 * GAP) / 3
PANELS = tuple(MARGIN + NAME_W + GAP + i * (PANEL_W + GAP) for i in range(3))
PLOT_W = PANEL_W - VALUE_W
OTHERS, SHIPPED = PAGE_THEME.reference_edge, PAGE_THEME.series[0]


@dataclass(frozen=True)
class Axis:
    """`at` gives the place of a figure in its panel, which begins at `left`."""

    left: float
    at: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]


def picture(found: dict[str, Any]) -> str:
    """An SVG document that follows the reader's light or dark."""
    rows: list[dict[str, Any]] = found["variants"]
    draw = Drawing(WIDTH, "The exercise model made small: size, accuracy and time of each way")
    groups = [(network, list(some)) for network, some in groupby(rows, lambda one: one["network"])]
    bottom = HEAD + sum(GROUP + ROW * len(some) for _, some in groups) + 6
    size, accuracy, pace = _sizes(rows), _accuracies(rows), _paces(rows)
    _heads(draw, found)
    y = HEAD
    for network, some in groups:
        draw.text(
            MARGIN,
            y + 23,
            network[:1].upper() + network[1:],
            PAGE_THEME.ink,
            size=12.5,
            weight=600,
            css_class="network",
        )
        draw.text(PANELS[0], y + 23, f"{some[0]['parameters']:,} parameters", PAGE_THEME.muted, size=11.5)
        if any("seeds" in one for one in some):
            draw.text(PANELS[1], y + 23, "small dots: each seed, as float", PAGE_THEME.muted, size=11.5)
        y += GROUP
        _grid(draw, (size, accuracy, pace), y, y + ROW * len(some))
        x = accuracy.at(rows[0]["accuracy"][0])
        draw.line(x, y, x, y + ROW * len(some), PAGE_THEME.muted, stroke_dasharray="3 3", css_class="float32")
        for one in some:
            _row(draw, one, y, size, accuracy, pace)
            y += ROW
    for axis in (size, accuracy, pace):
        for value, label in axis.ticks:
            draw.text(axis.at(value), bottom + 11, label, PAGE_THEME.muted, size=11, anchor="middle", css_class="tick")
    draw.text(
        MARGIN, bottom + 42, f"Times: {found['machine']}; {found['runtime']}, one thread", PAGE_THEME.muted, size=11
    )
    return draw.to_svg_document(bottom + UNDER, PAGE_THEME.paper, adaptive_css())


def _heads(draw: Drawing, found: dict[str, Any]) -> None:
    draw.text(MARGIN, 36, "The exercise model, made small", PAGE_THEME.ink, size=19, weight=600)
    told = f"{found['windows']} windows of three people no network here has seen; blue is what ships"
    draw.text(MARGIN, 56, told, PAGE_THEME.muted, size=12.5)
    titles = (
        ("Size", "kB"),
        ("Accuracy", "95 %, over people; dashed: float32"),
        ("Time of a window", "µs; ring: one by one, dot: in batches"),
    )
    for x, (title, unit) in zip(PANELS, titles, strict=True):
        draw.text(x, 84, title, PAGE_THEME.ink, size=13, weight=600)
        draw.text(x, 99, unit, PAGE_THEME.muted, size=11)


def _grid(draw: Drawing, panels: Sequence[Axis], top: float, bottom: float) -> None:
    for axis in panels:
        for value, _ in axis.ticks:
            draw.line(axis.at(value), top, axis.at(value), bottom, PAGE_THEME.grid)


def _row(draw: Drawing, one: dict[str, Any], y: float, size: Axis, accuracy: Axis, pace: Axis) -> None:
    ships = "shipped" in one["name"]
    color, middle = (SHIPPED if ships else OTHERS), y + ROW / 2
    if ships:
        draw.rect(MARGIN - 8, y, WIDTH - 2 * MARGIN + 16, ROW, SHIPPED, r=5, fill_opacity="0.10", css_class="shipped")
    weight = 600 if ships else 400
    draw.text(MARGIN, middle + 4, one["name"], PAGE_THEME.ink, size=12.5, weight=weight, css_class="name")
    draw.rect(size.left, middle - 6, size.at(one["bytes"] / 1000) - size.left, 12, color, r=2, css_class="size")
    _value(draw, 0, middle, f"{one['bytes'] / 1000:.1f}")
    value, low, high = one["accuracy"]
    draw.line(accuracy.at(low), middle, accuracy.at(high), middle, color, stroke_width="2.5", stroke_linecap="round")
    draw.circle(accuracy.at(value), middle, 5, color, css_class="accuracy")
    for seed in one.get("seeds", ()):
        draw.circle(accuracy.at(seed), middle + 7, 2, PAGE_THEME.muted, css_class="seed")
    _value(draw, 1, middle, f"{value:.3f}")
    alone, best = pace.at(one["us_one"]), pace.at(one["us_best"])
    draw.line(best, middle, alone, middle, color, stroke_width="1.5")
    draw.circle(alone, middle, 4.5, PAGE_THEME.paper, stroke=color, stroke_width="2", css_class="one")
    draw.circle(best, middle, 5, color, css_class="best")
    _value(draw, 2, middle, decimals(one["us_best"]))


def _value(draw: Drawing, panel: int, y: float, text: str) -> None:
    draw.text(PANELS[panel] + PANEL_W, y + 4, text, PAGE_THEME.ink, size=12, anchor="end", css_class="value")


def decimals(value: float) -> str:
    """About three digits: 3.92, 20.0, 1,300."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _sizes(rows: list[dict[str, Any]]) -> Axis:
    most = max(one["bytes"] for one in rows) / 1000
    return _linear(0, 0.0, most, lambda value: f"{value:.0f}")


def _accuracies(rows: list[dict[str, Any]]) -> Axis:
    shown = [figure for one in rows for figure in (*one["accuracy"], *one.get("seeds", ()))]
    low, high = min(shown), max(shown)
    return _linear(1, low - 0.01, min(1.0, high + 0.01), lambda value: f"{value:.2f}")


def _linear(panel: int, low: float, high: float, label: Callable[[float], str]) -> Axis:
    def at(value: float) -> float:
        return PANELS[panel] + PLOT_W * (value - low) / (high - low)

    return Axis(PANELS[panel], at, [(tick, label(tick)) for tick in axes.linear_ticks(low, high, 4)])


def _paces(rows: list[dict[str, Any]]) -> Axis:
    """In powers: models differ by tens."""
    figures = [one[key] for one in rows for key in ("us_one", "us_best")]
    low, high = math.log10(min(figures) / 1.3), math.log10(max(figures) * 1.3)

    def at(value: float) -> float:
        return PANELS[2] + PLOT_W * (math.log10(value) - low) / (high - low)

    marks = [m * 10**power for power in range(-1, 6) for m in (1, 3)]
    return Axis(PANELS[2], at, [(mark, f"{mark:,.0f}") for mark in marks if low < math.log10(mark) < high])


if __name__ == "__main__":
    raise SystemExit("run show_small.py")
