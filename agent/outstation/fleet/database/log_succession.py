"""Log succession: which logs of a device live, and which is the newest of a task.

A device begins a new log when its old one cannot continue, and names the old one there: in its `new log` message with
the last seq, and in each message that it repeats. A copy of the device's card has its key, too, and may begin a log of
its own. So a log ends only if a later one names it, or an operator says so, and nothing new arrives in it afterwards.
Two logs that live at once raise an alert; the one that arrived first stays the newest, and the alerts of both count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from outstation.fleet.database.alerts import add_alerts, two_logs_alert_row
from outstation.fleet.database.gap_ledger import LogChanges
from outstation.fleet.database.interface import Connection, LogId, Row
from outstation.foundation import clock
from outstation.protocol.alerts.kinds import TWO_LOGS

# Messages of the old log may still be in transit when the new one arrives, at another collector.
GRACE_US = 60_000_000
DEVICE, OPERATOR = "device", "operator"
# As successor: whatever log comes next.
ANY_LOG = ""
_UPSERT = """
    INSERT INTO log_successors VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (device, log, successor, source) DO UPDATE SET
        last_seq = LEAST(log_successors.last_seq, excluded.last_seq), until = LEAST(log_successors.until,
        excluded.until)"""
_HAS_SEVERAL_LOGS = "SELECT 1 FROM logs WHERE device = ? LIMIT 1 OFFSET 1"
_LOGS = "SELECT log, last_seq, latest, live FROM logs WHERE device = ? ORDER BY rowid"
_SUCCESSORS = "SELECT log, successor, last_seq, until FROM log_successors WHERE device = ?"
_NEWEST_ALERT = """
    SELECT state, seq FROM incidents WHERE device = ? AND source = 'collector' AND id = ? ORDER BY seq DESC LIMIT 1"""
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


def apply(db: Connection, changes: Mapping[LogId, LogChanges], now: str) -> None:
    """Update tables log_successors and logs, in a transaction that holds the locks of the devices, and alerts."""
    rows = [
        (device, old, log, last_seq, _add_grace(received), DEVICE)
        for (device, log), change in changes.items()
        for old, (last_seq, received) in change.predecessors.items()
    ]
    _upsert(db, rows)
    update_live_logs(db, {device for device, _ in changes}, now)


def update_live_logs(db: Connection, devices: Iterable[str], now: str) -> None:
    """Find the logs that live, and raise or clear the alert of each that lives beside the newest one."""
    names = sorted(devices)
    for device, several in zip(names, db.execute_each(_HAS_SEVERAL_LOGS, [(d,) for d in names]), strict=True):
        if several is None:
            continue
        logs = db.execute(_LOGS, (device,)).fetchall()
        live = find_live_logs([row[:3] for row in logs], db.execute(_SUCCESSORS, (device,)).fetchall())
        changed = [(log in live, device, log) for log, *_, was_live in logs if bool(was_live) != (log in live)]
        db.executemany("UPDATE logs SET live = ? WHERE device = ? AND log = ?", changed)
        ordered = [log for log, *_ in logs if log in live]
        for log, *_ in logs:
            _update_alert(db, device, log, ordered[0] if log in ordered[1:] else None, now)


def find_live_logs(logs: Iterable[Row], successors: Iterable[Row]) -> set[str]:
    """Return the logs that live, of (log, last seq, time of the newest arrival) and (log, successor, last seq, until).

    It depends on nothing else, so the audit finds the same ones. Logs that end each other all live.
    """
    known = {log: (last_seq, latest) for log, last_seq, latest in logs}
    ended = {
        log
        for log, successor, last_seq, until in successors
        if log in known and (successor in known or successor == ANY_LOG)
        if known[log][0] <= last_seq and known[log][1] <= until
    }
    return {*known} - ended or {*known}


def end_logs(db: Connection, device: str, successor: str, now: str) -> list[str]:
    """Record an operator's word that all other logs of the device that live ended; return them.

    `successor` is a log, or ANY_LOG for the next one to come.
    """
    rows = db.execute("SELECT log, last_seq FROM logs WHERE device = ? AND live", (device,)).fetchall()
    others = [
        (device, log, successor, last_seq, _add_grace(now), OPERATOR) for log, last_seq in rows if log != successor
    ]
    keys = [(device, log, successor, OPERATOR) for _, log, *_ in others]
    delete = "DELETE FROM log_successors WHERE device = ? AND log = ? AND successor = ? AND source = ?"
    db.executemany(delete, keys)
    # An earlier word for one of these logs would end the accepted one.
    db.execute("DELETE FROM log_successors WHERE device = ? AND log = ? AND source = ?", (device, successor, OPERATOR))
    _upsert(db, others)
    return sorted(log for _, log, *_ in others)


def _upsert(db: Connection, rows: list[Row]) -> None:
    db.executemany(db.to_dialect(_UPSERT), rows)


def _update_alert(db: Connection, device: str, log: str, newest: str | None, now: str) -> None:
    """Raise the alert of a log that lives beside `newest`, or clear it if there is none."""
    identity = TWO_LOGS.raised("", log=log).id
    last = db.execute(_NEWEST_ALERT, (device, identity)).fetchone()
    is_open = last is not None and last[0] == "raised"
    if is_open == (newest is not None):
        return
    second = max(clock.parse_rfc3339(now) // 1_000_000, last[1] + 1 if last else 0)
    summary = f"Log {log} of {device} has ended, or is the only one again."
    if newest is not None:
        summary = (
            f"{device} writes two logs at once: {newest} lives, and {log} arrived without naming it as ended. Its card "
            "or its key was copied, or its data folder was deleted."
        )
    add_alerts(db, [two_logs_alert_row(device, log, summary, now, second, raised=newest is not None)])


def _add_grace(time: str) -> str:
    return clock.to_rfc3339(clock.parse_rfc3339(time) + GRACE_US)


def find_newest_logs(db: Connection, tasks: Iterable[tuple[str, str]]) -> list[tuple[str, int] | None]:
    """Return (log, last row) of the newest log with results messages of each (device, task); None without any."""
    return db.execute_each(NEWEST_LOG, [(task, device, task) for device, task in tasks])
