"""Registry of drift detectors: to add one, write its module and list it here."""

from __future__ import annotations

from functools import lru_cache

import msgspec
import numpy as np

from agent.arrays import Ints
from agent.drift.detectors.certainty import CertaintyDetector
from agent.drift.detectors.class_share import ClassShareDetector
from agent.drift.detectors.correlation import CorrelationDetector
from agent.drift.detectors.detector import Counter, Detector, Task
from agent.drift.detectors.moments import MomentsDetector
from agent.drift.detectors.variogram import SpeedCounter

MOMENTS, CORRELATION, CERTAINTY, CLASS_SHARE = (
    MomentsDetector(),
    CorrelationDetector(),
    CertaintyDetector(),
    ClassShareDetector(),
)
# Their scores stand one after another in a site's `test_mean` and `test_sd`, and in the CUSUMs.
DETECTORS: tuple[Detector, ...] = (
    MOMENTS,
    CORRELATION,
    CERTAINTY,
    CLASS_SHARE,
)
SPEED = SpeedCounter()
COUNTERS: tuple[Counter, ...] = (*(detector for detector in DETECTORS if isinstance(detector, Counter)), SPEED)


class ScoreLayout(msgspec.Struct, frozen=True, eq=False):
    """Place of each detector's scores among all T of a task."""

    fields: int
    test_count: int
    slices: dict[str, slice]
    subjects: Ints  # (T,)

    def __getitem__(self, detector: str) -> slice:
        return self.slices[detector]

    @property
    def means(self) -> slice:
        return slice(0, self.fields)

    @property
    def spreads(self) -> slice:
        return slice(self.fields, 2 * self.fields)


@lru_cache(maxsize=16)
def get_layout(task: Task) -> ScoreLayout:
    slices: dict[str, slice] = {}
    subjects: list[int] = []
    begin = 0
    for detector in DETECTORS:
        width = detector.width(task)
        slices[detector.name] = slice(begin, begin + width)
        subjects += detector.subjects(task)
        begin += width
    return ScoreLayout(task.fields, begin, slices, np.array(subjects, np.int64))
