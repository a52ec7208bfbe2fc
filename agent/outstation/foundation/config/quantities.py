"""Sizes and durations with units, as in config files."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DURATIONS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
# Few enough digits that every unit gives a finite number.
_QUANTITY = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]+)\s*")
# Between the parts of "2 h 05 min", as reports print it.
_PART_GAP = re.compile(r"(?<=[A-Za-z])\s+(?=\d)")


class Size(int):
    """Bytes, written `"512 MiB"`."""


class Duration(float):
    """Seconds, written `"10 s"`, `"72 h"`."""


def parse_size(text: str) -> Size:
    """Parse `"512 MiB"` to bytes. Raises ValueError."""
    return Size(round(_parse_quantity(text, _SIZES)))


def parse_duration(text: str) -> Duration:
    """Parse `"10 s"`, `"72 h"`, `"2 h 05 min"` to seconds; the larger unit comes first. Raises ValueError."""
    return Duration(_parse_quantity(text, _DURATIONS))


def decode_quantity(kind: type, value: Any) -> Any:
    """Decode hook of msgspec for Size and Duration. Raises ValueError."""
    if kind is Size:
        return parse_size(value)
    if kind is Duration:
        return parse_duration(value)
    raise NotImplementedError(kind)


def _parse_quantity(text: str, units: dict[str, Any]) -> float:
    parts = _PART_GAP.split(text) if isinstance(text, str) else []
    matches = [match for part in parts if (match := _QUANTITY.fullmatch(part))]
    sizes = [size for match in matches for unit, size in units.items() if unit.lower() == match[2].lower()]
    if not parts or len(sizes) < len(parts) or any(second >= first for first, second in pairwise(sizes)):
        examples = '"512 MiB"' if units is _SIZES else '"10 s" or "2 h 30 min"'
        raise ValueError(f"{text!r} must be a number with a unit: {', '.join(units)}; such as {examples}")
    return sum(float(match[1]) * float(size) for match, size in zip(matches, sizes, strict=True))
