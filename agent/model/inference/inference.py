"""Rows in, answers out: cut, features, invoke and scores in the one order, for the device and for files alike."""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np

from agent.model.bundle.manifest import Manifest
from agent.model.inference import derived_features, features, runtime, scores
from agent.model.inference.features import Cut, Floats, Ints
from agent.model.inference.runtime import Model
from agent.model.inference.scores import Scores
from agent.model.inference.tuning import Choice

# Values of all windows that are computed together, 16 MB of float32: windows that overlap repeat their rows.
MOST_VALUES = 4_000_000


class Answers(msgspec.Struct, frozen=True):
    """Of w windows, which begin at `cut.starts` and are `Inference.rows` long.

    `missing` (w,) share of each window's values that were missing; `outputs` (w, K), dequantized, where asked for.
    `seconds` in the model.
    """

    cut: Cut
    scores: Scores
    missing: Floats
    outputs: Floats | None
    seconds: float = 0.0


class Runs(Protocol):
    """A loaded model, in this process (`runtime.Model`) or in one of its own (`Apart`)."""

    seconds: float

    @property
    def outputs(self) -> int: ...

    @property
    def input_range(self) -> tuple[float, float]: ...

    def invoke(self, windows: Floats) -> Floats:
        """Outputs (w, K) of `windows`. Raises BadBundle."""
        ...


def load(manifest: Manifest, content: bytes, choice: Choice | None = None) -> Model:
    """The model as the manifest uses it, run as it was chosen to be. Raises BadBundle."""
    batch, threads = (choice.batch, choice.threads) if choice else (runtime.BATCH, 1)
    return runtime.Model(content, batch, threads, manifest.output.tensor)


class Inference:
    """A loaded model with its bundle's definition of features and scores."""

    def __init__(self, manifest: Manifest, model: Runs) -> None:
        self.manifest, self.model = manifest, model

    @property
    def fields(self) -> list[str]:
        """The columns that `run` takes, in order."""
        return self.manifest.input.fields

    @property
    def rows(self) -> int:
        """Rows of a window; 1 without one."""
        return self.manifest.input.rows

    @property
    def step(self) -> int:
        window = self.manifest.input.window
        return window.step if window else 1

    @property
    def history(self) -> int:
        """How many rows before a window its features look at: give so many as `before`, as far as they are there."""
        return self.manifest.input.history

    def run(self, rows: Floats, t: Ints, *, before: int = 0, raw: bool = False) -> Answers:
        """All whole windows of `rows` (n, F), physical units, NaN missing, at `t` (n,) epoch µs.

        The first `before` rows are history: no window begins there, and `cut` counts from the row after. A stream run
        piece by piece, each from where `cut.consumed` of the one before ended, with its history, gives the answers of
        the whole. Raises BadBundle.
        """
        return self.answer(rows, t, features.cut(t[before:], self.manifest.input.window), before=before, raw=raw)

    def answer(self, rows: Floats, t: Ints, cut: Cut, *, before: int = 0, raw: bool = False) -> Answers:
        """`run`, for windows that were cut already."""
        spec = self.manifest.input
        columns = derived_features.columns(rows, t, spec, before)
        begun_s = self.model.seconds
        each = max(1, MOST_VALUES // (self.rows * columns.shape[1]))
        found: list[Scores] = []
        outputs: list[Floats] = []
        for start in range(0, max(1, len(cut.starts)), each):
            windows = features.windows(columns, cut.starts[start : start + each], spec)
            out = self.model.invoke(windows)
            found.append(scores.of(out, self.manifest, windows))
            if raw:
                outputs.append(out)
        gone = features.missing(columns, cut.starts, spec)
        seconds = self.model.seconds - begun_s
        return Answers(cut, scores.joined(found), gone, np.concatenate(outputs) if raw else None, seconds)
