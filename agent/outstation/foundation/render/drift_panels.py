"""Panels of a drift plot: a field with its state, its distribution, its evidence over time, and expected accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import msgspec
import numpy as np

from outstation.foundation.render import axes
from outstation.foundation.render.drift_model import EvidenceCurve, PerformanceEstimate, PlotRow, StateInterval
from outstation.foundation.render.svg import Drawing, truncate_text
from outstation.foundation.render.theme import Theme

WIDTH = 1120.0
MARGIN = 28.0
NAME_WIDTH, HISTOGRAM_WIDTH, GAP = 156.0, 300.0, 56.0
HISTOGRAM_X = MARGIN + NAME_WIDTH
TIME_X = HISTOGRAM_X + HISTOGRAM_WIDTH + GAP
TIME_WIDTH = WIDTH - MARGIN - TIME_X
AXIS_LABEL_HEIGHT = 17.0  # below a panel
ESTIMATE_HEIGHT = 96.0
STATE_LABELS = {
    "ok": "as usual",
    "drift": "drift",
    "fault": "sensor fault",
    "insufficient": "learning",
    "untested": "not tested now",
}
MAX_LIMIT_MULTIPLE = 4.0  # evidence is cut off above this multiple of its limit
DEFAULT_LIMIT = 5.0  # for the scale, if no limit is known
SMOOTHING_WINDOW = 5  # estimates in a mean, each of a window or a run of windows
BIN_COUNT = 44
_TAIL_SHARE = 1 / 32  # share of rows that may lie outside the visible range on either side
_RANGE_PAD = 0.22


class Panel(msgspec.Struct, frozen=True):
    x: float
    y: float
    width: float
    height: float

    @property
    def bottom(self) -> float:
        return self.y + self.height


class Canvas(msgspec.Struct, frozen=True):
    """Drawing, theme, and the common time axis."""

    drawing: Drawing
    theme: Theme
    begin: int
    end: int

    def time_to_x(self, us: int) -> float:
        return TIME_X + TIME_WIDTH * (us - self.begin) / (self.end - self.begin)


def series_color(theme: Theme, index: int) -> str:
    return theme.series[index % len(theme.series)]


def draw_row(canvas: Canvas, row: PlotRow, panel: Panel) -> None:
    draw, theme = canvas.drawing, canvas.theme
    title = f"{row.name} ({row.unit})" if row.unit else row.name
    draw.rect(panel.x, panel.y, 3, panel.height, theme.state_color(row.state), r=1.5, css_class=f"state-{row.state}")
    name, state, color = truncate_text(title, 14, NAME_WIDTH - 24), row.state, theme.state_color(row.state)
    draw.text(panel.x + 12, panel.y + 13, name, theme.ink, size=14, weight=600, css_class="field")
    y = panel.y + 30
    draw.text(panel.x + 12, y, STATE_LABELS.get(state, state), color, size=11.5, weight=600)
    for note in row.notes:
        y += 15
        if y <= panel.bottom + AXIS_LABEL_HEIGHT:
            draw.text(panel.x + 12, y, truncate_text(note, 11, NAME_WIDTH - 20), theme.muted, size=11, css_class="note")
    if row.reference or row.histograms:
        _draw_distribution(canvas, row, Panel(HISTOGRAM_X, panel.y, HISTOGRAM_WIDTH, panel.height))
    _draw_evidence(canvas, row, Panel(TIME_X, panel.y, TIME_WIDTH, panel.height))


def _draw_distribution(canvas: Canvas, row: PlotRow, panel: Panel) -> None:
    draw, theme = canvas.drawing, canvas.theme
    draw.rect(panel.x, panel.y, panel.width, panel.height, theme.panel)
    shapes = [*([row.reference] if row.reference else []), *(counts for _, counts in row.histograms)]
    bounds = row.bounds or list(range(len(shapes[0]) - 1))
    low, high = visible_range(bounds, shapes)
    outlines = [rebin(bounds, counts, low, high) for counts in shapes]
    # A resting value may hold half of all rows, so the highest bins are cut off.
    ordered = [sorted(outline) for outline in outlines]
    tall = max(min(heights[-1], 2.2 * heights[-4] or heights[-1]) for heights in ordered) or 1.0
    if row.reference:
        usual = _step_points(outlines.pop(0), tall, panel)
        draw.path(usual, theme.reference_edge, fill=theme.reference, closed=True, css_class="usual", stroke_width="1")
    for (series, _), heights in zip(row.histograms, outlines, strict=True):
        line = _step_points(heights, tall, panel)[1:-1]
        draw.path(line, series_color(theme, series), css_class="shown", stroke_width="1.8")
    draw.line(panel.x, panel.bottom, panel.x + panel.width, panel.bottom, theme.reference_edge)
    for value in axes.linear_ticks(low, high, 5):
        x = panel.x + panel.width * (value - low) / (high - low)
        draw.line(x, panel.bottom, x, panel.bottom + 3, theme.reference_edge)
        draw.text(x, panel.bottom + 14, axes.format_number(value), theme.muted, size=10.5, anchor="middle")


def _step_points(heights: Sequence[float], peak: float, panel: Panel) -> list[tuple[float, float]]:
    step = panel.width / len(heights)
    points = [(panel.x, panel.bottom)]
    for i, height in enumerate(heights):
        y = panel.bottom - (panel.height - 4) * min(1.0, height / peak)
        points += [(panel.x + i * step, y), (panel.x + (i + 1) * step, y)]
    return [*points, (panel.x + panel.width, panel.bottom)]


def _draw_evidence(canvas: Canvas, row: PlotRow, panel: Panel) -> None:
    draw, theme = canvas.drawing, canvas.theme
    draw.rect(panel.x, panel.y, panel.width, panel.height, theme.panel)
    several = len({curve.series for curve in row.curves}) > 1
    tested = [interval for interval in row.intervals if interval.state != "insufficient"]
    for interval in tested:
        x, end = canvas.time_to_x(interval.begin), canvas.time_to_x(interval.end)
        fill = theme.drift_band if interval.state == "drift" else theme.fault_band
        opacity, width = "0.5" if several else "1", max(1.5, end - x)
        draw.rect(x, panel.y, width, panel.height, fill, css_class=f"band-{interval.state}", fill_opacity=opacity)
    highest = max((v for curve in row.curves for v in curve.values if v is not None), default=0.0)
    limit = row.limit or DEFAULT_LIMIT
    top = min(max(1.25 * limit, 1.06 * highest), MAX_LIMIT_MULTIPLE * limit)
    _draw_grid(canvas, panel, 0.0, top, axes.format_number)
    for interval in row.intervals:
        if interval.state == "insufficient":
            _draw_learning(canvas, interval, panel)
    if highest > top:
        text = f"up to {axes.format_number(highest)}"
        draw.text(panel.x + panel.width, panel.y - 4, text, theme.muted, size=10.5, anchor="end", css_class="beyond")
    if row.limit is not None:
        y = panel.bottom - panel.height * row.limit / top
        ends = panel.x, y, panel.x + panel.width, y
        draw.line(*ends, theme.limit, css_class="limit", stroke_dasharray="2 3", stroke_width="1.2")
    for curve in row.curves:
        color = series_color(theme, curve.series if several or not curve.dashed else curve.series + 1)
        _draw_curve(canvas, curve, panel, top, color)
    for interval in tested:
        color = series_color(theme, interval.series) if several else theme.state_color(interval.state)
        _draw_alert_markers(canvas, interval, panel, color)


def _draw_learning(canvas: Canvas, interval: StateInterval, panel: Panel) -> None:
    """Label the learning phase if there is room; nothing is tested in it."""
    begin, end = canvas.time_to_x(interval.begin), canvas.time_to_x(interval.end)
    if end - begin > 60:
        middle, y = (begin + end) / 2, panel.y + panel.height / 2
        canvas.drawing.rect(middle - 30, y - 9, 60, 18, canvas.theme.panel)
        canvas.drawing.text(middle, y + 4, "learning", canvas.theme.unknown, size=11, anchor="middle")


def _draw_alert_markers(canvas: Canvas, interval: StateInterval, panel: Panel, color: str) -> None:
    """Draw a filled mark at the raising of an alert and a hollow one at its clearing."""
    for time, raised in ((interval.begin, True), *(() if interval.ongoing else ((interval.end, False),))):
        x, y = canvas.time_to_x(time), panel.y
        name = "raised" if raised else "cleared"
        triangle = [(x - 5, y - 5), (x + 5, y - 5), (x, y + 3)]
        fill = color if raised else canvas.theme.paper
        canvas.drawing.path(triangle, color, fill=fill, closed=True, css_class=name, stroke_width="1.2")


def _draw_curve(canvas: Canvas, curve: EvidenceCurve, panel: Panel, top: float, color: str) -> None:
    run: list[tuple[float, float]] = []
    dashes = "5 3" if curve.dashed else "none"

    def flush_run() -> None:
        if len(run) == 1:
            canvas.drawing.circle(*run[0], 2.2, color, css_class="curve")
        else:
            canvas.drawing.path(run, color, css_class="curve", stroke_width="1.6", stroke_dasharray=dashes)

    for t, value in zip(curve.times, curve.values, strict=True):
        if value is None:
            flush_run()
            run = []
        else:
            run.append((canvas.time_to_x(t), panel.bottom - panel.height * min(1.0, value / top)))
    flush_run()


def _draw_grid(canvas: Canvas, panel: Panel, low: float, high: float, label: Callable[[float], str]) -> None:
    for t, _ in axes.time_ticks(canvas.begin, canvas.end, 8):
        canvas.drawing.line(canvas.time_to_x(t), panel.y, canvas.time_to_x(t), panel.bottom, canvas.theme.grid)
    for value in axes.linear_ticks(low, high, 5 if panel.height > 90 else 3 if panel.height > 70 else 2):
        y = panel.bottom - panel.height * (value - low) / (high - low)
        canvas.drawing.line(panel.x, y, panel.x + panel.width, y, canvas.theme.grid)
        canvas.drawing.text(panel.x - 7, y + 4, label(value), canvas.theme.muted, size=10.5, anchor="end")


def draw_estimates(canvas: Canvas, estimates: Sequence[PerformanceEstimate], y: float) -> float:
    """Draw expected accuracy, or expected error. Return the y coordinate below it."""
    draw, theme = canvas.drawing, canvas.theme
    panel = Panel(TIME_X, y + 6, TIME_WIDTH, ESTIMATE_HEIGHT)
    is_error = any(estimate.is_error for estimate in estimates)
    title = "expected mean absolute error" if is_error else "expected accuracy"
    draw.text(MARGIN + 12, panel.y + 13, title, theme.ink, size=14, weight=600)
    basis = (
        "inputs and truth related as in the held-out data"
        if is_error
        else "scores as calibrated as on the reference data"
    )
    assumption = f"without labels, assuming {basis}"
    draw.text(MARGIN + 12, panel.y + 30, assumption, theme.muted, size=11)
    alone = "; shaded: 95 % interval of each" if len(estimates) == 1 else ""
    draw.text(MARGIN + 12, panel.y + 45, f"mean of {SMOOTHING_WINDOW} estimates{alone}", theme.muted, size=11)
    draw.rect(panel.x, panel.y, panel.width, panel.height, theme.panel)
    known = [v for e in estimates for v in (*(e.low if len(estimates) == 1 else ()), *e.values) if v is not None]
    if is_error:
        highest = max([v for e in estimates for v in (*e.high, *e.values) if v is not None], default=1.0) or 1.0
        low, top = 0.0, 1.05 * highest
        _draw_grid(canvas, panel, low, top, lambda value: f"{value:.3g}")
    else:
        low, top = max(0.0, min([0.9, *known]) - 0.03), 1.0
        _draw_grid(canvas, panel, low, top, lambda value: f"{100 * value:.0f} %")

    def to_point(t: int, value: float) -> tuple[float, float]:
        return canvas.time_to_x(t), panel.bottom - panel.height * (min(top, max(low, value)) - low) / (top - low)

    for estimate in estimates:
        color = series_color(theme, estimate.series)
        ends = [
            (t, a, b)
            for t, a, b in zip(estimate.times, estimate.low, estimate.high, strict=True)
            if a is not None and b is not None
        ]
        if len(estimates) == 1:
            ring = [to_point(t, a) for t, a, _ in ends] + [to_point(t, b) for t, _, b in reversed(ends)]
            draw.path(ring, "none", fill=color, closed=True, css_class="interval", fill_opacity="0.16")
        values = [(t, v) for t, v in zip(estimate.times, estimate.values, strict=True) if v is not None]
        points = []
        for i, (t, _) in enumerate(values):
            # A single estimate rests on few results.
            window = values[max(0, i - SMOOTHING_WINDOW + 1) : i + 1]
            points.append(to_point(t, sum(v for _, v in window) / len(window)))
        draw.path(points, color, css_class="estimate", stroke_width="2")
    return panel.bottom


def visible_range(bounds: Sequence[float], histograms: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return the range that holds all but the tails of every histogram, with a margin."""
    inner = [counts for counts in histograms if sum(counts[1:-1])]
    if not inner:
        return bounds[0], bounds[-1]
    low = min(_quantile(bounds, counts, _TAIL_SHARE) for counts in inner)
    high = max(_quantile(bounds, counts, 1 - _TAIL_SHARE) for counts in inner)
    pad = _RANGE_PAD * (high - low) or max(abs(high), 1.0) * 0.05
    return max(low - pad, bounds[0] - pad / 8), min(high + pad, bounds[-1] + pad / 8)


def rebin(bounds: Sequence[float], counts: Sequence[int], low: float, high: float) -> list[float]:
    """Return the share of rows in each of `BIN_COUNT` equal bins from `low` to `high`.

    Rows of a source bin count as spread evenly. Quantile bins differ in width up to a hundredfold, and drawn as they
    are the narrow ones would hide the rest.
    """
    total = sum(counts)
    if not total:
        return [0.0] * BIN_COUNT
    edges = np.linspace(low, high, BIN_COUNT + 1)
    cumulative = np.interp(edges, bounds, [0, *accumulate(counts[1:-1])])
    shares: list[float] = (np.diff(cumulative) / total).tolist()
    return shares


def _quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float:
    inner = counts[1:-1]
    target = share * sum(inner)
    sums = list(accumulate(inner))
    bin_index = next((i for i, total in enumerate(sums) if total >= target and inner[i]), len(inner) - 1)
    below = sums[bin_index] - inner[bin_index]
    return bounds[bin_index] + (bounds[bin_index + 1] - bounds[bin_index]) * (target - below) / max(1, inner[bin_index])
