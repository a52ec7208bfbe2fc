"""Open fault alerts of all fields, one for each field and kind of fault."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
from msgspec.structs import astuple, replace

from outstation.foundation.arrays import AnyArray, Bools, Float64s, Ints, any_true
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.detectors.cusum import windows_to_clear
from outstation.ml.drift.faults.constant_runs import ConstantRuns
from outstation.ml.drift.faults.faults import KINDS, MIN_OUTSIDE_ROWS, MISREAD_FAULTS, SITE_FAULTS, Fault
from outstation.ml.drift.faults.missing_values import MissingValues
from outstation.ml.drift.numeric.escalation import Escalation

_MISREAD = np.array([kind in MISREAD_FAULTS for kind in KINDS])
_EXCHANGED = np.array([kind in ("swapped", "reversed") for kind in KINDS])
_NEEDS_SITE = np.array([kind in SITE_FAULTS for kind in KINDS])
MISREAD_WINDOWS, MISREAD_ROWS = 2, 60  # in a row that read like another unit or field, at least
_MISSING = KINDS.index("missing")  # the first kind
_OUT_OF_RANGE, _SPIKES = KINDS.index("out_of_range"), KINDS.index("spikes")


class OpenFaults(msgspec.Struct, frozen=True, eq=False):
    """State of fault alerts (F, K) of K kinds, and what is gathered of fields over windows."""

    number: Ints  # of the open alert, 0 for none
    seen_count: Ints  # windows in a row with the fault, while no alert is open
    clear_count: Ints  # windows without the fault
    escalation: Escalation
    missing: MissingValues
    runs: ConstantRuns

    @classmethod
    def none(cls, shipped: Reference) -> OpenFaults:
        shape = len(shipped.fields), len(KINDS)
        whole = np.zeros(shape, np.int64)
        return cls(
            whole, whole, whole, Escalation.none(shape), MissingValues.empty(shape[0]), ConstantRuns.none(shape[0])
        )

    def take_over(self, other: OpenFaults, fields: Mapping[int, int]) -> OpenFaults:
        """Return these faults with those of `other` in some `fields`: own number to that in `other`."""
        here, there = list(fields), list(fields.values())

        def copy_rows(own: AnyArray, others: AnyArray) -> AnyArray:
            own = own.copy()
            own[here] = others[there]
            return own

        return OpenFaults(
            copy_rows(self.number, other.number),
            copy_rows(self.seen_count, other.seen_count),
            copy_rows(self.clear_count, other.clear_count),
            Escalation(*map(copy_rows, astuple(self.escalation), astuple(other.escalation))),
            MissingValues(*map(copy_rows, astuple(self.missing), astuple(other.missing))),
            ConstantRuns(*map(copy_rows, astuple(self.runs), astuple(other.runs))),
        )

    @property
    def any_open(self) -> bool:
        return any_true(self.number)

    @property
    def stop_learning(self) -> bool:
        """True while an alert is open that makes windows unfit to learn from; few missing values are left out."""
        if not self.any_open:
            return False
        is_open = self.number > 0
        # Without missing values the field is on its way to sound windows: three of them close the alert first.
        return any_true(is_open[:, _MISSING + 1 :]) or any_true(is_open[:, _MISSING] & ~self.missing.alarm)

    @property
    def open_fields(self) -> list[bool]:
        """(F,) fields with an open alert."""
        return [bool(is_open) for is_open in np.asarray((self.number > 0).any(1))]

    @property
    def misread(self) -> Bools:
        """(F,) an open alert says that the field is read wrongly."""
        return self._find_open(_MISREAD)

    @property
    def exchanged(self) -> Bools:
        """(F,) an open alert says that the field changed its place or its sign."""
        return self._find_open(_EXCHANGED)

    @property
    def spoilt(self) -> Bools:
        """(F,) an open alert says that the sensor fails, whatever the readings mean."""
        return self._find_open(~_MISREAD)

    def _find_open(self, kinds: Bools) -> Bools:
        """Return the fields (F,) with an open alert of one of these kinds (K,)."""
        if not self.any_open:
            return np.zeros(len(self.number), np.bool_)
        return np.asarray((self.number[:, kinds] > 0).any(1))

    @property
    def open_site_faults(self) -> Bools:
        """(F, K) open alerts that no window clears without a site's reference."""
        return np.asarray((self.number > 0) & _NEEDS_SITE)

    def drop(self, which: Bools) -> OpenFaults:
        """Return the state without these open alerts (F, K)."""
        return replace(self, number=np.where(which, 0, self.number), clear_count=np.where(which, 0, self.clear_count))

    def update(
        self, faults: tuple[tuple[Fault, ...], ...], rows: int, raised_count: Ints, *, has_site: bool = True
    ) -> tuple[OpenFaults, FaultChanges]:
        """Add the faults of a window of `rows` rows; `raised_count` (F,) are the earlier fault alerts of each field.

        Unless it was compared with a site's reference (`has_site`), the window says nothing about `SITE_FAULTS`.
        """
        now, size = np.zeros(self.number.shape, np.bool_), np.zeros(self.number.shape)
        for field, several in enumerate(faults):
            for fault in several:
                now[field, KINDS.index(fault.name)], size[field, KINDS.index(fault.name)] = True, fault.size
        was = self.number > 0
        if not (any_true(now) or any_true(was) or any_true(self.seen_count)):
            return self, FaultChanges(now, now, now, size)
        # Readings in another unit lie far outside, too, in some windows more clearly than in others.
        for kind in (_OUT_OF_RANGE, _SPIKES):
            now[:, kind] &= ~self.misread | was[:, kind]
        clear_count = np.where(was & ~now, self.clear_count + (has_site | ~_NEEDS_SITE), 0)
        seen_count = np.where(now & ~was, self.seen_count + 1, 0)
        # One odd window may read like anything: another unit, another field.
        enough = np.where(_MISREAD, max(MISREAD_WINDOWS, -(-MISREAD_ROWS // max(rows, 1))), 1)
        enough[_OUT_OF_RANGE] = max(MISREAD_WINDOWS, -(-MIN_OUTSIDE_ROWS // max(rows, 1)))
        is_open = (was | (seen_count >= enough)) & (clear_count < windows_to_clear(rows))
        raised = is_open & ~was
        number = np.where(raised, raised_count[:, None] + np.cumsum(raised, axis=1), np.where(is_open, self.number, 0))
        escalation, again = self.escalation.update(was, is_open, size)
        changes = FaultChanges(raised, again, was & ~is_open, size)
        after = OpenFaults(number, np.where(is_open, 0, seen_count), clear_count, escalation, self.missing, self.runs)
        return after, changes


class FaultChanges(msgspec.Struct, frozen=True, eq=False):
    """Alerts (F, K) that a window raised, published again and cleared, and the sizes of its faults."""

    raised: Bools
    escalated: Bools
    cleared: Bools
    size: Float64s
