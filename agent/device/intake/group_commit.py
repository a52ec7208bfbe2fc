"""Group commit: rows of all producers wait together for one transaction, and each producer learns what became of its.

A commit costs about 28 KB of flash writes whatever it holds, so few rows wait for it up to `[buffer] commit_every`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import msgspec
import numpy as np

from agent.clock import ClockQuality, ClockReading
from agent.config import StreamConfig
from agent.device.intake import labels
from agent.device.intake.labels import LabelBatch
from agent.device.store.clock_segments import PRODUCER_TIME, QUALITIES
from agent.device.store.rows import Rows, ValidatedRows, concatenate
from agent.device.store.store import INTAKE_SHARE, Store
from agent.device.store.transaction import Transaction
from agent.errors import StorageFull
from agent.performance.labels import LabelTarget

MAX_GROUP_ROWS = 16_384
# Beside so many what a commit itself writes is little.
_MIN_COMMIT_BYTES = 128 << 10
NOT_STORED = "not stored"
# The most chunks that the rows of a stream in one commit are cut into, for the segments their times were read in.
_MAX_RUNS = 64
# What a label takes in the store, its index entries too.
_LABEL_BYTES = 1_000
# (segment, quality) of the clock that rows have their times from.
ClockStamp = tuple[int, ClockQuality]


class SourcePosition(msgspec.Struct, frozen=True):
    """How far a source has got, kept in the same transaction as its rows: what a full store refused is not counted.

    `position` None: its last row in the stream. Of more than `most` items of a source, those that sent last are known.
    """

    source: str
    item: str
    position: int | None
    max_items: int | None = None


class CommitOutcome(msgspec.Struct, frozen=True):
    """Of one producer's part of a commit: lines dealt with so far, rows taken, lines rejected with a reason.

    `row` is the last row taken, counted from the first one of its stream; 0 where none was.
    """

    through: int
    accepted: int
    rejected: list[tuple[int, str]]
    is_store_full: bool = False
    last_row: int = 0


class _RowBlock(msgspec.Struct, frozen=True):
    stream: str
    checked: ValidatedRows
    lines: list[int]
    now: ClockReading
    size_bytes: int


class _ProducerBatch(msgspec.Struct):
    through: int = 0
    rejected: dict[int, str] = msgspec.field(default_factory=dict)
    row_blocks: list[_RowBlock] = msgspec.field(default_factory=list)
    label_batches: list[tuple[LabelBatch, int, ClockReading]] = msgspec.field(default_factory=list)
    position: SourcePosition | None = None

    def reject(self, line: int, reason: str) -> None:
        self.rejected[line] = f"{self.rejected[line]}; {reason}" if line in self.rejected else reason

    def size_bytes(self) -> int:
        """What its rows will take in the store."""
        labels = sum(len(lot.labels) for lot, _, _ in self.label_batches)
        return sum(part.size_bytes for part in self.row_blocks) + labels * _LABEL_BYTES

    def to_outcome(self, accepted: int, is_store_full: bool = False, last_row: int = 0) -> CommitOutcome:
        return CommitOutcome(self.through, accepted, sorted(self.rejected.items()), is_store_full, last_row)


ProducerBatches = dict[Hashable, _ProducerBatch]


class GroupCommit:
    """Rows and labels that wait for the next commit. Used by one thread, but for `write`.

    `asked` tells which tasks take labels.
    """

    def __init__(
        self,
        store: Store,
        streams: Mapping[str, StreamConfig],
        label_targets: Callable[[], Mapping[str, LabelTarget]] = dict,
    ) -> None:
        self._store, self._streams, self._label_targets = store, streams, label_targets
        self._producer_batches: ProducerBatches = {}
        self._max_bytes = store.quota.transaction_bytes // 4
        self._rows = self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._producer_batches)

    @property
    def is_full(self) -> bool:
        """Whether to commit now: more would make long waits, or too much for one transaction."""
        return self._rows >= MAX_GROUP_ROWS or self._bytes >= self._max_bytes

    @property
    def is_worth_committing(self) -> bool:
        """Whether it may be committed as soon as nothing more comes."""
        return self._bytes >= _MIN_COMMIT_BYTES

    def add_rows(
        self, producer: Hashable, stream: str, checked: ValidatedRows, lines: list[int], now: ClockReading
    ) -> None:
        """Rows of `producer` that came at `now`; `lines` are the lines they came in, one a row or one for all."""
        size = checked.rows.t.nbytes + sum(column.nbytes for column in checked.rows.columns)
        self._producer_batches.setdefault(producer, _ProducerBatch()).row_blocks.append(
            _RowBlock(stream, checked, lines, now, size)
        )
        self._rows += len(checked.rows)
        self._bytes += size
        self._bytes += sum(2 * len(text) + 64 for texts in checked.categories.values() for text in texts)

    def add_labels(self, producer: Hashable, label_batch: LabelBatch, line: int, now: ClockReading) -> None:
        """Labels of `producer` that came in one line."""
        self._producer_batches.setdefault(producer, _ProducerBatch()).label_batches.append((label_batch, line, now))
        self._bytes += len(label_batch.labels) * _LABEL_BYTES

    def reject(self, producer: Hashable, line: int, reason: str) -> None:
        self._producer_batches.setdefault(producer, _ProducerBatch()).reject(line, reason)

    def advance(self, producer: Hashable, through: int, position: SourcePosition | None = None) -> None:
        """`producer` has handed over its lines up to `through`."""
        share = self._producer_batches.setdefault(producer, _ProducerBatch())
        share.through, share.position = through, position

    def commit(self, now: ClockReading) -> dict[Hashable, CommitOutcome]:
        """`write` all that waits."""
        return self.write(self.drain(), now)

    def drain(self) -> ProducerBatches:
        """All that waits, to be written; more may be added meanwhile."""
        shares, self._producer_batches = self._producer_batches, {}
        self._rows = self._bytes = 0
        return shares

    def write(self, producer_batches: ProducerBatches, now: ClockReading) -> dict[Hashable, CommitOutcome]:
        """In one transaction; what became of it for each producer. May run in another thread than the rest.

        Where the store is full every row is rejected and nothing is written. Raises StorageError for a sick disk:
        then nothing is known to be written and no producer may be told anything.
        """
        try:
            needed = self._store.used_bytes() + sum(share.size_bytes() for share in producer_batches.values())
            if needed > self._store.limit_bytes() * INTAKE_SHARE:
                raise StorageFull("the store has reached its size ([buffer] max_size) and no used readings can go")
            with self._store.transaction() as tx:
                return self._write(tx, producer_batches, now)
        except StorageFull as full:
            return {producer: _reject_all(share, full) for producer, share in producer_batches.items()}

    def _write(
        self, tx: Transaction, producer_batches: ProducerBatches, now: ClockReading
    ) -> dict[Hashable, CommitOutcome]:
        by_stream: dict[str, list[tuple[Rows, ClockStamp]]] = {}
        ends: dict[Hashable, tuple[str, int]] = {}
        counts: dict[Hashable, int] = {}
        for producer, share in producer_batches.items():
            accepted = 0
            for part in share.row_blocks:
                rows, refused = self._encode_categories(tx, part.stream, part.checked)
                for index, reason in refused.items():
                    share.reject(part.lines[index if len(part.lines) > 1 else 0], reason)
                if len(rows):
                    parts = by_stream.setdefault(part.stream, [])
                    parts.append((rows, _stamp(tx, rows, part.now)))
                    ends[producer] = part.stream, sum(len(rows) for rows, _ in parts)
                    accepted += len(rows)
            counts[producer] = accepted + self._write_labels(tx, share)
            tx.increment_counter("lines rejected", len(share.rejected))
        before = {stream: _append_rows(tx, stream, parts, now) for stream, parts in by_stream.items()}
        outcomes = {}
        for producer, share in producer_batches.items():
            stream, end = ends.get(producer, ("", 0))
            row = before[stream] + end if end else 0
            if share.position is not None and (share.position.position is not None or row):
                position = row if share.position.position is None else share.position.position
                tx.set_source_position(share.position.source, share.position.item, position, share.position.max_items)
            outcomes[producer] = share.to_outcome(counts[producer], last_row=row)
        tx.segments.observe(now)
        return outcomes

    def _write_labels(self, tx: Transaction, producer_batch: _ProducerBatch) -> int:
        """Write its labels; how many were accepted."""
        accepted, asked = 0, self._label_targets() if producer_batch.label_batches else {}
        for lot, line, now in producer_batch.label_batches:
            refused, n = labels.store_labels(tx, asked.get(lot.task), lot, now), len(lot.labels) + len(lot.rejected)
            accepted += n - len(refused)
            if refused:
                producer_batch.reject(line, labels.format_reasons(refused, n))
        return accepted

    def _encode_categories(self, tx: Transaction, stream: str, checked: ValidatedRows) -> tuple[Rows, dict[int, str]]:
        """Category texts become codes; index → reason of rows whose text can have none."""
        columns, refused = list(checked.rows.columns), {}
        for index, texts in checked.categories.items():
            name = self._streams[stream].fields[index].name
            codes = np.array(tx.assign_category_codes(stream, name, texts), np.int64)
            columns[index] = codes.astype("<u2")
            for row in np.flatnonzero(codes < 0):
                refused[int(row)] = (
                    f"{name} = {texts[row]!r} would be the 65,536th category; that many cannot be told apart"
                )
        rows = Rows(checked.rows.t, tuple(columns))
        if refused:
            kept = np.setdiff1d(np.arange(len(rows)), np.fromiter(refused, np.int64, len(refused)))
            rows = Rows(rows.t[kept], tuple(column[kept] for column in rows.columns))
        return rows, refused


def _append_rows(tx: Transaction, stream: str, parts: Sequence[tuple[Rows, ClockStamp]], now: ClockReading) -> int:
    """Add rows to a stream; the number of the last one before them."""
    last, count = 0, sum(len(rows) for rows, _ in parts)
    for (segment, quality), run in _merge_runs(parts):
        last = tx.append(stream, concatenate(run), quality, segment=segment, boot_us=now.boot_us)
    return last - count


def _stamp(tx: Transaction, rows: Rows, now: ClockReading) -> ClockStamp:
    held = tx.segments.find_covering(now, int(rows.t.min()), int(rows.t.max()))
    return (PRODUCER_TIME, now.quality) if held is None else (held.number, QUALITIES[held.quality])


def _merge_runs(parts: Sequence[tuple[Rows, ClockStamp]]) -> list[tuple[ClockStamp, list[Rows]]]:
    """Neighbours with the same stamp together. A producer that mixes times at will gets no chunk for each."""
    runs: list[tuple[ClockStamp, list[Rows]]] = []
    for rows, stamped in parts:
        if runs and (runs[-1][0] == stamped or len(runs) == _MAX_RUNS):
            if runs[-1][0] != stamped:
                runs[-1] = ((PRODUCER_TIME, stamped[1]), runs[-1][1])
            runs[-1][1].append(rows)
        else:
            runs.append((stamped, [rows]))
    return runs


def _reject_all(producer_batch: _ProducerBatch, error: StorageFull) -> CommitOutcome:
    """Every line with rows or labels in it is rejected, and only once where some of its rows already were."""
    lines = {line for part in producer_batch.row_blocks if len(part.checked.rows) for line in part.lines}
    for line in lines | {line for _, line, _ in producer_batch.label_batches}:
        producer_batch.rejected[line] = f"{NOT_STORED}: {error}; send it again later"
    return producer_batch.to_outcome(0, is_store_full=True)
