"""`outstation fleet evidence`: gather, write, sign. The same database, bundles and time give the same bytes."""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent import __version__, durable_files
from agent.errors import StorageError, StorageFull, UsageError
from agent.evaluation.document import Evaluation
from agent.fleet.database.evidence import EvidenceQueries
from agent.fleet.database.interface import Connection
from agent.fleet.database.store import FleetStore
from agent.fleet.evidence.format import frameworks, manifest
from agent.fleet.evidence.format.contents import WRITE_LIMITS, Incident, SignedMessage
from agent.fleet.evidence.format.manifest import MANIFEST_FILE, SIGNATURE_FILE, EvidenceManifest, FileEntry
from agent.fleet.evidence.gather import bundles, trusted_keys
from agent.fleet.evidence.gather import sbom as software
from agent.fleet.evidence.gather.gather import EvidenceFacts, MessageVerifier, gather
from agent.fleet.evidence.gather.sbom import Sbom
from agent.fleet.evidence.page.page import render_html
from agent.wire.keys import PublicKey, SigningKey

_CSV_COLUMNS = (
    "began",
    "ended",
    "seconds",
    "state",
    "severity",
    "device",
    "task",
    "alert",
    "subject",
    "summary",
    "clock",
)


class EvidenceSources(msgspec.Struct, frozen=True):
    """Where it comes from beside the database. `home`: the fleet's folder.

    `operator` signs; `operators` are the keys whose decisions count, that one and former ones.
    """

    fleet: str
    fleet_dir: Path
    operator: SigningKey
    operators: Sequence[PublicKey]
    collector: PublicKey
    publishers: Sequence[PublicKey] = ()
    bundles: Sequence[Path] = ()
    evaluations: Sequence[tuple[bytes, Evaluation]] = ()


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
    """The signed folder `out`. Raises UsageError, BadBundle, StorageError; then nothing is there."""
    draft = FolderWriter(out)
    try:
        with store.snapshot() as db:
            facts = _gather_facts(store, db, sources, as_of, advance)
            _write_messages(EvidenceQueries(store, db), MessageVerifier(store), draft, facts)
        found = _write_files(draft, sources, facts)
        draft.commit()
    except BaseException:
        draft.discard()
        raise
    return EvidenceFolder(facts, found, draft.files)


def _gather_facts(
    store: FleetStore, db: Connection, sources: EvidenceSources, as_of: str | None, advance: Callable[[int], None]
) -> EvidenceFacts:
    roles = trusted_keys.build_role_keys(sources.operators, sources.collector, sources.publishers)
    facts = gather(store, db, sources.fleet, as_of, roles, advance)
    # Devices take bundles from operators, too.
    known = [*sources.publishers, *sources.operators]
    facts.bundles = bundles.gather(
        sources.fleet_dir, sources.bundles, known, sources.evaluations, facts.tasks_by_digest
    )
    facts.omitted["bundles"] += facts.bundles.omitted
    return facts


def _write_files(writer: FolderWriter, sources: EvidenceSources, facts: EvidenceFacts) -> Sbom:
    metadata, facts.signature_chain, facts.repository_problems = trusted_keys.read_repository(sources.fleet_dir)
    for path, content in sorted({**facts.bundles.files, **metadata}.items()):
        writer.write(path, content)
    bill = software.build(facts.fleet, facts.as_of, facts.bundles.cards)
    writer.write("sbom.cdx.json", bill.document)
    writer.write("decisions.jsonl", (_encode_line(one) for one in facts.decisions))
    writer.write("incidents.csv", _encode_csv(facts.incidents))
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
    points = frameworks.evaluate_support([one.path for one in writer.files], _list_empty_files(facts))
    writer.write("mapping.json", _encode_document({"points": points, "not_covered": frameworks.NOT_COVERED}))
    writer.write("index.html", render_html(facts, bill, points, [*writer.files]).encode())
    _write_manifest(writer, sources.operator, facts)
    return bill


def _write_manifest(writer: FolderWriter, key: SigningKey, facts: EvidenceFacts) -> None:
    head = EvidenceManifest(
        v=1,
        kind="evidence",
        fleet=facts.fleet,
        at=facts.as_of,
        agent=__version__,
        span=facts.span,
        messages=facts.message_count,
        left_out={name: n for name, n in sorted(facts.omitted.items()) if n},
        keys=facts.keys,
        files=sorted(writer.files, key=lambda one: one.path),
    )
    data = manifest.encode(head)
    writer.write(MANIFEST_FILE, data)
    writer.write(SIGNATURE_FILE, manifest.sign(data, key))


def _list_empty_files(facts: EvidenceFacts) -> set[str]:
    """Files that say nothing, which therefore support nothing."""
    found = {"comparisons.json": facts.comparisons, "published.json": facts.signature_chain.targets}
    found |= {"accuracy.json": facts.accuracy, "drift.json": facts.drift["tasks"], "running.json": facts.running_tasks}
    # A list without incidents says something as long as somebody could have told of one.
    found |= {
        "decisions.jsonl": facts.decisions,
        "incidents.json": facts.message_count,
        "audit.json": facts.message_count,
    }
    return {path for path, content in found.items() if not content}


def _write_messages(
    queries: EvidenceQueries, verifier: MessageVerifier, writer: FolderWriter, facts: EvidenceFacts
) -> None:
    """The signed messages that the folder relies on, read again and verified again, in parts of bounded size."""
    lines = _iter_message_lines(queries, verifier, facts)
    line, number = next(lines, None), 0
    while line is not None:
        part: list[bytes] = []
        size = 0
        while line is not None and len(part) < WRITE_LIMITS.part_messages and size < WRITE_LIMITS.part_bytes:
            part.append(line)
            size += len(line)
            line = next(lines, None)
        number += 1
        writer.write(f"messages/part-{number:04}.jsonl", part)


def _iter_message_lines(queries: EvidenceQueries, verifier: MessageVerifier, facts: EvidenceFacts) -> Iterator[bytes]:
    room = WRITE_LIMITS.message_bytes
    for place in facts.message_refs:
        stored = queries.load_message(place.device, place.log, place.seq)
        if stored is None or verifier.verify((*msgspec.structs.astuple(place), *stored)) is None:
            continue
        line = _encode_line(SignedMessage(stored[0], stored[1].decode(), stored[2]))
        room -= len(line)
        if room < 0:
            facts.omitted["messages"] += 1
            continue
        yield line


def _encode_line(record: msgspec.Struct) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def _encode_document(content: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def _encode_csv(incidents: Iterable[Incident]) -> bytes:
    """For a spreadsheet, which must not take what devices wrote for formulas."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_CSV_COLUMNS)
    for one in incidents:
        writer.writerow(_escape_cell(getattr(one, name)) for name in _CSV_COLUMNS)
    return text.getvalue().encode()


def _escape_cell(value: object) -> object:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return "" if value is None else value


class FolderWriter:
    """A folder that becomes `out` when it is finished. Raises UsageError where something is there already."""

    def __init__(self, out: Path) -> None:
        if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            raise UsageError(f"--out {out}: is there already; name a new folder, evidence is never written over")
        if not out.absolute().parent.is_dir():
            raise UsageError(f"--out {out}: its parent folder is not there; make it first")
        self.out = out
        self._staging = out.with_name(f".{out.name}.new")
        self.files: list[FileEntry] = []
        try:
            # What a making that was killed has left.
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(mode=0o755)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be made: {error.strerror}") from None

    def write(self, path: str, parts: bytes | Iterable[bytes]) -> None:
        """A file of the folder, which the manifest will list."""
        size, sum_ = 0, hashlib.sha256()
        try:
            target = self._staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                for part in (parts,) if isinstance(parts, bytes) else parts:
                    file.write(part)
                    sum_.update(part)
                    size += len(part)
                durable_files.flush(file)
        except OSError as error:
            kind = StorageFull if error.errno == 28 else StorageError
            raise kind(f"{self.out}: {path} cannot be written: {error.strerror}; nothing was left there") from None
        if path not in (MANIFEST_FILE, SIGNATURE_FILE):
            self.files.append(FileEntry(path, size, sum_.hexdigest()))

    def commit(self) -> None:
        """All of it is on the disk, and has its name."""
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
