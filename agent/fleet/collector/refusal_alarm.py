"""When somebody has to look: so much in one device's name is refused that it is no accident."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from agent.fleet.database.ingest import Refusal

# A device that is enrolled anew, or a message damaged on its way, stays below this.
MAX_REFUSALS = 20
WINDOW_S = 600.0
ALERT_COOLDOWN_S = 3600.0
# Stands for every name that is not enrolled.
UNENROLLED = ""


class RefusalCount(msgspec.Struct):
    """Refusals in one device's name since `since_s`, seconds of the boot clock; `last` is the newest reason."""

    since_s: float
    n: int = 0
    last_reason: str = ""


class RefusalAlarm(msgspec.Struct):
    """Counts by enrolled device, so that whoever makes up names takes no memory."""

    _counts: dict[str, RefusalCount] = msgspec.field(default_factory=dict)
    _quiet_until_s: dict[str, float] = msgspec.field(default_factory=dict)

    def add_refusals(self, refusals: Iterable[Refusal], enrolled: frozenset[str], boot_s: float) -> None:
        """Note what was refused at `boot_s`."""
        for refusal in refusals:
            self.add_count(refusal.device if refusal.device in enrolled else UNENROLLED, refusal.reason, 1, boot_s)

    def add_count(self, name: str, reason: str, n: int, boot_s: float) -> None:
        """Note `n` more in this name."""
        count = self._counts.get(name)
        if count is None or boot_s - count.since_s > WINDOW_S:
            count = self._counts[name] = RefusalCount(boot_s)
        count.n += n
        count.last_reason = reason

    def due_alerts(self, boot_s: float) -> list[tuple[str, RefusalCount]]:
        """(device, its count) of those to raise an alert for: over the rate, and none raised within the hour."""
        return [
            (name, count)
            for name, count in self._counts.items()
            if count.n > MAX_REFUSALS and boot_s >= self._quiet_until_s.get(name, 0.0)
        ]

    def mark_raised(self, name: str, boot_s: float) -> None:
        """Its alert is stored: count anew, and keep quiet for an hour."""
        del self._counts[name]
        self._quiet_until_s[name] = boot_s + ALERT_COOLDOWN_S


class RefusalTally:
    """What was refused since the last look at table refusals, whoever refused it."""

    def __init__(self) -> None:
        self._previous: dict[tuple[str, str], int] | None = None

    def new_refusals(self, refusals: Iterable[dict[str, Any]]) -> list[tuple[str, str, int]]:
        """(device, reason, how many more); nothing at the first look, which cannot tell when they came."""
        now = {(row["device"], row["reason"]): int(row["count"]) for row in refusals}
        before, self._previous = self._previous, now
        if before is None:
            return []
        more = ((*key, n - before.get(key, 0)) for key, n in now.items())
        return [one for one in more if one[2] > 0]
