"""Enrolment: create a fleet, and let devices in, with keys, certificates and config files.

Files are in the fleet's folder; the database holds the devices' signing keys.
"""

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

# User names of roles at the broker; `_all` cannot be a device id anyway.
RESERVED_NAMES = frozenset({"collector", "operator", "commander"})
SIGNING_KEY = "device.key"
# Initial root of trust for the fleet's repository.
ROOT_METADATA = "root.json"
# TLS client key and certificate of a device.
CONNECTION_FILES = ("device-tls.key", "device.crt")
PACKED_FILES = ("ca.pem", *CONNECTION_FILES, SIGNING_KEY, "outstation.toml", ROOT_METADATA)
# Folder of files for a new key; they replace the former ones once the database has that key.
REPLACEMENT = "replacement"
# Marker file in it, written last: the key, once all of its files are there.
COMPLETE_MARKER = "complete"

_PLAINTEXT_OPTION = "allow_plaintext = true"
_CA_OPTION = '# ca_file = "ca.pem"                 # if your own authority signed the web server\'s certificate'
_UPDATES_TOML = """
[updates]                             # bundles of the fleet; `outstation fleet rollout` selects which ones run
url = {url}
{option}
root = {root}                    # root of trust; the device fetches later versions
"""


class Enrolment(msgspec.Struct, frozen=True):
    """Outcome of `enrol`: key and files of the device, whether the key is new, and revoked certificates."""

    device: str
    key: PublicKey
    folder: Path
    is_new: bool
    revoked: RevocationOutcome


def init_fleet(folder: Path, name: str, broker: BrokerConfig) -> FleetConfig:
    """Create a fleet in `folder`. Raises UsageError if it has one, or the name or URL is invalid."""
    check_name(str(folder / fleet_config.FILE), "fleet.name", name)
    check_broker(str(folder / fleet_config.FILE), broker)
    files = [folder / file for file in (fleet_config.FILE, "collector.key", "operator.key", "ca.key")]
    existing = next((path for path in files if path.exists()), None)
    if existing is not None:
        raise UsageError(f"{existing}: exists already, and keys are never overwritten; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    keys.generate(folder / "collector.key")
    keys.generate(folder / "operator.key")
    home = folder.resolve() / "broker"
    (home / "data").mkdir(parents=True, exist_ok=True)
    durable_files.write_new(home / "mosquitto.conf", broker_config.render_config(broker, name, home).encode(), 0o644)
    if broker.tls:
        # Mosquitto warns of an access list that others can read.
        durable_files.write_new(home / "acl", broker_config.render_acl(name).encode(), 0o600)
        _write_certificates(folder, name, broker)
    # Last: a folder with this file is a complete fleet.
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

    Without `key`, the device's signing key is created here, once. With `replace`, the former key is revoked, or stays
    valid up to seq `keep_through` of the device's log; the device's certificates are revoked unless `keep_certificate`.
    The former files stay until the database has the new key. After a crash in between, the next call first makes the
    files match the enrolled key. Raises UsageError for a name or key that is taken.
    """
    if not is_name(device) or device in RESERVED_NAMES:
        syntax = "must be 1-64 of a-z 0-9 . _ - , first a letter or digit"
        problem = "is the name of a role" if device in RESERVED_NAMES else syntax
        raise UsageError(f"device {device!r} {problem}; choose another id")
    if collectors.is_collector(folder, device):
        raise UsageError(f"device {device!r}: is the name of a collector at the broker; choose another id")
    home = folder / "devices" / device
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    enrolled = store.active_key(device)
    _finish_replacement(home, enrolled)
    former = RevocationOutcome([], [])
    now = clock.to_rfc3339(clock.read().wall_us)
    if replace:
        # Before the new certificate is issued: it must not be revoked.
        revoke_former = (
            (lambda: None)
            if keep_certificate
            else revocation.make_certificate_revoker(folder, config, store, device, former)
        )
        key = _write_replacement(home, folder, config, device, key, CONNECTION_FILES if keep_certificate else ())
        new = store.enrol(device, key, replace=True, now=now, keep_through=keep_through, before_commit=revoke_former)
        _finish_replacement(home, key)
    else:
        key = key or _load_or_create_key(home, enrolled)
        new = store.enrol(device, key, replace=False, now=now)
        _write_device_files(home, folder, config, device)
    return Enrolment(device, key, home, new, former)


def pack_device_files(home: Path, out: Path) -> None:
    """Pack the files of a device into one .tar.gz with mode 0600; the same files give the same bytes."""
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
    replacement = home / REPLACEMENT
    replacement.mkdir(mode=0o700)
    for name in preserved:
        if (home / name).exists():
            durable_files.write(replacement / name, (home / name).read_bytes(), 0o600)
    key = key or _load_or_create_key(replacement, enrolled=None)
    _write_device_files(replacement, folder, config, device)
    durable_files.write(replacement / COMPLETE_MARKER, key.text.encode(), 0o600)
    return key


def _finish_replacement(home: Path, enrolled: PublicKey | None) -> None:
    """Move the replacement's files into `home` if its key is `enrolled`, else delete them.

    The files are copied, and the marker is removed before the folder: after a crash the next call starts again.
    """
    replacement = home / REPLACEMENT
    marker = replacement / COMPLETE_MARKER
    if enrolled is not None and marker.exists() and marker.read_text(encoding="ascii") == enrolled.text:
        files = {path.name: path for path in replacement.iterdir() if path != marker}
        for name, path in files.items():
            durable_files.write(home / name, path.read_bytes(), 0o600)
        for name in {*PACKED_FILES, keys.public_key_path(home / SIGNING_KEY).name} - files.keys():
            durable_files.remove(home / name)
    if replacement.exists():
        durable_files.remove(marker)
        shutil.rmtree(replacement)


def _load_or_create_key(home: Path, enrolled: PublicKey | None) -> PublicKey:
    path = home / SIGNING_KEY
    if path.exists() and (enrolled is None or keys.load_private(path).public.kid == enrolled.kid):
        return keys.load_private(path).public
    if enrolled is not None:
        # The device created its own key, or rotated it since; only its certificate and config are written again.
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
        url = config.repository.url
        # Bundles are not secret, and their signatures need no TLS: an operator may serve them over http.
        plain = url.startswith("http:")
        text += _UPDATES_TOML.format(
            url=_toml_string(url), option=_PLAINTEXT_OPTION if plain else _CA_OPTION, root=_toml_string(ROOT_METADATA)
        )
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
# The fleet {name}. Keep this folder private and back it up: its keys cannot be created again.
[fleet]
name = {_toml_string(name)}
db = "fleet.db"                       # collected messages; a path, or postgresql://USER@HOST/DB

[broker]
url = {_toml_string(broker.url)}
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
        text += "\n[ca]                                  # issues the devices' TLS certificates\n"
        text += 'cert_file = "ca.pem"\nkey_file = "ca.key"\n'
    return text


def _render_device_toml(device: str, config: FleetConfig, collector: PublicKey, operator: PublicKey) -> str:
    broker = config.broker
    text = f"""\
[device]
id = {_toml_string(device)}
fleet = {_toml_string(config.fleet.name)}
data_dir = "data"                     # readings, results and the outbox; relative to this file, or an absolute path

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
key = {_toml_string(collector.text)}       # signs acknowledgements; acknowledged messages may be deleted

[operators]
keys = [{_toml_string(operator.text)}]     # may sign commands and desired state

# A stream of readings, which arrive through the socket <data_dir>/intake.sock, or `outstation ingest watch FILE`.
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

# A task that runs a bundle on the stream.
# [tasks.exercise]
# stream = "watch"
# bundle = "exercise"
# schedule = "every 60 s"
# publish = "all"
"""
    )


def _toml_string(text: str) -> str:
    """Return a TOML basic string; JSON's escapes are a subset of TOML's."""
    return json.dumps(text, ensure_ascii=True)
