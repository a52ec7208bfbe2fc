"""Proposed fields: type, unit and range of each column of a sample. A range is a guess that a person has to check."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from outstation.foundation.clock import parse_local, parse_rfc3339
from outstation.foundation.config.toml_files import encode_value

# Physical quantities by a word in the name: unit, and the range of sensors that measure it.
_QUANTITIES: tuple[tuple[str, str, float, float], ...] = (
    ("temperature|temperatur|temp|tmp", "°C", -60.0, 150.0),
    ("humidity|hum|rh|feuchte", "%", 0.0, 100.0),
    ("battery|soc", "%", 0.0, 100.0),
    ("pressure|baro", "hPa", 300.0, 1200.0),
    ("co2|eco2", "ppm", 0.0, 20_000.0),
    ("pm1|pm25|pm2_5|pm10", "µg/m³", 0.0, 2000.0),
    ("tvoc|voc", "ppb", 0.0, 60_000.0),
    ("illuminance|lux", "lx", 0.0, 200_000.0),
    ("linkquality|lqi", "", 0.0, 255.0),
    ("rssi", "dBm", -130.0, 0.0),
)
_TIME_NAMES = ("t", "time", "timestamp", "datetime", "date", "ts", "last_seen")
_LOCAL = "a time without a time zone"
_SECONDS, _MILLISECONDS = (1e8, 4.1e9), (1e11, 4.1e12)
_MAX_CATEGORIES, _MAX_TEXT_CHARS = 50, 100
# Whole numbers beyond this lose digits as f32.
_MAX_F32_INTEGER = 2**24
# More than f32 rounds a value by.
_MIN_RELATIVE_MARGIN = 1e-6
# Beyond this the limits are no numbers any more.
_MAX_LIMIT = 1e300
_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,63}")


class ProposedField(msgspec.Struct, frozen=True):
    """Field of a stream; `place` is its column or JSONPath in the sample."""

    name: str
    place: str
    type: str = "f32"
    unit: str = ""
    min: float | None = None
    max: float | None = None
    optional: bool = False

    def to_toml(self) -> str:
        parts = [f"name = {encode_value(self.name)}"]
        parts += [f"type = {encode_value(self.type)}"] if self.type != "f32" else []
        parts += [f"unit = {encode_value(self.unit)}"] if self.unit else []
        # All digits: a limit that is rounded may reject the rows that it was proposed from.
        limits = (("min", self.min), ("max", self.max))
        parts += [f"{key} = {repr(value).removesuffix('.0')}" for key, value in limits if value is not None]
        parts += ["optional = true"] if self.optional else []
        return f"{{ {', '.join(parts)} }}"


class Columns(msgspec.Struct, frozen=True):
    """Fields of a sample, the place of its time, whether that names no zone, and what was left out, as sentences."""

    fields: list[ProposedField]
    time: str | None
    is_local: bool
    notes: list[str]


def propose_columns(sample: Mapping[str, Sequence[Any]]) -> Columns:
    """Return the fields of a sample: place → values, None for a missing one."""
    fields: list[ProposedField] = []
    notes: list[str] = []
    time: str | None = None
    is_local = False
    names: set[str] = set()
    for place, values in sample.items():
        if not place:
            notes.append("a column without a name is left out")
            continue
        present = [value for value in values if value is not None and value != ""]
        if not present:
            notes.append(f"{place} is always empty, and left out")
            continue
        if _is_time(place, present):
            problem = _find_time_problem(present)
            if time is None and problem in ("", _LOCAL):
                time, is_local = place, problem == _LOCAL
            else:
                notes.append(f"{place} is {problem or 'another time'}, and left out")
            continue
        name = make_name(place, names)
        numbers = [_to_number(value) for value in present]
        if all(number is not None for number in numbers):
            fields.append(_propose_number(name, place, [n for n in numbers if n is not None], values))
        elif problem := _find_text_problem(present):
            notes.append(f"{place} {problem}, and left out")
            continue
        else:
            fields.append(ProposedField(name, place, "category", optional=len(present) < len(values)))
        names.add(name)
    return Columns(fields, time, is_local, notes)


def make_name(place: str, taken: set[str]) -> str:
    """Return a valid field name that is not `taken`."""
    text = re.sub(r"[^A-Za-z0-9_]+", "_", place.removeprefix("$")).strip("_").lower()[:60] or "value"
    text = text if _FIELD_NAME.fullmatch(text) and text not in ("t", "stream", "columns") else f"f_{text}"
    name, number = text, 1
    while name in taken:
        number += 1
        name = f"{text}_{number}"
    return name


def _propose_number(name: str, place: str, numbers: Sequence[float], values: Sequence[Any]) -> ProposedField:
    low, high = min(numbers), max(numbers)
    kind = "f64" if max(abs(low), abs(high)) > _MAX_F32_INTEGER else "f32"
    optional = len(numbers) < len(values)
    words = set(re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", place).lower()))
    for pattern, unit, least, most in _QUANTITIES:
        if words & set(pattern.split("|")) and least <= low and high <= most:
            return ProposedField(name, place, kind, unit, least, most, optional)
    return ProposedField(name, place, kind, "", *_widen(low, high), optional)


def _widen(low: float, high: float) -> tuple[float | None, float | None]:
    """Return limits far around what was seen; none for a value that never changed, or near the largest number."""
    largest = max(abs(low), abs(high))
    if low == high or largest > _MAX_LIMIT:
        return None, None
    margin = max(2 * (high - low), _MIN_RELATIVE_MARGIN * largest)
    digits = -math.floor(math.log10(margin))
    least, most = round(low - margin, digits), round(high + margin, digits)
    return (0.0 if low >= 0 > least else least), most


def _to_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip()
        if not text.isascii() or "_" in text:
            return None
        try:
            value = float(re.sub(r"^([+-]?\d+),(\d+)$", r"\1.\2", text))
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _is_time(place: str, values: Sequence[Any]) -> bool:
    last = re.split(r"[^A-Za-z0-9_]+", place.strip("']"))[-1].lower()
    return last in _TIME_NAMES or (isinstance(values[0], str) and _find_time_problem(values) != "no time")


def _find_time_problem(values: Sequence[Any]) -> str:
    """Return why these are no times that the intake reads, "" if they are."""
    numbers = [_to_number(value) for value in values]
    if all(number is not None and _SECONDS[0] < number < _SECONDS[1] for number in numbers):
        return ""
    if all(number is not None and _MILLISECONDS[0] < number < _MILLISECONDS[1] for number in numbers):
        return "a time in milliseconds, where seconds are needed"
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(values):
        return "no time"
    if all(parse_local(text) is not None for text in texts):
        return _LOCAL
    try:
        for text in texts:
            parse_rfc3339(text.strip())
    except ValueError:
        return "no time"
    return ""


def _find_text_problem(values: Sequence[Any]) -> str:
    if any(isinstance(value, bool) for value in values):
        return "is true or false, which is no number"
    if not all(isinstance(value, str) for value in values):
        return "is neither a number nor a text"
    if any(len(value) > _MAX_TEXT_CHARS or not value.isprintable() for value in values):
        return "holds long or unprintable texts"
    if len(set(values)) > _MAX_CATEGORIES or (len(values) > 4 and len(set(values)) == len(values)):
        return "holds a new text in nearly each row"
    return ""
