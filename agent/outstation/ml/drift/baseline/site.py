"""Site calibration: what only a site's own reference has."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints
from outstation.ml.drift.baseline.operating_modes import OperatingModes
from outstation.ml.drift.baseline.resolution import SIZE_BINS, Resolution
from outstation.ml.drift.baseline.sensitivity import Sensitivity
from outstation.ml.drift.detectors import daily_cycle
from outstation.ml.drift.detectors.daily_cycle import Cycle
from outstation.ml.drift.detectors.detector import Task
from outstation.ml.drift.detectors.registry import DETECTORS, LearnedBaselines
from outstation.ml.drift.numeric.sums import MAX_COUNT, are_counts

MIN_INDEPENDENT_WINDOWS = 10  # fewer tell too little of what is usual


class SiteCalibration(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Calibration of a site: how its windows differ among themselves.

    A site's `test_mean` and `test_sd` cover the T scores of all detectors, in the order of the registry.
    """

    baselines: LearnedBaselines
    limits: Float64s  # (T,) of CUSUMs
    sensitivity: Sensitivity
    independent_windows: float  # that would give as good a mean of the field whose mean is known worst
    transitions: int  # between operating modes, that the learned windows show
    modes: OperatingModes | None  # None where the learned windows have none
    modes_settled: bool  # whether more windows would hardly show another one
    waves: Float64s  # (6, T) harmonics of a day, added to test_mean; zeros without a cycle
    hours: Ints  # (24,) learned windows in each hour of the day, UTC
    learned: tuple[int, int]  # begin of the first and end of the last window, epoch µs
    number: int  # 1 for the first reference that this device learned for the task
    accuracy: tuple[float, float] | None  # expected, or a regression model's error: mean, and sd over three windows
    steps: Ints  # (F, 64) from row to row, by size
    rest: Float64s | None  # (7, T) added to test_mean on days of rest; None where these are as the others
    rest_begins: int  # µs into the epoch week
    rest_lasts: int
    spread: Float64s | None  # (4, T) harmonics of a day, of the logarithm of test_sd; None where all hours are alike

    @property
    def needs_more_windows(self) -> bool:
        """True if the learned windows tell too little of what is usual: too alike, or of too few modes."""
        return self.independent_windows < MIN_INDEPENDENT_WINDOWS or not self.modes_settled

    @property
    def mode_count(self) -> int:
        """Operating modes that windows are compared within."""
        return 1 if self.modes is None else len(self.modes.offset)

    @cached_property
    def resolution(self) -> Resolution:
        return Resolution.from_steps(self.steps)

    @cached_property
    def cycle(self) -> Cycle:
        none = Cycle.empty(self.waves.shape[1])
        rest, spread = (
            none.rest if self.rest is None else self.rest,
            none.spread if self.spread is None else self.spread,
        )
        return Cycle(self.waves, rest, self.rest_begins, self.rest_lasts, spread)

    def to_dict(self) -> dict[str, Any]:
        """Return its number, period and cycles, for people."""
        cycles = {"daily": bool(self.waves.any()), "weekly": self.cycle.has_rest_days}
        modes = {"modes": self.mode_count, "transitions": self.transitions}
        return {"number": self.number, "learned": list(self.learned)} | cycles | modes

    def find_invalid(self, task: Task, tests: int) -> list[str]:
        """Return the members that do not fit the task."""
        rules = {
            "hours": self.hours.shape == (24,),
            "waves": self.waves.shape == (2 * daily_cycle.HARMONICS, tests) and bool(np.isfinite(self.waves).all()),
            "limits": self.limits.shape == (tests,) and bool((self.limits > 0).all()),
            "independent_windows": self.independent_windows > 0,
            "sensitivity": self.sensitivity.is_valid(task.fields),
            "modes": self.modes is None or self.modes.is_valid(task.fields, tests),
            "transitions": 0 <= self.transitions <= MAX_COUNT,
            "steps": self.steps.shape == (task.fields, SIZE_BINS) and are_counts(self.steps),
            "rest": self.rest is None or self._is_valid_rest(self.rest, tests),
            "spread": self.spread is None
            or (
                self.spread.shape == (2 * daily_cycle.SPREAD_HARMONICS, tests) and bool(np.isfinite(self.spread).all())
            ),
        } | {
            f"baselines.{detector.name}": detector.is_valid(task, self.baselines[detector.name])
            for detector in DETECTORS
            if detector.name in self.baselines
        }
        return [f"site.{name}" for name, holds in rules.items() if not holds]

    def _is_valid_rest(self, rest: Float64s, tests: int) -> bool:
        within = 0 <= self.rest_begins < daily_cycle.WEEK_US and 0 < self.rest_lasts < daily_cycle.WEEK_US
        return within and rest.shape == (1 + 2 * daily_cycle.HARMONICS, tests) and bool(np.isfinite(rest).all())
