"""`outstation fleet simulate`: a simulated fleet on one machine, and a rollout in it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from agent.cli.output import echo, emit, json_option, print_table
from agent.cli.simulated import dir_option, exit_on_signals, open_folder, print_audit
from agent.wire import keys

_PLACEHOLDER = "-"
_MAX_SENTENCES = 8


@click.command("simulate", epilog="Example: outstation fleet simulate --devices 50 --rollout exercise-2.toml --seed 1")
@click.option("--devices", default=8, show_default=True, type=click.IntRange(1, 200), help="Simulated devices.")
@click.option(
    "--rollout", "plan", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Publish the bundle that this rollout names, start the rollout and follow it to its end.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of the order of recordings and of the disturbances.")
@click.option(
    "--duration", default=60.0, show_default=True, type=click.FloatRange(10),
    help="Seconds to run; with --rollout the limit.",
)  # fmt: skip
@click.option("--speed", default=10.0, show_default=True, type=click.FloatRange(0.1, 100), help="Speed of the replay.")
@click.option("--away", type=click.IntRange(0), metavar="N", help="Devices offline for a while; default a tenth.")
@click.option("--cut", type=click.IntRange(0), metavar="N", help="Devices with cut downloads; default a tenth.")
@click.option("--slow", type=click.IntRange(0), metavar="N", help="Devices on a slow link; default a tenth.")
@click.option("--worse", default=0, metavar="N", type=click.IntRange(0), help="Sites with a faulty sensor; default 0.")
@click.option(
    "--publisher", "publisher_keys", multiple=True, metavar="PUB", help="A key that signs bundles, or a file with it."
)
@click.option("--broker", metavar="URL", help="URL of a running broker; default a new one.")
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
    publisher_keys: tuple[str, ...],
    broker: str | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Run broker, collector and N devices on replayed recordings, each the real program in its own process.

    --rollout adds a repository over HTTP and the operator's commands. Some devices are offline for a while, some have
    cut downloads, some a slow link, and --worse of them a faulty sensor; --seed selects them. The report lists the
    bundle of each device and the audit. Exit 1 if the audit fails, or the rollout did not end within --duration.
    """
    from agent.simulate.fleet import SimulationRequest, run

    started_s = time.monotonic()
    exit_on_signals()
    default = max(1, devices // 10) if devices > 2 and plan is not None else 0
    counts = {name: default if n is None else n for name, n in (("away", away), ("cut", cut), ("slow", slow))}
    publishers = tuple(keys.load_public(text) for text in publisher_keys)
    request = SimulationRequest(devices, duration, speed, seed, plan, broker, publishers, worse=worse, **counts)

    def announce(sentence: str) -> None:
        if sys.stderr.isatty():
            echo(f"{time.strftime('%H:%M:%S')}  {sentence}", err=True)

    with open_folder(folder) as home:
        document = run(home, request, announce)
    document["seconds"] = round(time.monotonic() - started_s, 1)
    emit(document, as_json, lambda: _print(document))
    if not document["audit"]["passed"] or not document.get("rollout", {}).get("ended", True):
        sys.exit(1)


def _print(document: dict[str, Any]) -> None:
    rollout = document.get("rollout")
    columns = ["device", "rows", "results", "verified"]
    rows = [[device[name] for name in columns] for device in document["devices"]]
    if rollout is None:
        print_table(columns, rows, "No devices.")
    else:
        for row, device in zip(rows, document["devices"], strict=True):
            runs = device["runs"]["version"] if device["runs"] else _PLACEHOLDER
            row += [runs, device["phase"] or _PLACEHOLDER, device["reason"] or _PLACEHOLDER]
        print_table([*columns, "runs", "phase", "reason"], rows, "No devices.")
        _print_rollout(rollout, document["devices"])
    for device in document["devices"]:
        for problem in device["restarts"]:
            echo(f"{problem}; it was restarted")
    echo("")
    print_audit(document["audit"], document["seconds"])


def _print_rollout(rollout: dict[str, Any], devices: list[dict[str, Any]]) -> None:
    echo("")
    for decision in rollout["decisions"]:
        echo(f"{decision['time'][11:19]}  {decision['summary']}")
    problems = [device for device in devices if device["reason"]]
    if problems:
        echo("")
    for device in problems[:_MAX_SENTENCES]:
        echo(f"{device['device']}  {device['why']}")
    if len(problems) > _MAX_SENTENCES:
        echo(f"… and {len(problems) - _MAX_SENTENCES} more; all with --json")
    disturbances = rollout["disturbances"]
    names = {
        "offline for a while": disturbances["away"],
        "with cut downloads": {name: count for name, count in disturbances["cut"].items() if count},
        "on a slow link": disturbances["slow"],
        "with a faulty sensor": disturbances["worse"],
    }
    echo("")
    for kind, affected in names.items():
        if affected:
            echo(f"{kind}: {', '.join(affected)}")
    if not rollout["ended"]:
        echo("The rollout did not end within --duration; allow more seconds.")
