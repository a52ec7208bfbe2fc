"""Times, spans and counts as people read them."""

from __future__ import annotations

from agent import clock

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def format_time(text: str | None) -> str:
    """`24 Nov 2026, 22:18` of an RFC 3339 time in UTC."""
    if not text:
        return "not known"
    return f"{format_date(text)}, {text[11:16]}"


def format_date(text: str) -> str:
    try:
        return f"{int(text[8:10])} {_MONTHS[int(text[5:7]) - 1]} {text[:4]}"
    except (ValueError, IndexError):
        return text[:40]


def format_duration(seconds: float | None) -> str:
    """The two largest units of it; a dash where it is not known."""
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


def format_names(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def parse_epoch_us(text: str | None) -> int | None:
    """Epoch µs; None where it is no time."""
    try:
        return clock.parse_rfc3339(text) if text else None
    except ValueError:
        return None
