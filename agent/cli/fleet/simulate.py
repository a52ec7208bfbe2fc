"""`outstation fleet simulate`: a simulated fleet on one machine, and a rollout or a scenario in it."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from agent import durable_files
from agent.cli.output import echo, emit, json_option, print_table
from agent.cli.simulated import dir_option, exit_on_signals, open_folder, print_audit
from agent.errors import UsageError
from agent.text import format_span
from agent.wire import keys
from agent.wire.keys import PublicKey

_PLACEHOLDER = "-"
_DEFAULT_DEVICES, _MAX_PROCESSES = 8, 200
# Parameter → option that runs real processes and a real broker.
_PROCESS_OPTIONS = {
    "plan": "--rollout",
    "broker": "--broker",
    **{name: f"--{name}" for name in ("duration", "speed", "away", "cut", "slow", "worse")},
}
_MAX_SENTENCES = 8


@click.command("simulate", epilog="Example: outstation fleet simulate --devices 50 --rollout exercise-2.toml --seed 1")
@click.option(
    "--devices", type=click.IntRange(1, 10_000),
    help="Simulated devices, up to 200 without --scenario; default 8, or as the scenario says.",
)  # fmt: skip
@click.option(
    "--scenario", "scenario_file", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Run this scenario on a virtual clock, as fast as it goes.",
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
    devices: int | None,
    scenario_file: Path | None,
    config_file: Path | None,
    bundles: tuple[str, ...],
    recordings: tuple[str, ...],
    report_file: Path | None,
    plan: Path | None,
    seed: int | None,
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

    --scenario runs the real code of all devices in this process, on a virtual clock and a broker in memory: faults of
    sensors, networks, clocks, power and disks, and labels. The report says what was found, when and by whom. The same
    seed gives the same messages, byte for byte. Exit 1 if an event was missed, there were more false alarms than the
    scenario's budget, or the audit fails.
    """
    from agent.simulate.fleet import SimulationRequest, run

    started_s = time.monotonic()
    exit_on_signals()
    publishers = tuple(keys.load_public(text) for text in publisher_keys)
    if scenario_file is not None:
        _refuse_options_of_processes()
        own = _ScenarioOptions(scenario_file, config_file, bundles, recordings, publishers, devices, seed)
        with open_folder(folder) as home:
            passed = _run_scenario(home, own, report_file, as_json=as_json)
        sys.exit(0 if passed else 1)
    if config_file or bundles or recordings or report_file:
        raise UsageError("--config, --bundle, --recording and --report belong to a scenario; add --scenario FILE")
    devices = _DEFAULT_DEVICES if devices is None else devices
    if devices > _MAX_PROCESSES:
        raise UsageError(f"--devices {devices}: {_MAX_PROCESSES} processes at most; --scenario FILE runs more in one")
    default = max(1, devices // 10) if devices > 2 and plan is not None else 0
    counts = {name: default if n is None else n for name, n in (("away", away), ("cut", cut), ("slow", slow))}
    request = SimulationRequest(devices, duration, speed, seed or 0, plan, broker, publishers, worse=worse, **counts)

    def announce(sentence: str) -> None:
        if sys.stderr.isatty():
            echo(f"{time.strftime('%H:%M:%S')}  {sentence}", err=True)

    with open_folder(folder) as home:
        document = run(home, request, announce)
    document["seconds"] = round(time.monotonic() - started_s, 1)
    emit(document, as_json, lambda: _print(document))
    if not document["audit"]["passed"] or not document.get("rollout", {}).get("ended", True):
        sys.exit(1)


def _refuse_options_of_processes() -> None:
    """Raise UsageError for an option that a scenario would ignore."""
    context = click.get_current_context()
    for name, option in _PROCESS_OPTIONS.items():
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"{option} runs devices in processes of their own; leave it or --scenario out")


class _ScenarioOptions(msgspec.Struct, frozen=True):
    """Options of a scenario, as they were given."""

    scenario: Path
    config: Path | None
    bundles: tuple[str, ...]
    recordings: tuple[str, ...]
    publishers: tuple[PublicKey, ...]
    devices: int | None
    seed: int | None


def _run_scenario(home: Path, options: _ScenarioOptions, report_file: Path | None, *, as_json: bool) -> bool:
    """Run a scenario, print its report and write it to a file; return True if it passed."""
    # Imported here: a hundred modules of device and collector.
    from agent.cli.progress import ProgressBar
    from agent.testing.simulation import report as reporting
    from agent.testing.simulation import scenario as scenarios
    from agent.testing.simulation import setup as setups
    from agent.testing.simulation.runner import Simulation

    if report_file is not None and report_file.suffix not in (".json", ".html"):
        raise UsageError(f"--report {report_file}: must end in .json or .html")
    bundles = dict(_split("--bundle", text, optional=True) for text in options.bundles)
    recordings = {
        stream: _split_columns(file) for stream, file in (_split("--recording", text) for text in options.recordings)
    }
    setup = setups.load(options.config, home, bundles, recordings, options.publishers)
    read = scenarios.load(options.scenario, setup.fields, list(setup.config.tasks), options.devices)
    if options.seed is not None:
        read = msgspec.structs.replace(read, seed=options.seed)
    with ProgressBar("messages") as bar, contextlib.closing(Simulation(home, read, setup, bar)) as simulation:
        outcome = simulation.run()
        document = reporting.build(read, outcome, simulation.store)
    if report_file is not None:
        text = msgspec.json.format(msgspec.json.encode(document)) + b"\n"
        if report_file.suffix == ".html":
            from agent.testing.simulation.page import render

            text = render(document).encode()
        durable_files.write(report_file, text, 0o644)
    emit(document, as_json, lambda: _print_scenario(document))
    return bool(document["passed"])


def _split(option: str, text: str, *, optional: bool = False) -> tuple[str, str]:
    """Split NAME=VALUE; with `optional` the name may be left out. Raises UsageError."""
    name, separator, value = text.partition("=")
    if separator and name and value:
        return name, value
    if optional and not separator and text:
        return "", text
    raise UsageError(f"{option} {text}: write {option} {'TASK=BUNDLE' if optional else 'STREAM=FILE'}")


def _split_columns(text: str) -> tuple[Path, list[str]]:
    """Split FILE@COLUMN,…; a file of that whole name has all columns."""
    file, separator, columns = text.rpartition("@")
    if not separator or Path(text).exists():
        return Path(text), []
    return Path(file), [name.strip() for name in columns.split(",")]


def _print_scenario(document: dict[str, Any]) -> None:
    rows = []
    for event in document["events"]:
        first = min(event["found"], key=lambda alert: alert["after"], default=None)
        answer = "nothing expected" if not event["expects"] else "MISSED"
        if first is not None:
            subject = f"{first['alert']} {first['subject']}".strip()
            answer = f"{subject} by the {first['by']} after {format_span(first['after'])}"
        if event["missed"] and event["found"]:
            answer += f"; MISSED at {', '.join(event['missed'][:3])}"
        at = ", ".join(event["devices"][:3]) + (" …" if len(event["devices"]) > 3 else "")
        rows.append([format_span(event["at"]), event["kind"], at or _PLACEHOLDER, answer])
    print_table(["at", "event", "devices", "found"], rows, "No events.")
    alarms = document["false_alarms"]
    echo("")
    for alarm in alarms["alerts"][:_MAX_SENTENCES]:
        echo(f"false alarm: {alarm['device']} after {format_span(alarm['at'])}: {alarm['summary']}")
    if alarms["n"] > _MAX_SENTENCES:
        echo(f"… and {alarms['n'] - _MAX_SENTENCES} more; all with --json")
    echo(f"{alarms['n']} false alarms, budget {alarms['budget']}; {document['missed']} events missed")
    if document["undelivered"]:
        echo(f"messages of {', '.join(document['undelivered'][:_MAX_SENTENCES])} were not delivered")
    echo(
        f"{document['devices']} devices, {format_span(document['simulated_seconds'])} simulated, "
        f"{document['messages']} messages, {document['messages_per_second']:.0f} a second, "
        f"{document['peak_bytes'] / 2**20:.0f} MiB"
    )
    print_audit(document["audit"], document["seconds"])


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
