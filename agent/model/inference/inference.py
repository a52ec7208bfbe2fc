"""Inference: rows to results. Cut, features, model and scores in one order, for devices and for files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.arrays import Float32s, Ints
from agent.model.bundle.manifest import Manifest
from agent.model.inference import derived_features, features, joins, scores
from agent.model.inference.features import WindowCut
from agent.model.inference.joins import JoinedRows
from agent.model.inference.scores import Scores

# Values of all windows that are computed together, 16 MB of float32: windows that overlap repeat their rows.
MAX_VALUES = 4_000_000
NO_JOINED_ROWS: Mapping[str, JoinedRows] = {}


class InferenceResult(msgspec.Struct, frozen=True):
    """Results of w windows; `missing_share` (w,), dequantized `outputs` (w, K) if requested."""

    cut: WindowCut
    scores: Scores
    missing_share: Float32s
    outputs: Float32s | None
    seconds: float = 0.0


class RunnableModel(Protocol):
    """A loaded model: `TfliteModel` in this process, or `SubprocessModel`."""

    seconds: float

    @property
    def outputs(self) -> int: ...

    @property
    def kernels(self) -> str: ...

    @property
    def input_range(self) -> tuple[float, float]: ...

    @property
    def output_range(self) -> tuple[float, float]: ...

    def allocate(self, shape: tuple[int, ...]) -> Float32s:
        """Return an array for the next windows (w, …): the model may read it where it is."""
        ...

    def invoke(self, windows: Float32s) -> Float32s:
        """Return the outputs (w, K) of `windows`. Raises BadBundle."""
        ...


class Inference:
    """A loaded model with its bundle's features and scores."""

    def __init__(self, manifest: Manifest, model: RunnableModel) -> None:
        self.manifest, self.model = manifest, model

    @property
    def fields(self) -> list[str]:
        """Columns that `run` takes, in order."""
        return self.manifest.input.fields

    @property
    def rows(self) -> int:
        """Rows per window; 1 without one."""
        return self.manifest.input.rows

    @property
    def step(self) -> int:
        window = self.manifest.input.window
        return window.step if window else 1

    @property
    def history_rows(self) -> int:
        """Rows before a window that its features read. Pass this many as `history_rows`, as far as they exist."""
        return self.manifest.input.history_rows

    def run(
        self,
        rows: Float32s,
        t: Ints,
        *,
        history_rows: int = 0,
        with_outputs: bool = False,
        joined: Mapping[str, JoinedRows] = NO_JOINED_ROWS,
    ) -> InferenceResult:
        """Run all whole windows of `rows` (n, F), in physical units with NaN for missing, at `t` (n,) epoch µs.

        The first `history_rows` rows are history: no window starts there, and `cut` counts from the row after them. A
        stream run piece by piece, each from the end of `cut.consumed` and with its history, gives the results of the
        whole. `joined` holds the rows of further inputs. Raises BadBundle.
        """
        cut = features.cut_windows(t[history_rows:], self.manifest.input.window)
        if self.manifest.joined:
            cut = self.join(cut, t[history_rows:], joined)
        return self.run_windows(rows, t, cut, history_rows=history_rows, with_outputs=with_outputs)

    def join(self, cut: WindowCut, t: Ints, joined: Mapping[str, JoinedRows]) -> WindowCut:
        """Return the windows of rows at `t` (n,) with the values of further inputs. Raises BadBundle."""
        return replace(cut, joined=joins.join(self.manifest.joined, joined, t[cut.starts + self.rows - 1]))

    def run_windows(
        self, rows: Float32s, t: Ints, cut: WindowCut, *, history_rows: int = 0, with_outputs: bool = False
    ) -> InferenceResult:
        """Run windows that are cut already. Raises BadBundle."""
        spec = self.manifest.input
        columns = derived_features.compute(rows, t, spec, history_rows)
        start_s = self.model.seconds
        block = max(1, MAX_VALUES // (self.rows * columns.shape[1]))
        parts: list[Scores] = []
        outputs: list[Float32s] = []
        for start in range(0, max(1, len(cut.starts)), block):
            starts = cut.starts[start : start + block]
            if cut.joined is None:
                windows = given = features.build_windows(columns, starts, spec, self.model.allocate)
            else:
                windows = features.build_windows(columns, starts, spec)
                further = cut.joined.values[start : start + block]
                given = np.concatenate([windows.reshape(len(starts), -1), further], axis=1)
            out = self.model.invoke(given)
            parts.append(scores.from_outputs(out, self.manifest, windows))
            if with_outputs:
                outputs.append(out)
        missing_share = features.compute_missing_share(columns, cut.starts, spec)
        if cut.joined is not None:
            own, further = self.rows * columns.shape[1], cut.joined.values.shape[1]
            missing_share = ((missing_share * own + cut.joined.missing) / (own + further)).astype(np.float32)
        all_outputs = np.concatenate(outputs) if with_outputs else None
        seconds = self.model.seconds - start_s
        return InferenceResult(cut, scores.concatenate(parts), missing_share, all_outputs, seconds)
