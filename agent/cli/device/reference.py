"""`outstation reference …`: what this device takes for normal, per task."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from agent.bootstrap import device, tasks
from agent.cli.output import config_option, emit, json_option
from agent.config import Config, parse_duration
from agent.device import status
from agent.device.commands import wipe
from agent.device.machine.timekeeping import Timekeeper, make_clock
from agent.device.pipeline import relearn
from agent.device.store import task_keys
from agent.drift.baseline.reference import MIN_WINDOWS, RECOMMENDED_WINDOWS
from agent.errors import StorageBusy, UsageError
from agent.toml_files import did_you_mean

_TIMEOUT_S = 15.0


@click.group()
def reference() -> None:
    """A site's own drift reference: what is normal here. Drift is told against it."""


@reference.command(epilog="Example: outstation reference learn exercise --for 24h")
@click.argument("task")
@click.option("--for", "duration", default="0 s", metavar="TIME", help='Of readings, at least: "24 h", "3 d".')
@click.option("--wait", "wait_s", default=_TIMEOUT_S, type=click.FloatRange(min=0), metavar="S", help="To be taken up.")
@config_option
@json_option
def learn(task: str, duration: str, wait_s: float, config_file: str | None, as_json: bool) -> None:
    """Learn TASK's reference anew, from the next readings without a fault. Drift is not told until that is done."""
    try:
        for_s = float(parse_duration(duration))
    except ValueError as error:
        raise UsageError(f"--for: {error}") from None
    _submit_request(config_file, task, relearn.make_request("learn", for_s), wait_s, as_json)


@reference.command(epilog="Example: outstation reference reset exercise")
@click.argument("task")
@click.option("--wait", "wait_s", default=_TIMEOUT_S, type=click.FloatRange(min=0), metavar="S", help="To be taken up.")
@config_option
@json_option
def reset(task: str, wait_s: float, config_file: str | None, as_json: bool) -> None:
    """Forget TASK's reference; another is learned as the config says."""
    _submit_request(config_file, task, relearn.make_request("reset"), wait_s, as_json)


@reference.command(epilog="Example: outstation reference show exercise --json")
@click.argument("task")
@config_option
@json_option
def show(task: str, config_file: str | None, as_json: bool) -> None:
    """TASK's reference: its number, when and from how many windows it was learned, or how far learning has got."""
    _, conf = device.load_config(config_file)
    _require_task(conf, task)
    store = device.open_store_read_only(conf)
    try:
        document = status.build_reference_document(conf, store, task)
    finally:
        store.close()
    emit(document, as_json, lambda: click.echo(_format_reference(document)))


def _submit_request(
    config_file: str | None, task: str, request: relearn.RelearnRequest, wait_s: float, as_json: bool
) -> None:
    file, conf = device.load_config(config_file)
    wipe.require_unwiped(conf.data_dir)
    _require_task(conf, task)
    try:
        conf.data_dir.mkdir(parents=True, exist_ok=True)
        relearn.submit_request(conf.data_dir, task, request)
    except OSError as error:
        place = Path(str(error.filename)) if error.filename else conf.data_dir
        place = place if place.is_absolute() else conf.data_dir / "requests" / place
        raise UsageError(
            f"{place}: cannot be written: {error.strerror}; run this as root or the agent's user"
        ) from None
    taken = _apply_or_wait(file, conf, task, request, wait_s)
    document = {"task": task, "asked": request.action, "for_s": request.duration_s, "taken_up": taken}
    when = "is learned anew" if taken else "will be learned anew when the task next runs"
    emit(document, as_json, lambda: click.echo(f"{task}: the site's reference {when}"))


def _apply_or_wait(file: Path, conf: Config, task: str, request: relearn.RelearnRequest, wait_s: float) -> bool:
    """By the daemon, which owns the store; or here, where none runs."""
    try:
        store = device.open_store(conf)
    except StorageBusy:
        return _wait_for_daemon(conf, task, request, wait_s)
    try:
        writer, now = device.open_message_log(file, conf, store), make_clock(store)
        Timekeeper(store, writer).tick(now())
        return relearn.apply_pending(tasks.load_task(file, conf, store, task), store, writer, now())
    finally:
        store.close()


def _wait_for_daemon(conf: Config, task: str, request: relearn.RelearnRequest, wait_s: float) -> bool:
    store = device.open_store_read_only(conf)
    try:
        deadline = time.monotonic() + wait_s
        while store.load_state(task, task_keys.RELEARN_REQUEST_DONE) != request.id.encode():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True
    finally:
        store.close()


def _require_task(conf: Config, task: str) -> None:
    if task not in conf.tasks:
        raise UsageError(f"there is no task {task!r}{did_you_mean(task, conf.tasks)}")


def _format_reference(document: dict[str, Any]) -> str:
    task, site, learning = document["task"], document["site"], document["learning"]
    waits = f"; asked to {document['asked']}, when the task next runs" if document["asked"] else ""
    if site is not None:
        daily = ", follows the hour of day" if site["daily"] else ""
        warning = f"\nwarning: {site['warning']}" if site["warning"] else ""
        return (
            f"{task}: reference {site['number']} of this site, {site['digest']}\n"
            f"learned from {site['windows']} drift windows, {site['from']} to {site['to']}{daily}{waits}{warning}"
        )
    if learning is None:
        return f"{task}: nothing learned yet; drift is told once {RECOMMENDED_WINDOWS} drift windows are (at least {MIN_WINDOWS}){waits}"
    span = f" and {learning['for_s']:.0f} s of readings" if learning["for_s"] else ""
    return f"{task}: learning, {learning['windows']} of {learning['of']} drift windows{span}{waits}"
