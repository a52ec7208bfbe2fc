"""Check of bundle documents in an evidence folder: they belong to the bundle, and its publisher signed the manifest."""

from __future__ import annotations

import hashlib

import msgspec

from agent import decoders
from agent.errors import MessageRefused
from agent.fleet.evidence.format.contents import BundleCard
from agent.fleet.evidence.verify.reader import FolderReader
from agent.model.bundle.bundle import SIGNATURE_DOMAIN
from agent.strict_json import check_strict_json
from agent.wire import jws
from agent.wire.jws import Signer


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
        token = (reader.read_bytes(f"{folder}/manifest.jws") or b"").decode("ascii", "replace").strip()
        try:
            kid = jws.verify((token,), SIGNATURE_DOMAIN, data, publishers.get).key.kid
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
