"""The daemon: intake and uplink on their threads, batches on this one, until it is told to stop.

A signal only sets a flag. Stopping finishes the commit in hand. A crash at any instruction is a normal way to stop:
start-up reads the store and goes on.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.clock import Now
from agent.config import Config
from agent.device import batch
from agent.device.author import Author
from agent.device.incoming.intake import Intake
from agent.device.notify import notify
from agent.device.operating.machine import Machine, Planned
from agent.device.operating.operations import Operations
from agent.device.outgoing.uplink import Uplink
from agent.device.reports import Broken, Reports
from agent.device.storage.space import Space
from agent.device.storage.store import Store
from agent.device.timekeeping import Timekeeper
from agent.errors import BadBundle, StorageBusy, StorageError, StorageFull

log = logging.getLogger("outstation")

LAST_RUN = "last run"
_HEALTH_S = 60.0
_ROOM_S = 10.0
_LONGEST_WAIT_S = 5.0


@dataclass
class Signals:
    """What other threads and signal handlers tell the main loop."""

    stopping: bool = False
    failure: Exception | None = None
    # No Event: a handler that runs while its own thread is inside one can deadlock on the Event's lock.
    _woken: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)

    def wake(self) -> None:
        if self._woken.empty():
            self._woken.put(None)

    def wait(self, timeout_s: float) -> None:
        """Until the next `wake`, or one since the last `wait`; at most `timeout_s`."""
        with contextlib.suppress(queue.Empty):
            self._woken.get(timeout=max(0.0, timeout_s))

    def fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self.halt()

    def halt(self) -> None:
        self.stopping = True
        self.wake()


class Daemon:
    """Owns the loop. Everything it works with is handed in."""

    def __init__(
        self,
        conf: Config,
        store: Store,
        author: Author,
        planned: Sequence[Planned],
        broken: Sequence[Broken],
        make_intake: Callable[[Callable[[], None], Callable[[Exception], None]], Intake],
        make_uplink: Callable[[Callable[[Exception], None]], Uplink],
        make_operations: Callable[[Machine], Operations],
        now: Callable[[], Now],
    ) -> None:
        self.signals = Signals()
        self._conf, self._store, self._author, self._now = conf, store, author, now
        self._planned, self._broken = list(planned), broken
        models = {p.task.name: p.task.reference for p in planned}
        self._reports = Reports(conf, store, author, models, now)
        self._timekeeper = Timekeeper(store, author)
        self._intake = make_intake(self.signals.wake, self.signals.fail)
        self._uplink = make_uplink(self.signals.fail)
        self._stuck = {one.task for one in broken}
        self._space = Space(conf, store, author, self._run_early, self._not_getting_on)
        self._operations = make_operations(self._machine(models))
        self._next_health = self._next_room = 0.0

    def run(self) -> None:
        """Until stopped. Raises what made going on impossible."""
        self._reports.event("started", "The agent started.")
        self._reports.bundles(self._broken)
        self._operations.start(self._now(), self.signals.wake)
        self._intake.start()
        self._uplink.start()
        if not self.signals.stopping:
            notify("READY=1")
            log.info("running: %d streams, %d tasks", len(self._conf.streams), len(self._planned))
        while not self.signals.stopping:
            self.signals.wait(self.turn(self._now()))
        notify("STOPPING=1")
        self._shut_down()
        if self.signals.failure is not None:
            raise self.signals.failure

    def turn(self, now: Now) -> float:
        """Do what is due at `now`; how many seconds until something may be again."""
        self._timekeeper.turn(now)
        if self._operations.turn(now):
            self._uplink.wake()
        wait = _LONGEST_WAIT_S
        for planned in self._planned:
            if self.signals.stopping:
                return 0.0
            if planned.paused:
                continue
            if planned.schedule.due(now, self._backlog(planned)):
                planned.schedule.ran(now)
                self._remember_run(planned, now)
                self._work_off(planned.task, now)
            wait = min(wait, planned.schedule.wait_s(now))
        if now.boot_s >= self._next_health:
            self._next_health = now.boot_s + _HEALTH_S
            self._reports.health()
            self._uplink.wake()
        # Where it is short, producers are turned away meanwhile.
        if now.boot_s >= self._next_room or (not self._space.clearing and self._space.is_short()):
            more = self._space.turn(now)
            self._next_room = now.boot_s + (0.0 if more else _ROOM_S)
            wait = 0.0 if more else wait
        self._feed_watchdog()
        return wait

    def _feed_watchdog(self) -> None:
        """Called where the batches have just proved that they get on; intake and uplink must have as well."""
        now = self._now()
        if self._intake.alive(now) and self._uplink.alive(now):
            notify("WATCHDOG=1")

    def _work_off(self, task: batch.Task, now: Now) -> None:
        """Batches until nothing more can be consumed."""
        while not self.signals.stopping:
            try:
                done = batch.run(task, self._store, self._author, self._now())
            except BadBundle as problem:
                log.error("task %s: %s; its rows are kept and it is tried again when next due", task.name, problem)
                self._stuck.add(task.name)
                return
            except StorageBusy as busy:
                log.error("task %s: %s; tried again when next due", task.name, busy)
                return
            except StorageFull as full:
                log.error("task %s: %s; tried again when next due", task.name, full)
                self._next_room = now.boot_s
                return
            self._stuck.discard(task.name)
            if done is None:
                return
            self._uplink.wake()
            self._feed_watchdog()
            if done.alerts:
                log.warning("task %s: %d alerts; see `outstation status`", task.name, done.alerts)

    def _run_early(self, now: Now) -> None:
        for planned in self._planned:
            if not planned.paused:
                self._work_off(planned.task, now)

    def _not_getting_on(self) -> set[str]:
        return self._stuck | {planned.task.name for planned in self._planned if planned.paused}

    def _backlog(self, planned: Planned) -> int:
        stream = planned.task.config.stream
        cursor = self._store.cursor(planned.task.name)
        used = self._store.first_row(stream) - 1 if cursor is None else cursor
        return self._store.last_row(stream) - used

    def _remember_run(self, planned: Planned, now: Now) -> None:
        """So that a cron time missed while the agent was off is caught up with, once."""
        if not planned.schedule.remembers:
            return
        with contextlib.suppress(StorageFull), self._store.transaction() as tx:
            tx.keep(planned.task.name, LAST_RUN, str(now.wall_us).encode())

    def _machine(self, models: dict[str, dict[str, Any]]) -> Machine:
        return Machine(
            self._planned,
            models,
            run=lambda planned, now: self._work_off(planned.task, now),
            report=self._reports.health,
            runs_again=lambda: self._reports.bundles([]),
            halt=self.signals.halt,
            renew=self._uplink.renew,
        )

    def _shut_down(self) -> None:
        self._intake.stop()
        if isinstance(self.signals.failure, StorageError):
            self._uplink.stop(0.0)
            return
        self._reports.health()
        self._reports.event("stopped", "The agent was stopped.")
        if self._operations.wiping:
            self._uplink.wake()
            self._operations.wait_for_wipe(self._now, time.sleep)
        self._uplink.stop()
        if self._operations.wiping:
            self._store.close()
            self._operations.erase()
