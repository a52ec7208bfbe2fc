"""The next root, from the draft that waits for signatures to the version that is in force.

A root is accepted that enough keys of the root before have signed, and enough of its own. They may lie on different
machines: the draft is a file that is carried to them. It is removed last, so that a crash on the way is made good.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from datetime import datetime
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, Root
from tuf.api.serialization import DeserializationError

from agent import durable_files
from agent.errors import StorageError, UsageError
from agent.fleet.repository import edition, expiry
from agent.fleet.repository.edition import Edition
from agent.fleet.repository.expiry import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TOP_LEVEL_ROLES
from agent.fleet.repository.keys import RepositoryKeyring, format_public_key, load_signer
from agent.fleet.repository.layout import Layout

_MAX_ROOT_BYTES = 512_000  # clients take no larger root


class RootDraft(msgspec.Struct, frozen=True):
    """Names of keys that have signed and of those that may; `missing` signatures are needed, 0 where it is in force."""

    version: int
    signed_by: list[str]
    may_sign: list[str]
    signatures_missing: int


class SignedDraft(msgspec.Struct, frozen=True):
    """What a draft says, for whoever signs it far from the repository: `roles` are public keys, as text."""

    version: int
    signatures: int
    roles: dict[str, list[str]]


def propose(
    layout: Layout, change: Callable[[Root], None], keyring: RepositoryKeyring, current_time: datetime
) -> RootDraft:
    """Make the next root of the one in force, or of the draft that waits, and sign it with what keys are here.

    It is in force at once where that is enough. What the draft was signed with before is gone: that was another text.
    """
    activate_draft(layout, keyring, current_time)
    before = _load_current_root(layout)
    root = deepcopy(_read_draft(layout.draft).signed if layout.draft.exists() else before)
    change(root)
    root.version, root.expires = before.version + 1, current_time + expiry.lifetime(ROOT)
    draft = Metadata(root)
    for signer in keyring.signers(dict.fromkeys([*before.roles[ROOT].keyids, *root.roles[ROOT].keyids])):
        draft.sign(signer, append=True)
    durable_files.write(layout.draft, draft.to_bytes())
    activate_draft(layout, keyring, current_time)
    return describe(before, draft, keyring)


def sign(file: Path, key: Path) -> SignedDraft:
    """Add a signature to the draft in `file`, wherever it is. Raises UsageError."""
    draft = _read_draft(file)
    draft.sign(load_signer(key), append=True)
    durable_files.write(file, draft.to_bytes())
    root = draft.signed
    roles = {
        role: [format_public_key(root.keys[keyid]) for keyid in root.roles[role].keyids] for role in TOP_LEVEL_ROLES
    }
    return SignedDraft(root.version, len(draft.signatures), roles)


def load_current(layout: Layout, keyring: RepositoryKeyring, current_time: datetime) -> Edition:
    """The edition that clients see, after a draft that is signed by enough came into force."""
    activate_draft(layout, keyring, current_time)
    return edition.load(layout)


def activate_draft(layout: Layout, keyring: RepositoryKeyring, current_time: datetime) -> int:
    """Put the draft in force where enough have signed it; its version, 0 where there is none or it still waits.

    Roles that get another key are signed by both before the new root is there: clients on either side find a signature
    that counts. Where the old key is lost there is a moment, until the last file is written, in which they wait.
    """
    draft = _load_signed_draft(layout)
    if draft is None:
        return 0
    before = _load_current_root(layout)
    if draft.signed.version > before.version:
        now = edition.load(layout, draft.signed)
        others = (TARGETS, SNAPSHOT, TIMESTAMP)
        changed = {role for role in others if set(before.roles[role].keyids) != set(draft.signed.roles[role].keyids)}
        if changed:
            edition.write(layout, now, changed, keyring, current_time, draft.signed)
        durable_files.write(layout.root_path(draft.signed.version), draft.to_bytes())
    durable_files.remove(layout.draft)
    return draft.signed.version


def load_next_root(layout: Layout) -> Root | None:
    """The root that is about to come into force, where a crash left it half way."""
    draft = _load_signed_draft(layout)
    return draft.signed if draft is not None else None


def load_pending_draft(layout: Layout, keyring: RepositoryKeyring) -> RootDraft | None:
    """The draft that waits, where there is one; one that came into force before a crash does not."""
    if not layout.draft.exists():
        return None
    before, draft = _load_current_root(layout), _read_draft(layout.draft)
    return describe(before, draft, keyring) if draft.signed.version > before.version else None


def describe(current_root: Root, draft: Metadata[Root], keyring: RepositoryKeyring) -> RootDraft:
    result = draft.signed.get_root_verification_result(current_root, draft.signed_bytes, draft.signatures)
    signed, unsigned = ([keyring.name(key) for key in keys.values()] for keys in (result.signed, result.unsigned))
    return RootDraft(draft.signed.version, signed, unsigned, max(result.first.missing, result.second.missing))


def _load_signed_draft(layout: Layout) -> Metadata[Root] | None:
    if not layout.draft.exists():
        return None
    draft, before = _read_draft(layout.draft), _load_current_root(layout)
    if draft.signed.version == before.version:
        # The root is there already; only its draft was not removed.
        return draft
    if draft.signed.version != before.version + 1:
        raise UsageError(
            f"{layout.draft}: is a draft of root {draft.signed.version}, and root {before.version} is in force; "
            "delete it, and make the change again"
        )
    result = draft.signed.get_root_verification_result(before, draft.signed_bytes, draft.signatures)
    return draft if result else None


def _load_current_root(layout: Layout) -> Root:
    newest = layout.newest_root_path()
    if newest is None:
        raise layout.missing_error()
    try:
        return Metadata[Root].from_bytes(newest.read_bytes()).signed
    except (OSError, DeserializationError) as error:
        raise StorageError(f"{newest}: cannot be read: {error}; put it back from a backup") from None


def _read_draft(file: Path) -> Metadata[Root]:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_ROOT_BYTES + 1)
        draft = Metadata[Root].from_bytes(data[:_MAX_ROOT_BYTES])
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
    except DeserializationError as error:
        raise UsageError(f"{file}: is no draft of a root: {error}") from None
    if not isinstance(draft.signed, Root):
        raise UsageError(f"{file}: holds metadata of type {draft.signed.type}, a root is needed")
    return draft
