"""Scheduled tasks, and the runtime: what the daemon lets remote commands and rollouts change while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from outstation.device.bundles import overrides
from outstation.device.config import Config
from outstation.device.machine.schedule import Schedule
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation.clock import ClockReading


class ScheduledTask(msgspec.Struct):
    """A task and its schedule. A paused task is never due.

    `unsaved_run_us`: wall time of the last run, epoch µs, where it is not saved; `must_save` before the daemon stops.
    """

    task: LoadedTask
    schedule: Schedule
    paused: bool = False
    unsaved_run_us: int | None = None
    must_save: bool = False


class Effect(msgspec.Struct, frozen=True):
    """Outcome of a remote command: `write` joins the answer's commit; `after_commit` runs before any other write."""

    summary: str
    data: dict[str, Any] = msgspec.field(default_factory=dict)
    write: Callable[[Transaction], object] = lambda tx: None
    after_commit: Callable[[], object] = lambda: None


class Runtime(msgspec.Struct, frozen=True):
    """The running daemon, as remote commands and rollouts see it; used on the main loop only.

    `models` maps a task to the reference of its bundle.
    """

    scheduled_tasks: list[ScheduledTask]
    models: dict[str, dict[str, Any]]
    run: Callable[[ScheduledTask, ClockReading], object]
    """Process the backlog of a task."""
    report: Callable[[], object]
    """Write a health message."""
    clear_not_running_alerts: Callable[[], object]
    """Clear the alerts of tasks that did not run."""
    halt: Callable[[], object]
    """Stop the daemon."""
    reconnect: Callable[[], object]
    """Open a new connection for the outbox."""

    def replace_task(self, task: LoadedTask, schedule_task: Callable[[LoadedTask], ScheduledTask]) -> None:
        """Run `task` from now on; `schedule_task` is called if no task of this name ran."""
        scheduled = self.find(task.name)
        if scheduled is None:
            self.scheduled_tasks.append(schedule_task(task))
        else:
            scheduled.task = task
        self.models[task.name] = task.bundle_ref
        self.clear_not_running_alerts()

    def remove(self, task: str) -> None:
        """Stop running a task; its readings wait."""
        self.scheduled_tasks[:] = [scheduled for scheduled in self.scheduled_tasks if scheduled.task.name != task]
        self.models.pop(task, None)

    def find(self, task: str) -> ScheduledTask | None:
        return next((scheduled for scheduled in self.scheduled_tasks if scheduled.task.name == task), None)


def make_scheduled_task(file: str, conf: Config, store: Store, task: LoadedTask) -> ScheduledTask:
    """Return a task that did not run before, with the operator's schedule or the one in the config `file`."""
    schedule = overrides.effective_schedule(file, conf, store, task.name, None)
    return ScheduledTask(task, schedule, overrides.is_paused(store, task.name))
