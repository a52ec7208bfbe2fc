"""Outlier devices: devices whose mean or spread of a field differs from the rest of the fleet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from types import MappingProxyType

import msgspec

from outstation.fleet.drift.merge import MergedField
from outstation.ml.drift.reporting.parsed_message import effect_sizes

MIN_DEVICES = 4  # Fewer have no meaningful median.
MIN_ROWS = 100
Z_LIMIT = 3.5
# Minimum effect, half the usual resolution of a reference: nearly equal devices have no outliers.
MIN_SHIFT, MIN_LOG_RATIO = 0.1, math.log(1.1)
# A spread below this share of the usual one, or below the rounding of single precision, counts as zero.
STUCK_SHARE, ROUNDING = 0.01, 1e-6
MAX_Z = 99.0  # A larger value carries no more information.
# A deviation that more devices share is another kind of site, from which none of them stands out.
MAX_OUTLIER_SHARE = 0.25
NO_REFERENCE_SD: Mapping[str, float] = MappingProxyType({})
# Median and upper quartile of |z| for a normal distribution: 1 / sd.
_MAD_TO_SD, _QUARTILE_TO_SD = 1.4826, 0.8693


class DeviceOutlier(msgspec.Struct, frozen=True):
    """An outlying statistic of a field; `z`: distance from the median over devices in robust sd."""

    device: str
    field: str
    statistic: str  # mean | spread
    z: float
    value: float
    fleet_median: float
    divergences: dict[str, float]  # PSI, JS and KS between this device and all others.


def find_outliers(
    devices: Mapping[str, Mapping[str, MergedField]], reference_sd: Mapping[str, float] = NO_REFERENCE_SD
) -> list[DeviceOutlier]:
    """Return outliers, the largest |z| first; none if fewer than four devices can be compared.

    `reference_sd`: sd of a field's rows in the shipped reference; without it, the devices' median sd is used.
    Source: Iglewicz & Hoaglin (1993), How to Detect and Handle Outliers: |z| > 3.5 from median and MAD. The upper
    quartile of the distances bounds the sd from below, so that a second kind of site has no outliers.
    """
    outliers: list[DeviceOutlier] = []
    for name in dict.fromkeys(field for fields in devices.values() for field in fields):
        known = {d: f[name] for d, f in devices.items() if name in f and f[name].moments.n >= MIN_ROWS}
        if len(known) >= MIN_DEVICES:
            outliers += _find_field_outliers(name, known, reference_sd.get(name, 0.0))
    return sorted(outliers, key=lambda outlier: (-abs(outlier.z), outlier.device, outlier.field))


def _find_field_outliers(name: str, by_device: dict[str, MergedField], reference_sd: float) -> list[DeviceOutlier]:
    everything = MergedField.empty_like(next(iter(by_device.values())))
    for part in by_device.values():
        everything = everything + part
    sds = {device: part.sd for device, part in by_device.items()}
    typical = max(reference_sd, median(sds.values()))
    rounding = ROUNDING * max(max(abs(part.moments.mean), part.sd) for part in by_device.values())
    floor = max(STUCK_SHARE * typical, rounding)
    outliers = []
    for statistic, values, min_sd in (
        ("mean", {d: p.moments.mean for d, p in by_device.items()}, max(MIN_SHIFT * typical, rounding)),
        ("spread", {d: math.log(sd + floor) for d, sd in sds.items()} if floor else {}, MIN_LOG_RATIO),
    ):
        for device, value, middle, z in _robust_outliers(values, min_sd):
            pair = (value, middle)
            if statistic == "spread":
                pair = (sds[device], max(0.0, math.exp(middle) - floor))
            divergences = effect_sizes(everything.counts_without(by_device[device]), by_device[device].counts)
            outliers.append(DeviceOutlier(device, name, statistic, round(z, 2), *pair, divergences))
    return outliers


def _robust_outliers(values: dict[str, float], min_sd: float) -> list[tuple[str, float, float, float]]:
    """Return (device, value, median, z) of each device beyond the limit; `min_sd` bounds the estimated sd."""
    if not values or not min_sd:
        return []
    middle = median(values.values())
    distances = sorted(abs(value - middle) for value in values.values())
    # The farthest of those that cannot be outliers.
    usual = distances[len(distances) - int(MAX_OUTLIER_SHARE * len(distances)) - 1]
    sd = max(_MAD_TO_SD * median(distances), _QUARTILE_TO_SD * usual, min_sd / 2)
    scores = {device: max(-MAX_Z, min((value - middle) / sd, MAX_Z)) for device, value in values.items()}
    return [(device, values[device], middle, z) for device, z in scores.items() if abs(z) > Z_LIMIT]
