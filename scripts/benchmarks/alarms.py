"""Alarms of every kind in quiet windows of many populations, and delays of changes, at windows of three lengths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import msgspec

from agent.errors import BadBundle
from scripts.benchmarks import Report, Result, benchmark, rows
from scripts.benchmarks.drift_peers import site_trials
from scripts.benchmarks.drift_peers.counting import DetectionDelays
from scripts.benchmarks.drift_peers.populations import POPULATIONS, Population
from scripts.benchmarks.drift_peers.site_trials import CHANGES, WATCHED, QuietCount

WINDOW_ROWS = (60, 250, 500)
QUIET, TRIALS = 3000, 30  # windows of each population and length; sites of each change
MOST_REFUSALS = 5  # sites that may refuse to learn before a population counts as one that cannot be learned
PER_1000 = 10.0
HEAD = f"""\
`scripts/bench alarms`: alarms of every kind together per 1000 quiet windows, of so many windows, by rows per window.
A site learns from 40 windows, or three days where there is a cycle, and longer where the reference asks for more.
Below: median windows until an alarm names the change / how often none did within {WATCHED}; sd are those of a field's
rows."""
SECTION = "Alarms in quiet windows, and delays"
# Populations whose changes are timed: others repeat one of these.
TIMED = (
    *("independent", "AR(0.9)", "Student's t, 3 degrees", "64 fields", "household"),
    *("cycle of a day, equal spread", "cycle of a day, unequal spread", "weather"),
    *("regimes of 4 windows, unknown", "AR(0.9), model windows of 10 rows"),
)


class Measured(msgspec.Struct):
    """Alarms and delays at sites of one population, with windows of one length."""

    population: str
    rows: int
    quiet: QuietCount
    delays: dict[str, DetectionDelays]
    refusal: str = ""


@benchmark("alarms")
def alarms() -> Report:
    """Count alarms in quiet windows of each population, and time changes."""
    windows = rows or QUIET
    cases = [(population.name, length, windows) for population in POPULATIONS for length in WINDOW_ROWS]
    with ProcessPoolExecutor(2) as pool:
        measured = list(pool.map(_measure_case, cases))
    tables = table(measured)
    return Report(list(_results(measured)), tables, section=(SECTION, tables))


def measure(population: Population, length: int, windows: int, trials: int = TRIALS) -> Measured:
    """Watch sites until there are so many quiet windows, and run each change at `trials` of them."""
    quiet, delays = QuietCount(), defaultdict[str, DetectionDelays](DetectionDelays)
    try:
        monitor = site_trials.shipped_monitor(population, length)
    except BadBundle as refused:
        return Measured(population.name, length, quiet, delays, str(refused))
    timed, number = trials if population.name in TIMED else 0, 0
    while (quiet.windows < windows or number < timed) and quiet.unlearned < MOST_REFUSALS:
        site, number = site_trials.learn(monitor, population, length, number), number + 1
        if site is None:
            quiet.unlearned += 1
            continue
        if quiet.windows < windows:
            site_trials.watch_quiet(site, population, length, quiet)
        for change in CHANGES if number <= timed else ():
            if change.fields <= len(monitor.shipped.fields):
                delay = site_trials.run_trial(site, population, length, change, number)
                delays[change.name].delays.append(delay)
    return Measured(population.name, length, quiet, dict(delays))


def table(measured: list[Measured]) -> str:
    """Render both tables in Markdown."""
    parts = [HEAD, _render_quiet(measured), *(_render_delays(measured, length) for length in WINDOW_ROWS)]
    return "\n\n".join(part for part in parts if part)


def _measure_case(case: tuple[str, int, int]) -> Measured:
    name, length, windows = case
    return measure(next(population for population in POPULATIONS if population.name == name), length, windows)


def _render_quiet(measured: list[Measured]) -> str:
    by_name: dict[str, dict[int, Measured]] = defaultdict(dict)
    for case in measured:
        by_name[case.population][case.rows] = case
    lines = ["| quiet data | " + " | ".join(f"{length} rows" for length in WINDOW_ROWS) + " | most frequent |"]
    lines.append("|---|" + "---:|" * len(WINDOW_ROWS) + "---|")
    for name, cases in by_name.items():
        kinds = sum((case.quiet.kinds for case in cases.values()), start=type(next(iter(cases.values())).quiet.kinds)())
        windows = max(1, sum(case.quiet.windows for case in cases.values()))
        most = ", ".join(f"{kind} {1000 * count / windows:.1f}" for kind, count in kinds.most_common(3))
        cells = [_cell(cases[length]) if length in cases else "" for length in WINDOW_ROWS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {most} |")
    return "\n".join(lines)


def _cell(case: Measured) -> str:
    return f"{case.quiet.per_1000:.1f} of {case.quiet.windows:,}" if case.quiet.windows else "not learned"


def _render_delays(measured: list[Measured], length: int) -> str:
    names = [change.name for change in CHANGES]
    if not any(case.rows == length and case.delays for case in measured):
        return ""
    lines = [f"| {length} rows | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for case in measured:
        if case.rows == length and case.delays:
            cells = [case.delays[name].summarize(WATCHED) if name in case.delays else "" for name in names]
            lines.append(f"| {case.population} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _results(measured: list[Measured]) -> Iterator[Result]:
    for length in WINDOW_ROWS:
        cases = [case for case in measured if case.rows == length]
        worst = max(cases, key=lambda case: case.quiet.per_1000)
        refused = [case.population for case in cases if not case.quiet.windows]
        note = f"worst of {len(cases)} populations: {worst.population}; not learned: {', '.join(refused) or 'none'}"
        yield Result.within(
            f"alarms, windows of {length} rows", worst.quiet.per_1000, PER_1000, "per 1000 quiet windows", note
        )
