"""Scores as the columns of a results message."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.model.inference.scores import Scores


def build(
    model_scores: Scores, labels: list[str] | None, missing: NDArray[np.float32], indices: NDArray[np.int64]
) -> dict[str, Any]:
    """Label, score, value and what more there is of the results at `picked`; `missing` where any of it is not 0."""
    columns: dict[str, Any] = {}
    if labels is not None:
        columns["label"] = [labels[i] for i in indices]
    if model_scores.score is not None:
        columns["score"] = _round(model_scores.score[indices], 4)
    if model_scores.value is not None:
        columns["value"] = [float(f"{v:.6g}") for v in model_scores.value[indices]]
    for name, values in model_scores.extra_columns.items():
        columns[name] = [float(f"{v:.6g}") for v in values[indices]]
    if missing[indices].any():
        columns["missing"] = _round(missing[indices], 3)
    return columns


def max_results(max_bytes: int, model_scores: Scores, labels: list[str] | None) -> int:
    """How many results surely fit into `room` bytes, at least one.

    A result costs two numbers of 16 digits, each of score, value and share missing, its label, and their commas.
    """
    longest = max((_json_size(name) for name in set(labels or ())), default=0)
    heads = sum(_json_size(name) + 4 for name in model_scores.extra_columns)
    return max(1, (max_bytes - heads) // (56 + longest + 16 * len(model_scores.extra_columns)))


def _json_size(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode())


def _round(values: NDArray[Any], digits: int) -> list[float]:
    rounded: list[float] = np.round(values.astype(np.float64), digits).tolist()
    return rounded
