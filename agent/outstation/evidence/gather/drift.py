"""Drift of the fleet by task, as the collector computes it from signed `drift` messages. The result is not signed."""

from __future__ import annotations

from typing import Any

from outstation.evidence.format.contents import WRITE_LIMITS
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift.merge import PerformanceEstimates
from outstation.fleet.drift.survey import DriftGroup, summarize_drift
from outstation.foundation import clock


def build_drift(store: FleetStore, as_of_us: int) -> dict[str, Any]:
    """Return the content of drift.json. Open episodes come first in `onsets`."""
    survey = summarize_drift(store, now_us=as_of_us)
    return {
        "duplicate_windows": survey.duplicates,
        "unreadable_windows": survey.unreadable,
        "tasks": [_group_to_dict(group) for group in survey.groups],
    }


def _group_to_dict(group: DriftGroup) -> dict[str, Any]:
    episodes = group.ordered_episodes()
    windows = {name: device.last_window for name, device in group.devices.items()}
    return {
        "task": group.task,
        "reference": group.shipped_reference,
        "differs_in": group.differs_in,
        "devices": len(group.devices),
        "devices_in_drift": sorted(name for name, last in windows.items() if last and last.state == "drift"),
        "windows": group.windows,
        "sensor_fault_windows": group.faulty,
        "unsynced_windows": group.undated,
        **_expected_members(expected := group.estimate_performance()),
        "expected_outputs": {name: _expected_members(each) for name, each in sorted(expected.further.items())},
        "outputs_omitted": group.list_outputs()[1],
        "fleet_wide": [
            {
                "field": change.subject,
                "devices": len(change.devices),
                "reporting_devices": change.device_count,
                "summary": change.summary,
            }
            for change in group.detect_fleet_wide()
        ],
        "onsets_omitted": max(0, len(episodes) - WRITE_LIMITS.drift_onsets),
        "onsets": [episode.to_document() for episode in episodes[: WRITE_LIMITS.drift_onsets]],
        "history": [
            {
                "from": clock.to_rfc3339(begin),
                "to": clock.to_rfc3339(end),
                "windows": span.windows,
                "devices_in_drift": len(span.drifting_devices),
                "devices_with_sensor_fault": len(span.faulty_devices),
                **_expected_members(span.expected),
            }
            for begin, end, span in group.history
        ],
    }


def _expected_members(expected: PerformanceEstimates) -> dict[str, float | None]:
    accuracy, error = expected.accuracy, expected.error
    return {
        "expected_accuracy": None if accuracy is None else round(accuracy, 4),
        "expected_error": None if error is None else float(f"{error:.4g}"),
    }
