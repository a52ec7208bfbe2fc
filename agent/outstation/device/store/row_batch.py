"""Rows as a task reads them: contiguous columns of stored chunks, or the reason why they cannot be read."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.config import FieldConfig
from outstation.device.store.clock_segments import ClockStamp, merge_stamps
from outstation.device.store.rows import EMPTY_ROWS, PackedChunk, Rows, concatenate, unpack_columns, unpack_times
from outstation.device.store.tables import meta, schema

# Rows of a chunk, on average, below which those of a batch are joined.
_FEW_ROWS = 64


class RowBatch(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Rows `first`…`last` of a stream (row numbers count from 1); if they cannot be read, the reason.

    `parts`: the rows in pieces that follow one another, as views of the stored chunks.
    `deleted`: they were used by other tasks, or evicted and declared; they are not damaged.
    """

    first: int
    t: NDArray[np.int64] = EMPTY_ROWS.t  # (n,) epoch µs
    parts: Sequence[Rows] = ()
    loss_reason: str | None = None
    lost_through: int = 0
    stamps: tuple[ClockStamp, ...] = ()
    deleted: bool = False

    @property
    def last(self) -> int:
        return self.lost_through if self.loss_reason else self.first + len(self.t) - 1

    @cached_property
    def rows(self) -> Rows:
        """The rows in one piece: a copy of all columns."""
        return concatenate(self.parts)

    def column(self, index: int) -> NDArray[Any]:
        """Return the values (n,) of one field."""
        return np.concatenate([part.columns[index] for part in self.parts])

    def join_small_parts(self) -> RowBatch:
        """Return the batch in one piece if its pieces are small: each costs as much as some rows."""
        if len(self.parts) < 2 or sum(map(len, self.parts)) >= _FEW_ROWS * len(self.parts):
            return self
        return RowBatch(self.first, self.t, [concatenate(self.parts)], stamps=self.stamps)

    def slice_parts(self, start: int, stop: int) -> list[Rows]:
        """Return rows from offset `start` to before `stop` in pieces."""
        pieces, at = list[Rows](), 0
        for part in self.parts:
            piece = slice(max(0, start - at), max(0, min(len(part), stop - at)))
            if piece.start < piece.stop:
                pieces.append(part.slice(piece.start, piece.stop))
            at += len(part)
        return pieces


def last_row(db: sqlite3.Connection, stream: str) -> int:
    """Return the number of the newest row of `stream`; 0 if there is none."""
    sql = "SELECT next_row - 1 FROM checked_streams WHERE name = ?"
    (number,) = db.execute(sql, (stream,)).fetchone() or (0,)
    return int(number)


def read_batch(
    db: sqlite3.Connection, stream: str, fields: Sequence[FieldConfig], after: int, limit: int
) -> RowBatch | None:
    """Read up to about `limit` rows after row `after`, as contiguous columns; None if there are none.

    The cost depends on the rows read, not on the backlog. A damaged chunk is returned alone, with `loss_reason`.
    """
    pieces: list[tuple[PackedChunk, tuple[NDArray[Any], ...], slice]] = []
    stamps: list[ClockStamp] = []
    first, count = after + 1, 0
    # Closed with the store's lock held: an open query would keep another thread's transaction from restarting the log.
    with contextlib.closing(db.execute(schema.SELECT_CHUNKS, {"stream": stream, "after": after})) as chunks:
        for first_row, n, first_t, time_bytes, data, crc, *place in chunks:
            stream_id, boot, quality, segment, _ = place
            try:
                packed = PackedChunk(n, first_t, time_bytes, data, crc, (stream_id, first_row, *place[1:]))
                columns = unpack_columns(packed, fields)
            except ValueError as damage:
                if pieces:
                    break
                return RowBatch(first, loss_reason=str(damage), lost_through=_chunk_end(db, stream, int(first_row)))
            skip = first + count - int(first_row)
            if skip < 0:
                if pieces:
                    break
                return _missing_rows(db, stream, first, int(first_row) - 1)
            piece = slice(skip, max(skip, min(n, skip + limit - count)))
            pieces.append((packed, columns, piece))
            stamps.append(ClockStamp(first + count, boot, segment, quality))
            count += piece.stop - skip
            if count >= limit:
                break
    if not pieces:
        # The last rows may be in quarantine because another task found them damaged.
        last = last_row(db, stream)
        return _missing_rows(db, stream, first, last) if last > after else None
    t = np.empty(count, np.int64)
    parts, at = list[Rows](), 0
    for packed, columns, piece in pieces:
        end = at + piece.stop - piece.start
        unpack_times(packed, piece, t[at:end])
        parts.append(Rows(t[at:end], tuple(column[piece] for column in columns)))
        at = end
    return RowBatch(first, t, parts, stamps=merge_stamps(stamps))


def _missing_rows(db: sqlite3.Connection, stream: str, first: int, last: int) -> RowBatch:
    """Describe rows `first` to `last`, which are not stored, or the first of them with the same fate.

    Rows that are neither deleted nor in quarantine were lost, and count as damaged.
    """
    deleted = int(meta.get(db, schema.TRIMMED_THROUGH + stream, "0"))
    values = {"stream": stream, "first": first, "last": last}
    damaged = db.execute(schema.FIRST_QUARANTINED_RANGE, values).fetchone()
    if first <= deleted and (damaged is None or damaged[0] > first):
        end = min(last, deleted, damaged[0] - 1 if damaged else last)
        reason = "rows were deleted before this task read them"
        return RowBatch(first, loss_reason=reason, lost_through=end, deleted=True)
    end = min(last, damaged[1]) if damaged and damaged[1] < deleted else last
    return RowBatch(first, loss_reason="rows were quarantined as damaged", lost_through=end)


def _chunk_end(db: sqlite3.Connection, stream: str, first_row: int) -> int:
    """Return the last row of the chunk at `first_row`, from the chunk after it: its own count may be damaged."""
    sql = (
        "SELECT min(first_row) - 1 FROM chunks JOIN checked_streams s ON s.id = stream "
        "WHERE s.name = ? AND first_row > ?"
    )
    (end,) = db.execute(sql, (stream, first_row)).fetchone()
    return last_row(db, stream) if end is None else int(end)
