"""The hours in which a metered link may be used."""

from __future__ import annotations

from datetime import datetime

from agent.clock import Now
from agent.config import Updates

_DAY_S = 86_400.0
# In 9999, for clocks of garbage.
_LATEST_S = 253_402_000_000.0


def open_for_s(updates: Updates, now: Now) -> float:
    """Seconds until the window closes; 0 while it is closed, and while the time of day is not known.

    A folder is no link.
    """
    if updates.minutes is None or updates.is_folder:
        return _DAY_S
    if now.quality == "unsynced":
        return 0.0
    local = datetime.fromtimestamp(min(now.wall_us / 1e6, _LATEST_S))
    begin, end = (60.0 * minute for minute in updates.minutes)
    since = (local.hour * 3600.0 + local.minute * 60.0 + local.second - begin) % _DAY_S
    return max(0.0, (end - begin) % _DAY_S - since)
