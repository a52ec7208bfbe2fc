"""Alerts in the fleet database: their incidents, rows of alerts that the collector raises itself, and open ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import pairwise
from operator import itemgetter

from outstation.fleet.database.interface import Connection, Row
from outstation.fleet.database.schema import message_tables
from outstation.fleet.database.schema.message_tables import INCIDENTS
from outstation.protocol.alerts.alert import Alert, AlertKind
from outstation.protocol.alerts.incident import IncidentKey
from outstation.protocol.alerts.kinds import FLEET_DRIFT, FLEET_REFERENCE, KEY_REVOKED, REPOSITORY_EXPIRY, TWO_LOGS
from outstation.protocol.wire.messages import LoggedPayload

_INSERT_ALERT = f"INSERT INTO alerts VALUES (?{', ?' * (len(message_tables.ALERTS.names) - 1)}) ON CONFLICT DO NOTHING"

# Columns of the newest message, of the newest that raised it and of the newest that began it: the first of each group
# decides.
_DECIDING = ("seq", "raised_seq", "began_seq")
_STARTS = [*map(INCIDENTS.names.index, _DECIDING), len(INCIDENTS.names)]
_MERGED = ", ".join(
    f"{column} = CASE WHEN excluded.{deciding} > incidents.{deciding} THEN excluded.{column}"
    f" ELSE incidents.{column} END"
    for deciding, (start, end) in zip(_DECIDING, pairwise(_STARTS), strict=True)
    for column in INCIDENTS.names[start:end]
)
_MERGE_INCIDENT = f"""
    INSERT INTO incidents VALUES (?{", ?" * (len(INCIDENTS.names) - 1)})
    ON CONFLICT (device, log, id, source) DO UPDATE SET {_MERGED}"""

# An incident is open while its newest message raised it. Only logs that live count: a store that was lost cannot clear
# what it raised, and a copied card cannot silence the device. The collector's own alerts are in no log of a device;
# those that it never clears stay open, because a person has to look at them. Alerts of a retired device concern nobody
# any more.
OPEN_INCIDENTS = """
    SELECT i.* FROM incidents i LEFT JOIN logs l ON l.device = i.device AND l.log = i.log
    WHERE i.state = 'raised' AND (i.source = 'collector' OR l.live)
      AND i.device NOT IN (SELECT device FROM retired_devices)
"""
# The newest message of each open incident, as in table alerts.
OPEN_ALERTS = f"""
    SELECT device, task, alert, subject, state, severity, summary, updated AS time, id, log, seq, revision, source,
           TRUE AS open FROM ({OPEN_INCIDENTS}) incidents
"""
ALERTS = f"""
    SELECT a.device, a.task, a.alert, a.subject, a.state, a.severity, a.summary, a.time, a.id, a.log, a.seq,
           a.revision, a.source, o.seq IS NOT NULL AS open
    FROM alerts a LEFT JOIN ({OPEN_INCIDENTS}) o
        ON o.device = a.device AND o.log = a.log AND o.id = a.id AND o.source = a.source AND o.seq = a.seq
"""

# When the last drift alert of each device and field began before a time, whether one is open, and how many began since
# another time. However often an alert is raised again, under the same id, it counts once. By index incidents_drift.
DRIFT_ALERTS = """
    SELECT task, device, subject, max(raised) AS raised,
           max(CASE WHEN state = 'raised' AND device NOT IN (SELECT device FROM retired_devices)
                         AND EXISTS (SELECT 1 FROM logs l WHERE l.device = i.device AND l.log = i.log AND l.live)
                    THEN 1 ELSE 0 END) AS open,
           sum(CASE WHEN raised >= ? THEN 1 ELSE 0 END) AS n
    FROM incidents i WHERE alert = 'drift' AND source = 'device' AND raised_seq > 0 AND task IS NOT NULL AND raised <= ?
    GROUP BY task, device, subject ORDER BY task, device, subject
"""

OPEN_FLEET_WIDE_ALERTS = f"""
    SELECT task, subject, seq FROM ({OPEN_INCIDENTS}) fleet_wide WHERE alert = 'drift' AND device = ''
"""

_REFERENCE_LOG = "fleet-reference/"
OPEN_REFERENCE_ALERTS = f"""
    SELECT device, task, seq FROM ({OPEN_INCIDENTS}) references_alerts
    WHERE subject = 'reference' AND log LIKE '{_REFERENCE_LOG}%'
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


def incident_ref(key: IncidentKey) -> str:
    """Return the short name of an incident: 48 bits of a digest of its key."""
    return hashlib.sha256(json.dumps(key, ensure_ascii=True).encode()).hexdigest()[:12]


def add_alerts(db: Connection, rows: Iterable[Row]) -> None:
    """Add alerts that the collector raises itself, unless they exist, and merge them into their incidents."""
    merge_incidents(db, [row for row in rows if db.execute(_INSERT_ALERT, row).rowcount])


def merge_incidents(db: Connection, alerts: Iterable[Row]) -> None:
    """Merge rows of table alerts into their incidents; their order does not matter, and repeats change nothing."""
    # Sorted, so that two transactions never wait for each other.
    db.executemany(_MERGE_INCIDENT, sorted(map(_to_incident_row, alerts), key=itemgetter(slice(6))))


def _to_incident_row(alert: Row) -> Row:
    """Return the incident of a single message."""
    device, task, kind, subject, state, severity, summary, time, identity, source, log, seq, revision = alert[:13]
    is_raised = state == "raised"
    key = (device, log, identity, source, incident_ref((source, device, log, identity)))
    raising = (seq if is_raised else -seq, task, kind, subject, severity, summary, revision)
    return (*key, seq, state, time, summary, *raising, seq if is_raised and revision == 1 else -seq, time)


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
    return collector_alert_row(device, None, KEY_REVOKED.raised(summary, kid=kid), f"revoked/{kid}", 1, now)


def two_logs_alert_row(device: str, log: str, summary: str, now: str, second: int, *, raised: bool) -> Row:
    """Return the alert that a log lives beside another one, or its end; `second` since 1970."""
    alert = (TWO_LOGS.raised if raised else TWO_LOGS.cleared)(summary, log=log)
    return collector_alert_row(device, None, alert, f"two-logs/{log}", second, now)


def collector_alert_row(device: str, task: str | None, alert: Alert, log: str, seq: int, now: str) -> Row:
    """Return an alert of the collector; `log` stands for a log and `seq`, above 0, orders the alerts in it."""
    head = (device, task, alert.alert, alert.subject, alert.state, alert.severity, alert.summary, now)
    return (*head, alert.id, "collector", log, seq, alert.revision)
