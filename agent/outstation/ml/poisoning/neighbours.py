"""Class shares of each window's surroundings, from the labels of its nearest neighbours.

A share is smoothed twice (the neighbours' own shares are averaged), so that a wrong label among the neighbours counts
little. A fixed number of candidates bounds the cost: 100,000 windows take 2 · 10⁸ distances.
"""

from __future__ import annotations

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float32s, Ints
from outstation.foundation.indices import bincount

NEIGHBOURS = 16
_MAX_CANDIDATES = 2048
_MIN_OF_CLASS = 64
_CHUNK = 1024
_JITTER = np.float32(1e-3)


class Candidates(msgspec.Struct, frozen=True, eq=False):
    """Windows (r,) that may be neighbours, and how many windows of their class each stands for (r,)."""

    windows: Ints
    weight: Float32s


def choose_candidates(label: Ints, classes: int) -> Candidates:
    """Choose windows at random, from a fixed seed, with enough of each class."""
    if len(label) <= _MAX_CANDIDATES:
        return Candidates(np.arange(len(label)), np.ones(len(label), np.float32))
    counts = bincount(label, minlength=classes)
    wanted = np.minimum(counts, np.maximum(counts * _MAX_CANDIDATES // len(label), _MIN_OF_CLASS))
    order = np.random.default_rng(0).permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]
    rank = np.arange(len(label)) - (np.cumsum(counts) - counts)[label[order]]
    chosen = np.sort(order[rank < wanted[label[order]]])
    return Candidates(chosen, (counts / np.maximum(wanted, 1))[label[chosen]].astype(np.float32))


def estimate_shares(features: Float32s, label: Ints, excluded: Ints, candidates: Candidates, classes: int) -> Float32s:
    """Return the class shares (w, C) around windows, without the neighbours of the same number in `excluded` (w,).

    Zeros stand where a window has no neighbour.
    """
    windows = candidates.windows
    nearest, _ = find_nearest(features, features[windows], excluded, excluded[windows])
    votes = np.zeros((len(windows), classes), np.float32)
    votes[np.arange(len(windows)), label[windows]] = candidates.weight
    around = nearest[windows]
    given = sum_of(votes, around)
    shares = mean_of(normalize(given), nearest)
    shares[windows] = _without_own(given, votes, around)
    return shares


def _without_own(given: Float32s, votes: Float32s, around: Ints) -> Float32s:
    """Return the shares (r, C) around candidates, whose neighbours had the sums `given` (r, C), without their own vote.

    It would make a label look right where the surroundings say nothing.
    """
    shares = np.zeros_like(given)
    number = np.arange(len(given))
    for column in around.T:
        is_mutual = (around[column] == number[:, None]).any(axis=1)
        shares += np.where((column >= 0)[:, None], normalize(given[column] - is_mutual[:, None] * votes), 0)
    return np.asarray(shares / np.maximum((around >= 0).sum(axis=1, keepdims=True), 1))


def find_nearest(
    query: Float32s, reference: Float32s, query_group: Ints, reference_group: Ints
) -> tuple[Ints, Float32s]:
    """Return the nearest rows of `reference` in another group (q, k), -1 for none, and the mean distance (q,)."""
    count = min(NEIGHBOURS, len(reference))
    squares = np.einsum("ij,ij->i", reference, reference)
    nearest = np.full((len(query), count), -1, np.int64)
    distance = np.full(len(query), np.inf, np.float32)
    for begin in range(0, len(query), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        gaps = squares - 2 * (query[part] @ reference.T)
        gaps[query_group[part, None] == reference_group] = np.inf
        chosen = np.argpartition(gaps, count - 1, axis=1)[:, :count]
        at = np.take_along_axis(gaps, chosen, axis=1)
        known = np.isfinite(at)
        nearest[part] = np.where(known, chosen, -1)
        at += np.einsum("ij,ij->i", query[part], query[part])[:, None]
        distance[part] = np.sqrt(np.maximum(at, 0)).mean(axis=1)
    return nearest, distance


def break_ties(features: Float32s) -> Float32s:
    """Return standardized features (w, D) moved by a thousandth at random, from a fixed seed.

    Equal windows would all have the same few neighbours, and the labels of those would be taken for their class.
    """
    return features + _JITTER * np.random.default_rng(0).standard_normal(features.shape, np.float32)


def mean_of(values: Float32s, nearest: Ints) -> Float32s:
    """Return (q, C) means of the rows of `values` at `nearest`."""
    return np.asarray(sum_of(values, nearest) / np.maximum((nearest >= 0).sum(axis=1, keepdims=True), 1))


def sum_of(values: Float32s, nearest: Ints) -> Float32s:
    """Return (q, C) sums of the rows of `values` at `nearest`."""
    total = np.zeros((len(nearest), values.shape[1]), np.float32)
    for column in nearest.T:
        total += np.where((column >= 0)[:, None], values[column], 0)
    return total


def normalize(votes: Float32s) -> Float32s:
    return np.asarray(votes / np.maximum(votes.sum(axis=1, keepdims=True), 1e-9))


def confident_classes(shares: Float32s, label: Ints, depth: float) -> tuple[Ints, Bools]:
    """Return the largest class around each window (w,), and whether its share there is confident (w,).

    It is if it reaches the quantile `depth` of the shares around windows that bear that label. That is confident
    learning (Northcutt, Jiang, Chuang 2021) with a quantile in place of the mean: with depth, contradictions of classes
    that overlap become fewer, flipped labels do not.
    """
    limits = np.array(
        [np.quantile(own, depth) if len(own := shares[label == i, i]) else np.inf for i in range(shares.shape[1])]
    )
    best = shares.argmax(axis=1)
    share = shares[np.arange(len(best)), best]
    return best, (share > 0) & (share >= limits[best])
