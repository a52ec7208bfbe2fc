"""`outstation status`: how the device is doing, read from its store beside the running daemon."""

from __future__ import annotations

import datetime
from typing import Any

import click

from agent import clock
from agent.cli import wiring
from agent.cli.output import config_option, emit, json_option, table
from agent.config import Config
from agent.device.store import Store
from agent.errors import StorageError, UsageError
from agent.model import activate, bundle

_ALERTS = 5


@click.command(epilog="Example: outstation status --json")
@config_option
@json_option
def status(config_file: str | None, as_json: bool) -> None:
    """Backlog, tasks, bundles, outbox, hours of buffer left, clock, last alerts."""
    _, conf = wiring.load(config_file)
    try:
        store = Store(conf.data_dir, read_only=True)
    except StorageError:
        raise UsageError(f"{conf.data_dir}: no store here yet; start `outstation run`, or ingest something") from None
    try:
        document = _read(conf, store)
    finally:
        store.close()
    emit(document, as_json, lambda: _print(document))


def _read(conf: Config, store: Store) -> dict[str, Any]:
    waiting, last = store.outbox_size()
    now = clock.read(max(clock.BUILD_FLOOR_US, int(store.meta("time floor", "0"))))
    return {
        "device": conf.device.id,
        "fleet": conf.device.fleet,
        "log": store.log_id,
        "clock": {"time": clock.rfc3339(now.wall_us), "quality": now.quality},
        "streams": [
            {"stream": name, "rows": store.last_row(name), "kept_from": store.first_row(name)} for name in conf.streams
        ],
        "tasks": [_task(conf, store, name) for name in conf.tasks],
        "outbox": {"waiting": waiting, "last": last},
        "store": _room(conf, store),
        "rejected": store.counters().get("lines rejected", 0),
        "alerts": store.alerts(_ALERTS),
    }


def _task(conf: Config, store: Store, name: str) -> dict[str, Any]:
    task = conf.tasks[name]
    cursor = store.cursor(name) or 0
    manifest = bundle.read(activate.locate(task.bundle, conf.data_dir / "bundles"), None).manifest
    return {
        "task": name,
        "stream": task.stream,
        "schedule": task.schedule,
        "row": cursor,
        "backlog": store.last_row(task.stream) - cursor,
        "windows": store.counters().get(f"windows.{name}", 0),
        "bundle": f"{manifest.name} {manifest.version}",
        "site_reference": store.state(name, "site reference") is not None,
    }


def _room(conf: Config, store: Store) -> dict[str, Any]:
    """Bytes, and hours until the quota at the pace of the rows kept; None before there are enough to tell."""
    used, most = store.used_bytes(), int(conf.buffer.max_size)
    span_us = store.kept_span_us()
    hours = round((most - used) / (used / (span_us / 3.6e9)), 1) if span_us > 60_000_000 else None
    return {"bytes": used, "max": most, "hours_left": hours}


def _print(document: dict[str, Any]) -> None:
    click.echo(f"{document['device']} in fleet {document['fleet']}, clock {document['clock']['quality']}")
    room, outbox = document["store"], document["outbox"]
    left = f", about {room['hours_left']:g} h of buffer left" if room["hours_left"] is not None else ""
    click.echo(f"store {room['bytes'] / 2**20:.1f} of {room['max'] / 2**20:.0f} MiB{left}")
    click.echo(
        f"outbox {outbox['waiting']} waiting of {outbox['last']} written; {document['rejected']} lines rejected\n"
    )
    table(
        ["task", "bundle", "schedule", "rows used", "waiting", "windows", "reference"],
        [
            [
                *(t[name] for name in ("task", "bundle", "schedule", "row", "backlog", "windows")),
                "site's own" if t["site_reference"] else "shipped",
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
