"""Options, opened stores and output that the commands of `outstation fleet` share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.config import FleetConfig
from outstation.foundation.cli.options import Command, json_option
from outstation.foundation.cli.output import echo, emit
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import UsageError
from outstation.foundation.owner import become_owner
from outstation.foundation.text import printable

if TYPE_CHECKING:
    from outstation.fleet.database.store import FleetStore
    from outstation.fleet.enrolment.revocation import RevocationOutcome

# A faster command shows no progress bar.
_MIN_PROGRESS_TOTAL = 5000


def _inherit(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """Return the option's value, or that of the group: options may stand before a subcommand or after it."""
    return value or (ctx.parent.params.get(parameter.name or "") if ctx.parent else None)


def _find_home(ctx: click.Context, parameter: click.Parameter, folder: str | None) -> Path:
    """Return the fleet's folder, and continue as its owner: files that root made there would stop the collector.

    A group does not: its command may name another folder. `is_without_command` does so where none follows.
    """
    home = _inherit(ctx, parameter, folder)
    home = home if isinstance(home, Path) else fleet_config.find_folder(home)
    if not isinstance(ctx.command, click.Group):
        become_owner(home)
    return home


def is_without_command(ctx: click.Context, home: Path) -> bool:
    """Return True if a group itself has to run, and continue as the owner of the fleet's folder."""
    if ctx.invoked_subcommand is not None:
        return False
    become_owner(home)
    return True


fleet_option = click.option(
    *("--dir", "home"), metavar="DIR", callback=_find_home,
    help="The fleet's folder; default $OUTSTATION_FLEET, ., /var/lib/outstation-fleet.",
)  # fmt: skip
db_option = click.option("--db", metavar="URL", callback=_inherit,
                         help="Another database than in fleet.toml: a path, or postgresql://…")  # fmt: skip


def fleet_options(command: Command) -> Command:
    """Add `--dir` and `--json`."""
    return fleet_option(json_option(command))


def database_options(command: Command) -> Command:
    """Add `--db`, `--dir` and `--json`."""
    return db_option(fleet_options(command))


wait_option = click.option("--wait", "wait_s", metavar="S", default=30.0, type=click.FloatRange(min=0),
                           help="Wait this long for each reply; default 30.")  # fmt: skip
device_option = click.option("--device", metavar="D", help="Only this device.")
processes_option = click.option("--processes", metavar="N", default=lambda: len(os.sched_getaffinity(0)),
                                type=click.IntRange(1, 256), help="Processes; default one a processor.")  # fmt: skip


def database_url(config: FleetConfig, db: str | None) -> str:
    """Return the location of the fleet database; `db` is the option's value. Raises UsageError."""
    return fleet_config.resolve_database(db, Path.cwd()) if db else config.fleet.db


def open_for_reading(home: Path, db: str | None = None, device: str | None = None) -> tuple[FleetConfig, FleetStore]:
    """Open the database for reading until the command ends. Raises UsageError if `device` is not enrolled."""
    from outstation.fleet.database.store import FleetStore

    config = fleet_config.load(home)
    store = FleetStore(database_url(config, db), read_only=True)
    click.get_current_context().call_on_close(store.close)
    if device is not None and device not in (known := store.enrolled_devices()):
        hint = did_you_mean(device, known, "no device is: `outstation fleet invite DEVICE`")
        raise UsageError(f"no device {device!r} is enrolled{hint}")
    return config, store


def open_store(config: FleetConfig, db: str | None = None) -> FleetStore:
    """Open the database for reading and writing; create its tables if there are none."""
    from outstation.fleet.database.store import FleetStore

    return FleetStore(database_url(config, db), partitions=config.fleet.partitions)


@contextlib.contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, if it is a terminal and the work is long; yield a function that advances it."""
    if total < _MIN_PROGRESS_TOTAL or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)


def print_lines(*lines: str) -> None:
    """Print lines that may contain text of devices: control characters are escaped."""
    for line in lines:
        echo(printable(line))


def emit_revocation(kind: str, name: str, outcome: RevocationOutcome, as_json: bool) -> None:
    """Print that the certificate of a client of the broker is revoked, and the steps left to the operator."""
    ended = "; the broker ended its session" if outcome.ended else ""
    document = {kind: name, "certificates": outcome.certificates, "session_ended": outcome.ended}
    lines = (f"{name}: revoked{ended}", *outcome.steps)
    emit({**document, "steps": list(outcome.steps)}, as_json, lambda: print_lines(*lines))
