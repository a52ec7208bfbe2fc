"""Joined readings of a sample: the rows of further inputs' streams that the sampled windows were joined with.

Rows that came after the result's batch had been joined are left out, so that a join over a sample gives the values that
the device's model read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.config import FieldConfig
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.store import Store
from outstation.foundation.arrays import Ints
from outstation.ml.model.bundle.manifest import JoinedInput
from outstation.ml.model.inference import features, joins

# Rows of one stream that are read for a sample, and at first.
_MAX_ROWS, _READ_ROWS = 200_000, 4096


class JoinedSource(msgspec.Struct, frozen=True):
    """Stream of a further input, with all its fields."""

    stream: str
    stream_fields: Sequence[FieldConfig]
    spec: JoinedInput


class JoinedReadings(msgspec.Struct, frozen=True, eq=False):
    """Rows with a value, as stored: their `numbers` and `t` (m,), and a column (m,) for each field of the input.

    `is_whole`: no row of the stream came before these.
    """

    source: JoinedSource
    numbers: Ints
    t: Ints
    columns: Sequence[NDArray[Any]]
    is_whole: bool

    def select(self, ends_us: Ints, least_count: int) -> JoinedReadings | None:
        """Return the rows that windows that end at `ends_us` (w,) take, at least one if there are any.

        Earlier rows are added up to the least count. None if rows are missing that the device took.
        """
        taken = joins.select_taken(self.source.spec, self.t, ends_us, is_whole=self.is_whole)
        if taken is None:
            return None
        if not len(taken):
            taken = np.arange(len(self.t), dtype=np.int64)[-1:]
        first = int(taken[0]) if len(taken) else 0
        added = np.arange(max(0, first - max(0, least_count - len(taken))), first)
        chosen = np.concatenate([added, taken])
        columns = [column[chosen] for column in self.columns]
        return JoinedReadings(self.source, self.numbers[chosen], self.t[chosen], columns, self.is_whole)


def read(
    store: Store, source: JoinedSource, ends_us: Ints, result_us: int, last: int | None, least_count: int
) -> JoinedReadings:
    """Read the rows that windows that end at `ends_us` (w,) need, as far as they are stored. Raises StorageError.

    `last`: the last row that the batch of the result at time `result_us` was joined with, 0 for none, None if that is
    not known any more.
    """
    stream, newest, oldest = source.stream, store.last_row(source.stream), max(1, store.first_row(source.stream))
    latest_us = int(ends_us.max())
    anchor = min(last or newest, newest)
    if last is None and (near := store.find_row_near(stream, 0, result_us, latest_us + 1)) is not None:
        anchor = near
    pieces, at = list[RowBatch](), max(anchor, oldest - 1)
    count, size = 0, _READ_ROWS
    while at < newest and count < _MAX_ROWS:
        piece = store.read_rows(stream, source.stream_fields, at, _READ_ROWS)
        if piece is None or piece.loss_reason:
            break
        pieces.append(piece)
        count, at = count + len(piece.t), piece.last
        if int(piece.t.min()) > latest_us:
            break
    begin, is_broken = max(anchor, oldest - 1) + 1, False
    while True:
        readings = _select_available(source, pieces, result_us, last, is_whole=begin == 1 and not is_broken)
        chosen = readings.select(ends_us, least_count)
        is_enough = chosen is not None and len(chosen.t) >= least_count
        if is_enough or begin <= oldest or is_broken or count >= _MAX_ROWS:
            return readings
        first = max(oldest, begin - size)
        earlier, is_broken = _read_range(store, source, first, begin - 1)
        pieces = [*earlier, *pieces]
        count, begin, size = count + begin - first, first, 2 * size


def _read_range(store: Store, source: JoinedSource, first: int, last: int) -> tuple[list[RowBatch], bool]:
    """Return the rows from `first` to `last` that can be read, and if some before them are lost.

    Lost rows cannot be joined: the device began anew after them, too.
    """
    pieces, at, is_broken = list[RowBatch](), first - 1, False
    while at < last:
        piece = store.read_rows(source.stream, source.stream_fields, at, last - at)
        if piece is None:
            break
        if piece.loss_reason:
            pieces, is_broken = [], True
        else:
            pieces.append(piece)
        at = piece.last
    return pieces, is_broken


def _select_available(
    source: JoinedSource, pieces: Sequence[RowBatch], result_us: int, last: int | None, *, is_whole: bool
) -> JoinedReadings:
    """Return the rows with a value, without those that were too late for the result."""
    names = [field.name for field in source.stream_fields]
    places = [names.index(name) for name in source.spec.fields]
    if not pieces:
        empty = [np.zeros(0, np.float32) for _ in places]
        return JoinedReadings(source, np.zeros(0, np.int64), np.zeros(0, np.int64), empty, is_whole)
    numbers = np.concatenate([np.arange(piece.first, piece.last + 1, dtype=np.int64) for piece in pieces])
    t = np.concatenate([piece.t for piece in pieces])
    columns = [np.concatenate([piece.column(place) for piece in pieces]) for place in places]
    chosen = joins.find_valued(features.stack_columns(columns))
    if last is not None:
        chosen &= (numbers <= last) | (t > result_us)
    return JoinedReadings(source, numbers[chosen], t[chosen], [column[chosen] for column in columns], is_whole)
