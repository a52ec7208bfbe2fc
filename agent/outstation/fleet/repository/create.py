"""Creation of a repository: keys, a first edition without bundles, and its URL for devices in `fleet.toml`."""

from __future__ import annotations

import json
import stat
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from outstation.fleet import config as fleet_config
from outstation.fleet.repository import edition, expiry
from outstation.fleet.repository.edition import Edition
from outstation.fleet.repository.expiry import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TOP_LEVEL_ROLES
from outstation.fleet.repository.keys import RepositoryKeyring
from outstation.fleet.repository.layout import Layout
from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import UsageError
from outstation.foundation.text import mask_password

MAX_ROOTS = 16


class CreatedRepository(msgspec.Struct, frozen=True):
    """Result: the root metadata for devices, and the root key files to move offline."""

    root: Path
    keys: list[Path]
    threshold: int


def create(
    folder: Path, root_keys: Path | None = None, *, roots: int = 1, threshold: int = 1, now: datetime | None = None
) -> CreatedRepository:
    """Create a repository in the fleet's folder, governed by `threshold` of `roots` root keys. Raises UsageError.

    `root_keys` is the folder of the root keys, outside the fleet's folder: a thief of that one gets the online keys
    only. None puts them in the fleet's folder, for demonstrations.

    An interrupted creation is completed with the keys that exist.
    """
    if not 1 <= threshold <= roots <= MAX_ROOTS:
        limits = f"use 1 to {MAX_ROOTS} root keys, and a threshold up to it"
        raise UsageError(f"--threshold {threshold} of --roots {roots}: {limits}")
    layout, now = Layout(folder), now or expiry.now()
    durable_files.make_folder(layout.home)
    with layout.locked():
        existing = layout.newest_root_path()
        if existing is not None:
            raise UsageError(f"{existing}: a repository exists already; devices trust its keys, so it is not replaced")
        keyring = RepositoryKeyring(layout.keys)
        root_folder = layout.keys if root_keys is None else require_outside(root_keys, folder)
        files = [root_folder / f"root-{number}.key" for number in range(1, roots + 1)]
        root = Metadata(Root(version=1, expires=now + expiry.lifetime(ROOT), consistent_snapshot=True))
        for file in files:
            root.signed.add_key(keyring.find_or_generate(file.stem, root_folder), ROOT)
        for role in (TARGETS, SNAPSHOT, TIMESTAMP):
            root.signed.add_key(keyring.find_or_generate(f"{role}-1"), role)
        root.signed.roles[ROOT].threshold = threshold
        for signer in keyring.signers(root.signed.roles[ROOT].keyids):
            root.sign(signer, append=True)
        durable_files.make_folder(layout.targets)
        first = Edition(root, Metadata(Timestamp()), Metadata(Snapshot()), Metadata(Targets()))
        edition.write(layout, first, TOP_LEVEL_ROLES, keyring, now)
        # Written last: a repository without root does not exist yet.
        durable_files.write(layout.root_path(1), root.to_bytes())
    return CreatedRepository(layout.root_path(1), files, threshold)


def require_outside(root_keys: Path, folder: Path) -> Path:
    """Return the folder of the root keys. Raises UsageError for one inside the fleet's folder, or none."""
    if root_keys.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"--root-keys {root_keys}: lies in the fleet's folder {folder}, so whoever copies that can change every "
            "key; name a folder on a removable medium, such as /media/stick"
        )
    if not root_keys.is_dir():
        raise UsageError(f"--root-keys {root_keys}: no such folder; is the medium mounted?")
    return root_keys


def write_url(folder: Path, url: str) -> None:
    """Add section [repository]. Raises UsageError for an invalid URL or if a different one is set."""
    known = fleet_config.load(folder).repository
    path = folder / fleet_config.FILE
    if known is not None and known.url != url:
        raise UsageError(f"{path}: repository.url is {known.url!r} already; edit it in that file")
    if known is not None:
        return
    check_url("--url", url)
    added = f"\n[repository]\nurl = {json.dumps(url)}   # where devices find this folder's repository/\n"
    mode = stat.S_IMODE(path.stat().st_mode)
    durable_files.write(path, input_files.read_bytes(path).rstrip(b"\n") + b"\n" + added.encode(), mode)


def check_url(option: str, url: str) -> None:
    """Check the address of a repository. Raises UsageError that names the `option`."""
    if "://" in url:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable or parts.query or parts.fragment or parts.username or parts.password:
            form = "https://HOST[:PORT]/PATH without user, query or fragment"
            raise UsageError(f"{option} {mask_password(url)}: not a URL of the form {form}")
    elif not Path(url).is_absolute():
        raise UsageError(f"{option} {url}: neither https://HOST/PATH nor an absolute path of a folder on the devices")
