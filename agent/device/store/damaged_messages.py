"""Messages that the disk has changed are not sent: they are put aside for a look, declared, and the others go on."""

from __future__ import annotations

from collections.abc import Sequence

from agent.alerts import DAMAGED_MESSAGES
from agent.clock import ClockReading
from agent.device.store import ranges
from agent.device.store.eviction import DAMAGED, declare_messages, declared_seqs
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store

_MAX_LISTED = 50


def quarantine_damaged(store: Store, message_log: MessageLog, seqs: Sequence[int], now: ClockReading) -> None:
    """Set messages aside that do not have their CRC, and say so in the log. Raises StorageError."""
    with store.transaction(vital=True) as tx:
        for seq in seqs:
            tx.outbox.quarantine(seq)
        # One may have had another number, or have declared others: whatever is neither here nor declared counts.
        gone = ranges.subtract(tx.outbox.missing_seqs(tx.log_head()[0]), declared_seqs(tx))
        declare_messages(tx, message_log, now, gone, DAMAGED)
        summary = (
            f"{len(seqs)} messages in the outbox were not what was written and are not sent; they are in the store's "
            "table `damaged_messages`. Check the card."
        )
        evidence = {"messages": gone[:_MAX_LISTED]}
        alert = DAMAGED_MESSAGES.raised(summary, evidence, log=message_log.log_id, seq=seqs[0])
        message_log.append(tx, "alerts", None, alert.to_body(), now)
