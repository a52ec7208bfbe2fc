"""`outstation fleet simulate`: a fleet on one machine, and a roll-out in it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from agent.cli.output import emit, json_option, print_table
from agent.cli.simulated import dir_option, exit_on_signals, open_folder, print_audit
from agent.wire import keys

_PLACEHOLDER = "-"
_MAX_SENTENCES = 8


@click.command("simulate", epilog="Example: outstation fleet simulate --devices 50 --rollout exercise-2.toml --seed 1")
@click.option("--devices", default=8, show_default=True, type=click.IntRange(1, 200), help="Simulated devices.")
@click.option(
    "--rollout", "plan", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Publish the bundle this roll-out names, start it and follow it to its end.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Another order of recordings, and other sites that suffer.")
@click.option(
    "--duration", default=60.0, show_default=True, type=click.FloatRange(10),
    help="Seconds to run; with --rollout the longest that it may take.",
)  # fmt: skip
@click.option("--speed", default=10.0, show_default=True, type=click.FloatRange(0.1, 100), help="Of the recordings.")
@click.option("--away", type=click.IntRange(0), metavar="N", help="Devices switched off for a while; a tenth.")
@click.option("--cut", type=click.IntRange(0), metavar="N", help="Devices cut off in mid-download; a tenth.")
@click.option("--slow", type=click.IntRange(0), metavar="N", help="Devices on a slow line; a tenth.")
@click.option("--worse", default=0, metavar="N", type=click.IntRange(0), help="Sites with a sensor out of order; 0.")
@click.option("--publisher", "trusted", multiple=True, metavar="PUB", help="A key that signs bundles; or a file of it.")
@click.option("--broker", metavar="URL", help="A broker that runs already; without it one is started.")
@dir_option
@json_option
def simulate(
    devices: int,
    plan: Path | None,
    seed: int,
    duration: float,
    speed: float,
    away: int | None,
    cut: int | None,
    slow: int | None,
    worse: int,
    trusted: tuple[str, ...],
    broker: str | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Broker, collector and N devices on replayed recordings, each the real program in a process of its own.

    With --rollout also a repository over HTTP and the operator's commands. Some devices are switched off for a while,
    some are cut off in mid-download, some have a slow line, and --worse of them a sensor out of order; who, --seed
    decides. It ends with who runs what and why, and the audit: exit 1 where that fails, or the roll-out did not end
    within --duration.
    """
    from agent.simulate.fleet import SimulationRequest, run

    began = time.monotonic()
    exit_on_signals()
    few = max(1, devices // 10) if devices > 2 and plan is not None else 0
    counts = {name: few if given is None else given for name, given in (("away", away), ("cut", cut), ("slow", slow))}
    publishers = tuple(keys.load_public(one) for one in trusted)
    order = SimulationRequest(devices, duration, speed, seed, plan, broker, publishers, worse=worse, **counts)
    with open_folder(folder) as home:
        document = run(home, order, _report_progress if sys.stderr.isatty() else lambda _: None)
    document["seconds"] = round(time.monotonic() - began, 1)
    emit(document, as_json, lambda: _print(document))
    if not document["audit"]["passed"] or not document.get("rollout", {}).get("ended", True):
        sys.exit(1)


def _report_progress(sentence: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')}  {sentence}", err=True)


def _print(document: dict[str, Any]) -> None:
    rollout = document.get("rollout")
    columns = ["device", "rows", "results", "verified"]
    listed = [[one[name] for name in columns] for one in document["devices"]]
    if rollout is None:
        print_table(columns, listed, "No devices.")
    else:
        for row, one in zip(listed, document["devices"], strict=True):
            runs = one["runs"]["version"] if one["runs"] else _PLACEHOLDER
            row += [runs, one["phase"] or _PLACEHOLDER, one["reason"] or _PLACEHOLDER]
        print_table([*columns, "runs", "phase", "reason"], listed, "No devices.")
        _print_rollout(rollout, document["devices"])
    for one in document["devices"]:
        for ended in one["restarts"]:
            click.echo(f"{ended}; it was started again")
    click.echo("")
    print_audit(document["audit"], document["seconds"])


def _print_rollout(rollout: dict[str, Any], devices: list[dict[str, Any]]) -> None:
    click.echo("")
    for decision in rollout["decisions"]:
        click.echo(f"{decision['time'][11:19]}  {decision['summary']}")
    troubled = [one for one in devices if one["reason"]]
    if troubled:
        click.echo("")
    for one in troubled[:_MAX_SENTENCES]:
        click.echo(f"{one['device']}  {one['why']}")
    if len(troubled) > _MAX_SENTENCES:
        click.echo(f"… and {len(troubled) - _MAX_SENTENCES} more; all with --json")
    suffered = rollout["hardship"]
    names = {
        "switched off for a while": suffered["away"],
        "cut off in mid-download": {name: times for name, times in suffered["cut"].items() if times},
        "on a slow line": suffered["slow"],
        "with a sensor out of order": suffered["worse"],
    }
    click.echo("")
    for what, which in names.items():
        if which:
            click.echo(f"{what}: {', '.join(which)}")
    if not rollout["ended"]:
        click.echo("The roll-out did not end in time; --duration gives it more.")
