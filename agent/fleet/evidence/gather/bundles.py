"""Bundles: the papers of every one that was published here, was named, or ships with the agent and runs.

A bundle's model and golden vectors stay where they are; what is copied is what says what it is, and who signed that.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from agent.errors import BadBundle, MessageRefused, UsageError
from agent.evaluation.document import Evaluation
from agent.fleet.evidence.format.contents import WRITE_LIMITS, BundleCard
from agent.fleet.evidence.format.manifest import is_valid_path
from agent.model.bundle import builtin, bundle
from agent.model.bundle.bundle import SIGNATURE_DOMAIN, Bundle
from agent.wire import jws
from agent.wire.keys import PublicKey
from agent.wire.messages import Metric

logger = logging.getLogger(__name__)

DOCUMENT_FILES = ("manifest.json", "manifest.jws", "MODEL_CARD.md", "DATA_CARD.md")


class BundleDocuments(msgspec.Struct):
    """`files`: path in the folder → content. `unread`: what could not be read, in words."""

    cards: list[BundleCard] = msgspec.field(default_factory=list)
    files: dict[str, bytes] = msgspec.field(default_factory=dict)
    unreadable: list[str] = msgspec.field(default_factory=list)
    omitted: int = 0


def gather(
    fleet_dir: Path,
    bundle_paths: Sequence[Path],
    publishers: Sequence[PublicKey],
    evaluations: Sequence[tuple[bytes, Evaluation]],
    running: dict[str, int],
) -> BundleDocuments:
    """`running`: how many devices run a bundle, by digest. Raises BadBundle for a given one that cannot be read."""
    found, known = BundleDocuments(), {key.kid: jws.Signer("publisher", key) for key in publishers}
    of = {one.model.digest: (text, one) for text, one in evaluations}
    seen: set[str] = set()
    for one in _iter_bundles(fleet_dir, bundle_paths, set(running), found):
        if one.digest in seen:
            continue
        seen.add(one.digest)
        if len(found.cards) >= WRITE_LIMITS.bundles:
            found.omitted += 1
            continue
        _add_bundle(found, one, known, of.get(one.digest), running.get(one.digest, 0))
    if unknown := [digest for digest in of if digest not in seen]:
        raise UsageError(
            f"--evaluation: it is of bundle {unknown[0]}, which is not among the bundles; add --bundle PATH"
        )
    found.cards.sort(key=lambda card: (card.name, card.created, card.version, card.digest))
    return found


def read_evaluation(path: Path) -> tuple[bytes, Evaluation]:
    """The file's bytes and what they say. Raises UsageError."""
    try:
        text = path.read_bytes()
        return text, msgspec.json.decode(text, type=Evaluation)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"--evaluation {path}: not what `outstation model evaluate --json` writes: {error}") from None


def _iter_bundles(
    fleet_dir: Path, bundle_paths: Sequence[Path], running: set[str], documents: BundleDocuments
) -> Iterator[Bundle]:
    for path in bundle_paths:
        yield bundle.read(path, None)
    published = sorted((fleet_dir / "repository" / "targets").rglob("*.zip"))
    ours = sorted(path for path in builtin.bundles_dir().iterdir() if (path / "manifest.json").exists())
    for path in [*published, *ours]:
        try:
            one = bundle.read(path, None)
        except BadBundle as problem:
            logger.warning("%s", problem)
            documents.unreadable.append(f"{path.name}: {str(problem).removeprefix(str(path) + ': ')}")
            continue
        if path not in ours or one.digest in running:
            yield one


def _add_bundle(
    documents: BundleDocuments,
    loaded: Bundle,
    publishers: dict[str, jws.Signer],
    evaluation: tuple[bytes, Evaluation] | None,
    devices: int,
) -> None:
    manifest = loaded.manifest
    folder = (
        f"bundles/{manifest.name}/{_sanitize_version(manifest.version)}-{loaded.digest.removeprefix('sha256:')[:16]}"
    )
    papers = {name: loaded.files[name] for name in DOCUMENT_FILES if name in loaded.files}
    metrics: list[Metric] = []
    if evaluation is not None:
        papers["evaluation.json"] = evaluation[0]
        metrics = [msgspec.convert(m.to_dict(), Metric) for m in evaluation[1].metrics]
    card = BundleCard(
        name=manifest.name,
        version=manifest.version,
        digest=loaded.digest,
        kind=manifest.label_kind,
        created=manifest.created,
        about=_first_paragraph(loaded.files.get("MODEL_CARD.md", b"")),
        fields=list(manifest.input.fields)[:200],
        labels=list(manifest.output.labels)[:200],
        signer=loaded.signer,
        checked=_is_signed_by_publisher(papers, publishers),
        folder=folder,
        files=sorted(papers),
        devices=devices,
        model_sha256=hashlib.sha256(loaded.model_bytes).hexdigest(),
        evaluated=evaluation[1].evaluated_at if evaluation else "",
        metrics=metrics,
        warnings=list(evaluation[1].warnings) if evaluation else [],
    )
    documents.cards.append(card)
    documents.files |= {f"{folder}/{name}": data for name, data in papers.items()}
    documents.files[f"{folder}/about.json"] = msgspec.json.format(msgspec.json.encode(card), indent=1) + b"\n"


def _is_signed_by_publisher(documents: dict[str, bytes], publishers: dict[str, jws.Signer]) -> bool:
    token = documents.get("manifest.jws", b"").decode("ascii", "replace").strip()
    try:
        jws.verify([token], SIGNATURE_DOMAIN, documents["manifest.json"], publishers.get)
    except MessageRefused:
        return False
    return True


def _sanitize_version(version: str) -> str:
    """A version as it may stand in a path; the digest beside it tells two apart that look alike then."""
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._+-") else "_" for char in version)
    return kept if is_valid_path(kept) else "v" + kept.lstrip(".+-")


def _first_paragraph(card: bytes) -> str:
    """The first paragraph of a model card that is no heading."""
    lines: list[str] = []
    for line in card.decode(errors="replace").splitlines():
        plain = line.strip()
        if not plain or plain.startswith(("#", "|", "<!--")):
            if lines:
                break
            continue
        lines.append(plain)
    return " ".join(lines).replace("**", "")[:1000]
