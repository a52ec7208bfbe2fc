"""Calibration while packing: reads the data that a SPEC names, and calibrates the output of its model."""

from __future__ import annotations

from pathlib import Path

import msgspec

from agent.arrays import Ints
from agent.authoring import calibration
from agent.authoring.calibration import CalibrationResult
from agent.authoring.spec import Spec
from agent.datasets import training_data
from agent.datasets.blocks import LABEL_COLUMN
from agent.datasets.training_data import LabelParser, TrainingData
from agent.errors import BadBundle, ConfigError, UsageError
from agent.model.bundle.manifest import Manifest, ModelInput
from agent.model.inference import features, scores
from agent.model.inference.inference import Inference
from agent.model.inference.runtime import TfliteModel


class PackJob(msgspec.Struct, frozen=True):
    """SPEC, its manifest without files, and its loaded model."""

    file: Path
    spec: Spec
    draft: Manifest
    model: TfliteModel

    def path(self, name: str) -> Path:
        return self.file.parent / name


def calibrate_output(job: PackJob) -> CalibrationResult:
    """Return the output, completed from data: calibrated scores, or a centroid and a threshold. Raises ConfigError."""
    plain = CalibrationResult(job.draft.output, [], [])
    if job.draft.kind in ("anomaly", "embedding"):
        key = "output.calibration_data" if job.spec.output.calibration_data else "reference"
        fit = _fit_anomaly_output
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
        raise UsageError(f"{path}: no column {LABEL_COLUMN} in it; calibration needs the true labels")
    result = Inference(job.draft, job.model).run(data.features, data.t, with_outputs=True)
    assert result.outputs is not None
    truth = data.window_labels(result.cut.starts, job.draft.input.rows)
    known = (truth if truth.ndim == 1 else truth[:, 0]) >= 0
    method = job.spec.output.calibration_method
    calibrated = calibration.calibrate_scores(result.outputs[known], truth[known], job.draft, method)
    left_out = int((~known).sum())
    if left_out:
        calibrated.notes.append(f"left out {left_out} of {len(known)} windows of {path.name} without a label")
    return calibrated


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
    starts = find_window_starts(path, data, draft.input)
    if is_embedding and not output.centroid:
        # A placeholder: only the vectors are used.
        origin = msgspec.structs.replace(output, centroid=[0.0] * job.model.outputs)
        draft = msgspec.structs.replace(draft, output=origin)
    result = Inference(draft, job.model).run(data.features, data.t, with_outputs=is_embedding)
    values, vectors = result.scores.value, result.outputs
    assert values is not None
    if data.label is not None:
        normal = data.window_labels(starts, draft.input.rows) == 0
        if not normal.any():
            raise UsageError(f"{path}: no window in it is labelled normal")
        values, vectors = values[normal], None if vectors is None else vectors[normal]
    if vectors is not None and not output.centroid:
        output = calibration.fit_centroid(vectors, draft)
        values = scores.centroid_distance(vectors, output)
    if output.threshold is not None:
        return CalibrationResult(output, [], [])
    return calibration.fit_threshold(values, job.spec.output.quantile, msgspec.structs.replace(draft, output=output))


def find_window_starts(path: Path, data: TrainingData, spec: ModelInput) -> Ints:
    """Return the starts of all windows, at least one. Raises UsageError."""
    starts = features.cut_windows(data.t, spec.window).starts
    if not len(starts):
        missing = f"no {spec.window.rows} rows without a gap" if spec.window else "no rows"
        raise UsageError(f"{path}: {missing} in it, so nothing to run the model on; give more data")
    return starts
