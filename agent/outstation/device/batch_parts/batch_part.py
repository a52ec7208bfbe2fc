"""Batch, as its parts see it: the rows that were read, and then the facts that each part leaves for those after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.store.message_log import MessageLog, PendingMessage
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.clock import ClockReading
from outstation.ml.drift.state import DriftState, DriftWindowResult
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import InferenceResult
from outstation.ml.model.inference.scores import Labels
from outstation.ml.performance.expected_error import NO_ERROR_BINS, ErrorBins
from outstation.protocol.alerts.alert import Alert

if TYPE_CHECKING:
    from outstation.protocol.wire.messages import JoinedRange


class ResultAlert(msgspec.Struct, frozen=True):
    """Alert that the result at `index` of the batch raised or cleared; below 0 for one of an earlier batch."""

    index: int
    alert: Alert


class BatchStart(msgspec.Struct, frozen=True):
    """Start of a batch, s on the monotonic clock, and ns on the processor clock of its thread.

    While the machine sleeps, the monotonic clock stands still, so no batch is late then.
    """

    monotonic_s: float
    cpu_ns: int


class Batch(msgspec.Struct, eq=False):
    """One batch: `features` (n, F) of its `rows` in physical units, and its w model windows.

    - `ends` (w,): offset of the last row of each window
    - `joined_rows`: rows that each further input was joined from; `last_joined`: its stream, and the last of them
    - `drift`: state before the batch; `drift_windows`: those that closed in it; `faulty_fields` had a sensor fault
    - `error_bins` (w,) of each output whose expected error is measured
    - `labels`: those of the answers, None for a model without classes
    - `result_alerts`: by rules, in the order of their results
    - `spent_bytes`: those of the transaction that grow with the windows
    """

    plan: TaskPlan
    store: Store
    message_log: MessageLog
    now: ClockReading
    start: BatchStart
    rows: RowBatch
    cut: WindowCut
    ends: Ints
    features: Float32s
    joined_rows: Mapping[str, JoinedRange] = {}
    last_joined: Mapping[str, tuple[str, int]] = {}
    drift: DriftState | None = None
    drift_windows: Sequence[DriftWindowResult] = ()
    faulty_fields: Sequence[str] = ()
    error_bins: ErrorBins = NO_ERROR_BINS
    labels: Labels | None = None
    result_alerts: Sequence[ResultAlert] = ()
    spent_bytes: int = 0


class BatchPart:
    """One concern of a task's batches. A part has its task's own state, as committed.

    A failed batch runs again from `read` on, maybe with fewer rows: only `confirm` changes the committed state.
    """

    def read(self, batch: Batch) -> None:
        """Read from the store, while the model computes. Raises StorageError."""

    def compute(self, batch: Batch, results: InferenceResult) -> Iterable[PendingMessage]:
        """Compute from `results`, and return the part's messages. The parts' order is that of their messages."""
        return ()

    def save(self, tx: Transaction, batch: Batch) -> None:
        """Write in the batch's commit. Raises StorageError."""

    def confirm(self, batch: Batch) -> None:
        """Take over what was committed; it cannot fail."""

    def follow(self, batch: Batch, results: InferenceResult) -> None:
        """Do work of its own after the commit, in the parts' order. Raises StorageError; the batch stays committed."""
