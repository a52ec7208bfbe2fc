"""Attribution of alerts: only an event whose device, field, task and time fit explains an alert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from outstation.fleet.audit.audit_report import AuditReport
from outstation.foundation.config.quantities import decode_quantity
from outstation.workbench.testing.simulation.attribution import EFFECTS, Attribution, RaisedAlert, attribute
from outstation.workbench.testing.simulation.runner import Injected, Outcome
from outstation.workbench.testing.simulation.scenario import AnyEvent, CollectorOutage, Scenario

_INF = float("inf")


def alert(kind: str, subject: str, *raised: float, device: str = "a", task: str = "motion", **more: Any) -> RaisedAlert:
    values: dict[str, Any] = {"source": "device", "cleared_s": _INF, **more}
    if kind in ("connection", "storage", "clock"):
        task = ""
    return RaisedAlert(device, task, kind, subject, values["source"], f"{kind} {subject}", raised, values["cleared_s"])


def run(
    events: Sequence[dict[str, Any]],
    *alerts: RaisedAlert,
    devices: Sequence[str] = ("a",),
    rolled: Sequence[dict[str, Any]] = (),
    unseen: Sequence[str] = (),
) -> Attribution:
    labels = {"motion": {"delay": "5 min"}}
    scenario = msgspec.convert({"duration": "3 h", "labels": labels}, Scenario, dec_hook=decode_quantity)
    injected = []
    for each in events:
        event: Any = msgspec.convert({"at": "1000 s", "lasts": "600 s", **each}, AnyEvent, dec_hook=decode_quantity)
        injected.append(Injected(event, [] if isinstance(event, CollectorOutage) else [*devices], [*unseen]))
    streams = {"watch": ["ax", "ay", "az"], "mic": ["level"]}
    outcome = Outcome(
        injected=injected, devices=["a", "b"], fields=streams,
        task_streams={"motion": ["watch"], "sound": ["mic"]}, class_tasks=["motion"], commit_s=10.0, health_s=60.0,
        messages=0, digest="", rows={}, labels={}, undelivered=[], audit=AuditReport(),
        rollouts={}, refusals={}, simulated_s=10_800.0, real_s=0.0, peak_bytes=0,
    )  # fmt: skip
    return attribute(scenario, outcome, alerts, rolled)


def test_a_device_that_never_sent_anything_is_expected_to_be_silent_after_a_day_only() -> None:
    outage = {"kind": "outage", "at": "0 s", "lasts": "1 h"}
    assert run([outage], devices=["a", "b"], unseen=["a"]).missed == {1: ["b"]}
    silent = alert("connection", "silent", 90_000.0, source="collector")
    long = {**outage, "lasts": "30 h"}
    assert run([long], devices=["a"], unseen=["a"]).missed == {}
    answered = run([long], silent, devices=["a"], unseen=["a"])
    assert [device for device, _ in answered.answers[1]] == ["a"]


OFFSET = {"kind": "offset", "fields": ["ax"], "amount": 1.0}


@pytest.mark.parametrize(
    "cause",
    [
        alert("drift", "ax", 1200.0),
        alert("fault", "ax", 1200.0),
        alert("drift", "output", 1200.0),
        alert("drift", "score", 1200.0),
        alert("drift", "joint", 1200.0),
        alert("drift", "ax_speed", 1200.0),
        alert("quality", "evaluation", 1400.0),
        alert("result", "falls", 1200.0),
        alert("outlier", "ax", 1200.0, source="collector"),
        alert("drift", "ax", 995.0),
        alert("drift", "ax", 3300.0),
    ],
)
def test_what_an_offset_can_cause_is_no_false_alarm(cause: RaisedAlert) -> None:
    assert run([OFFSET], cause).false_alarms == []


@pytest.mark.parametrize(
    "other",
    [
        alert("drift", "ay", 1200.0),
        alert("fault", "rate", 1200.0),
        alert("clock", "clock", 1200.0),
        alert("connection", "silent", 1200.0, source="collector"),
        alert("quality", "labels", 1400.0),
        alert("quality", "evaluation", 1250.0),
        alert("model", "motion", 1200.0),
        alert("drift", "ax", 985.0),
        alert("drift", "ax", 3500.0),
        alert("drift", "ax", 1200.0, device="b"),
        alert("drift", "output", 1200.0, task="sound"),
        alert("drift", "ax", 1200.0, device=""),
    ],
)
def test_an_alert_of_another_field_task_device_or_time_is_a_false_alarm(other: RaisedAlert) -> None:
    attributed = run([OFFSET], other)
    assert attributed.false_alarms == [other]
    assert attributed.missed == {1: ["a"]}


@pytest.mark.parametrize("answers", [("drift", "output"), ("quality", "evaluation")])
def test_drift_of_another_field_follows_from_an_event_that_changed_the_models_classes(answers: tuple[str, str]) -> None:
    other, changed = alert("drift", "ay", 1200.0), alert(*answers, 1400.0)
    attributed = run([{**OFFSET, "kind": "swap", "fields": ["ax", "az"]}], other, changed)
    assert attributed.false_alarms == []
    # It answers no event: it names nothing that the event changed.
    assert all(answer.alert == changed for _, answer in attributed.answers.get(1, []))
    assert run([OFFSET], replace(other, raised_s=(900.0,)), changed).false_alarms != []
    assert run([OFFSET], alert("fault", "ay", 1200.0), changed).false_alarms != []


def test_drift_of_single_classes_follows_from_an_open_drift() -> None:
    own, other = alert("drift", "ax", 1150.0), alert("drift", "ay", 1200.0)
    assert run([OFFSET], own, other).false_alarms == [other]
    assert run([OFFSET], own, replace(other, follows=("ax",))).false_alarms == []
    for changes in ({"follows": ("az",)}, {"task": "sound", "subject": "level"}, {"raised_s": (900.0,)}):
        wrong = replace(other, **{"follows": ("ax",), **changes})
        assert run([OFFSET], own, wrong).false_alarms == [wrong]


def test_an_event_that_may_raise_nothing_explains_nothing() -> None:
    raised = alert("drift", "ax", 1200.0)
    assert run([{**OFFSET, "expect": []}], raised) == Attribution({}, {}, [raised])


@pytest.mark.parametrize("kind", ["outage", "clock", "full-disk", "power-cut", "network", "collector-outage"])
def test_trouble_of_links_clocks_and_disks_explains_no_drift(kind: str) -> None:
    drift, silent = alert("drift", "ax", 1200.0), alert("connection", "silent", 1200.0, source="collector")
    attributed = run([{"kind": kind}], drift, silent)
    assert drift in attributed.false_alarms
    assert (silent in attributed.false_alarms) == (kind == "clock")
    assert EFFECTS[kind]


@pytest.mark.parametrize(
    ("event", "missed"),
    [
        ({"kind": "outage", "lasts": "60 s"}, False),
        ({"kind": "outage", "lasts": "200 s"}, False),
        ({"kind": "outage", "lasts": "250 s"}, True),
        ({"kind": "outage", "lasts": None, "at": "10700 s"}, False),
        ({"kind": "outage", "lasts": "60 s", "expect": ["connection"]}, True),
        ({"kind": "full-disk", "lasts": "60 s"}, False),
        ({"kind": "full-disk", "lasts": "250 s"}, True),
        ({"kind": "clock", "ahead": "100 ms"}, False),
        ({"kind": "clock", "ahead": "1 h"}, True),
    ],
)
def test_an_event_that_is_over_before_its_alert_is_due_is_not_missed(event: dict[str, Any], missed: bool) -> None:
    assert run([event]).missed == ({1: ["a"]} if missed else {})


def test_an_alert_that_comes_before_it_is_due_answers_all_the_same() -> None:
    silent = alert("connection", "silent", 1195.0, source="collector")
    attributed = run([{"kind": "outage", "lasts": "200 s"}], silent)
    assert attributed.answers[1][0][1].alert == silent
    assert attributed.false_alarms == []


def test_overlapping_events_of_one_field_need_an_alert_each() -> None:
    gain = {"kind": "gain", "fields": ["ax"], "amount": 2.0, "at": "1300 s"}
    attributed = run([OFFSET, gain], alert("drift", "ax", 1350.0), alert("fault", "ax", 1320.0))
    assert attributed.missed == attributed.missed == {}
    assert {n: answers[0][1].alert.alert for n, answers in attributed.answers.items()} in (
        {1: "fault", 2: "drift"}, {1: "drift", 2: "fault"},
    )  # fmt: skip


def test_an_early_alert_answers_the_first_event_and_a_later_one_the_second() -> None:
    gain = {"kind": "gain", "fields": ["ax"], "amount": 2.0, "at": "1300 s"}
    attributed = run([OFFSET, gain], alert("drift", "ax", 1100.0), alert("fault", "ax", 1400.0))
    assert attributed.answers[1][0][1].at_s == 1100.0
    assert attributed.answers[2][0][1].alert.alert == "fault"


def test_an_open_alert_is_shared_by_the_next_event_of_its_field_and_a_cleared_one_is_not() -> None:
    gain = {"kind": "gain", "fields": ["ax"], "amount": 2.0, "at": "1300 s"}
    [(_, shared)] = run([OFFSET, gain], alert("drift", "ax", 1100.0)).answers[2]
    assert (shared.shared_with, shared.at_s) == (1, 1300.0)
    assert run([OFFSET, gain], alert("drift", "ax", 1100.0, cleared_s=1200.0)).missed == {2: ["a"]}
    [(_, again)] = run([OFFSET, gain], alert("drift", "ax", 1100.0, 1400.0)).answers[2]
    assert (again.shared_with, again.at_s) == (None, 1400.0)


def test_the_alert_of_one_field_does_not_answer_the_event_of_another() -> None:
    other = {"kind": "gain", "fields": ["ay"], "amount": 2.0}
    attributed = run([OFFSET, other], alert("drift", "ax", 1100.0), alert("drift", "joint", 1200.0))
    assert attributed.missed == {2: ["a"]}
    assert attributed.false_alarms == []


def test_a_fleet_wide_alert_needs_more_than_one_device() -> None:
    fleet_wide = alert("drift", "ax", 1200.0, device="", source="collector")
    assert run([OFFSET], fleet_wide, devices=["a", "b"]).false_alarms == []
    assert run([OFFSET], fleet_wide).false_alarms == [fleet_wide]


def test_rows_repeat_only_if_every_field_is_stuck() -> None:
    repeated = alert("fault", "rate", 1200.0)
    assert run([{"kind": "stuck", "fields": ["ax"]}], repeated).false_alarms == [repeated]
    assert run([{"kind": "stuck", "fields": ["ax", "ay", "az"]}], repeated).false_alarms == []


@pytest.mark.parametrize(
    ("outcome", "ended", "explained"),
    [
        ("refused", None, []),
        ("rolled-back", 2000.0, ["early drift", "early model"]),
        ("completed", 2000.0, ["early drift", "early model", "late drift", "late decay"]),
        ("held", None, ["early drift", "early model", "late drift", "late decay", "late model", "late result"]),
    ],
)
def test_a_rollout_explains_alerts_only_as_long_as_it_or_its_model_lasts(
    outcome: str, ended: float | None, explained: list[str]
) -> None:
    alarms = {
        "early drift": alert("drift", "output", 2100.0),
        "early model": alert("model", "runtime", 3700.0),
        "late drift": alert("drift", "score", 9000.0),
        "late decay": alert("quality", "decay", 9900.0),
        "late model": alert("model", "motion", 9000.0),
        "late result": alert("result", "late", 10_000.0),
    }
    entry = {"event": 1, "outcome": outcome, "ended": ended, "devices": [{"device": "a", "phases": []}]}
    rollout = {"kind": "rollout", "lasts": None, "plan": "plan.toml", "task": "motion"}
    attributed = run([rollout], *alarms.values(), rolled=[entry])
    assert [name for name, each in alarms.items() if each not in attributed.false_alarms] == explained


def test_a_rollout_that_was_rolled_back_lasts_until_a_device_that_was_offline_follows() -> None:
    devices = [{"device": "a", "phases": [{"phase": "cancelled", "at": 7000.0}]}, {"device": "b", "phases": []}]
    entry = {"event": 1, "outcome": "rolled-back", "ended": 2000.0, "devices": devices}
    rollout = {"kind": "rollout", "lasts": None, "plan": "plan.toml", "task": "motion"}
    late = [alert("drift", "output", 8000.0, device=device) for device in ("a", "b")]
    assert run([rollout], *late, devices=["a", "b"], rolled=[entry]).false_alarms == [late[1]]
