"""Making a repository: keys, and the first edition, without bundles."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from agent import durable_files
from agent.errors import UsageError
from agent.fleet.repository import edition, expiry
from agent.fleet.repository.edition import Edition
from agent.fleet.repository.expiry import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TOP_LEVEL_ROLES
from agent.fleet.repository.keys import RepositoryKeyring
from agent.fleet.repository.layout import Layout

MAX_ROOTS = 16


class CreatedRepository(msgspec.Struct, frozen=True):
    """`root` is what devices are given, `keys` are the files that are to be moved offline."""

    root: Path
    keys: list[Path]
    threshold: int


def create(
    folder: Path, *, roots: int = 1, threshold: int = 1, current_time: datetime | None = None
) -> CreatedRepository:
    """A repository in the fleet's `folder` that `threshold` of `roots` root keys govern. Raises UsageError.

    One that was cut short is made to its end, with the keys that are there.
    """
    if not 1 <= threshold <= roots <= MAX_ROOTS:
        raise UsageError(f"--threshold {threshold} of --roots {roots}: use 1 to {MAX_ROOTS} keys, and no more to sign")
    layout, current_time = Layout(folder), current_time or expiry.now()
    durable_files.make_folder(layout.home)
    with layout.locked():
        there = layout.newest_root_path()
        if there is not None:
            raise UsageError(
                f"{there}: a repository is there already, and devices trust its keys; it is never made over"
            )
        keyring = RepositoryKeyring(layout.keys)
        files = [layout.keys / f"root-{number}.key" for number in range(1, roots + 1)]
        root = Metadata(Root(version=1, expires=current_time + expiry.lifetime(ROOT), consistent_snapshot=True))
        for file in files:
            root.signed.add_key(keyring.find_or_generate(file.stem), ROOT)
        for role in (TARGETS, SNAPSHOT, TIMESTAMP):
            root.signed.add_key(keyring.find_or_generate(f"{role}-1"), role)
        root.signed.roles[ROOT].threshold = threshold
        for signer in keyring.signers(root.signed.roles[ROOT].keyids):
            root.sign(signer, append=True)
        durable_files.make_folder(layout.targets)
        first = Edition(root, Metadata(Timestamp()), Metadata(Snapshot()), Metadata(Targets()))
        edition.write(layout, first, TOP_LEVEL_ROLES, keyring, current_time)
        # Last: with it the repository is there.
        durable_files.write(layout.root_path(1), root.to_bytes())
    return CreatedRepository(layout.root_path(1), files, threshold)
