"""Lifetimes of metadata by role: when they expire, when to remind, when to renew."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = "root", "targets", "snapshot", "timestamp"
TOP_LEVEL_ROLES = (ROOT, TARGETS, SNAPSHOT, TIMESTAMP)

# A device switched on after years must still reach the newest root. Snapshot and timestamp last for weeks, because a
# stick carried to a site without network is that old when it is plugged in.
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
# `refresh` renews a role with less than this left, and always the timestamp.
_RENEWAL_PERIODS = {TARGETS: timedelta(days=60), SNAPSHOT: timedelta(days=28)}
REFRESH_INTERVAL = timedelta(days=1)


def now() -> datetime:
    """Return the current time in whole seconds, as TUF requires."""
    return datetime.now(UTC).replace(microsecond=0)


def lifetime(role: str) -> timedelta:
    """Return the lifetime of a role. A bundle's role lives as long as targets, which delegates to it."""
    return _LIFETIMES.get(role, _LIFETIMES[TARGETS])


def is_expiring_soon(role: str, expires: datetime, now: datetime) -> bool:
    return expires - now < _REMINDER_PERIODS.get(role, _REMINDER_PERIODS[TARGETS])


def is_renewal_due(role: str, expires: datetime, now: datetime) -> bool:
    return expires - now < _RENEWAL_PERIODS.get(role, _RENEWAL_PERIODS[TARGETS])
