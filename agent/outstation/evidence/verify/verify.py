"""`outstation fleet evidence verify`: verification of an evidence folder with public keys.

Rules, in order:
- one of the given keys signed the manifest; only then is the manifest parsed
- the folder holds exactly the listed files, as regular files with the listed size and SHA-256
- a listed device key signed every message in messages/, and no message occurs twice
- every message lies in the hash chain of its log, and so does each head that a device signed or an authority stamped
- no message is dated after a time stamp that covers it, or long before one that does not
- claims of decisions, incidents, accuracy and running tasks about a message match that message
- a listed operator key signed every roll-out decision, and the decisions of a roll-out form a chain
- the audit of the database passed, and its verdict agrees with its own counts
- comparisons equal the statistics computed again from their messages
- each role of the TUF metadata is signed as its delegator requires, starting at the first root
- a bundle's manifest has the digest in its card; if the card says so, a listed publisher signed it

Nothing is unpacked, no link is followed, no file is read beyond its signed size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from outstation.evidence.format import contents, manifest
from outstation.evidence.format.contents import HEAD_PREFIX, READ_LIMITS, WITNESS_FOLDER, BundleCard
from outstation.evidence.format.manifest import MANIFEST_FILE, SIGNATURE_FILE, EvidenceManifest, TrustedKey
from outstation.evidence.timestamps import stamp
from outstation.evidence.timestamps.stamp import Stamp
from outstation.evidence.verify import reader
from outstation.evidence.verify.chains import ChainChecker
from outstation.evidence.verify.claims import ClaimChecker
from outstation.evidence.verify.reader import FolderReader, VerificationReport, read_file
from outstation.evidence.verify.stamps import StampChecker, Witnesses
from outstation.fleet.repository import signature_chain
from outstation.fleet.repository.signature_chain import SignatureChain
from outstation.foundation import decoders
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.foundation.strict_json import check_strict_json
from outstation.ml.model.bundle.bundle import MANIFEST_DOMAIN
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import PublicKey, parse_public_key
from outstation.protocol.wire.messages import LoggedPayload
from outstation.protocol.wire.verification import verify_message

_METADATA_FOLDER, _PUBLISHED_FILE = "repository/", "published.json"
_CHAIN_FOLDER = "chains/"


def verify(folder: Path, keys: list[PublicKey], witnesses: Witnesses | None = None) -> VerificationReport:
    """Verify a folder against the operators' `keys`, and `witnesses` from elsewhere.

    Raises UsageError if there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name the folder that `outstation fleet evidence --out` wrote")
    report = VerificationReport()
    head = _read_manifest(folder, keys, report)
    if head is None:
        return report
    report.fleet, report.as_of = head.fleet, head.as_of
    present = reader.find_listed_files(folder, head, report)
    unaltered = {
        file.path: file for file in head.files if file.path in present and reader.is_unaltered(folder, file, report)
    }
    report.files = len(unaltered)
    _verify_contents(FolderReader(folder, unaltered, report), head, witnesses or Witnesses())
    return report


def _read_manifest(folder: Path, keys: list[PublicKey], report: VerificationReport) -> EvidenceManifest | None:
    data = reader.read_file(folder, MANIFEST_FILE, READ_LIMITS.manifest_bytes, report)
    token = reader.read_file(folder, SIGNATURE_FILE, READ_LIMITS.token_bytes, report)
    if data is None or token is None:
        return None
    known = {key.kid: Signer("operator", key) for key in keys}
    try:
        report.signer = manifest.KIND.check_file(data, token, known.get).key.kid
    except MessageRefused as refusal:
        report.add_problem(SIGNATURE_FILE, f"{refusal}: none of the {len(known)} given keys signed {MANIFEST_FILE}")
        return None
    try:
        return manifest.decode(data)
    except MessageRefused as refusal:
        report.add_problem(MANIFEST_FILE, str(refusal))
        return None


def _verify_contents(reader: FolderReader, head: EvidenceManifest, witnesses: Witnesses) -> None:
    report = reader.report
    # First: of many problems, this one counts most.
    _verify_audit(reader)
    messages = {file.path for file in head.files if file.path.startswith("messages/")}
    chains = ChainChecker(head, report.add_problem)
    claims = ClaimChecker(head, chains, report.add_problem, messages_complete=messages <= set(reader.verified_files))
    stamps = StampChecker(head, chains, witnesses, report)
    for brought in [*witnesses.stamps, *_read_stamps(reader)]:
        stamps.add(brought)
    _verify_messages(reader, head, claims, stamps)
    for number, record in reader.read_lines(contents.RETENTION_FILE, contents.RetentionRecord):
        chains.add_retention(f"{contents.RETENTION_FILE}:{number}", record.payload.encode(), record.jws)
    _verify_chains(reader, head, chains, witnesses.heads)
    for number, decision in reader.read_lines("decisions.jsonl", contents.DecisionRecord):
        claims.check_decision(f"decisions.jsonl:{number}", decision)
    for i, incident in enumerate(reader.read_document("incidents.json", list[contents.IncidentRecord]) or []):
        claims.check_incident(f"incidents.json[{i}]", incident)
    for i, task in enumerate(reader.read_document("running.json", list[contents.RunningTask]) or []):
        claims.check_running(f"running.json[{i}]", task)
    for i, entry in enumerate(reader.read_document("accuracy.json", list[contents.AccuracyEntry]) or []):
        claims.check_accuracy(f"accuracy.json[{i}]", entry)
    for i, pair in enumerate(reader.read_document("comparisons.json", list[contents.BundleComparison]) or []):
        claims.check_comparison(f"comparisons.json[{i}]", pair)
        report.comparisons += 1
    claims.check_chains()
    report.decisions, report.unsupported = claims.decisions, claims.unsupported + chains.unsupported
    _verify_bundles(reader, head, _verify_repository(reader, head))


def _verify_audit(reader: FolderReader) -> None:
    """Require that the audit of the database passed when the folder was made."""
    if "audit.json" not in reader.verified_files:
        if not reader.report.problem_count:
            reader.report.add_problem("audit.json", "is missing: nothing says that the database passed its audit")
        return
    audit = reader.read_document("audit.json", contents.AuditVerdict)
    if audit is None:
        return
    counts = {
        "messages or rows of tables that are not as signed": audit.invalid_count,
        "missing ranges of messages": audit.undeclared_gaps,
        "messages or readings stored twice": audit.duplicates,
        "invalid decisions": audit.invalid_decisions_count,
    }
    wrong = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    if wrong or not audit.passed:
        problem = f"the audit of the database failed when this folder was made: {wrong or 'it gives no reason'}"
        reader.report.add_problem("audit.json", problem)


def _verify_bundles(reader: FolderReader, head: EvidenceManifest, published: SignatureChain) -> None:
    # Devices accept bundles signed by operators, too.
    publishers = {**_build_signers(head.keys, "publisher"), **_build_signers(head.keys, "operator")}
    for path in sorted(reader.verified_files):
        if not (path.startswith("bundles/") and path.endswith("/about.json")):
            continue
        card = reader.read_document(path, contents.BundleCard)
        if card is None:
            continue
        reader.report.bundles += 1
        check_bundle(path, card, reader, publishers)
        for target in published.targets:
            if target.digest == card.digest and (target.name, target.version) != (card.name, card.version):
                problem = f"names {card.name} {card.version}, but {target.role} signed {target.name} {target.version}"
                reader.report.add_problem(path, problem)


def _verify_repository(reader: FolderReader, head: EvidenceManifest) -> SignatureChain:
    """Return the verified signatures; empty if a metadata file is altered or missing, which is reported already."""
    report = reader.report
    paths = [file.path for file in head.files if file.path.startswith(_METADATA_FOLDER)]
    if any(path not in reader.verified_files for path in paths):
        return SignatureChain()
    contents = {path: read_file(reader.folder, path, READ_LIMITS.metadata_bytes, report) for path in paths}
    files = {path.removeprefix(_METADATA_FOLDER): data for path, data in contents.items() if data is not None}
    problems = report.problem_count
    chain = signature_chain.verify(files, lambda file, problem: report.add_problem(_METADATA_FOLDER + file, problem))
    report.signatures = sum(len(signature.signed_keys) for signature in chain.signatures)
    if report.problem_count > problems:
        return chain
    for file in sorted(files.keys() - {signature.file for signature in chain.signatures}):
        report.add_problem(_METADATA_FOLDER + file, "no signed metadata refers to it")
    published = reader.read_document(_PUBLISHED_FILE, SignatureChain)
    if published is not None and published != chain:
        report.add_problem(_PUBLISHED_FILE, f"differs from the signed metadata in {_METADATA_FOLDER}")
    return chain


def _read_stamps(reader: FolderReader) -> Iterator[Stamp]:
    """Yield the time stamps that are part of the folder."""
    for path in sorted(reader.verified_files):
        stem = path.removesuffix(stamp.RESPONSE)
        if not path.startswith(WITNESS_FOLDER) or stem == path:
            continue
        heads, request, response = (reader.read_bytes(stem + suffix) for suffix in stamp.SUFFIXES)
        if heads is None or request is None or response is None:
            reader.report.add_problem(path, "has no heads or no request beside it; a stamp has three files")
            continue
        yield Stamp(path, heads, request, response)


def _verify_messages(reader: FolderReader, head: EvidenceManifest, claims: ClaimChecker, stamps: StampChecker) -> None:
    report = reader.report
    devices = _DeviceKeys(head.keys)
    for path in sorted(path for path in reader.verified_files if path.startswith("messages/")):
        for number, line in reader.read_lines(path, contents.SignedMessage):
            if report.messages >= READ_LIMITS.messages:
                report.add_problem(path, f"exceeds {READ_LIMITS.messages} messages in total; the rest is not read")
                return
            report.messages += 1
            where = f"{path}:{number}"
            try:
                message = verify_message(line.topic, line.payload.encode(), (line.jws,), devices.find_signer)
                if message.topic.fleet != head.fleet:
                    raise MessageRefused("other fleet", f"signed for fleet {message.topic.fleet!r}")
                devices.require_in_bounds(message.signer.key.kid, message.body)
            except (MessageRefused, UnicodeEncodeError) as refused:
                report.add_problem(where, f"does not verify: {refused}")
                continue
            claims.add_message(where, message)
            if isinstance(message.body, LoggedPayload):
                stamps.check_date(where, message.body)


def _verify_chains(
    reader: FolderReader, head: EvidenceManifest, chains: ChainChecker, heads: Sequence[tuple[str, bytes]]
) -> None:
    for name, data in heads:
        chains.add_witness(name, data)
    for path in sorted(path for path in reader.verified_files if path.startswith(HEAD_PREFIX)):
        chains.add_witness(path, reader.read_bytes(path) or b"")
    parts = [file.path for file in head.files if file.path.startswith(_CHAIN_FOLDER)]
    if not set(parts) <= reader.verified_files.keys():
        # An altered file is a problem of its own.
        return
    for path in sorted(parts):
        for number, run in reader.read_lines(path, contents.ChainRun):
            chains.add_run(f"{path}:{number}", run)
    chains.finish()
    report = reader.report
    report.chained_messages, report.gaps, report.witnesses = chains.links, chains.gaps, chains.witnesses


class _DeviceKeys:
    """Device keys of the manifest. Messages of a revoked key count, because they were stored before its revocation."""

    def __init__(self, keys: list[TrustedKey]) -> None:
        self._keys = {key.kid: key for key in keys if key.role == "device"}
        self._signers = _build_signers(keys, "device")
        self.find_signer = self._signers.get

    def require_in_bounds(self, kid: str, body: object) -> None:
        key = self._keys[kid]
        if key.last_valid_seq is None or not isinstance(body, LoggedPayload):
            return
        if key.log in (None, body.log) and body.seq > key.last_valid_seq:
            raise MessageRefused("retired key", f"kid {kid} is valid up to seq {key.last_valid_seq}")


def _build_signers(keys: list[TrustedKey], role: str) -> dict[str, Signer]:
    return {key.kid: Signer(key.owner, parse_public_key(key.key)) for key in keys if key.role == role}


class _ManifestHead(msgspec.Struct):
    """Members of a bundle manifest of any format version."""

    name: str
    version: str
    files: dict[str, str]


def check_bundle(where: str, card: BundleCard, reader: FolderReader, publishers: dict[str, Signer]) -> None:
    """Check the documents of the bundle whose card is the file `where`."""
    folder, add_problem = where.rpartition("/")[0], reader.report.add_problem
    data = reader.read_bytes(f"{folder}/manifest.json")
    if data is None:
        add_problem(where, "its bundle's manifest.json is missing")
        return
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != card.digest:
        add_problem(where, "digest differs from that of the bundle's manifest.json")
    if card.folder != folder:
        add_problem(where, f"folder is {card.folder}, but the file lies in {folder}")
    if card.signature_verified:
        token = reader.read_bytes(f"{folder}/manifest.jws") or b""
        try:
            kid = MANIFEST_DOMAIN.check_file(data, token, publishers.get).key.kid
        except MessageRefused as refused:
            add_problem(where, f"claims the signature of a listed publisher, which does not verify: {refused}")
        else:
            if kid != card.signer:
                add_problem(where, f"names {card.signer[:64]} as the signer, but {kid} signed")
    try:
        head = decoders.from_json(data, _ManifestHead)
        check_strict_json(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        add_problem(f"{folder}/manifest.json", f"is not a bundle manifest: {str(error)[:200]}")
        return
    if (head.name, head.version) != (card.name, card.version):
        problem = f"names {card.name} {card.version}, but the bundle's manifest is of {head.name} {head.version}"
        add_problem(where, problem)
    for name in ("MODEL_CARD.md", "DATA_CARD.md"):
        document = reader.read_bytes(f"{folder}/{name}")
        if document is not None and f"sha256:{hashlib.sha256(document).hexdigest()}" != head.files.get(name):
            add_problem(f"{folder}/{name}", "belongs to another bundle: its SHA-256 is not in the bundle's manifest")
