"""Text for people: numbers, times, and foreign text made safe to print."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta

# A spreadsheet runs a cell that begins with one of these.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
# Compiled at first use, as few starts need them.
_CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
_NUMBER = r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?"


def printable(text: str) -> str:
    """Return `text` on one line, with everything that could steer a terminal or reorder a line escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def count_columns(text: str) -> int:
    """Return the columns of a terminal that printable text takes: two for an East Asian wide character.

    Combining characters take none (UAX #11).
    """
    if text.isascii():
        return len(text)
    # Imported here: few texts need it.
    from unicodedata import category, east_asian_width

    return sum(0 if category(c) in ("Mn", "Me") else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def pad(text: str, columns: int, *, right: bool = False) -> str:
    """Fill with spaces to a number of columns of a terminal; with `right`, the text ends there."""
    spaces = " " * (columns - count_columns(text))
    return spaces + text if right else text + spaces


def printable_lines(text: str) -> str:
    """Return text of several lines, each made `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def is_unicode(text: str) -> bool:
    """Return False for text with surrogates, which stand for bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def printable_json(text: str) -> str:
    """Return the same JSON document with such characters as JSON escapes."""
    if text.isprintable():
        return text
    return "".join(char if char == "\n" or char.isprintable() else _json_escape(char) for char in text)


def _json_escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def csv_text(text: str) -> str:
    """Return a text cell that no spreadsheet runs as a formula, on one line."""
    runs = text.startswith(_FORMULA_STARTS) and not re.fullmatch(_NUMBER, text)
    return printable(f"'{text}" if runs else text)


def require_one_line(kind: str, text: str) -> None:
    """Raise ValueError if the text has a line break or another control character."""
    if re.search(_CONTROL, text):
        raise ValueError(f"{kind} {text!r} has a line break or another control character; rename it")


def require_plain_name(kind: str, name: str) -> None:
    """Raise ValueError if the header of a CSV table could not show the name of a column as it is."""
    require_one_line(kind, name)
    if not name.isprintable():
        raise ValueError(f"{kind} {name!r} has a character that cannot be printed; rename it")
    if len(name) > 1 and csv_text(name) != name:
        raise ValueError(f"{kind} {name!r} begins with = + - or @, so a spreadsheet would run it; rename it")


def mask_password(url: str) -> str:
    """Return the URL without user name and password, also where a stray `/` or `@` in them makes it invalid."""
    return re.sub(r"^([^/]*//)?.*@", r"\1***@", url, count=1, flags=re.DOTALL)


def format_value(value: float | None) -> str:
    """Format with three decimals, or with three digits where it is large or very small; a dash for None."""
    if value is None:
        return "–"
    if value == 0 or 0.001 <= abs(value) < 10:
        text = f"{value:.3f}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def format_interval(low: float | None, high: float | None) -> str:
    """Format an interval; empty without both ends."""
    return "" if low is None or high is None else f"[{format_value(low)}, {format_value(high)}]"


def format_since(t: int, last: int) -> str:
    """Format `t` (epoch µs) in UTC: the time of day if `last` is on the same day, else with the date."""
    start, end = (_to_datetime(us) for us in (t, last))
    return f"{start:%H:%M}" if start.date() == end.date() else f"{start:%Y-%m-%d %H:%M}"


def _to_datetime(us: int) -> datetime:
    # A producer may give its rows any time, also one beyond the calendar.
    seconds = us // 1_000_000
    return datetime(1970, 1, 1) + timedelta(seconds=min(max(seconds, -62_135_596_800), 253_402_300_799))


def format_windows(windows: int, t: int, last: int) -> str:
    """Format a number of drift windows of which the first begins at `t` and the last ends at `last`, epoch µs."""
    counted = "in one window" if windows == 1 else f"over {windows} windows"
    return f"{counted} (since {format_since(t, last)})"


def format_duration(us: float) -> str:
    """Format microseconds with three digits, in the largest unit that keeps the number above one; days from 1000 h."""
    if us >= 1000 * 3_600e6:
        return f"{us / 86_400e6:,.0f} d"
    for size, unit in ((3_600e6, "h"), (60e6, "min"), (1e6, "s"), (1e3, "ms")):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} µs"


def format_span(seconds: float) -> str:
    """Return seconds as `2 h 05 min`, `3 min 20 s` or `8 s`."""
    whole = round(seconds)
    if abs(whole) >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if abs(whole) >= 60 else f"{whole} s"


def list_names(names: Sequence[str], most: int = 6) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def pluralize(n: int, noun: str) -> str:
    """Return `1 alert` or `2 alerts`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
