"""`outstation fleet collect` and `collector`: the collectors of a fleet."""

from __future__ import annotations

import logging
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.cli.fleet.common import database_url, db_option, fleet_option
from agent.cli.fleet.fleet_output import print_lines
from agent.cli.output import emit, json_option
from agent.errors import UsageError
from agent.fleet import config as fleet_config
from agent.fleet.config import FleetConfig
from agent.fleet.database.interface import display_name
from agent.fleet.repository.layout import Layout
from agent.wire import keys

if TYPE_CHECKING:
    from agent.fleet.database.store import FleetStore

logger = logging.getLogger(__name__)


@click.command("collect", epilog="Example: outstation fleet collect --dir acme")
@click.option("--share", metavar="NAME", help="Share the messages with other collectors, as NAME; needs PostgreSQL.")
@click.option("--leave", is_flag=True, help="With --share: NAME is not coming back; end its session at the broker.")
@db_option
@fleet_option
def collect(share: str | None, leave: bool, db: str | None, folder: str | None) -> None:
    """Collect what devices send: verify, store, acknowledge. Runs until SIGTERM or Ctrl-C.

    Where the repository's online keys are in the fleet's folder, its timestamp is signed anew each day.
    """
    from agent.fleet.collector import subscription
    from agent.fleet.collector.collector import Collector
    from agent.fleet.database.store import FleetStore
    from agent.fleet.enrolment import collectors

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    home = fleet_config.find_folder(folder)
    config = fleet_config.load(home)
    key = keys.load_private(Path(config.collector.key_file))
    if leave and share is None:
        raise UsageError("--leave ends the session of a collector with a name; say which: --share NAME")
    broker = config.broker_for(collectors.resolve_identity(config, share) if share is not None else config.collector)
    if leave:
        subscription.end_session(broker, config.fleet.name, str(share))
        return
    store = FleetStore(database_url(config, db), partitions=config.fleet.partitions)
    try:
        if not store.enrolled_devices():
            logger.warning("%s", _no_devices_warning(store, config))
        upkeep = partial(_maintain_repository, home, store)
        collector = Collector(config.fleet.name, broker, store, key, upkeep=upkeep, share=share)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: collector.stop())
        collector.run()
    finally:
        store.close()


@click.command("collector", epilog="Example: outstation fleet collector b")
@click.argument("name")
@fleet_option
@json_option
def collector(name: str, folder: str | None, as_json: bool) -> None:
    """Let another collector into the broker as NAME: its TLS certificate, its place in the access list.

    It runs with --share NAME, on this machine or with a copy of fleet.toml, ca.pem, collector.key
    and the two new files.
    """
    from agent.fleet.enrolment import collectors

    home = fleet_config.find_folder(folder)
    done = collectors.add(home, fleet_config.load(home), name)
    document = {"collector": name, "files": [str(file) for file in done.files], "steps": done.steps}
    emit(document, as_json, lambda: print_lines(*(f"Made: {file}" for file in done.files), *done.steps))


def _maintain_repository(home: Path, store: FleetStore) -> None:
    if Layout(home).newest_root_path() is not None and store.acquire_leadership("repository"):
        from agent.fleet.repository.upkeep import maintain

        maintain(home, store)


def _no_devices_warning(store: FleetStore, config: FleetConfig) -> str:
    what = f"{store.name}: no device is enrolled in this database, so every message will be refused as `unknown key`"
    own = display_name(config.fleet.db)
    if store.name == own:
        return f"{what}; let devices in: outstation fleet enrol DEVICE"
    return f"{what}; `enrol` uses {own}: collect without --db, or name this one as fleet.db in fleet.toml"
