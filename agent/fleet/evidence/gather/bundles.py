"""Bundles: the papers of every one that was published here, was named, or ships with the agent and runs.

A bundle's model and golden vectors stay where they are; what is copied is what says what it is, and who signed that.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from agent.errors import BadBundle, Refused, UsageError
from agent.evaluation.document import Evaluation
from agent.fleet.evidence.contents import Card
from agent.fleet.evidence.limits import MOST
from agent.fleet.evidence.manifest import is_path
from agent.model.bundle import builtin, bundle
from agent.model.bundle.bundle import DOMAIN, Bundle
from agent.wire import jws
from agent.wire.keys import PublicKey
from agent.wire.messages import Metric

logger = logging.getLogger(__name__)

PAPERS = ("manifest.json", "manifest.jws", "MODEL_CARD.md", "DATA_CARD.md")


class Bundles(msgspec.Struct):
    """`files`: path in the folder → content. `unread`: what could not be read, in words."""

    cards: list[Card] = msgspec.field(default_factory=list)
    files: dict[str, bytes] = msgspec.field(default_factory=dict)
    unread: list[str] = msgspec.field(default_factory=list)
    left_out: int = 0


def gather(
    fleet: Path,
    given: Sequence[Path],
    publishers: Sequence[PublicKey],
    evaluations: Sequence[tuple[bytes, Evaluation]],
    running: dict[str, int],
) -> Bundles:
    """`running`: how many devices run a bundle, by digest. Raises BadBundle for a given one that cannot be read."""
    found, known = Bundles(), {key.kid: jws.Signer("publisher", key) for key in publishers}
    of = {one.model.digest: (text, one) for text, one in evaluations}
    seen: set[str] = set()
    for one in _all(fleet, given, set(running), found):
        if one.digest in seen:
            continue
        seen.add(one.digest)
        if len(found.cards) >= MOST.bundles:
            found.left_out += 1
            continue
        _add(found, one, known, of.get(one.digest), running.get(one.digest, 0))
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


def _all(fleet: Path, given: Sequence[Path], running: set[str], found: Bundles) -> Iterator[Bundle]:
    for path in given:
        yield bundle.read(path, None)
    published = sorted((fleet / "repository" / "targets").rglob("*.zip"))
    ours = sorted(path for path in builtin.bundles().iterdir() if (path / "manifest.json").exists())
    for path in [*published, *ours]:
        try:
            one = bundle.read(path, None)
        except BadBundle as problem:
            logger.warning("%s", problem)
            found.unread.append(f"{path.name}: {str(problem).removeprefix(str(path) + ': ')}")
            continue
        if path not in ours or one.digest in running:
            yield one


def _add(
    found: Bundles,
    one: Bundle,
    publishers: dict[str, jws.Signer],
    evaluated: tuple[bytes, Evaluation] | None,
    devices: int,
) -> None:
    manifest = one.manifest
    folder = f"bundles/{manifest.name}/{_plain(manifest.version)}-{one.digest.removeprefix('sha256:')[:16]}"
    papers = {name: one.files[name] for name in PAPERS if name in one.files}
    metrics: list[Metric] = []
    if evaluated is not None:
        papers["evaluation.json"] = evaluated[0]
        metrics = [msgspec.convert(m.told(), Metric) for m in evaluated[1].metrics]
    card = Card(
        name=manifest.name,
        version=manifest.version,
        digest=one.digest,
        kind=manifest.truth,
        created=manifest.created,
        about=_about(one.files.get("MODEL_CARD.md", b"")),
        fields=list(manifest.input.fields)[:200],
        labels=list(manifest.output.labels)[:200],
        signer=one.signer,
        checked=_checked(papers, publishers),
        folder=folder,
        files=sorted(papers),
        devices=devices,
        model_sha256=hashlib.sha256(one.model).hexdigest(),
        evaluated=evaluated[1].made if evaluated else "",
        metrics=metrics,
        warnings=list(evaluated[1].warnings) if evaluated else [],
    )
    found.cards.append(card)
    found.files |= {f"{folder}/{name}": data for name, data in papers.items()}
    found.files[f"{folder}/about.json"] = msgspec.json.format(msgspec.json.encode(card), indent=1) + b"\n"


def _checked(papers: dict[str, bytes], publishers: dict[str, jws.Signer]) -> bool:
    token = papers.get("manifest.jws", b"").decode("ascii", "replace").strip()
    try:
        jws.verify([token], DOMAIN, papers["manifest.json"], publishers.get)
    except Refused:
        return False
    return True


def _plain(version: str) -> str:
    """A version as it may stand in a path; the digest beside it tells two apart that look alike then."""
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._+-") else "_" for char in version)
    return kept if is_path(kept) else "v" + kept.lstrip(".+-")


def _about(card: bytes) -> str:
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


def used(cards: Iterable[Card]) -> dict[str, Card]:
    """By digest."""
    return {card.digest: card for card in cards}
