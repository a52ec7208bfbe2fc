"""Projection: the rows that each kind of message adds to the tables.

A new kind adds an entry to `PROJECTIONS` and its table to `message_tables`. The functions are pure; a message without
a valid content for a table adds no row there, and stays evidence.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import repeat
from typing import Annotated, Any

import msgspec

from outstation.fleet.database.interface import Row
from outstation.fleet.database.schema import message_tables
from outstation.fleet.database.schema.message_tables import Table
from outstation.foundation import decoders
from outstation.protocol.wire import runs
from outstation.protocol.wire.desired_state import Digest, Name, Phase, Strategy, Version
from outstation.protocol.wire.keys import b64url_decode, b64url_encode
from outstation.protocol.wire.messages import (
    AlertPayload,
    AuditPayload,
    DriftPayload,
    Payload,
    QualityPayload,
    ResultMaker,
    ResultsPayload,
    SamplesPayload,
    ShadowPayload,
)
from outstation.protocol.wire.runs import MAX_REPEATED_BYTES, Label, LabelRun, Magnitude
from outstation.protocol.wire.verification import VerifiedMessage

# Event of the audit message in which a device reports a phase change of a rollout.
ROLLOUT_EVENT = "rollout"
# Events of audit messages about the reference that a device learned or an operator accepted.
LEARNED_EVENT, ACCEPTED_EVENT = "learned", "reference accepted"
_MAX_REASON = 64
# A message of a megabyte must not become a hundred: the name of a column is repeated with each result.
_MAX_OUTPUTS, _MAX_OUTPUT_NAME = 1024, 128
# Of all results of a message together, and of a number in JSON: a run of a few bytes stands for thousands of labels.
_MAX_OUTPUT_BYTES, _MAX_NUMBER_BYTES = 1 << 24, 24
_OUTPUT_NAMES = ("value_", "score_", "label_")
_OUTPUT_PREFIXES = tuple(f'"{name}'.encode() for name in _OUTPUT_NAMES)

# Name of a table → rows, with values in the order of its columns.
TableRows = dict[str, list[Row]]


class PhaseChange(msgspec.Struct, frozen=True):
    """The evidence of a device's audit message about a rollout."""

    task: Name
    rollout: Name
    bundle: Name
    version: Version
    digest: Digest
    strategy: Strategy
    phase: Phase
    reason: str = ""
    numbers: dict[str, Any] = {}


class _RawColumns(msgspec.Struct):
    """The columns of a results message, not decoded."""

    columns: dict[str, msgspec.Raw]


_COLUMNS_DECODER = decoders.json_decoder(_RawColumns)
_LABELS_DECODER = decoders.json_decoder(list[Label | LabelRun])
_NUMBERS_DECODER = decoders.json_decoder(list[Magnitude | None])


class FieldMoments(msgspec.Struct, frozen=True):
    """Rows of a field in a learned reference, in its unit; 0 where they are too few to be published."""

    n: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    mean: Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)] = 0.0
    sd: Annotated[float, msgspec.Meta(ge=0, le=1e100)] = 0.0


class LearnedReference(msgspec.Struct, frozen=True):
    """The evidence of a device's audit message about its reference."""

    task: Name
    site: Digest
    fields: Annotated[dict[str, FieldMoments], msgspec.Meta(max_length=256)] = {}


class Projection(msgspec.Struct, frozen=True):
    """The rows of one table that a message of one kind adds: `build(body, payload)`."""

    table: Table
    build: Callable[[Any, bytes], Iterable[Row]]


def project_message(message: VerifiedMessage, rows: TableRows) -> None:
    """Add the rows of one message to `rows`."""
    for projection in PROJECTIONS.get(type(message.body), ()):
        rows.setdefault(projection.table.name, []).extend(projection.build(message.body, message.payload))


def _result_rows(body: ResultsPayload, _payload: bytes) -> list[Row]:
    """Return (device, task, row, t, label, score, value, log, seq) of each result of a message."""
    columns, none = body.columns, repeat(None)
    times, labels = columns.expand_times(), columns.expand_labels() or none
    values = (columns.expand_rows(), times, labels, columns.score or none, columns.value or none)
    head, tail = (repeat(body.device), repeat(body.task)), (repeat(body.log), repeat(body.seq))
    return [*zip(*head, *values, *tail, strict=False)]


def _detail_rows(body: ResultsPayload, payload: bytes) -> list[Row]:
    head = (body.device, body.log, body.seq)
    return [(*head, row, missing, outputs) for row, (missing, outputs) in result_details(body, payload).items()]


def result_details(body: ResultsPayload, payload: bytes) -> dict[int, tuple[float | None, str | None]]:
    """Return row → (missing, outputs) of each result that has one; of a row that occurs again, the first."""
    columns, none = body.columns, repeat(None)
    has_outputs = any(prefix in payload for prefix in _OUTPUT_PREFIXES)
    outputs = _further_outputs(payload, len(columns)) if has_outputs else None
    if columns.missing is None and outputs is None:
        return {}
    details: dict[int, tuple[float | None, str | None]] = {}
    for row, missing, output in zip(columns.expand_rows(), columns.missing or none, outputs or none, strict=False):
        if missing or output is not None:
            details.setdefault(row, (missing, output))
    return details


def _further_outputs(payload: bytes, count: int) -> list[str] | None:
    """Return the JSON of columns value_NAME, score_LABEL and label_NAME of each of `count` results.

    None without such columns, and where repeated labels or all of it exceed their limits: then they stay evidence.
    """
    if not count:
        return None
    columns = _COLUMNS_DECODER.decode(payload).columns
    outputs: dict[str, list[Any]] = {}
    size = repeated = 0
    for name, column in columns.items():
        if not name.startswith(_OUTPUT_NAMES) or len(name) > _MAX_OUTPUT_NAME or len(outputs) == _MAX_OUTPUTS:
            continue
        with contextlib.suppress(msgspec.MsgspecError):
            is_label = name.startswith("label_")
            entries: list[Any] = (_LABELS_DECODER if is_label else _NUMBERS_DECODER).decode(column)
            if (runs.count_entries(entries) if is_label else len(entries)) != count:
                continue
            if is_label:
                repeated += runs.repeated_bytes(entries)
            size += (len(_to_json(name).encode()) + 2) * count
            size += _label_bytes(entries) if is_label else _MAX_NUMBER_BYTES * count
            # Before the run is expanded, and before the next column is decoded.
            if size > _MAX_OUTPUT_BYTES or repeated > MAX_REPEATED_BYTES:
                return None
            outputs[name] = runs.expand_labels(entries) if is_label else entries
    if not outputs:
        return None
    names = [*outputs]
    return [_to_json(dict(zip(names, row, strict=True))) for row in zip(*outputs.values(), strict=True)]


def _label_bytes(labels: list[Label | LabelRun]) -> int:
    """Return the bytes of all labels in JSON, expanded."""
    each = ((item, 1) if isinstance(item, str) else (item.label, item.count) for item in labels)
    return sum(len(msgspec.json.encode(label)) * count for label, count in each)


def _result_message_rows(body: ResultsPayload, _payload: bytes) -> list[Row]:
    _, provenance, *_ = provenance_row(body)
    faults = _to_json(body.faults) if body.faults else None
    return [(body.device, body.log, body.seq, *body.rows, body.n, body.incomplete, faults, provenance)]


def provenance_row(body: ResultsPayload) -> Row:
    """Return the row of table result_provenance that the message shares with others."""
    model, made = body.model, body.made or ResultMaker()
    members = (body.task, body.stream, model.name, model.version, model.digest, made.agent, made.runtime, made.config)
    return (body.device, _name_provenance(members), *members)


@lru_cache(1024)
def _name_provenance(members: tuple[str | None, ...]) -> str:
    return b64url_encode(hashlib.blake2b(msgspec.json.encode(members), digest_size=16).digest())


def _drift_rows(body: DriftPayload, _payload: bytes) -> list[Row]:
    window, model = body.window, body.model
    count = 1 if body.windows is None else len(body.windows)
    span = (window.index, count, window.rows[0], window.rows[1], window.from_, window.to, window.n)
    members = (body.reference, body.features, body.output, body.joint, body.estimate, body.windows)
    texts = (None if member is None else _to_json(member) for member in members)
    return [(body.device, body.task, *span, body.state, model.name, model.version, *texts, body.log, body.seq)]


def alert_rows(body: AlertPayload, _payload: bytes) -> list[Row]:
    head = (body.device, body.task, body.alert, body.subject, body.state, body.severity, body.summary, body.time)
    return [(*head, body.id, "device", body.log, body.seq, body.revision)]


def _quality_rows(body: QualityPayload, payload: bytes) -> list[Row]:
    return [(body.device, body.task, body.time, payload.decode(), body.log, body.seq)]


def _metric_rows(body: QualityPayload, _payload: bytes) -> list[Row]:
    head, tail = (body.device, body.task, body.time), ("device", body.log, body.seq, body.output)
    return [(*head, m.metric, m.slice, m.value, m.low, m.high, m.n, m.state, *tail) for m in body.metrics]


def _shadow_rows(body: ShadowPayload, payload: bytes) -> list[Row]:
    head = (body.device, body.task, body.rollout, body.model.digest, body.other.digest, body.time)
    return [(*head, *body.rows, body.batches, body.n, body.errors, payload.decode(), body.log, body.seq)]


def _sample_rows(body: SamplesPayload, _payload: bytes) -> list[Row]:
    head = (body.device, body.task, body.stream, body.reason, body.subject, body.row, *body.rows, body.digits)
    model = body.model
    try:
        sealed = b64url_decode(body.sealed)
    except ValueError:
        return []
    return [(*head, model.name, model.version, model.digest, body.time, sealed, body.log, body.seq)]


def _phase_rows(body: AuditPayload, _payload: bytes) -> list[Row]:
    if body.event != ROLLOUT_EVENT:
        return []
    try:
        change = decoders.convert(body.evidence, PhaseChange)
        # A number too large for JSON is no evidence.
        numbers = _to_json(change.numbers)
    except (msgspec.MsgspecError, ValueError):
        return []
    head = (body.device, change.task, change.rollout, change.digest, change.strategy, change.phase)
    return [(*head, change.reason[:_MAX_REASON], body.summary, numbers, body.time, body.log, body.seq)]


def _reference_rows(body: AuditPayload, _payload: bytes) -> list[Row]:
    if body.event not in (LEARNED_EVENT, ACCEPTED_EVENT):
        return []
    try:
        reference = decoders.convert(body.evidence, LearnedReference)
    except msgspec.ValidationError:
        return []
    head = (body.device, reference.task, body.event, reference.site, _to_json(reference.fields))
    return [(*head, body.time, body.log, body.seq)]


def _to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


PROJECTIONS: dict[type[Payload], tuple[Projection, ...]] = {
    ResultsPayload: (
        Projection(message_tables.RESULTS, _result_rows),
        Projection(message_tables.RESULT_DETAILS, _detail_rows),
        Projection(message_tables.RESULT_MESSAGES, _result_message_rows),
    ),
    DriftPayload: (Projection(message_tables.DRIFT_WINDOWS, _drift_rows),),
    AlertPayload: (Projection(message_tables.ALERTS, alert_rows),),
    QualityPayload: (
        Projection(message_tables.QUALITY_MESSAGES, _quality_rows),
        Projection(message_tables.METRICS, _metric_rows),
    ),
    ShadowPayload: (Projection(message_tables.SHADOWS, _shadow_rows),),
    SamplesPayload: (Projection(message_tables.SAMPLES, _sample_rows),),
    AuditPayload: (
        Projection(message_tables.ROLLOUT_DEVICES, _phase_rows),
        Projection(message_tables.LEARNED_REFERENCES, _reference_rows),
    ),
}
