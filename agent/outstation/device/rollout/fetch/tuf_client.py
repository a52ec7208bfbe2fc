"""TUF client: verify the repository's signed metadata. The device's only importer of `tuf`.

python-tuf leaves two things to its user:
- it reads the wall clock, once; the trusted time replaces that reading
- it does not sync its files, and treats damaged local metadata as absent. It therefore works in a copy, which is synced
  and replaces the old folder as a whole; `version_floors` detect metadata older than this device has seen
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from outstation.device.rollout.fetch.protocol import SignedTarget
from outstation.device.rollout.fetch.transport import RemoteFileMissing, Transport
from outstation.device.rollout.fetch.version_floors import ROOT_ROLE, VersionFloor
from outstation.foundation import clock, durable_files
from outstation.foundation.errors import FetchFailed
from outstation.protocol.wire.target_metadata import MEMBER

_BASE_URL = "repository:/"
_TOP_LEVEL_ROLES = (Root.type, Timestamp.type, Snapshot.type, Targets.type)
# One delegation names a bundle; nested ones are followed up to this limit.
_UPDATER_CONFIG = UpdaterConfig(max_delegations=8, targets_max_length=2_000_000)
_MAX_CUSTOM_BYTES = 65_536
_MAX_VERSION = 2**63 - 1
# python-tuf raises these for metadata that are signed but malformed.
_MALFORMED_ERRORS = (AttributeError, KeyError, TypeError, ValueError, RecursionError)


class TufClient:
    """One metadata refresh, from the first trusted root on. `work_dir` holds a copy of the known metadata."""

    def __init__(self, anchor: bytes, work_dir: Path, transport: Transport, time_s: float) -> None:
        logging.getLogger("tuf").setLevel(logging.CRITICAL)
        with _map_tuf_errors():
            self._updater = Updater(
                str(work_dir),
                f"{_BASE_URL}metadata/",
                fetcher=_TufFetcher(transport),
                config=_UPDATER_CONFIG,
                bootstrap=anchor,
            )
        self._trusted = self._updater._trusted_set
        self._trusted.reference_time = clock.to_datetime(round(time_s * 1e6))

    def refresh(self) -> None:
        """Update the top-level roles. Raises FetchFailed."""
        with _map_tuf_errors():
            self._updater.refresh()

    def find_target(self, path: str) -> tuple[SignedTarget, str]:
        """Return the signed metadata of a target, and the name of its file. Raises FetchFailed."""
        with _map_tuf_errors():
            target = self._updater.get_targetinfo(path)
        if target is None:
            raise FetchFailed("NoSuchTarget", f"no trusted key has signed {path}; is it published, or was it revoked?")
        sha256 = target.hashes.get("sha256", "")
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise FetchFailed("RepositoryError", f"{path} has no SHA-256 in its metadata")
        folder, _, name = path.rpartition("/")
        consistent = self._trusted.root.consistent_snapshot
        file = f"{folder}/{next(iter(target.hashes.values()))}.{name}" if consistent else path
        custom = (target.custom or {}).get(MEMBER, {})
        if not isinstance(custom, dict) or len(msgspec.json.encode(custom)) > _MAX_CUSTOM_BYTES:
            raise FetchFailed("RepositoryError", f"{target.path}: its custom metadata are not an object, or too long")
        return SignedTarget(path, target.length, sha256, custom), f"targets/{file}"

    def root_floor(self) -> dict[str, VersionFloor]:
        """Return the floor of root alone, which is valid even if the other roles were rejected."""
        return {ROOT_ROLE: self._make_floor(ROOT_ROLE, ROOT_ROLE)}

    def observed_floors(self) -> dict[str, VersionFloor]:
        """Return the floors of all verified roles, in the order of their verification."""
        floors = {role: self._make_floor(ROOT_ROLE, role) for role in _TOP_LEVEL_ROLES if role in self._trusted}
        delegators = [Targets.type] if Targets.type in floors else []
        while delegators:
            delegator = delegators.pop()
            delegations = cast(Targets, self._trusted[delegator]).delegations
            for role in (delegations and delegations.roles) or ():
                if role in self._trusted and role not in floors:
                    floors[role] = self._make_floor(delegator, role)
                    delegators.append(role)
        return floors

    def expires_s(self) -> float:
        """Return the earliest expiry of a top-level role, epoch s."""
        return min(self._trusted[role].expires.timestamp() for role in _TOP_LEVEL_ROLES)

    def _make_floor(self, delegator: str, role: str) -> VersionFloor:
        keys = cast("Root | Targets", self._trusted[delegator]).get_delegated_role(role).keyids
        version = self._trusted[role].version
        if not isinstance(version, int) or version > _MAX_VERSION:
            raise FetchFailed("RepositoryError", f"{role} has version {str(version)[:40]}, which is not valid")
        return VersionFloor(version, sorted(keys))


@contextlib.contextmanager
def working_copy(folder: Path) -> Iterator[Path]:
    """Copy `folder` for the block, and remove the copy unless it was committed. Raises OSError."""
    new, old = _sibling_folders(folder)
    if not folder.exists() and old.exists():
        # A power cut hit between the two renames of `commit_working_copy`.
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, new, symlinks=True)
    else:
        new.mkdir(parents=True)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def commit_working_copy(folder: Path) -> None:
    """Replace `folder` by its working copy, durably. Raises OSError."""
    new, old = _sibling_folders(folder)
    for path in new.rglob("*"):
        if not path.is_symlink():
            durable_files.fsync(path)
    durable_files.fsync(new)
    if folder.exists():
        durable_files.rename(folder, old)
    durable_files.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


class _TufFetcher(FetcherInterface):
    """Adapter from our transport to python-tuf's fetcher interface."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _fetch(self, url: str) -> Iterator[bytes]:
        # Not a generator: python-tuf expects the error for a missing file at once.
        try:
            return self._transport.read(url.removeprefix(_BASE_URL)).chunks
        except RemoteFileMissing as missing:
            raise DownloadHTTPError(missing.detail, 404) from missing


def _sibling_folders(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


@contextlib.contextmanager
def _map_tuf_errors() -> Iterator[None]:
    """Raise python-tuf's errors as FetchFailed under their own names; errors of our transport pass unchanged."""
    try:
        yield
    except (DownloadError, RepositoryError) as error:
        if isinstance(error.__cause__, FetchFailed):
            raise error.__cause__ from None
        name = "RepositoryError" if isinstance(error, DeserializationError) else type(error).__name__
        raise FetchFailed(name, str(error)[:500] or "the metadata do not verify") from error
    except _MALFORMED_ERRORS as error:
        text = f"the metadata cannot be read: {type(error).__name__}: {str(error)[:300]}"
        raise FetchFailed("RepositoryError", text) from error
