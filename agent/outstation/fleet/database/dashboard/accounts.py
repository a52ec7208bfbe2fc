"""Statements on accounts, sessions and actions of the dashboard."""

from __future__ import annotations

from typing import Any

from outstation.fleet.database.interface import Connection, Row, fetch_dicts

MAX_SESSIONS = 20
# Refused sign-ins that are stored: every client can cause them. Sign-ins and sign-outs of each account that are stored.
MAX_REFUSALS, MAX_SIGN_INS = 10_000, 1_000
SIGN_IN, SIGN_OUT = "sign in", "sign out"

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
SAME_SIGN_IN = """
    SELECT rowid, outcome FROM dashboard_actions
    WHERE name = ? AND time > ? AND action = ? AND object = ? AND address = ? ORDER BY time DESC LIMIT 1"""
_SIGN_INS = f"name = ? AND action IN ('{SIGN_IN}', '{SIGN_OUT}')"
_SUPERFLUOUS_SIGN_INS = f"""
    DELETE FROM dashboard_actions WHERE {_SIGN_INS} AND (time < ? OR time < (
        SELECT time FROM dashboard_actions WHERE {_SIGN_INS} ORDER BY time DESC LIMIT 1 OFFSET ?))"""


def load_users(db: Connection) -> list[dict[str, Any]]:
    """Return name, role, created, changed and has_password of each account."""
    sql = """
        SELECT name, role, created, changed, password IS NOT NULL AS has_password FROM dashboard_users ORDER BY name"""
    return [{**row, "has_password": bool(row["has_password"])} for row in fetch_dicts(db, sql)]


def load_user(db: Connection, name: str) -> tuple[str, str | None] | None:
    """Return (role, password hash) of an account."""
    sql = "SELECT role, password FROM dashboard_users WHERE name = ?"
    row: tuple[str, str | None] | None = db.execute(sql, (name,)).fetchone()
    return row


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


def add_sign_in(db: Connection, row: Row, since: str, oldest: str) -> None:
    """Count a sign-in or sign-out, or a refused one, which has no name.

    Those of one address and account after `since` share a row. Rows before `oldest` end, and those beyond
    `MAX_REFUSALS`, or `MAX_SIGN_INS` of an account.
    """
    _, name, _, action, account, outcome, address = row
    same = db.execute(SAME_SIGN_IN, (name, since, action, account, address)).fetchone()
    if same is not None:
        count = int(same[1].split()[1]) if " " in same[1] else 1
        counted = f"{outcome} {count + 1} times"
        db.execute("UPDATE dashboard_actions SET outcome = ? WHERE rowid = ?", (counted, same[0]))
        return
    add_action(db, row)
    limit = MAX_SIGN_INS if name else MAX_REFUSALS
    db.execute(_SUPERFLUOUS_SIGN_INS, (name, oldest, name, limit - 1))


def load_actions(db: Connection, limit: int) -> list[dict[str, Any]]:
    """Return the newest actions, newest first."""
    return fetch_dicts(db, ACTIONS, limit)
