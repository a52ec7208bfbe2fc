"""Registry of drift detectors: to add one, write its module and list it here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from outstation.foundation.arrays import Ints, TypedMap
from outstation.ml.drift.detectors.certainty import CertaintyDetector, ExpectedAccuracyDetector
from outstation.ml.drift.detectors.class_share import ClassShareDetector
from outstation.ml.drift.detectors.correlation import CorrelationDetector
from outstation.ml.drift.detectors.detector import ChartDetector, Counter, Detector, ScoreDetector, Task
from outstation.ml.drift.detectors.dispersion import DispersionDetector
from outstation.ml.drift.detectors.further_outputs import FurtherOutputDetector
from outstation.ml.drift.detectors.gate import GateDetector
from outstation.ml.drift.detectors.mewma import MewmaDetector
from outstation.ml.drift.detectors.moments import MomentsDetector
from outstation.ml.drift.detectors.psi import PsiDetector
from outstation.ml.drift.detectors.sampling_rate_watch import SamplingRateWatch
from outstation.ml.drift.numeric import false_alarm_budget

MOMENTS, CORRELATION, CLASS_SHARE = MomentsDetector(), CorrelationDetector(), ClassShareDetector()
# Scores stand one after another in this order: in a site's `test_mean` and `test_sd`, and in the CUSUMs.
DETECTORS: tuple[Detector, ...] = (
    MOMENTS,
    CORRELATION,
    CertaintyDetector(),
    ExpectedAccuracyDetector(),
    CLASS_SHARE,
    DispersionDetector(MOMENTS),
    PsiDetector(MOMENTS),
    MewmaDetector(
        "field_mewma",
        MOMENTS,
        lambda task: task.fields,
        lambda task: false_alarm_budget.mewma_budget(task.fields),
    ),
    MewmaDetector(
        "class_share_mewma",
        CLASS_SHARE,
        CLASS_SHARE.width,
        lambda task: false_alarm_budget.CLASS_SHARE_MEWMA_BUDGET / (1 + len(task.further)),
    ),
    SamplingRateWatch(),
    FurtherOutputDetector(),
)
SCORED = tuple(detector for detector in DETECTORS if isinstance(detector, ScoreDetector))
CHARTS = tuple(detector for detector in DETECTORS if isinstance(detector, ChartDetector))
GATES = tuple(detector for detector in DETECTORS if isinstance(detector, GateDetector))
COUNTERS: tuple[Counter, ...] = tuple(detector for detector in DETECTORS if isinstance(detector, Counter))


class ChartStates(TypedMap):
    """State of each chart, by detector."""

    @classmethod
    def value_types(cls) -> Mapping[str, Any]:
        return {chart.name: chart.state_type for chart in CHARTS}


class GateStates(TypedMap):
    """State of each gate, by detector."""

    @classmethod
    def value_types(cls) -> Mapping[str, Any]:
        return {gate.name: gate.state_type for gate in GATES}

    @classmethod
    def start(cls) -> GateStates:
        return cls({gate.name: gate.start() for gate in GATES})

    @property
    def block_window(self) -> bool:
        """True if the window that led to these states is kept out of all other tests, and out of learning."""
        return any(state.blocks_window for state in self.values())

    @property
    def drifting(self) -> bool:
        return any(state.drifting for state in self.values())


class LearnedBaselines(TypedMap):
    """Learned baseline of each detector at a site, by detector."""

    @classmethod
    def value_types(cls) -> Mapping[str, Any]:
        return {detector.name: detector.baseline_type for detector in DETECTORS if detector.baseline_type is not None}


class ScoreLayout(msgspec.Struct, frozen=True, eq=False):
    """Place of each detector's scores among all T of a task."""

    test_count: int
    slices: dict[str, slice]
    subjects: Ints  # (T,)
    tests: tuple[Ints, ...]  # scores of each subject that have a direction
    field_tests: Ints  # (F, n) those of each field
    field_sums: tuple[str, ...]  # (n,) their names in messages
    detectors: tuple[ScoreDetector, ...]  # those with any score

    def __getitem__(self, detector: str) -> slice:
        return self.slices[detector]


@lru_cache(maxsize=16)
def get_layout(task: Task) -> ScoreLayout:
    slices: dict[str, slice] = {}
    subjects: list[int] = []
    directed: list[bool] = []
    names: list[str] = []
    for detector in SCORED:
        begin = len(subjects)
        subjects += detector.subjects(task)
        directed += [detector.has_direction] * (len(subjects) - begin)
        if detector.has_direction and min(subjects[begin:], default=task.fields) < task.fields:
            names += detector.field_sums
        slices[detector.name] = slice(begin, len(subjects))
    every = np.array(subjects, np.int64)
    tests = tuple(np.flatnonzero((every == subject) & directed) for subject in range(task.subject_count))
    field_tests = np.stack(tests[: task.fields])
    detectors = tuple(detector for detector in SCORED if detector.width(task))
    return ScoreLayout(len(subjects), slices, every, tests, field_tests, tuple(names), detectors)
