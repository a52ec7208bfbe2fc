"""What `pack` learns from a SPEC's data before it makes the bundle: calibration, a centroid, a threshold."""

from __future__ import annotations

from pathlib import Path

import msgspec

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
    """What a part of the bundle is made from: the SPEC, a manifest without files, the model loaded."""

    file: Path
    spec: Spec
    draft: Manifest
    model: TfliteModel

    def path(self, name: str) -> Path:
        return self.file.parent / name


def calibrate_output(job: PackJob) -> CalibrationResult:
    """The output with what the SPEC leaves to be learned: calibration, or a centroid and a threshold."""
    plain = CalibrationResult(job.draft.output, [], [])
    if job.draft.kind in ("anomaly", "embedding"):
        key = "output.calibrate" if job.spec.output.calibrate else "reference"
        learn = _fit_anomaly_output
    elif job.spec.output.calibrate is None:
        return plain
    else:
        key, learn = "output.calibrate", _calibrate_scores
    try:
        return learn(job)
    except (UsageError, BadBundle) as problem:
        raise ConfigError(str(job.file), key, str(problem)) from None


def _calibrate_scores(job: PackJob) -> CalibrationResult:
    assert job.spec.output.calibrate is not None
    if job.draft.kind == "regress":
        raise UsageError("kind regress gives values, which have no probability to calibrate; leave calibrate away")
    path = job.path(job.spec.output.calibrate)
    _require_held_out(job, path)
    found = training_data.read(path, job.draft.input, LabelParser.from_manifest(job.draft))
    if found.label is None:
        raise UsageError(f"{path}: no column {LABEL_COLUMN} in it, which says what was true")
    answers = Inference(job.draft, job.model).run(found.features, found.t, with_outputs=True)
    assert answers.outputs is not None
    truth = calibration.select_window_labels(found.label, answers.cut.starts, job.draft.input.rows)
    known = (truth if truth.ndim == 1 else truth[:, 0]) >= 0
    result = calibration.calibrate_scores(answers.outputs[known], truth[known], job.draft, job.spec.output.calibration)
    left_out = int((~known).sum())
    if left_out:
        result.notes.append(f"left out {left_out} of {len(known)} windows of {path.name}: their label is not known")
    return result


def _require_held_out(job: PackJob, path: Path) -> None:
    """Scores look too good on data that the model knows. Raises UsageError."""
    if job.spec.reference and path.resolve() == job.path(job.spec.reference).resolve():
        raise UsageError(f"{path} is the reference's data too; calibrate on data that was held out from training")


def _fit_anomaly_output(job: PackJob) -> CalibrationResult:
    """The centroid of an embedding, and above what value a window is an anomaly, from windows that are normal."""
    output, draft = job.draft.output, job.draft
    known = output.threshold is not None and (draft.kind == "anomaly" or output.centroid)
    if known:
        return CalibrationResult(output, [], [])
    name = job.spec.output.calibrate or job.spec.reference
    if name is None:
        if draft.kind == "embedding":
            raise UsageError("an embedding needs data of what is normal, which distances are from")
        return CalibrationResult(
            output, [], ["no threshold and no data to learn it from: results give a value without a label"]
        )
    path = job.path(name)
    found = training_data.read(
        path, draft.input, LabelParser.from_manifest(draft) if job.spec.output.calibrate else None
    )
    begins = find_window_starts(path, found, draft.input)
    vectors = draft.kind == "embedding"
    if vectors and not output.centroid:
        # Distances are from nowhere yet; the vectors tell where from.
        nowhere = msgspec.structs.replace(output, centroid=[0.0] * job.model.outputs)
        draft = msgspec.structs.replace(draft, output=nowhere)
    answers = Inference(draft, job.model).run(found.features, found.t, with_outputs=vectors)
    values, vector = answers.scores.value, answers.outputs
    assert values is not None
    if found.label is not None:
        normal = calibration.select_window_labels(found.label, begins, draft.input.rows) == 0
        if not normal.any():
            raise UsageError(f"{path}: no window in it is labelled normal")
        values, vector = values[normal], None if vector is None else vector[normal]
    if vector is not None and not output.centroid:
        output = calibration.fit_centroid(vector, draft)
        values = scores.centroid_distance(vector, output)
    draft = msgspec.structs.replace(draft, output=output)
    if output.threshold is not None:
        return CalibrationResult(output, [], [])
    return calibration.fit_threshold(values, job.spec.output.quantile, draft)


def find_window_starts(path: Path, dataset: TrainingData, spec: ModelInput) -> features.Ints:
    """Where windows begin, at least one. Raises UsageError."""
    begins = features.cut_windows(dataset.t, spec.window).starts
    if not len(begins):
        whole = f"no {spec.window.rows} rows without a gap" if spec.window else "no rows"
        raise UsageError(f"{path}: {whole} in it, so nothing to run the model on; give more data")
    return begins
