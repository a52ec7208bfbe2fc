"""Times and amounts of time in sentences."""

from __future__ import annotations

from datetime import UTC, datetime


def format_since(t: int, last: int) -> str:
    """`t` (epoch µs) in UTC: the hour on the day of `last`, or the day."""
    at, end = (datetime.fromtimestamp(x / 1e6, UTC) for x in (t, last))
    return f"{at:%H:%M}" if at.date() == end.date() else f"{at:%Y-%m-%d %H:%M}"


def format_windows(windows: int, t: int, last: int) -> str:
    """How many windows, the first begun at `t`, the last ended at `last`."""
    counted = "in one window" if windows == 1 else f"over {windows} windows"
    return f"{counted} (since {format_since(t, last)})"


def format_duration(us: float) -> str:
    """To three digits, in the unit that reads best."""
    for size, unit in ((3_600e6, "h"), (60e6, "min"), (1e6, "s"), (1e3, "ms")):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} µs"
