"""The part of `outstation status` that is about tasks: what is open of each, its reference, and what labels say."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import click
import msgspec

from agent.cli.output import table
from agent.config import Config
from agent.device import status
from agent.device.bundles import history as kept
from agent.device.bundles import overrides, rollout_state
from agent.device.pipeline import deadline, drift_state, label_metrics, tuning_cache
from agent.device.store.store import Store
from agent.errors import UsageError
from agent.model.bundle import bundle
from agent.model.inference.tuning import Choice

_NAMES = {
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
_MOST_WORSE = 3


def document(conf: Config, store: Store, name: str) -> dict[str, Any]:
    """One task of `status --json`."""
    task, counters = conf.tasks[name], store.counters()
    cursor = store.cursor(name) or 0
    past = kept.history(store, name)
    chosen = tuning_cache.known(store, name)
    return {
        "task": name,
        "stream": task.stream,
        "schedule": overrides.scheduled(store, name) or task.schedule,
        "row": cursor,
        "backlog": store.last_row(task.stream) - cursor,
        "windows": counters.get(f"windows.{name}", 0),
        "bundle": _configured(conf, store, name) if past is None else str(past.now),
        "pace": msgspec.to_builtins(chosen[0]) if chosen else None,
        "site_reference": store.state(name, drift_state.SITE) is not None,
        "reference": _reference(conf, store, name),
        "open": store.open_alerts(name),
        "quality": _quality(store, name),
        **deadline.shown(store, counters, name, task.deadline),
        **overrides.shown(store, name),
        **rollout_state.shown(store, name, conf.device.id),
    }


def _configured(conf: Config, store: Store, name: str) -> str:
    """Of a task that never ran."""
    manifest = bundle.read(kept.bundle_of(conf, store, name), None).manifest
    return f"{manifest.name} {manifest.version}"


def _reference(conf: Config, store: Store, task: str) -> dict[str, Any]:
    """`number`, `windows` and `warning` of the site's, or `learning`; what cannot be read is a warning."""
    try:
        found = status.document(conf, store, task)
    except UsageError as problem:
        return {"site": None, "learning": None, "warning": str(problem)}
    site = found["site"]
    return {
        "site": {name: site[name] for name in ("number", "windows")} if site else None,
        "learning": found["learning"],
        "warning": site["warning"] if site else None,
    }


def _quality(store: Store, task: str) -> dict[str, Any] | None:
    """What the newest labels say, as the last `quality` message did; None before the first."""
    kept = store.state(task, label_metrics.SHOWN)
    found: dict[str, Any] | None = json.loads(kept) if kept else None
    return found


def show(tasks: Sequence[dict[str, Any]]) -> None:
    """A table of all tasks, and below it what there is to know of each."""
    table(
        ["task", "bundle", "schedule", "rows used", "waiting", "windows", "reference", "open"],
        [
            [
                *(t["task"], _bundle_cell(t), "paused" if t.get("paused") else t["schedule"]),
                *(t[name] for name in ("row", "backlog", "windows")),
                _reference_cell(t["reference"]),
                len(t["open"]) or "nothing",
            ]
            for t in tasks
        ],
        "No tasks: add a [tasks.NAME] section to run a model.",
    )
    for task in tasks:
        lines = [
            _pace_line(task),
            *_deadline_lines(task.get("deadline")),
            *_rollout_lines(task.get("rollout")),
            *_reference_lines(task["reference"]),
            *_quality_lines(task["quality"]),
        ]
        lines += [alert_line(alert, f"open {alert['alert']}") for alert in task["open"]]
        click.echo(f"\n{task['task']}")
        for line in lines:
            click.echo(f"  {line}")


def alert_line(alert: dict[str, Any], what: str) -> str:
    """When, in colour what, and its sentence."""
    moment = datetime.datetime.fromisoformat(alert["time"])
    color = {"critical": "red", "warning": "yellow"}.get(alert["severity"])
    return f"{moment:%Y-%m-%d %H:%M}  {click.style(what, fg=color)}  {alert['summary']}"


def _bundle_cell(task: dict[str, Any]) -> str:
    why = "another set aside" if "set_aside" in task else "rolled back" if "rolled_back_to" in task else ""
    return f"{task['bundle']} ({why})" if why else str(task["bundle"])


def _pace_line(task: dict[str, Any]) -> str:
    """How its model is run here, and how fast it would go."""
    return f"model runs: {msgspec.convert(task['pace'], Choice) if task['pace'] else 'not tried yet'}"


def _deadline_lines(found: dict[str, Any] | None) -> list[str]:
    """How many batches took longer than they may, and the last of them."""
    if found is None:
        return []
    line, last = f"deadline {found['seconds']:g} s: ", found["last"]
    if not found["late"] or last is None:
        return [line + "no batch was late"]
    batches = "1 batch was" if found["late"] == 1 else f"{found['late']:,} batches were"
    moment = datetime.datetime.fromisoformat(last["time"])
    took = f"{last['seconds']:g} s for {last['windows']:,} windows"
    return [line + click.style(f"{batches} late, the last at {moment:%Y-%m-%d %H:%M}: {took}", fg="yellow")]


def _rollout_lines(found: dict[str, Any] | None) -> list[str]:
    """What is desired of it, how it stands with that, and why it does not run what it should."""
    if found is None:
        return []
    wants, phase = found["wants"], found["phase"]
    color = {"refused": "yellow", "rolled back": "red"}.get(phase)
    said = click.style(phase, fg=color) + (f" ({found['reason']})" if found["reason"] else "")
    word = "on" if phase == "settled" else "with" if phase == "probation" else "of"
    late = click.style(" LATE", fg="yellow") if found["late"] else ""
    why = f": {found['why']}" if found["why"] else ""
    what = f"{wants['name']} {wants['version']}"
    return [f"roll-out {found['id']} ({found['strategy']}): {said} {word} {what} since {found['since']}{late}{why}"]


def _reference_cell(found: dict[str, Any]) -> str:
    return "site's own" if found["site"] else "learning" if found["learning"] else "shipped"


def _reference_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    if (learning := found["learning"]) is not None:
        span = f" over at least {learning['for_s']:.0f} s" if learning["for_s"] else ""
        lines.append(f"learning its reference: {learning['windows']} of {learning['of']} drift windows{span}")
    if found["warning"] is not None:
        lines.append(f"reference: {click.style('warning', fg='yellow')}: {found['warning']}")
    return lines


def _quality_lines(found: dict[str, Any] | None) -> list[str]:
    """The newest metrics with their intervals, and where it is worse than elsewhere."""
    if found is None:
        return ["by labels: none yet"]
    whole = [one for one in found["metrics"] if not one.get("slice") and one["metric"] in _NAMES]
    n = found.get("window", {}).get("n")
    chance = [one["value"] for one in found["metrics"] if one["metric"] == "ece_chance"]
    beside = {"ece": f" where chance alone makes {chance[0]:.2g}"} if chance else {}
    known = [one for one in whole if one["value"] is not None]
    told = ", ".join(f"{_NAMES[one['metric']]} {_span(one)}{beside.get(one['metric'], '')}" for one in known)
    worse = [one for one in found["metrics"] if one.get("state") == "worse"]
    more = f" and {len(worse) - _MOST_WORSE} more" if len(worse) > _MOST_WORSE else ""
    where = ", ".join(f"{one['slice']} {_span(one)}" for one in worse[:_MOST_WORSE])
    day = datetime.datetime.fromisoformat(found["time"])
    lines = [f"by labels of {n} results ({day:%Y-%m-%d %H:%M}): {told}"] if told else []
    return lines + ([f"worse than elsewhere: {where}{more}"] if where else [])


def _span(one: dict[str, Any]) -> str:
    span = "" if one["low"] is None else f" ({one['low']:.3g} to {one['high']:.3g})"
    return f"{one['value']:.3g}{span}"
