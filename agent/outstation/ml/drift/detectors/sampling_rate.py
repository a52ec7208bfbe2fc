"""Sampling rate and speed of a site's signals: what is usual, and which changes are faults.

rate      readings come more than 5 % faster or slower, and beyond the variation of the learned windows. A stream with
          irregular readings has no rate.
repeated  more rows than in any learned window repeat the row before, in all fields

A fault counts from the second consecutive window on, so a backlog that arrives at once is none.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import AnyArray, Float64s, Ints
from outstation.ml.drift.detectors import class_means, daily_cycle, variogram
from outstation.ml.drift.detectors.class_means import leave_one_out_mean, pooled_mean
from outstation.ml.drift.detectors.detector import (
    MIN_CLASS_WINDOWS,
    ClassifiedWindows,
    Detector,
    LearnedScores,
    LearnedWindows,
    ModelWindows,
    Task,
)
from outstation.ml.drift.detectors.variogram import Variograms
from outstation.ml.drift.numeric import control_limits, false_alarm_budget, outliers
from outstation.ml.drift.numeric.sums import median

# Change of the interval: share; sd of learned windows; times the largest deviation of one.
MIN_STEP_CHANGE, STEP_CHANGE_SDS, STEP_CHANGE_FACTOR = 0.05, 6.0, 1.5
MAX_STEADY_SD = 0.1  # sd of the logarithm of a window's mean step, from which on there is no rate
REPEATED_MARGIN, REPEATED_FACTOR = 0.1, 1.5  # share of rows; times the most of a learned window
MIN_STEP_SD, MIN_SPEED_SD = 0.002, 0.01
MIN_WINDOWS = 20  # learned windows
_N, _LEVEL, _SLOPE = "sampling_rate.n", "sampling_rate.level", "sampling_rate.slope"  # (m, F) of entries


class RateBaseline(msgspec.Struct, frozen=True, eq=False):
    """Sampling rate and speed of signals that are usual at a site."""

    step_us: float  # 0: readings come irregularly
    step_off: float  # logarithm of how far a window's mean step may be off
    repeated: float  # share of rows in the learned window that had most
    level: Float64s  # (C, F) log variograms of classes; F is 0 where model windows are too short for them
    slope: Float64s  # (F,)
    weight: Float64s  # (F,)
    speed_mean: float  # logarithm, of windows
    speed_sd: float  # 0: nothing is known of it
    cycle: daily_cycle.Cycle  # of the speed
    limit: float  # of the CUSUM of the speed

    def score_speeds(self, variogram_sums: Ints, t: Ints) -> tuple[Float64s, Float64s]:
        """Return scores (W,) of the speeds of stacked windows at `t` (W,) epoch µs, and their logarithms.

        NaN if unknown.
        """
        if self.speed_sd <= 0:
            unknown = np.full(len(t), math.nan)
            return unknown, unknown
        expected = self.speed_mean + self.cycle.evaluate(t)[:, 0]
        sd = self.speed_sd * self.cycle.evaluate_spread(t)[:, 0]
        deviations = class_means.compute_deviations(variogram.from_sums(variogram_sums).weighted_levels(), self.level)
        speeds = variogram.estimate_log_speed(deviations, self.slope, self.weight) - expected
        return np.asarray(speeds / sd), speeds


class SamplingRateDetector(Detector):
    """Detector of the rate of readings and of the speed of signals: what it counts and learns."""

    name = "sampling_rate"
    baseline_type = RateBaseline

    def count_width(self, task: Task) -> int:
        return 2 * variogram.values_width(task.fields, task.window_rows)

    def measure(self, windows: ModelWindows) -> Float64s | None:
        return np.asarray(np.log(windows.variograms))

    def count(self, task: Task, windows: ClassifiedWindows) -> Ints:
        return class_means.count_measured(self, task, windows)

    def retain(self, task: Task, counts: Ints) -> dict[str, AnyArray]:
        variograms = variogram.from_sums(counts)
        return {
            _N: variograms.n.astype(np.int32),
            _LEVEL: variograms.level.astype(np.float32),
            _SLOPE: variograms.slope.astype(np.float32),
        }

    def is_valid(self, task: Task, own: RateBaseline) -> bool:
        cycle, moving = own.cycle, len(own.slope)
        arrays = [own.level, own.slope, own.weight, cycle.waves, cycle.rest, cycle.spread]
        harmonics, spread = 2 * daily_cycle.HARMONICS, 2 * daily_cycle.SPREAD_HARMONICS
        shapes = [(task.classes, moving), (moving,), (moving,), (harmonics, 1), (1 + harmonics, 1), (spread, 1)]
        numbers = np.array([own.step_us, own.step_off, own.repeated, own.speed_sd, own.limit, own.speed_mean])
        return (
            [part.shape for part in arrays] == shapes
            and moving in (0, task.fields)
            and bool((numbers[:-1] >= 0).all())
            and all(bool(np.isfinite(part).all()) for part in (numbers, *arrays))
        )

    def learn(self, task: Task, windows: LearnedWindows, scores: LearnedScores) -> RateBaseline:
        variograms = Variograms(*(windows.expand(windows.entries[name]) for name in (_N, _LEVEL, _SLOPE)))
        levels = variograms.weighted_levels()
        step_us, off = _fit_step(windows.step_us)
        baseline = RateBaseline(
            step_us=step_us,
            step_off=off,
            repeated=float(windows.repeated.max()),
            level=pooled_mean(levels, float(MIN_CLASS_WINDOWS)),
            slope=variogram.fit_slopes(variograms, task.window_rows),
            weight=np.zeros(variograms.n.shape[-1]),
            speed_mean=0.0,
            speed_sd=0.0,
            cycle=daily_cycle.Cycle.empty(1),
            limit=false_alarm_budget.MIN_CUSUM_LIMIT,
        )
        deviations = class_means.compute_deviations(levels, leave_one_out_mean(levels, float(MIN_CLASS_WINDOWS)))
        weight = variogram.compute_field_weights(deviations, baseline.slope)
        speeds = (
            variogram.estimate_log_speed(deviations, baseline.slope, weight)
            if weight.any()
            else np.full(len(deviations), np.nan)
        )
        known = ~np.isnan(speeds)
        if known.sum() < MIN_WINDOWS:
            return baseline
        filled = np.where(known, speeds, median(speeds[known]))[:, None]
        fit = daily_cycle.fit(filled, windows.t, windows.seasonality, MIN_SPEED_SD)
        mean, left = outliers.winsorize(fit.residuals, median(fit.residuals), MIN_SPEED_SD)
        sd, slack = max(float(left.std(ddof=1)), MIN_SPEED_SD), false_alarm_budget.FIELD_SLACK
        coefficients = fit.cycle.coefficients + windows.class_coefficients - 1
        noise = control_limits.fit_noise(
            left / sd, coefficients, fit.cycle.hours, scores.thinning, slack, (slice(0, 1),)
        )
        return replace(
            baseline,
            weight=weight,
            speed_mean=float((fit.mean + mean)[0]),
            # The mean was learned from this number of windows.
            speed_sd=sd * math.sqrt(1 + 1 / len(left)),
            cycle=fit.cycle,
            limit=float(control_limits.cusum_limits(noise, slack, false_alarm_budget.SPEED_BUDGET)[0]),
        )


def _fit_step(steps: Float64s) -> tuple[float, float]:
    """Return the usual interval, and the logarithm of its tolerance; 0 if there is none."""
    logs = np.log(steps[~np.isnan(steps)])
    if len(logs) < MIN_WINDOWS:
        return 0.0, 0.0
    middle = float(median(logs))
    mean, left = outliers.winsorize(logs[:, None], np.array([middle]), MIN_STEP_SD)
    sd = float(left.std(ddof=1))
    if sd > MAX_STEADY_SD:
        return 0.0, 0.0
    return math.exp(float(mean[0])), max(
        math.log1p(MIN_STEP_CHANGE), STEP_CHANGE_SDS * sd, STEP_CHANGE_FACTOR * float(np.abs(left).max())
    )


def detect_fault(step_us: float, repeated: float, baseline: RateBaseline) -> str:
    """Return "rate", "repeated" or "" for a window's mean interval and its share of repeated rows."""
    if baseline.step_us and step_us > 0 and abs(math.log(step_us / baseline.step_us)) > baseline.step_off:
        return "rate"
    if repeated > max(baseline.repeated + REPEATED_MARGIN, REPEATED_FACTOR * baseline.repeated):
        return "repeated"
    return ""
