"""`outstation run` and `outstation batch`."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Any

import click

from agent.cli import operating, wiring
from agent.cli.output import config_option, emit, json_option, table
from agent.config import Config
from agent.device import batch as batches
from agent.device import behind, quality
from agent.device.operating import references, wipe
from agent.device.timekeeping import Timekeeper, clock_of
from agent.errors import ConfigError, StorageForked
from agent.toml import suggestion


@click.command(epilog="Example: outstation run -c /etc/outstation/outstation.toml")
@config_option
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def run(config_file: str | None, verbose: bool) -> None:
    """The daemon, in the foreground; SIGTERM or Ctrl-C stops it gracefully."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # Its debug lines are about timers of ours.
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    file, conf = wiring.load(config_file)
    if (wiped := wipe.state(conf.data_dir)) is not None:
        # Exit 0: a service manager need not try again.
        logging.getLogger("outstation").warning("%s", wipe.told(conf.data_dir, _wiped_whole(file, conf, wiped)))
        return
    try:
        _run(file, conf)
    except StorageForked as forked:
        logging.getLogger("outstation").critical("%s", forked)
        _run(file, conf)


def _run(file: Path, conf: Config) -> None:
    store = wiring.open_store(conf)
    if wipe.is_due(store):
        store.close()
        operating.erase(file, conf, wiring.given_key(file, conf))
        return
    try:
        daemon = wiring.daemon(file, conf, store)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: daemon.signals.halt())
        daemon.run()
    finally:
        store.close()


def _wiped_whole(file: Path, conf: Config, found: dict[str, Any]) -> dict[str, Any]:
    """What the marker says, once a wipe that a crash cut off is finished."""
    if found.get("state") == "wiped":
        return found
    return operating.erase(file, conf, file.resolve().parent / wiring.KEY_FILE)


@click.command(epilog="Example: outstation batch exercise")
@click.argument("task", required=False)
@config_option
@json_option
def batch(task: str | None, config_file: str | None, as_json: bool) -> None:
    """Run what waits for TASK (for all tasks) once, and stop. Messages stay in the outbox for `run` to send."""
    file, conf = wiring.load(config_file)
    if task is not None and task not in conf.tasks:
        raise ConfigError(str(file), "tasks", f"there is no task {task!r}{suggestion(task, conf.tasks)}")
    store = wiring.open_store(conf)
    done: list[dict[str, Any]] = []
    try:
        writer, now = wiring.author(file, conf, store), clock_of(store)
        Timekeeper(store, writer).turn(now())
        marker = wiring.guard(conf, store, writer)
        for name in [task] if task else list(conf.tasks):
            loaded = wiring.load_task(file, conf, store, name, marker=marker)
            total = {"rows": 0, "windows": 0, "alerts": 0}
            references.take_up(loaded, store, writer, now())
            total["alerts"] += behind.go_on(loaded, store, writer, now())
            while (step := batches.run(loaded, store, writer, now())) is not None:
                total["rows"] += step.rows
                total["windows"] += step.windows
                total["alerts"] += step.alerts
            total["alerts"] += quality.turn(loaded, store, writer, now(), float(conf.buffer.keep_results))
            done.append({"task": name, **total})
    finally:
        store.close()
    emit(
        done,
        as_json,
        lambda: table(["task", "rows", "windows", "alerts"], [list(d.values()) for d in done], "No tasks."),
    )
