"""The repository's signed metadata, as The Update Framework has them verified; the device's only importer of `tuf`.

What python-tuf leaves to its user, and is done here:
- it reads the clock itself, once: the time it is to go by is put in its place
- it does not sync what it writes, and takes local metadata that are damaged for none: it works in a copy, which is
  synced and takes the old one's place as a whole; `floors` tell when both are older than what was seen before
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec
from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from agent import durable_files
from agent.device.rollout.fetch.protocol import SignedTarget
from agent.device.rollout.fetch.transport import RemoteFileNotFound, Transport
from agent.device.rollout.fetch.version_floors import ROOT_ROLE, VersionFloor
from agent.errors import FetchFailed

_BASE_URL = "repository:/"
_TOP_LEVEL_ROLES = (Root.type, Timestamp.type, Snapshot.type, Targets.type)
# A bundle is named by one delegation; more are followed, not many.
_UPDATER_CONFIG = UpdaterConfig(max_delegations=8, targets_max_length=2_000_000)
_MAX_CUSTOM_BYTES = 65_536
# The end of 9999: what a clock of garbage shows may be later.
_MAX_TIME_S = 253_402_300_799.0
_MAX_VERSION = 2**63 - 1
# What python-tuf lets through of metadata that are signed and malformed.
_MALFORMED_ERRORS = (AttributeError, KeyError, TypeError, ValueError, RecursionError)


class TufClient:
    """One look, from the first trusted root on. `work` is a folder of its own, with what was known before."""

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
        self._trusted.reference_time = datetime.fromtimestamp(min(time_s, _MAX_TIME_S), UTC)

    def refresh(self) -> None:
        """All roles that are no bundle's. Raises FetchFailed."""
        with _map_tuf_errors():
            self._updater.refresh()

    def find_target(self, path: str) -> tuple[SignedTarget, str]:
        """What is signed of the target, and the name of its file. Raises FetchFailed."""
        with _map_tuf_errors():
            found = self._updater.get_targetinfo(path)
        if found is None:
            raise FetchFailed("NoSuchTarget", f"nobody who may has signed {path}; was it published, or withdrawn?")
        sha256 = found.hashes.get("sha256", "")
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise FetchFailed("RepositoryError", f"{path} has no SHA-256 in its metadata")
        folder, _, name = path.rpartition("/")
        consistent = self._trusted.root.consistent_snapshot
        file = f"{folder}/{next(iter(found.hashes.values()))}.{name}" if consistent else path
        return SignedTarget(path, found.length, sha256, _read_custom(found)), f"targets/{file}"

    def root_floor(self) -> dict[str, VersionFloor]:
        """The floor of root alone: all that holds where the rest was refused."""
        return {ROOT_ROLE: self._make_floor(ROOT_ROLE, ROOT_ROLE)}

    def observed_floors(self) -> dict[str, VersionFloor]:
        """The floors of all roles that were verified, in the order in which they are."""
        found = {role: self._make_floor(ROOT_ROLE, role) for role in _TOP_LEVEL_ROLES if role in self._trusted}
        delegators = [Targets.type] if Targets.type in found else []
        while delegators:
            delegator = delegators.pop()
            delegations = cast(Targets, self._trusted[delegator]).delegations
            for role in (delegations and delegations.roles) or ():
                if role in self._trusted and role not in found:
                    found[role] = self._make_floor(delegator, role)
                    delegators.append(role)
        return found

    def expires_s(self) -> float:
        """When the first of the roles that are no bundle's expires, epoch s."""
        return min(self._trusted[role].expires.timestamp() for role in _TOP_LEVEL_ROLES)

    def _make_floor(self, delegator: str, role: str) -> VersionFloor:
        keys = cast("Root | Targets", self._trusted[delegator]).get_delegated_role(role).keyids
        version = self._trusted[role].version
        if not isinstance(version, int) or version > _MAX_VERSION:
            raise FetchFailed("RepositoryError", f"{role} is of version {str(version)[:40]}, which is none")
        return VersionFloor(version, sorted(keys))


@contextlib.contextmanager
def working_copy(folder: Path) -> Iterator[Path]:
    """A copy of `folder` to work in; gone afterwards, unless `commit` has put it in place. Raises OSError."""
    new, old = _sibling_folders(folder)
    if not folder.exists() and old.exists():
        # Power went between the two renames of `commit`.
        old.rename(folder)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, new, symlinks=True)
    else:
        new.mkdir(parents=True)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def commit_working_copy(folder: Path) -> None:
    """Put the copy in the place of `folder`, all of it on the disk. Raises OSError."""
    new, old = _sibling_folders(folder)
    for path, folders, files in os.walk(new, topdown=False):
        for name in (*folders, *files):
            if not Path(path, name).is_symlink():
                durable_files.fsync(Path(path, name))
    durable_files.fsync(new)
    if folder.exists():
        durable_files.rename(folder, old)
    durable_files.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


class _TufFetcher(FetcherInterface):
    """Our source, as python-tuf asks for it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _fetch(self, url: str) -> Iterator[bytes]:
        # Not a generator: python-tuf wants to be told at once where there is no such file.
        try:
            return self._transport.read(url.removeprefix(_BASE_URL)).chunks
        except RemoteFileNotFound as missing:
            raise DownloadHTTPError(missing.detail, 404) from missing


def _read_custom(target: TargetFile) -> dict[str, Any]:
    """Member `outstation` of what the publisher says beside the hash. Raises FetchFailed."""
    said = (target.custom or {}).get("outstation", {})
    if not isinstance(said, dict) or len(msgspec.json.encode(said)) > _MAX_CUSTOM_BYTES:
        raise FetchFailed("RepositoryError", f"{target.path}: what its metadata say of it is no object, or too long")
    return said


def _sibling_folders(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


@contextlib.contextmanager
def _map_tuf_errors() -> Iterator[None]:
    """The errors of python-tuf by their own names; what our source said stays as it is."""
    try:
        yield
    except (DownloadError, RepositoryError) as error:
        if isinstance(error.__cause__, FetchFailed):
            raise error.__cause__ from None
        name = "RepositoryError" if isinstance(error, DeserializationError) else type(error).__name__
        raise FetchFailed(name, str(error)[:500] or "the metadata do not verify") from error
    except _MALFORMED_ERRORS as error:
        said = f"metadata that cannot be read: {type(error).__name__}: {str(error)[:300]}"
        raise FetchFailed("RepositoryError", said) from error
