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

_META = "update floors"
ROOT = "root"
BELOW = "BadVersionNumberError"


class Floor(msgspec.Struct, frozen=True):
    """The last version of a role, and the ids of the keys that might sign it then."""

    version: int
    keys: list[str]


class Floors(msgspec.Struct, frozen=True):
    """By role; `anchor` is the SHA-256 of the first root. `expires_s`: when the last metadata is too old, epoch s."""

    anchor: str = ""
    roles: dict[str, Floor] = {}
    expires_s: float | None = None

    def of(self, anchor: str) -> Floors:
        """Those of one repository."""
        return self if anchor == self.anchor else Floors(anchor)


def raised(floors: Floors, seen: Mapping[str, Floor], expires_s: float | None) -> Floors:
    """With what was seen now. Raises FetchFailed where a version is below its floor."""
    for role, found in seen.items():
        before = floors.roles.get(role)
        if before is not None and found.version < before.version and _holds(role, before, found):
            raise FetchFailed(
                BELOW,
                f"{role} is of version {found.version}, this device has seen {before.version}: the repository, or "
                "somebody on the way to it, shows an older state",
            )
    return Floors(floors.anchor, {**floors.roles, **seen}, floors.expires_s if expires_s is None else expires_s)


def load(store: Store) -> Floors:
    """Raises StorageError."""
    text = store.meta(_META, "")
    return msgspec.json.decode(text, type=Floors) if text else Floors()


def save(tx: Transaction, floors: Floors) -> None:
    tx.set_meta(_META, msgspec.json.encode(floors).decode())


def _holds(role: str, before: Floor, found: Floor) -> bool:
    return role == ROOT or set(before.keys) <= set(found.keys)
