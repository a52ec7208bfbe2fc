"""Inference: rows to results. Cut, features, model and scores in one order, for devices and for files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.errors import ModelProcessFailed
from outstation.ml.model.bundle.manifest import Manifest
from outstation.ml.model.inference import derived_features, features, scores
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.model_windows import InputMemory, ModelWindows, WindowBuilder
from outstation.ml.model.inference.quantization import Quantization
from outstation.ml.model.inference.scores import Scores

if TYPE_CHECKING:
    from outstation.ml.model.inference.joins import JoinedRows

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


class ModelRun(Protocol):
    """Run of a model: started, done in `seconds`, or failed."""

    seconds: float
    failure: ModelProcessFailed | None


class StartedWindows(msgspec.Struct, frozen=True, eq=False):
    """Windows that a model computes."""

    windows: ModelWindows
    run: ModelRun


class RunnableModel(InputMemory, Protocol):
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

    @property
    def output(self) -> Quantization: ...

    @property
    def is_concurrent(self) -> bool:
        """Return True if a started run continues while this process computes something else."""
        ...

    def start_run(self, windows: NDArray[Any]) -> ModelRun:
        """Start to compute windows (w, n), in the input's numbers. Raises BadBundle."""
        ...

    def wait(self, run: Any) -> NDArray[Any]:
        """Return the outputs (w, K) of a run, in the tensor's numbers. Raises BadBundle."""
        ...

    def invoke(self, windows: Float32s) -> Float32s:
        """Return the outputs (w, K) of `windows` (w, …). Raises BadBundle."""
        ...


class Inference:
    """A loaded model with its bundle's features and scores."""

    def __init__(self, manifest: Manifest, model: RunnableModel) -> None:
        self.manifest, self.model = manifest, model
        self._builder = WindowBuilder(manifest)

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
        from outstation.ml.model.inference import joins

        return replace(cut, joined=joins.join(self.manifest.joined, joined, t[cut.starts + self.rows - 1]))

    def run_windows(
        self, rows: Float32s, t: Ints, cut: WindowCut, *, history_rows: int = 0, with_outputs: bool = False
    ) -> InferenceResult:
        """Run windows that are cut already. Raises BadBundle."""
        columns = derived_features.compute(rows, t, self.manifest.input, history_rows)
        block = max(1, MAX_VALUES // (self.rows * columns.shape[1]))
        results: list[InferenceResult] = []
        for start in range(0, max(1, len(cut.starts)), block):
            part = slice(start, start + block)
            joined = None if cut.joined is None else cut.joined[part]
            windows = self._builder.build(columns, cut.starts[part], self.model, joined)
            results.append(self.finish(self.start(windows), cut, with_outputs=with_outputs))
        return results[0] if len(results) == 1 else _join(results)

    def prepare(self, rows: Float32s, t: Ints, cut: WindowCut, *, history_rows: int = 0) -> ModelWindows:
        """Build windows of at most MAX_VALUES values for `start`, with arguments of `run_windows`. Raises BadBundle."""
        columns = derived_features.compute(rows, t, self.manifest.input, history_rows)
        return self._builder.build(columns, cut.starts, self.model, cut.joined)

    def start(self, windows: ModelWindows) -> StartedWindows:
        """Start to run windows. Raises BadBundle."""
        return StartedWindows(windows, self.model.start_run(windows.numbers))

    def finish(self, started: StartedWindows, cut: WindowCut, *, with_outputs: bool = False) -> InferenceResult:
        """Wait for the outputs of windows that were started, and compute the scores. Raises BadBundle."""
        numbers, output = self.model.wait(started.run), self.model.output
        outputs = output.dequantize(numbers) if with_outputs else None
        model_scores = started.windows.score(numbers, output)
        return InferenceResult(cut, model_scores, started.windows.missing_share, outputs, started.run.seconds)


def _join(results: list[InferenceResult]) -> InferenceResult:
    outputs = [result.outputs for result in results if result.outputs is not None]
    return InferenceResult(
        results[0].cut,
        scores.concatenate([result.scores for result in results]),
        np.concatenate([result.missing_share for result in results]),
        np.concatenate(outputs) if outputs else None,
        sum(result.seconds for result in results),
    )
