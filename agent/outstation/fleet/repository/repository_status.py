"""Status of the repository: published bundles, keys of each role, and expiry."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import msgspec
from tuf.api.metadata import Role

from outstation.fleet.repository import edition, expiry, root_rotation
from outstation.fleet.repository.edition import Edition
from outstation.fleet.repository.expiry import ROOT, SNAPSHOT, TIMESTAMP, TOP_LEVEL_ROLES
from outstation.fleet.repository.keys import RepositoryKeyring, format_public_key
from outstation.fleet.repository.layout import Layout
from outstation.fleet.repository.revoke import get_revoked_versions
from outstation.fleet.repository.root_rotation import RootDraft
from outstation.protocol.wire import target_metadata


class SigningKeyStatus(msgspec.Struct, frozen=True):
    """Key of a role. `has_private_key`: the private key is in the folder of keys."""

    name: str
    key: str
    has_private_key: bool


class RoleStatus(msgspec.Struct, frozen=True):
    """Role. `expires_soon`: it is time to sign it again."""

    role: str
    version: int
    expires: str
    days_left: int
    expires_soon: bool
    threshold: int
    keys: list[SigningKeyStatus]


class AvailableBundle(msgspec.Struct, frozen=True):
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


def read(folder: Path, now: datetime | None = None) -> RepositoryStatus:
    """Return the status. Raises UsageError without a repository, StorageError if devices would refuse it."""
    layout, now = Layout(folder), now or expiry.now()
    keyring = RepositoryKeyring(layout.keys)
    current = edition.load(layout, root_rotation.load_next_root(layout))
    roles = [_role_status(current, role, keyring, now) for role in (*TOP_LEVEL_ROLES, *sorted(current.bundles))]
    draft = root_rotation.load_pending_draft(layout, keyring)
    reminders = [_format_reminder(role) for role in roles if role.expires_soon]
    if any(layout.initial_root_keys.glob("root-*.key")):
        place = layout.initial_root_keys
        reminders.append(
            f"the root keys are outside the fleet's folder, but still on this machine: move each key in {place} to an "
            "offline medium of its own"
        )
    if draft is not None:
        reminders.append(
            f"root {draft.version} needs {draft.signatures_missing} more signatures ({', '.join(draft.may_sign)}): "
            f"outstation fleet repository sign-root --sign-with FILE {layout.draft}"
            if draft.signatures_missing
            else f"root {draft.version} has enough signatures; put it in force: outstation fleet repository refresh"
        )
    revoked = [
        {"name": name, "version": version, "day": day}
        for name, part in sorted(current.bundles.items())
        for version, day in sorted(get_revoked_versions(part.signed).items())
    ]
    bundles = [
        AvailableBundle(bundle.name, bundle.version, bundle.digest, path, file.length)
        for _, part in sorted(current.bundles.items())
        for path, file in sorted(part.signed.targets.items())
        for bundle in [target_metadata.decode(file.custom)]
    ]
    return RepositoryStatus(str(layout.home), not reminders, bundles, revoked, roles, draft, reminders)


def _role_status(current: Edition, role: str, keyring: RepositoryKeyring, now: datetime) -> RoleStatus:
    part = current.root if role == ROOT else current.get_metadata(role)
    delegator = current.root.signed if role in TOP_LEVEL_ROLES else current.targets.signed
    delegated: Role = delegator.get_delegated_role(role)
    counting = [delegator.get_key(keyid) for keyid in delegated.keyids]
    expires = part.signed.expires
    return RoleStatus(
        role,
        part.signed.version,
        f"{expires:%Y-%m-%dT%H:%M:%SZ}",
        (expires - now).days,
        expiry.is_expiring_soon(role, expires, now),
        delegated.threshold,
        [SigningKeyStatus(keyring.name(key), format_public_key(key), key.keyid in keyring) for key in counting],
    )


def _format_reminder(status: RoleStatus) -> str:
    role = status.role
    when = f"expires in {status.days_left} days" if status.days_left >= 0 else "has expired, so devices install nothing"
    if role in (SNAPSHOT, TIMESTAMP):
        return f"{role} {when}; run daily: outstation fleet repository refresh"
    if role == ROOT:
        return f"root {when}; renew it: outstation fleet repository rotate root --new PUB --sign-with FILE"
    return f"{role} {when}; renew it: outstation fleet repository refresh --sign-with FILE, with the key of {role}"
