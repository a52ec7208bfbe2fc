"""`outstation fleet collect` and `collector`: run a collector, and add further ones."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.bridge.foreign import run_foreign
from outstation.fleet.bridge_config import BRIDGES
from outstation.fleet.cli.common import db_option, emit_revocation, fleet_option, fleet_options, open_store, print_lines
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.interface import display_name
from outstation.fleet.database.store import FleetStore
from outstation.fleet.repository.layout import Layout
from outstation.foundation.cli.log_format import configure_logging
from outstation.foundation.cli.output import emit
from outstation.foundation.errors import ConfigError, UsageError
from outstation.protocol.wire import keys

if TYPE_CHECKING:
    from outstation.fleet.collector.collector import Collector

logger = logging.getLogger(__name__)


@click.command("collect", epilog="Example: outstation fleet collect --dir acme")
@click.option("--share", metavar="NAME", help="Share the messages with other collectors, under NAME; needs PostgreSQL.")
@click.option("--leave", is_flag=True, help="With --share: end the broker session of NAME, which will not run again.")
@db_option
@fleet_option
def collect(share: str | None, leave: bool, db: str | None, home: Path) -> None:
    """Collect messages of devices: verify, store, acknowledge. Runs until SIGTERM or Ctrl-C.

    If the online keys of the repository are in the fleet's folder, the collector signs its timestamp each day.
    """
    from outstation.fleet.collector.collector import Collector, end_session
    from outstation.fleet.collector.encryption_keys import EncryptionKeys
    from outstation.fleet.enrolment import collectors
    from outstation.fleet.incidents.conditions import list_certificates

    configure_logging(logging.INFO, "%(asctime)s %(levelname)s %(message)s")
    config = fleet_config.load(home)
    key = keys.load_private(Path(config.collector.key_file))
    if leave and share is None:
        raise UsageError("--leave ends the broker session of a named collector; add --share NAME")
    if share is not None and not config.fleet.share_group:
        problem = "is missing, and collectors with --share need it; copy it from the fleet.toml of the first one"
        raise ConfigError(str(home / fleet_config.FILE), "fleet.share_group", problem)
    broker = config.broker_for(collectors.resolve_identity(config, share) if share is not None else config.collector)
    if leave:
        end_session(broker, config.fleet.name, str(share))
        return
    with open_store(config, db) as store:
        store.join_collectors()
        if not store.enrolled_devices():
            configured = display_name(config.fleet.db)
            fix = "enrol devices: outstation fleet enrol DEVICE"
            if store.name != configured:
                fix = f"`enrol` uses {configured}: collect without --db, or set fleet.db in fleet.toml to this one"
            problem = "no device is enrolled in this database, so every message is refused as `unknown key`"
            logger.warning("%s: %s; %s", store.name, problem, fix)

        def maintain_repository() -> None:
            if Layout(home).newest_root_path() is not None and store.acquire_leadership("repository"):
                from outstation.fleet.repository.upkeep import maintain

                maintain(home, store)

        collector = Collector(
            *(config.fleet.name, broker, store, key),
            upkeep=maintain_repository,
            share=share,
            group=config.fleet.share_group,
            quota=config.quota,
            encryption_keys=EncryptionKeys(home),
            certificates=lambda: list_certificates(home, config.certificate_files, store.active_devices()),
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: collector.stop())
        with (
            _notifying(config, store.location),
            _publishing(home, config, store, lambda: collector.is_leader),
            _serving_metrics(config, str(store.location), collector),
        ):
            collector.run()


@contextlib.contextmanager
def _serving_metrics(config: FleetConfig, location: str, collector: Collector) -> Iterator[None]:
    """Serve the metrics of `collector` meanwhile, if [metrics] listen says where."""
    if not config.metrics.listen:
        yield
        return
    from outstation.fleet.metrics.collector_families import build_families
    from outstation.fleet.metrics.endpoint import MetricsListener
    from outstation.fleet.metrics.exporter import DatabaseExporter

    name, share = config.fleet.name, collector.share or ""
    exporter = DatabaseExporter(name, location, lambda: build_families(name, share, collector.statistics, config.quota))
    listener = MetricsListener(config.metrics, exporter)
    listener.start()
    try:
        yield
    finally:
        listener.stop()


@contextlib.contextmanager
def _notifying(config: FleetConfig, location: Path | str) -> Iterator[None]:
    """Notify beside the block, in a thread with a database connection of its own, if [notify] names a target."""
    if not config.notify.is_on:
        yield
        return
    from outstation.fleet.incidents.notify_source import NOTIFIER_JOB, open_source
    from outstation.integrations.notify.notifier import NotifierThread

    needs_groups = any(route.groups for route in config.notify.routes)
    notifier = NotifierThread(
        config.notify,
        lambda: open_source(location, config.fleet.name, needs_groups=needs_groups),
        lambda store: store.acquire_leadership(NOTIFIER_JOB),
    )
    notifier.start()
    try:
        yield
    finally:
        notifier.stop()


@contextlib.contextmanager
def _publishing(home: Path, config: FleetConfig, store: FleetStore, is_leader: Callable[[], bool]) -> Iterator[None]:
    """Publish for other systems beside the block, as fleet.toml asks for it. Raises UsageError."""
    with contextlib.ExitStack() as publishers:
        for place, kind, section in config.list_bridges():
            module = BRIDGES.load(kind, str(home / fleet_config.FILE), f"{place}.kind")
            build = partial(module.build_publisher, config, section, store.location, is_leader)
            publishers.enter_context(build() if BRIDGES.is_shipped(kind) else run_foreign(place, build))
        yield


@click.command("homeassistant", epilog="Example: outstation fleet keys homeassistant --dir acme")
@fleet_options
def homeassistant(home: Path, as_json: bool) -> None:
    """Let the bridge and Home Assistant connect to the fleet's broker: issue their TLS certificates.

    It is not needed where [homeassistant.broker] in fleet.toml names Home Assistant's own broker.
    """
    from outstation.fleet.enrolment import homeassistant as clients

    done = clients.add(home, fleet_config.load(home))
    document = {"files": [str(file) for file in done.files], "steps": done.steps}
    emit(document, as_json, lambda: print_lines(*(f"Created: {file}" for file in done.files), *done.steps))


@click.command("collector", epilog="Example: outstation fleet keys collector b")
@click.argument("name")
@click.option("--revoke", is_flag=True, help="Shut NAME out: end its session, revoke its certificate.")
@fleet_options
def collector(name: str, revoke: bool, home: Path, as_json: bool) -> None:
    """Let another collector connect to the broker as NAME: issue its TLS certificate, give it access.

    Run it with --share NAME, on this machine or with a copy of fleet.toml, ca.pem, collector.key, the folder
    encryption, and the two new files.
    """
    from outstation.fleet.enrolment import collectors

    config = fleet_config.load(home)
    if revoke:
        emit_revocation("collector", name, collectors.revoke(home, config, name), as_json)
        return
    done = collectors.add(home, config, name)
    document = {"collector": name, "files": [str(file) for file in done.files], "steps": done.steps}
    emit(document, as_json, lambda: print_lines(*(f"Created: {file}" for file in done.files), *done.steps))


@click.command("reissue", epilog="Example: outstation fleet keys reissue operator")
@click.argument("role")
@fleet_options
def reissue(role: str, home: Path, as_json: bool) -> None:
    """Revoke a stolen TLS certificate of ROLE, and issue another: collector, operator, commander or broker-admin.

    Copy the two new files to every machine that uses the role. A stolen signing key is another matter: see `outstation
    fleet keys revoke`.
    """
    from outstation.fleet.enrolment import clients

    config = fleet_config.load(home)
    with open_store(config) as store:
        emit_revocation("role", role, clients.reissue(home, config, store, role), as_json)
