"""File formats of tables, told by suffix or by the first character."""

from __future__ import annotations

import os
from io import BufferedReader
from pathlib import Path
from typing import Any

from agent.datasets.csv_table import BLOCK_BYTES, CsvTable
from agent.datasets.json_lines import JsonLinesTable, RowCheck
from agent.datasets.parquet_table import ParquetTable
from agent.datasets.tables import BYTE_ORDER_MARK, Table
from agent.errors import UsageError

TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
PARQUET_SUFFIXES = (".parquet", ".pq")


def open_file(file: Path | int) -> BufferedReader[Any]:
    """Open a path, or a descriptor that stays open, for `open_table`. Raises OSError."""
    return open(file, "rb", closefd=not isinstance(file, int))


def open_table(
    path: Path | None,
    file: BufferedReader[Any],
    *,
    block_bytes: int = BLOCK_BYTES,
    use_pyarrow: bool = False,
    check_row: RowCheck = lambda _: None,
) -> Table:
    """Return the table in `file`, by the suffix of `path`; without one the first character tells JSON Lines from CSV.

    `check_row` is for JSON Lines, `use_pyarrow` for CSV. Raises RowRejected, OSError, UsageError for another suffix.
    """
    suffix = path.suffix.lower() if path else ""
    if path is not None and suffix in PARQUET_SUFFIXES:
        return ParquetTable(path)
    if suffix not in (*TABLE_SUFFIXES, ".txt", ""):
        raise UsageError(f"{path}: {suffix} is not read; use one of {', '.join(TABLE_SUFFIXES)}")
    if suffix in (".jsonl", ".ndjson") or (suffix != ".csv" and _begins_with_object(file)):
        return JsonLinesTable(file, _file_size(file), check_row)
    return CsvTable(file, _file_size(file), block_bytes, use_pyarrow=use_pyarrow)


def _begins_with_object(file: BufferedReader[Any]) -> bool:
    return file.peek(1).removeprefix(BYTE_ORDER_MARK).partition(b"\n")[0].lstrip().startswith(b"{")


def _file_size(file: BufferedReader[Any]) -> int:
    """Return the size in bytes; 0 of a pipe."""
    try:
        return os.fstat(file.fileno()).st_size
    except OSError:
        return 0
