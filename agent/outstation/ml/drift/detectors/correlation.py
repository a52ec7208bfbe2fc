"""Correlation detector: how pairs of fields move together, within the class that the model names.

For a model over windows of rows, each model window gives the correlation of each pair; for single rows, the rows of a
drift window do, from their residuals against the shipped class means. Correlations are compared as Fisher's z, whose
spread does not depend on their size.

Source: Fisher (1915), Frequency distribution of the values of the correlation coefficient, Biometrika 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from outstation.foundation.arrays import AnyArray, Bools, Float64s, Ints
from outstation.foundation.indices import take
from outstation.ml.drift.detectors.class_means import ClassMeanDetector, WeightedMeans, compute_deviations
from outstation.ml.drift.detectors.detector import (
    JOINT,
    MIN_CLASS_ROWS,
    Alarm,
    AlertText,
    ClassifiedWindows,
    LearnedWindows,
    ModelWindows,
    Task,
    round_significant,
)
from outstation.ml.drift.numeric import false_alarm_budget
from outstation.ml.drift.numeric.sums import Groups
from outstation.ml.kernel import group_sums
from outstation.ml.kernel import library as kernel

MAX_PAIRS = 276  # all pairs of 24 fields; of more fields, those closest in the bundle's order
MAX_CORRELATION = 0.9999  # larger ones count as this
RESIDUAL_SCALE, RESIDUAL_CLIP = 2.0**10, 16.0  # residuals in steps of 1/1024 class sd, and the largest one
MAX_PAIRS_NAMED = 3
MIN_RARE_ROWS = 5  # of a drift window, in which both fields of a pair are expected to have other values than usual
_WEIGHT = "correlation.weight"


@lru_cache(maxsize=16)
def field_pairs(fields: int) -> Ints:
    """(P, 2) fields that are compared."""
    pairs = [(i, i + distance) for distance in range(1, fields) for i in range(fields - distance)]
    return np.array(pairs[:MAX_PAIRS], np.int64).reshape(-1, 2)


@lru_cache(maxsize=16)
def pair_members(fields: int) -> tuple[Ints, Ints]:
    """(P,) the first and (P,) the second field of each pair."""
    first, second = np.ascontiguousarray(field_pairs(fields).T)
    return first, second


def steps_per_sd(rows: int) -> float:
    """Return the steps in 1 sd that values of model windows are rounded to: sums of their products are exact."""
    return 2.0 ** ((52 - rows.bit_length()) // 2)


def correlate_windows(centered: Float64s, mean_square: Float64s) -> Float64s:
    """Return correlations (w, P) of each pair in model windows (w, rows, F) of centered values; missing values are 0.

    `mean_square` (w, F); NaN where a field does not move.
    """
    rows, fields = centered.shape[1:]
    left, right = pair_members(fields)
    steps = steps_per_sd(rows)
    whole = centered * (steps / np.sqrt(mean_square))[:, None]
    np.rint(whole, out=whole)
    # All products at once are cheaper than those of pairs alone, where nearly all are wanted.
    if fields**2 < 4 * len(left):
        products = np.matmul(whole.transpose(0, 2, 1), whole)[:, left, right]
    else:
        products = np.einsum("wrp,wrp->wp", whole[:, :, left], whole[:, :, right])
    products /= rows * (steps * steps)
    return np.asarray(np.minimum(np.maximum(products, -MAX_CORRELATION), MAX_CORRELATION))


def quantize_residuals(residuals: Float64s) -> Float64s:
    """Round residuals (n, F) in class sd to whole steps, in place; NaN becomes 0."""
    whole = np.maximum(residuals, -RESIDUAL_CLIP, out=residuals)
    np.minimum(whole, RESIDUAL_CLIP, out=whole)
    whole *= RESIDUAL_SCALE
    np.rint(whole, out=whole)
    missing = np.isnan(whole)
    if missing.any():
        whole[missing] = 0.0
    return whole


def sum_products(residuals: Float64s, groups: Groups) -> Ints:
    """Sum the products of residuals (n, F), in steps, per group: (G, 1 + 2F + P)."""
    fields = residuals.shape[1]
    products = np.zeros((len(groups.n), 1 + fields, 1 + fields))
    for group, members in groups.iter_groups():
        # Products with a field that is always 1 are numbers and sums.
        part = np.ones((len(members), 1 + fields))
        part[:, 1:] = take(residuals, members, axis=0)
        # Exact: products are whole and at most 2**28, and fewer than 2**25 of them are added at once.
        np.matmul(part.T, part, out=products[group])
    return _select_products(products)


def _select_products(products: Float64s) -> Ints:
    """Return the count, sums, squares and pairs (G, 1 + 2F + P) of products (G, 1 + F, 1 + F)."""
    cells = _product_cells(products.shape[1] - 1)
    return take(products.reshape(len(products), -1), cells, axis=1).astype(np.int64)


@lru_cache(maxsize=16)
def _product_cells(fields: int) -> Ints:
    """Return the cells of a product matrix that hold the count, sums, squares and pairs."""
    left, right = pair_members(fields)
    each = 1 + np.arange(fields)
    return np.concatenate([[0], each, each * (2 + fields), (1 + left) * (1 + fields) + 1 + right])


class CorrelationDetector(ClassMeanDetector):
    """Detector of Fisher's z of each pair of fields."""

    name = "correlation"
    subject = JOINT
    slack = false_alarm_budget.PAIR_SLACK
    budget = false_alarm_budget.PAIR_BUDGET
    min_limit = false_alarm_budget.MIN_PAIR_LIMIT

    def width(self, task: Task) -> int:
        return len(field_pairs(task.fields))

    def count_width(self, task: Task) -> int:
        """Return n and sum per pair; for single rows n, then sums, squares and products of residuals."""
        pairs = self.width(task)
        return 2 * pairs if task.windowed else 1 + 2 * task.fields + pairs

    def measure(self, windows: ModelWindows) -> Float64s | None:
        return np.asarray(np.arctanh(windows.correlations))

    def count(self, task: Task, windows: ClassifiedWindows) -> Ints:
        if task.windowed:
            return super().count(task, windows)
        library, groups = kernel.kernel(), windows.groups
        singles = None if library is None else kernel.to_singles(windows.values)
        if library is not None and singles is not None:
            every = singles, windows.classes, windows.class_mean, windows.class_sd
            limits = RESIDUAL_CLIP, RESIDUAL_SCALE
            products = group_sums.sum_residuals(library, *every, groups.order, groups.n, limits)
            return _select_products(products)
        residuals = take(windows.class_mean, windows.classes, axis=0)
        np.subtract(windows.values, residuals, out=residuals)
        residuals /= take(windows.class_sd, windows.classes, axis=0)
        return sum_products(quantize_residuals(residuals), groups)

    def means(self, task: Task, counts: Ints) -> WeightedMeans:
        if task.windowed:
            return super().means(task, counts)
        fields = task.fields
        left, right = pair_members(fields)
        n = counts[..., :1].astype(np.float64)
        each = counts[..., 1:] / np.maximum(n, 1)
        mean, square, product = each[..., :fields], each[..., fields : 2 * fields], each[..., 2 * fields :]
        variance = square - mean**2
        scale = np.sqrt(np.maximum(take(variance, left, -1) * take(variance, right, -1), 0.0))
        moving = scale > 1.0
        correlation = (product - take(mean, left, -1) * take(mean, right, -1)) / np.where(moving, scale, 1.0)
        weight = np.where(moving & (n >= MIN_CLASS_ROWS), n - 3, 0.0)
        z = np.arctanh(np.minimum(np.maximum(correlation, -MAX_CORRELATION), MAX_CORRELATION))
        return WeightedMeans(weight, np.where(weight > 0, z, 0.0))

    def deviations(self, task: Task, counts: Ints, expected: Float64s) -> Float64s:
        if task.windowed:
            return super().deviations(task, counts, expected)
        return compute_deviations(self.means(task, counts), expected)

    def retain(self, task: Task, counts: Ints) -> dict[str, AnyArray]:
        """Return z as float16, NaN without weight, and one weight for all pairs: calibration needs no more."""
        means = self.means(task, counts)
        weight = means.weight.max(1, initial=0, keepdims=True).astype(np.float32)
        return {self.name: np.where(means.weight > 0, means.mean, np.nan).astype(np.float16), _WEIGHT: weight}

    def retained_means(self, task: Task, entries: Mapping[str, AnyArray]) -> WeightedMeans:
        z = entries[self.name]
        known = ~np.isnan(z)
        return WeightedMeans(entries[_WEIGHT] * known, np.where(known, z, 0.0))

    def learn_values(self, task: Task, windows: LearnedWindows) -> Float64s:
        """Return NaN for pairs whose rare values hardly meet: one row more or less would make another correlation."""
        bins = windows.distributions.bins
        rows = bins.sum(-1, keepdims=True).mean(0)
        rare = 1 - (bins.sum(0) / np.maximum(bins.sum((0, 2)), 1)[:, None]).max(-1)
        left, right = pair_members(task.fields)
        meeting = rows[left, 0] * rare[left] * rare[right]
        return np.where(meeting < MIN_RARE_ROWS, np.nan, super().learn_values(task, windows))

    def suspended(self, task: Task, moving: Bools, near_alarm: Bools) -> Bools | None:
        left, right = pair_members(moving.shape[1])
        waiting = moving[:, left] | moving[:, right]
        return waiting | near_alarm[:, None] if task.labels else waiting

    def describe(self, alarm: Alarm) -> AlertText:
        fields = alarm.fields
        on = np.flatnonzero(alarm.alarm.any(0))
        first = on[np.argsort(-alarm.value[:, on].max(0), kind="stable")][:MAX_PAIRS_NAMED]
        changes: list[str] = []
        evidence: list[dict[str, Any]] = []
        for pair in first.tolist():
            side = int(np.argmax(alarm.value[:, pair]))
            shift = float(alarm.effect[side, pair] / max(1, alarm.windows[side, pair]))
            names = [fields[i] for i in field_pairs(len(fields))[pair]]
            changes.append(f"{' and '.join(names)} go {'less' if shift < 0 else 'more'} together")
            numbers = {"windows": int(alarm.windows[side, pair]), "since": int(alarm.since[side, pair])}
            evidence.append({"pair": names, "shift": round_significant(shift, 4), **numbers})
        period = alarm.format_windows(evidence[0]["windows"], evidence[0]["since"])
        change = f"{', '.join(changes)} than in this site's reference {period}, while each by itself is as before"
        cause = "a loose mounting, swapped wires or another way of moving"
        return AlertText(f"joint: {change}; likely {cause}", {"test": "pairs", "pairs": evidence})
