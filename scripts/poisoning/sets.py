"""Clean labelled sets: exercise, machine and solar recordings of the repository, public tables, and generated ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Ints
from outstation.ml.datasets import recordings
from outstation.ml.poisoning.labelled_windows import LabelledWindows

MODELS = Path(__file__).parents[2] / "models"
_ROWS = 20_000
# Tables of the UCI Machine Learning Repository in scikit-learn, which need not be installed.
_PUBLIC = ("breast_cancer", "digits", "wine")


def exercise() -> LabelledWindows:
    return _read_recordings(MODELS / "sources" / "exercise" / "reference.npz", 100)


def machine() -> LabelledWindows:
    return _read_recordings(MODELS / "recordings" / "machine.npz", 5)


def solar() -> LabelledWindows:
    """Return irradiance and temperature of a public weather service, with the sky as the class, every 45 minutes."""
    loaded = recordings.load(MODELS / "recordings" / "solar.npz")
    labels, label = np.unique(loaded.columns["sky"], return_inverse=True)
    return make_table(loaded.rows[::3], label[::3], loaded.fields, labels.tolist())


def list_public() -> dict[str, Callable[[], LabelledWindows]]:
    if find_spec("sklearn") is None:
        return {}
    return {name: lambda name=name: _read_public(name) for name in _PUBLIC}  # type: ignore[misc]


def list_generated(seed: int) -> dict[str, LabelledWindows]:
    """Return sets that mislead such checks, though nothing is wrong with them."""
    draw = np.random.default_rng(seed)
    normal = draw.standard_normal((_ROWS, 8))
    rare = (draw.random(_ROWS) < 0.01).astype(np.int64)
    busy = (np.arange(_ROWS) // 500 % 8 == 0).astype(np.int64)
    code = draw.integers(0, 5, _ROWS)
    codes = np.column_stack([*(code == i for i in range(5)), draw.integers(0, 4, _ROWS), draw.integers(0, 3, _ROWS)])
    sign = (normal[:, 0] > 0).astype(np.int64)
    return {
        "imbalanced": make_table(normal + 2 * rare[:, None], rare),
        "quiet": make_table(np.round(normal[:, :4] * np.where(busy, 3, 0.2)[:, None], 1), busy),
        "overlapping": make_table(normal, normal[:, 0] + draw.standard_normal(_ROWS) > 0),
        "unpredictable": make_table(normal, sign ^ (draw.random(_ROWS) < 0.25)),
        "codes": make_table(codes, code >= 3),
        "random labels": make_table(normal, draw.integers(0, 3, _ROWS)),
    }


def make_table(
    rows: NDArray[Any], label: NDArray[Any], fields: Sequence[str] = (), labels: Sequence[str] = ()
) -> LabelledWindows:
    """Return windows of one row each."""
    n, width = rows.shape
    label = np.asarray(label, np.int64)
    return LabelledWindows(
        rows=np.asarray(rows, np.float32),
        last=np.arange(n),
        window_rows=1,
        fields=fields or [f"field{i}" for i in range(width)],
        label=label,
        labels=labels or [f"class {i}" for i in range(int(label.max()) + 1)],
        names=list(range(1, n + 1)),
    )


def _read_recordings(path: Path, window_rows: int) -> LabelledWindows:
    loaded = recordings.load(path)
    runs = zip(loaded.starts[:-1].tolist(), loaded.starts[1:].tolist(), strict=True)
    last = [np.arange(begin + window_rows - 1, end, window_rows) for begin, end in runs]
    recording: Ints = np.repeat(np.arange(len(last)), [len(each) for each in last])
    return LabelledWindows(
        rows=loaded.rows,
        last=np.concatenate(last),
        window_rows=window_rows,
        fields=loaded.fields,
        label=loaded.label[recording],
        labels=loaded.labels,
        names=(np.concatenate(last) + 1).tolist(),
        providers={"device": np.char.add("device-", loaded.subject[recording].astype(np.str_))},
    )


def _read_public(name: str) -> LabelledWindows:
    from sklearn import datasets

    table = getattr(datasets, f"load_{name}")()
    order = np.random.default_rng(0).permutation(len(table.data))
    return make_table(table.data[order], table.target[order])
