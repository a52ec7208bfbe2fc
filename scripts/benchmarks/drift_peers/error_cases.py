"""Regression models with held-out labels, and later rows whose errors are known: made ones, and the shipped `solar`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.ml.datasets.recordings import load
from outstation.ml.datasets.training_data import TrainingData
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.inference import runtime
from outstation.workbench.authoring import calibration
from outstation.workbench.simulate.scenario import SCENARIOS

SEEDS, WINDOWS, ROWS = 5, 40, 500
HELD_OUT = (1_000, 10_000)
CONCEPT_DRIFT = "another truth"
SOLAR_ROWS, SOLAR_DAYS = 96 * 7, 365  # a week; days of held-out labels

Floats = NDArray[np.float64]


class Answers(msgspec.Struct, frozen=True):
    """Inputs (n, D), answers and errors (n,)."""

    inputs: Floats
    answers: Floats
    errors: Floats

    def part(self, index: slice) -> Answers:
        return Answers(self.inputs[index], self.answers[index], self.errors[index])

    def windows(self, rows: int) -> Iterator[Answers]:
        return (self.part(slice(at, at + rows)) for at in range(0, len(self.answers) - rows + 1, rows))


class Case(msgspec.Struct, frozen=True):
    """Held-out answers, and later ones after each change, in windows of `rows`; cases of one name are repetitions."""

    data: str
    held_out: Answers
    later: dict[str, Answers]
    rows: int = ROWS

    def true_errors(self) -> dict[str, list[float]]:
        """Return the mean absolute error of each window, by change."""
        return {
            change: [float(np.abs(window.errors).mean()) for window in later.windows(self.rows)]
            for change, later in self.later.items()
        }


def _make_growing(random: np.random.Generator, n: int, shift: float, spread: float, growth: float) -> Answers:
    """Noise that grows with one input and the size of another, and a product that the model does not know."""
    inputs = random.normal(size=(n, 6))
    inputs[:, 0] = inputs[:, 0] * spread + shift
    answers = 2 * inputs[:, 0] + np.sin(2 * inputs[:, 1])
    noise = (0.3 + 0.25 * np.exp(0.7 * inputs[:, 0]) + 0.4 * np.abs(inputs[:, 1])) * random.normal(size=n)
    return Answers(inputs, answers, growth * (inputs[:, 2] * inputs[:, 3] + noise))


def _make_friedman(random: np.random.Generator, n: int, shift: float, spread: float, growth: float) -> Answers:
    """Friedman's first function (1991, Multivariate adaptive regression splines), under a model that is linear."""
    x = random.beta(1 / spread + max(shift, 0.0), 1 / spread + max(-shift, 0.0), (n, 10))
    truth = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    answers = 8 + 6 * (x[:, 0] - 0.5) + 6 * (x[:, 1] - 0.5) + 10 * x[:, 3] + 5 * x[:, 4]
    return Answers(x, answers, growth * (truth + (0.5 + 2 * x[:, 3] ** 2) * random.normal(size=n) - answers))


_Make = Callable[[np.random.Generator, int, float, float, float], Answers]
# Shift and spread of the inputs, and a factor on the errors, which no input shows.
_CHANGES = {
    "none": (0.0, 1.0, 1.0),
    "inputs shift up": (0.7, 1.0, 1.0),
    "inputs shift down": (-0.7, 1.0, 1.0),
    "inputs spread": (0.0, 1.3, 1.0),
    "inputs shift far": (2.0, 1.0, 1.0),
    CONCEPT_DRIFT: (0.0, 1.0, 1.5),
}
MADE: dict[str, _Make] = {"growing noise": _make_growing, "Friedman": _make_friedman}


def make_answers(data: str, seed: int, n: int, change: str = "none") -> Answers:
    return MADE[data](np.random.default_rng([seed, n, [*_CHANGES].index(change)]), n, *_CHANGES[change])


def list_cases(seeds: int = SEEDS, windows: int = WINDOWS) -> list[Case]:
    cases = []
    for data in MADE:
        for n in HELD_OUT:
            for seed in range(seeds):
                later = {change: make_answers(data, seed, windows * ROWS, change) for change in _CHANGES}
                cases.append(Case(f"{data}, {n:,} held out", make_answers(data, 1000 + seed, n), later))
    return [*cases, _solar_case()]


def _solar_case() -> Case:
    """Answers of the shipped model, after it was trained: a year of labels, and the weeks after it."""
    file = SCENARIOS["solar"].file
    own, recorded = bundle.read(builtin.bundles_dir() / "solar", builtin.publisher_keys()), load(file)
    rows = recorded.select(file, own.manifest.input.fields)
    data = TrainingData(rows, recorded.epoch_us(0.0), None)
    result = calibration.run_model(runtime.TfliteModel(own.model_bytes), own.manifest, file, data, {})
    assert result.scores.value is not None
    answers = result.scores.value.astype(np.float64)
    truth = recorded.columns["power"][result.cut.starts]
    every = Answers(rows[result.cut.starts].astype(np.float64), answers, truth - answers)
    known, year = np.isfinite(every.errors), SOLAR_DAYS * 96
    every = Answers(every.inputs[known], answers[known], every.errors[known])
    weeks = (len(every.answers) - year) // SOLAR_ROWS
    later = {"later weeks": every.part(slice(year, year + weeks * SOLAR_ROWS))}
    return Case("solar, a year held out", every.part(slice(year)), later, SOLAR_ROWS)
