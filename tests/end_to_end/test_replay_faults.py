"""Faults of a replay: each kind changes the values that it names, from its row on, reproducibly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from outstation.device.config.sources import ReplayFault
from outstation.device.intake.sources.replay import inject_faults

N, FROM = 400, 101


def columns() -> dict[str, NDArray[np.float64]]:
    rows = np.random.default_rng(0).normal(size=(N, 3))
    return {name: rows[:, i] for i, name in enumerate(("x", "y", "z"))}


def played(kind: str, amount: float = 0.0, *, fields: tuple[str, ...] = ("y",)) -> dict[str, NDArray[np.float64]]:
    return inject_faults(columns(), [fault(kind, amount, fields)], 1)


def fault(kind: str, amount: float, fields: tuple[str, ...] = ("y",)) -> ReplayFault:
    return ReplayFault(kind=kind, fields=list(fields), from_row=FROM, amount=amount)  # type: ignore[arg-type]


def test_spikes_are_one_row_in_a_hundred() -> None:
    changed = played("spikes", 50.0)["y"] - columns()["y"]
    assert [(int(i) + 1, round(float(changed[i]))) for i in np.flatnonzero(changed)] == [
        (200, 50),
        (300, 50),
        (400, 50),
    ]


def test_saturated_readings_stay_within_the_limit() -> None:
    now = played("saturate", 0.5)["y"][FROM - 1 :]
    assert (now.min(), now.max()) == (-0.5, 0.5)
    assert (np.abs(now) < 0.5).any()


def test_swapped_fields_have_each_others_readings_from_the_row_on() -> None:
    now, before = played("swap", fields=("x", "z")), columns()
    np.testing.assert_array_equal(now["x"][FROM - 1 :], before["z"][FROM - 1 :])
    np.testing.assert_array_equal(now["z"][FROM - 1 :], before["x"][FROM - 1 :])
    np.testing.assert_array_equal(now["x"][: FROM - 1], before["x"][: FROM - 1])


def test_quantized_readings_are_whole_numbers_of_steps() -> None:
    now = played("quantize", 0.25)["y"][FROM - 1 :]
    assert set(now * 4 % 1) == {0.0}
    assert np.abs(now - columns()["y"][FROM - 1 :]).max() <= 0.125


def test_another_scale_multiplies_and_noise_adds_its_spread() -> None:
    np.testing.assert_array_equal(played("scale", 9.81)["y"][FROM - 1 :], columns()["y"][FROM - 1 :] * 9.81)
    added = (played("noise", 2.0)["y"] - columns()["y"])[FROM - 1 :]
    assert 1.7 < added.std() < 2.3


@pytest.mark.parametrize(
    "kind", ["spikes", "saturate", "scale", "swap", "noise", "quantize", "gain", "offset", "stuck"]
)
@given(cut=st.integers(1, N - 1))
def test_a_row_does_not_depend_on_how_rows_are_requested(kind: str, cut: int) -> None:
    given_fault = fault(kind, 0.5, ("x", "y"))
    whole = inject_faults(columns(), [given_fault], 1)
    head = inject_faults({name: c[:cut] for name, c in columns().items()}, [given_fault], 1)
    tail = inject_faults({name: c[cut:] for name, c in columns().items()}, [given_fault], cut + 1)
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([head[name], tail[name]]), whole[name])
