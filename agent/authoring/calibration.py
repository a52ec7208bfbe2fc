"""What a bundle learns from data that its model was not trained on: calibrated scores, a threshold, a centroid.

Temperature: the one that makes the labels most likely (Guo et al. 2017). Isotonic: how often the most probable class is
right, by bins of equally many results, made to ascend (pool adjacent violators; Zadrozny and Elkan 2002). What both
would do to new data is told by cross-fitting: each half is calibrated by what was learned from the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.errors import UsageError
from agent.model.bundle.definition import IsotonicCalibration
from agent.model.bundle.manifest import Manifest, ModelOutput
from agent.model.inference import scores
from agent.model.inference.features import Floats, Ints
from agent.model.inference.scores import Scores
from agent.performance.metrics import LabelledPredictions, compute_value

# Fewer labelled results say nothing about how often a score is right.
MIN_LABELLED_RESULTS = 40
_BINS, _MIN_PER_BIN = 32, 10
# Neighbouring results are alike: halves are made of blocks, not of single results.
_BLOCKS = 20
_TEMPERATURES = (0.05, 20.0)
_SEARCH_STEPS = 60
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
Doubles = NDArray[np.float64]
_Point = tuple[float, float, int]


class CalibrationResult(msgspec.Struct, frozen=True):
    """The output as it is now, and what to tell of it."""

    output: ModelOutput
    notes: list[str]
    warnings: list[str]


def calibrate_scores(outputs: Floats, truth: NDArray[Any], manifest: Manifest, method: str) -> CalibrationResult:
    """`outputs` (w, K) of the model and the true class (w,) of each, or of each label 0 or 1 (w, L).

    Scores stay where calibration would not make the labels of the other half more likely. Raises UsageError.
    """
    many = manifest.output.multi_label
    if len(truth) < MIN_LABELLED_RESULTS:
        raise UsageError(f"{len(truth)} labelled results; at least {MIN_LABELLED_RESULTS} are needed to calibrate")
    if many and method == "isotonic":
        raise UsageError('calibration = "isotonic" is for one label a result; use "temperature"')
    if not many and len(np.unique(truth)) < 2:
        name = manifest.output.labels[int(truth[0])]
        raise UsageError(f"only one class, {name!r}, is in it; scores need all classes to be calibrated")
    plain = msgspec.structs.replace(manifest.output, isotonic=None)
    fit = _fit_isotonic if method == "isotonic" else _fit_temperature
    named = many or method == "isotonic"
    before = _CalibrationError.from_halves(outputs, truth, manifest, [plain] * 2, by_predicted_label=named)
    halves = [fit(outputs[some], truth[some], _with_output(manifest, plain)) for some in _split_halves(len(truth))]
    after = _CalibrationError.from_halves(outputs, truth, manifest, halves[::-1], by_predicted_label=named)
    told = f"ECE {before.ece:.3f} before, {after.ece:.3f} after (each half by the other, {len(truth)} results)"
    if not after.loss < before.loss:
        return CalibrationResult(plain, [], [f"calibration by {method} does not help: {told}; scores stay as they are"])
    found = fit(outputs, truth, _with_output(manifest, plain))
    detail = f"temperature {found.temperature:.4g}" if method == "temperature" else "isotonic"
    return CalibrationResult(found, [f"scores calibrated ({detail}): {told}"], [])


def fit_threshold(values: Doubles, quantile: float, manifest: Manifest) -> CalibrationResult:
    """Above a share `quantile` of `values` (w,), which are normal. Raises UsageError."""
    if not np.isfinite(values).all():
        raise UsageError("the model answers with values that are not finite; look at its inputs")
    limit = float(np.quantile(values, quantile, method="higher"))
    output = msgspec.structs.replace(manifest.output, threshold=limit)
    above = int((values > limit).sum())
    note = f"threshold {limit:.6g}: {1 - above / len(values):.1%} of {len(values)} normal windows are not above it"
    beyond = len(values) * (1 - quantile)
    warnings = []
    if beyond < 5:
        warnings.append(
            f"the threshold rests on {beyond:.1f} of {len(values)} windows above quantile {quantile:g}; "
            "give more data, or a lower [output] quantile"
        )
    return CalibrationResult(output, [note], warnings)


def fit_centroid(outputs: Floats, manifest: Manifest) -> ModelOutput:
    """With the mean of vectors (w, K); of their directions, where distances are angles."""
    vectors = outputs.astype(np.float64)
    if manifest.output.distance == "cosine":
        lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
        vectors = vectors / np.where(lengths > 0, lengths, 1.0)
    return msgspec.structs.replace(manifest.output, centroid=vectors.mean(axis=0).tolist())


class _CalibrationError(msgspec.Struct, frozen=True):
    ece: float
    loss: float

    @classmethod
    def from_halves(
        cls,
        outputs: Floats,
        truth: NDArray[Any],
        manifest: Manifest,
        half_outputs: list[ModelOutput],
        *,
        by_predicted_label: bool,
    ) -> _CalibrationError:
        """Of two halves, each with its own output."""
        loss, score, right = 0.0, [], []
        for some, output in zip(_split_halves(len(truth)), half_outputs, strict=True):
            mine = _with_output(manifest, output)
            sure, was_right = _flatten_confidences(scores.from_outputs(outputs[some], mine), truth[some])
            loss += (
                _binary_log_loss(sure, was_right)
                if by_predicted_label
                else _class_log_loss(outputs[some], truth[some], mine)
            )
            score.append(sure)
            right.append(was_right)
        sure, was_right = np.concatenate(score), np.concatenate(right)
        predictions = LabelledPredictions(np.ones(len(sure)), was_right.astype(np.int64), sure)
        return cls(compute_value("ece", "classify", predictions), loss)


def _split_halves(count: int) -> list[NDArray[np.bool_]]:
    second = np.arange(count) * _BLOCKS // max(1, count) % 2 == 1
    return [~second, second]


def _with_output(manifest: Manifest, output: ModelOutput) -> Manifest:
    return msgspec.structs.replace(manifest, format=2, output=output)


def _flatten_confidences(predicted: Scores, truth: NDArray[Any]) -> tuple[Doubles, Doubles]:
    """Every probability that is told, and whether what it is of was true."""
    if predicted.predicted is not None:
        return np.concatenate(list(predicted.extra_columns.values())), truth.T.reshape(-1).astype(np.float64)
    assert predicted.score is not None
    return predicted.score, np.asarray(predicted.label == truth, np.float64)


def _binary_log_loss(sure: Doubles, right: Doubles) -> float:
    """-Σ log probability of whether what was named was right."""
    sure = np.clip(sure, 1e-6, 1 - 1e-6)
    return -float(np.where(right > 0, np.log(sure), np.log(1 - sure)).sum())


def _class_log_loss(outputs: Floats, truth: NDArray[Any], manifest: Manifest) -> float:
    """-Σ log probability of the true class."""
    p = scores.compute_probabilities(outputs, manifest.output)[np.arange(len(truth)), truth]
    return -float(np.log(np.clip(p, 1e-12, None)).sum())


def _fit_temperature(outputs: Floats, truth: NDArray[Any], manifest: Manifest) -> ModelOutput:
    """Golden section over the logarithm of the temperature: the loss has one minimum in its inverse."""

    def with_temperature(logarithm: float) -> ModelOutput:
        return msgspec.structs.replace(manifest.output, temperature=math.exp(logarithm))

    def loss(logarithm: float) -> float:
        mine = _with_output(manifest, with_temperature(logarithm))
        if not mine.output.multi_label:
            return _class_log_loss(outputs, truth, mine)
        return _binary_log_loss(*_flatten_confidences(scores.from_outputs(outputs, mine), truth))

    best = _golden_section_search(loss, *(math.log(bound) for bound in _TEMPERATURES))
    return msgspec.structs.replace(manifest.output, temperature=float(f"{math.exp(best):.6g}"))


def _golden_section_search(loss: Callable[[float], float], low: float, high: float) -> float:
    left, right = high - _GOLDEN_RATIO * (high - low), low + _GOLDEN_RATIO * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(_SEARCH_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN_RATIO * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN_RATIO * (high - low)
            at_right = loss(right)
    return (low + high) / 2


def _fit_isotonic(outputs: Floats, truth: NDArray[Any], manifest: Manifest) -> ModelOutput:
    score, right = _flatten_confidences(scores.from_outputs(outputs, manifest), truth)
    order = np.argsort(score, kind="stable")
    bins = max(1, min(_BINS, len(score) // _MIN_PER_BIN))
    # Half a result on each side: nothing is certain that was seen some twenty times.
    points = [
        (float(score[some].mean()), (float(right[some].sum()) + 0.5) / (len(some) + 1), len(some))
        for some in np.array_split(order, bins)
    ]
    pooled: list[_Point] = []
    for point in points:
        pooled.append(point)
        while len(pooled) > 1 and (
            pooled[-2][1] >= pooled[-1][1] or round(pooled[-2][0], 6) >= round(pooled[-1][0], 6)
        ):
            (x, y, n), (more_x, more_y, more) = pooled[-2], pooled[-1]
            both = n + more
            pooled[-2:] = [((x * n + more_x * more) / both, (y * n + more_y * more) / both, both)]
    if len(pooled) == 1:
        return msgspec.structs.replace(manifest.output, isotonic=IsotonicCalibration([0.0, 1.0], [pooled[0][1]] * 2))
    found = IsotonicCalibration([round(x, 6) for x, _, _ in pooled], [round(y, 6) for _, y, _ in pooled])
    return msgspec.structs.replace(manifest.output, isotonic=found)


def select_window_labels(column: NDArray[Any], starts: Ints, rows: int) -> NDArray[Any]:
    """What was true of each window: of its last row."""
    found: NDArray[Any] = column[starts + rows - 1]
    return found
