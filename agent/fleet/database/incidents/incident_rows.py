"""Statements on incidents and on what operators say about them; each inside a transaction or snapshot.

An incident is all messages of table alerts with one source, device, log and id. It is raised again under the same id
when it becomes worse (the next revision), or when it comes back after it was cleared (revision 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agent.fleet.database.interface import Connection

# (source, device, log, id)
IncidentKey = tuple[str, str, str, str]

# n: newest message; r: newest that raised it, which has the severity and the sentence; s: the one that began it.
_INCIDENTS = """
    SELECT n.source, n.device, n.log, n.id, n.seq, n.time AS updated, r.task, r.alert, r.subject, r.severity,
           r.summary, r.revision, r.seq AS raised_seq, s.time AS raised, n.state AS last_state,
           n.summary AS last_summary, h.acknowledged_by, h.acknowledged_at, h.acknowledged_note, h.muted_until,
           h.muted_by, h.muted_at, h.muted_note, h.acknowledged_seq >= r.seq AS is_acknowledged,
           CASE WHEN n.state <> 'raised' OR n.source = 'device' AND NOT coalesce(l.live, FALSE)
                     OR q.device IS NOT NULL THEN 'cleared'
                WHEN h.muted_until > :now THEN 'muted'
                WHEN h.acknowledged_seq >= r.seq THEN 'acknowledged'
                ELSE 'raised' END AS status
    FROM ({keys}) k
    JOIN alerts n ON n.device = k.device AND n.log = k.log AND n.seq = k.newest AND n.source = k.source
    JOIN alerts r ON r.device = k.device AND r.log = k.log AND r.seq = k.raised AND r.source = k.source
    JOIN alerts s ON s.device = k.device AND s.log = k.log AND s.seq = k.began AND s.source = k.source
    LEFT JOIN logs l ON l.device = k.device AND l.log = k.log
    LEFT JOIN retired_devices q ON q.device = k.device
    LEFT JOIN alert_handling h ON h.source = k.source AND h.device = k.device AND h.log = k.log AND h.id = k.id
"""
_ALL_KEYS = """
    SELECT device, log, id, source, max(seq) AS newest,
           coalesce(max(CASE WHEN state = 'raised' THEN seq END), max(seq)) AS raised,
           coalesce(max(CASE WHEN state = 'raised' AND revision = 1 THEN seq END), min(seq)) AS began
    FROM alerts WHERE {where} GROUP BY device, log, id, source
"""
# Few incidents are raised: all others are passed over in index alerts_by_id, without their rows. Without MATERIALIZED,
# PostgreSQL looks `began` up again for each message of a log.
_RAISED_KEYS = """
    WITH raised_keys AS MATERIALIZED (
        SELECT device, log, id, source, newest, newest AS raised,
               coalesce((SELECT max(b.seq) FROM alerts b WHERE b.device = g.device AND b.log = g.log AND b.id = g.id
                             AND b.source = g.source AND b.state = 'raised' AND b.revision = 1),
                        (SELECT min(b.seq) FROM alerts b WHERE b.device = g.device AND b.log = g.log AND b.id = g.id
                             AND b.source = g.source)) AS began
        FROM (SELECT device, log, id, source, max(seq) AS newest FROM alerts WHERE {where}
              GROUP BY device, log, id, source {having}) g)
    SELECT * FROM raised_keys
"""
_FILTER = """
    WHERE (CAST(:open AS BOOLEAN) IS NULL OR (status <> 'cleared') = :open)
      AND (CAST(:status AS TEXT) IS NULL OR status = :status) AND (CAST(:since AS TEXT) IS NULL OR updated >= :since)
      AND CASE severity WHEN 'critical' THEN 3 WHEN 'warning' THEN 2 ELSE 1 END >= :rank
"""
# The newest message of an incident raised it: its state is the last digit of a number that grows with seq.
_IS_RAISED = "HAVING max(seq * 2 + CASE WHEN state = 'raised' THEN 1 ELSE 0 END) % 2 = 1"
# Columns that are the same in all messages of an incident.
_INDEXED = ("source", "device", "log", "id")
_KEY_COLUMNS = (*_INDEXED, "task", "alert")
_ACKNOWLEDGE = """
    INSERT INTO alert_handling (source, device, log, id, acknowledged_seq, acknowledged_by, acknowledged_at,
                                acknowledged_note) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (source, device, log, id) DO UPDATE SET
        acknowledged_seq = excluded.acknowledged_seq, acknowledged_by = excluded.acknowledged_by,
        acknowledged_at = excluded.acknowledged_at, acknowledged_note = excluded.acknowledged_note
"""
_MUTE = """
    INSERT INTO alert_handling (source, device, log, id, muted_until, muted_by, muted_at, muted_note)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (source, device, log, id) DO UPDATE SET
        muted_until = excluded.muted_until, muted_by = excluded.muted_by, muted_at = excluded.muted_at,
        muted_note = excluded.muted_note
"""


def list_incidents(
    db: Connection, values: Mapping[str, Any], *, newest_first: bool, limit: int | None, offset: int
) -> list[dict[str, Any]]:
    """Return incidents in order of the time when they began.

    `values`: now, source, device, log, id, task, alert, open, status, since and rank; None does not filter.
    """
    direction = "DESC" if newest_first else "ASC"
    order = ", ".join(f"{column} {direction}" for column in ("raised", "device", "log", "id", "source"))
    page = "" if limit is None else f" LIMIT {int(limit)} OFFSET {int(offset)}"
    return _fetch(db, f"SELECT * FROM ({_select(values)}) incidents {_FILTER} ORDER BY {order}{page}", values)


def count_incidents(db: Connection, values: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Return (status, severity, count); `values` as in `list_incidents`."""
    sql = f"""
        SELECT status, severity, count(*) FROM ({_select(values)}) incidents {_FILTER} GROUP BY status, severity"""
    return [(status, severity, int(n)) for status, severity, n in db.execute(sql, values)]


def count_keys(db: Connection, values: Mapping[str, Any]) -> int:
    """Return the number of incidents, whatever their status; `values`: members of the key, task and alert."""
    where = _where(values, _KEY_COLUMNS)
    sql = f"SELECT count(*) FROM (SELECT 1 FROM alerts WHERE {where} GROUP BY device, log, id, source) keys"
    return int(db.execute(sql, values).fetchone()[0])


def list_keys(db: Connection, *, raised: bool) -> list[IncidentKey]:
    """Return the key of every incident, or only of those whose newest message raised them."""
    having = _IS_RAISED if raised else ""
    sql = f"SELECT source, device, log, id FROM alerts GROUP BY device, log, id, source {having}"
    return db.execute(sql).fetchall()


def save_acknowledgement(db: Connection, key: IncidentKey, seq: int | None, by: str, at: str, note: str) -> None:
    """Record that somebody acknowledged the messages up to `seq`; None withdraws it."""
    db.execute(_ACKNOWLEDGE, (*key, seq, by, at, note))


def save_mute(db: Connection, key: IncidentKey, until: str | None, by: str, at: str, note: str) -> None:
    """Record until when an incident is muted; None ends it."""
    db.execute(_MUTE, (*key, until, by, at, note))


def load_incident(db: Connection, key: IncidentKey, now: str) -> dict[str, Any] | None:
    """Return one incident, by the index of its key."""
    values = {**dict(zip(_KEY_COLUMNS, key, strict=False)), "now": now}
    rows = _fetch(db, _select(values), values)
    return rows[0] if rows else None


def list_arrivals(db: Connection, after: int, limit: int) -> list[tuple[int, IncidentKey]]:
    """Return (rowid, key) of the messages in table alerts that arrived after a rowid, in order."""
    sql = """
        SELECT rowid, source, device, log, id FROM alerts
        WHERE source IN ('device', 'collector') AND rowid > ? ORDER BY rowid LIMIT ?"""
    return [(int(row[0]), (row[1], row[2], row[3], row[4])) for row in db.execute(sql, (after, limit))]


def last_arrival(db: Connection) -> int:
    """Return the rowid of the newest message in table alerts, 0 without any."""
    return int(db.execute("SELECT coalesce(max(rowid), 0) FROM alerts").fetchone()[0])


def _select(values: Mapping[str, Any]) -> str:
    everywhere = _where(values, _KEY_COLUMNS)
    if not values.get("open") and values.get("status") in (None, "cleared"):
        return _INCIDENTS.format(keys=_ALL_KEYS.format(where=everywhere))
    keys = _RAISED_KEYS.format(where=_where(values, _INDEXED), having=_IS_RAISED)
    return f"SELECT * FROM ({_INCIDENTS.format(keys=keys)}) raised_incidents WHERE {everywhere}"


def _where(values: Mapping[str, Any], columns: Sequence[str]) -> str:
    # Conditions on absent values would keep a database from using the index of the key.
    return " AND ".join(f"{name} = :{name}" for name in columns if values.get(name) is not None) or "TRUE"


def _fetch(db: Connection, sql: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    cursor = db.execute(sql, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]
