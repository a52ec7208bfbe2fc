"""Swapped channels: fields that changed places, or whose sign is reversed.

Their statistics fit each other's reference, or their own mirrored, and do not fit their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from agent.arrays import Bools, Float64s
from agent.drift.baseline.reference import Reference
from agent.drift.baseline.summary import Summary
from agent.drift.numeric.sums import GroupMoments

# Minus log likelihoods per model window and statistic: required gain of another fit, and its largest misfit.
MIN_FIT_GAIN, MAX_MISFIT = 4.0, 3.0
MIN_EXPLAINED_SHARE = 0.5  # of the misfit of all fields
MISFIT_THRESHOLD = MIN_FIT_GAIN - 0.5  # no gain exceeds a field's own misfit by more than a half


def compute_misfit(windows: Summary, site: Reference) -> Float64s:
    """Return how badly fields fit their own places (W, F); up to MISFIT_THRESHOLD, none moved."""
    return _compute_misfit(windows.class_sums.moments(site.origin), site, np.arange(len(site.fields)))


def detect_swaps(
    summary: Summary, site: Reference, units: Sequence[str], misread: Bools
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the field of the same unit that each field changed places with, or "", and (F,) whether its sign is
    reversed.

    Only the best explanation of the window counts, and only if it explains most of the misfit: the model names wrong
    classes then, and other fields seem to have changed, too. Fields `misread` (F,) before stay so as long as they fit
    any better.
    """
    moments, names = summary.class_sums.moments(site.origin), site.fields
    fields = np.arange(len(names))
    misfit = np.stack([_compute_misfit(moments, site, np.roll(fields, -by)) for by in fields])
    mirrored = _compute_misfit(moments, site, fields, mirrored=True)
    better = np.where((mirrored < MAX_MISFIT) | misread, misfit[0] - mirrored, 0.0)
    best, which = max((float(better[i]), (i, i)) for i in fields.tolist())
    best = best if best > (0.0 if misread[which[0]] else MIN_FIT_GAIN) else 0.0
    for i, j in combinations(fields.tolist(), 2):
        other = misfit[(j - i) % len(names), i], misfit[(i - j) % len(names), j]
        gain = float(misfit[0, i] + misfit[0, j] - sum(other))
        same = (units[i] if units else "") == (units[j] if units else "")
        both_known = bool(misread[i] and misread[j])
        enough = max(0.0 if both_known else 2 * MIN_FIT_GAIN, best)
        if same and (max(other) < MAX_MISFIT or both_known) and gain > enough:
            best, which = gain, (i, j)
    if not misread[list(which)].all() and best < MIN_EXPLAINED_SHARE * np.maximum(misfit[0], 0.0).sum():
        best = 0.0
    places, signs = [""] * len(names), np.zeros(len(names), np.bool_)
    i, j = which
    if best and i == j:
        signs[i] = True
    elif best:
        places[i], places[j] = names[j], names[i]
    return tuple(places), signs


def _compute_misfit(
    moments: GroupMoments, site: Reference, permutation: np.ndarray, *, mirrored: bool = False
) -> Float64s:
    """Return minus the log likelihood (..., F) of each field's statistics as those of field `permutation` (F,).

    It is per model window and statistic, and about 0 where they fit.
    """
    count = len(permutation)
    total = np.zeros((*moments.n.shape[:-2], count))
    for first in range(0, moments.n.shape[-1], count):
        mine, its = slice(first, first + count), first + permutation
        n, mean = moments.n[..., mine], moments.mean[..., mine] * (-1 if mirrored and first == 0 else 1)
        sd = site.class_sd[:, its]
        square = (moments.m2[..., mine] + n * (mean - site.class_mean[:, its]) ** 2) / sd**2
        total += (square - n + 2 * n * np.log(sd / site.class_sd[:, mine])).sum(-2) / np.maximum(n.sum(-2), 1)
    return np.asarray(total / 2 / (moments.n.shape[-1] // count))
