"""Rows to model windows: the one definition, used where a bundle is packed, evaluated and run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from agent.model.bundle.manifest import Manifest, ModelInput, WindowSpec

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class WindowCut(msgspec.Struct, frozen=True):
    """`starts` (w,) row offsets of whole windows; the first `consumed` rows need not be looked at again."""

    starts: Ints
    consumed: int


def cut_windows(t: Ints, window: WindowSpec | None) -> WindowCut:
    """Windows in rows with times `t` (n,) epoch µs.

    A window never spans a gap. Rows before a gap that fill no window are consumed; rows at the end wait for more.
    Cutting a stream piece by piece, each piece from where the last one was consumed, gives the same windows.
    """
    n = len(t)
    if window is None:
        return WindowCut(np.arange(n, dtype=np.int64), n)
    if n == 0:
        return WindowCut(np.zeros(0, np.int64), 0)
    steps = np.diff(t)
    broken = steps < 0
    if window.max_gap_s is not None:
        broken |= steps > window.max_gap_s * 1e6
    begins = np.concatenate([[0], np.flatnonzero(broken) + 1]).astype(np.int64)
    lengths = np.diff(np.append(begins, n))
    counts = np.maximum(0, (lengths - window.rows) // window.step + 1)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + within * window.step
    return WindowCut(starts, int(begins[-1] + counts[-1] * window.step))


def limit_gap(manifest: Manifest, gap_s: float) -> Manifest:
    """The same, of which no window and no history reaches over a pause above `gap_s`."""
    spec = manifest.input
    gap_s = min(gap_s, spec.gap_s or math.inf)
    if spec.window is not None:
        spec = replace(spec, window=replace(spec.window, max_gap_s=gap_s))
    elif spec.history_rows:
        spec = replace(spec, max_gap_s=gap_s)
    return replace(manifest, input=spec)


def stack_columns(columns: Sequence[NDArray[Any]]) -> Floats:
    """Field columns, in the model's order, as (n, F) float32 in physical units; missing is NaN, too large is inf."""
    with np.errstate(over="ignore"):
        return np.stack(columns, axis=1).astype(np.float32, copy=False)


def build_windows(columns: Floats, starts: Ints, spec: ModelInput) -> Floats:
    """Scaled model input (w, rows, C), or (w, C) without a window, of all features (n, C) of the model.

    A value that is missing, or too large for float32, becomes the feature's mean.
    """
    cut_out = slice_windows(columns, starts, spec)
    if spec.scaling == "window":
        cut_out = _standardize_windows(cut_out)
    elif spec.mean or spec.std:
        mean = np.asarray(spec.mean or 0.0, np.float32)
        std = np.asarray(spec.std or 1.0, np.float32)
        with np.errstate(over="ignore"):
            cut_out = (cut_out - mean) / std
    return cut_out if _is_finite(cut_out) else np.nan_to_num(cut_out, nan=0.0, posinf=0.0, neginf=0.0)


def slice_windows(columns: Floats, starts: Ints, spec: ModelInput) -> Floats:
    """What `windows` scales, in physical units; of windows side by side no copy is made."""
    if len(starts) and (np.diff(starts) == spec.rows).all():
        part = columns[starts[0] : starts[-1] + spec.rows]
        return part if spec.window is None else part.reshape(len(starts), spec.rows, -1)
    taken: Floats = columns[starts if spec.window is None else starts[:, None] + np.arange(spec.window.rows)]
    return taken


def compute_missing_share(columns: Floats, starts: Ints, spec: ModelInput) -> Floats:
    """The share (w,) of values of each window that are missing."""
    if _is_finite(columns):
        return np.zeros(len(starts), np.float32)
    gone = ~np.isfinite(columns)
    rows = np.concatenate([[0], np.cumsum(gone.sum(axis=1))])
    share = (rows[starts + spec.rows] - rows[starts]) / (spec.rows * columns.shape[1])
    return np.asarray(share, np.float32)


def _is_finite(values: Floats) -> bool:
    """Whether surely all are: a sum is the cheapest way to see it, and that of large values may say no for nothing."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(values.sum())


def _standardize_windows(windows: Floats) -> Floats:
    """Each column of each window (w, rows, C) less its mean, divided by its spread where that is not 0."""
    there = np.isfinite(windows)
    count = np.maximum(there.sum(axis=1, keepdims=True), 1)
    values = windows.astype(np.float64)
    mean = np.where(there, values, 0.0).sum(axis=1, keepdims=True) / count
    off = np.where(there, values - mean, 0.0)
    spread = np.sqrt(np.square(off).sum(axis=1, keepdims=True) / count)
    # What is left of a constant by rounding is no signal.
    flat = spread <= 1e-7 * np.abs(mean)
    return (off / np.where(flat, 1.0, spread)).astype(np.float32)
