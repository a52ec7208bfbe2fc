"""Statements on what a device reported before: metrics, phases of roll-outs, drift windows. Newest first, bounded."""

from __future__ import annotations

from typing import Any

from outstation.fleet.database.interface import Connection, Row, fetch_dicts

_OF_OUTPUTS = "device = ? AND log = ? AND task = ? AND source = 'device' AND slice = ''"
# From one output to the next by the index: labels of years are not read.
QUALITY = f"""
    WITH RECURSIVE outputs (number, output) AS (
        SELECT 1, min(output) FROM metrics WHERE {_OF_OUTPUTS}
        UNION ALL
        SELECT o.number + 1, (SELECT min(output) FROM metrics WHERE {_OF_OUTPUTS} AND output > o.output)
        FROM outputs o WHERE o.output IS NOT NULL AND o.number < ?)
    SELECT o.output, q.time, q.body, q.log, q.seq FROM outputs o
    JOIN quality_messages q ON q.device = ? AND q.log = ? AND q.seq =
        (SELECT max(seq) FROM metrics WHERE {_OF_OUTPUTS} AND output = o.output)
    WHERE o.output IS NOT NULL ORDER BY o.output"""
PHASES = """
    SELECT task, rollout, phase, reason, summary, time, log, seq FROM rollout_devices
    WHERE device = ? AND log = ? ORDER BY seq DESC LIMIT ?"""
WINDOWS = """
    SELECT "from", "to", state, n, window_count, version, log, seq FROM drift_windows
    WHERE task = ? AND device = ? ORDER BY "to" DESC LIMIT ?"""
_WINDOW_COLUMNS = '"from", "to", state, n, features, log, seq'
WINDOWS_BEFORE = f"""
    SELECT {_WINDOW_COLUMNS} FROM drift_windows WHERE task = ? AND device = ? AND "to" <= ?
    ORDER BY "to" DESC LIMIT ?"""
WINDOWS_AFTER = f"""
    SELECT {_WINDOW_COLUMNS} FROM drift_windows WHERE task = ? AND device = ? AND "to" > ? ORDER BY "to" LIMIT ?"""
COLLECTOR_METRICS = """
    SELECT output, metric, value, low, high, n, time, source FROM metrics
    WHERE device = ? AND task = ? AND source <> 'device' AND slice = '' ORDER BY source, output, metric LIMIT 50"""


def load_quality(db: Connection, device: str, log: str, task: str, limit: int) -> list[dict[str, Any]]:
    """Return the newest message of each of the first outputs of a task that has metrics of all results, by output."""
    place = (device, log, task)
    return fetch_dicts(db, QUALITY, *place, *place, limit, *place[:2], *place)


def load_phases(db: Connection, device: str, log: str, limit: int) -> list[dict[str, Any]]:
    return fetch_dicts(db, PHASES, device, log, limit)


def load_windows(db: Connection, device: str, task: str, limit: int) -> list[dict[str, Any]]:
    return fetch_dicts(db, WINDOWS, task, device, limit)


def load_windows_around(db: Connection, device: str, task: str, time: str, limit: int) -> list[dict[str, Any]]:
    """Return the drift windows that ended last before a time, and the ones after it, oldest first, with `features`."""
    before = fetch_dicts(db, WINDOWS_BEFORE, task, device, time, limit)
    return [*reversed(before), *fetch_dicts(db, WINDOWS_AFTER, task, device, time, limit)]


def load_collector_metrics(db: Connection, device: str, task: str) -> list[dict[str, Any]]:
    """Return the metrics of ground truth that was added at the collector (source collector), and of verdicts."""
    return fetch_dicts(db, COLLECTOR_METRICS, device, task)


def count_windows_since(db: Connection, task: str, since: str) -> list[Row]:
    """Return (device, state, windows, newest end) of the drift windows of a task that ended at `since` or later."""
    sql = """
        SELECT device, state, CAST(sum(window_count) AS BIGINT), max("to") FROM drift_windows
        WHERE task = ? AND "to" >= ? GROUP BY device, state ORDER BY device"""
    return db.execute(sql, (task, since)).fetchall()
