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

from agent.arrays import Floats, Ints
from agent.drift.numeric.groups import Groups

MOST_PAIRS = 276  # all pairs of 24 fields; of more fields, the pairs that stand closest in the bundle's order
NEAR_ONE = 0.9999  # correlations are told apart up to here
ONE = 2.0**20  # a window's z as a whole number
STEP, FAR = 2.0**10, 16.0  # a residual as a whole number of 1/1024 class sd, and the most it may say
FEW = 30  # rows of a class that tell no correlation


class Pairs(msgspec.Struct, frozen=True, eq=False):
    """What drift windows say of their pairs: `weight` and mean Fisher `z`, each (..., C, P); z is 0 without weight."""

    weight: Floats
    z: Floats


@lru_cache(maxsize=16)
def pairs(fields: int) -> Ints:
    """(P, 2) fields that are compared."""
    found = [(i, i + apart) for apart in range(1, fields) for i in range(fields - apart)]
    return np.array(found[:MOST_PAIRS], np.int64).reshape(-1, 2)


@lru_cache(maxsize=16)
def sides(fields: int) -> tuple[Ints, Ints]:
    """(P,) the first and (P,) the second fields of pairs."""
    first, second = np.ascontiguousarray(pairs(fields).T)
    return first, second


def width(fields: int, *, windowed: bool) -> int:
    """Of a class's whole numbers: n and sum per pair; or n, sums, squares and products of residuals."""
    count = len(pairs(fields))
    return 2 * count if windowed else 1 + 2 * fields + count


def of_windows(centred: Floats, square: Floats, floor: Floats) -> Floats:
    """Fisher's z (w, P) of each pair in model windows (w, rows, F) of values less their mean, missing ones 0.

    `square` (w, F) mean squares; NaN where a field does not move more than `floor` (F,).
    """
    fields = centred.shape[2]
    left, right = sides(fields)
    # All products at once are cheaper than those of pairs alone, where nearly all are wanted.
    if fields**2 < 4 * len(left):
        products = np.matmul(centred.transpose(0, 2, 1), centred)[:, left, right]
    else:
        products = np.einsum("wrp,wrp->wp", centred[:, :, left], centred[:, :, right])
    products /= centred.shape[1]
    moving = np.where(square > floor, square, np.nan)
    correlation = products / np.sqrt(moving[:, left] * moving[:, right])
    return np.asarray(np.arctanh(np.minimum(np.maximum(correlation, -NEAR_ONE), NEAR_ONE)))


def in_steps(residuals: Floats) -> Floats:
    """Residuals (n, F) in class sd, missing ones NaN, made whole numbers of steps in their place; missing ones 0."""
    whole = np.maximum(residuals, -FAR, out=residuals)
    np.minimum(whole, FAR, out=whole)
    whole *= STEP
    np.rint(whole, out=whole)
    missing = np.isnan(whole)
    if missing.any():
        whole[missing] = 0.0
    return whole


def of_rows(whole: Floats, groups: Groups) -> Ints:
    """(count, 1 + 2F + P) of residuals (n, F), in steps, in their `groups`."""
    fields = whole.shape[1]
    products = np.zeros((len(groups.n), 1 + fields, 1 + fields))
    for group, some in groups.parts():
        # Products with a field that is always 1 are numbers and sums.
        part = np.ones((len(some), 1 + fields))
        part[:, 1:] = whole.take(some, axis=0)
        # Exact: products are whole and at most 2**28, and fewer than 2**25 of them are added at once.
        np.matmul(part.T, part, out=products[group])
    return products.reshape(len(groups.n), -1).take(_cells(fields), axis=1).astype(np.int64)


@lru_cache(maxsize=16)
def _cells(fields: int) -> Ints:
    """Where all products have the number, then sums, squares and pairs."""
    left, right = sides(fields)
    each = 1 + np.arange(fields)
    return np.concatenate([[0], each, each * (2 + fields), (1 + left) * (1 + fields) + 1 + right])


def sums(found: Floats, groups: Groups) -> Ints:
    """(count, 2P) of z (w, P) of model windows in these groups."""
    out = np.zeros((len(groups.n), 2 * found.shape[1]), np.int64)
    if not found.size:
        return out
    known = ~np.isnan(found)
    whole = np.concatenate([known, np.rint(np.where(known, found, 0.0) * ONE)], axis=1)
    there = np.flatnonzero(groups.n)
    first = np.cumsum(groups.n)[there] - groups.n[there]
    out[there] = np.add.reduceat(whole.take(groups.order, axis=0), first, axis=0)
    return out


def measured(whole: Ints, fields: int, *, windowed: bool) -> Pairs:
    """What sums (..., C, `width`) say."""
    if windowed:
        count = whole.shape[-1] // 2
        n, total = whole[..., :count], whole[..., count:]
        return Pairs(n.astype(np.float64), total / ONE / np.maximum(n, 1))
    left, right = sides(fields)
    n = whole[..., :1].astype(np.float64)
    each = whole[..., 1:] / np.maximum(n, 1)
    mean, square, product = each[..., :fields], each[..., fields : 2 * fields], each[..., 2 * fields :]
    spread = square - mean**2
    scale = np.sqrt(np.maximum(spread.take(left, -1) * spread.take(right, -1), 0.0))
    some = scale > 1.0
    correlation = (product - mean.take(left, -1) * mean.take(right, -1)) / np.where(some, scale, 1.0)
    weight = np.where(some & (n >= FEW), n - 3, 0.0)
    z = np.arctanh(np.minimum(np.maximum(correlation, -NEAR_ONE), NEAR_ONE))
    return Pairs(weight, np.where(weight > 0, z, 0.0))


def tests(found: Pairs, usual: Floats) -> Floats:
    """(..., P): how far z lies from what is `usual` (..., C, P) for the class, averaged; NaN where nothing tells."""
    total = found.weight.sum(-2)
    apart = (found.weight * (found.z - usual)).sum(-2)
    told = total > 0
    return np.asarray(np.where(told, apart / np.where(told, total, 1.0), np.nan))


def usual(found: Pairs, least: float) -> Floats:
    """(C, P) mean z over drift windows (K, C, P); of all classes together where less weight than `least` tells it."""
    return _mean(found.weight.sum(0), (found.weight * found.z).sum(0), least)


def usual_without(found: Pairs, least: float) -> Floats:
    """(K, C, P): the same without the drift window that it is compared with."""
    weight, total = found.weight, found.weight * found.z
    return _mean(weight.sum(0) - weight, total.sum(0) - total, least)


def _mean(weight: Floats, total: Floats, least: float) -> Floats:
    overall = total.sum(-2, keepdims=True) / np.maximum(weight.sum(-2, keepdims=True), 1e-9)
    return np.asarray(np.where(weight >= least, total / np.maximum(weight, 1e-9), overall))
