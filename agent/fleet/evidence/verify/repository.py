"""Check of TUF metadata in an evidence folder: its signatures, and what published.json claims about them."""

from __future__ import annotations

from agent.fleet.evidence.format.contents import READ_LIMITS
from agent.fleet.evidence.format.manifest import EvidenceManifest
from agent.fleet.evidence.verify.reader import FolderReader, VerificationReport, read_file
from agent.fleet.repository import signature_chain
from agent.fleet.repository.signature_chain import SignatureChain

_FOLDER, _PUBLISHED_FILE = "repository/", "published.json"


def verify_repository(reader: FolderReader, head: EvidenceManifest, report: VerificationReport) -> SignatureChain:
    """Return the verified signatures; empty if a metadata file is altered or missing, which is reported already."""
    paths = [file.path for file in head.files if file.path.startswith(_FOLDER)]
    if any(path not in reader.verified_files for path in paths):
        return SignatureChain()
    contents = {path: read_file(reader.folder, path, READ_LIMITS.metadata_bytes, report) for path in paths}
    files = {path.removeprefix(_FOLDER): data for path, data in contents.items() if data is not None}
    problems = report.problem_count
    chain = signature_chain.verify(files, lambda file, problem: report.add_problem(_FOLDER + file, problem))
    report.signatures = sum(len(signature.signed_keys) for signature in chain.signatures)
    if report.problem_count > problems:
        return chain
    for file in sorted(files.keys() - {signature.file for signature in chain.signatures}):
        report.add_problem(_FOLDER + file, "no signed metadata refers to it")
    published = reader.read_document(_PUBLISHED_FILE, SignatureChain)
    if published is not None and published != chain:
        report.add_problem(_PUBLISHED_FILE, f"differs from the signed metadata in {_FOLDER}")
    return chain
