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


class Copied(msgspec.Struct, frozen=True):
    """`home` is what devices are told; `files` and `bytes` were written, what was there already is not counted."""

    home: Path
    files: int
    bytes: int


def copy(folder: Path, destination: Path) -> Copied:
    """Make `repository/` in `destination` the same as the fleet's. Raises UsageError where a later edition is there."""
    ours, theirs = Layout(folder), Layout(destination)
    written = []
    with ours.locked():
        now = edition.load(ours, root_rotation.coming(ours))
        known = _check(theirs, now)
        try:
            for file in _files(ours, now):
                data = file.read_bytes()
                target = theirs.home / file.relative_to(ours.home)
                if not _same(target, data):
                    durable_files.write(target, data)
                    written.append(len(data))
            if known:
                edition.tidy(theirs, now)
        except OSError as error:
            raise StorageError(f"{theirs.home}: cannot be copied to: {error.strerror}") from None
    return Copied(theirs.home, len(written), sum(written))


def _files(layout: Layout, now: Edition) -> Iterator[Path]:
    """What is referred to before what refers to it."""
    for bundle in now.bundles.values():
        yield from (layout.target(path, file.hashes["sha256"]) for path, file in bundle.signed.targets.items())
    yield from (layout.role(role, version) for role, version in now.published.items() if role != TIMESTAMP)
    yield from (layout.root(version) for version in range(1, now.root.signed.version + 1))
    yield layout.role(TIMESTAMP, now.published[TIMESTAMP])


def _check(theirs: Layout, now: Edition) -> bool:
    """Whether a copy is there already, in which what is old may be removed. Raises UsageError."""
    if link := next((path for path in (theirs.home, theirs.metadata, theirs.targets) if path.is_symlink()), None):
        raise UsageError(f"{link}: is a link; name the folder that is to be written")
    path = theirs.role(TIMESTAMP, 0)
    try:
        there = Metadata[Timestamp].from_bytes(path.read_bytes()).signed.version if path.exists() else 0
    except (OSError, DeserializationError):
        return False  # half a file of before: it is written anew
    if there > now.published[TIMESTAMP]:
        raise UsageError(
            f"{theirs.home}: holds a later edition ({there}, this one is {now.published[TIMESTAMP]}), or one of "
            "another fleet; empty it, or copy from where the later one was made"
        )
    return there > 0


def _same(path: Path, data: bytes) -> bool:
    return path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data
