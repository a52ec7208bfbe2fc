"""Features: cut rows into model windows and scale them. Packing, evaluation and devices all use this module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.indices import repeat
from outstation.ml.kernel import library, model_input
from outstation.ml.model.bundle.manifest import Manifest, ModelInput, WindowSpec

if TYPE_CHECKING:
    from outstation.ml.model.inference.joins import JoinedValues

_MAX_STEP_US = 2**62
# Steps of time that are looked through together, while they are near the processor.
_BLOCK_STEPS = 8192


class WindowCut(msgspec.Struct, frozen=True):
    """Windows of a piece of a stream: row offsets `starts` (w,). The first `consumed` rows are not needed again.

    `joined` holds the windows' values of further inputs.
    """

    starts: Ints
    consumed: int
    joined: JoinedValues | None = None


def cut_windows(t: Ints, window: WindowSpec | None) -> WindowCut:
    """Cut rows at `t` (n,) epoch µs into windows.

    A window never spans a gap. Rows before a gap that fill no window are consumed; rows at the end wait for more.
    Cutting a stream piece by piece, each from the end of the rows consumed, gives the same windows.
    """
    n = len(t)
    if window is None:
        return WindowCut(np.arange(n, dtype=np.int64), n)
    if n == 0:
        return WindowCut(np.zeros(0, np.int64), 0)
    longest = _MAX_STEP_US if window.max_gap_s is None else int(min(window.max_gap_s * 1e6, _MAX_STEP_US))
    gaps = [_find_gaps(t[at : at + _BLOCK_STEPS + 1], longest) + at for at in range(0, n - 1, _BLOCK_STEPS)]
    begins = np.concatenate([np.zeros(1, np.int64), *gaps])
    lengths = np.diff(np.append(begins, n))
    counts = np.maximum(0, (lengths - window.rows) // window.step + 1)
    within = np.arange(counts.sum(), dtype=np.int64) - repeat(np.cumsum(counts) - counts, counts)
    starts = repeat(begins, counts) + within * window.step
    return WindowCut(starts, int(begins[-1] + counts[-1] * window.step))


def _find_gaps(t: Ints, longest: int) -> Ints:
    """Return the offsets of rows that are earlier than the row before, or by more than `longest` µs later."""
    steps = t[1:] - t[:-1]
    if steps.min() >= 0 and steps.max() <= longest:
        return np.zeros(0, np.int64)
    return np.flatnonzero((steps < 0) | (steps > longest)) + 1


def limit_gap(manifest: Manifest, gap_s: float) -> Manifest:
    """Return a manifest in which no window and no history spans a gap above `gap_s`."""
    # The features are then others than those of the feature set.
    spec = replace(manifest.input, features=None)
    gap_s = min(gap_s, spec.gap_s or math.inf)
    if spec.window is not None:
        spec = replace(spec, window=replace(spec.window, max_gap_s=gap_s))
    elif spec.history_rows:
        spec = replace(spec, max_gap_s=gap_s)
    return replace(manifest, input=spec)


def stack_columns(columns: Sequence[NDArray[Any]]) -> Float32s:
    """Stack field columns, in the model's order, to (n, F) float32; missing is NaN, too large is inf."""
    return stack_parts([columns])


def stack_parts(parts: Sequence[Sequence[NDArray[Any]]]) -> Float32s:
    """Stack the field columns of rows in parts that follow one another to (n, F) float32, in one copy."""
    rows = np.empty((sum(len(columns[0]) for columns in parts), len(parts[0])), np.float32)
    compiled, at = library.kernel(), 0
    for columns in parts:
        below = at + len(columns[0])
        # As if they were stacked in their common type: beside floats, large integers are rounded twice.
        is_mixed = len({column.dtype.kind for column in columns}) > 1
        alike = [column.astype(np.float64) if is_mixed and column.dtype.kind == "i" else column for column in columns]
        if compiled is None or not model_input.stack_columns(compiled, alike, rows[at:below]):
            with np.errstate(over="ignore"):
                np.stack(alike, axis=1, out=rows[at:below], casting="same_kind")
        at = below
    return rows


def build_windows(columns: Float32s, starts: Ints, spec: ModelInput) -> Float32s:
    """Build scaled input (w, rows, C), or (w, C), from features (n, C). A missing or huge value becomes the mean."""
    windows = slice_windows(columns, starts, spec)
    if spec.scaling == "window":
        windows = _standardize_windows(windows)
    elif spec.mean or spec.std:
        mean = np.asarray(spec.mean or 0.0, np.float32)
        std = np.asarray(spec.std or 1.0, np.float32)
        with np.errstate(over="ignore"):
            windows = windows - mean
            windows = np.divide(windows, std, out=windows)
    return windows if _is_finite(windows) else np.nan_to_num(windows, nan=0.0, posinf=0.0, neginf=0.0)


def slice_windows(columns: Float32s, starts: Ints, spec: ModelInput) -> Float32s:
    """Return the windows in physical units; adjacent windows are a view, not a copy."""
    if len(starts) and (np.diff(starts) == spec.rows).all():
        part = columns[starts[0] : starts[-1] + spec.rows]
        return part if spec.window is None else part.reshape(len(starts), spec.rows, -1)
    copies: Float32s = columns[starts if spec.window is None else starts[:, None] + np.arange(spec.window.rows)]
    return copies


def compute_missing_share(columns: Float32s, starts: Ints, spec: ModelInput) -> Float32s:
    """Return the share (w,) of missing values of each window."""
    if _is_finite(columns):
        return np.zeros(len(starts), np.float32)
    missing = ~np.isfinite(columns)
    rows = np.concatenate([[0], np.cumsum(missing.sum(axis=1))])
    share = (rows[starts + spec.rows] - rows[starts]) / (spec.rows * columns.shape[1])
    return np.asarray(share, np.float32)


def _is_finite(values: Float32s) -> bool:
    """Return True only if all are finite. A sum is the cheapest test; large finite values may overflow it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(values.sum())


def _standardize_windows(windows: Float32s) -> Float32s:
    """Subtract the mean of each column of each window (w, rows, C), and divide by its standard deviation if not 0."""
    present = np.isfinite(windows)
    count = np.maximum(present.sum(axis=1, keepdims=True), 1)
    values = windows.astype(np.float64)
    mean = np.where(present, values, 0.0).sum(axis=1, keepdims=True) / count
    centred = np.where(present, values - mean, 0.0)
    std = np.sqrt(np.square(centred).sum(axis=1, keepdims=True) / count)
    # The rounding errors of a constant are no signal.
    is_constant = std <= 1e-7 * np.abs(mean)
    return (centred / np.where(is_constant, 1.0, std)).astype(np.float32)
