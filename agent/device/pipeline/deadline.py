"""How long a batch of a task may take, from its first row to its commit, and how many model windows fit into that.

A batch that is late is committed all the same: its work is done, and its rows must not be run twice. It is counted, and
the next one is made smaller, by the time that each window took. Where even one window by itself is late again and
again, an alert says so until a batch is on time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from agent import clock
from agent.alerts import DEADLINE_MISSED, Alert
from agent.clock import ClockReading
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.errors import StorageBusy, StorageFull

log = logging.getLogger("outstation")

LATE = "late."
# Of the deadline: the next batch may be slower by the rest of it.
_SAFETY_FACTOR = 0.8
# More than any batch has.
_UNLIMITED_WINDOWS = 1 << 30
# Late batches of one window in a row, before somebody is told.
_LATE_BATCHES_TO_ALERT = 3


class Deadline:
    """Of one task: `seconds`, None where it has none; a batch of `fits` model windows is expected to be on time."""

    def __init__(self, task: str, seconds: float | None) -> None:
        # A plain number, as messages and documents take it.
        self.seconds, self.max_windows = None if seconds is None else float(seconds), _UNLIMITED_WINDOWS
        self._task, self._late_in_a_row = task, 0
        # Whether the alert is open; None before anybody looked.
        self._is_alert_open: bool | None = None

    def record_batch(
        self, seconds: float, windows: int, store: Store, message_log: MessageLog, now: ClockReading
    ) -> None:
        """A batch of so many model windows was committed. What there is no room to say is dropped, and logged."""
        if not windows:
            return
        late = self.seconds is not None and seconds > self.seconds
        self._adapt_max_windows(seconds, windows)
        self._late_in_a_row = self._late_in_a_row + 1 if late and windows == 1 else 0
        if self._is_alert_open is None:
            self._is_alert_open = any(alert["id"] == self._alert_id for alert in store.open_alerts(self._task))
        alert = None
        if self._late_in_a_row >= _LATE_BATCHES_TO_ALERT and not self._is_alert_open:
            alert = self._build_alert("raised", seconds)
        elif self._is_alert_open and not late:
            alert = self._build_alert("cleared", seconds)
        if not late and alert is None:
            return
        try:
            with store.transaction() as tx:
                if late:
                    tx.increment_counter(LATE + self._task, 1)
                    last = {"seconds": round(seconds, 3), "windows": windows, "time": clock.to_rfc3339(now.wall_us)}
                    tx.save_state(self._task, task_keys.LATE_BATCH, json.dumps(last).encode())
                if alert is not None:
                    message_log.append(tx, "alerts", self._task, alert.to_body(self._task), now)
        except (StorageFull, StorageBusy) as problem:
            log.error("task %s: %s; a batch that took %.3g s is not told of", self._task, problem, seconds)
            return
        if alert is not None:
            self._is_alert_open = alert.state == "raised"

    def _adapt_max_windows(self, seconds: float, windows: int) -> None:
        """Down at once, up by doubling: a batch has work of its own, beside that of its windows."""
        if self.seconds is None:
            return
        could = max(1, int(windows * _SAFETY_FACTOR * self.seconds / max(seconds, 1e-9)))
        if seconds > self.seconds:
            self.max_windows = min(self.max_windows, could)
        elif could > self.max_windows:
            self.max_windows = min(could, 2 * self.max_windows)

    @property
    def _alert_id(self) -> str:
        return f"{self._task}/deadline"

    def _build_alert(self, state: str, seconds: float) -> Alert:
        if state == "cleared":
            summary = f"{self._task}: batches are on time again."
            if self.seconds is None:
                summary = f"{self._task}: batches have no deadline any more."
        else:
            summary = (
                f"{self._task}: one model window by itself took {seconds:.3g} s, {_LATE_BATCHES_TO_ALERT} times in a row; the "
                f"deadline is {self.seconds:g} s. Results come, and late. Give the task a longer deadline or a smaller "
                "model, or the machine less to do."
            )
        build = DEADLINE_MISSED.raised if state == "raised" else DEADLINE_MISSED.cleared
        return build(summary, {"seconds": round(seconds, 3), "deadline_s": self.seconds})


def to_status(store: Store, counters: Mapping[str, int], task: str, seconds: float | None) -> dict[str, Any]:
    """For health and `status`: nothing without a deadline; `late` batches since the store was made, and the `last`.

    `counters` are those of the store.
    """
    if seconds is None:
        return {}
    found = store.load_state(task, task_keys.LATE_BATCH)
    late = counters.get(LATE + task, 0)
    return {"deadline": {"seconds": float(seconds), "late": late, "last": json.loads(found) if found else None}}
