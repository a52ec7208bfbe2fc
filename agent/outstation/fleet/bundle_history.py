"""Bundle history: which bundle produced each result of a task, and what its labels may be.

Both come from messages of the device. A device states the label schema when it activates a bundle; without that
message the schema is inferred from the results.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from outstation.fleet.database.interface import Connection
from outstation.fleet.database.labelling import labelled_results
from outstation.fleet.database.labelling.labelled_results import TaskLog
from outstation.foundation import decoders
from outstation.foundation.errors import MessageRefused
from outstation.ml.performance.labels import MAX_MULTILABEL_CLASSES, NO_LABEL, SEPARATOR, LabelSchema, parse_anomaly
from outstation.protocol.wire.messages import AuditPayload, ResultsPayload
from outstation.protocol.wire.verification import decode


class BundleRun(msgspec.Struct):
    """A bundle and the number of its results in one log; `listed` of them are in messages."""

    name: str
    version: str
    digest: str
    results: int = 0
    listed: int = 0

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "version": self.version, "digest": self.digest}


class BundleRef(msgspec.Struct, frozen=True):
    name: str
    version: str
    digest: str


class BundleLabelSchema(msgspec.Struct, frozen=True):
    """The labels that results of a bundle may have: `declared` by the device, or inferred.

    A value above `threshold` is an anomaly; None where the threshold is not known.
    """

    label_schema: LabelSchema
    declared: bool
    threshold: float | None = None


class _TargetBundle(msgspec.Struct):
    digest: str


class _OutputLabels(msgspec.Struct):
    kind: str
    labels: tuple[str, ...] = ()
    threshold: float | None = None

    def to_schema(self) -> BundleLabelSchema | None:
        """Return None where the device left the labels out, which were too long for the message."""
        if self.kind in ("classify", "several") and not self.labels:
            return None
        return BundleLabelSchema(LabelSchema(self.kind, self.labels), True, self.threshold)


class _ActivationEvidence(_OutputLabels, kw_only=True):
    """The members of the evidence of an `activated` audit message that describe labels; `outputs`: further ones."""

    task: str
    to: _TargetBundle
    outputs: dict[str, _OutputLabels] = {}


def load_bundle_runs(db: Connection, key: TaskLog) -> dict[int, BundleRun]:
    """Return the bundle that produced the results of each message, by seq."""
    device, task, log = key
    runs: dict[int, BundleRun] = {}
    by_digest: dict[str, BundleRun] = {}
    for seq, payload in labelled_results.stream_results_messages(db, device, log):
        try:
            body = decode(payload)
        except MessageRefused:
            continue
        if isinstance(body, ResultsPayload) and body.task == task:
            model = body.model
            run = by_digest.setdefault(model.digest, BundleRun(model.name, model.version, model.digest))
            run.results += body.n
            run.listed += len(body.columns)
            runs[int(seq)] = run
    return runs


def resolve_label_schema(
    db: Connection, key: TaskLog, digest: str, texts: Sequence[str], output: str = ""
) -> BundleLabelSchema | None:
    """Return the schema of an output that the device declared when it activated the bundle, else infer it.

    `texts`: labels of the output, from which the schema is inferred if no result has a label. None if neither the
    bundle nor a result has the further output.
    """
    device, task, _ = key
    for payload in labelled_results.load_audit_payloads(db, device, digest):
        try:
            body = decode(payload)
            evidence = body.evidence if isinstance(body, AuditPayload) else None
            activation = decoders.convert(evidence, _ActivationEvidence)
        except (MessageRefused, msgspec.ValidationError):
            # Another event, or a version that did not declare labels.
            continue
        if (activation.task, activation.to.digest) == (task, digest):
            if output and activation.outputs and output not in activation.outputs:
                return None
            declared = activation.outputs.get(output) if output else activation
            schema = None if declared is None else declared.to_schema()
            if schema is not None:
                return schema
            break
    return _infer_further_schema(db, key, texts, output) if output else _infer_schema(db, key, texts)


def _infer_schema(db: Connection, key: TaskLog, texts: Sequence[str]) -> BundleLabelSchema:
    predicted = tuple(labelled_results.load_result_labels(db, key))
    if predicted:
        return BundleLabelSchema(_guess_class_schema(predicted), False)
    return BundleLabelSchema(_guess_number_schema(texts), False)


def _infer_further_schema(db: Connection, key: TaskLog, texts: Sequence[str], output: str) -> BundleLabelSchema | None:
    predicted, has_values = set[str](), False
    for result in labelled_results.load_further_results(db, key, output):
        has_values |= result.value is not None
        if result.label is not None:
            predicted.add(result.label)
    if has_values:
        schema = LabelSchema("anomaly") if predicted else _guess_number_schema(texts)
    elif predicted:
        schema = _guess_class_schema(predicted)
    else:
        return None
    return BundleLabelSchema(schema, False)


def _guess_class_schema(predicted: Collection[str]) -> LabelSchema:
    names = {name for label in predicted for name in label.split(SEPARATOR)} - {NO_LABEL}
    if names != set(predicted) and len(names) <= MAX_MULTILABEL_CLASSES:
        return LabelSchema("several", tuple(sorted(names)))
    return LabelSchema("classify", tuple(sorted(predicted)))


def _guess_number_schema(texts: Sequence[str]) -> LabelSchema:
    # 1 and 0 may be numbers; words are not.
    is_anomaly = any(parse_anomaly(text) is not None and not text.isdigit() for text in texts)
    return LabelSchema("anomaly" if is_anomaly else "regress")
