"""Usage of a device within a time, as health messages carry it."""

from __future__ import annotations

from typing import Annotated

import msgspec

MONTH_S = 365.25 / 12 * 86_400
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e18)]


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Counted usage of a device within `seconds`; `energy_j` is None where the machine does not measure it.

    `raw_bytes`: what sending the readings themselves would take.
    """

    # At least a second: what is scaled to a month stays a number.
    seconds: Annotated[float, msgspec.Meta(ge=1, le=1e18)]
    cpu_s: Amount
    flash_bytes: Amount
    air_bytes: Amount
    raw_bytes: Amount
    inferences: Amount
    energy_j: Amount | None = None

    def per_month(self) -> Usage:
        """Return the usage of a month at the same rate. Raises ValueError without counted time."""
        if self.seconds <= 0:
            raise ValueError("nothing is counted yet")
        factor = MONTH_S / self.seconds
        counted = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return Usage(**{name: value * factor for name, value in counted.items()})


def average_usage(usages: list[Usage]) -> Usage:
    """Return the mean of usages of equal time; energy only if each has it. Raises ValueError for none."""
    if not usages:
        raise ValueError("no device has reported its usage yet")
    energies = [usage.energy_j for usage in usages if usage.energy_j is not None]
    count = len(usages)
    return Usage(
        seconds=usages[0].seconds,
        cpu_s=sum(usage.cpu_s for usage in usages) / count,
        flash_bytes=sum(usage.flash_bytes for usage in usages) / count,
        air_bytes=sum(usage.air_bytes for usage in usages) / count,
        raw_bytes=sum(usage.raw_bytes for usage in usages) / count,
        inferences=sum(usage.inferences for usage in usages) / count,
        energy_j=sum(energies) / count if len(energies) == count else None,
    )
