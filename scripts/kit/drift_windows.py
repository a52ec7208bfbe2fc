"""Drift windows of all kinds, drawn from a generator: what the compiled kernel must summarize as NumPy does.

Values are noise, steps, ties, zeros of both signs, denormals, huge, missing, infinite or none of float32; windows have
one row or many, one field or 64.
"""

from __future__ import annotations

from typing import NamedTuple
from unittest.mock import patch

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints
from outstation.ml.drift.baseline import summary
from outstation.ml.drift.baseline.fault_limits import compute_own_misfit
from outstation.ml.drift.baseline.reference import BINS, Reference
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.detectors.class_means import ClassMeanDetector
from outstation.ml.drift.detectors.moments import compute_mean_squares, compute_test_values
from outstation.ml.drift.detectors.registry import SCORED
from outstation.ml.drift.numeric import divergence
from outstation.ml.drift.state import Batch
from outstation.ml.kernel import library
from outstation.ml.kernel.library import Library

_FIELDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 25, 64)
_ROWS = (1, 1, 2, 3, 4, 5, 8, 16, 33)  # of a model window
_MOST_VALUES = 6000


class DriftWindows(NamedTuple):
    """`windows` drift windows in a row, of `starts` model windows together, and where they are cut into two batches."""

    reference: Reference
    batch: Batch
    windows: int
    classes: Ints
    cut: int  # model windows of a single drift window in the first batch


def draw(rng: np.random.Generator) -> DriftWindows:
    fields, window_rows = int(rng.choice(_FIELDS)), int(rng.choice(_ROWS))
    window = int(rng.choice([1, 2, 3, 8, 20]))
    most = max(1, _MOST_VALUES // (fields * window_rows * window))
    windows = int(rng.integers(1, min(most, 40) + 1))
    count, classes = windows * window, int(rng.choice([1, 2, 5]))
    reference = draw_reference(rng, fields, classes, window_rows, window)
    n = count * window_rows
    with np.errstate(all="ignore"):
        features = draw_values(rng, n, fields).astype(np.float32)
    scored = bool(rng.integers(0, 2))
    top = np.where(rng.random(count) < 0.1, np.nan, rng.random(count)) if scored else None
    batch = Batch(
        features,
        np.arange(count, dtype=np.int64) * window_rows,
        rng.integers(0, classes, count),
        top,
        0,
        np.arange(n, dtype=np.int64) * 1000 + 1000,
    )
    return DriftWindows(reference, batch, windows, rng.integers(0, classes, count), int(rng.integers(0, window + 1)))


def draw_reference(rng: np.random.Generator, fields: int, classes: int, window_rows: int, window: int) -> Reference:
    cuts = np.sort(rng.normal(0, 1, (fields, BINS + 1)), axis=1)
    if rng.random() < 0.3:
        cuts = np.round(cuts, 1)
    rest = tuple(
        tuple(rng.choice([0.0, 0.5, -1.0, 2.0], rng.integers(0, 3), replace=False).tolist()) for _ in range(fields)
    )
    width = 2 * fields if window_rows > 1 else fields
    zero = np.zeros(fields, np.int64)
    return Reference(
        version=1,
        made="shipped",
        fields=tuple(f"f{i}" for i in range(fields)),
        labels=tuple(f"c{i}" for i in range(classes)) if classes > 1 else (),
        window=window,
        window_rows=window_rows,
        drift_windows=0,
        warning=None,
        edges=cuts[:, 1:-1],
        low=cuts[:, 0],
        high=cuts[:, -1],
        counts=np.zeros((fields, BINS + 2), np.int64),
        missing=zero,
        n=zero,
        mean=np.zeros(fields),
        m2=np.ones(fields),
        longest=zero,
        jump=np.where(rng.random(fields) < 0.2, 0, rng.gamma(1, 0.1, fields)),
        rest=rest,
        origin=rng.normal(0, 1, width),
        floor=rng.choice(np.array([1e-9, 0.01]), fields),
        class_n=np.zeros((classes, width), np.int64),
        class_mean=rng.normal(0, 1, (classes, width)),
        class_sd=rng.gamma(2, 0.5, (classes, width)) + 1e-3,
        test_mean=np.zeros(2 * fields),
        test_sd=np.ones(2 * fields),
        output=np.zeros(classes, np.int64),
        score_edges=np.linspace(0, 1, BINS + 1)[1:-1],
        score_n=np.zeros(BINS, np.int64),
        score_correct=None,
        known_as="drawn",
    )


def draw_values(rng: np.random.Generator, n: int, fields: int) -> Float64s:
    values: Float64s = rng.normal(0, rng.choice([0.1, 1, 5]), (n, fields))
    kind = int(rng.integers(0, 9))
    if kind == 1:
        values = np.round(values)
    elif kind == 2:
        values *= 1e-42
    elif kind == 3:
        values = rng.choice(np.array([0.0, -0.0, 0.5, 1.0]), values.shape)
    elif kind == 4:
        values = np.round(values[: 1 + n // 7], 1)[np.arange(n) // 7]
    elif kind == 5:
        values = rng.choice(np.array([0.5, 2.0, 3e38, -3e38, 1e-45, np.nan]), values.shape)
    elif kind == 6:
        values = np.cumsum(values, axis=0)
    elif kind == 7:
        values[:, rng.random(fields) < 0.5] = rng.choice([0.0, 0.5, 7.0, np.nan])
    elif kind == 8:
        # As float32, some steps round up to a power of two.
        values = rng.choice(np.array([1.0, 4.0, 0.0, 2**-27, -(2**-27)]), values.shape)
    if rng.random() < 0.4:
        values[rng.random(values.shape) < rng.choice([0.02, 0.5, 0.97])] = np.nan
    if rng.random() < 0.15:
        values[rng.random(values.shape) < 0.05] = rng.choice([np.inf, -np.inf])
    if rng.random() < 0.2:
        values[int(rng.integers(0, n)) :, int(rng.integers(0, fields))] = 0.5
    return values


def summarize(case: DriftWindows, compiled: Library | None) -> bytes:
    """Summarize the windows together, and the first one in two batches, by the library or by NumPy."""
    reference, batch = case.reference, case.batch
    fields, each = len(reference.fields), len(batch.starts) // case.windows
    with patch.object(library, "kernel", lambda: compiled), np.errstate(all="ignore"):
        part = batch.slice_windows(slice(0, len(batch.starts)), reference)
        rows = part.values.reshape(case.windows, -1, fields)
        spans = np.zeros((case.windows, 0), np.int64)
        args = part.stats, part.predicted, part.top_scores, case.classes
        together, tail = summary.summarize_windows(reference, rows, spans, *args)
        answers = [together.to_bytes(), msgspec.msgpack.encode(_raw(tail)), *_compare(together, reference)]
        before, end = None, None
        for index in (slice(0, case.cut), slice(case.cut, each)):
            if index.start < index.stop:
                part = batch.slice_windows(index, reference)
                args = part.stats, part.predicted, part.top_scores, case.classes[index]
                before, end = summary.summarize_windows(
                    reference, part.values[None], spans[:1], *args, before=before, tail=end
                )
                answers += [before.to_bytes(), msgspec.msgpack.encode(_raw(end))]
        return b"".join(answers)


def _raw(tail: msgspec.Struct) -> list[bytes]:
    return [np.asarray(getattr(tail, name)).tobytes() for name in tail.__struct_fields__]


def _compare(stack: Summary, reference: Reference) -> list[bytes]:
    """Compare stacked windows with a reference's classes, and with the distributions of the first window."""
    moments, mean, sd = stack.class_sums.moments(reference.origin), reference.class_mean, reference.class_sd
    fields, task = len(reference.fields), reference.task
    moving = mean + np.linspace(-1, 1, len(moments.n))[:, None, None]
    usual = divergence.shares(divergence.fold_outer_bins(stack.counts[0]))
    numbers = [
        *compute_test_values(moments, mean, sd, windowed=reference.windowed),
        compute_mean_squares(moments, mean, sd),
        compute_own_misfit(moments, moving, sd, fields),
        compute_own_misfit(moments, np.broadcast_to(mean, moments.n.shape), sd, fields),
        divergence.compare_counts(stack.counts, usual, reference.bounds, reference.sd),
    ]
    for detector in SCORED:
        if isinstance(detector, ClassMeanDetector) and detector.width(task):
            expected = np.resize(mean, (len(mean), detector.width(task)))
            numbers.append(detector.deviations(task, stack.detectors[detector.name], expected))
    # Unknown numbers have no sign.
    return [np.where(np.isnan(part), np.nan, part).tobytes() for part in numbers]
