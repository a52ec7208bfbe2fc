"""Rows to answers, piece by piece: what a device would compute of the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.model import features, scores
from agent.model.bundle import Bundle
from agent.model.features import Floats, Ints
from agent.model.runtime import Model
from agent.model.scores import Scores

# Values of all windows that are cut out at once, 16 MB of float32: long windows that overlap repeat their rows.
_MOST_VALUES = 4_000_000


@dataclass(frozen=True, slots=True)
class Answers:
    """Of w windows: `row` (w,) places of their last rows, raw `outputs` (w, K), `full` (w, C) probabilities."""

    row: Ints
    found: Scores
    outputs: Floats
    full: NDArray[np.float64] | None = None


class Engine:
    """A bundle's model with what its manifest says of inputs and outputs."""

    def __init__(self, bundle: Bundle, model: Model) -> None:
        self.manifest, self.model = bundle.manifest, model
        window = self.manifest.input.window
        self.window_rows, self.step = (window.rows, window.step) if window else (1, 1)
        self._most = max(1, _MOST_VALUES // (self.window_rows * len(self.manifest.input.fields)))

    def cut(self, t: Ints) -> features.Cut:
        return features.cut(t, self.manifest.input.window)

    def answer(self, rows: Floats, starts: Ints, *, full: bool = False) -> Iterator[Answers]:
        """The answers for the windows that begin at `starts`, so many at a time."""
        for first in range(0, len(starts), self._most):
            some = starts[first : first + self._most]
            windows = features.windows(rows, some, self.manifest.input)
            outputs = self.model.invoke(windows)
            found = scores.of(outputs, self.manifest, windows)
            every = scores.probabilities(outputs, self.manifest.output) if full and found.label is not None else None
            yield Answers(some + self.window_rows - 1, found, outputs, every)


class Stream:
    """Rows that come in blocks; those that wait for more of their window are kept."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.rows: Floats = np.empty((0, len(engine.manifest.input.fields)), np.float32)
        self.t: Ints = np.empty(0, np.int64)
        self.number: Ints = np.empty(0, np.int64)

    def feed(self, rows: Floats, t: Ints, number: Ints) -> Iterator[tuple[Ints, Answers]]:
        """(number of each answer's row, answers) of all windows that are whole now."""
        rows, t = np.concatenate([self.rows, rows]), np.concatenate([self.t, t])
        number = np.concatenate([self.number, number])
        cut = self._engine.cut(t)
        for answers in self._engine.answer(rows, cut.starts):
            yield number[answers.row], answers
        self.rows, self.t, self.number = rows[cut.consumed :], t[cut.consumed :], number[cut.consumed :]
