"""Feed: the rows of one stream of a simulated device, at the times at which they are due, with injected faults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.config.streams import StreamConfig
from outstation.device.intake.sources.recordings import Playlist, PlaylistItem
from outstation.device.intake.sources.replay import inject_faults
from outstation.foundation.arrays import Float64s
from outstation.foundation.errors import UsageError
from outstation.ml.datasets import readers, recordings
from outstation.ml.datasets.blocks import TIME_COLUMN
from outstation.ml.datasets.recordings import Recordings
from outstation.ml.datasets.tables import ColumnType, Table
from outstation.workbench.testing.simulation.scenario import SensorFault

_MAX_BLOCK_ROWS = 8_192
_MAX_TABLE_ROWS = 20_000_000


class RecordingFile(msgspec.Struct, frozen=True, eq=False):
    """Recordings of a stream from `path`: which of their columns are its fields, in order."""

    path: Path
    recordings: Recordings
    columns: tuple[str, ...]

    @property
    def subjects(self) -> list[int | None]:
        """Subjects whose recordings devices replay in turn; None: all recordings."""
        return [None] if self.recordings.t is not None else [*sorted({int(s) for s in self.recordings.subject})]


def load(path: Path, stream: StreamConfig, columns: Sequence[str]) -> RecordingFile:
    """Load recordings or a table; `columns`: those of the stream's fields, by default of the same names.

    Raises UsageError.
    """
    columns = columns or [field.name for field in stream.fields]
    if len(columns) != len(stream.fields):
        raise UsageError(f"{path}: {len(columns)} columns are named, the stream has {len(stream.fields)} fields")
    loaded = recordings.load(path) if path.suffix == ".npz" else _load_table(path, columns)
    missing = [name for name in columns if name not in loaded.fields]
    if missing:
        raise UsageError(f"{path}: has no {', '.join(missing)}; it has {', '.join(loaded.fields)}")
    return RecordingFile(path, loaded, tuple(columns))


def _load_table(path: Path, columns: Sequence[str]) -> Recordings:
    """Load the numbers of a table as one recording; its column `t` gives the times."""
    parts: dict[str, list[NDArray[np.float64]]] = {}
    with readers.open_table(path) as table:
        names = [name for name in table.columns if name in columns]
        for block in table.read(types := _column_types(table, columns)):
            for name in types:
                parts.setdefault(name, []).append(np.asarray(block.columns[name], np.float64))
    arrays = {name: np.concatenate(pieces) for name, pieces in parts.items()}
    n = len(next(iter(arrays.values()), ()))
    if not 1 < n <= _MAX_TABLE_ROWS:
        raise UsageError(f"{path}: has {n} rows; a recording needs 2 to {_MAX_TABLE_ROWS:,}")
    t = arrays.pop(TIME_COLUMN, None)
    rows = np.stack([arrays[name].astype(np.float32) for name in names], axis=1)
    none = np.zeros(1, np.int64)
    return Recordings(rows, np.array([0, n]), none, [], none, names, 1.0, t)


def _column_types(table: Table, columns: Sequence[str]) -> dict[str, ColumnType]:
    """Return the types of the columns that a recording of a table has."""
    types = dict.fromkeys((name for name in table.columns if name in columns), ColumnType.FLOAT)
    if TIME_COLUMN in table.columns:
        types[TIME_COLUMN] = ColumnType.TIME
    return types


def load_texts(file: RecordingFile, column: str) -> list[str]:
    """Return the texts of a table's column, one for each row of its recording. Raises UsageError without it."""
    texts: list[str] = []
    with readers.open_table(file.path) as table:
        if column not in table.columns:
            raise UsageError(f"{file.path}: has no column {column!r} for labels; it has {', '.join(table.columns)}")
        # With the same types as the recording: a row that one of them rejects is in neither.
        for block in table.read({column: ColumnType.TEXT, **_column_types(table, file.columns)}):
            texts += map(str, block.columns[column])
    return texts


class Block(msgspec.Struct, frozen=True, eq=False):
    """Rows that are due: simulated times (n,), columns by field, and the rows of the recordings (n,).

    `first`: number of the first row, from 1.
    """

    first: int
    due_s: Float64s
    columns: dict[str, Float64s]
    source_rows: NDArray[np.int64]


class Feed:
    """Rows of a stream from `start_s` on. `take` returns what is due; `put_back` has it returned again."""

    def __init__(
        self,
        fields: Sequence[str],
        file: RecordingFile,
        playlist: Playlist,
        start_s: float,
        faults: Sequence[SensorFault],
    ) -> None:
        self._fields, self._file, self._start_s, self._faults = fields, file, start_s, faults
        self._indices = [file.recordings.fields.index(name) for name in file.columns]
        self._items = playlist.iter_items()
        self._item = PlaylistItem(1, 0, 0, 0, 0.0)
        self._at = self._count = 0
        self._returned: Block | None = None

    def next_block(self, until_s: float) -> Block | None:
        """Return the next rows that are due at `until_s`, at most a block of them; None if there are none."""
        if self._returned is not None:
            block, self._returned = self._returned, None
            return block
        if self._at >= self._item.n:
            self._item, self._at = next(self._items), 0
        n = min(self._item.n - self._at, _MAX_BLOCK_ROWS)
        due_s = self._due_times(n)
        n = int(np.searchsorted(due_s, until_s, side="right"))
        if not n:
            return None
        return self._build(due_s[:n], n)

    def put_back(self, block: Block) -> None:
        """Return a block again at the next call: the store was full."""
        self._returned = block

    def skip(self, until_s: float) -> None:
        """Drop what is due at `until_s`: the sensor had no power."""
        while self.next_block(until_s) is not None:
            pass

    def _due_times(self, n: int) -> Float64s:
        recordings, item, at = self._file.recordings, self._item, self._at
        if recordings.t is None:
            return self._start_s + item.offset_s + np.arange(at, at + n) / recordings.rate
        first = float(recordings.t[0])
        times: Float64s = recordings.t[item.start + at : item.start + at + n] - first + item.offset_s + self._start_s
        return times

    def _build(self, due_s: Float64s, n: int) -> Block:
        begin = self._item.start + self._at
        rows = self._file.recordings.rows[begin : begin + n]
        columns = {name: rows[:, i].astype(np.float64) for name, i in zip(self._fields, self._indices, strict=True)}
        first = self._count + 1
        self._at += n
        self._count += n
        for fault in self._faults:
            columns = _inject(columns, fault, due_s, first)
        return Block(first, due_s, columns, np.arange(begin, begin + n))


def _inject(columns: dict[str, Float64s], fault: SensorFault, due_s: Float64s, first: int) -> dict[str, Float64s]:
    """Apply a fault to the rows of its time; `first` is the number of the first row."""
    is_faulty = (due_s >= fault.at) & (due_s < fault.end_s)
    if not is_faulty.any():
        return columns
    share = np.clip((due_s - fault.at) / fault.over, 0.0, 1.0) if fault.over else np.ones(len(due_s))
    faulty = inject_faults(columns, [fault.fault], first)
    changed = {}
    for name in fault.fields:
        before, after = columns[name], faulty[name]
        # A whole fault gives its exact values.
        blended = np.where(share == 1.0, after, before + share * (after - before))
        changed[name] = np.where(is_faulty, blended, before)
    return columns | changed
