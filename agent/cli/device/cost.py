"""`outstation cost`: what the running device spends, by task, and what it would with other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from agent.bootstrap import wiring
from agent.cli.output import config_option, emit, json_option, print_table
from agent.config import Config
from agent.device.commands import wipe
from agent.device.pipeline import what_if
from agent.device.store import cost as spending
from agent.device.store.cost import ProcessCost
from agent.device.store.labels import load_last_batches
from agent.device.store.rows import row_bytes
from agent.device.store.store import Store
from agent.errors import UsageError
from agent.toml_files import did_you_mean

_DAY_S = 86_400
# Batches whose results tell how often an answer changes.
_RECENT_BATCHES = 50
# Of a message with raw rows: signature, topic, properties; as many rows as fit beside it into what a broker takes.
_RAW_ENVELOPE_BYTES = 800


@click.command(epilog="Example: outstation cost exercise --what-if publish=changes --what-if 'schedule=every 5 min'")
@click.argument("task", required=False)
@click.option(
    "--what-if",
    "wishes",
    multiple=True,
    metavar="KEY=VALUE",
    help="With another schedule, batch or publish; repeatable.",
)
@config_option
@json_option
def cost(task: str | None, wishes: tuple[str, ...], config_file: str | None, as_json: bool) -> None:
    """Processor time, bytes on flash and on the air, energy where the machine tells, by task and per 1000 inferences.

    Counted by the running daemon since its store was made. Flash is what the kernel wrote for it; a file system's
    journal comes on top. Energy is the machine's, by the agent's share of its busy time.
    """
    file, conf = wiring.load_config(config_file)
    wipe.require_unwiped(conf.data_dir)
    if task is not None and task not in conf.tasks:
        raise UsageError(f"{file}: there is no task {task!r}{did_you_mean(task, conf.tasks)}")
    wish = what_if.parse_scenario(str(file), dict(_parse_wish(one) for one in wishes)) if wishes else None
    store = wiring.open_store_read_only(conf)
    try:
        found = build_document(file, conf, store, [task] if task else list(conf.tasks), wish)
    finally:
        store.close()
    emit(found, as_json, lambda: _print(found))


def _parse_wish(text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark or not value.strip():
        raise UsageError(f"--what-if {text!r}: write KEY=VALUE, as publish=changes")
    return key.strip(), value.strip()


def build_document(
    file: Path, conf: Config, store: Store, tasks: list[str], wish: what_if.WhatIfScenario | None
) -> dict[str, Any]:
    """What `cost --json` prints."""
    counters = store.counters()
    spent, shares = spending.read_process_cost(counters), _flash_shares(conf, store, counters)
    air = spent.sent_bytes + sum(spending.read_task_cost(counters, name).sent_bytes for name in conf.tasks)
    return {
        "device": conf.device.id,
        "seconds": round(spent.seconds, 1),
        "cpu_s": round(spent.cpu_s, 2),
        "flash_bytes": spent.written_bytes,
        "air_bytes": air,
        "energy_j": None if spent.own_energy_j is None else round(spent.own_energy_j, 1),
        "per_day": _per_day(spent, air),
        "tasks": [
            _task_cost(conf, store, name, spending.read_task_cost(counters, name), spent, shares[name], wish)
            for name in tasks
        ],
    }


def _per_day(spent: ProcessCost, air: int) -> dict[str, float | None]:
    if spent.seconds <= 0:
        return {"cpu_s": None, "flash_bytes": None, "air_bytes": None}
    a_day = _DAY_S / spent.seconds
    return {
        "cpu_s": round(spent.cpu_s * a_day, 1),
        "flash_bytes": round(spent.written_bytes * a_day),
        "air_bytes": round(air * a_day),
    }


def _flash_shares(conf: Config, store: Store, counters: dict[str, int]) -> dict[str, float]:
    """Of what is written to flash, each task's: by the bytes of its messages beside those of all, and of readings."""
    readings = sum(store.last_row(name) * row_bytes(stream) for name, stream in conf.streams.items())
    sizes = {name: spending.read_task_cost(counters, name).sent_bytes for name in conf.tasks}
    whole = readings + sum(sizes.values())
    return {name: size / whole if whole else 0.0 for name, size in sizes.items()}


def _task_cost(
    conf: Config,
    store: Store,
    name: str,
    usage: spending.TaskCost,
    spent: ProcessCost,
    share: float,
    wish: what_if.WhatIfScenario | None,
) -> dict[str, Any]:
    own = conf.tasks[name]
    flash = spent.written_bytes * share
    energy = spent.own_energy_j
    part = usage.cpu_us / 1e6 / spent.cpu_s if spent.cpu_s else 0.0
    joules = None if energy is None else energy * min(1.0, part)
    raw = _raw_bytes(conf, own.stream, usage.rows)
    thousand = 1000 / usage.windows if usage.windows else None
    found: dict[str, Any] = {
        "task": name,
        "batches": usage.batches,
        "inferences": usage.windows,
        "rows": usage.rows,
        "cpu_s": round(usage.cpu_us / 1e6, 3),
        "flash_bytes": round(flash),
        "air_bytes": usage.sent_bytes,
        "energy_j": None if joules is None else round(joules, 2),
        "per_1000": None
        if thousand is None
        else {
            "cpu_s": round(usage.cpu_us / 1e6 * thousand, 4),
            "flash_bytes": round(flash * thousand),
            "air_bytes": round(usage.sent_bytes * thousand),
            "energy_j": None if joules is None else round(joules * thousand, 3),
        },
        "raw": {"bytes": raw, "times": round(raw / usage.sent_bytes, 2) if usage.sent_bytes else None},
    }
    if wish is not None:
        found["what_if"] = _what_if(store, name, usage, spent, wish, own.publish)
    return found


def _raw_bytes(conf: Config, stream: str, rows: int) -> int:
    """Bytes on the air, had the rows been sent away as they are: packed columns in messages as large as allowed."""
    each = row_bytes(conf.streams[stream])
    fitting = max(1, (conf.broker.max_message_bytes - _RAW_ENVELOPE_BYTES) // each)
    return rows * each + -(-rows // fitting) * _RAW_ENVELOPE_BYTES


def _what_if(
    store: Store, name: str, task: spending.TaskCost, spent: ProcessCost, wish: what_if.WhatIfScenario, publish: Any
) -> dict[str, Any] | None:
    """A day as it is, and as it would be; None before there is anything to go by."""
    if not task.batches or spent.seconds <= 0:
        return None
    kept = store.query(lambda db: load_last_batches(db, name, _RECENT_BATCHES))
    days = (
        what_if.compute_current_cost(task, spent.seconds),
        what_if.project_cost(task, spent.seconds, wish, kept, publish),
    )
    return {
        when: {
            "batches": round(pace.batches, 1),
            "listed": round(pace.listed_results),
            "cpu_s": round(pace.cpu_s, 2),
            "air_bytes": round(pace.sent_bytes),
        }
        for when, pace in zip(("now", "then"), days, strict=True)
    }


def _print(report: dict[str, Any]) -> None:
    day = report["per_day"]
    if day["cpu_s"] is None:
        click.echo("Nothing is counted yet: the daemon counts once a minute.")
        return
    click.echo(
        f"{report['device']}, counted for {report['seconds'] / 3600:.1f} h; a day is {day['cpu_s']:,.0f} s of processor, "
        f"{_format_bytes(day['flash_bytes'])} on flash, {_format_bytes(day['air_bytes'])} on the air\n"
    )
    columns = ["task", "inferences", "cpu s", "flash", "air", "J"]
    print_table(columns, [_row(one["task"], one["inferences"], one) for one in report["tasks"]], "No tasks.")
    thousand = [_row(one["task"], 1000, one["per_1000"]) for one in report["tasks"] if one["per_1000"]]
    if thousand:
        click.echo("")
        print_table(columns, thousand, "")
    for one in report["tasks"]:
        if one["raw"]["times"]:
            click.echo(f"\n{one['task']}: its rows as they are would be {_format_bytes(one['raw']['bytes'])} on the air, "
                       f"{one['raw']['times']:g} times as much")  # fmt: skip
        if shown := one.get("what_if"):
            lines = [
                [when, day["batches"], day["listed"], day["cpu_s"], _format_bytes(day["air_bytes"])]
                for when, day in (("as it is", shown["now"]), ("what if", shown["then"]))
            ]
            click.echo("")
            print_table([f"{one['task']}, a day", "batches", "results listed", "cpu s", "air"], lines, "")


def _row(name: str, count: int, costs: dict[str, Any]) -> list[Any]:
    joules = "-" if costs["energy_j"] is None else f"{costs['energy_j']:g}"
    return [name, count, costs["cpu_s"], _format_bytes(costs["flash_bytes"]), _format_bytes(costs["air_bytes"]), joules]


def _format_bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
