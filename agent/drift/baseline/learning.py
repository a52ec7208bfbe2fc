"""Reference learning: from drift windows to a reference, for a bundle's data and for a site's first clean windows."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent import arrays
from agent.arrays import AnyArray, Bools, Float32s, Float64s, Int32s, Ints
from agent.drift.baseline import fault_limits
from agent.drift.baseline.fault_limits import FaultLimits
from agent.drift.baseline.missing_values import MissingBaseline
from agent.drift.baseline.operating_modes import OperatingModes, find_modes, fit_modes
from agent.drift.baseline.reference import (
    BINS,
    MIN_WINDOWS,
    RECOMMENDED_WINDOWS,
    Reference,
    draft_reference,
    without_cycle,
)
from agent.drift.baseline.sensitivity import measure_sensitivity
from agent.drift.baseline.site import SiteCalibration
from agent.drift.baseline.summary import Summary, summarize
from agent.drift.baseline.symptoms import measure_symptoms
from agent.drift.baseline.transitions import MIN_STEP_SHARE, MIN_TRANSITIONS, count_transitions
from agent.drift.detectors import daily_cycle, moments
from agent.drift.detectors.detector import MIN_CLASS_ROWS, MIN_CLASS_WINDOWS, LearnedScores, LearnedWindows, Task
from agent.drift.detectors.registry import (
    CORRELATION,
    COUNTERS,
    DETECTORS,
    MOMENTS,
    SCORED,
    LearnedBaselines,
    ScoreLayout,
)
from agent.drift.numeric import control_limits, divergence, outliers
from agent.drift.numeric.divergence import Distributions
from agent.drift.numeric.sums import GroupMoments, fit_trend, median, nanmedian
from agent.errors import BadBundle
from agent.indices import bincount
from agent.performance import cbpe

UNTESTED_SD = 1e9  # of a test without learned values
MAX_WINDOWS = 400  # drift windows kept while learning: more add hardly anything
MAX_BYTES = 512 << 10  # of these windows, as long as enough are left to learn from
MIN_RETAINED_WINDOWS = RECOMMENDED_WINDOWS + MIN_WINDOWS

_PER_WINDOW = ("bins", "output", "scores", "t", "step_us", "repeated", "symptoms")
_PER_ENTRY = ("window", "label", "n", "mean", "m2")


class LearningState(msgspec.Struct, frozen=True, eq=False):
    """Drift windows gathered while learning: K of them, and m entries, one per class that occurred in a window.

    Means (from the shipped reference's origin) and squares are float32: calibration needs no more, and it halves the
    state.
    """

    windows: int
    total: Summary
    bins: Int32s  # (K, F, 16)
    output: Int32s  # (K, C)
    scores: Int32s  # (K, 32)
    t: Ints  # (K, 2) begin and end, epoch µs
    window: Ints  # (m,) number of the window of an entry
    label: Ints  # (m,) its class
    n: Int32s  # (m, D)
    mean: Float32s
    m2: Float32s
    detectors: dict[str, AnyArray]  # (m, …) what detectors retain
    step_us: Float64s  # (K,) mean step from row to row, NaN if unknown
    repeated: Float64s  # (K,) share of rows that repeat the row before
    symptoms: Float32s  # (K, F, …) of sensor faults
    total_windows: int = 0  # drift windows, with those that were dropped
    thinning: int = 1  # one window in this many is kept

    @classmethod
    def empty(cls, shipped: Reference) -> LearningState:
        none = np.empty(0, np.int64)
        entries = np.empty((0, len(shipped.origin)), np.float32)
        empty = Summary.empty(shipped)
        return cls(
            windows=0,
            total=empty,
            bins=np.empty((0, len(shipped.fields), BINS // 2), np.int32),
            output=np.empty((0, shipped.class_count), np.int32),
            scores=np.empty((0, BINS), np.int32),
            t=np.empty((0, 2), np.int64),
            window=none,
            label=none,
            n=entries.astype(np.int32),
            mean=entries,
            m2=entries,
            detectors=_retain(shipped.task, empty, none),
            step_us=np.empty(0),
            repeated=np.empty(0),
            symptoms=np.empty((0, len(shipped.fields), fault_limits.SYMPTOMS), np.float32),
        )

    def add(self, drift_window: Summary, task: Task, *, t: tuple[int, int] = (0, 0)) -> LearningState:
        """Add a window that began and ended at `t`. Of many windows only some are kept, evenly over time."""
        if self.windows >= self.capacity:
            return self.thin().add(drift_window, task, t=t)
        total = self.total_windows + 1
        if (total - 1) % self.thinning:
            return replace(self, total=self.total.merge(drift_window), total_windows=total)
        measured = drift_window.class_sums.moments(np.zeros(1))
        classes = np.flatnonzero(measured.n.any(1))
        new: dict[str, Any] = {
            "bins": divergence.coarsen_bins(drift_window.counts)[None],
            "output": drift_window.output[None],
            "scores": drift_window.scores[None],
            "t": [t],
            "step_us": [drift_window.sampling.mean_step_us()],
            "repeated": [drift_window.repeated_share],
            "symptoms": measure_symptoms(drift_window)[None],
            "window": np.full(len(classes), self.windows),
            "label": classes,
            "n": measured.n[classes],
            "mean": measured.mean[classes],
            "m2": measured.m2[classes],
        }
        for name, part in new.items():
            before = getattr(self, name)
            new[name] = np.concatenate([before, np.asarray(part).astype(before.dtype)])
        retained = _retain(task, drift_window, classes)
        return replace(
            self,
            windows=self.windows + 1,
            total=self.total.merge(drift_window),
            detectors={name: np.concatenate([self.detectors[name], part]) for name, part in retained.items()},
            total_windows=total,
            **new,
        )

    def thin(self) -> LearningState:
        """Drop every other window, and from now on keep half as many."""
        every_other, entries = np.arange(0, self.windows, 2), self.window % 2 == 0
        fewer: dict[str, Any] = {name: getattr(self, name)[every_other] for name in _PER_WINDOW} | {
            name: getattr(self, name)[entries] for name in _PER_ENTRY
        }
        fewer["window"] = fewer["window"] // 2
        return replace(
            self,
            windows=len(every_other),
            detectors={name: retained[entries] for name, retained in self.detectors.items()},
            thinning=2 * self.thinning,
            **fewer,
        )

    @property
    def capacity(self) -> int:
        """Return how many windows may be kept: fewer where fields and classes make each of them large."""
        size = sum(part.nbytes for part in (self.bins, self.output, self.scores, self.n, self.mean, self.m2))
        # What a detector retains beside its main numbers is not counted.
        size += sum(part.nbytes for name, part in self.detectors.items() if "." not in name)
        return int(np.clip(MAX_BYTES * self.windows // max(size, 1), MIN_RETAINED_WINDOWS, MAX_WINDOWS))

    @property
    def observed_s(self) -> float:
        """Seconds of readings; a gap or a clock step counts for no more than a few windows do."""
        length = np.maximum(self.t[:, 1] - self.t[:, 0], 0)
        typical = median(length) if len(length) else 0.0
        between = np.clip(self.t[1:, 0] - self.t[:-1, 1], 0, typical)
        capped = np.minimum(length, 4 * typical)
        # Gaps between windows are known only if none was dropped.
        if self.total_windows == self.windows:
            return float(capped.sum() + between.sum()) / 1e6
        return float(capped.mean() * self.total_windows) / 1e6

    @property
    def has_steady_clock(self) -> bool:
        """True if the clock made no step that windows show; otherwise their hour of day is unknown."""
        ends = self.t.ravel()
        return bool((np.diff(ends) >= 0).all()) and (self.t[-1, 1] - self.t[0, 0]) / 1e6 <= 10 * self.observed_s

    @property
    def midpoints(self) -> Ints:
        """(K,) middle of each window, epoch µs."""
        return self.t[:, 0] + (self.t[:, 1] - self.t[:, 0]) // 2

    def moments(self, shipped: Reference) -> GroupMoments:
        """Return the moments (K, C, D) of each drift window and class."""
        n = self._expand(shipped, self.n)
        mean = self._expand(shipped, np.where(self.n > 0, self.mean + shipped.origin, 0.0))
        return GroupMoments(n.astype(np.int64), mean, self._expand(shipped, self.m2))

    def learned_windows(
        self, shipped: Reference, class_moments: GroupMoments, class_sd: Float64s, seasonality: str
    ) -> LearnedWindows:
        """Return these windows as detectors learn from them, with their `class_moments` (K, C, D)."""
        return LearnedWindows(
            class_moments,
            class_moments.pooled(0),
            Distributions(*(part.astype(np.int64) for part in (self.bins, self.output, self.scores))),
            class_sd,
            float(MIN_CLASS_WINDOWS if shipped.windowed else MIN_CLASS_ROWS),
            self.detectors,
            self.window,
            self.label,
            self.step_us,
            self.repeated,
            self.midpoints,
            seasonality,
            np.empty(0)
            if shipped.score_correct is None or not shipped.score_n.any()
            else cbpe.estimate_bin_accuracy(shipped.score_n, shipped.score_correct),
        )

    def to_bytes(self) -> bytes:
        return arrays.to_compressed_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> LearningState:
        """Decode `to_bytes`. Raises ValueError."""
        return arrays.from_compressed_bytes(data, cls)

    def _expand(self, shipped: Reference, entries: AnyArray) -> Float64s:
        out = np.zeros((self.windows, shipped.class_count, entries.shape[1]))
        out[self.window, self.label] = entries
        return out


def _retain(task: Task, drift_window: Summary, classes: Ints) -> dict[str, AnyArray]:
    """Return what detectors keep of these `classes` (m,) of a drift window."""
    retained: dict[str, AnyArray] = {}
    for counter in COUNTERS:
        retained |= counter.retain(task, drift_window.detectors[counter.name][classes])
    return retained


def calibrate_reference(
    shipped: Reference, learning: LearningState, *, source: str, seasonality: str = "auto", number: int = 1
) -> Reference:
    """Return a reference whose counts and calibration come from the gathered windows.

    Raises BadBundle with the reason if there are too few windows, or if they do not agree among themselves.
    """
    windows = learning.windows
    if windows < MIN_WINDOWS:
        raise BadBundle(
            f"no drift reference: {windows} drift windows, and fewer than {MIN_WINDOWS} tell nothing; add data"
        )
    class_moments = learning.moments(shipped)
    usual = moments.fit_class_statistics(
        class_moments.pooled(0), moments.MIN_SD_SHARE if source == "shipped" else moments.MIN_SITE_SD_SHARE
    )
    if not learning.has_steady_clock:
        seasonality = "none"
    learned = learning.learned_windows(shipped, class_moments, usual.sd, seasonality)
    values = np.nan_to_num(MOMENTS.learn_values(shipped.task, learned))
    cycle = daily_cycle.can_fit_daily(learning.midpoints, seasonality)
    residuals, every = _remove_cycle(values, learned)
    hourly = every[:, : usual.sd.shape[1]]
    mean, sd = outliers.calibrate(residuals, shipped.fields)
    total = learning.total
    rows = total.row_sums.moments(shipped.origin[: len(shipped.fields)])
    warnings = (
        [f"only {windows} drift windows: alarms are less reliable than with {RECOMMENDED_WINDOWS}"]
        if windows < RECOMMENDED_WINDOWS
        else []
    )
    if source == "site" and not cycle:
        warnings += outliers.detect_step_change(values, shipped.fields)
    spread = np.sqrt(rows.m2[0] / np.maximum(rows.n[0], 1)) if source == "shipped" else shipped.sd
    reference = replace(
        shipped,
        made=source,
        drift_windows=windows,
        warning="; ".join(warnings) or None,
        counts=total.counts,
        missing=total.missing,
        missing_values=_learn_missing_values(shipped, learning),
        fault_limits=_learn_fault_limits(shipped, learning, spread, class_moments, usual, hourly),
        n=rows.n[0],
        mean=rows.mean[0],
        m2=rows.m2[0],
        longest=np.maximum(shipped.longest, total.longest),
        reach=_learn_reach(shipped, residuals, every),
        class_n=usual.n,
        class_mean=usual.mean,
        class_sd=usual.sd,
        test_mean=mean,
        test_sd=sd,
        output=total.output,
        score_n=total.scores,
        score_correct=None,  # no labels yet say which of these answers were right
    )
    if source == "shipped":
        return reference
    accuracy = cbpe.expected_accuracy_spread(shipped.score_n, shipped.score_correct, learning.scores.astype(np.int64))
    transitions = count_transitions(residuals[:, : len(shipped.fields)], learning.output.astype(np.int64))
    return _add_site_calibration(reference, learning, learned, number, accuracy, transitions)


def _learn_reach(shipped: Reference, residuals: Float64s, cycle: Float64s) -> Float64s | None:
    """Return how far fields may wander beyond the shipped limits, from `residuals` and their `cycle` (K, 2F)."""
    fields = len(shipped.fields)
    fitted = np.where((cycle[:, :fields] != 0).any(0), 1.0 + 2 * daily_cycle.HARMONICS, 1.0)
    memory = control_limits.fit_autocorrelation(residuals[:, :fields], fitted)
    reach = fault_limits.compute_reach(len(residuals) * (1 - memory) / (1 + memory))
    return reach if reach.any() else None


def _learn_missing_values(shipped: Reference, learning: LearningState) -> MissingBaseline:
    """Return how values were missing in the windows, and in those of the shipped reference."""
    total = learning.total
    missing = MissingBaseline.from_windows(
        learning.symptoms[..., fault_limits.MISSING].astype(np.float64),
        total.rows / max(learning.total_windows, 1),
        learning.thinning,
        total.missing,
        total.rows,
    )
    return missing if shipped.missing_values is None else missing.merge(shipped.missing_values)


def _learn_fault_limits(
    shipped: Reference,
    learning: LearningState,
    sd: Float64s,
    class_moments: GroupMoments,
    usual: moments.ClassStatistics,
    hourly: Float64s,
) -> FaultLimits:
    """Return the symptoms of faults that are none here, against rows of this `sd` (F,).

    Classes are as `usual` but for the cycle `hourly` (K, D) of their means, in class sd.
    """
    honest = FaultLimits.learn(
        learning.symptoms.astype(np.float64),
        sd,
        fault_limits.compute_misfit(
            class_moments,
            usual.mean + hourly[:, None] * usual.sd,
            without_cycle(usual.sd, hourly),
            np.arange(len(shipped.fields)),
        ),
    )
    return honest if shipped.fault_limits is None else honest.merge(shipped.fault_limits)


def compute_residuals(shipped: Reference, learning: LearningState, learned: Reference, seasonality: str) -> Float64s:
    """Return what the means and spreads (K, 2F) of the windows behind a `learned` reference leave without its cycle.

    In class sd, each window against the mean of the others.
    """
    if not learning.has_steady_clock:
        seasonality = "none"
    windows = learning.learned_windows(shipped, learning.moments(shipped), learned.class_sd, seasonality)
    return _remove_cycle(MOMENTS.learn_values(shipped.task, windows), windows)[0]


def _remove_cycle(values: Float64s, learned: LearnedWindows) -> tuple[Float64s, Float64s]:
    """Return values (K, T) without their daily cycle, and that cycle (K, T)."""
    if not daily_cycle.can_fit_daily(learned.t, learned.seasonality):
        return values, np.zeros_like(values)
    fit = daily_cycle.fit(values, learned.t, learned.seasonality)
    return fit.residuals, fit.cycle.evaluate(learned.t)


def _add_site_calibration(
    reference: Reference,
    learning: LearningState,
    learned: LearnedWindows,
    number: int,
    accuracy: tuple[float, float] | None,
    transitions: int,
) -> Reference:
    task, layout = reference.task, reference.layout
    values = np.concatenate([detector.learn_values(task, learned) for detector in SCORED], axis=1)
    tested = (~np.isnan(values)).sum(0) >= MIN_WINDOWS
    mean, sd, residuals, cycle, modes, settled = _calibrate_scores(task, layout, values, tested, learned, transitions)
    coefficients = cycle.coefficients + (0 if modes is None else modes.coefficients - 1)
    for detector in SCORED:
        coefficients[layout[detector.name]] += learned.class_coefficients - 1 if detector.by_class else 0.0
    scores = LearnedScores(residuals, sd, coefficients, cycle.hours, learning.thinning, layout.slices)
    limits = np.concatenate([detector.fit_limits(task, scores) for detector in SCORED])
    weight = reference.class_n / np.maximum(reference.class_n.sum(0), 1)
    class_sd = (weight * reference.class_sd).sum(0)
    baselines = _learn_baselines(task, learned, scores)
    share = reference.class_n.sum(1) / max(int(reference.class_n.sum()), 1)
    sensitivity = measure_sensitivity(
        task,
        scores,
        mean,
        np.where(tested, sd, np.inf),
        limits,
        cycle,
        class_sd,
        share @ baselines[CORRELATION.name].mean,
    )
    site = SiteCalibration(
        baselines=baselines,
        limits=limits,
        sensitivity=sensitivity,
        independent_windows=_count_independent_windows(task, scores),
        transitions=transitions,
        modes=modes,
        modes_settled=settled,
        waves=cycle.waves,
        hours=daily_cycle.count_hours(learned.t),
        learned=(int(learning.t[0, 0]), int(learning.t[-1, 1])),
        number=number,
        accuracy=accuracy,
        steps=learning.total.steps,
        rest=cycle.rest if cycle.has_rest_days else None,
        rest_begins=cycle.rest_begins,
        rest_lasts=cycle.rest_lasts,
        spread=cycle.spread if cycle.spread.any() else None,
    )
    warnings = [reference.warning] if reference.warning else []
    if not settled:
        warnings.append(
            f"the learned windows show only {transitions} changes between modes of operation, and a mode that they "
            "do not show will alarm; learn for longer"
        )
    warnings += sensitivity.find_warning(reference.fields, reference.sd)
    return replace(
        reference,
        test_mean=mean,
        test_sd=np.where(tested, sd, UNTESTED_SD),
        site=site,
        warning="; ".join(warnings) or None,
    )


def _learn_baselines(task: Task, learned: LearnedWindows, scores: LearnedScores) -> LearnedBaselines:
    learning = (detector for detector in DETECTORS if detector.baseline_type is not None)
    return LearnedBaselines({detector.name: detector.learn(task, learned, scores) for detector in learning})


def _count_independent_windows(task: Task, scores: LearnedScores) -> float:
    """Return how many independent windows would tell as much of the field whose mean or spread is known worst.

    A steady trend is no lack of windows: the guard names it.
    """
    _, steady = fit_trend(scores.residuals)
    parts = (scores, replace(scores, residuals=steady, coefficients=scores.coefficients + 1))
    return float(np.max([MOMENTS.fit_noise(task, part).mean_windows for part in parts], axis=0).min())


def _calibrate_scores(
    task: Task, layout: ScoreLayout, values: Float64s, tested: Bools, learned: LearnedWindows, transitions: int
) -> tuple[Float64s, Float64s, Float64s, daily_cycle.Cycle, OperatingModes | None, bool]:
    """Return mean and sd (T,) of all detectors' values (K, T), residuals (K, T), the cycle and modes they are
    without, and whether more windows would hardly show another mode.

    `tested` (T,) have values in enough windows, among which there are so many `transitions`.
    """
    min_sd = np.empty(layout.test_count)
    for detector in SCORED:
        min_sd[layout[detector.name]] = detector.min_sd(task)
    # Slices, as numpy adds up a copy of columns in another order.
    unclipped = [layout[detector.name] for detector in SCORED if not detector.winsorized]
    middle = nanmedian(np.where(tested, values, 0.0))
    present = ~np.isnan(values)
    known, modes = np.where(tested & present, values, middle), None
    candidates = find_modes((known - middle)[:, : task.fields]) if transitions else None
    settled = candidates is None or (
        candidates.is_settled and (transitions >= MIN_TRANSITIONS or transitions < MIN_STEP_SHARE * candidates.changes)
    )
    if candidates is not None and candidates.count > 1 and settled:
        # Modes before the cycle: harmonics of a day explain a few visits by chance.
        assigned, inside = candidates.of_window, (candidates.of_window >= 0)[:, None]
        modes, present = fit_modes(candidates, known - middle), present & inside
        known = np.where(inside, known - modes.offset[assigned], middle)
    (mean, residuals), cycle = outliers.winsorize(known, middle, min_sd), daily_cycle.Cycle.empty(values.shape[1])
    if daily_cycle.can_fit_daily(learned.t, learned.seasonality):
        fit = daily_cycle.fit(known, learned.t, learned.seasonality, min_sd)
        _, residuals = outliers.winsorize(fit.residuals, median(fit.residuals), min_sd)
        mean, cycle = fit.mean, fit.cycle
        for place in unclipped:
            residuals[:, place] = fit.residuals[:, place]
    else:
        for place in unclipped:
            mean[place] = known[:, place].mean(0)
            residuals[:, place] = known[:, place] - mean[place]
    if modes is not None:
        residuals = np.where(inside, residuals / modes.scale[assigned], 0.0)
    # Windows without a value stand in the middle: they are no proof of a small spread.
    n = present.sum(0)
    sd = residuals.std(0, ddof=1) * np.sqrt((len(values) - 1) / np.maximum(n - 1, 1))
    return mean, np.maximum(sd, min_sd), residuals, cycle, modes, settled


def build_reference(
    features: Float32s,
    starts: Ints,
    window_rows: int,
    predicted: Ints,
    scores: Float32s | None,
    window: int,
    *,
    fields: tuple[str, ...],
    labels: tuple[str, ...] = (),
    t: Ints | None = None,
    seasonality: str = "auto",
) -> Reference:
    """Build the shipped reference from reference data, in the order it was recorded.

    `features` (n, F) physical units, NaN missing; `starts` (w,) row offsets of model windows of `window_rows`;
    `predicted` (w,) the classes that the model names and `scores` (w, K) its scores; `window` model windows per drift
    window; `t` (n,) epoch µs, if known. Readings that change with the hour of day agree only once that is taken out,
    which takes three days. Raises BadBundle.
    """
    rows = infinities_to_nan(features)
    top = None if scores is None else np.asarray(scores, np.float64).max(axis=1)
    base = draft_reference(rows, starts, window_rows, window=window, fields=fields, labels=labels, scores=top)
    learning = LearningState.empty(base)
    for i in range(0, len(starts) - window + 1, window):
        inside = slice(i, i + window)
        part = rows[int(starts[i]) : int(starts[i + window - 1]) + window_rows]
        local = starts[inside] - starts[i]
        drift_window = summarize(base, part, local, predicted[inside], None if top is None else top[inside])
        span = (0, 0) if t is None else (int(t[starts[i]]), int(t[starts[i + window - 1] + window_rows - 1]))
        learning = learning.add(drift_window, base.task, t=span)
    try:
        return calibrate_reference(base, learning, source="shipped", seasonality="none")
    except BadBundle as problem:
        if learning.windows < MIN_WINDOWS:
            raise
        if t is not None and daily_cycle.can_fit_daily(learning.midpoints, seasonality):
            return calibrate_reference(base, learning, source="shipped", seasonality=seasonality)
        raise BadBundle(
            f"{problem}; give readings of three whole days with times, longer drift windows ([drift] window, now "
            f"{window}), or readings without the change"
        ) from None


def with_score_accuracy(reference: Reference, top_scores: Float64s, right: Bools) -> Reference:
    """Return the reference with how often scores (w,) of held-out data were `right` (w,), for the accuracy estimate."""
    places = np.searchsorted(reference.score_edges, top_scores, side="right")
    counts = [bincount(part, minlength=BINS) for part in (places, places[right])]
    return replace(reference, score_n=counts[0], score_correct=counts[1])


def infinities_to_nan(features: Float32s) -> Float64s:
    """Return the values as float64, with infinities as missing values."""
    rows = np.asarray(features, dtype=np.float64)
    return rows if np.isfinite(rows).all() else np.where(np.isfinite(rows), rows, np.nan)
