"""Projection: the rows that each kind of message adds to the tables.

A new kind adds an entry to `PROJECTIONS` and its table to `schema`. The functions are pure; a message without a valid
content for a table adds no row there, and stays evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

import msgspec

from agent.fleet.database.interface import Row
from agent.wire.desired_state import Digest, Name, Phase, Strategy, Version
from agent.wire.messages import (
    AlertPayload,
    AuditPayload,
    DriftPayload,
    Payload,
    QualityPayload,
    ResultsPayload,
    ShadowPayload,
    VerifiedMessage,
)

# Event of the audit message in which a device reports a phase change of a rollout.
ROLLOUT_EVENT = "rollout"
RESULTS_TABLE = "results"
_MAX_REASON = 64

# Table → rows, with columns in the order of `schema`.
TableRows = dict[str, list[Row]]


class PhaseChange(msgspec.Struct, frozen=True):
    """The evidence of a device's audit message about a rollout."""

    task: Name
    rollout: Name
    bundle: Name
    version: Version
    digest: Digest
    strategy: Strategy
    phase: Phase
    reason: str = ""
    numbers: dict[str, Any] = {}


class Projection(msgspec.Struct, frozen=True):
    """The rows of one table that a message of one kind adds: `build(body, payload)`."""

    table: str
    build: Callable[[Any, bytes], Iterable[Row]]


def project_message(message: VerifiedMessage, rows: TableRows) -> None:
    """Add the rows of one message to `rows`."""
    for projection in PROJECTIONS.get(type(message.body), ()):
        rows.setdefault(projection.table, []).extend(projection.build(message.body, message.payload))


def _result_rows(body: ResultsPayload, _payload: bytes) -> list[Row]:
    """Return (device, task, row, t, label, score, value, log, seq) of each result of a message."""
    columns, none = body.columns, repeat(None)
    rows, times, labels = columns.expand_rows(), columns.expand_times(), columns.expand_labels()
    return [
        (body.device, body.task, row, t, label, score, value, body.log, body.seq)
        for row, t, label, score, value in zip(
            rows, times, labels or none, columns.score or none, columns.value or none, strict=False
        )
    ]


def _drift_rows(body: DriftPayload, _payload: bytes) -> list[Row]:
    window, model = body.window, body.model
    count = 1 if body.windows is None else len(body.windows)
    span = (window.index, count, window.rows[0], window.rows[1], window.from_, window.to, window.n)
    members = (body.reference, body.features, body.output, body.joint, body.estimate, body.windows)
    texts = (None if member is None else _to_json(member) for member in members)
    return [(body.device, body.task, *span, body.state, model.name, model.version, *texts, body.log, body.seq)]


def _alert_rows(body: AlertPayload, _payload: bytes) -> list[Row]:
    head = (body.device, body.task, body.alert, body.subject, body.state, body.severity, body.summary, body.time)
    return [(*head, body.id, "device", body.log, body.seq, body.revision)]


def _quality_rows(body: QualityPayload, payload: bytes) -> list[Row]:
    return [(body.device, body.task, body.time, payload.decode(), body.log, body.seq)]


def _metric_rows(body: QualityPayload, _payload: bytes) -> list[Row]:
    head, tail = (body.device, body.task, body.time), ("device", body.log, body.seq)
    return [(*head, m.metric, m.slice, m.value, m.low, m.high, m.n, m.state, *tail) for m in body.metrics]


def _shadow_rows(body: ShadowPayload, payload: bytes) -> list[Row]:
    head = (body.device, body.task, body.rollout, body.model.digest, body.other.digest, body.time)
    return [(*head, *body.rows, body.batches, body.n, body.errors, payload.decode(), body.log, body.seq)]


def _phase_rows(body: AuditPayload, _payload: bytes) -> list[Row]:
    if body.event != ROLLOUT_EVENT:
        return []
    try:
        change = msgspec.convert(body.evidence, PhaseChange)
        # A number too large for JSON is no evidence.
        numbers = _to_json(change.numbers)
    except (msgspec.MsgspecError, ValueError):
        return []
    head = (body.device, change.task, change.rollout, change.digest, change.strategy, change.phase)
    return [(*head, change.reason[:_MAX_REASON], body.summary, numbers, body.time, body.log, body.seq)]


def _to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


PROJECTIONS: dict[type[Payload], tuple[Projection, ...]] = {
    ResultsPayload: (Projection(RESULTS_TABLE, _result_rows),),
    DriftPayload: (Projection("drift_windows", _drift_rows),),
    AlertPayload: (Projection("alerts", _alert_rows),),
    QualityPayload: (Projection("quality_messages", _quality_rows), Projection("metrics", _metric_rows)),
    ShadowPayload: (Projection("shadows", _shadow_rows),),
    AuditPayload: (Projection("rollout_devices", _phase_rows),),
}

TABLES = tuple(projection.table for projections in PROJECTIONS.values() for projection in projections)
# These tables also have rows of the collector itself.
SHARED_TABLES = frozenset({"alerts", "metrics"})
