"""What is in the repository, whose keys count, and what expires when."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import msgspec
from tuf.api.metadata import Role

from agent.fleet.repository import edition, expiry, root_rotation
from agent.fleet.repository.edition import Edition
from agent.fleet.repository.expiry import ROOT, SNAPSHOT, TIMESTAMP, TOP
from agent.fleet.repository.keys import Keyring, public_text
from agent.fleet.repository.layout import Layout
from agent.fleet.repository.revoke import all_revoked
from agent.fleet.repository.root_rotation import Draft
from agent.model.bundle import target_metadata


class Signing(msgspec.Struct, frozen=True):
    """A key that counts; `here`: its private half is in the folder of keys."""

    name: str
    key: str
    here: bool


class Standing(msgspec.Struct, frozen=True):
    """A role; `soon`: it is time to sign it anew."""

    role: str
    version: int
    expires: str
    days: int
    soon: bool
    threshold: int
    keys: list[Signing]


class Held(msgspec.Struct, frozen=True):
    """A bundle that devices may fetch."""

    name: str
    version: str
    digest: str
    target: str
    bytes: int


class Status(msgspec.Struct, frozen=True):
    repository: str
    ok: bool
    bundles: list[Held]
    revoked: list[dict[str, str]]
    roles: list[Standing]
    draft: Draft | None
    reminders: list[str]


def status(folder: Path, at: datetime | None = None) -> Status:
    """Raises UsageError where there is no repository, StorageError where devices would refuse it."""
    layout, at = Layout(folder), at or expiry.now()
    keyring = Keyring(layout.keys)
    now = edition.load(layout, root_rotation.coming(layout))
    standings = [_standing(now, role, keyring, at) for role in (*TOP, *sorted(now.bundles))]
    draft = root_rotation.waiting(layout, keyring)
    reminders = [_reminder(one) for one in standings if one.soon]
    if draft is not None:
        reminders.append(
            f"root {draft.version} waits for {draft.missing} more signatures ({', '.join(draft.waiting)}): "
            f"outstation fleet repository sign-root --key FILE {layout.draft}"
            if draft.missing
            else f"root {draft.version} is signed by enough: outstation fleet repository refresh puts it in force"
        )
    out = [
        {"name": name, "version": version, "day": day}
        for name, part in sorted(now.bundles.items())
        for version, day in sorted(all_revoked(part.signed).items())
    ]
    return Status(str(layout.home), not reminders, _held(now), out, standings, draft, reminders)


def _held(now: Edition) -> list[Held]:
    return [
        Held(told.name, told.version, told.digest, path, file.length)
        for _, part in sorted(now.bundles.items())
        for path, file in sorted(part.signed.targets.items())
        for told in [target_metadata.decode(file.custom)]
    ]


def _standing(now: Edition, role: str, keyring: Keyring, at: datetime) -> Standing:
    part = now.root if role == ROOT else now.part(role)
    delegator = now.root.signed if role in TOP else now.targets.signed
    delegated: Role = delegator.get_delegated_role(role)
    counting = [delegator.get_key(keyid) for keyid in delegated.keyids]
    expires = part.signed.expires
    return Standing(
        role,
        part.signed.version,
        f"{expires:%Y-%m-%dT%H:%M:%SZ}",
        (expires - at).days,
        expiry.soon(role, expires, at),
        delegated.threshold,
        [Signing(keyring.name(key), public_text(key), key.keyid in keyring) for key in counting],
    )


def _reminder(one: Standing) -> str:
    when = f"expires in {one.days} days" if one.days >= 0 else "has expired: devices take nothing"
    if one.role in (SNAPSHOT, TIMESTAMP):
        return f"{one.role} {when}: outstation fleet repository refresh, from cron each day"
    if one.role == ROOT:
        return f"root {when}: outstation fleet repository rotate root makes a new one"
    return f"{one.role} {when}: outstation fleet repository refresh, with the key of {one.role} (--sign-with FILE)"
