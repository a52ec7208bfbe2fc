"""Usage of a device within a time, as health messages carry it."""

from __future__ import annotations

from typing import Annotated

import msgspec

MONTH_S = 365.25 / 12 * 86_400
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e18)]


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Counted usage of a device within `seconds`; `cpu_s` and `energy_j` are None where they cannot be measured.

    `raw_bytes`: what sending the readings themselves would take.
    """

    # At least a second: what is scaled to a month stays a number.
    seconds: Annotated[float, msgspec.Meta(ge=1, le=1e18)]
    flash_bytes: Amount
    air_bytes: Amount
    raw_bytes: Amount
    inferences: Amount
    cpu_s: Amount | None = None
    energy_j: Amount | None = None

    def per_month(self) -> Usage:
        """Return the usage of a month at the same rate. Raises ValueError without counted time."""
        if self.seconds <= 0:
            raise ValueError("nothing is counted yet")
        factor = MONTH_S / self.seconds
        counted = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return Usage(**{name: value * factor for name, value in counted.items()})


def average_usage(usages: list[Usage]) -> Usage:
    """Return the mean of usages of equal time; of each amount only if all have it. Raises ValueError for none."""
    if not usages:
        raise ValueError("no device has reported its usage yet")
    amounts = {name: [getattr(usage, name) for usage in usages] for name in Usage.__struct_fields__}
    return Usage(**{name: sum(each) / len(each) for name, each in amounts.items() if None not in each})
