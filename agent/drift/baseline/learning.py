"""From drift windows to a reference: `build` for a bundle's data, `settle` also for a device's first clean windows."""

from __future__ import annotations

import msgspec
import numpy as np
from msgspec.structs import replace

from agent import arrays
from agent.arrays import Bools, Float16s, Float32s, Float64s, Int32s, Ints
from agent.drift.baseline.reference import BINS, MIN_WINDOWS, RECOMMENDED_WINDOWS, Reference, draft_reference
from agent.drift.baseline.row_counts import SCORE_SCALE
from agent.drift.baseline.site import SiteCalibration
from agent.drift.baseline.summary import Summary, summarize
from agent.drift.detectors import correlation, daily_cycle, mewma, outliers, psi, window_statistics
from agent.drift.detectors import sampling_rate as rate
from agent.drift.detectors.correlation import WeightedMeans
from agent.drift.detectors.sampling_rate import RateHistory
from agent.drift.numeric import false_alarm_budget
from agent.drift.numeric.middle import median, nanmedian
from agent.drift.numeric.sums import GroupMoments
from agent.errors import BadBundle
from agent.performance import cbpe

UNTESTED_SD = 1e9  # sd of a test that nothing was learned of
MAX_WINDOWS = 400  # drift windows kept while learning: more tell hardly more
MAX_BYTES = 512 << 10  # of what is kept of them, as long as these are enough to learn from
MIN_RETAINED_WINDOWS = RECOMMENDED_WINDOWS + MIN_WINDOWS


class LearningState(msgspec.Struct, frozen=True, eq=False):
    """Drift windows gathered so far: K of them, and m entries, one for each class that occurred in one of them.

    Means (from the shipped reference's origin) and squares are float32: calibration needs no more, and it halves
    the state.
    """

    windows: int
    total: Summary
    bins: Int32s  # (K, F, 16)
    output: Int32s  # (K, C)
    scores: Int32s  # (K, 32)
    t: Ints  # (K, 2) when each began and ended, epoch µs
    window: Ints  # (m,) 0, 1, …
    label: Ints  # (m,)
    n: Int32s  # (m, D)
    mean: Float32s
    m2: Float32s
    weight: Float32s  # (m, 1) of the class's pairs
    z: Float16s  # (m, P), NaN where a pair tells nothing
    top_scores: Ints  # (m, 2)
    rate: RateHistory = msgspec.field(default_factory=RateHistory.empty)
    total_windows: int = 0  # drift windows, those let go among them
    thinning: int = 1  # of so many one is kept

    @classmethod
    def empty(cls, shipped: Reference) -> LearningState:
        fields, none = len(shipped.fields), np.empty(0, np.int64)
        entries = np.empty((0, len(shipped.origin)), np.float32)
        pair_entries = np.empty((0, len(correlation.field_pairs(fields))), np.float16)
        return cls(
            windows=0,
            total=Summary.empty(shipped),
            bins=np.empty((0, fields, BINS // 2), np.int32),
            output=np.empty((0, shipped.class_count), np.int32),
            scores=np.empty((0, BINS), np.int32),
            t=np.empty((0, 2), np.int64),
            window=none,
            label=none,
            n=entries.astype(np.int32),
            mean=entries,
            m2=entries,
            weight=np.empty((0, 1), np.float32),
            z=pair_entries,
            top_scores=np.empty((0, 2), np.int64),
        )

    def add(self, drift_window: Summary, *, windowed: bool, t: tuple[int, int] = (0, 0)) -> LearningState:
        """With one that began and ended at `t`. Of many only some are kept, evenly over the time."""
        if self.windows >= self.capacity:
            return self.thin().add(drift_window, windowed=windowed, t=t)
        passed = self.window_count + 1
        if (passed - 1) % self.thinning:
            return replace(self, total=self.total.merge(drift_window), total_windows=passed)
        found = drift_window.class_sums.moments(np.zeros(1))
        pairs = correlation.from_sums(drift_window.pairs, len(drift_window.missing), windowed=windowed)
        seen = np.flatnonzero(found.n.any(1))
        return LearningState(
            windows=self.windows + 1,
            total=self.total.merge(drift_window),
            bins=np.concatenate([self.bins, psi.coarsen_bins(drift_window.counts)[None].astype(np.int32)]),
            output=np.concatenate([self.output, drift_window.output[None].astype(np.int32)]),
            scores=np.concatenate([self.scores, drift_window.scores[None].astype(np.int32)]),
            t=np.concatenate([self.t, [t]]),
            window=np.concatenate([self.window, np.full(len(seen), self.windows)]),
            label=np.concatenate([self.label, seen]),
            n=np.concatenate([self.n, found.n[seen].astype(np.int32)]),
            mean=np.concatenate([self.mean, found.mean[seen].astype(np.float32)]),
            m2=np.concatenate([self.m2, found.m2[seen].astype(np.float32)]),
            weight=np.concatenate(
                [self.weight, pairs.weight[seen].max(1, initial=0, keepdims=True).astype(np.float32)]
            ),
            z=np.concatenate([self.z, np.where(pairs.weight > 0, pairs.mean, np.nan)[seen].astype(np.float16)]),
            top_scores=np.concatenate([self.top_scores, drift_window.top_scores[seen]]),
            rate=self.rate.add(
                float(drift_window.sampling.mean_step_us()),
                float(drift_window.repeated_share),
                drift_window.missing_share,
                drift_window.variogram,
                t,
            ),
            total_windows=passed,
            thinning=self.thinning,
        )

    def thin(self) -> LearningState:
        """Half as many, over the same time, and of what follows half as many, too."""
        kept = np.arange(0, self.windows, 2)
        some = self.window % 2 == 0
        entries = {
            name: getattr(self, name)[some] for name in ("label", "n", "mean", "m2", "weight", "z", "top_scores")
        }
        each = {name: getattr(self, name)[kept] for name in ("bins", "output", "scores", "t")}
        fewer = {"windows": len(kept), "window": self.window[some] // 2, "rate": self.rate.thin()}
        return replace(self, total_windows=self.window_count, thinning=2 * self.thinning, **fewer, **entries, **each)

    @property
    def window_count(self) -> int:
        """Drift windows so far, those let go among them."""
        return max(self.total_windows, self.windows)

    @property
    def capacity(self) -> int:
        """How many windows may be kept: fewer, where fields and classes make each of them large."""
        size = sum(
            getattr(self, name).nbytes for name in ("bins", "output", "scores", "n", "mean", "m2", "z", "top_scores")
        )
        return int(np.clip(MAX_BYTES * self.windows // max(size, 1), MIN_RETAINED_WINDOWS, MAX_WINDOWS))

    @property
    def observed_s(self) -> float:
        """Seconds of readings: a gap, or a step of the clock, counts for no more than a few windows do."""
        length = np.maximum(self.t[:, 1] - self.t[:, 0], 0)
        typical = median(length) if len(length) else 0.0
        between = np.clip(self.t[1:, 0] - self.t[:-1, 1], 0, typical)
        each = np.minimum(length, 4 * typical)
        # What lies between windows is known only where none was let go.
        known = each.sum() + between.sum() if self.window_count == self.windows else each.mean() * self.window_count
        return float(known) / 1e6

    @property
    def has_steady_clock(self) -> bool:
        """Whether the clock went on without steps, as far as windows tell: else nobody knows their hour of day."""
        ends = self.t.ravel()
        return bool((np.diff(ends) >= 0).all()) and (self.t[-1, 1] - self.t[0, 0]) / 1e6 <= 10 * self.observed_s

    @property
    def midpoints(self) -> Ints:
        """(K,) of each, epoch µs."""
        return self.t[:, 0] + (self.t[:, 1] - self.t[:, 0]) // 2

    def moments(self, shipped: Reference) -> GroupMoments:
        """Per drift window and class, (K, C, D)."""
        n = self._expand(shipped, self.n)
        mean = self._expand(shipped, np.where(self.n > 0, self.mean + shipped.origin, 0.0))
        return GroupMoments(n.astype(np.int64), mean, self._expand(shipped, self.m2))

    def pair_correlations(self, shipped: Reference) -> WeightedMeans:
        """Per drift window and class, (K, C, P)."""
        told = ~np.isnan(self.z)
        return WeightedMeans(
            self._expand(shipped, self.weight * told), self._expand(shipped, np.where(told, self.z, 0.0))
        )

    def mean_scores(self, shipped: Reference) -> WeightedMeans:
        """Number of answers and their mean score, (K, C, 1)."""
        return mean_top_scores(self._expand(shipped, self.top_scores))

    def to_bytes(self) -> bytes:
        return arrays.to_compressed_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> LearningState:
        """Raises ValueError."""
        return arrays.from_compressed_bytes(data, cls)

    def _expand(self, shipped: Reference, entries: np.ndarray) -> Float64s:
        out = np.zeros((self.windows, shipped.class_count, entries.shape[1]))
        out[self.window, self.label] = entries
        return out


def mean_top_scores(sums: Ints | Float64s) -> WeightedMeans:
    """Number and mean score (..., C, 1) of a summary's `sure` (..., C, 2)."""
    n, total = sums[..., :1].astype(np.float64), sums[..., 1:] / SCORE_SCALE
    return WeightedMeans(n, total / np.maximum(n, 1))


def class_shares(counts: Ints | Int32s, classes: int) -> Float64s:
    """(..., `told`) shares of all answers, of a summary's `output` (..., C); NaN where there is none."""
    total = counts.sum(-1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), np.nan)[..., :classes]


def calibrate_reference(
    shipped: Reference, learning: LearningState, *, source: str, seasonality: str = "auto", number: int = 1
) -> Reference:
    """A reference in which what was counted and calibrated comes from the gathered windows.

    Raises BadBundle with the reason when there are too few, or they do not agree among themselves.
    """
    windows = learning.windows
    if windows < MIN_WINDOWS:
        raise BadBundle(
            f"no drift reference: {windows} drift windows, and fewer than {MIN_WINDOWS} tell nothing; add data"
        )
    found = learning.moments(shipped)
    pooled = found.pooled(0)
    usual = window_statistics.fit_class_statistics(
        pooled, window_statistics.MIN_SD_SHARE if source == "shipped" else window_statistics.MIN_SITE_SD_SHARE
    )
    values, _ = window_statistics.compute_test_values(
        found, outliers.leave_one_out_mean(found, pooled), usual.sd, windowed=shipped.windowed
    )
    if not learning.has_steady_clock:
        seasonality = "none"
    cycle = daily_cycle.can_fit_daily(learning.midpoints, seasonality)
    left = daily_cycle.fit(values, learning.midpoints, seasonality).residuals if cycle else values
    mean, sd = outliers.calibrate(left, shipped.fields)
    total = learning.total
    rows = total.row_sums.moments(shipped.origin[: len(shipped.fields)])
    warnings = (
        [f"only {windows} drift windows: alarms are less reliable than with {RECOMMENDED_WINDOWS}"]
        if windows < RECOMMENDED_WINDOWS
        else []
    )
    if source == "site" and not cycle:
        warnings += outliers.detect_step_change(values, shipped.fields)
    settled = replace(
        shipped,
        made=source,
        drift_windows=windows,
        warning="; ".join(warnings) or None,
        counts=total.counts,
        missing=total.missing,
        n=rows.n[0],
        mean=rows.mean[0],
        m2=rows.m2[0],
        longest=np.maximum(shipped.longest, total.longest),
        class_n=usual.n,
        class_mean=usual.mean,
        class_sd=usual.sd,
        test_mean=mean,
        test_sd=sd,
        output=total.output,
        score_n=total.scores,
        score_correct=None,  # nobody has told yet which of these answers were right
    )
    if source == "shipped":
        return settled
    accuracy = cbpe.expected_accuracy_spread(shipped.score_n, shipped.score_correct, learning.scores.astype(np.int64))
    return _add_site_calibration(settled, learning, values, seasonality, number, accuracy)


def _add_site_calibration(
    reference: Reference,
    learning: LearningState,
    values: Float64s,
    seasonality: str,
    number: int,
    accuracy: tuple[float, float] | None,
) -> Reference:
    """With what a site's windows say beyond the means and spreads of its fields."""
    pairs, certainty, few = (
        learning.pair_correlations(reference),
        learning.mean_scores(reference),
        _min_class_weight(reference),
    )
    found, places = _calibrate_tests(reference, learning, values, seasonality), reference.layout
    scores, cycle = found.residuals / found.sd, found.cycle
    fields_alike, answers_alike = (
        false_alarm_budget.autocorrelation(found.residuals[:, : values.shape[1]]),
        false_alarm_budget.autocorrelation(scores[:, places.class_shares]),
    )
    level, allotted = (
        false_alarm_budget.exceedance_level(len(reference.fields) + 2),
        false_alarm_budget.PSI_BUDGET / (len(reference.fields) + 2),
    )
    each = [
        psi.fit_limits(psi.leave_one_out_psi(part.astype(np.int64)).reshape(learning.windows, -1), level, allotted)
        for part in (learning.bins, learning.output, learning.scores)
    ]
    site = SiteCalibration(
        pair_mean=correlation.pooled_mean(pairs, few),
        score_mean=correlation.pooled_mean(certainty, few)[:, 0],
        psi_limits=np.concatenate(each),
        stretch=false_alarm_budget.stretch_factor(fields_alike),
        together=(
            mewma.fit_limit(scores[:, places.means], fields_alike, false_alarm_budget.mewma_budget(places.fields)),
            mewma.fit_limit(scores[:, places.class_shares], answers_alike, false_alarm_budget.CLASS_SHARE_MEWMA_BUDGET),
        ),
        alike=answers_alike,
        waves=cycle.waves,
        hours=daily_cycle.count_hours(learning.midpoints),
        learned=(int(learning.t[0, 0]), int(learning.t[-1, 1])),
        number=number,
        steps=learning.total.steps,
        accuracy=accuracy,
        rest=cycle.rest if cycle.has_rest_days else None,
        rest_begins=cycle.rest_begins,
        rest_lasts=cycle.rest_lasts,
        rate=rate.learn_baseline(learning.rate, reference.class_count, reference.window_rows, seasonality),
    )
    return replace(reference, test_mean=found.mean, test_sd=np.where(found.tested, found.sd, UNTESTED_SD), site=site)


class _TestCalibration(msgspec.Struct, frozen=True, eq=False):
    """Of all T tests over K drift windows."""

    mean: Float64s  # (T,)
    sd: Float64s
    tested: Bools  # in enough windows
    residuals: Float64s  # (K, T) without mean and cycle
    cycle: daily_cycle.Cycle


def _calibrate_tests(
    reference: Reference, learning: LearningState, values: Float64s, seasonality: str
) -> _TestCalibration:
    """`values` (K, 2F) are those of the fields."""
    few, answers = _min_class_weight(reference), reference.layout.class_shares
    shares = class_shares(learning.output, reference.layout.tested_classes)
    others = [
        correlation.compute_deviations(part, correlation.leave_one_out_mean(part, few))
        for part in (learning.pair_correlations(reference), learning.mean_scores(reference))
    ]
    parts = [values, *others, shares]
    tests = np.concatenate(parts, axis=1)
    least = np.concatenate([np.full(part.shape[1], sd) for part, sd in zip(parts, outliers.MIN_SDS, strict=True)])
    # One answer more or less is nothing.
    least[answers] = np.maximum(least[answers], 1 / reference.window)
    told = (~np.isnan(tests)).sum(0) >= MIN_WINDOWS
    middle = nanmedian(np.where(told, tests, 0.0))
    known = np.where(told & ~np.isnan(tests), tests, middle)
    (mean, left), cycle = outliers.winsorize(known, middle, least), daily_cycle.Cycle.empty(tests.shape[1])
    if daily_cycle.can_fit_daily(learning.midpoints, seasonality):
        fit = daily_cycle.fit(known, learning.midpoints, seasonality)
        (_, left), mean, cycle = outliers.winsorize(fit.residuals, median(fit.residuals), least), fit.mean, fit.cycle
        left[:, answers] = fit.residuals[:, answers]
    else:
        # A mode that is seldom on is no odd window.
        mean[answers] = known[:, answers].mean(0)
        left[:, answers] = known[:, answers] - mean[answers]
    return _TestCalibration(mean, np.maximum(left.std(0, ddof=1), least), told, left, cycle)


def _min_class_weight(reference: Reference) -> float:
    """Model windows, or rows, of a class that tell no mean of their own."""
    return float(window_statistics.MIN_CLASS_WINDOWS if reference.windowed else correlation.MIN_ROWS)


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
    truth: Ints | None = None,
) -> Reference:
    """The shipped reference, from reference data in the order it was recorded.

    `features` (n, F) physical units, NaN missing; `starts` (w,) row offsets of model windows of `window_rows`;
    `labels_idx` (w,) the classes the model names and `scores` (w, K) its scores; `window` model windows per drift
    window; `truth` (w,) the right classes, for the accuracy estimate. Raises BadBundle.
    """
    rows = infinities_to_nan(features)
    top = None if scores is None else np.asarray(scores, np.float64).max(axis=1)
    base = draft_reference(rows, starts, window_rows, window=window, fields=fields, labels=labels, scores=top)
    learning = LearningState.empty(base)
    for i in range(0, len(starts) - window + 1, window):
        some = slice(i, i + window)
        part = rows[int(starts[i]) : int(starts[i + window - 1]) + window_rows]
        local = starts[some] - starts[i]
        made = summarize(base, part, local, predicted[some], None if top is None else top[some])
        learning = learning.add(made, windowed=base.windowed)
    settled = calibrate_reference(base, learning, source="shipped")
    if truth is None or top is None:
        return settled
    used = learning.windows * window
    right = (predicted == truth)[:used]
    places = np.searchsorted(base.score_edges, top[:used][right], side="right")
    return replace(settled, score_correct=np.bincount(places, minlength=BINS))


def infinities_to_nan(features: Float32s) -> Float64s:
    """As float64, infinities taken for missing values."""
    rows = np.asarray(features, dtype=np.float64)
    return rows if np.isfinite(rows).all() else np.where(np.isfinite(rows), rows, np.nan)
