"""Drift detection, sensor faults and expected accuracy of a task's readings: numpy only, no I/O, deterministic.

- `numeric`: sums, divergences, false-alarm budgets; arrays only
- `detectors`: what each drift test counts, learns, scores and says; charts that judge scores
- `baseline`: references, summaries of drift windows, learning
- `testing`: all tests of a window, over consecutive windows
- `faults`: sensor faults, distinguished from drift
- `reporting`: messages, alert texts, and their parser
- `monitor`: the state machine of a task; `monitor_settings`: what its config and bundle say of it

A *drift window* holds several *model windows*; for a model that answers each row, a model window has one row.
"""

from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.monitor import DriftMonitor
from outstation.ml.drift.monitor_settings import MonitorSettings
from outstation.ml.drift.state import DriftState, DriftWindowResult

__all__ = ["DriftMonitor", "DriftState", "DriftWindowResult", "MonitorSettings", "Reference"]
