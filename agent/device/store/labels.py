"""Results kept for the labels that come later, and the labels: all SQL of both.

A batch's results are one row of `results`, packed; a label is one row of `labels`, with the result it is of, so that it
stays whole when that is trimmed. Labels of rows that their task has not used yet wait there too, below number 0.
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.device.store.quota import PAGE_SIZE, Budget
from agent.performance.labels import Label

_CRC = struct.Struct("<I")


class StoredPredictions(msgspec.Struct, frozen=True):
    """Results of one batch, in order of their rows, at least one.

    `row` (n,), `t` (n,) epoch µs, `said` (n,) class index, `score`, `value`; `slices`: name → (n,) texts.
    """

    bundle: str
    row: NDArray[np.int64]
    t: NDArray[np.int64]
    predicted_class: NDArray[np.int64] | None
    score: NDArray[np.float64] | None
    value: NDArray[np.float64] | None
    slices: Mapping[str, Sequence[str]]


class PredictionRow(msgspec.Struct, frozen=True):
    """One of them."""

    bundle: str
    row: int
    t: int
    predicted_class: int | None
    score: float | None
    value: float | None
    slices: dict[str, str]


class _PackedPredictions(msgspec.Struct, array_like=True):
    bundle: str
    first_t: int
    row: bytes
    t: bytes
    predicted_class: bytes
    score: bytes
    value: bytes
    slices: dict[str, tuple[list[str], bytes]]


def pack_predictions(predictions: StoredPredictions) -> bytes:
    """With a CRC, compressed; NaN where a score or value is not known."""
    slices = {}
    for name, texts in predictions.slices.items():
        known = sorted(set(texts))
        codes = [known.index(text) for text in texts]
        slices[name] = (known, np.array(codes, "<u2").tobytes())
    packed = _PackedPredictions(
        predictions.bundle,
        int(predictions.t[0]),
        (predictions.row - predictions.row[0]).astype("<u4").tobytes(),
        np.diff(predictions.t, prepend=predictions.t[0]).astype("<i8").tobytes(),
        b"" if predictions.predicted_class is None else predictions.predicted_class.astype("<u2").tobytes(),
        b"" if predictions.score is None else predictions.score.astype("<f4").tobytes(),
        b"" if predictions.value is None else predictions.value.astype("<f8").tobytes(),
        slices,
    )
    data = zlib.compress(msgspec.msgpack.encode(packed), 1)
    return _CRC.pack(zlib.crc32(data, int(predictions.row[0]) & 0xFFFFFFFF)) + data


def unpack_predictions(first: int, data: bytes) -> StoredPredictions:
    """Inverse of `pack`; `first` is the first result's row. Raises ValueError where it is not what was packed."""
    body = data[_CRC.size :]
    if data[: _CRC.size] != _CRC.pack(zlib.crc32(body, first & 0xFFFFFFFF)):
        raise ValueError("CRC does not match")
    try:
        packed = msgspec.msgpack.decode(zlib.decompress(body), type=_PackedPredictions)
    except (zlib.error, msgspec.MsgspecError) as error:
        raise ValueError(str(error)) from None
    slices = {
        name: [known[code] for code in np.frombuffer(codes, "<u2")] for name, (known, codes) in packed.slices.items()
    }
    return StoredPredictions(
        packed.bundle,
        np.frombuffer(packed.row, "<u4").astype(np.int64) + first,
        np.cumsum(np.frombuffer(packed.t, "<i8"), dtype=np.int64) + packed.first_t,
        np.frombuffer(packed.predicted_class, "<u2").astype(np.int64) if packed.predicted_class else None,
        np.frombuffer(packed.score, "<f4").astype(np.float64) if packed.score else None,
        np.frombuffer(packed.value, "<f8") if packed.value else None,
        slices,
    )


def covers_time(predictions: StoredPredictions, t: int) -> bool:
    return bool(predictions.t[0] <= t <= predictions.t[-1])


def select_row(predictions: StoredPredictions, index: int) -> PredictionRow:
    return PredictionRow(
        predictions.bundle,
        int(predictions.row[index]),
        int(predictions.t[index]),
        None if predictions.predicted_class is None else int(predictions.predicted_class[index]),
        None if predictions.score is None else _finite_or_none(predictions.score[index]),
        None if predictions.value is None else _finite_or_none(predictions.value[index]),
        {name: texts[index] for name, texts in predictions.slices.items()},
    )


def _finite_or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


MAX_EARLY_LABELS = 5_000
_LABEL_BYTES = 300
# Seconds as floating-point numbers come back a little off.
_MIN_TOLERANCE_US = 500
# Of the quota, for labels; a task keeps so many at least, and no more than so many.
_LABEL_SHARE, _MIN_LABELS, MAX_LABELS = 20, 100, 5_000
_MAX_CACHED_BATCHES = 8


class PredictionSpan(msgspec.Struct, frozen=True):
    """What is kept of a task's results: rows and times of the first and the last."""

    first: int
    last: int
    last_t: int


class StoredLabel(msgspec.Struct, frozen=True):
    """A label with its result; `received` epoch µs.

    `number` counts labels of the task in the order they came. One that another label took the place of counts anew, so
    that whoever had taken the other one sees it; `first` is the number of the first label of its result.
    """

    number: int
    label: str
    source: str
    received: int
    prediction: PredictionRow
    first_number: int


class _LabelRecord(msgspec.Struct, array_like=True):
    """A label as stored; `result` is None, and `row` or `t` is set, where it waits."""

    label: str
    source: str
    received: int
    prediction: PredictionRow | None
    row: int | None = None
    t: int | None = None
    uptime_s: float = 0.0
    first_number: int = 0  # 0 where it is the first of its result


class LabelStore:
    """Of one transaction."""

    def __init__(self, db: sqlite3.Connection, budget: Budget) -> None:
        self._db, self._budget = db, budget
        self._batch_cache: dict[tuple[str, int], StoredPredictions | None] = {}

    # --- results ---

    def store_predictions(self, task: str, predictions: StoredPredictions, uptime_s: float) -> None:
        """Results of a batch, at this uptime."""
        data = pack_predictions(predictions)
        self._budget.spend(len(data) + len(task) + 60)
        values = (
            task,
            int(predictions.row[0]),
            int(predictions.row[-1]),
            len(predictions.row),
            int(predictions.t[-1]),
            round(uptime_s),
            data,
        )
        self._db.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def load_span(self, task: str) -> PredictionSpan | None:
        """Of what is kept; None where nothing is."""
        return load_span(self._db, task)

    def find_by_row(self, task: str, row: int) -> PredictionRow | None:
        """The result at exactly this row, if it is kept and readable."""
        sql = "SELECT first FROM results WHERE task = ? AND first <= ? ORDER BY first DESC LIMIT 1"
        found = self._db.execute(sql, (task, row)).fetchone()
        given = self._load_batch(task, found[0]) if found else None
        if given is None:
            return None
        index = int(np.searchsorted(given.row, row))
        return select_row(given, index) if index < len(given.row) and given.row[index] == row else None

    def find_nearest(self, task: str, t: int) -> PredictionRow | None:
        """The result nearest to this time, no further than half of what lies between results there.

        Times are taken to ascend; where the clock was set back, the one that is found is nearest among its neighbours.
        """
        # The one that the label before was of, mostly.
        batches = [
            given for (name, _), given in self._batch_cache.items() if name == task and given and covers_time(given, t)
        ][:1]
        batches = batches or [
            one for first in self._neighbouring_batches(task, t) if (one := self._load_batch(task, first)) is not None
        ]
        if not batches:
            return None
        times = np.concatenate([given.t for given in batches])
        index = int(np.abs(times - t).argmin())
        between = np.diff(np.sort(times))
        most = max(_MIN_TOLERANCE_US, int(np.median(between)) // 2 if len(between) else 0)
        if abs(int(times[index]) - t) > most:
            return None
        for given in batches:
            if index < len(given.t):
                return select_row(given, index)
            index -= len(given.t)
        return None

    def _neighbouring_batches(self, task: str, t: int) -> list[int]:
        """First rows of the batch that ends at or after `t`, and of its neighbours: by halves, as times ascend."""
        known = load_span(self._db, task)
        if known is None:
            return []
        sql = "SELECT first, t FROM results WHERE task = ? AND first >= ? ORDER BY first LIMIT 1"
        low, high = known.first, known.last
        while low < high:
            middle = (low + high) // 2
            found = self._db.execute(sql, (task, middle)).fetchone()
            if found is None or found[1] >= t:
                high = middle
            else:
                low = int(found[0]) + 1
        before = "SELECT first FROM results WHERE task = ? AND first < ? ORDER BY first DESC LIMIT 2"
        after = "SELECT first FROM results WHERE task = ? AND first >= ? ORDER BY first LIMIT 2"
        return [row[0] for sql in (before, after) for row in self._db.execute(sql, (task, low)).fetchall()]

    def _load_batch(self, task: str, first: int) -> StoredPredictions | None:
        """Unpacked, a few at a time: labels mostly come in order."""
        if (task, first) not in self._batch_cache:
            sql = "SELECT CAST(data AS BLOB) FROM results WHERE task = ? AND first = ?"
            try:
                given: StoredPredictions | None = unpack_predictions(
                    first, self._db.execute(sql, (task, first)).fetchone()[0]
                )
            except ValueError:
                given = None
            if len(self._batch_cache) >= _MAX_CACHED_BATCHES:
                del self._batch_cache[next(iter(self._batch_cache))]
            self._batch_cache[task, first] = given
        return self._batch_cache[task, first]

    def trim_predictions(self, task: str, before_uptime_s: float, limit: int) -> int:
        """Delete up to `limit` of the oldest batches' results from before this uptime; how many."""
        sql = "SELECT first, length(data), at FROM results WHERE task = ? ORDER BY first LIMIT ?"
        found = self._db.execute(sql, (task, limit)).fetchall()
        old = [(first, size) for first, size, at_s in found if at_s < before_uptime_s]
        count = self._budget.spend_affordable(min(size, PAGE_SIZE) + 128 for _, size in old)
        sql = "DELETE FROM results WHERE task = ? AND first = ?"
        self._db.executemany(sql, ((task, first) for first, _ in old[:count]))
        self._batch_cache.clear()
        return count

    # --- labels ---

    def store_label(self, task: str, label: Label, prediction: PredictionRow, received: int) -> str:
        """Keep a label of `result`: "new", "replaced" where another one was there, or "same"."""
        sql = "SELECT number, CAST(data AS BLOB) FROM labels WHERE task = ? AND row = ?"
        before = self._db.execute(sql, (task, prediction.row)).fetchone()
        old = _decode_record(before[1]) if before else None
        if old is not None and (old.label, old.source) == (label.text, label.source):
            return "same"
        first = (old.first_number if old else 0) or before[0] if before else 0
        data = msgspec.msgpack.encode(_LabelRecord(label.text, label.source, received, prediction, first_number=first))
        self._budget.spend(len(data) + (2 if before else 1) * _LABEL_BYTES)
        number = self.newest_number(task) + 1
        if before:
            self._db.execute("DELETE FROM labels WHERE task = ? AND number = ?", (task, before[0]))
        self._db.execute("INSERT INTO labels VALUES (?, ?, ?, ?)", (task, number, prediction.row, data))
        return "replaced" if before else "new"

    def newest_number(self, task: str) -> int:
        return newest_number(self._db, task)

    def store_early_label(self, task: str, label: Label, received: int, uptime_s: float) -> bool:
        """Keep a label until its result is there; False where too many wait already."""
        sql = "SELECT count(*), min(number) FROM labels WHERE task = ? AND number < 0"
        waiting, lowest = self._db.execute(sql, (task,)).fetchone()
        if waiting >= MAX_EARLY_LABELS:
            return False
        kept = _LabelRecord(label.text, label.source, received, None, label.row, label.t, round(uptime_s))
        data = msgspec.msgpack.encode(kept)
        self._budget.spend(len(data) + _LABEL_BYTES)
        self._db.execute("INSERT INTO labels VALUES (?, ?, NULL, ?)", (task, (lowest or 0) - 1, data))
        return True

    def delete_early_labels(self, task: str, numbers: Sequence[int]) -> None:
        self._budget.spend(64 * len(numbers))
        sql = "DELETE FROM labels WHERE task = ? AND number = ?"
        self._db.executemany(sql, ((task, number) for number in numbers))

    def trim_labels(self, task: str, retain: int, limit: int) -> None:
        """Delete up to `limit` of the oldest beyond the newest `keep`."""
        sql = "SELECT number FROM labels WHERE task = ? AND number > 0 ORDER BY number LIMIT 1"
        oldest = self._db.execute(sql, (task,)).fetchone()
        if oldest is None or self.newest_number(task) - oldest[0] < retain:
            return
        # Numbers have gaps, where another label took the place of one.
        sql = "SELECT number FROM labels WHERE task = ? AND number > 0 ORDER BY number DESC LIMIT 1 OFFSET ?"
        last = self._db.execute(sql, (task, retain)).fetchone()
        sql = "SELECT number FROM labels WHERE task = ? AND number BETWEEN 1 AND ? ORDER BY number LIMIT ?"
        old = self._db.execute(sql, (task, last[0] if last else 0, limit)).fetchall()
        count = self._budget.spend_affordable(_LABEL_BYTES for _ in old)
        sql = "DELETE FROM labels WHERE task = ? AND number = ?"
        self._db.executemany(sql, ((task, *one) for one in old[:count]))


def label_capacity(database_bytes: int) -> int:
    """How many labels of a task a store of so many bytes keeps."""
    return max(_MIN_LABELS, min(MAX_LABELS, database_bytes // _LABEL_SHARE // _LABEL_BYTES))


def shadow_key(task: str) -> str:
    """What stands for the task's name where answers of another bundle beside its own are kept: no task's name."""
    return f"{task} beside"


def newest_number(db: sqlite3.Connection, task: str) -> int:
    """The number of the label that came last; 0 before the first."""
    sql = "SELECT max(number) FROM labels WHERE task = ?"
    return max(0, int(db.execute(sql, (task,)).fetchone()[0] or 0))


def load_span(db: sqlite3.Connection, task: str) -> PredictionSpan | None:
    sql = """
        SELECT (SELECT first FROM results WHERE task = :task ORDER BY first LIMIT 1), last, t
        FROM results WHERE task = :task ORDER BY first DESC LIMIT 1"""
    found = db.execute(sql, {"task": task}).fetchone()
    return PredictionSpan(*map(int, found)) if found else None


def load_early(
    db: sqlite3.Connection, task: str, span: PredictionSpan, before_uptime_s: float, limit: int
) -> list[tuple[int, Label, int]]:
    """(number, label, received) of those whose result may be there now, or that came before this uptime."""
    sql = "SELECT number, CAST(data AS BLOB) FROM labels WHERE task = ? AND number < 0 ORDER BY number DESC"
    found: list[tuple[int, Label, int]] = []
    for number, data in db.execute(sql, (task,)):
        one = _decode_record(data) or _LabelRecord("", "", 0, None)
        here = one.row is None or one.row <= span.last
        if (here and (one.t is None or one.t <= span.last_t)) or one.uptime_s < before_uptime_s:
            found.append((number, Label(one.row, one.t, one.label, one.source), one.received))
            if len(found) == limit:
                break
    return found


def load_labelled(db: sqlite3.Connection, task: str, bundle: str, through: int, limit: int) -> list[StoredLabel]:
    """Labels of results of this bundle among the newest `limit` up to number `through`, oldest first."""
    sql = """
        SELECT number, CAST(data AS BLOB) FROM labels WHERE task = ? AND number BETWEEN 1 AND ?
        ORDER BY number DESC LIMIT ?"""
    found = []
    for number, data in db.execute(sql, (task, through, limit)).fetchall():
        one = _decode_record(data)
        if one is not None and one.prediction is not None and one.prediction.bundle == bundle:
            found.append(
                StoredLabel(number, one.label, one.source, one.received, one.prediction, one.first_number or number)
            )
    return found[::-1]


def next_numbers(db: sqlite3.Connection, task: str, number: int, limit: int) -> list[int]:
    """Numbers of the next labels, of any bundle."""
    sql = "SELECT number FROM labels WHERE task = ? AND number > ? ORDER BY number LIMIT ?"
    return [int(row[0]) for row in db.execute(sql, (task, max(0, number), limit))]


def count_predictions(db: sqlite3.Connection, task: str, first: int, last: int) -> int:
    """Results kept of rows in batches that `first` … `last` reach into."""
    sql = "SELECT coalesce(sum(n), 0) FROM results WHERE task = ? AND first <= ? AND last >= ?"
    return int(db.execute(sql, (task, last, first)).fetchone()[0])


def load_last_batches(db: sqlite3.Connection, task: str, batches: int) -> list[StoredPredictions]:
    """Results of the last batches that are kept and readable, oldest first."""
    sql = "SELECT first, CAST(data AS BLOB) FROM results WHERE task = ? ORDER BY first DESC LIMIT ?"
    found = []
    for first, data in db.execute(sql, (task, batches)).fetchall():
        with contextlib.suppress(ValueError):
            found.append(unpack_predictions(int(first), data))
    return found[::-1]


def _decode_record(data: bytes) -> _LabelRecord | None:
    """None where the disk has changed it."""
    try:
        return msgspec.msgpack.decode(data, type=_LabelRecord)
    except (msgspec.MsgspecError, ValueError):
        return None
