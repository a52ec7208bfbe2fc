"""Label part of a batch: the predictions that are stored for labels, which arrive later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.store.message_log import PendingMessage
from outstation.device.store.predictions import StoredPredictions, output_key
from outstation.device.store.transaction import Transaction
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.inference import InferenceResult


class LabelPart(BatchPart):
    """Predictions of one task's results, each with its slices, by output."""

    def __init__(self, plan: TaskPlan) -> None:
        self._plan = plan
        self._slices: Mapping[str, Sequence[str]] = {}
        self._predictions: Mapping[str, StoredPredictions] = {}

    def read(self, batch: Batch) -> None:
        """Read the slice that each model window belongs to, by the slice's name."""
        by_name = dict[str, Sequence[str]]()
        for slicing in self._plan.config.slices:
            from outstation.ml.performance import slices

            name = slicing if isinstance(slicing, str) else slicing.field
            column = batch.rows.column([f.name for f in self._plan.stream.fields].index(name))[batch.ends]
            if isinstance(slicing, str):
                texts = batch.store.categories(self._plan.config.stream, name)
                by_name[name] = [texts[code] or slices.MISSING for code in column.tolist()]
            else:
                by_name[name] = slices.name_bins(column.astype(np.float64), slicing.edges)
        self._slices = by_name

    def compute(self, batch: Batch, results: InferenceResult) -> Iterable[PendingMessage]:
        """Compute the predictions by output; the first output has the name ""."""
        rows, t, digest = batch.ends + batch.rows.first, batch.rows.t[batch.ends], self._plan.bundle.digest
        outputs = {"": results.scores, **results.scores.outputs} if len(rows) else {}
        self._predictions = {
            name: StoredPredictions(
                *(digest, rows, t, scores.to_codes(output), output.score, output.value, self._slices),
                joined={} if name else batch.last_joined,
                expected_bin=batch.error_bins.get(name),
            )
            for name, output in outputs.items()
        }
        return ()

    def save(self, tx: Transaction, batch: Batch) -> None:
        unspent_bytes = tx.remaining_bytes
        for name, predictions in self._predictions.items():
            tx.labels.store_predictions(output_key(self._plan.name, name), predictions, tx.uptime_s(batch.now))
        batch.spent_bytes += unspent_bytes - tx.remaining_bytes

    def confirm(self, batch: Batch) -> None:
        self._slices, self._predictions = {}, {}
