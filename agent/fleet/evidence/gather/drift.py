"""Drift: what the fleet's drift windows come to, task by task. Figures are the collector's; its alerts are signed."""

from __future__ import annotations

from typing import Any

from agent import clock
from agent.fleet.database.store import FleetStore
from agent.fleet.drift.survey import Group, survey
from agent.fleet.evidence.limits import MOST


def chapters(store: FleetStore, at_us: int) -> dict[str, Any]:
    """The content of drift.json; `moved` of each task holds what goes on first."""
    found = survey(store, now_us=at_us)
    return {
        "windows_repeated": found.repeated,
        "windows_unreadable": found.unreadable,
        "tasks": [_of(group) for group in found.groups],
    }


def _of(group: Group) -> dict[str, Any]:
    moved = group.moved()
    estimate = group.estimate()
    return {
        "task": group.task,
        "reference": group.shipped,
        "apart": group.apart,
        "devices": len(group.devices),
        "devices_in_drift": sorted(n for n, one in group.devices.items() if one.last and one.last.state == "drift"),
        "windows": group.windows,
        "windows_with_a_sensor_fault": group.faulty,
        "windows_of_a_wrong_clock": group.undated,
        "expected_accuracy": None if estimate is None else round(estimate, 4),
        "wide": [
            {"field": one.subject, "devices": len(one.devices), "of": one.of, "summary": one.sentence}
            for one in group.wide()
        ],
        "moved_left_out": max(0, len(moved) - MOST.moved),
        "moved": [
            {
                "device": e.device,
                "field": e.subject,
                "test": e.test,
                "began": clock.rfc3339(e.began),
                "alarmed": clock.rfc3339(e.alarmed),
                "ended": None if e.ended is None else clock.rfc3339(e.ended),
            }
            for e in moved[: MOST.moved]
        ],
        "history": [
            {
                "from": clock.rfc3339(begin),
                "to": clock.rfc3339(end),
                "windows": span.windows,
                "devices_in_drift": len(span.drift),
                "devices_with_a_fault": len(span.fault),
                "expected_accuracy": round(span.accuracy / span.estimates, 4) if span.estimates else None,
            }
            for begin, end, span in group.history
        ],
    }
