"""Cost of a window by backlog and by batch size, as a chart: the whole device and the interpreter alone."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import click
import msgspec
import numpy as np

from outstation.device.pipeline import batch as batches
from outstation.foundation import clock
from outstation.foundation.render.svg import Drawing
from outstation.foundation.render.theme import PAGE_THEME, adaptive_css
from outstation.ml.datasets.recordings import load
from outstation.ml.model.inference.runtime import TfliteModel
from outstation.workbench.simulate.scenario import SCENARIOS
from scripts.benchmarks import Report, Section, benchmark, catalogue, device_task, page
from scripts.benchmarks.device_task import Bed, Floats

CHART = "docs/images/benchmark-cost.svg"
SECTION = "Cost by backlog and by batch size"
BACKLOGS = (1, 4, 16, 64, 256, 2048)
DIVISORS = (512, 128, 32, 8, 1)  # of the largest batch
_LARGE = 2048
# Windows of a timed turn, so that a small backlog is timed long enough.
_TURN_WINDOWS, _ROUNDS, _MOST_LEARNING_RUNS = 32, 2, 4
_WIDTH, _HEIGHT, _PANEL_WIDTH, _TOP, _LEFT, _GAP = 760.0, 300.0, 300.0, 56.0, 58.0, 84.0
_BOTTOM = 246.0
# Of the device, and of the interpreter alone.
_DASHES = ("none", "5 4")


class Point(msgspec.Struct, frozen=True):
    """CPU time per window in µs of the whole device and of the interpreter, for batches or backlogs of `windows`."""

    windows: int
    device_us: float
    interpreter_us: float


@benchmark("cost-curve")
def cost_curve() -> Report:
    """Measure the exercise model from stored rows to signed results."""
    recorded = load(SCENARIOS["exercise"].file).rows
    names = [name for name, _ in SCENARIOS["exercise"].fields]
    with device_task.device_with_task(names, "exercise") as device:
        model = TfliteModel(device.task.bundle.model_bytes)
        rows = np.resize(recorded, (BACKLOGS[-1] * device.task.window_rows, len(names)))
        learn_site(device, rows)
        by_backlog = [measure_backlog(device, model, rows, windows) for windows in BACKLOGS]
        by_batch = [measure_batch(device, model, rows, divisor) for divisor in DIVISORS]
    text = render_text(by_backlog, by_batch)
    charts = {CHART: render_chart(by_backlog, by_batch)}
    return Report([], text, Section(catalogue.MAIN, SECTION, text, charts))


def learn_site(device: Bed, rows: Floats) -> None:
    """Learn the site's reference first: a batch in which it is learned costs several times as much."""
    for _ in range(_MOST_LEARNING_RUNS):
        device.fill(rows)
        device.work_off()
        if device.task.drift is not None and device.task.drift.state.site_reference is not None:
            return
    raise click.ClickException("the recordings are too few for the site's reference: increase the rows that it learns")


def measure_backlog(device: Bed, model: TfliteModel, rows: Floats, windows: int) -> Point:
    """Measure the work on a backlog of windows, each of which follows the one before."""
    size, turns, begin = windows * device.task.window_rows, max(1, _TURN_WINDOWS // windows), 0

    def work_off() -> float:
        nonlocal begin
        spent = 0.0
        for _ in range(turns):
            device.fill(rows.take(np.arange(begin, begin + size), axis=0, mode="wrap"))
            begin += size
            began = time.process_time()
            device.work_off()
            spent += time.process_time() - began
        return spent / (turns * windows)

    return Point(windows, _median_us(work_off), _interpreter_us(model, min(windows, 512)))


def measure_batch(device: Bed, model: TfliteModel, rows: Floats, divisor: int) -> Point:
    """Measure a large backlog in batches that are `divisor` times smaller than the largest."""
    sizes: list[int] = []

    def work_off() -> float:
        device.fill(rows[: _LARGE * device.task.window_rows])
        began = time.process_time()
        while True:
            # Each batch that succeeds halves it.
            device.task.size.divisor = divisor
            step = batches.run(device.task, device.store, device.author, clock.read())
            if step is None:
                return (time.process_time() - began) / _LARGE
            sizes.append(step.windows)

    us = _median_us(work_off)
    device.task.size.divisor = 1
    windows = round(statistics.median(sizes))
    return Point(windows, us, _interpreter_us(model, windows))


def _median_us(work: Callable[[], float]) -> float:
    work()
    return 1e6 * statistics.median(work() for _ in range(_ROUNDS))


def _interpreter_us(model: TfliteModel, windows: int) -> float:
    values = np.zeros((windows, *model.input_shape), np.float32)

    def invoke() -> float:
        turns = max(1, _TURN_WINDOWS // windows)
        began = time.process_time()
        for _ in range(turns):
            model.invoke(values)
        return (time.process_time() - began) / (turns * windows)

    return _median_us(invoke)


def render_text(by_backlog: Sequence[Point], by_batch: Sequence[Point]) -> str:
    """Return the chart's Markdown, and its points as a table."""
    lines = [
        f"![CPU time of a window by backlog and by batch size, device and interpreter]({CHART})",
        "",
        "`scripts/bench cost-curve`: CPU µs a window of the exercise model, from stored rows to signed results,",
        "interpreter alone in brackets, after the site's reference is learned. Left: so many windows wait. Right:",
        f"{_LARGE:,} wait, batches have so many.",
        "",
    ]
    for name, points in (("windows waiting", by_backlog), ("windows a batch", by_batch)):
        cells = [f"{point.windows:,}: {point.device_us:,.0f} ({point.interpreter_us:.0f})" for point in points]
        lines.append(f"- {name}: {' · '.join(cells)}")
    lines += ["", f"Measured: {page.describe_run()}."]
    return "\n".join(lines)


def render_chart(by_backlog: Sequence[Point], by_batch: Sequence[Point]) -> str:
    """Return an SVG file: two panels with logarithmic axes, and the interpreter as a dashed line."""
    draw = Drawing(_WIDTH, "CPU time of a window of the exercise model by backlog and by batch size")
    costs = [us for point in (*by_backlog, *by_batch) for us in (point.device_us, point.interpreter_us)]
    low, high = (math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs))))
    panels = (("by backlog: windows that wait", by_backlog), ("by batch size: windows a batch", by_batch))
    for number, (title, points) in enumerate(panels):
        _draw_panel(draw, _LEFT + number * (_PANEL_WIDTH + _GAP), title, points, (low, high))
    draw.text(_LEFT, 20, "CPU µs a window, exercise model", PAGE_THEME.ink, size=14, weight=600)
    for i, (name, dashes) in enumerate(zip(("device", "interpreter alone"), _DASHES, strict=True)):
        x = _WIDTH - 268 + 100 * i
        draw.line(x, 16, x + 26, 16, PAGE_THEME.series[i], stroke_width="2", stroke_dasharray=dashes)
        draw.text(x + 32, 20, name, PAGE_THEME.muted, size=12)
    return draw.to_svg_document(_HEIGHT, PAGE_THEME.paper, adaptive_css())


def _draw_panel(draw: Drawing, left: float, title: str, points: Sequence[Point], decades: tuple[int, int]) -> None:
    low, high = decades
    most = math.log10(max(point.windows for point in points)) or 1.0
    first = math.log10(min(point.windows for point in points))

    def to_x(windows: float) -> float:
        return left + 10 + (_PANEL_WIDTH - 20) * (math.log10(windows) - first) / ((most - first) or 1.0)

    def to_y(us: float) -> float:
        return _TOP + (_BOTTOM - _TOP) * (high - math.log10(us)) / ((high - low) or 1)

    draw.rect(left, _TOP, _PANEL_WIDTH, _BOTTOM - _TOP, PAGE_THEME.panel, r=4, stroke=PAGE_THEME.grid)
    for decade in range(low, high + 1):
        y = to_y(10.0**decade)
        draw.line(left, y, left + _PANEL_WIDTH, y, PAGE_THEME.grid)
        draw.text(left - 6, y + 4, f"{10**decade:,}", PAGE_THEME.muted, size=11, anchor="end")
    for point in points:
        x = to_x(point.windows)
        draw.text(x, _BOTTOM + 16, f"{point.windows:,}", PAGE_THEME.muted, size=10.5, anchor="middle")
    draw.text(left + _PANEL_WIDTH / 2, _BOTTOM + 38, title, PAGE_THEME.ink, size=12, anchor="middle")
    lines = ([point.device_us for point in points], [point.interpreter_us for point in points])
    for color, dashes, costs in zip(PAGE_THEME.series, _DASHES, lines, strict=False):
        line = [(to_x(point.windows), to_y(us)) for point, us in zip(points, costs, strict=True)]
        draw.path(line, color, stroke_width="2", stroke_dasharray=dashes)
        for x, y in line:
            draw.circle(x, y, 3, color)
    for point in (points[0], points[-1]):
        label = f"{point.device_us:,.0f}"
        draw.text(to_x(point.windows), to_y(point.device_us) - 8, label, PAGE_THEME.ink, size=11, anchor="middle")
