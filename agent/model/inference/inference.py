"""Rows in, answers out: cut, features, invoke and scores in the one order, for the device and for files alike."""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np

from agent.model.bundle.manifest import Manifest
from agent.model.inference import derived_features, features, runtime, scores
from agent.model.inference.features import Floats, Ints, WindowCut
from agent.model.inference.runtime import TfliteModel
from agent.model.inference.scores import Scores
from agent.model.inference.tuning import Tuning

# Values of all windows that are computed together, 16 MB of float32: windows that overlap repeat their rows.
MAX_VALUES = 4_000_000


class InferenceResult(msgspec.Struct, frozen=True):
    """Of w windows, which begin at `cut.starts` and are `Inference.rows` long.

    `missing` (w,) share of each window's values that were missing; `outputs` (w, K), dequantized, where asked for.
    `seconds` in the model.
    """

    cut: WindowCut
    scores: Scores
    missing_share: Floats
    outputs: Floats | None
    seconds: float = 0.0


class RunnableModel(Protocol):
    """A loaded model, in this process (`runtime.Model`) or in one of its own (`Apart`)."""

    seconds: float

    @property
    def outputs(self) -> int: ...

    @property
    def input_range(self) -> tuple[float, float]: ...

    def invoke(self, windows: Floats) -> Floats:
        """Outputs (w, K) of `windows`. Raises BadBundle."""
        ...


def load_model(manifest: Manifest, content: bytes, tuning: Tuning | None = None) -> TfliteModel:
    """The model as the manifest uses it, run as it was chosen to be. Raises BadBundle."""
    batch, threads = (tuning.batch, tuning.threads) if tuning else (runtime.DEFAULT_BATCH, 1)
    return runtime.TfliteModel(content, batch, threads, manifest.output.tensor)


class Inference:
    """A loaded model with its bundle's definition of features and scores."""

    def __init__(self, manifest: Manifest, model: RunnableModel) -> None:
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
    def history_rows(self) -> int:
        """How many rows before a window its features look at: give so many as `before`, as far as they are there."""
        return self.manifest.input.history_rows

    def run(self, rows: Floats, t: Ints, *, history_rows: int = 0, with_outputs: bool = False) -> InferenceResult:
        """All whole windows of `rows` (n, F), physical units, NaN missing, at `t` (n,) epoch µs.

        The first `before` rows are history: no window begins there, and `cut` counts from the row after. A stream run
        piece by piece, each from where `cut.consumed` of the one before ended, with its history, gives the answers of
        the whole. Raises BadBundle.
        """
        return self.run_windows(
            rows,
            t,
            features.cut_windows(t[history_rows:], self.manifest.input.window),
            history_rows=history_rows,
            with_outputs=with_outputs,
        )

    def run_windows(
        self, rows: Floats, t: Ints, cut: WindowCut, *, history_rows: int = 0, with_outputs: bool = False
    ) -> InferenceResult:
        """`run`, for windows that were cut already."""
        spec = self.manifest.input
        columns = derived_features.compute(rows, t, spec, history_rows)
        begun_s = self.model.seconds
        each = max(1, MAX_VALUES // (self.rows * columns.shape[1]))
        found: list[Scores] = []
        outputs: list[Floats] = []
        for start in range(0, max(1, len(cut.starts)), each):
            windows = features.build_windows(columns, cut.starts[start : start + each], spec)
            out = self.model.invoke(windows)
            found.append(scores.from_outputs(out, self.manifest, windows))
            if with_outputs:
                outputs.append(out)
        gone = features.compute_missing_share(columns, cut.starts, spec)
        seconds = self.model.seconds - begun_s
        return InferenceResult(
            cut, scores.concatenate(found), gone, np.concatenate(outputs) if with_outputs else None, seconds
        )
