"""Evaluation of a bundle: everything that `model evaluate` measures, as one document."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from agent import __version__, clock
from agent.arrays import Ints
from agent.errors import UsageError
from agent.evaluation import (
    bootstrap,
    document,
    examples,
    float_comparison,
    label_quality,
    latency,
    leakage,
    metrics,
    predictions,
    sensitivity,
    small_cells,
)
from agent.evaluation.bootstrap import BootstrapUnits
from agent.evaluation.document import Evaluation
from agent.evaluation.examples import Dataset, LabelledWindows
from agent.evaluation.sensitivity import WindowSample
from agent.indices import bincount
from agent.model.bundle.bundle import Bundle
from agent.model.inference import tuning
from agent.model.inference.inference import Inference, InferenceResult
from agent.model.inference.runtime_name import runtime_name
from agent.performance import slices
from agent.performance.estimates import MetricEstimate
from agent.performance.metrics import LabelledPredictions, display_name, primary
from agent.text import format_value

# 2000-01-01: before it, t only counts.
_EARLIEST_US = 946_684_800_000_000
_MAX_CONFUSION_CLASSES = 1000
_LATENCY_ROWS = 20_000
_MAX_NAMES = 8


class EvaluationRequest(msgspec.Struct, frozen=True):
    """Request to evaluate; columns by name. `min_count`: least windows behind a number; 0 shows all.

    `output` names the further output that the bundle is reduced to; "" for the main one.
    """

    data: Path
    label: str = "label"
    output: str = ""
    group: str | None = None
    split: str | None = None
    slices: tuple[str, ...] = ()
    train: Path | None = None
    float_model: Path | None = None
    ablate: bool = False
    robustness: bool = False
    latency: bool = True
    seed: int = 0
    min_count: int = 0
    joined: Mapping[str, Path] = examples.NO_FILES

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(c for c in (self.label, self.group, self.split, *self.slices) if c))


class _Context(msgspec.Struct, frozen=True, eq=False):
    bundle: Bundle
    inference: Inference
    request: EvaluationRequest
    dataset: Dataset
    windows: LabelledWindows
    result: InferenceResult
    predictions: LabelledPredictions
    units: BootstrapUnits
    on_step: Callable[[str], None]

    @property
    def kind(self) -> str:
        return predictions.evaluation_kind(self.bundle.manifest)


def evaluate(
    bundle: Bundle,
    inference: Inference,
    signature: str,
    request: EvaluationRequest,
    on_step: Callable[[str], None],
    predict: Callable[[Inference, Dataset, Ints], InferenceResult] = examples.predict,
) -> Evaluation:
    """Evaluate a loaded bundle; `on_step` receives what comes next. Raises UsageError, BadBundle."""
    started_s = time.monotonic()
    on_step("reading the data")
    dataset = examples.read(request.data, inference, request.columns, request.joined)
    windows = examples.label_windows(dataset, inference, request.label, request.columns, request.split)
    on_step(f"predicting {len(windows):,} windows")
    result = predict(inference, dataset, windows.starts)
    paired = predictions.pair_with_truth(bundle.manifest, result, windows.truth, windows.label_sets)
    if paired.value is not None and not np.isfinite(paired.value).all():
        n = int((~np.isfinite(paired.value)).sum())
        raise UsageError(f"{request.data}: the model's output is not finite for {n} windows; look at its inputs")
    losses = paired.losses(predictions.evaluation_kind(bundle.manifest))
    if losses is None:
        assert paired.value is not None
        losses = paired.value
    group = windows.columns[request.group] if request.group else None
    units = bootstrap.build_units(losses, group, request.group, request.seed)
    context = _Context(bundle, inference, request, dataset, windows, result, paired, units, on_step)
    return _build_document(context, signature, started_s)


def _build_document(context: _Context, signature: str, started_s: float) -> Evaluation:
    request, windows, kind = context.request, context.windows, context.kind
    labels = context.bundle.manifest.output.labels
    measured = metrics.compute(kind, labels, context.predictions, context.units)
    sample = sensitivity.draw_sample(context.inference, windows, context.units)
    context.on_step("looking for leakage")
    leakage_checks = _check_leakage(context, sample)
    label_kind = context.bundle.manifest.label_kind
    order_checks = label_quality.check_label_order(labels, label_kind, context.predictions)
    noise_checks, suspects = label_quality.check_label_noise(labels, context.predictions, windows)
    importance: list[document.FieldImportance] = []
    robustness: list[document.RobustnessCurve] = []
    latencies: list[document.BatchLatency] = []
    if request.ablate:
        context.on_step("replacing fields")
        importance = sensitivity.permutation_importance(sample, request.seed)
    if request.robustness:
        context.on_step("injecting faults")
        robustness = sensitivity.sweep_faults(sample, request.seed)
    if request.latency:
        context.on_step("measuring latency")
        latencies = _measure_latency(context, context.bundle)
    comparison = _compare_float(context, request.float_model) if request.float_model is not None else None
    counts = _class_counts(labels, windows, kind)
    if request.min_count:
        counts = small_cells.large_counts(counts, request.min_count)
    accuracy = next((metric.value for metric in measured.metrics if metric.metric == "accuracy"), None)
    sliced = {name: windows.columns[name] for name in request.slices}
    evaluation = Evaluation(
        evaluated_at=clock.to_rfc3339(time.time_ns() // 1000),
        agent=__version__,
        seconds=0.0,
        model=_describe_model(context.bundle, signature, request.output),
        data=_describe_data(context, counts),
        intervals=context.units.description,
        metric=primary(kind).name,
        direction=primary(kind).direction,
        metrics=[*measured.metrics, *_measure_coverage(context)],
        classes=measured.classes,
        confusion=measured.confusion if len(labels) <= _MAX_CONFUSION_CLASSES else [],
        reliability=measured.reliability,
        slices=metrics.slice_metrics(kind, context.predictions, sliced, context.units),
        field_importance=importance,
        robustness=robustness,
        leakage=leakage_checks,
        label_checks=[*order_checks, *label_quality.check_class_balance(counts, accuracy), *noise_checks],
        suspects=suspects,
        float_comparison=comparison,
        machine=tuning.describe_machine() if latencies else "",
        latency=latencies,
    )
    if request.min_count:
        evaluation = small_cells.withhold(evaluation, request.min_count)
    return msgspec.structs.replace(
        evaluation,
        warnings=_warnings(evaluation),
        notes=[*_notes(context, sample, evaluation), *evaluation.notes],
        seconds=round(time.monotonic() - started_s, 2),
    )


def _measure_coverage(context: _Context) -> list[MetricEstimate]:
    """Return how often the truth lies within the bounds of the residuals, if the bundle has them."""
    bounds, paired = context.bundle.manifest.output.residual_bounds, context.predictions
    if bounds is None or paired.value is None:
        return []
    residuals = paired.truth - paired.value
    is_inside = (residuals >= bounds[0]) & (residuals <= bounds[1])
    share = context.units.sums(is_inside.astype(np.float64))[:, 0] / context.units.total
    interval = bootstrap.proportion_interval(share, float(len(residuals)), context.units)
    return [MetricEstimate("coverage", interval.value, interval.low, interval.high, len(residuals))]


def _compare_float(context: _Context, file: Path) -> document.FloatComparison:
    context.on_step("predicting with the float model")
    bundle = float_comparison.load_float_bundle(file, context.bundle)
    comparison = float_comparison.compare(
        file, bundle, context.windows, context.result, context.predictions, context.units
    )
    if not context.request.latency:
        return comparison
    context.on_step("measuring latency of the float model")
    return msgspec.structs.replace(comparison, latency=_measure_latency(context, bundle))


def _measure_latency(context: _Context, bundle: Bundle) -> list[document.BatchLatency]:
    return latency.measure(bundle, context.dataset.values[:_LATENCY_ROWS], context.dataset.t[:_LATENCY_ROWS])


def _check_leakage(context: _Context, sample: WindowSample) -> list[document.CheckResult]:
    request, windows, train = context.request, context.windows, None
    if request.train is not None:
        try:
            group = [request.group] if request.group else []
            train = examples.read(request.train, context.inference, group, request.joined)
        except UsageError:
            if request.group is None:
                raise
            # Training data need not name the groups.
            train = examples.read(request.train, context.inference, [], request.joined)
    training = leakage.training_rows(context.dataset, request.split, train)
    checks = leakage.check_train_test(windows, context.inference.rows, request.group, training)
    return checks if windows.label_sets is not None else [*checks, leakage.check_target_leakage(sample)]


def _warnings(evaluation: Evaluation) -> list[str]:
    checks = (*evaluation.leakage, *evaluation.label_checks)
    warnings = [check.summary for check in checks if check.state == "warning"]
    warnings += [
        f"{estimate.slice}: {display_name(estimate.metric)} {format_value(estimate.value)} of {estimate.n} windows is "
        "worse than the rest, beyond chance over all slices (Holm)."
        for estimate in evaluation.slices
        if estimate.state == slices.WORSE
    ]
    return warnings


def _notes(context: _Context, sample: WindowSample, evaluation: Evaluation) -> list[str]:
    windows, request, notes = context.windows, context.request, []
    if context.dataset.rejected_count:
        notes.append(f"{context.dataset.rejected_count} rows could not be read and were left out.")
    if windows.unlabelled:
        notes.append(f"{windows.unlabelled} windows have no label and were left out.")
    if windows.mixed:
        notes.append(f"{windows.mixed} windows hold rows of two labels; that of the last row counts.")
    missing = float(context.result.missing_share.mean())
    if missing > 0:
        notes.append(f"{missing:.1%} of the values are missing.")
    small = [estimate.slice for estimate in evaluation.slices if estimate.state == slices.SMALL]
    if small:
        more = " and more" if len(small) > _MAX_NAMES else ""
        notes.append(f"Too small to tell: {', '.join(small[:_MAX_NAMES])}{more}.")
    if request.slices and not evaluation.slices:
        notes.append("Slices need predictions that are right or wrong: set [output] threshold in the SPEC.")
    if (request.ablate or request.robustness) and len(sample.labelled) < len(windows):
        notes.append(f"Field importance and robustness are of {len(sample.labelled)} windows, evenly from all.")
    return notes


def _class_counts(labels: list[str], windows: LabelledWindows, kind: str) -> dict[str, int]:
    if kind == "regress":
        return {}
    if windows.label_sets is not None:
        counts = windows.label_sets[windows.truth.astype(np.int64)].sum(axis=0)
        return dict(zip(labels, counts.tolist(), strict=True))
    names = labels if kind == "classify" else ["normal", "anomaly"]
    counts = bincount(windows.truth.astype(np.int64), minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))


def _describe_model(bundle: Bundle, signature: str, output: str) -> document.EvaluatedModel:
    manifest = bundle.manifest
    window = manifest.input.window
    return document.EvaluatedModel(
        name=manifest.name,
        output=output,
        version=manifest.version,
        digest=bundle.digest,
        kind=manifest.kind,
        runtime=runtime_name(),
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


def _describe_data(context: _Context, counts: dict[str, int]) -> document.EvaluationData:
    dataset, windows, request = context.dataset, context.windows, context.request
    sizes = bincount(dataset.file_index, minlength=len(dataset.files))
    files = [document.SourceFile(file=f.name, rows=int(n)) for f, n in zip(dataset.files, sizes, strict=True)]
    splits, split_counts = np.unique(windows.columns[request.split] if request.split else [], return_counts=True)
    t = dataset.t[windows.last]
    has_dates = dataset.has_time and int(t.min()) >= _EARLIEST_US
    return document.EvaluationData(
        files=files,
        rows=len(dataset.values),
        rejected=dataset.rejected_count,
        windows=len(windows),
        unlabelled=windows.unlabelled,
        mixed=windows.mixed,
        label=request.label,
        counts=counts,
        group=request.group,
        groups=context.units.group_count,
        split=request.split,
        splits={str(name): int(n) for name, n in zip(splits, split_counts, strict=True)},
        begin=clock.to_rfc3339(int(t.min())) if has_dates else None,
        end=clock.to_rfc3339(int(t.max())) if has_dates else None,
    )
