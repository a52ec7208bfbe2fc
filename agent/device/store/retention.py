"""Which messages are acknowledged, and how long they are kept all the same.

A message that the collector has stays in the outbox for `[buffer] keep_messages`, for a collector that is restored from
a backup and asks for it again. How long that is, is measured in time that passed while the device was on: a clock that
is set by years deletes nothing.
"""

from __future__ import annotations

import json

import msgspec

from agent.clock import Now
from agent.device.store import ranges
from agent.device.store.ranges import Ranges

# Names in table meta.
ACKNOWLEDGED, ACKNOWLEDGEMENT, WAITING, STEPS, UPTIME = (
    "acknowledged",
    "acknowledgement",
    "waiting",
    "acknowledged when",
    "uptime",
)
# A message is kept up to one part longer than it must be, for a list of so many entries.
_PARTS = 48


class Acknowledged(msgspec.Struct, frozen=True):
    """Every seq up to `through` but those in `missing`, which ascend and end before `through`."""

    through: int = 0
    missing: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, covered: Ranges) -> Acknowledged:
        through = covered[-1][1] if covered else 0
        return cls(through, tuple(ranges.subtract([(1, through)] if through else [], covered)))

    @classmethod
    def from_json(cls, text: str) -> Acknowledged:
        if not text:
            return cls()
        through, missing = json.loads(text)
        return cls(through, tuple((first, last) for first, last in missing))

    def to_json(self) -> str:
        return json.dumps([self.through, self.missing], separators=(",", ":"))

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return ranges.subtract([(1, self.through)] if self.through else [], self.missing)

    def also(self, more: Ranges) -> Acknowledged:
        return Acknowledged.of(ranges.unite(self.ranges, more))

    def without(self, less: Ranges) -> Acknowledged:
        return Acknowledged.of(ranges.subtract(self.ranges, less))

    def __contains__(self, seq: int) -> bool:
        return 1 <= seq <= self.through and not any(first <= seq <= last for first, last in self.missing)


def uptime_s(kept: str, boot: int, now: Now) -> float:
    """Seconds that the device was on, all its boots together; `kept` is what was written of it last."""
    if not kept:
        return now.boot_s
    then_boot, then_s, total_s = json.loads(kept)
    return float(total_s + (max(0.0, now.boot_s - then_s) if boot == then_boot else now.boot_s))


def uptime_json(boot: int, now: Now, total_s: float) -> str:
    """What `uptime_s` goes on from."""
    return json.dumps([boot, now.boot_s, total_s])


def with_step(steps: str, at_s: float, through: int, keep_s: float) -> str | None:
    """The list of (uptime in s, acknowledged through) with one more entry; None where the last one is young enough."""
    listed = json.loads(steps) if steps else []
    if listed and (at_s < listed[-1][0] + keep_s / _PARTS or through <= listed[-1][1]):
        return None
    return json.dumps([*listed[-2 * _PARTS :], [round(at_s), through]])


def expired(steps: str, at_s: float, keep_s: float) -> int:
    """The last seq that was acknowledged `keep_s` ago; 0 where there is none."""
    listed = json.loads(steps) if steps else []
    return max((through for then_s, through in listed if then_s + keep_s <= at_s), default=0)
