"""Bundle documents: cards, manifest and signature of every published, given, or running built-in bundle.

Models and golden vectors stay where they are; only the documents are copied.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from outstation.evidence.format.contents import WRITE_LIMITS, BundleCard
from outstation.evidence.format.manifest import is_valid_path
from outstation.foundation import decoders, input_files
from outstation.foundation.errors import BadBundle, MessageRefused, UsageError
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.bundle.bundle import MANIFEST_DOMAIN, Bundle
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import PublicKey
from outstation.protocol.wire.messages import Metric
from outstation.workbench.evaluation.document import Evaluation

logger = logging.getLogger(__name__)

DOCUMENT_FILES = ("manifest.json", "manifest.jws", "MODEL_CARD.md", "DATA_CARD.md")


class BundleDocuments(msgspec.Struct):
    """Cards and files (path in the folder → content). `unreadable` has a sentence for each unreadable bundle."""

    cards: list[BundleCard] = msgspec.field(default_factory=list)
    files: dict[str, bytes] = msgspec.field(default_factory=dict)
    unreadable: list[str] = msgspec.field(default_factory=list)
    omitted: int = 0


def gather(
    fleet_dir: Path,
    bundle_paths: Sequence[Path],
    publishers: Sequence[PublicKey],
    evaluations: Sequence[tuple[bytes, Evaluation]],
    tasks_by_digest: dict[str, int],
) -> BundleDocuments:
    """Return the documents of all bundles. `tasks_by_digest`: bundle digest → number of tasks that run it.

    Raises BadBundle for a path in `bundle_paths` that cannot be read, UsageError for an evaluation of no known bundle.
    """
    documents = BundleDocuments()
    signers = {key.kid: Signer("publisher", key) for key in publishers}
    evaluation_by_digest = {evaluation.model.digest: (data, evaluation) for data, evaluation in evaluations}
    seen: set[str] = set()
    for loaded in _iter_bundles(fleet_dir, bundle_paths, set(tasks_by_digest), documents):
        if loaded.digest in seen:
            continue
        seen.add(loaded.digest)
        if len(documents.cards) >= WRITE_LIMITS.bundles:
            documents.omitted += 1
            continue
        evaluation = evaluation_by_digest.get(loaded.digest)
        _add_bundle(documents, loaded, signers, evaluation, tasks_by_digest.get(loaded.digest, 0))
    if unknown := [digest for digest in evaluation_by_digest if digest not in seen]:
        raise UsageError(
            f"--evaluation: it evaluates bundle {unknown[0]}, which is not among the bundles; add --bundle PATH"
        )
    documents.cards.sort(key=lambda card: (card.name, card.created, card.version, card.digest))
    return documents


def read_evaluation(path: Path) -> tuple[bytes, Evaluation]:
    """Return the bytes and the content of an evaluation document. Raises UsageError."""
    try:
        data = input_files.read_bytes(path)
        return data, decoders.from_json(data, Evaluation)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(
            f"--evaluation {path}: not the output of `outstation model evaluate --json`: {error}"
        ) from None


def _iter_bundles(
    fleet_dir: Path, bundle_paths: Sequence[Path], running: set[str], documents: BundleDocuments
) -> Iterator[Bundle]:
    for path in bundle_paths:
        yield bundle.read(path, None)
    published = sorted((fleet_dir / "repository" / "targets").rglob("*.zip"))
    built_in = sorted(path for path in builtin.bundles_dir().iterdir() if (path / "manifest.json").exists())
    for path in [*published, *built_in]:
        try:
            loaded = bundle.read(path, None)
        except BadBundle as problem:
            logger.warning("%s", problem)
            documents.unreadable.append(f"{path.name}: {str(problem).removeprefix(str(path) + ': ')}")
            continue
        if path not in built_in or loaded.digest in running:
            yield loaded


def _add_bundle(
    documents: BundleDocuments,
    loaded: Bundle,
    publishers: dict[str, Signer],
    evaluation: tuple[bytes, Evaluation] | None,
    running_tasks: int,
) -> None:
    manifest = loaded.manifest
    short_digest = loaded.digest.removeprefix("sha256:")[:16]
    folder = f"bundles/{manifest.name}/{_sanitize_version(manifest.version)}-{short_digest}"
    files = {name: loaded.files[name] for name in DOCUMENT_FILES if name in loaded.files}
    metrics: list[Metric] = []
    if evaluation is not None:
        files["evaluation.json"] = evaluation[0]
        metrics = [decoders.convert(m.to_dict(), Metric) for m in evaluation[1].metrics]
    card = BundleCard(
        name=manifest.name,
        version=manifest.version,
        digest=loaded.digest,
        kind=manifest.label_kind,
        created=manifest.created,
        summary=_first_paragraph(loaded.files.get("MODEL_CARD.md", b"")),
        fields=list(manifest.input.fields)[:200],
        labels=list(manifest.output.labels)[:200],
        signer=loaded.signer,
        signature_verified=_is_signed_by_publisher(files, publishers),
        folder=folder,
        files=sorted(files),
        running_tasks=running_tasks,
        model_sha256=hashlib.sha256(loaded.model_bytes).hexdigest(),
        evaluated_at=evaluation[1].evaluated_at if evaluation else "",
        metrics=metrics,
        warnings=list(evaluation[1].warnings) if evaluation else [],
    )
    documents.cards.append(card)
    documents.files |= {f"{folder}/{name}": data for name, data in files.items()}
    documents.files[f"{folder}/about.json"] = msgspec.json.format(msgspec.json.encode(card), indent=1) + b"\n"


def _is_signed_by_publisher(documents: dict[str, bytes], publishers: dict[str, Signer]) -> bool:
    try:
        MANIFEST_DOMAIN.check_file(documents["manifest.json"], documents.get("manifest.jws", b""), publishers.get)
    except MessageRefused:
        return False
    return True


def _sanitize_version(version: str) -> str:
    """Return the version as a valid path segment. The digest after it keeps equal results apart."""
    safe = "".join(char if char.isascii() and (char.isalnum() or char in "._+-") else "_" for char in version)
    return safe if is_valid_path(safe) else "v" + safe.lstrip(".+-")


def _first_paragraph(card: bytes) -> str:
    """Return the first paragraph of a model card that is neither heading, table nor comment."""
    lines: list[str] = []
    for line in card.decode(errors="replace").splitlines():
        plain = line.strip()
        if not plain or plain.startswith(("#", "|", "<!--")):
            if lines:
                break
            continue
        lines.append(plain)
    return " ".join(lines).replace("**", "")[:1000]
