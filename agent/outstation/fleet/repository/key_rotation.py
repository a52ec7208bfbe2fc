"""Key rotation of a role. From the next edition on, the old key no longer counts; revocation works the same way."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from securesystemslib.signer import Key
from tuf.api.metadata import Root

from outstation.fleet.repository import edition, expiry, root_rotation
from outstation.fleet.repository.expiry import ROOT, TARGETS, TOP_LEVEL_ROLES
from outstation.fleet.repository.keys import RepositoryKeyring, select_key, to_tuf_key
from outstation.fleet.repository.layout import Layout
from outstation.fleet.repository.root_rotation import RootDraft
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import keys


class RotationResult(msgspec.Struct, frozen=True):
    """Names of the old and new key. `draft` is the next root, None for a bundle's key, which targets lists."""

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
    now: datetime | None = None,
) -> RotationResult:
    """Replace key `old` of `role`, a top-level role or a bundle's name, by the public key `new` or a generated key.

    Root lists the keys of top-level roles: if too few root keys are here, a draft waits for signatures. Raises
    UsageError.
    """
    layout, now = Layout(folder), now or expiry.now()
    new_key = to_tuf_key(keys.load_public(new)) if new is not None else None
    with layout.locked():
        keyring = RepositoryKeyring(layout.keys, sign_with)
        if role in TOP_LEVEL_ROLES:
            return _rotate_top_level(layout, role, old, new_key, keyring, now)
        return _rotate_bundle(layout, role, old, new_key, keyring, now)


def _rotate_top_level(
    layout: Layout, role: str, old: str | None, new: Key | None, keyring: RepositoryKeyring, now: datetime
) -> RotationResult:
    old_name, new_name = "", ""

    def change(root: Root) -> None:
        nonlocal old_name, new_name
        candidates = {keyid: keyring.name(root.keys[keyid]) for keyid in root.roles[role].keyids}
        old_keyid = select_key(candidates, old, f"{role} has {len(candidates)} keys")
        is_here = any((keyring.folder / f"{name}.key").exists() for name in candidates.values())
        if role == ROOT and new is None and not is_here:
            raise UsageError(
                "no root key is in the fleet's folder, and a new one does not belong there either: make it on its "
                "medium with `outstation model keygen`, and give its public half with --new"
            )
        new_key = _resolve_new_key(new, set(candidates), role, keyring)
        root.add_key(new_key, role)
        root.revoke_key(old_keyid, role)
        old_name, new_name = candidates[old_keyid], keyring.name(new_key)

    draft = root_rotation.propose(layout, change, keyring, now)
    return RotationResult(role, old_name, new_name, draft)


def _rotate_bundle(
    layout: Layout, role: str, old: str | None, new: Key | None, keyring: RepositoryKeyring, now: datetime
) -> RotationResult:
    current = root_rotation.load_current(layout, keyring, now)
    if role not in current.bundles:
        known = [*TOP_LEVEL_ROLES, *current.bundles]
        hint = f"{did_you_mean(role, known)}; the roles are {', '.join(known)}"
        raise UsageError(f"no role {role!r} in the repository{hint}")
    if not keyring.signers(current.keyids(TARGETS)):
        raise UsageError(
            f"{keyring.folder}: targets lists the keys of {role}, and its key is not here; use --sign-with"
        )
    targets = current.targets.signed
    keyids = targets.get_delegated_role(role).keyids
    candidates = {keyid: keyring.name(targets.get_key(keyid)) for keyid in keyids}
    old_keyid = select_key(candidates, old, f"{role} has {len(candidates)} keys")
    new_key = _resolve_new_key(new, set(keyids), f"bundle-{role}", keyring)
    targets.add_key(new_key, role)
    targets.revoke_key(old_keyid, role)
    edition.write(layout, current, {role, TARGETS}, keyring, now)
    return RotationResult(role, candidates[old_keyid], keyring.name(new_key), None)


def _resolve_new_key(new: Key | None, current_keyids: set[str], name: str, keyring: RepositoryKeyring) -> Key:
    if new is not None and new.keyid in current_keyids:
        raise UsageError(f"--new: this key is a key of {name} already; give a different one")
    return new if new is not None else keyring.generate_next(name)
