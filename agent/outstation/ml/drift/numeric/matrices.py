"""Small matrices without BLAS and LAPACK: products and pseudo-inverses with the same bits on every processor.

A first call of BLAS takes megabytes for its buffers, and its sums differ from processor to processor.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from outstation.foundation.arrays import Float64s

_MAX_SWEEPS = 40
_ORTHOGONAL = 1e-15  # cosine of two columns that are taken for orthogonal
_RANK_TOLERANCE = 1e-13  # of the largest singular value: columns below it depend on the others


def multiply(left: Float64s, right: Float64s) -> Float64s:
    """Return the product (m, n) of matrices (m, k) and (k, n), summed in the order of k."""
    product = np.zeros((len(left), right.shape[1]))
    for column, row in zip(left.T, right, strict=True):
        product += column[:, None] * row
    return product


def invert(design: Float64s) -> Float64s:
    """Return the pseudo-inverse (n, K) of a matrix (K, n), K ≥ n.

    Source: Hestenes (1958), Inversion of matrices by biorthogonalization and related results, SIAM Journal 6: columns
    are rotated in pairs until all are orthogonal.
    """
    # Rows of both are columns of the design, and of the rotation.
    columns, rotation = design.T.copy(), np.eye(design.shape[1])
    for _ in range(_MAX_SWEEPS):
        if not sum(_rotate(columns, rotation, *pair) for pair in combinations(range(len(columns)), 2)):
            break
    square = (columns**2).sum(1)
    known = square > _RANK_TOLERANCE**2 * square.max(initial=0.0)
    scaled = np.where(known[:, None], columns / np.where(known, square, 1.0)[:, None], 0.0)
    return multiply(rotation.T, scaled)


def _rotate(columns: Float64s, rotation: Float64s, i: int, j: int) -> bool:
    """Rotate columns i and j until they are orthogonal; return False if they were."""
    first, second = columns[i], columns[j]
    a, b, c = float((first**2).sum()), float((second**2).sum()), float((first * second).sum())
    if abs(c) <= _ORTHOGONAL * np.sqrt(a * b):
        return False
    slope = (b - a) / (2 * c)
    tangent = (1.0 if slope >= 0 else -1.0) / (abs(slope) + np.sqrt(1 + slope**2))
    cosine = 1 / np.sqrt(1 + tangent**2)
    for part in (columns, rotation):
        part[i], part[j] = cosine * (part[i] - tangent * part[j]), cosine * (tangent * part[i] + part[j])
    return True
