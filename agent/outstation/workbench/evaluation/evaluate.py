"""Evaluation of a bundle: everything that `model evaluate` measures, as one document."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outstation import __version__
from outstation.foundation import clock
from outstation.foundation.arrays import Ints
from outstation.foundation.errors import UsageError
from outstation.foundation.text import format_interval, format_value
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import tuning
from outstation.ml.model.inference.inference import Inference, InferenceResult
from outstation.ml.performance import slices
from outstation.ml.performance.estimates import EXPECTED_MAE, EXPECTED_SHARE, MetricEstimate
from outstation.ml.performance.metrics import display_name, primary
from outstation.workbench.evaluation import (
    bootstrap,
    document,
    evaluation_metrics,
    examples,
    float_comparison,
    label_quality,
    latency,
    leakage,
    predictions,
    sensitivity,
    small_cells,
)
from outstation.workbench.evaluation.adversarial import attack
from outstation.workbench.evaluation.adversarial.results import AdversarialResult
from outstation.workbench.evaluation.adversarial.substitution import Recording
from outstation.workbench.evaluation.adversarial.target import SensorLimits, Target
from outstation.workbench.evaluation.context import (
    EvaluationContext,
    EvaluationRequest,
    count_classes,
    describe_data,
    describe_model,
)
from outstation.workbench.evaluation.document import Evaluation
from outstation.workbench.evaluation.examples import Dataset
from outstation.workbench.evaluation.sensitivity import WindowSample

_MAX_CONFUSION_CLASSES = 1000
_LATENCY_ROWS = 20_000
_MAX_NAMES = 8
_MAX_EXPECTED_SHARE = 1.25  # of the true error, either way


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
    context = EvaluationContext(bundle, inference, request, dataset, windows, result, paired, units, on_step)
    evaluation = _measure_options(context, _measure_performance(context, signature))
    if request.min_count:
        evaluation = small_cells.withhold(evaluation, request.min_count)
    return msgspec.structs.replace(
        evaluation,
        warnings=_warnings(evaluation),
        notes=[*_notes(context, evaluation), *evaluation.notes],
        seconds=round(time.monotonic() - started_s, 2),
    )


def _measure_performance(context: EvaluationContext, signature: str) -> Evaluation:
    """Measure what the predictions and their labels show."""
    request, windows, kind = context.request, context.windows, context.kind
    manifest = context.bundle.manifest
    labels = manifest.output.labels
    measured = evaluation_metrics.compute(kind, labels, context.predictions, context.units)
    order_checks = label_quality.check_label_order(labels, manifest.label_kind, context.predictions)
    noise_checks, suspects = label_quality.check_label_noise(labels, context.predictions, windows)
    counts = count_classes(labels, windows, kind)
    if request.min_count:
        counts = small_cells.large_counts(counts, request.min_count)
    accuracy = next((metric.value for metric in measured.metrics if metric.metric == "accuracy"), None)
    sliced = {name: windows.columns[name] for name in request.slices}
    return Evaluation(
        evaluated_at=clock.to_rfc3339(time.time_ns() // 1000),
        agent=__version__,
        seconds=0.0,
        model=describe_model(context.bundle, signature, context.request.output),
        data=describe_data(context, counts),
        intervals=context.units.description,
        metric=primary(kind).name,
        direction=primary(kind).direction,
        metrics=[*measured.metrics, *_measure_coverage(context), *_measure_expected_error(context)],
        classes=measured.classes,
        confusion=measured.confusion if len(labels) <= _MAX_CONFUSION_CLASSES else [],
        reliability=measured.reliability,
        slices=evaluation_metrics.slice_metrics(kind, context.predictions, sliced, context.units),
        label_checks=[*order_checks, *label_quality.check_class_balance(counts, accuracy), *noise_checks],
        suspects=suspects,
    )


def _measure_options(context: EvaluationContext, evaluation: Evaluation) -> Evaluation:
    """Add the leakage checks, and what else the request asks for."""
    request, measured = context.request, dict[str, Any]()
    sample = sensitivity.draw_sample(context.inference, context.windows, context.units)
    context.on_step("looking for leakage")
    measured["leakage"] = _check_leakage(context, sample)
    if request.ablate:
        context.on_step("replacing fields")
        measured["field_importance"] = sensitivity.permutation_importance(sample, request.seed)
    if request.robustness:
        context.on_step("injecting faults")
        measured["robustness"] = sensitivity.sweep_faults(sample, request.seed)
    if (request.ablate or request.robustness) and len(sample.labelled) < len(context.windows):
        note = f"Field importance and robustness are of {len(sample.labelled)} windows, evenly from all."
        measured["notes"] = [note]
    if request.adversarial:
        measured["adversarial"] = _attack_input(context)
        measured["notes"] = [*measured.get("notes", []), *_list_unattacked(context, measured["adversarial"])]
    if request.latency:
        context.on_step("measuring latency")
        measured |= {"latency": _measure_latency(context, context.bundle), "machine": tuning.describe_machine()}
    if request.float_model is not None:
        measured["float_comparison"] = _compare_float(context, request.float_model)
    return msgspec.structs.replace(evaluation, **measured)


def _list_unattacked(context: EvaluationContext, result: AdversarialResult) -> list[str]:
    """Return sentences about what no attack tried."""
    joined, notes = context.bundle.manifest.joined, []
    if joined:
        notes.append(f"Attacks change readings of the first input only, none of {', '.join(joined)}.")
    if not any(attack.attack == "trigger" for attack in result.attacks):
        notes.append("No trigger was searched: too few windows with right answers, or too few --max-invocations.")
    return notes


def _attack_input(context: EvaluationContext) -> AdversarialResult:
    """Attack windows whose answer is right, of all classes alike."""
    inference, request, windows, paired = context.inference, context.request, context.windows, context.predictions
    candidates = sensitivity.find_windows_with_history(inference, windows)
    if paired.predicted is not None:
        candidates = candidates[paired.right[candidates]]
    if not len(candidates):
        raise UsageError(
            f"{request.data}: no answer is right, so an attack has nothing to flip; leave --adversarial out"
        )
    predicted = paired.predicted if paired.predicted is not None else np.zeros(len(windows), np.int64)
    most = min(attack.MAX_WINDOWS, sensitivity.max_windows(inference), request.max_invocations // 10)
    picked = np.sort(candidates[attack.order_by_class(predicted[candidates], request.seed)[:most]])
    sample = sensitivity.cut_sample(inference, windows.subset(picked), context.units.subset(picked))
    order = attack.order_by_class(predicted[picked], request.seed)
    dataset = context.dataset
    target = Target(
        inference,
        SensorLimits.from_bundle(context.bundle, dataset.values),
        sample.windows[order],
        sample.t.reshape(len(picked), -1)[order],
        None if sample.joined is None else sample.joined[order],
        _find_tolerance(context),
    )
    first = windows.starts[picked][order] - inference.history_rows
    earliest = examples.find_run_starts(dataset, inference)[windows.starts[picked][order]]
    recording = Recording(dataset.values, first, np.minimum(earliest, first))
    return attack.attack(target, recording, request.max_invocations, request.seed, context.on_step)


def _find_tolerance(context: EvaluationContext) -> float:
    """Return the change of a number that counts as another answer: beyond 95 of 100 errors, or the sd of the values."""
    value, bounds = context.predictions.value, context.bundle.manifest.output.residual_bounds
    if value is None:
        return 0.0
    if bounds is not None:
        return max(abs(bound) for bound in bounds)
    if context.kind == "regress":
        return float(np.quantile(np.abs(context.predictions.errors), 0.95))
    return float(value.std())


def _measure_coverage(context: EvaluationContext) -> list[MetricEstimate]:
    """Return how often the truth lies within the bounds of the residuals, if the bundle has them."""
    bounds, paired = context.bundle.manifest.output.residual_bounds, context.predictions
    if bounds is None or paired.value is None:
        return []
    residuals = paired.truth - paired.value
    is_inside = (residuals >= bounds[0]) & (residuals <= bounds[1])
    share = context.units.sums(is_inside.astype(np.float64))[:, 0] / context.units.total
    interval = bootstrap.proportion_interval(share, float(len(residuals)), context.units)
    return [MetricEstimate("coverage", interval.value, interval.low, interval.high, len(residuals))]


def _measure_expected_error(context: EvaluationContext) -> list[MetricEstimate]:
    """Return the error that devices expect without labels, and that as a share of the true one (paired)."""
    stored, paired = context.bundle.files.get("reference.json"), context.predictions
    if stored is None or paired.value is None or context.kind != "regress":
        return []
    windows, output = context.windows, context.request.output
    reference = Reference.from_json(stored)
    expected = examples.expect_errors(reference, context.dataset, windows.starts, paired.value, output)
    if expected is None:
        return []
    sums, true = context.units.sums(expected)[:, 0], context.units.sums(np.abs(paired.errors))[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        estimates = {EXPECTED_MAE: sums / context.units.total, EXPECTED_SHARE: sums / true}
    intervals = {name: bootstrap.percentile_interval(values) for name, values in estimates.items()}
    return [MetricEstimate(name, e.value, e.low, e.high, len(expected)) for name, e in intervals.items()]


def _compare_float(context: EvaluationContext, file: Path) -> document.FloatComparison:
    context.on_step("predicting with the float model")
    bundle = float_comparison.load_float_bundle(file, context.bundle)
    comparison = float_comparison.compare(context, file, bundle)
    if not context.request.latency:
        return comparison
    context.on_step("measuring latency of the float model")
    return msgspec.structs.replace(comparison, latency=_measure_latency(context, bundle))


def _measure_latency(context: EvaluationContext, bundle: Bundle) -> list[document.BatchLatency]:
    return latency.measure(bundle, context.dataset.values[:_LATENCY_ROWS], context.dataset.t[:_LATENCY_ROWS])


def _check_leakage(context: EvaluationContext, sample: WindowSample) -> list[document.CheckResult]:
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
        f"without labels devices expect {format_value(estimate.value)} times the true error "
        f"({format_interval(estimate.low, estimate.high)}): these data are unlike the held-out ones."
        for estimate in evaluation.metrics
        if estimate.metric == EXPECTED_SHARE and _is_misleading(estimate)
    ]
    warnings += [
        f"{estimate.slice}: {display_name(estimate.metric)} {format_value(estimate.value)} of {estimate.n} windows is "
        "worse than the rest, beyond chance over all slices (Holm)."
        for estimate in evaluation.slices
        if estimate.state == slices.WORSE
    ]
    return warnings


def _is_misleading(share: MetricEstimate) -> bool:
    """Return True if the whole interval of the expected error, as a share of the true one, is beyond the limits."""
    if share.low is None or share.high is None:
        return False
    return share.low > _MAX_EXPECTED_SHARE or share.high < 1 / _MAX_EXPECTED_SHARE


def _notes(context: EvaluationContext, evaluation: Evaluation) -> list[str]:
    windows, request, notes = context.windows, context.request, []
    if context.dataset.rejected_count:
        notes.append(f"{context.dataset.rejected_count} rows could not be read and were left out.")
    if windows.unlabelled:
        notes.append(f"{windows.unlabelled} windows have no label and were left out.")
    if windows.mixed:
        notes.append(f"{windows.mixed} windows hold rows of two labels; that of the last row counts.")
    missing = float(context.result.missing_share.mean())
    if missing > 0:
        share = f"{missing:.1%}" if missing >= 0.001 else "Fewer than 0.1%"
        notes.append(f"{share} of the values are missing.")
    small = [estimate.slice for estimate in evaluation.slices if estimate.state == slices.SMALL]
    if small:
        more = " and more" if len(small) > _MAX_NAMES else ""
        notes.append(f"Too small to tell: {', '.join(small[:_MAX_NAMES])}{more}.")
    if request.slices and not evaluation.slices:
        notes.append("Slices need predictions that are right or wrong: set [output] threshold in the SPEC.")
    return notes
