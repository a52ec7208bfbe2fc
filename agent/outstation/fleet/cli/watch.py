"""`outstation fleet devices watch` and `viewer`: verified messages as they arrive, and clients that read them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from outstation.fleet.cli.common import (
    db_option,
    emit_revocation,
    fleet_option,
    fleet_options,
    open_for_reading,
    print_lines,
)
from outstation.foundation.cli.output import emit
from outstation.foundation.errors import UsageError
from outstation.foundation.extras import install_command
from outstation.protocol.wire import keys


@click.command("watch", epilog="Example: outstation fleet devices watch --raw --seconds 10")
@click.option("--raw", is_flag=True, help="Print one line per message, like mosquitto_sub -v, with the verdict.")
@click.option("--seconds", type=click.FloatRange(min=0), metavar="S", help="Stop after this time.")
@db_option
@fleet_option
def watch(raw: bool, seconds: float | None, db: str | None, home: Path) -> None:
    """Show the devices as a live table: state, when seen, drift and alerts, from the database and each new message.

    Lines of verified messages with --raw, or if stdout is no terminal.
    """
    from outstation.fleet.collector.encryption_keys import EncryptionKeys
    from outstation.fleet.database.keyring import Keyring
    from outstation.fleet.watch import FleetWatcher, connect, receive_deliveries, show_lines

    config, store = open_for_reading(home, db)
    name, broker = config.fleet.name, config.broker_for(config.operator)
    keyring = Keyring(store, {"collector": keys.load_public_for(Path(config.collector.key_file))})
    client = f"outstation-{name}-watch-{os.getpid()}"
    watcher = FleetWatcher(name, keyring, EncryptionKeys(home))
    show = show_lines if raw or not sys.stdout.isatty() else _table_printer()
    if show is not show_lines:
        watcher.load(store)
    with contextlib.suppress(KeyboardInterrupt):
        show(
            watcher,
            lambda report: receive_deliveries(lambda: connect(broker, name, client), keyring.refresh, seconds, report),
        )


def _table_printer() -> Callable[..., None]:
    """Return what shows the live table. Raises UsageError if the package that draws it is missing."""
    from importlib.util import find_spec

    from outstation.fleet.watch import show_table

    if find_spec("rich") is None:
        raise UsageError(f"the table needs the package rich: {install_command('fleet')}, or use --raw")
    return show_table


@click.command("viewer", epilog="Example: outstation fleet keys viewer laptop")
@click.argument("name")
@click.option("--password", "with_password", is_flag=True, help="Make a password, shown once.")
@click.option("--revoke", is_flag=True, help="Shut NAME out: end its sessions, revoke its certificate and password.")
@fleet_options
def viewer(name: str, with_password: bool, revoke: bool, home: Path, as_json: bool) -> None:
    """Let a program read the fleet's messages at the broker as NAME: issue its TLS certificate, with read-only access.

    For MQTT Explorer, mosquitto_sub or Node-RED. A certificate has one connection at the fleet's broker. With
    --password NAME gets a user name and password at a second broker, which copies the fleet's messages. It takes any
    number of connections, with passwords and certificates. The first use writes its config, broker/viewers/.
    """
    from outstation.fleet import config as fleet_config
    from outstation.fleet.enrolment import viewers

    config = fleet_config.load(home)
    if revoke:
        emit_revocation("viewer", name, viewers.revoke(home, config, name), as_json)
        return
    done = (viewers.add_password if with_password else viewers.add)(home, config, name)
    secret = {} if done.password is None else {"username": done.user, "password": done.password}
    files = {"viewer": name, **secret, "files": [str(file) for file in done.files], "steps": done.steps}
    shown = [f"Created: {file}" for file in done.files]
    if done.password is not None:
        again = "It is shown once; repeat this for another one."
        shown += [f"User name: {done.user}", f"Password: {done.password}", again]
    emit(files, as_json, lambda: print_lines(*shown, *done.steps))
