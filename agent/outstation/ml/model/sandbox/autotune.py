"""Autotuning: measure the best batch size and number of threads on the device, within two seconds.

Rules of `tune`:
- outputs must have the same bits as single rows on one thread
- no batch may exceed its memory or the remaining time
- one thread, unless more are faster by MIN_THREAD_SPEEDUP: other work needs the processor, too
- of nearly equally fast batches the smallest, as it needs the least memory
"""

from __future__ import annotations

import statistics
import time

import msgspec
import numpy as np

from outstation.foundation.arrays import Float32s
from outstation.foundation.errors import BadBundle
from outstation.ml.model.bundle.tensor_selection import ONE_TENSOR, TensorSelection
from outstation.ml.model.inference.runtime import MAX_BATCH, TfliteModel
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.inference.tuning import MAX_TUNING_S, Tuning, count_cores, describe_machine, model_digest
from outstation.ml.model.sandbox import memory

BATCH_SIZES = (1, 4, 8, 16, 32, 64, MAX_BATCH)
MAX_THREADS = 4
# A full batch of every size, and a shorter last one.
SAMPLE_ROWS = MAX_BATCH + 27
MIN_THREAD_SPEEDUP = 1.15
_EQUAL_SPEED = 0.98
# A candidate below this share of the best first measurement is not measured again.
_DROP_BELOW = 0.8
_STABLE_ROUNDS, _STABLE_TOLERANCE = 5, 0.005
_MEASURE_S, _MAX_REPEATS = 0.002, 50


def tune(
    content: bytes, rows: Float32s, max_bytes: int, seconds: float = MAX_TUNING_S, tensors: TensorSelection = ONE_TENSOR
) -> Tuning:
    """Measure the model on `rows`, with at most `max_bytes` for a batch. Raises BadBundle if it does not run."""
    tuner = _Tuner(content, np.resize(rows, (SAMPLE_ROWS, *rows.shape[1:])), max_bytes, seconds, tensors)
    for batch in BATCH_SIZES if tuner.has_dynamic_batch else BATCH_SIZES[:1]:
        if not tuner.try_candidate(batch, 1):
            break
    tuner.measure_rounds(time_share=0.6)
    single_thread = tuner.find_fastest(1)
    for threads in range(2, min(count_cores(), MAX_THREADS) + 1):
        for batch in sorted({single_thread.batch, tuner.largest_batch}):
            tuner.try_candidate(batch, threads)
    tuner.measure_rounds(time_share=1.0)
    best = tuner.find_best()
    return Tuning(
        model_digest(content),
        runtime_name(),
        describe_machine(),
        best.batch,
        best.threads,
        round(best.rows_per_s, 1),
        tuner.inexact_batches,
        tensors,
    )


class _Candidate(msgspec.Struct):
    """A batch size and a number of threads, with the measured CPU and wall seconds per row."""

    batch: int
    threads: int
    cpu_s: list[float] = msgspec.field(default_factory=list)
    wall_s: list[float] = msgspec.field(default_factory=list)

    @property
    def rows_per_s(self) -> float:
        """Rows per second: for one thread as on an idle processor, for several with whatever else ran."""
        return 1 / (min(self.cpu_s) if self.threads == 1 else statistics.median(self.wall_s))


class _Tuner:
    def __init__(
        self, content: bytes, rows: Float32s, max_bytes: int, seconds: float, tensors: TensorSelection
    ) -> None:
        self._content, self._rows, self._max_bytes, self._tensors = content, rows, max_bytes, tensors
        self._start_s, self._seconds = time.perf_counter(), seconds
        self._models = {1: TfliteModel(content, 1, tensors=tensors)}
        self._candidates: list[_Candidate] = []
        self.inexact_batches: list[int] = []
        self.has_dynamic_batch = self._models[1].has_dynamic_batch
        self._row_s = self._time_run(self._models[1], rows[:1])[1]
        # Half of the time is for comparing outputs.
        self._compared_rows = rows[: max(1, min(SAMPLE_ROWS, int(seconds / 2 / (1 + len(BATCH_SIZES)) / self._row_s)))]
        self._expected = self._models[1].invoke(self._compared_rows)

    @property
    def largest_batch(self) -> int:
        return max(candidate.batch for candidate in self._candidates)

    def try_candidate(self, batch: int, threads: int) -> bool:
        """Compare the bits and measure once; return False if twice the batch is out of reach."""
        if self._candidates and not self._has_time_for(2 * batch * self._row_s):
            return False
        # The compared rows must contain a full batch and a shorter one.
        if batch > 1 and self.has_dynamic_batch and batch >= len(self._compared_rows):
            return False
        before = memory.resident_bytes()
        try:
            if threads not in self._models:
                self._models[threads] = TfliteModel(self._content, batch, threads, self._tensors)
            model = self._models[threads]
            model.set_batch_size(batch)
            equal = np.array_equal(model.invoke(self._compared_rows), self._expected, equal_nan=True)
            candidate = _Candidate(model.batch, threads)
            self._measure(candidate)
        except BadBundle:
            return False
        if equal:
            self._candidates.append(candidate)
        else:
            self.inexact_batches.append(batch)
        return batch == 1 or 2 * (memory.resident_bytes() - before) < self._max_bytes

    def measure_rounds(self, time_share: float) -> None:
        """Measure promising candidates in turns, until this share of the time is used or results are stable."""
        stable_rounds = 0
        while stable_rounds < _STABLE_ROUNDS:
            before = [candidate.rows_per_s for candidate in self._candidates]
            limit = _DROP_BELOW * max(before)
            for candidate in [c for c in self._candidates if c.rows_per_s > limit or len(c.wall_s) == 1]:
                if not self._has_time_for(candidate.batch * self._row_s + (1 - time_share) * self._seconds):
                    return
                self._measure(candidate)
            has_changed = any(
                abs(candidate.rows_per_s / old - 1) > _STABLE_TOLERANCE
                for candidate, old in zip(self._candidates, before, strict=True)
            )
            stable_rounds = 0 if has_changed else stable_rounds + 1

    def find_fastest(self, threads: int) -> _Candidate:
        """Return the smallest of the nearly equally fast batches."""
        candidates = [candidate for candidate in self._candidates if candidate.threads == threads]
        best = max(candidate.rows_per_s for candidate in candidates)
        return next(candidate for candidate in candidates if candidate.rows_per_s >= _EQUAL_SPEED * best)

    def find_best(self) -> _Candidate:
        best = self.find_fastest(1)
        for threads in sorted({candidate.threads for candidate in self._candidates} - {1}):
            candidate = self.find_fastest(threads)
            if candidate.rows_per_s > MIN_THREAD_SPEEDUP * best.rows_per_s:
                best = candidate
        return best

    def _has_time_for(self, seconds: float) -> bool:
        return time.perf_counter() + seconds < self._start_s + self._seconds

    def _measure(self, candidate: _Candidate) -> None:
        """Measure once, or repeatedly for a fast model: the first run includes the resize."""
        model, rows = self._models[candidate.threads], self._rows[: candidate.batch]
        model.set_batch_size(candidate.batch)
        cpu_s, wall_s = self._time_run(model, rows)
        for _ in range(min(_MAX_REPEATS, int(_MEASURE_S / wall_s))):
            again_cpu_s, again_wall_s = self._time_run(model, rows)
            cpu_s, wall_s = min(cpu_s, again_cpu_s), min(wall_s, again_wall_s)
        candidate.cpu_s.append(cpu_s / candidate.batch)
        candidate.wall_s.append(wall_s / candidate.batch)
        self._row_s = candidate.wall_s[-1]

    def _time_run(self, model: TfliteModel, rows: Float32s) -> tuple[float, float]:
        """Return the seconds of this thread's CPU, and of the wall clock."""
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        model.invoke(rows)
        return max(time.thread_time() - cpu_s, 1e-9), max(time.perf_counter() - wall_s, 1e-9)
