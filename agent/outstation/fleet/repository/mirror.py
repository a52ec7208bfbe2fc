"""Mirror of the repository on a stick or web server. Devices see a complete edition at every moment of the copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, Timestamp
from tuf.api.serialization import DeserializationError

from outstation.fleet.repository import edition, root_rotation
from outstation.fleet.repository.edition import Edition
from outstation.fleet.repository.expiry import TIMESTAMP
from outstation.fleet.repository.layout import Layout
from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import StorageError, UsageError


class CopyResult(msgspec.Struct, frozen=True):
    """Folder for the devices' URL, and the files and bytes written. Unchanged files do not count."""

    home: Path
    files: int
    bytes: int


def copy(folder: Path, destination: Path) -> CopyResult:
    """Make `repository/` in `destination` equal to the fleet's. Raises UsageError if it holds a later edition."""
    source, target = Layout(folder), Layout(destination)
    written = []
    with source.locked():
        current = edition.load(source, root_rotation.load_next_root(source))
        known = _check_destination(target, current)
        try:
            for file in _iter_files(source, current):
                data = input_files.read_bytes(file)
                copied = target.home / file.relative_to(source.home)
                is_same_size = copied.exists() and copied.stat().st_size == len(data)
                if not is_same_size or input_files.read_bytes(copied) != data:
                    durable_files.write(copied, data)
                    written.append(len(data))
            if known:
                edition.prune(target, current)
        except OSError as error:
            raise StorageError(f"{target.home}: the copy failed: {error.strerror}; run it again") from None
    return CopyResult(target.home, len(written), sum(written))


def _iter_files(layout: Layout, current: Edition) -> Iterator[Path]:
    """Yield all files, each before the files that refer to it."""
    for bundle in current.bundles.values():
        yield from (layout.target_path(path, file.hashes["sha256"]) for path, file in bundle.signed.targets.items())
    yield from (
        layout.role_path(role, version) for role, version in current.published_versions.items() if role != TIMESTAMP
    )
    yield from (layout.root_path(version) for version in range(1, current.root.signed.version + 1))
    yield layout.role_path(TIMESTAMP, current.published_versions[TIMESTAMP])


def _check_destination(destination: Layout, current: Edition) -> bool:
    """Return True if an earlier copy exists, in which old files may be removed. Raises UsageError."""
    if link := next(
        (path for path in (destination.home, destination.metadata, destination.targets) if path.is_symlink()), None
    ):
        raise UsageError(f"{link}: is a symbolic link; name the folder itself")
    path = destination.role_path(TIMESTAMP, 0)
    try:
        version = Metadata[Timestamp].from_bytes(input_files.read_bytes(path)).signed.version if path.exists() else 0
    except (OSError, DeserializationError):
        return False  # a partial file of an interrupted copy: it is written again
    ours = current.published_versions[TIMESTAMP]
    if version > ours:
        raise UsageError(
            f"{destination.home}: holds edition {version}, which is later than this one ({ours}) or belongs to another "
            "fleet; empty the folder, or copy from the machine with the later edition"
        )
    return version > 0
