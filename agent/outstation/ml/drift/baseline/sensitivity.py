"""Sensitivity of a site's tests: the smallest change of each field that its CUSUM finds within WINDOWS drift windows.

A reader of "no alarm" needs to know the smallest change that would have alarmed. A site whose windows differ much among
themselves, by night and day or by unnamed modes, finds large changes only. A value that a field rests at is never
stuck.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s
from outstation.ml.drift.detectors.correlation import field_pairs
from outstation.ml.drift.detectors.cusum import Z_CLIP
from outstation.ml.drift.detectors.daily_cycle import Cycle
from outstation.ml.drift.detectors.detector import LearnedScores, Task
from outstation.ml.drift.detectors.moments import VARIANCE_PRIOR
from outstation.ml.drift.detectors.registry import CORRELATION, MOMENTS
from outstation.ml.drift.numeric.control_limits import ScoreNoise

WINDOWS, PROBABILITY = 20, 0.9
_QUANTILE = 1.2816  # of PROBABILITY, standard normal
LARGEST_SCORE = 6.0  # sd: a larger shift fills the clip of each window
WARN_SD = 1.0  # of a field's rows: a site that finds larger shifts only says so
NAMED = 3  # fields in a warning
_LOG_RATIO_LIMIT, _STEPS = 5.0, 30  # of the search for a ratio of spreads, and its halvings


class Sensitivity(msgspec.Struct, frozen=True, eq=False):
    """Smallest change of F fields that is found within WINDOWS windows in PROBABILITY of cases; 0 for none.

    A pair's correlation is hardest to tell as it becomes weaker: that change is meant.
    """

    shift: Float64s  # (F,) of the mean, physical units
    ratio: Float64s  # (F,) of the spread to the usual one, above 1
    correlation: Float64s  # (P,) of each pair of fields

    def is_valid(self, fields: int) -> bool:
        sizes = ((self.shift, fields), (self.ratio, fields), (self.correlation, len(field_pairs(fields))))
        return all(part.shape == (size,) and bool((part >= 0).all()) for part, size in sizes)

    def to_dict(self, fields: tuple[str, ...], sd: Float64s) -> dict[str, Any]:
        """Return the numbers of each field, for people; `sd` (F,) is that of its rows."""
        correlation = self._find_least_sensitive_pairs(len(fields))
        numbers = zip(fields, self.shift.tolist(), self.ratio.tolist(), sd.tolist(), correlation, strict=True)
        return {
            "windows": WINDOWS,
            "probability": PROBABILITY,
            "fields": {
                name: {
                    "shift": _round(shift),
                    "shift_sd": _round(shift / each) if each > 0 else None,
                    "spread": _round(ratio),
                    "correlation": _round(change),
                }
                for name, shift, ratio, each, change in numbers
            },
        }

    def _find_least_sensitive_pairs(self, fields: int) -> list[float]:
        """Return the change that is found in each pair of a field (F,); 0 if one of its pairs tells none."""
        pairs = field_pairs(fields)
        own = ((pairs == field).any(1) for field in range(fields))
        changes = (self.correlation[which] for which in own)
        return [float(each.max()) if each.size and each.all() else 0.0 for each in changes]

    def find_warning(self, fields: tuple[str, ...], sd: Float64s) -> list[str]:
        """Return a sentence about the fields in which only large shifts are found."""
        size = np.where(self.shift > 0, self.shift / np.maximum(sd, 1e-12), np.inf)
        blind = np.flatnonzero(size > WARN_SD)
        worst = blind[np.argsort(-size[blind], kind="stable")][:NAMED]
        if not len(worst):
            return []
        named = [
            f"{fields[i]} {f'below {self.shift[i]:.2g} ({size[i]:.2g} sd)' if self.shift[i] else 'of any size'}"
            for i in worst.tolist()
        ]
        more = f" and of {len(blind) - NAMED} more fields" if len(blind) > NAMED else ""
        return [
            f"windows differ so much that shifts of {', '.join(named)}{more} are not found within {WINDOWS} of them; "
            "name the modes (class_field), learn for longer, or use longer windows"
        ]


def measure_sensitivity(
    task: Task,
    scores: LearnedScores,
    mean: Float64s,
    sd: Float64s,
    limits: Float64s,
    cycle: Cycle,
    class_sd: Float64s,
    correlation: Float64s,
) -> Sensitivity:
    """Measure what the CUSUMs of moments and correlations find.

    `class_sd` (D,) is the usual spread within a class, `correlation` (P,) the usual Fisher's z; `sd` (T,) is infinite
    where nothing is tested.
    """
    place, fields = scores.slices[MOMENTS.name], task.fields
    score = find_smallest_score(MOMENTS.fit_noise(task, scores), limits[place], MOMENTS.slack)
    # Over a day the spread around a cycle changes; a change lasts.
    usual = np.sqrt((cycle.evaluate_spread(_HOURS)[:, place] ** 2).mean(0)) * sd[place]
    value = score * usual * np.sqrt(1 + 1 / len(scores.residuals))
    if task.windowed:
        ratio = np.exp(value[fields:] * class_sd[fields:] / 2)
    else:
        ratio = find_spread_ratio(mean[place][fields:] + scores.residuals[:, place][:, fields:], value[fields:])
    finite = np.isfinite(score)
    return Sensitivity(
        np.where(finite[:fields], value[:fields] * class_sd[:fields], 0.0),
        np.where(finite[fields:], ratio, 0.0),
        _measure_correlations(task, scores, sd, limits, cycle, correlation),
    )


def find_spread_ratio(values: Float64s, change: Float64s) -> Float64s:
    """Return by which factor (F,) the spread must grow for the mean of values (K, F) to rise by `change` (F,).

    Values are log variances of windows with a prior. Windows of little spread show least of a factor.
    """
    variances = np.maximum(np.exp(values) - VARIANCE_PRIOR, 1e-3)
    usual = np.log(variances + VARIANCE_PRIOR).mean(0)
    low, high = np.zeros(len(change)), np.full(len(change), _LOG_RATIO_LIMIT)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        enough = np.log(np.exp(2 * middle) * variances + VARIANCE_PRIOR).mean(0) - usual >= change
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.asarray(np.exp(high))


def _measure_correlations(
    task: Task, scores: LearnedScores, sd: Float64s, limits: Float64s, cycle: Cycle, usual: Float64s
) -> Float64s:
    """Return the smallest changes (P,) of correlations whose Fisher's z is `usual` (P,); 0 for none."""
    place = scores.slices[CORRELATION.name]
    score = find_smallest_score(CORRELATION.fit_noise(task, scores), limits[place], CORRELATION.slack)
    by_hour = np.sqrt((cycle.evaluate_spread(_HOURS)[:, place] ** 2).mean(0))
    change = score * by_hour * sd[place] * np.sqrt(1 + 1 / len(scores.residuals))
    tested = np.isfinite(change)
    weaker = np.abs(usual) - np.where(tested, change, 0.0)
    return np.where(tested, np.tanh(np.abs(usual)) - np.tanh(weaker), 0.0)


def find_smallest_score(noise: ScoreNoise, limits: Float64s, slack: float) -> Float64s:
    """Return by how many sd of a score (S,) windows must be off for a CUSUM to reach its limit in time; inf for never.

    The sum of WINDOWS scores varies by itself, and by the error of the learned mean.
    """
    variance = WINDOWS * noise.long_run_variance + WINDOWS**2 / noise.mean_windows
    score = slack + (limits + _QUANTILE * np.sqrt(variance)) / WINDOWS
    # The largest score of one window is clipped.
    reachable = limits < WINDOWS * (Z_CLIP - slack) * PROBABILITY
    far = score > Z_CLIP - 1
    return np.where(reachable, np.where(far, np.maximum(score, LARGEST_SCORE), score), np.inf)


_HOURS = np.arange(24, dtype=np.int64) * 3_600_000_000


def _round(value: float) -> float | None:
    return float(f"{value:.3g}") if value > 0 else None
