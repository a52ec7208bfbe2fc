"""Export of the fleet's messages to Parquet, partitioned by kind and day, in steps that can be interrupted.

A run exports the messages that no chunk has yet, in the order of their arrival. Each chunk is complete once the
manifest names it; the next run continues behind the last one. The files depend on the messages alone: interrupted or
not, the same messages give the same files.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from outstation.fleet.database.store import FleetStore
from outstation.fleet.export import manifest as manifests
from outstation.fleet.export.manifest import FILE_MODE, Chunk, ExportedFile, LogRange, Manifest
from outstation.fleet.export.tables import EXPORTED_MESSAGES, NO_DAY, Filters, TableBuilder, arrow_schema
from outstation.foundation import durable_files, ranges
from outstation.foundation.errors import MessageRefused, StorageDamaged, StorageError, UsageError, explain
from outstation.protocol.wire.keys import PublicKey, SigningKey
from outstation.protocol.wire.messages import LoggedPayload
from outstation.protocol.wire.verification import decode

if TYPE_CHECKING:
    import pyarrow

# A chunk ends with the first of these; they bound the memory of an export and the work lost with an interruption.
_CHUNK_MESSAGES, _CHUNK_ROWS = 20_000, 200_000
_LOCK = ".lock"
# (received, device, log, seq)
Key = tuple[str, str, str, int]


class ExportSummary(msgspec.Struct):
    """Counts of one run: chunks, files, messages, and rows by kind."""

    chunks: int = 0
    files: int = 0
    messages: int = 0
    bytes: int = 0
    rows: dict[str, int] = {}


def export(
    store: FleetStore,
    folder: Path,
    fleet: str,
    filters: Filters,
    key: SigningKey,
    collectors: Sequence[PublicKey] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> ExportSummary:
    """Add the messages to `folder` that it does not hold, and sign its manifest with a collector's `key`.

    `collectors`: further keys that may have signed it before. Raises StorageError, and UsageError for another export.
    """
    arrow_schema("results")
    try:
        durable_files.make_folder(folder)
        with durable_files.lock(folder / _LOCK, wait=False):
            manifest = _open_manifest(folder, fleet, filters, key, collectors)
            return _add_chunks(store, folder, manifest, key, progress)
    except BlockingIOError:
        raise UsageError(f"{folder}: another export writes here; wait until it ends") from None
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {explain(error)}") from error


def _open_manifest(
    folder: Path, fleet: str, filters: Filters, key: SigningKey, collectors: Sequence[PublicKey]
) -> Manifest:
    manifest = manifests.load(folder)
    if manifest is None:
        if others := [path.name for path in folder.iterdir() if path.name not in (_LOCK, f"{manifests.MANIFEST}.new")]:
            raise UsageError(f"{folder}: has other files, such as {others[0]!r}; name a new folder")
        manifest = Manifest(fleet, filters)
        manifest.save(folder, key)
        return manifest
    if manifest.fleet != fleet:
        raise UsageError(f"{folder}: is the export of fleet {manifest.fleet!r}, not of {fleet!r}; name a new folder")
    # Signing it again would make the content of another writer the collector's own.
    if problem := manifest.find_signature_problem([key.public, *collectors]):
        raise UsageError(f"{folder / manifests.MANIFEST}: {problem}; export to a new folder")
    if filters not in (manifest.filters, Filters()):
        former = msgspec.json.encode(manifest.filters).decode()
        raise UsageError(f"{folder}: was begun with {former}; repeat these options or none, or name a new folder")
    return manifest


def _add_chunks(
    store: FleetStore, folder: Path, manifest: Manifest, key: SigningKey, progress: Callable[[int], None]
) -> ExportSummary:
    summary = ExportSummary()
    chunks = [*manifest.read_chunks(folder)]
    _remove_leftovers(folder, {file.path for chunk in chunks for file in chunk.files})
    with store.snapshot(), contextlib.closing(sqlite3.connect("", isolation_level=None)) as spool:
        _spool_keys(store, spool, manifests.exported_ranges(iter(chunks)), manifest.filters.device)
        queue = _KeyQueue(spool)
        while keys := queue.pop_chunk():
            chunk = _write_chunk(store, folder, manifest, keys, queue)
            manifest.add(folder, chunk, key)
            summary.chunks += 1
            summary.files += len(chunk.files)
            summary.messages += chunk.messages
            summary.bytes += sum(file.bytes for file in chunk.files)
            for file in chunk.files:
                summary.rows[file.kind] = summary.rows.get(file.kind, 0) + file.rows
            progress(chunk.messages)
    return summary


def _remove_leftovers(folder: Path, named: set[str]) -> None:
    for file in folder.glob("kind=*/day=*/*"):
        if str(file.relative_to(folder)) not in named:
            durable_files.remove(file)


def _spool_keys(
    store: FleetStore,
    spool: sqlite3.Connection,
    exported: dict[tuple[str, str], list[tuple[int, int]]],
    only: str | None,
) -> None:
    """Gather the keys of new messages outside the memory, because they are needed in the order of arrival."""
    spool.execute("CREATE TABLE keys (received TEXT, device TEXT, log TEXT, seq INTEGER)")
    for device, log, last_seq in store.logs():
        if only not in (None, device):
            continue
        spans = ranges.subtract([(1, last_seq)], exported.get((device, log), []))
        for first, last in spans:
            keys = ((at, device, log, seq) for seq, at in store.message_keys(device, log, first, last))
            spool.executemany("INSERT INTO keys VALUES (?, ?, ?, ?)", keys)


class _KeyQueue:
    """Keys of new messages in the order of arrival."""

    def __init__(self, spool: sqlite3.Connection) -> None:
        self._rows = spool.execute("SELECT received, device, log, seq FROM keys ORDER BY 1, 2, 3, 4")
        self._returned: list[Key] = []

    def pop_chunk(self) -> list[Key]:
        """Return the keys of the next chunk, by their place in the logs."""
        keys = [*self._returned, *islice(self._rows, _CHUNK_MESSAGES - len(self._returned))]
        self._returned = []
        return sorted(keys, key=itemgetter(1, 2, 3))

    def put_back(self, keys: list[Key]) -> None:
        """Return the end of the last chunk, which was too large."""
        self._returned = sorted(keys)


def _write_chunk(store: FleetStore, folder: Path, manifest: Manifest, keys: list[Key], queue: _KeyQueue) -> Chunk:
    builder, exported, count = TableBuilder(manifest.filters), list[LogRange](), 0
    for device, log, first, last in _to_ranges(keys):
        end = first - 1
        if builder.row_count < _CHUNK_ROWS:
            for seq, kind, _, payload, _, received in store.log_messages(device, log, first, last):
                if kind in EXPORTED_MESSAGES:
                    builder.add(_decode(store, (device, log, seq), payload), payload, received)
                end = seq
                if builder.row_count >= _CHUNK_ROWS:
                    break
        if end >= first:
            exported.append((device, log, first, end))
            count += end - first + 1
    if count < len(keys):
        queue.put_back(keys[count:])
    number = manifest.chunks + 1
    files = [_write_file(folder, kind, day, number, table) for (kind, day), table in builder.finish().items()]
    return Chunk(number, manifest.last, count, exported, files)


def _decode(store: FleetStore, key: tuple[str, str, int], payload: bytes) -> LoggedPayload:
    problem = "a message in it cannot be read"
    try:
        body = decode(payload)
        if isinstance(body, LoggedPayload):
            return body
    except (MessageRefused, TypeError) as error:
        problem = str(error)
    device, log, seq = key
    raise StorageDamaged(f"{store.name}: {device} {log} seq {seq}: {problem}; see `outstation fleet audit`")


def _write_file(folder: Path, kind: str, day: str, number: int, table: pyarrow.Table) -> ExportedFile:
    path, data = manifests.part_path(kind, day, number), to_parquet(table)
    durable_files.write(folder / path, data, FILE_MODE)
    return ExportedFile(path, kind, None if day == NO_DAY else day, table.num_rows, len(data), manifests.sha256(data))


def to_parquet(table: pyarrow.Table) -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(table, buffer, compression="zstd")
    data: bytes = buffer.getvalue().to_pybytes()
    return data


def _to_ranges(keys: list[Key]) -> Iterator[LogRange]:
    """Return the keys, by their place in the logs, as ranges."""
    for (device, log), group in groupby(keys, key=itemgetter(1, 2)):
        for first, last in ranges.from_numbers(seq for *_, seq in group):
            yield device, log, first, last
