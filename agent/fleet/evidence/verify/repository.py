"""The repository's metadata in an evidence folder: that they are signed one by another, and what is told of them."""

from __future__ import annotations

from agent.fleet.evidence.format.contents import READ_LIMITS
from agent.fleet.evidence.format.manifest import EvidenceManifest
from agent.fleet.evidence.verify.reader import FolderReader, VerificationReport, read_file
from agent.fleet.repository import signature_chain
from agent.fleet.repository.signature_chain import SignatureChain

_FOLDER, _PUBLISHED_FILE = "repository/", "published.json"


def verify_repository(reader: FolderReader, head: EvidenceManifest, report: VerificationReport) -> SignatureChain:
    """Who signed what; empty where the metadata are not whole, which is told already."""
    paths = [one.path for one in head.files if one.path.startswith(_FOLDER)]
    if any(path not in reader.verified_files for path in paths):
        return SignatureChain()
    read = {path: read_file(reader.folder, path, READ_LIMITS.metadata_bytes, report) for path in paths}
    files = {path.removeprefix(_FOLDER): data for path, data in read.items() if data is not None}
    before = report.problem_count
    found = signature_chain.verify(files, lambda file, problem: report.add_problem(_FOLDER + file, problem))
    report.signatures = sum(len(one.signed) for one in found.signatures)
    if report.problem_count > before:
        return found
    for file in sorted(files.keys() - {one.file for one in found.signatures}):
        report.add_problem(_FOLDER + file, "nothing that is signed leads to it")
    told = reader.read_document(_PUBLISHED_FILE, SignatureChain)
    if told is not None and told != found:
        report.add_problem(_PUBLISHED_FILE, f"says otherwise than the metadata in {_FOLDER}, which are signed")
    return found
