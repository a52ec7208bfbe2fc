"""Temperature, calibration error and the score table, from predictions on subjects the net never saw. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BINS = 32
STEP = 1 / 256  # what one count of the int8 output is worth


@dataclass(frozen=True)
class Predictions:
    """Probabilities (w, K) for windows with labels (w,), and the subject of each (w,)."""

    probability: NDArray[np.float64]
    label: NDArray[np.int64]
    subject: NDArray[np.int64]

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.probability.argmax(1) == self.label


def load(path: Path) -> Predictions:
    with np.load(path, allow_pickle=False) as z:
        return Predictions(z["probability"].astype(np.float64), z["label"].astype(int), z["subject"].astype(int))


def as_int8(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """What an int8 output can say of it: multiples of 1/256, at most 255/256."""
    return np.clip(np.round(probability / STEP), 0, 255) * STEP


def calibrated(probability: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """p ** (1 / T), normalised; the first of several equal scores stays the answer."""
    raised = probability ** (1 / temperature)
    return np.asarray(raised / raised.sum(1, keepdims=True))


def fit_temperature(predictions: Predictions) -> float:
    """The temperature of least log loss (Guo et al. 2017, arXiv:1706.04599), to three decimals."""
    seen = as_int8(predictions.probability)
    rows = np.arange(len(seen))

    def loss(temperature: float) -> float:
        p = calibrated(seen, temperature)[rows, predictions.label]
        return float(-np.log(np.maximum(p, STEP / 2)).mean())

    grid = np.round(np.arange(0.3, 3.0, 0.005), 3)
    return float(grid[np.argmin([loss(t) for t in grid])])


def calibration_error(top: NDArray[np.float64], right: NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error of the top score, over bins of equal width."""
    which = np.minimum((top * bins).astype(int), bins - 1)
    gap = [abs(top[which == b].sum() - right[which == b].sum()) for b in range(bins)]
    return float(np.sum(gap) / len(top))


def score_table(predictions: Predictions, temperature: float) -> dict[str, list[float] | list[int]]:
    """Windows and right answers per bin of the calibrated top score.

    Bin i is edges[i] <= score < edges[i + 1], the last one closed.
    """
    top = calibrated(as_int8(predictions.probability), temperature).max(1)
    # Quantiles of the distinct scores: the int8 output repeats the highest ones, and equal edges would make empty bins.
    edges = np.quantile(np.unique(top.round(6)), np.linspace(0, 1, BINS + 1)).round(6)
    edges[0], edges[-1] = 0.0, 1.0
    count, _ = np.histogram(top, edges)
    correct, _ = np.histogram(top[predictions.right], edges)
    return {"edges": edges.tolist(), "count": count.tolist(), "correct": correct.tolist()}
