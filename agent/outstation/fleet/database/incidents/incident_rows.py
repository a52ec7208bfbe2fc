"""Statements on incidents and on what operators say about them; each inside a transaction or snapshot.

An incident is all messages of table alerts with one source, device, log and id. It is raised again under the same id
when it becomes worse (the next revision), or when it comes back after it was cleared (revision 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outstation.fleet.database.interface import Connection
from outstation.protocol.alerts.incident import IncidentKey

# The wanted one by its key, or those of all devices; only raised ones by index incidents_raised.
_INCIDENTS = """
    SELECT i.source, i.device, i.log, i.id, i.ref, i.seq, i.updated, i.task, i.alert, i.subject, i.severity, i.summary,
           i.revision, abs(i.raised_seq) AS raised_seq, i.raised, i.state AS last_state, i.last_summary,
           h.acknowledged_by, h.acknowledged_at, h.acknowledged_note, h.muted_until, h.muted_by, h.muted_at,
           h.muted_note, h.acknowledged_seq >= abs(i.raised_seq) AS is_acknowledged,
           CASE WHEN i.state <> 'raised' OR i.source = 'device' AND NOT coalesce(l.live, FALSE)
                     OR q.device IS NOT NULL THEN 'cleared'
                WHEN h.muted_until > :now THEN 'muted'
                WHEN h.acknowledged_seq >= abs(i.raised_seq) THEN 'acknowledged'
                ELSE 'raised' END AS status
    FROM incidents i
    LEFT JOIN logs l ON l.device = i.device AND l.log = i.log
    LEFT JOIN retired_devices q ON q.device = i.device
    LEFT JOIN alert_handling h ON h.source = i.source AND h.device = i.device AND h.log = i.log AND h.id = i.id
    WHERE {where}
"""
_FILTER = """
    WHERE (CAST(:open AS BOOLEAN) IS NULL OR (status <> 'cleared') = :open)
      AND (CAST(:status AS TEXT) IS NULL OR status = :status) AND (CAST(:since AS TEXT) IS NULL OR updated >= :since)
      AND CASE severity WHEN 'critical' THEN 3 WHEN 'warning' THEN 2 ELSE 1 END >= :rank
"""
_IS_RAISED = "i.state = 'raised'"
_KEY_COLUMNS = ("source", "device", "log", "id", "task", "alert")
_FIND = """
    SELECT source, device, log, id, state = 'raised' AS is_raised FROM incidents
    WHERE {} ORDER BY 5 DESC, ref LIMIT ?"""
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
    sql = f"SELECT count(*) FROM incidents i WHERE {_where(values)}"
    return int(db.execute(sql, values).fetchone()[0])


def find_keys(db: Connection, ref: str, limit: int) -> list[tuple[IncidentKey, bool]]:
    """Return (key, raised) of the incidents whose ref begins with `ref`, or else whose id it is; raised ones first."""
    # Refs are hexadecimal.
    rows = db.execute(_FIND.format("ref >= ? AND ref < ?"), (ref.lower(), f"{ref.lower()}g", limit)).fetchall()
    rows = rows or db.execute(_FIND.format("id = ?"), (ref, limit)).fetchall()
    return [((source, device, log, identity), bool(raised)) for source, device, log, identity, raised in rows]


def save_acknowledgement(db: Connection, key: IncidentKey, seq: int | None, by: str, at: str, note: str) -> None:
    """Record that an operator acknowledged the messages up to `seq`; None withdraws it."""
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
    rows = db.execute(sql, (after, limit))
    return [(int(rowid), (source, device, log, key)) for rowid, source, device, log, key in rows]


def last_arrival(db: Connection) -> int:
    """Return the rowid of the newest message in table alerts, 0 without any."""
    sql = "SELECT max(rowid) FROM alerts WHERE source = ?"
    return max(rowid or 0 for (rowid,) in filter(None, db.execute_each(sql, [("device",), ("collector",)])))


def _select(values: Mapping[str, Any]) -> str:
    is_raised = values.get("open") or values.get("status") not in (None, "cleared")
    return _INCIDENTS.format(where=f"{_where(values)} AND {_IS_RAISED}" if is_raised else _where(values))


def _where(values: Mapping[str, Any]) -> str:
    # Conditions on absent values would keep a database from using the index of the key.
    return " AND ".join(f"i.{name} = :{name}" for name in _KEY_COLUMNS if values.get(name) is not None) or "TRUE"


def _fetch(db: Connection, sql: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    cursor = db.execute(sql, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]
