"""Estimates of metrics from labels, with 95 % intervals, as devices and the collector report them.

Accuracy has Wilson's interval, any other metric one of a Bayesian bootstrap, which needs 10 labels, and 10 of each
class. Where the bootstrap does not vary, as where all answers were right, an F1 or AUC has Wilson's interval of as many
results as it rests on, and any other metric none.

`ece_chance` is the ECE that a calibrated model would have on as many results with these scores, by chance, and its
range. An ECE within that range does not contradict calibration, so its interval begins at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.indices import bincount
from outstation.ml.performance import intervals, metrics
from outstation.ml.performance.metrics import LabelledPredictions, WeightVector

CHANCE_ECE = "ece_chance"
EXPECTED_MAE, EXPECTED_SHARE = "expected_mae", "expected_mae_share"


class MetricEstimate(msgspec.Struct, frozen=True):
    """Metric with its 95 % interval; slice "" is all results. `state` of a slice: ok, worse, or small."""

    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    slice: str = ""
    state: str | None = None

    def to_dict(self) -> dict[str, Any]:
        head = {"metric": self.metric, **({"slice": self.slice} if self.slice else {})}
        tail = {"state": self.state} if self.state else {}
        return {**head, "value": self.value, "low": self.low, "high": self.high, "n": self.n, **tail}


def compute_metrics(kind: str, labels: Sequence[str], predictions: LabelledPredictions) -> list[MetricEstimate]:
    """Return all metrics that devices report; none without results."""
    if not len(predictions):
        return []
    losses = predictions.losses(kind)
    dependence = intervals.estimate_dependence(losses) if losses is not None else intervals.INDEPENDENT
    design_effect = dependence.design_effect
    spans: list[tuple[float, float]] = []
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        prepared = metrics.prepare_metrics(kind, labels, predictions, "device")
        resampled = [statistic for _, statistic in prepared if not statistic.is_share]
        values = [statistic.compute(WeightVector.uniform(len(predictions))) for _, statistic in prepared]
        if len(predictions) >= intervals.MIN_RESULTS and resampled:
            spans = intervals.bootstrap(
                lambda w: [value for statistic in resampled for value in statistic.compute(WeightVector(w))],
                intervals.bootstrap_weights(len(predictions), dependence),
            )
    remaining = iter(spans or [intervals.NO_INTERVAL] * sum(len(statistic.parts) for statistic in resampled))
    estimates = []
    for (metric, statistic), statistic_values in zip(prepared, values, strict=True):
        for part, value in zip(statistic.parts, map(float, statistic_values), strict=True):
            bounds = intervals.wilson(value, part.rests_on / design_effect)
            if not statistic.is_share:
                resampled_bounds = next(remaining)
                if not math.isfinite(value) or min(part.n, part.smallest_class) < intervals.MIN_RESULTS:
                    bounds = intervals.NO_INTERVAL
                elif not math.isnan(resampled_bounds[0]) or not part.rests_on:
                    bounds = resampled_bounds
            estimates.append(_build_estimate(part.metric or metric.name, value, bounds, part.n, part.slice))
    return [added for estimate in estimates for added in _add_chance_ece(estimate, predictions)]


def _add_chance_ece(estimate: MetricEstimate, predictions: LabelledPredictions) -> list[MetricEstimate]:
    """Return an estimate, and after an ECE that of chance.

    A bin's gap sums results of the same bin, which are less alike than neighbours; the gaps of a session go together.
    """
    if estimate.metric != "ece" or estimate.value is None or predictions.score is None:
        return [estimate]
    known = np.isfinite(predictions.score)
    score = predictions.score[known]
    bins = metrics.equal_mass_bins(score)
    gap = predictions.right[known] - score
    gap -= (bincount(bins, gap) / np.maximum(bincount(bins), 1))[bins]
    by_bin = gap[np.argsort(bins, kind="stable")]
    # The first is without bias; an interval needs the largest of several.
    mean, sd = metrics.chance_ece(score, bins, intervals.estimate_design_effect(by_bin))
    largest, _ = metrics.chance_ece(score, bins, intervals.estimate_dependence(by_bin).design_effect)
    _, largest_sd = metrics.chance_ece(score, bins, intervals.estimate_dependence(gap).design_effect)
    low, high = max(0.0, mean - intervals.Z * sd), largest + intervals.Z * largest_sd
    if estimate.low is not None and estimate.value <= high:
        estimate = replace(estimate, low=0.0)
    return [estimate, _build_estimate(CHANCE_ECE, mean, (low, high), estimate.n)]


def _build_estimate(name: str, value: float, bounds: tuple[float, float], n: int, label: str = "") -> MetricEstimate:
    return MetricEstimate(name, round_or_none(value), round_or_none(bounds[0]), round_or_none(bounds[1]), n, label)


def round_or_none(value: float) -> float | None:
    """Round to six significant digits; None if it is no finite number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
