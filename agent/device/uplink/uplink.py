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
from agent.clock import Now
from agent.device.commands.key_rotation import keys_message
from agent.device.commands.receiver import Commands
from agent.device.rollout.desired_state import KIND, Desires
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.uplink.acknowledgements import Acknowledgements
from agent.device.uplink.refusals import COMMANDS, DESIRED, Refusals
from agent.device.uplink.session import Connection, Session
from agent.errors import LinkDown, Refused
from agent.transport.mqtt import Link
from agent.transport.packets import Delivery
from agent.wire.keys import PublicKey

log = logging.getLogger("outstation.uplink")

# The shortest wait, the longest first wait, the longest wait.
_BACKOFF_S = (0.5, 4.0, 60.0)
# After a connection of this length, or one on which the collector answered, the broker counts as well again.
_STEADY_S = 60.0
_SAY_S = 1.0
# A connect may take as long as a resolver that nobody answers, and its own timeouts.
_SIGN_OF_LIFE_S = 120.0


class Uplink:
    """Sends the outbox and takes acknowledgements, for as long as it runs."""

    def __init__(
        self,
        conf: config.Config,
        store: Store,
        author: Author,
        collector: PublicKey | None,
        now: Callable[[], Now],
        failed: Callable[[Exception], None],
        *,
        commands: Commands | None = None,
        desires: Desires | None = None,
        open_link: Callable[..., Connection] = Link,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._conf, self._store, self._author, self._now, self._failed = conf, store, author, now, failed
        self._open_link = open_link
        self._refusals = Refusals(store, author)
        self._acks = Acknowledgements(store, author, collector, conf.buffer.keep_messages, self._refusals)
        self._commands, self._desires = commands, desires
        self._stopping = threading.Event()
        self._renewing = threading.Event()
        self._pause = pause or self._stopping.wait
        self._link: Connection | None = None
        self._answered = False
        self._drain_until_s = 0.0
        self._alive_until_s = now().boot_s + _SIGN_OF_LIFE_S
        self.state = "not connected yet"
        self._thread = threading.Thread(target=self._main, name="uplink", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something new to send."""
        current = self._link
        if current is not None:
            current.wake()

    def renew(self) -> None:
        """Leave, and connect anew: with another signing key the Will is another one too."""
        self._renewing.set()
        self.wake()

    def alive(self, now: Now) -> bool:
        """Whether the thread got round lately; trying to connect and waiting for the next try are signs of life."""
        return now.boot_s < self._alive_until_s

    def halt(self, drain_s: float) -> None:
        """Give the outbox up to `drain_s` to empty, say `stopped`, and leave; returns at once."""
        self._drain_until_s = self._now().boot_s + drain_s
        self._stopping.set()
        self.wake()

    def stop(self, drain_s: float = 2.0) -> None:
        """`halt`, and wait for it; not for a connect that hangs."""
        self.halt(drain_s)
        self._thread.join(drain_s + _SAY_S + 1.0)

    def run(self) -> None:
        """Connect, again and again, until stopped; then once more, to say so. Raises StorageError."""
        attempt = 0
        while not self._over():
            began = self._live_for(0.0)
            try:
                if self._session():
                    return
            except LinkDown as down:
                if self._stopping.is_set():
                    return
                ended = self._now().boot_s
                attempt = 0 if self._answered or ended - began > _STEADY_S else attempt + 1
                if str(down) != self.state:
                    log.warning("broker: %s; trying again, readings and results are kept", down)
                self.state = str(down)
                self._refusals.flush(self._now())
                wait = backoff(attempt, random.random())
                self._live_for(wait)
                self._pause(wait)

    def _over(self) -> bool:
        return self._stopping.is_set() and self._now().boot_s >= self._drain_until_s

    def _main(self) -> None:
        try:
            self.run()
        except Exception as error:
            self._failed(error)

    def _session(self) -> bool:
        """One connection, from CONNECT until it is lost or the device stops; False where only a new one is wanted."""
        now = self._now()
        self._renewing.clear()
        self._answered = False
        will = self._author.live("state", {"state": "offline", "boot": self._author.boot}, now)
        topics = [self._acks.topic, *(self._commands.subscriptions if self._commands else [])]
        topics += self._desires.subscriptions if self._desires else []
        current = self._open_link(self._conf.broker, self._author.device, subscribe=topics, will=will)
        self._link = current
        try:
            log.info("broker: connected to %s", self._conf.broker.url)
            self.state = "connected"
            session = self._begin(current)
            while not (self._stopping.is_set() and self._drained(session)):
                self._live_for(0.0)
                self._turn(session)
                self._answered = session.answered
                if self._renewing.is_set() and not self._stopping.is_set():
                    current.close()
                    return False
            self._take_leave(session)
            current.close()
            return True
        except BaseException:
            current.drop()
            raise
        finally:
            self._link = None

    def _turn(self, session: Session) -> None:
        hurry = self._stopping.is_set()
        if self._commands is not None:
            self._commands.turn(session, self._now())
        if self._desires is not None:
            self._desires.turn(self._now())
        session.turn(self._now(), hurry=hurry)
        self._refusals.flush(self._now(), at_once=hurry)

    def _is_order(self, delivery: Delivery, now: Now) -> bool:
        """Take a command, or what is desired; whether it was one."""
        desired = delivery.topic.split("/")[3:4] == [KIND]
        try:
            if self._commands is not None and delivery.topic == self._commands.topic:
                self._commands.take(delivery)
            elif self._desires is not None and desired:
                self._desires.take(delivery)
            else:
                return False
        except Refused as refusal:
            self._refusals.add(DESIRED if desired else COMMANDS, refusal, now)
        return True

    def _begin(self, current: Connection) -> Session:
        now = self._now()
        live = [
            keys_message(self._author, now),
            self._author.live("state", {"state": "online", "boot": self._author.boot}, now),
        ]
        if self._commands is not None:
            self._commands.begin()
        by_broker = self._conf.collector.delivery == "broker"
        what = (current, self._store, self._author, self._acks, now)
        return Session(*what, by_broker=by_broker, live=live, take=self._is_order)

    def _drained(self, session: Session) -> bool:
        return self._over() or session.empty()

    def _take_leave(self, session: Session) -> None:
        now = self._now()
        session.say(self._author.live("state", {"state": "stopped", "boot": self._author.boot}, now))
        while not session.said() and self._now().boot_s < now.boot_s + _SAY_S:
            session.turn(self._now(), hurry=True)

    def _live_for(self, rest_s: float) -> float:
        now = self._now().boot_s
        self._alive_until_s = now + rest_s + _SIGN_OF_LIFE_S
        return now


def backoff(attempt: int, chance: float) -> float:
    """Seconds before the next try; `chance`, 0 to 1, spreads a fleet that lost its broker together."""
    shortest, first, longest = _BACKOFF_S
    return shortest + chance * (min(longest, first * 2.0 ** min(attempt, 10)) - shortest)
