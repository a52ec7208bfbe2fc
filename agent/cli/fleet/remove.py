"""`outstation fleet remove`: shut a retired device out, and list it no longer."""

from __future__ import annotations

import getpass
import sys

import click

from agent import clock
from agent.cli.fleet.common import fleet_option, open_for_reading, open_store, print_lines
from agent.cli.output import emit, json_option
from agent.fleet import config as fleet_config


@click.command("remove", epilog="Example: outstation fleet remove pi-07")
@click.argument("device")
@click.option("--by", metavar="NAME", default=getpass.getuser, help="Who says so; default: your user name.")
@fleet_option
@json_option
def remove(device: str, by: str, folder: str | None, as_json: bool) -> None:
    """Remove a retired DEVICE: revoke what `fleet revoke` revokes, and list it and its alerts no longer.

    What it sent stays stored, and the audit still verifies it. `fleet devices --all` lists it. Exit 1 if its
    certificate could not be revoked: it is then not removed.
    """
    from agent.fleet.enrolment.revocation import RevocationOutcome, revoke_device

    home, now = fleet_config.find_folder(folder), clock.to_rfc3339(clock.read().wall_us)
    config, reader = open_for_reading(folder, device=device)
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
    if done.problem:
        lines = [f"{device}: not removed, as {done.problem}" if done.failed else f"Warning: {done.problem}", *lines]
    emit(document, as_json, lambda: print_lines(*(lines[:1] if done.failed else lines), *done.steps))
    if done.failed:
        sys.exit(1)
