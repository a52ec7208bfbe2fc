"""What is counted of the rows and answers of W drift windows at once, each of as many rows and of as many answers."""

from __future__ import annotations

import msgspec
import numpy as np

from agent.arrays import Floats, Ints
from agent.drift.baseline.reference import BINS, Reference
from agent.drift.detectors import correlation, runs
from agent.drift.detectors import resolution as steps
from agent.drift.detectors.extremes import Extremes
from agent.drift.detectors.runs import Tail, Trace
from agent.drift.detectors.window_statistics import Found
from agent.drift.numeric.groups import Groups

SURE = 2.0**20
WIDER = 0.5  # of the span of the reference, beyond which rows are far outside its limits


class Rows(msgspec.Struct, frozen=True, eq=False):
    """See `Summary`, whose members these are, with W in front."""

    counts: Ints  # (W, F, 34)
    missing: Ints  # (W, F)
    outside: Ints
    spikes: Ints
    longest: Ints
    extremes: Extremes
    steps: Ints  # (W, F, 64)
    repeated: Ints  # (W,)


class Answers(msgspec.Struct, frozen=True, eq=False):
    """See `Summary`, whose members these are, with W in front."""

    output: Ints  # (W, C)
    scores: Ints  # (W, 32)
    pairs: Ints  # (W, C, …)
    sure: Ints  # (W, C, 2)
    pace: Ints  # (W, C, …)


def of_rows(reference: Reference, rows: Floats, tail: Tail) -> tuple[Rows, Tail]:
    """Of `rows` (W, n, F), n > 0, in physical units, NaN missing; the first follow on from `tail`, where W is 1."""
    trace = Trace.of(rows, tail.rows)
    longest, run = runs.longest(trace, tail.run, reference.rest)
    ordered, exact = _ordered(rows)
    missing = np.isnan(ordered).sum(-1) if np.isnan(ordered[..., -1]).any() else np.zeros(ordered.shape[:2], np.int64)
    extremes = Extremes.of(ordered, rows.shape[1] - missing)
    counted = Rows(
        counts=_histogram(ordered, reference.cuts_single if exact else reference.cuts, missing),
        missing=missing,
        outside=_outside(ordered, extremes, reference),
        spikes=runs.lone_jumps(trace, reference.jump, None if len(tail.rows) else extremes.high - extremes.low),
        longest=longest,
        extremes=extremes,
        steps=steps.count(trace.into, trace.still),
        repeated=runs.repeated(trace, reference.rest),
    )
    return counted, Tail(trace.rows[-1, -2:].copy(), run[-1])


def of_answers(
    reference: Reference,
    windows: int,
    found: Found,
    named: Ints,
    top: Floats | None,
    classes: Ints,
    groups: Groups,
) -> Answers:
    """Of model windows, one drift window's after another's: see `Summary.add_windows`.

    `groups` are those of `by_class`.
    """
    count = reference.classes
    scores, sure = np.zeros((windows, BINS), np.int64), np.zeros((windows, count, 2), np.int64)
    of = np.repeat(np.arange(windows), len(named) // windows)
    if top is not None:
        if len(reference.score_edges):
            # One that is not known is neither sure nor in doubt.
            told = ~np.isnan(top)
            bins = np.searchsorted(reference.score_edges, top[told], side="right") + BINS * of[told]
            scores = np.bincount(bins, minlength=windows * BINS).reshape(windows, BINS)
        whole = np.rint(reference.scaled(np.where(np.isfinite(top), top, 0.0)) * SURE)
        total = np.bincount(of * count + classes, whole, windows * count).astype(np.int64)
        sure = np.stack([groups.n, total], axis=1).reshape(windows, count, 2)
    return Answers(
        output=np.bincount(of * count + named, minlength=windows * count).reshape(windows, count),
        scores=scores,
        pairs=_pairs(reference, found, classes, groups).reshape(windows, count, -1),
        sure=sure,
        pace=correlation.sums(found.pace, groups).reshape(windows, count, -1),
    )


def by_class(reference: Reference, windows: int, classes: Ints) -> Groups:
    """Model windows by the drift window that they are in and their class."""
    count = reference.classes
    first = np.repeat(np.arange(windows) * count, len(classes) // windows)
    return Groups.made(first + classes, windows * count)


def _ordered(rows: Floats) -> tuple[np.ndarray, bool]:
    """Each field's values (W, F, n) in ascending order, NaN last; and whether they are float32, which readings are.

    Sorting the rows and looking up 33 cuts costs half of looking up every row; as float32, less.
    """
    single = rows.astype(np.float32)
    same = single == rows
    exact = bool(same.all() or (same | np.isnan(rows)).all())
    ordered = np.ascontiguousarray((single if exact else rows).transpose(0, 2, 1))
    ordered.sort(axis=-1)
    return ordered, exact


def _histogram(ordered: np.ndarray, cuts: np.ndarray, missing: Ints) -> Ints:
    """(W, F, 34). A value on an inner edge belongs to the bin above it, one on a limit to the bin inside."""
    under = np.zeros((*ordered.shape[:2], BINS + 3), np.int64)
    for window, columns in zip(under, ordered, strict=True):
        for place, column, limits in zip(window, columns, cuts, strict=True):
            place[1:-1] = column.searchsorted(limits)
    under[..., -1] = ordered.shape[2] - missing
    return under[..., 1:] - under[..., :-1]


def _outside(ordered: np.ndarray, extremes: Extremes, reference: Reference) -> Ints:
    span = WIDER * (reference.high - reference.low)
    low, high = reference.low - span, reference.high + span
    out = np.zeros(ordered.shape[:2], np.int64)
    window, field = np.nonzero((extremes.low < low) | (extremes.high > high))
    if len(window):
        columns = ordered[window, field]
        out[window, field] = ((columns < low[field][:, None]) | (columns > high[field][:, None])).sum(1)
    return out


def _pairs(reference: Reference, found: Found, classes: Ints, groups: Groups) -> Ints:
    if reference.windowed:
        return correlation.sums(found.z, groups)
    residuals = reference.class_mean.take(classes, axis=0)
    np.subtract(found.values, residuals, out=residuals)
    residuals /= reference.class_sd.take(classes, axis=0)
    return correlation.of_rows(correlation.in_steps(residuals), groups)
