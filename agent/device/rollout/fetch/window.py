"""The hours in which a metered link may be used."""

from __future__ import annotations

from datetime import datetime

from agent.clock import ClockReading
from agent.config import UpdatesConfig

_DAY_S = 86_400.0
# In 9999, for clocks of garbage.
_MAX_TIME_S = 253_402_000_000.0


def seconds_until_close(updates: UpdatesConfig, now: ClockReading) -> float:
    """Seconds until the window closes; 0 while it is closed, and while the time of day is not known.

    A folder is no link.
    """
    if updates.window_minutes is None or updates.is_folder:
        return _DAY_S
    if now.quality == "unsynced":
        return 0.0
    local = datetime.fromtimestamp(min(now.wall_us / 1e6, _MAX_TIME_S))
    begin, end = (60.0 * minute for minute in updates.window_minutes)
    since = (local.hour * 3600.0 + local.minute * 60.0 + local.second - begin) % _DAY_S
    return max(0.0, (end - begin) % _DAY_S - since)
