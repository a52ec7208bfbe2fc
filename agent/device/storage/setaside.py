"""Messages that the disk has changed are not sent: they are put aside for a look, declared, and the others go on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence

from agent.clock import Now
from agent.device.author import Author
from agent.device.storage import ranges
from agent.device.storage.eviction import DAMAGED, declare_messages
from agent.device.storage.store import Store
from agent.device.storage.transaction import Transaction


def set_aside(tx: Transaction, seqs: Sequence[int]) -> list[int]:
    """Move these messages to table `damaged_messages`; the seqs that they once had, as far as they tell."""
    meant = list(seqs)
    for seq in seqs:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            meant.append(int(json.loads(tx.outbox.payload(seq) or b"")["seq"]))
        tx.outbox.put_aside(seq)
    return meant


def declare_damaged(store: Store, author: Author, seqs: Sequence[int], now: Now) -> None:
    """Set messages aside that do not have their CRC, and say so in the log. Raises StorageError."""
    with store.transaction(vital=True) as tx:
        last = tx.chain()[0]
        gone = ranges.of(seq for seq in set_aside(tx, seqs) if 1 <= seq <= last)
        gone = ranges.subtract(gone, ranges.of(seq for first, end in gone for seq in tx.outbox.kept(first, end)))
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
            "evidence": {"messages": gone},
        }
        author.write(tx, "alerts", None, alert, now)
