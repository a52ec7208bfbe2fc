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

from agent.drift import cusum, estimate, joint, limits, ramp, rate, shape, statistics
from agent.drift.codec import Bools, Floats, Ints
from agent.drift.cusum import Cusum
from agent.drift.learning import answered, sure
from agent.drift.places import Places, places
from agent.drift.reference import BINS, Reference
from agent.drift.shape import Confirm
from agent.drift.site import Site
from agent.drift.summary import Summary
from agent.drift.together import Together

OUTPUT, SCORE, JOINT = "output", "score", "joint"
HALF_WAY, NEAR = 0.5, 0.8  # shares of its limit from which on a field's sum is taken for a drift that begins
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
            np.zeros((estimate.OVER, BINS), np.int64),
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
        at, on = self.places, self.cusum.on[0] | self.cusum.on[1]
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


class Tester(msgspec.Struct, frozen=True, eq=False, dict=True):
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
        open_now = before.open_fields
        z = self._without_held(evidence.z[at], before, open_now)
        slack, limit = self.limits.slack, self.limits.limit
        moved = before.cusum.update(z, evidence.effects[at], slack=slack, limit=limit, t=t)
        tested = evidence.told[at].copy()
        tested[-2:] &= not open_now.any()
        scores = np.concatenate([before.scores[1:], evidence.scores[at : at + 1]])
        recent = np.concatenate([before.recent[1:], evidence.z[at : at + 1, : 2 * fields].astype(np.float32)])
        now, effects = before.places, evidence.effects[at]
        after = Detectors(
            moved,
            before.shape.update(evidence.beyond[at], tested, t),
            scores,
            recent,
            before.means.only(~open_now).update(np.where(open_now, np.nan, z[now.means]), effects[now.means], t),
            before.answers.update(z[now.answers], effects[now.answers], t),
        )
        after = self._together(after, evidence.z[at])
        if self.site.labels and not open_now.any():
            return self._first_alone(after, evidence.z[at])
        return after

    def _together(self, after: Detectors, z: Floats) -> Detectors:
        """With an alarm of what moved most, where fields or answers come to too much together; they begin anew then."""
        at, (most_means, most_answers) = after.places, self.extra.together
        if after.means.square > most_means:
            moved = _with_lead(after.cusum, after.means, at.means, z)
            after = replace(after, cusum=moved, means=Together.zeros(at.fields))
        if after.answers.square > most_answers:
            moved = _with_lead(after.cusum, after.answers, at.answers, z)
            after = replace(after, cusum=moved, answers=Together.zeros(at.answers_told))
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
        return after.only(kept)

    def classes(self, now: Detectors, found: Floats, named: Ints) -> Ints:
        """The class (w,) that each model window with statistics (w, D) is compared with.

        The one the model named; but while a field drifts, the one that the other fields say is likeliest: the model
        sees the field that drifts and names wrong classes, and by these the others would seem to drift, too.
        """
        fields = len(self.site.fields)
        open_now = now.open_fields
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
        at = before.places
        held[at.pairs] = moving[left] | moving[right]
        if open_now.any() or begins.max() > NEAR:
            held[at.certainty] = held[at.answers] = True
            held[at.pairs] |= bool(self.site.labels)
        return np.where(held, np.nan, z)


def _with_lead(sums: Cusum, moved: Together, place: slice, z: Floats) -> Cusum:
    """With an alarm of the test that `moved` most, at `place` among all.

    Of those that moved much, that is the one that is furthest off now: how far is cut off in the means.
    """
    far = np.abs(moved.mean)
    lead = int(np.where(far >= NEAR * far.max(), np.nan_to_num(np.abs(z[place])), -1.0).argmax())
    side = 0 if moved.mean[lead] > 0 else 1
    return sums.opened(
        side, place.start + lead, int(moved.windows[lead]), float(moved.effect[lead]), int(moved.since[lead])
    )
