"""Fields that changed places, or whose sign is reversed: their statistics fit a site's reference of each other, or
mirrored, where they do not fit their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from agent.arrays import Bools, Float64s
from agent.drift.baseline.reference import Reference
from agent.drift.baseline.summary import Summary
from agent.drift.numeric.sums import GroupMoments

# Minus logarithms of likelihood per model window and statistic: by how much another fit must be better, and by how much
# worse than is usual it may be.
MIN_FIT_GAIN, MAX_MISFIT = 4.0, 3.0
MIN_EXPLAINED_SHARE = 0.5  # share of all that does not fit
MISFIT_THRESHOLD = (
    MIN_FIT_GAIN - 0.5
)  # nothing fits better by more than its own misfit and a half (of two fields: than both and one)


def compute_misfit(windows: Summary, site: Reference) -> Float64s:
    """(W, F) of stacked summaries: how badly fields fit their own places. Where none is more than OFF, none moved."""
    return _compute_misfit(windows.class_sums.moments(site.origin), site, np.arange(len(site.fields)))


def detect_swaps(
    summary: Summary, site: Reference, units: Sequence[str], misread: Bools
) -> tuple[tuple[str, ...], np.ndarray]:
    """Of each field with which one of its unit it changed places, by name or ""; and (F,) whether its sign is reversed.

    Of all that would explain the window only what does best, and only if it explains most of what does not fit: the
    model names wrong classes then, and compared with these others seem to have changed, too. Where it is `known` (F,)
    to be so it stays so as long as it fits any better.
    """
    found, names = summary.class_sums.moments(site.origin), site.fields
    fields = np.arange(len(names))
    misfit = np.stack([_compute_misfit(found, site, np.roll(fields, -by)) for by in fields])
    mirrored = _compute_misfit(found, site, fields, mirrored=True)
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
    """(..., F) minus the logarithm of how likely each field's statistics are as those of field `fields` (F,), per model
    window and statistic; about 0 where they are."""
    count = len(permutation)
    total = np.zeros((*moments.n.shape[:-2], count))
    for first in range(0, moments.n.shape[-1], count):
        mine, its = slice(first, first + count), first + permutation
        n, mean = moments.n[..., mine], moments.mean[..., mine] * (-1 if mirrored and first == 0 else 1)
        sd = site.class_sd[:, its]
        square = (moments.m2[..., mine] + n * (mean - site.class_mean[:, its]) ** 2) / sd**2
        total += (square - n + 2 * n * np.log(sd / site.class_sd[:, mine])).sum(-2) / np.maximum(n.sum(-2), 1)
    return np.asarray(total / 2 / (moments.n.shape[-1] // count))
