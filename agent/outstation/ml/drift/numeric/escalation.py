"""Escalation of open alerts: when one that was published is published again, because it became worse or turned round.

- An alert is worse once its size has doubled, and turned once its sign has changed, for two windows in a row. The size
  compared with is the largest of the first windows after the alert was published: a fault that begins within a window
  shows its size in the next one only.
- Each time it waits twice as many windows, so an alert that wavers is published a bounded number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s, Ints

GROWTH = 2.0  # times the size that was published
CONFIRMING_WINDOWS = 2
SETTLING_WINDOWS = 5  # before an alert is published again; twice as many after each time
MAX_REVISIONS = 10
SMOOTHING = 0.5  # weight of the newest window
MIN_SCORE, MAX_SCORE = 3.0, 100.0  # smaller ones are chance, larger ones are cut off


class Escalation(msgspec.Struct, frozen=True, eq=False):
    """State of alerts of any shape; zeros for those that are not open."""

    revision: Ints  # 1 as it was raised
    size: Float64s  # as published, signed
    windows: Ints  # since it was published
    confirmed: Ints  # windows in a row in which it is worse

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Escalation:
        whole = np.zeros(shape, np.int64)
        return cls(whole, np.zeros(shape), whole, whole)

    def update(
        self, was_open: Bools, is_open: Bools, size: Float64s, *, least: float = 0.0
    ) -> tuple[Escalation, Bools]:
        """Add a window before and after which alerts are open or not, of this `size`; 0 where the window shows none.

        Also returns which alerts are now published again. An alert of less than the size `least` counts as that.
        """
        if not (is_open.any() or self.revision.any()):
            return self, np.zeros_like(is_open)
        raised, goes_on = is_open & ~was_open, is_open & was_open
        windows = np.where(goes_on, self.windows + 1, 0)
        settling = goes_on & (windows < SETTLING_WINDOWS)
        turned = (np.sign(size) == -np.sign(self.size)) & (np.abs(size) >= np.abs(self.size) / GROWTH)
        worse = (
            goes_on
            & ~settling
            & (size != 0)
            & ((np.abs(size) >= GROWTH * np.maximum(np.abs(self.size), least)) | turned)
        )
        confirmed = np.where(worse, self.confirmed + 1, 0)
        due = windows >= SETTLING_WINDOWS * 2 ** np.maximum(self.revision - 1, 0)
        again = worse & due & (confirmed >= CONFIRMING_WINDOWS) & (self.revision < MAX_REVISIONS)
        larger = settling & (np.abs(size) > np.abs(self.size))
        published = np.where(raised | again | larger, size, np.where(goes_on, self.size, 0.0))
        revision = np.where(raised, 1, np.where(again, self.revision + 1, np.where(goes_on, self.revision, 0)))
        return Escalation(revision, published, np.where(again, 0, windows), np.where(again, 0, confirmed)), again


class DriftSizes(msgspec.Struct, frozen=True, eq=False):
    """Scores and effects of all tests (T,), smoothed over the newest windows while an alert is open."""

    z: Float64s
    effect: Float64s
    lead: Ints  # (S,) test that showed most of a subject's drift when its alert was published

    @classmethod
    def none(cls, tests: int, subjects: int) -> DriftSizes:
        return cls(np.zeros(tests), np.zeros(tests), np.zeros(subjects, np.int64))

    def add(self, z: Float64s, effects: Float64s, *, is_first: bool) -> DriftSizes:
        """Add a window with scores and effects (T,), NaN where nothing was tested."""
        weight = np.where(np.isnan(z), 0.0, 1.0 if is_first else SMOOTHING)
        bounded = np.clip(np.nan_to_num(z), -MAX_SCORE, MAX_SCORE)
        return DriftSizes(
            self.z + weight * (bounded - self.z), self.effect + weight * (effects - self.effect), self.lead
        )

    def sizes(self, tests: Sequence[Ints], published: Float64s) -> Float64s:
        """Return the size (S,) of each subject's drift: its largest score, with the sign of its leading test.

        It is 0 below MIN_SCORE: quiet windows have such scores, and an alert may rest on another test. While the
        leading test is quiet, the sign stays as `published` (S,): that another test took over is no turn.
        """
        out = np.zeros(len(tests))
        for subject, own in enumerate(tests):
            most = float(np.abs(self.z[own]).max()) if len(own) else 0.0
            if most >= MIN_SCORE:
                lead = float(self.z[self.lead[subject]])
                signed = lead if abs(lead) >= MIN_SCORE or not published[subject] else published[subject]
                out[subject] = np.copysign(most, signed)
        return out

    def with_leads(self, tests: Sequence[Ints], subjects: Bools) -> DriftSizes:
        """Let the largest score lead, of these `subjects` (S,)."""
        lead = self.lead.copy()
        for subject in np.flatnonzero(subjects).tolist():
            if len(tests[subject]):
                lead[subject] = tests[subject][np.abs(self.z[tests[subject]]).argmax()]
        return DriftSizes(self.z, self.effect, lead)
