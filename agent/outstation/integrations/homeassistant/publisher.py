"""Publisher of the Home Assistant documents: what one connection sends.

It reads what changed from a source, and keeps nothing for a broker that is slow or gone: of each topic only the newest
document waits. So neither the collector's ingest nor a device's daemon ever waits for Home Assistant's broker.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable

from msgspec.structs import replace

from outstation.foundation import clock
from outstation.foundation.errors import LinkDown
from outstation.foundation.text import printable
from outstation.integrations.homeassistant.device_state import (
    CLOCK_TOLERANCE_US,
    DeviceReport,
    DeviceSource,
    DeviceState,
    Result,
)
from outstation.integrations.homeassistant.discovery import (
    DEVICE_DOCUMENT,
    OFFLINE,
    ONLINE,
    Document,
    Place,
    discovery_document,
    event_document,
    find_events,
    latest_documents,
    parse_components,
    parse_open,
    parse_time,
)
from outstation.integrations.homeassistant.presses import PressReader, VerdictSink
from outstation.integrations.homeassistant.thread import BridgeThread
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage, PublishReceipt

logger = logging.getLogger("outstation.bridge")

POLL_INTERVAL_S = 2.0
# The broker sends what it retains at once; after such a pause nothing more comes.
_QUIET_S, _MAX_WAIT_RETAINED_S = 0.5, 30.0
_RECEIPT_TIMEOUT_S = 60.0
_MAX_IN_FLIGHT = 20
# That wait for a broker which is slow; the oldest are left out.
_MAX_EVENTS = 1000
# Retained documents of a fleet of thousands of devices; a broker that retains more is not listened to any further.
_MAX_RETAINED = 200_000
_WARNING_INTERVAL_S = 600.0


def build_publisher(
    place: Place,
    broker: BrokerConfig,
    client_id: str,
    open_source: Callable[[], DeviceSource],
    *,
    max_age_s: float,
    cleans_up: bool,
    is_active: Callable[[], bool] = lambda: True,
    poll_interval_s: float = POLL_INTERVAL_S,
    store_verdict: VerdictSink | None = None,
) -> BridgeThread:
    """Return the thread that publishes the documents. `open_source` is called on it.

    `cleans_up`: remove devices of the fleet that the source does not have. `is_active`: publish only while it is true.
    `store_verdict` stores verdicts from there; None if Home Assistant may give none.
    """
    place = replace(place, takes_verdicts=store_verdict is not None)
    subscribed = [place.birth_topic, *(place.press_filters if store_verdict is not None else [])]

    def run_session(thread: BridgeThread) -> None:
        with contextlib.closing(open_source()) as source:
            will = OutgoingMessage(place.status_topic, OFFLINE, retain=True)
            with thread.connect(Link(broker, client_id, subscribe=subscribed, will=will)) as link:
                presses = None if store_verdict is None else PressReader(place, store_verdict)
                session = Session(place, link, source, int(max_age_s * 1e6), cleans_up=cleans_up, presses=presses)
                session.load_retained()
                logger.info("homeassistant: connected to %s", broker.shown_url)
                while thread.is_wanted:
                    session.tick(poll_interval_s)
                session.announce_end()

    return BridgeThread("homeassistant", run_session, is_active)


class Session:
    """One connection: what the broker retains, what waits, and what is under way."""

    def __init__(
        self,
        place: Place,
        link: Link,
        source: DeviceSource,
        max_age_us: int,
        *,
        cleans_up: bool,
        presses: PressReader | None = None,
    ) -> None:
        self._place, self._link, self._source, self._presses = place, link, source, presses
        self._max_age_us, self._cleans_up = max_age_us, cleans_up
        self._states: dict[str, DeviceState] = {}
        # Topic → payload that the broker has, or was sent.
        self._published: dict[str, bytes] = {}
        self._waiting: dict[str, bytes] = {}
        # Token → topic.
        self._in_flight: dict[int, str] = {}
        # Each is published once, behind the documents that say so: a connection that is lost repeats none.
        self._events: deque[OutgoingMessage] = deque(maxlen=_MAX_EVENTS)
        self._last_receipt_s = time.monotonic()
        self._next_poll_s = 0.0
        self._next_warning_s = 0.0

    def load_retained(self) -> None:
        """Read what the broker retains of this place: to remove what is over, and never to publish what is older."""
        self._link.request_retained(self._place.retained_filters)
        end_s, quiet_until_s = time.monotonic() + _MAX_WAIT_RETAINED_S, 0.0
        while time.monotonic() < end_s and len(self._published) < _MAX_RETAINED:
            # A slow network brings nothing for a while; the broker may send more than its window afterwards.
            if not (is_pending := self._link.is_request_pending) and time.monotonic() >= quiet_until_s:
                break
            events = self._link.receive(_QUIET_S)
            if is_pending or events:
                quiet_until_s = time.monotonic() + _QUIET_S
            for event in events:
                if isinstance(event, IncomingMessage):
                    self._link.acknowledge(event)
                    if self._place.parse_device(event.topic) is not None and event.payload:
                        self._published[event.topic] = event.payload
        self._enqueue(self._place.status_topic, ONLINE)

    def tick(self, timeout_s: float) -> None:
        """Read news from the source when they are due, send, and receive for up to `timeout_s`. Raises LinkDown."""
        now_s = time.monotonic()
        if now_s >= self._next_poll_s:
            self._next_poll_s = now_s + timeout_s
            self._take_news()
        self._send()
        wait_s = max(0.0, self._next_poll_s - time.monotonic())
        for event in self._link.receive(wait_s):
            self._handle(event)
        if self._in_flight and time.monotonic() - self._last_receipt_s > _RECEIPT_TIMEOUT_S:
            raise LinkDown(f"the broker confirmed nothing for {_RECEIPT_TIMEOUT_S:.0f} s")

    def announce_end(self) -> None:
        """Publish that this publisher is offline, before the link is closed. On a lost one the Will does it."""
        self._waiting = {self._place.status_topic: OFFLINE}
        self._in_flight.clear()
        self._send()

    def _take_news(self) -> None:
        for report in self._source.poll():
            self._add_events(report)
            state = self._states.setdefault(report.device, DeviceState(report.device))
            before = {name: task.result for name, task in state.tasks.items()} if self._presses else {}
            state.update(report)
            if self._presses is not None:
                for name, task in state.tasks.items():
                    self._presses.observe(state.device, name, before.get(name), task.result)
            for document in latest_documents(self._place, state):
                self._offer(document)
            self._announce(state)
        devices = self._source.devices
        for device in [device for device in self._states if device not in devices]:
            del self._states[device]
            if self._presses is not None:
                self._presses.forget(device)
        if self._cleans_up:
            self._remove_others(devices)

    def _add_events(self, report: DeviceReport) -> None:
        if (state := self._states.get(report.device)) is not None:
            known: frozenset[str] | None = frozenset(state.alerts)
        else:
            known = parse_open(self._published.get(self._place.latest_topic(report.device, DEVICE_DOCUMENT), b""))
        if known is None:
            return
        events = find_events(report, known, clock.read().wall_us, self._max_age_us)
        event_topic = self._place.event_topic(report.device)
        self._events.extend(OutgoingMessage(event_topic, event_document(*event)) for event in events)

    def _announce(self, state: DeviceState) -> None:
        topic = self._place.config_topic(state.device)
        former = parse_components(self._waiting.get(topic) or self._published.get(topic, b""))
        self._enqueue(topic, discovery_document(self._place, state, former))

    def _remove_others(self, devices: frozenset[str]) -> None:
        """Delete the retained documents of devices that are revoked or removed."""
        for topic in [*self._published, *self._waiting]:
            device = self._place.parse_device(topic)
            if device is not None and device not in devices:
                self._enqueue(topic, b"")

    def _offer(self, document: Document) -> None:
        """Publish a document, unless it is too old or older than the one there."""
        if document.time_us is not None:
            now_us = clock.read().wall_us
            there = parse_time(self._waiting.get(document.topic) or self._published.get(document.topic, b""))
            if not may_replace(document.time_us, there, now_us, self._max_age_us):
                return
        self._enqueue(document.topic, document.payload)

    def _enqueue(self, topic: str, payload: bytes) -> None:
        if self._published.get(topic, b"") == payload:
            self._waiting.pop(topic, None)
        else:
            self._waiting[topic] = payload

    def _send(self) -> None:
        window = min(self._link.window, _MAX_IN_FLIGHT)
        while self._waiting and len(self._in_flight) < window:
            topic = next(iter(self._waiting))
            payload = self._waiting.pop(topic)
            if len(payload) + len(topic) + 100 > self._link.max_packet:
                self._warn(f"the broker takes no message of {len(payload)} bytes on {topic}")
                continue
            if not self._in_flight:
                self._last_receipt_s = time.monotonic()
            self._in_flight[self._link.send(OutgoingMessage(topic, payload, retain=True))] = topic
            if payload:
                self._published[topic] = payload
            else:
                self._published.pop(topic, None)
        while self._events and not self._waiting and len(self._in_flight) < window:
            event = self._events.popleft()
            if not self._in_flight:
                self._last_receipt_s = time.monotonic()
            self._in_flight[self._link.send(event)] = event.topic

    def _handle(self, event: IncomingMessage | PublishReceipt) -> None:
        if isinstance(event, IncomingMessage):
            self._link.acknowledge(event)
            if event.topic == self._place.birth_topic and event.payload == ONLINE:
                self._publish_again()
            elif self._presses is not None and (outcome := self._presses.read(event, self._find_shown)):
                logger.info("homeassistant: %s", printable(outcome))
            return
        self._last_receipt_s = time.monotonic()
        topic = self._in_flight.pop(event.token, "")
        if not event.is_accepted:
            self._warn(f"the broker refused {topic}: {event.reason}; see its access rules")
        self._send()

    def _find_shown(self, device: str, task: str) -> Result | None:
        """Return the result that the broker retains of a task; None of one that was not published."""
        state = self._states.get(device)
        result = None if state is None or task not in state.tasks else state.tasks[task].result
        shown = parse_time(self._published.get(self._place.latest_topic(device, task), b""))
        return result if result is not None and result.time_us == shown else None

    def _publish_again(self) -> None:
        """Publish all documents again: Home Assistant has restarted and may have lost its entities."""
        logger.info("homeassistant: it has started; sending all documents again")
        own = {*self._states}
        again = {topic: payload for topic, payload in self._published.items() if self._belongs(topic, own)}
        self._waiting = again | self._waiting
        self._send()

    def _belongs(self, topic: str, devices: set[str]) -> bool:
        return topic == self._place.status_topic or self._place.parse_device(topic) in devices

    def _warn(self, problem: str) -> None:
        if time.monotonic() >= self._next_warning_s:
            self._next_warning_s = time.monotonic() + _WARNING_INTERVAL_S
            logger.warning("homeassistant: %s", problem)


def may_replace(time_us: int, there_us: int | None, now_us: int, max_age_us: int) -> bool:
    """Return True if a document of `time_us` may take the place of the one there.

    One from the future is of a device whose clock was wrong, and does not hold its place.
    """
    if now_us - time_us > max_age_us:
        return False
    return there_us is None or there_us > now_us + CLOCK_TOLERANCE_US or time_us >= there_us
