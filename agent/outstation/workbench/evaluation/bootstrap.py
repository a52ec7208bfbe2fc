"""Bayesian bootstrap over units: groups of results, or blocks of neighbours, are drawn together.

Metrics are computed from sums over units, so that all replicates come at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints
from outstation.foundation.errors import UsageError
from outstation.foundation.indices import bincount
from outstation.ml.datasets.blocks import TextColumn
from outstation.ml.performance import intervals
from outstation.ml.performance.estimates import round_or_none
from outstation.workbench.evaluation.document import IntervalEstimate

REPLICATES = 1000
# Replicates of a statistic that looks at every result, as AUC does.
_RANK_REPLICATES = 200
_MAX_UNITS = 2000
MIN_GROUPS = 10


class BootstrapUnits(msgspec.Struct, frozen=True, eq=False):
    """Unit of each result (n,), and `weights` (REPLICATES, units); `design_effect` results count as one."""

    unit_index: Ints
    weights: Float64s
    design_effect: float
    group_count: int | None
    description: str

    @property
    def total(self) -> Float64s:
        """(1 + REPLICATES,) sums of all weights."""
        return self.sums()[:, 0]

    def sums(self, values: Any = None, group: Ints | None = None, group_count: int = 1) -> Float64s:
        """Return sums (1 + REPLICATES, group_count) of `values` (n,), by default of 1; the first is unweighted."""
        unit_count = self.weights.shape[1]
        index = self.unit_index if group is None else self.unit_index * group_count + group
        each = bincount(index, values, unit_count * group_count).reshape(unit_count, group_count).astype(np.float64)
        return np.concatenate([each.sum(axis=0)[None], self.weights @ each])

    def apply(self, statistic: Callable[[Float64s], float]) -> Float64s:
        """Return a statistic of weights (n,): unweighted, then for some replicates."""
        replicates = [statistic(w[self.unit_index]) for w in self.weights[:_RANK_REPLICATES]]
        return np.array([statistic(np.ones(len(self.unit_index))), *replicates])

    def subset(self, selection: Ints) -> BootstrapUnits:
        return msgspec.structs.replace(self, unit_index=self.unit_index[selection])


def build_units(losses: Float64s, group: TextColumn | None, column: str | None, seed: int) -> BootstrapUnits:
    """Return the groups of `column`, else blocks as long as `losses` (n,) are alike. Raises UsageError."""
    n = len(losses)
    if group is not None:
        names, index = np.unique(group, return_inverse=True)
        if len(names) < 2:
            raise UsageError(f"column {column} holds {names[0]} everywhere; name a column with several groups")
        few = f"; {len(names)} groups cannot show how much groups differ" if len(names) < MIN_GROUPS else ""
        description = f"95 %, Bayesian bootstrap over the {len(names)} values of {column}{few}"
        weights = _draw_weights(min(len(names), _MAX_UNITS), seed)
        design_effect = cluster_design_effect(losses, index)
        return BootstrapUnits(index % _MAX_UNITS, weights, design_effect, len(names), description)
    dependence = intervals.estimate_dependence(losses)
    size = max(dependence.block, -(-n // _MAX_UNITS))
    blocks = f" over blocks of {size} neighbours" if size > 1 else ""
    index = np.arange(n) // size
    weights = _draw_weights(int(index[-1]) + 1, seed, dependence.spread)
    return BootstrapUnits(index, weights, dependence.design_effect, None, f"95 %, Bayesian bootstrap{blocks}")


def cluster_design_effect(values: Float64s, group: Ints) -> float:
    """Return how many results (n,) of a group count as one: 1 + (m - 1) ρ (Kish 1965, Donner 1986)."""
    sizes = bincount(group)
    sizes = sizes[sizes > 0]
    n, count = len(values), len(sizes)
    if count < 2 or n <= count:
        return float(max(1, n / max(1, count)))
    sums = bincount(group, values)[bincount(group) > 0]
    between = float((sizes * (sums / sizes - values.mean()) ** 2).sum()) / (count - 1)
    within = float((values**2).sum() - (sums**2 / sizes).sum()) / (n - count)
    usual = (n - (sizes**2).sum() / n) / (count - 1)
    total = between + (usual - 1) * within
    correlation = min(max((between - within) / total, 0.0), 1.0) if total > 0 else 0.0
    return float(1 + ((sizes**2).sum() / n - 1) * correlation)


def percentile_interval(values: Float64s) -> IntervalEstimate:
    """Return the interval of values (1 + replicates,), of which the first is the estimate."""
    value, replicates = float(values[0]), values[1:]
    known = replicates[np.isfinite(replicates)]
    if not np.isfinite(value) or 2 * len(known) < len(replicates):
        return IntervalEstimate(value=round_or_none(value))
    low, high = np.quantile(known, [0.025, 0.975])
    return IntervalEstimate(value=round_or_none(value), low=round_or_none(float(low)), high=round_or_none(float(high)))


def proportion_interval(values: Float64s, n: float, units: BootstrapUnits) -> IntervalEstimate:
    """Return the interval of a share of n results; Wilson's if all or none are so and replicates cannot differ.

    `n` is 0 for a metric without bounds.
    """
    estimate = percentile_interval(values)
    if estimate.value is None or n <= 0 or estimate.low != estimate.high:
        return estimate
    low, high = intervals.wilson(estimate.value, n / units.design_effect)
    return IntervalEstimate(value=estimate.value, low=round_or_none(low), high=round_or_none(high))


def _draw_weights(count: int, seed: int, spread: float = 1.0) -> Float64s:
    """Return weights (REPLICATES, count) with mean 1 (Rubin 1981) and variance `spread`."""
    weights = np.random.default_rng(seed).standard_exponential((REPLICATES, count))
    weights = intervals.spread_weights(weights, spread)
    return np.asarray(weights / weights.mean(axis=1, keepdims=True))
