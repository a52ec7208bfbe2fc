"""Test suite: tests a closed drift window against the site's reference.

Each score of each detector has a CUSUM; charts stand beside them. Subjects are the F fields, then "output", "score" and
"joint", then the H further outputs.

A consequence of a field's drift is no drift of its own: where a field drifts, the model names other classes and pairs
of that field move. While its alert is open, these tests wait.
"""

from __future__ import annotations

from functools import cached_property

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import AnyArray, Bools, Float32s, Float64s, Ints, any_true
from outstation.ml.drift.baseline.reference import BINS, Reference
from outstation.ml.drift.baseline.site import SiteCalibration
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.detectors import cusum
from outstation.ml.drift.detectors.cusum import Cusum
from outstation.ml.drift.detectors.detector import MIN_CLASS_WINDOWS, Task
from outstation.ml.drift.detectors.registry import CHARTS, MOMENTS, SCORED, ChartStates, ScoreLayout, get_layout
from outstation.ml.performance import cbpe

# Share of its limit by which each alarm that ended by itself makes a test more cautious, and the most.
CAUTION_STEP, MAX_CAUTION = 0.25, 1.75
CLASS_DISTANCE_CLIP = 4.0  # class sd, the most that one statistic says against a class


class SuiteState(msgspec.Struct, frozen=True, eq=False, dict=True):
    """State of all tests of a task: CUSUMs of all detectors' scores, and the charts beside them."""

    task: Task
    cusum: Cusum
    ended: Ints  # (T,) alarms that ended by themselves since the reference was learned
    charts: ChartStates
    recent_scores: Ints  # (POOLED_WINDOWS, 32) predictions by certainty or expected error, of the last windows

    @classmethod
    def start(cls, task: Task) -> SuiteState:
        return cls(
            task,
            Cusum.zeros(get_layout(task).test_count),
            np.zeros(get_layout(task).test_count, np.int64),
            ChartStates({chart.name: chart.start(task) for chart in CHARTS}),
            np.zeros((cbpe.POOLED_WINDOWS, BINS), np.int64),
        )

    @property
    def layout(self) -> ScoreLayout:
        return get_layout(self.task)

    @cached_property
    def caution(self) -> Float64s:
        """(T,) factor on the limits: alarms that end by themselves show that a site varies more than it was learned."""
        return np.asarray(np.minimum(1 + CAUTION_STEP * self.ended, MAX_CAUTION))

    @cached_property
    def open_subjects(self) -> Bools:
        """(F + 3 + H,) subjects with an open drift alert."""
        is_open = np.zeros(self.task.subject_count, np.bool_)
        for chart in CHARTS:
            own = chart.open_subjects(self.charts[chart.name])
            if own is not None:
                is_open[: len(own)] |= own
        if any_true(self.cusum.alarm):
            is_open[self.layout.subjects[self.cusum.alarm.any(0)]] = True
        return is_open

    @property
    def open_fields(self) -> Bools:
        """(F,) fields with an open drift alert."""
        return self.open_subjects[: self.task.fields]

    def reset_subjects(self, subjects: Bools) -> SuiteState:
        """Forget all that was gathered on these subjects (F + 3 + H,)."""
        charts = {chart.name: chart.reset_subjects(self.charts[chart.name], self.task, subjects) for chart in CHARTS}
        retained = ~subjects[self.layout.subjects]
        return replace(self, cusum=self.cusum.reset_except(retained), charts=ChartStates(charts))

    def reset_except_open(self) -> SuiteState:
        """Keep the open alarms, and forget all that was gathered towards others."""
        return self.reset_except(np.asarray(self.cusum.alarm.any(0)))

    def reset_except(self, tests: Bools) -> SuiteState:
        """Reset all sums but those of these `tests` (T,), and restart the charts."""
        charts = {chart.name: chart.restart(self.charts[chart.name]) for chart in CHARTS}
        return replace(self, cusum=self.cusum.reset_except(tests), charts=ChartStates(charts))


class CusumLimits(msgspec.Struct, frozen=True, eq=False):
    """Slack and limit of each CUSUM (T,)."""

    slack: Float64s
    limit: Float64s

    @classmethod
    def from_reference(cls, reference: Reference) -> CusumLimits:
        layout = reference.layout
        assert reference.site is not None
        slack = np.empty(layout.test_count)
        for detector in SCORED:
            slack[layout[detector.name]] = detector.slack
        return cls(slack, reference.site.limits)


class Evidence(msgspec.Struct, frozen=True, eq=False):
    """Evidence of W drift windows."""

    z: Float64s  # (W, T), NaN for nothing
    effects: Float64s  # (W, T)
    charts: dict[str, AnyArray | None]  # (W, …) by chart
    scores: Ints  # (W, 32)

    def __getitem__(self, index: slice) -> Evidence:
        charts = {name: None if part is None else part[index] for name, part in self.charts.items()}
        return Evidence(self.z[index], self.effects[index], charts, self.scores[index])


class DriftTester(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Tester of windows against one site's reference."""

    reference: Reference

    @property
    def calibration(self) -> SiteCalibration:
        assert self.reference.site is not None
        return self.reference.site

    @cached_property
    def limits(self) -> CusumLimits:
        return CusumLimits.from_reference(self.reference)

    @cached_property
    def has_cycle(self) -> bool:
        return self.calibration.cycle.is_nonzero()

    def compute_evidence(self, windows: Summary, t: Ints) -> Evidence:
        """Score stacked summaries of windows in the middle of `t` (W,) epoch µs."""
        site, task, layout = self.reference, self.reference.task, self.reference.layout
        baselines = site.baselines
        drift_windows = windows.drift_windows(site.origin)
        charts = {chart.name: chart.compute_evidence(task, drift_windows, baselines[chart.name]) for chart in CHARTS}
        parts = [detector.score(task, drift_windows, baselines[detector.name]) for detector in layout.detectors]
        values = np.concatenate([scores.values for scores in parts], axis=1)
        values, usual, sd = self._expect(values, t)
        effects = values - usual
        np.copyto(effects, 0.0, where=np.isnan(effects))
        for detector, scores in zip(layout.detectors, parts, strict=True):
            place = layout[detector.name]
            if scores.effects is not None:
                effects[:, place] = scores.effects
                if usual is not site.test_mean and scores.effect_scale is not None:
                    effects[:, place] -= (usual - site.test_mean)[:, place] * scores.effect_scale
        return Evidence(
            cusum.standardize(values, usual, sd, site.drift_windows),
            effects,
            charts,
            drift_windows.distributions.promises,
        )

    def _expect(self, values: Float64s, t: Ints) -> tuple[Float64s, Float64s, Float64s]:
        """Return values (W, T), NaN between two operating modes, with the mean and the sd to expect of each."""
        site, modes = self.reference, self.calibration.modes
        usual, sd = site.test_mean, site.test_sd
        if modes is not None:
            begin = site.layout[MOMENTS.name].start
            assigned = modes.assign(np.nan_to_num((values - usual)[:, begin : begin + site.task.fields]))
            usual, sd = usual + modes.offset[assigned], sd * modes.scale[assigned]
            values = np.where((assigned >= 0)[:, None], values, np.nan)
        if self.has_cycle:
            cycle = self.calibration.cycle
            usual, sd = usual + cycle.evaluate(t), sd * cycle.evaluate_spread(t)
        return values, usual, sd

    def expect_class_means(self, windows: Summary, t: Ints) -> Float64s:
        """Return the class means (W, C, D) to expect of windows in the middle of `t` (W,), in their operating modes."""
        site = self.reference
        means = MOMENTS.score(site.task, windows.drift_windows(site.origin), site.baselines[MOMENTS.name]).values
        values = np.full((len(t), len(site.test_mean)), np.nan)
        begin = site.layout[MOMENTS.name].start
        values[:, begin : begin + means.shape[1]] = means
        _, usual, _ = self._expect(values, t)
        place = slice(begin, begin + site.class_mean.shape[1])
        more = np.broadcast_to(usual - site.test_mean, values.shape)[:, place]
        return np.asarray(site.class_mean + more[:, None] * site.class_sd)

    def assign_classes(self, state: SuiteState, values: Float32s | Float64s, predicted: Ints) -> Ints:
        """Return the class (w,) that each model window with statistics (w, D) is compared with.

        It is the class that the model named. While a field drifts, it is the likeliest class by the other fields: the
        model sees the drifting field and names wrong classes, by which other fields would seem to drift, too.
        """
        fields, open_now = len(self.reference.fields), state.open_fields
        if not any_true(open_now) or open_now.all():
            return predicted
        known = self.reference.class_n.min(1) >= MIN_CLASS_WINDOWS
        # Single rows tell too little of their class: those that were misnamed would all be set right, and spreads fall.
        has_classes = self.reference.windowed and self.reference.labels and known.any()
        if not has_classes:
            return predicted
        sound = np.flatnonzero(np.tile(~open_now, values.shape[1] // fields))
        mean, sd = self.reference.class_mean[:, sound], self.reference.class_sd[:, sound]
        distance = (np.nan_to_num(values[:, None, sound] - mean) / sd) ** 2
        # One wild value must not decide for all.
        likely = -np.minimum(distance, CLASS_DISTANCE_CLIP**2).sum(2) / 2 - np.log(sd).sum(1)
        return np.asarray(np.where(known, likely, -np.inf).argmax(1))
