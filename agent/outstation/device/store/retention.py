"""Retention: which messages are acknowledged, how long they stay, and how soon undelivered data must go.

An acknowledged message stays in the outbox for `[buffer] keep_messages`, for a collector that is restored from a backup
and asks for it again. That time is counted in uptime, over all boots: a clock that is set by years deletes nothing.
A task's newest results messages stay longer, however they were delivered: `outstation results` shows them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from itertools import combinations

import msgspec

from outstation.foundation import ranges
from outstation.foundation.clock import ClockReading
from outstation.foundation.ranges import Ranges

# Names in table meta: acknowledged seqs, the last acknowledgement, unacknowledged messages and bytes, (uptime, seq) of
# past acknowledgements, uptime at a moment, samples of `Growth`.
ACKNOWLEDGED, ACKNOWLEDGEMENT, BACKLOG = "acknowledged", "acknowledgement", "backlog"
ACKNOWLEDGED_HISTORY, UPTIME, GROWTH = "acknowledged history", "uptime", "growth"
# (uptime, last seq written) at past moments.
WRITTEN_HISTORY = "written history"
# Followed by a task: its `NewestResults`.
NEWEST_RESULTS = "newest results "
# For each task. A screen of results, also where each message has a single one.
MAX_NEWEST_MESSAGES, MAX_NEWEST_BYTES = 20, 64 << 10
# A message stays up to 1/48 longer than it must; the history has at most twice as many entries.
_HISTORY_PARTS = 48
_SLOT_S = 600.0
_RECENT_SLOTS, _MAX_SLOTS, _MIN_SLOTS = 7, 145, 3
# Beyond that it is no forecast.
_MAX_HORIZON_H = 10 * 365 * 24.0

Sample = tuple[float, int]


class AcknowledgedSeqs(msgspec.Struct, frozen=True):
    """Every seq up to `through` except those in `missing`, which ascend and end before `through`."""

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


class NewestResults(msgspec.Struct, frozen=True):
    """Seq and bytes of a task's newest results messages in the outbox, in the order in which they were written.

    At most `MAX_NEWEST_MESSAGES` of together `MAX_NEWEST_BYTES`; the last one stays whatever its size.
    """

    messages: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_json(cls, text: str) -> NewestResults:
        return cls(tuple((seq, size) for seq, size in json.loads(text))) if text else cls()

    def to_json(self) -> str:
        return json.dumps(self.messages, separators=(",", ":"))

    @property
    def seqs(self) -> set[int]:
        return {seq for seq, _ in self.messages}

    def append(self, seq: int, size: int) -> NewestResults:
        selected, room = [(seq, size)], MAX_NEWEST_BYTES - size
        for message in reversed(self.messages[-MAX_NEWEST_MESSAGES + 1 :]):
            room -= message[1]
            if room < 0:
                break
            selected.append(message)
        return NewestResults(tuple(reversed(selected)))

    def without(self, seqs: Collection[int]) -> NewestResults:
        return NewestResults(tuple(message for message in self.messages if message[0] not in seqs))


def uptime_s(saved: str, boot: int, now: ClockReading) -> float:
    """Return the seconds that the device was on, over all boots; `saved` is the last `uptime_json`."""
    if not saved:
        return now.boot_s
    then_boot, then_s, total_s = json.loads(saved)
    return float(total_s + (max(0.0, now.boot_s - then_s) if boot == then_boot else now.boot_s))


def uptime_json(boot: int, now: ClockReading, total_s: float) -> str:
    """Encode the uptime at `now`, from which `uptime_s` continues."""
    return json.dumps([boot, now.boot_s, total_s])


def append_history(history: str, now_s: float, through: int, keep_s: float) -> str | None:
    """Append to the list of (uptime in s, last seq); None if the last entry is recent enough."""
    entries = json.loads(history) if history else []
    if entries and (now_s < entries[-1][0] + keep_s / _HISTORY_PARTS or through <= entries[-1][1]):
        return None
    return json.dumps([*entries[-2 * _HISTORY_PARTS :], [round(now_s), through]])


def expired_through(history: str, now_s: float, keep_s: float) -> int:
    """Return the last seq of the entries that are `keep_s` old; 0 if there is none."""
    entries = json.loads(history) if history else []
    return max((through for then_s, through in entries if then_s + keep_s <= now_s), default=0)


class Growth(msgspec.Struct):
    """Growth of the data that cannot be deleted: (uptime in s, bytes) at the minimum of each past slot.

    These bytes rise and fall with every batch and acknowledgement, so of each ten minutes only the minimum counts. The
    pace is the median of the slopes between minima (Theil 1950, Sen 1968), of the last hour or of the last day,
    whichever is steeper. Uptime continues after a restart and leaves out the time that the device was off.
    """

    samples: list[Sample] = msgspec.field(default_factory=list)
    _slot_start_s: float | None = None
    _slot_minimum: Sample | None = None

    @classmethod
    def from_json(cls, text: str) -> Growth:
        return cls([(float(at_s), int(size)) for at_s, size in json.loads(text)] if text else [])

    def to_json(self) -> str:
        return json.dumps([[round(at_s), size] for at_s, size in self.samples])

    def add_sample(self, uptime_s: float, size: int) -> bool:
        """Add a sample. Return True if a slot ended, so that the samples should be saved."""
        if self._slot_start_s is None:
            self._slot_start_s = uptime_s
        ended = uptime_s >= self._slot_start_s + _SLOT_S
        if ended and self._slot_minimum is not None:
            self.samples = [*self.samples, self._slot_minimum][-_MAX_SLOTS:]
            self._slot_start_s, self._slot_minimum = uptime_s, None
        if self._slot_minimum is None or size <= self._slot_minimum[1]:
            self._slot_minimum = uptime_s, size
        return ended

    def hours_until(self, limit: int) -> float | None:
        """Return the hours until `limit` bytes are reached; None if that is not in sight, or not known yet."""
        pace = max(_theil_sen_slope(self.samples[-_RECENT_SLOTS:]), _theil_sen_slope(self.samples))
        if pace <= 0.0:
            return None
        hours = max(0.0, (limit - self.samples[-1][1]) / pace / 3600.0)
        return round(hours, 1) if hours <= _MAX_HORIZON_H else None


def _theil_sen_slope(samples: list[Sample]) -> float:
    """Return bytes per second; 0 for too few samples."""
    if len(samples) < _MIN_SLOTS:
        return 0.0
    thinned = samples[:: max(1, len(samples) // 24)]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in combinations(thinned, 2) if t > s]
    if not slopes:
        return 0.0
    ordered, middle = sorted(slopes), len(slopes) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
