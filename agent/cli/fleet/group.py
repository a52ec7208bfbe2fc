"""`outstation fleet …`: the commands of the machine that collects."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.fleet.collect import collect, collector
from agent.cli.fleet.command import command, revoke
from agent.cli.fleet.common import database_url, db_option, fleet_option
from agent.cli.fleet.drift import drift
from agent.cli.fleet.evidence import evidence
from agent.cli.fleet.fleet_output import print_lines, print_table
from agent.cli.fleet.label import label
from agent.cli.fleet.publish import publish
from agent.cli.fleet.repository import repository
from agent.cli.fleet.rollout import rollout
from agent.cli.fleet.simulate import simulate
from agent.cli.output import emit, json_option
from agent.config import BrokerConfig, check_broker
from agent.errors import ConfigError, UsageError
from agent.fleet import config as fleet_config
from agent.fleet.config import FleetConfig
from agent.names import is_name
from agent.toml_files import did_you_mean
from agent.wire import keys

if TYPE_CHECKING:
    from agent.fleet.database.store import FleetStore

logger = logging.getLogger(__name__)

_device_option = click.option("--device", metavar="D", help="Only this device.")


@click.group()
def fleet() -> None:
    """The fleet's side: enrol devices, collect, watch, command, audit."""


fleet.add_command(collect)
fleet.add_command(collector)
fleet.add_command(command)
fleet.add_command(drift)
fleet.add_command(evidence)
fleet.add_command(revoke)
fleet.add_command(label)
fleet.add_command(publish)
fleet.add_command(repository)
fleet.add_command(rollout)
fleet.add_command(simulate)


@fleet.command("init", epilog="Example: outstation fleet init acme --broker mqtts://broker.example.org")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--name", help="The fleet's name, a level of its topics; default the folder's name.")
@click.option("--broker", "url", metavar="URL", help="Where devices reach the broker; default mqtts://THIS-HOST:8883.")
@json_option
def init(folder: Path, name: str | None, url: str | None, as_json: bool) -> None:
    """Make a fleet in DIR: keys, certificate authority, broker config with an access list."""
    from agent.fleet.enrolment.enrol import init_fleet

    name = name or folder.resolve().name
    if not is_name(name):
        raise UsageError(f"{name!r} cannot name a fleet: 1-64 of a-z 0-9 . _ - , first a letter or digit; use --name")
    broker = BrokerConfig(url=url or f"mqtts://{socket.gethostname().lower()}:8883")
    try:
        check_broker("--broker", broker)
    except ConfigError as error:
        raise UsageError(f"--broker: {error.problem}") from None
    config = init_fleet(folder, name, broker)
    public = {role: keys.load_public_for(folder / f"{role}.key").text for role in ("collector", "operator")}
    conf = folder / "broker" / "mosquitto.conf"
    document = {
        "fleet": config.fleet.name,
        "dir": str(folder),
        "broker": broker.url,
        **public,
        "broker_conf": str(conf),
    }
    done = f"Fleet {name} in {folder}. Start the broker with: mosquitto -c {conf}"
    following = f"Next: outstation fleet enrol DEVICE --dir {folder} --bundle-out DEVICE.tar.gz"
    emit(document, as_json, lambda: print_lines(done, following))


@fleet.command("enrol", epilog="Example: outstation fleet enrol pi-07 --bundle-out pi-07.tar.gz")
@click.argument("device")
@click.option("--key", metavar="PUB", help="The device's public key, or a file with it; without it one is made here.")
@click.option("--replace", is_flag=True, help="Revoke the device's key and TLS certificate, and enrol the new one.")
@click.option(
    "--keep-backlog",
    metavar="SEQ",
    type=click.IntRange(min=0),
    help="With --replace: what the old key signed up to SEQ of its log still counts; `outstation status` tells which.",
)
@click.option(
    "--keep-certificate",
    is_flag=True,
    help="With --replace: its TLS certificate goes on connecting; for a device that was not stolen and is far away.",
)
@click.option("--bundle-out", metavar="FILE", type=click.Path(path_type=Path), help="Its files as one .tar.gz.")
@fleet_option
@json_option
def enrol(
    device: str,
    key: str | None,
    replace: bool,
    keep_backlog: int | None,
    keep_certificate: bool,
    bundle_out: Path | None,
    folder: str | None,
    as_json: bool,
) -> None:
    """Let DEVICE in: register its signing key, issue its TLS certificate, write its config."""
    from agent.fleet.database.store import FleetStore
    from agent.fleet.enrolment import enrol as enrolment

    home = fleet_config.find_folder(folder)
    config = fleet_config.load(home)
    if keep_backlog is not None and not replace:
        raise UsageError("--keep-backlog says what becomes of a key that --replace replaces; add that")
    if keep_certificate and not replace:
        raise UsageError("--keep-certificate says what becomes of a certificate that --replace replaces; add that")
    if bundle_out is not None and bundle_out.exists():
        raise UsageError(f"{bundle_out}: is there already; name a new file")
    public = keys.load_public(key) if key else None
    store = FleetStore(config.fleet.db, partitions=config.fleet.partitions)
    try:
        done = enrolment.enrol(
            *(home, config, store, device),
            key=public,
            replace=replace,
            keep_through=keep_backlog,
            keep_certificate=keep_certificate,
        )
    finally:
        store.close()
    if bundle_out is not None:
        enrolment.pack_device_files(done.folder, bundle_out)
    document = {
        "device": device,
        "fleet": config.fleet.name,
        "key": done.key.text,
        "thumbprint": done.key.kid,
        "new": done.is_new,
        "files": str(done.folder),
        "bundle": str(bundle_out) if bundle_out else None,
        "revoked_certificates": done.revoked.certificates,
        "problem": done.revoked.problem,
        "steps": done.revoked.steps,
    }
    what = "enrolled" if done.is_new else "was enrolled with this key already"
    unpack = f"On the device: outstation init DIR --from {bundle_out}"
    where = unpack if bundle_out else f"Its files: {done.folder}; --bundle-out FILE packs them"
    lines = [f"{device} {what}, key {done.key.text}", where]
    if done.revoked.certificates:
        lines += [f"Its former certificate ({', '.join(done.revoked.certificates)}) is revoked.", *done.revoked.steps]
    if done.revoked.problem:
        lines.append(f"Beware: {done.revoked.problem}.")
    emit(document, as_json, lambda: print_lines(*lines))


@fleet.command("devices", epilog="Example: outstation fleet devices --dir acme")
@db_option
@fleet_option
@json_option
def devices(db: str | None, folder: str | None, as_json: bool) -> None:
    """The enrolled devices and what was heard of them."""
    config, store = open_for_reading(folder, db)
    rows = [
        {
            "device": known["device"],
            "fleet": config.fleet.name,
            "key": known["key"],
            "state": known["state"] or "enrolled",
            "last_seen": known["last_seen"],
            "through": known["through"] or 0,
            "alerts": known["alerts"],
            "clock": known["clock"],
        }
        for known in store.devices()
    ]
    cells = [
        [r["device"], r["state"], r["clock"] or "unknown", r["last_seen"] or "never", r["through"], r["alerts"]]
        for r in rows
    ]
    empty = "No device is enrolled yet: outstation fleet enrol DEVICE"
    columns = ["device", "state", "clock", "last seen", "through", "open alerts"]
    emit(rows, as_json, lambda: print_table(columns, cells, empty))


@fleet.command("alerts", epilog="Example: outstation fleet alerts --device pi-07")
@click.option("--all", "closed", is_flag=True, help="Cleared ones too.")
@_device_option
@db_option
@fleet_option
@json_option
def alerts(closed: bool, device: str | None, db: str | None, folder: str | None, as_json: bool) -> None:
    """Open alerts, oldest first."""
    _, store = open_for_reading(folder, db, device)
    rows = store.alerts(device, closed=closed)
    columns = ["time", "device", "task", "state", "severity", "alert", "summary"]
    cells = [[row[name] or "" for name in columns] for row in rows]
    emit(
        rows, as_json, lambda: print_table(columns, cells, "No alert was ever raised." if closed else "No open alert.")
    )


@fleet.command("gaps", epilog="Example: outstation fleet gaps")
@_device_option
@db_option
@fleet_option
@json_option
def gaps(device: str | None, db: str | None, folder: str | None, as_json: bool) -> None:
    """Messages that are missing, and those that a device declared as evicted."""
    _, store = open_for_reading(folder, db, device)
    rows = store.gaps(device)
    columns = ["device", "log", "from", "to", "declared"]
    cells = [[*(row[name] for name in columns[:4]), "evicted" if row["declared"] else "missing"] for row in rows]
    emit(rows, as_json, lambda: print_table([*columns[:4], "why"], cells, "Nothing is missing."))


@fleet.command("audit", epilog="Example: outstation fleet audit --json")
@_device_option
@db_option
@fleet_option
@json_option
def audit(device: str | None, db: str | None, folder: str | None, as_json: bool) -> None:
    """Verify every stored message again: signatures, chain, gaps, coverage. Exit 1 if anything is wrong."""
    from agent.fleet.audit.audit import audit as run_audit

    config, store = open_for_reading(folder, db, device)
    trusted = fleet_config.load_trusted_keys(config)
    with progress("auditing", store.count_messages(device)) as advance:
        report = run_audit(store, device, advance, trusted).to_dict()
    emit(report, as_json, lambda: print_lines(*_audit_lines(report)))
    if not report["passed"]:
        sys.exit(1)


@fleet.command("watch", epilog="Example: outstation fleet watch --raw --seconds 10")
@click.option("--raw", is_flag=True, help="One line per message, like mosquitto_sub -v, with the verdict.")
@click.option("--seconds", type=click.FloatRange(min=0), metavar="S", help="Stop after this time.")
@db_option
@fleet_option
def watch(raw: bool, seconds: float | None, db: str | None, folder: str | None) -> None:
    """Look on: verified messages as a live table; as lines with --raw, or where stdout is no terminal."""
    from agent.fleet.keyring import Keyring
    from agent.fleet.screen import show_lines, show_table
    from agent.fleet.watch import FleetWatcher, connect, receive_deliveries

    config, store = open_for_reading(folder, db)
    name, broker = config.fleet.name, config.broker_for(config.operator)
    keyring = Keyring(store, {"collector": keys.load_public_for(Path(config.collector.key_file))})
    client = f"outstation-{name}-watch-{os.getpid()}"
    show = show_lines if raw or not sys.stdout.isatty() else show_table
    with contextlib.suppress(KeyboardInterrupt):
        show(
            FleetWatcher(name, keyring),
            lambda tell: receive_deliveries(lambda: connect(broker, name, client), keyring.refresh, seconds, tell),
        )


def open_for_reading(folder: str | None, db: str | None, device: str | None = None) -> tuple[FleetConfig, FleetStore]:
    """The config, and the database open for reading until the command ends. Raises UsageError for an unknown device."""
    from agent.fleet.database.store import FleetStore

    config = fleet_config.load(fleet_config.find_folder(folder))
    store = FleetStore(database_url(config, db), read_only=True)
    click.get_current_context().call_on_close(store.close)
    if device is not None:
        known = store.enrolled_devices()
        if device not in known:
            raise UsageError(f"no device {device!r} is enrolled{did_you_mean(device, known)}")
    return config, store


def _audit_lines(report: dict[str, Any]) -> Iterable[str]:
    """The audit's report for a person."""
    missing = [gap for gap in report["gaps"] if not gap["declared"]]
    yield (
        f"{report['messages']} messages of {report['devices']} devices: {report['invalid_count']} invalid, "
        f"{len(missing)} gaps, {len(report['gaps']) - len(missing)} declared evictions, "
        f"{report['duplicates']} duplicates"
    )
    for entry in report["invalid"][:50]:
        yield f"  {entry['device']} {entry['log']} seq {entry['seq']} {entry['reason']}"
    for gap in missing[:50]:
        yield f"  {gap['device']} {gap['log']} seq {gap['from']}-{gap['to']} is missing"
    if report["decisions"] or report["invalid_decisions"]:
        yield f"{report['decisions']} decisions about roll-outs: {len(report['invalid_decisions'])} invalid"
    for entry in report["invalid_decisions"][:50]:
        where = f"{entry['rollout']} decision {entry['n']}" if entry["n"] is not None else entry["rollout"] or "fleet"
        yield f"  {where} {entry['reason']}"
    if not report["messages"]:
        yield "Nothing was collected yet: start `outstation fleet collect` and a device."
    yield "PASSED" if report["passed"] else "FAILED"


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where work takes over a second and somebody looks; it is told how much was done."""
    if total < 5000 or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
