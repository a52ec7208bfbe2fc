"""A field that alone predicts the label: often the label itself, written down somewhere among the readings.

Each field's mean, spread and last value in a window predicts by itself, from the nearest one in the other half of
the windows: accuracy, or R². Of anomalies, AUC of the value.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from agent.arrays import Float64s as Numbers
from agent.evaluation.bench import WindowSample
from agent.evaluation.document import CheckResult
from agent.performance import metrics

LEAKAGE_SCORE = 0.98
_EASY_TASK_SCORE = 0.9
_MIN_WINDOWS = 40
CHECK_NAME = "a field that gives it away"


def check_target_leakage(sample: WindowSample) -> CheckResult:
    """A warning that names fields which alone predict what is true."""
    names = sample.predictor.inference.fields
    if len(sample.examples) < _MIN_WINDOWS or len(names) < 2:
        why = "There is one field only." if len(names) < 2 else f"{len(sample.examples)} windows are too few."
        return CheckResult(check=CHECK_NAME, state="not checked", summary=why)
    measured = {"classify": "accuracy", "regress": "R²", "anomaly": "AUC"}[sample.kind]
    each = {name: max(_field_scores(sample, i)) for i, name in enumerate(names)}
    ranked = sorted(names, key=lambda name: -each[name])
    guilty = [name for name in ranked if each[name] >= LEAKAGE_SCORE]
    rest = [name for name in ranked if name not in guilty]
    best = f"{ranked[0]} alone reaches {measured} {each[ranked[0]]:.3f}"
    if not guilty:
        return CheckResult(check=CHECK_NAME, state="ok", summary=f"No field alone predicts the label; {best}.")
    if len(guilty) > 1 and (not rest or each[rest[0]] >= _EASY_TASK_SCORE):
        return CheckResult(
            check=CHECK_NAME, state="ok", summary=f"Many fields predict the label, an easy task; {best}."
        )
    told = ", ".join(f"{name} ({each[name]:.3f})" for name in guilty[:5])
    other = f"; the best of the others, {rest[0]}, {each[rest[0]]:.3f}" if rest else ""
    text = f"{told} alone predicts the label ({measured}{other}): was it known before the label was, and is it in use?"
    return CheckResult(check=CHECK_NAME, state="warning", summary=text)


def _field_scores(sample: WindowSample, field: int) -> Iterator[float]:
    values = sample.windows[:, -sample.predictor.inference.rows :, field].astype(np.float64)
    known = np.isfinite(values)
    count = known.sum(axis=1)
    filled = np.where(known, values, 0.0)
    mean = filled.sum(axis=1) / np.maximum(count, 1)
    summaries = [np.where(known[:, -1], filled[:, -1], mean)]
    if values.shape[1] > 1:
        off = np.where(known, values - mean[:, None], 0.0)
        summaries += [mean, np.sqrt((off**2).sum(axis=1) / np.maximum(count, 1))]
    truth = sample.examples.truth
    for summary in summaries:
        yield (
            _auc(summary, truth) if sample.kind == "anomaly" else _nearest_neighbour_score(sample.kind, summary, truth)
        )


def _auc(values: Numbers, truth: Numbers) -> float:
    found = metrics.auc(values, truth > 0, np.ones(len(values)))
    return max(found, 1 - found)


def _nearest_neighbour_score(kind: str, values: Numbers, truth: Numbers) -> float:
    """Predicted from the nearest value of the other half: two halves, every second window."""
    half = np.arange(len(values)) % 2
    predicted = np.empty(len(values))
    for learn, test in ((half == 0, half == 1), (half == 1, half == 0)):
        order = np.argsort(values[learn], kind="stable")
        known, told = values[learn][order], truth[learn][order]
        above = np.clip(np.searchsorted(known, values[test]), 1, len(known) - 1)
        near = np.abs(known[above] - values[test]) < np.abs(known[above - 1] - values[test])
        predicted[test] = told[np.where(near, above, above - 1)]
    if kind == "classify":
        return float((predicted == truth).mean())
    return metrics.r2(truth, predicted - truth, np.ones(len(truth)))
