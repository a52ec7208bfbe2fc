"""When somebody has to look: so much in one device's name is refused that it is no accident."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from agent.fleet.ingest import Refusal

# A device that is enrolled anew, or a message damaged on its way, stays below this.
MANY = 20
WITHIN_S = 600.0
QUIET_S = 3600.0
# Stands for every name that is not enrolled.
STRANGERS = ""


@dataclass(slots=True)
class Count:
    """Refusals in one device's name since `since_s`, seconds of the boot clock; `last` is the newest reason."""

    since_s: float
    n: int = 0
    last: str = ""


@dataclass(slots=True)
class Alarm:
    """Counts by enrolled device, so that whoever makes up names takes no memory."""

    _counts: dict[str, Count] = field(default_factory=dict)
    _quiet_until_s: dict[str, float] = field(default_factory=dict)

    def add(self, refusals: Iterable[Refusal], enrolled: frozenset[str], boot_s: float) -> None:
        """Note what was refused at `boot_s`."""
        for refusal in refusals:
            name = refusal.device if refusal.device in enrolled else STRANGERS
            count = self._counts.get(name)
            if count is None or boot_s - count.since_s > WITHIN_S:
                count = self._counts[name] = Count(boot_s)
            count.n += 1
            count.last = refusal.reason

    def due(self, boot_s: float) -> list[tuple[str, Count]]:
        """(device, its count) of those to raise an alert for: over the rate, and none raised within the hour."""
        return [
            (name, count)
            for name, count in self._counts.items()
            if count.n > MANY and boot_s >= self._quiet_until_s.get(name, 0.0)
        ]

    def raised(self, name: str, boot_s: float) -> None:
        """Its alert is stored: count anew, and keep quiet for an hour."""
        del self._counts[name]
        self._quiet_until_s[name] = boot_s + QUIET_S
