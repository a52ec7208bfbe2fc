"""Data files a bundle is packed from: recordings (`.npz`) or CSV, as features in the model's order."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.errors import UsageError
from agent.model.features import Floats, Ints
from agent.model.manifest import Input


@dataclass(frozen=True, slots=True)
class Data:
    """`features` (n, F) physical units, `t` (n,) epoch µs, and for windows cut from them the true `label`, if known."""

    features: Floats
    t: Ints
    label: NDArray[np.int64] | None


def read(path: Path, spec: Input) -> Data:
    """Raises UsageError that names the file and the column."""
    try:
        return _recordings(path, spec) if path.suffix == ".npz" else _csv(path, spec)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UsageError(f"{path}: not readable as data for fields {', '.join(spec.fields)}: {error}") from None


def _recordings(path: Path, spec: Input) -> Data:
    """`rows` (n, fields), `fields`; with `starts` and `rate` several recordings, between which there is a gap."""
    with np.load(path, allow_pickle=False) as z:
        names = [str(name) for name in z["fields"]]
        missing = [name for name in spec.fields if name not in names]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}; it has {', '.join(names)}")
        scale = np.asarray(z["scale"], np.float32) if "scale" in z else np.float32(1)
        rows = (z["rows"].astype(np.float32) * scale)[:, [names.index(name) for name in spec.fields]]
        starts = z["starts"].astype(np.int64) if "starts" in z else np.array([0, len(rows)])
        rate = float(z["rate"]) if "rate" in z else 1.0
        which = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        pause_s = 10 + 10 * ((spec.window.max_gap_s or 0.0) if spec.window else 0.0)
        t = np.rint((np.arange(len(rows)) / rate + which * pause_s) * 1e6).astype(np.int64)
        return Data(rows, t, z["label"].astype(np.int64)[which] if "label" in z else None)


def _csv(path: Path, spec: Input) -> Data:
    with path.open(encoding="utf-8", newline="") as file:
        header = [name.strip() for name in next(csv.reader(file), [])]
        missing = [name for name in spec.fields if name not in header]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}; the first line names {', '.join(header)}")
        wanted = [header.index(name) for name in spec.fields]
        table = np.genfromtxt(file, delimiter=",", usecols=[*wanted, *([header.index("t")] if "t" in header else [])])
    table = np.atleast_2d(table)
    if "t" in header:
        return Data(table[:, :-1].astype(np.float32), np.rint(table[:, -1] * 1e6).astype(np.int64), None)
    return Data(table.astype(np.float32), np.arange(len(table), dtype=np.int64), None)
