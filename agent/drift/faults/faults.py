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

import msgspec
import numpy as np

from agent.arrays import Bools, Float64s, Ints
from agent.drift.baseline.extremes import Extremes
from agent.drift.baseline.reference import Reference
from agent.drift.baseline.resolution import find_finest
from agent.drift.baseline.summary import Summary
from agent.drift.faults import swapped_channels
from agent.drift.faults import units as other_units

MISSING_SHARE, MISSING_FACTOR = 0.05, 2
SITE_MISSING_SHARE, MIN_MISSING_ROWS = 0.01, 10  # share, and rows, at a site that has learned how many are missing
MIN_STUCK_RUN, STUCK_RUN_FACTOR = 10, 5
OUTSIDE_SHARE = 0.01
MIN_SPIKES, SPIKE_SHARE = 2, 0.001
CLIPPING_SHARE, CLIPPING_RATIO = 0.05, 4  # share of rows at the limit; how many times more than on the next value
MIN_LEVELS = 20  # values less finely told apart often pile up on the outermost
MAX_FINE_SHARE = 0.05  # of the usual fine steps that may be left
MIN_FINE_STEPS, MIN_STEPS = 25, 20  # fine steps that are expected, and steps of any size, before either tells anything
MIN_REPEAT_RATIO = 0.25  # steps of 0 for each of the finest others: half as many are expected where values are rounded
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
    misfit: Float64s  # to the site's own statistics

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
        saturated=np.asarray(_detect_clipping(windows.extremes, reference, rows).any(-1)),
        coarseness=none if site is None else detect_coarsening(windows, site),
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


def _detect_clipping(extremes: Extremes, reference: Reference, rows: Ints) -> Bools:
    """(..., F, 2) whether the lowest and the highest value are ones that a sensor cannot get past, of so many `rows`
    (...,).

    Not where the reference's readings pile up there, too, nor where a sensor tells so few values apart that the
    outermost is often one of the commonest.
    """
    values, held = extremes.values, extremes.rows
    steep = (held[..., 0] > CLIPPING_SHARE * rows[..., None, None]) & (
        held[..., 0] > CLIPPING_RATIO * (held[..., 1] + 1)
    )
    if not steep.any():
        return np.asarray(steep)
    fine = np.isfinite(values[..., 1])
    gap = np.where(fine, values[..., 0] - np.where(fine, values[..., 1], 0.0), np.inf)
    span = np.where(np.isfinite(extremes.high), extremes.high - extremes.low, 0.0)
    return np.asarray(steep & (span[..., None] >= MIN_LEVELS * gap) & ~_occurs_in_reference(extremes, reference))


def _occurs_in_reference(extremes: Extremes, reference: Reference) -> Bools:
    at = np.stack([extremes.low, extremes.high], axis=-1)
    # A value that is a limit of two bins of the reference holds the rows of a whole one.
    usual = (reference.bounds[:, None, :] == at[..., None]).sum(-1) > 1
    for field, known in enumerate(reference.rest):
        if known:
            usual[..., field, :] |= np.isin(at[..., field, :], known)
    return np.asarray(usual)


def detect_coarsening(summary: Summary, site: Reference) -> Ints:
    """(W, F) how many times as coarse as at the site before values are told apart; 0 where not at least four times."""
    usual = None if site.site is None else site.site.resolution
    if usual is None:
        return np.zeros(summary.missing.shape, np.int64)
    now = summary.steps
    steps = now.sum(-1)
    expected, moved = usual.share * steps, steps - now[..., 0]
    # A sensor that rests for long has few steps, but fine ones.
    left = (now * usual.sizes).sum(-1)
    lost = (expected >= MIN_FINE_STEPS) & (moved >= MIN_STEPS) & (left < MAX_FINE_SHARE * np.minimum(expected, moved))
    if not lost.any():
        return np.zeros(lost.shape, np.int64)
    finest_now = find_finest(now)
    of_these = np.take_along_axis(now, finest_now[..., None], -1)[..., 0]
    # One that moves faster has no fine steps either, but hardly repeats a value; a row that repeats as a whole is none.
    repeats = now[..., 0] - summary.sampling.repeated >= MIN_REPEAT_RATIO * of_these
    return np.where(lost & repeats, 2 ** np.maximum(finest_now - usual.finest, 0), 0)
