"""Drift detection: false alarm rate, detection delay and cost, compared with other libraries."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np

from scripts.benchmarks import Report, Result, benchmark
from scripts.benchmarks.drift_peers import (
    cost,
    ours,
    peers,
    recordings,
    sensor_rows,
    shuttle,
    synthetic,
    tables,
    targets,
)
from scripts.benchmarks.drift_peers.counting import Row
from scripts.benchmarks.drift_peers.peers import KITS, Peer
from scripts.benchmarks.drift_peers.synthetic import KINDS, Kind

# Smallest acceptable ratio between the cost of each peer and our cost.
PEER_TARGETS = ((peers.RIVER, 2.5), (peers.WHYLOGS, 10.0), (peers.EVIDENTLY, 20.0))
FOUR_FIELDS, ONE_FIELD = synthetic.changes(4), synthetic.changes(1)
SITES, QUIET, TRIALS = 40, 100, 3  # windows of each site, trials of each site and change

FAULT_SITES, FAULT_QUIET, FAULT_WINDOWS = 5, 200, (8, 60, 250, 500)
MISSING_ROWS = {1.0: 16, 0.5: 40, 0.1: 120, 0.03: 480}  # rows within which a share of missing values is reported


@benchmark("drift")
def drift() -> Report:
    """Measure false alarms, delays, misses, processor time and memory on synthetic rows and recordings.

    One peer process at a time runs beside ours. Timed runs alternate with ours.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running, ThreadPoolExecutor(1) as aside:
        others: list[Peer] = []
        theirs = aside.submit(peer_rows, Path(folder), running, others) if peers.installed() else None
        rows = {kind.name: our_rows(kind) for kind in KINDS}
        watches = [recordings.row("ours, same recordings"), recordings.row("ours, second halves", halves=True)]
        readings = shuttle.load(peers.environment())
        sensors = shuttle.rows(readings) if readings else []
        for name, more in (theirs.result() if theirs else {}).items():
            rows[name] += more
        costs = cost.costs(others)
    results = [result for kind, row in rows.items() for result in targets.synthetic_results(kind, row)]
    results += [*targets.recordings_results(watches[0]), *targets.cost_results(costs)]
    return Report(results, tables.everything(rows, watches, sensors, costs, results))


@benchmark("drift-cost")
def drift_cost() -> list[Result]:
    """Measure summaries and detectors on rows of 16 floats that come fast, 500 at a time, against other libraries."""
    peers.installed()
    results = []
    ours_once = cost.judged(next(case for case in cost.CASES if case.called == cost.FAST))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.npz"
        peers.write(data, KINDS[0], [], sites=1)
        for kit, target in PEER_TARGETS:
            try:
                with peers.started(kit, data) as peer:
                    us = cost.in_turns({"ours": ours_once, "theirs": peer.seconds_per_row})
            except click.ClickException as problem:
                click.echo(f"skipped: {problem.message}", err=True)
                continue
            note = f"summary and detectors, windows of 500 rows of 16 floats; reference: {kit.called}"
            pace = 1e6 / us["ours"], 1e6 / us["theirs"]
            results.append(Result(f"drift-cost, {kit.name}", *pace, "rows/s", target, note))
    return results


def our_rows(kind: Kind) -> list[Row]:
    """Measure our detectors on one kind.

    Five answers per window cannot estimate label frequencies, so labels are skipped.
    """
    return [
        ours.row("ours, one prediction per row", kind, FOUR_FIELDS, SITES, QUIET, TRIALS),
        ours.row(targets.ALONE, kind, ONE_FIELD[:-1], SITES, 0, TRIALS),
        ours.row("ours, one prediction per 100 rows", kind, FOUR_FIELDS[:-1], SITES, QUIET, TRIALS, model_rows=100),
    ]


def peer_rows(folder: Path, running: ExitStack, others: list[Peer]) -> dict[str, list[Row]]:
    """Start the peers, leave them in `running`, and return their rows by kind."""
    files = {kind.name: folder / f"{number}.npz" for number, kind in enumerate(KINDS)}
    for kind in KINDS:
        peers.write(files[kind.name], kind, FOUR_FIELDS)
    for kit in KITS:
        try:
            others.append(running.enter_context(peers.started(kit, files[KINDS[0].name])))
        except click.ClickException as problem:
            click.echo(f"skipped: {problem.message}", err=True)
    return {name: [peer.row(file, FOUR_FIELDS) for peer in others] for name, file in files.items()}


@benchmark("drift-faults")
def drift_faults() -> list[Result]:
    """Measure false fault alerts of honest sensors of many kinds, and after how many rows faults are reported."""
    results = []
    for kind, make in sensor_rows.QUIET.items():
        for window in FAULT_WINDOWS:
            false = count = 0
            for seed in range(FAULT_SITES):
                site = sensor_rows.Site.learn(kind, window, 4, seed)
                _, alerts = site.feed(make(np.random.default_rng([seed, 2]), FAULT_QUIET * window, 4))
                false += sum(alert.alert == "fault" and alert.state == "raised" for alert in alerts)
                count += FAULT_QUIET
            name, note = f"drift-faults, {kind}, windows of {window} rows", f"{false} alerts in {count} windows"
            results.append(Result(name, 1000 * false / count, 1.0, "per 1000 windows", 1.0, note, less=True))
    for share, most in MISSING_ROWS.items():
        for window in FAULT_WINDOWS:
            delays = [_missing_delay(window, share, seed) for seed in range(FAULT_SITES)]
            name = f"drift-faults, {share:.0%} missing, windows of {window} rows"
            note = f"{len(delays)} trials, 16 fields"
            median = float(np.median(delays))
            results.append(Result(name, median, float(max(most, window)), "rows", 1.0, note, less=True))
    watch = recordings.Watch()
    alerts = [a for seed in range(recordings.SEEDS) for a in recordings.mixed_alerts(watch, seed, "stuck wy")]
    false = sum(a.alert == "fault" and a.subject != "wy" and a.state == "raised" for a in alerts)
    count = recordings.SEEDS * recordings.QUIET
    note = f"{false} alerts in {count} windows of sites where many people exercise, while channel wy sticks"
    name = "drift-faults, other fields named"
    results.append(Result(name, 1000 * false / count, 1.0, "per 1000 windows", 1.0, note, less=True))
    return results


def _missing_delay(window: int, share: float, seed: int) -> float:
    """Return after how many rows a field that misses values is reported."""
    rng, site = np.random.default_rng([seed, 3]), sensor_rows.Site.learn("integers", window, 16, seed)
    rows = sensor_rows.QUIET["integers"](rng, 3000, 16)
    rows[rng.random(len(rows)) < share, 15] = np.nan
    delay = site.rows_until(rows, lambda alert: alert.evidence.get("fault") == "missing", window)
    return float("inf") if delay is None else float(delay)
