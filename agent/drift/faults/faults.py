"""Sensor faults of one field in one drift window: told apart from drift, because the fix is another one.

missing        more than 5 % of values absent, and more than twice the reference's share; at a site that has learned,
               more than 1 % and more than twice the share of any learned window. Up to 5 % the window counts, too
saturated      more than 5 % of values at the window's highest or lowest, far more than on the next value to it
quantized      hardly any of the finest steps from row to row that a site had, up to four times their size
stuck          one value repeated more than max(10, 5 x the reference's longest run) times, rest values excepted
swapped        statistics fit a site's reference of another field of the same unit, and that one's this one's
reversed       they fit it with the sign reversed
unit           outside those limits, or far calmer than the reference ever was, but like it in another unit
out_of_range   more than 1 % of values outside the reference's limits widened by half their span
spikes         lone jumps of more than 10 robust sd of the differences, from neighbours that agree: at least 2
               and more than one row in 1000
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from agent.arrays import Bools, Floats, Ints
from agent.drift.detectors import resolution
from agent.drift.detectors.extremes import detect_clipping
from agent.drift.faults import swapped_channels
from agent.drift.faults import units as other_units

if TYPE_CHECKING:
    from agent.drift.baseline.reference import Reference
    from agent.drift.baseline.summary import Summary

MISSING_SHARE, MISSING_FACTOR = 0.05, 2
SITE_MISSING_SHARE, MIN_MISSING_ROWS = 0.01, 10  # share, and rows, at a site that has learned how many are missing
MIN_STUCK_RUN, STUCK_RUN_FACTOR = 10, 5
OUTSIDE_SHARE = 0.01
MIN_SPIKES, SPIKE_SHARE = 2, 0.001
# What is read is another quantity than it was: nothing that follows from it is drift.
MISREAD_FAULTS = frozenset({"swapped", "reversed", "unit"})


class Fault(msgspec.Struct, frozen=True):
    """Of one field in one drift window. `detail` says what it was recognised as, where there is more to say.

    A `slight` one spoils no statistics: the window is tested like others.
    """

    name: str
    detail: str = ""
    is_minor: bool = False


class FaultIndicators(msgspec.Struct, frozen=True, eq=False, dict=True):
    """What W drift windows show of faults, (W, F)."""

    missing: Bools
    minor_missing: Bools
    saturated: Bools
    coarseness: Ints  # how many times as coarse values are told apart, 0 for no more than usual
    stuck: Bools
    low_spread: Bools  # far calmer than the reference ever was
    out_of_range: Bools
    high_spread: Bools  # far louder than the reference
    spikes: Bools
    misfit: Floats  # to the site's own statistics

    @cached_property
    def has_indication(self) -> Bools:
        """(W,) whether there is something to look at."""
        flags = (
            self.missing
            | self.saturated
            | self.stuck
            | self.low_spread
            | self.out_of_range
            | self.high_spread
            | self.spikes
        )
        return np.asarray((flags | (self.coarseness > 0) | (self.misfit > swapped_channels.MISFIT_THRESHOLD)).any(-1))


def compute_indicators(windows: Summary, reference: Reference, site: Reference | None = None) -> FaultIndicators:
    """Of stacked summaries. `reference` is the shipped one; without a site's own it is not known how a field is mounted
    there."""
    rows = np.maximum(windows.counts[:, 0].sum(-1) + windows.missing[:, 0], 1)
    outside = windows.outside > OUTSIDE_SHARE * rows[:, None]
    loud, calm = other_units.detect_unusual_spread(windows, reference, outside)
    none = np.zeros(outside.shape, np.int64)
    return FaultIndicators(
        missing=_has_too_many_missing(windows, reference, site, rows[:, None]),
        minor_missing=windows.missing <= MISSING_SHARE * rows[:, None],
        saturated=np.asarray(detect_clipping(windows.extremes, reference, rows).any(-1)),
        coarseness=none if site is None else resolution.detect_coarsening(windows, site),
        stuck=windows.longest > max_normal_run(reference, rows),
        low_spread=calm,
        out_of_range=outside,
        high_spread=loud,
        spikes=(windows.spikes >= MIN_SPIKES) & (windows.spikes > SPIKE_SHARE * rows[:, None]),
        misfit=none.astype(np.float64) if site is None else swapped_channels.compute_misfit(windows, site),
    )


def identify_faults(
    indicators: FaultIndicators,
    index: int,
    summary: Summary,
    reference: Reference,
    units: Sequence[str] = (),
    site: Reference | None = None,
    misread: Bools | None = None,
) -> tuple[Fault | None, ...]:
    """The fault of each field (of these `units`) in window `at`, if any; of several the first listed above.

    `summary` is that window's. `misread` (F,): those that were read wrongly up to now.
    """
    fields = len(reference.fields)
    known = np.zeros(fields, np.bool_) if misread is None else misread
    if not (indicators.has_indication[index] or known.any()):
        return (None,) * fields
    unit = other_units.recognise_units(
        summary,
        reference,
        indicators.out_of_range[index] | indicators.high_spread[index],
        indicators.low_spread[index],
        tuple(units),
    )
    other, mirrored = ("",) * fields, np.zeros(fields, np.bool_)
    if site is not None and (known.any() or (indicators.misfit[index] > swapped_channels.MISFIT_THRESHOLD).any()):
        other, mirrored = swapped_channels.detect_swaps(summary, site, units, known)
    another = np.array([one is not None for one in unit])
    exchanged = np.array([bool(name) for name in other])
    coarser, outside = indicators.coarseness[index], indicators.out_of_range[index]
    kinds = {
        "missing": indicators.missing[index],
        "saturated": indicators.saturated[index],
        # Coarse values repeat for long; and in another unit, or another field's, steps have another size.
        "quantized": (coarser > 0) & ~(another | exchanged | mirrored | outside),
        "stuck": indicators.stuck[index],
        "swapped": exchanged,
        "reversed": mirrored,
        "unit": another,
        "out_of_range": outside,
        "spikes": indicators.spikes[index],
    }
    names = np.select(list(kinds.values()), list(kinds), "").tolist()
    details = [
        {"unit": one.description if one else "", "swapped": with_field, "quantized": f"{times} times"}.get(name, "")
        for one, with_field, times, name in zip(unit, other, coarser, names, strict=True)
    ]
    return tuple(
        Fault(name, detail, name == "missing" and few) if name else None
        for name, detail, few in zip(names, details, indicators.minor_missing[index].tolist(), strict=True)
    )


def _has_too_many_missing(windows: Summary, reference: Reference, site: Reference | None, rows: Ints) -> Bools:
    here = site.site.rate if site is not None and site.site is not None else None
    if here is None:
        usual = reference.missing / np.maximum(reference.n + reference.missing, 1)
        return np.asarray(windows.missing > np.maximum(MISSING_SHARE, MISSING_FACTOR * usual) * rows)
    more = windows.missing > np.maximum(SITE_MISSING_SHARE, MISSING_FACTOR * here.missing) * rows
    return np.asarray(more & (windows.missing >= MIN_MISSING_ROWS))


def excludes_window(faults: Sequence[Fault | None]) -> bool:
    """Whether one of them keeps the window out of all tests."""
    return any(fault is not None and not fault.is_minor for fault in faults)


def max_normal_run(reference: Reference, rows: Ints) -> Ints:
    """Longest run that is still normal, (W, F), in windows of so many `rows` (W,): never so long that a drift window
    could not show a longer one, except where the reference itself held one value that long."""
    allowed = np.minimum(STUCK_RUN_FACTOR * reference.longest, rows[:, None] - 1)
    return np.maximum(np.maximum(MIN_STUCK_RUN, allowed), reference.longest)
