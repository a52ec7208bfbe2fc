"""Drift part of a batch: the drift windows that it closes, and the drift state after it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence

import numpy as np

from outstation.device.batch_parts import drift_state
from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.batch_parts.drift_state import RestoredDrift
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.store.message_log import PendingMessage
from outstation.device.store.transaction import Transaction
from outstation.ml.drift.baseline import modes
from outstation.ml.drift.baseline.modes import Modes
from outstation.ml.drift.batches import MeasuredWindows
from outstation.ml.drift.monitor import DriftMonitor
from outstation.ml.drift.state import DriftState, DriftWindowResult
from outstation.ml.model.inference.inference import InferenceResult

# Bytes and number of the fields with a fault that a results message names.
FAULTS_BYTES, _MAX_FAULTS = 500, 64


class DriftPart(BatchPart):
    """Drift detection of one task: its `monitor`, and its `state` as committed.

    - `closing_messages`: to be sent with the next commit, because the state before was of another bundle, or None
    - `unsaved_basis`: shipped reference to be saved with the next commit, or None
    """

    def __init__(self, plan: TaskPlan, restored: RestoredDrift) -> None:
        self._plan = plan
        self._modes: Modes | None = None
        self._measured: MeasuredWindows | None = None
        self.take_over(restored)

    def take_over(self, restored: RestoredDrift) -> None:
        """Continue from a state that was read from the store."""
        self.monitor: DriftMonitor = restored.monitor
        self.state = self._next = restored.state
        self.closing_messages, self.unsaved_basis = restored.messages, restored.basis

    def to_restored(self) -> RestoredDrift:
        return RestoredDrift(self.monitor, self.state, self.closing_messages, self.unsaved_basis)

    def replace_state(self, state: DriftState) -> None:
        """Take over a committed state, with which the closing messages and the basis were committed, too."""
        self.state, self.closing_messages, self.unsaved_basis = state, None, None

    def save_state(self, tx: Transaction, state: DriftState) -> None:
        """Save the next state, with all that its bundle took over; the closing messages belong to it."""
        previous = self.state if self.closing_messages is None else None
        drift_state.save(tx, self._plan.name, self.monitor, state, previous)
        if self.unsaved_basis is not None:
            drift_state.save_basis(tx, self._plan.name, self.unsaved_basis)

    def read(self, batch: Batch) -> None:
        """Measure the batch's drift windows while the model computes."""
        batch.drift = self.state
        self._modes = self._read_modes(batch)
        self._measured = self.monitor.measure_batch(
            self.state, batch.features, batch.cut.starts, first_row=batch.rows.first, t=batch.rows.t
        )

    def compute(self, batch: Batch, results: InferenceResult) -> Iterable[PendingMessage]:
        shipped, starts, model_scores = self.monitor.shipped, batch.cut.starts, results.scores
        # Bins of the answers: an expected error follows from inputs, which are deleted when labels arrive.
        batch.error_bins = {name: np.zeros(len(starts), np.uint8) for name in shipped.error_references}
        labels = model_scores.label if model_scores.label is not None else np.zeros(len(starts), np.int64)
        certainty = model_scores.value if model_scores.score is None else model_scores.score
        self._next, batch.drift_windows = self.monitor.process_batch(
            self.state,
            batch.features,
            starts,
            self._plan.window_rows,
            labels,
            None if certainty is None else certainty[:, None].astype(np.float32),
            rows=(batch.rows.first, batch.rows.last),
            t=batch.rows.t,
            modes=self._modes,
            answers=model_scores.further_answers if shipped.further else None,
            error_bins=batch.error_bins,
            measured=self._measured,
        )
        batch.faulty_fields = find_faulty_fields((self.state, self._next), batch.drift_windows)
        return self.closing_messages or ()

    def save(self, tx: Transaction, batch: Batch) -> None:
        self.save_state(tx, self._next)

    def confirm(self, batch: Batch) -> None:
        self.replace_state(self._next)
        self._modes = self._measured = None

    def _read_modes(self, batch: Batch) -> Modes | None:
        field, stream = self.monitor.settings.class_field, self._plan.config.stream
        if not field:
            return None
        codes = batch.rows.column([f.name for f in self._plan.stream.fields].index(field))
        texts = batch.store.categories(stream, field)
        return modes.modes_of_windows(codes, batch.cut.starts, self._plan.window_rows, texts)


def find_faulty_fields(states: Sequence[DriftState], windows: Sequence[DriftWindowResult]) -> list[str]:
    """Return the fields with an open fault alert in one of the states, or with a fault in a drift window.

    If they are very many, or have long names, only the first are listed.
    """
    faulty = {name for state in states for name in itertools.compress(state.fields, state.faults.open_fields)}
    features = (window.members["features"] for window in windows)
    faulty |= {name for field in features for name, numbers in field.items() if numbers["fault"]}
    sizes = itertools.accumulate(len(json.dumps(name)) + 1 for name in sorted(faulty))
    return [name for name, size in zip(sorted(faulty), sizes, strict=True) if size < FAULTS_BYTES][:_MAX_FAULTS]
