"""`outstation fleet evidence`: gather facts, write the folder, sign its manifest.

Equal database, bundles, software and moment give equal bytes.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from outstation import __version__
from outstation.evidence.format import frameworks, manifest
from outstation.evidence.format.contents import (
    HEAD_PREFIX,
    OMITTED_LINKS,
    RETENTION_FILE,
    STAMP_PREFIX,
    WRITE_LIMITS,
    IncidentRecord,
    RetentionRecord,
    SignedMessage,
)
from outstation.evidence.format.manifest import MANIFEST_FILE, SIGNATURE_FILE, EvidenceManifest, FileEntry
from outstation.evidence.gather import bundles, sbom, trusted_keys
from outstation.evidence.gather.chains import ChainBuilder
from outstation.evidence.gather.gather import EvidenceFacts, MessageVerifier, gather
from outstation.evidence.gather.sbom import Sbom
from outstation.evidence.page.page import render_html
from outstation.evidence.timestamps.stamp import SUFFIXES, Stamp
from outstation.fleet.database.evidence import EvidenceQueries
from outstation.fleet.database.store import FleetStore
from outstation.foundation import durable_files
from outstation.foundation.errors import StorageError, StorageFull, UsageError, explain
from outstation.foundation.text import csv_text
from outstation.protocol.wire.keys import PublicKey, SigningKey
from outstation.workbench.evaluation.document import Evaluation

_CSV_COLUMNS = [
    *("started", "ended", "seconds", "state", "severity", "device", "task", "alert", "subject", "summary", "clock")
]


class EvidenceSources(msgspec.Struct, frozen=True):
    """Sources beside the database. `operator` signs the folder.

    Decisions count if signed by one of `operators`: the current key and former ones.
    """

    fleet: str
    fleet_dir: Path
    operator: SigningKey
    operators: Sequence[PublicKey]
    collector: PublicKey
    publishers: Sequence[PublicKey] = ()
    bundles: Sequence[Path] = ()
    evaluations: Sequence[tuple[bytes, Evaluation]] = ()
    # Files of `outstation head` and of `outstation fleet evidence stamp`.
    heads: Sequence[bytes] = ()
    stamps: Sequence[Stamp] = ()


class EvidenceFolder(msgspec.Struct, frozen=True):
    facts: EvidenceFacts
    sbom: Sbom
    files: list[FileEntry]


def write_folder(
    store: FleetStore,
    sources: EvidenceSources,
    out: Path,
    as_of: str | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> EvidenceFolder:
    """Write the signed folder `out`. Raises UsageError, BadBundle or StorageError; `out` is then absent."""
    writer = FolderWriter(out)
    try:
        with store.snapshot() as db:
            roles = trusted_keys.build_role_keys(sources.operators, sources.collector, sources.publishers)
            facts = gather(store, db, sources.fleet, as_of, roles, advance)
            # Devices accept bundles signed by operators, too.
            signers, running = [*sources.publishers, *sources.operators], facts.tasks_by_digest
            facts.bundles = bundles.gather(sources.fleet_dir, sources.bundles, signers, sources.evaluations, running)
            facts.omitted["bundles"] += facts.bundles.omitted
            queries = EvidenceQueries(store, db)
            # The signed messages that the folder refers to, read and verified again.
            messages = _iter_message_lines(queries, MessageVerifier(store), facts)
            _write_parts(writer, "messages", messages, WRITE_LIMITS.part_messages)
            _write_chains(queries, writer, facts)
            if statements := [
                RetentionRecord(payload.decode(), token) for payload, token in queries.stream_retention()
            ]:
                writer.write(RETENTION_FILE, (_encode_line(statement) for statement in statements))
        bill_of_materials = _write_files(writer, sources, facts)
        writer.commit()
    except BaseException:
        writer.discard()
        raise
    return EvidenceFolder(facts, bill_of_materials, writer.files)


def _write_files(writer: FolderWriter, sources: EvidenceSources, facts: EvidenceFacts) -> Sbom:
    metadata, facts.signature_chain, facts.repository_problems = trusted_keys.read_repository(sources.fleet_dir)
    for path, content in sorted({**facts.bundles.files, **metadata}.items()):
        writer.write(path, content)
    bill_of_materials = sbom.build(facts.fleet, facts.as_of, facts.bundles.cards)
    writer.write("sbom.cdx.json", bill_of_materials.document)
    writer.write("decisions.jsonl", (_encode_line(decision) for decision in facts.decisions))
    writer.write("incidents.csv", _encode_csv(facts.incidents))
    for number, head in enumerate(sources.heads, 1):
        writer.write(f"{HEAD_PREFIX}{number:04}.json", head)
    for number, stamp in enumerate(sources.stamps, 1):
        for suffix, content in zip(SUFFIXES, (stamp.heads, stamp.request, stamp.response), strict=True):
            writer.write(f"{STAMP_PREFIX}{number:04}{suffix}", content)
    documents: dict[str, Any] = {
        "incidents.json": facts.incidents,
        "running.json": facts.running_tasks,
        "history.json": facts.bundle_history,
        "accuracy.json": facts.accuracy,
        "comparisons.json": facts.comparisons,
        "published.json": facts.signature_chain,
        "drift.json": facts.drift,
        "audit.json": facts.audit,
    }
    for path, document in documents.items():
        writer.write(path, _encode_document(document))
    points = frameworks.evaluate_support([file.path for file in writer.files], _list_empty_files(facts))
    writer.write("mapping.json", _encode_document({"points": points, "not_covered": frameworks.NOT_COVERED}))
    writer.write("index.html", render_html(facts, bill_of_materials, points, [*writer.files]).encode())
    _write_manifest(writer, sources.operator, facts)
    return bill_of_materials


def _write_manifest(writer: FolderWriter, key: SigningKey, facts: EvidenceFacts) -> None:
    head = EvidenceManifest(
        v=1,
        kind="evidence",
        fleet=facts.fleet,
        as_of=facts.as_of,
        agent=__version__,
        span=facts.span,
        messages=facts.message_count,
        omitted={name: n for name, n in sorted(facts.omitted.items()) if n},
        keys=facts.keys,
        files=sorted(writer.files, key=lambda file: file.path),
    )
    data = manifest.encode(head)
    writer.write(MANIFEST_FILE, data)
    writer.write(SIGNATURE_FILE, manifest.KIND.sign_file(key, data))


def _list_empty_files(facts: EvidenceFacts) -> set[str]:
    """Return the files that support no framework point because they have no content."""
    contents = {"comparisons.json": facts.comparisons, "published.json": facts.signature_chain.targets}
    contents |= {
        "accuracy.json": facts.accuracy,
        "drift.json": facts.drift["tasks"],
        "running.json": facts.running_tasks,
        "decisions.jsonl": facts.decisions,
    }
    # A list without incidents is evidence as long as a message could have reported one.
    contents |= {"incidents.json": facts.message_count, "audit.json": facts.message_count}
    return {path for path, content in contents.items() if not content}


def _write_chains(queries: EvidenceQueries, writer: FolderWriter, facts: EvidenceFacts) -> None:
    builder = ChainBuilder()
    runs = builder.build_runs(queries.stream_log())
    _write_parts(writer, "chains", (_encode_line(run) for run in runs), WRITE_LIMITS.part_runs)
    facts.omitted[OMITTED_LINKS] += builder.omitted


def _write_parts(writer: FolderWriter, folder: str, lines: Iterator[bytes], max_lines: int) -> None:
    """Write lines in files of bounded size."""
    line, number = next(lines, None), 0
    while line is not None:
        part: list[bytes] = []
        size = 0
        while line is not None and len(part) < max_lines and size < WRITE_LIMITS.part_bytes:
            part.append(line)
            size += len(line)
            line = next(lines, None)
        number += 1
        writer.write(f"{folder}/part-{number:04}.jsonl", part)


def _iter_message_lines(queries: EvidenceQueries, verifier: MessageVerifier, facts: EvidenceFacts) -> Iterator[bytes]:
    remaining = WRITE_LIMITS.message_bytes
    for ref in facts.message_refs:
        stored = queries.load_message(ref.device, ref.log, ref.seq)
        if stored is None or verifier.verify((*msgspec.structs.astuple(ref), *stored)) is None:
            continue
        line = _encode_line(SignedMessage(stored[0], stored[1].decode(), stored[2]))
        remaining -= len(line)
        if remaining < 0:
            facts.omitted["messages"] += 1
            continue
        yield line


def _encode_line(record: msgspec.Struct) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def _encode_document(content: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def _encode_csv(incidents: Iterable[IncidentRecord]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_CSV_COLUMNS)
    for incident in incidents:
        writer.writerow(_to_cell(getattr(incident, name)) for name in _CSV_COLUMNS)
    return text.getvalue().encode()


def _to_cell(value: object) -> object:
    return csv_text(value) if isinstance(value, str) else "" if value is None else value


class FolderWriter:
    """Writer of a folder under a temporary name, renamed to `out` once all files are on disk.

    Raises UsageError if `out` exists and is not an empty folder.
    """

    def __init__(self, out: Path) -> None:
        if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            raise UsageError(f"--out {out}: exists already; evidence is never overwritten, so name a new folder")
        if not out.absolute().parent.is_dir():
            raise UsageError(f"--out {out}: its parent folder does not exist; create it first")
        self.out = out
        self._staging = out.with_name(f".{out.name}.new")
        self.files: list[FileEntry] = []
        try:
            # Left by a killed run.
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(mode=0o755)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be created: {explain(error)}") from None

    def write(self, path: str, parts: bytes | Iterable[bytes]) -> None:
        """Write a file and list it for the manifest."""
        size, checksum = 0, hashlib.sha256()
        try:
            target = self._staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                for part in (parts,) if isinstance(parts, bytes) else parts:
                    file.write(part)
                    checksum.update(part)
                    size += len(part)
                durable_files.flush(file)
        except OSError as error:
            kind = StorageFull if error.errno == errno.ENOSPC else StorageError
            raise kind(f"{self.out}: {path} cannot be written: {error.strerror}; no folder was created") from None
        if path not in (MANIFEST_FILE, SIGNATURE_FILE):
            self.files.append(FileEntry(path, size, checksum.hexdigest()))

    def commit(self) -> None:
        """Flush all folders and rename the staging folder to `out`. Raises StorageError."""
        try:
            for folder in [path for path in self._staging.rglob("*") if path.is_dir()] + [self._staging]:
                durable_files.fsync(folder)
            if self.out.exists():
                self.out.rmdir()
            self._staging.rename(self.out)
            durable_files.fsync(self.out.absolute().parent)
        except OSError as error:
            raise StorageError(f"{self.out}: cannot be finished: {error.strerror}") from None

    def discard(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
