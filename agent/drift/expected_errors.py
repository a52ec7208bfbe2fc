"""Expected errors of single answers, by output, from the inputs of their model windows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from agent.arrays import Float32s, Float64s, Ints
from agent.drift.baseline import window_statistics
from agent.drift.baseline.reference import Reference


def find_error_bins(
    reference: Reference, rows: Float32s, starts: Ints, answers: Mapping[str, Float64s]
) -> dict[str, Ints]:
    """Return the bin (w,) of the error to expect of the answers (w,) of each output that has held-out errors.

    `rows` (n, F) in physical units, `starts` (w,) offsets of the windows into them. The first output has the name "".
    The bin of an answer that is no number means nothing.
    """
    known = {name: error for name, error in reference.error_references.items() if name in answers}
    if not known:
        return {}
    finite = window_statistics.infinities_to_nan(rows)
    statistics = window_statistics.compute_statistics(finite, starts, reference.window_rows, reference.floor).values
    return {name: error.find_bins(statistics, answers[name]) for name, error in known.items()}


def expect_errors(
    reference: Reference, rows: Float32s, starts: Ints, answers: Mapping[str, Float64s]
) -> dict[str, Float64s]:
    """Return the absolute error (w,) to expect of each answer, as `find_error_bins`; NaN of no number."""
    bins, errors = find_error_bins(reference, rows, starts, answers), reference.error_references
    return {
        name: np.where(np.isfinite(answers[name]), errors[name].bin_error[own], np.nan) for name, own in bins.items()
    }
