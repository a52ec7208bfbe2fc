"""Statements on rollouts, decisions, desired state and device reports; each inside a transaction or snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outstation.fleet.database.interface import Connection, Row

# `+`: numbers as they are stored; their readers check them, and the audit names a damaged one.
_STORED = "rollout, task, bundle, version, digest, topic, started, state, +step, plan"
_COLUMNS = "rollout, task, bundle, version, digest, topic, started, state, step, plan"
_UPSERT_ROLLOUT = f"""
    INSERT INTO rollouts ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (rollout) DO UPDATE SET
        task = excluded.task, bundle = excluded.bundle, version = excluded.version, digest = excluded.digest,
        topic = excluded.topic, started = excluded.started, state = excluded.state, step = excluded.step,
        plan = excluded.plan"""
_UPSERT_DESIRED = """
    INSERT INTO desired VALUES (?, ?, ?, ?) ON CONFLICT (topic) DO UPDATE SET
        counter = excluded.counter, payload = excluded.payload, jws = excluded.jws"""

# Devices with an active key; the last report of a device is that of its newest log.
_SELECT_DEVICES = """
    WITH reports AS (
        SELECT c.device, c.phase, c.reason, c.summary, c.time, c.strategy,
               row_number() OVER (
                   PARTITION BY c.device
                   ORDER BY l.live DESC, CASE WHEN l.live THEN l.rowid ELSE -l.rowid END, c.seq DESC) AS nth
        FROM rollout_devices c JOIN logs l ON l.device = c.device AND l.log = c.log
        WHERE c.rollout = :rollout AND c.task = :task AND c.digest = :digest)
    SELECT d.device, d.last_seen, r.phase, r.reason, r.summary, r.time, r.strategy
    FROM devices d LEFT JOIN reports r ON r.device = d.device AND r.nth = 1
    WHERE EXISTS (SELECT 1 FROM keys k WHERE k.device = d.device AND k.revoked IS NULL AND k.last_seq IS NULL)
    ORDER BY d.device
"""
_SELECT_SHADOWS = """
    SELECT rowid, device, model = :digest, body FROM shadows
    WHERE rollout = :rollout AND rowid > :after AND task = :task
      AND (model = :digest) <> (other = :digest)
    ORDER BY rowid LIMIT :limit
"""


def load_rollouts(db: Connection) -> list[Row]:
    """Return the rows of table rollouts, oldest first."""
    return db.execute(f"SELECT {_STORED} FROM rollouts ORDER BY started, rollout").fetchall()


def find_rollout(db: Connection, rollout: str) -> Row | None:
    row: Row | None = db.execute(f"SELECT {_STORED} FROM rollouts WHERE rollout = ?", (rollout,)).fetchone()
    return row


def save_rollout(db: Connection, row: Sequence[Any]) -> None:
    db.execute(_UPSERT_ROLLOUT, row)


def list_names(db: Connection) -> list[Any]:
    """Return the names in tables rollouts and decisions, in order."""
    sql = "SELECT rollout FROM rollouts UNION SELECT rollout FROM decisions ORDER BY rollout"
    return [name for (name,) in db.execute(sql).fetchall()]


def append_decision(db: Connection, row: Sequence[Any]) -> None:
    db.execute("INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def load_decisions(db: Connection, rollout: str) -> list[Row]:
    """Return the rows of table decisions of one rollout, in order."""
    columns = "rollout, +n, time, event, summary, evidence, payload, jws"
    return db.execute(f"SELECT {columns} FROM decisions WHERE rollout = ? ORDER BY n", (rollout,)).fetchall()


def load_last_decision(db: Connection, rollout: str) -> tuple[int, bytes] | None:
    sql = "SELECT n, payload FROM decisions WHERE rollout = ? ORDER BY n DESC LIMIT 1"
    row: tuple[int, bytes] | None = db.execute(sql, (rollout,)).fetchone()
    return row


def load_step_start(db: Connection, rollout: str) -> str | None:
    sql = "SELECT time FROM decisions WHERE rollout = ? AND event IN ('started', 'promoted') ORDER BY n DESC LIMIT 1"
    (time,) = db.execute(sql, (rollout,)).fetchone() or (None,)
    return None if time is None else str(time)


def load_aborted(db: Connection, task: str, bundle_digest: str) -> list[tuple[str, str]]:
    """Return (rollout, time) of each aborted rollout of a bundle."""
    sql = """
        SELECT rollout, max(decisions.time) FROM rollouts JOIN decisions USING (rollout)
        WHERE task = ? AND digest = ? AND state = 'aborted' AND event = 'aborted' GROUP BY rollout"""
    return db.execute(sql, (task, bundle_digest)).fetchall()


def load_desired(db: Connection, topic: str | None = None) -> list[Row]:
    """Return (topic, counter, payload, jws) of each desired state, or only of `topic`."""
    sql = """
        SELECT topic, +counter, payload, jws FROM desired WHERE CAST(? AS TEXT) IS NULL OR topic = ? ORDER BY topic"""
    return db.execute(sql, (topic, topic)).fetchall()


def save_desired(db: Connection, row: Sequence[Any]) -> None:
    """Insert (topic, counter, payload, jws), or replace the row of that topic."""
    db.execute(_UPSERT_DESIRED, row)


def list_active_devices(db: Connection) -> list[str]:
    """Return the devices with a key that may sign."""
    sql = "SELECT DISTINCT device FROM keys WHERE revoked IS NULL AND last_seq IS NULL ORDER BY device"
    return [str(device) for (device,) in db.execute(sql)]


def load_devices(db: Connection, rollout: str, task: str, bundle_digest: str) -> list[Row]:
    """Return (device, last_seen, phase, reason, summary, time, strategy) of each active device; NULL if unreported."""
    return db.execute(_SELECT_DEVICES, {"rollout": rollout, "task": task, "digest": bundle_digest}).fetchall()


def load_phases(db: Connection, rollout: str) -> list[tuple[str, str, str]]:
    """Return (device, phase, time) of each reported phase change, in order of time."""
    sql = "SELECT device, phase, time FROM rollout_devices WHERE rollout = ? ORDER BY time, seq"
    return db.execute(sql, (rollout,)).fetchall()


def load_shadows(
    db: Connection, rollout: str, task: str, bundle_digest: str, *, after: int, limit: int
) -> list[tuple[int, str, bool, str]]:
    """Return (rowid, device, True if the bundle was active, body) of shadow messages after a rowid."""
    names = {"rollout": rollout, "task": task, "digest": bundle_digest, "after": after, "limit": limit}
    return [(n, device, bool(active), body) for n, device, active, body in db.execute(_SELECT_SHADOWS, names)]
