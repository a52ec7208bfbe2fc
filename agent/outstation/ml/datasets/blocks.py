"""Model input from data files: blocks of rows in physical units, with times, texts and rejected rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.errors import UsageError
from outstation.ml.datasets.tables import START, FilePosition, RowRejection

TextColumn = NDArray[np.str_]
FILE_COLUMN, LABEL_COLUMN, TIME_COLUMN = "file", "label", "t"
# Beyond this, microseconds do not fit into 64 bits.
MAX_TIME_S = 2**63 / 1e6


class RowBlock(msgspec.Struct, frozen=True):
    """Consecutive rows; the next block begins at `next_position`.

    `rows` (n, F) physical units, NaN missing; `t` (n,) epoch µs; `row_numbers` (n,) count the rows of the file from 1.
    `text_columns` (n,) hold further columns as text; FILE_COLUMN is among them if the source is a folder: then no
    window spans two of its files.
    """

    rows: Float32s
    t: Ints
    row_numbers: Ints
    next_position: FilePosition
    text_columns: dict[str, TextColumn] = msgspec.field(default_factory=dict)
    rejected: list[RowRejection] = msgspec.field(default_factory=list)


class BlockReader(Protocol):
    """Source of model input; `size` is in the unit of `progress`."""

    path: Path
    columns: list[str]
    size: int

    def blocks(self, position: FilePosition = START) -> Iterator[RowBlock]:
        """Yield blocks from `position` on, always the same ones. Raises UsageError that names the file."""
        ...

    def progress(self, position: FilePosition) -> int: ...


class MissingColumns(UsageError):
    """A file lacks the columns `names`; `advice` is what to do."""

    def __init__(self, path: Path, names: Sequence[str], columns: Sequence[str], advice: str) -> None:
        super().__init__(path, names, columns, advice)
        self.path, self.names, self.columns, self.advice = path, names, columns, advice

    def __str__(self) -> str:
        present = ", ".join(self.columns[:20]) + (", …" if len(self.columns) > 20 else "")
        return f"{self.path}: no column {', '.join(self.names)}; there is {present or 'none'}; {self.advice}"


def require_columns(path: Path, columns: Sequence[str], required: Sequence[str]) -> None:
    """Raise UsageError if a required column is missing, or there twice."""
    missing = [name for name in required if name not in columns]
    if missing:
        raise MissingColumns(path, missing, columns, "give a file with it")
    twice = [name for name in required if columns.count(name) > 1]
    if twice:
        raise UsageError(f"{path}: column {twice[0]} is there twice; nobody can tell which one is meant")
