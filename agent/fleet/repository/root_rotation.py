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
from agent.fleet.repository.expiry import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TOP
from agent.fleet.repository.keys import Keyring, public_text, signer_in
from agent.fleet.repository.layout import Layout

_LARGEST = 512_000  # clients take no larger root


class Draft(msgspec.Struct, frozen=True):
    """Names of keys that have signed and of those that may; `missing` signatures are needed, 0 where it is in force."""

    version: int
    signed: list[str]
    waiting: list[str]
    missing: int


class Signed(msgspec.Struct, frozen=True):
    """What a draft says, for whoever signs it far from the repository: `roles` are public keys, as text."""

    version: int
    signatures: int
    roles: dict[str, list[str]]


def propose(layout: Layout, change: Callable[[Root], None], keyring: Keyring, at: datetime) -> Draft:
    """Make the next root of the one in force, or of the draft that waits, and sign it with what keys are here.

    It is in force at once where that is enough. What the draft was signed with before is gone: that was another text.
    """
    finish(layout, keyring, at)
    before = _current(layout)
    root = deepcopy(_read_draft(layout.draft).signed if layout.draft.exists() else before)
    change(root)
    root.version, root.expires = before.version + 1, at + expiry.life(ROOT)
    draft = Metadata(root)
    for signer in keyring.signers(dict.fromkeys([*before.roles[ROOT].keyids, *root.roles[ROOT].keyids])):
        draft.sign(signer, append=True)
    durable_files.write(layout.draft, draft.to_bytes())
    finish(layout, keyring, at)
    return describe(before, draft, keyring)


def sign(file: Path, key: Path) -> Signed:
    """Add a signature to the draft in `file`, wherever it is. Raises UsageError."""
    draft = _read_draft(file)
    draft.sign(signer_in(key), append=True)
    durable_files.write(file, draft.to_bytes())
    root = draft.signed
    roles = {role: [public_text(root.keys[keyid]) for keyid in root.roles[role].keyids] for role in TOP}
    return Signed(root.version, len(draft.signatures), roles)


def current(layout: Layout, keyring: Keyring, at: datetime) -> Edition:
    """The edition that clients see, after a draft that is signed by enough came into force."""
    finish(layout, keyring, at)
    return edition.load(layout)


def finish(layout: Layout, keyring: Keyring, at: datetime) -> int:
    """Put the draft in force where enough have signed it; its version, 0 where there is none or it still waits.

    Roles that get another key are signed by both before the new root is there: clients on either side find a signature
    that counts. Where the old key is lost there is a moment, until the last file is written, in which they wait.
    """
    draft = _complete(layout)
    if draft is None:
        return 0
    before = _current(layout)
    if draft.signed.version > before.version:
        now = edition.load(layout, draft.signed)
        others = (TARGETS, SNAPSHOT, TIMESTAMP)
        changed = {role for role in others if set(before.roles[role].keyids) != set(draft.signed.roles[role].keyids)}
        if changed:
            edition.write(layout, now, changed, keyring, at, draft.signed)
        durable_files.write(layout.root(draft.signed.version), draft.to_bytes())
    durable_files.remove(layout.draft)
    return draft.signed.version


def coming(layout: Layout) -> Root | None:
    """The root that is about to come into force, where a crash left it half way."""
    draft = _complete(layout)
    return draft.signed if draft is not None else None


def waiting(layout: Layout, keyring: Keyring) -> Draft | None:
    """The draft that waits, where there is one; one that came into force before a crash does not."""
    if not layout.draft.exists():
        return None
    before, draft = _current(layout), _read_draft(layout.draft)
    return describe(before, draft, keyring) if draft.signed.version > before.version else None


def describe(before: Root, draft: Metadata[Root], keyring: Keyring) -> Draft:
    result = draft.signed.get_root_verification_result(before, draft.signed_bytes, draft.signatures)
    signed, unsigned = ([keyring.name(key) for key in keys.values()] for keys in (result.signed, result.unsigned))
    return Draft(draft.signed.version, signed, unsigned, max(result.first.missing, result.second.missing))


def _complete(layout: Layout) -> Metadata[Root] | None:
    if not layout.draft.exists():
        return None
    draft, before = _read_draft(layout.draft), _current(layout)
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


def _current(layout: Layout) -> Root:
    newest = layout.newest_root()
    if newest is None:
        raise layout.missing()
    try:
        return Metadata[Root].from_bytes(newest.read_bytes()).signed
    except (OSError, DeserializationError) as error:
        raise StorageError(f"{newest}: cannot be read: {error}; put it back from a backup") from None


def _read_draft(file: Path) -> Metadata[Root]:
    try:
        with file.open("rb") as opened:
            data = opened.read(_LARGEST + 1)
        draft = Metadata[Root].from_bytes(data[:_LARGEST])
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
    except DeserializationError as error:
        raise UsageError(f"{file}: is no draft of a root: {error}") from None
    if not isinstance(draft.signed, Root):
        raise UsageError(f"{file}: holds metadata of type {draft.signed.type}, a root is needed")
    return draft
