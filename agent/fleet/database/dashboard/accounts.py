"""Statements on accounts, sessions and actions of the dashboard."""

from __future__ import annotations

from typing import Any

from agent.fleet.database.interface import Connection, Row, fetch_dicts

MAX_SESSIONS = 20
# Refused sign-ins that are stored: anybody can cause them.
MAX_REFUSALS = 10_000

_UPSERT_USER = """
    INSERT INTO dashboard_users VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET
        role = excluded.role, password = excluded.password, changed = excluded.changed"""
SESSION = """
    SELECT s.name, u.role FROM dashboard_sessions s JOIN dashboard_users u ON u.name = s.name
    WHERE s.session = ? AND s.revoked IS NULL AND s.expires > ?"""
_SUPERFLUOUS_SESSIONS = """
    DELETE FROM dashboard_sessions WHERE expires < ? OR session IN (
        SELECT session FROM dashboard_sessions WHERE name = ? ORDER BY created DESC LIMIT 1000 OFFSET ?)"""
ACTIONS = """
    SELECT time, name, role, action, object, outcome, address FROM dashboard_actions ORDER BY time DESC LIMIT ?"""
REFUSAL = """
    SELECT rowid, outcome FROM dashboard_actions
    WHERE time > ? AND name = '' AND object = ? AND address = ? ORDER BY time DESC LIMIT 1"""
_SUPERFLUOUS_REFUSALS = """
    DELETE FROM dashboard_actions WHERE name = '' AND (time < ? OR time < (
        SELECT time FROM dashboard_actions WHERE name = '' ORDER BY time DESC LIMIT 1 OFFSET ?))"""


def load_users(db: Connection) -> list[dict[str, Any]]:
    """Return name, role, created, changed and has_password of each account."""
    sql = """
        SELECT name, role, created, changed, password IS NOT NULL AS has_password FROM dashboard_users ORDER BY name"""
    return [{**row, "has_password": bool(row["has_password"])} for row in fetch_dicts(db, sql)]


def load_user(db: Connection, name: str) -> tuple[str, str | None] | None:
    """Return (role, password hash) of an account."""
    row = db.execute("SELECT role, password FROM dashboard_users WHERE name = ?", (name,)).fetchone()
    return None if row is None else (row[0], row[1])


def save_user(db: Connection, name: str, role: str, password: str | None, now: str) -> None:
    db.execute(_UPSERT_USER, (name, role, password, now, now))


def delete_user(db: Connection, name: str, now: str) -> bool:
    """Delete an account and revoke its sessions; return False if there is none."""
    revoke_sessions(db, name, now)
    return bool(db.execute("DELETE FROM dashboard_users WHERE name = ?", (name,)).rowcount)


def load_session(db: Connection, session: str, now: str) -> Row | None:
    """Return (name, role) of a valid session."""
    row: Row | None = db.execute(SESSION, (session, now)).fetchone()
    return row


def add_session(db: Connection, session: str, name: str, now: str, expires: str, address: str) -> None:
    """Begin a session; end expired ones, and the oldest of the account beyond `MAX_SESSIONS`."""
    db.execute("INSERT INTO dashboard_sessions VALUES (?, ?, ?, ?, ?, NULL)", (session, name, now, expires, address))
    db.execute(_SUPERFLUOUS_SESSIONS, (now, name, MAX_SESSIONS))


def revoke_session(db: Connection, session: str, now: str) -> None:
    db.execute("UPDATE dashboard_sessions SET revoked = ? WHERE session = ? AND revoked IS NULL", (now, session))


def revoke_sessions(db: Connection, name: str, now: str) -> None:
    """Revoke every session of an account."""
    db.execute("UPDATE dashboard_sessions SET revoked = ? WHERE name = ? AND revoked IS NULL", (now, name))


def count_sessions(db: Connection, now: str) -> dict[str, int]:
    """Return the number of valid sessions of each account."""
    sql = "SELECT name, count(*) FROM dashboard_sessions WHERE revoked IS NULL AND expires > ? GROUP BY name"
    return dict(db.execute(sql, (now,)).fetchall())


def add_action(db: Connection, row: Row) -> None:
    """Append (time, name, role, action, object, outcome, address)."""
    columns = "time, name, role, action, object, outcome, address"
    db.execute(f"INSERT INTO dashboard_actions ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)


def add_refusal(db: Connection, row: Row, since: str, oldest: str) -> None:
    """Count a refused sign-in, an action without a name.

    Those of one address and account after `since` share a row. Rows before `oldest` and beyond `MAX_REFUSALS` end.
    """
    same = db.execute(REFUSAL, (since, row[4], row[6])).fetchone()
    if same is not None:
        count = int(same[1].split()[1]) if " " in same[1] else 1
        db.execute("UPDATE dashboard_actions SET outcome = ? WHERE rowid = ?", (f"refused {count + 1} times", same[0]))
        return
    add_action(db, row)
    db.execute(_SUPERFLUOUS_REFUSALS, (oldest, MAX_REFUSALS - 1))


def load_actions(db: Connection, limit: int) -> list[dict[str, Any]]:
    """Return the newest actions, newest first."""
    return fetch_dicts(db, ACTIONS, limit)
