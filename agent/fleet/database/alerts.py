"""Alerts in the fleet database: rows of alerts that the collector raises itself, and queries of open alerts."""

from __future__ import annotations

from agent.alerts import FLEET_DRIFT, FLEET_REFERENCE, KEY_REVOKED, REPOSITORY_EXPIRY, TWO_LOGS, Alert, AlertKind
from agent.fleet.database.interface import Row
from agent.wire.messages import LoggedPayload

INSERT_ALERT = "INSERT INTO alerts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"

# An alert is open while the last message of its log with its id has state `raised`. Only logs that live count: a store
# that was lost cannot clear what it raised, and a copied card cannot silence the device. The collector's own alerts are
# in no log of a device; those that it never clears stay open, because a person has to look at them. Alerts of a retired
# device concern nobody any more.
ALERTS = """
    WITH last AS (SELECT a.device, a.log, a.id, a.source, max(a.seq) AS seq FROM alerts a
                  LEFT JOIN logs l ON l.device = a.device AND l.log = a.log
                  WHERE a.source = 'collector' OR l.live GROUP BY a.device, a.log, a.id, a.source)
    SELECT a.device, a.task, a.alert, a.subject, a.state, a.severity, a.summary, a.time, a.id, a.log, a.seq,
           a.revision, a.source, a.state = 'raised' AND l.seq IS NOT NULL
               AND a.device NOT IN (SELECT device FROM retired_devices) AS open
    FROM alerts a
    LEFT JOIN last l ON l.device = a.device AND l.log = a.log AND l.id = a.id AND l.seq = a.seq AND l.source = a.source
"""

# The last drift alert of each device and field before a time, whether it is open, and how many were raised since
# another time. However often an alert is raised again, under the same id, it counts once, from its first message on.
DRIFT_ALERTS = f"""
    SELECT task, device, subject, first AS time, open, n FROM (
        SELECT task, device, subject, first, open,
               sum(CASE WHEN time >= ? AND nth_of_id = 1 THEN 1 ELSE 0 END)
                   OVER (PARTITION BY task, device, subject) AS n,
               row_number() OVER (PARTITION BY task, device, subject ORDER BY time DESC, seq DESC) AS nth
        FROM (
            SELECT task, device, subject, time, seq, open, min(time) OVER (PARTITION BY device, log, id) AS first,
                   row_number() OVER (PARTITION BY device, log, id ORDER BY seq) AS nth_of_id
            FROM ({ALERTS}) each_message
            WHERE alert = 'drift' AND state = 'raised' AND device <> '' AND task IS NOT NULL AND time <= ?) raised
    ) counted
    WHERE nth = 1 ORDER BY task, device, subject
"""

OPEN_FLEET_WIDE_ALERTS = f"""
    SELECT task, subject, seq FROM ({ALERTS}) fleet_wide WHERE alert = 'drift' AND device = '' AND open
"""


_REFERENCE_LOG = "fleet-reference/"
OPEN_REFERENCE_ALERTS = f"""
    SELECT device, task, seq FROM ({ALERTS}) references_alerts
    WHERE subject = 'reference' AND log LIKE '{_REFERENCE_LOG}%' AND open
"""
# The newest reference of each device and task, whether an operator accepted it there, and its fields as JSON.
LEARNED_REFERENCES = """
    SELECT device, task, fields, EXISTS (
        SELECT 1 FROM learned_references a WHERE a.device = newest.device AND a.task = newest.task
        AND a.site = newest.site AND a.event = 'reference accepted')
    FROM (
        SELECT device, task, site, fields,
               row_number() OVER (PARTITION BY device, task ORDER BY time DESC, seq DESC) AS nth
        FROM learned_references WHERE event = 'learned') newest
    WHERE nth = 1 ORDER BY task, device
"""


def message_alert_row(kind: AlertKind, about: LoggedPayload, summary: str, now: str) -> Row:
    alert = kind.raised(summary, log=about.log, seq=about.seq)
    return collector_alert_row(about.device, None, alert, about.log, about.seq, now)


def refusals_alert_row(kind: AlertKind, device: str, summary: str, now: str, hour: int) -> Row:
    """Return an alert about messages refused in a device's name, unique per `hour` since 1970."""
    return collector_alert_row(device, None, kind.raised(summary, hour=hour), f"{kind.subject}/{hour}", hour, now)


def fleet_wide_alert_row(
    task: str, subject: str, since: int, summary: str, now: str, cleared: int | None = None
) -> Row:
    """Return the alert of fleet-wide drift that began at `since`, or its end at `cleared`; seconds since 1970."""
    build = FLEET_DRIFT.raised if cleared is None else FLEET_DRIFT.cleared
    alert = build(summary, task=task, field=subject, since=since)
    seq = since if cleared is None else cleared
    return collector_alert_row("", task, alert, f"fleet-wide/{task}/{subject}", seq, now)


def reference_alert_row(device: str, task: str, since: int, summary: str, now: str, cleared: int | None = None) -> Row:
    """Return the alert of a reference unlike the fleet's, raised at `since`, or its end; seconds since 1970."""
    build = FLEET_REFERENCE.raised if cleared is None else FLEET_REFERENCE.cleared
    alert = build(summary, device=device, task=task, since=since)
    seq = since if cleared is None else cleared
    return collector_alert_row(device, task, alert, f"{_REFERENCE_LOG}{task}", seq, now)


def repository_alert_row(summary: str, now: str, second: int, *, raised: bool) -> Row:
    """Return the alert that the repository needs an operator, or its end; `second` since 1970."""
    alert = (REPOSITORY_EXPIRY.raised if raised else REPOSITORY_EXPIRY.cleared)(summary)
    return collector_alert_row("", None, alert, "repository", second, now)


def revoked_alert_row(device: str, kid: str, now: str) -> Row:
    summary = f"Key {kid} of {device} was revoked: messages that it signs are refused, stored messages stay valid."
    return collector_alert_row(device, None, KEY_REVOKED.raised(summary, kid=kid), f"revoked/{kid}", 0, now)


def two_logs_alert_row(device: str, log: str, summary: str, now: str, second: int, *, raised: bool) -> Row:
    """Return the alert that a log lives beside another one, or its end; `second` since 1970."""
    alert = (TWO_LOGS.raised if raised else TWO_LOGS.cleared)(summary, log=log)
    return collector_alert_row(device, None, alert, f"two-logs/{log}", second, now)


def collector_alert_row(device: str, task: str | None, alert: Alert, log: str, seq: int, now: str) -> Row:
    """Return an alert of the collector; `log` stands for a log and `seq` orders the alerts in it."""
    head = (device, task, alert.alert, alert.subject, alert.state, alert.severity, alert.summary, now)
    return (*head, alert.id, "collector", log, seq, alert.revision)
