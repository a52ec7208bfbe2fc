"""`outstation fleet command`, `revoke` and `remove`: send a command to a device, shut it out, list it no longer."""

from __future__ import annotations

import getpass
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outstation.fleet.cli.common import fleet_options, open_for_reading, open_store, print_lines, wait_option
from outstation.fleet.config import FleetConfig
from outstation.foundation import clock
from outstation.foundation.cli.output import echo, emit
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import keys, topics

if TYPE_CHECKING:
    from outstation.fleet.commands import CommandResult
    from outstation.fleet.database.store import FleetStore


@click.command("command", epilog='Example: outstation fleet command pi-07 set-schedule exercise "every 5 s"')
@click.argument("device")
@click.argument("name")
@click.argument("args", nargs=-1)
@wait_option
@click.option("--yes", is_flag=True, help="Wipe without asking.")
@fleet_options
def command(device: str, name: str, args: tuple[str, ...], wait_s: float, yes: bool, home: Path, as_json: bool) -> None:
    """Sign a command, send it to DEVICE and wait for its reply. Exit 1 if it is refused or no reply arrives.

    \b
    run TASK                     run the task now
    pause TASK, resume TASK      stop and restart the task's schedule
    set-schedule TASK SCHEDULE   "every 5 s", "when 500 rows", a cron expression, or default
    rollback TASK                activate the bundle that ran before
    relearn TASK [TIME]          learn the site's drift reference again, from at least TIME ("24 h") of readings
    reset-reference TASK         discard it, and learn another as the config says
    accept-reference TASK        accept a learned reference that deviates
    label TASK COLUMNS           add labels in JSON columns; `fleet labels add --send` reads them from a file
    sample TASK ROW              send readings around a result, if the device's owner consents ([samples])
    report                       return its status, and send a health message now
    rotate-key                   let the device create a new signing key
    install-certificate PEM      store a renewed TLS certificate; `fleet devices renew` sends it
    wipe                         erase readings, outbox, state and keys: at once if a second operator's key sends it,
                                 too, else after [operators] wipe_delay
    cancel-wipe                  cancel the pending wipe
    """
    from outstation.fleet.commands import parse_arguments

    values = parse_arguments(name, args)
    config, store = open_for_reading(home, device=device)
    if name == "wipe" and not values:
        if not yes and not confirm_wipe(device):
            raise UsageError("not wiped, as the name was not confirmed; --yes wipes without asking")
        first = send_command(home, config, store, device, name, {}, wait_s)
        if not first.ok or first.reply is None or "confirm" not in first.reply.data:
            _report(first, as_json)
            return
        values = {"confirm": str(first.reply.data["confirm"])}
    _report(send_command(home, config, store, device, name, values, wait_s), as_json)


@click.command("revoke", epilog="Example: outstation fleet devices revoke pi-07")
@click.argument("device")
@click.option("--kid", metavar="KID", help="Revoke only the key with this thumbprint.")
@fleet_options
def revoke(device: str, kid: str | None, home: Path, as_json: bool) -> None:
    """Shut a stolen DEVICE out: revoke its signing keys at the collector, its access and certificate at the broker.

    The broker ends its session at once, without a restart. Stored messages stay valid. The certificate is added to the
    revocation list crl.pem of the fleet's folder; the output lists the steps at the broker. Exit 1 if the certificate
    could not be revoked.
    """
    from outstation.fleet.enrolment.revocation import revoke_device

    config, _ = open_for_reading(home, device=device)
    with open_store(config) as store:
        done = revoke_device(home, config, store, device, kid, clock.now_rfc3339())
    document = {
        "device": device,
        "revoked": done.keys,
        "certificates": done.certificates,
        "session_ended": done.ended,
        "problem": done.problem,
        "steps": done.steps,
    }
    again = f"To let it in again: outstation fleet enrol {device} --replace"
    lines = [f"{device}: revoked {', '.join(done.keys) or 'before'}. {again}"]
    if done.ended:
        lines.append("The broker ended its session, and takes nothing from it any more.")
    if done.certificates:
        serials = ", ".join(done.certificates)
        still = "which the broker still has to read:" if done.steps else "which the broker reads."
        lines.append(f"Its certificate ({serials}) is on the revocation list, {still}")
    if done.problem:
        lines.append(done.problem[0].upper() + done.problem[1:])
    emit(document, as_json, lambda: print_lines(*lines, *done.steps), passed=not done.failed)


@click.command("remove", epilog="Example: outstation fleet devices remove pi-07")
@click.argument("device")
@click.option("--by", metavar="NAME", default=getpass.getuser, help="Who says so; default: your user name.")
@fleet_options
def remove(device: str, by: str, home: Path, as_json: bool) -> None:
    """Remove a retired DEVICE: revoke what `fleet devices revoke` revokes, and list it and its alerts no longer.

    What it sent stays stored, and the audit still verifies it. `fleet devices --all` lists it. Exit 1 if its
    certificate could not be revoked: it is then not removed.
    """
    from outstation.fleet.enrolment.revocation import RevocationOutcome, revoke_device

    now = clock.now_rfc3339()
    config, reader = open_for_reading(home, device=device)
    [known] = [row for row in reader.devices(with_retired=True) if row["device"] == device]
    with open_store(config) as store:
        is_shut_out = known["state"] in ("revoked", "retired")
        done = RevocationOutcome([], []) if is_shut_out else revoke_device(home, config, store, device, None, now)
        if not done.failed:
            store.retire(device, by, now)
    document = {
        "device": device,
        "removed": not done.failed,
        "revoked": done.keys,
        "certificates": done.certificates,
        "problem": done.problem,
        "steps": done.steps,
    }
    lines = [f"{device}: removed. To let it in again: outstation fleet enrol {device} --replace"]
    if done.failed:
        lines = [f"{device}: not removed, as {done.problem}"]
    elif done.problem:
        lines.insert(0, f"Warning: {done.problem}")
    emit(document, as_json, lambda: print_lines(*lines, *done.steps), passed=not done.failed)


def send_command(
    home: Path, config: FleetConfig, store: FleetStore, device: str, name: str, args: dict[str, str], wait_s: float
) -> CommandResult:
    """Send a command on its own connection. Raises LinkDown if the broker cannot be reached."""
    from outstation.fleet.commands import reserve_counter, send
    from outstation.fleet.database.keyring import Keyring
    from outstation.protocol.transport.mqtt import Link

    fleet, key = config.fleet.name, keys.load_private(Path(config.operator.key_file))
    keyring = Keyring(store)
    with reserve_counter(home, lambda: time.time_ns() // 1_000_000) as counter:
        client = f"outstation-{fleet}-command-{os.getpid()}"
        reply = str(topics.Topic(fleet, device, "reply"))
        with Link(config.command_broker, client, subscribe=[reply]) as link:
            return send(link, fleet, device, name, args, key, counter, keyring, wait_s)


def confirm_wipe(device: str) -> bool:
    """Return True if the operator types the device's name at a terminal."""
    prompt = f"This erases {device} permanently. Type its name to continue"
    return sys.stdin.isatty() and click.prompt(prompt, default="", show_default=False, err=True) == device


def _report(sent: CommandResult, as_json: bool) -> None:
    """Print the result of a command; exit with code 1 if it failed."""
    document = sent.to_dict()

    def print_human() -> None:
        echo(document["summary"])
        if document["data"]:
            from outstation.device.cli.reply import print_reply

            echo("")
            print_reply(document["name"], document["data"])

    emit(document, as_json, print_human, passed=sent.ok)
