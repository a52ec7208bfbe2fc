"""Enrolment: create a fleet, and let devices in, with keys, certificates and config files.

Public files are in the fleet's folder; the database holds the devices' public signing keys. No private key of a device
stays with the operator: who has it can write the device's history anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from outstation.fleet import config as fleet_config
from outstation.fleet.collector import encryption_keys
from outstation.fleet.collector.subscriptions import make_share_group
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.key_table import KeyMaker
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import (
    broker_access,
    broker_config,
    broker_control,
    clients,
    collectors,
    homeassistant,
    pki,
    revocation,
    viewers,
    viewers_broker,
)
from outstation.fleet.enrolment.broker_access import AccessChange
from outstation.fleet.enrolment.device_files import CERTIFICATE, SIGNING_KEY, TLS_KEY, DeviceFiles
from outstation.fleet.enrolment.revocation import RevocationOutcome
from outstation.foundation import clock, durable_files, input_files
from outstation.foundation.config.toml_files import encode_value
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.foundation.names import check_name, is_name
from outstation.protocol.documents import enrolment_request
from outstation.protocol.documents.enrolment_request import EnrolmentRequest
from outstation.protocol.transport.broker_config import BrokerConfig, check_broker
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import PublicKey

# User names at the broker; `_all` cannot be a device id anyway.
RESERVED_NAMES = frozenset({*clients.ROLES, homeassistant.BRIDGE, homeassistant.HOME_ASSISTANT, viewers_broker.BRIDGE})


class Enrolment(msgspec.Struct, frozen=True):
    """Outcome of `enrol`: key of the device, its public files, and revoked certificates.

    `made_by`: who made the key; None if it was enrolled before.
    """

    device: str
    key: PublicKey
    made_by: KeyMaker | None
    is_new: bool
    folder: Path
    revoked: RevocationOutcome


def init_fleet(folder: Path, name: str, broker: BrokerConfig) -> FleetConfig:
    """Create a fleet in `folder`. Raises UsageError if it has one, or the name or URL is invalid."""
    pki.require_set_clock(clock.read().wall_us)
    check_name(str(folder / fleet_config.FILE), "fleet.name", name)
    check_broker(str(folder / fleet_config.FILE), broker)
    files = [folder / file for file in (fleet_config.FILE, "collector.key", "operator.key", "ca.key")]
    existing = next((path for path in files if path.exists()), None)
    if existing is not None:
        raise UsageError(f"{existing}: exists already, and keys are never overwritten; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    keys.generate(folder / "collector.key")
    keys.generate(folder / "operator.key")
    encryption_keys.create(folder)
    home = folder.resolve() / "broker"
    (home / "data").mkdir(parents=True, exist_ok=True)
    durable_files.write_new(home / "mosquitto.conf", broker_config.render_config(broker, name, home).encode(), 0o644)
    group = make_share_group()
    if broker.tls:
        broker_control.write_access_file(home / broker_control.ACCESS_FILE, broker_access.build_document(name, group))
        _write_certificates(folder, name, broker)
    # Last: a folder with this file is a complete fleet.
    durable_files.write_new(folder / fleet_config.FILE, _render_fleet_toml(name, broker, group).encode(), 0o600)
    return fleet_config.load(folder)


def enrol(
    folder: Path,
    config: FleetConfig,
    store: FleetStore,
    device: str,
    *,
    key: PublicKey | None = None,
    request: EnrolmentRequest | None = None,
    replace: bool = False,
    keep_through: int | None = None,
    keep_certificate: bool = False,
    bundle: Path | None = None,
) -> Enrolment:
    """Register `device`, and write its public files to `devices/<device>/` of the fleet's folder.

    The keys are those of `request`. Otherwise the TLS key, and without `key` also the signing key, are made here; they
    are written to `bundle` and nowhere else. With `replace`, the former key is revoked, or stays valid up to seq
    `keep_through` of the device's log; the device's certificates are revoked unless `keep_certificate`.

    `bundle` is written before the database commits, and the public files after it: a killed call can be repeated.
    Raises UsageError for a name or key that is taken, and if keys are made here without a `bundle`.
    """
    pki.require_set_clock(clock.read().wall_us)
    home = device_folder(folder, device)
    enrolled = store.active_key(device)
    if request is not None:
        check_request(config, device, request)
        key = request.key
    files = DeviceFiles(folder, config, device, None if request is None else request.tls_key)
    if key is None:
        key = files.choose_signing_key(enrolled, reuse=not replace)
    # A repeated command: its first run revoked the former key and its certificates.
    replace = replace and (enrolled is None or key.kid != enrolled.kid)
    files.choose_certificate(home, reuse=keep_certificate or not replace)
    if bundle is None:
        files.require_no_private_keys()
    former = RevocationOutcome([], [])
    issue = partial(files.issue, bundle)
    if replace and not keep_certificate and config.ca is not None:
        was_enrolled = any(owner == device for _, owner, *_ in store.enrolled_keys())
        issue = partial(
            revocation.replace_certificates, folder, config, device, issue, former, was_enrolled=was_enrolled
        )
    made_by: KeyMaker = "operator" if SIGNING_KEY in files.private else "device"
    register = partial(store.enrol, device, key, replace=replace, keep_through=keep_through, made_by=made_by)
    new = _commit(register, files, issue)
    files.write_public(home)
    _let_in(folder, config, device, former)
    return Enrolment(device, key, made_by if new else None, new, home, former)


def complete(folder: Path, config: FleetConfig, device: str, packed: dict[str, bytes]) -> None:
    """Complete the enrolment of a registered device, which a killed call may have left without files or access.

    `packed`: the members of its bundle.
    """
    home = device_folder(folder, device)
    last = "outstation.toml" if config.ca is None else CERTIFICATE
    if not (home / last).exists():
        names = sorted(packed.keys() - {SIGNING_KEY, TLS_KEY}, key=lambda name: name == last)
        for name in names:
            durable_files.write(home / name, packed[name], 0o600)
    _let_in(folder, config, device, RevocationOutcome([], []))


def _let_in(folder: Path, config: FleetConfig, device: str, former: RevocationOutcome) -> None:
    revocation.change_access(folder, config, AccessChange(device, "device", tuple(sorted(config.fleet.tasks))), former)


def _commit(register: Callable[..., bool], files: DeviceFiles, issue: Callable[[], None]) -> bool:
    """Register a key, with its files issued before the database commits; withdraw them if it does not."""
    try:
        return register(now=clock.now_rfc3339(), before_commit=issue)
    except BaseException:
        files.withdraw()
        raise


def device_folder(folder: Path, device: str) -> Path:
    """Return the folder of a device's public files. Raises UsageError if no device can have this name."""
    if not is_name(device) or device in RESERVED_NAMES:
        syntax = "must be 1-64 of a-z 0-9 . _ - , first a letter or digit"
        problem = "is the name of a role" if device in RESERVED_NAMES else syntax
        raise UsageError(f"device {device[:80]!r} {problem}; choose another id")
    if collectors.is_collector(folder, device) or viewers.is_viewer(folder, device):
        role = "collector" if collectors.is_collector(folder, device) else "viewer"
        raise UsageError(f"device {device!r}: is the name of a {role} at the broker; choose another id")
    return folder / "devices" / device


def enrol_on_this_machine(folder: Path, config: FleetConfig, store: FleetStore, device: str, home: Path) -> Path:
    """Let a new device in whose folder `home` is on this machine: make its keys there, as `outstation request` does.

    Simulated fleets and tests are their own operators. Returns `home`.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    signing_key, tls_key = (keys.generate(home / name, write_public=False) for name in (SIGNING_KEY, TLS_KEY))
    request = enrolment_request.parse(enrolment_request.build(config.fleet.name, device, signing_key, tls_key, None))
    done = enrol(folder, config, store, device, request=request)
    for path in done.folder.iterdir():
        durable_files.write(home / path.name, input_files.read_bytes(path), 0o600)
    return home


def read_request(path: Path) -> EnrolmentRequest:
    """Read and verify a request file. Raises UsageError."""
    try:
        return enrolment_request.parse(input_files.read_input(path, enrolment_request.MAX_BYTES))
    except MessageRefused as refused:
        hint = "make it again with `outstation request` on the device"
        raise UsageError(f"{path}: not a valid enrolment request ({refused}); {hint}") from None


def check_request(config: FleetConfig, device: str, request: EnrolmentRequest) -> None:
    """Check that `request` is for this device of this fleet. Raises UsageError."""
    body = request.body
    if (body.fleet, body.device) != (config.fleet.name, device):
        raise UsageError(
            f"the request is for device {body.device!r} of fleet {body.fleet!r}, not {device!r} of "
            f"{config.fleet.name!r}; name that device, or join again with --id and --fleet"
        )


def _write_certificates(folder: Path, name: str, broker: BrokerConfig) -> None:
    authority = pki.create_authority(name)
    durable_files.write_new(folder / "ca.key", authority.key_pem, 0o600)
    durable_files.write_new(folder / "ca.pem", authority.pem, 0o644)
    durable_files.write_new(folder / "broker" / "ca.pem", authority.pem, 0o644)
    revocation.create_crl(folder, authority)
    server = authority.issue_server(broker.host)
    durable_files.write_new(folder / "broker" / "server.crt", server.certificate, 0o644)
    durable_files.write_new(folder / "broker" / "server.key", server.key, 0o600)
    for role in clients.ROLES:
        client = authority.issue_client(role, name)
        durable_files.write_new(folder / f"{role}.crt", client.certificate, 0o644)
        durable_files.write_new(folder / f"{role}-tls.key", client.key, 0o600)


def _render_fleet_toml(name: str, broker: BrokerConfig, group: str) -> str:
    text = f"""\
# The fleet {name}. Keep this folder private and back it up: its keys cannot be created again.
[fleet]
name = {encode_value(name)}
db = "fleet.db"                       # collected messages; a path, or postgresql://USER@HOST/DB
# tasks = ["exercise"]                # the only tasks whose messages the broker takes; any without
share_group = {encode_value(group)}   # secret name under which several collectors share messages

[broker]
url = {encode_value(broker.url)}
"""
    if broker.allow_plaintext:
        text += "allow_plaintext = true\n"
    if broker.tls:
        text += 'ca_file = "ca.pem"\ncert_file = "collector.crt"\ntls_key_file = "collector-tls.key"\n'
    for role, purpose in (("collector", "signs acknowledgements"), ("operator", "signs commands and desired state")):
        text += f'\n[{role}]\nkey_file = "{role}.key"{"":14}# {purpose}\n'
        if broker.tls:
            text += f'cert_file = "{role}.crt"\ntls_key_file = "{role}-tls.key"\n'
    if broker.tls:
        text += "\n[commander]                           # the operator's second certificate, for commands\n"
        text += 'key_file = "operator.key"\ncert_file = "commander.crt"\ntls_key_file = "commander-tls.key"\n'
        text += "\n[broker_admin]                        # changes the broker's access rules\n"
        text += f'cert_file = "{broker_access.ADMIN}.crt"\ntls_key_file = "{broker_access.ADMIN}-tls.key"\n'
        text += "\n[ca]                                  # issues the devices' TLS certificates\n"
        text += 'cert_file = "ca.pem"\nkey_file = "ca.key"\n'
    return text
