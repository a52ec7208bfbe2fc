"""Versions of signed metadata under which this device never goes again, kept in the store and not beside the metadata.

Rules (TUF 5.3.5 to 5.3.11, 5.4.3, 5.5.5, 5.6.4):
- a role's version never falls while every key that was in force with the floor is in force still
- once one of them is revoked, the role's versions start anew: what a thief of the key counted up to harms no longer
- root's versions never start anew: its chain of signatures from the first root is what revokes keys
- another first root, which only who may change the device's config can give, is another repository
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from agent.errors import FetchFailed

if TYPE_CHECKING:
    # The child that fetches has no business with the store.
    from agent.device.store.store import Store
    from agent.device.store.transaction import Transaction

_META_KEY = "update floors"
ROOT_ROLE = "root"
ROLLBACK_ERROR = "BadVersionNumberError"


class VersionFloor(msgspec.Struct, frozen=True):
    """The last version of a role, and the ids of the keys that might sign it then."""

    version: int
    keys: list[str]


class VersionFloors(msgspec.Struct, frozen=True):
    """By role; `anchor` is the SHA-256 of the first root. `expires_s`: when the last metadata is too old, epoch s."""

    anchor: str = ""
    roles: dict[str, VersionFloor] = {}
    expires_s: float | None = None

    def for_anchor(self, anchor: str) -> VersionFloors:
        """Those of one repository."""
        return self if anchor == self.anchor else VersionFloors(anchor)


def raise_floors(floors: VersionFloors, observed: Mapping[str, VersionFloor], expires_s: float | None) -> VersionFloors:
    """With what was seen now. Raises FetchFailed where a version is below its floor."""
    for role, found in observed.items():
        before = floors.roles.get(role)
        if before is not None and found.version < before.version and _is_enforced(role, before, found):
            raise FetchFailed(
                ROLLBACK_ERROR,
                f"{role} is of version {found.version}, this device has seen {before.version}: the repository, or "
                "somebody on the way to it, shows an older state",
            )
    return VersionFloors(
        floors.anchor, {**floors.roles, **observed}, floors.expires_s if expires_s is None else expires_s
    )


def load(store: Store) -> VersionFloors:
    """Raises StorageError."""
    text = store.get_meta(_META_KEY, "")
    return msgspec.json.decode(text, type=VersionFloors) if text else VersionFloors()


def save(tx: Transaction, floors: VersionFloors) -> None:
    tx.set_meta(_META_KEY, msgspec.json.encode(floors).decode())


def _is_enforced(role: str, before: VersionFloor, observed: VersionFloor) -> bool:
    return role == ROOT_ROLE or set(before.keys) <= set(observed.keys)
