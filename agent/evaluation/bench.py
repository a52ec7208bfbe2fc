"""Some windows cut out for themselves, with the history their features look at, to change and to answer again."""

from __future__ import annotations

import msgspec
import numpy as np

from agent.arrays import Float64s as Numbers
from agent.evaluation import metrics
from agent.evaluation.bootstrap import BootstrapUnits
from agent.evaluation.examples import LabelledWindows
from agent.evaluation.predictions import LabelledPredictor, evaluation_kind
from agent.model.inference.features import Floats, Ints
from agent.performance.metrics import LabelledPredictions

MAX_WINDOWS = 5000
_MAX_VALUES = 8_000_000


class WindowSample(msgspec.Struct, frozen=True, eq=False):
    """`windows` (m, history + rows, F) physical units; `figures` of the untouched ones."""

    predictor: LabelledPredictor
    examples: LabelledWindows
    units: BootstrapUnits
    windows: Floats
    t: Ints
    starts: Ints
    baseline_metric: Numbers

    @property
    def kind(self) -> str:
        return evaluation_kind(self.predictor.manifest)

    def reevaluate(self, windows: Floats) -> Numbers:
        """(1 + replicates,) the main metric where the windows are these."""
        return metrics.primary_metric(self.kind, self._predict(windows), self.units)

    def metric_drop(self, metric: Numbers) -> Numbers:
        """By how much such figures are worse than those of the untouched windows."""
        off = self.baseline_metric - metric
        return -off if self.kind == "regress" else off

    def _predict(self, windows: Floats) -> LabelledPredictions:
        rows = windows.reshape(-1, windows.shape[2])
        return self.predictor.predict(rows, self.t, self.starts, self.examples.truth, self.examples.label_sets)


def draw_sample(predictor: LabelledPredictor, examples: LabelledWindows, units: BootstrapUnits) -> WindowSample:
    """Of at most MOST_WINDOWS windows, evenly from all."""
    inference = predictor.inference
    history, rows = inference.history_rows, inference.rows
    begins = np.array([of.start for of in examples.dataset.file_slices()])[examples.dataset.file_index[examples.starts]]
    whole = np.flatnonzero(examples.starts - begins >= history)
    if not len(whole):
        whole = np.arange(len(examples))
    most = max(1, min(MAX_WINDOWS, _MAX_VALUES // ((history + rows) * len(inference.fields)), len(whole)))
    picked = whole[np.linspace(0, len(whole) - 1, most).astype(np.int64)]
    some, of = examples.subset(picked), units.subset(picked)
    extents = np.maximum(some.starts[:, None] + np.arange(-history, rows), 0)
    windows, t = some.dataset.values[extents], some.dataset.t[extents].reshape(-1)
    starts = np.arange(len(some)) * (history + rows) + history
    pairs = predictor.predict(windows.reshape(-1, windows.shape[2]), t, starts, some.truth, some.label_sets)
    return WindowSample(
        predictor, some, of, windows, t, starts, metrics.primary_metric(evaluation_kind(predictor.manifest), pairs, of)
    )
