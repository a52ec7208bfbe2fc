"""Reference deviation: how far a learned reference lies from the shipped, the former and the accepted one.

A site that is wrong from its first row would otherwise be learned as normal, and learning again and again could walk
the baseline anywhere. A deviation needs a size that matters, MIN_SHIFT_SDS or MIN_RATIO, and must lie beyond what
single drift windows of the other reference vary by: sites and people differ. A large one, LARGE_SHIFT_SDS or
LARGE_RATIO, must only be certain. A field that moved steadily or changed at once while it was learned deviates, too.

Source: Hinkley (1970), Inference about the change-point in a sequence of random variables, Biometrika 57, for steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from outstation.foundation import clock
from outstation.foundation.arrays import Float64s, Ints
from outstation.foundation.indices import repeat
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.detectors.detector import MIN_CLASS_WINDOWS, mean_class_sd, round_significant
from outstation.ml.drift.detectors.registry import MOMENTS
from outstation.ml.drift.numeric import control_limits
from outstation.ml.drift.numeric.sums import fit_trend
from outstation.protocol.alerts.alert import Alert, continue_number
from outstation.protocol.alerts.kinds import REFERENCE_DEVIATES

# Smaller differences do not matter: of a mean in sd of the other reference's rows, and of spreads as a ratio.
MIN_SHIFT_SDS, MIN_RATIO = 0.5, 1.5
# People who train with the shipped exercise model differ by up to 0.28 sd and a ratio of 1.8.
LARGE_SHIFT_SDS, LARGE_RATIO = 1.0, 2.0
MAX_NAMED_FIELDS = 5
# Chance that a reference of an unchanged site deviates, over all fields.
DEVIATION_BUDGET = 1e-2
MIN_STEP_WINDOWS = 4  # on either side of a step
# Independent places and times at which a step is looked for during learning, and independent windows by whose
# inverse the limit rises, as few of them tell little of their memory. Both from simulated AR(1) windows.
STEP_LOOKS, STEP_ERROR = 8, 8.0
STEP_BLOCKS, MIN_STEP_BLOCKS = (1, 2, 4), 10  # windows that are taken together to tell memory, and such blocks
SHIPPED, FORMER, ACCEPTED, TREND, STEP = "shipped", "former", "accepted", "trend", "step"
_AGAINST = {
    SHIPPED: "the shipped reference",
    FORMER: "the former reference of this site",
    ACCEPTED: "the reference that was accepted",
}


class ReferenceProfile(msgspec.Struct, frozen=True, eq=False):
    """Means and spreads of a reference, to compare later ones with: C classes, D statistics, F fields."""

    fields: tuple[str, ...]
    labels: tuple[str, ...]
    window_rows: int
    drift_windows: int
    class_n: Ints  # (C, D)
    class_mean: Float64s
    class_sd: Float64s
    sd: Float64s  # (F,) of rows
    test_sd: Float64s  # (2F,) of drift windows, in class sd

    @classmethod
    def from_reference(cls, reference: Reference) -> ReferenceProfile:
        place = reference.layout[MOMENTS.name] if reference.site else slice(None)
        return cls(
            reference.fields,
            reference.labels,
            reference.window_rows,
            reference.drift_windows,
            reference.class_n,
            reference.class_mean,
            reference.class_sd,
            reference.sd,
            reference.window_sd[place],
        )

    def pooled(self) -> ReferenceProfile:
        """Return the profile without classes."""
        n = np.maximum(self.class_n, 1e-9)
        total = n.sum(0)
        mean = (n * self.class_mean).sum(0) / total
        variance = (n * (self.class_sd**2 + (self.class_mean - mean) ** 2)).sum(0) / total
        whole = {"class_n": self.class_n.sum(0)[None], "class_mean": mean[None], "class_sd": np.sqrt(variance)[None]}
        return msgspec.structs.replace(self, **whole)


class Deviation(msgspec.Struct, frozen=True):
    """Deviation of one field: `shift` of the mean in its unit and in sd of rows, `ratio` of the spreads.

    A step began after this number of learned windows, at `since` epoch µs.
    """

    field: str
    against: str
    shift: float
    shift_sd: float
    ratio: float
    by_mean: bool
    unit: str = ""
    window: int = 0
    since: int = 0

    def describe(self) -> str:
        """Return a clause for people."""
        amount = f"{self.shift:+.2g}{f' {self.unit}' if self.unit else ''} ({abs(self.shift_sd):.2g} sd)"
        if self.against == TREND:
            return f"{self.field} moved by {amount} while it was learned"
        if self.against == STEP:
            change = f"moved by {amount}" if self.by_mean else f"varies {self.ratio:.2g} times as much"
            since = clock.to_rfc3339(self.since)[:16].replace("T", " ")
            return f"{self.field} {change} from {since} UTC on while it was learned"
        if self.by_mean:
            return f"{self.field} differs by {amount} from {_AGAINST[self.against]}"
        return f"{self.field} varies {self.ratio:.2g} times as much as in {_AGAINST[self.against]}"

    def to_dict(self) -> dict[str, Any]:
        numbers = {"shift": self.shift, "shift_sd": self.shift_sd, "ratio": self.ratio}
        since = {"since": self.since} if self.against == STEP else {}
        return (
            {"field": self.field, "against": self.against}
            | since
            | {name: round_significant(value, 3) for name, value in numbers.items()}
        )

    @property
    def size(self) -> float:
        """Return the larger of both effects, as a multiple of the least that matters."""
        return max(abs(self.shift_sd) / MIN_SHIFT_SDS, abs(math.log(self.ratio)) / math.log(MIN_RATIO))


class ReferenceGuard(msgspec.Struct, frozen=True, eq=False):
    """References to compare a site's next one with, and the deviations of the present one that nobody accepted.

    - `former`: the site's reference before
    - `accepted`: the first one that did not deviate, or the one that an operator accepted last
    - `is_held`: the present one is not used until an operator accepts it
    """

    former: ReferenceProfile | None = None
    accepted: ReferenceProfile | None = None
    deviations: tuple[Deviation, ...] = ()
    raised_count: int = 0
    is_held: bool = False

    def begin_learning(self, former: Reference | None) -> ReferenceGuard:
        profile = self.former if former is None else ReferenceProfile.from_reference(former)
        return msgspec.structs.replace(self, former=profile, is_held=False)

    def continue_numbers(self, other: ReferenceGuard) -> ReferenceGuard:
        """Return this guard with alert numbers above those of `other`."""
        raised_count = continue_number(self.raised_count, other.raised_count, is_open=bool(self.deviations))
        return msgspec.structs.replace(self, raised_count=raised_count)

    def accept(self, reference: Reference) -> ReferenceGuard:
        """Accept the reference as it is, by an operator's word."""
        accepted = ReferenceProfile.from_reference(reference)
        return msgspec.structs.replace(self, accepted=accepted, deviations=(), is_held=False)

    def check(
        self,
        learned: Reference,
        shipped: Reference,
        residuals: Float64s,
        t: Ints,
        units: Sequence[str],
        *,
        hold: bool,
    ) -> ReferenceGuard:
        """Compare a newly learned reference of fields in these `units`. `hold` keeps one that deviates from use.

        `residuals` (K, 2F) are those of the learned windows, which began at `t` (K,) epoch µs.
        """
        others = {
            SHIPPED: ReferenceProfile.from_reference(shipped),
            FORMER: self.former,
            ACCEPTED: self.accepted,
        }
        unit, steps = dict(zip(learned.fields, units, strict=True)), find_steps(residuals, t, learned)
        deviations = tuple(
            msgspec.structs.replace(deviation, unit=unit[deviation.field])
            for deviation in _one_per_field(
                [*find_deviations(learned, others, residuals), *find_trends(residuals, learned, steps), *steps]
            )
        )
        accepted = self.accepted
        if accepted is None and not deviations:
            accepted = ReferenceProfile.from_reference(learned)
        raised_count = self.raised_count + (bool(deviations) and not self.deviations)
        return ReferenceGuard(self.former, accepted, deviations, raised_count, hold and bool(deviations))

    def announce_steps(self, checked: ReferenceGuard) -> ReferenceGuard:
        """Return this guard with the steps that `checked` found among windows that are still gathered."""
        steps = tuple(item for item in checked.deviations if item.against == STEP)
        if {item.field for item in steps} <= {item.field for item in self.deviations}:
            return self
        return msgspec.structs.replace(self, deviations=steps, raised_count=self.raised_count + (not self.deviations))


def build_alert(
    guard: ReferenceGuard, before: ReferenceGuard, window: dict[str, Any], *, learning: bool = False
) -> Alert | None:
    """Return the alert that a newly learned or accepted reference raises or clears; `window` locates it.

    During `learning` it is about the windows gathered so far.
    """
    if guard.deviations:
        sentences = [item.describe() for item in guard.deviations[:MAX_NAMED_FIELDS]]
        more = len(guard.deviations) - len(sentences)
        rest = f" and {more} more fields" if more else ""
        then = (
            "Drift is not tested until somebody accepts the reference or has it learned again."
            if guard.is_held
            else "Learning goes on."
            if learning
            else "Drift is tested against it all the same."
        )
        summary = f"this site's reference deviates: {'; '.join(sentences)}{rest}. {then}"
        evidence = window | {"deviations": [item.to_dict() for item in guard.deviations], "held": guard.is_held}
        return REFERENCE_DEVIATES.raised(summary, evidence, count=guard.raised_count)
    if not before.deviations:
        return None
    summary = "this site's reference was accepted, or the one learned since no longer deviates."
    return REFERENCE_DEVIATES.cleared(summary, window, count=guard.raised_count)


def find_deviations(
    learned: Reference, others: Mapping[str, ReferenceProfile | None], residuals: Float64s
) -> list[Deviation]:
    """Return the deviations from `others`. Fields that they do not have are not compared.

    `residuals` (K, 2F) of learned windows tell how alike neighbours are.
    """
    profile = ReferenceProfile.from_reference(learned)
    correlation = _autocorrelation(_fill_gaps(residuals), 1)
    return [
        deviation
        for against, other in others.items()
        if other is not None
        for deviation in _compare_profiles(profile, other, against, correlation)
    ]


def find_trends(values: Float64s, learned: Reference, steps: Sequence[Deviation] = ()) -> list[Deviation]:
    """Return the fields whose mean moved steadily over learned windows, unless one of the `steps` explains it better.

    `values` (K, 2F) are residuals in class sd, in order of time and without a daily cycle.
    """
    windows, fields = len(values), len(learned.fields)
    means = _fill_gaps(values[:, :fields])
    slope, residuals = fit_trend(means)
    left = np.full(fields, np.inf)
    for step in steps:
        i, at = learned.fields.index(step.field), step.window
        left[i] = sum(float(((part - part.mean()) ** 2).sum()) for part in (means[:at, i], means[at:, i]))
    independent = _independent_windows(windows, _autocorrelation(residuals, 2))
    # Over windows that are numbered evenly from -0.5 to 0.5, whose mean square is about 1/12.
    error = np.sqrt((residuals**2).sum(0) / max(1, windows - 2) / independent * 12 * (windows - 1) / (windows + 1))
    shift, sd = slope * mean_class_sd(learned.class_n, learned.class_sd)[:fields], np.maximum(learned.sd, 1e-12)
    moved = (np.abs(shift) > MIN_SHIFT_SDS * sd) & (np.abs(slope) > _z_limit(fields, independent) * error)
    return [
        Deviation(learned.fields[i], TREND, float(shift[i]), float(shift[i] / sd[i]), 1.0, by_mean=True)
        for i in np.flatnonzero(moved & ((residuals**2).sum(0) < left)).tolist()
    ]


def find_steps(values: Float64s, t: Ints, learned: Reference) -> list[Deviation]:
    """Return the fields whose mean or spread changed at once among learned windows, and stayed so to the last one.

    `values` (K, 2F) are residuals in class sd, without a daily cycle, of windows that began at `t` (K,) epoch µs.
    """
    fields = len(learned.fields)
    # Means and spreads have memories of their own.
    kinds = np.split(_fill_gaps(values), 2, axis=1)
    step, at = (np.concatenate(parts) for parts in zip(*map(_fit_steps, kinds), strict=True))
    class_sd, sd = mean_class_sd(learned.class_n, learned.class_sd), np.maximum(learned.sd, 1e-12)
    shift = step[:fields] * class_sd[:fields]
    log_ratio = step[fields:] * (class_sd[fields:] if learned.windowed else 1.0) / 2
    moved, varies = np.abs(shift) > MIN_SHIFT_SDS * sd, np.abs(log_ratio) > math.log(MIN_RATIO)
    ratio = np.exp(np.clip(log_ratio, -20, 20))
    return [
        Deviation(
            learned.fields[i],
            STEP,
            float(shift[i]),
            float(shift[i] / sd[i]),
            float(ratio[i]),
            by_mean=bool(moved[i]),
            window=int(at[i if moved[i] else fields + i]),
            since=int(t[at[i if moved[i] else fields + i]]),
        )
        for i in np.flatnonzero(moved | varies).tolist()
    ]


def _fit_steps(values: Float64s) -> tuple[Float64s, Ints]:
    """Return the step (T,) that values (K, T) made, 0 for none that is certain, and the number of values before it.

    There are as many values of another kind.
    """
    windows, columns = len(values), np.arange(values.shape[1])
    before = np.arange(1, windows)[:, None]
    weight = before * (windows - before) / windows
    difference = np.cumsum(values - values.mean(0), axis=0)[:-1]
    gain = difference**2 / weight
    gain[: MIN_STEP_WINDOWS - 1] = gain[windows - MIN_STEP_WINDOWS :] = 0.0
    at = gain.argmax(0)
    step = -(difference / weight)[at, columns]
    rest = values - np.where(np.arange(windows)[:, None] > at, step, 0.0)
    wander, independent = _estimate_wander(rest)
    limit = 2 * math.log(4 * len(columns) * STEP_LOOKS / DEVIATION_BUDGET) * (1 + STEP_ERROR / independent)
    return np.where(gain[at, columns] > limit * np.maximum(wander, 1e-24), step, 0.0), at + 1


def _estimate_wander(rest: Float64s) -> tuple[Float64s, Float64s]:
    """Return the variance of a sum of what a step leaves (K, T), per window, and independent windows that tell it (T,).

    Noise hides a long memory from neighbors, but not from means of several windows: the largest estimate counts.
    """
    wander, independent = np.zeros(rest.shape[1]), np.full(rest.shape[1], float(len(rest)))
    for size in STEP_BLOCKS:
        count = len(rest) // size
        if count < MIN_STEP_BLOCKS:
            continue
        blocks = rest[len(rest) - count * size :].reshape(count, size, -1).mean(1)
        # A mean, a step and its place were fitted.
        memory = control_limits.fit_autocorrelation(blocks, np.full(rest.shape[1], 3.0))
        factor = (1 + memory) / (1 - memory)
        wander = np.maximum(wander, size * blocks.var(0) * count / (count - 2) * factor)
        independent = np.minimum(independent, count / factor)
    return wander, independent


def _one_per_field(deviations: Sequence[Deviation]) -> list[Deviation]:
    largest: dict[str, Deviation] = {}
    # A reference of two levels says little of how far either lies from another one.
    for deviation in sorted(deviations, key=lambda item: (item.against != STEP, -item.size)):
        largest.setdefault(deviation.field, deviation)
    return list(largest.values())


def _compare_profiles(
    learned: ReferenceProfile, other: ReferenceProfile, against: str, correlation: float
) -> Iterator[Deviation]:
    if learned.fields != other.fields or (learned.window_rows > 1) != (other.window_rows > 1):
        return
    if not learned.labels or learned.labels != other.labels:
        learned, other = learned.pooled(), other.pooled()
    fields, windowed = len(learned.fields), learned.window_rows > 1
    shared = np.minimum(learned.class_n, other.class_n).astype(np.float64)
    shared[shared < MIN_CLASS_WINDOWS] = 0.0
    if not shared.any(0).all():
        # Some field has no class that both know.
        learned, other = learned.pooled(), other.pooled()
        shared = np.ones_like(learned.class_mean)
    share = shared / shared.sum(0)
    difference = learned.class_mean - other.class_mean
    shift, value = (share * difference).sum(0), (share * difference / other.class_sd).sum(0)
    if windowed:
        # Spreads are log variances of model windows.
        log_ratio = shift[fields:] / 2
    else:
        log_ratio = (share * np.log(learned.class_sd / other.class_sd)).sum(0)
        value = np.concatenate([value, 2 * log_ratio])
    effective = [_independent_windows(profile.drift_windows, correlation) for profile in (learned, other)]
    z = np.abs(value) / other.test_sd
    limit = _z_limit(2 * fields, other.drift_windows)
    unlike = z > limit * math.sqrt(1 + 1 / other.drift_windows)
    certain = z > _z_limit(2 * fields, min(effective)) * math.sqrt(sum(1 / n for n in effective))
    shift_sd, ratio = shift[:fields] / np.maximum(other.sd, 1e-12), np.exp(np.clip(log_ratio, -20, 20))
    size = np.concatenate([np.abs(shift_sd) / MIN_SHIFT_SDS, np.abs(log_ratio) / math.log(MIN_RATIO)])
    large = repeat([LARGE_SHIFT_SDS / MIN_SHIFT_SDS, math.log(LARGE_RATIO) / math.log(MIN_RATIO)], fields)
    mean_moved, spread_moved = np.split(((size > 1) & unlike) | ((size > large) & certain), 2)
    for i in np.flatnonzero(mean_moved | spread_moved).tolist():
        by_mean = bool(mean_moved[i])
        yield Deviation(learned.fields[i], against, float(shift[i]), float(shift_sd[i]), float(ratio[i]), by_mean)


def _fill_gaps(values: Float64s) -> Float64s:
    """Replace missing values of windows (K, T) by the means of the others."""
    known = ~np.isnan(values)
    mean = np.where(known, values, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    return np.where(known, values, mean)


def _autocorrelation(values: Float64s, coefficients: int) -> float:
    """Return the mean lag-1 autocorrelation of values (K, T) to which this number of coefficients was fitted."""
    every = control_limits.fit_autocorrelation(values, np.full(values.shape[1], float(coefficients)))
    return float(every.mean()) if len(every) else 0.0


def _independent_windows(windows: int, correlation: float) -> int:
    """Return how many independent windows give as good a mean."""
    return max(2, int(windows * (1 - correlation) / (1 + correlation)))


def _z_limit(tests: int, windows: int) -> float:
    """Return the limit of a number of two-sided tests whose sd is known from `windows` windows.

    Source: Abramowitz & Stegun (1964), 26.7.5, the first term of Student's t by the normal quantile.
    """
    # Imported here: it is slow to import, and only learning needs it.
    from statistics import NormalDist

    z = NormalDist().inv_cdf(1 - DEVIATION_BUDGET / (2 * tests))
    return z + (z**3 + z) / (4 * max(1, windows - 1))
