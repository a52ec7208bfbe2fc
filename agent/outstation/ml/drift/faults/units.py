"""Changed units: the factor and offset that bring a field's readings back to its reference."""

from __future__ import annotations

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s, any_true
from outstation.ml.drift.baseline.fault_limits import FaultLimits
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.detectors import moments

RANGE_MARGIN = 0.1  # of the reference's span: converted readings may lie outside its limits by so much
MAX_SPREAD_RATIO, MAX_SPREAD_RATIO_CALM = 2.5, 1.6  # of the converted readings' spread to the reference's, or inverse
MAX_MEAN_DISTANCE = 2.0  # reference sd between the means
HIGH_SPREAD_RATIO = 4.0  # times the reference's spread: too much, whatever its limits
LOW_SPREAD_RATIO, LOW_SPREAD_Z = 0.2, -6.0  # of the reference's spread, and score of the spread within classes


class UnitConversion(msgspec.Struct, frozen=True):
    """Conversion: readings are `factor` times what they were, and `offset` more."""

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
    """Return the conversions of a unit; named ones replace close decimal ones. A field without one has decimal ones."""
    named = UNIT_CONVERSIONS.get(_UNIT_ALIASES.get(unit, unit), ())
    known = [conversion.factor for conversion in named if not conversion.offset]
    return named + tuple(
        conversion
        for conversion in DECIMAL_CONVERSIONS
        if not any(0.9 < conversion.factor / factor < 1.1 for factor in known)
    )


def detect_unusual_spread(
    windows: Summary, reference: Reference, limits: FaultLimits, outside: Bools
) -> tuple[Bools, Bools]:
    """Return which fields (W, F) move far more than the reference and learned windows ever did, and which far less.

    Fields `outside` its limits (W, F) are none of the latter.
    """
    _, sd = row_mean_sd(windows, reference)
    loud = sd > np.maximum(HIGH_SPREAD_RATIO, np.exp(limits.loud)) * reference.sd
    calm = ~(outside | loud) & (sd < np.minimum(LOW_SPREAD_RATIO, np.exp(-limits.calm)) * reference.sd)
    if any_true(calm):
        calm &= _spread_z(windows, reference) < LOW_SPREAD_Z
    return loud, calm & (sd > 0)


def recognise_units(
    summary: Summary, reference: Reference, outside: Bools, low_spread: Bools, units: tuple[str, ...]
) -> tuple[UnitConversion | None, ...]:
    """Return the conversion of each field whose readings fit the reference in another unit only.

    `outside` (F,) lie outside its limits, or move far more; `low_spread` (F,) move far less.
    """
    out: list[UnitConversion | None] = [None] * len(outside)
    if not any_true(outside | low_spread):
        return tuple(out)
    mean, sd = row_mean_sd(summary, reference)
    for field in np.flatnonzero((outside | low_spread) & (sd > 0)):
        span = np.array([summary.extremes.low[field], summary.extremes.high[field]])
        allowed = MAX_SPREAD_RATIO if outside[field] else MAX_SPREAD_RATIO_CALM
        best = allowed
        for conversion in candidate_conversions(units[field] if units else ""):
            misfit = _compute_misfit(conversion, mean[field], sd[field], span, reference, int(field))
            if misfit < best and (conversion.factor < 1) <= (not outside[field] or bool(conversion.offset)):
                out[field], best = conversion, misfit
    return tuple(out)


def row_mean_sd(summary: Summary, reference: Reference) -> tuple[Float64s, Float64s]:
    """(..., F) mean and sd of rows."""
    rows = summary.row_sums.moments(reference.origin[: len(reference.fields)])
    return rows.mean[..., 0, :], np.sqrt(rows.m2 / np.maximum(rows.n, 1))[..., 0, :]


def _compute_misfit(
    conversion: UnitConversion, mean: float, sd: float, span: Float64s, reference: Reference, field: int
) -> float:
    """Return the ratio of the converted readings' spread to the reference's, above 1; infinite where they lie apart."""
    low, high, usual = reference.low[field], reference.high[field], reference.sd[field]
    back, margin = (span - conversion.offset) / conversion.factor, RANGE_MARGIN * (high - low)
    distance = abs((mean - conversion.offset) / conversion.factor - reference.mean[field])
    if usual <= 0 or back[0] < low - margin or back[1] > high + margin or distance > MAX_MEAN_DISTANCE * usual:
        return float(np.inf)
    return float(np.exp(abs(np.log(sd / abs(conversion.factor) / usual))))


def _spread_z(summary: Summary, reference: Reference) -> Float64s:
    fields = len(reference.fields)
    class_moments = summary.class_sums.moments(reference.origin)
    values, _ = moments.compute_test_values(
        class_moments, reference.class_mean, reference.class_sd, windowed=reference.windowed
    )
    return np.asarray(((values - reference.test_mean[: 2 * fields]) / reference.test_sd[: 2 * fields])[..., fields:])
