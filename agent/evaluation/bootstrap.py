"""Intervals of many figures at once: units are drawn together, and figures are made from sums over them."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.arrays import Float64s, Ints
from agent.datasets.blocks import TextColumn
from agent.errors import UsageError
from agent.evaluation.document import IntervalEstimate
from agent.performance import intervals
from agent.performance.metrics import round_or_none

REPLICATES = 1000
_MAX_UNITS = 2000
MIN_GROUPS = 10


class BootstrapUnits(msgspec.Struct, frozen=True, eq=False):
    """`code` (n,) which unit a result is of; `weights` (REPLICATES, units); `alike` results count as one."""

    unit_index: Ints
    weights: Float64s
    design_effect: float
    group_count: int | None
    description: str

    def weighted_sums(self, values: NDArray[np.generic]) -> Float64s:
        """(1 + REPLICATES, S) sums of (n, S), or (n,), values: all results first, then each replicate."""
        columns = np.asarray(values, np.float64).reshape(len(self.unit_index), -1)
        units = self.weights.shape[1]
        each = np.stack([np.bincount(self.unit_index, column, units) for column in columns.T], axis=1)
        return np.concatenate([each.sum(axis=0)[None], self.weights @ each])

    def weighted_counts(self, category: Ints, category_count: int, mask: NDArray[np.bool_] | None = None) -> Float64s:
        """(1 + REPLICATES, size) how many results have each `place` (n,), of those `where` says."""
        code = self.unit_index if mask is None else self.unit_index[mask]
        category = category if mask is None else category[mask]
        units = self.weights.shape[1]
        each = (
            np.bincount(code * category_count + category, minlength=units * category_count)
            .reshape(units, category_count)
            .astype(np.float64)
        )
        return np.concatenate([each.sum(axis=0)[None], self.weights @ each])

    def subset(self, selection: Ints) -> BootstrapUnits:
        """For a part of the results."""
        return BootstrapUnits(
            self.unit_index[selection], self.weights, self.design_effect, self.group_count, self.description
        )


def build_units(losses: Float64s, group: TextColumn | None, column: str | None, seed: int) -> BootstrapUnits:
    """Groups of results where a column names them; else neighbours, as many as are alike in `off` (n,).

    Raises UsageError.
    """
    n = len(losses)
    if group is not None:
        names, code = np.unique(group, return_inverse=True)
        if len(names) < 2:
            raise UsageError(f"column {column} says {names[0]} everywhere: as a group it tells nothing apart")
        alike = cluster_design_effect(losses, code)
        few = f"; {len(names)} groups cannot show how much groups differ" if len(names) < MIN_GROUPS else ""
        told = f"95 %, Bayesian bootstrap over the {len(names)} values of {column}{few}"
        code = code % _MAX_UNITS
        return BootstrapUnits(code, _bootstrap_weights(min(len(names), _MAX_UNITS), seed), alike, len(names), told)
    alike = intervals.estimate_design_effect(losses)
    size = max(1, min(round(2 * alike), n // 20), -(-n // _MAX_UNITS))
    told = f"95 %, Bayesian bootstrap over blocks of {size} neighbours" if size > 1 else "95 %, Bayesian bootstrap"
    code = np.arange(n) // size
    return BootstrapUnits(code, _bootstrap_weights(int(code[-1]) + 1, seed), alike, None, told)


def cluster_design_effect(values: Float64s, group: Ints) -> float:
    """How many results count as one, where (n,) results of one `group` are alike: 1 + (m - 1) ρ (Kish 1965).

    ρ is the intraclass correlation, from the variances within and between groups (Donner 1986).
    """
    sizes = np.bincount(group)
    sizes = sizes[sizes > 0]
    n, count = len(values), len(sizes)
    if count < 2 or n <= count:
        return float(max(1, n / max(1, count)))
    sums = np.bincount(group, values)[np.bincount(group) > 0]
    between = float((sizes * (sums / sizes - values.mean()) ** 2).sum()) / (count - 1)
    within = float((values**2).sum() - (sums**2 / sizes).sum()) / (n - count)
    usual = (n - (sizes**2).sum() / n) / (count - 1)
    total = between + (usual - 1) * within
    alike = min(max((between - within) / total, 0.0), 1.0) if total > 0 else 0.0
    return float(1 + ((sizes**2).sum() / n - 1) * alike)


def percentile_interval(replicated: Float64s) -> IntervalEstimate:
    """Of (1 + REPLICATES,) figures: the value of all results first."""
    value, replicates = float(replicated[0]), replicated[1:]
    known = replicates[np.isfinite(replicates)]
    if not np.isfinite(value) or 2 * len(known) < len(replicates):
        return IntervalEstimate(value=round_or_none(value))
    low, high = np.quantile(known, [0.025, 0.975])
    return IntervalEstimate(value=round_or_none(value), low=round_or_none(float(low)), high=round_or_none(float(high)))


def proportion_interval(replicated: Float64s, n: float, units: BootstrapUnits) -> IntervalEstimate:
    """Of a share of n results. Where all or none are so, replicates cannot differ: then Wilson's interval."""
    found = percentile_interval(replicated)
    if found.value is None or n <= 0 or found.low != found.high:
        return found
    low, high = intervals.wilson(found.value, n / units.design_effect)
    return IntervalEstimate(value=found.value, low=round_or_none(low), high=round_or_none(high))


def _bootstrap_weights(count: int, seed: int) -> Float64s:
    """(REPLICATES, count) with mean 1: how often each unit counts (Rubin 1981)."""
    weights = np.random.default_rng(seed).standard_exponential((REPLICATES, count))
    return np.asarray(weights / weights.mean(axis=1, keepdims=True))
