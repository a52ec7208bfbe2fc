"""Flipped labels of a class: windows that lie deep among one class and bear the label of another, in one direction.

Labels that are wrong both ways alike look like classes that the fields do not tell apart, and are no finding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from outstation.foundation.arrays import Bools, Float32s, Ints
from outstation.ml.poisoning.findings import MIN_COUNT, Finding, bound_share, name_rows
from outstation.ml.poisoning.labelled_windows import LabelledWindows
from outstation.ml.poisoning.neighbours import confident_classes

# Share of a class that must bear the label of another: above 5 % of honest errors and usual overlap.
MIN_FLIPPED = 0.12
# Share that must remain after that of the opposite direction is taken off.
_MIN_ASYMMETRY = 0.08
# The deepest of these quantiles that leaves enough windows.
_DEPTHS, _SHALLOW_DEPTH = (0.9, 0.75, 0.5), 0.5
_MIN_DEEP_WINDOWS = 100


def find_flips(windows: LabelledWindows, shares: Float32s) -> Iterator[Finding]:
    """Yield a finding for each pair of classes whose labels were exchanged in one direction."""
    classes = len(windows.labels)
    levels = [confident_classes(shares, windows.label, depth) for depth in _DEPTHS]
    inside = [_choose_deepest([confident & (best == i) for best, confident in levels]) for i in range(classes)]
    among, is_confident = confident_classes(shares, windows.label, _SHALLOW_DEPTH)
    for true in range(classes):
        for given in range(classes):
            if true == given or not len(inside[true]):
                continue
            share, low, high = bound_share(windows.label[inside[true]] == given, classes * (classes - 1))
            opposite, _, most = bound_share(windows.label[inside[given]] == true, classes * (classes - 1))
            if low < MIN_FLIPPED or low - opposite < _MIN_ASYMMETRY:
                continue
            # Shares that add up to 1 are those of labels that do not depend on the surroundings.
            if high + opposite >= 1 or share + most >= 1:
                continue
            flipped = np.flatnonzero(is_confident & (among == true) & (windows.label == given))
            if len(flipped) < MIN_COUNT:
                continue
            names = f"{windows.labels[true]} → {windows.labels[given]}"
            summary = (
                f"{share:.0%} ({low:.0%} to {high:.0%}) of the windows among {windows.labels[true]} are labelled "
                f"{windows.labels[given]}, {opposite:.0%} in the opposite direction"
            )
            rows = name_rows(windows.names, flipped)
            yield Finding("label flips", names, summary, len(flipped), share, low, high, rows)


def _choose_deepest(masks: list[Bools]) -> Ints:
    for mask in masks[:-1]:
        if mask.sum() >= _MIN_DEEP_WINDOWS:
            return np.flatnonzero(mask)
    return np.flatnonzero(masks[-1])
