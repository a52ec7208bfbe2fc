"""Alert about messages above the broker's largest packet: they stay in the outbox, and others are sent.

The alert declares them to the collector, which cannot know otherwise why numbers are missing. It is raised once, and
cleared when none of them waits: the broker took them after its limit was raised, or they were evicted.
"""

from __future__ import annotations

import json
import logging

from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.alerts.kinds import TOO_LARGE

log = logging.getLogger("outstation.uplink")

_META = "oversize alert"
_MAX_NAMED = 20
_CHECK_INTERVAL_S = 60.0
_FULL_RETRY_S = 5.0


class OversizeAlert:
    """Used by the uplink's thread only."""

    def __init__(self, store: Store, message_log: MessageLog) -> None:
        self._store, self._message_log = store, message_log
        text = store.get_meta(_META, "")
        # Some of the messages that the open alert is about.
        self._open_seqs: list[int] = json.loads(text) if text else []
        self._held: dict[int, int] = {}
        self._limit = 0
        self._next_check_s = float("-inf")

    def add(self, seq: int, size: int, limit: int) -> None:
        """Note a message of `size` bytes that is held back; `limit` 0 if the broker did not say."""
        if len(self._held) < _MAX_NAMED:
            self._held.setdefault(seq, size)
        self._limit = limit

    def tick(self, now: ClockReading) -> None:
        """Raise or clear the alert, if due. A full disk delays it. Raises StorageError."""
        if now.boot_s < self._next_check_s or not (self._held or self._open_seqs):
            return
        self._next_check_s = now.boot_s + _CHECK_INTERVAL_S
        waiting = [message.seq for message in self._store.pending_messages([*self._held, *self._open_seqs])]
        self._held = {seq: size for seq, size in self._held.items() if seq in waiting}
        if bool(waiting) == bool(self._open_seqs):
            return
        try:
            with self._store.transaction(vital=True) as tx:
                tx.set_meta(_META, json.dumps(waiting[:_MAX_NAMED]) if waiting else "")
                alert = self._build(waiting)
                self._message_log.append(tx, "alerts", None, alert.to_body(), now)
        except StorageFull as full:
            log.warning("%s; the alert about messages that are too large is written once there is room", full)
            self._next_check_s = now.boot_s + _FULL_RETRY_S
            return
        self._open_seqs = waiting[:_MAX_NAMED]

    def _build(self, waiting: list[int]) -> Alert:
        if not waiting:
            return TOO_LARGE.cleared("No message above the broker's largest packet waits any more.")
        largest = max(self._held.values())
        limit = f"of {self._limit:,} bytes" if self._limit else "which it does not announce"
        summary = (
            f"Messages are larger than the broker's limit {limit}, the largest has {largest:,} bytes: number "
            f"{', '.join(map(str, waiting))}. They stay on the device, and others go on. Raise the broker's limit, or "
            "lower [broker] max_message_bytes so that later ones are split."
        )
        evidence = {"seqs": waiting, "bytes": largest, "limit": self._limit or None}
        return TOO_LARGE.raised(summary, evidence)
