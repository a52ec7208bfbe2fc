"""`model evaluate`: everything that is asked of a model, in one document."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from agent import __version__, clock
from agent.errors import UsageError
from agent.evaluation import (
    bench,
    bootstrap,
    document,
    examples,
    float_comparison,
    giveaway,
    label_quality,
    latency,
    leakage,
    metrics,
    robustness,
    sensitivity,
    several,
    slicing,
)
from agent.evaluation import predictions as answers
from agent.evaluation.bootstrap import BootstrapUnits
from agent.evaluation.document import Evaluation
from agent.evaluation.examples import Dataset, LabelledWindows
from agent.evaluation.predictions import LabelledPredictor
from agent.model.bundle.bundle import Bundle
from agent.model.inference import runtime, tuning
from agent.model.inference.features import Ints
from agent.model.inference.inference import Inference, InferenceResult
from agent.performance import slices
from agent.performance.metrics import LabelledPredictions
from agent.text import format_value, metric_name

_EARLIEST_US = 946_684_800_000_000  # 2000-01-01: before it, t only counts
_MAX_CONFUSION_CLASSES = 1000  # classes of which the confusion is told
_LATENCY_ROWS = 20_000


class EvaluationRequest(msgspec.Struct, frozen=True):
    """What is asked; columns by name."""

    data: Path
    label: str = "label"
    group: str | None = None
    split: str | None = None
    slices: tuple[str, ...] = ()
    train: Path | None = None
    float_model: Path | None = None
    ablate: bool = False
    robustness: bool = False
    latency: bool = True
    seed: int = 0

    @property
    def columns(self) -> list[str]:
        """What is read beside the fields."""
        return list(dict.fromkeys(c for c in (self.label, self.group, self.split, *self.slices) if c))


class _EvaluationContext(msgspec.Struct, frozen=True, eq=False):
    bundle: Bundle
    inference: Inference
    request: EvaluationRequest
    dataset: Dataset
    examples: LabelledWindows
    answers: InferenceResult
    pairs: LabelledPredictions
    units: BootstrapUnits


def evaluate(
    bundle: Bundle,
    inference: Inference,
    signature: str,
    request: EvaluationRequest,
    on_step: Callable[[str], None],
    predict: Callable[[Inference, Dataset, Ints], InferenceResult] = examples.predict,
) -> Evaluation:
    """`step` is told what is done next; `answered` runs the model over the data. Raises UsageError, BadBundle."""
    begun = time.monotonic()
    on_step("reading the data")
    source = examples.read(request.data, inference, request.columns)
    found = examples.label_windows(source, inference, request.label, request.columns, request.split)
    on_step(f"answering {len(found):,} windows")
    told = predict(inference, source, found.starts)
    pairs = answers.pair_with_truth(bundle.manifest, told, found.truth, found.label_sets)
    _require_finite(pairs, request)
    units = _bootstrap_units(bundle, pairs, found, request)
    work = _EvaluationContext(bundle, inference, request, source, found, told, pairs, units)
    return _build_document(work, signature, on_step, begun)


def _require_finite(pairs: LabelledPredictions, request: EvaluationRequest) -> None:
    if pairs.value is not None and not np.isfinite(pairs.value).all():
        n = int((~np.isfinite(pairs.value)).sum())
        raise UsageError(f"{request.data}: the model answers {n} windows with no finite number; look at its inputs")


def _bootstrap_units(
    bundle: Bundle, pairs: LabelledPredictions, windows: LabelledWindows, request: EvaluationRequest
) -> BootstrapUnits:
    off = pairs.task_losses(answers.evaluation_kind(bundle.manifest))
    if off is None:
        assert pairs.value is not None
        off = pairs.value
    group = windows.columns[request.group] if request.group else None
    return bootstrap.build_units(off, group, request.group, request.seed)


def _build_document(
    context: _EvaluationContext, signature: str, on_step: Callable[[str], None], started_s: float
) -> Evaluation:
    manifest, request, found = context.bundle.manifest, context.request, context.examples
    kind, labels = answers.evaluation_kind(manifest), manifest.output.labels
    measured = (
        several.multilabel_metrics(labels, context.answers, found, context.pairs, context.units)
        if found.label_sets is not None
        else metrics.compute(kind, labels, context.pairs, context.units)
    )
    sliced = {name: found.columns[name] for name in request.slices}
    table = bench.draw_sample(LabelledPredictor(context.inference), found, context.units)
    on_step("looking for leaks")
    leaks = _check_leakage(context, table)
    suspicions, suspects = label_quality.check_label_noise(labels, context.pairs, found)
    drops: list[document.FieldImportance] = []
    faults: list[document.RobustnessCurve] = []
    if request.ablate:
        on_step("replacing fields")
        drops = sensitivity.permutation_importance(table, request.seed)
    if request.robustness:
        on_step("making faults")
        faults = robustness.sweep_faults(table, request.seed)
    paces: list[document.BatchLatency] = []
    if request.latency:
        on_step("measuring how long answers take")
        paces = _measure_latency(context, context.bundle)
    other = _compare_float(context, request.float_model, on_step) if request.float_model is not None else None
    counts = _class_counts(labels, found, kind)
    accuracy = next((m.value for m in measured.metrics if m.metric == "accuracy"), None)
    result = Evaluation(
        made=clock.to_rfc3339(time.time_ns() // 1000),
        agent=__version__,
        seconds=0.0,
        model=_describe_model(context.bundle, signature),
        data=_describe_data(context, counts),
        intervals=context.units.description,
        metric=metrics.PRIMARY_METRIC[kind],
        better="down" if kind == "regress" else "up",
        metrics=measured.metrics,
        classes=measured.classes,
        confusion=measured.confusion if len(labels) <= _MAX_CONFUSION_CLASSES else [],
        reliability=measured.reliability,
        slices=slicing.slice_metrics(kind, context.pairs, sliced, context.units),
        ablation=drops,
        robustness=faults,
        leakage=leaks,
        hints=[*label_quality.check_class_balance(counts, accuracy), *suspicions],
        suspects=suspects,
        against=other,
        machine=tuning.describe_machine() if paces else "",
        latency=paces,
    )
    return _with_warnings(result, _notes(context, table, result), started_s)


def _compare_float(context: _EvaluationContext, file: Path, on_step: Callable[[str], None]) -> document.FloatComparison:
    on_step("answering with the float model")
    bundle = float_comparison.load_float_bundle(file, context.bundle)
    found = float_comparison.compare(file, bundle, context.examples, context.answers, context.pairs, context.units)
    if not context.request.latency:
        return found
    on_step("measuring how long the float model takes")
    return msgspec.structs.replace(found, latency=_measure_latency(context, bundle))


def _measure_latency(context: _EvaluationContext, bundle: Bundle) -> list[document.BatchLatency]:
    some = min(len(context.dataset.values), _LATENCY_ROWS)
    return latency.measure(bundle, context.dataset.values[:some], context.dataset.t[:some])


def _check_leakage(context: _EvaluationContext, sample: bench.WindowSample) -> list[document.CheckResult]:
    request, found = context.request, context.examples
    train = None
    if request.train is not None:
        train = _read_training_data(request.train, context.inference, request.group)
    seen = leakage.training_rows(context.dataset, request.split, train)
    checked = leakage.run_checks(found, context.inference.rows, request.group, seen)
    return checked if found.label_sets is not None else [*checked, giveaway.check_target_leakage(sample)]


def _read_training_data(path: Path, inference: Inference, group: str | None) -> Dataset:
    """With the groups, where the training data name them."""
    try:
        return examples.read(path, inference, [group] if group else [])
    except UsageError:
        if group is None:
            raise
        return examples.read(path, inference, [])


def _with_warnings(result: Evaluation, notes: list[str], started_s: float) -> Evaluation:
    """With what a reader must not miss."""
    warnings = [one.summary for one in (*result.leakage, *result.hints) if one.state == "warning"]
    warnings += [
        f"{one.slice}: {metric_name(one.metric)} {format_value(one.value)} of {one.n} windows is worse than the rest, beyond "
        "chance over all slices (Holm)."
        for one in result.slices
        if one.state == slices.WORSE
    ]
    seconds = round(time.monotonic() - started_s, 2)
    return msgspec.structs.replace(result, warnings=warnings, notes=notes, seconds=seconds)


def _notes(context: _EvaluationContext, sample: bench.WindowSample, result: Evaluation) -> list[str]:
    """What was left out, and what small numbers do not allow to say."""
    found, notes = context.examples, []
    if context.dataset.rejected_count:
        notes.append(f"{context.dataset.rejected_count} rows could not be read and were left out.")
    if found.unlabelled:
        notes.append(f"{found.unlabelled} windows have no label and were left out.")
    if found.mixed:
        notes.append(f"{found.mixed} windows hold rows of two labels; that of the last row counts.")
    missing = float(context.answers.missing_share.mean())
    if missing > 0:
        notes.append(f"{missing:.1%} of the values are missing.")
    small = [one.slice for one in result.slices if one.state == slices.SMALL]
    if small:
        notes.append(f"Too small to tell: {', '.join(small[:8])}{' and more' if len(small) > 8 else ''}.")
    if context.request.slices and not result.slices:
        notes.append("Slices need answers that are right or wrong: the bundle has no threshold ([output] threshold).")
    if (context.request.ablate or context.request.robustness) and len(sample.examples) < len(found):
        notes.append(f"Ablation and robustness look at {len(sample.examples)} windows, evenly from all.")
    return notes


def _class_counts(labels: list[str], windows: LabelledWindows, kind: str) -> dict[str, int]:
    """Windows of each class that the model knows."""
    if kind == "regress":
        return {}
    if windows.label_sets is not None:
        sums = windows.label_sets[windows.truth.astype(np.int64)].sum(axis=0)
        return {label: int(n) for label, n in zip(labels, sums, strict=True)}
    names = labels if kind == "classify" else ["normal", "anomaly"]
    counts = np.bincount(windows.truth.astype(np.int64), minlength=len(names))
    return {name: int(n) for name, n in zip(names, counts, strict=True)}


def _describe_model(bundle: Bundle, signature: str) -> document.EvaluatedModel:
    manifest = bundle.manifest
    window = manifest.input.window
    return document.EvaluatedModel(
        name=manifest.name,
        version=manifest.version,
        digest=bundle.digest,
        kind=manifest.kind,
        runtime=runtime.RUNTIME_NAME,
        signature=signature,
        fields=manifest.input.fields,
        units=manifest.input.units,
        labels=manifest.output.labels,
        window=(window.rows, window.step) if window else None,
        threshold=manifest.output.threshold,
        temperature=manifest.output.temperature,
        bytes=len(bundle.model_bytes),
        sha256=manifest.files["model.tflite"],
    )


def _describe_data(context: _EvaluationContext, counts: dict[str, int]) -> document.EvaluationData:
    source, found, request = context.dataset, context.examples, context.request
    sizes = np.bincount(source.file_index, minlength=len(source.files))
    files = [document.SourceFile(file=f.name, rows=int(n)) for f, n in zip(source.files, sizes, strict=True)]
    names, counted = np.unique(found.columns[request.split] if request.split else [], return_counts=True)
    t = source.t[found.last]
    dated = source.has_time and int(t.min()) >= _EARLIEST_US
    return document.EvaluationData(
        files=files,
        rows=len(source.values),
        rejected=source.rejected_count,
        windows=len(found),
        unlabelled=found.unlabelled,
        mixed=found.mixed,
        label=request.label,
        counts=counts,
        group=request.group,
        groups=context.units.group_count,
        split=request.split,
        splits={str(name): int(n) for name, n in zip(names, counted, strict=True)},
        begin=clock.to_rfc3339(int(t.min())) if dated else None,
        end=clock.to_rfc3339(int(t.max())) if dated else None,
    )
