"""Space management: expiry of what was kept long enough, and eviction by importance when the store is nearly full.

Eviction starts when `EVICTION_START` of the room that quota and disk leave is in use, and ends at `EVICTION_STOP`:
1. delete acknowledged messages, old stored alerts, readings that all their tasks have used, stored predictions, and
   last the newest results that were delivered
2. run batches early: results take less room than readings
3. evict readings that wait for a task that makes no progress
4. evict readings that wait for a task whose batches find no room for their results, if the messages of the outbox do
   not take up enough room: else the intake refuses rows and the task commits none, forever
5. evict messages of the outbox by `EVICTION_ORDER`, but only while nothing is acknowledged: if messages are being
   delivered and a producer is too fast, the intake refuses its rows instead (`INTAKE_SHARE` in store.py)
Whatever goes before it was delivered, used or kept as long as configured is declared in the same transaction (see
`eviction`). `[buffer] when_full = "refuse"` leaves out steps 3 to 5. So does a disk that other programs have filled:
pages that SQLite frees give it no room, and no batch or row is committed before it has some.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from itertools import groupby
from operator import itemgetter
from typing import Any

from outstation.device.batch_parts.joined_streams import load_positions
from outstation.device.capacity.eviction import (
    EVENT,
    EXPIRED,
    EXPIRED_COUNTER,
    NO_ROOM,
    declare_messages,
    declare_readings,
)
from outstation.device.config import Config
from outstation.device.store import retention, task_keys
from outstation.device.store.label_store import label_capacity
from outstation.device.store.message_log import MessageLog
from outstation.device.store.predictions import list_stored_outputs, output_key, shadow_key
from outstation.device.store.retention import Growth
from outstation.device.store.rows import row_bytes
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction, TrimmedChunks
from outstation.foundation import ranges
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.alerts.kinds import STORE_FULL
from outstation.protocol.wire import key_rotation
from outstation.protocol.wire.topics import KINDS

log = logging.getLogger("outstation")

EVICTION_START, EVICTION_STOP = 0.85, 0.7
_BY_RANK = groupby(
    sorted((k.eviction_rank, k.name) for k in KINDS.values() if k.eviction_rank is not None), itemgetter(0)
)
EVICTION_ORDER = tuple(tuple(name for _, name in kinds) for _, kinds in _BY_RANK)
# The least important ones. A metered connection may be too small for them.
_EXPIRING_KINDS = frozenset(name for kinds in EVICTION_ORDER[:2] for name in kinds)
# Delivery counts as stalled after this time without an acknowledgement.
STALLED_S = 60.0
_EARLY_RUN_INTERVAL_S = 60.0
_MAX_STEPS = 20
_CHUNK_LIMIT = 500
_MESSAGE_LIMIT = 500
_UNLIMITED = 2**63 - 1
# The alert clears when the undelivered bytes are well below where eviction stops, some time after the last eviction.
_CLEAR_SHARE, _CLEAR_AFTER_S = 0.35, 600.0
# Pages are not full: messages of 0.3 to 9 kB took up 1.02 to 1.63 times their bytes.
_PAGE_OVERHEAD = 1.25


def is_short(store: Store) -> bool:
    """Return True if eviction has to begin. Somewhat later the intake refuses rows."""
    return store.used_bytes() > store.limit_bytes() * EVICTION_START


class SpaceManager:
    """Space management of the main loop.

    `run_early` runs all tasks out of schedule for a while and returns True if rows still wait; `stuck` names the tasks
    that make no progress, `crowded` those whose last batch found no room.
    """

    def __init__(
        self,
        conf: Config,
        store: Store,
        message_log: MessageLog,
        run_early: Callable[[ClockReading], bool | None],
        stuck: Callable[[], Collection[str]],
        crowded: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._conf, self._store, self._message_log = conf, store, message_log
        self._run_early, self._stuck, self._crowded = run_early, stuck, crowded
        self._growth = Growth.from_json(store.get_meta(retention.GROWTH, ""))
        self._next_early_run_s = float("-inf")
        self._last_acknowledgement: tuple[str, float] | None = None
        self._evicted_at: float | None = None
        self._expired_through = 0
        self._scanned_through = dict.fromkeys(EVICTION_ORDER, 0)
        self.is_evicting = False

    def is_short(self) -> bool:
        return is_short(self._store)

    def tick(self, now: ClockReading) -> bool:
        """Delete what has expired, and evict if space is short. Return True to be called again at once."""
        known = self._store.get_meta(retention.ACKNOWLEDGED, "")
        if self._last_acknowledgement is None or self._last_acknowledgement[0] != known:
            self._last_acknowledgement = known, now.boot_s
        try:
            at_s = self._store.uptime_s(now)
            if self._growth.add_sample(at_s, self.undelivered_bytes()):
                with self._store.transaction(vital=True) as tx:
                    tx.set_meta(retention.GROWTH, self._growth.to_json())
                    tx.save_uptime(now)
            keep_us = round(self._conf.buffer.keep_readings * 1e6)
            # By the boot-time clock as well: a step of the wall clock must not expire a reading.
            before_us, received_by_us = now.wall_us - keep_us, now.boot_us - keep_us
            history = self._store.get_meta(retention.ACKNOWLEDGED_HISTORY, "")
            through = retention.expired_through(history, at_s, self._conf.buffer.keep_messages)
            for name in self._conf.streams:
                with self._store.transaction(vital=True) as tx:
                    tx.trim_rows(name, self._used_through(name), before_us, _CHUNK_LIMIT, received_by_us)
            if through:
                with self._store.transaction(vital=True) as tx:
                    tx.outbox.drop_acknowledged(through, _MESSAGE_LIMIT, spare=self._conf.tasks)
            self._expire_messages(at_s, now)
            for task in self._conf.tasks:
                with self._store.transaction(vital=True) as tx:
                    keys = _output_keys(tx, task)
                    for name in (*keys, *_output_keys(tx, shadow_key(task))):
                        tx.labels.trim_predictions(name, at_s - self._conf.buffer.keep_results, _CHUNK_LIMIT)
                    tx.labels.trim_labels(keys, label_capacity(self._store.quota.database_bytes), _CHUNK_LIMIT)
            self._clear_alert(now)
            if not self.is_evicting and self.is_short():
                self.is_evicting, self._scanned_through = True, dict.fromkeys(EVICTION_ORDER, 0)
            return self.is_evicting and self._evict(now)
        except StorageFull as full:
            log.error("%s; deleting needs a little room, too", full)
            return False

    # --- expiry ---

    def _used_through(self, stream: str) -> int:
        # Rows of a stream without a task count as used.
        used = [*self._cursors(stream).values(), *self._joined_through(stream).values()]
        return min(used, default=self._store.last_row(stream))

    def _joined_through(self, stream: str) -> dict[str, int]:
        """Return the last row that each task no longer needs of a stream that one of its inputs is joined from."""
        through: dict[str, int] = {}
        for name, task in self._conf.tasks.items():
            for joined, source in task.inputs.items():
                if source.stream == stream:
                    position = load_positions(self._store, name).get(joined)
                    row = 0 if position is None or position.stream != stream else position.row - 1
                    through[name] = min(row, through.get(name, row))
        return through

    def _cursors(self, stream: str) -> dict[str, int]:
        return {name: self._store.cursor(name) or 0 for name, task in self._conf.tasks.items() if task.stream == stream}

    def _expire_messages(self, at_s: float, now: ClockReading) -> None:
        """Give up bulk that waited longer than `[broker.metered] max_age`, by uptime, and declare it."""
        metered = self._conf.broker.metered
        if metered is None or metered.max_age is None:
            return
        with self._store.transaction(vital=True) as tx:
            history = tx.get_meta(retention.WRITTEN_HISTORY, "")
            if longer := retention.append_history(history, at_s, tx.log_head()[0], metered.max_age):
                tx.set_meta(retention.WRITTEN_HISTORY, longer)
            through = retention.expired_through(longer or history, at_s, metered.max_age)
            if through <= self._expired_through:
                return
            page = [*tx.outbox.unacknowledged(self._expired_through, _MESSAGE_LIMIT)]
            scanned = min(through, page[-1].seq) if len(page) == _MESSAGE_LIMIT else through
            old = [entry for entry in page if entry.seq <= through and entry.kind in _EXPIRING_KINDS]
            if deleted := tx.outbox.delete([entry.seq for entry in old]):
                size = sum(entry.size for entry in old[: len(deleted)])
                declare_messages(tx, self._message_log, now, ranges.from_numbers(deleted), EXPIRED, size)
                tx.increment_counter(EXPIRED_COUNTER, len(deleted))
            if len(deleted) == len(old):
                self._expired_through = scanned

    # --- eviction ---

    def _evict(self, now: ClockReading) -> bool:
        for _ in range(_MAX_STEPS):
            if self._store.used_bytes() <= self._store.limit_bytes() * EVICTION_STOP:
                self.is_evicting = False
                return False
            if not self._evict_step(now):
                return False
        return True

    def _evict_step(self, now: ClockReading) -> bool:
        """Delete or evict a little of the least important data. Return False if nothing may go."""
        if self._delete_delivered() or any(self._delete_used_rows(name, now) for name in self._conf.streams):
            return True
        if any(self._delete_predictions(task) for task in self._conf.tasks) or self._delete_newest_results():
            return True
        if now.boot_s >= self._next_early_run_s:
            if not self._run_early(now):
                self._next_early_run_s = now.boot_s + _EARLY_RUN_INTERVAL_S
            return True
        if self._conf.buffer.when_full == "refuse" or self._store.is_disk_full():
            return False
        if self._evict_readings(self._stuck(), now):
            return True
        excess = self._store.used_bytes() - self._store.limit_bytes() * EVICTION_STOP
        if self._store.backlog().bytes * _PAGE_OVERHEAD < excess and self._evict_readings(self._crowded(), now):
            return True
        return self._is_stalled(now) and any(self._evict_messages(kinds, now) for kinds in EVICTION_ORDER)

    def _evict_readings(self, tasks: Collection[str], now: ClockReading) -> bool:
        known = [self._conf.tasks[name] for name in tasks if name in self._conf.tasks]
        streams = {task.stream for task in known} | {source.stream for task in known for source in task.inputs.values()}
        return any(self._evict_unused_rows(name, now) for name in sorted(streams))

    def _delete_delivered(self) -> bool:
        with self._store.transaction(vital=True) as tx:
            dropped = tx.outbox.drop_acknowledged(_UNLIMITED, _MESSAGE_LIMIT, spare=self._conf.tasks)
            return dropped > 0 or tx.delete_old_alerts()

    def _delete_newest_results(self) -> bool:
        with self._store.transaction(vital=True) as tx:
            return tx.outbox.drop_acknowledged(_UNLIMITED, _MESSAGE_LIMIT) > 0

    def _delete_used_rows(self, stream: str, now: ClockReading) -> bool:
        with self._store.transaction(vital=True) as tx:
            # Whatever time the rows carry: a wrong clock may have dated them far ahead.
            chunks = tx.trim_rows(stream, self._used_through(stream), _UNLIMITED, _CHUNK_LIMIT)
            if chunks is not None:
                self._declare_used(tx, stream, chunks, chunks.last, now)
        return chunks is not None

    def _delete_predictions(self, task: str) -> bool:
        with self._store.transaction(vital=True) as tx:
            return any(
                tx.labels.trim_predictions(name, math.inf, _CHUNK_LIMIT) > 0
                for key in (shadow_key(task), task)
                for name in reversed(_output_keys(tx, key))
            )

    def _evict_unused_rows(self, stream: str, now: ClockReading) -> bool:
        with self._store.transaction(vital=True) as tx:
            cursors = self._cursors(stream)
            chunks = tx.trim_rows(stream, _UNLIMITED, _UNLIMITED, _CHUNK_LIMIT)
            if chunks is None:
                return False
            behind = {task: row for task, row in cursors.items() if row < chunks.last}
            for task in behind:
                # Evicted rows count as consumed, so that no batch meets the gap.
                tx.advance_cursor(task, chunks.last + 1, chunks.last)
            # A task that joins these rows has no cursor on them; it continues with the rows that are left.
            joined = self._joined_through(stream).items()
            behind |= {task: row for task, row in joined if row < min(chunks.last, behind.get(task, chunks.last))}
            used = min(behind.values(), default=chunks.last)
            if chunks.first <= used:
                self._declare_used(tx, stream, chunks, used, now)
            if behind:
                rows, size, tasks = [(max(chunks.first, used + 1), chunks.last)], chunks.bytes, sorted(behind)
                declare_readings(tx, self._message_log, now, stream, rows, NO_ROOM, size, used=False, tasks=tasks)
                self._raise_alert(tx, now)
        self._evicted_at = now.boot_s
        return True

    def _declare_used(self, tx: Transaction, stream: str, chunks: TrimmedChunks, last: int, now: ClockReading) -> None:
        rows = [(chunks.first, last)]
        declare_readings(tx, self._message_log, now, stream, rows, NO_ROOM, chunks.bytes, used=True)

    def _evict_messages(self, kinds: tuple[str, ...], now: ClockReading) -> bool:
        chosen, last = [], 0
        with self._store.transaction(vital=True) as tx:
            for entry in tx.outbox.unacknowledged(self._scanned_through[kinds], _MESSAGE_LIMIT):
                last = entry.seq
                if entry.kind in kinds and not (entry.kind == "audit" and _is_protected(tx, entry.seq)):
                    chosen.append(entry)
            if deleted := tx.outbox.delete([entry.seq for entry in chosen]):
                size = sum(entry.size for entry in chosen[: len(deleted)])
                declare_messages(tx, self._message_log, now, ranges.from_numbers(deleted), NO_ROOM, size)
                self._raise_alert(tx, now)
        if not last or (chosen and not deleted):
            return False
        self._scanned_through[kinds] = last if len(deleted) == len(chosen) else deleted[-1]
        if deleted:
            self._evicted_at = now.boot_s
        return True

    # --- delivery and growth ---

    def _is_stalled(self, now: ClockReading) -> bool:
        return self._last_acknowledgement is not None and now.boot_s >= self._last_acknowledgement[1] + STALLED_S

    def undelivered_bytes(self) -> int:
        """Return the bytes of waiting messages and of readings that wait for stuck tasks."""
        unused = 0
        for name in self._stuck():
            if name in self._conf.tasks:
                stream = self._conf.tasks[name].stream
                used = max(self._store.cursor(name) or 0, self._store.first_row(stream) - 1)
                unused += (self._store.last_row(stream) - used) * row_bytes(self._conf.streams[stream])
        return round(self._store.backlog().bytes * _PAGE_OVERHEAD) + unused

    # --- the alert ---

    def _raise_alert(self, tx: Transaction, now: ClockReading) -> None:
        if self._store.load_state("", task_keys.STORAGE_ALERT) is None:
            tx.save_state("", task_keys.STORAGE_ALERT, b"raised")
            summary = (
                "The store is full and nothing can be delivered or used: the least important data is evicted, and "
                "each eviction is declared. Restore the connection or the task that does not run, or "
                "raise [buffer] max_size."
            )
            self._write_alert(tx, now, STORE_FULL.raised(summary, self._alert_evidence()))

    def _clear_alert(self, now: ClockReading) -> None:
        if self._store.load_state("", task_keys.STORAGE_ALERT) is None:
            return
        recently = self._evicted_at is not None and now.boot_s < self._evicted_at + _CLEAR_AFTER_S
        if not recently and self.undelivered_bytes() < self._store.limit_bytes() * _CLEAR_SHARE:
            with self._store.transaction(vital=True) as tx:
                tx.delete_state("", task_keys.STORAGE_ALERT)
                summary = "The store has room again; eviction has ended."
                self._write_alert(tx, now, STORE_FULL.cleared(summary, self._alert_evidence()))

    def _alert_evidence(self) -> dict[str, Any]:
        used, limit = self._store.used_bytes(), self._store.limit_bytes()
        return {"bytes": used, "max": limit, "hours": hours_until_eviction(self._store, limit)}

    def _write_alert(self, tx: Transaction, now: ClockReading, alert: Alert) -> None:
        self._message_log.append(tx, "alerts", None, alert.to_body(), now)


def hours_until_eviction(store: Store, limit: int) -> float | None:
    """Return the hours until undelivered data must go; None if that is not in sight, or not known yet."""
    return Growth.from_json(store.get_meta(retention.GROWTH, "")).hours_until(round(limit * EVICTION_START))


def _output_keys(tx: Transaction, task: str) -> list[str]:
    return [output_key(task, output) for output in list_stored_outputs(tx.connection, task)]


def _is_protected(tx: Transaction, seq: int) -> bool:
    """Return True for an audit message that is never evicted.

    Declarations of evictions are merged instead. Without the message that names a new signing key no later message
    verifies. A damaged message may be either; it is quarantined when its turn to be sent comes.
    """
    payload = tx.outbox.payload(seq)
    return payload is None or any(
        f'"event":"{event}"'.encode() in payload for event in (EVENT, key_rotation.ROTATION_EVENT)
    )
