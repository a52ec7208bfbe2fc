"""Detector interface: what a drift test counts of rows, learns at a site, scores of a window, and says in an alert.

A detector gives S scores of each drift window. The test suite runs one CUSUM per score, so a detector holds no state of
its own. It knows arrays only, neither summaries nor references. `registry.DETECTORS` lists all detectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from agent import text
from agent.arrays import AnyArray, Bools, Float32s, Float64s, Ints
from agent.drift.detectors.season import SlowTrend
from agent.drift.numeric.sums import GroupMoments, Groups

EARLY_DRIFT_SHARE = 0.5  # of its limit: a field's sum beyond it counts as a drift that begins
NEAR_LIMIT_SHARE = 0.8
OUTPUT, SCORE, JOINT = SUBJECTS = "output", "score", "joint"  # after the fields


class Task(msgspec.Struct, frozen=True):
    """Dimensions of a task: F fields, as many labels as its model names (none for a number), C classes."""

    fields: int
    labels: int
    classes: int
    window_rows: int
    window: int  # model windows per drift window

    @property
    def windowed(self) -> bool:
        return self.window_rows > 1

    def subject(self, name: str) -> int:
        """Return the number of the subject output, score or joint; fields come before these."""
        return self.fields + SUBJECTS.index(name)


class ModelWindows(msgspec.Struct, frozen=True):
    """Rows of model windows (w, n, F) in physical units, NaN missing, and what several detectors need of them."""

    rows: Float64s
    centered: Float64s  # less each window's mean; missing values are 0
    mean_square: Float64s  # (w, F) about the mean; NaN where half of a window's values are missing
    floor: Float64s  # (F,) least mean square that counts as movement


class ClassifiedWindows(msgspec.Struct, frozen=True):
    """Model windows with the class that each is compared with."""

    values: Float64s  # (w, D) statistics: means and log variances, or the values of single rows
    measures: Mapping[str, Float64s]  # (w, X) what each detector measured, by detector
    top_scores: Float64s | None  # (w,) scaled; not finite where the model gave none
    classes: Ints  # (w,)
    groups: Groups  # by drift window and class
    class_mean: Float64s  # (C, D) of the shipped reference
    class_sd: Float64s


class DriftWindows(msgspec.Struct, frozen=True):
    """Drift windows to score, W in front: moments of their classes (W, C, D), predictions, and detectors' counts."""

    moments: GroupMoments
    output: Ints  # (W, C) predictions of each class
    counts: Mapping[str, Ints]  # (W, C, …) by detector


class LearnedWindows(msgspec.Struct, frozen=True):
    """K drift windows that a site's reference is made from, as `DriftWindows`, with what detectors retained of them."""

    moments: GroupMoments
    pooled: GroupMoments  # (C, D)
    output: Ints  # (K, C)
    class_sd: Float64s  # (C, D) of the reference that is being made
    min_class_weight: float  # model windows, or rows, below which a class has no mean of its own
    entries: Mapping[str, AnyArray]  # (m, …) by detector: one entry per class that occurred in a window
    window: Ints  # (m,) of each entry
    label: Ints  # (m,)


class Learned(msgspec.Struct, frozen=True):
    """Values of learned windows (K, S), NaN where there was nothing to test, and what later ones are compared with."""

    values: Float64s
    baseline: Float64s | None = None


class Baseline(msgspec.Struct, frozen=True):
    """Baseline of one detector at a site: class statistics, its own learned numbers, and its tests' mean values."""

    class_n: Ints  # (C, D)
    class_mean: Float64s
    class_sd: Float64s
    own: Float64s | None
    mean: Float64s  # (S,) of the values


class Scores(msgspec.Struct, frozen=True):
    """Values of W drift windows (W, S), NaN where there was nothing to test, and their effects in units for people.

    Without effects, these are the values less the usual ones. `effect_scale` (S,) is the effect of one unit of a value.
    """

    values: Float64s
    effects: Float64s | None = None
    effect_scale: Float64s | None = None


def round_significant(value: float, digits: int = 6) -> float:
    return float(f"{float(value):.{digits}g}")


class AlertText(msgspec.Struct, frozen=True):
    """A sentence without its full stop, and the numbers behind it. `evidence` names the test."""

    sentence: str
    evidence: dict[str, Any]


class Alarm(msgspec.Struct, frozen=True):
    """An alarm of one subject: CUSUMs (2, S) of the detector (too high, too low), and the window that raised it."""

    fields: tuple[str, ...]
    labels: tuple[str, ...]
    subject: int
    unit: str
    value: Float64s
    windows: Ints
    effect: Float64s
    since: Ints  # epoch µs
    alarm: Bools
    limit: Float64s  # (S,)
    effects: Float64s  # (S,) of the last window
    t: tuple[int, int]  # when the window began and ended, epoch µs
    moments: GroupMoments  # (C, D) of the window
    baseline: Baseline
    sd: Float64s  # (F,) of the site's rows
    recent_z: Float32s  # (16, 2F) scores of means and spreads in the last windows
    slow_trend: SlowTrend

    def format_windows(self, windows: int, since: int) -> str:
        return text.format_windows(windows, since, self.t[1])

    def mean_effect(self, side: int, test: int) -> float:
        """Return the effect per window since the change began, or that of the last window."""
        windows = self.windows[side, test]
        return float(self.effect[side, test] / windows if windows else self.effects[test])


class Detector(Protocol):
    """Drift test with S scores per drift window."""

    name: str  # key of its counts, entries and baseline
    slack: float  # sd of a score that its CUSUM ignores
    winsorized: bool  # whether odd windows are drawn in while learning

    def width(self, task: Task) -> int:
        """Return S."""

    def subjects(self, task: Task) -> Sequence[int]:
        """Return the subject that each score belongs to (S,)."""

    def min_sd(self, task: Task) -> float:
        """Return the least sd of a value: smaller shifts never matter, however steady a site is."""

    def limit(self, task: Task, windows: int, autocorrelation: float, stretch: float) -> float:
        """Return the CUSUM limit, given how alike neighboring class shares are and by how much limits stretch."""

    def learn(self, task: Task, learned: LearnedWindows) -> Learned: ...

    def score(self, task: Task, windows: DriftWindows, baseline: Baseline) -> Scores: ...

    def suspended(self, task: Task, moving: Bools, near_alarm: Bools) -> Bools | None:
        """Return which tests (W, S) wait while fields begin to drift (W, F) or one of them nearly alarms (W,)."""

    def describe(self, alarm: Alarm) -> AlertText: ...


@runtime_checkable
class Counter(Protocol):
    """Numbers that a detector takes of model windows and adds to a summary."""

    name: str

    def count_width(self, task: Task) -> int:
        """Return how many whole numbers a class adds to a summary."""

    def measure(self, windows: ModelWindows) -> Float64s | None:
        """Return X numbers of each model window (w, X), NaN where unknown. Not asked for single rows."""

    def count(self, task: Task, windows: ClassifiedWindows) -> Ints:
        """Return whole numbers per group (G, `count_width`); they add exactly, in any order."""

    def retain(self, task: Task, counts: Ints) -> dict[str, AnyArray]:
        """Return what learning keeps of counts (m, `count_width`), one entry per class that occurred."""
