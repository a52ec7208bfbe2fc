"""The repository onto a stick, or to where a web server serves it; devices that look meanwhile find an edition."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, Timestamp
from tuf.api.serialization import DeserializationError

from agent import durable_files
from agent.errors import StorageError, UsageError
from agent.fleet.repository import edition, root_rotation
from agent.fleet.repository.edition import Edition
from agent.fleet.repository.expiry import TIMESTAMP
from agent.fleet.repository.layout import Layout


class CopyResult(msgspec.Struct, frozen=True):
    """`home` is what devices are told; `files` and `bytes` were written, what was there already is not counted."""

    home: Path
    files: int
    bytes: int


def copy(folder: Path, destination: Path) -> CopyResult:
    """Make `repository/` in `destination` the same as the fleet's. Raises UsageError where a later edition is there."""
    ours, theirs = Layout(folder), Layout(destination)
    written = []
    with ours.locked():
        now = edition.load(ours, root_rotation.load_next_root(ours))
        known = _check_destination(theirs, now)
        try:
            for file in _iter_files(ours, now):
                data = file.read_bytes()
                target = theirs.home / file.relative_to(ours.home)
                if not _has_content(target, data):
                    durable_files.write(target, data)
                    written.append(len(data))
            if known:
                edition.prune(theirs, now)
        except OSError as error:
            raise StorageError(f"{theirs.home}: cannot be copied to: {error.strerror}") from None
    return CopyResult(theirs.home, len(written), sum(written))


def _iter_files(layout: Layout, current: Edition) -> Iterator[Path]:
    """What is referred to before what refers to it."""
    for bundle in current.bundles.values():
        yield from (layout.target_path(path, file.hashes["sha256"]) for path, file in bundle.signed.targets.items())
    yield from (
        layout.role_path(role, version) for role, version in current.published_versions.items() if role != TIMESTAMP
    )
    yield from (layout.root_path(version) for version in range(1, current.root.signed.version + 1))
    yield layout.role_path(TIMESTAMP, current.published_versions[TIMESTAMP])


def _check_destination(destination: Layout, current: Edition) -> bool:
    """Whether a copy is there already, in which what is old may be removed. Raises UsageError."""
    if link := next(
        (path for path in (destination.home, destination.metadata, destination.targets) if path.is_symlink()), None
    ):
        raise UsageError(f"{link}: is a link; name the folder that is to be written")
    path = destination.role_path(TIMESTAMP, 0)
    try:
        there = Metadata[Timestamp].from_bytes(path.read_bytes()).signed.version if path.exists() else 0
    except (OSError, DeserializationError):
        return False  # half a file of before: it is written anew
    if there > current.published_versions[TIMESTAMP]:
        raise UsageError(
            f"{destination.home}: holds a later edition ({there}, this one is {current.published_versions[TIMESTAMP]}), or one of "
            "another fleet; empty it, or copy from where the later one was made"
        )
    return there > 0


def _has_content(path: Path, data: bytes) -> bool:
    return path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data
