"""Output counts: the answers of a model's further outputs as whole numbers, which add in any order.

An output has a cell for each of its labels, then BINS cells for each of its values, or for its score, then BINS for the
error to expect of its first value, if held-out data tell it. Cells of all outputs stand one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints
from outstation.foundation.indices import bincount, repeat

BINS = 32  # quantile bins of a value or a score
MAX_VALUES = 16  # of one output that are monitored
# By the rank of a value's bin: where values lie, and how far from the middle.
RANKS = (np.arange(BINS) + 0.5) / BINS
DISTANCES = np.abs(2 * RANKS - 1)


class FurtherOutput(msgspec.Struct, frozen=True):
    """Further output: its labels, none for numbers, and the names of its values, or that of its score."""

    name: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ("score",)
    has_error: bool | msgspec.UnsetType = msgspec.UNSET  # never set in a reference's file

    @property
    def columns(self) -> int:
        """Numbers of one answer: the index of the label, if there are labels, and the values."""
        return bool(self.labels) + len(self.values)

    @property
    def cells(self) -> int:
        return len(self.labels) + BINS * self.histograms

    @property
    def histograms(self) -> int:
        """Histograms of its answers: of its values, and of the error to expect."""
        return len(self.values) + bool(self.has_error)

    @property
    def shares(self) -> int:
        """Labels whose share is tested."""
        return len(self.labels) if len(self.labels) > 1 else 0

    @property
    def weights(self) -> int:
        """Weighted means of bins that are tested: of a score or the error to expect one, of each number its position
        and its spread.
        """
        return len(self.values) * (1 if self.labels else 2) + bool(self.has_error)

    @property
    def tests(self) -> int:
        return self.shares + self.weights

    def split_cells(self, counts: Ints) -> tuple[Ints, Ints]:
        """Return the counts of labels (..., L), and of values and the error to expect (..., V + 1, BINS)."""
        labels, values = counts[..., : len(self.labels)], counts[..., len(self.labels) :]
        return labels, values.reshape(*counts.shape[:-1], self.histograms, BINS)


def split_outputs(outputs: Sequence[FurtherOutput], counts: Ints) -> Iterator[tuple[FurtherOutput, Ints]]:
    """Yield each output with its part of the counts (..., X)."""
    at = 0
    for output in outputs:
        yield output, counts[..., at : at + output.cells]
        at += output.cells


def count_cells(outputs: Sequence[FurtherOutput]) -> int:
    return sum(output.cells for output in outputs)


def count_answers(
    outputs: Sequence[FurtherOutput],
    edges: Sequence[Float64s],
    answers: Float64s,
    windows: int,
    count_errors: Callable[[FurtherOutput, Float64s], Ints],
) -> Ints:
    """Count answers (w, P), one drift window's after another's; unknown ones, NaN, are left out.

    `edges` holds the inner quantiles (V, BINS - 1) of each output's values; `count_errors` counts an output's first
    values (w,) by the error to expect (W, BINS). Returns (W, X).
    """
    cells = count_cells(outputs)
    first = repeat(np.arange(windows, dtype=np.int64) * cells, len(answers) // max(1, windows))
    places: list[Ints] = []
    errors: list[tuple[int, Ints]] = []
    column, at = 0, 0
    for output, own_edges in zip(outputs, edges, strict=True):
        if output.labels:
            places.append(at + answers[:, column].astype(np.int64) + first)
            column, at = column + 1, at + len(output.labels)
        for quantiles in own_edges:
            values = answers[:, column]
            known = ~np.isnan(values)
            places.append(at + np.searchsorted(quantiles, values[known], side="right") + first[known])
            column, at = column + 1, at + BINS
        if output.has_error:
            errors.append((at, count_errors(output, answers[:, column - len(own_edges)])))
            at += BINS
    counts = bincount(np.concatenate(places), minlength=windows * cells).reshape(windows, cells)
    for at, counted in errors:
        counts[:, at : at + BINS] = counted
    return counts


def weighted_means(counts: Ints, weights: Float64s) -> Float64s:
    """Return the mean (...,) of the bins' `weights` (BINS,) by their counts (..., BINS); NaN without any."""
    n = counts.sum(-1)
    return np.asarray(np.where(n > 0, (counts * weights).sum(-1) / np.maximum(n, 1), np.nan))


def median_value(counts: Ints, quantiles: Float64s) -> float:
    """Return about the median of counts (BINS,) between the inner `quantiles`; the nearest of these beyond them."""
    edges = np.concatenate([quantiles[:1], quantiles, quantiles[-1:]])
    shares = np.concatenate([[0.0], np.cumsum(counts) / max(1, int(counts.sum()))])
    at = int(np.searchsorted(shares, 0.5))
    low, high = shares[max(0, at - 1)], shares[at]
    part = (0.5 - low) / (high - low) if high > low else 0.0
    return float(edges[max(0, at - 1)] + part * (edges[at] - edges[max(0, at - 1)]))
