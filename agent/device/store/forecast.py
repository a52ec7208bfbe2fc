"""How long until something undelivered would have to go, from how what cannot go has grown.

What cannot go rises and falls with every batch and every acknowledgement. Of each ten minutes only the least
counts, and the pace is the median of the slopes between these (Theil 1950, Sen 1968): of the last hour, or of the last
day where that is steeper. Time is the device's own, off times left out, so it goes on where it was after a restart.
"""

from __future__ import annotations

import json
from itertools import combinations
from statistics import median

import msgspec

GROWTH = "growth"
_SLOT_S = 600.0
_RECENT_SLOTS, _MAX_SLOTS = 7, 145
_MIN_SLOTS = 3
# Beyond that it is no forecast.
_MAX_HORIZON_H = 10 * 365 * 24.0

Sample = tuple[float, int]


class Growth(msgspec.Struct):
    """(uptime in s, bytes that cannot go) at the low point of each past slot, and of the one that runs."""

    samples: list[Sample] = msgspec.field(default_factory=list)
    _slot_start_s: float | None = None
    _slot_minimum: Sample | None = None

    @classmethod
    def from_json(cls, text: str) -> Growth:
        return cls([(float(at_s), int(size)) for at_s, size in json.loads(text)] if text else [])

    def to_json(self) -> str:
        return json.dumps([[round(at_s), size] for at_s, size in self.samples])

    def add_sample(self, uptime_s: float, size: int) -> bool:
        """Note what cannot go now; whether a slot ended, so that it is time to write this down."""
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
        """Until `limit` bytes are reached; None where that does not come, or is not known yet."""
        pace = max(_theil_sen_slope(self.samples[-_RECENT_SLOTS:]), _theil_sen_slope(self.samples))
        if pace <= 0.0:
            return None
        hours = max(0.0, (limit - self.samples[-1][1]) / pace / 3600.0)
        return round(hours, 1) if hours <= _MAX_HORIZON_H else None


def _theil_sen_slope(samples: list[Sample]) -> float:
    """Bytes per second; 0 where there are too few to tell."""
    if len(samples) < _MIN_SLOTS:
        return 0.0
    thinned = samples[:: max(1, len(samples) // 24)]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in combinations(thinned, 2) if t > s]
    return median(slopes) if slopes else 0.0
