"""The repository's metadata in an evidence folder: that they are signed one by another, and what is told of them."""

from __future__ import annotations

from agent.fleet.evidence.limits import BOUNDS
from agent.fleet.evidence.manifest import Manifest
from agent.fleet.evidence.verify import reader
from agent.fleet.evidence.verify.reader import Opened, Report
from agent.fleet.repository import signature_chain
from agent.fleet.repository.signature_chain import Chain

_FOLDER, _TOLD = "repository/", "published.json"


def published_in(opened: Opened, head: Manifest, report: Report) -> Chain:
    """Who signed what; empty where the metadata are not whole, which is told already."""
    paths = [one.path for one in head.files if one.path.startswith(_FOLDER)]
    if any(path not in opened.good for path in paths):
        return Chain()
    read = {path: reader.whole(opened.folder, path, BOUNDS.metadata, report) for path in paths}
    files = {path.removeprefix(_FOLDER): data for path, data in read.items() if data is not None}
    before = report.problem_count
    found = signature_chain.follow(files, lambda file, problem: report.add(_FOLDER + file, problem))
    report.signatures = sum(len(one.signed) for one in found.signatures)
    if report.problem_count > before:
        return found
    for file in sorted(files.keys() - {one.file for one in found.signatures}):
        report.add(_FOLDER + file, "nothing that is signed leads to it")
    told = opened.document(_TOLD, Chain)
    if told is not None and told != found:
        report.add(_TOLD, f"says otherwise than the metadata in {_FOLDER}, which are signed")
    return found
