"""Documents for Home Assistant: golden files, hostile texts, and which result may take the place of another."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from outstation.integrations.homeassistant.device_state import MAX_TASKS, DeviceReport, DeviceState
from outstation.integrations.homeassistant.discovery import (
    Place,
    discovery_document,
    latest_documents,
    parse_components,
    parse_open,
    parse_time,
)
from outstation.integrations.homeassistant.publisher import may_replace
from outstation.integrations.sparkplug import sparkplug
from outstation.integrations.sparkplug.sparkplug_payload import STRING
from outstation.protocol.alerts.incident import Incident
from outstation.workbench.testing.messages import TIME, MessageSender

GOLDEN = Path(__file__).parent / "golden"
PLACE = Place("acme", "collector", "homeassistant", "https://fleet.example.org/")
HEALTH = {
    "agent": "0.1.0",
    "outbox": 3,
    "store": {"bytes": 4096, "max": 1000000, "hours": 71.5},
    "throttle": {"temperature": 48.2},
    "tasks": {"exercise": {"row": 300}, "pump.wear": {"row": 10}},
    "units": {"pump.wear": ["mm/s"]},
}
ALERT = Incident(
    status="raised",
    severity="warning",
    device="pi.01",
    task="exercise",
    alert="drift",
    subject="ax",
    summary="exercise: ax drifts.",
    raised=TIME,
    updated=TIME,
    id="exercise/ax/drift/1",
    seq=1,
    raised_seq=1,
)


def state_of(device: str = "pi.01", **health: Any) -> DeviceState:
    """Return the state of a device with a classifier and a regression, a drift window and an open alert."""
    sender = MessageSender(device)
    columns = {"row": [10], "t": [1_764_022_680_000_000], "value": [1.25], "value_left": [0.5], "value_{{ 1 }}": [2.5]}
    messages = [
        sender.results(2),
        sender.drift("drift"),
        sender.append(
            *("results",), task="pump.wear", model={"name": "wear", "version": "2", "digest": "sha256:cd"}, stream="s",
            rows=[1, 10], n=1, input="", columns=columns, faults=["ax"],
        ),
        sender.append("health", **{**HEALTH, **health}),
    ]  # fmt: skip
    state = DeviceState(device)
    state.update(DeviceReport(device, "online", [message.payload for message in messages], {"": ALERT}))
    return state


def compare_with_golden(name: str, document: Any) -> None:
    path, text = GOLDEN / name, json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_the_discovery_document_is_the_golden_one() -> None:
    compare_with_golden("discovery.json", json.loads(discovery_document(PLACE, state_of(), {})))


def test_the_retained_documents_are_the_golden_ones() -> None:
    documents = latest_documents(PLACE, state_of())
    compare_with_golden("latest.json", {each.topic: json.loads(each.payload) for each in documents})
    assert [parse_time(each.payload) for each in documents if each.time_us is not None] == [
        each.time_us for each in documents if each.time_us is not None
    ]


def test_a_new_device_has_a_document_before_its_first_result() -> None:
    state = DeviceState("pi-02")
    state.update(DeviceReport("pi-02", "stopped"))
    assert parse_components(discovery_document(PLACE, state, {})).keys() == {
        *("alert", "alerts", "problem", "reported", "backlog", "storage", "storage_hours"),
    }
    [document] = latest_documents(PLACE, state)
    assert json.loads(document.payload)["state"] == "stopped"


def test_a_task_that_is_removed_is_named_once_so_that_home_assistant_removes_it() -> None:
    former = parse_components(discovery_document(PLACE, state_of(), {}))
    state = state_of()
    health = MessageSender("pi.01").append("health", tasks={"exercise": {}})
    state.update(DeviceReport("pi.01", "online", [health.payload]))
    members = json.loads(discovery_document(PLACE, state, former))
    removed = {name: component for name, component in members["cmps"].items() if "unique_id" not in component}
    assert all(component == {"p": "sensor"} for component in removed.values())
    assert "value-pumpDOTwear" in removed
    assert "label-exercise" not in removed


def test_no_text_of_a_device_is_part_of_a_template_or_a_topic() -> None:
    evil = "{{ states('sensor.secret') }}\x1b[31m\u202e"
    state = state_of(agent=evil, units={"pump.wear": [evil]}, tasks={"exercise": {}, "pump.wear": {}, evil: {}})
    state.update(
        DeviceReport("pi.01", "online", [], {"": msgspec.structs.replace(ALERT, summary=evil * 100, task=None)})
    )
    components = json.loads(discovery_document(PLACE, state, {}))["cmps"]
    for component in components.values():
        for name in ("val_tpl", "stat_t", "json_attr_t", "json_attr_tpl", "unique_id"):
            assert "secret" not in component.get(name, "")
            assert "{{ 1 }}" not in component.get(name, "")
    shown = json.loads(latest_documents(PLACE, state)[0].payload)["newest_alert"]["summary"]
    assert shown.isprintable()
    assert len(shown) <= 500
    assert all(len(each.payload) < 3000 for each in latest_documents(PLACE, state))


@pytest.mark.parametrize(
    "members",
    [
        {"outbox": "many", "store": [], "throttle": 3, "tasks": {"A B": {}}},
        {"outbox": None, "store": {"bytes": True, "hours": "∞"}, "units": {"exercise": "bar"}},
        {"units": ["bar"], "agent": {"x": 1}},
    ],
)
def test_health_of_other_types_adds_nothing(members: dict[str, Any]) -> None:
    state = DeviceState("pi-01")
    state.update(DeviceReport("pi-01", "online", [MessageSender("pi-01").append("health", **members).payload]))
    assert state.health is not None
    assert (state.health.backlog, state.health.storage_bytes) == (None, None)
    assert not state.tasks
    json.loads(discovery_document(PLACE, state, {}))


def test_a_device_with_very_many_tasks_gets_entities_for_some() -> None:
    state = state_of(tasks={f"task-{i}": {} for i in range(5000)})
    assert len(state.tasks) == MAX_TASKS


@pytest.mark.parametrize(
    ("time_s", "there_s", "expected"),
    [
        (990, None, True),
        (990, 980, True),
        (990, 990, True),
        (980, 990, False),
        (300, None, False),
        # A device whose clock was ahead does not hold its place.
        (990, 5000, True),
        (5000, 990, True),
    ],
)
def test_a_backlog_never_takes_the_place_of_what_is_newer_or_looks_new(
    time_s: int, there_s: int | None, expected: bool
) -> None:
    there_us = None if there_s is None else there_s * 1_000_000
    assert may_replace(time_s * 1_000_000, there_us, 1_000_000_000, 600_000_000) is expected


UNREADABLE = b'{"time":"\xff","cmps":{"x":{"p":"\xff"}},"open":["\xff"]}'


@pytest.mark.parametrize(
    "payload", [b"", b"{}", b"[]", b'{"time":3}', b'{"time":"yesterday"}', b"\xff", b'{"cmps":[1]}', UNREADABLE]
)
def test_a_retained_document_of_somebody_else_counts_as_none(payload: bytes) -> None:
    assert parse_time(payload) is None
    assert parse_components(payload) == {}


def test_open_alerts_of_an_unreadable_document_are_not_known() -> None:
    assert parse_open(UNREADABLE) is None


@pytest.mark.parametrize(
    ("topic", "device"),
    [
        ("homeassistant/device/outstation_piDOT01_AT_acme/config", "pi.01"),
        ("homeassistant/device/outstation_piDOT01_AT_other/config", None),
        ("homeassistant/device/zigbee/config", None),
        ("homeassistant/sensor/outstation_pi_AT_acme/config", None),
        ("outstation-bridge/acme/latest/pi.01/exercise/drift", "pi.01"),
        ("outstation-bridge/other/latest/pi.01/exercise", None),
        ("outstation-bridge/acme/status/collector", None),
    ],
)
def test_a_topic_leads_to_its_device(topic: str, device: str | None) -> None:
    assert PLACE.parse_device(topic) == device
    assert PLACE.parse_device(PLACE.config_topic("a.b_c-d")) == "a.b_c-d"


def test_an_output_that_names_classes_is_a_text_without_statistics() -> None:
    sender = MessageSender("pi-07")
    columns = {
        "row": [10, 20], "t": [1_764_022_680_000_000, 1_764_022_690_000_000], "value": [1.25, 1.5],
        "value_wear": [0.5, 0.75], "label_flags": [["hot|wet", 2]], "label_wear": ["normal", "anomaly"],
    }  # fmt: skip
    state = DeviceState("pi-07")
    state.update(DeviceReport("pi-07", "online", [sender.results(2, columns=columns).payload]))
    result = state.tasks["exercise"].result
    assert result is not None
    assert result.outputs == {"wear": 0.75, "flags": "hot|wet", "label_wear": "anomaly"}
    components = json.loads(discovery_document(PLACE, state, {}))["cmps"].values()
    by_name = {component["name"]: component for component in components if "name" in component}
    assert by_name["exercise wear"]["stat_cla"] == "measurement"
    assert "stat_cla" not in by_name["exercise flags"]
    [text] = [m for m in sparkplug._task_metrics("exercise", state.tasks["exercise"]) if m.name.endswith("/flags")]
    assert (text.datatype, text.value) == (STRING, "hot|wet")
