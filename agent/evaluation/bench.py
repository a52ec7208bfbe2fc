"""Some windows cut out for themselves, with the history their features look at, to change and to answer again."""

from __future__ import annotations

import msgspec
import numpy as np

from agent.arrays import Floats as Numbers
from agent.evaluation import metrics
from agent.evaluation.bootstrap import Units
from agent.evaluation.examples import Examples
from agent.evaluation.predictions import Judge, kind_of
from agent.model.inference.features import Floats, Ints
from agent.performance.metrics import Pairs

MOST_WINDOWS = 5000
_MOST_VALUES = 8_000_000


class Bench(msgspec.Struct, frozen=True, eq=False):
    """`windows` (m, history + rows, F) physical units; `figures` of the untouched ones."""

    judge: Judge
    examples: Examples
    units: Units
    windows: Floats
    t: Ints
    starts: Ints
    figures: Numbers

    @property
    def kind(self) -> str:
        return kind_of(self.judge.manifest)

    def again(self, windows: Floats) -> Numbers:
        """(1 + replicates,) the main metric where the windows are these."""
        return metrics.main(self.kind, self._pairs(windows), self.units)

    def worse(self, figures: Numbers) -> Numbers:
        """By how much such figures are worse than those of the untouched windows."""
        off = self.figures - figures
        return -off if self.kind == "regress" else off

    def _pairs(self, windows: Floats) -> Pairs:
        rows = windows.reshape(-1, windows.shape[2])
        return self.judge.pairs(rows, self.t, self.starts, self.examples.truth, self.examples.sets)


def make(judge: Judge, examples: Examples, units: Units) -> Bench:
    """Of at most MOST_WINDOWS windows, evenly from all."""
    inference = judge.inference
    history, rows = inference.history, inference.rows
    begins = np.array([of.start for of in examples.source.files_rows()])[examples.source.part[examples.starts]]
    whole = np.flatnonzero(examples.starts - begins >= history)
    if not len(whole):
        whole = np.arange(len(examples))
    most = max(1, min(MOST_WINDOWS, _MOST_VALUES // ((history + rows) * len(inference.fields)), len(whole)))
    picked = whole[np.linspace(0, len(whole) - 1, most).astype(np.int64)]
    some, of = examples.pick(picked), units.pick(picked)
    extents = np.maximum(some.starts[:, None] + np.arange(-history, rows), 0)
    windows, t = some.source.rows[extents], some.source.t[extents].reshape(-1)
    starts = np.arange(len(some)) * (history + rows) + history
    pairs = judge.pairs(windows.reshape(-1, windows.shape[2]), t, starts, some.truth, some.sets)
    return Bench(judge, some, of, windows, t, starts, metrics.main(kind_of(judge.manifest), pairs, of))
