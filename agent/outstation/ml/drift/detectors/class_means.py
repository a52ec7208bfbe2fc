"""Class means: numbers of each model window, averaged within the class that the model names.

Only whole numbers are kept, a count and a sum in steps of 2**-20, so any split of the rows, added in any order, gives
the same bits. `ClassMeanDetector` tests such means for drift.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import AnyArray, Bools, Float64s, Ints
from outstation.foundation.indices import repeat, sum_runs, take
from outstation.ml.drift.detectors.detector import (
    Baseline,
    ClassifiedWindows,
    Counter,
    DriftWindows,
    LearnedScores,
    LearnedWindows,
    ModelWindows,
    ScoreDetector,
    Scores,
    Task,
)
from outstation.ml.drift.numeric.sums import Groups
from outstation.ml.kernel import comparisons, group_sums
from outstation.ml.kernel import library as kernel

SCALE = 2.0**20


class WeightedMeans(msgspec.Struct, frozen=True, eq=False):
    """Weight and mean of X numbers per class, each (..., C, X); the mean is 0 without weight."""

    weight: Float64s
    mean: Float64s


def sum_by_group(values: Float64s, groups: Groups) -> Ints:
    """Return counts and sums (G, 2X) of the values (w, X) of model windows in these groups; NaN is left out."""
    count, width = groups.count, values.shape[1]
    if not values.size:
        return np.zeros((count, 2 * width), np.int64)
    library = kernel.kernel()
    if library is not None:
        return group_sums.sum_steps(library, values, SCALE, groups.group_ids, count)
    out = np.zeros((count, 2 * width), np.int64)
    known = ~np.isnan(values)
    steps = np.concatenate([known, np.rint(np.where(known, values, 0.0) * SCALE)], axis=1)
    present = np.flatnonzero(groups.n)
    first = np.cumsum(groups.n)[present] - groups.n[present]
    out[present] = sum_runs(take(steps, groups.order, axis=0), first)
    return out


def means_from_sums(sums: Ints) -> WeightedMeans:
    """Return the means of counts and sums (..., C, 2X)."""
    count = sums.shape[-1] // 2
    n, total = sums[..., :count], sums[..., count:]
    return WeightedMeans(n.astype(np.float64), total / SCALE / np.maximum(n, 1))


def compute_deviations(measured: WeightedMeans, expected: Float64s) -> Float64s:
    """Return the deviation (..., X) from each class's `expected` mean (..., C, X), averaged; NaN without weight."""
    total = measured.weight.sum(-2)
    deviation = measured.mean - expected
    deviation *= measured.weight
    known = total > 0
    return np.asarray(np.where(known, deviation.sum(-2) / np.where(known, total, 1.0), np.nan))


def average_sums(sums: Ints, expected: Float64s) -> Float64s:
    """Return the deviations (W, X) of counts and sums (W, C, 2X) from `expected` means (C, X); NaN without a count."""
    library = kernel.kernel()
    if library is not None and comparisons.sums_in_order(*expected.shape):
        return comparisons.average_deviations(library, sums, SCALE, expected)
    return compute_deviations(means_from_sums(sums), expected)


def pooled_mean(measured: WeightedMeans, min_weight: float) -> Float64s:
    """Return the mean (C, X) over drift windows (K, C, X); a class with less weight takes that of all classes."""
    return _mean_or_overall(measured.weight.sum(0), (measured.weight * measured.mean).sum(0), min_weight)


def leave_one_out_mean(measured: WeightedMeans, min_weight: float) -> Float64s:
    """Return the same (K, C, X) without the drift window that it is compared with."""
    total = measured.weight * measured.mean
    np.subtract(total.sum(0), total, out=total)
    return _mean_or_overall(measured.weight.sum(0) - measured.weight, total, min_weight)


def _mean_or_overall(weight: Float64s, total: Float64s, min_weight: float) -> Float64s:
    """Return `total` / `weight`, or that of all classes, in the memory of `total`."""
    overall = total.sum(-2, keepdims=True) / np.maximum(weight.sum(-2, keepdims=True), 1e-9)
    total /= np.maximum(weight, 1e-9)
    np.copyto(total, overall, where=~(weight >= min_weight))
    return total


def count_measured(counter: Counter, task: Task, windows: ClassifiedWindows) -> Ints:
    """Return counts and sums (G, `count_width`) of what a counter measured; zeros for single rows."""
    if counter.name not in windows.measures:
        return np.zeros((windows.groups.count, counter.count_width(task)), np.int64)
    return sum_by_group(windows.measures[counter.name], windows.groups)


class ClassMeansBaseline(msgspec.Struct, frozen=True, eq=False):
    mean: Float64s  # (C, X); a rare class has that of all classes together


class ClassMeanDetector(ScoreDetector):
    """Detector of X numbers that `measure` takes of each model window; they belong to one subject.

    A subclass names itself, its subject and its false-alarm budget, and gives `width`, `measure` and `describe`.
    """

    subject: str
    baseline_type = ClassMeansBaseline
    budget = 3e-4  # false alarms per window, of all S tests together

    def measure(self, windows: ModelWindows) -> Float64s | None:
        return None

    def min_sd(self, task: Task) -> float:
        return 0.05

    def subjects(self, task: Task) -> Sequence[int]:
        return [task.subject(self.subject)] * self.width(task)

    def count_width(self, task: Task) -> int:
        return 2 * self.width(task)

    def count(self, task: Task, windows: ClassifiedWindows) -> Ints:
        return count_measured(self, task, windows)

    def means(self, task: Task, counts: Ints) -> WeightedMeans:
        """Return the means of counts (..., C, `count_width`)."""
        return means_from_sums(counts)

    def retain(self, task: Task, counts: Ints) -> dict[str, AnyArray]:
        return {self.name: counts}

    def retained_means(self, task: Task, entries: Mapping[str, AnyArray]) -> WeightedMeans:
        """Return the means (m, X) of retained entries."""
        return self.means(task, entries[self.name])

    def learn_values(self, task: Task, windows: LearnedWindows) -> Float64s:
        learned = self._expand(task, windows)
        return compute_deviations(learned, leave_one_out_mean(learned, windows.min_class_weight))

    def learn(self, task: Task, windows: LearnedWindows, scores: LearnedScores) -> ClassMeansBaseline:
        return ClassMeansBaseline(pooled_mean(self._expand(task, windows), windows.min_class_weight))

    def is_valid(self, task: Task, own: ClassMeansBaseline) -> bool:
        return own.mean.shape == (task.classes, self.width(task))

    def _expand(self, task: Task, windows: LearnedWindows) -> WeightedMeans:
        entries = self.retained_means(task, windows.entries)
        return WeightedMeans(windows.expand(entries.weight), windows.expand(entries.mean))

    def score(self, task: Task, windows: DriftWindows, baseline: Baseline) -> Scores:
        return Scores(self.deviations(task, windows.counts[self.name], baseline.own.mean))

    def deviations(self, task: Task, counts: Ints, expected: Float64s) -> Float64s:
        """Return the deviations (W, X) of counts (W, C, `count_width`) from the `expected` means (C, X)."""
        return average_sums(counts, expected)

    def suspended(self, task: Task, moving: Bools, near_alarm: Bools) -> Bools | None:
        return repeat(near_alarm[:, None], self.width(task), axis=1)
