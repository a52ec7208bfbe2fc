"""Operating modes: windows are compared within them, and few visits of them prolong learning."""

from __future__ import annotations

import numpy as np
import pytest

from outstation.ml.drift import DriftMonitor, DriftState, MonitorSettings, Reference
from outstation.ml.drift.baseline import operating_modes
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.baseline.transitions import MIN_TRANSITIONS, count_transitions

ROWS, LEARN, FIELDS = 60, 40, ("a", "b", "c", "d")
CENTERS = np.array([[0.0, 0.0, 0.0, 0.0], [3.0, -3.0, 2.0, 2.0], [-3.0, 0.0, 4.0, -2.0]])
Rows = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def machine(seed: int, windows: int, stay: float = 3.5, modes: int = 3) -> Rows:
    """Make rows of a machine that stays in a mode for so many windows on average."""
    rng = np.random.default_rng(seed)
    begins = rng.random(windows * ROWS) < 1 / (stay * ROWS)
    mode = np.cumsum(begins * rng.integers(1, modes, len(begins))) % modes if modes > 1 else 0 * begins
    return np.asarray(CENTERS[mode] + rng.normal(size=(windows * ROWS, 4)))


def feed(monitor: DriftMonitor, state: DriftState, rows: Rows) -> tuple[DriftState, set[str]]:
    first = max(0, state.last_counted_row) + 1
    t = np.arange(first, first + len(rows), dtype=np.int64) * 1_000_000
    state, results = monitor.process_batch(
        state, rows.astype(np.float32), np.arange(len(rows)), 1, np.zeros(len(rows), np.int64), None,
        rows=(first, first + len(rows) - 1), t=t,
    )  # fmt: skip
    return state, {alert.subject for result in results for alert in result.alerts if alert.state == "raised"}


@pytest.fixture(scope="module")
def monitor() -> DriftMonitor:
    rows = machine(99, 60)
    none = np.zeros(len(rows), np.int64)
    shipped = build_reference(rows.astype(np.float32), np.arange(len(rows)), 1, none, None, ROWS, fields=FIELDS)
    return DriftMonitor(MonitorSettings(shipped, labels=(), window=ROWS, learn_windows=LEARN))


@pytest.fixture(scope="module")
def site(monitor: DriftMonitor) -> DriftState:
    state, _ = feed(monitor, monitor.start(), machine(1, 4 * LEARN))
    return state


def test_a_machine_with_three_modes_is_compared_within_them(site: DriftState) -> None:
    reference = site.site_reference
    assert reference is not None
    assert reference.site is not None
    assert reference.site.mode_count == 3
    assert reference.site.transitions >= MIN_TRANSITIONS
    smallest = reference.describe_smallest_changes()
    assert smallest is not None
    assert all(numbers["shift_sd"] < 0.3 for numbers in smallest["fields"].values())
    again = Reference.from_json(reference.to_json())
    assert again.site is not None
    assert again.site.modes is not None
    assert (again.site.modes.offset == reference.site.modes.offset).all()  # type: ignore[union-attr]


def test_a_shift_is_detected_in_every_mode_and_a_change_of_mode_is_not_reported(
    monitor: DriftMonitor, site: DriftState
) -> None:
    for seed in range(4):
        rows = machine((2, seed), 20)  # type: ignore[arg-type]
        assert feed(monitor, site, rows)[1] == set()
        rows[:, 2] += 1.0
        assert "c" in feed(monitor, site, rows)[1]


def test_a_machine_that_showed_few_changes_of_its_mode_is_learned_for_longer(monitor: DriftMonitor) -> None:
    rows = machine(3, LEARN + 10, modes=1)
    rows[20 * ROWS : 26 * ROWS] += CENTERS[1]
    state, _ = feed(monitor, monitor.start(), rows)
    assert state.site_reference is None
    state, _ = feed(monitor, monitor.start(), machine(3, LEARN, modes=1))
    assert state.site_reference is not None
    assert state.site_reference.site is not None
    assert (state.site_reference.site.mode_count, state.site_reference.site.transitions) == (1, 0)


def test_windows_between_modes_are_no_change_of_mode() -> None:
    of_window = np.array([-1, 0, 0, -1, 0, 1, 1, -1, -1, 0, 2, -1])
    assert operating_modes.ModeAssignment(of_window, np.ones(4), is_settled=True).changes == 3


def test_too_few_changes_at_the_end_are_named_and_no_modes_are_used(monitor: DriftMonitor) -> None:
    brief = DriftMonitor(
        MonitorSettings(monitor.shipped, labels=(), window=ROWS, learn_windows=LEARN, learn_extension=1.0)
    )
    rows = machine(6, LEARN, modes=1)
    rows[10 * ROWS : 20 * ROWS] += CENTERS[1]
    rows[30 * ROWS : 36 * ROWS] += CENTERS[1]
    state, _ = feed(brief, brief.start(), rows)
    assert state.site_reference is not None
    assert state.site_reference.site is not None
    assert state.site_reference.site.modes is None
    assert "show only 4 changes between modes" in str(state.site_reference.warning)


def test_memory_without_steps_is_no_mode() -> None:
    rng = np.random.default_rng(7)
    wave = np.cumsum(rng.normal(size=(120, 3)), axis=0)
    assert count_transitions(wave, np.ones((120, 1), np.int64)) == 0


def test_one_field_that_drifts_leaves_a_window_in_its_mode() -> None:
    centers = CENTERS * 5
    windows = centers.repeat(20, axis=0) + np.random.default_rng(8).normal(size=(60, 4))
    expected = np.arange(3).repeat(20)
    for size in (2.0, 5.0, 20.0, -20.0):
        shifted = windows + size * np.array([0, 0, 1, 0])
        assert (operating_modes.assign_modes(shifted, centers) == expected).mean() > 0.9, size
    mixed = 0.5 * centers[1] + 0.5 * centers[2] + np.random.default_rng(9).normal(size=(20, 4))
    assert (operating_modes.assign_modes(mixed, centers) == -1).all()
