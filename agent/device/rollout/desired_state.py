"""What is desired of this device, by messages that an operator signed: verified, kept, and asked by the main loop.

Rules of `take`; what fails one changes nothing and is only counted:
- it came on a topic of this device: its own, of one of its groups, or of all
- one of the [operators] keys signed it for that topic; no object in it has a key twice, and no member is unknown
- its counter is above every counter that this key has used for this topic; the very message that is in force may come
  again, as a retained one does with each connection, and changes nothing
What is in force is in the store, with its signature, and is verified anew at each start. Of several topics that name a
task the most specific holds: the device's own, its groups' in the order of the config, that of all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec

from agent.clock import ClockReading
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import MessageRefused, StorageFull
from agent.transport.packets import IncomingMessage
from agent.wire import jws, topics
from agent.wire.desired_state import MAX_DESIRED_BYTES, DesiredBundle
from agent.wire.keys import PublicKey
from agent.wire.messages import DesiredPayload, verify_message

log = logging.getLogger("outstation.updates")

KIND = "desired"
_FULL_RETRY_S = 5.0


class _AcceptedMessage(msgspec.Struct, frozen=True):
    """The message in force of a topic, and the last counter of each key, by kid."""

    payload: bytes
    jws: str
    counters: dict[str, int]


class DesiredStateStore:
    """Of one device. `take` and `turn` are the uplink's, `wanted` is the main loop's."""

    refusal_name = "desired states"

    def __init__(self, store: Store, author: MessageLog, operators: Sequence[PublicKey], groups: Sequence[str]) -> None:
        named = [(author.device, None), *((topics.DEVICE_GROUP, group) for group in groups), (topics.ALL_DEVICES, None)]
        self._topics = [str(topics.Topic(author.fleet, device, KIND, group)) for device, group in named]
        self._store = store
        self._operators = {key.kid: jws.Signer("operator", key) for key in operators}
        self.on_change: Callable[[], object] = lambda: None
        self._accepted: dict[str, _AcceptedMessage] = {}
        self._bodies: dict[str, DesiredPayload] = {}
        self._pending: dict[str, tuple[_AcceptedMessage, DesiredPayload]] = {}
        self._next_try_s = float("-inf")
        for topic in self._topics:
            self._restore(topic)

    @property
    def subscriptions(self) -> list[str]:
        """Nobody can desire anything of a device without [operators] keys: it does not even listen."""
        return list(self._topics) if self._operators else []

    def owns(self, topic: str) -> bool:
        """Return True for topics of desired states, also those of other devices."""
        return topic.split("/")[3:4] == [KIND]

    def on_connected(self) -> None:
        """Do nothing: the broker sends the retained messages again."""

    def tick(self, _session: object, now: ClockReading) -> None:
        self.apply_pending(now)

    def find_desired(self, task: str) -> DesiredBundle | None:
        """What the most specific topic that names `task` says; None where none does."""
        bodies = self._bodies
        return next((bodies[topic].tasks[task] for topic in self._topics if self._has_task(bodies, topic, task)), None)

    def accept(self, delivery: IncomingMessage) -> None:
        """Verify a message; `turn` puts it into force. Raises Refused."""
        topic = delivery.topic
        if topic not in self._topics:
            raise MessageRefused("other topic", topic[:120])
        if len(delivery.payload) > MAX_DESIRED_BYTES:
            raise MessageRefused("too large", f"{len(delivery.payload)} bytes, it has at most {MAX_DESIRED_BYTES}")
        body, token, kid = self._verify(topic, delivery.payload, delivery.tokens)
        known = self._pending[topic][0] if topic in self._pending else self._accepted.get(topic)
        if known is not None and known.payload == delivery.payload and kid == jws.claimed_kid(known.jws):
            return
        counters = known.counters if known is not None else {}
        if body.counter <= counters.get(kid, 0):
            raise MessageRefused("replayed", f"counter {body.counter}, this key has used {counters[kid]} for {topic}")
        self._pending[topic] = (_AcceptedMessage(delivery.payload, token, {**counters, kid: body.counter}), body)

    def apply_pending(self, now: ClockReading) -> None:
        """Put into force what was taken: kept first. Raises StorageError."""
        if not self._pending or now.boot_s < self._next_try_s:
            return
        found = dict(self._pending)
        try:
            with self._store.transaction(vital=True) as tx:
                for topic, (kept, _) in found.items():
                    _save(tx, topic, kept)
        except StorageFull as full:
            log.warning("%s; what is desired of this device waits", full)
            self._next_try_s = now.boot_s + _FULL_RETRY_S
            return
        self._pending.clear()
        self._accepted |= {topic: kept for topic, (kept, _) in found.items()}
        # Another dictionary: the main loop may be reading the old one.
        self._bodies = {**self._bodies, **{topic: body for topic, (_, body) in found.items()}}
        self.on_change()

    def _verify(self, topic: str, payload: bytes, tokens: Sequence[str]) -> tuple[DesiredPayload, str, str]:
        message = verify_message(topic, payload, tokens, self._operators.get)
        if not isinstance(message.body, DesiredPayload):
            raise MessageRefused("other kind", topic)
        return message.body, message.jws, message.signer.key.kid

    def _restore(self, topic: str) -> None:
        found = self._store.load_state("", task_keys.DESIRED_STATE_PREFIX + topic)
        if found is None:
            return
        try:
            kept = msgspec.msgpack.decode(found, type=_AcceptedMessage)
        except msgspec.MsgspecError as damage:
            log.error(
                "what was desired on %s cannot be read (%s); it comes again with the next connection", topic, damage
            )
            return
        self._accepted[topic] = kept
        try:
            self._bodies[topic] = self._verify(topic, kept.payload, [kept.jws])[0]
        except MessageRefused as refusal:
            # As after its key was taken out of the config.
            log.warning("what was desired on %s is no longer in force: %s", topic, refusal)

    @staticmethod
    def _has_task(bodies: dict[str, DesiredPayload], topic: str, task: str) -> bool:
        return topic in bodies and task in bodies[topic].tasks


def _save(tx: Transaction, topic: str, message: _AcceptedMessage) -> None:
    tx.save_state("", task_keys.DESIRED_STATE_PREFIX + topic, msgspec.msgpack.encode(message))
