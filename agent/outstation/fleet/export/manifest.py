"""Manifest of an export: which messages its files hold, and the SHA-256 of each file, signed by the collector.

Each chunk has a file of its own in `_chunks/`, which never changes and names the SHA-256 of the one before.
`manifest.json` names that of the last one, so that its size does not grow and its signature covers all of them. A file
that no chunk names is left over from an export that was interrupted, and belongs to no set of rows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from outstation.fleet.export.tables import KINDS, NO_DAY, Filters
from outstation.foundation import decoders, durable_files, ranges
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.protocol.documents.signed_document import SignedDocument, SigningDomain
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import PublicKey, SigningKey

MANIFEST, CHUNKS = "manifest.json", "_chunks"
FORMAT = "outstation-export-1"
_DOMAIN = SigningDomain("outstation/{}/export")
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
    """Messages that were exported together, and the files with their rows; `prev`: SHA-256 of the chunk before."""

    number: int
    prev: str
    messages: int
    ranges: list[LogRange]
    files: list[ExportedFile]


class _Content(msgspec.Struct):
    """Signed content: the number of chunks, and the SHA-256 of the last one's file; empty before the first."""

    fleet: str
    filters: Filters
    chunks: int = 0
    last: str = ""
    format: str = FORMAT


class Manifest(_Content):
    jws: str = ""

    def add(self, folder: Path, chunk: Chunk, key: SigningKey) -> None:
        """Write the chunk's file, then the manifest that names it. Raises StorageError."""
        data = msgspec.json.encode(chunk)
        durable_files.write(folder / _chunk_path(chunk.number), data, FILE_MODE)
        self.chunks, self.last = chunk.number, sha256(data)
        self.save(folder, key)

    def save(self, folder: Path, key: SigningKey) -> None:
        self.jws = _DOMAIN.sign(key, self._signed_content(), self.fleet).jws
        durable_files.write(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(self)), FILE_MODE)

    def find_signature_problem(self, collectors: Sequence[PublicKey]) -> str | None:
        """Return why the signature is not one of these keys over this content."""
        signers = {key.kid: Signer("collector", key) for key in collectors}
        try:
            _DOMAIN.check(SignedDocument(self._signed_content(), self.jws), signers.get, self.fleet)
        except MessageRefused as refused:
            return f"is not signed by a collector of this fleet: {refused}"
        return None

    def _signed_content(self) -> bytes:
        return msgspec.json.encode(_Content(self.fleet, self.filters, self.chunks, self.last, self.format))

    def read_chunks(self, folder: Path) -> Iterator[Chunk]:
        """Read the chunks in order, each once the next one names it. Raises UsageError where one is another file."""
        digest, waiting = "", None
        for number in range(1, self.chunks + 1):
            file = folder / _chunk_path(number)
            try:
                data = file.read_bytes()
                chunk = decoders.from_json(data, Chunk)
            except (OSError, msgspec.MsgspecError) as error:
                raise UsageError(f"{file}: cannot be read: {error}; export to a new folder") from None
            if (chunk.number, chunk.prev) != (number, digest):
                raise UsageError(f"{file}: does not follow the chunk before it; export to a new folder")
            if waiting is not None:
                yield waiting
            digest, waiting = sha256(data), chunk
        if digest != self.last:
            problem = f"is not the file that {MANIFEST} names"
            raise UsageError(f"{folder / _chunk_path(self.chunks)}: {problem}; export to a new folder")
        if waiting is not None:
            yield waiting


def load(folder: Path) -> Manifest | None:
    """Return the manifest in a folder; None if there is none. Raises UsageError."""
    try:
        manifest = decoders.from_json((folder / MANIFEST).read_bytes(), Manifest)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{folder / MANIFEST}: cannot be read: {error}; export to a new folder") from None
    if manifest.format != FORMAT:
        raise UsageError(f"{folder / MANIFEST}: has format {manifest.format!r}, this version reads {FORMAT!r}")
    return manifest


def _chunk_path(number: int) -> str:
    return f"{CHUNKS}/chunk-{number:06}.json"


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
