"""Tables of an export: one a kind of row, with typed columns, built from messages as the database is.

Every row follows from a signed message, so that an audit can build it again. Labels and metrics that the collector
computed follow from none and are not exported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from outstation.fleet.database.interface import Row
from outstation.fleet.database.projection import PROJECTIONS, RESULT_MESSAGES_TABLE, provenance_row, result_details
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

# text: dictionary of strings; json: string; rfc3339 and epoch_us: timestamp; the others as their names say.
ColumnType = Literal["text", "json", "integer", "real", "rfc3339", "epoch_us", "outputs", "names"]
# (kind, day or `NO_DAY`)
Partition = tuple[str, str]


class Column(msgspec.Struct, frozen=True):
    name: str
    type: ColumnType
    meaning: str
    unit: str = ""


class Kind(msgspec.Struct, frozen=True):
    """Rows of one table. `time`: the column by which rows are filtered and partitioned."""

    time: str
    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]


_DEVICE = Column("device", "text", "the device that signed")
_TASK = Column("task", "text", "task on the device")
_FAULTS = Column("faults", "names", "fields with a sensor fault meanwhile")
_TIME = Column("time", "rfc3339", "the device's clock when it signed", "us")
_PLACE = (
    Column("log", "text", "log of the message"),
    Column("seq", "integer", "number of the message in its log"),
)
_ROWS = (
    Column("rows_first", "integer", "first row of the stream that the message covers"),
    Column("rows_last", "integer", "last row of the stream that the message covers"),
)
_PROVENANCE = (
    Column("stream", "text", "stream of readings"),
    Column("model", "text", "name of the bundle"),
    Column("version", "text", "version of the bundle"),
    Column("digest", "text", "digest of the bundle"),
    Column("agent", "text", "version of the agent"),
    Column("runtime", "text", "name and version of the TFLite runtime"),
    Column("config", "text", "digest of the task's config"),
)

# The first columns of each kind are those of the table of that name, in its order.
KINDS: dict[str, Kind] = {
    "results": Kind(
        "t",
        (
            *(_DEVICE, _TASK),
            Column("row", "integer", "last row of the result's window"),
            Column("t", "epoch_us", "time of that row, as signed", "us"),
            Column("label", "text", "predicted label"),
            Column("score", "real", "score of the label", "1"),
            Column("value", "real", "predicted value, in the model's unit"),
            *_PLACE,
            Column("missing", "real", "share of the input that was missing", "1"),
            Column("outputs", "outputs", "further outputs: value_NAME in the model's unit, score_LABEL, label_NAME"),
            _FAULTS,
            *_PROVENANCE,
        ),
    ),
    "result_messages": Kind(
        "time",
        (
            *(_DEVICE, *_PLACE, *_ROWS),
            Column("n", "integer", "results, also those that the message does not list"),
            Column("incomplete", "integer", "results that missed more input than the bundle allows"),
            *(_FAULTS, _TIME, _TASK, *_PROVENANCE),
        ),
    ),
    "drift_windows": Kind(
        "to",
        (
            *(_DEVICE, _TASK),
            Column("window", "integer", "index of the first drift window"),
            Column("window_count", "integer", "drift windows in the message"),
            Column("first", "integer", "first row of the stream"),
            Column("last", "integer", "last row of the stream"),
            Column("from", "rfc3339", "begin of the first window", "us"),
            Column("to", "rfc3339", "end of the last window", "us"),
            Column("n", "integer", "rows in the windows"),
            Column("state", "text", "ok, drift, fault or insufficient"),
            Column("model", "text", "name of the bundle"),
            Column("version", "text", "version of the bundle"),
            Column("reference", "json", "digests of the references, JSON"),
            Column("features", "json", "tests and sums of each field, JSON"),
            Column("output", "json", "tests of the output, JSON"),
            Column("joint", "json", "tests of all fields together, JSON"),
            Column("estimate", "json", "estimated accuracy, JSON"),
            Column("windows", "json", "columns of a run of quiet windows, JSON"),
            *_PLACE,
        ),
    ),
    "alerts": Kind(
        "time",
        (
            *(_DEVICE, _TASK),
            Column("alert", "text", "kind of alert"),
            Column("subject", "text", "what it is about, such as a field"),
            Column("state", "text", "raised or cleared"),
            Column("severity", "text", "info, warning or critical"),
            Column("summary", "json", "sentence for people"),
            _TIME,
            Column("id", "text", "the alert, over its messages"),
            Column("source", "text", "device"),
            *_PLACE,
            Column("revision", "integer", "grows while the alert is open"),
        ),
    ),
    "metrics": Kind(
        "time",
        (
            *(_DEVICE, _TASK, _TIME),
            Column("metric", "text", "name of the metric"),
            Column("slice", "text", "part of the results; empty for all"),
            Column("value", "real", "the metric"),
            Column("low", "real", "lower end of its 95 % interval"),
            Column("high", "real", "upper end of its 95 % interval"),
            Column("n", "integer", "labelled results"),
            Column("state", "text", "of a slice: ok, worse or small"),
            Column("source", "text", "device"),
            *_PLACE,
            Column("output", "text", "name of a further output of the model; empty for the first one"),
        ),
    ),
    "shadows": Kind(
        "time",
        (
            *(_DEVICE, _TASK),
            Column("rollout", "text", "the rollout"),
            Column("model", "text", "digest of the active bundle"),
            Column("other", "text", "digest of the shadow"),
            *(_TIME, *_ROWS),
            Column("batches", "integer", "batches of the shadow"),
            Column("n", "integer", "compared windows"),
            Column("errors", "integer", "batches in which the shadow failed"),
            Column("body", "json", "the message, JSON"),
            *_PLACE,
        ),
    ),
    "rollout_devices": Kind(
        "time",
        (
            *(_DEVICE, _TASK),
            Column("rollout", "text", "the rollout"),
            Column("digest", "text", "digest of its bundle"),
            Column("strategy", "text", "shadow, canary, all or rollback"),
            Column("phase", "text", "phase that the device entered"),
            Column("reason", "text", "why"),
            Column("summary", "json", "sentence for people"),
            Column("numbers", "json", "measured numbers, JSON"),
            _TIME,
            *_PLACE,
        ),
    ),
}

# Kinds of messages that give rows.
EXPORTED_MESSAGES = frozenset(
    str(payload.__struct_config__.tag)
    for payload, projections in PROJECTIONS.items()
    if any(projection.table in KINDS for projection in projections)
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
            name = projection.table
            if name not in filters.kinds:
                continue
            rows: Iterable[Row] = projection.build(body, payload)
            if isinstance(body, ResultsPayload):
                _, _, task, *provenance = provenance_row(body)
                if name == RESULT_MESSAGES_TABLE:
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
