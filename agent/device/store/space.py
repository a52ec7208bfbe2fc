"""What goes when space runs short, least important first, and what is only kept for a while.

From `START` of the room that quota and disk leave, until no more than `STOP` of it is in use:
1. messages that are acknowledged, old alerts kept for local eyes, readings that all their tasks have used, and results
   kept for labels
2. what waits is run before its time: results take less room than readings
3. readings that wait for a task that does not get on
4. messages of the outbox, by `RANKS`; only while nothing is being acknowledged: what is on its way is not given up
   because a producer is fast, that one is turned away (`INTAKE_SHARE` in store.py)
Whatever is given up before it was delivered, used, or kept as long as it should be is declared in the same transaction
(see `eviction`). With `[buffer] when_full = "refuse"` steps 3 and 4 are left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from typing import Any

from agent.alerts import STORE_FULL, Alert
from agent.clock import ClockReading
from agent.config import Config
from agent.device.store import ranges, retention, task_keys
from agent.device.store.eviction import EVENT, NO_ROOM, declare_messages, declare_readings
from agent.device.store.labels import label_capacity, shadow_key
from agent.device.store.message_log import MessageLog
from agent.device.store.retention import Growth, uptime_s
from agent.device.store.rows import row_bytes
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction, TrimmedChunks
from agent.errors import StorageFull
from agent.wire import key_rotation

log = logging.getLogger("outstation")

EVICTION_START, EVICTION_STOP = 0.85, 0.7
EVICTION_ORDER = (("shadow",), ("results", "health"), ("drift", "quality"), ("alerts",), ("audit",))
# Without an acknowledgement for so long, delivery counts as stalled.
STALLED_S = 60.0
_EARLY_RUN_INTERVAL_S = 60.0
_MAX_STEPS = 20
_CHUNK_LIMIT = 500
_MESSAGE_LIMIT = 500
_UNLIMITED = 2**63 - 1
# The alert is over when what cannot go has fallen well below where eviction stops, and stayed out of it for a while.
_CLEAR_SHARE, _CLEAR_AFTER_S = 0.35, 600.0
# Pages are not full: messages of 0.3 to 9 kB took 1.02 to 1.63 times their bytes.
_PAGE_OVERHEAD = 1.25


class SpaceManager:
    """Used by the main loop.

    `run_early` runs all tasks out of schedule, for a while, and says whether they are not through; `stuck` names those
    that do not get on.
    """

    def __init__(
        self,
        conf: Config,
        store: Store,
        message_log: MessageLog,
        run_early: Callable[[ClockReading], bool | None],
        stuck: Callable[[], Collection[str]],
    ) -> None:
        self._conf, self._store, self._message_log, self._run_early, self._stuck = (
            conf,
            store,
            message_log,
            run_early,
            stuck,
        )
        self._growth = Growth.from_json(store.get_meta(retention.GROWTH, ""))
        self._next_early_run_s = float("-inf")
        self._last_acknowledgement: tuple[str, float] | None = None
        self._evicted_at: float | None = None
        self._scanned_through = dict.fromkeys(EVICTION_ORDER, 0)
        self.is_evicting = False

    def is_short(self) -> bool:
        return self._store.used_bytes() > self._store.limit_bytes() * EVICTION_START

    def tick(self, now: ClockReading) -> bool:
        """Let go of what is due, and of more where space is short; whether there is more to do at once."""
        self._watch_acknowledgements(now)
        try:
            self._sample_growth(now)
            self._expire(now)
            self._clear_alert(now)
            if not self.is_evicting and self.is_short():
                self.is_evicting, self._scanned_through = True, dict.fromkeys(EVICTION_ORDER, 0)
            return self.is_evicting and self._evict(now)
        except StorageFull as full:
            log.error("%s; even deleting needs a little room", full)
            return False

    def hours_until_eviction(self) -> float | None:
        """Until something undelivered would have to go, at the pace of the past hours."""
        return hours_until_eviction(self._store, self._store.limit_bytes())

    # --- what is kept for a while ---

    def _expire(self, now: ClockReading) -> None:
        keep_us = round(self._conf.buffer.keep_readings * 1e6)
        # By the boot-time clock as well: a step of the wall clock makes no reading old.
        before, came_by = now.wall_us - keep_us, now.boot_us - keep_us
        at_s = uptime_s(self._store.get_meta(retention.UPTIME, ""), self._store.boot, now)
        steps = self._store.get_meta(retention.ACKNOWLEDGED_HISTORY, "")
        through = retention.expired_through(steps, at_s, self._conf.buffer.keep_messages)
        for name in self._conf.streams:
            with self._store.transaction(vital=True) as tx:
                tx.trim_rows(name, self._used_through(name), before, self._chunk_limit(), came_by)
        if through:
            with self._store.transaction(vital=True) as tx:
                tx.outbox.drop_acknowledged(through, _MESSAGE_LIMIT)
        for task in self._conf.tasks:
            with self._store.transaction(vital=True) as tx:
                for name in (task, shadow_key(task)):
                    tx.labels.trim_predictions(name, at_s - self._conf.buffer.keep_results, self._chunk_limit())
                tx.labels.trim_labels(task, label_capacity(self._store.quota.database_bytes), self._chunk_limit())

    def _used_through(self, stream: str) -> int:
        # Nobody waits for the rows of a stream without a task.
        return min(self._cursors(stream).values(), default=self._store.last_row(stream))

    def _cursors(self, stream: str) -> dict[str, int]:
        return {name: self._store.cursor(name) or 0 for name, task in self._conf.tasks.items() if task.stream == stream}

    def _chunk_limit(self) -> int:
        return _CHUNK_LIMIT

    # --- what goes when space is short ---

    def _evict(self, now: ClockReading) -> bool:
        for _ in range(_MAX_STEPS):
            if self._store.used_bytes() <= self._store.limit_bytes() * EVICTION_STOP:
                self.is_evicting = False
                return False
            if not self._evict_step(now):
                return False
        return True

    def _evict_step(self, now: ClockReading) -> bool:
        """Give up a little of the least important there is; False where nothing may go."""
        if self._delete_delivered() or any(self._delete_used_rows(name, now) for name in self._conf.streams):
            return True
        if any(self._delete_predictions(task) for task in self._conf.tasks):
            return True
        if now.boot_s >= self._next_early_run_s:
            if not self._run_early(now):
                self._next_early_run_s = now.boot_s + _EARLY_RUN_INTERVAL_S
            return True
        if self._conf.buffer.when_full == "refuse":
            return False
        stuck = self._stuck()
        waited_for = {self._conf.tasks[name].stream for name in stuck if name in self._conf.tasks}
        if any(self._evict_unused_rows(name, now) for name in sorted(waited_for)):
            return True
        return self._is_stalled(now) and any(self._evict_messages(kinds, now) for kinds in EVICTION_ORDER)

    def _delete_delivered(self) -> bool:
        with self._store.transaction(vital=True) as tx:
            return tx.outbox.drop_acknowledged(_UNLIMITED, _MESSAGE_LIMIT) > 0 or tx.delete_old_alerts()

    def _delete_used_rows(self, stream: str, now: ClockReading) -> bool:
        with self._store.transaction(vital=True) as tx:
            # Whatever time the rows carry: a clock that was wrong may have dated them far ahead.
            gone = tx.trim_rows(stream, self._used_through(stream), _UNLIMITED, self._chunk_limit())
            if gone is not None:
                self._declare_used(tx, stream, gone, gone.last, now)
        return gone is not None

    def _delete_predictions(self, task: str) -> bool:
        with self._store.transaction(vital=True) as tx:
            return any(
                tx.labels.trim_predictions(name, math.inf, self._chunk_limit()) > 0 for name in (shadow_key(task), task)
            )

    def _evict_unused_rows(self, stream: str, now: ClockReading) -> bool:
        with self._store.transaction(vital=True) as tx:
            cursors = self._cursors(stream)
            gone = tx.trim_rows(stream, _UNLIMITED, _UNLIMITED, self._chunk_limit())
            if gone is None:
                return False
            behind = {task: row for task, row in cursors.items() if row < gone.last}
            for task in behind:
                # What goes counts as consumed, so that no batch ever meets the hole.
                tx.advance_cursor(task, gone.last + 1, gone.last)
            used = min(behind.values(), default=gone.last)
            if gone.first <= used:
                self._declare_used(tx, stream, gone, used, now)
            if behind:
                rows = [(max(gone.first, used + 1), gone.last)]
                names = sorted(behind)
                declare_readings(tx, self._message_log, now, stream, rows, NO_ROOM, gone.bytes, used=False, tasks=names)
                self._raise_alert(tx, now)
        self._evicted_at = now.boot_s
        return True

    def _declare_used(self, tx: Transaction, stream: str, gone: TrimmedChunks, through: int, now: ClockReading) -> None:
        rows = [(gone.first, through)]
        declare_readings(tx, self._message_log, now, stream, rows, NO_ROOM, gone.bytes, used=True)

    def _evict_messages(self, kinds: tuple[str, ...], now: ClockReading) -> bool:
        chosen, last = [], 0
        with self._store.transaction(vital=True) as tx:
            for entry in tx.outbox.unacknowledged(self._scanned_through[kinds], _MESSAGE_LIMIT):
                last = entry.seq
                if entry.kind in kinds and not (entry.kind == "audit" and _is_protected(tx, entry.seq)):
                    chosen.append(entry)
            if gone := tx.outbox.delete([entry.seq for entry in chosen]):
                size = sum(entry.size for entry in chosen[: len(gone)])
                declare_messages(tx, self._message_log, now, ranges.from_numbers(gone), NO_ROOM, size)
                self._raise_alert(tx, now)
        if not last or (chosen and not gone):
            return False
        self._scanned_through[kinds] = last if len(gone) == len(chosen) else gone[-1]
        if gone:
            self._evicted_at = now.boot_s
        return True

    # --- whether anything gets through, and how fast it fills ---

    def _watch_acknowledgements(self, now: ClockReading) -> None:
        known = self._store.get_meta(retention.ACKNOWLEDGED, "")
        if self._last_acknowledgement is None or self._last_acknowledgement[0] != known:
            self._last_acknowledgement = known, now.boot_s

    def _is_stalled(self, now: ClockReading) -> bool:
        return self._last_acknowledgement is not None and now.boot_s >= self._last_acknowledgement[1] + STALLED_S

    def _sample_growth(self, now: ClockReading) -> None:
        at_s = uptime_s(self._store.get_meta(retention.UPTIME, ""), self._store.boot, now)
        if self._growth.add_sample(at_s, self.undelivered_bytes()):
            with self._store.transaction(vital=True) as tx:
                tx.set_meta(retention.GROWTH, self._growth.to_json())
                tx.set_meta(retention.UPTIME, retention.uptime_json(self._store.boot, now, at_s))

    def undelivered_bytes(self) -> int:
        """Bytes that could only go undelivered or unused: of waiting messages, and of readings nobody gets on with."""
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
                "The store is full and nothing can be delivered or used: the least important goes, each eviction is "
                "declared. Restore the connection or the task that does not run, or raise [buffer] max_size."
            )
            self._write_alert(tx, now, STORE_FULL.raised(summary, self._alert_evidence()))

    def _clear_alert(self, now: ClockReading) -> None:
        if self._store.load_state("", task_keys.STORAGE_ALERT) is None:
            return
        recently = self._evicted_at is not None and now.boot_s < self._evicted_at + _CLEAR_AFTER_S
        if not recently and self.undelivered_bytes() < self._store.limit_bytes() * _CLEAR_SHARE:
            with self._store.transaction(vital=True) as tx:
                tx.delete_state("", task_keys.STORAGE_ALERT)
                summary = "The store has room again; nothing has to go."
                self._write_alert(tx, now, STORE_FULL.cleared(summary, self._alert_evidence()))

    def _alert_evidence(self) -> dict[str, Any]:
        used, limit = self._store.used_bytes(), self._store.limit_bytes()
        return {"bytes": used, "max": limit, "hours": self.hours_until_eviction()}

    def _write_alert(self, tx: Transaction, now: ClockReading, alert: Alert) -> None:
        self._message_log.append(tx, "alerts", None, alert.to_body(), now)


def hours_until_eviction(store: Store, limit: int) -> float | None:
    """Hours until something undelivered would have to go; None where that is not in sight, or not known yet."""
    return Growth.from_json(store.get_meta(retention.GROWTH, "")).hours_until(round(limit * EVICTION_START))


def _is_protected(tx: Transaction, seq: int) -> bool:
    """Whether an audit message is never given up.

    Those that declare an eviction are folded; without the one that names a new signing key nothing after it verifies. A
    damaged one may be either: it is set aside when its turn to be sent comes.
    """
    payload = tx.outbox.payload(seq)
    return payload is None or any(
        f'"event":"{event}"'.encode() in payload for event in (EVENT, key_rotation.ROTATION_EVENT)
    )
