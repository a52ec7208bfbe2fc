"""TLS settings of a broker connection, and a note on an expired client certificate."""

from __future__ import annotations

import contextlib
import ssl
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.broker_config import BrokerConfig


class SelfClosingSocket(ssl.SSLSocket):
    """Socket that closes itself when the handshake fails; paho would leave it to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def create_context(broker: BrokerConfig) -> ssl.SSLContext:
    """Return a context that verifies the broker and presents the client certificate, if any.

    Raises LinkDown if a file cannot be used.
    """
    try:
        made = ssl.create_default_context(cafile=broker.ca_file)
        made.sslsocket_class = SelfClosingSocket
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        if broker.cert_file:
            made.load_cert_chain(broker.cert_file, broker.tls_key_file)
    except OSError as error:
        raise LinkDown(
            f"TLS files {broker.ca_file}, {broker.cert_file}, {broker.tls_key_file}: {error}; "
            "check that they exist, belong together and can be read"
        ) from error
    return made


@contextlib.contextmanager
def client_files(broker: BrokerConfig, files: dict[str, bytes]) -> Iterator[BrokerConfig]:
    """Provide the settings with files of these contents, by the names of their keys, until a connection is made."""
    with tempfile.TemporaryDirectory(prefix="outstation-") as folder:
        for name, content in files.items():
            durable_files.write(Path(folder) / name, content, 0o600)
        yield msgspec.structs.replace(broker, **{name: str(Path(folder) / name) for name in files})


def describe_expiry(broker: BrokerConfig) -> str:
    """Return a note if the client certificate has expired by this machine's clock, else "".

    A broker that refuses a certificate closes the connection while the client still sends, which mostly loses the
    reason.
    """
    if not (broker.tls and broker.cert_file):
        return ""
    # The import costs 30 ms and several MB: only after a failed connection.
    from cryptography import x509

    try:
        end = x509.load_pem_x509_certificate(input_files.read_bytes(Path(broker.cert_file))).not_valid_after_utc
    except (OSError, ValueError):
        return ""
    if end > datetime.now(UTC):
        return ""
    return f"; the certificate {broker.cert_file} expired on {end:%Y-%m-%d}; replace it"
