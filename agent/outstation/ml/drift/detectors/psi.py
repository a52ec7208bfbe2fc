"""PSI chart: whether a distribution has another shape than usual at this site; two of three windows confirm an alarm.

A PSI of 0.1 means nothing by itself: it depends on the number of rows and on their correlation. So each learned window
is compared with the others (leave one out), and a gamma distribution is fitted, with a mean for each subject and one
shape for all fields. A window counts if its PSI would come by chance in fewer than `level` of windows.

Subjects: the F fields, the predictions ("output"), the certainty ("score").
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Bools, Float64s, Ints, any_true
from outstation.ml.drift.detectors.class_share import share_text
from outstation.ml.drift.detectors.cusum import WINDOWS_TO_CLEAR, Cusum
from outstation.ml.drift.detectors.detector import (
    EARLY_DRIFT_SHARE,
    OUTPUT,
    SCORE,
    SUBJECTS,
    Alarm,
    AlertText,
    Baseline,
    ChartDetector,
    ChartWindows,
    DriftWindows,
    LearnedScores,
    LearnedWindows,
    Task,
    round_significant,
)
from outstation.ml.drift.detectors.moments import MomentsDetector, measure_change
from outstation.ml.drift.numeric import control_limits, false_alarm_budget
from outstation.ml.drift.numeric.divergence import smoothed_shares
from outstation.ml.drift.numeric.outliers import largest_usual
from outstation.ml.drift.numeric.sums import median

MIN_PSI = 0.02  # a smaller PSI never matters
MIN_GAMMA_SHAPE = 0.3  # heaviest credible tail
MAX_GAMMA_SHAPE = 200.0


class PsiConfirmation(msgspec.Struct, frozen=True, eq=False):
    """Alarms of S subjects. `windows` and `since` (epoch µs) begin with the first window that raised one."""

    exceeded_at: Ints  # (2, S) begin of the last two windows; 0 for one within the limit
    alarm: Bools  # (S,)
    clear_count: Ints
    windows: Ints
    since: Ints

    @classmethod
    def empty(cls, subjects: int) -> PsiConfirmation:
        zero = np.zeros(subjects, np.int64)
        return cls(np.zeros((2, subjects), np.int64), np.zeros(subjects, np.bool_), zero, zero, zero)

    @property
    def is_idle(self) -> bool:
        """True if windows within the limits change nothing."""
        return not (any_true(self.exceeded_at) or any_true(self.alarm))

    def update(self, exceeded: Bools, tested: Bools, t: int, *, to_clear: int = WINDOWS_TO_CLEAR) -> PsiConfirmation:
        """Add a window that began at `t`; subjects that were not `tested` stay as they are.

        `to_clear` windows in a row within the limit clear an alarm.
        """
        last, one_more = self.exceeded_at
        if not (any_true(exceeded) or any_true(self.alarm)):
            before = np.zeros(self.exceeded_at.shape, np.int64)
            before[1] = last
            if not tested.all():
                before = np.where(tested, before, self.exceeded_at)
            return replace(self, exceeded_at=before)
        twice = exceeded & ((last > 0) | (one_more > 0))
        calm = np.where(self.alarm & ~exceeded, self.clear_count + 1, 0)
        on = (self.alarm | twice) & (calm < to_clear)
        first = np.where(one_more > 0, one_more, last)
        windows = np.where(self.alarm, self.windows + 1, np.where(one_more > 0, 3, 2))
        before = np.stack([np.where(exceeded, max(1, t), 0), last])
        return PsiConfirmation(
            np.where(tested, before, self.exceeded_at),
            np.where(tested, on, self.alarm),
            np.where(tested, calm, self.clear_count),
            np.where(tested, np.where(on, windows, 0), self.windows),
            np.where(tested, np.where(on, np.where(self.alarm, self.since, first), 0), self.since),
        )

    def reset_except(self, subjects: Bools) -> PsiConfirmation:
        """Reset all subjects but these (S,)."""
        before, calm, windows, since = (
            np.where(subjects, part, 0) for part in (self.exceeded_at, self.clear_count, self.windows, self.since)
        )
        return PsiConfirmation(before, self.alarm & subjects, calm, windows, since)


class PsiBaseline(msgspec.Struct, frozen=True, eq=False):
    limits: Float64s  # (F + 2,)


class PsiRun(msgspec.Struct, frozen=True, eq=False, dict=True):
    before: PsiConfirmation
    exceeded: Bools  # (W, S)
    tested: Bools
    t: Ints  # (W,)
    to_clear: int

    @cached_property
    def states(self) -> list[PsiConfirmation]:
        """State after each window, up to the first with an open alarm."""
        now, states = self.before, []
        if now.is_idle and not any_true(self.exceeded):
            return [now] * len(self.exceeded)
        columns = self.exceeded, np.asarray(self.exceeded.any(1)).tolist(), self.tested, self.t.tolist()
        is_idle = now.is_idle
        for exceeded, any_exceeded, tested, t in zip(*columns, strict=True):
            if any_exceeded or not is_idle:
                now = now.update(exceeded, tested, t, to_clear=self.to_clear)
                is_open = any_true(now.alarm)
                is_idle = not (is_open or any_true(now.exceeded_at))
                states.append(now)
                if is_open:
                    break
            else:
                states.append(now)
        return states

    @property
    def windows_before_alarm(self) -> int:
        return len(self.states) - any_true(self.states[-1].alarm)

    def state_after(self, windows: int) -> PsiConfirmation:
        return self.states[windows - 1]

    def open_alarm(self, cusum: Cusum, windows: int, z: Float64s) -> Cusum:
        return cusum


class PsiDetector(ChartDetector):
    """Chart of the PSI of each field, of the predictions and of the certainty."""

    name = "psi"
    baseline_type = PsiBaseline
    state_type = PsiConfirmation

    def __init__(self, moments: MomentsDetector) -> None:
        self.moments = moments

    def start(self, task: Task) -> PsiConfirmation:
        return PsiConfirmation.empty(task.fields + 2)

    def learn(self, task: Task, windows: LearnedWindows, scores: LearnedScores) -> PsiBaseline:
        subjects, counts = task.fields + 2, windows.distributions
        level, budget = false_alarm_budget.exceedance_level(subjects), false_alarm_budget.PSI_BUDGET / subjects
        parts = (leave_one_out_psi(part) for part in (counts.bins, counts.output, counts.scores))
        return PsiBaseline(np.concatenate([fit_limits(part.reshape(len(part), -1), level, budget) for part in parts]))

    def is_valid(self, task: Task, own: PsiBaseline) -> bool:
        return own.limits.shape == (task.fields + 2,)

    def compute_evidence(self, task: Task, windows: DriftWindows, baseline: Baseline) -> Float64s:
        """Return the PSI (W, S), NaN where there is nothing to compare."""
        usual, counts = baseline.distributions.smoothed, windows.distributions
        labelled, scored = task.labels > 1, counts.scores.any(-1)
        return np.concatenate(
            [
                compute_psi(usual[0], counts.bins),
                np.where(labelled, compute_psi(usual[1], counts.output), np.nan)[:, None],
                np.where(scored, compute_psi(usual[2], counts.scores), np.nan)[:, None],
            ],
            axis=1,
        )

    def run(self, state: PsiConfirmation, windows: ChartWindows) -> PsiRun:
        evidence: Float64s = np.asarray(windows.evidence)
        tested = ~np.isnan(evidence)
        if any_true(windows.open_fields):
            # The model may name wrong classes.
            tested[:, -2:] = False
        exceeded = evidence > windows.baseline.own.limits
        return PsiRun(state, exceeded, tested, windows.t, windows.task.windows_to_clear)

    def open_subjects(self, state: PsiConfirmation) -> Bools | None:
        return state.alarm if any_true(state.alarm) else None

    def reset_subjects(self, state: PsiConfirmation, task: Task, subjects: Bools) -> PsiConfirmation:
        return state.reset_except(~subjects[: task.fields + 2])

    def describe(self, alarm: Alarm) -> AlertText:
        windows, since = (int(part[alarm.subject]) for part in (alarm.state.windows, alarm.state.since))
        period, fields = alarm.format_windows(windows, since), len(alarm.fields)
        if alarm.subject == fields + SUBJECTS.index(OUTPUT):
            counts = alarm.baseline.distributions.output, alarm.distributions.output
            usual, share = (part / max(1, int(part.sum())) for part in counts)
            label = int(np.argmax(np.abs(share - usual)))
            return share_text(alarm, "shape", label, share[label], usual[label], windows, since)
        evidence: dict[str, Any] = {"test": "shape", "windows": windows, "since": since}
        if alarm.subject == fields + SUBJECTS.index(SCORE):
            certainty = alarm.for_detector("certainty")
            side = int(np.argmax(certainty.value[:, 0]))
            evidence["shift"] = round_significant(certainty.mean_effect(side, 0), 4)
            noun = "certainty is" if alarm.labels else "answers are"
            sentence = f"score: the model's {noun} spread otherwise than in this site's reference {period}"
            return AlertText(f"{sentence}; likely readings unlike those it was made from", evidence)
        name, cause = alarm.fields[alarm.subject], "another range, resolution or position"
        moments, amount = alarm.for_detector(self.moments.name), ""
        own = [alarm.subject, fields + alarm.subject]
        if any_true(moments.value[:, own] > EARLY_DRIFT_SHARE * moments.limit[own]):
            # Too early for an alarm of the mean or the spread, and so for its cause, but not for its size.
            change = measure_change(moments)
            amount = f"{change.describe(alarm.unit, has_classes=len(alarm.labels) > 1)}, "
            evidence = change.to_evidence() | evidence
            cause = f"offset, gain or {cause}"
        sentence = f"{name}: {amount}values are spread otherwise than in this site's reference {period}"
        return AlertText(f"{sentence}; likely {cause}", evidence)


def compute_psi(reference_shares: Float64s, counts: Ints) -> Float64s:
    """Return the PSI along the last axis, of counts against the usual shares."""
    q = smoothed_shares(counts)
    logs = reference_shares / q
    np.log(logs, out=logs)
    np.subtract(reference_shares, q, out=q)
    q *= logs
    return np.asarray(q.sum(-1))


def leave_one_out_psi(counts: Ints) -> Float64s:
    """(K, ...) PSI of each window's counts (K, ..., bins) against all others together."""
    return compute_psi(smoothed_shares(counts.sum(0) - counts), counts)


def fit_limits(values: Float64s, level: float, budget: float) -> Float64s:
    """Return PSI limits (S,) from K windows in a row (K, S), with one gamma shape for all S that are not wilder.

    One window exceeds the limit in a share `level` of windows. The second largest of three, in their order, exceeds it
    in a share `budget`; of the learned ones none does.
    """
    second = np.sort(np.stack([values[:-2], values[1:-1], values[2:]]), axis=0)[1]
    # Where windows are like their neighbors, they show less of what may come.
    memory = control_limits.fit_autocorrelation(values, np.ones(values.shape[1]))
    independent = np.maximum(len(values) * (1 - memory) / (1 + memory), 4.0)
    limits = (_gamma_limit(values, level, independent), _gamma_limit(second, budget, independent), second.max(0))
    return np.asarray(np.maximum(MIN_PSI, np.max(limits, axis=0)))


def _gamma_limit(values: Float64s, level: float, windows: Float64s) -> Float64s:
    """Return the limit that values (K, S), which are worth `windows` (S,) independent windows, exceed as seldom."""
    clipped = np.minimum(values, _outlier_cap(values))
    mean, variance = clipped.mean(0), clipped.var(0, ddof=1)
    positive = mean > 0
    each = np.where(positive, mean, 1.0) ** 2 / np.maximum(variance, 1e-12)
    common = float(median(each[positive])) if positive.any() else MAX_GAMMA_SHAPE
    # Mean and shape are estimated from K windows: one standard error to the safe side.
    margin = 1 - np.sqrt(2 / windows)
    shape = np.clip(margin * np.minimum(each, common), MIN_GAMMA_SHAPE, MAX_GAMMA_SHAPE)
    mean_margin = 1 + 1 / np.sqrt(shape * windows)
    return np.asarray(mean * mean_margin * gamma_quantile(shape, 1 - level))


def gamma_quantile(shape: Float64s, p: float) -> Float64s:
    """Return quantiles of gamma distributions with mean 1.

    Source: Wilson & Hilferty (1931), The distribution of chi-square, PNAS.
    """
    # Imported here: it is slow to import, and only learning needs it.
    from statistics import NormalDist

    spread = 1 / (9 * shape)
    return np.asarray((1 - spread + NormalDist().inv_cdf(p) * np.sqrt(spread)) ** 3)


def _outlier_cap(values: Float64s) -> Float64s:
    """Return the value beyond which a window is drawn in, as it was not like the others."""
    middle = median(values)
    reach = middle + 10 * median(np.abs(values - middle)) + 1e-9
    return np.asarray(np.maximum(reach, largest_usual(values)))
