"""Outbox to broker, acknowledgements back: one thread that owns the link, connects, and comes back.

A message leaves the outbox on the collector's signed acknowledgement (or on PUBACK, with delivery = "broker"), never
because it was sent: brokers lose what they have confirmed. `session` says what goes when.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from agent import config
from agent.clock import ClockReading
from agent.device.commands.receiver import CommandReceiver
from agent.device.machine.keys import keys_message
from agent.device.rollout.desired_state import KIND, DesiredStateStore
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.device.uplink.acknowledgements import Acknowledgements
from agent.device.uplink.refusals import COMMANDS, DESIRED, Refusals
from agent.device.uplink.session import Connection, Session
from agent.errors import LinkDown, MessageRefused
from agent.transport.mqtt import Link
from agent.transport.packets import IncomingMessage
from agent.wire.keys import PublicKey

log = logging.getLogger("outstation.uplink")

# The shortest wait, the longest first wait, the longest wait.
_BACKOFF_S = (0.5, 4.0, 60.0)
# After a connection of this length, or one on which the collector answered, the broker counts as well again.
_STABLE_CONNECTION_S = 60.0
_GOODBYE_TIMEOUT_S = 1.0
# A connect may take as long as a resolver that nobody answers, and its own timeouts.
_HEARTBEAT_TIMEOUT_S = 120.0


class Uplink:
    """Sends the outbox and takes acknowledgements, for as long as it runs."""

    def __init__(
        self,
        conf: config.Config,
        store: Store,
        message_log: MessageLog,
        collector: PublicKey | None,
        now: Callable[[], ClockReading],
        on_failed: Callable[[Exception], None],
        *,
        commands: CommandReceiver | None = None,
        desired_states: DesiredStateStore | None = None,
        open_link: Callable[..., Connection] = Link,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._conf, self._store, self._message_log, self._now, self._on_failed = (
            conf,
            store,
            message_log,
            now,
            on_failed,
        )
        self._open_link = open_link
        self._refusals = Refusals(store, message_log)
        self._acks = Acknowledgements(store, message_log, collector, conf.buffer.keep_messages, self._refusals)
        self._commands, self._desired_states = commands, desired_states
        self._stopping = threading.Event()
        self._reconnecting = threading.Event()
        self._pause = pause or self._stopping.wait
        self._link: Connection | None = None
        self._has_collector_answered = False
        self._drain_until_s = 0.0
        self._alive_until_s = now().boot_s + _HEARTBEAT_TIMEOUT_S
        self.state = "not connected yet"
        self._thread = threading.Thread(target=self._main, name="uplink", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something new to send."""
        current = self._link
        if current is not None:
            current.wake()

    def reconnect(self) -> None:
        """Leave, and connect anew: with another signing key the Will is another one too."""
        self._reconnecting.set()
        self.wake()

    def is_alive(self, now: ClockReading) -> bool:
        """Whether the thread got round lately; trying to connect and waiting for the next try are signs of life."""
        return now.boot_s < self._alive_until_s

    def request_stop(self, drain_s: float) -> None:
        """Give the outbox up to `drain_s` to empty, say `stopped`, and leave; returns at once."""
        self._drain_until_s = self._now().boot_s + drain_s
        self._stopping.set()
        self.wake()

    def stop(self, drain_s: float = 2.0) -> None:
        """`halt`, and wait for it; not for a connect that hangs."""
        self.request_stop(drain_s)
        self._thread.join(drain_s + _GOODBYE_TIMEOUT_S + 1.0)

    def run(self) -> None:
        """Connect, again and again, until stopped; then once more, to say so. Raises StorageError."""
        attempt = 0
        while not self._is_drain_over():
            began = self._extend_heartbeat(0.0)
            try:
                if self._run_session():
                    return
            except LinkDown as down:
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
                self._pause(wait)

    def _is_drain_over(self) -> bool:
        return self._stopping.is_set() and self._now().boot_s >= self._drain_until_s

    def _main(self) -> None:
        try:
            self.run()
        except Exception as error:
            self._on_failed(error)

    def _run_session(self) -> bool:
        """One connection, from CONNECT until it is lost or the device stops; False where only a new one is wanted."""
        now = self._now()
        self._reconnecting.clear()
        self._has_collector_answered = False
        will = self._message_log.build_live_message("state", {"state": "offline", "boot": self._message_log.boot}, now)
        topics = [self._acks.topic, *(self._commands.subscriptions if self._commands else [])]
        topics += self._desired_states.subscriptions if self._desired_states else []
        current = self._open_link(self._conf.broker, self._message_log.device, subscribe=topics, will=will)
        self._link = current
        try:
            log.info("broker: connected to %s", self._conf.broker.url)
            self.state = "connected"
            session = self._start_session(current)
            while not (self._stopping.is_set() and self._is_drained(session)):
                self._extend_heartbeat(0.0)
                self._tick(session)
                self._has_collector_answered = session.has_collector_answered
                if self._reconnecting.is_set() and not self._stopping.is_set():
                    current.close()
                    return False
            self._announce_stopped(session)
            current.close()
            return True
        except BaseException:
            current.drop()
            raise
        finally:
            self._link = None

    def _tick(self, session: Session) -> None:
        hurry = self._stopping.is_set()
        if self._commands is not None:
            self._commands.tick(session, self._now())
        if self._desired_states is not None:
            self._desired_states.apply_pending(self._now())
        session.tick(self._now(), is_stopping=hurry)
        self._refusals.flush(self._now(), force=hurry)

    def _handle_delivery(self, delivery: IncomingMessage, now: ClockReading) -> bool:
        """Take a command, or what is desired; whether it was one."""
        desired = delivery.topic.split("/")[3:4] == [KIND]
        try:
            if self._commands is not None and delivery.topic == self._commands.topic:
                self._commands.receive(delivery)
            elif self._desired_states is not None and desired:
                self._desired_states.accept(delivery)
            else:
                return False
        except MessageRefused as refusal:
            self._refusals.add(DESIRED if desired else COMMANDS, refusal, now)
        return True

    def _start_session(self, link: Connection) -> Session:
        now = self._now()
        live = [
            keys_message(self._message_log, now),
            self._message_log.build_live_message("state", {"state": "online", "boot": self._message_log.boot}, now),
        ]
        if self._commands is not None:
            self._commands.on_connected()
        by_broker = self._conf.collector.delivery == "broker"
        what = (link, self._store, self._message_log, self._acks, now)
        return Session(*what, broker_delivery=by_broker, live=live, handle_delivery=self._handle_delivery)

    def _is_drained(self, session: Session) -> bool:
        return self._is_drain_over() or session.is_empty()

    def _announce_stopped(self, session: Session) -> None:
        now = self._now()
        session.enqueue_live(
            self._message_log.build_live_message("state", {"state": "stopped", "boot": self._message_log.boot}, now)
        )
        while not session.is_live_confirmed() and self._now().boot_s < now.boot_s + _GOODBYE_TIMEOUT_S:
            session.tick(self._now(), is_stopping=True)

    def _extend_heartbeat(self, pause_s: float) -> float:
        now = self._now().boot_s
        self._alive_until_s = now + pause_s + _HEARTBEAT_TIMEOUT_S
        return now


def backoff(attempt: int, jitter: float) -> float:
    """Seconds before the next try; `chance`, 0 to 1, spreads a fleet that lost its broker together."""
    shortest, first, longest = _BACKOFF_S
    return shortest + jitter * (min(longest, first * 2.0 ** min(attempt, 10)) - shortest)
