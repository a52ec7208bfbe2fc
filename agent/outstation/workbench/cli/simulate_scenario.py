"""Scenario of `outstation fleet simulate`: its options, its run, and its report in words."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from outstation.foundation import durable_files
from outstation.foundation.cli.output import echo, emit, print_table, require_writable
from outstation.foundation.errors import UsageError
from outstation.foundation.text import format_span, pluralize
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import PublicKey
from outstation.workbench.cli.simulated import deferred_exit, print_audit

_PLACEHOLDER = "-"
_MAX_SENTENCES = 8


class SimulateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the command, as they were given."""

    devices: int | None
    scenario_file: Path | None
    config_file: Path | None
    bundles: tuple[str, ...]
    recordings: tuple[str, ...]
    report_file: Path | None
    plan: Path | None
    seed: int | None
    duration: float
    speed: float
    away: int | None
    cut: int | None
    slow: int | None
    worse: int
    publisher_keys: tuple[str, ...]
    broker: str | None
    folder: Path | None
    as_json: bool

    @property
    def publishers(self) -> tuple[PublicKey, ...]:
        """Keys of publishers. Raises UsageError."""
        return tuple(keys.load_public(text) for text in self.publisher_keys)


def run(home: Path, options: SimulateOptions, speed: float | None) -> None:
    """Run a scenario, print its report and write it to a file; exit with code 1 if it failed. Raises UsageError."""
    # Imported here: a hundred modules of device and collector.
    from outstation.foundation.cli.progress import ProgressBar
    from outstation.workbench.testing.simulation import scenario as scenarios
    from outstation.workbench.testing.simulation import setup as setups
    from outstation.workbench.testing.simulation import simulation_report as reporting
    from outstation.workbench.testing.simulation.log import written_log
    from outstation.workbench.testing.simulation.runner import Simulation

    assert options.scenario_file is not None
    report_file = options.report_file
    if report_file is not None and report_file.suffix not in (".json", ".html"):
        raise UsageError(f"--report {report_file}: must end in .json or .html")
    if report_file is not None:
        require_writable(report_file)
    bundles = dict(_split("--bundle", text, optional=True) for text in options.bundles)
    recordings = {
        stream: _split_columns(file) for stream, file in (_split("--recording", text) for text in options.recordings)
    }
    setup = setups.load(options.config_file, home, bundles, recordings, options.publishers)
    groups = setup.config.device.groups
    scenario = scenarios.load(
        options.scenario_file, setup.fields, setup.batch_s, options.devices, groups, setup.optional_fields
    )
    if options.seed is not None:
        scenario = msgspec.structs.replace(scenario, seed=options.seed)
    with (
        ProgressBar("messages", has_lines=True) as bar,
        deferred_exit() as leave,
        contextlib.closing(Simulation(home, scenario, setup, broker=options.broker, speed=speed)) as simulation,
        written_log(simulation.room, home / "simulation.log"),
    ):

        def report_progress(done_s: int, total_s: int, messages: int) -> None:
            leave()
            bar(done_s, total_s, messages)

        simulation.progress = report_progress
        outcome = simulation.run()
        document = reporting.build(scenario, outcome, simulation.store)
    if report_file is not None:
        _write_report(report_file, document)
    emit(document, options.as_json, lambda: _print_scenario(document), passed=document["passed"])


def _write_report(file: Path, document: dict[str, Any]) -> None:
    text = msgspec.json.format(msgspec.json.encode(document)) + b"\n"
    if file.suffix == ".html":
        from outstation.workbench.testing.simulation.page import render

        text = render(document).encode()
    durable_files.write(file, text, 0o644)


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
    by_time = sorted(enumerate(document["events"], 1), key=lambda entry: (float(entry[1]["at"]), entry[0]))
    rows = [_event_row(number, event) for number, event in by_time]
    print_table(["at", "event", "devices", "found"], rows, "No events.")
    for rollout in document["rollouts"]:
        _print_rollout(rollout)
    alarms = document["false_alarms"]
    echo("")
    for alarm in alarms["alerts"][:_MAX_SENTENCES]:
        echo(f"false alarm: {alarm['device']} after {format_span(alarm['at'])}: {alarm['summary']}")
    if alarms["n"] > _MAX_SENTENCES:
        echo(f"… and {alarms['n'] - _MAX_SENTENCES} more; all with --json")
    missed = pluralize(document["missed"], "expected alert")
    echo(f"{pluralize(alarms['n'], 'false alarm')}, budget {alarms['budget']}; {missed} missed")
    for warning in document["warnings"]:
        echo(f"warning: {warning}")
    for problem in document["problems"]:
        echo(f"not passed: {problem}")
    echo(
        f"{pluralize(document['devices'], 'device')}, {format_span(document['simulated_seconds'])} simulated, "
        f"{document['messages']} messages, {document['messages_per_second']:.0f} a second, "
        f"{document['peak_bytes'] / 2**20:.0f} MiB"
    )
    print_audit(document["audit"], document["seconds"])


def _print_rollout(rollout: dict[str, Any]) -> None:
    """Print the steps of a roll-out, and how many devices ended in each phase."""
    expected = "" if rollout["passed"] else f", expected {rollout['ends']}"
    echo(f"\nroll-out {rollout['name']} {rollout['version']}: {rollout['outcome']}{expected}: {rollout['why']}")
    for step in rollout["steps"]:
        reached = ", ".join(f"{len(set(names))} {phase}" for phase, names in step["devices"].items())
        echo(f"  {format_span(step['at'])}: {step['label']}: {reached or 'no device'}")
    phases = Counter(device["phase"] for device in rollout["devices"])
    if phases:
        echo(f"  at the end: {', '.join(f'{count} {phase}' for phase, count in sorted(phases.items()))}")


def _event_row(number: int, event: dict[str, Any]) -> list[str]:
    """Return time, kind and devices of an event, and the first alert that answers it."""
    first = min(event["found"], key=lambda alert: alert["after"], default=None)
    answer = event.get("outcome", "nothing expected") if not event["expects"] else "MISSED"
    if first is not None:
        subject = " ".join(dict.fromkeys((first["alert"], first["subject"]))).strip()
        answer = f"{subject} by the {first['by']} after {format_span(first['after'])}"
        if "shared_with" in first:
            answer += f", open since event {first['shared_with']}"
    if event["missed"] and event["found"]:
        answer += f"; MISSED at {', '.join(event['missed'][:3])}"
    at = ", ".join(event["devices"][:3]) + (" …" if len(event["devices"]) > 3 else "")
    return [format_span(event["at"]), f"{number} {event['kind']}", at or _PLACEHOLDER, answer]
