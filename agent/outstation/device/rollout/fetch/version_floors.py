"""Version floors: the lowest metadata versions this device accepts, kept in the store and not next to the metadata.

Rules (TUF specification 5.3.5 to 5.3.11, 5.4.3, 5.5.5, 5.6.4):
- a role's version never falls while every key that was valid at the floor is still valid
- once one of them is revoked, the role's versions start over: high versions signed with a stolen key do no more harm
- root's versions never start over: its chain of signatures from the first root is what revokes keys
- another first root is another repository; only a person who can change the device's config can set one
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from outstation.foundation import decoders
from outstation.foundation.errors import FetchFailed

if TYPE_CHECKING:
    # The fetch worker must not load the store.
    from outstation.device.store.store import Store
    from outstation.device.store.transaction import Transaction

_META_KEY = "version floors"
ROOT_ROLE = "root"
ROLLBACK_ERROR = "BadVersionNumberError"


class VersionFloor(msgspec.Struct, frozen=True):
    """The last version of a role, and the ids of the keys that could sign it then."""

    version: int
    keys: list[str]


class VersionFloors(msgspec.Struct, frozen=True):
    """Floors by role. `anchor` is the SHA-256 of the first root, `expires_s` the expiry of the metadata, epoch s."""

    anchor: str = ""
    roles: dict[str, VersionFloor] = {}
    expires_s: float | None = None

    def for_anchor(self, anchor: str) -> VersionFloors:
        """Return the floors of one repository; empty if these belong to another."""
        return self if anchor == self.anchor else VersionFloors(anchor)


def raise_floors(floors: VersionFloors, observed: Mapping[str, VersionFloor], expires_s: float | None) -> VersionFloors:
    """Return the floors raised to the observed versions. Raises FetchFailed for a version below its floor."""
    for role, new in observed.items():
        before = floors.roles.get(role)
        if before is None or new.version >= before.version:
            continue
        if role == ROOT_ROLE or set(before.keys) <= set(new.keys):
            raise FetchFailed(
                ROLLBACK_ERROR,
                f"{role} has version {new.version}, this device has seen {before.version}: the repository, or "
                "somebody between it and this device, serves an older state",
            )
    return VersionFloors(
        floors.anchor, {**floors.roles, **observed}, floors.expires_s if expires_s is None else expires_s
    )


def load(store: Store) -> VersionFloors:
    """Load the floors of this device. Raises StorageError."""
    text = store.get_meta(_META_KEY, "")
    return decoders.from_json(text, VersionFloors) if text else VersionFloors()


def save(tx: Transaction, floors: VersionFloors) -> None:
    tx.set_meta(_META_KEY, msgspec.json.encode(floors).decode())
