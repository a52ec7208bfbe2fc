"""The TLS settings of a connection to the broker, and what its own certificate has to do with a failure."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

from agent.config import BrokerConfig
from agent.errors import LinkDown


class SelfClosingSocket(ssl.SSLSocket):
    """Closes itself when the handshake fails: paho drops the socket and leaves that to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def create_context(broker: BrokerConfig) -> ssl.SSLContext:
    """Verifies the broker, and shows our certificate where there is one. Raises LinkDown for files of no use."""
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


def describe_expiry(broker: BrokerConfig) -> str:
    """That our certificate has ended, by this machine's clock; else nothing.

    A broker that refuses a certificate closes while we still send, and its reason is mostly lost with that.
    """
    if not (broker.tls and broker.cert_file):
        return ""
    # Costs 30 ms and several MB: only for those whose connection failed.
    from cryptography import x509

    try:
        end = x509.load_pem_x509_certificate(Path(broker.cert_file).read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return ""
    if end > datetime.now(UTC):
        return ""
    return f"; the certificate {broker.cert_file} ended on {end:%Y-%m-%d}, put a new one in its place"
