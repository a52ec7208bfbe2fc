"""Where the model is worse than elsewhere: columns as slices, by the same rule as on devices (`agent.drift.slices`)."""

from __future__ import annotations

import numpy as np

from agent.drift import slices
from agent.drift.quality import Metric, Pairs
from agent.evaluation.blocks import Texts
from agent.evaluation.resampling import Units

_BINS = 4
_MOST_NUMBERS = 12  # different numbers that are still names


def measure(kind: str, pairs: Pairs, columns: dict[str, Texts], units: Units) -> list[Metric]:
    return slices.measure(kind, pairs, {name: binned(column) for name, column in columns.items()}, units.alike)


def binned(column: Texts) -> list[str]:
    """Names as they are; numbers, where there are many of them, in quarters."""
    texts = np.char.strip(column)
    known = np.unique(texts[texts != ""])
    if len(known) > _MOST_NUMBERS and (values := _numbers(texts)) is not None:
        edges = np.unique(np.nanquantile(values, np.arange(1, _BINS) / _BINS))
        return slices.binned(values, [float(f"{edge:.6g}") for edge in edges])
    return [text or slices.MISSING for text in texts.tolist()]


def _numbers(texts: Texts) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
    try:
        return np.where(texts == "", "nan", texts).astype(np.float64)
    except ValueError:
        return None
