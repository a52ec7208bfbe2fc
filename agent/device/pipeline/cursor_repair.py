"""A cursor that is behind the drift state, which a damaged store can leave: the task goes on where it had got.

Both are committed together, so the cursor is the one that was lost. What it would lead to again was judged before.
"""

from __future__ import annotations

import logging

from agent.alerts import CURSOR_REPAIRED
from agent.clock import ClockReading
from agent.device.pipeline import drift_state
from agent.device.pipeline.batch import LoadedTask
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store

log = logging.getLogger("outstation")


def repair_cursor(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading) -> bool:
    """Raise the cursor of `task` to what its drift state has seen; whether it was behind. Raises StorageError."""
    if task.drift_monitor is None or task.drift_state is None:
        return False
    stream, seen = task.config.stream, task.drift_state.last_counted_row
    cursor = store.cursor(task.name)
    after = store.first_row(stream) - 1 if cursor is None else cursor
    # The last window judged ends at `seen`; where windows overlap, its later rows are not used up yet.
    through = seen - task.window_rows + min(task.step, task.window_rows)
    if seen < after + task.window_rows:
        return False
    drift, what = task.drift_state, f"it goes on after row {through}, whose results are in earlier messages"
    if through > store.last_row(stream):
        drift = task.drift_monitor.restart_row_numbers(task.drift_state)
        what = "the rows are numbered from anew, and it goes on with them in a new drift window"
    summary = (
        f"{task.name}: it would have begun after row {after} of {stream}, but its drift detection has seen rows up to "
        f"{seen}: the store was damaged; {what}. Check the card."
    )
    alert = CURSOR_REPAIRED.raised(summary, {"cursor": cursor, "seen": seen}, stream=stream, row=seen)
    with store.transaction() as tx:
        if drift is task.drift_state:
            tx.advance_cursor(task.name, through, through)
        else:
            drift_state.save(tx, task.name, task.drift_monitor, drift, task.drift_state)
        message_log.append(tx, "alerts", task.name, alert.to_body(task.name), now)
    task.drift_state = drift
    log.critical("%s", summary)
    return True
