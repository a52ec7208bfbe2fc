"""How good a multi-label model is: of each label by itself, and of answers that are right as a whole."""

from __future__ import annotations

import numpy as np

from agent.evaluation.bootstrap import BootstrapUnits, percentile_interval, proportion_interval
from agent.evaluation.document import ClassMetrics
from agent.evaluation.examples import LabelledWindows
from agent.evaluation.metrics import MetricReport, f1_interval, primary_interval
from agent.model.inference.inference import InferenceResult
from agent.performance import metrics as quality
from agent.performance.metrics import LabelledPredictions, MetricEstimate


def multilabel_metrics(
    labels: list[str],
    answers: InferenceResult,
    examples: LabelledWindows,
    pairs: LabelledPredictions,
    units: BootstrapUnits,
) -> MetricReport:
    """`accuracy` is of whole answers; F1 macro is the mean over labels, micro of all decisions together."""
    said, sets, n = answers.scores.predicted, examples.label_sets, len(examples)
    assert said is not None
    assert sets is not None
    meant = sets[examples.truth.astype(np.int64)]
    hit, every, named = units.weighted_sums(said & meant), units.weighted_sums(meant), units.weighted_sums(said)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = quality.f1_from_counts(hit, every + named)
        precision, recall = hit / named, hit / every
        micro = quality.f1_from_counts(hit.sum(axis=1), (every + named).sum(axis=1))
        figures = {"f1_macro": np.nanmean(each, axis=1), "f1_micro": micro}
    exact = primary_interval("classify", pairs, units)
    metrics = [MetricEstimate("accuracy", exact.value, exact.low, exact.high, n)]
    for name, values in figures.items():
        found = percentile_interval(values)
        metrics.append(MetricEstimate(name, found.value, found.low, found.high, n))
    classes = []
    for i, label in enumerate(labels):
        of_named = proportion_interval(precision[:, i], float(named[0, i]), units)
        of_meant = proportion_interval(recall[:, i], float(every[0, i]), units)
        f1 = f1_interval(percentile_interval(each[:, i]), of_named, of_meant)
        counts = {"n": int(every[0, i]), "named": int(named[0, i])}
        classes.append(ClassMetrics(label=label, precision=of_named, recall=of_meant, f1=f1, **counts))
    return MetricReport(metrics, classes, [], [])
