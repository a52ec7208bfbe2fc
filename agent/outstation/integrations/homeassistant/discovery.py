"""Home Assistant documents of a device: its discovery document, and the retained documents that its entities read.

Pure functions of a device's state. No text of a device is part of a template or a topic; it is a name, a unit or a
value. The documents are retained apart from the log, because Home Assistant dates every value that it reads now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from outstation import __version__
from outstation.foundation import clock, decoders
from outstation.foundation.names import is_name
from outstation.foundation.text import printable
from outstation.integrations.homeassistant.device_state import (
    MAX_TEXT,
    DeviceReport,
    DeviceState,
    Result,
    TaskState,
    output_key,
    shown_alert,
)
from outstation.ml.performance.labels import MAX_LABEL
from outstation.protocol.alerts.incident import Incident

# Ours beside `outstation/<fleet>`, where every message is a device's and signed.
ROOT = "outstation-bridge"
# In place of a task: what belongs to no task.
DEVICE_DOCUMENT = "_device"
ONLINE, OFFLINE = b"online", b"offline"
RAISED, CLEARED = EVENT_TYPES = ("raised", "cleared")
# Open alerts of a device that its document names.
MAX_OPEN = 200
# Payload that the button of a task publishes.
CONFIRM = b"confirm"
_NONE_IF_MISSING = "{{{{ value_json.{} }}}}"


class Place(msgspec.Struct, frozen=True):
    """Topics of a fleet's documents and of their publisher; `prefix` and `dashboard` are those of the config.

    `takes_verdicts`: Home Assistant gets a button and a text for each task, whose presses become verdicts.
    """

    fleet: str
    publisher: str
    prefix: str
    dashboard: str = ""
    takes_verdicts: bool = False

    @property
    def birth_topic(self) -> str:
        """Topic on which Home Assistant says that it has started."""
        return f"{self.prefix}/status"

    @property
    def status_topic(self) -> str:
        """Topic on which this publisher says that it runs."""
        return f"{ROOT}/{self.fleet}/status/{self.publisher}"

    def latest_topic(self, device: str, name: str) -> str:
        return f"{ROOT}/{self.fleet}/latest/{device}/{name}"

    def event_topic(self, device: str) -> str:
        """Topic of alerts that are raised and cleared; not retained."""
        return f"{ROOT}/{self.fleet}/event/{device}"

    def config_topic(self, device: str) -> str:
        return f"{self.prefix}/device/{device_id(self.fleet, device)}/config"

    def press_topic(self, device: str, task: str) -> str:
        """Topic of the button of a task; its text is one level below."""
        return f"{ROOT}/{self.fleet}/verdict/{device}/{task}"

    @property
    def press_filters(self) -> list[str]:
        any_task = self.press_topic("+", "+")
        return [any_task, f"{any_task}/label"]

    def parse_press(self, topic: str) -> tuple[str, str, bool] | None:
        """Return (device, task, True for a text with a label) of a press; None of another topic."""
        head = f"{ROOT}/{self.fleet}/verdict/"
        levels = topic.removeprefix(head).split("/") if topic.startswith(head) else []
        if len(levels) not in (2, 3) or levels[2:] not in ([], ["label"]):
            return None
        return levels[0], levels[1], len(levels) == 3

    @property
    def all_topics(self) -> str:
        return f"{ROOT}/{self.fleet}/#"

    @property
    def retained_filters(self) -> list[str]:
        """Return filters of all that was ever published here."""
        latest = f"{ROOT}/{self.fleet}/latest/+"
        return [f"{self.prefix}/device/+/config", f"{latest}/+", f"{latest}/+/drift"]

    def parse_device(self, topic: str) -> str | None:
        """Return the device that a topic of ours belongs to; None for a topic of another program."""
        latest = f"{ROOT}/{self.fleet}/latest/"
        if topic.startswith(latest):
            return topic.removeprefix(latest).partition("/")[0]
        head, tail = f"{self.prefix}/device/", "/config"
        if not topic.startswith(head) or not topic.endswith(tail):
            return None
        try:
            fleet, device = parse_device_id(topic[len(head) : -len(tail)])
        except ValueError:
            return None
        return device if fleet == self.fleet else None


class Document(msgspec.Struct, frozen=True):
    """A retained document. `time_us`: it must not take the place of a later one; None for what is true now."""

    topic: str
    payload: bytes
    time_us: int | None = None


def latest_documents(place: Place, state: DeviceState) -> list[Document]:
    """Return the documents that the entities of a device read."""
    documents = [Document(place.latest_topic(state.device, DEVICE_DOCUMENT), _encode(_device_members(state)))]
    for name, task in state.tasks.items():
        topic = place.latest_topic(state.device, name)
        if task.result is not None:
            members = _result_members(state.device, name, task.result)
            documents.append(Document(topic, _encode(members), task.result.time_us))
        if task.drift is not None:
            documents.append(
                Document(
                    f"{topic}/drift",
                    _encode({"time": clock.to_rfc3339(task.drift.time_us), "state": task.drift.state}),
                    task.drift.time_us,
                )
            )
    return documents


def discovery_document(place: Place, state: DeviceState, former: Mapping[str, str]) -> bytes:
    """Return the device-based discovery document.

    `former`: component → platform of the document in force; Home Assistant removes a component that is listed without
    more than its platform.
    """
    components = build_components(place, state)
    removed = {name: {"p": platform} for name, platform in former.items() if name not in components}
    identifier = device_id(place.fleet, state.device)
    device = {"ids": [identifier], "name": state.device, "mf": "Outstation", "mdl": "edge agent"}
    if state.health is not None and state.health.agent:
        device["sw"] = state.health.agent
    if place.dashboard:
        device["cu"] = f"{place.dashboard.rstrip('/')}/devices/{state.device}"
    state_topic = place.latest_topic(state.device, DEVICE_DOCUMENT)
    # Home Assistant ignores a state that is neither of the two, so `stopped` becomes one of them.
    online = "{{ 'online' if value_json.state == 'online' else 'offline' }}"
    members = {
        "dev": device,
        "o": {"name": "outstation", "sw": __version__},
        "avty": [{"t": place.status_topic}, {"t": state_topic, "val_tpl": online}],
        "avty_mode": "all",
        "qos": 1,
        "cmps": components | removed,
    }
    return _encode(members)


def build_components(place: Place, state: DeviceState) -> dict[str, dict[str, Any]]:
    """Return the entities of a device by component id."""
    topic = place.latest_topic(state.device, DEVICE_DOCUMENT)
    components = _device_components(topic, state)
    components["alert"] = {
        "p": "event",
        "name": "Alert",
        "stat_t": place.event_topic(state.device),
        "ic": "mdi:bell-alert",
        "evt_typ": list(EVENT_TYPES),
    }
    for name, task in state.tasks.items():
        components |= _task_components(place.latest_topic(state.device, name), name, task)
        if place.takes_verdicts and task.result is not None and task.result.label is not None:
            components |= _verdict_components(place.press_topic(state.device, name), name)
    identifier = device_id(place.fleet, state.device)
    return {name: {**members, "unique_id": f"{identifier}_{name}"} for name, members in components.items()}


def parse_components(payload: bytes) -> dict[str, str]:
    """Return component → platform of a discovery document of ours; none of anything else."""
    try:
        return {name: members.p for name, members in decoders.from_json(payload, _Discovery).cmps.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return {}


def parse_time(payload: bytes) -> int | None:
    """Return `time` of a document of ours, epoch µs; None of anything else."""
    try:
        return clock.parse_rfc3339(decoders.from_json(payload, _Dated).time)
    except (msgspec.MsgspecError, ValueError):
        return None


def parse_open(payload: bytes) -> frozenset[str] | None:
    """Return the keys of the open alerts that a device's document names, none without one; None if it names none."""
    if not payload:
        return frozenset()
    try:
        return frozenset(decoders.from_json(payload, _Open).open)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def find_events(
    report: DeviceReport, known: frozenset[str], now_us: int, max_age_us: int
) -> list[tuple[str, Incident]]:
    """Return (event type, alert) of what was raised and cleared since the keys of `known` were open.

    Home Assistant dates an event when it reads it, so one of a backlog, older than `max_age_us`, is left out.
    """
    raised = [(RAISED, alert) for key, alert in (report.alerts or {}).items() if key not in known]
    cleared = [(CLEARED, alert) for key, alert in report.cleared.items() if key in known]
    return [event for event in (*cleared, *raised) if _is_fresh(event[1].updated, now_us, max_age_us)]


def event_document(event_type: str, alert: Incident) -> bytes:
    ended = msgspec.structs.replace(alert, summary=alert.cleared_summary or alert.summary, raised=alert.updated)
    return _encode({"event_type": event_type, **shown_alert(ended)})


def _is_fresh(time: str, now_us: int, max_age_us: int) -> bool:
    try:
        return now_us - clock.parse_rfc3339(time) <= max_age_us
    except ValueError:
        return False


class _Component(msgspec.Struct):
    p: str


class _Discovery(msgspec.Struct):
    cmps: dict[str, _Component]


class _Open(msgspec.Struct):
    open: list[str]


class _Dated(msgspec.Struct):
    time: str


def _device_components(topic: str, state: DeviceState) -> dict[str, dict[str, Any]]:
    newest = "{{ value_json.newest_alert | tojson }}"
    problem = "{{ 'ON' if value_json.alerts else 'OFF' }}"
    components: dict[str, dict[str, Any]] = {
        "alerts": _sensor("Open alerts", topic, "alerts", stat_cla="measurement", ic="mdi:alert")
        | {"json_attr_t": topic, "json_attr_tpl": newest},
        "problem": {"p": "binary_sensor", "name": "Problem", "stat_t": topic, "val_tpl": problem, "dev_cla": "problem"},
        "reported": _diagnostic("Last report", topic, "time", dev_cla="timestamp"),
        "backlog": _diagnostic("Backlog", topic, "backlog", stat_cla="measurement", unit_of_meas="messages"),
        "storage": _diagnostic("Storage used", topic, "storage_bytes", dev_cla="data_size", unit_of_meas="B"),
        "storage_hours": _diagnostic("Storage left", topic, "storage_hours", dev_cla="duration", unit_of_meas="h"),
    }
    health = state.health
    if health is not None and health.temperature is not None:
        components["temperature"] = _diagnostic(
            "Temperature", topic, "temperature", dev_cla="temperature", unit_of_meas="°C", stat_cla="measurement"
        )
    if health is not None and health.battery is not None:
        components["battery"] = _diagnostic(
            "Battery", topic, "battery", dev_cla="battery", unit_of_meas="%", stat_cla="measurement"
        )
    return components


def _task_components(topic: str, task: str, state: TaskState) -> dict[str, dict[str, Any]]:
    components: dict[str, dict[str, Any]] = {}
    result, key = state.result, encode_name(task)
    if result is not None:
        attributes = {"json_attr_t": topic}
        if result.label is not None:
            components[f"label-{key}"] = _sensor(task, topic, "label") | attributes
            if result.score is not None:
                score = {"stat_cla": "measurement", "sug_dsp_prc": 3}
                components[f"score-{key}"] = _sensor(f"{task} score", topic, "score", **score)
        elif result.value is not None:
            unit = _unit(state, 0)
            components[f"value-{key}"] = _sensor(task, topic, "value", stat_cla="measurement", **unit) | attributes
        for i, (name, value) in enumerate(result.outputs.items()):
            shown = printable(name)[:MAX_TEXT]
            path = f"outputs.{output_key(name)}"
            options: dict[str, Any] = {} if isinstance(value, str) else {"stat_cla": "measurement", **_unit(state, i)}
            components[f"{output_key(name)}-{key}"] = _sensor(f"{task} {shown}", topic, path, **options)
        components[f"time-{key}"] = _diagnostic(f"{task} time", topic, "time", dev_cla="timestamp")
    if state.drift is not None:
        options = {"dev_cla": "enum", "ops": ["ok", "drift", "fault", "insufficient"]}
        components[f"drift-{key}"] = _diagnostic(f"{task} drift", f"{topic}/drift", "state", **options)
    return components


def _verdict_components(topic: str, task: str) -> dict[str, dict[str, Any]]:
    """Return a button that confirms the newest answer of a task, and a text that corrects it."""
    key = encode_name(task)
    return {
        f"confirm-{key}": {
            "p": "button",
            "name": f"{task} is right",
            "cmd_t": topic,
            "pl_prs": CONFIRM.decode(),
            "ic": "mdi:check-bold",
            "qos": 1,
        },
        f"correct-{key}": {
            "p": "text",
            "name": f"{task} was",
            "cmd_t": f"{topic}/label",
            "min": 1,
            "max": MAX_LABEL,
            "ic": "mdi:pencil",
            "qos": 1,
        },
    }


def _unit(state: TaskState, position: int) -> dict[str, str]:
    unit = state.units[position] if position < len(state.units) else ""
    return {"unit_of_meas": unit} if unit else {}


def _sensor(name: str, topic: str, path: str, **members: Any) -> dict[str, Any]:
    return {"p": "sensor", "name": name, "stat_t": topic, "val_tpl": _NONE_IF_MISSING.format(path), **members}


def _diagnostic(name: str, topic: str, path: str, **members: Any) -> dict[str, Any]:
    return _sensor(name, topic, path, **members) | {"ent_cat": "diagnostic"}


def _device_members(state: DeviceState) -> dict[str, Any]:
    health = state.health
    return {
        "device": state.device,
        "state": state.connection or "offline",
        "time": None if health is None else health.time,
        "backlog": None if health is None else health.backlog,
        "storage_bytes": None if health is None else health.storage_bytes,
        "storage_hours": None if health is None else health.storage_hours,
        "temperature": None if health is None else health.temperature,
        "battery": None if health is None else health.battery,
        "alerts": len(state.alerts),
        "newest_alert": shown_alert([*state.alerts.values()][-1]) if state.alerts else {},
        # For which an event was published.
        "open": [*state.alerts] if len(state.alerts) <= MAX_OPEN else None,
    }


def _result_members(device: str, task: str, result: Result) -> dict[str, Any]:
    return {
        "device": device,
        "task": task,
        "time": clock.to_rfc3339(result.time_us),
        "label": result.label,
        "row": result.row,
        "score": result.score,
        "value": result.value,
        "outputs": {output_key(name): value for name, value in result.outputs.items()},
        "model": result.model,
        "version": result.version,
        "faults": result.faults,
    }


def _encode(members: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(members)


_DOT, _AT = "DOT", "_AT_"
_OWNER = "outstation_"


def encode_name(name: str) -> str:
    """Return the identifier of one name."""
    return name.replace(".", _DOT)


def decode_name(identifier: str) -> str:
    """Return the name of an identifier. Raises ValueError if it stands for none."""
    name = identifier.replace(_DOT, ".")
    if "." in identifier or not is_name(name):
        raise ValueError(f"{identifier[:80]!r} stands for no name")
    return name


def device_id(fleet: str, device: str) -> str:
    """Return the identifier of a device among those of all fleets and all other makers."""
    return f"{_OWNER}{encode_name(device)}{_AT}{encode_name(fleet)}"


def parse_device_id(identifier: str) -> tuple[str, str]:
    """Return (fleet, device). Raises ValueError for an identifier of another program."""
    device, at, fleet = identifier.removeprefix(_OWNER).partition(_AT)
    if not identifier.startswith(_OWNER) or not at:
        raise ValueError(f"{identifier[:80]!r} is no device of ours")
    return decode_name(fleet), decode_name(device)
