"""Sensor faults of one field in one drift window, distinguished from drift, because they need another repair.

missing        the chart of `missing_values` has an alarm. Up to 5 % of a window's values the window counts, too
saturated      more than 5 % of values at the window's highest or lowest, far more than on the next value to it
quantized      hardly any of the finest steps from row to row that a site had, up to four times their size
stuck          one value repeated more than max(10, 5 x the longest run of reference and site) times, no rest value
swapped        statistics fit a site's reference of another field of the same unit, and that one's this one's
reversed       they fit it with the sign reversed
unit           outside those limits, or far calmer than the reference ever was, but like it in another unit
out_of_range   more than 1 % of values outside the reference's limits widened by half their span, or further out where
               a field wanders for longer than was learned
spikes         lone jumps of more than 10 robust sd of the differences, from neighbours that agree: at least 2
               and more than one row in 1000, and most steps no larger than usual
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s, Ints, any_true
from outstation.ml.drift.baseline.extremes import Extremes
from outstation.ml.drift.baseline.fault_limits import RANGE_MARGIN, FaultLimits
from outstation.ml.drift.baseline.missing_values import MissingBaseline
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.resolution import find_finest, largest_size, median_size
from outstation.ml.drift.baseline.runs import max_normal_run
from outstation.ml.drift.baseline.summary import Summary, select_window
from outstation.ml.drift.faults import swapped_channels
from outstation.ml.drift.faults import units as other_units
from outstation.ml.drift.faults.constant_runs import ConstantRuns
from outstation.ml.drift.faults.missing_values import MissingValues

# In the order in which they explain a window: of all but `missing`, a field has the first one.
KINDS = ("missing", "saturated", "quantized", "stuck", "swapped", "reversed", "unit", "out_of_range", "spikes")
MINOR_MISSING_SHARE, MINOR_MISSING_FACTOR = 0.05, 2  # of rows, and times the usual share
OUTSIDE_SHARE, MIN_OUTSIDE_ROWS = 0.01, 3
MIN_SPIKES, SPIKE_SHARE = 2, 0.001
# Of the robust sd of steps to the reference's, up to which lone jumps stand out. Of honest windows of 21 kinds, more
# than one in 1000 reaches it only where values are coarse. Steady signals reach it in another unit from factor 3 on.
MAX_STEP_RATIO = 2.0
CLIPPING_SHARE, CLIPPING_RATIO = 0.05, 4  # share of rows at the limit, and ratio to those on the next value
MIN_LEVELS = 20  # coarser values often pile up on the outermost
MAX_FINE_SHARE = 0.05  # of the usual fine steps that may be left
MIN_FINE_STEPS, MIN_STEPS = 25, 20  # expected fine steps, and steps of any size, for a verdict
MIN_REPEAT_RATIO = 0.25  # steps of 0 per finest other step: rounded values have about 0.5
# Such readings are of another quantity: nothing that follows from them is drift.
MISREAD_FAULTS = frozenset({"swapped", "reversed", "unit"})
# Only a site's reference tells how its sensors are mounted and how fine their values are.
SITE_FAULTS = frozenset({"quantized", "swapped", "reversed"})


class Fault(msgspec.Struct, frozen=True):
    """Fault of one field in one drift window. `detail` says what it was recognized as, if there is more to say.

    `size` says how bad it is, in the kind's own unit. A minor fault spoils no statistics: the window is tested like
    others.
    """

    name: str
    detail: str = ""
    is_minor: bool = False
    size: float = 1.0


class FaultIndicators(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Indications of faults in W drift windows, (W, F)."""

    saturated: Bools
    coarseness: Ints  # how many times coarser than usual values are; 0 if not
    stuck: Bools
    low_spread: Bools  # far below the reference's spread
    out_of_range: Bools
    high_spread: Bools  # far above it
    spikes: Bools
    unfit: Bools  # for the field's own place, by the site's own statistics
    usual: Float64s  # (W, C, D) class means to expect at the time of each window

    @cached_property
    def has_indication(self) -> Bools:
        """(W,) True if a field needs a closer look."""
        flags = self.saturated | self.stuck | self.low_spread | self.out_of_range | self.high_spread | self.spikes
        return np.asarray((flags | (self.coarseness > 0) | self.unfit).any(-1))

    def find_spoilt(self, index: int) -> Bools:
        """Return the fields (F,) of a window whose statistics mean nothing, whatever class the model names."""
        parts = (self.saturated, self.out_of_range, self.coarseness > 0)
        return np.asarray(np.any([part[index] for part in parts], axis=0))


def compute_indicators(
    windows: Summary, reference: Reference, t: Ints, site: Reference | None = None
) -> FaultIndicators:
    """Compute the indications of stacked summaries of windows in the middle of `t` (W,) epoch µs.

    Without a site's reference, a field's mounting is unknown.
    """
    limits = (site or reference).fault_limits or FaultLimits.none(len(reference.fields))
    rows = np.maximum(windows.row_counts, 1)
    most = np.maximum(OUTSIDE_SHARE, limits.outside) * rows[:, None]
    outside = (windows.outside > most) & (windows.outside >= np.minimum(MIN_OUTSIDE_ROWS, rows)[:, None])
    reach = (site or reference).reach
    if reach is not None:
        outside = _find_far_outside(windows, reference, reach, outside)
    loud, calm = other_units.detect_unusual_spread(windows, reference, limits, outside)
    none, usual = np.zeros(outside.shape, np.int64), (site or reference).class_means_at(t)
    jumpy = (windows.spikes >= MIN_SPIKES) & (windows.spikes > np.maximum(SPIKE_SHARE, limits.spikes) * rows[:, None])
    if any_true(jumpy):
        # Where all steps are larger, the same signal in another unit passes the limit for jumps.
        jumpy &= 1.4826 * median_size(windows.steps) <= MAX_STEP_RATIO * reference.jump
    return FaultIndicators(
        saturated=np.asarray(_detect_clipping(windows.extremes, reference, limits, rows).any(-1)),
        coarseness=none if site is None else detect_coarsening(windows, site),
        stuck=windows.longest > max_normal_run((site or reference).longest, rows),
        low_spread=calm,
        out_of_range=outside,
        high_spread=loud,
        spikes=jumpy,
        unfit=none > 0
        if site is None
        else swapped_channels.exceeds_misfit(swapped_channels.compute_misfit(windows, site, usual), limits),
        usual=usual,
    )


def _find_far_outside(windows: Summary, reference: Reference, reach: Float64s, outside: Bools) -> Bools:
    """Return which fields (W, F) are out of range, of those that have many values `outside` (W, F).

    A slow field may wander as far as its `reach` (F,); only a jump or a level beyond that is a fault.
    """
    (mean, _), span = other_units.row_mean_sd(windows, reference), reference.high - reference.low
    beyond = (mean < reference.low - reach * span) | (mean > reference.high + reach * span)
    jumped = largest_size(windows.steps) >= RANGE_MARGIN * span
    return np.where(reach > 0, beyond | (outside & jumped), outside)


def missing_baseline(reference: Reference, site: Reference | None) -> MissingBaseline:
    """Return what is usual of missing values: at the site, or before it has learned in the shipped `reference`."""
    if site is not None and site.missing_values is not None:
        return site.missing_values
    shipped = reference.missing_values
    if shipped is None:
        shipped = MissingBaseline.from_totals(reference.missing, reference.n + reference.missing)
    return shipped.before_learning()


def identify_faults(
    indicators: FaultIndicators,
    index: int,
    windows: Summary,
    reference: Reference,
    units: Sequence[str] = (),
    site: Reference | None = None,
    misread: Bools | None = None,
    exchanged: Bools | None = None,
    missing: MissingValues | None = None,
    explained: Bools | None = None,
    runs: ConstantRuns | None = None,
) -> tuple[tuple[Fault, ...], ...]:
    """Return the faults of each field (in these `units`) in window `index`.

    `windows` are stacked summaries. `misread` (F,) are fields that were read wrongly up to now, `exchanged` (F,) those
    of them that changed places or signs, and `explained` (F,) those with another fault. `missing` and `runs` are the
    states of these after the window.
    """
    fields = len(reference.fields)
    absent: list[tuple[Fault, ...]] = [()] * fields
    if missing is not None and any_true(missing.alarm):
        absent = _describe_missing(missing, windows, index, missing_baseline(reference, site))
    known = np.zeros(fields, np.bool_) if misread is None else misread
    stuck = indicators.stuck[index] if runs is None else indicators.stuck[index] | runs.find_stuck(site or reference)
    if not (indicators.has_indication[index] or any_true(known) or any_true(stuck)):
        return tuple(absent)
    summary = select_window(windows, index)
    unit = other_units.recognise_units(
        summary,
        reference,
        indicators.out_of_range[index] | indicators.high_spread[index],
        indicators.low_spread[index],
        tuple(units),
    )
    another = np.array([conversion is not None for conversion in unit])
    spoilt = indicators.find_spoilt(index) | stuck | another | np.array([excludes_window((part,)) for part in absent])
    if explained is not None:
        spoilt |= explained
    moved = known if exchanged is None else exchanged
    other, mirrored = _find_exchanged(indicators, index, summary, units, site, known, moved, spoilt)
    swapped = np.array([bool(name) for name in other])
    names = _name_kinds(indicators, index, summary, stuck, another, swapped, mirrored)
    longest = summary.longest if runs is None else np.maximum(summary.longest, runs.rows)
    details = {
        "unit": [conversion.description if conversion else "" for conversion in unit],
        "swapped": other,
        "quantized": [f"{times} times" for times in indicators.coarseness[index]],
        "stuck": [f"{rows} rows" for rows in longest],
    }
    return _build_faults(absent, names, details, _measure_sizes(indicators, index, summary))


def _find_exchanged(
    indicators: FaultIndicators,
    index: int,
    summary: Summary,
    units: Sequence[str],
    site: Reference | None,
    misread: Bools,
    moved: Bools,
    spoilt: Bools,
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the field that each field (F,) changed places with in window `index`, or "", and whose sign is reversed.

    Fields `misread` (F,) have been read wrongly up to now, of which those that `moved` may stay so; `spoilt` ones have
    another fault.
    """
    fields = len(misread)
    # The model names wrong classes where a field is faulty, and sound fields fit no class then.
    misnamed = site is not None and bool(site.labels) and any_true(spoilt & ~misread)
    unfit = np.zeros(fields, np.bool_) if misnamed else indicators.unfit[index]
    if site is None or not (any_true(moved) or any_true(unfit)):
        return ("",) * fields, np.zeros(fields, np.bool_)
    return swapped_channels.detect_swaps(summary, site, indicators.usual[index], units, moved, unfit & ~spoilt)


def _build_faults(
    absent: Sequence[tuple[Fault, ...]],
    names: Sequence[str],
    details: Mapping[str, Sequence[str]],
    sizes: Mapping[str, Float64s],
) -> tuple[tuple[Fault, ...], ...]:
    """Return those of missing values, `absent`, and one of the kind that `names` (F,) each field, "" for none."""
    none = [""] * len(names)
    out: list[tuple[Fault, ...]] = []
    for field, (before, name) in enumerate(zip(absent, names, strict=True)):
        size = float(sizes[name][field]) if name in sizes else 1.0
        out.append((*before, Fault(name, details.get(name, none)[field], size=size)) if name else before)
    return tuple(out)


def _name_kinds(
    indicators: FaultIndicators,
    index: int,
    summary: Summary,
    stuck: Bools,
    another: Bools,
    swapped: Bools,
    mirrored: Bools,
) -> list[str]:
    """Return the first kind that explains each field (F,) in window `index`, "" for none.

    Fields are `stuck`, in `another` unit, `swapped` or `mirrored` (F,).
    """
    # Lone jumps often end far outside.
    jumps = indicators.spikes[index] & (2 * summary.spikes >= summary.outside)
    outside = indicators.out_of_range[index] & ~jumps
    kinds = {
        "saturated": indicators.saturated[index],
        # Coarse values repeat for long. In another unit, or of another field, steps have another size.
        "quantized": (indicators.coarseness[index] > 0) & ~(another | swapped | mirrored | outside),
        "stuck": stuck,
        "swapped": swapped,
        "reversed": mirrored,
        "unit": another,
        "out_of_range": outside,
        "spikes": indicators.spikes[index],
    }
    names: list[str] = np.select(list(kinds.values()), list(kinds), "").tolist()
    return names


def _measure_sizes(indicators: FaultIndicators, index: int, summary: Summary) -> dict[str, Float64s]:
    """Return how bad faults of each kind would be (F,) in window `index`; other kinds have no size."""
    rows = max(summary.rows, 1)
    return {
        "saturated": np.asarray(summary.extremes.rows[:, :, 0].max(1) / rows),
        "quantized": indicators.coarseness[index].astype(np.float64),
        "out_of_range": summary.outside / rows,
        "spikes": summary.spikes / rows,
    }


def _describe_missing(
    missing: MissingValues, windows: Summary, index: int, baseline: MissingBaseline
) -> list[tuple[Fault, ...]]:
    share = windows.missing[index] / max(int(windows.row_counts[index]), 1)
    minor = share <= np.maximum(MINOR_MISSING_SHARE, MINOR_MISSING_FACTOR * baseline.share)
    columns = zip(missing.alarm.tolist(), minor.tolist(), missing.recent_share.tolist(), strict=True)
    return [(Fault("missing", is_minor=few, size=recent),) if on else () for on, few, recent in columns]


def excludes_window(faults: Sequence[tuple[Fault, ...]]) -> bool:
    """Return True if a fault keeps the window out of all tests."""
    return any(not fault.is_minor for several in faults for fault in several)


def _detect_clipping(extremes: Extremes, reference: Reference, limits: FaultLimits, rows: Ints) -> Bools:
    """Return which of the lowest and highest values (..., F, 2) of `rows` (...,) rows a sensor cannot exceed.

    Not where the reference's readings pile up, too, nor where a sensor has so few levels that the outermost is common.
    """
    values, held = extremes.values, extremes.rows
    most = np.maximum(CLIPPING_SHARE, limits.pile) * rows[..., None, None]
    steep = (held[..., 0] > most) & (held[..., 0] > CLIPPING_RATIO * (held[..., 1] + 1))
    if not any_true(steep):
        return np.asarray(steep)
    fine = np.isfinite(values[..., 1])
    gap = np.where(fine, values[..., 0] - np.where(fine, values[..., 1], 0.0), np.inf)
    span = np.where(np.isfinite(extremes.high), extremes.high - extremes.low, 0.0)
    return np.asarray(steep & (span[..., None] >= MIN_LEVELS * gap) & ~_occurs_in_reference(extremes, reference))


def _occurs_in_reference(extremes: Extremes, reference: Reference) -> Bools:
    at = np.stack([extremes.low, extremes.high], axis=-1)
    # A value that bounds a bin on both sides held a whole bin of reference rows.
    usual = (reference.bounds[:, None, :] == at[..., None]).sum(-1) > 1
    for field, known in enumerate(reference.rest):
        if known:
            usual[..., field, :] |= np.isin(at[..., field, :], known)
    return np.asarray(usual)


def detect_coarsening(summary: Summary, site: Reference) -> Ints:
    """Return how many times coarser than at the site values are (W, F); 0 below four times."""
    if site.site is None:
        return np.zeros(summary.missing.shape, np.int64)
    usual = site.site.resolution
    now = summary.steps
    steps = now.sum(-1)
    expected, moved = usual.share * steps, steps - now[..., 0]
    # A sensor that rests for long has few steps, but fine ones.
    left = np.einsum("...fs,fs->...f", now, usual.sizes)
    lost = (expected >= MIN_FINE_STEPS) & (moved >= MIN_STEPS) & (left < MAX_FINE_SHARE * np.minimum(expected, moved))
    if not any_true(lost):
        return np.zeros(lost.shape, np.int64)
    finest_now = find_finest(now)
    of_these = np.take_along_axis(now, finest_now[..., None], -1)[..., 0]
    # A faster signal has no fine steps either, but repeats no more values than usual. Rows repeated as a whole do not
    # count.
    excess = now[..., 0] - summary.sampling.repeated - usual.held * steps
    repeats = excess >= MIN_REPEAT_RATIO * of_these
    return np.where(lost & repeats, 2 ** np.maximum(finest_now - usual.finest, 0), 0)
