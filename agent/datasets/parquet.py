"""Parquet files as columns. Alone here knows pyarrow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.errors import UsageError

Doubles = NDArray[np.float64]
SUFFIXES = (".parquet", ".pq")


class ParquetTable(msgspec.Struct, frozen=True):
    """`columns` as asked for (n,), NaN missing; `seconds` (n,) since 1970; `texts` by `codes` (n,), "" missing."""

    columns: list[Doubles]
    seconds: Doubles | None
    texts: list[str]
    codes: NDArray[np.int64] | None


def list_columns(path: Path, *, numbers: bool = False) -> list[str]:
    """Of all columns, or of those that hold numbers. Raises ValueError."""
    arrow, parquet = _import_pyarrow(path)
    try:
        return [field.name for field in parquet.read_schema(path) if not numbers or _is_number(arrow, field.type)]
    except arrow.ArrowException as error:
        raise ValueError(f"no Parquet that can be read: {error}") from None


def count_rows(path: Path) -> int:
    """Its rows. Raises ValueError."""
    arrow, parquet = _import_pyarrow(path)
    try:
        return int(parquet.read_metadata(path).num_rows)
    except arrow.ArrowException as error:
        raise ValueError(f"no Parquet that can be read: {error}") from None


def read(path: Path, value_columns: Sequence[str], time_column: str | None, text_column: str | None) -> ParquetTable:
    """`time` is a column of seconds or timestamps, `text` one of texts. Raises ValueError."""
    arrow, parquet = _import_pyarrow(path)
    try:
        more = [name for name in (time_column, text_column) if name is not None and name not in value_columns]
        table = parquet.read_table(path, columns=[*value_columns, *more])
        for name in value_columns:
            if not _is_number(arrow, kind := table.schema.field(name).type):
                raise ValueError(f"column {name} holds {kind}, not numbers")
        columns = [table.column(name).cast(arrow.float64()).to_numpy() for name in value_columns]
        seconds = None if time_column is None else _to_seconds(arrow, table.column(time_column))
        if text_column is None:
            return ParquetTable(columns, seconds, [], None)
        coded = table.column(text_column).cast(arrow.string()).fill_null("").combine_chunks().dictionary_encode()
        return ParquetTable(columns, seconds, coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64))
    except arrow.ArrowException as error:
        raise ValueError(f"no Parquet that can be read: {error}") from None


def _is_number(arrow: Any, kind: Any) -> bool:
    return bool(arrow.types.is_integer(kind) or arrow.types.is_floating(kind))


def _to_seconds(arrow: Any, column: Any) -> Doubles:
    if arrow.types.is_timestamp(column.type):
        micros = column.cast(arrow.timestamp("us"), safe=False).cast(arrow.int64())
        return np.asarray(micros.cast(arrow.float64(), safe=False).to_numpy() / 1e6)
    return np.asarray(column.cast(arrow.float64()).to_numpy())


def _import_pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{path}: Parquet needs pyarrow: pip install 'outstation[parquet]', or give CSV") from None
    return pyarrow, pyarrow.parquet
