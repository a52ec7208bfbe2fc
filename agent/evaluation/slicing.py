"""Slices in which the model is worse than elsewhere, by the rule that devices use (`agent.performance.slices`)."""

from __future__ import annotations

import math
import re

import numpy as np

from agent.arrays import Float64s
from agent.datasets.blocks import TextColumn
from agent.evaluation.bootstrap import BootstrapUnits
from agent.performance import slices
from agent.performance.estimates import MetricEstimate
from agent.performance.metrics import LabelledPredictions

_BIN_COUNT = 4
_MAX_CATEGORIES = 12  # distinct numbers that are still taken for names


def slice_metrics(
    kind: str, predictions: LabelledPredictions, columns: dict[str, TextColumn], units: BootstrapUnits
) -> list[MetricEstimate]:
    """Return the metric of each slice, by column and value."""
    binned = {name: bin_column(column) for name, column in columns.items()}
    estimates = slices.compute_slice_metrics(kind, predictions, binned, units.design_effect)
    # Only what was tested has a state.
    return sorted((estimate for estimate in estimates if estimate.state is not None), key=_sort_key)


def _sort_key(metric: MetricEstimate) -> tuple[str, float, list[tuple[int, str]]]:
    """Order by column, then bins from the lowest to the highest, then names, with numbers in them by size."""
    column, _, value = metric.slice.partition("=")
    words = value.split(" ")
    try:
        lower_edge = -math.inf if words[0] == "below" else float(words[1] if words[0] == "from" else words[0])
    except (ValueError, IndexError):
        lower_edge = math.inf
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", value)]
    return column, lower_edge, parts


def bin_column(column: TextColumn) -> list[str]:
    """Return names as they are, and many distinct numbers in quarters."""
    texts = np.char.strip(column)
    known = np.unique(texts[texts != ""])
    if len(known) > _MAX_CATEGORIES and (values := _parse_numbers(texts)) is not None:
        edges = {float(f"{edge:.3g}") for edge in np.nanquantile(values, np.arange(1, _BIN_COUNT) / _BIN_COUNT)}
        return slices.name_bins(values, sorted(edges))
    return [text or slices.MISSING for text in texts.tolist()]


def _parse_numbers(texts: TextColumn) -> Float64s | None:
    try:
        return np.where(texts == "", "nan", texts).astype(np.float64)
    except ValueError:
        return None
