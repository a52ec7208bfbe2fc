"""Report of a simulated fleet: what was injected, what was found, when and by whom, false alarms, and the audit."""

from __future__ import annotations

from typing import Any

import msgspec

from agent import clock
from agent.fleet.database.store import FleetStore
from agent.testing.simulation.runner import Injected, Outcome
from agent.testing.simulation.scenario import CollectorOutage, Scenario, SkewedClock

# An alert may be dated a little before its event: rows of a commit have the time of the first one.
_EARLY_S = 60.0
_MAX_ALERTS = 10_000


class _RaisedAlert(msgspec.Struct, frozen=True):
    """An alert as it was raised; `at_s` is simulated time."""

    device: str
    alert: str
    subject: str
    source: str
    at_s: float
    summary: str
    identity: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "alert": self.alert,
            "subject": self.subject,
            "by": self.source,
            "at": round(self.at_s, 1),
            "summary": self.summary,
        }


def build(scenario: Scenario, outcome: Outcome, store: FleetStore) -> dict[str, Any]:
    """Return the report as a JSON document. Raises StorageError."""
    alerts = _load_alerts(scenario, outcome, store)
    explained: set[str] = set()
    events = [_describe(scenario, injected, alerts, explained) for injected in outcome.injected]
    false_alarms = [alert.to_dict() for alert in alerts if alert.identity not in explained]
    budget = scenario.budget.false_alarms
    missed = sum(len(event["missed"]) for event in events)
    return {
        "passed": outcome.audit.passed and not missed and len(false_alarms) <= budget and not outcome.undelivered,
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
        "false_alarms": {"n": len(false_alarms), "budget": budget, "alerts": false_alarms[:_MAX_ALERTS]},
        "audit": outcome.audit.to_dict(),
    }


def _load_alerts(scenario: Scenario, outcome: Outcome, store: FleetStore) -> list[_RaisedAlert]:
    """Return alerts as they were raised first, in simulated time."""
    first: dict[str, _RaisedAlert] = {}
    for row in store.alerts(closed=True):
        if row["state"] != "raised":
            continue
        at_s = (clock.parse_rfc3339(row["time"]) - scenario.start_us) / 1e6
        if row["source"] == "device":
            at_s -= _skew_s(scenario, outcome, row["device"], at_s)
        identity = f"{row['device']}/{row['log']}/{row['id']}"
        if identity not in first or at_s < first[identity].at_s:
            members = (row["device"], row["alert"], row["subject"], row["source"], at_s, row["summary"], identity)
            first[identity] = _RaisedAlert(*members)
    return sorted(first.values(), key=lambda alert: (alert.at_s, alert.identity))


def _skew_s(scenario: Scenario, outcome: Outcome, device: str, shown_s: float) -> float:
    """Return how far the clock of a device was ahead when it showed a time."""
    skew = 0.0
    for injected in outcome.injected:
        event = injected.event
        if isinstance(event, SkewedClock) and device in injected.devices:
            offset_s = event.offset_us / 1e6
            if event.at <= shown_s - offset_s < event.end_s:
                skew += offset_s
    return skew


def _describe(
    scenario: Scenario, injected: Injected, alerts: list[_RaisedAlert], explained: set[str]
) -> dict[str, Any]:
    """Return an event with the first alert of each of its devices; add the alerts that it explains."""
    event = injected.event
    answers, missed = [], []
    devices = ["" if isinstance(event, CollectorOutage) else name for name in injected.devices] or [""]
    for device in devices:
        own = [alert for alert in alerts if _may_explain(scenario, injected, device, alert)]
        explained.update(alert.identity for alert in own)
        named = [alert for alert in own if alert.alert in event.expected_alerts and alert.at_s >= event.at - _EARLY_S]
        # An alert that names a field of the event tells more than one that comes with it.
        exact = [alert for alert in named if alert.subject in event.subjects] or named
        if exact:
            answers.append({**exact[0].to_dict(), "after": round(exact[0].at_s - event.at, 1)})
        elif event.expected_alerts:
            missed.append(device)
    settings = {
        key: value
        for key, value in msgspec.to_builtins(event, enc_hook=str).items()
        if key not in ("kind", "at", "lasts", "devices", "group", "expect") and value
    }
    return {
        "kind": event.kind,
        "at": float(event.at),
        "lasts": None if event.lasts is None else float(event.lasts),
        "devices": injected.devices,
        "settings": settings,
        "expects": list(event.expected_alerts),
        "found": answers,
        "missed": missed,
    }


def _may_explain(scenario: Scenario, injected: Injected, device: str, alert: _RaisedAlert) -> bool:
    """Return True if an alert may come from an event: at its device, or of all, in its time and the grace after it."""
    event = injected.event
    if not event.at - _EARLY_S <= alert.at_s <= event.end_s + scenario.grace:
        return False
    if isinstance(event, CollectorOutage):
        return alert.source == "collector"
    # Alerts of the whole fleet name no device.
    return alert.device in (device, "") and (event.expect is None or bool(event.expect))
