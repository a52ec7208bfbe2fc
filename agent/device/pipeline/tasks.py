"""The running device as its operators' commands see it: what the daemon hands over to be changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from agent.clock import Now
from agent.device.machine.schedule import Schedule
from agent.device.pipeline.batch import Task


class Planned(msgspec.Struct):
    """A task and when it is due. Paused, it is not, until an operator resumes it."""

    task: Task
    schedule: Schedule
    paused: bool = False


class Machine(msgspec.Struct, frozen=True):
    """`planned` and `models` (task → its model) are the daemon's own, and may be changed on the main loop."""

    planned: list[Planned]
    models: dict[str, dict[str, Any]]
    run: Callable[[Planned, Now], object]
    """Work a task off."""
    report: Callable[[], object]
    """Write a health message."""
    runs_again: Callable[[], object]
    """Clear the alerts of tasks that did not run."""
    halt: Callable[[], object]
    renew: Callable[[], object]
    """Connect to the broker anew."""

    def exchange(self, task: Task, plan: Callable[[Task], Planned]) -> None:
        """Run `task` from now on; `plan` says when, of one that did not run."""
        planned = self.find(task.name)
        if planned is None:
            self.planned.append(plan(task))
        else:
            planned.task = task
        self.models[task.name] = task.reference
        self.runs_again()

    def remove(self, task: str) -> None:
        """It does not run any more; its readings wait."""
        self.planned[:] = [one for one in self.planned if one.task.name != task]
        self.models.pop(task, None)

    def find(self, task: str) -> Planned | None:
        return next((one for one in self.planned if one.task.name == task), None)
