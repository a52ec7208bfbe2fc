"""How many rows at once, and on how many threads: tried on the device, within two seconds.

Rules of `choose`:
- only what gives the bits that single rows on one thread give
- no batch that takes more memory than it may, and none that would outlast what is left of the time
- one thread, unless more are faster by a sixth: other work waits for the processor, too
- of batches that are as good as equally fast the smallest: it takes the least memory
"""

from __future__ import annotations

import resource
import statistics
import time
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.errors import BadBundle
from agent.model.inference.runtime import MAX_BATCH, RUNTIME_NAME, TfliteModel
from agent.model.inference.tuning import MAX_TUNING_S, Tuning, count_cores, describe_machine, model_digest

BATCH_SIZES = (1, 4, 8, 16, 32, 64, MAX_BATCH)
MAX_THREADS = 4
# A batch of each size, and a last one that is shorter.
SAMPLE_ROWS = MAX_BATCH + 27
MIN_THREAD_SPEEDUP = 1.15
_EQUAL_SPEED = 0.98
# A size so far behind the best after a first look is not looked at again.
_DROP_BELOW = 0.8
_STABLE_ROUNDS, _STABLE_TOLERANCE = 5, 0.005
_MEASURE_S, _MAX_REPEATS = 0.002, 50

Floats = NDArray[np.float32]


def tune(
    content: bytes, rows: Floats, max_bytes: int, seconds: float = MAX_TUNING_S, output: str | int | None = None
) -> Tuning:
    """Try it with `rows`, some that the model takes, within `most_bytes`; `output` as `Model` has it.

    Raises BadBundle where it does not run.
    """
    trial = _Tuner(content, np.resize(rows, (SAMPLE_ROWS, *rows.shape[1:])), max_bytes, seconds, output)
    for batch in BATCH_SIZES if trial.has_dynamic_batch else BATCH_SIZES[:1]:
        if not trial.try_candidate(batch, 1):
            break
    trial.measure_rounds(time_share=0.6)
    one = trial.find_fastest(1)
    for threads in range(2, min(count_cores(), MAX_THREADS) + 1):
        for batch in sorted({one.batch, trial.largest_batch}):
            trial.try_candidate(batch, threads)
    trial.measure_rounds(time_share=1.0)
    best = trial.find_best()
    pace = round(best.rows_per_s, 1)
    return Tuning(
        model_digest(content),
        RUNTIME_NAME,
        describe_machine(),
        best.batch,
        best.threads,
        pace,
        trial.inexact_batches,
        output,
    )


class _Candidate(msgspec.Struct):
    """A batch size on some threads; the seconds that a row took each time, of this thread's CPU and on the wall."""

    batch: int
    threads: int
    cpu_s: list[float] = msgspec.field(default_factory=list)
    wall_s: list[float] = msgspec.field(default_factory=list)

    @property
    def rows_per_s(self) -> float:
        """Rows per second: of one thread as on a free processor, of several as they came, with all else that ran."""
        return 1 / (min(self.cpu_s) if self.threads == 1 else statistics.median(self.wall_s))


class _Tuner:
    def __init__(self, content: bytes, rows: Floats, max_bytes: int, seconds: float, output: str | int | None) -> None:
        self._content, self._rows, self._max_bytes, self._output = content, rows, max_bytes, output
        self._start_s, self._seconds = time.perf_counter(), seconds
        self._models = {1: TfliteModel(content, 1, output=output)}
        self._candidates: list[_Candidate] = []
        self.inexact_batches: list[int] = []
        self.has_dynamic_batch = self._models[1].has_dynamic_batch
        self._row_s = self._time_run(self._models[1], rows[:1])[1]
        # As many rows are compared as half of the time is enough for.
        self._compared_rows = rows[: max(1, min(SAMPLE_ROWS, int(seconds / 2 / (1 + len(BATCH_SIZES)) / self._row_s)))]
        self._expected = self._models[1].invoke(self._compared_rows)

    @property
    def largest_batch(self) -> int:
        return max(one.batch for one in self._candidates)

    def try_candidate(self, batch: int, threads: int) -> bool:
        """Whether it gives the same bits, and a first measurement; False where twice as much is out of reach."""
        if self._candidates and not self._has_time_for(2 * batch * self._row_s):
            return False
        # A whole batch must be among what is compared, and a shorter one.
        if batch > 1 and self.has_dynamic_batch and batch >= len(self._compared_rows):
            return False
        before = _resident_bytes()
        try:
            if threads not in self._models:
                self._models[threads] = TfliteModel(self._content, batch, threads, self._output)
            model = self._models[threads]
            model.set_batch_size(batch)
            equal = np.array_equal(model.invoke(self._compared_rows), self._expected, equal_nan=True)
            found = _Candidate(model.batch, threads)
            self._measure(found)
        except BadBundle:
            return False
        if equal:
            self._candidates.append(found)
        else:
            self.inexact_batches.append(batch)
        return batch == 1 or 2 * (_resident_bytes() - before) < self._max_bytes

    def measure_rounds(self, time_share: float) -> None:
        """Measure in turns those that may still win, up to that part of the time or until nothing changes any more."""
        settled = 0
        while settled < _STABLE_ROUNDS:
            before = [one.rows_per_s for one in self._candidates]
            best = max(before)
            for one in [one for one in self._candidates if one.rows_per_s > _DROP_BELOW * best or len(one.wall_s) == 1]:
                if not self._has_time_for(one.batch * self._row_s + (1 - time_share) * self._seconds):
                    return
                self._measure(one)
            changed = any(
                abs(one.rows_per_s / was - 1) > _STABLE_TOLERANCE
                for one, was in zip(self._candidates, before, strict=True)
            )
            settled = 0 if changed else settled + 1

    def find_fastest(self, threads: int) -> _Candidate:
        """The smallest batch of those that are as good as equally fast."""
        found = [one for one in self._candidates if one.threads == threads]
        best = max(one.rows_per_s for one in found)
        return next(one for one in found if one.rows_per_s >= _EQUAL_SPEED * best)

    def find_best(self) -> _Candidate:
        best = self.find_fastest(1)
        for threads in sorted({one.threads for one in self._candidates} - {1}):
            more = self.find_fastest(threads)
            if more.rows_per_s > MIN_THREAD_SPEEDUP * best.rows_per_s:
                best = more
        return best

    def _has_time_for(self, seconds: float) -> bool:
        return time.perf_counter() + seconds < self._start_s + self._seconds

    def _measure(self, candidate: _Candidate) -> None:
        """Once, or as often as fits into a moment: the first of many includes the change of size."""
        model, rows = self._models[candidate.threads], self._rows[: candidate.batch]
        model.set_batch_size(candidate.batch)
        cpu_s, wall_s = self._time_run(model, rows)
        for _ in range(min(_MAX_REPEATS, int(_MEASURE_S / wall_s))):
            again_cpu_s, again_wall_s = self._time_run(model, rows)
            cpu_s, wall_s = min(cpu_s, again_cpu_s), min(wall_s, again_wall_s)
        candidate.cpu_s.append(cpu_s / candidate.batch)
        candidate.wall_s.append(wall_s / candidate.batch)
        self._row_s = candidate.wall_s[-1]

    def _time_run(self, model: TfliteModel, rows: Floats) -> tuple[float, float]:
        """Seconds of this thread's CPU, and on the wall."""
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        model.invoke(rows)
        return max(time.thread_time() - cpu_s, 1e-9), max(time.perf_counter() - wall_s, 1e-9)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()
