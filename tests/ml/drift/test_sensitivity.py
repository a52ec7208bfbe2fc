"""Sensitivity: changes of the stated size are detected about as often as stated, and a site that is blind says so."""

from __future__ import annotations

import numpy as np
import pytest

from outstation.device.cli.reference import format_smallest_changes
from outstation.ml.drift import DriftMonitor, DriftState, MonitorSettings, Reference
from outstation.ml.drift.baseline import sensitivity
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.detectors.moments import VARIANCE_PRIOR

ROWS, LEARN, FIELDS = 60, 40, ("a", "b", "c")
Rows = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def steady(seed: int, windows: int) -> Rows:
    """AR(0.8)."""
    noise = np.random.default_rng(seed).normal(size=(windows * ROWS, 3)) * 0.6
    for at in range(1, len(noise)):
        noise[at] += 0.8 * noise[at - 1]
    return noise


def changing(seed: int, windows: int) -> Rows:
    """Regimes of four windows each."""
    regime = np.random.default_rng((1, seed)).integers(0, 3, windows // 4 + 1)
    return steady(seed, windows) + 3.0 * regime.repeat(4 * ROWS)[: windows * ROWS, None] * [1, -1, 0]


def monitor_of(rows: Rows) -> DriftMonitor:
    none = np.zeros(len(rows), np.int64)
    shipped = build_reference(rows.astype(np.float32), np.arange(len(rows)), 1, none, None, ROWS, fields=FIELDS)
    return DriftMonitor(MonitorSettings(shipped, labels=(), window=ROWS, learn_windows=LEARN, learn_extension=1.0))


def alarms(monitor: DriftMonitor, state: DriftState, rows: Rows) -> tuple[DriftState, set[str]]:
    first = max(0, state.last_counted_row) + 1
    t = np.arange(first, first + len(rows), dtype=np.int64) * 1_000_000
    state, results = monitor.process_batch(
        state, rows.astype(np.float32), np.arange(len(rows)), 1, np.zeros(len(rows), np.int64), None,
        rows=(first, first + len(rows) - 1), t=t,
    )  # fmt: skip
    return state, {alert.subject for result in results for alert in result.alerts if alert.state == "raised"}


def learned(monitor: DriftMonitor, rows: Rows) -> tuple[DriftState, Reference]:
    state, _ = alarms(monitor, monitor.start(), rows[: LEARN * ROWS])
    assert state.site_reference is not None
    return state, state.site_reference


@pytest.mark.parametrize(("share", "least", "most"), [(1.0, 13, 16), (0.3, 0, 8)])
def test_a_shift_is_detected_from_the_stated_size_on(share: float, least: int, most: int) -> None:
    monitor, detected = monitor_of(steady(99, 60)), 0
    for seed in range(16):
        rows = steady(seed, LEARN + sensitivity.WINDOWS)
        state, reference = learned(monitor, rows)
        assert reference.site is not None
        rows[LEARN * ROWS :, 0] += share * reference.site.sensitivity.shift[0]
        detected += "a" in alarms(monitor, state, rows[LEARN * ROWS :])[1]
    assert least <= detected <= most


def test_a_spread_is_detected_from_the_stated_size_on() -> None:
    monitor, detected = monitor_of(steady(99, 60)), 0
    for seed in range(16):
        rows = steady(seed, LEARN + sensitivity.WINDOWS)
        state, reference = learned(monitor, rows)
        assert reference.site is not None
        rows[LEARN * ROWS :, 0] *= reference.site.sensitivity.ratio[0]
        detected += "a" in alarms(monitor, state, rows[LEARN * ROWS :])[1]
    assert detected >= 13


def test_windows_of_little_spread_need_a_larger_factor() -> None:
    even, uneven = np.full(40, 1.0), np.repeat([0.01, 1.99], 20)
    values = np.log(np.stack([even, uneven], axis=1) + VARIANCE_PRIOR)
    ratio = sensitivity.find_spread_ratio(values, np.full(2, 0.5))
    grown = np.log(ratio**2 * np.stack([even, uneven], axis=1) + VARIANCE_PRIOR).mean(0) - values.mean(0)
    assert grown == pytest.approx(0.5, abs=1e-6)
    assert ratio[0] == pytest.approx(1.35, abs=0.01)
    assert ratio[1] > 1.1 * ratio[0]


def test_a_correlation_is_detected_from_the_stated_size_on() -> None:
    monitor, detected = monitor_of(steady(99, 60)), 0
    for seed in range(16):
        rows = steady(seed, LEARN + sensitivity.WINDOWS)
        rows[:, 1] = 0.9 * rows[:, 0] + np.sqrt(1 - 0.81) * rows[:, 1]
        state, reference = learned(monitor, rows)
        assert reference.site is not None
        weaker = 0.9 - float(reference.site.sensitivity.correlation[0])
        then = rows[LEARN * ROWS :]
        then[:, 1] = (then[:, 1] - 0.9 * then[:, 0]) / np.sqrt(1 - 0.81)
        then[:, 1] = weaker * then[:, 0] + np.sqrt(1 - weaker**2) * then[:, 1]
        detected += "joint" in alarms(monitor, state, then)[1]
    assert detected >= 13


def test_a_value_that_a_field_rests_at_is_stated_never_to_be_stuck() -> None:
    rows = steady(1, LEARN + 20)
    rows[np.arange(len(rows)) % 30 < 12, 0] = 0.0
    monitor = monitor_of(rows)
    state, reference = learned(monitor, rows)
    changes = reference.describe_smallest_changes()
    assert changes is not None
    assert [each["never_stuck_at"] for each in changes["fields"].values()] == [[0.0], [], []]
    then = steady(2, 3)
    then[:, 0], then[10 : 10 + changes["fields"]["b"]["stuck_rows"], 1] = 0.0, 0.25
    assert "b" in alarms(monitor, state, then)[1]
    _, *lines = format_smallest_changes(changes)
    assert lines[-1].endswith("stuck for 15 rows, but never at 0")
    assert sum("stuck for" in line for line in lines) == 3


def test_a_run_of_the_stated_rows_is_stuck_wherever_windows_end() -> None:
    monitor, rows, detected = monitor_of(steady(99, 60)), steady(1, LEARN + 2), 0
    state, reference = learned(monitor, rows)
    stuck = int(reference.stuck_rows[1])
    for at in range(0, ROWS, 3):
        then = rows[LEARN * ROWS :].copy()
        then[at : at + stuck, 1] = then[at, 1]
        detected += "b" in alarms(monitor, state, then)[1]
    assert 18 <= detected <= 20


def test_a_site_with_different_windows_says_which_shifts_it_misses() -> None:
    _, reference = learned(monitor_of(changing(99, 60)), changing(3, LEARN))
    assert reference.warning is not None
    assert "shifts of" in reference.warning
    changes = reference.describe_smallest_changes()
    assert changes is not None
    sizes = {name: numbers["shift_sd"] for name, numbers in changes["fields"].items()}
    assert all(size is None or size > 1 for name, size in sizes.items() if name != "c")
    assert sizes["c"] < 1
    assert learned(monitor_of(steady(99, 60)), steady(3, LEARN))[1].warning is None
