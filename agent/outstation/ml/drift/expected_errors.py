"""Expected errors of single answers, by output, from the inputs of their model windows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.ml.drift.baseline import window_statistics
from outstation.ml.drift.baseline.reference import Reference


def expect_errors(
    reference: Reference, rows: Float32s, starts: Ints, answers: Mapping[str, Float64s]
) -> dict[str, Float64s]:
    """Return the absolute error (w,) to expect of the answers (w,) of each output that has held-out errors.

    `rows` (n, F) in physical units, `starts` (w,) offsets of the windows into them. The first output has the name "".
    NaN of an answer that is no number.
    """
    known = {name: error for name, error in reference.error_references.items() if name in answers}
    if not known:
        return {}
    finite = window_statistics.infinities_to_nan(rows)
    statistics = window_statistics.compute_statistics(finite, starts, reference.window_rows, reference.floor).values
    return {
        name: np.where(np.isfinite(answers[name]), error.bin_error[error.find_bins(statistics, answers[name])], np.nan)
        for name, error in known.items()
    }
