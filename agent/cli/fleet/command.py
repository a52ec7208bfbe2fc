"""`outstation fleet command` and `outstation fleet revoke`: what operators do to devices."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent import clock
from agent.cli.fleet.common import fleet_option
from agent.cli.output import emit, json_option
from agent.config import BrokerConfig
from agent.errors import LinkDown, UsageError
from agent.fleet import config as fleet_config
from agent.fleet.config import FleetConfig
from agent.text import printable
from agent.toml_files import did_you_mean
from agent.wire import keys, topics

_WIPE_PROMPT = "This erases {device} for good. Type its name to go on"

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.fleet.commands import CommandResult
    from agent.fleet.database.store import FleetStore
    from agent.fleet.enrolment.revocation import RevocationOutcome


@click.command("command", epilog='Example: outstation fleet command pi-07 set-schedule exercise "every 5 s"')
@click.argument("device")
@click.argument("name")
@click.argument("args", nargs=-1)
@click.option("--wait", "wait_s", metavar="S", default=30.0, type=click.FloatRange(min=0), help="For the answer; 30.")
@click.option("--yes", is_flag=True, help="Wipe without asking.")
@fleet_option
@json_option
def command(
    device: str, name: str, args: tuple[str, ...], wait_s: float, yes: bool, folder: str | None, as_json: bool
) -> None:
    """Sign a command, send it to DEVICE and wait for its answer. Exit 1 where it is refused or does not come.

    \b
    run TASK                     run it now
    pause TASK, resume TASK      until further notice
    set-schedule TASK SCHEDULE   "every 5 s", "when 500 rows", a cron expression, or default
    rollback TASK                to the bundle that ran before
    relearn TASK [TIME]          learn the site reference again, from "24 h" of readings at least
    reset-reference TASK         discard the site reference, and learn another as configured
    label TASK COLUMNS           what was true, as JSON columns; `fleet label --send` makes them of a file
    report                       its status, and a health message now
    rotate-key                   a new signing key, made by the device
    wipe                         erase it: readings, outbox, state, keys
    """
    from agent.fleet.commands import parse_arguments

    home = fleet_config.find_folder(folder)
    config = fleet_config.load(home)
    wanted = parse_arguments(name, args)
    require_enrolled(config, device)
    if name == "wipe" and not wanted:
        if not yes and not _confirm_wipe(device):
            raise UsageError("not wiped; --yes does so without asking")
        first = send_command(home, config, device, name, {}, wait_s)
        if not first.ok or "confirm" not in (first.reply.data if first.reply else {}):
            _report_and_exit(first, as_json)
        assert first.reply is not None
        wanted = {"confirm": str(first.reply.data["confirm"])}
    _report_and_exit(send_command(home, config, device, name, wanted, wait_s), as_json)


@click.command("revoke", epilog="Example: outstation fleet revoke pi-07")
@click.argument("device")
@click.option("--key", "kid", metavar="KID", help="Only the key with this thumbprint.")
@fleet_option
@json_option
def revoke(device: str, kid: str | None, folder: str | None, as_json: bool) -> None:
    """Shut a stolen DEVICE out: refuse what it signs from now on, and its TLS certificate at the broker.

    What is stored stays valid. The certificate goes on the list crl.pem of the fleet's folder; the answer says what is
    left to do at the broker. Exit 1 where the certificate could not be revoked.
    """
    from agent.fleet.database.store import FleetStore
    from agent.fleet.enrolment.revocation import revoke_device

    home = fleet_config.find_folder(folder)
    config = fleet_config.load(home)
    require_enrolled(config, device)
    store = FleetStore(config.fleet.db, partitions=config.fleet.partitions)
    try:
        done = revoke_device(home, config, store, device, kid, clock.to_rfc3339(clock.read().wall_us))
    finally:
        store.close()
    document = {
        "device": device,
        "revoked": done.keys,
        "certificates": done.certificates,
        "problem": done.problem,
        "steps": done.steps,
    }
    emit(document, as_json, lambda: click.echo("\n".join(_revocation_lines(device, done))))
    if done.failed:
        sys.exit(1)


def send_command(
    home: Path, config: FleetConfig, device: str, name: str, args: dict[str, str], wait_s: float
) -> CommandResult:
    """On a connection of its own. Ends the program where the broker cannot be reached."""
    from agent.fleet.commands import reserve_counter, send
    from agent.fleet.keyring import Keyring
    from agent.transport.mqtt import Link

    fleet, key = config.fleet.name, keys.load_private(Path(config.operator.key_file))
    store = _open_store(config)
    try:
        keyring = Keyring(store)
        with reserve_counter(home, lambda: time.time_ns() // 1_000_000) as counter:
            client = f"outstation-{fleet}-command-{os.getpid()}"
            reply = str(topics.Topic(fleet, device, "reply"))
            link = Link(_command_broker(config), client, subscribe=[reply])
            try:
                return send(link, fleet, device, name, args, key, counter, keyring, wait_s)
            finally:
                link.close()
    except LinkDown as down:
        click.echo(f"outstation: {down}", err=True)
        sys.exit(1)
    finally:
        store.close()


def _revocation_lines(device: str, outcome: RevocationOutcome) -> Iterator[str]:
    again = f"To let it in again: outstation fleet enrol {device} --replace"
    yield f"{device}: revoked {', '.join(outcome.keys) or 'before'}. {again}"
    if outcome.certificates:
        yield f"Its certificate ({', '.join(outcome.certificates)}) is on the list. The broker still has to read it:"
    if outcome.problem:
        yield outcome.problem[0].upper() + outcome.problem[1:]
    yield from outcome.steps


def _command_broker(config: FleetConfig) -> BrokerConfig:
    """The certificate for commands, so that they do not end the connection of a `fleet watch`."""
    return config.broker_for(config.commander or config.operator)


def _open_store(config: FleetConfig) -> FleetStore:
    from agent.fleet.database.store import FleetStore

    return FleetStore(config.fleet.db, read_only=True)


def require_enrolled(config: FleetConfig, device: str) -> None:
    store = _open_store(config)
    try:
        known = store.enrolled_devices()
    finally:
        store.close()
    if device not in known:
        raise UsageError(f"no device {device!r} is enrolled{did_you_mean(device, known)}")


def _confirm_wipe(device: str) -> bool:
    if not sys.stdin.isatty():
        return False
    typed: str = click.prompt(_WIPE_PROMPT.format(device=device), default="", show_default=False, err=True)
    return typed == device


def _report_and_exit(sent: CommandResult, as_json: bool) -> None:
    """Print what came of it, and end with its exit code."""
    document = sent.to_dict()

    def human() -> None:
        click.echo(printable(document["summary"]))
        if document["data"]:
            import msgspec

            click.echo(printable(msgspec.json.format(msgspec.json.encode(document["data"]), indent=2).decode()))

    emit(document, as_json, human)
    sys.exit(0 if sent.ok else 1)
