"""Row and prediction counts of W drift windows at once, all with equally many rows and predictions."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.foundation.indices import bincount, repeat
from outstation.ml.drift.baseline import resolution as steps
from outstation.ml.drift.baseline import runs
from outstation.ml.drift.baseline.extremes import Extremes
from outstation.ml.drift.baseline.reference import BINS, Reference
from outstation.ml.drift.baseline.runs import Tail, Trace
from outstation.ml.drift.baseline.window_statistics import WindowStatistics
from outstation.ml.drift.detectors.detector import ClassifiedWindows
from outstation.ml.drift.detectors.registry import COUNTERS
from outstation.ml.drift.numeric.sums import Groups, GroupSums
from outstation.ml.kernel import drift_rows, group_sums
from outstation.ml.kernel import library as kernel
from outstation.ml.kernel.library import Library


class RowCounts(msgspec.Struct, frozen=True, eq=False):
    """Counts of rows: members of `Summary`, with W in front."""

    counts: Ints  # (W, F, 34)
    missing: Ints  # (W, F)
    outside: Ints
    spikes: Ints
    longest: Ints
    extremes: Extremes
    steps: Ints  # (W, F, 64)
    repeated: Ints  # (W,)
    sums: GroupSums  # (W, 1, F) of values from their origin


class PredictionCounts(msgspec.Struct, frozen=True, eq=False):
    """Counts of predictions: members of `Summary`, with W in front."""

    output: Ints  # (W, C)
    scores: Ints  # (W, 32)
    errors: Ints  # (W, E)
    detectors: dict[str, Ints]  # (W, C, …)


def count_rows(
    reference: Reference, rows: Float32s | Float64s, tail: Tail, before: GroupSums | None = None
) -> tuple[RowCounts, Tail]:
    """Count `rows` (W, n, F), n > 0, in physical units, NaN missing.

    If W is 1, the rows follow on from `tail`, and sums from those `before`.
    """
    library = kernel.kernel()
    counted = None if library is None else _count_compiled(library, reference, rows, tail, before)
    counts, run = counted or _count_by_numpy(reference, rows, tail, before)
    last_two = rows[-1][-2:] if rows.shape[1] > 1 else np.concatenate([tail.rows, rows[-1]])[-2:]
    return counts, Tail(last_two.astype(np.float64), runs.last_values(rows[-1], tail.last), run[-1])


def _count_compiled(
    library: Library, reference: Reference, rows: Float32s | Float64s, tail: Tail, before: GroupSums | None
) -> tuple[RowCounts, Ints] | None:
    sums = None if before is None else (before.n, before.total, before.squares)
    counted = drift_rows.count(library, reference.row_limits, rows, tail.rows, tail.last, tail.run, sums)
    if counted is None:
        return None
    counts = RowCounts(
        counts=counted.bins,
        missing=counted.missing,
        outside=counted.outside,
        spikes=counted.spikes,
        longest=counted.longest,
        extremes=Extremes(counted.extreme_values, counted.extreme_rows),
        steps=counted.sizes,
        repeated=counted.repeated,
        sums=GroupSums(counted.known, counted.total, counted.squares),
    )
    return counts, counted.open_run


def _count_by_numpy(
    reference: Reference, rows: Float32s | Float64s, tail: Tail, before: GroupSums | None
) -> tuple[RowCounts, Ints]:
    """Return the counts, and the run of the last value (W, F): the definition, which the library equals bit by bit."""
    rows = rows.astype(np.float64, copy=False)
    trace = Trace.from_rows(rows, tail.rows)
    longest, run = runs.longest_runs(trace, tail, reference.rest)
    ordered, exact = _sort_columns(rows)
    missing = np.zeros(ordered.shape[:2], np.int64)
    if np.isnan(ordered[..., -1]).any():
        missing += np.isnan(ordered).sum(-1)
    extremes = Extremes.from_sorted(ordered, rows.shape[1] - missing)
    counted = RowCounts(
        counts=_count_bins(ordered, reference.bin_cuts_float32 if exact else reference.bin_cuts, missing),
        missing=missing,
        outside=_count_outside(ordered, extremes, reference),
        spikes=runs.count_spikes(trace, reference.jump, None if len(tail.rows) else extremes.high - extremes.low),
        longest=longest,
        extremes=extremes,
        steps=steps.count_sizes(trace.steps_into, trace.zero_steps),
        repeated=runs.count_repeated_rows(trace, reference.rest, reference.has_few_levels),
        sums=GroupSums.from_rows(rows, reference.origin[: rows.shape[2]], before),
    )
    return counted, run


def count_predictions(
    reference: Reference,
    windows: int,
    stats: WindowStatistics,
    predicted: Ints,
    top_scores: Float64s | None,
    classes: Ints,
    groups: Groups,
    error_bins: NDArray[np.uint8] | None = None,
) -> PredictionCounts:
    """Count model windows, one drift window's after another's; `groups` are those of `group_by_class`.

    The bin of the error to expect of each prediction is written to `error_bins` (w,).
    """
    task, shape = reference.task, (windows, reference.class_count)
    scores, scaled = np.zeros((windows, BINS), np.int64), None
    errors = np.zeros((windows, reference.error_bins), np.int64)
    drift_window = repeat(np.arange(windows, dtype=np.int64), len(predicted) // windows)
    if top_scores is not None:
        if len(reference.score_edges):
            # An unknown score is neither certain nor in doubt.
            scores = _count_scores(top_scores.reshape(windows, -1), reference.score_edges)
        if reference.error is not None:
            errors = reference.error.count(stats.values, top_scores, windows, error_bins)
        scaled = reference.scale_scores(np.where(np.isfinite(top_scores), top_scores, 0.0))
    classified = ClassifiedWindows(
        stats.values, stats.measures, scaled, classes, groups, reference.class_mean, reference.class_sd
    )
    return PredictionCounts(
        output=bincount(drift_window * shape[1] + predicted, minlength=windows * shape[1]).reshape(shape),
        scores=scores,
        errors=errors,
        detectors={counter.name: counter.count(task, classified).reshape(*shape, -1) for counter in COUNTERS},
    )


def group_by_class(reference: Reference, windows: int, classes: Ints) -> Groups:
    """Group model windows by drift window and class."""
    count = reference.class_count
    first = repeat(np.arange(windows, dtype=np.int64) * count, len(classes) // windows)
    return Groups(first + classes, windows * count)


def _count_scores(top_scores: Float64s, edges: Float64s) -> Ints:
    """Return counts (W, 32) of scores (W, w) between the edges; NaN is left out."""
    library = kernel.kernel()
    if library is not None:
        return group_sums.count_scores(library, top_scores, edges)
    windows, each = top_scores.shape
    drift_window = repeat(np.arange(windows, dtype=np.int64), each)[~np.isnan(top_scores.ravel())]
    bins = np.searchsorted(edges, top_scores[~np.isnan(top_scores)], side="right") + BINS * drift_window
    return bincount(bins, minlength=windows * BINS).reshape(windows, BINS)


def _sort_columns(rows: Float64s) -> tuple[np.ndarray, bool]:
    """Return each field's values (W, F, n) in ascending order, NaN last, and True if they are exact as float32.

    Sorting the rows and looking up 33 cuts costs half of looking up every row; as float32 it costs less.
    """
    single = rows.astype(np.float32)
    same = single == rows
    exact = bool(same.all() or (same | np.isnan(rows)).all())
    ordered = np.ascontiguousarray((single if exact else rows).transpose(0, 2, 1))
    ordered.sort(axis=-1)
    return ordered, exact


def _count_bins(ordered: np.ndarray, cuts: np.ndarray, missing: Ints) -> Ints:
    """Count bins (W, F, 34). A value on an inner edge belongs to the bin above it, a value on a limit to the bin
    inside.
    """
    under = np.zeros((*ordered.shape[:2], BINS + 3), np.int64)
    for window, columns in zip(under, ordered, strict=True):
        for place, column, limits in zip(window, columns, cuts, strict=True):
            place[1:-1] = column.searchsorted(limits)
    under[..., -1] = ordered.shape[2] - missing
    return under[..., 1:] - under[..., :-1]


def _count_outside(ordered: np.ndarray, extremes: Extremes, reference: Reference) -> Ints:
    low, high = reference.far_limits
    out = np.zeros(ordered.shape[:2], np.int64)
    window, field = np.nonzero((extremes.low < low) | (extremes.high > high))
    if len(window):
        columns = ordered[window, field]
        out[window, field] = ((columns < low[field][:, None]) | (columns > high[field][:, None])).sum(1)
    return out
