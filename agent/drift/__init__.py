"""Drift, faults and expected accuracy of a task's readings: pure numpy, no I/O, deterministic.

    reference.py    what is normal: bins, limits, class statistics, calibration; the format of reference.json
    learning.py     from drift windows to a reference: `build` for a bundle, `settle` for a site
    statistics.py   statistics of a model window, and the tests of a drift window within each class
    summary.py      one drift window as numbers that add: `Summary`
    sums.py         counts, sums and squares of many groups at once
    sizes.py        PSI, JS, KS, W1: reported, never an alarm
    cusum.py        what raises and clears a drift alarm
    faults.py       stuck, spikes, missing, out of range: told apart from drift
    estimate.py     accuracy without labels
    alerts.py       alerts and the sentences in them
    judge.py        the state machine of a task: `Judge.step`
    codec.py        to JSON and bytes, and back

A *drift window* holds several *model windows*; a model that answers each row has model windows of one row.
"""

from agent.drift.judge import Judge, State, Verdict
from agent.drift.learning import build
from agent.drift.reference import Reference

__all__ = ["Judge", "Reference", "State", "Verdict", "build"]
