"""Fingerprints of runs of rows, to find the same readings in two places."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agent.model.inference.features import Floats, Ints

Fingerprints = NDArray[np.uint64]
_ROWS_PER_FINGERPRINT = 8  # rows of a window that make one print: more would miss windows that were cut elsewhere
_MAX_EXPECTED_MATCHES = 0.05
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def fingerprint_rows(rows: Floats, window_rows: int) -> tuple[Fingerprints, NDArray[np.bool_]]:
    """(prints (n - k + 1,) of k rows each, which of them tell something: a sensor at rest repeats itself).

    So does the night, to a model of single rows: one tells something where chance would hardly make another.
    """
    k = min(_ROWS_PER_FINGERPRINT, window_rows)
    bits = (rows + np.float32(0)).view(np.uint32).astype(np.uint64)
    each = np.zeros(len(rows), np.uint64)
    for column in bits.T:
        each = _mix_bits(each * _HASH_MULTIPLIER + column)
    count = max(0, len(rows) - k + 1)
    found, still = np.zeros(count, np.uint64), np.ones(count, bool)
    for i in range(k):
        found = found * np.uint64(1_000_003) + each[i : i + count]
        still &= each[i : i + count] == each[:count]
    return found, ~still if k > 1 else np.isfinite(rows).any(axis=1) & (_expected_matches(rows) < _MAX_EXPECTED_MATCHES)


def any_in_windows(mask: NDArray[np.bool_], starts: Ints, window_rows: int) -> NDArray[np.bool_]:
    """(w,) whether one of the prints within each window is so."""
    within = window_rows - min(_ROWS_PER_FINGERPRINT, window_rows) + 1
    sums = np.concatenate([[0], np.cumsum(mask)])
    return np.asarray(sums[starts + within] > sums[starts])


def _expected_matches(rows: Floats) -> NDArray[np.float64]:
    """(n,) how many rows alike are to be expected, were fields independent."""
    expected = np.full(len(rows), float(len(rows)))
    for column in rows.T:
        _, at, count = np.unique(column, return_inverse=True, return_counts=True)
        expected *= count[at] / len(rows)
    return expected


def _mix_bits(words: Fingerprints) -> Fingerprints:
    words = (words ^ (words >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray(words ^ (words >> np.uint64(29)))
