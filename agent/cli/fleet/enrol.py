"""`outstation fleet init` and `enrol`: create a fleet, and let devices in."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent import clock
from agent.bootstrap.owner import become_owner
from agent.cli.fleet.common import fleet_option, open_store, print_lines
from agent.cli.output import emit, json_option
from agent.config import BrokerConfig, check_broker
from agent.errors import ConfigError, UsageError
from agent.fleet import config as fleet_config
from agent.names import is_name
from agent.quantities import parse_duration
from agent.wire import keys

if TYPE_CHECKING:
    from agent.fleet.enrolment.enrol import Enrolment


@click.command("init", epilog="Example: outstation fleet init acme --broker mqtts://broker.example.org")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--name", help="The fleet's name, a level of its topics; default the folder's name.")
@click.option("--broker", "url", metavar="URL", help="URL of the broker for devices; default mqtts://THIS-HOST:8883.")
@json_option
def init(folder: Path, name: str | None, url: str | None, as_json: bool) -> None:
    """Create a fleet in DIR: keys, certificate authority, broker config with access rules."""
    from agent.fleet.enrolment import broker_config
    from agent.fleet.enrolment.enrol import init_fleet

    become_owner(folder)
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
    plugin = broker_config.find_plugin() if broker.tls else None
    document = {
        "fleet": config.fleet.name,
        "dir": str(folder),
        "broker": broker.shown_url,
        **public,
        "broker_conf": str(conf),
        "broker_plugin": str(plugin) if plugin else None,
    }
    done = f"Fleet {name} in {folder}. Start the broker with: mosquitto -c {conf}"
    if plugin is not None and not plugin.exists():
        done += (
            f"\nMosquitto's plugin {plugin} is not on this machine: correct the line `plugin` for the broker's machine."
        )
    following = f"Next: outstation fleet token DEVICE --dir {folder}"
    emit(document, as_json, lambda: print_lines(done, following))


@click.command("token", epilog="Example: outstation fleet token pi-07")
@click.argument("device")
@click.option(
    "--valid", metavar="TIME", default="24 h", show_default=True, help="How long the token lets the device in."
)
@fleet_option
@json_option
def token(device: str, valid: str, folder: str | None, as_json: bool) -> None:
    """Make a token with which DEVICE joins once: `outstation join --token`."""
    from agent.fleet.enrolment import join_tokens
    from agent.fleet.enrolment.enrol import device_folder

    home = fleet_config.find_folder(folder)
    config = fleet_config.load(home)
    try:
        valid_us = round(parse_duration(valid) * 1e6)
    except ValueError as error:
        raise UsageError(f"--valid: {error}") from None
    expires_us = clock.read().wall_us + valid_us
    made = join_tokens.create(device_folder(home, device), expires_us)
    document = {
        "device": device,
        "fleet": config.fleet.name,
        "token": made,
        "expires": clock.to_rfc3339(expires_us),
    }
    emit(
        document,
        as_json,
        lambda: print_lines(
            f"On the device: outstation join --fleet {config.fleet.name} --id {device} --token {made}",
            f"Keep the token secret until then. It lets one key in, before {document['expires']}.",
        ),
    )


@click.command(
    "enrol", epilog="Example: outstation fleet enrol pi-07 --request pi-07.request --bundle-out pi-07.tar.gz"
)
@click.argument("device")
@click.option(
    "--request",
    "request_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What `outstation join` wrote on the device: its public keys. No private key leaves the device.",
)
@click.option("--thumbprint", metavar="KID", help="With --request: its key's thumbprint, as the device printed it.")
@click.option("--key", metavar="PUB", help="The device's public key, or a file with it; default a new key.")
@click.option("--replace", is_flag=True, help="Revoke the device's key and TLS certificate, and enrol the new key.")
@click.option(
    "--keep-backlog",
    metavar="SEQ",
    type=click.IntRange(min=0),
    help="With --replace: the old key stays valid up to SEQ of its log; `outstation status` shows SEQ.",
)
@click.option(
    "--keep-certificate",
    is_flag=True,
    help="With --replace: keep its TLS certificate valid; for a device that was not stolen and is far away.",
)
@click.option(
    "--bundle-out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Pack its files as one .tar.gz, with the private keys that are made here and kept nowhere else.",
)
@fleet_option
@json_option
def enrol(
    device: str,
    request_file: Path | None,
    thumbprint: str | None,
    key: str | None,
    replace: bool,
    keep_backlog: int | None,
    keep_certificate: bool,
    bundle_out: Path | None,
    folder: str | None,
    as_json: bool,
) -> None:
    """Let DEVICE in: register its signing key, issue its TLS certificate, write its config."""
    from agent.fleet.enrolment import enrol as enrolment
    from agent.fleet.enrolment import join_tokens

    if not replace:
        for option, given in (("--keep-backlog", keep_backlog is not None), ("--keep-certificate", keep_certificate)):
            if given:
                raise UsageError(f"{option} applies to what --replace replaces; add --replace")
    if request_file is not None and key is not None:
        raise UsageError("--request has the device's key already; leave --key out")
    if thumbprint is not None and request_file is None:
        raise UsageError("--thumbprint is that of the key in a request; add --request")
    if bundle_out is not None and bundle_out.exists():
        raise UsageError(f"{bundle_out}: exists already; name a new file")
    home = fleet_config.find_folder(folder)
    config = fleet_config.load(home)
    request = enrolment.read_request(request_file) if request_file is not None else None
    if request is not None:
        device_home = enrolment.device_folder(home, device)
        enrolment.check_request(config, device, request)
        join_tokens.authenticate(device_home, request, thumbprint, clock.read().wall_us)
    with open_store(config) as store:
        done = enrolment.enrol(
            *(home, config, store, device),
            key=keys.load_public(key) if key else None,
            request=request,
            replace=replace,
            keep_through=keep_backlog,
            keep_certificate=keep_certificate,
            bundle=bundle_out,
        )
    _emit_enrolment(done, config.fleet.name, bundle_out, as_json)


def _emit_enrolment(done: Enrolment, fleet: str, bundle: Path | None, as_json: bool) -> None:
    document = {
        "device": done.device,
        "fleet": fleet,
        "key": done.key.text,
        "thumbprint": done.key.kid,
        "made_by": done.made_by,
        "new": done.is_new,
        "files": str(done.folder),
        "bundle": str(bundle) if bundle else None,
        "revoked_certificates": done.revoked.certificates,
        "problem": done.revoked.problem,
        "steps": done.revoked.steps,
    }
    state = "enrolled" if done.is_new else "was enrolled with this key already"
    unpack = f"On the device: outstation init DIR --from {bundle}"
    where = unpack if bundle else f"Its files: {done.folder}; --bundle-out FILE packs them"
    lines = [f"{done.device} {state}, key {done.key.text}", where]
    if done.made_by == "operator":
        lines.append(
            f"{bundle} is the only copy of its private keys: delete it once the device has them. Whoever has it "
            "can sign as the device; `outstation join` on the device avoids that."
        )
    if done.revoked.certificates:
        lines.append(f"Its former certificate ({', '.join(done.revoked.certificates)}) is revoked.")
    lines += done.revoked.steps
    if done.revoked.problem:
        lines.append(f"Warning: {done.revoked.problem}.")
    emit(document, as_json, lambda: print_lines(*lines))
