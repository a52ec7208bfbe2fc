"""Reference learning: from drift windows to a reference, for a bundle's data and for a site's first clean windows."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Bools, Float32s, Float64s, Ints
from outstation.foundation.errors import BadBundle
from outstation.foundation.indices import bincount
from outstation.foundation.text import pluralize
from outstation.ml.drift.baseline import fault_limits, window_statistics
from outstation.ml.drift.baseline.fault_limits import FaultLimits
from outstation.ml.drift.baseline.learning_state import LearningState
from outstation.ml.drift.baseline.missing_values import MissingBaseline
from outstation.ml.drift.baseline.operating_modes import OperatingModes, find_modes, fit_modes
from outstation.ml.drift.baseline.reference import (
    BINS,
    MIN_WINDOWS,
    RECOMMENDED_WINDOWS,
    Reference,
    draft_reference,
    without_cycle,
)
from outstation.ml.drift.baseline.sensitivity import Sensitivity, measure_sensitivity
from outstation.ml.drift.baseline.site import SiteCalibration
from outstation.ml.drift.baseline.summary import summarize
from outstation.ml.drift.baseline.transitions import MIN_STEP_SHARE, MIN_TRANSITIONS, count_transitions
from outstation.ml.drift.detectors import daily_cycle, moments
from outstation.ml.drift.detectors.daily_cycle import Cycle
from outstation.ml.drift.detectors.detector import LearnedScores, LearnedWindows, Task, mean_class_sd
from outstation.ml.drift.detectors.registry import (
    CORRELATION,
    DETECTORS,
    MOMENTS,
    SCORED,
    LearnedBaselines,
    ScoreLayout,
)
from outstation.ml.drift.numeric import control_limits, outliers
from outstation.ml.drift.numeric.sums import GroupMoments, fit_trend, median, nanmedian
from outstation.ml.drift.outputs import reference as further_outputs
from outstation.ml.drift.outputs.counts import FurtherOutput
from outstation.ml.performance import cbpe

UNTESTED_SD = 1e9  # of a test without learned values


def calibrate_reference(
    shipped: Reference, learning: LearningState, *, source: str, seasonality: str = "auto", number: int = 1
) -> Reference:
    """Return a reference whose counts and calibration come from the gathered windows.

    Raises BadBundle with the reason if there are too few windows, or if they do not agree among themselves.
    """
    windows = learning.windows
    if windows < MIN_WINDOWS:
        few = pluralize(windows, "drift window")
        raise BadBundle(f"no drift reference: {few}, and fewer than {MIN_WINDOWS} tell nothing; add data")
    class_moments = learning.moments(shipped)
    usual = moments.fit_class_statistics(
        class_moments.pooled(0), moments.MIN_SD_SHARE if source == "shipped" else moments.MIN_SITE_SD_SHARE
    )
    if not learning.has_steady_clock:
        seasonality = "none"
    learned = learning.learned_windows(shipped, class_moments, usual.sd, seasonality)
    values = np.nan_to_num(MOMENTS.learn_values(shipped.task, learned))
    residuals, cycle = _remove_cycle(values, learned)
    mean, sd = outliers.calibrate(residuals, shipped.fields)
    reference = replace(
        _count_rows(shipped, learning),
        made=source,
        warning=_describe_windows(shipped, learned, values, source),
        missing_values=_learn_missing_values(shipped, learning),
        reach=_learn_reach(shipped, residuals, cycle),
        class_n=usual.n,
        class_mean=usual.mean,
        class_sd=usual.sd,
        test_mean=mean,
        test_sd=sd,
    )
    spread = reference.sd if source == "shipped" else shipped.sd
    hourly = cycle[:, : usual.sd.shape[1]]
    limits = _learn_fault_limits(shipped, learning, spread, class_moments, usual, hourly)
    reference = replace(reference, fault_limits=limits)
    if source == "shipped":
        return reference
    transitions = count_transitions(residuals[:, : len(shipped.fields)], learning.output.astype(np.int64))
    return _add_site_calibration(reference, shipped, learning, learned, number, transitions)


def _count_rows(shipped: Reference, learning: LearningState) -> Reference:
    """Return the reference with the rows, answers and scores of the gathered windows for its own."""
    total = learning.total
    rows = total.row_sums.moments(shipped.origin[: len(shipped.fields)])
    return replace(
        shipped,
        drift_windows=learning.windows,
        counts=total.counts,
        missing=total.missing,
        n=rows.n[0],
        mean=rows.mean[0],
        m2=rows.m2[0],
        longest=np.maximum(shipped.longest, total.longest),
        output=total.output,
        score_n=total.scores,
        score_correct=None,  # no labels yet say which of these answers were right
        error=None,
        further=further_outputs.with_counts(shipped.further, total.further),
    )


def _describe_windows(shipped: Reference, learned: LearnedWindows, values: Float64s, source: str) -> str | None:
    """Return what is wrong with the learned windows and their `values` (K, T), if anything is."""
    windows, warnings = len(values), list[str]()
    if windows < RECOMMENDED_WINDOWS:
        warnings.append(f"only {windows} drift windows: alarms are less reliable than with {RECOMMENDED_WINDOWS}")
    if source == "site" and not daily_cycle.can_fit_daily(learned.t, learned.seasonality):
        warnings += outliers.detect_step_change(values, shipped.fields)
    return "; ".join(warnings) or None


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
    """Learn how far symptoms go without a fault, against rows of this `sd` (F,).

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


class ScoreCalibration(msgspec.Struct, frozen=True, eq=False):
    """Calibration of the T scores of all detectors, from K learned windows."""

    tested: Bools  # (T,) have values in enough windows
    mean: Float64s  # (T,)
    sd: Float64s  # (T,)
    residuals: Float64s  # (K, T) without cycle and modes
    cycle: Cycle
    modes: OperatingModes | None
    is_settled: bool  # more windows would hardly show another mode

    def scores(self, learned: LearnedWindows, layout: ScoreLayout, thinning: int) -> LearnedScores:
        """Return the scores, one of `thinning` windows each, with the number of means that were fitted to them."""
        coefficients = self.cycle.coefficients + (0 if self.modes is None else self.modes.coefficients - 1)
        for detector in SCORED:
            coefficients[layout[detector.name]] += learned.class_coefficients - 1 if detector.by_class else 0.0
        return LearnedScores(self.residuals, self.sd, coefficients, self.cycle.hours, thinning, layout.slices)


def _add_site_calibration(
    reference: Reference,
    shipped: Reference,
    learning: LearningState,
    learned: LearnedWindows,
    number: int,
    transitions: int,
) -> Reference:
    """Add the calibration of a site whose windows show `transitions` changes between modes of operation."""
    task, layout = reference.task, reference.layout
    values = np.concatenate([detector.learn_values(task, learned) for detector in SCORED], axis=1)
    usual = _calibrate_scores(task, layout, values, learned, transitions)
    scores = usual.scores(learned, layout, learning.thinning)
    limits = np.concatenate([detector.fit_limits(task, scores) for detector in SCORED])
    baselines = _learn_baselines(task, learned, scores)
    sensitivity = _measure_sensitivity(reference, usual, scores, limits, baselines)
    cycle = usual.cycle
    site = SiteCalibration(
        baselines=baselines,
        limits=limits,
        sensitivity=sensitivity,
        independent_windows=_count_independent_windows(task, scores),
        transitions=transitions,
        modes=usual.modes,
        modes_settled=usual.is_settled,
        waves=cycle.waves,
        hours=daily_cycle.count_hours(learned.t),
        learned=(int(learning.t[0, 0]), int(learning.t[-1, 1])),
        number=number,
        accuracy=cbpe.promised_spread(shipped.promised, learning.distributions.promises),
        steps=learning.total.steps,
        rest=cycle.rest if cycle.has_rest_days else None,
        rest_begins=cycle.rest_begins,
        rest_lasts=cycle.rest_lasts,
        spread=cycle.spread if cycle.spread.any() else None,
    )
    return replace(
        reference,
        test_mean=usual.mean,
        test_sd=np.where(usual.tested, usual.sd, UNTESTED_SD),
        site=site,
        warning=_describe_site(reference, site),
    )


def _describe_site(reference: Reference, site: SiteCalibration) -> str | None:
    """Return the reference's warning, and what the site's tests will miss or alarm on."""
    warnings = [reference.warning] if reference.warning else []
    if not site.modes_settled:
        warnings.append(
            f"the learned windows show only {site.transitions} changes between modes of operation, and a mode that "
            "they do not show will alarm; learn for longer"
        )
    warnings += site.sensitivity.find_warning(reference.fields, reference.sd)
    return "; ".join(warnings) or None


def _measure_sensitivity(
    reference: Reference,
    usual: ScoreCalibration,
    scores: LearnedScores,
    limits: Float64s,
    baselines: LearnedBaselines,
) -> Sensitivity:
    """Measure what the tests find with these `limits` (T,), by the classes as frequent as they were learned."""
    share = reference.class_n.sum(1) / max(int(reference.class_n.sum()), 1)
    return measure_sensitivity(
        reference.task,
        scores,
        usual.mean,
        np.where(usual.tested, usual.sd, np.inf),
        limits,
        usual.cycle,
        mean_class_sd(reference.class_n, reference.class_sd),
        (share[:, None] * baselines[CORRELATION.name].mean).sum(0),
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
    task: Task, layout: ScoreLayout, values: Float64s, learned: LearnedWindows, transitions: int
) -> ScoreCalibration:
    """Calibrate all detectors' values (K, T) of windows with `transitions` changes of the mode."""
    tested = (~np.isnan(values)).sum(0) >= MIN_WINDOWS
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
    (mean, residuals), cycle = outliers.winsorize(known, middle, min_sd), Cycle.empty(values.shape[1])
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
    return ScoreCalibration(tested, mean, np.maximum(sd, min_sd), residuals, cycle, modes, settled)


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
    further: Sequence[FurtherOutput] = (),
    answers: Float64s | None = None,
) -> Reference:
    """Build the shipped reference from reference data, in the order it was recorded.

    `features` (n, F) physical units, NaN missing; `starts` (w,) row offsets of model windows of `window_rows`;
    `predicted` (w,) the classes that the model names and `scores` (w, K) its scores; `window` model windows per drift
    window; `t` (n,) epoch µs, if known; `answers` (w, P) those of `further` outputs. Readings that change with the hour
    of day agree only once that is taken out, which takes three days. Raises BadBundle.
    """
    rows = window_statistics.infinities_to_nan(features)
    top = None if scores is None else np.asarray(scores, np.float64).max(axis=1)
    base = draft_reference(
        rows,
        starts,
        window_rows,
        window=window,
        fields=fields,
        labels=labels,
        scores=top,
        further=further,
        answers=answers,
    )
    learning = _learn_windows(base, rows, starts, window_rows, predicted, top, window, t, answers)
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


def _learn_windows(
    base: Reference,
    rows: Float64s,
    starts: Ints,
    window_rows: int,
    predicted: Ints,
    top: Float64s | None,
    window: int,
    t: Ints | None,
    answers: Float64s | None,
) -> LearningState:
    """Return what is learned from the whole drift windows of reference data; `top` (w,) the highest scores."""
    learning = LearningState.empty(base)
    for i in range(0, len(starts) - window + 1, window):
        inside = slice(i, i + window)
        first, end = int(starts[i]), int(starts[i + window - 1]) + window_rows
        drift_window = summarize(
            base,
            rows[first:end],
            starts[inside] - first,
            predicted[inside],
            None if top is None else top[inside],
            None if answers is None else answers[inside],
        )
        learning = learning.add(drift_window, base.task, t=(0, 0) if t is None else (int(t[first]), int(t[end - 1])))
    return learning


def with_score_accuracy(reference: Reference, top_scores: Float64s, right: Bools) -> Reference:
    """Return the reference with how often scores (w,) of held-out data were `right` (w,), for the accuracy estimate."""
    places = np.searchsorted(reference.score_edges, top_scores, side="right")
    counts = [bincount(part, minlength=BINS) for part in (places, places[right])]
    return replace(reference, score_n=counts[0], score_correct=counts[1])
