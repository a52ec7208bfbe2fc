"""One drift window as numbers that add: any split of its rows, merged in any order, gives the same summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from agent.drift import codec, faults, joint, pace, statistics, ticks
from agent.drift import steps as sizes_of_steps
from agent.drift.codec import Floats, Ints
from agent.drift.extremes import Extremes
from agent.drift.faults import Tail
from agent.drift.reference import BINS, Reference
from agent.drift.statistics import Found
from agent.drift.sums import Sums, by_group
from agent.drift.ticks import Ticks

SURE = 2.0**20


@dataclass(frozen=True, eq=False)
class Summary:
    """Counts and sums under one shipped reference, named by its digest; of constant size.

    Runs, steps and lone jumps that straddle two merged parts are only seen when the second part was added with the
    first one's `Tail`.
    """

    reference: str
    counts: Ints  # (F, 34) rows below, in 32 bins, above
    missing: Ints  # (F,) rows
    outside: Ints  # rows far outside the reference's limits
    spikes: Ints
    longest: Ints  # longest run of one value, rest values excepted
    extremes: Extremes
    steps: Ints  # (F, 64) from row to row, by size
    rows_of: Sums  # (1, F) values of rows
    classes: Sums  # (C, D) statistics of model windows
    output: Ints  # (C,) answers, as the model named them
    scores: Ints  # (32,) answers by top score
    pairs: Ints  # (C, …) whole numbers about pairs of fields, see `joint`
    sure: Ints  # (C, 2) answers with a score, and the sum of their top scores in 1/SURE
    # In a state saved before these were counted: none, which adds to whatever follows.
    ticks: Ticks = field(default_factory=Ticks)
    pace: Ints = field(default_factory=lambda: np.zeros((1, 1), np.int64))  # (C, …) whole numbers, see `pace`

    @classmethod
    def empty(cls, reference: Reference) -> Summary:
        count = len(reference.fields)
        none = np.zeros(count, np.int64)
        return cls(
            reference=reference.digest,
            counts=np.zeros((count, BINS + 2), np.int64),
            missing=none,
            outside=none,
            spikes=none,
            longest=none,
            extremes=Extremes.empty(count),
            steps=np.zeros((count, sizes_of_steps.SIZES), np.int64),
            rows_of=Sums.zeros(1, count),
            classes=Sums.zeros(reference.classes, len(reference.origin)),
            output=np.zeros(reference.classes, np.int64),
            scores=np.zeros(BINS, np.int64),
            pairs=np.zeros((reference.classes, joint.width(count, windowed=reference.windowed)), np.int64),
            sure=np.zeros((reference.classes, 2), np.int64),
            pace=np.zeros((reference.classes, 2 * pace.width(count, reference.window_rows)), np.int64),
        )

    @property
    def rows(self) -> int:
        return int(self.counts[0].sum() + self.missing[0])

    @property
    def windows(self) -> int:
        """Model windows."""
        return int(self.output.sum())

    def add_rows(self, reference: Reference, rows: Floats, tail: Tail) -> tuple[Summary, Tail]:
        """With `rows` (n, F), physical units, NaN missing, that follow on from `tail`."""
        joined = np.concatenate([tail.rows[-1:], rows])
        longest, spikes, tail = faults.scan(rows, tail, reference.rest, reference.jump)
        span = faults.WIDER * (reference.high - reference.low)
        outside = ((rows < reference.low - span) | (rows > reference.high + span)).sum(0)
        missing = np.isnan(rows).sum(0)
        origin = reference.origin[: rows.shape[1]]
        ordered, exact = _ordered(rows)
        added = replace(
            self,
            counts=self.counts + _histogram(ordered, reference.cuts_single if exact else reference.cuts, missing),
            missing=self.missing + missing,
            outside=self.outside + outside,
            spikes=self.spikes + spikes,
            longest=np.maximum(self.longest, longest),
            extremes=self.extremes.merge(Extremes.of(ordered, len(rows) - missing)),
            steps=self.steps + sizes_of_steps.count(joined, rows.shape[1]),
            rows_of=self.rows_of.add(np.zeros(len(rows), np.int64), rows - origin),
            ticks=self.ticks.with_repeated(ticks.repeated(joined, reference.rest)),
        )
        return added, tail

    def add_times(self, t: Ints, starts: Ints, reference: Reference, before: int) -> Summary:
        """With the steps in time of model windows that begin at offsets `starts` into `t` (n,) epoch µs.

        `before` is the time of the row before the first one, 0 for none; single rows need it.
        """
        spans = ticks.spans(t, starts, reference.window_rows, before)
        return replace(self, ticks=self.ticks.with_spans(spans, max(1, reference.window_rows - 1)))

    def add_windows(
        self, reference: Reference, found: Found, named: Ints, top: Floats | None, classes: Ints | None = None
    ) -> Summary:
        """With model windows: what was found in them, the class `named` for each (w,) and its score (w,).

        `classes` (w,) are the classes they are compared with, where these are others than named.
        """
        classes = named if classes is None else classes
        scores, sure = self.scores, self.sure
        if top is not None:
            if len(reference.score_edges):
                # One that is not known is neither sure nor in doubt.
                told = top[~np.isnan(top)]
                scores = scores + np.bincount(
                    np.searchsorted(reference.score_edges, told, side="right"), minlength=BINS
                )
            whole = np.rint(reference.scaled(np.where(np.isfinite(top), top, 0.0)) * SURE)
            count = len(self.output)
            more = np.bincount(classes, minlength=count), np.bincount(classes, whole, count).astype(np.int64)
            sure = sure + np.stack(more, axis=1)
        return replace(
            self,
            classes=self.classes.add(classes, found.values - reference.origin),
            output=self.output + np.bincount(named, minlength=len(self.output)),
            scores=scores,
            pairs=self.pairs + _pairs(reference, found, classes),
            sure=sure,
            pace=self.pace + _pace(reference, found, classes),
        )

    def merge(self, other: Summary) -> Summary:
        """Both together; associative and commutative, counts exact. Raises ValueError under different references."""
        if self.reference != other.reference:
            raise ValueError("summaries made under different references do not add up: their bins differ")
        return Summary(
            reference=self.reference,
            counts=self.counts + other.counts,
            missing=self.missing + other.missing,
            outside=self.outside + other.outside,
            spikes=self.spikes + other.spikes,
            longest=np.maximum(self.longest, other.longest),
            extremes=self.extremes.merge(other.extremes),
            steps=self.steps + other.steps,
            rows_of=self.rows_of + other.rows_of,
            classes=self.classes + other.classes,
            output=self.output + other.output,
            scores=self.scores + other.scores,
            pairs=self.pairs + other.pairs,
            sure=self.sure + other.sure,
            ticks=self.ticks + other.ticks,
            pace=self.pace + other.pace,
        )

    def to_bytes(self) -> bytes:
        return codec.to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Summary:
        """Raises ValueError."""
        return codec.from_bytes(data, cls)


def stacked(summaries: Sequence[Summary]) -> Summary:
    """W summaries under one reference as one whose arrays have W in front: to compute on all of them at once."""

    def sums(name: str) -> Sums:
        parts = [getattr(summary, name) for summary in summaries]
        return Sums(*(np.stack([getattr(part, one.name) for part in parts]) for one in fields(Sums)))

    members: dict[str, Any] = {name: np.stack([getattr(one, name) for one in summaries]) for name in _PLAIN}
    return Summary(
        reference=summaries[0].reference,
        rows_of=sums("rows_of"),
        classes=sums("classes"),
        extremes=Extremes(*(np.stack([getattr(s.extremes, n) for s in summaries]) for n in ("values", "rows"))),
        **members,
    )


_PLAIN = ("counts", "missing", "outside", "spikes", "longest", "steps", "output", "scores", "pairs", "sure", "pace")


def of(reference: Reference, rows: Floats, starts: Ints, labels: Ints, top: Floats | None) -> Summary:
    """The summary of model windows and the rows (n, F) that they cover, all at once."""
    found = statistics.of_windows(rows, starts, reference.window_rows, reference.floor)
    covered = rows[statistics.covered(starts, reference.window_rows, 0)]
    summary, _ = Summary.empty(reference).add_rows(reference, covered, Tail.empty(rows.shape[1]))
    return summary.add_windows(reference, found, labels, top)


def _ordered(rows: Floats) -> tuple[np.ndarray, bool]:
    """Each field's values (F, n) in ascending order, NaN last; and whether they are float32, which readings are.

    Sorting the rows and looking up 33 cuts costs half of looking up every row; as float32, less.
    """
    single = rows.astype(np.float32)
    exact = bool(((single == rows) | np.isnan(rows)).all())
    return np.sort(single.T if exact else rows.T, axis=1), exact


def _histogram(ordered: np.ndarray, cuts: np.ndarray, missing: Ints) -> Ints:
    """(F, 34). A value on an inner edge belongs to the bin above it, one on a limit to the bin inside."""
    under = np.zeros((len(ordered), BINS + 3), np.int64)
    for at, column in enumerate(ordered):
        under[at, 1:-1] = column.searchsorted(cuts[at])
    under[:, -1] = ordered.shape[1] - missing
    return under[:, 1:] - under[:, :-1]


def _pace(reference: Reference, found: Found, classes: Ints) -> Ints:
    out = np.zeros((reference.classes, 2 * found.pace.shape[1]), np.int64)
    for group, some in by_group(classes, reference.classes) if out.shape[1] else ():
        out[group] = pace.sums(found.pace[some])
    return out


def _pairs(reference: Reference, found: Found, classes: Ints) -> Ints:
    out = np.zeros((reference.classes, joint.width(len(reference.fields), windowed=reference.windowed)), np.int64)
    if reference.windowed:
        for group, some in by_group(classes, reference.classes):
            out[group] = joint.sums(found.z[some])
        return out
    whole = joint.in_steps((found.values - reference.class_mean[classes]) / reference.class_sd[classes])
    for group, some in by_group(classes, reference.classes):
        out[group] = joint.of_rows(whole[some])
    return out
