"""Error model: boosted trees that predict the absolute error of a number from the model's inputs and its answer.

Trees are oblivious (Prokhorenkova et al. 2018, CatBoost): all nodes of one level share a split, so a tree is an index
of `depth` bits into its leaves. Leaves are whole numbers, so the sum over all trees has the same bits everywhere.
"""

from __future__ import annotations

import msgspec
import numpy as np

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.foundation.indices import take

STEPS = 1 << 20  # of a leaf, per mean absolute error
MAX_TREES, MAX_DEPTH = 64, 4
_MAX_LEAF = 1 << 40
MAX_PREDICTION = (MAX_TREES + 1) * _MAX_LEAF
_ROWS_PER_PASS = 1024


class ErrorModel(msgspec.Struct, frozen=True, eq=False):
    """Model of T trees over D statistics of a model window and the answer to it. An unknown input is above no split."""

    base: int
    inputs: Ints  # (T, depth) of each split; D is the answer
    splits: Float64s  # (T, depth)
    leaves: Ints  # (T, 2 ** depth)

    def predict(self, statistics: Float32s | Float64s, answers: Float64s) -> Ints:
        """Return the error (w,), in STEPS per mean absolute error, of `answers` (w,) to windows (w, D)."""
        predicted = np.full(len(answers), self.base, np.int64)
        for begin in range(0, len(answers), _ROWS_PER_PASS):
            part = slice(begin, begin + _ROWS_PER_PASS)
            predicted[part] += self.predict_by_tree(join_inputs(statistics[part], answers[part])).sum(1)
        return predicted

    def predict_by_tree(self, inputs: Float64s) -> Ints:
        """Return the share (w, T) of each tree in the predictions for joined inputs (w, D + 1)."""
        trees, depth = self.inputs.shape
        # By level, so that the bits of all trees add up in one step.
        above = (take(inputs, self.inputs.T.ravel(), axis=1) > self.splits.T.ravel()).view(np.uint8)
        above = above.reshape(-1, depth, trees)
        leaf = above[:, 0].copy()
        for level in range(1, depth):
            leaf |= above[:, level] << level
        return take(self.leaves.ravel(), leaf + (np.arange(trees) << depth), axis=0)

    def is_valid(self, statistics: int) -> bool:
        """Return True if it is a model of bounded size over this number of statistics."""
        trees, depth = self.inputs.shape if self.inputs.ndim == 2 else (0, 0)
        return (
            0 < trees <= MAX_TREES
            and 0 < depth <= MAX_DEPTH
            and self.splits.shape == (trees, depth)
            and self.leaves.shape == (trees, 1 << depth)
            and bool(np.isfinite(self.splits).all())
            and bool(((self.inputs >= 0) & (self.inputs <= statistics)).all())
            and abs(self.base) <= _MAX_LEAF
            and bool(((self.leaves >= -_MAX_LEAF) & (self.leaves <= _MAX_LEAF)).all())
        )


def join_inputs(statistics: Float32s | Float64s, answers: Float64s) -> Float64s:
    """Return the inputs (w, D + 1) of an error model."""
    return np.concatenate([statistics, answers[:, None]], axis=1, dtype=np.float64)
