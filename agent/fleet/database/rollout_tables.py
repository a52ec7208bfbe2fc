"""Tables of roll-outs, and the rows that signed messages unfold into."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from agent.errors import MessageRefused
from agent.fleet.database.interface import Connection
from agent.wire.desired_state import Digest, Name, Phase, Strategy, Version
from agent.wire.messages import AuditPayload, ShadowPayload, decode

# Of the audit message in which a device tells of a change of its own.
ROLLOUT_EVENT = "rollout"

TABLES = (
    # state: running, paused, aborted or finished; step counts from 1; plan: JSON, as it was started.
    """CREATE TABLE rollouts (
        rollout TEXT PRIMARY KEY, task TEXT NOT NULL, bundle TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
        topic TEXT NOT NULL, started TEXT NOT NULL, state TEXT NOT NULL, step INTEGER NOT NULL, plan TEXT NOT NULL
    ) WITHOUT ROWID""",
    # The n-th decision of a roll-out. payload: what the operator's key signed; the other columns say the same.
    """CREATE TABLE decisions (
        rollout TEXT NOT NULL, n INTEGER NOT NULL, time TEXT NOT NULL, event TEXT NOT NULL, summary TEXT NOT NULL,
        evidence TEXT NOT NULL, payload BLOB NOT NULL, jws TEXT NOT NULL, PRIMARY KEY (rollout, n))""",
    # model, other: digests of the bundle whose results counted, and of the other; body: the payload, as text.
    """CREATE TABLE shadows (
        device TEXT NOT NULL, task TEXT NOT NULL, rollout TEXT NOT NULL, model TEXT NOT NULL, other TEXT NOT NULL,
        time TEXT NOT NULL, rows_first INTEGER NOT NULL, rows_last INTEGER NOT NULL, batches INTEGER NOT NULL,
        n INTEGER NOT NULL, errors INTEGER NOT NULL, body TEXT NOT NULL, log TEXT NOT NULL, seq INTEGER NOT NULL,
        PRIMARY KEY (device, log, seq))""",
    "CREATE INDEX shadows_of_rollout ON shadows (rollout)",
    # One change of a device's own; numbers: JSON.
    """CREATE TABLE rollout_devices (
        device TEXT NOT NULL, task TEXT NOT NULL, rollout TEXT NOT NULL, digest TEXT NOT NULL, strategy TEXT NOT NULL,
        phase TEXT NOT NULL, reason TEXT NOT NULL, summary TEXT NOT NULL, numbers TEXT NOT NULL, time TEXT NOT NULL,
        log TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (device, log, seq))""",
    "CREATE INDEX devices_of_rollout ON rollout_devices (rollout, device)",
    # What devices should run, as it is published: the one message of each topic.
    """CREATE TABLE desired (
        topic TEXT PRIMARY KEY, counter INTEGER NOT NULL, payload BLOB NOT NULL, jws TEXT NOT NULL) WITHOUT ROWID""",
)

COLUMNS = {
    "shadows": (
        *("device", "task", "rollout", "model", "other", "time", "rows_first", "rows_last", "batches", "n", "errors"),
        *("body", "log", "seq"),
    ),
    "rollout_devices": (
        *("device", "task", "rollout", "digest", "strategy", "phase", "reason", "summary", "numbers", "time"),
        *("log", "seq"),
    ),
}


class PhaseChange(msgspec.Struct, frozen=True):
    """The evidence of a device's audit message about a roll-out."""

    task: Name
    rollout: Name
    bundle: Name
    version: Version
    digest: Digest
    strategy: Strategy
    phase: Phase
    reason: str = ""
    numbers: dict[str, Any] = {}


def build_shadow_row(body: ShadowPayload, payload: bytes) -> tuple[Any, ...]:
    """Of table shadows."""
    head = (body.device, body.task, body.rollout, body.model.digest, body.other.digest, body.time)
    return (*head, *body.rows, body.batches, body.n, body.errors, payload.decode(), body.log, body.seq)


def build_phase_rows(body: AuditPayload) -> list[tuple[Any, ...]]:
    """Of table rollout_devices: one, or none where the message tells of something else."""
    if body.event != ROLLOUT_EVENT:
        return []
    try:
        told = msgspec.convert(body.evidence, PhaseChange)
        # Strictly JSON: what came as a number too large to be one is no evidence.
        numbers = msgspec.json.encode(told.numbers).decode()
    except (msgspec.MsgspecError, ValueError):
        return []
    what = (told.task, told.rollout, told.digest, told.strategy, told.phase, told.reason[:64])
    return [(body.device, *what, body.summary, numbers, body.time, body.log, body.seq)]


def project_stored_messages(db: Connection) -> None:
    """Rows of the messages that came before there were these tables."""
    told = "SELECT payload FROM messages WHERE kind = 'shadow' OR (kind = 'audit' AND instr(payload, ?) > 0)"
    for (payload,) in db.execute(told, [f'"{ROLLOUT_EVENT}"'.encode()]).fetchall():
        with contextlib.suppress(MessageRefused, TypeError):
            body = decode(payload)
            if isinstance(body, ShadowPayload):
                _insert_row(db, "shadows", build_shadow_row(body, payload))
            elif isinstance(body, AuditPayload):
                for row in build_phase_rows(body):
                    _insert_row(db, "rollout_devices", row)


def _insert_row(db: Connection, table: str, row: tuple[Any, ...]) -> None:
    db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))}) ON CONFLICT DO NOTHING", row)
