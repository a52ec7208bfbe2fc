"""Verified messages as rows of the tables people query; pure."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import msgspec

from agent.fleet.database.rollout_tables import change_rows, shadow_row
from agent.wire.messages import Alerts, Audit, Drift, Logged, Message, Quality, Results, Shadow

# The collector's alert that keys or metadata of the repository want an operator.
REPOSITORY = "repository"
# Table → rows of it, as `schema` orders their columns.
Rows = dict[str, list[tuple[Any, ...]]]


def unfold(message: Message, into: Rows) -> None:
    """Add the rows of one message to `into`."""
    body = message.body
    if isinstance(body, Results):
        into.setdefault("results", []).extend(result_rows(body))
    elif isinstance(body, Drift):
        into.setdefault("drift_windows", []).append(_drift_row(body))
    elif isinstance(body, Alerts):
        into.setdefault("alerts", []).append(_alert_row(body))
    elif isinstance(body, Quality):
        text = message.payload.decode()
        into.setdefault("quality", []).append((body.device, body.task, body.time, text, body.log, body.seq))
        into.setdefault("metrics", []).extend(_metric_rows(body))
    elif isinstance(body, Shadow):
        into.setdefault("shadows", []).append(shadow_row(body, message.payload))
    elif isinstance(body, Audit):
        into.setdefault("rollout_devices", []).extend(change_rows(body))


def result_rows(body: Results) -> list[tuple[Any, ...]]:
    """(device, task, row, t, label, score, value, log, seq) of each result of a message."""
    columns, none = body.columns, repeat(None)
    return [
        (body.device, body.task, row, t, label, score, value, body.log, body.seq)
        for row, t, label, score, value in zip(
            columns.row, columns.t, columns.label or none, columns.score or none, columns.value or none, strict=False
        )
    ]


def collector_alert(about: Logged, summary: str, now: str) -> tuple[Any, ...]:
    """A security alert that the collector raises itself about a message."""
    identity = f"collector/{about.log}/{about.seq}"
    head = (about.device, None, "security", f"{about.log}/{about.seq}", "raised", "critical", summary, now)
    return (*head, identity, "collector", about.log, about.seq)


def refusals_alert(device: str, summary: str, now: str, hour: int) -> tuple[Any, ...]:
    """A security alert about messages refused in a device's name; it has one place for each `hour` since 1970."""
    head = (device, None, "security", "refused", "raised", "critical", summary, now)
    return (*head, f"collector/refused/{hour}", "collector", "", hour)


def wide_alert(
    task: str, subject: str, since: int, summary: str, now: str, cleared: int | None = None
) -> tuple[Any, ...]:
    """Drift on many devices, of no single one, that began `since`, or was `cleared`, seconds since 1970."""
    head = ("", task, "drift", subject, "raised" if cleared is None else "cleared")
    severity = "warning" if cleared is None else "info"
    log = f"wide/{task}/{subject}"
    identity = f"collector/{log}/{since}"
    return (*head, severity, summary, now, identity, "collector", log, since if cleared is None else cleared)


def repository_alert(summary: str, now: str, second: int, *, raised: bool) -> tuple[Any, ...]:
    """Something is to be done about the repository, or no more; `second` since 1970."""
    state, severity = ("raised", "warning") if raised else ("cleared", "info")
    head = ("", None, REPOSITORY, "expiry", state, severity, summary, now)
    return (*head, "collector/repository", "collector", "repository", second)


def revoked_alert(device: str, kid: str, now: str) -> tuple[Any, ...]:
    """The alert that an operator revoked a key."""
    summary = f"Key {kid} of {device} was revoked: what it signs is refused. What is stored stays valid."
    head = (device, None, "security", kid, "raised", "warning", summary, now)
    return (*head, f"collector/revoked/{kid}", "collector", f"revoked/{kid}", 0)


def _alert_row(body: Alerts) -> tuple[Any, ...]:
    head = (body.device, body.task, body.alert, body.subject, body.state, body.severity, body.summary, body.time)
    return (*head, body.id, "device", body.log, body.seq)


def _metric_rows(body: Quality) -> list[tuple[Any, ...]]:
    head, tail = (body.device, body.task, body.time), ("device", body.log, body.seq)
    return [(*head, m.metric, m.slice, m.value, m.low, m.high, m.n, m.state, *tail) for m in body.metrics]


def _drift_row(body: Drift) -> tuple[Any, ...]:
    window, model = body.window, body.model
    span = (window.index, window.rows[0], window.rows[1], window.from_, window.to, window.n)
    estimate = None if body.estimate is None else _json(body.estimate)
    sizes = (_json(body.reference), _json(body.features), _json(body.output), estimate)
    joint = None if body.joint is None else _json(body.joint)
    return (body.device, body.task, *span, body.state, model.name, model.version, *sizes, body.log, body.seq, joint)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
