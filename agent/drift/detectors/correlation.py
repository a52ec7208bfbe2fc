"""How fields move together, within the class the model names: a change that no single field shows.

For a model over windows of rows, each model window tells the correlation of each pair of fields among its rows; for one
that answers each row, the rows of a drift window do, from their residuals against the shipped class means. Correlations
are compared as Fisher's z, whose spread does not depend on how large they are.

All that is kept are sums of whole numbers, so any split of the rows, added in any order, gives the same bits.

Source: Fisher (1915), Frequency distribution of the values of the correlation coefficient, Biometrika 10.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec
import numpy as np

from agent.arrays import Float64s, Ints
from agent.drift.numeric.groups import Groups

MAX_PAIRS = 276  # all pairs of 24 fields; of more fields, the pairs that stand closest in the bundle's order
MAX_CORRELATION = 0.9999  # correlations are told apart up to here
Z_SCALE = 2.0**20  # a window's z as a whole number
RESIDUAL_SCALE, RESIDUAL_CLIP = (
    2.0**10,
    16.0,
)  # a residual as a whole number of 1/1024 class sd, and the most it may say
MIN_ROWS = 30  # rows of a class that tell no correlation


class WeightedMeans(msgspec.Struct, frozen=True, eq=False):
    """What drift windows say of their pairs: `weight` and mean Fisher `z`, each (..., C, P); z is 0 without weight."""

    weight: Float64s
    mean: Float64s


@lru_cache(maxsize=16)
def field_pairs(fields: int) -> Ints:
    """(P, 2) fields that are compared."""
    found = [(i, i + apart) for apart in range(1, fields) for i in range(fields - apart)]
    return np.array(found[:MAX_PAIRS], np.int64).reshape(-1, 2)


@lru_cache(maxsize=16)
def pair_members(fields: int) -> tuple[Ints, Ints]:
    """(P,) the first and (P,) the second fields of pairs."""
    first, second = np.ascontiguousarray(field_pairs(fields).T)
    return first, second


def sums_width(fields: int, *, windowed: bool) -> int:
    """Of a class's whole numbers: n and sum per pair; or n, sums, squares and products of residuals."""
    count = len(field_pairs(fields))
    return 2 * count if windowed else 1 + 2 * fields + count


def correlate_windows(centred: Float64s, mean_square: Float64s, floor: Float64s) -> Float64s:
    """Fisher's z (w, P) of each pair in model windows (w, rows, F) of values less their mean, missing ones 0.

    `square` (w, F) mean squares; NaN where a field does not move more than `floor` (F,).
    """
    fields = centred.shape[2]
    left, right = pair_members(fields)
    # All products at once are cheaper than those of pairs alone, where nearly all are wanted.
    if fields**2 < 4 * len(left):
        products = np.matmul(centred.transpose(0, 2, 1), centred)[:, left, right]
    else:
        products = np.einsum("wrp,wrp->wp", centred[:, :, left], centred[:, :, right])
    products /= centred.shape[1]
    moving = np.where(mean_square > floor, mean_square, np.nan)
    correlation = products / np.sqrt(moving[:, left] * moving[:, right])
    return np.asarray(np.arctanh(np.minimum(np.maximum(correlation, -MAX_CORRELATION), MAX_CORRELATION)))


def quantize_residuals(residuals: Float64s) -> Float64s:
    """Residuals (n, F) in class sd, missing ones NaN, made whole numbers of steps in their place; missing ones 0."""
    whole = np.maximum(residuals, -RESIDUAL_CLIP, out=residuals)
    np.minimum(whole, RESIDUAL_CLIP, out=whole)
    whole *= RESIDUAL_SCALE
    np.rint(whole, out=whole)
    missing = np.isnan(whole)
    if missing.any():
        whole[missing] = 0.0
    return whole


def sum_products(residuals: Float64s, groups: Groups) -> Ints:
    """(count, 1 + 2F + P) of residuals (n, F), in steps, in their `groups`."""
    fields = residuals.shape[1]
    products = np.zeros((len(groups.n), 1 + fields, 1 + fields))
    for group, some in groups.iter_groups():
        # Products with a field that is always 1 are numbers and sums.
        part = np.ones((len(some), 1 + fields))
        part[:, 1:] = residuals.take(some, axis=0)
        # Exact: products are whole and at most 2**28, and fewer than 2**25 of them are added at once.
        np.matmul(part.T, part, out=products[group])
    return products.reshape(len(groups.n), -1).take(_product_cells(fields), axis=1).astype(np.int64)


@lru_cache(maxsize=16)
def _product_cells(fields: int) -> Ints:
    """Where all products have the number, then sums, squares and pairs."""
    left, right = pair_members(fields)
    each = 1 + np.arange(fields)
    return np.concatenate([[0], each, each * (2 + fields), (1 + left) * (1 + fields) + 1 + right])


def sum_correlations(z: Float64s, groups: Groups) -> Ints:
    """(count, 2P) of z (w, P) of model windows in these groups."""
    out = np.zeros((len(groups.n), 2 * z.shape[1]), np.int64)
    if not z.size:
        return out
    known = ~np.isnan(z)
    whole = np.concatenate([known, np.rint(np.where(known, z, 0.0) * Z_SCALE)], axis=1)
    there = np.flatnonzero(groups.n)
    first = np.cumsum(groups.n)[there] - groups.n[there]
    out[there] = np.add.reduceat(whole.take(groups.order, axis=0), first, axis=0)
    return out


def from_sums(sums: Ints, fields: int, *, windowed: bool) -> WeightedMeans:
    """What sums (..., C, `width`) say."""
    if windowed:
        count = sums.shape[-1] // 2
        n, total = sums[..., :count], sums[..., count:]
        return WeightedMeans(n.astype(np.float64), total / Z_SCALE / np.maximum(n, 1))
    left, right = pair_members(fields)
    n = sums[..., :1].astype(np.float64)
    each = sums[..., 1:] / np.maximum(n, 1)
    mean, square, product = each[..., :fields], each[..., fields : 2 * fields], each[..., 2 * fields :]
    spread = square - mean**2
    scale = np.sqrt(np.maximum(spread.take(left, -1) * spread.take(right, -1), 0.0))
    some = scale > 1.0
    correlation = (product - mean.take(left, -1) * mean.take(right, -1)) / np.where(some, scale, 1.0)
    weight = np.where(some & (n >= MIN_ROWS), n - 3, 0.0)
    z = np.arctanh(np.minimum(np.maximum(correlation, -MAX_CORRELATION), MAX_CORRELATION))
    return WeightedMeans(weight, np.where(weight > 0, z, 0.0))


def compute_deviations(measured: WeightedMeans, expected: Float64s) -> Float64s:
    """(..., P): how far z lies from what is `usual` (..., C, P) for the class, averaged; NaN where nothing tells."""
    total = measured.weight.sum(-2)
    apart = (measured.weight * (measured.mean - expected)).sum(-2)
    told = total > 0
    return np.asarray(np.where(told, apart / np.where(told, total, 1.0), np.nan))


def pooled_mean(measured: WeightedMeans, min_weight: float) -> Float64s:
    """(C, P) mean z over drift windows (K, C, P); of all classes together where less weight than `least` tells it."""
    return _mean_or_overall(measured.weight.sum(0), (measured.weight * measured.mean).sum(0), min_weight)


def leave_one_out_mean(measured: WeightedMeans, min_weight: float) -> Float64s:
    """(K, C, P): the same without the drift window that it is compared with."""
    weight, total = measured.weight, measured.weight * measured.mean
    return _mean_or_overall(weight.sum(0) - weight, total.sum(0) - total, min_weight)


def _mean_or_overall(weight: Float64s, total: Float64s, min_weight: float) -> Float64s:
    overall = total.sum(-2, keepdims=True) / np.maximum(weight.sum(-2, keepdims=True), 1e-9)
    return np.asarray(np.where(weight >= min_weight, total / np.maximum(weight, 1e-9), overall))
