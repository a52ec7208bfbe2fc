"""Machine with three modes and no drift, and a model that predicts the mode with few errors.

Neighbouring readings are autocorrelated, modes last from seconds to minutes, and each run of a mode differs slightly.
Fixed thresholds on the histogram of a window therefore raise false alarms.
"""

from __future__ import annotations

from itertools import groupby

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.foundation.indices import repeat
from outstation.ml.drift import DriftMonitor, DriftState, DriftWindowResult, Reference
from outstation.ml.drift.baseline import summary, window_statistics
from outstation.ml.drift.baseline.learning import build_reference, with_score_accuracy
from outstation.ml.drift.baseline.runs import Tail
from outstation.ml.drift.baseline.summary import Summary

FIELDS = ("x", "y", "z")
LABELS = ("idle", "walk", "run")
ROWS = 20  # per model window
# Drift windows from which a site learns its reference.
LEARN = 40
WINDOW = 10  # model windows per drift window
LEVEL = np.array([[0.0, 1.0, -0.5], [0.6, 0.9, -0.3], [1.2, 0.2, 0.4]])
MOVE = np.array([[0.05, 0.1, 0.08], [0.4, 0.5, 0.3], [1.0, 0.8, 0.9]])


class Readings(msgspec.Struct, frozen=True):
    """`features` (n, 3) of `len(labels)` consecutive model windows, with predictions and scores."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    truth: NDArray[np.int64]
    scores: NDArray[np.float32]

    def windows(self, begin: int, end: int) -> Readings:
        """Return the readings of drift windows `begin` … `end` - 1."""
        part = slice(begin * WINDOW, end * WINDOW)
        rows = slice(begin * WINDOW * ROWS, end * WINDOW * ROWS)
        return Readings(self.features[rows], self.labels[part], self.truth[part], self.scores[part])

    def changed(self, field: int, values: NDArray[np.float32]) -> Readings:
        features = self.features.copy()
        features[:, field] = values
        return replace(self, features=features)


def readings(seed: int, drift_windows: int, *, wrong: float = 0.05) -> Readings:
    rng = np.random.default_rng(seed)
    count = drift_windows * WINDOW
    truth = repeat(rng.integers(0, 3, count), rng.integers(2, 12, count))[:count]
    run = repeat(rng.normal(1, 0.05, (count, 3)), rng.integers(2, 12, count), axis=0)[:count]
    noise = rng.normal(size=(count * ROWS, 3))
    for row in range(1, len(noise)):
        noise[row] = 0.7 * noise[row - 1] + 0.7 * noise[row]
    modes = repeat(truth, ROWS)
    features = (LEVEL[modes] + MOVE[modes] * noise) * repeat(run, ROWS, axis=0)
    mistaken = rng.random(count) < wrong
    labels = np.where(mistaken, rng.integers(0, 3, count), truth)
    sure = np.where(labels == truth, rng.uniform(0.5, 1.0, count), rng.uniform(0.4, 0.7, count))
    scores = repeat(((1 - sure) / 2)[:, None], 3, axis=1)
    scores[np.arange(count), labels] = sure
    return Readings(features.astype(np.float32), labels, truth, scores.astype(np.float32))


def reference(seed: int = 1, drift_windows: int = 60) -> Reference:
    r = readings(seed, drift_windows)
    starts = np.arange(len(r.labels)) * ROWS
    shipped = build_reference(r.features, starts, ROWS, r.labels, r.scores, WINDOW, fields=FIELDS, labels=LABELS)
    return with_score_accuracy(shipped, r.scores.max(1).astype(np.float64), r.labels == r.truth)


def feed(
    monitor: DriftMonitor, state: DriftState, r: Readings, *, batch: int = 50
) -> tuple[DriftState, list[DriftWindowResult]]:
    """Feed the monitor in batches of model windows."""
    verdicts: list[DriftWindowResult] = []
    first = max(0, state.last_counted_row) + 1
    for at in range(0, len(r.labels), batch):
        part = slice(at, at + batch)
        features = r.features[at * ROWS : (at + batch) * ROWS]
        begin = first + at * ROWS
        rows = (begin, begin + len(features) - 1)
        t = np.arange(rows[0], rows[1] + 1, dtype=np.int64) * 10_000
        starts = np.arange(0, len(features), ROWS)
        state, more = monitor.process_batch(
            state, features, starts, ROWS, r.labels[part], r.scores[part], rows=rows, t=t
        )
        verdicts += more
    return state, verdicts


def comparable(verdicts: list[DriftWindowResult]) -> list[object]:
    """All that results say, comparable whatever the batches: neighboring runs of quiet windows count as one.

    Of the sums of a run only counts are in it, as sums of floats depend on their order in the last bit.
    """
    out: list[object] = []
    for is_quiet, group in groupby(verdicts, key=lambda v: v.quiet is not None):
        part = list(group)
        if not is_quiet:
            out += [
                (
                    *(v.index, v.rows, v.t, v.row_count, v.site_digest, v.learning_error, repr(v.members), v.alerts),
                    v.learned_reference and v.learned_reference.to_json(),
                )
                for v in part
            ]
            continue
        runs, last = [v.quiet for v in part if v.quiet is not None], part[-1].members
        columns = [np.concatenate([getattr(run, name) for run in runs]).tolist() for name in runs[0].__struct_fields__]
        spans = [(v.index, v.rows, v.t, v.row_count) for v in part]
        assert all(a[0] + len(run) == b[0] for a, run, b in zip(spans, runs, spans[1:], strict=False))
        ends = [(int(run.rows[0, 0]), int(run.rows[-1, 1]), int(run.row_counts.sum())) for run in runs]
        assert ends == [(*rows, n) for _, rows, _, n in spans]
        counts = [
            np.sum([[*field["counts"], field["below"], field["above"], field["missing"]] for field in fields], axis=0)
            for fields in zip(*(v.members["features"].values() for v in part), strict=True)
        ]
        states = [(name, field["state"], field["cusum"]) for name, field in last["features"].items()]
        out.append((spans[0][0], columns, [n.tolist() for n in counts], states, last["joint"], last["rate"]["cusum"]))
    return out


def summarize_rows(
    reference: Reference, rows: NDArray[np.float64], before: Summary | None = None, tail: Tail | None = None
) -> tuple[Summary, Tail]:
    """Summarize rows (n, F) without model windows, which go on from those `before`, and return their tail."""
    nothing = np.empty(0, np.int64)
    stack, tail = summary.summarize_windows(
        reference,
        rows[None],
        np.empty((1, 0), np.int64),
        window_statistics.compute_statistics(rows, nothing, reference.window_rows, reference.floor),
        nothing,
        None,
        nothing,
        before=None if before is None else summary.stack_one(before),
        tail=tail,
    )
    return summary.select_window(stack, 0), tail
