"""One drift window as numbers that add: any split of its rows, merged in any order, gives the same summary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agent.drift import codec, estimate, faults, sizes, statistics
from agent.drift.codec import Floats, Ints
from agent.drift.faults import Tail
from agent.drift.reference import BINS, Reference
from agent.drift.sums import Sums


@dataclass(frozen=True, eq=False)
class Summary:
    """Counts and sums under one shipped reference, named by its digest; of constant size.

    Runs and lone jumps that straddle two merged parts are only seen when the second part was added with the
    first one's `Tail`.
    """

    reference: str
    counts: Ints  # (F, 34) rows below, in 32 bins, above
    missing: Ints  # (F,) rows
    outside: Ints  # rows far outside the reference's limits
    spikes: Ints
    longest: Ints  # longest run of one value, rest values excepted
    rows_of: Sums  # (1, F) values of rows
    classes: Sums  # (C, D) statistics of model windows
    output: Ints  # (C,) answers
    scores: Ints  # (32,) answers by top score

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
            rows_of=Sums.zeros(1, count),
            classes=Sums.zeros(reference.classes, len(reference.origin)),
            output=np.zeros(reference.classes, np.int64),
            scores=np.zeros(BINS, np.int64),
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
        longest, spikes, tail = faults.scan(rows, tail, reference.rest, reference.jump)
        span = faults.WIDER * (reference.high - reference.low)
        outside = ((rows < reference.low - span) | (rows > reference.high + span)).sum(0)
        missing = np.isnan(rows).sum(0)
        origin = reference.origin[: rows.shape[1]]
        added = replace(
            self,
            counts=self.counts + _histogram(rows, reference.bounds, missing),
            missing=self.missing + missing,
            outside=self.outside + outside,
            spikes=self.spikes + spikes,
            longest=np.maximum(self.longest, longest),
            rows_of=self.rows_of.add(np.zeros(len(rows), np.int64), rows - origin),
        )
        return added, tail

    def add_windows(self, reference: Reference, found: Floats, labels: Ints, top: Floats | None) -> Summary:
        """With model windows: statistics (w, D), the class named for each (w,) and its score (w,)."""
        scores = self.scores
        if top is not None and len(reference.score_edges):
            scores = scores + np.bincount(np.searchsorted(reference.score_edges, top, side="right"), minlength=BINS)
        return replace(
            self,
            classes=self.classes.add(labels, found - reference.origin),
            output=self.output + np.bincount(labels, minlength=len(self.output)),
            scores=scores,
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
            rows_of=self.rows_of + other.rows_of,
            classes=self.classes + other.classes,
            output=self.output + other.output,
            scores=self.scores + other.scores,
        )

    def to_bytes(self) -> bytes:
        return codec.to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Summary:
        """Raises ValueError."""
        return codec.from_bytes(data, cls)

    def describe(self, shipped: Reference) -> dict[str, Any]:
        """`features`, `output` and `estimate` of a drift message, effect sizes against the shipped reference.

        No value of a row and no extreme of the data. Moments to 6 significant digits, sizes to 4 decimals. The judge
        adds the states.
        """
        moments = self.rows_of.moments(shipped.origin[: len(shipped.fields)])
        ours, theirs = _folded(self.counts), _folded(shipped.counts)
        measured = {
            "psi": sizes.psi(theirs, ours),
            "js": sizes.js(theirs, ours),
            "ks": sizes.ks(theirs, ours),
            "w1": sizes.w1(theirs, ours, shipped.bounds, shipped.sd),
        }
        rounded = {name: np.round(values, 4).tolist() for name, values in measured.items()}
        features: dict[str, Any] = {}
        for i, name in enumerate(shipped.fields):
            features[name] = {
                "counts": self.counts[i, 1:-1].tolist(),
                "missing": int(self.missing[i]),
                "below": int(self.counts[i, 0]),
                "above": int(self.counts[i, -1]),
                "mean": short(moments.mean[0, i]),
                "m2": short(moments.m2[0, i]),
            } | {size: values[i] for size, values in rounded.items()}
        return {"features": features, "output": self._output(shipped), "estimate": self._estimate(shipped)}

    def _output(self, shipped: Reference) -> dict[str, Any]:
        if shipped.labels:
            counts = {label: int(n) for label, n in zip(shipped.labels, self.output, strict=True) if n}
            return {"counts": counts, "psi": round(float(sizes.psi(shipped.output, self.output)), 4)}
        return {"counts": self.scores.tolist(), "psi": round(float(sizes.psi(shipped.score_n, self.scores)), 4)}

    def _estimate(self, shipped: Reference) -> dict[str, Any] | None:
        if shipped.score_correct is None:
            return None
        return estimate.cbpe(shipped.score_n, shipped.score_correct, self.scores)


def of(reference: Reference, rows: Floats, starts: Ints, labels: Ints, top: Floats | None) -> Summary:
    """The summary of model windows and the rows (n, F) that they cover, all at once."""
    found = statistics.of_windows(rows, starts, reference.window_rows, reference.floor)
    covered = rows[statistics.covered(starts, reference.window_rows, 0)]
    summary, _ = Summary.empty(reference).add_rows(reference, covered, Tail.empty(rows.shape[1]))
    return summary.add_windows(reference, found, labels, top)


def short(value: float, digits: int = 6) -> float:
    return float(f"{float(value):.{digits}g}")


def _histogram(rows: Floats, bounds: Floats, missing: Ints) -> Ints:
    """(F, 34). A value on an inner edge belongs to the bin above it, one on a limit to the bin inside.

    Sorting the rows and looking up 33 bounds costs half of looking up every row.
    """
    ordered = np.sort(rows.T, axis=1)  # NaN last
    under = np.zeros((rows.shape[1], BINS + 3), np.int64)
    for field, column in enumerate(ordered):
        under[field, 1:-2] = np.searchsorted(column, bounds[field, :-1], side="left")
        under[field, -2] = np.searchsorted(column, bounds[field, -1], side="right")
    under[:, -1] = len(rows) - missing
    return np.diff(under, axis=1)


def _folded(counts: Ints) -> Ints:
    """(F, 32), what lies outside counted to the outermost."""
    inner = counts[:, 1:-1].copy()
    inner[:, 0] += counts[:, 0]
    inner[:, -1] += counts[:, -1]
    return inner
