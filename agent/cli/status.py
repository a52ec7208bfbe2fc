"""`outstation status`: how the device is doing, read from its store beside the running daemon."""

from __future__ import annotations

import datetime
import json
from typing import Any

import click
import msgspec

from agent import clock
from agent.cli import operating, wiring
from agent.cli.output import config_option, emit, json_option, table
from agent.config import Config
from agent.device import choices, quality
from agent.device.operating import kept, overrides, wipe
from agent.device.recovery.condition import condition
from agent.device.storage import space
from agent.device.storage.store import Store
from agent.device.timekeeping import clock_of, report
from agent.errors import StorageError, UsageError
from agent.model import bundle
from agent.model.choice import Choice

_ALERTS = 5


@click.command(epilog="Example: outstation status --json")
@config_option
@json_option
def status(config_file: str | None, as_json: bool) -> None:
    """Backlog, tasks, bundles, outbox, hours of buffer left, clock, last alerts."""
    _, conf = wiring.load(config_file)
    wipe.require_unwiped(conf.data_dir)
    try:
        store = Store(conf.data_dir, read_only=True, max_size=int(conf.buffer.max_size))
    except StorageError:
        raise UsageError(f"{conf.data_dir}: no store here yet; start `outstation run`, or ingest something") from None
    try:
        found = document(conf, store)
    finally:
        store.close()
    emit(found, as_json, lambda: _print(found))


def document(conf: Config, store: Store) -> dict[str, Any]:
    """What `status --json` prints."""
    waiting, last = store.outbox_size()
    now = clock_of(store)()
    return {
        "device": conf.device.id,
        "fleet": conf.device.fleet,
        "log": store.log_id,
        "clock": {"time": clock.rfc3339(now.wall_us), "quality": now.quality, **report(store, now)},
        "streams": [
            {"stream": name, "rows": store.last_row(name), "kept_from": store.first_row(name)} for name in conf.streams
        ],
        "tasks": [_task(conf, store, name) for name in conf.tasks],
        "outbox": {"waiting": waiting, "last": last},
        "store": _room(conf, store),
        "condition": condition(store).document,
        "rejected": store.counters().get("lines rejected", 0),
        "alerts": store.alerts(_ALERTS),
    }


def _task(conf: Config, store: Store, name: str) -> dict[str, Any]:
    task = conf.tasks[name]
    cursor = store.cursor(name) or 0
    past = kept.history(store, name)
    chosen = choices.known(store, name)
    return {
        "task": name,
        "stream": task.stream,
        "schedule": overrides.scheduled(store, name) or task.schedule,
        "row": cursor,
        "backlog": store.last_row(task.stream) - cursor,
        "windows": store.counters().get(f"windows.{name}", 0),
        "bundle": _configured(conf, store, name) if past is None else str(past.now),
        "pace": msgspec.to_builtins(chosen[0]) if chosen else None,
        "site_reference": store.state(name, "site reference") is not None,
        "quality": _quality(store, name),
        **overrides.shown(store, name),
    }


def _configured(conf: Config, store: Store, name: str) -> str:
    """Of a task that never ran."""
    manifest = bundle.read(operating.bundle_of(conf, store, name), None).manifest
    return f"{manifest.name} {manifest.version}"


def _quality(store: Store, task: str) -> dict[str, Any] | None:
    """What the newest labels say, as the last `quality` message did; None before the first."""
    kept = store.state(task, quality.SHOWN)
    found: dict[str, Any] | None = json.loads(kept) if kept else None
    return found


def _by_labels(task: dict[str, Any]) -> str:
    """The metric that matters most, with its interval; "" where no labels came."""
    found = (task["quality"] or {}).get("metrics", [])
    for one in found[:1]:
        name = {"mae": "error", "auc": "AUC"}.get(one["metric"], one["metric"])
        span = "" if one["low"] is None else f" ({one['low']:.3g} to {one['high']:.3g})"
        return f"{name} {one['value']:.3g}{span} of {one['n']}" if one["value"] is not None else ""
    return ""


def _room(conf: Config, store: Store) -> dict[str, Any]:
    """Bytes, and hours until something undelivered would have to go; None where that is not in sight or not known."""
    hours = space.hours(store, store.limit_bytes())
    return {"bytes": store.used_bytes(), "max": int(conf.buffer.max_size), "hours": hours}


def _clock(clock: dict[str, Any]) -> str:
    right = f", to {clock['error_us'] / 1e6:.3f} s" if clock["error_us"] is not None else ""
    vouched = f"last vouched for {clock['synced']}" if clock["synced"] else "never vouched for by a time service"
    behind = f"; the time floor is {clock['floor']}" if clock["quality"] == "unsynced" else ""
    return f"clock {clock['time']}, {clock['quality']}{right}; {vouched}; set {clock['steps']} times this boot{behind}"


def _bundle_cell(task: dict[str, Any]) -> str:
    why = "another set aside" if "set_aside" in task else "rolled back" if "rolled_back_to" in task else ""
    return f"{task['bundle']} ({why})" if why else str(task["bundle"])


def _pace(task: dict[str, Any]) -> str:
    """How its model is run here, and how fast it would go."""
    return str(msgspec.convert(task["pace"], Choice)) if task["pace"] else "not tried yet"


def _print(document: dict[str, Any]) -> None:
    click.echo(f"{document['device']} in fleet {document['fleet']}, boot {document['clock']['boot']}")
    click.echo(_clock(document["clock"]))
    room, outbox = document["store"], document["outbox"]
    left = f", full in about {room['hours']:g} h at this pace" if room["hours"] is not None else ""
    click.echo(f"store {room['bytes'] / 2**20:.1f} of {room['max'] / 2**20:.0f} MiB{left}")
    click.echo(
        f"outbox {outbox['waiting']} waiting of {outbox['last']} written; {document['rejected']} lines rejected\n"
    )
    if shown := _condition(document["condition"]):
        click.echo(f"{shown}\n")
    table(
        ["task", "bundle", "schedule", "rows used", "waiting", "windows", "reference", "model runs", "by labels"],
        [
            [
                *(t["task"], _bundle_cell(t), "paused" if t.get("paused") else t["schedule"]),
                *(t[name] for name in ("row", "backlog", "windows")),
                "site's own" if t["site_reference"] else "shipped",
                _pace(t),
                _by_labels(t) or "none yet",
            ]
            for t in document["tasks"]
        ],
        "No tasks: add a [tasks.NAME] section to run a model.",
    )
    click.echo("")
    for alert in document["alerts"]:
        moment = datetime.datetime.fromisoformat(alert["time"])
        color = {"critical": "red", "warning": "yellow"}.get(alert["severity"])
        click.echo(f"{moment:%Y-%m-%d %H:%M}  {click.style(alert['state'], fg=color)}  {alert['summary']}")
    if not document["alerts"]:
        click.echo("No alerts.")


def _condition(found: dict[str, Any]) -> str:
    """One line where there is something to look at."""
    last, quarantine = found["last"], found["quarantine"]
    parts = ["last stop unclean"] if found["stop"] == "unclean" else []
    parts += [f"{last['time']}: {last['what']}"] if last else []
    parts += [f"{quarantine['bytes'] / 2**20:.1f} MiB in {quarantine['folder']}"] if quarantine else []
    return "; ".join(parts)
