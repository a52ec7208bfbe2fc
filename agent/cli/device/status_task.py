"""The part of `outstation status` that is about tasks: what is open of each, its reference, and what labels say."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import click
import msgspec

from agent.cli.output import print_table
from agent.config import Config
from agent.device import status
from agent.device.bundles import history as kept
from agent.device.bundles import overrides, rollout_state
from agent.device.pipeline import deadline, tuning_cache
from agent.device.store import task_keys
from agent.device.store.store import Store
from agent.errors import UsageError
from agent.model.bundle import bundle
from agent.model.inference.tuning import Tuning

_METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1_macro": "F1",
    "f1": "F1",
    "brier": "Brier",
    "brier_top": "Brier",
    "ece": "ECE",
    "mae": "error",
    "rmse": "RMSE",
    "r2": "R²",
    "auc": "AUC",
}
_MAX_WORSE_SLICES = 3


def build_document(conf: Config, store: Store, name: str) -> dict[str, Any]:
    """One task of `status --json`."""
    task, counters = conf.tasks[name], store.counters()
    cursor = store.cursor(name) or 0
    past = kept.load_history(store, name)
    chosen = tuning_cache.load(store, name)
    return {
        "task": name,
        "stream": task.stream,
        "schedule": overrides.load_schedule(store, name) or task.schedule,
        "row": cursor,
        "backlog": store.last_row(task.stream) - cursor,
        "windows": counters.get(f"windows.{name}", 0),
        "bundle": _configured_bundle(conf, store, name) if past is None else str(past.current),
        "pace": msgspec.to_builtins(chosen[0]) if chosen else None,
        "site_reference": store.load_state(name, task_keys.SITE_REFERENCE) is not None,
        "reference": _reference_summary(conf, store, name),
        "open": store.open_alerts(name),
        "quality": _load_label_metrics(store, name),
        **deadline.to_status(store, counters, name, task.deadline),
        **overrides.to_status(store, name),
        **rollout_state.build_status(store, name, conf.device.id),
    }


def _configured_bundle(conf: Config, store: Store, name: str) -> str:
    """Of a task that never ran."""
    manifest = bundle.read(kept.locate_bundle(conf, store, name), None).manifest
    return f"{manifest.name} {manifest.version}"


def _reference_summary(conf: Config, store: Store, task: str) -> dict[str, Any]:
    """`number`, `windows` and `warning` of the site's, or `learning`; what cannot be read is a warning."""
    try:
        found = status.build_document(conf, store, task)
    except UsageError as problem:
        return {"site": None, "learning": None, "warning": str(problem)}
    site = found["site"]
    return {
        "site": {name: site[name] for name in ("number", "windows")} if site else None,
        "learning": found["learning"],
        "warning": site["warning"] if site else None,
    }


def _load_label_metrics(store: Store, task: str) -> dict[str, Any] | None:
    """What the newest labels say, as the last `quality` message did; None before the first."""
    kept = store.load_state(task, task_keys.LAST_LABEL_METRICS)
    found: dict[str, Any] | None = json.loads(kept) if kept else None
    return found


def print_tasks(tasks: Sequence[dict[str, Any]]) -> None:
    """A table of all tasks, and below it what there is to know of each."""
    print_table(
        ["task", "bundle", "schedule", "rows used", "waiting", "windows", "reference", "open"],
        [
            [
                *(t["task"], _format_bundle(t), "paused" if t.get("paused") else t["schedule"]),
                *(t[name] for name in ("row", "backlog", "windows")),
                _format_reference_state(t["reference"]),
                len(t["open"]) or "nothing",
            ]
            for t in tasks
        ],
        "No tasks: add a [tasks.NAME] section to run a model.",
    )
    for task in tasks:
        lines = [
            _format_tuning(task),
            *_format_deadline(task.get("deadline")),
            *_format_rollout(task.get("rollout")),
            *_format_reference(task["reference"]),
            *_format_label_metrics(task["quality"]),
        ]
        lines += [format_alert(alert, f"open {alert['alert']}") for alert in task["open"]]
        click.echo(f"\n{task['task']}")
        for line in lines:
            click.echo(f"  {line}")


def format_alert(alert: dict[str, Any], heading: str) -> str:
    """When, in colour what, and its sentence."""
    moment = datetime.datetime.fromisoformat(alert["time"])
    color = {"critical": "red", "warning": "yellow"}.get(alert["severity"])
    return f"{moment:%Y-%m-%d %H:%M}  {click.style(heading, fg=color)}  {alert['summary']}"


def _format_bundle(task: dict[str, Any]) -> str:
    why = "another set aside" if "set_aside" in task else "rolled back" if "rolled_back_to" in task else ""
    return f"{task['bundle']} ({why})" if why else str(task["bundle"])


def _format_tuning(task: dict[str, Any]) -> str:
    """How its model is run here, and how fast it would go."""
    return f"model runs: {msgspec.convert(task['pace'], Tuning) if task['pace'] else 'not tried yet'}"


def _format_deadline(lateness: dict[str, Any] | None) -> list[str]:
    """How many batches took longer than they may, and the last of them."""
    if lateness is None:
        return []
    line, last = f"deadline {lateness['seconds']:g} s: ", lateness["last"]
    if not lateness["late"] or last is None:
        return [line + "no batch was late"]
    batches = "1 batch was" if lateness["late"] == 1 else f"{lateness['late']:,} batches were"
    moment = datetime.datetime.fromisoformat(last["time"])
    took = f"{last['seconds']:g} s for {last['windows']:,} windows"
    return [line + click.style(f"{batches} late, the last at {moment:%Y-%m-%d %H:%M}: {took}", fg="yellow")]


def _format_rollout(rollout: dict[str, Any] | None) -> list[str]:
    """What is desired of it, how it stands with that, and why it does not run what it should."""
    if rollout is None:
        return []
    wants, phase = rollout["wants"], rollout["phase"]
    color = {"refused": "yellow", "rolled back": "red"}.get(phase)
    said = click.style(phase, fg=color) + (f" ({rollout['reason']})" if rollout["reason"] else "")
    word = "on" if phase == "settled" else "with" if phase == "probation" else "of"
    late = click.style(" LATE", fg="yellow") if rollout["late"] else ""
    why = f": {rollout['why']}" if rollout["why"] else ""
    what = f"{wants['name']} {wants['version']}"
    return [
        f"roll-out {rollout['id']} ({rollout['strategy']}): {said} {word} {what} since {rollout['since']}{late}{why}"
    ]


def _format_reference_state(reference: dict[str, Any]) -> str:
    return "site's own" if reference["site"] else "learning" if reference["learning"] else "shipped"


def _format_reference(reference: dict[str, Any]) -> list[str]:
    lines = []
    if (learning := reference["learning"]) is not None:
        span = f" over at least {learning['for_s']:.0f} s" if learning["for_s"] else ""
        lines.append(f"learning its reference: {learning['windows']} of {learning['of']} drift windows{span}")
    if reference["warning"] is not None:
        lines.append(f"reference: {click.style('warning', fg='yellow')}: {reference['warning']}")
    return lines


def _format_label_metrics(report: dict[str, Any] | None) -> list[str]:
    """The newest metrics with their intervals, and where it is worse than elsewhere."""
    if report is None:
        return ["by labels: none yet"]
    whole = [one for one in report["metrics"] if not one.get("slice") and one["metric"] in _METRIC_NAMES]
    n = report.get("window", {}).get("n")
    chance = [one["value"] for one in report["metrics"] if one["metric"] == "ece_chance"]
    beside = {"ece": f" where chance alone makes {chance[0]:.2g}"} if chance else {}
    known = [one for one in whole if one["value"] is not None]
    told = ", ".join(
        f"{_METRIC_NAMES[one['metric']]} {_format_interval(one)}{beside.get(one['metric'], '')}" for one in known
    )
    worse = [one for one in report["metrics"] if one.get("state") == "worse"]
    more = f" and {len(worse) - _MAX_WORSE_SLICES} more" if len(worse) > _MAX_WORSE_SLICES else ""
    where = ", ".join(f"{one['slice']} {_format_interval(one)}" for one in worse[:_MAX_WORSE_SLICES])
    day = datetime.datetime.fromisoformat(report["time"])
    lines = [f"by labels of {n} results ({day:%Y-%m-%d %H:%M}): {told}"] if told else []
    return lines + ([f"worse than elsewhere: {where}{more}"] if where else [])


def _format_interval(metric: dict[str, Any]) -> str:
    span = "" if metric["low"] is None else f" ({metric['low']:.3g} to {metric['high']:.3g})"
    return f"{metric['value']:.3g}{span}"
