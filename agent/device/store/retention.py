"""Which messages are acknowledged, and how long they are kept all the same.

A message that the collector has stays in the outbox for `[buffer] keep_messages`, for a collector that is restored from
a backup and asks for it again. How long that is, is measured in time that passed while the device was on: a clock that
is set by years deletes nothing.
"""

from __future__ import annotations

import json

import msgspec

from agent.clock import ClockReading
from agent.device.store import ranges
from agent.device.store.ranges import Ranges

# Names in table meta.
ACKNOWLEDGED, ACKNOWLEDGEMENT, BACKLOG, ACKNOWLEDGED_HISTORY, UPTIME = (
    "acknowledged",
    "acknowledgement",
    "waiting",
    "acknowledged when",
    "uptime",
)
# A message is kept up to one part longer than it must be, for a list of so many entries.
_HISTORY_PARTS = 48


class AcknowledgedSeqs(msgspec.Struct, frozen=True):
    """Every seq up to `through` but those in `missing`, which ascend and end before `through`."""

    through: int = 0
    missing: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_ranges(cls, seqs: Ranges) -> AcknowledgedSeqs:
        through = seqs[-1][1] if seqs else 0
        return cls(through, tuple(ranges.subtract([(1, through)] if through else [], seqs)))

    @classmethod
    def from_json(cls, text: str) -> AcknowledgedSeqs:
        if not text:
            return cls()
        through, missing = json.loads(text)
        return cls(through, tuple((first, last) for first, last in missing))

    def to_json(self) -> str:
        return json.dumps([self.through, self.missing], separators=(",", ":"))

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return ranges.subtract([(1, self.through)] if self.through else [], self.missing)

    def union(self, other: Ranges) -> AcknowledgedSeqs:
        return AcknowledgedSeqs.from_ranges(ranges.union(self.ranges, other))

    def difference(self, other: Ranges) -> AcknowledgedSeqs:
        return AcknowledgedSeqs.from_ranges(ranges.subtract(self.ranges, other))

    def __contains__(self, seq: int) -> bool:
        return 1 <= seq <= self.through and not any(first <= seq <= last for first, last in self.missing)


def uptime_s(saved: str, boot: int, now: ClockReading) -> float:
    """Seconds that the device was on, all its boots together; `kept` is what was written of it last."""
    if not saved:
        return now.boot_s
    then_boot, then_s, total_s = json.loads(saved)
    return float(total_s + (max(0.0, now.boot_s - then_s) if boot == then_boot else now.boot_s))


def uptime_json(boot: int, now: ClockReading, total_s: float) -> str:
    """What `uptime_s` goes on from."""
    return json.dumps([boot, now.boot_s, total_s])


def append_history(history: str, now_s: float, through: int, keep_s: float) -> str | None:
    """The list of (uptime in s, acknowledged through) with one more entry; None where the last one is young enough."""
    listed = json.loads(history) if history else []
    if listed and (now_s < listed[-1][0] + keep_s / _HISTORY_PARTS or through <= listed[-1][1]):
        return None
    return json.dumps([*listed[-2 * _HISTORY_PARTS :], [round(now_s), through]])


def expired_through(history: str, now_s: float, keep_s: float) -> int:
    """The last seq that was acknowledged `keep_s` ago; 0 where there is none."""
    listed = json.loads(history) if history else []
    return max((through for then_s, through in listed if then_s + keep_s <= now_s), default=0)
