"""Desired state of this device: signed messages of operators, verified, stored, and read by the main loop.

Rules of `accept`; a message that breaks one changes nothing and is only counted:
- it arrived on a topic of this device: its own, that of one of its groups, or that of all devices
- a trusted key of an operator or deployer signed it for that topic; no JSON object has a key twice, and no member is
  unknown
- its counter is above every counter that this key has used for this topic, and not in the future. The message in force
  may arrive again, as a retained one does with each connection, and changes nothing
The message in force is stored with its signature and verified again at each start. If several topics name a task, the
most specific one applies: the device's own, then its groups' in the order of the config, then that of all devices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec

from outstation.device.machine.trusted_keys import TrustedKeys
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation import decoders
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import MessageRefused, StorageFull
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire import jws, topics
from outstation.protocol.wire.desired_state import DESIRED_STATE_ROLES, MAX_DESIRED_BYTES, DesiredBundle
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.messages import DesiredPayload
from outstation.protocol.wire.verification import verify_message

log = logging.getLogger("outstation.updates")

KIND = "desired"
_FULL_RETRY_S = 5.0


class _AcceptedMessage(msgspec.Struct, frozen=True):
    """The message in force of a topic, and the last counter of each key, by kid."""

    payload: bytes
    jws: str
    counters: dict[str, int]


class DesiredStateStore:
    """Desired state of one device. The uplink calls `accept` and `tick`, the main loop `find_desired`."""

    refusal_name = "desired states"

    def __init__(self, store: Store, message_log: MessageLog, trusted: TrustedKeys, groups: Sequence[str]) -> None:
        own = [(message_log.device, None)]
        addresses = [*own, *((topics.DEVICE_GROUP, group) for group in groups), (topics.ALL_DEVICES, None)]
        self._topics = [str(topics.Topic(message_log.fleet, device, KIND, group)) for device, group in addresses]
        self._store = store
        self._trusted = trusted
        self.on_change: Callable[[], object] = lambda: None
        self._accepted: dict[str, _AcceptedMessage] = {}
        self._bodies: dict[str, DesiredPayload] = {}
        self._pending: dict[str, tuple[_AcceptedMessage, DesiredPayload]] = {}
        self._next_try_s = float("-inf")
        for topic in self._topics:
            self._restore(topic)

    @property
    def subscriptions(self) -> list[str]:
        """Topics to subscribe to; none if no message could be accepted."""
        return list(self._topics) if self._trusted.may_be_commanded else []

    def owns(self, topic: str) -> bool:
        """Return True for topics of desired states, also those of other devices."""
        return topic.split("/")[3:4] == [KIND]

    def on_connected(self) -> None:
        """Do nothing: the broker sends the retained messages again."""

    def tick(self, _session: object, now: ClockReading) -> None:
        self.apply_pending(now)

    def find_desired(self, task: str) -> DesiredBundle | None:
        """Return the desired bundle from the most specific topic that names `task`."""
        bodies = self._bodies
        return next(
            (bodies[topic].tasks[task] for topic in self._topics if topic in bodies and task in bodies[topic].tasks),
            None,
        )

    def accept(self, delivery: IncomingMessage) -> None:
        """Verify a message; `apply_pending` puts it into force. Raises MessageRefused."""
        topic = delivery.topic
        if topic not in self._topics:
            raise MessageRefused("other topic", topic[:120])
        if len(delivery.payload) > MAX_DESIRED_BYTES:
            raise MessageRefused("too large", f"{len(delivery.payload)} bytes, the limit is {MAX_DESIRED_BYTES}")
        body, token, kid = self._verify(topic, delivery.payload, delivery.tokens)
        known = self._pending[topic][0] if topic in self._pending else self._accepted.get(topic)
        if known is not None and known.payload == delivery.payload and kid == jws.claimed_kid(known.jws):
            return
        counters = known.counters if known is not None else {}
        self._trusted.check_counter(body.counter, self._trusted.valid_counter(kid, counters.get(kid, 0)))
        self._pending[topic] = (_AcceptedMessage(delivery.payload, token, {**counters, kid: body.counter}), body)

    def apply_pending(self, now: ClockReading) -> None:
        """Store accepted messages, then put them into force. Raises StorageError."""
        if not self._pending or now.boot_s < self._next_try_s:
            return
        pending = dict(self._pending)
        try:
            with self._store.transaction(vital=True) as tx:
                for topic, (message, _) in pending.items():
                    tx.save_state("", task_keys.DESIRED_STATE_PREFIX + topic, msgspec.msgpack.encode(message))
        except StorageFull as full:
            log.warning("%s; the desired state of this device waits", full)
            self._next_try_s = now.boot_s + _FULL_RETRY_S
            return
        self._pending.clear()
        self._accepted |= {topic: message for topic, (message, _) in pending.items()}
        # A new dictionary: the main loop may be reading the old one.
        self._bodies = {**self._bodies, **{topic: body for topic, (_, body) in pending.items()}}
        self.on_change()

    def verify_again(self) -> None:
        """Drop the messages in force whose key is no longer trusted, and take back those whose key is."""
        bodies = {}
        for topic, message in self._accepted.items():
            if (body := self._verify_accepted(topic, message)) is not None:
                bodies[topic] = body
        self._bodies = bodies
        self.on_change()

    def _find_signer(self, kid: str) -> Signer | None:
        signer = self._trusted.find_commander(kid)
        if signer is not None and signer.owner not in DESIRED_STATE_ROLES:
            raise MessageRefused("other role", f"kid {kid} is a {signer.owner}; operators and deployers sign this")
        return signer

    def _verify(self, topic: str, payload: bytes, tokens: Sequence[str]) -> tuple[DesiredPayload, str, str]:
        message = verify_message(topic, payload, tokens, self._find_signer)
        if not isinstance(message.body, DesiredPayload):
            raise MessageRefused("other kind", topic)
        return message.body, message.jws, message.signer.key.kid

    def _restore(self, topic: str) -> None:
        saved = self._store.load_state("", task_keys.DESIRED_STATE_PREFIX + topic)
        if saved is None:
            return
        try:
            message = decoders.from_msgpack(saved, _AcceptedMessage)
        except msgspec.MsgspecError as damage:
            log.error(
                "the stored desired state of %s cannot be read (%s); it comes again when connected", topic, damage
            )
            return
        self._accepted[topic] = message
        if (body := self._verify_accepted(topic, message)) is not None:
            self._bodies[topic] = body

    def _verify_accepted(self, topic: str, message: _AcceptedMessage) -> DesiredPayload | None:
        try:
            return self._verify(topic, message.payload, [message.jws])[0]
        except MessageRefused as refusal:
            # As after its key was revoked.
            log.warning("the desired state of %s is no longer in force: %s", topic, refusal)
            return None
