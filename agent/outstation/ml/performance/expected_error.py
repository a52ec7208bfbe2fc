"""Direct loss estimation (DLE): the absolute error to expect of a number without labels, from the model's inputs.

Source: NannyML's DLE. An error model predicts the error of each answer. Held-out data tell how large errors really
were in each of 32 bins of that prediction, and a drift window how many answers fell in it. Bins of few held-out answers
follow the prediction: a shift moves many answers into them. DLE sees inputs at which the model errs more; it does not
see a relation between inputs and truth that changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.foundation.indices import bincount, repeat
from outstation.ml.performance.cbpe import MAX_BIN_ANSWERS, isotonic_regression
from outstation.ml.performance.error_model import MAX_PREDICTION, STEPS, ErrorModel

ASSUMES = "inputs and truth are related as in the held-out data; no concept drift"
BINS = 32
MIN_SUM, MAX_SUM = 1e-100, 1e100  # of held-out errors, and of their squares
PRIOR = 300.0  # answers that the error model's own prediction counts for in each bin
_ROUNDING = 1e-9  # of a sum
# Bin (w,) of each answer's error to expect, by output; the first output has the name "".
ErrorBins = Mapping[str, NDArray[np.uint8]]
NO_ERROR_BINS: ErrorBins = {}


class ErrorReference(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Errors of held-out answers in each bin of the error that `model` predicted."""

    model: ErrorModel
    edges: Ints  # (31,) inner edges, in steps of the error model
    n: Ints  # (32,) answers
    total: Float64s  # (32,) of their absolute errors
    squares: Float64s  # (32,) sum of the squares of these

    @property
    def mean(self) -> float:
        """Mean absolute error of the held-out answers."""
        return float(self.total.sum() / self.n.sum())

    @cached_property
    def _predicted(self) -> Float64s:
        """(32,) error that the model predicts in the middle of each bin, as a share of the mean.

        An outermost bin is as wide as the next.
        """
        edges = self.edges / STEPS
        edges = np.concatenate([[2 * edges[0] - edges[1]], edges, [2 * edges[-1] - edges[-2]]])
        return np.maximum((edges[1:] + edges[:-1]) / 2, 0.0)

    @cached_property
    def bin_error(self) -> Float64s:
        """(32,) mean absolute error, ascending."""
        return self._ascend(self.total, self._predicted)

    @cached_property
    def bin_square(self) -> Float64s:
        """(32,) mean square of the error, ascending."""
        return self._ascend(self.squares, self._predicted**2)

    def _ascend(self, total: Float64s, predicted: Float64s) -> Float64s:
        """Return the ascending means (32,) of held-out sums (32,) and of PRIOR answers that follow `predicted` (32,).

        Over the held-out answers they have the mean of these.
        """
        weight, mean = np.asarray(self.n + PRIOR, np.float64), float(total.sum() / self.n.sum())
        means = isotonic_regression((total + PRIOR * mean * predicted) / weight, weight)
        return np.asarray(means * (total.sum() / float((self.n * means).sum())), np.float64)

    @property
    def bin_ratio(self) -> Float64s:
        """(32,) mean absolute error as a share of that of all held-out answers."""
        return self.bin_error / self.mean

    def count(
        self, statistics: Float32s | Float64s, answers: Float64s, windows: int, bins: NDArray[np.uint8] | None = None
    ) -> Ints:
        """Count `answers` (w,) to model windows of statistics (w, D), one drift window's after another's, by bin.

        Returns (W, 32); answers that are no finite number are left out. Each answer's bin is written to `bins` (w,).
        """
        places = self.find_bins(statistics, answers)
        if bins is not None:
            bins[:] = places
        places += BINS * repeat(np.arange(windows, dtype=np.int64), len(answers) // max(1, windows))
        return bincount(places[np.isfinite(answers)], minlength=windows * BINS).reshape(windows, BINS)

    def find_bins(self, statistics: Float32s | Float64s, answers: Float64s) -> Ints:
        """Return the bin (w,) of the error to expect of `answers` (w,) to model windows (w, D).

        That of an answer that is no number means nothing.
        """
        bins = np.searchsorted(self.edges, self.model.predict(statistics, answers), side="right")
        return bins.astype(np.int64, copy=False)

    def estimate(self, counts: Ints) -> dict[str, Any] | None:
        """Return the expected error of answers counted by bin (32,), with its 95 % interval; None without answers.

        The interval covers chance in the window's answers and in the held-out ones, not the error model's own errors.
        """
        answers = int(counts.sum())
        if not answers:
            return None
        share = counts / answers
        mae = float((share * self.bin_error).sum())
        variance = np.maximum(self.bin_square - self.bin_error**2, 0.0)
        spread = 1.96 * float(np.sqrt((share * variance / answers + share**2 * variance / (self.n + 1)).sum()))
        error = {
            "mae": mae,
            "mae_low": max(0.0, mae - spread),
            "mae_high": mae + spread,
            "rmse": float(np.sqrt((share * self.bin_square).sum())),
        }
        rounded = {name: float(f"{value:.4g}") for name, value in error.items()}
        return {**rounded, "method": "dle", "assumes": ASSUMES}

    def is_valid(self, statistics: int) -> bool:
        """Return True if its parts agree, for model windows with this number of statistics."""
        sums = np.stack([self.total, self.squares]) if self.total.shape == self.squares.shape == (BINS,) else None
        return (
            self.model.is_valid(statistics)
            and self.edges.shape == (BINS - 1,)
            and bool((self.edges[1:] >= self.edges[:-1]).all())
            and -MAX_PREDICTION <= int(self.edges[0]) <= int(self.edges[-1]) <= MAX_PREDICTION
            and self.n.shape == (BINS,)
            and bool(((self.n >= 0) & (self.n <= MAX_BIN_ANSWERS)).all() and self.n.any())
            and sums is not None
            and bool(((sums >= 0) & (sums <= MAX_SUM)).all())
            and bool(self.total.sum() >= MIN_SUM)
            and self._has_possible_squares()
        )

    def _has_possible_squares(self) -> bool:
        """Return True if n absolute errors can have these sums: total² / n ≤ squares ≤ total²."""
        square, more = self.total**2, self.squares * (1 + _ROUNDING)
        return bool(((square <= self.n * more) & (self.squares <= square * (1 + _ROUNDING))).all())
