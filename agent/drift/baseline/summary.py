"""One drift window as numbers that add: any split of its rows, merged in any order, gives the same summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent import arrays
from agent.arrays import Floats, Ints
from agent.drift.baseline import row_counts
from agent.drift.baseline.reference import BINS, Reference
from agent.drift.detectors import correlation, window_statistics
from agent.drift.detectors import sampling as ticks
from agent.drift.detectors import variogram as pace
from agent.drift.detectors.extremes import Extremes
from agent.drift.detectors.resolution import SIZES
from agent.drift.detectors.runs import Tail
from agent.drift.detectors.sampling import Ticks
from agent.drift.detectors.window_statistics import Found
from agent.drift.numeric.groups import Groups
from agent.drift.numeric.sums import Sums


class Summary(msgspec.Struct, frozen=True, eq=False):
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
    ticks: Ticks = msgspec.field(default_factory=Ticks)
    pace: Ints = msgspec.field(default_factory=lambda: np.zeros((1, 1), np.int64))  # (C, …) whole numbers, see `pace`

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
            steps=np.zeros((count, SIZES), np.int64),
            rows_of=Sums.zeros(1, count),
            classes=Sums.zeros(reference.classes, len(reference.origin)),
            output=np.zeros(reference.classes, np.int64),
            scores=np.zeros(BINS, np.int64),
            pairs=np.zeros((reference.classes, correlation.width(count, windowed=reference.windowed)), np.int64),
            sure=np.zeros((reference.classes, 2), np.int64),
            pace=np.zeros((reference.classes, 2 * pace.width(count, reference.window_rows)), np.int64),
        )

    @property
    def rows(self) -> int:
        return int(self.counts[0].sum() + self.missing[0])

    @property
    def rows_each(self) -> Ints:
        """(W,) of a stack."""
        return np.asarray(self.counts[:, 0].sum(-1) + self.missing[:, 0])

    @property
    def windows(self) -> int:
        """Model windows."""
        return int(self.output.sum())

    def add_rows(self, reference: Reference, rows: Floats, tail: Tail) -> tuple[Summary, Tail]:
        """With `rows` (n, F), physical units, NaN missing, that follow on from `tail`."""
        if not len(rows):
            return self, tail
        more, tail = row_counts.of_rows(reference, rows[None], tail)
        added = replace(
            self,
            counts=self.counts + more.counts[0],
            missing=self.missing + more.missing[0],
            outside=self.outside + more.outside[0],
            spikes=self.spikes + more.spikes[0],
            longest=np.maximum(self.longest, more.longest[0]),
            extremes=self.extremes.merge(more.extremes[0]),
            steps=self.steps + more.steps[0],
            rows_of=self.rows_of.add(
                Groups.made(np.zeros(len(rows), np.int64), 1), rows - reference.origin[: rows.shape[1]]
            ),
            ticks=self.ticks.with_repeated(more.repeated),
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
        groups = row_counts.by_class(reference, 1, classes)
        more = row_counts.of_answers(reference, 1, found, named, top, classes, groups)
        return replace(
            self,
            classes=self.classes.add(groups, found.values - reference.origin),
            output=self.output + more.output[0],
            scores=self.scores + more.scores[0],
            pairs=self.pairs + more.pairs[0],
            sure=self.sure + more.sure[0],
            pace=self.pace + more.pace[0],
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
        return arrays.to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Summary:
        """Raises ValueError."""
        return arrays.from_bytes(data, cls)


def stacked(summary: Summary) -> Summary:
    """One as a stack of one: with W = 1 in front of the shapes of all its arrays."""
    return _each(summary, lambda part: part[None])


def at(stack: Summary, number: int) -> Summary:
    """One of a stack."""
    return _each(stack, lambda part: part[number])


def whole(
    reference: Reference, rows: Floats, spans: Ints, found: Found, named: Ints, top: Floats | None, classes: Ints
) -> Summary:
    """A stack of W drift windows: of `rows` (W, n, F), times between them `spans` (W, …) and model windows (W · w).

    The same as that many summaries, begun empty, to which these were added.
    """
    windows, count = len(rows), reference.classes
    of_rows, _ = row_counts.of_rows(reference, rows, Tail.empty(rows.shape[2]))
    groups = row_counts.by_class(reference, windows, classes)
    answers = row_counts.of_answers(reference, windows, found, named, top, classes, groups)
    values = found.values - reference.origin
    summed = Sums.zeros(windows * count, values.shape[1]).add(groups, values)
    shape = windows, count, values.shape[1]
    return Summary(
        reference=reference.digest,
        counts=of_rows.counts,
        missing=of_rows.missing,
        outside=of_rows.outside,
        spikes=of_rows.spikes,
        longest=of_rows.longest,
        extremes=of_rows.extremes,
        steps=of_rows.steps,
        rows_of=Sums.of(rows, reference.origin[: rows.shape[2]]),
        classes=Sums(summed.n.reshape(shape), summed.total.reshape(shape), summed.squares.reshape(shape)),
        output=answers.output,
        scores=answers.scores,
        pairs=answers.pairs,
        sure=answers.sure,
        ticks=Ticks().with_spans(spans, max(1, reference.window_rows - 1)).with_repeated(of_rows.repeated[:, None]),
        pace=answers.pace,
    )


def joined(stacks: Sequence[Summary]) -> Summary:
    """One stack after another."""
    return _put_together(stacks, np.concatenate) if len(stacks) > 1 else stacks[0]


def _each(summary: Summary, change: Callable[[np.ndarray], np.ndarray]) -> Summary:
    return _put_together([summary], lambda parts: change(parts[0]))


def _put_together(summaries: Sequence[Summary], how: Callable[[Sequence[np.ndarray]], np.ndarray]) -> Summary:
    def parts(*of: Any) -> list[np.ndarray]:
        return [how([getattr(one, name) for one in of]) for name in of[0].__struct_fields__]

    plain = {name: how([getattr(one, name) for one in summaries]) for name in _PLAIN}
    return Summary(
        reference=summaries[0].reference,
        rows_of=Sums(*parts(*(one.rows_of for one in summaries))),
        classes=Sums(*parts(*(one.classes for one in summaries))),
        extremes=Extremes(*parts(*(one.extremes for one in summaries))),
        ticks=Ticks(*parts(*(one.ticks for one in summaries))),
        **plain,
    )


_PLAIN = ("counts", "missing", "outside", "spikes", "longest", "steps", "output", "scores", "pairs", "sure", "pace")


def of(reference: Reference, rows: Floats, starts: Ints, labels: Ints, top: Floats | None) -> Summary:
    """The summary of model windows and the rows (n, F) that they cover, all at once."""
    found = window_statistics.of_windows(rows, starts, reference.window_rows, reference.floor)
    covered = rows[window_statistics.covered(starts, reference.window_rows, 0)]
    summary, _ = Summary.empty(reference).add_rows(reference, covered, Tail.empty(rows.shape[1]))
    return summary.add_windows(reference, found, labels, top)
