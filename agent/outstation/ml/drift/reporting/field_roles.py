"""Roles of fields: what a field's values are decides which causes an alert may name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outstation.ml.drift.baseline.reference import Reference

SENSOR, CATEGORY, COMPUTED = "sensor", "category", "computed"
MAX_CATEGORIES = 12  # more whole numbers are readings of a sensor


def complete_roles(declared: Sequence[str], reference: Reference) -> tuple[str, ...]:
    """Return the role of each field: as a bundle declares it, else by the values of its reference."""
    return tuple(declared) or tuple(
        CATEGORY if _has_few_whole_numbers(reference, field) else SENSOR for field in range(len(reference.fields))
    )


def _has_few_whole_numbers(reference: Reference, field: int) -> bool:
    bounds = reference.bounds[field]
    span = bounds[-1] - bounds[0]
    return bool((bounds == np.rint(bounds)).all()) and 0 < span < MAX_CATEGORIES
