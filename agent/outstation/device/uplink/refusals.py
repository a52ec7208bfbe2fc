"""Refusals: messages from the broker that did not verify, counted by reason, with one alert.

Anyone who reaches the broker can send a million forged commands or acknowledgements. They must not wear out the card,
nor fill the outbox, the journal or memory: counts are written once a minute, and the alert is raised once and cleared
after an hour without any.
"""

from __future__ import annotations

import logging
from collections import Counter

from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import MessageRefused, StorageFull
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.alerts.kinds import REFUSED_ON_DEVICE

log = logging.getLogger("outstation.uplink")

ACKNOWLEDGEMENTS = "acknowledgements"
CLEAR_AFTER_S = 3600.0
_FLUSH_INTERVAL_S = 60.0
_FULL_RETRY_S = 5.0
_ALERT_META = "refusals alert"
# Reasons that an honest collector or operator can cause: a restored collector, a new log, a burst.
_BENIGN_REASONS = frozenset({"other log", "beyond the log", "busy", "no key"})


def counter_names(kind: str, reason: str) -> tuple[str, str]:
    """Return the counters of a refused message; `kind` is a plural noun, such as "commands"."""
    return f"{kind} refused", f"{kind} refused: {reason}"


class Refusals:
    """Refusals of one device; used by the uplink's thread only."""

    def __init__(self, store: Store, message_log: MessageLog) -> None:
        self._store, self._message_log = store, message_log
        self._counts: Counter[str] = Counter()
        self._hostile_count = self._reported_count = 0
        self._last_hostile = ""
        self._is_alert_open = store.get_meta(_ALERT_META, "") != ""
        self._quiet_since_s: float | None = None
        self._next_flush_s = self._next_log_s = self._retry_at_s = float("-inf")

    def add(self, kind: str, refusal: MessageRefused, now: ClockReading) -> None:
        """Count a refused message; `kind` is a plural noun, such as "commands"."""
        self._counts.update(counter_names(kind, refusal.reason))
        if refusal.reason not in _BENIGN_REASONS:
            self._hostile_count += 1
            self._last_hostile = f"{kind}: {refusal.reason}"
            self._quiet_since_s = now.boot_s
        if now.boot_s >= self._next_log_s:
            self._next_log_s = now.boot_s + _FLUSH_INTERVAL_S
            log.warning("%s refused: %s", kind, refusal)

    def flush(self, now: ClockReading, *, force: bool = False) -> None:
        """Write the counts, and raise or clear the alert, if due. A full disk delays it. Raises StorageError."""
        if self._quiet_since_s is None:
            self._quiet_since_s = now.boot_s
        raises = self._hostile_count > self._reported_count and not self._is_alert_open
        clears = (
            self._is_alert_open
            and self._hostile_count == self._reported_count
            and now.boot_s - self._quiet_since_s >= CLEAR_AFTER_S
        )
        counts = bool(self._counts) and (force or now.boot_s >= self._next_flush_s)
        if not (raises or clears or counts) or now.boot_s < self._retry_at_s:
            return
        try:
            with self._store.transaction(vital=True) as tx:
                for name, n in self._counts.items():
                    tx.increment_counter(name, n)
                if raises or clears:
                    tx.set_meta(_ALERT_META, "1" if raises else "")
                    self._message_log.append(tx, "alerts", None, self._build_alert(raises).to_body(), now)
        except StorageFull as full:
            log.warning("%s; counts of refusals are written once there is room", full)
            self._retry_at_s = now.boot_s + _FULL_RETRY_S
            return
        self._is_alert_open = (self._is_alert_open or raises) and not clears
        self._reported_count = self._hostile_count
        self._next_flush_s = now.boot_s + _FLUSH_INTERVAL_S
        self._counts.clear()

    def _build_alert(self, raised: bool) -> Alert:
        evidence = {"last": self._last_hostile}
        if not raised:
            return REFUSED_ON_DEVICE.cleared(f"For {CLEAR_AFTER_S / 3600:.0f} h no message was refused.", evidence)
        summary = (
            f"Somebody sends this device messages that do not verify, the last one refused for {self._last_hostile}. "
            "The device obeyed none of them. Check who may publish on its topics; `outstation status` counts refusals."
        )
        return REFUSED_ON_DEVICE.raised(summary, evidence)
