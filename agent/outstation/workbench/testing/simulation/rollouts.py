"""Roll-outs of a simulated fleet: their outcome, their steps, and when each device got the bundle."""

from __future__ import annotations

from typing import Any

from outstation.fleet.database import rollouts
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.store import FleetStore
from outstation.fleet.rollout import journal
from outstation.fleet.rollout.journal import Rollout
from outstation.fleet.rollout.rollout_status import load_snapshot
from outstation.foundation import clock
from outstation.workbench.simulate.rollout_outcome import build_outcome
from outstation.workbench.testing.simulation import attribution, scenario
from outstation.workbench.testing.simulation.runner import Outcome
from outstation.workbench.testing.simulation.scenario import Scenario

_OUTCOMES = {"finished": "completed", "aborted": "rolled-back"}
_STEP_EVENTS = ("started", "promoted")


def build(described: Scenario, outcome: Outcome, store: FleetStore) -> list[dict[str, Any]]:
    """Return an entry for each roll-out of the scenario, by number of its event. Raises StorageError."""
    entries = []
    for number, injected in enumerate(outcome.injected, 1):
        event = injected.event
        if not isinstance(event, scenario.Rollout):
            continue
        name = outcome.rollouts[event.plan]
        if (refusal := outcome.refusals.get(event.plan)) is not None:
            entry: dict[str, Any] = {"name": name, "outcome": "refused", "why": refusal}
            entry |= {"version": "", "ended": None, "steps": [], "devices": []}
        else:
            with store.snapshot() as db:
                entry = _describe(described, outcome, store, db, journal.find(db, name))
        head = {"event": number, "at": float(event.at), "task": event.task, "ends": event.ends}
        entries.append({**head, **entry, "passed": entry["outcome"] == event.ends})
    return entries


def _describe(
    described: Scenario, outcome: Outcome, store: FleetStore, db: Connection, rollout: Rollout
) -> dict[str, Any]:
    document, devices = build_outcome(store, db, rollout)
    decisions = document["decisions"]
    end_us = described.start_us + round(outcome.simulated_s * 1e6)
    if rollout.is_open:
        verdict = load_snapshot(db, rollout, end_us).verdict
        why = "; ".join(verdict.blockers) or verdict.summary
    else:
        why = decisions[-1]["summary"]
    phases = [
        (device, phase, _device_s(described, outcome, device, time))
        for device, phase, time in rollouts.load_phases(db, rollout.name)
    ]
    names = ("version", "digest", "served")
    return {
        "name": rollout.name,
        **{name: document[name] for name in names},
        "bundle": rollout.plan.bundle,
        "target": rollout.plan.target,
        "outcome": _OUTCOMES.get(rollout.state, "held"),
        "why": why,
        "ended": None if rollout.is_open else _elapsed_s(described, decisions[-1]["time"]),
        "steps": _list_steps(described, outcome, rollout, decisions, phases),
        "devices": [
            {
                "device": device,
                "phase": entry.get("phase", ""),
                "reason": entry.get("reason", ""),
                "why": entry.get("why", ""),
                "runs": entry["runs"]["version"] if entry["runs"] else "",
                "served": entry["served"].get(rollout.plan.version, 0),
                "phases": [{"phase": phase, "at": at_s} for name, phase, at_s in phases if name == device],
            }
            for device, entry in devices.items()
            if device in outcome.devices and "phase" in entry
        ],
    }


def _list_steps(
    described: Scenario,
    outcome: Outcome,
    rollout: Rollout,
    decisions: list[dict[str, Any]],
    phases: list[tuple[str, str, float]],
) -> list[dict[str, Any]]:
    """Return the steps that began, each with the devices that changed their phase in it, and its end."""
    steps: list[dict[str, Any]] = []
    for i, decision in enumerate(decisions):
        if decision["event"] not in _STEP_EVENTS:
            continue
        step = rollout.plan.steps[len(steps)]
        at_s, following = _elapsed_s(described, decision["time"]), decisions[i + 1 :]
        end_s = _elapsed_s(described, following[0]["time"]) if following else outcome.simulated_s
        reached: dict[str, list[str]] = {}
        # Actions of devices after the end of the roll-out are a part of its last step.
        is_last = not any(later["event"] in _STEP_EVENTS for later in following)
        for device, phase, phase_s in phases:
            if at_s <= phase_s and (is_last or phase_s < end_s):
                reached.setdefault(phase, []).append(device)
        steps.append(
            {
                "label": step.label,
                "strategy": step.strategy,
                "percent": step.percent,
                "at": at_s,
                "until": round(end_s, 1),
                "devices": reached,
                "why": following[0]["summary"] if following else "",
            }
        )
    return steps


def _elapsed_s(described: Scenario, time: str) -> float:
    return round((clock.parse_rfc3339(time) - described.start_us) / 1e6, 1)


def _device_s(described: Scenario, outcome: Outcome, device: str, time: str) -> float:
    """Return the simulated time of a time on a device's clock."""
    shown_s = _elapsed_s(described, time)
    return round(shown_s - attribution.skew_s(outcome, device, shown_s), 1)
