"""`outstation batch`."""

from __future__ import annotations

from typing import Any

import click

from agent.cli import loading, wiring
from agent.cli.output import config_option, emit, json_option, table
from agent.device import batch as batches
from agent.device import behind, quality
from agent.device.operating import references
from agent.device.timekeeping import Timekeeper, clock_of
from agent.errors import ConfigError
from agent.toml import suggestion


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
        marker = loading.guard(conf, store, writer)
        for name in [task] if task else list(conf.tasks):
            loaded = loading.load_task(file, conf, store, name, marker=marker)
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
