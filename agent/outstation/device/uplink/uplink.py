"""Uplink: the thread that sends the outbox through a sink, takes acknowledgements, and connects again when it is lost.

A message leaves the outbox on the collector's signed acknowledgement (or on the sink's receipt, with delivery =
"broker"), never because it was sent: brokers lose messages that they have confirmed.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from outstation.device import config
from outstation.device.machine.keys import keys_message
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.uplink.acknowledgements import Acknowledgements
from outstation.device.uplink.meter import CONNECTION_BYTES, TrafficMeter
from outstation.device.uplink.oversize import OversizeAlert
from outstation.device.uplink.refusals import Refusals
from outstation.device.uplink.session import LearnedLimit, Session, find_sent_early
from outstation.device.uplink.sink import OpenSink, Sink
from outstation.foundation.backoff import Backoff
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import LinkDown, MessageRefused, PacketTooLarge
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire.jws import Signer

log = logging.getLogger("outstation.uplink")

# Shortest wait, longest first wait, longest wait.
_BACKOFF_S = (0.5, 4.0, 60.0)
# A session of this length, or one in which the collector answered, resets the back-off.
_STABLE_CONNECTION_S = 60.0
_GOODBYE_TIMEOUT_S = 1.0
# For the last turn, and for the broker to close.
_CLOSE_TIMEOUT_S = 3.0
# A connect may take as long as a resolver that nobody answers, and its own timeouts.
_HEARTBEAT_TIMEOUT_S = 120.0


class Receiver(Protocol):
    """Consumer of messages that come in through the sink, such as commands; used on the uplink's thread."""

    @property
    def refusal_name(self) -> str:
        """Plural noun for the messages, under which refusals are counted."""
        ...

    @property
    def subscriptions(self) -> list[str]: ...

    def owns(self, topic: str) -> bool: ...

    def accept(self, delivery: IncomingMessage) -> None:
        """Verify and take a message. Raises MessageRefused."""
        ...

    def on_connected(self) -> None:
        """Handle a new session."""
        ...

    def tick(self, session: Session, now: ClockReading) -> None:
        """Write and send what is due. Raises StorageError."""
        ...


class Uplink:
    """Sends the outbox and takes acknowledgements for as long as it runs."""

    def __init__(
        self,
        conf: config.Config,
        store: Store,
        message_log: MessageLog,
        find_collector: Callable[[str], Signer | None],
        now: Callable[[], ClockReading],
        on_failed: Callable[[Exception], None],
        open_sink: OpenSink,
        *,
        receivers: Sequence[Receiver] = (),
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._conf, self._store, self._message_log = conf, store, message_log
        self._now, self._on_failed, self._open_sink = now, on_failed, open_sink
        self._refusals = Refusals(store, message_log)
        self._acks = Acknowledgements(store, message_log, find_collector, conf.buffer.keep_messages, self._refusals)
        self._sent_early = find_sent_early(store)
        self._oversize = OversizeAlert(store, message_log)
        metered = conf.broker.metered
        self._meter = None if metered is None else TrafficMeter(metered, store, now())
        self._learned_limit = LearnedLimit()
        self._receivers = receivers
        self._stopping = threading.Event()
        self._reconnecting = threading.Event()
        self._pause = pause or self._stopping.wait
        self._sink: Sink | None = None
        self._has_collector_answered = False
        self._drain_until_s = 0.0
        self._alive_until_s = now().boot_s + _HEARTBEAT_TIMEOUT_S
        self.state = "not connected yet"
        self._thread = threading.Thread(target=self._main, name="uplink", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Send new messages at once."""
        sink = self._sink
        if sink is not None:
            sink.wake()

    def reconnect(self) -> None:
        """Close the session and open a new one: with another signing key the last will changes too."""
        self._reconnecting.set()
        self.wake()

    def is_alive(self, now: ClockReading) -> bool:
        """Return True if the thread made progress lately; connecting and waiting for the next try count."""
        return now.boot_s < self._alive_until_s

    def request_stop(self, drain_s: float) -> None:
        """Give the outbox up to `drain_s` to empty, send `stopped`, and leave; return at once."""
        self._drain_until_s = self._now().boot_s + drain_s
        self._stopping.set()
        self.wake()

    def stop(self, drain_s: float = 2.0) -> None:
        """Stop, and wait for it; but not for a connect that hangs."""
        self.request_stop(drain_s)
        self._thread.join(drain_s + _GOODBYE_TIMEOUT_S + _CLOSE_TIMEOUT_S)

    def run(self) -> None:
        """Connect again and again until stopped, then once more to announce it. Raises StorageError."""
        for wait_s in self.turns():
            if wait_s:
                self._pause(wait_s)

    def turns(self) -> Generator[float, None, None]:
        """Do the work of `run`, and yield after each turn the seconds until the next one. Raises StorageError.

        A turn waits for what comes in as long as `receive` of the sink does.
        """
        attempt = 0
        while not self._is_drain_over():
            began = self._extend_heartbeat(0.0)
            try:
                if (yield from self._session_turns()):
                    return
            except LinkDown as down:
                if self._meter is not None and down.traffic_bytes:
                    self._meter.add_failed_connection(down.traffic_bytes, self._now())
                if self._stopping.is_set():
                    return
                ended = self._now().boot_s
                attempt = 0 if self._has_collector_answered or ended - began > _STABLE_CONNECTION_S else attempt + 1
                if str(down) != self.state:
                    log.warning("broker: %s; trying again, readings and results are kept", down)
                self.state = str(down)
                self._refusals.flush(self._now())
                wait = backoff(attempt, random.random())
                self._extend_heartbeat(wait)
                yield wait

    def _is_drain_over(self) -> bool:
        return self._stopping.is_set() and self._now().boot_s >= self._drain_until_s

    def _main(self) -> None:
        try:
            self.run()
        except Exception as error:
            self._on_failed(error)

    def _session_turns(self) -> Generator[float, None, bool]:
        """Run one session until the sink is lost or the device stops; return False to open another at once."""
        now = self._now()
        self._require_room(now, CONNECTION_BYTES)
        self._reconnecting.clear()
        self._has_collector_answered = False
        will = self._message_log.build_live_message("state", {"state": "offline", "boot": self._message_log.boot}, now)
        topics = [self._acks.topic, *(topic for receiver in self._receivers for topic in receiver.subscriptions)]
        sink = self._sink = self._open_sink(topics, will)
        session = self._start_session(sink)
        try:
            if self._meter is not None:
                self._meter.begin_connection()
            log.info("broker: connected to %s", self._conf.broker.shown_url)
            self.state = "connected"
            while not (self._stopping.is_set() and (self._is_drain_over() or session.is_empty())):
                self._extend_heartbeat(0.0)
                is_stopping = self._stopping.is_set()
                for receiver in self._receivers:
                    receiver.tick(session, self._now())
                session.tick(self._now(), is_stopping=is_stopping)
                self._refusals.flush(self._now(), force=is_stopping)
                self._has_collector_answered = session.has_collector_answered
                if not is_stopping:
                    self._require_room(self._now(), 0)
                if self._reconnecting.is_set() and not self._stopping.is_set():
                    sink.close()
                    return False
                yield 0.0
            now = self._now()
            session.enqueue_live(
                self._message_log.build_live_message("state", {"state": "stopped", "boot": self._message_log.boot}, now)
            )
            while not session.is_live_confirmed() and self._now().boot_s < now.boot_s + _GOODBYE_TIMEOUT_S:
                session.tick(self._now(), is_stopping=True)
                yield 0.0
            sink.close()
            return True
        except PacketTooLarge as refused:
            sink.drop()
            # The broker does not say which one. The largest is held back, then the next, until it takes the others.
            if largest := session.largest_in_flight():
                self._learned_limit.lower(largest, self._now().boot_s)
            raise LinkDown(f"{refused}; larger messages than {self._learned_limit.bytes} bytes are held back") from None
        except BaseException:
            sink.drop()
            raise
        finally:
            self._sink = None
            if self._meter is not None:
                self._meter.observe(sink.traffic_bytes, self._now())

    def _require_room(self, now: ClockReading, least: float) -> None:
        """Raise LinkDown if the budget of a metered connection is used up: being connected costs bytes, too."""
        if self._meter is not None and self._meter.room(now, urgent=True) <= least:
            raise LinkDown("[broker.metered] budget is used up; it has room again within 25 h")

    def _handle_delivery(self, delivery: IncomingMessage, now: ClockReading) -> bool:
        """Hand a message to its receiver; return False if no receiver owns its topic."""
        for receiver in self._receivers:
            if receiver.owns(delivery.topic):
                try:
                    receiver.accept(delivery)
                except MessageRefused as refusal:
                    self._refusals.add(receiver.refusal_name, refusal, now)
                return True
        return False

    def _start_session(self, sink: Sink) -> Session:
        now = self._now()
        live = [
            keys_message(self._message_log, now),
            self._message_log.build_live_message("state", {"state": "online", "boot": self._message_log.boot}, now),
        ]
        for receiver in self._receivers:
            receiver.on_connected()
        by_broker = self._conf.collector.delivery == "broker"
        return Session(
            *(sink, self._store, self._message_log, self._acks, now),
            oversize=self._oversize,
            sent_early=self._sent_early,
            learned_limit=self._learned_limit,
            broker_delivery=by_broker,
            meter=self._meter,
            live=live,
            handle_delivery=self._handle_delivery,
        )

    def _extend_heartbeat(self, pause_s: float) -> float:
        now = self._now().boot_s
        self._alive_until_s = now + pause_s + _HEARTBEAT_TIMEOUT_S
        return now


def backoff(attempt: int, jitter: float) -> float:
    """Return the seconds before the next try; `jitter`, 0 to 1, spreads a fleet that lost its broker together."""
    shortest, first, longest = _BACKOFF_S
    return shortest + jitter * (Backoff(first, longest).wait_s(attempt + 1) - shortest)
