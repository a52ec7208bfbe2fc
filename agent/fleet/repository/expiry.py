"""How long each role's word counts, and when to say that it soon does not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = "root", "targets", "snapshot", "timestamp"
TOP_LEVEL_ROLES = (ROOT, TARGETS, SNAPSHOT, TIMESTAMP)

# A device may be switched on after years and must still find its way to the newest root. Snapshot and timestamp last
# for weeks, for a stick that is carried to a site without network is that old when it is plugged in.
_LIFETIMES = {
    ROOT: timedelta(days=3650),
    TARGETS: timedelta(days=365),
    SNAPSHOT: timedelta(days=56),
    TIMESTAMP: timedelta(days=28),
}
_REMINDER_PERIODS = {
    ROOT: timedelta(days=180),
    TARGETS: timedelta(days=60),
    SNAPSHOT: timedelta(days=14),
    TIMESTAMP: timedelta(days=14),
}
# `refresh` renews what has less than this; the timestamp always.
_RENEWAL_PERIODS = {TARGETS: timedelta(days=60), SNAPSHOT: timedelta(days=28)}
REFRESH_INTERVAL = timedelta(days=1)


def now() -> datetime:
    """TUF's times are whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def lifetime(role: str) -> timedelta:
    """A bundle's role lives as long as targets, whose part it is."""
    return _LIFETIMES.get(role, _LIFETIMES[TARGETS])


def is_expiring_soon(role: str, expires: datetime, current_time: datetime) -> bool:
    return expires - current_time < _REMINDER_PERIODS.get(role, _REMINDER_PERIODS[TARGETS])


def is_renewal_due(role: str, expires: datetime, current_time: datetime) -> bool:
    return expires - current_time < _RENEWAL_PERIODS.get(role, _RENEWAL_PERIODS[TARGETS])


def signing_time(role: str, expires: datetime) -> datetime:
    """When metadata that expires then was made."""
    return expires - lifetime(role)
