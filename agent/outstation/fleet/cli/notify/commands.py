"""`outstation fleet alerts notify test` and `status`."""

from __future__ import annotations

from pathlib import Path

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import database_options, fleet_options, open_for_reading
from outstation.integrations.notify import cli as notifications


@click.group("notify", epilog="Example: outstation fleet alerts notify test")
def notify() -> None:
    """Test the targets of [notify] in fleet.toml, and show what waits. `fleet collect` does the notifying."""


@notify.command("test", epilog="Example: outstation fleet alerts notify test mail")
@click.argument("target", required=False)
@fleet_options
def test(target: str | None, home: Path, as_json: bool) -> None:
    """Send a test message to TARGET, or to all targets, now. Exit 1 if one does not accept it."""
    config = fleet_config.load(home)
    name = config.fleet.name
    notifications.test_targets(str(home / fleet_config.FILE), config.notify, target, name, name, as_json=as_json)


@notify.command("status", epilog="Example: outstation fleet alerts notify status --json")
@database_options
def status(db: str | None, home: Path, as_json: bool) -> None:
    """Show for each target what was sent, what waits, and the last failure."""
    config, store = open_for_reading(home, db)
    file = str(home / fleet_config.FILE)
    with store.snapshot() as connection:
        notifications.show_states(file, config.notify, connection, as_json=as_json)
