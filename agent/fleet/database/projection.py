"""Verified messages as rows of the tables people query; pure."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import msgspec

from agent.fleet.database.rollout_tables import build_phase_rows, build_shadow_row
from agent.wire.messages import (
    AlertPayload,
    AuditPayload,
    DriftPayload,
    LoggedPayload,
    QualityPayload,
    ResultsPayload,
    ShadowPayload,
    VerifiedMessage,
)

# The collector's alert that keys or metadata of the repository want an operator.
REPOSITORY_ALERT = "repository"
# Table → rows of it, as `schema` orders their columns.
TableRows = dict[str, list[tuple[Any, ...]]]


def project_message(message: VerifiedMessage, rows: TableRows) -> None:
    """Add the rows of one message to `into`."""
    body = message.body
    if isinstance(body, ResultsPayload):
        rows.setdefault("results", []).extend(result_rows(body))
    elif isinstance(body, DriftPayload):
        rows.setdefault("drift_windows", []).append(_drift_row(body))
    elif isinstance(body, AlertPayload):
        rows.setdefault("alerts", []).append(_alert_row(body))
    elif isinstance(body, QualityPayload):
        text = message.payload.decode()
        rows.setdefault("quality", []).append((body.device, body.task, body.time, text, body.log, body.seq))
        rows.setdefault("metrics", []).extend(_metric_rows(body))
    elif isinstance(body, ShadowPayload):
        rows.setdefault("shadows", []).append(build_shadow_row(body, message.payload))
    elif isinstance(body, AuditPayload):
        rows.setdefault("rollout_devices", []).extend(build_phase_rows(body))


def result_rows(body: ResultsPayload) -> list[tuple[Any, ...]]:
    """(device, task, row, t, label, score, value, log, seq) of each result of a message."""
    columns, none = body.columns, repeat(None)
    rows, times, labels = columns.expand_rows(), columns.expand_times(), columns.expand_labels()
    return [
        (body.device, body.task, row, t, label, score, value, body.log, body.seq)
        for row, t, label, score, value in zip(
            rows, times, labels or none, columns.score or none, columns.value or none, strict=False
        )
    ]


def collector_alert_row(about: LoggedPayload, summary: str, now: str) -> tuple[Any, ...]:
    """A security alert that the collector raises itself about a message."""
    identity = f"collector/{about.log}/{about.seq}"
    head = (about.device, None, "security", f"{about.log}/{about.seq}", "raised", "critical", summary, now)
    return (*head, identity, "collector", about.log, about.seq)


def refusals_alert_row(device: str, summary: str, now: str, hour: int) -> tuple[Any, ...]:
    """A security alert about messages refused in a device's name; it has one place for each `hour` since 1970."""
    head = (device, None, "security", "refused", "raised", "critical", summary, now)
    return (*head, f"collector/refused/{hour}", "collector", "", hour)


def fleet_wide_alert_row(
    task: str, subject: str, since: int, summary: str, now: str, cleared: int | None = None
) -> tuple[Any, ...]:
    """Drift on many devices, of no single one, that began `since`, or was `cleared`, seconds since 1970."""
    head = ("", task, "drift", subject, "raised" if cleared is None else "cleared")
    severity = "warning" if cleared is None else "info"
    log = f"wide/{task}/{subject}"
    identity = f"collector/{log}/{since}"
    return (*head, severity, summary, now, identity, "collector", log, since if cleared is None else cleared)


def repository_alert_row(summary: str, now: str, second: int, *, raised: bool) -> tuple[Any, ...]:
    """Something is to be done about the repository, or no more; `second` since 1970."""
    state, severity = ("raised", "warning") if raised else ("cleared", "info")
    head = ("", None, REPOSITORY_ALERT, "expiry", state, severity, summary, now)
    return (*head, "collector/repository", "collector", "repository", second)


def revoked_alert_row(device: str, kid: str, now: str) -> tuple[Any, ...]:
    """The alert that an operator revoked a key."""
    summary = f"Key {kid} of {device} was revoked: what it signs is refused. What is stored stays valid."
    head = (device, None, "security", kid, "raised", "warning", summary, now)
    return (*head, f"collector/revoked/{kid}", "collector", f"revoked/{kid}", 0)


def _alert_row(body: AlertPayload) -> tuple[Any, ...]:
    head = (body.device, body.task, body.alert, body.subject, body.state, body.severity, body.summary, body.time)
    return (*head, body.id, "device", body.log, body.seq)


def _metric_rows(body: QualityPayload) -> list[tuple[Any, ...]]:
    head, tail = (body.device, body.task, body.time), ("device", body.log, body.seq)
    return [(*head, m.metric, m.slice, m.value, m.low, m.high, m.n, m.state, *tail) for m in body.metrics]


def _drift_row(body: DriftPayload) -> tuple[Any, ...]:
    window, model = body.window, body.model
    span = (window.index, window.rows[0], window.rows[1], window.from_, window.to, window.n)
    estimate = None if body.estimate is None else _to_json(body.estimate)
    sizes = (_to_json(body.reference), _to_json(body.features), _to_json(body.output), estimate)
    joint = None if body.joint is None else _to_json(body.joint)
    return (body.device, body.task, *span, body.state, model.name, model.version, *sizes, body.log, body.seq, joint)


def _to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
