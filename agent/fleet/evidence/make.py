"""`outstation fleet evidence`: gather, write, sign. The same database, bundles and time give the same bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent import __version__
from agent.evaluation.document import Evaluation
from agent.fleet.database.interface import Connection
from agent.fleet.database.store import FleetStore
from agent.fleet.evidence import frameworks, manifest
from agent.fleet.evidence import sbom as software
from agent.fleet.evidence.contents import Incident, Signed
from agent.fleet.evidence.folder import Draft
from agent.fleet.evidence.gather import bundles, trusted_keys
from agent.fleet.evidence.gather.database import Reading
from agent.fleet.evidence.gather.gather import Facts, Verified, gather
from agent.fleet.evidence.limits import MOST
from agent.fleet.evidence.manifest import MANIFEST, TOKEN, File, Manifest
from agent.fleet.evidence.page.page import html
from agent.fleet.evidence.sbom import Found
from agent.wire.keys import PublicKey, SigningKey

_CSV = ("began", "ended", "seconds", "state", "severity", "device", "task", "alert", "subject", "summary", "clock")


class Sources(msgspec.Struct, frozen=True):
    """Where it comes from beside the database. `home`: the fleet's folder.

    `operator` signs; `operators` are the keys whose decisions count, that one and former ones.
    """

    fleet: str
    home: Path
    operator: SigningKey
    operators: Sequence[PublicKey]
    collector: PublicKey
    publishers: Sequence[PublicKey] = ()
    bundles: Sequence[Path] = ()
    evaluations: Sequence[tuple[bytes, Evaluation]] = ()


class Made(msgspec.Struct, frozen=True):
    facts: Facts
    software: Found
    files: list[File]


def make(
    store: FleetStore,
    sources: Sources,
    out: Path,
    at: str | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Made:
    """The signed folder `out`. Raises UsageError, BadBundle, StorageError; then nothing is there."""
    draft = Draft(out)
    try:
        with store.snapshot() as db:
            facts = _facts(store, db, sources, at, advance)
            _messages(Reading(store, db), Verified(store), draft, facts)
        found = _files(draft, sources, facts)
        draft.finish()
    except BaseException:
        draft.abandon()
        raise
    return Made(facts, found, draft.files)


def _facts(
    store: FleetStore, db: Connection, sources: Sources, at: str | None, advance: Callable[[int], None]
) -> Facts:
    roles = trusted_keys.of_roles(sources.operators, sources.collector, sources.publishers)
    facts = gather(store, db, sources.fleet, at, roles, advance)
    # Devices take bundles from operators, too.
    known = [*sources.publishers, *sources.operators]
    facts.bundles = bundles.gather(sources.home, sources.bundles, known, sources.evaluations, facts.models)
    facts.left_out["bundles"] += facts.bundles.left_out
    return facts


def _files(draft: Draft, sources: Sources, facts: Facts) -> Found:
    metadata, facts.published, facts.unpublished = trusted_keys.repository(sources.home)
    for path, content in sorted({**facts.bundles.files, **metadata}.items()):
        draft.write(path, content)
    bill = software.bill(facts.fleet, facts.at, facts.bundles.cards)
    draft.write("sbom.cdx.json", bill.document)
    draft.write("decisions.jsonl", (_line(one) for one in facts.decisions))
    draft.write("incidents.csv", _csv(facts.incidents))
    documents: dict[str, Any] = {
        "incidents.json": facts.incidents,
        "running.json": facts.running,
        "history.json": facts.history,
        "accuracy.json": facts.measured,
        "comparisons.json": facts.compared,
        "published.json": facts.published,
        "drift.json": facts.drift,
        "audit.json": facts.audit,
    }
    for path, document in documents.items():
        draft.write(path, _document(document))
    points = frameworks.supported([one.path for one in draft.files], _empty(facts))
    draft.write("mapping.json", _document({"points": points, "not_covered": frameworks.NOT_COVERED}))
    draft.write("index.html", html(facts, bill, points, [*draft.files]).encode())
    _sign(draft, sources.operator, facts)
    return bill


def _sign(draft: Draft, key: SigningKey, facts: Facts) -> None:
    head = Manifest(
        v=1,
        kind="evidence",
        fleet=facts.fleet,
        at=facts.at,
        agent=__version__,
        span=facts.span,
        messages=facts.messages,
        left_out={name: n for name, n in sorted(facts.left_out.items()) if n},
        keys=facts.keys,
        files=sorted(draft.files, key=lambda one: one.path),
    )
    data = manifest.encode(head)
    draft.write(MANIFEST, data)
    draft.write(TOKEN, manifest.sign(data, key))


def _empty(facts: Facts) -> set[str]:
    """Files that say nothing, which therefore support nothing."""
    found = {"comparisons.json": facts.compared, "published.json": facts.published.targets}
    found |= {"accuracy.json": facts.measured, "drift.json": facts.drift["tasks"], "running.json": facts.running}
    # A list without incidents says something as long as somebody could have told of one.
    found |= {"decisions.jsonl": facts.decisions, "incidents.json": facts.messages, "audit.json": facts.messages}
    return {path for path, content in found.items() if not content}


def _messages(reading: Reading, verified: Verified, draft: Draft, facts: Facts) -> None:
    """The signed messages that the folder relies on, read again and verified again, in parts of bounded size."""
    lines = _signed(reading, verified, facts)
    line, number = next(lines, None), 0
    while line is not None:
        part: list[bytes] = []
        size = 0
        while line is not None and len(part) < MOST.part and size < MOST.part_bytes:
            part.append(line)
            size += len(line)
            line = next(lines, None)
        number += 1
        draft.write(f"messages/part-{number:04}.jsonl", part)


def _signed(reading: Reading, verified: Verified, facts: Facts) -> Iterator[bytes]:
    room = MOST.message_bytes
    for place in facts.places:
        stored = reading.message(place.device, place.log, place.seq)
        if stored is None or verified.open((*msgspec.structs.astuple(place), *stored)) is None:
            continue
        line = _line(Signed(stored[0], stored[1].decode(), stored[2]))
        room -= len(line)
        if room < 0:
            facts.left_out["messages"] += 1
            continue
        yield line


def _line(one: msgspec.Struct) -> bytes:
    return msgspec.json.encode(one) + b"\n"


def _document(content: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def _csv(incidents: Iterable[Incident]) -> bytes:
    """For a spreadsheet, which must not take what devices wrote for formulas."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_CSV)
    for one in incidents:
        writer.writerow(_cell(getattr(one, name)) for name in _CSV)
    return text.getvalue().encode()


def _cell(value: object) -> object:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return "" if value is None else value
