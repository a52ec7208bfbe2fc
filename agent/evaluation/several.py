"""How good a multi-label model is: of each label by itself, and of answers that are right as a whole."""

from __future__ import annotations

import numpy as np

from agent.evaluation.bootstrap import Units, share, span
from agent.evaluation.document import Class
from agent.evaluation.examples import Examples
from agent.evaluation.metrics import Measured, harmonic, main_span
from agent.model.inference.inference import Answers
from agent.performance import metrics as quality
from agent.performance.metrics import Metric, Pairs


def measure(labels: list[str], answers: Answers, examples: Examples, pairs: Pairs, units: Units) -> Measured:
    """`accuracy` is of whole answers; F1 macro is the mean over labels, micro of all decisions together."""
    said, sets, n = answers.scores.said, examples.sets, len(examples)
    assert said is not None
    assert sets is not None
    meant = sets[examples.truth.astype(np.int64)]
    hit, every, named = units.sums(said & meant), units.sums(meant), units.sums(said)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = quality.f1_of(hit, every + named)
        precision, recall = hit / named, hit / every
        micro = quality.f1_of(hit.sum(axis=1), (every + named).sum(axis=1))
        figures = {"f1_macro": np.nanmean(each, axis=1), "f1_micro": micro}
    exact = main_span("classify", pairs, units)
    metrics = [Metric("accuracy", exact.value, exact.low, exact.high, n)]
    for name, values in figures.items():
        found = span(values)
        metrics.append(Metric(name, found.value, found.low, found.high, n))
    classes = []
    for i, label in enumerate(labels):
        of_named = share(precision[:, i], float(named[0, i]), units)
        of_meant = share(recall[:, i], float(every[0, i]), units)
        f1 = harmonic(span(each[:, i]), of_named, of_meant)
        counts = {"n": int(every[0, i]), "named": int(named[0, i])}
        classes.append(Class(label=label, precision=of_named, recall=of_meant, f1=f1, **counts))
    return Measured(metrics, classes, [], [])
