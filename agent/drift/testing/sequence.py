"""How all tests go on over drift windows in a row, as long as none of them raises an alarm; and what raises one.

Where one is open already, or is raised, that is a window by itself.
"""

from __future__ import annotations

from functools import cached_property

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.arrays import Bools, Floats, Ints
from agent.drift.detectors import correlation, cusum, mewma
from agent.drift.detectors.mewma import Together
from agent.drift.detectors.psi import Confirm
from agent.drift.testing.test_suite import Detectors, Evidence, Tester

HALF_WAY, NEAR = 0.5, 0.8  # shares of its limit from which on a field's sum is taken for a drift that begins


class Course(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Over W windows with this `evidence`; where an alarm is open `before` them, W is 1."""

    tester: Tester
    before: Detectors
    evidence: Evidence
    cusum: cusum.Course
    means: mewma.Course
    answers: mewma.Course
    t: Ints  # (W,)

    @cached_property
    def shapes(self) -> list[Confirm]:
        """After each window, up to the first in which an alarm is open."""
        tested = self.evidence.told
        if self.before.open_fields.any():
            tested = tested.copy()
            tested[:, -2:] = False
        now, found = self.before.shape, []
        for beyond, told, t in zip(self.evidence.beyond, tested, self.t.tolist(), strict=True):
            now = now.update(beyond, told, t)
            found.append(now)
            if now.on.any():
                break
        return found

    @property
    def quiet(self) -> int:
        """How many windows there are before the first in which an alarm is open."""
        most_means, most_answers = self.tester.extra.together
        squares = zip(self.cusum.raises.tolist(), self.means.squares, self.answers.squares, strict=True)
        quiet = [not (beyond or means > most_means or answers > most_answers) for beyond, means, answers in squares]
        told = len(self.shapes) - bool(self.shapes[-1].on.any())
        return min(told, quiet.index(False) if False in quiet else len(quiet))

    def after(self, windows: int) -> Detectors:
        """After so many of them, of which none but the last has an alarm open."""
        before, evidence, fields = self.before, self.evidence[:windows], len(self.tester.site.fields)
        z = evidence.z[-1]
        after = Detectors(
            self.cusum.after(windows),
            self.shapes[windows - 1],
            np.concatenate([before.scores, evidence.scores])[windows:],
            np.concatenate([before.recent, evidence.z[:, : 2 * fields].astype(np.float32)])[windows:],
            self.means.after(windows),
            self.answers.after(windows),
        )
        after = self._together(after, z, self.means.squares[windows - 1], self.answers.squares[windows - 1])
        if self.tester.site.labels and not before.open_fields.any():
            return self._first_alone(after, z)
        return after

    def _together(self, after: Detectors, z: Floats, means: float, answers: float) -> Detectors:
        """With an alarm of what moved most, where fields or answers come to too much together; they begin anew then."""
        at, (most_means, most_answers) = after.places, self.tester.extra.together
        if means > most_means:
            moved = _with_lead(after.cusum, after.means, at.means, z)
            after = replace(after, cusum=moved, means=Together.zeros(at.fields))
        if answers > most_answers:
            moved = _with_lead(after.cusum, after.answers, at.answers, z)
            after = replace(after, cusum=moved, answers=Together.zeros(at.answers_told))
        return after

    def _first_alone(self, after: Detectors, z: Floats) -> Detectors:
        """Where several fields are open at once, only the one that is furthest off, and no other has gathered anything.

        Up to here all were compared with the classes that the model named, and one field may have made these wrong. If
        another drifts, too, it will be found so when classes are told by the fields that are sound.
        """
        fields = len(self.tester.site.fields)
        on = after.cusum.on[0, : 2 * fields] | after.cusum.on[1, : 2 * fields]
        if not on.any():
            return after
        far = np.where(on, np.nan_to_num(np.abs(z[: 2 * fields])), -1.0)
        lead = int(far.argmax()) % fields
        kept = np.zeros(len(z), np.bool_)
        kept[[lead, fields + lead]] = True
        return after.only(kept)


def of(tester: Tester, before: Detectors, evidence: Evidence, t: Ints) -> Course:
    """Over W windows with this evidence, begun at `t` (W,) epoch µs."""
    at, open_now = before.places, before.open_fields

    def sums(z: Floats) -> cusum.Course:
        slack, limit = tester.limits.slack, tester.limits.limit
        return before.cusum.ahead(z, evidence.effects, slack=slack, limit=limit, t=t)

    z, ahead = evidence.z, sums(evidence.z)
    held = _held(tester, ahead, open_now)
    if held is not None:
        # Fields are never held, so what they have gathered stays as it was found.
        z = np.where(held, np.nan, z)
        ahead = sums(z)
    means, fields = before.means, z[:, at.means]
    if open_now.any():
        means, fields = means.only(~open_now), np.where(open_now, np.nan, fields)
    return Course(
        tester,
        before,
        evidence,
        ahead,
        means.ahead(fields, evidence.effects[:, at.means], t),
        before.answers.ahead(z[:, at.answers], evidence.effects[:, at.answers], t),
        t,
    )


def _held(tester: Tester, ahead: cusum.Course, open_now: Bools) -> Bools | None:
    """(W, T) which tests wait in which window, as fields move that they depend on; None for nothing."""
    count = len(open_now)
    limit = tester.limits.limit[: 2 * count]
    values = np.concatenate([ahead.before.value[None], ahead.values[:-1]])[:, :, : 2 * count]
    share = (values / limit).max(1)
    begins = np.maximum(share[:, :count], share[:, count:])
    moving = open_now | (begins > HALF_WAY)
    if not moving.any():
        return None
    at, held = tester.site.places, np.zeros(ahead.tested.shape, np.bool_)
    left, right = correlation.sides(count)
    held[:, at.pairs] = moving[:, left] | moving[:, right]
    near = open_now.any() | (begins.max(1) > NEAR)
    held[near, at.certainty] = True
    held[near, at.answers] = True
    if tester.site.labels:
        held[near, at.pairs] = True
    return held


def _with_lead(sums: cusum.Cusum, moved: Together, place: slice, z: Floats) -> cusum.Cusum:
    """With an alarm of the test that `moved` most, at `place` among all.

    Of those that moved much, that is the one that is furthest off now: how far is cut off in the means.
    """
    far = np.abs(moved.mean)
    lead = int(np.where(far >= NEAR * far.max(), np.nan_to_num(np.abs(z[place])), -1.0).argmax())
    side = 0 if moved.mean[lead] > 0 else 1
    return sums.opened(
        side, place.start + lead, int(moved.windows[lead]), float(moved.effect[lead]), int(moved.since[lead])
    )
