"""Batch size of a task: the rows of its next batch, by memory, time, the deadline and the store's transaction."""

from __future__ import annotations

from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.batch_parts.deadline import Deadline
from outstation.device.batch_parts.drift_part import DriftPart
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.ml.model.bundle.manifest import output_columns
from outstation.ml.model.inference.inference import MAX_VALUES

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


class BatchSize(BatchPart):
    """Size of one task's batches.

    - `divisor`: batches are this many times smaller, after one that found no room
    - `window_bytes`: planned bytes of a model window in a transaction: the most there may be, then as measured
    """

    def __init__(self, plan: TaskPlan, deadline: Deadline, drift: DriftPart | None, alerts_per_window: float) -> None:
        self._plan, self._deadline, self._drift, self._alerts_per_window = plan, deadline, drift, alerts_per_window
        self.divisor, self.window_bytes = 1, self._max_window_bytes

    def max_rows(self, transaction_bytes: int, *, windows_ahead: int = 0) -> int:
        """Return the rows of the largest batch: one model window, and what memory, time and the transaction allow.

        `windows_ahead`: model windows that are not committed yet.
        """
        spec, length, step = self._plan.bundle.manifest, self._plan.window_rows, self._plan.step
        further = sum(joined.size for joined in spec.joined.values())
        values = length * len(spec.input.columns) + further
        tuning, max_s = self._plan.tuning, min(_MAX_INFERENCE_S, self._deadline.seconds or _MAX_INFERENCE_S)
        in_time = _UNTUNED_WINDOWS if tuning is None else int(max_s * tuning.rows_per_s)
        default = max(_BATCH_WINDOWS, min(_BATCH_ROWS // step, _BATCH_VALUES // values))
        # The other half is for alerts, and for the states of drift and labels.
        in_transaction = transaction_bytes // 2 // self.window_bytes
        windows = min(default, in_transaction, MAX_VALUES // values, in_time, self._deadline.max_windows)
        windows //= self.divisor
        return length + max(0, self._align_to_drift_window(windows, windows_ahead) - 1) * step

    @property
    def rows_to_gather(self) -> int:
        """Return the rows that a run may wait for, a moment: those of several drift windows. 0 if it should not."""
        if self._drift is None or (self._deadline.seconds or _MIN_GATHER_DEADLINE_S) < _MIN_GATHER_DEADLINE_S:
            return 0
        state = self._drift.state
        windows = _GATHERED_WINDOWS * state.window - state.open_summary.model_windows
        return self._plan.window_rows + (windows - 1) * self._plan.step

    def confirm(self, batch: Batch) -> None:
        """Plan the next batches by the bytes that results, drift windows and alerts of this one took."""
        windows = len(batch.ends)
        if windows >= _MIN_MEASURED_WINDOWS:
            # Half of the plan before, too: after a calm batch there may be more alerts again.
            self.window_bytes = max(1, self.window_bytes // 2, batch.spent_bytes * 5 // 4 // windows)

    def shrink(self) -> None:
        """Plan smaller batches, because the store had no room for one."""
        self.window_bytes = max(self.window_bytes, self._max_window_bytes)
        self.divisor *= 4

    def recover(self) -> None:
        """Plan larger batches again, because there was room for one."""
        self.divisor = max(1, self.divisor // 2)

    def _align_to_drift_window(self, windows: int, ahead: int) -> int:
        """Return at most `windows`, so that the last one closes a drift window if it can."""
        if self._drift is None:
            return windows
        state = self._drift.state
        excess = (state.open_summary.model_windows + ahead + windows) % state.window
        return windows - excess if excess < windows else windows

    @property
    def _max_window_bytes(self) -> int:
        """Bytes that one model window takes at most in a transaction."""
        manifest = self._plan.bundle.manifest
        columns = len(manifest.output.labels) if manifest.output.multi_label else len(manifest.output.names)
        columns += sum(len(output_columns(name, spec)) for name, spec in manifest.further.items())
        drift = (_DRIFT_BYTES + _FIELD_BYTES * len(manifest.input.fields)) // manifest.drift.window
        alerts = int(_ALERT_BYTES * self._alerts_per_window)
        return _RESULT_BYTES + _COLUMN_BYTES * columns + (drift if self._drift else 0) + alerts
