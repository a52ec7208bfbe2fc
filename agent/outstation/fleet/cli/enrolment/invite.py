"""Command `outstation fleet invite`: make one-time codes, and answer the devices that use them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import fleet_options, open_store
from outstation.foundation import clock
from outstation.foundation.cli.options import DURATION
from outstation.foundation.cli.output import echo
from outstation.foundation.errors import UsageError
from outstation.foundation.text import format_duration, printable_json

if TYPE_CHECKING:
    from outstation.fleet.enrolment.registrar import InvitationEvent

_MAX_VALID_S = 30 * 86_400.0


@click.command("invite", epilog="Example: outstation fleet invite pi-07")
@click.argument("devices", metavar="[DEVICE]...", nargs=-1)
@click.option(
    "--valid", "valid_s", type=DURATION, default="24 h", show_default=True, help="How long a code can be used."
)
@click.option("--no-wait", is_flag=True, help="Only make the codes; `outstation fleet invite` answers later.")
@fleet_options
def invite(devices: tuple[str, ...], valid_s: float, no_wait: bool, home: Path, as_json: bool) -> None:
    """Make a one-time code for each DEVICE, then let in over MQTT the devices that use theirs, until all have joined.

    Bring the code to the device by another way than the broker, and keep it secret until then: it lets one key in.
    Without DEVICE, answer for the invitations that are open. With --json, each step is a line.
    """
    from outstation.fleet.enrolment import invitations, registrar

    config = fleet_config.load(home)
    if not 60 <= valid_s <= _MAX_VALID_S:
        raise UsageError("--valid: must be between 1 min and 30 d")
    if no_wait and not devices:
        raise UsageError("--no-wait only makes codes; name a device")
    for device in devices:
        code, outcome = invitations.create(home, config, device, clock.read().wall_us, round(valid_s * 1e6))
        document = {"device": device, "state": "invited", "code": code, "steps": [*outcome.steps]}
        lines = [
            f"{device}: on the device, within {format_duration(valid_s * 1e6)}:",
            f"outstation join --code {code}",
            *outcome.steps,
        ]
        _print(as_json, document, *lines)
    if no_wait:
        return
    if not invitations.list_open(home):
        raise UsageError("no invitation is open; name a device to invite")
    if not as_json:
        echo("Waiting for the devices; Ctrl-C stops, and `outstation fleet invite` goes on.", err=True)
    with open_store(config) as store:
        answering = registrar.Registrar(home, config, store)
        try:
            for event in registrar.serve(answering, config, home):
                _print_event(event, as_json)
        finally:
            for event in answering.report_ignored():
                _print_event(event, as_json)


def _print_event(event: InvitationEvent, as_json: bool) -> None:
    words = {
        "answered": f"enrolled, thumbprint {event.detail}; it must be the one that the device prints",
        "joined": "joined; its invitation has ended",
        "refused": f"a request was refused: {event.detail}",
        "expired": "its invitation has expired",
        "withdrawn": f"its invitation was withdrawn: {event.detail}; invite it again",
        "ignored": f"ignored {event.detail}",
        "waits": f"the broker cannot be reached: {event.detail}",
    }
    document = {"device": event.device, "state": event.state, "detail": event.detail, "steps": [*event.steps]}
    _print(as_json, document, f"{event.device or 'waiting'}: {words[event.state]}", *event.steps)


def _print(as_json: bool, document: Mapping[str, object], *lines: str) -> None:
    """Print one step, which a program may read at once."""
    if as_json:
        click.echo(printable_json(msgspec.json.encode(document).decode()))
    else:
        echo("\n".join(lines))
