"""Columns of a results message, written in the run-length form of `outstation.protocol.wire.runs`."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.ml.model.inference.scores import Labels, Scores
from outstation.protocol.wire.runs import MAX_RESULTS, JitteredTimes, LabelRun, TimeRun

# Beyond 53 bits a step is no exact number for every reader of JSON.
_MAX_SPAN = 2**53 - 1
# A float of 6 digits with its comma: up to 1e16 it is written with all zeros.
_LONG_NUMBER_BYTES = 20


def build(
    model_scores: Scores,
    labels: Labels | None,
    missing: NDArray[np.float32],
    indices: NDArray[np.int64],
    rows: NDArray[np.int64],
    times: NDArray[np.int64],
) -> dict[str, Any]:
    """Return the columns of the results at `indices`, whose `rows` and `times` (epoch µs) are (len(indices),).

    `missing` is left out where all of it is 0.
    """
    columns: dict[str, Any] = {"row": encode_runs(rows), "t": encode_times(times)}
    if labels is not None:
        columns["label"] = encode_labels(Labels(labels.texts, labels.codes[indices]))
    if model_scores.score is not None:
        columns["score"] = _round(model_scores.score[indices], 4)
    if model_scores.value is not None:
        columns["value"] = _round_to_digits(model_scores.value[indices])
    for name, values in model_scores.extra_columns.items():
        columns[name] = _round_to_digits(values[indices])
    for name, texts in model_scores.label_columns.items():
        columns[name] = encode_labels(Labels.from_list(texts[indices].tolist()))
    if missing[indices].any():
        columns["missing"] = _round(missing[indices], 3)
    return columns


def max_results(
    max_bytes: int,
    model_scores: Scores,
    labels: Labels | None,
    missing: NDArray[np.float32],
    rows: NDArray[np.int64] | None,
    times: NDArray[np.int64] | None,
) -> int:
    """Return how many results fit into `max_bytes` bytes in any case, at least one.

    `rows` and `times` (epoch µs) are those of all results; None if some of them may be left out. Without a regular
    step each costs a number of 16 digits. With their commas, a score costs 4 decimals, a share missing 3, a value 6
    digits with zeros around them.
    """
    size = sum(0 if listed is not None and _is_regular(listed) else 17 for listed in (rows, times))
    if labels is not None:
        size += 2 + max(map(_json_size, labels.list_used()), default=0)
    if model_scores.score is not None:
        outside = (model_scores.score < 0) | (model_scores.score > 1)
        size += _LONG_NUMBER_BYTES if outside.any() else 7
    if model_scores.value is not None:
        size += _LONG_NUMBER_BYTES
    size += _LONG_NUMBER_BYTES * len(model_scores.extra_columns) + 6 * bool(missing.any())
    for texts in model_scores.label_columns.values():
        size += 2 + max(map(_json_size, set(texts.tolist())), default=0)
    heads = sum(_json_size(name) + 4 for name in (*model_scores.extra_columns, *model_scores.label_columns))
    return min(MAX_RESULTS, max(1, (max_bytes - heads) // max(1, size)))


def encode_runs(values: NDArray[np.int64]) -> list[int | TimeRun]:
    """Return `values` (n,) with each arithmetic run of three or more, from the left, as a run."""
    if len(values) < 3 or _span(values) > _MAX_SPAN:
        return [*values.tolist()]
    steps = np.diff(values)
    regular = steps[1:] == steps[:-1]
    if regular.all():
        return [TimeRun(int(values[0]), int(steps[0]), len(values))]
    numbers: list[int] = values.tolist()
    edges = np.flatnonzero(np.diff(regular, prepend=False, append=False))
    items: list[int | TimeRun] = []
    done = 0
    for start, stop in edges.reshape(-1, 2).tolist():
        # Two runs that meet share an entry: the first run keeps it, and the second may then be too short.
        start, end = max(start, done), stop + 2
        if end - start >= 3:
            items += numbers[done:start]
            items.append(TimeRun(numbers[start], numbers[start + 1] - numbers[start], end - start))
            done = end
    return [*items, *numbers[done:]]


def encode_times(times: NDArray[np.int64]) -> list[int | TimeRun] | JitteredTimes:
    """Return `times` (n,), epoch µs, as runs, or as offsets from a regular grid where that takes fewer bytes."""
    items = encode_runs(times)
    n = len(times)
    if n < 3 or len(items) == 1 or _span(times) > _MAX_SPAN:
        return items
    first = int(times[0])
    step = (int(times[-1]) - first) // (n - 1)
    jittered = JitteredTimes(first, step, (times - (first + step * np.arange(n, dtype=np.int64))).tolist())
    return jittered if len(msgspec.json.encode(jittered)) < len(msgspec.json.encode(items)) else items


def encode_labels(labels: Labels) -> list[str | LabelRun]:
    """Return the labels (n,), with each label that repeats as a run."""
    starts = np.flatnonzero(np.diff(labels.codes, prepend=-1))
    counts, count = np.diff(starts, append=len(labels.codes)), len(labels.texts)
    runs = (counts * count + labels.codes[starts]).tolist()
    # Many labels have few texts: runs of one label and length are one object.
    made = {run: _encode_run(labels.texts[run % count], run // count) for run in set(runs)}
    return [made[run] for run in runs]


def _encode_run(label: str, count: int) -> str | LabelRun:
    return label if count == 1 else LabelRun(label, count)


def _is_regular(values: NDArray[np.int64]) -> bool:
    steps = np.diff(values)
    return bool((steps[1:] == steps[:-1]).all()) and (len(values) == 0 or _span(values) <= _MAX_SPAN)


def _span(values: NDArray[np.int64]) -> int:
    return int(values.max()) - int(values.min())


def _json_size(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode())


def _round_to_digits(values: NDArray[Any]) -> list[float]:
    """Return `values` with 6 significant digits, by way of their decimals."""
    return [*map(float, ("%.6g " * len(values) % tuple(values.tolist())).split())]


def _round(values: NDArray[Any], digits: int) -> list[float]:
    rounded: list[float] = np.round(values.astype(np.float64), digits).tolist()
    return rounded
