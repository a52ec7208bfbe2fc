"""Group commit: rows of all producers wait for one transaction, and each producer gets the outcome of its own part.

A commit writes a block of flash to the journal however small it is, and 28 KB or more to the database if it is larger.
So a few rows wait for up to `[buffer] commit_every`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

import msgspec
import numpy as np

from outstation.device.config import StreamConfig
from outstation.device.intake import label_intake, row_history
from outstation.device.intake.label_intake import LabelBatch
from outstation.device.intake.row_history import LatestTime, Mask, RowHistory
from outstation.device.store.clock_segments import PRODUCER_TIME, QUALITIES
from outstation.device.store.journal import MAX_BODY
from outstation.device.store.rows import Rows, ValidatedRows, concatenate
from outstation.device.store.store import INTAKE_SHARE, Store
from outstation.device.store.transaction import Transaction
from outstation.foundation.clock import ClockQuality, ClockReading
from outstation.foundation.errors import RowRejected, StorageFull
from outstation.ml.performance.labels import LabelTarget

MAX_GROUP_ROWS = 16_384
# Above this size, the overhead of a commit is small.
_MIN_COMMIT_BYTES = 128 << 10
NOT_STORED = "not stored"
# Limits the chunks of one stream in a commit; rows of different clock segments go into different chunks.
_MAX_RUNS = 64
# Bytes of a label in the store, with its index entries.
_LABEL_BYTES = 1_000
# Named producers of a stream whose latest time is remembered; of more, those that sent last.
_MAX_PRODUCER_TIMES = 4096
_PRODUCER_TIMES = "times:"  # and the stream: source whose positions are the latest times of named producers
# (segment, quality) of the clock that gave the rows' times.
ClockStamp = tuple[int, ClockQuality]


class SourcePosition(msgspec.Struct, frozen=True):
    """Position of a source, saved in the same transaction as its rows: rows that a full store rejected do not count.

    `position` None: the number of its last row in the stream. Of more than `max_items` items of a source, the last
    updated ones are stored.
    """

    source: str
    item: str
    position: int | None
    max_items: int | None = None


class CommitOutcome(msgspec.Struct, frozen=True):
    """Outcome of one producer's part of a commit: lines processed so far, rows accepted, rejected lines with reasons.

    `last_row` is the number of its last accepted row in the stream; 0 if there is none.
    """

    through: int
    accepted: int
    rejected: list[tuple[int, str]]
    is_store_full: bool = False
    last_row: int = 0


class _RowBlock(msgspec.Struct, frozen=True):
    stream: str
    validated: ValidatedRows
    lines: list[int]
    now: ClockReading
    size_bytes: int
    is_recording: bool
    client: str | None


class _ProducerBatch(msgspec.Struct):
    through: int = 0
    rejected: dict[int, str] = msgspec.field(default_factory=dict)
    row_blocks: list[_RowBlock] = msgspec.field(default_factory=list)
    label_batches: list[tuple[LabelBatch, int, ClockReading]] = msgspec.field(default_factory=list)
    position: SourcePosition | None = None

    def reject(self, line: int, reason: str) -> None:
        self.rejected[line] = f"{self.rejected[line]}; {reason}" if line in self.rejected else reason

    def size_bytes(self) -> int:
        """Return the bytes that its rows and labels need in the store."""
        label_count = sum(len(batch.labels) for batch, _, _ in self.label_batches)
        return sum(block.size_bytes for block in self.row_blocks) + label_count * _LABEL_BYTES

    def to_outcome(self, accepted: int, is_store_full: bool = False, last_row: int = 0) -> CommitOutcome:
        return CommitOutcome(self.through, accepted, sorted(self.rejected.items()), is_store_full, last_row)


ProducerBatches = dict[Hashable, _ProducerBatch]


class _Histories(msgspec.Struct):
    """History of each stream that got rows since the start, and (stream, client) → latest time of named producers."""

    streams: dict[str, RowHistory] = msgspec.field(default_factory=dict)
    producers: dict[tuple[str, str], LatestTime] = msgspec.field(default_factory=dict)

    def begin_transaction(self) -> _Histories:
        """Return a copy, so that a failed transaction changes nothing."""
        streams = {name: history.begin_transaction() for name, history in self.streams.items()}
        return _Histories(streams, dict(self.producers))

    def producer_time(self, tx: Transaction, stream: str, client: str) -> LatestTime:
        known = self.producers.get((stream, client))
        return known or LatestTime(tx.source_position(_PRODUCER_TIMES + stream, client) or None)

    def set_producer_time(self, stream: str, client: str, latest: LatestTime) -> None:
        self.producers.pop((stream, client), None)
        self.producers[stream, client] = latest
        if len(self.producers) > _MAX_PRODUCER_TIMES:
            del self.producers[next(iter(self.producers))]


class GroupCommit:
    """Rows and labels that wait for the next commit. Used by one thread, except `write`.

    `label_targets` returns the tasks that accept labels; `label_key` verifies who gives them, None if nobody can.
    """

    def __init__(
        self,
        store: Store,
        streams: Mapping[str, StreamConfig],
        label_targets: Callable[[], Mapping[str, LabelTarget]] = dict,
        label_key: bytes | None = None,
    ) -> None:
        self._store, self._streams = store, streams
        self._label_targets, self._label_key = label_targets, label_key
        self._producer_batches: ProducerBatches = {}
        self.max_bytes = store.quota.transaction_bytes // 4
        self._rows = self._bytes = 0
        self._counts: Counter[str] = Counter()
        self._drained_counts: Counter[str] = Counter()
        self._histories = _Histories()

    def __bool__(self) -> bool:
        return bool(self._producer_batches)

    @property
    def is_full(self) -> bool:
        """True if the commit should not grow: producers would wait long, or the transaction be too large."""
        return self._rows >= MAX_GROUP_ROWS or self._bytes >= self.max_bytes

    @property
    def is_worth_committing(self) -> bool:
        """True if the commit may run as soon as no more data arrives."""
        return self._bytes >= _MIN_COMMIT_BYTES

    def add_rows(
        self,
        producer: Hashable,
        stream: str,
        validated: ValidatedRows,
        lines: list[int],
        now: ClockReading,
        *,
        is_recording: bool = False,
        client: str | None = None,
    ) -> None:
        """Add rows that `producer` sent at `now`; `lines`: their line numbers, as in `ParsedLines`.

        `is_recording`: they may be older than the stream's latest row. `client`: name of the producer, which may send
        a backlog: its rows are late by its own rows only.
        """
        size = validated.rows.t.nbytes + sum(column.nbytes for column in validated.rows.columns)
        self._batch_of(producer).row_blocks.append(_RowBlock(stream, validated, lines, now, size, is_recording, client))
        self._rows += len(validated.rows)
        self._bytes += size
        self._bytes += sum(2 * len(text) + 64 for texts in validated.categories.values() for text in texts)

    def add_labels(self, producer: Hashable, label_batch: LabelBatch, line: int, now: ClockReading) -> None:
        """Add labels that `producer` sent in one line."""
        self._batch_of(producer).label_batches.append((label_batch, line, now))
        self._bytes += len(label_batch.labels) * _LABEL_BYTES

    def reject(self, producer: Hashable, line: int, reason: str) -> None:
        self._batch_of(producer).reject(line, reason)

    def advance(self, producer: Hashable, through: int, position: SourcePosition | None = None) -> None:
        """Record that `producer` has sent its lines up to `through`."""
        batch = self._batch_of(producer)
        batch.through, batch.position = through, position

    def discard(self, producer: Hashable) -> None:
        """Drop what `producer` sent since the last commit; it is not answered."""
        self._producer_batches.pop(producer, None)

    def _batch_of(self, producer: Hashable) -> _ProducerBatch:
        return self._producer_batches.setdefault(producer, _ProducerBatch())

    def holds_position(self, source: str, item: str) -> bool:
        """Return True if the next commit moves this position."""
        positions = (batch.position for batch in self._producer_batches.values())
        return any(at is not None and (at.source, at.item) == (source, item) for at in positions)

    def count(self, counter: str, n: int = 1) -> None:
        """Count events that cost no commit of their own."""
        self._counts[counter] += n

    def commit(self, now: ClockReading) -> dict[Hashable, CommitOutcome]:
        """Write everything that waits."""
        return self.write(self.drain(), now)

    def drain(self) -> ProducerBatches:
        """Return everything that waits, for `write`; more may be added meanwhile."""
        batches, self._producer_batches = self._producer_batches, {}
        self._drained_counts += self._counts
        self._counts.clear()
        self._rows = self._bytes = 0
        return batches

    def write(self, batches: ProducerBatches, now: ClockReading) -> dict[Hashable, CommitOutcome]:
        """Write batches in one transaction and return each producer's outcome. May run in another thread.

        A full store rejects every row and writes nothing. Raises StorageError for a failing disk: it is then unknown
        what was written, and no producer may get an answer.
        """
        try:
            size = sum(batch.size_bytes() for batch in batches.values())
            needed = self._store.used_bytes() + size
            if needed > self._store.limit_bytes() * INTAKE_SHARE:
                raise StorageFull("the store has reached its size ([buffer] max_size) and no used readings can go")
            with self._store.transaction(small=size < MAX_BODY) as tx:
                histories = self._histories.begin_transaction()
                before, producers = dict(histories.streams), dict(histories.producers)
                outcomes = self._write(tx, batches, now, histories)
                for stream, history in histories.streams.items():
                    if history is not before.get(stream) and history.latest_us is not None:
                        tx.set_latest_time(stream, history.latest_us)
                for (stream, client), latest in histories.producers.items():
                    if latest is not producers.get((stream, client)) and latest.us is not None:
                        tx.set_source_position(_PRODUCER_TIMES + stream, client, latest.us, _MAX_PRODUCER_TIMES)
            # Only now: rows that were not stored must not count as sent before.
            self._histories = histories
            self._drained_counts.clear()
            return outcomes
        except StorageFull as full:
            return {producer: _reject_all(batch, full) for producer, batch in batches.items()}

    def _write(
        self, tx: Transaction, batches: ProducerBatches, now: ClockReading, histories: _Histories
    ) -> dict[Hashable, CommitOutcome]:
        by_stream: dict[str, list[tuple[Rows, ClockStamp]]] = {}
        ends: dict[Hashable, tuple[str, int]] = {}
        counts: dict[Hashable, int] = {}
        row_counts: Counter[str] = Counter()
        stream_rows: Counter[str] = Counter()
        for block in (block for batch in batches.values() for block in batch.row_blocks):
            row_counts[block.stream] += len(block.validated.rows)
        for producer, batch in batches.items():
            accepted = 0
            for block in batch.row_blocks:
                rows, unknown = self._encode_categories(tx, block.stream, block.validated, row_counts[block.stream])
                parts = by_stream.setdefault(block.stream, [])
                if len(rows):
                    rows = self._screen(tx, batch, block, rows, unknown, parts, histories)
                if len(rows):
                    parts.append((rows, _stamp(tx, rows, block.now)))
                    stream_rows[block.stream] += len(rows)
                    ends[producer] = block.stream, stream_rows[block.stream]
                    accepted += len(rows)
            counts[producer] = accepted + self._write_labels(tx, batch)
            tx.increment_counter("lines rejected", len(batch.rejected))
        for counter, n in self._drained_counts.items():
            tx.increment_counter(counter, n)
        before = {stream: _append_rows(tx, stream, parts, now) for stream, parts in by_stream.items() if parts}
        outcomes = {}
        for producer, batch in batches.items():
            stream, end = ends.get(producer, ("", 0))
            row = before[stream] + end if end else 0
            if (source := batch.position) is not None and (source.position is not None or row):
                position = row if source.position is None else source.position
                tx.set_source_position(source.source, source.item, position, source.max_items)
            outcomes[producer] = batch.to_outcome(counts[producer], last_row=row)
        tx.segments.observe(now)
        return outcomes

    def _screen(
        self,
        tx: Transaction,
        batch: _ProducerBatch,
        block: _RowBlock,
        rows: Rows,
        unknown: Mask,
        pending: list[tuple[Rows, ClockStamp]],
        histories: _Histories,
    ) -> Rows:
        """Return the rows that the history of their stream accepts, and update it.

        `unknown`: rows with a category stored as `(other)`. `pending`: rows of this transaction.
        """
        name, client, stream = block.stream, block.client, self._streams[block.stream]
        history = histories.streams.get(name) or RowHistory(tx.latest_time(name)).begin_transaction()
        screened = row_history.screen(
            *(history, rows, block.validated.has_time, stream, block.now),
            lambda limit: self._load_recent(name, limit, [rows for rows, _ in pending]),
            is_recording=block.is_recording,
            producer_latest=None if client is None else histories.producer_time(tx, name, client),
            unknown=unknown,
        )
        histories.streams[name] = screened.history
        if client is not None:
            histories.set_producer_time(name, client, screened.latest)
        tx.increment_counter(f"rows {row_history.OUT_OF_ORDER}.{name}", screened.out_of_order)
        if not screened.rejected:
            return rows
        for kind, n in Counter(kind for kind, _ in screened.rejected.values()).items():
            tx.increment_counter(f"rows {kind}.{name}", n)
        reasons = {i: row_history.describe(*why, name, stream) for i, why in screened.rejected.items()}
        if len(block.lines) == len(rows):
            for index, reason in reasons.items():
                batch.reject(block.lines[index], reason)
        else:
            sent = len(rows) + len(block.validated.rejected)
            numbers = np.setdiff1d(np.arange(sent), list(block.validated.rejected))
            by_line: defaultdict[int, dict[int, str]] = defaultdict(dict)
            for index, reason in reasons.items():
                line, place = divmod(int(numbers[index]), sent // len(block.lines))
                by_line[block.lines[line]][place] = reason
            for line, by_place in by_line.items():
                batch.reject(line, row_history.summarize_reasons(by_place, "row"))
        accepted = np.setdiff1d(np.arange(len(rows)), list(screened.rejected))
        return Rows(rows.t[accepted], tuple(column[accepted] for column in rows.columns))

    def _load_recent(self, stream: str, limit: int, pending: list[Rows]) -> list[Rows]:
        """Return the last readable rows of a stream, about `limit`, with the `pending` ones at the end."""
        loaded, last = [], self._store.last_row(stream)
        after = max(0, last - limit)
        while after < last and (part := self._store.read_rows(stream, self._streams[stream].fields, after, limit)):
            if not part.loss_reason:
                loaded.append(part.rows)
            after = part.last
        return [*loaded, *pending]

    def _write_labels(self, tx: Transaction, producer_batch: _ProducerBatch) -> int:
        accepted, targets = 0, self._label_targets() if producer_batch.label_batches else {}
        for batch, line, now in producer_batch.label_batches:
            try:
                batch = label_intake.authenticate(batch, self._label_key)
            except RowRejected as problem:
                producer_batch.reject(line, str(problem))
                continue
            rejected = label_intake.store_labels(tx, targets.get(batch.task), batch, now)
            n = len(batch.labels) + len(batch.rejected)
            accepted += n - len(rejected)
            if rejected:
                producer_batch.reject(line, label_intake.format_reasons(rejected, n))
        return accepted

    def _encode_categories(
        self, tx: Transaction, stream: str, validated: ValidatedRows, row_count: int
    ) -> tuple[Rows, Mask]:
        """Replace category texts by codes, and return which rows have the code of `(other)` instead of their own.

        `row_count`: rows of the stream in this transaction.
        """
        columns, unknown = list(validated.rows.columns), np.zeros(len(validated.rows), bool)
        for index, texts in validated.categories.items():
            field = self._streams[stream].fields[index]
            last_row = tx.next_row(stream) + row_count - 1
            codes, others = tx.assign_category_codes(
                stream, field.name, texts, limit=field.max_categories, last_row=last_row
            )
            columns[index] = np.array(codes, "<u2")
            unknown[others] = True
            tx.increment_counter("categories over limit", len(others))
        return Rows(validated.rows.t, tuple(columns)), unknown


def _append_rows(tx: Transaction, stream: str, parts: Sequence[tuple[Rows, ClockStamp]], now: ClockReading) -> int:
    """Append rows to a stream and return the number of the last row before them."""
    last, count = 0, sum(len(rows) for rows, _ in parts)
    runs: list[tuple[ClockStamp, list[Rows]]] = []
    for rows, stamp in parts:
        if runs and (runs[-1][0] == stamp or len(runs) == _MAX_RUNS):
            if runs[-1][0] != stamp:
                runs[-1] = ((PRODUCER_TIME, stamp[1]), runs[-1][1])
            runs[-1][1].append(rows)
        else:
            runs.append((stamp, [rows]))
    for (segment, quality), run in runs:
        last = tx.append(stream, concatenate(run), quality, segment=segment, boot_us=now.boot_us)
    return last - count


def _stamp(tx: Transaction, rows: Rows, now: ClockReading) -> ClockStamp:
    segment = tx.segments.find_covering(now, int(rows.t.min()), int(rows.t.max()))
    return (PRODUCER_TIME, now.quality) if segment is None else (segment.number, QUALITIES[segment.quality])


def _reject_all(producer_batch: _ProducerBatch, error: StorageFull) -> CommitOutcome:
    """Reject every line with rows or labels, each once even if some of its rows were rejected before."""
    lines = {line for block in producer_batch.row_blocks if len(block.validated.rows) for line in block.lines}
    for line in lines | {line for _, line, _ in producer_batch.label_batches}:
        producer_batch.rejected[line] = f"{NOT_STORED}: {error}; send it again later"
    return producer_batch.to_outcome(0, is_store_full=True)
