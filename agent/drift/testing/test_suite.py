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

from agent.arrays import Bools, Floats, Ints
from agent.drift.baseline.learning import answered, sure
from agent.drift.baseline.reference import BINS, Reference
from agent.drift.baseline.site import Site
from agent.drift.baseline.summary import Summary
from agent.drift.detectors import correlation, cusum, ramp, sampling_rate, window_statistics
from agent.drift.detectors import psi as shape
from agent.drift.detectors.cusum import Cusum
from agent.drift.detectors.mewma import Together
from agent.drift.detectors.psi import Confirm
from agent.drift.detectors.test_layout import Places, places
from agent.drift.numeric import false_alarm_budget as limits
from agent.performance import cbpe

OUTPUT, SCORE, JOINT = "output", "score", "joint"
FAR = 4.0  # class sd, the most that one statistic says against a class


class Detectors(msgspec.Struct, frozen=True, eq=False, dict=True):
    """All that tests remember of the windows before."""

    cusum: Cusum
    shape: Confirm
    scores: Ints  # (OVER, 32) answers by certainty of the last windows
    recent: np.ndarray[tuple[int, ...], np.dtype[np.float32]]  # (16, 2F) z of the last windows, NaN for none
    # None in a state saved before these were told.
    means: Together = msgspec.field(default_factory=lambda: Together.zeros(0))  # (F,)
    answers: Together = msgspec.field(default_factory=lambda: Together.zeros(0))  # (C,)

    @classmethod
    def start(cls, at: Places) -> Detectors:
        return cls(
            Cusum.zeros(at.tests),
            Confirm.none(at.fields + 2),
            np.zeros((cbpe.OVER, BINS), np.int64),
            np.full((ramp.WINDOWS, 2 * at.fields), np.nan, np.float32),
            Together.zeros(at.fields),
            Together.zeros(at.answers_told),
        )

    @property
    def places(self) -> Places:
        return places(self.recent.shape[1] // 2, len(self.answers.mean))

    @cached_property
    def open_subjects(self) -> Bools:
        """(F + 3,) which subjects have a drift alert open."""
        at = self.places
        if not (self.cusum.on.any() or self.shape.on.any()):
            return np.zeros(at.fields + 3, np.bool_)
        on = self.cusum.on[0] | self.cusum.on[1]
        fields = on[at.means] | on[at.spreads] | self.shape.on[: at.fields]
        output, score = self.shape.on[at.fields :]
        others = [output | on[at.answers].any(), score | on[at.certainty], on[at.pairs].any()]
        return np.concatenate([fields, others])

    @property
    def open_fields(self) -> Bools:
        """(F,)"""
        return self.open_subjects[:-3]

    def without(self, subjects: Bools) -> Detectors:
        """With all that was gathered on these subjects (F + 3,) forgotten."""
        at = self.places
        gone = np.zeros(at.tests, np.bool_)
        gone[at.means] = gone[at.spreads] = subjects[: at.fields]
        gone[at.answers], gone[at.certainty], gone[at.pairs] = subjects[at.fields :]
        recent = np.where(gone[: 2 * at.fields], np.float32(np.nan), self.recent)
        return replace(
            self,
            cusum=self.cusum.only(~gone),
            shape=self.shape.only(~subjects[:-1]),
            recent=recent,
            means=self.means.only(~gone[at.means]),
            answers=self.answers.only(~gone[at.answers]),
        )

    def only_open(self) -> Detectors:
        """With the open alarms, and nothing gathered towards others."""
        return self.only(np.asarray(self.cusum.on.any(0)))

    def only(self, tests: Bools) -> Detectors:
        """With all sums but those of these `tests` (T,) begun anew."""
        none = Together.zeros(len(self.means.mean)), Together.zeros(len(self.answers.mean))
        return replace(self, cusum=self.cusum.only(tests), means=none[0], answers=none[1])


class Limits(msgspec.Struct, frozen=True, eq=False):
    """Slack and limit of each CUSUM (T,), as the number of tests and of learned windows asks for."""

    slack: Floats
    limit: Floats

    @classmethod
    def of(cls, site: Reference) -> Limits:
        assert site.site is not None
        at, windows, alike = site.places, site.drift_windows, site.site.alike
        slack = np.full(at.tests, limits.K_FIELDS)
        slack[at.pairs] = limits.K_PAIRS
        limit = np.empty(at.tests)
        limit[: 2 * at.fields] = limits.h(2 * at.fields, windows, limits.K_FIELDS, limits.FIELDS)
        count = at.certainty - 2 * at.fields
        limit[at.pairs] = limits.h(count, windows, limits.K_PAIRS, limits.PAIRS, limits.LEAST_H_PAIRS)
        limit[at.certainty] = limits.h(1, windows, limits.K_FIELDS, limits.SCORE)
        limit *= site.site.stretch
        told = limits.apart(windows, alike)
        limit[at.answers] = limits.h(at.answers_told, told, limits.K_FIELDS, limits.ANSWERS) * limits.stretch(alike)
        return cls(slack, limit)


class Evidence(msgspec.Struct, frozen=True, eq=False):
    """What W drift windows say."""

    z: Floats  # (W, T), NaN for nothing
    effects: Floats  # (W, T)
    beyond: Bools  # (W, F + 2) shapes
    told: Bools  # (W, F + 2) where there was something to compare
    scores: Ints  # (W, 32)

    def __getitem__(self, some: slice) -> Evidence:
        return Evidence(self.z[some], self.effects[some], self.beyond[some], self.told[some], self.scores[some])


class Tester(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Tests windows against one site's reference."""

    site: Reference
    extra: Site

    @cached_property
    def limits(self) -> Limits:
        return Limits.of(self.site)

    @cached_property
    def pace_limit(self) -> float:
        return sampling_rate.limit(self.site.drift_windows, self.extra.stretch)

    @cached_property
    def daily(self) -> bool:
        return self.extra.cycle.any()

    @cached_property
    def usual_bins(self) -> Floats:
        return shape.shares(shape.coarse(self.site.counts))

    @cached_property
    def usual_answers(self) -> Floats:
        return shape.shares(self.site.output)

    @cached_property
    def usual_scores(self) -> Floats:
        return shape.shares(self.site.score_n)

    def evidence(self, windows: Summary, t: Ints) -> Evidence:
        """Of stacked summaries of windows in the middle of `t` (W,) epoch µs."""
        site, extra = self.site, self.extra
        found = windows.classes.moments(site.origin)
        values, effects = window_statistics.tests(found, site.class_mean, site.class_sd, windowed=site.windowed)
        fields = len(site.fields)
        if not site.windowed:
            effects[:, fields:] -= site.test_mean[fields : 2 * fields] / 2
        values[window_statistics.untested(found, windowed=site.windowed)] = np.nan
        pairs = correlation.tests(correlation.measured(windows.pairs, fields, windowed=site.windowed), extra.pair_mean)
        certainty = correlation.tests(sure(windows.sure), extra.score_mean[:, None])
        values = np.concatenate([values, pairs, certainty, answered(windows.output, site.places.answers_told)], axis=1)
        usual = site.test_mean
        if self.daily:
            usual = usual + extra.cycle.at(t)
            effects = effects - self._usual_effects(usual - site.test_mean)
        moved = (values - usual)[:, 2 * fields :]
        return Evidence(
            cusum.scores(values, usual, site.test_sd, site.drift_windows),
            np.concatenate([effects, np.where(np.isnan(moved), 0.0, moved)], axis=1),
            *self._shapes(windows),
            windows.scores,
        )

    def _usual_effects(self, waves: Floats) -> Floats:
        """(W, 2F): what the hour of the day does to effects."""
        fields, site = len(self.site.fields), self.site
        weight = site.class_n / np.maximum(site.class_n.sum(0), 1)
        sd = (weight * site.class_sd).sum(0)
        scale = np.concatenate([sd[:fields], sd[fields:] / 2 if site.windowed else np.full(fields, 0.5)])
        return np.asarray(waves[:, : 2 * fields] * scale)

    def _shapes(self, windows: Summary) -> tuple[Bools, Bools]:
        site = self.site
        values = np.concatenate(
            [
                shape.psi(self.usual_bins, shape.coarse(windows.counts)),
                shape.psi(self.usual_answers, windows.output)[:, None],
                shape.psi(self.usual_scores, windows.scores)[:, None],
            ],
            axis=1,
        )
        told = np.ones(values.shape, np.bool_)
        told[:, -2] = len(site.labels) > 1
        told[:, -1] = windows.scores.any(-1)
        return values > self.extra.psi_limits, told

    def classes(self, now: Detectors, found: Floats, named: Ints) -> Ints:
        """The class (w,) that each model window with statistics (w, D) is compared with.

        The one the model named; but while a field drifts, the one that the other fields say is likeliest: the model
        sees the field that drifts and names wrong classes, and by these the others would seem to drift, too.
        """
        fields = len(self.site.fields)
        open_now = now.open_fields
        known = self.site.class_n.min(1) >= window_statistics.RARE
        # Single rows tell too little of their class: those that were misnamed would all be set right, and spreads fall.
        told = self.site.windowed and self.site.labels and known.any()
        if not told or not open_now.any() or open_now.all():
            return named
        sound = np.flatnonzero(np.tile(~open_now, found.shape[1] // fields))
        mean, sd = self.site.class_mean[:, sound], self.site.class_sd[:, sound]
        away = (np.nan_to_num(found[:, None, sound] - mean) / sd) ** 2
        # One wild value must not decide for all.
        likely = -np.minimum(away, FAR**2).sum(2) / 2 - np.log(sd).sum(1)
        return np.asarray(np.where(known, likely, -np.inf).argmax(1))
