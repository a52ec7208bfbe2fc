"""Training distance: how far the readings of a drift window lie from anything that the model was trained on.

A drift is a change against the site's reference; the model may know the new readings all the same. The distance is
against the shipped reference: the root mean square of the deviations of all statistics from the means of the nearest
class, in class sd. It is about 1 for readings like those of the training data. Deviations are squared before they are
averaged, so a few wild model windows show among many usual ones.
"""

from __future__ import annotations

import numpy as np

from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.detectors.detector import MIN_CLASS_ROWS, MIN_CLASS_WINDOWS, round_significant

# The largest distance of 1200 honest drift windows of three models was 1.12 (`scripts/bench forged-readings`).
UNLIKE_TRAINING = 1.5
_MAX_DEVIATION = 10.0  # sd: a field that hardly moved in training does not decide alone


def describe_training_distance(window: Summary, shipped: Reference) -> tuple[str, dict[str, float]]:
    """Return a clause about readings unlike anything in training, else "", and the evidence for an alert.

    A drift alone says only that readings are unlike this site's.
    """
    distance = measure_training_distance(window, shipped)
    if not np.isfinite(distance):
        return "", {}
    evidence = {"training_distance": round_significant(distance, 3)}
    if distance <= UNLIKE_TRAINING:
        return "", evidence
    far = f"{distance:.2g} sd from the nearest it knows, where 1 is usual"
    return f"; unlike anything the model was trained on ({far}): a fault, a new state, or forged readings", evidence


def measure_training_distance(window: Summary, shipped: Reference) -> float:
    """Return the distance in class sd; NaN for a window without statistics."""
    moments = window.class_sums.moments(shipped.origin)
    known = shipped.class_n.min(1) >= (MIN_CLASS_WINDOWS if shipped.windowed else MIN_CLASS_ROWS)
    rows = known if known.any() else np.ones_like(known)
    mean, sd = shipped.class_mean[rows], shipped.class_sd[rows]
    # (C, K, D): those that the model named each class, against each class of the training data.
    square = moments.m2[:, None] + moments.n[:, None] * (moments.mean[:, None] - mean) ** 2
    share = square / np.maximum(moments.n[:, None] * sd**2, 1e-30)
    nearest = np.minimum(share, _MAX_DEVIATION**2).mean(2).min(1)
    weight = moments.n.max(1)
    return float(np.sqrt((weight * nearest).sum() / weight.sum())) if weight.any() else float("nan")
