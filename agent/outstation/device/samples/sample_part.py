"""Sample part of a batch: the readings around alerts and uncertain results that wait to be sent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.samples import requests
from outstation.device.samples.requests import SampleRequest
from outstation.device.samples.selection import SampledTask
from outstation.device.store.message_log import PendingMessage
from outstation.device.store.transaction import Transaction
from outstation.ml.model.inference.inference import InferenceResult


class SamplePart(BatchPart):
    """Sample requests of one task, of which its owner consents that readings leave the device."""

    def __init__(self, task: SampledTask) -> None:
        self._task = task
        self._requests: Sequence[SampleRequest] = ()

    def compute(self, batch: Batch, results: InferenceResult) -> Iterable[PendingMessage]:
        self._requests = self._select(batch, results) if len(results.scores) else ()
        return ()

    def save(self, tx: Transaction, batch: Batch) -> None:
        if self._requests:
            requests.add(tx, self._task.name, self._requests)

    def _select(self, batch: Batch, results: InferenceResult) -> Sequence[SampleRequest]:
        ends, name = batch.ends + batch.rows.first, self._task.name
        raised = [change.alert for change in batch.result_alerts if change.alert.state == "raised"]
        alerts = [(int(alert.evidence["row"]), alert) for alert in raised]
        # Around the last result of a drift window.
        last_results = np.searchsorted(ends, [window.rows[1] for window in batch.drift_windows], side="right") - 1
        for index, window in zip(last_results.tolist(), batch.drift_windows, strict=True):
            alerts += [(int(ends[max(0, index)]), alert) for alert in window.alerts if alert.state == "raised"]
        subjects = [(row, f"{name}/{alert.id}") for row, alert in alerts]
        return self._task.select(ends, results.scores.score, subjects, batch.message_log.least_count(name))
