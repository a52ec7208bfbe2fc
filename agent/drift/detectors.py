"""What tests a closed drift window against the site's reference: all families of tests together.

Tests are in this order, F fields and P pairs of fields: mean (F), spread (F), pairs (P), certainty (1), each by CUSUM;
beside them the shapes of F fields, of the answers and of the certainty, by PSI. Subjects are the F fields, then
"output", "score" and "joint".

What follows from a field's drift is not told as a drift of its own: where a field drifts, the model answers otherwise
and the pairs of that field move; while its alert is open these wait.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from agent.drift import cusum, estimate, joint, limits, ramp, rate, shape, statistics
from agent.drift.codec import Bools, Floats, Ints
from agent.drift.cusum import Cusum
from agent.drift.learning import sure
from agent.drift.reference import BINS, Reference
from agent.drift.shape import Confirm
from agent.drift.site import Site
from agent.drift.summary import Summary

OUTPUT, SCORE, JOINT = "output", "score", "joint"
HALF_WAY, NEAR = 0.5, 0.8  # shares of its limit from which on a field's sum is taken for a drift that begins
FAR = 4.0  # class sd, the most that one statistic says against a class


@dataclass(frozen=True, eq=False)
class Detectors:
    """All that tests remember of the windows before."""

    cusum: Cusum
    shape: Confirm
    scores: Ints  # (OVER, 32) answers by certainty of the last windows
    recent: np.ndarray[tuple[int, ...], np.dtype[np.float32]]  # (16, 2F) z of the last windows, NaN for none

    @classmethod
    def start(cls, fields: int) -> Detectors:
        tests = 2 * fields + len(joint.pairs(fields)) + 1
        recent = np.full((ramp.WINDOWS, 2 * fields), np.nan, np.float32)
        return cls(Cusum.zeros(tests), Confirm.none(fields + 2), np.zeros((estimate.OVER, BINS), np.int64), recent)

    def without(self, subjects: Bools) -> Detectors:
        """With all that was gathered on these subjects (F + 3,) forgotten."""
        fields = len(subjects) - 3
        gone = np.zeros(self.cusum.value.shape[1], np.bool_)
        gone[: 2 * fields] = np.tile(subjects[:fields], 2)
        gone[2 * fields : -1] = subjects[-1]
        gone[-1] = subjects[-2]
        recent = np.where(gone[: 2 * fields], np.float32(np.nan), self.recent)
        return replace(self, cusum=self.cusum.only(~gone), shape=self.shape.only(~subjects[:-1]), recent=recent)

    def only_open(self) -> Detectors:
        """With the open alarms, and nothing gathered towards others."""
        return replace(self, cusum=self.cusum.only(self.cusum.on.any(0)))


@dataclass(frozen=True, eq=False)
class Limits:
    """Slack and limit of each CUSUM (T,), as the number of tests and of learned windows asks for."""

    slack: Floats
    limit: Floats

    @classmethod
    def of(cls, site: Reference) -> Limits:
        fields, count, windows = len(site.fields), len(joint.pairs(len(site.fields))), site.drift_windows
        families = (
            (2 * fields, limits.K_FIELDS, limits.FIELDS, limits.LEAST_H),
            (count, limits.K_PAIRS, limits.PAIRS, limits.LEAST_H_PAIRS),
            (1, limits.K_FIELDS, limits.SCORE, limits.LEAST_H),
        )
        stretch = site.site.stretch if site.site else 1.0
        slack = np.concatenate([np.full(n, k) for n, k, *_ in families])
        limit = np.concatenate([np.full(n, limits.h(n, windows, k, *rest)) for n, k, *rest in families])
        return cls(slack, limit * stretch)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What W drift windows say."""

    z: Floats  # (W, T), NaN for nothing
    effects: Floats  # (W, T)
    beyond: Bools  # (W, F + 2) shapes
    told: Bools  # (W, F + 2) where there was something to compare
    scores: Ints  # (W, 32)


@dataclass(frozen=True, eq=False)
class Tester:
    """Tests windows against one site's reference."""

    site: Reference
    extra: Site

    @cached_property
    def limits(self) -> Limits:
        return Limits.of(self.site)

    @cached_property
    def pace_limit(self) -> float:
        return rate.limit(self.site.drift_windows, self.extra.stretch)

    @cached_property
    def daily(self) -> bool:
        return self.extra.cycle.any()

    @cached_property
    def usual_bins(self) -> Ints:
        return shape.coarse(self.site.counts)

    def evidence(self, windows: Summary, t: Ints) -> Evidence:
        """Of stacked summaries of windows in the middle of `t` (W,) epoch µs."""
        site, extra = self.site, self.extra
        found = windows.classes.moments(site.origin)
        values, effects = statistics.tests(found, site.class_mean, site.class_sd, windowed=site.windowed)
        fields = len(site.fields)
        if not site.windowed:
            effects[:, fields:] -= site.test_mean[fields : 2 * fields] / 2
        values[statistics.untested(found, windowed=site.windowed)] = np.nan
        pairs = joint.tests(joint.measured(windows.pairs, fields, windowed=site.windowed), extra.pair_mean)
        certainty = joint.tests(sure(windows.sure), extra.score_mean[:, None])
        values = np.concatenate([values, pairs, certainty], axis=1)
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
        answers = [
            shape.psi(usual, now) for usual, now in ((site.output, windows.output), (site.score_n, windows.scores))
        ]
        values = np.concatenate(
            [shape.psi(self.usual_bins, shape.coarse(windows.counts)), np.stack(answers, axis=1)], axis=1
        )
        told = np.ones(values.shape, np.bool_)
        told[:, -2] = len(site.labels) > 1
        told[:, -1] = windows.scores.any(-1)
        return values > self.extra.psi_limits, told

    def update(self, before: Detectors, evidence: Evidence, at: int, t: int) -> Detectors:
        """After window number `at` of the evidence, begun at `t` (epoch µs)."""
        fields = len(self.site.fields)
        open_now = open_fields(before, fields)
        z = self._without_held(evidence.z[at], before, open_now)
        slack, limit = self.limits.slack, self.limits.limit
        moved = before.cusum.update(z, evidence.effects[at], slack=slack, limit=limit, t=t)
        tested = evidence.told[at].copy()
        tested[-2:] &= not open_now.any()
        scores = np.concatenate([before.scores[1:], evidence.scores[at : at + 1]])
        recent = np.concatenate([before.recent[1:], evidence.z[at : at + 1, : 2 * fields].astype(np.float32)])
        after = Detectors(moved, before.shape.update(evidence.beyond[at], tested, t), scores, recent)
        if self.site.labels and not open_now.any():
            return self._first_alone(after, evidence.z[at])
        return after

    def _first_alone(self, after: Detectors, z: Floats) -> Detectors:
        """Where several fields are open at once, only the one that is furthest off, and no other has gathered anything.

        Up to here all were compared with the classes that the model named, and one field may have made these wrong. If
        another drifts, too, it will be found so when classes are told by the fields that are sound.
        """
        fields = len(self.site.fields)
        on = after.cusum.on[0, : 2 * fields] | after.cusum.on[1, : 2 * fields]
        if not on.any():
            return after
        far = np.where(on, np.nan_to_num(np.abs(z[: 2 * fields])), -1.0)
        lead = int(far.argmax()) % fields
        kept = np.zeros(len(z), np.bool_)
        kept[[lead, fields + lead]] = True
        return replace(after, cusum=after.cusum.only(kept))

    def classes(self, now: Detectors, found: Floats, named: Ints) -> Ints:
        """The class (w,) that each model window with statistics (w, D) is compared with.

        The one the model named; but while a field drifts, the one that the other fields say is likeliest: the model
        sees the field that drifts and names wrong classes, and by these the others would seem to drift, too.
        """
        fields = len(self.site.fields)
        open_now = open_fields(now, fields)
        known = self.site.class_n.min(1) >= statistics.RARE
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

    def _without_held(self, z: Floats, before: Detectors, open_now: Bools) -> Floats:
        fields = len(self.site.fields)
        share = (before.cusum.value / self.limits.limit)[:, : 2 * fields].max(0)
        begins = np.maximum(share[:fields], share[fields:])
        moving = open_now | (begins > HALF_WAY)
        if not moving.any():
            return z
        held = np.zeros(len(z), np.bool_)
        left, right = joint.pairs(fields).T
        held[2 * fields : -1] = moving[left] | moving[right]
        if open_now.any() or begins.max() > NEAR:
            held[-1] = True
            held[2 * fields :] |= bool(self.site.labels)
        return np.where(held, np.nan, z)


def open_fields(detectors: Detectors, fields: int) -> Bools:
    """(F,) which fields have a drift alert open."""
    on = detectors.cusum.on[0, : 2 * fields] | detectors.cusum.on[1, : 2 * fields]
    return np.asarray(on[:fields] | on[fields:] | detectors.shape.on[:fields])


def open_subjects(detectors: Detectors, fields: int) -> Bools:
    """(F + 3,) which subjects have a drift alert open."""
    sums = detectors.cusum.on[0, 2 * fields :] | detectors.cusum.on[1, 2 * fields :]
    answers = detectors.shape.on[fields:]
    return np.concatenate([open_fields(detectors, fields), [answers[0], answers[1] | sums[-1], sums[:-1].any()]])
