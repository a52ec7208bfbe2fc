"""What tests a closed drift window against the site's reference: all families of tests together.

Each test has a CUSUM, in the order of `places`; beside them what means of fields, and shares of answers, come to
together; and the shapes of F fields, of the answers and of the certainty, by PSI. Subjects are the F fields, then
"output", "score" and "joint".

What follows from a field's drift is not told as a drift of its own: where a field drifts, the model answers otherwise
and the pairs of that field move; while its alert is open these wait.
"""

from __future__ import annotations

from functools import cached_property

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.arrays import Bools, Float32s, Float64s, Ints
from agent.drift.baseline.learning import class_shares, mean_top_scores
from agent.drift.baseline.reference import BINS, Reference
from agent.drift.baseline.site import SiteCalibration
from agent.drift.baseline.summary import Summary
from agent.drift.detectors import correlation, cusum, ramp, sampling_rate, window_statistics
from agent.drift.detectors import psi as shape
from agent.drift.detectors.cusum import Cusum
from agent.drift.detectors.mewma import Mewma
from agent.drift.detectors.psi import PsiConfirmation
from agent.drift.detectors.test_layout import ScoreLayout, get_layout
from agent.drift.numeric import false_alarm_budget as limits
from agent.performance import cbpe

OUTPUT, SCORE, JOINT = "output", "score", "joint"
CLASS_DISTANCE_CLIP = 4.0  # class sd, the most that one statistic says against a class


class SuiteState(msgspec.Struct, frozen=True, eq=False, dict=True):
    """All that tests remember of the windows before."""

    cusum: Cusum
    psi: PsiConfirmation
    recent_scores: Ints  # (OVER, 32) answers by certainty of the last windows
    recent_z: Float32s  # (16, 2F) z of the last windows, NaN for none
    # None in a state saved before these were told.
    field_mewma: Mewma = msgspec.field(default_factory=lambda: Mewma.zeros(0))  # (F,)
    class_share_mewma: Mewma = msgspec.field(default_factory=lambda: Mewma.zeros(0))  # (C,)

    @classmethod
    def start(cls, layout: ScoreLayout) -> SuiteState:
        return cls(
            Cusum.zeros(layout.test_count),
            PsiConfirmation.empty(layout.fields + 2),
            np.zeros((cbpe.POOLED_WINDOWS, BINS), np.int64),
            np.full((ramp.RAMP_WINDOWS, 2 * layout.fields), np.nan, np.float32),
            Mewma.zeros(layout.fields),
            Mewma.zeros(layout.tested_classes),
        )

    @property
    def layout(self) -> ScoreLayout:
        return get_layout(self.recent_z.shape[1] // 2, len(self.class_share_mewma.mean))

    @cached_property
    def open_subjects(self) -> Bools:
        """(F + 3,) which subjects have a drift alert open."""
        at = self.layout
        if not (self.cusum.alarm.any() or self.psi.alarm.any()):
            return np.zeros(at.fields + 3, np.bool_)
        on = self.cusum.alarm[0] | self.cusum.alarm[1]
        fields = on[at.means] | on[at.spreads] | self.psi.alarm[: at.fields]
        output, score = self.psi.alarm[at.fields :]
        others = [output | on[at.class_shares].any(), score | on[at.certainty], on[at.pairs].any()]
        return np.concatenate([fields, others])

    @property
    def open_fields(self) -> Bools:
        """(F,)"""
        return self.open_subjects[:-3]

    def reset_subjects(self, subjects: Bools) -> SuiteState:
        """With all that was gathered on these subjects (F + 3,) forgotten."""
        at = self.layout
        gone = np.zeros(at.test_count, np.bool_)
        gone[at.means] = gone[at.spreads] = subjects[: at.fields]
        gone[at.class_shares], gone[at.certainty], gone[at.pairs] = subjects[at.fields :]
        recent = np.where(gone[: 2 * at.fields], np.float32(np.nan), self.recent_z)
        return replace(
            self,
            cusum=self.cusum.reset_except(~gone),
            psi=self.psi.reset_except(~subjects[:-1]),
            recent_z=recent,
            field_mewma=self.field_mewma.reset_except(~gone[at.means]),
            class_share_mewma=self.class_share_mewma.reset_except(~gone[at.class_shares]),
        )

    def reset_except_open(self) -> SuiteState:
        """With the open alarms, and nothing gathered towards others."""
        return self.reset_except(np.asarray(self.cusum.alarm.any(0)))

    def reset_except(self, tests: Bools) -> SuiteState:
        """With all sums but those of these `tests` (T,) begun anew."""
        none = Mewma.zeros(len(self.field_mewma.mean)), Mewma.zeros(len(self.class_share_mewma.mean))
        return replace(self, cusum=self.cusum.reset_except(tests), field_mewma=none[0], class_share_mewma=none[1])


class CusumLimits(msgspec.Struct, frozen=True, eq=False):
    """Slack and limit of each CUSUM (T,), as the number of tests and of learned windows asks for."""

    slack: Float64s
    limit: Float64s

    @classmethod
    def from_reference(cls, reference: Reference) -> CusumLimits:
        assert reference.site is not None
        at, windows, alike = reference.layout, reference.drift_windows, reference.site.alike
        slack = np.full(at.test_count, limits.FIELD_SLACK)
        slack[at.pairs] = limits.PAIR_SLACK
        limit = np.empty(at.test_count)
        limit[: 2 * at.fields] = limits.cusum_limit(2 * at.fields, windows, limits.FIELD_SLACK, limits.FIELD_BUDGET)
        count = at.certainty - 2 * at.fields
        limit[at.pairs] = limits.cusum_limit(
            count, windows, limits.PAIR_SLACK, limits.PAIR_BUDGET, limits.MIN_PAIR_LIMIT
        )
        limit[at.certainty] = limits.cusum_limit(1, windows, limits.FIELD_SLACK, limits.SCORE_BUDGET)
        limit *= reference.site.stretch
        told = limits.effective_sample_size(windows, alike)
        limit[at.class_shares] = limits.cusum_limit(
            at.tested_classes, told, limits.FIELD_SLACK, limits.CLASS_SHARE_BUDGET
        ) * limits.stretch_factor(alike)
        return cls(slack, limit)


class Evidence(msgspec.Struct, frozen=True, eq=False):
    """What W drift windows say."""

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
    """Tests windows against one site's reference."""

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

    def compute_evidence(self, windows: Summary, t: Ints) -> Evidence:
        """Of stacked summaries of windows in the middle of `t` (W,) epoch µs."""
        site, extra = self.reference, self.calibration
        found = windows.class_sums.moments(site.origin)
        values, effects = window_statistics.compute_test_values(
            found, site.class_mean, site.class_sd, windowed=site.windowed
        )
        fields = len(site.fields)
        if not site.windowed:
            effects[:, fields:] -= site.test_mean[fields : 2 * fields] / 2
        values[window_statistics.find_untested(found, windowed=site.windowed)] = np.nan
        pairs = correlation.compute_deviations(
            correlation.from_sums(windows.pairs, fields, windowed=site.windowed), extra.pair_mean
        )
        certainty = correlation.compute_deviations(mean_top_scores(windows.top_scores), extra.score_mean[:, None])
        values = np.concatenate(
            [values, pairs, certainty, class_shares(windows.output, site.layout.tested_classes)], axis=1
        )
        usual = site.test_mean
        if self.has_cycle:
            usual = usual + extra.cycle.evaluate(t)
            effects = effects - self._cycle_effects(usual - site.test_mean)
        moved = (values - usual)[:, 2 * fields :]
        return Evidence(
            cusum.standardize(values, usual, site.test_sd, site.drift_windows),
            np.concatenate([effects, np.where(np.isnan(moved), 0.0, moved)], axis=1),
            *self._test_psi(windows),
            windows.scores,
        )

    def _cycle_effects(self, waves: Float64s) -> Float64s:
        """(W, 2F): what the hour of the day does to effects."""
        fields, site = len(self.reference.fields), self.reference
        weight = site.class_n / np.maximum(site.class_n.sum(0), 1)
        sd = (weight * site.class_sd).sum(0)
        scale = np.concatenate([sd[:fields], sd[fields:] / 2 if site.windowed else np.full(fields, 0.5)])
        return np.asarray(waves[:, : 2 * fields] * scale)

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
        told = np.ones(values.shape, np.bool_)
        told[:, -2] = len(site.labels) > 1
        told[:, -1] = windows.scores.any(-1)
        return values > self.calibration.psi_limits, told

    def assign_classes(self, state: SuiteState, values: Float64s, predicted: Ints) -> Ints:
        """The class (w,) that each model window with statistics (w, D) is compared with.

        The one the model named; but while a field drifts, the one that the other fields say is likeliest: the model
        sees the field that drifts and names wrong classes, and by these the others would seem to drift, too.
        """
        fields = len(self.reference.fields)
        open_now = state.open_fields
        known = self.reference.class_n.min(1) >= window_statistics.MIN_CLASS_WINDOWS
        # Single rows tell too little of their class: those that were misnamed would all be set right, and spreads fall.
        told = self.reference.windowed and self.reference.labels and known.any()
        if not told or not open_now.any() or open_now.all():
            return predicted
        sound = np.flatnonzero(np.tile(~open_now, values.shape[1] // fields))
        mean, sd = self.reference.class_mean[:, sound], self.reference.class_sd[:, sound]
        away = (np.nan_to_num(values[:, None, sound] - mean) / sd) ** 2
        # One wild value must not decide for all.
        likely = -np.minimum(away, CLASS_DISTANCE_CLIP**2).sum(2) / 2 - np.log(sd).sum(1)
        return np.asarray(np.where(known, likely, -np.inf).argmax(1))
