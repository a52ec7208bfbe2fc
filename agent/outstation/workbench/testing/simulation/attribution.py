"""Attribution of alerts to the events of a scenario: which alerts an event can cause, and which of them answers it.

An alert is explained by an event at its device if its kind and subject are among the event's effects, its task reads
what the event changes, and it was raised between the begin of the event and `grace` after its end. Alerts about labels
come as late as the labels do. Where an event makes the model name other classes, which other alerts show, it also
explains drift of the other fields, which is tested within these classes. All other alerts are false alarms.

A roll-out that was refused explains nothing. One that was rolled back ends with that decision at each device that has
followed it. After one that was completed, drift and labels still show the new model; rejections, refused learning and
late results end with it.

Events that overlap at a device are answered by one alert each. An open alert is not raised again for the same field, so
an event may share the alert that answers another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from outstation.fleet.database.store import FleetStore
from outstation.foundation import clock
from outstation.ml.drift.alert_lifecycle import is_within_classes_only
from outstation.workbench.testing.simulation.runner import Injected, Outcome
from outstation.workbench.testing.simulation.scenario import (
    CollectorOutage,
    Rollout,
    Scenario,
    SensorFault,
    Silence,
    SkewedClock,
    WrongLabels,
)

_FIELD, _DERIVED, _ANY = "<field>", "<derived>", "*"
_LABELS = "quality"
_SENSOR = (
    *(("drift", subject) for subject in (_FIELD, _DERIVED, "output", "score", "joint", "rate", "reference")),
    *(("fault", _FIELD), ("fault", _DERIVED), ("outlier", _FIELD), ("model", "reference"), ("result", _ANY)),
    *((_LABELS, subject) for subject in ("decay", "evaluation", "certainty")),
)
_LINK = (("connection", _ANY),)
_STORE = (("storage", _ANY),)
# Alerts by which a device shows that its model names other classes than before.
_ANSWERS = frozenset({("drift", "output"), ("drift", "score"), (_LABELS, "decay"), (_LABELS, "evaluation")})
# Alerts about a roll-out itself, not about the model that serves after it.
_OF_ROLLOUT = frozenset({"model", "result"})
# Kind of event → alerts and subjects that it can cause.
EFFECTS: dict[str, tuple[tuple[str, str], ...]] = {
    "silence": (("fault", "rate"), ("fault", _FIELD), ("result", _ANY)),
    "outage": (*_LINK, *_STORE),
    "network": _LINK,
    "collector-outage": (*_LINK, *_STORE),
    "clock": (("clock", "clock"), ("fault", "rate")),
    "power-cut": (*_LINK, *_STORE, ("clock", "clock"), ("fault", "rate")),
    "full-disk": (*_LINK, *_STORE),
    "rollout": (
        *(("drift", subject) for subject in ("output", "score", "joint", "reference")),
        *(("model", _ANY), ("result", _ANY), (_LABELS, "decay"), (_LABELS, "evaluation"), (_LABELS, "certainty")),
    ),
    "wrong-labels": tuple((_LABELS, subject) for subject in ("decay", "evaluation", "certainty")),
}


class RaisedAlert(msgspec.Struct, frozen=True):
    """An alert with the simulated times at which it was raised, again with each revision, and cleared.

    `follows`: the fields whose drift was open before, if only rows of one class drift, and not all rows together.
    """

    device: str
    task: str
    alert: str
    subject: str
    source: str
    summary: str
    raised_s: tuple[float, ...]
    cleared_s: float
    follows: tuple[str, ...] = ()

    @property
    def at_s(self) -> float:
        return self.raised_s[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "alert": self.alert,
            "subject": self.subject,
            "by": self.source,
            "at": round(self.at_s, 1),
            "summary": self.summary,
        }


class Answer(msgspec.Struct, frozen=True):
    """Alert that answers an event at a device, raised at `at_s`; `shared_with`: number of the event that it answers."""

    alert: RaisedAlert
    at_s: float
    shared_with: int | None = None


class Attribution(msgspec.Struct, frozen=True):
    """Answers by number of the event (from 1) and device; devices without one; alerts that no event explains."""

    answers: dict[int, list[tuple[str, Answer]]]
    missed: dict[int, list[str]]
    false_alarms: list[RaisedAlert]


def load_alerts(scenario: Scenario, outcome: Outcome, store: FleetStore) -> list[RaisedAlert]:
    """Return all alerts by the time at which they were raised first. Raises StorageError."""
    rows: dict[tuple[str, ...], list[tuple[float, dict[str, Any]]]] = {}
    for row in store.alerts(closed=True):
        at_s = (clock.parse_rfc3339(row["time"]) - scenario.start_us) / 1e6
        if row["source"] == "device":
            at_s -= skew_s(outcome, row["device"], at_s)
        rows.setdefault((row["device"], row["log"], row["source"], row["id"]), []).append((at_s, row))
    alerts = []
    for states in rows.values():
        raised = sorted((at_s for at_s, row in states if row["state"] == "raised"))
        cleared = [at_s for at_s, row in states if row["state"] != "raised"]
        if raised:
            row = min(states, key=lambda each: (each[1]["state"] != "raised", each[0]))[1]
            names = (row["device"], row["task"] or "", row["alert"], row["subject"], row["source"], row["summary"])
            follows = _list_causes(store, row) if (row["alert"], row["source"]) == ("drift", "device") else ()
            alerts.append(RaisedAlert(*names, tuple(raised), max(cleared, default=float("inf")), follows))
    return sorted(alerts, key=lambda alert: (alert.at_s, alert.device, alert.alert, alert.subject, alert.summary))


def _list_causes(store: FleetStore, row: Mapping[str, Any]) -> tuple[str, ...]:
    sql = "SELECT payload FROM messages WHERE device = ? AND log = ? AND seq = ?"
    [(payload,)] = store.fetch_all(sql, row["device"], row["log"], row["seq"])
    evidence = msgspec.json.decode(bytes(payload)).get("evidence", {})
    return tuple(evidence.get("after", ())) if is_within_classes_only(evidence) else ()


def skew_s(outcome: Outcome, device: str, shown_s: float) -> float:
    """Return how far the clock of a device was ahead when it showed a time."""
    skew = 0.0
    for injected in outcome.injected:
        event = injected.event
        if isinstance(event, SkewedClock) and device in injected.devices:
            offset_s = event.offset_us / 1e6
            if event.at <= shown_s - offset_s < event.end_s:
                skew += offset_s
    return skew


def attribute(
    scenario: Scenario, outcome: Outcome, alerts: Sequence[RaisedAlert], rolled: Sequence[Mapping[str, Any]]
) -> Attribution:
    """Attribute alerts to events; `rolled`: the entries of roll-outs from `rollouts.build`."""
    matcher = _Matcher(scenario, outcome, alerts, rolled)
    answers: dict[int, list[tuple[str, Answer]]] = {}
    missed: dict[int, list[str]] = {}
    by_device: dict[str, list[int]] = {}
    for number, injected in enumerate(outcome.injected, 1):
        for device in injected.devices or [""]:
            by_device.setdefault(device, []).append(number)
    for device, numbers in by_device.items():
        own = [alert for alert in alerts if alert.device == device or not device]
        assigned = _assign(matcher, numbers, own)
        for number in numbers:
            if number in assigned:
                answers.setdefault(number, []).append((device, assigned[number]))
            elif list_expected(outcome, number, device):
                missed.setdefault(number, []).append(device)
    false_alarms = [alert for alert in alerts if not any(matcher.explaining(alert))]
    return Attribution(answers, missed, false_alarms)


def list_expected(outcome: Outcome, number: int, device: str | None = None) -> list[str]:
    """Return the kinds of alerts of which one must come, of a device or of any.

    None by default where the event was over before one was due.
    """
    injected = outcome.injected[number - 1]
    event, devices = injected.event, injected.devices if device is None else [device]
    is_seen = not devices or any(name not in injected.unseen for name in devices)
    lasted_s = min(event.end_s, outcome.simulated_s) - event.at
    is_due = event.expect is not None or event.is_alert_due(lasted_s, outcome.health_s, is_seen=is_seen)
    return list(event.expected_alerts) if is_due else []


class _Matcher:
    """Tells which events explain an alert."""

    def __init__(
        self, scenario: Scenario, outcome: Outcome, alerts: Sequence[RaisedAlert], rolled: Sequence[Mapping[str, Any]]
    ) -> None:
        self._scenario, self._outcome = scenario, outcome
        self._rolled = {entry["event"]: entry for entry in rolled}
        self._answer_alerts = [alert for alert in alerts if (alert.alert, alert.subject) in _ANSWERS]
        self._fields = {name for names in outcome.fields.values() for name in names}

    def event(self, number: int) -> Any:
        return self._outcome.injected[number - 1].event

    def end_s(self, number: int, alert: RaisedAlert) -> float:
        """Return the last moment at which an event causes such an alert at its device."""
        if (rollout := self._rolled.get(number)) is None:
            return float(self.event(number).end_s)
        if rollout["outcome"] == "refused":
            return -float("inf")
        is_of_model = rollout["outcome"] == "completed" and alert.alert not in _OF_ROLLOUT
        if rollout["ended"] is None or is_of_model:
            return float("inf")
        entries = [entry for entry in rollout["devices"] if alert.device in ("", entry["device"])]
        # A device that was offline follows a decision later.
        return float(max([rollout["ended"], *(phase["at"] for entry in entries for phase in entry["phases"])]))

    def explaining(self, alert: RaisedAlert) -> Iterator[int]:
        """Yield the numbers of the events that explain an alert."""
        for number, injected in enumerate(self._outcome.injected, 1):
            if not self._is_at(injected, alert):
                continue
            if self.fits(number, alert, alert.at_s) or self._follows_classes(number, alert):
                yield number

    def fits(self, number: int, alert: RaisedAlert, at_s: float) -> bool:
        """Return True if an alert that is raised at `at_s` at the event's device may come from the event."""
        event = self.event(number)
        if event.expect is not None and not event.expect:
            return False
        labels = self._scenario.labels.get(alert.task) if alert.alert == _LABELS else None
        delay_s = 0.0 if labels is None else float(labels.delay)
        # Rows of one commit have the time of the first one.
        begin_s = event.at + delay_s - self._outcome.commit_s
        if not begin_s <= at_s <= self.end_s(number, alert) + delay_s + self._scenario.grace:
            return False
        return self._may_cause(event, alert)

    def _follows_classes(self, number: int, alert: RaisedAlert) -> bool:
        """Return True for drift of another field, where the event made the model name other classes.

        Drift is tested within the classes that the model names: other classes show in the answers, or in a drift that
        is one of single classes only, while a field of the event drifts.
        """
        event, outcome = self.event(number), self._outcome
        if not isinstance(event, SensorFault) or alert.alert != "drift" or alert.task not in outcome.class_tasks:
            return False
        streams = [{*outcome.fields[name]} for name in outcome.task_streams.get(alert.task, [])]
        if not any({alert.subject, *event.fields} <= fields for fields in streams):
            return False
        is_during = event.at <= alert.at_s <= event.end_s + self._scenario.grace
        return (is_during and not {*event.fields}.isdisjoint(alert.follows)) or any(
            (other.device, other.task) == (alert.device, alert.task) and self.fits(number, other, other.at_s)
            for other in self._answer_alerts
            if is_during
        )

    def is_exact(self, number: int, alert: RaisedAlert) -> bool:
        """Return True if the alert names what the event changes."""
        subjects = self.event(number).subjects
        return not subjects or alert.subject in subjects

    def is_about(self, number: int, alert: RaisedAlert) -> bool:
        """Return True if the event expects such an alert, and the alert names what it changes."""
        event = self.event(number)
        return alert.alert in event.expected_alerts and self.is_exact(number, alert) and self._may_cause(event, alert)

    def _is_at(self, injected: Injected, alert: RaisedAlert) -> bool:
        if isinstance(injected.event, CollectorOutage):
            return alert.source == "collector"
        # Alerts of the whole fleet name no device: one device alone cannot raise them.
        return alert.device in injected.devices or (not alert.device and len(injected.devices) > 1)

    def _may_cause(self, event: Any, alert: RaisedAlert) -> bool:
        if isinstance(event, WrongLabels | Rollout) and alert.task != event.task:
            return False
        if isinstance(event, SensorFault | Silence) and alert.task and not self._reads(event, alert.task):
            return False
        if event.expect and alert.alert in event.expect:
            return True
        if isinstance(event, SensorFault) and (alert.alert, alert.subject) == ("fault", "rate"):
            # Rows of which every field is stuck repeat.
            return event.kind == "stuck" and any({*names} <= {*event.fields} for names in self._outcome.fields.values())
        effects = EFFECTS.get(event.kind, _SENSOR)
        return any(kind == alert.alert and self._is_subject(event, subject, alert.subject) for kind, subject in effects)

    def _is_subject(self, event: Any, pattern: str, subject: str) -> bool:
        if pattern == _FIELD:
            changed = event.fields if isinstance(event, SensorFault) else self._stream_fields(event)
            return subject in changed
        if pattern == _DERIVED:
            reserved = {subject for _, subject in _SENSOR} | {"labels"}
            return subject not in self._fields and subject not in reserved
        return pattern in (_ANY, subject)

    def _stream_fields(self, event: Silence) -> set[str]:
        streams = [event.stream] if event.stream else self._outcome.fields
        return {name for stream in streams for name in self._outcome.fields[stream]}

    def _reads(self, event: SensorFault | Silence, task: str) -> bool:
        """Return True if a task reads a stream that the event changes."""
        streams = self._outcome.task_streams.get(task, [])
        if event.stream:
            return event.stream in streams
        return isinstance(event, Silence) or any({*event.fields} <= {*self._outcome.fields[name]} for name in streams)


def _assign(matcher: _Matcher, numbers: Sequence[int], alerts: Sequence[RaisedAlert]) -> dict[int, Answer]:
    """Assign to as many of a device's events as possible an alert of its own (augmenting paths, Kuhn 1955)."""
    candidates = {number: _list_candidates(matcher, number, numbers, alerts) for number in numbers}
    owners: dict[tuple[int, float], int] = {}

    def claim(number: int, tried: set[tuple[int, float]]) -> bool:
        for unit in candidates[number]:
            if unit not in tried:
                tried.add(unit)
                if unit not in owners or claim(owners[unit], tried):
                    owners[unit] = number
                    return True
        return False

    for number in sorted(numbers, key=lambda each: (matcher.event(each).at, each)):
        claim(number, set())
    answers = {number: Answer(alerts[index], at_s) for (index, at_s), number in owners.items()}
    for number in numbers:
        if number not in answers and (shared := _find_shared(matcher, number, answers)) is not None:
            answers[number] = shared
    return answers


def _list_candidates(
    matcher: _Matcher, number: int, numbers: Sequence[int], alerts: Sequence[RaisedAlert]
) -> list[tuple[int, float]]:
    """Return index and time of the alerts that may answer an event: first those that name what it changes."""
    exact, others = [], []
    for index, alert in enumerate(alerts):
        if alert.alert not in matcher.event(number).expected_alerts:
            continue
        for at_s in alert.raised_s:
            if not matcher.fits(number, alert, at_s):
                continue
            if matcher.is_exact(number, alert):
                exact.append((index, at_s))
            elif not any(other != number and matcher.fits(other, alert, at_s) for other in numbers):
                # A consequence that several events have says nothing about one of them.
                others.append((index, at_s))
    return sorted(exact, key=lambda unit: unit[1]) + sorted(others, key=lambda unit: unit[1])


def _find_shared(matcher: _Matcher, number: int, answers: dict[int, Answer]) -> Answer | None:
    """Return the alert of another event that was open during this one, and about the same."""
    event = matcher.event(number)
    for other, answer in answers.items():
        alert = answer.alert
        is_open = alert.at_s <= matcher.end_s(number, alert) and alert.cleared_s >= event.at
        if answer.shared_with is None and is_open and matcher.is_about(number, alert):
            return Answer(alert, max(alert.at_s, float(event.at)), other)
    return None
