"""Incidents and their lifecycle: raised, acknowledged by a person, muted until a time, cleared.

The state of an alert comes from its messages alone; what operators say about it is in a table of its own. A new
message of an open alert, which has become worse or has come back, ends an acknowledgement. It does not end a mute.
"""

from __future__ import annotations

from typing import Any

import msgspec

from outstation.fleet.database.incidents import incident_rows as table
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import UsageError
from outstation.protocol.alerts.alert import SEVERITY_RANK, Severity
from outstation.protocol.alerts.incident import Acknowledgement, Incident, IncidentKey, Mute, Status

# A mute without an end.
FOREVER = "9999-12-31T23:59:59.999999Z"
MAX_NOTE, MAX_NAME = 2000, 128
MIN_REF = 4
_MAX_MATCHES = 100


class IncidentFilter(msgspec.Struct, frozen=True):
    """Filter of incidents: `open` True without cleared ones, False only those, None both; `severity` at least."""

    open: bool | None = True
    status: Status | None = None
    device: str | None = None
    task: str | None = None
    alert: str | None = None
    severity: Severity = "info"
    since: str | None = None


def list_incidents(
    store: FleetStore,
    wanted: IncidentFilter = IncidentFilter(),  # noqa: B008 (frozen)
    *,
    now: str,
    newest_first: bool = False,
    limit: int | None = None,
    offset: int = 0,
) -> list[Incident]:
    """Return incidents in order of the time when they began; `now` (RFC 3339) decides which mutes are over."""
    with store.snapshot() as db:
        rows = table.list_incidents(db, _values(wanted, now), newest_first=newest_first, limit=limit, offset=offset)
    return [_to_incident(row, now) for row in rows]


def count_incidents(
    store: FleetStore,
    wanted: IncidentFilter = IncidentFilter(),  # noqa: B008 (frozen)
    *,
    now: str,
) -> dict[tuple[Status, Severity], int]:
    """Return how many incidents have each status and severity."""
    with store.snapshot() as db:
        return {(status, severity): n for status, severity, n in table.count_incidents(db, _values(wanted, now))}  # type: ignore[misc]


def count_statuses(store: FleetStore, *, device: str | None, task: str | None, now: str) -> dict[Status, int]:
    """Return how many incidents have each status; those that are cleared are all that are not open."""
    values = _values(IncidentFilter(device=device, task=task), now)
    counts: dict[Status, int] = {"raised": 0, "acknowledged": 0, "muted": 0}
    with store.snapshot() as db:
        for status, _, n in table.count_incidents(db, values):
            counts[status] += n  # type: ignore[index]
        return {**counts, "cleared": table.count_keys(db, values) - sum(counts.values())}


def load_incident(store: FleetStore, key: IncidentKey, *, now: str) -> Incident | None:
    with store.snapshot() as db:
        row = table.load_incident(db, key, now)
    return None if row is None else _to_incident(row, now)


def find_incident(store: FleetStore, ref: str, *, now: str) -> Incident:
    """Return the incident whose `ref` begins with `ref` or whose `id` it is, rather a raised one than one that is over.

    Raises UsageError unless there is exactly one.
    """
    with store.snapshot() as db:
        matches = table.find_keys(db, ref, _MAX_MATCHES)
    keys = [key for key, raised in matches if raised] or [key for key, _ in matches]
    if len(ref) < MIN_REF or not keys:
        least = f" (at least {MIN_REF} characters)" if len(ref) < MIN_REF else ""
        raise UsageError(f"{ref!r} is no incident{least}; `outstation fleet alerts` lists them")
    incident = load_incident(store, keys[0], now=now)
    if len(keys) > 1 or incident is None:
        number = f"{_MAX_MATCHES} or more" if len(matches) == _MAX_MATCHES else len(keys)
        raise UsageError(f"{number} incidents begin with {ref!r} or have this id; write the whole `incident` of one")
    return incident


def acknowledge(store: FleetStore, incident: Incident, *, by: str, note: str = "", now: str) -> None:
    """Record that `by` takes care of an incident as it is now. Raises UsageError for a cleared one."""
    if not incident.is_open:
        raise UsageError(f"alert {incident.ref} is cleared; there is nothing to acknowledge")
    with store.transaction() as db:
        table.save_acknowledgement(db, incident.key, incident.seq, *_checked(by, note, now))


def withdraw_acknowledgement(store: FleetStore, incident: Incident, *, by: str, note: str = "", now: str) -> None:
    with store.transaction() as db:
        table.save_acknowledgement(db, incident.key, None, *_checked(by, note, now))


def mute(store: FleetStore, incident: Incident, *, until: str | None = None, by: str, note: str = "", now: str) -> None:
    """Send no notifications of an incident until a time, or until it is unmuted. Raises UsageError for the past."""
    until = FOREVER if until is None else until
    if until <= now:
        raise UsageError(f"{until} is over; name a time to come")
    with store.transaction() as db:
        table.save_mute(db, incident.key, until, *_checked(by, note, now))


def unmute(store: FleetStore, incident: Incident, *, by: str, note: str = "", now: str) -> None:
    with store.transaction() as db:
        table.save_mute(db, incident.key, None, *_checked(by, note, now))


def check_note(by: str, note: str) -> None:
    """Raise UsageError for a name or a note that is too long."""
    if not by or len(by) > MAX_NAME or len(note) > MAX_NOTE or "\0" in by + note:
        raise UsageError(
            f"a name has 1 to {MAX_NAME} characters and a note at most {MAX_NOTE}, without NUL; shorten them"
        )


def _checked(by: str, note: str, now: str) -> tuple[str, str, str]:
    check_note(by, note)
    return by, now, note


def _values(wanted: IncidentFilter, now: str) -> dict[str, Any]:
    names = ("open", "status", "device", "task", "alert", "since")
    given = {name: getattr(wanted, name) for name in names}
    return {**given, "now": now, "rank": SEVERITY_RANK[wanted.severity]}


def _to_incident(row: dict[str, Any], now: str) -> Incident:
    acknowledged = muted = None
    if row["is_acknowledged"]:
        acknowledged = Acknowledgement(row["acknowledged_by"], row["acknowledged_at"], row["acknowledged_note"])
    if row["muted_until"] is not None and row["muted_until"] > now:
        muted = Mute(row["muted_until"], row["muted_by"], row["muted_at"], row["muted_note"])
    is_cleared = row["last_state"] == "cleared"
    return Incident(
        cleared=row["updated"] if is_cleared else None,
        cleared_summary=row["last_summary"] if is_cleared else None,
        acknowledged=acknowledged,
        muted=muted,
        **{name: row[name] for name in _COPIED},
    )


_COPIED = (
    *("ref", "status", "severity", "device", "task", "alert", "subject", "summary", "raised", "updated", "revision"),
    *("source", "log", "id", "seq", "raised_seq"),
)
