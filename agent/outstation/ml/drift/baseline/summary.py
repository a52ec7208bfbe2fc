"""Drift window summary: numbers that add. Any split of the rows, merged in any order, gives the same summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation import arrays
from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.ml.drift.baseline import row_counts, window_statistics
from outstation.ml.drift.baseline.extremes import Extremes
from outstation.ml.drift.baseline.reference import BINS, Reference
from outstation.ml.drift.baseline.resolution import SIZE_BINS
from outstation.ml.drift.baseline.row_counts import RowCounts
from outstation.ml.drift.baseline.runs import Tail
from outstation.ml.drift.baseline.sampling import SamplingIntervals
from outstation.ml.drift.baseline.window_statistics import WindowStatistics
from outstation.ml.drift.detectors.detector import DriftWindows
from outstation.ml.drift.detectors.registry import COUNTERS
from outstation.ml.drift.numeric.divergence import NO_CELLS, Distributions, coarsen_bins
from outstation.ml.drift.numeric.sums import GroupSums
from outstation.ml.drift.outputs.counts import FurtherOutput, count_answers
from outstation.ml.performance.expected_error import NO_ERROR_BINS, ErrorBins


class Summary(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Counts and sums under one shipped reference, named by its digest; of constant size.

    Runs, steps and spikes that straddle two merged parts are only seen if the second part was summarized with the first
    one's `Tail`. A stack has W windows in front of all shapes.
    """

    reference: str
    counts: Ints  # (F, 34) rows below, in 32 bins, above
    missing: Ints  # (F,) rows
    outside: Ints  # rows far outside the reference's limits
    spikes: Ints
    longest: Ints  # longest run of one value, rest values excepted
    extremes: Extremes
    steps: Ints  # (F, 64) from row to row, by size
    row_sums: GroupSums  # (1, F) values of rows
    class_sums: GroupSums  # (C, D) statistics of model windows
    output: Ints  # (C,) predictions, as the model named them
    scores: Ints  # (32,) predictions by top score
    detectors: dict[str, Ints]  # (C, …) whole numbers that each detector counts
    sampling: SamplingIntervals
    further: Ints = NO_CELLS  # (X,) answers of further outputs
    errors: Ints = NO_CELLS  # (E,) predictions by the error to expect

    @classmethod
    def empty(cls, reference: Reference) -> Summary:
        count = len(reference.fields)
        none = np.zeros(count, np.int64)
        return cls(
            reference=reference.digest,
            counts=np.zeros((count, BINS + 2), np.int64),
            missing=none,
            outside=none,
            spikes=none,
            longest=none,
            extremes=Extremes.empty(count),
            steps=np.zeros((count, SIZE_BINS), np.int64),
            row_sums=GroupSums.zeros(1, count),
            class_sums=GroupSums.zeros(reference.class_count, len(reference.origin)),
            output=np.zeros(reference.class_count, np.int64),
            scores=np.zeros(BINS, np.int64),
            detectors={
                counter.name: np.zeros((reference.class_count, counter.count_width(reference.task)), np.int64)
                for counter in COUNTERS
            },
            sampling=SamplingIntervals(),
            further=np.zeros(reference.further_cells, np.int64),
            errors=np.zeros(reference.error_bins, np.int64),
        )

    def drift_windows(self, origin: Float64s) -> DriftWindows:
        """Return what detectors score of a stack; `origin` is what the reference measures sums from."""
        return DriftWindows(self.class_sums.moments(origin), self.distributions, self.detectors)

    @property
    def distributions(self) -> Distributions:
        return Distributions(coarsen_bins(self.counts), self.output, self.scores, self.further, self.errors)

    @property
    def rows(self) -> int:
        return int(self.counts[0].sum() + self.missing[0])

    @cached_property
    def row_counts(self) -> Ints:
        """(W,) number of rows of each window in a stack."""
        return np.asarray(self.counts[:, 0].sum(-1) + self.missing[:, 0])

    @property
    def repeated_share(self) -> Float64s:
        """(...,) share of rows that repeat the row before; of each window if this is a stack."""
        rows = self.counts[..., 0, :].sum(-1) + self.missing[..., 0]
        return np.asarray(self.sampling.repeated[..., 0] / np.maximum(1, rows))

    @property
    def missing_share(self) -> Float64s:
        """(F,) share of rows."""
        return np.asarray(self.missing / max(1, self.rows))

    @property
    def model_windows(self) -> int:
        return int(self.output.sum())

    def merge(self, other: Summary) -> Summary:
        """Merge both; associative and commutative, counts exact. Raises ValueError under different references."""
        if self.reference != other.reference:
            raise ValueError("summaries made under different references do not add up: their bins differ")
        merged: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in _ADDED}
        return Summary(
            reference=self.reference,
            longest=np.maximum(self.longest, other.longest),
            extremes=self.extremes.merge(other.extremes),
            detectors={name: counts + other.detectors[name] for name, counts in self.detectors.items()},
            **merged,
        )

    def to_bytes(self) -> bytes:
        return arrays.to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Summary:
        """Decode `to_bytes`. Raises ValueError."""
        return arrays.from_bytes(data, cls)


def stack_one(summary: Summary) -> Summary:
    """Return a stack of one summary: W = 1 stands in front of all shapes."""
    return _map_arrays(summary, lambda part: part[None])


def select_window(stack: Summary, number: int) -> Summary:
    """Return one summary of a stack."""
    return _map_arrays(stack, lambda part: part[number])


def summarize_windows(
    reference: Reference,
    rows: Float32s | Float64s,
    spans: Ints,
    stats: WindowStatistics,
    predicted: Ints,
    top_scores: Float64s | None,
    classes: Ints,
    *,
    answers: Float64s | None = None,
    error_bins: ErrorBins = NO_ERROR_BINS,
    before: Summary | None = None,
    tail: Tail | None = None,
    counted: tuple[RowCounts, Tail] | None = None,
) -> tuple[Summary, Tail]:
    """Summarize W drift windows as a stack, and return the tail of the last one's rows, too.

    `rows` (W, n, F), n > 0, in physical units, NaN missing; intervals between them `spans` (W, …); W · w model windows
    with their statistics, the class that the model named, its score, and the class they are compared with; `answers`
    (W · w, P) of further outputs. The bin of the error to expect of each answer is written to the (W · w,) `error_bins`
    of its output. A single window may continue: from `before`, a stack of one, and from the `tail` of its rows.
    `counted` is what `count_rows` returned for the rows, if they were counted before.
    """
    windows, count, width = len(rows), reference.class_count, stats.values.shape[1]
    of_rows, tail = counted or row_counts.count_rows(
        reference, rows, Tail.empty(rows.shape[2]) if tail is None else tail, before.row_sums if before else None
    )
    groups = row_counts.group_by_class(reference, windows, classes)
    predictions = row_counts.count_predictions(
        reference, windows, stats, predicted, top_scores, classes, groups, error_bins.get("")
    )
    summed = before.class_sums if before else GroupSums.zeros(windows, count, width)
    # Sums begin with those so far: the bits are the same however the rows were cut.
    summed = summed.reshape(windows * count, width).add(groups, stats.values, reference.origin)
    stack = Summary(
        reference=reference.digest,
        counts=of_rows.counts,
        missing=of_rows.missing,
        outside=of_rows.outside,
        spikes=of_rows.spikes,
        longest=of_rows.longest,
        extremes=of_rows.extremes,
        steps=of_rows.steps,
        row_sums=of_rows.sums,
        class_sums=summed.reshape(windows, count, width),
        output=predictions.output,
        scores=predictions.scores,
        detectors=predictions.detectors,
        sampling=SamplingIntervals()
        .add_spans(spans, max(1, reference.window_rows - 1))
        .add_repeated(of_rows.repeated[:, None]),
        further=_count_further(reference, stats, answers, windows, error_bins),
        errors=predictions.errors,
    )
    if before is not None:
        stack = replace(before.merge(stack), row_sums=stack.row_sums, class_sums=stack.class_sums)
    return stack, tail


def concatenate(stacks: Sequence[Summary]) -> Summary:
    """Concatenate stacks."""
    return _combine(stacks, np.concatenate) if len(stacks) > 1 else stacks[0]


def _map_arrays(summary: Summary, transform: Callable[[np.ndarray], np.ndarray]) -> Summary:
    return _combine([summary], lambda parts: transform(parts[0]))


def _combine(summaries: Sequence[Summary], combine: Callable[[Sequence[np.ndarray]], np.ndarray]) -> Summary:
    def combine_fields(*structs: Any) -> list[np.ndarray]:
        return [combine([getattr(part, name) for part in structs]) for name in structs[0].__struct_fields__]

    plain = {name: combine([getattr(part, name) for part in summaries]) for name in (*_COUNTS, "longest")}
    return Summary(
        reference=summaries[0].reference,
        row_sums=GroupSums(*combine_fields(*(part.row_sums for part in summaries))),
        class_sums=GroupSums(*combine_fields(*(part.class_sums for part in summaries))),
        detectors={name: combine([part.detectors[name] for part in summaries]) for name in summaries[0].detectors},
        extremes=Extremes(*combine_fields(*(part.extremes for part in summaries))),
        sampling=SamplingIntervals(*combine_fields(*(part.sampling for part in summaries))),
        **plain,
    )


_COUNTS = ("counts", "missing", "outside", "spikes", "steps", "output", "scores", "further", "errors")
_ADDED = (*_COUNTS, "row_sums", "class_sums", "sampling")


def _count_further(
    reference: Reference,
    stats: WindowStatistics,
    answers: Float64s | None,
    windows: int,
    error_bins: ErrorBins,
) -> Ints:
    if answers is None or not reference.further:
        return np.zeros((windows, reference.further_cells), np.int64)
    edges, errors = [further.edges for further in reference.further], reference.error_references

    def count_errors(output: FurtherOutput, values: Float64s) -> Ints:
        return errors[output.name].count(stats.values, values, windows, error_bins.get(output.name))

    return count_answers(reference.task.further, edges, answers, windows, count_errors)


def summarize(
    reference: Reference,
    rows: Float64s,
    starts: Ints,
    predicted: Ints,
    top_scores: Float64s | None,
    answers: Float64s | None = None,
) -> Summary:
    """Summarize model windows and the rows (n, F) that they cover, all at once."""
    if not len(starts):
        return Summary.empty(reference)
    statistics = window_statistics.compute_statistics(rows, starts, reference.window_rows, reference.floor)
    covered = rows[window_statistics.covered_rows(starts, reference.window_rows, 0)]
    no_spans = np.empty((1, 0), np.int64)
    stack, _ = summarize_windows(
        reference, covered[None], no_spans, statistics, predicted, top_scores, predicted, answers=answers
    )
    return select_window(stack, 0)
