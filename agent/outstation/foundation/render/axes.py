"""Axis ticks at round numbers and round times, with their labels."""

from __future__ import annotations

import math

from outstation.foundation import clock

_TIME_STEPS_S = (
    *(1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200),
    *(86_400, 172_800, 604_800, 1_209_600, 2_592_000, 7_776_000, 31_536_000, 157_680_000, 630_720_000),
)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` multiples of 1, 2 or 5 times a power of ten from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def format_number(value: float) -> str:
    if value == 0 or abs(value) < 1e-12:
        return "0"
    return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("-", "−")


def time_ticks(begin: int, end: int, count: int) -> list[tuple[int, str]]:
    """Return (epoch µs, label) of at most `count` + 1 round times in UTC."""
    span_s = max(1e-6, (end - begin) / 1e6)
    longest = _TIME_STEPS_S[-1] * math.ceil(span_s / _TIME_STEPS_S[-1] / count)
    step = next((s for s in _TIME_STEPS_S if span_s / s <= count), longest)
    first = math.ceil(begin / 1e6 / step)
    return [
        (i * step * 1_000_000, _time_label(i * step, step)) for i in range(first, int(end // 1_000_000) // step + 1)
    ]


def format_time(us: int) -> str:
    return f"{clock.to_datetime(us):%Y-%m-%d %H:%M}"


def _time_label(second: int, step: int) -> str:
    when = clock.to_datetime(second * 1_000_000)
    if step >= 86_400:
        return f"{when:%Y-%m-%d}" if step >= 31_536_000 else f"{when:%b} {when.day}"
    if when.hour == when.minute == when.second == 0:
        return f"{when:%b} {when.day}"
    return f"{when:%H:%M:%S}" if step < 60 else f"{when:%H:%M}"
