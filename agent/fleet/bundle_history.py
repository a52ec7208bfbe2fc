"""Which bundles a task of a device ran, as far as what it sent says: of which results, and what their labels may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from agent.errors import MessageRefused
from agent.fleet.database.interface import Connection
from agent.performance.labels import LabelSchema, parse_anomaly
from agent.wire.messages import AuditPayload, ResultsPayload, decode

_RESULTS_MESSAGES = """
    SELECT seq, payload FROM messages WHERE device = ? AND log = ? AND seq > ? AND kind = 'results'
    ORDER BY seq LIMIT 500"""
_AUDIT_MESSAGES = """
    SELECT payload FROM messages WHERE device = ? AND kind = 'audit' AND instr(payload, ?) > 0
    ORDER BY received DESC, seq DESC"""


class BundleRun(msgspec.Struct):
    """A bundle and its results in one log: so many, of which so many are `listed` in messages."""

    name: str
    version: str
    digest: str
    results: int = 0
    listed: int = 0

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "version": self.version, "digest": self.digest}


class BundleLabelSchema(msgspec.Struct, frozen=True):
    """What labels of a bundle's results may be; `said` by the device, or inferred from what is here.

    `threshold`: above it a value is an anomaly; None where that is not known.
    """

    label_schema: LabelSchema
    declared: bool
    threshold: float | None = None


class _TargetBundle(msgspec.Struct):
    digest: str


class _ActivationEvidence(msgspec.Struct):
    """Evidence of an `activated` audit message, as far as it matters here."""

    task: str
    to: _TargetBundle
    kind: str
    labels: tuple[str, ...] = ()
    threshold: float | None = None


def load_bundle_runs(db: Connection, device: str, task: str, log: str) -> dict[int, BundleRun]:
    """Message → the bundle that its results are of."""
    found: dict[int, BundleRun] = {}
    known: dict[str, BundleRun] = {}
    for seq, payload in _stream_results_messages(db, device, log):
        body = _parse_results(payload)
        if body is not None and body.task == task:
            its = body.model
            model = known.setdefault(its.digest, BundleRun(its.name, its.version, its.digest))
            model.results += body.n
            model.listed += len(body.columns)
            found[int(seq)] = model
    return found


def resolve_label_schema(
    db: Connection, device: str, task: str, log: str, digest: str, texts: Sequence[str]
) -> BundleLabelSchema:
    """As the device said when it activated the bundle; else as its results and the `texts` of labels tell."""
    for (payload,) in db.execute(_AUDIT_MESSAGES, (device, digest.encode())):
        said = _parse_activation(payload)
        if said is not None and (said.task, said.to.digest) == (task, digest):
            return BundleLabelSchema(LabelSchema(said.kind, said.labels), True, said.threshold)
    sql = "SELECT DISTINCT label FROM results WHERE device = ? AND task = ? AND log = ? AND label IS NOT NULL"
    named = tuple(sorted(row[0] for row in db.execute(sql, (device, task, log))))
    if named:
        return BundleLabelSchema(LabelSchema("classify", named), False)
    # 1 and 0 may be numbers; words are none.
    return BundleLabelSchema(LabelSchema("anomaly" if any(map(_is_anomaly_word, texts)) else "regress"), False)


def _is_anomaly_word(text: str) -> bool:
    return parse_anomaly(text) is not None and not text.isdigit()


def _stream_results_messages(db: Connection, device: str, log: str) -> Iterator[tuple[int, bytes]]:
    """Some at a time: PostgreSQL's whole answer would be in memory."""
    after = 0
    while rows := db.execute(_RESULTS_MESSAGES, (device, log, after)).fetchall():
        yield from rows
        after = rows[-1][0]


def _parse_results(payload: bytes) -> ResultsPayload | None:
    try:
        body = decode(payload)
    except MessageRefused:
        return None
    return body if isinstance(body, ResultsPayload) else None


def _parse_activation(payload: bytes) -> _ActivationEvidence | None:
    try:
        body = decode(payload)
        return msgspec.convert(body.evidence, _ActivationEvidence) if isinstance(body, AuditPayload) else None
    except (MessageRefused, msgspec.ValidationError):
        # Of another event, or of a version that did not say.
        return None
