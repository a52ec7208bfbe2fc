"""Findings about a labelled set: which check, whose labels, how sure, and the windows to look at."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Ints
from outstation.ml.performance import intervals

# Probability of any finding of a check in a set whose labels are as good as the check assumes.
ERROR_BUDGET = 0.01
MAX_ROWS = 200
# Fewest windows that a finding names.
MIN_COUNT = 10

Check = Literal["label flips", "trigger", "repeated pattern", "copies", "device", "labeller"]


class Finding(msgspec.Struct, frozen=True):
    """`share` of `n` windows with bounds; `rows` name the first of them to look at."""

    check: Check
    subject: str
    summary: str
    n: int
    share: float
    low: float
    high: float
    rows: list[Any]


def bound_share(hits: Bools, tests: int) -> tuple[float, float, float]:
    """Return the share of hits in order (n,), and bounds for one of `tests` within the budget of errors.

    Neighbours in time that are alike count for less (AR(1) design effect).
    """
    n = len(hits)
    if not n:
        return 0.0, 0.0, 1.0
    share = float(hits.mean())
    z = NormalDist().inv_cdf(1 - ERROR_BUDGET / (2 * max(1, tests)))
    return (share, *intervals.wilson(share, n / intervals.estimate_design_effect(hits.astype(np.float64)), z))


def name_rows(names: Sequence[Any], windows: Ints) -> list[Any]:
    return [names[i] for i in windows[:MAX_ROWS].tolist()]
