"""`outstation demo`: broker, devices and collector on one machine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outstation.foundation.cli.options import json_option
from outstation.foundation.cli.output import echo, emit, print_table
from outstation.foundation.text import list_names
from outstation.workbench.cli.simulated import dir_option, exit_on_signals, open_folder, print_audit

if TYPE_CHECKING:
    from outstation.workbench.simulate.plan import SimulationPlan
    from outstation.workbench.simulate.simulation import Simulation

# The demo ends once all rows are processed. A slow machine gets this much longer: a demo cut short finds nothing.
_DRAIN_S = 60.0
_MAX_SUBJECTS, _MAX_ALERTS = 4, 8
# Text and style of each state in the live table.
_LIVE_STATES = {
    "ok": ("ok", "green"),
    "drift": ("drift", "bold yellow"),
    "fault": ("fault", "bold red"),
    "insufficient": ("learning its site", "dim"),
}


@click.command(epilog="Example: outstation demo --scenario solar --duration 30")
@click.option(
    "--scenario",
    "named",
    default="exercise",
    show_default=True,
    type=click.Choice(["exercise", "solar", "machine"]),
    help="Recordings to replay.",
)
@click.option("--devices", default=4, show_default=True, type=click.IntRange(1, 64), help="Simulated devices.")
@click.option(
    "--duration", default=60.0, show_default=True, type=click.FloatRange(15), help="Approximate seconds to run."
)
@dir_option
@click.option("--no-dashboard", is_flag=True, help="No page in the browser, no live table; only the report at the end.")
@click.option("--seed", default=0, show_default=True, help="Seed of the order of recordings.")
@json_option
def demo(
    named: str, devices: int, duration: float, folder: Path | None, no_dashboard: bool, seed: int, as_json: bool
) -> None:
    """Run a broker, simulated devices and a collector; faults are injected at the first two devices.

    Each device replays recordings at high speed and first learns its site's reference. Exit code 1 if the final audit
    fails.

    \b
    exercise  four people's shoulder exercises (smartwatch, 50 Hz): the accelerometer of the first
              loses gain, a gyroscope channel of the second sticks
    solar     the weather over a photovoltaic system (15 minutes) and its power as labels, a day late:
              dust settles on the first one's panels, the irradiance sensor of the second sticks
    machine   the sound of motors, computed: a bearing of the first one fails, the microphone of the
              second loses gain
    """
    began = time.monotonic()
    exit_on_signals()
    with open_folder(folder) as home:
        document = _run_simulation(home, named, devices, duration, seed, began, live=not (no_dashboard or as_json))
    emit(document, as_json, lambda: _print(document), passed=document["audit"]["passed"])


def _run_simulation(
    home: Path, scenario_name: str, devices: int, duration: float, seed: int, started_s: float, *, live: bool
) -> dict[str, Any]:
    from outstation.workbench.simulate import fleet_report as reporting
    from outstation.workbench.simulate import plan as planning
    from outstation.workbench.simulate import scenario
    from outstation.workbench.simulate.simulation import Simulation

    plan = planning.demo_plan(devices, duration, seed, scenario.from_name(scenario_name))
    with Simulation(home, plan) as fleet:
        fleet.start()
        if live:
            fleet.start_dashboard()
        views = fleet.watch_progress(time.monotonic() + duration + _DRAIN_S)
        if live:
            _show_live(_announce_dashboard(fleet, views), plan, fleet.broker_name)
        else:
            deque(views, maxlen=0)
        fleet.stop()
    report = reporting.build_report(fleet.database, plan)
    measured = plan.scenario.delayed_labels
    return {
        "scenario": scenario_name,
        "devices": report.devices,
        "accuracy": report.accuracy,
        "mae": report.mae,
        "unit": measured.unit if measured else None,
        "seconds": round(time.monotonic() - started_s, 1),
        "audit": report.audit.to_dict(),
    }


def _announce_dashboard(fleet: Simulation, views: Iterable[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    """Print the address of the dashboard as soon as it serves, above the live table."""
    shown = False
    for view in views:
        if not shown and (url := fleet.dashboard_url):
            shown = True
            echo(f"dashboard until the demo ends: {url}")
        yield view


def _show_live(views: Iterable[list[dict[str, Any]]], plan: SimulationPlan, broker: str) -> None:
    """Draw each view over the last one, in a terminal only."""
    # Imported here: no other command needs it.
    from rich import box
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        deque(views, maxlen=0)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for view in views:
            table = Table(box=box.SIMPLE_HEAD, title=f"{len(plan.sites)} devices over {broker}", title_justify="left")
            for name in ("device", "", "rows", "drift windows", "results", "verified"):
                table.add_column(name, justify="right" if name not in ("device", "") else "left")
            table.add_column("drift")
            alerts = []
            for row in view:
                done = ProgressBar(total=plan.rows, completed=row["rows"], width=16)
                numbers = [f"{row[name]:,}" for name in ("rows", "windows", "results", "messages")]
                table.add_row(row["device"], done, *numbers, Text(*_LIVE_STATES[row["drift"] or "insufficient"]))
                alerts += [Text(f"{row['device']}  {sentence}") for sentence in row["open"]]
            if not view:
                table.add_row(Text("starting …", "dim"))
            live.update(Group(table, *alerts[-8:]), refresh=True)


def _print(document: dict[str, Any]) -> None:
    score, unit = ("mae", f" ({document['unit']})") if document["mae"] is not None else ("accuracy", "")
    columns = ["device", "rows", "windows", "results", "verified"]
    heads = ["device", "rows", "drift windows", "results", "verified"]
    if document[score] is not None:
        columns.append(score)
        heads.append(f"{score}{unit}")
    if score == "mae":
        columns.append("labelled_mae")
        heads.append("of the newest labels")
    if any(device["anomalies"] for device in document["devices"]):
        columns.append("anomalies")
        heads.append("anomalies")
    listed = [
        # All bands of a spectrum may be listed.
        [
            *(_format_cell(d[name]) for name in columns),
            *(list_names(d[kind], _MAX_SUBJECTS) or "-" for kind in ("drift", "faults")),
        ]
        for d in document["devices"]
    ]
    print_table([*heads, "drift", "sensor fault"], listed, "No devices.")
    echo("")
    for device in document["devices"]:
        # A failing microphone affects every band.
        name, sentences = device["device"], device["alerts"]
        for sentence in sentences[:_MAX_ALERTS]:
            echo(f"{name}  {sentence}")
        if len(sentences) > _MAX_ALERTS:
            echo(f"{name}  … and {len(sentences) - _MAX_ALERTS} more; all with --json")
    echo("")
    if document["accuracy"] is not None:
        echo(f"accuracy before anything went wrong, against the recordings' labels: {document['accuracy']:.3f}")
    if document["mae"] is not None:
        echo(f"mean absolute error before anything went wrong: {document['mae']:.1f} {document['unit']}")
    print_audit(document["audit"], document["seconds"])


def _format_cell(value: Any) -> Any:
    if isinstance(value, list):
        return " → ".join("-" if share is None else f"{share:.1%}" for share in value)
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else value
