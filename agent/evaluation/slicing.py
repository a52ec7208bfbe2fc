"""Slices where the model is worse than elsewhere, by the same rule as on devices (`agent.performance.slices`)."""

from __future__ import annotations

import math
import re

import numpy as np

from agent.datasets.blocks import TextColumn
from agent.evaluation.bootstrap import BootstrapUnits
from agent.performance import slices
from agent.performance.metrics import LabelledPredictions, MetricEstimate

_BIN_COUNT = 4
_MAX_CATEGORIES = 12  # different numbers that are still names


def slice_metrics(
    kind: str, pairs: LabelledPredictions, columns: dict[str, TextColumn], units: BootstrapUnits
) -> list[MetricEstimate]:
    found = slices.compute_slice_metrics(
        kind, pairs, {name: bin_column(column) for name, column in columns.items()}, units.design_effect
    )
    # What has a state is what was tested.
    return sorted((one for one in found if one.state is not None), key=_sort_key)


def _sort_key(metric: MetricEstimate) -> tuple[str, float, list[tuple[int, str]]]:
    """By column; bins from the lowest to the highest, then names, numbers in them by size."""
    column, _, value = metric.slice.partition("=")
    words = value.split(" ")
    try:
        first = -math.inf if words[0] == "below" else float(words[1] if words[0] == "from" else words[0])
    except (ValueError, IndexError):
        first = math.inf
    return column, first, [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", value)]


def bin_column(column: TextColumn) -> list[str]:
    """Names as they are; numbers, where there are many of them, in quarters."""
    texts = np.char.strip(column)
    known = np.unique(texts[texts != ""])
    if len(known) > _MAX_CATEGORIES and (values := _parse_numbers(texts)) is not None:
        edges = {float(f"{edge:.3g}") for edge in np.nanquantile(values, np.arange(1, _BIN_COUNT) / _BIN_COUNT)}
        return slices.name_bins(values, sorted(edges))
    return [text or slices.MISSING for text in texts.tolist()]


def _parse_numbers(texts: TextColumn) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
    try:
        return np.where(texts == "", "nan", texts).astype(np.float64)
    except ValueError:
        return None
