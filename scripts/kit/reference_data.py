"""Input data of tests/kit/reference_values.json, from generators whose output numpy guarantees to stay.

It needs only numpy, so that it runs in the environment of the reference libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
BINS = 32
EXERCISE = Path(__file__).parents[2] / "models" / "sources" / "exercise"
# Name → mean and standard deviation of the compared sample.
SHIFTS = {"alike": (0.0, 1.0), "shift": (0.5, 1.0), "wider": (0.0, 1.5), "far": (3.0, 0.5)}


def samples() -> tuple[Values, dict[str, Values]]:
    """Return (2000,) reference values in units of 1/1024, as a sensor reports them, and (700,) values to compare."""
    rng = np.random.RandomState(20)
    return _sensor(rng.normal(0, 1, 2000)), {name: _sensor(rng.normal(*how, 700)) for name, how in SHIFTS.items()}


def _sensor(values: Values) -> Values:
    return np.round(values * 1024) / 1024


def edges(reference: Values) -> Values:
    """Return the (31,) quantiles."""
    return np.quantile(reference, np.arange(1, BINS) / BINS)


def binned(values: Values, at: Values) -> NDArray[np.int64]:
    """Return the bin of each value, (n,)."""
    return np.searchsorted(at, values, side="right")


class Answers(msgspec.Struct, frozen=True):
    """Answers of an overconfident model with two classes: `p` (n,) of class 1, and `truth`."""

    p: Values
    truth: NDArray[np.int64]

    @property
    def named(self) -> NDArray[np.int64]:
        return (self.p >= 0.5).astype(np.int64)

    @property
    def top(self) -> Values:
        return np.maximum(self.p, 1 - self.p)

    @property
    def right(self) -> NDArray[np.bool_]:
        return np.asarray(self.named == self.truth)


def answers(seed: int, n: int, *, surer: float = 1.8, middle: float = 0.8) -> Answers:
    rng = np.random.RandomState(seed)
    z = rng.normal(middle, surer, n)
    truth = (rng.random_sample(n) < _logistic(z)).astype(np.int64)
    return Answers(_logistic(1.5 * z - 0.3), truth)


def less_sure(seed: int) -> Answers:
    """Return 20,000 later answers, from readings that are harder to classify."""
    return answers(1000 + seed, 20_000, surer=1.2, middle=0.3)


def _logistic(z: Values) -> Values:
    return np.asarray(1 / (1 + np.exp(-z)))


def read_exercise(name: str) -> tuple[Values, NDArray[np.int64]]:
    """Return (n, 7) scores and (n,) truth of the shipped model.

    The source is "crossval", its score table of 1620 answers, or "leave_one_out".
    """
    with np.load(EXERCISE / f"{name}.npz") as held:
        columns: dict[str, Any] = {key: held[key] for key in ("probability", "label")}
    scores = columns["probability"].astype(np.float64)
    return scores / scores.sum(axis=1, keepdims=True), columns["label"].astype(np.int64)
