"""What two bundles made of the same windows, added up: the body of a `shadow` message, and back.

Counts add, moments merge (Chan, Golub & LeVeque 1979), in any order and grouping; `why` is that of the later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.wire.messages import BundleStats, Moments, ShadowPayload

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# Squares of what is beyond are no numbers any more, or no sum of them is.
_MAX_MAGNITUDE = 1e100
_MAX_ERROR_LENGTH = 500
EMPTY_MOMENTS, EMPTY_STATS = Moments(), BundleStats(0, 0.0)


class OutputKind(msgspec.Struct, frozen=True):
    """What a bundle answers: `truth` is classify, several, regress or anomaly; `labels` it names classes by."""

    problem_type: str
    labels: tuple[str, ...] = ()

    def explain_mismatch(self, other: OutputKind) -> str:
        """Why answers of the two cannot agree, as a sentence; "" where they can."""
        if self.problem_type != other.problem_type:
            return f"one bundle answers as {self.problem_type}, the other as {other.problem_type}: their answers cannot agree"
        if self.labels and other.labels and not set(self.labels) & set(other.labels):
            ours, theirs = _format_labels(self.labels), _format_labels(other.labels)
            return f"one bundle names {ours}, the other {theirs}: they have no label in common and cannot agree"
        return ""


class Predictions(msgspec.Struct, frozen=True):
    """What a bundle said of w windows that end at `row` (w,), ascending, in `seconds` in the model.

    `label` (w,) index of the class, or `several` (w, K) which are said, or `verdict` (w,) whether it is an anomaly;
    `score` (w,), `value` (w,); `chance` (w,) that the answer is right, by its score. NaN where it is not known.
    """

    end_row: Ints
    seconds: float
    label: Ints | None = None
    label_mask: Bools | None = None
    is_anomaly: Bools | None = None
    score: Floats | None = None
    value: Floats | None = None
    correct_probability: Floats | None = None

    @property
    def numeric_output(self) -> Floats | None:
        """The score, or what stands in its place."""
        return self.value if self.score is None else self.score


class ComparisonStats(msgspec.Struct, frozen=True):
    """See `Shadow`. The empty tally changes nothing that it is added to."""

    batches: int = 0
    n: int = 0
    agreeing: int | None = None
    difference: Moments = EMPTY_MOMENTS
    model: BundleStats = EMPTY_STATS
    other: BundleStats = EMPTY_STATS
    labelled: tuple[int, int, int, int] = (0, 0, 0, 0)
    errors: int = 0
    error: str = ""

    @classmethod
    def from_message(cls, message: ShadowPayload) -> ComparisonStats:
        return cls(
            message.batches,
            message.n,
            message.agreeing,
            message.difference,
            message.stats,
            message.other_stats,
            message.labelled,
            message.errors,
            message.error,
        )

    def to_body(self) -> dict[str, Any]:
        """The members of a `shadow` message that are not who, what and where."""
        return {
            "batches": self.batches,
            "n": self.n,
            "same": self.agreeing,
            "apart": msgspec.to_builtins(self.difference),
            "answered": msgspec.to_builtins(self.model),
            "answered_beside": msgspec.to_builtins(self.other),
            "labelled": list(self.labelled),
            "errors": self.errors,
            "why": self.error,
        }

    def __add__(self, other: ComparisonStats) -> ComparisonStats:
        both, model_only, beside_only, neither = (a + b for a, b in zip(self.labelled, other.labelled, strict=True))
        return ComparisonStats(
            self.batches + other.batches,
            self.n + other.n,
            _merge_agreeing(self, other),
            merge_moments(self.difference, other.difference),
            _merge_stats(self.model, other.model),
            _merge_stats(self.other, other.other),
            (both, model_only, beside_only, neither),
            self.errors + other.errors,
            other.error or self.error,
        )


def compare_batch(
    kind: OutputKind, predictions: Predictions, other_kind: OutputKind, other_predictions: Predictions
) -> ComparisonStats:
    """Of one batch. Windows are matched by the row they end at; those of one bundle alone agree with nothing."""
    _, ours, theirs = np.intersect1d(
        predictions.end_row, other_predictions.end_row, assume_unique=True, return_indices=True
    )
    why = kind.explain_mismatch(other_kind)
    agree = None if why else _agreement_mask(kind, predictions, ours, other_kind, other_predictions, theirs)
    numbers, others = predictions.numeric_output, other_predictions.numeric_output
    apart = Moments() if why or numbers is None or others is None else compute_moments(others[theirs] - numbers[ours])
    return ComparisonStats(
        batches=1,
        n=len(ours),
        agreeing=None if agree is None else int(agree.sum()),
        difference=apart,
        model=_model_stats(predictions, ours),
        other=_model_stats(other_predictions, theirs),
        error=why[:_MAX_ERROR_LENGTH],
    )


def from_failure(error: str) -> ComparisonStats:
    """Of one batch in which `beside` failed."""
    return ComparisonStats(batches=1, errors=1, error=" ".join(error.split())[:_MAX_ERROR_LENGTH])


def from_correctness(model_correct: Sequence[bool], other_correct: Sequence[bool]) -> ComparisonStats:
    """Of labelled windows: in which each of the two was right."""
    ours, theirs = np.asarray(model_correct, bool), np.asarray(other_correct, bool)
    counts = [ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs]
    both, model_only, beside_only, neither = (int(one.sum()) for one in counts)
    return ComparisonStats(
        model=BundleStats(0, 0.0, correct=both + model_only),
        other=BundleStats(0, 0.0, correct=both + beside_only),
        labelled=(both, model_only, beside_only, neither),
    )


def from_abs_errors(model_errors: Floats, other_errors: Floats) -> ComparisonStats:
    """Of windows labelled with numbers: by how much, without sign, each of the two was off."""
    known = _is_usable(model_errors) & _is_usable(other_errors)
    return ComparisonStats(
        model=BundleStats(0, 0.0, abs_error=compute_moments(model_errors[known])),
        other=BundleStats(0, 0.0, abs_error=compute_moments(other_errors[known])),
    )


def compute_moments(values: Floats) -> Moments:
    """Of those that are numbers."""
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
    apart = b.mean - a.mean
    return Moments(n, a.mean + apart * (b.n / n), a.m2 + b.m2 + apart * apart * (a.n * b.n / n))


def _merge_agreeing(a: ComparisonStats, b: ComparisonStats) -> int | None:
    """Where one of the two had nothing to agree on, their sum would count windows that nobody compared."""
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
    )


def _model_stats(predictions: Predictions, matched: Ints) -> BundleStats:
    """What is expected is told of the same windows of both, so that it compares."""
    scores = Moments() if predictions.numeric_output is None else compute_moments(predictions.numeric_output)
    expected = (
        Moments()
        if predictions.correct_probability is None
        else compute_moments(predictions.correct_probability[matched])
    )
    return BundleStats(len(predictions.end_row), max(0.0, predictions.seconds), scores, expected)


def _agreement_mask(
    kind: OutputKind,
    predictions: Predictions,
    ours: Ints,
    other_kind: OutputKind,
    other_predictions: Predictions,
    theirs: Ints,
) -> Bools | None:
    """(n,) whether the matched windows were answered alike; None where answers are numbers."""
    if predictions.label is not None and other_predictions.label is not None:
        # Labels by name: their order may be another one.
        names = {name: index for index, name in enumerate(kind.labels)}
        index = np.array([names.get(name, -1) for name in other_kind.labels], np.int64)
        return np.asarray(predictions.label[ours] == index[other_predictions.label[theirs]])
    if predictions.label_mask is not None and other_predictions.label_mask is not None:
        union = sorted({*kind.labels, *other_kind.labels})
        return np.asarray(
            (
                _align_labels(predictions.label_mask[ours], kind, union)
                == _align_labels(other_predictions.label_mask[theirs], other_kind, union)
            ).all(axis=1)
        )
    if predictions.is_anomaly is not None and other_predictions.is_anomaly is not None:
        return np.asarray(predictions.is_anomaly[ours] == other_predictions.is_anomaly[theirs])
    return None


def _align_labels(label_mask: Bools, kind: OutputKind, union: Sequence[str]) -> Bools:
    """Columns (n, K) of the kind's labels among those of all."""
    found = np.zeros((len(label_mask), len(union)), bool)
    found[:, [union.index(name) for name in kind.labels]] = label_mask
    return found


def _is_usable(values: Floats) -> Bools:
    return np.asarray(np.abs(values) <= _MAX_MAGNITUDE)


def _format_labels(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (", …" if len(labels) > 4 else "")
