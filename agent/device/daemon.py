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
from typing import Any

import msgspec

from agent.clock import Now
from agent.config import Config
from agent.device.commands.operations import Operations
from agent.device.health import Broken, Reports
from agent.device.intake.server import Intake
from agent.device.machine.systemd import notify
from agent.device.machine.throttle import Care, step_back
from agent.device.machine.timekeeping import Timekeeper
from agent.device.pipeline import batch, cursor_repair, label_metrics, relearn
from agent.device.pipeline.tasks import Machine, Planned
from agent.device.rollout.updater import Updating
from agent.device.store.message_log import Author
from agent.device.store.space import Space
from agent.device.store.store import Store
from agent.device.uplink.uplink import Uplink
from agent.errors import BadBundle, ModelDied, StorageBusy, StorageError, StorageFull

log = logging.getLogger("outstation")

LAST_RUN = "last run"
_HEALTH_S = 60.0
_ROOM_S = 10.0
_LABELS_S = 5.0
_LONGEST_WAIT_S = 5.0
# So long a task works off its backlog before commands, health, the clock and the other tasks have their turn.
_SLICE_S = 1.0
_OF_LABELS = " (of its labels)"
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 3600.0


class Signals(msgspec.Struct):
    """What other threads and signal handlers tell the main loop."""

    stopping: bool = False
    failure: Exception | None = None
    # No Event: a handler that runs while its own thread is inside one can deadlock on the Event's lock.
    _woken: queue.SimpleQueue[None] = msgspec.field(default_factory=queue.SimpleQueue)

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


class _Stopping(Exception):
    """The agent is to stop, and a model that runs apart is not waited for."""


class _Rest(msgspec.Struct, frozen=True):
    """Of a task that met an error nobody foresaw: how long, and until when on the boot-time clock."""

    wait_s: float
    until_s: float


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
        make_updating: Callable[[Machine, Callable[[], None], Callable[[], None]], Updating],
        make_operations: Callable[[Machine, Updating], Operations],
        now: Callable[[], Now],
    ) -> None:
        self.signals = Signals()
        self._conf, self._store, self._author, self._now = conf, store, author, now
        self._planned, self._broken = list(planned), broken
        models = {p.task.name: p.task.reference for p in planned}
        self._reports = Reports(conf, store, author, models, now)
        self._timekeeper = Timekeeper(store, author)
        self._care = Care(conf.care)
        self._intake = make_intake(self.signals.wake, self.signals.fail)
        self._uplink = make_uplink(self.signals.fail)
        self._stuck = {one.task for one in broken if not one.instead}
        self._unfinished: set[str] = set()
        self._resting: dict[str, _Rest] = {}
        self._space = Space(conf, store, author, self._run_early, self._not_getting_on)
        machine = self._machine(models)
        self._updating = make_updating(machine, self.signals.wake, self._wait_for_model)
        self._operations = make_operations(machine, self._updating)
        self._reports.more = lambda now: {"care": self._care.condition.shown(), **self._updating.report(now)}
        self._next_health = self._next_room = self._next_labels = 0.0

    def run(self) -> None:
        """Until stopped. Raises what made going on impossible."""
        self._reports.event("started", "The agent started.")
        self._reports.bundles(self._broken)
        self._operations.start(self._now(), self.signals.wake)
        self._intake.start()
        self._uplink.start()
        # Threads that start later inherit it.
        step_back(self._conf.care)
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
        if self._updating.turn(now):
            self._uplink.wake()
        wait = min(_LONGEST_WAIT_S, self._updating.wait_s(now))
        resting = self._care.turn(now).resting
        for planned in self._planned:
            if self.signals.stopping:
                return 0.0
            name = planned.task.name
            if planned.paused:
                self._unfinished.discard(name)
                continue
            if resting:
                # What was due runs when the machine has recovered; where the store gets short, at once.
                continue
            if self._updating.resumes(name):
                continue
            if self._rests(name, now):
                wait = min(wait, self._resting[name].until_s - now.boot_s)
                continue
            if planned.schedule.due(now, self._backlog(planned)):
                planned.schedule.ran(now)
                self._remember_run(planned, now)
                self._unfinished.add(name)
            if name in self._unfinished:
                self._work_off(planned, now)
            wait = 0.0 if name in self._unfinished else min(wait, planned.schedule.wait_s(now))
        if now.boot_s >= self._next_labels:
            self._next_labels = now.boot_s + _LABELS_S
            self._look_at_labels()
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

    def _wait_for_model(self) -> None:
        """About once a second while one that runs apart is at work: that is no reason for the watchdog."""
        if self.signals.stopping:
            raise _Stopping
        self._feed_watchdog()

    def _work_off(self, planned: Planned, now: Now) -> None:
        """Batches until nothing more can be consumed, or for a while: then the next turns go on."""
        name = planned.task.name
        self._unfinished.discard(name)
        if self._updating.resumes(name):
            self._unfinished.add(name)
            return
        end_s = self._now().boot_s + _SLICE_S
        instead: batch.Task | None = None
        while not self.signals.stopping:
            # Another bundle may have come to run since the last batch.
            task, instead = instead or planned.task, None
            try:
                if task is planned.task:
                    cursor_repair.go_on(task, self._store, self._author, self._now())
                    relearn.take_up(task, self._store, self._author, self._now())
                done = batch.run(task, self._store, self._author, self._now())
            except _Stopping:
                return
            except ModelDied as died:
                # One that runs apart: the same rows are answered by another bundle, at once.
                instead = self._updating.fell(name, died, self._now())
                self._feed_watchdog()
                if instead is None:
                    return
                continue
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
            except StorageError:
                raise
            except Exception as error:
                self._unfinished.add(task.name)
                self._stuck.add(task.name)
                self._rest(task, "", error)
                return
            self._stuck.discard(task.name)
            self._recovered(task.name, "")
            if done is None:
                return
            self._updating.ran(name, self._now())
            self._uplink.wake()
            self._feed_watchdog()
            if done.alerts:
                log.warning("task %s: %d alerts; see `outstation status`", task.name, done.alerts)
            if self._now().boot_s >= end_s:
                self._unfinished.add(task.name)
                return

    def _rests(self, name: str, now: Now) -> bool:
        return name in self._resting and now.boot_s < self._resting[name].until_s

    def _rest(self, task: batch.Task, what: str, error: Exception) -> None:
        """Leave the task alone for a while, longer each time: it must not take the daemon and the others down."""
        earlier = self._resting.get(task.name + what)
        wait_s = min(2 * earlier.wait_s, _LONGEST_REST_S) if earlier else _FIRST_REST_S
        self._resting[task.name + what] = _Rest(wait_s, self._now().boot_s + wait_s)
        reason = f"{type(error).__name__}: {error}{what}; its readings are kept and it is tried again"
        log.error("task %s: %s in %g s", task.name, reason, wait_s, exc_info=error)
        self._reports.fails(Broken(task.name, task.config.bundle, reason))

    def _recovered(self, name: str, what: str) -> None:
        if self._resting.pop(name + what, None) is not None:
            self._reports.works(name)

    def _look_at_labels(self) -> None:
        keep_s = float(self._conf.buffer.keep_results)
        for planned in self._planned:
            name = planned.task.name
            if self._rests(name + _OF_LABELS, self._now()):
                continue
            try:
                label_metrics.turn(planned.task, self._store, self._author, self._now(), keep_s)
                self._recovered(name, _OF_LABELS)
            except (StorageBusy, StorageFull) as problem:
                log.error("task %s: %s; its labels are looked at again soon", name, problem)
            except StorageError:
                raise
            except Exception as error:
                self._rest(planned.task, _OF_LABELS, error)

    def _run_early(self, now: Now) -> bool:
        ready = [one for one in self._planned if not one.paused and not self._rests(one.task.name, now)]
        names = [one.task.name for one in ready if not self._updating.resumes(one.task.name)]
        for one in ready:
            self._work_off(one, now)
        return any(name in self._unfinished and not self._rests(name, self._now()) for name in names)

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
            run=self._work_off,
            report=self._reports.health,
            runs_again=lambda: self._reports.bundles([]),
            halt=self.signals.halt,
            renew=self._uplink.renew,
        )

    def _shut_down(self) -> None:
        self._intake.stop()
        if isinstance(self.signals.failure, StorageError):
            self._updating.drop()
            self._uplink.stop(0.0)
            return
        self._updating.stop(self._now())
        self._reports.health()
        self._reports.event("stopped", "The agent was stopped.")
        if self._operations.wiping:
            self._uplink.wake()
            self._operations.wait_for_wipe(self._now, time.sleep)
        self._uplink.stop()
        if self._operations.wiping:
            self._store.close()
            self._operations.erase()
