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
from agent.model.bundle.definition import Isotonic
from agent.model.bundle.manifest import Manifest, Output
from agent.model.inference import scores
from agent.model.inference.features import Floats, Ints
from agent.model.inference.scores import Scores
from agent.performance import metrics

# Fewer labelled results say nothing about how often a score is right.
FEWEST = 40
_BINS, _FEWEST_A_BIN = 32, 10
# Neighbouring results are alike: halves are made of blocks, not of single results.
_BLOCKS = 20
_TEMPERATURES = (0.05, 20.0)
_STEPS = 60
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
Doubles = NDArray[np.float64]
_Point = tuple[float, float, int]


class Learned(msgspec.Struct, frozen=True):
    """The output as it is now, and what to tell of it."""

    output: Output
    notes: list[str]
    warnings: list[str]


def calibrated(outputs: Floats, truth: NDArray[Any], manifest: Manifest, how: str) -> Learned:
    """`outputs` (w, K) of the model and the true class (w,) of each, or of each label 0 or 1 (w, L).

    Scores stay where calibration would not make the labels of the other half more likely. Raises UsageError.
    """
    many = manifest.output.multi_label
    if len(truth) < FEWEST:
        raise UsageError(f"{len(truth)} labelled results; at least {FEWEST} are needed to calibrate")
    if many and how == "isotonic":
        raise UsageError('calibration = "isotonic" is for one label a result; use "temperature"')
    if not many and len(np.unique(truth)) < 2:
        name = manifest.output.labels[int(truth[0])]
        raise UsageError(f"only one class, {name!r}, is in it; scores need all classes to be calibrated")
    plain = msgspec.structs.replace(manifest.output, isotonic=None)
    fit = _isotonic if how == "isotonic" else _temperature
    named = many or how == "isotonic"
    before = _Errors.of(outputs, truth, manifest, [plain] * 2, named=named)
    halves = [fit(outputs[some], truth[some], _with(manifest, plain)) for some in _halves(len(truth))]
    after = _Errors.of(outputs, truth, manifest, halves[::-1], named=named)
    told = f"ECE {before.ece:.3f} before, {after.ece:.3f} after (each half by the other, {len(truth)} results)"
    if not after.loss < before.loss:
        return Learned(plain, [], [f"calibration by {how} does not help: {told}; scores stay as they are"])
    found = fit(outputs, truth, _with(manifest, plain))
    detail = f"temperature {found.temperature:.4g}" if how == "temperature" else "isotonic"
    return Learned(found, [f"scores calibrated ({detail}): {told}"], [])


def threshold(values: Doubles, quantile: float, manifest: Manifest) -> Learned:
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
    return Learned(output, [note], warnings)


def centroid(outputs: Floats, manifest: Manifest) -> Output:
    """With the mean of vectors (w, K); of their directions, where distances are angles."""
    vectors = outputs.astype(np.float64)
    if manifest.output.distance == "cosine":
        lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
        vectors = vectors / np.where(lengths > 0, lengths, 1.0)
    return msgspec.structs.replace(manifest.output, centroid=vectors.mean(axis=0).tolist())


class _Errors(msgspec.Struct, frozen=True):
    ece: float
    loss: float

    @classmethod
    def of(
        cls, outputs: Floats, truth: NDArray[Any], manifest: Manifest, used: list[Output], *, named: bool
    ) -> _Errors:
        """Of two halves, each with its own output."""
        loss, score, right = 0.0, [], []
        for some, output in zip(_halves(len(truth)), used, strict=True):
            mine = _with(manifest, output)
            sure, was_right = _told(scores.of(outputs[some], mine), truth[some])
            loss += _of_named(sure, was_right) if named else _of_classes(outputs[some], truth[some], mine)
            score.append(sure)
            right.append(was_right)
        sure, was_right = np.concatenate(score), np.concatenate(right)
        return cls(metrics.ece(sure, was_right, metrics.equal_mass(sure), np.ones(len(sure))), loss)


def _halves(count: int) -> list[NDArray[np.bool_]]:
    second = np.arange(count) * _BLOCKS // max(1, count) % 2 == 1
    return [~second, second]


def _with(manifest: Manifest, output: Output) -> Manifest:
    return msgspec.structs.replace(manifest, format=2, output=output)


def _told(found: Scores, truth: NDArray[Any]) -> tuple[Doubles, Doubles]:
    """Every probability that is told, and whether what it is of was true."""
    if found.said is not None:
        return np.concatenate(list(found.more.values())), truth.T.reshape(-1).astype(np.float64)
    assert found.score is not None
    return found.score, np.asarray(found.label == truth, np.float64)


def _of_named(sure: Doubles, right: Doubles) -> float:
    """-Σ log probability of whether what was named was right."""
    sure = np.clip(sure, 1e-6, 1 - 1e-6)
    return -float(np.where(right > 0, np.log(sure), np.log(1 - sure)).sum())


def _of_classes(outputs: Floats, truth: NDArray[Any], manifest: Manifest) -> float:
    """-Σ log probability of the true class."""
    p = scores.probabilities(outputs, manifest.output)[np.arange(len(truth)), truth]
    return -float(np.log(np.clip(p, 1e-12, None)).sum())


def _temperature(outputs: Floats, truth: NDArray[Any], manifest: Manifest) -> Output:
    """Golden section over the logarithm of the temperature: the loss has one minimum in its inverse."""

    def at(logarithm: float) -> Output:
        return msgspec.structs.replace(manifest.output, temperature=math.exp(logarithm))

    def loss(logarithm: float) -> float:
        mine = _with(manifest, at(logarithm))
        if not mine.output.multi_label:
            return _of_classes(outputs, truth, mine)
        return _of_named(*_told(scores.of(outputs, mine), truth))

    best = _least(loss, *(math.log(bound) for bound in _TEMPERATURES))
    return msgspec.structs.replace(manifest.output, temperature=float(f"{math.exp(best):.6g}"))


def _least(loss: Callable[[float], float], low: float, high: float) -> float:
    left, right = high - _GOLDEN_RATIO * (high - low), low + _GOLDEN_RATIO * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN_RATIO * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN_RATIO * (high - low)
            at_right = loss(right)
    return (low + high) / 2


def _isotonic(outputs: Floats, truth: NDArray[Any], manifest: Manifest) -> Output:
    score, right = _told(scores.of(outputs, manifest), truth)
    order = np.argsort(score, kind="stable")
    bins = max(1, min(_BINS, len(score) // _FEWEST_A_BIN))
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
        return msgspec.structs.replace(manifest.output, isotonic=Isotonic([0.0, 1.0], [pooled[0][1]] * 2))
    found = Isotonic([round(x, 6) for x, _, _ in pooled], [round(y, 6) for _, y, _ in pooled])
    return msgspec.structs.replace(manifest.output, isotonic=found)


def of_windows(column: NDArray[Any], starts: Ints, rows: int) -> NDArray[Any]:
    """What was true of each window: of its last row."""
    found: NDArray[Any] = column[starts + rows - 1]
    return found
