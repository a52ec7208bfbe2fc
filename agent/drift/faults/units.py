"""Which other unit a field's readings seem to be in: what factor and offset bring them back to the reference's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from agent.arrays import Bools, Floats
from agent.drift.detectors import window_statistics

if TYPE_CHECKING:
    from agent.drift.baseline.reference import Reference
    from agent.drift.baseline.summary import Summary

WIDER = 0.1  # of the span of the reference, by which readings that are brought back may lie outside its limits
SPREADS, SPREADS_CALM = 2.5, 1.6  # how many times the reference's spread they may have, or the other way round
APART = 2.0  # sd of the reference between the means
LARGER = 4.0  # times the reference's spread, which is too much wherever its limits are
SMALLER, CALM = 0.2, -6.0  # share of the reference's spread, and z of the spread within classes, that are too calm


class Unit(msgspec.Struct, frozen=True):
    """What is read is `factor` times what was, and `offset` more."""

    told: str
    factor: float
    offset: float = 0.0


G, DEGREES = 9.80665, 180 / np.pi
DECIMAL = (
    Unit("1000 times what it was", 1000),
    Unit("a thousandth of what it was", 1 / 1000),
    Unit("10 times what it was", 10),
    Unit("a tenth of what it was", 1 / 10),
)
_SPELLED = {
    "m/s2": "m/s²", "m/s^2": "m/s²", "m/s**2": "m/s²", "degC": "°C", "C": "°C", "celsius": "°C", "degF": "°F",
    "F": "°F", "°": "deg", "°/s": "deg/s", "dps": "deg/s",
}  # fmt: skip
OTHERS = {
    "g": (Unit("m/s² where g was", G), Unit("mg where g was", 1000)),
    "m/s²": (Unit("g where m/s² was", 1 / G),),
    "rad": (Unit("degrees where radians were", DEGREES),),
    "rad/s": (Unit("deg/s where rad/s was", DEGREES),),
    "deg": (Unit("radians where degrees were", 1 / DEGREES),),
    "deg/s": (Unit("rad/s where deg/s was", 1 / DEGREES),),
    "°C": (Unit("°F where °C was", 1.8, 32), Unit("K where °C was", 1, 273.15)),
    "°F": (Unit("°C where °F was", 1 / 1.8, -32 / 1.8), Unit("K where °F was", 1 / 1.8, 273.15 - 32 / 1.8)),
    "K": (Unit("°C where K was", 1, -273.15), Unit("°F where K was", 1.8, 32 - 1.8 * 273.15)),
}


def candidates(unit: str) -> tuple[Unit, ...]:
    """Those of a field of this unit; for one without, all there are. Of two that are hardly apart, the named one."""
    named = OTHERS.get(_SPELLED.get(unit, unit), ()) if unit else tuple(one for some in OTHERS.values() for one in some)
    known = [one.factor for one in named if not one.offset]
    return named + tuple(one for one in DECIMAL if not any(0.9 < one.factor / factor < 1.1 for factor in known))


def odd_spread(windows: Summary, reference: Reference, outside: Bools) -> tuple[Bools, Bools]:
    """Which fields (W, F) of stacked summaries move far more than the reference, and which far less than it ever did.

    Those `outside` its limits (W, F) are none of the latter.
    """
    _, sd = _told(windows, reference)
    loud = sd > LARGER * reference.sd
    calm = ~(outside | loud) & (sd < SMALLER * reference.sd)
    if calm.any():
        calm &= _spread_z(windows, reference) < CALM
    return loud, calm & (sd > 0)


def recognised(
    summary: Summary, reference: Reference, outside: Bools, calm: Bools, units: tuple[str, ...]
) -> tuple[Unit | None, ...]:
    """Of each field, where its readings do not fit the reference as they are but do in another unit.

    `outside` (F,) says which lie outside its limits, or move far more; `calm` (F,) which move far less.
    """
    out: list[Unit | None] = [None] * len(outside)
    if not (outside | calm).any():
        return tuple(out)
    mean, sd = _told(summary, reference)
    for field in np.flatnonzero((outside | calm) & (sd > 0)):
        span = np.array([summary.extremes.low[field], summary.extremes.high[field]])
        allowed = SPREADS if outside[field] else SPREADS_CALM
        best = allowed
        for one in candidates(units[field] if units else ""):
            misfit = _misfit(one, mean[field], sd[field], span, reference, int(field))
            if misfit < best and (one.factor < 1) <= (not outside[field] or bool(one.offset)):
                out[field], best = one, misfit
    return tuple(out)


def _told(summary: Summary, reference: Reference) -> tuple[Floats, Floats]:
    """(..., F) mean and sd of rows."""
    rows = summary.rows_of.moments(reference.origin[: len(reference.fields)])
    return rows.mean[..., 0, :], np.sqrt(rows.m2 / np.maximum(rows.n, 1))[..., 0, :]


def _misfit(one: Unit, mean: float, sd: float, span: Floats, reference: Reference, field: int) -> float:
    """How many times the reference's spread (or the inverse) what is brought back has; infinite where it lies apart."""
    low, high, usual = reference.low[field], reference.high[field], reference.sd[field]
    back, margin = (span - one.offset) / one.factor, WIDER * (high - low)
    apart = abs((mean - one.offset) / one.factor - reference.mean[field])
    if usual <= 0 or back[0] < low - margin or back[1] > high + margin or apart > APART * usual:
        return float(np.inf)
    return float(np.exp(abs(np.log(sd / abs(one.factor) / usual))))


def _spread_z(summary: Summary, reference: Reference) -> Floats:
    fields = len(reference.fields)
    found = summary.classes.moments(reference.origin)
    values, _ = window_statistics.tests(found, reference.class_mean, reference.class_sd, windowed=reference.windowed)
    return np.asarray(((values - reference.test_mean[: 2 * fields]) / reference.test_sd[: 2 * fields])[..., fields:])
