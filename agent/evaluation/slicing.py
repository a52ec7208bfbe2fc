"""Slices where the model is worse than elsewhere, by the same rule as on devices (`agent.performance.slices`)."""

from __future__ import annotations

import math
import re

import numpy as np

from agent.datasets.blocks import Texts
from agent.evaluation.bootstrap import Units
from agent.performance import slices
from agent.performance.metrics import Metric, Pairs

_BINS = 4
_MOST_NUMBERS = 12  # different numbers that are still names


def measure(kind: str, pairs: Pairs, columns: dict[str, Texts], units: Units) -> list[Metric]:
    found = slices.measure(kind, pairs, {name: binned(column) for name, column in columns.items()}, units.alike)
    # What has a state is what was tested.
    return sorted((one for one in found if one.state is not None), key=_order)


def _order(one: Metric) -> tuple[str, float, list[tuple[int, str]]]:
    """By column; bins from the lowest to the highest, then names, numbers in them by size."""
    column, _, value = one.slice.partition("=")
    words = value.split(" ")
    try:
        first = -math.inf if words[0] == "below" else float(words[1] if words[0] == "from" else words[0])
    except (ValueError, IndexError):
        first = math.inf
    return column, first, [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", value)]


def binned(column: Texts) -> list[str]:
    """Names as they are; numbers, where there are many of them, in quarters."""
    texts = np.char.strip(column)
    known = np.unique(texts[texts != ""])
    if len(known) > _MOST_NUMBERS and (values := _numbers(texts)) is not None:
        edges = {float(f"{edge:.3g}") for edge in np.nanquantile(values, np.arange(1, _BINS) / _BINS)}
        return slices.binned(values, sorted(edges))
    return [text or slices.MISSING for text in texts.tolist()]


def _numbers(texts: Texts) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
    try:
        return np.where(texts == "", "nan", texts).astype(np.float64)
    except ValueError:
        return None
