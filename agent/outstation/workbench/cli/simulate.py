"""`outstation fleet simulate`: a simulated fleet on one machine, and a rollout or a scenario in it."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from outstation.foundation.cli.options import json_option
from outstation.foundation.cli.output import echo, emit, print_table
from outstation.foundation.errors import UsageError
from outstation.workbench.cli import simulate_scenario
from outstation.workbench.cli.simulate_scenario import SimulateOptions
from outstation.workbench.cli.simulated import dir_option, exit_on_signals, open_folder, print_audit

_PLACEHOLDER = "-"
_DEFAULT_DEVICES, _MAX_PROCESSES = 8, 200
# Parameter → option that runs real processes.
_PROCESS_OPTIONS = {
    "plan": "--rollout",
    **{name: f"--{name}" for name in ("duration", "away", "cut", "slow", "worse")},
}
_MAX_SENTENCES = 8


@click.command("simulate", epilog="Example: outstation fleet simulate --devices 50 --rollout exercise-2.toml --seed 1")
@click.option(
    "--devices", type=click.IntRange(1, 10_000),
    help="Simulated devices, up to 200 without --scenario; default 8, or as the scenario says.",
)  # fmt: skip
@click.option(
    "--scenario", "scenario_file", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Run this scenario on a virtual clock.",
)  # fmt: skip
@click.option(
    "--config", "config_file", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="With --scenario: a device's outstation.toml with streams, tasks and alerts of your own.",
)  # fmt: skip
@click.option(
    "--bundle", "bundles", multiple=True, metavar="[TASK=]BUNDLE", help="With --scenario: the bundle of a task."
)
@click.option(
    "--recording", "recordings", multiple=True, metavar="STREAM=FILE[@COLUMN,…]",
    help="With --scenario: rows of a stream, .npz or a table; columns in the order of the stream's fields.",
)  # fmt: skip
@click.option(
    "--report", "report_file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
    help="With --scenario: write the report to FILE, .json or .html.",
)  # fmt: skip
@click.option(
    "--rollout", "plan", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Publish the bundle that this rollout names, start the rollout and follow it to its end.",
)  # fmt: skip
@click.option("--seed", type=int, help="Seed of recordings and disturbances; default 0, or the scenario's.")
@click.option(
    "--duration", default=60.0, show_default=True, type=click.FloatRange(10),
    help="Seconds to run; with --rollout the limit.",
)  # fmt: skip
@click.option(
    "--speed", default=10.0, show_default=True, type=click.FloatRange(0.1, 1000),
    help="Simulated seconds in a second; a scenario without this option and --broker goes as fast as it can.",
)  # fmt: skip
@click.option("--away", type=click.IntRange(0), metavar="N", help="Devices offline for a while; default a tenth.")
@click.option("--cut", type=click.IntRange(0), metavar="N", help="Devices with cut downloads; default a tenth.")
@click.option("--slow", type=click.IntRange(0), metavar="N", help="Devices on a slow link; default a tenth.")
@click.option("--worse", default=0, metavar="N", type=click.IntRange(0), help="Sites with a faulty sensor; default 0.")
@click.option(
    "--publisher", "publisher_keys", multiple=True, metavar="PUB", help="A key that signs bundles, or a file with it."
)
@click.option(
    "--broker", metavar="URL", help="URL of a running broker; default a new one, for a scenario one in memory."
)
@dir_option
@json_option
def simulate(**given: Any) -> None:
    """Run broker, collector and N devices on replayed recordings, each the real program in its own process.

    --rollout adds a repository over HTTP and the operator's commands. Some devices are offline for a while, some have
    cut downloads, some a slow link, and --worse of them a faulty sensor; --seed selects them. The report lists the
    bundle of each device and the audit. Exit 1 if the audit fails, or the rollout did not end within --duration.

    --scenario runs the real code of all devices in this process, on a virtual clock and a broker in memory: faults of
    sensors, networks, clocks, power and disks, labels, and roll-outs. The report says what was found, when and by whom.
    The same seed gives the same messages, byte for byte, unless they go over --broker. Exit 1 if an event was missed,
    there were more false alarms than the scenario's budget, a roll-out ended otherwise, all rows of a stream or all
    labels of a task were rejected, or the audit fails.
    """
    started_s = time.monotonic()
    exit_on_signals()
    options = SimulateOptions(**given)
    if options.broker is not None:
        _check_broker(options.broker)
    with open_folder(options.folder) as home:
        if options.scenario_file is not None:
            _refuse_options_of_processes()
            is_chosen = click.get_current_context().get_parameter_source("speed") is ParameterSource.COMMANDLINE
            speed = options.speed if is_chosen or options.broker else None
            simulate_scenario.run(home, options, speed)
            return
        document = _run_processes(home, options)
    document["seconds"] = round(time.monotonic() - started_s, 1)
    passed = document["audit"]["passed"] and document.get("rollout", {}).get("ended", True)
    emit(document, options.as_json, lambda: _print(document), passed=passed)


def _check_broker(url: str) -> None:
    """Connect once: a simulation takes a broker that cannot be reached for a fault of the network. Raises LinkDown."""
    from outstation.protocol.transport.broker_config import BrokerConfig, check_broker
    from outstation.protocol.transport.mqtt import Link

    broker = BrokerConfig(url=url)
    check_broker("--broker", broker)
    Link(broker, f"outstation-simulate-{secrets.token_hex(4)}", retains=True).close()


def _refuse_options_of_processes() -> None:
    """Raise UsageError for an option that a scenario would ignore."""
    context = click.get_current_context()
    for name, option in _PROCESS_OPTIONS.items():
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise UsageError(f"{option} runs devices in processes of their own; leave it or --scenario out")


def _run_processes(home: Path, options: SimulateOptions) -> dict[str, Any]:
    """Run devices in processes of their own; return the report. Raises UsageError."""
    # Imported here: a hundred modules of device and collector.
    from outstation.workbench.simulate.fleet import SimulationRequest, run

    if options.config_file or options.bundles or options.recordings or options.report_file:
        raise UsageError("--config, --bundle, --recording and --report belong to a scenario; add --scenario FILE")
    devices = _DEFAULT_DEVICES if options.devices is None else options.devices
    if devices > _MAX_PROCESSES:
        raise UsageError(f"--devices {devices}: {_MAX_PROCESSES} processes at most; --scenario FILE runs more in one")
    default = max(1, devices // 10) if devices > 2 and options.plan is not None else 0
    chosen = {"away": options.away, "cut": options.cut, "slow": options.slow}
    counts = {name: default if n is None else n for name, n in chosen.items()}
    request = SimulationRequest(
        devices=devices,
        seconds=options.duration,
        speed=options.speed,
        seed=options.seed or 0,
        rollout=options.plan,
        broker=options.broker,
        trusted=options.publishers,
        worse=options.worse,
        **counts,
    )

    def announce(sentence: str) -> None:
        echo(f"{time.strftime('%H:%M:%S')}  {sentence}", err=True)

    return run(home, request, announce)


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
