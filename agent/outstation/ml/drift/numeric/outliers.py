"""Outliers among learned windows: how a test varies over them, whatever odd windows are among them."""

from __future__ import annotations

import numpy as np

from outstation.foundation.arrays import Float64s
from outstation.foundation.errors import BadBundle
from outstation.ml.drift.numeric.sums import median

OUTLIER_SDS = 6.0  # robust sd from the middle: drawn in to there, unless more windows lie far out than
MAX_ODD_SHARE = 0.05  # of windows
STEP_SDS = 4.0  # sd between the means of the first and the second half: something changed meanwhile
MIN_SD = 0.05  # class sd: smaller shifts of a field never matter, however steady a site is
# Standard errors of a step while learning, and its share of the variance, for a warning.
STEP_STANDARD_ERRORS, STEP_VARIANCE_SHARE = 10.0, 0.7


def winsorize(values: Float64s, center: Float64s, min_sd: Float64s | float) -> tuple[Float64s, Float64s]:
    """Return mean and residuals of values (K, T), with odd windows drawn in: a few spoil nothing, many are normal."""
    far = np.abs(values - center)
    reach = np.maximum(OUTLIER_SDS * np.maximum(1.4826 * median(far), min_sd), largest_usual(far))
    within = np.clip(values, center - reach, center + reach)
    mean = within.mean(0)
    return mean, within - mean


def largest_usual(values: Float64s) -> Float64s:
    """Return what all values (K, T) but MAX_ODD_SHARE of them reach at most: odd windows are few."""
    return np.asarray(np.sort(values, axis=0)[len(values) - 1 - int(MAX_ODD_SHARE * len(values))])


def calibrate(values: Float64s, fields: tuple[str, ...]) -> tuple[Float64s, Float64s]:
    """Return mean and sd of each test over drift windows (K, 2F). Raises BadBundle."""
    mean, residuals = winsorize(values, median(values), MIN_SD)
    half = len(values) // 2
    first, second = residuals[:half], residuals[half:]
    within = np.sqrt((first.var(0) + second.var(0)) / 2)
    step = np.abs(first.mean(0) - second.mean(0))
    names = [f"{name} {kind}" for kind in ("mean", "spread") for name in fields]
    stepped = [name for name, off in zip(names, step > STEP_SDS * np.maximum(within, MIN_SD), strict=True) if off]
    if stepped:
        raise BadBundle(f"no drift reference: it changed between the first and the second half ({', '.join(stepped)})")
    return mean, np.maximum(residuals.std(0, ddof=1), MIN_SD)


def detect_step_change(values: Float64s, fields: tuple[str, ...]) -> list[str]:
    """Return a warning if one step explains most of what a test did while it was learned (K, 2F)."""
    windows = len(values)
    before = np.arange(1, windows)[:, None]
    total = np.cumsum(values, axis=0)
    difference = total[:-1] / before - (total[-1] - total[:-1]) / (windows - before)
    gained = difference**2 * before * (windows - before) / windows
    noise = np.maximum(1.4826 * median(np.abs(np.diff(values, axis=0))) / np.sqrt(2), MIN_SD)
    spread = np.maximum(((values - values.mean(0)) ** 2).sum(0), 1e-12)
    best = gained.max(0)
    stepped = np.flatnonzero((best > STEP_STANDARD_ERRORS**2 * noise**2) & (best > STEP_VARIANCE_SHARE * spread))
    if not len(stepped):
        return []
    worst = int(stepped[np.argmax((best / noise**2)[stepped])])
    name = f"{fields[worst % len(fields)]} {'mean' if worst < len(fields) else 'spread'}"
    at = int(gained[:, worst].argmax()) + 2
    return [f"{name} changed from window {at} of {windows} on while it was learned; learn it again once it is steady"]
