"""Report of a simulated fleet: what was injected, what was found, when and by whom, roll-outs, and the audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from outstation.fleet.database.store import FleetStore
from outstation.foundation.text import list_names, pluralize
from outstation.workbench.testing.simulation import attribution, rollouts
from outstation.workbench.testing.simulation.attribution import Attribution
from outstation.workbench.testing.simulation.runner import Outcome
from outstation.workbench.testing.simulation.scenario import Scenario

_MAX_ALERTS, _MAX_NAMES = 10_000, 8
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
        event |= {name: rollout[name] for name in ("outcome", "ends")}
        event |= {"lasts": rollout["ended"] and rollout["ended"] - event["at"]}
    missed, budget = sum(len(event["missed"]) for event in events), scenario.budget.false_alarms
    problems = _list_problems(outcome, missed, len(false_alarms) > budget, rolled)
    problems += [
        f"No label of task {task} came due: `delay` or `every` of [labels.{task}] is too long for this run."
        for task in sorted(scenario.labels.keys() - outcome.labels.keys())
    ]
    return {
        "passed": not problems,
        "problems": problems,
        "warnings": _list_rejections(outcome, whole=False),
        "seed": scenario.seed,
        "devices": len(outcome.devices),
        "simulated_seconds": round(outcome.simulated_s, 1),
        "seconds": round(outcome.real_s, 1),
        "messages": outcome.messages,
        "messages_per_second": round(outcome.messages / max(outcome.real_s, 1e-9), 1),
        "messages_digest": outcome.digest,
        "rows": sum(tally.accepted for tally in outcome.rows.values()),
        "rejected_rows": sum(tally.rejected for tally in outcome.rows.values()),
        "labels": sum(tally.accepted for tally in outcome.labels.values()),
        "rejected_labels": sum(tally.rejected for tally in outcome.labels.values()),
        "peak_bytes": outcome.peak_bytes,
        "undelivered": outcome.undelivered,
        "events": events,
        "missed": missed,
        "rollouts": rolled,
        "false_alarms": {"n": len(false_alarms), "budget": budget, "alerts": false_alarms[:_MAX_ALERTS]},
        "audit": outcome.audit.to_dict(),
    }


def _list_problems(
    outcome: Outcome, missed: int, is_over_budget: bool, rolled: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return why the run did not pass, a sentence each."""
    problems = [f"Expected alerts that did not come: {missed}."] if missed else []
    if is_over_budget:
        problems.append("There were more false alarms than the budget.")
    if not outcome.audit.passed:
        problems.append("The audit failed.")
    problems += [
        f"Roll-out {rollout['name']} is {rollout['outcome']}; expected is {rollout['ends']}."
        for rollout in rolled
        if not rollout["passed"]
    ]
    if outcome.undelivered:
        names = list_names(outcome.undelivered, _MAX_NAMES)
        problems.append(f"Messages of {pluralize(len(outcome.undelivered), 'device')} were not delivered: {names}.")
    # A run without rows or labels tests nothing of what it was made for.
    return problems + _list_rejections(outcome, whole=True)


def _list_rejections(outcome: Outcome, *, whole: bool) -> list[str]:
    """Return a sentence for each stream and task of which devices rejected all rows or labels, or else some."""
    sent = [("row", "stream", outcome.rows), ("label", "task", outcome.labels)]
    return [
        f"Devices rejected {'all' if whole else f'{tally.rejected} of'} "
        f"{pluralize(tally.accepted + tally.rejected, noun)} of {kind} {name}{'' if whole else ', the first'}: "
        f"{tally.reason}."
        for noun, kind, tallies in sent
        for name, tally in sorted(tallies.items())
        if tally.rejected and (not tally.accepted) == whole
    ]


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
