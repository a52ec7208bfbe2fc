"""Symptoms of sensor faults in drift windows: shares of rows and the spread, as `fault_limits` learns them."""

from __future__ import annotations

import numpy as np

from agent.arrays import Float64s
from agent.drift.baseline.summary import Summary


def measure_symptoms(windows: Summary) -> Float64s:
    """Return the symptoms (..., F, SYMPTOMS) of a summary or a stack of summaries."""
    rows = np.maximum(windows.counts[..., 0, :].sum(-1) + windows.missing[..., 0], 1)[..., None]
    moments = windows.row_sums.moments(np.zeros(1))
    sd = np.sqrt(moments.m2 / np.maximum(moments.n, 1))[..., 0, :]
    pile = windows.extremes.rows[..., 0] / rows[..., None]
    return np.stack(
        [windows.missing / rows, pile[..., 0], pile[..., 1], windows.outside / rows, windows.spikes / rows, sd], axis=-1
    )
