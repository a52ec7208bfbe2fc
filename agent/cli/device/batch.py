"""`outstation batch`."""

from __future__ import annotations

from typing import Any

import click

from agent.bootstrap import tasks, wiring
from agent.cli.output import config_option, emit, json_option, table
from agent.device.machine.timekeeping import Timekeeper, clock_of
from agent.device.pipeline import batch as batches
from agent.device.pipeline import cursor_repair, label_metrics, relearn
from agent.errors import ConfigError
from agent.toml_files import suggestion


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
        marker = tasks.guard(conf, store, writer)
        for name in [task] if task else list(conf.tasks):
            loaded = tasks.load_task(file, conf, store, name, marker=marker)
            total = {"rows": 0, "windows": 0, "alerts": 0}
            relearn.take_up(loaded, store, writer, now())
            total["alerts"] += cursor_repair.go_on(loaded, store, writer, now())
            while (step := batches.run(loaded, store, writer, now())) is not None:
                total["rows"] += step.rows
                total["windows"] += step.windows
                total["alerts"] += step.alerts
            total["alerts"] += label_metrics.turn(loaded, store, writer, now(), float(conf.buffer.keep_results))
            done.append({"task": name, **total})
    finally:
        store.close()
    emit(
        done,
        as_json,
        lambda: table(["task", "rows", "windows", "alerts"], [list(d.values()) for d in done], "No tasks."),
    )
