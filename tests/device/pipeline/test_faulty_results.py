"""Results of windows with a sensor fault: their message names the faulty fields."""

from __future__ import annotations

from outstation.device.batch_parts.drift_part import find_faulty_fields
from outstation.ml.drift import DriftMonitor, MonitorSettings
from tests.kit.machine import LABELS, LEARN, WINDOW, feed, readings, reference


def test_the_fields_with_a_fault_while_results_were_computed_are_named() -> None:
    monitor = DriftMonitor(MonitorSettings(reference(), labels=LABELS, window=WINDOW, learn_windows=LEARN))
    start = monitor.start()
    quiet, windows = feed(monitor, start, readings(3, 3))
    assert find_faulty_fields((start, quiet), windows) == []
    stuck = readings(4, 3)
    stuck.features[:, 2] = 1.0
    faulty, windows = feed(monitor, quiet, stuck)
    assert find_faulty_fields((quiet, faulty), windows) == ["z"]
    repaired, windows = feed(monitor, faulty, readings(5, 5))
    # The batch began while the alert was open.
    assert find_faulty_fields((faulty, repaired), windows) == ["z"]
    assert find_faulty_fields((repaired,), []) == []
