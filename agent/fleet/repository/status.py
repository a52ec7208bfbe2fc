"""What is in the repository, whose keys count, and what expires when."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import msgspec
from tuf.api.metadata import Role

from agent.fleet.repository import edition, expiry, root_rotation
from agent.fleet.repository.edition import Edition
from agent.fleet.repository.expiry import ROOT, SNAPSHOT, TIMESTAMP, TOP_LEVEL_ROLES
from agent.fleet.repository.keys import RepositoryKeyring, format_public_key
from agent.fleet.repository.layout import Layout
from agent.fleet.repository.revoke import get_revoked_versions
from agent.fleet.repository.root_rotation import RootDraft
from agent.model.bundle import target_metadata


class SigningKeyStatus(msgspec.Struct, frozen=True):
    """A key that counts; `here`: its private half is in the folder of keys."""

    name: str
    key: str
    has_private_key: bool


class RoleStatus(msgspec.Struct, frozen=True):
    """A role; `soon`: it is time to sign it anew."""

    role: str
    version: int
    expires: str
    days_left: int
    expires_soon: bool
    threshold: int
    keys: list[SigningKeyStatus]


class AvailableBundle(msgspec.Struct, frozen=True):
    """A bundle that devices may fetch."""

    name: str
    version: str
    digest: str
    target: str
    bytes: int


class RepositoryStatus(msgspec.Struct, frozen=True):
    repository: str
    ok: bool
    bundles: list[AvailableBundle]
    revoked: list[dict[str, str]]
    roles: list[RoleStatus]
    draft: RootDraft | None
    reminders: list[str]


def read(folder: Path, current_time: datetime | None = None) -> RepositoryStatus:
    """Raises UsageError where there is no repository, StorageError where devices would refuse it."""
    layout, current_time = Layout(folder), current_time or expiry.now()
    keyring = RepositoryKeyring(layout.keys)
    now = edition.load(layout, root_rotation.load_next_root(layout))
    standings = [_role_status(now, role, keyring, current_time) for role in (*TOP_LEVEL_ROLES, *sorted(now.bundles))]
    draft = root_rotation.load_pending_draft(layout, keyring)
    reminders = [_format_reminder(one) for one in standings if one.expires_soon]
    if draft is not None:
        reminders.append(
            f"root {draft.version} waits for {draft.signatures_missing} more signatures ({', '.join(draft.may_sign)}): "
            f"outstation fleet repository sign-root --key FILE {layout.draft}"
            if draft.signatures_missing
            else f"root {draft.version} is signed by enough: outstation fleet repository refresh puts it in force"
        )
    out = [
        {"name": name, "version": version, "day": day}
        for name, part in sorted(now.bundles.items())
        for version, day in sorted(get_revoked_versions(part.signed).items())
    ]
    return RepositoryStatus(str(layout.home), not reminders, _list_bundles(now), out, standings, draft, reminders)


def _list_bundles(current: Edition) -> list[AvailableBundle]:
    return [
        AvailableBundle(told.name, told.version, told.digest, path, file.length)
        for _, part in sorted(current.bundles.items())
        for path, file in sorted(part.signed.targets.items())
        for told in [target_metadata.decode(file.custom)]
    ]


def _role_status(current: Edition, role: str, keyring: RepositoryKeyring, current_time: datetime) -> RoleStatus:
    part = current.root if role == ROOT else current.get_metadata(role)
    delegator = current.root.signed if role in TOP_LEVEL_ROLES else current.targets.signed
    delegated: Role = delegator.get_delegated_role(role)
    counting = [delegator.get_key(keyid) for keyid in delegated.keyids]
    expires = part.signed.expires
    return RoleStatus(
        role,
        part.signed.version,
        f"{expires:%Y-%m-%dT%H:%M:%SZ}",
        (expires - current_time).days,
        expiry.is_expiring_soon(role, expires, current_time),
        delegated.threshold,
        [SigningKeyStatus(keyring.name(key), format_public_key(key), key.keyid in keyring) for key in counting],
    )


def _format_reminder(role_status: RoleStatus) -> str:
    when = (
        f"expires in {role_status.days_left} days"
        if role_status.days_left >= 0
        else "has expired: devices take nothing"
    )
    if role_status.role in (SNAPSHOT, TIMESTAMP):
        return f"{role_status.role} {when}: outstation fleet repository refresh, from cron each day"
    if role_status.role == ROOT:
        return f"root {when}: outstation fleet repository rotate root makes a new one"
    return f"{role_status.role} {when}: outstation fleet repository refresh, with the key of {role_status.role} (--sign-with FILE)"
