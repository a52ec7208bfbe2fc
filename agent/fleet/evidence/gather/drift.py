"""Drift: what the fleet's drift windows come to, task by task. Figures are the collector's; its alerts are signed."""

from __future__ import annotations

from typing import Any

from agent import clock
from agent.fleet.database.store import FleetStore
from agent.fleet.drift.survey import DriftGroup, summarize_drift
from agent.fleet.evidence.format.contents import WRITE_LIMITS


def build_drift(store: FleetStore, as_of_us: int) -> dict[str, Any]:
    """The content of drift.json; `moved` of each task holds what goes on first."""
    found = summarize_drift(store, now_us=as_of_us)
    return {
        "windows_repeated": found.duplicates,
        "windows_unreadable": found.unreadable,
        "tasks": [_group_to_dict(group) for group in found.groups],
    }


def _group_to_dict(group: DriftGroup) -> dict[str, Any]:
    moved = group.ordered_episodes()
    estimate = group.estimate_accuracy()
    return {
        "task": group.task,
        "reference": group.shipped_reference,
        "apart": group.differs_in,
        "devices": len(group.devices),
        "devices_in_drift": sorted(
            n for n, one in group.devices.items() if one.last_window and one.last_window.state == "drift"
        ),
        "windows": group.windows,
        "windows_with_a_sensor_fault": group.faulty,
        "windows_of_a_wrong_clock": group.undated,
        "expected_accuracy": None if estimate is None else round(estimate, 4),
        "wide": [
            {"field": one.subject, "devices": len(one.devices), "of": one.device_count, "summary": one.summary}
            for one in group.detect_fleet_wide()
        ],
        "moved_left_out": max(0, len(moved) - WRITE_LIMITS.drift_onsets),
        "moved": [
            {
                "device": e.device,
                "field": e.subject,
                "test": e.test,
                "began": clock.to_rfc3339(e.began),
                "alarmed": clock.to_rfc3339(e.alarmed),
                "ended": None if e.ended is None else clock.to_rfc3339(e.ended),
            }
            for e in moved[: WRITE_LIMITS.drift_onsets]
        ],
        "history": [
            {
                "from": clock.to_rfc3339(begin),
                "to": clock.to_rfc3339(end),
                "windows": span.windows,
                "devices_in_drift": len(span.drifting_devices),
                "devices_with_a_fault": len(span.faulty_devices),
                "expected_accuracy": round(span.accuracy_sum / span.estimate_count, 4) if span.estimate_count else None,
            }
            for begin, end, span in group.history
        ],
    }
