"""From drift windows to a reference: `build` for a bundle's data, `settle` also for a device's first clean windows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from agent.drift import statistics
from agent.drift.codec import Floats, Ints
from agent.drift.reference import BINS, ENOUGH, FEWEST, Reference, draft
from agent.drift.summary import Summary, of
from agent.drift.sums import Moments
from agent.errors import BadBundle

ODD = 6.0  # robust sd from the middle: left out of the calibration
ODD_SHARE = 1 / 3  # more odd windows than this, and nothing is learned
STEP = 4.0  # sd between the means of the first and the second half: something changed meanwhile
LEAST_SD = 0.05  # class sd: smaller shifts never matter, however steady a site is


@dataclass(frozen=True, eq=False)
class Learning:
    """Drift windows gathered so far. Of each, only the classes that occurred are kept, one entry per class.

    Means (from the shipped reference's origin) and squares are float32: calibration needs no more, and it halves
    the state.
    """

    windows: int
    total: Summary
    window: Ints  # (m,) 0, 1, …
    label: Ints  # (m,)
    n: np.ndarray[tuple[int, ...], np.dtype[np.int32]]  # (m, D)
    mean: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    m2: np.ndarray[tuple[int, ...], np.dtype[np.float32]]

    @classmethod
    def empty(cls, shipped: Reference) -> Learning:
        none, entries = np.empty(0, np.int64), np.empty((0, len(shipped.origin)))
        return cls(
            0,
            Summary.empty(shipped),
            none,
            none,
            entries.astype(np.int32),
            entries.astype(np.float32),
            entries.astype(np.float32),
        )

    def add(self, drift_window: Summary) -> Learning:
        found = drift_window.classes.moments(np.zeros(1))
        seen = np.flatnonzero(found.n.any(1))
        return Learning(
            windows=self.windows + 1,
            total=self.total.merge(drift_window),
            window=np.concatenate([self.window, np.full(len(seen), self.windows)]),
            label=np.concatenate([self.label, seen]),
            n=np.concatenate([self.n, found.n[seen].astype(np.int32)]),
            mean=np.concatenate([self.mean, found.mean[seen].astype(np.float32)]),
            m2=np.concatenate([self.m2, found.m2[seen].astype(np.float32)]),
        )

    def moments(self, shipped: Reference) -> Moments:
        """Per drift window and class, (K, C, D)."""
        shape = (self.windows, shipped.classes, len(shipped.origin))
        n, mean, m2 = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape)
        n[self.window, self.label] = self.n
        mean[self.window, self.label] = np.where(self.n > 0, self.mean + shipped.origin, 0.0)
        m2[self.window, self.label] = self.m2
        return Moments(n, mean, m2)


def settle(shipped: Reference, learning: Learning, *, made: str) -> Reference:
    """A reference in which what was counted and calibrated comes from the gathered windows.

    Raises BadBundle with the reason when there are too few, or they do not agree among themselves.
    """
    windows = learning.windows
    if windows < FEWEST:
        raise BadBundle(f"no drift reference: {windows} drift windows, and fewer than {FEWEST} tell nothing; add data")
    found = learning.moments(shipped)
    pooled = found.pooled(0)
    usual = statistics.normal(pooled)
    values, _ = statistics.tests(found, _others_mean(found, pooled), usual.sd, windowed=shipped.windowed)
    mean, sd = _calibrated(values, shipped.fields)
    total = learning.total
    rows = total.rows_of.moments(shipped.origin[: len(shipped.fields)])
    few = f"only {windows} drift windows: alarms are less reliable than with {ENOUGH}"
    return replace(
        shipped,
        made=made,
        drift_windows=windows,
        warning=few if windows < ENOUGH else None,
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


def _others_mean(found: Moments, pooled: Moments) -> Floats:
    """Class means (K, C, D) without the drift window they are compared with.

    A window judged against means that contain it looks steadier than the next, unseen one will.
    """
    n = pooled.n - found.n
    total = pooled.n * pooled.mean - found.n * found.mean
    mean = total / np.maximum(n, 1)
    overall = total.sum(-2, keepdims=True) / np.maximum(n.sum(-2, keepdims=True), 1)
    return np.asarray(np.where(n < statistics.RARE, overall, mean))


def _calibrated(values: Floats, fields: tuple[str, ...]) -> tuple[Floats, Floats]:
    """Mean and sd of each test over drift windows (K, 2F), odd windows left out. Raises BadBundle."""
    middle = np.median(values, axis=0)
    scale = np.maximum(1.4826 * np.median(np.abs(values - middle), axis=0), LEAST_SD)
    plain = np.abs(values - middle) <= ODD * scale
    _agree(plain.mean(0) >= 1 - ODD_SHARE, fields, "more than a third of the drift windows lie far from the rest")
    kept = np.where(plain, values, np.nan)
    half = len(values) // 2
    first, second = kept[:half], kept[half:]
    within = np.sqrt((np.nanvar(first, axis=0) + np.nanvar(second, axis=0)) / 2)
    step = np.abs(np.nanmean(first, axis=0) - np.nanmean(second, axis=0))
    _agree(step <= STEP * np.maximum(within, LEAST_SD), fields, "it changed between the first and the second half")
    return np.nanmean(kept, axis=0), np.maximum(np.nanstd(kept, axis=0, ddof=1), LEAST_SD)


def _agree(holds: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], fields: tuple[str, ...], reason: str) -> None:
    names = [f"{name} {kind}" for kind in ("mean", "spread") for name in fields]
    wrong = [name for name, fine in zip(names, holds, strict=True) if not fine]
    if wrong:
        raise BadBundle(f"no drift reference: {reason} ({', '.join(wrong)})")


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
        learning = learning.add(of(base, part, local, labels_idx[some], None if top is None else top[some]))
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
