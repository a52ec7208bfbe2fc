"""Scores as the columns of a results message."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.model.inference.scores import Scores


def of(
    found: Scores, names: list[str] | None, missing: NDArray[np.float32], picked: NDArray[np.int64]
) -> dict[str, Any]:
    """Label, score, value and what more there is of the results at `picked`; `missing` where any of it is not 0."""
    columns: dict[str, Any] = {}
    if names is not None:
        columns["label"] = [names[i] for i in picked]
    if found.score is not None:
        columns["score"] = _rounded(found.score[picked], 4)
    if found.value is not None:
        columns["value"] = [float(f"{v:.6g}") for v in found.value[picked]]
    for name, values in found.more.items():
        columns[name] = [float(f"{v:.6g}") for v in values[picked]]
    if missing[picked].any():
        columns["missing"] = _rounded(missing[picked], 3)
    return columns


def most(room: int, found: Scores, names: list[str] | None) -> int:
    """How many results surely fit into `room` bytes, at least one.

    A result costs two numbers of 16 digits, each of score, value and share missing, its label, and their commas.
    """
    longest = max((_bytes(name) for name in set(names or ())), default=0)
    heads = sum(_bytes(name) + 4 for name in found.more)
    return max(1, (room - heads) // (56 + longest + 16 * len(found.more)))


def _bytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode())


def _rounded(values: NDArray[Any], digits: int) -> list[float]:
    rounded: list[float] = np.round(values.astype(np.float64), digits).tolist()
    return rounded
