"""Alarms of every kind in quiet windows of many populations, and delays of changes, at windows of three lengths."""

from __future__ import annotations

import hashlib
import pickle
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import click
import msgspec
from msgspec.structs import replace

from outstation.foundation.errors import BadBundle
from scripts import benchmarks
from scripts.benchmarks import Report, Result, Section, benchmark, catalogue, page
from scripts.benchmarks.drift_peers import peers, site_trials
from scripts.benchmarks.drift_peers.counting import DetectionDelays
from scripts.benchmarks.drift_peers.peers import KITS, Kit
from scripts.benchmarks.drift_peers.populations import POPULATIONS, WINDOWS_PER_DAY, Population
from scripts.benchmarks.drift_peers.site_trials import CHANGES, WATCHED, QuietCount
from scripts.benchmarks.drift_peers.synthetic import Floats

WINDOW_ROWS = (60, 250, 500)
QUIET, TRIALS = 3000, 30  # windows of each population and length; sites of each change
MOST_WATCHED = max(kit.watched for kit in KITS)
MOST_REFUSALS = 5  # sites that may refuse to learn before a population counts as one that cannot be learned
PER_1000 = 10.0
HOUR_STEP = 7  # by which trials of one site begin later in the day than those of the site before
MAX_BROKEN_SHARE = 0.1  # of trials in which `status` states that a change is found
HEAD = f"""\
`scripts/bench alarms`: alarms of every kind together per 1000 quiet windows, with the number of windows, by rows per
window. A site learns from 40 windows, or three days where there is a cycle, and longer where the reference asks for
more. Below: median windows until an alarm names the change / how often none did within {WATCHED}; sd are those of a
field's rows. Sites with a cycle meet the change at different hours."""
OTHERS = """\
The next table counts, per 1000, windows in which other detectors flag a column by their defaults, on rows of the same
sites: the learned rows are their reference. KS and Evidently saw 120 windows of each kind and length, others 600."""
SECTION = "Alarms in quiet windows, and delays"
# Populations whose changes are timed: others repeat one of these.
TIMED = (
    *("independent", "AR(0.9)", "Student's t, 3 degrees", "64 fields", "household"),
    *("cycle of a day, equal spread", "cycle of a day, unequal spread", "weather"),
    *("regimes of 4 windows, unknown", "AR(0.9), model windows of 10 rows"),
)


README_ITEM = """\
- **Drift with few false alarms.** On {met} of {count} kinds of quiet data at most 10 in 1000 windows \
alarm{others} ([measured](docs/internals/drift-benchmarks.md)). \
Sensor faults are told apart from drift, and `status` names the smallest change that is found."""
# Code that decides about alarms: parts that other code measured are measured again.
MEASURED_CODE = ("agent/outstation/ml/drift", "agent/outstation/ml/kernel", "scripts/benchmarks/drift_peers")

# Name of the detector, population, rows of a window → windows watched, windows with a flag.
PeerCounts = dict[tuple[str, str, int], tuple[int, int]]


class Measured(msgspec.Struct):
    """Alarms and delays at sites of one population, with windows of one length."""

    population: str
    rows: int
    quiet: QuietCount
    delays: dict[str, DetectionDelays]
    refusal: str = ""
    rows_file: Path | None = None  # rows of the first sites, for other detectors


@benchmark("alarms")
def alarms() -> Report:
    """Count alarms in quiet windows of each population, and time changes."""
    windows = benchmarks.rows or QUIET
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(2) as pool:
        parts = (benchmarks.folder or Path(temporary)) / _digest_code()
        parts.mkdir(parents=True, exist_ok=True)
        cases = [
            (population.name, length, windows, parts / f"{windows}-{number}-{length}.npz")
            for length in WINDOW_ROWS
            for number, population in enumerate(POPULATIONS)
        ]
        by_length = list(pool.map(_measure_case, cases))
        measured = [case for number in range(len(POPULATIONS)) for case in by_length[number :: len(POPULATIONS)]]
        tables = table(measured, count_peers(measured) if peers.installed() else {})
    section = Section(catalogue.DRIFT, SECTION, tables, bullets={"README.md": render_readme_item(measured)})
    return Report(list(_results(measured)), tables, section)


def render_readme_item(measured: Sequence[Measured]) -> str:
    """Render the list item of the README about false alarms."""
    worst: dict[str, float] = defaultdict(float)
    for case in measured:
        worst[case.population] = max(worst[case.population], case.quiet.per_1000)
    beyond = [name for name, most in worst.items() if most > PER_1000]
    others = f"; on {' and '.join(beyond)}, up to {max(worst.values()):.0f}" if beyond else ""
    return README_ITEM.format(met=len(worst) - len(beyond), count=len(worst), others=others)


def _write_whole(file: Path, data: bytes) -> None:
    """Write a part so that a run that is killed leaves none behind."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(data)
    partial.rename(file)


def _digest_code() -> str:
    """Return a digest of the code that decides about alarms."""
    digest = hashlib.sha256()
    for folder in MEASURED_CODE:
        for file in sorted((page.ROOT / folder).rglob("*.[pc]*")):
            if file.suffix in (".py", ".c"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def count_peers(measured: Sequence[Measured]) -> PeerCounts:
    """Count the windows in which other detectors flag a column, two detectors at a time.

    Each count goes beside its rows, and is taken from there if a run before this one finished it.
    """

    def count(kit: Kit) -> PeerCounts:
        counts: PeerCounts = {}
        try:
            with ExitStack() as stack:
                peer: peers.Peer | None = None
                for case in measured:
                    if case.rows_file is None:
                        continue
                    finished = case.rows_file.with_suffix(f".{kit.name}.json")
                    if not finished.exists():
                        peer = peer or stack.enter_context(peers.started(kit, None))
                        _write_whole(finished, msgspec.json.encode(peer.count_quiet(case.rows_file)))
                    key = kit.called, case.population, case.rows
                    counts[key] = msgspec.json.decode(finished.read_bytes(), type=tuple[int, int])
        except click.ClickException as problem:
            click.echo(f"skipped: {problem.message}", err=True)
        return counts

    with ThreadPoolExecutor(2) as pool:
        return {key: value for counts in pool.map(count, KITS) for key, value in counts.items()}


def measure(
    population: Population, length: int, windows: int, trials: int = TRIALS, rows_file: Path | None = None
) -> Measured:
    """Watch sites until there are `windows` quiet windows, and run each change at `trials` of them.

    The rows of the first sites go to `rows_file`.
    """
    sites: list[tuple[Floats, Floats]] = []
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
        if len(sites) * population.watched < MOST_WATCHED and rows_file:
            sites.append((site.learned, site.rows[: population.watched * length]))
        if quiet.windows < windows:
            site_trials.watch_quiet(site, population, length, quiet)
        if population.days and number <= timed:
            site = site_trials.move_on(site, population, length, HOUR_STEP * number % WINDOWS_PER_DAY)
        for change in CHANGES if number <= timed else ():
            if change.fields <= len(monitor.shipped.fields):
                delay, is_stated = site_trials.run_trial(site, population, length, change, number)
                delays[change.name].delays.append(delay)
                delays[change.name].stated.append(is_stated)
    if rows_file and sites:
        peers.write_quiet(rows_file, sites, length, population.labels)
    return Measured(population.name, length, quiet, dict(delays), rows_file=rows_file if sites else None)


def table(measured: list[Measured], others: PeerCounts) -> str:
    """Render the tables in Markdown."""
    compared = _render_peers(measured, others)
    quiet = [_render_quiet(measured), OTHERS if compared else "", compared]
    delays = (_render_delays(measured, length) for length in WINDOW_ROWS)
    parts = [HEAD, *quiet, *delays, _describe_statements(measured)]
    return "\n\n".join(part for part in parts if part)


def _measure_case(case: tuple[str, int, int, Path]) -> Measured:
    name, length, windows, file = case
    finished = file.with_suffix(".pickle")
    if finished.exists():
        known: Measured = pickle.loads(finished.read_bytes())
        return replace(known, rows_file=known.rows_file and file)
    population = next(population for population in POPULATIONS if population.name == name)
    measured = measure(population, length, windows, -(-TRIALS * windows // QUIET), rows_file=file)
    _write_whole(finished, pickle.dumps(measured))
    return measured


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


def _render_peers(measured: list[Measured], others: PeerCounts) -> str:
    """Render windows with a flag per 1000, at the three lengths of window."""
    names = [kit.called for kit in KITS if any(key[0] == kit.called for key in others)]
    if not names:
        return ""
    lengths = "/".join(str(length) for length in WINDOW_ROWS)
    lines = [f"| quiet data, {lengths} rows | ours | " + " | ".join(names) + " |"]
    lines.append("|---|" + "---:|" * (1 + len(names)))
    for population in dict.fromkeys(case.population for case in measured):
        cases = {case.rows: case for case in measured if case.population == population}
        cells = [" / ".join(f"{cases[n].quiet.per_1000:.0f}" for n in WINDOW_ROWS)]
        for name in names:
            counts = [others.get((name, population, n), (0, 0)) for n in WINDOW_ROWS]
            cells.append(" / ".join(f"{1000 * alarms / n:.0f}" if n else "-" for n, alarms in counts))
        lines.append(f"| {population} | " + " | ".join(cells) + " |")
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


def _describe_statements(measured: list[Measured]) -> str:
    """Say how often a change was missed that a site's `status` had stated to be found; "" without trials."""
    stated, broken = 0, 0
    often: list[str] = []
    for case in measured:
        for name, delays in case.delays.items():
            promised, missed = sum(delays.stated), delays.broken_statements
            stated, broken = stated + promised, broken + missed
            if missed > MAX_BROKEN_SHARE * promised:
                often.append(f"{case.population}, {case.rows} rows, {name} ({missed} of {promised})")
    if not stated:
        return ""
    sites = [len(delays.delays) for case in measured for delays in case.delays.values()]
    least, most = min(sites), max(sites)
    sentence = (
        f"Each change met {least} to {most} sites of a kind. In {stated:,} of the {sum(sites):,} trials `status` had "
        f"stated that the change is found; {broken:,} of these missed it"
    )
    return sentence + (f". More than a tenth were missed with {'; '.join(often)}." if often else ".")


def _results(measured: list[Measured]) -> Iterator[Result]:
    for length in WINDOW_ROWS:
        cases = [case for case in measured if case.rows == length]
        worst = max(cases, key=lambda case: case.quiet.per_1000)
        refused = [case.population for case in cases if not case.quiet.windows]
        note = f"worst of {len(cases)} populations: {worst.population}; not learned: {', '.join(refused) or 'none'}"
        yield Result.within(
            f"alarms, windows of {length} rows", worst.quiet.per_1000, PER_1000, "per 1000 quiet windows", note
        )
