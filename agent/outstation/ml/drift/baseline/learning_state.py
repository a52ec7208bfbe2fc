"""Learning state: the drift windows from which a site's reference, or a bundle's, is learned, bounded in bytes."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation import arrays
from outstation.foundation.arrays import AnyArray, Float32s, Float64s, Int32s, Ints
from outstation.ml.drift.baseline import fault_limits
from outstation.ml.drift.baseline.reference import BINS, MIN_WINDOWS, RECOMMENDED_WINDOWS, Reference
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.detectors.detector import MIN_CLASS_ROWS, MIN_CLASS_WINDOWS, LearnedWindows, Task
from outstation.ml.drift.detectors.registry import COUNTERS
from outstation.ml.drift.numeric import divergence
from outstation.ml.drift.numeric.divergence import Distributions
from outstation.ml.drift.numeric.sums import GroupMoments, median

MAX_WINDOWS = 400  # drift windows kept while learning: more add hardly anything
MAX_BYTES = 512 << 10  # of these windows, as long as enough are left to learn from
MIN_RETAINED_WINDOWS = RECOMMENDED_WINDOWS + MIN_WINDOWS

_PER_WINDOW = ("bins", "output", "scores", "further", "errors", "t", "step_us", "repeated", "symptoms")
_NO_COUNTS: Int32s = np.empty((0, 0), np.int32)
_PER_ENTRY = ("window", "label", "n", "mean", "m2")


class LearningState(msgspec.Struct, frozen=True, eq=False):
    """Drift windows gathered while learning: K of them, and m entries, one per class that occurred in a window.

    Means (from the shipped reference's origin) and squares are float32: calibration needs no more, and it halves the
    state.
    """

    windows: int
    total: Summary
    bins: Int32s  # (K, F, 16)
    output: Int32s  # (K, C)
    scores: Int32s  # (K, 32)
    t: Ints  # (K, 2) begin and end, epoch µs
    window: Ints  # (m,) number of the window of an entry
    label: Ints  # (m,) its class
    n: Int32s  # (m, D)
    mean: Float32s
    m2: Float32s
    detectors: dict[str, AnyArray]  # (m, …) what detectors retain
    step_us: Float64s  # (K,) mean step from row to row, NaN if unknown
    repeated: Float64s  # (K,) share of rows that repeat the row before
    symptoms: Float32s  # (K, F, …) of sensor faults
    total_windows: int = 0  # drift windows, with those that were dropped
    thinning: int = 1  # one window in this many is kept
    further: Int32s = _NO_COUNTS  # (K, X)
    errors: Int32s = _NO_COUNTS  # (K, E)

    @classmethod
    def empty(cls, shipped: Reference) -> LearningState:
        none = np.empty(0, np.int64)
        entries = np.empty((0, len(shipped.origin)), np.float32)
        empty = Summary.empty(shipped)
        return cls(
            windows=0,
            total=empty,
            bins=np.empty((0, len(shipped.fields), BINS // 2), np.int32),
            output=np.empty((0, shipped.class_count), np.int32),
            scores=np.empty((0, BINS), np.int32),
            t=np.empty((0, 2), np.int64),
            window=none,
            label=none,
            n=entries.astype(np.int32),
            mean=entries,
            m2=entries,
            detectors=_retain(shipped.task, empty, none),
            step_us=np.empty(0),
            repeated=np.empty(0),
            symptoms=np.empty((0, len(shipped.fields), fault_limits.SYMPTOMS), np.float32),
            further=np.empty((0, shipped.further_cells), np.int32),
            errors=np.empty((0, shipped.error_bins), np.int32),
        )

    def add(self, drift_window: Summary, task: Task, *, t: tuple[int, int] = (0, 0)) -> LearningState:
        """Add a window that began and ended at `t`. If there are many windows, some are kept, evenly over time."""
        if self.windows >= self.capacity:
            return self.thin().add(drift_window, task, t=t)
        total = self.total_windows + 1
        if (total - 1) % self.thinning:
            return replace(self, total=self.total.merge(drift_window), total_windows=total)
        measured = drift_window.class_sums.moments(np.zeros(1))
        classes = np.flatnonzero(measured.n.any(1))
        new: dict[str, Any] = {
            "bins": divergence.coarsen_bins(drift_window.counts)[None],
            "output": drift_window.output[None],
            "scores": drift_window.scores[None],
            "further": drift_window.further[None],
            "errors": drift_window.errors[None],
            "t": [t],
            "step_us": [drift_window.sampling.mean_step_us()],
            "repeated": [drift_window.repeated_share],
            "symptoms": _measure_symptoms(drift_window)[None],
            "window": np.full(len(classes), self.windows),
            "label": classes,
            "n": measured.n[classes],
            "mean": measured.mean[classes],
            "m2": measured.m2[classes],
        }
        for name, part in new.items():
            before = getattr(self, name)
            new[name] = np.concatenate([before, np.asarray(part).astype(before.dtype)])
        retained = _retain(task, drift_window, classes)
        return replace(
            self,
            windows=self.windows + 1,
            total=self.total.merge(drift_window),
            detectors={name: np.concatenate([self.detectors[name], part]) for name, part in retained.items()},
            total_windows=total,
            **new,
        )

    def thin(self) -> LearningState:
        """Drop every other window, and from now on keep half as many."""
        every_other, entries = np.arange(0, self.windows, 2), self.window % 2 == 0
        fewer: dict[str, Any] = {name: getattr(self, name)[every_other] for name in _PER_WINDOW} | {
            name: getattr(self, name)[entries] for name in _PER_ENTRY
        }
        fewer["window"] = fewer["window"] // 2
        return replace(
            self,
            windows=len(every_other),
            detectors={name: retained[entries] for name, retained in self.detectors.items()},
            thinning=2 * self.thinning,
            **fewer,
        )

    @property
    def capacity(self) -> int:
        """Return how many windows may be kept: fewer where fields and classes make each of them large."""
        counts = (self.bins, self.output, self.scores, self.further, self.errors)
        size = sum(part.nbytes for part in (*counts, self.n, self.mean, self.m2))
        # Numbers that a detector retains beside its main ones are not counted.
        size += sum(part.nbytes for name, part in self.detectors.items() if "." not in name)
        return int(np.clip(MAX_BYTES * self.windows // max(size, 1), MIN_RETAINED_WINDOWS, MAX_WINDOWS))

    @property
    def distributions(self) -> Distributions:
        """Distributions (K, …) of the windows."""
        parts = (self.bins, self.output, self.scores, self.further, self.errors)
        return Distributions(*(part.astype(np.int64) for part in parts))

    @property
    def observed_s(self) -> float:
        """Seconds of readings; a gap or a clock step counts for no more than a few windows do."""
        length = np.maximum(self.t[:, 1] - self.t[:, 0], 0)
        typical = median(length) if len(length) else 0.0
        between = np.clip(self.t[1:, 0] - self.t[:-1, 1], 0, typical)
        capped = np.minimum(length, 4 * typical)
        # Gaps between windows are known only if none was dropped.
        if self.total_windows == self.windows:
            return float(capped.sum() + between.sum()) / 1e6
        return float(capped.mean() * self.total_windows) / 1e6

    @property
    def has_steady_clock(self) -> bool:
        """True if the clock made no step that windows show; otherwise their hour of day is unknown."""
        ends = self.t.ravel()
        return bool((np.diff(ends) >= 0).all()) and (self.t[-1, 1] - self.t[0, 0]) / 1e6 <= 10 * self.observed_s

    @property
    def midpoints(self) -> Ints:
        """(K,) middle of each window, epoch µs."""
        return self.t[:, 0] + (self.t[:, 1] - self.t[:, 0]) // 2

    def moments(self, shipped: Reference) -> GroupMoments:
        """Return the moments (K, C, D) of each drift window and class."""
        n = self._expand(shipped, self.n)
        mean = self._expand(shipped, np.where(self.n > 0, self.mean + shipped.origin, 0.0))
        return GroupMoments(n.astype(np.int64), mean, self._expand(shipped, self.m2))

    def learned_windows(
        self, shipped: Reference, class_moments: GroupMoments, class_sd: Float64s, seasonality: str
    ) -> LearnedWindows:
        """Return these windows as detectors learn from them, with their `class_moments` (K, C, D)."""
        return LearnedWindows(
            class_moments,
            class_moments.pooled(0),
            self.distributions,
            class_sd,
            float(MIN_CLASS_WINDOWS if shipped.windowed else MIN_CLASS_ROWS),
            self.detectors,
            self.window,
            self.label,
            self.step_us,
            self.repeated,
            self.midpoints,
            seasonality,
            shipped.promised,
            shipped.output_weights,
        )

    def to_bytes(self) -> bytes:
        return arrays.to_compressed_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> LearningState:
        """Decode `to_bytes`. Raises ValueError."""
        state = arrays.from_compressed_bytes(data, cls)
        # Earlier versions stored neither counts of further outputs nor of expected errors.
        none = np.zeros((state.windows, 0), np.int32)
        missing = {name: none for name in ("further", "errors") if len(getattr(state, name)) != state.windows}
        return replace(state, **missing) if missing else state

    def _expand(self, shipped: Reference, entries: AnyArray) -> Float64s:
        out = np.zeros((self.windows, shipped.class_count, entries.shape[1]))
        out[self.window, self.label] = entries
        return out


def _retain(task: Task, drift_window: Summary, classes: Ints) -> dict[str, AnyArray]:
    """Return what detectors keep of these `classes` (m,) of a drift window."""
    retained: dict[str, AnyArray] = {}
    for counter in COUNTERS:
        retained |= counter.retain(task, drift_window.detectors[counter.name][classes])
    return retained


def _measure_symptoms(windows: Summary) -> Float64s:
    """Return the symptoms of sensor faults (..., F, SYMPTOMS) in a summary or a stack of summaries."""
    rows = np.maximum(windows.counts[..., 0, :].sum(-1) + windows.missing[..., 0], 1)[..., None]
    moments = windows.row_sums.moments(np.zeros(1))
    sd = np.sqrt(moments.m2 / np.maximum(moments.n, 1))[..., 0, :]
    pile = windows.extremes.rows[..., 0] / rows[..., None]
    return np.stack(
        [windows.missing / rows, pile[..., 0], pile[..., 1], windows.outside / rows, windows.spikes / rows, sd], axis=-1
    )
