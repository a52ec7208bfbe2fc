"""`outstation notify test` and `status`: notifications of a device without a collector."""

from __future__ import annotations

import click

from outstation.device.bootstrap import device
from outstation.device.notifications import read_states
from outstation.foundation.cli.options import config_options
from outstation.integrations.notify import cli as notifications


@click.group("notify", epilog="Example: outstation notify test")
def notify() -> None:
    """Test the targets of [notify] in outstation.toml, and show what waits. `outstation run` does the notifying."""


@notify.command("test", epilog="Example: outstation notify test mail")
@click.argument("target", required=False)
@config_options
def test(target: str | None, config_file: str | None, as_json: bool) -> None:
    """Send a test message to TARGET, or to all targets, now. Exit 1 if one does not accept it."""
    file, conf = device.load_config(config_file)
    names = (conf.device.id, conf.device.fleet)
    notifications.test_targets(str(file), conf.notify, target, *names, as_json=as_json)


@notify.command("status", epilog="Example: outstation notify status --json")
@config_options
def status(config_file: str | None, as_json: bool) -> None:
    """Show for each target what was sent, what waits, and the last failure."""
    file, conf = device.load_config(config_file)
    with read_states(conf.data_dir) as db:
        notifications.show_states(str(file), conf.notify, db, as_json=as_json)
