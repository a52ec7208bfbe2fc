"""Cursor repair: move a task's cursor forward to where its drift state ends, after damage to the store.

Cursor and drift state are committed together, so a cursor behind the drift state was lost. The rows in between were
tested before, and their results are in earlier messages.
"""

from __future__ import annotations

import logging

from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.protocol.alerts.kinds import CURSOR_REPAIRED

log = logging.getLogger("outstation")


def repair_cursor(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading) -> bool:
    """Move the cursor of `task` forward if it is behind its drift state; return True if it was. Raises StorageError."""
    drift = task.drift
    if drift is None:
        return False
    stream, seen = task.config.stream, drift.state.last_counted_row
    cursor = store.cursor(task.name)
    after = store.position(task.name, stream)
    # The last tested window ends at `seen`; where windows overlap, its later rows are not consumed yet.
    through = seen - task.window_rows + min(task.step, task.window_rows)
    if seen < after + task.window_rows:
        return False
    state, outcome = drift.state, f"it continues after row {through}, whose results are in earlier messages"
    if through > store.last_row(stream):
        state = drift.monitor.restart_row_numbers(drift.state)
        outcome = "row numbers begin again, and it continues with them in a new drift window"
    summary = (
        f"{task.name}: it would have begun after row {after} of {stream}, but its drift detection has seen rows up to "
        f"{seen}: the store was damaged; {outcome}. Check the card."
    )
    alert = CURSOR_REPAIRED.raised(summary, {"cursor": cursor, "seen": seen}, stream=stream, row=seen)
    with store.transaction() as tx:
        if state is drift.state:
            tx.advance_cursor(task.name, through, through)
        else:
            drift.save_state(tx, state)
            message_log.append_all(tx, drift.closing_messages or [], now)
        message_log.append(tx, "alerts", task.name, alert.to_body(task.name), now)
    if state is not drift.state:
        drift.replace_state(state)
    log.critical("%s", summary)
    return True
