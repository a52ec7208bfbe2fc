"""Drift detection: false alarm rate, detection delay and cost, compared with other libraries."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import click

from scripts.benchmarks import Report, Result, benchmark
from scripts.benchmarks.drift_peers import cost, ours, peers, recordings, shuttle, synthetic, tables, targets
from scripts.benchmarks.drift_peers.counting import Row
from scripts.benchmarks.drift_peers.peers import KITS, Peer
from scripts.benchmarks.drift_peers.synthetic import KINDS, Kind

# Smallest acceptable ratio between the cost of each peer and our cost.
PEER_TARGETS = ((peers.RIVER, 2.0), (peers.WHYLOGS, 10.0), (peers.EVIDENTLY, 20.0))
FOUR_FIELDS, ONE_FIELD = synthetic.changes(4), synthetic.changes(1)
SITES, QUIET, TRIALS = 40, 100, 3  # windows of each site, trials of each site and change


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
    """Measure summaries and detectors on rows of 16 floats in batches of 500, against other libraries."""
    peers.installed()
    results = []
    ours_once = cost.judged(cost.CASES[2])
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
