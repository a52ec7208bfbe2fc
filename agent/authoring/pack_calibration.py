"""What `pack` learns from a SPEC's data before it makes the bundle: calibration, a centroid, a threshold."""

from __future__ import annotations

from pathlib import Path

import msgspec

from agent.authoring import calibration
from agent.authoring.calibration import Learned
from agent.authoring.spec import Spec
from agent.datasets import training_data
from agent.errors import BadBundle, ConfigError, UsageError
from agent.model.bundle.manifest import Input, Manifest
from agent.model.inference import features, scores
from agent.model.inference.inference import Inference
from agent.model.inference.runtime import Model


class Work(msgspec.Struct, frozen=True):
    """What a part of the bundle is made from: the SPEC, a manifest without files, the model loaded."""

    file: Path
    spec: Spec
    draft: Manifest
    model: Model

    def path(self, name: str) -> Path:
        return self.file.parent / name


def learned(work: Work) -> Learned:
    """The output with what the SPEC leaves to be learned: calibration, or a centroid and a threshold."""
    plain = Learned(work.draft.output, [], [])
    if work.draft.kind in ("anomaly", "embedding"):
        key = "output.calibrate" if work.spec.output.calibrate else "reference"
        learn = _unusual
    elif work.spec.output.calibrate is None:
        return plain
    else:
        key, learn = "output.calibrate", _calibrated
    try:
        return learn(work)
    except (UsageError, BadBundle) as problem:
        raise ConfigError(str(work.file), key, str(problem)) from None


def _calibrated(work: Work) -> Learned:
    assert work.spec.output.calibrate is not None
    if work.draft.kind == "regress":
        raise UsageError("kind regress gives values, which have no probability to calibrate; leave calibrate away")
    path = work.path(work.spec.output.calibrate)
    _require_held_out(work, path)
    found = training_data.read(path, work.draft.input, training_data.labels_of(work.draft))
    if found.label is None:
        raise UsageError(f"{path}: no column {training_data.LABEL} in it, which says what was true")
    answers = Inference(work.draft, work.model).run(found.features, found.t, raw=True)
    assert answers.outputs is not None
    truth = calibration.of_windows(found.label, answers.cut.starts, work.draft.input.rows)
    known = (truth if truth.ndim == 1 else truth[:, 0]) >= 0
    result = calibration.calibrated(answers.outputs[known], truth[known], work.draft, work.spec.output.calibration)
    left_out = int((~known).sum())
    if left_out:
        result.notes.append(f"left out {left_out} of {len(known)} windows of {path.name}: their label is not known")
    return result


def _require_held_out(work: Work, path: Path) -> None:
    """Scores look too good on data that the model knows. Raises UsageError."""
    if work.spec.reference and path.resolve() == work.path(work.spec.reference).resolve():
        raise UsageError(f"{path} is the reference's data too; calibrate on data that was held out from training")


def _unusual(work: Work) -> Learned:
    """The centroid of an embedding, and above what value a window is an anomaly, from windows that are normal."""
    output, draft = work.draft.output, work.draft
    known = output.threshold is not None and (draft.kind == "anomaly" or output.centroid)
    if known:
        return Learned(output, [], [])
    name = work.spec.output.calibrate or work.spec.reference
    if name is None:
        if draft.kind == "embedding":
            raise UsageError("an embedding needs data of what is normal, which distances are from")
        return Learned(output, [], ["no threshold and no data to learn it from: results give a value without a label"])
    path = work.path(name)
    found = training_data.read(
        path, draft.input, training_data.labels_of(draft) if work.spec.output.calibrate else None
    )
    begins = starts(path, found, draft.input)
    vectors = draft.kind == "embedding"
    if vectors and not output.centroid:
        # Distances are from nowhere yet; the vectors tell where from.
        nowhere = msgspec.structs.replace(output, centroid=[0.0] * work.model.outputs)
        draft = msgspec.structs.replace(draft, output=nowhere)
    answers = Inference(draft, work.model).run(found.features, found.t, raw=vectors)
    values, vector = answers.scores.value, answers.outputs
    assert values is not None
    if found.label is not None:
        normal = calibration.of_windows(found.label, begins, draft.input.rows) == 0
        if not normal.any():
            raise UsageError(f"{path}: no window in it is labelled normal")
        values, vector = values[normal], None if vector is None else vector[normal]
    if vector is not None and not output.centroid:
        output = calibration.centroid(vector, draft)
        values = scores.distance(vector, output)
    draft = msgspec.structs.replace(draft, output=output)
    if output.threshold is not None:
        return Learned(output, [], [])
    return calibration.threshold(values, work.spec.output.quantile, draft)


def starts(path: Path, found: training_data.Data, spec: Input) -> features.Ints:
    """Where windows begin, at least one. Raises UsageError."""
    begins = features.cut(found.t, spec.window).starts
    if not len(begins):
        whole = f"no {spec.window.rows} rows without a gap" if spec.window else "no rows"
        raise UsageError(f"{path}: {whole} in it, so nothing to run the model on; give more data")
    return begins
