"""Trust document in the repository's root: its keys by role, and edits of them. No I/O.

The document is a member of the root, so that the root's threshold, versions and drafts apply to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from tuf.api.metadata import Root

from outstation.foundation import decoders
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import StorageError, UsageError
from outstation.protocol.wire import keys
from outstation.protocol.wire.target_metadata import MEMBER
from outstation.protocol.wire.trust import COLLECTOR, ENCRYPTION, MAX_KEYS, ROLES, Trust, TrustedKey

TrustEdit = Callable[[list[TrustedKey]], list[TrustedKey]]


def read_keys(root: Root) -> list[TrustedKey] | None:
    """Return the keys of the trust document, None if the root has none. Raises StorageError."""
    member = root.unrecognized_fields.get(MEMBER)
    try:
        return None if member is None else decoders.convert(member, Trust).keys
    except (msgspec.ValidationError, ValueError) as error:
        raise StorageError(f"root {root.version}: its trust document is malformed: {error}; restore a backup") from None


def list_by_role(root: Root) -> dict[str, list[str]]:
    """Return role → public keys as text; empty if the root has no trust document."""
    listed = read_keys(root)
    return {role: [entry.key for entry in listed if entry.role == role] for role in ROLES} if listed else {}


def apply_edit(root: Root, edit: TrustEdit, first: Sequence[TrustedKey]) -> None:
    """Edit the root's document, which begins with the keys `first`. Raises UsageError."""
    current = read_keys(root)
    changed = edit(list(first) if current is None else current)
    if len(changed) > MAX_KEYS:
        raise UsageError(f"{len(changed)} keys: a trust document has at most {MAX_KEYS}; revoke some")
    try:
        document = Trust(changed)
    except ValueError as error:
        raise UsageError(f"{error}, which would lock the fleet out; add another key first") from None
    root.unrecognized_fields[MEMBER] = msgspec.to_builtins(document)


def add_key(role: str, text: str) -> TrustEdit:
    """Return the edit that adds a public key, as text or in a file, with a role. Raises UsageError."""
    if role not in ROLES:
        raise UsageError(f"no role {role!r}{did_you_mean(role, ROLES)}; the roles are {', '.join(ROLES)}")
    key = keys.load_public(text).text

    def edit(listed: list[TrustedKey]) -> list[TrustedKey]:
        for entry in listed:
            # A key that commands has one role.
            if entry.key == key and (entry.role == COLLECTOR) == (role == COLLECTOR):
                raise UsageError(f"{key} has the role {entry.role} already; revoke it first to change its role")
        return [*listed, TrustedKey(key, role)]

    return edit


def replace_encryption_key(text: str) -> TrustEdit:
    """Return the edit after which devices seal their messages to this key."""

    def edit(listed: list[TrustedKey]) -> list[TrustedKey]:
        return [*(entry for entry in listed if entry.role != ENCRYPTION), TrustedKey(text, ENCRYPTION)]

    return edit


def revoke_key(text: str) -> TrustEdit:
    """Return the edit that removes a public key or thumbprint from all its roles; the last encryption key stays."""

    def edit(listed: list[TrustedKey]) -> list[TrustedKey]:
        _require_listed(listed, text)
        left = [entry for entry in listed if not _is_named(entry, text)]
        if _has_encryption(listed) and not _has_encryption(left):
            raise UsageError(
                f"{text}: the only encryption key; without one, devices that encrypt would send nothing. Replace it: "
                "outstation fleet keys rotate-encryption"
            )
        return left

    return edit


def reset_counter(text: str, counter: int) -> TrustEdit:
    """Return the edit after which devices replace a key's counter by `counter` where it lies in the future."""

    def edit(listed: list[TrustedKey]) -> list[TrustedKey]:
        _require_listed(listed, text)
        return [msgspec.structs.replace(key, counter=counter) if _is_named(key, text) else key for key in listed]

    return edit


def _has_encryption(listed: list[TrustedKey]) -> bool:
    return any(entry.role == ENCRYPTION for entry in listed)


def _is_named(entry: TrustedKey, text: str) -> bool:
    return text in (entry.key, entry.kid)


def _require_listed(listed: list[TrustedKey], text: str) -> None:
    if not any(_is_named(entry, text) for entry in listed):
        known = ", ".join(f"{entry.key} ({entry.role})" for entry in listed)
        raise UsageError(f"{text}: no such key in the trust document, which has {known}")
