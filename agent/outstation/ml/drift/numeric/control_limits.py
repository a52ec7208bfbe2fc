"""Control limits of CUSUMs: the sum that chance exceeds as seldom as a false-alarm budget says.

A site's reference knows means and spreads from K windows only, so some tests stand closer to their limit than they
seem to; with 40 windows most false alarms come from these few. A limit is therefore the one that gives the budgeted
false alarms on average over what K windows may have shown. A cycle is fitted from the same windows, which leaves fewer
for each of its coefficients. Scores of neighboring windows correlate, so that a sum wanders further and K windows are
worth fewer. Scores have heavier tails than normal ones, so that a sum reaches further.

Sources: Siegmund (1985), Sequential Analysis, for the windows between false alarms of a CUSUM with slack k and limit h,
and for its exponent. Kendall (1954), Note on bias in the estimation of autocorrelation, Biometrika 41.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s
from outstation.ml.drift.numeric.false_alarm_budget import MIN_CUSUM_LIMIT

MAX_LIMIT = 200.0
MAX_AUTOCORRELATION = 0.95
CHANCE_ERRORS = 1.5  # standard errors of an autocorrelation that are taken for chance
LONG_MEMORY = 0.5  # autocorrelation from which on its error is added in full
MAX_TAIL_FACTOR = 2.0
# Normal scores, beside the learned ones, that a tail is estimated from; and sd of the largest score of one window.
PRIOR_SCORES, SCORE_CLIP = 80, 4.0
_STEPS = 40  # of each search by halves
_SCORES_AT_ONCE = 32  # of which false alarm rates are computed: all of them would need megabytes
# Gauss-Hermite quadrature of 15 points for the standard normal, Abramowitz & Stegun (1964), 25.4.46: the nodes from 0
# on are zeros x of the Hermite polynomial He15, and the weights 15! / (15 He14(x))².
_HALF_NODES = (
    0.0, 0.799129068324548, 1.6067100690287297, 2.432436827009758,
    3.2890824243987664, 4.1962077112690155, 5.190093591304781, 6.363947888829839,
)  # fmt: skip
_HALF_WEIGHTS = (
    0.31825951825951826, 0.23246229360973222, 0.0894177953998444, 0.017365774492137605,
    0.0015673575035499562, 5.642146405189017e-05, 5.975419597920605e-07, 8.58964989963327e-10,
)  # fmt: skip
_NODES = np.array([*(-node for node in _HALF_NODES[:0:-1]), *_HALF_NODES])
_WEIGHTS = np.array([*_HALF_WEIGHTS[:0:-1], *_HALF_WEIGHTS])


class ScoreNoise(msgspec.Struct, frozen=True, eq=False):
    """Chance variation of S scores, as `windows` learned windows show it."""

    windows: int
    coefficients: Float64s  # (S,) numbers fitted to each mean: itself, and those of a cycle
    hours: Float64s  # (S,) numbers fitted to each spread
    autocorrelation: Float64s  # (S,) of neighboring windows
    tail: Float64s  # (S,) factor on the limit, 1 for normal scores
    kurtosis: Float64s  # (S,) 3 for normal scores; the larger, the less windows tell of the spread

    def first(self, count: int) -> ScoreNoise:
        """Return the noise of the first `count` scores."""
        parts = (
            part[:count] for part in (self.coefficients, self.hours, self.autocorrelation, self.tail, self.kurtosis)
        )
        return ScoreNoise(self.windows, *parts)

    @property
    def long_run_variance(self) -> Float64s:
        """(S,) variance of a sum of many scores, as a multiple of that of independent ones."""
        return np.asarray((1 + self.autocorrelation) / (1 - self.autocorrelation))

    @property
    def mean_windows(self) -> Float64s:
        """(S,) independent windows that would give as good a mean."""
        return np.asarray(np.maximum(self.windows / (self.coefficients * self.long_run_variance), 1.0))

    @property
    def spread_windows(self) -> Float64s:
        """(S,) independent windows that would give as good a standard deviation."""
        square = self.autocorrelation**2
        alike = (1 - square) / (1 + square) * 2 / (self.kurtosis - 1)
        return np.asarray(np.maximum((self.windows - self.coefficients) / self.hours * alike, 2.0))


def fit_noise(
    scores: Float64s, coefficients: Float64s, hours: Float64s, thinning: int, slack: float, kinds: Sequence[slice]
) -> ScoreNoise:
    """Fit the noise to standardized scores (K, S) of learned windows in their order, one of `thinning` windows each.

    `coefficients` and `hours` (S,) numbers were fitted to each mean and spread. Scores of one of the `kinds` have about
    the same memory and tails.
    """
    autocorrelation, tail = np.zeros(scores.shape[1]), np.ones(scores.shape[1])
    for kind in kinds:
        part = scores[:, kind]
        autocorrelation[kind] = fit_autocorrelation(part, coefficients[kind]) ** (1 / thinning)
        tail[kind] = fit_tail(part, slack)
    fourth = (scores**4).sum(0) / np.maximum((scores**2).mean(0) ** 2, 1e-12)
    kurtosis = np.maximum((fourth + 3 * PRIOR_SCORES) / (len(scores) + PRIOR_SCORES), 3.0)
    return ScoreNoise(len(scores), coefficients, hours, autocorrelation, tail, kurtosis)


def fit_autocorrelation(scores: Float64s, coefficients: Float64s) -> Float64s:
    """Return the lag-1 autocorrelation (S,) of scores (K, S), drawn together as far as chance explains their spread.

    Errs to the long side where there is a memory.
    """
    windows, count = scores.shape
    if not count or windows < 4:
        return np.zeros(count)
    deviations = scores - scores.mean(0)
    square = (deviations**2).sum(0)
    lagged = (deviations[1:] * deviations[:-1]).sum(0) / np.maximum(square, 1e-12)
    # Coefficients fitted to the windows make neighbors less alike.
    each = (lagged + coefficients / windows) / (1 - np.minimum(3 * coefficients / windows, 0.5))
    together = float(each.mean())
    spread = float(((each - together) ** 2).sum()) / max(count - 1, 1)
    chance = (1 + 2 * math.sqrt(2 / max(count - 1, 1))) / windows
    own = max(0.0, 1 - chance / max(spread, 1e-12)) if count > 1 else 0.0
    known = together + own * (each - together)
    # A memory that chance explains is none; a longer one is taken for somewhat longer, as few windows tell its length.
    several = own + (1 - own) / math.sqrt(count)
    doubt = np.sqrt(np.maximum(1 - known**2, 0.0) / windows)
    margin = np.clip(known / LONG_MEMORY, 0.0, 1.0) ** 2
    error = doubt * (margin - (1 - margin) * CHANCE_ERRORS * several)
    return np.asarray(np.clip(known + error, 0.0, MAX_AUTOCORRELATION))


def fit_tail(scores: Float64s, slack: float) -> Float64s:
    """Return the factor (S,) on limits for the tails of scores (K, S): 2 slack over the exponent of their sums.

    The exponent is that t with mean exp(t (score - slack)) = 1; it is 2 slack for normal scores. Each side of each
    score, with those of all scores and some normal ones, gives one; the lower one counts.
    """
    windows, count = scores.shape
    if not count:
        return np.ones(0)
    sided = np.clip(np.stack([scores, -scores]), -SCORE_CLIP, SCORE_CLIP)
    low, high = np.full((2, count), 2 * slack / MAX_TAIL_FACTOR), np.full((2, count), 2 * slack)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        own = np.exp(middle[:, None] * sided).sum(1)
        normal = np.exp(np.minimum(middle, 2 * slack) ** 2 / 2)
        mean = (own + PRIOR_SCORES * normal) / (windows + PRIOR_SCORES)
        beyond = np.log(mean) > middle * slack
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return np.asarray(2 * slack / low.min(0))


def cusum_limits(noise: ScoreNoise, slack: float, budget: float, min_limit: float = MIN_CUSUM_LIMIT) -> Float64s:
    """Return the limit (S,) of two-sided CUSUMs that together raise `budget` false alarms per window."""
    count = len(noise.tail)
    low, high = np.full(count, min_limit), np.full(count, MAX_LIMIT)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        often = 2 * count * false_alarm_rates(middle, slack, noise) > budget
        low, high = np.where(often, middle, low), np.where(often, high, middle)
    return np.minimum(high * noise.tail, MAX_LIMIT).round(2)


def false_alarm_rates(limit: Float64s, slack: float, noise: ScoreNoise) -> Float64s:
    """Return false alarms (S,) per window of one-sided CUSUMs, over the errors of the learned means and spreads."""
    parts = [slice(at, at + _SCORES_AT_ONCE) for at in range(0, len(limit), _SCORES_AT_ONCE)]
    mean, spread, variance = noise.mean_windows, noise.spread_windows, noise.long_run_variance
    rates = [_average_rates(limit[part], slack, mean[part], spread[part], variance[part]) for part in parts]
    return np.concatenate(rates) if rates else np.zeros(0)


def _average_rates(
    limit: Float64s, slack: float, mean_windows: Float64s, spread_windows: Float64s, long_run_variance: Float64s
) -> Float64s:
    shift = _NODES / np.sqrt(mean_windows)[:, None]
    scale = np.exp(_NODES / np.sqrt(2 * np.maximum(1, spread_windows - 1))[:, None])
    wander = np.sqrt(long_run_variance)[:, None, None]
    drift = (slack * scale[:, :, None] - shift[:, None, :]) / wander
    rates = _siegmund(drift, (limit[:, None] * scale)[:, :, None] / wander)
    return np.asarray(np.einsum("i,sij,j->s", _WEIGHTS, rates, _WEIGHTS))


def _siegmund(drift: Float64s, limit: Float64s) -> Float64s:
    """Return one over the windows to a false alarm, where each adds -`drift` on average and 1 sd of chance."""
    reach = limit + 1.166
    # Towards none at all it becomes 1 / reach².
    drift = np.where(np.abs(drift) < 1e-6, 1e-6, drift)
    exponent = 2 * drift * reach
    return np.asarray(2 * drift**2 / (np.exp(np.minimum(exponent, 600.0)) - exponent - 1))
