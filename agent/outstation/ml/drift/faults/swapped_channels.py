"""Swapped channels: fields that changed places, or whose sign is reversed.

Their statistics fit each other's reference, or their own mirrored, and do not fit their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from outstation.foundation.arrays import Bools, Float64s
from outstation.ml.drift.baseline.fault_limits import FaultLimits, compute_own_misfit
from outstation.ml.drift.baseline.fault_limits import compute_misfit as compute_fit
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.numeric.sums import GroupMoments

# Minus log likelihoods per model window and statistic: required gain of another fit, and its largest misfit.
MIN_FIT_GAIN, MAX_MISFIT = 4.0, 3.0
MIN_EXPLAINED_SHARE = 0.5  # of the misfit of all fields
MISFIT_THRESHOLD = MIN_FIT_GAIN - 0.5  # no gain exceeds a field's own misfit by more than a half


def exceeds_misfit(misfit: Float64s, limits: FaultLimits) -> Bools:
    """Return which fields (..., F) fit their own places worse than ever in learned windows."""
    return np.asarray(misfit > np.maximum(MISFIT_THRESHOLD, limits.misfit))


def compute_misfit(windows: Summary, site: Reference, usual: Float64s) -> Float64s:
    """Return how badly fields fit their own places (W, F); `usual` (W, C, D) are the class means to expect then."""
    return compute_own_misfit(windows.class_sums.moments(site.origin), usual, site.class_sd_by_hour, len(site.fields))


def detect_swaps(
    summary: Summary, site: Reference, usual: Float64s, units: Sequence[str], misread: Bools, unfit: Bools
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the field of the same unit that each field changed places with, or "", and (F,) whether its sign is
    reversed.

    Only the best explanation of the window counts, and only if it explains most of the misfit: the model names wrong
    classes then, and other fields seem to have changed, too. Fields `misread` (F,) before stay so as long as they fit
    any better; others must be `unfit` (F,) for their own places. `usual` (C, D) are the class means to expect then.
    """
    moments, names = summary.class_sums.moments(site.origin), site.fields
    fields = np.arange(len(names))
    misfit = np.stack([_misfit(moments, site, np.roll(fields, -by), usual) for by in fields])
    mirrored = _misfit(moments, site, fields, usual, mirrored=True)
    better = np.where(((mirrored < MAX_MISFIT) & unfit) | misread, misfit[0] - mirrored, 0.0)
    best, which = max((float(better[i]), (i, i)) for i in fields.tolist())
    best = best if best > (0.0 if misread[which[0]] else MIN_FIT_GAIN) else 0.0
    for i, j in combinations(fields.tolist(), 2):
        other = misfit[(j - i) % len(names), i], misfit[(i - j) % len(names), j]
        gain = float(misfit[0, i] + misfit[0, j] - sum(other))
        same = (units[i] if units else "") == (units[j] if units else "")
        both_known = bool(misread[i] and misread[j])
        enough = max(0.0 if both_known else 2 * MIN_FIT_GAIN, best)
        fits = max(other) < MAX_MISFIT and bool(unfit[i] and unfit[j])
        if same and (fits or both_known) and gain > enough:
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


def _misfit(
    moments: GroupMoments, site: Reference, permutation: np.ndarray, usual: Float64s, *, mirrored: bool = False
) -> Float64s:
    return compute_fit(moments, usual, site.class_sd_by_hour, permutation, mirrored=mirrored)
