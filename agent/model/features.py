"""Rows to model windows: the one definition, used where a bundle is packed, evaluated and run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.model.manifest import Input, Windowing

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cut:
    """`starts` (w,) row offsets of whole windows; the first `consumed` rows need not be looked at again."""

    starts: Ints
    consumed: int


def cut(t: Ints, window: Windowing | None) -> Cut:
    """Windows in rows with times `t` (n,) epoch µs.

    A window never spans a gap. Rows before a gap that fill no window are consumed; rows at the end wait for more.
    Cutting a stream piece by piece, each piece from where the last one was consumed, gives the same windows.
    """
    n = len(t)
    if window is None:
        return Cut(np.arange(n, dtype=np.int64), n)
    if n == 0:
        return Cut(np.zeros(0, np.int64), 0)
    steps = np.diff(t)
    broken = steps < 0
    if window.max_gap_s is not None:
        broken |= steps > window.max_gap_s * 1e6
    begins = np.concatenate([[0], np.flatnonzero(broken) + 1]).astype(np.int64)
    lengths = np.diff(np.append(begins, n))
    counts = np.maximum(0, (lengths - window.rows) // window.step + 1)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + within * window.step
    return Cut(starts, int(begins[-1] + counts[-1] * window.step))


def matrix(columns: Sequence[NDArray[Any]]) -> Floats:
    """Field columns, in the model's order, as (n, F) float32 in physical units; missing is NaN, too large is inf."""
    with np.errstate(over="ignore"):
        return np.stack(columns, axis=1).astype(np.float32, copy=False)


def windows(features: Floats, starts: Ints, spec: Input) -> Floats:
    """Scaled model input (w, rows, F), or (w, F) without a window.

    A value that is missing, or too large for float32, becomes the field's mean.
    """
    within = 0 if spec.window is None else np.arange(spec.window.rows)
    cut_out = features[starts] if spec.window is None else features[starts[:, None] + within]
    if spec.mean or spec.std:
        mean = np.asarray(spec.mean or 0.0, np.float32)
        std = np.asarray(spec.std or 1.0, np.float32)
        with np.errstate(over="ignore"):
            cut_out = (cut_out - mean) / std
    return np.nan_to_num(cut_out, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
