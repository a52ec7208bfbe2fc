"""Command `outstation cost`: processor time, flash writes, network bytes and energy of the running device, by task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from outstation.device import usage
from outstation.device.bootstrap import device
from outstation.device.config import Config
from outstation.device.store import cost as costs
from outstation.device.store.cost import ProcessCost, TaskCost
from outstation.device.store.store import Store
from outstation.foundation.cli.cost_output import (
    describe_money,
    devices_option,
    format_bytes,
    prices_option,
    round_known,
    save_chart,
    show_prices_option,
    to_money,
)
from outstation.foundation.cli.options import config_option, dark_option, json_option, plot_option
from outstation.foundation.cli.output import echo, emit, print_table
from outstation.foundation.costs.prices import load_prices
from outstation.foundation.text import format_duration

_DAY_S = 86_400


@click.command(epilog="Example: outstation cost exercise")
@click.argument("task", required=False)
@config_option
@prices_option
@show_prices_option
@devices_option
@plot_option
@dark_option
@json_option
def cost(
    task: str | None,
    config_file: str | None,
    prices_file: Path | None,
    devices: int,
    plot: Path | None,
    dark: bool,
    as_json: bool,
) -> None:
    """Show processor time, flash writes, network bytes and energy, by task and per 1000 inferences.

    The daemon has counted them since the store was made. Flash counts what the kernel wrote for the daemon; a file
    system's journal comes on top. Energy is the machine's, in proportion to the daemon's share of its busy time.

    The month in money is compared with the same readings sent to a cloud endpoint, at its published prices.
    """
    prices = load_prices(prices_file)
    _, conf = device.load_config(config_file, task)
    with device.open_store_read_only(conf) as store:
        document = build_document(conf, store, [task] if task else list(conf.tasks))
        spent = usage.load_usage(conf, store)
    month = spent.per_month() if spent.seconds > 0 else None
    document["month"] = None if month is None else to_money(month, prices, devices)
    if month is not None and plot is not None:
        document["plot"] = save_chart(month, prices, plot, dark=dark)

    def print_all() -> None:
        _print(document)
        if month is not None:
            echo("")
            describe_money(month, prices, devices)

    emit(document, as_json, print_all)


def build_document(conf: Config, store: Store, tasks: list[str]) -> dict[str, Any]:
    """Return the costs that `cost --json` prints, without money."""
    counters = store.counters()
    process, task_costs = costs.read_process_cost(counters), {n: costs.read_task_cost(counters, n) for n in conf.tasks}
    task_bytes = sum(task.sent_bytes for task in task_costs.values())
    sent_bytes = process.sent_bytes + task_bytes
    # A task's share of the flash writes: the bytes of its messages among all messages and readings.
    total = usage.stored_bytes(conf, store) + task_bytes
    shares = {name: task.sent_bytes / total if total else 0.0 for name, task in task_costs.items()}
    per_day: dict[str, float | None] = {"cpu_s": None, "flash_bytes": None, "air_bytes": None}
    if process.seconds > 0:
        factor, spent = _DAY_S / process.seconds, usage.load_usage(conf, store)
        per_day = {
            "cpu_s": round_known(process.cpu_s and process.cpu_s * factor, 1),
            "flash_bytes": round(process.written_bytes * factor),
            "air_bytes": round(spent.air_bytes * _DAY_S / spent.seconds),
        }
    # Batches count themselves; what the whole process takes, only the daemon counts.
    is_counted = process.seconds > 0
    return {
        "device": conf.device.id,
        "seconds": round(process.seconds, 1),
        "cpu_s": round_known(process.cpu_s, 2) if is_counted else None,
        "flash_bytes": process.written_bytes if is_counted else None,
        "air_bytes": sent_bytes,
        "energy_j": round_known(process.own_energy_j, 1),
        "per_day": per_day,
        "tasks": [_task_cost(conf, name, task_costs[name], process, shares[name]) for name in tasks],
    }


def _task_cost(conf: Config, name: str, task: TaskCost, process: ProcessCost, flash_share: float) -> dict[str, Any]:
    flash = process.written_bytes * flash_share if process.seconds > 0 else None
    energy = process.own_energy_j
    # Only the processor time of a simulated device is unknown.
    cpu_s = None if process.seconds > 0 and process.cpu_s is None else task.cpu_us / 1e6
    cpu_share = task.cpu_us / 1e6 / process.cpu_s if process.cpu_s else 0.0
    joules = None if energy is None else energy * min(1.0, cpu_share)
    raw = usage.raw_bytes(conf, name, task.rows)
    per_1000 = 1000 / task.windows if task.windows else None
    return {
        "task": name,
        "batches": task.batches,
        "inferences": task.windows,
        "rows": task.rows,
        "cpu_s": round_known(cpu_s, 3),
        "flash_bytes": None if flash is None else round(flash),
        "air_bytes": task.sent_bytes,
        "energy_j": round_known(joules, 2),
        "per_1000": None
        if per_1000 is None
        else {
            "cpu_s": round_known(cpu_s and cpu_s * per_1000, 4),
            "flash_bytes": None if flash is None else round(flash * per_1000),
            "air_bytes": round(task.sent_bytes * per_1000),
            "energy_j": round_known(joules and joules * per_1000, 3),
        },
        "raw": {"bytes": raw, "times": round(raw / task.sent_bytes, 2) if task.sent_bytes else None},
    }


def _print(document: dict[str, Any]) -> None:
    day = document["per_day"]
    columns, tasks = ["task", "inferences", "cpu s", "flash", "air", "J"], document["tasks"]
    if day["flash_bytes"] is None:
        if not any(task["batches"] for task in tasks):
            echo("Nothing is counted yet: batches count themselves, and the daemon counts the rest once a minute.")
            return
        echo(
            f"{document['device']}, batches only; the daemon counts the whole process once a minute, and with it "
            "flash, energy and a month\n"
        )
    else:
        processor = "" if day["cpu_s"] is None else f"{day['cpu_s']:,.0f} s of processor, "
        echo(
            f"{document['device']}, counted for {format_duration(document['seconds'] * 1e6)}; a day is {processor}"
            f"{format_bytes(day['flash_bytes'])} on flash, {format_bytes(day['air_bytes'])} on the air\n"
        )
    print_table(columns, [_row(task["task"], task["inferences"], task) for task in tasks], "No tasks.")
    rows = [_row(task["task"], 1000, task["per_1000"]) for task in tasks if task["per_1000"]]
    if rows:
        echo("")
        print_table(columns, rows, "")
    for task in tasks:
        if task["raw"]["times"]:
            size, times = format_bytes(task["raw"]["bytes"]), task["raw"]["times"]
            echo(f"\n{task['task']}: sending the rows themselves would take {size}, {times:g} times as much")


def _row(name: str, count: int, costs: dict[str, Any]) -> list[Any]:
    joules = "-" if costs["energy_j"] is None else f"{costs['energy_j']:g}"
    flash = "-" if costs["flash_bytes"] is None else format_bytes(costs["flash_bytes"])
    cpu_s = "-" if costs["cpu_s"] is None else costs["cpu_s"]
    return [name, count, cpu_s, flash, format_bytes(costs["air_bytes"]), joules]
