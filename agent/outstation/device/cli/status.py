"""Command `outstation status`: the device's state, read from its store beside the running daemon."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import click

from outstation.device import newest
from outstation.device import status as documents
from outstation.device.bootstrap import device
from outstation.device.cli.reference import format_learning, format_smallest_changes
from outstation.device.config import StreamConfig
from outstation.device.store.store import Store
from outstation.foundation import decoders
from outstation.foundation.cli.follow import format_reading
from outstation.foundation.cli.options import config_options
from outstation.foundation.cli.output import echo, echo_wrapped, emit, print_table
from outstation.foundation.text import format_duration, list_names, pluralize, printable, printable_lines
from outstation.ml.model.inference.tuning import Tuning
from outstation.ml.performance.metrics import display_name

_HEADLINE_METRICS = frozenset({"accuracy", "f1_macro", "f1", "brier", "brier_top", "ece", "mae", "rmse", "r2", "auc"})
_MAX_WORSE_SLICES = 3
_STREAM_COUNTS = {
    "duplicate_rows": "duplicates rejected",
    "late_rows": "late rows rejected",
    "step_rows": "rows rejected by max_step",
    "out_of_order_rows": "rows out of order accepted",
    "source_restarts": "restarts of the source after a failure",
    "program_restarts": "restarts of the program",
    "program_silences": "times killed because it was silent",
    "program_floods": "times held back by max_rate",
    "program_losses": "lines of the program lost at a stop",
}
_MAX_VALUES = 6  # of a stream's newest row
_MAX_FIELDS = 6  # whose smallest changes are shown


@click.command(epilog="Example: outstation status --json")
@config_options
def status(config_file: str | None, as_json: bool) -> None:
    """Show streams, tasks, open alerts, bundles, outbox, storage, clock and the last alerts."""
    _, conf = device.load_config(config_file)
    with device.open_store_read_only(conf) as store:
        document = documents.build_document(conf, store)
        for stream in document["streams"]:
            _add_values(stream, store, conf.streams[stream["stream"]])
    emit(document, as_json, lambda: print_document(document))


def _add_values(document: dict[str, Any], store: Store, stream: StreamConfig) -> None:
    """Add the values of the newest row to a stream's document; those of an image or sound say nothing to a person."""
    if document["last"] is not None and stream.media_format is None:
        for reading in newest.read_readings(store, document["stream"], stream, 1):
            document["last"]["values"] = reading["values"]


def print_document(document: dict[str, Any]) -> None:
    """Print a status document, also one that a device sent."""
    _print_text(f"{document['device']} in fleet {document['fleet']}, boot {document['clock']['boot']}")
    clock = document["clock"]
    error = f", to {clock['error_us'] / 1e6:.3f} s" if clock["error_us"] is not None else ""
    synced = f"last synchronized {clock['synced']}" if clock["synced"] else "never synchronized by a time service"
    floor = f"; the time floor is {clock['floor']}" if clock["quality"] == "unsynced" else ""
    _print_text(
        f"clock {clock['time']}, {clock['quality']}{error}; {synced}; set {clock['steps']} times this boot{floor}"
    )
    storage, outbox = document["store"], document["outbox"]
    left = f", full in about {storage['hours']:g} h at this rate" if storage["hours"] is not None else ""
    written = storage["written_per_day"]
    wear = f"; {written / 1e6:,.1f} MB written a day" if written is not None else ""
    _print_text(f"store {storage['bytes'] / 2**20:.1f} of {storage['max'] / 2**20:.0f} MiB{left}{wear}")
    files = f", {document['failed_files']} files failed" if document["failed_files"] else ""
    files += f", {n} files that came twice" if (n := document["duplicate_files"]) else ""
    others = f", {n} category values as (other)" if (n := document["other_categories"]) else ""
    refused = f", {n} connections refused" if (n := document["refused_connections"]) else ""
    refused += f", {n} lines refused while the store was full" if (n := document.get("full_lines")) else ""
    rejected = f"{document['rejected']} lines rejected{files}{others}{refused}"
    _print_text(f"outbox {outbox['waiting']} waiting of {outbox['last']} written; {rejected}")
    if (kernel := document.get("kernel")) is not None:
        _print_text(f"statistics by {kernel}")
    if (metered := document.get("metered")) is not None:
        _print_text(f"metered connection: {format_metered(metered)}")
    echo("")
    _print_streams(document["streams"])
    for stream in document["streams"]:
        if parts := [f"{stream[key]} {words}" for key, words in _STREAM_COUNTS.items() if stream.get(key)]:
            _print_text(f"stream {stream['stream']}: {', '.join(parts)}\n")
    condition = document["condition"]
    last, quarantine = condition["last_finding"], condition["quarantine"]
    parts = ["last stop unclean"] if condition["last_stop"] == "unclean" else []
    parts += [f"{last['time']}: {last['summary']}"] if last else []
    parts += [f"{quarantine['bytes'] / 2**20:.1f} MiB in {quarantine['folder']}"] if quarantine else []
    if parts:
        _print_text(f"{'; '.join(parts)}\n")
    if (samples := document.get("samples")) is not None:
        dropped = ", ".join(f"{n} dropped ({reason})" for reason, n in sorted(samples["dropped"].items()))
        spent = f"{samples['bytes_today']} of {samples['max_per_day']} bytes today"
        _print_text(f"samples: {samples['sent']} sent, {spent}{dropped and f', {dropped}'}; {samples['consent']}\n")
    if pause_reason := document["throttle"].get("resting"):
        _print_text(f"tasks are paused: {pause_reason}\n")
    if slow_reason := document["throttle"].get("slowed"):
        _print_text(f"tasks are slowed down: {slow_reason}\n")
    _print_tasks(document["tasks"])
    shown = [_identify(alert) for task in document["tasks"] for alert in task["open"]]
    earlier = [alert for alert in document["alerts"] if alert["state"] != "raised" or _identify(alert) not in shown]
    if earlier or not document["alerts"]:
        echo("" if earlier else "\nNo alerts.")
    names = {task["task"] for task in document["tasks"]}
    for alert in earlier:
        task = alert["id"].partition("/")[0]
        _print_alert(alert, f"{alert['state']} {task}" if task in names else alert["state"], 0)


def _print_text(text: str) -> None:
    echo_wrapped(printable_lines(text), 2)


def _identify(alert: dict[str, Any]) -> tuple[str, str]:
    return alert["time"], alert["summary"]


def format_metered(metered: dict[str, Any]) -> str:
    """Format what a metered connection moved, and what holds bulk back."""
    budget, windows = metered["budget"], ", ".join(metered["windows"])
    limit = f" of {budget / 1e6:,.2f} MB" if budget is not None else ""
    when = f", in {windows}" if windows else ""
    age = metered["max_age_s"]
    until = f"; given up after {format_duration(age * 1e6)}: {metered['expired']:,} messages" if age is not None else ""
    return f"{metered['used'] / 1e6:,.2f} MB{limit} used within 24 h; bulk {metered['bulk']}{when}{until}"


def _print_streams(streams: Sequence[dict[str, Any]]) -> None:
    rows = []
    for stream in streams:
        last = stream["last"]
        values = last.get("values", {}) if last else {}
        shown = list_names([f"{name} {format_reading(value)}" for name, value in values.items()], _MAX_VALUES)
        rows.append([stream["stream"], stream["rows"], _format_age(last), shown])
    print_table(["stream", "rows", "last row", "values"], rows, "No streams: add a [streams.NAME] section.")
    echo("")


def _format_age(last: dict[str, Any] | None) -> str:
    if last is None:
        return "none stored"
    age = last["age_s"]
    return f"{format_duration(age * 1e6)} ago" if age >= 0 else f"{format_duration(-age * 1e6)} ahead of the clock"


def _print_tasks(tasks: Sequence[dict[str, Any]]) -> None:
    print_table(
        ["task", "bundle", "schedule", "rows used", "waiting", "windows"],
        [
            [
                *(task["task"], _format_bundle(task), "paused" if task.get("paused") else task["schedule"]),
                *(task[name] for name in ("row", "backlog", "windows")),
            ]
            for task in tasks
        ],
        "No tasks: add a [tasks.NAME] section to run a model.",
    )
    for task in tasks:
        lines = [
            f"model runs: {decoders.convert(task['pace'], Tuning) if task['pace'] else 'not tuned yet'}",
            f"drift: {_format_reference_state(task['reference'])}; {pluralize(len(task['open']), 'open alert')}",
            *_format_joined(task.get("joined")),
            *_format_deadline(task.get("deadline")),
            *_format_rollout(task.get("rollout")),
            *_format_reference(task["reference"]),
            *_format_labels(task),
        ]
        for name, output in task.get("outputs", {}).items():
            lines += [f"output {name}: {line}" for line in _format_labels(output)]
        echo(f"\n{task['task']}")
        for line in lines:
            echo_wrapped(f"  {line}", 4)
        for alert in task["open"]:
            _print_alert(alert, f"open {alert['alert']}", 2)


def _print_alert(alert: dict[str, Any], heading: str, indent: int) -> None:
    moment = datetime.datetime.fromisoformat(alert["time"])
    color = {"critical": "red", "warning": "yellow"}.get(alert["severity"])
    head = f"{moment:%Y-%m-%d %H:%M}  {click.style(printable(heading), fg=color)}"
    echo_wrapped(f"{' ' * indent}{head}  {printable(alert['summary'])}", indent + 2)


def _format_bundle(task: dict[str, Any]) -> str:
    note = (
        "another is quarantined" if "quarantined_bundles" in task else "rolled back" if "rolled_back_to" in task else ""
    )
    return f"{task['bundle']} ({note})" if note else str(task["bundle"])


def _format_joined(joined: dict[str, Any] | None) -> list[str]:
    if joined is None:
        return []
    lines = [
        f"joins {name}: stream {each['stream']}, rows {each['row'] or 1:,} to {each['last']:,}"
        for name, each in joined["streams"].items()
    ]
    if joined["waiting_through"] is not None:
        longest = max(each["wait_s"] for each in joined["streams"].values())
        lines.append(
            f"windows up to row {joined['waiting_through']:,} wait for later joined rows, at most {longest:g} s"
        )
    return lines


def _format_deadline(deadline: dict[str, Any] | None) -> list[str]:
    if deadline is None:
        return []
    line, last = f"deadline {deadline['seconds']:g} s: ", deadline["last"]
    if not deadline["late"] or last is None:
        return [line + "no batch was late"]
    batches = "1 batch was" if deadline["late"] == 1 else f"{deadline['late']:,} batches were"
    moment = datetime.datetime.fromisoformat(last["time"])
    duration = f"{last['seconds']:g} s for {last['windows']:,} windows"
    return [line + click.style(f"{batches} late, the last at {moment:%Y-%m-%d %H:%M}: {duration}", fg="yellow")]


def _format_rollout(rollout: dict[str, Any] | None) -> list[str]:
    if rollout is None:
        return []
    wanted, phase = rollout["desired"], rollout["phase"]
    color = {"rejected": "yellow", "rolled_back": "red"}.get(phase)
    state = click.style(phase, fg=color) + (f" ({printable(rollout['reason'])})" if rollout["reason"] else "")
    late = click.style(" LATE", fg="yellow") if rollout["late"] else ""
    detail = f": {printable(rollout['detail'])}" if rollout["detail"] else ""
    target = printable(f"{wanted['name']} {wanted['version']}")
    name = f"rollout {printable(rollout['id'])} ({rollout['strategy']})"
    return [f"{name} of {target}: {state} since {rollout['since']}{late}{detail}"]


def _format_reference_state(reference: dict[str, Any]) -> str:
    if reference["site"]:
        return "tested against the site's own reference"
    return "not tested while the reference is learned" if reference["learning"] else "not tested, without a reference"


def _format_reference(reference: dict[str, Any]) -> list[str]:
    lines = []
    if (learning := reference["learning"]) is not None:
        lines.append(f"learning its reference: {format_learning(learning)}")
    if (site := reference["site"]) is not None:
        if site["modes"] > 1:
            lines.append(f"compared within {site['modes']} operating modes")
        lines += format_smallest_changes(site["smallest_changes"], _MAX_FIELDS)
    if reference["warning"] is not None:
        lines.append(f"reference: {click.style('warning', fg='yellow')}: {printable(reference['warning'])}")
    return lines


def _format_labels(output: dict[str, Any]) -> list[str]:
    """Return the lines about the labels of one output."""
    return [*map(printable, _format_label_metrics(output["quality"])), *_format_label_counts(output["labels"])]


def _format_label_metrics(report: dict[str, Any] | None) -> list[str]:
    """Return the newest metrics with their intervals, and the slices that are worse than the rest."""
    if report is None:
        return ["by labels: none yet"]
    metrics = report["metrics"]
    overall = [m for m in metrics if not m.get("slice") and m["metric"] in _HEADLINE_METRICS and m["value"] is not None]
    chance = [m["value"] for m in metrics if m["metric"] == "ece_chance"]
    notes = {"ece": f" where chance alone makes {chance[0]:.2g}"} if chance else {}
    text = ", ".join(f"{display_name(m['metric'])} {_format_interval(m)}{notes.get(m['metric'], '')}" for m in overall)
    worse = [m for m in metrics if m.get("state") == "worse"]
    slices = list_names([f"{m['slice']} {_format_interval(m)}" for m in worse], _MAX_WORSE_SLICES)
    day = datetime.datetime.fromisoformat(report["time"])
    n = report.get("window", {}).get("n")
    lines = [f"by labels of {n} results ({day:%Y-%m-%d %H:%M}): {text}"] if text else []
    return lines + ([f"worse than elsewhere: {slices}"] if slices else [])


def _format_label_counts(counts: dict[str, int]) -> list[str]:
    """Return how many labels are ground truth, and how many verdicts; nothing without labels."""
    if not any(counts.values()):
        return []
    parts = [f"{counts['truth']} of ground truth", f"{counts['verdicts']} verdicts"]
    parts += [f"{counts['model']} the model's own"] if counts["model"] else []
    parts += [f"{counts['waiting']} that wait for their result"] if counts["waiting"] else []
    return [f"labels: {', '.join(parts)}; {counts['authenticated']} authenticated"]


def _format_interval(metric: dict[str, Any]) -> str:
    interval = "" if metric["low"] is None else f" ({metric['low']:.3g} to {metric['high']:.3g})"
    return f"{metric['value']:.3g}{interval}"
