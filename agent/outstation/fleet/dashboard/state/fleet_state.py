"""The present state of all devices in memory, refreshed from the database where something changed.

Pages filter and sort this state, so that no request scans the database, and show the last one while it is unavailable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from outstation.fleet.database.dashboard import devices as statements
from outstation.fleet.database.dashboard import history
from outstation.fleet.database.interface import Connection
from outstation.fleet.incidents.conditions import HealthReport, silence_limit_s
from outstation.foundation import clock
from outstation.foundation.names import is_name

# Devices refreshed in one snapshot; the others follow in the next.
_MAX_CHANGED = 500
# Of one device, whatever it sends: tasks whose quality is read, and outputs of each.
MAX_QUALITY_TASKS, MAX_OUTPUTS = 32, 60
_DRIFT_ORDER = ("fault", "drift", "insufficient", "ok")


class TaskState(msgspec.Struct):
    """A task as the newest health message reports it, and its newest drift window."""

    name: str
    stream: str = ""
    row: int = 0
    windows: int = 0
    model: str = ""
    version: str = ""
    digest: str = ""
    drift: str = ""
    drift_time: str = ""
    drift_log: str = ""
    drift_seq: int = 0


class OutputQuality(msgspec.Struct, frozen=True):
    """Metrics of all labelled results of one output, "" the first one, and the digest of the bundle they are about."""

    task: str
    output: str
    digest: str
    time: str
    labels: int
    metrics: list[dict[str, Any]]


class DeviceState(msgspec.Struct):
    device: str
    state: str | None
    last_seen: str | None
    enrolled: str
    active: bool = True
    log: str = ""
    through: int = 0
    # The newest health message as it is stored: decoded, those of 1,000 devices would take some megabytes.
    payload: bytes = b""
    health_seq: int = 0
    # Messages that waited at the device then.
    backlog: int | None = None
    # How often it promises a health message.
    interval_s: float = HealthReport("").interval_s
    clock: str = ""
    clock_seq: int = 0
    tasks: list[TaskState] = []
    alerts: list[dict[str, Any]] = []
    quality: list[OutputQuality] = []
    # Log, newest message and tasks that `quality` is of.
    quality_basis: tuple[str, int, tuple[str, ...]] = ("", 0, ())

    def status(self, now_us: int) -> str:
        """Return the state for people: `revoked` and `silent` come before what the device said last."""
        if not self.active:
            return "revoked"
        if self.state is None or self.last_seen is None:
            return "enrolled"
        silence_s = (now_us - _parse_time(self.last_seen)) / 1e6
        if self.state == "online" and silence_s > silence_limit_s(self.interval_s):
            return "silent"
        return self.state

    @property
    def drift(self) -> str:
        """Return the worst state of all tasks, "" before the first drift window."""
        states = {task.drift for task in self.tasks}
        return next((state for state in _DRIFT_ORDER if state in states), "")

    @property
    def health(self) -> dict[str, Any]:
        """Return the newest health message; empty before the first."""
        return decode_object(self.payload)

    @property
    def severity(self) -> str:
        severities = {alert["severity"] for alert in self.alerts}
        return next((name for name in ("critical", "warning", "info") if name in severities), "")


class FleetState:
    """All devices. `refresh` runs in the database's thread; everything else reads the finished objects."""

    def __init__(self) -> None:
        self.devices: dict[str, DeviceState] = {}
        self.collector_alerts: list[dict[str, Any]] = []
        self.read_us = 0
        # Why the last refresh failed, "" if it succeeded.
        self.problem = ""
        self._keys_version = -1
        self._active: set[str] = set()
        self._pending: set[str] = set()

    def refresh(self, db: Connection) -> set[str]:
        """Read what changed since the last call inside a snapshot; return the devices, '' for the fleet's alerts."""
        changed = self._refresh_heads(db)
        alerts = statements.load_collector_alerts(db)
        if alerts != self.collector_alerts:
            self._pending |= {a["device"] for a in [*alerts, *self.collector_alerts] if a["device"] in self.devices}
            self.collector_alerts = alerts
            changed.add("")
        batch = sorted(self._pending & self.devices.keys())[:_MAX_CHANGED]
        self._load_details(db, batch)
        self._pending -= {*batch}
        self.read_us = clock.read().wall_us
        return changed | {*batch}

    @property
    def is_complete(self) -> bool:
        """Return True unless changed devices wait for the next refresh."""
        return not self._pending

    def forget(self) -> None:
        """Read everything again in the next refresh: the database may be another one."""
        self._keys_version = -1
        self._pending = {*self.devices}

    def _refresh_heads(self, db: Connection) -> set[str]:
        version = db.execute("SELECT value FROM meta WHERE name = 'keys_version'").fetchone()
        if version is not None and version[0] != self._keys_version:
            self._keys_version, self._active = version[0], statements.load_active(db)
        changed, known = set(), {}
        for device, state, last_seen, enrolled in statements.load_heads(db):
            if not isinstance(device, str):
                continue
            old, active = self.devices.get(device), device in self._active
            if old is None:
                old = DeviceState(device, state, last_seen, enrolled, active)
            elif (old.state, old.last_seen, old.active) == (state, last_seen, active):
                known[device] = old
                continue
            known[device] = msgspec.structs.replace(old, state=state, last_seen=last_seen, active=active)
            changed.add(device)
        changed |= self.devices.keys() - known.keys()
        self.devices = known
        self._pending |= changed & known.keys()
        return changed

    def _load_details(self, db: Connection, names: list[str]) -> None:
        newest = statements.load_newest_logs(db, names)
        logs = {name: row for name, row in zip(names, newest, strict=True) if row is not None}
        places = [(name, log) for name, (log, *_) in logs.items()]
        healths = dict(zip(logs, statements.load_newest_health(db, places), strict=True))
        clocks = dict(zip(logs, statements.load_clocks(db, places), strict=True))
        for name in names:
            device = self.devices[name]
            if name in logs:
                device = _with_log(device, logs[name], healths[name], clocks[name])
            device.alerts = [
                *statements.load_open_alerts(db, name),
                *(alert for alert in self.collector_alerts if alert["device"] == name),
            ]
            self.devices[name] = device
        self._load_quality(db, places)
        self._load_drift(db, [self.devices[name] for name in names])

    def _load_quality(self, db: Connection, logs: Sequence[tuple[str, str]]) -> None:
        newest = statements.load_newest_quality(db, logs)
        for (name, log), row in zip(logs, newest, strict=True):
            device = self.devices[name]
            (seq, *_) = row or (0,)
            basis = log, seq, tuple(task.name for task in device.tasks)
            # Labels are rare: most refreshes find nothing new.
            if basis != device.quality_basis:
                device.quality, device.quality_basis = _read_quality(db, name, log, device.tasks), basis

    def _load_drift(self, db: Connection, devices: Iterable[DeviceState]) -> None:
        tasks = [(device, task) for device in devices for task in device.tasks]
        windows = statements.load_newest_windows(db, [(task.name, device.device) for device, task in tasks])
        for (_, task), window in zip(tasks, windows, strict=True):
            if window is not None:
                task.drift, task.drift_time, task.drift_log, task.drift_seq = window


def _with_log(device: DeviceState, log: Any, health: Any, clock_row: Any) -> DeviceState:
    quality, clock_seq = clock_row or ("", 0)
    device = msgspec.structs.replace(device, log=log[0], through=log[1], clock=quality, clock_seq=clock_seq)
    if health is None or (device.health_seq == health[0] and device.payload == health[1]):
        return msgspec.structs.replace(device, tasks=[msgspec.structs.replace(task) for task in device.tasks])
    body = decode_object(health[1])
    waiting, interval_s = body.get("outbox"), body.get("interval_s", 0)
    return msgspec.structs.replace(
        device,
        payload=health[1],
        health_seq=health[0],
        backlog=waiting if type(waiting) is int else None,
        interval_s=interval_s if type(interval_s) in (int, float) and interval_s > 0 else HealthReport("").interval_s,
        tasks=_parse_tasks(body),
    )


def _parse_tasks(health: dict[str, Any]) -> list[TaskState]:
    parsed = []
    for name, task in as_object(health.get("tasks")).items():
        if not is_name(name):
            # No task has such a name, and PostgreSQL refuses some of them.
            continue
        reported = as_object(task)
        model = as_object(reported.get("model"))
        texts = [_as_text(value) for value in (reported.get("stream"), *map(model.get, ("name", "version", "digest")))]
        row, windows = (count if type(count := reported.get(key)) is int else 0 for key in ("row", "windows"))
        parsed.append(TaskState(name, texts[0], row, windows, texts[1], texts[2], texts[3]))
    return parsed


def _read_quality(db: Connection, device: str, log: str, tasks: Iterable[TaskState]) -> list[OutputQuality]:
    quality = []
    for task in [*tasks][:MAX_QUALITY_TASKS]:
        for row in history.load_quality(db, device, log, task.name, MAX_OUTPUTS):
            body = decode_object(row["body"])
            metrics = [m for m in body.get("metrics") or () if isinstance(m, dict) and not m.get("slice")]
            n = as_object(body.get("window")).get("n")
            labels = n if type(n) is int else 0
            digest = _as_text(as_object(body.get("model")).get("digest"))
            quality.append(OutputQuality(task.name, row["output"], digest, row["time"], labels, metrics))
    return quality


def as_object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else ""


def decode_object(payload: bytes | str) -> dict[str, Any]:
    """Return the JSON object in a payload; empty for anything else, such as a sealed message."""
    try:
        decoded = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return as_object(decoded)


def _parse_time(text: object) -> int:
    try:
        return clock.parse_rfc3339(str(text))
    except ValueError:
        return 0
