"""Devices that stand out from the fleet: whose mean or spread of a field is unlike the others'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from types import MappingProxyType

import msgspec

from agent.drift.reporting.parsed_message import effect_sizes
from agent.fleet.drift.merge import MergedField

MIN_DEVICES = 4  # fewer have no middle to stand out from
MIN_ROWS = 100
Z_LIMIT = 3.5
# Devices that are all but alike must not stand out by a hair: half a reference's usual resolution.
MIN_SHIFT, MIN_LOG_RATIO = 0.1, math.log(1.1)
# A spread below this share of the usual one is none; and so is what the rounding of single precision makes of values.
STUCK_SHARE, ROUNDING = 0.01, 1e-6
MAX_Z = 99.0  # further out says no more
NO_REFERENCE_SD: Mapping[str, float] = MappingProxyType({})
_MAD = 1.4826


class DeviceOutlier(msgspec.Struct, frozen=True):
    """`z`: robust sd from the fleet's median of this statistic over devices."""

    device: str
    field: str
    statistic: str  # mean | spread
    z: float
    value: float
    fleet_median: float
    divergences: dict[str, float]  # psi, js, ks between this device and all others


def find_outliers(
    devices: Mapping[str, Mapping[str, MergedField]], reference_sd: Mapping[str, float] = NO_REFERENCE_SD
) -> list[DeviceOutlier]:
    """Of each device's fields, the furthest out first; none where fewer than four devices can be compared.

    `usual_sd`: what a field's rows usually have, from a reference; without one, the devices' own spread stands in.
    Source: Iglewicz & Hoaglin (1993), How to Detect and Handle Outliers: |z| > 3.5 from median and MAD.
    """
    found: list[DeviceOutlier] = []
    for name in dict.fromkeys(field for fields in devices.values() for field in fields):
        known = {d: f[name] for d, f in devices.items() if name in f and f[name].moments.n >= MIN_ROWS}
        if len(known) >= MIN_DEVICES:
            found += _find_field_outliers(name, known, reference_sd.get(name, 0.0))
    return sorted(found, key=lambda one: (-abs(one.z), one.device, one.field))


def _find_field_outliers(name: str, by_device: dict[str, MergedField], reference_sd: float) -> list[DeviceOutlier]:
    everything = MergedField.empty_like(next(iter(by_device.values())))
    for part in by_device.values():
        everything = everything + part
    sds = {device: part.moments.sd for device, part in by_device.items()}
    typical = max(reference_sd, median(sds.values()))
    rounding = ROUNDING * max(max(abs(part.moments.mean), part.moments.sd) for part in by_device.values())
    still = max(STUCK_SHARE * typical, rounding)
    found = []
    for statistic, values, least in (
        ("mean", {d: p.moments.mean for d, p in by_device.items()}, max(MIN_SHIFT * typical, rounding)),
        ("spread", {d: math.log(sd + still) for d, sd in sds.items()} if still else {}, MIN_LOG_RATIO),
    ):
        for device, value, usual, z in _robust_outliers(values, least):
            told = (value, usual)
            if statistic == "spread":
                told = (sds[device], max(0.0, math.exp(usual) - still))
            sizes = effect_sizes(everything.counts_without(by_device[device]), by_device[device].counts)
            found.append(DeviceOutlier(device, name, statistic, round(z, 2), *told, sizes))
    return found


def _robust_outliers(values: dict[str, float], min_sd: float) -> list[tuple[str, float, float, float]]:
    """(device, value, median, z) of those beyond the limit; `least` is the least sd that is believed."""
    if not values or not min_sd:
        return []
    middle = median(values.values())
    sd = max(_MAD * median(abs(value - middle) for value in values.values()), min_sd / 2)
    far = [(device, value, middle, max(-MAX_Z, min((value - middle) / sd, MAX_Z))) for device, value in values.items()]
    return [one for one in far if abs(one[3]) > Z_LIMIT]
