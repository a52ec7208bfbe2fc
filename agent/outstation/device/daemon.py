"""Daemon: the main loop. It runs batches on this thread, beside the threads of intake and uplink, until it is stopped.

A signal only sets a flag, and stopping finishes the current commit. A crash at any instruction is a normal way to stop:
the next start continues from the store.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from outstation.device.bundles import quarantine
from outstation.device.capacity.space import SpaceManager
from outstation.device.commands.executor import RemoteCommands
from outstation.device.config import Config
from outstation.device.duty import Duty
from outstation.device.health import BundleFailure, HealthReporter, interval_s
from outstation.device.intake.server import Intake
from outstation.device.machine import heap
from outstation.device.machine.systemd import notify
from outstation.device.machine.throttle import Throttle, lower_priority
from outstation.device.machine.timekeeping import Timekeeper
from outstation.device.pipeline import batch, cursor_repair, label_metrics, relearn
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.pipeline.tasks import Runtime, ScheduledTask
from outstation.device.rollout.updater import BundleUpdater
from outstation.device.samples.selection import SampledTask
from outstation.device.signals import Signals
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.uplink.uplink import Uplink
from outstation.foundation.backoff import Backoff
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import (
    BadBundle,
    ModelProcessFailed,
    StorageBusy,
    StorageError,
    StorageFull,
    UsageError,
)
from outstation.foundation.text import pluralize

log = logging.getLogger("outstation")
_SPACE_INTERVAL_S = 10.0
_LABEL_INTERVAL_S, _LABEL_RETRY_S = 5.0, 60.0
_MAX_WAIT_S = 5.0
# A task processes its backlog for this long before commands, health, the clock and the other tasks get their turn.
_TIME_SLICE_S = 1.0
# Rows of one run after which its memory is given back.
_MANY_ROWS = 20_000
_LABELS_SUFFIX = " (evaluating its labels)"
_BACKOFF = Backoff(1.0, 3600.0)


class _StopRequested(Exception):
    """Raised to stop waiting for a subprocess model while the daemon stops."""


class _Pause(msgspec.Struct, frozen=True):
    """Pause after unexpected errors in a row: its end on the boot-time clock."""

    failures: int
    until_s: float


class Notifier(Protocol):
    """Thread that notifies people of the device's alerts."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


class ReadingSender(Protocol):
    """Sends readings that wait, where the owner consents (`outstation.device.samples.sampler`)."""

    def tick(self, tasks: Iterable[SampledTask], now: ClockReading) -> int:
        """Send what is due; return the number of messages. Raises StorageError."""
        ...


class Daemon:
    """Main loop of a device. Its parts are built by `outstation.device.bootstrap.daemon`.

    `run` runs all of it. A simulation calls `begin`, then `tick` and the turns of `uplink` on one thread, and commits
    rows to `intake.group_commit`.

    `make_updater` and `make_commands` build what acts on the daemon itself. `reload_task` loads the bundle that should
    run for a task now, or raises BadBundle. The list of scheduled tasks is shared:
    tasks that rollouts or operators add appear in it.
    """

    def __init__(
        self,
        conf: Config,
        store: Store,
        message_log: MessageLog,
        scheduled_tasks: list[ScheduledTask],
        bundle_failures: Sequence[BundleFailure],
        intake: Intake,
        uplink: Uplink,
        make_updater: Callable[[Runtime, Callable[[], None]], BundleUpdater],
        make_commands: Callable[[Runtime, BundleUpdater], RemoteCommands],
        reload_task: Callable[[str], LoadedTask],
        signals: Signals,
        now: Callable[[], ClockReading],
        notifier: Notifier | None = None,
        sampler: ReadingSender | None = None,
    ) -> None:
        self.signals, self._notifier, self._sampler = signals, notifier, sampler
        self._conf, self._store, self._message_log, self._now = conf, store, message_log, now
        self._scheduled_tasks, self._bundle_failures = scheduled_tasks, bundle_failures
        models = {scheduled.task.name: scheduled.task.bundle_ref for scheduled in scheduled_tasks}
        self._health_reporter = HealthReporter(conf, store, message_log, models, now)
        self._timekeeper = Timekeeper(store, message_log)
        self.throttle = Throttle(conf.throttle)
        self._rest_until_s = float("-inf")
        self.intake, self.uplink = intake, uplink
        # Tasks whose last batch found no room.
        self._crowded: set[str] = set()
        self._stuck = {failure.task for failure in bundle_failures if not failure.fallback}
        self._unfinished: set[str] = set()
        self._rows_since_release = 0
        self._pauses: dict[str, _Pause] = {}
        self._space = SpaceManager(
            conf, store, message_log, self._run_early, self._list_stalled_tasks, lambda: self._crowded
        )
        self._reload_task = reload_task
        signals.on_model_wait = self._on_model_wait
        self._runtime = Runtime(
            self._scheduled_tasks,
            models,
            run=self._run_batches,
            report=self._health_reporter.write_health,
            clear_not_running_alerts=lambda: self._health_reporter.report_bundles([]),
            halt=self.signals.request_stop,
            reconnect=self.uplink.reconnect,
        )
        self._updater = make_updater(self._runtime, self._on_model_wait)
        self._remote_commands = make_commands(self._runtime, self._updater)
        self._health_reporter.extra_members = lambda now: {
            "throttle": self.throttle.status.to_dict(),
            "units": self._list_units(),
            **self._updater.report(now),
        }
        self._space_duty = Duty(
            lambda now: 0.0 if self._space.tick(now) else None, _SPACE_INTERVAL_S, lambda: self._needs_space()
        )
        self._duties = self._list_duties()

    def run(self) -> None:
        """Run until stopped. Raises the error that stopped intake or uplink, or StorageError."""
        self.begin()
        self.intake.start()
        self.uplink.start()
        # After intake and uplink have started: threads inherit the priority.
        lower_priority(self._conf.throttle)
        if self._notifier is not None:
            self._notifier.start()
        if not self.signals.is_stopping:
            notify("READY=1")
            streams, tasks = len(self._conf.streams), len(self._scheduled_tasks)
            log.info("running: %s, %s", pluralize(streams, "stream"), pluralize(tasks, "task"))
        while not self.signals.is_stopping:
            began = self._now()
            wait = self.tick(began)
            # Counted from the tick's own reading: what the work took must not come on top.
            self.signals.wait(max(0.0, wait - (self._now().boot_s - began.boot_s)))
            if self.signals.is_reload_requested and not self.signals.is_stopping:
                self.signals.begin_reload()
        # After an error of a config, the config before may follow.
        if self.signals.next_config is None and not isinstance(self.signals.failure, UsageError):
            notify("STOPPING=1")
        self._shut_down()
        if self.signals.failure is not None:
            raise self.signals.failure

    def begin(self) -> None:
        """Write what a start reports. Raises StorageError."""
        self._health_reporter.write_event("started", "The daemon started.")
        self._health_reporter.report_bundles(self._bundle_failures)
        self._remote_commands.start(self._now(), self.signals.wake)

    def tick(self, now: ClockReading) -> float:
        """Do the work that is due at `now`; return the seconds until more may be due."""
        wait = _MAX_WAIT_S
        for duty in self._duties:
            wait = min(wait, duty.run(now))
            if self.signals.is_stopping:
                return 0.0
        self._feed_watchdog()
        return wait

    def _list_duties(self) -> list[Duty]:
        """Return the work of the main loop, in its order."""
        return [
            Duty(lambda now: self._timekeeper.tick(now)),
            Duty(lambda now: self._wake_uplink(self._remote_commands.tick(now))),
            Duty(lambda now: self._wake_uplink(self._updater.tick(now))),
            Duty(self._run_due_tasks),
            Duty(lambda now: self._process_labels(), _LABEL_INTERVAL_S),
            Duty(self._send_samples),
            Duty(self._report_health, interval_s(self._conf)),
            self._space_duty,
        ]

    def _wake_uplink(self, has_written: object) -> None:
        if has_written:
            self.uplink.wake()

    def _send_samples(self, now: ClockReading) -> None:
        if self._sampler is not None:
            sampled = (scheduled.task.samples for scheduled in self._scheduled_tasks)
            self._wake_uplink(self._sampler.tick((task for task in sampled if task is not None), now))

    def _report_health(self, now: ClockReading) -> None:
        self._health_reporter.write_health()
        self.uplink.wake()

    def _needs_space(self) -> bool:
        """Return True if space is short, so that intake rejects rows, and nothing is evicted yet."""
        return not self._space.is_evicting and self._space.is_short()

    def _run_due_tasks(self, now: ClockReading) -> float:
        """Run the tasks that are due, if the machine is not throttled; return the seconds until more may be due."""
        wait = others_wait = min(_MAX_WAIT_S, self._updater.wait_s(now))
        throttled = self.throttle.tick(now)
        if not throttled.slow_reason:
            self._rest_until_s = float("-inf")
        # Due tasks then run once the machine has recovered, or at once if the store gets short of space.
        is_throttled = bool(throttled.pause_reason) or now.boot_s < self._rest_until_s
        busy_s = 0.0
        for scheduled in self._scheduled_tasks:
            if self.signals.is_stopping:
                return 0.0
            name = scheduled.task.name
            if scheduled.paused:
                self._unfinished.discard(name)
                continue
            if is_throttled or self._updater.rollouts.is_resuming(name):
                continue
            if self._is_backing_off(name, now):
                wait = min(wait, self._pauses[name].until_s - now.boot_s)
                continue
            busy_s += self._run_if_due(scheduled, now, is_pipelined=not throttled.slow_reason)
            wait = 0.0 if name in self._unfinished else min(wait, scheduled.schedule.wait_s(now))
        if busy_s and (rest_s := self.throttle.rest_s(busy_s)):
            # Counted from the tick's own reading: in virtual time its clock alone moves.
            self._rest_until_s = now.boot_s + busy_s + rest_s
        return wait if now.boot_s >= self._rest_until_s else min(others_wait, self._rest_until_s - now.boot_s)

    def _run_if_due(self, scheduled: ScheduledTask, now: ClockReading, is_pipelined: bool) -> float:
        """Run a task that is due, or that the last tick did not finish; return the seconds it took."""
        name = scheduled.task.name
        if scheduled.schedule.is_due(now, self._count_backlog(scheduled), scheduled.task.size.rows_to_gather):
            self._record_run(scheduled, now)
            self._unfinished.add(name)
        if name not in self._unfinished:
            return 0.0
        started_s = self._now().boot_s
        scheduled.task.lookahead.is_allowed = is_pipelined
        self._run_batches(scheduled, now)
        return self._now().boot_s - started_s

    def _feed_watchdog(self) -> None:
        """Feed the watchdog of systemd if intake and uplink are alive; called when batches have just made progress."""
        now = self._now()
        if self.intake.is_alive(now) and self.uplink.is_alive(now):
            notify("WATCHDOG=1")

    def _on_model_wait(self) -> None:
        """Feed the watchdog about once a second while a subprocess model runs. Raises _StopRequested."""
        if self.signals.is_stopping:
            raise _StopRequested
        self._feed_watchdog()

    def _run_batches(self, scheduled: ScheduledTask, now: ClockReading) -> None:
        """Run batches until the rows that wait are done or the time slice is over; the next ticks continue.

        Rows that arrive meanwhile wait for the schedule: batches of a few rows each would cost more than the rows.
        """
        name = scheduled.task.name
        self._unfinished.discard(name)
        if self._updater.rollouts.is_resuming(name):
            self._unfinished.add(name)
            return
        end_s, last_row = self._now().boot_s + _TIME_SLICE_S, self._store.last_row(scheduled.task.config.stream)
        substitute: LoadedTask | None = None
        while not self.signals.is_stopping:
            # A rollout may have replaced the task since the last batch.
            task, substitute = substitute or scheduled.task, None
            try:
                if task is scheduled.task:
                    cursor_repair.repair_cursor(task, self._store, self._message_log, self._now())
                    relearn.apply_pending(task, self._store, self._message_log, self._now())
                result = batch.run(task, self._store, self._message_log, self._now())
            except _StopRequested:
                return
            except ModelProcessFailed as failure:
                if not self._updater.rollouts.has_canary(name):
                    self._handle_model_failure(scheduled, failure)
                    return
                # The canary failed: the incumbent processes the same rows at once.
                substitute = self._updater.rollouts.on_canary_failure(name, failure, self._now())
                self._feed_watchdog()
                if substitute is None:
                    return
                continue
            except Exception as error:
                self._postpone_batch(task, error, now)
                return
            self._stuck.discard(task.name)
            self._crowded.discard(task.name)
            self._clear_backoff(task.name, "")
            if result is None:
                self._release_memory()
                return
            self._rows_since_release += result.rows
            self._updater.rollouts.on_batch_committed(name, self._now())
            self.uplink.wake()
            self._feed_watchdog()
            if result.alerts:
                log.warning("task %s: %s; see `outstation status`", task.name, pluralize(result.alerts, "alert"))
            if (self._store.cursor(name) or 0) >= last_row:
                self._release_memory()
                return
            if self._now().boot_s >= end_s:
                self._unfinished.add(task.name)
                return

    def _release_memory(self) -> None:
        if self._rows_since_release >= _MANY_ROWS and not self._unfinished:
            self._rows_since_release = 0
            heap.release_free()

    def _postpone_batch(self, task: LoadedTask, error: Exception, now: ClockReading) -> None:
        """Keep the rows of a failed batch until the task is due again. Raises StorageError if the store failed."""
        match error:
            case BadBundle():
                log.error("task %s: %s; its rows are kept, and it is retried when next due", task.name, error)
                self._stuck.add(task.name)
            case StorageBusy() | StorageFull():
                log.error("task %s: %s; it is retried when next due", task.name, error)
                if isinstance(error, StorageFull):
                    self._crowded.add(task.name)
                    self._space_duty.due_s = now.boot_s
            case StorageError():
                raise error
            case _:
                self._unfinished.add(task.name)
                self._stuck.add(task.name)
                self._back_off(task, "", error)

    def _handle_model_failure(self, scheduled: ScheduledTask, failure: ModelProcessFailed) -> None:
        """Retry later; the second crash or hang in a row quarantines the bundle, and another one runs."""
        task, name = scheduled.task, scheduled.task.name
        self._stuck.add(name)
        if failure.kind == "error":
            log.error("task %s: %s; its rows are kept, and it is retried when next due", name, failure)
            return
        try:
            task.crash.is_suspect = True
            digest = task.bundle.digest
            if quarantine.record_crash(self._conf, self._store, self._message_log, name, digest, self._now()):
                self._runtime.replace_task(self._reload_task(name), lambda _task: scheduled)
                self._unfinished.add(name)
                return
        except StorageFull as full:
            log.error("task %s: %s; the crash of its model is not counted", name, full)
        except BadBundle as problem:
            self._runtime.remove(name)
            self._health_reporter.raise_bundle_alert(BundleFailure(name, task.config.bundle, str(problem)))
            return
        self._unfinished.add(name)
        self._back_off(task, "", failure)

    def _is_backing_off(self, name: str, now: ClockReading) -> bool:
        return name in self._pauses and now.boot_s < self._pauses[name].until_s

    def _back_off(self, task: LoadedTask, suffix: str, error: Exception) -> None:
        """Pause the task for a while, longer each time, so that its error does not stop the daemon."""
        earlier = self._pauses.get(task.name + suffix)
        failures = earlier.failures + 1 if earlier else 1
        wait_s = _BACKOFF.wait_s(failures)
        self._pauses[task.name + suffix] = _Pause(failures, self._now().boot_s + wait_s)
        reason = f"{type(error).__name__}: {error}{suffix}; its readings are kept, and it is retried"
        log.error("task %s: %s in %g s", task.name, reason, wait_s, exc_info=error)
        self._health_reporter.raise_bundle_alert(BundleFailure(task.name, task.config.bundle, reason))

    def _clear_backoff(self, name: str, suffix: str) -> None:
        if self._pauses.pop(name + suffix, None) is not None:
            self._health_reporter.clear_bundle_alert(name)

    def _process_labels(self) -> float | None:
        """Evaluate the labels of all tasks; return the seconds until it is tried again if there was no room."""
        keep_s = float(self._conf.buffer.keep_results)
        for scheduled in self._scheduled_tasks:
            name = scheduled.task.name
            if self._is_backing_off(name + _LABELS_SUFFIX, self._now()):
                continue
            try:
                label_metrics.tick(scheduled.task, self._store, self._message_log, self._now(), keep_s)
                self._clear_backoff(name, _LABELS_SUFFIX)
            except (StorageBusy, StorageFull) as problem:
                # An error of one task would come for the next one, too.
                log.error("task %s: %s; labels are evaluated again in a minute", name, problem)
                return _LABEL_RETRY_S
            except StorageError:
                raise
            except Exception as error:
                self._back_off(scheduled.task, _LABELS_SUFFIX, error)
        return None

    def _run_early(self, now: ClockReading) -> bool:
        """Run all tasks out of schedule to make room; return True if any has more to do."""
        ready = [
            scheduled
            for scheduled in self._scheduled_tasks
            if not scheduled.paused and not self._is_backing_off(scheduled.task.name, now)
        ]
        is_resuming = self._updater.rollouts.is_resuming
        names = [scheduled.task.name for scheduled in ready if not is_resuming(scheduled.task.name)]
        for scheduled in ready:
            self._run_batches(scheduled, now)
        return any(name in self._unfinished and not self._is_backing_off(name, self._now()) for name in names)

    def _list_units(self) -> dict[str, list[str]]:
        """Return the units of each task's values, where its bundle names them."""
        units = ((each.task.name, each.task.bundle.manifest.output.units) for each in self._scheduled_tasks)
        return {name: texts for name, texts in units if any(texts)}

    def _list_stalled_tasks(self) -> set[str]:
        return self._stuck | {scheduled.task.name for scheduled in self._scheduled_tasks if scheduled.paused}

    def _count_backlog(self, scheduled: ScheduledTask) -> int:
        stream = scheduled.task.config.stream
        return self._store.last_row(stream) - self._store.position(scheduled.task.name, stream)

    def _record_run(self, scheduled: ScheduledTask, now: ClockReading) -> None:
        scheduled.must_save |= scheduled.schedule.record_run(now)
        if scheduled.schedule.needs_last_run:
            scheduled.unsaved_run_us = now.wall_us
        if scheduled.must_save:
            self._save_last_runs([scheduled])

    def _save_last_runs(self, scheduled_tasks: Sequence[ScheduledTask]) -> None:
        """Save the times of the last runs, so that the next start catches up once with a cron time that it missed."""
        unsaved = [scheduled for scheduled in scheduled_tasks if scheduled.unsaved_run_us is not None]
        if not unsaved:
            return
        with contextlib.suppress(StorageFull):
            with self._store.transaction() as tx:
                for scheduled in unsaved:
                    tx.save_state(scheduled.task.name, task_keys.LAST_RUN, str(scheduled.unsaved_run_us).encode())
            for scheduled in unsaved:
                scheduled.unsaved_run_us, scheduled.must_save = None, False

    def _shut_down(self) -> None:
        self.intake.stop()
        if self._notifier is not None:
            self._notifier.stop()
        if isinstance(self.signals.failure, StorageError):
            self._updater.abort()
            self.uplink.stop(0.0)
            return
        self._updater.stop(self._now())
        # Another config may have another schedule, for which the very last run counts.
        self._save_last_runs(self._scheduled_tasks)
        self._health_reporter.write_health()
        is_reload = self.signals.next_config is not None
        summary = "The daemon stopped to reload its config." if is_reload else "The daemon was stopped."
        self._health_reporter.write_event("stopped", summary)
        if self._remote_commands.is_wipe_requested:
            self.uplink.wake()
            self._remote_commands.wait_for_wipe(self._now, time.sleep)
        self.uplink.stop()
        if self._remote_commands.is_wipe_requested:
            self._store.close()
            self._remote_commands.erase()
