"""Sparkplug B 3.0: an edge node whose devices are those of the fleet.

A device's birth lists every metric that it has; a new metric makes a new birth. Data that arrive late are marked as
historical, with their own time. Messages have QoS 0, as the specification demands: what a host misses stays in the
database of the collector.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from outstation.foundation import clock
from outstation.foundation.errors import LinkDown, MessageRefused
from outstation.foundation.text import printable
from outstation.integrations.homeassistant.device_state import (
    MAX_TEXT,
    DeviceReport,
    DeviceSource,
    DeviceState,
    TaskState,
)
from outstation.integrations.homeassistant.thread import BridgeThread
from outstation.integrations.sparkplug.sparkplug_payload import (
    BOOLEAN,
    DOUBLE,
    INT64,
    REBIRTH,
    STRING,
    Metric,
    encode,
    wants_rebirth,
)
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage, PublishReceipt
from outstation.protocol.wire.messages import ResultsPayload
from outstation.protocol.wire.verification import decode

logger = logging.getLogger("outstation.bridge")

POLL_INTERVAL_S = 2.0
NAMESPACE = "spBv1.0"
_CONTENT_TYPE = "application/octet-stream"
_SEQUENCE = 256
# Newest results that are taken from one message; and most metrics of one payload.
_MAX_HISTORY, _MAX_METRICS = 1000, 500
_MAX_IN_FLIGHT = 50
_SEND_TIMEOUT_S = 60.0


class Node(msgspec.Struct, frozen=True):
    """Ids of an edge node."""

    group: str
    node: str

    def topic(self, kind: str, device: str | None = None) -> str:
        base = f"{NAMESPACE}/{self.group}/{kind}/{self.node}"
        return base if device is None else f"{base}/{device}"


def build_publisher(
    node: Node,
    broker: BrokerConfig,
    client_id: str,
    open_source: Callable[[], DeviceSource],
    *,
    max_age_s: float,
    is_active: Callable[[], bool] = lambda: True,
    poll_interval_s: float = POLL_INTERVAL_S,
) -> BridgeThread:
    """Return the thread that is the edge node. `open_source` is called on it, and reports every message."""
    # A host pairs the death of a session with its birth by this number, so that it differs from one to the next.
    births = iter(range(int(time.time()), 2**62))

    # What was read stays so over connections: a backlog that arrived meanwhile is sent after the next birth.
    reusable: list[Fleet] = []

    def run_session(thread: BridgeThread) -> None:
        birth_number = next(births) % _SEQUENCE
        death = encode([_birth_number(birth_number)], _now_ms(), None)
        will = OutgoingMessage(node.topic("NDEATH"), death, content_type=_CONTENT_TYPE)
        with thread.connect(Link(broker, client_id, subscribe=[node.topic("NCMD")], will=will)) as link:
            fleet = reusable.pop() if reusable else Fleet(open_source())
            try:
                session = Session(node, link, fleet, birth_number, int(max_age_s * 1e6))
                session.bear_node()
                logger.info("sparkplug: connected to %s", broker.shown_url)
                while thread.is_wanted:
                    session.tick(poll_interval_s)
                session.publish_death(death)
            except LinkDown:
                reusable.append(fleet)
                raise
            finally:
                if not reusable:
                    fleet.source.close()

    return BridgeThread("sparkplug", run_session, is_active)


class Fleet:
    """A source, and the state of each device that it has reported."""

    def __init__(self, source: DeviceSource) -> None:
        self.source = source
        self.states: dict[str, DeviceState] = {}


class Session:
    """One connection of the edge node: its sequence number, and the devices that are born in it."""

    def __init__(self, node: Node, link: Link, fleet: Fleet, birth_number: int, max_age_us: int) -> None:
        self._node, self._link, self._source, self._states = node, link, fleet.source, fleet.states
        self._birth_number, self._max_age_us = birth_number, max_age_us
        self._seq = 0
        # Device → metrics as last sent; only of devices that are born.
        self._born: dict[str, dict[str, Metric]] = {}
        self._in_flight: set[int] = set()
        self._next_poll_s = 0.0

    def bear_node(self) -> None:
        """Send the birth of the node, and those of its devices."""
        self._seq = 0
        now = _now_ms()
        self._publish("NBIRTH", None, [_birth_number(self._birth_number), Metric(REBIRTH, BOOLEAN, False, now)])
        for state in self._states.values():
            if state.connection == "online":
                self._bear_device(state)

    def publish_death(self, death: bytes) -> None:
        """Say that the node ends: a host does not get the Will of a connection that is closed in order."""
        topic = self._node.topic("NDEATH")
        self._link.send(OutgoingMessage(topic, death, content_type=_CONTENT_TYPE))

    def tick(self, timeout_s: float) -> None:
        """Publish news of the devices when they are due, and wait up to `timeout_s` for commands. Raises LinkDown."""
        now_s = time.monotonic()
        if now_s >= self._next_poll_s:
            self._next_poll_s = now_s + timeout_s
            for report in self._source.poll():
                self._publish_news(report)
            for device in [device for device in self._states if device not in self._source.devices]:
                del self._states[device]
                self._bury_device(device)
        self._receive(max(0.0, self._next_poll_s - time.monotonic()))

    def _publish_news(self, report: DeviceReport) -> None:
        is_first = report.device not in self._states
        state = self._states.setdefault(report.device, DeviceState(report.device))
        state.update(report)
        # What was there before this collector published is in the database only.
        history = [] if is_first else [*self._list_history(state, report.payloads)]
        present = {metric.name: metric for metric in list_metrics(state)}
        sent = self._born.get(report.device)
        if sent is None and report.connection != "online" and not history:
            return
        if sent is None or present.keys() - sent.keys():
            self._bear_device(state)
            sent = present
        changed = [metric for name, metric in present.items() if metric != sent.get(name)]
        metrics = [*history, *map(self._mark_late, changed)]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._publish("DDATA", report.device, metrics[start : start + _MAX_METRICS])
        self._born[report.device] = present
        if report.connection != "online":
            self._bury_device(report.device)

    def _list_history(self, state: DeviceState, payloads: Sequence[bytes]) -> Iterator[Metric]:
        """Return the results before the newest one, in order."""
        for payload in payloads:
            try:
                body = decode(payload)
            except MessageRefused:
                continue
            if isinstance(body, ResultsPayload) and (task := state.tasks.get(body.task)) is not None:
                newest_us = None if task.result is None else task.result.time_us
                yield from list_history(body, task, newest_us)

    def _mark_late(self, metric: Metric) -> Metric:
        is_late = _now_ms() - metric.time_ms > self._max_age_us // 1000
        return msgspec.structs.replace(metric, is_historical=is_late)

    def _bear_device(self, state: DeviceState) -> None:
        metrics = list_metrics(state)
        self._born[state.device] = {metric.name: metric for metric in metrics}
        self._publish("DBIRTH", state.device, metrics)

    def _bury_device(self, device: str) -> None:
        if self._born.pop(device, None) is not None:
            self._publish("DDEATH", device, ())

    def _publish(self, kind: str, device: str | None, metrics: Iterable[Metric]) -> None:
        """Send one message with the next sequence number; wait while the broker reads slowly. Raises LinkDown."""
        payload = encode(metrics, _now_ms(), self._seq)
        self._seq = (self._seq + 1) % _SEQUENCE
        topic = self._node.topic(kind, device)
        self._in_flight.add(self._link.send(OutgoingMessage(topic, payload, content_type=_CONTENT_TYPE, qos=0)))
        deadline = time.monotonic() + _SEND_TIMEOUT_S
        while len(self._in_flight) > _MAX_IN_FLIGHT:
            if time.monotonic() > deadline:
                raise LinkDown(f"the broker took nothing for {_SEND_TIMEOUT_S:.0f} s")
            # Commands are taken by `tick`: a birth here would come between the messages of another.
            self._next_poll_s = min(self._next_poll_s, time.monotonic() + 1.0)
            for event in self._link.receive(1.0):
                if isinstance(event, PublishReceipt):
                    self._in_flight.discard(event.token)

    def _receive(self, timeout_s: float) -> None:
        has_command = False
        for event in self._link.receive(timeout_s):
            if isinstance(event, IncomingMessage):
                self._link.acknowledge(event)
                has_command |= wants_rebirth(event.payload)
            else:
                self._in_flight.discard(event.token)
        if has_command:
            logger.info("sparkplug: a host asks for all births")
            self.bear_node()


def list_metrics(state: DeviceState) -> list[Metric]:
    """Return every metric of a device with its present value."""
    now, health = _now_ms(), state.health
    metrics = []
    for name, task in state.tasks.items():
        metrics += _task_metrics(name, task)
    last = [*state.alerts.values()][-1] if state.alerts else None
    newest = None if last is None else printable(last.summary)[:500]
    at = 0 if last is None else clock.parse_rfc3339(last.raised) // 1000
    metrics.append(Metric("Alerts/Open", INT64, len(state.alerts), at or _health_ms(state) or now))
    metrics.append(Metric("Alerts/Newest", STRING, newest, at or _health_ms(state) or now))
    if health is not None:
        numbers = {
            "Backlog": (health.backlog, ""),
            "Storage Used": (health.storage_bytes, "B"),
            "Storage Left": (health.storage_hours, "h"),
            "Temperature": (health.temperature, "°C"),
            "Battery": (health.battery, "%"),
        }
        metrics += [
            Metric(f"Health/{name}", DOUBLE, value, _health_ms(state), unit=unit)
            for name, (value, unit) in numbers.items()
        ]
    return metrics


def list_history(body: ResultsPayload, task: TaskState, newest_us: int | None) -> Iterator[Metric]:
    """Return the results of a message but the newest of its task, as historical metrics."""
    columns = body.columns
    times, labels = columns.expand_times(), columns.expand_labels()
    for i in range(max(0, len(times) - _MAX_HISTORY), len(times)):
        if newest_us is not None and i == len(times) - 1 and times[i] == newest_us:
            continue
        at = max(times[i] // 1000, 0)
        if labels is not None:
            yield Metric(f"{body.task}/Label", STRING, printable(labels[i][:MAX_TEXT])[:MAX_TEXT], at, True)
        if columns.score is not None:
            yield Metric(f"{body.task}/Score", DOUBLE, columns.score[i], at, True)
        if columns.value is not None:
            yield Metric(f"{body.task}/Value", DOUBLE, columns.value[i], at, True, _unit(task))


def _task_metrics(name: str, task: TaskState) -> list[Metric]:
    metrics = []
    if (result := task.result) is not None:
        at = max(result.time_us // 1000, 0)
        if result.label is not None:
            metrics.append(Metric(f"{name}/Label", STRING, result.label, at))
        if result.score is not None:
            metrics.append(Metric(f"{name}/Score", DOUBLE, result.score, at))
        if result.value is not None:
            metrics.append(Metric(f"{name}/Value", DOUBLE, result.value, at, unit=_unit(task)))
        for output, value in result.outputs.items():
            kind = STRING if isinstance(value, str) else DOUBLE
            metrics.append(Metric(f"{name}/Outputs/{printable(output)[:100]}", kind, value, at))
    if task.drift is not None:
        metrics.append(Metric(f"{name}/Drift", STRING, task.drift.state, max(task.drift.time_us // 1000, 0)))
    return metrics


def _unit(task: TaskState) -> str:
    return task.units[0] if task.units else ""


def _health_ms(state: DeviceState) -> int:
    return 0 if state.health is None else max(clock.parse_rfc3339(state.health.time) // 1000, 0)


def _birth_number(number: int) -> Metric:
    return Metric("bdSeq", INT64, number, _now_ms())


def _now_ms() -> int:
    return clock.read().wall_us // 1000
