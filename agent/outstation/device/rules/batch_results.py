"""Results of a batch as alert rules see them, and those that wait until their drift window closes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import AnyArray, Bools, Ints
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.scores import Scores

log = logging.getLogger("outstation")

_SCORE_COLUMNS = ("label", "score", "value", "predicted", "anomaly")
_SEPARATOR = "\x1f"  # between the name of a further output and that of a column
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
    # Results that waited have no texts of further outputs, which no rule reads.
    joined = scores.concatenate([replace(part.scores, label_columns={}) for part in (first, second)])
    return BatchResults(joined, labels, *arrays)


class PendingResults(msgspec.Struct, frozen=True):
    """Results as stored, made by the bundle with this digest: bytes of arrays of `_DTYPES`, else of float64."""

    bundle: str = ""
    labels: list[str] | None = None
    columns: dict[str, bytes] = {}

    @classmethod
    def pack(cls, results: BatchResults, bundle: str) -> PendingResults:
        arrays: dict[str, Any] = {name: getattr(results, name) for name in ("rows", "t", "is_healthy")}
        arrays |= _to_columns(results.scores)
        for output, further in results.scores.outputs.items():
            arrays |= {f"{output}{_SEPARATOR}{name}": column for name, column in _to_columns(further).items()}
        columns = {name: array.astype(_dtype(name)).tobytes() for name, array in arrays.items() if array is not None}
        return cls(bundle, None if results.labels is None else list(results.labels), columns)

    def unpack(self, bundle: str, outputs: Collection[str]) -> BatchResults | None:
        """Return the results; None if there are none, or if another bundle made them, or without these `outputs`."""
        if self.bundle != bundle:
            return None
        try:
            arrays = {name: np.frombuffer(data, _dtype(name)) for name, data in self.columns.items()}
            shared = [arrays.pop(name) for name in ("rows", "t", "is_healthy")]
            columns_by_output: dict[str, dict[str, AnyArray]] = {}
            for key in [key for key in arrays if _SEPARATOR in key]:
                output, _, name = key.partition(_SEPARATOR)
                columns_by_output.setdefault(output, {})[name] = arrays.pop(key)
            if columns_by_output.keys() != set(outputs):
                # Versions before those that tested further outputs stored none.
                log.warning("%d results that waited have no further outputs, so no rule judges them", len(shared[0]))
                return None
            further = {name: _from_columns(columns, len(shared[0])) for name, columns in columns_by_output.items()}
            main = replace(_from_columns(arrays, len(shared[0])), outputs=further)
            return BatchResults(main, self.labels, *shared)
        except (KeyError, ValueError):
            return None


def _dtype(name: str) -> str:
    return _DTYPES.get(name.rpartition(_SEPARATOR)[2], "<f8")


def _to_columns(results: Scores) -> dict[str, AnyArray | None]:
    return {name: getattr(results, name) for name in _SCORE_COLUMNS} | dict(results.extra_columns)


def _from_columns(columns: dict[str, AnyArray], count: int) -> Scores:
    own: dict[str, Any] = {name: columns.pop(name, None) for name in _SCORE_COLUMNS}
    if own["predicted"] is not None:
        own["predicted"] = own["predicted"].reshape(count, -1)
    return Scores(**own, extra_columns=columns)
