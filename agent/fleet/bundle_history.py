"""Which bundles a task of a device ran, as far as what it sent says: of which results, and what their labels may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from agent.errors import Refused
from agent.fleet.database.interface import Connection
from agent.performance.labels import Truth, anomalous
from agent.wire.messages import Audit, Results, decode

_RUNS = """
    SELECT seq, payload FROM messages WHERE device = ? AND log = ? AND seq > ? AND kind = 'results'
    ORDER BY seq LIMIT 500"""
_ACTIVATED = """
    SELECT payload FROM messages WHERE device = ? AND kind = 'audit' AND instr(payload, ?) > 0
    ORDER BY received DESC, seq DESC"""


class Model(msgspec.Struct):
    """A bundle and its results in one log: so many, of which so many are `listed` in messages."""

    name: str
    version: str
    digest: str
    results: int = 0
    listed: int = 0

    def told(self) -> dict[str, str]:
        return {"name": self.name, "version": self.version, "digest": self.digest}


class Meaning(msgspec.Struct, frozen=True):
    """What labels of a bundle's results may be; `said` by the device, or inferred from what is here.

    `threshold`: above it a value is an anomaly; None where that is not known.
    """

    truth: Truth
    said: bool
    threshold: float | None = None


class _To(msgspec.Struct):
    digest: str


class _Activated(msgspec.Struct):
    """Evidence of an `activated` audit message, as far as it matters here."""

    task: str
    to: _To
    kind: str
    labels: tuple[str, ...] = ()
    threshold: float | None = None


def models(db: Connection, device: str, task: str, log: str) -> dict[int, Model]:
    """Message → the bundle that its results are of."""
    found: dict[int, Model] = {}
    known: dict[str, Model] = {}
    for seq, payload in _runs(db, device, log):
        body = _results(payload)
        if body is not None and body.task == task:
            its = body.model
            model = known.setdefault(its.digest, Model(its.name, its.version, its.digest))
            model.results += body.n
            model.listed += len(body.columns.row)
            found[int(seq)] = model
    return found


def meaning(db: Connection, device: str, task: str, log: str, digest: str, texts: Sequence[str]) -> Meaning:
    """As the device said when it activated the bundle; else as its results and the `texts` of labels tell."""
    for (payload,) in db.execute(_ACTIVATED, (device, digest.encode())):
        said = _said(payload)
        if said is not None and (said.task, said.to.digest) == (task, digest):
            return Meaning(Truth(said.kind, said.labels), True, said.threshold)
    sql = "SELECT DISTINCT label FROM results WHERE device = ? AND task = ? AND log = ? AND label IS NOT NULL"
    named = tuple(sorted(row[0] for row in db.execute(sql, (device, task, log))))
    if named:
        return Meaning(Truth("classify", named), False)
    # 1 and 0 may be numbers; words are none.
    return Meaning(Truth("anomaly" if any(map(_is_word, texts)) else "regress"), False)


def _is_word(text: str) -> bool:
    return anomalous(text) is not None and not text.isdigit()


def _runs(db: Connection, device: str, log: str) -> Iterator[tuple[int, bytes]]:
    """Some at a time: PostgreSQL's whole answer would be in memory."""
    after = 0
    while rows := db.execute(_RUNS, (device, log, after)).fetchall():
        yield from rows
        after = rows[-1][0]


def _results(payload: bytes) -> Results | None:
    try:
        body = decode(payload)
    except Refused:
        return None
    return body if isinstance(body, Results) else None


def _said(payload: bytes) -> _Activated | None:
    try:
        body = decode(payload)
        return msgspec.convert(body.evidence, _Activated) if isinstance(body, Audit) else None
    except (Refused, msgspec.ValidationError):
        # Of another event, or of a version that did not say.
        return None
