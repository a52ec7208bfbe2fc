"""Messages that the disk has changed are not sent: they are put aside for a look, declared, and the others go on."""

from __future__ import annotations

from collections.abc import Sequence

from agent.clock import Now
from agent.device.store import ranges
from agent.device.store.eviction import DAMAGED, declare_messages, declared
from agent.device.store.message_log import Author
from agent.device.store.store import Store

_SHOWN = 50


def declare_damaged(store: Store, author: Author, seqs: Sequence[int], now: Now) -> None:
    """Set messages aside that do not have their CRC, and say so in the log. Raises StorageError."""
    with store.transaction(vital=True) as tx:
        for seq in seqs:
            tx.outbox.put_aside(seq)
        # One may have had another number, or have declared others: whatever is neither here nor declared counts.
        gone = ranges.subtract(tx.outbox.absent(tx.chain()[0]), declared(tx))
        declare_messages(tx, author, now, gone, DAMAGED)
        summary = (
            f"{len(seqs)} messages in the outbox were not what was written and are not sent; they are in the store's "
            "table `damaged_messages`. Check the card."
        )
        alert = {
            "alert": "storage",
            "subject": "outbox",
            "state": "raised",
            "severity": "critical",
            "id": f"storage/outbox/{author.log_id}/{seqs[0]}",
            "summary": summary,
            "evidence": {"messages": gone[:_SHOWN]},
        }
        author.write(tx, "alerts", None, alert, now)
