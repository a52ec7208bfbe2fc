"""`outstation demo`: the whole system on one desktop."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from agent.cli.output import emit, json_option, table
from agent.errors import UsageError

_DRAIN_S = 10.0


@click.command(epilog="Example: outstation demo --duration 30")
@click.option("--devices", default=4, show_default=True, type=click.IntRange(1, 64), help="Simulated devices.")
@click.option("--duration", default=60.0, show_default=True, type=click.FloatRange(15), help="Seconds to run, about.")
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Keep everything here; default a temporary folder."
)
@click.option("--no-dashboard", is_flag=True, help="No live table, only the report at the end.")
@click.option("--seed", default=0, show_default=True, help="Another order of recordings.")
@json_option
def demo(devices: int, duration: float, folder: Path | None, no_dashboard: bool, seed: int, as_json: bool) -> None:
    """Broker, devices on real recordings and collector; drift on one device, a sensor fault on another.

    Four people's shoulder exercises, recorded with a smartwatch, are replayed at speed. Each device first learns what
    is normal at its site. Then the accelerometer of the first loses gain, and a gyroscope channel of the second
    sticks. Exit 1 where the audit at the end fails.
    """
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Else the processes it started would run on.
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with _folder(folder) as home:
        document = _run(home, devices, duration, seed, began, live=not (no_dashboard or as_json))
    emit(document, as_json, lambda: _print(document))
    if not document["audit"]["passed"]:
        sys.exit(1)


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory(prefix="outstation-") as made:
            yield Path(made)
        return
    given.mkdir(parents=True, exist_ok=True)
    if any(given.iterdir()):
        raise UsageError(f"{given}: not empty; name a new folder")
    yield given


def _run(home: Path, devices: int, duration: float, seed: int, began: float, *, live: bool) -> dict[str, Any]:
    from agent import simulate

    plan = simulate.plan(devices, duration, seed)
    with simulate.Simulation(home, plan) as fleet:
        fleet.start()
        views = fleet.watch(began + duration + _DRAIN_S / 2)
        if live:
            from agent.cli.live import show

            show(views, plan, fleet.broker_name)
        else:
            for _ in views:
                pass
        fleet.stop()
        rows, report = fleet.report()
    right, known = sum(row["right"] for row in rows), sum(row["labelled"] for row in rows)
    for row in rows:
        row["accuracy"] = round(row.pop("right") / max(1, row.pop("labelled")), 4)
    return {
        "devices": rows,
        "accuracy": round(right / max(1, known), 4),
        "seconds": round(time.monotonic() - began, 1),
        "audit": report.document(),
    }


def _print(document: dict[str, Any]) -> None:
    names = ["device", "rows", "windows", "results", "verified", "accuracy"]
    listed = [
        [d[name] for name in names] + [_subjects(d, "drift"), _subjects(d, "faults")] for d in document["devices"]
    ]
    table(
        ["device", "rows", "drift windows", "results", "verified", "accuracy", "drift", "sensor fault"],
        listed,
        "No devices.",
    )
    click.echo("")
    for device in document["devices"]:
        for sentence in device["alerts"]:
            click.echo(f"{device['device']}  {sentence}")
    audit = document["audit"]
    click.echo(f"\naccuracy before anything went wrong, against the recordings' labels: {document['accuracy']:.3f}")
    verdict = click.style("passed", fg="green") if audit["passed"] else click.style("FAILED", fg="red")
    click.echo(
        f"audit {verdict}: {audit['messages']} signed messages of {audit['devices']} devices; {document['seconds']:g} s"
    )
    for problem in audit["invalid"][:10]:
        click.echo(f"  {problem['device']} seq {problem['seq']}: {problem['reason']}")


def _subjects(device: dict[str, Any], kind: str) -> str:
    return ", ".join(device[kind]) or "-"
