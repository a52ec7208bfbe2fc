"""Drift reference: the format of a bundle's reference.json and of the reference that a site learns itself.

The shipped reference fixes bins, limits and origins, so that summaries of a whole fleet add up. A site's reference
keeps those and replaces the counts and the calibration.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation import arrays
from outstation.foundation.arrays import Bools, Float32s, Float64s, Ints, any_true
from outstation.foundation.errors import BadBundle
from outstation.foundation.indices import repeat
from outstation.ml.drift.baseline import runs, window_statistics
from outstation.ml.drift.baseline.fault_limits import FaultLimits
from outstation.ml.drift.baseline.missing_values import MissingBaseline
from outstation.ml.drift.baseline.modes import CLASS_COUNT
from outstation.ml.drift.baseline.runs import Tail, Trace
from outstation.ml.drift.baseline.sensitivity import PROBABILITY
from outstation.ml.drift.baseline.site import SiteCalibration
from outstation.ml.drift.detectors.detector import NO_WEIGHTS, Baseline, Task
from outstation.ml.drift.detectors.registry import DETECTORS, MOMENTS, ScoreLayout, get_layout
from outstation.ml.drift.numeric import divergence
from outstation.ml.drift.numeric.divergence import NO_CELLS, Distributions
from outstation.ml.drift.numeric.sums import MAX_COUNT, are_counts, is_part
from outstation.ml.drift.outputs import reference as further_outputs
from outstation.ml.drift.outputs.counts import BINS as BINS  # quantile bins; `counts` has two more, for rows outside
from outstation.ml.drift.outputs.counts import FurtherOutput, count_cells
from outstation.ml.drift.outputs.reference import MAX_OUTPUTS, FurtherOutputReference
from outstation.ml.kernel.drift_rows import RowLimits
from outstation.ml.performance import cbpe, expected_error
from outstation.ml.performance.expected_error import ErrorReference

VERSION = 1
MIN_WINDOWS, RECOMMENDED_WINDOWS = 20, 40  # drift windows: refused below the first, warned below the second
MIN_VARIANCE_SHARE = 0.05  # of a class, that is left without a daily cycle
OUTSIDE_MARGIN = 0.5  # of the reference's span: rows further beyond its limits are far outside
_HOURS = np.arange(24, dtype=np.int64) * 3_600_000_000
SCORE_CLIP = 1000.0  # in spreads of the reference
MAX_LEVELS = 4  # distinct quantiles of a field whose readings repeat by nature
REST_SHARE = 0.2  # a value in more than this share of rows is a rest value and may repeat


class Reference(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Reference of F fields, C classes (1 if the model names none), D statistics and K drift windows of `window` model
    windows.
    """

    version: int
    made: str  # shipped | site
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    window: int
    window_rows: int
    drift_windows: int
    warning: str | None
    # rows
    edges: Float64s  # (F, 31) inner quantiles
    low: Float64s  # (F,) limits
    high: Float64s
    counts: Ints  # (F, 34) below, 32 bins, above
    missing: Ints  # (F,)
    n: Ints
    mean: Float64s
    m2: Float64s
    longest: Ints  # longest run of one value, rest values excepted
    jump: Float64s  # robust sd of first differences; 0 if unknown
    rest: tuple[tuple[float, ...], ...]
    # model windows
    origin: Float64s  # (D,) origin of sums
    floor: Float64s  # (F,) least variance before its logarithm
    class_n: Ints  # (C, D)
    class_mean: Float64s
    class_sd: Float64s
    # drift windows
    test_mean: Float64s  # (2F,)
    test_sd: Float64s
    # predictions
    output: Ints  # (C,)
    score_edges: Float64s  # (31,), or empty without scores
    score_n: Ints  # (32,) predictions
    score_correct: Ints | None  # (32,) how many of them were right, if known
    site: SiteCalibration | None = None
    modes: int = 0  # classes of a model without labels, if a field of the stream names them
    missing_values: MissingBaseline | None = None  # None if only totals are known
    fault_limits: FaultLimits | None = None  # None if its windows were not measured
    # (F,) spans of the shipped rows beyond their limits, up to which a slow field may wander; None if none does.
    reach: Float64s | None = None
    further: tuple[FurtherOutputReference, ...] = ()  # H further outputs of the model
    error: ErrorReference | None = None  # of a model without labels, if held-out data tell its error
    known_as: str = ""  # digest of the same reference without modes: bins and limits are equal

    def describe_fields(self) -> dict[str, dict[str, float]]:
        """Return rows, mean and sd of each field that has any."""
        return {
            name: {"n": rows, "mean": float(f"{mean:.6g}"), "sd": float(f"{sd:.6g}")}
            for name, rows, mean, sd in zip(
                self.fields, self.n.tolist(), self.mean.tolist(), self.sd.tolist(), strict=True
            )
            if rows
        }

    @property
    def windowed(self) -> bool:
        return self.window_rows > 1

    @property
    def class_count(self) -> int:
        return max(1, len(self.labels), self.modes)

    def with_modes(self, count: int) -> Reference:
        """Return a shipped reference in which each of `count` modes has the statistics of all together."""
        return replace(
            self,
            modes=count,
            known_as=self.digest,
            output=np.zeros(count, np.int64),
            class_n=repeat(self.class_n, count, axis=0),
            class_mean=repeat(self.class_mean, count, axis=0),
            class_sd=repeat(self.class_sd, count, axis=0),
        )

    @property
    def test_count(self) -> int:
        """Number of calibrated tests."""
        return self.layout.test_count if self.site else 2 * len(self.fields)

    @property
    def layout(self) -> ScoreLayout:
        return get_layout(self.task)

    @cached_property
    def task(self) -> Task:
        further = tuple(reference.monitored for reference in self.further)
        return Task(len(self.fields), len(self.labels), self.class_count, self.window_rows, self.window, further)

    @cached_property
    def further_cells(self) -> int:
        """X, the cells of the further outputs."""
        return count_cells(self.task.further)

    @property
    def error_references(self) -> dict[str, ErrorReference]:
        """Held-out errors of each output that has them; the first output has the name ""."""
        further = {reference.output.name: reference.error for reference in self.further if reference.error}
        return further if self.error is None else {"": self.error, **further}

    @property
    def error_bins(self) -> int:
        """E, the bins of the error to expect; 0 if nothing is known of it."""
        return 0 if self.error is None else expected_error.BINS

    @cached_property
    def output_weights(self) -> Float64s:
        """(R, 32) weights of the bins of further outputs."""
        return np.concatenate([NO_WEIGHTS, *(reference.weights for reference in self.further)])

    @cached_property
    def distributions(self) -> Distributions:
        further = np.concatenate([NO_CELLS, *(reference.cells for reference in self.further)])
        return Distributions(divergence.coarsen_bins(self.counts), self.output, self.score_n, further)

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        """Baseline of each detector; empty unless this is a site's reference."""
        site = self.site
        if site is None:
            return {}
        every = self.class_n, self.class_mean, self.class_sd, self.distributions
        none, edges = slice(0, 0), tuple(reference.edges for reference in self.further)
        return {
            detector.name: Baseline(
                *every,
                self.test_mean[self.layout.slices.get(detector.name, none)],
                site.baselines.get(detector.name),
                self.output_weights,
                edges,
            )
            for detector in DETECTORS
        }

    def class_means_at(self, t: Ints) -> Float64s:
        """Return the class means (n, C, D) to expect at times (n,) epoch µs."""
        if not self._has_daily_cycle:
            return np.tile(self.class_mean, (len(t), 1, 1))
        return np.asarray(self.class_mean + self._daily_cycle(t)[:, None] * self.class_sd)

    @cached_property
    def class_sd_by_hour(self) -> Float64s:
        """(C, D) class sds at one hour of day."""
        return without_cycle(self.class_sd, self._daily_cycle(_HOURS)) if self._has_daily_cycle else self.class_sd

    @cached_property
    def _has_daily_cycle(self) -> bool:
        return self.site is not None and any_true(self.site.waves)

    def _daily_cycle(self, t: Ints) -> Float64s:
        """Return what the daily cycle adds to the D statistics (n, D), in class sd."""
        assert self.site is not None
        begin = self.layout[MOMENTS.name].start
        return self.site.cycle.evaluate(t)[:, begin : begin + self.class_mean.shape[1]]

    @cached_property
    def window_sd(self) -> Float64s:
        """(T,) sd of the tests over all drift windows, in whatever operating mode."""
        modes = None if self.site is None else self.site.modes
        return self.test_sd if modes is None else np.asarray(np.hypot(self.test_sd, modes.offset.std(0)))

    @cached_property
    def bin_accuracy(self) -> Float64s | None:
        """(32,) share of right predictions in each bin of their score; None if that is unknown."""
        if self.score_correct is None or not self.score_n.any():
            return None
        return cbpe.estimate_bin_accuracy(self.score_n, self.score_correct)

    @property
    def promised(self) -> Float64s:
        """(32,) accuracy that each bin of the score promises, or the error as a share of the usual one; empty if
        unknown.
        """
        if self.error is not None:
            return self.error.bin_ratio
        return np.empty(0) if self.bin_accuracy is None else self.bin_accuracy

    def describe_smallest_changes(self) -> dict[str, Any] | None:
        """Return, for people, the smallest change of each field that is found at this site."""
        if self.site is None:
            return None
        changes = self.site.sensitivity.to_dict(self.fields, self.sd)
        for name, rows, rest in zip(self.fields, self.stuck_rows.tolist(), self.rest, strict=True):
            changes["fields"][name] |= {"stuck_rows": rows, "never_stuck_at": list(rest)}
        return changes

    @cached_property
    def stuck_rows(self) -> Ints:
        """(F,) rows of one value, no rest value, from which on a field is found stuck in PROBABILITY of cases."""
        rows = self.window * self.window_rows
        within = runs.max_normal_run(self.longest, np.array([rows]))[0] + 1
        # A run that lies in two windows may be too short in both; of many windows, those it fills count.
        cut = np.maximum(within, 2 * within - 1 - round((1 - PROBABILITY) * rows))
        filled = runs.max_constant_run(self.longest) // rows + 1
        return np.where(within > rows, filled * rows + math.ceil(PROBABILITY * (rows - 1)), cut)

    @cached_property
    def digest(self) -> str:
        if self.known_as and self.site is None:
            return self.known_as
        return "sha256:" + hashlib.sha256(self.to_json()).hexdigest()

    @cached_property
    def bounds(self) -> Float64s:
        """(F, 33) boundaries between the 34 counts."""
        return np.concatenate([self.low[:, None], self.edges, self.high[:, None]], axis=1)

    @cached_property
    def has_few_levels(self) -> Bools:
        """(F,) fields of so few values that these repeat by nature, whatever they are."""
        return np.asarray((np.diff(self.edges, axis=1) > 0).sum(1) < MAX_LEVELS)

    @cached_property
    def bin_cuts(self) -> Float64s:
        """(F, 33) cuts: a value belongs above all cuts that are not greater than it. The upper limit is within."""
        return np.concatenate([self.bounds[:, :-1], np.nextafter(self.high, np.inf)[:, None]], axis=1)

    @cached_property
    def bin_cuts_float32(self) -> Float32s:
        """Cuts for float32 values: each cut is the least such number that is not smaller."""
        cuts = self.bin_cuts.astype(np.float32)
        return np.where(cuts < self.bin_cuts, np.nextafter(cuts, np.float32(np.inf)), cuts)

    @cached_property
    def far_limits(self) -> tuple[Float64s, Float64s]:
        """(F,) limits beyond which a row is far outside."""
        span = OUTSIDE_MARGIN * (self.high - self.low)
        return self.low - span, self.high + span

    @cached_property
    def row_limits(self) -> RowLimits:
        """Limits that rows are counted by, laid out for the compiled kernel."""
        origin = self.origin[: len(self.fields)]
        limits = self.bin_cuts_float32, *self.far_limits, self.jump
        return RowLimits(*limits, self.rest, self.has_few_levels, origin)

    @cached_property
    def bin_shares(self) -> Float64s:
        """(F, 32) share of the reference's rows in each bin; rows outside count to the outermost bin."""
        return divergence.shares(divergence.fold_outer_bins(self.counts))

    @cached_property
    def sd(self) -> Float64s:
        """(F,) standard deviation of the rows."""
        return np.asarray(np.sqrt(self.m2 / np.maximum(self.n, 1)))

    def scale_scores(self, top_scores: Float64s) -> Float64s:
        """Return scores (w,) unchanged; predicted values in units of the reference's spread, from its middle."""
        if self.labels:
            return top_scores
        if not len(self.score_edges):
            return np.zeros_like(top_scores)
        middle, low, high = self.score_edges[[BINS // 2 - 1, BINS // 4 - 1, 3 * BINS // 4 - 1]]
        width = max(float(high - low), 1e-9 * (1 + abs(float(middle))))
        return np.asarray(np.clip((top_scores - middle) / width, -SCORE_CLIP, SCORE_CLIP))

    def to_json(self) -> bytes:
        omitted = () if self.site else ("site", "modes", "known_as")
        optional = tuple(name for name in ("missing_values", "fault_limits", "reach") if getattr(self, name) is None)
        optional += () if self.further else ("further",)
        optional += () if self.error else ("error",)
        return arrays.to_json(self, omit=(*omitted, *optional))

    @classmethod
    def from_json(cls, data: bytes) -> Reference:
        """Decode reference.json. Raises BadBundle that names what is malformed."""
        try:
            reference = arrays.from_json(data, cls)
        except ValueError as error:
            raise BadBundle(f"reference.json is malformed ({error}): build it again from the reference data") from error
        _validate(reference)
        return reference


def without_cycle(sd: Float64s, cycle: Float64s) -> Float64s:
    """Return class sds (C, D) without the variance of a `cycle` (n, D) over the day, in class sd."""
    return np.asarray(sd * np.sqrt(np.maximum(1 - cycle.var(0), MIN_VARIANCE_SHARE)))


def draft_reference(
    rows: Float64s,
    starts: Ints,
    window_rows: int,
    *,
    window: int,
    fields: Sequence[str],
    labels: Sequence[str],
    scores: Float64s | None,
    further: Sequence[FurtherOutput] = (),
    answers: Float64s | None = None,
) -> Reference:
    """Draft bins, limits and origins from reference rows (n, F) and top scores (w,); counts and calibration follow.

    `answers` (w, P) are those of `further` outputs.
    """
    _reject_empty(rows, fields)
    quantiles = np.arange(1, BINS) / BINS
    mean, variance = np.nanmean(rows, axis=0), np.nanvar(rows, axis=0)
    floor = np.maximum(1e-4 * variance, 1e-12 * (np.abs(mean) + 1e-6) ** 2)
    statistics = window_statistics.compute_statistics(rows, starts, window_rows, floor).values
    _reject_empty(statistics[:, : len(fields)], fields)
    count = len(fields)
    classes, tests = max(1, len(labels)), 2 * count
    rest = tuple(_rest_values(column) for column in rows.T)
    jump = np.array([_robust_step_sd(column) for column in rows.T])
    longest, _ = runs.longest_runs(Trace.from_rows(rows[None]), Tail.empty(count), rest)
    return Reference(
        version=VERSION,
        made="shipped",
        fields=tuple(fields),
        labels=tuple(labels),
        window=window,
        window_rows=window_rows,
        drift_windows=0,
        warning=None,
        edges=np.nanquantile(rows, quantiles, axis=0).T,
        low=np.nanmin(rows, axis=0),
        high=np.nanmax(rows, axis=0),
        counts=np.zeros((count, BINS + 2), np.int64),
        missing=np.zeros(count, np.int64),
        n=np.zeros(count, np.int64),
        mean=mean,
        m2=np.zeros(count),
        longest=longest[0],
        jump=jump,
        rest=rest,
        origin=np.nanmean(statistics, axis=0),
        floor=floor,
        class_n=np.zeros((classes, statistics.shape[1]), np.int64),
        class_mean=np.zeros((classes, statistics.shape[1])),
        class_sd=np.ones((classes, statistics.shape[1])),
        test_mean=np.zeros(tests),
        test_sd=np.ones(tests),
        output=np.zeros(classes, np.int64),
        score_edges=np.empty(0) if scores is None else np.quantile(scores, quantiles),
        score_n=np.zeros(BINS, np.int64),
        score_correct=None,
        further=() if answers is None else further_outputs.draft(further, answers),
    )


def _reject_empty(values: Float32s | Float64s, fields: Sequence[str]) -> None:
    empty = [name for name, column in zip(fields, values.T, strict=True) if np.isnan(column).all()]
    if empty:
        raise BadBundle(f"no drift reference: (almost) no values of {', '.join(empty)} in the reference data")


def _rest_values(column: Float64s) -> tuple[float, ...]:
    values, counts = np.unique(column[~np.isnan(column)], return_counts=True)
    return tuple(values[counts > REST_SHARE * len(column)].tolist())


def _robust_step_sd(column: Float64s) -> float:
    """Estimate the sd of first differences from their median and their 99th percentile.

    Both agree for normal differences. The larger counts for sensors that move in bursts: their fastest real moves are
    no spikes.
    """
    step = np.abs(np.diff(column[~np.isnan(column)]))
    return max(1.4826 * float(np.median(step)), float(np.quantile(step, 0.99)) / 2.576) if len(step) else 0.0


_COUNTS = ("counts", "missing", "n", "longest", "class_n", "output", "score_n")


def _validate(r: Reference) -> None:
    """Check the rules that types cannot express. Raises BadBundle."""
    fields, classes = len(r.fields), r.class_count
    statistic = 2 * fields if r.windowed else fields
    shapes = {
        "edges": (fields, BINS - 1),
        "counts": (fields, BINS + 2),
        **dict.fromkeys(("low", "high", "missing", "n", "mean", "m2", "longest", "jump", "floor"), (fields,)),
        "origin": (statistic,),
        **dict.fromkeys(("class_n", "class_mean", "class_sd"), (classes, statistic)),
        **dict.fromkeys(("test_mean", "test_sd"), (r.test_count,)),
        "output": (classes,),
        "score_n": (BINS,),
    }
    wrong = [name for name, shape in shapes.items() if getattr(r, name).shape != shape]
    rules = {
        "version": r.version == VERSION,
        "made": r.made in ("shipped", "site"),
        "fields": fields > 0 and len(set(r.fields)) == fields,
        **{name: are_counts(getattr(r, name)) for name in _COUNTS},
        "window": r.window > 0 and r.window_rows > 0 and r.window * r.window_rows <= MAX_COUNT,
        "drift_windows": 0 <= r.drift_windows <= MAX_COUNT,
        "modes": r.modes == 0 or (r.modes == CLASS_COUNT and not r.labels),
        "rest": len(r.rest) == fields,
        "further": len(r.further) <= MAX_OUTPUTS
        and len({reference.output.name for reference in r.further}) == len(r.further)
        and all(reference.is_valid(statistic) for reference in r.further),
        "error": r.error is None or (not r.labels and r.error.is_valid(statistic)),
        "fault_limits": r.fault_limits is None or r.fault_limits.is_valid(fields),
        "reach": r.reach is None or (r.reach.shape == (fields,) and bool((r.reach >= 0).all())),
        "missing_values": r.missing_values is None or r.missing_values.is_valid(fields),
        "score_edges": r.score_edges.shape in ((0,), (BINS - 1,)) and _is_ascending(r.score_edges),
        "score_correct": r.score_correct is None or is_part(r.score_correct, r.score_n),
    }
    wrong += [name for name, holds in rules.items() if not holds]
    wrong += [] if r.site is None else r.site.find_invalid(r.task, r.test_count)
    if not wrong:
        wrong = [] if _is_ascending(r.bounds) else ["edges"]
        wrong += [name for name in ("class_sd", "test_sd", "floor") if not (getattr(r, name) > 0).all()]
        wrong += [name for name in ("m2", "jump") if (getattr(r, name) < 0).any()]
    if wrong:
        raise BadBundle(f"reference.json does not hold together ({', '.join(wrong)}): build it again")


def _is_ascending(values: Float64s) -> bool:
    return bool((np.diff(values, axis=-1) >= 0).all())
