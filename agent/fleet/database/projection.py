"""Verified messages as rows of the tables people query; pure."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import msgspec

from agent.alerts import FLEET_DRIFT, KEY_REVOKED, REFUSED_BY_COLLECTOR, REPOSITORY_EXPIRY, Alert, AlertKind
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
    return [
        (body.device, body.task, row, t, label, score, value, body.log, body.seq)
        for row, t, label, score, value in zip(
            columns.row, columns.t, columns.label or none, columns.score or none, columns.value or none, strict=False
        )
    ]


def collector_alert_row(device: str, task: str | None, alert: Alert, log: str, seq: int, now: str) -> tuple[Any, ...]:
    """Return the row of an alert that the collector raises itself; `log` and `seq` are its place among its own."""
    head = (device, task, alert.alert, alert.subject, alert.state, alert.severity, alert.summary, now)
    return (*head, alert.id, "collector", log, seq)


def message_alert_row(kind: AlertKind, about: LoggedPayload, summary: str, now: str) -> tuple[Any, ...]:
    """Return the row of a security alert about one message of a device."""
    alert = kind.raised(summary, log=about.log, seq=about.seq)
    return collector_alert_row(about.device, None, alert, about.log, about.seq, now)


def refusals_alert_row(device: str, summary: str, now: str, hour: int) -> tuple[Any, ...]:
    """Return the row of an alert about messages refused in a device's name; there is one for each hour since 1970."""
    return collector_alert_row(device, None, REFUSED_BY_COLLECTOR.raised(summary, hour=hour), "", hour, now)


def fleet_wide_alert_row(
    task: str, subject: str, since: int, summary: str, now: str, cleared: int | None = None
) -> tuple[Any, ...]:
    """Return the row of drift on many devices that began at `since`, or was `cleared`, seconds since 1970."""
    build = FLEET_DRIFT.raised if cleared is None else FLEET_DRIFT.cleared
    alert = build(summary, task=task, field=subject, since=since)
    return collector_alert_row("", task, alert, f"wide/{task}/{subject}", since if cleared is None else cleared, now)


def repository_alert_row(summary: str, now: str, second: int, *, raised: bool) -> tuple[Any, ...]:
    """Return the row that the repository needs an operator, or no longer does; `second` since 1970."""
    alert = (REPOSITORY_EXPIRY.raised if raised else REPOSITORY_EXPIRY.cleared)(summary)
    return collector_alert_row("", None, alert, "repository", second, now)


def revoked_alert_row(device: str, kid: str, now: str) -> tuple[Any, ...]:
    """Return the row of the alert that an operator revoked a key."""
    summary = f"Key {kid} of {device} was revoked: what it signs is refused. What is stored stays valid."
    return collector_alert_row(device, None, KEY_REVOKED.raised(summary, kid=kid), f"revoked/{kid}", 0, now)


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
