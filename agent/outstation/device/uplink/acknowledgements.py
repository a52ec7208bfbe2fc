"""Acknowledgements: signed by the collector, verified, gathered, and applied in one transaction for many.

Rules of `receive`. An acknowledgement that fails one is counted and changes nothing:
- It came on this device's `ack` topic, and a trusted key of the collector signed it for that topic (see
  `outstation.protocol.wire.messages`).
- It names this log.
One that passes but covers messages that this store never wrote shows that the store went back in time (see
`outstation.device.recovery.new_log`).

The messages that it covers are added to the acknowledged ones. One that covers fewer is an old one that comes again, or
the collector was restored from a backup. No clock decides which: collectors have several.
- The device remembers its newest message at the time when an acknowledgement last added some. An acknowledgement
  that covers a later message is new. If it asks for acknowledged messages, these wait again and are sent. Those that
  are no longer stored are declared as evicted, with the earlier acknowledgement as evidence.
- Any other is doubted; acknowledged messages stay acknowledged. If no message settles that within seconds, one is
  written for it, and no second one before the collector has answered.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from outstation.device.capacity.eviction import ACKNOWLEDGED_EARLIER, declare_messages
from outstation.device.machine.timekeeping import is_plausible_time
from outstation.device.recovery.catch_up import PREVIOUS_LOG
from outstation.device.recovery.new_log import record_proof, require_same_history
from outstation.device.store import retention
from outstation.device.store.message_log import MessageLog
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.device.store.store import Store
from outstation.device.uplink.refusals import ACKNOWLEDGEMENTS, Refusals
from outstation.foundation import ranges
from outstation.foundation.clock import ClockReading, parse_rfc3339
from outstation.foundation.errors import MessageRefused, StorageFull
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire import topics
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.messages import AckPayload
from outstation.protocol.wire.verification import verify_message

log = logging.getLogger("outstation.uplink")

# Each commit writes about 28 KB to flash.
_APPLY_INTERVAL_S = 1.0
_FULL_RETRY_S = 5.0
# Earlier newest results are in pages of their own: deleted one by one, each would cost two pages of flash.
_LEAST_DISPLACED = 16
# Under load the next messages settle a doubt. An attacker who repeats old acknowledgements causes one message a minute.
_SETTLE_AFTER_S, _SETTLE_INTERVAL_S = 3.0, 60.0
EVENT = "acknowledgement"


class Acknowledgements:
    """Acknowledgements of one device's log, for the life of the uplink; used by its thread only."""

    def __init__(
        self,
        store: Store,
        message_log: MessageLog,
        find_collector: Callable[[str], Signer | None],
        keep_s: float,
        refusals: Refusals,
    ) -> None:
        self.topic = str(topics.Topic(message_log.fleet, message_log.device, "ack"))
        self._store, self._message_log, self._keep_s, self._refusals = store, message_log, keep_s, refusals
        self._find_collector = find_collector
        self._acknowledged = self._saved = store.acknowledged()
        self._evidence = store.get_meta(retention.ACKNOWLEDGEMENT, "")
        # The last message that was written when an acknowledgement that is certainly new added messages.
        self._written_seq = self._last_written_seq()
        self._doubted: tuple[float, AckPayload] | None = None
        self._is_settling = False
        self._next_settle_s = float("-inf")
        self._confirmed_seqs: list[int] = []
        # Confirmed while among the newest results: deleted once newer ones are there.
        self._spared_seqs: list[int] = []
        self._time_floor_us = self._proven_seq = 0
        self._next_apply_s = float("-inf")

    def receive(self, delivery: IncomingMessage, now: ClockReading) -> AckPayload | None:
        """Return the acknowledgement in `delivery`, gathered for `apply`; None if refused or of the previous log."""
        try:
            ack = self._verify(delivery)
        except MessageRefused as refusal:
            self._refusals.add(ACKNOWLEDGEMENTS, refusal, now)
            return None
        if ack is None:
            return None
        self._merge(ack, delivery, now)
        if is_plausible_time(signed_us := parse_rfc3339(ack.time), now):
            self._time_floor_us = max(self._time_floor_us, signed_us)
        return ack

    def confirm(self, seq: int) -> None:
        """Count message `seq` as delivered, because the broker has it (delivery = "broker")."""
        self._confirmed_seqs.append(seq)

    def apply(self, now: ClockReading, *, force: bool = False) -> None:
        """Commit what is acknowledged, if it is due. A full disk delays it. Raises StorageError."""
        if not (self._acknowledged != self._saved or self._confirmed_seqs) or not (
            force or now.boot_s >= self._next_apply_s
        ):
            return
        try:
            known = self._acknowledged.union(ranges.from_numbers(self._confirmed_seqs))
            with self._store.transaction(vital=True) as tx:
                missing = tx.outbox.set_acknowledged(known)
                if missing:
                    earlier = tx.get_meta(retention.ACKNOWLEDGEMENT, "")
                    proof = json.loads(earlier) if earlier else None
                    declare_messages(tx, self._message_log, now, missing, ACKNOWLEDGED_EARLIER, acknowledgement=proof)
                newest = set().union(*tx.outbox.newest_results().values())
                displaced = [seq for seq in self._spared_seqs if seq not in newest]
                due = displaced if len(displaced) >= _LEAST_DISPLACED else []
                confirmed = [seq for seq in self._confirmed_seqs if seq not in newest]
                deleted = set(tx.outbox.delete(sorted([*confirmed, *due])))
                record_proof(tx, self._proven_seq)
                if known != self._saved:
                    at_s = tx.uptime_s(now)
                    if longer := retention.append_history(
                        tx.get_meta(retention.ACKNOWLEDGED_HISTORY, ""), at_s, known.through, self._keep_s
                    ):
                        tx.set_meta(retention.ACKNOWLEDGED_HISTORY, longer)
                    if self._evidence:
                        tx.set_meta(retention.ACKNOWLEDGEMENT, self._evidence)
                if self._time_floor_us:
                    tx.raise_time_floor(self._time_floor_us)
            self._acknowledged = self._saved = known
            spared = {*self._spared_seqs, *(seq for seq in self._confirmed_seqs if seq in newest)}
            self._spared_seqs = sorted(spared - deleted)
            self._confirmed_seqs = [seq for seq in confirmed if seq not in deleted]
        except StorageFull as full:
            log.warning("%s; acknowledged messages stay in the outbox until there is room to record it", full)
            self._next_apply_s = now.boot_s + _FULL_RETRY_S
            return
        self._next_apply_s = now.boot_s + _APPLY_INTERVAL_S

    def settle_doubt(self, now: ClockReading) -> None:
        """Write a message whose acknowledgement shows what the collector has, if one was doubted for seconds.

        A full disk delays it. Raises StorageError.
        """
        # A message that waits for a collector settles the doubt whenever that one comes: a second one tells no more.
        if self._doubted is None or self._is_settling:
            return
        if now.boot_s < max(self._doubted[0] + _SETTLE_AFTER_S, self._next_settle_s):
            return
        self._next_settle_s = now.boot_s + _SETTLE_INTERVAL_S
        ack, known = self._doubted[1], self._acknowledged.through
        summary = (
            f"The collector acknowledged messages up to {ack.through}, where it had {known}: an old acknowledgement "
            "came again, or the collector was restored from a backup. Its answer to this message tells."
        )
        body = {"event": EVENT, "summary": summary, "evidence": {"through": ack.through, "acknowledged": known}}
        try:
            with self._store.transaction() as tx:
                self._message_log.append(tx, "audit", None, body, now)
            self._is_settling = True
        except StorageFull as full:
            log.warning("%s; the next message shows what the collector has", full)

    def _last_written_seq(self) -> int:
        return int(self._store.get_meta("seq", "0"))

    def _merge(self, ack: AckPayload, delivery: IncomingMessage, now: ClockReading) -> None:
        covered = AcknowledgedSeqs(ack.through, tuple(ack.missing))
        requested = ranges.intersect(self._acknowledged.ranges, covered.missing)
        is_new = bool(ranges.intersect(covered.ranges, [(self._written_seq + 1, ack.through)]))
        if not is_new and (requested or ack.through < self._acknowledged.through):
            self._doubted = self._doubted or (now.boot_s, ack)
        else:
            self._doubted, self._is_settling = None, False
            if requested:
                log.warning("the collector has lost messages it had acknowledged, %s; it gets what is kept", requested)
                self._acknowledged = self._acknowledged.difference(requested)
                self._next_apply_s = float("-inf")
            else:
                self._evidence = json.dumps({"payload": delivery.payload.decode(), "jws": delivery.tokens[0]})
        known, self._acknowledged = self._acknowledged, self._acknowledged.union(covered.ranges)
        if self._acknowledged != known and self._doubted is None:
            self._written_seq = self._last_written_seq()

    def _verify(self, delivery: IncomingMessage) -> AckPayload | None:
        if delivery.topic != self.topic:
            raise MessageRefused("other topic", delivery.topic[:120])
        body = verify_message(delivery.topic, delivery.payload, delivery.tokens, self._find_collector).body
        if not isinstance(body, AckPayload):
            raise MessageRefused("other kind", delivery.topic)
        if body.log == self._store.get_meta(PREVIOUS_LOG, ""):
            # Retained by the broker until there is one for this log.
            return None
        if body.log != self._message_log.log_id:
            raise MessageRefused("other log", f"{body.log}; this store's log is {self._message_log.log_id}")
        try:
            parse_rfc3339(body.time)
        except ValueError as error:
            raise MessageRefused("malformed payload", f"time {body.time}: {error}") from None
        self._proven_seq = max(self._proven_seq, require_same_history(self._store, body))
        return body
