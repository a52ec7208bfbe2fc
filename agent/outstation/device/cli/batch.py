"""Command `outstation batch`: run tasks once. It needs no click."""

from __future__ import annotations

import contextlib

from outstation.device.bootstrap import backlog, device
from outstation.device.machine.timekeeping import Timekeeper, make_clock
from outstation.foundation.cli.output import emit, print_table


def batch(task: str | None, config_file: str | None, as_json: bool) -> None:
    """Process the backlog of `task`, or of all tasks, and print what was done. Raises UsageError, StorageError."""
    file, conf = device.load_config(config_file, task)
    with contextlib.closing(device.open_store(conf)) as store:
        message_log, now = device.open_message_log(file, conf, store), make_clock(store)
        Timekeeper(store, message_log).tick(now())
        names = [task] if task else list(conf.tasks)
        totals = backlog.process_backlogs(file, conf, store, message_log, now, names)
    rows = [list(total.values()) for total in totals]
    emit(totals, as_json, lambda: print_table(["task", "rows", "windows", "alerts"], rows, "No tasks."))
