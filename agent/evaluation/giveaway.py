"""A field that alone predicts the label: often the label itself, written down somewhere among the readings.

Each field's mean, spread and last value in a window predicts by itself, from quantile bins learned on half of the
windows, for the other half: accuracy, or R². Of anomalies, AUC of the value.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from agent.drift import quality
from agent.drift.codec import Floats as Numbers
from agent.drift.codec import Ints
from agent.evaluation.bench import Bench
from agent.evaluation.document import Finding

ALONE = 0.98
_EASY = 0.9
_BINS, _FEWEST = 32, 40
CHECK = "a field that gives it away"


def measure(bench: Bench) -> Finding:
    """A warning that names fields which alone predict what is true."""
    if len(bench.examples) < _FEWEST:
        few = f"{len(bench.examples)} windows are too few"
        return Finding(check=CHECK, state="not checked", summary=f"{few}.")
    names = bench.judge.inference.fields
    measured = {"classify": "accuracy", "regress": "R²", "anomaly": "AUC"}[bench.kind]
    each = {name: max(_scores(bench, i)) for i, name in enumerate(names)}
    ranked = sorted(names, key=lambda name: -each[name])
    guilty = [name for name in ranked if each[name] >= ALONE]
    rest = [name for name in ranked if name not in guilty]
    best = f"{ranked[0]} alone reaches {measured} {each[ranked[0]]:.3f}"
    if not guilty:
        return Finding(check=CHECK, state="ok", summary=f"No field alone predicts the label; {best}.")
    if rest and each[rest[0]] >= _EASY and len(guilty) > 1:
        return Finding(check=CHECK, state="ok", summary=f"Many fields predict the label, an easy task; {best}.")
    told = ", ".join(f"{name} ({each[name]:.3f})" for name in guilty[:5])
    other = f"; the best of the others, {rest[0]}, {each[rest[0]]:.3f}" if rest else ""
    text = f"{told} alone predicts the label ({measured}{other}): was it known before the label was, and is it in use?"
    return Finding(check=CHECK, state="warning", summary=text)


def _scores(bench: Bench, field: int) -> Iterator[float]:
    values = bench.windows[:, -bench.judge.inference.rows :, field].astype(np.float64)
    known = np.isfinite(values)
    count = known.sum(axis=1)
    filled = np.where(known, values, 0.0)
    mean = filled.sum(axis=1) / np.maximum(count, 1)
    summaries = [np.where(known[:, -1], filled[:, -1], mean)]
    if values.shape[1] > 1:
        off = np.where(known, values - mean[:, None], 0.0)
        summaries += [mean, np.sqrt((off**2).sum(axis=1) / np.maximum(count, 1))]
    truth = bench.examples.truth
    for summary in summaries:
        yield _auc(summary, truth) if bench.kind == "anomaly" else _binned(bench.kind, summary, truth)


def _auc(values: Numbers, truth: Numbers) -> float:
    found = quality.auc(values, truth > 0, np.ones(len(values)))
    return max(found, 1 - found)


def _binned(kind: str, values: Numbers, truth: Numbers) -> float:
    """Predicted from bins of the other half: two halves, every second window."""
    half = np.arange(len(values)) % 2
    predicted = np.empty(len(values))
    for learn, test in ((half == 0, half == 1), (half == 1, half == 0)):
        cuts = np.unique(np.quantile(values[learn], np.arange(1, _BINS) / _BINS))
        at = np.searchsorted(cuts, values, side="right")
        predicted[test] = _of_bins(kind, at[learn], truth[learn], len(cuts) + 1)[at[test]]
    if kind == "classify":
        return float((predicted == truth).mean())
    return quality.r2(truth, predicted - truth, np.ones(len(truth)))


def _of_bins(kind: str, at: Ints, truth: Numbers, bins: int) -> Numbers:
    """(bins,) the usual class, or the mean, of each; of an empty one, that of all."""
    if kind == "classify":
        classes = truth.astype(np.int64)
        count = int(classes.max()) + 1
        table = np.bincount(at * count + classes, minlength=bins * count).reshape(bins, count)
        table = np.where(table.sum(axis=1, keepdims=True) > 0, table, table.sum(axis=0))
        return table.argmax(axis=1).astype(np.float64)
    n, sums = np.bincount(at, minlength=bins), np.bincount(at, truth, bins)
    return np.where(n > 0, sums / np.maximum(n, 1), truth.mean())
