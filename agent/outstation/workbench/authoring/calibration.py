"""Calibration from held-out data: calibrated scores, the threshold and the centroid of anomaly models.

Temperature scaling maximises the likelihood of the labels (Guo et al. 2017). Isotonic calibration takes the accuracy of
bins of equally many results, made to ascend (pool adjacent violators; Zadrozny and Elkan 2002). Cross-fitting estimates
the effect on new data: each half is calibrated by what was learned from the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Float64s
from outstation.foundation.errors import BadBundle, ConfigError, UsageError
from outstation.ml.datasets import joined_rows, training_data
from outstation.ml.datasets.training_data import LabelParser, TrainingData
from outstation.ml.model.bundle.manifest import IsotonicCalibration, Manifest, ModelOutput
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.inference import Inference, InferenceResult
from outstation.ml.model.inference.runtime import TfliteModel
from outstation.ml.model.inference.scores import Scores
from outstation.ml.performance.metrics import LabelledPredictions, compute_value
from outstation.workbench.authoring.spec import Spec

# With fewer labelled results the accuracy of a score is unknown.
MIN_LABELLED_RESULTS = 40
_BINS, _MIN_PER_BIN = 32, 10
# Share of residuals beyond each bound.
_TAIL = 0.025
MIN_BOUNDED_RESIDUALS = 100
# Neighbouring results are alike, so halves are made of blocks, not of single results.
_BLOCKS = 20
_TEMPERATURES = (0.05, 20.0)
_SEARCH_STEPS = 60
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_Point = tuple[float, float, int]


class CalibrationResult(msgspec.Struct, frozen=True):
    output: ModelOutput
    notes: list[str]
    warnings: list[str]


def calibrate_scores(outputs: Float32s, truth: NDArray[Any], manifest: Manifest, method: str) -> CalibrationResult:
    """Calibrate scores from outputs (w, K) of the first output, if that helps. Raises UsageError.

    `truth` are classes (w,), or (w, L) for several labels.
    """
    manifest = msgspec.structs.replace(manifest, outputs=msgspec.UNSET)
    multi_label = manifest.output.multi_label
    if len(truth) < MIN_LABELLED_RESULTS:
        raise UsageError(f"{len(truth)} labelled results; at least {MIN_LABELLED_RESULTS} are needed to calibrate")
    if multi_label and method == "isotonic":
        raise UsageError('calibration_method = "isotonic" is for one label a result; use "temperature"')
    if not multi_label and len(np.unique(truth)) < 2:
        name = manifest.output.labels[int(truth[0])]
        raise UsageError(f"the data have only one class, {name!r}; calibration needs all classes")
    plain = msgspec.structs.replace(manifest.output, isotonic=None)
    fit = _fit_isotonic if method == "isotonic" else _fit_temperature
    by_label = multi_label or method == "isotonic"
    ece_before, loss_before = _measure_halves(outputs, truth, manifest, [plain] * 2, by_label=by_label)
    halves = [fit(outputs[half], truth[half], _with_output(manifest, plain)) for half in _split_halves(len(truth))]
    ece_after, loss_after = _measure_halves(outputs, truth, manifest, halves[::-1], by_label=by_label)
    effect = f"ECE {ece_before:.3f} before, {ece_after:.3f} after (each half by the other, {len(truth)} results)"
    if not loss_after < loss_before:
        warning = f"calibration by {method} does not help: {effect}; scores stay as they are"
        return CalibrationResult(plain, [], [warning])
    calibrated = fit(outputs, truth, _with_output(manifest, plain))
    detail = f"temperature {calibrated.temperature:.4g}" if method == "temperature" else "isotonic"
    return CalibrationResult(calibrated, [f"scores calibrated ({detail}): {effect}"], [])


def fit_threshold(values: Float64s, quantile: float, manifest: Manifest) -> CalibrationResult:
    """Set the threshold above a share `quantile` of `values` (w,) of normal windows. Raises UsageError."""
    if not np.isfinite(values).all():
        raise UsageError("the model's output is not finite for some windows; look at its inputs")
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


def fit_centroid(outputs: Float32s, manifest: Manifest) -> ModelOutput:
    """Set the centroid to the mean of vectors (w, K), or of their directions if the distance is cosine."""
    vectors = outputs.astype(np.float64)
    if manifest.output.distance == "cosine":
        lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
        vectors = vectors / np.where(lengths > 0, lengths, 1.0)
    return msgspec.structs.replace(manifest.output, centroid=vectors.mean(axis=0).tolist())


def _measure_halves(
    outputs: Float32s, truth: NDArray[Any], manifest: Manifest, half_outputs: list[ModelOutput], *, by_label: bool
) -> tuple[float, float]:
    """Return ECE and loss of two halves, each with an output of its own; `by_label` is the loss of the prediction."""
    loss, score, right = 0.0, [], []
    for half, output in zip(_split_halves(len(truth)), half_outputs, strict=True):
        changed = _with_output(manifest, output)
        half_score, half_right = _flatten_confidences(scores.from_outputs(outputs[half], changed), truth[half])
        if by_label:
            loss += _binary_log_loss(half_score, half_right)
        else:
            loss += _class_log_loss(outputs[half], truth[half], changed)
        score.append(half_score)
        right.append(half_right)
    all_right = np.concatenate(right).astype(np.int64)
    predictions = LabelledPredictions(np.ones(len(all_right)), all_right, np.concatenate(score))
    return compute_value("ece", "classify", predictions), loss


def _split_halves(count: int) -> list[NDArray[np.bool_]]:
    second = np.arange(count, dtype=np.int64) * _BLOCKS // max(1, count) % 2 == 1
    return [~second, second]


def _with_output(manifest: Manifest, output: ModelOutput) -> Manifest:
    return msgspec.structs.replace(manifest, output=output)


def _flatten_confidences(predicted: Scores, truth: NDArray[Any]) -> tuple[Float64s, Float64s]:
    """Return every probability in the results, and 1 if what it is of was true."""
    if predicted.predicted is not None:
        return np.concatenate(list(predicted.extra_columns.values())), truth.T.reshape(-1).astype(np.float64)
    assert predicted.score is not None
    return predicted.score, np.asarray(predicted.label == truth, np.float64)


def _binary_log_loss(score: Float64s, right: Float64s) -> float:
    """Return -Σ log probability that the prediction is right, or wrong, as it was."""
    score = np.clip(score, 1e-6, 1 - 1e-6)
    return -float(np.where(right > 0, np.log(score), np.log(1 - score)).sum())


def _class_log_loss(outputs: Float32s, truth: NDArray[Any], manifest: Manifest) -> float:
    p = scores.compute_probabilities(outputs, manifest.output)[np.arange(len(truth)), truth]
    return -float(np.log(np.clip(p, 1e-12, None)).sum())


def _fit_temperature(outputs: Float32s, truth: NDArray[Any], manifest: Manifest) -> ModelOutput:
    """Search the logarithm of the temperature by golden section: the loss has one minimum in its inverse."""

    def with_temperature(logarithm: float) -> ModelOutput:
        return msgspec.structs.replace(manifest.output, temperature=math.exp(logarithm))

    def loss(logarithm: float) -> float:
        changed = _with_output(manifest, with_temperature(logarithm))
        if not changed.output.multi_label:
            return _class_log_loss(outputs, truth, changed)
        return _binary_log_loss(*_flatten_confidences(scores.from_outputs(outputs, changed), truth))

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


def _fit_isotonic(outputs: Float32s, truth: NDArray[Any], manifest: Manifest) -> ModelOutput:
    score, right = _flatten_confidences(scores.from_outputs(outputs, manifest), truth)
    order = np.argsort(score, kind="stable")
    bins = max(1, min(_BINS, len(score) // _MIN_PER_BIN))
    # Half a result on each side: some twenty results do not make anything certain.
    points = [
        (float(score[part].mean()), (float(right[part].sum()) + 0.5) / (len(part) + 1), len(part))
        for part in np.array_split(order, bins)
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
    isotonic = IsotonicCalibration([round(x, 6) for x, _, _ in pooled], [round(y, 6) for _, y, _ in pooled])
    return msgspec.structs.replace(manifest.output, isotonic=isotonic)


class PackJob(msgspec.Struct, frozen=True):
    """SPEC, its manifest without files, and its loaded model."""

    file: Path
    spec: Spec
    draft: Manifest
    model: TfliteModel

    def path(self, name: str) -> Path:
        return self.file.parent / name

    @property
    def joined_files(self) -> dict[str, Path]:
        """Files of further inputs."""
        return {name: self.path(section.data) for name, section in self.spec.inputs.items() if section.data is not None}

    def run(self, draft: Manifest, path: Path, data: TrainingData, *, with_outputs: bool = False) -> InferenceResult:
        """Run the model over data read from `path`. Raises UsageError, BadBundle."""
        return run_model(self.model, draft, path, data, self.joined_files, with_outputs=with_outputs)


def run_model(
    model: TfliteModel,
    draft: Manifest,
    path: Path,
    data: TrainingData,
    joined_files: Mapping[str, Path],
    *,
    with_outputs: bool = False,
) -> InferenceResult:
    """Run a model over data read from `path`, with the rows of further inputs. Raises UsageError, BadBundle."""
    joined = joined_rows.read(draft, path, joined_files)
    return Inference(draft, model).run(data.features, data.t, with_outputs=with_outputs, joined=joined)


def calibrate_output(job: PackJob) -> CalibrationResult:
    """Return the output, completed from data: calibrated scores, or a centroid and a threshold. Raises ConfigError."""
    plain = CalibrationResult(job.draft.output, [], [])
    if job.draft.kind in ("anomaly", "embedding"):
        key = "output.calibration_data" if job.spec.output.calibration_data else "reference"
        fit = _fit_anomaly_output
    elif job.draft.kind == "regress" and job.spec.output.held_out is not None:
        key, fit = "output.held_out", _fit_residual_bounds
    elif job.spec.output.calibration_data is None:
        return plain
    else:
        key, fit = "output.calibration_data", _calibrate_scores
    try:
        return fit(job)
    except (UsageError, BadBundle) as problem:
        raise ConfigError(str(job.file), key, str(problem)) from None


def _calibrate_scores(job: PackJob) -> CalibrationResult:
    assert job.spec.output.calibration_data is not None
    if job.draft.kind == "regress":
        raise UsageError("kind regress has no probabilities to calibrate; remove calibration_data")
    path = job.path(job.spec.output.calibration_data)
    # On data that the model knows, scores look too good.
    if job.spec.reference and path.resolve() == job.path(job.spec.reference).resolve():
        raise UsageError(f"{path} is the reference's data, too; calibrate on data held out from training")
    data = training_data.read(path, job.draft.input, LabelParser.from_manifest(job.draft))
    if data.label is None:
        raise training_data.missing_labels(path, job.draft.input, "calibration")
    result = job.run(job.draft, path, data, with_outputs=True)
    assert result.outputs is not None
    truth = data.window_labels(result.cut.starts, job.draft.input.rows)
    known = (truth if truth.ndim == 1 else truth[:, 0]) >= 0
    method = job.spec.output.calibration_method
    outputs, *_ = scores.split_outputs(result.outputs, job.draft)
    calibrated = calibrate_scores(outputs[known], truth[known], job.draft, method)
    left_out = int((~known).sum())
    if left_out:
        calibrated.notes.append(f"left out {left_out} of {len(known)} windows of {path.name} without a label")
    return calibrated


def _fit_residual_bounds(job: PackJob) -> CalibrationResult:
    """Bound the residuals of held-out data by split conformal prediction (Lei et al. 2018)."""
    assert job.spec.output.held_out is not None
    path = job.path(job.spec.output.held_out)
    data = training_data.read(path, job.draft.input, LabelParser.from_manifest(job.draft))
    if data.label is None:
        raise training_data.missing_labels(path, job.draft.input, "a bound of residuals")
    result = job.run(job.draft, path, data)
    assert result.scores.value is not None
    residuals = data.window_labels(result.cut.starts, job.draft.input.rows) - result.scores.value
    low, high = conformal_bounds(residuals[np.isfinite(residuals)], path.name)
    try:
        output = msgspec.structs.replace(job.draft.output, residual_bounds=(low, high))
        _with_output(job.draft, output)
    except ValueError as problem:
        # Columns of the bounds meet others of the same name.
        raise UsageError(str(problem)) from None
    return CalibrationResult(output, [f"the truth lies within {low:+.4g} and {high:+.4g} of 95 of 100 values"], [])


def conformal_bounds(residuals: Float64s, name: str) -> tuple[float, float]:
    """Return bounds that a further residual lies within with a probability of at least 95 %. Raises UsageError.

    That holds for residuals that are exchangeable with these; drift breaks it.
    """
    n = len(residuals)
    if n < MIN_BOUNDED_RESIDUALS:
        raise UsageError(f"{name}: {n} labelled windows; bounds of residuals take {MIN_BOUNDED_RESIDUALS}")
    ordered = np.sort(residuals)
    rank = math.floor((n + 1) * _TAIL)
    return float(ordered[rank - 1]), float(ordered[n - rank])


def _fit_anomaly_output(job: PackJob) -> CalibrationResult:
    """Fit the centroid of an embedding, and the threshold of anomalies, to windows that are normal."""
    output, draft = job.draft.output, job.draft
    is_embedding = draft.kind == "embedding"
    if output.threshold is not None and (not is_embedding or output.centroid):
        return CalibrationResult(output, [], [])
    name = job.spec.output.calibration_data or job.spec.reference
    if name is None:
        if is_embedding:
            raise UsageError("an embedding needs normal data, to measure distances from their centroid")
        warning = "no threshold and no data to fit one: results have a value without a label"
        return CalibrationResult(output, [], [warning])
    path = job.path(name)
    data = training_data.read(
        path, draft.input, LabelParser.from_manifest(draft) if job.spec.output.calibration_data else None
    )
    starts = training_data.find_window_starts(path, data, draft.input)
    if is_embedding and not output.centroid:
        # A placeholder: only the vectors are used.
        origin = msgspec.structs.replace(output, centroid=[0.0] * job.model.output_sizes[0])
        draft = msgspec.structs.replace(draft, output=origin)
    result = job.run(draft, path, data, with_outputs=is_embedding)
    values, vectors = result.scores.value, result.outputs
    if vectors is not None:
        vectors = scores.split_outputs(vectors, draft)[0]
    assert values is not None
    if data.label is not None:
        normal = data.window_labels(starts, draft.input.rows) == 0
        if not normal.any():
            raise UsageError(f"{path}: no window in it is labelled normal")
        values, vectors = values[normal], None if vectors is None else vectors[normal]
    if vectors is not None and not output.centroid:
        output = fit_centroid(vectors, draft)
        values = scores.centroid_distance(vectors, output)
    if output.threshold is not None:
        return CalibrationResult(output, [], [])
    return fit_threshold(values, job.spec.output.quantile, msgspec.structs.replace(draft, output=output))
