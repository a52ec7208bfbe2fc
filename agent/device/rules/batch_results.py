"""Results of a batch as alert rules see them, and those that wait until their drift window closes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from agent.arrays import Bools, Ints
from agent.model.inference import scores
from agent.model.inference.scores import Scores

_SCORE_COLUMNS = ("label", "score", "value", "predicted", "anomaly")
_DTYPES = {"rows": "<i8", "t": "<i8", "is_healthy": "?", "label": "<i8", "predicted": "?", "anomaly": "?"}


class BatchResults(msgspec.Struct, frozen=True, eq=False):
    """Results of w windows: stream `rows` (w,), times `t` (w,) epoch µs, `is_healthy` (w,)."""

    scores: Scores
    labels: Sequence[str] | None
    rows: Ints
    t: Ints
    is_healthy: Bools

    def __len__(self) -> int:
        return len(self.rows)

    def slice(self, begin: int, end: int) -> BatchResults:
        part = slice(begin, end)
        labels = None if self.labels is None else self.labels[part]
        return BatchResults(self.scores.slice(part), labels, self.rows[part], self.t[part], self.is_healthy[part])


def concatenate(first: BatchResults | None, second: BatchResults) -> BatchResults:
    if first is None or not len(first):
        return second
    labels = None if first.labels is None or second.labels is None else [*first.labels, *second.labels]
    arrays = (np.concatenate([getattr(part, name) for part in (first, second)]) for name in ("rows", "t", "is_healthy"))
    return BatchResults(scores.concatenate([first.scores, second.scores]), labels, *arrays)


class PendingResults(msgspec.Struct, frozen=True):
    """Results as stored, made by the bundle with this digest: bytes of arrays of `_DTYPES`, else of float64."""

    bundle: str = ""
    labels: list[str] | None = None
    columns: dict[str, bytes] = {}

    @classmethod
    def pack(cls, results: BatchResults, bundle: str) -> PendingResults:
        arrays: dict[str, Any] = {name: getattr(results, name) for name in ("rows", "t", "is_healthy")}
        arrays |= {name: getattr(results.scores, name) for name in _SCORE_COLUMNS}
        arrays |= results.scores.extra_columns
        columns = {
            name: array.astype(_DTYPES.get(name, "<f8")).tobytes()
            for name, array in arrays.items()
            if array is not None
        }
        return cls(bundle, None if results.labels is None else list(results.labels), columns)

    def unpack(self, bundle: str) -> BatchResults | None:
        """Return the results; None if there are none, or if another bundle made them."""
        if self.bundle != bundle:
            return None
        try:
            arrays = {name: np.frombuffer(data, _DTYPES.get(name, "<f8")) for name, data in self.columns.items()}
            shared = [arrays.pop(name) for name in ("rows", "t", "is_healthy")]
            own: dict[str, Any] = {name: arrays.pop(name, None) for name in _SCORE_COLUMNS}
            if own["predicted"] is not None:
                own["predicted"] = own["predicted"].reshape(len(shared[0]), -1)
            return BatchResults(Scores(**own, extra_columns=arrays), self.labels, *shared)
        except (KeyError, ValueError):
            return None
