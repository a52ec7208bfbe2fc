"""Scores: model outputs to labels, calibrated probabilities and values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Bools, Float32s, Float64s, Ints
from outstation.foundation.indices import bincount
from outstation.ml.drift.outputs.counts import MAX_VALUES, FurtherOutput
from outstation.ml.model.bundle.manifest import Manifest, ModelOutput, output_columns
from outstation.ml.performance.labels import MAX_MULTILABEL_CLASSES, NO_LABEL, SEPARATOR

NORMAL, ANOMALY = "normal", "anomaly"
_MAX_NUMBERS_IN_ORDER = 7


class Scores(msgspec.Struct, frozen=True):
    """Results of w inferences: class index `label` (w,) with calibrated probability `score` (w,), or `value` (w,).

    For a multi-label model `label` is the most probable one, `predicted` (w, K) the predicted ones, and `score` the
    probability that all of them are correct if labels were independent. `anomaly` (w,) marks values above the
    threshold. `extra_columns` are a probability per label (`score_LABEL`), further values (`value_NAME`), and scores
    and values of further outputs, whose labels as text are in `label_columns`. `outputs` holds the results of
    each further output by name.
    """

    label: Ints | None
    score: Float64s | None
    value: Float64s | None
    predicted: Bools | None = None
    anomaly: Bools | None = None
    extra_columns: Mapping[str, Float64s] = msgspec.field(default_factory=dict)
    label_columns: Mapping[str, NDArray[np.str_]] = msgspec.field(default_factory=dict)
    outputs: Mapping[str, Scores] = msgspec.field(default_factory=dict)

    def slice(self, part: slice) -> Scores:
        return Scores(
            None if self.label is None else self.label[part],
            None if self.score is None else self.score[part],
            None if self.value is None else self.value[part],
            predicted=None if self.predicted is None else self.predicted[part],
            anomaly=None if self.anomaly is None else self.anomaly[part],
            extra_columns={name: column[part] for name, column in self.extra_columns.items()},
            label_columns={name: column[part] for name, column in self.label_columns.items()},
            outputs={name: output.slice(part) for name, output in self.outputs.items()},
        )

    @property
    def further_answers(self) -> Float64s | None:
        """(w, P) further outputs as numbers: of each the index of its label, if it has any, and its score or values."""
        numbers = [column for output in self.outputs.values() for column in output._answer_columns()]
        return np.stack(numbers, axis=1, dtype=np.float64) if numbers else None

    def _answer_columns(self) -> list[NDArray[Any]]:
        if self.label is not None and self.score is not None:
            return [self.label, self.score]
        return [np.asarray(self.value), *self.extra_columns.values()][:MAX_VALUES]

    def __len__(self) -> int:
        present = self.value if self.label is None else self.label
        return 0 if present is None else len(present)


class Labels(msgspec.Struct, frozen=True, eq=False):
    """Labels of w results: distinct `texts`, and the index (w,) of each result's."""

    texts: Sequence[str]
    codes: Ints

    @classmethod
    def from_list(cls, labels: Sequence[str]) -> Labels:
        codes = {text: code for code, text in enumerate(dict.fromkeys(labels))}
        return cls([*codes], np.array([codes[text] for text in labels], np.int64))

    def to_list(self) -> list[str]:
        texts = self.texts
        return [texts[code] for code in self.codes.tolist()]

    def list_used(self) -> list[str]:
        """Return the texts that results have."""
        return [self.texts[code] for code in np.flatnonzero(bincount(self.codes)).tolist()]


def from_outputs(outputs: Float32s, manifest: Manifest, inputs: Float32s | None = None) -> Scores:
    """Compute scores from `outputs` (w, K).

    The value of an autoencoder is its mean squared error against `inputs` (w, …); that of any other anomaly model is
    its first output.
    """
    further = manifest.further
    if not further:
        return _score(outputs, manifest, inputs)
    own, *parts = split_outputs(outputs, manifest)
    first = _score(own, manifest, inputs)
    columns, label_columns = dict(first.extra_columns), dict(first.label_columns)
    outputs_by_name: dict[str, Scores] = {}
    for (name, spec), part in zip(further.items(), parts, strict=True):
        head = further_manifest(manifest, name)
        scored = _score(part, head, None)
        texts = to_texts(scored, head)
        outputs_by_name[name] = scored
        cells = [None if texts is None else np.array(texts, np.str_), scored.score, scored.value]
        cells += list(scored.extra_columns.values())
        for column, values in zip(
            output_columns(name, spec), [values for values in cells if values is not None], strict=True
        ):
            target: dict[str, Any] = label_columns if values.dtype.kind == "U" else columns
            target[column] = values
    return msgspec.structs.replace(first, extra_columns=columns, label_columns=label_columns, outputs=outputs_by_name)


def monitored_outputs(manifest: Manifest) -> tuple[FurtherOutput, ...]:
    """Return the further outputs as drift detection sees them; of many values the first ones."""
    outputs: list[FurtherOutput] = []
    for name, spec in manifest.further.items():
        values = tuple(spec.names or [name])[:MAX_VALUES] if spec.kind == "regress" else ("value",)
        outputs.append(FurtherOutput(name, tuple(spec.labels), ("score",) if spec.labels else values))
    return tuple(outputs)


def split_outputs(outputs: Float32s, manifest: Manifest) -> list[Float32s]:
    """Return the outputs (w, K) of the first output and of each further one."""
    sizes = [spec.values for spec in manifest.further.values()]
    ends = np.cumsum([outputs.shape[1] - sum(sizes), *sizes])
    return np.split(outputs, ends[:-1], axis=1)


def further_manifest(manifest: Manifest, name: str) -> Manifest:
    """Return the manifest of a model that has only the further output `name`."""
    spec = manifest.further[name]
    members = {field: getattr(spec, field) for field in ModelOutput.__struct_fields__}
    members["tensor"] = name if spec.tensor is None else spec.tensor
    drift = msgspec.structs.replace(manifest.drift, class_field=msgspec.UNSET)
    return msgspec.structs.replace(
        manifest, kind=spec.kind, output=ModelOutput(**members), outputs=msgspec.UNSET, drift=drift
    )


def _score(outputs: Float32s, manifest: Manifest, inputs: Float32s | None) -> Scores:
    output = manifest.output
    if manifest.kind == "classify":
        p = compute_probabilities(outputs, output)
        if not output.multi_label:
            return _score_single_label(p, output)
        predicted = p > np.asarray(output.thresholds or (0.5 if output.threshold is None else output.threshold))
        score = np.where(predicted, p, 1 - p).prod(axis=1)
        extra_columns = {f"score_{label}": p[:, i] for i, label in enumerate(output.labels)}
        return Scores(p.argmax(axis=1), score, None, predicted=predicted, extra_columns=extra_columns)
    if manifest.kind == "regress":
        extra_columns = {f"value_{name}": outputs[:, i].astype(np.float64) for i, name in enumerate(output.names) if i}
        value = outputs[:, 0].astype(np.float64)
        if output.residual_bounds is not None:
            low, high = output.residual_bounds
            extra_columns = {"value_low": value + low, "value_high": value + high, **extra_columns}
        return Scores(None, None, value, extra_columns=extra_columns)
    return from_values(compute_values(outputs, manifest, inputs), output)


def from_values(value: Float64s, output: ModelOutput) -> Scores:
    """Mark the anomaly values (w,) above the threshold."""
    anomaly = None if output.threshold is None else value > output.threshold
    return Scores(None, None, value, anomaly=anomaly)


def compute_values(outputs: Float32s, manifest: Manifest, inputs: Float32s | None) -> Float64s:
    """Return the anomaly value (w,) of each inference of kind anomaly or embedding."""
    if manifest.kind == "embedding":
        return centroid_distance(outputs, manifest.output)
    if inputs is not None and outputs.size == inputs.size:
        errors = outputs.astype(np.float64) - inputs.reshape(outputs.shape)
        return np.asarray(np.square(errors).mean(axis=1))
    return outputs[:, 0].astype(np.float64)


def centroid_distance(outputs: Float32s, output: ModelOutput) -> Float64s:
    """Return the distance (w,) of vectors (w, K) from the centroid: Euclidean, or 1 - the cosine of the angle."""
    vectors, centroid = outputs.astype(np.float64), np.asarray(output.centroid, np.float64)
    if output.distance == "euclidean":
        return np.asarray(np.sqrt(np.square(vectors - centroid).sum(axis=1)))
    lengths = np.sqrt(np.square(vectors).sum(axis=1)) * np.sqrt(np.square(centroid).sum())
    # A vector of length 0 has no direction: it counts as orthogonal.
    return np.asarray(1.0 - (vectors * centroid).sum(axis=1) / np.where(lengths > 0, lengths, 1.0))


def to_labels(scores: Scores, manifest: Manifest) -> Labels | None:
    """Return the labels, those of a multi-label model joined with `|`, "-" for none; None without labels."""
    labels = manifest.output.labels
    if scores.predicted is not None:
        rows = scores.predicted.tolist()
        return Labels.from_list([SEPARATOR.join(itertools.compress(labels, row)) or NO_LABEL for row in rows])
    if scores.label is not None:
        return Labels(labels, scores.label)
    if scores.anomaly is not None:
        return Labels((NORMAL, ANOMALY), scores.anomaly.astype(np.int64))
    return None


def to_texts(scores: Scores, manifest: Manifest) -> list[str] | None:
    """Return each of `to_labels` as text."""
    labels = to_labels(scores, manifest)
    return None if labels is None else labels.to_list()


def to_codes(scores: Scores) -> Ints | None:
    """Return each prediction as one number (w,), as `LabelSchema.parse` does; None for values without a threshold."""
    if scores.anomaly is not None:
        return scores.anomaly.astype(np.int64)
    if scores.predicted is None:
        return scores.label
    if scores.predicted.shape[1] > MAX_MULTILABEL_CLASSES:
        return None
    return np.asarray(scores.predicted @ (1 << np.arange(scores.predicted.shape[1])), np.int64)


def concatenate(parts: Sequence[Scores]) -> Scores:
    """Return the results of one model in the order of the parts. Raises ValueError if their columns differ."""
    if len(parts) == 1:
        return parts[0]

    def column(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        if any((values is None) != (columns[0] is None) for values in columns):
            raise ValueError(f"not all parts have {name}: they are results of different models")
        return None if columns[0] is None else np.concatenate(columns)

    def each(name: str, join: Callable[[list[Any]], Any]) -> dict[str, Any]:
        members = [getattr(part, name) for part in parts]
        if any(by_name.keys() != members[0].keys() for by_name in members):
            raise ValueError(f"the parts differ in the names of {name}: they are results of different models")
        return {key: join([by_name[key] for by_name in members]) for key in members[0]}

    return Scores(
        column("label"),
        column("score"),
        column("value"),
        predicted=column("predicted"),
        anomaly=column("anomaly"),
        extra_columns=each("extra_columns", np.concatenate),
        label_columns=each("label_columns", np.concatenate),
        outputs=each("outputs", concatenate),
    )


def _score_single_label(p: Float64s, output: ModelOutput) -> Scores:
    if p.shape[1] == 2 and output.threshold is not None:
        label = (p[:, 1] > output.threshold).astype(np.int64)
    else:
        label = p.argmax(axis=1)
    score = p[np.arange(len(p)), label]
    if output.isotonic is not None:
        score = np.interp(score, output.isotonic.score, output.isotonic.accuracy)
    return Scores(label, score, None)


def compute_probabilities(outputs: Float32s, output: ModelOutput) -> Float64s:
    """Return calibrated class probabilities (w, K). A single sigmoid output becomes two classes."""
    # By column where NumPy adds the few numbers of a row in their order: a third of the time, and the same bits.
    by_column = outputs.shape[1] <= _MAX_NUMBERS_IN_ORDER and not output.multi_label
    x = outputs.astype(np.float64, order="F" if by_column else "C")
    if output.multi_label:
        return _sigmoid(_to_logits(x, output) / output.temperature)
    if x.shape[1] == 1:
        p = _sigmoid(_to_logits(x, output) / output.temperature)
        return np.concatenate([1.0 - p, p], axis=1)
    if output.activation == "sigmoid":
        return _sigmoid(x / output.temperature)
    logits = (x if output.activation == "softmax" else np.log(np.clip(x, 1e-6, None))) / output.temperature
    # Infinite outputs of a float model become NaN, and null in messages.
    with np.errstate(invalid="ignore"):
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def _to_logits(x: Float64s, output: ModelOutput) -> Float64s:
    """Return logits: the inverse of sigmoids in the graph (activation "none"), or the outputs themselves."""
    if output.activation != "none":
        return x
    return np.asarray(np.log(np.clip(x, 1e-6, 1)) - np.log(np.clip(1 - x, 1e-6, 1)))


def _sigmoid(x: Float64s) -> Float64s:
    """Return 1 / (1 + e^-x) without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)))
