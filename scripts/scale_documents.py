"""Resources of a fleet of any size, computed from the measured costs of a message.

`python -m scripts.scale_documents` writes the generated section of docs/internals/scale.md. With `--devices` it prints
the resources of that fleet instead. `scripts/bench collectors --write` measures the costs, which are in a JSON file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from outstation.foundation import decoders

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("benchmarks") / "collectors.json"
PAGE, TITLE = "docs/internals/scale.md", "Measured and computed"
RESULTS, RESULT, HEALTH = "40 results", "1 result", "health"
SIZES = (1_000, 10_000, 1_000_000)
_DAY_S, _MONTH_DAYS = 86_400, 30
_OUTAGE_S, _CATCH_UP_S = 3600, 7200
# Most of a core that a collector may use while it works off an outage.
_USED_SHARE = 0.7
_PARTITION_BYTES = 250e9


class CollectorCosts(msgspec.Struct):
    """Costs of one message, in µs of processor time of all collectors, the server and the broker, and in bytes.

    `rate`: messages per second by the clock, of `collectors` processes that share the machine with server and broker.
    """

    database: str
    collectors: int
    message: str
    payload_bytes: int
    publish_bytes: int
    rate: float
    collector_us: float
    server_us: float
    broker_us: float
    growth_bytes: float


class KillTrial(msgspec.Struct):
    """The leader of `collectors`, killed while `waiting` of `messages` were not stored; `elected_s` until the next."""

    collectors: int
    messages: int
    waiting: int
    elected_s: float
    lost: int
    doubled: int


class Measurements(msgspec.Struct):
    measured: str
    machine: str
    costs: list[CollectorCosts]
    killed: KillTrial

    def find(self, database: str, collectors: int, message: str) -> CollectorCosts:
        wanted = (database, collectors, message)
        return next(cost for cost in self.costs if (cost.database, cost.collectors, cost.message) == wanted)


class Fleet(NamedTuple):
    """A fleet whose devices send a message of a task and one of health every `interval_s`."""

    devices: int
    message: str = RESULTS
    interval_s: float = 60.0


class Resources(NamedTuple):
    """Resources that a fleet needs: messages and bytes per second, cores, bytes of the database per day."""

    database: str
    messages: float
    collector_cores: float
    server_cores: float
    broker_cores: float
    broker_bytes: float
    growth_bytes: float
    collectors: int
    capacity: float

    @property
    def catch_up_s(self) -> float | None:
        """Seconds in which one collector works off an hour's outage, by the measured clock; None if it never does."""
        spare = self.capacity - self.messages
        return _OUTAGE_S * self.messages / spare if spare > 0 else None


def compute(measured: Measurements, fleet: Fleet) -> Resources:
    """Compute the resources; the database is SQLite while one collector suffices."""
    sqlite = _compute(measured, fleet, "SQLite")
    return sqlite if _peak(sqlite.collector_cores) <= _USED_SHARE else _compute(measured, fleet, "PostgreSQL")


def _peak(cores: float) -> float:
    """Return the cores for what arrives, and for an hour of it within two hours."""
    return cores * (1 + _OUTAGE_S / _CATCH_UP_S)


def _compute(measured: Measurements, fleet: Fleet, database: str) -> Resources:
    pair = [measured.find(database, 1, message) for message in (fleet.message, HEALTH)]
    per_s = fleet.devices / fleet.interval_s
    collector, server, broker = (
        per_s * sum(costs) / 1e6
        for costs in zip(*((c.collector_us, c.server_us, c.broker_us) for c in pair), strict=True)
    )
    count = max(1, math.ceil(_peak(collector) / _USED_SHARE)) if database == "PostgreSQL" else 1
    return Resources(
        database,
        2 * per_s,
        collector,
        server,
        broker,
        per_s * sum(cost.publish_bytes for cost in pair),
        per_s * _DAY_S * sum(cost.growth_bytes for cost in pair),
        count,
        2 / sum(1 / cost.rate for cost in pair),
    )


def read() -> Measurements:
    """Read the committed measurements."""
    return decoders.from_json(FILE.read_bytes(), Measurements)


def to_json(measured: Measurements) -> str:
    return json.dumps(msgspec.to_builtins(measured), indent=1) + "\n"


def render(measured: Measurements) -> str:
    """Return the generated section: what was measured, and the resources of three fleets."""
    return "\n".join([*_render_costs(measured), *_render_trial(measured.killed), *_render_sizes(measured)])


def _render_costs(measured: Measurements) -> list[str]:
    lines = [
        f"Measured {measured.measured}, on {measured.machine}.",
        "Broker, database server and collectors share its cores: rates by the clock end where these do.",
        "Processor time is of all collectors together. `scripts/bench collectors --write` measures this again.",
        "",
        "| database | collectors | one message | payload | PUBLISH | collectors' CPU | server CPU | broker CPU "
        "| growth of the database | by the clock |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for c in measured.costs:
        server = f"{c.server_us:.0f} µs" if c.database == "PostgreSQL" else ""
        lines.append(
            f"| {c.database} | {c.collectors} | {c.message} | {c.payload_bytes:,} B | {c.publish_bytes:,} B "
            f"| {c.collector_us:.0f} µs | {server} | {c.broker_us:.0f} µs | {c.growth_bytes:,.0f} B | {c.rate:,.0f}/s |"
        )
    return lines


def _render_trial(trial: KillTrial) -> list[str]:
    return [
        "",
        f"**A killed leader**: the leader of {trial.collectors} collectors was killed (SIGKILL) when "
        f"{trial.waiting:,} of {trial.messages:,} messages",
        f"were not stored. Another one led after {trial.elected_s:.1f} s. Once the killed one ran again, "
        f"{trial.lost} messages were lost",
        f"and {trial.doubled} doubled.",
        "",
    ]


def _render_sizes(measured: Measurements) -> list[str]:
    fleets = [(Fleet(devices), Fleet(devices, RESULT)) for devices in SIZES]
    lines = [
        "Computed for devices that send a message of 40 results and one of health every minute:",
        "",
        f"| | {' | '.join(f'{devices:,}' for devices in SIZES)} |",
        "|---|---:|---:|---:|",
    ]
    columns = [
        _describe(compute(measured, many)) | _describe_single(compute(measured, single)) for many, single in fleets
    ]
    return [*lines, *(f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0])]


def _describe(need: Resources) -> dict[str, str]:
    catch_up = need.catch_up_s
    million = need.database == "PostgreSQL"
    partitions = max(1, 2 ** math.ceil(math.log2(max(1, need.growth_bytes / _PARTITION_BYTES))))
    return {
        "messages": f"{need.messages:,.0f}/s",
        "database": f"PostgreSQL, {partitions} partitions" if million else "SQLite",
        "cores of collectors": f"{need.collector_cores:.3g}",
        "cores of the database server": f"{need.server_cores:.3g}" if million else "",
        "cores of the broker, without TLS": f"{need.broker_cores:.3g}",
        "collectors, to work off an hour within two": f"{need.collectors}",
        "one collector works off an hour's outage in": "never" if catch_up is None else f"{catch_up / 60:.0f} min",
        "into the broker": f"{_bytes(need.broker_bytes)}/s",
        "into the broker, a month": _bytes(need.broker_bytes * _DAY_S * _MONTH_DAYS),
        "growth of the database, a day": _bytes(need.growth_bytes),
        "growth of the database, a month": _bytes(need.growth_bytes * _MONTH_DAYS),
    }


def _describe_single(need: Resources) -> dict[str, str]:
    return {"a month with 1 result a minute": _bytes(need.growth_bytes * _MONTH_DAYS)}


def _bytes(count: float) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


@click.command()
@click.option("--devices", type=click.IntRange(min=1), help="Print the resources of a fleet of that size.")
@click.option("--interval", default=60.0, type=click.FloatRange(min=0.001), help="Seconds between results of a device.")
@click.option("--message", default=RESULTS, type=click.Choice([RESULTS, RESULT]), help="What a task's message holds.")
def main(devices: int | None, interval: float, message: str) -> None:
    """Write the page, or print the resources of one fleet."""
    from scripts.benchmarks import Section, page

    measured = read()
    if devices is None:
        page.write_section(Section(PAGE, TITLE, render(measured)))
        return
    for name, value in _describe(compute(measured, Fleet(devices, message, interval))).items():
        if value:
            click.echo(f"{name:45} {value}")


if __name__ == "__main__":
    main()
