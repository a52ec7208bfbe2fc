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
from agent.model.inference.runtime import MOST_BATCH, NAME, Model
from agent.model.inference.tuning import SECONDS, Choice, cores, digest, machine

BATCHES = (1, 4, 8, 16, 32, 64, MOST_BATCH)
MOST_THREADS = 4
# A batch of each size, and a last one that is shorter.
ROWS = MOST_BATCH + 27
MORE_THREADS = 1.15
_AS_FAST = 0.98
# A size so far behind the best after a first look is not looked at again.
_BEHIND = 0.8
_SETTLED_TURNS, _NO_CHANGE = 5, 0.005
_MOMENT_S, _MOST_REPEATS = 0.002, 50

Floats = NDArray[np.float32]


def choose(
    content: bytes, rows: Floats, most_bytes: int, seconds: float = SECONDS, output: str | int | None = None
) -> Choice:
    """Try it with `rows`, some that the model takes, within `most_bytes`; `output` as `Model` has it.

    Raises BadBundle where it does not run.
    """
    trial = _Trial(content, np.resize(rows, (ROWS, *rows.shape[1:])), most_bytes, seconds, output)
    for batch in BATCHES if trial.dynamic else BATCHES[:1]:
        if not trial.look_at(batch, 1):
            break
    trial.go_on(until=0.6)
    one = trial.fastest(1)
    for threads in range(2, min(cores(), MOST_THREADS) + 1):
        for batch in sorted({one.batch, trial.largest}):
            trial.look_at(batch, threads)
    trial.go_on(until=1.0)
    best = trial.best()
    pace = round(best.pace, 1)
    return Choice(digest(content), NAME, machine(), best.batch, best.threads, pace, trial.unequal, output)


class _Candidate(msgspec.Struct):
    """A batch size on some threads; the seconds that a row took each time, of this thread's CPU and on the wall."""

    batch: int
    threads: int
    cpu_s: list[float] = msgspec.field(default_factory=list)
    wall_s: list[float] = msgspec.field(default_factory=list)

    @property
    def pace(self) -> float:
        """Rows per second: of one thread as on a free processor, of several as they came, with all else that ran."""
        return 1 / (min(self.cpu_s) if self.threads == 1 else statistics.median(self.wall_s))


class _Trial:
    def __init__(self, content: bytes, rows: Floats, most_bytes: int, seconds: float, output: str | int | None) -> None:
        self._content, self._rows, self._most_bytes, self._output = content, rows, most_bytes, output
        self._begin_s, self._seconds = time.perf_counter(), seconds
        self._models = {1: Model(content, 1, output=output)}
        self._found: list[_Candidate] = []
        self.unequal: list[int] = []
        self.dynamic = self._models[1].dynamic
        self._row_s = self._timed(self._models[1], rows[:1])[1]
        # As many rows are compared as half of the time is enough for.
        self._compared = rows[: max(1, min(ROWS, int(seconds / 2 / (1 + len(BATCHES)) / self._row_s)))]
        self._truth = self._models[1].invoke(self._compared)

    @property
    def largest(self) -> int:
        return max(one.batch for one in self._found)

    def look_at(self, batch: int, threads: int) -> bool:
        """Whether it gives the same bits, and a first measurement; False where twice as much is out of reach."""
        if self._found and not self._lasts(2 * batch * self._row_s):
            return False
        # A whole batch must be among what is compared, and a shorter one.
        if batch > 1 and self.dynamic and batch >= len(self._compared):
            return False
        before = _resident_bytes()
        try:
            if threads not in self._models:
                self._models[threads] = Model(self._content, batch, threads, self._output)
            model = self._models[threads]
            model.use(batch)
            equal = np.array_equal(model.invoke(self._compared), self._truth, equal_nan=True)
            found = _Candidate(model.batch, threads)
            self._measure(found)
        except BadBundle:
            return False
        if equal:
            self._found.append(found)
        else:
            self.unequal.append(batch)
        return batch == 1 or 2 * (_resident_bytes() - before) < self._most_bytes

    def go_on(self, until: float) -> None:
        """Measure in turns those that may still win, up to that part of the time or until nothing changes any more."""
        settled = 0
        while settled < _SETTLED_TURNS:
            before = [one.pace for one in self._found]
            best = max(before)
            for one in [one for one in self._found if one.pace > _BEHIND * best or len(one.wall_s) == 1]:
                if not self._lasts(one.batch * self._row_s + (1 - until) * self._seconds):
                    return
                self._measure(one)
            changed = any(abs(one.pace / was - 1) > _NO_CHANGE for one, was in zip(self._found, before, strict=True))
            settled = 0 if changed else settled + 1

    def fastest(self, threads: int) -> _Candidate:
        """The smallest batch of those that are as good as equally fast."""
        found = [one for one in self._found if one.threads == threads]
        best = max(one.pace for one in found)
        return next(one for one in found if one.pace >= _AS_FAST * best)

    def best(self) -> _Candidate:
        best = self.fastest(1)
        for threads in sorted({one.threads for one in self._found} - {1}):
            more = self.fastest(threads)
            if more.pace > MORE_THREADS * best.pace:
                best = more
        return best

    def _lasts(self, seconds: float) -> bool:
        return time.perf_counter() + seconds < self._begin_s + self._seconds

    def _measure(self, one: _Candidate) -> None:
        """Once, or as often as fits into a moment: the first of many includes the change of size."""
        model, rows = self._models[one.threads], self._rows[: one.batch]
        model.use(one.batch)
        cpu_s, wall_s = self._timed(model, rows)
        for _ in range(min(_MOST_REPEATS, int(_MOMENT_S / wall_s))):
            again_cpu_s, again_wall_s = self._timed(model, rows)
            cpu_s, wall_s = min(cpu_s, again_cpu_s), min(wall_s, again_wall_s)
        one.cpu_s.append(cpu_s / one.batch)
        one.wall_s.append(wall_s / one.batch)
        self._row_s = one.wall_s[-1]

    def _timed(self, model: Model, rows: Floats) -> tuple[float, float]:
        """Seconds of this thread's CPU, and on the wall."""
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        model.invoke(rows)
        return max(time.thread_time() - cpu_s, 1e-9), max(time.perf_counter() - wall_s, 1e-9)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()
