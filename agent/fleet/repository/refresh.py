"""Before what is signed expires: a new timestamp, and what else has not long to go, with the keys that are here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from agent.fleet.repository import edition, expiry, root_rotation
from agent.fleet.repository.edition import Edition
from agent.fleet.repository.expiry import DAILY, SNAPSHOT, TARGETS, TIMESTAMP
from agent.fleet.repository.keys import Keyring
from agent.fleet.repository.layout import Layout


class Refreshed(msgspec.Struct, frozen=True):
    """`roles` were signed anew, the first expires at `expires`; `root` is the version of a draft put in force, or 0."""

    roles: list[str]
    expires: datetime
    root: int = 0


def refresh(
    folder: Path, *, sign_with: Sequence[Path] = (), at: datetime | None = None, trust_clock: bool = False
) -> Refreshed:
    """Sign the timestamp anew, and what else expires soon. A draft that enough have signed comes into force.

    `trust_clock`: that of this machine is right though the repository was signed later by it. Raises UsageError.
    """
    layout, at = Layout(folder), at or expiry.now()
    with layout.locked():
        keyring = Keyring(layout.keys, sign_with)
        if trust_clock:
            edition.write(
                layout, edition.load(layout, root_rotation.coming(layout)), {SNAPSHOT}, keyring, at, trust_clock=True
            )
        version = root_rotation.finish(layout, keyring, at)
        return _renew(layout, keyring, at, version)


def refresh_daily(folder: Path, at: datetime | None = None) -> Refreshed | None:
    """The same where the last time was a day ago and both online keys are here; None where nothing was to do.

    Never waits: raises StorageBusy where another command writes.
    """
    layout, at = Layout(folder), at or expiry.now()
    if layout.newest_root() is None:
        return None
    with layout.locked(wait=False):
        keyring = Keyring(layout.keys)
        now = edition.load(layout, root_rotation.coming(layout))
        online = all(keyring.signers(now.keyids(role)) for role in (SNAPSHOT, TIMESTAMP))
        if not online or at - expiry.signed_at(TIMESTAMP, now.timestamp.signed.expires) < DAILY:
            return None
        return _renew(layout, keyring, at)


def _renew(layout: Layout, keyring: Keyring, at: datetime, version: int = 0) -> Refreshed:
    now = edition.load(layout)
    due = {role for role in _renewable(now, keyring) if expiry.to_renew(role, now.part(role).signed.expires, at)}
    edition.write(layout, now, due, keyring, at)
    renewed = [*sorted(due - {SNAPSHOT}), *([SNAPSHOT] if due else []), TIMESTAMP]
    return Refreshed(renewed, min(now.part(role).signed.expires for role in renewed), version)


def _renewable(now: Edition, keyring: Keyring) -> list[str]:
    return [role for role in (TARGETS, SNAPSHOT, *now.bundles) if keyring.signers(now.keyids(role))]
