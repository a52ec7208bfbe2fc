"""Root rotation: from a draft that waits for signatures to the root in force.

Clients accept a root signed by a threshold of the previous root's keys and of its own. The keys may be on different
machines, to which the draft file is carried. The draft is removed last, so a crash on the way is recovered.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from datetime import datetime
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, Root
from tuf.api.serialization import DeserializationError

from outstation.fleet.repository import edition, expiry, trust
from outstation.fleet.repository.edition import Edition
from outstation.fleet.repository.expiry import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TOP_LEVEL_ROLES
from outstation.fleet.repository.keys import RepositoryKeyring, format_public_key, load_signer
from outstation.fleet.repository.layout import Layout
from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import StorageError, UsageError

_MAX_ROOT_BYTES = 512_000  # clients refuse a larger root


class RootDraft(msgspec.Struct, frozen=True):
    """Root draft: names of keys that have signed and that still may. `signatures_missing` is 0 once it is in force."""

    version: int
    signed_by: list[str]
    may_sign: list[str]
    signatures_missing: int


class SignedDraft(msgspec.Struct, frozen=True):
    """Content of a draft for review by its signer. `roles`: role → public keys as text, of the trust document too."""

    version: int
    signatures: int
    roles: dict[str, list[str]]


def propose(layout: Layout, change: Callable[[Root], None], keyring: RepositoryKeyring, now: datetime) -> RootDraft:
    """Change the waiting draft or a copy of the current root, and sign it with the keys available here.

    With enough signatures it comes into force at once. Its earlier signatures are dropped: its content changed.
    """
    activate_draft(layout, keyring, now)
    current = load_current_root(layout)
    root = deepcopy(_read_draft(layout.draft).signed if layout.draft.exists() else current)
    change(root)
    root.version, root.expires = current.version + 1, now + expiry.lifetime(ROOT)
    draft = Metadata(root)
    for signer in keyring.signers(dict.fromkeys([*current.roles[ROOT].keyids, *root.roles[ROOT].keyids])):
        draft.sign(signer, append=True)
    durable_files.write(layout.draft, draft.to_bytes())
    activate_draft(layout, keyring, now)
    return describe(current, draft, keyring)


def sign(file: Path, key: Path) -> SignedDraft:
    """Add a signature to the draft in `file`, on any machine. Raises UsageError."""
    draft = _read_draft(file)
    draft.sign(load_signer(key), append=True)
    durable_files.write(file, draft.to_bytes())
    root = draft.signed
    roles = {role: [format_public_key(root.keys[kid]) for kid in root.roles[role].keyids] for role in TOP_LEVEL_ROLES}
    return SignedDraft(root.version, len(draft.signatures), {**roles, **trust.list_by_role(root)})


def load_current(layout: Layout, keyring: RepositoryKeyring, now: datetime) -> Edition:
    """Put a sufficiently signed draft in force, and return the edition that clients see."""
    activate_draft(layout, keyring, now)
    return edition.load(layout)


def activate_draft(layout: Layout, keyring: RepositoryKeyring, now: datetime) -> int:
    """Put the draft in force if it has enough signatures. Return its version, 0 if there is none or it still waits.

    Old and new keys of a changed role sign before the new root is written, so clients of either root find a valid
    signature. If the old key is lost, clients retry until the last file is written.
    """
    draft = _load_signed_draft(layout)
    if draft is None:
        return 0
    current = load_current_root(layout)
    if draft.signed.version > current.version:
        next_edition = edition.load(layout, draft.signed)
        roles = (TARGETS, SNAPSHOT, TIMESTAMP)
        changed = {role for role in roles if set(current.roles[role].keyids) != set(draft.signed.roles[role].keyids)}
        if changed:
            edition.write(layout, next_edition, changed, keyring, now, draft.signed)
        durable_files.write(layout.root_path(draft.signed.version), draft.to_bytes())
    durable_files.remove(layout.draft)
    return draft.signed.version


def load_next_root(layout: Layout) -> Root | None:
    """Return the sufficiently signed root that a crash kept from coming into force."""
    draft = _load_signed_draft(layout)
    return draft.signed if draft is not None else None


def load_pending_draft(layout: Layout, keyring: RepositoryKeyring) -> RootDraft | None:
    """Return the waiting draft, if any. A draft already in force does not count."""
    if not layout.draft.exists():
        return None
    current, draft = load_current_root(layout), _read_draft(layout.draft)
    return describe(current, draft, keyring) if draft.signed.version > current.version else None


def load_current_root(layout: Layout) -> Root:
    """Return the root in force. Raises UsageError without a repository, StorageError if it cannot be read."""
    newest = layout.newest_root_path()
    if newest is None:
        raise layout.missing_error()
    try:
        return Metadata[Root].from_bytes(input_files.read_bytes(newest)).signed
    except (OSError, DeserializationError) as error:
        raise StorageError(f"{newest}: cannot be read: {error}; restore it from a backup") from None


def describe(current_root: Root, draft: Metadata[Root], keyring: RepositoryKeyring) -> RootDraft:
    result = draft.signed.get_root_verification_result(current_root, draft.signed_bytes, draft.signatures)
    signed, unsigned = ([keyring.name(key) for key in keys.values()] for keys in (result.signed, result.unsigned))
    return RootDraft(draft.signed.version, signed, unsigned, max(result.first.missing, result.second.missing))


def _load_signed_draft(layout: Layout) -> Metadata[Root] | None:
    if not layout.draft.exists():
        return None
    draft, current = _read_draft(layout.draft), load_current_root(layout)
    if draft.signed.version == current.version:
        # In force already; only the draft file was not removed.
        return draft
    if draft.signed.version != current.version + 1:
        raise UsageError(
            f"{layout.draft}: drafts root {draft.signed.version}, but root {current.version} is in force; delete the "
            "file and repeat the change"
        )
    result = draft.signed.get_root_verification_result(current, draft.signed_bytes, draft.signatures)
    return draft if result else None


def _read_draft(file: Path) -> Metadata[Root]:
    try:
        draft = Metadata[Root].from_bytes(input_files.read_input(file, _MAX_ROOT_BYTES))
    except DeserializationError as error:
        raise UsageError(f"{file}: is not a root draft: {error}") from None
    if not isinstance(draft.signed, Root):
        raise UsageError(f"{file}: holds metadata of type {draft.signed.type}, but a root is required")
    return draft
