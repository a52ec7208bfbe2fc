"""Audit of an export: compare its files with their hashes, and their rows with the signed messages of the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from outstation.fleet.audit import pruned as pruned_devices
from outstation.fleet.database.interface import LogId
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.store import FleetStore
from outstation.fleet.export import manifest as manifests
from outstation.fleet.export.manifest import Chunk, ExportedFile, LogRange, Manifest
from outstation.fleet.export.tables import EXPORTED_MESSAGES, NO_DAY, TableBuilder
from outstation.foundation import ranges
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.protocol.wire.keys import PublicKey
from outstation.protocol.wire.messages import LoggedPayload
from outstation.protocol.wire.verification import verify_message

if TYPE_CHECKING:
    import pyarrow

MAX_PROBLEMS = 1000


class ExportReport(msgspec.Struct):
    """`pending`: stored messages that the export does not hold yet. `leftovers`: files that no chunk names.

    `pruned`: exported messages that `fleet db prune` removed since, so that only the hash of their file is compared.
    """

    folder: str
    files: int = 0
    rows: int = 0
    messages: int = 0
    pending: int = 0
    pruned: int = 0
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


def check_export(store: FleetStore, folder: Path, fleet: str, collectors: Sequence[PublicKey]) -> ExportReport:
    """Verify an export from the signed messages. Raises StorageError, and UsageError without a readable manifest.

    `collectors`: keys with which the manifest and retention statements are valid.
    """
    manifest = manifests.load(folder)
    if manifest is None:
        raise UsageError(f"{folder}: no export here; `outstation fleet db export --out DIR` makes one")
    report = ExportReport(str(folder))
    if manifest.fleet != fleet:
        report.add_problem(f"is the export of fleet {manifest.fleet!r}")
    if problem := manifest.find_signature_problem(collectors):
        report.add_problem(f"{manifests.MANIFEST} {problem}")
    chunks, named = list[Chunk](), set[str]()
    with store.snapshot():
        pruned, _ = pruned_devices.load(store, None, collectors)
        floors = {(name, log.log): log.through for name, device in pruned.items() for log in device.statement.logs}
        checker = _ChunkChecker(store, folder, manifest, floors, report)
        try:
            for chunk in manifest.read_chunks(folder):
                chunks.append(msgspec.structs.replace(chunk, files=[]))
                named |= {file.path for file in chunk.files}
                checker.check(chunk)
        except UsageError as error:
            report.add_problem(str(error))
        _count_pending(store, manifest, chunks, report)
    present = {str(file.relative_to(folder)) for file in folder.glob("kind=*/day=*/*")}
    report.leftovers = len(present - named)
    return report


class _ChunkChecker:
    """Compares chunks with the messages of the database. `floors`: (device, log) → seq up to which messages went."""

    def __init__(
        self, store: FleetStore, folder: Path, manifest: Manifest, floors: Mapping[LogId, int], report: ExportReport
    ) -> None:
        self._store, self._folder, self._manifest, self._floors = store, folder, manifest, floors
        self._keyring, self._report = Keyring(store), report

    def check(self, chunk: Chunk) -> None:
        builder, pruned_ranges = TableBuilder(self._manifest.filters), list[LogRange]()
        for device, log, first, last in chunk.ranges:
            expected = first
            for seq, kind, topic, payload, jws, received in self._store.log_messages(device, log, first, last):
                self._add_missing((device, log, expected, seq - 1), pruned_ranges)
                expected = seq + 1
                self._report.messages += 1
                body = self._verify((device, log, seq), topic, payload, jws)
                if body is not None and kind in EXPORTED_MESSAGES:
                    builder.add(body, payload, received)
            self._add_missing((device, log, expected, last), pruned_ranges)
        signed = builder.finish()
        for file in chunk.files:
            self._report.files += 1
            self._report.rows += file.rows
            table = signed.pop((file.kind, file.day or NO_DAY), None)
            if problem := _check_file(self._folder, file, chunk.number, table, pruned_ranges):
                self._report.add_problem(f"{file.path}: {problem}")
        for kind, day in signed:
            self._report.add_problem(f"chunk {chunk.number}: has no file with the {kind} of {day}")

    def _add_missing(self, missing: LogRange, pruned_ranges: list[LogRange]) -> None:
        device, log, first, last = missing
        through = min(last, self._floors.get((device, log), 0))
        if first <= through:
            pruned_ranges.append((device, log, first, through))
            self._report.pruned += through - first + 1
        if (start := max(first, through + 1)) <= last:
            self._report.add_problem(f"{device} {log} seq {start}-{last}: exported, but missing in the database")

    def _verify(self, key: tuple[str, str, int], topic: Any, payload: Any, jws: Any) -> LoggedPayload | None:
        place = f"{key[0]} {key[1]} seq {key[2]}"
        try:
            message = verify_message(topic, payload, (jws,), self._keyring.find_stored)
            self._keyring.require_in_bounds(message, stored=True)
        except (MessageRefused, TypeError, AttributeError) as error:
            self._report.add_problem(f"{place}: does not verify: {error}")
            return None
        body = message.body
        if not isinstance(body, LoggedPayload) or (body.device, body.log, body.seq) != key:
            self._report.add_problem(f"{place}: is another message than its signed payload says")
            return None
        return body


def _check_file(
    folder: Path, file: ExportedFile, number: int, signed: pyarrow.Table | None, pruned_ranges: Sequence[LogRange]
) -> str | None:
    """Return how a file differs from its hash, or from the rows of its messages; `pruned_ranges` are not compared."""
    import pyarrow
    from pyarrow import parquet

    if problem := file.find_path_problem(folder, number):
        return problem
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
    if file.rows != table.num_rows:
        return f"has {table.num_rows} rows, the manifest says {file.rows}"
    table = _decode_dictionaries(table)
    if pruned_ranges:
        table = _without(table, pruned_ranges)
    if signed is None:
        return f"has {table.num_rows} rows, its messages give none" if table.num_rows else None
    if not table.equals(_decode_dictionaries(signed), check_metadata=False):
        return f"has other rows than its messages give ({table.num_rows}, they give {signed.num_rows})"
    return None


def _without(table: pyarrow.Table, pruned_ranges: Sequence[LogRange]) -> pyarrow.Table:
    """Return a table without the rows of pruned messages."""
    import pyarrow

    spans: dict[LogId, list[tuple[int, int]]] = {}
    for device, log, first, last in pruned_ranges:
        spans.setdefault((device, log), []).append((first, last))
    places = zip(*(table[name].to_pylist() for name in ("device", "log", "seq")), strict=True)
    stays = [
        not any(first <= seq <= last for first, last in spans.get((device, log), ())) for device, log, seq in places
    ]
    return table.filter(pyarrow.array(stays, pyarrow.bool_()))


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
