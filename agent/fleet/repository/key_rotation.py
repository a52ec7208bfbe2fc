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
from agent.fleet.repository.expiry import TARGETS, TOP
from agent.fleet.repository.keys import Keyring, require_one, tuf_key
from agent.fleet.repository.layout import Layout
from agent.fleet.repository.root_rotation import Draft
from agent.toml_files import suggestion
from agent.wire import keys


class Rotated(msgspec.Struct, frozen=True):
    """Names of keys; `draft` is the root that says so, None for a bundle's key, which targets says."""

    role: str
    old: str
    new: str
    draft: Draft | None

    @property
    def done(self) -> bool:
        return self.draft is None or self.draft.missing == 0


def rotate(
    folder: Path,
    role: str,
    *,
    old: str | None = None,
    new: str | None = None,
    sign_with: Sequence[Path] = (),
    at: datetime | None = None,
) -> Rotated:
    """Replace the key `old` of `role`, one of the four or a bundle's name, by `new` (public), or by one that is made.

    A key of the four is said by the root: where its keys are not here, a draft waits for them. Raises UsageError.
    """
    layout, at = Layout(folder), at or expiry.now()
    new_key = tuf_key(keys.load_public(new)) if new is not None else None
    with layout.locked():
        keyring = Keyring(layout.keys, sign_with)
        if role in TOP:
            return _rotate_top(layout, role, old, new_key, keyring, at)
        return _rotate_bundle(layout, role, old, new_key, keyring, at)


def _rotate_top(layout: Layout, role: str, old: str | None, new: Key | None, keyring: Keyring, at: datetime) -> Rotated:
    out, added = "", ""

    def change(root: Root) -> None:
        nonlocal out, added
        candidates = {keyid: keyring.name(root.keys[keyid]) for keyid in root.roles[role].keyids}
        leaving = require_one(candidates, old, f"{role} has {len(candidates)} keys")
        coming = _added(new, set(candidates), role, keyring)
        root.add_key(coming, role)
        root.revoke_key(leaving, role)
        out, added = candidates[leaving], keyring.name(coming)

    draft = root_rotation.propose(layout, change, keyring, at)
    return Rotated(role, out, added, draft)


def _rotate_bundle(
    layout: Layout, role: str, old: str | None, new: Key | None, keyring: Keyring, at: datetime
) -> Rotated:
    now = root_rotation.current(layout, keyring, at)
    if role not in now.bundles:
        known = [*TOP, *now.bundles]
        raise UsageError(f"no role {role!r} in the repository{suggestion(role, known)}; there are {', '.join(known)}")
    _require_targets(now, role, keyring)
    targets = now.targets.signed
    keyids = targets.get_delegated_role(role).keyids
    candidates = {keyid: keyring.name(targets.get_key(keyid)) for keyid in keyids}
    out = require_one(candidates, old, f"{role} has {len(candidates)} keys")
    added = _added(new, set(keyids), f"bundle-{role}", keyring)
    targets.add_key(added, role)
    targets.revoke_key(out, role)
    edition.write(layout, now, {role, TARGETS}, keyring, at)
    return Rotated(role, candidates[out], keyring.name(added), None)


def _require_targets(now: Edition, role: str, keyring: Keyring) -> None:
    """Before a key is made."""
    if not keyring.signers(now.keyids(TARGETS)):
        raise UsageError(f"{keyring.folder}: targets says whose key counts for {role}; name its key with --sign-with")


def _added(new: Key | None, there: set[str], name: str, keyring: Keyring) -> Key:
    if new is not None and new.keyid in there:
        raise UsageError(f"the key is one of {name} already; give another one")
    return new if new is not None else keyring.make(name)
