"""Devices that stand out from the fleet: whose mean or spread of a field is unlike the others'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from types import MappingProxyType

import msgspec

from agent.drift.reporting.parsed_message import apart
from agent.fleet.drift.merge import Merged

FEWEST_DEVICES = 4  # fewer have no middle to stand out from
FEWEST_ROWS = 100
LIMIT = 3.5
# Devices that are all but alike must not stand out by a hair: half a reference's usual resolution.
LEAST_SHIFT, LEAST_LOG = 0.1, math.log(1.1)
# A spread below this share of the usual one is none; and so is what the rounding of single precision makes of values.
STILL, ROUNDING = 0.01, 1e-6
FARTHEST = 99.0  # further out says no more
NOT_KNOWN: Mapping[str, float] = MappingProxyType({})
_MAD = 1.4826


class StandsOut(msgspec.Struct, frozen=True):
    """`z`: robust sd from the fleet's median of this statistic over devices."""

    device: str
    field: str
    statistic: str  # mean | spread
    z: float
    value: float
    usual: float
    sizes: dict[str, float]  # psi, js, ks between this device and all others


def standing_out(
    devices: Mapping[str, Mapping[str, Merged]], usual_sd: Mapping[str, float] = NOT_KNOWN
) -> list[StandsOut]:
    """Of each device's fields, the furthest out first; none where fewer than four devices can be compared.

    `usual_sd`: what a field's rows usually have, from a reference; without one, the devices' own spread stands in.
    Source: Iglewicz & Hoaglin (1993), How to Detect and Handle Outliers: |z| > 3.5 from median and MAD.
    """
    found: list[StandsOut] = []
    for name in dict.fromkeys(field for fields in devices.values() for field in fields):
        known = {d: f[name] for d, f in devices.items() if name in f and f[name].moments.n >= FEWEST_ROWS}
        if len(known) >= FEWEST_DEVICES:
            found += _of_field(name, known, usual_sd.get(name, 0.0))
    return sorted(found, key=lambda one: (-abs(one.z), one.device, one.field))


def _of_field(name: str, known: dict[str, Merged], usual_sd: float) -> list[StandsOut]:
    everything = Merged.none(next(iter(known.values())))
    for part in known.values():
        everything = everything + part
    sds = {device: part.moments.sd for device, part in known.items()}
    typical = max(usual_sd, median(sds.values()))
    rounding = ROUNDING * max(max(abs(part.moments.mean), part.moments.sd) for part in known.values())
    still = max(STILL * typical, rounding)
    found = []
    for statistic, values, least in (
        ("mean", {d: p.moments.mean for d, p in known.items()}, max(LEAST_SHIFT * typical, rounding)),
        ("spread", {d: math.log(sd + still) for d, sd in sds.items()} if still else {}, LEAST_LOG),
    ):
        for device, value, usual, z in _far(values, least):
            told = (value, usual)
            if statistic == "spread":
                told = (sds[device], max(0.0, math.exp(usual) - still))
            sizes = apart(everything.without(known[device]), known[device].counts)
            found.append(StandsOut(device, name, statistic, round(z, 2), *told, sizes))
    return found


def _far(values: dict[str, float], least: float) -> list[tuple[str, float, float, float]]:
    """(device, value, median, z) of those beyond the limit; `least` is the least sd that is believed."""
    if not values or not least:
        return []
    middle = median(values.values())
    sd = max(_MAD * median(abs(value - middle) for value in values.values()), least / 2)
    far = [
        (device, value, middle, max(-FARTHEST, min((value - middle) / sd, FARTHEST)))
        for device, value in values.items()
    ]
    return [one for one in far if abs(one[3]) > LIMIT]
