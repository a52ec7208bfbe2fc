"""Where commands come in and answers go out: the uplink's thread verifies, the main loop obeys.

Rules of `take`; what fails one was not sent by an operator to be obeyed now, and is only counted:
- it is not retained: a command is for now, and a retained one would come again with each connection
- it came on this device's `cmd` topic, and one of the [operators] keys signed it for that topic and this device
- its counter is above every counter that this key has used
The rest is decided where it is obeyed (see `control`): there each is claimed, done or refused, and answered, once.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from agent.clock import Now
from agent.device.store.command_log import Answer, CommandBook
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.errors import Refused, StorageFull
from agent.transport.packets import Delivery, Outgoing
from agent.wire import jws, topics
from agent.wire.commands import MAX_COMMAND_BYTES
from agent.wire.keys import PublicKey
from agent.wire.messages import Cmd, open_message

log = logging.getLogger("outstation.commands")

_MOST_WAITING = 16
_MOST_POSTED = 32
_MAX_CORRELATION = 256
_FULL_RETRY_S = 5.0


class Order(msgspec.Struct, frozen=True):
    """A command that an operator signed, and what its answer must carry."""

    cmd: Cmd
    kid: str
    correlation: bytes | None


class Speaker(Protocol):
    """What this uses of a Session."""

    def say(self, message: Outgoing) -> None: ...
    def said(self) -> bool: ...


class Commands:
    """Between the two threads: orders one way, answers the other."""

    def __init__(self, store: Store, author: Author, operators: Sequence[PublicKey]) -> None:
        self.topic = str(topics.Topic(author.fleet, author.device, "cmd"))
        self.orders: queue.Queue[Order] = queue.Queue(_MOST_WAITING)
        self.arrived: Callable[[], object] = lambda: None
        self._store, self._author = store, author
        self._operators = {key.kid: jws.Signer("operator", key) for key in operators}
        # Read only: on a full disk a transaction that is not vital would not begin.
        self._last = store.ask(lambda db: CommandBook(db).counters())
        self._posted: deque[Outgoing] = deque(maxlen=_MOST_POSTED)
        self._fresh = threading.Event()
        self._handed = self._marked = 0
        self._try_at = float("-inf")

    @property
    def subscriptions(self) -> list[str]:
        """Nobody can command a device without [operators] keys: it does not even listen."""
        return [self.topic] if self._operators else []

    # --- on the uplink's thread ---

    def take(self, delivery: Delivery) -> None:
        """Hand a command to the main loop. Raises Refused."""
        if delivery.retained:
            raise Refused("retained", "a command is for now; somebody left this one on the broker")
        if delivery.topic != self.topic:
            raise Refused("other topic", delivery.topic[:120])
        if len(delivery.payload) > MAX_COMMAND_BYTES:
            raise Refused("too large", f"{len(delivery.payload)} bytes, a command has at most {MAX_COMMAND_BYTES}")
        if delivery.correlation is not None and len(delivery.correlation) > _MAX_CORRELATION:
            raise Refused("too large", f"correlation data of {len(delivery.correlation)} bytes")
        message = open_message(delivery.topic, delivery.payload, delivery.tokens, self._operators.get)
        cmd, kid = message.body, message.signer.key.kid
        if not isinstance(cmd, Cmd):
            raise Refused("other kind", delivery.topic)
        if cmd.counter <= self._last.get(kid, 0):
            raise Refused("replayed", f"counter {cmd.counter}, this key has used {self._last[kid]}")
        try:
            self.orders.put_nowait(Order(cmd, kid, delivery.correlation))
        except queue.Full:
            raise Refused("busy", f"{_MOST_WAITING} commands wait already; send it again") from None
        self._last[kid] = cmd.counter
        self.arrived()

    def begin(self) -> None:
        """A new connection: what the last one did not get confirmed goes again."""
        self._handed = self._marked
        self._fresh.set()

    def turn(self, session: Speaker, now: Now) -> None:
        """Say what there is to say, and note what the broker has. Raises StorageError."""
        while self._posted:
            session.say(self._posted.popleft())
        if now.boot_s < self._try_at:
            return
        try:
            if self._handed > self._marked and session.said():
                with self._store.transaction(vital=True) as tx:
                    tx.commands.mark_sent(self._handed)
                self._marked = self._handed
            if self._fresh.is_set():
                self._fresh.clear()
                self._hand_over(session, now)
        except StorageFull as full:
            log.warning("%s; answers to commands wait", full)
            self._fresh.set()
            self._try_at = now.boot_s + _FULL_RETRY_S

    def idle(self) -> bool:
        """Whether the broker has all answers."""
        return not self._fresh.is_set() and self._handed == self._marked and not self._posted

    def _hand_over(self, session: Speaker, now: Now) -> None:
        answers = self._store.ask(lambda db: CommandBook(db).unsent(self._handed))
        for answer in answers:
            session.say(self._author.live("reply", answer.body(), now, retain=False, correlation=answer.correlation))
            self._handed = answer.number
            self._fresh.set()

    # --- on the main loop ---

    def answered(self) -> None:
        """There is an answer in the book."""
        self._fresh.set()

    def post(self, message: Outgoing) -> None:
        """Say this on the connection there is, or the next."""
        self._posted.append(message)

    def post_answer(self, answer: Answer, now: Now) -> None:
        """An answer for which there was no room in the book."""
        self.post(self._author.live("reply", answer.body(), now, retain=False, correlation=answer.correlation))
