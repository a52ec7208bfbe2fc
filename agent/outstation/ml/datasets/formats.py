"""File formats of tables, recognized by suffix or by the first character."""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path
from typing import Any

from outstation.foundation import input_files
from outstation.foundation.errors import UsageError
from outstation.ml.datasets.csv_table import CsvTable
from outstation.ml.datasets.json_lines import JsonLinesTable
from outstation.ml.datasets.parquet_table import ParquetTable
from outstation.ml.datasets.tables import BYTE_ORDER_MARK, Table, TableOptions

TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
PARQUET_SUFFIXES = (".parquet", ".pq")


def open_file(file: Path | int) -> BufferedReader[Any]:
    """Open a path, or a descriptor that stays open, for `open_table`. Raises OSError."""
    return open(file, "rb", closefd=False) if isinstance(file, int) else input_files.open_stream(file)


def open_table(path: Path | None, file: BufferedReader[Any], options: TableOptions) -> Table:
    """Return the table by the suffix of `path`, or by its first character. Raises RowRejected, OSError, UsageError."""
    suffix = path.suffix.lower() if path else ""
    if path is not None and suffix in PARQUET_SUFFIXES:
        return ParquetTable(path, file, options)
    if suffix not in (*TABLE_SUFFIXES, ".txt", ""):
        raise UsageError(f"{path}: {suffix} is not read; use one of {', '.join(TABLE_SUFFIXES)}")
    is_json = suffix in (".jsonl", ".ndjson") or (
        suffix != ".csv" and file.peek(1).removeprefix(BYTE_ORDER_MARK).partition(b"\n")[0].lstrip().startswith(b"{")
    )
    return (JsonLinesTable if is_json else CsvTable)(file, options)
