"""Command `outstation fleet devices cost`: usage and money of the fleet in a month, beside a cloud endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from outstation.fleet.cli.common import database_options, device_option, open_for_reading
from outstation.foundation.cli.cost_output import (
    describe_money,
    format_bytes,
    prices_option,
    save_chart,
    show_prices_option,
    to_money,
)
from outstation.foundation.cli.options import dark_option, plot_option
from outstation.foundation.cli.output import echo, emit, print_table
from outstation.foundation.costs.prices import load_prices
from outstation.foundation.costs.usage import Usage, average_usage
from outstation.foundation.errors import UsageError
from outstation.foundation.text import format_duration


@click.command(epilog="Example: outstation fleet devices cost --prices prices.toml --plot cost.svg")
@device_option
@prices_option
@show_prices_option
@plot_option
@dark_option
@database_options
def cost(
    device: str | None,
    prices_file: Path | None,
    plot: Path | None,
    dark: bool,
    db: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Show a month of each device, and of the fleet in money, beside the same readings in a cloud.

    Devices state their usage once an hour; simulated ones without processor time and energy, as they share this
    machine's. Those that have stated none yet count as the mean of the others. Revoked and retired devices count in
    no month.
    """
    from outstation.fleet.usage import load_usages

    prices = load_prices(prices_file)
    _, store = open_for_reading(home, db, device)
    usages = load_usages(store, device)
    if device is not None and not usages:
        [state] = (row["state"] for row in store.devices(with_retired=True) if row["device"] == device)
        raise UsageError(f"{device} is {state}: no key of it may sign, so it counts in no month")
    months = {name: None if usage is None else usage.per_month() for name, usage in usages.items()}
    try:
        mean = average_usage([month for month in months.values() if month is not None])
    except ValueError as error:
        raise UsageError(
            f"{error}: a device states it with its second health message, and then once an hour. Try again in an "
            "hour, or run `outstation cost` on a device"
        ) from None
    document: dict[str, Any] = {
        "devices": [
            {"device": name, "counted_s": usage and usage.seconds, "month": months[name]}
            for name, usage in usages.items()
        ],
        "fleet": to_money(mean, prices, len(usages)),
    }
    if plot is not None:
        document["plot"] = save_chart(mean, prices, plot, dark=dark)

    def print_all() -> None:
        columns = ["device", "counted for", "inferences", "processor h", "flash", "air", "kWh"]
        print_table(columns, [_to_cells(name, usage, months[name]) for name, usage in usages.items()], "No device.")
        echo("")
        describe_money(mean, prices, len(usages))

    emit(document, as_json, print_all)


def _to_cells(name: str, counted: Usage | None, month: Usage | None) -> list[Any]:
    if counted is None or month is None:
        return [name, *["-"] * 6]
    processor = "-" if month.cpu_s is None else f"{month.cpu_s / 3600:.1f}"
    energy = "-" if month.energy_j is None else f"{month.energy_j / 3.6e6:.3f}"
    flash, air = format_bytes(month.flash_bytes), format_bytes(month.air_bytes)
    return [name, format_duration(counted.seconds * 1e6), f"{month.inferences:,.0f}", processor, flash, air, energy]
