"""Sums by group in whole steps: the compiled ones are NumPy's, at every magnitude."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.ml.drift.detectors import class_means
from outstation.ml.drift.numeric.sums import Groups
from outstation.ml.kernel import library as kernel


@given(st.integers(0, 2**32 - 1), st.integers(-40, 42))
@pytest.mark.usefixtures("compiled")
def test_steps_are_rounded_as_numpy_rounds_them(seed: int, exponent: int) -> None:
    random = np.random.default_rng(seed)
    values = random.uniform(-1, 1, (3, 4)) * 2.0**exponent
    values[random.random(values.shape) < 0.1] = np.nan
    groups = Groups(np.array([0, 1, 0]), 2)
    compiled = class_means.sum_by_group(values, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "kernel", lambda: None)
        defined = class_means.sum_by_group(values, groups)
    assert compiled.tolist() == defined.tolist()


@pytest.mark.usefixtures("compiled")
def test_steps_of_numbers_between_two_powers_of_two_are_whole() -> None:
    value = 3 * (2.0**30 + 2.0**-21)
    sums = class_means.sum_by_group(np.array([[value]]), Groups(np.zeros(1, np.int64), 1))
    assert sums.tolist() == [[1, int(np.rint(value * class_means.SCALE))]]
