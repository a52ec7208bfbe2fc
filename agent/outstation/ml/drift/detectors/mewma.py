"""MEWMA chart: many small shifts that add up, by exponentially weighted means of scores and the sum of their squares.

A field that shifts by half a window's sd is found late by its own CUSUM; four of them together are found soon. Scores
correlate, so the limit is a quantile of a weighted sum of chi-squares, and lies above what the learned windows reached.

Sources: Lowry, Woodall, Champ & Rigdon (1992), A multivariate exponentially weighted moving average control chart,
Technometrics 34. Buckley & Eagleson (1988), An approximation to the distribution of quadratic forms in normal random
variables, Australian Journal of Statistics 30.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
from msgspec.structs import astuple

from outstation.foundation.arrays import Bools, Float64s, Ints, any_true
from outstation.ml.drift.detectors.cusum import Cusum
from outstation.ml.drift.detectors.detector import (
    NEAR_LIMIT_SHARE,
    Alarm,
    AlertText,
    ChartDetector,
    ChartWindows,
    LearnedScores,
    LearnedWindows,
    ScoreDetector,
    Task,
)
from outstation.ml.drift.detectors.psi import gamma_quantile
from outstation.ml.drift.numeric import matrices
from outstation.ml.drift.numeric.control_limits import ScoreNoise
from outstation.ml.drift.numeric.sums import sum_sequentially
from outstation.ml.kernel import library as kernel
from outstation.ml.kernel import sequential_tests
from outstation.ml.kernel.sequential_tests import Periods

WEIGHT = 0.3  # of the newest window
SLACK = 0.2  # sd that a mean may be off for long: K windows give no better estimate
CLIP = 2.5  # largest score of one window: an odd window is no shift
UNREACHABLE_LIMIT = 1e9  # without learned windows
WINDOWS_PER_ALARM = 2.5  # beyond the limit, per false alarm: one comes seldom alone


class Mewma(msgspec.Struct, frozen=True, eq=False):
    """Weighted `mean` of S scores, and the period since each last changed its sign.

    That is the best estimate of when a change began: its number of `windows`, the sum of their effects, and
    `since` (epoch µs).

    Source: Nishina (1992), A comparison of control charts from the viewpoint of change-point estimation, Quality and
    Reliability Engineering International 8.
    """

    mean: Float64s
    windows: Ints
    effect: Float64s
    since: Ints

    @classmethod
    def zeros(cls, scores: int) -> Mewma:
        whole = np.zeros(scores, np.int64)
        return cls(np.zeros(scores), whole, np.zeros(scores), whole)

    def update(self, z: Float64s, effect: Float64s, t: int) -> Mewma:
        """Add a window that began at `t`, with scores `z` (S,), NaN where there was nothing to test."""
        return self.run_windows(z[None], effect[None], np.array([t])).state_after(1)

    def run_windows(self, z: Float64s, effects: Float64s, t: Ints) -> MewmaSequence:
        """Run over W consecutive windows that began at `t` (W,), with scores and effects (W, S)."""
        library = kernel.kernel()
        if library is None:
            means = _run_by_numpy(z, self.mean)
            return MewmaSequence(self, z, means, _statistics(means), effects, t)
        means, statistics = sequential_tests.run_means(library, z, self.mean, (WEIGHT, CLIP, SLACK))
        return MewmaSequence(self, z, means, statistics, effects, t)

    @property
    def statistic(self) -> float:
        """Sum of squares of the means beyond the slack."""
        return float(_statistics(self.mean[None])[0])

    def reset_except(self, scores: Bools) -> Mewma:
        """Reset all scores but these (S,)."""
        return Mewma(*(np.where(scores, part, part.dtype.type(0)) for part in astuple(self)))


class MewmaSequence(msgspec.Struct, frozen=True, eq=False):
    """Means over W consecutive windows."""

    before: Mewma
    z: Float64s  # (W, S)
    means: Float64s  # (W, S) after each
    statistics: Float64s  # (W,) after each; see `Mewma.statistic`
    effects: Float64s  # (W, S)
    t: Ints  # (W,)

    def state_after(self, count: int) -> Mewma:
        """Return the state after `count` windows."""
        before, z, means, effects, t = self.before, self.z[:count], self.means[:count], self.effects[:count], self.t
        library = kernel.kernel()
        if library is None:
            return _extend_by_numpy(before, z, means, effects, t)
        periods = Periods(before.windows, before.effect, before.since)
        periods.extend_means(library, z, before.mean, means, effects, t[:count])
        return Mewma(means[-1].copy(), periods.windows, periods.effect, periods.since)


def _run_by_numpy(z: Float64s, mean: Float64s) -> Float64s:
    """Return the means (W, S): the definition, which the library equals bit by bit."""
    tested, clipped = np.isfinite(z), np.minimum(np.maximum(z, -CLIP), CLIP)
    every, means = bool(tested.all()), np.empty_like(clipped)
    for after, scores, known in zip(means, clipped, tested, strict=True):
        np.subtract(scores, mean, out=after)
        np.multiply(WEIGHT, after, out=after)
        np.add(mean, after, out=after)
        if not every:
            after[:] = np.where(known, after, mean)
        mean = after
    return means


def _extend_by_numpy(before: Mewma, z: Float64s, means: Float64s, effects: Float64s, t: Ints) -> Mewma:
    """Return the state after windows with these `means` (W, S): the definition, as above."""
    tested = np.isfinite(z)
    windows, total, since, was = before.windows, before.effect, before.since, before.mean > 0
    counted_effects = np.where(tested, effects, 0.0)
    for now, counted, more, begin in zip(means > 0, tested, counted_effects, t.tolist(), strict=False):
        goes_on = now == was
        since = np.where(goes_on & (windows > 0), since, begin)
        windows = np.where(goes_on, windows, 0) + counted
        total = np.where(goes_on, total, 0.0) + more
        was = now
    return Mewma(means[-1].copy(), windows, total, since)


def _statistics(means: Float64s) -> Float64s:
    """Return the sums of squares (W,) of means (W, S) beyond the slack, in the order of scores."""
    beyond = np.maximum(np.abs(means) - SLACK, 0.0).T
    return sum_sequentially(beyond * beyond) if len(beyond) else np.zeros(len(means))


class MewmaBaseline(msgspec.Struct, frozen=True, eq=False):
    limit: float


class MewmaRun(msgspec.Struct, frozen=True, eq=False):
    charted: MewmaSequence
    limit: float
    place: slice  # of the charted scores among all

    @property
    def windows_before_alarm(self) -> int:
        exceeds = self.charted.statistics > self.limit
        return int(exceeds.argmax()) if any_true(exceeds) else len(exceeds)

    def state_after(self, windows: int) -> Mewma:
        """Return the state, restarted once it exceeds the limit."""
        exceeds = self.charted.statistics[windows - 1] > self.limit
        return Mewma.zeros(self.charted.means.shape[1]) if exceeds else self.charted.state_after(windows)

    def open_alarm(self, cusum: Cusum, windows: int, z: Float64s) -> Cusum:
        """Open the alarm of the charted score that moved most.

        Among scores that moved much it is the one that deviates most now, as the means are clipped.
        """
        if self.charted.statistics[windows - 1] <= self.limit:
            return cusum
        chart = self.charted.state_after(windows)
        far = np.abs(chart.mean)
        now = np.nan_to_num(np.abs(z[self.place]))
        lead = int(np.where(far >= NEAR_LIMIT_SHARE * far.max(), now, -1.0).argmax())
        return cusum.open_alarm(
            0 if chart.mean[lead] > 0 else 1,
            self.place.start + lead,
            int(chart.windows[lead]),
            float(chart.effect[lead]),
            int(chart.since[lead]),
        )


class MewmaDetector(ChartDetector):
    """Chart of the first `width` scores of another detector, `source`, with `budget` false alarms per window."""

    baseline_type = MewmaBaseline
    state_type = Mewma

    def __init__(
        self, name: str, source: ScoreDetector, width: Callable[[Task], int], budget: Callable[[Task], float]
    ) -> None:
        self.name, self.source, self.width, self.budget = name, source, width, budget

    def start(self, task: Task) -> Mewma:
        return Mewma.zeros(self.width(task))

    def learn(self, task: Task, windows: LearnedWindows, scores: LearnedScores) -> MewmaBaseline:
        charted, noise = scores.z[:, self._place(task, scores.slices)], self.source.fit_noise(task, scores)
        return MewmaBaseline(fit_limit(charted, noise.first(self.width(task)), self.budget(task)))

    def is_valid(self, task: Task, own: MewmaBaseline) -> bool:
        return own.limit > 0

    def run(self, state: Mewma, windows: ChartWindows) -> MewmaRun:
        """Run over windows; scores of fields with an open alert are left out."""
        place = self._place(windows.task, windows.slices)
        z = windows.z[:, place]
        if any_true(windows.open_fields):
            others = windows.task.subject_count - windows.task.fields
            held = np.append(windows.open_fields, [False] * others)[self._subjects(windows.task)]
            state, z = state.reset_except(~held), np.where(held, np.nan, z)
        caution = windows.caution[place]
        limit = windows.baseline.own.limit * (float(caution.sum()) / caution.size if caution.size else 1.0)
        return MewmaRun(state.run_windows(z, windows.effects[:, place], windows.t), limit, place)

    def reset_subjects(self, state: Mewma, task: Task, subjects: Bools) -> Mewma:
        return state.reset_except(~subjects[self._subjects(task)])

    def restart(self, state: Mewma) -> Mewma:
        return Mewma.zeros(len(state.mean))

    def describe(self, alarm: Alarm) -> AlertText:
        return self.source.describe(alarm.for_detector(self.source.name))

    def _place(self, task: Task, slices: Mapping[str, slice]) -> slice:
        begin = slices[self.source.name].start
        return slice(begin, begin + self.width(task))

    def _subjects(self, task: Task) -> Ints:
        return np.array(self.source.subjects(task)[: self.width(task)], np.int64)


def fit_limit(scores: Float64s, noise: ScoreNoise, budget: float) -> float:
    """Return the limit of the statistic, from scores (K, S) of learned windows in their order.

    `noise` is that of the scores; `budget` the false alarms per window.
    """
    windows, count = scores.shape
    if not count or windows < 4:
        return UNREACHABLE_LIMIT
    slow = (1 - WEIGHT) * noise.autocorrelation
    variance = WEIGHT / (2 - WEIGHT) * (1 + slow) / (1 - slow)
    # Mean and sd are estimated from K windows only.
    variance = (
        (variance + 1 / noise.mean_windows)
        / (1 + 1 / windows)
        * (noise.spread_windows + 1)
        / np.maximum(noise.spread_windows - 1, 1)
    )
    sd = float(np.sqrt(variance.mean()))
    theory = _quadratic_form_quantile(count, _eigenvalue_sums(scores), sd, WINDOWS_PER_ALARM * budget)
    return max(theory, _max_statistic(scores))


def _eigenvalue_sums(scores: Float64s) -> tuple[float, float]:
    """Return the sums of squares and of cubes of the eigenvalues of the scores' correlations.

    Correlations are shrunk by what K windows show by chance. Sums of powers of eigenvalues are traces of powers.
    """
    windows, count = scores.shape
    unit = scores / np.maximum(np.sqrt((scores**2).sum(0)), 1e-12)
    correlations = matrices.multiply(unit.T, unit)
    np.fill_diagonal(correlations, 0.0)
    spread = float((correlations**2).sum())
    true = max(spread - count * (count - 1) / (windows - 1), 0.0)
    share = math.sqrt(true / max(spread, 1e-12))
    third = float((matrices.multiply(correlations, correlations) * correlations).sum())
    squares = count + share**2 * spread
    return squares, 3 * squares - 2 * count + share**3 * third


def _quadratic_form_quantile(count: int, eigenvalue_sums: tuple[float, float], sd: float, share: float) -> float:
    """Return what the sum of squares beyond the slack exceeds in a share of windows.

    It is the quantile for this number of normal numbers with this sd. The eigenvalues of their correlations have these
    sums of squares and of cubes.
    """
    at = np.linspace(-8, 8, 1601)
    likely = np.exp(-(at**2) / 2)
    likely /= likely.sum()
    each = np.maximum(np.abs(at) * sd - SLACK, 0.0) ** 2
    mean = float((likely * each).sum())
    variance = float((likely * (each - mean) ** 2).sum()) * eigenvalue_sums[0]
    third = float((likely * (each - mean) ** 3).sum()) * eigenvalue_sums[1]
    freedom = 4 * variance**3 / third**2
    quantile = float(gamma_quantile(np.array([freedom]), 1 - share)[0])
    return mean * count + math.sqrt(variance * freedom) * (quantile - 1)


def _max_statistic(scores: Float64s) -> float:
    after, most = Mewma.zeros(scores.shape[1]), 0.0
    for z in scores:
        after = after.update(z, z, 0)
        most = max(most, after.statistic)
    return most
