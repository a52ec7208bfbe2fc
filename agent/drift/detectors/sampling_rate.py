"""Sampling rate and speed of a site's signals: what learning gathers, what is usual, and which changes are faults.

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

from agent.arrays import Float32s, Float64s, Int32s, Ints
from agent.drift.detectors import class_means, cusum, daily_cycle, outliers, variogram
from agent.drift.detectors.class_means import leave_one_out_mean, pooled_mean
from agent.drift.detectors.moments import MIN_CLASS_WINDOWS
from agent.drift.detectors.variogram import Variograms
from agent.drift.numeric import false_alarm_budget
from agent.drift.numeric.sums import median

# Change of the interval: share; sd of learned windows; times the largest deviation of one.
MIN_STEP_CHANGE, STEP_CHANGE_SDS, STEP_CHANGE_FACTOR = 0.05, 6.0, 1.5
MAX_STEADY_SD = 0.1  # sd of the logarithm of a window's mean step, from which on there is no rate
REPEATED_MARGIN, REPEATED_FACTOR = 0.1, 1.5  # share of rows; times the most of a learned window
MIN_STEP_SD, MIN_SPEED_SD = 0.002, 0.01
MIN_WINDOWS = 20  # learned windows


class RateHistory(msgspec.Struct, frozen=True, eq=False):
    """Learned windows: K drift windows, and m entries, one per class that occurred in a window."""

    windows: Float64s  # (K, 2 + F) mean step in µs (NaN: not known); shares of rows repeated, of each field's missing
    t: Ints  # (K,) middle of each, epoch µs
    window: Ints = msgspec.field(default_factory=lambda: np.empty(0, np.int64))  # (m,) 0, 1, …
    label: Ints = msgspec.field(default_factory=lambda: np.empty(0, np.int64))
    n: Int32s = msgspec.field(default_factory=lambda: np.empty((0, 0), np.int32))  # (m, F) model windows with a pace
    level: Float32s = msgspec.field(default_factory=lambda: np.empty((0, 0), np.float32))
    slope: Float32s = msgspec.field(default_factory=lambda: np.empty((0, 0), np.float32))

    @classmethod
    def empty(cls) -> RateHistory:
        return cls(np.empty((0, 0)), np.empty(0, np.int64))

    def add(
        self, step_us: float, repeated: float, missing: Float64s, variogram_sums: Ints, t: tuple[int, int]
    ) -> RateHistory:
        variograms = variogram.from_sums(variogram_sums)
        classes = np.flatnonzero(variograms.n.any(1))
        numbers = np.concatenate([[step_us, repeated], missing])
        return RateHistory(
            windows=np.concatenate([self.windows.reshape(-1, len(numbers)), numbers[None]]),
            t=np.append(self.t, t[0] + (t[1] - t[0]) // 2),
            window=np.append(self.window, np.full(len(classes), len(self.t))),
            label=np.append(self.label, classes),
            n=_append(self.n, variograms.n[classes], np.int32),
            level=_append(self.level, variograms.level[classes], np.float32),
            slope=_append(self.slope, variograms.slope[classes], np.float32),
        )

    def thin(self) -> RateHistory:
        """Drop every other window."""
        remaining = self.window % 2 == 0
        entries = {name: getattr(self, name)[remaining] for name in ("label", "n", "level", "slope")}
        return replace(self, windows=self.windows[::2], t=self.t[::2], window=self.window[remaining] // 2, **entries)

    def variograms(self, classes: int) -> Variograms:
        """(K, C, F) per drift window, class and field."""
        out = np.zeros((3, len(self.t), classes, self.n.shape[1]))
        for part, entries in zip(out, (self.n, self.level, self.slope), strict=True):
            part[self.window, self.label] = entries
        return Variograms(*out)


def _append(before: np.ndarray, more: Float64s, dtype: type) -> np.ndarray:
    return (np.concatenate([before, more]) if len(before) else more).astype(dtype)


class RateBaseline(msgspec.Struct, frozen=True, eq=False):
    """Sampling rate and speed of signals that are usual at a site."""

    step_us: float  # 0: readings come irregularly
    step_off: float  # logarithm of how far a window's mean step may be off
    repeated: float  # share of rows in the learned window that had most
    missing: Float64s  # (F,) likewise
    level: Float64s  # (C, F) of classes, see `pace`; F is 0 where model windows are too short for it
    slope: Float64s  # (F,)
    weight: Float64s  # (F,)
    speed_mean: float  # logarithm, of windows
    speed_sd: float  # 0: nothing is known of it
    cycle: daily_cycle.Cycle  # of the speed

    def is_valid(self, classes: int, fields: int) -> bool:
        """Return True if it has the shapes of so many classes and fields, and its numbers are finite."""
        cycle = self.cycle
        shapes = [part.shape for part in (self.missing, self.level, self.slope, self.weight, cycle.waves, cycle.rest)]
        paced = len(self.slope)
        right = [
            (fields,),
            (classes, paced),
            (paced,),
            (paced,),
            (2 * daily_cycle.HARMONICS, 1),
            (1 + 2 * daily_cycle.HARMONICS, 1),
        ]
        numbers = [self.step_us, self.step_off, self.repeated, self.speed_mean, self.speed_sd]
        known = [np.array(numbers), self.missing, self.level, self.slope, self.weight, cycle.waves, cycle.rest]
        positive = min(self.step_us, self.step_off, self.repeated, self.speed_sd) >= 0
        return (
            shapes == right
            and paced in (0, fields)
            and positive
            and all(bool(np.isfinite(part).all()) for part in known)
        )

    def score_speeds(self, variogram_sums: Ints, t: Ints, learned: int) -> tuple[Float64s, Float64s]:
        """Return scores (W,) of the speeds of stacked windows at `t` (W,) epoch µs, and their logarithms.

        NaN if unknown. `learned` is the number of windows that the baseline was learned from.
        """
        if self.speed_sd <= 0:
            unknown = np.full(len(t), math.nan)
            return unknown, unknown
        expected = self.speed_mean + self.cycle.evaluate(t)[:, 0]
        deviations = class_means.compute_deviations(variogram.from_sums(variogram_sums).weighted_levels(), self.level)
        speeds = variogram.estimate_log_speed(deviations, self.slope, self.weight) - expected
        return cusum.standardize(speeds, np.zeros(1), np.full(1, self.speed_sd), learned), speeds


def learn_baseline(history: RateHistory, classes: int, window_rows: int, seasonality: str) -> RateBaseline | None:
    """Learn from gathered windows; None if there are too few."""
    if len(history.t) < MIN_WINDOWS:
        return None
    variograms = history.variograms(classes)
    step_us, off = _fit_step(history.windows[:, 0])
    baseline = RateBaseline(
        step_us=step_us,
        step_off=off,
        repeated=float(history.windows[:, 1].max()),
        missing=history.windows[:, 2:].max(0),
        level=pooled_mean(variograms.weighted_levels(), float(MIN_CLASS_WINDOWS)),
        slope=variogram.fit_slopes(variograms, window_rows),
        weight=np.zeros(variograms.n.shape[-1]),
        speed_mean=0.0,
        speed_sd=0.0,
        cycle=daily_cycle.Cycle.empty(1),
    )
    deviations = class_means.compute_deviations(
        variograms.weighted_levels(), leave_one_out_mean(variograms.weighted_levels(), float(MIN_CLASS_WINDOWS))
    )
    weight = variogram.compute_field_weights(deviations, baseline.slope)
    speeds = (
        variogram.estimate_log_speed(deviations, baseline.slope, weight)
        if weight.any()
        else np.full(len(deviations), np.nan)
    )
    known = ~np.isnan(speeds)
    if known.sum() < MIN_WINDOWS:
        return baseline
    fit = daily_cycle.fit(np.where(known, speeds, median(speeds[known]))[:, None], history.t, seasonality)
    mean, left = outliers.winsorize(fit.residuals, median(fit.residuals), MIN_SPEED_SD)
    return replace(
        baseline,
        weight=weight,
        speed_mean=float((fit.mean + mean)[0]),
        speed_sd=float(max(left.std(ddof=1), MIN_SPEED_SD)),
        cycle=fit.cycle,
    )


def speed_cusum_limit(windows: int, stretch_factor: float) -> float:
    """Return the CUSUM limit of the speed."""
    return (
        false_alarm_budget.cusum_limit(1, windows, false_alarm_budget.FIELD_SLACK, false_alarm_budget.SPEED_BUDGET)
        * stretch_factor
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
