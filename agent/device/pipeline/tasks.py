"""The running device as its operators' commands see it: what the daemon hands over to be changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from agent.clock import ClockReading
from agent.device.machine.schedule import Schedule
from agent.device.pipeline.batch import LoadedTask


class ScheduledTask(msgspec.Struct):
    """A task and when it is due. Paused, it is not, until an operator resumes it."""

    task: LoadedTask
    schedule: Schedule
    paused: bool = False


class Runtime(msgspec.Struct, frozen=True):
    """`planned` and `models` (task → its model) are the daemon's own, and may be changed on the main loop."""

    scheduled_tasks: list[ScheduledTask]
    models: dict[str, dict[str, Any]]
    run: Callable[[ScheduledTask, ClockReading], object]
    """Work a task off."""
    report: Callable[[], object]
    """Write a health message."""
    clear_not_running_alerts: Callable[[], object]
    """Clear the alerts of tasks that did not run."""
    halt: Callable[[], object]
    reconnect: Callable[[], object]
    """Connect to the broker anew."""

    def replace_task(self, task: LoadedTask, schedule_task: Callable[[LoadedTask], ScheduledTask]) -> None:
        """Run `task` from now on; `plan` says when, of one that did not run."""
        planned = self.find(task.name)
        if planned is None:
            self.scheduled_tasks.append(schedule_task(task))
        else:
            planned.task = task
        self.models[task.name] = task.bundle_ref
        self.clear_not_running_alerts()

    def remove(self, task: str) -> None:
        """It does not run any more; its readings wait."""
        self.scheduled_tasks[:] = [one for one in self.scheduled_tasks if one.task.name != task]
        self.models.pop(task, None)

    def find(self, task: str) -> ScheduledTask | None:
        return next((one for one in self.scheduled_tasks if one.task.name == task), None)
