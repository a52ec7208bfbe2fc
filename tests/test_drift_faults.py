"""Sensor faults, one kind at a time, and what must not be taken for one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.drift import build, faults
from agent.drift.faults import Tail
from agent.drift.reference import Reference
from agent.drift.summary import Summary
from tests.machine import FIELDS, LABELS, ROWS, WINDOW, readings, reference


@pytest.fixture(scope="module")
def shipped() -> Reference:
    return reference()


@pytest.fixture
def rows() -> NDArray[np.float64]:
    return readings(9, 1).features.astype(np.float64)


def found(shipped: Reference, rows: NDArray[np.float64]) -> tuple[str | None, ...]:
    summary, _ = Summary.empty(shipped).add_rows(shipped, rows, Tail.empty(rows.shape[1]))
    return faults.find(summary, shipped)


def test_no_fault_in_clean_windows(shipped: Reference) -> None:
    r = readings(10, 100)
    flagged = [found(shipped, r.windows(i, i + 1).features.astype(np.float64)) for i in range(100)]
    assert [f for f in flagged if any(f)] == []


@pytest.mark.parametrize(("change", "gain"), [(0.5, 1.0), (0.0, 0.6), (0.0, 1.3)])
def test_drift_is_no_fault(shipped: Reference, rows: NDArray[np.float64], change: float, gain: float) -> None:
    rows[:, 1] = rows[:, 1] * gain + change
    assert found(shipped, rows) == (None, None, None)


def test_a_value_repeated_for_long_is_stuck(shipped: Reference, rows: NDArray[np.float64]) -> None:
    rows[50:62, 1] = rows[50, 1]
    assert found(shipped, rows) == (None, "stuck", None)


def test_a_short_repeat_is_not_stuck(shipped: Reference, rows: NDArray[np.float64]) -> None:
    rows[50:60, 1] = rows[50, 1]
    assert found(shipped, rows) == (None, None, None)


def test_a_value_at_which_the_sensor_rests_may_repeat() -> None:
    rng = np.random.default_rng(3)
    light = np.where(np.arange(12_000) % 300 < 120, 0.0, rng.normal(50, 5, 12_000)).astype(np.float32)[:, None]
    shipped = build(light, np.arange(12_000), 1, np.zeros(12_000, np.int64), None, 300, fields=("light",))
    assert shipped.rest == ((0.0,),)
    night = np.concatenate([np.zeros(100), rng.normal(50, 5, 200)])[:, None]
    assert found(shipped, night) == (None,)
    night[150:170] = 47.0
    assert found(shipped, night) == ("stuck",)


def test_a_sensor_with_long_natural_runs_may_have_them(shipped: Reference, rows: NDArray[np.float64]) -> None:
    coarse = replace(shipped, longest=np.array([30, 30, 30]))
    rows[20:160, 0] = 1.0
    assert found(coarse, rows) == (None, None, None)
    rows[:, 0] = 1.0
    assert found(coarse, rows)[0] == "stuck"


def test_one_absent_value_in_twenty_is_missing(shipped: Reference, rows: NDArray[np.float64]) -> None:
    rows[:10, 2] = np.nan
    assert found(shipped, rows) == (None, None, None)
    rows[:11, 2] = np.nan
    assert found(shipped, rows) == (None, None, "missing")


def test_a_sensor_that_often_missed_values_in_the_reference_may_go_on(
    shipped: Reference, rows: NDArray[np.float64]
) -> None:
    patchy = replace(shipped, missing=shipped.n // 10)
    rows[:20, 2] = np.nan
    assert found(patchy, rows) == (None, None, None)


def test_another_unit_is_out_of_range(shipped: Reference, rows: NDArray[np.float64]) -> None:
    rows[:, 0] *= 30
    assert found(shipped, rows)[0] == "out_of_range"


def test_lone_jumps_are_spikes(shipped: Reference, rows: NDArray[np.float64]) -> None:
    rows[[30, 31, 32], 1] = [0.5, 0.5 + 12 * shipped.jump[1], 0.5]
    assert found(shipped, rows) == (None, None, None)
    rows[[130, 131, 132], 1] = [0.5, 0.5 - 12 * shipped.jump[1], 0.5]
    assert found(shipped, rows) == (None, "spikes", None)


def test_a_step_to_a_new_level_is_no_spike(shipped: Reference, rows: NDArray[np.float64]) -> None:
    rows[40:80, 1] += 12 * shipped.jump[1]
    rows[120:160, 1] += 12 * shipped.jump[1]
    summary, _ = Summary.empty(shipped).add_rows(shipped, rows, Tail.empty(3))
    assert summary.spikes[1] == 0


def test_infinities_count_as_missing() -> None:
    r = readings(11, 60)
    r.features[5, 0], r.features[9, 0] = np.inf, -np.inf
    starts = np.arange(600) * ROWS
    shipped = build(r.features, starts, ROWS, r.labels, None, WINDOW, fields=FIELDS, labels=LABELS)
    assert shipped.missing.tolist() == [2, 0, 0]
    assert np.isfinite(shipped.high).all()
