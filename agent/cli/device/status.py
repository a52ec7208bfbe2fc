"""`outstation status`: how the device is doing, read from its store beside the running daemon."""

from __future__ import annotations

from typing import Any

import click

from agent import clock
from agent.bootstrap import wiring
from agent.cli.device import status_task
from agent.cli.output import config_option, emit, json_option
from agent.config import Config
from agent.device.commands import wipe
from agent.device.machine.throttle import Throttle
from agent.device.machine.timekeeping import build_report, make_clock
from agent.device.recovery.report_findings import inspect_condition
from agent.device.store import cost, space
from agent.device.store.store import Store

_MAX_ALERTS = 5


@click.command(epilog="Example: outstation status --json")
@config_option
@json_option
def status(config_file: str | None, as_json: bool) -> None:
    """Backlog, tasks and what is open of each, bundles, outbox, hours of buffer left, clock, last alerts."""
    _, conf = wiring.load_config(config_file)
    wipe.require_unwiped(conf.data_dir)
    store = wiring.open_store_read_only(conf)
    try:
        found = build_document(conf, store)
    finally:
        store.close()
    emit(found, as_json, lambda: _print(found))


def build_document(conf: Config, store: Store) -> dict[str, Any]:
    """What `status --json` prints."""
    waiting, last = store.outbox_size()
    now = make_clock(store)()
    return {
        "device": conf.device.id,
        "fleet": conf.device.fleet,
        "log": store.log_id,
        "clock": {"time": clock.to_rfc3339(now.wall_us), "quality": now.quality, **build_report(store, now)},
        "streams": [
            {"stream": name, "rows": store.last_row(name), "kept_from": store.first_row(name)} for name in conf.streams
        ],
        "tasks": [status_task.build_document(conf, store, name) for name in conf.tasks],
        "outbox": {"waiting": waiting, "last": last},
        "store": _storage_usage(conf, store),
        "condition": inspect_condition(store).document,
        "care": Throttle(conf.care).tick(now).to_dict(),
        "rejected": store.counters().get("lines rejected", 0),
        "failed_files": store.counters().get("files failed", 0),
        "alerts": store.recent_alerts(_MAX_ALERTS),
    }


def _storage_usage(conf: Config, store: Store) -> dict[str, Any]:
    """Bytes, and hours until something undelivered would have to go; None where that is not in sight or not known.

    `written_per_day` is what the kernel wrote to the medium for the agent; a file system's journal comes on top.
    """
    hours, spent = space.hours_until_eviction(store, store.limit_bytes()), cost.read_process_cost(store.counters())
    written = round(spent.written_bytes / spent.seconds * 86_400) if spent.seconds else None
    return {"written_per_day": written, "bytes": store.used_bytes(), "max": int(conf.buffer.max_size), "hours": hours}


def _format_clock(clock: dict[str, Any]) -> str:
    right = f", to {clock['error_us'] / 1e6:.3f} s" if clock["error_us"] is not None else ""
    vouched = f"last vouched for {clock['synced']}" if clock["synced"] else "never vouched for by a time service"
    behind = f"; the time floor is {clock['floor']}" if clock["quality"] == "unsynced" else ""
    return f"clock {clock['time']}, {clock['quality']}{right}; {vouched}; set {clock['steps']} times this boot{behind}"


def _print(document: dict[str, Any]) -> None:
    click.echo(f"{document['device']} in fleet {document['fleet']}, boot {document['clock']['boot']}")
    click.echo(_format_clock(document["clock"]))
    room, outbox = document["store"], document["outbox"]
    left = f", full in about {room['hours']:g} h at this pace" if room["hours"] is not None else ""
    wear = f"; {room['written_per_day'] / 1e6:,.1f} MB a day written" if room["written_per_day"] is not None else ""
    click.echo(f"store {room['bytes'] / 2**20:.1f} of {room['max'] / 2**20:.0f} MiB{left}{wear}")
    files = f", {document['failed_files']} files failed" if document["failed_files"] else ""
    refused = f"{document['rejected']} lines rejected{files}"
    click.echo(f"outbox {outbox['waiting']} waiting of {outbox['last']} written; {refused}\n")
    if shown := _format_condition(document["condition"]):
        click.echo(f"{shown}\n")
    if resting := document["care"].get("resting"):
        click.echo(f"tasks wait: {resting}\n")
    status_task.print_tasks(document["tasks"])
    click.echo("")
    for alert in document["alerts"]:
        click.echo(status_task.format_alert(alert, alert["state"]))
    if not document["alerts"]:
        click.echo("No alerts.")


def _format_condition(state: dict[str, Any]) -> str:
    """One line where there is something to look at."""
    last, quarantine = state["last"], state["quarantine"]
    parts = ["last stop unclean"] if state["stop"] == "unclean" else []
    parts += [f"{last['time']}: {last['what']}"] if last else []
    parts += [f"{quarantine['bytes'] / 2**20:.1f} MiB in {quarantine['folder']}"] if quarantine else []
    return "; ".join(parts)
