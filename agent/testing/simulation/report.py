"""Report of a simulated fleet: what was injected, what was found, when and by whom, roll-outs, and the audit."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.fleet.database.store import FleetStore
from agent.testing.simulation import attribution, rollouts
from agent.testing.simulation.attribution import Attribution
from agent.testing.simulation.runner import Outcome
from agent.testing.simulation.scenario import Scenario

_MAX_ALERTS = 10_000
# Members of an event that are not in its `settings`.
_OWN_MEMBERS = ("at", "lasts", "devices", "group", "expect", "plan")


def build(scenario: Scenario, outcome: Outcome, store: FleetStore) -> dict[str, Any]:
    """Return the report as a JSON document. Raises StorageError."""
    alerts = attribution.load_alerts(scenario, outcome, store)
    rolled = rollouts.build(scenario, outcome, store)
    attributed = attribution.attribute(scenario, outcome, alerts, rolled)
    events = [_describe(number, outcome, attributed) for number in range(1, len(outcome.injected) + 1)]
    false_alarms = [alert.to_dict() for alert in attributed.false_alarms]
    for rollout in rolled:
        event = events[rollout["event"] - 1]
        event |= {"outcome": rollout["outcome"], "lasts": rollout["ended"] and rollout["ended"] - event["at"]}
    budget = scenario.budget.false_alarms
    missed = sum(len(event["missed"]) for event in events)
    return {
        "passed": outcome.audit.passed
        and not (missed or outcome.undelivered)
        and len(false_alarms) <= budget
        and all(rollout["passed"] for rollout in rolled),
        "seed": scenario.seed,
        "devices": len(outcome.devices),
        "simulated_seconds": round(outcome.simulated_s, 1),
        "seconds": round(outcome.real_s, 1),
        "messages": outcome.messages,
        "messages_per_second": round(outcome.messages / max(outcome.real_s, 1e-9), 1),
        "messages_digest": outcome.digest,
        "rows": outcome.rows,
        "rejected_rows": outcome.rejected,
        "labels": outcome.labels,
        "rejected_labels": outcome.rejected_labels,
        "peak_bytes": outcome.peak_bytes,
        "undelivered": outcome.undelivered,
        "events": events,
        "missed": missed,
        "rollouts": rolled,
        "false_alarms": {"n": len(false_alarms), "budget": budget, "alerts": false_alarms[:_MAX_ALERTS]},
        "audit": outcome.audit.to_dict(),
    }


def _describe(number: int, outcome: Outcome, attributed: Attribution) -> dict[str, Any]:
    """Return an event with its answer at each device."""
    event, devices = outcome.injected[number - 1].event, outcome.injected[number - 1].devices
    defaults = {field.name: field.default for field in msgspec.structs.fields(event)}
    answers = []
    for _, answer in attributed.answers.get(number, []):
        entry = {**answer.alert.to_dict(), "at": round(answer.at_s, 1), "after": round(answer.at_s - event.at, 1)}
        answers.append(entry if answer.shared_with is None else {**entry, "shared_with": answer.shared_with})
    settings = {
        key: float(value) if isinstance(value, float) else value
        for key, value in msgspec.structs.asdict(event).items()
        if key not in _OWN_MEMBERS and value != defaults.get(key)
    }
    return {
        "kind": event.kind,
        "at": float(event.at),
        "lasts": None if event.lasts is None else float(event.lasts),
        "devices": devices,
        "settings": settings,
        "expects": attribution.list_expected(outcome, number),
        "found": answers,
        "missed": attributed.missed.get(number, []),
    }
