"""Moments detector: mean and spread of each field, within the class that the model names.

A machine has modes, and their mixture changes all day. So statistics of each model window are compared with those of
the class that the model named, and only the residual is averaged over a drift window. On smartwatch recordings a gain
of 0.6 on one axis is then found in two drift windows instead of never.

For a model over windows of rows, the D = 2F statistics are each field's mean and log variance; for a model that answers
each row, they are the D = F values. Either way there are 2F tests: F of the mean, then F of the spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Bools, Float32s, Float64s, Ints, any_true
from outstation.ml.drift.detectors import season
from outstation.ml.drift.detectors.cusum import Cusum
from outstation.ml.drift.detectors.detector import (
    EARLY_DRIFT_SHARE,
    MIN_CLASS_WINDOWS,
    Alarm,
    AlertText,
    Baseline,
    ChartDetector,
    ChartWindows,
    DriftWindows,
    LearnedWindows,
    ScoreDetector,
    Scores,
    Task,
    find_rare,
    round_significant,
)
from outstation.ml.drift.detectors.season import MIN_RAMP_WINDOWS, RAMP_WINDOWS, SlowTrend, is_ramp
from outstation.ml.drift.numeric import false_alarm_budget
from outstation.ml.drift.numeric.sums import GroupMoments
from outstation.ml.kernel import comparisons
from outstation.ml.kernel import library as kernel

# Least sd of a class, as a share of the overall sd. It is more at a site, where one misnamed window in a tight class
# would outweigh all others.
MIN_SD_SHARE, MIN_SITE_SD_SHARE = 0.1, 0.15
_MAX_LOG_RATIO = 20.0
MIN_VARIANCE = 1e-4  # of residuals, in squared class sd
# Added to the variance of residuals, in squared class sd: that of a rare value is nearly nothing in many windows.
VARIANCE_PRIOR = 0.25


class ClassStatistics(msgspec.Struct, frozen=True, eq=False):
    """Statistics of each class: `mean` and `sd` (C, D), in physical units or log variance.

    `n` (C, D) counts model windows; below MIN_CLASS_WINDOWS, mean and sd are those of all classes together.
    """

    n: Ints
    mean: Float64s
    sd: Float64s


def fit_class_statistics(moments: GroupMoments, min_sd_share: float = MIN_SD_SHARE) -> ClassStatistics:
    """Fit statistics to the moments of each class (C, D)."""
    overall = moments.pooled(0)
    least = 1e-6 * (np.abs(overall.mean) + 1e-6)  # the resolution of float32 readings
    overall_sd = np.maximum(np.sqrt(overall.m2 / np.maximum(overall.n, 1)), least)
    rare = moments.n < MIN_CLASS_WINDOWS
    sd = np.maximum(np.sqrt(moments.m2 / np.maximum(moments.n, 1)), min_sd_share * overall_sd)
    return ClassStatistics(moments.n, np.where(rare, overall.mean, moments.mean), np.where(rare, overall_sd, sd))


def compute_test_values(
    moments: GroupMoments, mean: Float64s, sd: Float64s, *, windowed: bool
) -> tuple[Float64s, Float64s]:
    """Return values and effects (..., 2F) of drift windows with moments (..., C, D), against class means and sds.

    A value is a mean residual in class sd; for single rows, the spread's is the log variance of residuals
    with a prior. An effect is
    the mean shift in physical units, and half the shift in log variance: exp() of it is the ratio of spreads.
    """
    value, effect, variance = _compute_residuals(moments, mean, sd, windowed=windowed)
    if windowed:
        fields = value.shape[-1] // 2
        return value, np.concatenate([effect[..., :fields], effect[..., fields:] / 2], axis=-1)
    spread, ratio = np.log(variance + VARIANCE_PRIOR), np.log(np.maximum(variance, MIN_VARIANCE))
    return np.concatenate([value, spread], axis=-1), np.concatenate([effect, ratio / 2], axis=-1)


def compute_mean_squares(moments: GroupMoments, mean: Float64s, sd: Float64s) -> Float64s:
    """Return mean squares (..., D) of the deviations of all values from their class's mean, in class sd."""
    library = kernel.kernel()
    if library is not None and comparisons.supports(moments.n, mean):
        return comparisons.compute_mean_squares(library, moments.n, moments.mean, moments.m2, mean, sd)
    square = (moments.m2 + moments.n * (moments.mean - mean) ** 2) / sd**2
    return np.asarray(square.sum(-2) / np.maximum(moments.n.sum(-2), 1))


def _compute_residuals(
    moments: GroupMoments, mean: Float64s, sd: Float64s, *, windowed: bool
) -> tuple[Float64s, Float64s, Float64s]:
    """Return mean residuals in class sd, mean shifts, and for single rows the variances of residuals (..., D)."""
    library = kernel.kernel()
    if library is not None and comparisons.supports(moments.n, mean):
        return comparisons.compute_residuals(library, moments.n, moments.mean, moments.m2, mean, sd)
    count = np.maximum(moments.n.sum(-2), 1)
    shift = moments.n * (moments.mean - mean)
    value, effect = (shift / sd).sum(-2) / count, shift.sum(-2) / count
    if windowed:
        return value, effect, value
    square = ((moments.m2 + shift * (moments.mean - mean)) / sd**2).sum(-2) / count
    return value, effect, np.maximum(square - value**2, 0.0)


def leave_out_rare(moments: GroupMoments, rare: Bools) -> GroupMoments:
    """Return moments (..., C, D) without the `rare` classes (C, D)."""
    if not any_true(rare):
        return moments
    return GroupMoments(np.where(rare, 0, moments.n), moments.mean, np.where(rare, 0.0, moments.m2))


def find_untested(moments: GroupMoments, *, windowed: bool) -> np.ndarray:
    """Return which of the 2F tests (..., 2F) of drift windows (..., C, D) have no values."""
    empty = moments.n.sum(-2) == 0
    return empty if windowed else np.concatenate([empty, empty], axis=-1)


def leave_one_out_mean(moments: GroupMoments, pooled: GroupMoments) -> Float64s:
    """Return class means (K, C, D) without the drift window that they are compared with.

    A window judged against means that contain it looks steadier than the next, unseen one will.
    """
    n = pooled.n - moments.n
    total = moments.n * moments.mean
    np.subtract(pooled.n * pooled.mean, total, out=total)
    overall = total.sum(-2, keepdims=True) / np.maximum(n.sum(-2, keepdims=True), 1)
    total /= np.maximum(n, 1)
    np.copyto(total, overall, where=n < MIN_CLASS_WINDOWS)
    return total


class FieldHistory(msgspec.Struct, frozen=True, eq=False):
    """Scores of the last windows, which tell a ramp and a season from a step."""

    recent_z: Float32s  # (RAMP_WINDOWS, 2F) scores of means and spreads; NaN for none
    slow_trend: SlowTrend  # of means


class HistoryRun(msgspec.Struct, frozen=True, eq=False):
    before: FieldHistory
    z: Float64s  # (W, 2F)
    t: Ints  # (W,)

    @property
    def windows_before_alarm(self) -> int:
        return len(self.z)

    def state_after(self, windows: int) -> FieldHistory:
        z, fields = self.z[:windows], self.z.shape[1] // 2
        return FieldHistory(
            np.concatenate([self.before.recent_z, z.astype(np.float32)])[windows:],
            self.before.slow_trend.add(z[:, :fields], self.t[:windows]),
        )

    def open_alarm(self, cusum: Cusum, windows: int, z: Float64s) -> Cusum:
        return cusum


class MomentsDetector(ScoreDetector, ChartDetector):
    """Detector of means and spreads. Its chart raises no alarm; it remembers scores for the alert text."""

    name = "moments"
    field_sums = ("mean", "spread")
    budget = false_alarm_budget.FIELD_BUDGET
    state_type = FieldHistory

    def start(self, task: Task) -> FieldHistory:
        return FieldHistory(np.full((RAMP_WINDOWS, 2 * task.fields), np.nan, np.float32), SlowTrend())

    def run(self, state: FieldHistory, windows: ChartWindows) -> HistoryRun:
        return HistoryRun(state, windows.z[:, windows.slices[self.name]], windows.t)

    def reset_subjects(self, state: FieldHistory, task: Task, subjects: Bools) -> FieldHistory:
        reset = np.tile(subjects[: task.fields], 2)
        return replace(state, recent_z=np.where(reset, np.float32(np.nan), state.recent_z))

    def width(self, task: Task) -> int:
        return 2 * task.fields

    def min_sd(self, task: Task) -> float:
        return 0.05

    def subjects(self, task: Task) -> Sequence[int]:
        return 2 * list(range(task.fields))

    def kinds(self, task: Task) -> Sequence[slice]:
        return slice(0, task.fields), slice(task.fields, 2 * task.fields)

    def learn_values(self, task: Task, windows: LearnedWindows) -> Float64s:
        mean = leave_one_out_mean(windows.moments, windows.pooled)
        moments = leave_out_rare(windows.moments, find_rare(windows.pooled.n))
        values, _ = compute_test_values(moments, mean, windows.class_sd, windowed=task.windowed)
        values[find_untested(moments, windowed=task.windowed)] = np.nan
        return values

    def score(self, task: Task, windows: DriftWindows, baseline: Baseline) -> Scores:
        moments = leave_out_rare(windows.moments, baseline.rare)
        values, effects = compute_test_values(moments, baseline.class_mean, baseline.class_sd, windowed=task.windowed)
        fields = task.fields
        if not task.windowed:
            usual = np.exp(baseline.mean[fields:]) - VARIANCE_PRIOR
            effects[:, fields:] -= np.log(np.maximum(usual, MIN_VARIANCE)) / 2
        values[find_untested(moments, windowed=task.windowed)] = np.nan
        windows.scored[self.name] = values
        sd = baseline.mean_sd
        scale = np.concatenate([sd[:fields], sd[fields:] / 2 if task.windowed else np.full(fields, 0.5)])
        return Scores(values, effects, scale)

    def describe(self, alarm: Alarm) -> AlertText:
        change = measure_change(alarm)
        name = alarm.fields[alarm.subject]
        slow = season.guess_cause(alarm.subject, alarm.state.slow_trend, alarm.fields)
        cause = slow or guess_cause(change, alarm)
        growing = ", and goes on: a slow ramp" if change.is_ramp else ""
        period = alarm.format_windows(change.windows, change.since)
        amount = change.describe(alarm.unit, has_classes=len(alarm.labels) > 1)
        sentence = f"{name}: {amount} {period}{growing}; likely {cause}"
        return AlertText(sentence, change.to_evidence())


# A change over all rows is named, too, where it differs from that within classes by this share, or this log ratio.
MIN_OVERALL_SHARE, MIN_OVERALL_LOG_RATIO = 0.25, 0.1


class FieldChange(msgspec.Struct, frozen=True):
    """Change of one field: effects averaged over the windows since it began.

    They are those within the classes that the model names. `overall_shift` and `overall_ratio` are those of all rows of
    the newest window: a change of the sensor that makes the model name other classes shows in full there, and so does
    another mix of classes.
    """

    test: str  # mean | spread: the one with the larger sum
    windows: int
    since: int  # epoch µs
    cusum: float
    shift: float  # of the mean, physical units
    overall_shift: float
    overall_ratio: float
    shift_sd: float  # the same in sd of the site's rows
    ratio: float  # of the spread to the site's
    spread_changed: bool  # whether the spread's sum is half way to an alarm of its own
    is_ramp: bool

    def to_evidence(self) -> dict[str, Any]:
        numbers = {"cusum": self.cusum, "shift": self.shift, "shift_sd": self.shift_sd, "ratio": self.ratio}
        numbers |= {"overall_shift": self.overall_shift, "overall_ratio": self.overall_ratio}
        period = {"windows": self.windows, "since": self.since, "ramp": self.is_ramp}
        return {"test": self.test} | period | {name: round_significant(x, 4) for name, x in numbers.items()}

    @property
    def is_other_overall(self) -> bool:
        """True if all rows together changed by another amount than rows of the same class."""
        if self.test == "spread":
            return bool(abs(np.log(self.overall_ratio / self.ratio)) > MIN_OVERALL_LOG_RATIO)
        return abs(self.overall_shift - self.shift) > MIN_OVERALL_SHARE * abs(self.shift)

    def describe(self, unit: str, *, has_classes: bool) -> str:
        overall = has_classes and self.is_other_overall
        if self.test == "spread":
            digits = 3 if abs(self.ratio - 1) < 0.05 else 2
            verb = "fell" if self.ratio < 1 else "rose"
            more = f" within the model's classes (over all rows it is {self.overall_ratio:.2g})" if overall else ""
            return f"spread {verb} to {self.ratio:.{digits}g} of this site's reference{more}"
        name = f" {unit}" if unit else ""
        more = f" within the model's classes, {self.overall_shift:+.2g}{name} over all rows" if overall else ""
        return f"mean moved by {self.shift:+.2g}{name} ({abs(self.shift_sd):.2g} reference sd){more}"


def measure_change(alarm: Alarm) -> FieldChange:
    """Measure the change of a field with an alarm; the last window's effect stands in for a test without a sum."""
    fields = len(alarm.fields)
    mean, spread = (
        max((0, test), (1, test), key=lambda place: float(alarm.value[place]))
        for test in (alarm.subject, fields + alarm.subject)
    )
    on = [place for place in (mean, spread) if alarm.alarm[:, place[1]].any()] or [mean, spread]
    lead = max(on, key=lambda place: float(alarm.value[place]))
    shift, log_ratio = alarm.mean_effect(*mean), alarm.mean_effect(*spread)
    overall_shift, overall_log_ratio = _measure_overall(alarm)
    sd = float(alarm.sd[alarm.subject])
    return FieldChange(
        test="mean" if lead == mean else "spread",
        windows=int(alarm.windows[lead]),
        since=int(alarm.since[lead]),
        cusum=float(alarm.value[lead]),
        shift=shift,
        overall_shift=overall_shift,
        overall_ratio=float(np.exp(np.clip(overall_log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))),
        shift_sd=shift / sd if sd > 0 else 0.0,
        ratio=float(np.exp(log_ratio)),
        spread_changed=bool(alarm.value[spread] > EARLY_DRIFT_SHARE * alarm.limit[spread[1]]),
        is_ramp=int(alarm.windows[lead]) >= MIN_RAMP_WINDOWS
        and is_ramp(alarm.state.recent_z[:, lead[1]].astype(np.float64)),
    )


def _measure_overall(alarm: Alarm) -> tuple[float, float]:
    """Return the shift of the mean, and the log ratio of the spread, of all rows of the window to the usual ones.

    Usual is the mix of classes of the site's reference, with the means of this hour.
    """
    field, baseline = alarm.subject, alarm.baseline
    n, usual_n = alarm.moments.n[:, field], baseline.class_n[:, field]
    share, usual_share = n / max(int(n.sum()), 1), usual_n / max(int(usual_n.sum()), 1)
    mean, usual = _sum(share * alarm.moments.mean[:, field]), _sum(usual_share * alarm.usual[:, field])
    if alarm.moments.mean.shape[1] == 2 * len(alarm.fields):
        # Statistics of model windows: the log variance stands behind the mean.
        place = len(alarm.fields) + field
        change = _sum(share * alarm.moments.mean[:, place]) - _sum(usual_share * baseline.class_mean[:, place])
        return mean - usual, change / 2
    variance = _sum(
        share * (alarm.moments.m2[:, field] / np.maximum(n, 1) + (alarm.moments.mean[:, field] - mean) ** 2)
    )
    of_classes = baseline.class_sd[:, field] ** 2 + (alarm.usual[:, field] - usual) ** 2
    return mean - usual, float(np.log(max(variance, 1e-30) / max(_sum(usual_share * of_classes), 1e-30))) / 2


def _sum(parts: Float64s) -> float:
    return float(parts.sum())


def guess_cause(change: FieldChange, alarm: Alarm) -> str:
    """Guess the cause: a gain scales mean and spread alike; an offset moves the mean alone.

    Only a sensor has a gain.
    """
    if alarm.role == "category":
        return "other values are more frequent: another mix, mode or coding"
    if alarm.role == "computed":
        return "the readings that it is computed from, or how it is computed"
    if not change.spread_changed:
        return "offset or a new position"
    less = change.ratio < 1
    scale = _fit_mean_scale(alarm)
    if scale is None:
        return "gain loss or less movement" if less else "gain rise, noise or more movement"
    if abs(np.log(scale / change.ratio)) < abs(np.log(scale)):
        return "gain loss" if less else "gain rise"
    return "less movement or damping" if less else "noise or more movement"


def _fit_mean_scale(alarm: Alarm) -> float | None:
    """Return the slope of the window's class means on the usual ones, through zero; None where these are near zero."""
    field, moments = alarm.subject, alarm.moments
    n, mean, usual = moments.n[:, field], moments.mean[:, field], alarm.usual[:, field]
    weight = n / alarm.baseline.class_sd[:, field] ** 2
    if (weight * usual**2).sum() < n.sum():
        return None
    return max(0.01, float((weight * mean * usual).sum() / (weight * usual**2).sum()))
