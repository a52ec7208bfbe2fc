"""Tables whose rows follow from messages: each column once, with its type and meaning.

Migrations, projections, the audit, `fleet db rebuild`, exports and the reference page read them from here. The values
of a projected row are in the order of its table's columns. A new column is the last one of its table, with the number
of a new migration as `added`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

# json, outputs (JSON object of numbers and labels) and names (JSON array) are text; rfc3339 is text, epoch_us a number.
ColumnType = Literal["text", "json", "outputs", "names", "rfc3339", "integer", "epoch_us", "real", "boolean", "blob"]
# clustered: in SQLite the rows are in the b-tree of the key. numbered: `rowid` is the order of arrival, in PostgreSQL
# as well.
Storage = Literal["heap", "numbered", "clustered"]

# PostgreSQL numbers the rows of a table only if a column does so; SQLite always has `rowid`.
ROWID = "/* rowid */"
_SQL_TYPES = {
    **dict.fromkeys(("text", "json", "outputs", "names", "rfc3339"), "TEXT"),
    **dict.fromkeys(("integer", "epoch_us"), "INTEGER"),
    "real": "REAL",
    "boolean": "BOOLEAN",
    "blob": "BLOB",
}


class Column(msgspec.Struct, frozen=True):
    """`default`: SQL; `added`: number of the migration that adds the column, from 1 on."""

    name: str
    type: ColumnType
    meaning: str
    unit: str = ""
    is_optional: bool = False
    default: str = ""
    added: int = 1

    @property
    def sql(self) -> str:
        default = f" DEFAULT {self.default}" if self.default else ""
        return f'"{self.name}" {_SQL_TYPES[self.type]}{"" if self.is_optional else " NOT NULL"}{default}'


class Table(msgspec.Struct, frozen=True):
    """`row`: meaning of one row; `key`: the primary key, device first."""

    name: str
    row: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    storage: Storage = "heap"
    # Columns after device, log and seq by which an index finds the rows of a message.
    indexed: tuple[str, ...] = ()
    # PostgreSQL divides the tables that grow with every message.
    is_partitioned: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    def __getitem__(self, name: str) -> Column:
        return self.columns[self.names.index(name)]

    def create(self) -> str:
        """Return the statement that creates the table as the first migration does."""
        parts = [column.sql for column in self.columns if column.added == 1]
        if self.key:
            parts.append(f"PRIMARY KEY ({', '.join(self.key)})")
        rowid = ROWID if self.storage == "numbered" else ""
        end = " WITHOUT ROWID" if self.storage == "clustered" else ""
        return f"CREATE TABLE {self.name} ({', '.join(parts)}{rowid}){end}"

    def add_columns(self, migration: int) -> list[str]:
        """Return the statements that add the columns of a later migration."""
        return [f"ALTER TABLE {self.name} ADD COLUMN {c.sql}" for c in self.columns if c.added == migration]


_DEVICE = Column("device", "text", "the device that signed")
_TASK = Column("task", "text", "task on the device")
_PLACE = (Column("log", "text", "log of the message"), Column("seq", "integer", "number of the message in its log"))
_KEY = ("device", "log", "seq")
_TIME = Column("time", "rfc3339", "the device's clock when it signed", "us")
_ROWS = (
    Column("rows_first", "integer", "first row of the stream that the message covers"),
    Column("rows_last", "integer", "last row of the stream that the message covers"),
)
_BUNDLE = (
    Column("model", "text", "name of the bundle"),
    Column("version", "text", "version of the bundle"),
    Column("digest", "text", "digest of the bundle"),
)
_STREAM = Column("stream", "text", "stream of readings")

RESULTS = Table(
    "results",
    "one inference",
    (
        *(_DEVICE, _TASK),
        Column("row", "integer", "last row of the result's window"),
        Column("t", "epoch_us", "time of that row, as signed", "us"),
        Column("label", "text", "predicted label", is_optional=True),
        Column("score", "real", "score of the label", "1", is_optional=True),
        Column("value", "real", "predicted value, in the model's unit", is_optional=True),
        *_PLACE,
    ),
    indexed=("task", "row"),
    is_partitioned=True,
)
RESULT_DETAILS = Table(
    "result_details",
    "what few results have: a result with a share of missing input, or with further outputs",
    (
        *(_DEVICE, *_PLACE),
        Column("row", "integer", "last row of the result's window"),
        Column("missing", "real", "share of the input that was missing", "1", is_optional=True),
        Column(
            *("outputs", "outputs", "further outputs: value_NAME in the model's unit, score_LABEL, label_NAME"),
            is_optional=True,
        ),
    ),
    (*_KEY, "row"),
    "clustered",
    indexed=("row",),
    is_partitioned=True,
)
RESULT_MESSAGES = Table(
    "result_messages",
    "a results message, also one that lists none of its results",
    (
        *(_DEVICE, *_PLACE, *_ROWS),
        Column("n", "integer", "results, also those that the message does not list"),
        Column("incomplete", "integer", "results that missed more input than the bundle allows"),
        Column("faults", "names", "fields with a sensor fault meanwhile", is_optional=True),
        Column("provenance", "text", "its row of `result_provenance`"),
    ),
    _KEY,
    "clustered",
    is_partitioned=True,
)
RESULT_PROVENANCE = Table(
    "result_provenance",
    "bundle and maker of results, shared by messages",
    (
        _DEVICE,
        Column("provenance", "text", "digest of the columns after it"),
        *(_TASK, _STREAM, *_BUNDLE),
        Column("agent", "text", "version of the agent", is_optional=True),
        Column("runtime", "text", "name and version of the TFLite runtime", is_optional=True),
        Column("config", "text", "digest of the task's config", is_optional=True),
    ),
    ("device", "provenance"),
    "clustered",
)
DRIFT_WINDOWS = Table(
    "drift_windows",
    "a drift window, or a run of quiet ones",
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
        *_BUNDLE[:2],
        Column("reference", "json", "digests of the references, JSON"),
        Column("features", "json", "tests and sums of each field, JSON"),
        Column("output", "json", "tests of the output, JSON"),
        Column("joint", "json", "tests of all fields together, JSON", is_optional=True),
        Column("estimate", "json", "estimated accuracy, JSON", is_optional=True),
        Column("windows", "json", "columns of a run of quiet windows, JSON", is_optional=True),
        *_PLACE,
    ),
    _KEY,
)
_ALERT = (
    Column("task", "text", "task on the device", is_optional=True),
    Column("alert", "text", "kind of alert"),
    Column("subject", "text", "what it is about, such as a field"),
)
_SEVERITY = Column("severity", "text", "info, warning or critical")
_REVISION = Column("revision", "integer", "grows while the alert is open")
ALERTS = Table(
    "alerts",
    "an alert, raised or cleared; with an empty `device`: about the fleet",
    (
        *(_DEVICE, *_ALERT),
        Column("state", "text", "raised or cleared"),
        _SEVERITY,
        Column("summary", "json", "sentence for people"),
        _TIME,
        Column("id", "text", "the alert, over its messages"),
        Column("source", "text", "device; collector: the collector's own, which no export has"),
        *(*_PLACE, _REVISION),
    ),
    (*_KEY, "source"),
    "numbered",
)
# Columns after the key and `ref` in three groups, each of which the newest message of its kind decides.
INCIDENTS = Table(
    "incidents",
    "all messages of `alerts` with one source, device, log and ID",
    (
        *(_DEVICE, _PLACE[0], ALERTS["id"], ALERTS["source"]),
        Column("ref", "text", "its name in commands"),
        Column("seq", "integer", "number of the newest message"),
        Column("state", "text", "raised or cleared, by the newest message"),
        Column("updated", "rfc3339", "time of the newest message", "us"),
        Column("last_summary", "text", "sentence of the newest message"),
        Column("raised_seq", "integer", "number of the newest message that raised it, or minus that of the oldest"),
        *(*_ALERT, _SEVERITY, ALERTS["summary"], _REVISION),
        Column("began_seq", "integer", "number of the newest message that began it, or minus that of the oldest"),
        Column("raised", "rfc3339", "when it began", "us"),
    ),
    ("device", "log", "id", "source"),
    "clustered",
)
QUALITY_MESSAGES = Table(
    "quality_messages",
    "metrics from labels at the device",
    (_DEVICE, _TASK, _TIME, Column("body", "json", "the message, JSON"), *_PLACE),
    _KEY,
)
METRICS = Table(
    "metrics",
    "one metric of a quality message, or with seq 0 of labels at the collector",
    (
        *(_DEVICE, _TASK, _TIME),
        Column("metric", "text", "name of the metric"),
        Column("slice", "text", "part of the results; empty for all"),
        Column("value", "real", "the metric", is_optional=True),
        Column("low", "real", "lower end of its 95 % interval", is_optional=True),
        Column("high", "real", "upper end of its 95 % interval", is_optional=True),
        Column("n", "integer", "labelled results"),
        Column("state", "text", "of a slice: ok, worse or small", is_optional=True),
        Column("source", "text", "device; collector, verdicts: computed by the collector, which no export has"),
        *_PLACE,
        Column(
            *("output", "text", "name of a further output of the model; empty for the first one"),
            default="''",
            added=3,
        ),
    ),
    indexed=("task",),
)
SHADOWS = Table(
    "shadows",
    "a comparison of two bundles that a device reported",
    (
        *(_DEVICE, _TASK),
        Column("rollout", "text", "the rollout"),
        Column("model", "text", "digest of the active bundle"),
        Column("other", "text", "digest of the shadow"),
        *(_TIME, *_ROWS),
        Column("batches", "integer", "batches of the shadow"),
        Column("n", "integer", "compared windows"),
        Column("errors", "integer", "batches in which the shadow failed"),
        QUALITY_MESSAGES["body"],
        *_PLACE,
    ),
    _KEY,
    "numbered",
)
LEARNED_REFERENCES = Table(
    "learned_references",
    "a reference that a device learned, or that an operator accepted there",
    (
        *(_DEVICE, _TASK),
        Column("event", "text", "learned or reference accepted"),
        Column("site", "text", "digest of the reference"),
        Column("fields", "json", "rows `n`, `mean` and `sd` of each field, JSON"),
        *(_TIME, *_PLACE),
    ),
    _KEY,
)
ROLLOUT_DEVICES = Table(
    "rollout_devices",
    "a phase change of a device in a rollout",
    (
        *(_DEVICE, _TASK, SHADOWS["rollout"]),
        Column("digest", "text", "digest of its bundle"),
        Column("strategy", "text", "shadow, canary, all or rollback"),
        Column("phase", "text", "phase that the device entered"),
        Column("reason", "text", "why"),
        ALERTS["summary"],
        Column("numbers", "json", "measured numbers, JSON"),
        *(_TIME, *_PLACE),
    ),
    _KEY,
)
SAMPLES = Table(
    "samples",
    "readings around a result, as the device sealed them",
    (
        *(_DEVICE, _TASK, _STREAM),
        Column("reason", "text", "alert, uncertain or requested"),
        Column("subject", "text", "ID of the alert; empty without one"),
        Column("row", "integer", "last row of the result's window"),
        *_ROWS,
        Column("digits", "integer", "significant digits of the readings"),
        *(*_BUNDLE, _TIME),
        Column("sealed", "blob", "the readings, encrypted; empty where withheld"),
        *_PLACE,
    ),
    _KEY,
)

_LOG = ("device", "log")
LOGS = Table(
    "logs",
    "a device's log; the newest one of a device is its first live one",
    (
        *(_DEVICE, _PLACE[0]),
        Column("last_seq", "integer", "highest `seq` that arrived; `gaps` has the ranges that are missing below it"),
        Column("since", "rfc3339", "when the first new message arrived", "us"),
        Column("latest", "rfc3339", "when the last new message arrived", "us"),
        Column("live", "boolean", "no other log took its place"),
    ),
    _LOG,
    "numbered",
)
LOG_SUCCESSORS = Table(
    "log_successors",
    "a log whose place another one took",
    (
        *(_DEVICE, _PLACE[0]),
        Column("successor", "text", "the log that took its place; empty: the next one"),
        Column("last_seq", "integer", "last `seq` of the log"),
        Column("until", "rfc3339", "a message that is new after this time shows that the log lives", "us"),
        Column("source", "text", "device: signed in a `new log` message; operator: `fleet log accept`, or a new key"),
    ),
    (*_LOG, "successor", "source"),
    "clustered",
)
LOG_ENDS = Table(
    "log_ends",
    "a log that a later log of the device continues",
    (*(_DEVICE, _PLACE[0]), Column("last_seq", "integer", "its last `seq`; gaps up to it are declared")),
    _LOG,
    "clustered",
)
GAPS = Table(
    "gaps",
    "missing messages",
    (
        *(_DEVICE, _PLACE[0]),
        Column("first", "integer", "first `seq` that is missing"),
        Column("last", "integer", "last `seq` that is missing"),
        Column("declared", "boolean", "a signed message declares them evicted, or ends their log"),
    ),
    (*_LOG, "first"),
    "clustered",
)
_BOOT = Column("boot", "integer", "number of the boot")
_SEGMENT = Column("segment", "integer", "number of the time between two steps of the wall clock")
ANCHORS = Table(
    "anchors",
    "a device's two clocks at one moment",
    (
        *(_DEVICE, *_PLACE, _BOOT, _SEGMENT),
        Column("boot_us", "integer", "time since the boot", "us"),
        Column("wall_us", "epoch_us", "time of the wall clock", "us"),
        Column("quality", "text", "synced, restored or unsynced"),
        Column("error_us", "integer", "largest error that the time service states", "us", is_optional=True),
        Column("step_us", "integer", "step of the wall clock that began the segment", "us"),
        Column("trusted", "boolean", "a time service synchronised it, and it is not ahead of the collector's clock"),
    ),
    _KEY,
    "clustered",
)
SEGMENTS = Table(
    "segments",
    "time of a boot between two steps of its wall clock",
    (
        *(_DEVICE, _PLACE[0], _BOOT, _SEGMENT),
        Column("seq", "integer", "number of the message with its first anchor"),
        Column("offset_us", "integer", "wall clock minus boot time, at that anchor", "us"),
        Column(
            *("synced", "integer", "1: one of its anchors is trusted; 0: none, but synchronised; NULL: never"),
            is_optional=True,
        ),
    ),
    (*_LOG, "boot", "segment"),
    "clustered",
)
BOOTS = Table(
    "boots",
    "a boot of a device",
    (
        *(_DEVICE, _PLACE[0], _BOOT),
        Column("last_us", "integer", "latest known time since the boot", "us"),
        Column("trusted", "boolean", "one of its anchors is trusted", default="FALSE"),
        Column("disagreement_us", "integer", "by which its trusted anchors contradict each other", "us", default="0"),
        Column(
            *("start_us", "integer", "wall clock at the boot, where only boots before and after it have anchors", "us"),
            is_optional=True,
        ),
        Column("start_error_us", "integer", "bound of the error of `start_us`", "us", is_optional=True),
    ),
    (*_LOG, "boot"),
    "clustered",
)
STAMPS = Table(
    "stamps",
    "clock of the results of a message from one row on",
    (
        *(_DEVICE, *_PLACE),
        Column("first", "integer", "the first of the rows"),
        _BOOT,
        Column("segment", "integer", "0: the producer's own time; NULL: not known yet", is_optional=True),
        Column("quality", "integer", "0: synced; 1: restored; 2: unsynced"),
        Column("implied", "boolean", "the segment is that of the last anchor before the message"),
    ),
    (*_KEY, "first"),
    "clustered",
)

# Each row follows from one message.
PROJECTED = {
    table.name: table
    for table in (
        *(RESULTS, RESULT_DETAILS, RESULT_MESSAGES, DRIFT_WINDOWS, ALERTS, QUALITY_MESSAGES, METRICS, SHADOWS),
        *(SAMPLES, ROLLOUT_DEVICES, LEARNED_REFERENCES),
    )
}
# Each row gathers many messages.
GATHERED = {
    table.name: table
    for table in (
        *(LOGS, LOG_SUCCESSORS, LOG_ENDS, RESULT_PROVENANCE, INCIDENTS, GAPS, ANCHORS, SEGMENTS, BOOTS, STAMPS),
    )
}
TABLES = PROJECTED | GATHERED
# Other rows of these are the collector's own, with another `source` than device.
SHARED = frozenset({ALERTS.name, METRICS.name})
