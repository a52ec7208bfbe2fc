"""At which rate a site's readings come and its signals move: what was gathered of it, what is usual, what is not.

rate      readings come more than 5 % faster or slower, and beyond what the learned windows did among themselves. A
          stream whose readings come irregularly has no rate to lose.
repeated  more rows than in any learned window say again what the row before said, in all fields

A fault counts from the second window in a row on: a backlog that arrives at once is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from agent.drift import calibration, cusum, daily, limits, pace
from agent.drift.codec import Floats, Ints
from agent.drift.joint import Pairs, usual, usual_without
from agent.drift.statistics import RARE

if TYPE_CHECKING:
    from agent.drift.summary import Summary

OFF, SDS, BEYOND = 0.05, 6.0, 1.5  # share; sd of learned windows; times the farthest of them
STEADY = 0.1  # sd of the logarithm of a window's mean step, from which on there is no rate
REPEATED, RISE = 0.1, 1.5  # share of rows; times the most of a learned window
LEAST_STEP_SD, LEAST_PACE_SD = 0.002, 0.02
FEW = 20  # learned windows

Int32s = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
Float32s = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class Gathered:
    """Of K drift windows, and of m classes that occurred in one of them."""

    windows: Floats  # (K, 2 + F) mean step in µs (NaN: not known); shares of rows repeated, of each field's missing
    t: Ints  # (K,) middle of each, epoch µs
    window: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # (m,) 0, 1, …
    label: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    n: Int32s = field(default_factory=lambda: np.empty((0, 0), np.int32))  # (m, F) model windows with a pace
    pace: Float32s = field(default_factory=lambda: np.empty((0, 0), np.float32))  # their mean

    @classmethod
    def none(cls) -> Gathered:
        return cls(np.empty((0, 0)), np.empty(0, np.int64))

    def add(self, window: Summary, t: tuple[int, int]) -> Gathered:
        found = pace.measured(window.pace)
        seen = np.flatnonzero(found.weight.any(1))
        one = np.concatenate([[window.ticks.step_us(), repeated_share(window)], missing_share(window)])
        return Gathered(
            windows=np.concatenate([self.windows.reshape(-1, len(one)), one[None]]),
            t=np.append(self.t, t[0] + (t[1] - t[0]) // 2),
            window=np.append(self.window, np.full(len(seen), len(self.t))),
            label=np.append(self.label, seen),
            n=np.concatenate([self.n.reshape(-1, len(one) - 2), found.weight[seen].astype(np.int32)]),
            pace=np.concatenate([self.pace.reshape(-1, len(one) - 2), found.z[seen].astype(np.float32)]),
        )

    def thinned(self) -> Gathered:
        """Every other one."""
        some = self.window % 2 == 0
        entries = {name: getattr(self, name)[some] for name in ("label", "n", "pace")}
        return replace(self, windows=self.windows[::2], t=self.t[::2], window=self.window[some] // 2, **entries)

    def pairs(self, classes: int) -> Pairs:
        """Per drift window, class and field, (K, C, F)."""
        weight, z = np.zeros((2, len(self.t), classes, self.n.shape[1]))
        weight[self.window, self.label], z[self.window, self.label] = self.n, self.pace
        return Pairs(weight, z)


@dataclass(frozen=True, eq=False)
class Usual:
    """What is usual at a site."""

    step_us: float  # 0: readings come irregularly
    step_off: float  # logarithm of how far a window's mean step may be off
    repeated: float  # share of rows in the learned window that had most
    missing: Floats  # (F,) likewise
    pace: Floats  # (C, F) of classes
    pace_mean: float  # of a window's shift
    pace_sd: float  # 0: nothing is known of it
    cycle: daily.Cycle  # of the shift

    def fits(self, classes: int, fields: int) -> bool:
        """Whether it is of so many classes and fields, and holds together."""
        cycle = self.cycle
        shapes = self.missing.shape, self.pace.shape, cycle.waves.shape, cycle.rest.shape
        right = (fields,), (classes, fields), (2 * daily.WAVES, 1), (1 + 2 * daily.WAVES, 1)
        numbers = [self.step_us, self.step_off, self.repeated, self.pace_mean, self.pace_sd]
        known = [np.array(numbers), self.missing, self.pace, cycle.waves, cycle.rest]
        positive = min(self.step_us, self.step_off, self.repeated, self.pace_sd) >= 0
        return shapes == right and positive and all(bool(np.isfinite(one).all()) for one in known)

    def z(self, window: Summary, t: int, windows: int) -> tuple[float, float]:
        """The score of a window's shift, in the middle of epoch µs `t`, and the shift; NaN where nothing tells."""
        if self.pace_sd <= 0:
            return math.nan, math.nan
        expected = self.pace_mean + float(self.cycle.at(np.array([t]))[0, 0])
        found = float(pace.shift(pace.measured(window.pace), self.pace))
        return float(cusum.scores(np.array(found), np.array(expected), np.array(self.pace_sd), windows)), found - expected


def learn(gathered: Gathered, classes: int, *, windowed: bool, strata: str) -> Usual | None:
    """None where too few windows were gathered, as in a state that an older version saved."""
    if len(gathered.t) < FEW:
        return None
    fields = gathered.windows.shape[1] - 2
    step_us, off = _step(gathered.windows[:, 0])
    nothing = Usual(
        step_us=step_us,
        step_off=off,
        repeated=float(gathered.windows[:, 1].max()),
        missing=gathered.windows[:, 2:].max(0),
        pace=np.zeros((classes, fields)),
        pace_mean=0.0,
        pace_sd=0.0,
        cycle=daily.Cycle.none(1),
    )
    if not windowed:
        return nothing
    found = gathered.pairs(classes)
    shifts = pace.shift(found, usual_without(found, float(RARE)))
    told = ~np.isnan(shifts)
    if told.sum() < FEW:
        return nothing
    values = np.where(told, shifts, np.median(shifts[told]))[:, None]
    fit = daily.fit(values, gathered.t, strata)
    mean, left = calibration.drawn(fit.left, np.median(fit.left, axis=0), LEAST_PACE_SD)
    return replace(
        nothing,
        pace=usual(found, float(RARE)),
        pace_mean=float((fit.mean + mean)[0]),
        pace_sd=float(max(left.std(ddof=1), LEAST_PACE_SD)),
        cycle=fit.cycle,
    )


def limit(windows: int, stretch: float) -> float:
    """Of the sums of the shift's scores."""
    return limits.h(1, windows, limits.K_FIELDS, limits.PACE) * stretch


def _step(steps: Floats) -> tuple[float, float]:
    """The usual one, and the logarithm of how far one may be off; 0 where there is none."""
    told = np.log(steps[~np.isnan(steps)])
    if len(told) < FEW:
        return 0.0, 0.0
    middle = float(np.median(told))
    mean, left = calibration.drawn(told[:, None], np.array([middle]), LEAST_STEP_SD)
    sd = float(left.std(ddof=1))
    if sd > STEADY:
        return 0.0, 0.0
    return math.exp(float(mean[0])), max(math.log1p(OFF), SDS * sd, BEYOND * float(np.abs(left).max()))


def fault(window: Summary, at_site: Usual) -> str:
    """rate, repeated or nothing."""
    step = window.ticks.step_us()
    if at_site.step_us and step > 0 and abs(math.log(step / at_site.step_us)) > at_site.step_off:
        return "rate"
    if repeated_share(window) > max(at_site.repeated + REPEATED, RISE * at_site.repeated):
        return "repeated"
    return ""


def repeated_share(window: Summary) -> float:
    return float(window.ticks.repeated[0]) / max(1, window.rows)


def missing_share(window: Summary) -> Floats:
    """(F,)"""
    return np.asarray(window.missing / max(1, window.rows))
