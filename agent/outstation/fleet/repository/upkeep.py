"""Upkeep of the repository: renewal of metadata before they expire, and the collector's daily run with its alert."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from outstation.fleet.database.alerts import repository_alert_row
from outstation.fleet.database.store import FleetStore
from outstation.fleet.repository import edition, expiry, repository_status, root_rotation
from outstation.fleet.repository.expiry import REFRESH_INTERVAL, SNAPSHOT, TARGETS, TIMESTAMP
from outstation.fleet.repository.keys import RepositoryKeyring
from outstation.fleet.repository.layout import Layout
from outstation.foundation.errors import StorageError
from outstation.protocol.alerts.kinds import REPOSITORY_EXPIRY

logger = logging.getLogger(__name__)


class RefreshResult(msgspec.Struct, frozen=True):
    """Renewed roles and their earliest expiry. `root_version` is that of a draft put in force, or 0."""

    roles: list[str]
    expires: datetime
    root_version: int = 0


def refresh(
    folder: Path, *, sign_with: Sequence[Path] = (), now: datetime | None = None, trust_clock: bool = False
) -> RefreshResult:
    """Sign the timestamp and each role that expires soon. A sufficiently signed draft comes into force.

    `trust_clock`: this machine's clock is right although the last signature is later. Raises UsageError.
    """
    layout, now = Layout(folder), now or expiry.now()
    with layout.locked():
        keyring = RepositoryKeyring(layout.keys, sign_with)
        if trust_clock:
            current = edition.load(layout, root_rotation.load_next_root(layout))
            edition.write(layout, current, {SNAPSHOT}, keyring, now, trust_clock=True)
        version = root_rotation.activate_draft(layout, keyring, now)
        return _renew(layout, keyring, now, version)


def refresh_daily(folder: Path, now: datetime | None = None) -> RefreshResult | None:
    """Refresh if the last signature is a day old and both online keys are here; return None if nothing is due.

    Raises StorageBusy instead of waiting while another command writes.
    """
    layout, now = Layout(folder), now or expiry.now()
    if layout.newest_root_path() is None:
        return None
    with layout.locked(wait=False):
        keyring = RepositoryKeyring(layout.keys)
        current = edition.load(layout, root_rotation.load_next_root(layout))
        online = all(keyring.signers(current.keyids(role)) for role in (SNAPSHOT, TIMESTAMP))
        signed = current.timestamp.signed.expires - expiry.lifetime(TIMESTAMP)
        if not online or now - signed < REFRESH_INTERVAL:
            return None
        return _renew(layout, keyring, now)


def _renew(layout: Layout, keyring: RepositoryKeyring, now: datetime, root_version: int = 0) -> RefreshResult:
    current = edition.load(layout)
    due = {
        role
        for role in (TARGETS, SNAPSHOT, *current.bundles)
        if keyring.signers(current.keyids(role))
        and expiry.is_renewal_due(role, current.get_metadata(role).signed.expires, now)
    }
    edition.write(layout, current, due, keyring, now)
    renewed = [*sorted(due - {SNAPSHOT}), *([SNAPSHOT] if due else []), TIMESTAMP]
    return RefreshResult(renewed, min(current.get_metadata(role).signed.expires for role in renewed), root_version)


def maintain(folder: Path, store: FleetStore, now: datetime | None = None) -> None:
    """Refresh daily, and raise or clear the alert about due work. Called by the collector.

    Raises StorageBusy while another command writes, StorageError for an inaccessible file. The caller retries soon.
    """
    now = now or expiry.now()
    try:
        if refresh_daily(folder, now) is not None:
            logger.info("repository: timestamp signed")
        reminders = repository_status.read(folder, now).reminders
    except OSError as error:
        raise StorageError(
            f"{error.filename or folder}: {error.strerror}, so the repository was not refreshed; check the owner of "
            "the file and its folder: the collector must be able to read and replace both"
        ) from error
    is_open = any(row["alert"] == REPOSITORY_EXPIRY.alert for row in store.alerts())
    if bool(reminders) == is_open:
        return
    summary = "; ".join(reminders) or "Nothing in the repository expires soon, and no draft waits for signatures."
    logger.warning("repository: %s", summary)
    received, second = f"{now:%Y-%m-%dT%H:%M:%S.000000Z}", int(now.timestamp())
    store.raise_alert(repository_alert_row(summary, received, second, raised=not is_open))
