"""Site calibration: what only a site's own reference has."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from agent.arrays import Float64s, Ints
from agent.drift.baseline import resolution as steps
from agent.drift.baseline.resolution import Resolution
from agent.drift.detectors import daily_cycle
from agent.drift.detectors import mewma as together
from agent.drift.detectors.daily_cycle import Cycle
from agent.drift.detectors.detector import Counter, Task
from agent.drift.detectors.registry import DETECTORS
from agent.drift.detectors.sampling_rate import RateBaseline


class SiteCalibration(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Calibration of a site: how its windows differ among themselves.

    A site's `test_mean` and `test_sd` cover the T scores of all detectors, in the order of the registry.
    """

    class_means: dict[str, Float64s]  # (C, X) by detector; of all classes together where one was too rare
    psi_limits: Float64s  # (F + 2,) of the fields, the answers, the certainty
    stretch: float  # of the limits, because neighbouring windows are alike
    waves: Float64s  # (6, T) of a day, added to test_mean by the hour; zeros where there is no cycle
    hours: Ints  # (24,) windows learned in each hour of the day, UTC
    learned: tuple[int, int]  # when the first began and the last ended, epoch µs
    number: int  # 1 for the first reference that this device learned for the task
    # None in one learned before these were told.
    accuracy: tuple[float, float] | None = None  # that certainty leads to expect: mean, and sd over three windows
    steps: Ints | None = None  # (F, 64) from row to row, by size
    rate: RateBaseline | None = None
    # Days of rest, see `daily`: what is added to test_mean then, (7, T); None where they are as the others.
    rest: Float64s | None = None
    rest_begins: int = 0  # µs into the epoch week
    rest_lasts: int = 0
    # Limits of what fields' means, and answers' shares, come to together; and what answers of windows in a row have in
    # common.
    together: tuple[float, float] = (together.UNREACHABLE_LIMIT, together.UNREACHABLE_LIMIT)
    alike: float = 0.0

    @cached_property
    def resolution(self) -> Resolution | None:
        return None if self.steps is None else Resolution.from_steps(self.steps)

    @cached_property
    def cycle(self) -> Cycle:
        none = Cycle.empty(self.waves.shape[1])
        if self.rest is None:
            return Cycle(self.waves, none.rest, 0, 0)
        return Cycle(self.waves, self.rest, self.rest_begins, self.rest_lasts)

    def to_dict(self) -> dict[str, Any]:
        """Return its number, period and cycles, for people."""
        followed = {"daily": bool(self.waves.any()), "weekly": self.cycle.has_rest_days}
        return {"number": self.number, "learned": list(self.learned)} | followed

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
            "steps": self.steps is None or self.steps.shape == (fields, steps.SIZE_BINS),
            "rest": self.rest is None or self._is_valid_rest(self.rest, tests),
            "rate": self.rate is None or self.rate.is_valid(classes, fields),
        }
        wrong = [f"site.{name}" for name, holds in rules.items() if not holds]
        return wrong + ([] if np.isfinite(self.waves).all() else ["site.waves"])

    def _is_valid_rest(self, rest: Float64s, tests: int) -> bool:
        within = 0 <= self.rest_begins < daily_cycle.WEEK_US and 0 < self.rest_lasts < daily_cycle.WEEK_US
        return within and rest.shape == (1 + 2 * daily_cycle.HARMONICS, tests) and bool(np.isfinite(rest).all())
