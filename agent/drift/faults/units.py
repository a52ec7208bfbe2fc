"""Which other unit a field's readings seem to be in: what factor and offset bring them back to the reference's."""

from __future__ import annotations

import msgspec
import numpy as np

from agent.arrays import Bools, Float64s
from agent.drift.baseline.reference import Reference
from agent.drift.baseline.summary import Summary
from agent.drift.detectors import moments

RANGE_MARGIN = 0.1  # of the span of the reference, by which readings that are brought back may lie outside its limits
MAX_SPREAD_RATIO, MAX_SPREAD_RATIO_CALM = (
    2.5,
    1.6,
)  # how many times the reference's spread they may have, or the other way round
MAX_MEAN_DISTANCE = 2.0  # sd of the reference between the means
HIGH_SPREAD_RATIO = 4.0  # times the reference's spread, which is too much wherever its limits are
LOW_SPREAD_RATIO, LOW_SPREAD_Z = (
    0.2,
    -6.0,
)  # share of the reference's spread, and z of the spread within classes, that are too calm


class UnitConversion(msgspec.Struct, frozen=True):
    """What is read is `factor` times what was, and `offset` more."""

    description: str
    factor: float
    offset: float = 0.0


G, DEGREES = 9.80665, 180 / np.pi
DECIMAL_CONVERSIONS = (
    UnitConversion("1000 times what it was", 1000),
    UnitConversion("a thousandth of what it was", 1 / 1000),
    UnitConversion("10 times what it was", 10),
    UnitConversion("a tenth of what it was", 1 / 10),
)
_UNIT_ALIASES = {
    "m/s2": "m/s²", "m/s^2": "m/s²", "m/s**2": "m/s²", "degC": "°C", "C": "°C", "celsius": "°C", "degF": "°F",
    "F": "°F", "°": "deg", "°/s": "deg/s", "dps": "deg/s",
}  # fmt: skip
UNIT_CONVERSIONS = {
    "g": (UnitConversion("m/s² where g was", G), UnitConversion("mg where g was", 1000)),
    "m/s²": (UnitConversion("g where m/s² was", 1 / G),),
    "rad": (UnitConversion("degrees where radians were", DEGREES),),
    "rad/s": (UnitConversion("deg/s where rad/s was", DEGREES),),
    "deg": (UnitConversion("radians where degrees were", 1 / DEGREES),),
    "deg/s": (UnitConversion("rad/s where deg/s was", 1 / DEGREES),),
    "°C": (UnitConversion("°F where °C was", 1.8, 32), UnitConversion("K where °C was", 1, 273.15)),
    "°F": (
        UnitConversion("°C where °F was", 1 / 1.8, -32 / 1.8),
        UnitConversion("K where °F was", 1 / 1.8, 273.15 - 32 / 1.8),
    ),
    "K": (UnitConversion("°C where K was", 1, -273.15), UnitConversion("°F where K was", 1.8, 32 - 1.8 * 273.15)),
}


def candidate_conversions(unit: str) -> tuple[UnitConversion, ...]:
    """Those of a field of this unit; for one without, all there are. Of two that are hardly apart, the named one."""
    named = (
        UNIT_CONVERSIONS.get(_UNIT_ALIASES.get(unit, unit), ())
        if unit
        else tuple(one for some in UNIT_CONVERSIONS.values() for one in some)
    )
    known = [one.factor for one in named if not one.offset]
    return named + tuple(
        one for one in DECIMAL_CONVERSIONS if not any(0.9 < one.factor / factor < 1.1 for factor in known)
    )


def detect_unusual_spread(windows: Summary, reference: Reference, outside: Bools) -> tuple[Bools, Bools]:
    """Which fields (W, F) of stacked summaries move far more than the reference, and which far less than it ever did.

    Those `outside` its limits (W, F) are none of the latter.
    """
    _, sd = _row_mean_sd(windows, reference)
    loud = sd > HIGH_SPREAD_RATIO * reference.sd
    calm = ~(outside | loud) & (sd < LOW_SPREAD_RATIO * reference.sd)
    if calm.any():
        calm &= _spread_z(windows, reference) < LOW_SPREAD_Z
    return loud, calm & (sd > 0)


def recognise_units(
    summary: Summary, reference: Reference, outside: Bools, low_spread: Bools, units: tuple[str, ...]
) -> tuple[UnitConversion | None, ...]:
    """Of each field, where its readings do not fit the reference as they are but do in another unit.

    `outside` (F,) says which lie outside its limits, or move far more; `calm` (F,) which move far less.
    """
    out: list[UnitConversion | None] = [None] * len(outside)
    if not (outside | low_spread).any():
        return tuple(out)
    mean, sd = _row_mean_sd(summary, reference)
    for field in np.flatnonzero((outside | low_spread) & (sd > 0)):
        span = np.array([summary.extremes.low[field], summary.extremes.high[field]])
        allowed = MAX_SPREAD_RATIO if outside[field] else MAX_SPREAD_RATIO_CALM
        best = allowed
        for one in candidate_conversions(units[field] if units else ""):
            misfit = _compute_misfit(one, mean[field], sd[field], span, reference, int(field))
            if misfit < best and (one.factor < 1) <= (not outside[field] or bool(one.offset)):
                out[field], best = one, misfit
    return tuple(out)


def _row_mean_sd(summary: Summary, reference: Reference) -> tuple[Float64s, Float64s]:
    """(..., F) mean and sd of rows."""
    rows = summary.row_sums.moments(reference.origin[: len(reference.fields)])
    return rows.mean[..., 0, :], np.sqrt(rows.m2 / np.maximum(rows.n, 1))[..., 0, :]


def _compute_misfit(
    conversion: UnitConversion, mean: float, sd: float, span: Float64s, reference: Reference, field: int
) -> float:
    """How many times the reference's spread (or the inverse) what is brought back has; infinite where it lies apart."""
    low, high, usual = reference.low[field], reference.high[field], reference.sd[field]
    back, margin = (span - conversion.offset) / conversion.factor, RANGE_MARGIN * (high - low)
    apart = abs((mean - conversion.offset) / conversion.factor - reference.mean[field])
    if usual <= 0 or back[0] < low - margin or back[1] > high + margin or apart > MAX_MEAN_DISTANCE * usual:
        return float(np.inf)
    return float(np.exp(abs(np.log(sd / abs(conversion.factor) / usual))))


def _spread_z(summary: Summary, reference: Reference) -> Float64s:
    fields = len(reference.fields)
    found = summary.class_sums.moments(reference.origin)
    values, _ = moments.compute_test_values(
        found, reference.class_mean, reference.class_sd, windowed=reference.windowed
    )
    return np.asarray(((values - reference.test_mean[: 2 * fields]) / reference.test_sd[: 2 * fields])[..., fields:])
