"""When a task is due that did not run until now."""

from __future__ import annotations

from agent.config import Config
from agent.device.bundles import overrides
from agent.device.pipeline.batch import LoadedTask
from agent.device.pipeline.tasks import ScheduledTask
from agent.device.store.store import Store


def make_scheduled_task(file: str, conf: Config, store: Store, task: LoadedTask) -> ScheduledTask:
    """By the operator's word, or by the config of `file`."""
    due = overrides.effective_schedule(file, conf, store, task.name, None)
    return ScheduledTask(task, due, overrides.is_paused(store, task.name))
