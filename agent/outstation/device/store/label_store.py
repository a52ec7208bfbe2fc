"""Label store: labels, and the predictions that wait for them, with all SQL of table `labels`.

A label is one row of table `labels` with a copy of its prediction, so that it outlives the packed row of table
`predictions`. Labels of rows that their task has not consumed yet wait in the same table under negative numbers.
`task` is here the key of one output of a task (`predictions.output_key`).
"""

from __future__ import annotations

import itertools
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from outstation.device.store import predictions as stored_predictions
from outstation.device.store.predictions import (
    PredictionRow,
    PredictionSpan,
    StoredPredictions,
    output_key_range,
    pack_predictions,
)
from outstation.device.store.quota import PAGE_SIZE, Budget
from outstation.foundation import decoders
from outstation.ml.performance.labels import MODEL, NO_TRUTH, VERDICT, Label

MAX_EARLY_LABELS = 5_000
# The part of these that labels without authentication may take: a flood of them displaces no others.
MAX_OPEN_EARLY_LABELS = 4_000
# Outcome of a label that must not replace the one that is there.
PROTECTED = "protected"
_LABEL_BYTES = 300
# Seconds as floating-point numbers come back a little off.
_MIN_TOLERANCE_US = 500
# Labels of a task may take 1/20 of the quota, within these limits.
_LABEL_SHARE, _MIN_LABELS, MAX_LABELS = 20, 100, 5_000
# Of one output, however many the others have: as many as one message covers. Less for outputs of more than 20 names.
_MIN_OUTPUT_LABELS = 500
_MAX_CACHED_BATCHES = 8


class StoredLabel(msgspec.Struct, frozen=True):
    """Label with its prediction; `received` epoch µs.

    `number` counts labels of the task in order of arrival. A label that replaces another one gets a new number, so
    that a reader who had seen the old one sees it; `first_number` is that of the first label of its prediction.
    `by`: who gave it, if that is authenticated; an authenticated label is the first one, whatever was there before.
    So is ground truth in place of a label that was none.
    """

    number: int
    label: str
    source: str
    received: int
    prediction: PredictionRow
    first_number: int
    by: str = ""


class _LabelRecord(msgspec.Struct, array_like=True):
    """Label as stored; while it waits, `prediction` is None and `row` or `t` is set."""

    label: str
    source: str
    received: int
    prediction: PredictionRow | None
    row: int | None = None
    t: int | None = None
    uptime_s: float = 0.0
    first_number: int = 0  # 0 for the first label of its prediction
    by: str = ""


class LabelStore:
    """Predictions and labels inside a `Transaction`.

    `stored`: task → number of the newest label that the transaction stored.
    """

    def __init__(self, db: sqlite3.Connection, budget: Budget) -> None:
        self._db, self._budget = db, budget
        self._batch_cache: dict[tuple[str, int], StoredPredictions | None] = {}
        self._early_counts: dict[tuple[str, str], int] = {}
        self.stored: dict[str, int] = {}

    # --- predictions ---

    def store_predictions(self, task: str, predictions: StoredPredictions, uptime_s: float) -> None:
        """Store the predictions of a batch that ran at this uptime."""
        data, rows = pack_predictions(predictions), predictions.row
        self._budget.spend(len(data) + len(task) + 60)
        values = (
            task,
            int(rows[0]),
            int(rows[-1]),
            len(rows),
            int(predictions.t[-1]),
            round(uptime_s),
            data,
        )
        self._db.execute("INSERT OR REPLACE INTO predictions VALUES (?, ?, ?, ?, ?, ?, ?, NULL)", values)

    def load_span(self, task: str) -> PredictionSpan | None:
        return stored_predictions.load_span(self._db, task)

    def find(self, task: str, label: Label) -> PredictionRow | None:
        """Return the stored prediction that a label belongs to, by its row or else by its time."""
        return self.find_nearest(task, label.t or 0) if label.row is None else self.find_by_row(task, label.row)

    def find_by_row(self, task: str, row: int) -> PredictionRow | None:
        """Return the prediction at exactly this row, if it is stored and readable."""
        sql = "SELECT first_row FROM predictions WHERE task = ? AND first_row <= ? ORDER BY first_row DESC LIMIT 1"
        first = self._db.execute(sql, (task, row)).fetchone()
        batch = self._load_batch(task, first[0]) if first else None
        if batch is None:
            return None
        index = int(np.searchsorted(batch.row, row))
        return (
            stored_predictions.select_row(batch, index) if index < len(batch.row) and batch.row[index] == row else None
        )

    def find_nearest(self, task: str, t: int) -> PredictionRow | None:
        """Return the prediction nearest to this time, at most half the time between predictions away.

        Times are taken to ascend. After the clock was set back, the result is the nearest among its neighbours only.
        """
        # Mostly the batch of the label before.
        cached = [batch for (name, _), batch in self._batch_cache.items() if name == task and batch is not None]
        batches = [batch for batch in cached if batch.t[0] <= t <= batch.t[-1]][:1]
        if not batches:
            loaded = [self._load_batch(task, first) for first in self._neighbouring_batches(task, t)]
            batches = [batch for batch in loaded if batch is not None]
        if not batches:
            return None
        times = np.concatenate([batch.t for batch in batches])
        index = int(np.abs(times - t).argmin())
        between = np.diff(np.sort(times))
        tolerance = max(_MIN_TOLERANCE_US, int(np.median(between)) // 2 if len(between) else 0)
        if abs(int(times[index]) - t) > tolerance:
            return None
        for batch in batches:
            if index < len(batch.t):
                return stored_predictions.select_row(batch, index)
            index -= len(batch.t)
        return None

    def _neighbouring_batches(self, task: str, t: int) -> list[int]:
        """Return the first rows of the batch that ends at or after `t` and of its neighbours, by bisection."""
        span = stored_predictions.load_span(self._db, task)
        if span is None:
            return []
        sql = (
            "SELECT first_row, last_t FROM checked_predictions "
            "WHERE task = ? AND first_row >= ? ORDER BY first_row LIMIT 1"
        )
        low, high = span.first, span.last
        while low < high:
            middle = (low + high) // 2
            batch = self._db.execute(sql, (task, middle)).fetchone()
            if batch is None or batch[1] >= t:
                high = middle
            else:
                low = int(batch[0]) + 1
        before = "SELECT first_row FROM predictions WHERE task = ? AND first_row < ? ORDER BY first_row DESC LIMIT 2"
        after = "SELECT first_row FROM predictions WHERE task = ? AND first_row >= ? ORDER BY first_row LIMIT 2"
        return [first for sql in (before, after) for (first,) in self._db.execute(sql, (task, low))]

    def _load_batch(self, task: str, first: int) -> StoredPredictions | None:
        """Unpack a batch; a few are cached, because labels mostly come in order."""
        if (task, first) not in self._batch_cache:
            sql = "SELECT CAST(data AS BLOB) FROM predictions WHERE task = ? AND first_row = ?"
            batch = stored_predictions.unpack_or_none(first, self._db.execute(sql, (task, first)).fetchone()[0])
            if len(self._batch_cache) >= _MAX_CACHED_BATCHES:
                del self._batch_cache[next(iter(self._batch_cache))]
            self._batch_cache[task, first] = batch
        return self._batch_cache[task, first]

    def trim_predictions(self, task: str, before_uptime_s: float, limit: int) -> int:
        """Delete up to `limit` of the oldest batches from before this uptime, and return how many."""
        sql = (
            "SELECT first_row, length(data), uptime_s FROM checked_predictions "
            "WHERE task = ? ORDER BY first_row LIMIT ?"
        )
        rows = self._db.execute(sql, (task, limit)).fetchall()
        old = [(first, size) for first, size, uptime_s in rows if uptime_s < before_uptime_s]
        count = self._budget.spend_affordable(min(size, PAGE_SIZE) + 128 for _, size in old)
        sql = "DELETE FROM predictions WHERE task = ? AND first_row = ?"
        self._db.executemany(sql, ((task, first) for first, _ in old[:count]))
        self._batch_cache.clear()
        return count

    # --- labels ---

    def store_label(self, task: str, label: Label, prediction: PredictionRow, received: int) -> str:
        """Store a label of a prediction: "new", "replaced" if there was another one, "same" or "protected".

        A label without an author replaces none with one, and a verdict or an answer of the model no ground truth.
        """
        sql = "SELECT number, data FROM checked_labels WHERE task = ? AND row = ?"
        before = self._db.execute(sql, (task, prediction.row)).fetchone()
        old = _decode_record(before[1]) if before else None
        if old is not None and (old.label, old.source) == (label.text, label.source) and (old.by or not label.by):
            return "same"
        is_truth = label.source not in NO_TRUTH
        if old is not None and ((old.by and not label.by) or (old.source not in NO_TRUTH and not is_truth)):
            return PROTECTED
        first = (old.first_number if old else 0) or before[0] if before else 0
        # Counts as new: what it replaces counted nowhere.
        if old is not None and ((label.by and not old.by) or (is_truth and old.source in NO_TRUTH)):
            first = 0
        record = _LabelRecord(label.text, label.source, received, prediction, first_number=first, by=label.by)
        data = msgspec.msgpack.encode(record)
        self._budget.spend(len(data) + (2 if before else 1) * _LABEL_BYTES)
        number = self.newest_number(task) + 1
        if before:
            self._db.execute("DELETE FROM labels WHERE task = ? AND number = ?", (task, before[0]))
        self._db.execute(
            "INSERT INTO labels (task, number, row, data) VALUES (?, ?, ?, ?)", (task, number, prediction.row, data)
        )
        self.stored[task] = number
        return "replaced" if before else "new"

    def newest_number(self, task: str) -> int:
        return newest_number(self._db, task)

    def store_early_label(self, task: str, label: Label, received: int, uptime_s: float) -> bool:
        """Store a label until its prediction is there. Return False if too many wait already."""
        sql = "SELECT min(number) FROM labels WHERE task = ? AND number < 0"
        lowest = self._db.execute(sql, (task,)).fetchone()[0]
        outputs = output_key_range(task)
        if self._count_early(outputs) >= early_capacity(label.by):
            return False
        uptime = round(uptime_s)
        record = _LabelRecord(label.text, label.source, received, None, label.row, label.t, uptime, by=label.by)
        data = msgspec.msgpack.encode(record)
        self._budget.spend(len(data) + _LABEL_BYTES)
        self._db.execute("INSERT INTO labels (task, number, data) VALUES (?, ?, ?)", (task, (lowest or 0) - 1, data))
        self._early_counts[outputs] += 1
        return True

    def _count_early(self, outputs: tuple[str, str]) -> int:
        """Count the early labels of all outputs of a task, once in a transaction."""
        if outputs not in self._early_counts:
            sql = "SELECT count(*) FROM labels WHERE task BETWEEN ? AND ? AND number < 0"
            self._early_counts[outputs] = int(self._db.execute(sql, outputs).fetchone()[0])
        return self._early_counts[outputs]

    def delete_early_labels(self, task: str, numbers: Sequence[int]) -> None:
        self._budget.spend(64 * len(numbers))
        self._early_counts.clear()
        sql = "DELETE FROM labels WHERE task = ? AND number = ?"
        self._db.executemany(sql, ((task, number) for number in numbers))

    def trim_labels(self, tasks: Sequence[str], capacity: int, limit: int) -> None:
        """Delete up to `limit` of the oldest labels that exceed the capacity of all outputs of a task.

        Each label without an author goes before any with one: a program that may write rows can send any number of
        labels, which must not push out those of authors. The outputs with most labels lose them, but none loses its
        newest `_MIN_OUTPUT_LABELS`.
        """
        sql = "SELECT number FROM labels WHERE task = ? AND number > 0 ORDER BY number LIMIT 1"
        oldest = [(task, *row) for task in tasks if (row := self._db.execute(sql, (task,)).fetchone()) is not None]
        if sum(self.newest_number(task) - number + 1 for task, number in oldest) <= capacity:
            return
        # Numbers have gaps where a label was replaced.
        sql = "SELECT count(*) FROM labels WHERE task = ? AND number > 0"
        if sum(int(self._db.execute(sql, (task,)).fetchone()[0]) for task in tasks) <= capacity:
            return
        by_author = [self._list_by_author(task) for task in tasks]
        floor = min(capacity, _MIN_OUTPUT_LABELS, 2 * MAX_LABELS // len(tasks))
        authored_share = share_capacity([len(authored) for _, authored in by_author], capacity)
        retained = [min(len(authored), max(authored_share, floor)) for _, authored in by_author]
        share = share_capacity([len(others) for others, _ in by_author], max(0, capacity - sum(retained)))
        old: list[tuple[str, int]] = []
        for task, (others, _), count in zip(tasks, by_author, retained, strict=True):
            old += ((task, number) for number in others[: max(0, len(others) - max(share, floor - count))])
        for task, (_, authored), count in zip(tasks, by_author, retained, strict=True):
            old += ((task, number) for number in authored[: len(authored) - count])
        count = self._budget.spend_affordable(_LABEL_BYTES for _ in old[:limit])
        self._db.executemany("DELETE FROM labels WHERE task = ? AND number = ?", old[:count])

    def _list_by_author(self, task: str) -> tuple[list[int], list[int]]:
        """Return the numbers of labels without and with an author, oldest first."""
        others: list[int] = []
        authored: list[int] = []
        sql = "SELECT number, data FROM checked_labels WHERE task = ? AND number > 0 ORDER BY number"
        for number, data in self._db.execute(sql, (task,)):
            record = _decode_record(data)
            (authored if record is not None and record.by else others).append(number)
        return others, authored


def label_capacity(database_bytes: int) -> int:
    """Return how many labels of a task, of all its outputs, a store of this size holds."""
    return max(_MIN_LABELS, min(MAX_LABELS, database_bytes // _LABEL_SHARE // _LABEL_BYTES))


def early_capacity(by: str) -> int:
    """Return how many labels of a task may wait before one of this author; "" for none."""
    return MAX_EARLY_LABELS if by else MAX_OPEN_EARLY_LABELS


def share_capacity(counts: Sequence[int], capacity: int) -> int:
    """Return the largest count that each one may have so that all together have at most `capacity` (max-min fair)."""
    for index, count in enumerate(sorted(counts)):
        share = capacity // (len(counts) - index)
        if count > share:
            return share
        capacity -= count
    return max(counts, default=0)


# --- queries, also of a read-only store (`Store.query`) ---


def newest_number(db: sqlite3.Connection, task: str) -> int:
    """Return the number of the newest label; 0 before the first."""
    sql = "SELECT max(number) FROM labels WHERE task = ?"
    return max(0, int(db.execute(sql, (task,)).fetchone()[0] or 0))


def load_label_texts(db: sqlite3.Connection, task: str, since_row: int) -> dict[int, tuple[str, str]]:
    """Return row → (label, source) of the labels from a row on."""
    sql = "SELECT row, data FROM checked_labels WHERE task = ? AND row >= ?"
    records = ((row, _decode_record(data)) for row, data in db.execute(sql, (task, since_row)))
    return {row: (record.label, record.source) for row, record in records if record is not None}


class LabelCounts(msgspec.Struct, frozen=True):
    """Stored labels of a task: ground truth and others apart."""

    truth: int = 0
    verdicts: int = 0
    model: int = 0
    authenticated: int = 0
    waiting: int = 0


def count_labels(db: sqlite3.Connection, task: str) -> LabelCounts:
    """Count the stored labels of a task; `waiting`: those whose result is not there yet."""
    sources: Counter[str] = Counter()
    authenticated = waiting = 0
    for number, data in db.execute("SELECT number, data FROM checked_labels WHERE task = ?", (task,)):
        record = _decode_record(data)
        if number < 0 or record is None:
            waiting += number < 0
            continue
        sources[record.source] += 1
        authenticated += bool(record.by)
    verdicts, model = sources.pop(VERDICT, 0), sources.pop(MODEL, 0)
    return LabelCounts(sources.total(), verdicts, model, authenticated, waiting)


def load_early(
    db: sqlite3.Connection, task: str, span: PredictionSpan | None, before_uptime_s: float, limit: int
) -> list[tuple[int, Label, int]]:
    """Return (number, label, received) of early labels within the span, or from before this uptime."""
    sql = "SELECT number, data FROM checked_labels WHERE task = ? AND number < 0 ORDER BY number DESC"
    early: list[tuple[int, Label, int]] = []
    for number, data in db.execute(sql, (task,)):
        record = _decode_record(data) or _LabelRecord("", "", 0, None)
        is_covered = span is not None and (
            (record.row is None or record.row <= span.last) and (record.t is None or record.t <= span.last_t)
        )
        if is_covered or record.uptime_s < before_uptime_s:
            label = Label(record.row, record.t, record.label, record.source, record.by)
            early.append((number, label, record.received))
            if len(early) == limit:
                break
    return early


def load_labelled(
    db: sqlite3.Connection,
    task: str,
    bundle: str,
    through: int,
    limit: int,
    is_wanted: Callable[[str, str], bool] = lambda source, by: True,
) -> list[StoredLabel]:
    """Return the labels of this bundle's predictions among the newest `limit` up to number `through`, oldest first.

    Labels whose source and author are not wanted take no place among these.
    """
    sql = "SELECT number, data FROM checked_labels WHERE task = ? AND number BETWEEN 1 AND ? ORDER BY number DESC"
    records = ((number, _decode_record(data)) for number, data in db.execute(sql, (task, through)))
    wanted = (entry for entry in records if entry[1] is None or is_wanted(entry[1].source, entry[1].by))
    labels = []
    for number, record in itertools.islice(wanted, limit):
        if record is not None and record.prediction is not None and record.prediction.bundle == bundle:
            first_number = record.first_number or number
            texts = (record.label, record.source, record.received)
            labels.append(StoredLabel(number, *texts, record.prediction, first_number, record.by))
    return labels[::-1]


def next_numbers(db: sqlite3.Connection, task: str, number: int, limit: int) -> list[int]:
    """Return the numbers of the next labels, of any bundle."""
    sql = "SELECT number FROM labels WHERE task = ? AND number > ? ORDER BY number LIMIT ?"
    return [following for (following,) in db.execute(sql, (task, max(0, number), limit))]


def outcome_counter(task: str, outcome: str) -> str:
    """Return the name of the counter of labels with this outcome of `store_label`, or "unmatched"."""
    return {"new": f"labels.{task}", "same": f"labels replaced.{task}"}.get(outcome, f"labels {outcome}.{task}")


def _decode_record(data: bytes) -> _LabelRecord | None:
    """Decode a label; None if the disk has changed it."""
    try:
        return decoders.from_msgpack(data, _LabelRecord)
    except (msgspec.MsgspecError, ValueError):
        return None
