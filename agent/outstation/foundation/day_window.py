"""Window of the day: a time range such as "01:00-05:00" in local time, which may span midnight."""

import re
from datetime import datetime

import msgspec

from outstation.foundation.clock import ClockReading

DAY_S = 86_400.0
_TIME = r"([01]\d|2[0-3]):([0-5]\d)"
_PATTERN = rf"{_TIME}-{_TIME}"
# In the year 9999: a broken clock may show a later time.
_MAX_TIME_S = 253_402_000_000.0


class DayWindow(msgspec.Struct, frozen=True):
    """Begin and end in minutes of the local day."""

    begin: int
    end: int

    @classmethod
    def parse(cls, text: str) -> "DayWindow":
        """Parse `"01:00-05:00"`. Raises ValueError."""
        match = re.fullmatch(_PATTERN, text, re.ASCII)
        window = match and cls(int(match[1]) * 60 + int(match[2]), int(match[3]) * 60 + int(match[4]))
        if not window or window.begin == window.end:
            raise ValueError(f'{text!r} is not a time range like "01:00-05:00"')
        return window

    @property
    def duration_s(self) -> float:
        return 60.0 * (self.end - self.begin) % DAY_S

    def seconds_until_close(self, now: ClockReading) -> float:
        """Return the seconds until the window closes; 0 while it is closed or the time of day is unknown."""
        if now.quality == "unsynced":
            return 0.0
        local = datetime.fromtimestamp(min(now.wall_us / 1e6, _MAX_TIME_S))
        since_s = (local.hour * 3600.0 + local.minute * 60.0 + local.second - 60.0 * self.begin) % DAY_S
        return max(0.0, self.duration_s - since_s)
