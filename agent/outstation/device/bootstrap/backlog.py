"""Composition root of a batch of all tasks: from an open store to a processed backlog."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from outstation.device.bootstrap import tasks
from outstation.device.bundles import rollout_state
from outstation.device.config import Config
from outstation.device.pipeline import batch, cursor_repair, label_metrics, relearn
from outstation.device.rollout import saved_drift
from outstation.device.rules import rule_store
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading


def process_backlogs(
    file: Path,
    conf: Config,
    store: Store,
    message_log: MessageLog,
    now: Callable[[], ClockReading],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Process the backlogs of these tasks, and return what was done. Raises UsageError, StorageError, BadBundle."""
    marker = tasks.open_crash_marker(conf, store, message_log)
    rule_store.reconcile(store, message_log, conf.tasks, now())
    totals = []
    for name in names:
        loaded = tasks.load_task(file, conf, store, name, marker=marker)
        total = {"rows": 0, "windows": 0, "alerts": 0}
        if not rollout_state.find_canary_digest(store, name):
            total["alerts"] += saved_drift.end_unreferenced(loaded, store, message_log, now())
        relearn.apply_pending(loaded, store, message_log, now())
        total["alerts"] += cursor_repair.repair_cursor(loaded, store, message_log, now())
        while (result := batch.run(loaded, store, message_log, now())) is not None:
            total["rows"] += result.rows
            total["windows"] += result.windows
            total["alerts"] += result.alerts
        total["alerts"] += label_metrics.tick(loaded, store, message_log, now(), float(conf.buffer.keep_results))
        totals.append({"task": name, **total})
    return totals
