"""Intervals of many figures at once: units are drawn together, and figures are made from sums over them."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.arrays import Floats, Ints
from agent.datasets.blocks import Texts
from agent.errors import UsageError
from agent.evaluation.document import Span
from agent.performance import intervals
from agent.performance.metrics import rounded

REPLICATES = 1000
_MOST_UNITS = 2000
FEW_GROUPS = 10


class Units(msgspec.Struct, frozen=True, eq=False):
    """`code` (n,) which unit a result is of; `weights` (REPLICATES, units); `alike` results count as one."""

    code: Ints
    weights: Floats
    alike: float
    groups: int | None
    told: str

    def sums(self, values: NDArray[np.generic]) -> Floats:
        """(1 + REPLICATES, S) sums of (n, S), or (n,), values: all results first, then each replicate."""
        columns = np.asarray(values, np.float64).reshape(len(self.code), -1)
        units = self.weights.shape[1]
        each = np.stack([np.bincount(self.code, column, units) for column in columns.T], axis=1)
        return np.concatenate([each.sum(axis=0)[None], self.weights @ each])

    def counts(self, place: Ints, size: int, where: NDArray[np.bool_] | None = None) -> Floats:
        """(1 + REPLICATES, size) how many results have each `place` (n,), of those `where` says."""
        code = self.code if where is None else self.code[where]
        place = place if where is None else place[where]
        units = self.weights.shape[1]
        each = np.bincount(code * size + place, minlength=units * size).reshape(units, size).astype(np.float64)
        return np.concatenate([each.sum(axis=0)[None], self.weights @ each])

    def pick(self, some: Ints) -> Units:
        """For a part of the results."""
        return Units(self.code[some], self.weights, self.alike, self.groups, self.told)


def units(off: Floats, group: Texts | None, column: str | None, seed: int) -> Units:
    """Groups of results where a column names them; else neighbours, as many as are alike in `off` (n,).

    Raises UsageError.
    """
    n = len(off)
    if group is not None:
        names, code = np.unique(group, return_inverse=True)
        if len(names) < 2:
            raise UsageError(f"column {column} says {names[0]} everywhere: as a group it tells nothing apart")
        alike = design_of_groups(off, code)
        few = f"; {len(names)} groups cannot show how much groups differ" if len(names) < FEW_GROUPS else ""
        told = f"95 %, Bayesian bootstrap over the {len(names)} values of {column}{few}"
        code = code % _MOST_UNITS
        return Units(code, _drawn(min(len(names), _MOST_UNITS), seed), alike, len(names), told)
    alike = intervals.design(off)
    size = max(1, min(round(2 * alike), n // 20), -(-n // _MOST_UNITS))
    told = f"95 %, Bayesian bootstrap over blocks of {size} neighbours" if size > 1 else "95 %, Bayesian bootstrap"
    code = np.arange(n) // size
    return Units(code, _drawn(int(code[-1]) + 1, seed), alike, None, told)


def design_of_groups(values: Floats, group: Ints) -> float:
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


def span(figures: Floats) -> Span:
    """Of (1 + REPLICATES,) figures: the value of all results first."""
    value, replicates = float(figures[0]), figures[1:]
    known = replicates[np.isfinite(replicates)]
    if not np.isfinite(value) or 2 * len(known) < len(replicates):
        return Span(value=rounded(value))
    low, high = np.quantile(known, [0.025, 0.975])
    return Span(value=rounded(value), low=rounded(float(low)), high=rounded(float(high)))


def share(figures: Floats, n: float, units: Units) -> Span:
    """Of a share of n results. Where all or none are so, replicates cannot differ: then Wilson's interval."""
    found = span(figures)
    if found.value is None or n <= 0 or found.low != found.high:
        return found
    low, high = intervals.wilson(found.value, n / units.alike)
    return Span(value=found.value, low=rounded(low), high=rounded(high))


def _drawn(count: int, seed: int) -> Floats:
    """(REPLICATES, count) with mean 1: how often each unit counts (Rubin 1981)."""
    weights = np.random.default_rng(seed).standard_exponential((REPLICATES, count))
    return np.asarray(weights / weights.mean(axis=1, keepdims=True))
