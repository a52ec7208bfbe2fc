"""False-alarm budget: how many false alarms each kind of test may raise, and the limits that follow.

A site's reference knows its mean and spread from K windows only, so some tests stand closer to their limit than they
seem to; with 40 windows most false alarms come from these few. The limit h of a CUSUM is therefore the one that gives
the budgeted false alarms on average over what K windows may have shown, however many tests there are.

Source: Siegmund (1985), Sequential Analysis, for the windows between false alarms of a CUSUM with slack k and limit h.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np

from agent.arrays import Float64s

# False alarms per window, of all tests of a kind together.
FIELD_BUDGET, PAIR_BUDGET, SCORE_BUDGET, CLASS_SHARE_BUDGET = 1.5e-3, 3e-4, 3e-4, 3e-4
CLASS_SHARE_MEWMA_BUDGET = 3e-4
# For each field up to so many: the more of them, the more their sums gain on each by itself.
FIELD_MEWMA_BUDGET, MAX_MEWMA_FIELDS = 4e-4, 15
PSI_BUDGET, SPEED_BUDGET = 3e-4, 3e-4
MISSING_BUDGET = 3e-4
# Slack: half the shift that should be found fast, in sd of the window's statistic. Fields seldom stop moving together
# by halves, and there are many pairs.
FIELD_SLACK, PAIR_SLACK = 1.0, 2.0
# Limits never go below these: real windows are a little more alike than a reference can tell.
MIN_CUSUM_LIMIT, MIN_PAIR_LIMIT = 5.0, 3.5
MIN_BERNOULLI_LIMIT = 11.0  # four values in a row where hardly any was missing: fewer are a hiccup
MAX_STRETCH_CORRELATION, MAX_AUTOCORRELATION = 0.5, 0.95  # of what limits are stretched by; of what is believed at all


def bernoulli_limit(share: Float64s, rows: float, fields: int) -> Float64s:
    """Return the limits (F,) of Bernoulli CUSUMs, in log likelihood, in windows of so many `rows`.

    A sum leaves zero with a value that counts, which is a `share` (F,) of rows, and reaches h by chance in fewer than
    exp(-h) of such starts.
    """
    return np.maximum(np.log(share * rows * fields / MISSING_BUDGET), MIN_BERNOULLI_LIMIT)


@lru_cache(maxsize=256)
def cusum_limit(tests: int, windows: int, slack: float, budget: float, min_limit: float = MIN_CUSUM_LIMIT) -> float:
    """Return the limit of each of so many two-sided CUSUMs, calibrated on `windows` drift windows."""
    if not tests:
        return min_limit
    low, high = min_limit, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        if 2 * tests * _false_alarm_rate(middle, slack, windows) > budget:
            low = middle
        else:
            high = middle
    return round(high, 2)


def mewma_budget(fields: int) -> float:
    """Return false alarms per window of a MEWMA chart over so many fields."""
    return FIELD_MEWMA_BUDGET * min(fields, MAX_MEWMA_FIELDS)


def autocorrelation(values: Float64s) -> float:
    """Return the lag-1 autocorrelation of tests over K learned windows (K, T), beyond what chance explains."""
    if not values.size:
        return 0.0
    deviations = values - np.nanmean(values, axis=0)
    known = np.nan_to_num(deviations)
    lagged = (known[1:] * known[:-1]).sum(0) / np.maximum((known**2).sum(0), 1e-12)
    r = float(lagged.mean()) + 1 / len(values) - 1 / math.sqrt(values.size)
    return min(max(r, 0.0), MAX_AUTOCORRELATION)


def stretch_factor(r: float) -> float:
    """Return the factor on limits for neighboring windows that correlate by `r`: a CUSUM wanders that much further."""
    r = min(r, MAX_STRETCH_CORRELATION)
    return (1 + r) / (1 - r)


def effective_sample_size(windows: int, r: float) -> int:
    """Return how many independent windows give as good a mean as these."""
    return max(2, int(windows * (1 - r) / (1 + r)))


def exceedance_level(subjects: int, budget: float = PSI_BUDGET) -> float:
    """Return the share of windows in which one subject may exceed its PSI limit: two of three do so by chance."""
    return math.sqrt(budget / (3 * max(1, subjects)))


def _false_alarm_rate(limit: float, slack: float, windows: int) -> float:
    """Return false alarms per window of a one-sided CUSUM, over the errors of a mean and sd from `windows` windows."""
    nodes, share = _normal_quadrature()
    shift = nodes / math.sqrt(windows)
    scale = np.exp(nodes / math.sqrt(2 * max(1, windows - 1)))
    return float(share @ _siegmund(slack * scale - shift[:, None], limit * scale) @ share)


@cache
def _normal_quadrature() -> tuple[Float64s, Float64s]:
    """Return 15 nodes of the standard normal, and their weights.

    Source: Golub & Welsch (1969), Calculation of Gauss Quadrature Rules, Mathematics of Computation 23.
    """
    off_diagonal = np.sqrt(np.arange(1.0, 15.0))
    nodes, vectors = np.linalg.eigh(np.diag(off_diagonal, -1))
    return nodes, vectors[0] ** 2


def _siegmund(drift: Float64s, limit: Float64s) -> Float64s:
    """Return one over the windows to a false alarm, where each adds -`drift` on average and 1 sd of chance."""
    reach = limit + 1.166
    # Towards none at all it becomes 1 / reach².
    drift = np.where(np.abs(drift) < 1e-6, 1e-6, drift)
    exponent = 2 * drift * reach
    return np.asarray(2 * drift**2 / (np.exp(np.minimum(exponent, 600.0)) - exponent - 1))
