"""When a task is due that did not run until now."""

from __future__ import annotations

from agent.config import Config
from agent.device.bundles import overrides
from agent.device.pipeline.batch import Task
from agent.device.pipeline.tasks import Planned
from agent.device.store.store import Store


def planned(file: str, conf: Config, store: Store, task: Task) -> Planned:
    """By the operator's word, or by the config of `file`."""
    due = overrides.schedule_in_force(file, conf, store, task.name, None)
    return Planned(task, due, overrides.is_paused(store, task.name))
