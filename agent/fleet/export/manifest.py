"""Manifest of an export: which messages its files hold, and the SHA-256 of each file.

`manifest.json` lists the chunks in order; each has a file of its own in `_chunks/`, which never changes. A file that no
chunk names is left over from an export that was interrupted, and belongs to no set of rows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent import durable_files, ranges
from agent.errors import UsageError
from agent.fleet.export.tables import KINDS, NO_DAY, Filters

MANIFEST, CHUNKS = "manifest.json", "_chunks"
FORMAT = "outstation-export-1"
# Measurements are private to the owner of the files.
FILE_MODE = 0o600
_DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")

# (device, log, first seq, last seq)
LogRange = tuple[str, str, int, int]


class ExportedFile(msgspec.Struct, frozen=True):
    """`path`: relative to the export's folder; `day`: UTC, or None."""

    path: str
    kind: str
    day: str | None
    rows: int
    bytes: int
    sha256: str

    def find_path_problem(self, folder: Path, number: int) -> str | None:
        """Return why `path` is not the file of this kind and day in chunk `number`: a forged one may be anywhere."""
        if self.kind not in KINDS:
            return f"is of kind {self.kind!r}, which this version does not know; update outstation"
        day = NO_DAY if self.day is None else self.day
        is_named = (self.day is None or _DAY.fullmatch(day)) and self.path == part_path(self.kind, day, number)
        if not is_named:
            return "has another name than its kind and day give"
        if (folder / self.path).resolve() != folder.resolve() / self.path:
            return "is a symbolic link to another place"
        return None


class Chunk(msgspec.Struct, frozen=True):
    """Messages that were exported together, and the files with their rows."""

    number: int
    messages: int
    ranges: list[LogRange]
    files: list[ExportedFile]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


class ChunkRef(msgspec.Struct, frozen=True):
    path: str
    sha256: str
    messages: int
    rows: int


class Manifest(msgspec.Struct):
    fleet: str
    filters: Filters
    chunks: list[ChunkRef] = []
    format: str = FORMAT

    def add(self, folder: Path, chunk: Chunk) -> None:
        """Write the chunk's file, then the manifest that names it. Raises StorageError."""
        path, data = f"{CHUNKS}/chunk-{chunk.number:06}.json", msgspec.json.encode(chunk)
        durable_files.write(folder / path, data, FILE_MODE)
        self.chunks.append(ChunkRef(path, sha256(data), chunk.messages, chunk.rows))
        self.save(folder)

    def save(self, folder: Path) -> None:
        durable_files.write(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(self)), FILE_MODE)

    def read_chunks(self, folder: Path) -> Iterator[Chunk]:
        """Read the chunks in order. Raises UsageError where one is not the file that the manifest names."""
        for number, ref in enumerate(self.chunks, 1):
            if ref.path != f"{CHUNKS}/chunk-{number:06}.json":
                raise UsageError(f"{folder / MANIFEST}: chunk {number} is named {ref.path!r}; export to a new folder")
            try:
                data = (folder / ref.path).read_bytes()
                chunk = msgspec.json.decode(data, type=Chunk)
            except (OSError, msgspec.MsgspecError) as error:
                raise UsageError(f"{folder / ref.path}: cannot be read: {error}; export to a new folder") from None
            if sha256(data) != ref.sha256:
                raise UsageError(f"{folder / ref.path}: is not the file that {MANIFEST} names; export to a new folder")
            yield chunk


def load(folder: Path) -> Manifest | None:
    """Return the manifest in a folder; None if there is none. Raises UsageError."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{folder / MANIFEST}: cannot be read: {error}; export to a new folder") from None
    if manifest.format != FORMAT:
        raise UsageError(f"{folder / MANIFEST}: has format {manifest.format!r}, this version reads {FORMAT!r}")
    return manifest


def exported_ranges(chunks: Iterator[Chunk]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Return the seqs of each log that are exported."""
    exported: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for chunk in chunks:
        for device, log, first, last in chunk.ranges:
            exported.setdefault((device, log), []).append((first, last))
    return {log: ranges.union(pairs) for log, pairs in exported.items()}


def part_path(kind: str, day: str, number: int) -> str:
    return f"kind={kind}/day={day}/part-{number:06}.parquet"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
