"""How long each role's word counts, and when to say that it soon does not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = "root", "targets", "snapshot", "timestamp"
TOP = (ROOT, TARGETS, SNAPSHOT, TIMESTAMP)

# A device may be switched on after years and must still find its way to the newest root. Snapshot and timestamp last
# for weeks, for a stick that is carried to a site without network is that old when it is plugged in.
_LIFE = {
    ROOT: timedelta(days=3650),
    TARGETS: timedelta(days=365),
    SNAPSHOT: timedelta(days=56),
    TIMESTAMP: timedelta(days=28),
}
_REMIND = {
    ROOT: timedelta(days=180),
    TARGETS: timedelta(days=60),
    SNAPSHOT: timedelta(days=14),
    TIMESTAMP: timedelta(days=14),
}
# `refresh` renews what has less than this; the timestamp always.
_RENEW = {TARGETS: timedelta(days=60), SNAPSHOT: timedelta(days=28)}
DAILY = timedelta(days=1)


def now() -> datetime:
    """TUF's times are whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def life(role: str) -> timedelta:
    """A bundle's role lives as long as targets, whose part it is."""
    return _LIFE.get(role, _LIFE[TARGETS])


def soon(role: str, expires: datetime, at: datetime) -> bool:
    return expires - at < _REMIND.get(role, _REMIND[TARGETS])


def to_renew(role: str, expires: datetime, at: datetime) -> bool:
    return expires - at < _RENEW.get(role, _RENEW[TARGETS])


def signed_at(role: str, expires: datetime) -> datetime:
    """When metadata that expires then was made."""
    return expires - life(role)
