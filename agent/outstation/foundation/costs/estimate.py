"""Estimate of a month in money: models on the devices, and the same readings sent to a cloud endpoint."""

from __future__ import annotations

import math

import msgspec

from outstation.foundation.costs.prices import PriceList
from outstation.foundation.costs.usage import MONTH_S, Usage

_JOULES_PER_KWH = 3.6e6


class MonthlyCost(msgspec.Struct, frozen=True):
    """Money a month: `fixed` for the fleet, `per_device` for each device, by part."""

    fixed: float
    per_device: dict[str, float]

    def total(self, devices: float) -> float:
        return self.fixed + devices * sum(self.per_device.values())


class Comparison(msgspec.Struct, frozen=True):
    """Models on the devices beside the readings in a cloud.

    `break_even`: least number of devices from which on the devices cost no more; None where there is none.
    `cheaper_until`: where the devices cost no more in small fleets only, the largest of these.
    """

    edge: MonthlyCost
    cloud: MonthlyCost
    break_even: int | None
    cheaper_until: int | None = None


def compare(month: Usage, prices: PriceList) -> Comparison:
    """Compare a device of monthly usage `month` with the cloud of the price list."""
    edge, cloud = prices.edge, prices.cloud
    devices = MonthlyCost(
        edge.collector_per_month,
        {
            "energy": (month.energy_j or 0.0) / _JOULES_PER_KWH * edge.energy_per_kwh,
            "air": month.air_bytes / 1e9 * edge.air_per_gb,
            "flash": month.flash_bytes / 1e12 * edge.flash_per_tb,
        },
    )
    endpoint = MonthlyCost(
        cloud.endpoint_per_hour * cloud.endpoint_count * MONTH_S / 3600,
        {
            "air": month.raw_bytes / 1e9 * edge.air_per_gb,
            "messages": math.ceil(month.raw_bytes / cloud.message_bytes) / 1e6 * cloud.messages_per_million,
        },
    )
    return Comparison(devices, endpoint, *_find_break_even(devices, endpoint))


def _find_break_even(edge: MonthlyCost, cloud: MonthlyCost) -> tuple[int | None, int | None]:
    """Return from how many devices on, and up to how many, `edge` costs no more than `cloud`."""
    saved = sum(cloud.per_device.values()) - sum(edge.per_device.values())
    if edge.total(1) <= cloud.total(1):
        return (1, None) if saved >= 0 else (None, math.floor((cloud.fixed - edge.fixed) / -saved))
    return (math.ceil((edge.fixed - cloud.fixed) / saved), None) if saved > 0 else (None, None)
