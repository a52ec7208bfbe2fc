"""Present state of one device, collected from its verified messages.

A message is taken as it is: one whose measured members have other types than expected adds nothing. Everything is
bounded: 64 tasks of a device, 16 further outputs of a task, 255 characters of a text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from outstation.foundation import clock
from outstation.foundation.errors import MessageRefused
from outstation.foundation.names import is_name
from outstation.foundation.text import printable
from outstation.protocol.alerts.incident import Incident
from outstation.protocol.wire.messages import DriftPayload, ResultsPayload
from outstation.protocol.wire.verification import decode

MAX_TASKS, MAX_OUTPUTS = 64, 16
# Home Assistant refuses a longer state.
MAX_TEXT = 255
_MAX_SUMMARY, _MAX_UNIT = 500, 32
# A result that is later than this is of a device whose clock is wrong.
CLOCK_TOLERANCE_US = 300_000_000


class DeviceReport(msgspec.Struct, frozen=True):
    """News of one device: its connection, the newest payload of each topic that has one, oldest first, and its alerts.

    `alerts`: all open ones by a key that changes with each raise, oldest first; None if they are unchanged. `cleared`:
    alerts that were open at the last report.
    """

    device: str
    connection: str
    payloads: Sequence[bytes] = ()
    alerts: dict[str, Incident] | None = None
    cleared: dict[str, Incident] = {}


class DeviceSource(Protocol):
    """Source of verified messages; used by one thread."""

    def poll(self) -> list[DeviceReport]:
        """Return what changed since the last call; everything on the first. Raises StorageError."""
        ...

    @property
    def devices(self) -> frozenset[str]:
        """All devices that are let in, as of the last `poll`."""
        ...

    def close(self) -> None: ...


class Result(msgspec.Struct, frozen=True):
    """Newest result of a task. `outputs`: further values by name, then texts; `faults`: fields with a sensor fault."""

    row: int
    time_us: int
    label: str | None
    score: float | None
    value: float | None
    outputs: Mapping[str, float | str | None]
    model: str
    version: str
    faults: Sequence[str]


class Drift(msgspec.Struct, frozen=True):
    """Newest drift window of a task."""

    time_us: int
    state: str


class TaskState(msgspec.Struct):
    result: Result | None = None
    drift: Drift | None = None
    units: Sequence[str] = ()


class Health(msgspec.Struct, frozen=True):
    """Newest health message; a number that it lacks is None."""

    time: str
    agent: str = ""
    backlog: float | None = None
    storage_bytes: float | None = None
    storage_hours: float | None = None
    temperature: float | None = None
    battery: float | None = None


class DeviceState:
    """State of one device; `update` it with each report, in order."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.connection = ""
        self.tasks: dict[str, TaskState] = {}
        self.health: Health | None = None
        self.alerts: dict[str, Incident] = {}

    def update(self, report: DeviceReport) -> None:
        self.connection = report.connection
        for payload in report.payloads:
            self._add_message(payload)
        if report.alerts is not None:
            self.alerts = report.alerts

    def _add_message(self, payload: bytes) -> None:
        try:
            body = decode(payload)
        except MessageRefused:
            return
        if isinstance(body, ResultsPayload):
            if (result := newest_result(body, payload)) is not None and (task := self._task(body.task)) is not None:
                task.result = result
        elif isinstance(body, DriftPayload):
            if (task := self._task(body.task)) is not None:
                task.drift = Drift(clock.parse_rfc3339(body.window.to), body.state)
        elif body.__struct_config__.tag == "health":
            self._add_health(payload)

    def _add_health(self, payload: bytes) -> None:
        members = msgspec.json.decode(payload)
        store, throttle = _object(members, "store"), _object(members, "throttle")
        self.health = Health(
            members["time"],
            _text(members.get("agent"), 64),
            _number(members.get("outbox")),
            _number(store.get("bytes")),
            _number(store.get("hours")),
            _number(throttle.get("temperature")),
            _number(throttle.get("battery")),
        )
        if listed := [name for name in _object(members, "tasks") if is_name(name)]:
            self.tasks = {name: task for name, task in self.tasks.items() if name in listed}
        units = _object(members, "units")
        for name in listed:
            texts = units.get(name)
            if (task := self._task(name)) is not None and isinstance(texts, list):
                task.units = [_text(text, _MAX_UNIT) for text in texts[:MAX_OUTPUTS]]

    def _task(self, name: str) -> TaskState | None:
        """Return the state of a task, a new one while there is room."""
        if name not in self.tasks and len(self.tasks) < MAX_TASKS:
            self.tasks[name] = TaskState()
        return self.tasks.get(name)


def newest_result(body: ResultsPayload, payload: bytes) -> Result | None:
    """Return the last result that a message lists; None if it lists none."""
    columns = body.columns
    if not len(columns):
        return None
    labels = columns.expand_labels()
    return Result(
        int(columns.expand_rows()[-1]),
        columns.expand_times()[-1],
        None if labels is None else _text(labels[-1], MAX_TEXT),
        None if columns.score is None else columns.score[-1],
        None if columns.value is None else columns.value[-1],
        _last_outputs(payload) if b'"value_' in payload or b'"label_' in payload else {},
        _text(body.model.name, MAX_TEXT),
        _text(body.model.version, MAX_TEXT),
        [_text(name, MAX_TEXT) for name in body.faults],
    )


def output_key(name: str) -> str:
    """Return a key for an output that is safe in a template, whatever its name."""
    return "k" + hashlib.sha256(name.encode(errors="replace")).hexdigest()[:12]


def shown_alert(alert: Incident) -> dict[str, str | None]:
    """Return the members of an open alert for people."""
    return {
        "severity": alert.severity,
        "summary": _text(alert.summary, _MAX_SUMMARY),
        "time": alert.raised,
        "task": alert.task,
    }


def _last_outputs(payload: bytes) -> dict[str, float | str | None]:
    """Return the last value of each column value_NAME, and the last text of each column label_NAME, by NAME."""
    columns = msgspec.json.decode(payload)["columns"]
    filled = {name: column for name, column in columns.items() if isinstance(column, list) and column}
    names = [name for name in filled if name.startswith("value_")][:MAX_OUTPUTS]
    outputs: dict[str, float | str | None] = {name.removeprefix("value_"): _number(filled[name][-1]) for name in names}
    for name in [name for name in filled if name.startswith("label_")][: MAX_OUTPUTS - len(outputs)]:
        last, output = filled[name][-1], name.removeprefix("label_")
        # Text of an output that has a value, too, has the name of its column.
        text = last[0] if isinstance(last, list) and last else last
        outputs[name if output in outputs else output] = _text(text, MAX_TEXT)
    return outputs


def _object(members: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = members.get(name)
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _text(value: Any, limit: int) -> str:
    """Return a text on one line that steers nothing, of at most `limit` characters."""
    return printable(value[:limit])[:limit] if isinstance(value, str) else ""
