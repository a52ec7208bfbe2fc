"""Money of a month for commands: options, JSON members, sentences and the chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from outstation.foundation.cli import plot_file
from outstation.foundation.cli.options import PATH
from outstation.foundation.cli.output import echo, print_table, require_plot_format
from outstation.foundation.costs.estimate import compare
from outstation.foundation.costs.prices import PriceList, shipped_text
from outstation.foundation.costs.usage import Usage
from outstation.foundation.render import theme
from outstation.foundation.render.charts import render_cost_chart

_MOST_DEVICES = 10_000

prices_option = click.option("--prices", "prices_file", metavar="FILE", type=PATH, help="Your own price list.")
devices_option = click.option(
    "--devices", metavar="N", type=click.IntRange(1, 10_000_000), default=1, help="Size of the fleet; default 1."
)


def _show_prices(ctx: click.Context, _: click.Parameter, is_requested: bool) -> None:
    if is_requested and not ctx.resilient_parsing:
        echo(shipped_text(), nl=False)
        ctx.exit()


show_prices_option = click.option(
    "--show-prices", is_flag=True, is_eager=True, expose_value=False, callback=_show_prices,
    help="Print the price list, for a copy with your prices, and exit.",
)  # fmt: skip


def to_money(month: Usage, prices: PriceList, devices: int) -> dict[str, Any]:
    """Return the members of a month for JSON: the usage of a device, and the fleet's money."""
    comparison = compare(month, prices)
    return {
        "cpu_s": round_known(month.cpu_s, 1),
        "flash_bytes": round(month.flash_bytes),
        "air_bytes": round(month.air_bytes),
        "raw_bytes": round(month.raw_bytes),
        "inferences": round(month.inferences),
        "energy_j": round_known(month.energy_j, 1),
        "currency": prices.currency,
        "devices": devices,
        "edge": round(comparison.edge.total(devices), 4),
        "cloud": round(comparison.cloud.total(devices), 4),
        "cloud_prices": {"name": prices.cloud.name, "as_of": prices.cloud.as_of.isoformat()},
        "break_even": comparison.break_even,
        "cheaper_until": comparison.cheaper_until,
    }


def describe_money(month: Usage, prices: PriceList, devices: int) -> None:
    """Print a month of one device, and the money of the fleet beside the cloud."""
    energy = "" if month.energy_j is None else f"; {month.energy_j / 3.6e6:.3f} kWh"
    processor = "" if month.cpu_s is None else f"{month.cpu_s / 3600:.1f} h of processor, "
    echo(
        f"A month of a device: {month.inferences:,.0f} inferences, {processor}{format_bytes(month.flash_bytes)} on "
        f"flash, {format_bytes(month.air_bytes)} on the air{energy}"
    )
    unmeasured = {"processor time": month.cpu_s, "energy": month.energy_j}
    if names := [name for name, amount in unmeasured.items() if amount is None]:
        echo(f"Not measured: {' and '.join(names)}.")
    comparison, unit = compare(month, prices), prices.currency
    parts = [*dict.fromkeys([*comparison.edge.per_device, *comparison.cloud.per_device])]
    rows = [
        [
            part,
            *(_format_money(devices * side.per_device.get(part, 0.0)) for side in (comparison.edge, comparison.cloud)),
        ]
        for part in parts
    ]
    rows.append(["collector or endpoint", _format_money(comparison.edge.fixed), _format_money(comparison.cloud.fixed)])
    rows.append(["sum", *(_format_money(side.total(devices)) for side in (comparison.edge, comparison.cloud))])
    echo("")
    print_table([f"{unit} a month, {_format_devices(devices)}", "on the devices", "in a cloud"], rows, "")
    free = [
        words
        for words, price in (
            ("energy", prices.edge.energy_per_kwh),
            ("air", prices.edge.air_per_gb),
            ("flash", prices.edge.flash_per_tb),
            ("the collector", prices.edge.collector_per_month),
        )
        if not price
    ]
    echo("")
    if free:
        echo(f"Not counted, as the price list has no price: {', '.join(free)}. --show-prices prints a list to copy.")
    echo(f"Cloud: {prices.cloud.name}; prices of {prices.cloud.as_of.isoformat()}.")
    echo(_describe_break_even(comparison.break_even, comparison.cheaper_until))


def _format_devices(count: int) -> str:
    return f"{count:,} device{'s' if count > 1 else ''}"


def _describe_break_even(count: int | None, most: int | None) -> str:
    if most is not None:
        return f"By these prices models on the devices are cheaper up to {_format_devices(most)}, the cloud beyond."
    if count is None:
        return "By these prices the cloud is cheaper for a fleet of any size."
    if count == 1:
        return "By these prices models on the devices are cheaper for a fleet of any size."
    return f"By these prices models on the devices are cheaper from {count:,} devices on."


def save_chart(month: Usage, prices: PriceList, file: Path, *, dark: bool) -> str:
    """Write the chart of both costs by size of the fleet; return its path. Raises UsageError for another format."""
    require_plot_format(file)
    colors = theme.DARK_THEME if dark else theme.LIGHT_THEME
    document = render_cost_chart(compare(month, prices), prices.currency, prices.cloud.name, _MOST_DEVICES, colors)
    plot_file.write(file, document)
    return str(file)


def round_known(value: float | None, digits: int) -> float | None:
    """Round an amount that may be unknown."""
    return None if value is None else round(value, digits)


def format_bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _format_money(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.005 or value == 0 else f"{value:.4f}"
