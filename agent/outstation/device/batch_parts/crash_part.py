"""Crash part of a batch: a marker while the model runs, and the end of a suspicion once a batch is committed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.store import task_keys
from outstation.device.store.transaction import Transaction


class CrashPart(BatchPart):
    """Crash detection of one task: `guard` surrounds each run of the model.

    `is_suspect`: the daemon, or the model's process, ended during the model's last run.
    """

    def __init__(
        self,
        plan: TaskPlan,
        guard: Callable[[], AbstractContextManager[object]] = nullcontext,
        *,
        is_suspect: bool = False,
    ) -> None:
        self._task, self.guard, self.is_suspect = plan.name, guard, is_suspect

    def save(self, tx: Transaction, batch: Batch) -> None:
        if self.is_suspect:
            tx.delete_state(self._task, task_keys.CRASH_COUNT)

    def confirm(self, batch: Batch) -> None:
        self.is_suspect = False
