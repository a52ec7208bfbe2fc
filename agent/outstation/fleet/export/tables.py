"""Tables of an export: one a kind of row, with typed columns, built from messages as the database is.

Every row follows from a signed message, so that an audit can build it again. Labels and metrics that the collector
computed follow from none and are not exported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from outstation.fleet.database.interface import Row
from outstation.fleet.database.projection import PROJECTIONS, provenance_row, result_details
from outstation.fleet.database.schema.message_tables import (
    ALERTS,
    DRIFT_WINDOWS,
    METRICS,
    RESULT_DETAILS,
    RESULT_MESSAGES,
    RESULT_PROVENANCE,
    RESULTS,
    ROLLOUT_DEVICES,
    SHADOWS,
    Column,
    ColumnType,
)
from outstation.foundation import clock
from outstation.foundation.errors import UsageError
from outstation.foundation.extras import install_command
from outstation.protocol.wire.messages import LoggedPayload, ResultsPayload

if TYPE_CHECKING:
    import pyarrow

DAY_US = 86_400_000_000
# A row is in the partition of its day only if that lies near the day of its arrival: a clock without battery, or a
# hostile device, must not make thousands of files.
_MAX_DAYS_BEFORE, _MAX_DAYS_AFTER = 366, 1
# Name that readers of Hive partitions take for NULL.
NO_DAY = "__HIVE_DEFAULT_PARTITION__"
_ROWS_PER_ARRAY = 50_000

# (kind, day or `NO_DAY`)
Partition = tuple[str, str]


class Kind(msgspec.Struct, frozen=True):
    """Rows of one table. `time`: the column by which rows are filtered and partitioned."""

    time: str
    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]


_PROVENANCE = RESULT_PROVENANCE.columns[RESULT_PROVENANCE.names.index("stream") :]
_DETAILS = (RESULT_DETAILS["missing"], RESULT_DETAILS["outputs"])
_FAULTS, _TASK, _TIME = RESULT_MESSAGES["faults"], RESULTS["task"], ALERTS["time"]

# The columns of the table of that name, and those of other tables about the same rows.
KINDS: dict[str, Kind] = {
    "results": Kind("t", (*RESULTS.columns, *_DETAILS, _FAULTS, *_PROVENANCE)),
    "result_messages": Kind("time", (*RESULT_MESSAGES.columns[:-1], _TIME, _TASK, *_PROVENANCE)),
    "drift_windows": Kind("to", DRIFT_WINDOWS.columns),
    **{table.name: Kind("time", table.columns) for table in (ALERTS, METRICS, SHADOWS, ROLLOUT_DEVICES)},
}

# Kinds of messages that give rows.
EXPORTED_MESSAGES = frozenset(
    str(payload.__struct_config__.tag)
    for payload, projections in PROJECTIONS.items()
    if any(projection.table.name in KINDS for projection in projections)
)


class Filters(msgspec.Struct, frozen=True):
    """Rows that an export holds: `since` ≤ time < `until`, RFC 3339; None or empty: no bound."""

    kinds: tuple[str, ...] = tuple(KINDS)
    device: str | None = None
    task: str | None = None
    since: str | None = None
    until: str | None = None


class TableBuilder:
    """Gathers the rows of messages and turns them into tables by partition."""

    def __init__(self, filters: Filters) -> None:
        self._filters = filters
        self._since, self._until = (
            None if text is None else clock.parse_rfc3339(text) for text in (filters.since, filters.until)
        )
        self._pending: dict[Partition, list[Row]] = {}
        self._pending_count = self.row_count = 0
        self._tables: dict[Partition, list[pyarrow.Table]] = {}

    def add(self, body: LoggedPayload, payload: bytes, received: str) -> None:
        """Add the rows of a message."""
        arrived_day = clock.parse_rfc3339(received) // DAY_US
        for name, rows, times in self._build_rows(body, payload):
            for row, t in zip(rows, times, strict=True):
                if (self._since is not None and t < self._since) or (self._until is not None and t >= self._until):
                    continue
                partition = name, _name_day(t // DAY_US, arrived_day)
                self._pending.setdefault(partition, []).append(row)
                self._pending_count += 1
                self.row_count += 1
        if self._pending_count >= _ROWS_PER_ARRAY:
            self._convert()

    def finish(self) -> dict[Partition, pyarrow.Table]:
        """Return the table of each partition, in order."""
        import pyarrow

        self._convert()
        return {
            name: pyarrow.concat_tables(tables).unify_dictionaries().combine_chunks()
            for name, tables in sorted(self._tables.items())
        }

    def _build_rows(self, body: LoggedPayload, payload: bytes) -> Iterator[tuple[str, Iterable[Row], Iterable[int]]]:
        """Yield kind, rows and their times."""
        filters = self._filters
        if filters.device not in (None, body.device):
            return
        for projection in PROJECTIONS.get(type(body), ()):
            name = projection.table.name
            if name not in filters.kinds:
                continue
            rows: Iterable[Row] = projection.build(body, payload)
            if isinstance(body, ResultsPayload):
                _, _, task, *provenance = provenance_row(body)
                if name == RESULT_MESSAGES.name:
                    rows = [(*row[:-1], body.time, task, *provenance) for row in rows]
                else:
                    details, none = result_details(body, payload), (None, None)
                    faults = msgspec.json.encode(body.faults).decode() if body.faults else None
                    at = KINDS[name].names.index("row")
                    rows = [(*row, *details.get(row[at], none), faults, *provenance) for row in rows]
            if filters.task is not None:
                at = KINDS[name].names.index("task")
                rows = [row for row in rows if row[at] == filters.task]
            at = KINDS[name].names.index(KINDS[name].time)
            times = [row[at] if isinstance(row[at], int) else clock.parse_rfc3339(row[at]) for row in rows]
            yield name, rows, times

    def _convert(self) -> None:
        import pyarrow

        for partition, rows in self._pending.items():
            kind = KINDS[partition[0]]
            arrays = [
                _to_array(column, values) for column, values in zip(kind.columns, zip(*rows, strict=True), strict=True)
            ]
            table = pyarrow.Table.from_arrays(arrays, schema=arrow_schema(partition[0]))
            self._tables.setdefault(partition, []).append(table)
        self._pending, self._pending_count = {}, 0


@lru_cache(1024)
def _name_day(day: int, arrived_day: int) -> str:
    is_near = -_MAX_DAYS_BEFORE <= day - arrived_day <= _MAX_DAYS_AFTER
    return clock.to_rfc3339(day * DAY_US)[:10] if is_near else NO_DAY


def arrow_schema(name: str) -> pyarrow.Schema:
    """Return the schema of a kind; a field's metadata has its description and unit. Raises UsageError."""
    pyarrow = _import_pyarrow()
    types: Mapping[ColumnType, Any] = {
        "text": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "json": pyarrow.string(),
        "integer": pyarrow.int64(),
        "real": pyarrow.float64(),
        "rfc3339": pyarrow.timestamp("us", "UTC"),
        "epoch_us": pyarrow.timestamp("us", "UTC"),
        "outputs": pyarrow.map_(pyarrow.string(), pyarrow.float64()),
        "names": pyarrow.list_(pyarrow.string()),
    }
    fields = []
    for column in KINDS[name].columns:
        metadata = {"description": column.meaning, **({"unit": column.unit} if column.unit else {})}
        fields.append(pyarrow.field(column.name, types[column.type], metadata=metadata))
    return pyarrow.schema(fields, metadata={"outstation_kind": name})


def _to_array(column: Column, values: tuple[Any, ...]) -> pyarrow.Array:
    pyarrow = _import_pyarrow()
    if column.type == "text":
        return pyarrow.array(values, pyarrow.string()).dictionary_encode()
    if column.type == "rfc3339":
        values = tuple(None if text is None else clock.parse_rfc3339(text) for text in values)
    if column.type in ("rfc3339", "epoch_us"):
        return pyarrow.array(values, pyarrow.int64()).cast(pyarrow.timestamp("us", "UTC"))
    if column.type == "outputs":
        maps = [None if text is None else [*msgspec.json.decode(text).items()] for text in values]
        return pyarrow.array(maps, pyarrow.map_(pyarrow.string(), pyarrow.float64()))
    if column.type == "names":
        lists = [None if text is None else msgspec.json.decode(text) for text in values]
        return pyarrow.array(lists, pyarrow.list_(pyarrow.string()))
    plain = {"json": pyarrow.string(), "integer": pyarrow.int64(), "real": pyarrow.float64()}
    return pyarrow.array(values, plain[column.type])


def _import_pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UsageError(f"writing Parquet needs pyarrow: {install_command('sql')}") from None
    return pyarrow
