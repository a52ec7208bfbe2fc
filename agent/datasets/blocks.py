"""What the readers of data files give: blocks of rows as columns, and where to go on from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.errors import UsageError
from agent.model.bundle.manifest import ModelInput
from agent.model.inference.features import Floats, Ints

TextColumn = NDArray[np.str_]
SUFFIXES = (".csv", ".parquet", ".npz")
FILE_COLUMN, LABEL_COLUMN = "file", "label"
MISSING_VALUES = ("", "NaN", "nan", "NA", "N/A", "null", "NULL", "None")
# Beyond this, microseconds do not fit into 64 bits.
_MAX_TIME_S = 2**63 / 1e6


class FilePosition(msgspec.Struct, frozen=True):
    """Where in a file to go on: so many bytes, lines and rows were read; `t` is the last row's, epoch µs."""

    offset: int = 0
    line: int = 0
    row: int = 0
    t: int = 0


class RowRejection(msgspec.Struct, frozen=True):
    """`file`: the one of many, where a source has many."""

    line: int
    reason: str
    file: str = ""


class RowBlock(msgspec.Struct, frozen=True):
    """`rows` (n, F) physical units, NaN missing; `t` (n,) epoch µs; `number` (n,) rows of the file, from 1.

    `texts` are further columns (n,), as they are written; FILE among them where a source has many, of which no window
    is of two. `after` is where the next block begins.
    """

    rows: Floats
    t: Ints
    row_numbers: Ints
    next_position: FilePosition
    text_columns: dict[str, TextColumn] = msgspec.field(default_factory=dict)
    rejected: list[RowRejection] = msgspec.field(default_factory=list)


class BlockReader(Protocol):
    """A data file. `size` is in the unit of `done`, for a progress bar."""

    path: Path
    columns: list[str]
    size: int

    def blocks(self, position: FilePosition) -> Iterator[RowBlock]:
        """From `place` on. Raises UsageError that names the file."""

    def progress(self, position: FilePosition) -> int: ...


def list_sources(path: Path, spec: ModelInput) -> list[Path]:
    """What is read one after another: `files`, or a folder of images or sounds as a whole. Raises UsageError."""
    return [path] if is_media(spec) else list_files(path)


def is_media(spec: ModelInput) -> bool:
    return spec.image is not None or spec.sound is not None


def list_files(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The data files at `path`: itself, or those of a folder, by name. Raises UsageError."""
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in suffixes and p.is_file() and p.name[0] != ".")
        if not found:
            raise UsageError(f"{path}: no {' or '.join(suffixes)} in this folder")
        return found
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if path.suffix not in suffixes:
        raise UsageError(f"{path}: cannot be read as data; name a {' or '.join(suffixes)}, or a folder of them")
    return [path]


def require_columns(path: Path, columns: list[str], required: list[str]) -> None:
    """Raises UsageError where a column is not there, or there twice."""
    missing = [name for name in required if name not in columns]
    if missing:
        there = ", ".join(columns[:20]) + (", …" if len(columns) > 20 else "")
        raise UsageError(f"{path}: no column {', '.join(missing)}; there is {there or 'none'}")
    twice = [name for name in required if columns.count(name) > 1]
    if twice:
        raise UsageError(f"{path}: column {twice[0]} is there twice; nobody can tell which one is meant")


def row_times(seconds: NDArray[np.float64] | None, row_numbers: Ints, previous_t: int) -> Ints:
    """Epoch µs of rows; one without a time has that of the row before it, a file without times counts its rows."""
    if seconds is None:
        return row_numbers
    unknown = ~(np.abs(seconds) < _MAX_TIME_S)
    us = np.rint(np.where(unknown, 0, seconds) * 1e6).astype(np.int64)
    if not unknown.any():
        return us
    known = np.where(unknown, -1, np.arange(len(us)))
    last = np.maximum.accumulate(known)
    return np.where(last < 0, previous_t, us[last])
