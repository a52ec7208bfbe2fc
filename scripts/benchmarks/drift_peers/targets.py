"""Targets of the drift benchmark, as results: the limits that the detectors were configured for.

`reference` is the limit. An unknown delay, of a change that was missed, counts as one window more than were watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scripts.benchmarks import Result
from scripts.benchmarks.drift_peers import recordings, synthetic
from scripts.benchmarks.drift_peers.cost import CASES, Cost
from scripts.benchmarks.drift_peers.counting import Row
from scripts.benchmarks.drift_peers.synthetic import ANSWERS, HALF, QUARTER, WIDER

ALONE = "ours, one field only"  # shown for comparison

FALSE, FALSE_REAL = 10.0, 3.0  # alarms per 1000 quiet windows
DELAYS = {QUARTER: 5.0, HALF: 3.0, WIDER: 5.0}  # windows, median
TARGET_DETECTION_PERCENT = 98.0  # per cent
DELAY_REAL = 3.0
MB = 5.0


def synthetic_results(kind: str, rows: Sequence[Row]) -> Iterator[Result]:
    """Return the results for `rows` of one kind: ours with quiet windows, compared with the peers."""
    others = [row for row in rows if not row.name.startswith("ours")]
    alone = [row for row in rows if row.name == ALONE]
    for row in rows:
        if row in others or not row.quiet:
            continue
        name = f"drift, {kind}, {row.name.removeprefix('ours, ')}"
        note = f"{row.alarmed} of {row.quiet:,} windows" + format_peers(
            {result.name: f"{result.per_1000:.0f}" for result in others}
        )
        yield Result(f"{name}: false alarms", row.per_1000, FALSE, "per 1000 windows", 1.0, note, less=True)
        for change, limit in DELAYS.items():
            note = f"{len(row.delays[change].delays)} trials, four of 16 fields change"
            note += format_peers(
                {result.name: result.delays[change].summarize(synthetic.WATCHED) for result in (*alone, *others)}
            )
            yield Result(f"{name}: {change}", _delay(row, change), limit, "windows", 1.0, note, less=True)
        yield _worst(f"{name}: changes detected", row, [change for change in row.delays if change != ANSWERS])
        if ANSWERS in row.delays:
            yield _worst(f"{name}: other label shares detected", row, [ANSWERS])


def recordings_results(row: Row) -> Iterator[Result]:
    people = ", ".join(map(str, recordings.PEOPLE))
    note = (
        f"{row.alarmed} of {row.quiet:,} windows; people {people} under the shipped model, which was not trained on "
        f"them, {recordings.SEEDS} seeds"
    )
    yield Result("drift, smartwatch: false alarms", row.per_1000, FALSE_REAL, "per 1000 windows", 1.0, note, less=True)
    for change, detection in row.delays.items():
        missed = sum(delay is None for delay in detection.delays)
        note = f"{len(detection.delays)} trials, {missed} missed within 20 windows"
        name = f"drift, smartwatch: {change}"
        yield Result(name, _delay(row, change), DELAY_REAL, "windows", 1.0, note, less=True)
        yield Result(f"{name} detected", 100 - detection.missed, 100.0, "per cent", 1.0, note)


def cost_results(costs: dict[str, Cost]) -> Iterator[Result]:
    limits = {case.called: case.us_per_row for case in CASES}
    ours = {name: costs[name] for name in limits}
    others = {name: cost for name, cost in costs.items() if name not in ours}
    note_text = format_peers({name: f"{cost.us_per_row:.2f}" for name, cost in others.items()})
    for name, cost in ours.items():
        note = f"processor time of rows of 16 floats{note_text}"
        yield Result(f"drift, {name}: cost", cost.us_per_row, limits[name], "µs per row", 1.0, note, less=True)
    note_text = format_peers({name: f"{cost.work_mb:.1f}" for name, cost in others.items() if cost.work_mb is not None})
    for name, cost in ours.items():
        if cost.work_mb is not None and cost.import_mb is not None:
            note = f"peak beyond the {cost.import_mb:.1f} MB of its import, learning included{note_text}"
            yield Result(f"drift, {name}: memory", cost.work_mb, MB, "MB", 1.0, note, less=True)


def _worst(name: str, row: Row, changes: Sequence[str]) -> Result:
    """Return the results of the change with the most misses."""
    note_text = format_peers({change: row.delays[change].summarize(synthetic.WATCHED) for change in changes})
    trials = len(row.delays[changes[0]].delays)
    note = f"detected within {synthetic.WATCHED} windows, {trials} trials each; median windows and misses{note_text}"
    return Result(
        name,
        100 - max(row.delays[change].missed for change in changes),
        TARGET_DETECTION_PERCENT,
        "per cent",
        1.0,
        note,
    )


def _delay(row: Row, change: str) -> float:
    return min(row.delays[change].median, synthetic.WATCHED + 1.0)


def format_peers(others: dict[str, str]) -> str:
    return "".join(f"; {name}: {value}" for name, value in others.items())
