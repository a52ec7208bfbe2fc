"""Detector interface: what a drift test counts of rows, learns at a site, scores of a window, and says in an alert.

A score detector gives S scores of each drift window; the test suite runs one CUSUM per score. A chart keeps a state of
its own. A gate runs before both and keeps windows out of them. Detectors know arrays only, neither summaries nor
references. `registry.DETECTORS` lists all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation import text
from outstation.foundation.arrays import AnyArray, Bools, Float32s, Float64s, Ints
from outstation.ml.drift.detectors.cusum import Cusum, windows_to_clear
from outstation.ml.drift.numeric import control_limits, false_alarm_budget
from outstation.ml.drift.numeric.control_limits import ScoreNoise
from outstation.ml.drift.numeric.divergence import Distributions
from outstation.ml.drift.numeric.sums import GroupMoments, Groups
from outstation.ml.drift.outputs.counts import BINS, FurtherOutput
from outstation.protocol.alerts.alert import OUTPUT_PREFIX

EARLY_DRIFT_SHARE = 0.5  # of its limit: a field's sum beyond it counts as a drift that begins
NEAR_LIMIT_SHARE = 0.8
# A rarer class has no statistics of its own, by model windows, and no correlation, by rows.
MIN_CLASS_WINDOWS, MIN_CLASS_ROWS = 8, 30
NO_WEIGHTS: Float64s = np.empty((0, BINS))
OUTPUT, SCORE, JOINT = SUBJECTS = "output", "score", "joint"  # after the fields


class Task(msgspec.Struct, frozen=True):
    """Dimensions of a task: F fields, as many labels as its model names (none for a number), C classes."""

    fields: int
    labels: int
    classes: int
    window_rows: int
    window: int  # model windows per drift window
    further: tuple[FurtherOutput, ...] = ()  # H further outputs

    @property
    def windowed(self) -> bool:
        return self.window_rows > 1

    @property
    def windows_to_clear(self) -> int:
        """Drift windows in a row without evidence that clear an alert."""
        return windows_to_clear(self.window * self.window_rows)

    @property
    def subject_count(self) -> int:
        return self.fields + len(SUBJECTS) + len(self.further)

    def subject(self, name: str) -> int:
        """Return the number of the subject output, score or joint; fields come before these, further outputs after."""
        return self.fields + SUBJECTS.index(name)

    @property
    def answers(self) -> list[int]:
        """Subjects that are answers of the model: output, score and further outputs."""
        further = range(self.fields + len(SUBJECTS), self.subject_count)
        return [self.subject(OUTPUT), self.subject(SCORE), *further]

    def name_subjects(self, fields: Sequence[str]) -> tuple[str, ...]:
        """Return the name of each subject."""
        return (*fields, *SUBJECTS, *(OUTPUT_PREFIX + output.name for output in self.further))


class ModelWindows(msgspec.Struct, frozen=True):
    """Second moments of w model windows, NaN where a field does not move or half of its values are missing."""

    correlations: Float64s  # (w, P) of pairs of fields
    variograms: Float64s  # (w, 2F) mean square differences at two lags, as shares of the mean square; (w, 0) if short


class ClassifiedWindows(msgspec.Struct, frozen=True):
    """Model windows with the class that each is compared with."""

    values: Float32s | Float64s  # (w, D) statistics: means and log variances, or the values of single rows
    measures: Mapping[str, Float64s]  # (w, X) what each detector measured, by detector
    top_scores: Float64s | None  # (w,) scaled; not finite where the model gave none
    classes: Ints  # (w,)
    groups: Groups  # by drift window and class
    class_mean: Float64s  # (C, D) of the shipped reference
    class_sd: Float64s


class DriftWindows(msgspec.Struct, frozen=True):
    """Drift windows to score, W in front: moments of their classes (W, C, D), distributions, and detectors' counts."""

    moments: GroupMoments
    distributions: Distributions
    counts: Mapping[str, Ints]  # (W, C, …) by detector
    scored: dict[str, Float64s] = msgspec.field(default_factory=dict)  # (W, S) values by detector, for later ones


class LearnedWindows(msgspec.Struct, frozen=True):
    """K drift windows that a site's reference is made from, as `DriftWindows`, with what detectors retained of them."""

    moments: GroupMoments
    pooled: GroupMoments  # (C, D)
    distributions: Distributions
    class_sd: Float64s  # (C, D) of the reference that is being made
    min_class_weight: float  # model windows, or rows, below which a class has no mean of its own
    entries: Mapping[str, AnyArray]  # (m, …) by detector: one entry per class that occurred in a window
    window: Ints  # (m,) of each entry
    label: Ints  # (m,)
    step_us: Float64s  # (K,) mean step from row to row, NaN if unknown
    repeated: Float64s  # (K,) share of rows that repeat the row before
    t: Ints  # (K,) middle of each, epoch µs
    seasonality: str  # auto | hour | week | none
    promised: Float64s  # (32,) accuracy of each bin of the top score, or error of each of errors; empty if unknown
    output_weights: Float64s = NO_WEIGHTS  # (R, 32) of the bins of further outputs

    @property
    def class_coefficients(self) -> float:
        """Means that were fitted for the windows of one time: 1, or up to C where a class lasts for many windows."""
        n = self.moments.n.max(-1).astype(np.float64)
        share = n / np.maximum(n.sum(1, keepdims=True), 1)
        total = n.sum(0)
        fitted = float((share**2 * (total.sum() / np.maximum(total, 1))).sum(1).mean())
        deviations = share - share.mean(0)
        lagged, square = float((deviations[1:] * deviations[:-1]).sum()), float((deviations**2).sum())
        return 1 + max(fitted - 1, 0.0) * max(lagged / max(square, 1e-12), 0.0)

    def expand(self, entries: AnyArray) -> Float64s:
        """Return entries (m, X) by window and class (K, C, X); zeros where a class did not occur."""
        out = np.zeros((*self.distributions.output.shape, entries.shape[1]))
        out[self.window, self.label] = entries
        return out


class LearnedScores(msgspec.Struct, frozen=True, dict=True):
    """Scores (K, T) of the learned windows, from which limits are fitted."""

    residuals: Float64s  # of the values, without mean and cycle, and each with the same spread at any hour
    sd: Float64s  # (T,)
    coefficients: Float64s  # (T,) numbers that were fitted to each: the mean, and those of a cycle
    hours: Float64s  # (T,) numbers that were fitted to each spread
    thinning: int  # windows of which one was learned
    slices: Mapping[str, slice]  # place of each detector's scores

    @cached_property
    def z(self) -> Float64s:
        return self.residuals / self.sd


class Baseline(msgspec.Struct, frozen=True, dict=True):
    """Baseline of one detector at a site: statistics of the site's reference, and what the detector learned itself."""

    class_n: Ints  # (C, D)
    class_mean: Float64s
    class_sd: Float64s
    distributions: Distributions
    mean: Float64s  # (S,) of the values
    own: Any  # of the detector's `baseline_type`
    output_weights: Float64s = NO_WEIGHTS  # (R, 32) of the bins of further outputs
    output_edges: tuple[Float64s, ...] = ()  # (V, 31) of each further output

    @cached_property
    def rare(self) -> Bools:
        """(C, D) True for classes that are left out."""
        return find_rare(self.class_n)

    @cached_property
    def mean_sd(self) -> Float64s:
        """(D,) usual spread within a class."""
        return mean_class_sd(self.class_n, self.class_sd)


def find_rare(learned: Ints) -> Bools:
    """Return the classes (C, D) of which too few windows were `learned` (C, D).

    Where these are many, each of them is compared with all classes together, so none is rare.
    """
    rare = learned < MIN_CLASS_WINDOWS
    return np.asarray(rare & (2 * np.where(rare, learned, 0).sum(0) < learned.sum(0)))


def mean_class_sd(class_n: Ints, class_sd: Float64s) -> Float64s:
    """Return the usual spread (D,) within a class, of classes with `class_n` values (C, D) and `class_sd` (C, D)."""
    weight = class_n / np.maximum(class_n.sum(0), 1)
    return np.asarray((weight * class_sd).sum(0))


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
    """Alarm of one subject, as the detector `name` sees it: its CUSUMs (2, S) (too high, too low), and the window."""

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    subject: int
    unit: str
    role: str  # of a field: sensor, category or computed
    further: tuple[FurtherOutput, ...]
    t: tuple[int, int]  # when the window began and ended, epoch µs
    moments: GroupMoments  # (C, D) of the window
    usual: Float64s  # (C, D) class means to expect at its hour and in its operating mode
    distributions: Distributions
    sd: Float64s  # (F,) of the site's rows
    cusum: Cusum  # of all detectors
    limits: Float64s  # (T,)
    all_effects: Float64s  # (T,) of the window
    slices: Mapping[str, slice]
    baselines: Mapping[str, Baseline]
    states: Mapping[str, Any]

    def for_detector(self, name: str) -> Alarm:
        return replace(self, name=name)

    @property
    def place(self) -> slice:
        return self.slices[self.name]

    @property
    def value(self) -> Float64s:
        return self.cusum.value[:, self.place]

    @property
    def windows(self) -> Ints:
        return self.cusum.windows[:, self.place]

    @property
    def effect(self) -> Float64s:
        return self.cusum.effect[:, self.place]

    @property
    def since(self) -> Ints:
        """(2, S) epoch µs."""
        return self.cusum.since[:, self.place]

    @property
    def alarm(self) -> Bools:
        return self.cusum.alarm[:, self.place]

    @property
    def limit(self) -> Float64s:
        return self.limits[self.place]

    @property
    def baseline(self) -> Baseline:
        return self.baselines[self.name]

    @property
    def state(self) -> Any:
        """State of the detector, if it has one."""
        return self.states[self.name]

    def format_windows(self, windows: int, since: int) -> str:
        return text.format_windows(windows, since, self.t[1])

    def mean_effect(self, side: int, test: int) -> float:
        """Return the effect since the change began, or that of the last window.

        A change begins somewhere in its first window, which shows half of it on average: it counts half. Of two windows
        the last one is the better estimate.
        """
        windows, last = self.windows[side, test], float(self.all_effects[self.place][test])
        if windows > 2 or (windows and not np.isfinite(last)):
            return float(self.effect[side, test] / (windows - 0.5))
        return last


class Detector(ABC):
    """Drift test: a `ScoreDetector`, a `ChartDetector` or both, or a `GateDetector`.

    One that counts model windows is a `Counter`, too.
    """

    name: str  # key of its counts, entries, baseline and state
    baseline_type: Any = None  # frozen struct of what it learns at a site, a part of the site's reference

    def learn(self, task: Task, windows: LearnedWindows, scores: LearnedScores) -> Any:
        return None

    def is_valid(self, task: Task, own: Any) -> bool:
        """Return True if shapes and numbers of its learned baseline fit the task."""
        return True


class AlarmDetector(Detector):
    """Detector of the drift of subjects."""

    @abstractmethod
    def describe(self, alarm: Alarm) -> AlertText: ...


class ScoreDetector(AlarmDetector):
    """Detector with S scores per drift window; the test suite runs a CUSUM for each."""

    slack = false_alarm_budget.FIELD_SLACK  # sd of a score that its CUSUM ignores
    min_limit = false_alarm_budget.MIN_CUSUM_LIMIT
    by_class = True  # whether windows are compared within classes
    winsorized = True  # whether odd windows are drawn in while learning
    tests_answers = False  # whether its budget is one that all outputs of the model share
    has_direction = True  # whether a score tells the direction of a change, and so its size in alerts and messages

    @property
    def field_sums(self) -> tuple[str, ...]:
        """Names in messages of the scores of one field, if it scores fields."""
        return (self.name,)

    @abstractmethod
    def width(self, task: Task) -> int:
        """Return S."""

    @abstractmethod
    def subjects(self, task: Task) -> Sequence[int]:
        """Return the subject that each score belongs to (S,)."""

    @abstractmethod
    def min_sd(self, task: Task) -> float:
        """Return the least sd of a value: smaller shifts never matter, however steady a site is."""

    @property
    @abstractmethod
    def budget(self) -> float:
        """False alarms per window, of all S tests together."""

    def kinds(self, task: Task) -> Sequence[slice]:
        """Return the scores that are of one kind, with about the same memory and tails."""
        return (slice(0, self.width(task)),)

    def fit_noise(self, task: Task, scores: LearnedScores) -> ScoreNoise:
        place = scores.slices[self.name]
        return control_limits.fit_noise(
            scores.z[:, place],
            scores.coefficients[place],
            scores.hours[place],
            scores.thinning,
            self.slack,
            self.kinds(task),
        )

    def fit_limits(self, task: Task, scores: LearnedScores) -> Float64s:
        """Return the CUSUM limits (S,)."""
        budget = self.share_budget(task)
        return control_limits.cusum_limits(self.fit_noise(task, scores), self.slack, budget, self.min_limit)

    def share_budget(self, task: Task) -> float:
        """Return its budget, less what further outputs of the model take of it."""
        return self.budget / (1 + len(task.further)) if self.tests_answers else self.budget

    @abstractmethod
    def learn_values(self, task: Task, windows: LearnedWindows) -> Float64s:
        """Return the values (K, S) of learned windows, each against the others; NaN where nothing is to test."""

    @abstractmethod
    def score(self, task: Task, windows: DriftWindows, baseline: Baseline) -> Scores: ...

    def suspended(self, task: Task, moving: Bools, near_alarm: Bools) -> Bools | None:
        """Return which tests (W, S) wait while fields begin to drift (W, F) or one of them nearly alarms (W,)."""
        return None


class ChartWindows(msgspec.Struct, frozen=True):
    """W consecutive drift windows for a chart; while an alarm is open before them, W is 1."""

    task: Task
    baseline: Baseline
    slices: Mapping[str, slice]
    z: Float64s  # (W, T) scores of all detectors, NaN where nothing was tested
    effects: Float64s  # (W, T)
    evidence: AnyArray | None  # (W, …) of the chart
    caution: Float64s  # (T,) factor on the limits
    open_fields: Bools  # (F,) fields with an open drift alert
    t: Ints  # (W,) begin of each, epoch µs


class ChartRun(Protocol):
    """Run of a chart over W windows."""

    @property
    def windows_before_alarm(self) -> int: ...

    def state_after(self, windows: int) -> Any:
        """Return the chart's state after `windows` windows, of which only the last may have an open alarm."""

    def open_alarm(self, cusum: Cusum, windows: int, z: Float64s) -> Cusum:
        """Return the CUSUMs with the alarm that the last of `windows` windows, with scores `z` (T,), opens there."""


class ChartDetector(AlarmDetector):
    """Detector with a state of its own, a frozen struct of arrays, beside the CUSUMs."""

    state_type: Any

    @abstractmethod
    def start(self, task: Task) -> Any: ...

    def compute_evidence(self, task: Task, windows: DriftWindows, baseline: Baseline) -> AnyArray | None:
        """Return numbers (W, …) of each window that do not depend on earlier ones."""
        return None

    @abstractmethod
    def run(self, state: Any, windows: ChartWindows) -> ChartRun: ...

    def open_subjects(self, state: Any) -> Bools | None:
        """Return the subjects with an open alarm of this chart, as far as it has any; None for none."""
        return None

    @abstractmethod
    def reset_subjects(self, state: Any, task: Task, subjects: Bools) -> Any:
        """Forget all that was gathered on these subjects (F + 3 + H,)."""

    def restart(self, state: Any) -> Any:
        """Forget what was gathered towards an alarm, because another one may have caused it."""
        return state


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
