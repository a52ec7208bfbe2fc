"""From drift windows to a reference: `build` for a bundle's data, `settle` also for a device's first clean windows."""

from __future__ import annotations

import msgspec
import numpy as np
from msgspec.structs import replace

from agent import arrays
from agent.arrays import Bools, Floats, Ints
from agent.drift.baseline.reference import BINS, ENOUGH, FEWEST, Reference, draft
from agent.drift.baseline.row_counts import SURE
from agent.drift.baseline.site import Site
from agent.drift.baseline.summary import Summary, of
from agent.drift.detectors import correlation, daily_cycle, mewma, outliers, psi, window_statistics
from agent.drift.detectors import sampling_rate as rate
from agent.drift.detectors.correlation import Pairs
from agent.drift.detectors.sampling_rate import Gathered
from agent.drift.numeric import false_alarm_budget
from agent.drift.numeric.middle import median, of_known
from agent.drift.numeric.sums import Moments
from agent.errors import BadBundle
from agent.performance import cbpe

NEVER = 1e9  # sd of a test that nothing was learned of
MOST = 400  # drift windows kept while learning: more tell hardly more
MOST_BYTES = 512 << 10  # of what is kept of them, as long as these are enough to learn from
LEAST_KEPT = ENOUGH + FEWEST

Int32s = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
Float32s = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Float16s = np.ndarray[tuple[int, ...], np.dtype[np.float16]]


class Learning(msgspec.Struct, frozen=True, eq=False):
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
    sure: Ints  # (m, 2)
    rate: Gathered = msgspec.field(default_factory=Gathered.none)
    passed: int = 0  # drift windows, those let go among them
    each: int = 1  # of so many one is kept

    @classmethod
    def empty(cls, shipped: Reference) -> Learning:
        fields, none = len(shipped.fields), np.empty(0, np.int64)
        entries = np.empty((0, len(shipped.origin)), np.float32)
        pair_entries = np.empty((0, len(correlation.pairs(fields))), np.float16)
        return cls(
            windows=0,
            total=Summary.empty(shipped),
            bins=np.empty((0, fields, BINS // 2), np.int32),
            output=np.empty((0, shipped.classes), np.int32),
            scores=np.empty((0, BINS), np.int32),
            t=np.empty((0, 2), np.int64),
            window=none,
            label=none,
            n=entries.astype(np.int32),
            mean=entries,
            m2=entries,
            weight=np.empty((0, 1), np.float32),
            z=pair_entries,
            sure=np.empty((0, 2), np.int64),
        )

    def add(self, drift_window: Summary, *, windowed: bool, t: tuple[int, int] = (0, 0)) -> Learning:
        """With one that began and ended at `t`. Of many only some are kept, evenly over the time."""
        if self.windows >= self.room:
            return self.thinned().add(drift_window, windowed=windowed, t=t)
        passed = self.gathered + 1
        if (passed - 1) % self.each:
            return replace(self, total=self.total.merge(drift_window), passed=passed)
        found = drift_window.classes.moments(np.zeros(1))
        pairs = correlation.measured(drift_window.pairs, len(drift_window.missing), windowed=windowed)
        seen = np.flatnonzero(found.n.any(1))
        return Learning(
            windows=self.windows + 1,
            total=self.total.merge(drift_window),
            bins=np.concatenate([self.bins, psi.coarse(drift_window.counts)[None].astype(np.int32)]),
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
            z=np.concatenate([self.z, np.where(pairs.weight > 0, pairs.z, np.nan)[seen].astype(np.float16)]),
            sure=np.concatenate([self.sure, drift_window.sure[seen]]),
            rate=self.rate.add(drift_window, t),
            passed=passed,
            each=self.each,
        )

    def thinned(self) -> Learning:
        """Half as many, over the same time, and of what follows half as many, too."""
        kept = np.arange(0, self.windows, 2)
        some = self.window % 2 == 0
        entries = {name: getattr(self, name)[some] for name in ("label", "n", "mean", "m2", "weight", "z", "sure")}
        each = {name: getattr(self, name)[kept] for name in ("bins", "output", "scores", "t")}
        fewer = {"windows": len(kept), "window": self.window[some] // 2, "rate": self.rate.thinned()}
        return replace(self, passed=self.gathered, each=2 * self.each, **fewer, **entries, **each)

    @property
    def gathered(self) -> int:
        """Drift windows so far, those let go among them."""
        return max(self.passed, self.windows)

    @property
    def room(self) -> int:
        """How many windows may be kept: fewer, where fields and classes make each of them large."""
        size = sum(getattr(self, name).nbytes for name in ("bins", "output", "scores", "n", "mean", "m2", "z", "sure"))
        return int(np.clip(MOST_BYTES * self.windows // max(size, 1), LEAST_KEPT, MOST))

    @property
    def watched_s(self) -> float:
        """Seconds of readings: a gap, or a step of the clock, counts for no more than a few windows do."""
        length = np.maximum(self.t[:, 1] - self.t[:, 0], 0)
        typical = median(length) if len(length) else 0.0
        between = np.clip(self.t[1:, 0] - self.t[:-1, 1], 0, typical)
        each = np.minimum(length, 4 * typical)
        # What lies between windows is known only where none was let go.
        known = each.sum() + between.sum() if self.gathered == self.windows else each.mean() * self.gathered
        return float(known) / 1e6

    @property
    def is_steady(self) -> bool:
        """Whether the clock went on without steps, as far as windows tell: else nobody knows their hour of day."""
        ends = self.t.ravel()
        return bool((np.diff(ends) >= 0).all()) and (self.t[-1, 1] - self.t[0, 0]) / 1e6 <= 10 * self.watched_s

    @property
    def middle(self) -> Ints:
        """(K,) of each, epoch µs."""
        return self.t[:, 0] + (self.t[:, 1] - self.t[:, 0]) // 2

    def moments(self, shipped: Reference) -> Moments:
        """Per drift window and class, (K, C, D)."""
        n = self._each(shipped, self.n)
        mean = self._each(shipped, np.where(self.n > 0, self.mean + shipped.origin, 0.0))
        return Moments(n.astype(np.int64), mean, self._each(shipped, self.m2))

    def pairs(self, shipped: Reference) -> Pairs:
        """Per drift window and class, (K, C, P)."""
        told = ~np.isnan(self.z)
        return Pairs(self._each(shipped, self.weight * told), self._each(shipped, np.where(told, self.z, 0.0)))

    def certainty(self, shipped: Reference) -> Pairs:
        """Number of answers and their mean score, (K, C, 1)."""
        return sure(self._each(shipped, self.sure))

    def to_bytes(self) -> bytes:
        return arrays.packed(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Learning:
        """Raises ValueError."""
        return arrays.unpacked(data, cls)

    def _each(self, shipped: Reference, entries: np.ndarray) -> Floats:
        out = np.zeros((self.windows, shipped.classes, entries.shape[1]))
        out[self.window, self.label] = entries
        return out


def sure(counted: Ints | Floats) -> Pairs:
    """Number and mean score (..., C, 1) of a summary's `sure` (..., C, 2)."""
    n, total = counted[..., :1].astype(np.float64), counted[..., 1:] / SURE
    return Pairs(n, total / np.maximum(n, 1))


def answered(counts: Ints | Int32s, told: int) -> Floats:
    """(..., `told`) shares of all answers, of a summary's `output` (..., C); NaN where there is none."""
    total = counts.sum(-1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), np.nan)[..., :told]


def settle(shipped: Reference, learning: Learning, *, made: str, strata: str = "auto", number: int = 1) -> Reference:
    """A reference in which what was counted and calibrated comes from the gathered windows.

    Raises BadBundle with the reason when there are too few, or they do not agree among themselves.
    """
    windows = learning.windows
    if windows < FEWEST:
        raise BadBundle(f"no drift reference: {windows} drift windows, and fewer than {FEWEST} tell nothing; add data")
    found = learning.moments(shipped)
    pooled = found.pooled(0)
    usual = window_statistics.normal(
        pooled, window_statistics.NARROW if made == "shipped" else window_statistics.NARROW_SITE
    )
    values, _ = window_statistics.tests(found, outliers.others_mean(found, pooled), usual.sd, windowed=shipped.windowed)
    if not learning.is_steady:
        strata = "none"
    cycle = daily_cycle.told(learning.middle, strata)
    left = daily_cycle.fit(values, learning.middle, strata).left if cycle else values
    mean, sd = outliers.calibrated(left, shipped.fields)
    total = learning.total
    rows = total.rows_of.moments(shipped.origin[: len(shipped.fields)])
    warnings = (
        [f"only {windows} drift windows: alarms are less reliable than with {ENOUGH}"] if windows < ENOUGH else []
    )
    if made == "site" and not cycle:
        warnings += outliers.step(values, shipped.fields)
    settled = replace(
        shipped,
        made=made,
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
    if made == "shipped":
        return settled
    accuracy = cbpe.usual(shipped.score_n, shipped.score_correct, learning.scores.astype(np.int64))
    return _with_site(settled, learning, values, strata, number, accuracy)


def _with_site(
    settled: Reference,
    learning: Learning,
    values: Floats,
    strata: str,
    number: int,
    accuracy: tuple[float, float] | None,
) -> Reference:
    """With what a site's windows say beyond the means and spreads of its fields."""
    pairs, certainty, few = learning.pairs(settled), learning.certainty(settled), _few(settled)
    found, places = _all_tests(settled, learning, values, strata), settled.places
    scores, cycle = found.left / found.sd, found.cycle
    fields_alike, answers_alike = (
        false_alarm_budget.alike(found.left[:, : values.shape[1]]),
        false_alarm_budget.alike(scores[:, places.answers]),
    )
    level, allotted = (
        false_alarm_budget.level(len(settled.fields) + 2),
        false_alarm_budget.SHAPES / (len(settled.fields) + 2),
    )
    each = [
        psi.limits(psi.psi_without(part.astype(np.int64)).reshape(learning.windows, -1), level, allotted)
        for part in (learning.bins, learning.output, learning.scores)
    ]
    site = Site(
        pair_mean=correlation.usual(pairs, few),
        score_mean=correlation.usual(certainty, few)[:, 0],
        psi_limits=np.concatenate(each),
        stretch=false_alarm_budget.stretch(fields_alike),
        together=(
            mewma.limit(scores[:, places.means], fields_alike, false_alarm_budget.together(places.fields)),
            mewma.limit(scores[:, places.answers], answers_alike, false_alarm_budget.ANSWERS_TOGETHER),
        ),
        alike=answers_alike,
        waves=cycle.waves,
        hours=daily_cycle.hours(learning.middle),
        learned=(int(learning.t[0, 0]), int(learning.t[-1, 1])),
        number=number,
        steps=learning.total.steps,
        accuracy=accuracy,
        rest=cycle.rest if cycle.weekly else None,
        rest_begins=cycle.rest_begins,
        rest_lasts=cycle.rest_lasts,
        rate=rate.learn(learning.rate, settled.classes, settled.window_rows, strata),
    )
    return replace(settled, test_mean=found.mean, test_sd=np.where(found.told, found.sd, NEVER), site=site)


class _Tests(msgspec.Struct, frozen=True, eq=False):
    """Of all T tests over K drift windows."""

    mean: Floats  # (T,)
    sd: Floats
    told: Bools  # in enough windows
    left: Floats  # (K, T) without mean and cycle
    cycle: daily_cycle.Cycle


def _all_tests(settled: Reference, learning: Learning, values: Floats, strata: str) -> _Tests:
    """`values` (K, 2F) are those of the fields."""
    few, answers = _few(settled), settled.places.answers
    shares = answered(learning.output, settled.places.answers_told)
    others = [
        correlation.tests(part, correlation.usual_without(part, few))
        for part in (learning.pairs(settled), learning.certainty(settled))
    ]
    parts = [values, *others, shares]
    tests = np.concatenate(parts, axis=1)
    least = np.concatenate([np.full(part.shape[1], sd) for part, sd in zip(parts, outliers.LEAST_SDS, strict=True)])
    # One answer more or less is nothing.
    least[answers] = np.maximum(least[answers], 1 / settled.window)
    told = (~np.isnan(tests)).sum(0) >= FEWEST
    middle = of_known(np.where(told, tests, 0.0))
    known = np.where(told & ~np.isnan(tests), tests, middle)
    (mean, left), cycle = outliers.drawn(known, middle, least), daily_cycle.Cycle.none(tests.shape[1])
    if daily_cycle.told(learning.middle, strata):
        fit = daily_cycle.fit(known, learning.middle, strata)
        (_, left), mean, cycle = outliers.drawn(fit.left, median(fit.left), least), fit.mean, fit.cycle
        left[:, answers] = fit.left[:, answers]
    else:
        # A mode that is seldom on is no odd window.
        mean[answers] = known[:, answers].mean(0)
        left[:, answers] = known[:, answers] - mean[answers]
    return _Tests(mean, np.maximum(left.std(0, ddof=1), least), told, left, cycle)


def _few(settled: Reference) -> float:
    """Model windows, or rows, of a class that tell no mean of their own."""
    return float(window_statistics.RARE if settled.windowed else correlation.FEW)


def build(
    features: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    starts: Ints,
    window_rows: int,
    labels_idx: Ints,
    scores: np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None,
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
    rows = finite(features)
    top = None if scores is None else np.asarray(scores, np.float64).max(axis=1)
    base = draft(rows, starts, window_rows, window=window, fields=fields, labels=labels, scores=top)
    learning = Learning.empty(base)
    for i in range(0, len(starts) - window + 1, window):
        some = slice(i, i + window)
        part = rows[int(starts[i]) : int(starts[i + window - 1]) + window_rows]
        local = starts[some] - starts[i]
        made = of(base, part, local, labels_idx[some], None if top is None else top[some])
        learning = learning.add(made, windowed=base.windowed)
    settled = settle(base, learning, made="shipped")
    if truth is None or top is None:
        return settled
    used = learning.windows * window
    right = (labels_idx == truth)[:used]
    places = np.searchsorted(base.score_edges, top[:used][right], side="right")
    return replace(settled, score_correct=np.bincount(places, minlength=BINS))


def finite(features: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Floats:
    """As float64, infinities taken for missing values."""
    rows = np.asarray(features, dtype=np.float64)
    return rows if np.isfinite(rows).all() else np.where(np.isfinite(rows), rows, np.nan)
