"""Results of attacks on a model's input, a part of the document of an evaluation."""

from __future__ import annotations

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s
from outstation.ml.performance import intervals
from outstation.ml.performance.estimates import round_or_none

ALL_FIELDS = "all fields"


class FlippedShare(msgspec.Struct, frozen=True, kw_only=True):
    """Share of `n` attacked windows whose answer flipped, with Wilson's 95 % interval."""

    strength: str
    n: int
    value: float
    low: float
    high: float


class Attack(msgspec.Struct, frozen=True, kw_only=True):
    """Attack at several strengths, or on several fields."""

    attack: str
    meaning: str
    points: list[FlippedShare]


class SmallestChange(msgspec.Struct, frozen=True, kw_only=True):
    """Smallest change of a field, or of all fields, that flips answers of a class, or of any (label "").

    The size of a change is its largest deviation from the true readings: in sd of the field's rows, and in its unit.
    `smallest` and `median` are of n windows; None where no change within the tried `largest_sd` flips the answer.
    """

    field: str
    label: str
    unit: str
    n: int
    flipped: float
    smallest_sd: float | None
    median_sd: float | None
    smallest: float | None
    median: float | None
    largest_sd: float


class AdversarialResult(msgspec.Struct, frozen=True, kw_only=True):
    """Attacks on up to `windows` windows, in `invocations` of the model, one for each window of a batch.

    `low` and `high` are the limits of each field, within which changed readings stay; `criterion` says what flips.
    """

    windows: int
    invocations: int
    max_invocations: int
    seed: int
    criterion: str
    low: list[float]
    high: list[float]
    attacks: list[Attack]
    smallest_changes: list[SmallestChange]


def flipped_share(strength: str, flipped: Bools) -> FlippedShare:
    """Return the share of windows (n,) that flipped."""
    share, n = float(flipped.mean()) if len(flipped) else 0.0, len(flipped)
    low, high = (round_or_none(bound) or 0.0 for bound in intervals.wilson(share, n))
    return FlippedShare(strength=strength, n=n, value=round_or_none(share) or 0.0, low=low, high=high)


def smallest_change(
    field: str, label: str, sizes: Float64s, largest_sd: float, sd: float | None, unit: str
) -> SmallestChange:
    """Summarize the sizes (n,) in sd of the changes that flipped, inf for none; `sd` is that of a single field."""
    ends = float(sizes.min()), float(np.quantile(sizes, 0.5, method="lower"))
    smallest, median = (float(f"{size:.4g}") if np.isfinite(size) else None for size in ends)
    return SmallestChange(
        field=field,
        label=label,
        unit=unit,
        n=len(sizes),
        flipped=round_or_none(float(np.isfinite(sizes).mean())) or 0.0,
        smallest_sd=smallest,
        median_sd=median,
        smallest=None if smallest is None or sd is None else float(f"{smallest * sd:.4g}"),
        median=None if median is None or sd is None else float(f"{median * sd:.4g}"),
        largest_sd=largest_sd,
    )
