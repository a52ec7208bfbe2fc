"""`outstation fleet collect` and `collector`: the collectors of a fleet."""

from __future__ import annotations

import logging
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.cli.fleet.common import database, db_option, fleet_option
from agent.cli.fleet.fleet_output import say
from agent.cli.output import emit, json_option
from agent.errors import UsageError
from agent.fleet import config as fleet_config
from agent.fleet.config import FleetConfig
from agent.fleet.database.interface import named
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
    home = fleet_config.find(folder)
    config = fleet_config.load(home)
    key = keys.load_private(Path(config.collector.key_file))
    if leave and share is None:
        raise UsageError("--leave ends the session of a collector with a name; say which: --share NAME")
    broker = config.broker_as(collectors.identity(config, share) if share is not None else config.collector)
    if leave:
        subscription.leave(broker, config.fleet.name, str(share))
        return
    store = FleetStore(database(config, db), partitions=config.fleet.partitions)
    try:
        if not store.enrolled():
            logger.warning("%s", _nobody_enrolled(store, config))
        upkeep = partial(_keep_repository, home, store)
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

    home = fleet_config.find(folder)
    done = collectors.add(home, fleet_config.load(home), name)
    document = {"collector": name, "files": [str(file) for file in done.files], "steps": done.steps}
    emit(document, as_json, lambda: say(*(f"Made: {file}" for file in done.files), *done.steps))


def _keep_repository(home: Path, store: FleetStore) -> None:
    if Layout(home).newest_root() is not None and store.lead("repository"):
        from agent.fleet.repository.upkeep import keep

        keep(home, store)


def _nobody_enrolled(store: FleetStore, config: FleetConfig) -> str:
    what = f"{store.name}: no device is enrolled in this database, so every message will be refused as `unknown key`"
    own = named(config.fleet.db)
    if store.name == own:
        return f"{what}; let devices in: outstation fleet enrol DEVICE"
    return f"{what}; `enrol` uses {own}: collect without --db, or name this one as fleet.db in fleet.toml"
