"""Compiled comparisons of drift windows with a reference: class moments, class means and divergences of histograms."""

from __future__ import annotations

import numpy as np

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.ml.kernel.library import Library, address

_BINS = 34
_VALUES, _SQUARES, _MISFIT = range(3)
# NumPy adds rows of several numbers in their order, but eight or more single numbers in pairs.
_MAX_SINGLE_CLASSES = 7


def has_infinite(library: Library, values: Float32s) -> bool:
    """Return True if one of contiguous values is infinite."""
    if values.dtype != np.float32 or not values.flags.c_contiguous:
        raise ValueError("values to look through are not contiguous float32")
    return bool(library.has_infinite(values.size, address(values)))


def sums_in_order(classes: int, width: int) -> bool:
    """Return True if NumPy sums (..., `classes`, `width`) over classes in their order, as the library does."""
    return width > 1 or classes <= _MAX_SINGLE_CLASSES


def supports(n: Ints, usual: Float64s) -> bool:
    """Return True if the library compares stacked moments of `n` values with the `usual` ones (C, D)."""
    return n.ndim == 3 and usual.shape == n.shape[1:] and sums_in_order(*usual.shape)


def compute_residuals(
    library: Library, n: Ints, mean: Float64s, m2: Float64s, usual: Float64s, sd: Float64s
) -> tuple[Float64s, Float64s, Float64s]:
    """Return mean residual in class sd, mean shift, and variance of residuals (W, D) of moments (W, C, D).

    They are from `usual` means (C, D), with this `sd` (C, D).
    """
    out = _compare(library, _VALUES, (n, mean, m2), usual, sd)
    return out[:, 0], out[:, 1], out[:, 2]


def compute_mean_squares(
    library: Library, n: Ints, mean: Float64s, m2: Float64s, usual: Float64s, sd: Float64s
) -> Float64s:
    """Return the mean squares (W, D) of deviations from `usual` means (C, D), in class sd."""
    return _compare(library, _SQUARES, (n, mean, m2), usual, sd)


def compute_misfit(library: Library, n: Ints, mean: Float64s, m2: Float64s, usual: Float64s, sd: Float64s) -> Float64s:
    """Return the mean squares (W, D) of deviations from `usual` means (W, C, D), in class sd, less 1."""
    return _compare(library, _MISFIT, (n, mean, m2), usual, sd)


def _compare(
    library: Library, kind: int, moments: tuple[Ints, Float64s, Float64s], usual: Float64s, sd: Float64s
) -> Float64s:
    n, mean, m2 = np.ascontiguousarray(moments[0], np.int64), _floats(moments[1]), _floats(moments[2])
    windows, classes, width = n.shape
    is_constant = usual.ndim == 2 or usual.strides[0] == 0
    usual = _floats(usual[0] if usual.ndim == 3 and is_constant and windows else usual)
    sd, size = _floats(sd), classes * width
    fits = usual.size == (size if is_constant else windows * size)
    if mean.shape != n.shape or m2.shape != n.shape or sd.shape != (classes, width) or not (fits or not windows):
        raise ValueError("moments of classes and what is usual differ in shape")
    out = np.empty((windows, 3, width) if kind == _VALUES else (windows, width))
    library.compare_moments(
        *(windows, classes, width, 0 if is_constant else size, kind),
        *(address(n), address(mean), address(m2), address(usual), address(sd), address(out)),
    )
    return out


def average_deviations(library: Library, sums: Ints, scale: float, expected: Float64s) -> Float64s:
    """Return the mean deviation (W, X) of counts and `sums` (W, C, 2X) in steps of 1 / `scale` from those `expected`.

    NaN without any.
    """
    sums, expected, scales = np.ascontiguousarray(sums, np.int64), _floats(expected), np.array([scale])
    windows, classes, both = sums.shape
    if expected.shape != (classes, both // 2) or both % 2:
        raise ValueError("sums of classes and the means to expect differ in shape")
    out = np.empty((windows, both // 2))
    library.average_deviations(
        *(windows, classes, both // 2, address(sums), address(scales), address(expected), address(out))
    )
    return out


def compare_shares(library: Library, counts: Ints, reference: Float64s, bounds: Float64s, sd: Float64s) -> Float64s:
    """Return PSI, JS, KS and W1 (M, F, 4) of `counts` (M, F, 34) against shares of the `reference` (F, 32).

    `bounds` (F, 33) of the bins; `sd` (F,).
    """
    counts, reference = np.ascontiguousarray(counts, np.int64), _floats(reference)
    bounds, sd = _floats(bounds), _floats(sd)
    messages, fields, bins = counts.shape
    if bins != _BINS or reference.shape != (fields, _BINS - 2):
        raise ValueError("counts and the reference's shares differ in shape")
    if bounds.shape != (fields, _BINS - 1) or sd.shape != (fields,):
        raise ValueError("bounds and sds are not those of the counted fields")
    rows = messages * fields
    shares, ratios, sizes = np.empty((rows, _BINS - 2)), np.empty((3, rows, _BINS - 2)), np.empty((rows, 4))
    usual, q, logs, out = address(reference), address(shares), address(ratios), address(sizes)
    library.compare_shares(rows, fields, address(counts), usual, address(bounds), address(sd), q, logs, out)
    # Logarithms differ between processors, and so they are NumPy's.
    np.log(ratios[0], out=ratios[0])
    np.log2(ratios[1:], out=ratios[1:])
    library.sum_divergences(rows, fields, usual, q, logs, out)
    return sizes.reshape(messages, fields, 4)


def _floats(values: Float64s) -> Float64s:
    return np.ascontiguousarray(values, np.float64)
