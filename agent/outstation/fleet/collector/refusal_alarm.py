"""Refusal alarm: decide when refused messages in one device's name exceed a rate that accidents explain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from outstation.fleet.database.ingest import Refusal

# A newly enrolled device, or a message damaged in transit, stays below this.
MAX_REFUSALS = 20
WINDOW_S = 600.0
ALERT_COOLDOWN_S = 3600.0
# Stands for every name that is not enrolled.
UNENROLLED = ""


class RefusalCount(msgspec.Struct):
    """Refusals in one device's name since `since_s`, seconds of the boot clock."""

    since_s: float
    n: int = 0
    last_reason: str = ""


class RefusalAlarm(msgspec.Struct):
    """Refusal counts by enrolled device: invented names cost no memory."""

    _counts: dict[str, RefusalCount] = msgspec.field(default_factory=dict)
    _quiet_until_s: dict[str, float] = msgspec.field(default_factory=dict)

    def add_refusals(self, refusals: Iterable[Refusal], enrolled: frozenset[str], boot_s: float) -> None:
        for refusal in refusals:
            self.add_count(refusal.device if refusal.device in enrolled else UNENROLLED, refusal.reason, 1, boot_s)

    def add_count(self, name: str, reason: str, n: int, boot_s: float) -> None:
        count = self._counts.get(name)
        if count is None or boot_s - count.since_s > WINDOW_S:
            count = self._counts[name] = RefusalCount(boot_s)
        count.n += n
        count.last_reason = reason

    def due_alerts(self, boot_s: float) -> list[tuple[str, RefusalCount]]:
        """Return (device, count) of each device above the rate without an alert in the last hour."""
        return [
            (name, count)
            for name, count in self._counts.items()
            if count.n > MAX_REFUSALS and boot_s >= self._quiet_until_s.get(name, 0.0)
        ]

    def mark_raised(self, name: str, boot_s: float) -> None:
        """Reset the count of a device whose alert is stored, and raise none for an hour."""
        del self._counts[name]
        self._quiet_until_s[name] = boot_s + ALERT_COOLDOWN_S


class RefusalTally:
    """Refusals of all collectors since the last read of table refusals."""

    def __init__(self) -> None:
        self._previous: dict[tuple[str, str], int] | None = None

    def new_refusals(self, refusals: Iterable[dict[str, Any]]) -> list[tuple[str, str, int]]:
        """Return (device, reason, increase); nothing at the first read, which cannot tell when they arrived."""
        counts = {(row["device"], row["reason"]): int(row["count"]) for row in refusals}
        previous, self._previous = self._previous, counts
        if previous is None:
            return []
        increases = ((*key, n - previous.get(key, 0)) for key, n in counts.items())
        return [entry for entry in increases if entry[2] > 0]
