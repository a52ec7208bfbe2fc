"""Data files a bundle is packed from: recordings (`.npz`) or CSV, as features in the model's order."""

from __future__ import annotations

import contextlib
import csv
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import UsageError
from agent.model.features import Floats, Ints
from agent.model.manifest import Input


@dataclass(frozen=True, slots=True)
class Data:
    """`features` (n, F) physical units, NaN missing; `t` (n,) epoch µs; `label` (n,) the true class, if known."""

    features: Floats
    t: Ints
    label: NDArray[np.int64] | None


# Beyond this, microseconds do not fit into 64 bits.
_T_LIMIT_S = 2**63 / 1e6

# numpy answers damaged archives with all of these.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    SyntaxError,
    OverflowError,
    Warning,
    tokenize.TokenError,
    MemoryError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    csv.Error,
)


def read(path: Path, spec: Input) -> Data:
    """Raises UsageError that names the file, and the line or column."""
    try:
        return _recordings(path, spec) if path.suffix == ".npz" else _csv(path, spec)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UNREADABLE as error:
        raise UsageError(f"{path}: not data for fields {', '.join(spec.fields)}: {error}") from None


def given_windows(path: Path, spec: Input) -> Floats | None:
    """Rows (g · rows, F) of the ready-made model windows in array `windows` (g, rows, F) of an `.npz`; None without.

    Raises UsageError.
    """
    if path.suffix != ".npz":
        return None
    try:
        with _arrays(path) as z:
            if "windows" not in z:
                return None
            given: Floats = z["windows"].astype(np.float32)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UNREADABLE as error:
        raise UsageError(f"{path}: not a file of windows: {error}") from None
    wanted = (spec.window.rows, len(spec.fields)) if spec.window else (len(spec.fields),)
    if given.shape[1:] != wanted:
        raise UsageError(f"{path}: windows has shape {given.shape}, the input needs (any number, {str(wanted)[1:]}")
    rows: Floats = given.reshape(-1, len(spec.fields))
    return rows


@contextlib.contextmanager
def _arrays(path: Path) -> Iterator[Any]:
    # numpy leaves a file open that it was given by name and could not read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        yield arrays


def _recordings(path: Path, spec: Input) -> Data:
    """`rows` (n, fields), `fields`; with `starts` and `rate` several recordings, between which there is a gap."""
    with _arrays(path) as z:
        names = [str(name) for name in z["fields"]]
        wanted = _places(names, spec.fields)
        scale = np.asarray(z["scale"], np.float32) if "scale" in z else np.float32(1)
        every = z["rows"].astype(np.float32) * scale
        if every.ndim != 2 or every.shape[1] != len(names):
            raise ValueError(f"rows has shape {every.shape}, fields names {len(names)} columns")
        rows: Floats = every[:, wanted]
        starts = z["starts"].astype(np.int64) if "starts" in z else np.array([0, len(rows)])
        rate = float(z["rate"]) if "rate" in z else 1.0
        label = z["label"].astype(np.int64) if "label" in z else None
    if not 1e-6 <= rate <= 1e6:
        raise ValueError(f"rate is {rate:g}; give rows per second")
    if label is not None and label.shape != (len(starts) - 1,):
        raise ValueError(f"label has shape {label.shape}, there are {len(starts) - 1} recordings")
    if starts[0] != 0 or starts[-1] != len(rows) or (np.diff(starts) < 0).any():
        raise ValueError(f"starts must ascend from 0 to the number of rows, {len(rows)}")
    which = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    pause_s = 10 + 10 * ((spec.window.max_gap_s or 0.0) if spec.window else 0.0)
    t = np.rint((np.arange(len(rows)) / rate + which * pause_s) * 1e6).astype(np.int64)
    return Data(rows, t, None if label is None else label[which])


def _csv(path: Path, spec: Input) -> Data:
    """The first line names the columns; `t`, if there, is epoch seconds; an empty cell is a missing value."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        header = [name.strip() for name in next(lines, [])]
        wanted = _places(header, spec.fields)
        timed = "t" in header
        columns = [*wanted, header.index("t")] if timed else wanted
        cells = np.fromiter(_cells(lines, columns, header), np.float64)
    table = cells.reshape(-1, len(columns))
    with np.errstate(over="ignore"):
        features = table[:, : len(wanted)].astype(np.float32)
    if not timed:
        return Data(features, np.arange(len(table), dtype=np.int64), None)
    untimed = ~(np.abs(table[:, -1]) < _T_LIMIT_S)
    if untimed.any():
        raise ValueError(f"row {int(np.flatnonzero(untimed)[0]) + 1} has no time in column t, in seconds since 1970")
    return Data(features, np.rint(table[:, -1] * 1e6).astype(np.int64), None)


def _cells(lines: Any, columns: Sequence[int], header: Sequence[str]) -> Iterator[float]:
    for line in lines:
        if not line:
            continue
        if len(line) != len(header):
            raise ValueError(f"line {lines.line_num} has {len(line)} cells, the first line names {len(header)}")
        for column in columns:
            text = line[column].strip()
            try:
                yield float(text) if text else np.nan
            except ValueError:
                raise ValueError(f"line {lines.line_num}, {header[column]}: {text[:40]!r} is no number") from None


def _places(names: Sequence[str], fields: Iterable[str]) -> list[int]:
    missing = [name for name in fields if name not in names]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; there is {', '.join(names)}")
    return [names.index(name) for name in fields]
