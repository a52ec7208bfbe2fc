"""Site calibration: what only a site's own reference has."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from agent.arrays import Float64s, Ints
from agent.drift.baseline.resolution import SIZE_BINS, Resolution
from agent.drift.detectors import daily_cycle
from agent.drift.detectors.daily_cycle import Cycle
from agent.drift.detectors.detector import Counter, Task
from agent.drift.detectors.registry import DETECTORS
from agent.drift.detectors.sampling_rate import RateBaseline


class SiteCalibration(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Calibration of a site: how its windows differ among themselves.

    A site's `test_mean` and `test_sd` cover the T scores of all detectors, in the order of the registry.
    """

    class_means: dict[str, Float64s]  # (C, X) by detector; a rare class has those of all classes together
    psi_limits: Float64s  # (F + 2,) of the fields, the predictions, the certainty
    stretch: float  # factor on limits, because neighboring windows are alike
    waves: Float64s  # (6, T) harmonics of a day, added to test_mean; zeros without a cycle
    hours: Ints  # (24,) learned windows in each hour of the day, UTC
    learned: tuple[int, int]  # begin of the first and end of the last window, epoch µs
    number: int  # 1 for the first reference that this device learned for the task
    accuracy: tuple[float, float] | None  # expected from the certainty: mean, and sd over three windows
    steps: Ints  # (F, 64) from row to row, by size
    rate: RateBaseline | None  # None where too few windows were gathered
    rest: Float64s | None  # (7, T) added to test_mean on days of rest; None where these are as the others
    rest_begins: int  # µs into the epoch week
    rest_lasts: int
    together: tuple[float, float]  # MEWMA limits of fields' means and of class shares
    alike: float  # lag-1 autocorrelation of class shares

    @cached_property
    def resolution(self) -> Resolution:
        return Resolution.from_steps(self.steps)

    @cached_property
    def cycle(self) -> Cycle:
        if self.rest is None:
            return Cycle(self.waves, Cycle.empty(self.waves.shape[1]).rest, 0, 0)
        return Cycle(self.waves, self.rest, self.rest_begins, self.rest_lasts)

    def to_dict(self) -> dict[str, Any]:
        """Return its number, period and cycles, for people."""
        cycles = {"daily": bool(self.waves.any()), "weekly": self.cycle.has_rest_days}
        return {"number": self.number, "learned": list(self.learned)} | cycles

    def find_invalid(self, task: Task, tests: int) -> list[str]:
        """Return the members that do not fit the task."""
        classes, fields = task.classes, task.fields
        widths = {
            detector.name: (classes, detector.width(task)) for detector in DETECTORS if isinstance(detector, Counter)
        }
        shapes = {
            "psi_limits": (fields + 2,),
            "hours": (24,),
            "waves": (2 * daily_cycle.HARMONICS, tests),
        }
        rules = {name: getattr(self, name).shape == shape for name, shape in shapes.items()} | {
            "class_means": {name: means.shape for name, means in self.class_means.items()} == widths,
            "stretch": 1 <= self.stretch <= 3,
            "together": min(self.together) > 0,
            "alike": 0 <= self.alike < 1,
            "steps": self.steps.shape == (fields, SIZE_BINS),
            "rest": self.rest is None or self._is_valid_rest(self.rest, tests),
            "rate": self.rate is None or self.rate.is_valid(classes, fields),
        }
        wrong = [f"site.{name}" for name, holds in rules.items() if not holds]
        return wrong + ([] if np.isfinite(self.waves).all() else ["site.waves"])

    def _is_valid_rest(self, rest: Float64s, tests: int) -> bool:
        within = 0 <= self.rest_begins < daily_cycle.WEEK_US and 0 < self.rest_lasts < daily_cycle.WEEK_US
        return within and rest.shape == (1 + 2 * daily_cycle.HARMONICS, tests) and bool(np.isfinite(rest).all())
