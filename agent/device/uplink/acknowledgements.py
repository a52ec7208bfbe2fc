"""Signed acknowledgements: verified, gathered, and applied in one transaction for many.

Rules of `take`; what fails one is counted and changes nothing:
- it came on this device's `ack` topic, and the collector's key signed it for that topic (see `agent.wire.messages`)
- it names this log
One that passes but tells of messages that this store never wrote shows that the store went back in time (see `fork`).
What an acknowledgement covers is added to what is acknowledged. One that covers less than is acknowledged already is an
old one that comes again, or the collector was restored from a backup:
- it is noted which message was the last one written by then; so far nothing that was acknowledged is taken back
- an acknowledgement that covers a message written after that cannot be an old one. If it too asks for messages that
  were acknowledged, they wait again and are sent; those that are no longer kept are declared as evicted, with the
  earlier acknowledgement as evidence
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from agent.clock import Now, epoch_us
from agent.device.machine.timekeeping import believable
from agent.device.recovery.catch_up import PREVIOUS_LOG
from agent.device.recovery.fork import note_proof, require_same_history
from agent.device.store import ranges, retention
from agent.device.store.eviction import ACKNOWLEDGED_EARLIER, declare_messages
from agent.device.store.message_log import Author
from agent.device.store.retention import Acknowledged
from agent.device.store.store import Store
from agent.device.uplink.refusals import ACKNOWLEDGEMENTS, Refusals
from agent.errors import Refused, StorageFull
from agent.transport.packets import Delivery
from agent.wire import jws, topics
from agent.wire.keys import PublicKey
from agent.wire.messages import Ack, open_message

log = logging.getLogger("outstation.uplink")

# Each commit is some 28 KB on flash.
_APPLY_S = 1.0
_FULL_RETRY_S = 5.0


class Acknowledgements:
    """Those of one device's log. Lives as long as the uplink; used by its thread only."""

    def __init__(
        self, store: Store, author: Author, collector: PublicKey | None, keep_s: float, refusals: Refusals
    ) -> None:
        self.topic = str(topics.Topic(author.fleet, author.device, "ack"))
        self._store, self._author, self._keep_s, self._refusals = store, author, keep_s, refusals
        self._signer = jws.Signer("collector", collector) if collector else None
        self._known = self._written = store.acknowledged()
        self._proof = store.meta(retention.ACKNOWLEDGEMENT, "")
        self._doubt: int | None = None
        self._confirmed: list[int] = []
        self._floor_us = self._proven = 0
        self._apply_at = float("-inf")

    def take(self, delivery: Delivery, now: Now) -> Ack | None:
        """The acknowledgement in `delivery`, noted for `apply`; None where it is not one to obey."""
        try:
            ack = self._open(delivery)
        except Refused as refusal:
            self._refusals.add(ACKNOWLEDGEMENTS, refusal, now)
            return None
        if ack is None:
            return None
        self._weigh(ack, delivery)
        if believable(told_us := epoch_us(ack.time), now):
            self._floor_us = max(self._floor_us, told_us)
        return ack

    def confirm(self, seq: int) -> None:
        """The broker has message `seq`, and that is enough (delivery = "broker")."""
        self._confirmed.append(seq)

    def apply(self, now: Now, *, at_once: bool = False) -> None:
        """Write what is acknowledged, if it is time to. A full disk delays it. Raises StorageError."""
        if not (self._known != self._written or self._confirmed) or not (at_once or now.boot_s >= self._apply_at):
            return
        try:
            self._write(now)
        except StorageFull as full:
            log.warning("%s; acknowledged messages wait in the outbox until there is room to say so", full)
            self._apply_at = now.boot_s + _FULL_RETRY_S
            return
        self._apply_at = now.boot_s + _APPLY_S

    def _weigh(self, ack: Ack, delivery: Delivery) -> None:
        covered = Acknowledged(ack.through, tuple(ack.missing))
        asked = ranges.intersect(self._known.ranges, covered.missing)
        is_new = self._doubt is not None and bool(ranges.intersect(covered.ranges, [(self._doubt + 1, ack.through)]))
        if is_new:
            self._doubt = None
            if asked:
                log.warning("the collector has lost messages it had acknowledged, %s; it gets what is kept", asked)
                self._known = self._known.without(asked)
                self._apply_at = float("-inf")
        elif asked or ack.through < self._known.through:
            if self._doubt is None:
                self._doubt = self._last_seq()
        else:
            self._proof = json.dumps({"payload": delivery.payload.decode(), "jws": delivery.tokens[0]})
        self._known = self._known.also(covered.ranges)

    def _write(self, now: Now) -> None:
        known = self._known.also(ranges.of(self._confirmed))
        with self._store.transaction(vital=True) as tx:
            gone = tx.outbox.set_acknowledged(known)
            if gone:
                earlier = tx.meta(retention.ACKNOWLEDGEMENT, "")
                proof = json.loads(earlier) if earlier else None
                declare_messages(tx, self._author, now, gone, ACKNOWLEDGED_EARLIER, proof=proof)
            deleted = set(tx.outbox.delete(self._confirmed))
            note_proof(tx, self._proven)
            if known != self._written:
                self._note(tx.meta(retention.STEPS, ""), known, now, tx.set_meta)
            if self._floor_us:
                tx.raise_floor(self._floor_us)
        self._known = self._written = known
        self._confirmed = [seq for seq in self._confirmed if seq not in deleted]

    def _note(self, steps: str, known: Acknowledged, now: Now, set_meta: Callable[[str, str], None]) -> None:
        """When this much was acknowledged, and the evidence for it."""
        at_s = retention.uptime_s(self._store.meta(retention.UPTIME, ""), self._store.boot, now)
        if longer := retention.with_step(steps, at_s, known.through, self._keep_s):
            set_meta(retention.STEPS, longer)
        if self._proof:
            set_meta(retention.ACKNOWLEDGEMENT, self._proof)

    def _last_seq(self) -> int:
        return int(self._store.meta("seq", "0"))

    def _open(self, delivery: Delivery) -> Ack | None:
        signer = self._signer
        if signer is None:
            raise Refused("no key", "no [collector] key is configured")
        if delivery.topic != self.topic:
            raise Refused("other topic", delivery.topic[:120])
        body = open_message(delivery.topic, delivery.payload, delivery.tokens, {signer.key.kid: signer}.get).body
        if not isinstance(body, Ack):
            raise Refused("other kind", delivery.topic)
        if body.log == self._store.meta(PREVIOUS_LOG, ""):
            # The broker keeps the last one until there is one for this log.
            return None
        if body.log != self._author.log_id:
            raise Refused("other log", f"{body.log}; this store's log is {self._author.log_id}")
        try:
            epoch_us(body.time)
        except ValueError as error:
            raise Refused("malformed payload", f"time {body.time}: {error}") from None
        self._proven = max(self._proven, require_same_history(self._store, body))
        return body
