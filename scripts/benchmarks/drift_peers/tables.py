"""Report tables of `scripts/bench drift`."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.benchmarks import Result
from scripts.benchmarks.drift_peers import recordings, shuttle, synthetic
from scripts.benchmarks.drift_peers.cost import YARDSTICK, Cost
from scripts.benchmarks.drift_peers.counting import Row

HOW = f"""\
quiet: windows in which nothing changes; false/1000: in how many of 1000 of them anything alarmed.
Then, for each change: median windows until an alarm names what changed / how often none did within {synthetic.WATCHED}.
Who alarms in every window finds every change in the first.
"""


def everything(
    rows: dict[str, list[Row]], watches: list[Row], sensors: list[Row], costs: dict[str, Cost], results: list[Result]
) -> str:
    parts = [HOW]
    for kind, kind_rows in rows.items():
        title = f"Rows: {kind}. 16 fields, an answer, its certainty; {synthetic.ROWS} rows a window; four fields change"
        parts.append(render_detections(title, kind_rows, synthetic.WATCHED))
    title = "Smartwatch: people 8, 9 and 10, whom the shipped model was not trained on, under it; 2,000 rows a window"
    parts.append(render_detections(title, watches, recordings.WATCHED))
    if sensors:
        title = f"Shuttle: nine sensors, {shuttle.ROWS} rows a window; a share of rows is labelled as not normal"
        parts.append(render_detections(title, sensors, shuttle.WATCHED))
    parts += [_costs("A row of 16 floats once the reference is learned: processor time; and memory", costs)]
    parts += [verdicts(results)]
    return "\n\n".join(parts)


def render_detections(title: str, rows: Sequence[Row], within: int) -> str:
    """Render the false alarm rate and the detection delays of each detector."""
    changes = list(dict.fromkeys(name for row in rows for name in row.delays))
    cells = [["", "quiet", "false/1000", *changes]]
    for row in rows:
        quiet = [f"{row.quiet:,}", f"{row.per_1000:.1f}"] if row.quiet else ["", ""]
        cells.append(
            [row.name, *quiet, *(row.delays[name].summarize(within) if name in row.delays else "" for name in changes)]
        )
    return f"{title}\n{aligned(cells)}"


def _costs(title: str, costs: dict[str, Cost]) -> str:
    cells = [["", "µs per row", f"times {YARDSTICK}", "import, MB", "work, MB"]]
    for name, cost in costs.items():
        times = cost.us_per_row / costs[YARDSTICK].us_per_row
        memory = ["" if mb is None else f"{mb:.1f}" for mb in (cost.import_mb, cost.work_mb)]
        cells.append([name, f"{cost.us_per_row:.2f}", f"{times:.1f}", *memory])
    return f"{title}\n{aligned(cells)}"


def verdicts(results: Sequence[Result]) -> str:
    cells = []
    for result in results:
        limit = f"{'at most' if result.less else 'at least'} {result.reference * result.target:g}"
        cells.append([result.name, f"{result.ours:.3g} {result.unit}", limit, "met" if result.met else "MISSED"])
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Align the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )
