"""Edition: the metadata that clients of the repository see, read with the clients' checks, and the writing of the next.

A new edition changes no file that the current one refers to: every file except `timestamp.json` has its version or hash
in its name. Clients see it once `timestamp.json` is replaced, which is the last step. Files left by a crash are not
referred to, and the next edition overwrites them.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from securesystemslib.signer import Signer
from tuf.api.exceptions import LengthOrHashMismatchError, RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from outstation.fleet.repository import expiry
from outstation.fleet.repository.expiry import REFRESH_INTERVAL, SNAPSHOT, TARGETS, TIMESTAMP
from outstation.fleet.repository.keys import RepositoryKeyring
from outstation.fleet.repository.layout import Layout
from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import StorageError, UsageError

# Older versions stay for clients in the middle of an update.
_RETAINED_VERSIONS = 3
T = TypeVar("T", Root, Timestamp, Snapshot, Targets)


class Edition(msgspec.Struct):
    """Metadata of all roles. `published_versions` holds the version that clients see; new roles are not in it."""

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]
    bundles: dict[str, Metadata[Targets]] = msgspec.field(default_factory=dict)
    published_versions: dict[str, int] = msgspec.field(default_factory=dict)

    def get_metadata(self, role: str) -> Metadata[Any]:
        top: dict[str, Metadata[Any]] = {TIMESTAMP: self.timestamp, SNAPSHOT: self.snapshot, TARGETS: self.targets}
        return top[role] if role in top else self.bundles[role]

    def keyids(self, role: str, next_root: Root | None = None) -> list[str]:
        """Return the ids of the keys for `role` under the current root and, if given, the next root."""
        if role in (TARGETS, SNAPSHOT, TIMESTAMP):
            roots = [self.root.signed, *([next_root] if next_root else [])]
            return list(dict.fromkeys(keyid for root in roots for keyid in root.roles[role].keyids))
        return list(self.targets.signed.get_delegated_role(role).keyids)


def load(layout: Layout, next_root: Root | None = None) -> Edition:
    """Return the edition that clients see. Raises UsageError without a repository, StorageError if clients refuse it.

    Metadata valid only under `next_root` are accepted, too: a crash may have left them.
    """
    newest = layout.newest_root_path()
    if newest is None:
        raise layout.missing_error()
    try:
        root = Metadata[Root].from_bytes(input_files.read_bytes(newest))
        roots = [root.signed, *([next_root] if next_root else [])]
        timestamp = _read_role(Timestamp, layout, TIMESTAMP, MetaFile(1), roots)
        snapshot = _read_role(Snapshot, layout, SNAPSHOT, timestamp.signed.snapshot_meta, roots)
        listed = {name.removesuffix(".json"): file for name, file in snapshot.signed.meta.items()}
        targets = _read_role(Targets, layout, TARGETS, listed.pop(TARGETS), roots)
        bundles = {role: _read_role(Targets, layout, role, file, [targets.signed]) for role, file in listed.items()}
    except (OSError, DeserializationError, RepositoryError, LengthOrHashMismatchError, ValueError, KeyError) as error:
        raise StorageError(
            f"{layout.metadata}: devices would refuse this metadata ({error}); restore the folder from a backup or "
            "from the web server that serves it, then publish again"
        ) from error
    edition = Edition(root, timestamp, snapshot, targets, bundles)
    roles = (TARGETS, *bundles, TIMESTAMP, SNAPSHOT)
    edition.published_versions = {role: edition.get_metadata(role).signed.version for role in roles}
    return edition


def _read_role(
    kind: type[T], layout: Layout, role: str, meta_file: MetaFile, parents: list[Root] | list[Targets]
) -> Metadata[T]:
    data = input_files.read_bytes(layout.role_path(role, meta_file.version))
    meta_file.verify_length_and_hashes(data)
    metadata = Metadata[T].from_bytes(data)
    if not isinstance(metadata.signed, kind):
        raise ValueError(f"{role} holds metadata of type {metadata.signed.type}")
    results = [parent.get_verification_result(role, metadata.signed_bytes, metadata.signatures) for parent in parents]
    if not any(results):
        raise ValueError(f"{role} is signed by {len(results[0].signed)} of {results[0].threshold} keys")
    return metadata


def write(
    layout: Layout,
    edition: Edition,
    changed: Collection[str],
    keyring: RepositoryKeyring,
    now: datetime,
    next_root: Root | None = None,
    *,
    trust_clock: bool = False,
) -> None:
    """Sign and write the `changed` roles and the roles that refer to them. Raises UsageError before the first write.

    With `next_root`, the keys of both roots sign, so that clients of either root accept the result.
    """
    # Each role before the roles that refer to it.
    order = [*sorted(edition.bundles.keys() & changed), *([TARGETS] if TARGETS in changed else [])]
    order += [*([SNAPSHOT] if order or SNAPSHOT in changed else []), TIMESTAMP]
    if TIMESTAMP in edition.published_versions and not trust_clock:
        # With a clock behind the last signature, the expiry would be too early.
        last = edition.timestamp.signed.expires - expiry.lifetime(TIMESTAMP)
        if now < last - REFRESH_INTERVAL:
            raise UsageError(
                f"{layout.home}: this machine's clock says {now:%Y-%m-%d %H:%M}, before the last signature on "
                f"{last:%Y-%m-%d %H:%M}; set the clock, or if it was wrong then: `refresh --trust-clock`"
            )
    signers = {role: _find_signers(edition, role, keyring, next_root) for role in order}
    written: dict[str, bytes] = {}
    for role in order:
        part = edition.get_metadata(role)
        if role == TIMESTAMP and SNAPSHOT in written:
            version = edition.snapshot.signed.version
            edition.timestamp.signed.snapshot_meta = MetaFile.from_data(version, written[SNAPSHOT], ["sha256"])
        if role == SNAPSHOT:
            for name, data in written.items():
                version = edition.get_metadata(name).signed.version
                edition.snapshot.signed.meta[f"{name}.json"] = MetaFile.from_data(version, data, ["sha256"])
        part.signed.version = edition.published_versions.get(role, 0) + 1
        part.signed.expires = now + expiry.lifetime(role)
        part.signatures.clear()
        for signer in signers[role]:
            part.sign(signer, append=True)
        written[role] = part.to_bytes()
    for role in order:
        durable_files.write(layout.role_path(role, edition.get_metadata(role).signed.version), written[role])
    edition.published_versions |= {role: edition.get_metadata(role).signed.version for role in order}
    prune(layout, edition)


def _find_signers(edition: Edition, role: str, keyring: RepositoryKeyring, next_root: Root | None) -> list[Signer]:
    signers = keyring.signers(edition.keyids(role, next_root))
    next_signers = keyring.signers(next_root.roles[role].keyids) if next_root and role in next_root.roles else signers
    if not next_signers:
        raise UsageError(
            f"{keyring.folder}: no key of role {role}; copy the key there or name its file with --sign-with; if it is "
            f"lost, replace it: outstation fleet repository rotate {role}"
        )
    return signers


def prune(layout: Layout, edition: Edition) -> None:
    """Remove versions that no client requests any more, and unlisted targets. Roots stay forever.

    Raises StorageError if a file cannot be removed; the edition stays published.
    """
    for path in layout.metadata.glob("*.json"):
        number, _, role = path.name.removesuffix(".json").partition(".")
        if role in edition.published_versions and role != "root" and number.isdecimal():
            current = edition.published_versions[role]
            if not current - _RETAINED_VERSIONS <= int(number) <= current:
                durable_files.remove(path)
    listed = {
        str(layout.target_path(path, file.hashes["sha256"]))
        for bundle in edition.bundles.values()
        for path, file in bundle.signed.targets.items()
    }
    for folder, _, names in os.walk(layout.targets):
        for name in names:
            if str(Path(folder, name)) not in listed:
                durable_files.remove(Path(folder, name))
