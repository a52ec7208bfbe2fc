"""Loaded task: a task with its bundle, model and drift state in memory, and the size of its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from outstation.device import config
from outstation.device.config import StreamConfig
from outstation.device.pipeline.deadline import Deadline
from outstation.device.rules.compiler import CompiledRule
from outstation.device.store.cost import CostMeter
from outstation.device.store.message_log import MessageLog, PendingMessage
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation.arrays import Float32s
from outstation.ml.drift.monitor import DriftMonitor
from outstation.ml.drift.state import DriftState
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.bundle.manifest import output_columns
from outstation.ml.model.inference import features
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import (
    MAX_VALUES,
    Inference,
    InferenceResult,
    RunnableModel,
    StartedWindows,
)
from outstation.ml.model.inference.tuning import Tuning

if TYPE_CHECKING:
    from outstation.device.pipeline.joined_streams import JoinedBatch, JoinedReader, JoinedStream
    from outstation.device.samples.selection import SampledTask

# Model windows of a batch, and their limit before a model was tuned. Short windows are more, up to a number of rows and
# values: what a batch costs by itself is a tenth of 16,384 rows.
_BATCH_WINDOWS, _UNTUNED_WINDOWS = 2048, 512
_BATCH_ROWS, _BATCH_VALUES = 32_768, 1 << 20
# Bytes that a transaction counts, until a batch shows how many they are: for a result, in its message and for labels;
# for each further column there; for a drift window; and for each field of one.
_RESULT_BYTES, _COLUMN_BYTES, _DRIFT_BYTES, _FIELD_BYTES = 200, 40, 2_000, 1_000
# For an alert of a rule that fires and clears all the time.
_ALERT_BYTES = 3_000
# Drift windows that are judged together where rows come fast: each then costs a third. A task with a shorter deadline
# does not wait for them.
_GATHERED_WINDOWS, _MIN_GATHER_DEADLINE_S = 4, 1.0
# The fixed parts of a smaller batch would count as those of its windows.
_MIN_MEASURED_WINDOWS = 32
# Time of a batch in the model: far below the watchdog's minute, even on a day when everything else is slow.
_MAX_INFERENCE_S = 5.0


class BatchObserver(Protocol):
    """Evaluation of another bundle on the task's batches; called for each batch."""

    def before_commit(self, task: LoadedTask, results: InferenceResult) -> None:
        """Handle the results of `task` before they are committed."""

    def save_progress(self, tx: Transaction) -> None:
        """Save the evaluation's state in the batch's commit."""

    def after_commit(self, task: LoadedTask, store: Store, batch: RowBatch, results: InferenceResult) -> None:
        """Handle the committed batch. Raises StorageError; failures of the other bundle are recorded, not raised."""


class StartedBatch(msgspec.Struct, frozen=True, eq=False):
    """Batch that was read and given to the model: `features` (n, F) of its rows in physical units."""

    batch: RowBatch
    cut: WindowCut
    features: Float32s
    run: StartedWindows
    joined: JoinedBatch | None = None


class LoadedTask(msgspec.Struct, eq=False, dict=True):
    """A task with its bundle loaded.

    - `drift_state`: as committed; `closing_messages`: to be sent with the next commit, because it was of another bundle
    - `unsaved_basis`: shipped reference to be saved with the next commit
    - `crash_guard` surrounds each run of the model
    - `samples`: which of its readings may be sent; None without the owner's consent
    - `is_crash_suspect`: the daemon ended during the model's last run
    - `is_pipelined`: the model may compute the next batch while one is committed: not while a hot machine rests
    - `started`: the next batch, which the model computes already
    - `batch_divisor`: batches are this many times smaller, after one that found no room
    - `results_per_message`: results that fit into one message, as of the last batch
    - `window_bytes`: planned bytes of a model window in a transaction: the most there may be, then as measured
    """

    name: str
    config: config.TaskConfig
    stream: StreamConfig
    bundle: Bundle
    model: RunnableModel
    drift_monitor: DriftMonitor | None
    drift_state: DriftState | None
    config_digest: str
    keep_results: bool = True
    closing_messages: list[PendingMessage] | None = None
    unsaved_basis: bytes | None = None
    tuning: Tuning | None = None
    crash_guard: Callable[[], AbstractContextManager[object]] = nullcontext
    is_crash_suspect: bool = False
    batch_observer: BatchObserver | None = None
    last_label: str = ""
    rules: Sequence[CompiledRule] = ()
    joined_streams: Mapping[str, JoinedStream] = msgspec.field(default_factory=dict)
    samples: SampledTask | None = None
    batch_divisor: int = 1
    results_per_message: int = 0
    is_pipelined: bool = True
    started: StartedBatch | None = None

    def __post_init__(self) -> None:
        self.cost_meter, self.deadline = CostMeter(self.name), Deadline(self.name, self.config.deadline)
        names = [f.name for f in self.stream.fields]
        self.input_columns = [names.index(name) for name in self.bundle.manifest.input.fields]
        media_format, manifest = self.stream.media_format, self.bundle.manifest
        if media_format is not None:
            manifest = features.limit_gap(manifest, media_format.max_row_gap_s)
        self.inference = Inference(manifest, self.model)
        self.window_bytes = self._max_window_bytes
        self.joined_reader: JoinedReader | None = None
        if manifest.joined:
            from outstation.device.pipeline.joined_streams import JoinedReader

            self.joined_reader = JoinedReader(self.name, self.bundle.digest, self.inference, self.joined_streams)

    @property
    def step(self) -> int:
        return self.inference.step

    @property
    def window_rows(self) -> int:
        return self.inference.rows

    @property
    def bundle_ref(self) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {"name": manifest.name, "version": manifest.version, "digest": self.bundle.digest}

    def raise_least_count(self, message_log: MessageLog) -> None:
        """Have messages about this task obey its bundle's least count, where that is larger than the device's."""
        message_log.bundle_min_counts[self.name] = self.bundle.manifest.drift.min_count or 1

    def max_batch_rows(self, transaction_bytes: int, *, windows_ahead: int = 0) -> int:
        """Return the rows of the largest batch: one model window, and what memory, time and the transaction allow.

        `windows_ahead`: model windows that are not committed yet.
        """
        spec = self.bundle.manifest
        further = sum(joined.size for joined in spec.joined.values())
        values = self.window_rows * len(spec.input.columns) + further
        max_s = min(_MAX_INFERENCE_S, self.deadline.seconds or _MAX_INFERENCE_S)
        in_time = _UNTUNED_WINDOWS if self.tuning is None else int(max_s * self.tuning.rows_per_s)
        default = max(_BATCH_WINDOWS, min(_BATCH_ROWS // self.step, _BATCH_VALUES // values))
        # The other half is for alerts, and for the states of drift and labels.
        in_transaction = transaction_bytes // 2 // self.window_bytes
        windows = min(default, in_transaction, MAX_VALUES // values, in_time, self.deadline.max_windows)
        windows //= self.batch_divisor
        return self.window_rows + max(0, self._align_to_drift_window(windows, windows_ahead) - 1) * self.step

    @property
    def rows_to_gather(self) -> int:
        """Return the rows that a run may wait for, a moment: those of several drift windows. 0 if it should not."""
        if self.drift_state is None or (self.deadline.seconds or _MIN_GATHER_DEADLINE_S) < _MIN_GATHER_DEADLINE_S:
            return 0
        windows = _GATHERED_WINDOWS * self.drift_state.window - self.drift_state.open_summary.model_windows
        return self.window_rows + (windows - 1) * self.step

    def record_transaction(self, windows: int, spent_bytes: int) -> None:
        """Plan the next batches by the bytes that results, drift windows and alerts of a committed batch took."""
        if windows >= _MIN_MEASURED_WINDOWS:
            # Half of the plan before, too: after a calm batch there may be more alerts again.
            self.window_bytes = max(1, self.window_bytes // 2, spent_bytes * 5 // 4 // windows)

    def shrink_batches(self) -> None:
        """Plan smaller batches, because the store had no room for one."""
        self.window_bytes = max(self.window_bytes, self._max_window_bytes)
        self.batch_divisor *= 4

    def _align_to_drift_window(self, windows: int, ahead: int) -> int:
        """Return at most `windows`, so that the last one closes a drift window if it can."""
        if self.drift_state is None:
            return windows
        excess = (self.drift_state.open_summary.model_windows + ahead + windows) % self.drift_state.window
        return windows - excess if excess < windows else windows

    @property
    def _max_window_bytes(self) -> int:
        """Bytes that one model window takes at most in a transaction."""
        manifest = self.bundle.manifest
        columns = len(manifest.output.labels) if manifest.output.multi_label else len(manifest.output.names)
        columns += sum(len(output_columns(name, spec)) for name, spec in manifest.further.items())
        drift = (_DRIFT_BYTES + _FIELD_BYTES * len(manifest.input.fields)) // manifest.drift.window
        alerts = int(_ALERT_BYTES * sum(rule.alerts_per_window for rule in self.rules))
        return _RESULT_BYTES + _COLUMN_BYTES * columns + (drift if self.drift_monitor else 0) + alerts
