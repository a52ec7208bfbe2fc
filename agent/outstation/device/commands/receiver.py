"""Command receiver: the uplink's thread verifies commands and sends the answers; the main loop executes in between.

Rules of `accept`. A message that fails one was not sent by an operator for execution now, and is only counted:
- It is not retained: a retained command would come again with each connection.
- It came on this device's `cmd` topic, and a trusted key signed it for that topic and this device.
- Its counter is above every counter that this key has used, and not in the future (see `TrustedKeys`).
The executor decides the rest: it claims each command, executes or refuses it, and answers once.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
from msgspec.structs import replace

from outstation.device.machine.trusted_keys import TrustedKeys
from outstation.device.store.command_log import CommandAnswer, CommandLog
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import MessageRefused, StorageFull
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.wire import topics
from outstation.protocol.wire.commands import MAX_COMMAND_BYTES
from outstation.protocol.wire.messages import CommandPayload
from outstation.protocol.wire.verification import verify_message

log = logging.getLogger("outstation.commands")

_MAX_QUEUED = 16
_MAX_POSTED = 32
_MAX_CORRELATION = 256
_FULL_RETRY_S = 5.0


class ReceivedCommand(msgspec.Struct, frozen=True):
    """A verified command, and the correlation data that its answer carries."""

    cmd: CommandPayload
    kid: str
    correlation: bytes | None


class LiveSession(Protocol):
    """Methods of the uplink's session that the receiver uses."""

    def enqueue_live(self, message: OutgoingMessage) -> None: ...
    def is_live_confirmed(self) -> bool: ...


class CommandReceiver:
    """Passes commands from the uplink's thread to the main loop, and answers back."""

    refusal_name = "commands"

    def __init__(self, store: Store, message_log: MessageLog, trusted: TrustedKeys) -> None:
        self.topic = str(topics.Topic(message_log.fleet, message_log.device, "cmd"))
        self.received: queue.Queue[ReceivedCommand] = queue.Queue(_MAX_QUEUED)
        self.on_received: Callable[[], object] = lambda: None
        self._store, self._message_log = store, message_log
        self.trusted = trusted
        # By a query: on a full disk, a transaction that is not vital would not begin.
        self._last_counters = store.query(lambda db: CommandLog(db).counters())
        self._posted: deque[OutgoingMessage] = deque(maxlen=_MAX_POSTED)
        self._has_unsent = threading.Event()
        self._sent_through = self._confirmed_through = 0
        self._retry_after_s = float("-inf")

    @property
    def subscriptions(self) -> list[str]:
        """The command topic; nothing if nobody can command the device."""
        return [self.topic] if self.trusted.may_be_commanded else []

    # --- on the uplink's thread ---

    def owns(self, topic: str) -> bool:
        return topic == self.topic

    def accept(self, delivery: IncomingMessage) -> None:
        """Verify a command and hand it to the main loop. Raises MessageRefused."""
        if delivery.retained:
            raise MessageRefused("retained", "the broker stored this command; commands must not be retained")
        if delivery.topic != self.topic:
            raise MessageRefused("other topic", delivery.topic[:120])
        if len(delivery.payload) > MAX_COMMAND_BYTES:
            raise MessageRefused("too large", f"{len(delivery.payload)} bytes; the limit is {MAX_COMMAND_BYTES}")
        if delivery.correlation is not None and len(delivery.correlation) > _MAX_CORRELATION:
            raise MessageRefused("too large", f"correlation data of {len(delivery.correlation)} bytes")
        message = verify_message(delivery.topic, delivery.payload, delivery.tokens, self.trusted.find_commander)
        cmd, kid = message.body, message.signer.key.kid
        if not isinstance(cmd, CommandPayload):
            raise MessageRefused("other kind", delivery.topic)
        self.trusted.check_counter(cmd.counter, self._valid_counter(kid))
        try:
            self.received.put_nowait(ReceivedCommand(cmd, kid, delivery.correlation))
        except queue.Full:
            raise MessageRefused("busy", f"{_MAX_QUEUED} commands wait already; send it again") from None
        self._last_counters[kid] = cmd.counter
        self.on_received()

    def _valid_counter(self, kid: str) -> int:
        """Return this key's last counter, which is stored anew if the root's word replaces it."""
        last = self._last_counters.get(kid, 0)
        valid = self.trusted.valid_counter(kid, last)
        if valid != last:
            try:
                with self._store.transaction(vital=True) as tx:
                    tx.commands.replace_counter(kid, valid)
            except StorageFull as full:
                raise MessageRefused("busy", str(full)) from None
            self._last_counters[kid] = valid
        return valid

    def on_connected(self) -> None:
        """Send answers again that the last session did not get confirmed."""
        self._sent_through = self._confirmed_through
        self._has_unsent.set()

    def tick(self, session: LiveSession, now: ClockReading) -> None:
        """Send live messages and answers, and record the answers that the broker has confirmed. Raises StorageError."""
        while self._posted:
            session.enqueue_live(self._posted.popleft())
        if now.boot_s < self._retry_after_s:
            return
        try:
            if self._sent_through > self._confirmed_through and session.is_live_confirmed():
                with self._store.transaction(vital=True) as tx:
                    tx.commands.mark_sent(self._sent_through)
                self._confirmed_through = self._sent_through
            if self._has_unsent.is_set():
                self._has_unsent.clear()
                answers = self._store.query(lambda db: CommandLog(db).unsent(self._sent_through))
                for answer in answers:
                    session.enqueue_live(self._build_reply(answer, now))
                    self._sent_through = answer.number
                    self._has_unsent.set()
        except StorageFull as full:
            log.warning("%s; answers to commands are sent once there is room", full)
            self._has_unsent.set()
            self._retry_after_s = now.boot_s + _FULL_RETRY_S

    def is_idle(self) -> bool:
        """Return True if the broker has all answers."""
        return not self._has_unsent.is_set() and self._sent_through == self._confirmed_through and not self._posted

    # --- on the main loop ---

    def notify_answer(self) -> None:
        """Send the answers that were added to the command log."""
        self._has_unsent.set()

    def post(self, message: OutgoingMessage) -> None:
        """Send a live message in this session, or in the next."""
        self._posted.append(message)

    def post_answer(self, answer: CommandAnswer, now: ClockReading) -> None:
        """Send an answer that the store had no room for."""
        self.post(self._build_reply(answer, now))

    def _build_reply(self, answer: CommandAnswer, now: ClockReading) -> OutgoingMessage:
        message = self._message_log.build_live_message("reply", answer.to_body(), now)
        return replace(message, correlation=answer.correlation, reader=answer.reply_key)
