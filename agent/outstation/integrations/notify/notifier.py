"""Notifier: the thread that follows alerts, plans the message to each target, and has it sent.

It runs beside ingest, with a database connection of its own. Each turn commits what was planned before anything is
sent, so a message that was sent but not marked, because the process was killed between the two, is sent again with the
same key.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import msgspec
from msgspec.structs import replace

from outstation.foundation.errors import StorageError
from outstation.integrations.notify import message as messages
from outstation.integrations.notify import planner
from outstation.integrations.notify import queue as store
from outstation.integrations.notify.alert_source import AlertSource
from outstation.integrations.notify.config import MqttTarget, NotifyConfig
from outstation.integrations.notify.delivery import MAX_DELAY_S, backoff_s
from outstation.integrations.notify.message import Change, Notification
from outstation.integrations.notify.planner import find_delivery, is_quiet, last_digest_s
from outstation.integrations.notify.queue import LedgerEntry, LedgerKey, QueueDatabase, TargetState
from outstation.integrations.notify.sending import Outcome, TargetWorker
from outstation.protocol.alerts.incident import Incident

logger = logging.getLogger("outstation.notify")

TURN_S = 1.0
# How often all alerts are compared with the ledger: for reminders, ended mutes, and what changed without a message.
REVIEW_S = 30.0
MAX_WAITING = 20
MAX_REJECTIONS = 3
# A target that has failed for so long is an alert of its own.
DEAD_AFTER_S = 600.0
STOP_TIMEOUT_S = 2.0
_RETRY_S = 10.0

D = TypeVar("D", bound=QueueDatabase)


class Notifier:
    """`tick` does one turn; `NotifierThread` calls it. The only writer of the tables, of which it has a copy."""

    def __init__(
        self,
        config: NotifyConfig,
        database: QueueDatabase,
        source: AlertSource,
        *,
        now_s: Callable[[], float] = time.time,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._database, self._source, self._now_s = config, database, source, now_s
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._workers = {
            name: TargetWorker(name, target, self._outcomes, wake) for name, target in config.targets.items()
        }
        self._alerts: dict[str, Incident] = {}
        self._next_review_s = float("-inf")
        self._is_loaded = False
        self._cursor: int | None = None
        self._ledger: dict[LedgerKey, LedgerEntry] = {}
        self._targets: dict[str, TargetState] = {}
        self._waiting: dict[str, int] = {}

    def tick(self) -> None:
        """Take outcomes, plan, and start what is due. Raises StorageError; the next turn then does it again."""
        now_s = self._now_s()
        if not self._is_loaded:
            self._load()
        try:
            self._take_outcomes(now_s)
            self._plan(now_s)
            self._start_sending(now_s)
        except StorageError:
            self._is_loaded = False
            raise

    def stop(self) -> None:
        """Take the outcomes of what is being sent, for a moment; what is not done by then is sent again later."""
        end = time.monotonic() + STOP_TIMEOUT_S
        while any(worker.is_busy for worker in self._workers.values()) and time.monotonic() < end:
            time.sleep(0.02)
            with contextlib.suppress(StorageError):
                self._take_outcomes(self._now_s())
        for worker in self._workers.values():
            worker.stop()

    def _load(self) -> None:
        """Read the tables, and forget targets that the config no longer names."""
        with self._database.snapshot() as db:
            states, ledger = store.load_targets(db), store.load_ledger(db)
        removed = {*states, *(target for target, _ in ledger)} - {*self._config.targets}
        for target in removed & states.keys():
            if states[target].is_reported:
                self._source.report_target(target, None)
        with self._database.transaction() as db:
            for target in removed:
                store.drop_target(db, target)
            self._cursor = store.load_cursor(db)
            self._waiting = {name: count for name, (count, _) in store.count_waiting(db).items()}
        self._ledger = {key: entry for key, entry in ledger.items() if key[0] in self._config.targets}
        self._targets = {name: states.get(name) or TargetState(name) for name in self._config.targets}
        self._next_review_s = float("-inf")
        self._is_loaded = True

    def _plan(self, now_s: float) -> None:
        """Plan the messages to all targets from the alerts, and commit them together with the cursor."""
        # Reading first: a transaction would keep ingest waiting.
        cursor, changed = self._source.changed(self._cursor)
        # A clock that was set back must not stop reviews.
        is_review = not self._next_review_s - 2 * REVIEW_S <= now_s < self._next_review_s
        if is_review:
            self._next_review_s = now_s + REVIEW_S
            opened = {alert.key_text: alert for alert in self._source.open_alerts()}
            others = {alert for _, alert in self._ledger} - opened.keys()
            # What changed is newer.
            self._alerts = {**self._source.load(others), **opened}
            changed = [*self._alerts.values(), *changed]
        current = {alert.key_text: alert for alert in changed}
        self._alerts |= current
        writes = _Writes()
        if is_review:
            writes.entries |= dict.fromkeys(key for key in self._ledger if key[1] not in self._alerts)
        self._update_ledger(writes, current, now_s)
        for name, target in self._config.targets.items():
            if isinstance(target, MqttTarget):
                if changed or is_review:
                    self._compose_open(writes, self._targets[name], now_s)
            elif self._waiting.get(name, 0) < MAX_WAITING:
                self._compose(writes, self._targets[name], now_s)
        self._commit(writes, cursor)

    def _update_ledger(self, writes: _Writes, alerts: Mapping[str, Incident], now_s: float) -> None:
        for target in self._config.targets:
            for alert in alerts.values():
                key = (target, alert.key_text)
                before = self._ledger.get(key)
                delivery = find_delivery(self._config, self._source.sender, target, alert)
                after = None if delivery is None else planner.update_entry(before, target, alert, delivery, now_s)
                if after != before:
                    writes.entries[key] = after

    def _compose(self, writes: _Writes, state: TargetState, now_s: float) -> None:
        ledger = {**self._ledger, **writes.entries}
        pending = [entry for key, entry in ledger.items() if key[0] == state.target and entry and entry.pending]
        if not pending:
            return
        deliveries = {
            entry.alert: delivery
            for entry in pending
            if (alert := self._alerts.get(entry.alert)) is not None
            and (delivery := find_delivery(self._config, self._source.sender, state.target, alert)) is not None
        }
        at_once, digest = planner.select_ready(
            pending,
            deliveries,
            now_s=now_s,
            is_quiet=is_quiet(self._config, now_s),
            digest_s=last_digest_s(self._config, now_s),
            may_compose=not now_s - self._config.group_for < state.composed_at <= now_s,
        )
        for changes in planner.group_changes([self._change(entry) for entry in at_once]):
            self._enqueue(writes, state.target, changes, now_s, is_digest=False)
        if digest:
            self._enqueue(writes, state.target, [self._change(entry) for entry in digest], now_s, is_digest=True)
        if at_once:
            writes.targets[state.target] = replace(state, composed_at=now_s)
        for entry in (*at_once, *digest):
            notified = planner.mark_notified(entry, self._alerts[entry.alert], now_s)
            writes.entries[entry.target, entry.alert] = notified

    def _change(self, entry: LedgerEntry) -> Change:
        assert entry.pending is not None
        return Change(self._alerts[entry.alert], entry.pending, entry.reminders)

    def _enqueue(self, writes: _Writes, target: str, changes: list[Change], now_s: float, *, is_digest: bool) -> None:
        names = {"sender": self._source.sender, "fleet": self._source.fleet}
        zone = self._config.zone
        composed = messages.compose(target, changes, **names, zone=zone, now_s=now_s, is_digest=is_digest)
        writes.messages.append((target, composed, now_s))

    def _compose_open(self, writes: _Writes, state: TargetState, now_s: float) -> None:
        """Compose the retained document anew if it would say something else; it replaces one that waits."""
        open_alerts = [alert for alert in self._alerts.values() if alert.is_open]
        names = {"sender": self._source.sender, "fleet": self._source.fleet}
        composed = messages.compose_open(open_alerts, **names, now_s=now_s)
        if composed.key == state.state or self._workers[state.target].is_busy:
            return
        writes.replaced.add(state.target)
        writes.messages.append((state.target, composed, now_s))
        writes.targets[state.target] = replace(state, state=composed.key)

    def _commit(self, writes: _Writes, cursor: int) -> None:
        if not (writes.entries or writes.messages or writes.targets or cursor != self._cursor):
            return
        with self._database.transaction() as db:
            store.save_entries(db, [entry for entry in writes.entries.values() if entry is not None])
            store.delete_entries(db, [key for key, entry in writes.entries.items() if entry is None])
            for target in writes.replaced:
                store.clear_queue(db, target)
            for target, message, now_s in writes.messages:
                store.add_message(db, target, message.key, messages.encode(message), now_s)
            for state in writes.targets.values():
                store.save_target(db, state)
            store.save_cursor(db, cursor)
        self._cursor = cursor
        self._targets |= writes.targets
        self._waiting |= dict.fromkeys(writes.replaced, 0)
        for target, *_ in writes.messages:
            self._waiting[target] = self._waiting.get(target, 0) + 1
        for key, entry in writes.entries.items():
            if entry is None:
                self._ledger.pop(key, None)
            else:
                self._ledger[key] = entry

    def _start_sending(self, now_s: float) -> None:
        for name, worker in self._workers.items():
            next_at = self._targets[name].next_at
            # A clock that was set back must not silence a target for longer than the longest back-off.
            is_waiting = now_s < next_at <= now_s + MAX_DELAY_S
            if worker.is_busy or is_waiting or not self._waiting.get(name):
                continue
            with self._database.snapshot() as db:
                message = store.next_message(db, name)
            if message is not None:
                worker.start(message)

    def _take_outcomes(self, now_s: float) -> None:
        while not self._outcomes.empty():
            outcome = self._outcomes.get()
            try:
                self._record(outcome, now_s)
            except StorageError:
                # Not marked: the worker stays busy, so that nothing else is sent to this target before it is.
                self._outcomes.put(outcome)
                raise
            self._workers[outcome.message.target].is_busy = False

    def _record(self, outcome: Outcome, now_s: float) -> None:
        """Store the outcome, and raise or clear the alert about the target."""
        message, failure = outcome.message, outcome.failure
        state = replace(self._targets[message.target])
        was_reported, is_done = state.is_reported, failure is None
        if failure is None:
            state.failures, state.failing_since, state.error, state.is_reported = 0, None, None, False
            state.next_at, state.sent, state.sent_at = 0.0, state.sent + 1, now_s
        else:
            state.failures += 1
            state.failing_since = now_s if state.failing_since is None else min(state.failing_since, now_s)
            state.error, state.next_at = str(failure), now_s + backoff_s(state.failures, failure.retry_after_s)
            state.is_reported = was_reported or now_s - state.failing_since >= DEAD_AFTER_S
            if failure.is_rejected and message.attempts + 1 >= MAX_REJECTIONS:
                # It would keep all later ones from being sent.
                state.rejected += 1
                is_done = True
        if state.is_reported != was_reported:
            # First: killed between the two, an alert is raised or cleared twice, and never forgotten.
            problem = f"Notifications to {message.target} fail: {failure}." if state.is_reported else None
            self._source.report_target(message.target, problem)
        with self._database.transaction() as db:
            if is_done:
                store.delete_message(db, message)
            else:
                store.count_attempt(db, message)
            store.save_target(db, state)
        self._targets[message.target] = state
        self._waiting[message.target] -= is_done
        if failure is not None and (state.failures == 1 or state.is_reported != was_reported):
            logger.warning("notifications to %s fail: %s; trying again", message.target, failure)


class _Writes(msgspec.Struct):
    """Changes that one turn commits; an entry that is None is deleted."""

    entries: dict[LedgerKey, LedgerEntry | None] = msgspec.field(default_factory=dict)
    messages: list[tuple[str, Notification, float]] = msgspec.field(default_factory=list)
    targets: dict[str, TargetState] = msgspec.field(default_factory=dict)
    replaced: set[str] = msgspec.field(default_factory=set)


class NotifierThread(Generic[D]):
    """Runs a notifier beside ingest until `stop`; it raises nothing, and opens its database again after a failure."""

    def __init__(
        self,
        config: NotifyConfig,
        open_database: Callable[[], AbstractContextManager[tuple[D, AlertSource]]],
        may_run: Callable[[D], bool] = lambda _: True,
    ) -> None:
        """`may_run`: whether this process is the one that notifies, of several with the same database."""
        self._config, self._open_database, self._may_run = config, open_database, may_run
        self._wake = threading.Event()
        self._is_stopping = self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self._wake.set()
        self._thread.join(2 * STOP_TIMEOUT_S)

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                with self._open_database() as (database, source):
                    self._notify(database, source)
            except Exception as error:
                if not self._is_failing:
                    logger.error(
                        "notifications pause: %s; trying again", error, exc_info=not isinstance(error, StorageError)
                    )
                self._is_failing = True
                self._pause(_RETRY_S)

    def _notify(self, database: D, source: AlertSource) -> None:
        while not self._may_run(database):
            if self._pause(_RETRY_S):
                return
        notifier = Notifier(self._config, database, source, wake=self._wake.set)
        try:
            while not self._is_stopping:
                notifier.tick()
                if self._is_failing:
                    self._is_failing = False
                    logger.info("notifications go on")
                self._pause(TURN_S)
        finally:
            notifier.stop()

    def _pause(self, seconds: float) -> bool:
        """Wait until something happens; return True if the thread is to end."""
        self._wake.wait(seconds)
        self._wake.clear()
        return self._is_stopping
