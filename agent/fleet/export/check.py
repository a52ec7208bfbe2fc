"""Audit of an export: compare its files with their hashes, and their rows with the signed messages of the database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent import ranges
from agent.errors import MessageRefused, UsageError
from agent.fleet.database.keyring import Keyring
from agent.fleet.database.store import FleetStore
from agent.fleet.export import manifest as manifests
from agent.fleet.export.manifest import Chunk, ExportedFile, Manifest
from agent.fleet.export.tables import EXPORTED_MESSAGES, NO_DAY, TableBuilder
from agent.wire.messages import LoggedPayload, verify_message

if TYPE_CHECKING:
    import pyarrow

MAX_PROBLEMS = 1000


class ExportReport(msgspec.Struct):
    """`pending`: stored messages that the export does not hold yet. `leftovers`: files that no chunk names."""

    folder: str
    files: int = 0
    rows: int = 0
    messages: int = 0
    pending: int = 0
    leftovers: int = 0
    problem_count: int = 0
    problems: list[str] = []

    @property
    def passed(self) -> bool:
        return not self.problem_count

    def add_problem(self, problem: str) -> None:
        self.problem_count += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **msgspec.structs.asdict(self)}


def check_export(
    store: FleetStore, folder: Path, fleet: str, progress: Callable[[int], None] = lambda _: None
) -> ExportReport:
    """Verify an export from the signed messages. Raises StorageError, and UsageError without a readable manifest."""
    manifest = manifests.load(folder)
    if manifest is None:
        raise UsageError(f"{folder}: no export here; `outstation fleet export --out DIR` makes one")
    report = ExportReport(str(folder))
    if manifest.fleet != fleet:
        report.add_problem(f"is the export of fleet {manifest.fleet!r}")
    chunks, named = list[Chunk](), set[str]()
    with store.snapshot():
        keyring = Keyring(store)
        try:
            for chunk in manifest.read_chunks(folder):
                chunks.append(Chunk(chunk.number, chunk.messages, chunk.ranges, []))
                named |= {file.path for file in chunk.files}
                _check_chunk(store, keyring, folder, manifest, chunk, report)
                progress(chunk.messages)
        except UsageError as error:
            report.add_problem(str(error))
        _count_pending(store, manifest, chunks, report)
    present = {str(file.relative_to(folder)) for file in folder.glob("kind=*/day=*/*")}
    report.leftovers = len(present - named)
    return report


def _check_chunk(
    store: FleetStore, keyring: Keyring, folder: Path, manifest: Manifest, chunk: Chunk, report: ExportReport
) -> None:
    builder = TableBuilder(manifest.filters)
    for device, log, first, last in chunk.ranges:
        expected = first
        for seq, kind, topic, payload, jws, received in store.log_messages(device, log, first, last):
            if seq != expected:
                report.add_problem(f"{device} {log} seq {expected}-{seq - 1}: exported, but missing in the database")
            expected = seq + 1
            report.messages += 1
            try:
                message = verify_message(topic, payload, (jws,), keyring.find_stored)
                keyring.require_in_bounds(message, stored=True)
            except (MessageRefused, TypeError, AttributeError) as error:
                report.add_problem(f"{device} {log} seq {seq}: does not verify: {error}")
                continue
            body = message.body
            if not isinstance(body, LoggedPayload) or (body.device, body.log, body.seq) != (device, log, seq):
                report.add_problem(f"{device} {log} seq {seq}: is another message than its signed payload says")
            elif kind in EXPORTED_MESSAGES:
                builder.add(body, payload, received)
        if expected <= last:
            report.add_problem(f"{device} {log} seq {expected}-{last}: exported, but missing in the database")
    signed = builder.finish()
    for file in chunk.files:
        report.files += 1
        report.rows += file.rows
        table = signed.pop((file.kind, file.day or NO_DAY), None)
        if problem := _check_file(folder, file, chunk.number, table):
            report.add_problem(f"{file.path}: {problem}")
    for kind, day in signed:
        report.add_problem(f"chunk {chunk.number}: has no file with the {kind} of {day} that its messages give")


def _check_file(folder: Path, file: ExportedFile, number: int, signed: pyarrow.Table | None) -> str | None:
    """Return how a file differs from its hash, or from the rows that its messages give."""
    import pyarrow
    from pyarrow import parquet

    if file.path != f"kind={file.kind}/day={file.day or NO_DAY}/part-{number:06}.parquet":
        return "has another name than its kind and day give"
    try:
        data = (folder / file.path).read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if manifests.sha256(data) != file.sha256:
        return "is not the file that was written: its SHA-256 differs"
    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(data)).read()
    except (pyarrow.ArrowException, OSError) as error:
        return f"is no Parquet file: {error}"
    if signed is None:
        return f"has {table.num_rows} rows, its messages give none"
    if not _decode_dictionaries(table).equals(_decode_dictionaries(signed), check_metadata=False):
        return f"has other rows than its messages give ({table.num_rows}, they give {signed.num_rows})"
    return None if file.rows == signed.num_rows else f"has {signed.num_rows} rows, the manifest says {file.rows}"


def _decode_dictionaries(table: pyarrow.Table) -> pyarrow.Table:
    """Return a table without dictionaries, whose order depends on the version of pyarrow."""
    import pyarrow

    columns = [
        column.cast(column.type.value_type) if pyarrow.types.is_dictionary(column.type) else column
        for column in table.columns
    ]
    return pyarrow.table(columns, names=table.column_names)


def _count_pending(store: FleetStore, manifest: Manifest, chunks: list[Chunk], report: ExportReport) -> None:
    exported = manifests.exported_ranges(iter(chunks))
    for device, log, last_seq in store.logs():
        if manifest.filters.device in (None, device):
            spans = ranges.subtract([(1, last_seq)], exported.get((device, log), []))
            report.pending += sum(1 for span in spans for _ in store.message_keys(device, log, *span))
