"""Daily and weekly cycles of a site's statistics, so that no night and no weekend alarms.

Harmonics of a day are fitted to each test's learned values by least squares, and other ones to days of rest: the one or
two consecutive days, anywhere in the week and in any time zone, that differ most from the others. A cycle is kept only
if it explains a good part of the values; days of rest only if each learned week agrees. Days differ more from each
other than nights do, so the spread around the mean has a cycle, too: a gamma regression of the squared residuals.

Source: McCullagh & Nelder (1989), Generalized Linear Models, chapter 8, for the spread.
"""

from __future__ import annotations

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Bools, Float64s, Ints
from outstation.foundation.indices import bincount
from outstation.ml.drift.numeric import matrices
from outstation.ml.drift.numeric.matrices import multiply
from outstation.ml.drift.numeric.sums import median

DAY_US = 86_400_000_000
HOUR_US = DAY_US // 24
WEEK_US = 7 * DAY_US
HARMONICS = 3  # of a day, half a day and a third
MIN_DAYS, MIN_WEEKS = 3, 2  # learned, before a cycle is fitted by default
MIN_HOURS = 12  # of the day with windows
MIN_EXPLAINED_SHARE = 0.2  # of the variance, beyond what as many harmonics explain by chance
OUTLIER_SDS = 6.0  # robust sd from the fit
REST_DAYS = (2, 1)
WAVE_WEIGHT, SPREAD_WEIGHT = 0.75, 0.5  # of a wave's error among those of the mean, and of the spread
SPREAD_HARMONICS = 2
MIN_SPREAD_GAIN = 10.0  # of the log likelihood: chance gains more in one of 2000 tests
MAX_LOG_SPREAD = 2.5  # of an hour's spread to that of the day, at most: a factor of 12
SPREAD_ROUNDS = 8
WINDOWS_PER_COEFFICIENT = 8  # windows per fitted number
MIN_WEEK_AGREEMENT = 0.5  # of the overall deviation, which each week must show


class Cycle(msgspec.Struct, frozen=True, eq=False):
    """Cycle of T tests: what to add to their means. Zeros where there is none."""

    waves: Float64s  # (2W, T) of a day
    rest: Float64s  # (1 + 2W, T) a constant and waves, on days of rest
    rest_begins: int  # µs after Thursday 00:00 UTC, when an epoch week begins
    rest_lasts: int  # µs; 0: there are none
    spread: Float64s  # (2 SPREAD_HARMONICS, T) waves of the logarithm of the standard deviation

    @classmethod
    def empty(cls, tests: int) -> Cycle:
        waves, rest, spread = (np.zeros((n, tests)) for n in (2 * HARMONICS, 1 + 2 * HARMONICS, 2 * SPREAD_HARMONICS))
        return cls(waves, rest, 0, 0, spread)

    def is_nonzero(self) -> bool:
        return bool(self.waves.any() or self.rest.any() or self.spread.any())

    @property
    def coefficients(self) -> Float64s:
        """(T,) numbers fitted to the mean of each test. Errors of waves change their sign within a day."""
        return np.asarray(1.0 + WAVE_WEIGHT * ((self.waves != 0).sum(0) + (self.rest != 0).sum(0)))

    @property
    def hours(self) -> Float64s:
        """(T,) numbers fitted to the spread of each test."""
        return np.asarray(1.0 + SPREAD_WEIGHT * (self.spread != 0).sum(0))

    @property
    def has_rest_days(self) -> bool:
        return bool(self.rest_lasts and self.rest.any())

    def evaluate(self, t: Ints) -> Float64s:
        """(n, T) at times (n,) epoch µs."""
        values = multiply(compute_harmonics(t), self.waves)
        if self.has_rest_days:
            values = values + _is_rest_day(t, self.rest_begins, self.rest_lasts)[:, None] * (
                multiply(_add_intercept(compute_harmonics(t)), self.rest)
            )
        return np.asarray(values)

    def evaluate_spread(self, t: Ints) -> Float64s:
        """Return factors (n, T) on the standard deviations at times (n,) epoch µs."""
        waves = multiply(compute_harmonics(t, SPREAD_HARMONICS), self.spread)
        return np.exp(np.clip(waves, -MAX_LOG_SPREAD, MAX_LOG_SPREAD))


class CycleFit(msgspec.Struct, frozen=True, eq=False):
    """Fit to values (K, T): `mean` (T,), the `cycle` around it, and `residuals` (K, T)."""

    mean: Float64s
    cycle: Cycle
    residuals: Float64s

    @property
    def waves(self) -> Float64s:
        return self.cycle.waves


def can_fit_daily(t: Ints, seasonality: str) -> bool:
    """Return True if windows at `t` (K,) cover enough of the day to fit a daily cycle."""
    if seasonality == "none" or len(t) < 2:
        return False
    days = (int(t.max()) - int(t.min())) / DAY_US
    # Not by np.unique, which imports a megabyte of numpy.ma.
    seen = int(np.count_nonzero(count_hours(t)))
    # The last window of a day begins one window before its end.
    return seen >= MIN_HOURS and days >= (0.9 if seasonality in ("hour", "week") else MIN_DAYS - 0.1)


def can_fit_weekly(t: Ints, seasonality: str) -> bool:
    """Return True if windows at `t` (K,) can show days of rest, or the user asks for them and each weekday was seen."""
    if seasonality not in ("auto", "week") or not can_fit_daily(t, seasonality):
        return False
    days = (int(t.max()) - int(t.min())) / DAY_US
    return len(t) >= WINDOWS_PER_COEFFICIENT * 7 and days >= (7 if seasonality == "week" else 7 * MIN_WEEKS) - 0.1


def fit(values: Float64s, t: Ints, seasonality: str = "auto", min_sd: Float64s | float = 0.05) -> CycleFit:
    """Fit cycles to tests' values (K, T) of windows at `t` (K,) epoch µs; `min_sd` (T,) is the least spread.

    Residuals are divided by the factor of their hour on the spread.
    """
    mean, none = values.mean(0), Cycle.empty(values.shape[1])
    plain = CycleFit(mean, none, values - mean)
    if not can_fit_daily(t, seasonality):
        return plain
    best_fit, left = _fit_least_squares(_add_intercept(compute_harmonics(t)), values)
    by_hour = CycleFit(best_fit[0], replace(none, waves=best_fit[1:]), left)
    best = _select_better_fit(by_hour, plain)
    if can_fit_weekly(t, seasonality):
        best = _select_better_fit(_fit_weekly(values, t), best)
    cycle = replace(best.cycle, spread=_fit_spread(best.residuals, t, min_sd))
    return CycleFit(best.mean, cycle, best.residuals / cycle.evaluate_spread(t))


def _fit_spread(residuals: Float64s, t: Ints, min_sd: Float64s | float) -> Float64s:
    """Fit waves (2 SPREAD_HARMONICS, T) to the logarithm of the spread; zeros where they gain too little."""
    middle = median(residuals)
    square = (residuals - middle) ** 2 + np.square(min_sd)
    square = np.minimum(square, OUTLIER_SDS**2 * np.maximum(square.mean(0), 1e-12))
    design = _add_intercept(compute_harmonics(t, SPREAD_HARMONICS))
    inverse = matrices.invert(design)
    plain = np.log(square.mean(0))
    waves = multiply(inverse, np.log(square))
    for _ in range(SPREAD_ROUNDS):
        level = np.clip(multiply(design, waves), plain - 2 * MAX_LOG_SPREAD, plain + 2 * MAX_LOG_SPREAD)
        waves = multiply(inverse, level + np.clip(square / np.exp(level) - 1, -1, 3))
    level = multiply(design, waves)
    gain = (plain + 1 - level - square * np.exp(-level)).sum(0) / 2
    return np.where(gain > MIN_SPREAD_GAIN, waves[1:] / 2, 0.0)


def _fit_weekly(values: Float64s, t: Ints) -> CycleFit:
    """Fit the days of rest that explain most of all tests together; none for a test on which the weeks disagree."""
    begins, lasts = _find_rest_days(values, t)
    resting = _is_rest_day(t, begins, lasts)
    by_hour = _add_intercept(compute_harmonics(t))
    # Few windows of rest give a constant, but no harmonics.
    width = by_hour.shape[1] if resting.sum() >= WINDOWS_PER_COEFFICIENT * by_hour.shape[1] else 1
    design = np.concatenate([by_hour, resting[:, None] * by_hour[:, :width]], axis=1)
    coefficients, left = _fit_least_squares(design, values)
    rest = np.zeros((by_hour.shape[1], values.shape[1]))
    rest[:width] = coefficients[by_hour.shape[1] :]
    agreeing = _weeks_agree(values, t, resting, begins)
    left = np.where(agreeing, left, np.inf)
    none = Cycle.empty(values.shape[1])
    cycle = replace(none, waves=coefficients[1 : by_hour.shape[1]], rest=rest, rest_begins=begins, rest_lasts=lasts)
    return CycleFit(coefficients[0], cycle, left)


def _find_rest_days(values: Float64s, t: Ints) -> tuple[int, int]:
    """Return when in the week they begin and how long they last, µs."""
    scale = np.maximum(values.std(0), 1e-12)
    deviations = (values - values.mean(0)) / scale
    best, rest = -1.0, (0, 0)
    for days in REST_DAYS:
        for begins in range(0, WEEK_US, HOUR_US):
            resting = _is_rest_day(t, begins, days * DAY_US)
            n = int(resting.sum())
            if min(n, len(t) - n) < WINDOWS_PER_COEFFICIENT:
                continue
            explained = float((deviations[resting].mean(0) ** 2).sum()) * n * len(t) / (len(t) - n)
            # A further day must be one of rest, and not only dilute the other.
            if explained > best * (1.0 if days == REST_DAYS[0] else 1.1):
                best, rest = explained, (begins, days * DAY_US)
    return rest


def _weeks_agree(values: Float64s, t: Ints, resting: Bools, begins: int) -> Bools:
    """(T,) True if each week's days of rest deviate to the same side, by a good part of the overall deviation."""
    week = (t - begins) // WEEK_US
    usual = values[~resting].mean(0) if (~resting).any() else values.mean(0)
    all_weeks = values[resting].mean(0) - usual
    agreed = np.ones(values.shape[1], np.bool_)
    for number in np.unique(week[resting]):
        inside = resting & (week == number)
        if inside.sum() >= WINDOWS_PER_COEFFICIENT // 2:
            agreed &= (values[inside].mean(0) - usual) * np.sign(all_weeks) > MIN_WEEK_AGREEMENT * np.abs(all_weeks)
    return agreed


def _select_better_fit(new: CycleFit, old: CycleFit) -> CycleFit:
    """Choose the new fit test by test, where it explains enough of what the old one leaves."""
    spread = np.maximum((old.residuals**2).mean(0), 1e-24)
    chosen = 1 - (new.residuals**2).mean(0) / spread > MIN_EXPLAINED_SHARE
    cycle = Cycle(
        np.where(chosen, new.cycle.waves, old.cycle.waves),
        np.where(chosen, new.cycle.rest, old.cycle.rest),
        *((new if chosen.any() else old).cycle.rest_begins, (new if chosen.any() else old).cycle.rest_lasts),
        old.cycle.spread,
    )
    return CycleFit(np.where(chosen, new.mean, old.mean), cycle, np.where(chosen, new.residuals, old.residuals))


def _fit_least_squares(design: Float64s, values: Float64s) -> tuple[Float64s, Float64s]:
    """Return coefficients (n, T), and each window's residual from a fit without it (K, T)."""
    middle = median(values)
    reach = OUTLIER_SDS * 1.4826 * median(np.abs(values - middle)) + 1e-12
    clipped = np.clip(values, middle - reach, middle + reach)
    inverse = matrices.invert(design)
    coefficients = multiply(inverse, clipped)
    leverage = (design * inverse.T).sum(1)
    return coefficients, (values - multiply(design, coefficients)) / np.maximum(1 - leverage, 0.1)[:, None]


def _is_rest_day(t: Ints, begins: int, lasts: int) -> Bools:
    return np.asarray((np.asarray(t) - begins) % WEEK_US < lasts)


def _add_intercept(columns: Float64s) -> Float64s:
    return np.concatenate([np.ones((len(columns), 1)), columns], axis=1)


def compute_harmonics(t: Ints, harmonics: int = HARMONICS) -> Float64s:
    """(n, 2 `harmonics`) at times (n,) epoch µs."""
    phase = 2 * np.pi * (np.asarray(t)[:, None] % DAY_US) / DAY_US * np.arange(1.0, harmonics + 1)
    return np.concatenate([np.cos(phase), np.sin(phase)], axis=1)


def count_hours(t: Ints) -> Ints:
    """(24,) windows in each hour of the day, UTC."""
    return bincount(np.asarray(t) // HOUR_US % 24, minlength=24)
