"""`outstation fleet init` and `enrol`: create a fleet, and let devices in."""

from __future__ import annotations

import os
import shlex
import socket
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import fleet_options, open_store, print_lines
from outstation.foundation import clock, durable_files
from outstation.foundation.cli.options import DURATION, PATH, json_option
from outstation.foundation.cli.output import echo, emit, print_table
from outstation.foundation.errors import ConfigError, UsageError
from outstation.foundation.names import is_name
from outstation.foundation.owner import give_tree
from outstation.foundation.text import format_duration
from outstation.protocol.transport.broker_config import BrokerConfig, check_broker
from outstation.protocol.wire import keys

if TYPE_CHECKING:
    from outstation.fleet.config import FleetConfig
    from outstation.fleet.enrolment.enrol import Enrolment
    from outstation.fleet.repository.create import CreatedRepository
    from outstation.protocol.documents.enrolment_request import EnrolmentRequest


@click.command("init", epilog="Example: outstation fleet init acme --broker mqtts://broker.example.org")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--name", help="The fleet's name, a level of its topics; default the folder's name.")
@click.option("--broker", "url", metavar="URL", help="URL of the broker for devices; default mqtts://THIS-HOST:8883.")
@click.option(
    "--root-keys",
    metavar="FOLDER",
    type=PATH,
    help="Where the repository's three root keys are written, such as a mounted stick; default DIR.root-keys.",
)
@click.option(
    "--repository",
    "repository_url",
    metavar="URL",
    help="Where devices find DIR/repository; default https://BROKER/NAME/repository, or that folder on one machine.",
)
@click.option("--no-repository", is_flag=True, help="No repository: devices that are enrolled now get no updates.")
@json_option
def init(
    folder: Path,
    name: str | None,
    url: str | None,
    root_keys: Path | None,
    repository_url: str | None,
    no_repository: bool,
    as_json: bool,
) -> None:
    """Create a fleet in DIR: keys, certificate authority, broker config with access rules, repository of bundles.

    Devices learn the repository's address and root of trust when they are enrolled, so each can be updated from its
    first day. Its root keys can change every other key: move them to separate offline media.
    """
    from outstation.fleet.enrolment.enrol import init_fleet
    from outstation.fleet.repository import create
    from outstation.fleet.repository.layout import Layout

    if no_repository and (root_keys or repository_url):
        raise UsageError("--no-repository makes none; leave out --root-keys and --repository")
    name = name or folder.resolve().name
    if not is_name(name):
        raise UsageError(f"{name!r} cannot name a fleet: 1-64 of a-z 0-9 . _ - , first a letter or digit; use --name")
    broker = BrokerConfig(url=url or f"mqtts://{socket.gethostname().lower()}:8883")
    try:
        check_broker("--broker", broker)
    except ConfigError as error:
        raise UsageError(f"--broker: {error.problem}") from None
    if root_keys is not None:
        create.require_outside(root_keys, folder)
    repository_url = repository_url or _choose_repository(broker.host, name, folder)
    create.check_url("--repository", repository_url)
    if root_keys is None and not no_repository:
        root_keys = Layout(folder).initial_root_keys
        try:
            root_keys.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{root_keys}: {error.strerror}; name another folder with --root-keys") from None
    config = init_fleet(folder, name, broker)
    made = None
    if root_keys is not None:
        create.write_url(folder, repository_url)
        made = create.create(folder, root_keys, roots=3, threshold=2)
    # Root keeps the root keys, which are elsewhere.
    give_tree(folder)
    _emit_fleet(config, folder, broker, repository_url, made, as_json)


def _emit_fleet(
    config: FleetConfig,
    folder: Path,
    broker: BrokerConfig,
    repository_url: str,
    made: CreatedRepository | None,
    as_json: bool,
) -> None:
    """Print a new fleet and the next steps; `made` is its repository, if it has one."""
    from outstation.fleet.enrolment import broker_config

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
        "repository": repository_url if made else None,
        "root_keys": [str(path) for path in made.keys] if made else [],
    }
    # As root, Mosquitto becomes the user mosquitto before it reads the folder.
    own = f"chown -R mosquitto: {conf.parent} && " if os.geteuid() == 0 else ""
    lines = [f"Fleet {config.fleet.name} in {folder}. Start the broker with: {own}mosquitto -c {conf}"]
    if plugin is not None and not plugin.exists():
        lines.append(
            f"Mosquitto's plugin {plugin} is not on this machine: correct the line `plugin` for the broker's machine."
        )
    if made is not None:
        served = folder.resolve() / "repository"
        lines.append(
            f"Devices on this machine fetch their bundles from {served}; for others, --repository URL."
            if repository_url == str(served)
            else f"Serve {served} at {repository_url}: devices fetch their bundles there."
        )
        place = made.keys[0].parent
        lines.append(f"Move the root keys in {place} to separate offline media: two of them change any other key.")
    lines.append(
        f"Next: outstation fleet {'invite' if broker.tls else 'token'} DEVICE --dir {shlex.quote(str(folder))}"
    )
    emit(document, as_json, lambda: print_lines(*lines))


def _choose_repository(host: str, name: str, folder: Path) -> str:
    """Return the folder itself if the devices are on this machine, else an address on the broker's machine."""
    if host in ("localhost", "127.0.0.1", "::1"):
        return str(folder.resolve() / "repository")
    return f"https://{f'[{host}]' if ':' in host else host}/{name}/repository"


@click.command("token", epilog="Example: outstation fleet devices token pi-07")
@click.argument("device")
@click.option(
    "--valid",
    "valid_s",
    type=DURATION,
    default="24 h",
    show_default=True,
    help="How long the token lets the device in.",
)
@click.option("--bare", is_flag=True, help="Print the token alone, for scripts.")
@fleet_options
def token(device: str, valid_s: float, bare: bool, home: Path, as_json: bool) -> None:
    """Make a token with which DEVICE joins once: `outstation request --token`."""
    from outstation.fleet.enrolment import join_tokens
    from outstation.fleet.enrolment.enrol import device_folder

    config = fleet_config.load(home)
    expires_us = clock.read().wall_us + round(valid_s * 1e6)
    made = join_tokens.create(device_folder(home, device), expires_us)
    document = {"device": device, "fleet": config.fleet.name, "token": made, "expires": clock.to_rfc3339(expires_us)}
    lines = [
        f"On the device: outstation request --fleet {config.fleet.name} --id {device} --token {made}",
        f"Keep the token secret until then. It lets one key in, before {document['expires']}.",
    ]
    emit(document, as_json, lambda: print_lines(*([made] if bare else lines)))


@click.command(
    "enrol", epilog="Example: outstation fleet enrol pi-07 --request pi-07.request --bundle-out pi-07.tar.gz"
)
@click.argument("device")
@click.option(
    "--request",
    "request_file",
    metavar="FILE",
    type=PATH,
    help="What `outstation request` wrote on the device: its public keys. No private key leaves the device.",
)
@click.option("--thumbprint", metavar="KID", help="With --request: its key's thumbprint, as the device printed it.")
@click.option(
    "--device-key", "key", metavar="PUB", help="The device's public key, or a file with it; default a new key."
)
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
    type=PATH,
    help="Pack its files as one .tar.gz, with the private keys that are made here and kept nowhere else.",
)
@fleet_options
def enrol(
    device: str,
    request_file: Path | None,
    thumbprint: str | None,
    key: str | None,
    replace: bool,
    keep_backlog: int | None,
    keep_certificate: bool,
    bundle_out: Path | None,
    home: Path,
    as_json: bool,
) -> None:
    """Let DEVICE in: register its signing key, issue its TLS certificate, write its config."""
    from outstation.fleet.enrolment import enrol as enrolment

    if not replace:
        for option, given in (("--keep-backlog", keep_backlog is not None), ("--keep-certificate", keep_certificate)):
            if given:
                raise UsageError(f"{option} applies to what --replace replaces; add --replace")
    if request_file is not None and key is not None:
        raise UsageError("--request has the device's key already; leave --device-key out")
    if thumbprint is not None and request_file is None:
        raise UsageError("--thumbprint is that of the key in a request; add --request")
    if bundle_out is not None and bundle_out.exists():
        raise UsageError(f"{bundle_out}: exists already; name a new file")
    config = fleet_config.load(home)
    request = _authenticate(home, config, device, request_file, thumbprint)
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


def _authenticate(
    home: Path, config: FleetConfig, device: str, file: Path | None, thumbprint: str | None
) -> EnrolmentRequest | None:
    """Return the request in `file`, if there is one, once it is proved to be the device's. Raises UsageError."""
    from outstation.fleet.enrolment import enrol as enrolment
    from outstation.fleet.enrolment import join_tokens

    if file is None:
        return None
    request = enrolment.read_request(file)
    device_home = enrolment.device_folder(home, device)
    enrolment.check_request(config, device, request)
    join_tokens.authenticate(device_home, request, thumbprint, clock.read().wall_us)
    return request


@click.command("enrol-list", epilog="Example: outstation fleet devices enrol-list devices.csv --out enrolments")
@click.argument("file", metavar="CSV", type=PATH)
@click.option("--out", metavar="FOLDER", required=True, type=PATH, help="Folder for the files.")
@fleet_options
def enrol_list(file: Path, out: Path, home: Path, as_json: bool) -> None:
    """Let the devices of a list in, each with a file FOLDER/DEVICE.tar.gz for `outstation join`.

    CSV has a column device, and optionally request (the file that `outstation request` wrote, relative to CSV) and
    thumbprint. Without a request the keys are made here, and the file is their only copy. An enrolled device keeps its
    keys, so a stopped call can be repeated. Exit 1 if a device could not be enrolled.
    """
    from outstation.device.bootstrap.joining import read_enrolment
    from outstation.fleet.enrolment import device_list
    from outstation.fleet.enrolment import enrol as enrolment

    config, listed = fleet_config.load(home), device_list.read(file)
    durable_files.make_folder(out)
    results: list[dict[str, str]] = []
    with open_store(config) as store:
        for entry in listed:
            bundle = out / f"{entry.device}.tar.gz"
            state, problem = "enrolled", ""
            try:
                is_enrolled = store.active_key(entry.device) is not None
                if is_enrolled and bundle.exists():
                    state = "enrolled before"
                    enrolment.complete(home, config, entry.device, read_enrolment(bundle))
                elif is_enrolled and entry.request is None:
                    # Its keys were in that file alone; others would shut the device out.
                    state = "enrolled before, file gone"
                else:
                    # Of a call that ended before it registered the key.
                    durable_files.remove(bundle)
                    request = _authenticate(home, config, entry.device, entry.request, entry.thumbprint)
                    enrolment.enrol(home, config, store, entry.device, request=request, bundle=bundle)
            except UsageError as error:
                state, problem = "failed", str(error)
            results.append({"device": entry.device, "state": state, "file": str(bundle), "problem": problem})
    passed = all(result["state"] != "failed" for result in results)
    emit(results, as_json, lambda: _print_list(results, out), passed=passed)


def _print_list(results: list[dict[str, str]], out: Path) -> None:
    for result in results:
        if result["state"] == "failed":
            echo(f"{result['device']}: {result['problem']}", err=True)
    counts = Counter(result["state"] for result in results)
    echo(f"{'; '.join(f'{counts[state]} {state}' for state in sorted(counts))}; files in {out}")


@click.command("renew", epilog="Example: outstation fleet devices renew")
@click.argument("devices", metavar="[DEVICE]...", nargs=-1)
@click.option(
    "--before", "before_s", type=DURATION, default="90 d", show_default=True, help="Renew what ends within this time."
)
@click.option("--wait", metavar="SECONDS", type=click.FloatRange(0.1, 600), default=15.0, show_default=True,
              help="How long to wait for a device's answer.")  # fmt: skip
@fleet_options
def renew(devices: tuple[str, ...], before_s: float, wait: float, home: Path, as_json: bool) -> None:
    """Renew the TLS certificates of connected devices over MQTT before they end; run it from cron each day.

    The device keeps its key, and uses the certificate at its next connection. A device that is away is tried again by
    the next call. Once its certificate has ended, it cannot connect: `outstation request` there, `fleet enrol
    --request` here and `outstation join` let it in again, with all its data. Exit 1 if a certificate ended.
    """
    from outstation.fleet.cli.command import send_command
    from outstation.fleet.enrolment import renewal

    config = fleet_config.load(home)
    if config.ca is None:
        raise UsageError("the broker is used without TLS, so devices have no certificates to renew")
    results = []
    with open_store(config) as store:
        for due in renewal.list_due(home, store, before_s, frozenset(devices)):
            left = due.days_left(datetime.now(UTC))
            state, detail = "ended", "outstation request on the device, then fleet enrol --request"
            if left >= 0 or renewal.may_have_newer(home, due):
                pem = renewal.issue(home, config, store, due)
                if pem is None:
                    continue
                args = {"certificate": pem.decode("ascii")}
                sent = send_command(home, config, store, due.device, "install-certificate", args, wait)
                if left >= 0 or sent.ok:
                    state = "renewed" if sent.ok else "waits"
                    detail = sent.reply.summary if sent.reply else sent.reason
                if sent.ok:
                    renewal.confirm(home, config, store, due, pem)
            end = f"{due.end:%Y-%m-%d}"
            results.append({"device": due.device, "state": state, "end": end, "days_left": left, "detail": detail})
    rows = [[result[name] for name in ("device", "state", "end", "days_left", "detail")] for result in results]
    empty = f"No certificate ends within {format_duration(before_s * 1e6)}."
    emit(
        results,
        as_json,
        lambda: print_table(["device", "state", "former end", "days", "detail"], rows, empty),
        passed=all(result["state"] != "ended" for result in results),
    )


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
    unpack = f"Copy it to the device, and there: outstation join {bundle.name} --dir DIR" if bundle else ""
    where = unpack or f"Its files: {done.folder}; --bundle-out FILE packs them"
    lines = [f"{done.device} {state}, key {done.key.text}", where]
    if done.made_by == "operator":
        lines.append(
            f"{bundle} is the only copy of its private keys: delete it once the device has them. Whoever has it "
            "can sign as the device; `outstation request` on the device avoids that."
        )
    if done.revoked.certificates:
        lines.append(f"Its former certificate ({', '.join(done.revoked.certificates)}) is revoked.")
    lines += done.revoked.steps
    if done.revoked.problem:
        lines.append(f"Warning: {done.revoked.problem}.")
    emit(document, as_json, lambda: print_lines(*lines))
