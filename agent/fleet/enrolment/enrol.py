"""Making a fleet, and letting devices in: keys, certificates and config files on disk, signing keys in the database."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent import clock, durable_files
from agent.config import BrokerConfig, check_broker, check_name
from agent.errors import UsageError
from agent.fleet import config as fleet_config
from agent.fleet.config import FleetConfig
from agent.fleet.database.store import FleetStore
from agent.fleet.enrolment import broker_config, collectors, pki, revocation
from agent.fleet.enrolment.revocation import RevocationOutcome
from agent.fleet.repository.layout import Layout
from agent.names import is_name
from agent.wire import keys
from agent.wire.keys import PublicKey

# User names of the broker that are no device's; `_all` cannot be a device id anyway.
RESERVED_NAMES = frozenset({"collector", "operator", "commander"})
SIGNING_KEY = "device.key"
# What the device trusts first of the fleet's repository.
ROOT_METADATA = "root.json"
# With what a device connects to the broker.
CONNECTION_FILES = ("device-tls.key", "device.crt")
PACKED_FILES = ("ca.pem", *CONNECTION_FILES, SIGNING_KEY, "outstation.toml", ROOT_METADATA)
# In the device's folder: its files under another key, until the database has that key; then they replace the old ones.
REPLACEMENT = "replacement"
# Written last into it: the key whose files are there, all of them.
COMPLETE_MARKER = "whole"


class Enrolment(msgspec.Struct, frozen=True):
    """What `enrol` did: the device's key, where its files are, and whether the key was new to the database.

    `former`: the certificates that it revoked.
    """

    device: str
    key: PublicKey
    folder: Path
    is_new: bool
    revoked: RevocationOutcome


def init_fleet(folder: Path, name: str, broker: BrokerConfig) -> FleetConfig:
    """Write a new fleet into `folder`. Raises UsageError where one is there, or the name or URL cannot be used."""
    check_name(str(folder / fleet_config.FILE), "fleet.name", name)
    check_broker(str(folder / fleet_config.FILE), broker)
    marks = [folder / file for file in (fleet_config.FILE, "collector.key", "operator.key", "ca.key")]
    there = next((path for path in marks if path.exists()), None)
    if there is not None:
        raise UsageError(f"{there}: a fleet is there already; its keys are never overwritten, name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    keys.generate(folder / "collector.key")
    keys.generate(folder / "operator.key")
    _write_broker_files(folder.resolve(), name, broker)
    if broker.tls:
        _write_certificates(folder, name, broker)
    # Last: a folder with this file in it is a whole fleet.
    durable_files.write_new(folder / fleet_config.FILE, _render_fleet_toml(name, broker).encode(), 0o644)
    return fleet_config.load(folder)


def enrol(
    folder: Path,
    config: FleetConfig,
    store: FleetStore,
    device: str,
    *,
    key: PublicKey | None,
    replace: bool,
    keep_through: int | None = None,
    keep_certificate: bool = False,
) -> Enrolment:
    """Register `device`, and write its files to `devices/<device>/` of the fleet's folder.

    Without `key` the device's signing key is made here, once. A key that is replaced counts no more, or up to seq
    `keep_through` of the device's log; the certificates of `device` are revoked with it, but for `keep_certificate`.
    Raises UsageError for a name or key that is taken. With `replace`, the old files stay until the database has the new
    key; where that was killed in between, the next call makes them those of the key that counts, before it does
    anything else.
    """
    if not is_name(device) or device in RESERVED_NAMES:
        why = (
            "is the name of a role"
            if device in RESERVED_NAMES
            else "must be 1-64 of a-z 0-9 . _ - , first a letter or digit"
        )
        raise UsageError(f"device {device!r} {why}; choose another id")
    if collectors.is_collector(folder, device):
        raise UsageError(f"device {device!r}: a collector connects to the broker under this name; choose another id")
    home = folder / "devices" / device
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    enrolled = store.active_key(device)
    _finish_replacement(home, enrolled)
    former = RevocationOutcome([], [])
    now = clock.to_rfc3339(clock.read().wall_us)
    if replace:
        # Of the certificates that there are so far.
        revokes = (
            revocation.make_certificate_revoker(folder, config, store, device, former)
            if not keep_certificate
            else lambda: None
        )
        key = _write_replacement(home, folder, config, device, key, CONNECTION_FILES if keep_certificate else ())
        new = store.enrol(device, key, replace=True, now=now, keep_through=keep_through, before_commit=revokes)
        _finish_replacement(home, key)
    else:
        key = key or _load_or_create_key(home, enrolled)
        new = store.enrol(device, key, replace=False, now=now)
        _write_device_files(home, folder, config, device)
    return Enrolment(device, key, home, new, former)


def pack_device_files(home: Path, out: Path) -> None:
    """The files of a device as one .tar.gz, mode 0600: the same files give the same bytes."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for file in (home / name for name in PACKED_FILES if (home / name).exists()):
            data = file.read_bytes()
            entry = tarfile.TarInfo(file.name)
            entry.size, entry.mode = len(data), 0o600
            tar.addfile(entry, io.BytesIO(data))
    try:
        durable_files.write_new(out, packed.getvalue(), 0o600)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}; name a new file") from None


def _write_replacement(
    home: Path, folder: Path, config: FleetConfig, device: str, key: PublicKey | None, preserved: Sequence[str]
) -> PublicKey:
    coming = home / REPLACEMENT
    coming.mkdir(mode=0o700)
    for name in preserved:
        if (home / name).exists():
            durable_files.write(coming / name, (home / name).read_bytes(), 0o600)
    key = key or _load_or_create_key(coming, enrolled=None)
    _write_device_files(coming, folder, config, device)
    durable_files.write(coming / COMPLETE_MARKER, key.text.encode(), 0o600)
    return key


def _finish_replacement(home: Path, enrolled: PublicKey | None) -> None:
    """Put the replacement's files into `home` where its key is the one `enrolled`, else drop them.

    Copied, and the mark removed first: killed anywhere in here, the next call begins again with all of them.
    """
    coming = home / REPLACEMENT
    mark = coming / COMPLETE_MARKER
    if enrolled is not None and mark.exists() and mark.read_text(encoding="ascii") == enrolled.text:
        files = {path.name: path for path in coming.iterdir() if path != mark}
        for name, path in files.items():
            durable_files.write(home / name, path.read_bytes(), 0o600)
        for name in {*PACKED_FILES, keys.public_key_path(home / SIGNING_KEY).name} - files.keys():
            durable_files.remove(home / name)
    if coming.exists():
        durable_files.remove(mark)
        shutil.rmtree(coming)


def _load_or_create_key(home: Path, enrolled: PublicKey | None) -> PublicKey:
    path = home / SIGNING_KEY
    if path.exists() and (enrolled is None or keys.load_private(path).public.kid == enrolled.kid):
        return keys.load_private(path).public
    if enrolled is not None:
        # The device holds its own key, or has made a new one since; only its certificate and config are made anew.
        return enrolled
    return keys.generate(path).public


def _write_device_files(home: Path, folder: Path, config: FleetConfig, device: str) -> None:
    root = Layout(folder).newest_root_path()
    if root is not None:
        durable_files.write(home / ROOT_METADATA, root.read_bytes(), 0o600)
    collector = keys.load_public_for(Path(config.collector.key_file))
    operator = keys.load_public_for(Path(config.operator.key_file))
    text = _render_device_toml(device, config, collector, operator)
    if root is not None and config.repository is not None:
        text += _render_updates_toml(config.repository.url)
    durable_files.write(home / "outstation.toml", text.encode(), 0o600)
    if config.ca is None:
        return
    authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
    durable_files.write(home / "ca.pem", authority.pem, 0o600)
    certificate = home / "device.crt"
    if not certificate.exists() or revocation.is_revoked(folder, authority, certificate):
        issued = authority.issue_client(device, config.fleet.name)
        revocation.archive_certificate(folder, device, issued.certificate)
        durable_files.write(home / "device-tls.key", issued.key, 0o600)
        durable_files.write(certificate, issued.certificate, 0o600)


def _write_broker_files(folder: Path, name: str, broker: BrokerConfig) -> None:
    home = folder / "broker"
    (home / "data").mkdir(parents=True, exist_ok=True)
    durable_files.write_new(home / "mosquitto.conf", broker_config.render_config(broker, name, home).encode(), 0o644)
    if broker.tls:
        # Mosquitto warns of an access list that others can read.
        durable_files.write_new(home / "acl", broker_config.render_acl(name).encode(), 0o600)


def _write_certificates(folder: Path, name: str, broker: BrokerConfig) -> None:
    authority = pki.create_authority(name)
    durable_files.write_new(folder / "ca.key", authority.key_pem, 0o600)
    durable_files.write_new(folder / "ca.pem", authority.pem, 0o644)
    durable_files.write_new(folder / "broker" / "ca.pem", authority.pem, 0o644)
    revocation.create_crl(folder, authority)
    server = authority.issue_server(broker.host)
    durable_files.write_new(folder / "broker" / "server.crt", server.certificate, 0o644)
    durable_files.write_new(folder / "broker" / "server.key", server.key, 0o600)
    for role in sorted(RESERVED_NAMES):
        client = authority.issue_client(role, name)
        durable_files.write_new(folder / f"{role}.crt", client.certificate, 0o644)
        durable_files.write_new(folder / f"{role}-tls.key", client.key, 0o600)


def _render_fleet_toml(name: str, broker: BrokerConfig) -> str:
    text = f"""\
# The fleet {name}. Keep this folder private and back it up: its keys cannot be made again.
[fleet]
name = {_toml_string(name)}
db = "fleet.db"                       # what was collected; a path, or postgresql://USER@HOST/DB

[broker]
url = {_toml_string(broker.url)}
"""
    if broker.allow_plaintext:
        text += "allow_plaintext = true\n"
    if broker.tls:
        text += 'ca_file = "ca.pem"\ncert_file = "collector.crt"\ntls_key_file = "collector-tls.key"\n'
    for role, what in (("collector", "signs acknowledgements"), ("operator", "signs commands and desired state")):
        text += f'\n[{role}]\nkey_file = "{role}.key"{"":14}# {what}\n'
        if broker.tls:
            text += f'cert_file = "{role}.crt"\ntls_key_file = "{role}-tls.key"\n'
    if broker.tls:
        text += "\n[commander]                           # the operator again: one connection for each certificate\n"
        text += 'key_file = "operator.key"\ncert_file = "commander.crt"\ntls_key_file = "commander-tls.key"\n'
        text += "\n[ca]                                  # issues the devices' TLS certificates\n"
        text += 'cert_file = "ca.pem"\nkey_file = "ca.key"\n'
    return text


def _render_device_toml(device: str, config: FleetConfig, collector: PublicKey, operator: PublicKey) -> str:
    broker = config.broker
    text = f"""\
[device]
id = {_toml_string(device)}
fleet = {_toml_string(config.fleet.name)}
data_dir = "data"                     # readings, results and the outbox; beside this file, or an absolute path

[broker]
url = {_toml_string(broker.url)}
"""
    if broker.allow_plaintext:
        text += "allow_plaintext = true\n"
    if broker.tls:
        text += 'ca_file = "ca.pem"\ncert_file = "device.crt"\ntls_key_file = "device-tls.key"\n'
    return (
        text
        + f"""
[collector]
key = {_toml_string(collector.text)}       # signs acknowledgements: what it has is deleted here

[operators]
keys = [{_toml_string(operator.text)}]     # may sign commands and desired state

# What is measured. Readings come through the socket <data_dir>/intake.sock, or `outstation ingest watch FILE`.
# [streams.watch]
# fields = [
#   {{ name = "ax", unit = "g", min = -16, max = 16 }},
#   {{ name = "ay", unit = "g", min = -16, max = 16 }},
#   {{ name = "az", unit = "g", min = -16, max = 16 }},
#   {{ name = "wx", unit = "rad/s" }},
#   {{ name = "wy", unit = "rad/s" }},
#   {{ name = "wz", unit = "rad/s" }},
# ]
# source = {{ kind = "socket" }}

# What is run over it.
# [tasks.exercise]
# stream = "watch"
# bundle = "exercise"
# schedule = "every 60 s"
# publish = "all"
"""
    )


def _render_updates_toml(url: str) -> str:
    # Bundles need no secrecy, and their signatures no TLS: an operator who serves them in the clear may.
    plain = "allow_plaintext = true\n" if url.startswith("http:") else ""
    own = '# ca_file = "ca.pem"                 # where an authority of your own signed the web server\'s certificate\n'
    return f"""
[updates]                             # bundles that the fleet publishes; `outstation fleet rollout` says which is run
url = {_toml_string(url)}
{plain or own}root = {_toml_string(ROOT_METADATA)}                    # whose keys count; later ones are found from this one
"""


def _toml_string(text: str) -> str:
    """A TOML basic string; JSON's escapes are a subset of TOML's."""
    return json.dumps(text, ensure_ascii=True)
