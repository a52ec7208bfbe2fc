"""Sensor faults, one kind at a time, and what must not be taken for one."""

from __future__ import annotations

import re
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.ml.drift import DriftMonitor, DriftState, MonitorSettings, succession
from outstation.ml.drift.baseline import summary as summaries
from outstation.ml.drift.baseline.extremes import Extremes
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.runs import max_normal_run
from outstation.ml.drift.baseline.summary import Summary, stack_one
from outstation.ml.drift.faults import faults
from outstation.ml.drift.faults.constant_runs import ConstantRuns
from outstation.ml.drift.faults.faults import Fault
from tests.kit.machine import FIELDS, LABELS, ROWS, WINDOW, Readings, feed, readings, reference, summarize_rows

NOON = np.array([43_200_000_000])  # of a window, epoch µs


@pytest.fixture(scope="module")
def shipped() -> Reference:
    return reference()


@pytest.fixture
def rows() -> NDArray[np.float64]:
    return readings(9, 1).features.astype(np.float64)


def fault_names(shipped: Reference, rows: NDArray[np.float64], units: tuple[str, ...] = ()) -> tuple[str | None, ...]:
    summary, _ = summarize_rows(shipped, rows)
    return tuple(fault.name if fault else None for fault in find(summary, shipped, units))


def find(summary: Summary, shipped: Reference, units: tuple[str, ...] = ()) -> tuple[Fault | None, ...]:
    windows = stack_one(summary)
    several = faults.identify_faults(faults.compute_indicators(windows, shipped, NOON), 0, windows, shipped, units)
    return tuple(replace(fault[0], size=1.0) if fault else None for fault in several)


def test_no_fault_in_clean_windows(shipped: Reference) -> None:
    r = readings(10, 100)
    flagged = [fault_names(shipped, r.windows(i, i + 1).features.astype(np.float64)) for i in range(100)]
    assert [f for f in flagged if any(f)] == []


@pytest.mark.parametrize(("change", "gain"), [(0.5, 1.0), (0.0, 0.6), (0.0, 1.3)])
def test_drift_is_no_fault(shipped: Reference, rows: NDArray[np.float64], change: float, gain: float) -> None:
    rows[:, 1] = rows[:, 1] * gain + change
    assert fault_names(shipped, rows) == (None, None, None)


def test_a_value_repeated_for_long_is_stuck(shipped: Reference, rows: NDArray[np.float64]) -> None:
    rows[50:62, 1] = rows[50, 1]
    assert fault_names(shipped, rows) == (None, "stuck", None)


def test_a_short_repeat_is_not_stuck(shipped: Reference, rows: NDArray[np.float64]) -> None:
    rows[50:60, 1] = rows[50, 1]
    assert fault_names(shipped, rows) == (None, None, None)


def test_a_value_at_which_the_sensor_rests_may_repeat() -> None:
    rng = np.random.default_rng(3)
    light = np.where(np.arange(12_000) % 300 < 120, 0.0, rng.normal(50, 5, 12_000)).astype(np.float32)[:, None]
    shipped = build_reference(light, np.arange(12_000), 1, np.zeros(12_000, np.int64), None, 300, fields=("light",))
    assert shipped.rest == ((0.0,),)
    night = np.concatenate([np.zeros(100), rng.normal(50, 5, 200)])[:, None]
    assert fault_names(shipped, night) == (None,)
    night[150:170] = 47.0
    assert fault_names(shipped, night) == ("stuck",)


def test_a_sensor_with_long_natural_runs_may_have_them(shipped: Reference, rows: NDArray[np.float64]) -> None:
    coarse = replace(shipped, longest=np.array([30, 30, 30]))
    rows[20:160, 0] = 1.0
    assert fault_names(coarse, rows) == (None, None, None)
    rows[:, 0] = 1.0
    assert fault_names(coarse, rows)[0] == "stuck"


def test_an_offset_that_is_no_units_is_out_of_range(shipped: Reference, rows: NDArray[np.float64]) -> None:
    rows[:, 0] += 100
    assert fault_names(shipped, rows)[0] == "out_of_range"


def judged(shipped: Reference, rows: NDArray[np.float64], units: tuple[str, ...] = ()) -> tuple[Fault | None, ...]:
    """Return the faults, with the statistics of model windows."""
    labels = np.zeros(len(rows) // ROWS, np.int64)
    return find(summaries.summarize(shipped, rows, np.arange(len(labels)) * ROWS, labels, None), shipped, units)


@pytest.mark.parametrize(
    ("unit", "factor", "detail"),
    [
        ("g", 9.80665, "m/s² where g was"),
        ("g", 1000, "mg where g was"),
        ("rad/s", 57.29578, "deg/s where rad/s was"),
        ("A", 1000, "1000 times what it was"),
        ("A", 1 / 1000, "a thousandth of what it was"),
        ("bar", 10, "10 times what it was"),
    ],
)
def test_readings_in_another_unit_are_recognised_and_it_is_named(
    shipped: Reference, unit: str, factor: float, detail: str
) -> None:
    r = readings(12, 100)
    named = []
    for i in range(100):
        rows = r.windows(i, i + 1).features.astype(np.float64)
        rows[:, 0] *= factor
        named.append(judged(shipped, rows, (unit, "g", "rad/s")))
    assert {fault for _, *others in named for fault in others} == {None}
    # A machine that idles for a whole drift window does not show it yet.
    assert [first for first, *_ in named].count(Fault("unit", detail)) >= (95 if factor > 1 else 70)


@pytest.mark.parametrize(
    ("unit", "factor", "detail"),
    [
        ("m/s2", 1 / 9.80665, "g where m/s² was"),
        ("deg", 1 / 57.29578, "radians where degrees were"),
        ("bar", 1 / 10, "a tenth of what it was"),
    ],
)
def test_a_smaller_unit_is_recognised_where_the_sensor_never_was_so_calm(unit: str, factor: float, detail: str) -> None:
    rng = np.random.default_rng(4)
    shipped = build_reference(
        rng.normal(size=(12_000, 1)).astype(np.float32), np.arange(12_000), 1, np.zeros(12_000, np.int64), None, 300,
        fields=("tilt",),
    )  # fmt: skip
    for _ in range(50):
        now = rng.normal(size=(300, 1))
        assert find(row_by_row(shipped, now), shipped, (unit,)) == (None,)
        assert find(row_by_row(shipped, 0.5 * now), shipped, (unit,)) == (None,)
        assert find(row_by_row(shipped, factor * now), shipped, (unit,)) == (Fault("unit", detail),)


@pytest.mark.parametrize(
    ("factor", "offset", "detail"), [(1.8, 32.0, "°F where °C was"), (1.0, 273.15, "K where °C was")]
)
def test_a_temperature_on_another_scale_is_recognised(factor: float, offset: float, detail: str) -> None:
    rng = np.random.default_rng(4)
    celsius = (20 + rng.normal(0, 2, 12_000)).astype(np.float32)[:, None]
    shipped = build_reference(celsius, np.arange(12_000), 1, np.zeros(12_000, np.int64), None, 300, fields=("air",))
    now = 20 + rng.normal(0, 2, (300, 1))
    assert find(row_by_row(shipped, now), shipped, ("°C",)) == (None,)
    assert find(row_by_row(shipped, factor * now + offset), shipped, ("°C",)) == (Fault("unit", detail),)
    assert find(row_by_row(shipped, now + 3), shipped, ("°C",)) == (None,)


def row_by_row(shipped: Reference, rows: NDArray[np.float64]) -> Summary:
    return summaries.summarize(shipped, rows, np.arange(len(rows)), np.zeros(len(rows), np.int64), None)


@pytest.fixture(scope="module")
def learned(shipped: Reference) -> DriftState:
    monitor = DriftMonitor(MonitorSettings(shipped, labels=LABELS, window=WINDOW))
    return feed(monitor, monitor.start(), readings(3, 42))[0]


def alerted(shipped: Reference, learned: DriftState, r: Readings, units: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Subject, fault and sentence of the fault alerts raised in four windows."""
    monitor = DriftMonitor(MonitorSettings(shipped, labels=LABELS, window=WINDOW, units=units))
    _, verdicts = feed(monitor, learned, r)
    alerts = [a for v in verdicts for a in v.alerts if a.alert == "fault" and a.state == "raised"]
    return [(a.subject, a.evidence["fault"], a.summary) for a in alerts]


@pytest.mark.parametrize("seed", range(20, 30))
def test_two_fields_that_changed_places_are_each_named_with_the_other(
    shipped: Reference, learned: DriftState, seed: int
) -> None:
    r = readings(seed, 4)
    r.features[:, [1, 2]] = r.features[:, [2, 1]]
    assert alerted(shipped, learned, r, ("g", "g", "g")) == [
        ("y", "swapped", "y: reads like z did, and z like y: cables or columns were exchanged."),
        ("z", "swapped", "z: reads like y did, and y like z: cables or columns were exchanged."),
    ]


def test_fields_of_different_units_are_not_reported_as_swapped(shipped: Reference, learned: DriftState) -> None:
    r = readings(20, 2)
    r.features[:, [1, 2]] = r.features[:, [2, 1]]
    assert "swapped" not in {fault for _, fault, _ in alerted(shipped, learned, r, ("g", "g", "rad/s"))}


@pytest.mark.parametrize("seed", range(20, 30))
def test_a_reversed_sign_is_named(shipped: Reference, learned: DriftState, seed: int) -> None:
    r = readings(seed, 4)
    r.features[:, 1] *= -1
    assert [(s, f) for s, f, _ in alerted(shipped, learned, r, ("g", "g", "g"))] == [("y", "reversed")]


def reversed_sensor(monitor: DriftMonitor, learned: DriftState, windows: int, seed: int = 20) -> DriftState:
    r = readings(seed, windows)
    r.features[:, 1] *= -1
    return feed(monitor, learned, r)[0]


def test_a_sensor_reversed_before_the_bundle_changed_stays_so_until_an_operator_decides(
    shipped: Reference, learned: DriftState
) -> None:
    monitor = DriftMonitor(MonitorSettings(shipped, labels=LABELS, window=WINDOW))
    carried, _ = succession.carry_over(monitor.start(), reversed_sensor(monitor, learned, 4))
    state = reversed_sensor(monitor, carried, 45)
    assert (state.site_reference, state.learning.total_windows) == (None, 0)
    assert state.faults.open_fields == [False, True, False]
    for accepted, alerts in (monitor.accept_reference(state), monitor.relearn(state)):
        assert [(alert.state, alert.subject, alert.evidence["fault"]) for alert in alerts] == [
            ("cleared", "y", "reversed")
        ]
        assert reversed_sensor(monitor, accepted, 41, 21).site_reference is not None


def test_a_fault_that_a_window_shows_without_a_site_clears_before_one_is_learned(
    shipped: Reference, learned: DriftState
) -> None:
    monitor = DriftMonitor(MonitorSettings(shipped, labels=LABELS, window=WINDOW))
    r = readings(22, 4)
    r.features[:, 1] += 50
    state, _ = succession.carry_over(monitor.start(), feed(monitor, learned, r)[0])
    assert state.faults.open_fields == [False, True, False]
    state = feed(monitor, state, readings(23, 45))[0]
    assert not state.faults.any_open
    assert state.site_reference is not None


def test_honest_plateaus_of_a_site_are_learned(shipped: Reference, rows: NDArray[np.float64]) -> None:
    """A run longer than any normal one of the shipped reference is none where the site had such plateaus."""
    limit = int(max_normal_run(shipped.longest, np.array([len(rows)]))[0, 1])
    rows[50 : 50 + limit + 2, 1] = rows[50, 1]
    windows = stack_one(summarize_rows(shipped, rows)[0])
    site = replace(shipped, longest=np.maximum(shipped.longest, limit - 1))
    for known, stuck in ((None, True), (site, False)):
        indicators = faults.compute_indicators(windows, shipped, NOON, known)
        assert indicators.stuck[0].tolist() == [False, stuck, False]
    runs = ConstantRuns(np.full(3, 1.0), np.array([1, limit + 2, 1]))
    assert [runs.find_stuck(each)[1] for each in (shipped, site)] == [True, False]


def test_a_sensor_that_held_values_while_its_site_learned_is_not_stuck_if_it_holds_them_longer(
    shipped: Reference, learned: DriftState
) -> None:
    monitor = DriftMonitor(MonitorSettings(shipped, labels=LABELS, window=WINDOW))
    limit = int(max_normal_run(shipped.longest, np.array([WINDOW * ROWS]))[0, 1])

    def hold(seed: int, windows: int, rows: int) -> Readings:
        r = readings(seed, windows)
        for begin in range(50, len(r.features), WINDOW * ROWS):
            r.features[begin : begin + rows, 1] = r.features[begin, 1]
        return r

    site, _ = feed(monitor, monitor.start(), hold(3, 42, limit))
    assert site.site_reference is not None
    longer = hold(24, 4, limit + 3)
    assert {fault for _, fault, _ in alerted(shipped, learned, longer, ())} == {"stuck"}
    assert alerted(shipped, site, longer, ()) == []
    assert {fault for _, fault, _ in alerted(shipped, site, hold(24, 4, 5 * limit + 1), ())} == {"stuck"}


@pytest.mark.parametrize("seed", range(20, 25))
def test_a_converter_that_became_coarser_is_named(shipped: Reference, learned: DriftState, seed: int) -> None:
    r = readings(seed, 2)
    r.features[:, 2] = np.round(r.features[:, 2] * 5) / 5
    (alerts,) = alerted(shipped, learned, r, ())
    assert alerts[:2] == ("z", "quantized")
    assert re.fullmatch(r"z: values come in steps about \d+ times as coarse as .*rounding\.", alerts[2])


def test_rest_and_faster_moves_are_no_coarser_converter(shipped: Reference, learned: DriftState) -> None:
    assert learned.site_reference is not None
    for factor in (0.0, 0.25, 1.5, 3.0):
        rows = factor * readings(33, 1).features.astype(np.float64)
        summary, _ = summarize_rows(shipped, rows)
        assert faults.detect_coarsening(summary, learned.site_reference).tolist() == [0, 0, 0]


@given(st.lists(st.integers(0, 40), max_size=5))
def test_steps_are_counted_alike_however_the_rows_were_cut(shipped: Reference, cuts: list[int]) -> None:
    rows = readings(34, 1).features[:40].astype(np.float64)
    rows[[5, 6, 20], 1] = np.nan
    whole, _ = summarize_rows(shipped, rows)
    summary, tail = None, None
    for begin, end in pairwise(sorted({0, *cuts, 40})):
        summary, tail = summarize_rows(shipped, rows[begin:end], summary, tail)
    assert summary is not None
    np.testing.assert_array_equal(summary.steps, whole.steps)
    np.testing.assert_array_equal(summary.extremes.rows, whole.extremes.rows)
    assert whole.steps.sum(1).tolist() == [39, 34, 39]


def test_quiet_windows_and_drift_are_never_taken_for_a_misread_field(shipped: Reference, learned: DriftState) -> None:
    assert alerted(shipped, learned, readings(31, 300), ("g", "g", "g")) == []
    for gain, shift in [(0.6, 0.0), (1.4, 0.0), (1.0, 0.5), (1.0, -0.5)]:
        r = readings(32, 60)
        r.features[:, 1] = gain * r.features[:, 1] + shift
        assert alerted(shipped, learned, r, ("g", "g", "g")) == []


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_readings_that_are_cut_off_at_a_limit_are_saturated(shipped: Reference, side: float) -> None:
    r = readings(13, 60)
    named = []
    for i in range(60):
        rows = r.windows(i, i + 1).features.astype(np.float64)
        rows[:, 1] = side * np.minimum(side * rows[:, 1], np.quantile(side * rows[:, 1], 0.85))
        named.append(fault_names(shipped, rows))
    assert named.count((None, "saturated", None)) >= 59


def test_a_limit_at_which_a_sensor_often_is_by_nature_is_not_saturation() -> None:
    rng = np.random.default_rng(5)
    rain = np.maximum(0.0, rng.normal(1, 1, (12_000, 1))).astype(np.float32)
    shipped = build_reference(rain, np.arange(12_000), 1, np.zeros(12_000, np.int64), None, 300, fields=("rain",))
    assert shipped.rest == ((),)
    assert fault_names(shipped, rain[:300].astype(np.float64)) == (None,)
    assert fault_names(shipped, np.minimum(rain[:300].astype(np.float64), 1.8)) == ("saturated",)


def test_a_coarse_sensor_at_its_highest_value_is_not_saturated(shipped: Reference) -> None:
    rng, rows = np.random.default_rng(6), readings(14, 1).features.astype(np.float64)
    rows[:, 0] = np.minimum(np.round(rng.normal(2, 1, len(rows))), 2) / 3
    assert (rows[:, 0] == 2 / 3).mean() > 0.5
    assert fault_names(replace(shipped, longest=shipped.longest + 30), rows)[0] is None


@given(st.lists(st.lists(st.sampled_from([-2.0, 0.0, 1.0, 1.5, np.nan]), max_size=5), max_size=4), st.randoms())
def test_extremes_of_parts_are_those_of_the_whole(parts: list[list[float]], rng: Random) -> None:
    whole = extremes([value for part in parts for value in part])
    rng.shuffle(parts)
    together = Extremes.empty(1)
    for part in parts:
        together = together.merge(extremes(part))
    np.testing.assert_array_equal(together.values, whole.values)
    np.testing.assert_array_equal(together.rows, whole.rows)


def extremes(values: list[float]) -> Extremes:
    return Extremes.from_sorted(np.sort(np.array([values])), np.array([sum(value == value for value in values)]))


def test_lone_jumps_are_spikes(shipped: Reference, rows: NDArray[np.float64]) -> None:
    rows[[30, 31, 32], 1] = [0.5, 0.5 + 12 * shipped.jump[1], 0.5]
    assert fault_names(shipped, rows) == (None, None, None)
    rows[[130, 131, 132], 1] = [0.5, 0.5 - 12 * shipped.jump[1], 0.5]
    assert fault_names(shipped, rows) == (None, "spikes", None)


def test_larger_steps_everywhere_are_no_spikes(shipped: Reference, rows: NDArray[np.float64]) -> None:
    middle = rows[:, 1].mean()
    rows[40::60, 1] += 3 * shipped.jump[1]
    for gain in (1.0, 4.0, 5.0, 9.8):
        louder = rows.copy()
        louder[:, 1] = middle + gain * (rows[:, 1] - middle)
        assert "spikes" not in fault_names(shipped, louder), gain


def test_a_step_to_a_new_level_is_no_spike(shipped: Reference, rows: NDArray[np.float64]) -> None:
    rows[40:80, 1] += 12 * shipped.jump[1]
    rows[120:160, 1] += 12 * shipped.jump[1]
    summary, _ = summarize_rows(shipped, rows)
    assert summary.spikes[1] == 0


def test_infinities_count_as_missing() -> None:
    r = readings(11, 60)
    r.features[5, 0], r.features[9, 0] = np.inf, -np.inf
    starts = np.arange(600) * ROWS
    shipped = build_reference(r.features, starts, ROWS, r.labels, None, WINDOW, fields=FIELDS, labels=LABELS)
    assert shipped.missing.tolist() == [2, 0, 0]
    assert np.isfinite(shipped.high).all()
