"""Dispersion: offsets that alternate, whose mean stays as it was, are detected; quiet windows are not."""

from __future__ import annotations

import numpy as np
import pytest

from outstation.ml.drift import DriftMonitor, DriftState, MonitorSettings
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.detectors.dispersion import DispersionDetector

WINDOW, LEARN, WATCHED, FIELDS = 10, 40, 20, ("a", "b", "c")
Rows = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def steady(seed: int, windows: int, length: int) -> Rows:
    rng = np.random.default_rng(seed)
    # Offsets of model windows, beside the noise of rows.
    return np.asarray(
        0.3 * rng.normal(size=(windows * WINDOW, 3)).repeat(length, axis=0)
        + rng.normal(size=(windows * WINDOW * length, 3))
    )


def feed(monitor: DriftMonitor, state: DriftState, rows: Rows, length: int) -> tuple[DriftState, list[dict[str, str]]]:
    first = max(0, state.last_counted_row) + 1
    starts = np.arange(0, len(rows), length)
    state, results = monitor.process_batch(
        state, rows.astype(np.float32), starts, length, np.zeros(len(starts), np.int64), None,
        rows=(first, first + len(rows) - 1), t=np.arange(first, first + len(rows), dtype=np.int64) * 1_000_000,
    )  # fmt: skip
    alerts = [alert for result in results for alert in result.alerts if alert.state == "raised"]
    return state, [{"subject": alert.subject, "test": str(alert.evidence.get("test"))} for alert in alerts]


def learned(length: int, seed: int = 1) -> tuple[DriftMonitor, DriftState]:
    rows, starts = steady(99, 60, length), np.arange(0, 60 * WINDOW * length, length)
    shipped = build_reference(
        rows.astype(np.float32), starts, length, np.zeros(len(starts), np.int64), None, WINDOW, fields=FIELDS
    )
    monitor = DriftMonitor(MonitorSettings(shipped, labels=(), window=WINDOW, learn_windows=LEARN))
    state, _ = feed(monitor, monitor.start(), steady(seed, LEARN, length), length)
    assert state.site_reference is not None
    return monitor, state


def test_an_offset_that_alternates_between_model_windows_is_detected_within_the_drift_window() -> None:
    monitor, state = learned(12)
    rows = steady(2, WATCHED, 12)
    sign = np.where(np.arange(len(rows)) // 12 % 2, 1.0, -1.0)
    rows[:, 1] += sign
    alerts = feed(monitor, state, rows, 12)[1]
    assert {"subject": "b", "test": "dispersion"} in alerts
    assert {alert["subject"] for alert in alerts} == {"b"}


@pytest.mark.parametrize("length", [1, 12])
def test_an_offset_that_alternates_from_drift_window_to_drift_window_is_detected(length: int) -> None:
    monitor, state = learned(length)
    place = state.site_reference.layout["moments"].start  # type: ignore[union-attr]
    sd = float(state.site_reference.class_sd[0, 0])  # type: ignore[union-attr]
    if length == 1:
        sd *= float(state.site_reference.test_sd[place])  # type: ignore[union-attr]
    rows = steady(3, WATCHED, length)
    rows[:, 0] += 2 * sd * np.where(np.arange(len(rows)) // (WINDOW * length) % 2, 1.0, -1.0)
    alerts = feed(monitor, state, rows, length)[1]
    assert "a" in {alert["subject"] for alert in alerts}


def test_quiet_windows_keep_within_its_share_of_the_budget() -> None:
    raised = 0
    for seed in range(6):
        monitor, state = learned(12, 10 + seed)
        alerts = feed(monitor, state, steady(20 + seed, 60, 12), 12)[1]
        raised += sum(alert["test"] == DispersionDetector.name for alert in alerts)
    assert raised <= 1
