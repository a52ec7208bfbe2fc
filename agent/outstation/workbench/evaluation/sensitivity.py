"""Sensitivity of a model: what each field is worth, and what sensor faults of growing strength do.

Field importance is permutation importance (Breiman 2001; Fisher, Rudin, Dominici 2019) by whole windows: a field's rows
in a window are replaced by those of another window, so that their order stays. Fields of one unit are also replaced
together, because the model misses neither of two fields that carry the same information. The faults are those that
devices report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.random import Generator

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.ml.model.inference import joins
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.inference.joins import JoinedValues
from outstation.ml.performance.metrics import primary
from outstation.workbench.evaluation import evaluation_metrics, examples
from outstation.workbench.evaluation.bootstrap import BootstrapUnits, percentile_interval
from outstation.workbench.evaluation.document import FieldImportance, RobustnessCurve, RobustnessPoint
from outstation.workbench.evaluation.examples import LabelledWindows
from outstation.workbench.evaluation.predictions import evaluation_kind, pair_with_truth

REPEATS = 5
NO_FAULT = "none"  # strength at which nothing is changed
_MAX_WINDOWS = 5000
_MAX_VALUES = 8_000_000
_MAX_FIELDS = 64


class WindowSample(msgspec.Struct, frozen=True, eq=False):
    """Sample of windows (m, history + rows, F); `baseline` (1 + replicates,) is their primary metric, unchanged."""

    inference: Inference
    labelled: LabelledWindows
    units: BootstrapUnits
    windows: Float32s
    t: Ints
    starts: Ints
    baseline: Float64s
    joined: JoinedValues | None = None

    @property
    def kind(self) -> str:
        return evaluation_kind(self.inference.manifest)

    def reevaluate(self, windows: Float32s) -> Float64s:
        """Return the primary metric (1 + replicates,) with other values in the windows."""
        rows, labelled = windows.reshape(-1, windows.shape[2]), self.labelled
        result = self.inference.run_windows(rows, self.t, WindowCut(self.starts, len(rows), self.joined))
        predictions = pair_with_truth(self.inference.manifest, result, labelled.truth, labelled.label_sets)
        return evaluation_metrics.primary_metric(self.kind, predictions, self.units)

    def metric_drop(self, metric: Float64s) -> Float64s:
        """Return how much worse a metric is than the baseline."""
        drop = self.baseline - metric
        return -drop if primary(self.kind).direction == "lower" else drop


def draw_sample(inference: Inference, labelled: LabelledWindows, units: BootstrapUnits) -> WindowSample:
    """Return a sample of at most 5000 windows, evenly from all."""
    candidates = find_windows_with_history(inference, labelled)
    count = max(1, min(_MAX_WINDOWS, max_windows(inference), len(candidates)))
    picked = candidates[np.linspace(0, len(candidates) - 1, count).astype(np.int64)]
    sample = cut_sample(inference, labelled.subset(picked), units.subset(picked))
    return msgspec.structs.replace(sample, baseline=sample.reevaluate(sample.windows))


def max_windows(inference: Inference) -> int:
    """Return how many windows are held in memory at most."""
    return max(1, _MAX_VALUES // ((inference.history_rows + inference.rows) * len(inference.fields)))


def find_windows_with_history(inference: Inference, labelled: LabelledWindows) -> Ints:
    """Return the windows whose derived features have all their rows; all windows if none have."""
    file_starts = np.array([part.start for part in labelled.dataset.file_slices()])
    since = labelled.starts - file_starts[labelled.dataset.file_index[labelled.starts]]
    with_history = since >= inference.history_rows
    return np.flatnonzero(with_history) if with_history.any() else np.arange(len(labelled))


def cut_sample(inference: Inference, labelled: LabelledWindows, units: BootstrapUnits) -> WindowSample:
    """Return these windows in ascending order with their history, without a baseline."""
    history, rows = inference.history_rows, inference.rows
    extents = np.maximum(labelled.starts[:, None] + np.arange(-history, rows), 0)
    windows, t = labelled.dataset.values[extents], labelled.dataset.t[extents].reshape(-1)
    starts = np.arange(len(labelled), dtype=np.int64) * (history + rows) + history
    files = range(len(labelled.dataset.files) if inference.manifest.joined else 0)
    cuts = [examples.cut_at(inference, labelled.dataset, labelled.starts, i) for i in files]
    joined = joins.concatenate([cut.joined for cut in cuts])
    return WindowSample(inference, labelled, units, windows, t, starts, np.empty(0), joined)


def permutation_importance(sample: WindowSample, seed: int) -> list[FieldImportance]:
    """Return the importance of single fields, the largest first, then of the fields of each unit together."""
    field_count = min(len(sample.inference.fields), _MAX_FIELDS)
    single = [_field_importance(sample, [i], seed) for i in range(field_count)]
    single.sort(key=lambda importance: -(importance.metric_drop.value or 0.0))
    units = sample.inference.manifest.input.units
    by_unit = [[i for i, other in enumerate(units) if other == unit] for unit in dict.fromkeys(units) if unit]
    together = [fields for fields in by_unit if len(fields) > 1] if len(by_unit) > 1 else []
    return single + [_field_importance(sample, fields, seed) for fields in together]


def _field_importance(sample: WindowSample, field_indices: Sequence[int], seed: int) -> FieldImportance:
    rng = np.random.default_rng([seed, *field_indices])
    drops = []
    for _ in range(REPEATS):
        changed = sample.windows.copy()
        changed[:, :, field_indices] = sample.windows[rng.permutation(len(changed))][:, :, field_indices]
        drops.append(sample.metric_drop(sample.reevaluate(changed)))
    names = [sample.inference.fields[i] for i in field_indices]
    return FieldImportance(fields=names, metric_drop=percentile_interval(np.mean(drops, axis=0)))


class _FaultKind(msgspec.Struct, frozen=True):
    """Fault to inject into windows (m, L, F), given spread and centre (F,); at `neutral_strength` nothing changes."""

    name: str
    meaning: str
    strengths: Sequence[float]
    strength_format: str
    inject: Callable[[Float32s, float, Generator, Float32s, Float32s], Float32s]
    neutral_strength: float = 0.0


def sweep_faults(sample: WindowSample, seed: int) -> list[RobustnessCurve]:
    flat = sample.windows.reshape(-1, sample.windows.shape[2])
    centre = np.nan_to_num(np.nanmean(flat, axis=0)) if np.isfinite(flat).any() else np.zeros(flat.shape[1], np.float32)
    spread = np.nan_to_num(np.nanstd(flat, axis=0)) if np.isfinite(flat).any() else centre
    curves = []
    for kind in _fault_kinds(flat.shape[1]):
        points = []
        for strength in kind.strengths:
            text, metric = NO_FAULT, sample.baseline
            if strength != kind.neutral_strength:
                rng = np.random.default_rng([seed, round(strength * 1000)])
                changed = kind.inject(sample.windows.copy(), strength, rng, spread, centre)
                text, metric = kind.strength_format.format(strength), sample.reevaluate(changed)
            value = evaluation_metrics.primary_interval(sample.kind, metric, sample.labelled.truth, sample.units)
            points.append(RobustnessPoint(strength=text, value=value))
        curves.append(RobustnessCurve(fault=kind.name, meaning=kind.meaning, points=points))
    return curves


def _fault_kinds(field_count: int) -> list[_FaultKind]:
    counts = sorted({0, 1, 2, max(1, field_count // 2), field_count} & set(range(field_count + 1)))
    limits, levels = (math.inf, 2, 1, 0.5), (0, 0.1, 0.25, 0.5, 1)
    pairs = sorted({0, 1, field_count // 2})
    kinds = [
        _FaultKind("noise", "noise on every field, in its standard deviations", levels, "{:g}", _add_noise),
        _FaultKind("gain", "every value multiplied by a factor", (0.5, 0.75, 0.9, 1, 1.1, 1.5), "{:g}", _apply_gain, 1),
        _FaultKind("missing", "values missing at random", (0, 0.05, 0.1, 0.25, 0.5), "{:.0%}", _drop_values),
        _FaultKind("stuck", "fields that repeat one value, drawn for each window", counts, "{:g}", _freeze_fields),
        _FaultKind("saturated", "values cut off at standard deviations", limits, "{:g}", _saturate, math.inf),
    ]
    if field_count > 1:
        kinds.append(
            _FaultKind("swapped", "pairs of fields swapped, drawn for each window", pairs, "{:g}", _swap_fields)
        )
    return kinds


def _add_noise(windows: Float32s, strength: float, rng: Generator, spread: Float32s, _: Float32s) -> Float32s:
    windows += rng.standard_normal(windows.shape, np.float32) * (spread * np.float32(strength))
    return windows


def _apply_gain(windows: Float32s, strength: float, *_: object) -> Float32s:
    windows *= np.float32(strength)
    return windows


def _drop_values(windows: Float32s, strength: float, rng: Generator, *_: Float32s) -> Float32s:
    windows[rng.random(windows.shape, np.float32) < strength] = np.nan
    return windows


def _freeze_fields(windows: Float32s, strength: float, rng: Generator, *_: Float32s) -> Float32s:
    """Freeze fields at the first value of the window; windows of one row at that of the first window."""
    first = windows[:, :1] if windows.shape[1] > 1 else windows[:1, :1]
    hit = rng.random((len(windows), 1, windows.shape[2])).argsort(axis=2) < round(strength)
    return np.where(hit, first, windows)


def _saturate(windows: Float32s, strength: float, _: Generator, spread: Float32s, centre: Float32s) -> Float32s:
    half = spread * np.float32(strength)
    return np.clip(windows, centre - half, centre + half)


def _swap_fields(windows: Float32s, strength: float, rng: Generator, *_: Float32s) -> Float32s:
    order = rng.random((len(windows), windows.shape[2])).argsort(axis=1)
    source = np.tile(np.arange(windows.shape[2]), (len(windows), 1))
    each = np.arange(len(windows))
    for pair in range(round(strength)):
        a, b = order[:, 2 * pair], order[:, 2 * pair + 1]
        source[each, a], source[each, b] = b, a
    return np.take_along_axis(windows, source[:, None, :], axis=2)
