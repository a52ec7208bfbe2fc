"""Text of the page for times, durations, counts and names."""

from __future__ import annotations

from outstation.foundation import clock

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def format_time(text: str | None) -> str:
    """Return `24 Nov 2026, 22:18` for an RFC 3339 time in UTC."""
    return f"{format_date(text)}, {text[11:16]}" if text else "unknown"


def format_time_range(first: str, last: str) -> str:
    """Return both times, or one if they are equal to the minute."""
    begin, end = format_time(first), format_time(last)
    return begin if begin == end else f"{begin} to {end}"


def format_date(text: str) -> str:
    try:
        return f"{int(text[8:10])} {_MONTHS[int(text[5:7]) - 1]} {text[:4]}"
    except (ValueError, IndexError):
        return text[:40]


def format_duration(seconds: float | None) -> str:
    """Return the two largest units of a duration, or a dash if it is unknown."""
    if seconds is None:
        return "–"
    left = round(seconds)
    parts: list[str] = []
    for size, name in _UNITS:
        if left >= size and len(parts) < 2:
            parts.append(f"{left // size} {name}")
            left %= size
        elif parts:
            break
    return " ".join(parts) or "under 1 s"


def format_count(n: int, singular: str, plural: str = "") -> str:
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def parse_epoch_us(text: str | None) -> int | None:
    """Return epoch µs, None if the text is not an RFC 3339 time."""
    try:
        return clock.parse_rfc3339(text) if text else None
    except ValueError:
        return None
