"""What may leave the outbox: signed acknowledgements, verified, gathered, and applied in one transaction for many.

Rules of `take`; what fails one is counted and deletes nothing:
- it came on this device's `ack` topic, and the collector's key signed it for that topic (see `agent.wire.messages`)
- it names this log
- it acknowledges no message that was never written
What an acknowledgement covers is safe for ever, so an old one that comes again changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from agent.clock import Now, epoch_us
from agent.device.author import Author
from agent.device.store import Store
from agent.errors import Refused, StorageFull
from agent.link import Delivery
from agent.wire import jws, topics
from agent.wire.keys import PublicKey
from agent.wire.messages import Ack, open_message

log = logging.getLogger("outstation.uplink")

REFUSED = "acknowledgements refused"
# Each deletion is a commit of some 28 KB on flash.
_APPLY_S = 1.0
# Somebody who floods us with forged ones must not wear out the card, nor fill the journal.
_COUNT_S = 60.0
_FULL_RETRY_S = 5.0


class Acknowledgements:
    """Those of one device's log. Lives as long as the uplink; used by its thread only."""

    def __init__(self, store: Store, author: Author, collector: PublicKey | None) -> None:
        self.topic = str(topics.Topic(author.fleet, author.device, "ack"))
        self._store, self._log_id = store, author.log_id
        self._signer = jws.Signer("collector", collector) if collector else None
        self._acks: list[Ack] = []
        self._confirmed: list[int] = []
        self._refused = 0
        self._apply_at = self._count_at = self._tell_at = float("-inf")

    def take(self, delivery: Delivery, now: Now) -> Ack | None:
        """The acknowledgement in `delivery`, noted for `apply`; None where it is not one to obey."""
        try:
            ack = self._open(delivery)
        except Refused as refusal:
            self._refused += 1
            if now.boot_s >= self._tell_at:
                self._tell_at = now.boot_s + _COUNT_S
                log.warning("acknowledgement refused, nothing is deleted: %s", refusal)
            return None
        if not self._acks or ack.through > self._acks[-1].through or ack.missing != self._acks[-1].missing:
            self._acks.append(ack)
        return ack

    def confirm(self, seq: int) -> None:
        """The broker has message `seq`, and that is enough (delivery = "broker")."""
        self._confirmed.append(seq)

    def apply(self, now: Now, *, at_once: bool = False) -> None:
        """Delete what is acknowledged, if it is time to. A full disk delays it. Raises StorageError."""
        deletes = (self._acks or self._confirmed) and (at_once or now.boot_s >= self._apply_at)
        counts = self._refused and (at_once or now.boot_s >= self._count_at)
        if not deletes and not counts:
            return
        try:
            self._write(self._acks, self._confirmed, self._refused)
        except StorageFull as full:
            log.warning("%s; acknowledged messages stay in the outbox until there is room to delete them", full)
            self._apply_at = self._count_at = now.boot_s + _FULL_RETRY_S
            return
        self._apply_at = now.boot_s + _APPLY_S
        if self._refused:
            self._count_at = now.boot_s + _COUNT_S
        self._acks, self._confirmed, self._refused = [], [], 0

    def _write(self, acks: Sequence[Ack], confirmed: Sequence[int], refused: int) -> None:
        with self._store.transaction() as tx:
            for ack in acks:
                tx.acknowledge(ack.through, ack.missing)
                tx.raise_floor(epoch_us(ack.time))
            tx.forget(confirmed)
            tx.count(REFUSED, refused)

    def _open(self, delivery: Delivery) -> Ack:
        signer = self._signer
        if signer is None:
            raise Refused("unknown key", "no [collector] key is configured")
        if delivery.topic != self.topic:
            raise Refused("other topic", delivery.topic[:120])
        body = open_message(delivery.topic, delivery.payload, delivery.tokens, {signer.key.kid: signer}.get).body
        if not isinstance(body, Ack):
            raise Refused("other kind", delivery.topic)
        if body.log != self._log_id:
            raise Refused("other log", f"{body.log}; this store's log is {self._log_id}")
        try:
            epoch_us(body.time)
        except ValueError as error:
            raise Refused("malformed payload", f"time {body.time}: {error}") from None
        last = int(self._store.meta("seq", "0"))
        if body.through > last:
            raise Refused("beyond the log", f"acknowledges {body.through}, the last message is {last}")
        return body
