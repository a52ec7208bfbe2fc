"""Panels of a drift plot: a field with its state, its distribution, its evidence over time, and expected accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from agent.render import axes
from agent.render.drift_model import (
    AXIS_LABEL_HEIGHT,
    HISTOGRAM_WIDTH,
    HISTOGRAM_X,
    MARGIN,
    NAME_WIDTH,
    TIME_WIDTH,
    TIME_X,
    AccuracyEstimate,
    Canvas,
    EvidenceCurve,
    Panel,
    PlotRow,
    StateInterval,
    series_color,
)
from agent.render.svg import truncate_text

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


def draw_row(canvas: Canvas, row: PlotRow, panel: Panel) -> None:
    """Draw a field's name and state, distribution and evidence."""
    _draw_name(canvas, row, panel)
    if row.reference or row.histograms:
        _draw_distribution(canvas, row, Panel(HISTOGRAM_X, panel.y, HISTOGRAM_WIDTH, panel.height))
    _draw_evidence(canvas, row, Panel(TIME_X, panel.y, TIME_WIDTH, panel.height))


def _draw_name(canvas: Canvas, row: PlotRow, panel: Panel) -> None:
    draw, theme = canvas.drawing, canvas.theme
    title = f"{row.name} ({row.unit})" if row.unit else row.name
    draw.rect(panel.x, panel.y, 3, panel.height, theme.state_color(row.state), r=1.5, css_class=f"state-{row.state}")
    draw.text(
        panel.x + 12,
        panel.y + 13,
        truncate_text(title, 14, NAME_WIDTH - 24),
        theme.ink,
        size=14,
        weight=600,
        css_class="field",
    )
    y = panel.y + 30
    draw.text(
        panel.x + 12, y, STATE_LABELS.get(row.state, row.state), theme.state_color(row.state), size=11.5, weight=600
    )
    for note in row.notes:
        y += 15
        if y <= panel.bottom + AXIS_LABEL_HEIGHT:
            draw.text(panel.x + 12, y, truncate_text(note, 11, NAME_WIDTH - 20), theme.muted, size=11, css_class="note")


def _draw_distribution(canvas: Canvas, row: PlotRow, panel: Panel) -> None:
    draw, theme = canvas.drawing, canvas.theme
    draw.rect(panel.x, panel.y, panel.width, panel.height, theme.panel)
    shapes = [*([row.reference] if row.reference else []), *(counts for _, counts in row.histograms)]
    bounds = row.bounds or list(range(len(shapes[0]) - 1))
    low, high = visible_range(bounds, shapes)
    outlines = [rebin(bounds, counts, low, high) for counts in shapes]
    # A resting value may hold half of all rows, so the highest bins are cut off.
    tall = max(_peak_height(outline) for outline in outlines) or 1.0
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


def _peak_height(outline: Sequence[float]) -> float:
    ordered = sorted(outline)
    return min(ordered[-1], 2.2 * ordered[-4] if ordered[-4] > 0 else ordered[-1])


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
        _draw_band(canvas, interval, panel, shaded=not several)
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
        draw.line(
            panel.x,
            y,
            panel.x + panel.width,
            y,
            theme.limit,
            css_class="limit",
            stroke_dasharray="2 3",
            stroke_width="1.2",
        )
    for curve in row.curves:
        color = series_color(theme, curve.series if several or not curve.dashed else curve.series + 1)
        _draw_curve(canvas, curve, panel, top, color)
    for interval in tested:
        _draw_alert_markers(
            canvas,
            interval,
            panel,
            series_color(theme, interval.series) if several else theme.state_color(interval.state),
        )


def _draw_band(canvas: Canvas, interval: StateInterval, panel: Panel, *, shaded: bool) -> None:
    theme = canvas.theme
    x, end = canvas.time_to_x(interval.begin), canvas.time_to_x(interval.end)
    fill = theme.drift_band if interval.state == "drift" else theme.fault_band
    opacity = "1" if shaded else "0.5"
    canvas.drawing.rect(
        x, panel.y, max(1.5, end - x), panel.height, fill, css_class=f"band-{interval.state}", fill_opacity=opacity
    )


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
        canvas.drawing.path(
            triangle,
            color,
            fill=color if raised else canvas.theme.paper,
            closed=True,
            css_class=name,
            stroke_width="1.2",
        )


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


def _moving_average(values: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return trailing means over `SMOOTHING_WINDOW` estimates: a single estimate rests on few results."""
    averages = []
    for i in range(len(values)):
        window = values[max(0, i - SMOOTHING_WINDOW + 1) : i + 1]
        averages.append((values[i][0], sum(v for _, v in window) / len(window)))
    return averages


def draw_estimates(canvas: Canvas, estimates: Sequence[AccuracyEstimate], y: float) -> float:
    """Draw expected accuracy. Return the y coordinate below it."""
    draw, theme = canvas.drawing, canvas.theme
    panel = Panel(TIME_X, y + 6, TIME_WIDTH, ESTIMATE_HEIGHT)
    draw.text(MARGIN + 12, panel.y + 13, "expected accuracy", theme.ink, size=14, weight=600)
    draw.text(
        MARGIN + 12,
        panel.y + 30,
        "without labels, assuming scores as calibrated as on the reference data",
        theme.muted,
        size=11,
    )
    alone = "; shaded: 95 % interval of each" if len(estimates) == 1 else ""
    draw.text(MARGIN + 12, panel.y + 45, f"mean of {SMOOTHING_WINDOW} estimates{alone}", theme.muted, size=11)
    draw.rect(panel.x, panel.y, panel.width, panel.height, theme.panel)
    known = [v for e in estimates for v in (*(e.low if len(estimates) == 1 else ()), *e.values) if v is not None]
    low = max(0.0, min([0.9, *known]) - 0.03)
    _draw_grid(canvas, panel, low, 1.0, lambda value: f"{100 * value:.0f} %")

    def to_point(t: int, value: float) -> tuple[float, float]:
        return canvas.time_to_x(t), panel.bottom - panel.height * (min(1.0, max(low, value)) - low) / (1.0 - low)

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
        draw.path([to_point(t, v) for t, v in _moving_average(values)], color, css_class="estimate", stroke_width="2")
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
    edges = [low + (high - low) * i / BIN_COUNT for i in range(BIN_COUNT + 1)]
    cumulative = [_cumulative_count(bounds, counts, edge) for edge in edges]
    return [(b - a) / total for a, b in pairwise(cumulative)]


def _cumulative_count(bounds: Sequence[float], counts: Sequence[int], value: float) -> float:
    done = 0.0
    for left, right, count in zip(bounds[:-1], bounds[1:], counts[1:-1], strict=True):
        if value >= right:
            done += count
        elif value > left:
            return done + count * (value - left) / (right - left)
        else:
            break
    return done


def _quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float:
    inner = counts[1:-1]
    target = share * sum(inner)
    sums = list(accumulate(inner))
    bin_index = next((i for i, total in enumerate(sums) if total >= target and inner[i]), len(inner) - 1)
    below = sums[bin_index] - inner[bin_index]
    return bounds[bin_index] + (bounds[bin_index + 1] - bounds[bin_index]) * (target - below) / max(1, inner[bin_index])
