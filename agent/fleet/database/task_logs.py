"""Newest log of a task. Rows are numbered per log: after a store was replaced, they begin at 1 again."""

from __future__ import annotations

from collections.abc import Iterable

from agent.fleet.database.interface import Connection

# The last condition spares a task that waits for its first result a search of all messages.
NEWEST_LOG = """
    SELECT log, last_row FROM (
        SELECT l.log, l.live, l.rowid AS arrival, (
            SELECT m.rows_last FROM result_messages m
            JOIN result_provenance p ON p.device = m.device AND p.provenance = m.provenance
            WHERE m.device = l.device AND m.log = l.log AND p.task = ? ORDER BY m.seq DESC LIMIT 1) AS last_row
        FROM logs l WHERE l.device = ? AND EXISTS (
            SELECT 1 FROM result_provenance p WHERE p.device = l.device AND p.task = ?)) task_logs
    WHERE last_row IS NOT NULL ORDER BY live DESC, CASE WHEN live THEN arrival ELSE -arrival END LIMIT 1"""


def find_newest_logs(db: Connection, tasks: Iterable[tuple[str, str]]) -> list[tuple[str, int] | None]:
    """Return (log, last row) of the newest log with results messages of each (device, task); None without any."""
    return db.execute_each(NEWEST_LOG, [(task, device, task) for device, task in tasks])
