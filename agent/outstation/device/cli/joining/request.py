"""Command `outstation request`: make a device's keys, and the request with which a fleet lets it in."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from outstation.foundation import durable_files
from outstation.foundation.cli.options import PATH, json_option
from outstation.foundation.cli.output import echo, emit
from outstation.foundation.errors import UsageError
from outstation.foundation.names import is_name


@click.command(epilog="Example: outstation request /etc/outstation --fleet acme --id pi-07 --token TOKEN")
@click.argument("folder", default=".", metavar="[DIR]", type=PATH)
@click.option("--fleet", required=True, metavar="NAME", help="The fleet's name.")
@click.option("--id", "device", required=True, metavar="DEVICE", help="The id under which the fleet will know it.")
@click.option("--token", help="From `outstation fleet devices token`: proves that the request is this device's.")
@click.option("--out", metavar="FILE", type=PATH, help="The request; default DIR/DEVICE.request.")
@json_option
def request(folder: Path, fleet: str, device: str, token: str | None, out: Path | None, as_json: bool) -> None:
    """Make the device's keys in DIR, which they never leave, and a request for the operator.

    Keys that are there stay. The request holds their public halves. The operator answers with a file for
    `outstation join`.
    """
    from outstation.device.bootstrap.invited import make_request

    for option, name in (("--fleet", fleet), ("--id", device)):
        if not is_name(name):
            raise UsageError(f"{option} {name!r} must be 1-64 of a-z 0-9 . _ - and start with a letter or digit")
    out = out or folder / f"{device}.request"
    try:
        content, key = make_request(folder, fleet, device, token)
    except ValueError as error:
        raise UsageError(f"--token: {error}; copy it completely") from None
    durable_files.write(out, content)
    document = {"request": str(out), "device": device, "fleet": fleet, "key": key.text, "thumbprint": key.kid}
    lines = [f"{out} written", f"key         {key.text}", f"thumbprint  {key.kid}"]
    check = "" if token else f" --thumbprint {key.kid}"
    lines.append(
        f"Next: outstation fleet enrol {device} --request {shlex.quote(out.name)}{check} --bundle-out {device}.tar.gz"
    )
    lines[-1] += "  (at the operator)"
    emit(document, as_json, lambda: echo("\n".join(lines)))
