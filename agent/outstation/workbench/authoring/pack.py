"""Packing of a bundle from a SPEC: model, drift reference, golden vectors, cards, manifest and signature."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation import input_files
from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.foundation.errors import BadBundle, ConfigError, UsageError
from outstation.ml.datasets import joined_rows, recordings, training_data
from outstation.ml.datasets.training_data import LabelParser, TrainingData
from outstation.ml.drift.baseline import learning, window_statistics
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.model.bundle import bundle, golden_vectors, manifest
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.bundle.manifest import Manifest
from outstation.ml.model.inference import derived_features, features, joins, runtime, scores
from outstation.ml.model.inference.info_lines import hide_info_lines
from outstation.ml.model.inference.runtime import TfliteModel
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.sandbox import probe
from outstation.ml.performance.expected_error import ErrorReference
from outstation.ml.performance.label_order import describe_better_order
from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.authoring import calibration, dataset_features, error_training, input_range, training_check
from outstation.workbench.authoring import spec as specs
from outstation.workbench.authoring.calibration import PackJob
from outstation.workbench.authoring.spec import Spec, SpecCard
from outstation.workbench.authoring.training_check import CheckedData

_GOLDEN_COUNT = 32
# Tolerance of a sum of probabilities, quantized ones too.
_ROUNDING = 0.02
_MIN_HELD_OUT = 100
# More empty values in a field of the reference are warned of.
_MAX_EMPTY_SHARE = 0.2
_UNSIGNED_WARNING = "not signed (--sign-with): devices refuse it until `outstation model sign`"
_BUNDLE_FILES = frozenset(
    {"manifest.json", "manifest.jws", "model.tflite", "reference.json", "golden.npz", "MODEL_CARD.md", "DATA_CARD.md"}
)


class PackedBundle(msgspec.Struct, frozen=True):
    """Files of a bundle, with warnings of what it lacks and notes of what was calibrated."""

    files: dict[str, bytes]
    warnings: list[str]
    digest: str
    notes: list[str]
    training: list[CheckedData] = []


def pack(spec_file: Path, key: SigningKey | None, train: Path | None = None) -> PackedBundle:
    """Build all files of a bundle; labelled data, `train` among them, are checked for poisoning.

    Raises ConfigError, BadBundle, UsageError.
    """
    spec = specs.read(spec_file)
    files = {"model.tflite": _read_file(spec_file, "model", spec.model)}
    draft = specs.to_manifest(spec_file, spec)
    # In a child process first: a damaged model can crash the process that loads it.
    try:
        probe.probe(Bundle(draft, "", {"manifest.json": manifest.encode(draft), **files}, "")).raise_for_failure()
    except BadBundle as problem:
        raise BadBundle(f"{spec_file.parent / spec.model}: {problem}") from None
    with hide_info_lines():
        job = PackJob(spec_file, spec, draft, runtime.load_model(draft, files["model.tflite"]))
    dataset_features.check(job)
    calibrated = calibration.calibrate_output(job)
    job = replace(job, draft=replace(draft, output=calibrated.output))
    warnings = [
        *calibrated.warnings,
        *_add_golden_vectors(job, files),
        *_add_reference(job, files, calibrated.notes),
        *_add_cards(spec_file, spec, files),
        *_find_placeholders(draft),
        *_find_idle_threshold(draft),
    ]
    training = training_check.check(job, train)
    if "DATA_CARD.md" in files:
        files["DATA_CARD.md"] += training_check.card_section(training, job.draft).encode()
    head = manifest.encode(specs.finish_manifest(job.draft, files))
    files["manifest.json"] = head
    if key is not None:
        files["manifest.jws"] = bundle.MANIFEST_DOMAIN.sign_file(key, head)
    else:
        warnings.append(_UNSIGNED_WARNING)
    notes = [*calibrated.notes, *_note_scaling(draft)]
    return PackedBundle(files, warnings, f"sha256:{hashlib.sha256(head).hexdigest()}", notes, training)


def _find_placeholders(draft: Manifest) -> list[str]:
    """Return a warning for names of labels that a proposed SPEC left open."""
    labels = draft.output.labels
    if not labels or labels != [f"class {i}" for i in range(len(labels))]:
        return []
    return [
        f'labels are placeholders ("{labels[0]}" …): results name them; give the names in the order of the training'
    ]


def _find_idle_threshold(draft: Manifest) -> list[str]:
    """Return a warning for a threshold of a classifier that names the likeliest of several labels."""
    output = draft.output
    if draft.kind != "classify" or output.multi_label or output.threshold is None or len(output.labels) <= 2:
        return []
    return [
        f"output.threshold has no effect on {len(output.labels)} labels, of which the likeliest is named; remove it"
    ]


def _find_second_softmax(draft: Manifest, outputs: Float32s) -> list[str]:
    """Return a warning if raw `outputs` (n, K) are probabilities already, which a second softmax would flatten."""
    first = outputs[:, : len(draft.output.labels)]
    if (
        draft.output.activation != "softmax"
        or first.min(initial=0) < -_ROUNDING
        or first.max(initial=0) > 1 + _ROUNDING
    ):
        return []
    if np.abs(first.sum(axis=1) - 1).max(initial=0) > _ROUNDING:
        return []
    return [
        'output.activation is "softmax", but the outputs of the model sum to 1 already: a second one makes all scores '
        'alike; write activation = "none"'
    ]


def _note_scaling(draft: Manifest) -> list[str]:
    """Return a note if nothing scales the inputs: right for some models, and easily forgotten for others."""
    model_input = draft.input
    if model_input.mean or model_input.scaling == "window" or model_input.image or model_input.sound:
        return []
    return [
        "no mean and std in [input]: the model gets the values as they are, so it must have been trained on such values"
    ]


def reuse_signature(packed: PackedBundle, out: Path) -> None:
    """Reuse the signature of the bundle folder `out`, if it signs the same manifest."""
    try:
        same = input_files.read_bytes(out / "manifest.json") == packed.files["manifest.json"]
        signature = input_files.read_bytes(out / "manifest.jws")
    except OSError:
        return
    if same and "manifest.jws" not in packed.files:
        packed.files["manifest.jws"] = signature
        packed.warnings[:] = [w for w in packed.warnings if w != _UNSIGNED_WARNING]


def write_bundle(packed: PackedBundle, out: Path) -> None:
    """Write a folder or a `.zip`; replace an old bundle as a whole, and nothing else. Raises UsageError."""
    out = out.resolve()
    if out.suffix == ".zip":
        if out.exists() and not (out.is_file() and zipfile.is_zipfile(out)):
            raise UsageError(f"{out}: exists and is no .zip; move it away, or name another place with -o")
    elif out.is_dir():
        others = sorted(entry.name for entry in out.iterdir() if entry.name not in _BUNDLE_FILES)
        if others:
            raise UsageError(
                f"{out}: holds {others[0]}, which is no bundle file and would be deleted; name another folder with -o"
            )
    elif out.exists():
        raise UsageError(f"{out}: exists and is no folder; name a new folder or a .zip with -o")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}; name another place with -o") from None
    try:
        new = work / "bundle"
        if out.suffix == ".zip":
            with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in sorted(packed.files.items()):
                    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
            new.replace(out)
            return
        new.mkdir()
        for name, content in packed.files.items():
            (new / name).write_bytes(content)
        if out.exists():
            out.rename(work / "old")
        new.rename(out)
    finally:
        shutil.rmtree(work)


def _add_golden_vectors(job: PackJob, files: dict[str, bytes]) -> list[str]:
    if job.spec.golden is None:
        return ["no golden data: a device cannot check that its CPU computes the same outputs as yours"]
    try:
        windows = _select_golden_windows(job, job.path(job.spec.golden))
        outputs = job.model.invoke(windows)
        vectors = golden_vectors.from_outputs(
            windows, outputs, job.model.output_steps, job.model.output_sizes, runtime_name()
        )
    except (UsageError, BadBundle) as problem:
        raise ConfigError(str(job.file), "golden", str(problem)) from None
    files["golden.npz"] = golden_vectors.encode(vectors)
    return _find_second_softmax(job.draft, outputs)


def _select_golden_windows(job: PackJob, path: Path) -> Float32s:
    """Return scaled model inputs: ready-made windows of an `.npz`, or windows cut from rows."""
    spec = job.draft.input
    ready = recordings.load_windows(path, spec) if path.suffix == ".npz" else None
    if ready is not None:
        if job.draft.joined:
            raise UsageError(f"{path}: ready windows have no times to join further inputs by; give rows with times")
        return features.build_windows(ready, np.arange(0, len(ready), spec.rows), spec)
    data = training_data.read(path, spec)
    starts = training_data.find_window_starts(path, data, spec)
    picked = starts[np.linspace(0, len(starts) - 1, min(_GOLDEN_COUNT, len(starts)), dtype=np.int64)]
    windows = features.build_windows(derived_features.compute(data.features, data.t, spec), picked, spec)
    rows = joined_rows.read(job.draft, path, job.joined_files)
    joined = joins.join(job.draft.joined, rows, data.t[picked + spec.rows - 1])
    if joined is None:
        return windows
    return np.concatenate([windows.reshape(len(picked), -1), joined.values], axis=1)


def build_reference(path: Path, model: TfliteModel, draft: Manifest, joined_files: Mapping[str, Path]) -> Reference:
    """Build the drift reference. Raises UsageError, BadBundle."""
    return _learn_reference(_run_model(path, model, draft, joined_files), draft)


def _learn_reference(run: _ModelRun, draft: Manifest) -> Reference:
    seasonality = "auto" if draft.drift.seasonality is msgspec.UNSET else draft.drift.seasonality
    return learning.build_reference(
        run.data.features,
        run.starts,
        draft.input.rows,
        run.predicted,
        None if run.score is None else run.score[:, None].astype(np.float32),
        draft.drift.window,
        fields=tuple(draft.input.fields),
        labels=tuple(draft.output.labels),
        t=run.data.t,
        seasonality=seasonality,
        further=scores.monitored_outputs(draft),
        answers=run.answers,
    )


class _ModelRun(msgspec.Struct, frozen=True):
    """Data with the model's answers: `starts` (w,) of windows, classes `predicted` (w,) and scores or values (w,)."""

    data: TrainingData
    starts: Ints
    predicted: Ints
    score: Float64s | None
    answers: Float64s | None = None  # (w, P) of further outputs


def _run_model(
    path: Path,
    model: TfliteModel,
    draft: Manifest,
    joined_files: Mapping[str, Path],
    labels: LabelParser | None = None,
) -> _ModelRun:
    data = training_data.read(path, draft.input, labels)
    starts = training_data.find_window_starts(path, data, draft.input)
    result = calibration.run_model(model, draft, path, data, joined_files).scores
    predicted = result.label if result.label is not None else np.zeros(len(starts), np.int64)
    score = result.value if result.score is None else result.score
    return _ModelRun(data, starts, predicted, score, result.further_answers)


def _add_reference(job: PackJob, files: dict[str, bytes], notes: list[str]) -> list[str]:
    if job.spec.reference is None:
        return ["no reference data: devices will not monitor this model for drift"]
    path, output = job.path(job.spec.reference), job.spec.output
    try:
        run = _run_model(path, job.model, job.draft, job.joined_files)
        reference = _learn_reference(run, job.draft)
    except (UsageError, BadBundle) as problem:
        raise ConfigError(str(job.file), "reference", str(problem)) from None
    warnings = [reference.warning] if reference.warning else []
    tensor = job.model.describe_input()
    warnings += input_range.find_misfits(run.data.features, run.data.t, run.starts, job.draft.input, tensor)
    if output.score_table is not None and output.held_out is not None:
        raise ConfigError(str(job.file), "output.held_out", "score_table says the same; give one of them")
    if output.score_table is not None:
        reference = _with_score_table(job, reference, job.path(output.score_table))
    elif output.held_out is not None and job.draft.kind != "regress":
        reference, order_warnings = _with_held_out(job, reference, job.path(output.held_out))
        warnings += order_warnings
    elif output.held_out is not None:
        parser = LabelParser.from_manifest(job.draft)
        run = _run_model(job.path(output.held_out), job.model, job.draft, job.joined_files, parser)
        assert run.score is not None
        error = _train_error(job, reference, run, run.score, "", notes, warnings)
        reference = replace(reference, error=error)
    elif job.draft.label_kind == "classify" and (
        output.calibration_data is not None or training_data.has_labels(path, job.draft.input)
    ):
        warnings.append(
            "labels are not used to estimate accuracy: [output] held_out names labelled data that the model was not "
            "trained on"
        )
        if training_data.has_labels(path, job.draft.input):
            warnings += _check_label_order(job, path)
    if output.held_out is not None and reference.further:
        reference = _with_further_held_out(job, reference, job.path(output.held_out), notes, warnings)
    files["reference.json"] = reference.to_json()
    return [*warnings, *_find_gaps(reference)]


def _find_gaps(reference: Reference) -> list[str]:
    """Return a warning for each field that has few values."""
    share = reference.missing / np.maximum(reference.missing + reference.n, 1)
    return [
        f"{name}: {part:.0%} of the reference's values are empty, so its limits rest on few; give data with values"
        for name, part in zip(reference.fields, share.tolist(), strict=True)
        if part > _MAX_EMPTY_SHARE
    ]


def _check_label_order(job: PackJob, path: Path) -> list[str]:
    """Return a warning if the labels of the reference data fit another order of the model's labels clearly better."""
    try:
        run = _run_model(path, job.model, job.draft, job.joined_files, LabelParser.from_manifest(job.draft))
    except (UsageError, BadBundle):
        # The column may hold something else: it is no label yet to the SPEC.
        return []
    truth = run.data.window_labels(run.starts, job.draft.input.rows)
    better = describe_better_order(job.draft.output.labels, truth[truth >= 0], run.predicted[truth >= 0])
    return [f"{path}: {better}"] if better else []


def _with_held_out(job: PackJob, reference: Reference, path: Path) -> tuple[Reference, list[str]]:
    """Add the accuracy of each score from held-out data with a column `label`; warn if the labels' order is wrong."""
    key = "output.held_out"
    if job.draft.label_kind != "classify":
        raise ConfigError(str(job.file), key, "only a model that names one class has scores that are right or wrong")
    try:
        run = _run_model(path, job.model, job.draft, job.joined_files, LabelParser.from_manifest(job.draft))
    except (UsageError, BadBundle) as problem:
        raise ConfigError(str(job.file), key, str(problem)) from None
    if run.data.label is None or run.score is None:
        missing = training_data.missing_labels(path, job.draft.input, "the accuracy of each score")
        raise ConfigError(str(job.file), key, str(missing))
    truth = run.data.window_labels(run.starts, job.draft.input.rows)
    known = truth >= 0
    if int(known.sum()) < _MIN_HELD_OUT:
        raise ConfigError(
            str(job.file), key, f"{path}: {int(known.sum())} labelled windows; an estimate takes {_MIN_HELD_OUT}"
        )
    better = describe_better_order(job.draft.output.labels, truth[known], run.predicted[known])
    is_right = run.predicted[known] == truth[known]
    filled = learning.with_score_accuracy(reference, run.score[known].astype(np.float64), is_right)
    return filled, [f"{path}: {better}"] if better else []


def _train_error(
    job: PackJob,
    reference: Reference,
    run: _ModelRun,
    values: Float32s | Float64s,
    name: str,
    notes: list[str],
    warnings: list[str],
) -> ErrorReference | None:
    """Return the error to expect of `values` (w,) of output `name` from held-out data, or None with a warning."""
    prefix = f"{name}: " if name else ""
    rows, spec = window_statistics.infinities_to_nan(run.data.features), job.draft.input
    statistics = window_statistics.compute_statistics(rows, run.starts, spec.rows, reference.floor).values
    errors = run.data.window_labels(run.starts, spec.rows) - values
    try:
        trained = error_training.train(statistics, values.astype(np.float64), errors)
    except UsageError as problem:
        warnings.append(f"{prefix}devices cannot estimate the error without labels: {problem}")
        return None
    notes.append(f"{prefix}devices estimate the mean absolute error without labels, from the inputs")
    return trained


def _with_further_held_out(
    job: PackJob, reference: Reference, path: Path, notes: list[str], warnings: list[str]
) -> Reference:
    """Add how right each further output is that held-out data have a column `label_NAME` for."""
    filled = list(reference.further)
    for at, further in enumerate(reference.further):
        name = further.output.name
        view = scores.further_manifest(job.draft, name)
        is_known = view.label_kind == "classify" or view.kind == "regress"
        if not is_known or not training_data.has_labels(path, view.input, f"label_{name}"):
            continue
        parser = replace(LabelParser.from_manifest(view), column=f"label_{name}")
        try:
            run = _run_model(path, job.model, job.draft, job.joined_files, parser)
        except (UsageError, BadBundle) as problem:
            raise ConfigError(str(job.file), "output.held_out", str(problem)) from None
        assert run.data.label is not None
        assert run.answers is not None
        column = _first_column(reference, at)
        if view.kind == "regress":
            error = _train_error(job, reference, run, run.answers[:, column], name, notes, warnings)
            filled[at] = replace(further, error=error or msgspec.UNSET)
            continue
        truth = run.data.window_labels(run.starts, job.draft.input.rows)
        known, labels, score = truth >= 0, run.answers[:, column], run.answers[:, column + 1]
        if int(known.sum()) >= _MIN_HELD_OUT:
            filled[at] = further.with_held_out(score[known], labels[known] == truth[known])
    return replace(reference, further=tuple(filled))


def _first_column(reference: Reference, number: int) -> int:
    return sum(further.output.columns for further in reference.further[:number])


def _with_score_table(job: PackJob, reference: Reference, path: Path) -> Reference:
    """Add the accuracy of each score from a table of held-out data: `edges` (33), `count`, `correct` (32)."""
    try:
        table = json.loads(input_files.read_text(path))
        filled = replace(
            reference,
            score_edges=np.array(table["edges"][1:-1], np.float64),
            score_n=np.array(table["count"], np.int64),
            score_correct=np.array(table["correct"], np.int64),
        )
        return Reference.from_json(filled.to_json())
    except (OSError, ValueError, KeyError, TypeError, BadBundle) as error:
        raise ConfigError(
            str(job.file), "output.score_table", f"{path}: no score table (edges 33, count 32, correct 32): {error}"
        ) from None


def _add_cards(spec_file: Path, spec: Spec, files: dict[str, bytes]) -> list[str]:
    given = SpecCard(model=spec.card) if isinstance(spec.card, str) else spec.card or SpecCard()
    warnings = []
    for kind, path, target in (("model", given.model, "MODEL_CARD.md"), ("data", given.data, "DATA_CARD.md")):
        if path is None:
            warnings.append(f"no {kind} card ([card] {kind}): users cannot read what it was made from, and for what")
        else:
            files[target] = _read_file(spec_file, f"card.{kind}", path)
    return warnings


def _read_file(spec_file: Path, key: str, name: str) -> bytes:
    path = spec_file.parent / name
    try:
        return input_files.read_bytes(path)
    except OSError as error:
        raise ConfigError(str(spec_file), key, f"{path}: {error.strerror}; give a path relative to this file") from None
