"""Command `outstation batch`: run tasks once. It needs no click."""

from __future__ import annotations

from typing import Any

from agent.bootstrap import device, tasks
from agent.cli.output import emit, print_table
from agent.device.bundles import rollout_state
from agent.device.machine.timekeeping import Timekeeper, make_clock
from agent.device.pipeline import batch as batches
from agent.device.pipeline import cursor_repair, label_metrics, relearn
from agent.device.rollout import saved_drift
from agent.device.rules import rule_store


def batch(task: str | None, config_file: str | None, as_json: bool) -> None:
    """Process the backlog of `task`, or of all tasks, and print what was done. Raises UsageError, StorageError."""
    file, conf = device.load_config(config_file, task)
    store = device.open_store(conf)
    totals: list[dict[str, Any]] = []
    try:
        message_log, now = device.open_message_log(file, conf, store), make_clock(store)
        Timekeeper(store, message_log).tick(now())
        marker = tasks.open_crash_marker(conf, store, message_log)
        rule_store.reconcile(store, message_log, conf.tasks, now())
        for name in [task] if task else list(conf.tasks):
            loaded = tasks.load_task(file, conf, store, name, marker=marker)
            total = {"rows": 0, "windows": 0, "alerts": 0}
            if not rollout_state.find_canary_digest(store, name):
                total["alerts"] += saved_drift.end_unreferenced(loaded, store, message_log, now())
            relearn.apply_pending(loaded, store, message_log, now())
            total["alerts"] += cursor_repair.repair_cursor(loaded, store, message_log, now())
            while (result := batches.run(loaded, store, message_log, now())) is not None:
                total["rows"] += result.rows
                total["windows"] += result.windows
                total["alerts"] += result.alerts
            total["alerts"] += label_metrics.tick(loaded, store, message_log, now(), float(conf.buffer.keep_results))
            totals.append({"task": name, **total})
    finally:
        store.close()
    emit(
        totals,
        as_json,
        lambda: print_table(["task", "rows", "windows", "alerts"], [list(t.values()) for t in totals], "No tasks."),
    )
