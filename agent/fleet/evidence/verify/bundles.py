"""A bundle's papers in an evidence folder: that they are the papers of that bundle, and who signed them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import msgspec

from agent.errors import MessageRefused
from agent.fleet.evidence.format.contents import BundleCard
from agent.model.bundle.bundle import SIGNATURE_DOMAIN
from agent.strict_json import check_strict_json
from agent.wire import jws
from agent.wire.jws import Signer


class _ManifestHead(msgspec.Struct):
    """Of a bundle's manifest, of whatever version, what is needed here."""

    name: str
    version: str
    files: dict[str, str]


def check_bundle(
    where: str,
    card: BundleCard,
    read_document: Callable[[str], bytes | None],
    publishers: dict[str, Signer],
    add_problem: Callable[[str, str], None],
) -> None:
    """`read`: a paper by its name, as it was signed into the folder; `add` hears of each problem."""
    folder = where.rpartition("/")[0]
    data = read_document("manifest.json")
    if data is None:
        add_problem(where, "its bundle's manifest.json is missing")
        return
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != card.digest:
        add_problem(where, "says another digest than its bundle's manifest.json has")
    if card.folder != folder:
        add_problem(where, f"lies in {folder}, and says {card.folder}")
    _check_signature(where, card, data, read_document("manifest.jws"), publishers, add_problem)
    try:
        head = msgspec.json.decode(data, type=_ManifestHead)
        check_strict_json(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        add_problem(f"{folder}/manifest.json", f"is no bundle's manifest: {str(error)[:200]}")
        return
    if (head.name, head.version) != (card.name, card.version):
        add_problem(where, f"says {card.name} {card.version}, the bundle's manifest {head.name} {head.version}")
    for name in ("MODEL_CARD.md", "DATA_CARD.md"):
        paper = read_document(name)
        if paper is not None and f"sha256:{hashlib.sha256(paper).hexdigest()}" != head.files.get(name):
            add_problem(
                f"{folder}/{name}", "is not the one of this bundle: its SHA-256 is not in the bundle's manifest"
            )


def _check_signature(
    where: str,
    card: BundleCard,
    data: bytes,
    token: bytes | None,
    publishers: dict[str, Signer],
    add_problem: Callable[[str, str], None],
) -> None:
    if not card.checked:
        return
    try:
        signer = jws.verify(
            ((token or b"").decode("ascii", "replace").strip(),), SIGNATURE_DOMAIN, data, publishers.get
        )
    except MessageRefused as refused:
        add_problem(where, f"is said to be signed by a publisher that is listed, and is not: {refused}")
        return
    if signer.key.kid != card.signer:
        add_problem(where, f"says that {card.signer[:64]} signed it; {signer.key.kid} did")
