"""Cost part of a batch: its processor time, and how many windows and rows that bought (`outstation cost`).

Only the time of a commit counts with the next batch.
"""

from __future__ import annotations

import time

from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.store import cost
from outstation.device.store.transaction import Transaction
from outstation.ml.model.inference.inference import InferenceResult


class CostPart(BatchPart):
    """Counters of one task's batches. The times are those of one thread's processor clock, ns."""

    def __init__(self, plan: TaskPlan) -> None:
        self._task, self._written_ns, self._uncounted_ns = plan.name, 0, 0

    def save(self, tx: Transaction, batch: Batch) -> None:
        self._written_ns = time.thread_time_ns()
        spent_ns = self._uncounted_ns + self._written_ns - batch.start.cpu_ns
        cost.count_batch(tx, self._task, len(batch.ends), batch.cut.consumed, spent_ns // 1000)

    def confirm(self, batch: Batch) -> None:
        self._uncounted_ns = 0

    def follow(self, batch: Batch, results: InferenceResult) -> None:
        self._uncounted_ns = time.thread_time_ns() - self._written_ns
