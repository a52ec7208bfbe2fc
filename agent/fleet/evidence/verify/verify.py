"""`outstation fleet evidence verify`: a folder from anywhere, checked with public keys and nothing else.

Rules, in order:
- the manifest's signature fits one of the keys that were given; only then is the manifest read
- every file of the folder is a plain file that the manifest lists, with that size and digest, and none is missing
- every message in messages/ was signed by a device key that the manifest lists, and no two are one
- what decisions, incidents, accuracy and what runs say of a message is what that message says
- decisions of roll-outs are signed by an operator's key that the manifest lists, and follow each other
- what was compared comes to the figures told, counted again from the messages
- each role of the repository's metadata is signed as the one before asks, from the first root on
- a bundle's manifest has the digest it is told by; where it is said to be checked, its publisher signed it

Nothing is followed out of the folder, nothing is unpacked, no file is read beyond the size that was signed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.errors import MessageRefused, UsageError
from agent.fleet.evidence.format import contents, manifest
from agent.fleet.evidence.format.contents import READ_LIMITS
from agent.fleet.evidence.format.manifest import MANIFEST_FILE, SIGNATURE_FILE, EvidenceManifest, TrustedKey
from agent.fleet.evidence.verify import reader
from agent.fleet.evidence.verify.bundles import check_bundle
from agent.fleet.evidence.verify.claims import ClaimChecker
from agent.fleet.evidence.verify.reader import FolderReader, VerificationReport, read_file
from agent.fleet.evidence.verify.repository import verify_repository
from agent.wire import jws
from agent.wire.jws import Signer
from agent.wire.keys import PublicKey, parse_public_key
from agent.wire.messages import LoggedPayload, verify_message


def verify(folder: Path, keys: list[PublicKey]) -> VerificationReport:
    """Raises UsageError where there is no folder."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    report = VerificationReport()
    head = _read_manifest(folder, keys, report)
    if head is None:
        return report
    report.fleet, report.at = head.fleet, head.at
    present = reader.find_listed_files(folder, head, report)
    good = {one.path: one for one in head.files if one.path in present and reader.is_unaltered(folder, one, report)}
    report.files = len(good)
    _verify_contents(FolderReader(folder, good, report), head, report)
    return report


def _read_manifest(folder: Path, keys: list[PublicKey], report: VerificationReport) -> EvidenceManifest | None:
    data = reader.read_file(folder, MANIFEST_FILE, READ_LIMITS.manifest_bytes, report)
    token = reader.read_file(folder, SIGNATURE_FILE, READ_LIMITS.token_bytes, report)
    if data is None or token is None:
        return None
    known = {key.kid: Signer("operator", key) for key in keys}
    try:
        text = token.decode("ascii", "replace").strip()
        report.signer = jws.verify((text,), manifest.SIGNATURE_DOMAIN, data, known.get).key.kid
    except MessageRefused as refusal:
        report.add_problem(
            SIGNATURE_FILE, f"{refusal}: {MANIFEST_FILE} is not signed by any of the {len(known)} keys that were given"
        )
        return None
    try:
        return manifest.decode(data)
    except MessageRefused as refusal:
        report.add_problem(MANIFEST_FILE, str(refusal))
        return None


def _verify_contents(reader: FolderReader, head: EvidenceManifest, report: VerificationReport) -> None:
    messages = {one.path for one in head.files if one.path.startswith("messages/")}
    claims = ClaimChecker(head, report.add_problem, messages_complete=messages <= set(reader.verified_files))
    _verify_messages(reader, head, claims, report)
    for number, decision in reader.read_lines("decisions.jsonl", contents.DecisionRecord):
        claims.check_decision(f"decisions.jsonl:{number}", decision)
    for i, incident in enumerate(reader.read_document("incidents.json", list[contents.Incident]) or []):
        claims.check_incident(f"incidents.json[{i}]", incident)
    for i, one in enumerate(reader.read_document("running.json", list[contents.RunningTask]) or []):
        claims.check_running(f"running.json[{i}]", one)
    for i, measured in enumerate(reader.read_document("accuracy.json", list[contents.AccuracyEntry]) or []):
        claims.check_accuracy(f"accuracy.json[{i}]", measured)
    for i, pair in enumerate(reader.read_document("comparisons.json", list[contents.BundleComparison]) or []):
        claims.check_comparison(f"comparisons.json[{i}]", pair)
        report.comparisons += 1
    claims.check_chains()
    report.decisions, report.unsupported = claims.decisions, claims.unsupported
    published = verify_repository(reader, head, report)
    # Devices take bundles from operators, too.
    publishers = {**_build_signers(head.keys, "publisher"), **_build_signers(head.keys, "operator")}
    for path in sorted(reader.verified_files):
        if path.startswith("bundles/") and path.endswith("/about.json"):
            card = reader.read_document(path, contents.BundleCard)
            if card is not None:
                report.bundles += 1
                read = _document_reader(reader, path.removesuffix("/about.json"), report)
                check_bundle(path, card, read, publishers, report.add_problem)
                for target in published.targets:
                    if target.digest == card.digest and (target.name, target.version) != (card.name, card.version):
                        said = f"{target.name} {target.version}"
                        report.add_problem(
                            path, f"is told as {card.name} {card.version}; {target.role} signed it as {said}"
                        )


def _document_reader(reader: FolderReader, folder: str, report: VerificationReport) -> Callable[[str], bytes | None]:
    def read_document(name: str) -> bytes | None:
        path = f"{folder}/{name}"
        return (
            read_file(reader.folder, path, READ_LIMITS.document_bytes, report)
            if path in reader.verified_files
            else None
        )

    return read_document


def _verify_messages(
    reader: FolderReader, head: EvidenceManifest, claims: ClaimChecker, report: VerificationReport
) -> None:
    devices = _DeviceKeys(head.keys)
    for path in sorted(path for path in reader.verified_files if path.startswith("messages/")):
        for number, line in reader.read_lines(path, contents.SignedMessage):
            if report.messages >= READ_LIMITS.messages:
                report.add_problem(path, f"more than {READ_LIMITS.messages} messages in all; the rest is not read")
                return
            report.messages += 1
            where = f"{path}:{number}"
            try:
                message = verify_message(line.topic, line.payload.encode(), (line.jws,), devices.find_signer)
                if message.topic.fleet != head.fleet:
                    raise MessageRefused("other fleet", f"signed for {message.topic.fleet!r}")
                devices.require_in_bounds(message.signer.key.kid, message.body)
            except (MessageRefused, UnicodeEncodeError) as refused:
                report.add_problem(where, f"does not verify: {refused}")
                continue
            claims.add_message(where, message)


class _DeviceKeys:
    """Device keys of the manifest. A revoked key's messages count: they were stored before it was revoked."""

    def __init__(self, keys: list[TrustedKey]) -> None:
        self._keys = {key.kid: key for key in keys if key.role == "device"}
        self._signers = _build_signers(keys, "device")
        self.find_signer = self._signers.get

    def require_in_bounds(self, kid: str, body: object) -> None:
        key = self._keys[kid]
        if key.through is None or not isinstance(body, LoggedPayload):
            return
        if key.log in (None, body.log) and body.seq > key.through:
            raise MessageRefused("retired key", f"kid {kid} signs up to seq {key.through} only")


def _build_signers(keys: list[TrustedKey], role: str) -> dict[str, Signer]:
    return {key.kid: Signer(key.owner, parse_public_key(key.key)) for key in keys if key.role == role}
