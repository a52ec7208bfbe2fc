"""Another key for a role: the old one counts no more from the next edition on. So a key is revoked, too."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from securesystemslib.signer import Key
from tuf.api.metadata import Root

from agent.errors import UsageError
from agent.fleet.repository import edition, expiry, root_rotation
from agent.fleet.repository.edition import Edition
from agent.fleet.repository.expiry import TARGETS, TOP_LEVEL_ROLES
from agent.fleet.repository.keys import RepositoryKeyring, select_key, to_tuf_key
from agent.fleet.repository.layout import Layout
from agent.fleet.repository.root_rotation import RootDraft
from agent.toml_files import did_you_mean
from agent.wire import keys


class RotationResult(msgspec.Struct, frozen=True):
    """Names of keys; `draft` is the root that says so, None for a bundle's key, which targets says."""

    role: str
    old: str
    new: str
    draft: RootDraft | None

    @property
    def is_complete(self) -> bool:
        return self.draft is None or self.draft.signatures_missing == 0


def rotate(
    folder: Path,
    role: str,
    *,
    old: str | None = None,
    new: str | None = None,
    sign_with: Sequence[Path] = (),
    current_time: datetime | None = None,
) -> RotationResult:
    """Replace the key `old` of `role`, one of the four or a bundle's name, by `new` (public), or by one that is made.

    A key of the four is said by the root: where its keys are not here, a draft waits for them. Raises UsageError.
    """
    layout, current_time = Layout(folder), current_time or expiry.now()
    new_key = to_tuf_key(keys.load_public(new)) if new is not None else None
    with layout.locked():
        keyring = RepositoryKeyring(layout.keys, sign_with)
        if role in TOP_LEVEL_ROLES:
            return _rotate_top_level(layout, role, old, new_key, keyring, current_time)
        return _rotate_bundle(layout, role, old, new_key, keyring, current_time)


def _rotate_top_level(
    layout: Layout, role: str, old: str | None, new: Key | None, keyring: RepositoryKeyring, current_time: datetime
) -> RotationResult:
    out, added = "", ""

    def change(root: Root) -> None:
        nonlocal out, added
        candidates = {keyid: keyring.name(root.keys[keyid]) for keyid in root.roles[role].keyids}
        leaving = select_key(candidates, old, f"{role} has {len(candidates)} keys")
        coming = _resolve_new_key(new, set(candidates), role, keyring)
        root.add_key(coming, role)
        root.revoke_key(leaving, role)
        out, added = candidates[leaving], keyring.name(coming)

    draft = root_rotation.propose(layout, change, keyring, current_time)
    return RotationResult(role, out, added, draft)


def _rotate_bundle(
    layout: Layout, role: str, old: str | None, new: Key | None, keyring: RepositoryKeyring, current_time: datetime
) -> RotationResult:
    now = root_rotation.load_current(layout, keyring, current_time)
    if role not in now.bundles:
        known = [*TOP_LEVEL_ROLES, *now.bundles]
        raise UsageError(f"no role {role!r} in the repository{did_you_mean(role, known)}; there are {', '.join(known)}")
    _require_targets_key(now, role, keyring)
    targets = now.targets.signed
    keyids = targets.get_delegated_role(role).keyids
    candidates = {keyid: keyring.name(targets.get_key(keyid)) for keyid in keyids}
    out = select_key(candidates, old, f"{role} has {len(candidates)} keys")
    added = _resolve_new_key(new, set(keyids), f"bundle-{role}", keyring)
    targets.add_key(added, role)
    targets.revoke_key(out, role)
    edition.write(layout, now, {role, TARGETS}, keyring, current_time)
    return RotationResult(role, candidates[out], keyring.name(added), None)


def _require_targets_key(current: Edition, role: str, keyring: RepositoryKeyring) -> None:
    """Before a key is made."""
    if not keyring.signers(current.keyids(TARGETS)):
        raise UsageError(f"{keyring.folder}: targets says whose key counts for {role}; name its key with --sign-with")


def _resolve_new_key(new: Key | None, current_keyids: set[str], name: str, keyring: RepositoryKeyring) -> Key:
    if new is not None and new.keyid in current_keyids:
        raise UsageError(f"the key is one of {name} already; give another one")
    return new if new is not None else keyring.generate_next(name)
