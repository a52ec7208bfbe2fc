"""Comparison statistics: what two bundles predicted for the same windows, as the body of a `shadow` message.

Counts add and moments merge (Chan, Golub & LeVeque 1979), in any order and grouping. A sum keeps the later error text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from itertools import islice
from typing import Any, Protocol

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Bools, Float64s, Ints
from outstation.ml.performance.labels import LabelSchema
from outstation.protocol.wire.messages import MAX_OUTPUTS, BundleStats, ComparedOutput, Moments, ShadowPayload

# The square of a larger value, or a sum of such squares, overflows.
_MAX_MAGNITUDE = 1e100
_MAX_ERROR_LENGTH = 500
# Members of a body that are no option, that hold statistics of one bundle, and values that say nothing.
_SIDES = ("stats", "other_stats")
_REQUIRED = frozenset({"batches", "n", "agreeing", "windows", "seconds", *_SIDES})
_EMPTY_VALUES: tuple[Any, ...] = (0, None, "", {}, [0, 0, 0, 0], (0, 0, 0, 0), {"n": 0, "mean": 0.0, "m2": 0.0})
EMPTY_MOMENTS, EMPTY_STATS = Moments(), BundleStats(0, 0.0)


class OutputKind(msgspec.Struct, frozen=True):
    """Type of a bundle's predictions. `problem_type` is that of its labels: classify, several, regress or anomaly.

    `outputs`: those of its further outputs.
    """

    problem_type: str
    labels: tuple[str, ...] = ()
    outputs: Mapping[str, OutputKind] = {}

    @classmethod
    def from_schemas(cls, schemas: Mapping[str, LabelSchema]) -> OutputKind:
        """Return the kind of a bundle by the label schema of each output; the first one has the name ""."""
        kinds = {name: cls(schema.kind, schema.labels) for name, schema in schemas.items()}
        return replace(kinds.pop(""), outputs=kinds)

    def explain_mismatch(self, other: OutputKind) -> str:
        """Return why predictions of the two can never agree; "" if they can."""
        ours, theirs = self.problem_type, other.problem_type
        if not ours or not theirs:
            return "only one of the two bundles has this output"
        if ours != theirs:
            return f"one bundle answers as {ours}, the other as {theirs}: their answers cannot agree"
        if self.labels and other.labels and not set(self.labels) & set(other.labels):
            ours, theirs = _format_labels(self.labels), _format_labels(other.labels)
            return f"one bundle names {ours}, the other {theirs}: they have no label in common and cannot agree"
        return ""


class ScoredWindows(Protocol):
    """Results of inferences, as `Scores` of the models' package has them."""

    @property
    def label(self) -> Ints | None: ...
    @property
    def score(self) -> Float64s | None: ...
    @property
    def value(self) -> Float64s | None: ...
    @property
    def predicted(self) -> Bools | None: ...
    @property
    def anomaly(self) -> Bools | None: ...
    @property
    def outputs(self) -> Mapping[str, ScoredWindows]: ...


class Predictions(msgspec.Struct, frozen=True):
    """Predictions of one bundle for w windows that end at `end_row` (w,), ascending; `seconds` of inference time.

    One of `label` (w,) class indices, `label_mask` (w, K) predicted labels and `is_anomaly` (w,) is set. `score` (w,),
    `value` (w,), `correct_probability` (w,) that a prediction is correct, by its score, and `expected_error` (w,) of a
    value, by its inputs. NaN means unknown. `outputs`: those of further outputs, for the same windows.
    """

    end_row: Ints
    seconds: float
    label: Ints | None = None
    label_mask: Bools | None = None
    is_anomaly: Bools | None = None
    score: Float64s | None = None
    value: Float64s | None = None
    correct_probability: Float64s | None = None
    expected_error: Float64s | None = None
    outputs: Mapping[str, Predictions] = {}

    @classmethod
    def from_scores(cls, scores: ScoredWindows, end_row: Ints, seconds: float) -> Predictions:
        """Return the predictions of all outputs, without what is to be expected of them."""
        is_multi_label = scores.predicted is not None
        return cls(
            end_row,
            seconds,
            None if is_multi_label else scores.label,
            scores.predicted,
            scores.anomaly,
            scores.score,
            scores.value,
            outputs={name: cls.from_scores(own, end_row, 0.0) for name, own in scores.outputs.items()},
        )

    @property
    def numeric_output(self) -> Float64s | None:
        """The score, or the value of a model without scores."""
        return self.value if self.score is None else self.score


_NO_PREDICTIONS = Predictions(np.zeros(0, np.int64), 0.0)


class ComparisonStats(msgspec.Struct, frozen=True):
    """The sums in a `ShadowPayload`. Adding the empty value changes nothing.

    Those of further outputs, in `outputs`, count no batches.
    """

    batches: int = 0
    n: int = 0
    agreeing: int | None = None
    difference: Moments = EMPTY_MOMENTS
    model: BundleStats = msgspec.field(default=EMPTY_STATS, name="stats")
    other: BundleStats = msgspec.field(default=EMPTY_STATS, name="other_stats")
    labelled: tuple[int, int, int, int] = (0, 0, 0, 0)
    errors: int = 0
    error: str = ""
    outputs: dict[str, ComparisonStats] = {}

    @classmethod
    def from_message(cls, message: ShadowPayload | ComparedOutput) -> ComparisonStats:
        names = zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True)
        members = {field: getattr(message, name) for field, name in names if hasattr(message, name)}
        further = message.outputs if isinstance(message, ShadowPayload) else {}
        return cls(**{**members, "outputs": {name: cls.from_message(part) for name, part in further.items()}})

    def to_body(self) -> dict[str, Any]:
        """Return the members of a `shadow` message that hold sums, without those that are empty."""
        body = _omit_empty(msgspec.to_builtins(replace(self, outputs={})))
        outputs = {name: _select_output_members(part.to_body()) for name, part in self.outputs.items()}
        return body | ({"outputs": outputs} if outputs else {})

    def to_bodies(self, fits: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Return the members of as few messages as needed so that each fits; `join_part` puts them together again.

        Further outputs go into messages of their own, which count no batches. Texts of errors are cut before one that
        is too large all the same is returned.
        """
        parts = [replace(self, outputs={})]
        for name, output in self.outputs.items():
            longer = replace(parts[-1], outputs=parts[-1].outputs | {name: output})
            if fits(longer.to_body()):
                parts[-1] = longer
            else:
                parts.append(ComparisonStats(outputs={name: output}))
        return [part._fit(fits) for part in parts]

    def _fit(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        length = _MAX_ERROR_LENGTH
        while not fits(body := self._cut_errors(length).to_body()) and length:
            length //= 2
        return body

    def _cut_errors(self, length: int) -> ComparisonStats:
        outputs = {name: part._cut_errors(length) for name, part in self.outputs.items()}
        return replace(self, error=self.error[:length], outputs=outputs)

    def __add__(self, other: ComparisonStats) -> ComparisonStats:
        both, model_only, other_only, neither = (a + b for a, b in zip(self.labelled, other.labelled, strict=True))
        return ComparisonStats(
            self.batches + other.batches,
            self.n + other.n,
            _merge_agreeing(self, other),
            merge_moments(self.difference, other.difference),
            _merge_stats(self.model, other.model),
            _merge_stats(self.other, other.other),
            (both, model_only, other_only, neither),
            self.errors + other.errors,
            other.error or self.error,
            _merge_outputs(self.outputs, other.outputs),
        )


def compare_batch(
    kind: OutputKind, predictions: Predictions, other_kind: OutputKind, other_predictions: Predictions
) -> ComparisonStats:
    """Return the statistics of one batch. Windows match by the row they end at; unmatched ones never agree."""
    _, ours, theirs = np.intersect1d(
        predictions.end_row, other_predictions.end_row, assume_unique=True, return_indices=True
    )
    first = _compare_output(kind, predictions, ours, other_kind, other_predictions, theirs)
    outputs = {
        name: _compare_output(
            *_select_output(kind, predictions, name), ours, *_select_output(other_kind, other_predictions, name), theirs
        )
        for name in dict.fromkeys([*predictions.outputs, *other_predictions.outputs])
    }
    return replace(first, batches=1, outputs=outputs)


def _select_output(kind: OutputKind, predictions: Predictions, name: str) -> tuple[OutputKind, Predictions]:
    if name not in predictions.outputs:
        return OutputKind(""), _NO_PREDICTIONS
    return kind.outputs[name], predictions.outputs[name]


def _compare_output(
    kind: OutputKind,
    predictions: Predictions,
    ours: Ints,
    other_kind: OutputKind,
    other_predictions: Predictions,
    theirs: Ints,
) -> ComparisonStats:
    """Compare windows `ours` (n,) of one bundle with `theirs` (n,) of the other, for one output."""
    mismatch = kind.explain_mismatch(other_kind)
    agrees = None if mismatch else _agreement_mask(kind, predictions, ours, other_kind, other_predictions, theirs)
    numbers, others = predictions.numeric_output, other_predictions.numeric_output
    difference = Moments()
    if not mismatch and numbers is not None and others is not None:
        difference = compute_moments(others[theirs] - numbers[ours])
    return ComparisonStats(
        n=len(ours),
        agreeing=None if agrees is None else int(agrees.sum()),
        difference=difference,
        model=_bundle_stats(predictions, ours),
        other=_bundle_stats(other_predictions, theirs),
        error=mismatch[:_MAX_ERROR_LENGTH],
    )


def from_failure(error: str) -> ComparisonStats:
    """Return the statistics of one batch in which the other bundle failed."""
    return ComparisonStats(batches=1, errors=1, error=" ".join(error.split())[:_MAX_ERROR_LENGTH])


def from_correctness(model_correct: Sequence[bool], other_correct: Sequence[bool]) -> ComparisonStats:
    """Return the statistics of labelled windows, from which of the two predictions were correct."""
    ours, theirs = np.asarray(model_correct, bool), np.asarray(other_correct, bool)
    masks = (ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs)
    both, model_only, other_only, neither = (int(mask.sum()) for mask in masks)
    return ComparisonStats(
        model=BundleStats(0, 0.0, correct=both + model_only),
        other=BundleStats(0, 0.0, correct=both + other_only),
        labelled=(both, model_only, other_only, neither),
    )


def from_abs_errors(model_errors: Float64s, other_errors: Float64s) -> ComparisonStats:
    """Return the statistics of windows with numeric labels, from the absolute errors of both bundles."""
    known = _is_usable(model_errors) & _is_usable(other_errors)
    return ComparisonStats(
        model=BundleStats(0, 0.0, abs_error=compute_moments(model_errors[known])),
        other=BundleStats(0, 0.0, abs_error=compute_moments(other_errors[known])),
    )


def compute_moments(values: Float64s) -> Moments:
    """Return the moments of the usable `values`: no NaN, and none so large that squares overflow."""
    known = np.asarray(values, np.float64)
    known = known[_is_usable(known)]
    if not len(known):
        return Moments()
    mean = float(known.mean())
    return Moments(len(known), mean, float(np.square(known - mean).sum()))


def merge_moments(a: Moments, b: Moments) -> Moments:
    n = a.n + b.n
    if not a.n or not b.n:
        return a if a.n else b
    delta = b.mean - a.mean
    return Moments(n, a.mean + delta * (b.n / n), a.m2 + b.m2 + delta * delta * (a.n * b.n / n))


def _merge_agreeing(a: ComparisonStats, b: ComparisonStats) -> int | None:
    """Return None if either part had incomparable predictions: its windows would count as disagreement."""
    if not a.n or not b.n:
        return a.agreeing if a.n else b.agreeing
    return None if a.agreeing is None or b.agreeing is None else a.agreeing + b.agreeing


def _merge_stats(a: BundleStats, b: BundleStats) -> BundleStats:
    return BundleStats(
        a.windows + b.windows,
        a.seconds + b.seconds,
        merge_moments(a.scores, b.scores),
        merge_moments(a.expected_accuracy, b.expected_accuracy),
        a.correct + b.correct,
        merge_moments(a.abs_error, b.abs_error),
        merge_moments(a.expected_error, b.expected_error),
    )


def _bundle_stats(predictions: Predictions, matched: Ints) -> BundleStats:
    """Take what is expected from matched windows only, so that the two bundles' are comparable."""
    output, expected = predictions.numeric_output, (predictions.correct_probability, predictions.expected_error)
    scores = Moments() if output is None else compute_moments(output)
    accuracy, error = (Moments() if values is None else compute_moments(values[matched]) for values in expected)
    windows, seconds = len(predictions.end_row), max(0.0, predictions.seconds)
    return BundleStats(windows, seconds, scores, accuracy, expected_error=error)


def _merge_outputs(a: dict[str, ComparisonStats], b: dict[str, ComparisonStats]) -> dict[str, ComparisonStats]:
    empty = ComparisonStats()
    return {name: a.get(name, empty) + b.get(name, empty) for name in sorted(a.keys() | b.keys())}


def _select_output_members(body: dict[str, Any]) -> dict[str, Any]:
    return {name: body[name] for name in ComparedOutput.__struct_fields__ if name in body}


def _omit_empty(body: dict[str, Any]) -> dict[str, Any]:
    """Leave out optional members that say nothing, which are most of a message with many outputs."""
    members = {name: _omit_empty(value) if name in _SIDES else value for name, value in body.items()}
    return {name: value for name, value in members.items() if name in _REQUIRED or value not in _EMPTY_VALUES}


def join_part(messages: MutableSequence[ShadowPayload], body: ShadowPayload) -> None:
    """Append a message, or join it with an earlier one if a device has split a comparison into both.

    One of the two then counts no batches, and holds further outputs that the other does not have.
    """
    for place, other in enumerate(islice(reversed(messages), MAX_OUTPUTS), 1):
        head, part = (other, body) if _is_part(body) else (body, other)
        outputs = head.outputs | part.outputs
        is_disjoint = len(outputs) == len(head.outputs) + len(part.outputs) <= MAX_OUTPUTS
        if _is_part(part) and is_disjoint and block_key(head) == block_key(part):
            errors, error = head.errors + part.errors, head.error or part.error
            messages[-place] = replace(head, outputs=outputs, errors=errors, error=error)
            return
    messages.append(body)


def _is_part(body: ShadowPayload) -> bool:
    return not (body.batches or body.n or sum(body.labelled) or body.stats.abs_error.n) and bool(body.outputs)


def block_key(body: ShadowPayload) -> tuple[Any, ...]:
    """Return the key of a comparison, which all messages share that a device has split it into."""
    return body.log, body.time, body.rows, body.rollout, body.model.digest, body.other.digest


def _agreement_mask(
    kind: OutputKind,
    predictions: Predictions,
    ours: Ints,
    other_kind: OutputKind,
    other_predictions: Predictions,
    theirs: Ints,
) -> Bools | None:
    """Return (n,) which matched windows have equal predictions; None if predictions are numbers."""
    if predictions.label is not None and other_predictions.label is not None:
        # Match labels by name: two bundles may list them in different orders.
        names = {name: index for index, name in enumerate(kind.labels)}
        index = np.array([names.get(name, -1) for name in other_kind.labels], np.int64)
        return np.asarray(predictions.label[ours] == index[other_predictions.label[theirs]])
    if predictions.label_mask is not None and other_predictions.label_mask is not None:
        union = sorted({*kind.labels, *other_kind.labels})
        mask = _align_labels(predictions.label_mask[ours], kind, union)
        other_mask = _align_labels(other_predictions.label_mask[theirs], other_kind, union)
        return np.asarray((mask == other_mask).all(axis=1))
    if predictions.is_anomaly is not None and other_predictions.is_anomaly is not None:
        return np.asarray(predictions.is_anomaly[ours] == other_predictions.is_anomaly[theirs])
    return None


def _align_labels(label_mask: Bools, kind: OutputKind, union: Sequence[str]) -> Bools:
    """Return the columns (n, K) of `kind`'s labels as (n, len(union))."""
    aligned = np.zeros((len(label_mask), len(union)), bool)
    aligned[:, [union.index(name) for name in kind.labels]] = label_mask
    return aligned


def _is_usable(values: Float64s) -> Bools:
    return np.asarray(np.abs(values) <= _MAX_MAGNITUDE)


def _format_labels(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (", …" if len(labels) > 4 else "")
