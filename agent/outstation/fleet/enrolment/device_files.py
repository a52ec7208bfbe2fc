"""Device files: config, certificate and keys that a device needs to take part in a fleet."""

from __future__ import annotations

import gzip
import io
import tarfile
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from outstation.fleet.collector import encryption_keys
from outstation.fleet.config import FleetConfig
from outstation.fleet.enrolment import pki, revocation
from outstation.fleet.enrolment.pki import CertificateAuthority
from outstation.fleet.repository.layout import Layout
from outstation.foundation import durable_files, input_files
from outstation.foundation.config.toml_files import encode_value
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import EncryptionKey, PublicKey

SIGNING_KEY, TLS_KEY, CERTIFICATE = "device.key", "device-tls.key", "device.crt"
# Initial root of trust for the fleet's repository.
ROOT_METADATA = "root.json"

_PLAINTEXT_OPTION = "allow_plaintext = true"
_CA_OPTION = '# ca_file = "ca.pem"                 # if your own authority signed the web server\'s certificate'
_UPDATES_TOML = """
[updates]                             # bundles of the fleet; `outstation fleet rollout` selects which ones run
url = {url}
{option}
root = {root}                    # root of trust; the device fetches later versions
"""


class DeviceFiles:
    """Files of a device that is being enrolled: `public` ones, and the `private` keys that are made here.

    `tls_key` is the device's own key, None if it sent none.
    """

    def __init__(self, folder: Path, config: FleetConfig, device: str, tls_key: Ed25519PublicKey | None) -> None:
        self._folder, self._fleet, self._device, self._tls_key = folder, config.fleet.name, device, tls_key
        self._authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file)) if config.ca else None
        self._certificate: bytes | None = None
        self._is_renewal = False
        self._packed: Path | None = None
        self.public = _render_public_files(folder, config, device)
        self.private: dict[str, bytes] = {}

    def choose_signing_key(self, enrolled: PublicKey | None, *, reuse: bool) -> PublicKey:
        """Return the enrolled key if `reuse` permits it; otherwise make one."""
        if enrolled is not None and reuse:
            return enrolled
        made = keys.create()
        self.private[SIGNING_KEY] = made.pem
        return made.public

    def choose_certificate(self, home: Path, *, reuse: bool) -> None:
        """Keep the valid certificate in `home` if `reuse` permits it, or certify its key again if it ends soon.

        Without a certificate and a key, make a TLS key.
        """
        if self._authority is None:
            return
        if reuse:
            former = _load_certificate(self._folder, self._authority, home, self._tls_key)
            if former is not None and former.not_valid_after_utc < datetime.now(UTC) + pki.RENEW_BEFORE:
                # No other key is the device's own.
                key = former.public_key()
                assert isinstance(key, Ed25519PublicKey)
                self._is_renewal, self._tls_key = self._tls_key is None, key
            elif former is not None:
                self._certificate = former.public_bytes(Encoding.PEM)
        if self._certificate is None and self._tls_key is None:
            made = keys.create()
            self._tls_key, self.private[TLS_KEY] = made.private.public_key(), made.pem

    def require_no_private_keys(self) -> None:
        """Raise UsageError if private keys were made and no file takes them."""
        if made_here := " and ".join(sorted(self.private)):
            raise UsageError(
                f"device {self._device!r}: {made_here} would be made here, and no private key stays in the fleet's "
                "folder; name a file for them with --bundle-out, or better let the device make them: `outstation "
                "request`, then --request"
            )

    def issue(self, bundle: Path | None) -> None:
        """Issue the certificate, and pack all files into `bundle`. Raises UsageError."""
        if self._authority is not None:
            if self._certificate is None:
                assert self._tls_key is not None
                self._certificate = self._authority.certify_client(
                    self._device, self._fleet, self._tls_key, pki.DEVICE_LIFETIME
                )
                revocation.archive_certificate(self._folder, self._device, self._certificate)
            self.public[CERTIFICATE] = self._certificate
        if bundle is not None:
            pack_device_files(self.public | self.private, bundle)
            self._packed = bundle

    def write_public(self, home: Path) -> None:
        """Write the public files to `home`, the certificate last: with it the files are complete.

        A renewed certificate stays out: `fleet devices renew` takes the one in `home` for that of the device.
        """
        for name, data in self.public.items():
            if name != CERTIFICATE or not self._is_renewal:
                durable_files.write(home / name, data, 0o600)

    def withdraw(self) -> None:
        """Remove the bundle: its keys are not enrolled."""
        if self._packed is not None:
            durable_files.remove(self._packed)


def pack_device_files(files: dict[str, bytes], out: Path) -> None:
    """Pack the files of a device into one .tar.gz with mode 0600; the same files give the same bytes."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o600
            tar.addfile(entry, io.BytesIO(data))
    try:
        durable_files.write_new(out, packed.getvalue(), 0o600)
        durable_files.fsync(out.resolve().parent)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}; name a new file") from None


def _load_certificate(
    folder: Path, authority: CertificateAuthority, home: Path, tls_key: Ed25519PublicKey | None
) -> x509.Certificate | None:
    """Return the device's certificate, unless it is revoked, or is of another key than `tls_key`."""
    path = home / CERTIFICATE
    if not path.exists():
        return None
    certificate = x509.load_pem_x509_certificate(input_files.read_bytes(path))
    if revocation.is_revoked(folder, authority, certificate.serial_number):
        return None
    is_other = tls_key is not None and certificate.public_key() != tls_key
    return None if is_other else certificate


def _render_public_files(folder: Path, config: FleetConfig, device: str) -> dict[str, bytes]:
    root = Layout(folder).newest_root_path()
    collector = keys.load_public_for(Path(config.collector.key_file))
    operator = keys.load_public_for(Path(config.operator.key_file))
    files: dict[str, bytes] = {}
    text = _render_device_toml(device, config, collector, operator, encryption_keys.load_public(folder))
    if root is not None:
        files[ROOT_METADATA] = input_files.read_bytes(root)
    if root is not None and config.repository is not None:
        url = config.repository.url
        # Bundles are not secret, and their signatures need no TLS: an operator may serve them over http.
        plain = url.startswith("http:")
        text += _UPDATES_TOML.format(
            url=encode_value(url), option=_PLAINTEXT_OPTION if plain else _CA_OPTION, root=encode_value(ROOT_METADATA)
        )
    if config.ca is not None:
        files["ca.pem"] = input_files.read_bytes(Path(config.ca.cert_file))
    return files | {"outstation.toml": text.encode()}


def _render_device_toml(
    device: str, config: FleetConfig, collector: PublicKey, operator: PublicKey, encryption: EncryptionKey | None
) -> str:
    broker = config.broker
    text = f"""\
[device]
id = {encode_value(device)}
fleet = {encode_value(config.fleet.name)}
data_dir = "data"                     # readings, results and the outbox; relative to this file, or an absolute path

[broker]
url = {encode_value(broker.url)}
"""
    if broker.allow_plaintext:
        text += "allow_plaintext = true\n"
    if broker.tls:
        text += 'ca_file = "ca.pem"\ncert_file = "device.crt"\ntls_key_file = "device-tls.key"\n'
    text += f"""
[collector]
key = {encode_value(collector.text)}       # signs acknowledgements; acknowledged messages may be deleted
"""
    if encryption is not None:
        text += f"""\
encryption_key = {encode_value(encryption.text)}

# [privacy]
# encrypt = true                      # seal messages to encryption_key: the broker cannot read them
"""
    return (
        text
        + f"""
[operators]
keys = [{encode_value(operator.text)}]     # may sign commands and desired state

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
