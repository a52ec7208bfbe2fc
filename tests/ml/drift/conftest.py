"""Fixtures of drift tests: a monitor, and its state at a site that has learned."""

from __future__ import annotations

import pytest

from outstation.ml.drift import DriftMonitor, DriftState, MonitorSettings
from tests.kit.machine import LABELS, LEARN, WINDOW, feed, readings, reference


@pytest.fixture(scope="module")
def monitor() -> DriftMonitor:
    return DriftMonitor(MonitorSettings(reference(), labels=LABELS, window=WINDOW, learn_windows=LEARN))


@pytest.fixture(scope="module")
def learned(monitor: DriftMonitor) -> DriftState:
    state, _ = feed(monitor, monitor.start(), readings(3, LEARN + 2))
    assert state.site_reference is not None
    return state
