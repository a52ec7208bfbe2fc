"""Test suite: tests a closed drift window against the site's reference.

Each score of each detector has a CUSUM. Beside them, MEWMA charts watch the means of fields and the shares of classes,
and PSI the distributions. Subjects are the F fields, then "output", "score" and "joint".

What follows from a field's drift is no drift of its own: where a field drifts, the model names other classes and pairs
of that field move. While its alert is open, these tests wait.
"""

from __future__ import annotations

from functools import cached_property

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.arrays import Bools, Float32s, Float64s, Ints
from agent.drift.baseline.reference import BINS, Reference
from agent.drift.baseline.site import SiteCalibration
from agent.drift.baseline.summary import Summary
from agent.drift.detectors import cusum, sampling_rate
from agent.drift.detectors import psi as shape
from agent.drift.detectors.cusum import Cusum
from agent.drift.detectors.detector import Baseline, Task
from agent.drift.detectors.mewma import Mewma
from agent.drift.detectors.moments import MIN_CLASS_WINDOWS
from agent.drift.detectors.psi import PsiConfirmation
from agent.drift.detectors.registry import CLASS_SHARE, DETECTORS, ScoreLayout, get_layout
from agent.drift.detectors.season import RAMP_WINDOWS
from agent.performance import cbpe

CLASS_DISTANCE_CLIP = 4.0  # class sd, the most that one statistic says against a class


class SuiteState(msgspec.Struct, frozen=True, eq=False, dict=True):
    """State of all tests of a task: CUSUMs of all detectors' scores, and of the charts beside them."""

    task: Task
    cusum: Cusum
    psi: PsiConfirmation
    recent_scores: Ints  # (POOLED_WINDOWS, 32) predictions by certainty, of the last windows
    recent_z: Float32s  # (RAMP_WINDOWS, 2F) scores of means and spreads, of the last windows; NaN for none
    field_mewma: Mewma  # (F,)
    class_share_mewma: Mewma  # (S,)

    @classmethod
    def start(cls, task: Task) -> SuiteState:
        layout = get_layout(task)
        return cls(
            task,
            Cusum.zeros(layout.test_count),
            PsiConfirmation.empty(task.fields + 2),
            np.zeros((cbpe.POOLED_WINDOWS, BINS), np.int64),
            np.full((RAMP_WINDOWS, 2 * task.fields), np.nan, np.float32),
            Mewma.zeros(task.fields),
            Mewma.zeros(CLASS_SHARE.width(task)),
        )

    @property
    def layout(self) -> ScoreLayout:
        return get_layout(self.task)

    @cached_property
    def open_subjects(self) -> Bools:
        """(F + 3,) subjects with an open drift alert."""
        is_open = np.zeros(self.task.fields + 3, np.bool_)
        if self.cusum.alarm.any() or self.psi.alarm.any():
            is_open[:-1] = self.psi.alarm
            is_open[self.layout.subjects[self.cusum.alarm.any(0)]] = True
        return is_open

    @property
    def open_fields(self) -> Bools:
        """(F,) fields with an open drift alert."""
        return self.open_subjects[:-3]

    def reset_subjects(self, subjects: Bools) -> SuiteState:
        """Forget all that was gathered on these subjects (F + 3,)."""
        layout = self.layout
        reset = subjects[layout.subjects]
        recent = np.where(reset[: 2 * layout.fields], np.float32(np.nan), self.recent_z)
        return replace(
            self,
            cusum=self.cusum.reset_except(~reset),
            psi=self.psi.reset_except(~subjects[:-1]),
            recent_z=recent,
            field_mewma=self.field_mewma.reset_except(~reset[layout.means]),
            class_share_mewma=self.class_share_mewma.reset_except(~reset[layout[CLASS_SHARE.name]]),
        )

    def reset_except_open(self) -> SuiteState:
        """Keep the open alarms, and forget all that was gathered towards others."""
        return self.reset_except(np.asarray(self.cusum.alarm.any(0)))

    def reset_except(self, tests: Bools) -> SuiteState:
        """Reset all sums but those of these `tests` (T,)."""
        none = Mewma.zeros(len(self.field_mewma.mean)), Mewma.zeros(len(self.class_share_mewma.mean))
        return replace(self, cusum=self.cusum.reset_except(tests), field_mewma=none[0], class_share_mewma=none[1])


class CusumLimits(msgspec.Struct, frozen=True, eq=False):
    """Slack and limit of each CUSUM (T,), for this many tests and learned windows."""

    slack: Float64s
    limit: Float64s

    @classmethod
    def from_reference(cls, reference: Reference) -> CusumLimits:
        assert reference.site is not None
        task, layout, site = reference.task, reference.layout, reference.site
        slack, limit = np.empty(layout.test_count), np.empty(layout.test_count)
        for detector in DETECTORS:
            place = layout[detector.name]
            slack[place] = detector.slack
            limit[place] = detector.limit(task, reference.drift_windows, site.alike, site.stretch)
        return cls(slack, limit)


class Evidence(msgspec.Struct, frozen=True, eq=False):
    """Evidence of W drift windows."""

    z: Float64s  # (W, T), NaN for nothing
    effects: Float64s  # (W, T)
    psi_exceeded: Bools  # (W, F + 2) shapes
    psi_tested: Bools  # (W, F + 2) where there was something to compare
    scores: Ints  # (W, 32)

    def __getitem__(self, index: slice) -> Evidence:
        return Evidence(
            self.z[index], self.effects[index], self.psi_exceeded[index], self.psi_tested[index], self.scores[index]
        )


class DriftTester(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Tester of windows against one site's reference."""

    reference: Reference
    calibration: SiteCalibration

    @cached_property
    def limits(self) -> CusumLimits:
        return CusumLimits.from_reference(self.reference)

    @cached_property
    def speed_cusum_limit(self) -> float:
        return sampling_rate.speed_cusum_limit(self.reference.drift_windows, self.calibration.stretch)

    @cached_property
    def has_cycle(self) -> bool:
        return self.calibration.cycle.is_nonzero()

    @cached_property
    def reference_bin_shares(self) -> Float64s:
        return shape.smoothed_shares(shape.coarsen_bins(self.reference.counts))

    @cached_property
    def reference_class_shares(self) -> Float64s:
        return shape.smoothed_shares(self.reference.output)

    @cached_property
    def reference_score_shares(self) -> Float64s:
        return shape.smoothed_shares(self.reference.score_n)

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        site, own = self.reference, self.calibration.class_means
        return {
            name: Baseline(site.class_n, site.class_mean, site.class_sd, own.get(name), site.test_mean[place])
            for name, place in site.layout.slices.items()
        }

    def compute_evidence(self, windows: Summary, t: Ints) -> Evidence:
        """Score stacked summaries of windows in the middle of `t` (W,) epoch µs."""
        site, task, layout = self.reference, self.reference.task, self.reference.layout
        drift_windows = windows.drift_windows(site.origin)
        parts = [detector.score(task, drift_windows, self.baselines[detector.name]) for detector in DETECTORS]
        values = np.concatenate([scores.values for scores in parts], axis=1)
        usual = site.test_mean
        if self.has_cycle:
            usual = usual + self.calibration.cycle.evaluate(t)
        shift = values - usual
        effects = np.where(np.isnan(shift), 0.0, shift)
        for detector, scores in zip(DETECTORS, parts, strict=True):
            place = layout[detector.name]
            if scores.effects is not None:
                effects[:, place] = scores.effects
                if self.has_cycle and scores.effect_scale is not None:
                    effects[:, place] -= (usual - site.test_mean)[:, place] * scores.effect_scale
        return Evidence(
            cusum.standardize(values, usual, site.test_sd, site.drift_windows),
            effects,
            *self._test_psi(windows),
            windows.scores,
        )

    def _test_psi(self, windows: Summary) -> tuple[Bools, Bools]:
        site = self.reference
        values = np.concatenate(
            [
                shape.compute_psi(self.reference_bin_shares, shape.coarsen_bins(windows.counts)),
                shape.compute_psi(self.reference_class_shares, windows.output)[:, None],
                shape.compute_psi(self.reference_score_shares, windows.scores)[:, None],
            ],
            axis=1,
        )
        tested = np.ones(values.shape, np.bool_)
        tested[:, -2] = len(site.labels) > 1
        tested[:, -1] = windows.scores.any(-1)
        return values > self.calibration.psi_limits, tested

    def assign_classes(self, state: SuiteState, values: Float64s, predicted: Ints) -> Ints:
        """Return the class (w,) that each model window with statistics (w, D) is compared with.

        It is the class that the model named. While a field drifts, it is the likeliest class by the other fields: the
        model sees the drifting field and names wrong classes, by which other fields would seem to drift, too.
        """
        fields = len(self.reference.fields)
        open_now = state.open_fields
        known = self.reference.class_n.min(1) >= MIN_CLASS_WINDOWS
        # Single rows tell too little of their class: those that were misnamed would all be set right, and spreads fall.
        has_classes = self.reference.windowed and self.reference.labels and known.any()
        if not has_classes or not open_now.any() or open_now.all():
            return predicted
        sound = np.flatnonzero(np.tile(~open_now, values.shape[1] // fields))
        mean, sd = self.reference.class_mean[:, sound], self.reference.class_sd[:, sound]
        distance = (np.nan_to_num(values[:, None, sound] - mean) / sd) ** 2
        # One wild value must not decide for all.
        likely = -np.minimum(distance, CLASS_DISTANCE_CLIP**2).sum(2) / 2 - np.log(sd).sum(1)
        return np.asarray(np.where(known, likely, -np.inf).argmax(1))
