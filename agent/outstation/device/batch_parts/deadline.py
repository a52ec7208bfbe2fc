"""Deadline part of a batch: how long one may take from its first row to its commit.

A late batch is committed all the same: its work is done, and its rows must not run twice. It is counted, and the next
batch gets fewer model windows, by the measured time per window. An alert is raised when batches of a single window are
late several times in a row; it clears with the first batch that is on time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageBusy, StorageFull
from outstation.ml.model.inference.inference import InferenceResult
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.alerts.kinds import DEADLINE_MISSED

log = logging.getLogger("outstation")

LATE = "late."
# Share of the deadline that a batch is planned for: it may then be slower than the last one by the rest.
_SAFETY_FACTOR = 0.8
# More than any batch has.
_UNLIMITED_WINDOWS = 1 << 30
# Late batches of a single window in a row that raise the alert.
_LATE_BATCHES_TO_ALERT = 3


class Deadline(BatchPart):
    """Deadline of one task: `seconds`, or None; a batch of `max_windows` model windows is expected to be on time."""

    def __init__(self, task: str, seconds: float | None) -> None:
        # A plain float: messages and documents cannot encode the config's duration type.
        self.seconds, self.max_windows = None if seconds is None else float(seconds), _UNLIMITED_WINDOWS
        self._task, self._late_in_a_row = task, 0
        # None until the store was asked.
        self._is_alert_open: bool | None = None

    def follow(self, batch: Batch, results: InferenceResult) -> None:
        """Record the time of the committed batch."""
        seconds = time.monotonic() - batch.start.monotonic_s
        self.record_batch(seconds, len(batch.ends), batch.store, batch.message_log, batch.now)

    def record_batch(
        self, seconds: float, windows: int, store: Store, message_log: MessageLog, now: ClockReading
    ) -> None:
        """Count a committed batch of `windows` model windows if it was late, and raise or clear the alert.

        A full or busy store drops both, with a line in the log.
        """
        if not windows:
            return
        is_late = self.seconds is not None and seconds > self.seconds
        if self.seconds is not None:
            # Shrinks at once, grows by doubling: a batch takes time of its own beside that of its windows.
            fitting = max(1, int(windows * _SAFETY_FACTOR * self.seconds / max(seconds, 1e-9)))
            if seconds > self.seconds:
                self.max_windows = min(self.max_windows, fitting)
            elif fitting > self.max_windows:
                self.max_windows = min(fitting, 2 * self.max_windows)
        self._late_in_a_row = self._late_in_a_row + 1 if is_late and windows == 1 else 0
        if self._is_alert_open is None:
            identity = f"{self._task}/{DEADLINE_MISSED.id}"
            self._is_alert_open = any(alert["id"] == identity for alert in store.open_alerts(self._task))
        alert = self._update_alert(seconds, is_late=is_late)
        if not is_late and alert is None:
            return
        try:
            with store.transaction() as tx:
                if is_late:
                    tx.increment_counter(LATE + self._task, 1)
                    last = {"seconds": round(seconds, 3), "windows": windows, "time": clock.to_rfc3339(now.wall_us)}
                    tx.save_state(self._task, task_keys.LATE_BATCH, json.dumps(last).encode())
                if alert is not None:
                    message_log.append(tx, "alerts", self._task, alert.to_body(self._task), now)
        except (StorageFull, StorageBusy) as problem:
            log.error("task %s: %s; a batch that took %.3g s is not recorded as late", self._task, problem, seconds)
            return
        if alert is not None:
            self._is_alert_open = alert.state == "raised"

    def _update_alert(self, seconds: float, *, is_late: bool) -> Alert | None:
        evidence = {"seconds": round(seconds, 3), "deadline_s": self.seconds}
        if self._is_alert_open:
            if is_late:
                return None
            state = "batches have no deadline any more" if self.seconds is None else "batches are on time again"
            return DEADLINE_MISSED.cleared(f"{self._task}: {state}.", evidence)
        if self._late_in_a_row < _LATE_BATCHES_TO_ALERT:
            return None
        summary = (
            f"{self._task}: one model window by itself took {seconds:.3g} s, {_LATE_BATCHES_TO_ALERT} times in a row; "
            f"the deadline is {self.seconds:g} s. Results come late. Give the task a longer deadline or a smaller "
            "model, or give the device less to do."
        )
        return DEADLINE_MISSED.raised(summary, evidence)


def to_status(store: Store, counters: Mapping[str, int], task: str, seconds: float | None) -> dict[str, Any]:
    """Return the member for health and status; empty without a deadline.

    `late` counts batches since the store was made, by the store's `counters`; `last` is the newest of them.
    """
    if seconds is None:
        return {}
    last = store.load_state(task, task_keys.LATE_BATCH)
    late = counters.get(LATE + task, 0)
    return {"deadline": {"seconds": float(seconds), "late": late, "last": json.loads(last) if last else None}}
