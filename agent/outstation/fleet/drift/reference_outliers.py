"""Reference outliers: devices whose learned reference differs from those of the other devices with the same task.

A site that was wrong from its first row learns that as normal. Other sites show it. A mean or a spread is an outlier by
the generalized ESD test, within a budget of false alarms, if the difference also matters. Source: Rosner (1983),
Percentage points for a generalized ESD many-outlier procedure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean, median, stdev

import msgspec

from outstation.fleet.database.projection import FieldMoments
from outstation.ml.drift.baseline.deviation import DEVIATION_BUDGET, MIN_RATIO, MIN_SHIFT_SDS

MIN_DEVICES = 5  # fewer do not tell how sites differ
MAX_OUTLIER_SHARE = 0.25  # of the devices, in one field
MIN_ROWS = 100


class ReferenceOutlier(msgspec.Struct, frozen=True):
    """Field of a device: difference of the mean from that of `others` devices, in its unit and in sd; ratio of sds."""

    device: str
    field: str
    shift: float
    shift_sd: float
    ratio: float
    by_mean: bool
    others: int

    def describe(self) -> str:
        if self.by_mean:
            return f"{self.field} differs by {self.shift:+.2g} ({abs(self.shift_sd):.2g} sd)"
        return f"{self.field} varies {self.ratio:.2g} times as much"


def find_reference_outliers(devices: Mapping[str, Mapping[str, FieldMoments]]) -> list[ReferenceOutlier]:
    """Return the outliers among the learned references of one task, by device → field, in the order of the devices.

    The chance that any of them is false is at most DEVIATION_BUDGET, where sites differ normally.
    """
    names = dict.fromkeys(field for fields in devices.values() for field in fields)
    alpha = DEVIATION_BUDGET / max(1, 2 * len(names))
    out: dict[tuple[str, str], ReferenceOutlier] = {}
    for name in names:
        known = {device: fields[name] for device, fields in devices.items() if name in fields}
        known = {device: field for device, field in known.items() if field.n >= MIN_ROWS}
        if len(known) < MIN_DEVICES:
            continue
        typical = median(field.sd for field in known.values())
        # A spread of 0 has no logarithm; a field that hardly moves anywhere has no outlier.
        floor = 1e-3 * typical
        means = {device: field.mean for device, field in known.items()}
        spreads = {device: math.log(field.sd + floor) for device, field in known.items()} if floor else {}
        for values, least, by_mean in ((means, MIN_SHIFT_SDS * typical, True), (spreads, math.log(MIN_RATIO), False)):
            unlike = _find_outlying(values, alpha, least) if values else []
            rest = [device for device in values if device not in unlike]
            for device in unlike:
                shift = means[device] - fmean(means[other] for other in rest)
                ratio = (known[device].sd + floor) / (median(known[other].sd for other in rest) + floor)
                outlier = ReferenceOutlier(
                    *(device, name, shift, shift / max(typical, 1e-12), ratio), by_mean=by_mean, others=len(rest)
                )
                out.setdefault((device, name), outlier)
    order = list(devices)
    return sorted(out.values(), key=lambda item: (order.index(item.device), -abs(item.shift_sd)))


def _find_outlying(values: Mapping[str, float], alpha: float, least: float) -> list[str]:
    """Return the outliers, the farthest first, that differ from the mean of the others by `least`."""
    rest, removed, count = dict(values), list[str](), len(values)
    outlying: list[str] = []
    for step in range(int(MAX_OUTLIER_SHARE * count)):
        left, middle = list(rest.values()), fmean(rest.values())
        sd = stdev(left)
        farthest = max(rest, key=lambda device: abs(rest[device] - middle))
        extreme = abs(rest.pop(farthest) - middle)
        removed.append(farthest)
        size = count - step
        t = student_t_quantile(1 - alpha / (2 * size), size - 2)
        if extreme > sd * (size - 1) * t / math.sqrt((size - 2 + t**2) * size):
            outlying = list(removed)
    usual = fmean(value for device, value in values.items() if device not in outlying)
    return [device for device in outlying if abs(values[device] - usual) > least]


def student_t_quantile(p: float, degrees: int) -> float:
    """Return the quantile of Student's t above the median.

    Source: Hill (1970), Algorithm 396: Student's t-quantiles. Exact for 1 and 2 degrees of freedom.
    """
    two_tailed = 2 * (1 - p)
    if degrees == 1:
        return 1 / math.tan(two_tailed * math.pi / 2)
    if degrees == 2:
        return math.sqrt(2 / (two_tailed * (2 - two_tailed)) - 2)
    a = 1 / (degrees - 0.5)
    b = 48 / a**2
    c = ((20_700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * degrees
    y = (d * two_tailed) ** (2 / degrees)
    if y > 0.05 + a:
        x = NormalDist().inv_cdf(two_tailed / 2)
        y = x**2
        if degrees < 5:
            c += 0.3 * (degrees - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = a * y**2
        y = math.expm1(y) if y > 0.002 else 0.5 * y**2 + y
    else:
        e = (degrees + 6) / (degrees * y) - 0.089 * d - 0.822
        y = ((1 / (e * (degrees + 2) * 3) + 0.5 / (degrees + 4)) * y - 1) * (degrees + 1) / (degrees + 2) + 1 / y
    return math.sqrt(degrees * y)


def describe_device(outliers: Sequence[ReferenceOutlier], max_named: int) -> str:
    """Describe the outliers of one device, the largest first."""
    named = "; ".join(outlier.describe() for outlier in outliers[:max_named])
    more = len(outliers) - max_named
    return named + (f" and {more} more fields" if more > 0 else "")
