"""Health of results: which of them a drift window judged, and whether it found a sensor fault.

A result is judged when its drift window closes. That is the same result however rows are split into batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agent.arrays import Bools
from agent.drift.detectors.registry import GATES
from agent.drift.state import DriftState, DriftWindowResult

# Results that wait for their drift window, at most. Of a longer one, earlier results are judged by open alerts alone.
MAX_PENDING = 512


def judge(
    drift: DriftState | None, windows: Sequence[DriftWindowResult], pending: int, count: int
) -> tuple[Bools, int]:
    """Return which of the pending and new results are faulty (pending + count,), and how many of them are judged.

    `drift` is the state before `count` new results, `windows` are the drift windows that closed with them. A result is
    faulty if its drift window shows a sensor fault, or if the alert of one was open before that. Without a drift
    reference every result is judged, and none is faulty.
    """
    total = pending + count
    faulty = np.zeros(total, np.bool_)
    if drift is None:
        return faulty, total
    open_faults = int(np.count_nonzero(drift.faults.number)) + sum(
        kind.alert == "fault" for gate in GATES for kind, _ in gate.list_open(drift.gates[gate.name])
    )
    begin, end = 0, pending + drift.window - drift.open_summary.model_windows
    judged = 0
    for window in windows:
        # A run of quiet drift windows shows no fault.
        judged = end + (window.windows - 1) * drift.window
        faulty[begin:judged] |= open_faults > 0
        faulty[max(begin, end - MAX_PENDING) : end] |= _shows_fault(window)
        for alert in window.alerts:
            if alert.alert == "fault" and alert.revision == 1:
                open_faults += 1 if alert.state == "raised" else -1
        begin, end = judged, judged + drift.window
    overdue = total - MAX_PENDING
    if overdue > judged:
        faulty[judged:overdue] |= open_faults > 0
        judged = overdue
    return faulty, judged


def _shows_fault(window: DriftWindowResult) -> bool:
    fields = window.members["features"].values()
    return any(numbers["fault"] for numbers in (*fields, *(window.members[gate.member] for gate in GATES)))
